"""Each curriculum runs through all stages, and asks only for what it needs."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import QUIET, World, fake_backends, make_recipe

from tapir_local.data.dataset import Draft
from tapir_local.errors import TapirError
from tapir_local.files import read_record, read_rows
from tapir_local.method.baselines import CURRICULA
from tapir_local.pipeline.dry_run import expected_calls
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override, parse_recipe
from tapir_local.records import Example, RoundPlan, Scored
from tapir_local.run_dir import RunDir

NAMES = sorted(CURRICULA)


def ran(folder: Path, world: World, **changes: object) -> tuple[RunDir, Recipe]:
    """A run of the small world with some settings of its curriculum changed."""
    recipe = override(make_recipe(folder), {f"curriculum.{key}": value for key, value in changes.items()})
    run = RunDir(folder, "fake")
    distill(recipe, run, fake_backends(world), QUIET)
    return run, recipe


def trained(run: RunDir, number: int = 1) -> list[Example]:
    return read_rows(Example, run.round(number) / "train.jsonl")


def asked(world: World, number: int = 1) -> Counter[str]:
    """Requests of each stage in a round."""
    return Counter(request.stage for request in world.asked if request.round == number)


@pytest.mark.parametrize("name", NAMES)
def test_every_curriculum_runs_and_trains_on_the_wanted_rows(name: str, tmp_path: Path) -> None:
    run, _ = ran(tmp_path, World(), name=name)
    held = {row.prompt for row in read_rows(Example, run.path / "holdout.jsonl")}
    for number in (1, 2):
        rows = trained(run, number)
        assert len(rows) == (50 if name == "all" else 20)
        assert not held & {row.prompt for row in rows}
        assert all(row.completion for row in rows)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("uniform", {"holdout-judge"}),
        ("all", {"holdout-judge"}),
        ("growth", {"holdout-judge"}),
        ("reflection", {"expand", "refine", "holdout-judge"}),
        ("lion", {"judge", "expand", "refine", "holdout-judge"}),
        ("tapir", {"judge", "expand", "refine", "holdout-judge"}),
    ],
)
def test_a_curriculum_asks_only_for_what_it_needs(name: str, stages: set[str], tmp_path: Path) -> None:
    world = World()
    ran(tmp_path, world, name=name)
    assert set(asked(world)) == stages


@pytest.mark.parametrize("name", ["uniform", "all", "growth"])
def test_plain_curricula_train_on_the_seeds_own_answers(name: str, tmp_path: Path) -> None:
    run, _ = ran(tmp_path, World(), name=name)
    assert {row.completion for row in trained(run)} == {"right"}
    assert {row.origin for row in trained(run)} == {"seed"}


def test_lion_trains_only_on_new_rows_with_plain_answers(tmp_path: Path) -> None:
    run, _ = ran(tmp_path, World(), name="lion")
    rows = trained(run)
    assert {row.origin for row in rows} == {"expanded"}
    assert {row.completion for row in rows} == {"right"}
    assert sum("rare" in row.prompt[0].content for row in rows) == 10


def test_reflection_keeps_what_the_student_gains_by(tmp_path: Path) -> None:
    """For the fake student, longer texts have a higher IFD, and rewritten answers repeat words of the instruction."""
    run, _ = ran(tmp_path, World(), name="reflection")
    drafts = read_rows(Draft, run.round(1) / "expanded.jsonl")
    kept = {draft.example.parent for draft in drafts if not draft.reason}
    rows = trained(run)
    assert len(drafts) == len(rows) == 20
    assert {row.parent for row in rows if row.origin == "expanded"} == kept
    assert all("IFD" in draft.reason for draft in drafts if draft.reason)
    assert any(row.completion.startswith("right, reflected") for row in rows)


@pytest.mark.parametrize(("given", "kept"), [(-9.0, True), (-1.0, False)])
def test_a_rewritten_instruction_is_kept_where_ifd_rises(given: float, kept: bool, tmp_path: Path) -> None:
    """`given` is the log-probability of a rewritten answer after its instruction; all other texts have -2."""

    def score(*, gguf, texts, progress, on_result):
        new = [prompt[0].content.endswith("better") for prompt, _ in texts]
        for found in (Scored(str(n), given if rewritten else -2.0, 1) for n, rewritten in enumerate(new)):
            on_result(found)

    recipe, run = override(make_recipe(tmp_path), {"curriculum.name": "reflection"}), RunDir(tmp_path, "fake")
    distill(recipe, run, replace(fake_backends(World()), score=score), QUIET)
    assert all(row.prompt[0].content.endswith("better") is kept for row in trained(run))


def test_a_rewritten_instruction_near_the_holdout_is_refused(tmp_path: Path) -> None:
    run, _ = ran(tmp_path, World(), name="reflection", max_rouge=0.3)
    drafts = read_rows(Draft, run.round(1) / "expanded.jsonl")
    assert any("near the holdout" in draft.reason for draft in drafts)


def test_without_difficulty_nothing_is_answered_or_judged(tmp_path: Path) -> None:
    world = World()
    run, _ = ran(tmp_path, world, difficulty=False)
    assert set(asked(world)) == {"expand", "refine", "holdout-judge"}
    assert (run.round(1) / "judgements.jsonl").read_text() == ""
    assert "difficulty is off" in read_record(RoundPlan, run.round(1) / "plan.json").notes[0]


def test_without_refinement_hard_rows_keep_their_answers_and_new_ones_get_plain_ones(tmp_path: Path) -> None:
    world = World()
    run, _ = ran(tmp_path, world, refine="off")
    assert {row.completion for row in trained(run)} == {"right"}
    assert asked(world)["refine"] == read_record(RoundPlan, run.round(1) / "plan.json").to_write


def test_with_refine_all_replayed_rows_are_styled_too_and_only_once(tmp_path: Path) -> None:
    world = World()
    run, _ = ran(tmp_path, world, refine="all")
    assert {row.completion for number in (1, 2) for row in trained(run, number)} == {"right, in style"}
    replayed = {row for number in (1, 2) for row in read_record(RoundPlan, run.round(number) / "plan.json").replay}
    styled = Counter(request.row for request in world.asked if request.stage == "refine" and request.row in replayed)
    assert max(styled.values()) == 1


def test_with_mastery_and_learnable_each_round_teaches_the_weakest_tasks(tmp_path: Path) -> None:
    """The fake student answers what it was trained on, so that all hard rows of a round are learned in it."""
    world = World()
    run, recipe = ran(tmp_path, world, mastery=0.9, learnable=True)
    tasks = {row.id: row.task for row in read_rows(Example, run.path / "seeds.jsonl")}
    plans = {number: read_record(RoundPlan, run.round(number) / "plan.json") for number in (1, 2)}
    for number, plan in plans.items():
        states = {task: one.state for task, one in plan.mastery.items()}
        taught = {task for task, state in states.items() if state == "taught"}
        rows = trained(run, number)
        tasks |= {row.id: row.task for row in rows}
        assert taught
        assert {tasks[id] for id in plan.hard} | {expansion.task for expansion in plan.expansions} == taught
        assert len(rows) + sum(plan.short.values()) == 20
        assert plan.notes[0].startswith("hard and new rows go to the weakest tasks that are not mastered: ")
    assert {one.trained for one in plans[1].learning.values()} == {0}
    learned = {task: sum(tasks[id] == task for id in plans[1].hard) for task in plans[2].learning}
    assert {task: (one.trained, one.learned) for task, one in plans[2].learning.items()} == {
        task: (count, count) for task, count in learned.items()
    }
    assert sum(learned.values()) > 0
    for stage in ("judge", "expand", "refine"):
        wanted = expected_calls(stage, 2, recipe, 60)
        assert 0.8 * asked(world, 2)[stage] <= wanted <= 1.4 * asked(world, 2)[stage] + 2


@pytest.mark.parametrize("name", ["lion", "reflection"])
def test_recorded_answers_cannot_be_asked_to_write(name: str) -> None:
    with pytest.raises(TapirError, match=f"{name} needs a teacher that can be asked"):
        parse_recipe(f"teacher: recorded\njudge: reference\ncurriculum: {{name: {name}}}", "own.yaml")


@pytest.mark.parametrize("name", ["uniform", "all", "growth"])
def test_recorded_answers_serve_the_curricula_that_ask_nobody(name: str, tmp_path: Path) -> None:
    rows = [{"instruction": f"do {n} {n * n} things", "output": f"{n} and {n * n}"} for n in range(40)]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    text = f"name: own\nrounds: 1\nteacher: recorded\njudge: reference\ncurriculum: {{name: {name}, rows: 10}}"
    recipe = override(parse_recipe(text, "own"), {"seeds.path": str(tmp_path / "own.json"), "seeds.holdout": 5})
    world, run = World(), RunDir(tmp_path, "own")
    distill(recipe, run, fake_backends(world), QUIET)
    assert world.asked == []
    assert len(trained(run)) == (35 if name == "all" else 10)


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_of_a_round_is_close_to_its_calls(name: str, tmp_path: Path) -> None:
    world = World()
    _, recipe = ran(tmp_path, world, name=name)
    for stage in ("judge", "expand", "refine", "holdout-judge"):  # of round 2, as round 1 has few easy rows
        wanted = expected_calls(stage, 2, recipe, 60)
        assert wanted >= asked(world, 2)[stage] * 0.8
        assert wanted <= asked(world, 2)[stage] * 1.4 + 2


@pytest.mark.parametrize("refine", ["hard", "all"])
def test_a_row_that_is_hard_again_is_refined_by_the_same_request(refine: str, tmp_path: Path) -> None:
    """With a student that never learns the same rows are hard in every round; their refined answers are paid once."""
    world, recipe = World(), override(make_recipe(tmp_path), {"rounds": 4, "curriculum.refine": refine})
    lazy = replace(fake_backends(world), train=learn_nothing)
    distill(recipe, RunDir(tmp_path, "fake"), lazy, QUIET)
    refined = {(request.row, request.messages) for request in world.asked if request.stage == "refine"}
    rounds = Counter(request.row for request in world.asked if request.stage == "refine")
    assert max(rounds.values()) > 1  # some were taken in several rounds
    assert len(refined) == len(rounds)  # each by one request


def learn_nothing(*, out: Path, **_: object) -> None:
    """A training that teaches nothing."""
    out.mkdir()
    (out / "known").write_text(json.dumps([]))
