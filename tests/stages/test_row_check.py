"""Rows are checked against the student's chat template before anything is paid, exactly as training sees them."""

from dataclasses import replace
from pathlib import Path

import pytest
from models import CHATML, make_model
from templates import GEMMA, GRANITE, LLAMA2, MARKED, QWEN25, THOUGHTS

from tapir_local.data.chat_template import (
    merge_system_turns,
    render_student_prompt,
    render_training_text,
    supports_system_role,
)
from tapir_local.errors import TapirError
from tapir_local.records import Example, Message, Prompt
from tapir_local.resources import POCKET_STUDENT
from tapir_local.stages.row_check import (
    StudentFormat,
    fold_system_turns,
    model_max_length,
    placeholder_format,
    read_student_format,
    unfit_answers,
    unfit_prompts,
)
from tapir_local.training.job import token_rows

SYSTEM, USER, REPLY = Message("system", "Be brief."), Message("user", "What is 2 + 2?"), Message("assistant", "4")
# Like Qwen3's template: it separates an answer's reasoning from the rest and writes it again.


@pytest.fixture(scope="module")
def pocket() -> StudentFormat:
    return read_student_format(POCKET_STUDENT, 512)


def reasons(student: StudentFormat, *prompts: Prompt) -> list[str]:
    return [found.reason if found else "" for found in unfit_prompts(student, prompts)]


@pytest.mark.parametrize(
    ("template", "takes"),
    [(CHATML, True), (LLAMA2, True), (QWEN25, True), (GEMMA, False), (GRANITE, False), (MARKED, False)],
)
def test_a_template_without_a_system_role_is_known_whether_it_refuses_or_drops_it(template: str, takes: bool) -> None:
    assert supports_system_role(template) is takes


@pytest.mark.parametrize("template", [GEMMA, GRANITE])
def test_system_turns_are_folded_into_the_users_on_every_side(template: str) -> None:
    prompt = (SYSTEM, USER)
    assert merge_system_turns(template, prompt) == (Message("user", "Be brief.\n\nWhat is 2 + 2?"),)
    assert "Be brief.\n\nWhat is 2 + 2?" in render_student_prompt(template, prompt)
    assert render_training_text(template, prompt, "Four.")[0] == render_student_prompt(template, prompt)


def test_folding_leaves_what_a_template_takes_and_every_other_turn() -> None:
    assert merge_system_turns(CHATML, (SYSTEM, USER)) == (SYSTEM, USER)
    long = (SYSTEM, USER, REPLY, Message("system", "Longer."), Message("system", ""), USER)
    assert [turn.content for turn in merge_system_turns(GEMMA, long)] == [
        "Be brief.\n\nWhat is 2 + 2?", "4", "Longer.\n\nWhat is 2 + 2?"
    ]  # fmt: skip
    assert merge_system_turns(GEMMA, (USER, REPLY)) == (USER, REPLY)


def test_rows_are_folded_once_and_counted(pocket: StudentFormat) -> None:
    rows = [Example("a", (SYSTEM, USER)), Example("b", (USER,))]
    found, count = fold_system_turns(replace(pocket, template=GEMMA), rows)
    assert (count, found[0].prompt[0].role, found[1]) == (1, "user", rows[1])
    assert fold_system_turns(pocket, rows) == (rows, 0)
    broken = replace(pocket, template="{% for m in messages %}")
    assert fold_system_turns(broken, rows) == (rows, 0)
    assert all("refused by the chat template" in said for said in reasons(broken, (USER,), (SYSTEM, USER)))


def test_prompts_that_the_template_refuses_or_that_are_empty_say_why(pocket: StudentFormat) -> None:
    student = replace(pocket, template=LLAMA2, eos="</s>", stops=("</s>",))
    said = reasons(student, (USER,), (USER, USER), (Message("user", " \n"),), (), (USER, REPLY, USER))
    assert said[0] == said[4] == ""
    assert said[1].startswith("refused by the chat template: turns user, user: Conversation roles must alternate")
    assert said[2] == said[3] == "no instruction"


def test_a_prompt_must_leave_room_for_an_answer(pocket: StudentFormat) -> None:
    """A prompt that leaves exactly the minimum is accepted; one token more is not."""
    prompts = [(Message("user", "7 " * n),) for n in range(1, 300)]
    sizes = [len(ids) for ids in pocket.encode([render_student_prompt(pocket.template, prompt) for prompt in prompts])]
    student = replace(pocket, length=sizes[100] + pocket.min_answer)
    found = unfit_prompts(student, prompts)
    assert [unfit is None for unfit in found] == [size <= sizes[100] for size in sizes]
    assert found[-1]
    assert "leaves no room for an answer in student.max_length" in found[-1].kind
    assert found[-1].detail == f"{sizes[-1]:,} tokens, {student.length:,} allowed"


def test_a_row_is_too_long_exactly_where_training_would_cut_it(pocket: StudentFormat) -> None:
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
        ("add them\n</think>\n\n4", ""),  # the template puts <think> before every answer
        ("The tag </think> closes a thought.", "changes the assistant's words"),
        ("<think>\r\nadd\r\n</think>\r\n4", "changes the assistant's words"),
        ("<think>a</think>x<think>b</think>y", "changes the assistant's words"),
    ],
)
def test_an_answer_that_the_template_changes_is_found(pocket: StudentFormat, answer: str, said: str) -> None:
    student = replace(pocket, template=THOUGHTS, stops=("<|im_end|>",))
    [found] = unfit_answers(student, [((USER,), answer)])
    assert said in (found.kind if found else "")
    assert bool(found) is bool(said)


def test_the_models_own_length_counts_if_it_is_shorter(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")  # 512 positions
    assert model_max_length(model) == 512
    student = read_student_format(model, 2048)
    assert (student.length, student.template) == (512, CHATML)
    [found] = unfit_prompts(student, [(Message("user", "word " * 700),)])
    assert found
    assert "the length that the student was made for" in found.kind
    assert read_student_format(model, 100, GEMMA).limit == "student.max_length"
    assert model_max_length(tmp_path) > 1 << 40


def test_a_folder_without_a_tokenizer_or_a_template_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="file is missing"):
        read_student_format(tmp_path, 512)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(TapirError, match="tokenizer cannot be read"):
        read_student_format(tmp_path, 512)


def test_the_placeholder_format_accepts_every_conversation() -> None:
    assert reasons(placeholder_format(2048), (USER,), (SYSTEM, USER), (USER, USER)) == ["", "", ""]
