"""`--json` of a run: an object a line for each event, whose fields are documented, and an error as the last one."""

import io
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from command_line import ROOT
from fakes import World, fake_backends, make_recipe
from run_display import Clock, record_console

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.pipeline.loop import distill
from tapir_local.run_dir import RunDir
from tapir_local.terminal.events import EVENT_INTERVAL, RunEvents, telling_stop
from tapir_local.terminal.progress import RunDisplay

Event = dict[str, Any]


class TickingClock(Clock):
    """A second passes whenever the time is read."""

    def __call__(self) -> float:
        self.now += 1
        return self.now


def lines(text: str) -> list[Event]:
    return [json.loads(line) for line in text.splitlines()]


def watched(folder: Path, world: World) -> list[Event]:
    """The events of a run that goes on to its end or to the world's interruption."""
    recipe, run, tools = make_recipe(folder), RunDir(folder / "cache", "fake"), fake_backends(world)
    events, written = RunEvents(), io.StringIO()
    display = RunDisplay(record_console(), "none", recipe, run, TickingClock(), events)
    events.now = display.now
    stopped = pytest.raises(KeyboardInterrupt) if world.fail_at else nullcontext()
    with redirect_stdout(written), stopped, telling_stop(events):
        events.start(display.state)
        display.say("a remark before the first stage")
        with display.showing(tools) as watch:
            count = distill(recipe, run, tools, watch)
        events.done(display.state, count)
    return lines(written.getvalue())


@pytest.fixture(scope="module")
def cut_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], list[Event]]:
    """The events of a run that is stopped in a round, and of the same command again."""
    world, folder = World(), tmp_path_factory.mktemp("events")
    world.fail_at = 200
    before = watched(folder, world)
    world.fail_at = None
    return before, watched(folder, world)


def test_each_event_of_a_run_has_its_line(cut_and_resumed: tuple[list[Event], list[Event]]) -> None:
    before, after = cut_and_resumed
    assert [before[0]["event"], before[-1]["event"], after[-1]["event"]] == ["start", "error", "done"]
    assert (before[-1]["what"], before[-1]["exit_code"]) == ("stopped by Ctrl-C", 130)
    assert before[-1]["step"] == [one for one in before if one["event"] == "stage"][-1]["step"]
    assert before[1]["text"] == "a remark before the first stage"
    done = [[one["step"] for one in found if one["event"] == "stage_done"] for found in (before, after)]
    assert (before[0]["stages_done"], after[0]["stages_done"]) == (0, len(done[0]))
    assert after[-1]["stages_run"] == len(done[1]) == after[0]["stages"] - after[0]["stages_done"]
    measured = [one["round"] for found in (before, after) for one in found if one["event"] == "metrics"]
    assert measured == [-1, 0, 1, 2]
    assert "accuracy" in after[-1]["verdict"] or "win rate" in after[-1]["verdict"]
    assert Path(after[-1]["gguf"]).exists()
    assert Path(after[-1]["log"]).exists()
    assert sum(one["paid"] for found in (before, after) for one in found if one["event"] == "stage_done") > 0


def test_progress_comes_at_most_every_five_seconds(cut_and_resumed: tuple[list[Event], list[Event]]) -> None:
    for part in cut_and_resumed:
        found = [datetime.fromisoformat(one["time"]) for one in part if one["event"] == "progress"]
        assert len(found) > 1
        assert min((later - before).total_seconds() for before, later in pairwise(found)) >= EVENT_INTERVAL


def test_the_fields_are_those_of_the_page(cut_and_resumed: tuple[list[Event], list[Event]]) -> None:
    page = (ROOT / "docs" / "json.md").read_text().partition("\n## distill and resume\n")[2].partition("\n## ")[0]
    known = {name for row in re.findall(r"^\| (`.*?) \|", page, re.M) for name in re.findall(r"`([^`]+)`", row)}
    found = {"event", "time"}
    for one in [*cut_and_resumed[0], *cut_and_resumed[1]]:
        fields = [name for name in one if name not in ("event", "time", "budget")]
        found |= {f"{one['event']}.{name}" for name in fields}
        found |= {f"start.budget.{name}" for name in one.get("budget", {})}
    assert found == known


@pytest.mark.parametrize("words", [["distill", "nope"], ["resume", "nope"]])
def test_an_error_before_the_first_stage_is_an_event_too(words: list[str], tmp_path: Path) -> None:
    out = CliRunner().invoke(cli, [*words, "--json", "--cache", str(tmp_path)])
    assert isinstance(out.exception, TapirError)
    (told,) = lines(out.stdout)
    assert (told["event"], told["exit_code"], told["step"]) == ("error", 1, None)
    assert told["what"] == out.exception.what
    assert told["fix"]


def test_a_run_goes_on_without_events_when_nobody_reads_them() -> None:
    code = (
        "import os, sys\nfrom tapir_local.terminal.events import RunEvents\n"
        "sys.stdin.readline()\nevents = RunEvents()\n"
        "for number in range(3): events.warning('unread')\nprint('went on', events.broken, file=sys.stderr)"
    )
    ours, theirs = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(theirs)
    os.close(ours)
    assert child.communicate("now\n")[1] == "went on True\n"
    assert child.returncode == 0
