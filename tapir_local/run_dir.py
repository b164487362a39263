"""The folder of a run, and the lock that lets only one process work on it."""

import difflib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.files import check_path_text, private_file, private_folder, read_json_object, wrap_write_errors

LOCK_SECONDS = 0.5  # to wait for a lock: lock_holder of another process holds it for an instant
UNTRAINED_ROUND = -1  # the number of the untrained student among rounds
PROGRESS_FILE = ".progress.json"  # in a run's folder while a process works on it
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MAX_NAME_LENGTH = 200  # bytes; file systems allow 255, and files next to the folder need endings


@dataclass(frozen=True)
class RunDir:
    """The folder cache/runs/<name>."""

    cache: Path
    name: str

    def __post_init__(self) -> None:
        check_path_text(self.cache)
        if not RUN_NAME.fullmatch(self.name) or len(self.name) > MAX_NAME_LENGTH:
            raise TapirError(
                f"{self.name!r} is not a valid run name",
                fix=f"Use up to {MAX_NAME_LENGTH} letters, digits, dots, dashes and underscores. "
                "--cache sets the folder that holds the runs.",
            )

    @property
    def path(self) -> Path:
        return self.cache / "runs" / self.name

    def round(self, number: int) -> Path:
        """The folder of a round; round 0 is the baseline."""
        return self.path / ("untrained" if number == UNTRAINED_ROUND else f"round-{number:02d}")

    @property
    def exists(self) -> bool:
        return (self.path / "recipe.yaml").exists()

    def record(self) -> dict[str, Any]:
        """The contents of run.json: versions, times and what each finished stage did; {} before the first."""
        path = self.path / "run.json"
        fix = "Restore it, or delete it: it holds only versions, times and notes. The outputs of the stages are intact."
        return read_json_object(path, fix) if path.exists() else {}


def run_of_name(cache: Path, name: str) -> RunDir | None:
    """The folder of a run that the store names; None for names without a folder, such as `import:FILE`."""
    return RunDir(cache, name) if RUN_NAME.fullmatch(name) and len(name) <= MAX_NAME_LENGTH else None


def list_runs(cache: Path) -> list[RunDir]:
    """Every run in a cache, sorted by name."""
    return [RunDir(cache, path.parent.name) for path in sorted((cache / "runs").glob("*/recipe.yaml"))]


def find_run(cache: Path, name: str) -> RunDir:
    """The run of this name; if there is none, a TapirError that lists the existing runs."""
    run = RunDir(cache, name)
    if not run.exists:
        names = [other.name for other in list_runs(cache)]
        near = difflib.get_close_matches(name, names, 1)
        meant = f"Did you mean {near[0]}? " if near else ""
        raise TapirError(
            f"there is no run {name!r}",
            where=str(cache),
            fix=f"{meant}Runs in this cache: {', '.join(names) or 'none'}. `tapir-local distill` creates one; "
            "--cache selects another folder.",
        )
    return run


@contextmanager
def lock_run(run: RunDir) -> Iterator[None]:
    """Lock the run for this process; raise TapirError with the process id if another process holds the lock.

    The operating system releases the lock when its process ends, so a killed process leaves nothing to clean up.
    """
    from filelock import FileLock, Timeout

    private_folder(run.path)
    lock, owner = FileLock(run.path / ".lock"), run.path / ".lock-holder"
    try:
        lock.acquire(timeout=LOCK_SECONDS, poll_interval=LOCK_SECONDS / 10)
    except Timeout as error:
        holder = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise TapirError(
            f"run {run.name!r} is in use by {holder}", fix="Wait until it ends, or use another --name."
        ) from error
    try:
        with wrap_write_errors(owner):
            owner.write_text(f"process {os.getpid()}", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def write_progress(run: RunDir, found: Mapping[str, Any]) -> None:
    """Write how far the running step is, for other processes: a complete file at any moment; OSError if it cannot be.

    It is not synced to the disk: it means nothing after this process has ended.
    """
    path = run.path / PROGRESS_FILE
    partial = path.with_name(PROGRESS_FILE + ".partial")
    private_file(partial)
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(path)


def read_progress(run: RunDir) -> dict[str, Any] | None:
    """What the process that works on a run last wrote about its progress; None if none works on it or wrote any."""
    holder = lock_holder(run)
    try:
        found = json.loads((run.path / PROGRESS_FILE).read_bytes()) if holder else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and holder == f"process {found.get('process')}" else None


def remove_progress(run: RunDir) -> None:
    """Delete the progress file."""
    with suppress(OSError):
        (run.path / PROGRESS_FILE).unlink(missing_ok=True)


def lock_holder(run: RunDir) -> str:
    """`process 1234` while a process works on the run; "" if none does."""
    path, owner = run.path / ".lock", run.path / ".lock-holder"
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file is closed
    except FileNotFoundError:
        return ""
    except BlockingIOError:
        return owner.read_text(encoding="utf-8") if owner.exists() else "another process"
    return ""
