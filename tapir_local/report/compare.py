"""Runs side by side on one holdout: rates by round and cost, and whether the differences may be chance."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal

from tapir_local.errors import TapirError
from tapir_local.method.metrics import bootstrap_interval, wilson_interval
from tapir_local.method.stats import Difference, RowValues, correct_p_values, estimate_difference
from tapir_local.recipe.text import fixed_settings, flatten
from tapir_local.report.run_results import BY_HOLDOUT, Cost, Evaluated, Side, read_sides
from tapir_local.run_dir import RunDir

At = Literal["rows", "tokens", "calls"]

UNITS: Mapping[str, str] = {
    "rows": "training rows",
    "tokens": "training tokens",
    "calls": "calls of the teacher and the judge",
}
METRICS = ("accuracy", "win_rate", "likeness")
HOLDOUT_SETTINGS = ("random_seed", "seeds.", "teacher.", "classifier.", "tasks")
ONE_HOLDOUT = (
    "Runs are compared on one holdout: the same random_seed, seeds, seeds.holdout and teacher, from one cache."
)


def compare(
    runs: Sequence[RunDir], *, number: int | None = None, at: At | None = None, by_task: bool = False
) -> dict[str, Any]:
    """What `tapir-local compare --json` prints; TapirError where the runs cannot be compared."""
    refuse_names([run.name for run in runs])
    if number is not None and at:
        raise TapirError("--round and --at exclude each other", fix="--at chooses each run's round by what it cost.")
    sides = read_sides(runs)
    for other in sides[1:]:
        refuse_different(sides[0], other)
    return compared(sides, number, at, by_task)


def refuse_names(names: Sequence[str]) -> None:
    """TapirError where there are not at least two different runs."""
    if len(names) < 2:
        raise TapirError("one run cannot be compared", fix="Name two runs or more; the others are held to the first.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TapirError(f"run {twice[0]!r} is named twice", fix="Name each run once.")


def refuse_different(one: Side, other: Side) -> None:
    """TapirError where two runs have not the same holdout, the teacher's answers included, and the same judge."""
    if faults := holdout_faults(one, other):
        differing = settings_apart(one, other, all_settings, HOLDOUT_SETTINGS)
        said = f"Their recipes differ in {'; '.join(differing)}. " if differing else ""
        raise TapirError(
            f"runs {one.name!r} and {other.name!r} have different holdouts: {', '.join(faults)}", fix=said + ONE_HOLDOUT
        )
    if differing := settings_apart(one, other, judging_settings):
        raise TapirError(
            f"runs {one.name!r} and {other.name!r} have different judges: {'; '.join(differing)}",
            fix="Win rates of different judges are not comparable. Run one of them again under another --name and the "
            "other's judge: unchanged calls cost nothing.",
        )


def holdout_faults(one: Side, other: Side) -> list[str]:
    """In what two holdouts differ, counted in rows."""
    ours, theirs = ({row.id: row for row in side.holdout} for side in (one, other))
    both = ours.keys() & theirs.keys()
    asked = {id for id in both if ours[id].prompt != theirs[id].prompt}
    counts = {
        f"only in {one.name}": len(ours.keys() - both),
        f"only in {other.name}": len(theirs.keys() - both),
        "with another instruction": len(asked),
        "with another answer of the teacher": sum(ours[id].completion != theirs[id].completion for id in both - asked),
    }
    return [f"{count:,} row{'s' if count > 1 else ''} {what}" for what, count in counts.items() if count]


def settings_apart(
    one: Side, other: Side, settings: Callable[[Side], Mapping[str, Any]], beginnings: tuple[str, ...] = ("",)
) -> list[str]:
    """`random_seed (1 in a, 2 in b)` for each setting in which two runs differ."""
    ours, theirs = settings(one), settings(other)
    return [
        f"{key} ({ours.get(key)!r} in {one.name}, {theirs.get(key)!r} in {other.name})"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and key.startswith(beginnings)
    ]


def all_settings(side: Side) -> dict[str, Any]:
    """A run's lasting settings, each by its path."""
    return flatten(fixed_settings(side.recipe))


def judging_settings(side: Side) -> dict[str, Any]:
    """What decides how an answer is judged. Where the judge is reached, and what a round puts up with, is left out."""
    unlike = {"kind", "model", "gguf", "base_url", "alias", "max_unjudged"}
    kept = {name: value for name, value in fixed_settings(side.recipe)["judge"].items() if name not in unlike}
    return {"judge": side.judge, **flatten(kept, "judge.")}


def compared(sides: Sequence[Side], number: int | None, at: At | None, by_task: bool) -> dict[str, Any]:
    """Sides of one holdout: every round's rates and cost, and the chosen rounds against the first side's."""
    budget = budget_of(sides, at) if at else None
    chosen = [choose(side, number, at, budget) for side in sides]
    tasks: dict[str, set[str]] = defaultdict(set)
    for row in sides[0].holdout:
        tasks[row.task].add(row.id)
    everything = {"": {row.id for row in sides[0].holdout}}
    return {
        "baseline": sides[0].name,
        "holdout": {"rows": len(sides[0].holdout), "judge": sides[0].judge},
        "at": {"kind": at, "budget": budget} if at else None,
        "rounds": [
            round_row(side, found, found is picked)
            for side, picked in zip(sides, chosen, strict=True)
            for found in side.rounds
        ],
        "compared": against_first(sides, chosen, everything),
        "by_task": against_first(sides, chosen, {task: tasks[task] for task in sorted(tasks)}) if by_task else None,
        "notes": notes(sides, chosen, at, budget),
    }


def budget_of(sides: Sequence[Side], at: At) -> int:
    """The least that any side spent up to its last evaluated round; TapirError where a side did not count it."""
    spent = [amount(side.last.cost, at) for side in sides]
    for side, found in zip(sides, spent, strict=True):
        if found is None:
            raise TapirError(
                f"run {side.name!r} has no count of its training tokens",
                where="adapter/train_log.jsonl of its rounds",
                fix="Compare at rows or at calls.",
            )
    return min(found for found in spent if found is not None)


def amount(cost: Cost, at: At) -> int | None:
    """How much of a budget a cost is."""
    return {"rows": cost.rows, "tokens": cost.tokens, "calls": cost.calls}[at]


def choose(side: Side, number: int | None, at: At | None, budget: int | None) -> Evaluated:
    """The round of a side to be compared: the one asked for, or the last within a budget, or the last.

    A side that has no round within the budget stands with its first. TapirError where the one asked for is not there.
    """
    if number is not None:
        for found in side.rounds:
            if found.number == number:
                return found
        known = ", ".join(str(found.number) for found in side.rounds)
        raise TapirError(f"run {side.name!r} has no evaluated round {number}", fix=f"Its evaluated rounds: {known}.")
    if at and budget is not None:
        return ([found for found in side.rounds if within(found, at, budget)] or side.rounds[:1])[-1]
    return side.last


def within(found: Evaluated, at: At, budget: int) -> bool:
    """Whether a round's cost so far keeps to a budget."""
    spent = amount(found.cost, at)
    return spent is not None and spent <= budget


def round_row(side: Side, found: Evaluated, chosen: bool) -> dict[str, Any]:
    """A round's cost so far and its rates."""
    rates = {metric: rate(metric, values(found, metric)) for metric in METRICS}
    return {"run": side.name, "round": found.number, **asdict(found.cost), **rates, "chosen": chosen}


def values(found: Evaluated, metric: str) -> RowValues:
    """A round's values by row id."""
    return {"accuracy": found.right, "win_rate": found.wins, "likeness": found.likeness}[metric]


def rate(metric: str, rows: RowValues) -> dict[str, Any] | None:
    """{mean, interval, rows}, the interval 95 % and as `status` has it; None where no row has a value."""
    if not rows:
        return None
    numbers = list(rows.values())
    interval = (
        wilson_interval([value == 1 for value in numbers]) if metric == "accuracy" else bootstrap_interval(numbers)
    )
    return {"mean": fmean(numbers), "interval": interval, "rows": len(numbers)}


def against_first(
    sides: Sequence[Side], chosen: Sequence[Evaluated], groups: Mapping[str, set[str]]
) -> list[dict[str, Any]]:
    """A row for each metric, group of row ids and side: its rate, and how it differs from the first side's.

    Holm's correction is over all the differences of one metric. A metric or group without a value is left out.
    """
    rows = []
    for metric in METRICS:
        places = [(group, at) for group in groups for at in range(len(sides))]
        picked = {(group, at): only(values(chosen[at], metric), groups[group]) for group, at in places}
        apart = {(group, at): gap(picked[group, at], picked[group, 0]) for group, at in places if at}
        gaps = correct_p_values({place: found for place, found in apart.items() if found})
        rows += [
            {
                "metric": metric,
                "task": group,
                "run": sides[at].name,
                "round": chosen[at].number,
                **told,
                "difference": asdict(gaps[group, at]) if (group, at) in gaps else None,
            }
            for group, at in places
            if (told := rate(metric, picked[group, at]))
        ]
    return rows


def only(rows: RowValues, ids: set[str]) -> RowValues:
    """The values of some rows."""
    return {id: value for id, value in rows.items() if id in ids}


def gap(one: RowValues, other: RowValues) -> Difference | None:
    """One run less the other on the rows that both have a value for; None where there is none."""
    return estimate_difference({0: one}, {0: other}) if one.keys() & other.keys() else None


def notes(sides: Sequence[Side], chosen: Sequence[Evaluated], at: At | None, budget: int | None) -> list[str]:
    """What the reader ought to know of the choice of rounds and of rows left out."""
    said = []
    for side, found in zip(sides, chosen, strict=True):
        if side.recipe.curriculum.name in BY_HOLDOUT:
            said.append(f"{side.name} plans its rounds by this holdout, which flatters it here.")
        if at and budget is not None and not within(found, at, budget):
            said.append(
                f"{side.name} has no round within {budget:,} {UNITS[at]}: its round {found.number}, after "
                f"{amount(found.cost, at):,}, stands for it."
            )
        if unjudged := len(side.holdout) - len(found.judged):
            rows = "1 row is" if unjudged == 1 else f"{unjudged:,} rows are"
            said.append(f"{side.name}: {rows} not judged in round {found.number} and left out of win rates.")
    return said
