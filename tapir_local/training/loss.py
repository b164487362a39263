"""Say how the loss of a training went, from means over many steps: the loss of one step says little."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import orjson

MEAN_STEPS = 20  # steps in a mean; fewer in a short training
CURVE_POINTS = 8
BARS = "▁▂▃▄▅▆▇█"


def describe_loss(losses: Sequence[float]) -> str:
    """`loss 2.18 -> 1.09 ▇▆▅▃▃▂▂▁`: the mean of the first and of the last steps, and the curve between them.

    A mean covers a third of the steps, 20 at most. With one step there is one number; without steps the text is empty.
    """
    if not losses:
        return ""
    steps = max(1, min(MEAN_STEPS, len(losses) // 3))
    first, last = fmean(losses[:steps]), fmean(losses[-steps:])
    if len(losses) < 2:
        return f"loss {last:.3g}"
    return f"loss {first:.3g} -> {last:.3g} {loss_curve(losses)}"


def loss_curve(losses: Sequence[float]) -> str:
    """At most eight bars, each the mean of as many steps, scaled from the lowest to the highest mean."""
    points = min(CURVE_POINTS, len(losses))
    cuts = [len(losses) * at // points for at in range(points + 1)]
    means = [fmean(losses[start:end]) for start, end in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def read_losses(log: Path) -> list[float]:
    """The loss of each step in a train_log.jsonl; [] if there is no log."""
    if not log.exists():
        return []
    lines = (orjson.loads(line) for line in log.read_bytes().splitlines())
    return [line["loss"] for line in lines if line.get("loss") is not None]
