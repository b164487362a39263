"""Asking by batch: each request is submitted and paid for once, even if runs are cut or replies are lost."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from batches import BatchApi, never, refused, replied, serving
from server import attempts, completion, questions, raises

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Price, Teacher
from tapir_local.recipe.schema import Budget
from tapir_local.records import Answer
from tapir_local.store.queries import billed_to_run
from tapir_local.store.schema import FIRST_TABLES, MIGRATIONS, PAGE_BYTES
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.batch_api import batch_line, has_ended, parse_result_lines, split_into_batches
from tapir_local.teacher.budget import BudgetTracker
from tapir_local.teacher.endpoint import request_body
from tapir_local.teacher.pending_batches import DEFAULT_BATCH_LIMITS, BatchLimits
from tapir_local.teacher.session import AskOptions, AskSession

FAST = BatchLimits(first_wait=0.02, longest_wait=0.05, settle=0.3)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server() -> Iterator[BatchApi]:
    with serving() as known:
        yield known


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def teacher(server: BatchApi, **settings: Any) -> Teacher:
    return Teacher(**{"base_url": server.url, "model": "m", "timeout": 20, "batch": True, **settings})


def by_batch(
    words: list[str], endpoint: Teacher, store: Store, limits: BatchLimits = FAST, **more: Any
) -> list[Answer]:
    return ask(questions(*words), endpoint, store, run="r", options=AskOptions(batch_limits=limits, **more))


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def table(store: Store, sql: str) -> list[Any]:
    store.flush()
    with sqlite3.connect(store.path) as conn:
        return conn.execute(sql).fetchall()


def words(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def wait_for(seen: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not seen() and time.monotonic() < end:
        time.sleep(0.01)


# One batch


def test_answers_come_in_the_order_of_the_requests_and_are_paid_once(server, store):
    shown: list[tuple[int, int, str]] = []
    first = by_batch(words(8), teacher(server), store, tell=lambda *seen: shown.append(seen))
    second = by_batch(words(8), teacher(server), store)
    assert texts(first) == texts(second) == [f"re: {word}" for word in words(8)]
    assert {(answer.hit, answer.finish, answer.tokens_in, answer.tokens_out) for answer in first} == {
        (False, "stop", 7, 3)
    }
    assert all(answer.hit for answer in second)
    assert sorted(server.paid) == words(8)
    assert (len(server.batches), server.live) == (1, [])
    assert (0, 8, "batch (in_progress): 0 of 8 answered") in shown
    assert shown[-1] == (0, 8, "batch (completed): 8 of 8 answered")


def test_the_upload_and_the_stored_calls(server, store):
    settings = teacher(server, extra={"top_p": 0.5, "max_tokens": None})
    asked = questions("a", "b", "a")
    answers = ask(asked, settings, store, run="r", options=AskOptions(batch_limits=FAST))
    lines = [json.loads(line) for line in server.files["file-0"].splitlines()]
    assert [line["custom_id"] for line in lines] == [answer.key for answer in answers[:2]]
    assert [line["body"] for line in lines] == [request_body(request, settings) for request in asked[:2]]
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
    ((sent),) = server.batches.values()
    assert (sent["endpoint"], sent["completion_window"]) == ("/v1/chat/completions", "24h")
    assert [answer.hit for answer in answers] == [False, False, True]
    assert store.get(bytes.fromhex(answers[0].key)) == orjson.dumps(completion("re: a"))
    assert table(store, "select row, paid from uses order by row") == [("row-a", 1), ("row-b", 1)]
    assert table(store, "select seconds from calls") == [(60.0,)] * 2
    assert table(store, "select count(*) from batch_keys") == [(0,)]
    assert table(store, "select server, state from batches") == [("batch_0", "completed")]


def test_an_answer_by_batch_serves_the_live_run_and_the_other_way_round(server, store):
    by_batch(["a"], teacher(server), store)
    live = by_batch(["a", "b"], teacher(server, batch=False), store)
    again = by_batch(["a", "b"], teacher(server), store)
    assert [answer.hit for answer in live] == [True, False]
    assert [answer.hit for answer in again] == [True, True]
    assert (server.paid, server.live, len(server.batches)) == (["a"], ["b"], 1)


def test_a_batch_is_no_larger_than_the_budget_and_the_rest_follows_when_it_is_raised(server, store):
    priced = teacher(server, price=Price(input=10.0, output=20.0))
    with pytest.raises(TapirError, match="calls 5 of 5"):
        ask(
            questions(*words(8)),
            priced,
            store,
            run="r",
            options=AskOptions(batch_limits=FAST, budget=BudgetTracker(Budget(calls=5))),
        )
    assert [len(batch["lines"]) for batch in server.batches.values()] == [5]
    answers = ask(
        questions(*words(8)),
        priced,
        store,
        run="r",
        options=AskOptions(batch_limits=FAST, budget=BudgetTracker(Budget(calls=3))),
    )
    assert texts(answers) == [f"re: {word}" for word in words(8)]
    assert [len(batch["lines"]) for batch in server.batches.values()] == [5, 3]
    assert set(table(store, "select price from calls")) == {(0.5 * (7 * 10 + 3 * 20) / 1e6,)}


def test_too_many_requests_for_a_file_become_several_batches(server, store):
    answers = by_batch(words(8), teacher(server), store, BatchLimits(3, 10**6, 0.02, 0.05, 0.3))
    assert texts(answers) == [f"re: {word}" for word in words(8)]
    assert [len(batch["lines"]) for batch in server.batches.values()] == [3, 3, 2]
    assert sorted(server.paid) == words(8)


def test_batches_are_as_large_as_the_limits_allow(server, store):
    jobs = AskSession(questions(*words(7)), teacher(server), store, "r").look_up()
    length = len(batch_line(jobs[0]))
    assert [len(part) for part in split_into_batches(jobs, 100, 3 * length)] == [3, 3, 1]
    assert [len(part) for part in split_into_batches(jobs, 100, 3 * length - 1)] == [2, 2, 2, 1]
    assert [len(part) for part in split_into_batches(jobs, 2, 10**9)] == [2, 2, 2, 1]
    assert [len(part) for part in split_into_batches(jobs, 100, 1)] == [1] * 7
    assert [job for part in split_into_batches(jobs, 2, 10**9) for job in part] == jobs
    assert list(split_into_batches([], 2, 2)) == []


def test_the_default_limits_are_those_of_openai():
    assert (
        DEFAULT_BATCH_LIMITS.requests,
        DEFAULT_BATCH_LIMITS.size,
        DEFAULT_BATCH_LIMITS.first_wait,
        DEFAULT_BATCH_LIMITS.longest_wait,
    ) == (50_000, 200_000_000, 5.0, 60.0)


def test_unreadable_result_lines_are_skipped():
    raw = b'{"custom_id": "00ff", "x": 1}\n\nnot json\n{"custom_id": "row-1"}\n{"id": 3}\n[]\n{"custom_id": 3}\n'
    assert parse_result_lines(raw) == {b"\x00\xff": {"custom_id": "00ff", "x": 1}}


def test_a_batch_has_ended_when_the_answers_it_counts_can_be_fetched():
    from openai.types import Batch

    def ended(**fields: Any) -> bool:
        counts = {"completed": 1, "failed": 0, "total": 2}
        return has_ended(Batch.construct(**{"status": "completed", "request_counts": counts, **fields}))

    assert not ended()
    assert ended(output_file_id="file-1")
    assert ended(request_counts={"completed": 0, "failed": 2, "total": 2}, error_file_id="file-2")
    assert ended(status="failed", request_counts=None)
    assert not any(ended(status=name, output_file_id="file-1") for name in ("validating", "finalizing", "cancelling"))


# Cut and resumed


ASKING = """
import sys, signal
from pathlib import Path
sys.path[:0] = [sys.argv[3] + "/support", sys.argv[3] + "/teacher"]
from test_batch import FAST
from server import questions
from tapir_local.recipe.endpoints import Teacher
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.session import AskOptions
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
with Store(Path(sys.argv[1])) as store:
    told = lambda done, total, text: print(text, flush=True)
    endpoint = Teacher(base_url=sys.argv[2], model="m", batch=True)
    try:
        options = AskOptions(batch_limits=FAST, tell=told)
        answers = ask(questions(*sys.argv[4:]), endpoint, store, run="other", options=options)
    except KeyboardInterrupt as stopped:
        print(getattr(stopped, "__notes__", []), flush=True)
        sys.exit(130)
    print([answer.text for answer in answers], flush=True)
"""


def started(server: BatchApi, path: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ASKING, str(path), server.url, str(Path(__file__).parents[1]), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def read_until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout
    line = " "
    while line and word not in line:
        line = process.stdout.readline()
    return line


def leave_away(server: BatchApi, path: Path, *words: str) -> None:
    """A run that submits a batch of these words and is killed while it is pending."""
    server.held = True
    with started(server, path, *words) as asking:
        read_until(asking, "in_progress")
        asking.kill()
    server.held = False


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


# What goes wrong with a batch


@pytest.mark.parametrize("end", ["expired", "cancelled"])
def test_answers_of_an_unfinished_batch_are_kept_and_the_rest_is_resubmitted(server, store, end):
    server.ends = [end, end]
    assert texts(by_batch(words(8), teacher(server), store)) == [f"re: {word}" for word in words(8)]
    assert [len(batch["lines"]) for batch in server.batches.values()] == [8, 4, 2]
    assert sorted(server.paid) == words(8)
    why = f"batch_{end}: This request could not be executed."
    assert sorted(attempts(store)) == sorted((f"row-{row}", why) for row in [4, 5, 6, 7, 6, 7])


def test_batches_that_keep_expiring_end_in_an_error(server, store):
    server.ends = ["expired"] * 9
    with raises("row row-1: batch_expired: This request could not be executed. (tried 2 times)"):
        by_batch(words(2), teacher(server, attempts=2), store)
    server.ends = []
    assert texts(by_batch(words(2), teacher(server), store)) == ["re: 0", "re: 1"]
    assert sorted(server.paid) == ["0", "1"]


def test_a_batch_that_does_not_pass_validation_stops_with_the_servers_words(server, store):
    server.ends = ["failed"]
    with raises("batch batch_0 failed: line 1: The model 'm' is not for batches."):
        by_batch(words(3), teacher(server), store)
    assert texts(by_batch(words(3), teacher(server), store)) == ["re: 0", "re: 1", "re: 2"]
    assert len(server.paid) == 3


def test_batches_refused_for_lack_of_space_are_submitted_later(server, store):
    server.room, server.looks = 4, 3
    answers = by_batch(words(9), teacher(server), store, BatchLimits(2, 10**6, 0.02, 0.05, 0.3))
    assert texts(answers) == [f"re: {word}" for word in words(9)]
    assert sorted(server.paid) == words(9)
    refused = [batch for batch in server.batches.values() if batch["status"] == "failed"]
    assert 1 <= len(refused) <= 6


def test_a_batch_too_large_for_the_account_is_made_smaller(server, store):
    server.room = 3
    assert len(by_batch(words(9), teacher(server), store)) == 9
    assert sorted(server.paid) == words(9)
    assert max(len(batch["lines"]) for batch in server.batches.values() if batch["status"] != "failed") <= 3
    server.room = 0
    with raises("Enqueued token limit reached"):
        by_batch(["x"], teacher(server), store)


def test_a_batch_that_the_endpoint_does_not_know_is_given_up_after_two_days(server, tmp_path):
    server.held = True
    with started(server, tmp_path / "t.db", "a") as asking:
        read_until(asking, "in_progress")
        asking.kill()
    server.held = False
    server.batches.clear()
    with Store(tmp_path / "t.db") as store:
        with raises("does not know batch batch_0, which contains 1 of the requests"):
            by_batch(["a"], teacher(server), store)
        with sqlite3.connect(store.path) as conn:
            conn.execute("update batches set created = created - 180000")
        assert texts(by_batch(["a"], teacher(server), store)) == ["re: a"]


def test_answers_deleted_on_the_server_are_asked_again(server, store):
    server.statuses = {"GET /files": [404, 404]}
    assert texts(by_batch(["a"], teacher(server), store)) == ["re: a"]
    assert attempts(store) == [("row-a", "no answer in batch batch_0, whose status is completed")]
    assert len(server.batches) == 2


def test_answers_that_were_lost_on_the_server_count_as_billed(server, store):
    server.statuses = {"GET /files": [404, 404]}
    tracker = BudgetTracker(Budget(calls=2, tokens=5000))
    assert texts(by_batch(["a"], teacher(server), store, budget=tracker)) == ["re: a"]
    assert (tracker.spent.calls, tracker.estimated.calls) == (2, 1)
    store.flush()
    assert billed_to_run(store.path, "r") == (2, tracker.spent.tokens, 0.0)


def test_a_larger_max_tokens_submits_only_the_cut_answers(server, store):
    server.faults["b"] = [replied(200, completion("half", "length"))]
    ask(questions("a", "b", "c", max_tokens=40), teacher(server), store, run="r", options=AskOptions(batch_limits=FAST))
    answers = ask(
        questions("a", "b", "c", max_tokens=80), teacher(server), store, run="r", options=AskOptions(batch_limits=FAST)
    )
    assert texts(answers) == ["re: a", "re: b", "re: c"]
    assert sorted(server.paid) == ["a", "b", "b", "c"]


def test_a_late_output_file_is_waited_for(server, store):
    server.statuses = {"GET /files": [404]}
    assert texts(by_batch(["a"], teacher(server), store)) == ["re: a"]
    assert len(server.batches) == 1


# What goes wrong with a line


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (refused(429, "slow down"), "429: slow down"),
        (refused(500, "oops"), "500: oops"),
        (never("request_timeout"), "request_timeout: This request could not be executed."),
        ({"response": None, "error": None}, "no answer in batch batch_0, whose status is completed"),
        (replied(200, {"choices": []}), 'the reply is not a chat completion (without choices: {"choices":[]})'),
        (replied(200, completion(" ")), "finish stop, empty"),
    ],
)
def test_a_line_without_an_answer_goes_into_another_batch(server, store, line, why):
    server.faults["b"] = [line]
    assert texts(by_batch(["a", "b", "c"], teacher(server), store)) == ["re: a", "re: b", "re: c"]
    assert [len(batch["lines"]) for batch in server.batches.values()] == [3, 1]
    assert attempts(store) == [("row-b", why)]


def test_attempts_are_counted(server, store):
    server.faults["a"] = [refused(500, "oops")] * 2
    with raises("row row-a: 500: oops (tried 2 times)"):
        by_batch(["a", "b"], teacher(server, attempts=2), store)
    assert texts(by_batch(["a", "b"], teacher(server), store)) == ["re: a", "re: b"]
    server.faults["c"] = [replied(200, completion(""))] * 2
    (answer,) = by_batch(["c"], teacher(server, attempts=2), store)
    assert (answer.text, answer.finish, answer.complete) == ("", "stop", False)


@pytest.mark.parametrize(
    ("line", "finish"),
    [
        (refused(400, "filtered", "content_filter"), "content_filter"),
        (refused(400, "this prompt is too long"), "refused"),
        (refused(400, "unheard of"), "refused"),
        (replied(200, completion("", "content_filter")), "content_filter"),
        (replied(200, completion("half", "length")), "length"),
    ],
)
def test_refusals_and_cut_replies_are_returned_as_by_the_live_api(server, store, line, finish):
    server.faults["b"] = [line]
    answers = by_batch(["a", "b"], teacher(server), store)
    assert [answer.finish for answer in answers] == ["stop", finish]
    assert len(server.batches) == 1


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        (refused(404, "no such model"), "a model named 'm'"),
        (refused(429, "You exceeded your quota", "insufficient_quota"), "Add credit to the account"),
    ],
)
def test_a_refused_line_names_its_row_and_the_others_are_kept(server, store, line, fix):
    server.faults["b"] = [line]
    with raises("row row-b: ") as caught:
        by_batch(["a", "b", "c"], teacher(server), store)
    assert fix in str(caught.value)
    assert [answer.hit for answer in by_batch(["a", "b", "c"], teacher(server), store)] == [True, False, True]
    assert sorted(server.paid) == ["a", "b", "c"]


# What goes wrong with the endpoint


@pytest.mark.parametrize("path", ["POST /files", "POST /batches", "GET /batches/"])
def test_a_wrong_key_stops_at_once_and_is_never_kept(server, store, monkeypatch, path):
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    server.statuses = {path: [401]}
    with raises("environment variable MY_KEY") as caught:
        by_batch(["a"], teacher(server, api_key_env="MY_KEY"), store)
    assert "sk-secret" not in str(caught.value)
    assert set(server.keys) == {"Bearer sk-secret-123"}
    server.faults["a"] = [refused(500, "not with sk-secret-123")]
    assert texts(by_batch(["a"], teacher(server, api_key_env="MY_KEY"), store)) == ["re: a"]
    store.flush()
    kept = b"".join(file.read_bytes() for file in store.path.parent.iterdir())
    sent = b"".join(server.files[batch["input_file_id"]] for batch in server.batches.values())
    assert b"sk-secret" not in kept + sent
    assert attempts(store) == [("row-a", "500: not with ***")]
    assert len(server.batches) == 2


@pytest.mark.parametrize("path", ["POST /files", "POST /batches"])
def test_a_server_without_a_batch_api_says_so_and_can_be_asked_live(server, store, path):
    server.statuses = {path: [404]}
    with raises(f"the endpoint has no Batch API (404 for {path.replace('POST ', '/v1')})") as caught:
        by_batch(["a"], teacher(server), store)
    assert "batch: false" in str(caught.value)
    server.statuses = {"GET /batches": [404], "POST /files": [404]}
    assert texts(by_batch(["a"], teacher(server, batch=False), store)) == ["re: a"]


def test_a_web_page_instead_of_the_batch_api_is_refused(server, store):
    server.statuses = {"POST /files": [200]}
    with raises("the reply is not one of a Batch API"):
        by_batch(["a"], teacher(server), store)


def test_rate_limits_and_server_errors_are_waited_out(server, store):
    server.statuses = {"POST /files": [429], "POST /batches": [429], "GET /batches/": [503], "GET /files": [500]}
    assert texts(by_batch(["a"], teacher(server), store)) == ["re: a"]
    assert len(server.batches) == 1
    server.statuses = {"POST /files": [503] * 99}
    with raises("503: not here"):
        by_batch(["b"], teacher(server), store, patience=0.5)


def test_an_unreachable_endpoint_is_named(store):
    down = Teacher(base_url="http://127.0.0.1:9/v1", model="m", batch=True)
    with raises("http://127.0.0.1:9/v1: no connection"):
        by_batch(["a"], down, store)


def test_kinds_and_stores_that_cannot_be_asked_by_batch(server, store):
    with raises("only an endpoint of kind `openai`"):
        ask(questions("a"), Teacher(kind="pocket", batch=True), store, run="r")
    with Store(store.path, "off") as off, raises("batches need a writable store"):
        by_batch(["a"], teacher(server), off)


# The store


def test_a_store_of_the_first_version_gets_the_tables(tmp_path, server):
    path = tmp_path / "t.db"
    Store(path).close()
    with sqlite3.connect(path) as conn:
        conn.executescript("drop table batches; drop table batch_keys")
        conn.execute("delete from _sqlite_migrations where name = 'batches_away'")
    with Store(path) as store:
        assert texts(by_batch(["a"], teacher(server), store)) == ["re: a"]
    assert next(iter(MIGRATIONS.items())) == ("first_tables", FIRST_TABLES)


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
