"""What is trained on and how: the job, its rows as token ids, and every argument of SFTConfig written out."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapir_local.data.quoting import format_of, ids_of
from tapir_local.errors import TapirError
from tapir_local.recipe.schema import Train
from tapir_local.records import Example, instruction_of
from tapir_local.training.model import Hardware
from tapir_local.unusable import MAX_TEXT_KEPT, Unusable

LEFT_OUT = "left_out.jsonl"  # in a training's folder: the rows, as Unusable, that it did not learn from
STRETCH = 50  # steps whose rows are put in the order of their lengths
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
    "include_num_input_tokens_seen": "non_padding",  # TRL's own count of tokens is not kept in a checkpoint
}


@dataclass(frozen=True)
class TrainJob:
    """What one fine-tuning reads, does and writes.

    `model` is a folder or Hub name; `rows` a JSONL file of Example; `adapter_from` a folder of what an earlier one
    wrote, to go on from; `out` the adapter's folder, whole or absent, with `resolved.json` and `train_log.jsonl` beside
    the weights. `micro` is how many rows are in memory at once where the memory did not hold as many as the settings
    say. `unusable` is the share of the rows that may be left out.
    """

    model: str
    rows: Path
    out: Path
    settings: Train
    max_length: int
    random_seed: int
    adapter_from: Path | None = None
    micro: int | None = None
    unusable: float = 1.0


@dataclass(frozen=True)
class TokenRows:
    """Rows as token ids, `labels` being MASKED on the prompt, and the rows that were left out with their reasons."""

    rows: list[dict[str, list[int]]]
    left_out: tuple[Unusable, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        return {"trained": len(self.rows), "dropped": len(self.left_out)}

    def __str__(self) -> str:
        return ", ".join(f"{number:,} rows {what}" for what, number in self.counts.items() if number)


def token_rows(examples: Sequence[Example], tokenizer: Any, max_length: int) -> TokenRows:
    """Token ids and labels of every row that can be learned from, in order.

    The prompt's ids are those that a student is asked with; the completion's are what follows them in the ids of the
    whole text, or its own where a token spans the boundary. A special token that a row quotes is text. A row is left
    out where it has more than `max_length` tokens, since a completion without its end teaches not to stop, or where the
    chat template refuses it.
    """
    texts, refused = training_texts(examples, tokenizer)
    asked = ids_of(tokenizer, [prompt for _, prompt, _ in texts])
    joined = ids_of(tokenizer, [prompt + completion for _, prompt, completion in texts])
    apart = ids_of(tokenizer, [completion for _, _, completion in texts])
    rows, long = list[dict[str, list[int]]](), dict[int, str]()
    for (number, _, _), head, whole_ids, alone in zip(texts, asked, joined, apart, strict=True):
        tail = whole_ids[len(head) :] if whole_ids[: len(head)] == head else alone
        if len(head) + len(tail) <= max_length:
            rows.append({"input_ids": head + tail, "labels": [MASKED] * len(head) + tail})
        else:
            long[number] = f"{len(head):,} tokens of prompt and {len(tail):,} of answer"
    kinds = {"longer than student.max_length": long, "refused by the student's chat template": refused}
    reasons = {number: (kind, detail) for kind, found in kinds.items() for number, detail in found.items()}
    return TokenRows(rows, tuple(unusable(examples[number], *reasons[number]) for number in sorted(reasons)))


def training_texts(examples: Sequence[Example], tokenizer: Any) -> tuple[list[tuple[int, str, str]], dict[int, str]]:
    """Number, prompt and completion of each row as the template writes them; the numbers of those that it refuses."""
    form = format_of(tokenizer)
    texts, refused = list[tuple[int, str, str]](), dict[int, str]()
    for number, row in enumerate(examples):
        try:
            texts.append((number, *form.answered(row.prompt, row.completion)))
        except TapirError as error:
            refused[number] = error.what
    return texts, refused


def unusable(row: Example, kind: str, detail: str) -> Unusable:
    """The record of a row that is not trained on; the stage that trains adds its own name."""
    return Unusable("train", row.id, kind, detail, instruction_of(row.prompt)[:MAX_TEXT_KEPT])


@dataclass
class RowOrder:
    """The order in which an epoch goes through its rows, for a DataLoader: a function of seed and epoch alone, so that
    a training that was cut goes on in the order that it had.

    `lengths` has the tokens of each row; `batch` is the rows of a step.
    """

    lengths: Sequence[int]
    batch: int
    seed: int
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.lengths, self.batch, random.Random(f"{self.seed}-order-{self.epoch}")))


def epoch_order(lengths: Sequence[int], batch: int, chance: random.Random) -> list[int]:
    """Every row's number once, drawn at random, then sorted by length within stretches of at most STRETCH steps.

    Rows of about one length make a batch with little padding: on two cores, with rows of 60 to 120 tokens and a Llama
    of 3.8M, 3,300 to 3,500 tokens/s, 2,500 at random lengths, 1,600 packed, whose attention is over the whole pack. The
    longest row comes first: memory that does not suffice runs out in the first step.
    """
    rows = list(range(len(lengths)))
    chance.shuffle(rows)
    stretch = batch * max(1, min(STRETCH, len(rows) // (4 * batch)))
    parts = [sorted(rows[at : at + stretch], key=lambda row: -lengths[row]) for at in range(0, len(rows), stretch)]
    order = [row for part in parts for row in part]
    longest = max(range(len(order)), key=lambda place: lengths[order[place]], default=0)
    order[:1], order[longest : longest + 1] = order[longest : longest + 1], order[:1]
    return order


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
