"""`tapir-local calls export` and `calls import`: move calls between stores, and add answers paid for elsewhere."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tapir_local.errors import TapirError
from tapir_local.printable import format_count
from tapir_local.terminal.options import cache_option, help_examples, store_path
from tapir_local.terminal.output import echo, line_progress

if TYPE_CHECKING:
    from tapir_local.store.key_like import KeyLike
    from tapir_local.store.store import Store

KEY_LIKE_SHOWN = 3  # of the texts that look like a secret


@click.command(name="export", epilog=help_examples("tapir-local calls export --run quickstart quickstart.db"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--run", help="Export only the calls of this run; by default all.")
@cache_option
def export_calls_command(file: Path, run: str | None, cache: Path | None) -> None:
    """Copy calls to a new store, FILE, which must not exist.

    On another machine, use FILE as `teacher.db` of a cache for `distill --replay`, or add its calls to a store with
    `calls import`. FILE holds your prompts and the answers: text in them that looks like a key is warned of.
    """
    from tapir_local.files import check_output
    from tapir_local.store.key_like import key_like_calls
    from tapir_local.store.transfer import export_store

    store = store_path(cache)
    check_output(
        file, [store.with_name(store.name + end) for end in ("", "-wal", "-shm")], beside=(".partial",), force=True
    )
    used = [bytes.fromhex(key) for key in keys_in_lockfile(cache, run)] if run else []
    done = export_store(store, file, run, used)
    echo(f"{file}: {format_count(done.calls, 'call')} exported, {done.size:,} bytes", err=True)
    if found := key_like_calls(file):
        echo(describe_key_like(found), err=True)
    if done.lost:
        echo(f"{format_count(done.lost, 'call')} could not be read, and left out", err=True)
        sys.exit(1)


def describe_key_like(found: "Sequence[KeyLike]") -> str:
    """A warning that names the calls with text that looks like a secret, and shows no more of it than its start."""
    calls = list(dict.fromkeys(one.call for one in found))
    kinds = ", ".join(f"{kind}: {count:,}" for kind, count in Counter(one.kind for one in found).most_common())
    first = ", ".join(f"{one.call[:12]} ({one.kind} {one.start})" for one in found[:KEY_LIKE_SHOWN])
    return (
        f"warning: {len(calls):,} of these calls hold text that looks like a secret ({kinds}). Read them before you "
        f"give the file away: {first}{' …' if len(found) > KEY_LIKE_SHOWN else ''}"
    )


def keys_in_lockfile(cache: Path | None, run: str) -> list[str]:
    """The keys in the tapir.lock of a run; [] if there is none, as for a run that was imported."""
    from tapir_local.run_dir import run_of_name
    from tapir_local.stages.context import read_lock, unique_call_keys

    folder = run_of_name(store_path(cache).parent, run)
    return unique_call_keys(read_lock(folder)) if folder else []


@click.command(
    name="import",
    epilog=help_examples(
        "tapir-local calls import other/teacher.db",
        "tapir-local calls import alpaca_data.json --recipe my.yaml",
        "tapir-local calls import batch_output.jsonl --requests batch_input.jsonl --recipe my.yaml",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--recipe", help="Recipe whose teacher gave the answers in FILE.")
@click.option("--requests", type=click.Path(path_type=Path), help="Input file of the OpenAI batch that FILE answers.")
@cache_option
def import_calls_command(file: Path, recipe: str | None, requests: Path | None, cache: Path | None) -> None:
    """Add the calls of another store, or other paid answers.

    Calls that are stored already are not replaced. If FILE is a store, each of its calls is checked first. A call
    whose key does not match its request is refused, and the command exits with 1.

    Any other FILE holds instructions and answers, as JSON, JSON lines, CSV, TSV or Parquet: Alpaca, ShareGPT or
    messages, AlpacaEval's model outputs, or the output of OpenAI's Batch API. They are stored as the answers of the
    recipe's teacher to seeds, so that `distill` with this recipe does not ask for them again. Rows without an
    instruction, and rows without a complete answer, are left out.
    """
    from tapir_local.store.transfer import is_sqlite_file

    if not is_sqlite_file(file):
        import_paid_answers(file, recipe, requests, cache)
    elif recipe or requests:
        fix = "Leave out --recipe and --requests."
        raise TapirError("FILE is a store, and its calls have their keys already", where=str(file), fix=fix)
    else:
        import_store_calls(file, cache)


def import_store_calls(file: Path, cache: Path | None) -> None:
    """Add the calls of another store."""
    from tapir_local.store.transfer import import_store

    with open_writable_store(cache) as store:
        found = import_store(store, file, line_progress("calls read"))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.refused.items())
    refused = f", {found.refused.total():,} refused: {reasons}" if reasons else ""
    echo(f"{format_count(found.new, 'call')} imported, {found.known:,} already there{refused}", err=True)
    if reasons:
        sys.exit(1)


def import_paid_answers(file: Path, recipe_name: str | None, requests: Path | None, cache: Path | None) -> None:
    """Add answers that were paid for elsewhere, as answers of the recipe's teacher."""
    from tapir_local.recipe.text import parse_recipe
    from tapir_local.resources import find_recipe, read_recipe_text
    from tapir_local.teacher.external import format_refused_rows, import_answers, read_answers

    if not recipe_name:
        fix = "Name a recipe with that teacher: --recipe RECIPE"
        what = "this is not a store, and it does not say which teacher gave the answers"
        raise TapirError(what, where=str(file), fix=fix)
    place = find_recipe(recipe_name)
    teacher = parse_recipe(read_recipe_text(place), str(place)).teacher
    rows, found = read_answers(file, teacher, requests)
    with open_writable_store(cache) as store:
        import_answers(store, teacher, rows, file, found, line_progress("answers imported"))
    refused = f", refused: {format_refused_rows(found)}" if found.refused else ""
    echo(f"{format_count(found.new, 'answer')} imported, {found.known:,} already there{refused}", err=True)
    if found.different:
        first = f"the first difference: {found.difference} (`here` is the recipe)"
        echo(f"{found.different:,} were asked with settings other than the recipe's; {first}", err=True)


@contextmanager
def open_writable_store(cache: Path | None) -> Iterator["Store"]:
    """The store of the cache, open for writing; prints what the store reports when it opens."""
    from tapir_local.store.store import Store

    with Store(store_path(cache)) as store:
        for notice in store.notices:
            echo(notice, err=True)
        yield store
