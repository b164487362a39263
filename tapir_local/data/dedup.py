"""Near-duplicates: the most similar instruction by ROUGE-L among many, found without comparing with all of them."""

from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import process
from rapidfuzz.distance import Indel

from tapir_local.data.similarity import (
    WORD_OR_SIGN,
    extract_literals,
    find_templates,
    min_hash_sketch,
    min_sketch_overlap,
    remove_common_segments,
    remove_template,
    rouge_l,
    split_segments,
)
from tapir_local.errors import TapirError
from tapir_local.records import Example, Prompt

MAX_DISTINCT_WORDS = 0x110000  # different words: one code point each
ROUNDING_TOLERANCE = (
    1e-9  # what rounding may take from a limit, far below the difference of two ROUGE-L of texts that exist
)
LONG_TEXT_WORDS = 1000  # words from which candidates are found by sketches


class DedupIndex:
    """Instructions among which the one most like another is found: by ROUGE-L of their words, and above a limit.

    ROUGE-L's F1 is 2*LCS/(m+n), m and n the numbers of words (Lin 2004, ROUGE: A Package for Automatic Evaluation of
    Summaries). Texts of the same words are alike at any limit. Others above the limit are alike unless

    - their numbers or quoted strings differ (`27 + 48` and `27 + 49` are two sums), or
    - without the sentences and lines that both have, what is left of them is not alike: what they share is then a
      preamble, or a document of which each asks another thing; or
    - without the template of many rows, what is left of them is not alike (see `learn`).

    What is found is what comparing with every row would find. It is found sooner because a common subsequence is at
    most as long as what two texts share, word for word: for the limit to be passed at least `need` words must be
    shared, so one of the rarest m - need + 1 is, and only the rows that have one of these are compared (prefix
    filtering: Chaudhuri, Ganti, Kaushik 2006, A Primitive Operator for Similarity Joins). Of texts of more than LONG
    words only those are compared that share enough of their sketches, an estimate.

    What counts is the last turn, among rows with the same turns before it: a system message that all rows share would
    make them alike, and `Go on.` asks for another thing in each conversation.
    """

    def __init__(self, max_rouge: float) -> None:
        self.max_rouge = max_rouge
        self.alphabet: dict[str, int] = {}
        self.ids: list[str] = []
        self.texts: list[str] = []  # one character a word
        self.written: list[str] = []  # as they were given
        self.lengths = array("i")
        self.contexts: dict[Prompt, int] = {}
        self.context_of = array("i")
        self.literals: dict[tuple[str, ...], int] = {}
        self.literals_of = array("i")
        self.frames: dict[str, tuple[int, int]] = {}
        self.lettered: dict[str, str] = {}  # the learned texts in letters
        self.holders: dict[int, array[int]] = defaultdict(lambda: array("i"))  # of a token: places of texts with it
        self.sketched: dict[int, array[int]] = defaultdict(lambda: array("i"))  # of a word triple: the same
        # Texts of lengths in this ratio may just be alike.
        self.ratio = max(max_rouge, ROUNDING_TOLERANCE) / (2 - max(max_rouge, ROUNDING_TOLERANCE))

    def encode(self, text: str) -> list[int]:
        """Each word as a number; a text without words is one word of its own."""
        alphabet = self.alphabet
        found = [alphabet.setdefault(word, len(alphabet)) for word in WORD_OR_SIGN.findall(text.lower()) or [""]]
        if len(alphabet) > MAX_DISTINCT_WORDS:
            raise TapirError(f"more than {WORDS_AT_MOST:,} different words in the instructions")
        return found

    def learn(self, examples: Iterable[Example]) -> None:
        """Find the templates among examples: beginnings and endings that many of them have in common.

        To be called once, before the first is added: what is found then does not depend on the order of the rows.
        """
        self.lettered = {(text := row.prompt[-1].content): self.letters(text) for row in examples}
        self.frames = find_templates(list(self.lettered.values()))

    def letters(self, text: str) -> str:
        """A text as one character a word."""
        return self.lettered.get(text) or "".join(map(chr, self.encode(text)))

    def add(self, example: Example) -> None:
        """Make an example one that others may not resemble."""
        text, place = example.prompt[-1].content, len(self.texts)
        letters = self.letters(text)
        words = list(map(ord, letters))
        self.ids.append(example.id)
        self.texts.append(letters)
        self.written.append(text)
        self.lengths.append(len(words))
        self.context_of.append(self.contexts.setdefault(example.prompt[:-1], len(self.contexts)))
        self.literals_of.append(self.literals.setdefault(extract_literals(text), len(self.literals)))
        if len(words) * self.ratio <= LONG_TEXT_WORDS:
            for token in distinguish_repeats(words):
                self.holders[token].append(place)
        if len(words) > LONG_TEXT_WORDS * self.ratio and len(words) >= 3:
            for triple in min_hash_sketch(words):
                self.sketched[triple].append(place)

    def nearest(self, example: Example, anywhere: bool = False) -> tuple[str, float] | None:
        """The id of the most similar instruction, of several the first added, and its ROUGE-L, if they are alike.

        `anywhere` is for leaks: among all rows, whatever the turns before the last, and whatever the numbers and quoted
        strings. To train on a held-out question with other numbers would flatter the student.
        """
        given, known = example.prompt[-1].content, extract_literals(example.prompt[-1].content)
        if not anywhere and (known not in self.literals or example.prompt[:-1] not in self.contexts):
            return None
        text = self.letters(given)
        places = self.candidates(list(map(ord, text)))
        if not anywhere and len(places):
            same = as_numpy(self.context_of)[places] == self.contexts[example.prompt[:-1]]
            places = places[same & (as_numpy(self.literals_of)[places] == self.literals[known])]
        found = process.extract(
            text,
            [self.texts[place] for place in places.tolist()],
            scorer=Indel.normalized_similarity,  # the same as ROUGE-L, but for rounding
            score_cutoff=max(0.0, self.max_rouge - ROUNDING_TOLERANCE),
            limit=None,
        )
        for _, similarity, number in found:
            if score := self.alike(text, given, place := int(places[number]), similarity):
                return self.ids[place], score
        return None

    def alike(self, text: str, given: str, place: int, similarity: float) -> float:
        """The ROUGE-L of a text and a row, if they are alike; else 0.

        `similarity` is the same number from rapidfuzz, which rounds more than once: the LCS's length follows from it.
        """
        other = self.texts[place]
        if text == other:
            return 1.0
        size = len(text) + len(other)
        score = 2 * round(similarity * size / 2) / size
        if score <= self.max_rouge:
            return 0.0
        parts = [[self.letters(piece) for piece in split_segments(whole)] for whole in (given, self.written[place])]
        rests = {remove_common_segments(*parts), remove_template(text, other, self.frames.get(other, (0, 0)))} - {
            (text, other)
        }
        differ = any(one and two and rouge_l(one, two) <= self.max_rouge for one, two in rests)
        return 0.0 if differ else score

    def candidates(self, words: Sequence[int]) -> NDArray[np.int64]:
        """The places of all texts that may pass the limit, and of few others, in order.

        With the tokens sorted from rare to frequent, a text whose first shared token is the one at `rank` shares
        m - rank at the most, and passes the limit t only if 2 * (m - rank) > t * (m + n).
        """
        if len(words) > LONG_TEXT_WORDS:
            return self.long_candidates(words)
        m, limit = len(words), max(self.max_rouge, ROUNDING_TOLERANCE)
        held = sorted((self.holders[token] for token in distinguish_repeats(words) if token in self.holders), key=len)
        shortest, seen = limit * m / (2 - limit) - ROUNDING_TOLERANCE, np.zeros(len(self.texts), dtype=bool)
        for rank, places in enumerate(held, m - len(held)):  # tokens that no text has are the rarest
            longest = 2 * (m - rank + ROUNDING_TOLERANCE) / limit - m
            if longest < shortest:
                break
            rows = as_numpy(places)
            lengths = as_numpy(self.lengths)[rows]
            seen[rows[(lengths >= shortest) & (lengths <= longest)]] = True
        return np.flatnonzero(seen)

    def long_candidates(self, words: Sequence[int]) -> NDArray[np.int64]:
        """The places of the texts that share enough of a long text's sketch, and are about as long, in order."""
        triples = min_hash_sketch(words)
        held = [as_numpy(self.sketched[triple]) for triple in triples if triple in self.sketched]
        if not held:
            return np.zeros(0, dtype=np.int64)
        counts = np.bincount(np.concatenate(held), minlength=len(self.texts))
        lengths = as_numpy(self.lengths)
        close = (lengths >= len(words) * self.ratio - ROUNDING_TOLERANCE) & (
            lengths * self.ratio <= len(words) + ROUNDING_TOLERANCE
        )
        return np.flatnonzero(close & (counts >= max(1.0, min_sketch_overlap(self.max_rouge) * len(triples))))


def distinguish_repeats(words: Sequence[int]) -> list[int]:
    """The words with the second, third, ... of the same word told apart: what two texts share is then a set."""
    counts: dict[int, int] = {}
    found = []
    for word in words:
        before = counts.get(word, 0)
        found.append(word + before * MAX_DISTINCT_WORDS)
        counts[word] = before + 1
    return found


def as_numpy(values: "array[int]") -> NDArray[np.int32]:
    """An array's values, not copied: while it is in use nothing can be appended to them."""
    return np.frombuffer(values, dtype=np.int32)
