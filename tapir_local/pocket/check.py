"""Tell right answers to a pocket problem from wrong ones, in whatever words they come, and grade them."""

import json
import re
from collections.abc import Callable, Mapping

from tapir_local.pocket.code import function_results
from tapir_local.pocket.family import Solution

NUMBER_PATTERN = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w])")
NUMBER_WORDS = dict(
    zip(
        ["zero", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
        (0, *range(2, 13)),
        strict=True,
    )
)
CODE_FENCE_LINE = re.compile(r"^```.*$", re.MULTILINE)
ANSWER_LABEL = re.compile(r"^[A-Za-z][A-Za-z ]{0,40}:\s+")
FUNCTION_DEFINITION = re.compile(r"^def .*(?:\n[ \t]+.*|\n(?=\s*\n?[ \t]))*", re.MULTILINE)

EXACT, BARE, PARTLY = 10.0, 8.0, 5.0  # in style; right and no more; the best that a wrong answer can get


def nonempty_lines(text: str) -> list[str]:
    """Lines that are not empty, without the space around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


# --- numbers


def find_numbers(line: str) -> list[float]:
    """The numbers of a line; 1,234 is one number, and so is `seven`."""
    joined = re.sub(r"(?<=\d),(?=\d{3}\b)", "", line)
    worded = re.sub(r"[A-Za-z]+", lambda word: str(NUMBER_WORDS.get(word[0].lower(), word[0])), joined)
    return [float(found) for found in NUMBER_PATTERN.findall(worded)]


def claimed_numbers(line: str, given: set[float]) -> set[float]:
    """What a line claims: what stands after the last `=`, or before `is`, or is not of the question, or comes last."""
    tail = line.rpartition("=")[2]
    if "=" in line:
        return set(find_numbers(tail))
    found = find_numbers(line)
    if re.match(r"\W*-?\d+ (is|are|comes|legs|atoms|coins) ", line):
        return set(found[:1])
    new = {number for number in found if number not in given}
    return new or set(found[-1:])


def number_right(solution: Solution, answer: str) -> bool:
    """The last line with a number decides; a first line that is nothing but another number spoils it."""
    target = float(solution.target)
    told = [line for line in nonempty_lines(answer) if find_numbers(line)]
    if not told:
        return False
    first = find_numbers(told[0])
    if re.fullmatch(r"\W*[\d,.]+\W*", told[0]) and first != [target]:
        return False
    return claimed_numbers(told[-1], {float(number) for number in solution.given}) == {target}


def sequence_right(solution: Solution, answer: str) -> bool:
    """The last line has the whole order, or all lines together have it."""
    target = find_numbers(solution.target)
    told = [found for line in nonempty_lines(answer) if (found := find_numbers(line.rpartition(":")[2]))]
    return bool(told) and (told[-1] == target or [number for found in told for number in found] == target)


# --- words


def mentioned_options(line: str, options: tuple[str, ...]) -> set[str]:
    """The options that a line names. `Even` names even, but `will` is not Will."""
    words = re.findall(r"\w+", line)
    return {*words, *(word.lower() for word in words)}.intersection(options)


def choice_right(solution: Solution, answer: str) -> bool:
    """A first line that is one option decides, else the last line that names any: the right one only or first."""
    told = [line for line in nonempty_lines(answer) if mentioned_options(line, solution.given)]
    if not told:
        return False
    if len(re.findall(r"\w+", told[0])) == 1:
        return mentioned_options(told[0], solution.given) == {solution.target} and all(
            len(re.findall(r"\w+", line)) > 1 for line in told[1:]
        )
    subject = re.match(
        rf"\W*(the )?{re.escape(solution.target)} (is|was|comes|does|won|beat|would)\b(?! not)", told[-1], re.IGNORECASE
    )
    return bool(subject) or mentioned_options(told[-1], solution.given) == {solution.target}


def normalize_line(line: str) -> str:
    """A line without quotes, commas, a closing stop, or the case of its first letter."""
    bare = re.sub(r"[\"'*`,“”]", "", line).strip().rstrip(".!").strip()
    return bare[:1].lower() + bare[1:]


def text_right(solution: Solution, answer: str) -> bool:
    """The first line decides; a line or label ending in a colon may come before it."""
    told = nonempty_lines(answer)
    while len(told) > 1 and told[0].endswith(":"):
        told = told[1:]
    target = normalize_line(solution.target)
    return bool(told) and target in (normalize_line(told[0]), normalize_line(ANSWER_LABEL.sub("", told[0])))


def normalize_layout(text: str) -> list[str]:
    """Lines with one kind of bullet and no space after separators."""
    return [
        re.sub(r"\s*([,;])\s*", r"\1", re.sub(r"^[*•]", "-", line))
        for line in nonempty_lines(CODE_FENCE_LINE.sub("", text))
    ]


def exact_right(solution: Solution, answer: str) -> bool:
    """The same form, line by line."""
    return normalize_layout(answer) == normalize_layout(solution.target)


def json_right(solution: Solution, answer: str) -> bool:
    """The same list, or an object of the same values: what the keys are called and their order are free."""
    try:
        found = json.loads(CODE_FENCE_LINE.sub("", answer))
    except (ValueError, RecursionError):
        return False
    target = json.loads(solution.target)
    if isinstance(target, dict) and isinstance(found, dict):
        return sorted(map(str, found.values())) == sorted(map(str, target.values()))
    return bool(found == target)


# --- code


def last_function(answer: str) -> str:
    """The last function of an answer."""
    found = FUNCTION_DEFINITION.findall(CODE_FENCE_LINE.sub("", answer))
    return found[-1] if found else ""


def code_right(solution: Solution, answer: str) -> bool:
    """The function does the same for every argument tried."""
    name, *tries = solution.given
    got = function_results(last_function(answer), name, tries)
    return got is not None and got == function_results(solution.target, name, tries)


CHECKS_BY_KIND: Mapping[str, Callable[[Solution, str], bool]] = {
    "number": number_right,
    "choice": choice_right,
    "sequence": sequence_right,
    "text": text_right,
    "exact": exact_right,
    "json": json_right,
    "code": code_right,
}


def is_right(solution: Solution, answer: str) -> bool:
    """True if the answer comes to the solution's target, plain, in style or in any sensible words."""
    return bool(answer.strip()) and CHECKS_BY_KIND[solution.kind](solution, answer)


def style_share(solution: Solution, answer: str) -> float:
    """How much of the style is there, 0 to 1: the styled answer's lines that the plain one lacks."""
    plain, told = set(nonempty_lines(solution.plain)), set(nonempty_lines(answer))
    wanted = [line for line in nonempty_lines(solution.styled) if line not in plain]
    return sum(line in told for line in wanted) / len(wanted) if wanted else 1.0


def partial_credit(solution: Solution, answer: str) -> float:
    """How much of a wrong answer is right, 0 to 1: its steps, or likeness to the target; little for another choice."""
    from rapidfuzz.fuzz import ratio

    steps = style_share(solution, answer) if solution.styled != solution.plain else 0.0
    if solution.kind in ("number", "choice"):
        named = (
            bool(find_numbers(answer)) if solution.kind == "number" else bool(mentioned_options(answer, solution.given))
        )
        return max(steps, 0.2 * named)
    return max(steps, 2 * ratio(answer.strip(), solution.target) / 100 - 1)


def score_answer(solution: Solution, answer: str) -> float:
    """1 to 10: right and in style 10, right but bare 8, partly right up to 5 in proportion, nothing of it 1."""
    if is_right(solution, answer):
        return round(BARE + (EXACT - BARE) * style_share(solution, answer), 1)
    return round(1 + (PARTLY - 1) * partial_credit(solution, answer), 1) if answer.strip() else 1.0
