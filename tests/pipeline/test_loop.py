"""The loop runs every step once and in order, resumes an interrupted run, and refuses one with missing files."""

import json
from pathlib import Path

import pytest
from fakes import QUIET, World, fake_backends, make_recipe, outputs, with_ask

from tapir_local.errors import TapirError
from tapir_local.files import read_record, read_rows, remove_path, write_rows
from tapir_local.pipeline.loop import distill, kept_recipe, list_steps, pending_steps, redo
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override, parse_recipe
from tapir_local.records import Answer, Example, Judgement, Request, RoundPlan, instruction_of
from tapir_local.report.status import round_report, run_status
from tapir_local.report.status_tables import round_tables, rounds_table
from tapir_local.run_dir import RunDir, lock_run
from tapir_local.stages.context import read_lock, unique_call_keys


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path)


def test_a_run_goes_through_and_learns(recipe: Recipe, tmp_path: Path) -> None:
    run, world = RunDir(tmp_path, "fake"), World()
    assert distill(recipe, run, fake_backends(world), QUIET) == len(list_steps(run, 2))
    status = run_status(run)
    assert [row["number"] for row in status["rounds"]] == [0, 1, 2]
    assert status["calls"]["paid"] == len(world.asked)
    assert status["state"] == "done"
    trained = {instruction_of(row.prompt) for n in range(3) for row in read_rows(Example, run.round(n) / "train.jsonl")}
    assert not trained & {instruction_of(row.prompt) for row in read_rows(Example, run.path / "holdout.jsonl")}


def test_a_round_trains_on_what_was_planned(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fake")
    distill(recipe, run, fake_backends(World()), QUIET)
    plan, rows = read_record(RoundPlan, run.round(1) / "plan.json"), read_rows(Example, run.round(1) / "train.jsonl")
    assert len(rows) == len(plan.hard) + plan.to_write + len(plan.replay)
    assert sum(row.completion == "right, in style" for row in rows) == len(plan.hard) + plan.to_write
    assert {row.origin for row in rows} == {"seed", "expanded"}


def test_the_pool_grows_by_what_was_expanded(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fake")
    distill(recipe, run, fake_backends(World()), QUIET)
    first, second = (read_rows(Judgement, run.round(number) / "judgements.jsonl") for number in (1, 2))
    assert len(second) == len(first) + read_record(RoundPlan, run.round(1) / "plan.json").to_write


def test_a_second_call_does_nothing(recipe: Recipe, tmp_path: Path) -> None:
    run, world = RunDir(tmp_path, "fake"), World()
    distill(recipe, run, fake_backends(world), QUIET)
    paid = len(world.asked)
    assert distill(recipe, run, fake_backends(world), QUIET) == 0
    assert len(world.asked) == paid


@pytest.mark.parametrize("cut", [0, 17, 40, 90, 150, 200])
def test_a_run_cut_at_any_call_ends_in_the_same_files(recipe: Recipe, tmp_path: Path, cut: int) -> None:
    whole, broken = RunDir(tmp_path / "a", "fake"), RunDir(tmp_path / "b", "fake")
    distill(recipe, whole, fake_backends(World()), QUIET)
    world = World()
    world.fail_at = cut
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, broken, fake_backends(world), QUIET)
    assert "Ctrl-C" in broken.record()["status"]
    world.fail_at = None
    distill(recipe, broken, fake_backends(world), QUIET)
    assert outputs(broken) == outputs(whole)
    assert len(world.asked) == len(set(world.asked))


def test_a_new_run_on_the_same_store_pays_nothing_and_gives_the_same_files(recipe: Recipe, tmp_path: Path) -> None:
    world = World()
    first, second = RunDir(tmp_path / "a", "fake"), RunDir(tmp_path / "b", "fake")
    distill(recipe, first, fake_backends(world), QUIET)
    distill(recipe, second, fake_backends(world), QUIET)
    assert run_status(second)["calls"]["paid"] == 0
    assert outputs(first) == outputs(second)


def test_more_rounds_go_on_from_a_finished_run(recipe: Recipe, tmp_path: Path) -> None:
    run, world = RunDir(tmp_path, "fake"), World()
    distill(recipe, run, fake_backends(world), QUIET)
    more = recipe.model_copy(update={"rounds": 3})
    assert distill(more, run, fake_backends(world), QUIET) == 12  # the round's eleven stages, and model/ again
    assert kept_recipe(run).rounds == 3


def test_a_changed_recipe_is_refused_with_what_changed(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fake")
    distill(recipe, run, fake_backends(World()), QUIET)
    changed = recipe.model_copy(update={"random_seed": 7})
    with pytest.raises(TapirError, match="random_seed: 1 -> 7") as error:
        distill(changed, run, fake_backends(World()), QUIET)
    assert "tapir-local resume fake" in error.value.fix


def test_a_hole_is_refused_and_names_redo(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fake")
    distill(recipe, run, fake_backends(World()), QUIET)
    remove_path(run.round(1) / "plan.json")
    with pytest.raises(TapirError, match="round-01/plan is missing") as error:
        distill(recipe, run, fake_backends(World()), QUIET)
    assert "tapir-local redo fake --round 1 --from plan" in str(error.value)


def test_redo_deletes_from_the_last_backwards_and_the_run_comes_back_the_same(recipe: Recipe, tmp_path: Path) -> None:
    run, world = RunDir(tmp_path, "fake"), World()
    distill(recipe, run, fake_backends(world), QUIET)
    before, paid = outputs(run), len(world.asked)
    gone = redo(run, 1, "plan")
    assert (gone[0], gone[1], gone[-1]) == ("end/ship", "round-02/evaluate", "round-01/plan")
    assert [step.name for step in pending_steps(list_steps(run, 2), "fake")] == gone[::-1]
    distill(recipe, run, fake_backends(world), QUIET)
    assert outputs(run) == before
    assert len(world.asked) == paid


def test_an_interrupted_redo_leaves_no_hole(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path, "fake")
    distill(recipe, run, fake_backends(World()), QUIET)
    left = [5]

    def interrupted(path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        remove_path(path)

    monkeypatch.setattr("tapir_local.pipeline.loop.remove_path", interrupted)
    with pytest.raises(KeyboardInterrupt):
        redo(run, 1, "plan")
    assert len(pending_steps(list_steps(run, 2), "fake")) == 5


def test_the_untrained_student_is_measured_and_no_later_stage_depends_on_it(recipe: Recipe, tmp_path: Path) -> None:
    run, world = RunDir(tmp_path, "fake"), World()
    distill(recipe, run, fake_backends(world), QUIET)
    found, paid = run_status(run), len(world.asked)
    assert (found["untrained"]["round"], found["untrained"]["accuracy"]) == (-1, 0.0)
    assert found["untrained"]["rows"] == found["rounds"][0]["metrics"]["rows"]
    before = outputs(run)
    again = ["untrained-export", "untrained-answer", "untrained-judge", "untrained-evaluate"]
    assert redo(run, None, again[0]) == [f"prepare/{name}" for name in again[::-1]]
    left = [step.name for step in pending_steps(list_steps(run, 2), "fake")]  # no hole, as in a run of an older version
    assert left == [*(f"prepare/{name}" for name in again), "end/ship"]
    assert distill(recipe, run, fake_backends(world), QUIET) == 5
    assert outputs(run) == before
    assert len(world.asked) == paid


@pytest.mark.parametrize(("number", "stage", "said"), [(9, "plan", "no round 9"), (1, "dance", "no stage 'dance'")])
def test_redo_of_what_is_not_there(recipe: Recipe, tmp_path: Path, number: int, stage: str, said: str) -> None:
    run = RunDir(tmp_path, "fake")
    distill(recipe, run, fake_backends(World()), QUIET)
    with pytest.raises(TapirError, match=said):
        redo(run, number, stage)


def test_a_run_held_elsewhere_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fake")
    with lock_run(run), pytest.raises(TapirError, match="is in use by process"):
        distill(recipe, run, fake_backends(World()), QUIET)


def test_too_many_unreadable_judgements_stop_the_round_and_none_counts_as_easy(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fake")

    def mumble(request: Request, answer: Answer) -> Answer:
        return Answer("an 8, I think", "stop", False) if request.stage == "judge" else answer

    with pytest.raises(TapirError, match="could not be read"):
        distill(recipe, run, with_ask(World(), mumble), QUIET)
    assert all(row.teacher is None for row in read_rows(Judgement, run.round(1) / "judgements.jsonl"))
    assert not (run.round(1) / "plan.json").exists()


def test_an_unreadable_judgement_is_asked_for_once_more_with_the_error(recipe: Recipe, tmp_path: Path) -> None:
    world = World()

    def mumble_first(request: Request, answer: Answer) -> Answer:
        return Answer("an 8", "stop", False) if request.stage == "judge" and len(request.messages) == 2 else answer

    run = RunDir(tmp_path, "fake")
    distill(recipe, run, with_ask(world, mumble_first), QUIET)
    assert run_status(run)["rounds"][1]["metrics"]["unjudged"] == 0
    again = [request for request in world.asked if request.stage == "judge" and len(request.messages) == 4]
    assert again[0].messages[2].content == "an 8"


def test_cut_answers_are_left_out_not_trained_on(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fake")

    def cut(request: Request, answer: Answer) -> Answer:
        return (
            Answer("half of it", "length", False) if request.stage == "refine" and request.row.endswith("3") else answer
        )

    tolerant = override(recipe, {"limits.unusable": 0.5})
    distill(tolerant, run, with_ask(World(), cut), QUIET)
    rows = [row for number in (1, 2) for row in read_rows(Example, run.round(number) / "train.jsonl")]
    assert all(row.completion != "half of it" for row in rows)
    assert "left out (2 cut at teacher.max_tokens, see unusable.jsonl)" in str(run.record()["stages"])


def test_rejected_drafts_are_kept_with_their_reason(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fake")

    def same(request: Request, answer: Answer) -> Answer:
        return (
            Answer("<new_instruction>one two three</new_instruction>", "stop", False)
            if request.stage == "expand"
            else answer
        )

    distill(recipe, run, with_ask(World(), same), QUIET)
    drafts = [json.loads(line) for line in (run.round(1) / "expanded.jsonl").read_text().splitlines()]
    assert sum(not draft["reason"] for draft in drafts) == 1
    assert any("near-duplicate" in draft["reason"] for draft in drafts)


def test_recorded_answers_go_through_without_a_call(recipe: Recipe, tmp_path: Path) -> None:
    rows = [{"instruction": f"do {n} {n * n} things", "output": f"{n} and {n * n}"} for n in range(40)]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    text = "name: own\nrounds: 1\nteacher: recorded\njudge: reference\nseeds: {holdout: 5, path: PATH}"
    run, world = RunDir(tmp_path, "own"), World()
    distill(
        parse_recipe(text.replace("PATH", str(tmp_path / "own.json")), "own.yaml"), run, fake_backends(world), QUIET
    )
    assert world.asked == []
    status = run_status(run)
    assert "ROUGE" in status["rounds"][1]["metrics"]["judge"]
    scores = [row["metrics"]["student_score"] for row in status["rounds"]]
    assert [row["metrics"]["win_rate"] for row in status["rounds"]] == [None, None]
    assert run.record()["stages"]["round-01/evaluate"]["note"].startswith(
        f"likeness {scores[1]:.2f} of 10 ({scores[1] - scores[0]:+.2f} on round 0)"
    )
    cells = [list(map(str, column.cells)) for column in rounds_table(status).columns]
    assert (cells[1][1], cells[5]) == ("-", ["1.00", "1.00 (+0.00)", f"{scores[1]:.2f} ({scores[1] - scores[0]:+.2f})"])
    assert "Win rate" not in str(rounds_table(status).caption)
    by_task = round_tables(round_report(run, 1))
    assert any("student score" in str(column.header) for table in by_task for column in table.columns)
    assert {row.completion for row in read_rows(Example, run.round(1) / "train.jsonl")} <= {
        row["output"] for row in rows
    }


def test_too_few_seeds_for_the_holdout(recipe: Recipe, tmp_path: Path) -> None:
    short = recipe.model_copy(update={"seeds": recipe.seeds.model_copy(update={"holdout": 60})})
    with pytest.raises(TapirError, match="not enough rows to train on: 60 in all, and the holdout takes 60") as error:
        distill(short, RunDir(tmp_path, "fake"), fake_backends(World()), QUIET)
    assert error.value.fix.endswith("--set seeds.holdout=12")


@pytest.mark.parametrize("answers", ["teacher", "file"])
def test_answers_that_the_teacher_writes_anew_are_told(answers: str, tmp_path: Path) -> None:
    recipe, run, world = override(make_recipe(tmp_path), {"seeds.answers": answers}), RunDir(tmp_path, "fake"), World()
    rows = json.loads((tmp_path / "seeds.json").read_text())
    (tmp_path / "seeds.json").write_text(json.dumps([{**row, "output": "mine"} for row in rows]))
    world.fail_at = 1
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, run, fake_backends(world), QUIET)
    note = run.record()["stages"]["prepare/read"]["note"]
    anew = "; 60 rows have answers, but the teacher writes its own (seeds.answers: file keeps yours)"
    assert note == "60 rows" + (anew if answers == "teacher" else "")


def test_show_has_the_plan_the_metrics_and_answers(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fake")
    distill(recipe, run, fake_backends(World()), QUIET)
    found = round_report(run, None)
    assert found["round"] == 2
    assert found["plan"]["alpha"] == 0.5
    assert found["answers"][0]["scores"]
    with pytest.raises(TapirError, match="no round 7"):
        round_report(run, 7)


def test_an_error_about_an_old_plan_names_redo(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fake")
    distill(recipe, run, fake_backends(World()), QUIET)
    (run.round(1) / "plan.json").write_text('{"round": 1, "alpha": 0.3, "expand": {"Math": 3}}')
    with pytest.raises(TapirError, match=r"not a RoundPlan: curriculum .*\n.*redo"):
        round_report(run, 1)


def test_rows_written_for_the_stages_are_those_of_the_fake(recipe: Recipe, tmp_path: Path) -> None:
    """The classifier's labels reach the rows that the teacher did not label."""
    run = RunDir(tmp_path, "fake")
    distill(recipe, run, fake_backends(World()), QUIET)
    rows = read_rows(Example, run.path / "seeds.jsonl") + read_rows(Example, run.path / "holdout.jsonl")
    assert {row.labelled_by for row in rows} == {"teacher", "classifier"}
    assert sum(row.labelled_by == "teacher" for row in rows) == 30
    write_rows(tmp_path / "copy.jsonl", rows)
    assert read_rows(Example, tmp_path / "copy.jsonl") == rows


def test_the_lock_names_every_call_of_every_step_and_forgets_what_is_redone(recipe: Recipe, tmp_path: Path) -> None:
    run, world = RunDir(tmp_path, "fake"), World()
    distill(recipe, run, fake_backends(world), QUIET)
    lines = read_lock(run)
    assert len(unique_call_keys(lines)) == len(world.asked)
    steps = list(dict.fromkeys(line.step for line in lines))
    assert steps == [step.name for step in list_steps(run, 2) if step.name in steps]  # in the order of the run
    assert {"prepare/label", "prepare/seeds", "round-00/holdout-judge", "round-02/refine"} <= set(steps)
    redo(run, 2, "refine")
    assert not {line.step for line in read_lock(run)} & {"round-02/refine", "round-02/holdout-judge"}
    distill(recipe, run, fake_backends(world), QUIET)
    assert read_lock(run) == lines
