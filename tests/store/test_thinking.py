"""Thoughts are removed from answers, and an answer that quotes their marks is unchanged."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapir_local.store.thinking import strip_thoughts

HARMONY = "<|channel|>analysis<|message|>add<|end|><|start|>assistant<|channel|>"
SOLVED = "<|begin_of_thought|>\nadd\n<|end_of_thought|>\n\n<|begin_of_solution|>\n4\n<|end_of_solution|>"


@pytest.mark.parametrize(
    "reply",
    [
        "4",
        "<think>\nadd them\n</think>\n\n4",
        "<think>add them</think>4",
        "add them\n</think>\n\n4",
        "add them.</think>\n4",
        "\n\n</think>4",
        "<think>\r\nadd\r\n</think>\r\n4",
        "<THINK>\nadd\n</THINK>\n4",
        "\n  <think>add</think> 4",
        "\ufeff<think>add</think>4",
        "<think></think>\n\n4",
        "<think type='deep'>add</think>4",
        "<thinking>add</thinking>4",
        "<thought>add</thought>\n4",
        "<reasoning>add</reasoning>\n4",
        "<seed:think>add</seed:think>4",
        "[THINK]add[/THINK]4",
        "◁think▷add◁/think▷4",
        "<|channel>thought\nadd\n<channel|>4",
        SOLVED,
        f"{HARMONY}final<|message|>4<|return|>",
        f"{HARMONY}final <|constrain|>json<|message|>4",
        f"<|start|>assistant{HARMONY}commentary<|message|>now<|end|><|channel|>final<|message|>4",
        "<|channel|>final<|message|>4",
        "analysisWe need to add.assistantfinal4",
        "<think>a</think><think>b</think>4",
        "<think>a</think>\n<think>b</think>\n4",
    ],
)
def test_every_kind_of_thought_is_removed(reply: str) -> None:
    assert strip_thoughts(reply) == "4"


def test_later_thoughts_are_removed_too() -> None:
    assert strip_thoughts("<think>a</think>x<think>b</think>y") == "xy"


@pytest.mark.parametrize(
    "reply",
    [
        "<think>add",
        "  <THINKING>\nadd\n4",
        "<think>add</think>",
        "<think>\n",
        f"{HARMONY[:-11]}",
        "[THINK]add",
        "<|channel>thought\nadd",
    ],
)
def test_a_reply_that_is_only_a_thought_is_empty(reply: str) -> None:
    assert strip_thoughts(reply).strip() == ""


@pytest.mark.parametrize(
    "reply",
    [
        "The tag </think> closes a thought.",
        "Use <think>…</think> around it.",
        "```html\n<think>\nadd\n</think>\n```",
        "So:\n```\n</think>\n```\n",
        "Write `</think>`\nand go on.",
        "re.sub('<think>.*?</think>', '', text)\n",
        "    indented = 1\n",
        "\n\ntwo lines above",
        "<thinker>x</thinker>",
        "<b>think</b>",
        "analysis of it, as the assistant final",
        "The mark <|channel|>final<|message|> begins the answer.",
    ],
)
def test_an_answer_that_quotes_a_tag_is_unchanged(reply: str) -> None:
    assert strip_thoughts(reply) == reply


def test_code_after_a_thought_keeps_its_tags_and_its_indentation() -> None:
    code = "    x = 1\n```\n<think>\ny\n</think>\n```\nand `<think>z</think>`"
    assert strip_thoughts(f"<think>They ask about tags.</think>\n\n{code}") == code


@given(st.text())
def test_a_text_without_marks_is_unchanged(text: str) -> None:
    if not any(mark in text for mark in "<[◁") and not text.lstrip().startswith("analysis"):
        assert strip_thoughts(text) == text


@given(st.text(alphabet="a<>/thinkTHINK `\n|[]", max_size=60), st.text(alphabet="ab \n", min_size=1, max_size=20))
def test_only_the_answer_after_a_thought_is_kept(thought: str, answer: str) -> None:
    if "</" not in thought and "<" not in thought:
        assert strip_thoughts(f"<think>{thought}</think>\n{answer}").strip() == answer.strip()
