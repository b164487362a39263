"""The first section of a report on several runs: paired differences, and rates by cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from tapir_local.page.draw import INK, MUTED, Spec, color_by, draw_figure, inline_values
from tapir_local.page.parts import Cell, Figure, Grid, Paragraph, Part, Section, count_number
from tapir_local.report.compare import CHANCE, compare_runs
from tapir_local.report.compare_tables import (
    METRIC_NAMES,
    compared_rounds_caption,
    difference_cells,
    differences_caption,
    rate_and_interval_cell,
    shown_metrics,
    with_group_start,
)
from tapir_local.run_dir import RunDir


def comparison_section(runs: Sequence[RunDir]) -> Section:
    """The runs compared with the first one; TapirError if they cannot be compared."""
    found = compare_runs(runs, by_task=True)
    parts: list[Part] = []
    compared = [row for row in found["compared"] if row["difference"]]
    if compared:
        parts.append(forest_figure(compared, found["baseline"], "Differences from the first run"))
    parts.append(differences_grid(found["compared"], differences_caption(found["compared"])))
    parts += [Paragraph(note, "warning") for note in found["notes"]]
    if figure := cost_figure(found):
        parts.append(figure)
    parts.append(cost_grid(found))
    tasks = found["by_task"] or []
    metric = next(iter(dict.fromkeys(row["metric"] for row in tasks)), "")
    by_task = [row for row in tasks if row["metric"] == metric and row["difference"]]
    if len({row["task"] for row in by_task}) > 1:
        parts.append(task_forest_figure(by_task, found["baseline"], METRIC_NAMES[metric]))
    question = f"Which run is better than {found['baseline']} on the same held-out rows?"
    return Section("compared", "The runs compared", question, parts)


def forest_points(rows: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """A point for each difference in percentage points; `name` is the field that names it."""
    points = []
    for row in rows:
        gap = row["difference"]
        chance = "may be chance" if gap["p_holm"] >= CHANCE else "beyond chance"
        what = f"{METRIC_NAMES[row['metric']]}, {row['run']}" + (f", {row['task']}" if row["task"] else "")
        points.append(
            {
                "name": row[name] if name != "metric" else f"{row['run']}: {METRIC_NAMES[row['metric']]}",
                "run": row["run"],
                "mean": 100 * gap["mean"],
                "low": 100 * gap["low"],
                "high": 100 * gap["high"],
                "chance": chance,
                "tip": f"{what}: {difference_cells(gap)[0]} points, p {difference_cells(gap)[3]}",
            }
        )
    return points


def forest_spec(points: Sequence[Mapping[str, Any]], narrow: bool, runs: Sequence[str] = ()) -> Spec:
    """A dot with an interval for each point, and a line at no difference."""
    order = list(dict.fromkeys(point["name"] for point in points))
    x = {"type": "quantitative", "axis": {"title": "percentage points", "tickCount": 6}}
    axis = {"title": None, "labelColor": INK, "labelLimit": 130 if narrow else 260, "grid": True}
    y = {"field": "name", "type": "nominal", "sort": order, "axis": axis}
    offset = {"yOffset": {"field": "run", "type": "nominal", "sort": list(runs)}} if len(runs) > 1 else {}
    color = (
        color_by("run", runs, narrow)
        if len(runs) > 1
        else color_by("chance", ["beyond chance", "may be chance"], narrow, ("var(--c1)", MUTED))
    )
    shared = {"y": y, **offset, "color": color}
    zero = {
        "data": inline_values([{"at": 0}]),
        "mark": {"type": "rule", "color": MUTED, "aria": False},
        "encoding": {"x": {"field": "at", **x}},
    }
    bars = {
        "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
        "encoding": {**shared, "x": {"field": "low", **x}, "x2": {"field": "high"}},
    }
    dots = {
        "mark": {"type": "circle", "size": 90, "opacity": 1},
        "encoding": {**shared, "x": {"field": "mean", **x}, "description": {"field": "tip"}},
    }
    return {"height": {"step": 14 if len(runs) > 1 else 30}, "data": inline_values(points), "layer": [zero, bars, dots]}


def forest_figure(rows: Sequence[Mapping[str, Any]], baseline: str, title: str) -> Figure:
    """The paired difference of each run and metric from the first run."""
    points = forest_points(rows, "metric")
    note = f"Right of the line: better than {baseline}. Bars: paired 95 % intervals; chance by the corrected p."
    return draw_figure(title, lambda narrow: forest_spec(points, narrow), note)


def task_forest_figure(rows: Sequence[Mapping[str, Any]], baseline: str, metric: str) -> Figure:
    """The paired difference of each task and run from the first run."""
    points = forest_points(rows, "task")
    runs = list(dict.fromkeys(point["run"] for point in points))
    note = f"Right of the line: better than {baseline}. For tasks with few rows the intervals are too narrow."
    return draw_figure(
        f"Differences in {metric} by task",
        lambda narrow: forest_spec(points, narrow, runs if len(runs) > 1 else ()),
        note,
    )


def differences_grid(rows: Sequence[Mapping[str, Any]], note: str) -> Grid:
    """A row for each metric and run."""
    heads = [
        "metric",
        "run",
        "round",
        "rate (95 %)",
        "difference, points (95 %)",
        "rows +/-",
        "p",
        "p Holm",
    ]
    cells = []
    for row in rows:
        gap = row["difference"]
        mark: Any = ""
        if gap and gap["p_holm"] < CHANCE:
            mark = "good" if gap["mean"] > 0 else "bad"
        said = difference_cells(gap)
        cells.append(
            [
                Cell(METRIC_NAMES[row["metric"]]),
                Cell(row["run"]),
                Cell(str(row["round"]), row["round"]),
                Cell(rate_and_interval_cell(row), row["mean"]),
                Cell(said[0], gap and gap["mean"], mark),
                Cell(said[1]),
                Cell(said[2], gap and gap["p"]),
                Cell(said[3], gap and gap["p_holm"]),
            ]
        )
    return Grid(heads, cells, note=note, texts=["run"])


def cost_figure(found: Mapping[str, Any]) -> Figure | None:
    """The rate of each round against the training tokens so far, or rows if no tokens were counted."""
    metric = next((name for name in METRIC_NAMES if any(row[name] for row in found["rounds"])), None)
    if metric is None:
        return None
    unit = "tokens" if all(row["tokens"] is not None for row in found["rounds"]) else "rows"
    points = [
        {"run": row["run"], "cost": row[unit], "rate": row[metric]["mean"], "round": row["round"],
         "tip": f"{row['run']}, round {row['round']}: {row[metric]['mean']:.1%} after {row[unit]:,} training {unit}"}
        for row in found["rounds"] if row[metric]
    ]  # fmt: skip
    runs = list(dict.fromkeys(point["run"] for point in points))

    def make(narrow: bool) -> Spec:
        axis = {"title": f"training {unit} so far", "format": ",d", "tickCount": 4 if narrow else 8, "grid": False}
        x = {"field": "cost", "type": "quantitative", "axis": axis}
        y = {"field": "rate", "type": "quantitative", "axis": {"title": None, "format": "%", "tickCount": 5}}
        shared = {"x": x, "y": y, "color": color_by("run", runs, narrow)}
        line = {"mark": {"type": "line", "strokeWidth": 2, "aria": False}, "encoding": shared}
        dots = {
            "mark": {"type": "circle", "size": 80, "opacity": 1},
            "encoding": {**shared, "description": {"field": "tip"}},
        }
        return {"height": 240, "data": inline_values(points), "layer": [line, dots]}

    return draw_figure(f"{METRIC_NAMES[metric].capitalize()} by training {unit}", make)


def cost_grid(found: Mapping[str, Any]) -> Grid:
    """A row for each round of each run: cost so far and rates."""
    metrics = shown_metrics(found["rounds"])
    heads = [
        "run",
        "round",
        "rows",
        "tokens",
        "teacher calls",
        "judge calls",
        *(METRIC_NAMES[name] for name in metrics),
    ]
    rows = [
        [
            Cell(row["run"]),
            Cell(("*" if row["chosen"] else "") + str(row["round"]), row["round"]),
            *(count_number(row[name]) for name in ("rows", "tokens", "teacher_calls", "judge_calls")),
            *(Cell(rate_and_interval_cell(row[name]), row[name] and row[name]["mean"]) for name in metrics),
        ]
        for row, _ in with_group_start(found["rounds"], "run")
    ]
    note = compared_rounds_caption(found).replace("compared below", "compared above")
    return Grid(heads, rows, title="The runs, round by round", note=note)
