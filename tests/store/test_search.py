"""Search finds all calls with the words, for any words and any state of the index."""

import re
import sqlite3
import threading
from pathlib import Path
from typing import Any

import orjson
import pytest
from calls import BODY

from tapir_local.errors import TapirError
from tapir_local.store import keys
from tapir_local.store.rows import Call, Use
from tapir_local.store.search import CALLS_PER_COMMIT, make_snippet, search_calls
from tapir_local.store.store import Store

TEXTS = {
    "apples": ("How many apples has Ann?", "Ann has 5 apples."),
    "pears": ("How many pears has Ann? Think of state-of-the-art methods.", "Ann has two; AND that is it."),
    "café": ("Où est le café?", "Près du pont."),
    "数学": ("我喜欢数学吗", "是的"),
}


def call(prompt: str, answer: str) -> Call:
    body = {**BODY, "messages": [{"role": "user", "content": prompt}]}
    raw = orjson.dumps({"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]})
    return Call(keys.request_text("http://localhost/v1", body, 0), raw, "stop", "answers")


def put(path: Path, texts: dict[str, tuple[str, str]], stage: str = "seeds", mode: Any = "on") -> None:
    with Store(path, mode) as store:
        for row, words in texts.items():
            key = keys.hash_request(call(*words).request)
            store.put(call(*words), [Use("one", 0, stage, row, key, 1)]).result()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    put(tmp_path / "teacher.db", TEXTS)
    return tmp_path / "teacher.db"


def found(path: Path, *phrases: str, **options: Any) -> list[str]:
    return [row["row"] for row in search_calls(path, phrases, **options)]


def index_of(path: Path) -> Path:
    return path.with_name("teacher.db.search")


def test_words_of_prompt_and_answer_together(path: Path) -> None:
    assert found(path, "apples") == ["apples"]
    assert set(found(path, "MANY", "ann")) == {"apples", "pears"}
    assert found(path, "many", "two") == ["pears"]
    assert found(path, "many", "bananas") == []


def test_words_of_a_phrase_must_be_adjacent(path: Path) -> None:
    assert found(path, "many pears") == ["pears"]
    assert found(path, "pears many") == []


def test_fields_of_a_hit(path: Path) -> None:
    (row,) = search_calls(path, ["apples"])
    assert row["key"] == keys.hash_request(call(*TEXTS["apples"]).request).hex()
    assert (row["run"], row["round"], row["stage"], row["row"]) == ("one", 0, "seeds", "apples")
    assert (row["prompt"], row["answer"]) == TEXTS["apples"]


def test_filters_and_the_limit(path: Path) -> None:
    put(path, {"apples again": TEXTS["apples"]}, stage="refine")
    assert found(path, "apples", stage="refine") == ["apples again"]
    assert found(path, "apples", run="two") == []
    assert len(found(path, "ann", limit=1)) == 1


def test_a_call_that_no_row_used_is_found_too(path: Path) -> None:
    with Store(path) as store:
        store.put(call("Name a fruit.", "Quince.")).result()
    assert found(path, "quince") == [""]


@pytest.mark.parametrize(
    "word", ['"', "-", "*", "(", "+", "^", "{}", 'two" AND', "AND", "-two", "two*", '"two', "two:"]
)
def test_fts5_syntax_in_a_phrase_is_ignored(path: Path, word: str) -> None:
    assert sorted(found(path, word, "ann")) == (["pears"] if re.search(r"\w", word) else ["apples", "pears"])


@pytest.mark.parametrize("word", ["NOT", "two NOT that", "NEAR(ann two)", "answer:two", "ann OR two"])
def test_fts5_operators_in_a_phrase_are_words(path: Path, word: str) -> None:
    assert found(path, word) == []


def test_a_search_without_words_is_an_error(path: Path) -> None:
    with pytest.raises(TapirError, match="no word"):
        search_calls(path, ['"*', "-"])


def test_invalid_text_in_a_phrase_is_not_an_error(path: Path) -> None:
    assert found(path, "apples\udcff\0") == ["apples"]


def test_words_with_dashes_accents_and_without_spaces(path: Path) -> None:
    assert found(path, "state-of-the-art") == ["pears"]
    assert found(path, "CAFE") == found(path, "café") == ["café"]
    assert found(path, "数学") == found(path, "喜欢") == ["数学"]
    assert found(path, "学数") == []


def test_a_later_search_indexes_only_new_calls(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    search_calls(path, ["ann"], progress=lambda done, total: seen.append((done, total)))
    search_calls(path, ["ann"], progress=lambda done, total: seen.append((done, total)))
    put(path, {"plums": ("How many plums?", "6")})
    assert found(path, "plums", progress=lambda done, total: seen.append((done, total))) == ["plums"]
    assert seen == [(len(TEXTS), len(TEXTS)), (1, 1)]


def test_many_calls_are_indexed_in_several_commits(tmp_path: Path) -> None:
    path, seen = tmp_path / "teacher.db", list[int]()
    with Store(path) as store:
        for number in range(CALLS_PER_COMMIT + 5):
            store.put(call(f"What is {number} + 1?", str(number + 1)))
    assert len(search_calls(path, [str(CALLS_PER_COMMIT)], progress=lambda done, total: seen.append(done))) == 2
    assert seen == [CALLS_PER_COMMIT, CALLS_PER_COMMIT + 5]


def test_a_search_does_not_change_the_store(path: Path) -> None:
    before = path.read_bytes()
    path.chmod(0o400)
    assert found(path, "apples") == ["apples"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("row", ["café", "数学"], ids=["not the newest", "the newest"])
def test_a_replaced_answer_is_no_longer_found(path: Path, row: str) -> None:
    prompt, answer = TEXTS[row]
    assert (found(path, answer), found(path, "bridge")) == ([row], [])
    put(path, {row: (prompt, "Near the bridge.")}, mode="refresh")
    assert (found(path, answer), found(path, "bridge")) == ([], [row])


def test_a_damaged_call_is_skipped(path: Path) -> None:
    conn = sqlite3.connect(path)
    conn.execute("update calls set answer = x'00' where id = 1")
    conn.commit()
    assert found(path, "ann") == ["pears"]
    conn.execute("update calls set answer = x'00' where id = 2")  # after it was indexed
    conn.commit()
    conn.close()
    assert found(path, "ann") == []


def garbage(path: Path) -> None:
    index_of(path).write_bytes(b"nonsense" * 1000)


def emptied(path: Path) -> None:
    index_of(path).write_bytes(b"")


def cut(path: Path) -> None:
    index_of(path).write_bytes(index_of(path).read_bytes()[:4096])


def overwritten(path: Path) -> None:
    whole = index_of(path).read_bytes()
    index_of(path).write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))


def another_version(path: Path) -> None:
    change(path, "delete from indexed where id < 3", "pragma user_version = 99")


def without_a_table(path: Path) -> None:
    change(path, "drop table indexed")


def of_another_store(path: Path) -> None:
    other = path.with_name("other.db")
    put(other, dict([("plums", ("How many plums?", "6")), *list(TEXTS.items())[:-1]]))  # as many calls
    search_calls(other, ["ann"])
    other.with_name("other.db.search").replace(index_of(path))


def of_a_longer_store(path: Path) -> None:
    longer = path.with_name("longer.db")
    put(longer, {**TEXTS, "plums": ("How many plums?", "6")})
    search_calls(longer, ["ann"])
    longer.with_name("longer.db.search").replace(index_of(path))


def change(path: Path, *statements: str) -> None:
    conn = sqlite3.connect(index_of(path))
    for sql in statements:
        conn.execute(sql)
    conn.commit()
    conn.close()


@pytest.mark.parametrize(
    "damage",
    [garbage, emptied, cut, overwritten, another_version, without_a_table, of_another_store, of_a_longer_store],
    ids=lambda damage: str(damage.__name__),
)
def test_an_unusable_index_is_rebuilt(path: Path, damage: Any) -> None:
    assert found(path, "apples") == ["apples"]
    damage(path)
    seen: list[tuple[int, int]] = []
    assert found(path, "apples", progress=lambda done, total: seen.append((done, total))) == ["apples"]
    assert seen == [(len(TEXTS), len(TEXTS))]


def test_parallel_searches_create_one_index(path: Path) -> None:
    rows: list[list[str]] = []
    threads = [threading.Thread(target=lambda: rows.append(found(path, "apples"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows == [["apples"]] * 4


def test_an_index_that_cannot_be_written_is_an_error(path: Path) -> None:
    index_of(path).mkdir()
    with pytest.raises(TapirError, match=r"teacher\.db\.search"):
        search_calls(path, ["ann"])


def test_a_missing_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="no store yet"):
        search_calls(tmp_path / "teacher.db", ["ann"])
    assert not list(tmp_path.iterdir())


# Snippets


def test_a_snippet_has_the_words_and_their_context() -> None:
    text = "x " * 200 + "the needle here" + " y" * 200
    got = make_snippet(text, ["needle"])
    assert got.startswith("… x")
    assert "x the needle here y" in got
    assert got.endswith("y …")
    assert len(got) < 150


def test_a_snippet_has_each_phrase_once() -> None:
    text = "one " + "x " * 200 + "two" + " y" * 200 + " one"
    got = make_snippet(text, ["two", "one"])
    assert got.startswith("one x")
    assert " … x x" in got
    assert got.count("one") == 1


def test_a_snippet_prefers_whole_words_ignores_accents_and_finds_characters() -> None:
    assert "that art" in make_snippet("start " + "x " * 100 + "that art", ["ART"])
    assert "le café" in make_snippet("x " * 100 + "le café", ["cafe"])
    assert "喜欢数学" in make_snippet("x " * 100 + "我喜欢数学", ["数学"])


def test_a_snippet_without_a_hit_is_the_beginning() -> None:
    assert make_snippet("a b c", ["z"]) == "a b c"
    assert make_snippet("", ["z"]) == ""
