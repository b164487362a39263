"""Which values of max_tokens a store's calls were asked with: a whole answer serves a request with a larger one too."""

import re
import sqlite3
import zlib
from contextlib import suppress

from tapir_local.store.compression import unpack

LIMIT = re.compile(rb'"max_(?:completion_)?tokens":(\d{1,18})[,}]')  # no quoted text has a bare quote in it
ADD_LIMIT = "insert or ignore into reply_limits values (?, ?)"


def limit_of(request: bytes) -> int | None:
    """The tokens that a request, as keys.asked wrote it, allows a reply; None where it sets no limit."""
    found = LIMIT.search(request)
    return int(found[1]) if found else None


def note_limits(conn: sqlite3.Connection) -> None:
    """Fill reply_limits from the calls of a store that has none yet."""
    conn.executemany(ADD_LIMIT, sorted(limits_in(conn)))


def limits_in(conn: sqlite3.Connection) -> set[tuple[int, int]]:
    """(sample, tokens) of the calls that can be read, up to the first damaged page."""
    found = set[tuple[int, int]]()
    with suppress(sqlite3.DatabaseError):
        samples = dict(conn.execute("select id, request from samples").fetchall())
        for number, request in conn.execute("select sample, request from calls"):
            with suppress(zlib.error, KeyError, TypeError):
                limit = limit_of(unpack(request, samples[number]))
                found |= {(number, limit)} if limit else set()
    return found


def reply_limits(conn: sqlite3.Connection, kinds: str) -> list[int]:
    """The values of max_tokens that calls of the kinds whose name begins so were asked with, largest first."""
    known = conn.execute("select 1 from sqlite_schema where name = 'reply_limits'").fetchone()
    pairs = conn.execute("select sample, tokens from reply_limits").fetchall() if known else limits_in(conn)
    names = conn.execute("select id from samples where substr(name, 1, ?) = ?", (len(kinds), kinds))
    wanted = {number for (number,) in names}
    return sorted({tokens for number, tokens in pairs if number in wanted}, reverse=True)
