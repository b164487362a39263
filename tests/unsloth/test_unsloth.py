"""Our training through Unsloth's own GPU code, on a CPU: `make test-unsloth`; see stubs/sitecustomize.py."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import make_model, make_tokenizer
from safetensors.numpy import load_file
from training_rows import WEIGHTS, log, losses, resolved

from tapir_local.errors import TapirError
from tapir_local.files import write_rows
from tapir_local.recipe.schema import Train
from tapir_local.records import Example, Message, Progress
from tapir_local.training.job import TrainJob
from tapir_local.training.train import run_training, train_student

pytestmark = pytest.mark.unsloth

STUBS = Path(__file__).parent / "stubs"
# Triton's interpreter takes about 10 ms for each token, layer and kernel, so all of them are few.
SHAPE = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
OWN: dict[str, dict[str, Any]] = {
    "gemma3_text": {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"], "sliding_window": 8}
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
SUMS = {"2 + 3": "5.", "1 + 22": "23.", "3 + 1 + 3": "7.", "12 + 34 + 4": "50."}
LINEAR_LAYERS = [f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")]
SETTINGS = Train(
    backend="unsloth", precision="f16", learning_rate=2e-2, batch_size=4, micro_batch_size=2, lora_rank=4, lora_alpha=8,
    warmup=0.1, epochs=4.0, gradient_checkpointing=False, checkpoint_minutes=0,
)  # fmt: skip
TRL = {"backend": "trl", "precision": "auto", "gradient_checkpointing": False}  # on the CPU, in 32 bits
CLOSE = 0.01  # between a loss in f16 and one in f32; the largest that was looked at: 0.0023
LEARNED = 0.3  # so that a difference of CLOSE would show
EACH_STEP = 1e-9  # minutes


def make_job(folder: Path, family: str, **shape: Any) -> TrainJob:
    """A student of one layer and four rows of about ten tokens, with padding in each micro-batch."""
    kind = "qwen2" if family.startswith("qwen") else "smollm"
    make_model(folder / "base", family, kind=kind, template=TEMPLATE, **{**SHAPE, **OWN.get(family, {}), **shape})
    rows = [Example(asked, (Message("user", asked),), answer) for asked, answer in SUMS.items()]
    write_rows(folder / "rows.jsonl", rows)
    out, cache = folder / "unsloth", folder / "cache"
    return TrainJob(str(folder / "base"), folder / "rows.jsonl", out, SETTINGS, 64, 7, unsloth_cache=cache)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """The training processes started within the block have a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(STUBS), os.environ.get("PYTHONPATH")])))
        yield


def train_with_unsloth(job: TrainJob, progress: Progress | None = None) -> list[str]:
    """Train with `job`'s backend on the pretended GPU; return the remarks. The log is beside the adapter."""
    said: list[str] = []
    with pretended_gpu():
        run_training(job, log_folder(job), progress, said.append)
    return said


def train_with_trl(job: TrainJob, out: str) -> Path:
    """Train on the CPU, with nothing pretended; return the adapter."""
    plain = replace(job, settings=job.settings.model_copy(update=TRL), out=job.out.with_name(out))
    train_student(plain)
    return plain.out


def log_folder(job: TrainJob) -> Path:
    return job.out.with_name(f"{job.out.name}-log")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_two_rounds_are_like_trls(tmp_path: Path, family: str) -> None:
    """The code that Unsloth generated is deleted between them."""
    job = make_job(tmp_path, family)
    train_with_unsloth(job)
    check_saved(job)
    check_same(job.out, train_with_trl(job, "trl"))
    first = losses(job.out)
    assert first[-1] < first[0] - LEARNED
    shutil.rmtree(tmp_path / "cache")
    second = replace(job, out=tmp_path / "second", adapter_from=job.out)
    train_with_unsloth(second)
    check_saved(second)
    check_same(second.out, train_with_trl(second, "second-trl"))
    assert max(losses(second.out)) < first[0] - LEARNED


def check_saved(job: TrainJob) -> None:
    """The training was Unsloth's, and so was the trainer that it generated."""
    found = resolved(job.out)
    assert (found["backend"], found["device"], found["precision"]) == ("unsloth", "cuda", "f16")
    assert "2x faster free finetuning" in (log_folder(job) / "train.log").read_text()
    assert len(list((job.out.parent / "cache").glob("unsloth-*/UnslothSFTTrainer.py"))) == 1
    assert json.loads((job.out / "adapter_config.json").read_text())["target_modules"] == LINEAR_LAYERS


def check_same(ours: Path, plain: Path) -> None:
    """Both adapters have the same tensors; losses and counted tokens of each step are the same."""
    shapes = [{name: weight.shape for name, weight in load_file(out / WEIGHTS).items()} for out in (ours, plain)]
    assert shapes[0] == shapes[1]
    assert losses(ours) == pytest.approx(losses(plain), abs=CLOSE)
    tokens = [[entry["tokens"] for entry in log(out)] for out in (ours, plain)]
    assert tokens[0] == tokens[1]
    assert tokens[0][0] > 30


def test_full_fine_tuning_is_like_trls(tmp_path: Path) -> None:
    """The weights are kept in 32 bits."""
    settings = SETTINGS.model_copy(update={"method": "full", "learning_rate": 2e-3})
    job = replace(make_job(tmp_path, "llama"), settings=settings)
    train_with_unsloth(job)
    plain = train_with_trl(job, "trl")
    assert losses(job.out) == pytest.approx(losses(plain), abs=CLOSE)
    ours, theirs = (load_file(out / "model.safetensors") for out in (job.out, plain))
    assert {name: (weight.dtype, weight.shape) for name, weight in ours.items()} == {
        name: (weight.dtype, weight.shape) for name, weight in theirs.items()
    }
    assert {weight.dtype.name for weight in ours.values()} == {"float32"}


def test_a_training_that_is_cut_ends_in_the_same_adapter(tmp_path: Path) -> None:
    job = make_job(tmp_path, "llama")
    settings = SETTINGS.model_copy(update={"lora_dropout": 0.1, "checkpoint_minutes": EACH_STEP})
    cut = replace(job, settings=settings, out=tmp_path / "cut")
    uncut = replace(job, settings=settings, out=tmp_path / "uncut")
    train_with_unsloth(uncut)

    def interrupt(done: int, total: int, note: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_with_unsloth(cut, interrupt)
    assert list(log_folder(cut).glob("checkpoint-*/whole.json"))
    seen: list[int] = []
    train_with_unsloth(cut, lambda done, total, note: seen.append(done))
    assert seen[0] in (3, 4)
    assert [(entry["step"], entry["loss"], entry["tokens"]) for entry in log(cut.out)] == [
        (entry["step"], entry["loss"], entry["tokens"]) for entry in log(uncut.out)
    ]
    assert (cut.out / WEIGHTS).read_bytes() == (uncut.out / WEIGHTS).read_bytes()


def test_unsloth_does_not_stretch_the_positions(tmp_path: Path) -> None:
    """Above max_position_embeddings, Unsloth would scale them, which neither TRL nor the GGUF does. With gradient
    checkpointing, which changes nothing in the losses."""
    job = make_job(tmp_path, "llama", max_position_embeddings=16)
    job = replace(job, settings=SETTINGS.model_copy(update={"gradient_checkpointing": True}))
    assert train_with_unsloth(job)[0].startswith("The student supports 16 tokens: longer rows are left out")
    assert resolved(job.out)["sft"]["max_length"] == 16
    assert losses(job.out) == pytest.approx(losses(train_with_trl(job, "trl")), abs=CLOSE)


def test_trl_trains_a_student_whose_tokenizer_unsloth_refuses(tmp_path: Path) -> None:
    """No token for padding and none that could serve as one, and no free row in the vocabulary."""
    words = len(make_tokenizer(tmp_path / "words"))
    job = make_job(tmp_path, "llama", vocab_size=words, pad_token_id=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = Path(job.model) / name
        path.write_text(path.read_text().replace("<|pad|>", "<|one|>").replace("<|endoftext|>", "<|two|>"))
    config = json.loads((Path(job.model) / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (Path(job.model) / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TapirError, match="Could not find a valid pad token"):
        train_with_unsloth(job)
    said = train_with_unsloth(replace(job, settings=SETTINGS.model_copy(update={"backend": "auto"})))
    assert any("TRL and PEFT instead of Unsloth: Unsloth cannot load the model" in line for line in said)
    assert resolved(job.out)["backend"] == "trl"
