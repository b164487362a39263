"""A run as JSON: an object in a line of stdout for each event, for programs that start runs and watch them."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from tapir_local import __version__
from tapir_local.errors import TapirError
from tapir_local.interrupts import stop_exit_code
from tapir_local.pipeline.loop import Step, name_cause
from tapir_local.report.compare import compare_rounds, fallen_sentence, round_verdict
from tapir_local.run_dir import UNTRAINED_ROUND
from tapir_local.stages.judge import judge_endpoint
from tapir_local.stages.ship import describe_endpoint
from tapir_local.terminal.output import print_json_line
from tapir_local.terminal.run_state import WARNING_MARK, Finished, RunState

EVENT_INTERVAL = 5.0  # seconds between two events of progress
PROGRESS_FIELDS = ("step", "round", "done", "total", "seconds_left", "run_seconds_left", "ends")


class RunEvents:
    """Writes the events that docs/json.md lists. `now` is the time in seconds since 1970.

    If stdout cannot be written any more, the run goes on without events: its outputs matter more.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.now, self.lock, self.began = now, threading.Lock(), now()
        self.step: Step | None = None
        self.told, self.broken = 0.0, False

    def write(self, event: str, **fields: Any) -> None:
        """Write one event."""
        moment = datetime.fromtimestamp(self.now(), UTC).isoformat(timespec="seconds")
        with self.lock:
            if not self.broken:
                self.broken = not print_json_line({"event": event, "time": moment, **fields})

    def start(self, state: RunState) -> None:
        """What will run, and how far it is."""
        recipe, run = state.recipe, state.run
        self.write(
            "start",
            run=run.name,
            folder=str(run.path),
            process=os.getpid(),
            version=__version__,
            student=recipe.student.path,
            teacher=describe_endpoint(recipe.teacher),
            judge=describe_endpoint(judge_endpoint(recipe)),
            seeds=str(recipe.seeds.path),
            holdout=recipe.seeds.holdout,
            rounds=recipe.rounds,
            stages=len(state.steps),
            stages_done=sum(step.done for step in state.steps),
            budget={name: getattr(recipe.budget, name) for name in ("money", "tokens", "calls")},
        )

    def begins(self, state: RunState, step: Step) -> None:
        """A stage begins."""
        self.step, self.told = step, self.now()
        expected = state.expected
        self.write("stage", **name_step(step), expected_seconds=None if expected is None else round(expected))

    def progress(self, state: RunState) -> None:
        """How far the stage is, every five seconds."""
        if self.now() - self.told < EVENT_INTERVAL:
            return
        self.told, data, counts = self.now(), state.as_data(), state.counts()
        self.write(
            "progress",
            **{name: data[name] for name in PROGRESS_FIELDS},
            said=state.said,
            money=round(state.spent().money, 6),
            replies=counts.replies,
            in_flight=counts.in_flight,
        )

    def ends(self, state: RunState, found: Finished) -> None:
        """A stage ended: what it did, each warning, and the metrics if it evaluated a student."""
        self.write(
            "stage_done",
            **name_step(found.step),
            seconds=found.seconds,
            paid=found.asked,
            hits=found.hits,
            money=round(found.money, 6),
            result=found.said,
            notes=[remark for remark in found.remarks if not remark.startswith(WARNING_MARK)],
        )
        for warning in found.warnings:
            self.warning(warning)
        number = UNTRAINED_ROUND if found.step.number is None else found.step.number
        if found.step.output.name == "metrics.json" and (metrics := state.read_result(number)):
            self.write("metrics", round=number, metrics=metrics)

    def warning(self, text: str) -> None:
        """What may make the results doubtful, or cost more than expected."""
        self.write("warning", step=self.step.name if self.step else None, text=text)

    def done(self, state: RunState, count: int) -> None:
        """The end of a run of which `count` stages were run now."""
        found, model = compare_rounds(state.run), state.run.path / "model"
        self.write(
            "done",
            run=state.run.name,
            stages_run=count,
            seconds=round(self.now() - self.began, 1),
            metric=found["metric"],
            best=found["best"],
            shipped=found["shipped"],
            verdict=" ".join(filter(None, (round_verdict(found), fallen_sentence(found)))),
            model=str(model),
            gguf=str(model / "student.gguf"),
            log=str(state.run.path / "run.log"),
        )

    def error(self, error: BaseException) -> None:
        """Why the run stopped; the last event."""
        self.write("error", step=self.step.name if self.step else None, **describe_stop(error))


def name_step(step: Step) -> Mapping[str, Any]:
    """`step`, `stage` and `round` of an event; the round is None in the preparation and at the end."""
    return {"step": step.name, "stage": step.stage.name, "round": step.number}


def describe_stop(error: BaseException) -> Mapping[str, Any]:
    """`what`, `where` and `fix` of an error, and the exit code that it leads to."""
    if isinstance(error, TapirError):
        return {"what": error.what, "where": error.where, "fix": error.fix, "exit_code": 1}
    if isinstance(error, KeyboardInterrupt):
        fix = " ".join(["The same command resumes.", *getattr(error, "__notes__", ())])
        return {"what": f"stopped by {name_cause(error)}", "where": "", "fix": fix, "exit_code": stop_exit_code()}
    if isinstance(error, OSError) and error.strerror:
        place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        return {"what": error.strerror, "where": place, "fix": "", "exit_code": 1}
    return {"what": f"{name_cause(error)}: {error}", "where": "", "fix": "", "exit_code": 1}


@contextmanager
def telling_stop(events: RunEvents | None) -> Iterator[None]:
    """Write an event if the block raises; nothing without `events`."""
    try:
        yield
    except BaseException as error:
        if events:
            events.error(error)
        raise


def refuse_mixed_screen(events: RunEvents | None, kind: str) -> None:
    """TapirError if the full screen and the events would be written to the same terminal."""
    if events and kind == "full" and sys.stdout.isatty():
        fix = "Use --display lines, or write stdout to a file: --json > events.jsonl"
        raise TapirError("--json and --display full cannot share a terminal", fix=fix)
