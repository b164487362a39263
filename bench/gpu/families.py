"""Does training run on this GPU, for each family and method? All trainings are in one process, to save time.

    python bench/gpu/families.py train trl|unsloth STUDENTS OUT.jsonl NAME ... [--rows 48] [--length 512]
    python bench/gpu/families.py summary OUT.jsonl ...

`train` trains the named students in the folder STUDENTS; `summary` compares the backends.
Each training is a line of OUT.jsonl: losses, tokens, peak memory, or the error. The summary prints both backends side
by side, and OK or FAULTS with what is wrong: a failure, no tokens counted, no gradient, target modules that are not a
list, or first losses that differ by more than 3 %.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
BASE: dict[str, Any] = {"epochs": 1, "learning_rate": 2e-4, "batch_size": 8, "micro_batch_size": 4}


class Cut(Exception):
    """Ends a training in the middle, as a person would."""


def train_all(asked: argparse.Namespace) -> None:
    """Every training; `full` comes last, because Unsloth then takes every later model for one of `full`."""
    os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", "/tmp/tapir-unsloth-compiled")
    began, backend, names = time.monotonic(), asked.backend, asked.names
    if backend == "unsloth":  # before transformers, trl and peft
        import unsloth  # noqa: F401
    print(f"{backend} imported {time.monotonic() - began:.1f} s", flush=True)
    bench = Trial(asked)
    first, second = names[0], names[min(1, len(names) - 1)]
    adapter = bench.train("lora", first, method="lora")
    bench.train("again", first, before=adapter, method="lora")
    bench.train("cut", first, cut=3, method="lora")
    bench.train("lora", second, method="lora")
    bench.train("recompute", second, method="lora", gradient_checkpointing=True)
    bench.train("dropout", second, method="lora", lora_dropout=0.05)
    bench.train("qlora", second, method="qlora")
    bench.train("f16", second, method="lora", precision="f16")
    for name in names[2:]:
        bench.train("lora", name, method="lora")
    whole = bench.train("full", first, method="full", learning_rate=2e-5)
    bench.train("full again", first, before=whole, method="full", learning_rate=2e-5)


class Trial:
    """Trainings with one backend, whose lines are added to the file `out`."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.backend, self.students, self.out = asked.backend, asked.students, asked.out
        self.rows, self.length = asked.rows, asked.length
        self.work = Path(tempfile.mkdtemp(prefix=f"families-{asked.backend}-"))

    def train(self, title: str, name: str, *, before: Path | None = None, cut: int = 0, **settings: Any) -> Path:
        """Train one student and write its line; the folder of the result. With `cut`, it is cut and resumed there."""
        import torch
        from gpu_train import make_rows

        from tapir_local.recipe.schema import Train
        from tapir_local.training.job import TrainJob
        from tapir_local.training.train import train_student

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began, said = time.monotonic(), {"backend": self.backend, "what": title, "name": name}
        folder = self.work / f"{title}-{name}"
        chosen = Train(**{"backend": self.backend, "checkpoint_minutes": 0, **BASE, **settings})
        try:
            rows = make_rows(self.work / f"{name}.jsonl", self.rows, self.length, self.students / name)
            job = TrainJob(str(self.students / name), rows, folder / "adapter", chosen, self.length, 1, before)
            if cut:
                job = replace(job, settings=chosen.model_copy(update={"checkpoint_minutes": 1e-4}))
                said["checkpoints"] = self.cut(job, cut, folder / "train")
                train_student(job, folder=folder / "train")
            else:
                train_student(job)
            said |= read_result(job.out)
        except BaseException as error:  # noqa: BLE001
            said |= {"failed": f"{type(error).__name__}: {error}"[:400], "trace": traceback.format_exc()[-2500:]}
        said["seconds"] = round(time.monotonic() - began, 1)
        with self.out.open("a") as file:
            file.write(json.dumps(said) + "\n")
        print({key: value for key, value in said.items() if key != "trace"}, flush=True)
        return folder / "adapter"

    def cut(self, job: Any, step: int, folder: Path) -> list[str]:
        """End the training after a step; the names of the checkpoints that it leaves."""
        from tapir_local.training.train import train_student

        folder.mkdir(parents=True, exist_ok=True)

        def stop(done: int, total: int, note: str) -> None:
            if done == step and total:
                raise Cut

        try:
            train_student(job, stop, folder)
        except Cut:
            return sorted(path.name for path in folder.iterdir())
        raise RuntimeError("the training was not cut")


def read_result(out: Path) -> dict[str, Any]:
    """What a training left: losses, tokens, memory, precision, and the modules of its adapter."""
    *steps, end = map(json.loads, (out / "train_log.jsonl").read_text().splitlines())
    config, resolved = out / "adapter_config.json", json.loads((out / "resolved.json").read_text())
    return {
        "device": resolved["device"],
        "precision": resolved["precision"],
        "used": resolved["backend"],
        "losses": [round(step["loss"], 4) for step in steps],
        "tokens": steps[-1]["tokens"],
        "grad_norm": steps[-1]["grad_norm"],
        "peak_gib": round(end["peak_memory"] / 2**30, 2),
        "targets": json.loads(config.read_text())["target_modules"] if config.exists() else "full",
    }


def summarize(files: list[Path]) -> None:
    """Print both backends side by side, and what is wrong."""
    rows = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    known, wrong = dict[tuple[str, str], dict[str, Any]](), list[str]()
    for row in rows:
        known.setdefault((row["what"], row["name"]), {})[row["backend"]] = row
    for (what, name), both in known.items():
        cells = [describe(both.get(backend), backend, wrong) for backend in ("trl", "unsloth")]
        print(f"{what:10} {name:16} | {' | '.join(cells)}")
        first = [both[backend]["losses"][0] for backend in both if "losses" in both[backend]]
        if len(first) == 2 and abs(first[0] - first[1]) > 0.03 * first[0]:
            wrong.append(f"{what} {name}: first losses {first[0]} and {first[1]}")
    if len({row["backend"] for row in rows}) < 2:
        wrong.append("one backend trained nothing")
    print("FAULTS" if wrong else "OK", wrong)


def describe(row: dict[str, Any] | None, backend: str, wrong: list[str]) -> str:
    """A training in a few words; what is wrong with it is added to `wrong`."""
    if row is None:
        return f"{backend} -"
    if "failed" in row:
        wrong.append(f"{row['what']} {row['name']} {backend}: failed")
        return f"{backend} FAILED {row['failed'][:90]}"
    text = isinstance(row["targets"], str) and row["targets"] != "full"
    if row["grad_norm"] is None or not row["tokens"] or text or row["used"] != backend:
        wrong.append(f"{row['what']} {row['name']} {backend}: gradient, tokens, target modules or backend")
    losses = f"{row['losses'][0]} to {row['losses'][-1]}"
    return f"{backend} {losses}, {row['peak_gib']} GiB, {row['seconds']} s, {row['tokens']} tokens"


def main() -> None:
    """Train, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    train, summary = tasks.add_parser("train"), tasks.add_parser("summary")
    train.add_argument("backend", choices=("trl", "unsloth"))
    train.add_argument("students", type=Path)
    train.add_argument("out", type=Path)
    train.add_argument("names", nargs="+")
    train.add_argument("--rows", type=int, default=48)
    train.add_argument("--length", type=int, default=512, help="tokens of a row at the most")
    summary.add_argument("files", nargs="+", type=Path)
    asked = parser.parse_args()
    if asked.task == "train":
        train_all(asked)
    else:
        summarize(asked.files)


if __name__ == "__main__":
    main()
