"""When two instructions are alike: ROUGE-L of their words, and what a share of common words does not show."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

# Han and kana are written without spaces, so each of their characters is a word, as BERT's tokenizer has it.
UNSPACED_SCRIPTS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD_OR_SIGN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")

QUOTED_TEXT = (
    r"```.*?```|`[^`\n]+`|\"[^\"\n]*\"|“[^”]*”|„[^“”]*[“”]|«[^»]*»|「[^」]*」|『[^』]*』"
    r"|‘[^’\n]*’(?!\w)|(?<!\w)'[^'\n]+'(?!\w)"  # noqa: RUF001
)
OPERATOR_SIGN = r"(?<=[\d)])\s*[-+*/×÷^=<>·−]\s*(?=[\d(])"  # noqa: RUF001
NUMBER_LITERAL = (
    rf"(?:(?<![\w)])[-−])?(?<![^\W{UNSPACED}])\d+(?:[.,:/]\d+)*(?:\s?%)?|[²³¹¼-¾⅐-↉零〇一二两三四五六七八九十百千万]"  # noqa: RUF001
)
LITERAL_PATTERN = re.compile(f"{QUOTED}|{SIGN}|{NUMBER}", re.DOTALL)
QUOTATION_MARKS = "\"'`“”„«»「」『』‘’ \n"  # noqa: RUF001

SEGMENT_BOUNDARY = re.compile(r"\s*\n\s*|(?<=[.!?:;。！？])\s+|(?<=[。！？])")  # noqa: RUF001

MIN_TEMPLATE_ROWS = 10  # rows that share a beginning or an ending, from which it counts as a template's
MIN_TEMPLATE_WORDS = 8  # words of a template at least: the first few words of many instructions are the same

SHINGLE_WORDS = 3  # words
SKETCH_SIZE = 256  # shingles that stand for a long text


@lru_cache(maxsize=4)  # of a text that is compared and then added
def extract_literals(text: str) -> tuple[str, ...]:
    """The numbers, signs between numbers, and quoted strings of a text, in order.

    Two texts in which these differ ask for different things, however many words they share. A quoted string is one
    literal, without its quotation marks and with its capitals. Digits within a word (`word12`) and numbers in words
    (`five`) are words like others.
    """
    return tuple(
        part.strip(QUOTATION_MARKS) if is_quoted_literal(part) else part.strip().lower()
        for part in LITERAL_PATTERN.findall(text)
    )


def is_quoted_literal(part: str) -> bool:
    """Whether a literal is a quoted string."""
    return part[0] in QUOTATION_MARKS and len(part) > 1 and not part[0].isspace()


def split_segments(text: str) -> list[str]:
    """A text cut into lines, sentences and headings that end in a colon."""
    return [piece for piece in SEGMENT_BOUNDARY.split(text) if piece and not piece.isspace()]


def remove_common_segments(first: Sequence[str], second: Sequence[str]) -> tuple[str, str]:
    """What is left of two texts without the pieces that both have."""
    shared = Counter(first) & Counter(second)
    return remove_shared(first, shared), remove_shared(second, shared)


def remove_shared(parts: Sequence[str], shared: Counter[str]) -> str:
    """The parts that are not among the shared ones, one after another; each shared one is taken off once."""
    left, found = Counter(shared), list[str]()
    for part in parts:
        if left[part] > 0:
            left[part] -= 1
        else:
            found.append(part)
    return "".join(found)


def rouge_l(first: str, second: str) -> float:
    """F1 of the longest common subsequence of two texts of one character a word."""
    return 2 * int(LCSseq.similarity(first, second)) / (len(first) + len(second))


def remove_template(first: str, second: str, frame: tuple[int, int]) -> tuple[str, str]:
    """Two texts without the beginning and the ending that both share, as far as `frame` says that many rows do.

    Both as they are where that is less than FRAME_WORDS.
    """
    begins = min(shared_prefix_length(first, second), frame[0])
    one, other = first[begins:], second[begins:]
    ends = min(shared_prefix_length(one[::-1], other[::-1]), frame[1])
    if begins + ends < MIN_TEMPLATE_WORDS:
        return first, second
    return one[: len(one) - ends], other[: len(other) - ends]


def shared_prefix_length(first: str, second: str) -> int:
    """The length of the beginning that two texts share."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first.startswith(second[:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def find_templates(texts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """By text the lengths of the longest beginning and ending that FRAME_ROWS different texts share with it.

    Only texts that have a beginning or an ending of FRAME_WORDS are named.
    """
    different = list(dict.fromkeys(texts))
    begins = shared_prefix_lengths(different)
    ends = shared_prefix_lengths([text[::-1] for text in different])
    found = zip(different, zip(begins, ends, strict=True), strict=True)
    return {text: frame for text, frame in found if sum(frame) >= MIN_TEMPLATE_WORDS}


def shared_prefix_lengths(texts: Sequence[str]) -> list[int]:
    """By text the length of the longest beginning that FRAME_ROWS of the texts have, this one among them.

    In alphabetical order these are neighbours, and what the first and the last of them share all share.
    """
    order, found = sorted(range(len(texts)), key=texts.__getitem__), [0] * len(texts)
    for start in range(len(texts) - MIN_TEMPLATE_ROWS + 1):
        window = order[start : start + MIN_TEMPLATE_ROWS]
        length = shared_prefix_length(texts[window[0]], texts[window[-1]])
        for place in window:
            found[place] = max(found[place], length)
    return found


def min_hash_sketch(words: Sequence[int]) -> list[int]:
    """SKETCH of the word triples of a text, those whose hashes are least: of like texts mostly the same ones.

    The share of a sketch that another has too estimates the share of the text's triples that are in the other text
    (Broder 1997, On the resemblance and containment of documents).
    """
    values: NDArray[np.uint64] = np.asarray(words, dtype=np.uint64)
    count = len(values) - SHINGLE_WORDS + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(SHINGLE_WORDS):
        hashes = (hashes ^ values[place : place + count]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return [int(value) for value in np.unique(hashes)[:SKETCH_SIZE]]


def min_sketch_overlap(limit: float) -> float:
    """The share of a sketch that a text of a ROUGE-L above `limit` has in common with it, with a wide margin.

    A triple survives where its words do: limit**3 of them where the changes lie anywhere, of which 0.7 are asked for.
    """
    return 0.7 * limit**SHINGLE_WORDS
