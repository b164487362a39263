"""Commands on the files of runs: `runs`, `status`, `show`, `why`, `plan`, `compare` and `redo`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tapir_local.terminal.options import (
    cache_argument,
    cache_option,
    help_examples,
    json_option,
    program_name,
    select_run,
)
from tapir_local.terminal.output import echo, print_json, print_table

if TYPE_CHECKING:
    from tapir_local.report.compare import CostUnit


@click.command(name="runs", epilog=help_examples("tapir-local runs", "tapir-local runs --json"))
@cache_option
@json_option
def runs_command(cache: Path | None, as_json: bool) -> None:
    """List the runs, the newest first.

    Shows the state, the evaluated rounds, the best round, and the size of each run.
    """
    from tapir_local.report.status import list_run_states
    from tapir_local.report.status_tables import runs_table
    from tapir_local.resources import default_cache

    place = cache or default_cache()
    rows = list_run_states(place)
    if as_json:
        print_json(rows)
    elif rows:
        print_table(runs_table(rows, str(place)))
    else:
        echo(f"There is no run in {place} yet. `tapir-local distill` starts one; --cache selects another folder.")


@click.command(name="status", epilog=help_examples("tapir-local status", "tapir-local status quickstart --json"))
@click.argument("run", required=False)
@cache_option
@json_option
def status_command(run: str | None, cache: Path | None, as_json: bool) -> None:
    """Show the stages of RUN that are done, and its metrics.

    Without RUN, show the run that was worked on last.
    """
    from tapir_local.report.status import run_status
    from tapir_local.report.status_tables import rounds_table, stages_table

    found = run_status(select_run(cache, run))
    if as_json:
        print_json(found)
    else:
        print_table(stages_table(found), rounds_table(found))


@click.command(
    name="show",
    epilog=help_examples(
        "tapir-local show quickstart",
        "tapir-local show quickstart --round 2 --json",
        "tapir-local show quickstart --wrong --task Math --limit 20",
        "tapir-local show quickstart --labels",
        "tapir-local show quickstart --unusable",
    ),
)
@click.argument("run", required=False)
@click.option("--round", "number", type=click.IntRange(min=0), help="Round to show; by default the last evaluated one.")
@click.option(
    "--labels", is_flag=True, help="Show who labeled the rows of each task, and what the classifier confuses, instead."
)
@click.option("--unusable", is_flag=True, help="Show the rows that were left out, with step and reason, instead.")
@click.option(
    "--wrong", is_flag=True, help="Show wrong answers only; without a checker, those judged below the teacher's."
)
@click.option("--task", help="Show answers to this task only.")
@click.option("--limit", type=click.IntRange(min=1), default=6, show_default=True, help="Maximum number of answers.")
@cache_option
@json_option
def show_command(
    run: str | None,
    number: int | None,
    labels: bool,
    unusable: bool,
    wrong: bool,
    task: str | None,
    limit: int,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Show a round of RUN: plan, metrics by task with their change from the round before, some answers."""
    from tapir_local.report.labels import label_report, label_tables
    from tapir_local.report.status import AnswerChoice, round_report, unusable_report
    from tapir_local.report.status_tables import round_tables, unusable_tables

    if labels and unusable:
        raise click.UsageError("give --labels or --unusable, not both")
    if (labels or unusable) and number is not None:
        option = "labels" if labels else "unusable"
        raise click.UsageError(f"--{option} shows the whole run, not one round; leave out --round")
    if (labels or unusable) and (wrong or task):
        raise click.UsageError("--wrong and --task select answers; leave out --labels and --unusable")
    place, choice = select_run(cache, run), AnswerChoice(task, wrong, limit)
    reports = {"labels": label_report, "unusable": unusable_report}
    shown = "labels" if labels else "unusable" if unusable else ""
    found = reports[shown](place) if shown else round_report(place, number, choice)
    tables = label_tables if labels else unusable_tables if unusable else round_tables
    if as_json:
        print_json(found)
    else:
        print_table(*(tables(found)[-1:] if wrong or task else tables(found)))


@click.command(
    name="why",
    epilog=help_examples("tapir-local why quickstart seed-00017", 'tapir-local why quickstart "Sam buys 8 stones"'),
)
@click.argument("run")
@click.argument("row")
@cache_option
@json_option
def why_command(run: str, row: str, cache: Path | None, as_json: bool) -> None:
    """Explain why ROW of RUN was chosen or not.

    Shows its scores in every round, the rows that were written from it, and what it cost. ROW is the id of a row, or
    words that occur in the instruction of this row only.
    """
    from tapir_local.report.why import explain_row, why_tables

    found = explain_row(select_run(cache, run), row)
    if as_json:
        print_json(found)
    else:
        print_table(*why_tables(found))


@click.command(
    name="plan",
    epilog=help_examples(
        "tapir-local plan quickstart --round 1 --set curriculum.mfd_threshold=1.5 --set tasks.Math=0.3",
        "tapir-local plan quickstart --round 2 --set curriculum.rows=2000 --json",
    ),
)
@click.argument("run")
@click.option("--round", "number", type=click.IntRange(min=1), help="Round to plan; by default the last judged one.")
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a setting for this plan; repeatable."
)
@cache_option
@json_option
def plan_command(run: str, number: int | None, changes: tuple[str, ...], cache: Path | None, as_json: bool) -> None:
    """Show the plan of a round with other settings, and its cost.

    The cost counts only calls that are not in the store yet. The command reads the files of the run and the store; it
    asks nothing and changes nothing.
    """
    from dataclasses import asdict

    from tapir_local.report.what_if import plan_with_changes, what_if_tables

    found = plan_with_changes(select_run(cache, run), number, changes)
    if as_json:
        print_json(asdict(found))
    else:
        print_table(*what_if_tables(found))


@click.command(
    name="compare",
    epilog=help_examples(
        "tapir-local compare tapir uniform", "tapir-local compare uniform tapir lion --at tokens --by-task"
    ),
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
@click.option("--round", "number", type=click.IntRange(min=0), help="Round to compare; by default the one in model/.")
@click.option(
    "--at",
    type=click.Choice(["rows", "tokens", "calls"]),
    help="Compare at equal cost. Takes, of each run, the last round that cost no more than the cheapest run cost in "
    "all: in training rows, training tokens, or calls of the teacher and the judge.",
)
@click.option("--by-task", is_flag=True, help="Compare each task separately too.")
@cache_option
@json_option
def compare_command(
    runs: tuple[str, ...], number: int | None, at: "CostUnit | None", by_task: bool, cache: Path | None, as_json: bool
) -> None:
    """Compare runs with the first one on the same holdout.

    Shows rates with intervals, cost, and whether the differences may be chance. All runs must have the same holdout,
    the same answers of the teacher to it, and the same judge.
    """
    from tapir_local.report.compare import compare_runs
    from tapir_local.report.compare_tables import comparison_tables

    found = compare_runs([select_run(cache, run) for run in runs], number=number, at=at, by_task=by_task)
    if as_json:
        print_json(found)
    else:
        print_table(*comparison_tables(found))


@click.command(
    name="redo",
    epilog=help_examples(
        "tapir-local redo quickstart --round 2 --from plan", "tapir-local redo quickstart --from seeds"
    ),
)
@click.argument("run")
@click.option(
    "--round",
    "number",
    type=click.IntRange(min=0),
    help="Round of the stage; leave it out for a stage of the preparation and for `ship`, the last stage.",
)
@click.option("--from", "stage", required=True, help="First stage to delete; all stages after it are deleted too.")
@click.option("-y", "--yes", is_flag=True, help="Delete without asking; without a terminal nothing is asked.")
@cache_option
def redo_stages_command(run: str, number: int | None, stage: str, yes: bool, cache: Path | None) -> None:
    """Delete a stage of RUN and all later ones, to run them again.

    On a terminal, shows what will be deleted and asks first. `distill RUN` then makes the outputs again. Paid calls
    stay in the store.
    """
    from tapir_local.pipeline.loop import redo, steps_to_redo
    from tapir_local.printable import format_count

    place = select_run(cache, run)
    steps = steps_to_redo(place, number, stage)
    if steps and not yes and sys.stdin.isatty() and sys.stderr.isatty():
        taken = place.record().get("stages", {})
        for step in steps:
            echo(f"  {step.name}  {taken.get(step.name, {}).get('seconds', 0):,.0f} s", err=True)
        seconds = sum(taken.get(step.name, {}).get("seconds", 0) for step in steps)
        what = f"Delete {format_count(len(steps), 'output')}, which took {seconds / 60:,.1f} minutes to make?"
        if not click.confirm(what, default=False, err=True):
            echo("nothing was deleted", err=True)
            sys.exit(1)
    deleted = redo(place, number, stage)
    echo("\n".join(deleted) if deleted else "there was nothing to delete")
    command = f"{program_name()} distill {place.name}{cache_argument(cache)}"
    echo(f"{format_count(len(deleted), 'output')} deleted. Make them again:  {command}", err=True)
