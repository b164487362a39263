"""Read what a judge, a labeller or an expander replied; turn two scores into a judgement and its MFD."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from rapidfuzz.distance import Indel

from tapir_local.recipe.tasks import normalize_label
from tapir_local.records import Judgement

LOWEST, HIGHEST = 1.0, 10.0
LABEL_PREFIX = re.compile(r"^(?:the\s+)?(?:task|label|category|answer)\s*(?:is|:|=)\s*", re.IGNORECASE)
FIRST_KEY = re.compile(r"(?:^|[_ ])(?:a|one|first)$|(?<!\d)1$")
SECOND_KEY = re.compile(r"(?:^|[_ ])(?:b|two|second)$|(?<!\d)2$")
SCORE_KEY = re.compile(r"(?:^|[_ ])(?:score|rating)$")
ANSWER_SUFFIX = re.compile(
    r"[_ -]?(?:score|rating|answer|response)$"
)  # what may follow the name of an answer: answer_1_score
REMARK_KEY = re.compile(r"reason|explanation|rationale|justification|comment|feedback|note")  # a key that holds words
WRAPPER_KEY = re.compile(r"(?:^|[_ ])(?:scores?|ratings?|judge?ments?|evaluations?|results?|answers?)$")
ANSWER_NAME_KEYS = (
    "answer",
    "id",
    "name",
    "candidate",
)  # the key by which an object in a list says which answer it scores
OF_TEN = re.compile(r"([0-9.]+)\s*(?:/|out\s+of)\s*10(?:\.0)?")
TAGGED_PAIR = re.compile(
    r"<(?:answer|score)_?([12])>\s*([0-9.]+(?:\s*(?:/|out\s+of)\s*10)?)\s*</(?:answer|score)_?\1>", re.IGNORECASE
)
TAGGED_SCORE = re.compile(r"<score>\s*([0-9.]+)\s*</score>", re.IGNORECASE)
FENCE_OR_SPACE = re.compile(r"```(?:json)?|\s")  # the marks of a code block around the object, and white space
LEADING_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.IGNORECASE | re.DOTALL)
THOUGHTS = re.compile(r"^.*</think>|<think>.*$", re.IGNORECASE | re.DOTALL)
MAX_WRAPPERS = 3  # wrappers around the scores
LABEL_WRAPPING = " \t\r\n`*_\"'.<>[]()"

Scores = tuple[float, float]


def parse_scores(reply: str) -> Scores | None:
    """The scores of the first and the second answer, each 1 to 10, or None where the reply does not say them.

    Reads the JSON object that prompts.judge asks for, also where it is wrapped (see `scores_of`), a reply that is
    nothing but a list of two scores, or the same as tags (<answer_1>8</answer_1>). Each must open or close the reply:
    one in mid-sentence may be a candidate's own text, quoted. Numbers in running text are never taken for scores, and a
    score outside the scale is refused, not clamped.
    """
    reply = remove_leading_thought(reply)
    if (bare := parse_json_list(reply)) is not None:
        return extract_listed_scores(bare)
    found = list(find_json_objects(reply))
    if not found:
        return parse_tagged_scores(reply)
    outer = {extract_scores(value) for value, start, end in found if opens_or_closes(reply, start, end)}
    return outer.pop() if len(outer) == 1 else None


def parse_score(reply: str) -> float | None:
    """The score of the one answer that prompts.judge_single shows, 1 to 10; None where the reply does not say it.

    As strict as parse_scores: a JSON object with one score, or <score>8</score>, that opens or closes the reply.
    """
    reply = remove_leading_thought(reply)
    found = [(extract_score(value), start, end) for value, start, end in find_json_objects(reply)]
    found = found or [(parse_on_scale(match[1]), match.start(), match.end()) for match in TAGGED_SCORE.finditer(reply)]
    outer = {score for score, start, end in found if opens_or_closes(reply, start, end)}
    return outer.pop() if len(outer) == 1 else None


def remove_leading_thought(reply: str) -> str:
    """A reply without the thought that opens it.

    It ends at the first `</think>`: a later one may be a candidate's own text, quoted beside a planted score.
    """
    return LEADING_THOUGHT.sub("", reply, count=1)


def parse_json_list(reply: str) -> list[Any] | None:
    """The JSON list that a reply is, code block aside; None where it is anything else."""
    text = re.sub(r"```(?:json)?", "", reply).strip()
    if not text.startswith("["):
        return None
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def opens_or_closes(reply: str, start: int, end: int) -> bool:
    """Whether reply[start:end] opens or closes the reply, but for the marks of a code block."""
    return not (FENCE_OR_SPACE.sub("", reply[:start]) and FENCE_OR_SPACE.sub("", reply[end:]))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members; ValueError where a key is there twice, since neither value is the one meant."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def find_json_objects(text: str) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Every outermost JSON object in a text, with the offsets of its start and end."""
    decoder, start = json.JSONDecoder(object_pairs_hook=unique_keys), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield value, start, end
        start = text.find("{", end)


def extract_scores(value: dict[str, Any], depth: int = 0) -> Scores | None:
    """Two scores from an object: a key for each answer, or both under one key, with words beside them.

    {"answer_1": 8, "answer_2": 6} (or first/second, a/b, 1/2, answer_1_score), {"scores": {...}, "explanation": ...},
    {"scores": [8, 6]}, {"answer_1": {"score": 8, "reason": ...}, ...}. None where two places say different scores.
    """
    keyed = extract_keyed_scores(value)
    found = [keyed] if keyed else []
    if depth < MAX_WRAPPERS:
        found += [pair for inner in wrapped_values(value) if (pair := extract_wrapped_scores(inner, depth + 1))]
    return found[0] if len(set(found)) == 1 else None


def extract_keyed_scores(value: dict[str, Any]) -> Scores | None:
    """The two values whose keys name the answers; None unless there is one of each."""
    names = {
        ANSWER_SUFFIX.sub("", key.lower()): item for key, item in value.items() if not REMARK_KEY.search(key.lower())
    }
    said = [key for key in value if not REMARK_KEY.search(key.lower())]
    first = [item for key, item in names.items() if FIRST_KEY.search(key)]
    second = [item for key, item in names.items() if SECOND_KEY.search(key)]
    return parse_pair([*first, *second]) if len(first) == len(second) == 1 and len(names) == len(said) else None


def wrapped_values(value: dict[str, Any]) -> list[Any]:
    """The objects and lists in which an object holds its scores: by their key's name, or its only member."""
    held = {key: item for key, item in value.items() if isinstance(item, list | dict)}
    return [item for key, item in held.items() if len(value) == 1 or WRAPPER_KEY.search(key.lower())]


def extract_wrapped_scores(inner: Any, depth: int) -> Scores | None:
    """The scores in a wrapper."""
    return extract_scores(inner, depth) if isinstance(inner, dict) else extract_listed_scores(inner)


def extract_listed_scores(items: list[Any]) -> Scores | None:
    """The scores in a list of two: numbers in the order of the answers, or objects that name theirs."""
    if len(items) != 2:
        return None
    names = [answer_name(item) for item in items]
    if None not in names:
        return extract_keyed_scores(dict(zip(map(str, names), items, strict=True)))
    return None if any(isinstance(item, dict) for item in items) else parse_pair(items)


def answer_name(item: Any) -> str | None:
    """The answer that an object in a list names: {"answer": 1, "score": 8}."""
    named = [str(item[key]).lower() for key in ANSWER_NAME_KEYS if key in item] if isinstance(item, dict) else []
    return named[0] if len(named) == 1 else None


def extract_score(value: dict[str, Any]) -> float | None:
    """One score from an object with one key for it, or with one object that has one, and words beside it.

    {"score": 8}, {"score": "8/10"}, {"reason": "...", "overall_score": 8}, {"answer": {"score": 8, "reason": "..."}}.
    """
    scores = [item for key, item in value.items() if SCORE_KEY.search(key.lower()) and not isinstance(item, dict)]
    inner = [item for key, item in value.items() if isinstance(item, dict) and WRAPPER_KEY.search(key.lower())]
    if len(scores) + len(inner) != 1:
        return None
    score = scores[0] if scores else unwrap_score(inner[0])
    return parse_on_scale(parse_tenths(score) or score)


def parse_tenths(value: Any) -> str | None:
    """The `8` of `8/10` or `8 out of 10`; None of anything else."""
    match = OF_TEN.fullmatch(value.strip()) if isinstance(value, str) else None
    return match[1] if match else None


def parse_pair(pair: list[Any]) -> Scores | None:
    """Two scores, both written in the same way: as numbers, or both as parts of ten; None of anything else.

    An object stands for the one score in it.
    """
    plain = [unwrap_score(item) for item in pair]
    tenths = [parse_tenths(item) for item in plain]
    read = plain if not any(tenths) else tenths
    numbers = [number for item in read if (number := parse_on_scale(item)) is not None]
    return (numbers[0], numbers[1]) if len(pair) == len(numbers) == 2 else None


def unwrap_score(item: Any) -> Any:
    """The value of the one key for a score in an object; what is no object as it is."""
    if not isinstance(item, dict):
        return item
    scores = [inner for key, inner in item.items() if SCORE_KEY.search(key.lower())]
    return scores[0] if len(scores) == 1 else None


def parse_on_scale(item: Any) -> float | None:
    """A number of the scale, also when it is spelled as a string of nothing but a number; or None."""
    if isinstance(item, bool) or not isinstance(item, int | float | str):
        return None
    try:
        number = float(item)
    except (ValueError, OverflowError):
        return None
    return number if LOWEST <= number <= HIGHEST else None


def parse_tagged_scores(reply: str) -> Scores | None:
    """The tagged fallback; None unless each answer has exactly one value, side by side at an end of the reply."""
    tags = list(TAGGED_PAIR.finditer(reply))
    if sorted(tag[1] for tag in tags) != ["1", "2"] or reply[tags[0].end() : tags[1].start()].strip(" \t\r\n,;"):
        return None
    values = {tag[1]: tag[2] for tag in tags}
    return parse_pair([values["1"], values["2"]]) if opens_or_closes(reply, tags[0].start(), tags[1].end()) else None


def parse_label(reply: str, labels: Iterable[str]) -> str | None:
    """The one label that the reply as a whole names, whatever its case and wrapping; None where it says anything more.

    A label mentioned within a sentence is not an answer: "about Music theory, not Math" is None. What a model thought
    before `</think>` is no part of its reply.
    """
    known = {normalize_label(label): label for label in labels}
    reply = THOUGHTS.sub("", reply)
    objects = [value for value, _, _ in find_json_objects(reply)]
    if objects:
        said = {
            normalize_label(str(item).strip(LABEL_WRAPPING))
            for value in objects
            for key, item in value.items()
            if key.lower() in ("task", "label", "category")
        }
        return known.get(said.pop()) if len(said) == 1 else None
    bare = reply.strip(LABEL_WRAPPING)
    bare = LABEL_PREFIX.sub("", bare).strip(LABEL_WRAPPING)
    return known.get(normalize_label(bare))


NEW_INSTRUCTION = re.compile(r"<new_instruction>(.*?)</new_instruction>", re.IGNORECASE | re.DOTALL)


def parse_instruction(reply: str) -> str | None:
    """The text between the tags that prompts.expand asks for; None where there is not exactly one, or it is empty.

    What a model thought before `</think>` is no part of its reply.
    """
    found = NEW_INSTRUCTION.findall(remove_thoughts(reply, "<new_instruction>"))
    return (found[0].strip() or None) if len(found) == 1 else None


def remove_thoughts(reply: str, tag: str) -> str:
    """What follows the thoughts of a reply.

    Where no `<think>` opens the reply, a `</think>` after the last `tag` ends no thought: an answer may quote it.
    """
    rest = THOUGHTS.sub("", reply)
    return rest if tag in rest.lower() or reply.lstrip().lower().startswith("<think>") else reply


DRAFT_CHECKS = {
    "complete": "complete",
    "answerable": "answerable",
    "of_task": "of its task",
}  # a check's keys, in words


def parse_draft_check(reply: str) -> str | None:
    """What a teacher finds wrong with a new instruction, "" where nothing; None where the reply does not say it.

    Reads the JSON object that prompts.check_draft asks for, which must open or close the reply.
    """
    reply = remove_leading_thought(reply)
    outer = [value for value, start, end in find_json_objects(reply) if opens_or_closes(reply, start, end)]
    if len(outer) != 1 or not all(isinstance(outer[0].get(key), bool) for key in DRAFT_CHECKS):
        return None
    return ", ".join(f"not {words}" for key, words in DRAFT_CHECKS.items() if not outer[0][key])


NEW_ANSWER = re.compile(r"<new_answer>(.*?)</new_answer>", re.IGNORECASE | re.DOTALL)


def parse_rewritten(reply: str) -> tuple[str, str] | None:
    """(instruction, answer) between the tags that prompts.reflect_on_instruction asks for; None without one of each."""
    instruction, answers = parse_instruction(reply), NEW_ANSWER.findall(remove_thoughts(reply, "<new_answer>"))
    answer = answers[0].strip() if len(answers) == 1 else ""
    return (instruction, answer) if instruction and answer else None


def combine_orders(id: str, teacher_first: Scores | None, student_first: Scores | None, reason: str = "") -> Judgement:
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


def rouge_of_score(score: float | None) -> float | None:
    """The ROUGE-L, 0 to 1, of which `likeness` made a score."""
    return None if score is None else (score - LOWEST) / (HIGHEST - LOWEST)


def judge_by_rouge(id: str, teacher_answer: str, student_answer: str) -> Judgement:
    """`judge: reference`: the student's answer scored by its ROUGE-L to the teacher's, which counts 10.

    1 + 9 * F1 over lower-cased words, F1 = 2*LCS/(m+n), the normalised Indel similarity. Rough: it rewards the same
    words in the same order and knows nothing of truth.
    """
    similarity = Indel.normalized_similarity(teacher_answer.lower().split(), student_answer.lower().split())
    score = LOWEST + (HIGHEST - LOWEST) * (similarity if student_answer.split() else 0.0)
    return Judgement(id, HIGHEST, score)
