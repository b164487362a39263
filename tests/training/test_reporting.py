"""A tracker gets its name, its run and its files' place, and no run begins that cannot report to it."""

import json
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from models import make_model
from training_rows import SETTINGS, examples

from tapir_local.errors import TapirError
from tapir_local.files import write_rows
from tapir_local.process import child_environment, pass_variables
from tapir_local.recipe.schema import Train
from tapir_local.recipe.text import diff_recipes, override
from tapir_local.training.checkpoints import job_digest
from tapir_local.training.job import TokenRows, TrainJob, sft_arguments
from tapir_local.training.model import Hardware
from tapir_local.training.reporting import TRACKER_KEYS, check_tracker, tracker_environment
from tapir_local.training.train import run_training

CPU = Hardware("cpu", "trl", "f32", 1 << 34)


def reporting(name: str) -> Train:
    return SETTINGS.model_copy(update={"report_to": name})


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return TrainJob("student", tmp_path / "rows", tmp_path / "mine" / "round-01" / "adapter", reporting("wandb"), 64, 7)


def test_the_trainer_gets_tracker_run_and_round(job):
    found = sft_arguments(job, CPU, 32)
    assert (found["report_to"], found["run_name"], found["project"]) == ("wandb", "mine/round-01", "tapir-local")
    silent = sft_arguments(replace(job, settings=SETTINGS), CPU, 32)
    assert silent["report_to"] == "none"
    assert "run_name" not in silent


def test_a_checkpoint_is_of_the_same_job_with_another_tracker(job):
    digests = {
        job_digest(given, CPU, TokenRows([]), sft_arguments(given, CPU, 32), {})
        for given in (job, replace(job, settings=SETTINGS))
    }
    assert len(digests) == 1


def test_a_run_may_change_its_tracker(recipe):
    assert diff_recipes(recipe, override(recipe, {"train.report_to": "mlflow"})) == []


def test_files_stay_in_the_runs_folder_and_nothing_leaves_an_offline_machine(job, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DIR", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    run = job.out.parent.parent
    assert tracker_environment(reporting("wandb"), job.out)["WANDB_DIR"] == str(run / "reports")
    assert "WANDB_MODE" not in tracker_environment(reporting("wandb"), job.out)
    board = tracker_environment(reporting("tensorboard"), job.out)
    assert board == {"TENSORBOARD_LOGGING_DIR": str(run / "reports" / "tensorboard" / "round-01")}
    assert tracker_environment(reporting("mlflow"), job.out)["MLFLOW_TRACKING_URI"].endswith("/mine/reports/mlflow.db")
    assert tracker_environment(reporting("mlflow"), job.out)["MLFLOW_DISABLE_TELEMETRY"] == "true"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert tracker_environment(reporting("wandb"), job.out)["WANDB_MODE"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert "WANDB_MODE" not in tracker_environment(reporting("wandb"), job.out)


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="MLflow is installed")
def test_a_tracker_that_is_not_installed_is_refused_by_name():
    with pytest.raises(TapirError, match="needs the package mlflow") as refused:
        check_tracker(reporting("mlflow"))
    assert "pip install mlflow" in refused.value.fix
    check_tracker(SETTINGS)


def test_mlflow_without_a_database_is_refused_unless_it_has_a_server(tmp_path, monkeypatch):
    """As mlflow-skinny is installed: the training failed, after everything was paid for."""
    (tmp_path / "mlflow.py").write_text("")  # a package of that name
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TapirError, match="needs SQLAlchemy") as refused:
        check_tracker(reporting("mlflow"))
    assert "mlflow-skinny is not enough" in refused.value.fix
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    check_tracker(reporting("mlflow"))


@pytest.mark.skipif(find_spec("mlflow") is None or find_spec("sqlalchemy") is None, reason="MLflow is not installed")
def test_mlflow_gets_the_loss_of_a_real_training(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_rows(tmp_path / "rows", examples(32))
    out = tmp_path / "mine" / "round-00" / "adapter"
    base = make_model(tmp_path / "base")
    run_training(TrainJob(str(base), tmp_path / "rows", out, reporting("mlflow"), 128, 7), out.parent / "train")
    with closing(sqlite3.connect(tmp_path / "mine" / "reports" / "mlflow.db")) as conn:
        assert conn.execute("select name, status from runs").fetchall() == [("mine/round-00", "FINISHED")]
        steps = conn.execute("select value from metrics where key = 'loss' order by step").fetchall()
    logged = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert [value for (value,) in steps] == pytest.approx([line["loss"] for line in logged if "loss" in line], abs=1e-3)


def test_wandb_without_a_key_is_refused_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("")  # a package of that name
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TapirError, match="there is no key for it"):
        check_tracker(reporting("wandb"))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    check_tracker(reporting("wandb"))
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker(reporting("wandb"))


def test_only_a_training_that_reports_gets_the_trackers_key(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert "WANDB_API_KEY" not in child_environment("tapir_local.training.train")
    with pass_variables(TRACKER_KEYS["wandb"]):
        assert child_environment("tapir_local.training.train")["WANDB_API_KEY"] == "k"
    assert "WANDB_API_KEY" not in child_environment("tapir_local.training.train")


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_gets_the_loss_of_a_real_training(tmp_path):
    write_rows(tmp_path / "rows", examples(32))
    out = tmp_path / "mine" / "round-00" / "adapter"
    base = make_model(tmp_path / "base")
    run_training(TrainJob(str(base), tmp_path / "rows", out, reporting("tensorboard"), 128, 7), out.parent / "train")
    (events,) = (tmp_path / "mine" / "reports" / "tensorboard" / "round-00").glob("events*")
    assert b"train/loss" in events.read_bytes()
    assert json.loads((out / "resolved.json").read_text())["sft"]["report_to"] == "tensorboard"
