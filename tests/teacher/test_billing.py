"""A run's budget is never exceeded by what the server bills, whether or not an answer arrives."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from billing import BEHAVIOURS, PRICE, Biller, answering, behaving, late, usage, worked_then
from server import Server, attempts, questions, raises, says, teacher

from tapir_local.errors import TapirError
from tapir_local.recipe.schema import Budget
from tapir_local.store.queries import billed_to_run
from tapir_local.store.store import Store
from tapir_local.teacher import http
from tapir_local.teacher.ask import ask
from tapir_local.teacher.budget import BudgetTracker, Cost
from tapir_local.teacher.session import AskOptions

BUDGETS = {"calls": Budget(calls=12), "tokens": Budget(tokens=1500), "money": Budget(money=0.008)}
SETTINGS = {"price": PRICE, "attempts": 2, "concurrency": 6}
HEALTHY = {"answers", "cut", "empty", "filtered", "cached beside", "hits and misses", "reasoning in the total alone"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without a pause."""
    monkeypatch.setattr(http, "backoff_seconds", lambda tries, chance: 0.01)


def tracker_of(store: Path, budget: Budget) -> BudgetTracker:
    """The budget of a run's next start."""
    return BudgetTracker(budget, counted(store), Cost(*billed_to_run(store, "r", estimated=True)))


def counted(store: Path) -> Cost:
    return Cost(*billed_to_run(store, "r"))


def no_more(one: Cost, other: Cost) -> bool:
    """Whether no part of one cost is above another."""
    return one.calls <= other.calls and one.tokens <= other.tokens and one.money <= other.money * (1 + 1e-9)


def kept(cost: Cost, budget: Budget) -> bool:
    """Whether a cost is within a budget."""
    limits = budget.model_dump(exclude_none=True)
    return all(getattr(cost, name) <= limit * (1 + 1e-9) for name, limit in limits.items())


def start(
    server: Server, path: Path, budget: Budget, words: Sequence[str], max_tokens: int = 40, timeout: float = 0.15
) -> str:
    """Start a run once and return the error that ended it."""
    with Store(path) as store:
        asked, tracker = questions(*words, max_tokens=max_tokens), tracker_of(path, budget)
        try:
            ask(
                asked,
                teacher(server, **SETTINGS, timeout=timeout),
                store,
                run="r",
                options=AskOptions(budget=tracker, patience=0.3),
            )
        except TapirError as error:
            return str(error)
    return ""


def words(count: int) -> list[str]:
    return [str(number) for number in range(count)]


@pytest.mark.parametrize("limit", BUDGETS)
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_budget_is_kept_by_the_servers_own_books(server: Server, tmp_path: Path, name: str, limit: str) -> None:
    biller, budget, path = Biller(), BUDGETS[limit], tmp_path / "teacher.db"
    behaving(server, biller, BEHAVIOURS[name])
    for _ in range(2):
        # a reply of a healthy server is never late, however busy the machine is: it would be counted twice
        start(server, path, budget, words(60), timeout=60.0 if name in HEALTHY else 0.15)
        assert kept(biller.cost, budget), (biller.cost, counted(path))
        assert no_more(biller.cost, counted(path))
    if name in HEALTHY:
        assert counted(path) == Cost(biller.calls, biller.cost.tokens, pytest.approx(biller.cost.money))
        assert biller.calls >= 12


@pytest.mark.parametrize("limit", BUDGETS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_budget_is_kept_through_any_mix_of_faults_and_many_starts(
    server: Server, tmp_path: Path, limit: str, seed: int
) -> None:
    biller, path, chance = Biller(random.Random(seed)), tmp_path / "teacher.db", random.Random(seed)
    behaving(server, biller, *BEHAVIOURS.values(), *[BEHAVIOURS["answers"]] * 30, seed=seed)
    for number in range(1, 9):
        whole = BUDGETS[limit].model_dump(exclude_none=True)[limit]
        budget = Budget.model_validate({limit: type(whole)(whole * number / 4)})
        start(server, path, budget, words(80), chance.choice([20, 40, 60]))
        assert kept(biller.cost, budget), (number, biller.cost, counted(path))
        assert no_more(biller.cost, counted(path))
    assert biller.calls > 5
    assert kept(counted(path), budget)


ASKER = """
import sys
from pathlib import Path
sys.path[:0] = ["tests/support", "tests/teacher"]
from test_billing import *
from server import Server
http.INTERRUPT_GRACE_SECONDS = 0.1
server, budget = Server(port=int(sys.argv[1])), Budget.model_validate_json(sys.argv[3])
print("asking", flush=True)
print(start(server, Path(sys.argv[2]), budget, words(60)))
"""


def started(server: Server, path: Path, budget: Budget) -> "subprocess.Popen[str]":
    """Start the run in its own process."""
    command = [sys.executable, "-c", ASKER, str(server.port), str(path), budget.model_dump_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_requests_in_flight_when_a_process_ends_are_counted(
    server: Server, tmp_path: Path, how: signal.Signals
) -> None:
    """The server bills what it received; the process is killed or interrupted before the answers arrive."""
    biller, path, budget = Biller(), tmp_path / "teacher.db", Budget(calls=40, tokens=8000, money=0.05)
    chance = random.Random(3)
    behaving(server, biller, BEHAVIOURS["answers"], worked_then(lambda handler: time.sleep(0.4)))
    for _ in range(4):
        seen = len(server.bodies)
        with started(server, path, budget) as asking:
            until = time.monotonic() + 20
            while len(server.bodies) < seen + 4 and asking.poll() is None and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.1))
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(asking.pid, how)
            asking.communicate()
        assert no_more(biller.cost, counted(path)), (biller.cost, counted(path))
        assert kept(biller.cost, budget)
    assert biller.calls > 8


def test_a_request_is_on_the_disk_before_it_goes(server: Server, tmp_path: Path) -> None:
    path, known = tmp_path / "teacher.db", list[int]()

    def look(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        sql = "select count(*) from attempts where row = ? and tokens_out = 40"
        with sqlite3.connect(path) as conn:
            known.append(conn.execute(sql, (f"row-{body['messages'][-1]['content']}",)).fetchone()[0])
        BEHAVIOURS["answers"](Biller(), handler, body)

    server.otherwise = look
    assert not start(server, path, Budget(calls=100), words(60))
    assert known == [1] * 60
    with sqlite3.connect(path) as conn:
        assert conn.execute("select count(*) from attempts").fetchall() == [(0,)]


# Limits on replies


@pytest.mark.parametrize("budget", [Budget(tokens=10**6), Budget(money=5.0)])
@pytest.mark.parametrize("extra", [{"max_tokens": None}, {"max_tokens": -1}, {"max_tokens": "all"}])
def test_a_budget_needs_a_limit_on_the_replies(
    server: Server, store: Store, budget: Budget, extra: dict[str, object]
) -> None:
    with raises("teacher.extra") as caught:
        ask(
            questions("a"),
            teacher(server, price=PRICE, extra=extra),
            store,
            run="r",
            options=AskOptions(budget=BudgetTracker(budget)),
        )
    assert "max_completion_tokens: 1024" in str(caught.value)
    assert not server.bodies


def test_a_budget_of_calls_needs_no_limit_and_another_name_of_the_limit_works(server: Server, store: Store) -> None:
    free = teacher(server, extra={"max_tokens": None})
    assert ask(questions("a"), free, store, run="r", options=AskOptions(budget=BudgetTracker(Budget(calls=5))))[
        0
    ].complete
    named = teacher(server, extra={"max_tokens": None, "max_completion_tokens": 50})
    assert ask(questions("a"), named, store, run="r", options=AskOptions(budget=BudgetTracker(Budget(tokens=500))))[
        0
    ].complete


def test_a_server_that_ignores_the_limit_is_warned_of_and_later_requests_reserve_more(
    server: Server, store: Store
) -> None:
    told: list[str] = []
    server.otherwise = lambda handler, body: answering(lambda prompt, written: usage(20, 900))(Biller(), handler, body)
    tracker = BudgetTracker(Budget(tokens=4000))
    with raises("tokens 3,680 of 4,000"):
        ask(
            questions(*words(30), max_tokens=40),
            teacher(server, concurrency=1),
            store,
            run="r",
            options=AskOptions(budget=tracker, warn=told.append),
        )
    assert len(server.bodies) == 4
    assert len(told) == 1
    assert "a reply took 20 tokens of prompt and 900 of reply" in told[0]


# Messages


def test_a_reply_without_token_counts_is_counted_at_its_maximum_with_one_warning(server: Server, store: Store) -> None:
    told: list[str] = []
    server.otherwise = lambda handler, body: BEHAVIOURS["usage null"](Biller(), handler, body)
    tracker = BudgetTracker(Budget(tokens=10_000))
    for word in ("a", "b"):
        ask(
            questions(word, max_tokens=40),
            teacher(server),
            store,
            run="r",
            options=AskOptions(budget=tracker, warn=told.append),
        )
    assert len(told) == 1
    assert "58 tokens of prompt and 40 of reply" in told[0]
    assert tracker.spent == tracker.estimated == Cost(2, 2 * 98, 0.0)


def test_the_error_names_the_exceeded_limit_and_a_sufficient_value(server: Server, store: Store) -> None:
    tracker = BudgetTracker(Budget(money=0.002, calls=1000))
    priced = teacher(server, price=PRICE, concurrency=1)
    with raises("the budget is spent: money 0.00") as caught:
        ask(questions(*words(100), max_tokens=40), priced, store, run="r", options=AskOptions(budget=tracker))
    assert "calls" not in str(caught.value)
    assert "--set budget.money=0.0025" in str(caught.value)
    tracker = BudgetTracker(Budget(money=0.0025, calls=1000), counted_in(store))
    before = len(server.bodies)
    with raises("the budget is spent"):
        ask(questions(*words(100), max_tokens=40), priced, store, run="r", options=AskOptions(budget=tracker))
    assert len(server.bodies) > before


def counted_in(store: Store) -> Cost:
    store.flush()
    return counted(store.path)


def test_estimated_costs_are_stated_separately(server: Server, store: Store) -> None:
    server.otherwise = lambda handler, body: worked_then(late)(Biller(), handler, body)
    with raises("(2 of it estimated, for lost replies"):
        ask(
            questions("a"),
            teacher(server, timeout=0.1),
            store,
            run="r",
            options=AskOptions(budget=BudgetTracker(Budget(calls=2))),
        )
    assert [why for _, why in attempts(store)] == ["no answer within 0.1 s"] * 2


# Answers paid for twice


def test_a_damaged_answer_that_is_bought_again_counts_twice(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "teacher.db"
    for _ in range(3):
        with Store(path) as store:
            assert ask(questions("a"), teacher(server, price=PRICE), store, run="r")[0].complete
        with sqlite3.connect(path) as conn:
            conn.execute("update calls set answer = x'00'")
    assert len(server.bodies) == 3
    assert counted(path) == Cost(3, 30, pytest.approx(3 * (7 * 2 + 3 * 8) / 1e6))
    with Store(path, "refresh") as store:
        ask(questions("a"), teacher(server, price=PRICE), store, run="r")
    assert counted(path).calls == 4


# A larger max_tokens


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_larger_max_tokens_pays_only_for_the_cut_answers(server: Server, store: Store, name: str) -> None:
    def asked(size: int) -> list[bool]:
        extra = {} if name == "max_tokens" else {"max_tokens": None, name: size}
        asked = ask(questions(*words(100), max_tokens=size), teacher(server, extra=extra), store, run="r")
        return [answer.hit for answer in asked]

    for word in words(100)[::20]:
        server.faults[word] = [says("cut", "length")]
    assert asked(40) == [False] * 100
    assert asked(80) == [number % 20 != 0 for number in range(100)]
    assert len(server.bodies) == 105
    assert asked(400) == [True] * 100
    assert asked(20) == [False] * 100  # a longer answer is none to a request with less room


def test_a_replay_finds_shorter_answers_and_a_run_is_told_their_keys(server: Server, store: Store) -> None:
    (first,) = ask(questions("a", max_tokens=40), teacher(server), store, run="r")
    with Store(store.path, "replay") as replay:
        (again,) = ask(questions("a", max_tokens=80), teacher(server), replay, run="s")
    assert (again.text, again.hit, again.key) == ("re: a", True, first.key)
    (here,) = ask(questions("a", max_tokens=80), teacher(server), store, run="s")
    assert here.key == first.key
    store.flush()
    with sqlite3.connect(store.path) as conn:
        assert conn.execute("select run, hex(key) from uses order by run").fetchall() == [
            ("r", first.key.upper()),
            ("s", first.key.upper()),
        ]


@pytest.mark.parametrize("change", [{"model": "n"}, {"alias": "other"}, {"extra": {"top_p": 0.5}}])
def test_shorter_answers_of_other_endpoints_or_settings_are_not_reused(
    server: Server, store: Store, change: dict[str, Any]
) -> None:
    ask(questions("a", max_tokens=40), teacher(server), store, run="r")
    assert not ask(questions("a", max_tokens=80), teacher(server, **change), store, run="r")[0].hit
    assert not ask(questions("a", max_tokens=80, draw=1), teacher(server), store, run="r")[0].hit
    assert not ask(questions("a", max_tokens=80, temperature=1.0), teacher(server), store, run="r")[0].hit
