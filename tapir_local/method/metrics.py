"""Metrics of a student on the holdout: win rate against the teacher and accuracy, in total and by task."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from tapir_local.method.judge_quality import measure_judge, rounded_mean
from tapir_local.method.judging import mfd
from tapir_local.method.length_control import length_controlled_rate, lengths_overlap
from tapir_local.printable import format_count
from tapir_local.records import Completion, Example, Judgement, Metrics

AnswerChecker = Callable[[Example, str], bool | None]  # called with a row and an answer to it
Interval = tuple[float, float]

WIDE_INTERVAL, WANTED_INTERVAL = (
    0.10,
    0.05,
)  # half-widths: of an interval that causes a warning, and of the one advised


def win_value(judgement: Judgement) -> float | None:
    """1 if the student's answer scores higher than the teacher's, 0.5 for a tie, else 0; None if unjudged."""
    if judgement.teacher is None or judgement.student is None:
        return None
    return 0.5 + 0.5 * ((judgement.student > judgement.teacher) - (judgement.student < judgement.teacher))


def compute_metrics(
    number: int,
    holdout: Sequence[Example],
    completions: Sequence[Completion],
    judgements: Sequence[Judgement],
    right: Mapping[str, bool | None],
    judge: str,
) -> Metrics:
    """The metrics of round `number`. `right` says by id whether an answer is correct; None if no checker can tell."""
    wins = {judgement.id: win_value(judgement) for judgement in judgements}
    known_wins = [value for value in wins.values() if value is not None]
    known_right = [value for value in right.values() if value is not None]
    judged = [judgement for judgement in judgements if judgement.teacher is not None]
    controlled, controlled_interval = rate_at_equal_length(judged)
    return Metrics(
        round=number,
        rows=len(holdout),
        judged=len(judged),
        unjudged=len(judgements) - len(judged),
        win_rate=rounded_mean(known_wins),
        win_rate_interval=bootstrap_interval(known_wins),
        accuracy=rounded_mean(known_right),
        accuracy_interval=wilson_interval(known_right),
        student_score=rounded_mean([judgement.student for judgement in judged if judgement.student is not None]),
        teacher_score=rounded_mean([judgement.teacher for judgement in judged if judgement.teacher is not None]),
        by_task=metrics_by_task(holdout, wins, right),
        cut=sum(completion.finish != "stop" for completion in completions),
        judge=judge,
        judge_quality=measure_judge(judgements),
        checked=len(known_right),
        length_controlled=controlled,
        length_controlled_interval=controlled_interval,
    )


def rate_at_equal_length(judged: Sequence[Judgement]) -> tuple[float | None, Interval | None]:
    """The length-controlled win rate of judged rows and its interval, rounded to six places, or (None, None).

    Neither if the lengths do not overlap; judgements of older versions have none. There is no difficulty term: only
    AlpacaEval's instructions have one.
    """
    lengths = [(row.student_length, row.teacher_length) for row in judged]
    known = any(map(any, lengths)) and lengths_overlap(lengths)
    found = length_controlled_rate([win_value(row) for row in judged], lengths) if known else None
    if found is None:
        return None, None
    low, high = found.interval
    return round(found.win_rate, 6), (round(low, 6), round(high, 6))


def describe_length_effect(found: Metrics) -> str:
    """The length-controlled win rate if it lies outside the interval of the plain one; else ""."""
    if found.length_controlled is None or found.length_controlled_interval is None or found.win_rate_interval is None:
        return ""
    if found.win_rate_interval[0] <= found.length_controlled <= found.win_rate_interval[1]:
        return ""
    low, high = found.length_controlled_interval
    return (
        f"at equal length of the answers the win rate would be {found.length_controlled:.1%} ({low:.0%} to {high:.0%})"
    )


def without_win_rate(found: Metrics, holdout: Sequence[Example], judgements: Sequence[Judgement]) -> Metrics:
    """The metrics without win rate, for scores by ROUGE-L with the teacher's answer, which no answer can exceed."""
    scores = {row.id: row.student for row in judgements if row.student is not None}
    tasks = {
        task: {
            "rows": values["rows"],
            "win_rate": None,
            "accuracy": values["accuracy"],
            "student_score": rounded_mean([scores[row.id] for row in holdout if row.task == task and row.id in scores]),
        }
        for task, values in found.by_task.items()
    }
    return replace(
        found,
        win_rate=None,
        win_rate_interval=None,
        length_controlled=None,
        length_controlled_interval=None,
        by_task=tasks,
    )


def is_rouge_only(win_rate: float | None, student_score: float | None) -> bool:
    """Whether metrics with these values come from ROUGE-L scores: rows were scored, and there is no win rate."""
    return win_rate is None and student_score is not None


def rows_for_interval(half: float) -> int:
    """Rows for a 95 % interval of at most +-`half` around any rate: p(1 - p) <= 0.25, and 1.96 is the quantile."""
    return math.ceil(0.25 * (1.96 / half) ** 2)


def warn_small_holdout(found: Metrics) -> str:
    """A warning if the holdout is so small that intervals are wide; else ""."""
    halves = [(high - low) / 2 for low, high in filter(None, (found.win_rate_interval, found.accuracy_interval))]
    if max(halves, default=0.0) <= WIDE_INTERVAL:
        return ""
    wide, wanted = f"{100 * max(halves):.0f}", f"{100 * WANTED_INTERVAL:.0f}"
    return (
        f"with {format_count(found.rows, 'holdout row')} the 95 % interval is +-{wide} points; "
        f"about {rows_for_interval(WANTED_INTERVAL):,} rows (seeds.holdout) would give +-{wanted}"
    )


def metrics_by_task(
    holdout: Sequence[Example], wins: Mapping[str, float | None], right: Mapping[str, bool | None]
) -> dict[str, dict[str, float | None]]:
    """Rows, win rate and accuracy by task, sorted by name."""
    ids: dict[str, list[str]] = defaultdict(list)
    for example in holdout:
        ids[example.task].append(example.id)
    return {
        task: {
            "rows": len(ids[task]),
            "win_rate": rounded_mean([value for id in ids[task] if (value := wins.get(id)) is not None]),
            "accuracy": rounded_mean([value for id in ids[task] if (value := right.get(id)) is not None]),
        }
        for task in sorted(ids)
    }


def gaps_by_task(holdout: Sequence[Example], judgements: Sequence[Judgement]) -> dict[str, float]:
    """By task, the mean of the teacher's minus the student's score over the judged rows of the holdout."""
    tasks = {row.id: row.task for row in holdout}
    found: dict[str, list[float]] = defaultdict(list)
    for judgement in judgements:
        if (difficulty := mfd(judgement)) is not None:
            found[tasks[judgement.id]].append(difficulty)
    return {task: fmean(values) for task, values in sorted(found.items())}


def wilson_interval(values: Sequence[bool]) -> Interval | None:
    """Wilson's 95 % interval of a proportion."""
    from scipy.stats import binomtest

    if not values:
        return None
    interval = binomtest(sum(values), len(values)).proportion_ci(confidence_level=0.95, method="wilson")
    return round(float(interval.low), 6), round(float(interval.high), 6)


def bootstrap_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % percentile bootstrap interval of a mean, with a fixed seed; the mean itself if all values are equal."""
    import numpy
    from scipy.stats import bootstrap

    if not values:
        return None
    if len(set(values)) == 1:
        return values[0], values[0]
    found = bootstrap(
        (numpy.array(values),), numpy.mean, n_resamples=2000, method="percentile", rng=numpy.random.default_rng(0)
    )
    return round(float(found.confidence_interval.low), 6), round(float(found.confidence_interval.high), 6)
