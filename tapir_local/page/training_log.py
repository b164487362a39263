"""Section 3 of a report: loss, learning rate and speed of each round's training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

import orjson

from tapir_local.errors import TapirError
from tapir_local.memory import format_bytes
from tapir_local.page.draw import Spec, color_of_lines, draw_figure, inline_values
from tapir_local.page.parts import Cell, Figure, Grid, Paragraph, Part, Section, count_number
from tapir_local.pipeline.loop import last_round
from tapir_local.run_dir import RunDir
from tapir_local.training.loss import MEAN_STEPS, describe_loss

MAX_POINTS = 160  # points of a round in a chart: more cannot be told apart on a screen


@dataclass(frozen=True)
class TrainingRound:
    """The log of a round: one entry per step, and the last line, which has the totals."""

    number: int
    steps: Sequence[Mapping[str, Any]]
    totals: Mapping[str, Any]

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [step["loss"] for step in self.steps]

    @property
    def tokens(self) -> int:
        """Training tokens in all epochs."""
        return max((int(step.get("tokens", 0)) for step in self.steps), default=0)


def read_training_rounds(run: RunDir) -> list[TrainingRound]:
    """The rounds that have a log of training; TapirError if a line of one is not JSON."""
    found = []
    for number in range(last_round(run) + 1):
        path = run.round(number) / "adapter" / "train_log.jsonl"
        if not path.exists():
            continue
        try:
            lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        except orjson.JSONDecodeError as error:
            raise TapirError(f"not a log of training: {error}", where=str(path)) from error
        steps = [line for line in lines if line.get("loss") is not None]
        totals: Mapping[str, Any] = next((line for line in reversed(lines) if "step" not in line), {})
        if steps:
            found.append(TrainingRound(number, steps, totals))
    return found


def running_means(values: Sequence[float], steps: int = MEAN_STEPS) -> list[float]:
    """For each value the mean of it and the `steps` - 1 values before it, as far as there are any."""
    return [fmean(values[max(0, at - steps + 1) : at + 1]) for at in range(len(values))]


def training_section(run: RunDir) -> Section:
    """Section 3."""
    question = "Was each training healthy: does the loss fall, how fast did it run?"
    rounds = read_training_rounds(run)
    if not rounds:
        none = Paragraph("No round has a log of training yet.")
        return Section("training", "Training", question, (none,))
    points = loss_points(rounds)
    names = [f"round {row.number}" for row in rounds]
    parts: list[Part] = [loss_figure(points, names), rate_figure(points, names), training_grid(rounds)]
    return Section("training", "Training", question, parts)


def loss_points(rounds: Sequence[TrainingRound]) -> list[dict[str, Any]]:
    """Loss, running mean and learning rate against the tokens of all rounds so far, thinned out for a chart."""
    before = [0, *accumulate(row.tokens for row in rounds)]
    points = []
    for row, start in zip(rounds, before, strict=False):
        smooth, stride = running_means(row.losses), max(1, len(row.steps) // MAX_POINTS)
        for at in {*range(0, len(row.steps), stride), len(row.steps) - 1}:
            step = row.steps[at]
            points.append(
                {
                    "round": f"round {row.number}",
                    "tokens": start + step.get("tokens", 0),
                    "loss": step["loss"],
                    "mean": smooth[at],
                    "learning rate": step.get("learning_rate"),
                }
            )
    return sorted(points, key=lambda point: (point["tokens"], point["round"]))


def token_axis(narrow: bool) -> Spec:
    """The horizontal axis of the charts of training."""
    axis = {"title": "training tokens, all rounds", "format": ",d", "tickCount": 4 if narrow else 8, "grid": False}
    return {"field": "tokens", "type": "quantitative", "axis": axis}


def loss_figure(points: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """The loss of all rounds on one axis."""
    high = sorted(point["loss"] for point in points)[int(0.99 * (len(points) - 1))]
    top = 1.05 * max(high, max(point["mean"] for point in points))
    shown = [{**point, "loss": min(point["loss"], top)} for point in points]

    def make(narrow: bool) -> Spec:
        y = {
            "type": "quantitative",
            "axis": {"title": None, "tickCount": 5},
            "scale": {"domainMin": 0, "domainMax": top},
        }
        shared = {"x": token_axis(narrow), "color": color_of_lines("round", names, narrow)}
        raw = {"mark": {"type": "line", "strokeWidth": 1, "opacity": 0.3, "aria": False}, "encoding": {
            **shared, "y": {"field": "loss", **y}}}  # fmt: skip
        mean = {"mark": {"type": "line", "strokeWidth": 2.5, "aria": False}, "encoding": {
            **shared, "y": {"field": "mean", **y}}}  # fmt: skip
        return {"height": 220, "data": inline_values(shown), "layer": [raw, mean]}

    note = (
        f"Thick: mean of {MEAN_STEPS} steps; faint: single steps. The highest 1 % of the steps may be cut at the top."
    )
    return draw_figure("Training loss", make, note)


def rate_figure(points: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """The learning rate on the axis of the loss."""

    def make(narrow: bool) -> Spec:
        y = {"field": "learning rate", "type": "quantitative", "axis": {"title": None, "tickCount": 3, "format": "~g"}}
        color = {**color_of_lines("round", names, narrow), "legend": None}
        return {
            "height": 70,
            "data": inline_values(points),
            "mark": {"type": "line", "strokeWidth": 2, "aria": False},
            "encoding": {"x": token_axis(narrow), "y": y, "color": color},
        }

    return draw_figure("Learning rate", make)


def training_grid(rounds: Sequence[TrainingRound]) -> Grid:
    """A row for each round: steps, tokens, loss, speed, memory."""
    heads = ["round", "steps", "tokens", "loss (means, first to last)", "tokens per second", "seconds", "peak memory"]
    rows = []
    for row in rounds:
        seconds, memory = row.totals.get("seconds"), row.totals.get("peak_memory")
        rows.append(
            [
                Cell(str(row.number), row.number),
                count_number(len(row.steps)),
                count_number(row.tokens),
                Cell(describe_loss(row.losses).removeprefix("loss ").replace("->", "→")),
                count_number(round(row.tokens / seconds) if seconds else None),
                count_number(round(seconds) if seconds else None),
                Cell(format_bytes(memory) if memory else "-", memory),
            ]
        )
    return Grid(heads, rows)
