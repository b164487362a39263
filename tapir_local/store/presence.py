"""Notice that a store's file was deleted or moved while it is open, and save what the open file still holds.

SQLite goes on writing into a file that has no name any more: its commits succeed, and all is lost when it is closed.
"""

import shlex
import sqlite3
import time
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.store.schema import connect

FILE_ENDINGS = ("", "-wal")  # the file and its log; the index -shm holds nothing that the log does not


class OpenFile:
    """The file and the log that a connection has opened."""

    def __init__(self, path: Path, conn: sqlite3.Connection) -> None:
        self.path, self.conn = path, conn
        self.taken = False  # whether they were once found to be missing or replaced
        self._found = self._identities()

    def check(self) -> TapirError | None:
        """The error that the file was taken away, if it was; it stays so."""
        now = self._identities()
        self.taken = self.taken or any(old not in (None, new) for old, new in zip(self._found, now, strict=True))
        self._found = [old or new for old, new in zip(self._found, now, strict=True)]  # a log may be made later
        if not self.taken:
            return None
        return TapirError(
            "the store was deleted, moved or replaced while this process was using it",
            where=str(self.path),
            fix="Nothing more is asked. The calls are saved when the program ends, and it then says where.",
        )

    def save(self) -> Path:
        """Copy everything into a new file: at the store's path if nothing is there, otherwise next to it."""
        saved = self.path
        if saved.exists():
            stamp = f"{self.path.name}.saved-{time.strftime('%Y%m%d-%H%M%S')}"
            names = (self.path.with_name(stamp + (f"-{n}" if n else "")) for n in range(1000))
            saved = next(path for path in names if not path.exists())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for ending in ("-wal", "-shm"):  # left behind by a deleted file
            saved.with_name(saved.name + ending).unlink(missing_ok=True)
        new = connect(saved, write=True)
        try:
            self.conn.backup(new)
        finally:
            new.close()
        self._remove_log()
        return saved

    def _remove_log(self) -> None:
        """Delete the log if another file has the place of ours: SQLite would write its pages into that file."""
        ours, now = self._found, self._identities()
        if now[0] not in (None, ours[0]) and now[1] is not None and now[1] == ours[1]:
            for ending in ("-wal", "-shm"):
                self.path.with_name(self.path.name + ending).unlink(missing_ok=True)

    def _identities(self) -> list[tuple[int, int] | None]:
        """(device, inode) of the file and of the log; None for one that does not exist."""
        return [identity(self.path.with_name(self.path.name + ending)) for ending in FILE_ENDINGS]


def identity(path: Path) -> tuple[int, int] | None:
    """(device, inode) of a file; None if it does not exist or cannot be seen."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def has_orphaned_log(path: Path) -> bool:
    """Whether a store's file is missing while its log still holds calls: someone has moved the file alone."""
    log = path.with_name(f"{path.name}-wal")
    return not path.exists() and log.exists() and log.stat().st_size > 0


def put_log_aside(path: Path) -> str:
    """Rename the log of a missing file, which SQLite would delete with a new one; returns a sentence for the user."""
    stamp = f"{path.name}.left-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (path.with_name(stamp + (f"-{n}" if n else "")) for n in range(1000))
    aside = next(name for name in names if not name.with_name(f"{name.name}-wal").exists())
    path.with_name(f"{path.name}-wal").rename(aside.with_name(f"{aside.name}-wal"))
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
    return (
        f"{path}: the store's file is missing, and its log {path.name}-wal holds its newest calls. The log was renamed "
        f"to {aside.name}-wal. If you have moved the file, move it to {aside.name}, and "
        f"`tapir-local calls import {shlex.quote(str(aside))}` adds all its calls."
    )


def describe_saved(path: Path, saved: Path) -> str:
    """Where the calls of a store are that was taken away, and how to go on."""
    if saved == path:
        return "It was written again with all its calls: run the same command again."
    return f"All its calls are in {saved}: `tapir-local calls import` adds them to a store."
