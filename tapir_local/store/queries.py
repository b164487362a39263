"""What was asked and answered: the store's calls, to be counted, listed, read, compared and verified."""

import difflib
import sqlite3
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from tapir_local.errors import TapirError
from tapir_local.store import keys
from tapir_local.store.compression import unpack
from tapir_local.store.reply import read_reply
from tapir_local.store.schema import connect
from tapir_local.store.usage import MOST

DAMAGED = "(damaged)"
KEY = 32  # bytes
# The stages that ask somebody, under the names that the store has them by.
ASKING = frozenset({"label", "tasks", "holdout", "seeds", "judge", "expand", "refine", "holdout-judge"})
STORED = (
    "select c.key, c.request, c.answer, s.request, s.answer, c.model, c.tokens_in, c.tokens_out, c.seconds,"
    " c.created, c.id"
    " from calls c left join samples s on s.id = c.sample"
)


CountProgress = Callable[[int, int], None]  # called with (done, total)


@dataclass(frozen=True)
class StoredCall:
    """A call in the store: `request` is the text its key is the hash of (version, endpoint, body, draw).

    `id` rises with every call stored, whatever the clock says.
    """

    key: bytes
    request: bytes
    answer: bytes
    model: str
    tokens_in: int
    tokens_out: int
    seconds: float
    created: float
    id: int

    def told(self) -> dict[str, Any]:
        """For people and programs: the parts of the request, the raw answer, and when."""
        asked = keys.fields(self.request)
        when = datetime.fromtimestamp(self.created, UTC).isoformat(timespec="seconds")
        numbers = {"tokens_in": self.tokens_in, "tokens_out": self.tokens_out, "seconds": round(self.seconds, 3)}
        return {"key": self.key.hex(), "created": when, **asked, "answer": orjson.loads(self.answer), **numbers}


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The store for reading; TapirError where there is none, or it cannot be read."""
    if not path.exists():
        raise TapirError(
            "there is no store yet", where=str(path), fix="The first call makes it; --cache names another."
        )
    try:
        conn = connect(path, write=False)
        try:
            yield conn
        finally:
            conn.close()
    except sqlite3.DatabaseError as error:
        fix = "The next run puts a damaged store aside and saves what it can."
        raise TapirError(f"the store cannot be read: {error}", where=str(path), fix=fix) from error
    except UnicodeEncodeError as error:
        raise TapirError("a name that is no text", where=repr(error.object)) from error


def read_row(row: tuple[Any, ...]) -> StoredCall:
    """A row of STORED, unpacked; zlib.error where it is damaged."""
    key, request, answer, request_sample, answer_sample, *rest = row
    if request_sample is None:
        raise zlib.error("its sample is gone")
    return StoredCall(key, unpack(request, request_sample), unpack(answer, answer_sample), *rest)


def readable(row: tuple[Any, ...]) -> StoredCall | None:
    """A row of STORED, unpacked; None where it is damaged."""
    try:
        return read_row(row)
    except zlib.error:
        return None


def refuse_unknown(path: Path, *, run: str | None = None, stage: str | None = None, number: int | None = None) -> None:
    """TapirError where no call or attempt in the store is of a run, a stage or a round that a command asks for.

    It names those that there are. A run whose folder is in the cache, and a stage that a run would have, are known too.
    """
    sql = "select run, stage, round from uses union select run, stage, round from attempts where run != ''"
    with opened(path) as conn:
        found = {tuple(row) for row in conn.execute(sql)}
    runs = {name for name, _, _ in found}
    if run is not None and run not in runs and not (path.parent / "runs" / run).is_dir():
        raise unknown(f"there are no calls of a run {run!r}", run, runs, path, "Runs")
    mine = [row for row in found if run is None or row[0] == run]
    if stage is not None and stage not in (stages := {row[1] for row in mine}) and stage not in ASKING:
        raise unknown(f"there are no calls of a stage {stage!r}", stage, stages, path, "Stages")
    if number is not None and number not in (numbers := {row[2] for row in mine}):
        raise unknown(f"there are no calls of round {number}", "", set(map(str, numbers)), path, "Rounds")


def unknown(what: str, word: str, known: Collection[str], path: Path, names: str) -> TapirError:
    """The error about a word that no call has."""
    near = difflib.get_close_matches(word, known, 1)
    meant = f"Did you mean {near[0]}? " if near else ""
    return TapirError(what, where=str(path), fix=f"{meant}{names} with calls: {', '.join(sorted(known)) or 'none'}.")


def size(path: Path) -> tuple[int, int]:
    """(calls stored, bytes on the disk), those of a log not yet merged among them."""
    with opened(path) as conn:
        ((count,),) = conn.execute("select count(*) from calls").fetchall()
        log = path.with_name(f"{path.name}-wal")
        return count, path.stat().st_size + (log.stat().st_size if log.exists() else 0)


def stats(path: Path, run: str | None = None) -> list[dict[str, Any]]:
    """Calls used, paid for, and their tokens, by run, round and stage; tokens are those of paid calls."""
    sql = (
        "select u.run, u.round, u.stage, count(*) as used, sum(u.paid) as paid,"
        f" sum(u.paid * min(c.tokens_in, {MOST})) as tokens_in, sum(u.paid * min(c.tokens_out, {MOST})) as tokens_out"
        " from uses u join calls c on c.key = u.key where ? is null or u.run = ?"
        " group by u.run, u.round, u.stage order by u.run, u.round, min(c.id)"
    )
    with opened(path) as conn:
        found = conn.execute(sql, (run, run))
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found]


def listed(path: Path, run: str | None, stage: str | None, limit: int) -> list[dict[str, Any]]:
    """The newest uses: key, run, round, stage, row, and the beginning of the answer's text."""
    sql = (
        "select u.run, u.round, u.stage, u.row, u.paid, k.* from uses u join (" + STORED + ") k on k.key = u.key"
        " where (? is null or u.run = ?) and (? is null or u.stage = ?)"
        " order by k.id desc, u.run, u.round, u.stage, u.row limit ?"
    )
    rows = []
    with opened(path) as conn:
        for name, number, step, row, paid, *stored in conn.execute(sql, (run, run, stage, stage, limit)):
            call = readable(tuple(stored))
            use = {"key": stored[0].hex(), "run": name, "round": number, "stage": step, "row": row, "paid": bool(paid)}
            rows.append({**use, "answer": text_of(call.answer) if call else DAMAGED})
    return rows


def text_of(answer: bytes) -> str:
    """The text of a raw reply; "" where it has none."""
    try:
        return read_reply(answer).text
    except ValueError:
        return ""


def shown(path: Path, prefix: str) -> dict[str, Any]:
    """The one call whose key begins with these hexadecimal digits; TapirError where there is none or several."""
    with opened(path) as conn:
        return the_one(conn, path, prefix).told()


def the_one(conn: sqlite3.Connection, path: Path, prefix: str) -> StoredCall:
    """The one call whose key begins so."""
    try:
        first, last = (bytes.fromhex(prefix.ljust(2 * KEY, digit)) for digit in "0f")
    except ValueError:
        rows = []
    else:
        sql = f"{STORED} where c.key between ? and ? order by c.id limit 2"
        rows = conn.execute(sql, (first, last)).fetchall()
    if len(rows) != 1:
        many = "several calls'" if rows else "no call's"
        raise TapirError(f"{prefix!r} begins {many} key", where=str(path), fix="`tapir-local calls list` shows keys.")
    call = readable(rows[0])
    if call is None:
        fix = "The next run that needs it asks again and replaces it."
        raise TapirError("this call is damaged", where=f"{path}, {rows[0][0].hex()}", fix=fix)
    return call


def explain(path: Path, one: str, other: str | None = None) -> dict[str, Any]:
    """Where the requests of two calls differ; without another, of the call and the one nearest to it.

    {"a": key, "b": key, "told": [a sentence for each field], "differences": [{"field", "a", "b"}]}; a value that is
    absent from a request is absent here too. TapirError where a key is of no call or several, or there is no other.
    """
    with opened(path) as conn:
        a = the_one(conn, path, one)
        b = the_one(conn, path, other) if other is not None else nearest(conn, path, a)
    found = list(keys.differences(keys.fields(a.request), keys.fields(b.request)))
    return {
        "a": a.key.hex(),
        "b": b.key.hex(),
        "told": [keys.told(difference) for difference in found],
        "differences": [{"field": field, **present({"a": here, "b": there})} for field, here, there in found],
    }


def present(values: dict[str, Any]) -> dict[str, Any]:
    """The values that are not absent."""
    return {name: value for name, value in values.items() if value is not keys.ABSENT}


def nearest(conn: sqlite3.Connection, path: Path, call: StoredCall) -> StoredCall:
    """The other call whose request reads most like this one's."""
    sql = f"{STORED} where c.id <> ? order by c.id"
    others = (readable(row) for row in conn.execute(sql, (call.id,)))
    sound = (other.request for other in others if other and keys.key_of(other.request) == other.key)
    found = keys.nearest(call.request, sound)
    if found is None:
        raise TapirError("there is no other call to compare it with", where=str(path))
    return the_one(conn, path, keys.key_of(found).hex())


def verify(path: Path) -> tuple[int, list[str]]:
    """(calls read, keys of those that are damaged or whose key is not the hash of their request)."""
    count, bad = 0, []
    with opened(path) as conn:
        for row in conn.execute(STORED):
            count += 1
            try:
                sound = keys.key_of(read_row(row).request) == row[0]
            except zlib.error:
                sound = False
            if not sound:
                bad.append(row[0].hex())
    return count, bad


def absent(path: Path, wanted: Iterable[str]) -> list[str]:
    """Those of some keys, in hexadecimal digits, that no call has."""
    with opened(path) as conn:
        have = {row[0].hex() for row in conn.execute("select key from calls")}
    return [key for key in wanted if key not in have]
