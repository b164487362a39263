"""Draw a run's accuracy and win rate by round, with 95 % intervals, as docs/rounds.svg.

Input is what `tapir-local status RUN --json` prints. Needs matplotlib: pip install -e '.[bench]'.

    tapir-local status quickstart --json > status.json
    python bench/rounds_figure.py status.json --run cache/runs/quickstart --title "Pocket world, random_seed 1"

With --run the untrained student is measured too: its base GGUF (`cache/base`, made if it is missing) answers the run's
holdout with the settings that the run used for its own students, and the run's checker counts the right answers. The
judge is not asked, so there is no win rate for it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Point = tuple[str, float, tuple[float, float]]  # label of the round, share, 95 % interval


def points(status: dict[str, Any], name: str) -> list[Point]:
    """A metric of every round that has it."""
    found = []
    for row in status["rounds"]:
        metrics = row["metrics"] or {}
        if metrics.get(name) is not None and metrics.get(f"{name}_interval"):
            found.append((label(row["number"]), metrics[name], tuple(metrics[f"{name}_interval"])))
    return found


def label(number: int) -> str:
    """The name of a round on the axis."""
    return f"round {number}" if number else "round 0\nplain fine-tuning"


def untrained(folder: Path) -> Point:
    """Accuracy of the run's untrained student on its holdout, with Wilson's interval."""
    from tapir_local.export.base import base_gguf
    from tapir_local.files import read_rows
    from tapir_local.inference.generate import generate
    from tapir_local.method.metrics import wilson_interval
    from tapir_local.pipeline.loop import kept_recipe
    from tapir_local.records import Example
    from tapir_local.run_dir import RunDir
    from tapir_local.stages.backends import recipe_checker

    run = RunDir(folder.parent.parent, folder.name)
    recipe, rows = kept_recipe(run), read_rows(Example, folder / "holdout.jsonl")
    check, student = recipe_checker(recipe), recipe.student
    if check is None:
        raise SystemExit(f"{folder}: the recipe names no checker, so accuracy cannot be measured")
    parallel = None if student.parallel == "auto" else student.parallel
    answers = generate(
        base_gguf(recipe, run),
        [row.prompt for row in rows],
        ids=[row.id for row in rows],
        max_tokens=student.max_tokens,
        context=student.max_length,
        parallel=parallel,
        seed=recipe.random_seed,
    )
    verdicts = [check(row, answer.text) for row, answer in zip(rows, answers, strict=True)]
    right = [verdict for verdict in verdicts if verdict is not None]
    interval = wilson_interval(right)
    if interval is None:
        raise SystemExit(f"{folder}: the checker could not check any answer")
    print(f"untrained: {sum(right)} of {len(right)} right, 95 % interval {interval[0]:.1%} to {interval[1]:.1%}")
    return "untrained", sum(right) / len(right), (interval[0], interval[1])


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
    parser.add_argument("--run", type=Path, help="the run's folder: measure its untrained student too")
    parser.add_argument("--title", default="", help="what was run, and when")
    parser.add_argument("--out", type=Path, default=Path("docs/rounds.svg"), help="default: docs/rounds.svg")
    words = parser.parse_args()
    status = json.loads(words.status.read_bytes())
    accuracy = points(status, "accuracy")
    if words.run:
        accuracy.insert(0, untrained(words.run))
    found = {"accuracy": accuracy, "win rate against the teacher's plain answers": points(status, "win_rate")}
    draw({name: row for name, row in found.items() if row}, words.title or status["run"], words.out)


if __name__ == "__main__":
    main()
