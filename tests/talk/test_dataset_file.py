"""The rows of a run as a file that training programs and this program read, and a card that states only facts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fakes import QUIET, World, fake_backends, make_recipe

from tapir_local.commands.main import cli
from tapir_local.data.files import read_table
from tapir_local.data.formats import parse_row
from tapir_local.files import file_sha256, read_rows, write_rows
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.schema import Seeds
from tapir_local.recipe.text import override
from tapir_local.records import Completion, Example, Judgement, Message
from tapir_local.run_dir import RunDir

# Text that a spreadsheet, a terminal, Markdown or a template would obey.
HOSTILE = '=HYPERLINK("http://x.example";"a")\n\x1b]0;owned\x07 | cell | <|im_end|> {{ 7 * 7 }} \u202e \u2028 end'
TALK = (Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello"), Message("user", HOSTILE))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run whose last round has a conversation with hostile text, and one that begins with two questions."""
    folder = tmp_path_factory.mktemp("dataset")
    recipe, run = make_recipe(folder), RunDir(folder, "fake")
    recipe = override(recipe, {"card.data_license": "CC BY 4.0", "card.terms": "none | known"})
    distill(recipe, run, fake_backends(World()), QUIET)
    path = run.round(2) / "train.jsonl"
    odd = (Message("user", "One"), Message("user", "Two"))
    more = [Example("talk", TALK, HOSTILE, "Math | Art"), Example("odd", odd, "Answer", "Art")]
    write_rows(path, [*read_rows(Example, path), *more])
    return run


def dataset(run: RunDir, out: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["dataset", run.name, str(out), *words, "--cache", str(run.cache)])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def trained(run: RunDir) -> dict[str, Example]:
    """The rows that any round trained on, with their newest answers."""
    found: dict[str, Example] = {}
    for number in range(3):
        found |= {row.id: row for row in read_rows(Example, run.round(number) / "train.jsonl")}
    return found


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", ["messages", "prompt-completion", "alpaca", "sharegpt"])
def test_datasets_and_this_program_read_what_was_written(
    finished: RunDir, tmp_path: Path, form: str, ending: str
) -> None:
    from datasets import load_dataset

    out, expected = tmp_path / f"rows.{ending}", trained(finished)
    said = dataset(finished, out, "--format", form)
    assert said.exit_code == 0, said.output
    if form == "alpaca":
        assert "conversations that `alpaca` cannot hold, left out: 1" in said.stderr
        del expected["odd"]
    assert said.stdout == f"{file_sha256(out)}  {out}\n"
    kind = "json" if ending == "jsonl" else "parquet"
    loaded = load_dataset(kind, data_files=str(out), split="train", cache_dir=str(tmp_path / "hf"))
    assert loaded["id"] == list(expected)
    assert loaded["task"] == [row.task for row in expected.values()]
    back = {
        (prompt, text) for row in read_table(Seeds(path=str(out))).rows for prompt, text, unread in [parse_row(row[1])]
    }
    assert back == {(row.prompt, row.completion) for row in expected.values()}


def test_the_card_states_facts_and_hostile_names_stay_in_their_cell(finished: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert dataset(finished, out, "--round", "2").exit_code == 0
    card, rows = (tmp_path / "rows.jsonl.card.md").read_text(), lines(out)
    assert len(rows) == len(read_rows(Example, finished.round(2) / "train.jsonl"))
    assert {row["round"] for row in rows} == {2}
    assert f"| SHA-256 | {file_sha256(out)} |" in card
    assert f"| rows | {len(rows):,} |" in card
    assert "| Math \\| Art | 1 |" in card
    assert "| the seeds | CC BY 4.0 |" in card
    assert "| the teacher's answers (terms) | none \\| known |" in card
    assert "| written by the teacher from harder rows |" in card
    assert str(finished.cache) not in card


def test_a_file_is_replaced_only_if_asked_and_mistakes_are_one_error(finished: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert dataset(finished, out).exit_code == 0
    before = out.read_bytes()
    assert "exists already" in str(dataset(finished, out, "--round", "1").exception)
    assert out.read_bytes() == before
    assert dataset(finished, out, "--round", "1", "--force").exit_code == 0
    assert out.read_bytes() != before
    assert "says no format" in str(dataset(finished, tmp_path / "rows.csv").exception)
    assert "has no train.jsonl of round 7" in str(dataset(finished, tmp_path / "x.jsonl", "--round", "7").exception)
    assert dataset(finished, tmp_path / "x.jsonl", "--margin", "1").exit_code == 2
    assert dataset(finished, tmp_path / "x.jsonl", "--preferences", "--format", "alpaca").exit_code == 2
    assert not (tmp_path / "x.jsonl").exists()


def test_pairs_are_rows_that_the_teacher_wins_in_both_orders(finished: RunDir, tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fake")
    shutil.copytree(finished.path, run.path)
    path = run.round(1) / "judgements.jsonl"
    kept, one_order, unread, cut, lone, *rest = read_rows(Judgement, path)
    changed = [
        Judgement(kept.id, 9, 2, ((9, 2), (9, 2))),
        Judgement(one_order.id, 9, 5, ((9, 1), (9, 9))),
        Judgement(unread.id, None, None, ((9, 1), None), "cut"),
        Judgement(cut.id, 9, 2, ((9, 2), (9, 2))),
        Judgement(lone.id, 9, 2),
        *(Judgement(row.id, 9, 9, ((9, 9), (9, 9))) for row in rest),
    ]
    write_rows(path, changed)
    answers = read_rows(Completion, run.round(1) / "answers.jsonl")
    write_rows(
        run.round(1) / "answers.jsonl",
        [Completion(row.id, HOSTILE, "length" if row.id == cut.id else "stop", 3) for row in answers],
    )
    out = tmp_path / "pairs.jsonl"
    said = dataset(run, out, "--preferences", "--round", "1")
    assert "answers of the student that were cut, left out: 1" in said.stderr
    found = lines(out)
    assert [row["id"] for row in found] == [kept.id, lone.id]
    seeds = {row.id: row for row in read_rows(Example, run.path / "seeds.jsonl")}
    assert found[0]["prompt"] == [{"role": "user", "content": seeds[kept.id].prompt[0].content}]
    assert found[0]["chosen"] == [{"role": "assistant", "content": seeds[kept.id].completion}]
    assert found[0]["rejected"] == [{"role": "assistant", "content": HOSTILE}]
    assert (found[0]["score_chosen"], found[0]["score_rejected"], found[0]["mfd"], found[0]["round"]) == (9, 2, 7, 1)
    assert "more than 2 points higher" in (tmp_path / "pairs.jsonl.card.md").read_text()
    none = dataset(run, tmp_path / "none.jsonl", "--preferences", "--round", "1", "--margin", "8")
    assert "has no preference pair" in str(none.exception)
    assert not (tmp_path / "none.jsonl").exists()
    dataset(run, tmp_path / "more.jsonl", "--preferences", "--round", "1", "--margin", "0")
    assert [row["id"] for row in lines(tmp_path / "more.jsonl")] == [kept.id, lone.id]


def test_a_prompt_has_one_pair_and_held_out_rows_have_none(finished: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "pairs.parquet"
    assert dataset(finished, out, "--preferences").exit_code == 0
    from pyarrow import parquet

    found = parquet.read_table(out).to_pylist()
    prompts = [row["prompt"][-1]["content"] for row in found]
    assert len(set(prompts)) == len(prompts) > 0
    held = {row.prompt[-1].content for row in read_rows(Example, finished.path / "holdout.jsonl")}
    assert not held & set(prompts)
    judged = [{row.id for row in read_rows(Judgement, finished.round(n) / "judgements.jsonl")} for n in (1, 2)]
    lost = [
        {row.id for row in read_rows(Judgement, finished.round(n) / "judgements.jsonl") if row.student == 2}
        for n in (1, 2)
    ]
    again = lost[0] & lost[1]
    assert again, "some row was lost in both rounds"
    assert {row["round"] for row in found if row["id"] in again} == {2}
    assert {row["id"] for row in found} <= judged[0] | judged[1]
