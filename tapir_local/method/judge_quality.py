"""How far a judge can be trusted, by its scores alone: do its orders agree, does it favour a place or length."""

from collections.abc import Sequence
from statistics import fmean

from tapir_local.records import Judgement, JudgeQuality

ScorePair = tuple[float, float]

MIN_ROWS_TO_WARN = 10  # judged rows under which nothing is correlated or warned of
MAX_DISAGREEMENT = (
    1 / 4
)  # share of rows whose orders disagree above which it is said: midway to a judge who throws a coin
MIN_ROWS_FOR_LENGTH_BIAS = 20  # judged rows from which a correlation as strong as LENGTH_BIAS is no chance (p < 0.001)
MIN_LENGTH_BIAS = (
    0.7  # rank correlation of length and score from which length tells half of the scores' variance (0.7 ** 2)
)


def measure_judge(judgements: Sequence[Judgement]) -> JudgeQuality:
    """The figures for a set of judgements, each to six places."""
    judged = [row for row in judgements if row.teacher is not None and row.student is not None]
    orders = [(one, two) for row in judged if (one := row.orders[0]) and (two := row.orders[1])]
    agreement = rounded_mean([compare_scores(one) == compare_scores(two) for one, two in orders])
    return JudgeQuality(
        rows=len(judged),
        unjudged=len(judgements) - len(judged),
        agreement=agreement,
        order_difference=rounded_mean([abs(a - b) for one, two in orders for a, b in zip(one, two, strict=True)]),
        # In the first order the teacher's answer is shown first, in the second the student's.
        position_bias=rounded_mean([gap for one, two in orders for gap in (one[0] - one[1], two[1] - two[0])]),
        ties=rounded_mean([row.teacher == row.student for row in judged]),
        length_bias=(bias := length_bias(judged)),
        notes=judge_warnings(judged, agreement, bias),
    )


def compare_scores(pair: ScorePair) -> int:
    """1 where the first of two scores is higher, 0 where they tie, -1 where it is lower."""
    return (pair[0] > pair[1]) - (pair[0] < pair[1])


def rounded_mean(values: Sequence[float]) -> float | None:
    """The mean to six places, or None of nothing."""
    return round(fmean(values), 6) if values else None


def length_bias(judged: Sequence[Judgement]) -> float | None:
    """Spearman's rank correlation of the difference in length with that in score, student less teacher.

    None with fewer than FEW rows, or where all differ alike, by length or by score. Right answers may well be the
    longer ones: the figure says that length goes with score, not that it is the reason.
    """
    lengths = [row.student_length - row.teacher_length for row in judged]
    scores = [(row.student or 0.0) - (row.teacher or 0.0) for row in judged]
    if len(judged) < MIN_ROWS_TO_WARN or len(set(lengths)) == 1 or len(set(scores)) == 1:
        return None
    from scipy.stats import spearmanr

    return round(float(spearmanr(lengths, scores).statistic), 6)


def judge_warnings(judged: Sequence[Judgement], agreement: float | None, bias: float | None) -> tuple[str, ...]:
    """What a person ought to know before believing the scores."""
    if len(judged) < MIN_ROWS_TO_WARN:
        return ()
    said = []
    if len(scores := {score for row in judged for score in list_scores(row)}) == 1:
        said.append(f"the judge gives every answer {scores.pop():g}: MFD says nothing")
    if agreement is not None and 1 - agreement > MAX_DISAGREEMENT:
        said.append(
            f"the judge's two orders disagree on {percent(1 - agreement)} of the rows: its scores are noise there"
        )
    if bias is not None and abs(bias) >= MIN_LENGTH_BIAS and len(judged) >= MIN_ROWS_FOR_LENGTH_BIAS:
        which = "longer" if bias > 0 else "shorter"
        said.append(
            f"the scores go with length (rank correlation {bias:+.2f}): the {which} answer nearly always scores more. "
            "Look at some of them before you believe it is the better one"
        )
    return tuple(said)


def list_scores(row: Judgement) -> list[float | None]:
    """Every score that a judge gave in a row: those of both orders, or the two of answers judged alone."""
    return [score for order in row.orders if order for score in order] or [row.teacher, row.student]


def format_percent(share: float) -> str:
    """A share for people: 5%, 12%, 0.4%."""
    return f"{share:.0%}" if share in (0, 1) or 0.01 <= share <= 0.99 else f"{share:.1%}"
