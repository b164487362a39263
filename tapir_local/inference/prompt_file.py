"""Answer a file of prompts with a GGUF: completions as JSON lines, in the order of the prompts."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tapir_local import __version__
from tapir_local.data.files import read_path
from tapir_local.data.formats import KNOWN_FORMATS, require_row
from tapir_local.errors import TapirError
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.context_plan import ContextPlan
from tapir_local.inference.generate import Callbacks, complete_prompts
from tapir_local.inference.model import Advice, ignore_message, open_model
from tapir_local.inference.vocab_check import check_vocabulary
from tapir_local.printable import format_count
from tapir_local.records import Completion, Prompt
from tapir_local.resumable import OrderedWriter, resume_writing

PROMPT_FILE_ADVICE = Advice(
    unusable="Name a whole GGUF of a kind that this llama.cpp supports.",
    too_large="Set --parallel or --context lower.",
    no_template="Use a GGUF with a chat template, such as an instruct model's.",
    too_heavy="Close other programs, or use a GGUF with a smaller quantization.",
    other_base="Name an adapter that was made for this model.",
)


@dataclass(frozen=True)
class PromptFileJob:
    """A GGUF, perhaps with an adapter, the file of prompts that it answers, and how."""

    gguf: Path
    prompts: Path
    config: GenerationConfig
    adapter: Path | None = None


@dataclass(frozen=True)
class AnsweredFile:
    """Counts of a file's answers: all, their tokens, those cut at the limit, too long for the context, and refused.

    `kept` of the answers were there already. `plan` is the context plan of the others, None if there were none.
    """

    rows: int
    tokens: int
    cut: int
    too_long: int
    refused: int = 0
    kept: int = 0
    plan: ContextPlan | None = None


def answer_file(
    job: PromptFileJob,
    out: IO[str],
    progress: Callable[[int, int], None] | None = None,
    done: Sequence[Completion] = (),
    warn: Callable[[str], None] = ignore_message,
) -> AnsweredFile:
    """Write a Completion per line to `out`, each as soon as all before it are written; `done` are already there.

    A row without a prompt gets the finish `refused`, and a warning. TapirError if no row has a prompt, or the GGUF or
    the adapter cannot be loaded.
    """
    rows = read_prompts(job.prompts, warn)
    check_vocabulary(job.gguf, PROMPT_FILE_ADVICE)
    left = rows[len(done) :]
    ordered = OrderedWriter[Completion](out, [id for id, _ in left])
    unasked = [Completion(id, "", "refused", 0) for id, prompt in left if not prompt]
    for completion in unasked:
        ordered.add(completion)
    asked, before = [(id, prompt) for id, prompt in left if prompt], len(done) + len(unasked)
    plans = list[ContextPlan]()
    found = complete_rows(
        job,
        asked,
        Callbacks(
            result=ordered.add,
            progress=(lambda more, _: progress(before + more, len(rows))) if progress else None,
            warn=warn,
            plan=plans.append,
        ),
    )
    return count_answers([*done, *unasked, *found], len(done), plans[0] if plans else None)


def complete_rows(
    job: PromptFileJob, rows: Sequence[tuple[str, Prompt]], callbacks: Callbacks[Completion]
) -> list[Completion]:
    """Answer (id, prompt) rows; the GGUF is not opened if there are none."""
    if not rows:
        return []
    with open_model(job.gguf, adapter=job.adapter, advice=PROMPT_FILE_ADVICE, warn=callbacks.warn) as model:
        ids, prompts = [id for id, _ in rows], [prompt for _, prompt in rows]
        return complete_prompts(model, prompts, job.config, ids, callbacks)


def count_answers(answers: Sequence[Completion], kept: int, plan: ContextPlan | None) -> AnsweredFile:
    """The counts of a file's answers."""
    finishes, tokens = [one.finish for one in answers], sum(one.tokens for one in answers)
    cut, too_long, refused = (finishes.count(word) for word in ("length", "too_long", "refused"))
    return AnsweredFile(len(answers), tokens, cut, too_long, refused, kept, plan)


def read_prompts(path: Path, warn: Callable[[str], None] = ignore_message) -> list[tuple[str, Prompt]]:
    """(id, prompt) of every row of a file in any format that seeds may have; the id is the row's own or its number.

    The prompt is () if a row has none; `warn` gets the number of such rows and the first one's error. TapirError if no
    row has a prompt, or two rows have the same id.
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
            found.append((id, prompt_of_row(row, table.at(number))))
        except TapirError as fault:
            faults.append(fault)
            found.append((id, ()))
    if len(faults) == len(found):
        raise faults[0]
    if faults:
        warn(f"{len(faults):,} of {format_count(len(found), 'row')} cannot be asked; the first: {faults[0]}")
    return found


def prompt_of_row(row: Any, where: str) -> Prompt:
    """The prompt of a row; TapirError if it has none."""
    prompt, _ = require_row(row, where)
    if not prompt or not prompt[-1].content:
        raise TapirError("a row without a prompt", where=where, fix=KNOWN_FORMATS)
    return prompt


@contextmanager
def open_answers(
    path: Path | None, stdout: IO[str], task: Mapping[str, Any]
) -> Iterator[tuple[IO[str], list[Completion]]]:
    """The file to write answers to, whole or absent in the end, or standard output; and the answers already there.

    An interrupted run leaves `<path>.partial` with the answers written so far and `<path>.partial.json` with its task.
    The same task resumes from there; another task starts again.
    """
    if path is None:
        yield stdout, []
        return
    with resume_writing(path, task, Completion) as kept:
        yield kept


def generation_task(job: PromptFileJob) -> dict[str, Any]:
    """What identifies a run: version, model, adapter and prompts by size and time, and the settings.

    The names are those that earlier versions wrote: a run that they left unfinished is resumed.
    """
    files = [file for file in (job.gguf, job.prompts, job.adapter) if file is not None and file.exists()]
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    config = job.config
    manner = {
        "max_tokens": config.max_tokens,
        "context": config.context,
        "parallel": config.parallel,
        "temperature": config.temperature,
        "random_seed": config.seed,
        "exact": config.exact,
        "adapter": job.adapter,
        "schema": config.schema,
        "stops": config.stops,
    }
    found = {"version": __version__, "files": stats, "manner": manner}
    return dict(json.loads(json.dumps(found, default=str)))


def read_json_schema(path: Path) -> dict[str, Any]:
    """Read a JSON schema; TapirError if the file has none."""
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TapirError(f"no JSON schema: {error}", where=str(path)) from error
    if not isinstance(schema, dict):
        raise TapirError("a JSON schema is an object", where=str(path))
    return schema
