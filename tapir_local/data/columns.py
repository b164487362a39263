"""Access the columns of a row as text, and track which of them were read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

# Names of columns with metadata, which are not part of an instruction or answer; they may also be written with _, - or
# spaces between the words.
METADATA_NAMES = (
    "id ids idx index uid uuid key hash sha name row rowid questionid promptid conversationid messageid parentid "
    "sourceid docid source sources dataset datasetname datasplit datasource origin provenance category categories "
    "subcategory type kind task tasktype tasks tag tags topic topics subject domain language lang locale split subset "
    "config url link file filename path license licence generator model modelname author annotator annotators "
    "timestamp date time created createdat updated updatedat difficulty level quality score scores rating ratings "
    "rank label labels version weight length tokens tokencount numtokens numturns isclassification"
)
METADATA_COLUMNS = frozenset(METADATA_NAMES.split())
TEXT_PART_TYPES = ("text", "input_text", "output_text")  # types of the text parts of a message


@dataclass(frozen=True)
class UnreadableRow:
    """A place in a source where no row could be read: `kind` in a few words, the full message, and the text."""

    kind: str
    said: str
    text: str = ""


class RowFault(ValueError):
    """Why a row cannot be read: `kind` is common to such rows, `said` is about this one, `fix` says what to do."""

    def __init__(self, kind: str, said: str = "", fix: str = "") -> None:
        said = (said or kind).encode(errors="backslashreplace").decode()  # it may quote a lone surrogate
        super().__init__(said)
        self.kind, self.said, self.fix = kind, said, fix


class NumberText(str):
    """A number of a JSON text, as it is written there: 3.10 is not 3.1."""

    __slots__ = ()


class DuplicateKeyObject(dict[str, Any]):
    """A JSON object with a duplicate `key`, so that one of its values would be lost."""

    key = ""


def build_json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object_pairs_hook of JSON decoders: a dict, or a DuplicateKeyObject if a key occurs twice."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names, twice = [name for name, _ in pairs], DuplicateKeyObject(found)
    twice.key = next(name for name in names if names.count(name) > 1)
    return twice


def refuse_duplicate_keys(value: Any) -> None:
    """RowFault for an object with a duplicate key."""
    if isinstance(value, DuplicateKeyObject):
        raise RowFault("a key stands twice in it", f"the key {value.key!r} stands twice in it")


class Columns(dict[str, Any]):
    """A row that records which columns were read (`asked`) and what was dropped from them."""

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
        """What was not read: columns with text that is not in `seen` and not metadata, and what was dropped."""
        names = [
            f"column {name!r}"
            for name, value in self.items()
            if name not in self.asked and not is_metadata_column(name) and has_unseen_text(value, seen)
        ]
        return [*names, *self.dropped]


def is_metadata_column(name: Any) -> bool:
    """Whether a column's name is that of metadata."""
    return "".join(letter for letter in str(name).lower() if letter.isalnum()) in METADATA_COLUMNS


def has_unseen_text(value: Any, seen: str) -> bool:
    """Whether a value contains text, at any depth, that is not in `seen`; a text has at least one letter."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str) and any(map(str.isalpha, item)) and item.strip() not in seen:
            return True
        left += item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
    return False


def field_text(value: Any) -> str:
    """A field as text: a string, a number as written, None, or OpenAI's list of parts; RowFault for anything else.

    White space at the end is removed; indentation and empty lines at the beginning are kept.
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
    """The text of a part of a message, with its white space."""
    text = part.get("text")
    return str(text) if isinstance(text, str) else field_text(text)


def first_text(row: Mapping[str, Any], *names: str) -> str:
    """The text of the first of several columns that has any; "" if none has."""
    return next((text for name in names if (text := field_text(row.get(name)))), "")


def refuse_lone_surrogates(*texts: str) -> None:
    r"""RowFault for a lone surrogate such as JSON's `\ud83d`, which no file and no endpoint accepts."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        kind = "not Unicode text: half a surrogate pair"
        raise RowFault(kind, f"{kind}, {error.object[error.start]!a}") from error
