"""A run's folder: where each of its files is, and the lock that lets one process work on it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tapir_local.errors import TapirError
from tapir_local.files import private_folder

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RunDir:
    """The folder cache/runs/<name>."""

    cache: Path
    name: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise TapirError(
                f"{self.name!r} is not a run's name",
                fix="A name has letters, digits, dots, dashes and underscores; --cache says where runs are.",
            )

    @property
    def path(self) -> Path:
        return self.cache / "runs" / self.name

    def round(self, number: int) -> Path:
        """The folder of a round; 0 is the baseline."""
        return self.path / f"round-{number:02d}"

    @property
    def exists(self) -> bool:
        return (self.path / "recipe.yaml").exists()

    def record(self) -> dict[str, Any]:
        """run.json: versions, times and what each finished stage took; {} before the first."""
        path = self.path / "run.json"
        return dict(orjson.loads(path.read_bytes())) if path.exists() else {}


def named_run(cache: Path, name: str) -> RunDir | None:
    """The folder of a run that the store names; None for what has none, such as `import:FILE`."""
    return RunDir(cache, name) if NAME.fullmatch(name) else None


def runs_of(cache: Path) -> list[RunDir]:
    """Every run in a cache, by name."""
    return [RunDir(cache, path.parent.name) for path in sorted((cache / "runs").glob("*/recipe.yaml"))]


def existing(cache: Path, name: str) -> RunDir:
    """A run that is there; TapirError naming those that are, otherwise."""
    run = RunDir(cache, name)
    if not run.exists:
        known = ", ".join(other.name for other in runs_of(cache)) or "none"
        raise TapirError(
            f"there is no run {name!r}",
            where=str(cache),
            fix=f"Runs in this cache: {known}. `tapir-local distill` makes one; --cache names another folder.",
        )
    return run


@contextmanager
def held(run: RunDir) -> Iterator[None]:
    """Hold the run for this process; TapirError naming the holder when another has it.

    The operating system drops the lock with its process, so a killed one leaves nothing to clean up.
    """
    from filelock import FileLock, Timeout

    private_folder(run.path)
    lock, owner = FileLock(run.path / ".lock"), run.path / ".lock-holder"
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        holder = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise TapirError(
            f"run {run.name!r} is being worked on by {holder}", fix="Wait for it, or use another --name."
        ) from error
    try:
        owner.write_text(f"process {os.getpid()}", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
