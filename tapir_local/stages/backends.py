"""Build the real backends of a run: the parts of the program that ask, generate, train, export and verify."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from tapir_local.export.base import (
    base_gguf,
    check_base_unchanged,
    converter_path,
    gate_memory_text,
    prepare_student_folder,
    run_base_gguf,
    student_files,
    student_folder,
)
from tapir_local.export.ollama import write_modelfile
from tapir_local.files import link_or_copy, remove_path
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.generate import Callbacks
from tapir_local.inference.llama_process import (
    ANYWHERE,
    GenerateJob,
    LlamaPlace,
    ScoreJob,
    run_generate_job,
    run_score_job,
)
from tapir_local.inference.model import is_adapter
from tapir_local.memory import report_free_gpu_memory
from tapir_local.method.metrics import AnswerChecker
from tapir_local.process import pass_variables, withhold_variables
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Recipe
from tapir_local.records import (
    Answer,
    Completion,
    Progress,
    Prompt,
    Request,
    SchedulePart,
    Scored,
    instruction_of,
    noop,
)
from tapir_local.run_dir import RunDir
from tapir_local.stages.ahead import JudgeAhead, LiveAsk, asks_ahead
from tapir_local.stages.context import (
    Backends,
    ClassifyBackend,
    ExportBackend,
    GateBackend,
    GenerateBackend,
    ScoreBackend,
    ShipBackend,
    TrainBackend,
    UntrainedBackend,
)
from tapir_local.stages.judge import judge_endpoint
from tapir_local.stages.row_check import PromptAndAnswer, StudentFormat, read_student_format
from tapir_local.store.queries import billed_to_run
from tapir_local.store.store import Mode, Store
from tapir_local.teacher.budget import BudgetTracker, Cost, check_reply_limits
from tapir_local.teacher.session import DEFAULT_ASK_OPTIONS, AskOptions, EarlierTries

# 184 million weights of deberta-v3-base with gradients, Adam's moments and a batch.
CLASSIFIER_GPU_BYTES = 6 << 30


@contextmanager
def real_backends(
    recipe: Recipe, run: RunDir, say: Callable[[str], None], mode: Mode = "on", apart: bool | None = None
) -> Iterator[Backends]:
    """Backends that ask through the cache's store, generate with llama.cpp, and train in their own processes.

    `say` gets the notices of opening the store. In mode "replay" no endpoint is asked, and a missing answer is an
    error. Nothing is written in the run before it is locked; `begin` then raises TapirError, before anything is paid,
    if the student cannot be exported. The processes that train do not get the keys of the recipe's endpoints. `apart`
    says whether llama.cpp answers in a process of its own; None: if it uses a GPU (see `LlamaPlace`).
    """
    from tapir_local.teacher.ahead import AheadAsker

    judge, llama = judge_endpoint(recipe), LlamaPlace(apart, run.path / "llama")
    check_reply_limits(recipe.budget, recipe.teacher, judge)
    with Store(run.cache / "teacher.db", mode) as store, withhold_variables(recipe.key_variables):
        for notice in store.notices:
            say(notice)
        budget = BudgetTracker(recipe.budget, run_cost(run), run_cost(run, estimated=True))
        options = AskOptions(budget=budget, warn=say, llama=llama)
        ask_judge = ask_backend(judge, store, run.name, options)
        ahead = JudgeAhead(partial(AheadAsker, judge, store, run.name, options), ask_judge)
        yield Backends(
            teacher=ask_backend(recipe.teacher, store, run.name, options),
            judge=ahead.ask,
            judge_ahead=ahead.open if asks_ahead(recipe, mode) else None,
            generate=generate_backend(recipe, run, llama),
            classify=classify_backend(recipe, say),
            train=train_backend(recipe, run, say),
            export=export_backend(recipe, run),
            export_untrained=export_untrained_backend(recipe, run),
            gate=gate_backend(recipe, run),
            score=score_backend(recipe, run, llama),
            ship=ship_backend(recipe, run),
            begin=begin_backend(recipe, run, say),
            student_format=format_backend(recipe, run),
            check=recipe_checker(recipe),
            replay=mode == "replay",
            meter=options.meter,
            spent=lambda: budget.spent,
        )


def begin_backend(recipe: Recipe, run: RunDir, say: Callable[[str], None] = noop) -> Callable[[], None]:
    """Fixes the run's student and checks, before the first step, that it can be exported and its training reported."""

    def begin() -> None:
        if not (run.round(recipe.all_rounds) / "adapter").exists():
            check_recipe_tracker(recipe)
        if not (run.round(0) / "adapter").exists():
            check_student(prepare_student_folder(recipe, run, say), converter_path(recipe))

    return begin


def check_recipe_tracker(recipe: Recipe) -> None:
    """TapirError if the tracker of `train.report_to` cannot be used here."""
    from tapir_local.training.reporting import check_tracker

    check_tracker(recipe.train)


def check_student(model: Path, converter: Path | None = None) -> None:
    """TapirError for a student without a chat template, or of an architecture that llama.cpp does not support."""
    from tapir_local.export.export import check_exportable

    check_exportable(model, converter)


def format_backend(recipe: Recipe, run: RunDir) -> Callable[[], StudentFormat]:
    """Reads the student's chat template and tokenizer on first use."""
    return cache(lambda: read_student_format(student_folder(recipe, run), recipe.student.max_length))


def run_cost(run: RunDir, *, estimated: bool = False) -> Cost:
    """What may have been billed to a run so far; with `estimated`, only the estimated part of it."""
    store = run.cache / "teacher.db"
    return Cost(*billed_to_run(store, run.name, estimated=estimated)) if store.exists() else Cost()


def ask_backend(endpoint: Endpoint, store: Store, run: str, options: AskOptions = DEFAULT_ASK_OPTIONS) -> LiveAsk:
    """Sends requests to an endpoint, through the store and as the options say."""

    def ask(requests: Sequence[Request], progress: Progress, earlier: EarlierTries | None = None) -> list[Answer]:
        from tapir_local.teacher.ask import ask as send

        def show(done: int, total: int, hits: int) -> None:
            progress(done, total, f"{hits:,} from the store" if hits else "")

        settings = replace(options, progress=show, tell=progress, earlier=earlier)
        return send(requests, endpoint, store, run=run, options=settings)

    return ask


def generate_backend(recipe: Recipe, run: RunDir, llama: LlamaPlace = ANYWHERE) -> GenerateBackend:
    """Generates greedy answers with a round's student, in the place `llama`."""

    def generate_with_llama(
        *,
        gguf: Path,
        prompts: Sequence[Prompt],
        ids: Sequence[str],
        progress: Progress,
        on_result: Callable[[Completion], None],
    ) -> list[Completion]:
        student, opened = recipe.student, student_files(recipe, run, gguf)
        config = GenerationConfig(
            max_tokens=student.max_tokens,
            context=student.max_length,
            parallel=None if student.concurrency == "auto" else student.concurrency,
            seed=recipe.random_seed,
        )
        callbacks = Callbacks(
            result=on_result,
            progress=lambda done, total: progress(done, total, ""),
            warn=lambda words: progress(0, len(prompts), words),
        )
        job = GenerateJob(opened.gguf, tuple(prompts), config, opened.adapter, tuple(ids))
        return run_generate_job(job, callbacks, llama)

    return generate_with_llama


def export_untrained_backend(recipe: Recipe, run: RunDir) -> UntrainedBackend:
    """Links the GGUF of the untrained student, which is made once for all runs of a cache."""

    def link_base(*, out: Path, progress: Progress) -> None:
        link_or_copy(base_gguf(recipe, run, progress), out)

    return link_base


def score_backend(recipe: Recipe, run: RunDir, llama: LlamaPlace = ANYWHERE) -> ScoreBackend:
    """Computes log-probabilities with a round's student, in the place `llama`."""

    def score_with_llama(
        *,
        gguf: Path,
        texts: Sequence[PromptAndAnswer],
        progress: Progress,
        on_result: Callable[[Scored], None],
    ) -> list[Scored]:
        opened = student_files(recipe, run, gguf)
        job = ScoreJob(opened.gguf, tuple(texts), recipe.student.max_length, adapter=opened.adapter)
        callbacks = Callbacks(result=on_result, progress=lambda done, total: progress(done, total, ""))
        return run_score_job(job, callbacks, llama)

    return score_with_llama


def train_backend(recipe: Recipe, run: RunDir, say: Callable[[str], None] = noop) -> TrainBackend:
    """Fine-tunes the recipe's student."""

    def fine_tune(
        *, rows: Path, previous: Path | None, seed: int, part: SchedulePart, out: Path, progress: Progress
    ) -> None:
        from tapir_local.training.job import TrainJob
        from tapir_local.training.preference import preference_settings
        from tapir_local.training.reporting import TRACKER_KEYS
        from tapir_local.training.train import run_training

        job = TrainJob(
            str(student_folder(recipe, run)),
            rows,
            out,
            preference_settings(recipe.train) if part == "preference" else recipe.train,
            recipe.student.max_length,
            seed,
            previous,
            unusable=recipe.limits.unusable,
            unsloth_cache=run.cache / "unsloth",
            part=part,
        )
        with pass_variables(TRACKER_KEYS.get(recipe.train.report_to, ())):
            run_training(job, out.parent / "train", progress, say)

    return fine_tune


def trained_model(recipe: Recipe, run: RunDir, adapter: Path) -> tuple[Path, Path | None]:
    """(model folder, adapter folder or None); with train.method `full` the adapter's folder is the whole model."""
    return (adapter, None) if recipe.train.method == "full" else (student_folder(recipe, run), adapter)


def classify_backend(recipe: Recipe, say: Callable[[str], None] = noop) -> ClassifyBackend:
    """Trains the task classifier and applies it."""

    def classify_rows(*, labelled: Path, rows: Path, seed: int, out: Path, progress: Progress) -> None:
        from tapir_local.training.classifier import ClassifyJob, run_classifier

        report_free_gpu_memory(CLASSIFIER_GPU_BYTES, "the classifier", say)
        job = ClassifyJob(labelled, rows, tuple(recipe.task_table()), recipe.classifier, seed, out)
        run_classifier(job, out.parent / "classify", progress)

    return classify_rows


def export_backend(recipe: Recipe, run: RunDir) -> ExportBackend:
    """Writes a round's student: the adapter merged into its base, or the adapter alone."""

    def export_student(*, adapter: Path, out: Path, progress: Progress) -> None:
        from tapir_local.export.export import ExportJob, run_export

        model, lora = trained_model(recipe, run, adapter)
        quant, alone = recipe.export.quant, recipe.export.rounds == "adapter"
        if alone:
            run_base_gguf(recipe, run, progress, renew=out.parent == run.round(0))
            check_base_unchanged(recipe, run)
            quant = "f32"
        job = ExportJob(model, out, quant, lora, alone, converter_path(recipe))
        run_export(job, out.parent / "export", progress)

    return export_student


def gate_backend(recipe: Recipe, run: RunDir) -> GateBackend:
    """Compares the GGUF with the trained model."""

    def compare_with_model(*, adapter: Path, gguf: Path, rows: Path, out: Path, progress: Progress) -> None:
        from tapir_local.export.gate import GateJob, run_gate

        model, lora = trained_model(recipe, run, adapter)
        opened = student_files(recipe, run, gguf)
        progress(0, 0, gate_memory_text(model))
        job = GateJob(model, opened.gguf, rows, out, recipe.export.min_agreement, lora, opened.adapter)
        run_gate(job, out.parent / "gate", progress)

    return compare_with_model


def ship_backend(recipe: Recipe, run: RunDir) -> ShipBackend:
    """Makes a round's student one complete GGUF, with its gate report and a Modelfile for Ollama."""

    def write_model(*, student: Path, out: Path, progress: Progress) -> None:
        if is_adapter(student / "student.gguf"):
            merge_adapter(recipe, run, student, out, progress)
        else:
            for name in ("student.gguf", "gate.json"):
                link_or_copy(student / name, out / name)
        write_modelfile(out / "student.gguf", out / "Modelfile", context=recipe.student.max_length, temperature=0.0)

    return write_model


def merge_adapter(recipe: Recipe, run: RunDir, student: Path, out: Path, progress: Progress) -> None:
    """Write `out`/student.gguf with the adapter of the round's folder `student` merged, and its gate report."""
    from tapir_local.export.export import ExportJob, run_export
    from tapir_local.export.gate import GateJob, run_gate

    model, gguf, work = student_folder(recipe, run), out / "student.gguf", run.path / "ship"
    job = ExportJob(model, gguf, recipe.export.quant, student / "adapter", converter=converter_path(recipe))
    run_export(job, work, progress)
    progress(0, 0, gate_memory_text(model))
    least, rows = recipe.export.min_agreement, student / "train.jsonl"
    run_gate(GateJob(model, gguf, rows, out / "gate.json", least, student / "adapter"), work, progress)
    remove_path(work)


def recipe_checker(recipe: Recipe) -> AnswerChecker | None:
    """The recipe's checker, which tells right answers from wrong ones; None if it names none."""
    if recipe.checker is None:
        return None
    if recipe.checker == "tasks":
        return task_checker(recipe)
    from tapir_local.pocket.world import check_answer

    return lambda row, answer: check_answer(instruction_of(row.prompt), answer)


def task_checker(recipe: Recipe) -> AnswerChecker:
    """A checker that uses each task's own one; its answer is None for a task without one."""
    from tapir_local.method.checkers import CHECKERS

    named = {label: CHECKERS[task.checker] for label, task in recipe.task_table().items() if task.checker}
    return lambda row, answer: named[row.task](instruction_of(row.prompt), answer) if row.task in named else None
