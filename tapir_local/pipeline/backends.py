"""The real Tools: which part of the program does what for a recipe."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tapir_local.export.base import base_of, check_base, converter_of, memory_words, student_of
from tapir_local.export.ollama import write_modelfile
from tapir_local.files import link_or_copy, remove_path
from tapir_local.inference.model import is_adapter
from tapir_local.memory import report_free_gpu_memory
from tapir_local.method.metrics import AnswerChecker
from tapir_local.pipeline.context import Ask, Tools
from tapir_local.pipeline.student_text import StudentText, read_student_text
from tapir_local.process import withhold_variables
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Answer, Completion, Progress, Prompt, Request, Scored, instruction_of, noop
from tapir_local.run_dir import RunDir
from tapir_local.store.schema import spent
from tapir_local.store.store import Mode, Store
from tapir_local.teacher.account import check_bounds
from tapir_local.teacher.budget import Cost, Purse
from tapir_local.training.student import settle_student, student_folder

CLASSIFIER = 6 << 30  # bytes: 184 million weights of deberta-v3-base with gradients and Adam's moments, and a batch


def check_student(model: Path, converter: Path | None = None) -> None:
    """TapirError for a student without a chat template, or that has no like in llama.cpp."""
    from tapir_local.export.export import check_exportable

    check_exportable(model, converter)


@contextmanager
def real_tools(recipe: Recipe, run: RunDir, say: Callable[[str], None], mode: Mode = "on") -> Iterator[Tools]:
    """Tools that ask through the cache's store, answer with llama.cpp, and train in processes of their own.

    `say` is told what opening the store put right. In mode "replay" nobody is asked, and a miss is an error. Nothing
    is written in the run before it is held; `begin` then raises TapirError, before anything is paid, when the student
    could not be exported once it is trained. The processes that train get no key of the recipe's endpoints.
    """
    check_bounds(recipe.budget, recipe.teacher, judge_of(recipe))
    with Store(run.cache / "teacher.db", mode) as store, withhold_variables(recipe.key_variables):
        for notice in store.notices:
            say(notice)
        purse = Purse(recipe.budget, spent_by(run), spent_by(run, estimated=True))
        yield Tools(
            teacher=asker(recipe.teacher, store, run.name, purse, say),
            judge=asker(judge_of(recipe), store, run.name, purse, say),
            generate=generator(recipe, run),
            classify=classifier(recipe, say),
            train=trainer(recipe, run, say),
            export=exporter(recipe, run),
            gate=gatekeeper(recipe, run),
            score=scorer(recipe, run),
            ship=shipper(recipe, run),
            begin=beginner(recipe, run),
            student_text=reader(recipe, run),
            check=checker(recipe),
            replay=mode == "replay",
        )


def beginner(recipe: Recipe, run: RunDir) -> Callable[[], None]:
    """What is settled, and refused, of a run's student before the first step."""

    def begin() -> None:
        if not (run.round(0) / "adapter").exists():
            check_student(settle_student(recipe, run), converter_of(recipe))

    return begin


def reader(recipe: Recipe, run: RunDir) -> Callable[[], StudentText]:
    """The student's chat template and tokens, read when they are first wanted."""
    return cache(lambda: read_student_text(student_folder(recipe, run), recipe.student.max_length))


def judge_of(recipe: Recipe) -> Endpoint:
    """The endpoint that judges."""
    return recipe.teacher if recipe.judge.kind == "teacher" else recipe.judge


def spent_by(run: RunDir, *, estimated: bool = False) -> Cost:
    """What may have been billed to a run until now; of it only what is estimated, if asked for."""
    store = run.cache / "teacher.db"
    return Cost(*spent(store, run.name, estimated=estimated)) if store.exists() else Cost()


def asker(
    endpoint: Endpoint, store: Store, run: str, purse: Purse | None = None, say: Callable[[str], None] = noop
) -> Ask:
    """Requests to an endpoint through the store, within the budget."""

    def ask(requests: Sequence[Request], progress: Progress) -> list[Answer]:
        from tapir_local.teacher.ask import ask as send

        def show(done: int, total: int, hits: int) -> None:
            progress(done, total, f"{hits:,} hits")

        return send(requests, endpoint, store, run=run, progress=show, purse=purse, warn=say, tell=progress)

    return ask


def generator(
    recipe: Recipe, run: RunDir
) -> Callable[[Path, Sequence[Prompt], Sequence[str], Progress, Callable[[Completion], None]], list[Completion]]:
    """The greedy answers of a round's student."""

    def answer(
        gguf: Path,
        prompts: Sequence[Prompt],
        ids: Sequence[str],
        progress: Progress,
        each: Callable[[Completion], None],
    ) -> list[Completion]:
        from tapir_local.inference.generate import generate

        student, opened = recipe.student, student_of(recipe, run, gguf)
        return generate(
            opened.gguf,
            prompts,
            adapter=opened.adapter,
            ids=ids,
            max_tokens=student.max_tokens,
            context=student.max_length,
            parallel=None if student.concurrency == "auto" else student.concurrency,
            seed=recipe.random_seed,
            each=each,
            progress=lambda done, total: progress(done, total, ""),
            tell=lambda words: progress(0, len(prompts), words),
        )

    return answer


def scorer(
    recipe: Recipe, run: RunDir
) -> Callable[[Path, Sequence[tuple[Prompt, str]], Progress, Callable[[Scored], None]], list[Scored]]:
    """Log-probabilities of given completions by a round's student."""

    def measure(
        gguf: Path, texts: Sequence[tuple[Prompt, str]], progress: Progress, each: Callable[[Scored], None]
    ) -> list[Scored]:
        from tapir_local.inference.score import score

        opened = student_of(recipe, run, gguf)
        return score(
            opened.gguf,
            texts,
            adapter=opened.adapter,
            context=recipe.student.max_length,
            progress=lambda done, total: progress(done, total, ""),
            each=each,
        )

    return measure


def trainer(
    recipe: Recipe, run: RunDir, say: Callable[[str], None] = noop
) -> Callable[[Path, Path | None, int, Path, Progress], None]:
    """Fine-tuning of the recipe's student."""

    def fine_tune(rows: Path, previous: Path | None, seed: int, out: Path, progress: Progress) -> None:
        from tapir_local.training.train import TrainJob, train

        job = TrainJob(
            str(student_folder(recipe, run)),
            rows,
            out,
            recipe.train,
            recipe.student.max_length,
            seed,
            previous,
            unusable=recipe.limits.unusable,
        )
        train(job, out.parent / "train", progress, say)

    return fine_tune


def trained(recipe: Recipe, run: RunDir, adapter: Path) -> tuple[Path, Path | None]:
    """The model's folder and its adapter's, None where train.method `full` has left the whole model in adapter/."""
    return (adapter, None) if recipe.train.method == "full" else (student_folder(recipe, run), adapter)


def classifier(recipe: Recipe, say: Callable[[str], None] = noop) -> Callable[[Path, Path, int, Path, Progress], None]:
    """The task classifier, trained and applied."""

    def sort(labelled: Path, rows: Path, seed: int, out: Path, progress: Progress) -> None:
        from tapir_local.training.classifier import ClassifyJob, classify

        report_free_gpu_memory(CLASSIFIER, "the classifier", say)
        job = ClassifyJob(labelled, rows, tuple(recipe.task_table()), recipe.classifier, seed, out)
        classify(job, out.parent / "classify", progress)

    return sort


def exporter(recipe: Recipe, run: RunDir) -> Callable[[Path, Path, Progress], None]:
    """What a round keeps as its student: an adapter merged into its base, or by itself."""

    def write(adapter: Path, out: Path, progress: Progress) -> None:
        from tapir_local.export.export import ExportJob, export

        model, lora = trained(recipe, run, adapter)
        quant, alone = recipe.export.quant, recipe.export.rounds == "adapter"
        if alone:
            base_of(recipe, run, progress, anew=out.parent == run.round(0))
            check_base(recipe, run)
            quant = "f32"
        job = ExportJob(model, out, quant, lora, alone, converter_of(recipe))
        export(job, out.parent / "export", progress)

    return write


def gatekeeper(recipe: Recipe, run: RunDir) -> Callable[[Path, Path, Path, Path, Progress], None]:
    """The comparison of the GGUF with the trained model."""

    def compare(adapter: Path, gguf: Path, rows: Path, out: Path, progress: Progress) -> None:
        from tapir_local.export.gate import GateJob, pass_gate

        model, lora = trained(recipe, run, adapter)
        opened = student_of(recipe, run, gguf)
        progress(0, 0, memory_words(model))
        job = GateJob(model, opened.gguf, rows, out, recipe.export.min_agreement, lora, opened.adapter)
        pass_gate(job, out.parent / "gate", progress)

    return compare


def shipper(recipe: Recipe, run: RunDir) -> Callable[[Path, Path, Progress], None]:
    """A round's student as one whole GGUF with its gate's report, and a Modelfile for Ollama."""

    def pack(student: Path, out: Path, progress: Progress) -> None:
        if is_adapter(student / "student.gguf"):
            merge(student, out, progress)
        else:
            for name in ("student.gguf", "gate.json"):
                link_or_copy(student / name, out / name)
        write_modelfile(out / "student.gguf", out / "Modelfile", context=recipe.student.max_length, temperature=0.0)

    def merge(student: Path, out: Path, progress: Progress) -> None:
        from tapir_local.export.export import ExportJob, export
        from tapir_local.export.gate import GateJob, pass_gate

        model, gguf, work = student_folder(recipe, run), out / "student.gguf", run.path / "ship"
        job = ExportJob(model, gguf, recipe.export.quant, student / "adapter", converter=converter_of(recipe))
        export(job, work, progress)
        progress(0, 0, memory_words(model))
        least, rows = recipe.export.min_agreement, student / "train.jsonl"
        pass_gate(GateJob(model, gguf, rows, out / "gate.json", least, student / "adapter"), work, progress)
        remove_path(work)

    return pack


def checker(recipe: Recipe) -> AnswerChecker | None:
    """What tells right answers from wrong ones, where the recipe names it."""
    if recipe.checker is None:
        return None
    if recipe.checker == "tasks":
        return by_task(recipe)
    from tapir_local.pocket.world import check

    return lambda row, answer: check(instruction_of(row.prompt), answer)


def by_task(recipe: Recipe) -> AnswerChecker:
    """Each task's own checker; None for a task that has none."""
    from tapir_local.method.checkers import CHECKERS

    named = {label: CHECKERS[task.checker] for label, task in recipe.task_table().items() if task.checker}
    return lambda row, answer: named[row.task](instruction_of(row.prompt), answer) if row.task in named else None
