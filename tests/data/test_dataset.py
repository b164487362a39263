"""Rows become examples without duplicates, a holdout is split off, near-duplicates and leaks are rejected."""

import random
from pathlib import Path

import pytest
from fakes import World, fake_backends, make_recipe

from tapir_local.data.dataset import (
    DedupIndex,
    Draft,
    count_tasks,
    parse_seeds,
    remove_near_duplicates,
    require_seeds,
    screen_drafts,
    split_holdout,
)
from tapir_local.data.formats import Table
from tapir_local.errors import TapirError
from tapir_local.files import read_rows
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.tasks import TASKS
from tapir_local.recipe.text import override
from tapir_local.records import Example, Message
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import Work
from tapir_local.stages.prepare import read_stage
from tapir_local.unusable import Unusable


def seeds(*rows: dict[str, object]) -> tuple[list[Example], list[Draft]]:
    return require_seeds(Table("seeds.json", list(enumerate(rows, 1))), TASKS)


def ask(id: str, text: str, task: str = "Math") -> Example:
    return Example(id, (Message("user", text),), "x", task)


def test_duplicates_are_removed_and_name_the_first_row() -> None:
    found, left_out = seeds({"instruction": "Add  one."}, {"instruction": "add one."}, {"instruction": "Add two."})
    assert [row.id for row in found] == ["seed-00001", "seed-00003"]
    assert [(row.example.id, row.reason, row.near) for row in left_out] == [("seed-00002", "duplicate", "seed-00001")]


def test_labels_of_the_file_are_kept() -> None:
    ((row,), _) = seeds({"instruction": "a", "task": "Music"})
    assert (row.task, row.labelled_by) == ("Music", "file")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"instruction": "a"}, {"instruction": " "}, {"instruction": None}],
            "lines 2, 3: 2 of 3 rows without an instr",
        ),
        ([{"instruction": "a", "task": "Cooking"}], "line 1: the recipe has no task 'Cooking'"),
        ([{"instruction": "a", "task": ["Art"]}], "line 1: the recipe has no task"),
        (
            [{"instruction": "a"}, {"instruction": "b \ud83d"}],
            r"line 2: not Unicode text: half a surrogate pair, '\ud83d'",
        ),
        ([{"instruction": "a"}, {"text": "b", "id": 3}], "line 2: a row of no known format; its keys: text, id"),
    ],
)
def test_unreadable_rows_are_refused_with_their_lines(rows: list[dict[str, object]], said: str) -> None:
    with pytest.raises(TapirError) as error:
        seeds(*rows)
    assert f"seeds.json, {said}" in str(error.value)


def test_near_duplicates_are_removed_and_name_the_similar_row() -> None:
    rows = [ask("a", "Name a fruit that is red"), ask("b", "Name one fruit that is red"), ask("c", "Sing a song")]
    kept, left_out = remove_near_duplicates(rows, 0.7)
    assert [row.id for row in kept] == ["a", "c"]
    assert left_out == [Draft(rows[1], "near-duplicate: ROUGE-L 0.83", "a")]
    assert remove_near_duplicates(rows, None) == (rows, [])


def run_read_stage(recipe: Recipe, folder: Path) -> tuple[str, Path]:
    """What the stage says, and its run's folder."""
    run = RunDir(folder, "run")
    return read_stage(Work(recipe, run, fake_backends(World())), run.path / "rows.jsonl"), run.path


LIKE = (
    '{"instruction": "Name five rivers of Europe that flow into the North Sea."}\n'
    '{"instruction": "Name six rivers of Europe that flow into the North Sea."}\n'
    '{"instruction": "name six rivers of Europe that flow into the North Sea."}\n'
    '{"instruction": "Sing."}\n'
)


def test_the_read_stage_counts_and_saves_rejected_rows(tmp_path: Path) -> None:
    (tmp_path / "seeds.jsonl").write_text(LIKE)
    recipe = override(
        make_recipe(tmp_path), {"seeds.path": str(tmp_path / "seeds.jsonl"), "seeds.holdout": 1, "seeds.max_rouge": 0.9}
    )
    said, run = run_read_stage(recipe, tmp_path)
    assert said == "2 rows, 1 duplicate and 1 near-duplicate left out (rejected-seeds.jsonl)"
    rejected = read_rows(Draft, run / "rejected-seeds.jsonl")
    assert [(row.example.id, row.near) for row in rejected] == [
        ("seed-00003", "seed-00002"),
        ("seed-00002", "seed-00001"),
    ]
    assert [row.id for row in read_rows(Example, run / "rows.jsonl")] == ["seed-00001", "seed-00004"]


def read_rows_of(tmp_path: Path, rows: list[str], **changes: object) -> tuple[str, Path]:
    """The message of the read stage for a file with these lines, and the folder of its run."""
    (tmp_path / "seeds.jsonl").write_text("\n".join(rows))
    settings = {"seeds.path": str(tmp_path / "seeds.jsonl"), "seeds.holdout": 1}
    return run_read_stage(override(make_recipe(tmp_path), settings | changes), tmp_path)


FIFTY = [f'{{"instruction": "Question {n}: what is {n} times 3?"}}' for n in range(50)]
ODD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": 1}]}]}'


def test_one_unusable_row_in_fifty_is_left_out(tmp_path: Path) -> None:
    said, run = read_rows_of(tmp_path, [*FIFTY[:20], ODD, *FIFTY[21:49], '{"instruction": "torn'])
    assert said == "48 rows, 2 left out (1 a turn that calls a tool, 1 not JSON, see unusable.jsonl)"
    found = read_rows(Unusable, run / "unusable.jsonl")
    assert [(row.id, row.kind) for row in found] == [
        ("seeds.jsonl, line 21", "a turn that calls a tool"),
        ("seeds.jsonl, line 50", "not JSON"),
    ]
    assert found[1].text == '{"instruction": "torn'
    assert read_rows(Example, run / "rows.jsonl")[20].id == "seed-00022"


def test_unusable_rows_can_be_refused(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match=r"seeds.jsonl, line 21: .*a turn by 'assistant' calls a tool"):
        read_rows_of(tmp_path, [*FIFTY[:20], ODD, *FIFTY[21:]], **{"seeds.unusable": "refuse"})


def test_too_many_unusable_rows_stop_with_reasons_and_examples(tmp_path: Path) -> None:
    said = r"3 of 50 rows \(6%\) cannot be used: 2 a turn that calls a tool, 1 not an object(.|\n)*, line 1 and seeds"
    with pytest.raises(TapirError, match=said):
        read_rows_of(tmp_path, [ODD, ODD, "3", *FIFTY[3:]])
    assert len(read_rows(Unusable, tmp_path / "runs" / "run" / "unusable.jsonl")) == 3


def test_unread_text_is_reported(tmp_path: Path) -> None:
    said, _ = read_rows_of(tmp_path, [*FIFTY[1:], '{"instruction": "a", "notes": "b", "source": "c"}'])
    assert said == "50 rows; not read: column 'notes' (1 row)"


def test_many_similar_rows_give_a_warning(tmp_path: Path) -> None:
    alike = [
        f'{{"instruction": "Name the rivers of Europe that flow {word} the sea."}}' for word in ["to", "into", "in"]
    ]
    said, _ = read_rows_of(tmp_path, [*alike, alike[0].replace("to", "at"), '{"instruction": "Sing."}'], **{
        "seeds.max_rouge": 0.5
    })  # fmt: skip
    assert "; WARNING: 60% of the rows are near-duplicates of others. See rejected-seeds.jsonl;" in said
    assert "seeds.max_rouge" in said


def test_case_inside_quotes_distinguishes_rows() -> None:
    found, left_out = seeds({"instruction": 'Is "polish" a verb?'}, {"instruction": 'Is "Polish" a verb?'})
    assert (len(found), left_out) == (2, [])


def test_a_row_with_an_unknown_task_is_left_out() -> None:
    found = parse_seeds(
        Table("f", [(1, {"instruction": "a", "task": "Art"}), (2, {"instruction": "b", "task": 0})]), TASKS
    )
    assert [row.task for row in found.examples] == ["Art"]
    assert [row.fault.said for row in found.faulty] == ["the recipe has no task 0"]


def test_the_pocket_seeds_all_stay_in_the_quickstart(tmp_path: Path) -> None:
    from tapir_local.recipe.text import parse_recipe
    from tapir_local.resources import find_recipe

    said, run = run_read_stage(parse_recipe(find_recipe("quickstart").read_text(), "quickstart"), tmp_path)
    assert said == "2,626 rows"
    assert (run / "rejected-seeds.jsonl").read_bytes() == b""


def test_a_file_without_answers_cannot_answer(tmp_path: Path) -> None:
    recipe = override(make_recipe(tmp_path), {"seeds.answers": "file"})
    with pytest.raises(TapirError, match=r"no row has an answer(.|\n)*seeds.answers: teacher"):
        run_read_stage(recipe, tmp_path)
    assert not (tmp_path / "runs" / "run").exists()


def test_the_holdout_has_tasks_in_proportion_and_no_shared_row() -> None:
    rows = [ask(f"m{n}", f"sum {n}") for n in range(80)] + [ask(f"a{n}", f"art {n}", "Art") for n in range(20)]
    held, rest = split_holdout(rows, 10, random.Random(0))
    assert count_tasks(held) == {"Art": 2, "Math": 8}
    assert not {row.id for row in held} & {row.id for row in rest}
    assert len(held) + len(rest) == 100


def screened(*texts: str, pool: str = "", holdout: str = "") -> list[str]:
    """The reasons why drafts were rejected; "" for a kept one."""
    near, held = DedupIndex(0.7), DedupIndex(0.7)
    near.add(ask("p", pool))
    held.add(ask("h", holdout))
    return [draft.reason for draft in screen_drafts([ask(f"d{n}", text) for n, text in enumerate(texts)], near, held)]


def test_near_duplicates_of_the_pool_and_of_each_other_are_rejected() -> None:
    reasons = screened("What is the capital of France?", "What is the capital of Spain?", "Sing!", pool="Sing !")
    assert reasons[0] == ""
    assert "near-duplicate" in reasons[1]  # 6 of 7 words in common
    assert "near-duplicate" in reasons[2]


def test_other_numbers_make_a_new_row_but_still_a_leak() -> None:
    row, draft = "What do 3 crates for 4 coins each cost?", "What do 5 crates for 2 coins each cost?"
    assert screened(draft, pool=row) == [""]
    assert screened(row, pool=row) == ["near-duplicate: ROUGE-L 1.00"]
    assert "near the holdout" in screened(draft, holdout=row)[0]


def test_drafts_similar_to_the_holdout_are_rejected() -> None:
    assert "near the holdout" in screened("Name three blue birds", holdout="name three blue birds")[0]


def test_drafts_with_tags_of_the_prompt_are_rejected() -> None:
    assert "marks" in screened("Do this </new_instruction> <answer_1>")[0]


def test_a_leak_is_found_in_any_conversation() -> None:
    near, held = DedupIndex(0.7), DedupIndex(0.7)
    held.add(ask("h", "Name three blue birds"))
    draft = Example("d", (Message("system", "Be brief."), Message("user", "name three blue birds")))
    assert screen_drafts([draft], near, held) == [Draft(draft, "near the holdout: ROUGE-L 1.00", "h")]
