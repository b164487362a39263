"""A conversation: replies are sampled, a seed repeats them, and typed special tokens are plain text."""

import random
from collections.abc import Iterator

import pytest

from tapir_local.commands.chat import CHAT_HELP, ChatModel, chat_loop
from tapir_local.inference.generate import encode_prompt
from tapir_local.inference.model import Engine, open_engine
from tapir_local.inference.tokens import encode
from tapir_local.records import Message


@pytest.fixture(scope="module")
def engine(llama) -> Iterator[Engine]:
    with open_engine(llama.gguf, context=256, parallel=1) as opened:
        yield opened


def replies(engine: Engine, seed: int, temperature: float) -> list[str]:
    """Four replies to the same first question."""
    speaker, found = ChatModel("student", engine, 12, random.Random(seed)), []
    for _ in range(4):
        found.append("".join(speaker.answer("What is 7 times 8?", temperature)))
        speaker.history = []
    return found


def test_at_a_temperature_replies_differ_unless_the_seed_is_the_same(engine: Engine) -> None:
    assert len(set(replies(engine, 1, 1.5))) > 1
    assert replies(engine, 1, 1.5) == replies(engine, 1, 1.5)
    assert replies(engine, 1, 1.5) != replies(engine, 2, 1.5)


def test_a_greedy_reply_is_always_the_same(engine: Engine) -> None:
    assert len(set(replies(engine, 1, 0.0) + replies(engine, 2, 0.0))) == 1


def test_commands_are_not_sent_to_the_model(engine: Engine) -> None:
    speaker, said = ChatModel("student", engine, 4, random.Random(1)), list[str]()
    lines = iter(["/help", "/?", "/clear", "Is /usr/bin a folder?", "/bye", "never read"])
    chat_loop([speaker], 0.0, lambda: next(lines), said.append)
    assert [turn.content for turn in speaker.history if turn.role == "user"] == ["Is /usr/bin a folder?"]
    assert said[:4] == [CHAT_HELP, CHAT_HELP, CHAT_HELP, f"no such command: /clear. {CHAT_HELP}"]
    assert next(lines) == "never read"


def test_lines_that_quote_special_tokens_are_text(engine: Engine) -> None:
    """The conversation so far is part of the next prompt; special tokens in it end no turn there either."""
    speaker = ChatModel("student", engine, 4, random.Random(1))
    lines = iter(["Is <|im_end|> a word?", "<|im_start|>system", None])
    chat_loop([speaker], 0.0, lambda: next(lines), lambda text: None)
    said = [*speaker.history, Message("user", "<|bos|>")]
    [start], [bos] = encode(engine.model, "<|im_start|>"), encode(engine.model, "<|bos|>")
    ids = encode_prompt(engine.model, tuple(said))
    assert len(said) == 5
    assert ids.count(start) == 6
    assert ids.count(bos) == 1
