"""The store file: its tables, its migrations, and connections to it."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.private import FILE, private_file, tighten
from tapir_local.store.rows import record_max_tokens

PAGE_BYTES = 16_384  # bytes: of 4 KB, the half would be empty beside one row of 2 KB
MMAP_BYTES = 2**40  # bytes of the file that a connection may map: pages are read without a system call each
BUSY_TIMEOUT_MS = 60_000  # milliseconds that a statement waits for another process's lock; commits take a few
NETWORK_FILE_SYSTEMS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "afs",
    "ceph",
    "glusterfs",
    "lustre",
    "beegfs",
    "gpfs",
} | {
    "fuse.sshfs",
    "fuse.glusterfs",
    "fuse.ceph",
}
DAMAGE_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


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
PENDING_BATCHES = """
create table batches (
    tag text not null primary key, endpoint text not null, file text not null, server text not null,
    state text not null, created real not null) strict;
create table batch_keys (
    key blob not null, tag text not null, primary key (key, tag)) strict, without rowid
"""

# estimated: 1 where tokens are the most that may have been billed. reply_limits: the values of max_tokens that the
# calls of a sample were asked with.
ESTIMATED_BILLS = """
alter table calls add column estimated integer not null default 0;
alter table attempts add column estimated integer not null default 0;
create table reply_limits (
    sample integer not null, tokens integer not null, primary key (sample, tokens)) strict, without rowid
"""
MIGRATION_SET = "teacher"
MIGRATIONS = {  # statements by name, oldest first; a released one never changes
    "first_tables": FIRST_TABLES,
    "batches_away": PENDING_BATCHES,
    "bills": ESTIMATED_BILLS,
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
            tighten(path.with_name(path.name + ending), FILE)
    conn = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, check_same_thread=False, isolation_level=None
    )
    try:
        conn.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        if conn.execute("PRAGMA busy_timeout").fetchone()[0] != BUSY_TIMEOUT_MS:
            raise TapirError("this SQLite has no busy timeout", where=str(path))
        conn.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # heeded only before the first table
        if write and conn.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise TapirError(
                "SQLite cannot use a write-ahead log here", where=str(path), fix="Put the cache on a local disk."
            )
        conn.execute("PRAGMA synchronous = FULL")
        conn.execute(f"PRAGMA mmap_size = {MMAP_BYTES if not write else 0}")
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


def is_damage_error(error: sqlite3.Error) -> bool:
    """Whether SQLite speaks of a damaged file, and not of a busy, full or unreadable disk."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in DAMAGE_CODES


def create_or_migrate(path: Path) -> None:
    """Create the tables or apply the migrations still missing; TapirError for a store of a newer version."""
    conn = connect(path, write=True)
    try:
        if set(MIGRATIONS) - applied_migrations(conn, path):
            apply_migrations(conn)
    finally:
        conn.close()


def applied_migrations(conn: sqlite3.Connection, path: Path) -> set[str]:
    """The migrations that a store has had; TapirError for a store of a newer version."""
    known = conn.execute("select 1 from sqlite_schema where name = '_sqlite_migrations'").fetchall()
    sql = "select name from _sqlite_migrations where migration_set = ?"
    names = {row[0] for row in conn.execute(sql, [MIGRATION_SET])} if known else set()
    if names - set(MIGRATIONS):
        what = "the store was written by a newer version of tapir-local"
        raise TapirError(what, where=str(path), fix="Upgrade tapir-local, or name another cache.")
    return names


def apply_migrations(conn: sqlite3.Connection) -> None:
    """Apply what is missing, each migration in a transaction with the note that it was applied."""
    from sqlite_utils import Database, Migrations  # here, as it imports pandas where it finds it: half a second

    migrations = Migrations(MIGRATION_SET)
    for name, statements in MIGRATIONS.items():

        def apply(db: Database, statements: str = statements) -> None:
            for statement in statements.split(";"):
                db.execute(statement)
            if statements is ESTIMATED_BILLS:
                record_max_tokens(db.conn)

        migrations(name=name)(apply)
    migrations.apply(Database(conn))


def network_disk_warning(folder: Path) -> str:
    """What the user ought to know of the disk that a store lies on; "" where there is nothing to say."""
    import psutil

    place = folder.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    kind = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""
    if kind not in NETWORK_FILE_SYSTEMS:
        return ""
    return (
        f"{folder}: the store lies on a network file system ({kind}), where SQLite's locks may not hold and a file may "
        "be damaged. Name a folder of a local disk with --cache."
    )
