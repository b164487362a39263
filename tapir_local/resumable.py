"""Files that take hours to write: rows are appended to `<path>.partial` as they are done, and a cut one goes on."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar

from tapir_local.errors import TapirError
from tapir_local.files import remove_path, sync_to_disk, write_json
from tapir_local.printable import safe_json
from tapir_local.records import from_json, to_json


class HasId(Protocol):
    """A record with an id."""

    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=HasId)


class OrderedWriter(Generic[R]):
    """Writes rows as JSON lines in the order of their ids, holding back those whose turn has not come."""

    def __init__(self, out: IO[str], ids: Sequence[str]) -> None:
        self.out, self.ids, self.next = out, ids, 0
        self.waiting: dict[str, R] = {}

    def add(self, row: R) -> None:
        """Take one, and write all whose turn it is."""
        self.waiting[row.id] = row
        while self.next < len(self.ids) and self.ids[self.next] in self.waiting:
            append_row(self.out, self.waiting.pop(self.ids[self.next]))
            self.next += 1
        self.out.flush()


def append_row(out: IO[str], row: Any) -> None:
    """Append a row as a line of JSON that is safe to show on a terminal."""
    out.write(safe_json(to_json(row)) + "\n")


@contextmanager
def resume_writing(path: Path, task: Mapping[str, Any], kind: type[R]) -> Iterator[tuple[IO[str], list[R]]]:
    """A file to append lines to, and the rows of it that an earlier, cut attempt at the same task has written.

    The block writes the missing rows; when it ends well, `<path>.partial` becomes `path`. When it is cut, by an
    exception or with the process, the partial file stays, beside `<path>.partial.json` with its task; another task
    starts from nothing. TapirError where the disk does not take the rows.
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
        if error.filename not in (None, str(partial)):  # not of this file: writing to an open one names none
            raise
        fix = "Make room or mend the folder; the same command goes on from here."
        raise TapirError(f"cannot be written: {error.strerror or error}", where=str(path), fix=fix) from error


def remove_partial(path: Path) -> None:
    """Delete what a cut attempt at a file has left."""
    for end in (".partial", ".partial.json"):
        remove_path(path.with_name(path.name + end))


def read_task_note(path: Path) -> Any:
    """The task that a note names; None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_complete_rows(partial: Path, kind: type[R]) -> list[R]:
    """The rows of a cut file up to the first line that is torn or damaged, which is taken off it with all after it."""
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
    """A row, or None where the line does not hold one whole."""
    try:
        return from_json(kind, line) if line.endswith(b"\n") else None
    except TapirError:
        return None
