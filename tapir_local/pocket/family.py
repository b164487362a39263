"""A family of pocket problems: draw values, put them into phrasings, read them back, and solve the problem."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Literal

from tapir_local.pocket.phrasings import PHRASINGS

SlotValues = Mapping[str, str]
DrawnSlots = dict[str, str]
AnswerKind = Literal["number", "choice", "sequence", "text", "exact", "json", "code"]

SLOT_PATTERN = re.compile(r"\{(\w+)\}")
PERSON_AND_THING_SLOTS = {"name", "things", "animal", "animals", "others", "team", "rival"}
WORD_SLOTS = frozenset(PERSON_AND_THING_SLOTS | {"word", "letter", "superlative", "language", "fname"})


@dataclass(frozen=True)
class Solution:
    """The answers to a problem, and what a right answer must contain.

    `plain` is the bare result, `styled` the answer in its task's style. `kind` says how an answer is checked (see
    check.py) and `target` what it must contain. `given` depends on the kind: the numbers of the question, the words to
    choose from, or the function's name and the arguments to try it with.
    """

    plain: str
    styled: str
    kind: AnswerKind
    target: str
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProblemFamily:
    """One kind of problem.

    `draw(rng, level)` gives the values of the slots, with level from 1 (easy) to `levels` (hard). `solve` raises
    KeyError, ValueError or IndexError for values outside this family.
    """

    name: str
    task: str
    draw: Callable[[Random, int], DrawnSlots]
    solve: Callable[[SlotValues], Solution]
    levels: int = 1

    @property
    def phrasings(self) -> tuple[str, ...]:
        """The instructions of this family, with slots."""
        return PHRASINGS[self.name]

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """One regular expression per phrasing; it matches a whole instruction."""
        return tuple(phrasing_pattern(phrasing) for phrasing in self.phrasings)


def slot_pattern(name: str) -> str:
    """The expression of a slot: one letter is a number, a few are single words, the others are any text in a line."""
    if len(name) == 1:
        return rf"(?P<{name}>\d{{1,6}})"
    return rf"(?P<{name}>[A-Za-z]+)" if name in WORD_SLOTS else rf"(?P<{name}>[^\n]+?)"


def phrasing_pattern(phrasing: str) -> re.Pattern[str]:
    """The expression that reads a phrasing back; a slot that occurs twice must have the same value."""
    seen: set[str] = set()
    parts: list[str] = []
    for number, piece in enumerate(SLOT_PATTERN.split(phrasing)):
        if number % 2 == 0:
            parts.append(re.escape(piece))
        else:
            parts.append(f"(?P={piece})" if piece in seen else slot_pattern(piece))
            seen.add(piece)
    return re.compile("".join(parts))


def require(holds: bool) -> None:
    """ValueError unless the condition holds: the values are outside the family."""
    if not holds:
        raise ValueError("no problem of this family")


def join_items(items: Sequence[object]) -> str:
    """The items in one text, such as `1, 2, 3`."""
    return ", ".join(map(str, items))


def split_items(text: str) -> list[str]:
    """The items of `1, 2, 3`."""
    return text.split(", ")


def parse_numbers(text: str) -> list[int]:
    """The numbers of `1, 2, 3`; ValueError for anything else."""
    return [int(item) for item in split_items(text)]


def number_solution(result: int, steps: Sequence[str], given: Sequence[object], last: str = "") -> Solution:
    """A solution that is a number; its style is the steps, then a line that states the result."""
    return Solution(
        str(result), "\n".join([*steps, *([last] if last else [])]), "number", str(result), tuple(map(str, given))
    )


def choice_solution(result: str, styled: str, options: Sequence[str]) -> Solution:
    """A solution that is one of the words in `options`."""
    return Solution(result, styled, "choice", result, tuple(options))
