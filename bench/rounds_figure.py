"""Draw a run's accuracy and win rate by round, with 95 % intervals, as docs/rounds.svg.

Input is what `tapir-local status RUN --json` prints. Needs matplotlib: pip install -e '.[bench]'.

    tapir-local status quickstart --json > status.json
    python bench/rounds_figure.py status.json --title "Pocket world, random_seed 1"

The first point is the untrained student, if the run has measured it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Point = tuple[str, float, tuple[float, float]]  # label of the round, share, 95 % interval


def points(status: dict[str, Any], name: str) -> list[Point]:
    """A metric of the untrained student and of every round that has it."""
    rows = [
        ("untrained", status.get("untrained")),
        *((label(row["number"]), row["metrics"]) for row in status["rounds"]),
    ]
    return [
        (place, metrics[name], tuple(metrics[f"{name}_interval"]))
        for place, metrics in rows
        if metrics and metrics.get(name) is not None and metrics.get(f"{name}_interval")
    ]


def label(number: int) -> str:
    """The name of a round on the axis."""
    return f"round {number}" if number else "round 0\nplain fine-tuning"


def draw(series: dict[str, Sequence[Point]], title: str, out: Path) -> None:
    """One line per metric, each point with its interval; the same input gives the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "tapir-local", "font.size": 10})
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    labels = max(([point[0] for point in row] for row in series.values()), key=len)
    for number, (name, row) in enumerate(series.items()):
        places = [labels.index(point[0]) + 0.06 * number for point in row]
        values = [100 * point[1] for point in row]
        spread = [
            [100 * (point[1] - point[2][0]) for point in row],
            [100 * (point[2][1] - point[1]) for point in row],
        ]
        axes.errorbar(places, values, spread, marker="os"[number % 2], capsize=4, linewidth=2, label=name)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(0, 100)
    axes.set_ylabel("percent of held-out rows")
    axes.grid(axis="y", alpha=0.3)
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, loc="upper left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("status", type=Path, help="output of `tapir-local status RUN --json`")
    parser.add_argument("--title", default="", help="what was run, and when")
    parser.add_argument("--out", type=Path, default=Path("docs/rounds.svg"), help="default: docs/rounds.svg")
    words = parser.parse_args()
    status = json.loads(words.status.read_bytes())
    names = {"accuracy": "accuracy", "win rate against the teacher's plain answers": "win_rate"}
    found = {title: points(status, name) for title, name in names.items()}
    draw({name: row for name, row in found.items() if row}, words.title or status["run"], words.out)


if __name__ == "__main__":
    main()
