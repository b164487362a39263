"""The loop: which stages are pending, running them in order, and undoing them from the last backwards."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tapir_local import __version__
from tapir_local.data.source import same_seeds
from tapir_local.errors import TapirError
from tapir_local.files import remove_path, write_json, write_text
from tapir_local.pipeline.context import Stage, Tools, Work
from tapir_local.pipeline.lockfile import unlock
from tapir_local.pipeline.rounds import BASELINE, PREPARE, ROUND
from tapir_local.pipeline.ship import SHIP, stale
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import diff_recipes, parse_recipe, to_yaml
from tapir_local.recipe.yaml import read_yaml
from tapir_local.records import Progress
from tapir_local.resources import CHECKOUT
from tapir_local.resumable import remove_partial
from tapir_local.run_dir import RunDir, lock_run
from tapir_local.unusable import remove_unusable

PACKAGES = ("torch", "transformers", "trl", "peft", "unsloth", "llama-cpp-python", "gguf", "openai")

WORDS: Mapping[type[BaseException], str] = {KeyboardInterrupt: "Ctrl-C"}


@dataclass(frozen=True)
class Step:
    """A stage at its place in a run. `number` is the round, None for what is done once, at the beginning or the end."""

    number: int | None
    stage: Stage
    output: Path

    @property
    def name(self) -> str:
        """`prepare/label`, `round-01/judge`, `end/ship`."""
        once = "end" if self.stage is SHIP else "prepare"
        return f"{once if self.number is None else f'round-{self.number:02d}'}/{self.stage.name}"

    @property
    def done(self) -> bool:
        """An output exists only whole."""
        return self.output.exists()


@dataclass(frozen=True)
class Watch:
    """Where the loop tells of itself: a step begins, goes on, has ended with a closing line."""

    begins: Callable[[Step], None]
    progress: Progress
    ends: Callable[[Step, Mapping[str, Any]], None]


def sequence(run: RunDir, rounds: int) -> list[Step]:
    """Every step of a run of so many rounds after the baseline, in order; the last makes model/."""
    steps = [Step(None, stage, run.path / stage.output) for stage in PREPARE]
    for number in range(rounds + 1):
        steps += [Step(number, stage, run.round(number) / stage.output) for stage in (ROUND if number else BASELINE)]
    return [*steps, Step(None, SHIP, run.path / SHIP.output)]


def rounds_begun(run: RunDir) -> int:
    """The highest round that has a folder; 0 if there is none."""
    return max(
        (int(path.name.removeprefix("round-")) for path in run.path.glob("round-[0-9]*") if path.is_dir()), default=0
    )


def pending(steps: Sequence[Step], run_name: str) -> list[Step]:
    """The steps still to do; TapirError where a later output is there and an earlier one is not.

    The last, which makes model/, is to be done again wherever another is: what is there is of fewer rounds.
    """
    missing = [number for number, step in enumerate(steps[:-1]) if not step.done]
    later = [step for step in steps[missing[0] : -1] if step.done] if missing else []
    if later:
        hole, after = steps[missing[0]], later[0]
        raise TapirError(
            f"{hole.name} is missing, but {after.name} that follows it is there",
            where=str(hole.output),
            fix=f"Put the file back, or do everything from there again: {redo_command(run_name, hole)}",
        )
    return [*(steps[number] for number in missing), *(steps[-1:] if missing or not steps[-1].done else [])]


def redo_command(run_name: str, step: Step) -> str:
    """What a person types to do everything from a step again."""
    place = "" if step.number is None else f" --round {step.number}"
    return f"tapir-local redo {run_name}{place} --from {step.stage.name}"


def start(recipe: Recipe, run: RunDir) -> None:
    """Write the recipe into a new run's folder; refuse one that differs from what an old run started with.

    The number of rounds, the budget and how endpoints are reached may change in mid-run (see recipe.lasting). A run
    that has no output yet begins anew.
    """
    path = run.path / "recipe.yaml"
    if has_begun(run):
        refuse_changed(recipe, run)
        if kept_recipe(run) == recipe:
            return
    else:
        record = {
            "tapir_local": __version__,
            "revision": revision(),
            "python": platform.python_version(),
            "packages": packages(),
        }
        write_json(run.path / "run.json", {**record, "started": now(), "status": "started", "stages": {}})
    write_text(path, to_yaml(recipe))


def has_begun(run: RunDir) -> bool:
    """Whether a run has a recipe and an output to keep it for."""
    return run.exists and sequence(run, 0)[0].done


def refuse_changed(recipe: Recipe, run: RunDir) -> None:
    """TapirError where a run was started with a recipe that differs in what must last, or with other seeds."""
    if not has_begun(run):
        return
    old, path = kept_recipe(run), run.path / "recipe.yaml"
    written = read_yaml(path.read_text(encoding="utf-8"), Recipe, str(path))
    if changed := diff_recipes(old, same_seeds(old, recipe, run), written):
        raise TapirError(
            f"run {run.name!r} was started with another recipe: {'; '.join(changed)}",
            where=str(path),
            fix="Name a new run with --name: the store keeps what was paid for, so unchanged calls cost nothing.",
        )


def kept_recipe(run: RunDir) -> Recipe:
    """The recipe that a run started with."""
    path = run.path / "recipe.yaml"
    return parse_recipe(path.read_text(encoding="utf-8"), str(path), kept=True)


def distill(recipe: Recipe, run: RunDir, tools: Tools, watch: Watch) -> int:
    """Do every pending step in order; how many there were. Cut anywhere, the same call goes on."""
    with lock_run(run):
        start(recipe, run)
        with counted(run, "before the first step"):
            tools.begin()
        steps = to_do(recipe, run)
        for step in steps:
            do(step, Work(recipe, run, tools, step.number or 0, step.name, watch.progress), watch)
        if steps:
            note(run, status="done")
    return len(steps)


def to_do(recipe: Recipe, run: RunDir) -> list[Step]:
    """The steps still to do; a model/ of other rounds, or with another card, is deleted."""
    steps = sequence(run, recipe.rounds)
    left = pending(steps, run.name)
    if not left and not stale(run, recipe):
        return []
    remove_path(steps[-1].output)
    return left or steps[-1:]


def do(step: Step, work: Work, watch: Watch) -> None:
    """One step, timed and counted; what it cost is recorded even when it fails."""
    began = time.monotonic()
    if step.stage.resumes != step.stage.output:
        remove_path(step.output.with_name(step.output.name + ".partial"))
    step.output.parent.mkdir(parents=True, exist_ok=True)
    watch.begins(step)
    with counted(work.run, f"in {step.name}", began), named_files(work.run, step):
        said = step.stage.run(work, step.output)
    taken = {"seconds": round(time.monotonic() - began, 1), "note": said, "finished": now(), **work.tally}
    taken |= {"replay": True} if work.tools.replay else {}
    note(work.run, step=step.name, taken=taken)
    watch.ends(step, taken)


def missing_file(error: FileNotFoundError, run: RunDir, step: str) -> TapirError:
    """What to say of a file that a step reads and that is not there; one of the run's own names who makes it."""
    missing = Path(str(error.filename))
    made = [
        made for made in sequence(run, rounds_begun(run)) if made.output == missing or made.output in missing.parents
    ]
    if made:
        fix = f"Put it back, or make it again: {redo_command(run.name, made[0])}"
    else:
        fix = "Put it back, or name another in the recipe."
    place = missing.relative_to(run.path) if run.path in missing.parents else missing
    return TapirError(f"{step} needs a file that is not there: {place}", where=f"run {run.name!r}", fix=fix)


@contextmanager
def counted(run: RunDir, place: str, began: float | None = None) -> Iterator[None]:
    """Record where and why a run did not go on."""
    try:
        yield
    except BaseException as error:
        why = str(error) if isinstance(error, TapirError) else WORDS.get(type(error), type(error).__name__)
        after = "" if began is None else f" after {time.monotonic() - began:.0f} s"
        note(run, status=f"stopped {place}{after}: {why}")
        raise


@contextmanager
def named_files(run: RunDir, step: Step) -> Iterator[None]:
    """TapirError for an OSError that names a file."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str | bytes):
            raise
        if isinstance(error, FileNotFoundError):
            raise missing_file(error, run, step.name) from error
        raise TapirError(
            f"cannot be opened: {error.strerror or error}",
            where=os.fsdecode(error.filename),
            fix="Correct what the error says of it; the same command goes on from here.",
        ) from error


def note(run: RunDir, *, status: str = "running", step: str = "", taken: Mapping[str, Any] | None = None) -> None:
    """Bring run.json up to date."""
    record = run.record()
    stages = record.get("stages", {}) | ({step: dict(taken)} if taken else {})
    write_json(run.path / "run.json", {**record, "status": status, "updated": now(), "stages": stages})


def redo(run: RunDir, number: int | None, stage: str) -> list[str]:
    """Delete the outputs of a stage and of all that follow, from the last backwards; their names."""
    with lock_run(run):
        steps = sequence(run, rounds_begun(run))
        names = [step.stage.name for step in steps if step.number == number]
        if not names:
            raise TapirError(
                f"run {run.name!r} has no round {number}",
                where=str(run.path),
                fix=f"Its rounds are 0 to {rounds_begun(run)}.",
            )
        if stage not in names:
            raise TapirError(
                f"there is no stage {stage!r} {'in the preparation' if number is None else f'in round {number}'}",
                where=str(run.path),
                fix=f"Its stages are: {', '.join(names)}."
                + (" For a stage of a round add --round N." if number is None else ""),
            )
        first = next(at for at, step in enumerate(steps) if step.number == number and step.stage.name == stage)
        gone = [step for step in reversed(steps[first:]) if step.done]
        for step in gone:
            remove_path(step.output)
        for step in steps[first:]:
            if step.stage.resumes:
                remove_partial(step.output.with_name(step.stage.resumes))
        names_gone = {step.name for step in steps[first:]}
        unlock(run, names_gone)
        remove_unusable(run, names_gone)
        return [step.name for step in gone]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def packages() -> dict[str, str]:
    """The versions of what decides a run's results."""
    return {name: found for name in PACKAGES if (found := installed(name))}


def installed(name: str) -> str:
    """A package's version, "" where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def revision() -> str:
    """The checkout's git revision, "" where there is none."""
    if not (CHECKOUT / ".git").exists():
        return ""
    try:
        asked = subprocess.run(
            ["git", "-C", str(CHECKOUT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:
        return ""
    return asked.stdout.strip()
