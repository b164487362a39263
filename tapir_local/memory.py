"""Free memory, GPU memory, disk space and processors, within the limits of containers; errors when they run short."""

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

NO_CGROUP_LIMIT = 1 << 60  # bytes: cgroup v1 reports a number near 2**63 for no limit
RLIMITS = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))  # and the memory that counts towards it
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


@dataclass(frozen=True)
class Gpu:
    """A GPU: name, free and total memory in bytes, and its index in nvidia-smi's list.

    CUDA uses the same index with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """

    name: str
    free: int
    total: int
    index: int = 0


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process can allocate without swapping.

    The minimum of the kernel's available memory, what the container's (cgroup) limit leaves, and what the process's
    own limits leave. `root` contains /proc and /sys.
    """
    return max(0, min([kernel_memory(root)[0], *container_memory(root), *process_memory(root)]))


def total_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory of the machine, or of the container (cgroup) if it has less."""
    return min([kernel_memory(root)[1], *(limit for limit, _, _ in memory_cgroups(root))])


def kernel_memory(root: Path) -> tuple[int, int]:
    """Available and total main memory in bytes, from /proc/meminfo."""
    found = read_proc_sizes(root / "proc/meminfo")
    return found["MemAvailable"], found["MemTotal"]


def read_proc_sizes(path: Path) -> dict[str, int]:
    """Sizes in bytes by name from a file in /proc with lines such as `VmSize:  1234 kB`; {} without the file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    sizes = re.compile(r"(\w+):\s+(\d+) kB")
    return {found[1]: int(found[2]) * 1024 for line in lines if (found := sizes.fullmatch(line.strip()))}


def container_memory(root: Path) -> Iterator[int]:
    """Bytes that each cgroup of this process leaves: its limit minus its use, not counting cached files."""
    for limit, used, cached in memory_cgroups(root):
        yield limit - max(0, used - cached)


def memory_cgroups(root: Path) -> Iterator[tuple[int, int, int]]:
    """(limit, use, inactive cached files) in bytes of every cgroup of this process that has a limit."""
    v2 = ("memory.max", "memory.current", "inactive_file")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for kind, (most, current, cached) in (("", v2), ("memory", v1)):
        for folder in cgroups(root, kind):
            limit = read_cgroup_number(folder / most)
            if limit is not None and limit < NO_CGROUP_LIMIT:
                yield limit, read_cgroup_number(folder / current) or 0, read_memory_stat(folder / "memory.stat", cached)


def cgroups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's cgroup and its parents; `controller` is one of version 1, or "" for version 2.

    A container without a cgroup namespace sees the host's name of its cgroup but only its own files. Folders of that
    name may then be missing, and the top folder is the container's.
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
    """The number in a cgroup file; None if the file is missing or holds a word, such as `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def read_memory_stat(path: Path, name: str) -> int:
    """A number in memory.stat by its name; 0 if it is missing."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def process_memory(root: Path) -> Iterator[int]:
    """Bytes that each limit of this process (`ulimit -v`, `ulimit -d`) leaves."""
    used = read_proc_sizes(root / "proc/self/status")
    for limit, name in RLIMITS:
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            yield soft - used.get(name, 0)


def count_cpus(root: Path = Path("/")) -> int:
    """Processors that this process may use: its CPU affinity, or fewer if its container has a smaller quota."""
    quotas = [quota for folder in cgroups(root, "") if (quota := read_cpu_max(folder / "cpu.max"))]
    quotas += [quota for folder in cgroups(root, "cpu") if (quota := read_cfs_quota(folder))]
    return min([len(os.sched_getaffinity(0)), *quotas])


def read_cfs_quota(folder: Path) -> int | None:
    """Processors that the CPU quota of a version-1 cgroup allows; None without a quota."""
    return quota_in_cpus(
        read_cgroup_number(folder / "cpu.cfs_quota_us"), read_cgroup_number(folder / "cpu.cfs_period_us")
    )


def read_cpu_max(path: Path) -> int | None:
    """Processors that cpu.max of a version-2 cgroup (`200000 100000`, or `max 100000`) allows; None without a limit."""
    try:
        words = path.read_text().split()
    except OSError:
        return None
    numbers = [int(word) if word.isdecimal() else None for word in words]
    return quota_in_cpus(*numbers) if len(numbers) == 2 else None


def quota_in_cpus(quota: int | None, period: int | None) -> int | None:
    """A CPU quota in microseconds per period as whole processors, at least one; None without a quota."""
    return max(1, -(-quota // period)) if quota and period else None


def list_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that the driver reports; no CUDA context is opened. [] without a driver.

    A GPU that shares main memory (GB10, Jetson) reports `[N/A]`; it counts as having the system's memory.
    """
    table = run_nvidia_smi("--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits")
    rows = [line.rsplit(",", 2) for line in table.splitlines() if line.count(",") >= 2]
    return [
        Gpu(name.strip(), parse_mebibytes(free, free_memory), parse_mebibytes(total, total_memory), number)
        for number, (name, free, total) in enumerate(rows)
    ]


def parse_mebibytes(text: str, unknown: Callable[[], int]) -> int:
    """Bytes from a number of MiB; `unknown()` if nvidia-smi reports none ([N/A], [Not Supported])."""
    number = text.strip()
    return int(number) << 20 if number.isdecimal() else unknown()


def run_nvidia_smi(*arguments: str) -> str:
    """The output of nvidia-smi; "" if it is not installed or fails."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def list_visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES lists by index or UUID; all GPUs if it is not set."""
    cards, named = list_gpus(), os.environ.get(VISIBLE_DEVICES)
    if named is None or not cards:
        return cards
    known = {card.index: card for card in cards}
    numbers = takewhile(
        known.__contains__, (find_gpu_index(word.strip()) for word in named.split(","))
    )  # CUDA stops at the first unknown one too
    return [known[number] for number in dict.fromkeys(numbers) if number is not None]


def find_gpu_index(named: str) -> int | None:
    """A GPU's index in nvidia-smi's list, from its index or the beginning of its UUID, or of the UUID of a part of it
    (MIG); None if there is no such GPU."""
    if named.isdecimal():
        return int(named)
    index = None
    for line in run_nvidia_smi("-L").splitlines() if named else ():
        if gpu := re.match(r"GPU (\d+): ", line):
            index = int(gpu[1])
        uuid = re.search(r"\(UUID: (\S+)\)$", line)
        if uuid and uuid[1].startswith(named):
            return index
    return None


def single_gpu_variables() -> dict[str, str]:
    """Environment variables that restrict a process to the visible GPU with the most free memory.

    {} with fewer than two GPUs, or if a launcher has started several processes. Without this, transformers would use
    DataParallel on all visible GPUs, which multiplies the batch size.
    """
    cards = list_visible_gpus()
    if len(cards) < 2 or "LOCAL_RANK" in os.environ:
        return {}
    best = max(cards, key=lambda gpu: gpu.free)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", VISIBLE_DEVICES: str(best.index)}


def gpu_driver_version() -> str:
    """The version of the NVIDIA driver; "" without one."""
    return run_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0].strip()


def describe_unused_gpus(torch_version: str, cuda: str | None) -> str:
    """A sentence about the GPUs that the driver lists, for a torch that cannot use them; "" if there are none.

    `cuda` is the CUDA version that torch was built for, None for a CPU build.
    """
    cards = ", ".join(card.name for card in list_visible_gpus())
    if not cards:
        return ""
    build = f"built for CUDA {cuda}" if cuda else "a CPU build"
    driver = f"The driver {gpu_driver_version()}".strip()
    return f"{driver} lists {cards}, but torch {torch_version} ({build}) cannot use it"


def allocator_variables(root: Path = Path("/")) -> dict[str, str]:
    """Environment variables that let torch's GPU memory grow in place, which fragments less. They must be set before
    CUDA starts. `root` contains /proc and /etc.

    {} if the user has configured the allocator, under WSL, and on Jetson boards: there such allocations fail
    (unslothai/unsloth#3511 and #2401). torch 2.10 and newer read PYTORCH_ALLOC_CONF first; the other name is older.
    """
    release = root / "proc/sys/kernel/osrelease"
    wsl = release.is_file() and "microsoft" in release.read_text().lower()
    jetson = (root / "etc/nv_tegra_release").exists()
    if wsl or jetson or not ALLOCATOR_VARIABLES.isdisjoint(os.environ):
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def report_free_gpu_memory(wanted: int, what: str, say: Callable[[str], None]) -> None:
    """Report the GPU's free memory before a stage that needs about `wanted` bytes; nothing without a GPU.

    Each of our own stages frees the GPU when it ends, so missing memory is used by another process.
    """
    cards = list_visible_gpus()
    if not cards:
        return
    best = max(cards, key=lambda gpu: gpu.free)
    needs = f"; {what} needs about {format_bytes(wanted)}: another process uses the rest"
    short = "" if best.free >= wanted else needs
    say(f"{best.name}: {format_bytes(best.free)} of {format_bytes(best.total)} free{short}")


def free_disk_space(path: Path) -> int:
    """Free bytes on the disk of `path`, which need not exist yet."""
    place = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(place).free


def check_disk_space(path: Path, wanted: int, what: str) -> None:
    """Raise TapirError unless the disk of `path` has `wanted` bytes free for `what`."""
    free = free_disk_space(path)
    if wanted > free:
        raise TapirError(
            f"not enough disk space for {what}: it needs {format_bytes(wanted)}, and {format_bytes(free)} are free",
            where=str(path),
            fix="Free some disk space, or choose a folder on another disk.",
        )


def check_memory(wanted: int, what: str) -> None:
    """Raise TapirError unless `wanted` bytes of main memory are free for `what`."""
    free = free_memory()
    if wanted > free:
        raise TapirError(
            f"not enough memory for {what}: it needs {format_bytes(wanted)}, and {format_bytes(free)} are free",
            fix="Close other programs, or use a machine with more memory.",
        )


def format_bytes(count: int) -> str:
    """A number of bytes in MB or GB, decimal: 1.5 GB is 1,500,000,000 bytes."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
