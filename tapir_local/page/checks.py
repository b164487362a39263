"""Sections 10 to 12 of a report: the labels, the gate, and how to do the run again."""

from collections.abc import Mapping
from typing import Any

from tapir_local.export.gate import GateReport
from tapir_local.files import file_sha256, read_record
from tapir_local.page.draw import INK, SERIES, Spec, color_by, draw_figure, inline_values
from tapir_local.page.parts import (
    Cell,
    Facts,
    Figure,
    Grid,
    Listing,
    Paragraph,
    Part,
    Section,
    count_number,
    decimal_number,
    rate_number,
)
from tapir_local.pipeline.loop import kept_recipe, last_round
from tapir_local.printable import format_count
from tapir_local.recipe.text import remove_defaults
from tapir_local.recipe.yaml import read_yaml, write_yaml
from tapir_local.report.labels import label_report
from tapir_local.report.tables import percent_interval_cell
from tapir_local.run_dir import RunDir
from tapir_local.stages.ship import license_rows, published_recipe, versions_line

MAX_NUMBERED = 20  # labels up to which a number fits into a cell on a phone
MAX_CONFUSED = 40  # labels in a confusion matrix; with more, its cells are too small to read


def labels_section(run: RunDir) -> Section:
    """Section 10."""
    question = "Are the tasks of the rows right?"
    if not (run.path / "labelled.jsonl").exists():
        return Section("labels", "Labels", question)
    found = label_report(run)
    parts: list[Part] = [Paragraph(text, "warning") for text in found["warnings"]]
    parts += [Paragraph(text) for text in found["notes"]]
    present = {task: row for task, row in found["tasks"].items() if row["rows"] or row["held_out"]}
    if len(present) > 1:
        parts.append(shares_figure(present))
    if 1 < len(found["confusion"]) <= MAX_CONFUSED:
        parts.append(confusion_figure(found["confusion"]))
    return Section("labels", "Labels", question, [*parts, labels_grid(present)])


def shares_figure(present: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The share of each task that the recipe asks for, and its share among the rows."""
    total = sum(row["rows"] for row in present.values()) or 1
    order = sorted(present, key=lambda task: -present[task]["rows"])
    points = [
        {"task": task, "kind": kind, "share": share, "tip": f"{task}: {share:.1%} {kind}"}
        for task in order
        for kind, share in (("of the rows", present[task]["rows"] / total), ("asked for", present[task]["share"]))
    ]
    names = ["of the rows", "asked for"]

    def make(narrow: bool) -> Spec:
        y = {
            "field": "task", "type": "nominal", "sort": order,
            "axis": {"title": None, "labelColor": INK, "labelLimit": 110 if narrow else 200, "grid": True},
        }  # fmt: skip
        x = {"field": "share", "type": "quantitative", "axis": {"title": None, "format": "%", "tickCount": 5}}
        return {
            "height": {"step": 20},
            "data": inline_values(points),
            "mark": {"type": "circle", "size": 80, "opacity": 1},
            "encoding": {"y": y, "x": x, "color": color_by("kind", names, narrow), "description": {"field": "tip"}},
        }

    return draw_figure("Shares of the tasks", make, "Asked for: the shares of the recipe, or else the paper's.")


def confusion_figure(confusion: Mapping[str, Mapping[str, int]]) -> Figure:
    """Rows held out of the classifier's training, by the teacher's label and the classifier's."""
    labels = sorted({*confusion, *(guess for row in confusion.values() for guess in row)})
    cells = [
        {"teacher": label, "classifier": guess, "rows": rows, "share": rows / max(1, sum(row.values())),
         "tip": f"teacher: {label}, classifier: {guess}: {format_count(rows, 'row')}"}
        for label, row in confusion.items() for guess, rows in row.items() if rows
    ]  # fmt: skip

    def make(narrow: bool) -> Spec:
        limit = 90 if narrow else 160
        axis = {"title": None, "labelColor": INK, "labelLimit": limit, "grid": True, "labelOverlap": False, "zindex": 0}
        y = {"field": "teacher", "type": "nominal", "scale": {"domain": labels}, "axis": axis}
        x = {
            "field": "classifier", "type": "nominal", "scale": {"domain": labels},
            "axis": {**axis, "labelAngle": -90, "orient": "top"},
        }  # fmt: skip
        shade = {
            "field": "share",
            "type": "quantitative",
            "scale": {"domain": [0, 1], "range": [0.1, 0.65]},
            "legend": None,
        }
        both = {"x": x, "y": y}
        shades = {"mark": {"type": "rect", "color": SERIES[0]}, "encoding": {
            **both, "opacity": shade, "description": {"field": "tip"}}}  # fmt: skip
        counts = {"mark": {"type": "text", "aria": False, "fontSize": 11}, "encoding": {
            **both, "text": {"field": "rows"}}}  # fmt: skip
        return {
            "height": {"step": 20},
            "data": inline_values(cells),
            "layer": [shades, *([] if narrow and len(labels) > MAX_NUMBERED else [counts])],
        }

    note = "Rows held out of the classifier's training: the teacher's label on the left, the classifier's on top."
    return draw_figure("What the classifier confuses", make, note)


def labels_grid(present: Mapping[str, Mapping[str, Any]]) -> Grid:
    """A row for each task that has rows."""
    heads = [
        "task",
        "asked for",
        "rows",
        "from the file",
        "by the teacher",
        "by the classifier",
        "agreement",
        "95 %",
        "held out",
    ]
    rows = []
    for task, row in present.items():
        held = row["held_out"] or {}
        agreement = held["agree"] / held["rows"] if held else None
        counts = (count_number(row[name]) for name in ("rows", "file", "teacher", "classifier"))
        interval = Cell(percent_interval_cell(held.get("interval")))
        rows.append(
            [
                Cell(task),
                rate_number(row["share"]),
                *counts,
                rate_number(agreement),
                interval,
                count_number(held.get("rows")),
            ]
        )
    return Grid(heads, rows, note="Agreement: of the classifier with the teacher, on held-out rows.")


# Section 11


def gate_section_of(run: RunDir) -> Section:
    """Section 11."""
    question = "Is each GGUF the same model as the one that was trained?"
    paths = {number: run.round(number) / "gate.json" for number in range(last_round(run) + 1)}
    reports = {number: read_record(GateReport, path) for number, path in paths.items() if path.exists()}
    if not reports:
        return Section("gate", "The gate", question)
    heads = [
        *("round", "result", "texts tokenized", "differently", "divergence, nats per token", "allowed"),
        *("same greedy token", "required", "positions"),
    ]
    rows = [
        [
            Cell(str(number), number),
            Cell(
                "✓ passed" if report.passed else f"failed: {', '.join(report.failed)}",
                mark="good" if report.passed else "bad",
            ),
            count_number(report.probes),
            count_number(report.mismatches, "bad" if report.mismatches else ""),
            decimal_number(report.figures.kl, ".2e"),
            decimal_number(report.max_kl, "g"),
            rate_number(report.figures.agreement),
            rate_number(report.min_agreement),
            count_number(report.figures.positions),
        ]
        for number, report in reports.items()
    ]
    return Section("gate", "The gate", question, (Grid(heads, rows, texts=["result"]),))


# Section 12


def again_section(run: RunDir) -> Section:
    """Section 12: commands, recipe, versions, digests, licenses."""
    recipe, record = kept_recipe(run), run.record()
    whole = published_recipe(recipe)
    settings = remove_defaults(read_yaml(whole, type(recipe), "recipe.yaml"))
    changed = write_yaml({name: value for name, value in settings.items() if value != {}})
    lock = run.path / "tapir.lock"
    facts = [("versions", versions_line(record)), ("model", "model/ of the run's folder")]
    facts += [("tapir.lock, SHA-256", file_sha256(lock))] if lock.exists() else []
    commands = (
        f"tapir-local distill recipe.yaml             # the recipe below; calls in the store are not paid again\n"
        f"tapir-local distill recipe.yaml --replay    # asks nobody: stops if an answer is not in the store\n"
        f"tapir-local chat {run.name}\n"
    )
    licenses = [(license_name(name), text) for name, text in license_rows(recipe)]
    parts: list[Part] = [
        Listing("Commands", commands),
        Listing("Settings that differ from their defaults", changed),
        Listing("The whole recipe", whole, folded=True),
        Facts([*facts, *licenses]),
    ]
    return Section("again", "Do it again", "Can I reproduce it, and may I ship it?", parts)


def license_name(row: str) -> str:
    """The name of a row of license_rows where no heading says that it is about licenses."""
    if row == "language":
        return row
    return f"terms of {row.removesuffix(' (terms)')}" if row.endswith("(terms)") else f"license of {row}"
