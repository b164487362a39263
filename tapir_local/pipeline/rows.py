"""The rows that a round may use: the seeds, all that are known by now, and the pool of which it takes its pick."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapir_local import __version__
from tapir_local.data.dataset import Draft
from tapir_local.data.dedup import Index
from tapir_local.files import read_rows
from tapir_local.pipeline.context import Work
from tapir_local.pipeline.student_text import StudentText, Unfit, unfit_answers, unfit_prompts
from tapir_local.records import Example, Progress, to_json


def seeds(work: Work) -> list[Example]:
    """The seeds with the teacher's plain answers."""
    return read_rows(Example, work.run.path / "seeds.jsonl")


def all_known(work: Work) -> list[Example]:
    """The seeds and all that earlier rounds trained on, each with the teacher's newest answer, by id."""
    rows = {row.id: row for row in seeds(work)}
    for number in range(1, work.number):
        rows |= {row.id: row for row in read_rows(Example, work.run.round(number) / "train.jsonl")}
    return sorted(rows.values(), key=lambda row: row.id)


def pool(work: Work) -> list[Example]:
    """The rows that this round looks at: all that are known, or as many of them as the recipe says, at random."""
    everything = all_known(work)
    size = work.recipe.curriculum.pool or len(everything)
    if size >= len(everything):
        return everything
    return sorted(work.chance("pool").sample(everything, size), key=lambda row: row.id)


def child_of(parent: Example, number: int, serial: int, instruction: str, answer: str = "") -> Example:
    """The new row of round `number` whose last turn is another instruction than its parent's."""
    prompt = (*parent.prompt[:-1], replace(parent.prompt[-1], content=instruction))
    id = f"r{number}-{serial:05d}"
    return Example(id, prompt, answer, parent.task, parent.labelled_by, "expanded", parent.id, number)


def with_room(work: Work, drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts, those rejected that the student cannot be asked, or trained on where they have an answer."""
    open_ones = [draft.example for draft in drafts if not draft.reason]
    if not open_ones:
        return list(drafts)
    student = work.tools.student_text()
    reasons = {row.id: found.reason for row, found in zip(open_ones, unfit(student, open_ones), strict=True) if found}
    return [draft if draft.reason else replace(draft, reason=reasons.get(draft.example.id, "")) for draft in drafts]


def unfit(student: StudentText, rows: Sequence[Example]) -> list[Unfit | None]:
    """For each row why its prompt, or else its answer where it has one, cannot be used."""
    asked = unfit_prompts(student, [row.prompt for row in rows])
    trained = unfit_answers(student, [(row.prompt, row.completion) for row in rows])
    return [
        first or (second if row.completion else None) for row, first, second in zip(rows, asked, trained, strict=True)
    ]


def student_task(work: Work, student: Path, texts: Iterable[Any]) -> dict[str, Any]:
    """What makes work of a student's that was cut the same as now: the GGUF by size and time, the texts, the settings.

    `texts` are values whose JSON is their identity.
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


def after(work: Work, done: int, total: int) -> Progress:
    """The stage's progress, for a tool that is given what is left of `total` after the `done`."""
    return lambda more, _, said: work.progress(done + more, total, said)


def holdout_index(work: Work) -> Index:
    """The holdout, near which no new instruction may come."""
    held = Index(work.recipe.curriculum.max_rouge)
    for row in read_rows(Example, work.run.path / "holdout.jsonl"):
        held.add(row)
    return held
