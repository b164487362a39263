"""Runs are found by name, and only one process works on a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.files import write_text
from tapir_local.run_dir import RunDir, find_run, lock_run


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b"])
def test_a_runs_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(TapirError, match="not a valid run name"):
        RunDir(tmp_path, name)


def test_an_unknown_run_names_those_there_are(tmp_path: Path) -> None:
    write_text(RunDir(tmp_path, "mine").path / "recipe.yaml", "")
    with pytest.raises(TapirError, match="no run 'yours'") as error:
        find_run(tmp_path, "yours")
    assert "mine" in str(error.value)


def test_a_second_process_is_refused_and_names_the_one_that_holds_the_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "mine")
    code = (
        "import sys\nfrom pathlib import Path\nfrom tapir_local.run_dir import RunDir, lock_run\n"
        "from tapir_local.errors import TapirError\n"
        "try:\n    with lock_run(RunDir(Path(sys.argv[1]), 'mine')): print('held')\n"
        "except TapirError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with lock_run(run):
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"in use by process {os.getpid()}" in out
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "held\n"
