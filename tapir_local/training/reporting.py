"""Report the loss of each step to a tracker: TensorBoard, Weights & Biases, Trackio or MLflow."""

import netrc
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.recipe.schema import Train
from tapir_local.resources import is_hub_offline

# Variables with the keys of trackers, which only a training that reports to them gets.
TRACKER_KEYS: Mapping[str, frozenset[str]] = {
    "wandb": frozenset({"WANDB_API_KEY"}),
    "mlflow": frozenset({"MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"}),
}
MLFLOW_PLACE = "MLFLOW_TRACKING_URI"
WANDB_HOST = "api.wandb.ai"
PROJECT = "tapir-local"


def check_tracker(settings: Train) -> None:
    """TapirError if the tracker of `train.report_to` is not installed, can write no file or, for wandb, has no key."""
    name = settings.report_to
    if name == "none":
        return
    if find_spec(name) is None:
        fix = f"pip install {name}, or set train.report_to to none."
        raise TapirError(f"train.report_to needs the package {name}, which is not installed", where="train", fix=fix)
    if name == "mlflow" and MLFLOW_PLACE not in os.environ and find_spec("sqlalchemy") is None:
        fix = f"pip install mlflow (mlflow-skinny is not enough), or set {MLFLOW_PLACE} to a server of yours."
        raise TapirError("train.report_to is mlflow, which needs SQLAlchemy to write a file", where="train", fix=fix)
    mode = os.environ.get("WANDB_MODE", "offline" if is_hub_offline() else "online")
    if name == "wandb" and mode == "online" and not has_wandb_key():
        fix = "Run `wandb login` or set WANDB_API_KEY; with WANDB_MODE=offline nothing is sent and no key is needed."
        raise TapirError("train.report_to is wandb, and there is no key for it", where="train", fix=fix)


def has_wandb_key() -> bool:
    """Whether the variable or the netrc file, where `wandb login` writes it, has a key for the host of wandb."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        host = os.environ.get("WANDB_BASE_URL", WANDB_HOST).removeprefix("https://").removeprefix("http://")
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host.strip("/")) is not None
    return False


def tracker_environment(settings: Train, out: Path) -> dict[str, str]:
    """Where the tracker keeps its files, in the run's folder, and no network for wandb on a machine that is offline
    or for MLflow's telemetry.

    `out` is what the training writes, in the folder of a round. Variables that the user has set stay as they are.
    """
    place, number = report_folder(out), out.absolute().parent.name
    variables = {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": str(place / "tensorboard" / number)},
        "wandb": {
            "WANDB_DIR": str(place),
            "WANDB_PROJECT": PROJECT,
            "WANDB_CONSOLE": "off",  # it would send what the training prints
            **({"WANDB_MODE": "offline"} if is_hub_offline() else {}),
        },
        "mlflow": {
            MLFLOW_PLACE: f"sqlite:///{place / 'mlflow.db'}",
            "MLFLOW_EXPERIMENT_NAME": PROJECT,
            "MLFLOW_DISABLE_TELEMETRY": "true",  # it would tell MLflow's makers how it is used
        },
    }.get(settings.report_to, {})
    return {key: value for key, value in variables.items() if key not in os.environ}


def report_folder(out: Path) -> Path:
    """The folder for trackers in the folder of the run whose round writes `out`."""
    return out.absolute().parent.parent / "reports"


def tracker_arguments(settings: Train, out: Path) -> dict[str, Any]:
    """The arguments of SFTConfig that name the tracker, and the run and round in it: `my-run/round-01`."""
    if settings.report_to == "none":
        return {"report_to": "none"}
    folder = out.absolute().parent
    return {"report_to": settings.report_to, "run_name": f"{folder.parent.name}/{folder.name}", "project": PROJECT}
