"""Tables of runs side by side: what rounds cost and reached, and what they differ by; readable at 100 columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tapir_local.report.compare import COST_UNIT_NAMES
from tapir_local.report.tables import percent_cell
from tapir_local.tables import PlainTable

METRIC_NAMES = {"accuracy": "accuracy", "win_rate": "win rate", "likeness": "likeness"}

METRIC_CAPTIONS = {
    "win_rate": "Win rate against the teacher's answers, judged by ",
    "likeness": "Likeness of the student's answers, 100% for the same words, by ",
}


def comparison_tables(found: Mapping[str, Any]) -> list[PlainTable]:
    """The rounds with their cost, the chosen rounds against the first run's and, where asked for, each task's."""
    differences = differences_table(found["compared"], found["baseline"])
    differences.caption = " ".join([*found["notes"], differences_caption(found["compared"])])
    by_task = found["by_task"] or []
    metrics = dict.fromkeys(row["metric"] for row in by_task)
    return [
        compared_rounds_table(found),
        differences,
        *(compared_tasks_table([row for row in by_task if row["metric"] == metric]) for metric in metrics),
    ]


def empty_table(title: str, left: Sequence[str], right: Sequence[str]) -> PlainTable:
    """An empty table with columns of text and of numbers."""
    table = PlainTable(title)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def compared_rounds_table(found: Mapping[str, Any]) -> PlainTable:
    """A row a round of each run: cost so far, accuracy and win rate with their intervals; the chosen one is marked."""
    metrics = shown_metrics(found["rounds"])
    table = empty_table(
        f"runs side by side: {found['holdout']['rows']:,} rows of one holdout",
        ["run"],
        ["round", "rows", "tokens", "teacher", "judge", *(METRIC_NAMES[metric] for metric in metrics)],
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
    """Accuracy, and the win rate or, where no judge was asked, likeness."""
    alike = any(row["likeness"] for row in rounds) and not any(row["win_rate"] for row in rounds)
    return ["accuracy", "likeness" if alike else "win_rate"]


def compared_rounds_caption(found: Mapping[str, Any]) -> str:
    """What the columns mean, and which rounds are compared."""
    at = found["at"]
    chosen = f"each run's last within {at['budget']:,} {UNITS[at['kind']]}" if at else "compared below"
    return (
        "Spent by the end of each round: training rows, training tokens, calls of the teacher and of the judge (paid "
        f"or from the store; those that evaluation asks are left out). *: {chosen}. In brackets, 95 % intervals "
        f"(Wilson's of accuracy, bootstrap of the other). {SAID[shown_metrics(found['rounds'])[1]]}"
        f"{found['holdout']['judge']}."
    )


def differences_table(rows: Sequence[Mapping[str, Any]], baseline: str) -> PlainTable:
    """A row for each metric and run: its rate, how far it is from the first run's, and p."""
    title = f"the chosen rounds against {baseline}'s, on the same rows"
    table = empty_table(title, ["", "run"], ["round", "rate", "less first", "+/-", "p", "p Holm"])
    for row, new in with_group_start(rows, "metric"):
        if new:
            table.add_section()
        names = [METRIC_NAMES[row["metric"]] if new else "", row["run"], str(row["round"])]
        table.add_row(*names, rate_and_interval_cell(row), *difference_cells(row["difference"]))
    return table


def differences_caption(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which tests, which intervals, what they were corrected for."""
    gaps = [row for row in rows if row["difference"]]
    tests = {metric: {row["difference"]["test"] for row in gaps if row["metric"] == metric} for metric in METRIC_NAMES}
    named = "; ".join(f"{NAMES[metric]}: {', '.join(sorted(found))}" for metric, found in tests.items() if found)
    most = max(sum(row["metric"] == metric for row in gaps) for metric in METRIC_NAMES)
    holm = f"p corrected for the {most} differences of a metric" if most > 1 else "the same, as there is one difference"
    return (
        "Less first: the run's rate less the first run's, in percentage points, with a paired bootstrap interval. "
        f"+/-: rows on which it is better / worse. p, two-sided and paired: {named}. p Holm: {holm}."
    )


def compared_tasks_table(rows: Sequence[Mapping[str, Any]]) -> PlainTable:
    """One metric: a row for each task and run."""
    name = METRIC_NAMES[rows[0]["metric"]]
    table = empty_table(f"{name} by task", ["task", "run"], ["rows", name, "less first", "+/-", "p", "p Holm"])
    for row, new in with_group_start(rows, "task"):
        names = [row["task"] if new else "", row["run"], str(row["rows"])]
        table.add_row(*names, rate_and_interval_cell(row), *difference_cells(row["difference"]))
    gaps = sum(row["difference"] is not None for row in rows)
    table.caption = (
        f"p Holm: p corrected for all {gaps} differences of this table. Of a task with few rows the bootstrap's "
        "interval is too narrow: look at p."
    )
    return table


def with_group_start(rows: Sequence[Mapping[str, Any]], key: str) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Rows, each with whether it is the first of its key's value."""
    for before, row in zip([None, *rows], rows, strict=False):
        yield row, before is None or before[key] != row[key]


def rate_and_interval_cell(rate: Mapping[str, Any] | None) -> str:
    """`16.7% (9 to 28)`, a rate and its interval."""
    return f"{percent(rate['mean'])} ({between(rate['interval'], '.0f')})" if rate else "-"


def difference_cells(gap: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    """A difference and its interval in percentage points, rows better and worse, p, p corrected; or nothing."""
    if gap is None:
        return "", "", "", ""
    told = f"{100 * gap['mean']:+.1f} ({between((gap['low'], gap['high']), '+.1f')})"
    return told, f"{gap['better']}/{gap['worse']}", p_value_cell(gap["p"]), p_value_cell(gap["p_holm"])


def percent_range(pair: Sequence[float], spelled: str) -> str:
    """`9 to 28`, an interval in percent."""
    return f"{100 * pair[0]:{spelled}} to {100 * pair[1]:{spelled}}"


def p_value_cell(p: float) -> str:
    """A p value for people."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def count_cell(value: int | None) -> str:
    """A number for people; a dash where there is none."""
    return "-" if value is None else f"{value:,}"
