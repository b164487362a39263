"""Fine-tuning of the student, in its own process: Unsloth on a GPU, plain TRL and PEFT elsewhere.

`python -m tapir_local.training.train FOLDER` does the TrainJob in FOLDER/job.json.
"""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from tapir_local.errors import TapirError
from tapir_local.files import atomic_write, read_record, read_rows, remove_path, write_json, write_rows
from tapir_local.memory import check_disk_space, single_gpu_variables
from tapir_local.process import Killed, OutOfMemory, Unsupported, child_main, run_in_process, say_on_stderr, send_remark
from tapir_local.records import Example, Progress, noop
from tapir_local.resources import find_model_folder
from tapir_local.training import checkpoints
from tapir_local.training.checkpoints import Course
from tapir_local.training.job import (
    LEFT_OUT,
    RowOrder,
    TokenRows,
    TrainJob,
    pack,
    sft_arguments,
    split_batch,
    token_rows,
)
from tapir_local.training.memory_estimate import check_room, checkpointing, footprint
from tapir_local.training.model import (
    Hardware,
    add_lora,
    check_folder,
    check_same_model,
    go_on_from,
    linear_names,
    load_model,
    load_tokenizer,
    look,
    positions,
    ran_out,
    without,
)
from tapir_local.training.steps import is_first, peak_memory, refuse_dead_weights, watcher
from tapir_local.unusable import format_common_reasons, refuse_too_many

__all__ = ["TrainJob", "train"]

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "unsloth",
    "unsloth_zoo",
    "bitsandbytes",
)
BESIDE = {".json", ".jinja", ".model", ".txt"}  # what a model's folder holds beside its weights: its tokenizer
LESS = "Lower student.max_length, set train.gradient_checkpointing, or write train.method: qlora."


@dataclass(frozen=True)
class Setup:
    """What a training starts from: the rows as a Dataset, and the arguments of SFTConfig less `output_dir`."""

    job: TrainJob
    hardware: Hardware
    dataset: Any
    arguments: dict[str, Any]


def train(
    job: TrainJob,
    folder: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] = say_on_stderr,
) -> None:
    """Run the job in a process of its own, which leaves job.json and train.log in `folder`, and checkpoints on its way.

    Cut anywhere, the same call goes on from the last checkpoint. Where the memory runs out it goes on with fewer rows
    at once, and says so; where the process was killed, which is how the kernel takes memory back, it does so once.
    `progress` gets (steps done, steps in all, loss). TapirError as from `run_job`, or when the process died.
    """
    launcher, killed = shlex.split(job.settings.launcher or ""), False
    while True:
        try:
            run_in_process("tapir_local.training.train", job, folder, progress, say, launcher)
        except OutOfMemory as error:
            smaller = with_less(job)
            if smaller is None or (killed and isinstance(error, Killed)):
                raise
            killed, job = isinstance(error, Killed), smaller
            say(f"{error.what}; it goes on with {job.micro} rows at once, and as many to a step as before.")
        except Unsupported as error:
            if job.settings.backend != "auto":
                raise
            job = replace(job, settings=job.settings.model_copy(update={"backend": "trl"}))
            say(f"Training with plain TRL and PEFT, not with Unsloth: {error.what}.")
        else:
            return


def with_less(job: TrainJob) -> TrainJob | None:
    """The job with half as many rows in memory at once, or fewer; None where there is but one."""
    batch = job.settings.batch_size
    micro, _ = split_batch(batch, job.micro or job.settings.micro_batch_size)
    return None if micro == 1 else replace(job, micro=split_batch(batch, micro // 2)[0])


def run_folder(folder: Path, progress: Progress) -> None:
    """The child's side of `train`: the environment first, since the libraries read it when they are imported."""
    job = read_record(TrainJob, folder / "job.json")
    os.environ.update({**environment(job.model), **single_gpu_variables()})
    run_job(job, progress, folder)


def environment(model: str) -> dict[str, str]:
    """Variables for a training process: nothing is sent anywhere, nor asked for where the model is a folder."""
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}
    return quiet | offline


def run_job(job: TrainJob, progress: Progress = noop, folder: Path | None = None) -> None:
    """Train and write what was trained; TapirError when model, template, rows or earlier adapter do not serve.

    Checkpoints are made in `folder`, where one is named, and gone on from. Of several processes that a launcher has
    started, the first writes.
    """
    examples = read_rows(Example, job.rows)
    if not examples:
        raise TapirError("no rows to train on", where=str(job.rows), fix="Make them again: `tapir-local redo`.")
    check_folder(job.model)
    with TemporaryDirectory(prefix="tapir-train-") as scratch:
        os.environ["UNSLOTH_COMPILE_LOCATION"] = scratch  # else generated code lands in the current folder
        hardware = look(job.settings, partial(send_remark, progress))
        tokenizer = load_tokenizer(job.model)
        job = within(job, partial(send_remark, progress))
        tokens = learnable(token_rows(examples, tokenizer, job.max_length), job, folder)
        setup = set_up(job, hardware, tokens, partial(send_remark, progress))
        course = under_way(setup, tokens, folder)
        model, shape = load(setup)
        fit(model, tokenizer, setup, course, Path(scratch), progress)
        refuse_dead_weights(model, job, hardware.precision)
    if is_first():
        end = {"seconds": time.monotonic() - course.began, **peak_memory()}
        write_trained(job, model, resolved(setup, shape, tokens), [*course.log, end])
        if folder:
            checkpoints.clear(folder)
    progress(len(course.log), len(course.log), f"loss {course.log[-1]['loss']:.3f}, {tokens}")


def within(job: TrainJob, say: Callable[[str], None]) -> TrainJob:
    """The job with rows no longer than the model was made for: beyond that Unsloth would stretch its positions, which
    neither the GGUF nor plain transformers does."""
    most = positions(job.model)
    if most is None or job.max_length <= most:
        return job
    asked = f"student.max_length is {job.max_length:,}"
    say(f"The student was made for {most:,} tokens: longer rows are left out ({asked}).")
    return replace(job, max_length=most)


def learnable(tokens: TokenRows, job: TrainJob, folder: Path | None) -> TokenRows:
    """The rows; those left out are recorded in `folder`. TapirError where none is left, or too few."""
    if folder and is_first():
        remove_path(folder / LEFT_OUT)
        if tokens.left_out:
            write_rows(folder / LEFT_OUT, tokens.left_out)
    if not tokens.rows:
        first = tokens.left_out[0]
        raise TapirError(
            f"no row is left to train on: {format_common_reasons(tokens.left_out)}. "
            f"The first: {first.id} ({first.reason})",
            where=str(job.rows),
            fix=f"Raise student.max_length ({job.max_length} now) for rows that are too long; for refused ones, set "
            "student.chat_template to a template that takes them.",
        )
    total = len(tokens.rows) + len(tokens.left_out)
    refuse_too_many(tokens.left_out, total, job.unusable, str(job.rows))
    return tokens


def set_up(job: TrainJob, hardware: Hardware, tokens: TokenRows, say: Callable[[str], None]) -> Setup:
    """All that is settled before the model is loaded; TapirError where memory or disk will not do."""
    from datasets import Dataset

    dataset = pack(tokens.rows, job.max_length) if job.settings.packing else Dataset.from_list(tokens.rows)
    arguments = sft_arguments(job, hardware, len(dataset))
    longest = job.max_length if job.settings.packing else max(len(row["input_ids"]) for row in tokens.rows)
    needs = footprint(job.model, job.settings, hardware, arguments["per_device_train_batch_size"] * longest)
    twice = arguments["gradient_checkpointing"] = checkpointing(job.settings, hardware, needs)
    if needs and is_first():
        check_room(needs, job.settings, hardware, twice, say)
        kept = 2 * needs.state if job.settings.checkpoint_minutes else 0  # the one before is deleted after the next
        trained = needs.weights if job.settings.method == "full" else needs.state
        check_disk_space(job.out, kept + trained, "what is trained and its checkpoints")
    return Setup(job, hardware, dataset, arguments)


def under_way(setup: Setup, tokens: TokenRows, folder: Path | None) -> Course:
    """The course, from its beginning or from the last checkpoint of the same job; all others are deleted."""
    job = setup.job
    if folder is None:
        return Course()
    digest = checkpoints.digest_of(job, setup.hardware, tokens, setup.arguments, versions())
    course = Course(digest, folder, job.settings.checkpoint_minutes)
    last = checkpoints.newest(folder, digest)
    if last:
        checkpoints.go_on(course, last)
    if is_first():
        checkpoints.clear(folder, but=last)
    return course


def load(setup: Setup) -> tuple[Any, dict[str, Any]]:
    """The model to be trained, with its LoRA layers and from an earlier training if any; the arguments of LoraConfig,
    {} where all weights are trained."""
    job, hardware = setup.job, setup.hardware
    settings, twice = job.settings, setup.arguments["gradient_checkpointing"]
    full = settings.method == "full"
    if full and job.adapter_from:
        check_same_model(job.adapter_from, find_model_folder(job.model))
    model = load_model(
        str(job.adapter_from) if full and job.adapter_from else job.model,
        hardware,
        method=settings.method,
        max_length=job.max_length,
        seed=job.random_seed,
        checkpointing=twice,
    )
    if full:
        return model, {}
    lora = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    shape = {**lora, "bias": "none", "target_modules": linear_names(model)}
    model = add_lora(model, shape, hardware, job.random_seed, twice)
    if job.adapter_from:
        go_on_from(model, job.adapter_from, shape)
    return model, shape


def fit(model: Any, tokenizer: Any, setup: Setup, course: Course, scratch: Path, progress: Progress) -> None:
    """Train to the end, one entry in the course's log for each step. OutOfMemory when the memory runs out, Unsupported
    where Unsloth fails before the first step has ended."""
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    job, output = setup.job, course.folder or scratch
    last = checkpoints.newest(output, course.job) if course.resumed else None
    micro = setup.arguments["per_device_train_batch_size"]
    try:
        arguments = SFTConfig(**setup.arguments, output_dir=str(output))
        arguments._n_gpu = min(arguments.n_gpu, 1)  # else each batch goes to all visible GPUs, and is so much larger
        order = RowOrder([*map(len, setup.dataset["input_ids"])], job.settings.batch_size, job.random_seed)
        ordered = type("Trainer", (SFTTrainer,), {"_get_train_sampler": lambda self, rows=None: order})
        trainer = ordered(model, arguments, train_dataset=setup.dataset, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watcher(course, job, setup.hardware, order, progress))
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except TapirError:
        raise
    except Exception as error:
        if ran_out(error):
            raise OutOfMemory(f"the memory ran out with {micro} rows at once", where="train", fix=LESS) from error
        if setup.hardware.backend == "unsloth" and not course.log:
            raise without(error, job.model, "train") from error
        raise


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what is learned."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def resolved(setup: Setup, shape: Mapping[str, Any], tokens: TokenRows) -> dict[str, Any]:
    """What was made of the settings: for resolved.json."""
    job, hardware = setup.job, setup.hardware
    micro = setup.arguments["per_device_train_batch_size"]
    return {
        "model": job.model,
        "method": job.settings.method,
        "device": hardware.device,
        "backend": hardware.backend,
        "precision": hardware.precision,
        "processes": hardware.processes,
        "versions": versions(),
        "rows": tokens.counts,
        "micro_batch_size": {"asked": job.settings.micro_batch_size, "used": micro},
        "lora": shape,
        "sft": setup.arguments,
    }


def write_trained(job: TrainJob, model: Any, settled: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> None:
    """The folder of what was trained: the adapter, or the whole model with its tokenizer; beside it resolved.json and
    train_log.jsonl."""
    with atomic_write(job.out) as partial:
        model.save_pretrained(partial)
        if job.settings.method == "full":
            copy_beside(find_model_folder(job.model), partial)
        else:
            config = orjson.loads((partial / "adapter_config.json").read_bytes())
            config["target_modules"] = settled["lora"]["target_modules"]  # PEFT writes a set, Unsloth a regex
            write_json(partial / "adapter_config.json", config)
        (partial / "README.md").unlink(missing_ok=True)  # an empty form, and the run has its own card
        write_json(partial / "resolved.json", settled)
        (partial / "train_log.jsonl").write_bytes(
            b"".join(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE) for entry in log)
        )


def copy_beside(model: Path, out: Path) -> None:
    """The student's tokenizer and template, as they are, beside its trained weights: a whole model."""
    for file in model.iterdir():
        if file.suffix in BESIDE and not file.name.endswith(".index.json") and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)


if __name__ == "__main__":
    sys.exit(child_main(run_folder))
