"""A conversation: what is sent to the model and what is a command, models side by side, Ctrl-C, sampling."""

import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import ROOT, refused

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.inference.generate import encode_prompt
from tapir_local.inference.model import Engine, open_engine
from tapir_local.inference.tokens import encode
from tapir_local.records import Message
from tapir_local.talk.conversation import CHAT_HELP, CHAT_HINT, Chat, ChatModel, answer_once, open_chat_models
from tapir_local.talk.models import ModelFinder, gguf_file_source


@pytest.fixture(scope="module")
def engine(llama) -> Iterator[Engine]:
    with open_engine(llama.gguf, context=256, parallel=1) as opened:
        yield opened


def lines_of(*lines: str | None) -> Callable[[], str | None]:
    """A reader of these lines, after which the input ends."""
    left = iter([*lines, None])
    return lambda: next(left)


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
    read = lines_of(
        "/help", "/?", "/clear", "/Help me", "Is /usr/bin a folder?", "//usr is what?", "/bye", "never read"
    )
    Chat([speaker], 0.0, said.append).loop(read)
    asked = [turn.content for turn in speaker.history if turn.role == "user"]
    assert asked == ["Is /usr/bin a folder?", "/usr is what?"]
    assert said[:3] == [CHAT_HINT, CHAT_HELP, CHAT_HELP]
    assert [words.split(".")[0] for words in said[3:5]] == ["no such command: /clear", "no such command: /Help"]
    assert read() == "never read"


def test_lines_that_quote_special_tokens_are_text(engine: Engine) -> None:
    """The conversation so far is part of the next prompt; special tokens in it end no turn there either."""
    speaker = ChatModel("student", engine, 4, random.Random(1))
    Chat([speaker], 0.0, lambda text: None).loop(lines_of("Is <|im_end|> a word?", "<|im_start|>system"))
    said = [*speaker.history, Message("user", "<|bos|>")]
    [start], [bos] = encode(engine.model, "<|im_start|>"), encode(engine.model, "<|bos|>")
    ids = encode_prompt(engine.model, tuple(said))
    assert len(said) == 5
    assert ids.count(start) == 6
    assert ids.count(bos) == 1


def test_a_system_prompt_begins_every_conversation_until_it_is_removed(engine: Engine) -> None:
    speaker, said = ChatModel("student", engine, 4, random.Random(1)), list[str]()
    chat = Chat([speaker], 0.0, said.append)
    chat.loop(lines_of("What is 3 + 4?", "/system Be  brief.", "And 5?"))
    assert [(turn.role, turn.content) for turn in speaker.history[:2]] == [("system", "Be  brief."), ("user", "And 5?")]
    chat.take("/reset")
    assert speaker.history == [Message("system", "Be  brief.")]
    chat.take("/system")
    assert speaker.history == []


def test_a_second_model_is_opened_and_closed_during_the_chat(llama, students, tmp_path: Path) -> None:
    said, finder = list[str](), ModelFinder(tmp_path, None, print)
    with open_chat_models([gguf_file_source(str(llama.gguf))], 1) as models:
        first, chat = models[0], Chat(models, 0.0, said.append, finder, 1)
        first.max_tokens = 4
        chat.loop(lines_of("Hello", f"/vs {students['qwen2'].gguf}"))
        assert first.history == []
        models[1].max_tokens = 4
        chat.take("What is 7 times 8?")
        assert [len(model.history) for model in models] == [2, 2]
        assert [text for text in said if text.startswith("[")] == [f"[{model.name}]\n" for model in models]
        chat.take("/vs")
        assert models == [first]
        said.clear()
        for line in ("/vs base", "/round 1", "/round x", "/vs nothing", "/vs none.gguf"):
            chat.take(line)
    reasons = ["GGUF of no run", "has no rounds", "needs the number", "no run 'nothing'", "the model is missing"]
    assert [reason in text for reason, text in zip(reasons, said, strict=True)] == [True] * 5


class Interrupted:
    """A model whose answer is stopped by Ctrl-C after its first word."""

    name, history = "slow", list[Message]()

    def answer(self, text: str, temperature: float) -> Generator[str, None, None]:
        yield "It"
        if text == "slow":
            raise KeyboardInterrupt


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    said = list[str]()
    Chat([Interrupted()], 0.0, said.append).loop(lines_of("slow", "quick"))  # type: ignore[list-item]
    assert said[1:] == ["It", "\n(stopped; this answer is not part of the conversation)\n", "It", "\n"]


def test_after_a_stopped_answer_the_model_answers_as_before(engine: Engine) -> None:
    speaker, said = ChatModel("student", engine, 12, random.Random(1)), list[str]()

    def stop_at_once(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_once([speaker], "What is 7 times 8?", 0.0, stop_at_once)
    assert speaker.history == []
    answer_once([speaker], "What is 7 times 8?", 0.0, said.append)
    assert "".join(said) == f"{replies(engine, 1, 0.0)[0]}\n"


def ends_within(child: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process has ended by then."""
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_ctrl_c_on_a_terminal_stops_an_answer_and_twice_at_the_prompt_ends_the_chat(llama) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "cli.py"), "chat", str(llama.gguf), "--random-seed", "1"]
    child = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    os.close(theirs)
    shown = b""

    def has_shown(text: bytes, seconds: float, count: int = 1) -> bool:
        nonlocal shown
        until = time.monotonic() + seconds
        while shown.count(text) < count and (left := until - time.monotonic()) > 0:
            if select.select([ours], [], [], left)[0]:
                shown += os.read(ours, 4096)
        return shown.count(text) >= count

    def interrupt_until(ended: Callable[[], bool]) -> None:
        """Send SIGINT again if it came just before the terminal was read: Python then handles it with the next key."""
        for _ in range(10):
            child.send_signal(signal.SIGINT)
            if ended():
                return
        pytest.fail(f"no end of {shown!r}")

    assert has_shown(b"> ", 60)
    interrupt_until(lambda: has_shown(b"press Ctrl-C again", 3))
    assert has_shown(b"> ", 10, 2)
    interrupt_until(lambda: ends_within(child, 3))
    assert child.wait(30) == 0
    os.close(ours)
    assert b"Traceback" not in shown


def test_escapes_in_an_answer_are_made_visible(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = ["\x1b]0;owned\x07", "\u202ehello"]
    monkeypatch.setattr("tapir_local.talk.conversation.chat_stream", lambda *_, **__: iter(pieces))
    out = CliRunner().invoke(cli, ["chat", str(llama.gguf), "--prompt", "hi"], catch_exceptions=False)
    assert out.stdout == "␛]0;owned␇<U+202E>hello\n"


def test_a_gguf_without_a_run_is_a_model(llama, tmp_path: Path) -> None:
    out = CliRunner().invoke(cli, ["chat", str(llama.gguf), "--prompt", "hi", "--vs", str(llama.gguf)])
    assert out.exit_code == 0
    one, other = out.stdout.split(f"[{llama.gguf.name}]\n")[1:]
    assert one == other
    with pytest.raises(TapirError, match="is not a GGUF"):
        gguf_file_source(str(ROOT / "README.md"))


def test_a_question_in_place_of_a_run_gets_the_command_for_it(tmp_path: Path) -> None:
    said = refused("chat", "What is 3 + 4", "--cache", str(tmp_path))
    assert "tapir-local chat --prompt TEXT" in said
