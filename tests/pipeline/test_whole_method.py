"""Properties of the method that only a whole run shows."""

from collections import Counter
from pathlib import Path

import pytest
from fakes import QUIET, World, fake_backends, make_recipe

from tapir_local.data.dataset import Draft
from tapir_local.files import read_record, read_rows
from tapir_local.method import prompts
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.tasks import TASKS
from tapir_local.recipe.text import override
from tapir_local.records import Example, Message, Progress, RoundPlan, SchedulePart
from tapir_local.run_dir import RunDir

HALF = {"Math", "Reasoning", "Code Generation", "Code Debug"}


def ran(folder: Path, world: World, **changes: object) -> RunDir:
    run = RunDir(folder, "fake")
    distill(override(make_recipe(folder), changes), run, fake_backends(world), QUIET)
    return run


def rows(run: RunDir, name: str) -> list[Example]:
    return read_rows(Example, run.path / f"{name}.jsonl")


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.label)
def test_every_task_is_refined_in_its_own_style_and_the_instruction_stays(task) -> None:
    asked = prompts.refine_prompt((Message("user", "Do this."),), task, "A draft.")[1].content
    assert f"write it {task.style}." in asked
    assert "<instruction>\nDo this.\n</instruction>" in asked
    assert "<answer>\nA draft.\n</answer>" in asked
    assert task.description in asked


def test_the_shares_are_the_published_ones_and_half_is_math_reasoning_and_code() -> None:
    assert len(TASKS) == 32
    assert sum(TASKS[label].share for label in HALF) == pytest.approx(0.5)
    assert Counter(task.share for task in TASKS.values()) == {0.167: 2, 0.083: 2, 0.017: 27, 0.041: 1}


def test_the_student_is_trained_on_the_seeds_first_and_evaluated_as_the_baseline(tmp_path: Path) -> None:
    run = ran(tmp_path, World(), **{"curriculum.first_rows": None})
    assert {row.id for row in read_rows(Example, run.round(0) / "train.jsonl")} == {
        row.id for row in rows(run, "seeds")
    }
    assert (run.round(0) / "metrics.json").exists()


@pytest.mark.parametrize(("start", "begins"), [("previous", [False, True, True]), ("base", [False, False, False])])
def test_a_round_goes_on_from_the_last_adapter_or_begins_at_the_base(
    start: str, begins: list[bool], tmp_path: Path
) -> None:
    went_on, parts = list[bool](), list[str]()

    def train(
        *, rows: Path, previous: Path | None, seed: int, part: SchedulePart, out: Path, progress: Progress
    ) -> None:
        went_on.append(previous is not None)
        parts.append(part)
        plain.train(rows=rows, previous=previous, seed=seed, part=part, out=out, progress=progress)

    plain = fake_backends(World())
    made = {name: getattr(plain, name) for name in plain.__dataclass_fields__} | {"train": train}
    distill(
        override(make_recipe(tmp_path), {"train.start": start}), RunDir(tmp_path, "fake"), type(plain)(**made), QUIET
    )
    assert went_on == begins
    assert parts == ["first", "middle", "last"]


def test_the_loss_is_realized_by_hard_and_easy_rows_in_the_planned_proportion(tmp_path: Path) -> None:
    run = ran(tmp_path, World(), **{"curriculum.alpha": 0.5, "curriculum.rows": 12})
    plan, trained = read_record(RoundPlan, run.round(1) / "plan.json"), read_rows(Example, run.round(1) / "train.jsonl")
    hard = sum(row.completion == "right, in style" for row in trained)
    assert (plan.alpha, plan.alpha_got, hard / len(trained)) == (0.5, 0.5, 0.5)


def test_the_holdout_is_never_trained_on_nor_expanded(tmp_path: Path) -> None:
    run = ran(tmp_path, World())
    held = {row.id for row in rows(run, "holdout")}
    for number in (1, 2):
        drafts = read_rows(Draft, run.round(number) / "expanded.jsonl")
        trained = read_rows(Example, run.round(number) / "train.jsonl")
        assert drafts
        assert not held & ({draft.example.parent for draft in drafts} | {row.id for row in trained})


def test_new_rows_are_of_their_parents_task(tmp_path: Path) -> None:
    run = ran(tmp_path, World())
    tasks = {row.id: row.task for row in rows(run, "labelled")}
    for draft in read_rows(Draft, run.round(1) / "expanded.jsonl"):
        assert draft.example.task == tasks[draft.example.parent]


def test_drafts_of_one_seed_have_different_draws_in_all_rounds(tmp_path: Path) -> None:
    world = World()
    ran(tmp_path, world)
    asked = [(request.row, request.draw) for request in world.asked if request.stage == "expand"]
    assert len(set(asked)) == len(asked)


def test_with_few_seeds_the_teacher_labels_all_of_them(tmp_path: Path) -> None:
    run = ran(tmp_path, World(), **{"classifier.labelled": 100})
    assert {row.labelled_by for row in rows(run, "labelled")} == {"teacher"}
    assert not (run.path / "classifier" / "predictions.jsonl").exists()


def test_the_wanted_number_of_new_rows_is_reached_or_the_missing_ones_are_reported(tmp_path: Path) -> None:
    run = ran(tmp_path, World(), **{"curriculum.drafts": 1, "curriculum.max_rouge": 0.0})
    assert not [draft for draft in read_rows(Draft, run.round(1) / "expanded.jsonl") if not draft.reason]
    wanted = read_record(RoundPlan, run.round(1) / "plan.json").to_write
    assert f"{wanted:,} missing" in run.record()["stages"]["round-01/expand"]["note"]
