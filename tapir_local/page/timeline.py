"""The stages of a run on a line of time, one after the other, without the pauses between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from tapir_local.page.draw import INK, Spec, color_by, draw_figure, inline_values
from tapir_local.page.parts import Figure

PAUSE_SECONDS = 60.0  # a longer time without a stage is a pause of the run
LEAST_SHARE = 0.005  # of the whole time: shorter stages would be invisible


@dataclass(frozen=True)
class Bar:
    """A finished stage: its place in the run (`round 1`), and its begin and end in seconds of work since the start."""

    place: str
    stage: str
    begin: float
    end: float


def time_unit(seconds: float) -> tuple[str, int]:
    """The unit for an axis of times, and its seconds."""
    return ("hours", 3600) if seconds > 3 * 3600 else ("minutes", 60) if seconds > 180 else ("seconds", 1)


def lay_out(places: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[Bar], float | None]:
    """(a bar for each finished stage in the order of their ends, the seconds of all pauses).

    A stage is recorded with the moment of its end and the seconds of its last process. Records of an older version have
    no moment: then the stages are laid end to end in their order, and the pauses are None.
    """
    done = [(place, stage) for place, stages in places.items() for stage in stages if stage["seconds"] is not None]
    known = all(stage["finished"] for _, stage in done)
    if known:
        done.sort(key=lambda pair: str(pair[1]["finished"]))  # stable: the moments are whole seconds
    bars, now, paused, before = list[Bar](), 0.0, 0.0, None
    for place, stage in done:
        moment = datetime.fromisoformat(stage["finished"]).timestamp() if known else None
        if moment is not None and before is not None:
            gap = max(0.0, moment - stage["seconds"] - before)
            now, paused = (now, paused + gap) if gap > PAUSE_SECONDS else (now + gap, paused)
        bars.append(Bar(place, stage["name"], now, now + stage["seconds"]))
        now, before = bars[-1].end, moment
    return bars, paused if known else None


def timeline_figure(bars: Sequence[Bar], paused: float | None) -> Figure | None:
    """A row for each stage that took long in a round, and in it a bar for each round; None if nothing took time."""
    whole = bars[-1].end if bars else 0.0
    long = {bar.stage for bar in bars if bar.end - bar.begin >= LEAST_SHARE * whole}
    shown = [bar for bar in bars if bar.stage in long]
    if not shown or not whole:
        return None
    unit, divisor = time_unit(whole)
    rows = [
        {"stage": bar.stage, "place": bar.place, "begin": bar.begin / divisor, "end": bar.end / divisor,
         "tip": f"{bar.place}, {bar.stage}: {clock(bar.begin)} to {clock(bar.end)}"}
        for bar in shown
    ]  # fmt: skip
    places = list(dict.fromkeys(bar.place for bar in shown))
    stages = list(dict.fromkeys(bar.stage for bar in shown))

    def make(narrow: bool) -> Spec:
        y = {"field": "stage", "type": "nominal", "sort": stages, "axis": {"title": None, "labelColor": INK}}
        axis = {"title": f"{unit} of work", "tickCount": 4 if narrow else 8, "grid": True}
        x = {"field": "begin", "type": "quantitative", "axis": axis, "scale": {"domain": [0, whole / divisor]}}
        color = color_by("place", places, narrow)
        return {
            "height": {"step": 20},
            "data": inline_values(rows),
            "mark": {"type": "bar", "height": {"band": 0.7}},
            "encoding": {
                "y": y,
                "x": x,
                "x2": {"field": "end"},
                "color": color,
                "stroke": {**color, "legend": None},  # a bar thinner than a pixel is visible by its outline
                "description": {"field": "tip"},
            },
        }

    return draw_figure("The stages in the order in which they ran", make, timeline_note(paused))


def timeline_note(paused: float | None) -> str:
    """How the bars lie, and what is left out."""
    short = f"Stages that took less than {LEAST_SHARE:.1%} of the time in every round are left out."
    if paused is None:
        return f"This run recorded no times of day, so its stages lie end to end. {short}"
    pauses = f" Pauses of the run ({clock(paused)} in all) are cut out." if paused else ""
    return f"By the times of day in run.json; of a stage that was interrupted, its last part.{pauses} {short}"


def clock(seconds: float) -> str:
    """`0:04:31`."""
    return str(timedelta(seconds=round(seconds)))
