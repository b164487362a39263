"""The store (cache/teacher.db): keeps every call to a teacher or judge, so that each is paid for only once."""

import sqlite3
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Literal, Self

from filelock import FileLock

from tapir_local.errors import TapirError
from tapir_local.files import FILE_MODE, private_file
from tapir_local.store import keys
from tapir_local.store.compression import decompress_text
from tapir_local.store.locks import Claims
from tapir_local.store.presence import OpenFile, describe_saved, has_orphaned_log, put_log_aside
from tapir_local.store.recovery import find_damage, rescue_store
from tapir_local.store.rows import Attempt, Call, InFlight, Inserter, Landed, StoreRow, Use, max_tokens_used
from tapir_local.store.schema import connect, create_or_migrate, is_damage_error, network_disk_warning, transaction

Mode = Literal["on", "off", "refresh", "read-only", "replay"]
SELECT_ANSWERS = "select key, answer, sample from calls where key in "
KEYS_PER_LOOKUP = 200  # keys in one query
ROWS_PER_COMMIT = 2000  # most jobs in one commit
MAX_REPLAY_CANDIDATES = 2000  # stored requests that are compared with one missing in replay


WriteJob = tuple[Sequence[StoreRow], "Future[None]"]


class Store:
    """The calls in one file, which any number of threads and processes may share.

    `mode`: "on"; "off" (nothing is read or written); "refresh" (requests are sent again and replace stored calls);
    "read-only" (hits are served, nothing is written); "replay" (read-only, and the caller treats a miss as an error).
    `notices` are sentences for the user about repairs made on opening. TapirError if the file cannot be used.
    """

    def __init__(self, path: Path, mode: Mode = "on") -> None:
        self.path, self.mode = path, mode
        self.reads, self.writes = mode not in ("off", "refresh"), mode in ("on", "refresh")
        self.notices: tuple[str, ...] = ()
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._samples: dict[int, bytes] = {}
        self._unreadable: set[bytes] = set()
        self._broken: TapirError | None = None
        self._jobs: SimpleQueue[WriteJob | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._written = threading.Event()  # the writer has ended
        with explain_store_errors(path):
            if self.writes:
                self._open()
            elif self.reads and not path.exists():
                raise TapirError(f"there is no store to {'replay' if mode == 'replay' else 'read'}", where=str(path))
            elif self.reads:
                self._reader().execute("select 1 from calls limit 1").fetchall()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, key: bytes) -> bytes | None:
        """The stored answer as received; None if there is none or this mode reads none."""
        if not self.reads:
            return None
        try:
            row = self._reader().execute(SELECT_ANSWERS + "(?)", (key,)).fetchone()
        except (sqlite3.Error, OSError) as error:
            raise make_store_error(error, self.path) from error
        return self._unpacked(*row) if row else None

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The stored answers of those keys that have one; takes half as long per key as `get`."""
        found: dict[bytes, bytes] = {}
        for start in range(0, len(keys) if self.reads else 0, KEYS_PER_LOOKUP):
            some = keys[start : start + KEYS_PER_LOOKUP]
            try:
                rows = self._reader().execute(f"{SELECT_ANSWERS}({', '.join('?' * len(some))})", some).fetchall()
            except (sqlite3.Error, OSError) as error:
                raise make_store_error(error, self.path) from error
            found |= {row[0]: answer for row in rows if (answer := self._unpacked(*row)) is not None}
        return found

    def put(self, call: Call, uses: Sequence[Use] = (), sent: Attempt | None = None) -> "Future[None]":
        """Store a call. The future resolves when the call is on the disk, or holds the TapirError of the write.

        A call that another process has stored under this key is kept, except in mode "refresh". `sent` is the attempt
        that was passed to `send` for its request. Raises the TapirError of an earlier failed write, so that no further
        request is paid for that cannot be stored.
        """
        return self._later([call, *uses, *([Landed(sent)] if sent else [])])

    def note(self, attempt: Attempt, sent: Attempt | None = None) -> "Future[None]":
        """Store a failed attempt. `sent` is the attempt that was passed to `send` for its request."""
        return self._later([attempt, *([Landed(sent)] if sent else [])])

    def send(self, attempt: Attempt) -> "Future[None]":
        """Record that a request is about to be sent. The attempt stays in the store if the process dies meanwhile."""
        return self._later([InFlight(attempt)])

    def used(self, uses: Sequence[Use]) -> "Future[None]":
        """Record uses of calls. A known use is kept, and a paid one stays paid."""
        return self._later(uses)

    def flush(self) -> None:
        """Wait until everything passed so far is on the disk; TapirError if it could not be written."""
        self._later([]).result()

    def claim(self, key: bytes) -> bool:
        """Lock a key before its request is sent; False if someone else is asking for it. Call `release` at the end."""
        return self._claims.take(key) if self.writes else True

    def release(self, key: bytes) -> None:
        """Unlock a key after its answer is on the disk or the request has failed."""
        if self.writes:
            self._claims.drop(key)

    def served(self, kinds: str) -> list[tuple[str, str]]:
        """[(model, fingerprint)] of the newest call whose kind begins with `kinds`; [] if there is none."""
        if not self.reads:
            return []
        known = "select id from samples where substr(name, 1, ?) = ?"
        newest = "select model, fingerprint from calls where sample in (%s) order by id desc limit 1"
        with explain_store_errors(self.path):
            kept = [number for (number,) in self._reader().execute(known, (len(kinds), kinds)).fetchall()]
            if not kept:  # SQLite would read every call to find none of them
                return []
            return list(self._reader().execute(newest % ", ".join("?" * len(kept)), kept).fetchall())

    def whole_answers(self, run: str, round: int, stage: str) -> int:
        """The number of complete answers that a run has used in a stage."""
        if not self.reads:
            return 0
        sql = (
            "select count(*) from uses u join calls c on c.key = u.key"
            " where u.run = ? and u.round = ? and u.stage = ? and c.finish = 'stop'"
        )
        with explain_store_errors(self.path):
            return int(self._reader().execute(sql, (run, round, stage)).fetchone()[0])

    def limits(self, kinds: str) -> list[int]:
        """The values of max_tokens in calls whose kind begins with `kinds`, largest first."""
        if not self.reads:
            return []
        with explain_store_errors(self.path):
            return max_tokens_used(self._reader().connection, kinds)

    def missing(self, request: bytes, stage: str, row: str) -> TapirError:
        """The error for a request that replay misses, with its first difference from the most similar call."""
        wanted = keys.request_fields(request)
        nearest = keys.find_nearest_request(request, self._like(stage, row))
        found = list(keys.find_differences(wanted, keys.request_fields(nearest))) if nearest else []
        known = f"in the most similar one, {keys.describe_difference(found[0])}" if found else "nor a similar one"
        what = f"the request of stage {stage}, row {row} is not in the store ({known})"
        return TapirError(
            what,
            where=str(self.path),
            fix="Replay needs the recipe, seeds and program version of the stored run; leave replay out to ask.",
        )

    def close(self) -> None:
        """Write what is left and close the file."""
        if self._thread:
            self._jobs.put(None)
            self._wait_for_writer()
        for conn in self._readers:
            conn.close()
        self._readers.clear()
        if self._thread:
            self._thread = None
            try:
                self._save_if_taken()
            finally:
                self._claims.close()
                self._conn.close()  # last, because a reader cannot merge the log into the file
                self._broken = TapirError("the store is closed", where=str(self.path))
        self._broken = TapirError("the store is closed", where=str(self.path))

    def _wait_for_writer(self) -> None:
        """Wait until the writer has ended; a first Ctrl-C waits as well, because what is written is paid for.

        Not by Thread.join: if that is interrupted, Python 3.11 and 3.12 take a running thread for ended.
        """
        try:
            self._written.wait()
        except KeyboardInterrupt:
            self._written.wait()
            raise

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.notices = tuple(filter(None, [network_disk_warning(self.path.parent)]))
        private_file(Path(f"{self.path}.lock"))
        with FileLock(f"{self.path}.lock", mode=FILE_MODE):
            self._claims = Claims(Path(f"{self.path}.asking"))
            try:
                self._repair()
            except BaseException:
                self._claims.close()
                raise
        self._conn = connect(self.path, write=True)
        self._file = OpenFile(self.path, self._conn)
        self._rows = Inserter(self._conn, self.mode == "refresh", self._unreadable)
        self._thread = threading.Thread(target=self._write, name="store", daemon=True)
        self._thread.start()

    def _repair(self) -> None:
        """Move a damaged file away and save its calls, unless another process uses it; create missing tables."""
        if has_orphaned_log(self.path) and self._claims.lock_store_alone():
            self.notices += (put_log_aside(self.path),)
        fault = find_damage(self.path) if self.path.exists() else ""
        if fault and not self._claims.lock_store_alone():
            raise TapirError(
                f"the store is damaged ({fault}), and another process is using it",
                where=str(self.path),
                fix="Stop the other runs, and run the same command again: it saves the calls that can be read.",
            )
        if fault:
            self.notices += (rescue_store(self.path, fault),)
        self._claims.share_store()
        create_or_migrate(self.path)

    def _save_if_taken(self) -> None:
        """If the file was taken away, save its calls; the TapirError says where."""
        if error := self._file.check():
            with explain_store_errors(self.path):
                error.fix = describe_saved(self.path, self._file.save())
            raise error

    def _reader(self) -> sqlite3.Cursor:
        """The cursor of this thread's own connection."""
        try:
            cursor: sqlite3.Cursor = self._local.cursor
        except AttributeError:
            conn = connect(self.path, write=False)
            self._readers.append(conn)
            cursor = self._local.cursor = conn.cursor()
        return cursor

    def _sample(self, number: int) -> bytes:
        """The answer of a sample, by its id; samples never change."""
        sample = self._samples.get(number)
        if sample is None:
            row = self._reader().execute("select answer from samples where id = ?", (number,)).fetchone()
            if not row:
                raise zlib.error("its sample is missing")
            sample = self._samples[number] = row[0]
        return sample

    def _unpacked(self, key: bytes, packed: bytes, number: int) -> bytes | None:
        """The decompressed answer; None if it is damaged, and its key is noted so that the call is replaced."""
        try:
            return decompress_text(packed, self._samples.get(number) or self._sample(number))
        except zlib.error:
            self._unreadable.add(key)
            return None

    def _like(self, stage: str, row: str) -> Iterator[bytes]:
        """Yield stored requests, those of the same stage and row first."""
        sql = (
            "select c.request, s.request from calls c join samples s on s.id = c.sample where c.id in (select c.id"
            " from calls c left join uses u on u.key = c.key and u.stage = ?"
            " order by u.row = ? desc, u.stage is null, c.id limit ?)"
        )
        for request, sample in self._reader().execute(sql, (stage, row, MAX_REPLAY_CANDIDATES)).fetchall():
            with suppress(zlib.error):
                yield decompress_text(request, sample)

    def _later(self, rows: Sequence[StoreRow]) -> "Future[None]":
        done: Future[None] = Future()
        if self.writes:
            self._jobs.put((rows, done))
        else:
            done.set_result(None)
        if self._broken:  # checked last: the writer settles all jobs that were put before it failed
            raise self._broken
        return done

    def _write(self) -> None:
        """The writer thread: all jobs that arrive during a commit go into the next commit."""
        ended = False
        try:
            while not ended:
                jobs, ended = take_write_jobs(self._jobs)
                self._commit(jobs)
        finally:
            while not self._jobs.empty():
                settle_write_jobs(take_write_jobs(self._jobs)[0], self._broken)
            self._written.set()

    def _commit(self, jobs: Sequence[WriteJob]) -> None:
        failed: TapirError | None = self._broken or TapirError("the store's writer stopped", where=str(self.path))
        try:
            taken = self._file.check()
            if taken or not self._broken:  # what still arrives for a file that was taken away is saved at the end
                with explain_store_errors(self.path), transaction(self._conn):
                    self._rows.insert([row for rows, _ in jobs for row in rows])
                failed = taken
        except TapirError as error:
            failed = error
        finally:
            self._broken = failed
            settle_write_jobs(jobs, failed)


def take_write_jobs(jobs: "SimpleQueue[WriteJob | None]") -> tuple[list[WriteJob], bool]:
    """Wait for a job and take those that follow it, and whether the end (None) was among them."""
    found: list[WriteJob] = []
    with suppress(Empty):
        job = jobs.get()
        while job is not None:
            found.append(job)
            if len(found) == ROWS_PER_COMMIT:
                return found, False
            job = jobs.get_nowait()
        return found, True
    return found, False


def settle_write_jobs(jobs: Sequence[WriteJob], error: TapirError | None) -> None:
    """Resolve the futures of jobs, or set their exception."""
    for _, done in jobs:
        if error:
            done.set_exception(error)
        else:
            done.set_result(None)


@contextmanager
def explain_store_errors(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and the file system into TapirErrors that say what to do."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise make_store_error(error, path) from error


def make_store_error(error: sqlite3.Error | OSError, path: Path) -> TapirError:
    """A TapirError with what an error means and what to do."""
    if isinstance(error, OSError):
        fix = "Check that the folder can be written."
    elif is_damage_error(error):
        fix = "Run the command again with the store on: it moves a damaged file away and saves the readable calls."
    elif getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        fix = "Make room on the disk and run the same command again. Calls stored before are safe."
    else:
        fix = "Check that the file and its folder can be read and written."
    why = getattr(error, "strerror", None) or error
    return TapirError(f"the store cannot be used: {why}", where=str(path), fix=fix)
