"""Measure a judge by its scores: do its orders agree, does it favor a position or a length, does a checker agree."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Literal

from tapir_local.printable import format_count
from tapir_local.records import Completion, Example, Judgement, JudgeQuality

ScorePair = tuple[float, float]
AnswersRight = tuple[bool | None, bool | None]  # of the teacher's and the student's answer; None if undecided
NO_CHECKER: Mapping[str, AnswersRight] = {}

MIN_ROWS_TO_WARN = 10  # judged rows; with fewer, nothing is correlated or warned about
MAX_DISAGREEMENT = 1 / 4  # share of rows whose orders disagree; half of that of a judge who decides at random
MIN_POSITION_BIAS = 0.5  # points by which a place is preferred, from which a warning of disagreement names it
MIN_ROWS_FOR_LENGTH_BIAS = 20  # judged rows from which MIN_LENGTH_BIAS is significant (p < 0.001)
MIN_LENGTH_BIAS = 0.7  # rank correlation at which length explains half of the scores' variance (0.7 ** 2)
MAX_UNREADABLE = 0.05  # share of rows without a readable reply: the default of judge.max_unjudged
MIN_CHECKER_AGREEMENT = 0.75  # halfway between chance and certainty
# Rows from which a judge may be called no better than chance: of 30, one that is right on 80 % falls short of
# significance (20 of 30) in 3 of 100 cases.
MIN_ROWS_FOR_CHANCE = 30
CHANCE_P_VALUE = 0.05


def measure_judge(judgements: Sequence[Judgement], right: Mapping[str, AnswersRight] = NO_CHECKER) -> JudgeQuality:
    """The quality of a judge from its judgements, rounded to six places. `right` is what a checker says, by row id."""
    judged = [row for row in judgements if row.teacher is not None and row.student is not None]
    orders = [(one, two) for row in judged if (one := row.orders[0]) and (two := row.orders[1])]
    found = JudgeQuality(
        rows=len(judged),
        unjudged=len(judgements) - len(judged),
        agreement=rounded_mean([compare_scores(one) == compare_scores(two) for one, two in orders]),
        order_difference=rounded_mean([abs(a - b) for one, two in orders for a, b in zip(one, two, strict=True)]),
        # The first order shows the teacher's answer first, the second the student's.
        position_bias=rounded_mean([gap for one, two in orders for gap in (one[0] - one[1], two[1] - two[0])]),
        ties=rounded_mean([row.teacher == row.student for row in judged]),
        length_bias=length_bias(judged),
    )
    credits = checker_credits(judged, right)
    found = replace(found, checker_rows=len(credits), checker_agreement=rounded_mean(credits))
    if len(judged) < MIN_ROWS_TO_WARN:
        return replace(found, health="unknown")
    faults = [*constant_faults(judged, right), *chance_faults(credits)]
    warnings = judge_warnings(found)
    return replace(found, notes=(*faults, *warnings), health=judge_health(faults, warnings))


def judge_health(faults: Sequence[str], warnings: Sequence[str]) -> Literal["useless", "doubtful", "good"]:
    """The health of a judge with these faults, which make its scores useless, and warnings."""
    return "useless" if faults else "doubtful" if warnings else "good"


def check_both_answers(
    check: Callable[[Example, str], bool | None] | None,
    rows: Sequence[Example],
    completions: Sequence[Completion],
) -> dict[str, AnswersRight]:
    """Whether a checker finds the teacher's and the student's answers right, by row id; {} without a checker."""
    if check is None:
        return {}
    return {
        row.id: (check(row, row.completion), check(row, found.text) if found.asked else None)
        for row, found in zip(rows, completions, strict=True)
    }


def checker_credits(judged: Sequence[Judgement], right: Mapping[str, AnswersRight]) -> list[float]:
    """For each row with exactly one right answer: 1 if that scores more, 0.5 if both score the same, else 0."""
    found = []
    for row in judged:
        teacher, student = right.get(row.id, (None, None))
        if teacher is not None and student is not None and teacher != student:
            order = compare_scores((row.teacher or 0.0, row.student or 0.0))
            found.append(0.5 + 0.5 * (order if teacher else -order))
    return found


def constant_faults(judged: Sequence[Judgement], right: Mapping[str, AnswersRight]) -> list[str]:
    """What is wrong with a judge that gives every answer one score, unless a checker finds all answers equally good."""
    if len(scores := {score for row in judged for score in list_scores(row)}) != 1:
        return []
    known = [right.get(row.id, (None, None)) for row in judged]
    if all(teacher is not None and teacher == student for teacher, student in known):
        return []
    return [f"the judge gives every answer {scores.pop():g}: MFD says nothing"]


def chance_faults(credits: Sequence[float]) -> list[str]:
    """What is wrong with a judge that does not prefer right answers to wrong ones more often than chance.

    By a one-sided binomial test. Half a row that ties leave over is not counted.
    """
    if len(credits) < MIN_ROWS_FOR_CHANCE:
        return []
    from scipy.stats import binomtest

    if binomtest(int(sum(credits)), len(credits), 0.5, alternative="greater").pvalue < CHANCE_P_VALUE:
        return []
    return [
        f"on {format_count(len(credits), 'row')} the checker finds exactly one answer right, and the judge prefers it "
        f"on {format_percent(fmean(credits))} of them, which is no better than chance"
    ]


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


def judge_warnings(found: JudgeQuality) -> list[str]:
    """Warnings about the reliability of the scores."""
    warnings = []
    if found.agreement is not None and 1 - found.agreement > MAX_DISAGREEMENT:
        bias = found.position_bias or 0.0
        place = f"; it prefers the answer shown {'first' if bias > 0 else 'second'}, by {abs(bias):.1f} points"
        warnings.append(
            f"the judge's two orders disagree on {format_percent(1 - found.agreement)} of the rows: its scores are "
            f"noise there{place if abs(bias) >= MIN_POSITION_BIAS else ''}"
        )
    bias = found.length_bias or 0.0
    if abs(bias) >= MIN_LENGTH_BIAS and found.rows >= MIN_ROWS_FOR_LENGTH_BIAS:
        which = "longer" if bias > 0 else "shorter"
        warnings.append(
            f"the scores go with length (rank correlation {bias:+.2f}): the {which} answer nearly always scores more. "
            "Look at some of them before you believe it is the better one"
        )
    if found.unjudged > MAX_UNREADABLE * (found.rows + found.unjudged):
        share = format_percent(found.unjudged / (found.rows + found.unjudged))
        warnings.append(f"{share} of the rows have no readable score")
    checked = found.checker_agreement
    if checked is not None and found.checker_rows >= MIN_ROWS_TO_WARN and checked < MIN_CHECKER_AGREEMENT:
        warnings.append(
            f"the judge prefers the answer that the checker finds right on only {format_percent(checked)} of "
            f"{format_count(found.checker_rows, 'row')}"
        )
    return warnings


def list_scores(row: Judgement) -> list[float | None]:
    """Every score of a row: those of both orders, or the two of answers judged alone."""
    return [score for order in row.orders if order for score in order] or [row.teacher, row.student]


def format_percent(share: float) -> str:
    """Format a share as a percentage: 5%, 12%, 0.4%."""
    return f"{share:.0%}" if share in (0, 1) or 0.01 <= share <= 0.99 else f"{share:.1%}"
