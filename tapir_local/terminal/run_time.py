"""Estimate how long the rest of a run takes, from what this run has done so far."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tapir_local.pipeline.dry_run import expected_calls
from tapir_local.pipeline.loop import Step
from tapir_local.recipe.schema import Recipe

RATE_SECONDS = 120.0  # the current rate is that of the last two minutes
# With eight requests in flight, the first reply says the time of eight: one of 31 labels after 70 s promised 35 minutes
# for what took five.
LEAST_ITEMS = 5
# Stages that take seconds, whatever they are given; before the first of a kind they count as nothing.
QUICK_STAGES = frozenset({"read", "mix", "plan", "pairs", "evaluate", "untrained-export", "untrained-evaluate", "ship"})
ANSWER_STAGES = frozenset({"answer", "holdout-answer", "untrained-answer"})

Records = Mapping[str, Mapping[str, Any]]  # what run.json says of finished steps, by the step's name


@dataclass
class RateMeter:
    """The items per second of a stage, over the last two minutes; a stage that counts from the start again is new."""

    samples: deque[tuple[float, int]] = field(default_factory=deque)
    total: int = 0

    def add(self, now: float, done: int, total: int) -> None:
        """Record that `done` of `total` items were done at the time `now`, in seconds."""
        if self.samples and (total != self.total or done < self.samples[-1][1]):
            self.samples.clear()
        self.total = total
        self.samples.append((now, done))
        while len(self.samples) > 2 and now - self.samples[1][0] > RATE_SECONDS:
            self.samples.popleft()

    def rate(self, now: float) -> float | None:
        """Items per second until `now`; None while it is unknown."""
        if len(self.samples) < 2:
            return None
        (began, first), (_, last) = self.samples[0], self.samples[-1]
        return (last - first) / (now - began) if last > first and now > began else None

    def seconds_left(self, now: float) -> float | None:
        """The seconds that the other items take at this rate; None before LEAST_ITEMS items, or all, are measured."""
        rate = self.rate(now)
        if rate is None or not self.total:
            return None
        last = self.samples[-1][1]
        if last - self.samples[0][1] < LEAST_ITEMS and last < self.total:
            return None
        return max(0, self.total - last) / rate


@dataclass(frozen=True)
class StageTimes:
    """Expected seconds of a run's steps. `taken` is what run.json says of the finished ones."""

    recipe: Recipe
    steps: Sequence[Step]
    taken: Records

    @cached_property
    def rows(self) -> int:
        """The rows that were read from the seed file; 0 before that."""
        return self.rows_of("prepare/read")

    def rows_of(self, name: str) -> int:
        """The rows that a step wrote; 0 if it has not ended."""
        return int(self.taken.get(name, {}).get("output", {}).get("rows", 0))

    @cached_property
    def measured(self) -> list[tuple[str, str, float, float]]:
        """(stage, kind of work, amount, seconds) of each finished step, in the order of the run."""
        done = [step for step in self.steps if "seconds" in self.taken.get(step.name, {}) and step.done]
        return [(step.stage.name, *self.size(step), self.taken[step.name]["seconds"]) for step in done]

    def size(self, step: Step) -> tuple[str, float]:
        """(kind of work, amount of it) of a step: answers of the student, calls, or rows to train on.

        Calls of steps to come are those of a dry run, or the most that the recipe allows. Other steps are a kind of
        their own, of amount 1.
        """
        name, number, plan = step.stage.name, step.number or 0, self.recipe.curriculum
        held, seeds = self.recipe.seeds.holdout, max(0, self.rows - self.recipe.seeds.holdout)
        if name in ANSWER_STAGES:
            return "answer", min(plan.pool or seeds, seeds) if name == "answer" else held
        if name == "train":
            wanted = plan.rows if number else min(plan.first_rows or seeds, seeds)
            return "train", self.rows_of(step.name.replace("/train", "/refine" if number else "/mix")) or wanted
        labels = self.recipe.classifier
        asked = {"label": labels.labelled, "tasks": labels.ask_at_most, "holdout": held, "seeds": seeds}
        calls = asked.get(name) or expected_calls(name, number, self.recipe, self.rows)
        if not calls:
            return name, 1
        found = self.taken.get(step.name, {})
        return "ask", found.get("paid", 0) + found.get("hits", 0) if "seconds" in found else calls

    def expected_seconds(self, step: Step) -> float | None:
        """The seconds that a step is expected to take; None if nothing like it was done in this run.

        Measured by the last step of the same stage or, without one, by all steps with the same kind of work.
        """
        name, (kind, amount) = step.stage.name, self.size(step)
        same = [found for found in self.measured if found[0] == name][-1:]
        alike = same or [found for found in self.measured if found[1] == kind]
        if measured := sum(found[2] for found in alike):
            return amount * sum(found[3] for found in alike) / measured
        return 0.0 if name in QUICK_STAGES else None

    def seconds_of(self, steps: Sequence[Step]) -> float | None:
        """The seconds that steps are expected to take together; None if one of them is unknown."""
        found = [self.expected_seconds(step) for step in steps]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) if len(known) == len(found) else None
