"""How much room there is, in main memory, on the GPU and on a disk, and one clear error where it is too little."""

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tapir_local.errors import TapirError

NO_CGROUP_LIMIT = 1 << 60  # bytes: cgroup v1 writes a number near 2**63 where there is no limit
RLIMITS = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))  # and what counts towards each
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """A GPU's name and its bytes of memory, those that nobody holds and all; `index` is its place in nvidia-smi's list,
    which is that of CUDA_DEVICE_ORDER=PCI_BUS_ID."""

    name: str
    free: int
    total: int
    index: int = 0


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process can get without swapping: the least of what the kernel has available,
    what the container (cgroup) leaves, and what the process's own limits leave. `root` is where /proc and /sys are."""
    return max(0, min([kernel_memory(root)[0], *container_memory(root), *process_memory(root)]))


def total_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory of the machine, or of the container (cgroup) where that has less."""
    return min([kernel_memory(root)[1], *(limit for limit, _, _ in memory_cgroups(root))])


def kernel_memory(root: Path) -> tuple[int, int]:
    """Bytes of main memory that are available, and all, as /proc/meminfo has them."""
    found = read_proc_sizes(root / "proc/meminfo")
    return found["MemAvailable"], found["MemTotal"]


def read_proc_sizes(path: Path) -> dict[str, int]:
    """Lines such as `VmSize:  1234 kB` of a file of /proc, in bytes; {} where there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    sizes = re.compile(r"(\w+):\s+(\d+) kB")
    return {found[1]: int(found[2]) * 1024 for line in lines if (found := sizes.fullmatch(line.strip()))}


def container_memory(root: Path) -> Iterator[int]:
    """What each cgroup of this process leaves: its limit less what it holds, apart from cached files."""
    for limit, used, cached in memory_cgroups(root):
        yield limit - max(0, used - cached)


def memory_cgroups(root: Path) -> Iterator[tuple[int, int, int]]:
    """Limit, use and inactive cached files, in bytes, of each cgroup with a limit that this process is in."""
    v2 = ("memory.max", "memory.current", "inactive_file")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for kind, (most, current, cached) in (("", v2), ("memory", v1)):
        for folder in cgroups(root, kind):
            limit = read_cgroup_number(folder / most)
            if limit is not None and limit < NO_CGROUP_LIMIT:
                yield limit, read_cgroup_number(folder / current) or 0, read_memory_stat(folder / "memory.stat", cached)


def cgroups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's cgroup and of those above it; `controller` is one of version 1, "" for version 2.

    A container without a cgroup namespace sees the host's name of its cgroup and only its own files, so that folders
    of the name may be missing: the top folder then is the container's.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    top = root / "sys/fs/cgroup" / controller
    found = []
    for _, names, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controller in names.split(","):
            place = top / path.strip("/")
            found += [folder for folder in (place, *place.parents) if folder == top or top in folder.parents]
    return [folder for folder in found if folder.is_dir()]


def read_cgroup_number(path: Path) -> int | None:
    """A file's number; None where it is missing or holds none, as memory.max does that says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def read_memory_stat(path: Path, name: str) -> int:
    """A number of memory.stat by its name, 0 where it is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def process_memory(root: Path) -> Iterator[int]:
    """What each limit of this process (`ulimit -v`, `ulimit -d`) leaves."""
    used = read_proc_sizes(root / "proc/self/status")
    for limit, name in RLIMITS:
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            yield soft - used.get(name, 0)


def count_cpus(root: Path = Path("/")) -> int:
    """Processors that this process may use: those it is bound to, or fewer where its container has a smaller quota."""
    quotas = [quota for folder in cgroups(root, "") if (quota := read_cpu_max(folder / "cpu.max"))]
    quotas += [
        quota
        for folder in cgroups(root, "cpu")
        if (
            quota := quota_in_cpus(
                read_cgroup_number(folder / "cpu.cfs_quota_us"), read_cgroup_number(folder / "cpu.cfs_period_us")
            )
        )
    ]
    return min([len(os.sched_getaffinity(0)), *quotas])


def read_cpu_max(path: Path) -> int | None:
    """Whole processors that a cpu.max of cgroup version 2 (`200000 100000`, or `max 100000`) allows, at least one."""
    try:
        words = path.read_text().split()
    except OSError:
        return None
    numbers = [int(word) if word.isdecimal() else None for word in words]
    return quota_in_cpus(*numbers) if len(numbers) == 2 else None


def quota_in_cpus(quota: int | None, period: int | None) -> int | None:
    """Whole processors that a quota of microseconds in a period is, at least one; None where there is no quota."""
    return max(1, -(-quota // period)) if quota and period else None


def list_gpus() -> list[Gpu]:
    """The NVIDIA GPUs as their driver sees them, without opening a context on any; none where there is no driver.

    A GPU that shares main memory (GB10, Jetson) has none of its own to tell of: `[N/A]`. It has what the system has.
    """
    said = run_nvidia_smi("--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits")
    rows = [line.rsplit(",", 2) for line in said.splitlines() if line.count(",") >= 2]
    return [
        Gpu(name.strip(), parse_mebibytes(free, free_memory), parse_mebibytes(total, total_memory), number)
        for number, (name, free, total) in enumerate(rows)
    ]


def parse_mebibytes(text: str, unknown: Callable[[], int]) -> int:
    """Bytes from nvidia-smi's MiB; `unknown` is asked where it says that it does not know ([N/A], [Not Supported])."""
    number = text.strip()
    return int(number) << 20 if number.isdecimal() else unknown()


def run_nvidia_smi(*arguments: str) -> str:
    """What the driver's tool says; "" where there is none, or it fails."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def list_visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, by their numbers or UUIDs; all where it is not set."""
    cards, named = list_gpus(), os.environ.get(VISIBLE_DEVICES)
    if named is None or not cards:
        return cards
    known = {card.index: card for card in cards}
    numbers = takewhile(known.__contains__, (find_gpu_index(word.strip()) for word in named.split(",")))  # as CUDA does
    return [known[number] for number in dict.fromkeys(numbers) if number is not None]


def find_gpu_index(named: str) -> int | None:
    """A GPU's place in nvidia-smi's list, from its number or the beginning of its UUID; None where there is no such."""
    if named.isdecimal():
        return int(named)
    pairs = re.findall(r"^GPU (\d+): .*\(UUID: (\S+)\)$", run_nvidia_smi("-L") if named else "", re.MULTILINE)
    return next((int(number) for number, uuid in pairs if uuid.startswith(named)), None)


def single_gpu_variables() -> dict[str, str]:
    """Variables that show a process the one visible GPU with the most free memory; {} where there is no choice.

    A training sees one GPU unless a launcher has started several processes: transformers would spread each batch over
    all it sees (DataParallel), and make it so many times larger.
    """
    cards = list_visible_gpus()
    if len(cards) < 2 or "LOCAL_RANK" in os.environ:
        return {}
    best = max(cards, key=lambda gpu: gpu.free)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", VISIBLE_DEVICES: str(best.index)}


def report_free_gpu_memory(wanted: int, what: str, say: Callable[[str], None]) -> None:
    """Say how much of the GPU is free before a stage that takes about `wanted` bytes; nothing where there is none.

    Nothing of ours holds it meanwhile: every stage that loads a model ends with it. What is missing is another's.
    """
    cards = list_visible_gpus()
    if not cards:
        return
    best = max(cards, key=lambda gpu: gpu.free)
    short = "" if best.free >= wanted else f"; {what} takes about {size(wanted)}: another process holds what is missing"
    say(f"{best.name}: {size(best.free)} of {size(best.total)} free{short}")


def check_disk_space(path: Path, wanted: int, what: str) -> None:
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


def format_bytes(count: int) -> str:
    """Bytes for people, as disks are sold: 1.5 GB is 1,500,000,000."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
