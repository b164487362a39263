"""Tables that compare runs: cost and rates of rounds, and differences; readable at 60 columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tapir_local.printable import format_count
from tapir_local.report.compare import CHANCE, COST_UNIT_NAMES
from tapir_local.report.tables import count_cell, percent_cell
from tapir_local.run_dir import UNTRAINED_ROUND
from tapir_local.tables import PlainTable

METRIC_NAMES = {"accuracy": "accuracy", "win_rate": "win rate", "likeness": "likeness"}

METRIC_CAPTIONS = {
    "win_rate": "Win rate against the teacher's answers, judged by ",
    "likeness": "Likeness of the student's answers to the teacher's, 100% if the words are the same, by ",
}

# Which columns a narrow terminal leaves out, the highest rank first.
COST_RANKS = {"rows": 4, "tokens": 1, "teacher": 3, "judge": 2}
DIFFERENCE_RANKS = {"difference": 0, "+/-": 4, "p": 3, "p Holm": 0}


def comparison_tables(found: Mapping[str, Any]) -> list[PlainTable]:
    """The rounds with their cost, the differences from the first run and, if computed, those of each task."""
    differences = differences_table(found["compared"], found["baseline"])
    differences.caption = " ".join([*found["notes"], differences_caption(found["compared"])])
    by_task = found["by_task"] or []
    metrics = dict.fromkeys(row["metric"] for row in by_task)
    return [
        compared_rounds_table(found),
        differences,
        *(compared_tasks_table([row for row in by_task if row["metric"] == metric]) for metric in metrics),
    ]


def empty_table(title: str, left: Sequence[str], right: Mapping[str, int]) -> PlainTable:
    """A table without rows: columns of text, then columns of numbers with their ranks (see PlainTable)."""
    table = PlainTable(title)
    for name in left:
        table.add_column(name, no_wrap=name != "run")
    for name, rank in right.items():
        table.add_numbers(name, rank=rank)
    return table


def compared_rounds_table(found: Mapping[str, Any]) -> PlainTable:
    """A row for each round of each run: cost so far, and rates with intervals; the chosen rounds are marked."""
    metrics = shown_metrics(found["rounds"])
    table = empty_table(
        f"the runs, round by round, on the same {format_count(found['holdout']['rows'], 'row')} of holdout",
        ["run"],
        {"round": 0, **COST_RANKS, **{METRIC_NAMES[metric]: 0 for metric in metrics}},
    )
    for row, new in with_group_start(found["rounds"], "run"):
        if new:
            table.add_section()
        costs = (count_cell(row[name]) for name in ("rows", "tokens", "teacher_calls", "judge_calls"))
        rates = (rate_and_interval_cell(row[metric]) for metric in metrics)
        table.add_row(row["run"] if new else "", f"{'*' if row['chosen'] else ''}{row['round']}", *costs, *rates)
    table.caption = compared_rounds_caption(found)
    return table


def shown_metrics(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy, and the win rate or, if there was no judge, likeness."""
    alike = any(row["likeness"] for row in rounds) and not any(row["win_rate"] for row in rounds)
    return ["accuracy", "likeness" if alike else "win_rate"]


def compared_rounds_caption(found: Mapping[str, Any]) -> str:
    """What the columns mean, and which rounds are compared."""
    at = found["at"]
    chosen = f"the last round within {at['budget']:,} {COST_UNIT_NAMES[at['kind']]}" if at else "compared below"
    return (
        "Cost up to the end of each round: training rows, training tokens, calls of the teacher and calls of the judge "
        f"(paid or from the store, without those of the evaluation). *: {chosen}. In parentheses: 95 % intervals "
        f"(Wilson for accuracy, bootstrap otherwise). {METRIC_CAPTIONS[shown_metrics(found['rounds'])[1]]}"
        f"{found['holdout']['judge']}."
    )


def differences_table(rows: Sequence[Mapping[str, Any]], baseline: str) -> PlainTable:
    """A row for each metric and run: its rate, its difference from the first run, and p."""
    title = f"the chosen rounds compared with that of {baseline}, on the same rows"
    table = empty_table(title, ["", "run"], {"round": 2, "rate": 1, **DIFFERENCE_RANKS})
    for row, new in with_group_start(rows, "metric"):
        if new:
            table.add_section()
        names = [METRIC_NAMES[row["metric"]] if new else "", row["run"], str(row["round"])]
        table.add_row(*names, rate_and_interval_cell(row), *difference_cells(row["difference"]))
    return table


def differences_caption(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which tests and intervals were used, and how many differences the correction covers."""
    pairs = [row for row in rows if row["difference"]]
    tests = {metric: {row["difference"]["test"] for row in pairs if row["metric"] == metric} for metric in METRIC_NAMES}
    named = "; ".join(f"{METRIC_NAMES[metric]}: {', '.join(sorted(found))}" for metric, found in tests.items() if found)
    most = max(sum(row["metric"] == metric for row in pairs) for metric in METRIC_NAMES)
    holm = f"p corrected for the {most} differences of a metric" if most > 1 else "same as p, for a single difference"
    return (
        "Difference: the rate minus the first run's, in percentage points, with a paired bootstrap interval. +/-: "
        f"number of rows on which the run is better / worse. p: two-sided, paired; {named}. p Holm: {holm}."
    )


def compared_tasks_table(rows: Sequence[Mapping[str, Any]]) -> PlainTable:
    """One metric: a row for each task and run."""
    name = METRIC_NAMES[rows[0]["metric"]]
    table = empty_table(f"{name} by task", ["task", "run"], {"rows": 2, name: 1, **DIFFERENCE_RANKS})
    for row, new in with_group_start(rows, "task"):
        names = [row["task"] if new else "", row["run"], str(row["rows"])]
        table.add_row(*names, rate_and_interval_cell(row), *difference_cells(row["difference"]))
    count = sum(row["difference"] is not None for row in rows)
    table.caption = (
        f"p Holm: p corrected for the differences in this table ({count}). For a task with few rows the bootstrap "
        "interval is too narrow; use p instead."
    )
    return table


def with_group_start(rows: Sequence[Mapping[str, Any]], key: str) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """The rows, each with whether its value of `key` differs from that of the row before."""
    for before, row in zip([None, *rows], rows, strict=False):
        yield row, before is None or before[key] != row[key]


def rate_and_interval_cell(rate: Mapping[str, Any] | None) -> str:
    """`16.7% (9 to 28)`, a rate and its interval."""
    return f"{percent_cell(rate['mean'])} ({percent_range(rate['interval'], '.0f')})" if rate else "-"


def difference_cells(found: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    """A difference with its interval in percentage points, rows better and worse, p, and p corrected; or four ""."""
    if found is None:
        return "", "", "", ""
    points = f"{100 * found['mean']:+.1f} ({percent_range((found['low'], found['high']), '+.1f')})"
    return points, f"{found['better']}/{found['worse']}", p_value_cell(found["p"]), p_value_cell(found["p_holm"])


def percent_range(pair: Sequence[float], form: str) -> str:
    """`9 to 28`, an interval in percent."""
    return f"{100 * pair[0]:{form}} to {100 * pair[1]:{form}}"


def p_value_cell(p: float) -> str:
    """`0.012`, or `<0.001`."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def rounds_of_run_table(found: Mapping[str, Any]) -> PlainTable:
    """A row for each round of one run: its rates, and the change on the round before."""
    metrics = shown_metrics(found["rounds"])
    name = METRIC_NAMES[found["metric"]]
    table = PlainTable(f"run {found['run']}: the holdout, round by round")
    table.add_numbers("round")
    for metric in metrics:
        table.add_numbers(METRIC_NAMES[metric], rank=int(metric != found["metric"]))
    table.add_numbers(f"change in\n{name}")
    table.add_column("", no_wrap=True)
    for row in found["rounds"]:
        change, name = row["change"], "untrained" if row["round"] == UNTRAINED_ROUND else str(row["round"])
        label, chance = f"{'*' * (row['round'] == found['best'])}{name}", change and change["p"] >= CHANCE
        rates = (rate_and_interval_cell(row[metric]) for metric in metrics)
        table.add_row(label, *rates, difference_cells(change)[0], "chance?" if chance else "")
    table.caption = (
        f"*: the best; model/ has round {found['shipped']}. Round 0 is plain fine-tuning on the teacher's answers. "
        "Change: on the round before, in percentage points; it may be chance where p is 0.05 or more. In parentheses: "
        f"95 % intervals. `tapir-local status "
        f"{found['run']}` has scores, calls and seconds."
    )
    return table
