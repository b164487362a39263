"""A run as lines: what is printed and when, run.log, resume, interruption; and which display is chosen."""

import os
import re
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import World, fake_backends, make_recipe
from rich.console import Console
from run_display import Clock, finished_run, printed, record_console, set_taken, step_of

from tapir_local.errors import TapirError
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Progress
from tapir_local.run_dir import RunDir, lock_run, read_progress
from tapir_local.stages.context import Backends
from tapir_local.teacher.budget import Cost
from tapir_local.teacher.rate_limit import CallMeter
from tapir_local.terminal.lines import closing_phrase, format_speed, wrap_line
from tapir_local.terminal.progress import RunDisplay, choose_display, make_bars
from tapir_local.terminal.run_state import RunState

LINE = re.compile(r"\d\d:\d\d:\d\d  (prepare|round \d|end)  [a-z-]+  .*")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunDir]:
    """A run that stands before the training of round 2, to be copied."""
    return finished_run(tmp_path_factory.mktemp("base"), until=(2, "train"))


@pytest.fixture
def cut(base: tuple[Recipe, RunDir], tmp_path: Path) -> tuple[Recipe, RunDir]:
    """A copy of that run."""
    recipe, run = base
    shutil.copytree(run.cache, tmp_path / "cache")
    return recipe, RunDir(tmp_path / "cache", run.name)


def show(recipe: Recipe, run: RunDir, kind: Any, clock: Clock, tools: Backends) -> Console:
    """Run it to the end, or to the world's interruption, and return the console."""
    console = record_console()
    with RunDisplay(console, kind, recipe, run, clock).showing(tools) as watch:
        distill(recipe, run, tools, watch)
    return console


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(what a run in lines prints, its log): it is interrupted in the middle, and resumed."""
    folder, clock, world = tmp_path_factory.mktemp("lines"), Clock(), World()
    recipe, run, tools = make_recipe(folder), RunDir(folder / "cache", "fake"), fake_backends(world)
    world.fail_at = 200
    with pytest.raises(KeyboardInterrupt):
        show(recipe, run, "lines", clock, tools)
    world.fail_at = None
    clock.now += 24 * 3600
    return printed(show(recipe, run, "lines", clock, tools)), run.path / "run.log"


def test_each_stage_has_a_line_with_its_time(shown: tuple[str, Path]) -> None:
    text, _ = shown
    stages = [line for line in text.splitlines() if LINE.fullmatch(line)]
    assert [line.split("  ")[2] for line in stages if "round 2" in line][-2:] == ["holdout-judge", "evaluate"]
    assert "  end  ship" in text
    (refined,) = [line for line in stages if "round 2  refine" in line]
    assert re.search(r"refine  20 rows, .* asked(, \d+ from the store)?  \d\.\d s", refined)
    assert "paid" not in text


def test_the_log_has_all_lines_with_dates_from_the_first_start_to_the_end(shown: tuple[str, Path]) -> None:
    text, log = shown
    lines = log.read_text().splitlines()
    assert all(re.match(r"2027-01-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    said = [line[21:] for line in lines]
    starts = [at for at, line in enumerate(said) if line.startswith("start of fake: ")]
    assert len(starts) == 2
    assert said[0] == "start of fake: 0 of 40 stages done before"
    assert re.fullmatch(r"stopped in round-\d\d/[a-z-]+: Ctrl-C", said[starts[1] - 1])
    assert len({line[:10] for line in lines}) == 2  # it was resumed on the next day
    assert said[-1].startswith("done in ")
    first_lines = [line[10:] for line in text.splitlines() if LINE.fullmatch(line)]
    assert all(any(whole.startswith(line) for whole in said) for line in first_lines)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_the_progress_file_is_gone_after_a_run(shown: tuple[str, Path]) -> None:
    assert not list(shown[1].parent.glob(".progress*"))


def test_nothing_is_printed_without_a_display_but_the_log_is_written(cut: tuple[Recipe, RunDir]) -> None:
    recipe, run = cut
    assert printed(show(recipe, run, "none", Clock(), fake_backends(World()))) == ""
    assert "end  ship" in (run.path / "run.log").read_text()


def test_progress_is_printed_after_30_seconds_and_then_every_5_minutes(cut: tuple[Recipe, RunDir]) -> None:
    recipe, run = cut
    set_taken(run, {"round-01/train": {"seconds": 1000.0}})
    clock = Clock()

    def train(*, progress: Progress, **rest: Any) -> None:
        for done in range(1, 101):
            clock.now += 10.0
            progress(done, 100, f"loss {done}")
        fake_backends(World()).train(progress=progress, **rest)

    text = printed(show(recipe, run, "log", clock, replace(fake_backends(World()), train=train)))
    assert "  round 2  train  start, takes about 16:40" in text
    (first,) = [line for line in text.splitlines() if "round 2  train  4/100" in line]
    assert first.endswith("round 2  train  4/100  0.1/s  16:00 left  loss 4")
    assert len(re.findall(r"round 2  train  \d+/100", text)) == 4  # after 40, 350, 660 and 970 seconds


def test_remarks_before_the_lock_are_printed_and_logged_too(cut: tuple[Recipe, RunDir]) -> None:
    recipe, run = cut
    console, clock = record_console(), Clock()
    display = RunDisplay(console, "lines", recipe, run, clock)
    display.say("the store was damaged")
    assert not (run.path / "run.log").exists()  # the run may belong to another process
    backends = fake_backends(World())
    with display.showing(backends) as watch:
        distill(recipe, run, backends, watch)
    assert printed(console).count("the store was damaged") == 1
    assert (run.path / "run.log").read_text().count("the store was damaged") == 1


@pytest.mark.parametrize("width", [40, 78, 140])
def test_words_are_kept_whole(width: int) -> None:
    text = "round 1  judge  4,000 rows judged by gpt-4o-mini, 61% hard; 8,000 asked, 12 from the store, 1.12  12:31"
    first, *rest = wrap_line(text, width)
    assert len(first) <= width - len("22:31:07  ")
    assert all(len(line) <= width for line in rest)
    assert " ".join([first, *rest]).split() == text.split()


def test_a_log_that_cannot_be_written_stops_nothing(cut: tuple[Recipe, RunDir]) -> None:
    recipe, run = cut
    (run.path / "run.log").mkdir()
    assert "end  ship" in printed(show(recipe, run, "lines", Clock(), fake_backends(World())))


def test_status_knows_how_far_a_run_at_work_is(cut: tuple[Recipe, RunDir]) -> None:
    recipe, run = cut
    clock, console = Clock(), record_console()
    display = RunDisplay(console, "none", recipe, run, clock)
    state = display.state
    with lock_run(run):
        display.begins(step_of(state, "round-02/train"))
        display.progress(1, 4, "loss 2")
        clock.now += 0.5
        display.progress(2, 4, "loss 2")  # too early to be written again
        assert (read_progress(run) or {})["done"] == 0
        clock.now += 0.5
        display.progress(3, 4, "loss 2")
        found = read_progress(run)
        assert found
        assert (found["step"], found["round"], found["rounds"]) == ("round-02/train", 2, 2)
        assert (found["done"], found["total"], found["process"]) == (3, 4, os.getpid())
        assert found["seconds_left"] == 0
        assert stat.S_IMODE((run.path / ".progress.json").stat().st_mode) == 0o600
    assert read_progress(run) is None  # no process works on it: the file is of one that was killed


@pytest.mark.parametrize(
    ("kind", "quiet", "terminal", "term", "chosen"),
    [
        (None, False, True, "xterm", "full"),
        (None, False, False, "xterm", "lines"),
        (None, False, True, "dumb", "log"),
        ("lines", False, True, "xterm", "lines"),
        ("lines", False, True, "dumb", "log"),
        ("log", False, True, "xterm", "log"),
        ("none", True, True, "xterm", "none"),
        (None, True, False, "xterm", "none"),
        ("full", False, False, "xterm", "error"),
        ("full", False, True, "dumb", "error"),
        ("lines", True, True, "xterm", "error"),
    ],
)
def test_which_display_is_used(kind: str | None, quiet: bool, terminal: bool, term: str, chosen: str) -> None:
    console = record_console(terminal=terminal, _environ={"TERM": term})
    if chosen == "error":
        with pytest.raises(TapirError):
            choose_display(kind, quiet, console)
    else:
        assert choose_display(kind, quiet, console) == chosen


def test_forced_colors_make_no_terminal_of_a_pipe() -> None:
    console = Console(file=record_console().file, _environ={"FORCE_COLOR": "1"})
    assert console.is_terminal
    assert choose_display(None, False, console) == "lines"
    assert make_bars(console, "lines") is None


def test_rates_are_readable() -> None:
    assert [format_speed(rate) for rate in (None, 0.01, 0.5, 12.34, 1234.5)] == [
        "",
        "0.6/min",
        "0.5/s",
        "12.3/s",
        "1,234/s",
    ]


def test_money_and_failures_of_a_stage_are_those_that_came_in_it(cut: tuple[Recipe, RunDir]) -> None:
    recipe, run = cut
    spent, meter, state = [Cost(10, 100, 1.0)], CallMeter(), RunState(recipe, run, Clock())
    state.connect(meter, lambda: spent[0])
    step = step_of(state, "round-02/train")
    meter.count("rate_limited", 50)  # of the step before
    state.begins(step)
    spent[0] = Cost(20, 200, 1.25)
    meter.count("rate_limited", 2)
    meter.count("unreadable")
    found = state.ends(step, {"note": "20 rows; a remark", "paid": 10, "hits": 2, "seconds": 3.0})
    assert closing_phrase(found) == "20 rows; 10 asked, 2 from the store, 0.2500; 429: 2, 1 unreadable"
    assert found.remarks == ("a remark",)
    (run.round(2) / "adapter").mkdir()
    set_taken(run, {"round-02/train": {"note": "20 rows", "seconds": 3.0}})
    state.begins(step_of(state, "round-02/export"))
    assert state.finished[-1] == found  # run.json knows no money


def test_the_bar_of_a_new_stage_has_no_total_of_the_stage_before(cut: tuple[Recipe, RunDir]) -> None:
    recipe, run = cut
    console = record_console(terminal=True, _environ={"TERM": "xterm"})
    display = RunDisplay(console, "lines", recipe, run, Clock())
    assert display.bars
    for name in ("round-02/train", "round-02/export"):
        display.begins(step_of(display.state, name))
        (bar,) = display.bars.tasks
        assert (bar.total, bar.completed, bar.fields["said"]) == (None, 0, "starting")
        display.progress(3, 2386, "at work")
        assert bar.total == 2386


def test_a_run_in_lines_begins_with_what_it_will_do(cut: tuple[Recipe, RunDir]) -> None:
    recipe, run = cut
    console = record_console()
    RunDisplay(console, "lines", recipe, run, Clock()).print_header(30)
    said = dict(line.rstrip().split(maxsplit=1) for line in printed(console).splitlines())
    assert said["run"] == f"fake in {run.path}"
    assert said["rounds"] == "0 (plain fine-tuning) to 2, 20 rows each after round 0"
    assert said["stages"] == "40, 30 of them done before; Ctrl-C stops, the same command resumes"
    assert {"student", "teacher", "judge", "seeds", "budget"} <= said.keys()
