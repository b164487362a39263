"""teacher.db as a file: its tables, opening it, checking it, and saving what a damaged one still holds.

A long request and its answer are mostly the words of their neighbours: the same prompt around another instruction. So
each text is deflated against a *sample*, the first call of its kind, which takes a call from 3 KB to about 300 bytes,
and one of 80 KB, a long document before each question, to not much more.
Samples are kept twice, in two tables and so on different pages, since every call of their kind is unreadable without.
"""

import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tapir_local import keys
from tapir_local.errors import TapirError

BUSY = 60_000  # milliseconds that a statement waits for another process's lock; commits take a few
CHECK_SECONDS = (
    1.0  # quick_check reads about 1 GB/s; of a larger store it sees the beginning, each answer has its own checksum
)
WINDOW = 32_768  # deflate looks back no further
REACH = WINDOW - 512  # with some room, as deflate leaves unused the last 262 bytes of its window
LONG = b"\1"  # begins what is packed with the length of a shared beginning; what zlib writes begins with 0x78
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


# calls: answers that serve again. attempts: what came instead. uses: who asked for which call, and who paid.
FIRST_TABLES = """
create table samples (
    id integer primary key, name text not null unique, request blob not null, answer blob not null) strict;
create table sample_copies (
    id integer primary key, name text not null unique, request blob not null, answer blob not null) strict;
create table calls (
    id integer primary key, key blob not null unique, sample integer not null, request blob not null,
    answer blob not null, finish text not null, model text not null, fingerprint text not null,
    tokens_in integer not null, tokens_out integer not null, seconds real not null, price real,
    created real not null) strict;
create table attempts (
    id integer primary key, key blob not null, run text not null, round integer not null, stage text not null,
    row text not null, why text not null, answer blob not null,
    tokens_in integer not null, tokens_out integer not null, seconds real not null, price real,
    created real not null) strict;
create table uses (
    run text not null, round integer not null, stage text not null, row text not null, key blob not null,
    paid integer not null, primary key (run, round, stage, row, key)) strict, without rowid
"""

SET = "teacher"
MIGRATIONS = {"first_tables": FIRST_TABLES}  # statements by name, oldest first; a released one never changes


def pack(text: bytes, sample: bytes) -> bytes:
    """`text` deflated against a sample of its kind; the checksums of both are inside.

    Of a sample that is longer than deflate looks back, what both begin with is kept as its length.
    """
    if len(sample) <= REACH:
        return deflated(text, sample)
    shared = shared_length(text, sample)
    head = LONG + shared.to_bytes(4) + zlib.adler32(text).to_bytes(4)
    return head + deflated(text[shared:], around(sample, shared))


def unpack(packed: bytes, sample: bytes) -> bytes:
    """What `pack` packed; zlib.error when either was changed."""
    if not packed.startswith(LONG):
        return inflated(packed, sample)
    shared, checksum = int.from_bytes(packed[1:5]), int.from_bytes(packed[5:9])
    text = sample[:shared] + inflated(packed[9:], around(sample, shared))
    if zlib.adler32(text) != checksum:
        raise zlib.error("another sample")
    return text


def deflated(text: bytes, words: bytes) -> bytes:
    """`text` with references to the words, of which the last 32 KB count."""
    squeeze = zlib.compressobj(zdict=words)
    return squeeze.compress(text) + squeeze.flush()


def inflated(packed: bytes, words: bytes) -> bytes:
    """What `deflated` deflated."""
    stretch = zlib.decompressobj(zdict=words)
    text = stretch.decompress(packed)
    if not stretch.eof:
        raise zlib.error("cut short")
    return text


def shared_length(one: bytes, other: bytes) -> int:
    """How many bytes two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def around(sample: bytes, place: int) -> bytes:
    """As much of a sample as deflate can look back on, most of it from `place` on."""
    return sample[max(0, place - REACH // 4) : place + REACH * 3 // 4]


def connect(path: Path, *, write: bool) -> sqlite3.Connection:
    """A connection in WAL mode that waits for locks instead of failing on them; any thread may use it, one at a time.

    synchronous=FULL: a commit returns after its WAL frames are on the disk, so that an acknowledged row outlives
    kill -9 and a power cut alike. NORMAL would outlive only the first.
    """
    mode = "rwc" if write else "ro"
    conn = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, check_same_thread=False, isolation_level=None
    )
    try:
        conn.execute(f"PRAGMA busy_timeout = {BUSY}")
        if conn.execute("PRAGMA busy_timeout").fetchone()[0] != BUSY:
            raise TapirError("this SQLite has no busy timeout", where=str(path))
        if write and conn.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise TapirError(
                "SQLite cannot use a write-ahead log here", where=str(path), fix="Put the cache on a local disk."
            )
        conn.execute("PRAGMA synchronous = FULL")
    except BaseException:
        conn.close()
        raise
    return conn


@contextmanager
def transaction(conn: sqlite3.Connection) -> Iterator[None]:
    """A write transaction, locked from its start: one that began as a reader could not wait for its turn to write."""
    conn.execute("BEGIN IMMEDIATE")
    try:
        yield
        conn.execute("COMMIT")
    except BaseException:
        conn.rollback()
        raise


def is_damage(error: sqlite3.Error) -> bool:
    """Whether SQLite speaks of a damaged file, and not of a busy, full or unreadable disk."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in DAMAGED


def fault_of(path: Path) -> str:
    """What is wrong inside an existing store, "" if nothing was found within CHECK_SECONDS."""
    end = time.monotonic() + CHECK_SECONDS
    try:
        conn = connect(path, write=True)
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            return str(error)
        raise
    try:
        conn.set_progress_handler(lambda: time.monotonic() > end, 10_000)
        found: str = conn.execute("PRAGMA quick_check(1)").fetchone()[0]
        return "" if found == "ok" else found
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT:
            return ""
        if is_damage(error):
            return str(error)
        raise
    finally:
        conn.close()


def bring_up_to_date(path: Path) -> None:
    """Create the tables or apply the migrations still missing; TapirError for a store of a newer version."""
    conn = connect(path, write=True)
    try:
        if set(MIGRATIONS) - applied(conn, path):
            migrate(conn)
    finally:
        conn.close()


def applied(conn: sqlite3.Connection, path: Path) -> set[str]:
    """The migrations that a store has had; TapirError for a store of a newer version."""
    known = conn.execute("select 1 from sqlite_schema where name = '_sqlite_migrations'").fetchall()
    sql = "select name from _sqlite_migrations where migration_set = ?"
    names = {row[0] for row in conn.execute(sql, [SET])} if known else set()
    if names - set(MIGRATIONS):
        what = "the store was written by a newer version of tapir-local"
        raise TapirError(what, where=str(path), fix="Upgrade tapir-local, or name another cache.")
    return names


def migrate(conn: sqlite3.Connection) -> None:
    """Apply what is missing, each migration in a transaction with the note that it was applied."""
    from sqlite_utils import Database, Migrations  # here, as it imports pandas where it finds it: half a second

    migrations = Migrations(SET)
    for name, statements in MIGRATIONS.items():

        def apply(db: Database, statements: str = statements) -> None:
            for statement in statements.split(";"):
                db.execute(statement)

        migrations(name=name)(apply)
    migrations.apply(Database(conn))


def put_aside(path: Path) -> Path:
    """Rename a damaged store, its log with it, to `<name>.damaged-<time>`."""
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


def rescue(path: Path, fault: str) -> str:
    """Put a damaged store aside and save into a new one what can be read; returns what to tell the user."""
    aside = put_aside(path)
    bring_up_to_date(path)
    saved = lost = 0
    try:
        old = connect(aside, write=False)
    except sqlite3.DatabaseError:
        old = sqlite3.connect(":memory:")
    old.row_factory = sqlite3.Row
    new = connect(path, write=True)
    try:
        with transaction(new):
            saved, lost = copy_calls(old, new)
            copy_rows(new, "attempts", numbered(old, "attempts"))
            copy_rows(new, "uses", whole(old, "uses"))
    finally:
        old.close()
        new.close()
        remove_empty_log(aside)
    return (
        f"{path}: the store was damaged ({fault}). It was put aside as {aside.name}; {saved} calls were saved, "
        f"{lost} could not be read."
    )


def remove_empty_log(path: Path) -> None:
    """Remove what reading left beside a file in WAL mode: an empty log and its index."""
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and not log.stat().st_size:
        log.unlink()
        path.with_name(f"{path.name}-shm").unlink(missing_ok=True)


def copy_calls(old: sqlite3.Connection, new: sqlite3.Connection) -> tuple[int, int]:
    """Copy the calls that still prove themselves: (saved, lost)."""
    samples = samples_of(old)
    for table in ("samples", "sample_copies"):
        copy_rows(new, table, iter(samples.values()))
    good, last = 0, 0
    for row in numbered(old, "calls"):
        last = row["id"]
        if row["sample"] in samples and proves_itself(row, samples[row["sample"]]):
            good += copy_rows(new, "calls", iter([row]))
    return good, max(0, last - good)


def samples_of(conn: sqlite3.Connection) -> dict[int, sqlite3.Row]:
    """The samples that can be read, by id, from whichever of the two tables still has them."""
    samples: dict[int, sqlite3.Row] = {}
    for table in ("samples", "sample_copies"):
        for row in numbered(conn, table):
            samples.setdefault(row["id"], row)
    return samples


def proves_itself(row: sqlite3.Row, sample: sqlite3.Row) -> bool:
    """Whether the request gives the key and the answer has its checksum."""
    try:
        unpack(row["answer"], sample["answer"])
        return bool(keys.key_of(unpack(row["request"], sample["request"])) == row["key"])
    except (zlib.error, TypeError):
        return False


def numbered(conn: sqlite3.Connection, table: str, last: int = 0) -> Iterator[sqlite3.Row]:
    """The rows after the id `last` in the order of their ids, stepping over the stretches that cannot be read."""
    step, failed = 1, 0
    while step < 2**40:
        try:
            for row in conn.execute(f"select * from {table} where id > ? order by id", [last]):
                last, step, failed = row["id"], 1, 0
                yield row
            return
        except sqlite3.DatabaseError:
            last, failed = last + step, failed + 1
            step = 1 if failed < 200 else step * 2  # a page holds some 10 calls; beyond, a branch of the tree is gone


def whole(conn: sqlite3.Connection, table: str) -> Iterator[sqlite3.Row]:
    """The rows of a table up to the first that cannot be read."""
    try:
        yield from conn.execute(f"select * from {table}")
    except sqlite3.DatabaseError:
        return


def copy_rows(new: sqlite3.Connection, table: str, rows: Iterator[sqlite3.Row]) -> int:
    """Insert rows as they are, leaving out what the table refuses; the number inserted."""
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


def usage(path: Path, run: str) -> dict[str, int] | None:
    """How many of the calls that a run used it paid for, and how many were there; None without a sound store."""
    if not path.exists():
        return None
    conn = connect(path, write=False)
    try:
        used, paid = conn.execute("select count(*), coalesce(sum(paid), 0) from uses where run = ?", (run,)).fetchone()
    except sqlite3.DatabaseError:  # damaged, or no store: the next run mends or makes it
        return None
    finally:
        conn.close()
    return {"paid": paid, "hits": used - paid}
