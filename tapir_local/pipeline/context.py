"""What a stage is given: the recipe, the run's folder, the round, and the tools with which it may touch the world."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tapir_local.method.metrics import AnswerChecker
from tapir_local.pipeline.lockfile import Locked, lock
from tapir_local.pipeline.student_text import StudentText, sift, unfit_answers, unfit_prompts
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Answer, Completion, Example, Progress, Prompt, Request, Scored, instruction_of, noop
from tapir_local.run_dir import RunDir
from tapir_local.store.thinking import without_thoughts
from tapir_local.unusable import MAX_TEXT_KEPT, Unusable, record_unusable, refuse_too_many

Ask = Callable[[Sequence[Request], Progress], list[Answer]]


@dataclass(frozen=True)
class Tools:
    """All that a stage may do to the world beyond its own run's folder."""

    teacher: Ask
    judge: Ask
    # GGUF, prompts, their ids; the last is given each answer as soon as it is done
    generate: Callable[
        [Path, Sequence[Prompt], Sequence[str], Progress, Callable[[Completion], None]], list[Completion]
    ]
    classify: Callable[[Path, Path, int, Path, Progress], None]  # labelled rows, other rows, seed, folder out
    train: Callable[[Path, Path | None, int, Path, Progress], None]  # rows, adapter to go on from, seed, adapter out
    export: Callable[[Path, Path, Progress], None]  # adapter, GGUF out
    gate: Callable[[Path, Path, Path, Path, Progress], None]  # adapter, GGUF, rows to probe with, report out
    # GGUF, prompts with completions; the last is given each result, whose id is its text's number
    score: Callable[[Path, Sequence[tuple[Prompt, str]], Progress, Callable[[Scored], None]], list[Scored]]
    ship: Callable[[Path, Path, Progress], None]  # round's folder; folder for its GGUF, gate.json and Modelfile
    student_text: Callable[[], StudentText]  # the student's chat template and tokens
    begin: Callable[[], None] = noop  # called once the run is held, before its first step
    check: AnswerChecker | None = None
    replay: bool = False  # every answer is from the store, nobody is asked


@dataclass
class Work:
    """What a stage is given: the recipe, the run's folder, the round, the tools, and where to show progress."""

    recipe: Recipe
    run: RunDir
    tools: Tools
    number: int = 0
    step: str = ""
    progress: Progress = noop
    tally: dict[str, int] = field(default_factory=lambda: {"paid": 0, "hits": 0})
    calls: list[Locked] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """This round's folder."""
        return self.run.round(self.number)

    def chance(self, stage: str) -> random.Random:
        """The stage's own source of chance."""
        return random.Random(f"{self.recipe.random_seed}-{stage}-{self.number}")

    def ask(self, ask: Ask, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests, counted as paid or hits, their calls recorded in tapir.lock."""
        answers = ask(requests, self.progress) if requests else []
        if self.endpoint_of(ask).thinking == "strip":  # whoever answers: what is not asked through the store, too
            answers = [stripped(answer) for answer in answers]
        hits = sum(answer.hit for answer in answers)
        self.tally["hits"] += hits
        self.tally["paid"] += len(answers) - hits
        pairs = zip(requests, answers, strict=True)
        self.calls += [Locked(self.step, request.row, answer.key) for request, answer in pairs if answer.key]
        if self.calls:
            lock(self.run, self.step, self.calls)
        return answers

    def endpoint_of(self, ask: Ask) -> Endpoint:
        """Who answers: the teacher, or the judge where it is another."""
        judges = ask is self.tools.judge and ask is not self.tools.teacher
        return self.recipe.judge if judges and self.recipe.judge.kind != "teacher" else self.recipe.teacher

    def leave_out(self, rows: Sequence[Unusable], total: int, by_choice: Sequence[Unusable] = ()) -> None:
        """Record the rows that this step leaves out; TapirError where limits.unusable allows fewer of `total` rows.

        To be called once in a step, with all its unusable rows, before its output is written. `by_choice` are rows that
        can be used and that the recipe asks to leave out: they are recorded too, and count against no limit.
        """
        record_unusable(self.run, self.step, [*rows, *by_choice])
        refuse_too_many(rows, total, self.recipe.limits.unusable, f"{self.run.name}, {self.step}")

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


def stripped(answer: Answer) -> Answer:
    """The answer without what was thought aloud before it."""
    text = without_thoughts(answer.text)
    if text == answer.text:
        return answer
    return replace(answer, text=text, why=answer.why or ("" if text.strip() else "the reply is only a thought"))


@dataclass(frozen=True)
class Stage:
    """`output` is a name in the run's folder (prepare) or the round's; `run` returns a phrase for the closing line.

    A stage that asks the student for hours `resumes` in a file beside its output, or in the output itself, to which
    it appends as it goes: what a cut attempt has written of it is not deleted.
    """

    name: str
    output: str
    run: Callable[[Work, Path], str]
    resumes: str = ""


def askable(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """The rows that the student can be asked, and the others: refused by its chat template, or without room."""
    if not rows:
        return [], []
    student = work.tools.student_text()
    return sift(rows, work.step, lambda some: unfit_prompts(student, [row.prompt for row in some]), work.progress)


def trainable(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """The rows that the student can be trained on, and the others: changed by its chat template, or too long."""
    if not rows:
        return [], []
    student = work.tools.student_text()
    check = lambda some: unfit_answers(student, [(row.prompt, row.completion) for row in some])  # noqa: E731
    return sift(rows, work.step, check, work.progress)


def answered(
    work: Work, stage: str, rows: Sequence[Example], asked: Sequence[Prompt], *, trained: bool = True
) -> tuple[list[Example], list[Unusable]]:
    """Rows with the teacher's replies to `asked` as their completions, and those without one that is of use.

    A reply is of use where it is whole and, if it is to be `trained` on, the student can be.
    """
    requests = [work.request(stage, row.id, messages) for row, messages in zip(rows, asked, strict=True)]
    found, unusable = list[Example](), list[Unusable]()
    for row, reply in zip(rows, work.ask(work.tools.teacher, requests), strict=True):
        if reply.complete:
            found.append(replace(row, completion=trimmed(reply.text)))
        else:
            unusable.append(unanswered(work, row, reply))
    kept, unfit = trainable(work, found) if trained else (found, [])
    return kept, unusable + unfit


def trimmed(text: str) -> str:
    """A reply without blank lines around it. The indentation of its first line, as of code, belongs to it; the one
    space with which many tokenizers begin a reply does not."""
    lines = text.rstrip().split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    kept = "\n".join(lines[first:])
    return kept if kept.startswith(("  ", "\t")) else kept.lstrip()


def unanswered(work: Work, row: Example, reply: Answer) -> Unusable:
    """The record of a row to which the teacher gave no whole answer."""
    kinds = {
        "length": "cut at teacher.max_tokens",
        "content_filter": "refused by the server's filter",
        "refused": "refused by the server",
    }
    kind = kinds.get(reply.finish, "empty reply" if not reply.text.strip() else "reply not whole")
    more = more_room(work) if reply.finish == "length" else ""
    return Unusable(work.step, row.id, kind, reply.why or more, instruction_of(row.prompt)[:MAX_TEXT_KEPT])


def more_room(work: Work) -> str:
    """How to get the answers whole that were cut: only those are paid again."""
    stage, size = work.step.rpartition("/")[2], 2 * work.recipe.teacher.max_tokens
    undo = f"tapir-local redo {work.run.name} --from {stage}" + (f" --round {work.number}" if work.number else "")
    return f"`{undo}`, then distill with --set teacher.max_tokens={size}; only the cut answers are paid again"
