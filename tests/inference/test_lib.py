"""The remark on a GPU that llama.cpp cannot use, in the first lines of the commands that generate."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import tapir
from gpus import put_driver

from tapir_local.commands.main import cli
from tapir_local.inference.lib import library, unused_gpu_remark

REMARK = "llama.cpp cannot use NVIDIA A, so answers are generated on the CPU, which is much slower."


def test_there_is_a_remark_only_for_a_gpu_that_is_there_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unused_gpu_remark() == ""
    put_driver(tmp_path, monkeypatch)
    assert unused_gpu_remark().startswith(REMARK)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_gpu_remark() == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(library(), "llama_supports_gpu_offload", lambda: True)
    assert unused_gpu_remark() == ""


def test_generate_begins_with_the_remark(llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_driver(tmp_path, monkeypatch)
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"{n} + 1?"}) + "\n" for n in range(3)))
    found = CliRunner().invoke(cli, ["generate", str(llama.gguf), str(asked), "--max-tokens", "2"])
    assert found.stderr.startswith(REMARK)
    assert found.stderr.count(REMARK) == 1
    assert len(found.stdout.splitlines()) == 3


def test_distill_begins_with_the_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --replay and an empty store the run ends at its first request."""
    put_driver(tmp_path, monkeypatch)
    found = tapir("distill", "--replay", "--cache", str(tmp_path / "cache"))
    assert found.returncode == 1
    assert found.stderr.splitlines()[0].startswith(REMARK)
    assert found.stderr.count(REMARK) == 1
