"""The real Tools: which part of the program does what for a recipe."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tapir_local.asking import unheard
from tapir_local.assets import student_folder
from tapir_local.budget import Cost, Purse
from tapir_local.metrics import Checker
from tapir_local.recipe import Endpoint, Recipe
from tapir_local.records import Answer, Completion, Prompt, Request, Scored, instruction_of
from tapir_local.rundir import RunDir
from tapir_local.store import Mode, Store
from tapir_local.storefile import spent
from tapir_local.work import Ask, Progress, Tools


def check_student(model: Path) -> None:
    """TapirError for a student without a chat template, or that has no like in llama.cpp."""
    from tapir_local.export import check_exportable

    check_exportable(model)


@contextmanager
def real_tools(recipe: Recipe, run: RunDir, say: Callable[[str], None], mode: Mode = "on") -> Iterator[Tools]:
    """Tools that ask through the cache's store, answer with llama.cpp, and train in processes of their own.

    `say` is told what opening the store put right. In mode "replay" nobody is asked, and a miss is an error.
    TapirError, before anything is paid, when the student could not be exported once it is trained.
    """
    if not (run.round(0) / "adapter").exists():
        check_student(student_folder(recipe, run))
    with Store(run.cache / "teacher.db", mode) as store:
        for notice in store.notices:
            say(notice)
        purse = Purse(recipe.budget, spent_by(run))
        yield Tools(
            teacher=asker(recipe.teacher, store, run.name, purse, say),
            judge=asker(judge_of(recipe), store, run.name, purse, say),
            generate=generator(recipe),
            classify=classifier(recipe),
            train=trainer(recipe, run),
            export=exporter(recipe, run),
            gate=gatekeeper(recipe, run),
            score=scorer(recipe),
            check=checker(recipe),
            replay=mode == "replay",
        )


def judge_of(recipe: Recipe) -> Endpoint:
    """The endpoint that judges."""
    return recipe.teacher if recipe.judge.kind == "teacher" else recipe.judge


def spent_by(run: RunDir) -> Cost:
    """What a run has spent until now."""
    store = run.cache / "teacher.db"
    return Cost(*spent(store, run.name)) if store.exists() else Cost()


def asker(
    endpoint: Endpoint, store: Store, run: str, purse: Purse | None = None, say: Callable[[str], None] = unheard
) -> Ask:
    """Requests to an endpoint through the store, within the budget."""

    def ask(requests: Sequence[Request], progress: Progress) -> list[Answer]:
        from tapir_local.teacher import ask as send

        def show(done: int, total: int, hits: int) -> None:
            progress(done, total, f"{hits:,} hits")

        return send(requests, endpoint, store, run=run, progress=show, purse=purse, warn=say, tell=progress)

    return ask


def generator(recipe: Recipe) -> Callable[[Path, Sequence[Prompt], Sequence[str], Progress], list[Completion]]:
    """A GGUF's greedy answers."""

    def answer(gguf: Path, prompts: Sequence[Prompt], ids: Sequence[str], progress: Progress) -> list[Completion]:
        from tapir_local.generate import generate

        student = recipe.student
        return generate(
            gguf,
            prompts,
            ids=ids,
            max_tokens=student.max_tokens,
            context=student.max_length,
            parallel=None if student.parallel == "auto" else student.parallel,
            seed=recipe.random_seed,
            progress=lambda done, total: progress(done, total, ""),
            tell=lambda words: progress(0, len(prompts), words),
        )

    return answer


def scorer(recipe: Recipe) -> Callable[[Path, Sequence[tuple[Prompt, str]], Progress], list[Scored]]:
    """A GGUF's log-probabilities of given completions."""

    def measure(gguf: Path, texts: Sequence[tuple[Prompt, str]], progress: Progress) -> list[Scored]:
        from tapir_local.score import score

        return score(
            gguf, texts, context=recipe.student.max_length, progress=lambda done, total: progress(done, total, "")
        )

    return measure


def trainer(recipe: Recipe, run: RunDir) -> Callable[[Path, Path | None, int, Path, Progress], None]:
    """Fine-tuning of the recipe's student."""

    def fine_tune(rows: Path, previous: Path | None, seed: int, out: Path, progress: Progress) -> None:
        from tapir_local.train import TrainJob, train

        job = TrainJob(
            str(student_folder(recipe, run)), rows, out, recipe.train, recipe.student.max_length, seed, previous
        )
        train(job, out.parent / "train", progress)

    return fine_tune


def classifier(recipe: Recipe) -> Callable[[Path, Path, int, Path, Progress], None]:
    """The task classifier, trained and applied."""

    def sort(labelled: Path, rows: Path, seed: int, out: Path, progress: Progress) -> None:
        from tapir_local.classifier import ClassifyJob, classify

        job = ClassifyJob(labelled, rows, tuple(recipe.task_table()), recipe.classifier, seed, out)
        classify(job, out.parent / "classify", progress)

    return sort


def exporter(recipe: Recipe, run: RunDir) -> Callable[[Path, Path, Progress], None]:
    """The student with an adapter as GGUF."""

    def write(adapter: Path, out: Path, progress: Progress) -> None:
        from tapir_local.export import ExportJob, export

        job = ExportJob(student_folder(recipe, run), out, adapter=adapter, quant=recipe.export.quant)
        export(job, out.parent / "export", progress)

    return write


def gatekeeper(recipe: Recipe, run: RunDir) -> Callable[[Path, Path, Path, Path, Progress], None]:
    """The comparison of the GGUF with the trained model."""

    def compare(adapter: Path, gguf: Path, rows: Path, out: Path, progress: Progress) -> None:
        from tapir_local.gate import GateJob, pass_gate

        job = GateJob(student_folder(recipe, run), gguf, rows, out, recipe.export.min_agreement, adapter)
        pass_gate(job, out.parent / "gate", progress)

    return compare


def checker(recipe: Recipe) -> Checker | None:
    """What tells right answers from wrong ones, where the recipe names it."""
    if recipe.checker is None:
        return None
    if recipe.checker == "tasks":
        return by_task(recipe)
    from tapir_local.pocket_world import check

    return lambda row, answer: check(instruction_of(row.prompt), answer)


def by_task(recipe: Recipe) -> Checker:
    """Each task's own checker; None for a task that has none."""
    from tapir_local.checkers import CHECKERS

    named = {label: CHECKERS[task.checker] for label, task in recipe.task_table().items() if task.checker}
    return lambda row, answer: named[row.task](instruction_of(row.prompt), answer) if row.task in named else None
