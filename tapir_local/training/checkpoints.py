"""Training checkpoints: saved at a time interval, bound to one job, and only the newest complete one is kept."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from tapir_local.files import remove_path, sync_to_disk, write_json
from tapir_local.training.job import TokenRows, TrainJob
from tapir_local.training.model import Hardware

COMPLETE_MARKER = "whole.json"  # written last: a checkpoint without it is incomplete
# Arguments that decide how a batch is computed. They change the result only by rounding.
HARDWARE_ARGUMENTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    "gradient_checkpointing",
)
TRACKER_ARGUMENTS = ("report_to", "run_name", "project")  # where the loss is reported; they change no result


@dataclass
class TrainingState:
    """The state of one training besides its weights: its log, and when and where the next checkpoint is saved.

    `job` is the digest that the checkpoints are bound to, `folder` is where they are saved (None: nowhere), and
    `minutes` is the time between two of them (0: none are saved).
    """

    job: str = ""
    folder: Path | None = None
    minutes: float = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    began: float = 0
    saved: float = 0
    resumed: bool = False


def job_digest(
    job: TrainJob, hardware: Hardware, tokens: TokenRows, arguments: Mapping[str, Any], versions: Mapping[str, str]
) -> str:
    """Identify a training by its rows, weights, settings, hardware and library versions.

    The micro-batch size is left out, which changes the result only by rounding, and so is the tracker.
    """
    exempt = (*HARDWARE_ARGUMENTS, *TRACKER_ARGUMENTS)
    known = {
        "rows": tokens.rows,
        "model": weight_file_stats(Path(job.model)),
        "from": weight_file_stats(job.adapter_from) if job.adapter_from else [],
        "train": job.settings.model_dump(include={"method", "lora_rank", "lora_alpha", "lora_dropout"}),
        "sft": {name: value for name, value in arguments.items() if name not in exempt} | {"report_to": "none"},
        "hardware": [hardware.device, hardware.backend, hardware.precision, hardware.processes],
        "versions": versions,
    }
    return hashlib.sha256(orjson.dumps(known, option=orjson.OPT_SORT_KEYS)).hexdigest()


def weight_file_stats(folder: Path) -> list[tuple[str, int, int]]:
    """Path, size in bytes and modification time of each weight file, which may be too large to hash; a Hub name has 0
    and 0."""
    if not folder.is_dir():
        return [(str(folder), 0, 0)]
    files = sorted(folder.glob("*.safetensors"))
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def latest_checkpoint(folder: Path, job: str) -> Path | None:
    """The newest complete checkpoint of a job, or None."""
    found = sorted(folder.glob("checkpoint-*"), key=checkpoint_step, reverse=True)
    return next((path for path in found if read_complete_marker(path).get("job") == job), None)


def checkpoint_step(checkpoint: Path) -> int:
    """The training step in a checkpoint's name; -1 if the name has none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def read_complete_marker(checkpoint: Path) -> dict[str, Any]:
    """The marker of a complete checkpoint; {} if the checkpoint is incomplete."""
    try:
        return dict(orjson.loads((checkpoint / COMPLETE_MARKER).read_bytes()))
    except (OSError, ValueError):
        return {}


def delete_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Delete all checkpoints in a folder except one."""
    for path in folder.glob("checkpoint-*"):
        if path != but:
            remove_path(path)


def restore_state(training: TrainingState, checkpoint: Path) -> None:
    """Restore the training log from a checkpoint."""
    training.log, training.resumed = read_complete_marker(checkpoint)["log"], True


def start_clock(training: TrainingState) -> None:
    """Start counting seconds, continuing from those before an interruption."""
    training.saved = time.monotonic()
    training.began = training.saved - (training.log[-1]["seconds"] if training.log else 0)


def complete_checkpoint(training: TrainingState, checkpoint: Path) -> None:
    """Mark a checkpoint as complete and delete the older ones."""
    for file in checkpoint.iterdir():
        sync_to_disk(file)
    write_json(checkpoint / COMPLETE_MARKER, {"job": training.job, "log": training.log})
    delete_checkpoints(checkpoint.parent, but=checkpoint)
    (checkpoint.parent / "README.md").unlink(missing_ok=True)  # TRL's empty model card
    training.saved = time.monotonic()


def is_checkpoint_due(training: TrainingState, processes: int) -> bool:
    """Whether to save a checkpoint now. With several processes, the clock of the first one decides."""
    wanted = training.folder is not None and 0 < 60 * training.minutes <= time.monotonic() - training.saved
    if processes == 1 or not training.minutes:
        return wanted
    from accelerate.utils import broadcast_object_list

    return bool(broadcast_object_list([wanted])[0])
