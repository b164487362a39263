"""Measure the similarity of two instructions: ROUGE-L, literals, common segments, templates and sketches."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

# Han and kana are written without spaces, so each character counts as a word, as in BERT's tokenizer.
UNSPACED_SCRIPTS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD_OR_SIGN = re.compile(rf"[{UNSPACED_SCRIPTS}]|[^\W{UNSPACED_SCRIPTS}]+|[^\w\s]")

QUOTED_TEXT = (
    r"```.*?```|`[^`\n]+`|\"[^\"\n]*\"|“[^”]*”|„[^“”]*[“”]|«[^»]*»|「[^」]*」|『[^』]*』"
    r"|‘[^’\n]*’(?!\w)|(?<!\w)'[^'\n]+'(?!\w)"  # noqa: RUF001
)
OPERATOR_SIGN = r"(?<=[\d)])\s*[-+*/×÷^=<>·−]\s*(?=[\d(])"  # noqa: RUF001
NUMBER_LITERAL = (
    rf"(?:(?<![\w)])[-−])?(?<![^\W{UNSPACED_SCRIPTS}])\d+(?:[.,:/]\d+)*(?:\s?%)?"  # noqa: RUF001
    "|[²³¹¼-¾⅐-↉零〇一二两三四五六七八九十百千万]"
)
LITERAL_PATTERN = re.compile(f"{QUOTED_TEXT}|{OPERATOR_SIGN}|{NUMBER_LITERAL}", re.DOTALL)
QUOTATION_MARKS = "\"'`“”„«»「」『』‘’ \n"  # noqa: RUF001

SEGMENT_BOUNDARY = re.compile(r"\s*\n\s*|(?<=[.!?:;。！？])\s+|(?<=[。！？])")  # noqa: RUF001

MIN_TEMPLATE_ROWS = 10  # so many rows must share a beginning or an ending for it to be a template
MIN_TEMPLATE_WORDS = 8  # the first few words of many instructions are equal without a template

SHINGLE_WORDS = 3  # words
SKETCH_SIZE = 256  # shingles that represent a long text


@lru_cache(maxsize=4)  # a text is compared and then added
def extract_literals(text: str) -> tuple[str, ...]:
    """The numbers, signs between numbers, and quoted strings of a text, in order.

    Two texts with different literals ask different questions, even if most of their words are equal. A quoted string
    is one literal, without its quotation marks and with its case. Digits inside a word (`word12`) and number words
    (`five`) are ordinary words.
    """
    return tuple(
        part.strip(QUOTATION_MARKS) if is_quoted_literal(part) else part.strip().lower()
        for part in LITERAL_PATTERN.findall(text)
    )


def is_quoted_literal(part: str) -> bool:
    """Whether a literal is a quoted string."""
    return part[0] in QUOTATION_MARKS and len(part) > 1 and not part[0].isspace()


def split_segments(text: str) -> list[str]:
    """Split a text into lines, sentences and headings that end in a colon."""
    return [piece for piece in SEGMENT_BOUNDARY.split(text) if piece and not piece.isspace()]


def remove_common_segments(first: Sequence[str], second: Sequence[str]) -> tuple[str, str]:
    """Remove the segments that two texts have in common from both."""
    shared = Counter(first) & Counter(second)
    return remove_shared(first, shared), remove_shared(second, shared)


def remove_shared(parts: Sequence[str], shared: Counter[str]) -> str:
    """Join the segments except the shared ones; each of these is removed as often as `shared` counts it."""
    left, found = Counter(shared), list[str]()
    for part in parts:
        if left[part] > 0:
            left[part] -= 1
        else:
            found.append(part)
    return "".join(found)


def rouge_l(first: str, second: str) -> float:
    """ROUGE-L's F1 of two texts with one character per word."""
    return 2 * int(LCSseq.similarity(first, second)) / (len(first) + len(second))


def remove_template(first: str, second: str, frame: tuple[int, int]) -> tuple[str, str]:
    """Remove the beginning and the ending that two texts share, up to the lengths in `frame`.

    The texts are not changed if fewer than MIN_TEMPLATE_WORDS would be removed.
    """
    begins = min(shared_prefix_length(first, second), frame[0])
    one, other = first[begins:], second[begins:]
    ends = min(shared_prefix_length(one[::-1], other[::-1]), frame[1])
    if begins + ends < MIN_TEMPLATE_WORDS:
        return first, second
    return one[: len(one) - ends], other[: len(other) - ends]


def shared_prefix_length(first: str, second: str) -> int:
    """The length of the common prefix of two texts."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first.startswith(second[:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def find_templates(texts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """By text, the lengths of the longest beginning and ending that MIN_TEMPLATE_ROWS different texts share.

    Texts where these are shorter than MIN_TEMPLATE_WORDS together are not in the result.
    """
    different = list(dict.fromkeys(texts))
    begins = shared_prefix_lengths(different)
    ends = shared_prefix_lengths([text[::-1] for text in different])
    found = zip(different, zip(begins, ends, strict=True), strict=True)
    return {text: frame for text, frame in found if sum(frame) >= MIN_TEMPLATE_WORDS}


def shared_prefix_lengths(texts: Sequence[str]) -> list[int]:
    """For each text, the length of the longest prefix that it shares with MIN_TEMPLATE_ROWS - 1 others.

    In sorted order these texts are neighbors, and the common prefix of the first and the last is common to all.
    """
    order, found = sorted(range(len(texts)), key=texts.__getitem__), [0] * len(texts)
    for start in range(len(texts) - MIN_TEMPLATE_ROWS + 1):
        window = order[start : start + MIN_TEMPLATE_ROWS]
        length = shared_prefix_length(texts[window[0]], texts[window[-1]])
        for place in window:
            found[place] = max(found[place], length)
    return found


def min_hash_sketch(words: Sequence[int]) -> list[int]:
    """The SKETCH_SIZE smallest hashes of the word triples of a text; similar texts have mostly the same ones.

    The overlap of two sketches estimates the share of triples that two texts have in common (Broder 1997, On the
    resemblance and containment of documents).
    """
    values: NDArray[np.uint64] = np.asarray(words, dtype=np.uint64)
    count = len(values) - SHINGLE_WORDS + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(SHINGLE_WORDS):
        hashes = (hashes ^ values[place : place + count]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return [int(value) for value in np.unique(hashes)[:SKETCH_SIZE]]


def min_sketch_overlap(limit: float) -> float:
    """The smallest sketch overlap required of a text with a ROUGE-L above `limit`, with a wide margin.

    A triple is kept if its three words are: a share of limit**3 if changes are random. 0.7 of that is required.
    """
    return 0.7 * limit**SHINGLE_WORDS
