"""tapir.lock: the lines of other steps are copied as they are, in the order of the run."""

from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import LOCK_FILE, LockedCall, lock_calls, read_lock, unlock_steps


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path, "locked")
    for step in ("prepare/label", "prepare/untrained-judge", "round-01/judge", "round-100/judge"):
        lock_calls(made, step, calls_of(step))
    return made


def calls_of(step: str, word: str = "row", count: int = 2) -> list[LockedCall]:
    return [LockedCall(step, f'{word} "{n}" ä', f"{n}" * 64) for n in range(count)]


def test_a_repeated_step_replaces_its_lines_and_goes_back_to_its_group(run: RunDir) -> None:
    lock_calls(run, "prepare/untrained-judge", calls_of("prepare/untrained-judge", "again", 3))
    lock_calls(run, "round-01/judge", calls_of("round-01/judge", "more", 1))
    steps = ["prepare/label"] * 2 + ["prepare/untrained-judge"] * 3 + ["round-01/judge"] + ["round-100/judge"] * 2
    found = read_lock(run)
    assert [line.step for line in found] == steps
    assert [line.row.split()[0] for line in found] == ["row"] * 2 + ["again"] * 3 + ["more"] + ["row"] * 2


def test_steps_that_are_undone_leave_the_others_as_they_are(run: RunDir) -> None:
    path = run.path / LOCK_FILE
    kept = path.read_bytes().splitlines()[4:]
    unlock_steps(run, {"prepare/label", "prepare/untrained-judge"})
    assert path.read_bytes().splitlines() == kept


def test_a_last_line_without_its_end_is_read_and_a_cut_one_is_an_error(run: RunDir) -> None:
    path = run.path / LOCK_FILE
    before, whole = read_lock(run), path.read_bytes()
    path.write_bytes(whole.rstrip(b"\n"))
    lock_calls(run, "round-101/judge", calls_of("round-101/judge"))
    assert read_lock(run) == [*before, *calls_of("round-101/judge")]
    path.write_bytes(whole[:-20])
    with pytest.raises(TapirError, match="not a LockedCall"):
        lock_calls(run, "round-101/judge", calls_of("round-101/judge"))
    assert path.read_bytes() == whole[:-20]
