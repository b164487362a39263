"""Find out what is missing to use a GPU: torch's build against the driver, llama.cpp's build, nvcc, and Python.h."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from tapir_local.doctor.child_check import check_fault
from tapir_local.errors import TapirError
from tapir_local.inference.lib import unused_gpu_remark
from tapir_local.memory import list_visible_gpus, run_nvidia_smi

# The oldest driver for each major version of CUDA (CUDA release notes, "Minimum Required Driver Version").
MIN_DRIVERS: Mapping[int, int] = {11: 450, 12: 525, 13: 580}
# The lowest compute capability of each major version of CUDA: 13 dropped Maxwell, Pascal and Volta.
MIN_CAPABILITIES: Mapping[int, float] = {11: 3.5, 12: 5.0, 13: 7.5}
WHEELS: Mapping[int, str] = {13: "cu130", 12: "cu126"}  # names of PyTorch's builds, the preferred first
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")  # where NVIDIA's packages put it, which is not on the PATH
OFFLOAD_TEST = "import sys, llama_cpp; sys.exit(not llama_cpp.llama_supports_gpu_offload())"


def query_gpus(field: str) -> list[str]:
    """A field of nvidia-smi that starts with a number, such as `compute_cap`, for each GPU; [] if it is unknown."""
    lines = run_nvidia_smi(f"--query-gpu={field}", "--format=csv,noheader").splitlines()
    return [line.strip() for line in lines if line.strip()[:1].isdecimal()]


def lowest_version(versions: list[str]) -> float:
    """The lowest of some versions, with major and minor number as 580.65; 0 if there are none."""
    return min((float(".".join(version.split(".")[:2])) for version in versions), default=0.0)


def torch_version() -> tuple[str, str | None]:
    """torch's version, and the CUDA that it was built for, None for a CPU build.

    Read from its file: the main process of a run never imports torch, because it may load llama.cpp, and with CUDA the
    two crash in one process (see export/gguf_side.py).
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "", None
    found = runpy.run_path(str(Path(spec.origin).parent / "version.py"))
    return str(found["__version__"]), found.get("cuda")


def torch_build() -> str:
    """torch's version and CUDA, and the driver's version, in words."""
    version, cuda = torch_version()
    driver = next(iter(query_gpus("driver_version")), "unknown")
    return f"torch {version} with {f'CUDA {cuda}' if cuda else 'no CUDA'}, driver {driver}"


def torch_build_advice() -> str:
    """The command that installs a build of torch for this driver and GPU; "" if the installed build suits them."""
    installed, cuda = torch_version()
    if cuda and suits_gpu(int(cuda.split(".")[0])):
        return ""
    wheel = next((wheel for major, wheel in WHEELS.items() if suits_gpu(major)), "")
    if not wheel:
        return f"Install a newer driver: the oldest build of torch needs {MIN_DRIVERS[min(WHEELS)]}."
    version = installed.split("+")[0]
    wanted = f"torch=={version}+{wheel} torchvision=={vision_version(version)}+{wheel}"
    return f"pip install {wanted} --index-url INDEX, where INDEX is PyTorch's for {wheel} (see pytorch.org/get-started)"


def vision_version(torch_version: str) -> str:
    """The torchvision that is built with this torch: 0.28.0 with 2.13.0. Unsloth refuses another one."""
    _, minor, patch = torch_version.split(".")[:3]
    return f"0.{int(minor) + 15}.{patch}"


def idle_gpu_remarks() -> list[str]:
    """One sentence for each library that would leave the GPU unused in a run; [] if all use it or there is none."""
    cards = list_visible_gpus()
    advice = torch_build_advice() if cards else ""
    remarks = [unused_gpu_remark()]
    if advice:
        slow = f"cannot use {cards[0].name}, so training runs on the CPU, which is much slower"
        remarks.append(f"{torch_build()}: torch {slow}. {advice}")
    return [remark for remark in remarks if remark]


def require_gpu() -> None:
    """Raise TapirError unless the driver lists a GPU, and torch and llama.cpp can use it."""
    if not list_visible_gpus():
        fix = "`nvidia-smi` must list one that CUDA_VISIBLE_DEVICES does not hide. Without the option the CPU is used."
        raise TapirError("there is no GPU", where="--require-gpu", fix=fix)
    if remarks := idle_gpu_remarks():
        raise TapirError(" ".join(remarks), where="--require-gpu", fix="Without the option the CPU is used.")


def suits_gpu(major: int) -> bool:
    """Whether the driver and every GPU support this major version of CUDA; what nvidia-smi does not report passes."""
    driver, capability = (lowest_version(query_gpus(field)) for field in ("driver_version", "compute_cap"))
    enough = not driver or driver >= MIN_DRIVERS.get(major, max(MIN_DRIVERS.values()))
    return enough and (not capability or capability >= MIN_CAPABILITIES.get(major, max(MIN_CAPABILITIES.values())))


def llama_uses_gpu() -> bool:
    """Whether llama.cpp finds a GPU; asked in a child process, because a faulty build ends the process."""
    return not check_fault(["-c", OFFLOAD_TEST])


def unsloth_fault() -> str:
    """Why Unsloth cannot be imported, "" if it can; tried in a child process, because it changes other packages."""
    return check_fault(["-c", "import unsloth"])


def find_nvcc() -> str:
    """The CUDA compiler that CMake will use: $CUDACXX, or nvcc on the PATH; "" if there is none."""
    return shutil.which(os.environ.get("CUDACXX") or "nvcc") or ""


def nvcc_advice(usual: Path = USUAL_NVCC) -> str:
    """What to do so that llama.cpp can be built with CUDA; "" if nvcc is found and the driver supports its version."""
    nvcc = find_nvcc()
    if not nvcc and usual.is_file():
        return f"export PATH={usual.parent}:$PATH"
    if not nvcc:
        return "Install NVIDIA's cuda-toolkit, or Debian's: apt-get install nvidia-cuda-toolkit. It builds llama.cpp."
    major = nvcc_major(nvcc)
    if major and not suits_gpu(major):
        return f"This driver or GPU does not support CUDA {major}: install an older cuda-toolkit or a newer driver."
    return ""


def nvcc_major(nvcc: str) -> int:
    """The major version of CUDA that nvcc compiles for; 0 if it does not say."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    found = re.search(r"release (\d+)\.", said)
    return int(found[1]) if found else 0


def missing_for_triton(headers: Path | None = None) -> list[str]:
    """What Triton's runtime/build.py needs and this machine lacks; `headers` is the folder of Python.h."""
    compilers = [os.environ.get("CC", ""), "clang", "gcc"]
    found = any(name and shutil.which(name) for name in compilers)
    place = headers or Path(sysconfig.get_paths()["include"])
    return [*([] if found else ["a C compiler"]), *([] if (place / "Python.h").is_file() else ["Python.h"])]
