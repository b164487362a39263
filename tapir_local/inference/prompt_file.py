"""A file of prompts answered by a GGUF: completions as JSON lines, in the order of the prompts."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tapir_local import __version__
from tapir_local.data.files import read_path
from tapir_local.data.formats import KNOWN, read_row
from tapir_local.errors import TapirError
from tapir_local.inference.context_plan import Plan
from tapir_local.inference.generate import generate
from tapir_local.inference.model import Advice, unsaid
from tapir_local.inference.vocab_check import check_vocabulary
from tapir_local.records import Completion, Prompt
from tapir_local.resumable import OrderedWriter, resume_writing

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
    """What came of a file: answers, their tokens, how many did not end by themselves, did not fit or were not asked.

    `kept` of them were there already; `plan` is the context of the others, None where all were.
    """

    rows: int
    tokens: int
    cut: int
    too_long: int
    refused: int = 0
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

    A row that holds no prompt is `refused`, of which `tell` is told. TapirError when no row holds one, or the GGUF or
    the adapter cannot be loaded.
    """
    rows, plans = read_prompts(prompts, tell), list[Plan]()
    check_vocabulary(gguf, ADVICE)
    left = rows[len(done) :]
    ordered = OrderedWriter[Completion](out, [id for id, _ in left])
    unasked = [Completion(id, "", "refused", 0) for id, prompt in left if not prompt]
    for completion in unasked:
        ordered.add(completion)
    asked, before = [(id, prompt) for id, prompt in left if prompt], len(done) + len(unasked)
    found = generate(
        gguf,
        [prompt for _, prompt in asked],
        ids=[id for id, _ in asked],
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
        progress=(lambda more, _: progress(before + more, len(rows))) if progress else None,
        tell=tell,
        planned=plans.append,
    )
    answers = [*done, *unasked, *found]
    finishes, tokens = [one.finish for one in answers], sum(one.tokens for one in answers)
    cut, too_long, refused = (finishes.count(word) for word in ("length", "too_long", "refused"))
    return Answered(len(answers), tokens, cut, too_long, refused, len(done), plans[0] if plans else None)


def read_prompts(path: Path, tell: Callable[[str], None] = unsaid) -> list[tuple[str, Prompt]]:
    """(id, prompt) of every row of a file of any form that seeds may have; a row's own `id`, or its number.

    The prompt is () where a row holds none; `tell` is told how many do, and what is wrong with the first. TapirError
    where no row holds one, or two rows have one id.
    """
    table, found = read_path(path), list[tuple[str, Prompt]]()
    faults, seen = list[TapirError](), dict[str, int]()
    for serial, (number, row) in enumerate(table.rows, 1):
        given = row.get("id") if isinstance(row, Mapping) else None
        id = str(serial if given in (None, "") else given)
        if id in seen:
            raise TapirError(f"two rows have the id {id!r}", where=table.at(seen[id], number), fix="Give each its own.")
        seen[id] = number
        try:
            found.append((id, prompt_of(row, table.at(number))))
        except TapirError as fault:
            faults.append(fault)
            found.append((id, ()))
    if len(faults) == len(found):
        raise faults[0]
    if faults:
        tell(f"{len(faults):,} of {len(found):,} rows cannot be asked; the first: {faults[0]}")
    return found


def prompt_of(row: Any, where: str) -> Prompt:
    """The prompt of a row; TapirError where it has none."""
    prompt, _ = read_row(row, where)
    if not prompt or not prompt[-1].content:
        raise TapirError("a row without a prompt", where=where, fix=KNOWN)
    return prompt


@contextmanager
def opened(path: Path | None, stdout: IO[str], task: Mapping[str, Any]) -> Iterator[tuple[IO[str], list[Completion]]]:
    """Where answers go, a file that is whole or absent or standard output, and the answers that are there already.

    A cut run leaves `<path>.partial` with the answers written so far and `<path>.partial.json` with its task; the same
    task goes on from there, another begins anew.
    """
    if path is None:
        yield stdout, []
        return
    with resume_writing(path, task, Completion) as kept:
        yield kept


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
