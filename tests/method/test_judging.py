"""Judgements from scores, and the difficulty that follows from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapir_local.method.judging import combine_orders, combine_single, judge_by_rouge, mfd
from tapir_local.records import Judgement


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
