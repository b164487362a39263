"""What differs in a training on a GPU, with fake answers of torch and Unsloth: what a machine without one can show."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from training_rows import WEIGHTS, examples, log, make_job

from tapir_local.doctor.doctor import judge_gpu
from tapir_local.doctor.torch_check import read_torch_gpu
from tapir_local.errors import TapirError
from tapir_local.recipe.schema import Classifier, Train
from tapir_local.training import train
from tapir_local.training.classifier import ClassifyJob, load_classifier
from tapir_local.training.job import token_rows
from tapir_local.training.model import Hardware, detect_hardware, is_out_of_memory, load_model, load_tokenizer
from tapir_local.training.steps import peak_memory
from tapir_local.training.train import train_student

GIB = 1 << 30


def fake_gpu(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
    """Let torch say that there is a GPU of 24 GiB; `answers` are further functions of torch.cuda."""
    import torch

    functions = {
        "is_available": lambda: True,
        "get_device_capability": lambda *_: (9, 0),
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90"],
        "is_bf16_supported": lambda **_: True,
        "mem_get_info": lambda *_: (20 * GIB, 24 * GIB),
        "get_device_properties": lambda *_: SimpleNamespace(
            name="NVIDIA A", total_memory=24 * 10**9, is_integrated=False
        ),
    }
    for name, function in {**functions, **answers}.items():
        monkeypatch.setattr(torch.cuda, name, function)


# The trainer


def test_tokens_are_counted_where_the_trainer_does_not_count_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsloth replaces the loss function of TRL, which is what counts TRL's `num_tokens`."""
    from trl import SFTTrainer

    loss = SFTTrainer.compute_loss

    def uncounted(self: Any, *args: Any, **more: Any) -> Any:
        found = loss(self, *args, **more)
        self._total_train_tokens = 0
        self._metrics["train"].pop("num_tokens", None)
        return found

    monkeypatch.setattr(SFTTrainer, "compute_loss", uncounted)
    job = make_job(tmp_path, epochs=2.0)
    train_student(job)
    rows = token_rows(examples(32), load_tokenizer(job.model), job.max_length).rows
    steps = log(job.out)
    assert steps[-1]["tokens"] == 2 * sum(len(row["input_ids"]) for row in rows)
    assert all(step["tokens_per_second"] > 0 for step in steps)


def test_an_adapter_names_its_layers_in_a_list_and_the_next_round_continues_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsloth's FastModel replaces the list by a regular expression."""
    made = train.add_lora

    def with_pattern(*args: Any) -> Any:
        model = made(*args)
        model.peft_config["default"].target_modules = "(?:.*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)"
        return model

    monkeypatch.setattr(train, "add_lora", with_pattern)
    job = make_job(tmp_path, epochs=1.0)
    train_student(job)
    config = json.loads((job.out / "adapter_config.json").read_bytes())
    assert config["target_modules"] == [f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")]
    following = replace(job, out=tmp_path / "following", adapter_from=job.out)
    train_student(following)
    assert (following.out / WEIGHTS).exists()


def test_several_gpus_do_not_multiply_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers counts the GPUs that torch sees; with two, it would halve the number of steps."""
    from trl import SFTConfig

    prepare = SFTConfig.__post_init__

    def two_gpus(self: Any) -> None:
        prepare(self)
        self._n_gpu = 2

    monkeypatch.setattr(SFTConfig, "__post_init__", two_gpus)
    job = make_job(tmp_path, epochs=1.0)
    train_student(job)
    assert [step["step"] for step in log(job.out)] == [1, 2, 3, 4]


def test_an_adapter_of_a_quantized_model_is_trained_in_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL casts it to bf16, which would round what an earlier round learned, and every update."""
    import torch
    from trl import SFTTrainer

    job = make_job(tmp_path, epochs=1.0)
    train_student(job)
    build, cast = SFTTrainer.__init__, set[Any]()

    def quantized(self: Any, model: Any, *args: Any, **more: Any) -> None:
        model.is_loaded_in_4bit = True
        build(self, model, *args, **more)
        del model.is_loaded_in_4bit  # the weights are not in 4 bits, and nothing after it may expect them to be
        cast.update(weight.dtype for weight in model.parameters() if weight.requires_grad)

    monkeypatch.setattr(SFTTrainer, "__init__", quantized)
    other = replace(job, out=tmp_path / "other")
    train_student(other)
    assert cast == {torch.bfloat16}
    assert (other.out / WEIGHTS).read_bytes() == (job.out / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA driver error: out of memory", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDNN_STATUS_ALLOC_FAILED", True),
        ("[CUDA] CUDA_ERROR_OUT_OF_MEMORY", True),
        ("Out of memory while launching a kernel", True),
        ("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: device-side assert triggered", False),
        ("CUBLAS_STATUS_EXECUTION_FAILED", False),
    ],
)
def test_errors_of_gpu_libraries_that_mean_too_little_memory(text: str, expected: bool) -> None:
    assert is_out_of_memory(RuntimeError(text)) is expected


def test_the_log_has_the_memory_that_torch_uses_and_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, max_memory_allocated=lambda: 5 * GIB, max_memory_reserved=lambda: 7 * GIB)
    assert peak_memory() == {"peak_memory": 5 * GIB, "peak_reserved": 7 * GIB}


# Loading


@pytest.mark.parametrize(
    ("device", "method", "launcher", "expected"),
    [
        ("cpu", "lora", None, None),
        ("cpu", "full", None, None),
        ("cuda", "lora", None, {"": 0}),
        ("cuda", "full", None, {"": 0}),
        ("cuda", "qlora", None, {"": 0}),
        ("cuda", "qlora", "1", {"": 1}),
        ("cuda", "lora", "1", None),
    ],
)
def test_weights_are_read_into_the_gpu_directly(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    method: str,
    launcher: str | None,
    expected: dict[str, int] | None,
) -> None:
    import transformers

    seen, model = dict[str, Any](), make_job(tmp_path).model
    loader = SimpleNamespace(from_pretrained=lambda model, **options: seen.update(options))
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", loader)
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", lambda **options: options)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if launcher:
        monkeypatch.setenv("LOCAL_RANK", launcher)
    load_model(model, Hardware(device, "trl", "bf16", 8 * GIB), method=method, max_length=128, seed=1)
    assert seen.get("device_map") == expected
    assert ("quantization_config" in seen) == (method == "qlora")


@pytest.mark.parametrize(
    ("method", "precision", "dtype"),
    [
        ("lora", "bf16", "bfloat16"),
        ("qlora", "f16", "float16"),
        ("full", "bf16", "float32"),
        ("full", "f16", "float16"),
    ],
)
def test_unsloth_loads_onto_one_gpu_and_full_fine_tuning_without_rounding(
    monkeypatch: pytest.MonkeyPatch, method: str, precision: str, dtype: str
) -> None:
    import torch

    seen: dict[str, Any] = {}

    def load(model: str, **options: Any) -> tuple[str, None]:
        seen.update(options)
        return model, None

    unsloth = ModuleType("unsloth")
    unsloth.FastLanguageModel = SimpleNamespace(from_pretrained=load)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    hardware = Hardware("cuda", "unsloth", precision, 8 * GIB)
    assert load_model("student", hardware, method=method, max_length=128, seed=1) == "student"
    assert (seen["device_map"], seen["dtype"]) == ({"": 0}, getattr(torch, dtype))


# Hardware


@pytest.mark.parametrize(
    ("capability", "built", "fault"),
    [
        ((6, 1), ["sm_75", "sm_80", "sm_90"], "it is sm_61, but torch {} needs sm_75 or newer"),
        ((7, 0), ["sm_100f", "sm_80", "sm_90a", "compute_120"], "it is sm_70, but torch {} needs sm_80 or newer"),
        ((7, 5), ["sm_75", "sm_80", "sm_90"], ""),
        ((8, 9), ["sm_75", "sm_80", "sm_90"], ""),
        ((12, 1), ["sm_75", "sm_120"], ""),
        ((9, 4), ["gfx942", "gfx1100"], ""),
        ((6, 1), [], ""),
    ],
)
def test_a_gpu_older_than_torch_was_built_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str], fault: str
) -> None:
    import torch

    fake_gpu(monkeypatch, get_device_capability=lambda *_: capability, get_arch_list=lambda: built)
    settings, machine = Train(backend="trl"), judge_gpu(read_torch_gpu())
    if not fault:
        assert detect_hardware(settings, pytest.fail).device == "cuda"
        assert (machine.ok, machine.found) == (True, "NVIDIA A, 24 GB")
        return
    fault = fault.format(torch.__version__)
    with pytest.raises(TapirError) as caught:
        detect_hardware(settings, pytest.fail)
    assert caught.value.what == f"this GPU is too old: {fault}"
    job = ClassifyJob(Path("labels"), Path("rows"), ("Math", "Code"), Classifier(), 1, Path("out"))
    with pytest.raises(TapirError, match=re.escape(f"classifier: this GPU is too old: {fault}")):
        load_classifier(job, [])
    assert (machine.ok, machine.found) == (False, f"NVIDIA A, 24 GB, too old: {fault}")


def test_what_a_gpu_trains_with(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    found = detect_hardware(Train(backend="trl"), pytest.fail)
    assert found == Hardware("cuda", "trl", "bf16", 20 * GIB, total=24 * GIB)
    fake_gpu(monkeypatch, is_bf16_supported=lambda **_: False)
    assert detect_hardware(Train(backend="trl"), pytest.fail).precision == "f16"
