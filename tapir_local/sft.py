"""What is trained on and how: the job, its rows as token ids, and every argument of SFTConfig written out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.lora import Hardware
from tapir_local.quoting import format_of, ids_of
from tapir_local.recipe import Train
from tapir_local.records import Example

MASKED = -100  # a label that torch's cross-entropy leaves out
FIXED = {  # arguments of SFTConfig that nothing decides
    "torch_empty_cache_steps": None,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "report_to": "none",
    "save_strategy": "no",  # checkpoints are made by the clock (see checkpoints.is_due)
    "save_total_limit": None,
    "save_only_model": False,
    "ddp_find_unused_parameters": False,
    "eval_strategy": "no",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class TrainJob:
    """What one fine-tuning reads, does and writes.

    `model` is a folder or Hub name; `rows` a JSONL file of Example; `adapter_from` a folder of what an earlier one
    wrote, to go on from; `out` the adapter's folder, whole or absent, with `resolved.json` and `train_log.jsonl` beside
    the weights. `micro` is how many rows are in memory at once where the memory did not hold as many as the settings
    say.
    """

    model: str
    rows: Path
    out: Path
    settings: Train
    max_length: int
    random_seed: int
    adapter_from: Path | None = None
    micro: int | None = None


@dataclass(frozen=True)
class TokenRows:
    """Rows as token ids, `labels` being MASKED on the prompt. `cut` counts rows whose completion lost its end to
    `max_length`, `dropped` those whose prompt alone fills it."""

    rows: list[dict[str, list[int]]]
    cut: int = 0
    dropped: int = 0

    @property
    def counts(self) -> dict[str, int]:
        return {"trained": len(self.rows), "cut": self.cut, "dropped": self.dropped}

    def __str__(self) -> str:
        return ", ".join(f"{number:,} rows {what}" for what, number in self.counts.items() if number)


def token_rows(examples: Sequence[Example], tokenizer: Any, max_length: int) -> TokenRows:
    """Token ids and labels of every row, in order.

    The prompt's ids are those that a student is asked with; the completion's are what follows them in the ids of the
    whole text, or its own where a token spans the boundary. A completion that is cut has no end-of-turn token. A
    special token that a row quotes is text, in the prompt and in the completion.
    """
    form = format_of(tokenizer)
    texts = [form.answered(row.prompt, row.completion) for row in examples]
    asked = ids_of(tokenizer, [prompt for prompt, _ in texts])
    joined = ids_of(tokenizer, [prompt + completion for prompt, completion in texts])
    apart = ids_of(tokenizer, [completion for _, completion in texts])
    ends = [
        whole_ids[len(head) :] if whole_ids[: len(head)] == head else tail
        for head, whole_ids, tail in zip(asked, joined, apart, strict=True)
    ]
    fits = [(head, tail) for head, tail in zip(asked, ends, strict=True) if len(head) < max_length]
    rows = [
        {"input_ids": (head + tail)[:max_length], "labels": ([MASKED] * len(head) + tail)[:max_length]}
        for head, tail in fits
    ]
    return TokenRows(rows, sum(len(head) + len(tail) > max_length for head, tail in fits), len(texts) - len(fits))


def sft_arguments(job: TrainJob, hardware: Hardware, rows: int, twice: bool = False) -> dict[str, Any]:
    """The arguments of SFTConfig, for Unsloth and plain TRL alike, without `output_dir`.

    `twice` says that activations are computed twice instead of kept.

    Whatever Unsloth gives another default than TRL is written out (unsloth 2026.10: 8-bit Adam, accumulation 2, batch
    4, learning rate 5e-5, warm-up 0.1, weight decay 0.001, seed 3407 and more).
    """
    settings = job.settings
    micro, accumulation = split_batch(share_of(settings, hardware.processes), job.micro or settings.micro_batch_size)
    steps = math.ceil(settings.epochs * math.ceil(math.ceil(rows / (micro * hardware.processes)) / accumulation))
    gpu = hardware.device == "cuda"
    return {
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        "warmup_steps": round(settings.warmup * steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": "adamw_8bit" if settings.method == "qlora" else "adamw_torch_fused",
        "seed": job.random_seed,
        "data_seed": job.random_seed,
        "full_determinism": not gpu,  # costs nothing on a CPU; on a GPU some kernels have no such version
        "bf16": hardware.precision == "bf16",
        "fp16": hardware.precision == "f16",
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "max_length": job.max_length,
        "dataset_kwargs": {"skip_prepare_dataset": True},  # rows are token ids and labels already
        # On two cores, rows of 60 to 120 tokens, a Llama of 3.8M: 3,300 to 3,500 tokens/s by length, 2,500 at random
        # lengths, 1,600 packed, whose attention is over the whole pack. A step is `batch_size` rows in the first two.
        "train_sampling_strategy": "group_by_length",
        "packing": settings.packing,  # tells the collator; the rows are packed already (see `pack`)
        "packing_strategy": "bfd",
        "padding_free": False,
        "loss_type": "nll" if hardware.backend == "unsloth" else "chunked_nll",  # the latter: no logits of the prompt
        "gradient_checkpointing": twice,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        **FIXED,
    }


def split_batch(batch: int, micro: int) -> tuple[int, int]:
    """Rows at once and how often gradients are summed: the most rows, at most `micro`, that divide `batch`."""
    most = max(size for size in range(1, min(batch, micro) + 1) if batch % size == 0)
    return most, batch // most


def share_of(settings: Train, processes: int) -> int:
    """The rows of a step that each of several processes takes; TapirError where they cannot be shared out."""
    if settings.batch_size % processes:
        raise TapirError(
            f"a batch of {settings.batch_size} rows cannot be shared by {processes} processes",
            where="train.batch_size",
            fix=f"Make it a multiple of {processes}.",
        )
    return settings.batch_size // processes


def pack(rows: Sequence[Mapping[str, list[int]]], max_length: int) -> Any:
    """A Dataset of rows laid one after another, best fit first, in as few of `max_length` tokens as will do.

    Column `seq_lengths` says where each begins; TRL's collator counts positions from there, and transformers then lets
    no row see another.
    """
    from datasets import Dataset
    from trl import pack_dataset

    return pack_dataset(Dataset.from_list(list(rows)), max_length, "bfd")
