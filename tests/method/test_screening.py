"""Unusable new instructions are rejected, and real ones are not."""

import json
from pathlib import Path

import pytest

from tapir_local.method import prompts
from tapir_local.method.screening import (
    ECHO_REASON,
    MISSING_REASON,
    PARENT_REASON,
    STATEMENT_REASON,
    is_only_statements,
    lacks_text,
    max_shared_openings,
    opening_words,
    prompt_sentences,
    screen_instruction,
)
from tapir_local.recipe.tasks import TASKS
from tapir_local.records import Message

OURS = prompt_sentences(TASKS)
PARENT_TEXT = "Write a short poem about a cat that lives by the sea."


def fault(text: str, parent: str = PARENT_TEXT) -> str:
    return screen_instruction(text, parent, OURS)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.label)
def test_a_tasks_line_is_no_instruction(task) -> None:
    for text in (task.description, f"{task.label}: {task.description}", f"{task.description.capitalize()}."):
        assert fault(text) == ECHO_REASON


@pytest.mark.parametrize(
    "text",
    [
        *(
            line
            for turn in prompts.expand_prompt((Message("user", ""),), TASKS["Art"])
            for line in turn.content.split(". ")[1:]
        ),
        *prompts.NEW.values(),
        prompts.EXPAND,
        "Write one new instruction of the same task and domain, about as long and as hard as this one.",
        "Do not answer it. Reply with the new instruction between tags, and nothing else.",
        "Math: arithmetic, algebra, geometry, statistics and word problems with many numbers",
        "Write a poem. It must make sense by itself and be answerable in text.",
        "Write the answer as numbered or line-by-line worked steps, each doing one small thing.",
    ],
)
def test_words_of_the_request_are_no_instruction(text: str) -> None:
    assert fault(text) == ECHO_REASON


@pytest.mark.parametrize(
    "text",
    [
        PARENT_TEXT,
        PARENT_TEXT.upper() + "!!",
        f"New instruction: {PARENT_TEXT}",
        f"Please {PARENT_TEXT[0].lower()}{PARENT_TEXT[1:-1]}",
    ],
)
def test_the_parent_itself_is_no_new_instruction(text: str) -> None:
    assert fault(text) == PARENT_REASON


def test_another_number_or_name_makes_another_instruction() -> None:
    assert fault("What is 12 + 7?", "What is 12 + 8?") == ""
    assert fault("Translate into Greek: the red dog.", "Translate into Greek: the red cat.") == ""


@pytest.mark.parametrize(
    "text",
    [
        "Summarize the following article:",
        "Summarize the following article.",
        "Summarize the article in three sentences.",
        "Rewrite this paragraph so that it is easier to read.",
        "Translate the text below into French.",
        "Correct the grammar of the sentence provided.",
        "Given the attached report, list its three main findings.",
        "Classify each of the following sentences as positive or negative.",
        "Using the table above, find the largest city.",
        "Proofread the following e-mail to a customer and mend its mistakes.",
        "What is wrong with this code?\u2014",
        "Summarize this: [insert article here]",
        "Paraphrase the sentence: <text>",
        "Answer the question based on the given passage.",
        "Debug the code snippet below so that it prints the sum.",
    ],
)
def test_a_text_that_is_spoken_of_and_not_there_is_missed(text: str) -> None:
    assert fault(text) == MISSING_REASON


@pytest.mark.parametrize(
    "text",
    [
        "Summarize the following article:\n\nThe river rose by two metres last night.",
        "Translate the sentence below into French: The dog sleeps.",
        'Correct the grammar of the following sentence: "He go home."',
        "Which of the following words is a verb: run, red, table?",
        "Sort the following numbers: 5, 1, 3.",
        "Write a story in which the following happens: a boy finds a map.",
        "Explain what happened in the story of Cinderella.",
        "Write a list of five fruits.",
        "Given a sorted list, how does binary search find an item?",
        "The river rose by two metres last night and many had to leave. What does the text above say of the river?",
        "Create a function that removes punctuation from a given sentence.",
        "Continue: 2, 4, 6,",
    ],
)
def test_a_text_that_is_there_is_not_missed(text: str) -> None:
    assert not lacks_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "You have a headache and your vision is blurry.",
        "The patient has had a fever for three days.",
        "She bought six apples and gave two of them away.",
        "There is a red house at the end of the street. It has two doors.",
        "Yesterday, the river was frozen.",
    ],
)
def test_statements_alone_set_no_task(text: str) -> None:
    assert fault(text) == STATEMENT_REASON


@pytest.mark.parametrize(
    "text",
    [
        "You have a headache and your vision is blurry. What could be the cause?",
        "You are a pirate. Greet me.",
        "I need a name for my bakery.",
        "She bought six apples and gave two away; how many are left?",
        "The capital of France",
        "The sky is ___.",
        "The opposite of hot is",
        "There are two dogs and a cat in the yard. Count the animals.",
        "A train leaves at noon and another at one. Determine which arrives first.",
        "Hello, my name is Sam and I would like to book a table.",
        "Cost of living in Lisbon.",
    ],
)
def test_what_asks_for_something_is_no_mere_statement(text: str) -> None:
    assert not is_only_statements(text)


def test_no_instruction_of_the_pocket_world_is_rejected() -> None:
    path = Path(__file__).parents[2] / "tapir_local" / "assets" / "pocket_seeds.json"
    for row in json.loads(path.read_text(encoding="utf-8")):
        assert fault("\n\n".join(filter(None, (row["instruction"], row["input"]))), "") == ""


def test_openings_are_four_words_and_three_may_always_share_one() -> None:
    assert opening_words("Write a Short, story about it") == "write a short story"
    assert [max_shared_openings(0.2, rows) for rows in (1, 10, 15, 40)] == [3, 3, 3, 8]
    assert max_shared_openings(None, 40) == 40
