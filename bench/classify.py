"""Time and memory of labeling many rows with the classifier, compared with two simpler ways of batching.

    python bench/classify.py [--rows 52000] [--threads 2] [--model small]

The instructions are made of words of the pocket seeds, with lengths like Alpaca's: most have about 60 characters, four
in ten have an input, the longest have thousands. `small` is untrained here: its speed does not depend on its weights.
"""

import argparse
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tapir_local.data.dataset import require_seeds
from tapir_local.data.files import read_path
from tapir_local.recipe.schema import Classifier
from tapir_local.recipe.tasks import TASKS
from tapir_local.records import Example, Message
from tapir_local.resources import find_seeds
from tapir_local.training.classifier import (
    ClassifyJob,
    Prediction,
    classifier_text,
    load_classifier,
    pad_batch,
    predict_tasks,
    row_batches,
    seed_torch,
    tokenize_rows,
)


def main() -> None:
    """Measure each way and print one line for it; the first rows are read once beforehand as a warm-up."""
    options = arguments()
    torch.set_num_threads(options.threads)
    rows = alpaca_like(options.rows)
    settings = Classifier(model=options.model, max_length=options.max_length)
    job = ClassifyJob(Path(), Path(), tuple(TASKS), settings, 1, Path())
    seed_torch(1)
    model, tokenizer = load_classifier(job, [classifier_text(row, job) for row in rows])
    letters = sorted(len(row.prompt[0].content) for row in rows)
    print(f"{len(rows):,} rows; letters: median {letters[len(rows) // 2]}, longest {letters[-1]:,}")
    predict_tasks(model, tokenizer, rows[:500], job)
    ways: dict[str, tuple[Callable[..., list[Prediction]], int]] = {
        "by tokens, 2,048 at once": (predict_tasks, 1),
        "by letters, 64 rows at once": (by_letters, 1),
        "as they come, 64 rows, a tenth": (as_they_come, 10),
    }
    for name, (way, part) in ways.items():
        began = time.monotonic()
        found = way(model, tokenizer, rows[: len(rows) // part], job)
        took = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{name:32} {took:7.1f} s  {len(found) / took:8,.0f} rows/s  peak so far {peak:.2f} GB", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="small")
    parser.add_argument("--max-length", type=int, default=256)
    return parser.parse_args()


def alpaca_like(number: int) -> list[Example]:
    """Rows of words in random order; lengths in words are lognormal, and longer for rows with an input."""
    chance, pocket = random.Random(1), find_seeds("pocket")
    assert pocket
    seeds, _ = require_seeds(read_path(pocket), TASKS)
    words = sorted({word for row in seeds for word in row.prompt[0].content.split()})
    rows = []
    for n in range(number):
        count = chance.lognormvariate(2.3, 0.4) + (chance.random() < 0.4) * chance.lognormvariate(2.6, 1.0)
        text = " ".join(chance.choices(words, k=max(2, round(count))))
        rows.append(Example(str(n), (Message("user", text),)))
    return rows


def by_letters(model: Any, tokenizer: Any, rows: list[Example], job: ClassifyJob) -> list[Prediction]:
    """Rows of similar length in characters together."""
    order = sorted(rows, key=lambda row: len(row.prompt[0].content))
    return list(read(model, tokenizer, order, job))


def as_they_come(model: Any, tokenizer: Any, rows: list[Example], job: ClassifyJob) -> list[Prediction]:
    """Rows in the order of the file."""
    return list(read(model, tokenizer, rows, job))


def read(model: Any, tokenizer: Any, rows: list[Example], job: ClassifyJob) -> Iterator[Prediction]:
    """Sixty-four rows at a time, padded to the longest of them."""
    with torch.inference_mode():
        for batch in row_batches(rows, 64):
            inputs = pad_batch(tokenizer, tokenize_rows(tokenizer, batch, job), model.device)
            sure, best = model(**inputs).logits.float().softmax(-1).max(-1)
            for row, label, probability in zip(batch, best.tolist(), sure.tolist(), strict=True):
                yield Prediction(row.id, job.labels[label], round(probability, 6))


if __name__ == "__main__":
    main()
