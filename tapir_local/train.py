"""LoRA fine-tuning of the student, in its own process: Unsloth on a GPU, plain TRL and PEFT elsewhere."""

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from tapir_local.errors import TapirError
from tapir_local.lora import (
    Backend,
    Hardware,
    add_lora,
    check_folder,
    go_on_from,
    linear_names,
    load_model,
    load_tokenizer,
    look,
)
from tapir_local.process import Progress, child_main, in_own_process
from tapir_local.recipe import Train
from tapir_local.records import Example
from tapir_local.rundir import read_record, read_rows, whole, write_json
from tapir_local.template import training_text

MASKED = -100  # a label that torch's cross-entropy leaves out
LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "unsloth",
    "unsloth_zoo",
    "bitsandbytes",
)


@dataclass(frozen=True)
class TrainJob:
    """What one fine-tuning reads, does and writes.

    `model` is a folder or Hub name; `rows` a JSONL file of Example; `adapter_from` a folder whose LoRA weights to go on
    from; `out` the adapter's folder, whole or absent, with `resolved.json` and `train_log.jsonl` beside the weights.
    `backend` `auto` is Unsloth where it can run.
    """

    model: str
    rows: Path
    out: Path
    settings: Train
    max_length: int
    random_seed: int
    adapter_from: Path | None = None
    backend: Backend = "auto"


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


def train(job: TrainJob, folder: Path, progress: Progress | None = None) -> None:
    """Run the job in a process of its own, which leaves job.json and train.log in `folder`.

    `progress` gets (steps done, steps in all, loss). TapirError as from `run_job`, or when the process died.
    """
    in_own_process("tapir_local.train", job, folder, progress)


def run_folder(folder: Path, progress: Progress) -> None:
    """The child's side of `train`: the environment first, since the libraries read it when they are imported."""
    job = read_record(TrainJob, folder / "job.json")
    os.environ.update(environment(job.model))
    run_job(job, progress)


def environment(model: str) -> dict[str, str]:
    """Variables for a training process: nothing is sent anywhere, nor asked for where the model is a folder."""
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}
    return quiet | offline


def run_job(job: TrainJob, progress: Progress = lambda done, total, note: None) -> None:
    """Train and write the adapter; TapirError when model, template, rows or earlier adapter do not serve."""
    started = time.monotonic()
    examples = read_rows(Example, job.rows)
    if not examples:
        raise TapirError("no rows to train on", where=str(job.rows), fix="Make them again: `tapir-local redo`.")
    check_folder(job.model)
    with TemporaryDirectory(prefix="tapir-train-") as scratch:
        os.environ["UNSLOTH_COMPILE_LOCATION"] = scratch  # else generated code lands in the current folder
        hardware = look(job.settings.load_in_4bit, job.backend)
        tokenizer = load_tokenizer(job.model)
        tokens = token_rows(examples, tokenizer, job.max_length)
        if not tokens.rows:
            raise TapirError(
                f"every prompt fills the {job.max_length} tokens of a row",
                where=str(job.rows),
                fix="Raise student.max_length.",
            )
        model, shape, arguments = prepare(job, hardware, tokens)
        steps = fit(model, tokenizer, tokens, {**arguments, "output_dir": scratch}, progress)
    end = {"seconds": time.monotonic() - started, "peak_memory": peak_memory()}
    resolved = {
        "model": job.model,
        "device": hardware.device,
        "backend": hardware.backend,
        "versions": versions(),
        "rows": tokens.counts,
        "lora": shape,
        "sft": arguments,
    }
    write_adapter(job.out, model, resolved, [*steps, end])
    progress(len(steps), len(steps), f"loss {steps[-1]['loss']:.3f}, {tokens}")


def token_rows(examples: Sequence[Example], tokenizer: Any, max_length: int) -> TokenRows:
    """Token ids and labels of every row, in order.

    The prompt's ids are those that a student is asked with; the completion's are what follows them in the ids of the
    whole text, or its own where a token spans the boundary. A completion that is cut has no end-of-turn token.
    """
    stops = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    bos, eos, template = tokenizer.bos_token or "", tokenizer.eos_token or "", tokenizer.get_chat_template()
    texts = [
        training_text(template, row.prompt, row.completion, bos_token=bos, eos_token=eos, stops=stops)
        for row in examples
    ]
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


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, none added: the template has written the special ones."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def sft_arguments(job: TrainJob, hardware: Hardware, rows: int) -> dict[str, Any]:
    """The arguments of SFTConfig, for Unsloth and plain TRL alike, without `output_dir`.

    Whatever Unsloth gives another default than TRL is written out (unsloth 2026.10: 8-bit Adam, accumulation 2, batch
    4, learning rate 5e-5, warm-up 0.1, weight decay 0.001, seed 3407 and more).
    """
    settings = job.settings
    micro, accumulation = split_batch(settings.batch_size, settings.micro_batch_size)
    steps = math.ceil(settings.epochs * math.ceil(math.ceil(rows / micro) / accumulation))
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
        "optim": "adamw_8bit" if settings.load_in_4bit else "adamw_torch_fused",
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
        "packing": False,
        "padding_free": False,
        "loss_type": "nll" if hardware.backend == "unsloth" else "chunked_nll",  # the latter: no logits of the prompt
        "gradient_checkpointing": False,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "torch_empty_cache_steps": None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
    }


def split_batch(batch: int, micro: int) -> tuple[int, int]:
    """Rows at once and how often gradients are summed: the most rows, at most `micro`, that divide `batch`."""
    most = max(size for size in range(1, min(batch, micro) + 1) if batch % size == 0)
    return most, batch // most


def prepare(job: TrainJob, hardware: Hardware, tokens: TokenRows) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The model with its LoRA layers, from an earlier adapter if any; the arguments of those layers and of SFTConfig.

    `gradient_checkpointing` is on where the activations would fill more than half of the memory left beside the
    weights; it costs about a third of the speed.
    """
    settings, arguments = job.settings, sft_arguments(job, hardware, len(tokens.rows))
    model = load_model(
        job.model, hardware, four_bits=settings.load_in_4bit, max_length=job.max_length, seed=job.random_seed
    )
    size = model.config.get_text_config()
    batch = arguments["per_device_train_batch_size"] * max(len(row["input_ids"]) for row in tokens.rows)
    wanted = activation_bytes(size.num_hidden_layers, size.hidden_size, size.vocab_size, batch)
    arguments["gradient_checkpointing"] = 2 * wanted > hardware.free - model.get_memory_footprint()
    lora = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    shape = {**lora, "bias": "none", "target_modules": linear_names(model)}
    model = add_lora(model, shape, hardware, job.random_seed, arguments["gradient_checkpointing"])
    if job.adapter_from:
        go_on_from(model, job.adapter_from, shape)
    return model, shape, arguments


def activation_bytes(layers: int, hidden: int, vocabulary: int, tokens: int) -> int:
    """Roughly what a forward pass keeps for the backward one, in 32 bits.

    34 bytes for each token, layer and hidden unit in 16 bits, attention's scores not kept (Korthikanti et al. 2022,
    "Reducing Activation Recomputation in Large Transformer Models", section 4); the logits three times over.
    """
    return 2 * 34 * tokens * layers * hidden + 3 * 4 * tokens * vocabulary


def fit(
    model: Any, tokenizer: Any, tokens: TokenRows, arguments: Mapping[str, Any], progress: Progress
) -> list[dict[str, Any]]:
    """Train; one entry for each step. TapirError when the GPU's memory runs out."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    log: list[dict[str, Any]] = []
    trainer = SFTTrainer(
        model, SFTConfig(**arguments), train_dataset=Dataset.from_list(tokens.rows), processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(recorder(log, progress))
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        fix = (
            "Lower train.micro_batch_size (the result stays the same) or student.max_length, or set train.load_in_4bit."
        )
        raise TapirError("the GPU's memory ran out", where="train", fix=fix) from error
    return log


def recorder(log: list[dict[str, Any]], progress: Progress) -> Any:
    """A callback of the Trainer that adds each step to `log` and passes it on as progress."""
    from transformers import TrainerCallback

    started = time.monotonic()

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        seconds = time.monotonic() - started
        kept = {key: logs.get(key) for key in ("loss", "learning_rate", "grad_norm", "epoch")}
        tokens = int(logs.get("num_tokens", 0))
        log.append(
            {
                "step": state.global_step,
                **kept,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "seconds": seconds,
            }
        )
        progress(state.global_step, state.max_steps, f"loss {logs['loss']:.3f}")

    return type("Recorder", (TrainerCallback,), {"on_log": on_log})()


def peak_memory() -> int:
    """The most bytes that this process has held: of the GPU where there is one."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what is learned."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_adapter(out: Path, model: Any, resolved: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> None:
    """The adapter's folder: weights and config, resolved.json, train_log.jsonl."""
    with whole(out) as partial:
        model.save_pretrained(partial)
        config = orjson.loads((partial / "adapter_config.json").read_bytes())
        config["target_modules"].sort()  # PEFT writes a set, in another order each time
        write_json(partial / "adapter_config.json", config)
        (partial / "README.md").unlink(missing_ok=True)  # an empty form, and the run has its own card
        write_json(partial / "resolved.json", resolved)
        (partial / "train_log.jsonl").write_bytes(
            b"".join(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE) for entry in log)
        )


if __name__ == "__main__":
    sys.exit(child_main(run_folder))
