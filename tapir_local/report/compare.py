"""Compare runs on the same holdout: rates by round, cost, and whether the differences may be chance."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

from tapir_local.errors import TapirError
from tapir_local.method.metrics import bootstrap_interval, wilson_interval
from tapir_local.method.stats import Difference, RowValues, correct_p_values, estimate_difference
from tapir_local.printable import format_count
from tapir_local.recipe.text import fixed_settings, flatten
from tapir_local.report.run_results import HOLDOUT_CURRICULA, EvaluatedRound, RunCost, RunResults, read_run_results
from tapir_local.run_dir import UNTRAINED_ROUND, RunDir

CostUnit = Literal["rows", "tokens", "calls"]

COST_UNIT_NAMES: Mapping[str, str] = {
    "rows": "training rows",
    "tokens": "training tokens",
    "calls": "calls of the teacher and the judge",
}
MOST_NAMED = 3  # of the settings in which two runs differ
CHANCE = 0.05  # a difference with a p value of this or more may be chance
COMPARED_METRICS = ("accuracy", "win_rate", "likeness")
HOLDOUT_SETTINGS = ("random_seed", "seeds.", "teacher.", "classifier.", "tasks")
SAME_HOLDOUT_ADVICE = (
    "Runs can be compared only on the same holdout: use the same random_seed, seeds, seeds.holdout and teacher, and "
    "one cache."
)


def compare_runs(
    runs: Sequence[RunDir], *, number: int | None = None, at: CostUnit | None = None, by_task: bool = False
) -> dict[str, Any]:
    """What `tapir-local compare --json` prints; TapirError if the runs cannot be compared."""
    check_run_names([run.name for run in runs])
    if number is not None and at:
        raise TapirError(
            "--round and --at cannot be used together",
            fix="Leave out --round: --at chooses the round of each run by its cost.",
        )
    results = read_run_results(runs)
    for other in results[1:]:
        check_comparable(results[0], other)
    return build_comparison(results, number, at, by_task)


def check_run_names(names: Sequence[str]) -> None:
    """TapirError unless there are at least two runs and none is named twice."""
    if len(names) < 2:
        raise TapirError(
            "one run cannot be compared", fix="Name two runs or more; each is compared with the first one."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TapirError(f"run {twice[0]!r} is named twice", fix="Name each run once.")


def check_comparable(one: RunResults, other: RunResults) -> None:
    """TapirError unless two runs have the same holdout, the same answers of the teacher to it, and the same judge."""
    if faults := holdout_differences(one, other):
        differing = setting_differences(one, other, run_settings, HOLDOUT_SETTINGS)
        recipes = f"Their recipes differ in {'; '.join(differing)}. " if differing else ""
        raise TapirError(
            f"runs {one.name!r} and {other.name!r} have different holdouts: {', '.join(faults)}",
            fix=recipes + SAME_HOLDOUT_ADVICE,
        )
    if differing := setting_differences(one, other, comparable_judge_settings):
        raise TapirError(
            f"runs {one.name!r} and {other.name!r} have different judges: {'; '.join(differing)}",
            fix="Win rates of different judges cannot be compared. Run one of the two again under another --name and "
            "with the judge of the other: calls that stay the same cost nothing.",
        )


def holdout_differences(one: RunResults, other: RunResults) -> list[str]:
    """How two holdouts differ, counted in rows."""
    ours, theirs = ({row.id: row for row in results.holdout} for results in (one, other))
    both = ours.keys() & theirs.keys()
    asked = {id for id in both if ours[id].prompt != theirs[id].prompt}
    counts = {
        f"only in {one.name}": len(ours.keys() - both),
        f"only in {other.name}": len(theirs.keys() - both),
        "with another instruction": len(asked),
        "with another answer of the teacher": sum(ours[id].completion != theirs[id].completion for id in both - asked),
    }
    return [f"{format_count(count, 'row')} {what}" for what, count in counts.items() if count]


def setting_differences(
    one: RunResults,
    other: RunResults,
    settings: Callable[[RunResults], Mapping[str, Any]],
    prefixes: tuple[str, ...] = ("",),
) -> list[str]:
    """`random_seed (1 in a, 2 in b)` for the first three settings with one of these prefixes that differ."""
    ours, theirs = settings(one), settings(other)
    found = [
        f"{key} ({ours.get(key)!r} in {one.name}, {theirs.get(key)!r} in {other.name})"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and key.startswith(prefixes)
    ]
    return found if len(found) <= MOST_NAMED else [*found[:MOST_NAMED], f"{len(found) - MOST_NAMED} more"]


def run_settings(results: RunResults) -> dict[str, Any]:
    """The settings of a run that cannot change while it runs, by path."""
    return flatten(fixed_settings(results.recipe))


def comparable_judge_settings(results: RunResults) -> dict[str, Any]:
    """The settings that decide how an answer is judged, without the judge's address and the limit of unjudged rows."""
    ignored = {"kind", "model", "gguf", "base_url", "alias", "max_unjudged", "health"}
    kept = {name: value for name, value in fixed_settings(results.recipe)["judge"].items() if name not in ignored}
    return {"judge": results.judge, **flatten(kept, "judge.")}


def build_comparison(
    results: Sequence[RunResults], number: int | None, at: CostUnit | None, by_task: bool
) -> dict[str, Any]:
    """Rates and cost of every round, and the chosen round of each run compared with that of the first run."""
    budget = lowest_cost(results, at) if at else None
    chosen = [choose_round(run, number, at, budget) for run in results]
    tasks: dict[str, set[str]] = defaultdict(set)
    for row in results[0].holdout:
        tasks[row.task].add(row.id)
    everything = {"": {row.id for row in results[0].holdout}}
    return {
        "baseline": results[0].name,
        "holdout": {"rows": len(results[0].holdout), "judge": results[0].judge},
        "at": {"kind": at, "budget": budget} if at else None,
        "rounds": [
            round_record(run, found, found is picked)
            for run, picked in zip(results, chosen, strict=True)
            for found in run.rounds
        ],
        "compared": compare_groups_with_first(results, chosen, everything),
        "by_task": compare_groups_with_first(results, chosen, {task: tasks[task] for task in sorted(tasks)})
        if by_task
        else None,
        "notes": comparison_notes(results, chosen, at, budget),
    }


def lowest_cost(results: Sequence[RunResults], at: CostUnit) -> int:
    """What the cheapest run cost up to its last evaluated round; TapirError if a run did not count it."""
    spent = [cost_amount(run.last.cost, at) for run in results]
    for run, found in zip(results, spent, strict=True):
        if found is None:
            raise TapirError(
                f"run {run.name!r} has no count of its training tokens",
                where="adapter/train_log.jsonl of its rounds",
                fix="Use --at rows or --at calls.",
            )
    return min(found for found in spent if found is not None)


def cost_amount(cost: RunCost, at: CostUnit) -> int | None:
    """A cost in one unit; None if it was not counted."""
    return {"rows": cost.rows, "tokens": cost.tokens, "calls": cost.calls}[at]


def choose_round(run: RunResults, number: int | None, at: CostUnit | None, budget: int | None) -> EvaluatedRound:
    """The round of a run to compare: the given one, the last one within a budget, or the one in model/.

    Without a model/ it is the last one; if no round is within the budget, the first one. TapirError if the given round
    is not evaluated.
    """
    if number is not None:
        for found in run.rounds:
            if found.number == number:
                return found
        known = ", ".join(str(found.number) for found in run.rounds)
        raise TapirError(f"run {run.name!r} has no evaluated round {number}", fix=f"Its evaluated rounds: {known}.")
    if at and budget is not None:
        return ([found for found in run.rounds if is_within_budget(found, at, budget)] or run.rounds[:1])[-1]
    return run.in_model


def is_within_budget(found: EvaluatedRound, at: CostUnit, budget: int) -> bool:
    """Whether the cost up to a round is known and within a budget."""
    spent = cost_amount(found.cost, at)
    return spent is not None and spent <= budget


def round_record(run: RunResults, found: EvaluatedRound, chosen: bool) -> dict[str, Any]:
    """The cost up to a round, and its rates."""
    rates = {metric: rate_with_interval(metric, metric_values(found, metric)) for metric in COMPARED_METRICS}
    return {"run": run.name, "round": found.number, **asdict(found.cost), **rates, "chosen": chosen}


def metric_values(found: EvaluatedRound, metric: str) -> RowValues:
    """The values of a metric in a round, by row id."""
    return {"accuracy": found.right, "win_rate": found.wins, "likeness": found.likeness}[metric]


def rate_with_interval(metric: str, rows: RowValues) -> dict[str, Any] | None:
    """{mean, interval, rows}, with the same 95 % interval as `status`; None if no row has a value."""
    if not rows:
        return None
    numbers = list(rows.values())
    interval = (
        wilson_interval([value == 1 for value in numbers]) if metric == "accuracy" else bootstrap_interval(numbers)
    )
    return {"mean": fmean(numbers), "interval": interval, "rows": len(numbers)}


def compare_groups_with_first(
    results: Sequence[RunResults], chosen: Sequence[EvaluatedRound], groups: Mapping[str, set[str]]
) -> list[dict[str, Any]]:
    """A row for each metric, group of row ids, and run: its rate, and its difference from the first run.

    Holm's correction covers all differences of one metric. Metrics and groups without a value are left out.
    """
    rows = []
    for metric in COMPARED_METRICS:
        places = [(group, at) for group in groups for at in range(len(results))]
        values = {(group, at): select_rows(metric_values(chosen[at], metric), groups[group]) for group, at in places}
        pairs = {(group, at): paired_difference(values[group, at], values[group, 0]) for group, at in places if at}
        differences = correct_p_values({place: found for place, found in pairs.items() if found})
        rows += [
            {
                "metric": metric,
                "task": group,
                "run": results[at].name,
                "round": chosen[at].number,
                **rate,
                "difference": asdict(differences[group, at]) if (group, at) in differences else None,
            }
            for group, at in places
            if (rate := rate_with_interval(metric, values[group, at]))
        ]
    return rows


def select_rows(rows: RowValues, ids: set[str]) -> RowValues:
    """The values of the rows with these ids."""
    return {id: value for id, value in rows.items() if id in ids}


def paired_difference(one: RowValues, other: RowValues) -> Difference | None:
    """One run minus the other, on the rows for which both have a value; None if there are none."""
    return estimate_difference({0: one}, {0: other}) if one.keys() & other.keys() else None


def comparison_notes(
    results: Sequence[RunResults], chosen: Sequence[EvaluatedRound], at: CostUnit | None, budget: int | None
) -> list[str]:
    """What the reader should know about the choice of rounds and about rows that were left out."""
    notes = []
    for run, found in zip(results, chosen, strict=True):
        if run.recipe.curriculum.name in HOLDOUT_CURRICULA:
            notes.append(f"{run.name} selects its training data by this holdout, so its rates here are optimistic.")
        if at and budget is not None and not is_within_budget(found, at, budget):
            notes.append(
                f"{run.name} has no round within {budget:,} {COST_UNIT_NAMES[at]}: round {found.number} is compared, "
                f"which cost {cost_amount(found.cost, at):,}."
            )
        if not at and found is run.in_model and found is not run.last:
            last = run.last.number
            notes.append(f"{run.name}: round {found.number} is compared, which is in model/; the last is round {last}.")
        if unjudged := len(run.holdout) - len(found.judged):
            rows = format_count(unjudged, "row is", "rows are")
            notes.append(f"{run.name}: {rows} not judged in round {found.number} and left out of win rates.")
    return notes


def compare_rounds(run: RunDir) -> dict[str, Any]:
    """The untrained student and the rounds of a run: rates, changes, the best one, and tasks that fell since the first.

    Changes are in `metric`: accuracy or, without a checker, win rate or likeness. p values of the tasks are corrected
    for their number. TapirError if no round is evaluated.
    """
    (results,) = read_run_results([run])
    rounds = [*([results.untrained] if results.untrained else []), *results.rounds]
    metric = next((name for name in COMPARED_METRICS if metric_values(results.last, name)), "accuracy")
    values = [metric_values(found, metric) for found in rounds]
    means = [fmean(rows.values()) if rows else 0.0 for rows in values]
    best = max(range(len(means)), key=lambda at: (means[at], at))  # of equally good rounds the last
    changes = [None, *(paired_difference(now, before) for before, now in pairwise(values))]
    return {
        "run": run.name,
        "metric": metric,
        "rounds": [
            {**round_record(results, found, found is results.last), "change": change and asdict(change)}
            for found, change in zip(rounds, changes, strict=True)
        ],
        "best": rounds[best].number,
        "shipped": results.in_model.number,
        "gain": difference_record(values[-1], values[0]) if len(values) > 1 else None,
        "lag": difference_record(values[-1], values[best]),
        "fallen": fallen_tasks(results, rounds[0], metric) if len(values) > 1 else [],
    }


def difference_record(one: RowValues, other: RowValues) -> dict[str, Any] | None:
    """One round minus another as data; None if no row has a value in both."""
    found = paired_difference(one, other)
    return asdict(found) if found else None


def fallen_tasks(results: RunResults, start: EvaluatedRound, metric: str) -> list[dict[str, Any]]:
    """The tasks on which the last round is below the first evaluation, the largest loss of rows first."""
    first, last = (metric_values(found, metric) for found in (start, results.last))
    groups: dict[str, set[str]] = defaultdict(set)
    for row in results.holdout:
        groups[row.task].add(row.id)
    pairs = {task: paired_difference(select_rows(last, ids), select_rows(first, ids)) for task, ids in groups.items()}
    found = correct_p_values({task: pair for task, pair in pairs.items() if pair})
    fallen = [{"task": task, **asdict(pair)} for task, pair in found.items() if pair.mean < 0]
    return sorted(fallen, key=lambda row: (row["mean"] * row["rows"], row["task"]))


def round_verdict(found: Mapping[str, Any]) -> str:
    """What the rounds of a run achieved, in one sentence or two: the gain, the best round, and tasks that fell."""
    last, gain = found["rounds"][-1], found["gain"]
    name, rate = metric_name(found["metric"]), last[found["metric"]]
    if not rate:
        return "No answer to the holdout could be checked or judged, so nothing is known about the student."
    if gain is None:
        low, high = rate["interval"]
        return f"Round {last['round']}: {name} {rate['mean']:.1%} (95 %: {low:.0%} to {high:.0%})."
    first = found["rounds"][0]["round"]
    said = f"Round {last['round']} {direction(gain)} {round_name(first)} in {name}{certainty(gain)}."
    if found["best"] == last["round"]:
        return said if "as good as" in direction(gain) else f"{said} It is the best round."
    if found["best"] == first:
        best = round_name(first)
        return f"{said} {best[0].upper()}{best[1:]} is the best, but model/ has round {found['shipped']}."
    here = ", which is in model/," if found["shipped"] == last["round"] else ""
    there = f" model/ has round {found['shipped']}." if not here else ""
    return (
        f"{said} The best is round {found['best']}: round {last['round']}{here} "
        f"{direction(found['lag'])} it{certainty(found['lag'])}.{there}"
    )


def round_name(number: int) -> str:
    """`round 2`, or `the untrained student`."""
    return "the untrained student" if number == UNTRAINED_ROUND else f"round {number}"


def metric_name(metric: str) -> str:
    """A metric as people call it."""
    return metric.replace("_", " ")


def direction(gap: Mapping[str, Any]) -> str:
    """`is 18.0 points better than`, or `is as good as`."""
    points = 100 * gap["mean"]
    if abs(points) < 0.05:
        return "is as good as"
    return f"is {format_points(points)} {'better' if points > 0 else 'worse'} than"


def format_points(points: float) -> str:
    """`1.0 point`, `2.5 points`, without the sign."""
    return f"{abs(points):.1f} point" + ("" if f"{abs(points):.1f}" == "1.0" else "s")


def certainty(gap: Mapping[str, Any]) -> str:
    """The interval and p of a difference, and whether it may be chance."""
    if not gap["better"] and not gap["worse"]:
        return ""
    chance = ", which may be chance" if gap["p"] >= CHANCE else ""
    p = "p < 0.001" if gap["p"] < 0.001 else f"p = {gap['p']:.2g}"
    return f" (95 %: {100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}, {p}){chance}"


def fallen_sentence(found: Mapping[str, Any], most: int = 4) -> str:
    """The tasks that fell since the first evaluated round, with their rows; "" if none did."""
    rows = found["fallen"]
    if not rows:
        return ""
    named = ", ".join(
        f"{row['task']} {100 * row['mean']:+.0f} ({format_count(row['rows'], 'row')})" for row in rows[:most]
    )
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    sure = any(row["p_holm"] < CHANCE for row in rows)
    chance = "" if sure else "; each of these may be chance"
    return f"Tasks that fell since {round_name(found['rounds'][0]['round'])}, in points: {named}{more}{chance}."
