"""What a run does before it asks anybody: read many seeds, reject near-duplicates, plan a round.

    python bench/planning.py near --data ../shared/data     10,000 drafts, one after another, against 60,000 rows
    python bench/planning.py read --data ../shared/data     52,000 rows of Alpaca form through the `read` stage
    python bench/planning.py plan --data ../shared/data     a round planned from 52,000 judged rows, by each curriculum

`--data` is a folder of real instructions (FILES below). Rows are made of their phrases, so that lengths and word
frequencies are close to real ones. `near` also times a loop over all pairs on the first drafts, and stops if its
results differ from the index's. `read` runs the stage in a process of its own to measure its memory.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from rapidfuzz import process
from rapidfuzz.distance import Indel

from tapir_local.data.dataset import require_seeds, screen_drafts
from tapir_local.data.dedup import DedupIndex
from tapir_local.data.files import read_path
from tapir_local.data.similarity import extract_literals
from tapir_local.files import write_rows
from tapir_local.method.baselines import CURRICULA
from tapir_local.recipe.curriculum_settings import Curriculum
from tapir_local.recipe.endpoints import Teacher
from tapir_local.recipe.schema import Recipe, Seeds
from tapir_local.recipe.tasks import TASKS
from tapir_local.records import Example, Judgement, Message
from tapir_local.resources import POCKET_STUDENT
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import Work
from tapir_local.stages.prepare import read_stage
from tapir_local.stages.rounds import plan_stage
from tapir_local.stages.row_check import read_student_format

FILES = ("alpaca_cherry_5pct.json", "alpaca_eval/alpaca-7b.json", "self_instruct_seed_tasks.jsonl")
PIECE = re.compile(r"\s*\S+")  # a word with the spaces before it
KEPT, ALIKE = 0.2, 0.3  # share of phrases that stay in place; share of drafts that are altered rows


def real_rows(data: Path) -> list[Example]:
    """The rows of the real files."""
    return [row for name in FILES for row in require_seeds(read_path(data / name), TASKS)[0]]


def phrases(text: str, rng: random.Random) -> list[str]:
    """A text cut into phrases of two to six words."""
    words, found = PIECE.findall(text), list[str]()
    while words:
        size = rng.randint(2, 6)
        found.append("".join(words[:size]))
        words = words[size:]
    return found


def recombined(texts: Sequence[str], rng: random.Random) -> Iterator[str]:
    """An endless iterator of different new texts: the first phrase of a real one, then mostly phrases of other rows."""
    stock, seen = [phrase for text in texts for phrase in phrases(text, rng)[1:]], set[str]()
    while True:
        first, *rest = phrases(rng.choice(texts), rng)
        rest = [phrase if rng.random() < KEPT else rng.choice(stock) for phrase in rest or [""]]
        if (text := "".join([first, *rest])) not in seen:
            seen.add(text)
            yield text


def altered(text: str, words: Sequence[str], rng: random.Random) -> str:
    """A text in which one word in eight, and at least one, is replaced."""
    pieces = PIECE.findall(text)
    for place in rng.sample(range(len(pieces)), max(1, len(pieces) // 8)):
        pieces[place] = f" {rng.choice(words)}"
    return "".join(pieces)


def made(texts: Sequence[str], rows: int, drafts: int, rng: random.Random) -> tuple[list[Example], list[Example]]:
    """Rows, and drafts; some drafts are rows with some words replaced."""
    words, new = [word for text in texts for word in text.split()], recombined(texts, rng)
    pool = [next(new) for _ in range(rows)]
    asked = [altered(rng.choice(pool), words, rng) if rng.random() < ALIKE else next(new) for _ in range(drafts)]
    return examples("row", pool), examples("draft", asked)


def examples(name: str, texts: Sequence[str]) -> list[Example]:
    return [Example(f"{name}-{number}", (Message("user", text),)) for number, text in enumerate(texts)]


class Timed(NamedTuple):
    """Wall seconds, CPU seconds (on a busy machine only these are comparable), and the result."""

    clock: float
    cpu: float
    found: Any

    def __str__(self) -> str:
        return f"{self.clock:.2f} s ({self.cpu:.2f} s of the processor)"


def timed(work: Callable[[], Any]) -> Timed:
    """Call something; return its result and its time."""
    start, used = time.perf_counter(), time.process_time()
    found = work()
    return Timed(time.perf_counter() - start, time.process_time() - used, found)


def filled(rows: Sequence[Example], limit: float) -> DedupIndex:
    """An index of the rows."""
    index = DedupIndex(limit)
    for row in rows:
        index.add(row)
    return index


def all_pairs(slow: DedupIndex, drafts: Sequence[Example]) -> list[str]:
    """For each draft the row nearest to it, "" if it is kept: rapidfuzz over every row, in the order of the index."""
    found = list[str]()
    for draft in drafts:
        given = draft.prompt[-1].content
        text, known = slow.letters(given), extract_literals(given)
        scored = process.extract(
            text, slow.texts, scorer=Indel.normalized_similarity, score_cutoff=slow.max_rouge - 1e-9, limit=None
        )
        same = [row for row in scored if slow.literals_of[row[2]] == slow.literals.get(known, -1)]
        near = (slow.ids[place] for _, score, place in same if slow.confirmed_rouge(text, given, place, score))
        best = next(near, "")
        found.append(best)
        if not best:
            slow.add(draft)
    return found


def near(options: argparse.Namespace) -> None:
    """Screen the drafts one after another, and a sample of them with the loop over all pairs."""
    texts = [row.prompt[-1].content for row in real_rows(options.data)]
    rows, drafts = made(texts, options.rows, options.drafts, random.Random(0))
    filling = timed(lambda: filled(rows, options.limit))
    index: DedupIndex = filling.found
    length = sum(index.lengths) / len(rows)
    print(f"{len(rows):,} rows of {length:.1f} words in the mean, {max(index.lengths):,} at the most")
    print(f"{len(index.alphabet):,} different words; the index is filled in {filling}")
    sample, rest = drafts[: options.sample], drafts[options.sample :]
    other = filled(rows, options.limit)
    slow = timed(lambda: all_pairs(other, sample))
    fast = timed(lambda: screen_drafts(sample, index, DedupIndex(options.limit)))
    if slow.found != [draft.near for draft in fast.found]:
        sys.exit("the index and the loop over all pairs disagree")
    others = timed(lambda: screen_drafts(rest, index, DedupIndex(options.limit)))
    rejected = sum(bool(draft.reason) for draft in [*fast.found, *others.found])
    whole = Timed(fast.clock + others.clock, fast.cpu + others.cpu, None)
    print(f"{len(drafts):,} drafts, {rejected:,} rejected above {options.limit}: {whole}")
    print(f"the first {len(sample):,}: {fast}")
    print(f"by all pairs, the same found: {slow}, {slow.cpu / fast.cpu:.1f} times as long")


def alpaca_file(data: Path, rows: int, path: Path) -> None:
    """A file in Alpaca form: real outputs, 2 % exact duplicates, 2 % near-duplicates."""
    rng, real = random.Random(0), real_rows(data)
    texts = [row.prompt[-1].content for row in real]
    words, new, asked = [word for text in texts for word in text.split()], recombined(texts, rng), list[str]()
    while len(asked) < rows:
        kind = rng.random() if asked else 1.0
        old = asked[rng.randrange(len(asked))] if asked else ""
        asked.append(old if kind < 0.02 else altered(old, words, rng) if kind < 0.04 else next(new))
    found = [{"instruction": text, "input": "", "output": rng.choice(real).completion} for text in asked]
    path.write_text(json.dumps(found, indent=4), encoding="utf-8")


def stage(options: argparse.Namespace) -> None:
    """Run the `read` stage on one file; print its line, seconds and peak memory."""
    recipe = Recipe(seeds=Seeds(path=str(options.file), max_rouge=options.limit), teacher=Teacher(kind="pocket"))
    run, student = RunDir(options.file.parent, "read"), read_student_format(POCKET_STUDENT, 2048)
    # Every row is rendered and measured; nobody is asked.
    backends: Any = SimpleNamespace(student_format=lambda: student)
    taken = timed(lambda: read_stage(Work(recipe, run, backends), run.path / "rows.jsonl"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{taken.found}: {taken}, peak memory {peak:.0f} MB")


def reading(options: argparse.Namespace) -> None:
    """Make a file and run the stage on it in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "alpaca.json"
        alpaca_file(options.data, options.rows, file)
        print(f"{options.rows:,} rows, {file.stat().st_size / 1e6:.1f} MB", flush=True)
        command = [sys.executable, __file__, "stage", str(file), "--limit", str(options.limit)]
        subprocess.run(command, check=True)


def planning(options: argparse.Namespace) -> None:
    """The `plan` stage of each curriculum, reading and writing files, on rows of all tasks with random scores."""
    rng, labels = random.Random(4), list(TASKS)
    texts = recombined([row.prompt[-1].content for row in real_rows(options.data)], rng)
    prompts = [(Message("user", next(texts)),) for _ in range(options.rows)]
    rows = [Example(f"seed-{n:05d}", prompt, "x", rng.choice(labels)) for n, prompt in enumerate(prompts)]
    judged = [Judgement(row.id, rng.uniform(5, 10), rng.uniform(1, 10)) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder), "plan")
        for path, records in (
            (run.path / "seeds.jsonl", rows),
            (run.path / "holdout.jsonl", rows[:400]),
            (run.round(0) / "holdout-judgements.jsonl", judged[:400]),
            (run.round(1) / "judgements.jsonl", judged),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(path, records)
        for name in CURRICULA:
            recipe = Recipe(teacher=Teacher(kind="pocket"), curriculum=Curriculum(name=name, rows=10_000))
            work = Work(recipe, run, Any, 1)  # type: ignore[arg-type]
            taken = timed(partial(plan_stage, work, run.round(1) / "plan.json"))
            print(f"{name}: {taken}; {taken.found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    part = commands.add_parser("near", help="near-duplicates among drafts")
    part.add_argument("--rows", type=int, default=60_000)
    part.add_argument("--drafts", type=int, default=10_000)
    part.add_argument("--sample", type=int, default=500, help="drafts that the loop over all pairs is timed on")
    part.add_argument("--limit", type=float, default=0.7)
    part.set_defaults(run=near)
    other = commands.add_parser("read", help="the read stage on a large file")
    other.add_argument("--rows", type=int, default=52_000)
    other.add_argument("--limit", type=float, default=0.9)
    other.set_defaults(run=reading)
    third = commands.add_parser("plan", help="the plan stage on many judged rows")
    third.add_argument("--rows", type=int, default=52_000)
    third.set_defaults(run=planning)
    for command in (part, other, third):
        command.add_argument("--data", type=Path, required=True)
    child = commands.add_parser("stage", help="what `read` runs in a process of its own")
    child.add_argument("file", type=Path)
    child.add_argument("--limit", type=float, default=0.9)
    child.set_defaults(run=stage)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
