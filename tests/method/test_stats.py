"""Intervals, paired tests and Holm's correction, compared with figures computed by hand and with simulations."""

import random
from math import comb

import pytest

from tapir_local.errors import TapirError
from tapir_local.method.stats import (
    RowValues,
    bootstrap_means,
    compare_with_first,
    estimate_difference,
    estimate_mean,
    holm_correction,
    mcnemar_test,
    p_value,
    permutation_test,
)


def rows(values: str | list[float]) -> dict[str, float]:
    return {str(at): float(value) for at, value in enumerate(values)}


def drawn(chance: random.Random, right: float, count: int = 100) -> RowValues:
    return rows([float(chance.random() < right) for _ in range(count)])


def test_mcnemar_of_eight_against_two() -> None:
    """2 * (1 + 10 + 45) / 2**10."""
    found = estimate_difference(
        {0: rows("1" * 8 + "00" + "1" * 6 + "0" * 4)}, {0: rows("0" * 8 + "11" + "1" * 6 + "0" * 4)}
    )
    assert (found.better, found.worse, found.rows) == (8, 2, 20)
    assert found.p == pytest.approx(0.109375)
    assert found.mean == pytest.approx(0.3)
    assert found.test == "McNemar, exact"


def test_equal_arms_differ_by_nothing() -> None:
    for values in (rows("1100"), rows([0.5, 1.0, 0.5, 0.0])):
        found = estimate_difference({0: values}, {0: values})
        assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_exchanged_signs_as_counted_by_hand() -> None:
    """Of the 2**4 sign changes of 0.5, 1, 1, 1, two are as extreme: the sums 3.5 and -3.5."""
    assert permutation_test([0.5, 1, 1, 1, 0])[0] == pytest.approx(2 / 16, abs=0.005)
    assert permutation_test([0.5])[0] == 1
    assert permutation_test([0.0])[0] == 1


def test_exchanging_signs_is_mcnemars_test_where_all_differ_by_as_much() -> None:
    gaps = [1.0] * 19 + [-1.0] * 8
    assert mcnemar_test(gaps)[0] == pytest.approx(2 * sum(comb(27, k) for k in range(9)) / 2**27)
    assert permutation_test(gaps)[0] == pytest.approx(mcnemar_test(gaps)[0], abs=0.003)


def test_half_wins_are_tested_by_permutation() -> None:
    found = estimate_difference({0: rows([1.0] * 10 + [0.5] * 10)}, {0: rows([0.5] * 20)})
    assert found.test == "permutation"
    assert found.p < 0.01
    assert found.mean == 0.25


def test_a_row_that_one_arm_lacks_is_left_out() -> None:
    found = estimate_difference({0: {"a": 1.0, "b": 0.0}}, {0: {"b": 0.0, "c": 1.0}})
    assert (found.rows, found.mean) == (1, 0)


def test_arms_without_a_common_seed_or_row_are_refused() -> None:
    with pytest.raises(TapirError, match=r"\[1\] and \[2\]"):
        estimate_difference({1: rows("1")}, {2: rows("1")})
    with pytest.raises(TapirError, match="no row in common"):
        estimate_difference({1: {"a": 1.0}}, {1: {"b": 1.0}})
    with pytest.raises(TapirError, match="no value"):
        estimate_mean({1: {}})


def test_seeds_count_alike_however_many_rows_they_have() -> None:
    found = estimate_mean({1: rows("10"), 2: rows("1111")})
    assert (found.mean, found.rows, found.seeds) == (0.75, 6, 2)
    assert found.low <= 0.75 <= found.high


def test_seeds_are_drawn_first_then_rows() -> None:
    """With one seed all correct and one all wrong, a resample is 0, 1/2 or 1, in the proportion 1 : 2 : 1."""
    means = list(bootstrap_means({1: rows("11"), 2: rows("000")}))
    assert set(means) == {0.0, 0.5, 1.0}
    assert means.count(0.5) / len(means) == pytest.approx(0.5, abs=0.02)
    assert means.count(0.0) / len(means) == pytest.approx(0.25, abs=0.02)


def test_students_interval_over_seeds_as_in_a_table_of_t() -> None:
    """Means 0.5, 0.6, 0.7: standard deviation 0.1, t with 2 degrees of freedom 4.3027."""
    found = estimate_mean({n: rows("1" * right + "0" * (10 - right)) for n, right in enumerate((5, 6, 7))})
    assert found.over_seeds == pytest.approx((0.6 - 4.3027 * 0.1 / 3**0.5, 0.6 + 4.3027 * 0.1 / 3**0.5), abs=1e-4)


def test_several_seeds_are_tested_by_their_means() -> None:
    """Differences 0.1, 0.2, 0.3: t = 0.2 / (0.1 / sqrt 3) = 3.4641 with 2 degrees of freedom, p = 0.0742."""
    one = {n: rows("1" * (5 + n) + "0" * (5 - n)) for n in (1, 2, 3)}
    found = estimate_difference(one, dict.fromkeys((1, 2, 3), rows("1" * 5 + "0" * 5)))
    assert (found.test, found.seeds) == ("t over seeds", 3)
    assert found.p == pytest.approx(0.0742, abs=1e-4)


def test_seeds_that_all_differ_by_the_same_are_no_proof() -> None:
    one, other = dict.fromkeys(range(5), rows("1110")), dict.fromkeys(range(5), rows("1100"))
    assert estimate_difference(one, other).p == 2 / 2**5
    assert estimate_difference(one, one).p == 1


def test_pairing_narrows_the_interval() -> None:
    """Two runs that agree on all but 4 of 100 rows: the difference has a much narrower interval than either mean."""
    one, other = rows("1" * 50 + "0" * 50), rows("1" * 46 + "0" * 54)
    found, alone = estimate_difference({0: one}, {0: other}), estimate_mean({0: one})
    assert 0 <= found.low < 0.04 < found.high < 0.09
    assert alone.high - alone.low > 0.18


def test_the_same_figures_each_time() -> None:
    one, other = {n: rows("110100") for n in range(3)}, {n: rows("100101") for n in range(3)}
    assert estimate_difference(one, other) == estimate_difference(one, other)


def test_an_interval_of_one_seed_holds_the_truth_in_95_of_100() -> None:
    chance = random.Random(3)
    found = [estimate_difference({0: drawn(chance, 0.6)}, {0: drawn(chance, 0.5)}) for _ in range(200)]
    assert 180 <= sum(gap.low <= 0.1 <= gap.high for gap in found) <= 198


def test_of_equal_students_p_is_below_a_twentieth_no_more_than_that_often() -> None:
    chance = random.Random(4)

    def gaps(count: int) -> RowValues:
        return rows([chance.randrange(2) - chance.randrange(2) for _ in range(count)])

    assert sum(p_value({0: gaps(100)})[0] < 0.05 for _ in range(200)) <= 18
    assert sum(p_value({n: gaps(40) for n in range(5)})[0] < 0.05 for _ in range(200)) <= 18


def test_holm_as_worked_by_hand() -> None:
    assert holm_correction([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm_correction([0.6, 0.7]) == [1.0, 1.0]
    assert holm_correction([]) == []


def test_arms_against_the_first_are_corrected_for_their_number() -> None:
    first, better = {0: rows("0" * 10)}, {0: rows("1" * 10)}
    found = compare_with_first({"a": first, "b": better, "c": first}, "a")
    assert list(found) == ["b", "c"]
    assert (found["b"].p, found["b"].p_holm) == (2 / 2**10, 4 / 2**10)
    assert found["c"].p_holm == 1
