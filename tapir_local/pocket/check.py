"""Check whether an answer to a pocket problem is right, in any wording, and grade it."""

import json
import re
from collections.abc import Callable, Mapping

from tapir_local.pocket.code import function_results
from tapir_local.pocket.family import Solution

NUMBER_PATTERN = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w])")
POCKET_NUMBER_WORDS = dict(
    zip(
        ["zero", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
        (0, *range(2, 13)),
        strict=True,
    )
)
CODE_FENCE_LINE = re.compile(r"^```.*$", re.MULTILINE)
ANSWER_LABEL = re.compile(r"^[A-Za-z][A-Za-z ]{0,40}:\s+")
FUNCTION_DEFINITION = re.compile(r"^def .*(?:\n[ \t]+.*|\n(?=\s*\n?[ \t]))*", re.MULTILINE)

STYLED_SCORE, PLAIN_SCORE = 10.0, 8.0  # of a right answer, in style or not
MAX_WRONG_SCORE = 5.0


def nonempty_lines(text: str) -> list[str]:
    """The lines that are not empty, without the space around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


# --- numbers


def find_numbers(line: str) -> list[float]:
    """The numbers in a line; `1,234` and `seven` are one number each."""
    joined = re.sub(r"(?<=\d),(?=\d{3}\b)", "", line)
    worded = re.sub(r"[A-Za-z]+", lambda word: str(POCKET_NUMBER_WORDS.get(word[0].lower(), word[0])), joined)
    return [float(found) for found in NUMBER_PATTERN.findall(worded)]


def claimed_numbers(line: str, given: set[float]) -> set[float]:
    """The numbers that a line gives as its result.

    These are the numbers after the last `=`; else the first one if a word such as `is` follows it; else those that are
    not in the question; else the last one.
    """
    tail = line.rpartition("=")[2]
    if "=" in line:
        return set(find_numbers(tail))
    found = find_numbers(line)
    if re.match(r"\W*-?\d+ (is|are|comes|legs|atoms|coins) ", line):
        return set(found[:1])
    new = {number for number in found if number not in given}
    return new or set(found[-1:])


def number_right(solution: Solution, answer: str) -> bool:
    """The last line with a number decides; a first line that is only another number makes the answer wrong."""
    target = float(solution.target)
    lines = [line for line in nonempty_lines(answer) if find_numbers(line)]
    if not lines:
        return False
    first = find_numbers(lines[0])
    if re.fullmatch(r"\W*[\d,.]+\W*", lines[0]) and first != [target]:
        return False
    return claimed_numbers(lines[-1], {float(number) for number in solution.given}) == {target}


def sequence_right(solution: Solution, answer: str) -> bool:
    """The last line must have the whole sequence, or all lines together."""
    target = find_numbers(solution.target)
    lines = [found for line in nonempty_lines(answer) if (found := find_numbers(line.rpartition(":")[2]))]
    return bool(lines) and (lines[-1] == target or [number for found in lines for number in found] == target)


# --- words


def mentioned_options(line: str, options: tuple[str, ...]) -> set[str]:
    """The options that a line names. `Even` names even, but `will` does not name Will."""
    words = re.findall(r"\w+", line)
    return {*words, *(word.lower() for word in words)}.intersection(options)


def choice_right(solution: Solution, answer: str) -> bool:
    """A first line of one word decides; otherwise the last line with options must name the right one only or first."""
    lines = [line for line in nonempty_lines(answer) if mentioned_options(line, solution.given)]
    if not lines:
        return False
    if len(re.findall(r"\w+", lines[0])) == 1:
        return mentioned_options(lines[0], solution.given) == {solution.target} and all(
            len(re.findall(r"\w+", line)) > 1 for line in lines[1:]
        )
    subject = re.match(
        rf"\W*(the )?{re.escape(solution.target)} (is|was|comes|does|won|beat|would)\b(?! not)",
        lines[-1],
        re.IGNORECASE,
    )
    return bool(subject) or mentioned_options(lines[-1], solution.given) == {solution.target}


def normalize_line(line: str) -> str:
    """A line without quotes, commas and closing punctuation, and with its first letter in lower case."""
    bare = re.sub(r"[\"'*`,“”]", "", line).strip().rstrip(".!").strip()
    return bare[:1].lower() + bare[1:]


def text_right(solution: Solution, answer: str) -> bool:
    """The first line decides; a line or a label that ends in a colon may come before it."""
    lines = nonempty_lines(answer)
    while len(lines) > 1 and lines[0].endswith(":"):
        lines = lines[1:]
    target = normalize_line(solution.target)
    return bool(lines) and target in (normalize_line(lines[0]), normalize_line(ANSWER_LABEL.sub("", lines[0])))


def normalize_layout(text: str) -> list[str]:
    """The lines with one kind of bullet and no space around separators."""
    return [
        re.sub(r"\s*([,;])\s*", r"\1", re.sub(r"^[*•]", "-", line))
        for line in nonempty_lines(CODE_FENCE_LINE.sub("", text))
    ]


def exact_right(solution: Solution, answer: str) -> bool:
    """The answer must have the same layout, line by line."""
    return normalize_layout(answer) == normalize_layout(solution.target)


def json_right(solution: Solution, answer: str) -> bool:
    """The answer must be the same list, or an object with the same values; names and order of keys are free."""
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
    """The source of the last function in an answer, or ""."""
    found = FUNCTION_DEFINITION.findall(CODE_FENCE_LINE.sub("", answer))
    return found[-1] if found else ""


def code_right(solution: Solution, answer: str) -> bool:
    """The function must return the same for every argument."""
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
    """Whether the answer has the solution's target, plain, in style or in any other sensible wording."""
    return bool(answer.strip()) and CHECKS_BY_KIND[solution.kind](solution, answer)


def style_share(solution: Solution, answer: str) -> float:
    """How much of the style an answer has, 0 to 1: its share of the styled lines that the plain answer lacks."""
    plain, lines = set(nonempty_lines(solution.plain)), set(nonempty_lines(answer))
    wanted = [line for line in nonempty_lines(solution.styled) if line not in plain]
    return sum(line in lines for line in wanted) / len(wanted) if wanted else 1.0


def partial_credit(solution: Solution, answer: str) -> float:
    """How much of a wrong answer is right, 0 to 1: its steps or its similarity to the target."""
    from rapidfuzz.fuzz import ratio

    steps = style_share(solution, answer) if solution.styled != solution.plain else 0.0
    if solution.kind in ("number", "choice"):
        named = (
            bool(find_numbers(answer)) if solution.kind == "number" else bool(mentioned_options(answer, solution.given))
        )
        return max(steps, 0.2 * named)
    return max(steps, 2 * ratio(answer.strip(), solution.target) / 100 - 1)


def score_answer(solution: Solution, answer: str) -> float:
    """1 to 10: right and in style 10, right but plain 8, partly right up to 5 in proportion, otherwise 1."""
    if is_right(solution, answer):
        return round(PLAIN_SCORE + (STYLED_SCORE - PLAIN_SCORE) * style_share(solution, answer), 1)
    return round(1 + (MAX_WRONG_SCORE - 1) * partial_credit(solution, answer), 1) if answer.strip() else 1.0
