"""What checkers can verify without an LLM, and that they return None for everything else."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapir_local.method.checkers import (
    CHECKERS,
    MAX_TEXT_LENGTH,
    check_arithmetic,
    check_form,
    check_length,
    check_python,
    check_script,
    tolerate_errors,
)
from tapir_local.recipe.tasks import TASKS
from tapir_local.recipe.text import parse_recipe
from tapir_local.records import Example, Message
from tapir_local.stages.backends import recipe_checker

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
        # what may not be arithmetic: dates, telephone numbers, years, names
        ("12/12/2020", "A date.", None),
        ("What is 12/12/2020?", "A Saturday.", None),
        ("2020-12-24", "Christmas Eve", None),
        ("Calculate 555-1234", "That is a phone number.", None),
        ("Find 020-7946-0958", "A number in London: 7", None),
        ("What is 24/7?", "All the time, 7 days.", None),
        ("What is 9/11?", "An attack in 2001.", None),
        ("What is 1914-1918?", "The years of a war, 4 of them.", None),
        ("24-7", "17 hours", None),
        ("24-7=", "18", False),
        # ambiguous expressions
        ("What is 2^3^2?", "64", None),
        ("What is -2^2?", "4", None),
        # other ways to write the value, or a part of it
        ("What is 1/3?", "0.33", True),
        ("What is 2/3?", "0.66", None),
        ("What is 2/3?", "0.65", False),
        ("What is 10/3?", "about 3", None),
        ("What is 10/3?", "3", False),
        ("What is 1/3?", "33.3%", None),
        ("What is 6/4?", "1 1/2", None),
        ("What is 1/2?", "\u00bd", True),
        ("What is 6/4?", "1\u00bd", None),
        ("What is 1/2?", "one half", None),
        ("What is 10/4?", "2 remainder 2", None),
        ("What is 10/4?", "2 R2", None),
        ("What is 30000 * 30000?", "9 \u00d7 10^8", None),
        ("What is 30000 * 30000?", "9\u00d710\u2078", None),
        ("What is 30000 * 30000?", "9e8", None),
        ("What is 1000 * 1200?", "1 200 000", None),
        ("What is 1000 * 1200?", "1.200.000", None),
        ("What is 5/2?", "2,5", None),
        ("What is 7 - 10?", "\u20133", True),
        ("What is 7 - 10?", "minus 3", None),
        ("What is 7 - 10?", "-$3", True),
        ("What is 12 + 7?", "dix-neuf", None),
        ("What is 12 + 7?", "\uff11\uff19", True),
        ("What is 12 + 7?", "", False),
        ("What is 12 + 7?" + " " * 300, "19", True),
    ],
)
def test_a_plain_sum_is_right_where_its_value_comes_last(instruction: str, answer: str, right: bool | None) -> None:
    assert check_arithmetic(instruction, answer) is right


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
        (CODE, "```python\npip install numpy\n```", None),
        (CODE, "```python\n$ python f.py\n```", None),
        (CODE, '```python\nprint "x"\n```', None),
        (CODE, "```python\ntry:\n    f()\nexcept OSError, error:\n    pass\n```", None),
        (CODE, "```python\nTraceback (most recent call last):\n  File 'x'\n```", None),
        (CODE, "```python\n" + "x = 1\n" * 4000 + "```", None),
        (CODE, "```python\nx = 1", None),
    ],
)
def test_python_compiles_or_not_or_there_is_none(instruction: str, answer: str, right: bool | None) -> None:
    assert check_python(instruction, answer) is right


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
        # other kinds of tables
        ("Create a table for six, please.", "Booked.", None),
        ("Make a table reservation.", "Booked.", None),
        ("Write a table of contents.", "1 Begin\n2 End", None),
        ("Give me the periodic table.", "H, He", None),
        ("Write a story with a table in it.", "There was a table.", None),
        ("Make a table of planets.", "<table><tr><td>Mars</td></tr></table>", None),
        ("Make a table of planets.", "+----+\n|Mars|\n+----+", None),
        ("Make a table of planets.", "Mars\t1", None),
        # a program, or another meaning of the name
        ("Write a function that can return JSON.", "def f(): ...", None),
        ("Write a Python script that can output CSV.", "import csv", None),
        ("Create JSON Lines of two fruits.", '{"a": 1}\n{"a": 2}', None),
        ("Return a JSON string.", '"a"', None),
        # text around the block that has the format
        ("Write a JSON.", "Sure! ```json\n{}\n```", False),
        ("Write a JSON.", "Sure!\n```json\n{}\n```", None),
        ("Write a JSON.", "Sure!\n```json\n{\n```", False),
        ("Write a JSON.", '{"a": NaN}', False),
        # the values in YAML may be anything
        ("Give me the data in YAML.", "due: !!timestamp tomorrow", True),
        ("Give me the data in YAML.", "due: 2024-13-45", True),
        ("Give me the data in YAML.", "a: !!int x\nb: !!bool maybe\nc: !!float", True),
        ("Give me the data in YAML.", "a: !Ref x\n--- \nb: 1", True),
        ("Give me the data in YAML.", "? [a]\n: 1", True),
        ("Give me the data in YAML.", "[" * 4000, None),
        ("Give me the data in YAML.", "- " * 4000 + "a", None),
        ("Give me the data in YAML.", "{a: " * 60, None),
        ("Give me the data in YAML.", "a: 1\n" * 5000, None),
        # one row, one column, another separator
        ("Write the list in CSV.", "a,b,c", None),
        ("Write the list in CSV.", "a\nb\nc", None),
        ("Write the list in CSV.", "a;b\n1;2", None),
        ("Write the list in CSV.", "I would say fig.\nAnd plum.", False),
    ],
)
def test_the_form_asked_for_is_there_or_not(instruction: str, answer: str, right: bool | None) -> None:
    assert check_form(instruction, answer) is right


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
        ("How do you say 'thank you' in Japanese?", "Arigatou gozaimasu", None),
        ("How do you say 'thank you' in Japanese?", "ありがとう", True),
        ("Write 'cat' in Russian, transliterated.", "koshka", None),
        ("Translate 'cat' into Chinese using pinyin.", "mao", None),
        ("Write an essay about the gods in Greek mythology.", "Zeus was the first.", None),
        ("Write a recipe that is common in Thai cuisine.", "Take rice.", None),
        ("Write an introduction to Greek philosophy.", "Thales was the first.", None),
        ("Translate '42' into Russian.", "42", None),
        ("Translate 'iPhone' into Russian.", "iPhone", None),
        ("Translate this English sentence into Russian: the cat sleeps.", "Koshka spit.", False),
    ],
)
def test_a_script_of_its_own_is_seen(instruction: str, answer: str, right: bool | None) -> None:
    assert check_script(instruction, answer) is right


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
        ("Write a story with a title of at most 5 words.", 50, None),
        ("List three facts, each in at most 5 words.", 12, None),
        ("Write a line of at least 5 words that start with b, and over 3 words from the list.", 2, None),
        ('Paraphrase: "He used at most 5 words."', 9, None),
    ],
)
def test_words_are_counted_where_a_limit_is_set(instruction: str, words: int, right: bool | None) -> None:
    assert check_length(instruction, "word " * words) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("a well-known old red fox", None),
        ("a fox \u2014 red and old", None),
        ("赤い狐", None),
        ("it's a red fox now", True),
    ],
)
def test_where_it_depends_on_what_a_word_is_nothing_is_known(answer: str, right: bool | None) -> None:
    assert check_length("Write exactly 5 words.", answer) is right


MARKS = ["[", "{", "- ", "? ", ": ", "|", "&a ", "!!x ", '"', "%", ",", "9,", "1/", "\0", "a."]
ODD = [*MARKS, " ", "\n", " \n", "```\n", "``` x\n", "\t"]
ASKED = {
    "arithmetic": ["What is 12 + 7?", "1" + " " * 380 + "x", "(" * 190, "1. " * 130 + "x"],
    "python": [CODE],
    "form": [f"List it as {kind}." for kind in ("JSON", "YAML", "CSV", "a table")],
    "script": ["Translate it into Russian.", "in " * 30000 + "Russian"],
    "length": ["Write at most 5 words.", "at most" + " " * 90000],
}


@pytest.mark.parametrize("name", CHECKERS)
def test_no_answer_however_long_and_odd_takes_a_checker_long(name: str) -> None:
    """Each took minutes with a pattern that was tried at every space; now they take a moment, or the suite hangs."""
    for instruction in ASKED[name]:
        for odd in ODD:
            for answer in (odd * (99_000 // len(odd)), f"```python\n{odd * (19_000 // len(odd))}\n```"):
                assert CHECKERS[name](instruction, answer) in (True, False, None)


@given(st.sampled_from(sorted(CHECKERS)), st.text(), st.text(st.sampled_from('[]{}"`-?:!&*|,.\n\t 019ab')))
def test_no_answer_whatever_breaks_a_checker(name: str, words: str, answer: str) -> None:
    for instruction in (*ASKED[name], words):
        assert CHECKERS[name](instruction, answer) in (True, False, None)


def test_a_checker_that_raises_or_is_given_too_much_does_not_know() -> None:
    def broken(instruction: str, answer: str) -> bool:
        raise AttributeError(answer)

    assert tolerate_errors(broken)("a", "b") is None
    assert tolerate_errors(lambda instruction, answer: True)("a", "b" * (MAX_TEXT_LENGTH + 1)) is None
    assert tolerate_errors(lambda instruction, answer: True)("a", "b") is True


def test_every_checker_that_a_task_names_is_there() -> None:
    named = {task.checker for task in TASKS.values()} - {None}
    assert named == set(CHECKERS)


def test_a_row_is_checked_by_its_own_task() -> None:
    check = recipe_checker(parse_recipe("teacher: pocket\nchecker: tasks", "r"))
    assert check is not None
    row = Example("a", (Message("user", "What is 2 + 2?"),), task="Math")
    assert (check(row, "4"), check(row, "5")) == (True, False)
    assert check(replace(row, task="Art"), "4") is None
    assert check(replace(row, task="Nowhere"), "4") is None
