"""Every table at 60, 80, 100 and 140 columns: no line too long, no number or name cut, no column of single letters."""

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fakes import QUIET, World, fake_backends, make_recipe
from rich.console import Console
from rich.text import Text

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.pipeline.dry_run import CostEstimate
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.settings import setting_rows
from tapir_local.recipe.text import override
from tapir_local.report.compare import compare_runs
from tapir_local.report.compare_tables import comparison_tables
from tapir_local.report.costs import cost_estimate_table, cost_table
from tapir_local.report.labels import label_report, label_tables
from tapir_local.report.status import round_report, run_status, unusable_report
from tapir_local.report.status_tables import (
    by_task_table,
    round_tables,
    rounds_caption,
    rounds_table,
    stages_table,
    unusable_tables,
)
from tapir_local.report.tables import text_table
from tapir_local.report.what_if import plan_with_changes, what_if_tables
from tapir_local.report.why import explain_row, why_tables
from tapir_local.run_dir import RunDir
from tapir_local.tables import LEAST_TEXT_WIDTH, PlainTable, least_column_width

WIDTHS = (60, 80, 100, 140)
LONG = "a-run-with-a-rather-long-name"
SPENT = {
    "paid": 31_204, "from_store": 12_880, "failed": 44, "tokens_in": 11_848_000, "tokens_out": 1_579_000,
    "money": 1_234.56, "saved": 1_100.25, "unpriced": 3, "unpriced_hits": 0, "estimated": 2,
}  # fmt: skip
ESTIMATE = CostEstimate("round-03/holdout-answer", 31_204, None, 11_848_000, 1_579_000, 1_234.56, False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """Two finished runs with the same seeds."""
    folder = tmp_path_factory.mktemp("runs")
    found = [RunDir(folder / "cache", name) for name in ("short", LONG)]
    for run in found:
        distill(override(make_recipe(folder), {"name": run.name}), run, fake_backends(World()), QUIET)
    return found


def all_tables(runs: Sequence[RunDir]) -> dict[str, list[Any]]:
    """The tables of every command."""
    run = runs[1]
    status = run_status(run)
    settings = [[row.setting, row.type, row.default_text, row.meaning] for row in setting_rows()]
    return {
        "status": [stages_table(status), rounds_table(status)],
        "show": round_tables(round_report(run, 1)),
        "labels": label_tables(label_report(run)),
        "unusable": unusable_tables(unusable_report(run)),
        "why": why_tables(explain_row(run, "seed-00001")),
        "plan": what_if_tables(plan_with_changes(run, 1, ["curriculum.rows=30"])),
        "compare": comparison_tables(compare_runs(runs, by_task=True)),
        "costs": [cost_table("costs", [{"stage": "holdout-answer", **SPENT}], "stage")],
        "dry run": [cost_estimate_table([ESTIMATE], run.name)],
        "settings": [
            text_table(
                "settings", ["setting", "type", "default", "meaning"], settings, whole=["setting"], ranks={"type": 1}
            )
        ],
    }


def shown(table: Any, width: int) -> str:
    """What a terminal of this width shows."""
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_table_fits_and_cuts_nothing(runs: list[RunDir], width: int) -> None:
    for name, tables in all_tables(runs).items():
        for table in tables:
            text = shown(table, width)
            assert max(map(len, text.splitlines())) <= width, name
            if not isinstance(table, Text):
                check_columns(table, text, width, name)


def check_columns(table: PlainTable, text: str, width: int, name: str) -> None:
    """Columns that may not be left out are there, unwrapped ones whole, and no word of a wrapped one is broken."""
    kept, left_out = table.fitted(width)
    assert sum(map(least_column_width, kept.columns)) + 2 * (len(kept.columns) - 1) <= width, name
    needed = [str(column.header) for column, rank in zip(table.columns, table.ranks, strict=True) if not rank]
    assert not {" ".join(header.split()) for header in needed} & set(left_out)
    for column in kept.columns:
        for cell in map(str, column.cells):
            whole = cell.splitlines() if column.no_wrap else [w for w in cell.split() if len(w) <= LEAST_TEXT_WIDTH]
            assert [piece for piece in whole if piece not in text] == [], (name, column.header)
    assert all(header in text for header in left_out), name


def test_money_is_never_left_out_of_costs() -> None:
    for width in WIDTHS:
        text = shown(cost_table("costs", [{"stage": "holdout-judge", **SPENT}], "stage"), width)
        assert "1,234.56 + ?" in text
        assert "1,100.25" in text
        assert "Not in the sums: 3 calls without a known price" in " ".join(text.split())
        text = shown(cost_estimate_table([ESTIMATE], "x"), width)
        assert text.count("1,234.56") == 2
        assert "round-03/holdout-answer" in text


def test_a_narrow_terminal_names_the_columns_that_it_leaves_out() -> None:
    table = cost_table("costs", [{"stage": "holdout-judge", **SPENT}], "stage")
    assert "Not shown at this width: " in shown(table, 60)
    assert "Not shown" not in shown(table, 140)


def test_the_columns_of_a_printed_table_are_still_there_at_another_width() -> None:
    table = cost_table("costs", [{"stage": "judge", **SPENT}], "stage")
    shown(table, 60)
    assert "tokens" in shown(table, 140)


def test_calls_that_may_be_free_are_not_called_paid(runs: list[RunDir]) -> None:
    for table in (*all_tables(runs)["status"], *all_tables(runs)["costs"]):
        assert "asked" in shown(table, 140)
        assert "paid" not in shown(table, 140)


def test_a_missing_accuracy_has_its_reason(runs: list[RunDir]) -> None:
    status = run_status(runs[0])
    checked = status["rounds"][-1]["metrics"]["accuracy"] is not None
    for row in status["rounds"]:
        row["metrics"]["accuracy"] = None
    assert "Accuracy needs a checker" in rounds_caption(status)
    assert ("Accuracy needs a checker" in rounds_caption(run_status(runs[0]))) != checked


# show


def called(run: RunDir, *words: str) -> str:
    return CliRunner().invoke(cli, ["show", run.name, *words, "--cache", str(run.cache)], catch_exceptions=False).stdout


def test_show_says_which_tasks_rose_or_fell(runs: list[RunDir]) -> None:
    assert [round_report(runs[0], number)["before"]["round"] for number in (0, 1, 2)] == [-1, 0, 1]
    metrics = {"win_rate": 0.5, "student_score": 5.0, "by_task": {"Art": {"rows": 14, "accuracy": 0.0714}}}
    before = {"round": -1, "by_task": {"Art": {"rows": 14, "accuracy": 0.2143}}}
    text = shown(by_task_table("x", metrics, before), 80)
    assert "-14.3" in text
    assert "Change: accuracy less that of the untrained student in points" in text
    unchecked = {**metrics, "by_task": {"Art": {"rows": 14, "win_rate": 0.5}, "New": {"rows": 1, "win_rate": 1.0}}}
    text = shown(by_task_table("x", unchecked, {"round": 1, "by_task": {"Art": {"win_rate": 0.25}}}), 80)
    assert "+25.0" in text
    assert "Change: win rate less that of round 1" in text
    assert "Change" not in shown(by_task_table("x", metrics, None), 80)


def test_wrong_answers_of_a_task_are_listed(runs: list[RunDir]) -> None:
    found = json.loads(called(runs[0], "--round", "0", "--limit", "100", "--json"))
    wrong = json.loads(called(runs[0], "--round", "0", "--wrong", "--limit", "100", "--json"))
    lost = [row["id"] for row in found["answers"] if row["scores"][0] < row["scores"][1]]
    assert [row["id"] for row in wrong["answers"]] == lost != []
    assert (found["matching"], wrong["matching"]) == (10, len(lost))
    of_task = json.loads(called(runs[0], "--round", "0", "--wrong", "--task", "Art", "--limit", "1", "--json"))
    assert [row["task"] for row in of_task["answers"]] == ["Art"]
    text = called(runs[0], "--round", "0", "--wrong", "--limit", "1")
    assert f"1 of {len(lost)} answers; --limit shows more." in text
    assert "the judge" not in text
    with pytest.raises(TapirError, match="no held-out row has the task 'Maths'") as error:
        called(runs[0], "--task", "Maths")
    assert error.value.fix == "Tasks of the holdout: Art, Math."
    assert CliRunner().invoke(cli, ["show", "--labels", "--wrong"]).exit_code == 2


def test_a_round_without_answers_says_why_its_table_is_empty(runs: list[RunDir], tmp_path: Path) -> None:
    shutil.copytree(runs[0].cache, tmp_path / "cache")
    run = RunDir(tmp_path / "cache", runs[0].name)
    for name in ("holdout-answers.jsonl", "holdout-judgements.jsonl", "metrics.json"):
        (run.round(2) / name).unlink()
    assert "The student has not answered the holdout yet." in called(run, "--round", "2")
