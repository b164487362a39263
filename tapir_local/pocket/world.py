"""The pocket world: problems to draw, read, solve, check and grade, exactly and without an LLM."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from tapir_local.pocket import code, language, numbers
from tapir_local.pocket.check import is_right, score_answer
from tapir_local.pocket.family import ProblemFamily, Solution

POCKET_FAMILIES: Mapping[str, ProblemFamily] = {
    family.name: family for family in (*numbers.NUMBER_FAMILIES, *code.CODE_FAMILIES, *language.LANGUAGE_FAMILIES)
}


@dataclass(frozen=True)
class Problem:
    """An instruction of the pocket world, with its family and the values of its slots."""

    instruction: str
    family: ProblemFamily
    values: tuple[tuple[str, str], ...]
    solution: Solution

    @property
    def key(self) -> str:
        """A text that is the same for all phrasings of one problem."""
        return f"{self.family.name} {' | '.join(f'{name} {value}' for name, value in self.values)}"


def make_problem(family: ProblemFamily, phrasing: str, drawn: Mapping[str, str]) -> Problem:
    """The problem with these values in this phrasing."""
    values = {name: drawn[name] for name in sorted(drawn)}
    return Problem(phrasing.format(**values), family, tuple(values.items()), family.solve(values))


def draw_problem(rng: Random, family: ProblemFamily, level: int | None = None) -> Problem:
    """Draw a problem; level is 1 to `family.levels`, drawn too if left out."""
    level = level or rng.randint(1, family.levels)
    return make_problem(family, rng.choice(family.phrasings), family.draw(rng, level))


@lru_cache(maxsize=20_000)
def parse_problem(instruction: str) -> Problem | None:
    """The problem that an instruction poses; None if it is not of the pocket world."""
    text = instruction.strip()
    for family in POCKET_FAMILIES.values():
        for pattern, phrasing in zip(family.patterns, family.phrasings, strict=True):
            found = pattern.fullmatch(text)
            if not found:
                continue
            try:
                problem = make_problem(family, phrasing, found.groupdict())
            except (KeyError, ValueError, IndexError):
                continue
            if problem.instruction == text:
                return problem
    return None


def is_reserved_for_seeds(problem: Problem) -> bool:
    """Whether a problem is in the third from which seeds are drawn; the pretraining text solves none of these."""
    return hashlib.sha256(problem.key.encode()).digest()[0] % 3 == 0


def solve_instruction(instruction: str) -> Solution | None:
    """The solution of an instruction; None if it is not of the pocket world."""
    problem = parse_problem(instruction)
    return problem.solution if problem else None


def check_answer(instruction: str, answer: str) -> bool | None:
    """Whether the answer is right; None if the instruction is not of the pocket world."""
    solution = solve_instruction(instruction)
    return is_right(solution, answer) if solution else None


def grade_answer(instruction: str, answer: str) -> float:
    """A judge's score of an answer, 1 to 10; always 1 if the instruction is not of the pocket world."""
    solution = solve_instruction(instruction)
    return score_answer(solution, answer) if solution else 1.0


def problem_size(values: Mapping[str, str]) -> tuple[int, ...]:
    """The size of a problem: counts of digits, of items and sentences, and of words."""
    text = " ".join(values.values())
    return sum(char.isdigit() for char in text), text.count(",") + text.count(". "), text.count(" ")


def draw_variant(problem: Problem, rng: Random) -> Problem:
    """Another problem of the same family, the nearest in size of a few draws at every level."""
    wanted = problem_size(dict(problem.values))

    def distance(other: Problem) -> int:
        return sum(abs(one - two) for one, two in zip(wanted, problem_size(dict(other.values)), strict=True))

    drawn = [
        draw_problem(rng, problem.family, level) for level in range(1, problem.family.levels + 1) for _ in range(3)
    ]
    others = [other for other in drawn if other.key != problem.key] or [draw_problem(rng, problem.family)]
    return min(others, key=distance)


def draw_rarer(problem: Problem, rng: Random) -> Problem:
    """A problem of another family of the same task, at any level; of the same family if the task has no other."""
    others = [f for f in POCKET_FAMILIES.values() if f.task == problem.family.task and f is not problem.family]
    return draw_problem(rng, rng.choice(others)) if others else draw_variant(problem, rng)


def draw_harder(problem: Problem, rng: Random) -> Problem:
    """Another problem of the same family, the largest of a few draws at its highest level."""
    drawn = [draw_problem(rng, problem.family, problem.family.levels) for _ in range(3)]
    return max(drawn, key=lambda other: problem_size(dict(other.values)))
