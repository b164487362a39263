"""On a real GPU: every family and method trains with both backends, a second round and a cut training go on, and the
GGUF answers there. `TAPIR_TEST_GPU=1 pytest tests/test_gpu.py`; skipped without it.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from models import make_model
from training_rows import SETTINGS, examples, log, losses, resolved

from tapir_local.doctor.gpu_check import llama_uses_gpu
from tapir_local.export.export import export_gguf
from tapir_local.files import write_rows
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.llama_process import GenerateJob, LlamaPlace, run_generate_job
from tapir_local.process import python_path_variable
from tapir_local.records import Message
from tapir_local.training.job import TrainJob
from tapir_local.training.train import run_training

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = [(Message("user", f"Add {n} and {n + 3}."),) for n in range(12)]


def gpu_is_there() -> bool:
    if os.environ.get("TAPIR_TEST_GPU") != "1":
        return False
    import torch

    return torch.cuda.is_available()


pytestmark = pytest.mark.skipif(not gpu_is_there(), reason="needs a GPU that torch can use, and TAPIR_TEST_GPU=1")
needs_unsloth = pytest.mark.skipif(not find_spec("unsloth"), reason="needs Unsloth: pip install '.[gpu]'")
backends = pytest.mark.parametrize("backend", ["trl", pytest.param("unsloth", marks=needs_unsloth)])


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random model of each family. Heads have 64 numbers, which the kernels for GPUs support."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        made[family] = make_model(folder, family, head_dim=64, **SHAPE)
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    write_rows(path, examples(32))
    return path


def train(student: Path, rows: Path, folder: Path, *, before: Path | None = None, **settings: Any) -> Path:
    """Train in a process of its own; the folder of the result."""
    chosen = SETTINGS.model_validate({**SETTINGS.model_dump(), "learning_rate": 1e-3, **settings})
    run_training(TrainJob(str(student), rows, folder / "adapter", chosen, 128, 7, before), folder)
    return folder / "adapter"


def check_trained(adapter: Path, backend: str) -> None:
    said = resolved(adapter)
    assert (said["device"], said["backend"]) == ("cuda", backend)
    assert losses(adapter)[-1] < losses(adapter)[0]
    assert log(adapter)[-1]["tokens"] > 0
    assert log(adapter)[-1]["grad_norm"] > 0


@backends
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains(students, rows, tmp_path: Path, family: str, backend: str) -> None:
    check_trained(train(students[family], rows, tmp_path, backend=backend), backend)


@backends
@pytest.mark.parametrize("settings", [{"method": "qlora"}, {"precision": "f16"}, {"lora_dropout": 0.05}])
def test_every_method_trains(students, rows, tmp_path: Path, settings: dict[str, Any], backend: str) -> None:
    check_trained(train(students["qwen2"], rows, tmp_path, backend=backend, **settings), backend)


@backends
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_second_round_continues_the_first(students, rows, tmp_path: Path, method: str, backend: str) -> None:
    settings = {"backend": backend, "method": method, "learning_rate": 1e-3 if method == "lora" else 1e-4}
    first = train(students["llama"], rows, tmp_path / "1", **settings)
    second = train(students["llama"], rows, tmp_path / "2", before=first, **settings)
    assert losses(second)[0] < losses(first)[0]
    assert losses(second)[-1] < losses(first)[-1]


@needs_unsloth
def test_unsloth_loses_as_plain_trl_does(students, rows, tmp_path: Path) -> None:
    """The limit is the rounding of bf16: the same rows, their order and the settings are equal."""
    ours, plain = (train(students["qwen2"], rows, tmp_path / name, backend=name) for name in ("unsloth", "trl"))
    assert losses(ours) == pytest.approx(losses(plain), rel=0.03)


@backends
def test_a_cut_training_goes_on(students, rows, tmp_path: Path, backend: str) -> None:
    class Cut(Exception):
        pass

    def stop(done: int, total: int, note: str) -> None:
        if total and done == 4:
            raise Cut

    chosen = SETTINGS.model_copy(update={"backend": backend, "checkpoint_minutes": 1e-4})
    job = TrainJob(str(students["llama"]), rows, tmp_path / "adapter", chosen, 128, 7)
    with pytest.raises(Cut):
        run_training(job, tmp_path, stop)
    assert list(tmp_path.glob("checkpoint-*"))
    run_training(job, tmp_path)
    whole = replace(job, out=tmp_path / "whole" / "adapter")
    run_training(whole, tmp_path / "whole")
    assert losses(job.out) == pytest.approx(losses(whole.out), rel=0.02)


def test_llama_cpp_answers_on_the_gpu_as_on_the_cpu(students, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own: torch is in this one, and with CUDA the two crash together."""
    if not llama_uses_gpu():
        pytest.skip("llama.cpp was built without CUDA")
    export_gguf(students["qwen2"], tmp_path / "student.gguf", adapter=None, quant="f16")
    job = GenerateJob(tmp_path / "student.gguf", tuple(PROMPTS), GenerationConfig(16, 128, parallel=1))
    there = run_generate_job(job, place=LlamaPlace(apart=True))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    here = run_generate_job(job, place=LlamaPlace(apart=True))
    same = sum(a.text == b.text for a, b in zip(there, here, strict=True))
    assert same >= 10  # a near tie may be decided otherwise


MAIN = """
import ctypes, sys
from pathlib import Path
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.lib import free_gpu_memory, has_gpu
from tapir_local.inference.llama_process import GenerateJob, LlamaPlace, run_generate_job
from tapir_local.inference.tokens import tokenize_texts
from tapir_local.records import Message
from tapir_local.doctor.gpu_check import llama_uses_gpu
cuda = ctypes.CDLL("libcuda.so.1")

def has_context():
    device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    assert cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
    assert cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0
    return bool(active.value)

gguf, seen = Path(sys.argv[1]), [has_gpu(), has_context()]
seen += [bool(tokenize_texts(gguf, ["a word"])), has_context()]
job = GenerateJob(gguf, ((Message("user", "Add 1 and 2."),),), GenerationConfig(4, 64))
seen += [len(run_generate_job(job)), has_context(), LlamaPlace().is_apart]
seen += [free_gpu_memory() > 0, has_context()]
print(*seen)
"""


def test_the_main_process_of_a_run_opens_no_gpu(students, tmp_path: Path) -> None:
    """The last two show that the check can see a context."""
    export_gguf(students["qwen2"], tmp_path / "student.gguf", adapter=None, quant="f16")
    command = [sys.executable, "-c", MAIN, str(tmp_path / "student.gguf")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **python_path_variable()}
    )
    if done.stdout.startswith("False"):
        pytest.skip("llama.cpp was built without CUDA")
    assert done.stdout == "True False True False 1 False True True True\n"
