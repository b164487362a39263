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
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.endpoint import endpoint_identity, request_body
from tapir_local.teacher.session import AskOptions

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


def test_an_unknown_model_is_named(server, store):
    server.faults["a"] = [status(404, "no such model")]
    with raises("a model named 'm'"):
        ask(questions("a"), teacher(server), store, run="r")


def test_an_unreachable_endpoint_is_named_with_what_to_do(store):
    down = Teacher(base_url="http://127.0.0.1:9/v1", model="m")
    with raises("http://127.0.0.1:9/v1") as caught:
        ask(questions("a", "b"), down, store, run="r")
    assert "nothing paid for is lost" in str(caught.value)


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


def test_the_embedded_teacher_is_asked_like_any_other(store):
    pocket = Teacher(kind="pocket")
    (answer,) = ask(questions("What is 2 + 2?"), pocket, store, run="r")
    assert answer.complete
    assert ask(questions("What is 2 + 2?"), pocket, store, run="r")[0].hit
    assert endpoint_identity(pocket).startswith("pocket ")
    assert request_body(questions("a")[0], pocket)["model"] == "pocket"
