"""Near-duplicates: the most similar instruction by ROUGE-L among many, found without comparing with all of them."""

import re
from array import array
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import process
from rapidfuzz.distance import Indel, LCSseq

from tapir_local.errors import TapirError
from tapir_local.records import Example, Prompt

# Han and kana are written without spaces, so each of their characters is a word, as BERT's tokenizer has it.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")
WORDS_AT_MOST = 0x110000  # different words: one code point each
LEAST = 1e-9  # what rounding may take from a limit, far below the difference of two ROUGE-L of texts that exist


class Index:
    """Instructions among which the one most like another is found: by ROUGE-L of their words, and above a limit.

    ROUGE-L's F1 is 2*LCS/(m+n), m and n the numbers of words (Lin 2004, ROUGE: A Package for Automatic Evaluation of
    Summaries). What is found is what comparing with every row would find. It is found sooner because a common
    subsequence is at most as long as what two texts share, word for word: for the limit to be passed at least `need`
    words must be shared, so one of the rarest m - need + 1 is, and only the rows that have one of these are compared
    (prefix filtering: Chaudhuri, Ganti, Kaushik 2006, A Primitive Operator for Similarity Joins).

    What counts is the last turn, among rows with the same turns before it: a system message that all rows share would
    make them alike, and `Go on.` asks for another thing in each conversation.
    """

    def __init__(self, max_rouge: float) -> None:
        self.max_rouge = max_rouge
        self.alphabet: dict[str, int] = {}
        self.ids: list[str] = []
        self.texts: list[str] = []  # one character a word
        self.lengths = array("i")
        self.contexts: dict[Prompt, int] = {}
        self.context_of = array("i")
        self.holders: dict[int, array[int]] = defaultdict(lambda: array("i"))  # of a token: places of texts with it

    def encode(self, text: str) -> list[int]:
        """Each word as a number; a text without words is one word of its own."""
        alphabet = self.alphabet
        found = [alphabet.setdefault(word, len(alphabet)) for word in WORD.findall(text.lower()) or [""]]
        if len(alphabet) > WORDS_AT_MOST:
            raise TapirError(f"more than {WORDS_AT_MOST:,} different words in the instructions")
        return found

    def add(self, example: Example) -> None:
        """Make an example one that others may not resemble."""
        words, place = self.encode(example.prompt[-1].content), len(self.texts)
        self.ids.append(example.id)
        self.texts.append("".join(map(chr, words)))
        self.lengths.append(len(words))
        self.context_of.append(self.contexts.setdefault(example.prompt[:-1], len(self.contexts)))
        for token in tokens(words):
            self.holders[token].append(place)

    def nearest(self, example: Example, anywhere: bool = False) -> tuple[str, float] | None:
        """The id of the most similar instruction, of several the first added, and its ROUGE-L, if above the limit.

        `anywhere`: among all rows, whatever the turns before the last.
        """
        words = self.encode(example.prompt[-1].content)
        places = self.candidates(words)
        if not anywhere and len(places):
            context = self.contexts.get(example.prompt[:-1], -1)
            places = places[numbers(self.context_of)[places] == context]
        text = "".join(map(chr, words))
        found = process.extractOne(
            text,
            [self.texts[place] for place in places.tolist()],
            scorer=Indel.normalized_similarity,  # the same as ROUGE-L, but for rounding
            score_cutoff=max(0.0, self.max_rouge - LEAST),
        )
        return self.above(text, int(places[found[2]])) if found else None

    def above(self, text: str, place: int) -> tuple[str, float] | None:
        """A row's id and its ROUGE-L, rounded once, if that is above the limit."""
        score = rouge_l(text, self.texts[place])
        return (self.ids[place], score) if score > self.max_rouge else None

    def candidates(self, words: Sequence[int]) -> NDArray[np.int64]:
        """The places of all texts that may pass the limit, and of few others, in order.

        With the tokens sorted from rare to frequent, a text whose first shared token is the one at `rank` shares
        m - rank at the most, and passes the limit t only if 2 * (m - rank) > t * (m + n).
        """
        m, limit = len(words), max(self.max_rouge, LEAST)
        held = sorted((self.holders[token] for token in tokens(words) if token in self.holders), key=len)
        shortest, seen = limit * m / (2 - limit) - LEAST, np.zeros(len(self.texts), dtype=bool)
        for rank, places in enumerate(held, m - len(held)):  # tokens that no text has are the rarest
            longest = 2 * (m - rank + LEAST) / limit - m
            if longest < shortest:
                break
            rows = numbers(places)
            lengths = numbers(self.lengths)[rows]
            seen[rows[(lengths >= shortest) & (lengths <= longest)]] = True
        return np.flatnonzero(seen)


def tokens(words: Sequence[int]) -> list[int]:
    """The words with the second, third, ... of the same word told apart: what two texts share is then a set."""
    counts: dict[int, int] = {}
    found = []
    for word in words:
        before = counts.get(word, 0)
        found.append(word + before * WORDS_AT_MOST)
        counts[word] = before + 1
    return found


def numbers(values: "array[int]") -> NDArray[np.int32]:
    """An array's values, not copied: while it is in use nothing can be appended to them."""
    return np.frombuffer(values, dtype=np.int32)


def rouge_l(first: str, second: str) -> float:
    """F1 of the longest common subsequence of two texts of one character a word."""
    return 2 * int(LCSseq.similarity(first, second)) / (len(first) + len(second))
