"""Small trainings for the tests: sums to memorize, settings that learn them in eight steps, and logs."""

import json
import random
from pathlib import Path
from typing import Any

from models import make_model

from tapir_local.files import write_rows
from tapir_local.recipe.schema import Train
from tapir_local.records import Example, Message
from tapir_local.training.job import TrainJob

SETTINGS = Train(learning_rate=5e-3, batch_size=8, micro_batch_size=4, lora_rank=4, lora_alpha=8, warmup=0.1)
WEIGHTS = "adapter_model.safetensors"
# SFTConfig defaults (trl 1.15) that unsloth 2026.10.9 changes, found by importing both.
UNSLOTH_CHANGES = {
    "optim", "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "learning_rate", "warmup_steps", "weight_decay", "seed", "logging_steps", "padding_free", "bf16",
    "logging_nan_inf_filter", "torch_empty_cache_steps",
}  # fmt: skip


def examples(number: int) -> list[Example]:
    """Sums of several lengths to memorize."""
    chance = random.Random("sums")
    sums = [[chance.randint(1, 9) for _ in range(chance.randint(2, 5))] for _ in range(number)]
    return [
        Example(str(n), (Message("user", f"Add {' + '.join(map(str, terms))}."),), f"The sum is {sum(terms)}.")
        for n, terms in enumerate(sums)
    ]


def make_job(folder: Path, **settings: Any) -> TrainJob:
    """A random Llama, 32 rows and the job that learns them, with `folder`/adapter as its output."""
    if not (folder / "base").exists():
        make_model(folder / "base")
        write_rows(folder / "rows.jsonl", examples(32))
    changed = Train.model_validate({**SETTINGS.model_dump(), **settings})
    return TrainJob(str(folder / "base"), folder / "rows.jsonl", folder / "adapter", changed, 128, 7)


def log(adapter: Path) -> list[dict[str, Any]]:
    """The log entries of the steps."""
    entries = map(json.loads, (adapter / "train_log.jsonl").read_text().splitlines())
    return [entry for entry in entries if "loss" in entry]


def losses(adapter: Path) -> list[float]:
    return [entry["loss"] for entry in log(adapter)]


def resolved(adapter: Path) -> dict[str, Any]:
    return dict(json.loads((adapter / "resolved.json").read_text()))
