"""Write the pocket seeds: 2,600 instructions in Alpaca format, unbalanced, with the teacher's plain answers.

Usage: python bench/make_pocket_seeds.py [FILE]
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random

from tapir_local.pocket.family import ProblemFamily
from tapir_local.pocket.world import POCKET_FAMILIES, Problem, draw_problem, is_reserved_for_seeds

FILE = Path(__file__).parent.parent / "tapir_local" / "assets" / "pocket_seeds.json"
# Rows of each level, easiest first. Unbalanced on purpose: many sums, few counterfactuals.
ROWS: Mapping[str, tuple[int, ...]] = {
    "sum": (24, 60, 80, 60, 60),
    "difference": (10, 40, 60, 50, 40),
    "product": (14, 60, 60),
    "total": (40, 40, 40, 30, 20),
    "story": (40, 50, 50, 40),
    "extreme": (30, 30, 30, 20),
    "sort": (24, 24, 16, 10),
    "parity": (14, 30, 26),
    "chain": (40, 36, 14),
    "sequence": (24, 40, 36),
    "letters": (20, 40, 40),
    "position": (20, 25, 25),
    "legs": (25, 25, 20),
    "atoms": (15, 25, 20),
    "change": (25, 30, 25),
    "match": (30, 30),
    "write": (50, 50, 40),
    "mend": (40, 40, 40),
    "past": (15, 20),
    "agreement": (15, 20),
    "plural": (10, 15),
    "article": (10, 15),
    "synonym": (15, 15),
    "reorder": (10, 15),
    "passive": (10, 15),
    "list": (20, 20, 20),
    "object": (10, 15, 15),
    "csv": (15, 15),
    "member": (10, 10, 10),
    "odd": (10, 10, 10),
    "opposite": (10, 15),
    "sound": (10, 10, 10),
    "supposed-legs": (15, 15),
    "translation": (30, 40),
}


def drawn(rng: Random, family: ProblemFamily, level: int, rows: int) -> list[Problem]:
    """That many different problems of the reserved third, which is not in the student's pretraining text."""
    found: dict[str, Problem] = {}
    for _ in range(1000 * rows):
        problem = draw_problem(rng, family, level)
        if is_reserved_for_seeds(problem):
            found.setdefault(problem.key, problem)
        if len(found) == rows:
            return list(found.values())
    raise ValueError(f"{family.name} has no {rows} problems at level {level}")


def row(problem: Problem) -> dict[str, str]:
    """A row with Alpaca's keys. The prompt is the instruction, then two newlines and the input if there is one."""
    instruction, _, given = problem.instruction.partition("\n\n")
    return {"instruction": instruction, "input": given, "output": problem.solution.plain}


def seeds() -> list[dict[str, str]]:
    """All rows, shuffled."""
    rng = Random("pocket-seeds")
    problems = {
        problem.key: problem
        for name, counts in ROWS.items()
        for level, rows in enumerate(counts, 1)
        for problem in drawn(rng, POCKET_FAMILIES[name], level, rows)
    }
    rows = [row(problem) for problem in problems.values()]
    rng.shuffle(rows)
    return rows


def text(rows: list[dict[str, str]]) -> str:
    """One row per line, so that diffs show changed rows."""
    return "[\n" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in rows) + "\n]\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    target.write_text(text(seeds()), encoding="utf-8")
