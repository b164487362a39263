"""Section 2 of a report: which tasks got better, and which got worse."""

from collections.abc import Mapping
from typing import Any

from tapir_local.page.draw import BAD, INK, Spec, color_by, draw_figure, inline_values
from tapir_local.page.parts import (
    Cell,
    Figure,
    Grid,
    Mark,
    Part,
    Section,
    decimal_number,
    rate_number,
    short_round_name,
)
from tapir_local.page.summary import RunView
from tapir_local.printable import format_count
from tapir_local.report.compare import CHANCE
from tapir_local.report.compare_tables import METRIC_NAMES

ROUND_COLORS = (
    "var(--muted)",
    "var(--c2)",
    "var(--c1)",
    "var(--c3)",
)  # the untrained student, round 0, the best, the last


def tasks_section(view: RunView) -> Section:
    """Section 2: the rate of each task, before and after; tasks that fell are marked."""
    question, found, status = "Which tasks got better, and which got worse?", view.found, view.status
    if found is None:
        return Section("tasks", "Where?", question)
    steps = {row["round"]: measured for row in found["rounds"] if (measured := task_rates(row["round"], status, found))}
    tasks = {task: int(values["rows"] or 0) for task, values in last_metrics(status)["by_task"].items()}
    if not any(rate is not None for rates in steps.values() for rate in rates.values()):
        return Section("tasks", "Where?", question)
    parts: list[Part] = [tasks_figure(steps, tasks, found)] if len(tasks) > 1 and len(steps) > 1 else []
    return Section("tasks", "Where?", question, [*parts, tasks_grid(steps, tasks, found)])


def last_metrics(status: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metrics of the last evaluated round."""
    found: Mapping[str, Any] = next(row["metrics"] for row in reversed(status["rounds"]) if row["metrics"])
    return found


def task_rates(number: int, status: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, float | None]:
    """The rate of each task in a round, in the metric by which rounds are compared; for likeness the score."""
    rounds = {row["number"]: row["metrics"] for row in status["rounds"]} | {-1: status["untrained"]}
    key = {"likeness": "student_score"}.get(found["metric"], found["metric"])
    return {task: values.get(key) for task, values in (rounds[number] or {"by_task": {}})["by_task"].items()}


def tasks_figure(
    steps: Mapping[int, Mapping[str, float | None]], tasks: Mapping[str, int], found: Mapping[str, Any]
) -> Figure:
    """A line for each task from the first evaluation to the last, with a dot for each shown round."""
    shown = list(dict.fromkeys([min(steps), 0 if 0 in steps else min(steps), found["best"], max(steps)]))
    fallen = {row["task"] for row in found["fallen"]}
    order = sorted(tasks, key=lambda task: -((steps[max(steps)].get(task) or 0) - (steps[min(steps)].get(task) or 0)))
    names = {number: short_round_name(number) if number < 0 else f"round {number}" for number in shown}
    points = [
        {
            "task": task, "rate": rate, "rows": tasks[task], "round": names[number],
            "tip": f"{task}, {names[number]}: {rate_text(rate, found)}, {format_count(tasks[task], 'row')}",
        }
        for task in order for number in shown if (rate := steps[number].get(task)) is not None
    ]  # fmt: skip
    lines = [
        {"task": task, "from": steps[min(steps)].get(task), "to": steps[max(steps)].get(task), "fell": task in fallen}
        for task in order
    ]
    percent = found["metric"] != "likeness"
    scale = {"domain": [0, 1] if percent else [1, 10]}

    def make(narrow: bool) -> Spec:
        x = {
            "type": "quantitative",
            "axis": {"format": "%" if percent else ".1f", "title": None, "tickCount": 5},
            "scale": scale,
        }
        y = {
            "field": "task", "type": "nominal", "sort": order,
            "axis": {"title": None, "labelColor": INK, "labelLimit": 110 if narrow else 200, "grid": True},
        }  # fmt: skip
        color = {"condition": {"test": "datum.fell", "value": BAD}, "value": "var(--line-strong)"}
        line = {
            "data": inline_values(lines), "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
            "encoding": {"y": y, "x": {"field": "from", **x}, "x2": {"field": "to"}, "color": color},
        }  # fmt: skip
        dots = {
            "data": inline_values(points), "mark": {"type": "circle", "opacity": 1},
            "encoding": {
                "y": y, "x": {"field": "rate", **x},
                "color": color_by("round", list(names.values()), narrow, ROUND_COLORS),
                "size": {"field": "rows", "type": "quantitative", "scale": {"range": [40, 260]}, "legend": None},
                "description": {"field": "tip"},
            },
        }  # fmt: skip
        return {"height": {"step": 24}, "layer": [line, dots]}

    note = f"By {METRIC_NAMES[found['metric']]}. Larger dots have more rows. Red lines: tasks that fell."
    return draw_figure("Tasks from the first evaluation to the last", make, note)


def rate_text(rate: float, found: Mapping[str, Any]) -> str:
    """A rate in percent, or a score."""
    return f"{rate:.2f}" if found["metric"] == "likeness" else f"{rate:.1%}"


def tasks_grid(
    steps: Mapping[int, Mapping[str, float | None]], tasks: Mapping[str, int], found: Mapping[str, Any]
) -> Grid:
    """A row for each task: its rate in every round, and for fallen ones the change with its p value."""
    fallen = {row["task"]: row for row in found["fallen"]}
    number = decimal_number if found["metric"] == "likeness" else rate_number
    heads = ["task", "rows", *(short_round_name(step) for step in steps)]
    heads += ["first to last, points" if found["metric"] != "likeness" else "first to last", "p of a fall"]
    rows = []
    for task, count in tasks.items():
        values = [rates.get(task) for rates in steps.values()]
        first, last = values[0], values[-1]
        gap = None if first is None or last is None or len(values) < 2 else last - first
        scaled = gap if gap is None or found["metric"] == "likeness" else 100 * gap
        p = fallen[task]["p_holm"] if task in fallen else None
        mark: Mark = "bad" if task in fallen else ""
        chance = " chance?" if p is not None and p >= CHANCE else ""
        rows.append(
            [
                Cell(task, mark=mark),
                Cell(f"{count:,}", count),
                *(number(value) for value in values),
                decimal_number(scaled, "+.1f", mark),
                Cell("" if p is None else f"{p:.2g}{chance}", p),
            ]
        )
    note = (
        "Red: tasks below their first evaluation. p is corrected for the number of tasks (Holm); a fall with a p of "
        "0.05 or more may be chance, as it is with few rows."
    )
    return Grid(heads, rows, title=f"{METRIC_NAMES[found['metric']].capitalize()} by task", note=note)
