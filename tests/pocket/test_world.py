"""The pocket world can read, solve, check and grade every problem that it draws."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapir_local.pocket.check import is_right, score_answer
from tapir_local.pocket.code import FUNCTION_TASKS, FunctionTask, function_results, is_harmless
from tapir_local.pocket.world import (
    POCKET_FAMILIES,
    Problem,
    check_answer,
    draw_problem,
    draw_variant,
    grade_answer,
    is_reserved_for_seeds,
    parse_problem,
    solve_instruction,
)
from tapir_local.recipe.tasks import TASKS

ASSETS = Path(__file__).parents[2] / "tapir_local" / "assets"
NAMES = tuple(POCKET_FAMILIES)


def some(name: str, count: int = 40) -> list[Problem]:
    """Problems of a family over all its levels."""
    rng = Random(f"tests-{name}")
    return [draw_problem(rng, POCKET_FAMILIES[name], 1 + at % POCKET_FAMILIES[name].levels) for at in range(count)]


def test_the_families_cover_more_than_ten_tasks() -> None:
    labels = {family.task for family in POCKET_FAMILIES.values()}
    assert len(labels) >= 10
    assert labels <= set(TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_an_instruction_is_read_back_as_the_same_problem(name: str) -> None:
    for problem in some(name):
        assert parse_problem(problem.instruction) == problem


@pytest.mark.parametrize("name", NAMES)
def test_the_teachers_answers_are_right_and_score_8_and_10(name: str) -> None:
    for problem in some(name):
        plain, styled = problem.solution.plain, problem.solution.styled
        assert check_answer(problem.instruction, plain) is True
        assert check_answer(problem.instruction, styled) is True
        assert 8 <= grade_answer(problem.instruction, plain) <= grade_answer(problem.instruction, styled) == 10


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_to_another_problem_is_wrong(name: str) -> None:
    for one, other in zip(some(name), some(name)[7:], strict=False):
        if one.solution.kind != "code" and one.solution.target != other.solution.target:
            assert check_answer(one.instruction, other.solution.styled) is False
            assert grade_answer(one.instruction, other.solution.styled) <= 5


@pytest.mark.parametrize("name", NAMES)
def test_spoiled_answers_are_wrong(name: str) -> None:
    for problem in some(name, 10):
        for spoiled in ("", "I do not know.", problem.solution.target[: len(problem.solution.target) // 2], "?" * 20):
            if spoiled != problem.solution.target:
                assert check_answer(problem.instruction, spoiled) is False, spoiled
                assert 1 <= grade_answer(problem.instruction, spoiled) <= 5


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_is_another_problem_of_the_same_family(name: str) -> None:
    rng = Random(5)
    for problem in some(name, 20):
        other = draw_variant(problem, rng)
        assert other.family is problem.family
        assert other.key != problem.key
        assert 0.3 < len(other.instruction) / len(problem.instruction) < 3


RIGHT = (
    ("What is 47 + 85?", "132"),
    ("What is 47 + 85?", "The sum of 47 and 85 is 132."),
    ("What is 47 + 85?", "47 plus 85 equals 132!"),
    ("What is 47 + 85?", "132 is the sum of 47 and 85."),
    ("What is 470 + 850?", "1,320"),
    ("What is 7 + 0?", "7"),
    ("What is 3 + 4?", "seven"),
    ("What is 47 + 85?", "40 + 80 = 120, 7 + 5 = 12\n120 + 12 = 132\nThe answer is 132."),
    ("Which number is the largest: 12, 45, 38?", "45 is the largest of 12, 45 and 38."),
    ("Sort these numbers from smallest to largest: 5, 1, 3.", "1, 3 and 5"),
    ("Sort these numbers from smallest to largest: 5, 1, 3.", "Sorted: 1 3 5"),
    ("Is 348 even or odd?", "348 is an even number."),
    (
        "Anna is taller than Bob. Bob is taller than Cleo. Who is the shortest?",
        "Cleo is the shortest, for Bob and Anna are taller.",
    ),
    ("Put this sentence into the past tense: Anna walks to the park.", "Past tense: Anna walked to the park"),
    ("Begin this sentence with the time: Anna walks to the park at noon.", "At noon, Anna walks to the park."),
    ("Write these as a bullet list: dog, red", "* dog\n* red"),
    ("Write these as a JSON list: dog, red", '```json\n["dog","red"]\n```'),
    ("Write this as a JSON object: Anna is 9 years old.", '{"age": 9, "name": "Anna"}'),
    (
        "Write a Python function bolt(x) that adds 5 to x.",
        "Here it is:\n\ndef bolt(x):\n    y = 5 + x\n    return y\n\nCall bolt(1).",
    ),
    ("Which of these is an animal: lemon, dog, axe?", "The dog is an animal."),
)
WRONG = (
    ("What is 47 + 85?", "The answer is 132 or 133."),
    ("What is 47 + 85?", "132 133 134"),
    ("What is 47 + 85?", "131\n47 + 85 = 132"),
    ("What is 47 + 85?", "132 + 1 = 133"),
    ("What is 47 + 85?", "1320"),
    ("Which number is the largest: 12, 45, 38?", "12, 45, 38"),
    ("Sort these numbers from smallest to largest: 5, 1, 3.", "5, 1, 3\n1, 3, 5, 7"),
    ("Is 348 even or odd?", "even or odd"),
    ("Anna is taller than Bob. Bob is taller than Cleo. Who is the shortest?", "Anna, Bob, Cleo"),
    (
        "Put this sentence into the past tense: Anna walks to the park.",
        "Anna walks to the park.\nAnna walked to the park.",
    ),
    ("Write these as a JSON list: dog, red", "dog, red"),
    ("Write a Python function bolt(x) that adds 5 to x.", "def bolt(x):\n    return x + 6"),
    ("Write a Python function bolt(x) that adds 5 to x.", "def bolt(x):\n    while True: pass"),
    ("Write a Python function bolt(x) that adds 5 to x.", "def other(x):\n    return x + 5"),
    ("Which of these is an animal: lemon, dog, axe?", "lemon, dog, axe"),
)


@pytest.mark.parametrize(("instruction", "answer"), RIGHT)
def test_any_sensible_wording_is_right(instruction: str, answer: str) -> None:
    assert check_answer(instruction, answer) is True


@pytest.mark.parametrize(("instruction", "answer"), WRONG)
def test_a_right_number_among_wrong_ones_is_wrong(instruction: str, answer: str) -> None:
    assert check_answer(instruction, answer) is False


def test_nothing_is_known_outside_the_pocket_world() -> None:
    for text in (
        "",
        "Who wrote Faust?",
        "What is 1.5 + 2?",
        "Is 3 even or odd",
        "Translate into Latin: the red dog",
        "Sort these numbers from smallest to largest: a, b.",
        "Anna is taller than Bob. Bob is taller than Cleo. Cleo is taller than Bob. Who is the tallest?",
    ):
        assert parse_problem(text) is None
        assert solve_instruction(text) is None
        assert check_answer(text, "anything") is None
        assert grade_answer(text, "anything") == 1


def test_steps_that_are_partly_right_score_in_between() -> None:
    solution = solve_instruction("What is 478 + 853?")
    assert solution is not None
    wrong = solution.styled.replace("1331", "1332")
    assert not is_right(solution, wrong)
    assert 1 < score_answer(solution, "12") < score_answer(solution, wrong) <= 5


@pytest.mark.parametrize(
    "code",
    [
        "import os\ndef f(x): return 1",
        "def f(x): return x ** 9",
        "def f(x): return x.__class__",
        "def f(x): return open(x)",
        "def f(x): return [y for y in x]",
        "def f(x): return f(x)",
        "def f(x): return x * 999 * 999 * 999 * 999",
        "def f(x",
        # calls itself under another name, without end
        "def f(x):\n    max = f\n    return max(x - 1) + max(x - 1) if x > 0 else 0",
        "def max(x): return max(x - 1) + max(x - 1) if x > 0 else 0",
        "def f(x):\n    def max(y): return max(y - 1) + max(y - 1) if y > 0 else 0\n    return max(x)",
        'def f(x):\n    __builtins__["max"] = f\n    return max(x - 1) + max(x - 1) if x > 0 else 0',
        # needs more memory or time than there is
        "def f(x): return [0] * 9999 * 9999 * 9",
        "def f(x): return len(9999 * 'ab' * 9999 * 9999)",
        "def f(x): return [[[0] * 9999] * 9999] * 9999 == [[[0] * 9999] * 9999] * 9999",
        "def f(x): return sum(range(9999 * 9999 * 9999 * 9))",
        "def f(x): return list(range(9999 * 9999 * 9))",
        "def f(x): return '%9999999999s' % x",
        "def f(x, y=len([0] * 9999 * 9999 * 9)): return x",
        "def f(x: [0] * 9999 * 9999 * 9): return x",
        "def f(x):\n" + "".join(f"    {b} = [{', '.join([a] * 9)}]\n" for a, b in zip("xabcd", "abcde", strict=True)),
        "def f(x):\n    a = str([1, 2, 3] * 999)\n" + "    a = a + a\n" * 8 + "    return a",
    ],
)
def test_code_that_could_do_harm_is_not_run(code: str) -> None:
    assert function_results(code, "f", ("100",)) is None


@pytest.mark.parametrize("job", FUNCTION_TASKS, ids=lambda job: job.description)
def test_the_guards_change_nothing_for_code_that_is_right(job: FunctionTask) -> None:
    """The results are those of Python itself, for each way to write the function."""
    for k, m in ((2, 3), (9, 9), (99, 7)):
        body = job.expression.format(k=k, m=m)
        codes = f"def f(x): return {body}", f"def f(x):\n    y = {body}\n    if True:\n        return y"
        for code in codes:
            space: dict[str, Callable[[object], object]] = {}
            exec(code, space)
            wanted = tuple(space["f"](ast.literal_eval(argument)) for argument in job.arguments)
            assert function_results(code, "f", job.arguments) == wanted


@pytest.mark.parametrize(
    "body",
    [
        "[x] * 3 + [1, 2]",
        "(x, x % 7)",
        "sorted([x, 5, 1])[1]",
        "str(x) * 2 + 'a'",
        "list(range(x % 9))",
        "-x if x else 1",
    ],
)
def test_the_guards_change_nothing_for_small_values(body: str) -> None:
    wanted = tuple(eval(body, {"x": x}) for x in (-7, 0, 12, 100))
    assert function_results(f"def f(x): return {body}", "f", ("-7", "0", "12", "100")) == wanted


def test_a_call_of_itself_and_a_huge_product_are_refused_before_anything_runs() -> None:
    for code in (
        "def f(x):\n    max = f\n    return max(x - 1) + max(x - 1) if x > 0 else 0",
        "def f(x):\n    return [0] * 9999 * 9999 * 9",
    ):
        assert not is_harmless(ast.parse(code))


def test_code_is_judged_by_what_it_does() -> None:
    assert function_results("def f(x):\n    if x > 2:\n        return max(x, 9)\n    return 0", "f", ("1", "3")) == (
        0,
        9,
    )


STRANGE = ("[" * 9000, "def f(x):\n" * 99, "\0", "١٢", "9" * 999)
ODD = st.one_of(st.text(), st.text(alphabet="0123456789,.=-+ \n"), st.sampled_from(STRANGE))


@given(st.sampled_from(NAMES), ODD)
def test_no_answer_breaks_the_judge(name: str, answer: str) -> None:
    problem = some(name, 1)[0]
    assert check_answer(problem.instruction, answer) in (True, False)
    assert 1 <= grade_answer(problem.instruction, answer) <= 10


@given(st.sampled_from(NAMES), ODD, st.integers(0, 60))
def test_no_instruction_breaks_the_reader(name: str, odd: str, at: int) -> None:
    text = some(name, 1)[0].instruction
    for changed in (odd, text[:at] + odd + text[at:]):
        problem = parse_problem(changed)
        assert problem is None or problem.instruction == changed.strip()


# --- the seeds


def seed_rows() -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads((ASSETS / "pocket_seeds.json").read_text(encoding="utf-8"))
    return rows


def joined(row: dict[str, str]) -> str:
    return row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")


def test_the_seeds_are_many_different_problems_with_plain_answers() -> None:
    rows = seed_rows()
    problems = [parse_problem(joined(row)) for row in rows]
    assert len(rows) >= 2000
    assert len({joined(row) for row in rows}) == len(rows)
    assert sum(bool(row["input"]) for row in rows) > len(rows) / 4
    assert all(
        problem is not None and problem.solution.plain == row["output"]
        for problem, row in zip(problems, rows, strict=True)
    )
    assert len({problem.family.task for problem in problems if problem}) >= 10


def test_the_seeds_are_of_the_reserved_third() -> None:
    assert all(is_reserved_for_seeds(problem) for row in seed_rows() if (problem := parse_problem(joined(row))))


def test_the_seeds_are_what_their_maker_writes(tmp_path: Path) -> None:
    import runpy
    import sys

    maker = ASSETS.parent.parent / "bench" / "make_pocket_seeds.py"
    argv, sys.argv = sys.argv, [str(maker), str(tmp_path / "seeds.json")]
    try:
        runpy.run_path(str(maker), run_name="__main__")
    finally:
        sys.argv = argv
    assert (tmp_path / "seeds.json").read_bytes() == (ASSETS / "pocket_seeds.json").read_bytes()
