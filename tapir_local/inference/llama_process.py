"""Run llama.cpp in a process of its own where it uses a GPU: if it ends there, a stage ends, and not the run.

`python -m tapir_local.inference.llama_process FOLDER` does the job in that folder. llama.cpp aborts its process when
CUDA finds no memory inside a computation, and a process keeps its CUDA context, 0.3 to 0.6 GB, until it ends.
"""

import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.files import private_folder, read_record, remove_path
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.context_plan import ContextPlan
from tapir_local.inference.generate import (
    SILENT,
    Callbacks,
    PromptGroup,
    PromptReply,
    ReplyHooks,
    ResultT,
    generate,
    reply_to_groups,
)
from tapir_local.inference.lib import has_gpu
from tapir_local.inference.model import STUDENT_ADVICE, Advice
from tapir_local.inference.score import NO_CALLBACKS, score_completions
from tapir_local.process import Parent, call_in_process, exit_error, serve_parent
from tapir_local.records import Completion, Prompt, Scored, noop

LAST_LINES = 4  # of the log, in an error: CUDA's errors have three, and ggml's abort one
CPU_ADVICE = "With CUDA_VISIBLE_DEVICES= before the command, everything runs on the CPU instead."


@dataclass(frozen=True)
class GenerateJob:
    """The arguments of `generate`."""

    gguf: Path
    prompts: tuple[Prompt, ...]
    config: GenerationConfig
    adapter: Path | None = None
    ids: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ScoreJob:
    """The arguments of `score_completions`."""

    gguf: Path
    texts: tuple[tuple[Prompt, str], ...]
    context: int
    ids: tuple[str, ...] | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class ReplyJob:
    """The arguments of `reply_to_groups`."""

    gguf: Path
    groups: tuple[PromptGroup, ...]
    advice: Advice


@dataclass(frozen=True)
class LlamaJob:
    """The job of one process: one of the three."""

    generate: GenerateJob | None = None
    score: ScoreJob | None = None
    reply: ReplyJob | None = None


@dataclass(frozen=True)
class LlamaPlace:
    """Where llama.cpp runs: `apart` in a process of its own, or in this one; None for a process only if it has a GPU.

    `folder` is made for the process's job and log. It is deleted at the end, unless an error names the log. None for a
    temporary one.
    """

    apart: bool | None = None
    folder: Path | None = None

    @property
    def is_apart(self) -> bool:
        """Whether to run a process."""
        return has_gpu() if self.apart is None else self.apart


ANYWHERE = LlamaPlace()


def run_generate_job(
    job: GenerateJob, callbacks: Callbacks[Completion] = SILENT, place: LlamaPlace = ANYWHERE
) -> list[Completion]:
    """As `generate`, in the place named; TapirError also if a process of llama.cpp's ends before its work is done."""
    if not job.prompts or not place.is_apart:
        return do_generate_job(job, callbacks)
    found = run_llama(LlamaJob(generate=job), place, callback_hooks(callbacks, Completion), STUDENT_ADVICE)
    return [Completion(**row) for row in found]


def run_score_job(
    job: ScoreJob, callbacks: Callbacks[Scored] = NO_CALLBACKS, place: LlamaPlace = ANYWHERE
) -> list[Scored]:
    """As `score_completions`, in the place named; TapirError as by `run_generate_job`."""
    if not job.texts or not place.is_apart:
        return do_score_job(job, callbacks)
    found = run_llama(LlamaJob(score=job), place, callback_hooks(callbacks, Scored), STUDENT_ADVICE)
    return [Scored(**row) for row in found]


def run_reply_job(job: ReplyJob, hooks: ReplyHooks, place: LlamaPlace = ANYWHERE) -> None:
    """As `reply_to_groups`, in the place named; the hooks run in this process. TapirError as by `run_generate_job`."""
    if not place.is_apart:
        reply_to_groups(job.gguf, job.groups, hooks, job.advice)
        return
    named: dict[str, Callable[..., Any]] = {
        "opened": hooks.opened,
        "may_start": hooks.may_start,
        "reply": lambda number, found: hooks.reply(number, PromptReply(**found)),
        "warn": hooks.warn,
    }
    run_llama(LlamaJob(reply=job), place, named, job.advice)


def do_generate_job(job: GenerateJob, callbacks: Callbacks[Completion]) -> list[Completion]:
    """Call `generate` in this process."""
    return generate(job.gguf, job.prompts, job.config, adapter=job.adapter, ids=job.ids, callbacks=callbacks)


def do_score_job(job: ScoreJob, callbacks: Callbacks[Scored]) -> list[Scored]:
    """Call `score_completions` in this process."""
    return score_completions(
        job.gguf, job.texts, context=job.context, ids=job.ids, adapter=job.adapter, callbacks=callbacks
    )


def callback_hooks(callbacks: Callbacks[ResultT], kind: Callable[..., ResultT]) -> dict[str, Callable[..., Any]]:
    """The callbacks by name, for values that come as JSON; `kind` makes a result of its fields."""
    result, plan = callbacks.result or noop, callbacks.plan or noop
    return {
        "result": lambda row: result(kind(**row)),
        "progress": callbacks.progress or noop,
        "warn": callbacks.warn,
        "plan": lambda row: plan(ContextPlan(**row)),
    }


def run_llama(job: LlamaJob, place: LlamaPlace, hooks: Mapping[str, Callable[..., Any]], advice: Advice) -> Any:
    """Do a job in a process of its own and return its result."""
    folder = place.folder or Path(tempfile.mkdtemp(prefix="tapir-local-"))
    private_folder(folder)
    try:
        found = call_in_process(llama_main, job, folder, hooks, explain=partial(llama_exit_error, advice))
    except BaseException as error:
        if not (isinstance(error, TapirError) and Path(error.where).parent == folder):
            remove_path(folder)
        raise
    remove_path(folder)
    return found


def llama_exit_error(advice: Advice, module: str, code: int, log: Path) -> TapirError:
    """The error for a process of llama.cpp's that ended with `code` (negative: that signal) without reporting one."""
    if code >= 0:
        return exit_error(module, code, log)
    kept = "What was finished before is kept: run the same command again, and it goes on from there."
    if code == -signal.SIGKILL:
        what = "llama.cpp's process was killed (SIGKILL), probably because main memory ran out"
        return TapirError(what, where=str(log), fix=f"{kept} {advice.too_heavy}")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = ": " + "; ".join(lines[-LAST_LINES:]) if lines else ""
    return TapirError(
        f"llama.cpp ended its process by {signal.Signals(-code).name}{said}",
        where=str(log),
        fix=f"{kept} If it ends again: {advice.too_large} {CPU_ADVICE}",
    )


def llama_main(folder: Path, parent: Parent) -> Any:
    """Do the job in `folder`: the entry point of llama.cpp's process."""
    job = read_record(LlamaJob, folder / "job.json")
    if job.generate:
        return do_generate_job(job.generate, sending_callbacks(parent))
    if job.score:
        return do_score_job(job.score, sending_callbacks(parent))
    if job.reply:
        opened, may_start = partial(parent.ask, "opened"), partial(parent.ask, "may_start")
        hooks = ReplyHooks(opened, may_start, partial(parent.tell, "reply"), partial(parent.tell, "warn"))
        reply_to_groups(job.reply.gguf, job.reply.groups, hooks, job.reply.advice)
    return None


def sending_callbacks(parent: Parent) -> Callbacks[Any]:
    """Callbacks that have the parent call its own."""
    return Callbacks(*(partial(parent.tell, name) for name in ("result", "progress", "warn", "plan")))


if __name__ == "__main__":
    sys.exit(serve_parent(llama_main))
