"""Count, list, read, compare and verify the calls in a store."""

import difflib
import sqlite3
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.store import keys
from tapir_local.store.compression import decompress_text
from tapir_local.store.reply import MAX_TOKEN_COUNT, parse_reply, parse_reply_json
from tapir_local.store.schema import connect, is_damage_error

DAMAGED_ANSWER = "(damaged)"
KEY_BYTES = 32
# The stages that send requests, by their names in the store.
ASKING_STAGES = frozenset({"label", "tasks", "holdout", "seeds", "judge", "expand", "refine", "holdout-judge"})
SELECT_CALLS = (
    "select c.key, c.request, c.answer, s.request, s.answer, c.model, c.tokens_in, c.tokens_out, c.seconds,"
    " c.created, c.id"
    " from calls c left join samples s on s.id = c.sample"
)


CountProgress = Callable[[int, int], None]  # called with (done, total)


def no_progress(done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class StoredCall:
    """A decompressed call; its key is the hash of `request`, a text of `keys.request_text`.

    `id` grows with every stored call, so it gives the order of storing even if the clock was changed.
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

    def to_dict(self) -> dict[str, Any]:
        """The fields of the request, the raw answer, and the time, tokens and duration of the call."""
        asked = keys.request_fields(self.request)
        when = datetime.fromtimestamp(self.created, UTC).isoformat(timespec="seconds")
        numbers = {"tokens_in": self.tokens_in, "tokens_out": self.tokens_out, "seconds": round(self.seconds, 3)}
        return {"key": self.key.hex(), "created": when, **asked, "answer": parse_stored_answer(self.answer), **numbers}


def parse_stored_answer(answer: bytes) -> Any:
    """The JSON of a raw reply, as tolerantly as it was read when it was paid for; its text if it is not JSON."""
    try:
        return parse_reply_json(answer)
    except ValueError:
        return answer.decode(errors="replace")


@contextmanager
def open_store(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a store for reading; TapirError if it does not exist or cannot be read."""
    if not path.exists():
        raise TapirError(
            "there is no store yet", where=str(path), fix="The first call creates it. --cache names another folder."
        )
    try:
        conn = connect(path, write=False)
        try:
            yield conn
        finally:
            conn.close()
    except sqlite3.DatabaseError as error:
        fix = "Check that the file and its folder can be read."
        if is_damage_error(error):
            fix = "The next run moves a damaged store away and saves the calls that can be read."
        raise TapirError(f"the store cannot be read: {error}", where=str(path), fix=fix) from error
    except UnicodeEncodeError as error:
        raise TapirError("a name that is not valid text", where=repr(error.object)) from error


def decompress_call(row: tuple[Any, ...]) -> StoredCall:
    """Decompress a row of SELECT_CALLS; zlib.error if it is damaged."""
    key, request, answer, request_sample, answer_sample, *rest = row
    if request_sample is None:
        raise zlib.error("its sample is missing")
    return StoredCall(key, decompress_text(request, request_sample), decompress_text(answer, answer_sample), *rest)


def decompress_call_or_none(row: tuple[Any, ...]) -> StoredCall | None:
    """Decompress a row of SELECT_CALLS; None if it is damaged."""
    try:
        return decompress_call(row)
    except zlib.error:
        return None


def refuse_unknown(path: Path, *, run: str | None = None, stage: str | None = None, number: int | None = None) -> None:
    """TapirError if no call or attempt in the store has the given run, stage or round; it lists those that exist.

    A run that has a folder in the cache, and a stage of ASKING_STAGES, are accepted too.
    """
    sql = "select run, stage, round from uses union select run, stage, round from attempts where run != ''"
    with open_store(path) as conn:
        found = {tuple(row) for row in conn.execute(sql)}
    runs = {name for name, _, _ in found}
    if run is not None and run not in runs and not (path.parent / "runs" / run).is_dir():
        raise unknown_name_error(f"there are no calls of a run {run!r}", run, runs, path, "Runs")
    mine = [row for row in found if run is None or row[0] == run]
    if stage is not None and stage not in (stages := {row[1] for row in mine}) and stage not in ASKING_STAGES:
        raise unknown_name_error(f"there are no calls of a stage {stage!r}", stage, stages, path, "Stages")
    if number is not None and number not in (numbers := {row[2] for row in mine}):
        raise unknown_name_error(f"there are no calls of round {number}", "", set(map(str, numbers)), path, "Rounds")


def unknown_name_error(what: str, word: str, known: Collection[str], path: Path, names: str) -> TapirError:
    """The error for a run, stage or round that no call has, with the closest known name."""
    near = difflib.get_close_matches(word, known, 1)
    meant = f"Did you mean {near[0]}? " if near else ""
    return TapirError(what, where=str(path), fix=f"{meant}{names} with calls: {', '.join(sorted(known)) or 'none'}.")


def measure_store(path: Path) -> tuple[int, int]:
    """(number of calls, bytes on the disk), including the write-ahead log."""
    with open_store(path) as conn:
        ((count,),) = conn.execute("select count(*) from calls").fetchall()
        log = path.with_name(f"{path.name}-wal")
        return count, path.stat().st_size + (log.stat().st_size if log.exists() else 0)


def count_uses(path: Path, run: str | None = None) -> list[dict[str, Any]]:
    """Numbers of used and paid calls, and tokens of the paid ones, by run, round and stage."""
    sql = (
        "select u.run, u.round, u.stage, count(*) as used, sum(u.paid) as paid,"
        f" sum(u.paid * min(c.tokens_in, {MAX_TOKEN_COUNT})) as tokens_in,"
        f" sum(u.paid * min(c.tokens_out, {MAX_TOKEN_COUNT})) as tokens_out"
        " from uses u join calls c on c.key = u.key where ? is null or u.run = ?"
        " group by u.run, u.round, u.stage order by u.run, u.round, min(c.id)"
    )
    with open_store(path) as conn:
        found = conn.execute(sql, (run, run))
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found]


def list_uses(path: Path, run: str | None, stage: str | None, limit: int) -> list[dict[str, Any]]:
    """The newest uses as {key, run, round, stage, row, paid, answer}; `answer` is the text of the reply."""
    sql = (
        "select u.run, u.round, u.stage, u.row, u.paid, k.* from uses u join (" + SELECT_CALLS + ") k on k.key = u.key"
        " where (? is null or u.run = ?) and (? is null or u.stage = ?)"
        " order by k.id desc, u.run, u.round, u.stage, u.row limit ?"
    )
    rows = []
    with open_store(path) as conn:
        for name, number, step, row, paid, *stored in conn.execute(sql, (run, run, stage, stage, limit)):
            call = decompress_call_or_none(tuple(stored))
            use = {"key": stored[0].hex(), "run": name, "round": number, "stage": step, "row": row, "paid": bool(paid)}
            rows.append({**use, "answer": answer_text(call.answer) if call else DAMAGED_ANSWER})
    return rows


def answer_text(answer: bytes) -> str:
    """The text of a raw reply; "" if it has none."""
    try:
        return parse_reply(answer).text
    except ValueError:
        return ""


def get_call(path: Path, prefix: str) -> dict[str, Any]:
    """The call whose key begins with these hexadecimal digits, as a dict; TapirError if not exactly one does."""
    with open_store(path) as conn:
        return find_call(conn, path, prefix).to_dict()


def find_call(conn: sqlite3.Connection, path: Path, prefix: str) -> StoredCall:
    """The call whose key begins with these hexadecimal digits; TapirError if not exactly one does, or it is damaged."""
    try:
        first, last = (bytes.fromhex(prefix.ljust(2 * KEY_BYTES, digit)) for digit in "0f")
    except ValueError:
        rows = []
    else:
        sql = f"{SELECT_CALLS} where c.key between ? and ? order by c.id limit 2"
        rows = conn.execute(sql, (first, last)).fetchall()
    if len(rows) != 1:
        many = "several calls'" if rows else "no call's"
        raise TapirError(f"{prefix!r} begins {many} key", where=str(path), fix="`tapir-local calls list` shows keys.")
    call = decompress_call_or_none(rows[0])
    if call is None:
        fix = "The next run that needs it asks again and replaces it."
        raise TapirError("this call is damaged", where=f"{path}, {rows[0][0].hex()}", fix=fix)
    return call


def compare_calls(path: Path, one: str, other: str | None = None) -> dict[str, Any]:
    """Compare the requests of two calls; without `other`, of a call and the one with the most similar request.

    {"a": key, "b": key, "sentences": [one per difference], "differences": [{"field", "a", "b"}]}; a value that is
    absent in a request is absent here too. TapirError if a key is not of exactly one call, or there is no other call.
    """
    with open_store(path) as conn:
        a = find_call(conn, path, one)
        b = find_call(conn, path, other) if other is not None else find_nearest_call(conn, path, a)
    found = list(keys.find_differences(keys.request_fields(a.request), keys.request_fields(b.request)))
    return {
        "a": a.key.hex(),
        "b": b.key.hex(),
        "sentences": [keys.describe_difference(difference) for difference in found],
        "differences": [{"field": field, **drop_absent({"a": here, "b": there})} for field, here, there in found],
    }


def drop_absent(values: dict[str, Any]) -> dict[str, Any]:
    """The values other than ABSENT."""
    return {name: value for name, value in values.items() if value is not keys.ABSENT}


def find_nearest_call(conn: sqlite3.Connection, path: Path, call: StoredCall) -> StoredCall:
    """The other call with the most similar request; TapirError if there is none."""
    sql = f"{SELECT_CALLS} where c.id <> ? order by c.id"
    others = (decompress_call_or_none(row) for row in conn.execute(sql, (call.id,)))
    sound = (other.request for other in others if other and keys.hash_request(other.request) == other.key)
    found = keys.find_nearest_request(call.request, sound)
    if found is None:
        raise TapirError("there is no other call to compare it with", where=str(path))
    return find_call(conn, path, keys.hash_request(found).hex())


def verify_calls(path: Path) -> tuple[int, list[str]]:
    """(number of calls, keys of those that are damaged or whose key is not the hash of their request)."""
    count, bad = 0, []
    with open_store(path) as conn:
        for row in conn.execute(SELECT_CALLS):
            count += 1
            try:
                sound = keys.hash_request(decompress_call(row).request) == row[0]
            except zlib.error:
                sound = False
            if not sound:
                bad.append(row[0].hex())
    return count, bad


def find_missing_keys(path: Path, wanted: Iterable[str]) -> list[str]:
    """The hexadecimal keys in `wanted` that no call has."""
    with open_store(path) as conn:
        have = {row[0].hex() for row in conn.execute("select key from calls")}
    return [key for key in wanted if key not in have]


# Stores of older versions may hold impossible counts from servers, which would overflow a sum.
BOUNDED_TOKENS = f"min(tokens_in, {MAX_TOKEN_COUNT}) + min(tokens_out, {MAX_TOKEN_COUNT})"


def count_paid_and_hits(path: Path, run: str) -> dict[str, int] | None:
    """{"paid", "hits"}: the numbers of calls that a run paid for and found; None if there is no readable store."""
    if not path.exists():
        return None
    try:
        with closing(connect(path, write=False)) as conn:
            sql = "select count(*), coalesce(sum(paid), 0) from uses where run = ?"
            used, paid = conn.execute(sql, (run,)).fetchone()
    except sqlite3.DatabaseError:  # damaged, or not a store: the next run repairs or creates it
        return None
    return {"paid": paid, "hits": used - paid}


def billed_to_run(path: Path, run: str, *, estimated: bool = False) -> tuple[int, int, float]:
    """(calls, tokens, money) that may have been billed to a run; with `estimated`, only what is estimated.

    Includes failed attempts that may have been billed, such as requests in flight when an earlier process died.
    """
    conn = connect(path, write=False)
    try:
        mark = "estimated" if has_estimates(conn) else "0"
        sql = (
            "select count(*), coalesce(sum(tokens), 0), coalesce(sum(price), 0.0) from ("
            f"select {BOUNDED_TOKENS} as tokens, c.price, {mark} as mark from uses u join calls c on c.key = u.key"
            f" where u.run = ? and u.paid union all select {BOUNDED_TOKENS}, price, {mark} from attempts"
            " where run = ? and tokens_in + tokens_out > 0) where mark or not ?"
        )
        calls, tokens, money = conn.execute(sql, (run, run, estimated)).fetchone()
        return calls, tokens, money
    finally:
        conn.close()


def has_estimates(conn: sqlite3.Connection) -> bool:
    """Whether a store marks estimated token counts; a store of an older version, opened for reading, does not."""
    return any(row[1] == "estimated" for row in conn.execute("pragma table_info(calls)"))


def mean_tokens_by_stage(path: Path) -> dict[str, tuple[float, float]]:
    """The mean numbers of prompt and reply tokens of the stored calls, by stage."""
    sql = (
        "select u.stage, avg(c.tokens_in), avg(c.tokens_out) from uses u join calls c on c.key = u.key"
        " group by u.stage having avg(c.tokens_out) > 0"
    )
    with open_store(path) as conn:
        return {stage: (size_in, size_out) for stage, size_in, size_out in conn.execute(sql)}
