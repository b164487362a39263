"""Files written row by row: complete or absent, and an interrupted one resumes from its last complete line."""

import io
from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.files import read_rows
from tapir_local.records import Scored, to_json
from tapir_local.resumable import OrderedWriter, append_row, remove_partial, resume_writing

ROWS = [Scored(str(n), -float(n), n) for n in range(10)]
TASK = {"task": 1, "path": Path("x")}


def write(path: Path, until: int | None = None, task: dict[str, object] = TASK) -> int:
    """Write the missing rows, interrupted before row `until`; return how many rows existed."""
    with resume_writing(path, task, Scored) as (file, done):
        for row in ROWS[len(done) :]:
            if row.id == str(until):
                raise KeyboardInterrupt
            append_row(file, row)
            file.flush()
    return len(done)


def cut(path: Path, until: int) -> Path:
    with pytest.raises(KeyboardInterrupt):
        write(path, until)
    assert not path.exists()
    return path.with_name(path.name + ".partial")


def test_a_cut_file_goes_on_and_ends_as_an_uncut_one(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    cut(tmp_path / "a", 4)
    cut(tmp_path / "a", 7)
    assert write(tmp_path / "a") == 7
    assert (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()
    assert read_rows(Scored, tmp_path / "a") == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "whole"]


@pytest.mark.parametrize(
    "tail", ['{"id":"torn', '{"id":"torn","logprob":1,"tokens":1}', "\0" * 50 + "\n", "not JSON\n{}\n"]
)
def test_a_torn_or_damaged_line_is_taken_off_with_all_after_it(tail: str, tmp_path: Path) -> None:
    partial = cut(tmp_path / "a", 6)
    partial.write_text(
        "".join(to_json(row) + "\n" for row in ROWS[:5]) + tail + ("\n" + to_json(ROWS[5]) + "\n") * ("\n" in tail)
    )
    assert write(tmp_path / "a") == 5
    assert read_rows(Scored, tmp_path / "a") == ROWS


def test_another_task_starts_from_nothing(tmp_path: Path) -> None:
    cut(tmp_path / "a", 6)
    assert write(tmp_path / "a", task={"task": 2}) == 0
    cut(tmp_path / "b", 6).with_name("b.partial.json").write_text("{")
    assert write(tmp_path / "b") == 0


def test_what_is_forgotten_is_begun_again(tmp_path: Path) -> None:
    cut(tmp_path / "a", 6)
    remove_partial(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    assert write(tmp_path / "a") == 0


def test_only_errors_of_the_file_itself_are_called_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), resume_writing(tmp_path / "a", TASK, Scored):
        (tmp_path / "none").read_text()
    full = OSError(28, "No space left on device")
    with pytest.raises(TapirError, match="No space left"), resume_writing(tmp_path / "a", TASK, Scored):
        raise full


def test_rows_done_early_wait_for_their_turn() -> None:
    out = io.StringIO()
    ordered = OrderedWriter[Scored](out, ["a", "b", "c"])
    for id, lines in (("c", 0), ("a", 1), ("b", 3)):
        ordered.add(Scored(id, 0.0, 1))
        assert out.getvalue().count("\n") == lines
