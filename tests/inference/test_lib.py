"""Where llama.cpp's log goes, and the remark on a GPU that it cannot use, first of all that a command says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import tapir
from gpus import put_driver

from tapir_local.commands.main import cli
from tapir_local.inference.lib import library, unused_gpu_remark
from tapir_local.process import OWNED_VARIABLE

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


FAULTY = """
import sys
from pathlib import Path
from tapir_local.errors import TapirError
from tapir_local.inference.model import open_model
try:
    with open_model(Path(sys.argv[1])):
        pass
except TapirError as error:
    print(error.what)
"""


@pytest.mark.parametrize("owned", [True, False])
def test_errors_of_llama_cpp_are_in_the_log_of_its_own_process(llama, tmp_path: Path, owned: bool) -> None:
    (tmp_path / "cut.gguf").write_bytes(llama.gguf.read_bytes()[:20_000])
    done = subprocess.run(
        [sys.executable, "-c", FAULTY, str(tmp_path / "cut.gguf")],
        capture_output=True,
        text=True,
        env={**os.environ, **({OWNED_VARIABLE: "1"} if owned else {})},
        check=True,
    )
    assert "failed to load model" in done.stdout
    assert ("failed to load model" in done.stderr) == owned


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
