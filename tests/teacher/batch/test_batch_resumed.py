"""Pending batches: cut runs, later runs and several runs at once share one batch; nothing is paid for twice."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from batches import by_batch, leave_away, read_until, started, table, teacher, words
from command_line import ROOT
from server import questions, texts

from tapir_local.recipe.endpoints import Price
from tapir_local.store.schema import PAGE_BYTES
from tapir_local.store.store import Store
from tapir_local.teacher.session import AskSession


def wait_for(seen: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not seen() and time.monotonic() < end:
        time.sleep(0.01)


# Cut and resumed


def test_a_run_killed_before_the_batch_id_is_stored_recovers_it(server, tmp_path):
    """The other batches push ours to another page of the server's list."""
    server.on_create = lambda handler: asking.kill()
    with started(server, tmp_path / "t.db", "a", "b") as asking:
        assert asking.wait() == -signal.SIGKILL
    server.on_create = None
    for _ in range(7):
        server.submit(server.put(b""))
    with Store(tmp_path / "t.db") as store:
        assert table(store, "select server from batches") == [("",)]
        assert texts(by_batch(["a", "b", "c"], teacher(server), store)) == ["re: a", "re: b", "re: c"]
    ours = [len(batch["lines"]) for batch in server.batches.values() if batch["metadata"]]
    assert ours == [2, 1]
    assert sorted(server.paid) == ["a", "b", "c"]


@pytest.mark.parametrize("unlike", [{"metadata": None}, {"input_file_id": "renamed"}], ids=str)
def test_a_batch_whose_creation_was_not_confirmed_is_found_and_not_made_again(server, store, unlike):
    """Some servers keep no metadata and some proxies rename files: one of the two is enough."""

    def lose(handler: Any) -> None:
        server.on_create = None
        server.batches["batch_0"] |= unlike
        handler.connection.shutdown(2)

    server.on_create = lose
    assert texts(by_batch(["a", "b"], teacher(server), store)) == ["re: a", "re: b"]
    assert len(server.batches) == 1


def test_a_batch_that_was_never_created_is_submitted_after_a_check(server, store):
    server.statuses = {"POST /batches": [500, 503]}
    assert texts(by_batch(["a", "b"], teacher(server), store)) == ["re: a", "re: b"]
    assert len(server.batches) == 1
    assert server.calls.count("GET /batches") >= 4, "twice each: a new batch may be late in the list"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_next_run_fetches_the_pending_batch_of_a_cut_run(server, tmp_path, how):
    server.held = True
    with started(server, tmp_path / "t.db", "a", "b") as asking:
        read_until(asking, "in_progress")
        asking.send_signal(how)
        said = read_until(asking, "pending")
        assert asking.wait() == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert said == "['1 batch is pending with 2 requests; run the same command again to fetch the answers']\n"
    server.held = False
    with Store(tmp_path / "t.db") as store:
        assert texts(by_batch(["b", "a"], teacher(server), store)) == ["re: b", "re: a"]
    assert len(server.batches) == 1
    assert sorted(server.paid) == ["a", "b"]


def test_answers_for_another_run_stay_in_the_batch(server, tmp_path):
    leave_away(server, tmp_path / "t.db", *words(6))
    with Store(tmp_path / "t.db") as store:
        by_batch(words(2), teacher(server), store)
        assert table(store, "select count(*) from batch_keys") == [(4,)]
        assert len(by_batch(words(6), teacher(server), store)) == 6
    assert (len(server.batches), len(server.paid)) == (1, 6)


def test_a_live_run_waits_for_pending_batches_and_sends_the_rest(server, tmp_path):
    leave_away(server, tmp_path / "t.db", "a", "b")
    with Store(tmp_path / "t.db") as store:
        priced = teacher(server, batch=False, price=Price(input=10.0, output=20.0))
        answers = by_batch(["a", "b", "c"], priced, store)
        assert table(store, "select round(price * 1e6) from calls order by id") == [(65,), (65,), (130,)]
    assert texts(answers) == ["re: a", "re: b", "re: c"]
    assert (sorted(server.paid), server.live, len(server.batches)) == (["a", "b"], ["c"], 1)


RECIPE = """
name: away
seeds: {{path: pocket, limit: 40, holdout: 5}}
student: pocket
teacher: {{base_url: "{url}", model: m, batch: true}}
"""


def test_ctrl_c_says_that_the_same_command_fetches_the_batch(server, tmp_path):
    server.held = True
    (tmp_path / "r.yaml").write_text(RECIPE.format(url=server.url))
    code = "import cli, signal; signal.signal(signal.SIGINT, signal.default_int_handler); cli.main()"
    command = [sys.executable, "-c", code, "distill", str(tmp_path / "r.yaml"), "--cache", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as running:
        wait_for(lambda: "GET /batches/batch_0" in server.calls or running.poll() is not None)
        running.send_signal(signal.SIGINT)
        said = running.communicate()[1]
    assert running.returncode == 130
    assert "stopped; run the same command again to resume" in said
    assert "1 batch is pending with 40 requests; run the same command again to fetch the answers" in said


def test_a_live_run_asks_what_a_refused_batch_did_not_answer(server, tmp_path):
    server.ends = ["failed"]
    server.on_create = lambda handler: asking.kill()
    with started(server, tmp_path / "t.db", "a", "b") as asking:
        asking.wait()
    with Store(tmp_path / "t.db") as store:
        assert texts(by_batch(["a", "b"], teacher(server, batch=False), store)) == ["re: a", "re: b"]
    assert sorted(server.live) == ["a", "b"]


def test_a_damaged_store_keeps_its_pending_batches(server, tmp_path):
    leave_away(server, tmp_path / "t.db", *words(50))
    Store(tmp_path / "t.db").close()
    with sqlite3.connect(tmp_path / "t.db") as conn:
        ((page,),) = conn.execute("select rootpage from sqlite_schema where name = 'uses'").fetchall()
    with (tmp_path / "t.db").open("r+b") as file:
        file.seek((page - 1) * PAGE_BYTES)
        file.write(b"\xff" * PAGE_BYTES)
    with Store(tmp_path / "t.db") as store:
        assert "was renamed to" in store.notices[0]
        assert len(by_batch(words(50), teacher(server), store)) == 50
    assert (len(server.batches), len(server.paid)) == (1, 50)


# Several runs


def test_two_threads_and_another_process_wait_for_the_same_batch(server, store):
    server.held = True
    got: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: got.append(texts(by_batch(words(5), teacher(server), store)))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    with started(server, store.path, *words(5)) as asking:
        read_until(asking, "in_progress")
        server.held = False
        said = read_until(asking, "re: ")
    for thread in threads:
        thread.join()
    wanted = [f"re: {word}" for word in words(5)]
    assert got == [wanted] * 2
    assert said.strip() == str(wanted)
    assert (len(server.batches), len(server.paid)) == (1, 5)
    assert table(store, "select sum(paid) from uses") == [(5,)]


def test_a_request_in_flight_live_is_not_submitted(server, store):
    """Another owner claims `b`; after it is released without an answer, it is submitted in a batch of its own."""
    asking = AskSession(questions("a", "b"), teacher(server), store, "r")
    key = asking.look_up()[1].key
    assert store.claim(key)
    threading.Timer(0.5, lambda: store.release(key)).start()
    assert texts(by_batch(["a", "b"], teacher(server), store)) == ["re: a", "re: b"]
    assert [len(batch["lines"]) for batch in server.batches.values()] == [1, 1]


def test_a_live_run_leaves_jobs_that_a_batch_took_meanwhile(server, store):
    """`0` is slow; while it is asked, another run submits the jobs behind it."""
    server.gate, server.held = threading.Event(), True
    told: list[str] = []
    got: dict[str, list[str]] = {}
    one, other = teacher(server, batch=False, concurrency=1), teacher(server)

    def live() -> None:
        got["live"] = texts(by_batch(words(4), one, store, tell=lambda done, total, text: told.append(text)))

    def batch() -> None:
        got["batch"] = texts(by_batch(words(4)[1:], other, store))

    threads = [threading.Thread(target=live), threading.Thread(target=batch)]
    threads[0].start()
    assert server.at_gate.wait(10)
    threads[1].start()
    wait_for(lambda: "GET /batches/batch_0" in server.calls)
    server.gate.set()
    wait_for(lambda: told or len(server.live) > 1)
    server.held = False
    for thread in threads:
        thread.join()
    assert got == {"live": [f"re: {word}" for word in words(4)], "batch": [f"re: {word}" for word in words(4)[1:]]}
    assert (server.live, sorted(server.paid)) == (["0"], ["1", "2", "3"])
