"""Compare runs, on small folders with the real records: shared holdout, equal cost, tables."""

import io
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from command_line import refused
from rich.console import Console

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.files import remove_path, write_record, write_rows, write_text
from tapir_local.method.metrics import compute_metrics
from tapir_local.recipe.text import override, parse_recipe, to_yaml
from tapir_local.records import Completion, Example, Judgement, Message
from tapir_local.report.compare import (
    compare_rounds,
    compare_runs,
    fallen_sentence,
    round_verdict,
    setting_differences,
)
from tapir_local.report.compare_tables import comparison_tables, rounds_of_run_table
from tapir_local.report.run_results import read_run_results
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import LockedCall, lock_calls

RECIPE = "teacher: pocket\nchecker: pocket\nseeds: {holdout: 20}\n"
SCORES = {"1": 9.0, "=": 8.0, "0": 2.0}  # the teacher's answer has 8
ONE_AND_TWO = [("one", "11111100"), ("two", "11110011111111")]
SUMS = [Message("user", f"Add up these numbers: {n}, 1.") for n in range(20)]
HOLDOUT = [
    Example(f"seed-{n}", (sum,), str(n + 1), "Math" if n < 15 else "Reasoning", "file") for n, sum in enumerate(SUMS)
]


def made(
    cache: Path,
    name: str,
    *rounds: str,
    holdout: list[Example] = HOLDOUT,
    size: int = 10,
    judge: str = "the pocket teacher",
    judge_kind: str = "teacher",
    **changes: object,
) -> RunDir:
    """A run with evaluated rounds, each given by its answers: `1` right and better than the teacher's, `=` right and as
    good, `0` wrong and worse, `?` wrong and unjudged. Each round trains on `size` rows of 10 tokens and asks the
    teacher and the judge `size` times."""
    run = RunDir(cache, name)
    changed = {"name": name, "judge.kind": judge_kind, **changes}
    write_text(run.path / "recipe.yaml", to_yaml(override(parse_recipe(RECIPE, "r"), changed)))
    write_rows(run.path / "holdout.jsonl", holdout)
    for number, answers in enumerate(rounds):
        add_round(run, number, answers.ljust(len(holdout), "0"), holdout, size, judge)
    return run


def add_round(run: RunDir, number: int, answers: str, holdout: list[Example], size: int, judge: str) -> None:
    folder = run.round(number)
    told = list(zip(holdout, answers, strict=True))
    write_rows(folder / "train.jsonl", [Example(f"r{n}", (Message("user", "x"),), "y") for n in range(size)])
    log = [{"step": 1, "tokens": 4}, {"step": 2, "tokens": 10 * size}, {"seconds": 1.5, "peak_memory": 7}]
    write_text(folder / "adapter" / "train_log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    texts = [Completion(row.id, row.completion if it in "1=" else "-", "stop", 1) for row, it in told]
    write_rows(folder / "holdout-answers.jsonl", texts)
    judged = [Judgement(row.id, 8.0 if it in SCORES else None, SCORES.get(it)) for row, it in told]
    write_rows(folder / "holdout-judgements.jsonl", judged)
    asked = {"expand": size, "judge": size, "holdout-judge": 3}
    for stage, count in asked.items():
        step = f"round-{number:02d}/{stage}"
        lock_calls(run, step, [LockedCall(step, f"r{n}", "0" * 64) for n in range(count)])
    right = {row.id: it in "1=" for row, it in told}
    write_record(folder / "metrics.json", compute_metrics(number, holdout, texts, judged, right, judge))


def told(found: dict, run: str, metric: str = "accuracy") -> dict:
    return next(row for row in found["compared"] if (row["run"], row["metric"]) == (run, metric))


def fault(*runs: RunDir, **options: object) -> str:
    with pytest.raises(TapirError) as caught:
        compare_runs(runs, **options)
    return str(caught.value)


def test_eight_against_two(tmp_path: Path) -> None:
    """The second run is right on 8 rows where the first is wrong, and wrong on 2 where it is right."""
    one, two = made(tmp_path, "one", "11111100"), made(tmp_path, "two", "11110011111111")
    found = compare_runs([one, two])
    gap = told(found, "two")["difference"]
    assert (told(found, "one")["mean"], told(found, "two")["mean"]) == (0.3, 0.6)
    assert (gap["better"], gap["worse"], gap["rows"]) == (8, 2, 20)
    assert gap["p"] == gap["p_holm"] == pytest.approx(0.109375)
    assert gap["low"] < 0.3 < gap["high"]
    assert gap["mean"] == pytest.approx(0.3)
    assert told(found, "one")["difference"] is None


def test_a_run_and_its_copy_differ_by_nothing(tmp_path: Path) -> None:
    runs = [made(tmp_path, name, "110", "1=1") for name in ("one", "two")]
    for metric in ("accuracy", "win_rate"):
        gap = told(compare_runs(runs), "two", metric)["difference"]
        assert (gap["mean"], gap["low"], gap["high"], gap["p"]) == (0, 0, 0, 1)


def test_the_intervals_of_a_round_are_those_of_status(tmp_path: Path) -> None:
    """Wilson's interval of 10 of 20 is 0.299 to 0.701."""
    found = compare_runs([made(tmp_path, "one", "1" * 10), made(tmp_path, "two", "")])
    assert found["rounds"][0]["accuracy"]["interval"] == pytest.approx((0.299, 0.701), abs=1e-3)
    assert found["rounds"][1]["accuracy"]["mean"] == 0


def test_wins_ties_and_unjudged_rows(tmp_path: Path) -> None:
    one, two = made(tmp_path, "one", "1=00" * 5), made(tmp_path, "two", "1=?0" + "1=00" * 4)
    found = compare_runs([one, two])
    assert told(found, "one", "win_rate")["mean"] == 7.5 / 20
    assert told(found, "two", "win_rate")["rows"] == told(found, "two", "win_rate")["difference"]["rows"] == 19
    assert found["notes"] == ["two: 1 row is not judged in round 0 and left out of win rates."]


def test_without_a_judge_likeness_is_compared_and_no_win_rate(tmp_path: Path) -> None:
    runs = [made(tmp_path, name, answers, judge="likeness", judge_kind="reference") for name, answers in ONE_AND_TWO]
    found = compare_runs(runs)
    assert {row["metric"] for row in found["compared"]} == {"accuracy", "likeness"}
    assert found["rounds"][0]["win_rate"] is None
    scores = [9.0] * 6 + [2.0] * 14
    assert told(found, "one", "likeness")["mean"] == pytest.approx(fmean((score - 1) / 9 for score in scores))
    assert told(found, "two", "likeness")["difference"]["mean"] == pytest.approx(0.3 * 7 / 9)
    assert not any("not judged" in note for note in found["notes"])
    tables = comparison_tables(found)
    assert [str(column.header) for column in tables[0].columns][-2:] == ["accuracy", "likeness"]
    assert "Likeness of the student's answers" in str(tables[0].caption)
    assert "Win rate" not in str(tables[0].caption)


def test_several_runs_are_corrected_by_holm(tmp_path: Path) -> None:
    runs = [made(tmp_path, "one", "0"), made(tmp_path, "two", "1" * 10), made(tmp_path, "three", "1" * 6)]
    found = compare_runs(runs)
    gaps = [told(found, name)["difference"] for name in ("two", "three")]
    assert [gap["p"] for gap in gaps] == pytest.approx([2 / 2**10, 2 / 2**6])
    assert [gap["p_holm"] for gap in gaps] == pytest.approx([4 / 2**10, 2 / 2**6])


def test_by_task(tmp_path: Path) -> None:
    found = compare_runs([made(tmp_path, "one", "0"), made(tmp_path, "two", "0" * 15 + "11111")], by_task=True)
    rows = [row for row in found["by_task"] if row["metric"] == "accuracy" and row["run"] == "two"]
    assert [(row["task"], row["rows"], row["mean"]) for row in rows] == [("Math", 15, 0), ("Reasoning", 5, 1)]
    assert rows[1]["difference"]["p_holm"] == pytest.approx(2 * 2 / 2**5)
    assert compare_runs([RunDir(tmp_path, "one"), RunDir(tmp_path, "two")])["by_task"] is None


def test_what_a_run_spent_by_the_end_of_each_round(tmp_path: Path) -> None:
    one = made(tmp_path, "one", "1", "11")
    for stage, count in {"label": 4, "holdout": 5, "seeds": 6}.items():
        lock_calls(one, f"prepare/{stage}", [LockedCall(f"prepare/{stage}", f"{n}", "0" * 64) for n in range(count)])
    names = ("rows", "tokens", "teacher_calls", "judge_calls", "evaluation_calls")
    found = compare_runs([one, made(tmp_path, "two", "1")])["rounds"]
    assert [tuple(row[name] for name in names) for row in found[:2]] == [(10, 100, 20, 10, 8), (20, 200, 30, 20, 11)]


def test_at_equal_tokens_the_last_round_within_the_lowest_cost_is_compared(tmp_path: Path) -> None:
    one, two = made(tmp_path, "one", "1", "11", "111"), made(tmp_path, "two", "1", "11", size=12)
    found = compare_runs([one, two], at="tokens")
    assert found["at"] == {"kind": "tokens", "budget": 240}
    assert (told(found, "one")["round"], told(found, "two")["round"]) == (1, 1)
    assert [row["round"] for row in found["rounds"] if row["chosen"]] == [1, 1]
    assert compare_runs([one, two], at="rows")["at"]["budget"] == 24
    assert compare_runs([one, two], at="calls")["at"]["budget"] == 48


def test_a_run_without_a_round_within_the_budget_is_compared_by_round_0_with_a_note(tmp_path: Path) -> None:
    found = compare_runs([made(tmp_path, "one", "1"), made(tmp_path, "two", "1", "11", size=30)], at="rows")
    assert told(found, "two")["round"] == 0
    assert found["notes"] == ["two has no round within 10 training rows: round 0 is compared, which cost 30."]


def test_a_round_by_number(tmp_path: Path) -> None:
    one, two = made(tmp_path, "one", "1", "11"), made(tmp_path, "two", "1")
    assert told(compare_runs([one, two], number=0), "one")["mean"] == 0.05
    assert told(compare_runs([one, two]), "one")["mean"] == 0.1
    assert "run 'two' has no evaluated round 1\n  Its evaluated rounds: 0." in fault(one, two, number=1)
    assert "cannot be used together" in fault(one, two, number=0, at="rows")


def test_different_holdouts_are_refused_with_the_differences(tmp_path: Path) -> None:
    one = made(tmp_path, "one", "1")
    seeds = made(tmp_path, "two", "1", holdout=HOLDOUT[:-3], random_seed=2)
    assert "different holdouts: 3 rows only in one\n" in fault(one, seeds)
    assert "random_seed (1 in one, 2 in two)" in fault(one, seeds)
    changed = [Example("seed-0", (SUMS[1],), "1", "Math"), Example("seed-1", (SUMS[1],), "two", "Math"), *HOLDOUT[2:]]
    said = fault(one, made(tmp_path, "three", "1", holdout=changed))
    assert "1 row with another instruction, 1 row with another answer of the teacher" in said
    assert "the same random_seed" in said


def test_the_pocket_teacher_is_one_judge_under_its_old_and_its_new_name(tmp_path: Path) -> None:
    old = made(tmp_path, "old", "1", judge="the pocket teacher (a programme)")
    new = made(tmp_path, "new", "1", judge="the pocket teacher (a program)")
    assert compare_runs([old, new])["holdout"]["judge"] == "the pocket teacher (a program)"


def test_different_judges_are_refused_by_name(tmp_path: Path) -> None:
    one, two = made(tmp_path, "one", "1"), made(tmp_path, "two", "1", judge="big-judge")
    said = fault(one, two)
    assert "different judges: judge ('the pocket teacher' in one, 'big-judge' in two)" in said
    assert "under another --name" in said
    warm = made(tmp_path, "warm", "1", **{"judge.temperature": 0.5})
    assert "judge.temperature (0.0 in one, 0.5 in warm)" in fault(one, warm)


def test_the_address_of_a_judge_does_not_matter(tmp_path: Path) -> None:
    judge = {"judge.kind": "openai", "judge.model": "m"}
    one = made(tmp_path, "one", "1", **judge, **{"judge.base_url": "http://here"})
    two = made(tmp_path, "two", "1", **judge, **{"judge.base_url": "http://there", "judge.alias": "far"})
    assert told(compare_runs([one, two]), "two")["difference"]["p"] == 1


def test_a_row_has_its_task_in_the_first_run(tmp_path: Path) -> None:
    relabelled = [replace(row, task="Art") for row in HOLDOUT]
    one, two = read_run_results([made(tmp_path, "one", "1"), made(tmp_path, "two", "1", holdout=relabelled)])
    assert two.holdout == one.holdout == tuple(HOLDOUT)


def test_a_curriculum_that_plans_by_the_holdout_pays_for_its_judgements_with_a_note(tmp_path: Path) -> None:
    one = made(tmp_path, "one", "1", "11")
    grown = made(tmp_path, "grown", "1", "11", "11", **{"curriculum.name": "growth"})
    found = compare_runs([one, grown])
    calls = [(row["judge_calls"], row["evaluation_calls"]) for row in found["rounds"][2:]]
    assert calls == [(10, 3), (23, 3), (36, 3)]
    assert found["notes"] == ["grown selects its training data by this holdout, so its rates here are optimistic."]


def test_one_checker_is_used_for_all_runs_and_without_one_there_is_no_accuracy(tmp_path: Path) -> None:
    one, two = made(tmp_path, "one", "1", checker=None), made(tmp_path, "two", "1")
    assert told(compare_runs([one, two]), "one")["mean"] == 0.05
    bare = compare_runs([one, made(tmp_path, "three", "1", checker=None)], by_task=True)
    assert {row["metric"] for row in bare["compared"]} == {"win_rate"}
    assert bare["rounds"][0]["accuracy"] is None
    text = shown(bare, 100)
    assert "win rate by task" in text
    assert "accuracy by task" not in text


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    one, empty = made(tmp_path, "one", "1"), made(tmp_path, "empty")
    assert "one run cannot be compared" in fault(one)
    assert "run 'one' is named twice" in fault(one, one)
    assert "run 'empty' has no evaluated round" in fault(one, empty)


def test_a_missing_or_wrong_file_names_the_stage_to_redo(tmp_path: Path) -> None:
    one, two = made(tmp_path, "one", "1"), made(tmp_path, "two", "1")
    write_rows(two.round(0) / "holdout-judgements.jsonl", [Judgement("seed-0", 8.0, 2.0)])
    assert "tapir-local redo two --round 0 --from holdout-judge" in fault(one, two)
    remove_path(two.round(0) / "holdout-answers.jsonl")
    assert "tapir-local redo two --round 0 --from holdout-answer" in fault(one, two)


def test_without_a_training_log_runs_cannot_be_compared_at_equal_tokens(tmp_path: Path) -> None:
    one, two = made(tmp_path, "one", "1"), made(tmp_path, "two", "1")
    remove_path(two.round(0) / "adapter")
    assert compare_runs([one, two])["rounds"][1]["tokens"] is None
    assert "run 'two' has no count of its training tokens" in fault(one, two, at="tokens")
    write_text(one.round(0) / "adapter" / "train_log.jsonl", "{")
    assert "not a log of training" in fault(one, two)


def shown(found: dict, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as printed:
        console.print(*comparison_tables(found), sep="\n")
    return printed.get()


def test_the_tables_are_readable_at_100_columns(tmp_path: Path) -> None:
    runs = [made(tmp_path, f"tapir-without-balance-{n}", "1" * 5, "1" * 4 * (n + 1)) for n in range(3)]
    text = shown(compare_runs(runs, by_task=True), 100)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert "  8/0  0.008   0.016\n" in text
    for words in ("25.0% (11 to 47)", "p Holm", "accuracy by task", "win rate by task", "McNemar, exact"):
        assert words in text


def tapir(cache: Path, *words: str) -> str:
    out = CliRunner().invoke(cli, ["compare", *words, "--cache", str(cache)])
    assert out.exit_code == 0, out.exception
    return out.stdout


def test_the_command_prints_tables_or_data(tmp_path: Path) -> None:
    for name, answers in (("one", "11111100"), ("two", "11110011111111")):
        made(tmp_path, name, answers)
    text = tapir(tmp_path, "one", "two", "--at", "tokens", "--by-task")
    assert "+30.0 (" in text
    assert "8/2" in text
    assert "0.109" in text
    found = json.loads(tapir(tmp_path, "one", "two", "--json", "--round", "0"))
    assert told(found, "two")["difference"]["p"] == pytest.approx(0.109375)


def test_the_command_prints_errors_without_a_traceback(tmp_path: Path) -> None:
    made(tmp_path, "one", "1")
    assert "Runs in this cache: one" in refused("compare", "one", "nope", "--cache", str(tmp_path))
    assert "Name two runs or more" in refused("compare", "one", "--cache", str(tmp_path))
    assert "Missing argument" in refused("compare", "--cache", str(tmp_path), code=2)


# The rounds of one run


def test_the_end_of_a_run_says_what_was_gained_and_where_the_best_round_is(tmp_path: Path) -> None:
    found = compare_rounds(made(tmp_path, "one", "1", "1" * 16, "1" * 15))
    assert (found["metric"], found["best"]) == ("accuracy", 1)
    assert [row["change"] and round(row["change"]["mean"], 6) for row in found["rounds"]] == [None, 0.75, -0.05]
    said = round_verdict(found)
    assert said.startswith("Round 2 is 70.0 points better than round 0 in accuracy (95 %: +50.0 to +90.0, p < 0.001).")
    assert "The best is round 1: round 2, which is in model/, is 5.0 points worse than it (95 %: -15.0 to +0.0" in said
    assert said.endswith("p = 1), which may be chance.")
    assert fallen_sentence(found) == ""


def test_a_run_that_got_worse_is_not_praised(tmp_path: Path) -> None:
    found = compare_rounds(made(tmp_path, "one", "1" * 12, "1" * 2))
    said = round_verdict(found)
    assert said.startswith("Round 1 is 50.0 points worse than round 0 in accuracy")
    assert "chance" not in said
    assert said.endswith("Round 0 is the best, but model/ has round 1.")
    assert fallen_sentence(found) == "Tasks that fell since round 0, in points: Math -67 (15 rows)."


def test_a_task_that_fell_by_chance_is_marked(tmp_path: Path) -> None:
    found = compare_rounds(made(tmp_path, "one", "1" * 16, "1" * 15))
    assert [row["task"] for row in found["fallen"]] == ["Reasoning"]
    assert fallen_sentence(found).endswith("Reasoning -20 (5 rows); each of these may be chance.")


def test_one_round_has_a_rate_and_no_change(tmp_path: Path) -> None:
    found = compare_rounds(made(tmp_path, "one", "1" * 10))
    assert round_verdict(found) == "Round 0: accuracy 50.0% (95 %: 30% to 70%)."
    assert compare_rounds(made(tmp_path, "same", "11", "11"))["gain"]["p"] == 1
    same = compare_rounds(RunDir(tmp_path, "same"))
    assert round_verdict(same) == "Round 1 is as good as round 0 in accuracy."
    assert same["best"] == 1  # the last of equally good rounds


def test_without_a_checker_the_win_rate_decides(tmp_path: Path) -> None:
    found = compare_rounds(made(tmp_path, "one", "1=", "1=1", checker=None))
    assert found["metric"] == "win_rate"
    assert "in win rate" in round_verdict(found)


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_table_of_rounds_keeps_rates_changes_and_marks(tmp_path: Path, width: int) -> None:
    run = made(tmp_path, "one", "1", "1" * 16, "1" * 15)
    out = io.StringIO()
    Console(file=out, width=width).print(rounds_of_run_table(compare_rounds(run)))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    (second,) = [line for line in lines if line.strip().startswith("*1  ")]
    assert "80.0% (58 to 92)" in second
    assert "+75.0 (+55.0 to +90.0)" in second
    assert "chance?" in lines[6]
    assert "*: the best; model/" in out.getvalue()


def test_of_many_settings_that_differ_three_are_named() -> None:
    runs = [SimpleNamespace(name=name) for name in ("a", "b")]
    for count in (3, 14):
        found = setting_differences(*runs, lambda run, n=count: {f"s{at:02}": run.name for at in range(n)})
        assert found[:3] == [f"s{at:02} ('a' in a, 'b' in b)" for at in range(3)]
        assert found[3:] == (["11 more"] if count == 14 else [])
