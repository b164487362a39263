"""What a stage is given: the recipe, the run's folder, the round, and the backends that it may call."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Protocol

from tapir_local.files import atomic_write, read_rows
from tapir_local.method.metrics import AnswerChecker
from tapir_local.recipe.schema import Recipe
from tapir_local.records import (
    Answer,
    Completion,
    Example,
    Progress,
    Prompt,
    Request,
    SchedulePart,
    Scored,
    from_json,
    instruction_of,
    noop,
    to_json,
)
from tapir_local.run_dir import RunDir
from tapir_local.stages.row_check import StudentFormat
from tapir_local.teacher.budget import Cost
from tapir_local.teacher.rate_limit import CallMeter
from tapir_local.unusable import MAX_TEXT_KEPT, Unusable, record_unusable, refuse_too_many

LOCK_FILE = "tapir.lock"  # in a run's folder: the calls that each step used
LOCK_LINE_START, LOCK_LINE_END = b'{"step":"', b'"}\n'  # of each of its lines


class AskBackend(Protocol):
    """Answers to requests, in their order."""

    def __call__(self, requests: Sequence[Request], progress: Progress) -> list[Answer]: ...


class AheadQueue(Protocol):
    """Takes requests that are asked while the caller does something else; `paid` counts the new replies."""

    @property
    def paid(self) -> int: ...

    def add(self, requests: Sequence[Request]) -> None: ...


class AheadBackend(Protocol):
    """Asks the judge ahead of its stage, until the block ends; `before_asking` is called before each group of requests.

    The answers are in the store then. An error ends the asking ahead and is left to the judge's stage.
    """

    def __call__(self, before_asking: Callable[[], None]) -> AbstractContextManager[AheadQueue]: ...


class GenerateBackend(Protocol):
    """Greedy answers of the student in `gguf`, in the order of the prompts.

    `on_result` gets each answer as soon as it is complete, in any order; `ids` are the prompts' row ids.
    """

    def __call__(
        self,
        *,
        gguf: Path,
        prompts: Sequence[Prompt],
        ids: Sequence[str],
        progress: Progress,
        on_result: Callable[[Completion], None],
    ) -> list[Completion]: ...


class ScoreBackend(Protocol):
    """Log-probabilities of completions by the student in `gguf`.

    `on_result` gets each result as soon as it is there; its id is the text's position.
    """

    def __call__(
        self,
        *,
        gguf: Path,
        texts: Sequence[tuple[Prompt, str]],
        progress: Progress,
        on_result: Callable[[Scored], None],
    ) -> list[Scored]: ...


class ClassifyBackend(Protocol):
    """Trains the task classifier on `labelled` and writes its labels for the other `rows` into the folder `out`."""

    def __call__(self, *, labelled: Path, rows: Path, seed: int, out: Path, progress: Progress) -> None: ...


class TrainBackend(Protocol):
    """Trains the student on `rows` and writes the adapter `out`; starts from the adapter `previous`, or the base.

    `part` is the round's part of a schedule over all rounds.
    """

    def __call__(
        self, *, rows: Path, previous: Path | None, seed: int, part: SchedulePart, out: Path, progress: Progress
    ) -> None: ...


class ExportBackend(Protocol):
    """Writes a trained `adapter` as the GGUF `out`."""

    def __call__(self, *, adapter: Path, out: Path, progress: Progress) -> None: ...


class UntrainedBackend(Protocol):
    """Writes the untrained student as the GGUF `out`."""

    def __call__(self, *, out: Path, progress: Progress) -> None: ...


class GateBackend(Protocol):
    """Compares a `gguf` with the trained model, on probes and on `rows`, and writes the report `out`."""

    def __call__(self, *, adapter: Path, gguf: Path, rows: Path, out: Path, progress: Progress) -> None: ...


class ShipBackend(Protocol):
    """Writes the GGUF, gate.json and Modelfile of a round's folder `student` into the folder `out`."""

    def __call__(self, *, student: Path, out: Path, progress: Progress) -> None: ...


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Backends:
    """Everything that a stage may do outside its run's folder.

    `student_format` reads the student's chat template and tokenizer. `begin` is called once the run is locked, before
    its first step. `check` tells right answers from wrong ones. `replay` says that all answers come from the store.
    `meter` counts the requests, and `spent` is what may have been billed to the run so far, both for displays.
    `judge_ahead` is None if the judge is asked in its own stage only.
    """

    teacher: AskBackend
    judge: AskBackend
    generate: GenerateBackend
    classify: ClassifyBackend
    train: TrainBackend
    export: ExportBackend
    export_untrained: UntrainedBackend
    gate: GateBackend
    score: ScoreBackend
    ship: ShipBackend
    student_format: Callable[[], StudentFormat]
    begin: Callable[[], None] = nothing
    check: AnswerChecker | None = None
    replay: bool = False
    meter: CallMeter = field(default_factory=CallMeter)
    spent: Callable[[], Cost] = Cost
    judge_ahead: AheadBackend | None = None


@dataclass(frozen=True)
class LockedCall:
    """Records that a step (`round-01/judge`) used a call for a row; `key` has 64 hexadecimal digits."""

    step: str
    row: str
    key: str


@dataclass
class Work:
    """What a stage is given. `number` is the round, `step` the step's name (`round-01/judge`)."""

    recipe: Recipe
    run: RunDir
    backends: Backends
    number: int = 0
    step: str = ""
    progress: Progress = noop
    tally: dict[str, int] = field(default_factory=lambda: {"paid": 0, "hits": 0})
    calls: list[LockedCall] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """This round's folder."""
        return self.run.round(self.number)

    @property
    def stage(self) -> str:
        """The stage's name: `judge` of the step `round-01/judge`."""
        return self.step.rpartition("/")[2]

    def rng(self, stage: str) -> random.Random:
        """A random number generator for one stage of this round, seeded by the recipe."""
        return random.Random(f"{self.recipe.random_seed}-{stage}-{self.number}")

    def ask(self, ask: AskBackend, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests, counted as paid or hits, their calls recorded in tapir.lock."""
        answers = ask(requests, progress=self.progress) if requests else []
        hits = sum(answer.hit for answer in answers)
        self.tally["hits"] += hits
        self.tally["paid"] += len(answers) - hits
        pairs = zip(requests, answers, strict=True)
        self.calls += [LockedCall(self.step, request.row, answer.key) for request, answer in pairs if answer.key]
        if self.calls:
            lock_calls(self.run, self.step, self.calls)
        return answers

    def leave_out(self, rows: Sequence[Unusable], total: int, by_choice: Sequence[Unusable] = ()) -> None:
        """Record the rows that this step leaves out; TapirError if limits.unusable allows fewer of `total` rows.

        Call it once in a step, with all unusable rows, before the output is written. `by_choice` are usable rows that
        the recipe asks to leave out: they are recorded but do not count against the limit.
        """
        record_unusable(self.run, self.step, [*rows, *by_choice])
        refuse_too_many(rows, total, self.recipe.limits.unusable, f"{self.run.name}, {self.step}")

    def unusable(self, row: Example, kind: str, detail: str = "") -> Unusable:
        """The record that this step leaves a row out; `kind` is the same for all rows with this fault."""
        return Unusable(self.step, row.id, kind, detail, instruction_of(row.prompt)[:MAX_TEXT_KEPT])

    def request(
        self, stage: str, row: str, messages: Prompt, *, draw: int = 0, temperature: float | None = None
    ) -> Request:
        """A request to the teacher with the recipe's settings."""
        teacher = self.recipe.teacher
        return Request(
            messages,
            row,
            stage,
            self.number,
            draw,
            teacher.temperature if temperature is None else temperature,
            teacher.max_tokens,
        )


@dataclass(frozen=True)
class Stage:
    """A stage of a run: `run` writes `output` and returns a phrase for the closing line.

    `output` is a name in the run's folder (preparation) or in the round's. A stage that runs the student for hours
    continues after an interruption in the file `resumes`, which may be the output itself. No later stage but other
    `independent` ones reads the output of an `independent` stage.
    """

    name: str
    output: str
    run: Callable[[Work, Path], str]
    resumes: str = ""
    independent: bool = False


def read_lock(run: RunDir) -> list[LockedCall]:
    """Every call that a run used, in the order of its steps; [] before the first."""
    path = run.path / LOCK_FILE
    return read_rows(LockedCall, path) if path.exists() else []


def lock_calls(run: RunDir, step: str, calls: Sequence[LockedCall]) -> None:
    """Record the calls that a step has used so far, in place of those of an earlier attempt at the step.

    An independent step that was repeated goes back to its place before the rounds. The lines of other steps are copied
    as they are: a step asks several times, and the file of a large run has half a million lines. TapirError if it is
    damaged.
    """
    new, path = (f"{to_json(call)}\n".encode() for call in calls), run.path / LOCK_FILE
    with atomic_write(path) as partial, partial.open("wb") as out:
        for other, lines in groupby(read_lines(path), line_step):
            if other != step:
                if lock_place(other) > lock_place(step):
                    out.writelines(new)  # the first time; then none are left
                out.writelines(lines)
        out.writelines(new)


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file one by one, each with its line feed; none if there is no file."""
    if path.exists():
        with path.open("rb") as file:
            yield from (line.rstrip(b"\n") + b"\n" for line in file)


def line_step(line: bytes) -> str:
    """The step in a line of tapir.lock; TapirError if it is not such a line. A line as we write it is not parsed."""
    if line.startswith(LOCK_LINE_START) and line.endswith(LOCK_LINE_END):
        return line[len(LOCK_LINE_START) : line.index(b'"', len(LOCK_LINE_START))].decode(errors="replace")
    return from_json(LockedCall, line, LOCK_FILE).step


def lock_place(step: str) -> tuple[int, str]:
    """Where a step's group of lines is in tapir.lock: `prepare`, then `round-01` and so on, also above 99."""
    group = step.partition("/")[0]
    return len(group), group


def unlock_steps(run: RunDir, steps: Collection[str]) -> None:
    """Remove the calls of some steps."""
    if (path := run.path / LOCK_FILE).exists():
        with atomic_write(path) as partial, partial.open("wb") as out:
            out.writelines(line for line in read_lines(path) if line_step(line) not in steps)


def unique_call_keys(lines: Iterable[LockedCall]) -> list[str]:
    """The keys, each once, in the order of first use."""
    return list(dict.fromkeys(line.key for line in lines))
