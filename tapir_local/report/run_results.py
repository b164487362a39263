"""Read the results of runs: the holdout and, for each evaluated round, the values of its rows and its cost."""

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
from tapir_local.pipeline.loop import kept_recipe, last_round
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Completion, Example, Judgement
from tapir_local.report.status import read_metrics
from tapir_local.run_dir import UNTRAINED_ROUND, RunDir
from tapir_local.stages.backends import recipe_checker
from tapir_local.stages.context import read_lock
from tapir_local.stages.shipped_round import read_shipped_round

HoldoutRecord = TypeVar("HoldoutRecord", Completion, Judgement)
HOLDOUT_CURRICULA = {"growth"}  # curricula that plan a round by the metrics of the round before


@dataclass(frozen=True)
class RunCost:
    """What a run cost up to the end of a round, its preparation included.

    `rows` are training rows, counted once per round. `tokens` are those that training read in all epochs, None if a
    round has no log of them. Calls are requests whose answers the run used, paid or from the store: calls of the
    teacher, calls of the judge on the pool, and calls of the evaluation on the holdout. The latter do not improve the
    student, unless its curriculum plans by them (see `cumulative_costs`).
    """

    rows: int
    tokens: int | None
    teacher_calls: int
    judge_calls: int
    evaluation_calls: int

    @property
    def calls(self) -> int:
        """Calls of the teacher and the judge that produced the student."""
        return self.teacher_calls + self.judge_calls

    def __add__(self, other: "RunCost") -> "RunCost":
        tokens = None if self.tokens is None or other.tokens is None else self.tokens + other.tokens
        return RunCost(
            self.rows + other.rows,
            tokens,
            self.teacher_calls + other.teacher_calls,
            self.judge_calls + other.judge_calls,
            self.evaluation_calls + other.evaluation_calls,
        )


@dataclass(frozen=True)
class EvaluatedRound:
    """The student of a round on the holdout, by row id.

    `right` is 1 for a right answer, else 0; `wins` and `likeness` are 0 to 1. Rows that the checker cannot check, or
    that are not judged, are left out. A run with a judge has `wins`, a run without has `likeness`.
    """

    number: int
    cost: RunCost
    right: RowValues
    wins: RowValues
    likeness: RowValues = field(default_factory=dict)

    @property
    def judged(self) -> RowValues:
        """The values that come from scores."""
        return self.wins or self.likeness


@dataclass(frozen=True)
class RunResults:
    """A run to compare: its recipe, the name of its judge, its holdout with the teacher's answers, and its rounds.

    `shipped` is the round in model/, None without a model/.
    """

    name: str
    recipe: Recipe
    judge: str
    holdout: tuple[Example, ...]
    rounds: tuple[EvaluatedRound, ...]
    untrained: EvaluatedRound | None = None
    shipped: int | None = None

    @property
    def in_model(self) -> EvaluatedRound:
        """The round whose student model/ has; the last evaluated round without a model/."""
        return next((found for found in self.rounds if found.number == self.shipped), self.last)

    @property
    def last(self) -> EvaluatedRound:
        """The last evaluated round."""
        return self.rounds[-1]


def read_run_results(runs: Sequence[RunDir]) -> list[RunResults]:
    """The results of runs, with all answers checked by the same checker and with the tasks of the first run.

    TapirError if a run has no evaluated round, a file is missing or damaged, or the recipes name different checkers.
    """
    check = shared_checker({run.name: kept_recipe(run) for run in runs})
    first = read_one_run(runs[0], check, {})
    tasks = {row.id: row.task for row in first.holdout}
    return [first, *(read_one_run(run, check, tasks) for run in runs[1:])]


def shared_checker(recipes: Mapping[str, Recipe]) -> AnswerChecker | None:
    """The checker that the recipes name; None if none names one. TapirError if they name different ones."""
    naming = {recipe.checker: (name, recipe) for name, recipe in recipes.items() if recipe.checker}
    if len(naming) > 1:
        checkers = ", ".join(f"{kind} ({name})" for kind, (name, _) in naming.items())
        raise TapirError(
            f"the runs have different checkers of right answers: {checkers}",
            fix="Compare runs with the same checker: another checker measures another accuracy.",
        )
    return next((recipe_checker(recipe) for _, recipe in naming.values()), None)


def read_one_run(run: RunDir, check: AnswerChecker | None, tasks: Mapping[str, str]) -> RunResults:
    """The results of one run, with `tasks` by row id in its holdout; TapirError if no round is evaluated yet."""
    metrics = {n: found for n in range(last_round(run) + 1) if (found := read_metrics(run, n))}
    if not metrics:
        raise TapirError(
            f"run {run.name!r} has no evaluated round",
            where=str(run.path),
            fix="Run `tapir-local distill` with its recipe; it evaluates round 0 first.",
        )
    rows = read_rows(Example, require_file(run, run.path / "holdout.jsonl", "--from holdout"))
    holdout = tuple(replace(row, task=tasks.get(row.id, row.task)) for row in rows)
    recipe, last = kept_recipe(run), max(metrics)
    costs = cumulative_costs(run, last, recipe.curriculum.name in HOLDOUT_CURRICULA)
    alike = recipe.judge.kind == "reference"
    rounds = tuple(EvaluatedRound(n, costs[n], *holdout_values(run, n, holdout, check, alike)) for n in metrics)
    judge = str(metrics[last].get("judge", "")).replace("(a programme)", "(a program)")  # files of older versions
    untrained = None
    if read_metrics(run, UNTRAINED_ROUND):
        nothing_spent = RunCost(0, 0, 0, 0, 0)
        untrained = EvaluatedRound(
            UNTRAINED_ROUND, nothing_spent, *holdout_values(run, UNTRAINED_ROUND, holdout, check, alike)
        )
    shipped = read_shipped_round(run, recipe.rounds)
    number = shipped["round"] if shipped else None
    return RunResults(run.name, recipe, judge, holdout, rounds, untrained, number)


def holdout_values(
    run: RunDir, number: int, holdout: Sequence[Example], check: AnswerChecker | None, alike: bool
) -> tuple[RowValues, RowValues, RowValues]:
    """(right or not, win value, likeness) of the answers of a round, by row id.

    With `alike`, the scores measure likeness and there are no win values.
    """
    texts = read_holdout_records(run, number, Completion, "holdout-answer", "holdout-answers.jsonl", holdout)
    judged = read_holdout_records(run, number, Judgement, "holdout-judge", "holdout-judgements.jsonl", holdout)
    right = {row.id: check(row, texts[row.id].text) if check else None for row in holdout}
    wins = {row.id: None if alike else win_value(judged[row.id]) for row in holdout}
    scores = {row.id: rouge_of_score(judged[row.id].student) if alike else None for row in holdout}
    return without_missing(right), without_missing(wins), without_missing(scores)


def without_missing(values: Mapping[str, float | None]) -> dict[str, float]:
    """The values that are not None."""
    return {id: float(value) for id, value in values.items() if value is not None}


def read_holdout_records(
    run: RunDir, number: int, kind: type[HoldoutRecord], stage: str, name: str, holdout: Sequence[Example]
) -> dict[str, HoldoutRecord]:
    """The records of a file, by id; TapirError unless they are about the rows of the holdout."""
    untrained = stage.replace("holdout-", "--from untrained-")
    redo = untrained if number == UNTRAINED_ROUND else f"--round {number} --from {stage}"
    path = require_file(run, run.round(number) / name, redo)
    found = {row.id: row for row in read_rows(kind, path)}
    if found.keys() != {row.id for row in holdout}:
        raise TapirError("its rows are not those of the holdout", where=str(path), fix=redo_advice(run, redo))
    return found


def require_file(run: RunDir, path: Path, redo: str) -> Path:
    """The path of a file that exists; TapirError, with the way to make the file again, if it does not."""
    if not path.exists():
        raise TapirError(
            f"run {run.name!r} was evaluated, but this file is missing", where=str(path), fix=redo_advice(run, redo)
        )
    return path


def redo_advice(run: RunDir, redo: str) -> str:
    """What to do about a missing or wrong file."""
    return f"Restore the file, or run that stage and all later ones again: tapir-local redo {run.name} {redo}"


def cumulative_costs(run: RunDir, last: int, by_holdout: bool) -> list[RunCost]:
    """For each round up to `last`, what the run cost up to its end.

    Calls are counted in tapir.lock. It has one line for each request whose answer the files of the run depend on, no
    matter who paid for it, and even if a stage was interrupted, repeated or replayed. With `by_holdout`, the
    curriculum plans a round by the judgements of the last round's holdout, so they count as calls of the judge.
    """
    calls = Counter(line.step for line in read_lock(run))
    costs = [round_cost(run, number, calls) for number in range(last + 1)]
    if by_holdout:
        moved = [calls[f"round-{number:02d}/holdout-judge"] for number in range(last)]
        costs[1:] = [cost + RunCost(0, 0, 0, count, -count) for cost, count in zip(costs[1:], moved, strict=True)]
    return list(accumulate(costs))


def round_cost(run: RunDir, number: int, calls: Mapping[str, int]) -> RunCost:
    """What one round cost."""
    redo = f"--round {number} --from {'refine' if number else 'mix'}"
    with require_file(run, run.round(number) / "train.jsonl", redo).open("rb") as file:
        rows = sum(1 for _ in file)
    kinds: Counter[str] = Counter()
    for step, count in calls.items():
        place, kind = call_kind(step)
        kinds[kind] += count if place == number else 0
    tokens = count_training_tokens(run.round(number) / "adapter" / "train_log.jsonl")
    return RunCost(rows, tokens, kinds["teacher"], kinds["judge"], kinds["evaluation"])


def call_kind(step: str) -> tuple[int, str]:
    """(round, kind) of the calls of a step: `teacher`, `judge` or `evaluation`; the preparation belongs to round 0."""
    place, _, stage = step.partition("/")
    kind = "evaluation" if stage.startswith(("holdout", "untrained")) else "judge" if "judge" in stage else "teacher"
    return (0 if place == "prepare" else int(place.removeprefix("round-"))), kind


def count_training_tokens(path: Path) -> int | None:
    """The training tokens in the log of a round; None without a log, TapirError if a line is not JSON."""
    if not path.exists():
        return None
    try:
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    except orjson.JSONDecodeError as error:
        raise TapirError(f"not a log of training: {error}", where=str(path)) from error
    return max((int(line["tokens"]) for line in lines if "tokens" in line), default=None)  # the last line has none
