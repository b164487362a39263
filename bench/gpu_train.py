"""Unsloth compared with plain TRL and PEFT on one GPU: same student, rows, rank and length, for each method.

    python bench/gpu_train.py --hidden 2048 --layers 16 --rows 512 --length 1024 [--methods lora qlora full]
                              [--backends trl unsloth] [--twice on|off|auto]
    python bench/gpu_train.py --plan FOLDER:lora OTHER:qlora:unsloth [--deadline SECONDS] [--logs FOLDER]

Without --plan, one random Llama is made and trained by every method and backend. --plan names students of their own,
such as those of bench/random_student.py, each with a method, and with a backend if only one is wanted.

Prints a line of JSON for each: tokens/s after the first third of the steps (in which Unsloth compiles), peak memory of
the GPU, and the loss of every step. The losses of one method should be close, because weights, rows, their order and
every setting are the same. A failed case says why in its line, and the next one is tried. Without Unsloth the
`unsloth` lines say that it is not installed. After --deadline (seconds since 1970) no case starts.
"""

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.files import write_rows
from tapir_local.recipe.schema import Train
from tapir_local.records import Example, Message
from tapir_local.training.job import TrainJob
from tapir_local.training.model import load_tokenizer
from tapir_local.training.train import run_training

METHODS, BACKENDS = ("lora", "qlora", "full"), ("trl", "unsloth")

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYLLABLES = [first + last for first in "bdfgklmnprstvz" for last in "aeiou"]


def words(number: int, chance: random.Random) -> str:
    """Made-up words."""
    return " ".join("".join(chance.choices(SYLLABLES, k=chance.randint(1, 3))) for _ in range(number))


def make_student(folder: Path, hidden: int, layers: int) -> None:
    """A Llama with random weights in bf16, a vocabulary of 32,000 of which the tokenizer knows 4,000."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special, initial_alphabet=alphabet)
    chance = random.Random("tokenizer")
    tokenizer.train_from_iterator((words(100, chance) for _ in range(2000)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[2])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 11 // 4 // 256) * 256,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make_rows(path: Path, rows: int, length: int, student: Path) -> Path:
    """Rows of about nine tenths of `length` tokens by the student's tokenizer, a fifth of them in the prompt.

    Answers repeat a made-up sentence, so that there is something to learn.
    """
    tokenizer, chance = load_tokenizer(student), random.Random("rows")
    saying, sample = words(20, chance), words(400, chance)
    number = int(0.85 * length * 400 / len(tokenizer(sample)["input_ids"]))  # of words; a chat template takes the rest
    answer = " ".join([saying] * max(1, number * 4 // 5 // 20))
    prompts = (words(number // 5, chance) for _ in range(rows))
    write_rows(path, (Example(str(n), (Message("user", prompt),), answer) for n, prompt in enumerate(prompts)))
    return path


def measure(job: TrainJob, folder: Path) -> dict[str, object]:
    """Train in a process of its own and read its log."""
    name = f"{job.settings.method} {job.settings.backend}"
    run_training(
        job, folder, lambda done, total, note: print(f"\r{name} {done}/{total} {note}", end="", file=sys.stderr)
    )
    *steps, end = map(json.loads, (job.out / "train_log.jsonl").read_text().splitlines())
    if len(steps) < 5:
        sys.exit(f"error: {len(steps)} steps are too few to measure; give more --rows or a smaller --batch")
    warm = steps[len(steps) // 3]
    speed = (steps[-1]["tokens"] - warm["tokens"]) / (steps[-1]["seconds"] - warm["seconds"])
    resolved = json.loads((job.out / "resolved.json").read_text())
    return {
        "precision": resolved["precision"],
        "rows_at_once": resolved["micro_batch_size"]["used"],
        "gradient_checkpointing": resolved["sft"]["gradient_checkpointing"],
        "tokens_per_second": round(speed),
        "peak_gib": round(end["peak_memory"] / 2**30, 2),
        "reserved_gib": round(end.get("peak_reserved", 0) / 2**30, 2),
        "to_first_step": round(steps[0]["seconds"], 1),
        "seconds": round(end["seconds"], 1),
        "losses": [round(step["loss"], 4) for step in steps],
        "versions": resolved["versions"],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hidden", 2048),
        ("layers", 16),
        ("rows", 512),
        ("length", 1024),
        ("rank", 16),
        ("batch", 16),
        ("micro", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--twice", choices=("on", "off", "auto"), default="auto", help="gradient checkpointing")
    parser.add_argument("--plan", nargs="+", metavar="STUDENT:METHOD[:BACKEND]", help="trainings of students' folders")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds since 1970")
    parser.add_argument("--logs", type=Path, help="a folder for the logs of the trainings")
    return parser.parse_args()


def settings(asked: argparse.Namespace, method: str, backend: str) -> Train:
    """The `train` section; `full` trains at a tenth of LoRA's learning rate."""
    return Train(
        method=method,
        backend=backend,
        epochs=1,
        learning_rate=2e-5 if method == "full" else 2e-4,
        batch_size=asked.batch,
        micro_batch_size=asked.micro,
        lora_rank=asked.rank,
        gradient_checkpointing={"on": True, "off": False}.get(asked.twice, "auto"),
        checkpoint_minutes=0,
    )


def planned(asked: argparse.Namespace, here: Path) -> list[tuple[Path, str, str]]:
    """The trainings: a student's folder, a method and a backend each. Makes the random Llama if there is no plan."""
    if not asked.plan:
        make_student(here / "student", asked.hidden, asked.layers)
        return [(here / "student", *one) for one in itertools.product(asked.methods, asked.backends)]
    found = list[tuple[Path, str, str]]()
    for words in asked.plan:
        student, method, *only = words.split(":")
        found += [(Path(student), method, backend) for backend in only or asked.backends]
    return found


def train_one(asked: argparse.Namespace, folder: Path, student: Path, by: tuple[str, str]) -> dict[str, object]:
    """One training in a process of its own, and what was measured or why it failed."""
    if time.time() > asked.deadline:
        return {"left_out": "no time"}
    rows = make_rows(folder.parent / f"{student.name}.jsonl", asked.rows, asked.length, student)
    job = TrainJob(str(student), rows, folder / "adapter", settings(asked, *by), asked.length, 1)
    began = time.monotonic()
    try:
        found = measure(job, folder)
    except TapirError as error:
        found = {"failed": error.what}
    if asked.logs and (folder / "train.log").exists():
        shutil.copy(folder / "train.log", asked.logs / f"{folder.name}.log")
    shutil.rmtree(folder, ignore_errors=True)  # full fine-tuning leaves a whole model
    return {**found, "process_seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        for student, method, backend in planned(asked, here):
            folder = here / f"{student.name}-{method}-{backend}"
            found = train_one(asked, folder, student, (method, backend))
            versions = found.pop("versions", None)
            print(json.dumps({"student": student.name, "method": method, "backend": backend, **found}), flush=True)
            if versions:
                print(f"  {versions}", file=sys.stderr)


if __name__ == "__main__":
    main()
