"""Check answers without an LLM: pure functions that return True, False, or None if they cannot tell.

Each returns None unless the instruction asks for the very thing that it can verify. Only `arithmetic` checks that an
answer is correct; the others verify a form that a correct answer must have.
"""

import ast
import math
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from tapir_local.method.form_check import check_form, code_blocks

TextCheck = Callable[[str, str], bool | None]

MAX_TEXT_LENGTH = 100_000  # characters of an instruction or an answer


def tolerate_errors(check: TextCheck) -> TextCheck:
    """The check, returning None for texts that are too long, and if it raises: an answer may contain anything."""

    def checked(instruction: str, answer: str) -> bool | None:
        if max(len(instruction), len(answer)) > MAX_TEXT_LENGTH:
            return None
        try:
            return check(instruction, answer)
        except Exception:  # noqa: BLE001 - an error counts as undecided
            return None

    return checked


# --- Math: plain arithmetic

ARITHMETIC_QUESTION = re.compile(
    r"(?:(?:please )?(?:what is|what's|calculate|compute|evaluate|work out|solve|how much is|find)"
    r"(?: the (?:value|result|answer) (?:of|to))? ?:? )?([\d.,()+\-*/^% of]+?)[=?.! ]*",
    re.IGNORECASE,
)
# Typeset signs. NFKC, which unifies letters of different widths, turns the single character for 1/2 into 1\u20442.
TYPESET_SIGNS = str.maketrans(
    {"\u00d7": "*", "\u00f7": "/", "\u00b7": "*", "\u2212": "-", "\u2013": "-", "\u2044": "/"}
)
CURRENCY = re.compile(r"[$\u20ac\u00a3\u00a5] ?")
STATED_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
NUMBER_WORDS = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|million|billion|dozen|half|halves|thirds?|quarters?|"
    r"fifths?|minus|negative)\b",
    re.IGNORECASE,
)
# Ways to state a number that `states_value` does not read: a mixed number, a remainder, a power of ten, blanks or
# stops between thousands, a percentage, digits after which dots stand for more.
OTHER_NUMBER_FORM = re.compile(
    r"\d \d+/\d|\d ?r(?:em(?:ainder)?)? ?\.?\d|remainder|\b10 ?(?:\^|\*\*)|\d[eE][-+]?\d|"
    r"\d[ '\u00a0\u202f_]\d{3}(?!\d)|"
    r"\d\.\d{3}\.\d{3}|\d,\d{1,2}(?!\d)|\d ?%\D*\Z|"
    r"\d ?(?:\.{3}|\u2026)|\\frac|\\sqrt|[\u00b2\u00b3\u00b9\u2070-\u2079]|\d[\u00bc-\u00be\u2150-\u215e]",
    re.IGNORECASE,
)
REFUSAL = re.compile(r"\b(?:not|cannot|unable|sorry|no idea|unsure)\b|n't\b", re.IGNORECASE)
# What looks like arithmetic and may be a date, a telephone number, a range of years, or a name such as 24/7.
NOT_ARITHMETIC = re.compile(
    r"\d{1,4}([/.-])\d{1,2}\1\d{1,4}|\(?\d{3}\)?[ -]\d{3}-\d{4}|\+?\d{1,3}(?:-\d{2,5}){2,}|\d{3}-\d{4}|"
    r"(?:1\d|20)\d\d-(?:(?:1\d|20)\d\d|\d\d)|24/7|9/11|7/11|4/20|50/50|20/20"
)
AMBIGUOUS_POWER = re.compile(r"\^[^-+*/^()]*\^|\*\*[^-+*/()]*\*\*|(?:^|[(+*/-])\s*-\s*[\d.]+\s*(?:\^|\*\*)")
APPROXIMATELY = re.compile(r"\b(?:about|approximately|approx|around|roughly|nearly|almost)\b|[~\u2248]", re.IGNORECASE)
MAX_EXPRESSION_LENGTH, MAX_POWER_BITS = 200, 4096  # characters; bits of a power


def check_arithmetic(instruction: str, answer: str) -> bool | None:
    """Whether the last number in the answer is the value of the expression in the instruction, possibly rounded.

    True or False only if the instruction is nothing but an arithmetic expression; False if the answer does not contain
    its value. None if it does but another number comes last, if the answer has numbers in words or in a form that is
    not parsed, and if the instruction may be a date, a telephone number or the like.
    """
    value = parse_arithmetic_question(instruction)
    if value is None:
        return None
    text = CURRENCY.sub("", unicodedata.normalize("NFKC", answer).translate(TYPESET_SIGNS))
    numbers = STATED_NUMBER.findall(text)
    stated = [states_value(number, value) for number in numbers]
    if stated and stated[-1]:
        return True
    near = bool(numbers) and may_be_truncated(numbers[-1], value, bool(APPROXIMATELY.search(text)))
    unsure = (
        any(stated)
        or near
        or NUMBER_WORDS.search(answer)
        or OTHER_NUMBER_FORM.search(text)
        or OTHER_NUMBER_FORM.search(answer)
    )
    in_words = answer.strip() and not stated and not REFUSAL.search(answer)
    return None if unsure or in_words else False


def parse_arithmetic_question(instruction: str) -> Fraction | None:
    """The value of an instruction that is an arithmetic expression; None if it is, or may be, anything else."""
    if len(instruction) > 2 * MAX_EXPRESSION_LENGTH:
        return None
    found = ARITHMETIC_QUESTION.fullmatch(" ".join(instruction.translate(TYPESET_SIGNS).split()))
    if not found or NOT_ARITHMETIC.fullmatch(found[1].strip()) or AMBIGUOUS_POWER.search(found[1]):
        return None
    bare = found[1].strip() == " ".join(instruction.translate(TYPESET_SIGNS).split()).strip("=?.! ")
    if bare and re.fullmatch(r"\d+([-/]\d+)+", found[1].strip()) and "=" not in instruction:
        return None
    return parse_expression(found[1])


def parse_expression(text: str) -> Fraction | None:
    """The value of an expression with at least one operator, such as `3 * (4 - 1)` or `15% of 80`; else None."""
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    plain = re.sub(r"%\s*of\b", "/100*", plain, flags=re.IGNORECASE).replace("^", "**").strip()
    if len(plain) > MAX_EXPRESSION_LENGTH or not re.search(r"\d\s*\)*\s*[-+*/]", plain):
        return None
    try:
        return evaluate_expression(ast.parse(re.sub(r"(?<![\d.])0+(?=\d)", "", plain), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def evaluate_expression(node: ast.expr) -> Fraction:
    """The value of a syntax tree of numbers and operators; ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate_expression(node.operand)
    if not isinstance(node, ast.BinOp):
        raise ValueError("not arithmetic")
    left, right = evaluate_expression(node.left), evaluate_expression(node.right)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.Pow() if right.denominator == 1 and abs(right) * count_bits(left) <= MAX_POWER_BITS:
            return left ** int(right)
    raise ValueError("not arithmetic")


def count_bits(number: Fraction) -> int:
    """The number of bits in numerator and denominator."""
    return number.numerator.bit_length() + number.denominator.bit_length()


def states_value(text: str, value: Fraction) -> bool:
    """Whether a written number is the value, or the value rounded to the written places; 6/4 does not count as 3/2."""
    if "/" in text:
        return text.replace(",", "") == f"{value.numerator}/{value.denominator}"
    number, places = parse_written_number(text)
    if number is None:
        return False
    return number == value or (places > 0 and abs(number - value) <= Fraction(1, 2 * 10**places))


def may_be_truncated(text: str, value: Fraction, roughly: bool) -> bool:
    """Whether a number may be the truncated value; for an integer only if the answer says `roughly`."""
    number, places = parse_written_number(text)
    return number is not None and (places > 0 or roughly) and abs(number - value) < Fraction(1, 10**places)


def parse_written_number(text: str) -> tuple[Fraction | None, int]:
    """(the number, its decimal places); None for more digits than Python reads, or a fraction."""
    plain = text.replace(",", "")
    try:
        return (None if "/" in plain else Fraction(plain)), len(plain.partition(".")[2])
    except ValueError:
        return None, 0


# --- Code Generation, Code Debug: Python that compiles

PYTHON_TAGS = ("python", "py", "python3")
NAMES_PYTHON = re.compile(r"\bpython\b(?!\s*2)", re.IGNORECASE)
NOT_PLAIN_PYTHON = re.compile(
    r"^[ \t]*(?:>>>|\.\.\.\s|[!%$] ?\w|pip3?\s|python3?\s|conda\s|print\s+[\"'\w]|exec\s+[\"'\w]|"
    r"raise\s+\w+\s*,|Traceback \(most)|\bpython\s*2|\bexcept\s+\w+\s*,\s*\w+\s*:",
    re.IGNORECASE | re.MULTILINE,
)
MAX_CODE_LENGTH = 20_000  # characters of a block: Python's parser needs memory and stack in proportion


def check_python(instruction: str, answer: str) -> bool | None:
    """Whether the Python blocks of an answer compile: True for all, False for none, None for some.

    A block counts if it is marked as Python, or unmarked while the instruction mentions Python. None for prompts (>>>),
    commands of notebooks or shells, tracebacks, and Python 2. Code that compiles need not do what was asked.
    """
    if NOT_PLAIN_PYTHON.search(answer) or NOT_PLAIN_PYTHON.search(instruction):
        return None
    asked = bool(NAMES_PYTHON.search(instruction))
    blocks = [code for tag, code in code_blocks(answer) if tag.lower() in PYTHON_TAGS or (asked and not tag)]
    if any(len(code) > MAX_CODE_LENGTH for code in blocks):
        return None
    compiled = {compiles(code) for code in blocks if code.strip()}
    return compiled.pop() if len(compiled) == 1 else None


def compiles(code: str) -> bool:
    """Whether Python parses the code, ignoring an indentation common to all lines."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in strings are only warnings
            ast.parse(textwrap.dedent(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


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
# `in Japanese` ends its clause or precedes one of these words; before others it describes a thing: Greek mythology.
TARGET_LANGUAGE = re.compile(
    rf"\b(?:into|in|to)\s+(?:\w+\s+)?({'|'.join(SCRIPTS)})\b(?=\s*(?:$|[.,;:!?)\"'\u201d\n]|(?:the|this|that|these|and|or|"
    r"please|using|with|script|characters|letters|language|following|for|about)\b))",
    re.IGNORECASE,
)
TRANSLATION_REQUEST = re.compile(
    r"\b(?:translate|write|answer|respond|reply|render|convert|compose|rewrite|say it)\b", re.IGNORECASE
)
LATIN_REQUEST = re.compile(
    r"\b(?:how (?:do|would|can|to)|pronounc\w*|romaji|pinyin|romani[sz]\w*|translit\w*|phonetic\w*|latin|roman|"
    r"meanings?)\b",
    re.IGNORECASE,
)


def check_script(instruction: str, answer: str) -> bool | None:
    """Whether an answer is in the script of the language that the instruction asks for.

    True if most of its letters are. False if none is, and the instruction asks to translate or write and mentions no
    transliteration. Otherwise None, also if the instruction asks for no language with its own script, or for several,
    or if the answer has no letters. The right script does not imply a right translation.
    """
    asked = {word.lower() for word in TARGET_LANGUAGE.findall(instruction)}
    if len(asked) != 1:
        return None
    letters = [letter for letter in answer if letter.isalpha()]
    kinds = SCRIPTS[asked.pop()]
    count = sum(unicodedata.name(letter, "").startswith(tuple(kinds)) for letter in letters)
    if count:
        return True if 2 * count > len(letters) else None
    quoted = answer.strip() and answer.strip(" .\"'").casefold() in instruction.casefold()  # a name, unchanged
    known = TRANSLATION_REQUEST.search(instruction) and not LATIN_REQUEST.search(instruction) and not quoted
    return False if known and (letters or not answer.strip()) else None


# --- Writing, Paraphrase: the number of words

WORD_LIMIT = re.compile(
    r"\b(exactly|at most|no more than|not more than|up to|at least|no fewer than|no less than|fewer than|less than|"
    r"under|more than|over)\s+(\d{1,5})\s+words\b",
    re.IGNORECASE,
)
# The limit may apply to a part, to certain words, or to a quoted text.
PARTIAL_LIMIT = re.compile(
    r"\b(?:each|every|per|titles?|headlines?|headings?|subject|captions?|sentences|lines|paragraphs|bullets?|points|"
    r"stanzas|verses|sections|first|last)\b|\bwords\s+(?:from|that|which|start|begin|end|contain|long|short|with|in|of|or)",
    re.IGNORECASE,
)
QUOTED_PATTERN = re.compile(r"\"[^\"]*\"|'[^'\n]*\d[^'\n]*'|\u201c[^\u201d]*\u201d")
UNSPACED_SCRIPT = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0eff\u1780-\u17ff\u1000-\u109f]")
UPPER_LIMITS = ("at most", "no more than", "not more than", "up to", "exactly")
LOWER_LIMITS = ("at least", "no fewer than", "no less than", "exactly")
STRICT_LOWER_LIMITS = ("more than", "over")


def check_length(instruction: str, answer: str) -> bool | None:
    """Whether the number of words in the answer satisfies every limit in the instruction.

    None without a limit, if the limit may apply to a part of the answer, if words are not separated by spaces, and if
    the result depends on what counts as a word (`well-known`, a dash). A number without `exactly`, `at most` or the
    like is not a limit. The rest of the instruction is not verified.
    """
    asked = QUOTED_PATTERN.sub("", instruction)
    limits = [(word.lower(), int(number)) for word, number in WORD_LIMIT.findall(asked)]
    if not limits or PARTIAL_LIMIT.search(asked) or UNSPACED_SCRIPT.search(answer):
        return None
    counts = {len(answer.split()), len(re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", answer))}
    kept = {
        bool(words) and all(min_words(*limit) <= words <= max_words(*limit) for limit in limits) for words in counts
    }
    return kept.pop() if len(kept) == 1 else None


def min_words(word: str, number: int) -> float:
    """The minimum number of words that a limit allows."""
    return number if word in LOWER_LIMITS else number + 1 if word in STRICT_LOWER_LIMITS else 0


def max_words(word: str, number: int) -> float:
    """The maximum number of words that a limit allows."""
    return (
        number
        if word in UPPER_LIMITS
        else math.inf
        if word in LOWER_LIMITS or word in STRICT_LOWER_LIMITS
        else number - 1
    )


CHECKERS: Mapping[str, TextCheck] = {
    "arithmetic": tolerate_errors(check_arithmetic),
    "python": tolerate_errors(check_python),
    "form": tolerate_errors(check_form),
    "script": tolerate_errors(check_script),
    "length": tolerate_errors(check_length),
}
