"""A command never writes over what it reads, under whatever name, and asks before it writes over anything else."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.export.gated_export import ExportConfig, export_with_gate
from tapir_local.files import check_output

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
    """The prompts lie where the answers of a cut run would."""
    odd = prompts.rename(prompts.with_name("out.jsonl.partial"))
    found = CliRunner().invoke(cli, ["generate", str(llama.gguf), str(odd), "-o", str(odd.with_name("out.jsonl"))])
    assert "written beside the output" in str(found.exception)
    assert odd.read_text() == '{"instruction": "Hi"}\n'


def test_answers_that_are_there_are_kept_unless_force_is_given(llama, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ["generate", str(llama.gguf), str(prompts), "-o", str(out), "--max-tokens", "2"]
    out.write_text("mine")
    found = CliRunner().invoke(cli, words)
    assert "there already" in str(found.exception)
    assert "--force" in str(found.exception)
    assert out.read_text() == "mine"
    CliRunner().invoke(cli, [*words, "--force"], catch_exceptions=False)
    assert '"id"' in out.read_text()


def test_export_writes_over_no_folder_that_it_reads(llama, tmp_path: Path) -> None:
    """Its folder of logs would be the model's own, which is deleted at the end."""
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
    with pytest.raises(TapirError, match="there already"):
        check_output(tmp_path / "out", [])
    with pytest.raises(TapirError, match="reads"):
        check_output(tmp_path / "out", [tmp_path / "gone"])


def test_a_folder_that_holds_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="reads"):
        check_output(tmp_path / "a", [tmp_path / "a" / "b" / "c"])
    check_output(tmp_path / "a" / "b" / "new", [tmp_path / "a" / "b"])
