"""Outputs are whole or absent; one process works on a run."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.files import RunDir, atomic_write, existing, held, read_rows, write_rows, write_text
from tapir_local.records import Completion


def test_a_file_written_in_part_does_not_exist(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_write(tmp_path / "a.json") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "a.json").exists()
    write_text(tmp_path / "a.json", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "adapter") as partial:
        partial.mkdir()
        (partial / "weights").write_bytes(b"1")
        assert not (tmp_path / "adapter").exists()
    assert (tmp_path / "adapter" / "weights").exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the file's size stands for the full disk: both are an OSError from write."""
    code = (
        "import sys, resource, signal\n"
        "from pathlib import Path\n"
        "from tapir_local.files import write_text\n"
        "from tapir_local.errors import TapirError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_text(Path(sys.argv[1]), 'x' * 100_000)\n"
        "except TapirError as error:\n    print(error)\n"
    )
    assert resource.RLIMIT_FSIZE
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big")], capture_output=True, text=True, check=True
    )
    assert "cannot be written" in out.stdout
    assert list(tmp_path.iterdir()) == []


def read_in_a_block(out: Path, other: Path) -> None:
    with atomic_write(out) as partial:
        partial.write_text(other.read_text())


def test_a_file_that_the_block_reads_keeps_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for other, kind in ((tmp_path / "gone.jsonl", FileNotFoundError), (tmp_path / "folder", IsADirectoryError)):
        with pytest.raises(kind) as caught:
            read_in_a_block(tmp_path / "out.json", other)
        assert caught.value.filename == str(other)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


NOT_OF_WRITING = (ConnectionResetError("reset by peer"), TimeoutError("timed out"), OSError("no model"))


@pytest.mark.parametrize("error", NOT_OF_WRITING)
def test_an_error_of_the_network_or_a_library_is_not_said_to_be_of_writing(tmp_path: Path, error: OSError) -> None:
    with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "out.json"):
        raise error
    assert caught.value is error


def in_a_file(place: Path) -> Path:
    """A folder that would lie within a file."""
    (place / "file").write_text("")
    return place / "file" / "out.json"


def over_a_folder(place: Path) -> Path:
    """A place that a folder with something in it takes."""
    (place / "out.json" / "more").mkdir(parents=True)
    return place / "out.json"


@pytest.mark.parametrize("make", [in_a_file, over_a_folder])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    place = make(tmp_path)
    with pytest.raises(TapirError, match="cannot be written") as caught:
        write_text(place, "text")
    assert caught.value.where == str(place)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_that_the_block_cannot_make_is_of_writing(tmp_path: Path) -> None:
    with (
        pytest.raises(TapirError, match="cannot be written: No such file"),
        atomic_write(tmp_path / "adapter") as partial,
    ):
        (partial / "weights").write_bytes(b"1")  # the folder itself was forgotten


def test_rows_come_back_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    rows = [Completion("a", "ü\n", "stop", 3), Completion("b", "", "length", 0)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(Completion, tmp_path / "rows.jsonl") == rows
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"id": "c"\n')
    with pytest.raises(TapirError, match="not a Completion") as error:
        read_rows(Completion, tmp_path / "rows.jsonl")
    assert "line 3" in str(error.value)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b"])
def test_a_runs_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(TapirError, match="not a run's name"):
        RunDir(tmp_path, name)


def test_an_unknown_run_names_those_there_are(tmp_path: Path) -> None:
    write_text(RunDir(tmp_path, "mine").path / "recipe.yaml", "")
    with pytest.raises(TapirError, match="no run 'yours'") as error:
        existing(tmp_path, "yours")
    assert "mine" in str(error.value)


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "mine")
    code = (
        "import sys\nfrom pathlib import Path\nfrom tapir_local.files import RunDir, held\n"
        "from tapir_local.errors import TapirError\n"
        "try:\n    with held(RunDir(Path(sys.argv[1]), 'mine')): print('held')\n"
        "except TapirError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with held(run):
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"being worked on by process {os.getpid()}" in out
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "held\n"
