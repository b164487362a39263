"""The order of an epoch's rows, and trainings whose loss, gradient or weights are not finite."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import World, fake_backends
from hypothesis import given
from hypothesis import strategies as st
from training_rows import WEIGHTS, log, make_job

from tapir_local.errors import TapirError
from tapir_local.files import write_text
from tapir_local.recipe.text import parse_recipe
from tapir_local.run_dir import RunDir
from tapir_local.stages import rounds
from tapir_local.stages.backends import train_backend
from tapir_local.stages.context import Work
from tapir_local.training import checkpoints
from tapir_local.training.job import SORTED_STEPS, RowOrder, epoch_order
from tapir_local.training.steps import (
    describe_gpu_memory,
    describe_speed,
    refuse_nonfinite_step,
    refuse_nonfinite_weights,
)
from tapir_local.training.train import run_training, train_student
from tapir_local.unusable import read_unusable

LENGTHS = st.lists(st.integers(1, 2048), max_size=300)


@given(LENGTHS, st.integers(1, 16), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_goes_through_every_row_once_in_an_order_of_seed_and_epoch(
    lengths: list[int], batch: int, seed: int, epoch: int
) -> None:
    random.seed(epoch)  # the module's generator must not be used
    order = list(RowOrder(lengths, batch, seed, epoch))
    assert sorted(order) == list(range(len(lengths)))
    random.seed(epoch + 1)
    assert list(RowOrder(lengths, batch, seed, epoch)) == order
    assert not order or lengths[order[0]] == max(lengths)


def test_every_seed_and_epoch_has_its_own_order() -> None:
    lengths = list(range(100))
    orders = {tuple(RowOrder(lengths, 4, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_rows_of_a_step_have_similar_lengths() -> None:
    chance = random.Random("lengths")
    lengths = [chance.randint(60, 120) for _ in range(4000)]
    order = epoch_order(lengths, 16, random.Random("order"))
    steps = [[lengths[row] for row in order[at : at + 16]] for at in range(0, len(order), 16)]
    assert sum(max(step) - min(step) for step in steps) / len(steps) < 60 / SORTED_STEPS * 4
    longest = [max(step) for step in steps]
    assert longest != sorted(longest, reverse=True)  # but the steps themselves are not sorted by length


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    job = make_job(tmp_path, learning_rate=1e30, warmup=0.0, checkpoint_minutes=1e-9)
    with pytest.raises(TapirError, match=r"(loss|gradient) is not a finite number at step [2-8]") as caught:
        run_training(job, tmp_path / "train")
    assert "train.learning_rate (1e+30 now; try 1e+29)" in caught.value.fix
    assert "--name" in caught.value.fix
    assert not job.out.exists()
    assert len(list((tmp_path / "train").glob("checkpoint-*"))) <= 1


def break_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the model return NaN after as many forward passes as there are steps."""
    import torch

    seen, forward = [0], torch.nn.Embedding.forward

    def broken(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        seen[0] += 1
        return forward(self, ids) * (float("nan") if seen[0] > steps else 1.0)

    monkeypatch.setattr(torch.nn.Embedding, "forward", broken)


def test_the_checkpoint_before_a_step_that_is_not_finite_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, micro_batch_size=8, checkpoint_minutes=1e-9)
    break_after(monkeypatch, 5)
    with pytest.raises(TapirError, match="the loss is not a finite number at step 6"):
        train_student(job, folder=tmp_path / "train")
    assert not job.out.exists()
    (kept,) = (tmp_path / "train").glob("checkpoint-*")
    assert checkpoints.checkpoint_step(kept) == 5
    monkeypatch.undo()
    train_student(job, folder=tmp_path / "train")
    assert [entry["step"] for entry in log(job.out)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("logs", "precision", "said"),
    [
        ({"loss": float("nan"), "grad_norm": 1.0}, "f16", "the loss"),
        ({"loss": float("inf"), "grad_norm": 1.0}, "f32", "the loss"),
        ({"loss": 1.0, "grad_norm": float("inf")}, "bf16", "the gradient"),
        ({"loss": 1.0, "grad_norm": float("nan")}, "f32", "the gradient"),
        ({"loss": 1.0, "grad_norm": float("inf")}, "f16", ""),
        ({"loss": 0.0, "grad_norm": 0.0}, "f32", ""),
        ({"loss": 1.0}, "f32", ""),
    ],
)
def test_which_steps_are_not_finite(tmp_path: Path, logs: dict[str, float], precision: str, said: str) -> None:
    job = make_job(tmp_path)
    if not said:
        refuse_nonfinite_step(3, logs, job, precision)
        return
    with pytest.raises(TapirError, match=f"{said} is not a finite number at step 3") as caught:
        refuse_nonfinite_step(3, logs, job, precision)
    assert ("train.precision" in caught.value.fix) == (precision != "f32")


def test_an_adapter_with_a_weight_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    import torch

    model = torch.nn.Linear(3, 2)
    job = make_job(tmp_path)
    refuse_nonfinite_weights(model, job, "f32")
    with torch.no_grad():
        model.bias[1] = float("inf")
    with pytest.raises(TapirError, match=r"1 of the trained tensors .* the first is bias"):
        refuse_nonfinite_weights(model, job, "f32")
    model.bias.requires_grad = False
    refuse_nonfinite_weights(model, job, "f32")


def test_a_training_that_ends_with_nonfinite_weights_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step's update overflows: its loss was finite, and no later step shows the overflow."""
    import torch

    job = make_job(tmp_path, epochs=1.0)
    update, seen = torch.optim.AdamW.step, [0]

    def overflow(self: torch.optim.AdamW, *args: object, **more: object) -> object:
        seen[0] += 1
        done = update(self, *args, **more)
        if seen[0] == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("inf"))
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(TapirError, match="trained tensors contain values that are not finite"):
        train_student(job, folder=tmp_path / "train")
    assert not job.out.exists()


@pytest.mark.parametrize("limit", [0.05, 0.0])
def test_the_stage_records_rows_left_out_even_if_they_are_too_many(tmp_path: Path, limit: float) -> None:
    """One row of 32, with the real trainer in its own process."""
    base = make_job(tmp_path)
    lines = base.rows.read_text().splitlines()
    long = lines[3].replace('"completion":"', '"completion":"' + "one more number and " * 40)
    run = RunDir(tmp_path, "r")
    recipe = parse_recipe(
        f"teacher: pocket\nstudent: {{path: {base.model}, max_length: 128, max_tokens: 32}}\n"
        f"train: {{epochs: 1, batch_size: 8}}\nlimits: {{unusable: {limit}}}",
        "r",
    )
    write_text(run.round(0) / "train.jsonl", "\n".join([*lines[:3], long, *lines[4:]]) + "\n")
    work = Work(recipe, run, replace(fake_backends(World()), train=train_backend(recipe, run)), 0, "round-00/train")
    out = run.round(0) / "adapter"
    if limit < 1 / 32:
        with pytest.raises(TapirError, match=r"1 of 32 rows \(3%\) cannot be used"):
            rounds.train_stage(work, out)
    else:
        loss, left_out = (
            r"loss [\d.]+ -> [\d.]+ \S+",
            r"1 left out \(1 longer than student.max_length, see unusable.jsonl\)",
        )
        assert re.fullmatch(f"from the base, {loss}, {left_out}", rounds.train_stage(work, out))
        job = json.loads((run.round(0) / "train" / "job.json").read_text())
        assert job["unsloth_cache"] == str(tmp_path / "unsloth")  # in the cache, which all runs share
    assert out.exists() == (limit > 1 / 32)
    (row,) = read_unusable(run)
    assert (row.step, row.id, row.kind) == ("round-00/train", "3", "longer than student.max_length")


def test_rows_left_out_in_training_are_recorded_and_limited(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    lines = job.rows.read_text().splitlines()
    long = lines[3].replace('"completion":"', '"completion":"' + "one more number and " * 40)
    job.rows.write_text("\n".join([*lines[:3], long, *lines[4:]]) + "\n")
    train_student(job, folder=tmp_path / "train")
    (row,) = (tmp_path / "train" / "left_out.jsonl").read_text().splitlines()
    assert '"id":"3"' in row
    assert (job.out / WEIGHTS).exists()
    strict = replace(job, out=tmp_path / "other", unusable=0.0)
    with pytest.raises(TapirError, match=r"1 of 32 rows \(3%\) cannot be used: 1 longer than student.max_length"):
        train_student(strict, folder=tmp_path / "train")
    assert not strict.out.exists()


def test_the_speed_of_a_training_is_the_mean_of_its_last_steps() -> None:
    log = [{"tokens": 100 * step, "seconds": 10.0 + 0.5 * step} for step in range(1, 31)]
    assert describe_speed(log[:1]) == ""
    assert describe_speed(log[:2]) == "200 tokens/s"
    slow_start = [{"tokens": 0, "seconds": 0.0}, *log]
    assert describe_speed(slow_start) == "200 tokens/s"
    assert describe_gpu_memory({"peak_memory": 1 << 30}) == ""
