"""A LoRA adapter exported by itself: on its base GGUF it equals the trained model; on another base it is refused."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from models import largest_difference, make_adapter, make_model
from safetensors.torch import load_file, save_file
from students import Student

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.export.export import export_adapter, export_gguf
from tapir_local.export.gate import GateLimits, GateReport, verify_gguf
from tapir_local.records import Example, Message

ROWS = [
    Example(str(n), (Message("user", f"What is {n} times {n % 7}?"),), f"It is {n * (n % 7)}, naïve 你好 🙂.")
    for n in range(6)
]


@pytest.fixture(scope="module")
def bases(students, tmp_path_factory) -> dict[str, Path]:
    """The bases of the shared students as f32 GGUFs."""
    folder = tmp_path_factory.mktemp("bases")
    for family, student in students.items():
        export_gguf(student.model, folder / f"{family}.gguf", adapter=None, quant="f32")
    return {family: folder / f"{family}.gguf" for family in students}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_on_its_base_an_adapter_equals_the_trained_model(students, bases, tmp_path: Path, family: str) -> None:
    student, lora = students[family], tmp_path / "lora.gguf"
    export_adapter(student.model, student.adapter, lora)
    assert largest_difference(student.model, student.adapter, bases[family], lora) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"alpha": 0},
    ],
    ids=["rslora", "patterns", "no scale"],
)
def test_scales_that_llama_cpp_does_not_know(llama: Student, bases, tmp_path: Path, changes: dict) -> None:
    adapter, lora = make_adapter(llama.model, tmp_path / "lora", **changes), tmp_path / "lora.gguf"
    export_adapter(llama.model, adapter, lora)
    assert largest_difference(llama.model, adapter, bases["llama"], lora) < 1e-4


def test_half_the_size_in_f16(llama: Student, bases, tmp_path: Path) -> None:
    sizes = {}
    for quant in ("f32", "f16"):
        export_adapter(llama.model, llama.adapter, tmp_path / quant, quant=quant)
        sizes[quant] = (tmp_path / quant).stat().st_size
    assert sizes["f16"] < 0.7 * sizes["f32"] < 0.35 * bases["llama"].stat().st_size
    assert largest_difference(llama.model, llama.adapter, bases["llama"], tmp_path / "f16") < 0.02


def gate_report(student: Student, base: Path, lora: Path, adapter: Path | None = None) -> GateReport:
    return verify_gguf(student.model, adapter or student.adapter, base, ROWS, adapter_gguf=lora, limits=GateLimits(0.9))


def test_the_gate_compares_both_together(llama: Student, bases, tmp_path: Path) -> None:
    export_adapter(llama.model, llama.adapter, tmp_path / "lora.gguf")
    assert gate_report(llama, bases["llama"], tmp_path / "lora.gguf").passed


def test_a_swapped_adapter_is_caught(llama: Student, bases, tmp_path: Path) -> None:
    other = make_adapter(llama.model, tmp_path / "other", seed=9)
    export_adapter(llama.model, other, tmp_path / "lora.gguf")
    assert "logits" in gate_report(llama, bases["llama"], tmp_path / "lora.gguf").failed


def test_an_adapter_without_effect_is_caught(llama: Student, bases, tmp_path: Path) -> None:
    idle = make_adapter(llama.model, tmp_path / "idle")
    weights = load_file(idle / "adapter_model.safetensors")
    nothing = {name: 0 * weight for name, weight in weights.items()}
    save_file(nothing, idle / "adapter_model.safetensors")
    export_adapter(llama.model, idle, tmp_path / "lora.gguf")
    assert {"logits", "adapter"} <= set(gate_report(llama, bases["llama"], tmp_path / "lora.gguf").failed)


def test_an_adapter_on_another_base_is_an_error(students, bases, tmp_path: Path) -> None:
    student = students["qwen2"]
    export_adapter(student.model, student.adapter, tmp_path / "lora.gguf")
    with pytest.raises(TapirError, match="cannot load the adapter over this model"):
        gate_report(student, bases["llama"], tmp_path / "lora.gguf")


def test_a_missing_adapter_gguf_is_an_error(llama: Student, bases, tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="the adapter is missing"):
        gate_report(llama, bases["llama"], tmp_path / "none.gguf")


# --- adapters that cannot be written


def refused(model: Path, adapter: Path, out: Path, words: str) -> None:
    with pytest.raises(TapirError, match=words) as caught:
        export_adapter(model, adapter, out)
    assert caught.value.fix
    assert not out.exists()


def test_an_adapter_of_another_shape(llama: Student, tmp_path: Path) -> None:
    wider = make_model(tmp_path / "wider", hidden_size=96)
    refused(wider, llama.adapter, tmp_path / "out.gguf", "does not match a weight of the base model")


def test_an_adapter_of_another_rank_than_it_says(llama: Student, tmp_path: Path) -> None:
    shutil.copytree(llama.adapter, tmp_path / "lora")
    config = tmp_path / "lora/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 8}))
    refused(llama.model, tmp_path / "lora", tmp_path / "out.gguf", "has rank 4, but its adapter_config.json says 8")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_without_one_of_its_files(llama: Student, tmp_path: Path, name: str) -> None:
    shutil.copytree(llama.adapter, tmp_path / "lora")
    (tmp_path / "lora" / name).unlink()
    refused(llama.model, tmp_path / "lora", tmp_path / "out.gguf", f"no adapter: {name} is missing")


# --- the command


def run(*words: object) -> str:
    return CliRunner().invoke(cli, ["export", *map(str, words)], catch_exceptions=False).stderr


def test_the_command_verifies_it_on_the_base(llama: Student, bases, tmp_path: Path) -> None:
    out = tmp_path / "lora.gguf"
    said = run(llama.model, out, "--adapter", llama.adapter, "--adapter-only", "--base", bases["llama"])
    assert "texts with the same token ids" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.gguf", "lora.gguf.gate.json"]


def test_the_command_requires_a_base_or_no_gate(llama: Student, tmp_path: Path) -> None:
    out = tmp_path / "lora.gguf"
    with pytest.raises(TapirError, match="verified on its base GGUF"):
        run(llama.model, out, "--adapter", llama.adapter, "--adapter-only")
    assert not out.exists()
    run(llama.model, out, "--adapter", llama.adapter, "--adapter-only", "--no-gate")
    assert out.exists()


def test_the_command_requires_an_adapter(llama: Student, tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="no adapter to export"):
        run(llama.model, tmp_path / "lora.gguf", "--adapter-only")
