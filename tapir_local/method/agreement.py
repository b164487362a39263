"""Agreement of two raters on the same rows: Cohen's kappa, its interval, and the rows that a narrower one needs."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

KAPPA_RESAMPLES = 10_000
WANTED_KAPPA_HALF = 0.1  # half-width of the interval of kappa that is advised: half a step of KAPPA_WORDS
# Landis and Koch 1977, table 2: the least kappa of each word.
KAPPA_WORDS = (
    (0.81, "almost perfect"),
    (0.61, "substantial"),
    (0.41, "moderate"),
    (0.21, "fair"),
    (0.0, "slight"),
    (-1.0, "poor"),
)


def count_pairs(pairs: Sequence[tuple[str, str]], values: Sequence[str]) -> "NDArray[numpy.int64]":
    """How often each pair of ratings occurs, as a table: rows are the first rater's values, columns the second's."""
    import numpy

    place = {value: at for at, value in enumerate(values)}
    counts = numpy.zeros((len(values), len(values)), dtype=numpy.int64)
    for one, other in pairs:
        counts[place[one], place[other]] += 1
    return counts


def kappa_of_tables(counts: "NDArray[numpy.int64]") -> "NDArray[numpy.float64]":
    """Cohen's kappa (1960) of tables of shape (..., values, values): (p_o - p_e) / (1 - p_e).

    p_o is the share of equal ratings, p_e that of raters who rate independently with the same frequencies. NaN if both
    raters always give one and the same value, or there are no rows.
    """
    import numpy

    total = counts.sum(axis=(-2, -1))
    with numpy.errstate(divide="ignore", invalid="ignore"):
        observed = numpy.trace(counts, axis1=-2, axis2=-1) / total
        expected = (counts.sum(axis=-1) * counts.sum(axis=-2)).sum(axis=-1) / total.astype(float) ** 2
        return numpy.asarray((observed - expected) / (1 - expected), dtype=float)


def cohen_kappa(counts: "NDArray[numpy.int64]") -> float | None:
    """Cohen's kappa of one table, rounded to six places; None where it is undefined."""
    value = float(kappa_of_tables(counts))
    return round(value, 6) if math.isfinite(value) else None


def kappa_interval(counts: "NDArray[numpy.int64]") -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of kappa over rows, with a fixed seed; None where kappa is undefined."""
    import numpy

    if cohen_kappa(counts) is None:
        return None
    total = int(counts.sum())
    drawn = numpy.random.default_rng(0).multinomial(total, counts.ravel() / total, size=KAPPA_RESAMPLES)
    found = kappa_of_tables(drawn.reshape(-1, *counts.shape))
    low, high = numpy.quantile(found[numpy.isfinite(found)], (0.025, 0.975))
    return round(float(low), 6), round(float(high), 6)


def rows_for_kappa(interval: tuple[float, float] | None, rows: int) -> int | None:
    """About how many rows would give an interval of +-WANTED_KAPPA_HALF: its width falls as 1 / sqrt(rows).

    None where the interval says nothing yet: it is missing or has no width, as with a few rows without disagreement.
    """
    if interval is None or interval[0] == interval[1]:
        return None
    return max(rows, math.ceil(rows * ((interval[1] - interval[0]) / 2 / WANTED_KAPPA_HALF) ** 2))


def kappa_word(kappa: float) -> str:
    """The word for a kappa by Landis and Koch, such as `moderate`."""
    return next(word for least, word in KAPPA_WORDS if kappa >= least)
