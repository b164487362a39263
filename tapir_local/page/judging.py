"""Section 6 of a report: may the judge be believed?"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tapir_local.page.draw import MUTED, SERIES, Spec, draw_figure, inline_values
from tapir_local.page.parts import Cell, Figure, Grid, Paragraph, Part, Section
from tapir_local.pipeline.loop import last_round
from tapir_local.printable import format_count
from tapir_local.records import Judgement
from tapir_local.report.status import round_judge_quality
from tapir_local.report.status_tables import JUDGE_MEASURES
from tapir_local.report.why import read_judgements
from tapir_local.run_dir import UNTRAINED_ROUND, RunDir


def judge_section(run: RunDir) -> Section:
    """Section 6."""
    question = "May the scores be believed?"
    numbers = [number for number in (UNTRAINED_ROUND, *range(last_round(run) + 1)) if run.round(number).is_dir()]
    found = {number: sets for number in numbers if (sets := round_judge_quality(run, number))}
    if not found:
        return Section("judge", "Judge", question)
    columns = {
        f"{round_column(number)} {name}": values for number, sets in found.items() for name, values in sets.items()
    }
    notes = [f"{column}: {note}" for column, values in columns.items() for note in values["notes"]]
    parts: list[Part] = [Paragraph(note[0].upper() + note[1:], "warning") for note in notes]
    last = max(found)
    for name, file in (("holdout", "holdout-judgements"), ("pool", "judgements")):
        judged = [row for row in read_judgements(run, last, file).values() if row.teacher is not None]
        if len({(row.student, row.teacher) for row in judged}) > 1:
            parts.append(scores_figure(judged, f"Scores in round {last}, {name}"))
    return Section("judge", "Judge", question, [*parts, measures_grid(columns)])


def round_column(number: int) -> str:
    """`round 2`, or `untrained`."""
    return "untrained" if number == UNTRAINED_ROUND else f"round {number}"


def measures_grid(columns: Mapping[str, Mapping[str, Any]]) -> Grid:
    """A row for each set of judgements, a column for each measure."""
    shown = [key for key in JUDGE_MEASURES if any(values.get(key) is not None for values in columns.values())]
    rows = []
    for name, values in columns.items():
        cells = [Cell(name)]
        for key in shown:
            value = values.get(key)
            cells.append(Cell("-" if value is None else JUDGE_MEASURES[key][1].format(value), value))
        rows.append(cells)
    return Grid(["judgements", *(JUDGE_MEASURES[key][0] for key in shown)], rows)


def scores_figure(judged: Sequence[Judgement], title: str) -> Figure:
    """The student's score against the teacher's, a circle for each pair of scores, as large as it has rows."""
    counts = Counter((round(row.student or 0, 1), round(row.teacher or 0, 1)) for row in judged)
    points = [
        {"student": student, "teacher": teacher, "rows": rows,
         "tip": f"student {student:g}, teacher {teacher:g}: {format_count(rows, 'row')}"}
        for (student, teacher), rows in counts.most_common()
    ]  # fmt: skip

    def make(narrow: bool) -> Spec:
        def channel(name: str) -> Spec:
            axis = {"title": f"the {name}'s score", "values": list(range(1, 11))}
            return {
                "field": name,
                "type": "quantitative",
                "axis": axis,
                "scale": {"domain": [0.5, 10.5], "nice": False},
            }

        dots = {
            "data": inline_values(points), "mark": {"type": "circle", "opacity": 0.65, "color": SERIES[0]},
            "encoding": {
                "x": channel("student"), "y": channel("teacher"), "description": {"field": "tip"},
                "size": {
                    "field": "rows", "type": "quantitative", "legend": None,
                    "scale": {"range": [20, 900 if narrow else 1600]},
                },
            },
        }  # fmt: skip
        same = {
            "data": inline_values([{"student": 1, "teacher": 1}, {"student": 10, "teacher": 10}]),
            "mark": {"type": "line", "strokeDash": [4, 4], "color": MUTED, "strokeWidth": 1, "aria": False},
            "encoding": {"x": channel("student"), "y": channel("teacher")},
        }  # fmt: skip
        return {"height": 260, "layer": [same, dots]}

    mean = "Mean of both orders. " if any(sum(map(bool, row.orders)) > 1 for row in judged) else ""
    note = "On the dashed line both have the same score; above it the teacher's answer is better."
    return draw_figure(title, make, mean + note)
