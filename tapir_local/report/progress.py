"""Show the progress of a run on the terminal: a bar for the stage that is running, a line for each that is done."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from tapir_local.pipeline.loop import Step, Watch
from tapir_local.printable import printable
from tapir_local.tables import join_styled, plain_text

LOG_INTERVAL = 30.0  # seconds between two lines of progress where there is no terminal to show a bar


class RateColumn(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="cyan")


@contextmanager
def watch_run(console: Console, done: int, total: int) -> Iterator[Watch]:
    """A Watch that shows a bar for the running step and prints a line for each finished one.

    `done` of the `total` steps were finished before.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield ProgressDisplay(console, bars, done, total).watch()


class ProgressDisplay:
    """What is on the screen: finished steps, the bar of the running one, and when a line was last logged."""

    def __init__(self, console: Console, bars: Progress, done: int, total: int) -> None:
        self.console, self.bars, self.total, self.count = console, bars, total, done
        self.bar = bars.add_task("", visible=False, said="")
        self.step, self.logged = "", 0.0

    def watch(self) -> Watch:
        """The callables for the loop."""
        return Watch(self.begins, self.progress, self.ends)

    def begins(self, step: Step) -> None:
        """Start the bar of a step."""
        self.step, self.logged = step.name, time.monotonic()
        self.bars.reset(self.bar, total=None, description=step.name, visible=True, said="")

    def progress(self, done: int, total: int, said: str) -> None:
        """Move the bar. Without a terminal, print a line every 30 seconds."""
        self.bars.update(self.bar, completed=done, total=total or None, said=printable(said))
        if not self.console.is_terminal and time.monotonic() - self.logged > LOG_INTERVAL:
            self.logged = time.monotonic()
            self.console.print(plain_text(f"  {self.step}: {done:,} of {total:,} {said}"), soft_wrap=True)

    def ends(self, step: Step, taken: Mapping[str, Any]) -> None:
        """Print the closing line of a step: result, calls, seconds."""
        self.count += 1
        self.bars.update(self.bar, visible=False)
        place, seconds = f"{self.count:>{len(str(self.total))}}/{self.total}", f"  {taken['seconds']:.1f} s"
        said = f"  {taken['note']}{calls_phrase(taken)}"
        line = join_styled((place, "dim"), " ", (step.name, "bold"), said, (seconds, "dim"))
        self.console.print(line, soft_wrap=True)


def calls_phrase(taken: Mapping[str, Any]) -> str:
    """`; 1,200 calls paid, 300 hits`; empty if there were no calls."""
    if not taken["paid"] + taken["hits"]:
        return ""
    return f"; {taken['paid']:,} calls paid, {taken['hits']:,} hits"
