"""The rows of the store's tables (calls, uses, failed attempts) and how the writer inserts them."""

import re
import sqlite3
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from tapir_local.store import keys
from tapir_local.store.compression import SAMPLE_WINDOW, compress_text, decompress_text


@dataclass(frozen=True, slots=True)
class Call:
    """A request and the answer that is served when the same request comes again.

    `request` is the text of `keys.request_text`; its SHA-256 is the key. `answer` is the body of the reply as received.
    `kind` (endpoint, model, stage) groups similar calls, which share a sample. `seconds` is the duration; `price` is in
    the recipe's currency. `estimated` is 1 if the server gave no credible token counts; the counts are then the most
    that it may have billed.
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
    estimated: int = 0


@dataclass(frozen=True, slots=True)
class Use:
    """A row of a run that used a call; `paid` is 1 if this use sent the request."""

    run: str
    round: int
    stage: str
    row: str
    key: bytes
    paid: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request that brought no usable answer; `why` says whether it was an error, a refusal or an empty answer.

    Tokens and price are what the server may have billed for it, 0 if nothing. `estimated` is 1 if they are an upper
    bound.
    """

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
    estimated: int = 0


class InFlight(NamedTuple):
    """A request that is about to be sent. Its attempt stays in the store if the process dies before the reply."""

    attempt: Attempt


class Landed(NamedTuple):
    """The request of this attempt has ended and its outcome is stored, so the attempt is removed."""

    attempt: Attempt


# The values of a row in the order of its table's columns. attrgetter is five times as fast as a dict of the fields.
CALL_VALUES = attrgetter(*(name for name in Call.__slots__ if name not in ("request", "answer", "kind")))
USE_VALUES, ATTEMPT_VALUES = attrgetter(*Use.__slots__), attrgetter(*Attempt.__slots__)
INSERT_CALL = (
    "insert or ignore into calls (id, key, sample, request, answer, finish, model, fingerprint, tokens_in, tokens_out,"
    " seconds, price, created, estimated) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
INSERT_USE = (
    f"insert into uses ({', '.join(Use.__slots__)}) values (?, ?, ?, ?, ?, ?)"
    " on conflict do update set paid = max(paid, excluded.paid) where excluded.paid > paid"
)
INSERT_ATTEMPT = (
    f"insert into attempts ({', '.join(Attempt.__slots__)}) values ({', '.join('?' * len(Attempt.__slots__))})"
)

RowT = TypeVar("RowT")
StoreRow = Call | Use | Attempt | InFlight | Landed


class Inserter:
    """Inserts rows for the store's writer thread; every method is called inside a transaction.

    `refresh` replaces the stored call of the same key. `damaged` holds keys whose answers could not be read; these
    calls are replaced too. Readers add to it.
    """

    def __init__(self, conn: sqlite3.Connection, refresh: bool, damaged: set[bytes]) -> None:
        self.conn, self.refresh, self.damaged = conn, refresh, damaged
        self._kinds: dict[str, Sample] = {}
        self._limits: set[tuple[int, int]] = set()
        self._sent: dict[Attempt, int] = {}

    def insert(self, rows: Sequence[StoreRow]) -> None:
        """Insert rows of all types, with one statement per type. A call whose key is already stored is skipped."""
        calls, uses = rows_of_type(rows, Call), rows_of_type(rows, Use)
        packed = [self._packed(call) for call in calls]
        for call in packed:
            if self.refresh or call[1] in self.damaged:
                self._replace(call, uses)
        self.conn.executemany(INSERT_CALL, packed)
        self._note_limits(packed, calls)
        self.conn.executemany(INSERT_USE, map(USE_VALUES, uses))
        self.conn.executemany(INSERT_ATTEMPT, map(ATTEMPT_VALUES, rows_of_type(rows, Attempt)))
        self._note_flights(
            [row.attempt for row in rows_of_type(rows, InFlight)], [row.attempt for row in rows_of_type(rows, Landed)]
        )

    def _packed(self, call: Call) -> tuple[Any, ...]:
        """A row of the table of calls: no id, key, sample, compressed request and answer, and the other fields."""
        sample = self._sample_of(call)
        texts = compress_text(call.request, sample.request), compress_text(call.answer, sample.answer)
        return (None, keys.hash_request(call.request), sample.number, *texts, *CALL_VALUES(call))

    def _note_limits(self, packed: Sequence[tuple[Any, ...]], calls: Sequence[Call]) -> None:
        """Record values of max_tokens that no earlier call of the same sample had."""
        found = {
            (row[2], limit)
            for row, call in zip(packed, calls, strict=True)
            if (limit := parse_max_tokens(call.request))
        }
        new = found - self._limits
        if new:
            self.conn.executemany(INSERT_LIMIT, sorted(new))
            self._limits |= new

    def _note_flights(self, begun: Sequence[Attempt], ended: Sequence[Attempt]) -> None:
        """Insert the attempts of requests that are about to be sent; delete those of requests that have ended."""
        for attempt in begun:
            self._sent[attempt] = self.conn.execute(INSERT_ATTEMPT, ATTEMPT_VALUES(attempt)).lastrowid or 0
        gone = [(number,) for attempt in ended if (number := self._sent.pop(attempt, None)) is not None]
        self.conn.executemany("delete from attempts where id = ?", gone)

    def _replace(self, call: tuple[Any, ...], uses: Sequence[Use]) -> None:
        """Replace the stored call of the same key. `uses` are inserted in the same transaction."""
        payers = [use for use in uses if use.paid and use.key == call[1]]
        self.conn.execute(INSERT_CALL, (self._remove_call(call[1], payers), *call[1:]))

    def _remove_call(self, key: bytes, payers: Sequence[Use]) -> int:
        """Delete the call of a key and keep its answer, if it can be read, as an attempt.

        A use that paid for it before pays a second time, so the attempt and its cost are assigned to that use. Returns
        the id for the new call. No call has had this id before; SQLite would reuse the id of the newest call.
        """
        ((unused,),) = self.conn.execute("select coalesce(max(id), 0) + 1 from calls").fetchall()
        sql = (
            "select c.answer, s.answer, c.tokens_in, c.tokens_out, c.seconds, c.price, c.created, c.estimated"
            " from calls c left join samples s on s.id = c.sample where key = ?"
        )
        for packed, sample, *rest in self.conn.execute(sql, (key,)).fetchall():
            for who in [use for use in payers if self._has_paid(use)] or [Use("", 0, "", "", key)]:
                replaced = (who.run, who.round, who.stage, who.row, "replaced", decompress_or_empty(packed, sample))
                self.conn.execute(INSERT_ATTEMPT, ATTEMPT_VALUES(Attempt(key, *replaced, *rest)))
        self.conn.execute("delete from calls where key = ?", (key,))
        self.damaged.discard(key)
        return int(unused)

    def _has_paid(self, use: Use) -> bool:
        """Whether this use is stored as paid."""
        sql = "select 1 from uses where run = ? and round = ? and stage = ? and row = ? and key = ? and paid"
        return bool(self.conn.execute(sql, USE_VALUES(use)[:5]).fetchone())

    def _sample_of(self, call: Call) -> "Sample":
        """The sample for compressing a call: the first call of its kind that any process stored."""
        if call.kind not in self._kinds:
            sample = (call.kind, call.request, call.answer[-SAMPLE_WINDOW:])
            self.conn.execute("insert or ignore into samples (name, request, answer) values (?, ?, ?)", sample)
            ask = "select id, name, request, answer from samples where name = ?"
            found = self.conn.execute(ask, (call.kind,)).fetchone()
            self.conn.execute("insert or ignore into sample_copies values (?, ?, ?, ?)", found)
            self._kinds[call.kind] = Sample(found[0], found[2], found[3])
        return self._kinds[call.kind]


class Sample(NamedTuple):
    """The request and answer that serve as dictionaries for the calls of a kind; `number` is its id."""

    number: int
    request: bytes
    answer: bytes


def rows_of_type(rows: Sequence[StoreRow], wanted: type[RowT]) -> list[RowT]:
    """The rows of one type."""
    return [row for row in rows if isinstance(row, wanted)]


def decompress_or_empty(packed: bytes, sample: bytes | None) -> bytes:
    """The decompressed answer, empty if it is damaged."""
    try:
        return decompress_text(packed, sample or b"")
    except zlib.error:
        return b""


# Values of max_tokens: a complete answer also serves a request that allows more tokens

MAX_TOKENS_FIELD = re.compile(
    rb'"max_(?:completion_)?tokens":(\d{1,18})[,}]'
)  # JSON escapes the quotes inside a string
INSERT_LIMIT = "insert or ignore into reply_limits values (?, ?)"


def parse_max_tokens(request: bytes) -> int | None:
    """The value of max_tokens in a text of `keys.request_text`; None if it has none."""
    found = MAX_TOKENS_FIELD.search(request)
    return int(found[1]) if found else None


def record_max_tokens(conn: sqlite3.Connection) -> None:
    """Fill the table reply_limits from the stored calls."""
    conn.executemany(INSERT_LIMIT, sorted(find_max_tokens(conn)))


def find_max_tokens(conn: sqlite3.Connection) -> set[tuple[int, int]]:
    """(sample, max_tokens) of the calls that can be read, up to the first damaged page."""
    found = set[tuple[int, int]]()
    with suppress(sqlite3.DatabaseError):
        samples = dict(conn.execute("select id, request from samples").fetchall())
        for number, request in conn.execute("select sample, request from calls"):
            with suppress(zlib.error, KeyError, TypeError):
                limit = parse_max_tokens(decompress_text(request, samples[number]))
                found |= {(number, limit)} if limit else set()
    return found


def max_tokens_used(conn: sqlite3.Connection, kinds: str) -> list[int]:
    """The values of max_tokens in calls whose kind begins with `kinds`, largest first."""
    known = conn.execute("select 1 from sqlite_schema where name = 'reply_limits'").fetchone()
    pairs = conn.execute("select sample, tokens from reply_limits").fetchall() if known else find_max_tokens(conn)
    names = conn.execute("select id from samples where substr(name, 1, ?) = ?", (len(kinds), kinds))
    wanted = {number for (number,) in names}
    return sorted({tokens for number, tokens in pairs if number in wanted}, reverse=True)
