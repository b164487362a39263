"""The store's calls as the commands show them, on a store that the pocket teacher filled."""

import sqlite3
from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.method import prompts
from tapir_local.recipe.endpoints import Teacher
from tapir_local.records import Message, Request
from tapir_local.store.queries import DAMAGED, explain, listed, shown, size, stats, verify
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask

POCKET = Teacher(kind="pocket", model=None)


def wanted(*texts: str, stage: str = "seeds", temperature: float = 0.0) -> list[Request]:
    return [
        Request(prompts.answer_prompt((Message("user", text),)), f"row-{text}", stage, temperature=temperature)
        for text in texts
    ]


def change(path: Path, sql: str) -> None:
    conn = sqlite3.connect(path)
    conn.execute(sql)
    conn.commit()
    conn.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two calls paid for by run `one`, of which run `two` used one."""
    with Store(tmp_path / "teacher.db") as store:
        ask(wanted("What is 2 + 3?", "What is 4 + 5?"), POCKET, store, run="one")
        ask(wanted("What is 2 + 3?", stage="refine"), POCKET, store, run="two")
    return tmp_path / "teacher.db"


def test_stats_tell_who_used_and_who_paid(path: Path) -> None:
    rows = {row["run"]: row for row in stats(path)}
    assert (rows["one"]["used"], rows["one"]["paid"]) == (2, 2)
    assert (rows["two"]["used"], rows["two"]["paid"], rows["two"]["tokens_out"]) == (1, 0, 0)
    assert [row["run"] for row in stats(path, "two")] == ["two"]


def test_bytes_that_are_no_text_are_no_run(path: Path) -> None:
    with pytest.raises(TapirError, match="no text"):
        stats(path, "one\udcff")


def test_list_has_the_answers_and_heeds_its_filters(path: Path) -> None:
    assert {row["answer"] for row in listed(path, "one", None, 9)} == {"5", "9"}
    assert [row["run"] for row in listed(path, None, "refine", 9)] == ["two"]
    assert len(listed(path, None, None, 1)) == 1


def test_show_has_the_whole_request_and_the_raw_answer(path: Path) -> None:
    key = listed(path, "two", None, 1)[0]["key"]
    found = shown(path, key[:10])
    assert found["key"] == key
    assert found["answer"]["choices"][0]["message"]["content"] == "5"
    assert "What is 2 + 3?" in str(found)


def test_a_key_that_is_not_there(path: Path) -> None:
    with pytest.raises(TapirError, match="no call's key"):
        shown(path, "zz")
    with pytest.raises(TapirError, match="several calls' key"):
        shown(path, "")


def test_verify_finds_a_changed_answer_and_a_wrong_key(path: Path) -> None:
    assert verify(path) == (2, [])
    change(path, "update calls set answer = x'00' where id = 1")
    change(path, "update calls set key = x'ab' where id = 2")
    count, bad = verify(path)
    assert count == 2
    assert len(bad) == 2


def test_calls_whose_sample_is_gone_are_damaged(path: Path) -> None:
    change(path, "delete from samples")
    assert len(verify(path)[1]) == 2


def test_a_damaged_call_is_named_and_stops_nothing(path: Path) -> None:
    change(path, "update calls set answer = x'00' where id = 1")
    rows = listed(path, "one", None, 9)
    assert [row["answer"] for row in rows] == ["9", DAMAGED]
    with pytest.raises(TapirError, match="damaged"):
        shown(path, rows[1]["key"])


def test_a_clock_that_goes_back_disturbs_no_order(path: Path) -> None:
    change(path, "update calls set created = 1e9 - id")
    with Store(path) as store:
        ask(wanted("What is 6 + 1?"), POCKET, store, run="one")
    change(path, "update calls set created = 0 where id = 3")
    assert [row["answer"] for row in listed(path, "one", None, 9)] == ["7", "9", "5"]


def test_a_key_is_no_pattern(path: Path) -> None:
    for prefix in ("%", "_", "0" * 65, "ö"):
        with pytest.raises(TapirError, match="no call's key"):
            shown(path, prefix)


def test_what_the_store_weighs(path: Path) -> None:
    assert size(path) == (2, path.stat().st_size)


# Explain


def key_of(path: Path, answer: str) -> str:
    return next(str(row["key"]) for row in listed(path, "one", None, 9) if row["answer"] == answer)


def test_two_requests_and_the_first_field_that_differs(path: Path) -> None:
    a, b = key_of(path, "5"), key_of(path, "9")
    found = explain(path, a[:12], b[:12])
    assert (found["a"], found["b"]) == (a, b)
    assert found["told"] == [
        "messages[0].content differs at character 8: 'What is 2 + 3?' here, 'What is 4 + 5?' there"
    ]
    assert found["differences"] == [{"field": "messages[0].content", "a": "What is 2 + 3?", "b": "What is 4 + 5?"}]
    assert explain(path, a, a)["told"] == []


def test_a_field_that_one_request_lacks_is_absent(path: Path) -> None:
    with Store(path) as store:
        ask(wanted("What is 6 + 1?"), POCKET.model_copy(update={"extra": {"top_p": 0.5}}), store, run="one")
    found = explain(path, key_of(path, "7"), key_of(path, "5"))
    assert {"field": "top_p", "a": 0.5} in found["differences"]
    assert "top_p: 0.5 here, absent there" in found["told"]


def test_the_nearest_request_is_the_one_that_reads_most_alike(path: Path) -> None:
    with Store(path) as store:
        ask(wanted("What is 2 + 3?", temperature=0.5), POCKET, store, run="three")
    found = explain(path, listed(path, "three", None, 1)[0]["key"])
    assert found["b"] == key_of(path, "5")
    assert found["told"] == ["temperature: 0.5 here, 0 there"]


def test_a_call_without_another(tmp_path: Path) -> None:
    with Store(tmp_path / "teacher.db") as store:
        ask(wanted("What is 2 + 3?"), POCKET, store, run="one")
    with pytest.raises(TapirError, match="no other call"):
        explain(tmp_path / "teacher.db", key_of(tmp_path / "teacher.db", "5"))


def test_no_store_and_no_database(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="no store yet"):
        stats(tmp_path / "teacher.db")
    (tmp_path / "teacher.db").write_bytes(b"nonsense" * 1000)
    with pytest.raises(TapirError, match="cannot be read"):
        stats(tmp_path / "teacher.db")
