"""A damaged store is moved away and its readable calls are saved; a full disk damages nothing."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from calls import call, fill, key, table

from tapir_local.printable import format_count
from tapir_local.store.schema import PAGE_BYTES
from tapir_local.store.store import Store


def test_a_damaged_file_is_renamed_and_its_calls_are_saved(tmp_path):
    path = tmp_path / "teacher.db"
    fill(path, 1000)
    pages = path.stat().st_size // 4096
    with path.open("r+b") as file:
        for page in range(pages // 2, pages // 2 + 3):
            file.seek(page * 4096)
            file.write(os.urandom(4096))
    with Store(path) as store:
        (notice,) = store.notices
        kept = sum(store.get(key(row)) == call(row).answer for row in range(1000))
    assert f"{format_count(kept, 'call was', 'calls were')} saved" in notice
    assert kept > 700
    assert len(list(tmp_path.glob("teacher.db.damaged-*"))) == 1
    with Store(path) as store:
        assert store.notices == ()


@pytest.mark.parametrize("garbage", [b"not a database" * 1000, b"\0" * 8192])
def test_a_file_that_is_not_a_store_is_renamed(tmp_path, garbage):
    path = tmp_path / "teacher.db"
    path.write_bytes(garbage)
    with Store(path) as store:
        assert "was renamed to" in store.notices[0]
        store.put(call(1)).result()
    assert next(tmp_path.glob("teacher.db.damaged-*")).read_bytes() == garbage


def test_a_damaged_answer_is_replaced(tmp_path):
    path = tmp_path / "teacher.db"
    fill(path, 2)
    conn = sqlite3.connect(path)
    conn.execute("update calls set answer = x'00112233' where key = ?", (key(0),))
    conn.commit()
    conn.close()
    with Store(path) as store:
        assert store.get(key(0)) is None
        store.put(call(0)).result()
        assert store.get(key(0)) == call(0).answer


def test_a_lost_sample_is_read_from_its_copy(tmp_path):
    path = tmp_path / "teacher.db"
    fill(path, 50)
    ((page,),) = table(path, "select rootpage from sqlite_schema where name = 'samples'")
    with path.open("r+b") as file:
        file.seek((int(page) - 1) * PAGE_BYTES)
        file.write(b"\xff" * PAGE_BYTES)
    with Store(path) as store:
        assert "50 calls were saved, 0 could not be read" in store.notices[0]
        assert store.get(key(7)) == call(7).answer


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from calls import call, fill, key, table
from tapir_local.errors import TapirError
from tapir_local.store.store import Store
store = Store(Path(sys.argv[1]))
store.put(call(0)).result()
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
stored = 0
try:
    for row in range(1, 100_000):
        store.put(call(row, str(row) * 200)).result()
        stored = row
except TapirError as error:
    print(stored, str(error).replace(chr(10), " "))
"""


def test_a_full_disk_is_an_error_and_nothing_is_damaged(tmp_path):
    path = tmp_path / "teacher.db"
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(Path(__file__).parents[1] / "support")],
        capture_output=True,
        text=True,
        check=True,
    )
    stored, _, message = ended.stdout.partition(" ")
    assert "Make room" in message
    with Store(path) as store:
        assert store.notices == ()
        assert all(store.get(key(row)) for row in range(int(stored) + 1))
