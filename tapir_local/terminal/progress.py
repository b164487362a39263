"""Show a run at work: as a full screen, as lines with or without a bar, or not at all; and keep its log."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tapir_local.errors import TapirError
from tapir_local.pipeline.loop import Step, Watch, name_cause
from tapir_local.printable import printable
from tapir_local.recipe.schema import Recipe
from tapir_local.run_dir import RunDir, remove_progress, write_progress
from tapir_local.stages.context import Backends
from tapir_local.stages.ship import describe_endpoint
from tapir_local.tables import hanging_lines, plain_text, rest_of_line
from tapir_local.terminal.lines import RunLines, format_duration, place_of
from tapir_local.terminal.live_view import LiveView
from tapir_local.terminal.run_state import RunState

DisplayKind = Literal["full", "lines", "log", "none"]
REFRESHES = 4  # of the screen in a second
SAVE_INTERVAL = 1.0  # seconds between two writes of the progress file, which `status` reads
LOG_FILE = "run.log"


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


def choose_display(kind: str | None, quiet: bool, console: Console) -> DisplayKind:
    """The display: as asked for; without a word, the full screen on a terminal, and lines in a pipe.

    A terminal that cannot move its cursor (TERM=dumb) gets lines without a bar. TapirError if what is asked for cannot
    be shown.
    """
    if quiet and kind not in (None, "none"):
        raise TapirError(f"--quiet and --display {kind} contradict each other", fix="Use one of them.")
    terminal, movable = console.file.isatty(), can_move_cursor(console)
    if quiet or kind == "none":
        return "none"
    if kind == "full" and not movable:
        raise TapirError("--display full needs a terminal", fix="Use --display lines, or leave it out.")
    chosen = kind or ("full" if terminal else "lines")
    if chosen == "log" or (terminal and not movable):
        return "log"
    return "full" if chosen == "full" else "lines"


def can_move_cursor(console: Console) -> bool:
    """Whether a bar can be drawn again in its place. FORCE_COLOR makes a terminal of a pipe for colors only."""
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


class RunDisplay:
    """Shows a run on `console` and appends what happens to run.log in its folder. `now` is the time since 1970."""

    def __init__(
        self, console: Console, kind: DisplayKind, recipe: Recipe, run: RunDir, now: Callable[[], float] = time.time
    ) -> None:
        self.console, self.kind, self.recipe, self.run, self.now = console, kind, recipe, run, now
        self.state = RunState(recipe, run, now)
        self.lines = RunLines(self.state, console if kind in ("lines", "log") else None, run.path / LOG_FILE)
        self.bars = make_bars(console, kind)
        self.bar: TaskID | None = None
        self.saved = 0.0
        self.waiting: list[str] | None = []  # what was said before the run was locked, for the log

    def watch(self) -> Watch:
        """The callables for the loop."""
        return Watch(self.begins, self.progress, self.ends)

    @contextmanager
    def showing(self, tools: Backends) -> Iterator[Watch]:
        """A Watch for the loop; on a terminal the screen, or the bar, is there within the block."""
        self.state.connect(tools.meter, tools.spent)
        try:
            with self.screen():
                yield self.watch()
        except BaseException as error:
            if self.waiting is None:
                where = f" in {self.state.step.name}" if self.state.step else ""
                self.lines.append(f"stopped{where}: {name_cause(error)}")
            raise
        finally:
            if self.waiting is None:
                remove_progress(self.run)
            if self.kind == "full":
                self.repeat_notes()

    def print_header(self, done: int) -> None:
        """Print what the run will do; the full screen has a header of its own."""
        if self.kind in ("lines", "log"):
            self.console.print(hanging_lines(run_header(self.recipe, self.run, done, len(self.state.steps))))

    def screen(self) -> Any:
        """What is drawn on the terminal within a block."""
        if self.kind == "full" and not all(step.done for step in self.state.steps):
            view = LiveView(self.state)
            return Live(view, console=self.console, screen=True, refresh_per_second=REFRESHES)
        return self.bars or nullcontext()

    def repeat_notes(self) -> None:
        """Print the warnings that were on the screen, which is gone, and where the log is."""
        for note in self.state.notes:
            self.console.print(plain_text(note, "yellow"))
        if self.waiting is None:
            self.console.print(plain_text(f"Every stage in lines: {self.run.path / LOG_FILE}", "dim"), soft_wrap=True)

    def begins(self, step: Step) -> None:
        """A step begins; the bar moves without a number until the step says how much there is to do."""
        self.state.begins(step)
        if self.waiting is not None:  # the run is locked now
            waiting, self.waiting = self.waiting, None
            done = sum(other.done for other in self.state.steps)
            self.lines.append(f"start of {self.run.name}: {done} of {len(self.state.steps)} stages done before")
            for text in waiting:
                self.lines.append(text)
        self.lines.begins(step)
        self.save()
        if self.bars:
            if self.bar is not None:
                self.bars.remove_task(self.bar)  # a reset would keep the total of the step before
            self.bar = self.bars.add_task(place_of(step), total=None, said="starting")

    def progress(self, done: int, total: int, said: str) -> None:
        """Show how far the step is."""
        self.state.progress(done, total, said)
        self.lines.progress()
        if self.now() - self.saved >= SAVE_INTERVAL:
            self.save()
        if self.bars and self.bar is not None:
            self.bars.update(self.bar, completed=done, total=total or None, said=printable(said))

    def ends(self, step: Step, taken: Mapping[str, Any]) -> None:
        """Show what a step did."""
        found = self.state.ends(step, taken)
        if self.bars and self.bar is not None:
            self.bars.update(self.bar, visible=False)
        self.lines.ends(found)
        if self.state.is_last(step):
            self.lines.append(f"done in {format_duration(self.now() - self.state.started)}")

    def say(self, text: str) -> None:
        """Show a remark of a stage, such as a warning."""
        self.state.note(text)
        if self.waiting is not None:
            self.waiting.append(printable(text))
            if self.kind in ("lines", "log"):
                self.console.print(plain_text(text), soft_wrap=not self.console.is_terminal)
        else:
            self.lines.write(text)

    def save(self) -> None:
        """Write the progress for `status`. Where it cannot be written, `status` says less."""
        self.saved = self.now()
        with suppress(OSError):
            write_progress(self.run, self.state.as_data())


def make_bars(console: Console, kind: DisplayKind) -> Progress | None:
    """The bar below the lines; None where there is none."""
    if kind != "lines" or not can_move_cursor(console):
        return None
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        CountColumn(),
        RateColumn(),
        TimeLeftColumn(),
        TextColumn("{task.fields[said]}", markup=False, table_column=rest_of_line()),
    )
    return Progress(*columns, console=console, transient=True, expand=True)


def run_header(recipe: Recipe, run: RunDir, done: int, total: int) -> list[tuple[str, str]]:
    """What a run will do, before its first step: (what, description) of student, teacher, judge, seeds and so on."""
    spent = {name: value for name, value in recipe.budget.model_dump().items() if value is not None}
    limits = ", ".join(f"{name} {value:,}" for name, value in spent.items())
    judge = "the teacher" if recipe.judge.kind == "teacher" else describe_endpoint(recipe.judge)
    later = f" to {recipe.rounds}, {recipe.curriculum.rows:,} rows each after round 0" if recipe.rounds else ""
    later += f"; then {recipe.pairs_round} on preference pairs" if recipe.pairs_round else ""
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
