"""A reply without end, however it is sent, neither fills the memory nor the store."""

import gzip
import tracemalloc

import pytest
from server import brings, completion, questions, teacher

from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.session import AskSession

MEGABYTE = 1 << 20


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("code", [200, 400, 500])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_large_bodies_leave_the_store_small(server, tmp_path, code, packed):
    raw = b'{"error": "' + b"a" * (40 if packed else 20) * MEGABYTE
    sent = brings(gzip.compress(raw), code, content_encoding="gzip") if packed else brings(raw, code)
    server.faults["a"] = [sent] * 9
    path = tmp_path / "teacher.db"
    with Store(path) as store:
        answers = ask(questions("b", "a", "c"), teacher(server, concurrency=1), store, run="r")
    assert [answer.text for answer in answers] == ["re: b", "", "re: c"]
    assert path.stat().st_size < 10 * MEGABYTE


def test_a_long_answer_is_kept_whole(server, store):
    text = "word " * (4 * MEGABYTE // 5)
    server.otherwise = brings(completion(text))
    ask(questions("a"), teacher(server), store, run="r")
    assert ask(questions("a"), teacher(server), store, run="r")[0].text == text
    assert len(server.bodies) == 1


def test_a_waiting_request_takes_little_memory_beside_its_own_text(server, store):
    """A stage may ask 100,000 at once; with its canonical JSON each took 12 KB."""
    session = AskSession(questions(*("word " * 300 + str(n) for n in range(500))), teacher(server), store, "r")
    tracemalloc.start()
    try:
        jobs = session.look_up()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(jobs) == 500
    assert taken / len(jobs) < 3000
