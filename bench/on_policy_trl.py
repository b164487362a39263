"""One training of bench/on_policy.py: TRL's DistillationTrainer, which stops when a number of tokens is trained on.

The student writes an answer to each prompt of a batch; the loss is the divergence of its next-token distribution from
the teacher's on these tokens (arXiv 2306.13649). So there is no fixed number of steps: the learning rate follows the
share of the tokens that are spent, in the cosine of our own trainings.
"""

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tapir_local.files import atomic_write, read_rows, write_json
from tapir_local.recipe.schema import Train
from tapir_local.records import Example

FIGURES = "figures.json"  # beside the adapter: tokens, steps and seconds


@dataclass(frozen=True)
class OnPolicyJob:
    """What one training reads and writes.

    `student` and `teacher` are folders of models with one tokenizer; of `rows`, a JSONL file of Example, only the
    prompts are used. `tokens` of answers are trained on, each of at most `max_tokens`. `beta` is TRL's: 0 is the
    forward KL divergence, 1 the reverse. `adapter_from` is the folder of an adapter to continue from.
    """

    student: Path
    teacher: Path
    rows: Path
    out: Path
    settings: Train
    tokens: int
    max_tokens: int
    seed: int
    beta: float = 1.0
    adapter_from: Path | None = None


class TokenBudget:
    """Tokens to train on: those spent, whether they are all spent, and the learning rate that follows from it."""

    def __init__(self, total: int, warm_up_steps: int = 0) -> None:
        self.total, self.warm_up_steps = total, warm_up_steps
        self.spent, self.last, self._before = 0, 0, 0

    def add(self, tokens: int) -> None:
        """Count the answers' tokens of a micro-batch."""
        self.spent += tokens

    def end_step(self) -> None:
        """Note how many tokens the step had."""
        self.last, self._before = self.spent - self._before, self.spent

    @property
    def is_spent(self) -> bool:
        """Whether to stop: one more step like the last would end further from the total than this one has."""
        return self.spent + self.last / 2 >= self.total

    def rate(self, step: int) -> float:
        """The share of the peak learning rate at a step: linear over the warm-up steps, times a cosine that falls to 0
        when the tokens are spent.

        The first step has a share of the peak and not 0, as transformers would have: an untrained student's answers
        are long, and a step may be a twentieth of all tokens.
        """
        warm_up = min(1.0, (step + 1) / max(1, self.warm_up_steps))
        return warm_up * 0.5 * (1 + math.cos(math.pi * min(1.0, self.spent / self.total)))


def train_on_policy(job: OnPolicyJob) -> None:
    """Train, and write the adapter and its figures to `job.out`, completely or not at all."""
    from tapir_local.training.train import training_environment

    os.environ.update(training_environment(str(job.student)))  # before the libraries are imported
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DistillationConfig

    from tapir_local.training.model import detect_hardware, load_model, load_tokenizer

    hardware = detect_hardware(job.settings, partial(print, file=sys.stderr))
    tokenizer = load_tokenizer(job.student)
    prompts = conversations(read_rows(Example, job.rows))
    model = load_student(job, hardware, tokenizer)
    teacher = load_model(str(job.teacher), hardware, method="lora", max_length=0, seed=job.seed).requires_grad_(False)
    arguments = distillation_arguments(job, hardware)
    budget = TokenBudget(job.tokens, warm_up_steps(job.settings, len(prompts)))
    log: list[dict[str, float]] = []
    with TemporaryDirectory(prefix="tapir-on-policy-") as scratch, atomic_write(job.out) as folder:
        trainer = counting_trainer(budget)(
            model,
            teacher,
            args=DistillationConfig(**arguments, output_dir=scratch),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
            callbacks=[stop_when_spent(budget, log)],
        )
        trainer.remove_callback(PrinterCallback)
        began = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began
        model.save_pretrained(folder)
        figures = {"tokens": budget.spent, "steps": trainer.state.global_step, "seconds": seconds, "log": log}
        write_json(folder / FIGURES, figures)


def conversations(rows: Sequence[Example]) -> list[list[dict[str, str]]]:
    """The prompts as TRL reads them."""
    return [[{"role": turn.role, "content": turn.content} for turn in row.prompt] for row in rows]


def warm_up_steps(settings: Train, rows: int) -> int:
    """The steps that our own training of as many rows takes to warm up."""
    return round(settings.warmup * math.ceil(settings.epochs * math.ceil(rows / settings.batch_size)))


def load_student(job: OnPolicyJob, hardware: Any, tokenizer: Any) -> Any:
    """The student with the LoRA layers of our own training, new or continued; its answers end as its template has
    it."""
    from tapir_local.data.special_tokens import find_turn_end
    from tapir_local.training.model import add_lora, linear_layer_names, load_adapter_weights, load_model

    settings = job.settings
    model = load_model(str(job.student), hardware, method="lora", max_length=0, seed=job.seed)
    lora = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    shape = {**lora, "bias": "none", "target_modules": linear_layer_names(model)}
    model = add_lora(model, shape, hardware, job.seed, checkpointing=False)
    if job.adapter_from:
        load_adapter_weights(model, job.adapter_from, shape)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    end = find_turn_end(tokenizer.get_added_vocab(), tokenizer.get_chat_template(), bos, eos)
    if end:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(end)
    return model


def distillation_arguments(job: OnPolicyJob, hardware: Any) -> dict[str, Any]:
    """The arguments of DistillationConfig except `output_dir`; what our own trainings set has the same value here."""
    from tapir_local.training.job import split_batch

    settings, gpu = job.settings, hardware.device == "cuda"
    micro, accumulation = split_batch(settings.batch_size, settings.micro_batch_size)
    return {
        "max_steps": math.ceil(job.tokens / settings.batch_size),  # never reached: an answer has a token at least
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": "adamw_torch_fused",
        "seed": job.seed,
        "data_seed": job.seed,
        "full_determinism": not gpu,
        "bf16": hardware.precision == "bf16",
        "fp16": hardware.precision == "f16",
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_completion_length": job.max_tokens,
        "beta": job.beta,
    }


def counting_trainer(budget: TokenBudget) -> Any:
    """TRL's trainer class, which also counts the tokens of its loss and takes its learning rate from the budget."""
    from torch.optim.lr_scheduler import LambdaLR
    from trl import DistillationTrainer

    class CountingTrainer(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Mapping[str, Any], *more: Any, **named: Any) -> Any:
            budget.add(int(inputs["completion_mask"].sum()))
            return super().compute_loss(model, inputs, *more, **named)

        lr_scheduler: Any

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if self.lr_scheduler is None:
                self.lr_scheduler = LambdaLR(optimizer or self.optimizer, budget.rate)
            return self.lr_scheduler

    return CountingTrainer


def stop_when_spent(budget: TokenBudget, log: list[dict[str, float]]) -> Any:
    """A callback that stops the training when the tokens are spent, and keeps and prints a line for each step."""
    from transformers import TrainerCallback

    class StopWhenSpent(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            budget.end_step()
            if budget.is_spent:
                control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
            if "loss" not in logs:
                return
            names = ("loss", "learning_rate", "completions/mean_length", "completions/clipped_ratio")
            log.append({"step": state.global_step, "tokens": budget.spent, **{name: logs[name] for name in names}})
            print(
                f"  step {state.global_step}, {budget.spent:,} of {budget.total:,} tokens: loss {logs['loss']:.3f}, "
                f"{logs['completions/mean_length']:.0f} tokens an answer",
                file=sys.stderr,
                flush=True,
            )

    return StopWhenSpent()
