"""Rows to examples: duplicates left out, a holdout set apart, drafts rejected that are near-duplicates or leak."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tapir_local.curriculum import shares
from tapir_local.errors import TapirError
from tapir_local.near import Index
from tapir_local.prompts import TAG
from tapir_local.records import Example, Message, instruction_of
from tapir_local.seedforms import KNOWN, Table, read_row

__all__ = ["Draft", "Index", "count_tasks", "read_seeds", "screen", "split_holdout", "without_near"]


@dataclass(frozen=True)
class Draft:
    """A new instruction or a seed, and why it was rejected: no reason means that it was kept.

    `near` is the id of the row that it resembles.
    """

    example: Example
    reason: str = ""
    near: str = ""


def read_seeds(table: Table, labels: Collection[str]) -> tuple[list[Example], list[Draft]]:
    """The examples of a table, and the exact duplicates of an earlier row's prompt; capitals and blanks do not count.

    `seed-00012` is the table's twelfth row. An error names the lines of rows of no known form or without an
    instruction, and of labels that the recipe does not know.
    """
    kept: dict[str, Example] = {}
    duplicates, empty = list[Draft](), list[int]()
    for serial, (number, row) in enumerate(table.rows, 1):
        prompt, completion = read_row(row, table.at(number))
        if not prompt or not prompt[-1].content:
            empty.append(number)
            continue
        refuse_half_letters(prompt, completion, table.at(number))
        task = known_label(row.get("task"), labels, table.at(number))
        example = Example(f"seed-{serial:05d}", prompt, completion, task, "file" if task else "")
        first = kept.setdefault(" ".join(instruction_of(prompt).split()).casefold(), example)
        if first is not example:
            duplicates.append(Draft(example, "duplicate", first.id))
    if empty:
        raise TapirError(
            f"{len(empty)} of {len(table.rows)} rows without an instruction", where=table.at(*empty), fix=KNOWN
        )
    return list(kept.values()), duplicates


def refuse_half_letters(prompt: Sequence[Message], completion: str, where: str) -> None:
    r"""TapirError for JSON's `\ud83d` without its other half, which no file and no endpoint would take."""
    try:
        for text in (completion, *(turn.content for turn in prompt)):
            text.encode()
    except UnicodeEncodeError as error:
        raise TapirError(
            f"not Unicode text: half a surrogate pair, {error.object[error.start]!a}", where=where
        ) from error


def known_label(label: Any, labels: Collection[str], where: str) -> str:
    """The label of a row, "" where it has none."""
    if not label:
        return ""
    if not isinstance(label, str) or label not in labels:
        raise TapirError(f"the recipe has no task {label!r}", where=where, fix=f"Its tasks are: {', '.join(labels)}.")
    return label


def without_near(
    examples: Sequence[Example], max_rouge: float | None, progress: Callable[[int], None] = lambda done: None
) -> tuple[list[Example], list[Draft]]:
    """The examples that resemble no earlier one, and those that do; None: all of them.

    `progress` is told now and then how many have been compared.
    """
    if max_rouge is None:
        return list(examples), []
    index, kept, rejected = Index(max_rouge), list[Example](), list[Draft]()
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
    wanted = shares(counts, {task: float(count) for task, count in counts.items()}, size)
    held = {
        example.id for task in counts for example in rng.sample(by_task[task], min(wanted.get(task, 0), counts[task]))
    }
    return [row for row in examples if row.id in held], [row for row in examples if row.id not in held]


def screen(drafts: Iterable[Example], pool: Index, holdout: Index) -> list[Draft]:
    """Keep or reject each draft in turn; a kept one is added to `pool`, so that later drafts may not resemble it."""
    return [screen_one(draft, pool, holdout) for draft in drafts]


def screen_one(draft: Example, pool: Index, holdout: Index) -> Draft:
    """Reject a draft that carries the prompt's own marks, resembles the holdout, or is a near-duplicate."""
    if TAG.search(instruction_of(draft.prompt)):
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
