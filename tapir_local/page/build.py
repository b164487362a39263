"""Put the sections of one or several runs together and write them as one HTML file."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tapir_local import __version__
from tapir_local.errors import TapirError
from tapir_local.files import check_output, write_text
from tapir_local.page.answers import answers_section
from tapir_local.page.by_task import tasks_section
from tapir_local.page.checks import again_section, gate_section_of, labels_section
from tapir_local.page.comparison import comparison_section
from tapir_local.page.curriculum import curriculum_section, new_data_section
from tapir_local.page.draw import check_chart_library
from tapir_local.page.judging import judge_section
from tapir_local.page.parts import Facts, Paragraph, Section
from tapir_local.page.spending import money_section, time_section
from tapir_local.page.summary import (
    RunView,
    head_facts,
    head_tiles,
    head_verdict,
    learning_section,
    read_view,
)
from tapir_local.page.training_log import training_section
from tapir_local.printable import printable
from tapir_local.report.compare import check_run_names
from tapir_local.resources import PACKAGE
from tapir_local.run_dir import RunDir

PAGE_FILES = PACKAGE / "assets" / "report_page"
GENERATOR = "tapir-local report"  # the mark by which a page of ours is known
MARK_BYTES = 2_000  # the mark is in this many bytes of a page's beginning

# The sections in the order of what readers look for.
PAGE_SECTIONS: Sequence[tuple[str, str, Callable[[RunView], Section]]] = (
    ("learned", "Did it learn?", learning_section),
    ("answers", "Answers", answers_section),
    ("tasks", "Where?", tasks_section),
    ("training", "Training", lambda view: training_section(view.run)),
    ("curriculum", "Curriculum", lambda view: curriculum_section(view.run)),
    ("new-data", "New data", lambda view: new_data_section(view.run)),
    ("judge", "Judge", lambda view: judge_section(view.run)),
    ("money", "Money", money_section),
    ("time", "Time", lambda view: time_section(view.status)),
    ("labels", "Labels", lambda view: labels_section(view.run)),
    ("gate", "The gate", lambda view: gate_section_of(view.run)),
    ("again", "Do it again", lambda view: again_section(view.run)),
)


@dataclass(frozen=True)
class RunPage:
    """One run on a page: its name, verdict, first figures, facts and sections."""

    name: str
    prefix: str
    verdict: Sequence[Paragraph]
    tiles: Sequence[tuple[str, str]]
    facts: Facts
    sections: Sequence[Section]


def build_page(runs: Sequence[RunDir]) -> str:
    """The report of one run, or of several that are compared with the first, as HTML.

    TapirError if runs cannot be compared or the chart library is missing. What cannot be read of a single run is said
    in its section.
    """
    check_chart_library()
    if len(runs) > 1:
        check_run_names([run.name for run in runs])
    comparison = comparison_section(runs) if len(runs) > 1 else None
    pages = [run_page(run, f"run{number}-" if number > 1 else "") for number, run in enumerate(runs, 1)]
    return render_page(pages, comparison)


def run_page(run: RunDir, prefix: str) -> RunPage:
    """What the page has of a run."""
    view = read_view(run, prefix)
    sections = [read_section(view, anchor, title, make) for anchor, title, make in PAGE_SECTIONS]
    shown = [section for section in sections if section.parts]
    return RunPage(run.name, prefix, head_verdict(view), head_tiles(view), head_facts(view), shown)


def read_section(view: RunView, anchor: str, title: str, make: Callable[[RunView], Section]) -> Section:
    """A section; if its files cannot be read, a section that says so."""
    try:
        return make(view)
    except TapirError as error:
        return Section(anchor, title, "", (Paragraph(str(error), "warning"),))


def render_page(pages: Sequence[RunPage], comparison: Section | None) -> str:
    """The HTML of a page.

    Every text is escaped. The page may run only the script with the hash in its policy, and load nothing.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    style, script = ((PAGE_FILES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(PAGE_FILES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=printable_value,
    )
    return environment.get_template("page.html").render(
        generator=GENERATOR,
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        pages=pages,
        comparison=comparison,
    )


def printable_value(value: Any) -> Any:
    """A text with unsafe characters made visible; other values, and HTML of ours, as they are."""
    return printable(value) if type(value) is str else value


def default_output(runs: Sequence[RunDir]) -> Path:
    """Where a report is written if no file is named: in the folder of the first run."""
    return runs[0].path / ("report.html" if len(runs) == 1 else "report-compared.html")


def check_page_output(out: Path, runs: Sequence[RunDir], force: bool) -> None:
    """TapirError if `out` is a file of a run or, without `force`, exists and is not a report of ours."""
    files = (path for run in runs for path in run.path.rglob("*") if path.suffix != ".html")
    check_output(
        out,
        [*(run.cache / "teacher.db" for run in runs), *files],
        force=force or is_own_page(out),
        fix="It is not a report of this program. Name another file with -o, or overwrite it with --force.",
    )


def is_own_page(path: Path) -> bool:
    """Whether a file is a report that this program wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}'.encode() in file.read(MARK_BYTES)


def write_page(runs: Sequence[RunDir], out: Path, *, force: bool = False) -> int:
    """Write the report of runs to a file, which is complete or absent; return its size in bytes."""
    check_page_output(out, runs, force)
    text = build_page(runs)
    write_text(out, text)
    return len(text.encode())
