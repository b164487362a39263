"""The head of a report and its first section: what the run is, its verdict, and the holdout round by round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.page.draw import Spec, color_by, draw_figure, inline_values, rule_at
from tapir_local.page.parts import (
    Cell,
    Facts,
    Figure,
    Grid,
    Paragraph,
    Part,
    Section,
    short_round_name,
)
from tapir_local.page.timeline import clock
from tapir_local.pipeline.loop import kept_recipe
from tapir_local.printable import format_count
from tapir_local.report.compare import CHANCE, compare_rounds, fallen_sentence, round_name, round_verdict
from tapir_local.report.compare_tables import METRIC_NAMES, difference_cells, rate_and_interval_cell, shown_metrics
from tapir_local.report.run_results import RunResults, read_run_results
from tapir_local.report.status import run_status
from tapir_local.report.tables import percent_cell, score_pair_cell
from tapir_local.run_dir import RunDir
from tapir_local.stages.ship import markdown_table, origin_rows, versions_line


@dataclass(frozen=True)
class RunView:
    """What several sections show of a run: its status, and once a round is evaluated its results, compared by round.

    `status` is what `status --json` prints, `found` what compare_rounds returns. `problem` says why there are no
    results although a round is evaluated. `prefix` stands before the anchors of a page's second and further runs.
    """

    run: RunDir
    status: Mapping[str, Any]
    found: Mapping[str, Any] | None = None
    results: RunResults | None = None
    problem: str = ""
    prefix: str = ""


def read_view(run: RunDir, prefix: str = "") -> RunView:
    """Read the status and the results of a run; results that cannot be read become a problem."""
    status = run_status(run)
    if not any(row["metrics"] for row in status["rounds"]):
        return RunView(run, status, prefix=prefix)
    try:
        (results,) = read_run_results([run])
        return RunView(run, status, compare_rounds(run), results, prefix=prefix)
    except TapirError as error:
        return RunView(run, status, problem=str(error), prefix=prefix)


def head_verdict(view: RunView) -> list[Paragraph]:
    """What the run achieved, and the reasons to doubt it."""
    if view.found is None:
        said = [Paragraph(f"No round is evaluated yet. State: {view.status['state'].rstrip('.')}.", "verdict")]
        said = [Paragraph(view.problem, "warning")] if view.problem else said
    else:
        said = [Paragraph(text, "verdict") for text in verdict_sentences(view.found)]
    return [*said, *(Paragraph(text, "warning") for text in view.status["warnings"])]


def verdict_sentences(found: Mapping[str, Any]) -> list[str]:
    """The sentences with which a run ends."""
    return [text for text in (round_verdict(found), fallen_sentence(found)) if text]


def head_tiles(view: RunView) -> list[tuple[str, str]]:
    """(name, value) of the figures that a reader looks for first."""
    tiles = []
    if view.found:
        first, last = view.found["rounds"][0], view.found["rounds"][-1]
        for metric in shown_metrics(view.found["rounds"]):
            if last[metric]:
                before = f"{percent_cell(first[metric]['mean'])} → " if first is not last and first[metric] else ""
                tiles.append((METRIC_NAMES[metric], before + percent_cell(last[metric]["mean"])))
        tiles.append(("best", round_name(view.found["best"]).removeprefix("the ")))
    seconds = sum(stage["seconds"] or 0 for stage in all_stages(view.status))
    tiles.append(("time", clock(seconds)))
    return [*tiles, ("calls asked", f"{view.status['calls']['paid']:,}")]


def head_facts(view: RunView) -> Facts:
    """What the run is: state, teacher, judge, student, data, calls, time, versions."""
    run, status = view.run, view.status
    recipe, record = kept_recipe(run), run.record()
    seconds = sum(stage["seconds"] or 0 for stage in all_stages(status))
    rows = [("state", status["state"]), ("about", recipe.about)]
    if (run.path / "seeds.jsonl").exists() and (run.path / "holdout.jsonl").exists():
        rows += [row for row in origin_rows(run, recipe) if row[0] != "all settings"]
    calls = status["calls"]
    rows += [
        ("started", str(record.get("started", ""))[:16].replace("T", " ") + " UTC" if record.get("started") else ""),
        ("time", f"{clock(seconds)} in {status['stages_done']} of {status['stages']} stages"),
        ("calls", f"{calls['paid']:,} asked, {calls['hits']:,} from the store"),
        ("made with", versions_line(record) if record else ""),
    ]
    return Facts([(name, text) for name, text in rows if text])


def all_stages(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The stages of a run's status, in order."""
    rounds = [stage for row in status["rounds"] for stage in row["stages"]]
    return [*status["prepare"], *rounds, *status["end"]]


def learning_section(view: RunView) -> Section:
    """Section 1: the rates of each round with their intervals, as a chart and a table."""
    question = "How good are the answers to the held-out rows, round by round?"
    if view.found is None or view.results is None:
        none = Paragraph(view.problem or "No round is evaluated yet.", "warning" if view.problem else "plain")
        return Section("learned", "Did it learn?", question, (none,))
    rounds = view.found["rounds"]
    drawn = any(row[metric] for row in rounds for metric in shown_metrics(rounds))
    parts: list[Part] = [rates_figure(rounds)] if drawn else []
    grid = rounds_grid(view.found, view.status, view.results.judge)
    return Section("learned", "Did it learn?", question, [*parts, grid])


def rates_figure(rounds: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy and win rate (or likeness) by round, with 95 % bands."""
    points = rate_points(rounds)
    names = list(dict.fromkeys(point["metric"] for point in points))
    top = min(1.0, 1.05 * max(0.55 if "win rate" in names else 0.1, *(point["high"] for point in points)))

    def make(narrow: bool) -> Spec:
        y = {
            "type": "quantitative",
            "axis": {"format": "%", "title": None, "tickCount": 5},
            "scale": {"domainMin": 0, "domainMax": top},
        }
        shared = {
            "x": {
                "field": "round", "type": "ordinal", "sort": None,
                "axis": {"labelAngle": 0, "title": "round", "labelOverlap": True}, "scale": {"padding": 0.3},
            },
            "color": color_by("metric", names, narrow),
        }  # fmt: skip
        band = {"mark": {"type": "area", "opacity": 0.16, "aria": False}, "encoding": {
            **shared, "y": {"field": "low", **y}, "y2": {"field": "high"}}}  # fmt: skip
        line = {"mark": {"type": "line", "strokeWidth": 2.5, "aria": False}, "encoding": {
            **shared, "y": {"field": "rate", **y}}}  # fmt: skip
        bars = {"mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6, "aria": False}, "encoding": {
            **shared, "y": {"field": "low", **y}, "y2": {"field": "high"}}}  # fmt: skip
        dots = {"mark": {"type": "point", "filled": True, "size": 70, "opacity": 1}, "encoding": {
            **shared, "y": {"field": "rate", **y}, "description": {"field": "tip"}}}  # fmt: skip
        level = rule_at("y", 0.5, "the teacher's level (win rate)") if "win rate" in names else []
        return {"height": 260, "data": inline_values(points), "layer": [*level, band, bars, line, dots]}

    note = "Bands: 95 % intervals. Round 0 is plain fine-tuning on the teacher's answers."
    return draw_figure("Rates on the held-out rows", make, note)


def rate_points(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A point for each rate of each round; the metric by which rounds are compared comes first."""
    points = []
    for metric in shown_metrics(rounds):
        for row in rounds:
            if not (rate := row[metric]):
                continue
            low, high = rate["interval"]
            name = short_round_name(row["round"])
            said = f"{name if name == 'untrained' else f'round {name}'}: {METRIC_NAMES[metric]} "
            points.append(
                {
                    "metric": METRIC_NAMES[metric],
                    "round": name,
                    "number": row["round"],
                    "rate": rate["mean"],
                    "low": low,
                    "high": high,
                    "tip": said
                    + f"{rate['mean']:.1%} (95 %: {low:.1%} to {high:.1%}), {format_count(rate['rows'], 'row')}",
                }
            )
    return points


def rounds_grid(found: Mapping[str, Any], status: Mapping[str, Any], judge: str) -> Grid:
    """A row for each round: rates with intervals, change on the round before, scores, rows."""
    metrics = [name for name in shown_metrics(found["rounds"]) if any(row[name] for row in found["rounds"])]
    measured = {row["number"]: row["metrics"] or {} for row in status["rounds"]} | {-1: status["untrained"] or {}}
    heads = [
        "round",
        *(f"{METRIC_NAMES[name]} (95 %)" for name in metrics),
        f"change in {METRIC_NAMES[found['metric']]}, points",
        "p",
        "score, student : teacher",
        "rows",
        "judged",
    ]
    rows = []
    for row in found["rounds"]:
        change, values = row["change"], measured[row["round"]]
        best = row["round"] == found["best"]
        chance = " chance?" if change and change["p"] >= CHANCE else ""
        rates = [Cell(rate_and_interval_cell(row[name]), row[name] and row[name]["mean"]) for name in metrics]
        said = difference_cells(change)
        rows.append(
            [
                Cell(
                    short_round_name(row["round"]) + (" (best)" if best else ""), row["round"], "best" if best else ""
                ),
                *rates,
                Cell(said[0] + chance, change and change["mean"], change_mark(change)),
                Cell(said[2], change and change["p"]),
                Cell(score_pair_cell([values.get("student_score"), values.get("teacher_score")])),
                Cell(f"{values.get('rows', 0):,}"),
                Cell(f"{values.get('judged', 0):,}"),
            ]
        )
    tie = "A tie counts as half a win. " if "win_rate" in metrics else ""
    note = (
        "Change: on the round before, with its paired 95 % interval; it may be chance where p is 0.05 or more. "
        f"{tie}Judge: {judge}."
    )
    verdict = " ".join(verdict_sentences(found))
    cells = markdown_table(heads, [[cell.text for cell in row] for row in rows])
    return Grid(heads, rows, note=note, markdown=f"**{found['run']}**: {verdict}\n\n{cells}\n")


def change_mark(change: Mapping[str, Any] | None) -> Any:
    """Whether a change is good or bad beyond chance."""
    if not change or change["p"] >= CHANCE:
        return ""
    return "good" if change["mean"] > 0 else "bad"
