"""A conversation with one model, or with two side by side."""

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.inference.generate import chat_stream
from tapir_local.interrupts import RECEIVED
from tapir_local.records import Message
from tapir_local.talk.models import ModelFinder, ModelSource, open_source

CHAT_COMMANDS = {
    "/reset": "start a new conversation",
    "/system TEXT": "start a new conversation with this system prompt; without TEXT, with none",
    "/vs base|RUN|FILE": "show the answers of another model too; /vs alone stops that",
    "/round N": "talk to the student of round N",
    "/help": "show these commands",
    "/bye": "end the chat; so do /exit, /quit and Ctrl-D",
}
CHAT_HINT = "Type /help for the commands, /bye to end the chat. Ctrl-C stops an answer.\n"
CHAT_HELP = "".join(f"  {name:<18}  {words}\n" for name, words in CHAT_COMMANDS.items())
CHAT_HELP += "  //text              send `/text` to the model\n"
END_COMMANDS = ("/bye", "/exit", "/quit")
Write = Callable[[str], None]


@dataclass
class ChatModel:
    """An open model, the limit of an answer in tokens, and the conversation so far, with the system prompt first."""

    name: str
    engine: Any
    max_tokens: int
    chance: random.Random
    history: list[Message] = field(default_factory=list)
    close: Callable[[], None] = lambda: None

    @staticmethod
    def check_text(text: str) -> None:
        """TapirError for a question whose bytes were not UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TapirError("the question is not UTF-8", fix="Type it again, or change the encoding.") from error

    def answer(self, text: str, temperature: float) -> Generator[str, None, None]:
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


def open_chat_model(source: ModelSource, seed: int) -> ChatModel:
    """An open model, to be closed by its `close`. Replies are sampled; a seed gives the same replies again."""
    stack = ExitStack()
    engine = stack.enter_context(open_source(source))
    return ChatModel(source.name, engine, source.max_tokens, random.Random(f"{seed}-chat"), close=stack.close)


@contextmanager
def open_chat_models(sources: Sequence[ModelSource], seed: int) -> Iterator[list[ChatModel]]:
    """Open models, closed at the end of the block, with those that replaced them in the list."""
    models: list[ChatModel] = []
    try:
        for source in sources:
            models.append(open_chat_model(source, seed))
        yield models
    finally:
        for model in models:
            model.close()


def answer_once(models: Sequence[ChatModel], prompt: str, temperature: float, write: Write) -> None:
    """Write one answer of each model, with its name if there are two."""
    for model in models:
        if len(models) > 1:
            write(f"[{model.name}]\n")
        with closing(model.answer(prompt, temperature)) as pieces:
            for piece in pieces:
                write(piece)
        write("\n")


@dataclass
class Chat:
    """A chat at a terminal: its models, of which the first is the one that the user named, and what is typed to it."""

    models: list[ChatModel]
    temperature: float
    write: Write
    finder: ModelFinder | None = None
    seed: int = 0
    system: str = ""

    def loop(self, read: Callable[[], str | None]) -> None:
        """Answer line after line until /bye (or /exit, /quit) or the end of the input."""
        self.write(CHAT_HINT)
        while (line := read()) is not None and line.strip() not in END_COMMANDS:
            self.take(line.strip())

    def take(self, line: str) -> None:
        """Obey a command or answer a message; what cannot be done is explained and does not end the chat."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self.obey(*line.partition(" ")[::2])
            elif line:
                answer_once(self.models, line.removeprefix("/"), self.temperature, self.write)
        except TapirError as error:
            self.write(f"{error}\n")
        except KeyboardInterrupt:
            if RECEIVED:  # SIGTERM or SIGHUP
                raise
            self.write("\n(stopped; this answer is not part of the conversation)\n")

    def obey(self, command: str, rest: str) -> None:
        """Obey a command; one that does not exist is never sent to the model."""
        rest = rest.strip()
        if command == "/reset" and not rest:
            self.restart("started a new conversation")
        elif command == "/system":
            self.set_system(rest)
            self.restart("started a new conversation with this system prompt" if rest else "no system prompt now")
        elif command == "/vs":
            self.compare(rest)
        elif command == "/round" and rest.isdecimal():
            self.replace_first(self.known_finder.find_round(int(rest)))
        elif command == "/round":
            self.write("/round needs the number of a round: /round 1\n")
        elif command in ("/help", "/?"):
            self.write(CHAT_HELP)
        else:
            self.write(f"no such command: {command}. /help lists them; //text sends /text to the model\n")

    def set_system(self, text: str) -> None:
        """Begin every conversation from now on with this system prompt, "" for none."""
        ChatModel.check_text(text)
        self.system = text
        self.clear()

    def clear(self) -> None:
        """Forget every conversation so far."""
        for model in self.models:
            model.history = [Message("system", self.system)] if self.system else []

    @property
    def known_finder(self) -> ModelFinder:
        """What finds other models; TapirError if this chat has none."""
        if self.finder is None:
            raise TapirError("this chat has no other models")
        return self.finder

    def restart(self, remark: str) -> None:
        """Start a new conversation with every model, and say so."""
        self.clear()
        self.write(f"{remark}\n")

    def compare(self, name: str) -> None:
        """Open a second model by its name in place of the present second one, or only close that."""
        opened = [open_chat_model(self.known_finder.find(name), self.seed)] if name else []
        for model in self.models[1:]:
            model.close()
        self.models[1:] = opened
        self.restart(f"{name} answers too; started a new conversation" if name else "only one model answers now")

    def replace_first(self, source: ModelSource) -> None:
        """Talk to another model."""
        opened = open_chat_model(source, self.seed)
        self.models[0].close()
        self.models[0] = opened
        self.restart(f"this is {source.name}; started a new conversation")
