"""What the displays show of a run: the running step, what is left, results, money, requests and warnings."""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.pipeline.dry_run import estimate_by_recipe
from tapir_local.pipeline.loop import Step, recipe_steps
from tapir_local.printable import printable
from tapir_local.recipe.schema import Recipe
from tapir_local.report.status import read_metrics
from tapir_local.run_dir import UNTRAINED_ROUND, RunDir
from tapir_local.stages.judge import judge_endpoint
from tapir_local.store.queries import mean_tokens_by_stage
from tapir_local.teacher.budget import Cost, endpoint_price
from tapir_local.teacher.rate_limit import CallCounts, CallMeter
from tapir_local.terminal.run_time import RateMeter, Records, StageTimes

MAX_NOTES = 50  # warnings kept for the display; run.log has all
WARNING_MARK = "WARNING: "  # begins a remark that is a warning


@dataclass(frozen=True)
class Finished:
    """A step that ended: its closing phrase with remarks, calls, seconds, money (0.0 if unknown) and failures."""

    step: Step
    said: str
    remarks: tuple[str, ...]
    asked: int
    hits: int
    seconds: float
    money: float = 0.0
    trouble: str = ""

    @property
    def warnings(self) -> list[str]:
        """The remarks that are warnings, without their mark."""
        return [remark.removeprefix(WARNING_MARK) for remark in self.remarks if remark.startswith(WARNING_MARK)]


class RunState:
    """A run as its displays show it. The loop reports to it; `now` is the time in seconds since 1970.

    `lock` is held while it changes: a display that reads in another thread must hold it too.
    """

    def __init__(self, recipe: Recipe, run: RunDir, now: Callable[[], float] = time.time) -> None:
        self.recipe, self.run, self.now = recipe, run, now
        self.steps, self.started = recipe_steps(run, recipe), now()
        self.lock = threading.RLock()
        self.meter = CallMeter()
        self.spent: Callable[[], Cost] = Cost
        self.step: Step | None = None
        self.done = self.total = 0
        self.said, self.began, self.money_before = "", self.started, 0.0
        self.counts_before = CallCounts()
        self.rates, self.times = RateMeter(), StageTimes(recipe, self.steps, {})
        self.notes: list[str] = []
        self.finished: list[Finished] = []
        self.results: dict[int, Mapping[str, Any]] = {}
        self.expected: float | None = None
        self.later: float | None = None
        self.costs: Mapping[str, float] | None = None

    def connect(self, meter: CallMeter, spent: Callable[[], Cost]) -> None:
        """Take the counts of requests, and what was spent, from these."""
        self.meter, self.spent = meter, spent

    def begins(self, step: Step) -> None:
        """A step begins: read what is done, and estimate what is left."""
        with self.lock:
            self.done, self.total, self.said = 0, 0, "starting"
            self.rates, self.began = RateMeter(), self.now()
            self.money_before, self.counts_before = self.spent().money, self.counts()
            records = self.read_records()
            self.times = StageTimes(self.recipe, self.steps, records)
            known = {found.step.name: found for found in self.finished}  # with the money, which run.json does not have
            group = self.group(step, records)
            self.finished = [known.get(other.name) or finished_step(other, records[other.name]) for other in group]
            self.results = {number: found for number in self.evaluated_rounds() if (found := self.read_result(number))}
            if self.step is None or self.step.number != step.number:
                self.costs = estimate_money(self.recipe, self.run, self.pending(step))
            self.expected, self.later = self.times.expected_seconds(step), self.times.seconds_of(self.pending(step)[1:])
            self.step = step

    def progress(self, done: int, total: int, said: str) -> None:
        """The running step has done so many of its items; 0 of 0 is a phrase without a count."""
        with self.lock:
            self.said = printable(said)
            if total:
                self.done, self.total = done, total
                self.rates.add(self.now(), done, total)

    def ends(self, step: Step, taken: Mapping[str, Any]) -> Finished:
        """A step ended; what it did."""
        with self.lock:
            found = finished_step(step, taken)
            found = replace(found, money=self.spent().money - self.money_before, trouble=self.trouble())
            self.finished.append(found)
            for warning in found.warnings:
                self.note(f"{step.stage.name}: {warning}")
            return found

    def note(self, text: str) -> None:
        """Keep a warning for the display."""
        with self.lock:
            self.notes = [*self.notes, printable(text)][-MAX_NOTES:]

    def read_records(self) -> Records:
        """What run.json says of finished steps."""
        with suppress(TapirError):
            return dict(self.run.record().get("stages", {}))
        return {}

    def group(self, step: Step, records: Records) -> list[Step]:
        """The finished steps of the preparation or the round that a step belongs to."""
        alike = [other for other in self.steps if other.number == step.number and not self.is_last(other)]
        return [other for other in alike if other.name in records and other.name != step.name and other.done]

    def is_last(self, step: Step) -> bool:
        """Whether a step, which may be of another list, is the last one of the run."""
        return step.name == self.steps[-1].name

    def pending(self, step: Step) -> list[Step]:
        """A step and those after it that are not done."""
        at = next((at for at, other in enumerate(self.steps) if other.name == step.name), len(self.steps))
        return [other for other in self.steps[at:] if other.name == step.name or not other.done]

    def evaluated_rounds(self) -> Sequence[int]:
        """The numbers of rounds that may have metrics, the untrained student's first."""
        return [UNTRAINED_ROUND, *range(self.recipe.all_rounds + 1)]

    def read_result(self, number: int) -> Mapping[str, Any] | None:
        """The metrics of a round; None if there are none that can be read."""
        with suppress(TapirError):
            return read_metrics(self.run, number)
        return None

    def stage_seconds_left(self) -> float | None:
        """Seconds that the running step still takes: by its rate, else by what it was expected to take; None where
        that is unknown or over."""
        by_rate = self.rates.seconds_left(self.now())
        if by_rate is not None or self.expected is None:
            return by_rate
        left = self.expected - (self.now() - self.began)
        return None if self.expected and left <= 0 else max(0.0, left)

    def run_seconds_left(self) -> float | None:
        """Seconds that the whole run still takes; None where part of it is unknown."""
        here = self.stage_seconds_left()
        return None if here is None or self.later is None else here + self.later

    def ends_at(self) -> float | None:
        """When the run ends, in seconds since 1970; None where that is unknown."""
        left = self.run_seconds_left()
        return None if left is None else self.now() + left

    def rate(self) -> float | None:
        """Items per second of the running step."""
        return self.rates.rate(self.now())

    def counts(self) -> CallCounts:
        """The requests at this moment."""
        return self.meter.read()

    def money_to_come(self) -> float | None:
        """What the rest of the run costs by the dry run's estimate; None where it is unknown or free."""
        if self.costs is None or self.step is None:
            return None
        here, *later = [self.costs.get(step.name, 0.0) for step in self.pending(self.step)]
        return here * (1 - (self.done / self.total if self.total else 0.0)) + sum(later)

    def trouble(self) -> str:
        """Failures of requests in the running step: `429: 12, 3 sent again, 33 unreadable`; "" if there were none."""
        now, before = self.counts(), self.counts_before
        shown = {"rate_limited": "429: {:,}", "retries": "{:,} sent again", "unreadable": "{:,} unreadable"}
        counts = {form: getattr(now, name) - getattr(before, name) for name, form in shown.items()}
        return ", ".join(form.format(count) for form, count in counts.items() if count)

    def as_data(self) -> dict[str, Any]:
        """The progress for `status`, as written to the run's progress file; times in UTC, durations in seconds."""
        at, step = self.ends_at(), self.step
        left, run_left = self.stage_seconds_left(), self.run_seconds_left()
        return {
            "process": os.getpid(),
            "step": step.name if step else "",
            "round": step.number if step else None,
            "rounds": self.recipe.all_rounds,
            "done": self.done,
            "total": self.total or None,
            "seconds_left": None if left is None else round(left),
            "run_seconds_left": None if run_left is None else round(run_left),
            "ends": None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"),
            "updated": datetime.fromtimestamp(self.now(), UTC).isoformat(timespec="seconds"),
        }


def finished_step(step: Step, taken: Mapping[str, Any]) -> Finished:
    """What run.json says of a step."""
    said, *remarks = str(taken.get("note", "")).split("; ")
    calls = int(taken.get("paid", 0)), int(taken.get("hits", 0))
    return Finished(step, printable(said), tuple(map(printable, remarks)), *calls, taken.get("seconds", 0.0))


def estimate_money(recipe: Recipe, run: RunDir, pending: Sequence[Step]) -> dict[str, float] | None:
    """What pending steps cost by the dry run's estimate, by name; None before the rounds, or if unknown or free."""
    prices = [endpoint_price(recipe.teacher), endpoint_price(judge_endpoint(recipe))]
    priced = all(prices) and any(price.input or price.output for price in prices if price)
    store = run.cache / "teacher.db"
    if not priced or not store.exists() or any(step.stage.name in ("holdout", "seeds") for step in pending):
        return None
    tokens = mean_tokens_by_stage(store)
    return {step.name: estimate_by_recipe(step, recipe, run, tokens).money or 0.0 for step in pending}
