"""Draw charts: Vega-Lite specifications become SVG images with vl-convert.

Why this library: the images are drawn when the page is written, so the page has no chart code at all (Vega's would be
0.8 MB, Bokeh's 1 MB, Plotly's 4.6 MB), needs no `eval` and prints well. Vega, Vega-Lite and vl-convert have BSD
licenses. Colors are CSS variables, which a browser resolves, so that one image serves light and dark screens.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.page.parts import Figure
from tapir_local.printable import printable

Spec = dict[str, Any]
WIDE, NARROW = 860, 340  # pixels; a phone of 360 pixels has margins of 10
FONT = "Arial, Helvetica, Liberation Sans, sans-serif"  # vl-convert measures texts in Liberation Sans, which is as wide
SERIES = tuple(f"var(--c{number})" for number in range(1, 9))
INK, MUTED, LINE, GOOD, BAD = "var(--ink)", "var(--muted)", "var(--line)", "var(--good)", "var(--bad)"
CONFIG: Mapping[str, Any] = {
    "font": FONT,
    "background": None,
    "padding": {"left": 8, "right": 8, "top": 4, "bottom": 4},
    "view": {"stroke": None},
    "axis": {
        "labelColor": MUTED, "titleColor": MUTED, "gridColor": LINE, "domainColor": LINE, "tickColor": LINE,
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 150, "titlePadding": 8,
        "labelSeparation": 8,
    },
    "legend": {
        "labelColor": INK, "titleColor": MUTED, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
        "orient": "top", "symbolType": "circle", "labelLimit": 260, "offset": 8, "columnPadding": 16,
        "symbolOpacity": 1,
    },
    "text": {"color": INK, "fontSize": 12},
}  # fmt: skip


def draw_figure(title: str, make: Callable[[bool], Spec], note: str = "") -> Figure:
    """The chart that `make` describes, drawn for wide and for narrow screens; `make` is called with `narrow`."""
    return Figure(draw_svg(make(False), WIDE), draw_svg(make(True), NARROW), title, note)


def check_chart_library() -> None:
    """TapirError if vl-convert is not installed."""
    if find_spec("vl_convert") is None:
        raise TapirError(
            "the package vl-convert-python, which draws the charts of a report, is not installed",
            fix="pip install 'tapir-local[report]', or in a checkout pip install '.[report]'",
        )


def draw_svg(spec: Spec, width: int) -> str:
    """A Vega-Lite specification as SVG, `width` pixels wide with its axes."""
    import vl_convert

    whole = {"width": width, "autosize": {"type": "fit-x", "contains": "padding"}, "config": CONFIG, **spec}
    svg = str(vl_convert.vegalite_to_svg(printable_texts(whole), allowed_base_urls=[]))
    return svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "", 1)


def printable_texts(value: Any) -> Any:
    """A specification with printable texts: a NUL in one ends the process in vl-convert 1.9."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {key: printable_texts(item) for key, item in value.items()}
    return [printable_texts(item) for item in value] if isinstance(value, list | tuple) else value


def legend_columns(narrow: bool, names: Sequence[str]) -> int:
    """The number of a legend's columns that fit the width; a letter takes about 7 pixels."""
    longest = max((len(name) for name in names), default=1)
    return max(1, min(len(names), (NARROW if narrow else WIDE) // (longest * 7 + 40)))


def color_by(field: str, names: Sequence[str], narrow: bool, colors: Sequence[str] = SERIES) -> Spec:
    """The color channel of a field whose values are `names`; the colors repeat if there are more names."""
    scale = {"domain": list(names), "range": [colors[at % len(colors)] for at in range(len(names))]}
    legend = {"title": None, "columns": legend_columns(narrow, names)}
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend}


def color_of_lines(field: str, names: Sequence[str], narrow: bool) -> Spec:
    """The color channel of a chart of lines only: its legend shows strokes."""
    color = color_by(field, names, narrow)
    return {**color, "legend": {**color["legend"], "symbolType": "stroke", "symbolStrokeWidth": 3}}


def inline_values(rows: Sequence[Mapping[str, Any]]) -> Spec:
    """The data of a chart."""
    return {"values": list(rows)}


def rule_at(axis: str, value: float, text: str) -> list[Spec]:
    """A dashed line across a chart at a value of an axis, with a label."""
    across = {
        "data": inline_values([{"at": value, "text": text}]),
        "encoding": {axis: {"field": "at", "type": "quantitative"}},
    }
    line = {**across, "mark": {"type": "rule", "strokeDash": [4, 4], "color": MUTED, "aria": False}}
    place = (
        {"x": 4, "dy": -6, "align": "left"} if axis == "y" else {"y": 2, "dx": 4, "align": "left", "baseline": "top"}
    )
    label = {
        **across,
        "mark": {"type": "text", "color": MUTED, "fontSize": 11, "aria": False, **place},
        "encoding": {**across["encoding"], "text": {"field": "text"}},
    }
    return [line, label]
