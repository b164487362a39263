"""Hostile text is shown literally: no escape sequence, reordering or markup reaches a terminal; data is unchanged."""

import ast
import io
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fakes import World, fake_backends, make_recipe
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from run_display import printed, record_console

from tapir_local.errors import TapirError
from tapir_local.pipeline.loop import Step
from tapir_local.printable import UNSAFE, format_count, printable, safe_json
from tapir_local.report.compare_tables import comparison_tables
from tapir_local.report.costs import cost_table, round_receipt
from tapir_local.report.labels import label_tables
from tapir_local.report.status_tables import round_tables, rounds_table, stages_table, unusable_tables
from tapir_local.report.tables import task_table, text_table
from tapir_local.report.why import why_tables
from tapir_local.run_dir import RunDir
from tapir_local.stages.prepare import PREPARE_STAGES
from tapir_local.tables import join_styled, plain_text
from tapir_local.terminal.live_view import LiveView
from tapir_local.terminal.output import echo, print_json
from tapir_local.terminal.progress import RunDisplay

HOSTILE = "\x1b]0;owned\x07 \x1b[31mred\x9b2J [/INST] [bold]b[/] \u202eback :smile: \r\x7f"
SEEN = "␛]0;owned␇"
COUNTS = dict.fromkeys(
    ("paid", "from_store", "failed", "tokens_in", "tokens_out", "unpriced", "unpriced_hits", "estimated"), 1
)
COST = [{"stage": HOSTILE, "task": HOSTILE, **COUNTS, "money": 1.0, "saved": 0.0}]
STAGE = {"name": HOSTILE, "done": True, "seconds": 1.0, "paid": 1, "hits": 0, "note": HOSTILE}
STATUS = {
    "run": HOSTILE,
    "state": HOSTILE,
    "folder": HOSTILE,
    "shipped": {"round": 1, "why": HOSTILE},
    "now": {**dict.fromkeys(("step", "done", "total", "seconds_left", "ends", "round", "rounds")), "step": HOSTILE},
    "stages_done": 1,
    "stages": 2,
    "prepare": [STAGE],
    "rounds": [{"number": 0, "stages": [STAGE], "metrics": {"judge": HOSTILE, "rows": 3}}],
    "end": [STAGE],
    "calls": {"paid": 1, "hits": 0},
    "unusable": {HOSTILE: {HOSTILE: 2}},
    "warnings": [HOSTILE],
}
LOST = {"step": HOSTILE, "id": HOSTILE, "kind": HOSTILE, "detail": HOSTILE, "text": HOSTILE}
PLAN = {
    "curriculum": HOSTILE, "drawn": [1], "reflected": [], "pool": 3, "notes": [HOSTILE], "got": {HOSTILE: 0.5},
    "asked": {HOSTILE: 0.5}, "short": {}, "expansions": [{"task": HOSTILE, "rows": 2}],
}  # fmt: skip
QUALITY = {"rows": 1, "unjudged": 0, "notes": [HOSTILE]}
ANSWER = {
    "id": HOSTILE,
    "task": HOSTILE,
    "instruction": HOSTILE,
    "teacher": HOSTILE,
    "student": HOSTILE,
    "scores": [1.0, 2.0],
}
ROUND = {
    "run": HOSTILE, "round": 1, "plan": PLAN, "judge": {HOSTILE: QUALITY}, "unusable": {HOSTILE: {HOSTILE: 1}},
    "judge_check": {"meaning": HOSTILE},
    "metrics": {"win_rate": 0.5, "student_score": 5.0, "by_task": {HOSTILE: {"rows": 1, "win_rate": 0.5}}},
    "before": {"round": 0, "by_task": {HOSTILE: {"rows": 1, "win_rate": 0.4}}}, "answers": [ANSWER], "matching": 2,
}  # fmt: skip
LINE = {"round": 1, "student": 1.0, "teacher": 2.0, "mfd": 1.0, "use": HOSTILE, "why": HOSTILE, "trained": True}
WHY = {
    "id": HOSTILE, "run": HOSTILE, "place": HOSTILE, "task": HOSTILE, "labelled_by": HOSTILE, "instruction": HOSTILE,
    "answer": HOSTILE, "rounds": [LINE], "left_out": [LOST], "cost": COST,
    "grew": [{"round": 1, "id": HOSTILE, "reason": HOSTILE, "instruction": HOSTILE}],
}  # fmt: skip
LABELS = {
    "run": HOSTILE, "notes": [HOSTILE], "confused": [{"teacher": HOSTILE, "classifier": HOSTILE, "rows": 1}],
    "tasks": {HOSTILE: {"share": 0.1, "rows": 1, "file": 1, "teacher": 0, "classifier": 0, "held_out": None},
              HOSTILE + "2": {"share": 0.1, "rows": 0, "held_out": None}},
}  # fmt: skip
RATE = {"mean": 0.5, "interval": (0.1, 0.9)}
GAP = {"mean": 0.1, "low": 0.0, "high": 0.2, "better": 1, "worse": 0, "p": 0.5, "p_holm": 0.5, "test": HOSTILE}
OF = {"run": HOSTILE, "round": 1, "metric": "accuracy", "task": HOSTILE, "difference": GAP, "rows": 1, **RATE}
SPENT = dict.fromkeys(("tokens", "teacher_calls", "judge_calls"), 1)
COMPARED = {
    "rounds": [{**OF, **SPENT, "chosen": True, "accuracy": RATE, "win_rate": None, "likeness": None}],
    "compared": [OF], "at": None,
    "baseline": HOSTILE, "by_task": [OF], "notes": [HOSTILE], "holdout": {"rows": 3, "judge": HOSTILE},
}  # fmt: skip
TABLES = {
    "rounds": lambda: [rounds_table(STATUS)],
    "stages": lambda: [stages_table(STATUS)],
    "unusable": lambda: unusable_tables({"run": HOSTILE, "by_step": {HOSTILE: {HOSTILE: 1}}, "rows": [LOST]}),
    "round": lambda: round_tables(ROUND),
    "tasks": lambda: [task_table(HOSTILE, {HOSTILE: {"rows": 1}}, {"rows": "count"})],
    "plain": lambda: [text_table(HOSTILE, [HOSTILE], [[HOSTILE]])],
    "cost": lambda: [cost_table(HOSTILE, COST, "stage")],
    "receipt": lambda: [plain_text(round_receipt(COST, HOSTILE))],
    "why": lambda: why_tables(WHY),
    "labels": lambda: label_tables(LABELS),
    "compare": lambda: comparison_tables(COMPARED),
    "line": lambda: [plain_text(HOSTILE), join_styled(HOSTILE, (HOSTILE, "bold"))],
}


@given(st.text(st.characters(min_codepoint=0, max_codepoint=0x2100, exclude_categories=())))
def test_nothing_unsafe_is_left_and_all_else_is_kept(text: str) -> None:
    shown = printable(text)
    assert not UNSAFE.search(shown)
    shown.encode()
    assert printable(shown) == shown
    safe = UNSAFE.sub("", text)
    assert printable(safe) == safe
    assert json.loads(safe_json(json.dumps(text, ensure_ascii=False))) == text


def test_tabs_and_lines_stay_and_halves_of_letters_can_be_printed() -> None:
    assert printable("a\tb\r\nc\n") == "a\tb\nc\n"
    assert printable("a\rb\ud83d") == "a␍b<U+D83D>"
    assert printable("naïve 🙂 👩‍👩‍👧 שלום 你好") == "naïve 🙂 👩‍👩‍👧 שלום 你好"


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("colored", [False, True])
def test_no_table_lets_a_control_through_or_reads_markup(name: str, colored: bool) -> None:
    for item in TABLES[name]():
        out = io.StringIO()
        Console(file=out, width=400, force_terminal=colored, color_system="standard" if colored else None).print(item)
        text = out.getvalue()
        own = re.sub("\x1b\\[[0-9;]*m", "", text) if colored else text  # rich's own colors
        assert not UNSAFE.search(own)
        assert "\x1b[31mred" not in text
        assert SEEN in own
        assert "[bold]b[/]" in own.replace("\n", "")
        assert ":smile:" in own


@pytest.mark.parametrize(("kind", "terminal"), [("lines", False), ("lines", True), ("log", True), ("full", True)])
def test_progress_and_closing_lines_are_plain(
    kind: Any, terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapir_local.terminal.lines.FIRST_INTERVAL", -1.0)
    console = record_console(300, 50, terminal)
    display = RunDisplay(console, kind, make_recipe(tmp_path), RunDir(tmp_path / "cache", "fake"))
    display.run.path.mkdir(parents=True)
    with display.showing(fake_backends(World())) as watch:
        step = Step(None, PREPARE_STAGES[0], tmp_path / "none")
        watch.begins(step)
        watch.progress(1, 2, HOSTILE)
        display.say(HOSTILE)
        if kind == "full":
            console.print(LiveView(display.state))
        watch.ends(step, {"note": f"{HOSTILE}; WARNING: {HOSTILE}", "paid": 1, "hits": 0, "seconds": 1.0})
    own = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", printed(console)).replace("\r", "")
    assert not UNSAFE.search(own)
    assert "[/INST]" in own
    assert not UNSAFE.search((display.run.path / "run.log").read_text())


def test_what_is_said_is_printable_and_json_keeps_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    echo(str(TapirError(HOSTILE, where=HOSTILE, fix=HOSTILE)))
    print_json({"answer": HOSTILE + "\ud83d"})
    said, _, data = capsys.readouterr().out.partition("{")
    assert not UNSAFE.search(said + data)
    assert json.loads("{" + data)["answer"] == HOSTILE + "\ud83d"
    assert safe_json('"\\n naïve 🙂"') == '"\\n naïve 🙂"'


@pytest.mark.parametrize(
    "words", [["status", HOSTILE], ["show", "--cache", HOSTILE], [HOSTILE], ["status", "--" + HOSTILE]]
)
def test_errors_that_repeat_what_was_given(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tapir_local.commands import main as cli

    monkeypatch.setattr("sys.argv", ["tapir-local", *words])
    found = CliRunner().invoke(wrapped(cli.main))
    assert found.exit_code in (1, 2)
    assert not UNSAFE.search(found.output)
    assert "owned" in found.output


def wrapped(main: object) -> object:
    """`main` as a command for the test runner, since it reads sys.argv."""
    import click

    return click.Command("main", callback=main, context_settings={"ignore_unknown_options": True})


ONE_DOOR = {
    r"click\.s?echo\((?!\"error: \")": {"output.py"},
    r"from rich\.table|rich\.table import": {"tables.py"},
    r"from rich\.markup|rich\.markup import|from_markup": set(),
    r"\.print\((f?\"|str)": set(),
}


@pytest.mark.parametrize("pattern", ONE_DOOR)
def test_there_is_one_door_for_each_kind_of_text(pattern: str) -> None:
    """Any other function that prints could forget to make its text safe."""
    root = Path(__file__).parent.parent
    files = [*(root / "tapir_local").rglob("*.py"), root / "cli.py"]
    found = {file.name for file in files if re.search(pattern, file.read_text(encoding="utf-8"))}
    assert found <= ONE_DOOR[pattern]


COUNTED = (
    "answers|attempts|batches|calls|drafts|duplicates|examples|files|grades|hits|ids|instructions|judgements|labels|"
    "matches|names|outputs|pairs|positions|probes|prompts|questions|replies|requests|rounds|rows|runs|seeds|stages|"
    "steps|tasks|texts|tokens|turns|verdicts|words"
)
PLURAL_AFTER = re.compile(rf"^ (?:(?!of |in |at |with )[a-z]+ )?(?:{COUNTED})\b(?! per|/)")
# Numbers that are never 1: limits of contexts and replies, what is only said of several, and AlpacaEval's 805.
NEVER_ONE = {
    "engine.cells", "len(tokens)", "self.cells", "smallest.cells", "longest", "config.cells", "tokens", "most",
    "recipe.student.max_length", "len(head)", "rows_for_interval(WANTED_INTERVAL)", "len(matches)",
    "len(self.table.rows)", "self.outcomes.useless", "len(self.state.steps)", "len(job.gamed.difficulty)", "len(files)",
}  # fmt: skip


def numbers_before_a_plural(file: Path) -> Iterator[str]:
    """The numbers in the f-strings of a file that the plural of a countable word follows."""
    for text in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for number, word in pairwise(text.values if isinstance(text, ast.JoinedStr) else []):
            if isinstance(number, ast.FormattedValue) and isinstance(word, ast.Constant):
                said, form = ast.unparse(number.value), number.format_spec
                counts = said.startswith("len(") or (form is not None and ast.unparse(form) == "f','")
                if counts and PLURAL_AFTER.match(word.value) and not said.isupper():
                    yield said


def test_no_number_that_may_be_one_stands_before_a_plural() -> None:
    """`format_count` writes `1 row` and `2 rows`."""
    files = sorted((Path(__file__).parent.parent / "tapir_local").rglob("*.py"))
    found = {(file.name, said) for file in files for said in numbers_before_a_plural(file)}
    assert sorted(pair for pair in found if pair[1] not in NEVER_ONE) == []
    assert NEVER_ONE - {said for _, said in found} == set()


@given(st.integers(0, 10**6))
def test_counts(count: int) -> None:
    assert format_count(count, "row") == (f"{count:,} rows" if count != 1 else "1 row")
    assert format_count(count, "reply is", "replies are") == ("1 reply is" if count == 1 else f"{count:,} replies are")
