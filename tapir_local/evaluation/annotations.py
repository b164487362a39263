"""Read and write annotations as alpaca_eval has them, and read its file of gamed baselines."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tapir_local.errors import TapirError
from tapir_local.files import write_json
from tapir_local.method.length_control import GamedBaselines

ANNOTATION_FORM = (
    "An annotation has output_1 (the opponent's answer), output_2 (the evaluated one), and a preference of 1 to 2, "
    "1.5 or 0 for a tie, null if unjudged."
)
GAMED_COLUMNS = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


@dataclass(frozen=True)
class Annotation:
    """A comparison of two answers: `preference` is 0 if the opponent's is better, 1 if the evaluated one is.

    None: it was not judged. `outputs` are the evaluated answer and the opponent's.
    """

    instruction: str
    outputs: tuple[str, str]
    generators: tuple[str, str]
    category: str
    preference: float | None
    annotator: str = ""

    @property
    def lengths(self) -> tuple[int, int]:
        """Characters of the evaluated answer and of the opponent's."""
        return len(self.outputs[0]), len(self.outputs[1])


def read_annotations(path: Path) -> list[Annotation]:
    """The annotations of a file in alpaca_eval's format, in its order.

    As alpaca_eval counts them: a preference of 0 is a tie, and one that is null or outside 1 to 2 is not counted.
    TapirError if it is no list of annotations, an answer is missing, or the file compares several models.
    """
    try:
        rows = orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TapirError(f"no JSON: {error}", where=str(path), fix=ANNOTATION_FORM) from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise TapirError("the file is not a list of annotations", where=str(path), fix=ANNOTATION_FORM)
    found = [read_annotation(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    for side, what in ((0, "generator_2"), (1, "generator_1")):
        if len(names := {one.generators[side] for one in found}) > 1:
            what = f"the annotations are of several models ({what}: {', '.join(sorted(names))})"
            raise TapirError(what, where=str(path), fix="Give one file for each pair of models.")
    return found


def read_annotation(row: Mapping[str, Any], where: str) -> Annotation:
    """One annotation; TapirError if it has no preference, or no answers, whose lengths are needed."""
    if "preference" not in row:
        raise TapirError("an annotation without a preference", where=where, fix=ANNOTATION_FORM)
    outputs = row.get("output_2"), row.get("output_1")
    if not isinstance(outputs[0], str) or not isinstance(outputs[1], str):
        what = "an annotation without its two answers, so that their lengths are not known"
        raise TapirError(what, where=where, fix=ANNOTATION_FORM)
    value = row["preference"]
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TapirError(f"the preference is {value!r}, not a number", where=where, fix=ANNOTATION_FORM)
    preference = None if value is None else 0.5 if value == 0 else value - 1
    return Annotation(
        str(row.get("instruction", "")),
        (outputs[0], outputs[1]),
        (str(row.get("generator_2", "")), str(row.get("generator_1", ""))),
        str(row.get("dataset") or ""),
        preference if preference is not None and 0 <= preference <= 1 else None,
        str(row.get("annotator", "")),
    )


def write_annotations(path: Path, annotations: Sequence[Annotation]) -> None:
    """Write annotations in alpaca_eval's format."""
    write_json(
        path,
        [
            {
                "instruction": one.instruction,
                "output_1": one.outputs[1],
                "generator_1": one.generators[1],
                "dataset": one.category,
                "output_2": one.outputs[0],
                "generator_2": one.generators[0],
                "annotator": one.annotator,
                "preference": None if one.preference is None else 1 + one.preference,
            }
            for one in annotations
        ],
    )


def read_gamed_baselines(path: Path) -> GamedBaselines:
    """alpaca_eval's df_gamed.csv, from its dataset on the Hub; TapirError if it is another file."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        missing = [name for name in GAMED_COLUMNS if not rows or name not in rows[0]]
        if missing:
            raise ValueError(f"no column {missing[0]}")
        difficulty: dict[int, float] = {}
        for row in rows:
            difficulty.setdefault(int(row["index"]), float(row["instruction_difficulty"]))
        kept = [row for row in rows if row["preference"] and row["not_gamed_baseline"] == "False"]
        lists = [[float(row[name]) for row in kept] for name in GAMED_COLUMNS[1:4]]
    except (OSError, ValueError) as error:
        fix = (
            "It is df_gamed.csv of the dataset tatsu-lab/alpaca_eval, with the columns "
            + ", ".join(GAMED_COLUMNS)
            + "."
        )
        raise TapirError(f"not alpaca_eval's file of gamed baselines: {error}", where=str(path), fix=fix) from error
    return GamedBaselines(difficulty, *lists)
