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
from tapir_local.recipe.schema import Recipe
from tapir_local.run_dir import RunDir
from tapir_local.stages.ship import describe_endpoint
from tapir_local.tables import hanging_lines, join_styled, plain_text, rest_of_line

LOG_INTERVAL = 30.0  # seconds between two lines of progress where there is no terminal to show a bar


class RateColumn(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.{0 if speed >= 100 else 1}f}/s" if speed else "", style="cyan")


class CountColumn(MofNCompleteColumn):
    """`12/150`; nothing until the total is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text("")


class TimeLeftColumn(TimeRemainingColumn):
    """The time left; nothing until the total is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text("")


@contextmanager
def watch_run(console: Console, done: int, total: int) -> Iterator[Watch]:
    """A Watch that shows a bar for the running step and prints a line for each finished one.

    `done` of the `total` steps were finished before.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        CountColumn(),
        RateColumn(),
        TimeLeftColumn(),
        TextColumn("{task.fields[said]}", markup=False, table_column=rest_of_line()),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal, expand=True) as bars:
        yield ProgressDisplay(console, bars, done, total).watch()


class ProgressDisplay:
    """What is on the screen: finished steps, the bar of the running one, and when a line was last logged."""

    def __init__(self, console: Console, bars: Progress, done: int, total: int) -> None:
        self.console, self.bars, self.total, self.count = console, bars, total, done
        self.bar = bars.add_task("", visible=False, said="")
        self.step, self.logged, self.began = "", 0.0, 0.0

    def watch(self) -> Watch:
        """The callables for the loop."""
        return Watch(self.begins, self.progress, self.ends)

    def begins(self, step: Step) -> None:
        """Start the bar of a step. It moves without a number until the step says how much there is to do."""
        self.step, self.began = step.name, time.monotonic()
        self.logged = self.began
        self.bars.remove_task(self.bar)  # a reset would keep the total of the step before
        self.bar = self.bars.add_task(step.name, total=None, said="starting")

    def progress(self, done: int, total: int, said: str) -> None:
        """Move the bar. Without a terminal, print a line every 30 seconds."""
        self.bars.update(self.bar, completed=done, total=total or None, said=printable(said))
        now = time.monotonic()
        if not self.console.is_terminal and now - self.logged > LOG_INTERVAL:
            self.logged = now
            left = f", {format_seconds((total - done) * (now - self.began) / done)} left" if 0 < done < total else ""
            self.log(f"{self.step}: {done:,} of {total:,}{left}  {said}")

    def ends(self, step: Step, taken: Mapping[str, Any]) -> None:
        """Print the closing lines of a step: result, calls, seconds; further remarks each on a line of its own."""
        self.count += 1
        self.bars.update(self.bar, visible=False)
        place = f"{self.count:>{len(str(self.total))}}/{self.total}"
        first, *remarks = taken["note"].split("; ")
        said, seconds = f"  {first}{calls_phrase(taken)}", f"  {taken['seconds']:.1f} s"
        if not self.console.is_terminal:
            self.log(f"{place} {step.name}{said}{seconds}", *(f"      {remark}" for remark in remarks))
            return
        closing = join_styled((step.name, "bold"), said, (seconds, "dim"))
        more = [("", plain_text(text, "yellow" if text.startswith("WARNING") else "dim")) for text in remarks]
        self.console.print(hanging_lines([(plain_text(place, "dim"), closing), *more]))

    def log(self, *lines: str) -> None:
        """Print lines with the time of day, for a file."""
        clock = time.strftime("%H:%M:%S")
        for line in lines:
            self.console.print(plain_text(f"{clock}  {line}"), soft_wrap=True)


def format_seconds(seconds: float) -> str:
    """`1:30`, `2:05:00`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def run_header(recipe: Recipe, run: RunDir, done: int, total: int) -> list[tuple[str, str]]:
    """What a run will do, before its first step: (what, description) of student, teacher, judge, seeds and so on."""
    spent = {name: value for name, value in recipe.budget.model_dump().items() if value is not None}
    limits = ", ".join(f"{name} {value:,}" for name, value in spent.items())
    judge = "the teacher" if recipe.judge.kind == "teacher" else describe_endpoint(recipe.judge)
    later = f" to {recipe.rounds}, {recipe.curriculum.rows:,} rows each after round 0" if recipe.rounds else ""
    before = f", {done} of them done before" if done else ""
    return [
        ("run", f"{run.name} in {run.path}"),
        ("student", f"{recipe.student.path}, trained by {recipe.train.method}"),
        ("teacher", describe_endpoint(recipe.teacher)),
        ("judge", judge),
        ("seeds", f"{recipe.seeds.path}, {recipe.seeds.holdout:,} of them held out"),
        ("rounds", f"0 (plain fine-tuning){later}"),
        ("budget", limits or "no limit (budget.money, budget.tokens, budget.calls)"),
        ("stages", f"{total}{before}; Ctrl-C stops, the same command resumes"),
    ]


def calls_phrase(taken: Mapping[str, Any]) -> str:
    """`; 1,200 calls paid, 300 hits`; empty if there were no calls."""
    if not taken["paid"] + taken["hits"]:
        return ""
    return f"; {taken['paid']:,} calls paid, {taken['hits']:,} hits"
