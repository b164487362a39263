"""What a row of seeds holds: its columns, which of them were read, and the text of each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

# Columns of words about a row that are no part of its instruction or answer; a name of several words may be written
# with _, - or blanks.
METADATA_NAMES = (
    "id ids idx index uid uuid key hash sha name row rowid questionid promptid conversationid messageid parentid "
    "sourceid docid source sources dataset datasetname datasplit datasource origin provenance category categories "
    "subcategory type kind task tasktype tasks tag tags topic topics subject domain language lang locale split subset "
    "config url link file filename path license licence generator model modelname author annotator annotators "
    "timestamp date time created createdat updated updatedat difficulty level quality score scores rating ratings "
    "rank label labels version weight length tokens tokencount numtokens numturns isclassification"
)
METADATA_COLUMNS = frozenset(METADATA_NAMES.split())
TEXT_PART_TYPES = ("text", "input_text", "output_text")  # types of a message's parts that are text


@dataclass(frozen=True)
class UnreadableRow:
    """A place in a source where no row could be read: what is wrong, in a few words and in full; the text there."""

    kind: str
    said: str
    text: str = ""


class RowFault(ValueError):
    """Why a row cannot be read: `kind` in words that all such rows share, `said` of this one, `fix` what to do."""

    def __init__(self, kind: str, said: str = "", fix: str = "") -> None:
        said = (said or kind).encode(errors="backslashreplace").decode()  # what it quotes may be half a surrogate pair
        super().__init__(said)
        self.kind, self.said, self.fix = kind, said, fix


class NumberText(str):
    """A number in JSON, as it is spelled there: 3.10 is not 3.1."""

    __slots__ = ()


class DuplicateKeyObject(dict[str, Any]):
    """A JSON object in which a key stands twice, so that one of its values would be lost."""

    key = ""


def build_json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text; a Twice where a key stands in it twice."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names, twice = [name for name, _ in pairs], DuplicateKeyObject(found)
    twice.key = next(name for name in names if names.count(name) > 1)
    return twice


def refuse_duplicate_keys(value: Any) -> None:
    """RowFault for an object in which a key stands twice."""
    if isinstance(value, DuplicateKeyObject):
        raise RowFault("a key stands twice in it", f"the key {value.key!r} stands twice in it")


class Columns(dict[str, Any]):
    """A row that remembers which of its columns were read, and what was left out of those that were."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.asked: set[str] = set()
        self.dropped: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def unread(self, seen: str) -> list[str]:
        """What holds text and was not read: columns that are no metadata and say more than `seen`, and the dropped."""
        names = [
            f"column {name!r}"
            for name, value in self.items()
            if name not in self.asked and not is_metadata_column(name) and has_unseen_text(value, seen)
        ]
        return [*names, *self.dropped]


def is_metadata_column(name: Any) -> bool:
    """Whether a column's name says that it is about the row."""
    return "".join(letter for letter in str(name).lower() if letter.isalnum()) in METADATA_COLUMNS


def has_unseen_text(value: Any, seen: str) -> bool:
    """Whether a value has text, however deep, that is not in `seen`; a text has at least one letter."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str) and any(map(str.isalpha, item)) and item.strip() not in seen:
            return True
        left += item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
    return False


def field_text(value: Any) -> str:
    """A field as text: a string, a number as spelled, nothing, or OpenAI's list of parts; RowFault for anything else.

    Blanks and line breaks at its end are taken off; indentation and empty lines at its beginning are kept.
    """
    if isinstance(value, str):
        return str(value).rstrip()
    if value is None:
        return ""
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") in TEXT_PART_TYPES for part in value
    ):
        return "".join(message_part_text(part) for part in value).rstrip()
    if not isinstance(value, int | float | Decimal) or isinstance(value, bool):
        raise RowFault(f"a {type(value).__name__} stands where text is expected")
    if not math.isfinite(value):
        raise RowFault(f"{'NaN' if math.isnan(value) else 'Infinity'} stands where text is expected")
    return str(value)


def message_part_text(part: Mapping[str, Any]) -> str:
    """The text of a message's part, blanks and all."""
    text = part.get("text")
    return str(text) if isinstance(text, str) else field_text(text)


def first_text(row: Mapping[str, Any], *names: str) -> str:
    """The text of the first of several columns that has any; "" where none has."""
    return next((text for name in names if (text := field_text(row.get(name)))), "")


def refuse_lone_surrogates(*texts: str) -> None:
    r"""RowFault for JSON's `\ud83d` without its other half, which no file and no endpoint would take."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        kind = "not Unicode text: half a surrogate pair"
        raise RowFault(kind, f"{kind}, {error.object[error.start]!a}") from error
