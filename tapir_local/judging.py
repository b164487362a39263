"""Read what a judge, a labeller or an expander replied; turn two scores into a judgement and its MFD."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from rapidfuzz.distance import Indel

from tapir_local.records import Judgement
from tapir_local.tasks import compared

LOWEST, HIGHEST = 1.0, 10.0
PREFIX = re.compile(r"^(?:the\s+)?(?:task|label|category|answer)\s*(?:is|:|=)\s*", re.IGNORECASE)
FIRST_KEY = re.compile(r"(?:^|[_ ])(?:a|one|first)$|(?<!\d)1$")
SECOND_KEY = re.compile(r"(?:^|[_ ])(?:b|two|second)$|(?<!\d)2$")
TAGGED = re.compile(r"<(?:answer|score)_?([12])>\s*([0-9.]+)\s*</(?:answer|score)_?\1>", re.IGNORECASE)
FENCE = re.compile(r"```(?:json)?|\s")  # the marks of a code block around the object, and white space
THOUGHTS = re.compile(r"^.*</think>|<think>.*$", re.IGNORECASE | re.DOTALL)
WRAPPING = " \t\r\n`*_\"'.<>[]()"

Scores = tuple[float, float]


def parse_scores(reply: str) -> Scores | None:
    """The scores of the first and the second answer, each 1 to 10, or None where the reply does not say them.

    Reads the JSON object that prompts.judge asks for, or else the same as tags (<answer_1>8</answer_1>). The object
    must open or close the reply: one in mid-sentence may be a candidate's own text, quoted. Numbers in running text are
    never taken for scores, and a score outside the scale is refused, not clamped.
    """
    found = list(json_objects(reply))
    if not found:
        return tagged_scores(reply)
    outer = {
        scores_of(value)
        for value, start, end in found
        if not (FENCE.sub("", reply[:start]) and FENCE.sub("", reply[end:]))
    }
    return outer.pop() if len(outer) == 1 else None


def json_objects(text: str) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Every outermost JSON object in a text, with the offsets of its start and end."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield value, start, end
        start = text.find("{", end)


def scores_of(value: dict[str, Any]) -> Scores | None:
    """Two scores from an object with a key for each answer (answer_1/answer_2, first/second, a/b), or a list in it."""
    if len(value) == 1 and isinstance(pair := next(iter(value.values())), list | dict):
        return scores_of(pair) if isinstance(pair, dict) else in_range(pair)
    first = [item for key, item in value.items() if FIRST_KEY.search(key.lower())]
    second = [item for key, item in value.items() if SECOND_KEY.search(key.lower())]
    return in_range([*first, *second]) if len(first) == len(second) == 1 else None


def in_range(pair: list[Any]) -> Scores | None:
    """Two numbers of the scale, or None."""
    numbers = [number for item in pair if (number := number_of(item)) is not None]
    if len(pair) != 2 or len(numbers) != 2 or not all(LOWEST <= number <= HIGHEST for number in numbers):
        return None
    return numbers[0], numbers[1]


def number_of(item: Any) -> float | None:
    """A finite number, also when it is spelled as a string of nothing but a number."""
    if isinstance(item, bool) or not isinstance(item, int | float | str):
        return None
    try:
        number = float(item)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def tagged_scores(reply: str) -> Scores | None:
    """The tagged fallback; None unless each answer has exactly one value."""
    found = {(which, number) for which, number in TAGGED.findall(reply)}
    if sorted(which for which, _ in found) != ["1", "2"]:
        return None
    values = dict(found)
    return in_range([values["1"], values["2"]])


def parse_label(reply: str, labels: Iterable[str]) -> str | None:
    """The one label that the reply as a whole names, whatever its case and wrapping; None where it says anything more.

    A label mentioned within a sentence is not an answer: "about Music theory, not Math" is None. What a model thought
    before `</think>` is no part of its reply.
    """
    known = {compared(label): label for label in labels}
    reply = THOUGHTS.sub("", reply)
    objects = [value for value, _, _ in json_objects(reply)]
    if objects:
        said = {
            compared(str(item).strip(WRAPPING))
            for value in objects
            for key, item in value.items()
            if key.lower() in ("task", "label", "category")
        }
        return known.get(said.pop()) if len(said) == 1 else None
    bare = reply.strip(WRAPPING)
    bare = PREFIX.sub("", bare).strip(WRAPPING)
    return known.get(compared(bare))


INSTRUCTION = re.compile(r"<new_instruction>(.*?)</new_instruction>", re.IGNORECASE | re.DOTALL)


def parse_instruction(reply: str) -> str | None:
    """The text between the tags that prompts.expand asks for; None where there is not exactly one, or it is empty."""
    found = INSTRUCTION.findall(reply)
    return (found[0].strip() or None) if len(found) == 1 else None


def combine(id: str, teacher_first: Scores | None, student_first: Scores | None, reason: str = "") -> Judgement:
    """One judgement from the replies in both orders, each as (score of the answer shown first, score of the other).

    Judged only if both orders were read: an average over one order would carry the judge's bias for a position.
    """
    swapped = (student_first[1], student_first[0]) if student_first else None
    orders = (teacher_first, swapped)
    if teacher_first is None or swapped is None:
        return Judgement(id, None, None, orders, reason or "a reply could not be read")
    return Judgement(id, (teacher_first[0] + swapped[0]) / 2, (teacher_first[1] + swapped[1]) / 2, orders)


def mfd(judgement: Judgement) -> float | None:
    """Model fitting difficulty: the teacher's score less the student's, so larger is harder; None when unjudged.

    The paper (arXiv 2405.13448) prints student - teacher and yet keeps what lies above its threshold; both cannot
    hold. Lion, its nearest relative, uses teacher - student, and so do we.
    """
    if judgement.teacher is None or judgement.student is None:
        return None
    return judgement.teacher - judgement.student


def likeness(id: str, teacher_answer: str, student_answer: str) -> Judgement:
    """`judge: reference`: the student's answer scored by its ROUGE-L to the teacher's, which counts 10.

    1 + 9 * F1 over lower-cased words, F1 = 2*LCS/(m+n), the normalised Indel similarity. Rough: it rewards the same
    words in the same order and knows nothing of truth.
    """
    similarity = Indel.normalized_similarity(teacher_answer.lower().split(), student_answer.lower().split())
    score = LOWEST + (HIGHEST - LOWEST) * (similarity if student_answer.split() else 0.0)
    return Judgement(id, HIGHEST, score, ((HIGHEST, score), (HIGHEST, score)))
