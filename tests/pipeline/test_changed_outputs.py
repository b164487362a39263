"""An output that was changed is noticed, and the state of a run is what its files and its lock say."""

import os
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import QUIET, World, fake_backends, outputs

from tapir_local.errors import TapirError
from tapir_local.files import file_sha256, write_json
from tapir_local.output_record import describe_change, describe_output
from tapir_local.pipeline.loop import distill, list_steps, redo
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Answer, Progress, Request
from tapir_local.report.status import run_status
from tapir_local.run_dir import RunDir, lock_holder, lock_run


def drop_lines(path: Path, kept: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))


def test_whole_lines_that_are_missing_are_noticed_before_anything_is_asked(recipe: Recipe, run: RunDir) -> None:
    world = World()
    distill(recipe, run, fake_backends(world), QUIET)
    path, paid = run.round(1) / "holdout-judgements.jsonl", len(world.asked)
    whole = path.read_bytes()
    assert run.record()["stages"]["round-01/holdout-judge"]["output"] == {
        "rows": 10,
        "bytes": len(whole),
        "sha256": file_sha256(path),
    }
    drop_lines(path, 4)
    assert "it has 4 rows, not 10 as written" in run_status(run)["warnings"][0]
    more = recipe.model_copy(update={"rounds": 3})
    with pytest.raises(TapirError, match="it has 4 rows, not 10 as written") as error:
        distill(more, run, fake_backends(world), QUIET)
    assert "tapir-local redo fake --round 1 --from holdout-judge" in str(error.value)
    assert len(world.asked) == paid
    path.write_bytes(whole)
    distill(more, run, fake_backends(world), QUIET)
    assert run_status(run)["state"] == "done"


@pytest.mark.parametrize("name", ["plan.json", "adapter/known", "student.gguf"])
def test_any_other_change_is_noticed_and_redo_mends_it(recipe: Recipe, run: RunDir, name: str) -> None:
    world = World()
    distill(recipe, run, fake_backends(world), QUIET)
    before, path = outputs(run), run.round(1) / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(TapirError, match="was changed"):
        distill(recipe, run, fake_backends(world), QUIET)
    redo(run, 1, {"plan.json": "plan", "adapter/known": "train", "student.gguf": "export"}[name])
    distill(recipe, run, fake_backends(world), QUIET)
    assert outputs(run) == before


def test_a_run_of_an_older_version_has_nothing_to_compare(recipe: Recipe, run: RunDir) -> None:
    distill(recipe, run, fake_backends(World()), QUIET)
    record = run.record()
    for taken in record["stages"].values():
        del taken["output"]
    write_json(run.path / "run.json", record)
    drop_lines(run.round(1) / "answers.jsonl", 4)
    assert distill(recipe, run, fake_backends(World()), QUIET) == 0


def test_outputs_are_compared_by_their_contents(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")
    known = describe_output(folder)
    assert (known["files"], known["bytes"]) == (2, 2)
    (folder / ".hidden").write_text("3")
    assert describe_change(folder, known) == ""
    (folder / "b").rename(folder / "c")
    assert describe_change(folder, known) == "other contents"


def test_the_state_says_what_runs_and_what_ended(recipe: Recipe, run: RunDir) -> None:
    """While it runs, the state is read each time that a stage asks."""
    states, world = list[str](), World()

    def ask(requests: Sequence[Request], progress: Progress) -> list[Answer]:
        states.append(run_status(run)["state"])
        return world.ask(requests, progress)

    world.fail_at = 0
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, run, fake_backends(world), QUIET)
    assert run_status(run)["state"].startswith("stopped in prepare/label")
    world.fail_at = None
    distill(recipe, run, replace(fake_backends(world), teacher=ask, judge=ask), QUIET)
    running = f"running (process {os.getpid()}), in"
    assert states[0] == f"{running} prepare/label"
    assert not [state for state in states if not state.startswith(running)]
    redo(run, 2, "plan")
    assert run_status(run)["state"].startswith("stopped before round-02/plan")
    write_json(run.path / "run.json", {**run.record(), "status": "running"})  # as after kill -9
    assert run_status(run)["state"].startswith("stopped in round-02/plan: its process ended")
    with lock_run(run):
        assert run_status(run)["state"] == f"{running} round-02/plan"


def test_a_run_is_locked_while_a_process_holds_it(run: RunDir) -> None:
    assert not lock_holder(run)
    with lock_run(run):
        assert lock_holder(run)
    assert not lock_holder(run)


def test_a_full_disk_does_not_hide_the_first_error(recipe: Recipe, run: RunDir) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fail(**_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        raise TapirError("the first error")

    try:
        with pytest.raises(TapirError, match="the first error"):
            distill(recipe, run, replace(fake_backends(World()), train=fail), QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.record()["status"] == "running"
    assert list_steps(run, 0)[0].done
