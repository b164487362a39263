"""A training that is interrupted, killed or out of memory resumes and ends like an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from models import make_model
from safetensors.torch import load_file
from training_rows import WEIGHTS, examples, log, losses, make_job, resolved

from tapir_local.errors import TapirError
from tapir_local.files import write_json, write_rows
from tapir_local.process import OutOfMemory
from tapir_local.records import to_json
from tapir_local.training import checkpoints
from tapir_local.training.checkpoints import TrainingState
from tapir_local.training.job import TokenRows, TrainJob
from tapir_local.training.model import Hardware
from tapir_local.training.train import run_training, train_student, with_smaller_batch

EACH_STEP = 1e-9  # minutes
# A GPU with memory for four rows, simulated in the child's torch.
SMALL_GPU = """
import torch

forward = torch.nn.Embedding.forward

def held(self, ids):
    if ids.shape[0] > 4:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return forward(self, ids)

torch.nn.Embedding.forward = held
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def uncut(place) -> Path:
    """The result of an uninterrupted training with dropout."""
    job = replace(make_job(place, lora_dropout=0.1, checkpoint_minutes=0), out=place / "uncut")
    train_student(job, folder=place / "no-checkpoints")
    return job.out


@pytest.fixture
def job(place, tmp_path) -> TrainJob:
    return replace(make_job(place, lora_dropout=0.1, checkpoint_minutes=EACH_STEP), out=tmp_path / "adapter")


def cut_at(job: TrainJob, folder: Path, step: int) -> None:
    """Train in this process until a step is reported, which happens before its checkpoint is saved."""

    def stop(done: int, total: int, note: str) -> None:
        if done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(job, stop, folder)


def steps(adapter: Path) -> list[tuple[int, float, int]]:
    return [(entry["step"], entry["loss"], entry["tokens"]) for entry in log(adapter)]


@pytest.mark.parametrize("step", [3, 5, 7])
def test_an_interrupted_training_ends_in_the_same_bytes(job, uncut, tmp_path, step: int) -> None:
    """Interrupted within the first epoch, at its end, and within the second, which has its own order of rows."""
    cut_at(job, tmp_path / "train", step)
    assert [path.name for path in (tmp_path / "train").iterdir()] == [f"checkpoint-{step - 1}"]
    seen: list[int] = []
    train_student(job, lambda done, total, note: seen.append(done), tmp_path / "train")
    assert seen == [*range(step, 9), 8]
    assert (job.out / WEIGHTS).read_bytes() == (uncut / WEIGHTS).read_bytes()
    assert steps(job.out) == steps(uncut)
    assert not list((tmp_path / "train").iterdir())


@pytest.mark.parametrize("cuts", [(5, 7), (5, 6), (4, 7), (3, 5, 6, 8)])
def test_a_training_interrupted_several_times_ends_in_the_same_bytes(
    job, uncut, tmp_path, cuts: tuple[int, ...]
) -> None:
    """The epoch ends after step 4: that checkpoint belongs to the first epoch, the following step to the second."""
    for step in cuts:
        cut_at(job, tmp_path / "train", step)
    train_student(job, folder=tmp_path / "train")
    assert (job.out / WEIGHTS).read_bytes() == (uncut / WEIGHTS).read_bytes()
    assert steps(job.out) == steps(uncut)


def test_interruptions_with_uneven_steps_and_epochs_end_in_the_same_bytes(place, tmp_path) -> None:
    """32 rows in steps of 10 with a micro-batch of two, for two and a half epochs."""
    made = make_job(
        place, lora_dropout=0.1, batch_size=10, micro_batch_size=4, epochs=2.5, checkpoint_minutes=EACH_STEP
    )
    whole, cut = (replace(made, out=tmp_path / name) for name in ("whole", "cut"))
    train_student(whole)
    for step in (4, 5, 8, 9):
        cut_at(cut, tmp_path / "train", step)
    train_student(cut, folder=tmp_path / "train")
    assert (cut.out / WEIGHTS).read_bytes() == (whole.out / WEIGHTS).read_bytes()
    assert steps(cut.out) == steps(whole.out)


def test_an_interrupted_full_training_ends_in_the_same_bytes(tmp_path) -> None:
    """With tied embeddings, which a checkpoint saves once."""
    make_model(tmp_path / "base", "qwen2", kind="qwen2")
    write_rows(tmp_path / "rows.jsonl", examples(32))
    job = make_job(tmp_path, method="full", learning_rate=1e-3, checkpoint_minutes=EACH_STEP)
    train_student(replace(job, out=tmp_path / "uncut"))
    cut_at(job, tmp_path / "train", 6)
    train_student(job, folder=tmp_path / "train")
    assert [entry["step"] for entry in log(job.out)] == list(range(1, 9))
    name = "model.safetensors"
    assert (job.out / name).read_bytes() == (tmp_path / "uncut" / name).read_bytes()


def test_seconds_continue_after_an_interruption(job, tmp_path) -> None:
    cut_at(job, tmp_path / "train", 4)
    train_student(job, folder=tmp_path / "train")
    seconds = [entry["seconds"] for entry in log(job.out)]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("change", [{"learning_rate": 4e-3}, {"lora_dropout": 0.2}, {"random_seed": 8}, {"rows": 31}])
def test_another_jobs_checkpoint_is_deleted(job, tmp_path, change: dict) -> None:
    cut_at(job, tmp_path / "train", 3)
    if "rows" in change:
        (tmp_path / "rows.jsonl").write_text("".join(job.rows.read_text().splitlines(keepends=True)[:31]))
        other = replace(job, rows=tmp_path / "rows.jsonl")
    elif "random_seed" in change:
        other = replace(job, **change)
    else:
        other = replace(job, settings=job.settings.model_copy(update=change))
    seen: list[tuple[int, list[Path]]] = []
    train_student(other, lambda done, *_: seen.append((done, [*(tmp_path / "train").iterdir()])), tmp_path / "train")
    assert seen[0] == (1, [])


def test_an_incomplete_checkpoint_is_not_used(tmp_path) -> None:
    for step, job in ((2, "a"), (4, "a"), (6, "b")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write_json(tmp_path / f"checkpoint-{step}" / checkpoints.COMPLETE_MARKER, {"job": job})
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / checkpoints.COMPLETE_MARKER).write_text('{"job": ')
    assert checkpoints.latest_checkpoint(tmp_path, "a") == tmp_path / "checkpoint-4"
    assert checkpoints.latest_checkpoint(tmp_path, "c") is None


def test_the_micro_batch_size_does_not_change_the_job(job) -> None:
    tokens, hardware = TokenRows([{"input_ids": [1], "labels": [1]}]), Hardware("cpu", "trl", "f32", 1 << 30)

    def digest(**arguments: object) -> str:
        return checkpoints.job_digest(job, hardware, tokens, {"learning_rate": 1, **arguments}, {"torch": "2"})

    assert digest(per_device_train_batch_size=4) == digest(per_device_train_batch_size=2)
    assert digest(learning_rate=2) != digest()


def test_a_checkpoint_is_due_after_an_interval(tmp_path) -> None:
    training = TrainingState("job", tmp_path, minutes=10)
    checkpoints.start_clock(training)
    assert not checkpoints.is_checkpoint_due(training, 1)
    training.saved -= 601
    assert checkpoints.is_checkpoint_due(training, 1)
    assert not checkpoints.is_checkpoint_due(replace(training, minutes=0), 1)
    assert not checkpoints.is_checkpoint_due(replace(training, folder=None), 1)


# Killed


def of_folder(folder: Path) -> list[int]:
    """The process ids of the trainings that work on a folder: their standard error is its log."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if (process / "fd/2").readlink() == folder / "train.log":
                found.append(int(process.name))
    return found


def test_a_killed_process_is_restarted_with_a_smaller_micro_batch(job, uncut, tmp_path) -> None:
    said: list[str] = []

    def kill(done: int, total: int, note: str) -> None:
        if done == 5 and not said:
            for pid in of_folder(tmp_path / "train"):
                os.kill(pid, signal.SIGKILL)

    run_training(job, tmp_path / "train", kill, said.append)
    assert len(said) == 1
    assert "signal 9" in said[0]
    assert "a micro-batch of 2" in said[0]
    entries = log(job.out)
    assert [entry["micro_batch_size"] for entry in entries][::7] == [4, 2]
    assert [entry["step"] for entry in entries] == list(range(1, 9))
    assert losses(job.out)[:4] == losses(uncut)[:4]
    assert resolved(job.out)["micro_batch_size"] == {"asked": 4, "used": 2}


def test_a_process_that_is_killed_twice_is_not_restarted(job, tmp_path) -> None:
    def kill(done: int, total: int, note: str) -> None:
        for pid in of_folder(tmp_path / "train"):
            os.kill(pid, signal.SIGKILL)

    said: list[str] = []
    with pytest.raises(TapirError, match="signal 9"):
        run_training(job, tmp_path / "train", kill, said.append)
    assert len(said) == 1
    assert not job.out.exists()


def test_after_kill_9_the_same_call_resumes_to_the_same_bytes(job, uncut, tmp_path) -> None:
    """The parent is killed, its child ends with it, and another parent finishes the training."""
    (tmp_path / "job.json").write_text(to_json(job))
    code = (
        "import sys; from pathlib import Path; from tapir_local.records import from_json\n"
        "from tapir_local.training.job import TrainJob; from tapir_local.training.train import run_training\n"
        "here = Path(sys.argv[1]); job = from_json(TrainJob, (here / 'job.json').read_bytes())\n"
        "run_training(job, here / 'train', lambda done, *_: print(done, flush=True))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}) as one:
        assert one.stdout
        next(line for line in one.stdout if line.strip() == b"5")
        one.kill()
    end = time.monotonic() + 10
    while of_folder(tmp_path / "train") and time.monotonic() < end:
        time.sleep(0.02)
    assert not of_folder(tmp_path / "train")
    assert list((tmp_path / "train").glob("checkpoint-*"))
    seen: list[int] = []
    run_training(job, tmp_path / "train", lambda done, *_: seen.append(done))
    assert seen[0] > 4
    assert (job.out / WEIGHTS).read_bytes() == (uncut / WEIGHTS).read_bytes()


# Out of memory


def test_out_of_memory_resumes_with_a_smaller_micro_batch(place, tmp_path, monkeypatch) -> None:
    """torch in the child process raises its own error above four rows: the micro-batch of 8 becomes 4, a step keeps 8
    rows."""
    (tmp_path / "sitecustomize.py").write_text(SMALL_GPU)
    large = replace(make_job(place, micro_batch_size=8), out=tmp_path / "large")
    train_student(large)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    said: list[str] = []
    small = replace(large, out=tmp_path / "small")
    run_training(small, tmp_path / "train", None, said.append)
    assert said == [
        "memory ran out with a micro-batch of 8; training resumes with a micro-batch of 4, "
        "the batch size per step stays the same."
    ]
    sft = resolved(small.out)["sft"]
    assert (sft["per_device_train_batch_size"], sft["gradient_accumulation_steps"]) == (4, 2)
    assert resolved(small.out)["micro_batch_size"] == {"asked": 8, "used": 4}
    assert losses(small.out) == pytest.approx(losses(large.out), abs=1e-4)


def test_a_micro_batch_of_one_cannot_be_halved(job) -> None:
    assert with_smaller_batch(replace(job, micro=2)).micro == 1  # type: ignore[union-attr]
    assert with_smaller_batch(replace(job, micro=1)) is None


def test_out_of_memory_with_one_row_says_what_to_do(job, tmp_path, monkeypatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(SMALL_GPU.replace("> 4", "> 0"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    one = replace(job, settings=job.settings.model_copy(update={"micro_batch_size": 1}))
    with pytest.raises(OutOfMemory, match="memory ran out with a micro-batch of 1") as caught:
        run_training(one, tmp_path / "train")
    assert "train.method to qlora" in caught.value.fix


# Several processes


@pytest.mark.slow
def test_two_processes_learn_what_one_does(place, tmp_path) -> None:
    """On a CPU the processes exchange gradients with gloo."""
    launcher = "accelerate launch --multi_gpu --num_processes 2"
    one = replace(make_job(place), out=tmp_path / "one")
    two = replace(make_job(place, launcher=launcher, checkpoint_minutes=EACH_STEP), out=tmp_path / "two")
    train_student(one)
    seen: list[int] = []
    run_training(two, tmp_path / "train", lambda done, total, note: seen.append(done))
    assert seen == [*range(1, 9), 8]  # only the first process reports
    assert resolved(two.out)["processes"] == 2
    assert losses(two.out) == pytest.approx(losses(one.out), abs=1e-4)
    assert [entry["tokens"] for entry in log(two.out)] == [entry["tokens"] for entry in log(one.out)]
    weights, others = load_file(two.out / WEIGHTS), load_file(one.out / WEIGHTS)
    assert weights.keys() == others.keys()
    assert max(float((weights[name] - others[name]).abs().max()) for name in others) < 1e-4
    assert max(float(tensor.abs().max()) for tensor in others.values()) > 0.1


@pytest.mark.slow
def test_processes_of_a_launcher_end_with_what_started_them(place, tmp_path) -> None:
    launched = make_job(place, launcher="torchrun --nproc-per-node 2", epochs=500)

    def interrupt(done: int, total: int, note: str) -> None:
        assert len(of_folder(tmp_path / "train")) >= 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(replace(launched, out=tmp_path / "out"), tmp_path / "train", interrupt)
    end = time.monotonic() + 10
    while of_folder(tmp_path / "train") and time.monotonic() < end:
        time.sleep(0.05)
    assert not of_folder(tmp_path / "train")
    assert not (tmp_path / "out").exists()
