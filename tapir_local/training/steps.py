"""What is done at each step of a training: its line in the log, its progress, its checkpoint, a stop at a dead loss."""

import os
import time
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.records import Progress
from tapir_local.training import checkpoints
from tapir_local.training.checkpoints import Course
from tapir_local.training.job import RowOrder, TrainJob
from tapir_local.training.model import Hardware

NEW_RUN = "in a new run (--name): the store keeps what was paid for"


def watcher(course: Course, job: TrainJob, hardware: Hardware, order: RowOrder, progress: Progress) -> Any:
    """A callback of the Trainer that keeps the log, passes steps on as progress, and makes checkpoints."""
    from transformers import TrainerCallback

    processes = hardware.processes

    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoints.start_clock(course)

    def on_epoch_begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        order.epoch = int(state.epoch or 0)

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if "loss" in logs:  # the summary at the end has none
            refuse_dead_step(state.global_step, logs, job, hardware.precision)
            course.log.append(entry(course, state, logs, args.per_device_train_batch_size))
            progress(state.global_step, state.max_steps, f"loss {logs['loss']:.3f}")

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < state.max_steps and checkpoints.is_due(course, processes):
            control.should_save = True

    def on_save(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.distributed_state.wait_for_everyone()
        if is_first():
            checkpoints.keep(course, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    hooks = (on_train_begin, on_epoch_begin, on_log, on_step_end, on_save)
    return type("Watcher", (TrainerCallback,), {hook.__name__: hook for hook in hooks})()


def refuse_dead_step(step: int, logs: Mapping[str, float], job: TrainJob, precision: str) -> None:
    """TapirError where the loss or the gradient of a step is no number, before a checkpoint keeps what came of it.

    In f16 a gradient may overflow: the step is then left out, and the scale lowered.
    """
    names = {"loss": "the loss", **({} if precision == "f16" else {"grad_norm": "the gradient"})}
    dead = [what for name, what in names.items() if not isfinite(logs.get(name) or 0)]
    if dead:
        what = f"{dead[0]} is no longer a number at step {step}"
        raise TapirError(f"{what}: the training came to nothing", where="train", fix=lower(job, precision))


def refuse_dead_weights(model: Any, job: TrainJob, precision: str) -> None:
    """TapirError where a trained weight is no number."""
    import torch

    trained = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    dead = [name for name, weight in trained if not bool(torch.isfinite(weight).all())]
    if dead:
        what = f"{len(dead):,} of the trained weights' tensors hold values that are no numbers, {dead[0]} the first"
        raise TapirError(what, where="train", fix=lower(job, precision))


def lower(job: TrainJob, precision: str) -> str:
    """What to do about a training that has diverged."""
    rate = job.settings.learning_rate
    wider = "" if precision == "f32" else f", or train.precision above {precision}"
    return (
        f"Set a lower train.learning_rate ({rate:g} now; try {rate / 10:g}), a higher train.warmup{wider}, {NEW_RUN}. "
        "Where the rate is not to blame, look for what is odd in the round's train.jsonl."
    )


def entry(course: Course, state: Any, logs: Mapping[str, float], micro: int) -> dict[str, Any]:
    """A step for the log. `tokens` and `seconds` are counted from the beginning of the training, `tokens_per_second`
    from the step before; memory is in bytes."""
    tokens, seconds = int(state.num_input_tokens_seen), time.monotonic() - course.began
    last = course.log[-1] if course.log else {"tokens": 0, "seconds": 0.0}
    return {
        "step": state.global_step,
        **{key: logs.get(key) for key in ("loss", "learning_rate", "grad_norm", "epoch")},
        "tokens": tokens,
        "tokens_per_second": (tokens - last["tokens"]) / max(seconds - last["seconds"], 1e-9),
        "seconds": seconds,
        **peak_memory(),
        "micro_batch_size": micro,
    }


def is_first() -> bool:
    """Whether this process is alone, or the first of those that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def peak_memory() -> dict[str, int]:
    """`peak_memory`, the most bytes that this process has held: of the GPU where there is one, and then in
    `peak_reserved` with what torch keeps of it for reuse."""
    import resource

    import torch

    if torch.cuda.is_available():
        held, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_memory": int(held), "peak_reserved": int(reserved)}
    return {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # getrusage(2): KiB on Linux
