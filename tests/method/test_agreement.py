"""Cohen's kappa against published and hand-computed figures."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapir_local.method.agreement import cohen_kappa, count_pairs, kappa_interval, kappa_word, rows_for_kappa

TABLES = st.lists(st.integers(0, 30), min_size=9, max_size=9).map(lambda cells: numpy.array(cells).reshape(3, 3))


@pytest.mark.parametrize(
    ("table", "kappa"),
    [
        ([[20, 5], [10, 15]], 0.4),  # p_o 0.7, p_e 0.5
        ([[45, 15], [25, 15]], 0.130435),  # p_o 0.6, p_e 0.54
        ([[25, 35], [5, 35]], 0.259259),  # p_o 0.6, p_e 0.46
        ([[88, 14, 18], [10, 40, 10], [2, 6, 12]], 0.491525),  # Cohen 1960, table 1, of 200: p_o 0.70, p_e 0.41
        ([[5, 0], [0, 5]], 1.0),
        ([[0, 5], [5, 0]], -1.0),
        ([[5, 0], [0, 0]], None),
        ([[0, 0], [0, 0]], None),
    ],
)
def test_kappa_by_hand(table: list[list[int]], kappa: float | None) -> None:
    assert cohen_kappa(numpy.array(table)) == kappa


@settings(max_examples=25)
@given(TABLES)
def test_the_interval_holds_kappa_and_the_raters_may_change_places(table: "numpy.ndarray") -> None:
    kappa, interval = cohen_kappa(table), kappa_interval(table)
    assert cohen_kappa(table.T) == kappa
    assert (kappa is None) == (interval is None)
    if interval is not None and kappa is not None:
        assert -1 <= interval[0] <= interval[1] <= 1
    if interval is not None and kappa is not None and table.sum() > 60:
        assert interval[0] <= kappa <= interval[1]


def test_the_interval_is_that_of_the_asymptotic_formula() -> None:
    """Fleiss, Cohen and Everitt 1969 for [[20, 5], [10, 15]] ten times: standard error 0.0401."""
    low, high = kappa_interval(numpy.array([[200, 50], [100, 150]])) or (0.0, 0.0)
    assert (low, high) == (pytest.approx(0.4 - 1.96 * 0.0401, abs=0.01), pytest.approx(0.4 + 1.96 * 0.0401, abs=0.01))


def test_four_times_the_rows_halve_the_interval() -> None:
    assert rows_for_kappa((0.2, 0.6), 50) == 200
    assert rows_for_kappa((0.35, 0.45), 500) == 500
    assert rows_for_kappa(None, 3) is None
    assert rows_for_kappa((1.0, 1.0), 3) is None


def test_pairs_are_counted_by_row_and_column() -> None:
    assert count_pairs([("a", "b"), ("a", "b"), ("b", "b")], ("a", "b")).tolist() == [[0, 2], [0, 1]]
    assert [kappa_word(value) for value in (0.9, 0.7, 0.5, 0.3, 0.1, -0.1)] == [
        *("almost perfect", "substantial", "moderate"),
        *("fair", "slight", "poor"),
    ]
