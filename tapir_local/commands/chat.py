"""Talk to a run's student, alone or beside its untrained base."""

import random
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.export.base import Student, base_gguf, student_of
from tapir_local.inference.generate import chat_stream
from tapir_local.inference.model import open_engine
from tapir_local.pipeline.loop import kept_recipe, rounds_begun
from tapir_local.records import Message
from tapir_local.run_dir import RunDir

Say = Callable[[str], None]


@dataclass
class Speaker:
    """One open model, the recipe's limits, and what was said so far."""

    name: str
    engine: Any
    max_tokens: int
    chance: random.Random
    said: list[Message] = field(default_factory=list)

    def answer(self, text: str, temperature: float) -> Iterator[str]:
        """The answer piece by piece; it becomes part of the conversation when it is whole.

        Each is drawn with a seed of its own, so that the same question may be answered in another way.
        """
        asked = [*self.said, Message("user", text)]
        seed, pieces = self.chance.getrandbits(31), []
        for piece in chat_stream(self.engine, asked, max_tokens=self.max_tokens, temperature=temperature, seed=seed):
            pieces.append(piece)
            yield piece
        self.said = [*asked, Message("assistant", "".join(pieces))]


@contextmanager
def students(
    run: RunDir, number: int | None, vs: str | None, say: Say, random_seed: int | None = None
) -> Iterator[list[Speaker]]:
    """The run's student of a round and, where asked, its base, open.

    Replies are drawn by chance; with a `random_seed` the same questions get the same replies.
    """
    seed = secrets.randbits(31) if random_seed is None else random_seed
    recipe = kept_recipe(run)
    files = {"student": student_of(recipe, run, student_gguf(run, number))}
    if vs == "base":
        say("opening the base; its GGUF is made once")
        files["base"] = Student(base_gguf(recipe, run))
    with ExitStack() as stack:
        yield [
            Speaker(
                name,
                stack.enter_context(
                    open_engine(opened.gguf, adapter=opened.adapter, context=recipe.student.max_length, parallel=1)
                ),
                recipe.student.max_tokens,
                random.Random(f"{seed}-chat"),
            )
            for name, opened in files.items()
        ]


def student_gguf(run: RunDir, number: int | None) -> Path:
    """The GGUF of a round; where none is named the finished run's, or that of the last round that has one."""
    finished = run.path / "model" / "student.gguf"
    if number is None and finished.exists():
        return finished
    there = [n for n in range(rounds_begun(run) + 1) if (run.round(n) / "student.gguf").exists()]
    if not there or (number is not None and number not in there):
        which = "student yet" if number is None else f"student of round {number}"
        rounds = ", ".join(map(str, there)) or "none"
        raise TapirError(
            f"run {run.name!r} has no {which}", where=str(run.path), fix=f"Rounds with a student: {rounds}."
        )
    return run.round(there[-1] if number is None else number) / "student.gguf"


def once(answering: Sequence[Speaker], prompt: str, temperature: float, write: Say) -> None:
    """One answer of each, named where there are two."""
    for student in answering:
        if len(answering) > 1:
            write(f"[{student.name}]\n")
        for piece in student.answer(prompt, temperature):
            write(piece)
        write("\n")


def converse(answering: Sequence[Speaker], temperature: float, read: Callable[[], str | None], write: Say) -> None:
    """Line after line until /exit or the end of the input."""
    write("/reset forgets the conversation, /exit ends it\n")
    while (line := read()) is not None and line.strip() != "/exit":
        if line.strip() == "/reset":
            for student in answering:
                student.said = []
            write("forgotten\n")
        elif line.strip():
            say_or_explain(answering, line.strip(), temperature, write)


def say_or_explain(answering: Sequence[Speaker], line: str, temperature: float, write: Say) -> None:
    """A conversation that has grown too long is said, and does not end the chat."""
    try:
        once(answering, line, temperature, write)
    except TapirError as error:
        write(f"{error}\n")
