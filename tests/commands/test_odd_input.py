"""Damaged files, names that no file can have, bytes that are not UTF-8 and a closed output end in one error."""

import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from command_line import ROOT, refused

from tapir_local.errors import TapirError
from tapir_local.report.status import list_run_states
from tapir_local.resources import find_recipe
from tapir_local.run_dir import RunDir, run_of_name
from tapir_local.talk.conversation import Chat, ChatModel
from tapir_local.terminal.options import cache_argument


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with a run `x` that has only begun."""
    (tmp_path / "runs" / "x" / "round-00").mkdir(parents=True)
    shutil.copy(find_recipe("quickstart"), tmp_path / "runs" / "x" / "recipe.yaml")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "raw", "said"),
    [
        ("run.json", b"", "run.json: the file is empty"),
        ("run.json", b"[1]", "run.json: the file is not a JSON object"),
        (
            "round-00/metrics.json",
            b"",
            "the file is empty\n  Make it again: tapir-local redo x --round 0 --from evaluate",
        ),
        ("round-00/metrics.json", b'{"rows": ', "the file is not a JSON object"),
        ("recipe.yaml", b"name: caf\xe9\n", "recipe.yaml, line 1: not UTF-8: byte 0xe9"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(cache: Path, file: str, raw: bytes, said: str) -> None:
    (cache / "runs" / "x" / file).write_bytes(raw)
    assert said in refused("status", "x", "--cache", str(cache))


def test_a_damaged_run_does_not_hide_the_others(cache: Path) -> None:
    (cache / "runs" / "x" / "run.json").write_bytes(b"")
    (row,) = list_run_states(cache)
    assert row["state"] == "unreadable: run.json: the file is empty"


def test_a_name_that_no_folder_can_have_is_refused(cache: Path) -> None:
    assert "is not a valid run name" in refused("status", "a" * 300, "--cache", str(cache))
    assert "is not a valid run name" in refused("distill", "--name", "a" * 300, "--cache", str(cache))
    assert run_of_name(cache, "a" * 300) is None


@pytest.mark.parametrize("words", [["distill"], ["status"]])
def test_a_cache_whose_path_is_not_utf_8_is_refused_before_anything_is_paid(tmp_path: Path, words: list[str]) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    assert "the path is not UTF-8" in refused(*words, "--cache", str(folder))
    assert list(folder.iterdir()) == []
    with pytest.raises(TapirError, match="not UTF-8"):
        RunDir(folder, "x")


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        (">/dev/full", 1, "error: output: No space left on device\n"),
        ("| head -c 1 >/dev/null", 0, ""),
    ],
)
def test_an_output_that_cannot_be_written_is_no_traceback(cache: Path, redirect: str, code: int, said: str) -> None:
    command = f"'{sys.executable}' '{ROOT / 'cli.py'}' status x --cache '{cache}' {redirect}"
    out = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (out.returncode, out.stderr) == (code, said)


class Echo:
    """A model that repeats the question."""

    def answer(self, text: str, temperature: float) -> Generator[str, None, None]:
        ChatModel.check_text(text)
        yield text


def test_a_question_that_is_not_utf_8_does_not_end_the_chat() -> None:
    lines, said = iter(["caf\udce9", "hello", None]), list[str]()
    Chat([Echo()], 0.0, said.append).loop(lambda: next(lines))  # type: ignore[list-item]
    assert "the question is not UTF-8" in "".join(said)
    assert "hello" in said


def test_bytes_on_standard_input_are_read_as_lines() -> None:
    code = (
        "from tapir_local.commands.talk import LineReader, accept_any_bytes\n"
        "accept_any_bytes()\n"
        "read = LineReader()\nprint(ascii([read() for _ in range(3)]))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    out = subprocess.run([sys.executable, "-c", code], input=b"a\ncaf\xe9\n", capture_output=True, env=env, check=True)
    assert out.stdout == b"['a', 'caf\\udce9', None]\n"


def test_advice_quotes_the_cache() -> None:
    assert cache_argument(Path("/a b/it's")) == """ --cache '/a b/it'"'"'s'"""
    assert cache_argument(Path("/plain")) == " --cache /plain"
