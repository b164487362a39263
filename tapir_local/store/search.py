"""Find calls by the words of their prompts and answers, through an index beside the store that can always be remade."""

import re
import sqlite3
import unicodedata
import zlib
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from tapir_local.errors import TapirError
from tapir_local.files import FILE_MODE, private_file
from tapir_local.records import noop
from tapir_local.store import keys
from tapir_local.store.compression import unpack
from tapir_local.store.queries import STORED, CountProgress, StoredCall, opened, readable, text_of
from tapir_local.store.reply import text_of as words_of
from tapir_local.store.schema import DAMAGED, numbered, samples_of, transaction
from tapir_local.store.store import explained

VERSION = 1  # of the index; another is remade
BATCH = 1000  # calls of a commit: what an interrupted search has indexed stays
AROUND = 60  # characters shown on either side of a hit
REMADE = (*DAMAGED, sqlite3.SQLITE_ERROR)  # the last where a table is missing
# The index keeps no texts, only where which word is: the texts are in the store.
TABLES = (
    "create virtual table words using fts5(prompt, answer, content='', tokenize='unicode61 remove_diacritics 2')",
    "create table indexed (id integer primary key, key blob not null) strict",
    f"pragma user_version = {VERSION}",
)
WORD = r"[^\W_]"  # as FTS5's unicode61 has it
UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")  # kana and Chinese characters


def search(
    path: Path,
    phrases: Sequence[str],
    *,
    run: str | None = None,
    stage: str | None = None,
    limit: int = 20,
    progress: CountProgress = noop,
) -> list[dict[str, Any]]:
    """The calls that have all the phrases in prompt and answer together, the best first; of this run, this stage.

    Each as {key, run, round, stage, row, prompt, answer}: where it was used first, and the texts around the hits.
    Capitals and accents do not count, nor does what is neither letter nor digit. `progress` is called with (done, all)
    while calls are indexed that have come since the last search.
    """
    query = query_of(phrases)
    with opened(path) as store:
        store.row_factory = sqlite3.Row
        wanted = keys_used(store, run, stage)
        hits = (hit for hit in matches(path, store, query, progress) if wanted is None or hit[1] in wanted)
        calls = list(islice((call for hit in hits if (call := stored(store, *hit))), limit))
        uses = uses_of(store, run, stage, calls)
    return [
        {
            "key": call.key.hex(),
            **uses.get(call.key, {"run": "", "round": "", "stage": "", "row": ""}),
            "prompt": snippet(prompt_of(call.request), phrases),
            "answer": snippet(text_of(call.answer), phrases),
        }
        for call in calls
    ]


def query_of(phrases: Sequence[str]) -> str:
    """The phrases in FTS5's language, quoted so that nothing in them means anything in it."""
    if not re.search(WORD, " ".join(phrases)):
        raise TapirError("there is no word to search for", where=" ".join(phrases), fix="A word has letters or digits.")
    valid = (phrase.encode(errors="replace").decode().replace("\0", " ") for phrase in phrases)
    return " ".join('"' + apart(phrase).replace('"', '""') + '"' for phrase in valid)


def apart(text: str) -> str:
    """The text with blanks between characters that are written without, so that each is found as a word."""
    return text if text.isascii() else UNSPACED.sub(r" \1 ", text)


def matches(path: Path, store: sqlite3.Connection, query: str, progress: CountProgress) -> list[tuple[int, bytes]]:
    """(id, key) of the calls with the words, the best first; an index that cannot be used is made anew."""
    place = path.with_name(f"{path.name}.search")
    with explained(place):
        private_file(Path(f"{place}.lock"))
    with explained(place), FileLock(f"{place}.lock", mode=FILE_MODE):
        try:
            return looked_up(place, store, query, progress)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in REMADE:
                raise
        remove(place)
        return looked_up(place, store, query, progress)


def looked_up(place: Path, store: sqlite3.Connection, query: str, progress: CountProgress) -> list[tuple[int, bytes]]:
    """The same from the index as it is, once the calls that it lacks are in it."""
    with closing(index_at(place, store)) as index:
        add_missing(index, store, progress)
        sql = (
            "select i.id, i.key from words join indexed i on i.id = words.rowid"
            " where words match ? order by words.rank, i.id desc"
        )
        return index.execute(sql, (query,)).fetchall()


def index_at(place: Path, store: sqlite3.Connection) -> sqlite3.Connection:
    """The index of this store, an empty one where there is none, or one of another version or store."""
    index = opened_index(place)
    try:
        if fits(index, store):
            return index
        index.close()
        remove(place)
        index = opened_index(place)
        with transaction(index):
            for statement in TABLES:
                index.execute(statement)
    except BaseException:
        index.close()
        raise
    return index


def opened_index(place: Path) -> sqlite3.Connection:
    """The index's file, that its owner alone can read; an empty one where there is none."""
    private_file(place)
    return sqlite3.connect(place, isolation_level=None)


def fits(index: sqlite3.Connection, store: sqlite3.Connection) -> bool:
    """Whether an index is of this version and this store.

    An id is of one call for ever and ids rise, so that another store has another call under the newest id of both.
    """
    if index.execute("pragma user_version").fetchone()[0] != VERSION:
        return False
    last, newest = newest_of(index, "indexed"), newest_of(store, "calls")
    for number, key in index.execute("select id, key from indexed order by id desc"):
        found = store.execute("select key from calls where id = ?", (number,)).fetchone()
        if found:
            return bool(found[0] == key) and last <= newest
    return not last


def newest_of(conn: sqlite3.Connection, table: str) -> int:
    """The highest id of a table, 0 for an empty one."""
    return int(conn.execute(f"select coalesce(max(id), 0) from {table}").fetchone()[0])


def remove(place: Path) -> None:
    """Delete an index."""
    for ending in ("", "-journal", "-wal", "-shm"):
        place.with_name(place.name + ending).unlink(missing_ok=True)


def add_missing(index: sqlite3.Connection, store: sqlite3.Connection, progress: CountProgress) -> None:
    """Index the calls that came since; one that cannot be read is passed over for good, as its answer gets a new id."""
    last = newest_of(index, "indexed")
    total, done = store.execute("select count(*) from calls where id > ?", (last,)).fetchone()[0], 0
    samples = samples_of(store) if total else {}
    rows = numbered(store, "calls", last)
    while batch := list(islice(rows, BATCH)):
        texts = [(row["id"], *found) for row in batch if (found := texts_of(row, samples))]
        with transaction(index):
            index.executemany("insert into words (rowid, prompt, answer) values (?, ?, ?)", texts)
            index.executemany("insert into indexed values (?, ?)", [(row["id"], row["key"]) for row in batch])
        done += len(batch)
        progress(done, total)


def texts_of(row: sqlite3.Row, samples: dict[int, sqlite3.Row]) -> tuple[str, str] | None:
    """Prompt and answer of a call as they are indexed; None where it cannot be read."""
    try:
        sample = samples[row["sample"]]
        prompt = prompt_of(unpack(row["request"], sample["request"]))
        return apart(prompt), apart(text_of(unpack(row["answer"], sample["answer"])))
    except (zlib.error, KeyError, TypeError, ValueError, AttributeError):  # damaged, or not of our making
        return None


def prompt_of(request: bytes) -> str:
    """The words of a request's messages."""
    return "\n\n".join(words_of(turn.get("content")) for turn in keys.fields(request).get("messages", ()))


def keys_used(store: sqlite3.Connection, run: str | None, stage: str | None) -> set[bytes] | None:
    """The keys that this run, this stage used; None where any will do."""
    if run is None and stage is None:
        return None
    sql = "select key from uses where (? is null or run = ?) and (? is null or stage = ?)"
    return {key for (key,) in store.execute(sql, (run, run, stage, stage))}


def stored(store: sqlite3.Connection, number: int, key: bytes) -> StoredCall | None:
    """The call of a hit; None where it was replaced since, or cannot be read."""
    row = store.execute(f"{STORED} where c.id = ? and c.key = ?", (number, key)).fetchone()
    return readable(tuple(row)) if row else None


def uses_of(
    store: sqlite3.Connection, run: str | None, stage: str | None, calls: Sequence[StoredCall]
) -> dict[bytes, dict[str, Any]]:
    """By key, where a call was used: the first by run, round, stage and row of those that were wanted."""
    sql = (
        "select key, run, round, stage, row from uses where hex(key) in (select value from json_each(?))"
        " and (? is null or run = ?) and (? is null or stage = ?) order by run desc, round desc, stage desc, row desc"
    )
    wanted = orjson.dumps([call.key.hex().upper() for call in calls]).decode()
    found = store.execute(sql, (wanted, run, run, stage, stage))
    return {key: {"run": name, "round": number, "stage": step, "row": row} for key, name, number, step, row in found}


def snippet(text: str, phrases: Sequence[str]) -> str:
    """The text around the first place of each phrase; its beginning where it has none of them."""
    flat = folded(text)
    places = sorted(place for phrase in phrases if (place := place_of(phrase, flat)))
    pieces: list[tuple[int, int]] = []
    for start, end in places or [(0, AROUND)]:
        begin, stop = max(0, start - AROUND), end + AROUND
        if pieces and begin <= pieces[-1][1]:
            begin = pieces.pop()[0]
        pieces.append((begin, stop))
    shown = " … ".join(" ".join(text[begin:stop].split()) for begin, stop in pieces)
    return ("… " if pieces[0][0] else "") + shown + (" …" if pieces[-1][1] < len(text) else "")


def place_of(phrase: str, flat: str) -> tuple[int, int] | None:
    """Where a folded text has the phrase: as whole words, else anywhere."""
    words = r"[\W_]*".join(re.escape(word) for word in re.findall(f"{WORD}+", apart(folded(phrase))))
    found = words and (re.search(f"(?<!{WORD}){words}(?!{WORD})", flat) or re.search(words, flat))
    return found.span() if found else None


def folded(text: str) -> str:
    """The text without capitals and accents, every character in its place."""
    if text.isascii():
        return text.lower()
    return "".join(unicodedata.normalize("NFD", char)[0].lower()[0] for char in text)
