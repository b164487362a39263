"""Checkpoints inside a training: made by the clock, whole or unheeded, tied to their job, the newest alone kept."""

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

MARK = "whole.json"  # written last: what lacks it was cut while it was written
# Arguments that decide how a batch goes through the hardware, but not what is learned from it, up to rounding.
CARRIED = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    "gradient_checkpointing",
)


@dataclass
class Course:
    """A training under way: its log, and when and where its next checkpoint is due.

    `job` is the digest that a checkpoint is known by, `folder` where checkpoints lie (None: there are none), `minutes`
    how far they are apart (0: none).
    """

    job: str = ""
    folder: Path | None = None
    minutes: float = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    began: float = 0
    saved: float = 0
    resumed: bool = False


def digest_of(
    job: TrainJob, hardware: Hardware, tokens: TokenRows, arguments: Mapping[str, Any], versions: Mapping[str, str]
) -> str:
    """What a checkpoint's job is known by: rows, weights, settings, hardware and libraries; how many rows are in memory
    at once makes no other job."""
    known = {
        "rows": tokens.rows,
        "model": weights_of(Path(job.model)),
        "from": weights_of(job.adapter_from) if job.adapter_from else [],
        "train": job.settings.model_dump(include={"method", "lora_rank", "lora_alpha", "lora_dropout"}),
        "sft": {name: value for name, value in arguments.items() if name not in CARRIED},
        "hardware": [hardware.device, hardware.backend, hardware.precision, hardware.processes],
        "versions": versions,
    }
    return hashlib.sha256(orjson.dumps(known, option=orjson.OPT_SORT_KEYS)).hexdigest()


def weights_of(folder: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of every file of weights, which may be too large to be read for it; a Hub name as it is."""
    if not folder.is_dir():
        return [(str(folder), 0, 0)]
    files = sorted(folder.glob("*.safetensors"))
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def newest(folder: Path, job: str) -> Path | None:
    """The last whole checkpoint of a job, if there is one."""
    found = sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)
    return next((path for path in found if read_mark(path).get("job") == job), None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was made, by its name; -1 for a name that is no checkpoint's."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def read_mark(checkpoint: Path) -> dict[str, Any]:
    """What was noted of a checkpoint once it was whole; {} where it is not."""
    try:
        return dict(orjson.loads((checkpoint / MARK).read_bytes()))
    except (OSError, ValueError):
        return {}


def clear(folder: Path, but: Path | None = None) -> None:
    """Delete the checkpoints in a folder, but one."""
    for path in folder.glob("checkpoint-*"):
        if path != but:
            remove_path(path)


def go_on(course: Course, checkpoint: Path) -> None:
    """Take up a course where a checkpoint has left it."""
    course.log, course.resumed = read_mark(checkpoint)["log"], True


def start_clock(course: Course) -> None:
    """Count the training's seconds from now, those before a cut among them."""
    course.saved = time.monotonic()
    course.began = course.saved - (course.log[-1]["seconds"] if course.log else 0)


def keep(course: Course, checkpoint: Path) -> None:
    """Mark a checkpoint as whole, and delete those before it."""
    for file in checkpoint.iterdir():
        sync_to_disk(file)
    write_json(checkpoint / MARK, {"job": course.job, "log": course.log})
    clear(checkpoint.parent, but=checkpoint)
    (checkpoint.parent / "README.md").unlink(missing_ok=True)  # TRL's empty form of a card
    course.saved = time.monotonic()


def is_due(course: Course, processes: int) -> bool:
    """Whether a checkpoint is to be made now; of several processes the first one's clock decides."""
    wanted = course.folder is not None and 0 < 60 * course.minutes <= time.monotonic() - course.saved
    if processes == 1 or not course.minutes:
        return wanted
    from accelerate.utils import broadcast_object_list

    return bool(broadcast_object_list([wanted])[0])
