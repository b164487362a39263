"""What goes wrong with a batch, a line or its endpoint: answers are kept, the rest is asked again or explained."""

import sqlite3
from dataclasses import replace

import pytest
from batches import FAST, by_batch, never, read_until, refused, replied, started, teacher, words
from server import attempts, completion, questions, raises, texts

from tapir_local.recipe.endpoints import Teacher
from tapir_local.recipe.schema import Budget
from tapir_local.store.queries import billed_to_run
from tapir_local.store.reply import parse_reply
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.batch_api import parse_result_lines, reply_body_of_line
from tapir_local.teacher.budget import BudgetTracker
from tapir_local.teacher.pending_batches import BatchLimits
from tapir_local.teacher.session import AskOptions

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


@pytest.mark.parametrize(
    ("text", "read"),
    [(b"A \\ud83d smile", "A \ufffd smile"), (b'A."}, "logprobs": NaN, "x": {"y": "', "A."), (b"caf\xe9", "caf\ufffd")],
)
def test_a_line_that_strict_readers_refuse_is_not_paid_again(text, read):
    choice = b'{"message": {"content": "' + text + b'"}, "finish_reason": "stop"}'
    body = b'{"status_code": 200, "body": {"choices": [' + choice + b"]}}"
    found = parse_result_lines(b'{"custom_id": "' + b"ab" * 32 + b'", "response": ' + body + b"}\n")
    raw = reply_body_of_line(found[b"\xab" * 32])
    assert raw is not None
    assert parse_reply(raw).text == read


def test_an_output_file_without_end_is_not_read_into_memory(server, store):
    with raises("is larger than 500 bytes"):
        by_batch(words(8), teacher(server), store, replace(FAST, output=500))
    assert texts(by_batch(words(8), teacher(server), store)) == [f"re: {word}" for word in words(8)]
    assert sorted(server.paid) == words(8)
