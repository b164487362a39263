"""Find near-duplicates: the most similar instruction by ROUGE-L among many, without comparing with each of them."""

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

MAX_DISTINCT_WORDS = 0x110000  # each distinct word is one code point
ROUNDING_TOLERANCE = 1e-9  # far below the difference of two ROUGE-L values of real texts
LONG_TEXT_WORDS = 1000  # candidates for longer texts are found by sketches


class DedupIndex:
    """An index of instructions that finds the most similar one by ROUGE-L of words, if it is above a limit.

    ROUGE-L's F1 is 2*LCS/(m+n), where m and n are the numbers of words (Lin 2004, ROUGE: A Package for Automatic
    Evaluation of Summaries). Texts with equal words are similar at any limit. Other texts above the limit are similar
    unless

    - their numbers or quoted strings differ (`27 + 48` and `27 + 49` are two sums), or
    - their rests differ after the sentences and lines that both contain are removed: the common part is then a
      preamble, or a document about which each text asks a different question; or
    - their rests differ after a template of many rows is removed (see `learn`).

    The result is the same as from a comparison with every row. Most comparisons are avoided by prefix filtering
    (Chaudhuri, Ganti, Kaushik 2006, A Primitive Operator for Similarity Joins): a common subsequence is at most as long
    as the number of shared words, so a text above the limit shares at least `need` words, and therefore one of the
    rarest m - need + 1. Only rows with one of these words are compared. For texts of more than LONG_TEXT_WORDS words,
    the candidates are rows whose sketches overlap enough, which is an estimate.

    Only the last turn is compared, and only among rows with the same turns before it: a system message that all rows
    share would make them similar, and `Go on.` asks something different in each conversation.
    """

    def __init__(self, max_rouge: float) -> None:
        self.max_rouge = max_rouge
        self.alphabet: dict[str, int] = {}
        self.ids: list[str] = []
        self.texts: list[str] = []  # one character per word
        self.written: list[str] = []  # the original texts
        self.lengths = array("i")
        self.contexts: dict[Prompt, int] = {}
        self.context_of = array("i")
        self.literals: dict[tuple[str, ...], int] = {}
        self.literals_of = array("i")
        self.frames: dict[str, tuple[int, int]] = {}
        self.lettered: dict[str, str] = {}  # the texts passed to `learn`, one character per word
        # By token or by word triple, the positions of texts that contain it.
        self.holders: dict[int, array[int]] = defaultdict(lambda: array("i"))
        self.sketched: dict[int, array[int]] = defaultdict(lambda: array("i"))
        # The smallest ratio of the lengths of two texts that can be above the limit.
        self.ratio = max(max_rouge, ROUNDING_TOLERANCE) / (2 - max(max_rouge, ROUNDING_TOLERANCE))

    def encode(self, text: str) -> list[int]:
        """Each word as a number; a text without words counts as one word."""
        alphabet = self.alphabet
        found = [alphabet.setdefault(word, len(alphabet)) for word in WORD_OR_SIGN.findall(text.lower()) or [""]]
        if len(alphabet) > MAX_DISTINCT_WORDS:
            raise TapirError(f"more than {MAX_DISTINCT_WORDS:,} different words in the instructions")
        return found

    def learn(self, examples: Iterable[Example]) -> None:
        """Find templates: beginnings and endings that many examples share.

        Call it once, before the first `add`, so that the result does not depend on the order of the rows.
        """
        self.lettered = {(text := row.prompt[-1].content): self.letters(text) for row in examples}
        self.frames = find_templates(list(self.lettered.values()))

    def letters(self, text: str) -> str:
        """A text as a string of one character per word."""
        return self.lettered.get(text) or "".join(map(chr, self.encode(text)))

    def add(self, example: Example) -> None:
        """Add an example, so that later ones are compared with it."""
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
        """(id, ROUGE-L) of the most similar instruction, the first added if there are several; None if none is similar.

        `anywhere` is for leaks: it ignores the turns before the last one and differences in numbers and quoted strings,
        because training on a held-out question with other numbers would make the holdout score too high.
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
            scorer=Indel.normalized_similarity,  # equals ROUGE-L except for rounding
            score_cutoff=max(0.0, self.max_rouge - ROUNDING_TOLERANCE),
            limit=None,
        )
        for _, similarity, number in found:
            if score := self.confirmed_rouge(text, given, place := int(places[number]), similarity):
                return self.ids[place], score
        return None

    def confirmed_rouge(self, text: str, given: str, place: int, similarity: float) -> float:
        """The exact ROUGE-L of a text and a row if they are similar, else 0.

        `similarity` is the same value from rapidfuzz with rounding errors; the length of the LCS is computed from it.
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
        """The positions, in order, of all texts that can be above the limit, and of few others.

        The tokens are sorted from rare to frequent. A text whose first shared token is at `rank` shares at most
        m - rank tokens, and is above the limit t only if 2 * (m - rank) > t * (m + n).
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
        """The positions, in order, of texts of similar length whose sketches overlap enough with a long text's."""
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
    """Give the second, third, ... occurrence of a word its own number, so that two texts share a set of tokens."""
    counts: dict[int, int] = {}
    found = []
    for word in words:
        before = counts.get(word, 0)
        found.append(word + before * MAX_DISTINCT_WORDS)
        counts[word] = before + 1
    return found


def as_numpy(values: "array[int]") -> NDArray[np.int32]:
    """An array's values without a copy; nothing can be appended to the array while the result is in use."""
    return np.frombuffer(values, dtype=np.int32)
