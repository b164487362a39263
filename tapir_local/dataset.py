"""Rows of text to examples: read seeds, set a holdout apart, reject what is a near-duplicate or leaks."""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rapidfuzz import process
from rapidfuzz.distance import Indel

from tapir_local.curriculum import shares
from tapir_local.errors import TapirError
from tapir_local.prompts import TAG
from tapir_local.records import Example, Message, Prompt, instruction_of

WORD = re.compile(r"\w+|[^\w\s]")
GAP = tuple(" \t\r\n,")  # between the items of an array
FIRST_CHARACTER = 0x10000  # of the private alphabet: a million words lie between here and the last code point
Row = tuple[int, dict[str, Any]]


def rows_of(text: str, where: str) -> list[Row]:
    """(line number, object) of every row of a JSON array or of JSON lines."""
    rows = list(array_rows(text, where) if text.lstrip().startswith("[") else line_rows(text, where))
    if not rows:
        raise TapirError(
            "no rows in it",
            where=where,
            fix='Each row is a JSON object such as {"instruction": "...", "input": "", "output": "..."}.',
        )
    for line, row in rows:
        if not isinstance(row, dict):
            raise TapirError(f"a row is a JSON object, this one is {type(row).__name__}", where=f"{where}, line {line}")
    return rows


def array_rows(text: str, where: str) -> Iterator[Row]:
    """The items of a JSON array, each with the line on which it starts."""
    decoder, at, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while text[at : at + 1] in GAP:
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            item, at = decoder.raw_decode(text, at)
        except ValueError as error:
            raise TapirError(f"not JSON: {error}", where=f"{where}, line {line}") from error
        yield line, item


def line_rows(text: str, where: str) -> Iterator[Row]:
    """One JSON value a line; empty lines are passed over."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise TapirError(f"not JSON: {error}", where=f"{where}, line {number}") from error


def alpaca(row: Mapping[str, Any]) -> tuple[Prompt, str]:
    """instruction, input, output."""
    given = str(row.get("input") or "").strip()
    text = str(row["instruction"] or "").strip()
    return (Message("user", f"{text}\n\n{given}" if given and text else text),), str(row.get("output") or "").strip()


def self_instruct(row: Mapping[str, Any]) -> tuple[Prompt, str]:
    """instruction and a list of instances, of which the first is taken."""
    return alpaca({"instruction": row["instruction"], **row["instances"][0]})


def prompt_completion(row: Mapping[str, Any]) -> tuple[Prompt, str]:
    """prompt and completion as strings."""
    return (Message("user", str(row["prompt"] or "").strip()),), str(row["completion"] or "").strip()


ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def conversation(turns: Sequence[Mapping[str, Any]]) -> tuple[Prompt, str]:
    """Turns up to the last user's as prompt, what follows it as completion."""
    said = [
        Message(
            ROLES[str(turn.get("role") or turn.get("from"))],
            str(turn.get("content") or turn.get("value") or "").strip(),
        )
        for turn in turns
    ]
    users = [number for number, turn in enumerate(said) if turn.role == "user"]
    if not users:
        return (), ""
    last = users[-1] + 1
    return tuple(said[:last]), said[last].content if len(said) > last else ""


# The first form whose keys a row has reads it.
FORMS: Sequence[tuple[Collection[str], Callable[[Mapping[str, Any]], tuple[Prompt, str]]]] = (
    (("instruction", "instances"), self_instruct),
    (("instruction",), alpaca),
    (("messages",), lambda row: conversation(row["messages"])),
    (("conversations",), lambda row: conversation(row["conversations"])),
    (("prompt", "completion"), prompt_completion),
)


def read_row(row: Mapping[str, Any], where: str) -> tuple[Prompt, str]:
    """The prompt and the completion of one row, whatever its form."""
    for keys, form in FORMS:
        if all(key in row for key in keys):
            try:
                return form(row)
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise TapirError(f"a row with {', '.join(keys)} that cannot be read: {error!r}", where=where) from error
    return (), ""


def read_seeds(text: str, where: str, labels: Collection[str]) -> tuple[list[Example], int]:
    """The examples of a file, exact duplicates of an instruction left out, and how many those were.

    Rows are Alpaca, self-instruct, messages, conversations (ShareGPT) or prompt/completion. An error names the lines
    of rows without an instruction, and of labels that the recipe does not know.
    """
    examples: dict[str, Example] = {}
    empty, rows = [], rows_of(text, where)
    for line, row in rows:
        prompt, completion = read_row(row, f"{where}, line {line}")
        if not prompt or not prompt[-1].content:
            empty.append(line)
            continue
        task = known_label(row.get("task"), labels, f"{where}, line {line}")
        example = Example(f"seed-{len(examples) + 1:05d}", prompt, completion, task, "file" if task else "")
        examples.setdefault(" ".join(instruction_of(prompt).split()).casefold(), example)
    if empty:
        raise TapirError(
            f"{len(empty)} of {len(rows)} rows without an instruction",
            where=f"{where}, {lines(empty)}",
            fix="A row needs an instruction, messages, conversations, or prompt and completion.",
        )
    return list(examples.values()), len(rows) - len(examples)


def lines(numbers: Sequence[int], most: int = 5) -> str:
    """`line 3`, `lines 3, 7, 9` or `lines 3, 7, 9, 12, 13 and 4 more`."""
    shown = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"line{'s' if len(numbers) > 1 else ''} {shown}{more}"


def known_label(label: Any, labels: Collection[str], where: str) -> str:
    """The label of a row, "" where it has none."""
    if not label:
        return ""
    if label not in labels:
        raise TapirError(f"the recipe has no task {label!r}", where=where, fix=f"Its tasks are: {', '.join(labels)}.")
    return str(label)


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


@dataclass(frozen=True)
class Draft:
    """A new instruction and why it was rejected; no reason means that it was kept."""

    example: Example
    reason: str = ""
    near: str = ""


class Index:
    """Instructions in a form in which ROUGE-L against all of them is quick: one character a word.

    ROUGE-L's F1 is 2*LCS/(m+n), which is the normalised Indel similarity of the two sequences of words.
    """

    def __init__(self, max_rouge: float) -> None:
        self.max_rouge = max_rouge
        self.alphabet: dict[str, str] = {}
        self.texts: list[str] = []
        self.ids: list[str] = []

    def encode(self, text: str) -> str:
        """Each word as one character, from a private alphabet that grows."""
        words = WORD.findall(text.lower())
        return "".join(self.alphabet.setdefault(word, chr(FIRST_CHARACTER + len(self.alphabet))) for word in words)

    def add(self, example: Example) -> None:
        """Make an example one that others may not resemble."""
        self.texts.append(self.encode(instruction_of(example.prompt)))
        self.ids.append(example.id)

    def nearest(self, example: Example) -> tuple[str, float] | None:
        """The id of the most similar instruction and its ROUGE-L, if that is above the limit."""
        text = self.encode(instruction_of(example.prompt))
        found = process.extractOne(text, self.texts, scorer=Indel.normalized_similarity, score_cutoff=self.max_rouge)
        return (self.ids[found[2]], found[1]) if found and found[1] > self.max_rouge else None


def screen(drafts: Iterable[Example], pool: Index, holdout: Index) -> list[Draft]:
    """Keep or reject each draft in turn; a kept one is added to `pool`, so that later drafts may not resemble it."""
    return [screen_one(draft, pool, holdout) for draft in drafts]


def screen_one(draft: Example, pool: Index, holdout: Index) -> Draft:
    """Reject a draft that carries the prompt's own marks, resembles the holdout, or is a near-duplicate."""
    if TAG.search(instruction_of(draft.prompt)):
        return Draft(draft, "carries the prompt's own marks")
    for name, index in (("near the holdout", holdout), ("near-duplicate", pool)):
        if found := index.nearest(draft):
            return Draft(draft, f"{name}: ROUGE-L {found[1]:.2f}", found[0])
    pool.add(draft)
    return Draft(draft)


def count_tasks(examples: Iterable[Example]) -> dict[str, int]:
    """Rows of each task, in the order of the tasks' names."""
    return dict(sorted(Counter(example.task for example in examples).items()))
