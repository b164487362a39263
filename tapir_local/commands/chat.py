"""A conversation with the student of a run, alone or next to its untrained base model."""

import random
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.export.base import StudentFiles, base_gguf, student_files
from tapir_local.inference.generate import chat_stream
from tapir_local.inference.model import open_engine
from tapir_local.pipeline.loop import kept_recipe, last_round
from tapir_local.records import Message
from tapir_local.run_dir import RunDir

CHAT_HELP = "Type /reset to start a new conversation, /exit to end the chat.\n"
COMMAND_LINE = re.compile(r"/(\?|[a-z]+)")  # a line that is meant as a command, not a question such as `/usr/bin?`
Write = Callable[[str], None]


@dataclass
class ChatModel:
    """An open model, the recipe's limit of tokens, and the conversation so far."""

    name: str
    engine: Any
    max_tokens: int
    chance: random.Random
    history: list[Message] = field(default_factory=list)

    @staticmethod
    def check_text(text: str) -> None:
        """TapirError for a question whose bytes were not UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TapirError("the question is not UTF-8", fix="Type it again, or change the encoding.") from error

    def answer(self, text: str, temperature: float) -> Iterator[str]:
        """The answer in pieces; it is added to the conversation when it is complete.

        Each answer has its own sampling seed, so that the same question may get different answers.
        """
        self.check_text(text)
        asked = [*self.history, Message("user", text)]
        seed, pieces = self.chance.getrandbits(31), []
        for piece in chat_stream(self.engine, asked, max_tokens=self.max_tokens, temperature=temperature, seed=seed):
            pieces.append(piece)
            yield piece
        self.history = [*asked, Message("assistant", "".join(pieces))]


@contextmanager
def open_students(
    run: RunDir, number: int | None, vs: str | None, tell: Write, random_seed: int | None = None
) -> Iterator[list[ChatModel]]:
    """The student of a round and, if `vs` is "base", the base model, both open.

    Replies are sampled. With a `random_seed` the same questions get the same replies.
    """
    seed = secrets.randbits(31) if random_seed is None else random_seed
    recipe = kept_recipe(run)
    files = {"student": student_files(recipe, run, find_student_gguf(run, number))}
    if vs == "base":
        tell("opening the base model; its GGUF is made only once")
        files["base"] = StudentFiles(base_gguf(recipe, run))
    with ExitStack() as stack:
        yield [
            ChatModel(
                name,
                stack.enter_context(
                    open_engine(opened.gguf, adapter=opened.adapter, context=recipe.student.max_length, parallel=1)
                ),
                recipe.student.max_tokens,
                random.Random(f"{seed}-chat"),
            )
            for name, opened in files.items()
        ]


def find_student_gguf(run: RunDir, number: int | None) -> Path:
    """The GGUF of a round; without a number, that of the finished run or of the last round that has one."""
    finished = run.path / "model" / "student.gguf"
    if number is None and finished.exists():
        return finished
    there = [n for n in range(last_round(run) + 1) if (run.round(n) / "student.gguf").exists()]
    if not there or (number is not None and number not in there):
        missing = "student yet" if number is None else f"student of round {number}"
        rounds = ", ".join(map(str, there)) or "none"
        raise TapirError(
            f"run {run.name!r} has no {missing}", where=str(run.path), fix=f"Rounds with a student: {rounds}."
        )
    return run.round(there[-1] if number is None else number) / "student.gguf"


def answer_once(models: Sequence[ChatModel], prompt: str, temperature: float, write: Write) -> None:
    """Write one answer of each model, with its name if there are two."""
    for model in models:
        if len(models) > 1:
            write(f"[{model.name}]\n")
        for piece in model.answer(prompt, temperature):
            write(piece)
        write("\n")


def chat_loop(models: Sequence[ChatModel], temperature: float, read: Callable[[], str | None], write: Write) -> None:
    """Answer line after line until /exit (or /bye, /quit) or the end of the input."""
    write(CHAT_HELP)
    while (line := read()) is not None and line.strip() not in ("/exit", "/bye", "/quit"):
        if line.strip() == "/reset":
            for model in models:
                model.history = []
            write("started a new conversation\n")
        elif COMMAND_LINE.fullmatch(line.strip()):
            write(CHAT_HELP if line.strip() in ("/help", "/?") else f"no such command: {line.strip()}. {CHAT_HELP}")
        elif line.strip():
            answer_or_explain(models, line.strip(), temperature, write)


def answer_or_explain(models: Sequence[ChatModel], line: str, temperature: float, write: Write) -> None:
    """Answer a line, or write why it cannot be answered: a conversation that is too long does not end the chat."""
    try:
        answer_once(models, line, temperature, write)
    except TapirError as error:
        write(f"{error}\n")
