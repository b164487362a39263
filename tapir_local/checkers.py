"""Checks of an answer that need no LLM: pure functions that say True, False, or None where they cannot tell.

Each looks first whether the instruction asks for the very thing it can verify, and says None of any other. Only
`arithmetic` knows what is right; the others verify a form that a right answer must have.
"""

import ast
import csv
import json
import math
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

Check = Callable[[str, str], bool | None]

LONGEST = 100_000  # letters of an instruction or an answer that is looked at
FENCED = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)

# --- Math: plain arithmetic

SUM = re.compile(
    r"\s*(?:(?:please\s+)?(?:what\s+is|what's|calculate|compute|evaluate|work\s+out|solve|how\s+much\s+is|find)"
    r"(?:\s+the\s+(?:value|result|answer)\s+(?:of|to))?\s*:?\s+)?([\d.,()+\-*/^% of]+?)\s*(?:=\s*\??)?\s*[?.!]*\s*",
    re.IGNORECASE,
)
SIGNS = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u00b7": "*", "\u2212": "-"})  # as typeset
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
WORDED = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|million)\b",
    re.IGNORECASE,
)
LONGEST_SUM, MOST_BITS = 200, 4096  # letters; of a power


def arithmetic(instruction: str, answer: str) -> bool | None:
    """Whether the value of a plain sum is the last number that the answer states, rounded at most.

    True or False only of an instruction that is nothing but an expression in numbers; False where its value is nowhere
    in the answer, None where it is there but another number comes last, or numbers are in words.
    """
    found = SUM.fullmatch(instruction.translate(SIGNS)) if len(instruction) <= 2 * LONGEST_SUM else None
    value = value_of(found[1]) if found else None
    if value is None:
        return None
    told = [fits(text, value) for text in NUMBER.findall(answer.translate(SIGNS))]
    if told and told[-1]:
        return True
    return None if any(told) or WORDED.search(answer) else False


def value_of(text: str) -> Fraction | None:
    """The value of an expression of at least one sign, such as `3 * (4 - 1)` or `15% of 80`; None of anything else."""
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    plain = re.sub(r"%\s*of\b", "/100*", plain, flags=re.IGNORECASE).replace("^", "**").strip()
    if len(plain) > LONGEST_SUM or not re.search(r"\d\s*\)*\s*[-+*/]", plain):
        return None
    try:
        return worked_out(ast.parse(re.sub(r"(?<![\d.])0+(?=\d)", "", plain), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def worked_out(node: ast.expr) -> Fraction:
    """The value of a tree of sums; ValueError where anything else is in it."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -worked_out(node.operand)
    if not isinstance(node, ast.BinOp):
        raise ValueError("no sum")
    left, right = worked_out(node.left), worked_out(node.right)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.Pow() if right.denominator == 1 and abs(right) * bits(left) <= MOST_BITS:
            return left ** int(right)
    raise ValueError("no sum")


def bits(number: Fraction) -> int:
    """The size of a fraction."""
    return number.numerator.bit_length() + number.denominator.bit_length()


def fits(text: str, value: Fraction) -> bool:
    """Whether a number as it is written is the value, or it rounded to the places that are written; 6/4 is not 3/2."""
    plain = text.replace(",", "")
    if "/" in plain:
        return plain == f"{value.numerator}/{value.denominator}"
    try:
        number = Fraction(plain)
    except ValueError:  # more digits than Python reads
        return False
    places = len(plain.partition(".")[2])
    return number == value or (places > 0 and abs(number - value) <= Fraction(1, 2 * 10**places))


# --- Code Generation, Code Debug: Python that compiles

PYTHON_TAGS = ("python", "py", "python3")
PYTHON = re.compile(r"\bpython\b(?!\s*2)", re.IGNORECASE)
OTHER_PYTHON = re.compile(r"^\s*(?:>>>|\.\.\.\s|[!%]\w)|\bpython\s*2", re.IGNORECASE | re.MULTILINE)


def python(instruction: str, answer: str) -> bool | None:
    """Whether the Python of an answer compiles: all of its blocks True, none of them False, some of them None.

    A block counts when it is marked as Python, or unmarked where the instruction names Python. A prompt (>>>), a
    notebook's command or Python 2 is None. That it compiles does not say that it does what was asked.
    """
    if max(len(instruction), len(answer)) > LONGEST or OTHER_PYTHON.search(answer) or OTHER_PYTHON.search(instruction):
        return None
    asked = bool(PYTHON.search(instruction))
    blocks = [code for tag, code in FENCED.findall(answer) if tag.lower() in PYTHON_TAGS or (asked and not tag)]
    compiled = {compiles(code) for code in blocks if code.strip()}
    return compiled.pop() if len(compiled) == 1 else None


def compiles(code: str) -> bool:
    """Whether Python's parser takes it, an indentation common to all lines aside."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a string is no fault
            ast.parse(textwrap.dedent(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


# --- Complex Format: the form that is asked for

ASKS = (
    r"\b(?:as|in|into|to|return|output|produce|generate|create|make|write|provide|give|format|use|using|valid|with)\s"
)
WORDS = r"(?:(?:a|an|the|me|only|valid|pure|raw|single|simple|nested|well-formed|markdown|form of a|form of)\s+){0,4}"
FORMS = {name: re.compile(rf"{ASKS}+{WORDS}{name}\b", re.IGNORECASE) for name in ("json", "yaml", "csv", "table")}
NAMED = re.compile(r"\b(json|yaml|csv|table|xml|html|latex|sql)\b", re.IGNORECASE)
ABOUT = re.compile(r"\s*(?:what|how|why|when|who|which|explain|describe|compare|is|are|does|do)\b", re.IGNORECASE)
RULE = re.compile(r"\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?")


def form(instruction: str, answer: str) -> bool | None:
    """Whether the answer is the JSON, YAML, CSV or Markdown table that the instruction asks for.

    None where it asks for none of these, names more than one form, or asks about one. A code block around the whole is
    allowed, and so are words around a table. What is in the form is not verified.
    """
    if max(len(instruction), len(answer)) > LONGEST or ABOUT.match(instruction):
        return None
    named = {word.lower() for word in NAMED.findall(instruction)}
    asked = [name for name, pattern in FORMS.items() if pattern.search(instruction)]
    if len(named) != 1 or not asked:
        return None
    return READERS[asked[0]](unfenced(answer))


def unfenced(answer: str) -> str:
    """What stands in the code block that is the whole answer; else the answer."""
    found = FENCED.fullmatch(answer.strip())
    return found[2] if found else answer


def is_json(text: str) -> bool:
    """An object or an array, and nothing else."""
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def is_yaml(text: str) -> bool:
    """A mapping or a sequence: nearly any text is a scalar. Aliases are refused, which can grow without end."""
    import yaml

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            return False
        return isinstance(yaml.safe_load(text), dict | list)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False


def is_csv(text: str) -> bool:
    """At least two rows of the same number of fields, two or more."""
    lines = text.strip().splitlines()
    try:
        widths = {len(row) for row in csv.reader(lines, strict=True) if row}
    except csv.Error:
        return False
    return len(lines) > 1 and len(widths) == 1 and max(widths) > 1


def is_table(text: str) -> bool:
    """A head, a rule of dashes and a row, all of as many cells."""
    lines = [line.strip() for line in text.splitlines() if "|" in line]
    widths = {len(re.split(r"(?<!\\)\|", line.strip("|"))) for line in lines}
    return len(lines) > 2 and bool(RULE.fullmatch(lines[1])) and len(widths) == 1


READERS: Mapping[str, Callable[[str], bool]] = {"json": is_json, "yaml": is_yaml, "csv": is_csv, "table": is_table}

# --- Multilingual: the script of the language that is asked for

SCRIPTS: Mapping[str, Sequence[str]] = {
    "japanese": ("CJK", "HIRAGANA", "KATAKANA"),
    "chinese": ("CJK",),
    "mandarin": ("CJK",),
    "korean": ("HANGUL",),
    "russian": ("CYRILLIC",),
    "ukrainian": ("CYRILLIC",),
    "bulgarian": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
    "persian": ("ARABIC",),
    "urdu": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "hindi": ("DEVANAGARI",),
    "nepali": ("DEVANAGARI",),
    "bengali": ("BENGALI",),
    "tamil": ("TAMIL",),
    "thai": ("THAI",),
    "georgian": ("GEORGIAN",),
    "armenian": ("ARMENIAN",),
}
TARGET = re.compile(rf"\b(?:into|in|to)\s+(?:\w+\s+)?({'|'.join(SCRIPTS)})\b", re.IGNORECASE)


def script(instruction: str, answer: str) -> bool | None:
    """Whether an answer asked for in a language with a script of its own is in that script.

    True when most of its letters are, False when none is, None between, and where no such language is asked for or
    more than one is. That the script is right does not say that the translation is.
    """
    asked = {word.lower() for word in TARGET.findall(instruction[:LONGEST])}
    if len(asked) != 1:
        return None
    letters = [letter for letter in answer[:LONGEST] if letter.isalpha()]
    kinds = SCRIPTS[asked.pop()]
    count = sum(unicodedata.name(letter, "").startswith(tuple(kinds)) for letter in letters)
    return True if 2 * count > len(letters) else None if count else False


# --- Writing, Paraphrase: the number of words

BOUND = re.compile(
    r"\b(exactly|at most|no more than|not more than|up to|at least|no fewer than|no less than|fewer than|less than|"
    r"under|more than|over)\s+(\d{1,5})\s+words\b",
    re.IGNORECASE,
)
MOST = ("at most", "no more than", "not more than", "up to", "exactly")
LEAST = ("at least", "no fewer than", "no less than", "exactly")
ABOVE = ("more than", "over")


def length(instruction: str, answer: str) -> bool | None:
    """Whether the answer has as many words (between spaces) as each limit that the instruction sets; None without one.

    A number without `exactly`, `at most` or the like is no limit. The rest of the instruction is not verified.
    """
    limits = [(word.lower(), int(number)) for word, number in BOUND.findall(instruction[:LONGEST])]
    if not limits:
        return None
    words = len(answer.split())
    return bool(words) and all(lowest(word, number) <= words <= highest(word, number) for word, number in limits)


def lowest(word: str, number: int) -> float:
    """The fewest words that a limit allows."""
    return number if word in LEAST else number + 1 if word in ABOVE else 0


def highest(word: str, number: int) -> float:
    """The most words that a limit allows."""
    return number if word in MOST else math.inf if word in LEAST or word in ABOVE else number - 1


CHECKERS: Mapping[str, Check] = {
    "arithmetic": arithmetic,
    "python": python,
    "form": form,
    "script": script,
    "length": length,
}
