"""The training job: its rows as token ids, their order, and every argument of SFTConfig."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapir_local.data.special_tokens import chat_format_of, ids_after, tokenize_rendered
from tapir_local.errors import TapirError
from tapir_local.recipe.schema import Train
from tapir_local.records import Example, SchedulePart, instruction_of
from tapir_local.training.model import Hardware
from tapir_local.training.reporting import tracker_arguments
from tapir_local.unusable import MAX_TEXT_KEPT, Unusable

LEFT_OUT_FILE = "left_out.jsonl"  # in the training's folder: the rows that were left out, as Unusable
SORTED_STEPS = 50  # steps whose rows are sorted by length together
IGNORED_LABEL = -100  # the label that torch's cross-entropy ignores
FIXED_ARGUMENTS = {  # arguments of SFTConfig that no setting changes
    "torch_empty_cache_steps": None,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_strategy": "no",  # checkpoints are saved by time (see checkpoints.is_checkpoint_due)
    "save_total_limit": None,
    "save_only_model": False,
    "ddp_find_unused_parameters": False,
    "eval_strategy": "no",
    "disable_tqdm": True,
    "include_num_input_tokens_seen": "non_padding",  # TRL's own token count is not saved in a checkpoint
}


@dataclass(frozen=True)
class TrainJob:
    """What one fine-tuning reads and writes.

    `model` is a folder or Hub name; `rows` is a JSONL file of Example, or of PreferencePair; `adapter_from` is the
    output folder of an earlier training to continue from; `out` is the output folder, written completely or not at all,
    with `resolved.json` and `train_log.jsonl` beside the weights. `micro` overrides the micro-batch size after memory
    ran out. `unusable` is the share of the rows that may be left out. `unsloth_cache` is where Unsloth keeps generated
    code from one training to the next (None: nowhere). `part` is the round's part of `train.schedule: wsd`, or
    `preference`: the rows are then pairs.
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
    unsloth_cache: Path | None = None
    part: SchedulePart = "whole"

    @property
    def on_pairs(self) -> bool:
        """Whether it trains on preference pairs."""
        return self.part == "preference"


@dataclass(frozen=True)
class TokenRows:
    """Rows as token ids with `labels` (IGNORED_LABEL on the prompt), and the rows that were left out, with reasons."""

    rows: list[dict[str, list[int]]]
    left_out: tuple[Unusable, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        return {"trained": len(self.rows), "dropped": len(self.left_out)}

    def __str__(self) -> str:
        return ", ".join(f"{number:,} rows {what}" for what, number in self.counts.items() if number)


def token_rows(examples: Sequence[Example], tokenizer: Any, max_length: int) -> TokenRows:
    """Token ids and labels of every row that can be trained on, in order.

    The prompt's ids are exactly those used at inference; see `ids_after` for the completion's. Special tokens quoted in
    a row are plain text. A row is left out if it has more than `max_length` tokens, because a completion without its
    end teaches the student not to stop, or if the chat template refuses it.
    """
    texts, refused = training_texts(examples, tokenizer)
    asked = tokenize_rendered(tokenizer, [prompt for _, prompt, _ in texts])
    joined = tokenize_rendered(tokenizer, [prompt + completion for _, prompt, completion in texts])
    apart = tokenize_rendered(tokenizer, [completion for _, _, completion in texts])
    rows, long = list[dict[str, list[int]]](), dict[int, str]()
    for (number, _, _), head, whole_ids, alone in zip(texts, asked, joined, apart, strict=True):
        after = ids_after(head, whole_ids)
        tail = alone if after is None else after
        if len(head) + len(tail) <= max_length:
            rows.append({"input_ids": head + tail, "labels": [IGNORED_LABEL] * len(head) + tail})
        else:
            long[number] = f"{len(head):,} tokens of prompt and {len(tail):,} of answer"
    kinds = {"longer than student.max_length": long, "refused by the student's chat template": refused}
    reasons = {number: (kind, detail) for kind, found in kinds.items() for number, detail in found.items()}
    return TokenRows(rows, tuple(unusable_row(examples[number], *reasons[number]) for number in sorted(reasons)))


def training_texts(examples: Sequence[Example], tokenizer: Any) -> tuple[list[tuple[int, str, str]], dict[int, str]]:
    """Number, rendered prompt and completion of each row, and the reasons for the rows that the template refuses."""
    form = chat_format_of(tokenizer)
    texts, refused = list[tuple[int, str, str]](), dict[int, str]()
    for number, row in enumerate(examples):
        try:
            texts.append((number, *form.answered(row.prompt, row.completion)))
        except TapirError as error:
            refused[number] = error.what
    return texts, refused


def unusable_row(row: Example, kind: str, detail: str) -> Unusable:
    """The record of a row that is not trained on; the pipeline stage adds its own name."""
    return Unusable("train", row.id, kind, detail, instruction_of(row.prompt)[:MAX_TEXT_KEPT])


@dataclass
class RowOrder:
    """The order of an epoch's rows, for a DataLoader. It depends only on seed and epoch, so an interrupted training
    resumes in the same order.

    `lengths` has the tokens of each row; `batch` is the number of rows per step.
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
    """Every row number once: shuffled, then sorted by length within groups of at most SORTED_STEPS steps.

    Batches of similar lengths need little padding. On two cores, with rows of 60 to 120 tokens and a Llama of 3.8M
    weights, this gave 3,300 to 3,500 tokens/s, random lengths 2,500, and packing 1,600, because attention then covers
    the whole pack. The longest row comes first, so that a lack of memory shows in the first step.
    """
    rows = list(range(len(lengths)))
    chance.shuffle(rows)
    stretch = batch * max(1, min(SORTED_STEPS, len(rows) // (4 * batch)))
    parts = [sorted(rows[at : at + stretch], key=lambda row: -lengths[row]) for at in range(0, len(rows), stretch)]
    order = [row for part in parts for row in part]
    longest = max(range(len(order)), key=lambda place: lengths[order[place]], default=0)
    order[:1], order[longest : longest + 1] = order[longest : longest + 1], order[:1]
    return order


def sft_arguments(job: TrainJob, hardware: Hardware, rows: int, recompute: bool = False) -> dict[str, Any]:
    """The arguments of SFTConfig except `output_dir`, the same for Unsloth and plain TRL.

    `recompute` turns gradient checkpointing on (activations are computed twice instead of kept).

    Every argument with a different default in Unsloth is set here (unsloth 2026.10: 8-bit Adam, accumulation 2, batch
    4, learning rate 5e-5, warm-up 0.1, weight decay 0.001, seed 3407 and more).
    """
    settings = job.settings
    micro, accumulation = split_batch(
        rows_per_process(settings, hardware.processes), job.micro or settings.micro_batch_size
    )
    steps = math.ceil(settings.epochs * math.ceil(math.ceil(rows / (micro * hardware.processes)) / accumulation))
    gpu = hardware.device == "cuda"
    return {
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": settings.learning_rate,
        **schedule_arguments(job, steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": "adamw_8bit" if settings.method == "qlora" else "adamw_torch_fused",
        "seed": job.random_seed,
        "data_seed": job.random_seed,
        "full_determinism": not gpu,  # free on a CPU; on a GPU some kernels have no deterministic version
        "bf16": hardware.precision == "bf16",
        "fp16": hardware.precision == "f16",
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "max_length": job.max_length,
        "dataset_kwargs": {"skip_prepare_dataset": True},  # the rows are already token ids and labels
        "packing": settings.packing,  # for the collator; the rows are already packed (see `pack_rows`)
        "packing_strategy": "bfd",
        "padding_free": False,
        "loss_type": "nll"
        if hardware.backend == "unsloth"
        else "chunked_nll",  # chunked_nll computes no logits for the prompt
        "gradient_checkpointing": recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        **FIXED_ARGUMENTS,
        **tracker_arguments(settings, job.out),
    }


def schedule_arguments(job: TrainJob, steps: int) -> dict[str, Any]:
    """The learning rate's schedule over so many steps, as arguments of SFTConfig."""
    kind, warm_up = job.settings.schedule, round(job.settings.warmup * steps)
    if kind == "wsd":
        kind = "constant" if job.part in ("first", "middle") else "cosine"
        warm_up = warm_up if job.part in ("first", "whole") else 0
    return {"lr_scheduler_type": "constant_with_warmup" if kind == "constant" else kind, "warmup_steps": warm_up}


def split_batch(batch: int, micro: int) -> tuple[int, int]:
    """Micro-batch size and gradient accumulation steps: the largest size, at most `micro`, that divides `batch`."""
    most = max(size for size in range(1, min(batch, micro) + 1) if batch % size == 0)
    return most, batch // most


def rows_per_process(settings: Train, processes: int) -> int:
    """The rows per step and process. Raises TapirError if the batch cannot be divided evenly."""
    if settings.batch_size % processes:
        raise TapirError(
            f"a batch of {settings.batch_size} rows cannot be divided among {processes} processes",
            where="train.batch_size",
            fix=f"Make it a multiple of {processes}.",
        )
    return settings.batch_size // processes


def pack_rows(rows: Sequence[Mapping[str, list[int]]], max_length: int) -> Any:
    """Pack rows into sequences of at most `max_length` tokens (best-fit decreasing) and return them as a Dataset.

    The column `seq_lengths` has the length of each row in a pack; TRL's collator restarts the positions there, and
    transformers then masks attention between rows.
    """
    from datasets import Dataset
    from trl import pack_dataset

    return pack_dataset(Dataset.from_list(list(rows)), max_length, "bfd")
