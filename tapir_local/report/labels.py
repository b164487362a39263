"""What a run's files say of its labels: who gave them, how far the classifier agrees with the teacher; as tables."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.files import read_rows
from tapir_local.pipeline.loop import kept_recipe
from tapir_local.recipe.tasks import Task
from tapir_local.records import Example
from tapir_local.report.status import agreement_of, warnings_of
from tapir_local.report.terminal import interval, percent, plain_table, shown
from tapir_local.run_dir import RunDir
from tapir_local.tables import PlainTable


def labels_of(run: RunDir) -> dict[str, Any]:
    """What `tapir-local show --labels --json` prints: rows of each task by who labelled them, agreement, confusion.

    `confusion` has the rows held out of the classifier's training by the teacher's label and then by the classifier's;
    `confused` lists those of two labels, most rows first. TapirError where the rows are not labelled yet.
    """
    path = run.path / "labelled.jsonl"
    if not path.exists():
        fix = "`tapir-local distill` with the run's recipe goes on."
        raise TapirError(f"the rows of run {run.name!r} are not labelled yet", where=str(path), fix=fix)
    counts: Mapping[tuple[str, str], int] = Counter((row.task, row.labelled_by) for row in read_rows(Example, path))
    table, agreement = kept_recipe(run).task_table(), agreement_of(run) or {}
    labels = [*table, *sorted({task for task, _ in counts} - set(table))]
    held, confusion = agreement.get("by_label", {}), agreement.get("confusion", {})
    return {
        "run": run.name,
        "tasks": {label: labels_row(label, table, counts, held.get(label)) for label in labels},
        "agreement": {key: agreement.get(key) for key in ("agreement", "rows", "interval", "trained")},
        "confused": confused(confusion),
        "confusion": confusion,
        "warnings": warnings_of(run),
        "notes": notes_of(run),
    }


def labels_row(
    label: str, table: Mapping[str, Task], counts: Mapping[tuple[str, str], int], held: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A task's target share, its rows by who labelled them, and its rows held out."""
    sources = {who: counts.get((label, who), 0) for who in ("file", "teacher", "classifier")}
    rows = sum(count for (task, _), count in counts.items() if task == label)
    return {"share": table[label].share if label in table else 0.0, "rows": rows, **sources, "held_out": held}


def confused(confusion: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """The pairs of different labels, most rows first."""
    pairs = [(rows, told, guess) for told, row in confusion.items() for guess, rows in row.items() if told != guess]
    order = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))
    return [{"teacher": told, "classifier": guess, "rows": rows} for rows, told, guess in order]


def notes_of(run: RunDir) -> list[str]:
    """The closing phrases of the stages that label, which tell the agreement and the tasks without a row."""
    stages = run.record().get("stages", {})
    told = [stages.get(f"prepare/{name}", {}).get("note") for name in ("label", "classify", "tasks")]
    return [text for text in told if text]


def label_tables(found: Mapping[str, Any]) -> list[PlainTable]:
    """Who labelled the rows of each task, how far the classifier agrees with the teacher, and what it confuses."""
    table = PlainTable(f"run {found['run']}: labels")
    table.add_column("task")
    for name in ("share", "rows", "file", "teacher", "classifier", "agreement", "95 %", "held out"):
        table.add_column(name, justify="right")
    present = {task: row for task, row in found["tasks"].items() if row["rows"] or row["held_out"]}
    for task, row in present.items():
        held = row["held_out"] or {}
        rate = held["agree"] / held["rows"] if held else None
        counts = (shown(row[name]) for name in ("rows", "file", "teacher", "classifier"))
        table.add_row(
            task, percent(row["share"]), *counts, percent(rate), interval(held.get("interval")), agreeing(held)
        )
    empty = ", ".join(task for task in found["tasks"] if task not in present)
    table.caption = "\n".join([*found["notes"], *([f"Tasks without a row: {empty}."] if empty else [])])
    pairs = [[pair["teacher"], pair["classifier"], f"{pair['rows']:,}"] for pair in found["confused"]]
    title = f"run {found['run']}: what the classifier takes for something else (rows held out of its training)"
    return [table, plain_table(title, ["the teacher's label", "the classifier's", "rows"], pairs)] if pairs else [table]


def agreeing(held: Mapping[str, Any]) -> str:
    """`17 of 20`, or nothing where no row was held out."""
    return f"{held['agree']:,} of {held['rows']:,}" if held else ""
