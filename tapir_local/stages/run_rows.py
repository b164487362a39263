"""The rows of a run: the seeds, a round's pool, the teacher's answers, and what the student can be trained on."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapir_local import __version__
from tapir_local.data.dataset import Draft
from tapir_local.data.dedup import DedupIndex
from tapir_local.files import read_rows
from tapir_local.method.judging import JudgedAnswer
from tapir_local.records import Answer, Completion, Example, Judgement, Progress, Prompt, to_json
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import Work
from tapir_local.stages.row_check import TEXTS_PER_CHECK, StudentFormat, Unfit, unfit_answers, unfit_prompts
from tapir_local.unusable import Unusable

# Why a reply cannot be used, by its finish reason. These words are in files of existing runs.
REPLY_FAULTS = {
    "length": "cut at teacher.max_tokens",
    "content_filter": "refused by the server's filter",
    "refused": "refused by the server",
}


def read_answered_seeds(work: Work) -> list[Example]:
    """The seeds with the teacher's plain answers."""
    return read_rows(Example, work.run.path / "seeds.jsonl")


def read_known_rows(work: Work) -> list[Example]:
    """The seeds and all rows that earlier rounds trained on, each with its newest answer, sorted by id."""
    return rows_before_round(work.run, work.number)


def rows_before_round(run: RunDir, number: int) -> list[Example]:
    """As `read_known_rows`, for a round of a run."""
    rows = {row.id: row for row in read_rows(Example, run.path / "seeds.jsonl")}
    for earlier in range(1, number):
        rows |= {row.id: row for row in read_rows(Example, run.round(earlier) / "train.jsonl")}
    return sorted(rows.values(), key=lambda row: row.id)


def judged_answers(run: RunDir, numbers: Iterable[int]) -> Iterator[JudgedAnswer]:
    """The judged pool rows of some rounds, each with both answers; a row that is not in the pool any more is left out.

    The holdout is judged in other files, so none of its rows is among them.
    """
    for number in numbers:
        folder = run.round(number)
        rows = {row.id: row for row in rows_before_round(run, number)}
        answers = {answer.id: answer for answer in read_rows(Completion, folder / "answers.jsonl")}
        for judged in read_rows(Judgement, folder / "judgements.jsonl"):
            if judged.id in rows and judged.id in answers:
                yield JudgedAnswer(rows[judged.id], answers[judged.id], judged, number)


def read_pool(work: Work) -> list[Example]:
    """The pool of this round: all known rows, or a random sample of curriculum.pool rows."""
    everything = read_known_rows(work)
    size = work.recipe.curriculum.pool or len(everything)
    if size >= len(everything):
        return everything
    return sorted(work.rng("pool").sample(everything, size), key=lambda row: row.id)


def holdout_index(work: Work) -> DedupIndex:
    """A dedup index of the holdout, so that no new instruction resembles one of its rows."""
    held = DedupIndex(work.recipe.curriculum.max_rouge)
    for row in read_rows(Example, work.run.path / "holdout.jsonl"):
        held.add(row)
    return held


def make_child(parent: Example, number: int, serial: int, instruction: str, answer: str = "") -> Example:
    """The new row of round `number` that has its parent's prompt with another instruction as the last turn."""
    prompt = (*parent.prompt[:-1], replace(parent.prompt[-1], content=instruction))
    id = f"r{number}-{serial:05d}"
    return Example(id, prompt, answer, parent.task, parent.labelled_by, "expanded", parent.id, number)


def split_usable(
    work: Work, rows: Sequence[Example], check: Callable[[Sequence[Example]], list[Unfit | None]]
) -> tuple[list[Example], list[Unusable]]:
    """(the rows that pass a check, records of the others)."""
    kept, unusable = list[Example](), list[Unusable]()
    for start in range(0, len(rows), TEXTS_PER_CHECK):
        work.progress(start, len(rows), "checked with the chat template")
        some = rows[start : start + TEXTS_PER_CHECK]
        for row, unfit in zip(some, check(some), strict=True):
            if unfit is None:
                kept.append(row)
            else:
                unusable.append(work.unusable(row, unfit.kind, unfit.detail))
    return kept, unusable


def split_askable(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """(the rows that the student can be asked, the others: refused by its chat template, or too long)."""
    if not rows:
        return [], []
    student = work.backends.student_format()
    return split_usable(work, rows, lambda some: unfit_prompts(student, [row.prompt for row in some]))


def split_trainable(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """(the rows that the student can be trained on, the others: changed by its chat template, or too long)."""
    if not rows:
        return [], []
    student = work.backends.student_format()
    return split_usable(work, rows, lambda some: unfit_answers(student, [(row.prompt, row.completion) for row in some]))


def reject_unfit(work: Work, drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts; those that the student cannot be asked, or trained on if they have an answer, are rejected."""
    open_ones = [draft.example for draft in drafts if not draft.reason]
    if not open_ones:
        return list(drafts)
    found = zip(open_ones, unfit_rows(work.backends.student_format(), open_ones), strict=True)
    reasons = {row.id: unfit.reason for row, unfit in found if unfit}
    return [draft if draft.reason else replace(draft, reason=reasons.get(draft.example.id, "")) for draft in drafts]


def unfit_rows(student: StudentFormat, rows: Sequence[Example]) -> list[Unfit | None]:
    """For each row why its prompt, or its answer if it has one, cannot be used; None if both can."""
    asked = unfit_prompts(student, [row.prompt for row in rows])
    trained = unfit_answers(student, [(row.prompt, row.completion) for row in rows])
    return [
        first or (second if row.completion else None) for row, first, second in zip(rows, asked, trained, strict=True)
    ]


def answer_rows(
    work: Work, stage: str, rows: Sequence[Example], prompts: Sequence[Prompt], *, trained: bool = True
) -> tuple[list[Example], list[Unusable]]:
    """(rows with the teacher's replies to `prompts` as their completions, records of rows without a usable reply).

    A reply is usable if it is complete and, if it is to be `trained` on, fits the student.
    """
    requests = [work.request(stage, row.id, messages) for row, messages in zip(rows, prompts, strict=True)]
    found, unusable = list[Example](), list[Unusable]()
    for row, reply in zip(rows, work.ask(work.backends.teacher, requests), strict=True):
        if reply.complete:
            found.append(replace(row, completion=trim_reply(reply.text)))
        else:
            unusable.append(unusable_reply(work, row, reply))
    kept, unfit = split_trainable(work, found) if trained else (found, [])
    return kept, unusable + unfit


def trim_reply(text: str) -> str:
    """A reply without the blank lines around it.

    The indentation of the first line stays, because it may be code; a single leading space goes, because many
    tokenizers begin a reply with one.
    """
    lines = text.rstrip().split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    kept = "\n".join(lines[first:])
    return kept if kept.startswith(("  ", "\t")) else kept.lstrip()


def unusable_reply(work: Work, row: Example, reply: Answer) -> Unusable:
    """The record of a row to which the teacher gave no complete answer."""
    kind = REPLY_FAULTS.get(reply.finish, "empty reply" if not reply.text.strip() else "reply not whole")
    advice = advise_max_tokens(work) if reply.finish == "length" else ""
    return work.unusable(row, kind, reply.why or advice)


def advise_max_tokens(work: Work) -> str:
    """How to get complete answers in place of those that were cut."""
    size = 2 * work.recipe.teacher.max_tokens
    undo = f"tapir-local redo {work.run.name} --from {work.stage}" + (f" --round {work.number}" if work.number else "")
    return f"`{undo}`, then distill with --set teacher.max_tokens={size}; only the cut answers are paid again"


def resumable_task(work: Work, student: Path, texts: Iterable[Any]) -> dict[str, Any]:
    """What identifies a generation or scoring, so that an interrupted one is continued only if nothing has changed.

    It holds the GGUF's size and time, a digest of the texts (values whose JSON is their identity), and the settings.
    """
    digest, stat, settings = hashlib.sha256(), student.stat(), work.recipe.student
    for text in texts:
        digest.update(to_json(text).encode() + b"\n")
    return {
        "version": __version__,
        "student": [stat.st_size, stat.st_mtime_ns],
        "texts": digest.hexdigest(),
        "settings": [settings.max_length, settings.max_tokens, work.recipe.random_seed],
    }


def offset_progress(work: Work, done: int, total: int) -> Progress:
    """The stage's progress for a backend that is given what remains of `total` after `done`."""
    return lambda more, _, text: work.progress(done + more, total, text)
