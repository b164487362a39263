"""Search calls for words in their prompts and answers, with a full-text index in a file of its own.

The index is created by the first search and can be deleted at any time. It is not in the store's file, because a search
may then read a store that cannot be written, an export holds only calls, and older versions can still open the store.
"""

import re
import sqlite3
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from tapir_local.errors import TapirError
from tapir_local.files import FILE_MODE, private_file
from tapir_local.store import keys
from tapir_local.store.compression import decompress_text
from tapir_local.store.queries import (
    SELECT_CALLS,
    CountProgress,
    StoredCall,
    answer_text,
    decompress_call_or_none,
    no_progress,
    open_store,
)
from tapir_local.store.recovery import iterate_by_id, samples_of
from tapir_local.store.reply import content_text
from tapir_local.store.schema import DAMAGE_CODES, transaction
from tapir_local.store.store import explain_store_errors

INDEX_VERSION = 1  # an index of another version is rebuilt
CALLS_PER_COMMIT = 1000  # what an interrupted search has committed is kept
SNIPPET_MARGIN = 60  # characters on either side of a hit
REBUILD_CODES = (*DAMAGE_CODES, sqlite3.SQLITE_ERROR)  # the last one if a table is missing
# The index stores only the positions of words; the texts are in the store.
INDEX_TABLES = (
    "create virtual table words using fts5(prompt, answer, content='', tokenize='unicode61 remove_diacritics 2')",
    "create table indexed (id integer primary key, key blob not null) strict",
    f"pragma user_version = {INDEX_VERSION}",
)
WORD_CHARACTER = r"[^\W_]"  # a word character of FTS5's tokenizer unicode61
Hits = Iterator[tuple[int, bytes]]  # (id, key) of the matching calls, best first
Choose = Callable[[Hits], list[StoredCall]]
UNSPACED_CHARACTERS = re.compile(
    "([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
)  # kana and Chinese characters, written without spaces


def search_calls(
    path: Path,
    phrases: Sequence[str],
    *,
    run: str | None = None,
    stage: str | None = None,
    limit: int = 20,
    progress: CountProgress = no_progress,
) -> list[dict[str, Any]]:
    """The calls that contain all phrases in prompt or answer, best match first; `run` and `stage` filter them.

    Each is {key, run, round, stage, row, prompt, answer}: its first use, and the texts around the hits. Case, accents
    and punctuation are ignored. `progress` is called with (done, total) while new calls are added to the index.
    """
    query = build_fts_query(phrases)
    with open_store(path) as store:
        store.row_factory = sqlite3.Row
        wanted = keys_used_by(store, run, stage)

        def choose(hits: Hits) -> list[StoredCall]:
            found = (find_hit(path, store, *hit) for hit in hits if wanted is None or hit[1] in wanted)
            return list(islice((call for call in found if call), limit))

        calls = find_matches(path, store, query, progress, choose)
        uses = first_uses(store, run, stage, calls)
    return [
        {
            "key": call.key.hex(),
            **uses.get(call.key, {"run": "", "round": "", "stage": "", "row": ""}),
            "prompt": make_snippet(prompt_words(call.request), phrases),
            "answer": make_snippet(answer_text(call.answer), phrases),
        }
        for call in calls
    ]


def build_fts_query(phrases: Sequence[str]) -> str:
    """The phrases as an FTS5 query, quoted so that FTS5 finds no operators in them; TapirError if there is no word."""
    if not re.search(WORD_CHARACTER, " ".join(phrases)):
        raise TapirError("there is no word to search for", where=" ".join(phrases), fix="A word has letters or digits.")
    valid = (phrase.encode(errors="replace").decode().replace("\0", " ") for phrase in phrases)
    return " ".join('"' + separate_unspaced(phrase).replace('"', '""') + '"' for phrase in valid)


def separate_unspaced(text: str) -> str:
    """Put spaces around characters of scripts written without spaces, so that each is indexed as a word."""
    return text if text.isascii() else UNSPACED_CHARACTERS.sub(r" \1 ", text)


def find_matches(
    path: Path, store: sqlite3.Connection, query: str, progress: CountProgress, choose: Choose
) -> list[StoredCall]:
    """What `choose` takes of the matching calls, best first; an index that cannot be used is rebuilt."""
    place = path.with_name(f"{path.name}.search")
    with explain_store_errors(place):
        private_file(Path(f"{place}.lock"))
    with explain_store_errors(place), FileLock(f"{place}.lock", mode=FILE_MODE):
        try:
            return query_index(place, store, query, progress, choose)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in REBUILD_CODES:
                raise
        delete_index(place)
        return query_index(place, store, query, progress, choose)


def query_index(
    place: Path, store: sqlite3.Connection, query: str, progress: CountProgress, choose: Choose
) -> list[StoredCall]:
    """What `choose` takes of the matching calls, after new calls are added to the index.

    It reads them one by one: a common word is in most calls, and a large store has millions.
    """
    with closing(open_or_create_index(place, store)) as index:
        index_new_calls(index, store, progress)
        sql = (
            "select i.id, i.key from words join indexed i on i.id = words.rowid"
            " where words match ? order by words.rank, i.id desc"
        )
        return choose(iter(index.execute(sql, (query,))))


def open_or_create_index(place: Path, store: sqlite3.Connection) -> sqlite3.Connection:
    """Open the index of a store; create it if it is missing or belongs to another version or store."""
    index = connect_index(place)
    try:
        if index_matches_store(index, store):
            return index
        index.close()
        delete_index(place)
        index = connect_index(place)
        with transaction(index):
            for statement in INDEX_TABLES:
                index.execute(statement)
    except BaseException:
        index.close()
        raise
    return index


def connect_index(place: Path) -> sqlite3.Connection:
    """Connect to the index's file, which only its owner may read; an empty file is created if there is none."""
    private_file(place)
    return sqlite3.connect(place, isolation_level=None)


def index_matches_store(index: sqlite3.Connection, store: sqlite3.Connection) -> bool:
    """Whether an index belongs to this version and this store.

    Ids only grow and are never used twice, so another store has another call under the highest id that both have.
    """
    if index.execute("pragma user_version").fetchone()[0] != INDEX_VERSION:
        return False
    last, newest = highest_id(index, "indexed"), highest_id(store, "calls")
    for number, key in index.execute("select id, key from indexed order by id desc"):
        found = store.execute("select key from calls where id = ?", (number,)).fetchone()
        if found:
            return bool(found[0] == key) and last <= newest
    return not last


def highest_id(conn: sqlite3.Connection, table: str) -> int:
    """The highest id of a table, 0 if it is empty."""
    return int(conn.execute(f"select coalesce(max(id), 0) from {table}").fetchone()[0])


def delete_index(place: Path) -> None:
    """Delete the files of an index."""
    for ending in ("", "-journal", "-wal", "-shm"):
        place.with_name(place.name + ending).unlink(missing_ok=True)


def index_new_calls(index: sqlite3.Connection, store: sqlite3.Connection, progress: CountProgress) -> None:
    """Add new calls to the index. A damaged call is skipped for good, because its replacement gets a new id."""
    last = highest_id(index, "indexed")
    total, done = store.execute("select count(*) from calls where id > ?", (last,)).fetchone()[0], 0
    samples = samples_of(store) if total else {}
    rows = iterate_by_id(store, "calls", last)
    while batch := list(islice(rows, CALLS_PER_COMMIT)):
        texts = [(row["id"], *found) for row in batch if (found := indexed_texts(row, samples))]
        with transaction(index):
            index.executemany("insert into words (rowid, prompt, answer) values (?, ?, ?)", texts)
            index.executemany("insert into indexed values (?, ?)", [(row["id"], row["key"]) for row in batch])
        done += len(batch)
        progress(done, total)


def indexed_texts(row: sqlite3.Row, samples: dict[int, sqlite3.Row]) -> tuple[str, str] | None:
    """The prompt and answer of a call as they are indexed; None if they cannot be read."""
    try:
        sample = samples[row["sample"]]
        prompt = prompt_words(decompress_text(row["request"], sample["request"]))
        return separate_unspaced(prompt), separate_unspaced(
            answer_text(decompress_text(row["answer"], sample["answer"]))
        )
    except (zlib.error, KeyError, TypeError, ValueError, AttributeError):  # damaged, or not written by this program
        return None


def prompt_words(request: bytes) -> str:
    """The texts of a request's messages, joined by empty lines."""
    return "\n\n".join(content_text(turn.get("content")) for turn in keys.request_fields(request).get("messages", ()))


def keys_used_by(store: sqlite3.Connection, run: str | None, stage: str | None) -> set[bytes] | None:
    """The keys used by a run and a stage; None if neither is given."""
    if run is None and stage is None:
        return None
    sql = "select key from uses where (? is null or run = ?) and (? is null or stage = ?)"
    return {key for (key,) in store.execute(sql, (run, run, stage, stage))}


def find_hit(path: Path, store: sqlite3.Connection, number: int, key: bytes) -> StoredCall | None:
    """The call of a hit; None if it was replaced or cannot be read. TapirError if the store's file is damaged."""
    with explain_store_errors(path):  # an error of SQLite would be taken for one of the index
        row = store.execute(f"{SELECT_CALLS} where c.id = ? and c.key = ?", (number, key)).fetchone()
    return decompress_call_or_none(tuple(row)) if row else None


def first_uses(
    store: sqlite3.Connection, run: str | None, stage: str | None, calls: Sequence[StoredCall]
) -> dict[bytes, dict[str, Any]]:
    """The first use of each call by run, round, stage and row, among those of the given run and stage; by key."""
    sql = (
        "select key, run, round, stage, row from uses where hex(key) in (select value from json_each(?))"
        " and (? is null or run = ?) and (? is null or stage = ?) order by run desc, round desc, stage desc, row desc"
    )
    wanted = orjson.dumps([call.key.hex().upper() for call in calls]).decode()
    found = store.execute(sql, (wanted, run, run, stage, stage))
    return {key: {"run": name, "round": number, "stage": step, "row": row} for key, name, number, step, row in found}


def make_snippet(text: str, phrases: Sequence[str]) -> str:
    """The text around the first hit of each phrase; the beginning of the text if there is no hit."""
    flat = strip_case_and_accents(text)
    places = sorted(place for phrase in phrases if (place := find_phrase(phrase, flat)))
    pieces: list[tuple[int, int]] = []
    for start, end in places or [(0, SNIPPET_MARGIN)]:
        begin, stop = max(0, start - SNIPPET_MARGIN), end + SNIPPET_MARGIN
        if pieces and begin <= pieces[-1][1]:
            begin = pieces.pop()[0]
        pieces.append((begin, stop))
    shown = " … ".join(" ".join(text[begin:stop].split()) for begin, stop in pieces)
    return ("… " if pieces[0][0] else "") + shown + (" …" if pieces[-1][1] < len(text) else "")


def find_phrase(phrase: str, flat: str) -> tuple[int, int] | None:
    """The span of a phrase in a text without case and accents: as whole words, else anywhere; None if absent."""
    words = r"[\W_]*".join(
        re.escape(word) for word in re.findall(f"{WORD_CHARACTER}+", separate_unspaced(strip_case_and_accents(phrase)))
    )
    found = words and (re.search(f"(?<!{WORD_CHARACTER}){words}(?!{WORD_CHARACTER})", flat) or re.search(words, flat))
    return found.span() if found else None


def strip_case_and_accents(text: str) -> str:
    """The text in lower case without accents; every character keeps its position."""
    if text.isascii():
        return text.lower()
    return "".join(unicodedata.normalize("NFD", char)[0].lower()[0] for char in text)
