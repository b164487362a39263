"""The dedup index finds the same rows as a comparison with every row."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapir_local.data.dataset import remove_near_duplicates
from tapir_local.data.dedup import DedupIndex
from tapir_local.data.similarity import WORD_OR_SIGN, rouge_l
from tapir_local.errors import TapirError
from tapir_local.records import Example, Message

LIMITS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0)


def ask(id: str, text: str, *before: str) -> Example:
    return Example(id, (*(Message("system", turn) for turn in before), Message("user", text)))


def lcs(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence in words, by dynamic programming."""
    row = [0] * (len(b) + 1)
    for word in a:
        row = table(word, b, row)
    return row[-1]


def table(word: str, b: list[str], above: list[int]) -> list[int]:
    """The next row of the table."""
    row = [0]
    for at, (corner, top) in enumerate(pairwise(above)):
        row.append(corner + 1 if word == b[at] else max(top, row[-1]))
    return row


def every_pair(text: str, rows: list[Example], limit: float) -> tuple[str, float] | None:
    """A loop over all rows: the first with the highest ROUGE-L above the limit, or with equal words."""
    words = WORD_OR_SIGN.findall(text.lower()) or [""]
    best: tuple[str, float] | None = None
    for row in rows:
        other = WORD_OR_SIGN.findall(row.prompt[-1].content.lower()) or [""]
        score = 2 * lcs(words, other) / (len(words) + len(other))
        if score > best[1] if best else (score > limit or words == other):
            best = row.id, score
    return best


few_words = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g"]), max_size=14).map(" ".join)


@settings(max_examples=400, deadline=None)
@given(st.lists(few_words, min_size=1, max_size=25), st.sampled_from(LIMITS))
def test_same_result_as_a_loop_over_all_pairs(texts: list[str], limit: float) -> None:
    index, rows = DedupIndex(limit), list[Example]()
    for number, text in enumerate(texts):
        row = ask(str(number), text)
        found = index.nearest(row)
        assert found == every_pair(text, rows, limit)
        if not found:
            index.add(row)
            rows.append(row)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(LIMITS), st.floats(0.01, 0.5))
def test_same_result_for_altered_copies(seed: int, limit: float, change: float) -> None:
    """Words with the frequencies of a natural language, and near-duplicates of every similarity."""
    rng = random.Random(seed)
    words = [f"w{int(1 / (rng.random() + 0.003))}" for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(10)]
    for _ in range(30):
        copy = [rng.choice(words) if rng.random() < change else word for word in rng.choice(texts).split()]
        texts.append(" ".join(copy[: rng.randint(1, 50)]))
    rows = [ask(str(number), text) for number, text in enumerate(texts)]
    index = DedupIndex(limit)
    for row in rows[:25]:
        index.add(row)
    for row in rows:
        assert index.nearest(row) == every_pair(row.prompt[-1].content, rows[:25], limit)


SHOP = "A shop sells {} crates for {} coins each. Tom pays with a note of {} coins. How many does he get back today?"
LOG = (
    "You are given a note from the ship's log. Read it with care, do not invent anything, keep the words of the log "
    "where you can, write no more than three sentences, and answer in plain words, without lists and greetings. "
)
ASKED = (
    "Who was the captain?", "What did they eat?", "Name the ports.", "Why did the mast break?", "Was there fog?",
    "How was the cargo stowed?", "When did the cook fall ill?", "Describe the storm.", "Translate the last line.",
    "Which sails were set?",
)  # fmt: skip
THINGS = "lamp kettle mirror ladder broom bucket barrel anchor candle hammer pillow saddle".split()  # noqa: SIM905


def kept(texts: Sequence[str], limit: float) -> int:
    """The number of texts without an earlier near-duplicate."""
    rows = remove_near_duplicates([ask(str(number), text) for number, text in enumerate(texts)], limit)[0]
    assert len(remove_near_duplicates([ask("x", text) for text in reversed(texts)], limit)[0]) == len(rows)
    return len(rows)


@pytest.mark.parametrize("limit", [0.7, 0.9, 1.0])
@pytest.mark.parametrize(
    "texts",
    [
        [SHOP.format(n, n + 1, 20 * n) for n in range(1, 9)],
        [SHOP.format(3, 4, 20), SHOP.format(4, 3, 20)],
        ["What is the result of 27 + 48, my friend?", "What is the result of 27 - 48, my friend?"],
        ["What is the result of 3.5 % of it, my friend?", "What is the result of 3.6 % of it, my friend?"],
        [f'Use the word "{word}" in a short sentence about the sea and the land.' for word in THINGS],
        [f"Use the word ‘{word}’ in a short sentence about the sea and the land." for word in THINGS],  # noqa: RUF001
        [f"Use the word “{word}” in a short sentence about the sea and the land." for word in THINGS],
        [f"Say what `{word}` prints where the program is run on a machine of the other kind." for word in THINGS],
        [f"Was tut «{word}» in einem kurzen Satz über das Meer und das weite Land?" for word in THINGS],
        [LOG + question for question in ASKED],
        [LOG + question for question in ASKED[:2]],
        [question + "\n\n" + LOG for question in ASKED],
        [LOG + question + " Answer in the language of the question, please." for question in ASKED],
    ],
)
def test_other_numbers_quotations_or_questions_make_other_rows(texts: list[str], limit: float) -> None:
    assert kept(texts, limit) == len(texts)


@pytest.mark.parametrize("limit", [0.7, 0.9])
@pytest.mark.parametrize(
    "template",
    [
        "Write a polite letter to the owner of the house at the harbor about the {} that we left there.",
        "Explain to a child of the lower school in plain words and with one example what one does with a {}",
        "{}: name what it is made of, who sells it, how it is kept clean, and where it is put at night.",
    ],
)
def test_rows_with_a_common_template_are_not_duplicates(template: str, limit: float) -> None:
    assert kept([template.format(thing) for thing in THINGS], limit) == len(THINGS)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SHOP.format(3, 4, 20), SHOP.format(3, 4, 20).replace("today", "now")),
        ('Name a rhyme for "sea" that a child would know.', "Name a rhyme for “sea” that a child would know!"),
        (LOG + "Who was the captain of the ship on that day?", LOG + "Who was the captain of the ship on this day?"),
        (LOG + "Who was it?", LOG + "who was it"),
        ("Name some rivers of Europe that flow south.", "Name the rivers of Europe that flow south."),
    ],
)
def test_real_near_duplicates_are_found(first: str, second: str) -> None:
    assert kept([first, second], 0.7) == 1


@pytest.mark.parametrize("limit", [0.9, 1.0])
def test_equal_words_are_similar_at_any_limit(limit: float) -> None:
    index = DedupIndex(limit)
    index.add(ask("a", "Name a fruit."))
    assert index.nearest(ask("b", "name  a fruit .")) == ("a", 1.0)
    assert index.nearest(ask("b", "Name a fruit!")) is None


@pytest.mark.parametrize(
    ("held", "draft", "leaks"),
    [
        ("Name a rhyme for sea that a child knows", '1. Name a rhyme for "sea" that a child knows', True),
        ("What is the sum of 27 and 48, my friend?", "What is the sum of 48 and 27, my friend?", True),
        ("What is the sum of 27 and 48, my friend?", "What is the sum of 5 and 49, my friend?", True),
        (LOG + ASKED[0], LOG + ASKED[1], False),
        (LOG + ASKED[0], "Be brief. " + LOG + ASKED[0], True),
    ],
)
def test_a_leak_may_have_other_numbers_but_not_another_question(held: str, draft: str, leaks: bool) -> None:
    index = DedupIndex(0.7)
    index.add(ask("h", held))
    assert (index.nearest(ask("d", draft), anywhere=True) is not None) == leaks


def document(rng: random.Random, words: int) -> str:
    """A text with the word frequencies of a natural language."""
    return " ".join(f"w{chr(97 + int(25 * rng.random() ** 2))}{int(40 * rng.random() ** 3)}x" for _ in range(words))


def test_long_documents_are_found_by_sketches() -> None:
    rng = random.Random(1)
    texts = [document(rng, rng.randint(900, 4000)) for _ in range(12)]
    for number, text in enumerate(texts[:10]):
        words = text.split()
        for place in rng.sample(range(len(words)), len(words) // 25):
            words[place] = "changed"
        rows = [ask(str(n), other) for n, other in enumerate(texts)]
        found, left_out = remove_near_duplicates([*rows, ask("d", " ".join(words))], 0.9)
        assert [row.id for row in found] == [row.id for row in rows]
        assert [row.near for row in left_out] == [str(number)]


def test_rouge_l_equals_the_published_definition() -> None:
    """F1 of the longest common subsequence: 2 * LCS / (m + n)."""
    index = DedupIndex(0.0)
    index.add(ask("p", "a b c d e"))
    assert index.nearest(ask("q", "a x c e")) == ("p", 2 * 3 / (5 + 4))
    assert rouge_l("abcde", "axce") == 2 * 3 / (5 + 4)


@pytest.mark.parametrize("same", [7, 14, 21])
def test_a_similarity_equal_to_the_limit_is_not_above_it(same: int) -> None:
    words = [f"word{n}" for n in range(same * 10 // 7)]
    index = DedupIndex(0.7)
    index.add(ask("p", " ".join(words)))
    assert index.nearest(ask("q", " ".join(words[:same] + ["x"] * (len(words) - same)))) is None
    assert index.nearest(ask("r", " ".join(words[: same + 1] + ["x"] * (len(words) - same - 1)))) is not None


def test_the_first_of_several_is_returned() -> None:
    index = DedupIndex(0.5)
    for name, text in (("a", "one two three four"), ("b", "one two three five"), ("c", "one two three six")):
        index.add(ask(name, text))
    assert index.nearest(ask("q", "one two three seven")) == ("a", 0.75)


def test_a_common_system_message_does_not_make_rows_similar() -> None:
    rules = "You are a careful assistant that answers every question in one short sentence and never makes things up."
    index = DedupIndex(0.7)
    index.add(ask("a", "What is a fjord?", rules))
    assert index.nearest(ask("b", "Who wrote Emma?", rules)) is None
    assert index.nearest(ask("c", "What is a fjord ?", rules)) == ("a", 1.0)


def test_equal_words_after_different_turns_are_not_duplicates() -> None:
    index = DedupIndex(0.7)
    index.add(ask("a", "Go on.", "Tell me of whales."))
    assert index.nearest(ask("b", "Go on.", "Tell me of steam.")) is None
    assert index.nearest(ask("b", "Go on.", "Tell me of steam."), anywhere=True) == ("a", 1.0)


def test_writing_without_spaces_is_compared_by_its_characters() -> None:
    index = DedupIndex(0.7)
    index.add(ask("a", "请写一首关于春天的诗"))
    assert index.nearest(ask("b", "请写一首关于秋天的诗")) == ("a", 0.9)
    assert index.nearest(ask("c", "日本の首都はどこですか")) is None


def test_too_many_distinct_words_are_an_error() -> None:
    index = DedupIndex(0.7)
    index.alphabet = {str(number): number for number in range(0x110000)}
    with pytest.raises(TapirError, match="1,114,112 different words"):
        index.add(ask("a", "unheard of"))


def test_texts_without_words_are_similar_to_each_other_only() -> None:
    index = DedupIndex(0.7)
    index.add(ask("a", "x"))
    assert index.nearest(ask("b", " ")) is None
    index.add(ask("c", "\n"))
    assert index.nearest(ask("d", "")) == ("c", 1.0)
