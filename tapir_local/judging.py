"""Read what a judge, a labeller or an expander replied; turn two scores into a judgement and its MFD."""

import json
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
SCORE_KEY = re.compile(r"(?:^|[_ ])(?:score|rating)$")
TAGGED = re.compile(r"<(?:answer|score)_?([12])>\s*([0-9.]+)\s*</(?:answer|score)_?\1>", re.IGNORECASE)
TAGGED_ONE = re.compile(r"<score>\s*([0-9.]+)\s*</score>", re.IGNORECASE)
FENCE = re.compile(r"```(?:json)?|\s")  # the marks of a code block around the object, and white space
THOUGHTS = re.compile(r"^.*</think>|<think>.*$", re.IGNORECASE | re.DOTALL)
WRAPPING = " \t\r\n`*_\"'.<>[]()"

Scores = tuple[float, float]


def parse_scores(reply: str) -> Scores | None:
    """The scores of the first and the second answer, each 1 to 10, or None where the reply does not say them.

    Reads the JSON object that prompts.judge asks for, or else the same as tags (<answer_1>8</answer_1>). Either must
    open or close the reply: one in mid-sentence may be a candidate's own text, quoted. Numbers in running text are
    never taken for scores, and a score outside the scale is refused, not clamped.
    """
    found = list(json_objects(reply))
    if not found:
        return tagged_scores(reply)
    outer = {scores_of(value) for value, start, end in found if is_outer(reply, start, end)}
    return outer.pop() if len(outer) == 1 else None


def parse_score(reply: str) -> float | None:
    """The score of the one answer that prompts.judge_single shows, 1 to 10; None where the reply does not say it.

    As strict as parse_scores: a JSON object with one score, or <score>8</score>, that opens or closes the reply.
    """
    found = [(score_of(value), start, end) for value, start, end in json_objects(reply)]
    found = found or [(on_scale(match[1]), match.start(), match.end()) for match in TAGGED_ONE.finditer(reply)]
    outer = {score for score, start, end in found if is_outer(reply, start, end)}
    return outer.pop() if len(outer) == 1 else None


def is_outer(reply: str, start: int, end: int) -> bool:
    """Whether reply[start:end] opens or closes the reply, but for the marks of a code block."""
    return not (FENCE.sub("", reply[:start]) and FENCE.sub("", reply[end:]))


def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members; ValueError where a key is there twice, since neither value is the one meant."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def json_objects(text: str) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Every outermost JSON object in a text, with the offsets of its start and end."""
    decoder, start = json.JSONDecoder(object_pairs_hook=unambiguous), text.find("{")
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


def score_of(value: dict[str, Any]) -> float | None:
    """One score from an object with one key for it: {"score": 8}, {"reason": "...", "overall_score": 8}."""
    scores = [item for key, item in value.items() if SCORE_KEY.search(key.lower())]
    return on_scale(scores[0]) if len(scores) == 1 else None


def in_range(pair: list[Any]) -> Scores | None:
    """Two numbers of the scale, or None."""
    numbers = [number for item in pair if (number := on_scale(item)) is not None]
    return (numbers[0], numbers[1]) if len(pair) == len(numbers) == 2 else None


def on_scale(item: Any) -> float | None:
    """A number of the scale, also when it is spelled as a string of nothing but a number; or None."""
    if isinstance(item, bool) or not isinstance(item, int | float | str):
        return None
    try:
        number = float(item)
    except (ValueError, OverflowError):
        return None
    return number if LOWEST <= number <= HIGHEST else None


def tagged_scores(reply: str) -> Scores | None:
    """The tagged fallback; None unless each answer has exactly one value, side by side at an end of the reply."""
    tags = list(TAGGED.finditer(reply))
    if sorted(tag[1] for tag in tags) != ["1", "2"] or reply[tags[0].end() : tags[1].start()].strip(" \t\r\n,;"):
        return None
    values = {tag[1]: tag[2] for tag in tags}
    return in_range([values["1"], values["2"]]) if is_outer(reply, tags[0].start(), tags[1].end()) else None


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


ANSWER = re.compile(r"<new_answer>(.*?)</new_answer>", re.IGNORECASE | re.DOTALL)


def parse_rewritten(reply: str) -> tuple[str, str] | None:
    """(instruction, answer) between the tags that prompts.reflect_on_instruction asks for; None without one of each."""
    instruction, answers = parse_instruction(reply), ANSWER.findall(reply)
    answer = answers[0].strip() if len(answers) == 1 else ""
    return (instruction, answer) if instruction and answer else None


def combine(id: str, teacher_first: Scores | None, student_first: Scores | None, reason: str = "") -> Judgement:
    """One judgement from the replies in both orders, each as (score of the answer shown first, score of the other).

    Judged only if both orders were read: an average over one order would carry the judge's bias for a position.
    """
    swapped = (student_first[1], student_first[0]) if student_first else None
    orders = (teacher_first, swapped)
    if teacher_first is None or swapped is None:
        return Judgement(id, None, None, orders, reason or "a reply could not be read")
    return Judgement(id, (teacher_first[0] + swapped[0]) / 2, (teacher_first[1] + swapped[1]) / 2, orders)


def combine_single(id: str, teacher: float | None, student: float | None, reason: str = "") -> Judgement:
    """One judgement from the scores of two answers, each judged alone; judged only if both were read."""
    if teacher is None or student is None:
        return Judgement(id, None, None, reason=reason or "a reply could not be read")
    return Judgement(id, teacher, student)


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
    return Judgement(id, HIGHEST, score)
