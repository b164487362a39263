"""A family of pocket problems: how values are drawn, put into phrasings, read back from them, and solved."""

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
    """The answers to a problem, and what a right answer must come to.

    `plain` is the bare result, `styled` the answer in its task's style. `kind` says how an answer is read (in
    pocket_check) and `target` what must be read there. `given` are the numbers of the question, or the words that
    could be chosen, or the function's name and the arguments to try it on, as the kind needs.
    """

    plain: str
    styled: str
    kind: AnswerKind
    target: str
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProblemFamily:
    """One kind of problem.

    `draw(rng, level)` gives the values of the slots, level from 1 to `levels`, easy to hard; `solve` raises KeyError,
    ValueError or IndexError for values that are none of this family's.
    """

    name: str
    task: str
    draw: Callable[[Random, int], DrawnSlots]
    solve: Callable[[SlotValues], Solution]
    levels: int = 1

    @property
    def phrasings(self) -> tuple[str, ...]:
        """The instructions that this family can pose, with slots."""
        return PHRASINGS[self.name]

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """One expression a phrasing, matching the whole of an instruction."""
        return tuple(phrasing_pattern(phrasing) for phrasing in self.phrasings)


def slot_pattern(name: str) -> str:
    """A one-letter slot is a number, a few are single words, the others run to the end of their sentence or line."""
    if len(name) == 1:
        return rf"(?P<{name}>\d{{1,6}})"
    return rf"(?P<{name}>[A-Za-z]+)" if name in WORD_SLOTS else rf"(?P<{name}>[^\n]+?)"


def phrasing_pattern(phrasing: str) -> re.Pattern[str]:
    """The expression that reads a phrasing back; a slot that returns must have the same value."""
    seen: set[str] = set()
    parts: list[str] = []
    for number_solution, piece in enumerate(SLOT_PATTERN.split(phrasing)):
        if number_solution % 2 == 0:
            parts.append(re.escape(piece))
        else:
            parts.append(f"(?P={piece})" if piece in seen else slot_pattern(piece))
            seen.add(piece)
    return re.compile("".join(parts))


def require(holds: bool) -> None:
    """ValueError where values are outside a family."""
    if not holds:
        raise ValueError("no problem of this family")


def join_items(items: Sequence[object]) -> str:
    """`1, 2, 3`"""
    return ", ".join(map(str, items))


def split_items(text: str) -> list[str]:
    """The items of `1, 2, 3`."""
    return text.split(", ")


def parse_numbers(text: str) -> list[int]:
    """The numbers of `1, 2, 3`; ValueError for anything else."""
    return [int(item) for item in split_items(text)]


def number_solution(result: int, steps: Sequence[str], given: Sequence[object], last: str = "") -> Solution:
    """A solution that is a number: the steps, then a line that states the result."""
    return Solution(
        str(result), "\n".join([*steps, *([last] if last else [])]), "number", str(result), tuple(map(str, given))
    )


def choice_solution(result: str, styled: str, options: Sequence[str]) -> Solution:
    """A solution that is one of several words."""
    return Solution(result, styled, "choice", result, tuple(options))
