"""What a check can tell of an answer without an LLM, and that it says None of everything else."""

from dataclasses import replace

import pytest

from tapir_local.checkers import CHECKERS, arithmetic, form, length, python, script
from tapir_local.recipe_text import parse_recipe
from tapir_local.records import Example, Message
from tapir_local.tasks import TASKS
from tapir_local.tools import checker

CODE = "Write a Python function that doubles a number."
GOOD, BAD = "```python\ndef f(x):\n    return 2 * x\n```", "```python\ndef f(x)\n    return 2 * x\n```"


@pytest.mark.parametrize(
    ("instruction", "answer", "right"),
    [
        ("What is 12 + 7?", "12 + 7 = 19.", True),
        ("What is 12 + 7?", "The answer is 20.", False),
        ("What is 12 + 7?", "It is 19, for 12 and 7 make that.", None),
        ("What is 12 + 7?", "nineteen", None),
        ("What is 12 + 7?", "I do not know.", False),
        ("Calculate 3 * (4 - 10).", "First 4 - 10 = -6, then 3 * -6 = -18", True),
        ("Calculate: 1,200 ÷ 7", "about 171.43", True),
        ("Calculate: 1,200 ÷ 7", "about 171.44", False),
        ("What is 15% of 80?", "12", True),
        ("What is 6/4?", "3/2", True),
        ("What is 6/4?", "6/4", False),
        ("Evaluate 2^10 =", "**1,024**", True),
        ("What is 1.05 * 2?", "2.10", True),
        ("What is 1/0?", "0", None),
        ("What is ((9^64)^64)^64?", "1", None),
        ("Tom has 12 pears and 7 apples. How many fruits?", "19", None),
        ("What is 12?", "12", None),
        ("9" * 5000 + " + 1", "1", None),
        ("What is 1 + 1?", "9" * 5000, False),
    ],
)
def test_a_plain_sum_is_right_where_its_value_comes_last(instruction: str, answer: str, right: bool | None) -> None:
    assert arithmetic(instruction, answer) is right


@pytest.mark.parametrize(
    ("instruction", "answer", "right"),
    [
        (CODE, f"Here it is:\n{GOOD}\nCall f(2).", True),
        (CODE, BAD, False),
        (CODE, GOOD.replace("python", ""), True),
        ("Write a function that doubles.", GOOD.replace("python", ""), None),
        ("Write a function that doubles.", GOOD, True),
        (CODE, f"{GOOD}\n{BAD}", None),
        (CODE, "def f(x): return 2 * x", None),
        (CODE, "```javascript\nlet f = x => 2 * x\n```", None),
        (CODE, "```python\n>>> f(2)\n4\n```", None),
        ("Write it in Python 2.", '```python\nprint "x"\n```', None),
        (CODE, '```python\n    x = "\\d"\n    y = 1\n```', True),
        (CODE, "```python\n" + "(" * 5000 + "\n```", False),
        (CODE, "```python\nx = '\0'\n```", False),
        (CODE, "```python\n```", None),
    ],
)
def test_python_compiles_or_not_or_there_is_none(instruction: str, answer: str, right: bool | None) -> None:
    assert python(instruction, answer) is right


@pytest.mark.parametrize(
    ("instruction", "answer", "right"),
    [
        ("List three fruits as JSON.", '["fig", "plum", "pear"]', True),
        ("List three fruits as a JSON array.", '```json\n["fig"]\n```', True),
        ("List three fruits as JSON.", 'Here you are: ["fig"]', False),
        ("List three fruits as JSON.", "{'a': 1}", False),
        ("List three fruits as JSON.", "[" * 100_000, False),
        ("Return valid JSON with a name.", "3", False),
        ("What is JSON?", "A format.", None),
        ("How do I return a JSON object?", "So.", None),
        ("Convert this JSON to YAML: {}", "a: 1", None),
        ("Give me the data in YAML.", "a: 1\nb: [2]", True),
        ("Give me the data in YAML.", "It is one and two.", False),
        ("Give me the data in YAML.", "a: &x [1]\nb: *x", False),
        ("Write the list in CSV.", "a,b\n1,2", True),
        ("Write the list in CSV.", "a,b\n1", False),
        ("Write the list in CSV.", 'a,"b\n1,2', False),
        ("Make a table of planets.", "Here:\n\n| a | b |\n|---|:-:|\n| 1 | 2 |", True),
        ("Make a table of planets.", "| a | b |\n|---|---|\n| 1 | 2 | 3 |", False),
        ("Make a table of planets.", "Mars, Venus", False),
        ("List three fruits.", "fig, plum, pear", None),
    ],
)
def test_the_form_asked_for_is_there_or_not(instruction: str, answer: str, right: bool | None) -> None:
    assert form(instruction, answer) is right


@pytest.mark.parametrize(
    ("instruction", "answer", "right"),
    [
        ("Translate 'good day' into Russian.", "Добрый день", True),
        ("Translate 'good day' into Russian.", "Dobryy den", False),
        ("Translate 'good day' into Russian.", "Добрый день (Dobryy den, good day)", None),
        ("Translate 'cat' to Japanese.", "ねこ", True),
        ("Translate this from Russian to English: кот", "cat", None),
        ("Say it in Greek and in Hebrew.", "γάτα", None),
        ("Translate 'cat' into French.", "chat", None),
        ("Translate 'cat' into Korean.", "", False),
    ],
)
def test_a_script_of_its_own_is_seen(instruction: str, answer: str, right: bool | None) -> None:
    assert script(instruction, answer) is right


@pytest.mark.parametrize(
    ("instruction", "words", "right"),
    [
        ("Write at most 5 words.", 5, True),
        ("Write at most 5 words.", 6, False),
        ("Write fewer than 5 words.", 5, False),
        ("Write at least 5 words.", 4, False),
        ("Write more than 5 words.", 6, True),
        ("Write more than 5 words.", 5, False),
        ("Write exactly 5 words.", 5, True),
        ("Use at least 3 words and no more than 5 words.", 6, False),
        ("Write no more than 5 words.", 0, False),
        ("Write about 5 words.", 5, None),
        ("Write a 5-word line.", 5, None),
    ],
)
def test_words_are_counted_where_a_limit_is_set(instruction: str, words: int, right: bool | None) -> None:
    assert length(instruction, "word " * words) is right


def test_every_checker_that_a_task_names_is_there() -> None:
    named = {task.checker for task in TASKS.values()} - {None}
    assert named == set(CHECKERS)


def test_a_row_is_checked_by_its_own_task() -> None:
    check = checker(parse_recipe("teacher: pocket\nchecker: tasks", "r"))
    assert check is not None
    row = Example("a", (Message("user", "What is 2 + 2?"),), task="Math")
    assert (check(row, "4"), check(row, "5")) == (True, False)
    assert check(replace(row, task="Art"), "4") is None
    assert check(replace(row, task="Nowhere"), "4") is None
