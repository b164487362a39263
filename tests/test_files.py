"""Writes are atomic, and a command never overwrites its inputs, nor another file without --force."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.export.gated_export import ExportConfig, export_with_gate
from tapir_local.files import atomic_write, check_output, read_rows, write_rows, write_text
from tapir_local.records import Completion

WAYS: dict[str, Callable[[Path, Path], Path]] = {
    "itself": lambda source, folder: source,
    "a symbolic link": lambda source, folder: linked(folder / "link", lambda path: path.symlink_to(source)),
    "a hard link": lambda source, folder: linked(folder / "hard", lambda path: path.hardlink_to(source)),
    "a link to its folder": lambda source, folder: (
        linked(folder / "around", lambda path: path.symlink_to(source.parent)) / source.name
    ),
    "a roundabout spelling": lambda source, folder: source.parent / ".." / source.parent.name / "." / source.name,
    "a relative path": lambda source, folder: Path(os.path.relpath(source)),
}


def linked(path: Path, make: Callable[[Path], None]) -> Path:
    make(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "asked.jsonl"
    path.parent.mkdir()
    path.write_text('{"instruction": "Hi"}\n')
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_generate_writes_over_nothing_that_it_reads(
    llama, prompts: Path, tmp_path: Path, way: str, force: list[str]
) -> None:
    schema = tmp_path / "data" / "schema.json"
    schema.write_text("{}")
    for number, source in enumerate((prompts, schema)):
        folder = tmp_path / str(number)
        folder.mkdir()
        before = source.read_bytes()
        words = [
            str(llama.gguf),
            str(prompts),
            "--json-schema",
            str(schema),
            "-o",
            str(WAYS[way](source, folder)),
            *force,
        ]
        found = CliRunner().invoke(cli, ["generate", *words])
        assert isinstance(found.exception, TapirError)
        assert "is a file that the command reads" in found.exception.what
        assert source.read_bytes() == before
        assert sorted(path.name for path in prompts.parent.iterdir()) == ["asked.jsonl", "schema.json"]


def test_generate_does_not_take_its_input_for_the_rest_of_a_cut_run(llama, prompts: Path) -> None:
    """The prompts are where the answers of an interrupted run would be."""
    odd = prompts.rename(prompts.with_name("out.jsonl.partial"))
    found = CliRunner().invoke(cli, ["generate", str(llama.gguf), str(odd), "-o", str(odd.with_name("out.jsonl"))])
    assert "written beside the output" in str(found.exception)
    assert odd.read_text() == '{"instruction": "Hi"}\n'


def test_answers_that_are_there_are_kept_unless_force_is_given(llama, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ["generate", str(llama.gguf), str(prompts), "-o", str(out), "--max-tokens", "2"]
    out.write_text("mine")
    found = CliRunner().invoke(cli, words)
    assert "exists already" in str(found.exception)
    assert "--force" in str(found.exception)
    assert out.read_text() == "mine"
    CliRunner().invoke(cli, [*words, "--force"], catch_exceptions=False)
    assert '"id"' in out.read_text()


def test_export_writes_over_no_folder_that_it_reads(llama, tmp_path: Path) -> None:
    """The folder for its logs would be the model's own folder, which is deleted at the end."""
    model = tmp_path / "out.gguf.work"
    model.symlink_to(llama.model)
    with pytest.raises(TapirError, match=r"out.gguf.work, which is written beside the output, is a file that"):
        export_with_gate(str(llama.model), tmp_path / "out.gguf", ExportConfig("f32", check=False))
    with pytest.raises(TapirError, match="is a file that the command reads"):
        export_with_gate(str(llama.model), llama.model, ExportConfig("f32", check=False))
    assert (llama.model / "config.json").exists()


@pytest.mark.parametrize("end", ["", "-wal", "-shm"])
def test_calls_export_writes_over_no_file_of_the_store(tmp_path: Path, end: str) -> None:
    (tmp_path / "cache").mkdir()
    store = tmp_path / "cache" / "teacher.db"
    store.write_bytes(b"")
    words = ["calls", "export", str(tmp_path / "cache" / f"teacher.db{end}"), "--cache", str(tmp_path / "cache")]
    assert "is a file that the command reads" in str(CliRunner().invoke(cli, words).exception)
    assert store.read_bytes() == b""


def test_a_link_to_nothing_is_there(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(TapirError, match="exists already"):
        check_output(tmp_path / "out", [])
    with pytest.raises(TapirError, match="reads"):
        check_output(tmp_path / "out", [tmp_path / "gone"])


def test_a_folder_that_holds_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="reads"):
        check_output(tmp_path / "a", [tmp_path / "a" / "b" / "c"])
    check_output(tmp_path / "a" / "b" / "new", [tmp_path / "a" / "b"])


# Atomic writes


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
    """A limit on the file size replaces a full disk: both cause an OSError in write."""
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
    """A path whose parent is a file."""
    (place / "file").write_text("")
    return place / "file" / "out.json"


def over_a_folder(place: Path) -> Path:
    """A path that is a folder with files."""
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
        (partial / "weights").write_bytes(b"1")  # the folder was not created


def test_rows_come_back_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    rows = [Completion("a", "ü\n", "stop", 3), Completion("b", "", "length", 0)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(Completion, tmp_path / "rows.jsonl") == rows
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"id": "c"\n')
    with pytest.raises(TapirError, match="not a Completion") as error:
        read_rows(Completion, tmp_path / "rows.jsonl")
    assert "line 3" in str(error.value)
