"""Who labels a row: the file, the teacher, or the classifier if it is sure; what a run reports about it."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import QUIET, World, classify, fake_backends, make_recipe

from tapir_local.commands.runs import show_command
from tapir_local.errors import TapirError
from tapir_local.files import read_rows, write_json
from tapir_local.pipeline.dry_run import estimate_costs
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override
from tapir_local.records import Answer, Example, Progress, Request
from tapir_local.report.labels import label_report, label_tables
from tapir_local.report.status import run_status
from tapir_local.report.status_tables import stages_table
from tapir_local.run_dir import RunDir

START = {"rounds": 0}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Sixty seeds, of which the teacher labels thirty: two of three are Math, the rest Art."""
    return override(make_recipe(tmp_path), START)


def doubting(sure: Callable[[int], float], agreement: float = 0.9) -> Callable[..., None]:
    """A fake classifier that labels every row Art, with a probability that depends on its position."""

    def sort(*, labelled: Path, rows: Path, seed: int, out: Path, progress: Progress) -> None:
        classify(labelled=labelled, rows=rows, seed=seed, out=out, progress=progress)
        lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        told = (json.dumps({**line, "confidence": sure(place)}) + "\n" for place, line in enumerate(lines))
        (out / "predictions.jsonl").write_text("".join(told))
        held = {"Math": {"rows": 4, "agree": 3, "interval": [0.3, 0.95]}}
        confusion = {"Math": {"Math": 3, "Art": 1}}
        known = {"agreement": agreement, "rows": 4, "interval": [0.3, 0.95], "trained": 26}
        write_json(out / "agreement.json", {**known, "by_label": held, "confusion": confusion})

    return sort


def ran(recipe: Recipe, folder: Path, world: World | None = None, **changes: Any) -> RunDir:
    run = RunDir(folder / "cache", "fake")
    distill(recipe, run, replace(fake_backends(world or World()), **changes), QUIET)
    return run


def said(run: RunDir, stage: str) -> str:
    return str(run.record()["stages"][f"prepare/{stage}"]["note"])


def sources(run: RunDir) -> Counter[tuple[str, str]]:
    return Counter((row.task, row.labelled_by) for row in read_rows(Example, run.path / "labelled.jsonl"))


def seeds(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "seeds.json").write_text(json.dumps(rows))


def test_the_teacher_is_asked_where_the_classifier_is_unsure(recipe: Recipe, tmp_path: Path) -> None:
    world = World()
    run = ran(recipe, tmp_path, world, classify=doubting(lambda place: 0.4 if place < 12 else 0.8))
    asked = [request for request in world.asked if request.stage == "tasks"]
    assert len(asked) == 12
    found = sources(run)
    assert sum(count for (_, who), count in found.items() if who == "teacher") == 42
    assert found[("Art", "classifier")] == 18
    before = Counter(row.task for row in read_rows(Example, run.path / "labels.jsonl"))
    changed = found[("Math", "teacher")] - before["Math"]
    assert changed > 0
    told = f"less than 50% sure of 12 rows: the teacher was asked about 12 of them and gave {changed} another task;"
    assert told in said(run, "tasks")


def test_the_least_sure_are_asked_and_no_more_than_allowed(recipe: Recipe, tmp_path: Path) -> None:
    world, few = World(), override(recipe, {"classifier.ask_at_most": 5})
    run = ran(few, tmp_path, world, classify=doubting(lambda place: 0.01 * place))
    lines = (run.path / "classifier" / "predictions.jsonl").read_text().splitlines()
    least = {json.loads(line)["id"] for line in lines[:5]}
    assert {request.row for request in world.asked if request.stage == "tasks"} == least
    assert "about 5 of them (classifier.ask_at_most is 5)" in said(run, "tasks")


def test_the_teacher_is_not_asked_if_that_is_turned_off(recipe: Recipe, tmp_path: Path) -> None:
    world = World()
    run = ran(override(recipe, {"classifier.ask_below": 0}), tmp_path, world, classify=doubting(lambda place: 0.0))
    assert not [request for request in world.asked if request.stage == "tasks"]
    assert sources(run)[("Art", "classifier")] == 30


def test_a_run_interrupted_among_the_unsure_rows_asks_for_none_twice(recipe: Recipe, tmp_path: Path) -> None:
    world, changes = World(), {"classify": doubting(lambda place: 0.4)}
    world.fail_at = 45
    with pytest.raises(KeyboardInterrupt):
        ran(recipe, tmp_path, world, **changes)
    world.fail_at = None
    broken, whole = ran(recipe, tmp_path, world, **changes), ran(recipe, tmp_path / "other", **changes)
    assert len(world.asked) == len(set(world.asked))
    for name in ("labelled.jsonl", "holdout.jsonl", "seeds.jsonl"):
        assert (broken.path / name).read_bytes() == (whole.path / name).read_bytes()


def mumbling(world: World, mumble: Callable[[Request], Answer | None]) -> Callable[..., list[Answer]]:
    """A teacher that replies differently to some requests."""

    def ask(requests: list[Request], progress: Progress) -> list[Answer]:
        answers = world.ask(requests, progress)
        return [mumble(request) or answer for request, answer in zip(requests, answers, strict=True)]

    return ask


def theory(request: Request) -> Answer | None:
    return Answer("about Music theory, not Math", "stop", False) if request.stage in ("label", "tasks") else None


def test_an_unreadable_label_is_no_label(recipe: Recipe, tmp_path: Path) -> None:
    def mumble(request: Request) -> Answer | None:
        return theory(request) if "<instruction>\npaint" in request.messages[-1].content else None

    with_few = override(recipe, {"classifier.labelled": 60})
    run = ran(with_few, tmp_path, teacher=mumbling(World(), mumble))
    assert sources(run) == {("Math", "teacher"): 40, ("Others", ""): 20}
    assert said(run, "label").startswith(
        "40 labeled by the teacher, 0 by the file, 20 unreadable (task Others): 20 name several tasks; WARNING: 33%"
    )


def test_a_teacher_that_names_no_task_at_all_stops_the_run(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="none of the teacher's 30 replies names a task"):
        ran(recipe, tmp_path, teacher=mumbling(World(), theory))
    assert not (tmp_path / "cache" / "runs" / "fake" / "labels.jsonl").exists()


def test_a_truncated_label_is_asked_for_again(recipe: Recipe, tmp_path: Path) -> None:
    def cut(request: Request) -> Answer | None:
        first = request.stage == "label" and request.draw == 0
        return Answer('{"task": "Art"}, or', "length", False) if first else None

    run = ran(recipe, tmp_path, teacher=mumbling(World(), cut))
    labels = Counter(row.task for row in read_rows(Example, run.path / "labels.jsonl"))
    assert set(labels) == {"Math", "Art"}


def test_with_a_single_label_the_other_rows_get_it_without_a_classifier(recipe: Recipe, tmp_path: Path) -> None:
    seeds(tmp_path, [{"instruction": f"sum {n} {n * n}"} for n in range(60)])
    run = ran(recipe, tmp_path, classify=lambda **_: pytest.fail("trained"))
    assert sources(run) == {("Math", "teacher"): 30, ("Math", "classifier"): 30}
    assert "no classifier trained: every labeled row (30) is Math, so the other 30 rows got that task too" in said(
        run, "classify"
    )
    predicted = (run.path / "classifier" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(predicted[0])["confidence"] == pytest.approx(31 / 32, abs=1e-6)


def test_a_task_with_a_single_row_is_named(recipe: Recipe, tmp_path: Path) -> None:
    rows = [{"instruction": f"do {n} {n * n}", "task": "Math" if n else "Law"} for n in range(40)]
    seeds(tmp_path, rows + [{"instruction": f"paint {n} {n * n}"} for n in range(40)])
    run = ran(recipe, tmp_path)
    assert said(run, "classify").endswith("; learned from a single row: Law")


def test_tasks_without_a_row_are_named_and_the_rest_counted(recipe: Recipe, tmp_path: Path) -> None:
    run = ran(recipe, tmp_path)
    assert "no row of Reasoning, Code Generation, Code Debug, Writing, Computer Science and 25 more: " in said(
        run, "tasks"
    )
    own = override(recipe, {"tasks": {"Math": 0.5, "Art": 0.3, "Law": 0.2, "Music": 0}})
    named = ran(own, tmp_path / "own")
    assert said(named, "tasks").endswith("; no row of Law: their shares go to the other tasks")


def test_shares_that_do_not_sum_to_1_are_reported_once(recipe: Recipe, tmp_path: Path) -> None:
    run = ran(override(recipe, {"tasks": {"Math": 2, "Art": 1}}), tmp_path)
    assert said(run, "label").endswith("; the shares of `tasks` add up to 3 and were normalized to 100 %")
    assert str(run.record()).count("add up to 3") == 1
    assert "sum to" not in str(ran(recipe, tmp_path / "even").record())


def test_a_low_agreement_warns_and_does_not_stop(recipe: Recipe, tmp_path: Path) -> None:
    run = ran(recipe, tmp_path, classify=doubting(lambda place: 0.9, agreement=0.55))
    warning = "agrees with the teacher on 55% of the rows, below classifier.min_agreement (60%)"
    assert said(run, "classify").startswith("55.0% agreement with the teacher (95 %: 30% to 95%) on 4 rows held out")
    assert f"; WARNING: the classifier {warning}" in said(run, "classify")
    status = run_status(run)
    assert status["state"] == "done"
    assert warning in status["warnings"][0]
    assert warning in str(stages_table(status).caption)


def test_a_good_agreement_does_not_warn(recipe: Recipe, tmp_path: Path) -> None:
    run = ran(recipe, tmp_path, classify=doubting(lambda place: 0.9, agreement=0.6))
    assert "WARNING" not in str(run.record())
    assert run_status(run)["warnings"] == []


def test_labels_are_shown_by_source_with_what_is_confused(recipe: Recipe, tmp_path: Path) -> None:
    run = ran(recipe, tmp_path, classify=doubting(lambda place: 0.4 if place < 12 else 0.8))
    found = label_report(run)
    assert found["tasks"]["Math"]["held_out"] == {"rows": 4, "agree": 3, "interval": [0.3, 0.95]}
    art = found["tasks"]["Art"]
    assert art["rows"] == art["teacher"] + art["classifier"]
    assert found["tasks"]["Law"] == {
        "share": 0.017,
        "rows": 0,
        "file": 0,
        "teacher": 0,
        "classifier": 0,
        "held_out": None,
    }
    assert found["confused"] == [{"teacher": "Math", "classifier": "Art", "rows": 1}]
    first, second = label_tables(found)
    assert "Tasks without a row: Reasoning, " in str(first.caption)
    assert second.row_count == 1


def test_show_labels_prints_data_and_refuses_a_round(recipe: Recipe, tmp_path: Path, capsys: Any) -> None:
    ran(recipe, tmp_path)
    place = ["fake", "--labels", "--cache", str(tmp_path / "cache")]
    show_command.main([*place, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["tasks"]["Math"]["rows"] > 0
    with pytest.raises(Exception, match="not one round"):
        show_command.main([*place, "--round", "1"], standalone_mode=False)


def test_labels_that_do_not_exist_yet(recipe: Recipe, tmp_path: Path) -> None:
    world = World()
    world.fail_at = 5
    with pytest.raises(KeyboardInterrupt):
        ran(recipe, tmp_path, world)
    with pytest.raises(TapirError, match="not labeled yet"):
        label_report(RunDir(tmp_path / "cache", "fake"))


@pytest.mark.parametrize(
    ("changes", "most"), [({}, 30), ({"classifier.ask_at_most": 7}, 7), ({"classifier.ask_below": 0}, None)]
)
def test_a_cost_estimate_has_the_largest_possible_number_of_labels(
    recipe: Recipe, tmp_path: Path, changes: dict[str, Any], most: int | None
) -> None:
    found = {row.step: row for row in estimate_costs(override(recipe, changes), RunDir(tmp_path / "none", "fake"))}
    row = found.get("prepare/tasks")
    assert (row.calls if row else None) == most
    if row:
        assert not row.exact
        assert row.tokens_in / row.calls == pytest.approx(found["prepare/label"].tokens_in / 30, rel=0.05)


def test_a_cost_estimate_counts_the_unsure_rows_when_they_are_known(recipe: Recipe, tmp_path: Path) -> None:
    world = World()
    world.fail_at = 30
    with pytest.raises(KeyboardInterrupt):
        ran(recipe, tmp_path, world, classify=doubting(lambda place: 0.4 if place < 12 else 0.8))
    row = next(row for row in estimate_costs(recipe, RunDir(tmp_path / "cache", "fake")) if row.step == "prepare/tasks")
    assert (row.calls, row.exact) == (12, True)


def test_a_recipe_with_its_own_tasks_runs(recipe: Recipe, tmp_path: Path) -> None:
    own = {"Art": 1, "Adding up": {"share": 3, "description": "sums of numbers", "style": "as one line"}}
    world = World()

    def adding(request: Request) -> Answer | None:
        math = '"Math"' in str(world.ask([request], lambda *_: None)[0].text)
        return Answer('{"task": "adding up"}', "stop", False) if request.stage == "label" and math else None

    run = ran(override(recipe, {"tasks": own, "rounds": 1}), tmp_path, teacher=mumbling(world, adding))
    assert sources(run)[("Adding up", "teacher")] > 0
    labelling, refining = (
        next(request for request in world.asked if request.stage == stage) for stage in ("label", "refine")
    )
    assert "<tasks>\nArt: painting, sculpture, design and architecture\nAdding up: sums of numbers\n</tasks>" in (
        labelling.messages[1].content
    )
    assert refining.round == 1


def test_a_label_of_the_file_that_the_recipe_does_not_know_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    seeds(tmp_path, [{"instruction": f"do {n}", "task": "Cooking"} for n in range(40)])
    with pytest.raises(TapirError, match="the recipe has no task 'Cooking'"):
        ran(recipe, tmp_path)
