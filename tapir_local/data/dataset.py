"""Rows to examples: duplicates left out, a holdout set apart, drafts rejected that are near-duplicates or leak."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tapir_local.data.dedup import Index
from tapir_local.data.formats import KNOWN, Table, read_whole
from tapir_local.data.likeness import literals
from tapir_local.data.text import Broken, RowFault
from tapir_local.errors import TapirError
from tapir_local.method.curriculum import allocate_rows
from tapir_local.method.prompts import PROMPT_TAG
from tapir_local.records import Example, instruction_of, noop

__all__ = [
    "Draft",
    "Index",
    "Seeds",
    "count_tasks",
    "read_seeds",
    "screen",
    "sorted_seeds",
    "split_holdout",
    "without_near",
]
NO_INSTRUCTION = "no instruction"


@dataclass(frozen=True)
class Draft:
    """A new instruction or a seed, and why it was rejected: no reason means that it was kept.

    `near` is the id of the row that it resembles.
    """

    example: Example
    reason: str = ""
    near: str = ""


@dataclass(frozen=True)
class Faulty:
    """A row that cannot be read: its number in the table, why, and its text as JSON."""

    number: int
    fault: RowFault
    text: str


@dataclass
class Seeds:
    """What a table's rows came to: examples, repetitions of an earlier prompt, and rows that cannot be read.

    `unread` counts by name the columns and turns whose text was not read.
    """

    table: Table
    examples: list[Example] = field(default_factory=list)
    duplicates: list[Draft] = field(default_factory=list)
    faulty: list[Faulty] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)

    def refuse(self, advice: str = "") -> None:
        """TapirError with all rows of the first kind of fault, and more advice; nothing where there is no fault."""
        if not self.faulty:
            return
        first = self.faulty[0].fault
        numbers = [row.number for row in self.faulty if row.fault.kind == first.kind]
        several = (
            f"{len(numbers)} of {len(self.table.rows)} rows: {first.kind}; the first: " if len(numbers) > 1 else ""
        )
        if first.kind == NO_INSTRUCTION:
            raise TapirError(
                f"{len(numbers)} of {len(self.table.rows)} rows without an instruction",
                where=self.table.at(*numbers),
                fix=KNOWN,
            )
        raise TapirError(several + first.said, where=self.table.at(*numbers), fix=first.fix)


def sorted_seeds(table: Table, labels: Collection[str]) -> Seeds:
    """The examples of a table, exact duplicates of an earlier row's prompt, and the rows that cannot be read.

    Capitals and blanks make no difference between two prompts, but for those within quotation marks. `seed-00012` is
    the table's twelfth row.
    """
    found, kept = Seeds(table), dict[Any, Example]()
    for serial, (number, row) in enumerate(table.rows, 1):
        try:
            example, unread = example_of(f"seed-{serial:05d}", row, labels)
        except RowFault as fault:
            found.faulty.append(Faulty(number, fault, shown(row)))
            continue
        found.unread.update(dict.fromkeys(unread, 1))
        asked = instruction_of(example.prompt)
        first = kept.setdefault((" ".join(asked.split()).casefold(), literals(asked)), example)
        if first is not example:
            found.duplicates.append(Draft(example, "duplicate", first.id))
    found.examples = list(kept.values())
    return found


def read_seeds(table: Table, labels: Collection[str]) -> tuple[list[Example], list[Draft]]:
    """The examples of a table, and the exact duplicates; TapirError with the lines of rows that cannot be read."""
    found = sorted_seeds(table, labels)
    found.refuse()
    return found.examples, found.duplicates


def example_of(id: str, row: Any, labels: Collection[str]) -> tuple[Example, list[str]]:
    """A row as an example, and what of its text is not read; RowFault where it is none."""
    prompt, completion, unread = read_whole(row)
    if not prompt:
        raise RowFault(NO_INSTRUCTION, fix=KNOWN)
    task = known_label(row.get("task"), labels)
    return Example(id, prompt, completion, task, "file" if task else ""), unread


def known_label(label: Any, labels: Collection[str]) -> str:
    """The label of a row, "" where it has none; RowFault where the recipe does not have it."""
    if label is None or label == "":
        return ""
    if not isinstance(label, str) or label not in labels:
        fix = f"Its tasks are: {', '.join(labels)}."
        raise RowFault("a task that the recipe does not have", f"the recipe has no task {label!r}", fix)
    return label


def shown(row: Any) -> str:
    """A row as text, for people."""
    try:
        return row.text if isinstance(row, Broken) else json.dumps(row, default=str)
    except (ValueError, TypeError, RecursionError):
        return ""


def without_near(
    examples: Sequence[Example], max_rouge: float | None, progress: Callable[[int], None] = noop
) -> tuple[list[Example], list[Draft]]:
    """The examples that resemble no earlier one, and those that do; None: all of them.

    `progress` is told now and then how many have been compared.
    """
    if max_rouge is None:
        return list(examples), []
    index, kept, rejected = Index(max_rouge), list[Example](), list[Draft]()
    index.learn(examples)
    for done, example in enumerate(examples):
        if done % 500 == 0:
            progress(done)
        if found := index.nearest(example):
            rejected.append(Draft(example, f"near-duplicate: ROUGE-L {found[1]:.2f}", found[0]))
        else:
            index.add(example)
            kept.append(example)
    return kept, rejected


def split_holdout(examples: Sequence[Example], size: int, rng: random.Random) -> tuple[list[Example], list[Example]]:
    """(holdout, seeds): `size` rows drawn at random, each task in proportion to its number, and the rest, in order."""
    by_task: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example)
    counts = {task: len(rows) for task, rows in sorted(by_task.items())}
    wanted = allocate_rows(counts, {task: float(count) for task, count in counts.items()}, size)
    held = {
        example.id for task in counts for example in rng.sample(by_task[task], min(wanted.get(task, 0), counts[task]))
    }
    return [row for row in examples if row.id in held], [row for row in examples if row.id not in held]


def screen(drafts: Iterable[Example], pool: Index, holdout: Index) -> list[Draft]:
    """Keep or reject each draft in turn; a kept one is added to `pool`, so that later drafts may not resemble it."""
    return [screen_one(draft, pool, holdout) for draft in drafts]


def screen_one(draft: Example, pool: Index, holdout: Index) -> Draft:
    """Reject a draft that carries the prompt's own marks, resembles the holdout, or is a near-duplicate."""
    if PROMPT_TAG.search(instruction_of(draft.prompt)):
        return Draft(draft, "carries the prompt's own marks")
    if found := holdout.nearest(draft, anywhere=True):  # a leak, whatever conversation the row asks in
        return Draft(draft, f"near the holdout: ROUGE-L {found[1]:.2f}", found[0])
    if found := pool.nearest(draft):
        return Draft(draft, f"near-duplicate: ROUGE-L {found[1]:.2f}", found[0])
    pool.add(draft)
    return Draft(draft)


def count_tasks(examples: Iterable[Example]) -> dict[str, int]:
    """Rows of each task, in the order of the tasks' names."""
    return dict(sorted(Counter(example.task for example in examples).items()))
