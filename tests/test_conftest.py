"""The tests see no GPU, so that they expect the same devices and bytes on every machine."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
# Runs conftest.py with each of the variables in standard input, and prints which GPUs are visible then.
CODE = """
import json, os, runpy, sys
for given in json.load(sys.stdin):
    for name, value in given.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    runpy.run_path(sys.argv[1])
    print(repr(os.environ.get("CUDA_VISIBLE_DEVICES")))
"""


def test_gpus_are_hidden_from_the_tests_unless_they_are_asked_for() -> None:
    asked = {None: True, "0": True, "1": False}  # of TAPIR_TEST_GPU: whether the GPUs are hidden
    cases = [(named, word) for named in (None, "0,1") for word in asked]
    given = [{"CUDA_VISIBLE_DEVICES": named, "TAPIR_TEST_GPU": word} for named, word in cases]
    path = os.pathsep.join([str(CONFTEST.parent / "support"), str(CONFTEST.parents[1])])
    command, env = [sys.executable, "-c", CODE, str(CONFTEST)], {**os.environ, "PYTHONPATH": path}
    found = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, env=env, check=True)
    assert found.stdout.splitlines() == ["''" if asked[word] else repr(named) for named, word in cases]


CRASHES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


def test_a_crash_of_torch_beside_llama_cpp_with_cuda_ends_the_session_in_one_sentence(tmp_path: Path) -> None:
    built, conftest = tmp_path / "libggml-cuda.so", runpy.run_path(str(CONFTEST))
    refuse_cuda_build = conftest["refuse_cuda_build"]
    refuse_cuda_build(built, CRASHES)  # llama.cpp was built without CUDA: not tried
    built.touch()
    refuse_cuda_build(built, conftest["LOADS_BOTH"])  # a GPU is hidden or absent, and both work here
    with pytest.raises(pytest.exit.Exception, match=r"crash in one process here \(signal 11\).*another checkout"):
        refuse_cuda_build(built, CRASHES)
