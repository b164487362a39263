"""What a page is made of: sections of texts, tables, figures and code, without any HTML."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tapir_local.run_dir import UNTRAINED_ROUND

Mark = Literal["", "good", "bad", "best", "faint"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `sort` is its value when readers sort the table; None: they sort by the text."""

    text: str
    sort: float | None = None
    mark: Mark = ""


@dataclass(frozen=True)
class Paragraph:
    """Text; a `warning` is a reason to doubt the results, a `verdict` the result in words."""

    text: str
    tone: Literal["plain", "warning", "verdict"] = "plain"
    kind: Literal["paragraph"] = "paragraph"


@dataclass(frozen=True)
class Grid:
    """A table. `total` is a last row that stays last when readers sort; `texts` are columns of words,
    `wide` ones of long texts, which wrap.

    A `folded` table is closed until a reader opens it. `markdown` is a text that a button copies.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] = ()
    title: str = ""
    note: str = ""
    texts: Sequence[str] = ()
    wide: Sequence[str] = ()
    folded: bool = False
    markdown: str = ""
    kind: Literal["grid"] = "grid"


@dataclass(frozen=True)
class Figure:
    """A chart as two SVG images, for wide and for narrow screens."""

    wide: str
    narrow: str
    title: str
    note: str = ""
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: Sequence[tuple[str, str]]
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True)
class Listing:
    """A text to copy, such as commands or a recipe."""

    title: str
    text: str
    folded: bool = False
    kind: Literal["listing"] = "listing"


@dataclass(frozen=True)
class Browser:
    """The answers to search: `data` is JSON that is safe inside a script element; see answers.py."""

    data: str
    tasks: Sequence[str]
    results: Sequence[tuple[str, str]]
    kind: Literal["browser"] = "browser"


Part = Paragraph | Grid | Figure | Facts | Listing | Browser


@dataclass(frozen=True)
class Section:
    """A section with the question that it answers; one without parts is left out."""

    anchor: str
    title: str
    question: str
    parts: Sequence[Part] = field(default_factory=tuple)


def text_cells(texts: Iterable[str]) -> list[Cell]:
    """Cells of plain text."""
    return [Cell(text) for text in texts]


def count_number(value: int | None, mark: Mark = "") -> Cell:
    """A count with thousands separators, or a dash."""
    return Cell("-" if value is None else f"{value:,}", None if value is None else float(value), mark)


def rate_number(value: float | None, mark: Mark = "") -> Cell:
    """A rate in percent, or a dash."""
    return Cell("-" if value is None else f"{value:.1%}", value, mark)


def decimal_number(value: float | None, form: str = ".2f", mark: Mark = "") -> Cell:
    """A number in a format, or a dash."""
    return Cell("-" if value is None else format(value, form), value, mark)


def short_round_name(number: int) -> str:
    """`untrained`, or the round's number."""
    return "untrained" if number == UNTRAINED_ROUND else str(number)


def clip_text(text: str, limit: int) -> str:
    """The beginning of a long text, with the number of characters that are left out."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"
