"""Tables of an evaluation, readable at 60 columns: rates or grades, in all and by category."""

from collections.abc import Mapping

from tapir_local.evaluation.rates import EvaluationResult, GradeMeans, PairRates
from tapir_local.report.tables import percent_cell, value_cell
from tapir_local.tables import PlainTable

ALL_ROWS = "all"  # the last row's category


def evaluation_table(found: EvaluationResult) -> PlainTable:
    """The rates or grades of an evaluation."""
    if found.pairs:
        return pairs_table(found, {**found.pairs_by_category, ALL_ROWS: found.pairs})
    assert found.grades
    return grades_table(found, {**found.grades_by_category, ALL_ROWS: found.grades})


def pairs_table(found: EvaluationResult, rows: Mapping[str, PairRates]) -> PlainTable:
    """A row for each category: win rate and its standard error, the rate at equal length and its interval, lengths."""
    table = PlainTable(f"{found.student} against {found.against}")
    table.add_column("category", no_wrap=True)
    table.add_numbers("rows", rank=2)
    table.add_numbers("win rate", "+/-")
    table.add_numbers("length-\ncontrolled")
    table.add_numbers("95 %", rank=1)
    table.add_numbers("won : tied : lost", rank=4)
    table.add_numbers("characters,\nits : other's", rank=3)
    for name, rates in rows.items():
        if name == ALL_ROWS and len(rows) > 1:
            table.add_section()
        interval = rates.length_controlled_interval
        table.add_row(
            name,
            f"{rates.judged:,}",
            percent_cell(rates.win_rate),
            points_cell(rates.standard_error),
            percent_cell(rates.length_controlled),
            f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else "",
            f"{rates.wins:,} : {rates.ties:,} : {rates.losses:,}",
            f"{rates.length:,.0f} : {rates.opponent_length:,.0f}",
        )
    table.caption = (
        f"Win rate: a tie counts as half a win; +/-: standard error, in points. Judged by {found.judge or 'unknown'}. "
        "Length-controlled: the rate that answers of equal length would have. Rows: those that were judged."
    )
    return table


def grades_table(found: EvaluationResult, rows: Mapping[str, GradeMeans]) -> PlainTable:
    """A row for each category: mean score of each turn and of all, and the standard error."""
    turns = max(len(means.turns) for means in rows.values())
    table = PlainTable(f"{found.student}: grades, 1 to 10")
    table.add_column("category", no_wrap=True)
    table.add_numbers("questions", rank=1)
    if turns > 1:
        table.add_numbers(*(f"turn {turn}" for turn in range(1, turns + 1)))
    table.add_numbers("mean", "+/-")
    table.add_numbers("no grade", rank=2)
    for name, means in rows.items():
        if name == ALL_ROWS and len(rows) > 1:
            table.add_section()
        by_turn = [value_cell(value, "score") for value in means.turns] if turns > 1 else []
        scores = [*by_turn, value_cell(means.mean, "score"), value_cell(means.standard_error, "score")]
        table.add_row(name, f"{means.questions:,}", *scores, f"{means.ungraded:,}")
    table.caption = (
        f"Judged by {found.judge}; +/-: standard error over questions. The judge's wording is not FastChat's: compare "
        "these grades only with each other."
    )
    return table


def points_cell(value: float | None) -> str:
    """A share in percentage points, `1.5`; a dash if there is none."""
    return "-" if value is None else f"{100 * value:.1f}"
