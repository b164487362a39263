"""Unusable rows are kept with their reasons, counted, and refused if there are too many."""

from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.run_dir import RunDir
from tapir_local.stages.run_rows import trim_reply
from tapir_local.unusable import (
    Unusable,
    format_left_out,
    read_unusable,
    record_unusable,
    refuse_too_many,
    remove_unusable,
)


def rows(count: int, kind: str = "refused by the server", step: str = "prepare/seeds") -> list[Unusable]:
    return [Unusable(step, f"seed-{number:05d}", kind, "too long", "What?") for number in range(count)]


def test_a_step_that_is_repeated_replaces_its_rows(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "r")
    record_unusable(run, "prepare/read", rows(1, step="prepare/read"))
    record_unusable(run, "prepare/seeds", rows(3))
    record_unusable(run, "prepare/seeds", rows(2))
    assert [row.step for row in read_unusable(run)] == ["prepare/read", "prepare/seeds", "prepare/seeds"]
    remove_unusable(run, {"prepare/seeds"})
    assert [row.step for row in read_unusable(run)] == ["prepare/read"]


def test_no_file_is_written_where_nothing_was_left_out(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "r")
    record_unusable(run, "prepare/seeds", [])
    assert not (run.path / "unusable.jsonl").exists()


def test_the_share_that_the_limit_names_is_still_allowed() -> None:
    refuse_too_many(rows(5), 100, 0.05, "r")
    with pytest.raises(TapirError) as caught:
        refuse_too_many([*rows(5), *rows(1, "empty reply")], 100, 0.05, "r")
    said = str(caught.value)
    assert "6 of 100 rows (6%) cannot be used: 5 refused by the server, 1 empty reply" in said
    assert said.count("refused by the server: too long") == 1  # a reason may be two lines of advice
    assert "The first: seed-00000, seed-00001, seed-00002, seed-00003 and seed-00004 (refused by" in said
    assert "--set limits.unusable=0.06" in said


def test_where_most_rows_are_unusable_nobody_is_told_to_allow_it() -> None:
    with pytest.raises(TapirError) as caught:
        refuse_too_many(rows(8), 8, 0.05, "r")
    assert "8 of 8 rows (100%)" in str(caught.value)
    assert "--set" not in str(caught.value)


def test_a_closing_line_counts_them() -> None:
    assert format_left_out([]) == ""
    assert "; " not in format_left_out(rows(2))  # which would begin a remark of its own, in another line
    assert format_left_out(rows(2)) == ", 2 left out (2 refused by the server, see unusable.jsonl)"


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        ("\n\n    return x\n", "    return x"),
        ("\tx = 1\n\ty = 2", "\tx = 1\n\ty = 2"),
        (" Sure.", "Sure."),
        (" \n\n", ""),
    ],
)
def test_a_reply_keeps_the_indentation_of_its_first_line(reply: str, kept: str) -> None:
    assert trim_reply(reply) == kept
