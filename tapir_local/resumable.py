"""Write a file row by row over hours, so that an interrupted write resumes from `<path>.partial`."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar

from tapir_local.errors import TapirError
from tapir_local.files import remove_path, sync_to_disk, write_error, write_json
from tapir_local.printable import safe_json
from tapir_local.records import from_json, noop, to_json


class HasId(Protocol):
    """A record that has an id."""

    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=HasId)


class OrderedWriter(Generic[R]):
    """Write rows as JSON lines in a given order of ids; rows that finish early wait in memory.

    `written` is called with the rows that were just written.
    """

    def __init__(self, out: IO[str], ids: Sequence[str], written: Callable[[Sequence[R]], None] = noop) -> None:
        self.out, self.ids, self.next, self.written = out, ids, 0, written
        self.waiting: dict[str, R] = {}

    def add(self, row: R) -> None:
        """Add a row, and write every row that is next in order."""
        self.waiting[row.id] = row
        ready = list[R]()
        while self.next < len(self.ids) and self.ids[self.next] in self.waiting:
            ready.append(self.waiting.pop(self.ids[self.next]))
            append_row(self.out, ready[-1])
            self.next += 1
        self.out.flush()
        if ready:
            self.written(ready)


def append_row(out: IO[str], row: Any) -> None:
    """Append a row as one line of JSON, with characters that are unsafe on a terminal escaped."""
    out.write(safe_json(to_json(row)) + "\n")


@contextmanager
def resume_writing(path: Path, task: Mapping[str, Any], kind: type[R]) -> Iterator[tuple[IO[str], list[R]]]:
    """Yield a file to append lines to, and the rows that an interrupted attempt at the same task has written.

    The block writes the missing rows; when it succeeds, `<path>.partial` is renamed to `path`. If it is interrupted,
    the partial file stays, next to `<path>.partial.json`, which describes the task; a different task starts from the
    beginning. Raises TapirError if the file cannot be written.
    """
    partial, note = (path.with_name(path.name + end) for end in (".partial", ".partial.json"))
    task = json.loads(json.dumps(task, default=str))
    if not (partial.is_file() and read_task_note(note) == task):
        remove_partial(path)
        write_json(note, task)
    done = read_complete_rows(partial, kind)
    try:
        with partial.open("a", encoding="utf-8") as file:
            yield file, done
        sync_to_disk(partial)
        partial.rename(path)
        remove_path(note)
        sync_to_disk(path.parent)
    except OSError as error:
        if error.filename not in (None, str(partial)):  # an error of another file; writing to an open file names none
            raise
        raise write_error(path, error) from error


def remove_partial(path: Path) -> None:
    """Delete the partial file and its task, if they exist."""
    for end in (".partial", ".partial.json"):
        remove_path(path.with_name(path.name + end))


def read_task_note(path: Path) -> Any:
    """The task in `<path>.partial.json`; None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_complete_rows(partial: Path, kind: type[R]) -> list[R]:
    """The rows of a partial file up to the first incomplete or damaged line; the file is truncated there."""
    if not partial.exists():
        return []
    rows, size = list[R](), 0
    with partial.open("rb") as file:
        for line in file:
            row = parse_complete_row(kind, line)
            if row is None:
                break
            rows.append(row)
            size += len(line)
    os.truncate(partial, size)
    return rows


def parse_complete_row(kind: type[R], line: bytes) -> R | None:
    """The row of a line; None if the line is incomplete or damaged."""
    try:
        return from_json(kind, line) if line.endswith(b"\n") else None
    except TapirError:
        return None
