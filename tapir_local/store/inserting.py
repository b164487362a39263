"""How the store's writer puts rows into the tables: calls packed, paid for again or not, requests in flight."""

import sqlite3
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from tapir_local.records import T
from tapir_local.store import keys
from tapir_local.store.compression import WINDOW, pack, unpack
from tapir_local.store.reply_limits import ADD_LIMIT, limit_of
from tapir_local.store.rows import (
    AS_IT_IS,
    ATTEMPT,
    INSERT_ATTEMPT,
    INSERT_CALL,
    INSERT_USE,
    USE,
    Attempt,
    Call,
    InFlight,
    Landed,
    Use,
)

Row = Call | Use | Attempt | InFlight | Landed


class Inserter:
    """The writer's side of the tables, for one thread; every method is called within a transaction.

    `refresh`: a call takes the place of the one of its key. `damaged` are the keys whose answers could not be read,
    and are replaced too; readers add to it.
    """

    def __init__(self, conn: sqlite3.Connection, refresh: bool, damaged: set[bytes]) -> None:
        self.conn, self.refresh, self.damaged = conn, refresh, damaged
        self._kinds: dict[str, Sample] = {}
        self._limits: set[tuple[int, int]] = set()
        self._sent: dict[Attempt, int] = {}

    def insert(self, rows: Sequence[Row]) -> None:
        """Rows of every kind, each kind by one statement; calls of a key that is there already are left out."""
        calls, uses = kind(rows, Call), kind(rows, Use)
        packed = [self._packed(call) for call in calls]
        for call in packed:
            if self.refresh or call[1] in self.damaged:
                self._replace(call, uses)
        self.conn.executemany(INSERT_CALL, packed)
        self._note_limits(packed, calls)
        self.conn.executemany(INSERT_USE, map(USE, uses))
        self.conn.executemany(INSERT_ATTEMPT, map(ATTEMPT, kind(rows, Attempt)))
        self._note_flights([row.attempt for row in kind(rows, InFlight)], [row.attempt for row in kind(rows, Landed)])

    def _packed(self, call: Call) -> tuple[Any, ...]:
        """A row of the table: no id, the key, the sample, request and answer packed, and the rest as it is."""
        sample = self._sample_of(call)
        texts = pack(call.request, sample.request), pack(call.answer, sample.answer)
        return (None, keys.key_of(call.request), sample.number, *texts, *AS_IT_IS(call))

    def _note_limits(self, packed: Sequence[tuple[Any, ...]], calls: Sequence[Call]) -> None:
        """Record the values of max_tokens that are new among the calls of a sample."""
        found = {(row[2], limit) for row, call in zip(packed, calls, strict=True) if (limit := limit_of(call.request))}
        new = found - self._limits
        if new:
            self.conn.executemany(ADD_LIMIT, sorted(new))
            self._limits |= new

    def _note_flights(self, begun: Sequence[Attempt], ended: Sequence[Attempt]) -> None:
        """Insert an attempt for each request that is about to go, and remove those of requests that came to an end."""
        for attempt in begun:
            self._sent[attempt] = self.conn.execute(INSERT_ATTEMPT, ATTEMPT(attempt)).lastrowid or 0
        gone = [(number,) for attempt in ended if (number := self._sent.pop(attempt, None)) is not None]
        self.conn.executemany("delete from attempts where id = ?", gone)

    def _replace(self, call: tuple[Any, ...], uses: Sequence[Use]) -> None:
        """Insert a call in the place of the one of the same key; `uses` are those that come with it."""
        payers = [use for use in uses if use.paid and use.key == call[1]]
        self.conn.execute(INSERT_CALL, (self._make_room(call[1], payers), *call[1:]))

    def _make_room(self, key: bytes, payers: Sequence[Use]) -> int:
        """Take the answer stored under the key away, and keep it among the attempts if it can be read.

        A payer who paid for it before pays a second time, and the attempt is theirs with what it cost. Returns the id
        of the answer to come, one that no call has had: SQLite would give the newest call's again.
        """
        ((unused,),) = self.conn.execute("select coalesce(max(id), 0) + 1 from calls").fetchall()
        sql = (
            "select c.answer, s.answer, c.tokens_in, c.tokens_out, c.seconds, c.price, c.created, c.estimated"
            " from calls c left join samples s on s.id = c.sample where key = ?"
        )
        for packed, sample, *rest in self.conn.execute(sql, (key,)).fetchall():
            for who in [use for use in payers if self._has_paid(use)] or [Use("", 0, "", "", key)]:
                replaced = (who.run, who.round, who.stage, who.row, "replaced", readable(packed, sample))
                self.conn.execute(INSERT_ATTEMPT, ATTEMPT(Attempt(key, *replaced, *rest)))
        self.conn.execute("delete from calls where key = ?", (key,))
        self.damaged.discard(key)
        return int(unused)

    def _has_paid(self, use: Use) -> bool:
        """Whether the store knows this use already, as paid."""
        sql = "select 1 from uses where run = ? and round = ? and stage = ? and row = ? and key = ? and paid"
        return bool(self.conn.execute(sql, USE(use)[:5]).fetchone())

    def _sample_of(self, call: Call) -> "Sample":
        """The sample that a call is packed against: the first call of its kind, in whichever process it came."""
        if call.kind not in self._kinds:
            sample = (call.kind, call.request, call.answer[-WINDOW:])
            self.conn.execute("insert or ignore into samples (name, request, answer) values (?, ?, ?)", sample)
            ask = "select id, name, request, answer from samples where name = ?"
            found = self.conn.execute(ask, (call.kind,)).fetchone()
            self.conn.execute("insert or ignore into sample_copies values (?, ?, ?, ?)", found)
            self._kinds[call.kind] = Sample(found[0], found[2], found[3])
        return self._kinds[call.kind]


class Sample(NamedTuple):
    """What the calls of a kind are packed against."""

    number: int
    request: bytes
    answer: bytes


def kind(rows: Sequence[Row], wanted: type[T]) -> list[T]:
    """The rows of one kind."""
    return [row for row in rows if isinstance(row, wanted)]


def readable(packed: bytes, sample: bytes | None) -> bytes:
    """An answer as it came, empty where it is damaged."""
    try:
        return unpack(packed, sample or b"")
    except zlib.error:
        return b""
