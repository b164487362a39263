"""Who labeled the rows of a run, and how far the classifier agrees with the teacher: as data and as tables."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.files import read_rows
from tapir_local.pipeline.loop import kept_recipe
from tapir_local.recipe.tasks import Task
from tapir_local.records import Example
from tapir_local.report.status import read_agreement, run_warnings
from tapir_local.report.tables import number_cell, percent_cell, percent_interval_cell, text_table
from tapir_local.run_dir import RunDir
from tapir_local.tables import PlainTable


def label_report(run: RunDir) -> dict[str, Any]:
    """What `tapir-local show --labels --json` prints: rows of each task by who labeled them, agreement, confusion.

    `confusion` counts the rows held out from the classifier's training, by the label of the teacher and then by that
    of the classifier. `confused` lists the pairs of different labels, most rows first. TapirError if the rows are not
    labeled yet.
    """
    path = run.path / "labelled.jsonl"
    if not path.exists():
        fix = "Run `tapir-local distill` with its recipe; it resumes the run."
        raise TapirError(f"the rows of run {run.name!r} are not labeled yet", where=str(path), fix=fix)
    counts: Mapping[tuple[str, str], int] = Counter((row.task, row.labelled_by) for row in read_rows(Example, path))
    table, agreement = kept_recipe(run).task_table(), read_agreement(run) or {}
    labels = [*table, *sorted({task for task, _ in counts} - set(table))]
    held, confusion = agreement.get("by_label", {}), agreement.get("confusion", {})
    return {
        "run": run.name,
        "tasks": {label: label_row(label, table, counts, held.get(label)) for label in labels},
        "agreement": {key: agreement.get(key) for key in ("agreement", "rows", "interval", "trained")},
        "confused": confused_pairs(confusion),
        "confusion": confusion,
        "warnings": run_warnings(run),
        "notes": label_notes(run),
    }


def label_row(
    label: str, table: Mapping[str, Task], counts: Mapping[tuple[str, str], int], held: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The target share of a task, its rows by who labeled them, and its held-out rows."""
    sources = {who: counts.get((label, who), 0) for who in ("file", "teacher", "classifier")}
    rows = sum(count for (task, _), count in counts.items() if task == label)
    return {"share": table[label].share if label in table else 0.0, "rows": rows, **sources, "held_out": held}


def confused_pairs(confusion: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """The pairs of different labels, most rows first."""
    pairs = [(rows, label, guess) for label, row in confusion.items() for guess, rows in row.items() if label != guess]
    order = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))
    return [{"teacher": label, "classifier": guess, "rows": rows} for rows, label, guess in order]


def label_notes(run: RunDir) -> list[str]:
    """The closing phrases of the labeling stages: they state the agreement and the tasks without rows."""
    stages = run.record().get("stages", {})
    notes = [stages.get(f"prepare/{name}", {}).get("note") for name in ("label", "classify", "tasks")]
    return [text for text in notes if text]


def label_tables(found: Mapping[str, Any]) -> list[PlainTable]:
    """Tables of who labeled the rows of each task, the agreement with the teacher, and the confused labels."""
    table = PlainTable(f"run {found['run']}: labels")
    table.add_column("task", no_wrap=True)
    table.add_numbers("share", "rows")
    table.add_numbers("file", "teacher", "classifier")
    table.add_numbers("agreement", rank=1)
    table.add_numbers("95 %", rank=2)
    table.add_numbers("held out", rank=3)
    present = {task: row for task, row in found["tasks"].items() if row["rows"] or row["held_out"]}
    for task, row in present.items():
        held = row["held_out"] or {}
        rate = percent_cell(held["agree"] / held["rows"] if held else None)
        counts = (number_cell(row[name]) for name in ("rows", "file", "teacher", "classifier"))
        table.add_row(
            task,
            percent_cell(row["share"]),
            *counts,
            rate,
            percent_interval_cell(held.get("interval")),
            held_out_cell(held),
        )
    empty = ", ".join(task for task in found["tasks"] if task not in present)
    table.caption = "\n".join([*found["notes"], *([f"Tasks without a row: {empty}."] if empty else [])])
    pairs = [[pair["teacher"], pair["classifier"], f"{pair['rows']:,}"] for pair in found["confused"]]
    title = f"run {found['run']}: labels that the classifier confuses (rows held out from its training)"
    return (
        [table, text_table(title, ["teacher's label", "classifier's label", "rows"], pairs, whole=["rows"])]
        if pairs
        else [table]
    )


def held_out_cell(held: Mapping[str, Any]) -> str:
    """`17 of 20` held-out rows have the teacher's label; empty if none were held out."""
    return f"{held['agree']:,} of {held['rows']:,}" if held else ""
