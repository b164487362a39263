"""Asking a server on loopback that fails in every known way: each row is answered once and paid for once."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from server import attempts, completion, dropped, malformed, questions, raises, says, send, slow, status, teacher

from tapir_local.method import parsing
from tapir_local.recipe.endpoints import Judge, Teacher
from tapir_local.store.reply import parse_reply
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.endpoint import endpoint_identity, request_body
from tapir_local.teacher.rate_limit import allowance_wait, backoff_seconds, parse_wait_seconds, requested_wait
from tapir_local.teacher.session import AskOptions


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# Answers and hits


def test_answers_come_in_the_order_of_the_requests_and_are_paid_once(server, store):
    words = [str(number) for number in range(40)]
    shown: list[tuple[int, int, int]] = []
    first = ask(
        questions(*words),
        teacher(server),
        store,
        run="r",
        options=AskOptions(progress=lambda *seen: shown.append(seen)),
    )
    second = ask(
        questions(*words),
        teacher(server),
        store,
        run="s",
        options=AskOptions(progress=lambda *seen: shown.append(seen)),
    )
    assert [answer.text for answer in first] == [f"re: {word}" for word in words] == [answer.text for answer in second]
    assert {(answer.hit, answer.finish, answer.tokens_in, answer.tokens_out) for answer in first} == {
        (False, "stop", 7, 3)
    }
    assert all(answer.hit for answer in second)
    assert len(server.bodies) == 40
    assert shown[0] == (0, 40, 0)
    assert shown[40] == (40, 40, 0)
    assert shown[-1] == (40, 40, 40)


def test_the_body_is_what_the_recipe_says_and_nothing_else(server, store):
    settings = teacher(server, extra={"top_p": 0.5, "max_tokens": None, "max_completion_tokens": 9}, send_seed=True)
    ask(questions("a", draw=3, temperature=0.5, max_tokens=64), settings, store, run="r")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    rest = {"temperature": 0.5, "seed": 3, "top_p": 0.5, "max_completion_tokens": 9}
    assert server.bodies == [{"model": "m", "messages": messages, **rest}]
    assert set(server.paths) == {"/v1/chat/completions"}, "works without /models"


def test_several_draws_of_one_prompt_are_several_calls(server, store):
    draws = [*questions("a", draw=0), *questions("a", draw=1), *questions("a", draw=2)]
    assert not any(answer.hit for answer in ask(draws, teacher(server), store, run="r"))
    assert all(answer.hit for answer in ask(draws, teacher(server), store, run="r"))
    assert len(server.bodies) == 3
    assert "seed" not in server.bodies[0]


def test_identical_requests_in_flight_are_sent_once(server, store):
    answers = ask(questions("a", "b", "a", "a"), teacher(server), store, run="r")
    assert [answer.text for answer in answers] == ["re: a", "re: b", "re: a", "re: a"]
    assert [answer.hit for answer in answers] == [False, False, True, True]
    assert len(server.bodies) == 2


def test_two_threads_asking_the_same_pay_once(server, store):
    server.seconds = 0.05
    words = [str(number) for number in range(10)]
    got: list[list[str]] = []

    def work() -> None:
        got.append([answer.text for answer in ask(questions(*words), teacher(server), store, run="r")])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[f"re: {word}" for word in words]] * 3
    assert len(server.bodies) == 10


@pytest.mark.parametrize("change", [{"model": "n"}, {"extra": {"num_ctx": 4096}}, {"alias": "other"}])
def test_another_endpoint_is_asked_separately(server, store, change):
    ask(questions("a"), teacher(server), store, run="r")
    ask(questions("a"), teacher(server, **change), store, run="r")
    assert len(server.bodies) == 2


def test_an_alias_outlives_a_move_to_another_port(server, store):
    ask(questions("a"), teacher(server, alias="mine"), store, run="r")
    moved = Teacher(base_url="http://127.0.0.1:9/v1", model="m", alias="mine")
    assert ask(questions("a"), moved, store, run="r")[0].hit


def test_at_most_concurrency_requests_are_in_flight(server, store):
    server.seconds = 0.02
    ask(questions(*map(str, range(30))), teacher(server, concurrency=3), store, run="r")
    assert server.most == 3


def test_a_paid_answer_is_kept_as_it_came(server, store):
    server.faults["a"] = [says("no JSON at all, whoever has to parse it", reasoning_content="hm")]
    ask(questions("a"), teacher(server), store, run="r")
    with sqlite3.connect(store.path) as conn:
        (key,) = conn.execute("select key from calls").fetchone()
    assert json.loads(store.get(key) or b"")["choices"][0]["message"]["reasoning_content"] == "hm"


# Answers that are used again, and those that are not


def test_a_cut_answer_is_reused_for_the_same_max_tokens_only(server, store):
    server.faults["a"] = [says("half a", "length")]
    for _ in range(2):
        (answer,) = ask(questions("a", max_tokens=5), teacher(server), store, run="r")
        assert (answer.text, answer.finish, answer.complete) == ("half a", "length", False)
    (answer,) = ask(questions("a", max_tokens=50), teacher(server), store, run="r")
    assert answer.complete
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("fault", "finish"),
    [
        (says("", "content_filter"), "content_filter"),
        (says(None, "stop", refusal="I cannot."), "content_filter"),
        (status(400, "filtered", "content_filter"), "content_filter"),
        (says("", "length"), "length"),
        (says("", "tool_calls"), "tool_calls"),
    ],
)
def test_a_refusal_is_returned_with_its_finish_and_asked_again_next_time(server, store, fault, finish):
    server.faults["a"] = [fault]
    (answer,) = ask(questions("a"), teacher(server), store, run="r")
    assert (answer.finish, answer.complete) == (finish, False)
    assert len(attempts(store)) == len(server.bodies) == 1
    assert ask(questions("a"), teacher(server), store, run="r")[0].text == "re: a"


def test_an_empty_answer_is_retried_and_then_returned_empty(server, store):
    server.faults["a"] = [says(" "), says(None)]
    assert ask(questions("a"), teacher(server, attempts=3), store, run="r")[0].text == "re: a"
    server.faults["b"] = [says("")] * 2
    (answer,) = ask(questions("b"), teacher(server, attempts=2), store, run="r")
    assert (answer.text, answer.complete) == ("", False)
    assert [why for _, why in attempts(store)] == ["finish stop, empty"] * 4


# Faults


def test_every_row_is_answered_once_whatever_fails(server, store):
    words = [str(number) for number in range(60)]
    faults = [
        status(429, retry_after="0.01"),
        status(500),
        status(503),
        malformed,
        dropped,
        status(429, retry_after_ms="20"),
    ]
    for number, word in enumerate(words[::5]):
        server.faults[word] = [faults[number % len(faults)]]
    answers = ask(questions(*words), teacher(server), store, run="r")
    assert [answer.text for answer in answers] == [f"re: {word}" for word in words]
    assert len(server.bodies) == 60 + 12
    assert len(attempts(store)) == 12
    ask(questions(*words), teacher(server), store, run="r")
    assert len(server.bodies) == 60 + 12


def test_429s_use_up_no_attempt(server, store):
    server.faults["a"] = [status(429, retry_after="0.01")] * 12
    assert ask(questions("a"), teacher(server, attempts=1), store, run="r")[0].text == "re: a"


def test_retry_after_is_obeyed_by_all(server, store):
    server.faults["a"] = [status(429, retry_after="1")]
    start = time.monotonic()
    ask(questions("a", "b"), teacher(server, concurrency=1), store, run="r")
    assert time.monotonic() - start >= 1.0
    assert [body["messages"][1]["content"] for body in server.bodies] == ["a", "a", "b"]


def test_an_exhausted_allowance_is_waited_for(server, store):
    server.extra = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "300ms"}
    start = time.monotonic()
    ask(questions("a", "b", "c"), teacher(server, concurrency=1), store, run="r")
    assert time.monotonic() - start >= 0.6


def test_only_429s_end_in_an_error_and_not_in_a_hang(server, store):
    server.faults["a"] = [status(429, "slow down", retry_after="0.1")] * 1000
    with raises("slow down"):
        ask(questions("a"), teacher(server), store, run="r", options=AskOptions(patience=0.5))
    server.faults["b"] = [status(429, "tomorrow", retry_after="86400")]
    with raises("the next request may be sent in 86,400 s"):
        ask(questions("b"), teacher(server), store, run="r")


def test_an_empty_account_stops_at_once(server, store):
    server.faults["a"] = [status(429, "You exceeded your quota", "insufficient_quota")]
    with raises("Add credit to the account"):
        ask(questions("a"), teacher(server), store, run="r")
    assert len(server.bodies) == 1


def test_a_timed_out_request_is_sent_again(server, store):
    server.faults["a"] = [slow]
    assert ask(questions("a"), teacher(server, timeout=0.3), store, run="r")[0].text == "re: a"
    assert attempts(store) == [("row-a", "no answer within 0.3 s")]


def test_a_late_request_is_waited_for_and_not_sent_a_second_time(server, store):
    def late(handler, body):
        time.sleep(1.5)
        send(handler, 200, completion("late"))

    server.faults["39"] = [late]
    answers = ask(questions(*map(str, range(40))), teacher(server), store, run="r")
    assert answers[39].text == "late"
    assert len(server.bodies) == 40
    assert not attempts(store)


def test_a_changed_model_is_warned_of_once(server, store):
    told = []
    ask(questions("a"), teacher(server), store, run="r", options=AskOptions(warn=told.append))
    server.faults = {"c": [says("x", model="m-2")], "d": [says("y", model="m-2")]}
    ask(
        questions("b", "c", "d", "e"),
        teacher(server, concurrency=1),
        store,
        run="r",
        options=AskOptions(warn=told.append),
    )
    assert told == [f"{server.url}: 'm' is now served by m-2; before it was m-1"]


def test_one_failing_request_of_twelve_keeps_the_other_eleven(server, store):
    words = [str(number) for number in range(12)]
    server.faults["5"] = [status(401, "no such key")]
    with raises("row row-5: 401: no such key"):
        ask(questions(*words), teacher(server, concurrency=12), store, run="r")
    assert len(server.bodies) == 12
    answers = ask(questions(*words), teacher(server), store, run="r")
    assert [answer.hit for answer in answers] == [word != "5" for word in words]


def test_a_reply_that_the_caller_cannot_parse_is_paid_once(server, store):
    """The store keeps raw replies, so that a better parser costs no new calls."""
    server.faults["a"] = [says("an 8, on a scale of 1 to 10")]
    first, second = (ask(questions("a"), teacher(server), store, run="r")[0] for _ in range(2))
    assert parsing.parse_scores(first.text) is None
    assert (first.text, first.hit, second.hit) == (second.text, False, True)
    assert len(server.bodies) == 1


def test_no_call_waits_without_a_reason(server, store):
    began = time.monotonic()
    ask(questions(*map(str, range(20))), teacher(server, concurrency=1), store, run="r")
    assert time.monotonic() - began < 10  # a pause of 20 s before each call would be 400


def test_failures_are_not_cached(server, store):
    server.faults["a"] = [status(500)] * 2
    with raises("(tried 2 times)"):
        ask(questions("a"), teacher(server, attempts=2), store, run="r")
    assert ask(questions("a"), teacher(server), store, run="r")[0].complete


@pytest.mark.parametrize("code", [401, 403])
def test_a_wrong_key_stops_at_once_and_is_never_shown(server, store, monkeypatch, code):
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    server.faults = {str(row): [status(code, "Incorrect API key provided: sk-secret-123")] for row in range(50)}
    with raises("environment variable MY_KEY") as caught:
        ask(questions(*map(str, range(50))), teacher(server, api_key_env="MY_KEY", concurrency=4), store, run="r")
    assert server.headers[0]["authorization"] == "Bearer sk-secret-123"
    assert len(server.bodies) <= 8
    store.flush()
    kept = b"".join(file.read_bytes() for file in store.path.parent.iterdir())
    assert b"sk-secret" not in kept
    assert "sk-secret" not in str(caught.value)


def test_a_key_from_a_file_is_never_shown(server, store, tmp_path):
    file = tmp_path / "key"
    file.write_text("sk-in-a-file\n")
    server.faults["a"] = [status(401, "Incorrect API key provided: sk-in-a-file")]
    with raises(f"file {file}") as caught:
        ask(questions("a"), teacher(server, api_key_file=str(file)), store, run="r")
    assert server.headers[0]["authorization"] == "Bearer sk-in-a-file"
    store.flush()
    assert b"sk-in" not in b"".join(path.read_bytes() for path in store.path.parent.iterdir() if path != file)
    assert "sk-in" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "two words"])
def test_a_key_file_that_holds_no_key(server, store, tmp_path, text):
    if text is not None:
        (tmp_path / "key").write_text(text)
    with raises("key"):
        ask(questions("a"), teacher(server, api_key_file=str(tmp_path / "key")), store, run="r")
    assert not server.bodies


def test_an_unknown_model_is_named(server, store):
    server.faults["a"] = [status(404, "no such model")]
    with raises("a model named 'm'"):
        ask(questions("a"), teacher(server), store, run="r")


def test_an_unreachable_endpoint_is_named_with_what_to_do(store):
    down = Teacher(base_url="http://127.0.0.1:9/v1", model="m")
    with raises("http://127.0.0.1:9/v1") as caught:
        ask(questions("a", "b"), down, store, run="r")
    assert "nothing paid for is lost" in str(caught.value)


def test_a_missing_key_is_named_before_anything_is_sent(store):
    with raises("OPENAI_API_KEY: no API key for https://api.openai.com/v1"):
        ask(questions("a"), Teacher(model="m"), store, run="r")


@pytest.mark.parametrize("extra", [{"api_key": "sk-1"}, {"stream": True}, {"n": 2}, {"messages": []}])
def test_what_extra_may_not_set(server, store, extra):
    with raises("extra: "):
        ask(questions("a"), teacher(server, extra=extra), store, run="r")


def test_kinds_that_cannot_answer_are_refused(store):
    with raises("kind 'reference'"):
        ask(questions("a"), Judge(kind="reference", model="m"), store, run="r")
    with raises("no model"):
        ask(questions("a"), Judge(kind="openai", base_url="http://127.0.0.1:9"), store, run="r")


# Modes and interruption


def test_replay_sends_nothing_and_names_the_row(server, store):
    ask(questions("a", "b"), teacher(server), store, run="r")
    with Store(store.path, "replay") as replay:
        assert [answer.text for answer in ask(questions("a", "b"), teacher(server), replay, run="s")] == [
            "re: a",
            "re: b",
        ]
        with raises("stage answers, row row-a") as caught:
            ask(questions("a", "b"), teacher(server, extra={"top_p": 0.1}), replay, run="s")
    assert "top_p: 0.1 here, absent there" in str(caught.value)
    assert len(server.bodies) == 2


def test_refresh_and_off_ask_again(server, store):
    for mode in ("on", "refresh", "off"):
        with Store(store.path, mode) as opened:
            assert not ask(questions("a", "a"), teacher(server), opened, run="r")[0].hit
    assert len(server.bodies) == 3


INTERRUPTED = """
import signal, sys
from pathlib import Path
from tapir_local.recipe.endpoints import Teacher
from tapir_local.records import Message, Request
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.session import AskOptions
words = [(Message("system", "Be brief."), Message("user", str(row))) for row in range(4000)]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
with Store(Path(sys.argv[1])) as store:
    ask(
        [Request(prompt, f"row-{row}", "answers") for row, prompt in enumerate(words)],
        Teacher(base_url=sys.argv[2], model="m", concurrency=4),
        store,
        run="r",
        options=AskOptions(progress=lambda done, total, hits: print(done, flush=True)),
    )
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_keeps_the_answers_received(server, tmp_path, how):
    server.seconds = 0.02
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "t.db"), server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}) as asking:
        assert asking.stdout
        done = 0
        while done < 40:
            done = int(asking.stdout.readline())
        asking.send_signal(how)
        asking.wait()
    sent = len(server.bodies)
    with Store(tmp_path / "t.db") as store:
        answers = ask(questions(*map(str, range(sent))), teacher(server), store, run="r")
    kept = sum(answer.hit for answer in answers)
    assert sent < 4000
    assert kept == sent if how == signal.SIGINT else kept >= 40 - 8


# Headers, backoff and bodies


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20", 20),
        ("0.5", 0.5),
        ("6m0s", 360),
        ("20ms", 0.02),
        ("2m59.56s", 179.56),
        ("1000060", 1000060),
        ("soon", None),
    ],
)
def test_what_headers_mean(text, seconds):
    assert parse_wait_seconds(text, now=0) == (seconds if seconds is None else pytest.approx(seconds))


def test_dates_in_headers():
    assert parse_wait_seconds("Thu, 01 Jan 1970 00:01:00 GMT", now=0) == 60
    assert parse_wait_seconds("1700000060", now=1700000000) == 60
    assert parse_wait_seconds("1700000060000", now=1700000000) == 60
    assert parse_wait_seconds("Thu, 01 Jan 1970 00:01:00 GMT", now=100) == 0


def test_which_header_counts():
    empty = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "3s"}
    assert requested_wait({"retry-after": "2", **empty}) == 2
    assert requested_wait(empty) == allowance_wait(empty) == 3
    assert requested_wait({}) is None
    assert allowance_wait({"x-ratelimit-remaining-tokens": "1", "x-ratelimit-reset-tokens": "3s"}) is None


def test_backoff_grows_to_its_end():
    assert [backoff_seconds(tries, 1.0) for tries in (1, 2, 3, 9)] == [0.25, 0.5, 1, 30]
    assert backoff_seconds(3, 0.0) == 0.5


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}', b"<html>"])
def test_replies_that_are_not_completions_are_refused(raw):
    with pytest.raises(ValueError, match=r"."):
        parse_reply(raw)


def test_parts_and_other_words_for_stop():
    parts = completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "eos")
    reply = parse_reply(json.dumps(parts).encode())
    assert (reply.text, reply.finish, reply.keeps) == ("ab", "stop", True)


def test_the_embedded_teacher_is_asked_like_any_other(store):
    pocket = Teacher(kind="pocket")
    (answer,) = ask(questions("What is 2 + 2?"), pocket, store, run="r")
    assert answer.complete
    assert ask(questions("What is 2 + 2?"), pocket, store, run="r")[0].hit
    assert endpoint_identity(pocket).startswith("pocket ")
    assert request_body(questions("a")[0], pocket)["model"] == "pocket"
