"""Is this machine ready? What is there, what is missing, and what to do about it."""

import importlib.util
import os
import platform
import shutil
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tapir_local.memory import free_disk_space, list_visible_gpus, total_memory
from tapir_local.pipeline.loop import installed
from tapir_local.report.llama_check import fault_of_build
from tapir_local.resources import POCKET_SEEDS, POCKET_STUDENT, recipe_files

NEEDED = ("torch", "transformers", "trl", "peft", "llama-cpp-python", "gguf", "openai", "sqlite-utils")
DISK_GB = 5.0
MEMORY_GB = 3.0


@dataclass(frozen=True)
class Check:
    """One thing looked at. `ok` None means that it is good to have and not needed."""

    name: str
    ok: bool | None
    found: str
    fix: str = ""


def examine(cache: Path) -> list[Check]:
    """Every check, in the order in which they matter."""
    checks: list[Callable[[], Check]] = [
        system,
        python,
        packages,
        compiler,
        llama,
        sqlite,
        pocket,
        lambda: writable(cache),
        lambda: disk(cache),
        memory,
        gpu,
        unsloth,
        key,
    ]
    return [check() for check in checks]


def system() -> Check:
    """Linux alone has the locks that the store's processes hold."""
    found = platform.system()
    return Check("system", found == "Linux", found, "Use a machine with Linux; on Windows, WSL 2 is one.")


def python() -> Check:
    """Python 3.11 or newer."""
    return Check("Python", sys.version_info >= (3, 11), platform.python_version(), "Install Python 3.11 or newer.")


def packages() -> Check:
    """What the loop imports."""
    versions = {name: installed(name) for name in NEEDED}
    missing = [name for name, found in versions.items() if not found]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return Check(
        "packages", not missing, found, f"missing: {', '.join(missing)}; run `make install`" if missing else ""
    )


def compiler() -> Check:
    """llama-cpp-python is built from source: a C++ compiler is needed until it is installed."""
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), "")
    needed = importlib.util.find_spec("llama_cpp") is None
    return Check(
        "C++ compiler",
        bool(found) if needed else (True if found else None),
        found or "none",
        "Install one (Debian: apt-get install g++ cmake).",
    )


def llama() -> Check:
    """llama.cpp is compiled for the processor of the machine that built it."""
    if importlib.util.find_spec("llama_cpp") is None:
        return Check("llama.cpp", None, "not installed")
    fault = fault_of_build()
    return Check(
        "llama.cpp",
        not fault,
        f"ends with {fault}" if fault else "runs on this processor",
        "It was built for another processor: `make llama` in the checkout builds it again.",
    )


def sqlite() -> Check:
    """The store wants upserts and WAL (SQLite 3.24, 2018)."""
    return Check(
        "SQLite",
        sqlite3.sqlite_version_info >= (3, 24),
        sqlite3.sqlite_version,
        "Use a Python built with SQLite 3.24 or newer.",
    )


def pocket() -> Check:
    """The files that come with the program."""
    there = [path for path in (POCKET_STUDENT / "model.safetensors", POCKET_SEEDS) if path.is_file()]
    found = f"student and seeds, {len(recipe_files())} recipes" if len(there) == 2 else "incomplete"
    return Check(
        "pocket files",
        len(there) == 2 and bool(recipe_files()),
        found,
        "Install the package again: files that belong to it are missing.",
    )


def writable(cache: Path) -> Check:
    """The cache's folder, or the nearest one above it that exists."""
    place = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.exists())
    return Check(
        "cache", os.access(place, os.W_OK), str(cache), f"{place} cannot be written; name another folder with --cache."
    )


def disk(cache: Path) -> Check:
    """Room for a small run; a 7B student wants some 40 GB."""
    free = free_disk_space(cache) / 1e9
    return Check(
        "disk",
        free > DISK_GB,
        f"{free:,.0f} GB free",
        f"Make room: {DISK_GB:.0f} GB for the quickstart, about 40 GB for a 7B student.",
    )


def memory() -> Check:
    """The quickstart stays under 3 GB."""
    total = total_memory() / 1e9
    return Check("memory", total > MEMORY_GB, f"{total:,.0f} GB", f"The quickstart wants {MEMORY_GB:.0f} GB.")


def gpu() -> Check:
    """A CUDA device that torch can use."""
    if not installed("torch"):
        return Check("GPU", None, "unknown: torch is not installed")
    import torch

    if not torch.cuda.is_available():
        cards = [card.name for card in list_visible_gpus()]
        unused = (
            f"the driver lists {', '.join(cards)}, but torch {torch.__version__} cannot use it" if cards else "none"
        )
        return Check(
            "GPU",
            None,
            f"{unused}: training and answering run on the CPU",
            "A student of billions of parameters wants a CUDA GPU and a CUDA build of torch.",
        )
    properties = torch.cuda.get_device_properties(0)
    return Check("GPU", True, f"{properties.name}, {properties.total_memory / 1e9:,.0f} GB")


def unsloth() -> Check:
    """Used where there is a GPU."""
    found = installed("unsloth")
    return Check(
        "unsloth",
        True if found else None,
        found or "not installed: training uses TRL and PEFT",
        "With a GPU: pip install -e '.[gpu]' in the checkout.",
    )


def key() -> Check:
    """A key for a vendor's endpoint; the quickstart needs none."""
    there = "OPENAI_API_KEY" in os.environ
    return Check(
        "API key",
        True if there else None,
        "OPENAI_API_KEY is set" if there else "OPENAI_API_KEY is not set",
        "Only an endpoint that wants a key needs it; the quickstart does not.",
    )
