"""Fine-tune the student in its own process: with Unsloth on a GPU, otherwise with TRL and PEFT.

`python -m tapir_local.training.train FOLDER` runs the TrainJob in FOLDER/job.json.
"""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from tapir_local.errors import TapirError
from tapir_local.files import atomic_write, read_record, read_rows, remove_path, write_json, write_rows
from tapir_local.memory import allocator_variables, check_disk_space, single_gpu_variables
from tapir_local.process import Killed, OutOfMemory, Unsupported, child_main, run_in_process, say_on_stderr, send_remark
from tapir_local.records import Example, PreferencePair, Progress
from tapir_local.resources import find_model_folder
from tapir_local.training import checkpoints
from tapir_local.training.checkpoints import TrainingState
from tapir_local.training.generated_code import generated_code_folder
from tapir_local.training.job import (
    LEFT_OUT_FILE,
    RowOrder,
    TokenRows,
    TrainJob,
    pack_rows,
    sft_arguments,
    split_batch,
    token_rows,
)
from tapir_local.training.memory_estimate import check_training_memory, estimate_memory, use_gradient_checkpointing
from tapir_local.training.model import (
    Hardware,
    add_lora,
    check_model_path,
    detect_hardware,
    is_out_of_memory,
    linear_layer_names,
    load_adapter_weights,
    load_model,
    load_tokenizer,
    max_positions,
    unsloth_error,
)
from tapir_local.training.model_files import check_same_shape, copy_tokenizer_files
from tapir_local.training.optimizer_state import STATE_FILE, carries_state, carry_state
from tapir_local.training.preference import dpo_arguments, dpo_classes, drop_reference, pair_rows
from tapir_local.training.reporting import report_folder, tracker_environment
from tapir_local.training.steps import is_main_process, peak_memory, refuse_nonfinite_weights, training_callback
from tapir_local.unusable import format_common_reasons, refuse_too_many

VERSIONED_LIBRARIES = (
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
MEMORY_ADVICE = "Lower student.max_length, set train.gradient_checkpointing to true, or set train.method to qlora."


@dataclass(frozen=True)
class TrainingSetup:
    """What a training starts from: the rows as a Dataset, and the arguments of SFTConfig (or DPOConfig) except
    `output_dir`."""

    job: TrainJob
    hardware: Hardware
    dataset: Any
    arguments: dict[str, Any]


def run_training(
    job: TrainJob,
    folder: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] = say_on_stderr,
) -> None:
    """Train in a separate process, which leaves job.json, train.log and checkpoints in `folder`.

    After an interruption, the same call resumes from the last checkpoint. If memory runs out, the training resumes with
    a smaller micro-batch and reports it; if the process was killed, which is how the kernel reclaims memory, this is
    tried once. `progress` receives (steps done, total steps, loss). Raises TapirError as `train_student` does, or if
    the process died.
    """
    launcher, killed = shlex.split(job.settings.launcher or ""), False
    while True:
        try:
            run_in_process(training_main, job, folder, progress, say, launcher)
        except OutOfMemory as error:
            smaller = with_smaller_batch(job)
            if smaller is None or (killed and isinstance(error, Killed)):
                raise
            killed, job = isinstance(error, Killed), smaller
            same = "the batch size per step stays the same"
            say(f"{error.what}; training resumes with a micro-batch of {job.micro}, {same}.")
        except Unsupported as error:
            if job.settings.backend != "auto":
                raise
            job = replace(job, settings=job.settings.model_copy(update={"backend": "trl"}))
            say(f"Training with TRL and PEFT instead of Unsloth: {error.what}.")
        else:
            return


def with_smaller_batch(job: TrainJob) -> TrainJob | None:
    """The job with half the micro-batch size or less; None if it is already 1."""
    batch = job.settings.batch_size
    micro, _ = split_batch(batch, job.micro or job.settings.micro_batch_size)
    return None if micro == 1 else replace(job, micro=split_batch(batch, micro // 2)[0])


def training_main(folder: Path, progress: Progress) -> None:
    """Run the job in `folder`: the entry point of the training process."""
    job = read_record(TrainJob, folder / "job.json")
    tracker = tracker_environment(job.settings, job.out)  # first: training_environment says that the Hub is offline
    variables = {**training_environment(job.model), **allocator_variables(), **single_gpu_variables(), **tracker}
    os.environ.update(variables)  # before the libraries are imported
    if tracker:
        report_folder(job.out).mkdir(parents=True, exist_ok=True)
    train_student(job, progress, folder)


def training_environment(model: str) -> dict[str, str]:
    """Environment variables for a training process: no telemetry, and no Hub access if the model is a folder."""
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}
    return quiet | offline


def train_student(
    job: TrainJob, progress: Progress = lambda done, total, note: None, folder: Path | None = None
) -> None:
    """Train and write the result. Raises TapirError if the model, template, rows or earlier adapter cannot be used.

    Checkpoints are saved in `folder`, if given, and resumed from. With several processes started by a launcher, the
    first one writes.
    """
    if not read_rows(Example, job.rows):
        raise TapirError("no rows to train on", where=str(job.rows), fix="Create them again with `tapir-local redo`.")
    check_model_path(job.model)
    with TemporaryDirectory(prefix="tapir-train-") as scratch:
        generated = generated_code_folder(job.unsloth_cache, library_versions())
        os.environ["UNSLOTH_COMPILE_LOCATION"] = str(generated or scratch)  # otherwise it is the current folder
        hardware = detect_hardware(job.settings, partial(send_remark, progress))
        tokenizer = load_tokenizer(job.model)
        job = limit_row_length(job, partial(send_remark, progress))
        tokens = check_trainable(read_token_rows(job, tokenizer), job, folder)
        setup = set_up_training(job, hardware, tokens, partial(send_remark, progress))
        training = start_or_resume(setup, tokens, folder)
        model, shape = load_student(setup)
        fit_student(model, tokenizer, setup, training, Path(scratch), progress)
        refuse_nonfinite_weights(model, job, hardware.precision)
        if is_main_process():
            end = {"seconds": time.monotonic() - training.began, **peak_memory()}
            log = [*training.log, end]
            save_trained(job, model, resolved_settings(setup, shape, tokens), log, Path(scratch) / STATE_FILE)
    if folder and is_main_process():
        checkpoints.delete_checkpoints(folder)
    progress(len(training.log), len(training.log), f"loss {training.log[-1]['loss']:.3f}, {tokens}")


def limit_row_length(job: TrainJob, say: Callable[[str], None]) -> TrainJob:
    """Limit rows to the length the model was made for. Unsloth would stretch the positions of longer ones; neither the
    GGUF nor plain transformers does."""
    most = max_positions(job.model)
    if most is None or job.max_length <= most:
        return job
    setting = f"student.max_length is {job.max_length:,}"
    say(f"The student supports {most:,} tokens: longer rows are left out ({setting}).")
    return replace(job, max_length=most)


def read_token_rows(job: TrainJob, tokenizer: Any) -> TokenRows:
    """The rows of the job, or its pairs, as token ids."""
    if job.on_pairs:
        return pair_rows(read_rows(PreferencePair, job.rows), tokenizer, job.max_length)
    return token_rows(read_rows(Example, job.rows), tokenizer, job.max_length)


def check_trainable(tokens: TokenRows, job: TrainJob, folder: Path | None) -> TokenRows:
    """The rows; those left out are recorded in `folder`. Raises TapirError if none or too few are left."""
    if folder and is_main_process():
        remove_path(folder / LEFT_OUT_FILE)
        if tokens.left_out:
            write_rows(folder / LEFT_OUT_FILE, tokens.left_out)
    if not tokens.rows:
        first = tokens.left_out[0]
        raise TapirError(
            f"no row is left to train on: {format_common_reasons(tokens.left_out)}. "
            f"The first: {first.id} ({first.reason})",
            where=str(job.rows),
            fix=f"Raise student.max_length ({job.max_length} now) if rows are too long; if rows are refused, set "
            "student.chat_template to a template that accepts them.",
        )
    total = len(tokens.rows) + len(tokens.left_out)
    refuse_too_many(tokens.left_out, total, job.unusable, str(job.rows))
    return tokens


def set_up_training(job: TrainJob, hardware: Hardware, tokens: TokenRows, say: Callable[[str], None]) -> TrainingSetup:
    """Decide everything that does not need the model. Raises TapirError if memory or disk space is too small."""
    from datasets import Dataset

    dataset = pack_rows(tokens.rows, job.max_length) if job.settings.packing else Dataset.from_list(tokens.rows)
    arguments = (dpo_arguments if job.on_pairs else sft_arguments)(job, hardware, len(dataset))
    longest = job.max_length if job.settings.packing else max(len(row["input_ids"]) for row in tokens.rows)
    batch = arguments["per_device_train_batch_size"] * longest * (2 if job.on_pairs else 1)
    needs = estimate_memory(job.model, job.settings, hardware, batch, whole_logits=job.on_pairs)
    recompute = arguments["gradient_checkpointing"] = use_gradient_checkpointing(job.settings, hardware, needs)
    if needs and is_main_process():
        check_training_memory(needs, job.settings, hardware, recompute, say)
        kept = (
            2 * needs.state if job.settings.checkpoint_minutes else 0
        )  # a checkpoint is deleted after the next one is saved
        trained = needs.weights if job.settings.method == "full" else needs.state
        check_disk_space(job.out, kept + trained, "the trained weights and their checkpoints")
    return TrainingSetup(job, hardware, dataset, arguments)


def start_or_resume(setup: TrainingSetup, tokens: TokenRows, folder: Path | None) -> TrainingState:
    """A new training state, or the one of the job's last checkpoint; all other checkpoints are deleted."""
    job = setup.job
    if folder is None:
        return TrainingState()
    digest = checkpoints.job_digest(job, setup.hardware, tokens, setup.arguments, library_versions())
    training = TrainingState(digest, folder, job.settings.checkpoint_minutes)
    last = checkpoints.latest_checkpoint(folder, digest)
    if last:
        checkpoints.restore_state(training, last)
    if is_main_process():
        checkpoints.delete_checkpoints(folder, but=last)
    return training


def load_student(setup: TrainingSetup) -> tuple[Any, dict[str, Any]]:
    """Load the model to train, with its LoRA layers and an earlier training's weights if any. Also returns the
    arguments of LoraConfig, {} for full fine-tuning."""
    job, hardware = setup.job, setup.hardware
    settings, recompute = job.settings, setup.arguments["gradient_checkpointing"]
    full = settings.method == "full"
    if full and job.adapter_from:
        check_same_shape(job.adapter_from, find_model_folder(job.model))
    model = load_model(
        str(job.adapter_from) if full and job.adapter_from else job.model,
        hardware,
        method=settings.method,
        max_length=job.max_length,
        seed=job.random_seed,
        checkpointing=recompute,
    )
    if full:
        return model, {}
    lora = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    shape = {**lora, "bias": "none", "target_modules": linear_layer_names(model)}
    model = add_lora(model, shape, hardware, job.random_seed, recompute)
    if job.adapter_from:
        load_adapter_weights(model, job.adapter_from, shape)
    return model, shape


def fit_student(
    model: Any, tokenizer: Any, setup: TrainingSetup, training: TrainingState, scratch: Path, progress: Progress
) -> None:
    """Train to the end, with one log entry per step.

    Raises OutOfMemory if memory runs out, and Unsupported if Unsloth fails before the first step is done.
    """
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    job, output = setup.job, training.folder or scratch
    last = checkpoints.latest_checkpoint(output, training.job) if training.resumed else None
    micro = setup.arguments["per_device_train_batch_size"]
    try:
        config, kind = dpo_classes() if job.on_pairs else (SFTConfig, SFTTrainer)
        arguments = config(**setup.arguments, output_dir=str(output))
        arguments._n_gpu = min(arguments.n_gpu, 1)  # otherwise DataParallel multiplies the batch by the number of GPUs
        order = RowOrder([*map(len, setup.dataset["input_ids"])], job.settings.batch_size, job.random_seed)
        ordered = type("Trainer", (kind,), {"_get_train_sampler": lambda self, rows=None: order})
        with keep_trained_precision(model) if setup.hardware.backend == "trl" else nullcontext():
            trainer = ordered(model, args=arguments, train_dataset=setup.dataset, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(training_callback(training, job, setup.hardware, order, progress))
        if carries_state(job):
            trainer.add_callback(carry_state(job, bool(last), scratch, partial(send_remark, progress)))
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        drop_reference(model)
    except TapirError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            what = f"memory ran out with a micro-batch of {micro}"
            raise OutOfMemory(what, where="train", fix=MEMORY_ADVICE) from error
        if setup.hardware.backend == "unsloth" and not training.log:
            raise unsloth_error(error, job.model, "train") from error
        raise


@contextmanager
def keep_trained_precision(model: Any) -> Iterator[None]:
    """Undo a change of the trained weights' precision within the block.

    SFTTrainer casts the adapters of a quantized model to bf16 (trl 1.14), in which the small updates of a step round
    away. The loss scaling of f16 cannot work on such gradients either. Unsloth removes that cast.
    """
    before = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
    yield
    for weight, value in before:
        if weight.dtype != value.dtype:
            weight.data = value.to(weight.device)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that affect training."""
    found = {}
    for name in VERSIONED_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def resolved_settings(setup: TrainingSetup, shape: Mapping[str, Any], tokens: TokenRows) -> dict[str, Any]:
    """The effective settings, for resolved.json."""
    job, hardware = setup.job, setup.hardware
    micro = setup.arguments["per_device_train_batch_size"]
    return {
        "model": job.model,
        "method": job.settings.method,
        "device": hardware.device,
        "backend": hardware.backend,
        "precision": hardware.precision,
        "processes": hardware.processes,
        "versions": library_versions(),
        "rows": tokens.counts,
        "micro_batch_size": {"asked": job.settings.micro_batch_size, "used": micro},
        "lora": shape,
        "dpo" if job.on_pairs else "sft": setup.arguments,
    }


def save_trained(
    job: TrainJob, model: Any, settled: Mapping[str, Any], log: Sequence[Mapping[str, Any]], moments: Path
) -> None:
    """Write the adapter, or the whole model with its tokenizer, together with resolved.json and train_log.jsonl, and
    with the optimizer's state if the training kept it in `moments`."""
    with atomic_write(job.out) as partial:
        model.save_pretrained(partial)
        if moments.exists():
            shutil.copyfile(moments, partial / STATE_FILE)
        if job.settings.method == "full":
            copy_tokenizer_files(find_model_folder(job.model), partial)
        else:
            config = orjson.loads((partial / "adapter_config.json").read_bytes())
            config["target_modules"] = settled["lora"][
                "target_modules"
            ]  # PEFT writes them in no fixed order, Unsloth as a regex
            write_json(partial / "adapter_config.json", config)
        (partial / "README.md").unlink(missing_ok=True)  # an empty model card; the run writes its own
        write_json(partial / "resolved.json", settled)
        (partial / "train_log.jsonl").write_bytes(
            b"".join(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE) for entry in log)
        )


if __name__ == "__main__":
    sys.exit(child_main(training_main))
