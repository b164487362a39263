"""Metrics against figures worked out by hand."""

import pytest

from tapir_local.metrics import evaluate, mean_interval, proportion_interval, win
from tapir_local.records import Completion, Example, Judgement, Message

ROWS = [
    Example(id, (Message("user", id),), "x", task)
    for id, task in (("a", "Math"), ("b", "Math"), ("c", "Art"), ("d", "Art"))
]
JUDGED = [Judgement("a", 8, 10), Judgement("b", 8, 8), Judgement("c", 8, 2), Judgement("d", None, None)]
TEXTS = [Completion(id, "", "length" if id == "d" else "stop", 1) for id in "abcd"]


def test_a_tie_is_half_a_win_and_an_unjudged_row_is_neither() -> None:
    assert [win(judgement) for judgement in JUDGED] == [1, 0.5, 0, None]


def test_rates_counts_and_tasks() -> None:
    found = evaluate(1, ROWS, TEXTS, JUDGED, {"a": True, "b": False, "c": True, "d": None}, "somebody")
    assert (found.rows, found.judged, found.unjudged, found.cut) == (4, 3, 1, 1)
    assert found.win_rate == 0.5
    assert found.accuracy == pytest.approx(2 / 3, abs=1e-6)
    assert found.by_task["Art"] == {"rows": 2, "win_rate": 0.0, "accuracy": 1.0}


def test_without_a_checker_there_is_no_accuracy_rather_than_zero() -> None:
    found = evaluate(1, ROWS, TEXTS, JUDGED, dict.fromkeys("abcd"), "somebody")
    assert (found.accuracy, found.accuracy_interval) == (None, None)


def test_wilsons_interval_as_in_the_textbook() -> None:
    """Of 10 successes in 20 trials: 0.299 to 0.701 (Wilson 1927)."""
    assert proportion_interval([True, False] * 10) == (pytest.approx(0.299, abs=1e-3), pytest.approx(0.701, abs=1e-3))


def test_an_interval_of_equal_values_is_the_value() -> None:
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)
    assert mean_interval([]) is None


def test_the_bootstrap_surrounds_the_mean_and_repeats() -> None:
    values = [0.0, 1.0] * 50
    low, high = mean_interval(values) or (1, 0)
    assert low < 0.5 < high
    assert mean_interval(values) == (low, high)
