"""Chat templates: rendering equals transformers, and every completion ends its turn."""

from datetime import date

import pytest
from models import CHATML, WITH_BOS, make_tokenizer
from templates import GEMMA, GRANITE, LLAMA2, LLAMA3, MARKED, QWEN25

from tapir_local.data.chat_template import render, render_training_text
from tapir_local.errors import TapirError
from tapir_local.records import Message
from tapir_local.resources import read_chat_template

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TEMPLATES = {
    "our alpaca": read_chat_template("alpaca"), "our chatml": read_chat_template("chatml"),
    "chatml": CHATML, "chatml-bos": WITH_BOS, "llama2": LLAMA2, "llama3": LLAMA3, "qwen2.5": QWEN25, "zephyr": ZEPHYR,
    "gemma": GEMMA, "granite": GRANITE, "marked": MARKED,
}  # fmt: skip
USER = Message("user", "  What is <b>2 + 2</b>?\nÜmläut 🙂 ")
TURNS = (USER, Message("assistant", "Four."), Message("user", "And 3 + 3?"))
SYSTEM = Message("system", "Be brief.")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("asking", [True, False])
def test_same_text_as_transformers(tokenizer, name: str, asking: bool) -> None:
    for turns in ((USER,), TURNS, (SYSTEM, *TURNS)):
        if name == "gemma" and SYSTEM in turns:
            continue
        dicts = [{"role": turn.role, "content": turn.content} for turn in turns]
        tokenizer.chat_template = TEMPLATES[name]
        wanted = tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=asking)
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        assert render(TEMPLATES[name], turns, add_generation_prompt=asking, **tokens, today=date.today()) == wanted


def test_the_date_is_fixed() -> None:
    assert "Today Date: 26 Jul 2024" in render(LLAMA3, [USER], add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_completion_joined_are_the_conversation(name: str) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    prompt, completion = render_training_text(TEMPLATES[name], TURNS, "Six.", **tokens)
    assert prompt == render(TEMPLATES[name], TURNS, add_generation_prompt=True, **tokens)
    assert prompt + completion == render(
        TEMPLATES[name], (*TURNS, Message("assistant", "Six.")), add_generation_prompt=False, **tokens
    )
    assert "Six." in completion
    assert completion.strip() != "Six."


def test_messages_that_the_template_refuses() -> None:
    with pytest.raises(TapirError, match="turns system, user: System role not supported"):
        render(GEMMA, (SYSTEM, USER), add_generation_prompt=True)
    with pytest.raises(TapirError, match="must alternate"):
        render(LLAMA2, (USER, USER), add_generation_prompt=True)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}", "{{ messages[0].content.missing.more }}", "{{ 1 + 'a' }}"]
)
def test_a_broken_template_is_one_error(template: str) -> None:
    with pytest.raises(TapirError, match="chat template refused"):
        render(template, [USER], add_generation_prompt=True)


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    with pytest.raises(TapirError):
        render("{{ messages.__class__.__mro__[1].__subclasses__() }}", [USER], add_generation_prompt=True)


def test_a_template_that_does_not_end_a_turn_is_refused() -> None:
    alpaca = (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}END\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    with pytest.raises(TapirError, match="ends the assistant's turn"):
        render_training_text(alpaca.replace("END", ""), [USER], "Four.")
    with pytest.raises(TapirError, match="ends the assistant's turn"):
        render_training_text(alpaca, [USER], "Four.", stops=["<|im_end|>"])
    assert render_training_text(alpaca, [USER], "Four.", stops=["END"])[1] == "Four.END\n\n"


def test_a_conversation_that_does_not_begin_with_the_prompt_is_refused() -> None:
    template = "{% if add_generation_prompt %}ask {% else %}tell {% endif %}{{ messages[-1].content }}</s>"
    with pytest.raises(TapirError, match="not the beginning"):
        render_training_text(template, [USER], "Four.")


def test_a_template_that_changes_the_answer_is_refused() -> None:
    with pytest.raises(TapirError, match="changes the assistant's words"):
        render_training_text(CHATML.replace("message['content']", "message['content'] | upper"), [USER], "Four.")


def test_an_empty_completion_still_ends_its_turn() -> None:
    assert render_training_text(CHATML, [USER], "")[1] == "<|im_end|>\n"
