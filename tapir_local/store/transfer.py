"""A store's calls written to another store file, and another store's calls taken into this one."""

import math
import sqlite3
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tapir_local import files
from tapir_local.errors import TapirError
from tapir_local.records import T, noop
from tapir_local.store import keys, schema
from tapir_local.store.compression import unpack
from tapir_local.store.queries import CountProgress, opened
from tapir_local.store.reply import read_reply
from tapir_local.store.reply_limits import note_limits
from tapir_local.store.rows import Attempt, Call, Use
from tapir_local.store.schema import applied, connect, copy_rows, numbered, proves_itself, samples_of, transaction
from tapir_local.store.store import BATCH, Store, explained
from tapir_local.store.usage import MOST

HEAD = b"SQLite format 3\0"
UNREADABLE, WRONG_KEY, NOT_WHOLE = "unreadable", "with a key that is not its request's", "without a whole answer"
NUMBER = (int, float)
KINDS: Mapping[str, Any] = {  # of columns that hold no text
    **dict.fromkeys(("key", "request", "answer"), bytes),
    **dict.fromkeys(("tokens_in", "tokens_out", "estimated", "round", "paid"), int),
    **dict.fromkeys(("seconds", "price", "created"), NUMBER),
}
ATTEMPT = ("key", "run", "round", "stage", "row", "why", "created")  # what makes two attempts the same one


class Exported(NamedTuple):
    """Calls written, wanted calls that could not be read, and the file's bytes."""

    calls: int
    lost: int
    size: int


@dataclass
class Imported:
    """How many calls are new, how many were there already, and how many were refused, by reason."""

    new: int = 0
    known: int = 0
    refused: Counter[str] = field(default_factory=Counter)


# Export


def export(path: Path, out: Path, run: str | None = None, locked: Collection[bytes] = ()) -> Exported:
    """Write a run's calls, or all, to a new store `out` with their uses, attempts and samples, packed as they are.

    A run's calls are those that the store knows it used and those `locked`, the keys in its tapir.lock.
    TapirError where `out` exists, the run has no calls, or the disk is full; `out` is whole or absent.
    """
    with explained(out):
        if out.exists():
            raise TapirError("there is such a file already", where=str(out), fix="Name another, or delete it.")
    with opened(path) as old:
        old.row_factory = sqlite3.Row
        wanted = None if run is None else keys_of(old, path, run, locked)
        with explained(out), files.atomic_write(out) as partial, removed_on_failure(partial):
            schema.bring_up_to_date(partial)
            with closing(connect(partial, write=True)) as new:
                with transaction(new):
                    count, seen = copy_calls(old, new, wanted)
                    copy_rows(new, "attempts", of_run(numbered(old, "attempts"), run))
                    copy_rows(new, "uses", of_run(schema.whole(old, "uses"), run))
                    note_limits(new)
                new.execute("PRAGMA journal_mode = DELETE")  # one file, readable where nothing can be written
    return Exported(count, (seen if wanted is None else len(wanted)) - count, out.stat().st_size)


def keys_of(store: sqlite3.Connection, path: Path, run: str, locked: Collection[bytes]) -> set[bytes]:
    """The keys that a run used; TapirError naming the runs there are, if it used none."""
    wanted = {row[0] for row in store.execute("select distinct key from uses where run = ?", (run,))} | set(locked)
    if not wanted:
        known = ", ".join(row[0] for row in store.execute("select distinct run from uses order by run")) or "none"
        raise TapirError(f"there are no calls of a run {run!r}", where=str(path), fix=f"Runs with calls: {known}.")
    return wanted


def copy_calls(old: sqlite3.Connection, new: sqlite3.Connection, wanted: set[bytes] | None) -> tuple[int, int]:
    """Copy the wanted calls that prove themselves, and the samples that they need: (copied, seen)."""
    samples, needed, copied, seen = samples_of(old), set[int](), 0, 0
    for row in numbered(old, "calls"):
        if wanted is None or row["key"] in wanted:
            seen += 1
            if row["sample"] in samples and proves_itself(row, samples[row["sample"]]):
                copied += copy_rows(new, "calls", iter([row]))
                needed.add(row["sample"])
    for table in ("samples", "sample_copies"):
        copy_rows(new, table, (samples[number] for number in sorted(needed)))
    return copied, seen


def of_run(rows: Iterator[sqlite3.Row], run: str | None) -> Iterator[sqlite3.Row]:
    """The rows of a run; all without one."""
    return (row for row in rows if run is None or row["run"] == run)


@contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    """Remove a store that was not finished."""
    try:
        yield
    except BaseException:
        for ending in ("", "-journal", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
        raise


# Import


def is_database(file: Path) -> bool:
    """Whether a file is one of SQLite's; TapirError where it cannot be read."""
    try:
        with file.open("rb") as bytes_of:
            return bytes_of.read(len(HEAD)) == HEAD
    except OSError as error:
        raise TapirError(f"cannot be read: {error.strerror or error}", where=str(file)) from error


def import_store(store: Store, file: Path, progress: CountProgress = noop) -> Imported:
    """Take another store's calls, with their uses and attempts; what is in `store` already stays.

    Every call must prove itself: its key is the hash of its request, and its answer is whole. It is packed anew, since
    two stores may have different samples of one name. `progress` is called with (done, all). TapirError where `file`
    is no store, or this one.
    """
    found, good, seen = Imported(), set[bytes](), 0
    with another(file) as old:
        if store.path.samefile(file):
            raise TapirError("a store cannot be imported into itself", where=str(file))
        total, samples = count_of(old), samples_of(old)
        rows = numbered(old, "calls")
        while batch := list(islice(rows, BATCH)):
            good |= take(store, batch, samples, found)
            seen += len(batch)
            progress(seen, total or seen)
        if total is None or seen < total:  # damaged stretches; how many calls they held may be unknown too
            found.refused[UNREADABLE] += total - seen if total else 1
        take_uses(store, old, good)
        take_attempts(store, old)
    return found


@contextmanager
def another(file: Path) -> Iterator[sqlite3.Connection]:
    """A store to be read, nothing written beside it; TapirError where it is none, or of a newer version."""
    log = file.with_name(f"{file.name}-wal").exists()  # without one, nobody is writing to it
    uri = f"{file.absolute().as_uri()}?mode=ro{'' if log else '&immutable=1'}"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as conn:
            conn.row_factory = sqlite3.Row
            conn.execute("pragma trusted_schema = off")
            if not applied(conn, file):
                raise TapirError("an SQLite file, but not a store of calls", where=str(file))
            yield conn
    except (sqlite3.DatabaseError, IndexError, TypeError, OverflowError) as error:  # the last three: not our tables
        raise TapirError(f"the store cannot be read: {error}", where=str(file)) from error


def count_of(conn: sqlite3.Connection) -> int | None:
    """How many calls a store has; None where it is too damaged to say."""
    try:
        return int(conn.execute("select count(*) from calls").fetchone()[0])
    except sqlite3.DatabaseError:
        return None


def take(store: Store, rows: Sequence[sqlite3.Row], samples: Mapping[int, sqlite3.Row], found: Imported) -> set[bytes]:
    """Store those of another store's calls that this one lacks; the keys of those that are here now."""
    good = set[bytes]()
    for row in rows:
        call = checked(row, samples)
        if isinstance(call, str):
            found.refused[call] += 1
            continue
        good.add(row["key"])
        if store.get(row["key"]) is None:
            store.put(call)
            found.new += 1
        else:
            found.known += 1
    store.flush()
    return good


def checked(row: sqlite3.Row, samples: Mapping[int, sqlite3.Row]) -> Call | str:
    """A call of another store, or why it is refused."""
    try:
        sample = samples[row["sample"]]
        request, answer = unpack(row["request"], sample["request"]), unpack(row["answer"], sample["answer"])
        if keys.key_of(request) != row["key"]:
            return WRONG_KEY
        keys.fields(request)
        reply = read_reply(answer)
        texts = {"request": request, "answer": answer, "kind": str(sample["name"])}
        call = Call(**{**fields(row, Call), **texts})
    except (zlib.error, KeyError, IndexError, TypeError, ValueError, TapirError):
        return UNREADABLE
    return call if reply.keeps else NOT_WHOLE


def take_uses(store: Store, old: sqlite3.Connection, good: set[bytes]) -> None:
    """Record who used the calls that are here now; `paid` as it was."""
    uses = (use for use in records(schema.whole(old, "uses"), Use) if use.key in good)
    while batch := list(islice(uses, BATCH)):
        store.used(batch).result()


def take_attempts(store: Store, old: sqlite3.Connection) -> None:
    """Keep the other store's attempts that are not here yet."""
    with explained(store.path), closing(connect(store.path, write=False)) as here:
        known = set(here.execute(f"select {', '.join(ATTEMPT)} from attempts"))
    for attempt in records(numbered(old, "attempts"), Attempt):
        if tuple(getattr(attempt, name) for name in ATTEMPT) not in known:
            store.note(attempt)
    store.flush()


def records(rows: Iterator[sqlite3.Row], kind: type[T]) -> Iterator[T]:
    """Rows of another store as records; those that are none are left out."""
    for row in rows:
        with suppress(IndexError, TypeError, ValueError):
            yield kind(**fields(row, kind))


def fields(row: sqlite3.Row, kind: type[Any]) -> dict[str, Any]:
    """The fields of a record that a row of another store has; TypeError or ValueError where one cannot be true."""
    names = [name for name in kind.__slots__ if name in row.keys()]  # noqa: SIM118  (a Row iterates its values)
    return {name: sound(name, row[name]) for name in names}


def sound(name: str, value: Any) -> Any:
    """A value of the type that its column has here, and within bounds: the other store may be of anyone's making."""
    wanted = KINDS.get(name, str)
    if name == "price" and value is None:
        return None
    if not isinstance(value, wanted) or (isinstance(value, int | float) and not 0 <= value < math.inf):
        raise ValueError(f"{name} is {value!r}")
    return min(value, MOST) if isinstance(value, int) else value
