"""A run as lines with the time of day: what each stage did, and its progress now and then; also for run.log."""

import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from tapir_local.files import private_file
from tapir_local.pipeline.loop import Step
from tapir_local.printable import printable
from tapir_local.tables import format_seconds, join_styled, plain_text
from tapir_local.terminal.run_state import WARNING_MARK, Finished, RunState

FIRST_INTERVAL = 30.0  # seconds of a stage until its first line of progress
LOG_INTERVAL = 300.0  # seconds between two further ones
LINE_WIDTH = 78  # of a line where there is no terminal: what fits 80 columns and a quotation mark
LEAST_WIDTH = 40
LONG_STAGE_SECONDS = 120.0  # a stage that is expected to take longer says so when it begins
INDENT = " " * 10  # of a continued line: the width of `22:31:07  `


class RunLines:
    """Prints the lines of a run to `console`, if there is one, and appends them with their dates to a log file."""

    def __init__(self, state: RunState, console: Console | None, log: Path) -> None:
        self.state, self.console, self.log = state, console, log
        self.logged: float | None = None  # when the running step last logged its progress

    def begins(self, step: Step) -> None:
        """Say of a step that takes long that it begins."""
        self.logged, expected = None, self.state.expected
        if expected is not None and expected > LONG_STAGE_SECONDS:
            self.write(f"{place_of(step)}  start, takes about {format_seconds(expected)}")

    def progress(self) -> None:
        """Write a line of progress after the first 30 seconds of a step, and then every five minutes."""
        state, now = self.state, self.state.now()
        waited = now - (state.began if self.logged is None else self.logged)
        if state.step and state.total and waited > (FIRST_INTERVAL if self.logged is None else LOG_INTERVAL):
            self.logged = now
            self.write(f"{place_of(state.step)}  {progress_phrase(state)}")

    def ends(self, found: Finished) -> None:
        """Write what a step did: its result, calls and time in a line, further remarks in lines of their own."""
        said = f"{place_of(found.step)}  {closing_phrase(found)}  {format_duration(found.seconds)}"
        self.write(said)
        for remark in found.remarks:
            self.write(f"  {remark}", style="yellow" if remark.startswith(WARNING_MARK) else "dim")

    def write(self, text: str, style: str = "") -> None:
        """Write a line to the console and to the log."""
        self.append(text)
        if self.console:
            stamp = time.strftime("%H:%M:%S", time.localtime(self.state.now()))
            first, *rest = wrap_line(text, line_width(self.console))
            self.console.print(join_styled((stamp, "dim"), "  ", (first, style)), soft_wrap=True)
            for line in rest:
                self.console.print(plain_text(line, style), soft_wrap=True)

    def append(self, text: str) -> None:
        """Append a line to the log. A log that cannot be written stops nothing: the outputs of the stages matter."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.state.now()))
        with suppress(OSError):
            private_file(self.log)
            with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{stamp}  {' '.join(printable(text).splitlines())}\n")


def line_width(console: Console) -> int:
    """The width of lines: that of the terminal, or 78."""
    return max(LEAST_WIDTH, console.width if console.is_terminal else LINE_WIDTH)


def wrap_line(text: str, width: int) -> Sequence[str]:
    """The text in lines of `width` at most, with the time of day before the first; words are kept whole."""
    indent = INDENT + "  "
    lines = textwrap.wrap(
        printable(text),
        width,
        initial_indent=INDENT,
        subsequent_indent=indent,
        drop_whitespace=True,
        replace_whitespace=True,
        break_long_words=False,
        break_on_hyphens=False,
    )
    first, *rest = lines or [INDENT]
    return [first.removeprefix(INDENT), *rest]


def place_of(step: Step) -> str:
    """`round 1  judge`, `prepare  label`."""
    return f"{group_name(step)}  {step.stage.name}"


def group_name(step: Step) -> str:
    """`round 1`, `prepare`, `end`."""
    return step.name.partition("/")[0] if step.number is None else f"round {step.number}"


def closing_phrase(found: Finished) -> str:
    """`4,000 rows judged; 8,000 asked, 120 from the store, 1.12; 429: 12`."""
    return "; ".join(filter(None, [found.said, calls_phrase(found), found.trouble]))


def calls_phrase(found: Finished) -> str:
    """`8,000 asked, 120 from the store, 1.12`; "" without calls. The last number is money."""
    parts = [f"{found.asked:,} asked"] if found.asked else []
    parts += [f"{found.hits:,} from the store"] if found.hits else []
    parts += [format_money(found.money)] if found.money >= 0.00005 else []
    return ", ".join(parts)


def progress_phrase(state: RunState) -> str:
    """`93/188  1.5/s  24:10 left  loss 1.21 -> 0.84`."""
    rate, left = state.rate(), state.stage_seconds_left()
    parts = [f"{state.done:,}/{state.total:,}", format_speed(rate)]
    parts += [f"{format_seconds(left)} left" if left is not None else "", state.said, state.trouble()]
    return "  ".join(filter(None, parts))


def format_speed(rate: float | None) -> str:
    """`1.5/s`, `0.4/min`; "" while it is unknown."""
    if rate is None:
        return ""
    if rate < 0.1:
        return f"{rate * 60:,.1f}/min"
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:,.1f}/s"


def format_duration(seconds: float) -> str:
    """`2.8 s`, `12:31`, `1:02:00`."""
    return f"{seconds:.1f} s" if seconds < 60 else format_seconds(seconds)


def format_money(amount: float) -> str:
    """`1.12`, `0.0081`."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.4f}"
