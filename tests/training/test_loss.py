"""What is said of a training's loss: means over steps, so that one odd step at the end does not look like a failure."""

import json
from pathlib import Path

import pytest

from tapir_local.training.loss import BARS, describe_loss, loss_curve, read_losses

# The raw losses of a quickstart's round 0, thinned: the last step is higher than the first, and yet it learned.
NOISY = [1.14, 2.33, 2.6, 2.4, 2.42, 2.1, 1.9, 1.7, 1.36, 1.5, 1.2, 1.3, 0.9, 1.1, 0.36, 0.8, 1.2, 0.7, 0.6, 1.68]


def test_a_training_that_learned_does_not_look_as_if_it_had_not() -> None:
    first, _, last, curve = describe_loss(NOISY).removeprefix("loss ").split()
    assert NOISY[-1] > NOISY[0]
    assert (float(first), float(last)) == pytest.approx((2.17, 0.89), abs=0.01)
    assert BARS.index(curve[0]) > BARS.index(curve[-1])


@pytest.mark.parametrize(
    ("losses", "said"),
    [([], ""), ([0.5], "loss 0.5"), ([2.0, 1.0], "loss 2 -> 1 █▁"), ([1.0, 1.0, 1.0], "loss 1 -> 1 ▁▁▁")],
)
def test_short_trainings(losses: list[float], said: str) -> None:
    assert describe_loss(losses) == said


def test_a_rising_loss_is_shown_as_rising() -> None:
    assert describe_loss([float(n) for n in range(1, 101)]) == "loss 10.5 -> 90.5 ▁▂▃▄▅▆▇█"


def test_the_curve_has_eight_bars_at_most() -> None:
    assert [len(loss_curve([1.0 * n for n in range(count)])) for count in (1, 7, 8, 9, 1000)] == [1, 7, 8, 8, 8]


def test_the_log_of_a_training_ends_with_a_line_without_a_loss(tmp_path: Path) -> None:
    path = tmp_path / "train_log.jsonl"
    assert read_losses(path) == []
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"step": 1, "loss": 2.5}, {"seconds": 3.0})))
    assert read_losses(path) == [2.5]
