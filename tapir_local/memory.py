"""How much room there is, in main memory, on the GPU and on a disk, and one clear error where it is too little."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tapir_local.errors import TapirError


@dataclass(frozen=True)
class Gpu:
    """A GPU's name and its bytes of memory, those that nobody holds and all."""

    name: str
    free: int
    total: int


def free_memory() -> int:
    """Bytes of main memory that can be had without swapping, by the kernel's reckoning; elsewhere half of it all."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs as their driver sees them, without opening a context on any; none where there is no driver."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 2) for line in said.splitlines() if line.strip()]
    return [Gpu(name.strip(), int(free) << 20, int(total) << 20) for name, free, total in rows]  # it counts in MiB


def take_gpu(wanted: int, what: str, say: Callable[[str], None]) -> None:
    """Say how much of the GPU is free before a stage that takes about `wanted` bytes; nothing where there is none.

    Nothing of ours holds it meanwhile: every stage that loads a model ends with it. What is missing is another's.
    """
    cards = gpus()
    if not cards:
        return
    best = max(cards, key=lambda gpu: gpu.free)
    short = "" if best.free >= wanted else f"; {what} takes about {size(wanted)}: another process holds what is missing"
    say(f"{best.name}: {size(best.free)} of {size(best.total)} free{short}")


def check_disk(path: Path, wanted: int, what: str) -> None:
    """TapirError unless the disk on which `path` is or will be has `wanted` bytes free for `what`."""
    place = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if wanted > free:
        raise TapirError(
            f"no room for {what}: it takes {size(wanted)}, and {size(free)} are free",
            where=str(path),
            fix="Make room there, or name a place on another disk.",
        )


def check_memory(wanted: int, what: str) -> None:
    """TapirError unless `wanted` bytes of main memory are free for `what`."""
    free = free_memory()
    if wanted > free:
        raise TapirError(
            f"no memory for {what}: it takes {size(wanted)}, and {size(free)} are free",
            fix="Close other programs, or take a larger machine.",
        )


def size(count: int) -> str:
    """Bytes for people, as disks are sold: 1.5 GB is 1,500,000,000."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
