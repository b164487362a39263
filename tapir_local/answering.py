"""A file of prompts answered by a GGUF: completions as JSON lines, in the order of the prompts."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tapir_local.errors import TapirError
from tapir_local.generate import generate
from tapir_local.llama import Advice
from tapir_local.records import Completion, Prompt, to_json
from tapir_local.rundir import whole
from tapir_local.seedfiles import read_path
from tapir_local.seedforms import KNOWN, read_row

ADVICE = Advice(
    unusable="Name a whole GGUF of a kind that this llama.cpp knows.",
    too_large="Set --parallel or --context lower.",
    no_template="Take a GGUF with a chat template, such as an instruct model's.",
)


@dataclass(frozen=True)
class Manner:
    """How a file is answered; `context` is tokens of a prompt and its answer together."""

    max_tokens: int
    context: int
    parallel: int
    temperature: float
    random_seed: int
    exact: bool
    adapter: Path | None = None
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Answered:
    """What came of a file: answers, their tokens, and how many did not end by themselves or did not fit."""

    rows: int
    tokens: int
    cut: int
    too_long: int


def answer_file(
    gguf: Path, prompts: Path, out: IO[str], manner: Manner, progress: Callable[[int, int], None] | None = None
) -> Answered:
    """Write a Completion a line to `out`, each as soon as all before it are written.

    TapirError when a row holds no prompt, or the GGUF or the adapter cannot be loaded.
    """
    rows = read_prompts(prompts)
    ordered = InOrder(out, [id for id, _ in rows])
    found = generate(
        gguf,
        [prompt for _, prompt in rows],
        ids=[id for id, _ in rows],
        max_tokens=manner.max_tokens,
        context=manner.context,
        parallel=manner.parallel,
        temperature=manner.temperature,
        seed=manner.random_seed,
        adapter=manner.adapter,
        exact=manner.exact,
        schema=manner.schema,
        advice=ADVICE,
        each=ordered.add,
        progress=progress,
    )
    finishes = [completion.finish for completion in found]
    tokens = sum(completion.tokens for completion in found)
    return Answered(len(found), tokens, finishes.count("length"), finishes.count("too_long"))


def read_prompts(path: Path) -> list[tuple[str, Prompt]]:
    """(id, prompt) of every row of a file of any form that seeds may have; a row's own `id`, or its number.

    TapirError that names the rows without a prompt, or an id that two rows have.
    """
    table, found = read_path(path), list[tuple[str, Prompt]]()
    empty, seen = list[int](), dict[str, int]()
    for serial, (number, row) in enumerate(table.rows, 1):
        prompt, _ = read_row(row, table.at(number))
        if not prompt or not prompt[-1].content:
            empty.append(number)
        id = str(row.get("id") or serial)
        if id in seen:
            raise TapirError(f"two rows have the id {id!r}", where=table.at(seen[id], number), fix="Give each its own.")
        seen[id] = number
        found.append((id, prompt))
    if empty:
        raise TapirError(f"{len(empty)} of {len(found)} rows without a prompt", where=table.at(*empty), fix=KNOWN)
    return found


class InOrder:
    """Writes completions in the order of their ids, holding back those whose turn has not come."""

    def __init__(self, out: IO[str], ids: list[str]) -> None:
        self.out, self.ids, self.next = out, ids, 0
        self.waiting: dict[str, Completion] = {}

    def add(self, completion: Completion) -> None:
        """Take one, and write all whose turn it is."""
        self.waiting[completion.id] = completion
        while self.next < len(self.ids) and self.ids[self.next] in self.waiting:
            self.out.write(to_json(self.waiting.pop(self.ids[self.next])) + "\n")
            self.next += 1
        self.out.flush()


@contextmanager
def opened(path: Path | None, stdout: IO[str]) -> Iterator[IO[str]]:
    """Where answers go: a file that is whole or absent, or standard output."""
    if path is None:
        yield stdout
        return
    with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        yield file


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON schema from its file; TapirError where it is none."""
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TapirError(f"no JSON schema: {error}", where=str(path)) from error
    if not isinstance(schema, dict):
        raise TapirError("a JSON schema is an object", where=str(path))
    return schema
