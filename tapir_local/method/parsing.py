"""Parse the replies of judges, labelers, checkers and expanders."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tapir_local.recipe.tasks import normalize_label

MIN_SCORE, MAX_SCORE = 1.0, 10.0

LABEL_PREFIX = re.compile(
    r"^(?:the\s+)?(?:(?:best|final|correct|most fitting)\s+)?(?:task|label|category|answer|classification|class|type)"
    r"(?:\s+(?:label|category|name|type))?\s*(?:\bis\b\s*:?|[:=-])\s*",
    re.IGNORECASE,
)

LABEL_MARK = re.compile(r"^(?:[-+\u2022]|\d{1,2}[.)])\s+")  # of a list with one item

# What LLMs add to a label: `Math problem`.
LABEL_NOUN = re.compile(r"\s+(?:problem|task|question|category|instruction|request)s?$")

# The end of a label and the beginning of an explanation: `Math (arithmetic)`, `Math: arithmetic`, `Math - arithmetic`.
LABEL_END = re.compile(r"\s*(?:\n|\(|:\s|;\s|\s[-\u2013\u2014]+\s)")

WORD = re.compile(r"[^\W_]+")

# Tokens that end a turn and were written as text: </s>, <|im_end|>.
TURN_END = re.compile(r"(?:</?s>|<\|[a-z_]+\|>|<end_of_turn>)\s*$", re.IGNORECASE)

FIRST_KEY = re.compile(r"(?:^|[_ ])(?:a|one|first)$|(?<!\d)1$")

SECOND_KEY = re.compile(r"(?:^|[_ ])(?:b|two|second)$|(?<!\d)2$")

SCORE_KEY = re.compile(r"(?:^|[_ ])(?:score|rating)$")

ANSWER_SUFFIX = re.compile(
    r"[_ -]?(?:score|rating|answer|response)$"
)  # a suffix of the key of an answer: answer_1_score

REMARK_KEY = re.compile(
    r"reason|explanation|rationale|justification|comment|feedback|note"
)  # a key whose value is text

WRAPPER_KEY = re.compile(r"(?:^|[_ ])(?:scores?|ratings?|judge?ments?|evaluations?|results?|answers?)$")

ANSWER_NAME_KEYS = (
    "answer",
    "id",
    "name",
    "candidate",
)  # keys with which an object in a list names its answer

OF_TEN = re.compile(r"([0-9.]+)\s*(?:/|out\s+of)\s*10(?:\.0)?")

TAGGED_PAIR = re.compile(
    r"<(?:answer|score)_?([12])>\s*([0-9.]+(?:\s*(?:/|out\s+of)\s*10)?)\s*</(?:answer|score)_?\1>", re.IGNORECASE
)

TAGGED_SCORE = re.compile(r"<score>\s*([0-9.]+)\s*</score>", re.IGNORECASE)

FENCES_AND_SPACE = re.compile(r"(?:```(?:json)?|\s)*")  # code fences and white space around the object

LEADING_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.IGNORECASE | re.DOTALL)

THOUGHTS = re.compile(r"^.*</think>|<think>.*$", re.IGNORECASE | re.DOTALL)

MAX_NO_OBJECTS = 2_000  # braces in a reply that begin no object, such as those of code in a judge's reasons

MAX_WRAPPERS = 3  # levels of wrappers around the scores

LABEL_WRAPPING = " \t\r\n`*_#$\"'.<>[]()"

Scores = tuple[float, float]


def parse_scores(reply: str) -> Scores | None:
    """Parse the scores of the first and second answer, each 1 to 10; None if the reply does not contain them.

    Accepts the JSON object that judge_prompt asks for, also inside wrappers (see `extract_scores`), a reply that is
    a list of two scores, and tags (<answer_1>8</answer_1>). They must be at the beginning or end of the reply:
    elsewhere they may be quoted from a candidate's answer. Numbers in running text are not scores, and a score outside
    the scale is rejected, not clamped.
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
    """Parse the score, 1 to 10, that judge_single_prompt asks for; None if the reply does not contain it.

    As strict as parse_scores: a JSON object with one score, or <score>8</score>, at the beginning or end of the reply.
    """
    reply = remove_leading_thought(reply)
    found = [(extract_score(value), start, end) for value, start, end in find_json_objects(reply)]
    found = found or [(parse_on_scale(match[1]), match.start(), match.end()) for match in TAGGED_SCORE.finditer(reply)]
    outer = {score for score, start, end in found if opens_or_closes(reply, start, end)}
    return outer.pop() if len(outer) == 1 else None


def remove_leading_thought(reply: str) -> str:
    """The reply without the reasoning block at its beginning.

    The block ends at the first `</think>`: a later one may be quoted from a candidate's answer, with a planted score.
    """
    return LEADING_THOUGHT.sub("", reply, count=1)


def parse_json_list(reply: str) -> list[Any] | None:
    """The JSON list that is the whole reply, apart from code fences; None if the reply is anything else."""
    text = re.sub(r"```(?:json)?", "", reply).strip()
    if not text.startswith("["):
        return None
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def opens_or_closes(reply: str, start: int, end: int) -> bool:
    """Whether reply[start:end] is at the beginning or end of the reply, apart from code fences."""
    return bool(FENCES_AND_SPACE.fullmatch(reply, 0, start) or FENCES_AND_SPACE.fullmatch(reply, end))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object; ValueError for duplicate keys, whose intended value is unknown."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("duplicate key")
    return found


def find_json_objects(text: str) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Every outermost JSON object in a text, with the offsets of its start and end.

    The search ends at a text nested too deeply to be read, and after MAX_NO_OBJECTS braces that begin no object: trying
    each of 3,000 nested braces took minutes.
    """
    decoder, failed, start = json.JSONDecoder(object_pairs_hook=unique_keys), 0, text.find("{")
    while start >= 0 and failed < MAX_NO_OBJECTS:
        try:
            value, end = decoder.raw_decode(text, start)
        except RecursionError:
            return
        except ValueError:
            end, failed = start + 1, failed + 1
        else:
            yield value, start, end
        start = text.find("{", end)


def extract_scores(value: dict[str, Any], depth: int = 0) -> Scores | None:
    """The two scores in an object with a key for each answer, or with both under one key; keys with text are ignored.

    {"answer_1": 8, "answer_2": 6} (or first/second, a/b, 1/2, answer_1_score), {"scores": {...}, "explanation": ...},
    {"scores": [8, 6]}, {"answer_1": {"score": 8, "reason": ...}, ...}. None if two places give different scores.
    """
    keyed = extract_keyed_scores(value)
    found = [keyed] if keyed else []
    if depth < MAX_WRAPPERS:
        found += [pair for inner in wrapped_values(value) if (pair := extract_wrapped_scores(inner, depth + 1))]
    return found[0] if len(set(found)) == 1 else None


def extract_keyed_scores(value: dict[str, Any]) -> Scores | None:
    """The two scores whose keys name the answers; None unless each answer has exactly one."""
    names = {
        ANSWER_SUFFIX.sub("", key.lower()): item for key, item in value.items() if not REMARK_KEY.search(key.lower())
    }
    keys = [key for key in value if not REMARK_KEY.search(key.lower())]
    first = [item for key, item in names.items() if FIRST_KEY.search(key)]
    second = [item for key, item in names.items() if SECOND_KEY.search(key)]
    return parse_pair([*first, *second]) if len(first) == len(second) == 1 and len(names) == len(keys) else None


def wrapped_values(value: dict[str, Any]) -> list[Any]:
    """The objects and lists in an object that may contain its scores: by the name of their key, or the only member."""
    held = {key: item for key, item in value.items() if isinstance(item, list | dict)}
    return [item for key, item in held.items() if len(value) == 1 or WRAPPER_KEY.search(key.lower())]


def extract_wrapped_scores(inner: Any, depth: int) -> Scores | None:
    """The scores in a wrapper."""
    return extract_scores(inner, depth) if isinstance(inner, dict) else extract_listed_scores(inner)


def extract_listed_scores(items: list[Any]) -> Scores | None:
    """The scores in a list of two: numbers in the order of the answers, or objects that name their answer."""
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
    """The score in an object with one key for it, or with one inner object that has one; keys with text are ignored.

    {"score": 8}, {"score": "8/10"}, {"reason": "...", "overall_score": 8}, {"answer": {"score": 8, "reason": "..."}}.
    """
    scores = [item for key, item in value.items() if SCORE_KEY.search(key.lower()) and not isinstance(item, dict)]
    inner = [item for key, item in value.items() if isinstance(item, dict) and WRAPPER_KEY.search(key.lower())]
    if len(scores) + len(inner) != 1:
        return None
    score = scores[0] if scores else unwrap_score(inner[0])
    return parse_on_scale(parse_tenths(score) or score)


def parse_tenths(value: Any) -> str | None:
    """The `8` of `8/10` or `8 out of 10`; None for anything else."""
    match = OF_TEN.fullmatch(value.strip()) if isinstance(value, str) else None
    return match[1] if match else None


def parse_pair(pair: list[Any]) -> Scores | None:
    """Two scores, both written as numbers or both as `8/10`; None for anything else.

    An object counts as the one score in it.
    """
    plain = [unwrap_score(item) for item in pair]
    tenths = [parse_tenths(item) for item in plain]
    read = plain if not any(tenths) else tenths
    numbers = [number for item in read if (number := parse_on_scale(item)) is not None]
    return (numbers[0], numbers[1]) if len(pair) == len(numbers) == 2 else None


def unwrap_score(item: Any) -> Any:
    """The value of the only score key in an object; any other item unchanged."""
    if not isinstance(item, dict):
        return item
    scores = [inner for key, inner in item.items() if SCORE_KEY.search(key.lower())]
    return scores[0] if len(scores) == 1 else None


def parse_on_scale(item: Any) -> float | None:
    """A number on the scale, also from a string that is a number; None for anything else."""
    if isinstance(item, bool) or not isinstance(item, int | float | str):
        return None
    try:
        number = float(item)
    except (ValueError, OverflowError):
        return None
    return number if MIN_SCORE <= number <= MAX_SCORE else None


def parse_tagged_scores(reply: str) -> Scores | None:
    """The scores in tags; None unless each answer has exactly one, next to each other at an end of the reply."""
    tags = list(TAGGED_PAIR.finditer(reply))
    if sorted(tag[1] for tag in tags) != ["1", "2"] or reply[tags[0].end() : tags[1].start()].strip(" \t\r\n,;"):
        return None
    values = {tag[1]: tag[2] for tag in tags}
    return parse_pair([values["1"], values["2"]]) if opens_or_closes(reply, tags[0].start(), tags[1].end()) else None


def parse_label(reply: str, labels: Iterable[str]) -> str | None:
    """Parse the one label that the reply gives, whatever its case and wrapping; None if it says anything else.

    Accepts the JSON object that classify_prompt asks for, and a bare label, also with `Category:` before it, a noun
    after it (`Math problem`) or an explanation that names no other label (`Math (arithmetic)`). A label within a
    sentence is not an answer: "about Music theory, not Math" gives None. Reasoning before `</think>` is ignored.
    """
    known = {normalize_label(label): label for label in labels}
    reply = THOUGHTS.sub("", reply)
    objects = [value for value, _, _ in find_json_objects(reply)]
    if objects:
        named = {
            match_label(str(item), known)
            for value in objects
            for key, item in value.items()
            if key.lower() in ("task", "label", "category")
        }
        return named.pop() if len(named) == 1 else None
    plain = TURN_END.sub("", reply.replace("*", ""))
    bare = LABEL_MARK.sub("", plain.strip()).strip(LABEL_WRAPPING)
    bare = LABEL_PREFIX.sub("", bare).strip(LABEL_WRAPPING)
    return match_label(bare, known) or explained_label(bare, known)


def match_label(text: str, known: Mapping[str, str]) -> str | None:
    """The label that a text consists of, apart from wrapping and a noun; `known` are labels by their normal form."""
    bare = normalize_label(text.strip(LABEL_WRAPPING))
    return known.get(bare) or known.get(LABEL_NOUN.sub("", bare))


def explained_label(text: str, known: Mapping[str, str]) -> str | None:
    """The label with which a text begins, if what follows is an explanation that names no other label."""
    end = LABEL_END.search(text)
    label = match_label(text[: end.start()], known) if end else None
    return label if label and end and named_labels(text[end.start() :], known) <= {label} else None


def named_labels(text: str, known: Mapping[str, str]) -> set[str]:
    """The labels that occur in a text as whole words."""
    found = spaced_words(text)
    return {label for form, label in known.items() if spaced_words(form) in found}


def spaced_words(text: str) -> str:
    """The words of a text, in lower case and with a space around each."""
    return f" {' '.join(WORD.findall(text.casefold()))} "


def label_fault(reply: str, labels: Iterable[str]) -> str:
    """Why `parse_label` finds no label in a reply, in words that are the same for all such replies."""
    named = named_labels(THOUGHTS.sub("", reply), {normalize_label(label): label for label in labels})
    if not reply.strip():
        return "empty"
    return (
        "name several tasks" if len(named) > 1 else "name a task in a sentence" if named else "name no task of the list"
    )


NEW_INSTRUCTION = re.compile(r"<new_instruction>(.*?)</new_instruction>", re.IGNORECASE | re.DOTALL)


def parse_instruction(reply: str) -> str | None:
    """Parse the text between the tags that expand_prompt asks for; None unless there is exactly one, with text.

    Reasoning before `</think>` is ignored.
    """
    found = NEW_INSTRUCTION.findall(remove_thoughts(reply, "<new_instruction>"))
    return (found[0].strip() or None) if len(found) == 1 else None


def remove_thoughts(reply: str, tag: str) -> str:
    """The reply without its reasoning.

    In a reply that does not begin with `<think>`, a `</think>` after the last `tag` is kept: an answer may quote it.
    """
    rest = THOUGHTS.sub("", reply)
    return rest if tag in rest.lower() or reply.lstrip().lower().startswith("<think>") else reply


DRAFT_CHECKS = {
    "complete": "complete",
    "answerable": "answerable",
    "of_task": "of its task",
}  # the keys of a check, in words


def parse_draft_check(reply: str) -> str | None:
    """Parse what a teacher finds wrong with a new instruction: "" for nothing, None if the reply does not say.

    The reply must begin or end with the JSON object that check_draft_prompt asks for.
    """
    reply = remove_leading_thought(reply)
    outer = [value for value, start, end in find_json_objects(reply) if opens_or_closes(reply, start, end)]
    if len(outer) != 1 or not all(isinstance(outer[0].get(key), bool) for key in DRAFT_CHECKS):
        return None
    return ", ".join(f"not {words}" for key, words in DRAFT_CHECKS.items() if not outer[0][key])


NEW_ANSWER = re.compile(r"<new_answer>(.*?)</new_answer>", re.IGNORECASE | re.DOTALL)


def parse_rewritten(reply: str) -> tuple[str, str] | None:
    """Parse (instruction, answer) from the tags that reflect_instruction_prompt asks for; None unless one of each."""
    instruction, answers = parse_instruction(reply), NEW_ANSWER.findall(remove_thoughts(reply, "<new_answer>"))
    answer = answers[0].strip() if len(answers) == 1 else ""
    return (instruction, answer) if instruction and answer else None
