"""Judgements from scores, and the difficulty that follows from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapir_local.method.judging import (
    JudgedAnswer,
    combine_orders,
    combine_single,
    judge_by_rouge,
    mfd,
    preference_pairs,
)
from tapir_local.records import Completion, Example, Judgement, Message


@given(st.floats(1, 10), st.floats(1, 10))
def test_alone_the_difficulty_is_the_difference_of_the_two_scores(teacher: float, student: float) -> None:
    assert mfd(combine_single("a", teacher, student)) == teacher - student


def test_a_judgement_averages_both_orders() -> None:
    judgement = combine_orders("a", (8, 4), (6, 9))  # the teacher's first: 8 to 4; then the student's first: 6 to 9
    assert (judgement.teacher, judgement.student) == (8.5, 5.0)
    assert mfd(judgement) == 3.5


def test_one_unread_order_is_unjudged_not_zero() -> None:
    judgement = combine_orders("a", (8, 4), None)
    assert (judgement.teacher, judgement.student, mfd(judgement)) == (None, None, None)
    assert judgement.reason


def test_difficulty_is_what_the_teacher_scores_above_the_student() -> None:
    assert mfd(Judgement("a", teacher=9, student=2)) == 7


def test_likeness_counts_the_same_words_as_ten_and_none_as_one() -> None:
    assert judge_by_rouge("a", "The cat sat", "the cat sat").student == 10
    assert judge_by_rouge("a", "the cat sat", "").student == 1
    assert judge_by_rouge("a", "one two three four", "one two five six").student == pytest.approx(1 + 9 * 0.5)


def judged(id: str, orders: tuple | None, *, number: int = 1, finish: str = "stop", text: str = "bad") -> JudgedAnswer:
    """A row judged in both orders, (teacher, student) each, or alone with 9 to 2 if `orders` is None."""
    row = Example(id, (Message("user", f"question {id}"),), "good", "Math", origin="expanded", parent="p", round=1)
    judgement = combine_single(id, 9, 2) if orders is None else combine_orders(id, orders[0], orders[1][::-1])
    return JudgedAnswer(row, Completion(id, text, finish, 1), judgement, number)


def test_a_pair_is_a_row_that_the_teacher_wins_in_both_orders() -> None:
    rows = [
        judged("both", ((9, 2), (8, 3))),
        judged("one", ((10, 1), (9, 7))),  # the mean difference is 5.5
        judged("at the margin", ((9, 7), (9, 2))),
        judged("lost", ((2, 9), (2, 9))),
        judged("cut", ((9, 2), (9, 2)), finish="length"),
        judged("alone", None),
    ]
    pairs, cut = preference_pairs(rows, 2)
    assert [(pair.id, pair.difficulty) for pair in pairs] == [("both", 6), ("alone", 7)]
    assert cut == 1
    assert (pairs[0].completion, pairs[0].rejected, pairs[0].task, pairs[0].judged_in) == ("good", "bad", "Math", 1)
    assert [pair.id for pair in preference_pairs(rows, 1)[0]] == ["both", "one", "at the margin", "alone"]


def test_of_a_prompt_the_pair_of_the_latest_round_that_has_one_counts() -> None:
    both, won = ((9, 2), (9, 2)), ((9, 9), (9, 9))
    rows = [
        judged("a", both, number=3, text="third"),
        judged("a", both, number=1, text="first"),
        judged("b", both, number=2, text="second"),
        judged("b", won, number=3),
    ]
    assert {pair.id: (pair.rejected, pair.judged_in) for pair in preference_pairs(rows, 2)[0]} == {
        "a": ("third", 3),
        "b": ("second", 2),
    }
