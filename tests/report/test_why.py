"""`why` explains what happened to a row; `plan` shows what a plan would be, and changes nothing."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from fakes import QUIET, World, fake_backends, make_recipe

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.files import read_record, read_rows
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.text import override
from tapir_local.records import Example, Judgement, RoundPlan
from tapir_local.report.what_if import plan_with_changes
from tapir_local.report.why import explain_row
from tapir_local.run_dir import RunDir


def ran(folder: Path, **changes: object) -> RunDir:
    run = RunDir(folder, "fake")
    distill(override(make_recipe(folder), changes), run, fake_backends(World()), QUIET)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return ran(tmp_path_factory.mktemp("why"))


def plan_of(run: RunDir, number: int = 1) -> RoundPlan:
    return read_record(RoundPlan, run.round(number) / "plan.json")


def everything(run: RunDir) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run.cache.rglob("*")) if path.is_file()}


def test_a_selected_row_has_its_scores_and_its_use(run: RunDir) -> None:
    told = explain_row(run, plan_of(run).hard[0])["rounds"][1]
    assert (told["teacher"], told["student"], told["mfd"]) == (9.0, 2.0, 7.0)
    assert (told["use"], told["trained"]) == ("hard", True)
    assert told["why"].startswith("hard: MFD 7 > 2; selected: ")


def test_a_hard_row_that_was_not_selected_has_the_reason(run: RunDir) -> None:
    plan, judged = plan_of(run), read_rows(Judgement, run.round(1) / "judgements.jsonl")
    left = next(row.id for row in judged if row.student == 2.0 and row.id not in plan.hard)
    told = explain_row(run, left)["rounds"][1]
    assert (told["use"], told["trained"]) == ("", False)
    assert "not selected: " in told["why"]


def test_an_easy_row_has_the_number_of_drawn_rows(run: RunDir) -> None:
    told = explain_row(run, plan_of(run).replay[0])["rounds"][1]
    assert told["why"].startswith("easy: MFD 0 <= 2; replayed: ")


def test_why_and_show_say_which_tasks_get_rows_and_what_was_learned(tmp_path: Path) -> None:
    other = ran(tmp_path, **{"curriculum.mastery": 0.9, "curriculum.learnable": True})
    plan = plan_of(other)
    tasks = {row.id: row.task for row in read_rows(Example, other.path / "seeds.jsonl")}
    (waiting,) = [task for task, one in plan.mastery.items() if one.state == "waiting"]
    (taught,) = [task for task, one in plan.mastery.items() if one.state == "taught"]
    judged = read_rows(Judgement, other.round(1) / "judgements.jsonl")
    left = next(row.id for row in judged if row.student == 2.0 and tasks[row.id] == waiting)
    gaps = {task: f"{plan.mastery[task].gap:.1f}" for task in (taught, waiting)}
    assert explain_row(other, left)["rounds"][1]["why"] == (
        f"hard: MFD 7 > 2; not selected: task {waiting}: gap {gaps[waiting]}, not mastered, "
        "but tasks with larger gaps come first"
    )
    told = explain_row(other, plan.hard[0])["rounds"][1]["why"]
    assert f"ties at random; task {taught}: gap {gaps[taught]}, not mastered; new rows" in told
    later = plan_of(other, 2)
    (learned,) = [(task, one) for task, one in later.learning.items() if one.trained]
    again = read_rows(Judgement, other.round(2) / "judgements.jsonl")
    row = next(row.id for row in again if row.student == 2.0 and tasks.get(row.id) == learned[0])
    told = explain_row(other, row)["rounds"][2]["why"]
    assert f"{learned[1].learned} of {learned[1].trained} hard rows of the last round learned, weight" in told
    words = ["show", other.name, "--cache", str(other.cache)]
    shown = CliRunner().invoke(cli, [*words, "--round", "2"], catch_exceptions=False).stdout
    assert "hard rows of the last round whose MFD has fallen" in " ".join(shown.split())
    found = json.loads(CliRunner().invoke(cli, [*words, "--round", "1", "--json"]).stdout)["plan"]
    assert found["mastery"][waiting]["state"] == "waiting"
    assert found["learning"][taught] == {"trained": 0, "learned": 0}


def test_a_parent_lists_its_new_rows_and_a_new_row_names_its_parent(run: RunDir) -> None:
    child = next(row for row in read_rows(Example, run.round(1) / "train.jsonl") if row.origin == "expanded")
    parent = explain_row(run, child.parent)
    assert child.id in {new["id"] for new in parent["grew"] if not new["reason"]}
    assert "new rows may be written from it" in parent["rounds"][1]["why"]
    told = explain_row(run, child.id)
    assert told["place"] == f"written by the teacher in round 1, from {child.parent}; kept"
    assert [line["round"] for line in told["rounds"]] == [0, 1, 2][1:] or told["rounds"][0]["use"] == ""


def test_a_holdout_row_is_never_trained_on_and_has_scores_in_every_round(run: RunDir) -> None:
    told = explain_row(run, read_rows(Example, run.path / "holdout.jsonl")[0].id)
    assert "holdout" in told["place"]
    assert [line["round"] for line in told["rounds"]] == [0, 1, 2]
    assert all(line["mfd"] is not None and not line["trained"] for line in told["rounds"])


def test_a_row_is_found_by_words_that_only_its_instruction_has(run: RunDir) -> None:
    row = read_rows(Example, run.path / "seeds.jsonl")[3]
    assert explain_row(run, row.prompt[0].content.upper())["id"] == row.id


@pytest.mark.parametrize(
    ("named", "said"),
    [("seed-99999", "no row 'seed-99999'"), ("seed-7", "Did you mean seed-00007?"), ("sum", "rows have 'sum'")],
)
def test_a_missing_or_ambiguous_row_is_an_error(run: RunDir, named: str, said: str) -> None:
    with pytest.raises(TapirError, match=said):
        explain_row(run, named)


@pytest.mark.parametrize("name", ["uniform", "growth", "lion", "reflection"])
def test_why_explains_rows_of_every_curriculum(name: str, tmp_path: Path) -> None:
    other = ran(tmp_path, **{"curriculum.name": name})
    for row in read_rows(Example, other.path / "seeds.jsonl")[:20]:
        told = explain_row(other, row.id)["rounds"][1]
        assert told["why"].startswith((name, "hard", "easy"))


def test_the_same_settings_give_the_same_plan_and_nothing_is_written(run: RunDir) -> None:
    before = everything(run)
    found = plan_with_changes(run, 1, [])
    assert found.then == found.now == plan_of(run)
    assert everything(run) == before


def test_a_higher_threshold_makes_fewer_rows_hard(run: RunDir) -> None:
    assert plan_with_changes(run, 1, ["curriculum.mfd_threshold=8"]).then.pool_hard == 0


def test_mastery_and_learnable_can_be_tried_on_a_run_without_them(run: RunDir) -> None:
    found = plan_with_changes(run, 2, ["curriculum.mastery=0.9", "curriculum.learnable=true"])
    assert found.now
    assert not found.now.mastery
    assert {one.state for one in found.then.mastery.values()} <= {"taught", "waiting", "mastered"}
    assert sum(one.learned for one in found.then.learning.values()) > 0
    assert set(found.then.mastery) == set(found.then.learning)


def test_one_share_changes_and_the_others_stay(run: RunDir) -> None:
    plain, more = plan_with_changes(run, 1, []).then, plan_with_changes(run, 1, ["tasks.Art=0.167"]).then
    assert plain.asked["Math"] > 0.8
    assert more.asked == {"Art": 0.5, "Math": 0.5}


def test_calls_that_are_not_made_yet_are_estimated(run: RunDir) -> None:
    found = plan_with_changes(run, 2, ["curriculum.rows=40"])
    assert [row.step for row in found.calls] == ["round-02/expand", "round-02/refine", "round-02/refine, new rows"]
    assert found.calls[-1].calls == found.then.to_write
    assert found.calls[0].money == 0.0  # the pocket teacher


def test_a_plan_of_another_curriculum_is_tried_on_the_same_judgements(run: RunDir) -> None:
    assert plan_with_changes(run, 1, ["curriculum.name=lion"]).then.curriculum == "lion"
    assert plan_with_changes(run, 1, ["curriculum.name=uniform"]).calls == ()


@pytest.mark.parametrize(
    ("number", "change", "said"),
    [
        (1, "train.epochs=3", "does not depend on train.epochs"),
        (1, "curriculum.rowz=3", "did you mean rows"),
        (1, "curriculum.rows", "not of the form KEY=VALUE"),
        (7, "curriculum.rows=3", "round 7 .* is not judged yet"),
    ],
)
def test_changes_that_cannot_be_tried_are_errors(run: RunDir, number: int, change: str, said: str) -> None:
    with pytest.raises(TapirError, match=said):
        plan_with_changes(run, number, [change])


def test_a_run_without_judgements_cannot_be_planned_by_difficulty(tmp_path: Path) -> None:
    other = ran(tmp_path, **{"curriculum.name": "uniform"})
    with pytest.raises(TapirError, match="was not judged"):
        plan_with_changes(other, 1, ["curriculum.name=tapir"])
    assert plan_with_changes(other, 1, ["curriculum.rows=7"]).then.got


def test_the_commands_print_tables_and_json(run: RunDir) -> None:
    row, cache = plan_of(run).hard[0], ["--cache", str(run.cache)]
    told = CliRunner().invoke(cli, ["why", run.name, row, "--json", *cache], catch_exceptions=False)
    assert json.loads(told.stdout)["id"] == row
    assert "round by round" in CliRunner().invoke(cli, ["why", run.name, row, *cache]).stdout
    words = ["plan", run.name, "--round", "1", "--set", "tasks.Art=0.3", *cache]
    assert json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)["round"] == 1
    shown = CliRunner().invoke(cli, words, catch_exceptions=False).stdout
    assert "to write" in shown
    assert re.search(r"rows? added, ", shown)
