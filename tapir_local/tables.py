"""Tables and lines for a terminal that show text literally: no rich markup, no control characters."""

from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tapir_local.printable import printable


def plain_text(text: str, style: str = "") -> Text:
    """Literal text in one style."""
    return Text(printable(text), style=style)


def join_styled(*parts: str | tuple[str, str]) -> Text:
    """Literal texts joined into one; a pair (text, style) has a style of its own."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((printable(text), style) for text, style in pairs))


class Cell(str):
    """A string that rich shows literally, without markup or emoji codes."""

    def __rich__(self) -> Text:
        return Text(self)


class PlainTable(Table):
    """A table whose title, caption, headers and cells are literal text."""

    def __init__(self, title: str = "", caption: str | None = None) -> None:
        super().__init__(title=title or None, caption=caption, title_justify="left", caption_justify="left")

    def add_column(self, header: RenderableType = "", *rest: Any, **options: Any) -> None:
        """Add a column with a literal header."""
        super().add_column(plain_cell(header), *rest, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row of literal texts."""
        super().add_row(*(plain_cell(item) for item in cells if item is not None), **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for name in ("title", "caption"):
            text = getattr(self, name)
            if isinstance(text, str):
                setattr(self, name, plain_text(text, f"table.{name}"))
        yield from super().__rich_console__(console, options.update(markup=False))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return super().__rich_measure__(console, options.update(markup=False))


def plain_cell(item: RenderableType) -> RenderableType:
    """A string as a literal cell; any other renderable unchanged."""
    return Cell(printable(item)) if isinstance(item, str) else item
