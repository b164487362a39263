"""The on-policy bench: its budget of tokens, the problems of its teacher, its table and its refusals; no training."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tapir_local.pocket.world import check_answer, parse_problem
from tapir_local.records import Example, Message, instruction_of

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("on_policy", BENCH / "on_policy.py")
    made = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(made)  # it adds bench/ and the checkout to the path
    finally:
        sys.path[:] = before
    return made


def spend(bench, total: int, answers: list[list[int]], warm_up: int = 0) -> tuple[int, list[float]]:
    """The tokens of a training whose steps have these micro-batches, and its learning rates."""
    budget = sys.modules[bench.train_on_policy.__module__].TokenBudget(total, warm_up)
    rates = []
    for step, micro_batches in enumerate(answers):
        rates.append(budget.rate(step))
        for tokens in micro_batches:
            budget.add(tokens)
        budget.end_step()
        if budget.is_spent:
            return budget.spent, rates
    raise AssertionError(f"{budget.spent} of {total} tokens are spent, and the training has not ended")


def test_a_training_ends_at_the_step_nearest_to_its_tokens(bench) -> None:
    assert spend(bench, 1000, [[100, 50]] * 20)[0] == 1050  # seven steps; six would be 100 short
    assert spend(bench, 1040, [[300]] * 20)[0] == 900  # 140 short; one more would be 160 too many
    assert spend(bench, 100, [[900]])[0] == 900  # one step at least


def test_the_rate_warms_up_over_steps_and_falls_with_the_tokens(bench) -> None:
    tokens, rates = spend(bench, 1000, [[400], [100], [100], [100], [100], [100], [100]], warm_up=2)
    assert tokens == 1000
    assert rates[:3] == pytest.approx([0.5, 0.6545, 0.5], abs=1e-4)  # (1 + cos(0.4 pi)) / 2, (1 + cos(0.5 pi)) / 2
    assert rates == [rates[0], *sorted(rates[1:], reverse=True)]


def test_only_labelled_tokens_count(bench) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [5, 9], "labels": [-100, 9]}]
    assert bench.answer_tokens(rows) == 3


def test_the_teacher_learns_exact_answers_to_problems_that_are_not_seeds(bench) -> None:
    asked = ("What is 31 + 46?", "Which number comes next: 2, 4, 6, 8?", "Add 17 and 58.")
    seeds = [Example(f"seed-{n}", (Message("user", text),)) for n, text in enumerate(asked) if parse_problem(text)]
    assert seeds
    avoided = {bench.problem_key(row) for row in seeds}
    rows = bench.draw_teacher_rows(seeds, avoided, 30)
    keys = [bench.problem_key(row) for row in rows]
    assert len(set(keys)) == len(rows) == 30
    assert not avoided & set(keys)
    assert all(check_answer(instruction_of(row.prompt), row.completion) for row in rows)
    assert rows == bench.draw_teacher_rows(seeds, avoided, 30)
    assert not {bench.problem_key(row) for row in bench.draw_teacher_rows(seeds, set(keys), 10)} & set(keys)


def write_results(bench, folder: Path) -> None:
    """Two random seeds of three arms, and a third of which only one arm is finished."""
    right = {"untrained": (1, 0), "sft": (2, 3), "on-policy": (3, 3)}
    for seed in (1, 2):
        bench.write_record(folder / f"seed-{seed}" / "written.json", bench.Written(20, 18, 450, 3.25))
        for arm, counts in right.items():
            values = {f"row-{n}": float(n < counts[seed - 1]) for n in range(4)}
            trained = bench.Trained() if arm == "untrained" else bench.Trained(900 + seed, 12, 30.0)
            bench.write_record(folder / f"seed-{seed}" / f"{arm}.json", bench.Result(values, trained))
    bench.write_record(folder / "seed-3" / "sft.json", bench.Result({"row-0": 1.0}))


def test_the_report_compares_the_seeds_that_all_arms_have(bench, tmp_path: Path, capsys) -> None:
    write_results(bench, tmp_path)
    bench.report(tmp_path, [1, 2, 3])
    lines = capsys.readouterr().out.splitlines()
    assert "the random seeds that all arms have: [1, 2] of [1, 2, 3]" in lines
    rows = [line for line in lines if line.startswith("| ")]
    assert rows[1].startswith("| on-policy | 75.0% | 75.0 to 75.0 | +12.5 | ")
    assert rows[2].startswith("| sft | 62.5% | ")  # 2 and 3 of 4
    assert rows[2].endswith(" |  |  |  | 50.0, 75.0 |")
    assert rows[3].startswith("| untrained | 12.5% | ")
    assert "| 1 | sft | 2 of 4 | 50.0% | 901 | 12 | 30 | 18 of 20 | 3.2 |" in rows
    assert "| 2 | on-policy | 3 of 4 | 75.0% | 902 | 12 | 30 | 18 of 20 |  |" in rows
    assert "| 2 | untrained | 0 of 4 | 0.0% |  |  |  |  |  |" in rows


def test_a_folder_begun_with_other_settings_is_refused(tmp_path: Path) -> None:
    settings = {"teacher": None, "teacher_rows": 400, "teacher_epochs": 2.0, "rate": None, "beta": 1.0, "set": []}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    command = [sys.executable, str(BENCH / "on_policy.py"), "--folder", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert found.returncode == 1
    assert found.stderr == f"error: {tmp_path} was begun with --teacher-rows 400; name another --folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
