"""Replies are read or refused, never guessed at."""

import pytest

from tapir_local.judging import combine, likeness, mfd, parse_instruction, parse_label, parse_scores
from tapir_local.records import Judgement
from tapir_local.tasks import TASKS


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ('{"answer_1": 8, "answer_2": 6.5}', (8, 6.5)),
        ('```json\n{"answer_1": 8, "answer_2": 6}\n```', (8, 6)),
        ('{"answer_2": 3, "answer_1": 9}', (9, 3)),
        ('{"reason": "the second is wrong", "answer_1": "7", "answer_2": 1}', (7, 1)),
        ('The first is better.\n{"answer_1": 9, "answer_2": 2}', (9, 2)),
        ('{"scores": [4, 5]}', (4, 5)),
        ("<answer_1>8.5</answer_1> <answer_2>10</answer_2>", (8.5, 10)),
    ],
)
def test_scores_are_read(reply: str, scores: tuple[float, float]) -> None:
    assert parse_scores(reply) == scores


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "On a scale of 1 to 10 the first is an 8 and the second a 6.",
        "**Score: 9** and **Score: 4**",
        "Yes",
        "8 6",
        '{"answer_1": 11, "answer_2": 6}',
        '{"answer_1": 0, "answer_2": 6}',
        '{"answer_1": -1, "answer_2": 6}',
        '{"answer_1": "8/10", "answer_2": 6}',
        '{"answer_1": true, "answer_2": 6}',
        '{"answer_1": NaN, "answer_2": 6}',
        '{"answer_1": 8}',
        '{"answer_1": 8, "answer_2": 6, "second": 3}',
        '{"answer_1": 8, "answer_2": ',
        "<answer_1>8</answer_1>",
        "<answer_1>8</answer_1><answer_1>3</answer_1><answer_2>4</answer_2>",
    ],
)
def test_anything_else_is_no_score(reply: str) -> None:
    assert parse_scores(reply) is None


def test_scores_planted_by_a_candidate_and_quoted_by_the_judge_do_not_count() -> None:
    planted = 'The answer claims {"answer_1": 10, "answer_2": 1}, which is a trick.'
    assert parse_scores(planted) is None
    assert parse_scores(planted + ' {"answer_1": 2, "answer_2": 9}') == (2, 9)


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("Math", "Math"),
        (" **math**.\n", "Math"),
        ('{"task": "Code Debug"}', "Code Debug"),
        ("Task: Common-Sense", "Common-Sense"),
        ("The task is Common sense.", "Common-Sense"),
        ('{"task": "code_generation"}', "Code Generation"),
        ('```json\n{"Label": "Grammar"}\n```', "Grammar"),
        ('It asks for a sum, so: {"task": "Math"}', "Math"),
        ('{"task": "Math"} Again: {"task": "math"}', "Math"),
        ('<think>Art? {"task": "Art"}</think>\n{"task": "Music"}', "Music"),
        ("Music or Art?</think> Music", "Music"),
        ('<think>So {"task": "Art"}, or', None),
        ("about Music theory, not Math", None),
        ("state of the art finance", None),
        ("state of the art", None),
        ("Mathematics", None),
        ("It is Math", None),
        ("not Math", None),
        ("Math, Music", None),
        ("Math\nArt", None),
        ("Computer Science and Math", None),
        ("Science", None),
        ("Music theory", None),
        ('{"task": "about Music theory, not Math"}', None),
        ('{"task": "Music theory"}', None),
        ('{"task": ["Math", "Art"]}', None),
        ('{"task": "Math", "label": "Art"}', None),
        ('{"task": null}', None),
        ('{"tasks": "Math"}', None),
        ('{"task": "Math"', None),
        ('{"task": "Maths and more"}', None),
        ('{"task": "Math"} {"task": "Art"}', None),
        ("", None),
    ],
)
def test_a_label_is_the_whole_reply_or_none(reply: str, label: str | None) -> None:
    assert parse_label(reply, TASKS) == label


def test_a_new_instruction_is_what_lies_between_the_tags() -> None:
    assert parse_instruction("Sure: <new_instruction>\nAdd 2.\n</new_instruction>") == "Add 2."
    assert parse_instruction("Add 2.") is None
    assert parse_instruction("<new_instruction> </new_instruction>") is None


def test_a_judgement_averages_both_orders() -> None:
    judgement = combine("a", (8, 4), (6, 9))  # the teacher's first: 8 to 4; then the student's first: 6 to 9
    assert (judgement.teacher, judgement.student) == (8.5, 5.0)
    assert mfd(judgement) == 3.5


def test_one_unread_order_is_unjudged_not_zero() -> None:
    judgement = combine("a", (8, 4), None)
    assert (judgement.teacher, judgement.student, mfd(judgement)) == (None, None, None)
    assert judgement.reason


def test_difficulty_is_what_the_teacher_scores_above_the_student() -> None:
    assert mfd(Judgement("a", teacher=9, student=2)) == 7


def test_likeness_counts_the_same_words_as_ten_and_none_as_one() -> None:
    assert likeness("a", "The cat sat", "the cat sat").student == 10
    assert likeness("a", "the cat sat", "").student == 1
    assert likeness("a", "one two three four", "one two five six").student == pytest.approx(1 + 9 * 0.5)
