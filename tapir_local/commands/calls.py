"""`tapir-local calls …`: count, list, search, compare and check the calls in the store."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tapir_local.commands.calls_transfer import export_calls_command, import_calls_command, keys_in_lockfile
from tapir_local.printable import format_count
from tapir_local.terminal.options import cache_option, help_examples, json_option, store_path
from tapir_local.terminal.output import echo, line_progress, print_json, print_rows, print_table

if TYPE_CHECKING:
    from tapir_local.report.costs import CostGrouping


@click.group(
    name="calls",
    epilog=help_examples("tapir-local calls stats", "tapir-local calls list --run quickstart --stage judge"),
)
def calls_group() -> None:
    """List, search, check, export and import the stored calls."""


calls_group.add_command(export_calls_command)
calls_group.add_command(import_calls_command)


@calls_group.command(name="stats", epilog=help_examples("tapir-local calls stats --run quickstart"))
@click.option("--run", help="Count only the calls of this run.")
@cache_option
@json_option
def stats_command(run: str | None, cache: Path | None, as_json: bool) -> None:
    """Count calls and tokens by run, round and stage.

    Shows how many calls were used, how many of them were paid for, and the tokens of the paid ones. Prints the size
    of the store to stderr.
    """
    from tapir_local.store.queries import count_uses, measure_store, refuse_unknown

    refuse_unknown(store_path(cache), run=run)
    names = ["run", "round", "stage", "used", "paid", "tokens_in", "tokens_out"]
    print_rows("calls", names, count_uses(store_path(cache), run), as_json)
    count, size_in_bytes = measure_store(store_path(cache))
    each = f", {size_in_bytes / count:,.0f} bytes per call" if count else ""
    echo(f"{format_count(count, 'call')} stored, {size_in_bytes / 1e6:,.1f} MB{each}", err=True)


@calls_group.command(
    name="cost",
    epilog=help_examples("tapir-local calls cost --run quickstart", "tapir-local calls cost --by run --json"),
)
@click.option("--run", help="Count only the calls of this run.")
@click.option("--round", "number", type=click.IntRange(min=0), help="Count only the calls of this round.")
@click.option(
    "--by",
    type=click.Choice(["run", "round", "stage", "task"]),
    default="stage",
    show_default=True,
    help="Print one row for each of these.",
)
@cache_option
@json_option
def cost_command(run: str | None, number: int | None, by: "CostGrouping", cache: Path | None, as_json: bool) -> None:
    """Show what was paid and what the store saved."""
    from tapir_local.report.costs import cost_table, summarize_costs
    from tapir_local.store.queries import refuse_unknown

    refuse_unknown(store_path(cache), run=run, number=number)
    rows = summarize_costs(store_path(cache), by, run, number)
    if as_json:
        print_json(rows)
    else:
        print_table(cost_table("calls" + (f" of run {run}" if run else ""), rows, by))


@calls_group.command(name="list", epilog=help_examples("tapir-local calls list --stage refine --limit 5"))
@click.option("--run", help="List only the calls of this run.")
@click.option("--stage", help="List only the calls of this stage.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Maximum number of calls.")
@cache_option
@json_option
def list_command(run: str | None, stage: str | None, limit: int, cache: Path | None, as_json: bool) -> None:
    """List the newest calls: key, where used, and answer."""
    from tapir_local.store.queries import list_uses, refuse_unknown

    refuse_unknown(store_path(cache), run=run, stage=stage)
    rows = list_uses(store_path(cache), run, stage, limit)
    if not as_json:
        rows = [{**row, "key": row["key"][:12], "answer": row["answer"][:200]} for row in rows]
    print_rows("calls", ["key", "run", "round", "stage", "row", "paid", "answer"], rows, as_json)


@calls_group.command(
    name="search",
    epilog=help_examples("tapir-local calls search apples", "tapir-local calls search 'how many' --stage judge"),
)
@click.argument("words", nargs=-1, required=True)
@click.option("--run", help="Search only the calls that this run used.")
@click.option("--stage", help="Search only the calls that this stage used.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Maximum number of calls.")
@cache_option
@json_option
def search_command(
    words: tuple[str, ...], run: str | None, stage: str | None, limit: int, cache: Path | None, as_json: bool
) -> None:
    """Find calls with all the WORDS in prompt and answer.

    Prints the best matches first. Quoted words must occur together, in this order. Upper and lower case, accents and
    punctuation are ignored. Put `--` before a word that begins with a dash.
    """
    from tapir_local.store.queries import refuse_unknown
    from tapir_local.store.search import search_calls

    refuse_unknown(store_path(cache), run=run, stage=stage)
    progress = line_progress("calls indexed")
    rows = search_calls(store_path(cache), words, run=run, stage=stage, limit=limit + 1, progress=progress)
    if not rows:
        echo("no call has all of these words", err=True)
    if len(rows) > limit:
        echo(f"there are more matches than the {limit:,} shown; use --limit to see more", err=True)
    rows = rows[:limit]
    if not as_json:
        rows = [{**row, "key": row["key"][:12]} for row in rows]
    print_rows("calls", ["key", "run", "round", "stage", "row", "prompt", "answer"], rows, as_json)


@calls_group.command(name="show", epilog=help_examples("tapir-local calls show 3f9a"))
@click.argument("key")
@cache_option
def show_call_command(key: str, cache: Path | None) -> None:
    """Print one call as JSON. KEY is the beginning of its key."""
    from tapir_local.store.queries import get_call

    print_json(get_call(store_path(cache), key))


@calls_group.command(
    name="explain", epilog=help_examples("tapir-local calls explain 3f9a 77b0", "tapir-local calls explain 3f9a")
)
@click.argument("a")
@click.argument("b", required=False)
@cache_option
@json_option
def explain_command(a: str, b: str | None, cache: Path | None, as_json: bool) -> None:
    """Show how the requests of the calls A and B differ.

    A and B are the beginnings of keys. Without B, A is compared with the most similar stored request. In the output
    `here` means A and `there` means B.
    """
    from tapir_local.store.queries import compare_calls

    found = compare_calls(store_path(cache), a, b)
    if as_json:
        print_json({name: item for name, item in found.items() if name != "sentences"})
        return
    echo(f"A {found['a']}\nB {found['b']}")
    first, *others = found["sentences"] or ["both are one and the same request"]
    echo(first)
    for sentence in others:
        echo(f"also {sentence}")


@calls_group.command(
    name="verify", epilog=help_examples("tapir-local calls verify", "tapir-local calls verify --run quickstart")
)
@click.option("--run", help="Check also that no call is missing that this run used or that its tapir.lock names.")
@cache_option
def verify_command(run: str | None, cache: Path | None) -> None:
    """Check every stored call against its key.

    Prints the keys of damaged and missing calls, and exits with 1 if there are any.
    """
    from tapir_local.store.queries import find_missing_keys, refuse_unknown, verify_calls

    refuse_unknown(store_path(cache), run=run)
    count, damaged = verify_calls(store_path(cache))
    missing = find_missing_keys(store_path(cache), find_used_keys(cache, run)) if run else []
    for key in [*damaged, *missing]:
        echo(key)
    of_run = f", {len(missing):,} of run {run} missing" if run else ""
    echo(f"{format_count(count, 'call')} read, {len(damaged):,} damaged{of_run}", err=True)
    if damaged or missing:
        sys.exit(1)


def find_used_keys(cache: Path | None, run: str) -> list[str]:
    """The keys that a run used, by the store or by its tapir.lock; TapirError if it used none."""
    from tapir_local.store.queries import open_store
    from tapir_local.store.transfer import keys_used_by_run

    in_lock = [bytes.fromhex(key) for key in keys_in_lockfile(cache, run)]
    with open_store(store_path(cache)) as store:
        return sorted(key.hex() for key in keys_used_by_run(store, store_path(cache), run, in_lock))
