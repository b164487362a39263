"""The report as an HTML page: its values, what it does with hostile texts, runs of every state, and its output file."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fakes
import pytest
from click.testing import CliRunner, Result
from fakes import QUIET, World, fake_backends, make_recipe

from tapir_local.commands.main import cli
from tapir_local.data.dataset import Draft
from tapir_local.errors import TapirError
from tapir_local.files import read_rows
from tapir_local.page import build
from tapir_local.page.answers import TEXT_LIMITS, browser_data, read_answered_rows, script_json, text_limit
from tapir_local.page.build import PAGE_SECTIONS, RunPage, build_page, check_page_output, run_page
from tapir_local.page.curriculum import drafts_figure
from tapir_local.page.draw import SERIES, color_by, draw_svg, inline_values
from tapir_local.page.judging import scores_figure
from tapir_local.page.parts import Browser, Figure, Grid
from tapir_local.page.spending import KINDS_OF_WORK, rates_by_cost_figure, time_section
from tapir_local.page.summary import all_stages, read_view
from tapir_local.page.timeline import Bar, lay_out, timeline_figure
from tapir_local.page.training_log import loss_points, read_training_rounds, running_means
from tapir_local.pipeline.loop import distill
from tapir_local.printable import printable
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override, parse_recipe
from tapir_local.records import Answer, Completion, Example, Judgement, Request
from tapir_local.report.compare import compare_rounds
from tapir_local.report.costs import STAGE_ORDER
from tapir_local.report.status import run_status
from tapir_local.report.why import read_drafts, read_training_rows
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import Backends

ATTACK = "document.title='attacked'"
HOSTILE = [
    f"right </script><script>{ATTACK}</script>",
    f'right <img src="https://attack.example/x" onerror="{ATTACK}">',
    "right {{ 7 * 191 }} {% raw %} {# #}",
    "right a\x00b\x1b[31m\x07",
    "right \u2028 line \u2029 ends",
    f"right <!--<script>{ATTACK}",
    f"right ]]><svg onload={ATTACK}><style>*{{display:none}}</style>",
    "right " + "long " * 200_000,
]
CHROMIUM = shutil.which("chromium")


def train_log(run: RunDir, number: int) -> Path:
    return run.round(number) / "adapter" / "train_log.jsonl"


def log_training(run: RunDir, number: int, steps: int) -> None:
    """A log of training as the trainer writes it."""
    lines = [
        {"step": n, "loss": 2 - n / steps, "learning_rate": 0.001, "tokens": 100 * n, "seconds": n / 10}
        for n in range(1, steps + 1)
    ]
    text = "\n".join(json.dumps(line) for line in [*lines, {"seconds": steps / 10, "peak_memory": 1_000_000}])
    train_log(run, number).write_text(text + "\n")


def ran(folder: Path, name: str, backends: Backends, recipe: Recipe | None = None) -> RunDir:
    run = RunDir(folder / "cache", name)
    distill(override(recipe or make_recipe(folder), {"name": name}), run, backends, QUIET)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """Two finished runs with the same seeds and logs of training; in the second one the student answers differently."""
    folder = tmp_path_factory.mktemp("runs")
    other = replace(fake_backends(World()), generate=answer_paintings)
    found = [ran(folder, "plain", fake_backends(World())), ran(folder, "other", other)]
    for run in found:
        for number in range(3):
            log_training(run, number, 30 * (number + 1))
    return found


def answer_paintings(**given: Any) -> list[Completion]:
    """A fake student that is right about sums before it is trained, and about paintings afterwards."""
    known = bool(json.loads(given["gguf"].read_text()))
    found = []
    for id, prompt in zip(given["ids"], given["prompts"], strict=True):
        right = prompt[-1].content.startswith("paint") == known
        found.append(Completion(id, "right" if right else "no idea", "stop", 2))
        given["on_result"](found[-1])
    return found


@pytest.fixture(scope="module")
def page(runs: list[RunDir]) -> RunPage:
    return run_page(runs[1], "")


def section(page: RunPage, anchor: str) -> Sequence[Any]:
    return next(found.parts for found in page.sections if found.anchor == anchor)


def grid(page: RunPage, anchor: str, at: int = 0) -> Grid:
    return [part for part in section(page, anchor) if isinstance(part, Grid)][at]


def column(found: Grid, head: str) -> list[Any]:
    """The values by which a column is sorted."""
    at = next(n for n, name in enumerate(found.heads) if name.startswith(head))
    return [row[at].sort for row in found.rows]


# Values


def test_the_rates_are_those_of_status(runs: list[RunDir], page: RunPage) -> None:
    status, found = run_status(runs[1]), grid(page, "learned")
    metrics = [status["untrained"], *(row["metrics"] for row in status["rounds"])]
    assert column(found, "win rate") == pytest.approx([row["win_rate"] for row in metrics], abs=1e-6)
    assert [row[0].text for row in found.rows] == ["untrained (best)", "0", "1", "2"]
    tasks = grid(page, "tasks")
    assert column(tasks, "2") == [metrics[-1]["by_task"][row[0].text]["win_rate"] for row in tasks.rows]
    assert {row[0].text: row[0].mark for row in tasks.rows}["Math"] == "bad"  # all its rows are sums
    assert "Round 2 is " in page.verdict[0].text
    assert found.markdown.count("\n| ") == 6
    assert page.verdict[0].text in found.markdown


def test_the_rows_are_fixed_broken_or_unchanged(runs: list[RunDir]) -> None:
    view = read_view(runs[1])
    assert view.results
    rows = read_answered_rows(runs[1], view.results)
    assert {row.change for row in rows} == {"fixed", "broken"}
    first = next(row for row in rows if row.change == "fixed")
    assert first.results == [False, True, True, True]
    assert first.answers == ["no idea", "right", "right", "right"]
    assert first.scores[-1] == (9.0, 9.0)
    data = json.loads(script_json(browser_data(rows, ["untrained", "0", "1", "2"], "")))
    assert [row[0] for row in data["rows"]] == [row.id for row in read_rows(Example, runs[1].path / "holdout.jsonl")]


def test_the_new_rows_and_the_uses_add_up(runs: list[RunDir], page: RunPage) -> None:
    drafts = read_drafts(runs[1])
    found = grid(page, "new-data")
    assert sum(column(found, "drafts")) == len(drafts)
    assert sum(row[2].sort or 0 for row in found.rows) == sum(not draft.reason for _, draft in drafts)
    plans = grid(page, "curriculum")
    for number in (1, 2):
        rows = read_training_rows(runs[1], number)
        counts = [column(plans, head)[number - 1] for head in ("hard", "new", "easy, replayed")]
        assert plans.heads.index("hard") != plans.heads.index("hard in the pool")
        written = sum(row.round == number for row in rows)
        assert counts[1:] == [written, len(rows) - written - int(plans.rows[number - 1][5].sort or 0)]


def test_the_loss_is_a_mean_and_rounds_follow_each_other(runs: list[RunDir], page: RunPage) -> None:
    assert running_means([4, 2, 0, 0], 2) == [4, 3, 1, 0]
    rounds = read_training_rounds(runs[1])
    points = loss_points(rounds)
    assert [row.tokens for row in rounds] == [3000, 6000, 9000]
    assert points[-1]["tokens"] == 18_000
    assert max(point["tokens"] for point in points if point["round"] == "round 1") == 9000
    assert column(grid(page, "training"), "tokens per second") == [1000, 1000, 1000]


def test_stages_that_take_long_have_a_kind_of_work() -> None:
    named = {stage for stages in KINDS_OF_WORK.values() for stage in stages}
    short = {"read", "plan", "evaluate", "untrained-evaluate"}
    assert named | short == {*STAGE_ORDER, "ship"}


# Runs of every state


@pytest.mark.parametrize(
    ("fail_at", "present", "absent"),
    [
        (5, {"learned", "again"}, {"answers", "tasks", "judge", "gate", "labels"}),
        (130, {"learned", "answers", "tasks", "judge", "gate", "labels"}, {"new-data"}),
    ],
)
def test_an_unfinished_run_has_a_page_without_empty_charts(
    tmp_path: Path, fail_at: int, present: set[str], absent: set[str]
) -> None:
    world = World()
    world.fail_at = fail_at
    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path, "stopped", fake_backends(world))
    found = run_page(RunDir(tmp_path / "cache", "stopped"), "")
    anchors = {part.anchor for part in found.sections}
    assert present <= anchors
    assert not absent & anchors
    assert anchors <= {anchor for anchor, _, _ in PAGE_SECTIONS}
    assert ("No round is evaluated yet" in found.verdict[0].text) == ("answers" not in anchors)
    figures = [part for shown in found.sections for part in shown.parts if isinstance(part, Figure)]
    assert all("role-mark" in figure.wide for figure in figures)


def test_recorded_answers_without_judge_and_checker_have_a_page(tmp_path: Path) -> None:
    rows = [{"instruction": f"do {n} {n * n} things", "output": f"{n} and {n * n}"} for n in range(40)]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    text = "name: own\nrounds: 1\nteacher: recorded\njudge: reference\nseeds: {holdout: 5, path: PATH}"
    recipe = parse_recipe(text.replace("PATH", str(tmp_path / "own.json")), "own.yaml")
    found = run_page(ran(tmp_path, "own", replace(fake_backends(World()), check=None), recipe), "")
    assert [head for head in grid(found, "learned").heads if "%" in head] == ["likeness (95 %)"]
    (browser,) = (part for part in section(found, "answers") if isinstance(part, Browser))
    assert browser.results == []
    assert {row[7] for row in json.loads(browser.data)["rows"]} == {"open"}
    assert "money" not in {shown.anchor for shown in found.sections}


def test_a_damaged_file_costs_the_sections_that_read_it(
    runs: list[RunDir], page: RunPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        build, "PAGE_SECTIONS", [row for row in PAGE_SECTIONS if row[0] in ("learned", "training", "gate", "again")]
    )
    kept = {path: path.read_text() for path in (train_log(runs[1], 1), runs[1].round(1) / "gate.json")}
    for path in kept:
        path.write_text("{broken\n")
    try:
        found = run_page(runs[1], "")
    finally:
        for path, text in kept.items():
            path.write_text(text)
    said = {shown.anchor: shown.parts[0] for shown in found.sections}
    assert [*said] == ["learned", "training", "gate", "again"]
    for anchor, file in (("learned", "train_log.jsonl"), ("training", "train_log.jsonl"), ("gate", "gate.json")):
        assert file in said[anchor].text
        assert said[anchor].tone == "warning"
    assert found.verdict[0].text == said["learned"].text
    assert section(found, "again")[0] == section(page, "again")[0]


# Hostile texts


class Elements(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def hostile_reply(request: Request, answer: Answer) -> Answer:
    return replace(answer, text=HOSTILE[0]) if answer.text == "right" else answer


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose seeds, teacher and student write hostile texts."""
    folder = tmp_path_factory.mktemp("attacked")
    recipe = make_recipe(folder)
    seeds = [{"instruction": f"sum {n} {n**3} of {HOSTILE[n % 8][:200]}"} for n in range(60)]
    (folder / "seeds.json").write_text(json.dumps(seeds))

    def generate(**given: Any) -> list[Completion]:
        found = [Completion(id, HOSTILE[n % 8], "stop", 2) for n, id in enumerate(given["ids"])]
        for one in found:
            given["on_result"](one)
        return found

    backends = fakes.with_ask(World(), hostile_reply)
    return ran(folder, "attacked", replace(backends, generate=generate), recipe)


@pytest.fixture(scope="module")
def hostile_page(attacked: RunDir) -> str:
    return build_page([attacked])


def test_hostile_texts_are_inert(attacked: RunDir, hostile_page: str) -> None:
    elements = Elements(hostile_page)
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"img", "iframe", "object", "embed", "base", "form", "image", "use", "foreignobject"}
    scripts = [attributes for tag, attributes in elements.found if tag == "script"]
    assert scripts == [{"type": "application/json"}, {}]
    styles = [tag for tag, _ in elements.found if tag == "style"]
    assert len(styles) == 1
    attributes = [pair for _, given in elements.found for pair in given.items()]
    assert [name for name, _ in attributes if name.startswith("on")] == []
    loaded = {value for name, value in attributes if name in ("href", "src", "xlink:href", "action")}
    assert all(value and value.startswith(("#", "data:,")) for value in loaded)
    assert "1337" not in hostile_page  # 7 * 191: no template was filled in
    assert not re.search("[\x00-\x08\x0b-\x1f]", hostile_page)
    answers = {text for row in json.loads(elements.scripts[0])["rows"] for text in row[4]}
    assert answers == {printable(text) for text in HOSTILE[:7]} | {
        HOSTILE[7][: TEXT_LIMITS[0]] + f" … ({len(HOSTILE[7]) - TEXT_LIMITS[0]:,} more characters)"
    }
    assert len(hostile_page) < 3_000_000


def test_names_in_charts_are_escaped() -> None:
    name = f"<script>{ATTACK}</script>\x00"
    spec = {
        "data": inline_values([{"task": name, "rows": 1, "tip": f'"{name}'}]),
        "mark": "bar",
        "encoding": {
            "x": {"field": "rows", "type": "quantitative"},
            "color": color_by("task", [name], False),
            "description": {"field": "tip"},
        },
    }
    svg = draw_svg(spec, 300)
    assert SERIES[0] in svg  # the page's style decides what color that is
    assert "&lt;script&gt;" in svg
    assert "<script" not in svg
    assert "\x00" not in svg


def test_long_answers_are_cut_until_the_page_can_be_opened() -> None:
    assert text_limit(["x" * 1_000_000] * 5) == TEXT_LIMITS[0]
    assert text_limit(["x" * 1_000_000] * 1_000) == TEXT_LIMITS[1]
    assert text_limit(["x" * 1_000_000] * 100_000) == TEXT_LIMITS[-1]


# Several runs


def test_two_runs_are_compared_with_the_first(runs: list[RunDir]) -> None:
    text = build_page(runs)
    ids = re.findall(r'<(?:section|header) id="([^"]+)"', text)
    assert ids[0] == "compared"
    assert len(ids) == len(set(ids))
    assert {"learned", "run2-learned", "answers", "run2-answers"} <= set(ids)
    assert "Right of the line: better than plain." in text
    assert Elements(text).scripts[1].startswith('{"prefix":"run2-"')


def test_runs_that_cannot_be_compared_are_refused(runs: list[RunDir], attacked: RunDir) -> None:
    with pytest.raises(TapirError, match="different holdouts"):
        build_page([runs[0], attacked])
    with pytest.raises(TapirError, match="named twice"):
        build_page([runs[0], runs[0]])


# The command


def called(run: RunDir, *words: str) -> Result:
    return CliRunner().invoke(cli, ["report", *words, "--cache", str(run.cache)])


def test_the_command_writes_a_report_and_overwrites_only_reports(runs: list[RunDir], tmp_path: Path) -> None:
    run, out = runs[0], tmp_path / "r.html"
    assert called(run, "plain", "-o", str(out)).output.startswith(f"{out}: ")
    first = out.read_text()
    assert "<title>plain - tapir-local</title>" in first
    check_page_output(out, [run], force=False)  # a report of ours may be written again
    out.write_text("notes of mine")
    with pytest.raises(TapirError, match=r"exists already[\s\S]*--force"):
        check_page_output(out, [run], force=False)
    check_page_output(out, [run], force=True)
    for path in (run.path / "recipe.yaml", run.round(1) / "metrics.json"):
        with pytest.raises(TapirError, match="file that the command reads"):
            check_page_output(path, [run], force=True)
    assert isinstance(called(run, "nobody").exception, TapirError)


def test_the_default_file_is_in_the_folder_of_the_run(runs: list[RunDir]) -> None:
    before = run_status(runs[0])
    assert called(runs[0], "plain").exit_code == 0
    assert (runs[0].path / "report.html").exists()
    assert run_status(runs[0]) == before


def test_a_missing_library_is_named_with_its_extra(runs: list[RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(TapirError, match=r"vl-convert-python[\s\S]*'\.\[report\]'"):
        build_page(runs[:1])


# A browser


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_runs_the_page_without_errors_and_requests(
    hostile_page: str, attacked: RunDir, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    path.write_text(hostile_page)
    id = read_rows(Example, attacked.path / "holdout.jsonl")[7].id
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
    )
    out = subprocess.run(
        [str(CHROMIUM), *options, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom",
         f"file://{path}#{id}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in out.stderr  # errors of scripts, and what the page's policy has blocked
    assert "attack.example" not in out.stderr
    assert "<title>attacked - tapir-local</title>" in out.stdout
    assert f'<article class="row" id="{id}">' in out.stdout  # the row that the link names
    assert out.stdout.count("<article") == 1


# Time and money


def stage(name: str, finished: str | None, seconds: float) -> dict[str, Any]:
    return {"name": name, "seconds": seconds, "finished": finished and f"2026-11-27T{finished}+00:00"}


def test_the_timeline_has_each_stage_in_its_place_and_no_pauses() -> None:
    """The untrained student was answered last, after a night; 20 seconds between two stages are no pause."""
    places = {
        "preparation": [stage("read", "10:00:10", 10), stage("untrained-answer", "22:00:00", 30)],
        "round 0": [stage("train", "10:01:30", 60), {"name": "gate", "seconds": None, "finished": None}],
    }
    bars, paused = lay_out(places)
    assert bars == [
        Bar("preparation", "read", 0, 10),
        Bar("round 0", "train", 30, 90),
        Bar("preparation", "untrained-answer", 90, 120),
    ]
    assert paused == 12 * 3600 - 90 - 30
    shown = timeline_figure(bars, paused)
    assert shown is not None
    assert "round 0, train: 0:00:30 to 0:01:30" in shown.wide
    assert "Pauses of the run (11:58:00 in all) are cut out" in shown.note


def test_stages_without_a_time_of_day_lie_end_to_end_and_the_page_says_so() -> None:
    bars, paused = lay_out({"round 1": [stage("train", None, 60), stage("gate", "10:00:00", 0.1)]})
    assert [(bar.begin, bar.end) for bar in bars] == [(0, 60), (60, 60.1)]
    shown = timeline_figure(bars, paused)
    assert shown is not None
    assert "lie end to end" in shown.note
    assert "round 1, train" in shown.narrow
    assert "round 1, gate" not in shown.narrow  # it would be invisible
    assert timeline_figure(*lay_out({"end": [stage("ship", "10:00:00", 0.0)]})) is None


def test_a_run_shows_its_stages_on_a_line_of_time(runs: list[RunDir]) -> None:
    status = run_status(runs[1])
    assert all(one["finished"] for one in all_stages(status) if one["done"])
    for one in all_stages(status):
        one["seconds"] = 2.0  # those of fakes are 0.0
    titles = [part.title for part in time_section(status).parts if isinstance(part, Figure)]
    assert titles == ["Time by round and kind of work", "The stages in the order in which they ran"]


@pytest.mark.parametrize(("price", "unit"), [(0.25, "money"), (0.0, "calls")])
def test_rates_are_shown_by_what_they_cost(price: float, unit: str, runs: list[RunDir]) -> None:
    rounds = compare_rounds(runs[1])["rounds"]
    spent = [{"round": str(n), "money": price, "saved": price, "unpriced": 0, "unpriced_hits": 0} for n in range(3)]
    shown = rates_by_cost_figure(rounds, spent)
    assert shown is not None
    assert shown.title == f"Win rate by {unit}"
    costs = re.findall(
        r"round (\d): win rate [^;]*; (?:money|calls of the teacher and the judge) so far: ([\d.,]+)", shown.wide
    )
    calls = [(str(row["round"]), f"{row['teacher_calls'] + row['judge_calls']:,}") for row in rounds[1:]]
    assert costs == ([("0", "0.5000"), ("1", "1.00"), ("2", "1.50")] if price else calls)
    assert rates_by_cost_figure(rounds[:1], spent) is None
    unknown = [{**row, "unpriced": 1} for row in spent]
    assert rates_by_cost_figure(rounds, unknown).title == "Win rate by calls"  # type: ignore[union-attr]


def test_each_reason_of_rejected_drafts_has_a_color_of_its_own() -> None:
    example = Example("a", (), "")
    drafts = [(1, Draft(example, reason)) for reason in ("", "near: 0.9", "cut", "no task", "other task", "refused")]
    assert len(set(re.findall(r"var\(--c\d\)", drafts_figure(drafts).wide))) == 6


def test_only_scores_of_both_orders_are_called_their_mean() -> None:
    alone, both = Judgement("a", 8.0, 6.0), Judgement("b", 8.0, 6.0, orders=((8.0, 6.0), (8.0, 6.0)))
    assert "both orders" not in scores_figure([alone], "Scores").note
    assert scores_figure([alone, both], "Scores").note.startswith("Mean of both orders.")
