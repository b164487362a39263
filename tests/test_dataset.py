"""Seeds of every usual form are read; what cannot be is refused with its line."""

import json
import random

import pytest

from tapir_local.dataset import Index, count_tasks, read_seeds, screen, split_holdout
from tapir_local.errors import TapirError
from tapir_local.records import Example, Message, instruction_of
from tapir_local.tasks import TASKS


def seeds(*rows: object) -> list[Example]:
    return read_seeds(json.dumps(rows), "seeds.json", TASKS)[0]


def ask(id: str, text: str, task: str = "Math") -> Example:
    return Example(id, (Message("user", text),), "x", task)


def test_alpaca_rows_join_instruction_and_input() -> None:
    (row,) = seeds({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert row == Example("seed-00001", (Message("user", "Add.\n\n1 2"),), "3")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "instances": [{"input": "", "output": "3"}]},
        {"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]},
        {"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}]},
        {"prompt": "Add.", "completion": "3"},
    ],
)
def test_other_forms_read_alike(row: dict[str, object]) -> None:
    (found,) = seeds(row)
    assert (instruction_of(found.prompt), found.completion) == ("Add.", "3")


def test_several_turns_are_kept() -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Add."), ("assistant", "3")]
    (row,) = seeds({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert len(row.prompt) == 3
    assert row.completion == "3"


def test_json_lines_read_like_an_array() -> None:
    lines = '{"instruction": "a"}\n\n{"instruction": "b"}\n'
    assert [instruction_of(row.prompt) for row in read_seeds(lines, "f", TASKS)[0]] == ["a", "b"]


def test_duplicates_are_left_out_and_counted() -> None:
    rows = [{"instruction": "Add  one."}, {"instruction": "add one."}, {"instruction": "Add two."}]
    found, duplicates = read_seeds(json.dumps(rows), "f", TASKS)
    assert (len(found), duplicates) == (2, 1)


def test_labels_of_the_file_are_kept() -> None:
    (row,) = seeds({"instruction": "a", "task": "Music"})
    assert (row.task, row.labelled_by) == ("Music", "file")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no rows"),
        ("[]", "no rows"),
        ('{"instruction": "a"}\nnonsense\n', "line 2: not JSON"),
        ('[\n{"instruction": "a"},\n{"instruction": }\n]', "line 3: not JSON"),
        ('[{"instruction": "a"}', "line 1: not JSON"),
        ('{"instruction": "a"}\n{"instruction": " "}\n{"output": "b"}\n', "lines 2, 3: 2 of 3 rows without an instr"),
        ('"text"\n', "line 1: a row is a JSON object"),
        ('{"instruction": "a", "task": "Cooking"}', "no task 'Cooking'"),
        ('{"messages": 3}', "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(TapirError) as error:
        read_seeds(text, "seeds.json", TASKS)
    assert said in str(error.value)
    assert "seeds.json" in str(error.value)


def test_the_holdout_has_the_tasks_in_proportion_and_shares_no_row() -> None:
    rows = [ask(f"m{n}", f"sum {n}") for n in range(80)] + [ask(f"a{n}", f"art {n}", "Art") for n in range(20)]
    held, rest = split_holdout(rows, 10, random.Random(0))
    assert count_tasks(held) == {"Art": 2, "Math": 8}
    assert not {row.id for row in held} & {row.id for row in rest}
    assert len(held) + len(rest) == 100


def screened(*texts: str, pool: str = "", holdout: str = "") -> list[str]:
    """Why each of several drafts was rejected; "" where it was kept."""
    near, held = Index(0.7), Index(0.7)
    near.add(ask("p", pool))
    held.add(ask("h", holdout))
    return [draft.reason for draft in screen([ask(f"d{n}", text) for n, text in enumerate(texts)], near, held)]


def test_near_duplicates_of_the_pool_and_of_each_other_are_rejected() -> None:
    reasons = screened("What is the capital of France?", "What is the capital of Spain?", "Sing!", pool="Sing !")
    assert reasons[0] == ""
    assert "near-duplicate" in reasons[1]  # 6 of 7 words in common
    assert "near-duplicate" in reasons[2]


def test_what_resembles_the_holdout_is_rejected() -> None:
    assert "near the holdout" in screened("Name three blue birds", holdout="name three blue birds")[0]


def test_the_prompts_own_marks_are_rejected() -> None:
    assert "marks" in screened("Do this </new_instruction> <answer_1>")[0]


def test_rouge_l_equals_the_published_definition() -> None:
    """F1 of the longest common subsequence: 2 * LCS / (m + n)."""
    near = Index(0.0)
    near.add(ask("p", "a b c d e"))
    found = near.nearest(ask("q", "a x c e"))
    assert found is not None
    assert found[1] == pytest.approx(2 * 3 / (5 + 4))
