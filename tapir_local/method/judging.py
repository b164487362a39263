"""Turn scores into judgements and preference pairs, and measure how difficult a row is for a student (MFD, IFD).

Asking for judgements and reading the replies is in stages/judge.py.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from rapidfuzz.distance import Indel

from tapir_local.method.parsing import MAX_SCORE, MIN_SCORE, Scores
from tapir_local.records import Completion, Example, Judgement, PreferencePair, Scored


@dataclass(frozen=True)
class JudgedAnswer:
    """A row with the teacher's answer, the student's answer to it in round `number`, and the judgement of both."""

    row: Example
    answer: Completion
    judgement: Judgement
    number: int


def combine_orders(id: str, teacher_first: Scores | None, student_first: Scores | None, reason: str = "") -> Judgement:
    """The judgement from the scores in both orders, each (score of the answer shown first, score of the other).

    The row counts as judged only if both orders were parsed: one order alone would include the judge's position bias.
    """
    swapped = (student_first[1], student_first[0]) if student_first else None
    orders = (teacher_first, swapped)
    if teacher_first is None or swapped is None:
        return Judgement(id, None, None, orders, reason or "a reply could not be read")
    return Judgement(id, (teacher_first[0] + swapped[0]) / 2, (teacher_first[1] + swapped[1]) / 2, orders)


def combine_single(id: str, teacher: float | None, student: float | None, reason: str = "") -> Judgement:
    """The judgement from the scores of two answers judged alone; the row counts as judged only if both were parsed."""
    if teacher is None or student is None:
        return Judgement(id, None, None, reason=reason or "a reply could not be read")
    return Judgement(id, teacher, student)


def mfd(judgement: Judgement) -> float | None:
    """Model fitting difficulty: the teacher's score minus the student's, so larger is harder; None if unjudged.

    The paper (arXiv 2405.13448) prints student - teacher but keeps rows above its threshold, which is contradictory.
    Lion, the most similar method, uses teacher - student, and so do we.
    """
    if judgement.teacher is None or judgement.student is None:
        return None
    return judgement.teacher - judgement.student


def is_preferred(judgement: Judgement, margin: float) -> bool:
    """Whether the teacher's answer scores higher by more than the margin, in each order that was asked."""
    if judgement.teacher is None or judgement.student is None:
        return False
    pairs = [pair for pair in judgement.orders if pair] or [(judgement.teacher, judgement.student)]
    return all(teacher - student > margin for teacher, student in pairs)


def preference_pairs(judged: Iterable[JudgedAnswer], margin: float) -> tuple[list[PreferencePair], int]:
    """(pairs in the order of their rows, number of rows left out because the student's answer was cut).

    A pair is a row that `is_preferred`. Of a prompt that has several, the pair of the latest round counts, since its
    rejected answer is the most like what the student writes now. An answer that was cut is in no pair: its end would be
    taken for the end of an answer.
    """
    preferred = [one for one in judged if is_preferred(one.judgement, margin)]
    whole = [one for one in preferred if one.answer.finish == "stop"]
    latest = {one.row.prompt: one for one in sorted(whole, key=lambda one: one.number)}
    return [
        PreferencePair(
            **{field.name: getattr(one.row, field.name) for field in fields(Example)},
            rejected=one.answer.text,
            teacher=one.judgement.teacher or 0.0,
            student=one.judgement.student or 0.0,
            judged_in=one.number,
        )
        for one in latest.values()
    ], len(preferred) - len(whole)


def rouge_of_score(score: float | None) -> float | None:
    """The ROUGE-L, 0 to 1, that `judge_by_rouge` has turned into this score."""
    return None if score is None else (score - MIN_SCORE) / (MAX_SCORE - MIN_SCORE)


def judge_by_rouge(id: str, teacher_answer: str, student_answer: str) -> Judgement:
    """`judge: reference`: score the student's answer by its ROUGE-L with the teacher's, which counts as 10.

    1 + 9 * F1 over lower-cased words, F1 = 2*LCS/(m+n), the normalized Indel similarity. This is a rough measure: it
    rewards the same words in the same order, and does not check correctness.
    """
    similarity = Indel.normalized_similarity(teacher_answer.lower().split(), student_answer.lower().split())
    score = MIN_SCORE + (MAX_SCORE - MIN_SCORE) * (similarity if student_answer.split() else 0.0)
    return Judgement(id, MAX_SCORE, score)


def perplexity(scored: Scored) -> float:
    """exp of the mean negative log-probability per token; NaN without tokens."""
    return math.exp(-scored.logprob / scored.tokens) if scored.tokens else math.nan


def ifd(given: Scored, alone: Scored) -> float:
    """ppl(answer | instruction) / ppl(answer): 1 if the instruction does not help at all (arXiv 2308.12032, eq. 5).

    With instruction and answer exchanged it is the reversed IFD (arXiv 2402.10110, section 3.3), which is low if the
    instruction can be inferred from the answer. NaN if a text did not fit the context.
    """
    return perplexity(given) / perplexity(alone)
