"""The learning rate over a round and over several, and the optimizer's state that goes on with it."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from training_rows import SETTINGS, log, losses, make_job

from tapir_local.errors import TapirError
from tapir_local.recipe.text import parse_recipe
from tapir_local.stages.rounds import schedule_part
from tapir_local.training.job import TrainJob, schedule_arguments
from tapir_local.training.optimizer_state import STATE_FILE
from tapir_local.training.train import train_student

PEAK = SETTINGS.learning_rate
STEPS = 8  # of each training


@pytest.fixture(scope="module")
def rounds(tmp_path_factory) -> list[TrainJob]:
    """Three trainings, each from the one before, as the rounds of a run with `schedule: wsd`."""
    folder = tmp_path_factory.mktemp("rounds")
    first = make_job(folder, schedule="wsd", warmup=0.25)
    jobs = [replace(first, out=folder / part, part=part, adapter_from=None) for part in ("first", "middle", "last")]
    jobs[1:] = [replace(job, adapter_from=before.out) for before, job in pairwise(jobs)]
    for job in jobs:
        train_student(job)
    return jobs


def rates(job: TrainJob) -> list[float]:
    return [entry["learning_rate"] for entry in log(job.out)]


def test_the_rate_warms_up_once_and_decays_in_the_last_round_alone(rounds: list[TrainJob]) -> None:
    first, middle, last = map(rates, rounds)
    assert first == pytest.approx([0, PEAK / 2, *[PEAK] * (STEPS - 2)])
    assert middle == [PEAK] * STEPS
    assert last[0] == PEAK
    assert last == sorted(last, reverse=True)
    assert last[-1] < 0.1 * PEAK


def test_the_moments_go_on_from_round_to_round(rounds: list[TrainJob], tmp_path: Path) -> None:
    steps = [
        {int(moments["step"]) for moments in torch.load(job.out / STATE_FILE, weights_only=True).values()}
        for job in rounds
    ]
    assert steps == [{STEPS}, {2 * STEPS}, {3 * STEPS}]
    lost = tmp_path / "lost"
    lost.mkdir()
    for file in rounds[0].out.iterdir():
        if file.name != STATE_FILE:
            (lost / file.name).symlink_to(file)
    said: list[str] = []
    without = replace(rounds[1], adapter_from=lost, out=tmp_path / "without")
    train_student(without, lambda done, total, note: said.append(note))
    assert [note for note in said if "moments start at zero" in note] != []
    assert losses(without.out)[0] == losses(rounds[1].out)[0]
    assert losses(without.out)[1:] != losses(rounds[1].out)[1:]


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"no state", "cannot be read"), ({0: {"exp_avg": torch.zeros(3)}}, "other weights")]
)
def test_a_state_that_does_not_fit_is_refused(rounds, tmp_path: Path, content: object, complaint: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in rounds[0].out.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    if isinstance(content, bytes):
        (other / STATE_FILE).write_bytes(content)
    else:
        torch.save(content, other / STATE_FILE)
    with pytest.raises(TapirError, match=complaint):
        train_student(replace(rounds[1], adapter_from=other, out=tmp_path / "out"))


def test_other_schedules_keep_no_state_and_start_again_in_each_round(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1)
    train_student(job)
    assert not (job.out / STATE_FILE).exists()
    assert [schedule_arguments(replace(job, part=part), 10) for part in ("first", "middle", "last", "whole")] == [
        {"lr_scheduler_type": "cosine", "warmup_steps": 1}
    ] * 4


def test_a_round_knows_its_part() -> None:
    assert [schedule_part(number, 3) for number in range(4)] == ["first", "middle", "middle", "last"]
    assert schedule_part(0, 0) == "whole"
    whole = {"lr_scheduler_type": "cosine", "warmup_steps": 1}
    wsd = TrainJob("", Path(), Path(), SETTINGS.model_copy(update={"schedule": "wsd"}), 128, 1)
    assert schedule_arguments(wsd, 10) == whole


def test_one_schedule_over_rounds_that_start_from_the_base_is_refused() -> None:
    with pytest.raises(TapirError, match=r"schedule: wsd.*needs .start: previous"):
        parse_recipe("name: x\nteacher: {kind: pocket}\ntrain: {schedule: wsd, start: base}\n", "x.yaml")
