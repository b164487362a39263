"""Check that an answer has the format that its instruction asks for: JSON, YAML, CSV or a Markdown table."""

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence

CODE_FENCE = re.compile(r"[ \t]*```[ \t]*([\w+#.-]*)")


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(tag, content) of every closed code block, read line by line in linear time."""
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
    name: re.compile(rf"{ASKS_FOR}+{FORM_ADJECTIVES}{name}\b", re.IGNORECASE)
    for name in ("json", "yaml", "csv", "table")
}
NAMED_FORM = re.compile(r"\b(json|yaml|csv|table|xml|html|latex|sql)\b", re.IGNORECASE)
ASKS_ABOUT = re.compile(r"\s*(?:what|how|why|when|who|which|explain|describe|compare|is|are|does|do)\b", re.IGNORECASE)
# What reads or writes a format, or has a similar name: the answer may be a program, or have any format.
PROGRAM_REQUEST = re.compile(
    r"\b(?:function|script|code|program|class|method|regex|query|command|api|python|javascript|java|bash|parser?|parses?|"
    r"parsing|librar(?:y|ies)|database|schema|jsonl|json[ -]?lines|ndjson|json5|jsonp|"
    r"json (?:string|number|value|boolean)|essay|story|poem|letter|paragraph|speech|song)\b",
    re.IGNORECASE,
)
# Furniture, reservations, multiplication tables, and tables in formats other than Markdown.
OTHER_TABLE = re.compile(
    r"\btable\s+(?:for|at|of\s+contents?|tennis|lamp|cloth|setting|top|manners|salt|talk|leg|with\s+\w+\s+chairs)\b|"
    r"\b(?:times|multiplication|periodic|water|round|dinner|dining|kitchen|coffee|wooden|truth|pool|ascii|html|latex|"
    r"excel|hash|lookup|pivot|database)[ -]table\b|\breserv|\bbook\b",
    re.IGNORECASE,
)
DRAWN_TABLE = re.compile(r"<table|\\begin\{tabular|[\u2500-\u257f]|^[ \t]*\+[-=+]{3,}|\t", re.IGNORECASE | re.MULTILINE)
TABLE_RULE = re.compile(r"\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?")
MAX_DEPTH, MAX_YAML_LENGTH = 50, 20_000  # levels of brackets, characters: PyYAML's time grows with their square


def check_form(instruction: str, answer: str) -> bool | None:
    """Whether the answer is the JSON, YAML, CSV or Markdown table that the instruction asks for.

    None if it asks for none of these, names several formats, asks about a format or for a program, or if `table` may
    mean something else. A code block around the whole answer is allowed, and text around a table. None if there is text
    around a code block that has the format. The content is not verified.
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
    """Whether an answer is a single code block and nothing else."""
    lines = answer.strip().splitlines()
    return len(lines) > 1 and bool(CODE_FENCE.match(lines[0])) and lines[-1].strip() == "```"


def is_json(text: str) -> bool:
    """Whether the text is a JSON object or array, and nothing else."""
    try:
        return isinstance(json.loads(text, parse_constant=refuse_constant), dict | list)
    except (ValueError, RecursionError):
        return False


def refuse_constant(word: str) -> None:
    """Raise ValueError: NaN and Infinity are not JSON."""
    raise ValueError(f"{word} is not JSON")


def is_yaml(text: str) -> bool | None:
    """Whether the text is YAML mappings or sequences (nearly any text is a YAML scalar); aliases are refused.

    Only nodes are built, no values, since tags may construct anything. None if it is too long or too deep to parse.
    """
    import yaml

    if len(text) > MAX_YAML_LENGTH or nesting_depth(text) > MAX_DEPTH:
        return None
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            return False
        nodes = list(yaml.compose_all(text, yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    return bool(nodes) and all(isinstance(node, yaml.CollectionNode) for node in nodes)


def nesting_depth(text: str) -> int:
    """The depth of nested brackets, of `- ` on one line, or of indentation levels, whichever is largest."""
    now = most = 0
    for letter in text:
        now += (letter in "[{") - (letter in "]}" and now > 0)
        most = max(most, now)
    nested = max((len(re.findall(r"[-?:] ", line)) for line in text.splitlines()), default=0)
    indents = {len(line) - len(line.lstrip(" ")) for line in text.splitlines()}
    return max(most, nested, len(indents))


def is_csv(text: str) -> bool | None:
    """Whether the text has two or more rows of equally many (two or more) fields; None for one row or one column."""
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
    """Whether no line ends like a sentence, so that the lines may be a column, or have another separator."""
    return not any(line.rstrip().endswith((".", "!", "?", ":")) for line in lines)


def is_table(text: str) -> bool | None:
    """Whether the text has a header, a rule of dashes and rows, all with equally many cells; None for other tables."""
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
