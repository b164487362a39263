"""What the student's chat template makes of a row is known before it is paid for, and exactly as training sees it."""

from dataclasses import replace
from pathlib import Path

import pytest
from models import CHATML, make_model
from templates import GEMMA, GRANITE, LLAMA2, MARKED, QWEN25, THOUGHTS

from tapir_local.data.chat_template import asked_text, folded, takes_system, training_text
from tapir_local.errors import TapirError
from tapir_local.pipeline.student_text import (
    StudentText,
    any_student,
    fold_rows,
    longest_of,
    read_student_text,
    unfit_answers,
    unfit_prompts,
)
from tapir_local.records import Example, Message, Prompt
from tapir_local.resources import POCKET_STUDENT
from tapir_local.training.job import token_rows

SYSTEM, USER, REPLY = Message("system", "Be brief."), Message("user", "What is 2 + 2?"), Message("assistant", "4")
# As Qwen3's: an answer's thoughts are taken apart and written anew.


@pytest.fixture(scope="module")
def pocket() -> StudentText:
    return read_student_text(POCKET_STUDENT, 512)


def reasons(student: StudentText, *prompts: Prompt) -> list[str]:
    return [found.reason if found else "" for found in unfit_prompts(student, prompts)]


@pytest.mark.parametrize(
    ("template", "takes"),
    [(CHATML, True), (LLAMA2, True), (QWEN25, True), (GEMMA, False), (GRANITE, False), (MARKED, False)],
)
def test_a_template_without_a_system_role_is_known_whether_it_refuses_or_drops_it(template: str, takes: bool) -> None:
    assert takes_system(template) is takes


@pytest.mark.parametrize("template", [GEMMA, GRANITE])
def test_system_turns_are_folded_into_the_users_on_every_side(template: str) -> None:
    prompt = (SYSTEM, USER)
    assert folded(template, prompt) == (Message("user", "Be brief.\n\nWhat is 2 + 2?"),)
    assert "Be brief.\n\nWhat is 2 + 2?" in asked_text(template, prompt)
    assert training_text(template, prompt, "Four.")[0] == asked_text(template, prompt)


def test_folding_leaves_what_a_template_takes_and_every_other_turn() -> None:
    assert folded(CHATML, (SYSTEM, USER)) == (SYSTEM, USER)
    long = (SYSTEM, USER, REPLY, Message("system", "Longer."), Message("system", ""), USER)
    assert [turn.content for turn in folded(GEMMA, long)] == [
        "Be brief.\n\nWhat is 2 + 2?", "4", "Longer.\n\nWhat is 2 + 2?"
    ]  # fmt: skip
    assert folded(GEMMA, (USER, REPLY)) == (USER, REPLY)


def test_rows_are_folded_once_and_counted(pocket: StudentText) -> None:
    rows = [Example("a", (SYSTEM, USER)), Example("b", (USER,))]
    found, count = fold_rows(replace(pocket, template=GEMMA), rows)
    assert (count, found[0].prompt[0].role, found[1]) == (1, "user", rows[1])
    assert fold_rows(pocket, rows) == (rows, 0)
    broken = replace(pocket, template="{% for m in messages %}")
    assert fold_rows(broken, rows) == (rows, 0)
    assert all("refused by the chat template" in said for said in reasons(broken, (USER,), (SYSTEM, USER)))


def test_prompts_that_the_template_refuses_or_that_are_empty_say_why(pocket: StudentText) -> None:
    student = replace(pocket, template=LLAMA2, eos="</s>", stops=("</s>",))
    said = reasons(student, (USER,), (USER, USER), (Message("user", " \n"),), (), (USER, REPLY, USER))
    assert said[0] == said[4] == ""
    assert said[1].startswith("refused by the chat template: turns user, user: Conversation roles must alternate")
    assert said[2] == said[3] == "no instruction"


def test_a_prompt_must_leave_room_for_an_answer(pocket: StudentText) -> None:
    """The prompt whose room is just enough is taken, one token more is not."""
    prompts = [(Message("user", "7 " * n),) for n in range(1, 300)]
    sizes = [len(ids) for ids in pocket.encode([asked_text(pocket.template, prompt) for prompt in prompts])]
    student = replace(pocket, length=sizes[100] + pocket.room)
    found = unfit_prompts(student, prompts)
    assert [unfit is None for unfit in found] == [size <= sizes[100] for size in sizes]
    assert found[-1]
    assert "leaves no room for an answer in student.max_length" in found[-1].kind
    assert found[-1].detail == f"{sizes[-1]:,} tokens, {student.length:,} allowed"


def test_a_row_is_too_long_exactly_where_training_would_cut_it(pocket: StudentText) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(POCKET_STUDENT)
    rows = [Example(str(n), (Message("user", f"Add {n} and {n * n}."),), f"{n} " * (1 + n % 40)) for n in range(60)]
    texts = [(row.prompt, row.completion) for row in rows]
    sizes = [len(row["input_ids"]) for row in token_rows(rows, tokenizer, 1000).rows]
    for length in sorted(set(sizes)):
        unfit = unfit_answers(replace(pocket, length=length), texts)
        assert [found is not None for found in unfit] == [size > length for size in sizes]
        assert {found.kind for found in unfit if found} <= {"longer than student.max_length"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("4", ""),
        ("<think>\nadd them\n</think>\n\n4", ""),
        ("<think>add them</think>4", "changes the assistant's words"),
        ("add them\n</think>\n\n4", ""),  # the template only puts <think> before it, as it does everywhere
        ("The tag </think> closes a thought.", "changes the assistant's words"),
        ("<think>\r\nadd\r\n</think>\r\n4", "changes the assistant's words"),
        ("<think>a</think>x<think>b</think>y", "changes the assistant's words"),
    ],
)
def test_an_answer_that_the_template_changes_is_found(pocket: StudentText, answer: str, said: str) -> None:
    student = replace(pocket, template=THOUGHTS, stops=("<|im_end|>",))
    [found] = unfit_answers(student, [((USER,), answer)])
    assert said in (found.kind if found else "")
    assert bool(found) is bool(said)


def test_the_models_own_length_counts_where_it_is_shorter(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")  # 512 positions
    assert longest_of(model) == 512
    student = read_student_text(model, 2048)
    assert (student.length, student.template) == (512, CHATML)
    [found] = unfit_prompts(student, [(Message("user", "word " * 700),)])
    assert found
    assert "the length that the student was made for" in found.kind
    assert read_student_text(model, 100, GEMMA).limit == "student.max_length"
    assert longest_of(tmp_path) > 1 << 40


def test_a_folder_without_a_tokenizer_or_a_template_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="file is missing"):
        read_student_text(tmp_path, 512)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(TapirError, match="tokenizer cannot be read"):
        read_student_text(tmp_path, 512)


def test_a_student_that_is_not_here_takes_every_conversation() -> None:
    assert reasons(any_student(2048), (USER,), (SYSTEM, USER), (USER, USER)) == ["", "", ""]
