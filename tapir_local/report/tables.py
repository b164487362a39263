"""Format values as cells of a table, and lay out text and values in simple tables."""

from collections.abc import Mapping, Sequence

from tapir_local.tables import PlainTable


def text_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    whole: Sequence[str] = (),
    ranks: Mapping[str, int] | None = None,
) -> PlainTable:
    """A table of text; the columns `whole` are not wrapped, those with a rank may be left out (see PlainTable)."""
    table = PlainTable(title)
    for name in columns:
        table.add_column(name, no_wrap=name in whole, rank=(ranks or {}).get(name, 0))
    for row in rows:
        table.add_row(*row)
    return table


def task_table(title: str, rows: Mapping[str, Mapping[str, float | None]], columns: Mapping[str, str]) -> PlainTable:
    """A row for each task. `columns` maps the key of a value to its format, one of those of `value_cell`."""
    table = PlainTable(title)
    table.add_column("task", no_wrap=True)
    table.add_numbers(*(name.replace("_", " ") for name in columns))
    for task, values in rows.items():
        table.add_row(task, *(value_cell(values.get(name), kind) for name, kind in columns.items()))
    return table


def value_cell(value: float | None, kind: str) -> str:
    """A value as a `rate`, a `score` or a `count`, or a change as `points` (of a rate) or `difference` (of a score)."""
    if kind in ("points", "difference"):
        return "-" if value is None else f"{100 * value:+.1f}" if kind == "points" else f"{value:+.2f}"
    if kind == "score":
        return "-" if value is None else f"{value:.2f}"
    return percent_cell(value) if kind == "rate" else f"{int(value or 0):,}"


def percent_cell(value: float | None) -> str:
    """`16.7%`, or a dash if there is no value."""
    return "-" if value is None else f"{value:.1%}"


def percent_interval_cell(pair: Sequence[float] | None) -> str:
    """`9% to 28%`, a 95 % interval; empty if there is none."""
    return "" if pair is None else f"{pair[0]:.0%} to {pair[1]:.0%}"


def number_cell(value: float | None) -> str:
    """`1,234`; empty if there is no value."""
    return "" if value is None else f"{value:,}"


def count_cell(value: int | None) -> str:
    """`1,234`, or a dash if there is no count."""
    return "-" if value is None else f"{value:,}"


def score_pair_cell(scores: Sequence[float | None] | None) -> str:
    """`3.5 : 10.0`, the scores of the student and of the teacher; a dash if one is missing."""
    if scores is None or scores[0] is None or scores[1] is None:
        return "-"
    return f"{scores[0]:.1f} : {scores[1]:.1f}"


def money_cell(value: float | None) -> str:
    """An amount with two decimals, below 1 with four; `unknown` if there is no price."""
    if value is None:
        return "unknown"
    return f"{value:,.2f}" if value >= 1 or not value else f"{value:,.4f}"
