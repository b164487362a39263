"""Write the pocket seeds: 2,600 instructions in Alpaca format, unbalanced, with the teacher's plain answers.

    python bench/make_pocket_seeds.py [FILE]
    python bench/make_pocket_seeds.py FILE --lifelike 6000     another pool: bench/curricula.py --set seeds.path=FILE

80 % of the pocket seeds are hard for the pocket student, and every family has its share. Collected instructions are not
like that: most are easy, and a few kinds of task are most of them. The lifelike pool draws the family by Zipf's law, in
an order drawn once, with an exponent of 1.2, and each level is half as frequent as the one below it. These numbers were
set before any curriculum was run on the pool, and are not tuned.
"""

import argparse
import json
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

EXPONENT, HALF = 1.2, 0.5  # of the lifelike pool


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


def lifelike(rows: int) -> list[dict[str, str]]:
    """That many different problems: a few families are most of them, and most are easy."""
    rng = Random("lifelike-pocket-seeds")
    families = list(POCKET_FAMILIES)
    rng.shuffle(families)
    shares = [1 / rank**EXPONENT for rank in range(1, len(families) + 1)]
    found: dict[str, Problem] = {}
    for _ in range(1000 * rows):
        family = POCKET_FAMILIES[rng.choices(families, shares)[0]]
        levels = range(1, family.levels + 1)
        level = rng.choices(levels, [HALF**level for level in levels])[0]
        problem = draw_problem(rng, family, level)
        if is_reserved_for_seeds(problem):
            found.setdefault(problem.key, problem)
        if len(found) == rows:
            return [row(problem) for problem in found.values()]
    raise ValueError(f"there are only {len(found):,} such problems")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=FILE)
    parser.add_argument("--lifelike", type=int, metavar="ROWS", help="write a lifelike pool of so many rows")
    options = parser.parse_args()
    if options.lifelike and options.file == FILE:
        parser.error("--lifelike needs a FILE of its own")
    rows = lifelike(options.lifelike) if options.lifelike else seeds()
    options.file.write_text(text(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
