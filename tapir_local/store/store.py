"""cache/teacher.db: every call to a teacher or judge is paid for once and never lost."""

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
from tapir_local.store.compression import unpack
from tapir_local.store.inserting import Inserter, Row
from tapir_local.store.locks import Claims
from tapir_local.store.reply_limits import reply_limits
from tapir_local.store.rows import Attempt, Call, InFlight, Landed, Use
from tapir_local.store.schema import (
    bring_up_to_date,
    connect,
    fault_of,
    is_damage,
    rescue,
    transaction,
    warning_of,
)

Mode = Literal["on", "off", "refresh", "read-only", "replay"]
FIND = "select key, answer, sample from calls where key in "
AT_ONCE = 200  # keys of a look-up
BATCH = 2000  # rows of a commit at the most
CANDIDATES = 2000  # stored requests compared with one that replay misses


Job = tuple[Sequence[Row], "Future[None]"]


class Store:
    """The calls in one file, shared by any number of threads and processes.

    `mode`: "on"; "off" (nothing read or written); "refresh" (asked anew, replacing what is stored); "read-only" (hits
    served, nothing written); "replay" (the same, and the caller treats a miss as an error). `notices` are sentences
    for the user about what opening the file put right. TapirError when the file cannot be used.
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
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        with explained(path):
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
        """The stored answer, the JSON as it came; None when there is none or this mode reads none."""
        if not self.reads:
            return None
        try:
            row = self._reader().execute(FIND + "(?)", (key,)).fetchone()
        except (sqlite3.Error, OSError) as error:
            raise explanation(error, self.path) from error
        return self._unpacked(*row) if row else None

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The stored answers of those keys that have one; a key costs half of what it costs alone."""
        found: dict[bytes, bytes] = {}
        for start in range(0, len(keys) if self.reads else 0, AT_ONCE):
            some = keys[start : start + AT_ONCE]
            try:
                rows = self._reader().execute(f"{FIND}({', '.join('?' * len(some))})", some).fetchall()
            except (sqlite3.Error, OSError) as error:
                raise explanation(error, self.path) from error
            found |= {row[0]: answer for row in rows if (answer := self._unpacked(*row)) is not None}
        return found

    def put(self, call: Call, uses: Sequence[Use] = (), sent: Attempt | None = None) -> "Future[None]":
        """Hand over an answer; the future resolves when it is on the disk, or holds the TapirError that says why not.

        An answer stored meanwhile by someone else stays, except in mode "refresh". `sent` is what `send` was given for
        its request. Raises the TapirError of an earlier write that failed, so that nobody goes on paying for what
        cannot be kept.
        """
        return self._later([call, *uses, *([Landed(sent)] if sent else [])])

    def note(self, attempt: Attempt, sent: Attempt | None = None) -> "Future[None]":
        """Keep a failed attempt, with whatever came; `sent` is what `send` was given for its request."""
        return self._later([attempt, *([Landed(sent)] if sent else [])])

    def send(self, attempt: Attempt) -> "Future[None]":
        """Record that a request is about to be sent: the attempt stays in the store if this process dies meanwhile."""
        return self._later([InFlight(attempt)])

    def used(self, uses: Sequence[Use]) -> "Future[None]":
        """Record who used which calls; one that is known stays, and once paid it stays paid."""
        return self._later(uses)

    def flush(self) -> None:
        """Return when everything handed over is on the disk; TapirError when it could not be written."""
        self._later([]).result()

    def claim(self, key: bytes) -> bool:
        """True when nobody else is asking this key; call `release` when its answer is on the disk, or given up."""
        return self._claims.take(key) if self.writes else True

    def release(self, key: bytes) -> None:
        """Let others ask the key."""
        if self.writes:
            self._claims.drop(key)

    def served(self, kinds: str) -> list[tuple[str, str]]:
        """(model, fingerprint) of the newest call of the kinds whose name begins so; [] where there is none."""
        if not self.reads:
            return []
        sql = (
            "select model, fingerprint from calls where sample in (select id from samples where substr(name, 1, ?) = ?)"
            " order by id desc limit 1"
        )
        with explained(self.path):
            return list(self._reader().execute(sql, (len(kinds), kinds)).fetchall())

    def whole_answers(self, run: str, round: int, stage: str) -> int:
        """How many whole answers a run has used in a stage."""
        if not self.reads:
            return 0
        sql = (
            "select count(*) from uses u join calls c on c.key = u.key"
            " where u.run = ? and u.round = ? and u.stage = ? and c.finish = 'stop'"
        )
        with explained(self.path):
            return int(self._reader().execute(sql, (run, round, stage)).fetchone()[0])

    def limits(self, kinds: str) -> list[int]:
        """The values of max_tokens that calls of the kinds whose name begins so were asked with, largest first."""
        if not self.reads:
            return []
        with explained(self.path):
            return reply_limits(self._reader().connection, kinds)

    def missing(self, request: bytes, stage: str, row: str) -> TapirError:
        """The error for a request that a replay does not find, with what the nearest stored one has otherwise."""
        wanted = keys.fields(request)
        nearest = keys.nearest(request, self._like(stage, row))
        found = list(keys.differences(wanted, keys.fields(nearest))) if nearest else []
        known = f"in the nearest one, {keys.told(found[0])}" if found else "and none like it"
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
            self._thread.join()
        for conn in self._readers:
            conn.close()
        self._readers.clear()
        if self._thread:
            self._thread = None
            self._claims.close()
            self._conn.close()  # the last, since a reader that closes last cannot merge the log into the file
        self._broken = TapirError("the store is closed", where=str(self.path))

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.notices = tuple(filter(None, [warning_of(self.path.parent)]))
        private_file(Path(f"{self.path}.lock"))
        with FileLock(f"{self.path}.lock", mode=FILE_MODE):
            fault = fault_of(self.path) if self.path.exists() else ""
            if fault:
                self.notices += (rescue(self.path, fault),)
            bring_up_to_date(self.path)
        self._conn = connect(self.path, write=True)
        self._rows = Inserter(self._conn, self.mode == "refresh", self._unreadable)
        self._claims = Claims(Path(f"{self.path}.asking"))
        self._thread = threading.Thread(target=self._write, name="store", daemon=True)
        self._thread.start()

    def _reader(self) -> sqlite3.Cursor:
        """This thread's own connection, by its one cursor."""
        try:
            cursor: sqlite3.Cursor = self._local.cursor
        except AttributeError:
            conn = connect(self.path, write=False)
            self._readers.append(conn)
            cursor = self._local.cursor = conn.cursor()
        return cursor

    def _sample(self, number: int) -> bytes:
        """The sample of answers of this number; samples never change."""
        sample = self._samples.get(number)
        if sample is None:
            row = self._reader().execute("select answer from samples where id = ?", (number,)).fetchone()
            if not row:
                raise zlib.error("its sample is gone")
            sample = self._samples[number] = row[0]
        return sample

    def _unpacked(self, key: bytes, packed: bytes, number: int) -> bytes | None:
        """An answer as it came; None, and to be asked again and replaced, where it is damaged."""
        try:
            return unpack(packed, self._samples.get(number) or self._sample(number))
        except zlib.error:
            self._unreadable.add(key)
            return None

    def _like(self, stage: str, row: str) -> Iterator[bytes]:
        """Stored requests, those of the same stage and row first."""
        sql = (
            "select c.request, s.request from calls c join samples s on s.id = c.sample where c.id in (select c.id"
            " from calls c left join uses u on u.key = c.key and u.stage = ?"
            " order by u.row = ? desc, u.stage is null, c.id limit ?)"
        )
        for request, sample in self._reader().execute(sql, (stage, row, CANDIDATES)).fetchall():
            with suppress(zlib.error):
                yield unpack(request, sample)

    def _later(self, rows: Sequence[Row]) -> "Future[None]":
        done: Future[None] = Future()
        if self.writes:
            self._jobs.put((rows, done))
        else:
            done.set_result(None)
        if self._broken:  # looked at last: whatever was put before it broke is settled by the writer
            raise self._broken
        return done

    def _write(self) -> None:
        """The writer's thread: whatever has gathered while the last commit waited for the disk goes into the next."""
        ended = False
        try:
            while not ended:
                jobs, ended = gather(self._jobs)
                self._commit(jobs)
        finally:
            while not self._jobs.empty():
                settle(gather(self._jobs)[0], self._broken)

    def _commit(self, jobs: Sequence[Job]) -> None:
        failed: TapirError | None = self._broken or TapirError("the store's writer stopped", where=str(self.path))
        try:
            if not self._broken:
                with explained(self.path), transaction(self._conn):
                    self._rows.insert([row for rows, _ in jobs for row in rows])
                failed = None
        except TapirError as error:
            failed = error
        finally:
            self._broken = failed
            settle(jobs, failed)


def gather(jobs: "SimpleQueue[Job | None]") -> tuple[list[Job], bool]:
    """Wait for a job and take those behind it; and whether the end was among them."""
    found: list[Job] = []
    with suppress(Empty):
        job = jobs.get()
        while job is not None:
            found.append(job)
            if len(found) == BATCH:
                return found, False
            job = jobs.get_nowait()
        return found, True
    return found, False


def settle(jobs: Sequence[Job], error: TapirError | None) -> None:
    """Tell those who wait."""
    for _, done in jobs:
        if error:
            done.set_exception(error)
        else:
            done.set_result(None)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's and the file system's errors as TapirErrors that say what to do."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise explanation(error, path) from error


def explanation(error: sqlite3.Error | OSError, path: Path) -> TapirError:
    """What an error means and what to do."""
    if isinstance(error, OSError):
        fix = "See that the folder can be written."
    elif is_damage(error):
        fix = "Run the command again with the store on: a damaged one is put aside and its calls are saved."
    elif getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        fix = "Make room on the disk and run the same command again: what was stored before is safe."
    else:
        fix = "See that the file and its folder can be read and written."
    why = getattr(error, "strerror", None) or error
    return TapirError(f"the store cannot be used: {why}", where=str(path), fix=fix)
