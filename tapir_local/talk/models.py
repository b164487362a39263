"""Find and open the models of a conversation or a server: a run's student, its base model, or any GGUF."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.export.base import base_gguf, student_files
from tapir_local.files import expand_home
from tapir_local.inference.config import ContextConfig
from tapir_local.inference.model import (
    STUDENT_ADVICE,
    Advice,
    Engine,
    Model,
    check_gguf,
    is_adapter,
    open_context,
    open_model,
    trained_context,
    uses_flash_attention,
)
from tapir_local.pipeline.loop import kept_recipe, last_round
from tapir_local.run_dir import RunDir, find_run

FILE_CONTEXT, FILE_MAX_TOKENS = 4096, 1024  # tokens of a conversation, and of an answer, with a GGUF of no run
FILE_ADVICE = Advice(
    unusable="Choose another GGUF.",
    too_large="Close other programs, or choose a smaller GGUF.",
    no_template="Choose a GGUF with a chat template: base models often have none.",
    too_heavy="Close other programs, or choose a smaller GGUF.",
)


@dataclass(frozen=True)
class ModelSource:
    """A model to open: its name for people, its files, and its limits in tokens."""

    name: str
    gguf: Path
    adapter: Path | None
    context: int
    max_tokens: int
    advice: Advice = STUDENT_ADVICE


@dataclass(frozen=True)
class ModelFinder:
    """Finds models by what a user types: `base`, the name of a run, or the path of a GGUF.

    `run` is the run that `base` refers to, None for a GGUF of no run. `tell` gets remarks for people.
    """

    cache: Path
    run: RunDir | None
    tell: Callable[[str], None]

    def find(self, name: str) -> ModelSource:
        """The model of this name; TapirError if there is none."""
        if name == "base":
            return self.find_base()
        return gguf_file_source(name) if is_gguf_name(name) else student_source(find_run(self.cache, name), None)

    def find_base(self) -> ModelSource:
        """The untrained student of the run, as a GGUF that is made if it is not in the cache."""
        if self.run is None:
            raise TapirError("`base` is the untrained student of a run, and this model is a GGUF of no run")
        recipe = kept_recipe(self.run)
        self.tell("opening the base model; its GGUF is made only once")
        return ModelSource(
            "base", base_gguf(recipe, self.run), None, recipe.student.max_length, recipe.student.max_tokens
        )

    def find_round(self, number: int) -> ModelSource:
        """The student of a round of the run."""
        if self.run is None:
            raise TapirError("this model is a GGUF of no run, so it has no rounds")
        return student_source(self.run, number)


def is_gguf_name(name: str) -> bool:
    """Whether a user means a file, and not the name of a run."""
    return name.endswith(".gguf") or "/" in name


def gguf_file_source(name: str) -> ModelSource:
    """A GGUF of no run; TapirError if it is missing or only an adapter."""
    path = Path(expand_home(name) or "")
    check_gguf(path, "model", "Name a GGUF, or a run.")
    if is_adapter(path):
        raise TapirError("this GGUF is a LoRA adapter, not a whole model", where=name, fix="Name the run that made it.")
    return ModelSource(path.name, path, None, FILE_CONTEXT, FILE_MAX_TOKENS, FILE_ADVICE)


def student_source(run: RunDir, number: int | None) -> ModelSource:
    """The student of a round; without a number, that of the finished run or of the last round that has one."""
    recipe = kept_recipe(run)
    files = student_files(recipe, run, find_student_gguf(run, number))
    name = run.name if number is None else f"{run.name}, round {number}"
    return ModelSource(name, files.gguf, files.adapter, recipe.student.max_length, recipe.student.max_tokens)


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


def conversation_context(model: Model, tokens: int) -> ContextConfig:
    """A context for one conversation of at most so many tokens, at most as long as the model's own."""
    cells = min(tokens, trained_context(model))
    return ContextConfig(cells, 1, flash=uses_flash_attention(model, cells))


@contextmanager
def open_source(source: ModelSource) -> Iterator[Engine]:
    """A model with a context for one conversation, at most as long as the model's own."""
    with (
        open_model(source.gguf, adapter=source.adapter, advice=source.advice) as model,
        open_context(model, conversation_context(model, source.context)) as engine,
    ):
        yield engine
