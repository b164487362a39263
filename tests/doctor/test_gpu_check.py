"""What `doctor` says of a machine with a GPU: torch's build and the driver, llama.cpp's build, nvcc, Python.h."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import refused
from gpus import put_driver

from tapir_local.doctor import gpu_check
from tapir_local.doctor.doctor import check_llama_gpu, check_machine, check_nvcc, check_torch_build, check_triton_needs
from tapir_local.doctor.gpu_check import idle_gpu_remarks, missing_for_triton, nvcc_advice, require_gpu

GPU_ROWS = {"torch for the GPU", "llama.cpp on the GPU", "CUDA compiler", "Triton's needs"}
INDEX = "--index-url INDEX, where INDEX is PyTorch's for"
CUDA_13 = f"pip install torch==2.13.0+cu130 torchvision==0.28.0+cu130 {INDEX} cu130 (see pytorch.org/get-started)"
CUDA_12 = f"pip install torch==2.13.0+cu126 torchvision==0.28.0+cu126 {INDEX} cu126 (see pytorch.org/get-started)"


def torch_with(monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None) -> None:
    """Make torch report this version and CUDA."""
    monkeypatch.setattr(gpu_check, "torch_version", lambda: (version, cuda))


def nvcc_of(folder: Path, release: str) -> Path:
    """An nvcc of this CUDA release in a folder of its own."""
    tool = folder / "cuda" / "nvcc"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    tool.chmod(0o755)
    return tool


def test_rows_on_gpus_are_there_only_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not GPU_ROWS & {check.name for check in check_machine(tmp_path)}
    put_driver(tmp_path, monkeypatch)
    assert {check.name for check in check_machine(tmp_path)} >= GPU_ROWS


@pytest.mark.parametrize(
    ("version", "cuda", "driver", "capability", "advice"),
    [
        ("2.13.0+cu130", "13.0", "580.65.06", "8.9", ""),
        ("2.13.0+cu126", "12.6", "535.183.01", "6.1", ""),
        ("2.13.0+cu130", "13.0", "", "", ""),  # this nvidia-smi does not say
        ("2.13.0+cpu", None, "580.65.06", "8.9", CUDA_13),
        ("2.13.0+cpu", None, "550.54.15", "8.9", CUDA_12),
        ("2.13.0+cu130", "13.0", "570.124.06", "8.9", CUDA_12),
        ("2.12.0+cu130", "13.0", "580.65.06", "7.0", CUDA_12.replace("2.13", "2.12").replace("0.28", "0.27")),
        ("2.13.0+cu126", "12.6", "470.256.02", "8.9", "Install a newer driver: the oldest build of torch needs 525."),
    ],
)
def test_the_build_of_torch_is_compared_with_the_driver_and_the_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    cuda: str | None,
    driver: str,
    capability: str,
    advice: str,
) -> None:
    put_driver(tmp_path, monkeypatch, driver=driver, capability=capability)
    torch_with(monkeypatch, version, cuda)
    check = check_torch_build()
    assert (check.ok, check.fix) == (None if advice else True, advice)
    assert version in check.found
    assert check.found.endswith(f"driver {driver or 'unknown'}")


def test_the_oldest_of_several_gpus_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_driver(tmp_path, monkeypatch, capability="9.0\n12.0\n6.1")
    torch_with(monkeypatch, "2.13.0+cu130", "13.0")
    assert check_torch_build().fix == CUDA_12


def test_a_llama_cpp_without_cuda_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed build is one without CUDA; a package in front of it on the path answers as one with CUDA does."""
    found = check_llama_gpu()
    assert (found.ok, found.found) == (None, "does not use it: generation runs on the CPU")
    assert "make llama GPU=1" in found.fix
    (tmp_path / "llama_cpp.py").write_text("def llama_supports_gpu_offload(): return True\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("tapir_local.process.CHECKOUT", tmp_path)
    assert (check_llama_gpu().ok, check_llama_gpu().found) == (True, "uses it")


def test_nvcc_is_looked_for_where_cmake_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_driver(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nowhere"))
    missing = check_nvcc()
    assert (missing.ok, missing.found) == (None, "no nvcc on the PATH")
    nvcc = nvcc_of(tmp_path, "13.0")
    assert nvcc_advice(nvcc) == f"export PATH={nvcc.parent}:$PATH"
    assert "apt-get install nvidia-cuda-toolkit" in nvcc_advice(tmp_path / "nowhere")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert (check_nvcc().ok, check_nvcc().found) == (True, str(nvcc))


def test_an_nvcc_that_is_too_new_for_the_driver_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_driver(tmp_path, monkeypatch, driver="550.54.15")
    monkeypatch.setenv("CUDACXX", str(nvcc_of(tmp_path, "13.0")))
    assert check_nvcc().ok is None
    assert check_nvcc().fix.startswith("This driver or GPU does not support CUDA 13")


def test_what_triton_compiles_with_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert missing_for_triton(tmp_path) == ["a C compiler", "Python.h"]
    check = check_triton_needs()
    assert check.ok is None
    assert check.found.startswith("missing: a C compiler")
    assert "apt-get install gcc python3-dev" in check.fix
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert missing_for_triton(tmp_path) == []


def test_a_run_says_which_libraries_would_leave_the_gpu_unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert idle_gpu_remarks() == []
    put_driver(tmp_path, monkeypatch)
    torch_with(monkeypatch, "2.13.0+cpu", None)
    llama, torch = idle_gpu_remarks()
    assert llama.startswith("llama.cpp cannot use NVIDIA A, so answers are generated on the CPU")
    assert torch.startswith(
        "torch 2.13.0+cpu with no CUDA, driver 580.65.06: torch cannot use NVIDIA A, so training runs"
    )
    assert torch.endswith(CUDA_13)
    torch_with(monkeypatch, "2.13.0+cu130", "13.0")
    assert idle_gpu_remarks() == [llama]


def test_the_version_of_torch_is_read_without_importing_it() -> None:
    import torch

    assert gpu_check.torch_version() == (torch.__version__, torch.version.cuda)
    code = (
        "import sys; from tapir_local.doctor.gpu_check import torch_build; torch_build(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_gpu_can_be_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("distill", "--require-gpu", "--cache", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert refused(*command).startswith("error: --require-gpu: there is no GPU\n")
    put_driver(tmp_path, monkeypatch)
    assert refused(*command).startswith("error: --require-gpu: llama.cpp cannot use NVIDIA A")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("tapir_local.doctor.gpu_check.idle_gpu_remarks", list)
    require_gpu()
