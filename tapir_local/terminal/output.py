"""Print what commands say: data and tables to stdout, messages and progress to stderr."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import click

from tapir_local.printable import printable, safe_json

PROGRESS_INTERVAL = 2.0  # seconds between two lines of progress


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print a text for people, made safe for a terminal."""
    click.echo(printable(text), err=err, nl=nl)


def line_progress(what: str) -> Callable[[int, int], None]:
    """A progress function (done, total) that prints a line to stderr every two seconds; none if the work is short."""
    printed = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed > PROGRESS_INTERVAL:
            printed = time.monotonic()
            echo(f"  {what}: {done:,} of {total:,}", err=True)

    return show


@contextmanager
def bar_progress(
    what: str, before: int = 0, *, hidden: bool = False
) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """A progress function (done, total) and a function that prints a message; both write to stderr.

    A terminal shows a bar with rate and time left; a pipe gets a line every two seconds. `before` is the number of
    items that were done before the start, which do not count for the rate. `hidden`: only the messages are shown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tapir_local.tables import plain_text
    from tapir_local.terminal.columns import RateColumn

    console = Console(stderr=True)
    columns = (TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as bars:
        bar, started, printed = bars.add_task(what, total=None), time.monotonic(), time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal printed
            bars.update(bar, completed=done, total=total)
            now = time.monotonic()
            if not hidden and not console.is_terminal and now - printed > PROGRESS_INTERVAL:
                printed, rate = now, (done - before) / (now - started)
                left = time_left(total - done, rate)
                echo(f"  {what}: {done:,} of {total:,}, {rate:,.1f}/s, {left} left", err=True)

        yield show, lambda message: console.print(plain_text(message), soft_wrap=True)


def time_left(items: int, rate: float) -> str:
    """The time that items take at a rate per second, as `0:01:30`; `?` if the rate is unknown."""
    return "?" if rate <= 0 else str(timedelta(seconds=round(items / rate)))


def print_json(value: Any) -> None:
    """Print data for programs."""
    click.echo(safe_json(json.dumps(value, indent=2, ensure_ascii=False)))


def print_json_line(value: Any) -> bool:
    """Print data in one line at once, for programs that read along; False if stdout cannot be written any more."""
    try:
        click.echo(safe_json(json.dumps(value, ensure_ascii=False)))
    except OSError:
        silence_output()
        return False
    return True


def silence_output() -> None:
    """Forget what could not be written to stdout: at exit Python would try again, and print a traceback."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_table(*tables: Any) -> None:
    """Print tables for people, with a line between them.

    They are as wide as the terminal; in a pipe as wide as COLUMNS says, or 140 columns.
    """
    from rich.console import Console

    in_terminal = sys.stdout and sys.stdout.isatty()
    console = Console(width=None if in_terminal or os.environ.get("COLUMNS") else 140)
    for number, table in enumerate(tables):
        if number:
            console.print()
        console.print(table)


def print_rows(title: str, names: list[str], rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows as JSON, or these columns of them as a table."""
    from tapir_local.report.tables import text_table

    if as_json:
        print_json(rows)
    else:
        cells = [[str(row[name]) for name in names] for row in rows]
        wrapped = {"prompt", "answer", "run"}
        whole, ranks = [name for name in names if name not in wrapped], {"paid": 3, "round": 2, "run": 1}
        print_table(text_table(title, names, cells, whole=whole, ranks=ranks))
