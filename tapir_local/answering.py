"""A file of prompts answered by a GGUF: completions as JSON lines, in the order of the prompts."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tapir_local import __version__
from tapir_local.errors import TapirError
from tapir_local.generate import generate
from tapir_local.llama import Advice, unsaid
from tapir_local.records import Completion, Prompt, from_json, to_json
from tapir_local.room import Plan
from tapir_local.rundir import remove, sync, write_json
from tapir_local.seedfiles import read_path
from tapir_local.seedforms import KNOWN, read_row
from tapir_local.vocab_check import check_vocabulary

ADVICE = Advice(
    unusable="Name a whole GGUF of a kind that this llama.cpp knows.",
    too_large="Set --parallel or --context lower.",
    no_template="Take a GGUF with a chat template, such as an instruct model's.",
    too_heavy="Stop what else holds memory, or take a GGUF of a smaller quantisation.",
    other_base="Name an adapter that was made for this model.",
)


@dataclass(frozen=True)
class Manner:
    """How a file is answered; `context` is tokens of a prompt and its answer together."""

    max_tokens: int
    context: int
    parallel: int | None
    temperature: float
    random_seed: int
    exact: bool
    adapter: Path | None = None
    schema: Mapping[str, Any] | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answered:
    """What came of a file: answers, their tokens, and how many did not end by themselves or did not fit.

    `kept` of them were there already; `plan` is the context of the others, None where all were.
    """

    rows: int
    tokens: int
    cut: int
    too_long: int
    kept: int = 0
    plan: Plan | None = None


def answer_file(
    gguf: Path,
    prompts: Path,
    out: IO[str],
    manner: Manner,
    progress: Callable[[int, int], None] | None = None,
    done: Sequence[Completion] = (),
    tell: Callable[[str], None] = unsaid,
) -> Answered:
    """Write a Completion a line to `out`, each as soon as all before it are written; `done` are those that it has.

    TapirError when a row holds no prompt, or the GGUF or the adapter cannot be loaded.
    """
    rows, plans = read_prompts(prompts), list[Plan]()
    check_vocabulary(gguf, ADVICE)
    left = rows[len(done) :]
    ordered = InOrder(out, [id for id, _ in left])
    found = generate(
        gguf,
        [prompt for _, prompt in left],
        ids=[id for id, _ in left],
        max_tokens=manner.max_tokens,
        context=manner.context,
        parallel=manner.parallel,
        temperature=manner.temperature,
        seed=manner.random_seed,
        adapter=manner.adapter,
        exact=manner.exact,
        schema=manner.schema,
        stops=manner.stops,
        advice=ADVICE,
        each=ordered.add,
        progress=(lambda more, _: progress(len(done) + more, len(rows))) if progress else None,
        tell=tell,
        planned=plans.append,
    )
    answers = [*done, *found]
    finishes, tokens = [one.finish for one in answers], sum(one.tokens for one in answers)
    cut, too_long = finishes.count("length"), finishes.count("too_long")
    return Answered(len(answers), tokens, cut, too_long, len(done), plans[0] if plans else None)


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
def opened(path: Path | None, stdout: IO[str], task: Mapping[str, Any]) -> Iterator[tuple[IO[str], list[Completion]]]:
    """Where answers go, a file that is whole or absent or standard output, and the answers that are there already.

    A cut run leaves `<path>.partial` with the answers written so far and `<path>.partial.json` with its task; the same
    task goes on from there, another begins anew.
    """
    if path is None:
        yield stdout, []
        return
    partial, note = (path.with_name(path.name + end) for end in (".partial", ".partial.json"))
    if not (partial.exists() and note.exists() and read_json(note) == task):
        remove(partial)
        write_json(note, dict(task))
    done = kept_answers(partial)
    try:
        with partial.open("a", encoding="utf-8") as file:
            yield file, done
        sync(partial)
        partial.rename(path)
        remove(note)
        sync(path.parent)
    except OSError as error:
        fix = "Make room or mend the folder; the same command goes on from here."
        raise TapirError(f"cannot be written: {error.strerror or error}", where=str(path), fix=fix) from error


def read_json(path: Path) -> Any:
    """What a note says; None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def kept_answers(partial: Path) -> list[Completion]:
    """The whole lines of a cut file; a last one that is torn is taken off it."""
    if not partial.exists():
        return []
    text = partial.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(partial, len(whole))
    return [from_json(Completion, line, str(partial)) for line in whole.splitlines()]


def task_of(gguf: Path, prompts: Path, manner: Manner) -> dict[str, Any]:
    """What makes a run the same as another: the model, the adapter and the prompts by size and time, and the manner."""
    files = [file for file in (gguf, prompts, manner.adapter) if file is not None and file.exists()]
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    found = {"version": __version__, "files": stats, "manner": asdict(manner)}
    return dict(json.loads(json.dumps(found, default=str)))


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON schema from its file; TapirError where it is none."""
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TapirError(f"no JSON schema: {error}", where=str(path)) from error
    if not isinstance(schema, dict):
        raise TapirError("a JSON schema is an object", where=str(path))
    return schema
