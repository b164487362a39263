"""Asking by batch: what is uploaded and stored, how requests are divided, and that each is paid for once."""

import json
import sqlite3
from typing import Any

import orjson
import pytest
from batches import FAST, by_batch, table, teacher, words
from server import completion, questions, texts

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Price
from tapir_local.recipe.schema import Budget
from tapir_local.store.schema import FIRST_TABLES, MIGRATIONS
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.batch_api import batch_line, has_ended, parse_result_lines, split_into_batches
from tapir_local.teacher.budget import BudgetTracker
from tapir_local.teacher.endpoint import request_body
from tapir_local.teacher.pending_batches import DEFAULT_BATCH_LIMITS, BatchLimits
from tapir_local.teacher.session import AskOptions, AskSession


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
    assert (0, 8, "1 batch (in_progress): 0 of 8 answered") in shown
    assert shown[-1] == (0, 8, "1 batch (completed): 8 of 8 answered")


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


def test_a_store_of_the_first_version_gets_the_tables(tmp_path, server):
    path = tmp_path / "t.db"
    Store(path).close()
    with sqlite3.connect(path) as conn:
        conn.executescript("drop table batches; drop table batch_keys")
        conn.execute("delete from _sqlite_migrations where name = 'batches_away'")
    with Store(path) as store:
        assert texts(by_batch(["a"], teacher(server), store)) == ["re: a"]
    assert next(iter(MIGRATIONS.items())) == ("first_tables", FIRST_TABLES)
