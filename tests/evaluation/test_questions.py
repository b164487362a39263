"""The three shapes of a file of questions, MT-Bench's real one, and files of another shape."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tapir_local.errors import TapirError
from tapir_local.evaluation.annotations import read_annotations, write_annotations
from tapir_local.evaluation.questions import read_questions, without_reference
from tapir_local.records import Message

SHARED = Path(__file__).parents[3] / "shared" / "data"
MT_QUESTIONS, MT_REFERENCES = SHARED / "mt_bench_question.jsonl", SHARED / "mt_bench_reference_gpt4.jsonl"
ALPACA_EVAL = SHARED / "alpaca_eval" / "gpt4_1106_preview.json"
ALPACA = [
    {"instruction": "Name a color.", "output": "Red.", "dataset": "koala", "generator": "somebody"},
    {"instruction": "Name a bird.", "output": "A wren.", "dataset": "vicuna", "generator": "somebody"},
]
MT_BENCH = [
    {"question_id": 1, "category": "writing", "turns": ["Write a line.", "Make it rhyme."]},
    {"question_id": 2, "category": "math", "turns": ["What is 2 + 2?", "Double it."], "reference": ["4", "8"]},
]


def written(folder: Path, rows: Any, name: str = "questions.json") -> Path:
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def test_alpaca_eval_has_an_opponents_answers_and_its_name(tmp_path: Path) -> None:
    found = read_questions(written(tmp_path, ALPACA))
    assert (found.shape, found.answered_by, found.turns) == ("alpaca_eval", "somebody", 1)
    assert [(one.id, one.category, one.answer) for one in found.questions] == [
        ("1", "koala", "Red."),
        ("2", "vicuna", "A wren."),
    ]
    assert found.questions[0].references == ()  # an opponent's answer is no reference


def test_mt_bench_has_both_turns_and_the_answer_goes_between_them(tmp_path: Path) -> None:
    found = read_questions(written(tmp_path, MT_BENCH))
    writing, math = found.questions
    assert (found.shape, found.turns, math.references) == ("mt_bench", 2, ("4", "8"))
    assert writing.conversation([]) == (Message("user", "Write a line."),)
    assert writing.conversation(["A line."]) == (
        Message("user", "Write a line."),
        Message("assistant", "A line."),
        Message("user", "Make it rhyme."),
    )


def test_rows_have_the_formats_of_seeds_and_their_answers_are_references(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question": "2 + 2?", "answer": "4", "category": "sums"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_questions(tmp_path / "rows.jsonl")
    first, second = found.questions
    assert (found.shape, found.answered_by) == ("rows", "the answers in rows.jsonl")
    assert (first.id, first.category, first.references, first.answer) == ("a", "sums", ("4",), "4")
    assert (second.id, [turn.role for turn in second.opening]) == ("2", ["system", "user"])
    assert len(read_questions(tmp_path / "rows.jsonl", limit=1).questions) == 1


@pytest.mark.skipif(not MT_QUESTIONS.exists(), reason="needs MT-Bench's files")
def test_the_real_mt_bench_has_eighty_questions_of_two_turns_and_forty_references() -> None:
    found = read_questions(MT_QUESTIONS, str(MT_REFERENCES))
    assert len(found.questions) == 80
    assert {one.turns for one in found.questions} == {2}
    assert len({one.category for one in found.questions}) == 8
    assert sum(len(one.references) == 2 for one in found.questions) == 40
    assert [one.id for one in without_reference(read_questions(MT_QUESTIONS).questions)] == ["123"]
    assert not any(one.references for one in read_questions(MT_QUESTIONS, "none").questions)


@pytest.mark.skipif(not ALPACA_EVAL.exists(), reason="needs AlpacaEval's file")
def test_the_real_alpaca_eval_has_805_instructions_of_five_sets() -> None:
    found = read_questions(ALPACA_EVAL)
    assert (found.shape, found.answered_by, found.total) == ("alpaca_eval", "gpt4_1106_preview", 805)
    assert sorted({one.category for one in found.questions}) == [
        "helpful_base",
        "koala",
        "oasst",
        "selfinstruct",
        "vicuna",
    ]
    assert all(one.answer for one in found.questions)


FAULTS = {
    "[]": "no rows|empty|nothing",
    '[{"a": 1}]': "three shapes",
    '[{"question_id": 1, "turns": "text"}]': "without question_id or turns",
    '[{"question_id": 1, "turns": ["x"], "reference": 4}]': "not a list of texts",
    '[{"question_id": 1, "turns": ["x"], "category": "math"}]': "no reference answers",
    '[{"question_id": 1, "turns": ["x"]}, {"question_id": 1, "turns": ["y"]}]': "two questions have the id '1'",
    '[{"question_id": 1, "choices": []}]': "answers without their questions",
    '[{"instruction": "x", "output_1": "a", "output_2": "b", "preference": 1}]': "--annotations",
    '[{"instruction": "", "dataset": "x"}]': "without a question",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_file_of_another_shape_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(TapirError) as caught:
        read_questions(tmp_path / "file.json")
    assert re.search(FAULTS[text], str(caught.value))
    assert "file.json" in str(caught.value)


def test_references_belong_to_mt_bench_and_have_fastchats_format(tmp_path: Path) -> None:
    path = written(tmp_path, MT_BENCH)
    with pytest.raises(TapirError, match="for MT-Bench's questions only"):
        read_questions(written(tmp_path, ALPACA, "alpaca.json"), str(path))
    with pytest.raises(TapirError, match="not a reference answer in FastChat's format"):
        read_questions(path, str(path))


GOOD = {"output_1": "a", "output_2": "bcd", "generator_1": "base", "generator_2": "model", "preference": 2.0}
ANNOTATION_FAULTS: dict[str, tuple[Any, str]] = {
    "an object": (GOOD, "not a list of annotations"),
    "no lengths": ([{**GOOD, "output_2": None}], "lengths are not known"),
    "no preference": ([{"output_1": "a", "output_2": "b"}], "without a preference"),
    "a word": ([{**GOOD, "preference": "model"}], "not a number"),
    "two models": ([GOOD, {**GOOD, "generator_2": "other"}], "of several models"),
}


@pytest.mark.parametrize("fault", ANNOTATION_FAULTS)
def test_annotations_that_cannot_be_used_are_refused(fault: str, tmp_path: Path) -> None:
    rows, said = ANNOTATION_FAULTS[fault]
    with pytest.raises(TapirError, match=said):
        read_annotations(written(tmp_path, rows))


def test_preferences_are_read_as_alpaca_eval_reads_them_and_written_back(tmp_path: Path) -> None:
    values = [0, 1, 1.25, 1.5, 2, None, 7]
    found = read_annotations(written(tmp_path, [{**GOOD, "preference": value} for value in values]))
    assert [row.preference for row in found] == [0.5, 0, 0.25, 0.5, 1, None, None]
    assert found[0].lengths == (3, 1)  # of the evaluated answer first
    write_annotations(tmp_path / "again.json", found)
    assert read_annotations(tmp_path / "again.json") == found
