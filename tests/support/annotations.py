"""Annotations in alpaca_eval's format, made by a rule with noise, and a file of gamed baselines for them.

`python tests/support/annotations.py FOLDER` writes both, for `bench/length_control.py`.
"""

import csv
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

ROWS = 240


def make_annotations(skill: float = -0.6, longer: float = 0.4) -> list[dict[str, Any]]:
    """Annotations whose preference follows skill, difficulty and length; the last two are no preferences.

    `skill` is the evaluated model's log-odds at equal length, `longer` how much longer its answers are.
    """
    chance, rows = random.Random(f"annotations {skill} {longer}"), []
    for number in range(ROWS):
        lengths = round(chance.gauss(600, 120)), round(chance.gauss(600 * (1 + longer), 200))
        other, own = (max(length, 20) for length in lengths)
        score = skill + 1.5 * math.tanh((own - other) / 250) + 0.8 * difficulty(number) + chance.gauss(0, 0.7)
        rows.append(
            {
                "instruction": f"question {number}",
                "output_1": "o" * other,
                "generator_1": "baseline",
                "dataset": "even" if number % 2 else "odd",
                "output_2": "m" * own,
                "generator_2": "model",
                "annotator": "rule",
                "preference": 1 + 1 / (1 + math.exp(-2 * score)),
            }
        )
    rows[3]["preference"], rows[4]["preference"], rows[5]["preference"] = 0, 1.5, 2
    rows[-2]["preference"] = rows[-1]["preference"] = None
    return rows


def difficulty(number: int) -> float:
    """The difficulty of an instruction."""
    return math.sin(number * 1.7)


def write_gamed(path: Path) -> None:
    """A file like alpaca_eval's df_gamed.csv: two gamed baselines on the same instructions."""
    chance = random.Random("gamed")
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline", "model"])
        for model, length in (("concise", 1.2), ("verbose", -1.1)):
            for number in range(ROWS):
                delta = length + chance.gauss(0, 0.5)
                score = -1.5 * math.tanh(delta) + 0.5 * difficulty(number) + chance.gauss(0, 0.5)
                preference = "" if number == 9 else 1 / (1 + math.exp(-score))
                out.writerow([number, preference, delta, difficulty(number), False, model])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_gamed(folder / "df_gamed.csv")
    for name, skill, longer in (("worse", -0.6, 0.4), ("better", 0.5, -0.2)):
        (folder / f"{name}.json").write_text(json.dumps(make_annotations(skill, longer)))
