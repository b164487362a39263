"""The tests see no GPU, so that they expect the same devices and bytes on every machine."""

import os
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
