"""cache/teacher.db: every call to a teacher or judge is paid for once and never lost."""

import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from filelock import FileLock

from tapir_local import keys
from tapir_local.claims import Claims
from tapir_local.errors import TapirError
from tapir_local.storefile import (
    WINDOW,
    bring_up_to_date,
    connect,
    fault_of,
    is_damage,
    pack,
    rescue,
    transaction,
    unpack,
)

Mode = Literal["on", "off", "refresh", "read-only", "replay"]
BATCH = 2000  # rows of a commit at the most
CANDIDATES = 2000  # stored requests compared with one that replay misses


@dataclass(frozen=True, slots=True)
class Call:
    """A request and the answer that will serve it again.

    `request` is what keys.asked wrote and its SHA-256 the key; `answer` the body of the reply as it came. `kind` names
    the calls that look like this one (endpoint, model, stage): they share a sample. Prices are in the recipe's money.
    """

    request: bytes
    answer: bytes
    finish: str
    kind: str
    model: str = ""
    fingerprint: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    price: float | None = None
    created: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Use:
    """Who asked for a call; `paid` is 1 where this use sent it."""

    run: str
    round: int
    stage: str
    row: str
    key: bytes
    paid: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """Something else than a usable answer came; `why` says whether an error, a refusal or an empty answer."""

    key: bytes
    run: str
    round: int
    stage: str
    row: str
    why: str
    answer: bytes = b""
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    price: float | None = None
    created: float = field(default_factory=time.time)


Job = tuple[Callable[[], None], "Future[None]"]


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
        self._kinds: dict[str, Sample] = {}
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
        with explained(self.path):
            rows = self._reader().execute("select answer, sample from calls where key = ?", (key,)).fetchall()
        try:
            return unpack(rows[0][0], self._sample(rows[0][1])) if rows else None
        except zlib.error:  # this one answer is damaged: it is asked again, and replaced
            self._unreadable.add(key)
            return None

    def put(self, call: Call, uses: Sequence[Use] = ()) -> "Future[None]":
        """Hand over an answer; the future resolves when it is on the disk, or holds the TapirError that says why not.

        An answer stored meanwhile by someone else stays, except in mode "refresh". Raises the TapirError of an earlier
        write that failed, so that nobody goes on paying for what cannot be kept.
        """
        return self._later(lambda: self._insert_call(call, uses))

    def note(self, attempt: Attempt) -> "Future[None]":
        """Keep a failed attempt, with whatever came."""
        return self._later(lambda: self._insert("attempts", [vars_of(attempt)]))

    def used(self, uses: Sequence[Use]) -> "Future[None]":
        """Record who used which calls; a use already known stays as it is."""
        return self._later(lambda: self._insert("uses", [vars_of(use) for use in uses]))

    def flush(self) -> None:
        """Return when everything handed over is on the disk; TapirError when it could not be written."""
        self._later(lambda: None).result()

    def claim(self, key: bytes) -> bool:
        """True when nobody else is asking this key; call `release` when its answer is on the disk, or given up."""
        return self._claims.take(key) if self.writes else True

    def release(self, key: bytes) -> None:
        """Let others ask the key."""
        if self.writes:
            self._claims.drop(key)

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
        with FileLock(f"{self.path}.lock"):
            fault = fault_of(self.path) if self.path.exists() else ""
            if fault:
                self.notices = (rescue(self.path, fault),)
            bring_up_to_date(self.path)
        self._conn = connect(self.path, write=True)
        self._claims = Claims(Path(f"{self.path}.asking"))
        self._thread = threading.Thread(target=self._write, name="store", daemon=True)
        self._thread.start()

    def _reader(self) -> sqlite3.Connection:
        """This thread's own connection."""
        conn: sqlite3.Connection | None = getattr(self._local, "conn", None)
        if conn is None:
            conn = self._local.conn = connect(self.path, write=False)
            self._readers.append(conn)
        return conn

    def _sample(self, number: int) -> bytes:
        """The sample of answers of this number; samples never change."""
        if number not in self._samples:
            rows = self._reader().execute("select answer from samples where id = ?", (number,)).fetchall()
            if not rows:
                raise zlib.error("its sample is gone")
            self._samples[number] = rows[0][0]
        return self._samples[number]

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

    def _later(self, work: Callable[[], None]) -> "Future[None]":
        done: Future[None] = Future()
        if self.writes:
            self._jobs.put((work, done))
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
                    for work, _ in jobs:
                        work()
                failed = None
        except TapirError as error:
            failed = error
        finally:
            self._broken = failed
            settle(jobs, failed)

    def _insert(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            names = list(rows[0])
            sql = f"insert or ignore into {table} ({', '.join(names)}) values ({', '.join('?' * len(names))})"
            self._conn.executemany(sql, [tuple(row.values()) for row in rows])

    def _insert_call(self, call: Call, uses: Sequence[Use]) -> None:
        key = keys.key_of(call.request)
        sample = self._sample_of(call)
        row = {name: value for name, value in vars_of(call).items() if name != "kind"}
        if self.mode == "refresh" or key in self._unreadable:
            row["id"] = self._make_room(key)
        row |= {
            "key": key,
            "sample": sample.number,
            "request": pack(call.request, sample.request),
            "answer": pack(call.answer, sample.answer),
        }
        self._insert("calls", [row])
        self._insert("uses", [vars_of(use) for use in uses])

    def _make_room(self, key: bytes) -> int:
        """Take the answer stored under the key away, and keep it among the attempts if it can be read.

        Returns the id of the answer to come, one that no call has had: SQLite would give the newest call's again.
        """
        ((unused,),) = self._conn.execute("select coalesce(max(id), 0) + 1 from calls").fetchall()
        sql = (
            "select c.answer, s.answer, c.tokens_in, c.tokens_out, c.seconds, c.price, c.created"
            " from calls c join samples s on s.id = c.sample where key = ?"
        )
        for packed, sample, *rest in self._conn.execute(sql, (key,)).fetchall():
            with suppress(zlib.error):
                self._insert(
                    "attempts", [vars_of(Attempt(key, "", 0, "", "", "replaced", unpack(packed, sample), *rest))]
                )
        self._conn.execute("delete from calls where key = ?", (key,))
        self._unreadable.discard(key)
        return int(unused)

    def _sample_of(self, call: Call) -> "Sample":
        """The sample that a call is packed against: the first call of its kind, in whichever process it came."""
        if call.kind not in self._kinds:
            text = {"name": call.kind, "request": call.request, "answer": call.answer[-WINDOW:]}
            self._insert("samples", [text])
            found = self._conn.execute(
                "select id, name, request, answer from samples where name = ?", (call.kind,)
            ).fetchall()[0]
            self._insert("sample_copies", [dict(zip(("id", "name", "request", "answer"), found, strict=True))])
            self._kinds[call.kind] = Sample(found[0], found[2], found[3])
        return self._kinds[call.kind]


class Sample(NamedTuple):
    """What the calls of a kind are packed against."""

    number: int
    request: bytes
    answer: bytes


def vars_of(record: Call | Use | Attempt) -> dict[str, Any]:
    """The fields of a record; dataclasses.asdict would copy each of them."""
    return {name: getattr(record, name) for name in record.__slots__}


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
    except sqlite3.Error as error:
        if is_damage(error):
            fix = "Run the command again with the store on: a damaged one is put aside and what it holds is saved."
        elif getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            fix = "Make room on the disk and run the same command again: what was stored before is safe."
        else:
            fix = "See that the file and its folder can be read and written."
        raise TapirError(f"the store cannot be used: {error}", where=str(path), fix=fix) from error
    except OSError as error:
        raise TapirError(
            f"the store cannot be used: {error.strerror or error}",
            where=str(path),
            fix="See that the folder can be written.",
        ) from error
