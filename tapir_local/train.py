"""Fine-tuning of the student, in its own process: Unsloth on a GPU, plain TRL and PEFT elsewhere.

`python -m tapir_local.train FOLDER` does the TrainJob in FOLDER/job.json.
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

from tapir_local import checkpoints
from tapir_local.assets import model_folder
from tapir_local.checkpoints import Course
from tapir_local.errors import TapirError
from tapir_local.footprint import check_room, checkpointing, footprint
from tapir_local.lora import (
    Hardware,
    add_lora,
    check_folder,
    check_same_model,
    go_on_from,
    linear_names,
    load_model,
    load_tokenizer,
    look,
)
from tapir_local.memory import check_disk
from tapir_local.process import Killed, OutOfMemory, Progress, child_main, in_own_process, remark, say_on_stderr
from tapir_local.records import Example
from tapir_local.rundir import read_record, read_rows, whole, write_json
from tapir_local.sft import TokenRows, TrainJob, pack, sft_arguments, split_batch, token_rows

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
            in_own_process("tapir_local.train", job, folder, progress, say, launcher)
        except OutOfMemory as error:
            smaller = with_less(job)
            if smaller is None or (killed and isinstance(error, Killed)):
                raise
            killed, job = isinstance(error, Killed), smaller
            say(f"{error.what}; it goes on with {job.micro} rows at once, and as many to a step as before.")
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
    os.environ.update(environment(job.model))
    run_job(job, progress, folder)


def environment(model: str) -> dict[str, str]:
    """Variables for a training process: nothing is sent anywhere, nor asked for where the model is a folder."""
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}
    return quiet | offline


def run_job(job: TrainJob, progress: Progress = lambda done, total, note: None, folder: Path | None = None) -> None:
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
        hardware = look(job.settings, partial(remark, progress))
        tokenizer = load_tokenizer(job.model)
        tokens = learnable(token_rows(examples, tokenizer, job.max_length), job)
        setup = set_up(job, hardware, tokens, partial(remark, progress))
        course = under_way(setup, tokens, folder)
        model, shape = load(setup)
        fit(model, tokenizer, setup, course, Path(scratch), progress)
    if is_first():
        end = {"seconds": time.monotonic() - course.began, "peak_memory": peak_memory()}
        write_trained(job, model, resolved(setup, shape, tokens), [*course.log, end])
        if folder:
            checkpoints.clear(folder)
    progress(len(course.log), len(course.log), f"loss {course.log[-1]['loss']:.3f}, {tokens}")


def learnable(tokens: TokenRows, job: TrainJob) -> TokenRows:
    """The rows; TapirError where none is left."""
    if not tokens.rows:
        raise TapirError(
            f"every prompt fills the {job.max_length} tokens of a row",
            where=str(job.rows),
            fix="Raise student.max_length.",
        )
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
        check_disk(job.out, kept + trained, "what is trained and its checkpoints")
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
        check_same_model(job.adapter_from, model_folder(job.model))
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
    """Train to the end, one entry in the course's log for each step. OutOfMemory when the memory runs out."""
    import torch
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    output = course.folder or scratch
    last = checkpoints.newest(output, course.job) if course.resumed else None
    micro = setup.arguments["per_device_train_batch_size"]
    try:
        arguments = SFTConfig(**setup.arguments, output_dir=str(output))
        trainer = SFTTrainer(model, arguments, train_dataset=setup.dataset, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watcher(course, setup, progress))
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises the plain class
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        raise OutOfMemory(f"the memory ran out with {micro} rows at once", where="train", fix=LESS) from error


def watcher(course: Course, setup: Setup, progress: Progress) -> Any:
    """A callback of the Trainer that keeps the log, passes steps on as progress, and makes checkpoints."""
    from transformers import TrainerCallback

    processes = setup.hardware.processes
    before = course.log[-1]["tokens"] if course.log else 0  # the Trainer counts from 0 again after a cut

    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoints.start_clock(course)

    def on_epoch_begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoints.epoch_begins(course, processes)

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if "loss" in logs:  # the summary at the end has none
            course.log.append(entry(course, state.global_step, logs, before, args.per_device_train_batch_size))
            progress(state.global_step, state.max_steps, f"loss {logs['loss']:.3f}")

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < state.max_steps and checkpoints.is_due(course, processes):
            control.should_save = True

    def on_save(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.distributed_state.wait_for_everyone()
        if is_first():
            checkpoints.keep(course, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    hooks = (on_train_begin, on_epoch_begin, on_log, on_step_end, on_save)
    return type("Watcher", (TrainerCallback,), {hook.__name__: hook for hook in hooks})()


def entry(course: Course, step: int, logs: Mapping[str, float], before: int, micro: int) -> dict[str, Any]:
    """A step for the log. `tokens` and `seconds` are counted from the beginning of the training, `tokens_per_second`
    from the step before; `peak_memory` is in bytes."""
    tokens, seconds = before + int(logs.get("num_tokens", 0)), time.monotonic() - course.began
    last = course.log[-1] if course.log else {"tokens": 0, "seconds": 0.0}
    return {
        "step": step,
        **{key: logs.get(key) for key in ("loss", "learning_rate", "grad_norm", "epoch")},
        "tokens": tokens,
        "tokens_per_second": (tokens - last["tokens"]) / max(seconds - last["seconds"], 1e-9),
        "seconds": seconds,
        "peak_memory": peak_memory(),
        "micro_batch_size": micro,
    }


def is_first() -> bool:
    """Whether this process is alone, or the first of those that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def peak_memory() -> int:
    """The most bytes that this process has held: of the GPU where there is one."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
    with whole(job.out) as partial:
        model.save_pretrained(partial)
        if job.settings.method == "full":
            copy_beside(model_folder(job.model), partial)
        else:
            config = orjson.loads((partial / "adapter_config.json").read_bytes())
            config["target_modules"].sort()  # PEFT writes a set, in another order each time
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
