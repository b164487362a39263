"""The tests see no GPU, so that they expect the same devices and bytes on every machine."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
CODE = "import os, runpy, sys; runpy.run_path(sys.argv[1]); print(os.environ.get('CUDA_VISIBLE_DEVICES'))"


@pytest.mark.parametrize("named", [None, "0,1"])
@pytest.mark.parametrize(("asked", "hidden"), [(None, True), ("0", True), ("1", False)])
def test_gpus_are_hidden_from_the_tests_unless_they_are_asked_for(
    named: str | None, asked: str | None, hidden: bool
) -> None:
    given = {"CUDA_VISIBLE_DEVICES": named, "TAPIR_TEST_GPU": asked}
    others = {name: value for name, value in os.environ.items() if name not in given}
    path = {"PYTHONPATH": os.pathsep.join([str(CONFTEST.parent / "support"), str(CONFTEST.parents[1])])}
    env = {**others, **path, **{name: value for name, value in given.items() if value is not None}}
    command = [sys.executable, "-c", CODE, str(CONFTEST)]
    found = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    assert found == ("\n" if hidden else f"{named}\n")


CRASHES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


def test_a_crash_of_torch_beside_llama_cpp_with_cuda_ends_the_session_in_one_sentence(tmp_path: Path) -> None:
    built, conftest = tmp_path / "libggml-cuda.so", runpy.run_path(str(CONFTEST))
    refuse_cuda_build = conftest["refuse_cuda_build"]
    refuse_cuda_build(built, CRASHES)  # llama.cpp was built without CUDA: not tried
    built.touch()
    refuse_cuda_build(built, conftest["LOADS_BOTH"])  # a GPU is hidden or absent, and both work here
    with pytest.raises(pytest.exit.Exception, match=r"crash in one process here \(signal 11\).*another checkout"):
        refuse_cuda_build(built, CRASHES)
