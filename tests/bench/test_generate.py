"""The generation benches run and print their measurements, each in a run of seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
FEW = ["--loop-prompts", "2", "--repeats", "1", "--waves", "2"]
SHORT = [*FEW, "--parallel", "4", "--max-tokens", "8", "--prompt-tokens", "6"]


def measured(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a bench as a person does."""
    command = [sys.executable, str(BENCH / script), *SHORT, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(BENCH.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_ours_and_the_loop_are_printed_with_their_ratio(llama) -> None:
    found = measured("generate.py", llama.gguf, "--threads", "1")
    assert found.returncode == 0, found.stderr
    rate, ratio = re.search(r"llama-cpp-python, a loop +- +([\d,]+) +- +([\d.]+)x", found.stdout).groups()
    assert float(rate.replace(",", "")) > 0
    assert float(ratio) > 0
    assert re.search(r"our Python: [\d.]+ microseconds per token", found.stdout)


def test_both_ways_of_choosing_tokens_are_measured(llama) -> None:
    found = measured("generate.py", llama.gguf, "--threads", "1", "--choose", "both", "--loop-prompts", "0", "--uneven")
    assert found.returncode == 0, found.stderr
    assert len(re.findall(r"tapir-local.*, choosing: [\d.]+ microseconds per token", found.stdout)) == 2
    rate, ratio = re.search(r"tapir-local with NumPy +([\d,]+) +[\d,]+ +([\d.]+)x", found.stdout).groups()
    assert float(rate.replace(",", "")) > 0
    assert float(ratio) > 0


def test_a_rival_that_fails_is_an_error(llama, tmp_path: Path) -> None:
    found = measured("generate.py", llama.gguf, "--xllamacpp", sys.executable)
    assert found.returncode == 1
    assert "xllamacpp failed" in found.stderr


def test_the_gpu_bench_runs_on_a_small_model_or_says_that_there_is_no_gpu() -> None:
    small = measured("gpu_generate.py", "--cpu", "--layers", 1, "--hidden", 256, "--threads", 1)
    assert "llama-1x256-q8_0.gguf: 19.0 MB" in small.stdout, small.stderr
    assert "tapir-local " in small.stdout
    if not Path("/proc/driver/nvidia").exists():
        assert "knows no GPU" in measured("gpu_generate.py").stderr


def test_the_random_llama_is_of_7b_shape() -> None:
    sys.path.insert(0, str(BENCH))
    from gpu_generate import matrices

    numbers = sum(rows * columns for rows, columns in matrices(32, 4096, 11_008).values())
    assert numbers == pytest.approx(6.74e9, rel=0.001)  # Llama 2 7B
