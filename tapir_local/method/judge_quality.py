"""Measure a judge by its scores: do the two orders agree, does it favor a position or a length."""

from collections.abc import Sequence
from statistics import fmean

from tapir_local.records import Judgement, JudgeQuality

ScorePair = tuple[float, float]

MIN_ROWS_TO_WARN = 10  # judged rows; with fewer, nothing is correlated or warned about
MAX_DISAGREEMENT = 1 / 4  # share of rows whose orders disagree; half of that of a judge who decides at random
MIN_ROWS_FOR_LENGTH_BIAS = 20  # judged rows from which MIN_LENGTH_BIAS is significant (p < 0.001)
MIN_LENGTH_BIAS = 0.7  # rank correlation at which length explains half of the scores' variance (0.7 ** 2)


def measure_judge(judgements: Sequence[Judgement]) -> JudgeQuality:
    """The quality of a judge from its judgements, rounded to six places."""
    judged = [row for row in judgements if row.teacher is not None and row.student is not None]
    orders = [(one, two) for row in judged if (one := row.orders[0]) and (two := row.orders[1])]
    agreement = rounded_mean([compare_scores(one) == compare_scores(two) for one, two in orders])
    return JudgeQuality(
        rows=len(judged),
        unjudged=len(judgements) - len(judged),
        agreement=agreement,
        order_difference=rounded_mean([abs(a - b) for one, two in orders for a, b in zip(one, two, strict=True)]),
        # The first order shows the teacher's answer first, the second the student's.
        position_bias=rounded_mean([gap for one, two in orders for gap in (one[0] - one[1], two[1] - two[0])]),
        ties=rounded_mean([row.teacher == row.student for row in judged]),
        length_bias=(bias := length_bias(judged)),
        notes=judge_warnings(judged, agreement, bias),
    )


def compare_scores(pair: ScorePair) -> int:
    """1 if the first of two scores is higher, 0 for a tie, -1 if it is lower."""
    return (pair[0] > pair[1]) - (pair[0] < pair[1])


def rounded_mean(values: Sequence[float]) -> float | None:
    """The mean, rounded to six places; None without values."""
    return round(fmean(values), 6) if values else None


def length_bias(judged: Sequence[Judgement]) -> float | None:
    """Spearman's rank correlation between the differences in length and in score, student minus teacher.

    None with fewer than MIN_ROWS_TO_WARN rows, or if all differences are equal. Correct answers may be the longer ones:
    a correlation does not show that length is the reason for the score.
    """
    lengths = [row.student_length - row.teacher_length for row in judged]
    scores = [(row.student or 0.0) - (row.teacher or 0.0) for row in judged]
    if len(judged) < MIN_ROWS_TO_WARN or len(set(lengths)) == 1 or len(set(scores)) == 1:
        return None
    from scipy.stats import spearmanr

    return round(float(spearmanr(lengths, scores).statistic), 6)


def judge_warnings(judged: Sequence[Judgement], agreement: float | None, bias: float | None) -> tuple[str, ...]:
    """Warnings about the reliability of the scores."""
    if len(judged) < MIN_ROWS_TO_WARN:
        return ()
    warnings = []
    if len(scores := {score for row in judged for score in list_scores(row)}) == 1:
        warnings.append(f"the judge gives every answer {scores.pop():g}: MFD says nothing")
    if agreement is not None and 1 - agreement > MAX_DISAGREEMENT:
        warnings.append(
            f"the judge's two orders disagree on {format_percent(1 - agreement)} of the rows: its scores are noise "
            "there"
        )
    if bias is not None and abs(bias) >= MIN_LENGTH_BIAS and len(judged) >= MIN_ROWS_FOR_LENGTH_BIAS:
        which = "longer" if bias > 0 else "shorter"
        warnings.append(
            f"the scores go with length (rank correlation {bias:+.2f}): the {which} answer nearly always scores more. "
            "Look at some of them before you believe it is the better one"
        )
    return tuple(warnings)


def list_scores(row: Judgement) -> list[float | None]:
    """Every score of a row: those of both orders, or the two of answers judged alone."""
    return [score for order in row.orders if order for score in order] or [row.teacher, row.student]


def format_percent(share: float) -> str:
    """Format a share as a percentage: 5%, 12%, 0.4%."""
    return f"{share:.0%}" if share in (0, 1) or 0.01 <= share <= 0.99 else f"{share:.1%}"
