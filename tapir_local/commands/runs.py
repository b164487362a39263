"""`tapir-local compare`, `why` and `plan`: the commands that ask runs' files how good, why, and what if."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tapir_local.commands.options import cache_option, help_examples, json_option, select_run
from tapir_local.commands.output import print_json, print_table

if TYPE_CHECKING:
    from tapir_local.report.compare import CostUnit


@click.command(
    epilog=help_examples("tapir-local why quickstart seed-00017", 'tapir-local why quickstart "What is 27 + 48?"')
)
@click.argument("run")
@click.argument("row")
@cache_option
@json_option
def why_command(run: str, row: str, cache: Path | None, as_json: bool) -> None:
    """Why ROW of RUN was chosen or not: its scores in every round, what grew from it, what it cost.

    ROW is a row's id, or words that only its instruction has.
    """
    from tapir_local.report.why import explain_row as explain
    from tapir_local.report.why import why_tables

    found = explain(select_run(cache, run), row)
    if as_json:
        print_json(found)
    else:
        print_table(*why_tables(found))


@click.command(
    epilog=help_examples(
        "tapir-local plan quickstart --round 1 --set curriculum.mfd_threshold=1.5 --set tasks.Math=0.3",
        "tapir-local plan quickstart --round 2 --set curriculum.rows=2000 --json",
    )
)
@click.argument("run")
@click.option("--round", "number", type=click.IntRange(min=1), help="The round; the last planned one if left out.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="A setting that were otherwise; repeatable.")
@cache_option
@json_option
def plan_command(run: str, number: int | None, changes: tuple[str, ...], cache: Path | None, as_json: bool) -> None:
    """What a round's plan would be with other settings, and what the calls not yet made would cost.

    From the run's files and the store alone: nothing is asked, written or changed.
    """
    from dataclasses import asdict

    from tapir_local.report.what_if import plan_with_changes, what_if_tables

    found = plan_with_changes(select_run(cache, run), number, changes)
    if as_json:
        print_json(asdict(found))
    else:
        print_table(*what_if_tables(found))


@click.command(
    epilog=help_examples(
        "tapir-local compare tapir uniform", "tapir-local compare uniform tapir lion --at tokens --by-task"
    )
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
@click.option("--round", "number", type=click.IntRange(min=0), help="Compare this round of each, not each one's last.")
@click.option(
    "--at",
    type=click.Choice(["rows", "tokens", "calls"]),
    help="Compare at equal cost: of each run the last round within what the cheapest spent in all, in training rows, "
    "training tokens, or calls of the teacher and the judge.",
)
@click.option("--by-task", is_flag=True, help="Compare each task's rows too.")
@cache_option
@json_option
def compare_command(
    runs: tuple[str, ...], number: int | None, at: "At | None", by_task: bool, cache: Path | None, as_json: bool
) -> None:
    """Runs side by side on one holdout, each held to the first-named: rates, cost, and what may be chance.

    All must have the same holdout, the same teacher's answers to it, and the same judge.
    """
    from tapir_local.report.compare import compare_runs as side_by_side
    from tapir_local.report.compare_tables import comparison_tables

    found = side_by_side([select_run(cache, run) for run in runs], number=number, at=at, by_task=by_task)
    if as_json:
        print_json(found)
    else:
        print_table(*comparison_tables(found))
