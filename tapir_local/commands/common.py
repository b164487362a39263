"""What the commands share: their common options, and printing data for programs and tables for people."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tapir_local.errors import TapirError
from tapir_local.printable import printable, safe_json

if TYPE_CHECKING:
    from tapir_local.run_dir import RunDir

SIGN_OF_LIFE = 2.0  # seconds between two lines


def refuse_other_systems(system: str) -> None:
    """TapirError on a system (`sys.platform`) that is not Linux: the store's locks are its own."""
    if system != "linux":
        fix = "Use a machine with Linux; on Windows, WSL 2 is one."
        raise TapirError(f"tapir-local runs on Linux only, and this is {system}", fix=fix)


def example(*commands: str) -> str:
    """The last lines of a help text."""
    return "\b\nExample:\n" + "\n".join(f"  {command}" for command in commands)


class HomePath(click.Path):
    """A path whose `~` is expanded: shells leave the one in `--cache=~/x` as it is."""

    def __init__(self, *, file_okay: bool = True) -> None:
        super().__init__(path_type=Path, file_okay=file_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from tapir_local.files import expand_home

        return super().convert((expand_home(value) or "") if isinstance(value, str) else value, param, ctx)


cache_option = click.option(
    "--cache",
    type=HomePath(file_okay=False),
    help="Folder of the store and the runs.  [default: cache]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print a text for people, made safe for a terminal."""
    click.echo(printable(text), err=err, nl=nl)


def store_path(cache: Path | None) -> Path:
    """The store of a cache."""
    from tapir_local.resources import default_cache

    return (cache or default_cache()) / "teacher.db"


def chosen_run(cache: Path | None, name: str | None) -> "RunDir":
    """A run by name; without one the run that was worked on last."""
    from tapir_local.resources import default_cache
    from tapir_local.run_dir import find_run, list_runs

    place = cache or default_cache()
    if name is not None:
        return find_run(place, name)
    runs = list_runs(place)
    if not runs:
        raise TapirError(
            "there is no run yet", where=str(place), fix="tapir-local distill makes one; --cache names another folder."
        )
    return max(runs, key=lambda run: (run.path / "run.json").stat().st_mtime)


def cache_words(cache: Path | None) -> str:
    """What a follow-up command needs to find the same cache."""
    return f" --cache {cache}" if cache else ""


def slowly(what: str) -> Callable[[int, int], None]:
    """A progress (done, all) that says on stderr how far it is now and then, and nothing of what is done at once."""
    said = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > SIGN_OF_LIFE:
            said = time.monotonic()
            echo(f"  {what}: {done:,} of {total:,}", err=True)

    return show


@contextmanager
def shown(what: str, before: int = 0) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """A progress (done, all) and a way to tell something, both on stderr; `before` were done before it began.

    On a terminal a bar with rate and time left, elsewhere a line with them now and then.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tapir_local.report.terminal import Rate
    from tapir_local.tables import plain_text

    console = Console(stderr=True)
    columns = (TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar, started, said = bars.add_task(what, total=None), time.monotonic(), time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal said
            bars.update(bar, completed=done, total=total)
            now = time.monotonic()
            if not console.is_terminal and now - said > SIGN_OF_LIFE:
                said, rate = now, (done - before) / (now - started)
                echo(f"  {what}: {done:,} of {total:,}, {rate:,.1f}/s, {left(total - done, rate)} left", err=True)

        yield show, lambda words: console.print(plain_text(words), soft_wrap=True)


def left(items: int, rate: float) -> str:
    """The time that items take at a rate, in hours, minutes and seconds."""
    return "?" if rate <= 0 else str(timedelta(seconds=round(items / rate)))


def print_json(value: Any) -> None:
    """Data for programs."""
    click.echo(safe_json(json.dumps(value, indent=2, ensure_ascii=False)))


def print_table(*tables: Any) -> None:
    """Tables for people, as wide as the terminal or, in a pipe, as wide as they are."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables:
        console.print(table)


def print_rows(title: str, names: list[str], rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows as JSON, or as a table of these columns."""
    from tapir_local.report.terminal import plain_table

    if as_json:
        print_json(rows)
    else:
        print_table(plain_table(title, names, [[str(row[name]) for name in names] for row in rows]))
