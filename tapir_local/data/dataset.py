"""Turn rows into examples: remove duplicates, split off the holdout, and reject near-duplicate or leaking drafts."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tapir_local.data.columns import RowFault, UnreadableRow
from tapir_local.data.dedup import DedupIndex
from tapir_local.data.formats import KNOWN_FORMATS, Table, parse_row
from tapir_local.data.similarity import extract_literals
from tapir_local.errors import TapirError
from tapir_local.method.curriculum import allocate_rows
from tapir_local.method.prompts import PROMPT_TAG
from tapir_local.printable import format_count
from tapir_local.records import Example, instruction_of

NO_INSTRUCTION = "no instruction"


@dataclass(frozen=True)
class Draft:
    """A new instruction or a seed, and why it was rejected; without a reason it was kept.

    `near` is the id of the row that it is similar to.
    """

    example: Example
    reason: str = ""
    near: str = ""


@dataclass(frozen=True)
class FaultyRow:
    """A row that cannot be read: its number in the table, the reason, and its text as JSON."""

    number: int
    fault: RowFault
    text: str


@dataclass
class ParsedSeeds:
    """The rows of a table: examples, duplicates of an earlier prompt, and rows that cannot be read.

    `unread` counts, by name, the columns and turns whose text was not read.
    """

    table: Table
    examples: list[Example] = field(default_factory=list)
    duplicates: list[Draft] = field(default_factory=list)
    faulty: list[FaultyRow] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)

    def refuse(self) -> None:
        """TapirError with the rows of the first kind of fault, if there is one."""
        if not self.faulty:
            return
        first = self.faulty[0].fault
        numbers = [row.number for row in self.faulty if row.fault.kind == first.kind]
        several = (
            f"{len(numbers)} of {len(self.table.rows)} rows: {first.kind}; the first: " if len(numbers) > 1 else ""
        )
        if first.kind == NO_INSTRUCTION:
            raise TapirError(
                f"{len(numbers)} of {format_count(len(self.table.rows), 'row')} without an instruction",
                where=self.table.at(*numbers),
                fix=KNOWN_FORMATS,
            )
        raise TapirError(several + first.said, where=self.table.at(*numbers), fix=first.fix)


def parse_seeds(table: Table, labels: Collection[str]) -> ParsedSeeds:
    """Parse the rows of a table into examples, exact duplicates of an earlier prompt, and unreadable rows.

    Prompts are compared without case and white space, except inside quotation marks. The table's twelfth row gets the
    id `seed-00012`.
    """
    found, kept = ParsedSeeds(table), dict[Any, Example]()
    for serial, (number, row) in enumerate(table.rows, 1):
        try:
            example, unread = parse_example(f"seed-{serial:05d}", row, labels)
        except RowFault as fault:
            found.faulty.append(FaultyRow(number, fault, row_as_text(row)))
            continue
        found.unread.update(dict.fromkeys(unread, 1))
        asked = instruction_of(example.prompt)
        first = kept.setdefault((" ".join(asked.split()).casefold(), extract_literals(asked)), example)
        if first is not example:
            found.duplicates.append(Draft(example, "duplicate", first.id))
    found.examples = list(kept.values())
    return found


def require_seeds(table: Table, labels: Collection[str]) -> tuple[list[Example], list[Draft]]:
    """The examples and exact duplicates of a table; TapirError with the lines of unreadable rows."""
    found = parse_seeds(table, labels)
    found.refuse()
    return found.examples, found.duplicates


def parse_example(id: str, row: Any, labels: Collection[str]) -> tuple[Example, list[str]]:
    """A row as an example, and the names of its unread texts; RowFault if it is not one."""
    prompt, completion, unread = parse_row(row)
    if not prompt:
        raise RowFault(NO_INSTRUCTION, fix=KNOWN_FORMATS)
    task = check_label(row.get("task"), labels)
    return Example(id, prompt, completion, task, "file" if task else ""), unread


def check_label(label: Any, labels: Collection[str]) -> str:
    """The label of a row, "" if it has none; RowFault if the recipe does not have it."""
    if label is None or label == "":
        return ""
    if not isinstance(label, str) or label not in labels:
        fix = f"Its tasks are: {', '.join(labels)}."
        raise RowFault("a task that the recipe does not have", f"the recipe has no task {label!r}", fix)
    return label


def row_as_text(row: Any) -> str:
    """A row as JSON; the original text if it could not be parsed, "" if it cannot be written as JSON."""
    try:
        return row.text if isinstance(row, UnreadableRow) else json.dumps(row, default=str)
    except (ValueError, TypeError, RecursionError):
        return ""


def remove_near_duplicates(
    examples: Sequence[Example], max_rouge: float | None, progress: Callable[[int], None] = lambda done: None
) -> tuple[list[Example], list[Draft]]:
    """(examples that are not similar to an earlier one, those that are); all are kept if `max_rouge` is None.

    `progress` is called every 500 rows with the number of compared rows.
    """
    if max_rouge is None:
        return list(examples), []
    index, kept, rejected = DedupIndex(max_rouge), list[Example](), list[Draft]()
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
    """(holdout, seeds): `size` random rows, with each task in proportion to its rows, and the rest; both in order."""
    by_task: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example)
    counts = {task: len(rows) for task, rows in sorted(by_task.items())}
    wanted = allocate_rows(counts, {task: float(count) for task, count in counts.items()}, size)
    held = {
        example.id for task in counts for example in rng.sample(by_task[task], min(wanted.get(task, 0), counts[task]))
    }
    return [row for row in examples if row.id in held], [row for row in examples if row.id not in held]


def screen_drafts(drafts: Iterable[Example], pool: DedupIndex, holdout: DedupIndex) -> list[Draft]:
    """Keep or reject each draft in turn; a kept one is added to `pool`, so that later drafts must differ from it."""
    return [screen_draft(draft, pool, holdout) for draft in drafts]


def screen_draft(draft: Example, pool: DedupIndex, holdout: DedupIndex) -> Draft:
    """Reject a draft that contains tags of the prompt, is similar to the holdout, or is a near-duplicate."""
    if PROMPT_TAG.search(instruction_of(draft.prompt)):
        return Draft(draft, "carries the prompt's own marks")
    if found := holdout.nearest(draft, anywhere=True):  # a leak even if the turns before the question differ
        return Draft(draft, f"near the holdout: ROUGE-L {found[1]:.2f}", found[0])
    if found := pool.nearest(draft):
        return Draft(draft, f"near-duplicate: ROUGE-L {found[1]:.2f}", found[0])
    pool.add(draft)
    return Draft(draft)


def count_tasks(examples: Iterable[Example]) -> dict[str, int]:
    """The number of rows per task, sorted by task."""
    return dict(sorted(Counter(example.task for example in examples).items()))
