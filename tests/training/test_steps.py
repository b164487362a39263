"""The order of an epoch's rows, and a training whose loss, gradient or weights are no numbers."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import World, tools
from hypothesis import given
from hypothesis import strategies as st
from training_rows import WEIGHTS, log, make_job

from tapir_local.errors import TapirError
from tapir_local.files import write_text
from tapir_local.pipeline import rounds
from tapir_local.pipeline.backends import trainer
from tapir_local.pipeline.context import Work
from tapir_local.recipe.text import parse_recipe
from tapir_local.run_dir import RunDir
from tapir_local.training import checkpoints
from tapir_local.training.job import STRETCH, RowOrder, epoch_order
from tapir_local.training.steps import refuse_dead_step, refuse_dead_weights
from tapir_local.training.train import run_job, train
from tapir_local.unusable import read_unusable

LENGTHS = st.lists(st.integers(1, 2048), max_size=300)


@given(LENGTHS, st.integers(1, 16), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_goes_through_every_row_once_in_an_order_of_seed_and_epoch(
    lengths: list[int], batch: int, seed: int, epoch: int
) -> None:
    random.seed(epoch)  # nothing is taken from the module's generator
    order = list(RowOrder(lengths, batch, seed, epoch))
    assert sorted(order) == list(range(len(lengths)))
    random.seed(epoch + 1)
    assert list(RowOrder(lengths, batch, seed, epoch)) == order
    assert not order or lengths[order[0]] == max(lengths)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    lengths = list(range(100))
    orders = {tuple(RowOrder(lengths, 4, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_rows_of_a_step_are_of_about_one_length() -> None:
    chance = random.Random("lengths")
    lengths = [chance.randint(60, 120) for _ in range(4000)]
    order = epoch_order(lengths, 16, random.Random("order"))
    steps = [[lengths[row] for row in order[at : at + 16]] for at in range(0, len(order), 16)]
    assert sum(max(step) - min(step) for step in steps) / len(steps) < 60 / STRETCH * 4
    longest = [max(step) for step in steps]
    assert longest != sorted(longest, reverse=True)  # but the steps are not in the order of their lengths


def test_a_loss_that_is_no_number_ends_the_training_with_nothing_saved(tmp_path: Path) -> None:
    job = make_job(tmp_path, learning_rate=1e30, warmup=0.0, checkpoint_minutes=1e-9)
    with pytest.raises(TapirError, match=r"(loss|gradient) is no longer a number at step [2-8]") as caught:
        train(job, tmp_path / "train")
    assert "train.learning_rate (1e+30 now; try 1e+29)" in caught.value.fix
    assert "--name" in caught.value.fix
    assert not job.out.exists()
    assert len(list((tmp_path / "train").glob("checkpoint-*"))) <= 1


def break_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the model say no numbers once it was asked as many times as there are steps."""
    import torch

    seen, forward = [0], torch.nn.Embedding.forward

    def broken(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        seen[0] += 1
        return forward(self, ids) * (float("nan") if seen[0] > steps else 1.0)

    monkeypatch.setattr(torch.nn.Embedding, "forward", broken)


def test_the_checkpoint_before_a_dead_step_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, micro_batch_size=8, checkpoint_minutes=1e-9)
    break_after(monkeypatch, 5)
    with pytest.raises(TapirError, match="the loss is no longer a number at step 6"):
        run_job(job, folder=tmp_path / "train")
    assert not job.out.exists()
    (kept,) = (tmp_path / "train").glob("checkpoint-*")
    assert checkpoints.step_of(kept) == 5
    monkeypatch.undo()
    run_job(job, folder=tmp_path / "train")
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
def test_what_is_a_dead_step(tmp_path: Path, logs: dict[str, float], precision: str, said: str) -> None:
    job = make_job(tmp_path)
    if not said:
        refuse_dead_step(3, logs, job, precision)
        return
    with pytest.raises(TapirError, match=f"{said} is no longer a number at step 3") as caught:
        refuse_dead_step(3, logs, job, precision)
    assert ("train.precision" in caught.value.fix) == (precision != "f32")


def test_an_adapter_with_a_weight_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    import torch

    model = torch.nn.Linear(3, 2)
    job = make_job(tmp_path)
    refuse_dead_weights(model, job, "f32")
    with torch.no_grad():
        model.bias[1] = float("inf")
    with pytest.raises(TapirError, match=r"1 of the trained weights' tensors .* bias the first"):
        refuse_dead_weights(model, job, "f32")
    model.bias.requires_grad = False
    refuse_dead_weights(model, job, "f32")


def test_a_training_that_ends_in_dead_weights_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step's update overflows: its loss was a number, and no step follows that would show it."""
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
    with pytest.raises(TapirError, match="trained weights' tensors hold values that are no numbers"):
        run_job(job, folder=tmp_path / "train")
    assert not job.out.exists()


@pytest.mark.parametrize("limit", [0.05, 0.0])
def test_the_stage_that_trains_records_what_it_left_out_also_where_that_is_too_much(
    tmp_path: Path, limit: float
) -> None:
    """One row of 32, by the real trainer in its own process."""
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
    work = Work(recipe, run, replace(tools(World()), train=trainer(recipe, run)), 0, "round-00/train")
    out = run.round(0) / "adapter"
    if limit < 1 / 32:
        with pytest.raises(TapirError, match=r"1 of 32 rows \(3%\) cannot be used"):
            rounds.train(work, out)
    else:
        said = "from the base, 1 left out (1 longer than student.max_length; unusable.jsonl)"
        assert rounds.train(work, out) == said
    assert out.exists() == (limit > 1 / 32)
    (row,) = read_unusable(run)
    assert (row.step, row.id, row.kind) == ("round-00/train", "3", "longer than student.max_length")


def test_what_is_left_out_in_training_is_recorded_and_too_much_of_it_stops_it(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    lines = job.rows.read_text().splitlines()
    long = lines[3].replace('"completion":"', '"completion":"' + "one more number and " * 40)
    job.rows.write_text("\n".join([*lines[:3], long, *lines[4:]]) + "\n")
    run_job(job, folder=tmp_path / "train")
    (row,) = (tmp_path / "train" / "left_out.jsonl").read_text().splitlines()
    assert '"id":"3"' in row
    assert (job.out / WEIGHTS).exists()
    strict = replace(job, out=tmp_path / "other", unusable=0.0)
    with pytest.raises(TapirError, match=r"1 of 32 rows \(3%\) cannot be used: 1 longer than student.max_length"):
        run_job(strict, folder=tmp_path / "train")
    assert not strict.out.exists()
