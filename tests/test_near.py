"""The nearest instruction is the one that comparing with every row finds."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapir_local.errors import TapirError
from tapir_local.near import WORD, Index, rouge_l
from tapir_local.records import Example, Message

LIMITS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0)


def ask(id: str, text: str, *before: str) -> Example:
    return Example(id, (*(Message("system", turn) for turn in before), Message("user", text)))


def lcs(a: list[str], b: list[str]) -> int:
    """Words of the longest common subsequence, by the textbook's table."""
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
    """The plain loop: the highest ROUGE-L above the limit, or the same words; of several rows the first."""
    words = WORD.findall(text.lower()) or [""]
    best: tuple[str, float] | None = None
    for row in rows:
        other = WORD.findall(row.prompt[-1].content.lower()) or [""]
        score = 2 * lcs(words, other) / (len(words) + len(other))
        if score > best[1] if best else (score > limit or words == other):
            best = row.id, score
    return best


few_words = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g"]), max_size=14).map(" ".join)


@settings(max_examples=400, deadline=None)
@given(st.lists(few_words, min_size=1, max_size=25), st.sampled_from(LIMITS))
def test_it_finds_what_a_loop_over_all_pairs_finds(texts: list[str], limit: float) -> None:
    index, rows = Index(limit), list[Example]()
    for number, text in enumerate(texts):
        row = ask(str(number), text)
        found = index.nearest(row)
        assert found == every_pair(text, rows, limit)
        if not found:
            index.add(row)
            rows.append(row)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(LIMITS), st.floats(0.01, 0.5))
def test_and_among_rows_that_are_altered_copies_of_others(seed: int, limit: float, change: float) -> None:
    """Words as frequent as in a language, and near-duplicates at every distance from each other."""
    rng = random.Random(seed)
    words = [f"w{int(1 / (rng.random() + 0.003))}" for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(10)]
    for _ in range(30):
        copy = [rng.choice(words) if rng.random() < change else word for word in rng.choice(texts).split()]
        texts.append(" ".join(copy[: rng.randint(1, 50)]))
    rows = [ask(str(number), text) for number, text in enumerate(texts)]
    index = Index(limit)
    for row in rows[:25]:
        index.add(row)
    for row in rows:
        assert index.nearest(row) == every_pair(row.prompt[-1].content, rows[:25], limit)


def test_rouge_l_equals_the_published_definition() -> None:
    """F1 of the longest common subsequence: 2 * LCS / (m + n)."""
    index = Index(0.0)
    index.add(ask("p", "a b c d e"))
    assert index.nearest(ask("q", "a x c e")) == ("p", 2 * 3 / (5 + 4))
    assert rouge_l("abcde", "axce") == 2 * 3 / (5 + 4)


@pytest.mark.parametrize("same", [7, 14, 21])
def test_a_likeness_of_just_the_limit_does_not_pass_it(same: int) -> None:
    words = [f"word{n}" for n in range(same * 10 // 7)]
    index = Index(0.7)
    index.add(ask("p", " ".join(words)))
    assert index.nearest(ask("q", " ".join(words[:same] + ["x"] * (len(words) - same)))) is None
    assert index.nearest(ask("r", " ".join(words[: same + 1] + ["x"] * (len(words) - same - 1)))) is not None


def test_of_several_the_first_added_is_named() -> None:
    index = Index(0.5)
    for name, text in (("a", "one two three four"), ("b", "one two three five"), ("c", "one two three six")):
        index.add(ask(name, text))
    assert index.nearest(ask("q", "one two three seven")) == ("a", 0.75)


def test_a_system_message_that_all_rows_share_does_not_make_them_alike() -> None:
    rules = "You are a careful assistant that answers every question in one short sentence and never makes things up."
    index = Index(0.7)
    index.add(ask("a", "What is a fjord?", rules))
    assert index.nearest(ask("b", "Who wrote Emma?", rules)) is None
    assert index.nearest(ask("c", "What is a fjord ?", rules)) == ("a", 1.0)


def test_the_same_words_after_other_turns_ask_for_another_thing() -> None:
    index = Index(0.7)
    index.add(ask("a", "Go on.", "Tell me of whales."))
    assert index.nearest(ask("b", "Go on.", "Tell me of steam.")) is None
    assert index.nearest(ask("b", "Go on.", "Tell me of steam."), anywhere=True) == ("a", 1.0)


def test_writing_without_spaces_is_compared_by_its_characters() -> None:
    index = Index(0.7)
    index.add(ask("a", "请写一首关于春天的诗"))
    assert index.nearest(ask("b", "请写一首关于秋天的诗")) == ("a", 0.9)
    assert index.nearest(ask("c", "日本の首都はどこですか")) is None


def test_more_words_than_there_are_letters_for_is_an_error() -> None:
    index = Index(0.7)
    index.alphabet = {str(number): number for number in range(0x110000)}
    with pytest.raises(TapirError, match="1,114,112 different words"):
        index.add(ask("a", "unheard of"))


def test_a_text_without_words_is_like_another_only() -> None:
    index = Index(0.7)
    index.add(ask("a", "x"))
    assert index.nearest(ask("b", " ")) is None
    index.add(ask("c", "\n"))
    assert index.nearest(ask("d", "")) == ("c", 1.0)
