"""What a run brings to a comparison: its holdout; of each evaluated round, its rows' values and its cost so far."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import orjson

from tapir_local.errors import TapirError
from tapir_local.files import read_rows
from tapir_local.method.judging import rouge_of_score
from tapir_local.method.metrics import AnswerChecker, win_value
from tapir_local.method.stats import RowValues
from tapir_local.pipeline.backends import checker
from tapir_local.pipeline.lockfile import locked
from tapir_local.pipeline.loop import kept_recipe, rounds_begun
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Completion, Example, Judgement
from tapir_local.report.status import metrics_of
from tapir_local.run_dir import RunDir

Row = TypeVar("Row", Completion, Judgement)
BY_HOLDOUT = {"growth"}  # curricula that plan a round by the last one's metrics


@dataclass(frozen=True)
class Cost:
    """What a run spent up to the end of a round, its preparation included.

    `rows` are training rows, each once a round; `tokens` those that training read, epochs and all, None where a round
    has no log of them. Calls are requests whose answers the run used, paid for or from the store: the teacher's, the
    judge's about the pool, and what evaluation asked on the holdout, which makes no student better unless its
    curriculum plans by it (see costs_so_far).
    """

    rows: int
    tokens: int | None
    teacher_calls: int
    judge_calls: int
    evaluation_calls: int

    @property
    def calls(self) -> int:
        """What the teacher and the judge were asked to make the student."""
        return self.teacher_calls + self.judge_calls

    def __add__(self, other: "Cost") -> "Cost":
        tokens = None if self.tokens is None or other.tokens is None else self.tokens + other.tokens
        return Cost(
            self.rows + other.rows,
            tokens,
            self.teacher_calls + other.teacher_calls,
            self.judge_calls + other.judge_calls,
            self.evaluation_calls + other.evaluation_calls,
        )


@dataclass(frozen=True)
class Evaluated:
    """A round's student on the holdout, by row id: 1 where it is right, else 0; its win value or its likeness, 0 to 1.

    A row of which the checker cannot tell, or that is not judged, is not there. There are wins where a judge was asked,
    else likeness.
    """

    number: int
    cost: Cost
    right: RowValues
    wins: RowValues
    likeness: RowValues = field(default_factory=dict)

    @property
    def judged(self) -> RowValues:
        """The values that rest on scores."""
        return self.wins or self.likeness


@dataclass(frozen=True)
class Side:
    """A run to be compared: its recipe, its judge's name, its holdout as the teacher answered it, its rounds."""

    name: str
    recipe: Recipe
    judge: str
    holdout: tuple[Example, ...]
    rounds: tuple[Evaluated, ...]

    @property
    def last(self) -> Evaluated:
        """The last evaluated round."""
        return self.rounds[-1]


def read_sides(runs: Sequence[RunDir]) -> list[Side]:
    """Runs as sides, every answer checked by the one checker that their recipes name, as of the first run's tasks.

    TapirError where a run has no evaluated round, a file is missing or damaged, or the recipes name several checkers.
    """
    check = one_checker({run.name: kept_recipe(run) for run in runs})
    first = read_side(runs[0], check, {})
    tasks = {row.id: row.task for row in first.holdout}
    return [first, *(read_side(run, check, tasks) for run in runs[1:])]


def one_checker(recipes: Mapping[str, Recipe]) -> AnswerChecker | None:
    """The checker of those recipes that name one, to be used on all alike; None where none does."""
    naming = {recipe.checker: (name, recipe) for name, recipe in recipes.items() if recipe.checker}
    if len(naming) > 1:
        named = ", ".join(f"{kind} ({name})" for kind, (name, _) in naming.items())
        raise TapirError(
            f"the runs have different checkers of right answers: {named}",
            fix="Compare runs of one checker: another one measures another accuracy.",
        )
    return next((checker(recipe) for _, recipe in naming.values()), None)


def read_side(run: RunDir, check: AnswerChecker | None, tasks: Mapping[str, str]) -> Side:
    """One run as a side, its holdout's rows of the tasks given by id; TapirError where no round is evaluated yet."""
    metrics = {n: found for n in range(rounds_begun(run) + 1) if (found := metrics_of(run, n))}
    if not metrics:
        raise TapirError(
            f"run {run.name!r} has no evaluated round",
            where=str(run.path),
            fix="Go on with it: `tapir-local distill` with its recipe evaluates round 0 first.",
        )
    rows = read_rows(Example, there(run, run.path / "holdout.jsonl", "--from holdout"))
    holdout = tuple(replace(row, task=tasks.get(row.id, row.task)) for row in rows)
    recipe, last = kept_recipe(run), max(metrics)
    costs = costs_so_far(run, last, recipe.curriculum.name in BY_HOLDOUT)
    alike = recipe.judge.kind == "reference"
    rounds = tuple(Evaluated(n, costs[n], *values_of(run, n, holdout, check, alike)) for n in metrics)
    return Side(run.name, recipe, str(metrics[last].get("judge", "")), holdout, rounds)


def values_of(
    run: RunDir, number: int, holdout: Sequence[Example], check: AnswerChecker | None, alike: bool
) -> tuple[RowValues, RowValues, RowValues]:
    """(right or not, win value, likeness) by row id, of a round's answers; `alike`: scores are likeness, none wins."""
    texts = by_id(run, number, Completion, "holdout-answer", "holdout-answers.jsonl", holdout)
    judged = by_id(run, number, Judgement, "holdout-judge", "holdout-judgements.jsonl", holdout)
    right = {row.id: check(row, texts[row.id].text) if check else None for row in holdout}
    wins = {row.id: None if alike else win_value(judged[row.id]) for row in holdout}
    scores = {row.id: rouge_of_score(judged[row.id].student) if alike else None for row in holdout}
    return known(right), known(wins), known(scores)


def known(values: Mapping[str, float | None]) -> dict[str, float]:
    """The values that are there, as numbers."""
    return {id: float(value) for id, value in values.items() if value is not None}


def by_id(
    run: RunDir, number: int, kind: type[Row], stage: str, name: str, holdout: Sequence[Example]
) -> dict[str, Row]:
    """A file's records by id; TapirError where they are not about the holdout's rows."""
    redo = f"--round {number} --from {stage}"
    path = there(run, run.round(number) / name, redo)
    found = {row.id: row for row in read_rows(kind, path)}
    if found.keys() != {row.id for row in holdout}:
        raise TapirError("its rows are not those of the holdout", where=str(path), fix=again(run, redo))
    return found


def there(run: RunDir, path: Path, redo: str) -> Path:
    """A path whose file is there; TapirError that says how to make it again."""
    if not path.exists():
        raise TapirError(
            f"run {run.name!r} was evaluated, but this file is missing", where=str(path), fix=again(run, redo)
        )
    return path


def again(run: RunDir, redo: str) -> str:
    """What to do for want of a file."""
    return f"Put the file back, or do everything from there again: tapir-local redo {run.name} {redo}"


def costs_so_far(run: RunDir, last: int, by_holdout: bool) -> list[Cost]:
    """By round, up to `last`, what the run had spent at its end.

    Calls are counted by tapir.lock: it holds one line for each request whose answer the run's files rest on, whoever
    paid for it, also where a stage was cut, done again or replayed. `by_holdout`: the curriculum plans a round by the
    judgements of the last one's holdout, so that they are calls of the judge for this round.
    """
    calls = Counter(line.step for line in locked(run))
    costs = [cost_of(run, number, calls) for number in range(last + 1)]
    if by_holdout:
        lent = [calls[f"round-{number:02d}/holdout-judge"] for number in range(last)]
        costs[1:] = [cost + Cost(0, 0, 0, count, -count) for cost, count in zip(costs[1:], lent, strict=True)]
    return list(accumulate(costs))


def cost_of(run: RunDir, number: int, calls: Mapping[str, int]) -> Cost:
    """What one round spent."""
    path = there(run, run.round(number) / "train.jsonl", f"--round {number} --from {'refine' if number else 'mix'}")
    with path.open("rb") as file:
        rows = sum(1 for _ in file)
    kinds: Counter[str] = Counter()
    for step, count in calls.items():
        place, kind = called(step)
        kinds[kind] += count if place == number else 0
    tokens = tokens_of(run.round(number) / "adapter" / "train_log.jsonl")
    return Cost(rows, tokens, kinds["teacher"], kinds["judge"], kinds["evaluation"])


def called(step: str) -> tuple[int, str]:
    """(round, kind) of a step's calls: `teacher`, `judge` or `evaluation`; the preparation counts with round 0."""
    place, _, stage = step.partition("/")
    kind = "evaluation" if stage.startswith("holdout") else "judge" if "judge" in stage else "teacher"
    return (0 if place == "prepare" else int(place.removeprefix("round-"))), kind


def tokens_of(path: Path) -> int | None:
    """The training tokens that a round's log counts, None without a log; TapirError for a line that is no JSON."""
    if not path.exists():
        return None
    try:
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    except orjson.JSONDecodeError as error:
        raise TapirError(f"not a log of training: {error}", where=str(path)) from error
    return max((int(line["tokens"]) for line in lines if "tokens" in line), default=None)  # its last line has none
