"""Change a run as a whole: ship the student of another round, or delete the run."""

import time

from tapir_local.errors import TapirError
from tapir_local.export.gate import GateReport
from tapir_local.files import read_record, remove_path, sync_to_disk
from tapir_local.output_record import describe_output
from tapir_local.pipeline.loop import (
    Watch,
    kept_recipe,
    last_round,
    list_steps,
    recipe_steps,
    update_run_record,
    utc_now,
)
from tapir_local.run_dir import RunDir, lock_run
from tapir_local.stages.context import Backends, Work
from tapir_local.stages.ship import SHIP_STAGE, describe_model_folder, write_model_folder
from tapir_local.stages.shipped_round import CHOSEN, record_shipped_round

LAST_DELETED = ("recipe.yaml", ".lock", ".lock-holder")  # while recipe.yaml is there, the folder is a run


def check_shippable(run: RunDir, number: int) -> None:
    """TapirError unless a round has a student that has passed the gate and is evaluated."""
    there = [
        n
        for n in range(last_round(run) + 1)
        if all((run.round(n) / name).exists() for name in ("student.gguf", "gate.json", "metrics.json"))
    ]
    if number not in there:
        rounds = ", ".join(map(str, there)) or "none"
        raise TapirError(
            f"run {run.name!r} has no finished round {number}", where=str(run.path), fix=f"Finished rounds: {rounds}."
        )
    if failed := read_record(GateReport, run.round(number) / "gate.json").failed:
        raise TapirError(f"the student of round {number} failed the gate: {'; '.join(failed)}", where=str(run.path))


def ship_round(run: RunDir, number: int, backends: Backends, watch: Watch) -> str:
    """Make model/ from the student of a round, in place of the model/ that is there; return the closing line.

    The new one is complete before the old one is deleted. TapirError if the round is not finished, or another process
    works on the run.
    """
    with lock_run(run):
        check_shippable(run, number)
        recipe, out, began = kept_recipe(run), run.path / SHIP_STAGE.output, time.monotonic()
        step = recipe_steps(run, recipe)[-1]
        new = out.with_name(out.name + ".new")
        remove_path(new)
        watch.begins(step)
        write_model_folder(Work(recipe, run, backends, number, step.name, watch.progress), new, number, CHOSEN)
        for file in new.iterdir():
            sync_to_disk(file)
        remove_path(out)
        record_shipped_round(run, recipe, number, CHOSEN)
        new.rename(out)
        sync_to_disk(run.path)
        note = describe_model_folder(out, number, CHOSEN)
        taken = {"seconds": round(time.monotonic() - began, 1), "note": note, "finished": utc_now()}
        taken |= {"paid": 0, "hits": 0, "output": describe_output(out)}
        update_run_record(run, status=str(run.record().get("status", "")), step=step.name, taken=taken)
        watch.ends(step, taken)
    return note


def delete_run(run: RunDir) -> None:
    """Delete the folder of a run; TapirError if another process works on it.

    The outputs go from the last backwards, and recipe.yaml goes last: what an interruption leaves is still a run, which
    can be resumed or deleted. Calls in the store, and base GGUFs, are not in this folder.
    """
    with lock_run(run):
        for step in reversed(list_steps(run, last_round(run))):
            remove_path(step.output)
        for path in sorted(run.path.iterdir()):
            if path.name not in LAST_DELETED:
                remove_path(path)
        remove_path(run.path / "recipe.yaml")
    remove_path(run.path)
