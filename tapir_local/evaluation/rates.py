"""What an evaluation found: win rates with and without length control, or grades, in all and by category."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev

from tapir_local.evaluation.annotations import Annotation
from tapir_local.method.length_control import (
    DIFFICULTY_TERM,
    MIN_ROWS_FOR_LENGTHS,
    GamedBaselines,
    LengthControlled,
    length_controlled_rate,
    lengths_overlap,
)
from tapir_local.printable import format_count
from tapir_local.records import JudgeQuality


@dataclass(frozen=True)
class PairRates:
    """Rates of the evaluated model against the opponent, 0 to 1; None without judged rows.

    `win_rate` counts a tie as half a win, `standard_error` is that of its mean. `length_controlled` is the rate at
    equal length with its 95 % interval; `length_controlled_error` is the standard error as alpaca_eval defines it.
    `length` and `opponent_length` are mean characters.
    """

    rows: int
    judged: int
    wins: int
    ties: int
    losses: int
    win_rate: float | None
    standard_error: float | None
    length_controlled: float | None
    length_controlled_interval: tuple[float, float] | None
    length_controlled_error: float | None
    length: float
    opponent_length: float


@dataclass(frozen=True)
class Grade:
    """The judge's score, 1 to 10, of the answer to a turn (from 1); None, with the reason, if it could not be read."""

    id: str
    turn: int
    category: str
    score: float | None
    reason: str = ""


@dataclass(frozen=True)
class GradeMeans:
    """Mean scores, 1 to 10, in all and by turn; `standard_error` is that of the mean over questions."""

    questions: int
    graded: int
    ungraded: int
    mean: float | None
    standard_error: float | None
    turns: tuple[float | None, ...]


@dataclass(frozen=True)
class EvaluationResult:
    """What `tapir-local evaluate --json` prints; pairs or grades are None, and their categories {}.

    `weights` are those of the regression behind the length-controlled rate, by the name of its term.
    """

    student: str
    questions: str
    shape: str
    against: str | None
    judge: str
    folder: str | None
    pairs: PairRates | None = None
    pairs_by_category: Mapping[str, PairRates] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    grades: GradeMeans | None = None
    grades_by_category: Mapping[str, GradeMeans] = field(default_factory=dict)
    judge_quality: JudgeQuality | None = None
    cut: int = 0
    paid: int = 0
    hits: int = 0
    notes: tuple[str, ...] = ()


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of a mean; None with fewer than two values."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def compare_lengths(rows: Sequence[Annotation], gamed: GamedBaselines | None = None) -> LengthControlled | None:
    """The length-controlled rate of some annotations."""
    return length_controlled_rate([row.preference for row in rows], [row.lengths for row in rows], gamed)


def pair_rates(rows: Sequence[Annotation], controlled: LengthControlled | None) -> PairRates:
    """The rates of annotations, of which `controlled` is the length-controlled one."""
    known = [row.preference for row in rows if row.preference is not None]
    wins, losses = sum(value > 0.5 for value in known), sum(value < 0.5 for value in known)
    return PairRates(
        rows=len(rows),
        judged=len(known),
        wins=wins,
        ties=len(known) - wins - losses,
        losses=losses,
        win_rate=fmean(known) if known else None,
        standard_error=standard_error(known),
        length_controlled=controlled.win_rate if controlled else None,
        length_controlled_interval=controlled.interval if controlled else None,
        length_controlled_error=controlled.standard_error if controlled else None,
        length=fmean(row.lengths[0] for row in rows),
        opponent_length=fmean(row.lengths[1] for row in rows),
    )


def rates_by_category(rows: Sequence[Annotation], controlled: LengthControlled | None) -> dict[str, PairRates]:
    """The rates of each category, sorted by name; {} if there is only one.

    With the difficulty term, a category's length-controlled rate is the mean prediction of its rows, without interval.
    Without it all predictions are equal, so a category has a regression of its own, if its lengths overlap.
    """
    groups: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        groups.setdefault(row.category, []).append(at)
    found = {}
    for name in sorted(groups) if len(groups) > 1 else ():
        group = [rows[at] for at in groups[name]]
        if controlled and DIFFICULTY_TERM in controlled.weights:
            predicted = [controlled.predicted[at] for at in groups[name]]
            rate, error = fmean(predicted), standard_error(predicted)
            found[name] = replace(pair_rates(group, None), length_controlled=rate, length_controlled_error=error)
        else:
            overlap = lengths_overlap([row.lengths for row in group])
            found[name] = pair_rates(group, compare_lengths(group) if overlap else None)
    return found


def length_notes(rates: PairRates, controlled: LengthControlled | None, rows: Sequence[Annotation]) -> list[str]:
    """What to know about the length-controlled rate: its terms, why it is missing, and whether it extrapolates."""
    if controlled is None:
        return [
            f"no length-controlled rate: it takes {MIN_ROWS_FOR_LENGTHS} judged rows and answers of different lengths, "
            f"and {format_count(rates.judged, 'row was', 'rows were')} judged"
        ]
    if DIFFICULTY_TERM in controlled.weights:
        return ["length-controlled as AlpacaEval 2.0 defines it; of a category: the mean prediction of its rows"]
    notes = [
        "length-controlled with AlpacaEval's length and constant terms; its difficulty term and its gamed baselines "
        "(--gamed) exist for its own 805 instructions only"
    ]
    if not lengths_overlap([row.lengths for row in rows]):
        shorter = sum(row.lengths[0] < row.lengths[1] for row in rows)
        most, word = max((shorter, "shorter"), (sum(row.lengths[0] > row.lengths[1] for row in rows), "longer"))
        notes.append(
            f"WARNING: {most / len(rows):.0%} of the evaluated answers are {word} than the opponent's, so the rate "
            "at equal length is an extrapolation; look at its interval"
        )
    return notes


def grade_means(rows: Sequence[Grade], turns: int) -> GradeMeans:
    """Mean scores of some grades; a question's score is the mean of its turns."""
    known = [row for row in rows if row.score is not None]
    by_question: dict[str, list[float]] = {}
    for row in known:
        by_question.setdefault(row.id, []).append(row.score or 0.0)
    scores = [fmean(found) for found in by_question.values()]
    by_turn = [[row.score or 0.0 for row in known if row.turn == turn] for turn in range(1, turns + 1)]
    return GradeMeans(
        questions=len({row.id for row in rows}),
        graded=len(known),
        ungraded=len(rows) - len(known),
        mean=fmean(row.score or 0.0 for row in known) if known else None,
        standard_error=standard_error(scores),
        turns=tuple(fmean(found) if found else None for found in by_turn),
    )


def means_by_category(rows: Sequence[Grade], turns: int) -> dict[str, GradeMeans]:
    """The means of each category, sorted by name; {} if there is only one."""
    names = sorted({row.category for row in rows})
    groups = {name: [row for row in rows if row.category == name] for name in names}
    return {name: grade_means(group, turns) for name, group in groups.items()} if len(names) > 1 else {}
