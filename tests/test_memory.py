"""Free memory, disk space, GPUs and processors, and the errors when they run short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.memory import (
    Gpu,
    allocator_variables,
    check_disk_space,
    count_cpus,
    format_bytes,
    free_memory,
    list_gpus,
    report_free_gpu_memory,
    total_memory,
)


def test_free_memory_is_some_of_what_the_machine_has() -> None:
    assert 0 < free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        TapirError, match=r"not enough disk space for the GGUF: it needs 1,000,000\.0 GB, and .* are free"
    ):
        check_disk_space(tmp_path / "not" / "yet" / "there.gguf", 10**15, "the GGUF")
    assert not any(tmp_path.iterdir())


def test_a_disk_large_enough_passes(tmp_path: Path) -> None:
    check_disk_space(tmp_path / "out.gguf", 1, "the GGUF")


def test_gpus_are_read_from_what_their_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA H200, SXM, 1024, 143771'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert list_gpus() == [Gpu("NVIDIA H200, SXM", 1 << 30, 143771 << 20)]


@pytest.mark.parametrize(
    ("wanted", "rest"),
    [(1 << 30, ""), (3 << 30, "; the classifier needs about 3.2 GB: another process uses the rest")],
)
def test_what_is_free_of_a_gpu_is_said_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: int, rest: str
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA A, 100, 24576'\necho 'NVIDIA B, 2048, 24576'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said: list[str] = []
    report_free_gpu_memory(wanted, "the classifier", said.append)
    assert said == [f"NVIDIA B: 2.1 GB of 25.8 GB free{rest}"]


@pytest.mark.parametrize("said", ["[N/A]", "N/A", "[Not Supported]", "[Unknown Error]"])
def test_a_gpu_without_memory_of_its_own_has_what_the_system_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\necho 'NVIDIA GB10, {said}, {said}'\necho 'No more devices'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (card,) = list_gpus()
    assert (card.name, card.total) == ("NVIDIA GB10", total_memory())
    assert 0 < card.free <= card.total
    words: list[str] = []
    report_free_gpu_memory(1 << 20, "the classifier", words.append)
    assert words[0].startswith("NVIDIA GB10: ")
    assert words[0].endswith(f" of {format_bytes(card.total)} free")


# Containers


def machine(root: Path, **files: str) -> Path:
    """A root folder with 64 GB of memory, 32 available, and more files: `proc__self__cgroup` is /proc/self/cgroup."""
    meminfo = f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable:   {32 << 20} kB\nHugePages_Total:  0\n"
    for name, text in {"proc__meminfo": meminfo, **files}.items():
        path = root.joinpath(*name.split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "sys__fs__cgroup__"
OWN = f"{V2}box__job__"
V1 = "sys__fs__cgroup__memory__"


@pytest.mark.parametrize(
    ("files", "free", "total"),
    [
        ({}, 32, 64),
        ({"proc__self__cgroup": "0::/\n"}, 32, 64),
        ({"proc__self__cgroup": "0::/\n", f"{V2}memory.max": "max\n", f"{V2}memory.current": f"{20 << 30}"}, 32, 64),
        (
            {"proc__self__cgroup": "0::/\n", f"{V2}memory.max": f"{8 << 30}\n", f"{V2}memory.current": f"{3 << 30}"},
            5,
            8,
        ),
        (
            {
                "proc__self__cgroup": "0::/\n",
                f"{V2}memory.max": f"{8 << 30}",
                f"{V2}memory.current": f"{7 << 30}",
                f"{V2}memory.stat": f"anon {3 << 30}\ninactive_file {4 << 30}\nactive_file 0\n",
            },
            5,
            8,
        ),
        (
            {
                "proc__self__cgroup": "0::/box/job\n",
                f"{OWN}memory.max": "max\n",
                f"{OWN}memory.current": "0\n",
                f"{V2}box__memory.max": f"{16 << 30}\n",
                f"{V2}box__memory.current": f"{15 << 30}\n",
            },
            1,
            16,
        ),
        (
            {
                "proc__self__cgroup": "9:name=systemd:/\n4:memory:/docker/abc\n0::/\n",
                f"{V1}memory.limit_in_bytes": f"{4 << 30}\n",
                f"{V1}memory.usage_in_bytes": f"{3 << 30}\n",
                f"{V1}memory.stat": f"cache 1\ntotal_inactive_file {1 << 30}\n",
            },
            2,
            4,
        ),
        (
            {
                "proc__self__cgroup": "4:memory:/\n",
                f"{V1}memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}memory.usage_in_bytes": f"{60 << 30}\n",
            },
            32,
            64,
        ),
        ({"proc__self__cgroup": "0::/\n", f"{V2}memory.max": "1000\n", f"{V2}memory.current": f"{3 << 30}"}, 0, 0),
    ],
)
def test_memory_is_the_least_of_the_machines_and_the_containers(
    tmp_path: Path, files: dict[str, str], free: int, total: int
) -> None:
    root = machine(tmp_path, **files)
    assert free_memory(root) == free << 30
    assert total_memory(root) >> 30 == total


def test_a_limit_of_the_process_counts_too() -> None:
    code = (
        "import resource\nfrom tapir_local.memory import free_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\nprint(free_memory())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=here())
    assert 0 < int(out.stdout) < 1 << 30


def here() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, None),
        ({"proc__self__cgroup": "0::/\n", f"{V2}cpu.max": "max 100000\n"}, None),
        ({"proc__self__cgroup": "0::/\n", f"{V2}cpu.max": "100000 100000\n"}, 1),
        ({"proc__self__cgroup": "0::/\n", f"{V2}cpu.max": "50000 100000\n"}, 1),
        ({"proc__self__cgroup": "0::/box/job\n", f"{OWN}cpu.max": "max 1\n", f"{V2}box__cpu.max": "90000 100000"}, 1),
        (
            {
                "proc__self__cgroup": "1:cpu,cpuacct:/docker/abc\n",
                "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "100000\n",
                "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc__self__cgroup": "1:cpu,cpuacct:/\n",
                "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1\n",
                "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc__self__cgroup": "0::/\n", f"{V2}cpu.max": f"{10**9} 100000\n"}, None),
    ],
)
def test_processors_are_those_of_the_container(tmp_path: Path, files: dict[str, str], most: int | None) -> None:
    assert count_cpus(machine(tmp_path, **files)) == min(most or 10**6, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("files", "user", "set_"),
    [
        ({"proc__sys__kernel__osrelease": "6.8.0-45-generic\n"}, {}, True),
        ({"proc__sys__kernel__osrelease": "5.15.167.4-microsoft-standard-WSL2\n"}, {}, False),
        ({"etc__nv_tegra_release": "# R36 (release), REVISION: 4.0\n"}, {}, False),
        ({}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, False),
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, False),
        ({}, {}, True),
    ],
)
def test_gpu_memory_grows_in_place_where_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], user: dict[str, str], set_: bool
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    expected = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if set_ else {}
    assert allocator_variables(machine(tmp_path, **files)) == expected


def test_no_driver_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus() == []
    report_free_gpu_memory(1 << 50, "anything", pytest.fail)


def test_sizes_are_told_as_disks_are_sold() -> None:
    assert (format_bytes(1_500_000_000), format_bytes(2_500_000)) == ("1.5 GB", "2.5 MB")
