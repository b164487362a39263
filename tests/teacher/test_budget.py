"""A run's budget is never exceeded; the run stops with an error and resumes when the budget is raised."""

import pytest
from server import Server, questions, raises, teacher

from tapir_local.recipe.endpoints import Price, Teacher
from tapir_local.recipe.schema import Budget
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.budget import BudgetTracker, Cost, endpoint_price, max_request_tokens, money_for_tokens
from tapir_local.teacher.session import AskOptions

PRICE = Price(input=1.0, output=10.0)
WORDS = [str(number) for number in range(40)]


def test_calls_stop_at_the_budget_and_resume_when_it_is_raised(server: Server, store: Store) -> None:
    tracker = BudgetTracker(Budget(calls=10))
    with raises("calls 10 of 10"):
        ask(questions(*WORDS), teacher(server), store, run="r", options=AskOptions(budget=tracker))
    assert len(server.bodies) == 10
    tracker = BudgetTracker(Budget(calls=40), store_spent(store))
    answers = ask(questions(*WORDS), teacher(server), store, run="r", options=AskOptions(budget=tracker))
    assert [answer.text for answer in answers] == [f"re: {word}" for word in WORDS]
    assert len(server.bodies) == 40


def store_spent(store: Store) -> Cost:
    store.flush()
    from tapir_local.store.queries import billed_to_run

    return Cost(*billed_to_run(store.path, "r"))


@pytest.mark.parametrize("budget", [Budget(tokens=2000), Budget(money=0.005)])
def test_tokens_and_money_are_never_exceeded_with_many_requests_in_flight(
    server: Server, store: Store, budget: Budget
) -> None:
    tracker = BudgetTracker(budget)
    with raises("the budget is spent"):
        ask(
            questions(*map(str, range(900)), max_tokens=20),
            teacher(server, price=PRICE),
            store,
            run="r",
            options=AskOptions(budget=tracker),
        )
    tokens = 10 * len(server.bodies)
    assert tracker.spent.tokens <= (budget.tokens or tokens)
    assert tracker.spent.money <= (budget.money or 1)
    assert len(server.bodies) > 100  # what was set aside and not used went to others
    assert tracker.spent == Cost(len(server.bodies), tokens, pytest.approx(len(server.bodies) * 37e-6))
    assert store_spent(store).tokens == tokens
    assert store_spent(store).money == pytest.approx(tracker.spent.money)


def test_hits_cost_nothing(server: Server, store: Store) -> None:
    ask(questions("a"), teacher(server), store, run="r")
    assert ask(
        questions("a"), teacher(server), store, run="r", options=AskOptions(budget=BudgetTracker(Budget(calls=0)))
    )[0].hit


def test_a_budget_of_zero_sends_nothing(server: Server, store: Store) -> None:
    with raises("calls 0 of 0"):
        ask(questions("a"), teacher(server), store, run="r", options=AskOptions(budget=BudgetTracker(Budget(calls=0))))
    assert not server.bodies


def test_what_a_call_costs() -> None:
    assert money_for_tokens(PRICE, 1_000_000, 100_000) == 2.0
    assert money_for_tokens(None, 5, 5) is None
    assert endpoint_price(Teacher(kind="pocket")) == Price(input=0, output=0)
    assert endpoint_price(Teacher(model="m")) is None
    assert endpoint_price(Teacher(model="m", price=PRICE, batch=True)) == Price(input=0.5, output=5.0)


def test_no_answer_takes_more_than_was_reserved_for_it() -> None:
    body = {"messages": [{"role": "user", "content": "é" * 100}], "max_tokens": 50}
    tokens_in, tokens_out = max_request_tokens(body)
    assert 200 <= tokens_in <= 250
    assert tokens_out == 50
    assert max_request_tokens({**body, "n": 3, "best_of": 4})[1] == 200
    assert max_request_tokens({**body, "max_completion_tokens": 70})[1] == 70
    assert max_request_tokens({**body, "response_format": {"schema": "x" * 500}})[0] >= 500 + tokens_in
