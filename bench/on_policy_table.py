"""The results of bench/on_policy.py, and its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from curricula import spread

ARMS = ("untrained", "teacher", "sft", "on-policy", "sft-then-on-policy")
REFERENCE = "sft"


@dataclass(frozen=True)
class Trained:
    """What a training took: tokens of answers in its loss, optimizer steps and seconds."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Trained") -> "Trained":
        return Trained(self.tokens + other.tokens, self.steps + other.steps, self.seconds + other.seconds)


@dataclass(frozen=True)
class Result:
    """An arm of one random seed: 1 or 0 for each row of the holdout, and what its training took."""

    right: Mapping[str, float]
    trained: Trained = field(default_factory=Trained)


@dataclass(frozen=True)
class Written:
    """The teacher's answers to the prompts of one random seed: how many of them, and how long they took."""

    asked: int
    ended: int
    tokens: int
    seconds: float


Results = Mapping[str, Mapping[int, Result]]  # by arm and random seed


def arm_table(found: Results, seeds: Sequence[int]) -> list[str]:
    """The arms, best first: accuracy over the random seeds, and less REFERENCE's.

    Intervals are Student's over the seeds' means, as in curricula.py; with one seed, the bootstrap's over its rows.
    """
    from tapir_local.method.stats import correct_p_values, estimate_difference, estimate_mean

    whole = {arm: {seed: runs[seed].right for seed in seeds} for arm, runs in found.items()}
    others = {arm: rows for arm, rows in whole.items() if arm != REFERENCE} if REFERENCE in whole else {}
    gaps = correct_p_values({arm: estimate_difference(rows, whole[REFERENCE]) for arm, rows in others.items()})
    over = "seeds" if len(seeds) > 1 else "rows"
    heads = ("arm", "accuracy", f"95 % over {over}", f"less {REFERENCE}", f"95 % over {over}", "p, Holm", "by seed")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm in sorted(whole, key=lambda arm: -estimate_mean(whole[arm]).mean):
        mean, gap = estimate_mean(whole[arm]), gaps.get(arm)
        less = [f"{100 * gap.mean:+.1f}", interval(gap, "+.1f"), f"{gap.p_holm:.3f}"] if gap else ["", "", ""]
        each = ", ".join(f"{100 * fmean(rows.values()):.1f}" for rows in whole[arm].values())
        lines.append(f"| {arm} | {mean.mean:.1%} | {interval(mean, '.1f')} | {' | '.join(less)} | {each} |")
    return lines


def interval(found: Any, spelled: str) -> str:
    """The interval of an Estimate in percent: over the seeds, or with one seed over its rows."""
    return spread(found.over_seeds or (found.low, found.high), spelled)


def seed_table(found: Results, written: Mapping[int, Written]) -> list[str]:
    """A line for each random seed and arm: the right answers, and what the training took."""
    heads = ("seed", "arm", "right", "accuracy", "tokens trained on", "steps", "seconds", "prompts", "written in, s")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for seed, teacher in written.items():
        for arm in [arm for arm in ARMS if seed in found.get(arm, {})]:
            result = found[arm][seed]
            right, rows, took = round(sum(result.right.values())), len(result.right), result.trained
            cells = [f"{seed}", arm, f"{right} of {rows}", f"{right / rows:.1%}"]
            if took.steps:
                asked = f"{teacher.ended} of {teacher.asked}"
                spent = "" if arm == "on-policy" else f"{teacher.seconds:.1f}"
                cells += [f"{took.tokens:,}", f"{took.steps:,}", f"{took.seconds:.0f}", asked, spent]
            lines.append(f"| {' | '.join([*cells, *[''] * (len(heads) - len(cells))])} |")
    return lines
