"""One bad row costs one row: it is left out as early as possible, with its reason, and the run continues."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from fakes import QUIET, STUDENT, World, fake_backends, generate, make_recipe, outputs, with_ask
from templates import GEMMA, LLAMA2, THOUGHTS

from tapir_local.commands.main import cli
from tapir_local.data.dataset import Draft
from tapir_local.errors import TapirError
from tapir_local.files import read_rows
from tapir_local.pipeline.loop import distill, redo
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override
from tapir_local.records import Answer, Completion, Example, Judgement, Request, instruction_of
from tapir_local.report.status import round_report, run_status, unusable_report
from tapir_local.report.why import explain_row
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import Backends
from tapir_local.stages.row_check import StudentFormat
from tapir_local.unusable import Unusable, read_unusable

LONG = "very " * 3000


SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def with_rows(recipe: Recipe, folder: Path, *rows: list[dict[str, str]], **changes: object) -> Recipe:
    """The recipe with its sixty seeds as conversations, and with these rows."""
    seeds = [{"messages": [user(row["instruction"])]} for row in json.loads((folder / "seeds.json").read_text())]
    (folder / "more.json").write_text(json.dumps(seeds + [{"messages": row} for row in rows]))
    return override(recipe, {"seeds.path": str(folder / "more.json"), **changes})


def student(world: World, template: str, **changes: object) -> Backends:
    """Backends whose student has this chat template."""
    found: StudentFormat = replace(
        STUDENT, template=template, eos="</s>", stops=("</s>", "<end_of_turn>", "<|im_end|>")
    )
    return replace(fake_backends(world), student_format=lambda: replace(found, **changes))  # type: ignore[arg-type]


def left(run: RunDir, step: str) -> list[Unusable]:
    return [row for row in read_unusable(run) if row.step == step]


def test_unusable_rows_are_known_before_the_teacher_is_asked(recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    odd = [[user("sum of two"), user("and three")], [user(f"paint {LONG}")]]
    world, chosen = World(), with_rows(recipe, tmp_path, *odd)
    world.fail_at = 0
    with pytest.raises(KeyboardInterrupt):
        distill(chosen, run, student(world, LLAMA2), QUIET)
    assert world.asked == []
    [refused, long] = left(run, "prepare/read")
    assert (refused.id, refused.kind) == ("seed-00061", "refused by the chat template")
    assert "must alternate" in refused.detail
    assert long.kind == "the prompt leaves no room for an answer in student.max_length"
    assert len(read_rows(Example, run.path / "rows.jsonl")) == 60
    assert "2 left out" in run.record()["stages"]["prepare/read"]["note"]
    world.fail_at = None
    distill(chosen, run, student(world, LLAMA2), QUIET)
    assert not {request.row for request in world.asked} & {refused.id, long.id}


def test_a_template_that_takes_no_row_stops_the_run_before_anything_is_paid(recipe: Recipe, run: RunDir) -> None:
    world = World()
    with pytest.raises(TapirError, match=r"60 of 60 rows .* cannot be used: 60 refused by the chat template"):
        distill(recipe, run, student(world, "{{ raise_exception('nothing suits me') }}"), QUIET)
    assert world.asked == []


def test_system_turns_are_folded_once_and_every_stage_sees_the_same_row(
    recipe: Recipe, run: RunDir, tmp_path: Path
) -> None:
    odd = [[SYSTEM, user(f"sum {n} {n}")] for n in range(900, 904)]
    distill(with_rows(recipe, tmp_path, *odd), run, student(World(), GEMMA), QUIET)
    files = [run.path / name for name in ("rows.jsonl", "seeds.jsonl", "holdout.jsonl")]
    files += [run.round(number) / "train.jsonl" for number in range(3)]
    assert {turn.role for file in files for row in read_rows(Example, file) for turn in row.prompt} == {"user"}
    rows = {row.id: row for row in read_rows(Example, run.path / "rows.jsonl")}
    assert rows["seed-00061"].prompt[0].content == "Be brief.\n\nsum 900 900"
    assert "4 system turns moved into the user turn" in run.record()["stages"]["prepare/read"]["note"]
    assert read_unusable(run) == []


def test_answers_of_the_file_are_checked_when_it_is_read(run: RunDir, tmp_path: Path) -> None:
    rows = [{"instruction": f"do {n} {n * n} things", "output": f"{n} and {n * n}"} for n in range(40)]
    rows[7]["output"], rows[8]["output"], rows[9]["output"] = "<think>add</think>4", LONG, ""
    (tmp_path / "own.json").write_text(json.dumps(rows))
    own = {
        "teacher.kind": "recorded",
        "judge.kind": "reference",
        "limits.unusable": 0.1,
        "seeds.holdout": 5,
        "rounds": 1,
    }
    chosen = override(make_recipe(tmp_path), {"seeds.path": str(tmp_path / "own.json"), **own})
    distill(chosen, run, student(World(), THOUGHTS), QUIET)
    assert {row.id: row.kind for row in left(run, "prepare/read")} == {
        "seed-00008": "the chat template changes the assistant's words",
        "seed-00009": "longer than student.max_length",
        "seed-00010": "no answer in the seed file",
    }
    with pytest.raises(TapirError, match=r"3 of 40 rows \(8%\) cannot be used"):
        distill(
            override(chosen, {"limits.unusable": 0.05}),
            RunDir(tmp_path / "b", "x"),
            student(World(), THOUGHTS),
            QUIET,
        )


def spoiled(rows: Callable[[Request], bool], text: str) -> Callable[[Request, Answer], Answer]:
    """A change of answers: those to these rows get another text."""
    return lambda request, answer: replace(answer, text=text) if rows(request) else answer


def first_of(stage: str) -> Callable[[Request], bool]:
    """A test whether a request is about the first row that a stage asks about."""
    rows = list[str]()

    def is_first(request: Request) -> bool:
        if request.stage == stage:
            rows.append(request.row)
        return request.stage == stage and request.row == rows[0]

    return is_first


@pytest.mark.parametrize(
    ("text", "kind"), [("half </think> told", "changes the assistant's words"), (LONG, "longer than")]
)
def test_a_teachers_answer_that_cannot_be_trained_on_costs_its_row(
    text: str, kind: str, recipe: Recipe, run: RunDir
) -> None:
    base = student(World(), THOUGHTS)
    made = replace(with_ask(World(), spoiled(first_of("seeds"), text)), student_format=base.student_format)
    distill(recipe, run, made, QUIET)
    [lost] = left(run, "prepare/seeds")
    assert kind in lost.kind
    trained = {row.id for number in range(3) for row in read_rows(Example, run.round(number) / "train.jsonl")}
    assert lost.id not in trained


def test_an_answer_in_the_holdout_is_compared_and_not_trained_on(recipe: Recipe, run: RunDir) -> None:
    change = spoiled(lambda request: request.stage == "holdout", "<think>a</think>b right")
    base = student(World(), THOUGHTS)
    distill(recipe, run, replace(with_ask(World(), change), student_format=base.student_format), QUIET)
    assert len(read_rows(Example, run.path / "holdout.jsonl")) == 10
    assert read_unusable(run) == []


def test_one_row_of_few_is_never_too_many_and_refinements_are_checked_too(recipe: Recipe, run: RunDir) -> None:
    seen = list[str]()

    def change(request: Request, answer: Answer) -> Answer:
        if request.stage != "refine" or request.round != 1 or (seen and request.row not in seen):
            return answer
        seen.append(request.row)
        return replace(answer, text="half </think> told")

    base = student(World(), THOUGHTS)
    distill(recipe, run, replace(with_ask(World(), change), student_format=base.student_format), QUIET)
    assert [row.id for row in left(run, "round-01/refine")] == seen[:1]
    assert "1 left out" in run.record()["stages"]["round-01/refine"]["note"]


def test_a_draft_that_leaves_no_room_is_rejected_with_its_reason(recipe: Recipe, run: RunDir) -> None:
    change = spoiled(
        lambda request: request.stage == "expand" and request.row.endswith("1"),
        f"<new_instruction>{LONG}</new_instruction>",
    )
    distill(recipe, run, with_ask(World(), change), QUIET)
    drafts = read_rows(Draft, run.round(1) / "expanded.jsonl") + read_rows(Draft, run.round(2) / "expanded.jsonl")
    rejected = [draft for draft in drafts if LONG.strip() in instruction_of(draft.example.prompt)]
    assert rejected
    assert all("leaves no room for an answer" in draft.reason for draft in rejected)


def test_a_rewritten_answer_that_the_template_changes_is_rejected(recipe: Recipe, run: RunDir) -> None:
    text = "<new_instruction>other words</new_instruction><new_answer>a</think>b</new_answer>"
    change = spoiled(lambda request: request.stage == "expand", text)
    base = student(World(), THOUGHTS)
    made = replace(with_ask(World(), change), student_format=base.student_format)
    distill(override(recipe, {"curriculum.name": "reflection"}), run, made, QUIET)
    drafts = read_rows(Draft, run.round(1) / "expanded.jsonl")
    assert {draft.reason for draft in drafts} == {"the chat template changes the assistant's words"}


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Answer("", "refused", False, why="400: flagged"), "unjudged: refused by the server"),
        (Answer("", "content_filter", False, why="unsafe"), "unjudged: refused by the server"),
        (Answer("an 8", "stop", False), "unjudged: no score"),
        (Answer("8 or", "length", False), "unjudged: cut at judge.max_tokens"),
    ],
)
def test_a_row_that_the_judge_does_not_judge_is_recorded(reply: Answer, kind: str, recipe: Recipe, run: RunDir) -> None:
    world, victim = World(), list[str]()

    def change(request: Request, answer: Answer) -> Answer:
        row = request.row.partition("#")[0]
        if not request.stage.endswith("judge") or (victim and row not in victim):
            return answer
        victim.append(row)
        return reply

    distill(recipe, run, with_ask(world, change), QUIET)
    lost = [row for row in read_unusable(run) if row.kind.startswith("unjudged")]
    assert {row.kind for row in lost} == {kind}
    assert {row.id for row in lost} == set(victim)
    assert reply.why in lost[0].detail
    again = [request for request in world.asked if request.row == f"{victim[0]}#0" and len(request.messages) == 4]
    assert bool(again) is (reply.finish not in ("refused", "content_filter"))


@pytest.mark.parametrize("finish", ["too_long", "refused"])
def test_the_judge_is_not_asked_about_a_row_that_the_student_could_not_be_asked(
    finish: str, recipe: Recipe, run: RunDir
) -> None:
    world = World()

    def unable(*, ids, on_result, **rest):  # type: ignore[no-untyped-def]
        def changed(row: Completion) -> Completion:
            return replace(row, text="", finish=finish) if row.id == ids[0] else row  # type: ignore[arg-type]

        return [changed(row) for row in generate(ids=ids, on_result=lambda row: on_result(changed(row)), **rest)]

    tolerant = override(recipe, {"judge.max_unjudged": 0.2})
    distill(tolerant, run, replace(fake_backends(world), generate=unable), QUIET)
    [first, *_] = read_rows(Completion, run.round(0) / "holdout-answers.jsonl")
    assert not any(request.row.startswith(first.id) for request in world.asked if request.stage == "holdout-judge")
    judged = {row.id: row for row in read_rows(Judgement, run.round(0) / "holdout-judgements.jsonl")}
    assert judged[first.id].reason.startswith("no answer of the student")
    assert "1 row could not be asked" in run.record()["stages"]["round-00/holdout-answer"]["note"]
    assert left(run, "round-00/holdout-judge")[0].kind == "unjudged: no answer of the student"


def test_many_unreadable_labels_are_warned_of(recipe: Recipe, run: RunDir) -> None:
    change = spoiled(lambda request: request.stage == "label" and request.row.endswith("1"), "hm")
    distill(recipe, run, with_ask(World(), change), QUIET)
    assert "`tapir-local calls list --run fake --stage label`" in run.record()["stages"]["prepare/label"]["note"]


def test_a_label_that_the_server_refuses_is_not_asked_for_again(recipe: Recipe, run: RunDir) -> None:
    world, is_first = World(), first_of("label")
    refused = Answer("", "refused", False, why="400: flagged")
    made = with_ask(world, lambda request, answer: refused if is_first(request) else answer)
    distill(recipe, run, made, QUIET)
    asked = [request.row for request in world.asked if request.stage == "label"]
    assert asked.count(asked[0]) == 1


# What is shown


@pytest.fixture
def lost(recipe: Recipe, run: RunDir, tmp_path: Path) -> RunDir:
    """A finished run with a row left out in `read`, one in `seeds`, and a duplicate."""
    odd = [[user("sum of two"), user("and three")], [user("paint 0 0 0 and 0")]]
    base = student(World(), LLAMA2)
    made = replace(with_ask(World(), spoiled(first_of("seeds"), LONG)), student_format=base.student_format)
    distill(with_rows(recipe, tmp_path, *odd), run, made, QUIET)
    return run


def test_show_and_status_count_the_rows_left_out(lost: RunDir) -> None:
    found = unusable_report(lost)
    assert list(found["by_step"]) == ["prepare/read", "prepare/seeds"]
    assert found["rows"][0]["id"] == "seed-00061"
    assert run_status(lost)["unusable"] == found["by_step"]
    assert round_report(lost, 1)["unusable"] == {}
    cache = ["--cache", str(lost.cache)]
    output = CliRunner().invoke(cli, ["show", "fake", "--unusable", *cache], catch_exceptions=False).stdout
    assert "seed-00061" in output
    assert "refused by the chat template" in " ".join(output.split())
    data = CliRunner().invoke(cli, ["show", "fake", "--unusable", "--json", *cache], catch_exceptions=False).stdout
    assert json.loads(data) == found
    said = " ".join(CliRunner().invoke(cli, ["status", "fake", *cache], catch_exceptions=False).stdout.split())
    assert "2 rows left out: 1 refused by the chat template, 1 longer than student.max_length" in said
    assert CliRunner().invoke(cli, ["show", "fake", "--unusable", "--round", "1", *cache]).exit_code == 2


def test_show_of_a_run_that_left_nothing_out(recipe: Recipe, run: RunDir) -> None:
    distill(recipe, run, fake_backends(World()), QUIET)
    output = CliRunner().invoke(cli, ["show", "fake", "--unusable", "--cache", str(run.cache)], catch_exceptions=False)
    assert "No row was left out" in output.stdout


def test_why_says_where_a_row_was_left_out(lost: RunDir) -> None:
    ids = ("seed-00061", left(lost, "prepare/seeds")[0].id, "seed-00062")
    first, later, twin = (explain_row(lost, id) for id in ids)
    assert first["place"].startswith("left out in prepare/read: refused by the chat template: turns user, user")
    assert "and three" in first["instruction"]
    assert first["rounds"] == later["rounds"] == twin["rounds"] == []
    assert later["left_out"][0]["kind"] == "longer than student.max_length"
    assert twin["place"] == "read from the seed file and left out: duplicate, of seed-00001"
    output = CliRunner().invoke(cli, ["why", "fake", "seed-00061", "--cache", str(lost.cache)], catch_exceptions=False)
    assert "where it was left out" in output.stdout


def test_redo_forgets_and_the_run_comes_back_the_same(recipe: Recipe, tmp_path: Path) -> None:
    run, world = RunDir(tmp_path, "fake"), World()
    chosen = with_rows(recipe, tmp_path, [user("sum of two"), user("and three")])
    distill(chosen, run, student(world, LLAMA2), QUIET)
    before = outputs(run)
    redo(run, None, "read")
    assert read_unusable(run) == []
    distill(chosen, run, student(world, LLAMA2), QUIET)
    assert outputs(run) == before
