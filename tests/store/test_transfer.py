"""Export and import: no call is lost or duplicated, and invalid calls are refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calls import asked, key, table
from filled_stores import call, put, took, use

from tapir_local.errors import TapirError
from tapir_local.store.queries import count_uses, list_uses, verify_calls
from tapir_local.store.rows import Attempt, Call
from tapir_local.store.store import Store
from tapir_local.store.transfer import (
    NOT_WHOLE,
    UNREADABLE,
    WRONG_KEY,
    Imported,
    export_store,
    import_store,
    is_sqlite_file,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Ten calls: `one` paid for 0 to 5, `two` for 6 to 9 of another kind and used 0; each has one failed attempt."""
    put(tmp_path / "teacher.db", range(6))
    put(tmp_path / "teacher.db", range(6, 10), "two", kind="others", price=0.25, seconds=1.5, tokens_out=3, created=9.0)
    with Store(tmp_path / "teacher.db") as store:
        store.used([use(0, "two", 0)])
        for run in ("one", "two"):
            store.note(Attempt(key(0), run, 0, "seeds", "row-0", "500: oops", b"oops", created=7.0))
    return tmp_path / "teacher.db"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.db"


def rows_of(path: Path) -> dict[str, list[Any]]:
    columns = "key, answer, finish, tokens_out, seconds, price, created"
    return {
        "calls": table(path, f"select {columns} from calls order by key"),
        "uses": table(path, "select * from uses order by 1, 2, 3, 4, 5"),
        "attempts": table(path, "select key, run, why, answer, created from attempts order by run"),
    }


# Export


def test_everything_is_exported(path: Path, out: Path) -> None:
    assert export_store(path, out) == (10, 0, out.stat().st_size)
    assert rows_of(out) == rows_of(path)
    assert table(out, "select * from sample_copies") == table(out, "select * from samples")


def test_a_run_is_exported_with_the_samples_that_it_needs(path: Path, out: Path) -> None:
    assert export_store(path, out, "one").calls == 6
    assert table(out, "select name from samples") == [("answers",)]
    assert [row["run"] for row in count_uses(out)] == ["one"]
    assert table(out, "select run from attempts") == [("one",)]
    assert verify_calls(out) == (6, [])


def test_a_call_of_another_run_is_exported_with_a_run_that_used_it(path: Path, out: Path) -> None:
    assert export_store(path, out, "two").calls == 5
    with Store(out, "replay") as store:
        assert store.get(key(0)) == call(0).answer
        assert store.get(key(1)) is None


def test_a_run_without_calls_is_an_error_with_known_runs(path: Path, out: Path) -> None:
    with pytest.raises(TapirError, match="Runs with calls: one, two"):
        export_store(path, out, "three")
    assert not out.exists()


def test_an_existing_file_is_not_overwritten(path: Path, out: Path) -> None:
    out.write_text("mine")
    with pytest.raises(TapirError, match="already exists"):
        export_store(path, out)
    with pytest.raises(TapirError, match="already exists"):
        export_store(path, path)
    assert out.read_text() == "mine"
    assert verify_calls(path) == (10, [])


def test_an_export_is_a_single_file(path: Path, out: Path) -> None:
    export_store(path, out)
    assert not [file.name for file in out.parent.glob("out*") if file != out]
    out.chmod(0o400)
    assert out.read_bytes()[18:20] == b"\1\1"  # no write-ahead log is needed to read it


def test_unreadable_calls_are_counted_and_not_exported(path: Path, out: Path) -> None:
    table(path, "update calls set answer = x'00' where id = 2")
    assert export_store(path, out)[:2] == (9, 1)
    assert verify_calls(out) == (9, [])


FULL = """
import resource, sys
from pathlib import Path
from tapir_local.errors import TapirError
from tapir_local.store.transfer import export_store
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    export_store(Path(sys.argv[1]), Path(sys.argv[2]))
except TapirError as error:
    print(error)
"""


def test_a_full_disk_leaves_no_file(path: Path, out: Path) -> None:
    put(path, range(100, 200), answer="x" * 50 + os.urandom(2000).hex())
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(out)], capture_output=True, text=True, check=True
    )
    assert "Make room" in ended.stdout
    assert not list(out.parent.glob("out*"))


def test_an_invalid_file_name_is_an_error(path: Path, tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="cannot be"):
        export_store(path, tmp_path / ("x" * 300))
    (tmp_path / "file").touch()
    with pytest.raises(TapirError, match="cannot be"):
        export_store(path, tmp_path / "file" / "out.db")


# Import


def test_an_exported_run_is_imported_unchanged(path: Path, out: Path, tmp_path: Path) -> None:
    export_store(path, out, "two")
    assert took(tmp_path / "new.db", out) == Imported(new=5)
    new = tmp_path / "new.db"
    assert verify_calls(new) == (5, [])
    assert table(new, "select * from uses") == table(out, "select * from uses")
    details = "select key, tokens_out, seconds, price, created from calls order by key"
    assert table(new, details) == table(out, details)
    assert table(new, "select run, why, answer from attempts") == [("two", "500: oops", b"oops")]


def test_importing_twice_changes_nothing(path: Path, out: Path, tmp_path: Path) -> None:
    export_store(path, out)
    new = tmp_path / "new.db"
    took(new, out)
    before = rows_of(new)
    assert took(new, out) == Imported(known=10)
    assert rows_of(new) == before


def test_known_calls_are_kept_and_uses_are_merged(path: Path, tmp_path: Path) -> None:
    other = put(tmp_path / "other.db", range(4, 8), "three", answer="four")
    assert took(other, path) == Imported(new=6, known=4)
    with Store(other) as store:
        assert [store.get(key(row)) for row in (4, 7)] == [call(4, "four").answer, call(7, "four").answer]
        assert store.get(key(9)) == call(9).answer
    assert [(row["run"], row["used"], row["paid"]) for row in count_uses(other)] == [
        ("one", 6, 6),
        ("three", 4, 4),
        ("two", 5, 4),
    ]


def test_samples_with_the_same_name_and_different_texts(tmp_path: Path) -> None:
    mine = put(tmp_path / "mine.db", range(3), answer="the words of mine " * 50)
    other = put(tmp_path / "other.db", range(3, 9), answer="quite different words of the other " * 50)
    assert table(mine, "select answer from samples") != table(other, "select answer from samples")
    assert took(mine, other) == Imported(new=6)
    assert verify_calls(mine) == (9, [])
    with Store(mine) as store:
        assert store.get(key(8)) == call(8, "quite different words of the other " * 50).answer
    assert table(mine, "select count(*) from samples") == [(1,)]


def test_a_damaged_answer_is_repaired_by_an_import(path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.db"
    shutil.copy(path, broken)
    table(broken, "update calls set answer = x'00' where key = ?", key(3))
    assert took(broken, path) == Imported(new=1, known=9)
    assert verify_calls(broken) == (10, [])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("update calls set key = zeroblob(32) where id = 3", WRONG_KEY),
        ("update calls set request = (select request from calls where id = 4) where id = 3", WRONG_KEY),
        ("update calls set answer = x'00' where id = 3", UNREADABLE),
        ("update calls set request = x'' where id = 3", UNREADABLE),
        ("update calls set sample = 99 where id = 3", UNREADABLE),
    ],
)
def test_an_invalid_call_is_refused_and_the_others_are_kept(path: Path, tmp_path: Path, damage: str, why: str) -> None:
    table(path, damage)
    found = took(tmp_path / "new.db", path)
    assert (found.new, found.known, dict(found.refused)) == (9, 0, {why: 1})
    assert verify_calls(tmp_path / "new.db") == (9, [])
    assert not table(tmp_path / "new.db", "select 1 from uses where key not in (select key from calls)")


@pytest.mark.parametrize("answer", [b"no JSON", b'{"error": 1}', b'{"choices": [{"message": {"content": ""}}]}'])
def test_an_unusable_answer_is_refused(tmp_path: Path, answer: bytes) -> None:
    with Store(tmp_path / "other.db") as store:
        store.put(Call(asked(1), answer, "stop", "answers"))
    found = took(tmp_path / "new.db", tmp_path / "other.db")
    assert (found.new, sum(found.refused.values())) == (0, 1)
    assert set(found.refused) <= {UNREADABLE, NOT_WHOLE}


def test_damaged_pages_are_skipped_and_counted(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with Store(other) as store:
        for row in range(300):
            store.put(call(row, os.urandom(1000).hex()))
    pages = other.stat().st_size // 4096
    with other.open("r+b") as file:
        file.seek(pages // 2 * 4096)
        file.write(os.urandom(3 * 4096))
    found = took(tmp_path / "new.db", other)
    assert found.new > 200
    assert sum(found.refused.values()) > 0
    assert verify_calls(tmp_path / "new.db") == (found.new, [])


def test_a_store_is_not_imported_into_itself(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(path)
    for file in (path, tmp_path / "link.db"):
        with pytest.raises(TapirError, match="into itself"):
            took(path, file)


def test_a_store_of_a_newer_version_is_refused(path: Path, tmp_path: Path) -> None:
    table(path, "insert into _sqlite_migrations (migration_set, name, applied_at) values ('teacher', 'later', '2030')")
    with pytest.raises(TapirError, match="newer version"):
        took(tmp_path / "new.db", path)


def test_detect_sqlite_files(path: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    assert is_sqlite_file(path)
    assert not is_sqlite_file(tmp_path / "rows.json")
    for file in (tmp_path, tmp_path / "none.db"):
        with pytest.raises(TapirError, match="cannot be read"):
            is_sqlite_file(file)


def test_reading_another_store_creates_no_files(path: Path, out: Path, tmp_path: Path) -> None:
    took(tmp_path / "new.db", path)
    export_store(path.with_name("new.db"), out)
    took(tmp_path / "newer.db", out)
    names = {file.name for file in tmp_path.iterdir() if file.name.startswith(("teacher.db-", "out"))}
    assert names == {"out.db"}


def test_a_store_in_use_is_imported_with_its_log(tmp_path: Path) -> None:
    with Store(tmp_path / "other.db") as busy:
        busy.put(call(1), [use(1, "one")]).result()
        assert (tmp_path / "other.db-wal").stat().st_size
        assert took(tmp_path / "new.db", tmp_path / "other.db") == Imported(new=1)
    assert [row["row"] for row in list_uses(tmp_path / "new.db", "one", None, 9)] == ["row-1"]


def test_progress_is_reported(path: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with Store(tmp_path / "new.db") as store:
        import_store(store, path, lambda done, total: seen.append((done, total)))
    assert seen == [(10, 10)]
