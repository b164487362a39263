"""Run the pending steps of a run in order, and undo steps from the last backwards."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tapir_local import __version__
from tapir_local.data.seed_digest import accept_moved_seeds
from tapir_local.errors import TapirError
from tapir_local.files import remove_path, write_json, write_text
from tapir_local.interrupts import interrupt_reason
from tapir_local.output_record import describe_change, describe_output
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import diff_recipes, parse_recipe, to_yaml
from tapir_local.recipe.yaml import read_yaml
from tapir_local.records import Progress
from tapir_local.resources import CHECKOUT, read_recipe_text
from tapir_local.resumable import remove_partial
from tapir_local.run_dir import RunDir, lock_run
from tapir_local.stages.context import Backends, Stage, Work, unlock_steps
from tapir_local.stages.prepare import PREPARE_STAGES
from tapir_local.stages.rounds import (
    BASELINE_STAGES,
    PREFERENCE_STAGES,
    ROUND_STAGES,
    has_too_few_pairs,
    refuse_moved_pairs,
)
from tapir_local.stages.ship import SHIP_STAGE, is_model_stale
from tapir_local.stages.untrained import UNTRAINED_STAGES
from tapir_local.unusable import remove_unusable

RECORDED_PACKAGES = ("torch", "transformers", "trl", "peft", "unsloth", "llama-cpp-python", "gguf", "openai")


@dataclass(frozen=True)
class Step:
    """A stage at its place in a run. `number` is the round; None for the preparation and the end of a run."""

    number: int | None
    stage: Stage
    output: Path

    @property
    def name(self) -> str:
        """`prepare/label`, `round-01/judge`, `end/ship`."""
        once = "end" if self.stage is SHIP_STAGE else "prepare"
        return f"{once if self.number is None else f'round-{self.number:02d}'}/{self.stage.name}"

    @property
    def done(self) -> bool:
        """Whether the output exists; it exists only when complete."""
        return self.output.exists()


@dataclass(frozen=True)
class Watch:
    """What the loop calls when a step begins, makes progress, and ends with its closing line."""

    begins: Callable[[Step], None]
    progress: Progress
    ends: Callable[[Step, Mapping[str, Any]], None]


def list_steps(run: RunDir, rounds: int, *, on_pairs: bool = False) -> list[Step]:
    """All steps of a run with this number of rounds after the baseline, in order; the last makes model/.

    With `on_pairs` one more round trains on preference pairs. If too few were found, it has no other step.
    """
    steps = [Step(None, stage, run.path / stage.output) for stage in (*PREPARE_STAGES, *UNTRAINED_STAGES)]
    for number in range(rounds + 1):
        stages = ROUND_STAGES if number else BASELINE_STAGES
        steps += [Step(number, stage, run.round(number) / stage.output) for stage in stages]
    if on_pairs:
        folder = run.round(rounds + 1)
        left = PREFERENCE_STAGES[:1] if has_too_few_pairs(folder) else PREFERENCE_STAGES
        steps += [Step(rounds + 1, stage, folder / stage.output) for stage in left]
    return [*steps, Step(None, SHIP_STAGE, run.path / SHIP_STAGE.output)]


def recipe_steps(run: RunDir, recipe: Recipe) -> list[Step]:
    """All steps of a run with this recipe."""
    return list_steps(run, recipe.rounds, on_pairs=recipe.pairs_round is not None)


def begun_steps(run: RunDir, rounds: int = 0) -> list[Step]:
    """All steps up to the last round that has a folder, or up to round `rounds` of the recipe if that is higher."""
    last = max(rounds, last_round(run))
    on_pairs = run.exists and last == kept_recipe(run).pairs_round
    return list_steps(run, last - on_pairs, on_pairs=on_pairs)


def last_round(run: RunDir) -> int:
    """The highest round that has a folder; 0 if there is none."""
    return max(
        (int(path.name.removeprefix("round-")) for path in run.path.glob("round-[0-9]*") if path.is_dir()), default=0
    )


def pending_steps(steps: Sequence[Step], run_name: str) -> list[Step]:
    """The steps that are not done; TapirError if a later output exists while an earlier one is missing.

    The last step, which makes model/, is pending whenever another is: an existing model/ is then of fewer rounds.
    """
    missing = [number for number, step in enumerate(steps[:-1]) if not step.done]
    holes = [number for number in missing if not steps[number].stage.independent]
    later = [step for step in steps[holes[0] : -1] if step.done] if holes else []
    if later:
        hole, after = steps[holes[0]], later[0]
        raise TapirError(
            f"{hole.name} is missing, but the later {after.name} exists",
            where=str(hole.output),
            fix=f"Put the file back, or repeat everything from there: {redo_command(run_name, hole)}",
        )
    return [*(steps[number] for number in missing), *(steps[-1:] if missing or not steps[-1].done else [])]


def redo_command(run_name: str, step: Step) -> str:
    """The command that repeats everything from a step on."""
    place = "" if step.number is None else f" --round {step.number}"
    return f"tapir-local redo {run_name}{place} --from {step.stage.name}"


def start_run(recipe: Recipe, run: RunDir) -> None:
    """Write the recipe into a new run's folder; refuse a recipe that differs from that of a run in progress.

    The number of rounds, the budget and how endpoints are reached may change during a run (see recipe.lasting). A run
    without any output starts from scratch.
    """
    path = run.path / "recipe.yaml"
    if has_begun(run):
        refuse_changed_recipe(recipe, run)
        if kept_recipe(run) == recipe:
            return
    else:
        record = {
            "tapir_local": __version__,
            "revision": git_revision(),
            "python": platform.python_version(),
            "packages": package_versions(),
        }
        write_json(run.path / "run.json", {**record, "started": utc_now(), "status": "started", "stages": {}})
    write_text(path, to_yaml(recipe))


def has_begun(run: RunDir) -> bool:
    """Whether a run has a recipe and at least one output made with it."""
    return run.exists and list_steps(run, 0)[0].done


def refuse_changed_recipe(recipe: Recipe, run: RunDir) -> None:
    """TapirError if a run began with other settings that must not change, or with other seeds."""
    if not has_begun(run):
        return
    old, path = kept_recipe(run), run.path / "recipe.yaml"
    written = read_yaml(read_recipe_text(path), Recipe, str(path))
    if changed := diff_recipes(old, accept_moved_seeds(old, recipe, run), written):
        raise TapirError(
            f"run {run.name!r} was started with another recipe: {'; '.join(changed)}",
            where=str(path),
            fix=f"Go on with its own recipe: tapir-local resume {run.name}. Or start a new run with --name: calls in "
            "the store are not paid again.",
        )
    refuse_moved_pairs(old, recipe, run)


def kept_recipe(run: RunDir) -> Recipe:
    """The recipe that a run started with."""
    path = run.path / "recipe.yaml"
    return parse_recipe(read_recipe_text(path), str(path), kept=True)


def distill(recipe: Recipe, run: RunDir, backends: Backends, watch: Watch) -> int:
    """Run every pending step in order and return their number; after an interruption the same call resumes."""
    with lock_run(run):
        start_run(recipe, run)
        with record_interruption(run, "before the first step"):
            backends.begin()
        steps = steps_to_run(recipe, run)
        for step in steps:
            if step.number and step.number == recipe.pairs_round and has_too_few_pairs(step.output.parent):
                continue
            run_step(step, Work(recipe, run, backends, step.number or 0, step.name, watch.progress), watch)
        if steps:
            update_run_record(run, status="done")
    return len(steps)


def steps_to_run(recipe: Recipe, run: RunDir) -> list[Step]:
    """The pending steps; a model/ of other rounds, or with another card, is deleted."""
    steps = recipe_steps(run, recipe)
    left = pending_steps(steps, run.name)
    refuse_changed_outputs(run, steps[:-1])
    if not left and not is_model_stale(run, recipe):
        return []
    remove_path(steps[-1].output)
    return left or steps[-1:]


def refuse_changed_outputs(run: RunDir, steps: Sequence[Step]) -> None:
    """TapirError if an output is not what its stage wrote: later stages would work with the rest of it."""
    for step, change in changed_outputs(run, steps):
        raise TapirError(
            f"the output of {step.name} was changed: {change}",
            where=str(step.output),
            fix=f"Put the file back, or repeat everything from there: {redo_command(run.name, step)}",
        )


def changed_outputs(run: RunDir, steps: Sequence[Step]) -> Iterator[tuple[Step, str]]:
    """The finished steps whose output is not what was written, each with the difference."""
    taken = run.record().get("stages", {})
    for step in steps:
        if step.done and (change := describe_change(step.output, taken.get(step.name, {}).get("output", {}))):
            yield step, change


def run_step(step: Step, work: Work, watch: Watch) -> None:
    """Run one step, with its time and calls recorded in run.json."""
    began = time.monotonic()
    if step.stage.resumes != step.output.name:
        remove_path(step.output.with_name(step.output.name + ".partial"))
    step.output.parent.mkdir(parents=True, exist_ok=True)
    watch.begins(step)
    with record_interruption(work.run, f"in {step.name}", began), explain_file_errors(work.run, step):
        update_run_record(work.run, step=step.name)
        note = step.stage.run(work, step.output)
        written = describe_output(step.output)
    taken = {
        "seconds": round(time.monotonic() - began, 1),
        "note": note,
        "finished": utc_now(),
        **work.tally,
        "output": written,
    }
    taken |= {"replay": True} if work.backends.replay else {}
    update_run_record(work.run, step=step.name, taken=taken)
    watch.ends(step, taken)


def missing_file_error(error: FileNotFoundError, run: RunDir, step: str) -> TapirError:
    """The error of a step that needs a missing file; for a file of the run it names the step that makes it."""
    missing = Path(str(error.filename))
    makers = [step for step in begun_steps(run) if step.output == missing or step.output in missing.parents]
    if makers:
        fix = f"Put it back, or make it again: {redo_command(run.name, makers[0])}"
    else:
        fix = "Put it back, or name another in the recipe."
    place = missing.relative_to(run.path) if run.path in missing.parents else missing
    return TapirError(f"{step} needs a file that does not exist: {place}", where=f"run {run.name!r}", fix=fix)


@contextmanager
def record_interruption(run: RunDir, place: str, began: float | None = None) -> Iterator[None]:
    """Record in run.json where and why a run stopped, if the block raises."""
    try:
        yield
    except BaseException as error:
        after = "" if began is None else f" after {time.monotonic() - began:.0f} s"
        with suppress(TapirError, OSError):  # a full disk, for instance: the first error is the one to show
            update_run_record(run, status=f"stopped {place}{after}: {name_cause(error)}")
        raise


def name_cause(error: BaseException) -> str:
    """What stopped a run: an error in the user's words, a signal, or the name of an exception."""
    if isinstance(error, KeyboardInterrupt):
        return interrupt_reason()
    return str(error) if isinstance(error, TapirError) else type(error).__name__


@contextmanager
def explain_file_errors(run: RunDir, step: Step) -> Iterator[None]:
    """Raise TapirError in place of an OSError that names a file."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str | bytes):
            raise
        if isinstance(error, FileNotFoundError):
            raise missing_file_error(error, run, step.name) from error
        raise TapirError(
            f"cannot be opened: {error.strerror or error}",
            where=os.fsdecode(error.filename),
            fix="Correct the cause; the same command resumes the run.",
        ) from error


def update_run_record(
    run: RunDir, *, status: str = "running", step: str = "", taken: Mapping[str, Any] | None = None
) -> None:
    """Write the run's status, and what a finished step took, into run.json; a step that begins has no record yet."""
    record = run.record()
    stages = {name: found for name, found in record.get("stages", {}).items() if name != step or taken}
    stages |= {step: dict(taken)} if taken else {}
    write_json(run.path / "run.json", {**record, "status": status, "updated": utc_now(), "stages": stages})


def steps_to_redo(run: RunDir, number: int | None, stage: str) -> list[Step]:
    """The steps whose outputs `redo` deletes, in the order of the run; TapirError if there is no such stage."""
    return [step for step in steps_from(run, number, stage) if step.done]


def steps_from(run: RunDir, number: int | None, stage: str) -> list[Step]:
    """A stage's step and all that depend on it; TapirError if there is no such stage."""
    steps = begun_steps(run)
    later = steps[find_step(run, steps, number, stage) :]
    return [step for step in later if step.stage.independent] if later[0].stage.independent else later


def redo(run: RunDir, number: int | None, stage: str) -> list[str]:
    """Delete the outputs of a stage and of all later ones, from the last backwards; the names of their steps."""
    with lock_run(run):
        steps = steps_from(run, number, stage)
        done = [step for step in reversed(steps) if step.done]
        for step in done:
            remove_path(step.output)
        for step in steps:
            if step.stage.resumes:
                remove_partial(step.output.with_name(step.stage.resumes))
        names = {step.name for step in steps}
        unlock_steps(run, names)
        remove_unusable(run, names)
        if done:
            update_run_record(run, status=f"stopped before {steps[0].name}: redo deleted it and all later outputs")
        return [step.name for step in done]


def find_step(run: RunDir, steps: Sequence[Step], number: int | None, stage: str) -> int:
    """The position of a stage's step in a round, or in the preparation; TapirError if there is none."""
    names = [step.stage.name for step in steps if step.number == number]
    if not names:
        raise TapirError(
            f"run {run.name!r} has no round {number}",
            where=str(run.path),
            fix=f"Its rounds are 0 to {last_round(run)}.",
        )
    if stage not in names:
        raise TapirError(
            f"there is no stage {stage!r} {'in the preparation' if number is None else f'in round {number}'}",
            where=str(run.path),
            fix=f"Its stages are: {', '.join(names)}."
            + (" For a stage of a round add --round N." if number is None else ""),
        )
    return next(at for at, step in enumerate(steps) if step.number == number and step.stage.name == stage)


def utc_now() -> str:
    """The time in UTC, in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that affect a run's results."""
    return {name: found for name in RECORDED_PACKAGES if (found := installed_version(name))}


def installed_version(name: str) -> str:
    """A package's version; "" if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def git_revision() -> str:
    """The checkout's git revision; "" if there is none."""
    if not (CHECKOUT / ".git").exists():
        return ""
    try:
        asked = subprocess.run(
            ["git", "-C", str(CHECKOUT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:
        return ""
    return asked.stdout.strip()
