"""The store's calls as the commands show them, on a store that the pocket teacher filled."""

import sqlite3
from pathlib import Path

import pytest

from tapir_local import prompts
from tapir_local.calls import listed, shown, stats, verify
from tapir_local.errors import TapirError
from tapir_local.recipe import Teacher
from tapir_local.records import Message, Request
from tapir_local.store import Store
from tapir_local.teacher import ask

POCKET = Teacher(kind="pocket", model=None)


def wanted(*texts: str, stage: str = "seeds") -> list[Request]:
    return [Request(prompts.answer((Message("user", text),)), f"row-{text}", stage) for text in texts]


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
    conn = sqlite3.connect(path)
    conn.execute("update calls set answer = x'00' where id = 1")
    conn.execute("update calls set key = x'ab' where id = 2")
    conn.commit()
    conn.close()
    count, bad = verify(path)
    assert count == 2
    assert len(bad) == 2


def test_no_store_and_no_database(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="no store yet"):
        stats(tmp_path / "teacher.db")
    (tmp_path / "teacher.db").write_bytes(b"nonsense" * 1000)
    with pytest.raises(TapirError, match="cannot be read"):
        stats(tmp_path / "teacher.db")
