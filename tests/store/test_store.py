"""The store: one key for one call, nothing acknowledged is lost, nothing incomplete serves again."""

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
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lz4.block
import orjson
import pytest
from calls import BODY, asked, call, key
from hypothesis import given, settings
from hypothesis import strategies as st

from tapir_local.errors import TapirError
from tapir_local.report.costs import costs
from tapir_local.run_dir import RunDir, lock_run
from tapir_local.store import keys
from tapir_local.store.compression import LARGEST, pack, unpack
from tapir_local.store.locks import Claims
from tapir_local.store.rows import Attempt, Call, Use
from tapir_local.store.schema import BUSY, PAGE, connect, spent
from tapir_local.store.search import search
from tapir_local.store.store import Store
from tapir_local.store.transfer import export


def fill(path: Path, rows: int) -> None:
    with Store(path) as store:
        for row in range(rows):
            store.put(call(row), [Use("r", 1, "answers", f"row-{row}", key(row), 1)])


def table(path: Path, sql: str) -> list[Any]:
    conn = sqlite3.connect(path)
    try:
        return conn.execute(sql).fetchall()
    finally:
        conn.close()


# Keys


def test_golden_key():
    """An upgrade may not re-key what users have paid for: if this fails, the key is wrong, not the test."""
    got = keys.key("https://api.openai.com/v1", {**BODY, "logit_bias": {50256: -100}, "seed": None}, 3)
    assert got.hex() == ("d2f9be7fd8e9429879307b1e8354dbcca6303053ee7a930c5f4946dcf5505879")


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "system", "content": "Be long."}, BODY["messages"][1]]},
        {"max_tokens": 257},
        {"top_p": 0.9},
        {"num_ctx": 4096},
        {"unheard_of": None},
        {"temperature": 0.71},
        {"model": "n"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_change_of_the_body_changes_the_key(change):
    assert keys.key("e", {**BODY, **change}) != keys.key("e", BODY)


def test_absent_is_not_null_and_a_draw_is_not_another():
    assert len({keys.key("e", BODY), keys.key("e", {**BODY, "stop": None}), keys.key("e", BODY, 1)}) == 3


def test_two_servers_with_the_same_model_share_no_answers():
    assert keys.key("http://localhost:8000/v1", BODY) != keys.key("http://localhost:8001/v1", BODY)


def test_order_and_spelling_do_not_count():
    turned = {**dict(reversed(BODY.items())), "max_tokens": 256.0}
    assert keys.key("e", turned) == keys.key("e", BODY)
    assert keys.canonical([-0.0, 1e3, True, 0.5]) == b"[0,1000,true,0.5]"


def test_credentials_timeout_and_streaming_do_not_count():
    assert keys.key("e", {**BODY, "stream": True, "timeout": 3, "api_key": "sk-1"}) == keys.key("e", BODY)
    assert b"sk-1" not in keys.asked("e", {**BODY, "api_key": "sk-1"}, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", "\ud800", 2**70])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(TapirError, match="request"):
        keys.key("e", {**BODY, "extra": value})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(json_values)
def test_the_canonical_text_is_a_fixed_point(value):
    text = keys.canonical(value)
    assert keys.canonical(orjson.loads(text)) == text
    assert text == orjson.dumps(keys.plain(value), option=orjson.OPT_SORT_KEYS)  # also where no copy was made


@pytest.mark.parametrize(
    ("spelled", "one"),
    [
        ("HTTPS://API.OpenAI.com:443/v1/", "https://api.openai.com/v1"),
        ("http://localhost:80//v1/../v1", "http://localhost/v1"),
        ("http://me:secret@host:8000/v1", "http://host:8000/v1"),
        ("http://[::1]:8080/", "http://[::1]:8080"),
        ("https://host/v1?api-version=1", "https://host/v1?api-version=1"),
    ],
)
def test_one_spelling_of_an_address(spelled, one):
    assert keys.address(spelled) == one


@pytest.mark.parametrize("wrong", ["localhost:8000", "ftp://host", "http://host:port", ""])
def test_what_is_no_address(wrong):
    with pytest.raises(TapirError, match="URL"):
        keys.address(wrong)


# Reading and writing


def test_an_answer_comes_back_as_it_came(tmp_path):
    odd = b'{"choices": [ {"message":{"content":"\\u00e9 \xc3\xa9"}} ],  "x": 1.0}'
    with Store(tmp_path / "teacher.db") as store:
        store.put(call(1, answer="")).result()
        store.put(call(2, request=asked(2))).result()
        store.put(Call(asked(3), odd, "stop", "answers")).result()
        assert store.get(key(3)) == odd
        assert store.get(key(4)) is None


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=500), st.binary(max_size=500), st.sampled_from([1, 200]))
def test_packing_loses_nothing(text, sample, times):
    for other in (text, sample * times + text, text + sample * times):
        assert unpack(pack(other, sample * times), sample * times) == other


def test_a_text_deflated_by_an_older_version_still_reads():
    squeeze = zlib.compressobj(zdict=b"like this")
    old = squeeze.compress(b"like this one") + squeeze.flush()
    assert unpack(old, b"like this") == b"like this one"
    for wrong, sample in ((old[:-1], b"like this"), (old, b"like that")):
        with pytest.raises(zlib.error):
            unpack(wrong, sample)


def test_a_block_that_declares_gigabytes_is_damage_and_takes_no_memory():
    block = lz4.block.compress(b"a" * 1000)
    huge = (2**31 - 1).to_bytes(4, "little") + block[4:]
    bomb = zlib.compress(bytes(LARGEST + 1))
    tracemalloc.start()
    for packed in (b"\1" + bytes(4) + huge, b"\2" + bytes(8) + huge, bomb):
        with pytest.raises(zlib.error):
            unpack(packed, b"")
    assert tracemalloc.get_traced_memory()[1] < 3 * LARGEST
    tracemalloc.stop()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 200), st.integers(1, 255))
def test_a_changed_byte_or_another_sample_never_passes(place, change):
    text, sample = b"a text like its sample, and a little more " * 3, b"a text like its sample"
    packed = bytearray(pack(text, sample))
    packed[place % len(packed)] ^= change
    with suppress(zlib.error):  # a reference to another place where the same words stand changes nothing
        assert unpack(bytes(packed), sample) == text
    with pytest.raises(zlib.error):
        unpack(pack(b"a text like its sample", b"a text like its sample"), b"another sample altogether")


@pytest.mark.parametrize("size", [1000, 32_255, 32_256, 32_257, 100_000])
def test_a_changed_sample_is_noticed(size):
    chance = random.Random(size)
    sample = chance.randbytes(size)
    text = sample[: size - 100] + chance.randbytes(100)
    packed = pack(text, sample)
    assert unpack(packed, sample) == text
    assert len(packed) < 500
    for place in (0, size // 2, size - 101):
        changed = bytearray(sample)
        changed[place] ^= 1
        with pytest.raises(zlib.error):
            unpack(packed, bytes(changed))
    with pytest.raises(zlib.error):
        unpack(packed[:-1], sample)


@pytest.mark.parametrize(("words", "rows"), [(400, 2000), (5_000, 200), (20_000, 200)], ids=["3 KB", "40 KB", "170 KB"])
def test_prompts_that_share_their_words_do_not_multiply_on_disk(tmp_path, words, rows):
    text = " ".join(random.Random(1).choices([f"word{number}" for number in range(500)], k=words))
    turns = [{"role": "system", "content": text}, {"role": "user", "content": "How many words?"}]
    with Store(tmp_path / "teacher.db") as store:
        for row in range(rows):
            store.put(call(row, request=asked(row, {**BODY, "messages": turns})))
        store.flush()
        assert store.get(keys.key_of(asked(1, {**BODY, "messages": turns})))
    Store(tmp_path / "empty.db").close()
    size = (tmp_path / "teacher.db").stat().st_size - (tmp_path / "empty.db").stat().st_size - 2 * len(text)  # samples
    assert len(text) > 7 * words
    assert size / rows < 500


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
    assert pragmas == [BUSY, "wal", 2]
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


def test_an_id_is_of_one_answer_for_ever(tmp_path):
    fill(tmp_path / "teacher.db", 3)
    with Store(tmp_path / "teacher.db", "refresh") as store:
        store.put(call(2, "four")).result()
        store.put(call(0, "four")).result()
    with Store(tmp_path / "teacher.db") as store:
        store.put(call(7)).result()
    ids = table(tmp_path / "teacher.db", "select id from calls order by id")
    assert ids == [(2,), (4,), (5,), (6,)]


def test_the_first_answer_stays(tmp_path):
    with Store(tmp_path / "teacher.db") as one, Store(tmp_path / "teacher.db") as two:
        one.put(call(0, "first")).result()
        two.put(call(0, "second")).result()
        assert b"first" in (two.get(key(0)) or b"")


def test_replay_without_a_store_is_an_error(tmp_path):
    with pytest.raises(TapirError, match="no store to replay"):
        Store(tmp_path / "teacher.db", "replay")


def test_a_miss_names_the_first_differing_field_of_the_nearest_request(tmp_path):
    fill(tmp_path / "teacher.db", 5)
    with Store(tmp_path / "teacher.db", "replay") as store:
        error = store.missing(
            keys.asked("http://localhost/v1", {**BODY, "user": "3", "temperature": 0.9}, 0), "answers", "row-3"
        )
    assert "stage answers, row row-3" in str(error)
    assert "temperature: 0.9 here, 0.7 there" in str(error)


# Damage


def test_a_damaged_file_is_put_aside_and_what_it_holds_is_saved(tmp_path):
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
    assert f"{kept} calls were saved" in notice
    assert kept > 700
    assert len(list(tmp_path.glob("teacher.db.damaged-*"))) == 1
    with Store(path) as store:
        assert store.notices == ()


@pytest.mark.parametrize("rubbish", [b"not a database" * 1000, b"\0" * 8192])
def test_a_file_that_is_no_store_is_put_aside(tmp_path, rubbish):
    path = tmp_path / "teacher.db"
    path.write_bytes(rubbish)
    with Store(path) as store:
        assert "put aside" in store.notices[0]
        store.put(call(1)).result()
    assert next(tmp_path.glob("teacher.db.damaged-*")).read_bytes() == rubbish


def test_a_damaged_answer_is_asked_again_and_replaced(tmp_path):
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


def test_a_lost_sample_is_found_in_its_copy(tmp_path):
    path = tmp_path / "teacher.db"
    fill(path, 50)
    ((page,),) = table(path, "select rootpage from sqlite_schema where name = 'samples'")
    with path.open("r+b") as file:
        file.seek((int(page) - 1) * PAGE)
        file.write(b"\xff" * PAGE)
    with Store(path) as store:
        assert "50 calls were saved, 0 could not be read" in store.notices[0]
        assert store.get(key(7)) == call(7).answer


def test_a_store_of_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "teacher.db"
    fill(path, 1)
    conn = sqlite3.connect(path)
    conn.execute(
        "insert into _sqlite_migrations (migration_set, name, applied_at) values ('teacher', 'from_the_future', '2030')"
    )
    conn.commit()
    conn.close()
    with pytest.raises(TapirError, match="newer version"):
        Store(path)


def test_a_folder_in_its_place_is_an_error(tmp_path):
    (tmp_path / "teacher.db").mkdir()
    with pytest.raises(TapirError, match="cannot be used"):
        Store(tmp_path / "teacher.db")


@pytest.mark.parametrize(("kind", "warned"), [("nfs4", True), ("cifs", True), ("ext4", False), ("overlay", False)])
def test_a_network_file_system_is_warned_of(tmp_path, monkeypatch, kind, warned):
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    with Store(tmp_path / "cache" / "teacher.db") as store:
        assert any("network file system" in notice for notice in store.notices) == warned


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from calls import call, key
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
        [sys.executable, "-c", FULL, str(path), str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        check=True,
    )
    stored, _, message = ended.stdout.partition(" ")
    assert "Make room" in message
    with Store(path) as store:
        assert store.notices == ()
        assert all(store.get(key(row)) for row in range(int(stored) + 1))


# Crashes and company


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from calls import call, key
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
        command = [sys.executable, "-c", WRITER, str(path), str(Path(__file__).parents[1]), str(first)]
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
from calls import call, key
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


def test_four_processes_of_eight_threads_never_find_it_locked(tmp_path):
    path = tmp_path / "teacher.db"
    command = [sys.executable, "-W", "error", "-c", CROWD, str(path), str(Path(__file__).parents[1])]
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


def test_a_claim_is_held_by_one_and_dropped_with_its_process(tmp_path):
    one, two = Claims(tmp_path / "asking"), Claims(tmp_path / "asking")
    assert one.take(key(1))
    assert not one.take(key(1))
    assert not two.take(key(1))
    assert two.take(key(2))
    one.drop(key(1))
    assert two.take(key(1))
    two.close()
    assert one.take(key(1))
    one.close()


def test_the_store_moves_with_its_file(tmp_path):
    with Store(tmp_path / "teacher.db") as store:
        for row in range(2):
            store.put(call(row)).result()
            assert store.get(key(row))
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "teacher.db", tmp_path / "elsewhere" / "teacher.db")
    with Store(tmp_path / "elsewhere" / "teacher.db", "replay") as store:
        assert store.get(key(1)) == call(1).answer


def test_a_closed_store_says_so(tmp_path):
    store = Store(tmp_path / "teacher.db")
    store.close()
    with pytest.raises(TapirError, match="closed"):
        store.put(call(1))


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_the_owner_can_read_what_was_paid_for(tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = tmp_path / "cache"
        folder.mkdir(mode=0o700)
        folder.chmod(0o700)
        with Store(folder / "teacher.db") as store:
            store.put(call(1)).result()
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
            search(folder / "teacher.db", ["4"])
        export(folder / "teacher.db", folder / "out.db")
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


def test_files_that_others_can_read_are_closed_to_them(tmp_path):
    with Store(tmp_path / "teacher.db") as store:
        store.put(call(1)).result()
    for path in tmp_path.iterdir():
        path.chmod(0o644)
    run = RunDir(tmp_path, "mine")
    run.path.mkdir(parents=True, mode=0o755)
    with Store(tmp_path / "teacher.db"), lock_run(run):
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir() if path.is_file()} == {0o600}
        assert stat.S_IMODE(run.path.stat().st_mode) == 0o700


def test_a_store_of_an_older_version_learns_its_limits_and_goes_on(tmp_path):
    path = tmp_path / "teacher.db"
    with Store(path) as store:
        for row, size in enumerate((256, 256, 512)):
            store.put(call(row, request=asked(row, {**BODY, "max_tokens": size})))
    older = sqlite3.connect(path, isolation_level=None)
    for statement in (
        "drop table reply_limits",
        "alter table calls drop column estimated",
        "alter table attempts drop column estimated",
        "delete from _sqlite_migrations where name = 'bills'",
    ):
        older.execute(statement)
    older.close()
    with Store(path, "read-only") as store:
        assert store.limits("answers") == [512, 256]
        assert spent(path, "r", estimated=True) == (0, 0, 0.0)
        assert costs(path, "run") == []
    for _ in range(2):
        with Store(path) as store:
            assert store.limits("answers") == [512, 256]
            assert store.limits("other ") == []
            store.put(call(9)).result()
