"""Selective reflection: the teacher rewrites instruction and answer, the student keeps what suits it.

Selective Reflection-Tuning (Li et al., arXiv 2402.10110). A rewritten instruction with its answer is kept where the
student's IFD rises: the instruction helps it less, so the row has more to teach. A rewritten answer is kept where the
student's reversed IFD falls: the answer tells it more of the instruction. No judge is asked.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapir_local.data.dataset import Draft, Index, screen
from tapir_local.files import read_rows, remove_path, write_rows
from tapir_local.method import parsing, prompts
from tapir_local.method.judging import ifd
from tapir_local.method.screening import prompt_sentences, screen_instruction
from tapir_local.pipeline.context import Work, answered
from tapir_local.pipeline.rows import after, child_of, holdout_index, seeds, student_task, with_room
from tapir_local.records import Example, Message, Prompt, RoundPlan, Scored
from tapir_local.resumable import append_row, resume_writing

NOTHING = (Message("user", ""),)  # the turn without an instruction, against which a perplexity is compared
Text = tuple[Prompt, str]
Way = Callable[[Example], tuple[Text, Text]]  # what is scored, and the same without what is before it


@dataclass(frozen=True)
class Pair:
    """A row and what the teacher made of it."""

    old: Example
    new: Example


def reflect_on_instructions(work: Work, planned: RoundPlan, out: Path) -> str:
    """The rewritten instructions with their answers; those with a reason were not kept."""
    rows = reflected(work, planned)
    requests = [
        work.request("expand", row.id, prompts.reflect_instruction_prompt(row.prompt, row.completion)) for row in rows
    ]
    replies = work.ask(work.tools.teacher, requests)
    drafts = [
        rewritten(work.number, n, row, reply.text if reply.complete else "")
        for n, (row, reply) in enumerate(zip(rows, replies, strict=True))
    ]
    drafts = screened(work, with_room(work, drafts))
    by_id = {row.id: row for row in rows}
    pairs = [Pair(by_id[draft.example.parent], draft.example) for draft in drafts if not draft.reason]
    found = iter(instruction_reasons(work, pairs))
    drafts = [draft if draft.reason else replace(draft, reason=next(found)) for draft in drafts]
    write_rows(out, drafts)
    kept = sum(not draft.reason for draft in drafts)
    return f"{kept:,} of {len(rows):,} rewritten instructions kept: their IFD rose"


def reflected(work: Work, planned: RoundPlan) -> list[Example]:
    """The plan's seeds, in its order."""
    rows = {row.id: row for row in seeds(work)}
    return [rows[id] for id in planned.reflected]


def rewritten(number: int, serial: int, row: Example, reply: str) -> Draft:
    """The new instruction and answer in a reply, or why there is none."""
    found = parsing.parse_rewritten(reply)
    example = child_of(row, number, serial, *(found or ("", "")))
    return Draft(example, "" if found else "no instruction and answer in the reply")


def screened(work: Work, drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts, those that cannot be used, carry the prompt's marks or come near the holdout rejected.

    A rewriting may resemble what it rewrites, so it is not compared with the rows that are known.
    """
    held, ours = holdout_index(work), prompt_sentences(work.recipe.task_table())
    faults = [draft.reason or screen_instruction(draft.example.prompt[-1].content, "", ours) for draft in drafts]
    return [
        replace(draft, reason=fault) if fault else screen([draft.example], Index(1.0), held)[0]
        for draft, fault in zip(drafts, faults, strict=True)
    ]


def instruction_reasons(work: Work, pairs: Sequence[Pair]) -> list[str]:
    """For each pair why its new instruction is not kept, "" where it is: the student's IFD rises."""
    return [why_not(old, new) for old, new in compared(work, pairs, forwards)]


def why_not(old: float, new: float) -> str:
    """Why a rewritten instruction with this IFD is not kept, the old one's being `old`; "" where it is."""
    if math.isnan(old) or math.isnan(new):
        return "the student's IFD is not known: a text does not fit its context, or its chat template refuses it"
    return "" if new > old else f"the student's IFD does not rise: {new:.3f}, was {old:.3f}"


def reflect_on_answers(work: Work, planned: RoundPlan) -> tuple[list[Example], str]:
    """The rows to train on, each with the old or the rewritten answer; and what to say of them."""
    drafts = read_rows(Draft, work.folder / "expanded.jsonl")
    kept = {draft.example.parent: draft.example for draft in drafts if not draft.reason}
    rows = [kept.get(row.id, row) for row in reflected(work, planned)]
    asked = [prompts.reflect_answer_prompt(row.prompt, row.completion) for row in rows]
    rewritten_ones = {row.id: row for row in answered(work, "refine", rows, asked)[0]}
    pairs = [Pair(row, rewritten_ones[row.id]) for row in rows if row.id in rewritten_ones]
    better = {
        pair.old.id: pair.new
        for pair, (old, new) in zip(pairs, compared(work, pairs, backwards), strict=True)
        if new < old
    }
    chosen = [better.get(row.id, row) for row in rows]
    return chosen, f"{len(kept):,} with a rewritten instruction, {len(better):,} with a rewritten answer"


def compared(work: Work, pairs: Sequence[Pair], way: Way) -> list[tuple[float, float]]:
    """(old, new) IFD of each pair, or reversed IFD, by the last round's student."""
    rows = [row for pair in pairs for row in (pair.old, pair.new)]
    texts = [text for row in rows for text in way(row)]
    scored = score(work, texts)
    values = [ifd(scored[n], scored[n + 1]) for n in range(0, len(scored), 2)]
    return list(zip(values[::2], values[1::2], strict=True))


def score(work: Work, texts: Sequence[Text]) -> list[Scored]:
    """Log-probabilities by the last round's student. What a cut attempt at the stage has scored is not scored again."""
    student = work.run.round(work.number - 1) / "student.gguf"
    path = work.folder / f"{work.step.rpartition('/')[2]}-scores.jsonl"
    if not texts:
        return []
    with resume_writing(path, student_task(work, student, texts), Scored) as (file, done):
        known = {row.id for row in done}
        left = [number for number in range(len(texts)) if str(number) not in known]

        def keep(found: Scored) -> None:
            append_row(file, replace(found, id=str(left[int(found.id)])))
            file.flush()

        if left:
            work.tools.score(student, [texts[number] for number in left], after(work, len(done), len(texts)), keep)
    scored = {row.id: row for row in read_rows(Scored, path)}
    remove_path(path)
    return [scored[str(number)] for number in range(len(texts))]


def forwards(row: Example) -> tuple[Text, Text]:
    """The answer given the instruction, and given none."""
    return (row.prompt, row.completion), (NOTHING, row.completion)


def backwards(row: Example) -> tuple[Text, Text]:
    """The instruction given the answer, and given none."""
    asked = row.prompt[-1].content
    return (prompts.guess_instruction_prompt(row.completion), asked), (NOTHING, asked)
