"""The store: acknowledged rows are never lost, incomplete answers are never served, each mode does what it says."""

import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from calls import BODY, asked, call, fill, key, table

from tapir_local.errors import TapirError
from tapir_local.run_dir import RunDir, lock_run
from tapir_local.store import keys
from tapir_local.store.rows import Attempt, Call, Use
from tapir_local.store.schema import BUSY_TIMEOUT_MS, connect
from tapir_local.store.search import search_calls
from tapir_local.store.store import Store
from tapir_local.store.transfer import export_store

# Reading and writing


def test_an_answer_is_returned_unchanged(tmp_path):
    odd = b'{"choices": [ {"message":{"content":"\\u00e9 \xc3\xa9"}} ],  "x": 1.0}'
    with Store(tmp_path / "teacher.db") as store:
        store.put(call(1, answer="")).result()
        store.put(call(2, request=asked(2))).result()
        store.put(Call(asked(3), odd, "stop", "answers")).result()
        assert store.get(key(3)) == odd
        assert store.get(key(4)) is None


@pytest.mark.parametrize(("words", "rows"), [(400, 2000), (5_000, 200), (20_000, 200)], ids=["3 KB", "40 KB", "170 KB"])
def test_a_shared_prompt_is_stored_once(tmp_path, words, rows):
    text = " ".join(random.Random(1).choices([f"word{number}" for number in range(500)], k=words))
    turns = [{"role": "system", "content": text}, {"role": "user", "content": "How many words?"}]
    with Store(tmp_path / "teacher.db") as store:
        for row in range(rows):
            store.put(call(row, request=asked(row, {**BODY, "messages": turns})))
        store.flush()
        assert store.get(keys.hash_request(asked(1, {**BODY, "messages": turns})))
    Store(tmp_path / "empty.db").close()
    size = (tmp_path / "teacher.db").stat().st_size - (tmp_path / "empty.db").stat().st_size - 2 * len(text)  # samples
    assert len(text) > 7 * words
    assert size / rows < 500


def test_ctrl_c_while_the_store_closes_waits_for_what_is_written(tmp_path):
    """Another program holds the file, so the writer is in its commit when the signal comes."""
    store = Store(tmp_path / "teacher.db")
    other = sqlite3.connect(tmp_path / "teacher.db", isolation_level=None, check_same_thread=False)
    other.execute("begin immediate")
    store.put(call(1))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    threading.Timer(0.8, other.execute, ("rollback",)).start()
    with pytest.raises(KeyboardInterrupt):
        store.close()
    assert table(tmp_path / "teacher.db", "select count(*) from calls") == [(1,)]
    store.close()
    other.close()


def test_uses_and_attempts_are_recorded(tmp_path):
    fill(tmp_path / "teacher.db", 3)
    with Store(tmp_path / "teacher.db") as store:
        store.used([Use("r", 1, "answers", "row-0", key(0)), Use("r", 2, "judgements", "row-0", key(0))])
        store.note(Attempt(key(9), "r", 1, "answers", "row-9", "500: oops", b"oops"))
    uses = table(tmp_path / "teacher.db", "select round, stage, row, paid from uses order by 1, 3")
    assert uses == [(1, "answers", f"row-{row}", 1) for row in range(3)] + [(2, "judgements", "row-0", 0)]
    assert table(tmp_path / "teacher.db", "select row, why, answer from attempts") == [("row-9", "500: oops", b"oops")]


def test_no_pickle_and_waits_for_locks(tmp_path):
    fill(tmp_path / "teacher.db", 1)
    conn = connect(tmp_path / "teacher.db", write=True)
    pragmas = [conn.execute(f"pragma {name}").fetchone()[0] for name in ("busy_timeout", "journal_mode", "synchronous")]
    conn.close()
    assert pragmas == [BUSY_TIMEOUT_MS, "wal", 2]
    assert "pickle" not in Path(sys.modules["tapir_local.store.store"].__file__ or "").read_text()


# Modes


def test_off_reads_and_writes_nothing(tmp_path):
    with Store(tmp_path / "teacher.db", "off") as store:
        store.put(call(1)).result()
        assert store.get(key(1)) is None
    assert not list(tmp_path.iterdir())


def test_read_only_serves_and_writes_nothing(tmp_path):
    fill(tmp_path / "teacher.db", 1)
    with Store(tmp_path / "teacher.db", "read-only") as store:
        assert store.get(key(0))
        store.put(call(1)).result()
        store.flush()
        assert store.get(key(1)) is None


def test_refresh_replaces_and_keeps_the_old_answer(tmp_path):
    fill(tmp_path / "teacher.db", 1)
    with Store(tmp_path / "teacher.db", "refresh") as store:
        assert store.get(key(0)) is None
        store.put(call(0, "four"))
    with Store(tmp_path / "teacher.db") as store:
        assert b"four" in (store.get(key(0)) or b"")
    assert table(tmp_path / "teacher.db", "select why, answer from attempts") == [("replaced", call(0).answer)]


def test_ids_are_never_reused(tmp_path):
    fill(tmp_path / "teacher.db", 3)
    with Store(tmp_path / "teacher.db", "refresh") as store:
        store.put(call(2, "four")).result()
        store.put(call(0, "four")).result()
    with Store(tmp_path / "teacher.db") as store:
        store.put(call(7)).result()
    ids = table(tmp_path / "teacher.db", "select id from calls order by id")
    assert ids == [(2,), (4,), (5,), (6,)]


def test_the_first_answer_is_kept(tmp_path):
    with Store(tmp_path / "teacher.db") as one, Store(tmp_path / "teacher.db") as two:
        one.put(call(0, "first")).result()
        two.put(call(0, "second")).result()
        assert b"first" in (two.get(key(0)) or b"")


def test_replay_without_a_store_is_an_error(tmp_path):
    with pytest.raises(TapirError, match="no store to replay"):
        Store(tmp_path / "teacher.db", "replay")


def test_a_miss_names_the_first_difference_from_the_most_similar_request(tmp_path):
    fill(tmp_path / "teacher.db", 5)
    with Store(tmp_path / "teacher.db", "replay") as store:
        error = store.missing(
            keys.request_text("http://localhost/v1", {**BODY, "user": "3", "temperature": 0.9}, 0), "answers", "row-3"
        )
    assert "stage answers, row row-3" in str(error)
    assert "temperature: 0.9 here, 0.7 there" in str(error)


# Crashes and parallel processes


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from calls import call, fill, key, table
from tapir_local.store.store import Store
store = Store(Path(sys.argv[1]))
waiting = []
for row in range(int(sys.argv[3]), 10**9):
    waiting.append((row, store.put(call(row))))
    if len(waiting) == 50:
        for row, done in waiting:
            done.result()
            sys.stdout.write(f"{row}\\n")
        sys.stdout.flush()
        waiting.clear()
"""


def test_kill_9_loses_no_acknowledged_row(tmp_path):
    path, first, chance = tmp_path / "teacher.db", 0, random.Random(1)
    acknowledged: list[int] = []
    for _ in range(5):
        command = [sys.executable, "-c", WRITER, str(path), str(Path(__file__).parents[1] / "support"), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout
            started = writer.stdout.readline()
            time.sleep(chance.uniform(0, 0.3))
            writer.send_signal(signal.SIGKILL)
            lines = (started + writer.stdout.read()).split(b"\n")
        acknowledged += [int(line) for line in lines[:-1]]
        first = acknowledged[-1] + 1000
    with Store(path) as store:
        assert store.notices == ()
        assert all(store.get(key(row)) == call(row).answer for row in acknowledged)
    assert len(acknowledged) >= 250


CROWD = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from calls import call, fill, key, table
from tapir_local.store.store import Store
from tapir_local.store.rows import Use
store = Store(Path(sys.argv[1]))
def work(number):
    for row in range(60):
        store.get(key(row))
        store.put(call(row), [Use(sys.argv[3], number, "answers", str(row), key(row), 1)]).result()
        assert store.get(key(row)) == call(row).answer
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
store.close()
"""


def test_four_processes_of_eight_threads_never_fail_on_locks(tmp_path):
    path = tmp_path / "teacher.db"
    command = [sys.executable, "-W", "error", "-c", CROWD, str(path), str(Path(__file__).parents[1] / "support")]
    crowd = [subprocess.Popen([*command, f"run-{number}"], stderr=subprocess.PIPE) for number in range(4)]
    errors = [process.communicate()[1] for process in crowd]
    assert errors == [b""] * 4
    assert table(path, "select count(*) from calls") == [(60,)]
    assert table(path, "select count(*) from uses") == [(4 * 8 * 60,)]


def test_a_reader_sees_what_another_store_wrote(tmp_path):
    with Store(tmp_path / "teacher.db") as one, Store(tmp_path / "teacher.db") as two:
        seen = [two.get(key(1))]
        one.put(call(1)).result()
        thread = threading.Thread(target=lambda: seen.append(two.get(key(1))))
        thread.start()
        thread.join()
        assert seen == [None, call(1).answer]
        assert two.get(key(1))


def test_a_copy_of_the_file_is_a_whole_store(tmp_path):
    with Store(tmp_path / "teacher.db") as store:
        for row in range(2):
            store.put(call(row)).result()
            assert store.get(key(row))
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "teacher.db", tmp_path / "elsewhere" / "teacher.db")
    with Store(tmp_path / "elsewhere" / "teacher.db", "replay") as store:
        assert store.get(key(1)) == call(1).answer


def test_a_closed_store_refuses_calls(tmp_path):
    store = Store(tmp_path / "teacher.db")
    store.close()
    with pytest.raises(TapirError, match="closed"):
        store.put(call(1))


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_the_owner_can_read_the_store(tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = tmp_path / "cache"
        folder.mkdir(mode=0o700)
        folder.chmod(0o700)
        with Store(folder / "teacher.db") as store:
            store.put(call(1)).result()
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
            search_calls(folder / "teacher.db", ["4"])
        export_store(folder / "teacher.db", folder / "out.db")
        run = RunDir(folder, "mine")
        with lock_run(run):
            pass
    finally:
        os.umask(before)
    assert {"teacher.db", "teacher.db-wal", "teacher.db-shm", "teacher.db.lock", "teacher.db.asking"} <= set(modes)
    later = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.is_file()}
    assert {"teacher.db.search", "teacher.db.search.lock", "out.db"} <= set(later)
    assert set(modes.values()) | set(later.values()) == {0o600}
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700


def test_files_that_others_can_read_are_made_private(tmp_path):
    with Store(tmp_path / "teacher.db") as store:
        store.put(call(1)).result()
    for path in tmp_path.iterdir():
        path.chmod(0o644)
    run = RunDir(tmp_path, "mine")
    run.path.mkdir(parents=True, mode=0o755)
    with Store(tmp_path / "teacher.db"), lock_run(run):
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir() if path.is_file()} == {0o600}
        assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
