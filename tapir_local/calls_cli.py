"""`tapir-local calls …`: the commands on the store."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tapir_local.console import cache_option, example, json_option, print_json, print_rows, print_table, store_path

if TYPE_CHECKING:
    from tapir_local.costs import By


@click.group(epilog=example("tapir-local calls stats", "tapir-local calls list --run quickstart --stage judge"))
def calls() -> None:
    """What was asked of teachers and judges, and paid for."""


@calls.command(epilog=example("tapir-local calls stats --run quickstart"))
@click.option("--run", help="Only this run.")
@cache_option
@json_option
def stats(run: str | None, cache: Path | None, as_json: bool) -> None:
    """Calls used and paid for, and tokens of the paid ones, by run, round and stage."""
    from tapir_local.calls import stats as count

    names = ["run", "round", "stage", "used", "paid", "tokens_in", "tokens_out"]
    print_rows("calls", names, count(store_path(cache), run), as_json)


@calls.command(epilog=example("tapir-local calls cost --run quickstart", "tapir-local calls cost --by run --json"))
@click.option("--run", help="Only this run.")
@click.option("--round", "number", type=click.IntRange(min=0), help="Only this round.")
@click.option("--by", type=click.Choice(["run", "round", "stage", "task"]), default="stage", show_default=True)
@cache_option
@json_option
def cost(run: str | None, number: int | None, by: "By", cache: Path | None, as_json: bool) -> None:
    """What was paid, and what the store saved, by run, round, stage or task."""
    from tapir_local.costs import costs
    from tapir_local.display import cost_table

    rows = costs(store_path(cache), by, run, number)
    if as_json:
        print_json(rows)
    else:
        print_table(cost_table("calls" + (f" of run {run}" if run else ""), rows, by))


@calls.command(name="list", epilog=example("tapir-local calls list --stage refine --limit 5"))
@click.option("--run", help="Only this run.")
@click.option("--stage", help="Only this stage.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="So many, the newest first.")
@cache_option
@json_option
def list_calls(run: str | None, stage: str | None, limit: int, cache: Path | None, as_json: bool) -> None:
    """The newest calls: key, where they were used, and what was answered."""
    from tapir_local.calls import listed

    rows = listed(store_path(cache), run, stage, limit)
    if not as_json:
        rows = [{**row, "key": row["key"][:12], "answer": row["answer"][:200]} for row in rows]
    print_rows("calls", ["key", "run", "round", "stage", "row", "paid", "answer"], rows, as_json)


@calls.command(name="show", epilog=example("tapir-local calls show 3f9a"))
@click.argument("key")
@cache_option
def show_call(key: str, cache: Path | None) -> None:
    """One call whole, as JSON: KEY is the beginning of its key."""
    from tapir_local.calls import shown

    print_json(shown(store_path(cache), key))


@calls.command(epilog=example("tapir-local calls verify"))
@cache_option
def verify(cache: Path | None) -> None:
    """Read every call and check its key against its request; exits with 1 where one is damaged."""
    from tapir_local.calls import verify as check

    count, bad = check(store_path(cache))
    for key in bad:
        click.echo(key)
    click.echo(f"{count:,} calls read, {len(bad):,} damaged", err=True)
    if bad:
        sys.exit(1)
