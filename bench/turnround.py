"""Time from the end of a round's training to the first answer of the next, with adapters and with merged models.

    python bench/turnround.py [MODEL_DIR] [--quant q8_0] [--rank 16] [--repeat 3] [--prompts 64] [--max-tokens 64]

Without MODEL_DIR the pocket student is used; others are made by bench/random_student.py. A random adapter on all linear
layers is made here. Both ways use the functions of a run and take turns: export and gate, each in a process of its own,
then the student is opened and writes one answer. What a run does in between (answers to the holdout, calls to the
teacher) is the same in both and left out. The output has median seconds; making and checking the base GGUF happens once
beforehand and is printed separately. It also has the other costs: tokens per second for `prompts` answers at once, disk
space per round, and the time to ship the last round's student as one file.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tapir_local.export.base import run_base_gguf
from tapir_local.files import remove_path, write_rows
from tapir_local.memory import format_bytes
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override, parse_recipe
from tapir_local.records import Completion, Example, Message, noop
from tapir_local.resources import POCKET_STUDENT
from tapir_local.run_dir import RunDir
from tapir_local.stages.backends import export_backend, gate_backend, generate_backend, ship_backend

WAYS = ("merged", "adapter")
TURN = ("export", "gate", "first answer")


def main() -> None:
    """Measure both ways in turns, and print a table."""
    asked = arguments()
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        runs = {way: begun(asked, way, Path(scratch)) for way in WAYS}
        with timed() as base:
            run_base_gguf(*runs["adapter"], renew=True)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(asked.repeat):
            for way in WAYS:
                found[way].append(turn(*runs[way], asked))
                print(f"turn {number + 1}, {way}: {told(found[way][-1])}", file=sys.stderr)
        kept = {way: (runs[way][1].round(1) / "student.gguf").stat().st_size for way in WAYS}
        shipped = {way: ship(*runs[way]) for way in WAYS}
    print(f"{asked.model.name}, {asked.quant}, rank {asked.rank}; medians of {asked.repeat}, seconds\n")
    print_table(found, kept, shipped)
    print(f"\nThe base's GGUF, made and gated once: {base[0]:.1f} s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=POCKET_STUDENT)
    parser.add_argument("--quant", default="q8_0")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="folder for temporary files")
    return parser.parse_args()


def begun(asked: argparse.Namespace, way: str, scratch: Path) -> tuple[Recipe, RunDir]:
    """A run with a trained adapter in round 1: as much of it as the export and the gate read."""
    recipe = override(
        parse_recipe("teacher: pocket", "bench"),
        {
            "name": way,
            "student.path": str(asked.model),
            "student.max_tokens": asked.max_tokens,
            "student.max_length": 512,
            "export.rounds": way,
            "export.quant": asked.quant,
            "export.min_agreement": 0.0,  # random weights: greedy choices are near ties
        },
    )
    run = RunDir(scratch / way, way)
    make_adapter(asked.model, run.round(1) / "adapter", asked.rank)
    prompts = ((Message("user", f"What is {n} times {n * 7 % 13}? List the words."),) for n in range(asked.prompts))
    write_rows(run.round(1) / "train.jsonl", [Example(str(n), prompt) for n, prompt in enumerate(prompts)])
    return recipe, run


def make_adapter(model: Path, out: Path, rank: int) -> None:
    """Small random A and B for every linear layer, from the shapes only: the model need not fit in memory."""
    import json

    import torch
    from safetensors.torch import save_file

    from tapir_local.training.model_files import read_model_tensors

    torch.manual_seed(1)
    names = {name: source.shape for name, source in read_model_tensors(model).items() if name.endswith("_proj.weight")}
    tensors = {}
    for name, (rows, columns) in names.items():
        place = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{place}.lora_A.weight"] = torch.randn(rank, columns) / columns**0.5
        tensors[f"{place}.lora_B.weight"] = torch.randn(rows, rank) * 0.002
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({name.split(".")[-2] for name in names})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": modules,
        "base_model_name_or_path": str(model),
        "bias": "none",
    }
    (out / "adapter_config.json").write_text(json.dumps(settings))


def unkept(answer: Completion) -> None:
    """Ignore each answer; all are returned at the end."""


def turn(recipe: Recipe, run: RunDir, asked: argparse.Namespace) -> dict[str, float]:
    """Seconds of one turn by part, and the tokens per second of its student."""
    folder = run.round(1)
    adapter, gguf, rows, report = (folder / name for name in ("adapter", "student.gguf", "train.jsonl", "gate.json"))
    remove_path(gguf)
    export = partial(export_backend(recipe, run), adapter=adapter, out=gguf, progress=noop)
    gate = partial(gate_backend(recipe, run), adapter=adapter, gguf=gguf, rows=rows, out=report, progress=noop)
    found = {"export": seconds(export), "gate": seconds(gate)}
    write = partial(generate_backend(recipe, run), gguf=gguf, progress=noop, on_result=unkept)
    prompts = [(Message("user", f"What is {n} times {n * 7 % 13}? List the words."),) for n in range(asked.prompts)]
    found["first answer"] = seconds(lambda: write(prompts=prompts[:1], ids=["0"]))
    with timed() as taken:
        answers = write(prompts=prompts, ids=[str(n) for n in range(len(prompts))])
    return {**found, "all": sum(found.values()), "tokens/s": sum(row.tokens for row in answers) / taken[0]}


def ship(recipe: Recipe, run: RunDir) -> float:
    """Seconds until the last round's student is one file, including its gate if it had to be merged."""
    out = run.path / "out"
    out.mkdir()
    return seconds(lambda: ship_backend(recipe, run)(student=run.round(1), out=out, progress=noop))


@contextmanager
def timed() -> Iterator[list[float]]:
    """A list that gets the seconds at the end."""
    taken, began = [0.0], time.perf_counter()
    yield taken
    taken[0] = time.perf_counter() - began


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that a function takes."""
    with timed() as taken:
        work()
    return taken[0]


def told(found: dict[str, float]) -> str:
    """One turn as a line of text."""
    return ", ".join(f"{name} {value:.2f}" for name, value in found.items())


def print_table(found: dict[str, list[dict[str, float]]], kept: dict[str, int], shipped: dict[str, float]) -> None:
    """Print a table: a row per part, a column per way."""
    print("| | " + " | ".join(WAYS) + " |\n|---|---|---|")
    for name in (*TURN, "all", "tokens/s"):
        middle = {way: statistics.median(turn[name] for turn in found[way]) for way in WAYS}
        shown = (
            f"answers at once, {name}"
            if name == "tokens/s"
            else "first answer after training"
            if name == "all"
            else name
        )
        print(f"| {shown} | " + " | ".join(f"{middle[way]:,.2f}" for way in WAYS) + " |")
    print("| kept by a round | " + " | ".join(format_bytes(kept[way]) for way in WAYS) + " |")
    print("| shipping, at the end | " + " | ".join(f"{shipped[way]:,.2f}" for way in WAYS) + " |")


if __name__ == "__main__":
    main()
