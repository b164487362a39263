"""Export calls to a new store file, and import calls from another store."""

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
from tapir_local.records import T
from tapir_local.store import keys
from tapir_local.store.compression import decompress_text
from tapir_local.store.queries import CountProgress, no_progress, open_store
from tapir_local.store.recovery import copy_calls, copy_rows, iterate_by_id, iterate_readable, samples_of
from tapir_local.store.reply import MAX_TOKEN_COUNT, parse_reply
from tapir_local.store.rows import Attempt, Call, Use, record_max_tokens
from tapir_local.store.schema import applied_migrations, connect, create_or_migrate, transaction
from tapir_local.store.store import ROWS_PER_COMMIT, Store, explain_store_errors

SQLITE_MAGIC = b"SQLite format 3\0"
UNREADABLE, WRONG_KEY, NOT_WHOLE = "unreadable", "with a key that is not its request's", "without a whole answer"
NUMERIC_TYPES = (int, float)
COLUMN_TYPES: Mapping[str, Any] = {  # of columns that hold no text
    **dict.fromkeys(("key", "request", "answer"), bytes),
    **dict.fromkeys(("tokens_in", "tokens_out", "estimated", "round", "paid"), int),
    **dict.fromkeys(("seconds", "price", "created"), NUMERIC_TYPES),
}
ATTEMPT_IDENTITY = (
    "key",
    "run",
    "round",
    "stage",
    "row",
    "why",
    "created",
)  # attempts with equal values of these are the same


class Exported(NamedTuple):
    """The numbers of written and of unreadable calls, and the size of the file in bytes."""

    calls: int
    lost: int
    size: int


@dataclass
class Imported:
    """The numbers of new and of known calls, and of refused ones by reason."""

    new: int = 0
    known: int = 0
    refused: Counter[str] = field(default_factory=Counter)


# Export


def export_store(path: Path, out: Path, run: str | None = None, locked: Collection[bytes] = ()) -> Exported:
    """Write a run's calls, or all calls, to a new store `out` with their uses, attempts and samples.

    A run's calls are those that it used according to the store, and the `locked` keys, which its tapir.lock lists.
    TapirError if `out` exists, the run has no calls, or the disk is full; then there is no file `out`.
    """
    with explain_store_errors(out):
        if out.exists():
            raise TapirError("the file already exists", where=str(out), fix="Choose another name, or delete it.")
    with open_store(path) as old:
        old.row_factory = sqlite3.Row
        wanted = None if run is None else keys_used_by_run(old, path, run, locked)
        with explain_store_errors(out), files.atomic_write(out) as partial, remove_on_failure(partial):
            create_or_migrate(partial)
            with closing(connect(partial, write=True)) as new:
                with transaction(new):
                    copied = copy_calls(old, new, wanted)
                    copy_rows(new, "attempts", filter_by_run(iterate_by_id(old, "attempts"), run))
                    copy_rows(new, "uses", filter_by_run(iterate_readable(old, "uses"), run))
                    record_max_tokens(new)
                new.execute("PRAGMA journal_mode = DELETE")  # one file, readable where nothing can be written
    asked = copied.seen if wanted is None else len(wanted)
    return Exported(copied.calls, asked - copied.calls, out.stat().st_size)


def keys_used_by_run(store: sqlite3.Connection, path: Path, run: str, locked: Collection[bytes]) -> set[bytes]:
    """The keys that a run used; TapirError with the known runs if there are none."""
    wanted = {row[0] for row in store.execute("select distinct key from uses where run = ?", (run,))} | set(locked)
    if not wanted:
        known = ", ".join(row[0] for row in store.execute("select distinct run from uses order by run")) or "none"
        raise TapirError(f"there are no calls of a run {run!r}", where=str(path), fix=f"Runs with calls: {known}.")
    return wanted


def filter_by_run(rows: Iterator[sqlite3.Row], run: str | None) -> Iterator[sqlite3.Row]:
    """The rows of a run; all rows if `run` is None."""
    return (row for row in rows if run is None or row["run"] == run)


@contextmanager
def remove_on_failure(path: Path) -> Iterator[None]:
    """Delete an unfinished store file if an error occurs."""
    try:
        yield
    except BaseException:
        for ending in ("", "-journal", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
        raise


# Import


def is_sqlite_file(file: Path) -> bool:
    """Whether a file is an SQLite database; TapirError if it cannot be read."""
    try:
        with file.open("rb") as bytes_of:
            return bytes_of.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except OSError as error:
        raise TapirError(f"cannot be read: {error.strerror or error}", where=str(file)) from error


def import_store(store: Store, file: Path, progress: CountProgress = no_progress) -> Imported:
    """Add another store's calls, uses and attempts to `store`; what it has already is kept.

    Each call is checked: its key must be the hash of its request, and its answer must be complete. It is compressed
    again, because two stores may have different samples under one name. `progress` is called with (done, total).
    TapirError if `file` is not a store, or is the same one.
    """
    found, good, seen = Imported(), set[bytes](), 0
    with open_other_store(file) as old:
        if store.path.samefile(file):
            raise TapirError("a store cannot be imported into itself", where=str(file))
        total, samples = count_stored_calls(old), samples_of(old)
        rows = iterate_by_id(old, "calls")
        while batch := list(islice(rows, ROWS_PER_COMMIT)):
            good |= import_new_calls(store, batch, samples, found)
            seen += len(batch)
            progress(seen, total or seen)
        if total is None or seen < total:  # damaged pages; the number of lost calls may be unknown
            found.refused[UNREADABLE] += total - seen if total else 1
        import_uses(store, old, good)
        import_attempts(store, old)
    return found


@contextmanager
def open_other_store(file: Path) -> Iterator[sqlite3.Connection]:
    """Open another store without writing anything; TapirError if it is not a store, or of a newer version."""
    log = file.with_name(f"{file.name}-wal").exists()  # without a log, no process is writing to it
    uri = f"{file.absolute().as_uri()}?mode=ro{'' if log else '&immutable=1'}"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as conn:
            conn.row_factory = sqlite3.Row
            conn.execute("pragma trusted_schema = off")
            if not applied_migrations(conn, file):
                raise TapirError("an SQLite file, but not a store of calls", where=str(file))
            yield conn
    except (
        sqlite3.DatabaseError,
        IndexError,
        TypeError,
        OverflowError,
    ) as error:  # the last three: tables of another program
        raise TapirError(f"the store cannot be read: {error}", where=str(file)) from error


def count_stored_calls(conn: sqlite3.Connection) -> int | None:
    """The number of calls in a store; None if it cannot be counted because of damage."""
    try:
        return int(conn.execute("select count(*) from calls").fetchone()[0])
    except sqlite3.DatabaseError:
        return None


def import_new_calls(
    store: Store, rows: Sequence[sqlite3.Row], samples: Mapping[int, sqlite3.Row], found: Imported
) -> set[bytes]:
    """Store those calls of another store that this one lacks; returns the keys of all that it now has."""
    good = set[bytes]()
    for row in rows:
        call = parse_other_call(row, samples)
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


def parse_other_call(row: sqlite3.Row, samples: Mapping[int, sqlite3.Row]) -> Call | str:
    """A call of another store, or the reason why it is refused."""
    try:
        sample = samples[row["sample"]]
        request, answer = (
            decompress_text(row["request"], sample["request"]),
            decompress_text(row["answer"], sample["answer"]),
        )
        if keys.hash_request(request) != row["key"]:
            return WRONG_KEY
        keys.request_fields(request)
        reply = parse_reply(answer)
        texts = {"request": request, "answer": answer, "kind": str(sample["name"])}
        call = Call(**{**parse_record_fields(row, Call), **texts})
    except (zlib.error, KeyError, IndexError, TypeError, ValueError, TapirError):
        return UNREADABLE
    return call if reply.keeps else NOT_WHOLE


def import_uses(store: Store, old: sqlite3.Connection, good: set[bytes]) -> None:
    """Record the uses of imported calls; `paid` is kept."""
    uses = (use for use in parse_records(iterate_readable(old, "uses"), Use) if use.key in good)
    while batch := list(islice(uses, ROWS_PER_COMMIT)):
        store.used(batch).result()


def import_attempts(store: Store, old: sqlite3.Connection) -> None:
    """Store the attempts that this store does not have yet."""
    with explain_store_errors(store.path), closing(connect(store.path, write=False)) as here:
        known = set(here.execute(f"select {', '.join(ATTEMPT_IDENTITY)} from attempts"))
    for attempt in parse_records(iterate_by_id(old, "attempts"), Attempt):
        if tuple(getattr(attempt, name) for name in ATTEMPT_IDENTITY) not in known:
            store.note(attempt)
    store.flush()


def parse_records(rows: Iterator[sqlite3.Row], kind: type[T]) -> Iterator[T]:
    """Yield rows of another store as records; invalid ones are skipped."""
    for row in rows:
        with suppress(IndexError, TypeError, ValueError):
            yield kind(**parse_record_fields(row, kind))


def parse_record_fields(row: sqlite3.Row, kind: type[Any]) -> dict[str, Any]:
    """The fields of a record in a row of another store; ValueError if a value is impossible."""
    names = [name for name in kind.__slots__ if name in row.keys()]  # noqa: SIM118  (a Row iterates its values)
    return {name: check_value(name, row[name]) for name in names}


def check_value(name: str, value: Any) -> Any:
    """Check a value's type and bounds, because any program may have written the other store; ValueError if wrong."""
    wanted = COLUMN_TYPES.get(name, str)
    if name == "price" and value is None:
        return None
    if not isinstance(value, wanted) or (isinstance(value, int | float) and not 0 <= value < math.inf):
        raise ValueError(f"{name} is {value!r}")
    return min(value, MAX_TOKEN_COUNT) if isinstance(value, int) else value
