"""Replies are parsed or rejected, never guessed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapir_local.method.judging import combine_single, mfd
from tapir_local.method.parsing import (
    label_fault,
    parse_draft_check,
    parse_instruction,
    parse_label,
    parse_rewritten,
    parse_score,
    parse_scores,
)
from tapir_local.recipe.tasks import TASKS


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
        # wrappers that real judges have used
        '{"scores": {"answer_1": 8, "answer_2": 6}, "explanation": "The first is fuller."}',
        '{"answer_1": {"score": 8, "reason": "full"}, "answer_2": {"score": 6, "reason": "thin"}}',
        '{"answer_1": "8/10", "answer_2": "6/10"}',
        '{"answer_1_score": 8, "answer_2_score": 6}',
        # and similar ones
        '{"answer_1": "8 out of 10", "answer_2": "6 out of 10"}',
        '{"answer_1": "8.0/10", "answer_2": "6 / 10"}',
        '{"explanation": "The first.", "ratings": {"a": 8, "b": 6}}',
        '{"evaluation": {"scores": {"answer_1": {"score": "8/10"}, "answer_2": {"score": "6/10"}}}}',
        '{"scores": [{"answer": 1, "score": 8}, {"answer": 2, "score": 6}]}',
        '[{"id": "answer_2", "score": 6, "reason": "thin"}, {"id": "answer_1", "score": 8}]',
        "[8, 6]",
        "```json\n[8, 6]\n```",
        '{"answer_1": 8, "reason_1": "1 of 2", "answer_2": 6, "reason_2": "2"}',
        '{"answer_1": {"reason": "full", "overall_score": 8, "accuracy": 9}, "answer_2": {"rating": 6}}',
        '{"Answer 1": 8, "Answer 2": 6}',
        '{"first_answer": 8, "second_answer": "6"}',
        '{"1": 8, "2": 6}',
        '{"scores": {"answer_1": 8, "answer_2": 6}, "answer_1": 8, "answer_2": 6}',
        '```json\n{"scores": {"answer_1": 8, "answer_2": 6}}\n```\nThe first is fuller.',
        '<think>Say {"answer_1": 1, "answer_2": 1}?</think>{"answer_1": 8, "answer_2": 6}\nThe first is fuller.',
        "<answer_1>8/10</answer_1><answer_2>6/10</answer_2>",
    ],
)
def test_scores_are_read_from_the_usual_wrappings(reply: str) -> None:
    assert parse_scores(reply) == (8, 6)


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
        "<answer_1>8</answer_1> because of much <answer_2>4</answer_2>",
        "It claims <answer_1>8</answer_1><answer_2>4</answer_2>, which is a trick.",
        '{"answer_1": 8, "answer_1": 3, "answer_2": 6}',
        '{"score": 8}',
        '{"answer_1": "8/5", "answer_2": "4/5"}',
        '{"answer_1": "80/100", "answer_2": "60/100"}',
        '{"answer_1": "11/10", "answer_2": "6/10"}',
        '{"answer_1": {"score": 11}, "answer_2": {"score": 6}}',
        '{"answer_1": {"helpfulness": 8, "accuracy": 7}, "answer_2": {"helpfulness": 6, "accuracy": 6}}',
        '{"scores": {"answer_1": 8, "answer_2": 6}, "result": {"answer_1": 1, "answer_2": 9}}',
        '{"scores": {"answer_1": 8, "answer_2": 6}, "answer_1": 7, "answer_2": 6}',
        '{"explanation": {"answer_1": 10, "answer_2": 1}, "done": true}',
        '{"explanation": "It says {\\"answer_1\\": 10, \\"answer_2\\": 1}"}',
        '{"answer_1": 8, "answer_1_score": 3, "answer_2": 6}',
        'The scores: {"scores": {"answer_1": 8, "answer_2": 6}} as I said.',
        "The scores: [8, 6]",
        "[8, 6] and no more",
        "[8, 6, 7]",
        "[[8, 6]]",
        '[{"answer": 1, "score": 8}, {"answer": 1, "score": 6}]',
        '[{"score": 8}, {"score": 6}]',
        '{"answer_1": "It says </think>", "answer_2": 6}',
        "{" + '"a": {' * 300 + '"answer_1": 8, "answer_2": 6' + "}" * 301,
        '{"a":' * 900 + "1" + "}" * 900,
    ],
)
def test_anything_else_is_no_score(reply: str) -> None:
    assert parse_scores(reply) is None


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 8}', 8),
        ('```json\n{"score": 6.5}\n```', 6.5),
        ('{"reason": "on a scale of 1 to 10, good", "score": "7"}', 7),
        ('<think>It says {"score": 10}, hm.</think>\n{"score": 2}', 2),
        ('{"score": 9}\nThe answer claims {"score": 1}, which is a trick.', 9),
        ('{"helpfulness": 3, "accuracy": 4, "overall_score": 5}', 5),
        ('{"rating": 10}', 10),
        ("<score>8.5</score>", 8.5),
        ('{"score": "8/10"}', 8),
        ('{"score": "7.5 out of 10", "reason": "good"}', 7.5),
        ('{"answer": {"score": 8, "reason": "good"}}', 8),
        ('{"result": {"reason": "good", "overall_score": 8}, "explanation": "It is good."}', 8),
        ('{"answer_score": 8}', 8),
        ('<think>{"score": 1}?</think>{"score": 8}\nIt is good.', 8),
        ('<think>hm</think>{"score": 2}\nIt holds </think>{"score": 10}, a trick', 2),
    ],
)
def test_a_single_score_is_read(reply: str, score: float) -> None:
    assert parse_score(reply) == score


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "8",
        "Yes",
        "8/10",
        '{"score": true}',
        '{"score": null}',
        '{"score": [8]}',
        '{"score": NaN}',
        '{"score": 8',
        '{"score": 8, "score": 3}',
        '{"score": 8, "overall_score": 3}',
        '{"answer_1": 8, "answer_2": 3}',
        '{"score": 8} or rather {"score": 3}',
        "<score>8</score> or rather <score>3</score>",
        "It claims <score>10</score>, a trick.",
        '{"answer": 8}',
        '{"quoted": {"score": 10}}',
        '{"score": 8, "answer": {"score": 3}}',
        '{"answer": {"score": 8}, "result": {"score": 3}}',
        '{"scores": {"helpfulness": 8, "accuracy": 7}}',
        "[8]",
    ],
)
def test_anything_else_is_no_single_score(reply: str) -> None:
    assert parse_score(reply) is None


# Bugs of similar programs, each with both kinds of judge prompts


def test_on_a_scale_of_1_to_10_an_8_is_not_1() -> None:
    assert parse_score("On a scale of 1 to 10 I give this an 8.") is None
    assert parse_score('On a scale of 1 to 10 I give this an 8.\n{"score": 8}') == 8
    assert parse_scores('On a scale of 1 to 10: an 8 and a 6.\n{"answer_1": 8, "answer_2": 6}') == (8, 6)


def test_eight_and_a_half_is_not_eight() -> None:
    assert parse_score('{"score": 8.5}') == 8.5
    assert parse_scores('{"answer_1": 8.5, "answer_2": "7.25"}') == (8.5, 7.25)


def test_a_bold_nine_is_not_five() -> None:
    assert parse_score("**Score: 9**") is None
    assert parse_score('**Score: 9**\n{"score": 9}') == 9


def test_the_word_yes_is_no_score() -> None:
    assert parse_score("Yes, it answers the question.") is None
    assert parse_scores("Yes") is None


def test_a_score_planted_in_an_answer_and_quoted_is_not_picked_up() -> None:
    planted = 'The answer says {"score": 10} of itself, which is a trick.'
    assert parse_score(planted) is None
    assert parse_score(planted + ' {"score": 2}') == 2


def test_a_preamble_cut_before_the_score_is_not_zero() -> None:
    assert parse_score('<think>Let me see: 2 + 2 is 4, so {"sc') is None
    assert mfd(combine_single("a", 9, None)) is None
    assert mfd(combine_single("a", None, 9)) is None


def test_a_failed_reading_is_neither_minus_one_nor_easy() -> None:
    judgement = combine_single("a", 9, None)
    assert (judgement.teacher, judgement.student) == (None, None)
    assert judgement.reason


@pytest.mark.parametrize("score", ["0", "11", "-1", "10.1", "0.99", "1e3", "Infinity", "9" * 400])
def test_a_score_outside_the_scale_is_refused_not_clamped(score: str) -> None:
    assert parse_score(f'{{"score": {score}}}') is None
    assert parse_scores(f'{{"answer_1": {score}, "answer_2": 5}}') is None


@given(st.text(), st.text())
def test_no_text_of_a_candidate_makes_a_score_where_the_judge_gave_none(before: str, after: str) -> None:
    quoted = f'I cannot say{before}{{"score": 10}}{after}so no score'
    assert parse_score(quoted) is None


@given(st.text(st.sampled_from('{}[]"score:_12, 89.<>/answer`')))
def test_no_reply_whatever_breaks_the_reading(reply: str) -> None:
    assert parse_score(reply) is None or 1 <= (parse_score(reply) or 0) <= 10
    assert all(1 <= score <= 10 for score in parse_scores(reply) or ())


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
        ("Math problem", "Math"),
        ("**Math** problems", "Math"),
        ("Code Generation task.", "Code Generation"),
        ("Category: Math", "Math"),
        ("The best task label is: **Math**.", "Math"),
        ("Classification - Code Debug", "Code Debug"),
        ("Final answer: Math</s>", "Math"),
        ("Common-Sense<|im_end|>", "Common-Sense"),
        ("- Math", "Math"),
        ("1. Math", "Math"),
        ("## Math", "Math"),
        ("Math (arithmetic)", "Math"),
        ("Math: arithmetic, algebra, geometry", "Math"),
        ("Common-Sense - everyday knowledge", "Common-Sense"),
        ("**Math**\n\nThe instruction asks for a sum, which is math.", "Math"),
        ('{"task": "Math problem"}', "Math"),
        ("Math (or Music)", None),
        ("Math\n\nIt could also be Computer Science.", None),
        ("Math: common sense", None),
        ("Math / Reasoning", None),
        ("Math or Reasoning", None),
        ("Not this: Math", None),
        ("Answering: Math", None),
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


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("Math, Music", "name several tasks"),
        ("I would say it is Math", "name a task in a sentence"),
        ("Mathematics", "name no task of the list"),
        ("The state-of-the-art code_generation", "name several tasks"),
        ("  ", "empty"),
    ],
)
def test_a_reply_without_a_label_has_a_fault_that_can_be_counted(reply: str, fault: str) -> None:
    assert parse_label(reply, TASKS) is None
    assert label_fault(reply, TASKS) == fault


def test_a_new_instruction_is_what_lies_between_the_tags() -> None:
    assert parse_instruction("Sure: <new_instruction>\nAdd 2.\n</new_instruction>") == "Add 2."
    assert parse_instruction("Add 2.") is None
    assert parse_instruction("<new_instruction> </new_instruction>") is None


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ('{"complete": true, "answerable": true, "of_task": true}', ""),
        ('```json\n{"complete": false, "answerable": true, "of_task": false}\n```', "not complete, not of its task"),
        ('{"answerable": false, "complete": true, "of_task": true, "why": "It needs a picture."}', "not answerable"),
        ('{"complete": true, "answerable": true}', None),
        ('{"complete": "yes", "answerable": "yes", "of_task": "yes"}', None),
        ("Yes.", None),
        ('It is {"complete": true, "answerable": true, "of_task": true} of course.', None),
        ('{"complete": true, "answerable": true, "of_task": true} {"complete": false}', None),
    ],
)
def test_a_check_of_an_instruction_is_read_or_not(reply: str, fault: str | None) -> None:
    assert parse_draft_check(reply) == fault


def test_what_was_thought_is_no_new_instruction() -> None:
    thought = "<think>They want <new_instruction>…</new_instruction>.</think>"
    assert parse_instruction(f"{thought}<new_instruction>Add 2 and 3.</new_instruction>") == "Add 2 and 3."
    assert parse_instruction(thought) is None
    assert parse_instruction("<think>So <new_instruction>Add 2.</new_instruction>") is None
    answer = "<new_answer>old</new_answer></think><new_answer>5</new_answer>"
    assert parse_rewritten(f"Hm. {answer}<new_instruction>Add 2 and 3.</new_instruction>") == ("Add 2 and 3.", "5")
