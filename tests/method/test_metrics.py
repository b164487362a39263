"""Metrics compared with figures computed by hand."""

from dataclasses import replace

import pytest

from tapir_local.method.metrics import (
    bootstrap_interval,
    compute_metrics,
    is_rouge_only,
    rate_at_equal_length,
    rows_for_interval,
    warn_small_holdout,
    wilson_interval,
    win_value,
    without_win_rate,
)
from tapir_local.records import Completion, Example, Judgement, Message, Metrics
from tapir_local.stages.rounds import summarize_metrics

ROWS = [
    Example(id, (Message("user", id),), "x", task)
    for id, task in (("a", "Math"), ("b", "Math"), ("c", "Art"), ("d", "Art"))
]
JUDGED = [Judgement("a", 8, 10), Judgement("b", 8, 8), Judgement("c", 8, 2), Judgement("d", None, None)]
TEXTS = [Completion(id, "", "length" if id == "d" else "stop", 1) for id in "abcd"]


def test_a_tie_is_half_a_win_and_an_unjudged_row_is_neither() -> None:
    assert [win_value(judgement) for judgement in JUDGED] == [1, 0.5, 0, None]


def test_rates_counts_and_tasks() -> None:
    found = compute_metrics(1, ROWS, TEXTS, JUDGED, {"a": True, "b": False, "c": True, "d": None}, "somebody")
    assert (found.rows, found.judged, found.unjudged, found.cut) == (4, 3, 1, 1)
    assert found.win_rate == 0.5
    assert found.accuracy == pytest.approx(2 / 3, abs=1e-6)
    assert found.checked == 3
    assert "accuracy 66.7% of the 3 rows that the checker can decide" in summarize_metrics(found)
    assert found.by_task["Art"] == {"rows": 2, "win_rate": 0.0, "accuracy": 1.0}


def test_without_a_checker_there_is_no_accuracy_rather_than_zero() -> None:
    found = compute_metrics(1, ROWS, TEXTS, JUDGED, dict.fromkeys("abcd"), "somebody")
    assert (found.accuracy, found.accuracy_interval) == (None, None)


def test_wilsons_interval_as_in_the_textbook() -> None:
    """10 successes in 20 trials: 0.299 to 0.701 (Wilson 1927)."""
    assert wilson_interval([True, False] * 10) == (pytest.approx(0.299, abs=1e-3), pytest.approx(0.701, abs=1e-3))


def test_an_interval_of_equal_values_is_the_value() -> None:
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)
    assert bootstrap_interval([]) is None


def test_the_bootstrap_surrounds_the_mean_and_repeats() -> None:
    values = [0.0, 1.0] * 50
    low, high = bootstrap_interval(values) or (1, 0)
    assert low < 0.5 < high
    assert bootstrap_interval(values) == (low, high)


def scored(rows: int) -> Metrics:
    """Metrics of holdout rows, half of which are wins and half correct."""
    examples = [Example(f"{n}", (Message("user", "x"),), "y", "Math") for n in range(rows)]
    judged = [Judgement(f"{n}", 8, 10 if n % 2 else 2) for n in range(rows)]
    right = {f"{n}": bool(n % 2) for n in range(rows)}
    return compute_metrics(1, examples, [Completion(f"{n}", "", "stop", 1) for n in range(rows)], judged, right, "J")


def judged_by_length(rows: int, lengths: bool = True) -> Metrics:
    """Metrics of a judge who prefers the longer answer in nine of ten rows; two in three are the student's."""
    examples = [Example(f"{n}", (Message("user", "x"),), "y", "Math") for n in range(rows)]
    longer = [n % 3 > 0 for n in range(rows)]
    won = [long != (n % 10 == 0) for n, long in enumerate(longer)]
    sizes = [(300 + 7 * (n % 11), 200) if long else (200, 300 + 7 * (n % 11)) for n, long in enumerate(longer)]
    judged = [
        Judgement(f"{n}", 5, 8 if wins else 2, student_length=own * lengths, teacher_length=other * lengths)
        for n, (wins, (own, other)) in enumerate(zip(won, sizes, strict=True))
    ]
    texts = [Completion(f"{n}", "", "stop", 1) for n in range(rows)]
    return compute_metrics(1, examples, texts, judged, dict.fromkeys(map(str, range(rows))), "J")


def test_the_rate_at_equal_length_takes_out_a_judge_who_prefers_the_longer_answer() -> None:
    found = judged_by_length(240)
    assert found.win_rate == pytest.approx(0.633, abs=0.01)
    low, high = found.length_controlled_interval or (1, 0)
    assert low < 0.5 < high
    assert high < found.win_rate
    said = (
        f"at equal length of the answers the win rate would be {found.length_controlled:.1%} ({low:.0%} to {high:.0%})"
    )
    assert said in summarize_metrics(found)


def test_there_is_no_rate_at_equal_length_without_lengths_or_rows_or_overlap_or_a_judge() -> None:
    assert judged_by_length(49).length_controlled is None
    assert judged_by_length(240, lengths=False).length_controlled is None
    longer = [Judgement(f"{n}", 5, 8, student_length=20 + n, teacher_length=10) for n in range(60)]
    assert rate_at_equal_length(longer) == (None, None)
    found = judged_by_length(240)
    assert without_win_rate(found, [], []).length_controlled is None
    assert "equal length" not in summarize_metrics(replace(found, length_controlled=found.win_rate))


def test_a_holdout_too_small_for_its_interval_says_how_many_rows_it_takes() -> None:
    assert warn_small_holdout(scored(40)) == (
        "with 40 holdout rows the 95 % interval is +-15 points; about 385 rows (seeds.holdout) would give +-5"
    )
    assert warn_small_holdout(scored(200)) == ""


def test_the_rows_that_it_takes_give_that_interval() -> None:
    low, high = scored(rows_for_interval(0.05)).accuracy_interval or (0, 1)
    assert (high - low) / 2 == pytest.approx(0.05, abs=5e-4)


def test_without_a_judge_there_is_likeness_and_its_change_and_no_win_rate() -> None:
    rows = [Judgement("a", 10, 4.0), Judgement("b", 10, 6.0), Judgement("c", 10, 10), Judgement("d", 10, 2.0)]
    found = without_win_rate(compute_metrics(1, ROWS, TEXTS, rows, dict.fromkeys("abcd"), "likeness"), ROWS, rows)
    assert (found.win_rate, found.win_rate_interval, found.student_score) == (None, None, 5.5)
    assert found.by_task["Math"] == {"rows": 2, "win_rate": None, "accuracy": None, "student_score": 5.0}
    assert (
        summarize_metrics(found, replace(found, round=0, student_score=5.75))
        == "likeness 5.50 of 10 (-0.25 on round 0)"
    )
    assert summarize_metrics(found) == "likeness 5.50 of 10"
    assert is_rouge_only(found.win_rate, found.student_score)
    assert not is_rouge_only(0.0, 5.5)


def test_metrics_say_how_far_the_judge_can_be_trusted() -> None:
    found = compute_metrics(1, ROWS, TEXTS, JUDGED, {}, "somebody").judge_quality
    assert found is not None
    assert (found.rows, found.unjudged, found.ties) == (3, 1, pytest.approx(1 / 3, abs=1e-6))
