"""Export of a model with LoRA to q8_0: tapir-local compared with PEFT's merge plus llama.cpp's converter.

    python bench/export.py MODEL_DIR --converter LLAMA_CPP/convert_hf_to_gguf.py [--repeat 3] [--rank 16]

MODEL_DIR is made by bench/random_student.py; a random adapter on all linear layers is made here. The rival is what
people do by hand: load the base in bf16 and the adapter, merge, save, and convert to q8_0 with the converter in the
llama.cpp sources of llama-cpp-python's sdist (its check of known tokenizers is disabled, because it refuses homemade
tokenizers). Both run in processes of their own and take turns. The output has medians of the wall time, the largest
resident memory of a process (mapped files count), and the bytes written in addition to the GGUF. The gate is not part
of either. Finally both files are compared: weights of a sample of tensors, and their largest difference relative to
the largest weight.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model, adapter, out = sys.argv[1:]
merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), adapter)
merged.merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(model).save_pretrained(out)
"""
CONVERT = """
import runpy, sys
converter, merged, out, splitting = sys.argv[1:]
sys.path.insert(0, converter.rpartition("/")[0] + "/gguf-py")
sys.path.insert(0, converter.rpartition("/")[0])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: splitting
sys.argv = [converter, merged, "--outfile", out, "--outtype", "q8_0"]
runpy.run_path(converter, run_name="__main__")
"""


@dataclass(frozen=True)
class Taken:
    """One export: seconds, bytes of its largest process, bytes on disk in addition to the GGUF."""

    seconds: float
    memory: int
    beside: int


def main() -> None:
    """Measure both in turns, then compare their files."""
    asked = arguments()
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        here = Path(scratch)
        adapter = here / "adapter"
        # In a process of its own: the memory of this process would be counted for the children that it forks.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_adapter, args=(asked.model, adapter, asked.rank)
        )
        maker.start()
        maker.join()
        ways = {"tapir-local": ours, "merge + convert": by_hand}
        found: dict[str, list[Taken]] = {name: [] for name in ways}
        for _ in range(asked.repeat):
            for name, way in ways.items():
                shutil.rmtree(here / name, ignore_errors=True)
                found[name].append(measured(way(asked, adapter, here / name), here / name))
                print(f"{name:16s} {found[name][-1].seconds:7.1f} s", file=sys.stderr)
        tell(found)
        print(compare(*(here / name / "out.gguf" for name in ways)))
    print(", ".join(f"{name} {version(name)}" for name in ("gguf", "transformers", "peft", "torch", "numpy")))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--splitting", default="qwen2", help="llama.cpp's name for the tokenizer's splitting")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder to write to; needs space for three copies of the model")
    return parser.parse_args()


def make_adapter(model_dir: Path, out: Path, rank: int) -> None:
    """A LoRA with random weights on every linear layer except the head, in PEFT's format; the base is not loaded."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    head, chance, tensors = model.get_output_embeddings(), torch.Generator().manual_seed(1), {}
    linear = {n: p for n, p in model.named_modules() if isinstance(p, torch.nn.Linear) and p is not head}
    for name, layer in linear.items():
        for letter, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
            drawn = torch.empty(shape).normal_(0, 0.01, generator=chance)
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = drawn
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in linear})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    settings |= {"target_modules": targets, "base_model_name_or_path": str(model_dir), "bias": "none"}
    (out / "adapter_config.json").write_text(json.dumps(settings))


def ours(asked: argparse.Namespace, adapter: Path, folder: Path) -> list[list[str]]:
    """The command that a person types."""
    command = [sys.executable, "-m", "cli", "export", str(asked.model), str(folder / "out.gguf")]
    return [[*command, "--adapter", str(adapter), "--no-gate"]]


def by_hand(asked: argparse.Namespace, adapter: Path, folder: Path) -> list[list[str]]:
    """Two commands; the merged model is written to disk between them."""
    merged = str(folder / "merged")
    merge = [sys.executable, "-c", MERGE, str(asked.model), str(adapter), merged]
    convert = [str(asked.converter.resolve()), merged, str(folder / "out.gguf"), asked.splitting]
    return [merge, [sys.executable, "-c", CONVERT, *convert]]


def measured(commands: list[list[str]], folder: Path) -> Taken:
    """Run the commands one after another."""
    folder.mkdir()
    done, most = threading.Event(), [0]
    watcher = threading.Thread(target=watch, args=(folder, done, most))
    watcher.start()
    started, memory = time.monotonic(), 0
    for command in commands:
        memory = max(memory, run(command, folder / "log"))
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    return Taken(seconds, memory, most[0])


def run(command: list[str], log: Path) -> int:
    """Run one command and return the peak memory of its largest process, in bytes."""
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    with log.open("ab") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"error: {command[:4]} failed: {log.read_text()[-2000:]}")
    assert isinstance(usage, resource.struct_rusage)
    return usage.ru_maxrss * 1024


def watch(folder: Path, done: threading.Event, most: list[int]) -> None:
    """Record the peak of bytes on disk in addition to the GGUF."""
    while not done.wait(0.2):
        most[0] = max(most[0], sum(beside(folder)))


def beside(folder: Path) -> Iterator[int]:
    """Sizes of all files except the GGUF, its partial file and the log."""
    for file in folder.rglob("*"):
        if file.is_file() and ".gguf" not in file.name and file.name != "log":
            yield file.stat().st_size


def tell(found: dict[str, list[Taken]]) -> None:
    """Print medians and their ratio, ours to the rival's."""
    rows = {}
    for name, all_taken in found.items():
        seconds = statistics.median(taken.seconds for taken in all_taken)
        memory, besides = (max(getattr(taken, key) for taken in all_taken) / 1e9 for key in ("memory", "beside"))
        rows[name] = (seconds, memory)
        each = " ".join(f"{taken.seconds:.1f}" for taken in all_taken)
        print(f"{name:16s} {seconds:7.1f} s  {memory:6.2f} GB of memory  {besides:6.2f} GB beside the GGUF  ({each})")
    (a, b), (c, d) = rows.values()
    print(f"{'ratio':16s} {a / c:7.2f}    {b / d:6.2f}")


def compare(one: Path, other: Path) -> str:
    """Names, types and weights of both files."""
    from gguf import GGUFReader

    tensors = [{tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (one, other)]
    same = tensors[0].keys() == tensors[1].keys()
    types = sum(tensors[0][name].tensor_type != tensors[1][name].tensor_type for name in tensors[0] if same)
    largest = max(difference(tensors[0][name], tensors[1][name]) for name in list(tensors[0])[::7]) if same else 1
    return f"the same tensors: {same}; of other types: {types}; largest difference {largest:.2%} of a tensor's maximum"


def difference(one: Any, other: Any) -> float:
    """The largest difference between the first 4,096 rows of two tensors, relative to the largest weight."""
    import numpy as np
    from gguf.quants import dequantize

    a, b = (dequantize(tensor.data[:4096], tensor.tensor_type) for tensor in (one, other))
    return float(np.abs(a - b).max() / np.abs(b).max())


if __name__ == "__main__":
    main()
