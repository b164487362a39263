"""`tapir-local calls …`: the commands on the store."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tapir_local.commands.common import (
    cache_option,
    echo,
    example,
    json_option,
    print_json,
    print_rows,
    print_table,
    slowly,
    store_path,
)
from tapir_local.errors import TapirError

if TYPE_CHECKING:
    from tapir_local.report.costs import By
    from tapir_local.store.store import Store


@click.group(epilog=example("tapir-local calls stats", "tapir-local calls list --run quickstart --stage judge"))
def calls() -> None:
    """What was asked of teachers and judges, and paid for."""


@calls.command(epilog=example("tapir-local calls stats --run quickstart"))
@click.option("--run", help="Only this run.")
@cache_option
@json_option
def stats(run: str | None, cache: Path | None, as_json: bool) -> None:
    """Calls used and paid for, and tokens of the paid ones, by run, round and stage; and what the store weighs."""
    from tapir_local.store.queries import refuse_unknown, size
    from tapir_local.store.queries import stats as count

    refuse_unknown(store_path(cache), run=run)
    names = ["run", "round", "stage", "used", "paid", "tokens_in", "tokens_out"]
    print_rows("calls", names, count(store_path(cache), run), as_json)
    stored, weight = size(store_path(cache))
    each = f", {weight / stored:,.0f} bytes a call" if stored else ""
    echo(f"{stored:,} calls stored, {weight / 1e6:,.1f} MB{each}", err=True)


@calls.command(epilog=example("tapir-local calls cost --run quickstart", "tapir-local calls cost --by run --json"))
@click.option("--run", help="Only this run.")
@click.option("--round", "number", type=click.IntRange(min=0), help="Only this round.")
@click.option("--by", type=click.Choice(["run", "round", "stage", "task"]), default="stage", show_default=True)
@cache_option
@json_option
def cost(run: str | None, number: int | None, by: "By", cache: Path | None, as_json: bool) -> None:
    """What was paid, and what the store saved, by run, round, stage or task."""
    from tapir_local.report.costs import costs
    from tapir_local.report.terminal import cost_table
    from tapir_local.store.queries import refuse_unknown

    refuse_unknown(store_path(cache), run=run, number=number)
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
    from tapir_local.store.queries import listed, refuse_unknown

    refuse_unknown(store_path(cache), run=run, stage=stage)
    rows = listed(store_path(cache), run, stage, limit)
    if not as_json:
        rows = [{**row, "key": row["key"][:12], "answer": row["answer"][:200]} for row in rows]
    print_rows("calls", ["key", "run", "round", "stage", "row", "paid", "answer"], rows, as_json)


@calls.command(epilog=example("tapir-local calls search apples", "tapir-local calls search 'how many' --stage judge"))
@click.argument("words", nargs=-1, required=True)
@click.option("--run", help="Only calls that this run used.")
@click.option("--stage", help="Only calls that this stage used.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="So many, the best first.")
@cache_option
@json_option
def search(
    words: tuple[str, ...], run: str | None, stage: str | None, limit: int, cache: Path | None, as_json: bool
) -> None:
    """The calls with all the WORDS in their prompt and answer.

    Words in one pair of quotes stand together in this order. Capitals, accents and signs do not count. A word that
    begins with a dash goes after `--`.
    """
    from tapir_local.store.queries import refuse_unknown
    from tapir_local.store.search import search as find

    refuse_unknown(store_path(cache), run=run, stage=stage)
    rows = find(store_path(cache), words, run=run, stage=stage, limit=limit + 1, progress=slowly("calls indexed"))
    if not rows:
        echo("no call has all of these words", err=True)
    if len(rows) > limit:
        echo(f"more than {limit:,} calls have these words; --limit shows more", err=True)
    rows = rows[:limit]
    if not as_json:
        rows = [{**row, "key": row["key"][:12]} for row in rows]
    print_rows("calls", ["key", "run", "round", "stage", "row", "prompt", "answer"], rows, as_json)


@calls.command(name="show", epilog=example("tapir-local calls show 3f9a"))
@click.argument("key")
@cache_option
def show_call(key: str, cache: Path | None) -> None:
    """One call whole, as JSON: KEY is the beginning of its key."""
    from tapir_local.store.queries import shown

    print_json(shown(store_path(cache), key))


@calls.command(epilog=example("tapir-local calls explain 3f9a 77b0", "tapir-local calls explain 3f9a"))
@click.argument("a")
@click.argument("b", required=False)
@cache_option
@json_option
def explain(a: str, b: str | None, cache: Path | None, as_json: bool) -> None:
    """Why A and B are two calls: the fields in which their requests differ, the first one first.

    A and B are the beginnings of keys; without B, A is compared with the stored request that reads most like it. In
    the sentences `here` is A and `there` is B.
    """
    from tapir_local.store.queries import explain as compare

    found = compare(store_path(cache), a, b)
    if as_json:
        print_json({name: item for name, item in found.items() if name != "told"})
        return
    echo(f"A {found['a']}\nB {found['b']}")
    first, *others = found["told"] or ["they are one and the same request"]
    echo(first)
    for sentence in others:
        echo(f"also {sentence}")


@calls.command(epilog=example("tapir-local calls verify", "tapir-local calls verify --run quickstart"))
@click.option("--run", help="Check too that every call that this run used, or that its tapir.lock names, is there.")
@cache_option
def verify(run: str | None, cache: Path | None) -> None:
    """Read every call and check its key against its request; exits with 1 where one is damaged or absent."""
    from tapir_local.store.queries import absent, refuse_unknown
    from tapir_local.store.queries import verify as check

    refuse_unknown(store_path(cache), run=run)
    count, bad = check(store_path(cache))
    gone = absent(store_path(cache), used_keys(cache, run)) if run else []
    for key in [*bad, *gone]:
        echo(key)
    missing = f", {len(gone):,} of run {run} absent" if run else ""
    echo(f"{count:,} calls read, {len(bad):,} damaged{missing}", err=True)
    if bad or gone:
        sys.exit(1)


def used_keys(cache: Path | None, run: str) -> list[str]:
    """The keys that a run used by the store's record or its tapir.lock; TapirError where it used none."""
    from tapir_local.store.queries import opened
    from tapir_local.store.transfer import keys_of

    locked = [bytes.fromhex(key) for key in locked_keys(cache, run)]
    with opened(store_path(cache)) as store:
        return sorted(key.hex() for key in keys_of(store, store_path(cache), run, locked))


def locked_keys(cache: Path | None, run: str) -> list[str]:
    """The keys in a run's tapir.lock, [] where there is none, as of what was imported."""
    from tapir_local.pipeline.lockfile import keys_of, locked
    from tapir_local.run_dir import run_of_name

    folder = run_of_name(store_path(cache).parent, run)
    return keys_of(locked(folder)) if folder else []


@calls.command(name="export", epilog=example("tapir-local calls export --run quickstart quickstart.db"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--run", help="Only this run's calls; all if left out.")
@cache_option
def export_calls(file: Path, run: str | None, cache: Path | None) -> None:
    """Write a run's calls to a store of their own, FILE, which must not be there yet.

    Elsewhere it is `teacher.db` of a cache, for `distill --replay`, or is taken in by `calls import`.
    """
    from tapir_local.files import check_output
    from tapir_local.store.transfer import export

    store = store_path(cache)
    check_output(
        file, [store.with_name(store.name + end) for end in ("", "-wal", "-shm")], beside=(".partial",), force=True
    )
    used = [bytes.fromhex(key) for key in locked_keys(cache, run)] if run else []
    done = export(store, file, run, used)
    echo(f"{file}: {done.calls:,} calls exported, {done.size:,} bytes", err=True)
    if done.lost:
        echo(f"{done.lost:,} calls could not be read and were left out", err=True)
        sys.exit(1)


@calls.command(
    name="import",
    epilog=example(
        "tapir-local calls import other/teacher.db",
        "tapir-local calls import alpaca_data.json --recipe my.yaml",
        "tapir-local calls import batch_output.jsonl --requests batch_input.jsonl --recipe my.yaml",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--recipe", help="Recipe whose teacher gave the answers of FILE.")
@click.option("--requests", type=click.Path(path_type=Path), help="Input of the OpenAI batch whose output FILE is.")
@cache_option
def import_calls(file: Path, recipe: str | None, requests: Path | None, cache: Path | None) -> None:
    """Take in the calls of another store, FILE, or answers paid for elsewhere. What is stored already stays.

    Of another store every call is checked first; one that is not what its key says is refused, and the command exits
    with 1. Answers from elsewhere become what the recipe's teacher answers to these instructions as seeds, so that
    `distill` with this recipe does not ask for them again. FILE is then Alpaca, ShareGPT or messages, AlpacaEval's
    model outputs, or the output of OpenAI's Batch API. Only whole rows are taken: an instruction and an answer that
    was not cut.
    """
    from tapir_local.store.transfer import is_database

    if not is_database(file):
        import_rows(file, recipe, requests, cache)
    elif recipe or requests:
        raise TapirError("FILE is a store, whose calls have their keys", where=str(file), fix="Leave the options out.")
    else:
        import_store_file(file, cache)


def import_store_file(file: Path, cache: Path | None) -> None:
    """Another store."""
    from tapir_local.store.transfer import import_store

    with written_store(cache) as store:
        found = import_store(store, file, slowly("calls read"))
    why = ", ".join(f"{count:,} {reason}" for reason, count in found.refused.items())
    refused = f", {found.refused.total():,} refused: {why}" if why else ""
    echo(f"{found.new:,} calls imported, {found.known:,} already there{refused}", err=True)
    if why:
        sys.exit(1)


def import_rows(file: Path, named: str | None, requests: Path | None, cache: Path | None) -> None:
    """Answers from elsewhere."""
    from tapir_local.recipe.text import parse_recipe
    from tapir_local.resources import find_recipe, read_recipe_text
    from tapir_local.teacher.external import read_answers, reasons, take

    if not named:
        fix = "Name a recipe with that teacher: --recipe RECIPE"
        raise TapirError("no store, and it does not say which teacher gave these answers", where=str(file), fix=fix)
    place = find_recipe(named)
    teacher = parse_recipe(read_recipe_text(place), str(place)).teacher
    rows, found = read_answers(file, teacher, requests)
    with written_store(cache) as store:
        take(store, teacher, rows, file, found, slowly("answers imported"))
    refused = f", refused: {reasons(found)}" if found.refused else ""
    echo(f"{found.new:,} answers imported, {found.known:,} already there{refused}", err=True)
    if found.otherwise:
        said = f"the first: {found.difference}, `here` being the recipe"
        echo(f"{found.otherwise:,} were asked with other settings than the recipe's; {said}", err=True)


@contextmanager
def written_store(cache: Path | None) -> Iterator["Store"]:
    """The cache's store, to be added to."""
    from tapir_local.store.store import Store

    with Store(store_path(cache)) as store:
        for notice in store.notices:
            echo(notice, err=True)
        yield store
