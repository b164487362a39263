"""Whether an answer has the form that its instruction asks for: JSON, YAML, CSV or a Markdown table."""

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence

CODE_FENCE = re.compile(r"[ \t]*```[ \t]*([\w+#.-]*)")


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(tag, content) of every code block that is closed, line by line, which takes time in proportion to the text."""
    found, tag, inside = list[tuple[str, str]](), "", list[str]()
    is_open = False
    for line in text.splitlines(keepends=True):
        fence = CODE_FENCE.match(line)
        if fence and is_open:
            found.append((tag, "".join(inside)))
            is_open = False
        elif fence:
            tag, inside, is_open = fence[1], [], True
        elif is_open:
            inside.append(line)
    return found


ASKS_FOR = (
    r"\b(?:as|in|into|to|return|output|produce|generate|create|make|write|provide|give|format|use|using|valid|with)\s"
)
FORM_ADJECTIVES = (
    r"(?:(?:a|an|the|me|only|valid|pure|raw|single|simple|nested|well-formed|markdown|form of a|form of)\s+){0,4}"
)
FORM_REQUESTS = {
    name: re.compile(rf"{ASKS}+{WORDS}{name}\b", re.IGNORECASE) for name in ("json", "yaml", "csv", "table")
}
NAMED_FORM = re.compile(r"\b(json|yaml|csv|table|xml|html|latex|sql)\b", re.IGNORECASE)
ASKS_ABOUT = re.compile(r"\s*(?:what|how|why|when|who|which|explain|describe|compare|is|are|does|do)\b", re.IGNORECASE)
# What reads or writes a form, or is another of its name: the answer may be a program, or of any form.
PROGRAM_REQUEST = re.compile(
    r"\b(?:function|script|code|program|class|method|regex|query|command|api|python|javascript|java|bash|parser?|parses?|"
    r"parsing|librar(?:y|ies)|database|schema|jsonl|json[ -]?lines|ndjson|json5|jsonp|"
    r"json (?:string|number|value|boolean)|essay|story|poem|letter|paragraph|speech|song)\b",
    re.IGNORECASE,
)
# A table to sit at, to book or to learn by heart; another table than Markdown's.
OTHER_TABLE = re.compile(
    r"\btable\s+(?:for|at|of\s+contents?|tennis|lamp|cloth|setting|top|manners|salt|talk|leg|with\s+\w+\s+chairs)\b|"
    r"\b(?:times|multiplication|periodic|water|round|dinner|dining|kitchen|coffee|wooden|truth|pool|ascii|html|latex|"
    r"excel|hash|lookup|pivot|database)[ -]table\b|\breserv|\bbook\b",
    re.IGNORECASE,
)
DRAWN_TABLE = re.compile(r"<table|\\begin\{tabular|[\u2500-\u257f]|^[ \t]*\+[-=+]{3,}|\t", re.IGNORECASE | re.MULTILINE)
TABLE_RULE = re.compile(r"\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?")
DEEPEST, LONGEST_YAML = 50, 20_000  # brackets within brackets, letters: PyYAML's time grows with their square


def check_form(instruction: str, answer: str) -> bool | None:
    """Whether the answer is the JSON, YAML, CSV or Markdown table that the instruction asks for.

    None where it asks for none of these, names more than one form, asks about one or for a program, and where a `table`
    may be another thing. A code block around the whole is allowed, and so are words around a table; of words around a
    block that has the form it is not known whether they may be there. What is in the form is not verified.
    """
    if ASKS_ABOUT.match(instruction) or PROGRAM_REQUEST.search(instruction):
        return None
    named = {word.lower() for word in NAMED_FORM.findall(instruction)}
    asked = [name for name, pattern in FORM_REQUESTS.items() if pattern.search(instruction)]
    if len(named) != 1 or not asked or (asked[0] == "table" and OTHER_TABLE.search(instruction)):
        return None
    read, blocks = FORM_CHECKS[asked[0]], code_blocks(answer)
    if len(blocks) != 1 or is_one_block(answer):
        return read(blocks[0][1] if len(blocks) == 1 else answer)
    return None if read(blocks[0][1]) is not False else read(answer)


def is_one_block(answer: str) -> bool:
    """Whether an answer is one code block and nothing else."""
    lines = answer.strip().splitlines()
    return len(lines) > 1 and bool(CODE_FENCE.match(lines[0])) and lines[-1].strip() == "```"


def is_json(text: str) -> bool:
    """An object or an array, and nothing else."""
    try:
        return isinstance(json.loads(text, parse_constant=refuse_constant), dict | list)
    except (ValueError, RecursionError):
        return False


def refuse_constant(word: str) -> None:
    """ValueError: NaN and Infinity are Python's, not JSON's."""
    raise ValueError(f"{word} is no JSON")


def is_yaml(text: str) -> bool | None:
    """Mappings or sequences: nearly any text is a scalar. Aliases are refused, which can grow without end.

    Values are not made of it: a tag may ask for anything. None where it is too long or too deep to be read in time.
    """
    import yaml

    if len(text) > LONGEST_YAML or nesting_depth(text) > DEEPEST:
        return None
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            return False
        nodes = list(yaml.compose_all(text, yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    return bool(nodes) and all(isinstance(node, yaml.CollectionNode) for node in nodes)


def nesting_depth(text: str) -> int:
    """How deep brackets stand within brackets, or lines and their dashes within one another."""
    now = most = 0
    for letter in text:
        now += (letter in "[{") - (letter in "]}" and now > 0)
        most = max(most, now)
    nested = max((len(re.findall(r"[-?:] ", line)) for line in text.splitlines()), default=0)
    indents = {len(line) - len(line.lstrip(" ")) for line in text.splitlines()}
    return max(most, nested, len(indents))


def is_csv(text: str) -> bool | None:
    """At least two rows of the same number of fields, two or more; None of one row, one column or another separator."""
    lines = text.strip().splitlines()
    try:
        rows = [row for row in csv.reader(lines, strict=True) if row]
    except csv.Error:
        return False
    widths = {len(row) for row in rows}
    if len(rows) > 1 and len(widths) == 1 and max(widths) > 1:
        return True
    if (len(rows) == 1 and max(widths) > 1) or (len(rows) > 1 and widths == {1} and has_no_sentences(lines)):
        return None
    return False


def has_no_sentences(lines: Sequence[str]) -> bool:
    """Whether no line ends as a sentence does: they may be a column of values, or fields between other separators."""
    return not any(line.rstrip().endswith((".", "!", "?", ":")) for line in lines)


def is_table(text: str) -> bool | None:
    """A head, a rule of dashes and a row, all of as many cells; None of a table that is drawn in another way."""
    lines = [line.strip() for line in text.splitlines() if "|" in line]
    widths = {len(re.split(r"(?<!\\)\|", line.strip("|"))) for line in lines}
    if len(lines) > 2 and TABLE_RULE.fullmatch(lines[1]) and len(widths) == 1:
        return True
    return None if DRAWN_TABLE.search(text) else False


FORM_CHECKS: Mapping[str, Callable[[str], bool | None]] = {
    "json": is_json,
    "yaml": is_yaml,
    "csv": is_csv,
    "table": is_table,
}
