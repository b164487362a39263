"""Counting, listing, comparing and verifying calls, in a store filled by the pocket teacher."""

import sqlite3
from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.method import prompts
from tapir_local.recipe.endpoints import Teacher
from tapir_local.records import Message, Request
from tapir_local.store.queries import (
    DAMAGED_ANSWER,
    compare_calls,
    count_uses,
    get_call,
    list_uses,
    measure_store,
    verify_calls,
)
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


def test_counts_by_run_of_used_and_paid_calls(path: Path) -> None:
    rows = {row["run"]: row for row in count_uses(path)}
    assert (rows["one"]["used"], rows["one"]["paid"]) == (2, 2)
    assert (rows["two"]["used"], rows["two"]["paid"], rows["two"]["tokens_out"]) == (1, 0, 0)
    assert [row["run"] for row in count_uses(path, "two")] == ["two"]


def test_a_run_name_that_is_not_valid_text_is_an_error(path: Path) -> None:
    with pytest.raises(TapirError, match="not valid text"):
        count_uses(path, "one\udcff")


def test_list_has_answers_and_applies_filters(path: Path) -> None:
    assert {row["answer"] for row in list_uses(path, "one", None, 9)} == {"5", "9"}
    assert [row["run"] for row in list_uses(path, None, "refine", 9)] == ["two"]
    assert len(list_uses(path, None, None, 1)) == 1


def test_get_call_has_the_whole_request_and_the_raw_answer(path: Path) -> None:
    key = list_uses(path, "two", None, 1)[0]["key"]
    found = get_call(path, key[:10])
    assert found["key"] == key
    assert found["answer"]["choices"][0]["message"]["content"] == "5"
    assert "What is 2 + 3?" in str(found)


def test_an_unknown_or_ambiguous_key_is_an_error(path: Path) -> None:
    with pytest.raises(TapirError, match="no call's key"):
        get_call(path, "zz")
    with pytest.raises(TapirError, match="several calls' key"):
        get_call(path, "")


def test_verify_finds_a_changed_answer_and_a_wrong_key(path: Path) -> None:
    assert verify_calls(path) == (2, [])
    change(path, "update calls set answer = x'00' where id = 1")
    change(path, "update calls set key = x'ab' where id = 2")
    count, bad = verify_calls(path)
    assert count == 2
    assert len(bad) == 2


def test_calls_without_their_sample_are_damaged(path: Path) -> None:
    change(path, "delete from samples")
    assert len(verify_calls(path)[1]) == 2


def test_a_damaged_call_is_marked_and_the_others_are_listed(path: Path) -> None:
    change(path, "update calls set answer = x'00' where id = 1")
    rows = list_uses(path, "one", None, 9)
    assert [row["answer"] for row in rows] == ["9", DAMAGED_ANSWER]
    with pytest.raises(TapirError, match="damaged"):
        get_call(path, rows[1]["key"])


def test_order_does_not_depend_on_the_clock(path: Path) -> None:
    change(path, "update calls set created = 1e9 - id")
    with Store(path) as store:
        ask(wanted("What is 6 + 1?"), POCKET, store, run="one")
    change(path, "update calls set created = 0 where id = 3")
    assert [row["answer"] for row in list_uses(path, "one", None, 9)] == ["7", "9", "5"]


def test_a_key_prefix_is_not_a_pattern(path: Path) -> None:
    for prefix in ("%", "_", "0" * 65, "ö"):
        with pytest.raises(TapirError, match="no call's key"):
            get_call(path, prefix)


def test_size_of_the_store(path: Path) -> None:
    assert measure_store(path) == (2, path.stat().st_size)


# Explain


def key_of(path: Path, answer: str) -> str:
    return next(str(row["key"]) for row in list_uses(path, "one", None, 9) if row["answer"] == answer)


def test_compare_two_requests(path: Path) -> None:
    a, b = key_of(path, "5"), key_of(path, "9")
    found = compare_calls(path, a[:12], b[:12])
    assert (found["a"], found["b"]) == (a, b)
    assert found["sentences"] == [
        "messages[0].content differs at character 8: 'What is 2 + 3?' here, 'What is 4 + 5?' there"
    ]
    assert found["differences"] == [{"field": "messages[0].content", "a": "What is 2 + 3?", "b": "What is 4 + 5?"}]
    assert compare_calls(path, a, a)["sentences"] == []


def test_a_field_that_one_request_lacks_is_absent(path: Path) -> None:
    with Store(path) as store:
        ask(wanted("What is 6 + 1?"), POCKET.model_copy(update={"extra": {"top_p": 0.5}}), store, run="one")
    found = compare_calls(path, key_of(path, "7"), key_of(path, "5"))
    assert {"field": "top_p", "a": 0.5} in found["differences"]
    assert "top_p: 0.5 here, absent there" in found["sentences"]


def test_compare_with_the_most_similar_request(path: Path) -> None:
    with Store(path) as store:
        ask(wanted("What is 2 + 3?", temperature=0.5), POCKET, store, run="three")
    found = compare_calls(path, list_uses(path, "three", None, 1)[0]["key"])
    assert found["b"] == key_of(path, "5")
    assert found["sentences"] == ["temperature: 0.5 here, 0 there"]


def test_comparing_the_only_call_is_an_error(tmp_path: Path) -> None:
    with Store(tmp_path / "teacher.db") as store:
        ask(wanted("What is 2 + 3?"), POCKET, store, run="one")
    with pytest.raises(TapirError, match="no other call"):
        compare_calls(tmp_path / "teacher.db", key_of(tmp_path / "teacher.db", "5"))


def test_a_missing_file_and_another_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="no store yet"):
        count_uses(tmp_path / "teacher.db")
    (tmp_path / "teacher.db").write_bytes(b"nonsense" * 1000)
    with pytest.raises(TapirError, match="cannot be read"):
        count_uses(tmp_path / "teacher.db")
