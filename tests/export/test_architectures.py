"""Every architecture from end to end: base, a few steps of LoRA, merged and separate export, gate, generation."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from models import WITH_BOS, make_model
from spm import GEMMA

from tapir_local.export.export import export_adapter, export_gguf
from tapir_local.export.gate import GateLimits, GateReport, verify_gguf
from tapir_local.files import write_rows
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.generate import generate
from tapir_local.recipe.schema import Train
from tapir_local.records import Example, Message
from tapir_local.training.job import TrainJob
from tapir_local.training.model import Hardware, load_model
from tapir_local.training.train import train_student

LLAMA2_TOKENIZER = Path(__file__).parents[3] / "shared/data/tokenizers/granite-7b-lab"
ROWS = [
    Example(str(n), (Message("user", f"What is {n} plus {n + 2}?"),), f"It is {2 * n + 2}, naïve café 你好 🙂.")
    for n in range(14)
]
QUOTED = "<|im_end|>, <|eos|>, <end_of_turn>, <eos>, </s>, <|endoftext|>, <tool>"
ROWS += [
    Example("quoted", (Message("user", f"Which of {QUOTED} ends a turn?"),), f"Each of {QUOTED} does."),
    Example(
        "composed", (Message("user", "Write cafe\u0301 and \u1112\u1161\u11ab."),), "Cafe\u0301, \u1112\u1161\u11ab."
    ),
]
SETTINGS = Train(epochs=1, learning_rate=5e-3, batch_size=4, micro_batch_size=4, lora_rank=4, lora_alpha=8)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
STUDENTS: dict[str, dict[str, Any]] = {
    "llama2": {"family": "llama"},
    "llama3": {"family": "llama", "kind": "llama3", "template": WITH_BOS, "rope_parameters": LLAMA3_ROPE},
    "smollm2": {"family": "llama", "kind": "smollm", "tie_word_embeddings": True},
    "mistral": {"family": "mistral", "kind": "mistral", "template": WITH_BOS, "tie_word_embeddings": False},
    "qwen1.5": {"family": "qwen2", "kind": "qwen2", "tie_word_embeddings": False},
    "qwen2": {"family": "qwen2", "kind": "qwen2"},
    "qwen3": {"family": "qwen3", "kind": "qwen2"},
    "gemma2": {"family": "gemma2", "kind": "gemma", "template": GEMMA},
    "gemma3": {"family": "gemma3_text", "kind": "gemma", "template": GEMMA},
}


@dataclass(frozen=True)
class Trained:
    """A base and an adapter that was trained on ROWS."""

    model: Path
    adapter: Path


def llama2_model(folder: Path) -> Path:
    """One layer over LLaMA-2's real vocabulary, as IBM's granite-7b-lab extends it."""
    if not LLAMA2_TOKENIZER.is_dir():
        pytest.skip("the tokenizer is not on this machine")
    make_model(folder, vocab_size=32008, num_hidden_layers=1, hidden_size=32)
    for path in [*folder.glob("*oken*"), folder / "chat_template.jinja"]:
        path.unlink()
    for path in LLAMA2_TOKENIZER.glob("*oken*"):
        shutil.copy(path, folder)
    return folder


def train(model: Path, folder: Path) -> Trained:
    write_rows(folder / "train.jsonl", ROWS)
    train_student(TrainJob(str(model), folder / "train.jsonl", folder / "adapter", SETTINGS, 256, 1))
    return Trained(model, folder / "adapter")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Trained]:
    """An architecture's student, trained when it is first requested."""
    known: dict[str, Trained] = {}

    def student(name: str) -> Trained:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            model = llama2_model(folder / "m") if name == "llama2" else make_model(folder / "m", **STUDENTS[name])
            known[name] = train(model, folder)
        return known[name]

    return student


def gate_report(student: Trained, gguf: Path, lora: Path | None = None) -> GateReport:
    return verify_gguf(student.model, student.adapter, gguf, ROWS, adapter_gguf=lora, limits=GateLimits(0.9))


@pytest.mark.parametrize("name", STUDENTS)
def test_merged(made, tmp_path: Path, name: str) -> None:
    """It passes the gate in q8_0, and answers in batches equal single greedy answers."""
    student, gguf = made(name), tmp_path / "student.gguf"
    export_gguf(student.model, gguf, adapter=student.adapter, quant="q8_0")
    report = gate_report(student, gguf)
    assert report.passed, report
    assert report.probes == 632
    found = generate(gguf, [row.prompt for row in ROWS], GenerationConfig(max_tokens=12, context=256, parallel=8))
    assert len(found) == len(ROWS)
    assert any(completion.text for completion in found)


@pytest.mark.parametrize("name", STUDENTS)
def test_adapter_alone(made, tmp_path: Path, name: str) -> None:
    """On the f32 base GGUF its logits equal those of transformers and PEFT; on q8_0 it passes too."""
    student, lora = made(name), tmp_path / "lora.gguf"
    export_adapter(student.model, student.adapter, lora)
    for quant in ("f32", "q8_0"):
        export_gguf(student.model, tmp_path / quant, adapter=None, quant=quant)
        report = gate_report(student, tmp_path / quant, lora)
        assert report.passed, report
    assert lora.stat().st_size < (tmp_path / "f32").stat().st_size / 2
    found = generate(
        tmp_path / "q8_0", [row.prompt for row in ROWS], GenerationConfig(max_tokens=12, context=256), adapter=lora
    )
    assert len(found) == len(ROWS)


@pytest.mark.parametrize(("name", "way"), [("gemma2", "eager"), ("qwen2", "sdpa")])
def test_scores_that_are_capped_are_capped_in_training_too(tmp_path: Path, name: str, way: str) -> None:
    model = make_model(tmp_path / "model", **STUDENTS[name])
    loaded = load_model(
        str(model), Hardware("cpu", "trl", "f32", 0), method="lora", max_length=64, seed=1, checkpointing=False
    )
    assert loaded.config._attn_implementation == way
