"""tapir.lock in a run's folder: which calls each step used, so that they can be exported and the run replayed."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tapir_local.rundir import RunDir, read_rows, write_rows

LOCK_FILE = "tapir.lock"


@dataclass(frozen=True)
class LockedCall:
    """That a step (`round-01/judge`) used a call for a row; `key` has 64 hexadecimal digits."""

    step: str
    row: str
    key: str


def read_lock(run: RunDir) -> list[LockedCall]:
    """Every call that a run used, in the order of its steps; [] before the first."""
    path = run.path / LOCK_FILE
    return read_rows(LockedCall, path) if path.exists() else []


def lock_calls(run: RunDir, step: str, calls: Sequence[LockedCall]) -> None:
    """Record all that a step used so far, in the place of what it used when it was last begun."""
    write_rows(run.path / LOCK_FILE, [*(line for line in read_lock(run) if line.step != step), *calls])


def unlock_steps(run: RunDir, steps: Collection[str]) -> None:
    """Forget what some steps used."""
    if (run.path / LOCK_FILE).exists():
        write_rows(run.path / LOCK_FILE, [line for line in read_lock(run) if line.step not in steps])


def unique_keys(lines: Iterable[LockedCall]) -> list[str]:
    """The calls, each once, in the order of their first use."""
    return list(dict.fromkeys(line.key for line in lines))
