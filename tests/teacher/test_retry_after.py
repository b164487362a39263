"""A server's rate limit: what its headers ask for is read and obeyed, and waiting ends."""

import threading
import time

import pytest
from server import malformed, questions, raises, status, teacher

from tapir_local.teacher.ask import ask
from tapir_local.teacher.rate_limit import (
    CallMeter,
    allowance_wait,
    backoff_seconds,
    parse_wait_seconds,
    requested_wait,
)
from tapir_local.teacher.session import AskOptions


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


def test_the_meter_counts_what_happens_to_requests(server, store):
    """In flight, 429s, requests sent again, unreadable replies, and the pause that the server asked for."""
    server.faults["a"] = [status(429, retry_after="0.3"), status(500), malformed]
    server.seconds = 0.05
    meter, seen = CallMeter(), []

    def watch():
        while not done.is_set():
            seen.append(meter.read())
            time.sleep(0.005)

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    ask(questions("a", "b", "c"), teacher(server, concurrency=2), store, run="r", options=AskOptions(meter=meter))
    done.set()
    watcher.join()
    found = meter.read()
    assert (found.replies, found.rate_limited, found.retries, found.unreadable) == (3, 1, 2, 1)
    assert found.in_flight == 0
    assert max(counts.in_flight for counts in seen) == 2
    assert {counts.at_once for counts in seen} <= {0, 1, 2}
    assert 0.0 < max(counts.pause for counts in seen) <= 0.3
    ask(questions("a"), teacher(server), store, run="r", options=AskOptions(meter=meter))
    assert meter.read().replies == 3  # from the store
