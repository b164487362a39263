"""Selective reflection: the teacher rewrites instruction and answer, the student keeps what suits it.

Selective Reflection-Tuning (Li et al., arXiv 2402.10110). A rewritten instruction with its answer is kept if the
student's IFD rises: the instruction then helps it less, so the row has more to teach. A rewritten answer is kept if the
student's reversed IFD falls: the answer then tells it more about the instruction. No judge is asked.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapir_local.data.dataset import Draft, screen_drafts
from tapir_local.data.dedup import DedupIndex
from tapir_local.files import read_rows, remove_path, write_rows
from tapir_local.method import parsing, prompts
from tapir_local.method.judging import ifd
from tapir_local.method.screening import prompt_sentences, screen_instruction
from tapir_local.printable import format_count
from tapir_local.records import Example, Message, RoundPlan, Scored
from tapir_local.resumable import append_row, resume_writing
from tapir_local.stages.context import Work
from tapir_local.stages.row_check import PromptAndAnswer
from tapir_local.stages.run_rows import (
    answer_rows,
    holdout_index,
    make_child,
    offset_progress,
    read_answered_seeds,
    reject_unfit,
    resumable_task,
)

EMPTY_PROMPT = (Message("user", ""),)  # no instruction: the perplexity that IFD compares with
ScoredPair = Callable[[Example], tuple[PromptAndAnswer, PromptAndAnswer]]  # what is scored: with and without context


@dataclass(frozen=True)
class Rewrite:
    """A row and the teacher's rewriting of it."""

    old: Example
    new: Example


def reflect_on_instructions(work: Work, planned: RoundPlan, out: Path) -> str:
    """Write the rewritten instructions with their answers; a draft with a reason was not kept."""
    rows = planned_seeds(work, planned)
    requests = [
        work.request("expand", row.id, prompts.reflect_instruction_prompt(row.prompt, row.completion)) for row in rows
    ]
    replies = work.ask(work.backends.teacher, requests)
    drafts = [
        parse_rewrite(work.number, n, row, reply.text if reply.complete else "")
        for n, (row, reply) in enumerate(zip(rows, replies, strict=True))
    ]
    drafts = screen_rewrites(work, reject_unfit(work, drafts))
    by_id = {row.id: row for row in rows}
    pairs = [Rewrite(by_id[draft.example.parent], draft.example) for draft in drafts if not draft.reason]
    found = iter(rejection_reasons(work, pairs))
    drafts = [draft if draft.reason else replace(draft, reason=next(found)) for draft in drafts]
    write_rows(out, drafts)
    kept = sum(not draft.reason for draft in drafts)
    return f"{kept:,} of {format_count(len(rows), 'rewritten instruction')} kept: their IFD is higher"


def planned_seeds(work: Work, planned: RoundPlan) -> list[Example]:
    """The seeds that the plan takes, in its order."""
    rows = {row.id: row for row in read_answered_seeds(work)}
    return [rows[id] for id in planned.reflected]


def parse_rewrite(number: int, serial: int, row: Example, reply: str) -> Draft:
    """The new instruction and answer in a reply, or why there are none."""
    found = parsing.parse_rewritten(reply)
    example = make_child(row, number, serial, *(found or ("", "")))
    return Draft(example, "" if found else "no instruction and answer in the reply")


def screen_rewrites(work: Work, drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts; those that are unusable, carry the prompt's own marks or resemble the holdout are rejected.

    A rewriting may resemble what it rewrites, so it is not compared with the known rows.
    """
    held, own_words = holdout_index(work), prompt_sentences(work.recipe.task_table())
    faults = [draft.reason or screen_instruction(draft.example.prompt[-1].content, "", own_words) for draft in drafts]
    return [
        replace(draft, reason=fault) if fault else screen_drafts([draft.example], DedupIndex(1.0), held)[0]
        for draft, fault in zip(drafts, faults, strict=True)
    ]


def rejection_reasons(work: Work, pairs: Sequence[Rewrite]) -> list[str]:
    """For each pair why its new instruction is not kept; "" if it is: the student's IFD rises."""
    return [rejection_reason(old, new) for old, new in compare_ifd(work, pairs, answer_given_instruction)]


def rejection_reason(old: float, new: float) -> str:
    """Why a rewritten instruction with the IFD `new` is not kept, compared with the old one's; "" if it is kept."""
    if math.isnan(old) or math.isnan(new):
        return "the student's IFD is not known: a text does not fit its context, or its chat template refuses it"
    return "" if new > old else f"the student's IFD does not rise: {new:.3f}, was {old:.3f}"


def reflect_on_answers(work: Work, planned: RoundPlan) -> tuple[list[Example], str]:
    """(the rows to train on, each with its old or its rewritten answer, a phrase about them)."""
    drafts = read_rows(Draft, work.folder / "expanded.jsonl")
    kept = {draft.example.parent: draft.example for draft in drafts if not draft.reason}
    rows = [kept.get(row.id, row) for row in planned_seeds(work, planned)]
    asked = [prompts.reflect_answer_prompt(row.prompt, row.completion) for row in rows]
    rewritten = {row.id: row for row in answer_rows(work, "refine", rows, asked)[0]}
    pairs = [Rewrite(row, rewritten[row.id]) for row in rows if row.id in rewritten]
    better = {
        pair.old.id: pair.new
        for pair, (old, new) in zip(pairs, compare_ifd(work, pairs, instruction_given_answer), strict=True)
        if new < old
    }
    chosen = [better.get(row.id, row) for row in rows]
    return chosen, f"{len(kept):,} with a rewritten instruction, {len(better):,} with a rewritten answer"


def compare_ifd(work: Work, pairs: Sequence[Rewrite], scored_pair: ScoredPair) -> list[tuple[float, float]]:
    """(old, new) IFD of each pair, or reversed IFD, by the last round's student."""
    rows = [row for pair in pairs for row in (pair.old, pair.new)]
    texts = [text for row in rows for text in scored_pair(row)]
    scored = score_by_last_student(work, texts)
    values = [ifd(scored[n], scored[n + 1]) for n in range(0, len(scored), 2)]
    return list(zip(values[::2], values[1::2], strict=True))


def score_by_last_student(work: Work, texts: Sequence[PromptAndAnswer]) -> list[Scored]:
    """Log-probabilities by the last round's student; scores from an interrupted attempt are not computed again."""
    student = work.run.round(work.number - 1) / "student.gguf"
    path = work.folder / f"{work.stage}-scores.jsonl"
    if not texts:
        return []
    with resume_writing(path, resumable_task(work, student, texts), Scored) as (file, done):
        known = {row.id for row in done}
        left = [number for number in range(len(texts)) if str(number) not in known]

        def keep(found: Scored) -> None:
            append_row(file, replace(found, id=str(left[int(found.id)])))
            file.flush()

        if left:
            work.backends.score(
                gguf=student,
                texts=[texts[number] for number in left],
                progress=offset_progress(work, len(done), len(texts)),
                on_result=keep,
            )
    scored = {row.id: row for row in read_rows(Scored, path)}
    remove_path(path)
    return [scored[str(number)] for number in range(len(texts))]


def answer_given_instruction(row: Example) -> tuple[PromptAndAnswer, PromptAndAnswer]:
    """The answer after its instruction, and after none."""
    return (row.prompt, row.completion), (EMPTY_PROMPT, row.completion)


def instruction_given_answer(row: Example) -> tuple[PromptAndAnswer, PromptAndAnswer]:
    """The instruction after its answer, and after none."""
    asked = row.prompt[-1].content
    return (prompts.guess_instruction_prompt(row.completion), asked), (EMPTY_PROMPT, asked)
