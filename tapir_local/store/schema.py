"""The store file: its tables, its migrations, and connections to it."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.files import FILE_MODE, private_file, restrict_access
from tapir_local.store.rows import record_max_tokens

PAGE_BYTES = 16_384  # with pages of 4 KB, a row of 2 KB would leave half of a page empty
MMAP_BYTES = 2**40  # bytes of the file that a reader may map into memory, which saves a system call per page
# Pages in the log before they are moved into the file, 1 MiB: a copy of the file alone lacks at most these. SQLite's
# default of 1000 is 16 MiB here, more than many stores.
CHECKPOINT_PAGES = 64
BUSY_TIMEOUT_MS = 60_000  # how long a statement waits for a lock of another process; a commit takes a few ms
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


# calls: requests with their answers. attempts: requests without a usable answer. uses: which row used which call.
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

# batches: submitted to a Batch API, by our tag. batch_keys: the answers of a batch that are still to be fetched.
PENDING_BATCHES = """
create table batches (
    tag text not null primary key, endpoint text not null, file text not null, server text not null,
    state text not null, created real not null) strict;
create table batch_keys (
    key blob not null, tag text not null, primary key (key, tag)) strict, without rowid
"""

# estimated: 1 if the token counts are the most that may have been billed. reply_limits: the values of max_tokens in
# the requests of a sample's calls.
ESTIMATED_BILLS = """
alter table calls add column estimated integer not null default 0;
alter table attempts add column estimated integer not null default 0;
create table reply_limits (
    sample integer not null, tokens integer not null, primary key (sample, tokens)) strict, without rowid
"""
MIGRATION_SET = "teacher"
MIGRATIONS = {  # statements by name, oldest first; a released migration never changes
    "first_tables": FIRST_TABLES,
    "batches_away": PENDING_BATCHES,
    "bills": ESTIMATED_BILLS,
}


def connect(path: Path, *, write: bool) -> sqlite3.Connection:
    """A connection in WAL mode that waits for locks. Any thread may use it, one at a time.

    synchronous=FULL: a commit returns after its WAL frames are on the disk, so an acknowledged row survives kill -9 and
    a power failure. With NORMAL it would survive only the first.
    """
    mode = "rwc" if write else "ro&immutable=1" if is_unchangeable(path) else "ro"
    if write:
        private_file(path)  # SQLite creates the log with the mode of the file
        for ending in ("-wal", "-shm"):
            restrict_access(path.with_name(path.name + ending), FILE_MODE)
    conn = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, check_same_thread=False, isolation_level=None
    )
    try:
        conn.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        if conn.execute("PRAGMA busy_timeout").fetchone()[0] != BUSY_TIMEOUT_MS:
            raise TapirError("this SQLite has no busy timeout", where=str(path))
        conn.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # takes effect only before the first table is created
        if write and conn.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise TapirError(
                "SQLite cannot use a write-ahead log here", where=str(path), fix="Put the cache on a local disk."
            )
        conn.execute("PRAGMA synchronous = FULL")
        conn.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        conn.execute(f"PRAGMA mmap_size = {MMAP_BYTES if not write else 0}")
    except BaseException:
        conn.close()
        raise
    return conn


def is_unchangeable(path: Path) -> bool:
    """Whether a closed store is in a folder that we cannot write: SQLite cannot make the index of its log there.

    Without a log no process has the store open, so it can be read without one.
    """
    log = path.with_name(f"{path.name}-wal")
    return not os.access(path.parent, os.W_OK) and not (log.exists() and log.stat().st_size)


@contextmanager
def transaction(conn: sqlite3.Connection) -> Iterator[None]:
    """A transaction that takes the write lock at its start, because a reader that starts to write cannot wait."""
    conn.execute("BEGIN IMMEDIATE")
    try:
        yield
        conn.execute("COMMIT")
    except BaseException:
        conn.rollback()
        raise


def is_damage_error(error: sqlite3.Error) -> bool:
    """Whether an error means a damaged file, and not a busy, full or unreadable disk."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in DAMAGE_CODES


def create_or_migrate(path: Path) -> None:
    """Create the tables, or apply missing migrations; TapirError for a store of a newer version."""
    conn = connect(path, write=True)
    try:
        if set(MIGRATIONS) - applied_migrations(conn, path):
            apply_migrations(conn)
    finally:
        conn.close()


def applied_migrations(conn: sqlite3.Connection, path: Path) -> set[str]:
    """The names of the migrations applied to a store; TapirError for a store of a newer version."""
    known = conn.execute("select 1 from sqlite_schema where name = '_sqlite_migrations'").fetchall()
    sql = "select name from _sqlite_migrations where migration_set = ?"
    names = {row[0] for row in conn.execute(sql, [MIGRATION_SET])} if known else set()
    if names - set(MIGRATIONS):
        what = "the store was written by a newer version of tapir-local"
        raise TapirError(what, where=str(path), fix="Upgrade tapir-local, or name another cache.")
    return names


def apply_migrations(conn: sqlite3.Connection) -> None:
    """Apply missing migrations, each in a transaction that also records it as applied."""
    from sqlite_utils import (
        Database,
        Migrations,
    )  # not at the top: it imports pandas if that is installed, which takes half a second

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
    """A warning if the folder of a store is on a network file system, else ""."""
    import psutil

    place = folder.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    kind = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""
    if kind not in NETWORK_FILE_SYSTEMS:
        return ""
    return (
        f"{folder}: the store is on a network file system ({kind}), where SQLite's locks may fail and damage the file. "
        "Use --cache to name a folder on a local disk."
    )
