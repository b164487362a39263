"""Check whether this machine is ready: what is there, what is missing, and what to do about it."""

import importlib.util
import os
import platform
import shutil
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tapir_local.doctor.gpu_check import (
    find_nvcc,
    llama_uses_gpu,
    missing_for_triton,
    nvcc_advice,
    torch_build,
    torch_build_advice,
    torch_version,
    unsloth_fault,
)
from tapir_local.doctor.llama_check import llama_backends, llama_build_fault
from tapir_local.doctor.torch_check import TorchGpu, find_torch_gpu
from tapir_local.memory import describe_unused_gpus, free_disk_space, list_visible_gpus, total_memory
from tapir_local.pipeline.loop import installed_version
from tapir_local.resources import POCKET_SEEDS, POCKET_STUDENT, recipe_files

REQUIRED_PACKAGES = ("torch", "transformers", "trl", "peft", "llama-cpp-python", "gguf", "openai", "sqlite-utils")
MIN_DISK_GB = 5.0
MIN_MEMORY_GB = 3.0


@dataclass(frozen=True)
class MachineCheck:
    """The result of one check. `ok` is None for something useful that is not needed."""

    name: str
    ok: bool | None
    found: str
    fix: str = ""


def check_machine(cache: Path) -> list[MachineCheck]:
    """The results of all checks, the most important first."""
    cards = list_visible_gpus()
    checks: list[Callable[[], MachineCheck]] = [
        check_linux,
        check_python_version,
        check_packages,
        check_compiler,
        check_llama,
        check_sqlite,
        check_pocket_files,
        lambda: check_cache_folder(cache),
        lambda: check_free_disk(cache),
        check_total_memory,
        check_gpu,
        *([check_torch_build, check_llama_gpu, check_nvcc, check_triton_needs] if cards else [check_cpu_torch]),
        check_unsloth,
        check_api_key,
    ]
    return [check() for check in checks]


def check_linux() -> MachineCheck:
    """Linux: only it has the locks that the processes of the store use."""
    found = platform.system()
    return MachineCheck("system", found == "Linux", found, "Use a machine with Linux; on Windows, use WSL 2.")


def check_python_version() -> MachineCheck:
    """Python 3.11 or newer."""
    return MachineCheck(
        "Python", sys.version_info >= (3, 11), platform.python_version(), "Install Python 3.11 or newer."
    )


def check_packages() -> MachineCheck:
    """The packages that a run imports."""
    versions = {name: installed_version(name) for name in REQUIRED_PACKAGES}
    missing = [name for name, found in versions.items() if not found]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    fix = f"missing: {', '.join(missing)}; run `make install`" if missing else ""
    return MachineCheck("packages", not missing, found, fix)


def check_compiler() -> MachineCheck:
    """A C++ compiler: it is needed until llama-cpp-python, which is built from source, is installed."""
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), "")
    needed = importlib.util.find_spec("llama_cpp") is None
    return MachineCheck(
        "C++ compiler",
        bool(found) if needed else (True if found else None),
        found or "none",
        "Install one (Debian: apt-get install g++ cmake).",
    )


def check_llama() -> MachineCheck:
    """llama.cpp runs: it is compiled for the processor of the machine that built it."""
    if importlib.util.find_spec("llama_cpp") is None:
        return MachineCheck("llama.cpp", None, "not installed")
    fault = llama_build_fault()
    return MachineCheck(
        "llama.cpp",
        not fault,
        f"ends with {fault}" if fault else f"runs on this processor; backends: {llama_backends()}",
        "It was built for another processor: run `make llama` in the checkout to build it again.",
    )


def check_sqlite() -> MachineCheck:
    """SQLite 3.24 (2018) or newer: the store uses upserts and WAL."""
    return MachineCheck(
        "SQLite",
        sqlite3.sqlite_version_info >= (3, 24),
        sqlite3.sqlite_version,
        "Use a Python that was built with SQLite 3.24 or newer.",
    )


def check_pocket_files() -> MachineCheck:
    """The files that come with the program."""
    there = [path for path in (POCKET_STUDENT / "model.safetensors", POCKET_SEEDS) if path.is_file()]
    found = f"student and seeds, {len(recipe_files())} recipes" if len(there) == 2 else "incomplete"
    return MachineCheck(
        "pocket files",
        len(there) == 2 and bool(recipe_files()),
        found,
        "Install the package again: some of its files are missing.",
    )


def check_cache_folder(cache: Path) -> MachineCheck:
    """The cache folder, or the nearest existing folder above it, is writable."""
    place = nearest_existing(cache)
    fix = f"{place} is not writable; name another folder with --cache."
    return MachineCheck("cache", os.access(place, os.W_OK), str(cache), fix)


def check_free_disk(cache: Path) -> MachineCheck:
    """Free space for a small run; a 7B student needs about 40 GB."""
    free = free_disk_space(cache) / 1e9
    return MachineCheck(
        "disk",
        free > MIN_DISK_GB,
        f"{free:,.0f} GB free",
        f"Free some space: the quickstart needs {MIN_DISK_GB:.0f} GB, a 7B student about 40 GB.",
    )


def nearest_existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def check_total_memory() -> MachineCheck:
    """Memory for the quickstart, which stays under 3 GB."""
    total = total_memory() / 1e9
    fix = f"The quickstart needs {MIN_MEMORY_GB:.0f} GB."
    return MachineCheck("memory", total > MIN_MEMORY_GB, f"{total:,.0f} GB", fix)


def check_gpu() -> MachineCheck:
    """A CUDA device that torch can use."""
    version, cuda = torch_version()
    if not version:
        return MachineCheck("GPU", None, "unknown: torch is not installed")
    return judge_gpu(find_torch_gpu() if cuda else "")


def judge_gpu(found: TorchGpu | str) -> MachineCheck:
    """Whether the GPU that torch finds can be used; `found` is a text if it finds none."""
    if isinstance(found, str):
        unused = describe_unused_gpus(*torch_version()) or "none"
        said = f" ({found})" if found else ""
        return MachineCheck(
            "GPU",
            None,
            f"{unused}: training and generation run on the CPU{said}",
            "A student with billions of parameters needs a CUDA GPU and a CUDA build of torch.",
        )
    old = found.too_old and f", too old: {found.too_old}"
    said = f"{found.name}, {found.total / 1e9:,.0f} GB{old}"
    return MachineCheck("GPU", not found.too_old, said, "Install a build of torch for an older CUDA.")


def check_cpu_torch() -> MachineCheck:
    """Whether torch is a CPU or a CUDA build; without a GPU either serves."""
    version, cuda = torch_version()
    if not version:
        return MachineCheck("torch", None, "not installed")
    return MachineCheck("torch", True, f"{version}, {f'built for CUDA {cuda}' if cuda else 'a CPU build'}")


def check_torch_build() -> MachineCheck:
    """A build of torch whose CUDA the driver and the GPU support."""
    if not installed_version("torch"):
        return MachineCheck("torch for the GPU", None, "torch is not installed")
    found, advice = torch_build(), torch_build_advice()
    return MachineCheck("torch for the GPU", None if advice else True, found, advice)


def check_llama_gpu() -> MachineCheck:
    """llama.cpp with CUDA: without it, answers are generated on the CPU."""
    if importlib.util.find_spec("llama_cpp") is None:
        return MachineCheck("llama.cpp on the GPU", None, "not installed")
    used = llama_uses_gpu()
    found = "uses it" if used else "does not use it: generation runs on the CPU"
    return MachineCheck("llama.cpp on the GPU", used or None, found, "Run `make llama GPU=1` in the checkout.")


def check_nvcc() -> MachineCheck:
    """NVIDIA's compiler, which is needed to build llama.cpp with CUDA."""
    advice = nvcc_advice()
    return MachineCheck("CUDA compiler", None if advice else True, find_nvcc() or "no nvcc on the PATH", advice)


def check_triton_needs() -> MachineCheck:
    """A C compiler and Python.h: Unsloth's Triton compiles kernel launchers while it trains."""
    missing = missing_for_triton()
    return MachineCheck(
        "Triton's needs",
        None if missing else True,
        f"missing: {', '.join(missing)}" if missing else "a C compiler and Python.h",
        "Debian: apt-get install gcc python3-dev; Fedora: dnf install gcc python3-devel. Unsloth fails without them.",
    )


def check_unsloth() -> MachineCheck:
    """Unsloth, which is used if there is a GPU, and can be imported there."""
    found = installed_version("unsloth")
    fault = unsloth_fault() if found and list_visible_gpus() else ""
    return MachineCheck(
        "unsloth",
        True if found and not fault else None,
        f"{found} cannot be imported: {fault}" if fault else found or "not installed: training uses TRL and PEFT",
        "If you have a GPU, run in the checkout: make install GPU=1",
    )


def check_api_key() -> MachineCheck:
    """The API key of a vendor; the quickstart needs none."""
    there = "OPENAI_API_KEY" in os.environ
    return MachineCheck(
        "API key",
        True if there else None,
        "OPENAI_API_KEY is set" if there else "OPENAI_API_KEY is not set",
        "Set it if your teacher or judge needs a key; the quickstart needs none.",
    )
