"""Room: what there is, and what is said where it is too little."""

import os
from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.memory import Gpu, check_disk, free_memory, gpus, size, take_gpu


def test_free_memory_is_some_of_what_the_machine_has() -> None:
    assert 0 < free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match=r"no room for the GGUF: it takes 1,000,000\.0 GB, and .* are free"):
        check_disk(tmp_path / "not" / "yet" / "there.gguf", 10**15, "the GGUF")
    assert not any(tmp_path.iterdir())


def test_a_disk_large_enough_passes(tmp_path: Path) -> None:
    check_disk(tmp_path / "out.gguf", 1, "the GGUF")


def test_gpus_are_read_from_what_their_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA H200, SXM, 1024, 143771'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpus() == [Gpu("NVIDIA H200, SXM", 1 << 30, 143771 << 20)]


@pytest.mark.parametrize(
    ("wanted", "rest"),
    [(1 << 30, ""), (3 << 30, "; the classifier takes about 3.2 GB: another process holds what is missing")],
)
def test_what_is_free_of_a_gpu_is_said_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: int, rest: str
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA A, 100, 24576'\necho 'NVIDIA B, 2048, 24576'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    said: list[str] = []
    take_gpu(wanted, "the classifier", said.append)
    assert said == [f"NVIDIA B: 2.1 GB of 25.8 GB free{rest}"]


def test_no_driver_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []
    take_gpu(1 << 50, "anything", pytest.fail)


def test_sizes_are_told_as_disks_are_sold() -> None:
    assert (size(1_500_000_000), size(2_500_000)) == ("1.5 GB", "2.5 MB")
