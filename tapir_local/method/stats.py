"""Means over rows and random seeds with intervals, paired differences with tests, and Holm's correction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from tapir_local.errors import TapirError

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

ComparisonKey = TypeVar("ComparisonKey")
BOOTSTRAP_RESAMPLES = 10_000
PERMUTATIONS = 100_000

RowValues = Mapping[str, float]  # a value from 0 to 1 by row id: correctness, or the win value
RunValues = Mapping[int, RowValues]  # by random seed, the values on its holdout


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % bootstrap interval; with several seeds, the mean of the seeds' means.

    `over_seeds` is Student's 95 % interval of the seeds' means; None with one seed. bootstrap_means says which interval
    to trust.
    """

    mean: float
    low: float
    high: float
    over_seeds: tuple[float, float] | None
    rows: int
    seeds: int


@dataclass(frozen=True)
class Difference(Estimate):
    """One run's mean minus another's, on the rows that both have.

    `better` and `worse` count the rows on which the first is above or below the other. `p` is the two-sided p value of
    `test`; `p_holm` is `p` corrected for the number of comparisons.
    """

    better: int
    worse: int
    p: float
    p_holm: float
    test: str


def estimate_mean(arm: RunValues) -> Estimate:
    """The mean over seeds, with equal weights, and its two-level bootstrap interval (see bootstrap_means).

    TapirError if there is no seed, or a seed has no value.
    """
    if not arm or not all(arm.values()):
        raise TapirError(
            f"no value to average, for the seeds {sorted(arm)}", fix="Leave out runs that were not evaluated."
        )
    means, (low, high) = seed_means(arm), percentile_interval(arm)
    return Estimate(fmean(means), low, high, student_interval(means), sum(map(len, arm.values())), len(arm))


def estimate_difference(one: RunValues, other: RunValues) -> Difference:
    """One run's values minus another's, paired by seed and row: {seed: {row id: value}} of each, on the same seeds.

    The differences of rows are resampled, which resamples both runs identically. Rows with a value in only one run are
    left out. TapirError if the seeds differ or have no row in common.
    """
    gaps = {seed: shared_differences(one[seed], other[seed], seed) for seed in check_same_seeds(one, other)}
    means, (low, high), (p, test) = seed_means(gaps), percentile_interval(gaps), p_value(gaps)
    flat = [gap for rows in gaps.values() for gap in rows.values()]
    better, worse = sum(gap > 0 for gap in flat), sum(gap < 0 for gap in flat)
    return Difference(fmean(means), low, high, student_interval(means), len(flat), len(gaps), better, worse, p, p, test)


def seed_means(arm: RunValues) -> list[float]:
    """The mean of each seed, rounded to 12 places, so that equal means compare equal."""
    return [round(fmean(rows.values()), 12) for rows in arm.values()]


def student_interval(means: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean of several seeds' means; None for one seed."""
    from scipy.stats import ttest_1samp

    if len(means) < 2:
        return None
    if len(set(means)) == 1:
        return means[0], means[0]
    found = ttest_1samp(means, 0.0).confidence_interval(0.95)
    return float(found.low), float(found.high)


def check_same_seeds(one: RunValues, other: RunValues) -> list[int]:
    """The seeds of two runs; TapirError if they differ, or there are none."""
    if set(one) != set(other) or not one:
        raise TapirError(
            f"the runs have different random seeds: {sorted(one)} and {sorted(other)}",
            fix="Compare them on seeds that both were run with.",
        )
    return sorted(one)


def shared_differences(one: RowValues, other: RowValues, seed: int) -> RowValues:
    """The differences on the rows that both have."""
    found = {id: one[id] - other[id] for id in one if id in other}
    if not found:
        raise TapirError(
            f"the runs have no row in common for random seed {seed}", fix="Compare runs with the same holdout."
        )
    return found


def percentile_interval(arm: RunValues) -> tuple[float, float]:
    """The 95 % percentile interval of the bootstrap means."""
    import numpy

    low, high = numpy.quantile(bootstrap_means(arm), (0.025, 0.975))
    return float(low), float(high)


def bootstrap_means(arm: RunValues) -> "NDArray[numpy.float64]":
    """BOOTSTRAP_RESAMPLES means: seeds are drawn with replacement, then rows within each drawn seed.

    The random generator has a fixed seed. Rows of equal value are drawn together, as a multinomial: the distribution is
    the same, and the time does not grow with the rows. With one seed this is the plain bootstrap. With several, the
    variance between seeds includes that of rows, but few seeds underestimate it (Davison and Hinkley 1997, 3.8). In
    simulations of 5 seeds of 200 rows, the interval contained the difference in 98 of 100 cases if a seed changes it by
    0.02 (standard deviation), in 90 for 0.1 and in 86 for 0.2; Student's interval over seeds in 94 to 95 of 100 always.
    """
    import numpy

    rng, sums = numpy.random.default_rng(0), numpy.zeros(BOOTSTRAP_RESAMPLES)
    picks = rng.integers(len(arm), size=(BOOTSTRAP_RESAMPLES, len(arm)))
    for at, seed in enumerate(sorted(arm)):
        kinds, counts = numpy.unique(numpy.array(list(arm[seed].values()), dtype=float), return_counts=True)
        drawn_by, _ = numpy.nonzero(picks == at)
        drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=len(drawn_by))
        numpy.add.at(sums, drawn_by, drawn @ kinds / counts.sum())
    return sums / len(arm)


def p_value(gaps: RunValues) -> tuple[float, str]:
    """(two-sided p value, name of the test) for a mean difference of 0; 1 if no row differs.

    With one seed, over its rows: McNemar's exact test if all values are 0 or 1, else a permutation test. With several
    seeds, over the seeds' mean differences: retrained students differ by more than their rows do.
    """
    if len(gaps) > 1:
        return seed_t_test(seed_means(gaps))
    (values,) = (list(rows.values()) for rows in gaps.values())
    return mcnemar_test(values) if {abs(value) for value in values} <= {0.0, 1.0} else permutation_test(values)


def mcnemar_test(gaps: Sequence[float]) -> tuple[float, str]:
    """McNemar's exact test: a binomial test of the rows that only one run gets right."""
    from scipy.stats import binomtest

    better, worse = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    return (float(binomtest(better, better + worse).pvalue) if better + worse else 1.0), "McNemar, exact"


def permutation_test(gaps: Sequence[float]) -> tuple[float, str]:
    """The paired permutation test of the mean difference: the two values of each row are exchanged at random.

    Among rows with equal differences, the number exchanged is binomial. p = (1 + as extreme) / (1 + PERMUTATIONS).
    """
    import numpy

    kinds, counts = numpy.unique(numpy.abs([gap for gap in gaps if gap]), return_counts=True)
    kept = numpy.random.default_rng(0).binomial(counts, 0.5, size=(PERMUTATIONS, len(kinds)))
    extreme = numpy.abs((2 * kept - counts) @ kinds) >= abs(sum(gaps)) - 1e-9
    return float((1 + extreme.sum()) / (1 + PERMUTATIONS)), "permutation"


def seed_t_test(means: Sequence[float]) -> tuple[float, str]:
    """Student's paired t-test of the seeds' mean differences."""
    from scipy.stats import ttest_1samp

    if len(set(means)) == 1:  # t is infinite or undefined; 2 of the 2^n sign changes are as extreme
        return (2 * 0.5 ** len(means) if means[0] else 1.0), "exchanged signs of seeds"
    return float(ttest_1samp(means, 0.0).pvalue), "t over seeds"


def compare_with_first(arms: Mapping[str, RunValues], first: str) -> dict[str, Difference]:
    """The difference of every other run to the first, with p values corrected for their number."""
    return correct_p_values(
        {name: estimate_difference(arm, arms[first]) for name, arm in arms.items() if name != first}
    )


def correct_p_values(gaps: Mapping[ComparisonKey, Difference]) -> dict[ComparisonKey, Difference]:
    """The differences with p values corrected for their number."""
    ps = holm_correction([gap.p for gap in gaps.values()])
    return {key: replace(gap, p_holm=p) for (key, gap), p in zip(gaps.items(), ps, strict=True)}


def holm_correction(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down method (1979), in the given order."""
    order = sorted(range(len(ps)), key=lambda at: ps[at])
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, ps[at] * (len(ps) - rank)))
        corrected[at] = highest
    return corrected
