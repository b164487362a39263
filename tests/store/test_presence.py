"""A store that is taken away while a run uses it stops the run, and what was paid for is saved."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from calls import call, fill, key, table
from command_line import ROOT
from filled_stores import took
from server import questions, teacher

from tapir_local.errors import TapirError
from tapir_local.store.locks import Claims
from tapir_local.store.schema import CHECKPOINT_PAGES, PAGE_BYTES
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.session import AskOptions


@pytest.mark.parametrize("endings", [("", "-wal", "-shm"), ("",), ("-wal",)], ids=["all", "file", "log"])
def test_a_store_that_is_deleted_stops_the_run_and_is_written_again(tmp_path, endings):
    path = tmp_path / "teacher.db"
    store = Store(path)
    for row in range(20):
        store.put(call(row)).result()
    for ending in endings:
        path.with_name(path.name + ending).unlink()
    with pytest.raises(TapirError, match="deleted, moved or replaced"):
        store.put(call(20)).result()
    with pytest.raises(TapirError, match="deleted, moved or replaced"):
        store.put(call(21))  # no further request is paid for, but one in flight is kept
    with pytest.raises(TapirError) as error:
        store.close()
    found = path if "" in endings else next(tmp_path.glob("teacher.db.saved-*"))
    assert ("written again" if "" in endings else str(found)) in str(error.value)
    with Store(found) as again:
        assert again.notices == ()
        assert all(again.get(key(row)) == call(row).answer for row in range(22))


def test_a_store_that_is_replaced_is_saved_beside_the_new_one(tmp_path):
    path = tmp_path / "teacher.db"
    store = Store(path)
    store.put(call(0)).result()
    for ending in ("", "-wal", "-shm"):
        path.with_name(path.name + ending).rename(tmp_path / f"elsewhere.db{ending}")
    fill(path, 1)
    with pytest.raises(TapirError, match="replaced"):
        store.put(call(1)).result()
    with pytest.raises(TapirError, match="calls import"):
        store.close()
    assert table(path, "select count(*) from calls") == [(1,)]
    (saved,) = tmp_path.glob("teacher.db.saved-*")
    assert table(saved, "select count(*) from calls") == [(2,)]


def test_the_log_of_a_file_that_was_replaced_alone_is_not_applied_to_the_new_one(tmp_path):
    """SQLite would write the pages of the old log into the new file."""
    path, other = tmp_path / "teacher.db", tmp_path / "other.db"
    fill(other, 200)
    store = Store(path)
    for row in range(1000, 1020):
        store.put(call(row)).result()
    other.replace(path)
    with pytest.raises(TapirError, match="replaced"):
        store.put(call(1020)).result()
    with pytest.raises(TapirError, match="calls import"):
        store.close()
    assert table(path, "pragma integrity_check") == [("ok",)]
    assert table(path, "select count(*) from calls") == [(200,)]
    (saved,) = tmp_path.glob("teacher.db.saved-*")
    assert table(saved, "select count(*) from calls") == [(21,)]


OPENER = """
import sys
from pathlib import Path
from tapir_local.errors import TapirError
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.session import AskOptions
try:
    with Store(Path(sys.argv[1])) as store:
        print(*store.notices)
except TapirError as error:
    print(error)
"""


def open_elsewhere(path: Path) -> str:
    """What another process prints that opens the store."""
    command = [sys.executable, "-c", OPENER, str(path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120).stdout


def test_a_second_process_does_not_move_away_a_store_in_use(tmp_path):
    path = tmp_path / "teacher.db"
    fill(path, 1000)
    with Store(path) as store:
        store.put(call(2000)).result()
        # Not in this process: closing the file would release the locks that SQLite holds on it here.
        damage = ["dd", "if=/dev/urandom", f"of={path}", "bs=4k", "seek=30", "count=16", "conv=notrunc"]
        subprocess.run(damage, check=True, capture_output=True)
        said = open_elsewhere(path)
        assert "damaged" in said
        assert "another process is using it" in said
        assert not list(tmp_path.glob("*.damaged-*"))
    assert "was renamed to" in open_elsewhere(path)


def test_several_may_use_a_store_and_one_alone_may_move_it(tmp_path):
    one, two, three = (Claims(tmp_path / "asking") for _ in range(3))
    one.share_store()
    two.share_store()
    assert not three.lock_store_alone()
    one.close()
    assert not three.lock_store_alone()
    two.close()
    assert three.lock_store_alone()
    three.close()


def test_the_file_alone_has_nearly_all_calls_while_it_is_written(tmp_path):
    path = tmp_path / "teacher.db"
    with Store(path) as store:
        for row in range(60):
            store.put(call(row, os.urandom(50_000).hex())).result()
        log = path.with_name("teacher.db-wal").stat().st_size
        copy = tmp_path / "copy.db"
        subprocess.run(["cp", str(path), str(copy)], check=True)
        assert log < 2 * CHECKPOINT_PAGES * PAGE_BYTES
        assert table(copy, "select count(*) from calls")[0][0] > 30


def test_a_run_whose_store_is_deleted_stops_paying_and_keeps_every_answer(server, tmp_path):
    path, asked = tmp_path / "teacher.db", questions(*map(str, range(200)))
    server.seconds = 0.03

    def delete_once(done: int, total: int, hits: int) -> None:
        if done >= 30:
            for ending in ("", "-wal", "-shm"):
                path.with_name(path.name + ending).unlink(missing_ok=True)

    store = Store(path)
    with pytest.raises(TapirError, match="deleted, moved or replaced"):
        ask(asked, teacher(server), store, run="r", options=AskOptions(progress=delete_once))
    with pytest.raises(TapirError, match="written again"):
        store.close()
    paid = len(server.bodies)
    assert paid < 60
    with Store(path) as again:
        ask(asked, teacher(server), again, run="r")
    assert len(server.bodies) == 200


KILLED = """
import os, sys
from pathlib import Path
from calls import call
from tapir_local.store.store import Store
store = Store(Path(sys.argv[1]))
for row in range(10):
    store.put(call(row)).result()
os._exit(9)
"""


def test_the_log_of_a_file_that_was_moved_alone_is_kept_and_its_calls_come_back(tmp_path):
    path = tmp_path / "teacher.db"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], env=env, check=False).returncode == 9
    path.rename(tmp_path / "elsewhere.db")
    with Store(path) as store:
        (said,) = store.notices
        assert store.get(key(0)) is None
    (log,) = tmp_path.glob("teacher.db.left-*-wal")
    assert log.name in said
    aside = log.with_name(log.name.removesuffix("-wal"))
    assert f"calls import {aside}" in said
    (tmp_path / "elsewhere.db").rename(aside)
    assert took(path, aside).new == 10
    with Store(path) as store:
        assert store.notices == ()
        assert all(store.get(key(row)) == call(row).answer for row in range(10))
