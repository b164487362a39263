"""Answer the questions of an evaluation with a GGUF, turn by turn; what was answered is kept and resumed."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tapir_local import __version__
from tapir_local.evaluation.questions import Question
from tapir_local.files import private_folder, read_rows
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.generate import Callbacks
from tapir_local.inference.llama_process import GenerateJob, LlamaPlace, run_generate_job
from tapir_local.records import Completion
from tapir_local.resumable import OrderedWriter, resume_writing

ShowTurn = Callable[[int, int, str], None]  # called with (answers so far, answers wanted, which)
UNSAFE_NAME = re.compile(r"[^A-Za-z0-9._-]+")  # in a name that becomes a file's


@dataclass(frozen=True)
class Player:
    """A model that answers questions: its name for people, and its files."""

    name: str
    gguf: Path
    adapter: Path | None = None

    def key(self, config: GenerationConfig) -> str:
        """The beginning of the names of its files: its name and a digest of its files and settings.

        A file counts by its path, size and time, as for `tapir-local generate`: hashing gigabytes would take longer
        than most answers.
        """
        files = [path for path in (self.gguf, self.adapter) if path is not None]
        stats = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return f"{safe_name(self.name)}-{short_digest(__version__, stats, asdict(config))}"


@dataclass(frozen=True)
class AnswerPlace:
    """Where answers are kept and llama.cpp runs, and what is called while they are made."""

    folder: Path
    llama: LlamaPlace
    show: ShowTurn
    warn: Callable[[str], None]


def safe_name(text: str) -> str:
    """A text as a part of a file's name: letters, digits, dots, dashes and underscores, at most 60."""
    return UNSAFE_NAME.sub("-", text).strip("-._")[:60] or "model"


def short_digest(*values: object) -> str:
    """Eight hexadecimal digits that identify some values."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:8]


def turn_file(folder: Path, player: Player, config: GenerationConfig, turn: int) -> Path:
    """The file of a player's answers to a turn, counted from 0."""
    return folder / f"{player.key(config)}-turn-{turn + 1}.jsonl"


def answer_questions(
    player: Player, questions: Sequence[Question], config: GenerationConfig, place: AnswerPlace
) -> list[dict[str, Completion]]:
    """A player's answers by question id, one dict for each turn.

    A later turn is asked with the player's own answers to the earlier ones in the conversation. A question whose
    earlier turn could not be asked, because the prompt is too long or refused, has no answer to the later ones.
    """
    found = list[dict[str, Completion]]()
    for turn in range(max(question.turns for question in questions)):
        asked = [
            one
            for one in questions
            if one.turns > turn and all(before[one.id].asked for before in found if one.id in before)
        ]
        found.append(answer_one_turn(player, asked, found, config, place))
    return found


def answer_one_turn(
    player: Player,
    questions: Sequence[Question],
    before: Sequence[dict[str, Completion]],
    config: GenerationConfig,
    place: AnswerPlace,
) -> dict[str, Completion]:
    """The answers to one turn, from their file if it is complete; an interrupted one is resumed."""
    path = turn_file(place.folder, player, config, len(before))
    if path.exists():
        return {row.id: row for row in read_rows(Completion, path)}
    private_folder(place.folder)
    prompts = {one.id: one.conversation([turn[one.id].text for turn in before]) for one in questions}
    task = {"prompts": short_digest([[asdict(said) for said in prompt] for prompt in prompts.values()])}
    with resume_writing(path, task, Completion) as (file, done):
        left = [id for id in prompts if id not in {row.id for row in done}]
        ordered = OrderedWriter[Completion](file, left)
        callbacks = Callbacks(
            result=ordered.add,
            progress=lambda more, _: place.show(
                len(done) + more, len(prompts), f"{player.name}, turn {len(before) + 1}"
            ),
            warn=place.warn,
        )
        job = GenerateJob(player.gguf, tuple(prompts[id] for id in left), config, player.adapter, tuple(left))
        made = run_generate_job(job, callbacks, place.llama)
    return {row.id: row for row in [*done, *made]}
