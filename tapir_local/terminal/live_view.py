"""The screen of a running distillation: header, results, stages, bar, money and requests, as much as fits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from tapir_local.method.metrics import is_rouge_only
from tapir_local.printable import format_count, printable
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Recipe
from tapir_local.report.tables import percent_cell, percent_interval_cell
from tapir_local.run_dir import UNTRAINED_ROUND
from tapir_local.stages.judge import judge_endpoint
from tapir_local.tables import format_clock, format_seconds, join_styled, plain_text
from tapir_local.terminal.lines import calls_phrase, format_duration, format_money, format_speed, wrap_line
from tapir_local.terminal.run_state import Finished, RunState

LABEL_WIDTH = 14  # of the results' first column
CELL_WIDTH = 12  # of a column of results
MIN_BAR, MAX_BAR = 8, 60
PULSE_WIDTH = 4  # of the moving part of a bar without a total
DETAILS_WIDTH = 72  # a narrower terminal shows no calls of finished stages
ENDPOINT_NAMES = {
    "pocket": "the pocket teacher (a program)",
    "recorded": "recorded answers",
    "reference": "similarity to the teacher's answers",
}


@dataclass(frozen=True)
class Marks:
    """The characters of the screen."""

    done: str = "✓"
    now: str = "▶"
    later: str = "·"
    full: str = "━"
    rest: str = "─"
    arrow: str = "→"


PLAIN_SIGNS = {ord("…"): "~", ord("·"): "|"}  # other characters become question marks
PLAIN_MARKS = Marks("v", ">", "-", "#", "-", "->")  # where the terminal does not use Unicode


@dataclass
class Block:
    """Lines of the screen in variants, the fullest first, each with its rank.

    Where the screen is too low, the block with the highest rank takes its next variant; rank 0 stays.
    """

    variants: list[tuple[int, list[Text]]]

    @property
    def rank(self) -> int:
        """How readily the block gets smaller."""
        return self.variants[0][0]

    @property
    def lines(self) -> list[Text]:
        """The lines of the current variant."""
        return self.variants[0][1]


class LiveView:
    """A renderable of a run's state, as wide and as high as the terminal."""

    def __init__(self, state: RunState) -> None:
        self.state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        marks = PLAIN_MARKS if options.ascii_only else Marks()
        width, height = options.max_width, options.height or console.height
        with self.state.lock:
            blocks = build_blocks(self.state, marks, width)
        for line in fit_height(blocks, height):
            line.truncate(width, overflow="ellipsis")
            if options.ascii_only:
                line.plain = line.plain.translate(PLAIN_SIGNS).encode("ascii", "replace").decode()
            line.no_wrap, line.end = True, "\n"
            yield line


def fit_height(blocks: Sequence[Block], height: int) -> list[Text]:
    """The lines of the blocks, made smaller by their ranks until they fit."""
    while sum(len(block.lines) for block in blocks) > height:
        largest = max(blocks, key=lambda block: block.rank)
        if not largest.rank:
            break
        largest.variants.pop(0)
    return [line for block in blocks for line in block.lines][:height]


def build_blocks(state: RunState, marks: Marks, width: int) -> list[Block]:
    """The blocks of the screen from top to bottom. Their ranks say what a low screen leaves out first."""
    rule = Block([(60, [plain_text(marks.rest * width, "dim")]), (0, [])])
    done = finished_lines(state, marks, width)
    results, results_line = results_table(state, width), results_in_a_line(state, marks)
    notes = [line for note in state.notes[-3:] for line in note_lines(note, width)]
    title = title_lines(state, width)
    return [
        Block([(40, title), (25, title[:2]), (0, title[:1])]),
        Block(list(rule.variants)) if results else Block([(0, [])]),
        Block([(35, results), (0, results_line)]),
        Block(list(rule.variants)),
        Block([(0, round_line(state, width))]),
        Block([(45, done), (38, done[-3:]), (20, done[-1:]), (0, [])]),
        Block([(0, bar_line(state, marks, width))]),
        Block([(10, said_line(state)), (0, [])]),
        Block([(15, later_line(state, marks)), (0, [])]),
        Block(list(rule.variants)),
        Block([(12, money_line(state)), (0, [])]),
        Block([(11, calls_line(state)), (0, [])]),
        Block([(50, [plain_text("Ctrl-C stops; the same command resumes", "dim")]), (0, [])]),
        Block([(42, notes), (5, notes[-2:]), (0, notes[-1:])]),
    ]


# The header


def title_lines(state: RunState, width: int) -> list[Text]:
    """Run and end; student, teacher and judge; the folder and the start."""
    recipe, at = state.recipe, state.ends_at()
    left = join_styled("run ", (state.run.name, "bold"), f", {format_count(recipe.rounds, 'round')}")
    ends = f"ends about {format_clock(at, state.now())}" if at is not None else ""
    started = f"started {format_clock(state.started, state.now())}"
    return [
        spread(left, plain_text(ends, "cyan"), width),
        plain_text(who_does_what(recipe)),
        spread(plain_text(str(state.run.path), "dim"), plain_text(started, "dim"), width),
    ]


def who_does_what(recipe: Recipe) -> str:
    """`Qwen2.5-1.5B, taught and judged by gpt-4o-mini`."""
    student, teacher = short_path(recipe.student.path), short_endpoint(recipe.teacher)
    if recipe.judge.kind == "teacher":
        return f"{student}, taught and judged by {teacher}"
    return f"{student}, taught by {teacher}, judged by {short_endpoint(judge_endpoint(recipe))}"


def short_path(path: str | None) -> str:
    """The last part of a student's path or name."""
    return {"pocket": "the pocket student"}.get(path or "", (path or "").rstrip("/").rpartition("/")[2])


def short_endpoint(endpoint: Endpoint) -> str:
    """A name for who answers, without its address."""
    kind = str(getattr(endpoint, "kind", ""))
    return ENDPOINT_NAMES.get(kind) or endpoint.model or short_path(endpoint.gguf) or kind


# The results


def results_table(state: RunState, width: int) -> list[Text]:
    """The rates of each evaluated round, the untrained student's first; [] before the first.

    A narrow terminal shows the first round and the last ones.
    """
    numbers = list(state.results)
    most = max(2, (width - LABEL_WIDTH) // CELL_WIDTH)
    if not numbers:
        return []
    shown = numbers if len(numbers) <= most else [numbers[0], *numbers[1 - most :]]
    found = [state.results[number] for number in shown]
    rows = [table_row("held out", [column_name(number) for number in shown], "bold")]
    rows += rate_rows(found)
    return rows


def rate_rows(found: Sequence[Mapping[str, Any]]) -> list[Text]:
    """Win rate (or score, if there is only likeness) and accuracy, with their intervals."""
    last, rows = found[-1], list[Text]()
    if is_rouge_only(last.get("win_rate"), last.get("student_score")):
        scores = [row.get("student_score") for row in found]
        rows.append(table_row("score", ["-" if score is None else f"{score:.2f}" for score in scores]))
    for name, label in (("win_rate", "win rate"), ("accuracy", "accuracy")):
        if last.get(name) is not None:
            rows.append(table_row(label, [percent_cell(row.get(name)) for row in found]))
            intervals = [percent_interval_cell(row.get(f"{name}_interval")) for row in found]
            rows.append(table_row("  95 %", intervals, "dim"))
    return rows


def table_row(label: str, cells: Sequence[str], style: str = "") -> Text:
    """A label and cells to the right of it."""
    return plain_text(f"{label:<{LABEL_WIDTH}}" + "".join(f"{cell:>{CELL_WIDTH}}" for cell in cells), style)


def column_name(number: int) -> str:
    """`untrained`, `plain SFT` for round 0, `round 2`."""
    return {UNTRAINED_ROUND: "untrained", 0: "plain SFT"}.get(number, f"round {number}")


def results_in_a_line(state: RunState, marks: Marks) -> list[Text]:
    """`accuracy 15.8% → 21.7% → 50.8%`; [] before the first evaluation."""
    found = list(state.results.values())
    for name, label in (("accuracy", "accuracy"), ("win_rate", "win rate")):
        values = [percent_cell(row[name]) for row in found if row.get(name) is not None]
        if values:
            return [join_styled((f"{label} ", "bold"), f" {marks.arrow} ".join(values))]
    return []


# The stages


def round_line(state: RunState, width: int) -> list[Text]:
    """The round at work, and the time left of the whole run."""
    step, left = state.step, state.run_seconds_left()
    name = "starting"
    if step:
        once = "end" if state.is_last(step) else "preparation"
        name = once if step.number is None else f"round {step.number} of {state.recipe.all_rounds}"
    said = f"{format_seconds(left)} left in all" if left is not None else ""
    return [spread(plain_text(name, "bold"), plain_text(said, "cyan"), width)]


def finished_lines(state: RunState, marks: Marks, width: int) -> list[Text]:
    """A line for each finished stage of the round."""
    named = name_width(state)
    return [finished_line(found, marks, named, width) for found in state.finished]


def finished_line(found: Finished, marks: Marks, named: int, width: int) -> Text:
    """`✓ judge   4,000 rows judged   8,000 asked   12:31`."""
    calls = calls_phrase(found) if width >= DETAILS_WIDTH else ""
    right = join_styled((calls, "dim"), f"  {format_duration(found.seconds):>7}")
    style = "yellow" if found.warnings else ""
    left = join_styled((f"{marks.done} ", "green"), f"{found.step.stage.name:<{named}}  ", (found.said, style))
    return spread(left, right, width)


def name_width(state: RunState) -> int:
    """The width of the names of the round's stages that are shown."""
    names = [found.step.stage.name for found in state.finished]
    return max(map(len, [*names, state.step.stage.name if state.step else ""]))


def bar_line(state: RunState, marks: Marks, width: int) -> list[Text]:
    """`▶ train  ━━━━━━━━━────────  93/188  1.5/s  24:10 left`."""
    if not state.step:
        return []
    left = state.stage_seconds_left()
    counted = f"{state.done:,}/{state.total:,}" if state.total else ""
    known = left is not None and (state.total or left >= 1)  # what was expected to be over by now is unknown
    time_said = f"{format_seconds(left or 0)} left" if known else f"for {format_seconds(state.now() - state.began)}"
    said = "  ".join(filter(None, [counted, format_speed(state.rate()) if state.total else "", time_said]))
    name = f"{state.step.stage.name:<{name_width(state)}}  "
    room = min(MAX_BAR, width - 2 - cell_len(name) - cell_len(said) - 2)
    pieces: list[str | tuple[str, str]] = [(f"{marks.now} ", "bold green"), (name, "bold")]
    if room >= MIN_BAR:
        pieces += bar_pieces(state, marks, room)
    return [spread(join_styled(*pieces), plain_text(said), width)]


def bar_pieces(state: RunState, marks: Marks, width: int) -> list[str | tuple[str, str]]:
    """A bar in pieces with their styles; without a total, a part of it moves to and fro once in a few seconds."""
    if state.total:
        full = int(width * min(1.0, state.done / state.total))
        return [(marks.full * full, "green"), (marks.rest * (width - full), "dim")]
    way = width - PULSE_WIDTH
    at = int(4 * (state.now() - state.began)) % (2 * way)
    before = min(at, 2 * way - at)
    after = width - PULSE_WIDTH - before
    return [(marks.rest * before, "dim"), (marks.full * PULSE_WIDTH, "green"), (marks.rest * after, "dim")]


def said_line(state: RunState) -> list[Text]:
    """What the running stage says, such as its loss."""
    return [plain_text(f"  {state.said}")] if state.said and state.step else []


def later_line(state: RunState, marks: Marks) -> list[Text]:
    """The stages of the round that are still to come, and how long they take."""
    step = state.step
    if not step:
        return []
    later = [other for other in state.pending(step)[1:] if other.number == step.number and not state.is_last(other)]
    if not later:
        return []
    seconds = state.times.seconds_of(later)
    about = f"  about {format_seconds(seconds)}" if seconds else ""
    return [plain_text(f"{marks.later} {', '.join(other.stage.name for other in later)}{about}", "dim")]


# Money, requests, warnings


def money_line(state: RunState) -> list[Text]:
    """Money, calls and tokens that were spent, of their limits; [] if nothing costs and nothing is limited."""
    spent, limits, to_come = state.spent(), state.recipe.budget, state.money_to_come()
    parts = []
    if spent.money or limits.money is not None:
        of = "" if limits.money is None else f" of {format_money(limits.money)}"
        parts.append(f"money {format_money(spent.money)}{of}")
    if to_come is not None:
        parts.append(f"the rest of the run about {format_money(to_come)}")
    for name, amount, limit in (("calls", spent.calls, limits.calls), ("tokens", spent.tokens, limits.tokens)):
        if limit is not None:
            parts.append(f"{name} {amount:,} of {limit:,}")
    return [plain_text(" · ".join(parts))] if parts else []


def calls_line(state: RunState) -> list[Text]:
    """Requests in flight, 429s, requests sent again, unreadable replies; [] before the first request."""
    counts = state.counts()
    if not counts.replies + counts.in_flight + counts.rate_limited + counts.retries:
        return []
    parts = [f"{counts.in_flight:,} of {counts.at_once:,} in flight"] if counts.in_flight else []
    parts += [format_count(counts.replies, "reply", "replies")]
    if counts.rate_limited:
        wait = f", waiting {counts.pause:.0f} s" if counts.pause >= 1 else ""
        parts.append(f"429: {counts.rate_limited:,}{wait}")
    parts += [f"{counts.retries:,} sent again"] if counts.retries else []
    if counts.unreadable:
        share = f" ({counts.unreadable / counts.replies:.1%})" if counts.replies else ""
        parts.append(f"{counts.unreadable:,} unreadable{share}")
    return [plain_text(" · ".join(parts), "yellow" if counts.pause >= 1 else "")]


def note_lines(note: str, width: int) -> list[Text]:
    """A warning in two lines at most."""
    lines = [line.strip() for line in wrap_line(note, width)][:2]
    return [plain_text(f"{'! ' if not at else '  '}{printable(line)}", "yellow") for at, line in enumerate(lines)]


def spread(left: Text, right: Text, width: int) -> Text:
    """A line with a part at each end; the left one is cut where they do not fit."""
    if not right.plain.strip():
        return left
    room = max(0, width - right.cell_len - 2)
    left.truncate(room, overflow="ellipsis")
    return Text.assemble(left, " " * (width - left.cell_len - right.cell_len), right)
