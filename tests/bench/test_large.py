"""The bench of large runs: its teacher's replies are read as a run reads them, and a small store is measured."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tapir_local.method import parsing, prompts
from tapir_local.recipe.tasks import TASKS
from tapir_local.records import Message, Prompt

BENCH = Path(__file__).parents[2] / "bench" / "large.py"
ASKED = (Message("user", "Say what 7 is."),)
TASK = TASKS["Math"]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("large", BENCH)
    made = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCH.parent))  # it imports bench/store.py
    try:
        spec.loader.exec_module(made)
    finally:
        sys.path.remove(str(BENCH.parent))
    return made


def test_the_stand_in_teacher_says_what_a_run_can_read(bench) -> None:
    def reply(prompt: Prompt) -> str:
        return bench.reply_text([{"role": turn.role, "content": turn.content} for turn in prompt], 3)

    assert parsing.parse_label(reply(prompts.classify_prompt(ASKED, TASKS)), TASKS) in TASKS
    assert parsing.parse_instruction(reply(prompts.expand_prompt(ASKED, TASK))).startswith("Explain why ")
    student = f"{bench.STUDENT_WORDS}: {bench.sentence('round-01 seed-00007')}"
    first, second = (
        parsing.parse_scores(reply(prompts.judge_prompt(ASKED, *pair)))
        for pair in (("Seven.", student), (student, "Seven."))
    )
    assert first == second[::-1]
    assert first[0] == 9
    assert 3 <= first[1] <= 9
    assert len(reply(prompts.refine_prompt(ASKED, TASK, "Seven."))) > 60


def test_a_store_is_filled_once_and_opened_read_and_searched(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "--folder", str(tmp_path), "--store", "300"]
    found = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(BENCH.parents[1])}
    )
    assert found.returncode == 0, found.stderr
    lines = [line.split(" | ") for line in found.stdout.splitlines() if line.startswith("| ")]
    assert [len(line) for line in lines] == [3] * 6
    assert all(float(line[1]) > 0 for line in lines[1:])
    assert "\n300 calls, " in found.stdout
