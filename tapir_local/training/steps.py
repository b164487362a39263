"""What happens at each training step: log entry, progress, checkpoint, and a stop if the loss is not finite."""

import os
import time
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.files import remove_path
from tapir_local.records import Progress
from tapir_local.training import checkpoints
from tapir_local.training.checkpoints import TrainingState
from tapir_local.training.job import RowOrder, TrainJob
from tapir_local.training.loss import MEAN_STEPS, describe_loss
from tapir_local.training.model import Hardware
from tapir_local.training.preference import REFERENCE


def training_callback(
    training: TrainingState, job: TrainJob, hardware: Hardware, order: RowOrder, progress: Progress
) -> Any:
    """A Trainer callback that keeps the log, reports progress and requests checkpoints."""
    from transformers import TrainerCallback

    processes = hardware.processes

    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoints.start_clock(training)

    def on_epoch_begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        order.epoch = int(state.epoch or 0)

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if "loss" in logs:  # the final summary has none
            refuse_nonfinite_step(state.global_step, logs, job, hardware.precision)
            training.log.append(log_entry(training, state, logs, args.per_device_train_batch_size))
            losses = [entry["loss"] for entry in training.log if entry.get("loss") is not None]
            said = [describe_loss(losses), describe_speed(training.log), describe_gpu_memory(training.log[-1])]
            progress(state.global_step, state.max_steps, "  ".join(filter(None, said)))

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < state.max_steps and checkpoints.is_checkpoint_due(training, processes):
            control.should_save = True

    def on_save(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.distributed_state.wait_for_everyone()
        if is_main_process():
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            # With an adapter in a folder of its own, Trainer restores that one and not the trained one (transformers
            # 5.17, `_load_from_checkpoint`). DPOTrainer makes the reference again from the last round's adapter.
            remove_path(saved / REFERENCE)
            checkpoints.complete_checkpoint(training, saved)

    hooks = (on_train_begin, on_epoch_begin, on_log, on_step_end, on_save)
    return type("Watcher", (TrainerCallback,), {hook.__name__: hook for hook in hooks})()


def refuse_nonfinite_step(step: int, logs: Mapping[str, float], job: TrainJob, precision: str) -> None:
    """Raise TapirError if the loss or gradient of a step is not finite, before a checkpoint saves the result.

    In f16 a gradient may overflow: the step is then skipped and the loss scale lowered.
    """
    names = {"loss": "the loss", **({} if precision == "f16" else {"grad_norm": "the gradient"})}
    dead = [what for name, what in names.items() if not isfinite(logs.get(name) or 0)]
    if dead:
        what = f"{dead[0]} is not a finite number at step {step}"
        raise TapirError(f"{what}: the training diverged", where="train", fix=divergence_advice(job, precision))


def refuse_nonfinite_weights(model: Any, job: TrainJob, precision: str) -> None:
    """Raise TapirError if a trained weight is not finite."""
    import torch

    trained = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    dead = [name for name, weight in trained if not bool(torch.isfinite(weight).all())]
    if dead:
        what = f"{len(dead):,} of the trained tensors contain values that are not finite, the first is {dead[0]}"
        raise TapirError(what, where="train", fix=divergence_advice(job, precision))


def divergence_advice(job: TrainJob, precision: str) -> str:
    """What to do about a training that diverged."""
    rate, name = job.settings.learning_rate, "preference_learning_rate" if job.on_pairs else "learning_rate"
    wider = "" if precision == "f32" else f", or a higher train.precision than {precision}"
    return (
        f"Set a lower train.{name} ({rate:g} now; try {rate / 10:g}), a higher train.warmup{wider}, "
        "in a new run (--name): the store keeps all paid answers. If the rate is not the cause, look for unusual rows "
        "in the round's train.jsonl."
    )


def log_entry(training: TrainingState, state: Any, logs: Mapping[str, float], micro: int) -> dict[str, Any]:
    """The log entry of a step. `tokens` and `seconds` count from the start of the training, `tokens_per_second` from
    the step before; memory is in bytes."""
    tokens, seconds = int(state.num_input_tokens_seen), time.monotonic() - training.began
    last = training.log[-1] if training.log else {"tokens": 0, "seconds": 0.0}
    return {
        "step": state.global_step,
        **{key: logs.get(key) for key in ("loss", "learning_rate", "grad_norm", "epoch")},
        **{key: value for key, value in logs.items() if key.startswith("rewards/")},  # of a training on pairs
        "tokens": tokens,
        "tokens_per_second": (tokens - last["tokens"]) / max(seconds - last["seconds"], 1e-9),
        "seconds": seconds,
        **peak_memory(),
        "micro_batch_size": micro,
    }


def describe_speed(log: Sequence[Mapping[str, Any]]) -> str:
    """`1,920 tokens/s`, the mean of the last steps; "" before the second step, since the first one is slow."""
    last = log[-MEAN_STEPS:]
    seconds = last[-1]["seconds"] - last[0]["seconds"]
    return f"{(last[-1]['tokens'] - last[0]['tokens']) / seconds:,.0f} tokens/s" if seconds > 0 else ""


def describe_gpu_memory(entry: Mapping[str, Any]) -> str:
    """`GPU 9.1 of 24.0 GB`, the most that torch has reserved; "" without a GPU."""
    if "peak_reserved" not in entry:
        return ""
    import torch

    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return f"GPU {entry['peak_reserved'] / 1e9:.1f} of {total / 1e9:.1f} GB"


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def peak_memory() -> dict[str, int]:
    """`peak_memory`: the most bytes that this process used, on the GPU if there is one; `peak_reserved` then adds what
    torch keeps for reuse."""
    import resource

    import torch

    if torch.cuda.is_available():
        held, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_memory": int(held), "peak_reserved": int(reserved)}
    return {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # getrusage(2): KiB on Linux
