"""teacher.db as a file: its tables, opening it, checking it, and saving what a damaged one still holds."""

import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.files import FILE_MODE, private_file, restrict_access
from tapir_local.store import keys
from tapir_local.store.compression import unpack
from tapir_local.store.reply_limits import note_limits
from tapir_local.store.usage import MOST

PAGE = 16_384  # bytes: of 4 KB, the half would be empty beside one row of 2 KB
MAPPED = 2**40  # bytes of the file that a connection may map: pages are read without a system call each
BUSY = 60_000  # milliseconds that a statement waits for another process's lock; commits take a few
CHECK_SECONDS = (
    1.0  # quick_check reads about 1 GB/s; of a larger store it sees the beginning, each answer has its own checksum
)
NETWORKED = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs"} | {
    "fuse.sshfs",
    "fuse.glusterfs",
    "fuse.ceph",
}
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

# batches: what was submitted to a Batch API, under our tag. batch_keys: the answers of it that are still to be fetched.
BATCHES_AWAY = """
create table batches (
    tag text not null primary key, endpoint text not null, file text not null, server text not null,
    state text not null, created real not null) strict;
create table batch_keys (
    key blob not null, tag text not null, primary key (key, tag)) strict, without rowid
"""

# estimated: 1 where tokens are the most that may have been billed. reply_limits: the values of max_tokens that the
# calls of a sample were asked with.
BILLS = """
alter table calls add column estimated integer not null default 0;
alter table attempts add column estimated integer not null default 0;
create table reply_limits (
    sample integer not null, tokens integer not null, primary key (sample, tokens)) strict, without rowid
"""

# Stores of older versions may hold counts beyond belief, as servers sent them, which would overflow a sum.
TOKENS = f"min(tokens_in, {MOST}) + min(tokens_out, {MOST})"
SET = "teacher"
MIGRATIONS = {  # statements by name, oldest first; a released one never changes
    "first_tables": FIRST_TABLES,
    "batches_away": BATCHES_AWAY,
    "bills": BILLS,
}


def connect(path: Path, *, write: bool) -> sqlite3.Connection:
    """A connection in WAL mode that waits for locks instead of failing on them; any thread may use it, one at a time.

    synchronous=FULL: a commit returns after its WAL frames are on the disk, so that an acknowledged row outlives
    kill -9 and a power cut alike. NORMAL would outlive only the first.
    """
    mode = "rwc" if write else "ro"
    if write:
        private_file(path)  # SQLite gives a new log the file's own mode
        for ending in ("-wal", "-shm"):
            restrict_access(path.with_name(path.name + ending), FILE_MODE)
    conn = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, check_same_thread=False, isolation_level=None
    )
    try:
        conn.execute(f"PRAGMA busy_timeout = {BUSY}")
        if conn.execute("PRAGMA busy_timeout").fetchone()[0] != BUSY:
            raise TapirError("this SQLite has no busy timeout", where=str(path))
        conn.execute(f"PRAGMA page_size = {PAGE}")  # heeded only before the first table
        if write and conn.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise TapirError(
                "SQLite cannot use a write-ahead log here", where=str(path), fix="Put the cache on a local disk."
            )
        conn.execute("PRAGMA synchronous = FULL")
        conn.execute(f"PRAGMA mmap_size = {MAPPED if not write else 0}")
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
            if statements is BILLS:
                note_limits(db.conn)

        migrations(name=name)(apply)
    migrations.apply(Database(conn))


def warning_of(folder: Path) -> str:
    """What the user ought to know of the disk that a store lies on; "" where there is nothing to say."""
    import psutil

    place = folder.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    kind = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""
    if kind not in NETWORKED:
        return ""
    return (
        f"{folder}: the store lies on a network file system ({kind}), where SQLite's locks may not hold and a file may "
        "be damaged. Name a folder of a local disk with --cache."
    )


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
            for table in ("uses", "batches", "batch_keys"):
                copy_rows(new, table, whole(old, table))
            note_limits(new)
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


def spent(path: Path, run: str, *, estimated: bool = False) -> tuple[int, int, float]:
    """(calls, tokens, money) that may have been billed to a run; of these only the estimated ones, if asked for.

    Attempts count that brought no answer and may have been billed for all that; among them are requests that were in
    flight when an earlier process died.
    """
    conn = connect(path, write=False)
    try:
        mark = "estimated" if has_estimates(conn) else "0"
        sql = (
            "select count(*), coalesce(sum(tokens), 0), coalesce(sum(price), 0.0) from ("
            f"select {TOKENS} as tokens, c.price, {mark} as mark from uses u join calls c on c.key = u.key"
            f" where u.run = ? and u.paid union all select {TOKENS}, price, {mark} from attempts"
            " where run = ? and tokens_in + tokens_out > 0) where mark or not ?"
        )
        calls, tokens, money = conn.execute(sql, (run, run, estimated)).fetchone()
        return calls, tokens, money
    finally:
        conn.close()


def has_estimates(conn: sqlite3.Connection) -> bool:
    """Whether a store marks estimated token counts: one of an older version, that is only read, does not."""
    return any(row[1] == "estimated" for row in conn.execute("pragma table_info(calls)"))


def tokens_by_stage(path: Path) -> dict[str, tuple[float, float]]:
    """By stage, the mean tokens of the prompts and replies of its calls in the store."""
    sql = (
        "select u.stage, avg(c.tokens_in), avg(c.tokens_out) from uses u join calls c on c.key = u.key"
        " group by u.stage having avg(c.tokens_out) > 0"
    )
    conn = connect(path, write=False)
    try:
        return {stage: (size_in, size_out) for stage, size_in, size_out in conn.execute(sql)}
    finally:
        conn.close()
