"""tapir.lock in a run's folder: which calls each step used, so that they can be exported and the run replayed."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tapir_local.files import read_rows, write_rows
from tapir_local.run_dir import RunDir

NAME = "tapir.lock"


@dataclass(frozen=True)
class Locked:
    """That a step (`round-01/judge`) used a call for a row; `key` has 64 hexadecimal digits."""

    step: str
    row: str
    key: str


def locked(run: RunDir) -> list[Locked]:
    """Every call that a run used, in the order of its steps; [] before the first."""
    path = run.path / NAME
    return read_rows(Locked, path) if path.exists() else []


def lock(run: RunDir, step: str, calls: Sequence[Locked]) -> None:
    """Record all that a step used so far, in the place of what it used when it was last begun."""
    write_rows(run.path / NAME, [*(line for line in locked(run) if line.step != step), *calls])


def unlock(run: RunDir, steps: Collection[str]) -> None:
    """Forget what some steps used."""
    if (run.path / NAME).exists():
        write_rows(run.path / NAME, [line for line in locked(run) if line.step not in steps])


def keys_of(lines: Iterable[Locked]) -> list[str]:
    """The calls, each once, in the order of their first use."""
    return list(dict.fromkeys(line.key for line in lines))
