"""The length-controlled win rate of AlpacaEval 2.0: the win rate that answers of equal length would have.

The definition is that of alpaca_eval 0.6 (metrics/glm_winrate.py) and of Dubois et al., arXiv 2404.04475: a logistic
regression of the preference on a constant, tanh of the standardized difference of the lengths and, where it is known,
the difficulty of the instruction; then the mean prediction with a length difference of 0. What is the same here:
preferences may be any number from 0 to 1; an L1 penalty on all weights, the constant too; its strength is one of ten,
chosen by five-fold cross-validation; with the file of gamed baselines its rows count with weight 0.1 each, and only the
constant of the evaluated rows is in the prediction. What is not: the optimum is computed to machine precision, and
there is an interval. liblinear, which alpaca_eval uses, stops at a tolerance of 1e-4: on 17 models' real annotations
rates differ by at most 0.06 percentage points, and by less than 1e-6 if that tolerance is set to 1e-9.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tapir_local.errors import TapirError
from tapir_local.printable import format_count

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Floats = NDArray[numpy.float64]

MIN_ROWS_FOR_LENGTHS = 50  # with fewer, the strongest penalty often wins, and every rate is 50 %
MIN_OVERLAP = 0.1  # share of rows whose answer is the longer one, or the shorter one
FOLDS = 5
STRENGTHS = tuple(10 ** (-4 + 8 * step / 9) for step in range(10))  # inverse strengths of the penalty
GAMED_WEIGHT = 0.2 / 2  # of a row of a gamed baseline; 0.2 for both, which are two
CLIP = 1e-15  # predictions are this far from 0 and 1 where their loss is measured
NORMAL_QUANTILE = 1.959964  # of 0.975
LENGTH_TERM, CONSTANT_TERM, DIFFICULTY_TERM = "tanh(length difference)", "constant", "instruction difficulty"


@dataclass(frozen=True)
class LengthControlled:
    """The win rate at equal length, 0 to 1, and its 95 % interval.

    `standard_error` is alpaca_eval's `lc_standard_error` (0 to 1), the standard error of the mean of the predictions: 0
    without the difficulty term, since all predictions are then equal. `interval` is that of the estimate: the delta
    method with a sandwich covariance of the weights. `weights` are the fitted weights by the name of their term,
    `predicted` the prediction of each row at equal length.
    """

    win_rate: float
    interval: tuple[float, float]
    standard_error: float
    weights: Mapping[str, float]
    predicted: tuple[float, ...]


@dataclass(frozen=True)
class GamedBaselines:
    """AlpacaEval's fixed data: the difficulty of each instruction, and rows of its baseline told to be brief or long.

    `difficulty` is by the position of the instruction in AlpacaEval's file. The other lists have a value for each row
    of a gamed baseline: its preference (0 to 1), its standardized length difference and the instruction's difficulty.
    """

    difficulty: Mapping[int, float]
    preferences: Sequence[float]
    lengths: Sequence[float]
    difficulties: Sequence[float]


def length_controlled_rate(
    preferences: Sequence[float | None], lengths: Sequence[tuple[int, int]], gamed: GamedBaselines | None = None
) -> LengthControlled | None:
    """The win rate at equal length; `lengths` are (evaluated answer, opponent's answer) in characters, row by row.

    `preferences` are 1 for a row that the evaluated model wins, 0.5 for a tie, None for one that was not judged: such a
    row is predicted, but not fitted to. With `gamed` the rows are AlpacaEval's, in its order. None with fewer than
    MIN_ROWS_FOR_LENGTHS judged rows, or if all length differences are equal. TapirError if `gamed` has no difficulty of
    a row.
    """
    import numpy

    judged = [at for at, value in enumerate(preferences) if value is not None]
    differences = numpy.array([other - own for own, other in lengths], dtype=float)
    if len(judged) < MIN_ROWS_FOR_LENGTHS or not (spread := float(numpy.std(differences, ddof=1))):
        return None
    columns = {LENGTH_TERM: numpy.tanh(differences / spread), CONSTANT_TERM: numpy.ones(len(differences))}
    if gamed:
        columns[DIFFICULTY_TERM] = numpy.array(row_difficulties(gamed, len(preferences)))
    every = numpy.column_stack(list(columns.values()))
    asked = every * [0.0, *[1.0] * (len(columns) - 1)]  # at equal length
    rows, targets = every[judged], numpy.array([preferences[at] for at in judged], dtype=float)
    weights = numpy.ones(len(rows))
    if gamed:
        rows, targets, weights = with_gamed_rows(gamed, rows, targets)
    fitted = fit_cross_validated(rows, targets, weights)
    predicted = logistic(asked @ fitted)
    return LengthControlled(
        win_rate=float(predicted.mean()),
        interval=delta_interval(asked, fitted, weight_covariance(rows, targets, weights, fitted)),
        standard_error=float(predicted.std(ddof=1) / math.sqrt(len(predicted))),
        weights=dict(zip(columns, map(float, fitted), strict=True)),
        predicted=tuple(map(float, predicted)),
    )


def lengths_overlap(lengths: Sequence[tuple[int, int]]) -> bool:
    """Whether each side has the longer answer on a tenth of the rows or more.

    Otherwise few rows tell length from quality, and the rate at equal length is an extrapolation.
    """
    longer, shorter = sum(own > other for own, other in lengths), sum(own < other for own, other in lengths)
    return min(longer, shorter) >= MIN_OVERLAP * len(lengths)


def row_difficulties(gamed: GamedBaselines, rows: int) -> list[float]:
    """The difficulties of the first `rows` instructions."""
    missing = [row for row in range(rows) if row not in gamed.difficulty]
    if missing:
        raise TapirError(
            f"there is no difficulty of row {missing[0]}: the file has those "
            f"of {format_count(len(gamed.difficulty), 'instruction')}",
            fix="The difficulties are those of AlpacaEval's 805 instructions in their order; other rows have none.",
        )
    return [gamed.difficulty[row] for row in range(rows)]


def with_gamed_rows(gamed: GamedBaselines, rows: "Floats", targets: "Floats") -> tuple["Floats", "Floats", "Floats"]:
    """(rows, targets, weights) with those of the gamed baselines before them; the constant is 0 for these."""
    import numpy

    lengths = numpy.tanh(numpy.array(gamed.lengths, dtype=float))
    fixed = numpy.column_stack([lengths, numpy.zeros(len(lengths)), numpy.array(gamed.difficulties, dtype=float)])
    weights = numpy.concatenate([numpy.full(len(fixed), GAMED_WEIGHT), numpy.ones(len(rows))])
    return numpy.vstack([fixed, rows]), numpy.concatenate([numpy.array(gamed.preferences, float), targets]), weights


def fit_cross_validated(rows: "Floats", targets: "Floats", weights: "Floats") -> "Floats":
    """The weights of the regression, with the strength of the penalty that predicts left-out rows best.

    The rows are dealt to FOLDS folds in turn from the last one, as scikit-learn's GroupKFold does with groups of one
    size. The first of equally good strengths is taken: the strongest penalty.
    """
    import numpy

    folds = numpy.arange(len(rows))[::-1] % FOLDS
    losses = numpy.zeros(len(STRENGTHS))
    for fold in range(FOLDS):
        kept, out, fitted = folds != fold, folds == fold, numpy.zeros(rows.shape[1])
        for number, strength in enumerate(STRENGTHS):
            fitted = fit_penalized(rows[kept], targets[kept], weights[kept] * strength, fitted)
            predicted = numpy.clip(logistic(rows[out] @ fitted), CLIP, 1 - CLIP)
            loss = targets[out] * numpy.log(predicted) + (1 - targets[out]) * numpy.log(1 - predicted)
            losses[number] -= float((loss * weights[out]).mean())
    return fit_penalized(rows, targets, weights * STRENGTHS[int(losses.argmin())], numpy.zeros(rows.shape[1]))


def fit_penalized(rows: "Floats", targets: "Floats", weights: "Floats", start: "Floats") -> "Floats":
    """The minimum of sum |w| + sum weights * cross-entropy(targets, logistic(rows @ w)), by proximal Newton steps.

    Each step minimizes the penalty plus the quadratic model of the loss by coordinate descent, and is halved until the
    objective falls (Yuan, Ho and Lin 2012, JMLR 13, section 2).
    """
    import numpy

    def objective(at: "Floats") -> float:
        score = rows @ at
        return float(numpy.abs(at).sum() + (weights * (numpy.logaddexp(0.0, score) - targets * score)).sum())

    fitted, value = start.copy(), objective(start)
    for _ in range(100):
        predicted = logistic(rows @ fitted)
        gradient = rows.T @ (weights * (predicted - targets))
        curvature = (rows * (weights * predicted * (1 - predicted))[:, None]).T @ rows
        curvature += 1e-12 * numpy.eye(len(fitted))
        step = penalized_step(fitted, gradient, curvature)
        size = 1.0
        while (new := objective(fitted + size * step)) > value and size > 1e-10:
            size /= 2
        if new >= value - 1e-12 * abs(value):
            return fitted + size * step if new <= value else fitted
        fitted, value = fitted + size * step, new
    return fitted


def penalized_step(fitted: "Floats", gradient: "Floats", curvature: "Floats") -> "Floats":
    """The step to the minimum of sum |w| plus the quadratic model of the loss, by cyclic coordinate descent."""
    import numpy

    step = numpy.zeros(len(fitted))
    for _ in range(1000):
        largest = 0.0
        for at in range(len(fitted)):
            slope = gradient[at] + curvature[at] @ step
            whole = fitted[at] + step[at] - slope / curvature[at, at]
            shrunk = math.copysign(max(abs(whole) - 1 / curvature[at, at], 0.0), whole)
            change = shrunk - fitted[at] - step[at]
            step[at] += change
            largest = max(largest, abs(change))
        if largest < 1e-12:
            break
    return step


def weight_covariance(rows: "Floats", targets: "Floats", weights: "Floats", fitted: "Floats") -> "Floats":
    """White's sandwich covariance of the weights, without the penalty: valid for preferences between 0 and 1 too."""
    import numpy

    predicted = logistic(rows @ fitted)
    bread = numpy.linalg.pinv((rows * (weights * predicted * (1 - predicted))[:, None]).T @ rows)
    scores = rows * (weights * (targets - predicted))[:, None]
    return numpy.asarray(bread @ (scores.T @ scores) @ bread)


def delta_interval(asked: "Floats", fitted: "Floats", covariance: "Floats") -> tuple[float, float]:
    """The 95 % interval of the mean prediction; it is computed on the log-odds, so that it stays within 0 and 1."""
    predicted = logistic(asked @ fitted)
    mean = min(max(float(predicted.mean()), CLIP), 1 - CLIP)
    slope = ((predicted * (1 - predicted))[:, None] * asked).mean(axis=0) / (mean * (1 - mean))
    half = NORMAL_QUANTILE * math.sqrt(max(float(slope @ covariance @ slope), 0.0))
    center, far = math.log(mean / (1 - mean)), 700.0  # exp(710) overflows
    low, high = (1 / (1 + math.exp(-min(max(edge, -far), far))) for edge in (center - half, center + half))
    return low, high


def logistic(score: "Floats") -> "Floats":
    """1 / (1 + exp(-score)), without overflow."""
    import numpy

    return numpy.asarray(numpy.exp(-numpy.logaddexp(0.0, -score)))
