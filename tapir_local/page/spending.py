"""Sections 8 and 9 of a report: calls and money, and where the time went."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tapir_local.page.draw import INK, Spec, color_by, draw_figure, inline_values
from tapir_local.page.parts import Cell, Facts, Figure, Grid, Paragraph, Part, Section, count_number, text_cells
from tapir_local.page.summary import RunView, all_stages, rate_points
from tapir_local.page.timeline import clock, lay_out, time_unit, timeline_figure
from tapir_local.pipeline.loop import kept_recipe
from tapir_local.printable import format_count
from tapir_local.report.costs import costs_caption, money_cells, summarize_costs
from tapir_local.report.tables import money_cell

# What a stage spends its time on; other stages only read and write files.
KINDS_OF_WORK: Mapping[str, tuple[str, ...]] = {
    "training": ("train", "classify"),
    "teacher and judge": (
        "label", "tasks", "holdout", "seeds", "untrained-judge", "judge", "expand", "refine", "holdout-judge",
    ),
    "student's answers": ("answer", "holdout-answer", "untrained-answer"),
    "export and gate": ("export", "gate", "untrained-export", "ship"),
}  # fmt: skip
OTHER_WORK = "other"


def money_section(view: RunView) -> Section:
    """Section 8."""
    run, status = view.run, view.status
    question = "What did it cost, and what did the store save?"
    store, calls = run.cache / "teacher.db", status["calls"]
    by_stage = summarize_costs(store, "stage", run.name) if store.exists() else []
    if not by_stage:
        if not any(calls.values()):
            return Section("money", "Money", question)
        asked = format_count(calls["paid"], "call was", "calls were")
        said = f"{asked} asked and {calls['hits']:,} came from the store, by the records of the run."
        none = Paragraph(f"{said} The store beside this run has no details.")
        return Section("money", "Money", question, (none,))
    by_round = summarize_costs(store, "round", run.name)
    rates = rates_by_cost_figure(view.found["rounds"], by_round) if view.found else None
    parts: list[Part] = [*([rates] if rates else []), calls_figure(by_stage)]
    parts.append(costs_grid("Calls by stage", by_stage, "stage"))
    parts.append(costs_grid("Calls by round; round 0 includes the preparation", by_round, "round"))
    parts += [Paragraph(text) for text in [costs_caption(by_stage)] if text]
    budget = kept_recipe(run).budget.model_dump()
    if limits := [(f"budget.{name}", f"{value:,}") for name, value in budget.items() if value is not None]:
        parts.append(Facts(limits))
    return Section("money", "Money", question, parts)


def rates_by_cost_figure(rounds: Sequence[Mapping[str, Any]], by_round: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The rates of each round by what its calls cost so far: money or, without prices, calls; None without calls."""
    money = money_so_far(by_round)
    unit = "money" if money else "calls of the teacher and the judge"
    costs = {row["round"]: row["teacher_calls"] + row["judge_calls"] for row in rounds}
    if money:
        costs = {number: sum(money[up_to] for up_to in money if up_to <= number) for number in costs}
    points = []
    for point in rate_points(rounds):
        cost = costs[point["number"]]
        said = money_cell(cost) if money else f"{cost:,}"
        points.append({**point, "cost": cost, "tip": f"{point['tip']}; {unit} so far: {said}"})
    if len(points) < 2 or not any(costs.values()):
        return None
    names = list(dict.fromkeys(point["metric"] for point in points))

    def make(narrow: bool) -> Spec:
        axis = {"title": f"{unit} so far", "tickCount": 4 if narrow else 8, "grid": False}
        x = {"field": "cost", "type": "quantitative", "axis": axis}
        y = {"type": "quantitative", "axis": {"title": None, "format": "%", "tickCount": 5}, "scale": {"domainMin": 0}}
        shared = {"x": x, "color": color_by("metric", names, narrow)}
        rate = {**shared, "y": {"field": "rate", **y}}
        line = {"mark": {"type": "line", "strokeWidth": 2, "aria": False}, "encoding": rate}
        bars = {"mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6, "aria": False}, "encoding": {
            **shared, "y": {"field": "low", **y}, "y2": {"field": "high"}}}  # fmt: skip
        dots = {"mark": {"type": "circle", "size": 80, "opacity": 1}, "encoding": {
            **rate, "description": {"field": "tip"}}}  # fmt: skip
        above = {"type": "text", "dx": 7, "dy": -13, "align": "left", "aria": False}
        texts = {"mark": above, "encoding": {"x": x, "y": rate["y"], "text": {"field": "round"}},
            "transform": [{"filter": {"field": "metric", "equal": names[0]}}]}  # fmt: skip
        return {"height": 240, "data": inline_values(points), "layer": [bars, line, dots, texts]}

    counted = "at the prices of the recipe, evaluation included" if money else "the evaluation's are not counted"
    note = f"Bars: 95 % intervals. Numbers: the rounds. Calls from the store count as if they were asked; {counted}."
    return draw_figure(f"{names[0].capitalize()} by {'money' if money else 'calls'}", make, note)


def money_so_far(by_round: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """What the calls of each round cost, those from the store included; {} if a price is unknown or all are free."""
    if any(row["unpriced"] or row["unpriced_hits"] for row in by_round):
        return {}
    found = {int(row["round"]): row["money"] + row["saved"] for row in by_round}
    return found if any(found.values()) else {}


def calls_figure(by_stage: Sequence[Mapping[str, Any]]) -> Figure:
    """A stacked bar for each stage: calls asked, from the store, and failed."""
    kinds = {"paid": "asked", "from_store": "from the store", "failed": "failed attempts"}
    names = [name for key, name in kinds.items() if any(row[key] for row in by_stage)]
    bars = [
        {"stage": row["stage"], "kind": name, "calls": row[key], "tip": f"{row['stage']}: {row[key]:,} {name}"}
        for row in by_stage for key, name in kinds.items() if row[key]
    ]  # fmt: skip
    stages = [row["stage"] for row in by_stage]

    def make(narrow: bool) -> Spec:
        y = {"field": "stage", "type": "nominal", "sort": stages, "axis": {"title": None, "labelColor": INK}}
        x = {"field": "calls", "type": "quantitative", "axis": {"title": "calls", "tickCount": 4}}
        return {
            "height": {"step": 24},
            "data": inline_values(bars),
            "mark": {"type": "bar", "height": {"band": 0.72}},
            "encoding": {"y": y, "x": x, "color": color_by("kind", names, narrow), "description": {"field": "tip"}},
        }

    return draw_figure("Calls of the teacher and the judge", make)


def costs_grid(title: str, rows: Sequence[Mapping[str, Any]], by: str) -> Grid:
    """A row for each value of `by`, and their sum."""
    failed = ["failed"] if any(row["failed"] for row in rows) else []
    numbers = ["paid", "from_store", *failed, "tokens_in", "tokens_out"]
    heads = [by, "asked", *(name.replace("_", " ") for name in numbers[1:]), "money", "saved"]
    cells = [cost_row(str(row[by]), [row], numbers) for row in rows]
    return Grid(heads, cells, cost_row("all", rows, numbers), title=title)


def cost_row(name: str, rows: Sequence[Mapping[str, Any]], numbers: Sequence[str]) -> list[Cell]:
    """The sums of some rows."""
    counts = (count_number(int(sum(row[number] for row in rows))) for number in numbers)
    paid, saved = money_cells(rows)
    sums = [sum(row[key] for row in rows) for key in ("money", "saved")]
    return [Cell(name), *counts, Cell(paid, sums[0]), Cell(saved, sums[1])]


# Section 9


def time_section(status: Mapping[str, Any]) -> Section:
    """Section 9."""
    question = "Where did the time go?"
    places = {"preparation": status["prepare"]}
    places |= {f"round {row['number']}": row["stages"] for row in status["rounds"]} | {"end": status["end"]}
    bars = time_bars(places)
    if not bars:
        return Section("time", "Time", question)
    total = sum(stage["seconds"] or 0 for stage in all_stages(status))
    said = Paragraph(f"{clock(total)} in the stages that are done, without pauses between them.")
    timeline = timeline_figure(*lay_out(places))
    figures = [time_figure(bars), *([timeline] if timeline else [])]
    return Section("time", "Time", question, [said, *figures, stages_grid(places, status["folder"])])


def kind_of_work(stage: str) -> str:
    """What a stage spends its time on."""
    return next((kind for kind, stages in KINDS_OF_WORK.items() if stage in stages), OTHER_WORK)


def time_bars(places: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Seconds by place in the run and kind of work."""
    bars = []
    for place, stages in places.items():
        sums = Counter[str]()
        for stage in stages:
            sums[kind_of_work(stage["name"])] += stage["seconds"] or 0
        for order, kind in enumerate([*KINDS_OF_WORK, OTHER_WORK]):
            if sums[kind]:
                tip = f"{place}, {kind}: {clock(sums[kind])}"
                bars.append({"place": place, "kind": kind, "seconds": sums[kind], "order": order, "tip": tip})
    return bars


def time_figure(bars: Sequence[Mapping[str, Any]]) -> Figure:
    """A stacked bar for the preparation, each round and the end."""
    unit, divisor = time_unit(sum(bar["seconds"] for bar in bars))
    shown = [{**bar, "time": bar["seconds"] / divisor} for bar in bars]
    names = [kind for kind in (*KINDS_OF_WORK, OTHER_WORK) if any(bar["kind"] == kind for bar in bars)]

    def make(narrow: bool) -> Spec:
        y = {"field": "place", "type": "nominal", "sort": None, "axis": {"title": None, "labelColor": INK}}
        x = {"field": "time", "type": "quantitative", "axis": {"title": unit, "tickCount": 5}}
        order = {"field": "order", "type": "quantitative"}
        color = color_by("kind", names, narrow)
        return {
            "height": {"step": 28},
            "data": inline_values(shown),
            "mark": {"type": "bar", "height": {"band": 0.72}},
            "encoding": {"y": y, "x": x, "color": color, "order": order, "description": {"field": "tip"}},
        }

    return draw_figure("Time by round and kind of work", make)


def stages_grid(places: Mapping[str, Sequence[Mapping[str, Any]]], folder: str) -> Grid:
    """A row for each stage that is done: seconds, calls, its closing phrase without the path of the run's folder."""
    rows = [
        [
            *text_cells((f"{place} {stage['name']}",)),
            Cell("-" if stage["seconds"] is None else f"{stage['seconds']:,.1f}", stage["seconds"]),
            count_number(stage["paid"]),
            count_number(stage["hits"]),
            Cell((stage["note"] or "").replace(f"{folder}/", "")),
        ]
        for place, stages in places.items()
        for stage in stages
        if stage["done"]
    ]
    heads = ["stage", "seconds", "calls asked", "from the store", "result"]
    return Grid(heads, rows, title="Stages", wide=["result"], folded=True)
