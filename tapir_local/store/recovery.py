"""Check a store file, move a damaged one away, and read the calls that it still holds."""

import sqlite3
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tapir_local.printable import format_count
from tapir_local.store import keys
from tapir_local.store.compression import decompress_text
from tapir_local.store.rows import record_max_tokens
from tapir_local.store.schema import connect, create_or_migrate, is_damage_error, transaction

# quick_check reads about 1 GB/s, so it checks only the beginning of a larger store. Each answer has its own checksum.
MAX_CHECK_SECONDS = 1.0


def find_damage(path: Path) -> str:
    """Describe the damage in a store file; "" if none was found within MAX_CHECK_SECONDS."""
    end = time.monotonic() + MAX_CHECK_SECONDS
    try:
        conn = connect(path, write=True)
    except sqlite3.DatabaseError as error:
        if is_damage_error(error):
            return str(error)
        raise
    try:
        conn.set_progress_handler(lambda: time.monotonic() > end, 10_000)
        found: str = conn.execute("PRAGMA quick_check(1)").fetchone()[0]
        return "" if found == "ok" else found
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT:
            return ""
        if is_damage_error(error):
            return str(error)
        raise
    finally:
        conn.close()


def move_damaged_store(path: Path) -> Path:
    """Rename a damaged store and its log to `<name>.damaged-<time>`."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{stamp}-{number}")
    for ending in ("", "-wal", "-shm"):
        part = path.with_name(path.name + ending)
        if part.exists():
            part.rename(aside.with_name(aside.name + ending))
    return aside


def rescue_store(path: Path, fault: str) -> str:
    """Move a damaged store away and copy what can be read into a new one; returns a sentence for the user."""
    aside = move_damaged_store(path)
    create_or_migrate(path)
    saved = lost = 0
    try:
        old = connect(aside, write=False)
    except sqlite3.DatabaseError:
        old = sqlite3.connect(":memory:")
    old.row_factory = sqlite3.Row
    new = connect(path, write=True)
    try:
        with transaction(new):
            copied = copy_calls(old, new)
            saved, lost = copied.calls, max(0, copied.last_id - copied.calls)
            copy_rows(new, "attempts", iterate_by_id(old, "attempts"))
            for table in ("uses", "batches", "batch_keys"):
                copy_rows(new, table, iterate_readable(old, table))
            record_max_tokens(new)
    finally:
        old.close()
        new.close()
        remove_empty_log(aside)
    return (
        f"{path}: the store was damaged ({fault}). It was renamed to {aside.name}; "
        f"{format_count(saved, 'call was', 'calls were')} saved, "
        f"{lost} could not be read."
    )


def remove_empty_log(path: Path) -> None:
    """Delete the empty log, and its index, that reading a file in WAL mode creates."""
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and not log.stat().st_size:
        log.unlink()
        path.with_name(f"{path.name}-shm").unlink(missing_ok=True)


class CopiedCalls(NamedTuple):
    """The number of copied calls, the number of wanted calls found, and the highest id of a call."""

    calls: int
    seen: int
    last_id: int


def copy_calls(old: sqlite3.Connection, new: sqlite3.Connection, wanted: set[bytes] | None = None) -> CopiedCalls:
    """Copy intact calls and the samples that they need; if `wanted` is given, only calls with these keys."""
    samples, needed, copied, seen, last = samples_of(old), set[int](), 0, 0, 0
    for row in iterate_by_id(old, "calls"):
        last = row["id"]
        if wanted is None or row["key"] in wanted:
            seen += 1
            if row["sample"] in samples and is_intact(row, samples[row["sample"]]):
                copied += copy_rows(new, "calls", iter([row]))
                needed.add(row["sample"])
    for table in ("samples", "sample_copies"):
        copy_rows(new, table, (samples[number] for number in sorted(needed)))
    return CopiedCalls(copied, seen, last)


def samples_of(conn: sqlite3.Connection) -> dict[int, sqlite3.Row]:
    """The samples that can be read from either of the two tables, by id."""
    samples: dict[int, sqlite3.Row] = {}
    for table in ("samples", "sample_copies"):
        for row in iterate_by_id(conn, table):
            samples.setdefault(row["id"], row)
    return samples


def is_intact(row: sqlite3.Row, sample: sqlite3.Row) -> bool:
    """Whether a call's key is the hash of its request and its answer has the right checksum."""
    try:
        decompress_text(row["answer"], sample["answer"])
        return bool(keys.hash_request(decompress_text(row["request"], sample["request"])) == row["key"])
    except (zlib.error, TypeError):
        return False


def iterate_by_id(conn: sqlite3.Connection, table: str, last: int = 0) -> Iterator[sqlite3.Row]:
    """Yield the rows with ids above `last` in order of id, skipping those that cannot be read."""
    step, failed = 1, 0
    while step < 2**40:
        try:
            for row in conn.execute(f"select * from {table} where id > ? order by id", [last]):
                last, step, failed = row["id"], 1, 0
                yield row
            return
        except sqlite3.DatabaseError:
            last, failed = last + step, failed + 1
            step = (
                1 if failed < 200 else step * 2
            )  # a page has about 10 calls; after 200 failures a branch of the tree is gone


def iterate_readable(conn: sqlite3.Connection, table: str) -> Iterator[sqlite3.Row]:
    """Yield the rows of a table up to the first that cannot be read."""
    try:
        yield from conn.execute(f"select * from {table}")
    except sqlite3.DatabaseError:
        return


def copy_rows(new: sqlite3.Connection, table: str, rows: Iterator[sqlite3.Row]) -> int:
    """Insert rows unchanged, except those that violate a constraint; returns the number inserted."""
    count = 0
    for row in rows:
        fields: dict[str, Any] = dict(zip(row.keys(), row, strict=True))
        marks = ", ".join(f":{name}" for name in fields)
        try:
            count += new.execute(
                f"insert or ignore into {table} ({', '.join(fields)}) values ({marks})", fields
            ).rowcount
        except sqlite3.IntegrityError:
            continue
    return count
