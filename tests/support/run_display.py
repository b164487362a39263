"""A clock that tests move, and a finished run of fakes whose stages took seconds that tests choose."""

import io
from collections.abc import Mapping
from pathlib import Path

from fakes import QUIET, World, fake_backends, make_recipe
from rich.console import Console

from tapir_local.files import write_json
from tapir_local.pipeline.loop import Step, distill, redo
from tapir_local.recipe.schema import Recipe
from tapir_local.run_dir import RunDir
from tapir_local.terminal.run_state import RunState

NOON = 1_800_000_000.0  # a moment in January 2027


class Clock:
    """The time in seconds since 1970, which stands still until it is moved."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


def finished_run(folder: Path, until: tuple[int, str] | None = None) -> tuple[Recipe, RunDir]:
    """A run of three evaluated rounds, or one that stands before a stage of a round."""
    recipe, run = make_recipe(folder), RunDir(folder / "cache", "fake")
    distill(recipe, run, fake_backends(World()), QUIET)
    if until:
        redo(run, *until)
    return recipe, run


def set_taken(run: RunDir, changes: Mapping[str, Mapping[str, object]]) -> None:
    """Change what run.json says of steps."""
    record = run.record()
    for name, fields in changes.items():
        record["stages"].setdefault(name, {}).update(fields)
    write_json(run.path / "run.json", record)


def step_of(state: RunState, name: str) -> Step:
    """The step of a name."""
    return next(step for step in state.steps if step.name == name)


class Recorded(io.StringIO):
    """Text in memory that may look like a terminal."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal


def record_console(width: int = 300, height: int = 40, terminal: bool = False, **options: object) -> Console:
    """A console of this size that writes into memory (`console.file.getvalue()`)."""
    settings = {"_environ": {}, "color_system": "standard" if terminal else None, **options}
    file = Recorded()
    file.terminal = terminal
    return Console(file=file, width=width, height=height, force_terminal=terminal, **settings)  # type: ignore[arg-type]


def printed(console: Console) -> str:
    """What a console of `record_console` has printed."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
