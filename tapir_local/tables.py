"""Tables and lines for a terminal: literal text (no markup, no control characters) that fits narrow terminals."""

import time
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from tapir_local.printable import printable

LEAST_TEXT_WIDTH = 12  # cells of a wrapped column: most English words fit


def plain_text(text: str, style: str = "") -> Text:
    """Literal text in one style."""
    return Text(printable(text), style=style)


def join_styled(*parts: str | tuple[str, str]) -> Text:
    """Literal texts joined into one; a pair (text, style) has a style of its own."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((printable(text), style) for text, style in pairs))


def format_seconds(seconds: float) -> str:
    """`0:41`, `1:30`, `2:05:00`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def format_clock(moment: float, now: float) -> str:
    """`03:10` in local time, for seconds since 1970; with the day of the week if it is not today: `Sat 03:10`."""
    then, today = time.localtime(moment), time.localtime(now)
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%a %H:%M", then)


class PlainTable(Table):
    """A table whose title, caption, headers and cells are literal text, and that fits the width of the terminal.

    Numbers and names are never cut or wrapped in mid-word. A column with a `rank` is left out where the table is too
    wide, the highest rank first; a line under the table then names the columns that were left out.
    """

    def __init__(self, title: str = "", caption: str | None = None) -> None:
        super().__init__(
            title=title or None,
            caption=caption,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
        )
        self.ranks: list[int] = []

    def add_column(self, header: RenderableType = "", *rest: Any, rank: int = 0, **options: Any) -> None:
        """Add a column with a literal header. `rank` above 0: the column may be left out."""
        options.setdefault("overflow", "fold")
        self.ranks.append(rank)
        super().add_column(plain_cell(header), *rest, **options)

    def add_numbers(self, *headers: str, rank: int = 0) -> None:
        """Add columns of numbers, which are never wrapped or cut."""
        for header in headers:
            self.add_column(header, justify="right", no_wrap=True, rank=rank)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row of literal texts."""
        super().add_row(*(plain_cell(item) for item in cells if item is not None), **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table, left_out = self.fitted(options.max_width)
        lines = [table.caption] if isinstance(table.caption, str) else []
        if left_out:
            lines.append(f"Not shown at this width: {', '.join(left_out)}.")
            table.caption = "\n".join(lines)
        for name in ("title", "caption"):
            text = getattr(table, name)
            if isinstance(text, str):
                setattr(table, name, None)
                if name == "title":
                    yield plain_text(text, "table.title")
        yield from Table.__rich_console__(table, console, options.update(markup=False))
        if lines:
            yield plain_text("\n".join(lines), "table.caption")

    def fitted(self, width: int) -> tuple["PlainTable", list[str]]:
        """(a copy that fits the width, the headers of the columns that it leaves out)."""
        kept, left_out = list(range(len(self.columns))), list[str]()
        while least_width([self.columns[at] for at in kept]) > width:
            rank, last = max(((self.ranks[at], at) for at in kept), default=(0, 0))
            if not rank:
                break
            kept.remove(last)
            left_out.insert(0, " ".join(str(self.columns[last].header).split()))
        columns = [replace(self.columns[at], _index=place) for place, at in enumerate(kept)]
        if least_width(columns) > width:  # rich would crop what is not wrapped
            columns = [replace(column, no_wrap=False) for column in columns]
        table = copy(self)
        table.columns = columns
        return table, left_out

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return super().__rich_measure__(console, options.update(markup=False))


def rest_of_line() -> Column:
    """The column of a progress bar that takes what is left of the line; a longer text is cut."""
    return Column(no_wrap=True, overflow="ellipsis", ratio=1)


def hanging_lines(rows: Sequence[tuple[RenderableType, RenderableType]]) -> PlainTable:
    """Pairs of a short mark and a text; a long text is wrapped beside its mark."""
    table = PlainTable()
    table.show_header, table.box = False, None
    table.add_column(no_wrap=True)
    table.add_column()
    for mark, text in rows:
        table.add_row(mark, text)
    return table


def least_width(columns: list[Column]) -> int:
    """The cells that these columns need, with gaps of two between them."""
    return sum(map(least_column_width, columns)) + 2 * (len(columns) - 1)


def least_column_width(column: Column) -> int:
    """The cells that a column needs: all of one that is not wrapped, else LEAST_TEXT_WIDTH or its longest text."""
    texts = [str(item) for item in (column.header, *column.cells)]
    whole = max((cell_len(line) for text in texts for line in text.splitlines()), default=0)
    return whole if column.no_wrap else min(whole, LEAST_TEXT_WIDTH)


def plain_cell(item: RenderableType) -> RenderableType:
    """A string as a literal cell; any other renderable unchanged."""
    return Text(printable(item)) if isinstance(item, str) else item
