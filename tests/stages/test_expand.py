"""Drafts are screened, counted, and asked for only while enough of them are kept; new answers are checked."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import QUIET, World, fake_backends, inner, make_recipe

from tapir_local.data.dataset import Draft
from tapir_local.errors import TapirError
from tapir_local.files import read_record, read_rows
from tapir_local.method import prompts
from tapir_local.pipeline.dry_run import estimate_costs
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override, parse_recipe
from tapir_local.records import Answer, Example, Judgement, Progress, Request, RoundPlan
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import Backends
from tapir_local.stages.expand import stop_reason, summarize_drafts, warn_few_rows
from tapir_local.unusable import read_unusable

Reply = Callable[[Request], str | None]


def saying(world: World, reply: Reply) -> Backends:
    """Backends whose teacher and judge reply with `reply`, or as the world does if it returns None."""

    def ask(requests: Sequence[Request], progress: Progress) -> list[Answer]:
        found = world.ask(requests, progress)
        said = [reply(request) for request in requests]
        return [
            answer if text is None else replace(answer, text=text) for answer, text in zip(found, said, strict=True)
        ]

    return replace(fake_backends(world), teacher=ask, judge=ask)


def run_of(folder: Path, reply: Reply, world: World | None = None, **changes: object) -> RunDir:
    """A run of one round after the baseline."""
    folder.mkdir(exist_ok=True)
    changed = {f"curriculum.{key}": value for key, value in changes.items()}
    recipe = override(make_recipe(folder), {"rounds": 1, **changed})
    run = RunDir(folder, "fake")
    distill(recipe, run, saying(world or World(), reply), QUIET)
    return run


def drafts_of(run: RunDir) -> list[Draft]:
    return read_rows(Draft, run.round(1) / "expanded.jsonl")


def note(run: RunDir, stage: str) -> str:
    return str(run.record()["stages"][f"round-01/{stage}"]["note"])


def new(text: str) -> Reply:
    """Replies with the text as the new instruction, # replaced by the row and the draw number."""
    return lambda request: (
        f"<new_instruction>{text.replace('#', f'{request.row} {request.draw}')}</new_instruction>"
        if request.messages[0].content == prompts.EXPAND
        else None
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "Math: arithmetic, algebra, geometry, statistics and word problems with numbers",
            "repeats words of the request",
        ),
        ("Summarize the following article about #:", "the text to work on is missing"),
        ("You have a headache and # is blurry.", "sets no task"),
    ],
)
def test_useless_instructions_are_rejected_with_their_reason_and_no_more_are_asked_for(
    text: str, reason: str, tmp_path: Path
) -> None:
    world = World()
    run = run_of(tmp_path, new(text), world, rows=40, alpha=0.8, expand_share=1.0)
    planned = read_record(RoundPlan, run.round(1) / "plan.json")
    assert planned.to_write > 10
    assert {draft.reason for draft in drafts_of(run)} == {reason}
    assert sum(request.stage == "expand" for request in world.asked) == planned.to_write  # the first attempt of two
    count = planned.to_write
    assert note(run, "expand") == (
        f"0 new instructions, {count} drafts rejected ({count} {reason}), {count} missing; "
        f"no more asked for, because {count} of {count} drafts were rejected"
    )
    rows = len(read_rows(Example, run.round(1) / "train.jsonl"))
    assert f"WARNING: {rows} of the 40 wanted rows (curriculum.rows), less than half" in note(run, "refine")


def test_of_many_drafts_the_first_fifty_decide(tmp_path: Path) -> None:
    world = World()
    run = run_of(tmp_path, new("Summarize the article about #:"), world, rows=200, alpha=0.8, children=9)
    assert read_record(RoundPlan, run.round(1) / "plan.json").to_write > 60
    assert sum(request.stage == "expand" for request in world.asked) == 50
    assert "no more asked for, because 50 of 50 drafts were rejected" in note(run, "expand")


def test_an_estimate_counts_all_drafts_and_not_the_first_fifty_alone(tmp_path: Path) -> None:
    class Stopped(World):
        def ask(self, requests: Sequence[Request], progress: Progress) -> list[Answer]:
            if requests[0].stage == "expand":
                raise KeyboardInterrupt
            return super().ask(requests, progress)

    changes = {"rounds": 1, "curriculum.rows": 200, "curriculum.alpha": 0.8, "curriculum.children": 9}
    recipe, run = override(make_recipe(tmp_path), changes), RunDir(tmp_path, "fake")
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, run, fake_backends(Stopped()), QUIET)
    found = next(row for row in estimate_costs(recipe, run) if row.step == "round-01/expand")
    assert found.calls == found.to_pay == read_record(RoundPlan, run.round(1) / "plan.json").to_write > 60
    assert found.tokens_out == pytest.approx(60 * found.calls)


def test_the_new_rows_of_a_task_with_one_opening_are_limited(tmp_path: Path) -> None:
    reply = new("Count all red birds # and #.")
    run = run_of(tmp_path, reply, rows=40, alpha=0.8, max_rouge=1.0, drafts=1)
    kept = Counter(draft.example.task for draft in drafts_of(run) if not draft.reason)
    assert max(kept.values()) == 3
    assert {draft.reason for draft in drafts_of(run)} == {"", "begins as too many others do: 'count all red birds'"}
    again = run_of(tmp_path / "again", reply, rows=40, alpha=0.8, max_rouge=1.0, drafts=1, max_opening=None)
    assert not any(draft.reason for draft in drafts_of(again))


def test_no_parent_has_more_new_rows_than_the_recipe_says(tmp_path: Path) -> None:
    for children in (1, 2):
        run = run_of(tmp_path / str(children), lambda request: None, rows=100, alpha=0.9, children=children)
        kept = Counter(draft.example.parent for draft in drafts_of(run) if not draft.reason)
        assert max(kept.values()) == children


def test_rejected_drafts_are_asked_of_other_parents(tmp_path: Path) -> None:
    def reply(request: Request) -> str | None:
        odd = request.messages[0].content == prompts.EXPAND and int(request.row[-1]) % 2
        return "<new_instruction>The sky is blue.</new_instruction>" if odd else None

    drafts = drafts_of(run_of(tmp_path, reply, rows=12))
    asked = Counter(draft.example.parent for draft in drafts)
    assert any(draft.reason for draft in drafts)
    assert set(asked.values()) == {1}


def test_the_teacher_checks_drafts_where_the_recipe_asks_for_it(tmp_path: Path) -> None:
    world = World()
    run = run_of(tmp_path, lambda request: None, world, rows=40, alpha=0.8, check_drafts=True)
    checks = [request for request in world.asked if request.messages[0].content == prompts.CHECK]
    unfit = [draft for draft in drafts_of(run) if draft.reason == "the teacher finds it not of its task"]
    assert {request.stage for request in checks} == {"expand"}
    assert len(checks) == sum(not draft.reason for draft in drafts_of(run)) + len(unfit)
    assert all(draft.example.prompt[0].content.endswith("3") for draft in unfit)


def test_a_check_that_cannot_be_read_keeps_the_draft_and_is_counted(tmp_path: Path) -> None:
    def reply(request: Request) -> str | None:
        return "It seems fine." if request.messages[0].content == prompts.CHECK else None

    run = run_of(tmp_path, reply, rows=20, check_drafts=True)
    kept = sum(not draft.reason for draft in drafts_of(run))
    assert kept > 0
    assert f"{kept} unchecked: the teacher's reply could not be read" in note(run, "expand")


@pytest.mark.parametrize("refine", ["hard", "all", "off"])
def test_new_answers_below_the_floor_are_left_out_where_the_recipe_asks_for_it(refine: str, tmp_path: Path) -> None:
    def reply(request: Request) -> str | None:
        text = request.messages[-1].content
        if request.stage != "refine" or request.messages[0].content != prompts.JUDGE_SINGLE:
            return None
        digits = sum(int(letter) for letter in inner(text, "instruction") if letter.isdigit())
        return json.dumps({"score": 4 if digits % 3 == 0 else 9})

    world = World()
    run = run_of(tmp_path, reply, world, rows=40, alpha=0.5, check_answers=True, refine=refine)
    left = [row for row in read_unusable(run) if row.step == "round-01/refine"]
    scored = [request for request in world.asked if request.messages[0].content == prompts.JUDGE_SINGLE]
    rows = read_rows(Example, run.round(1) / "train.jsonl")
    assert {row.reason for row in left} == {"new answer below curriculum.teacher_floor: 4 of 6"}
    assert not {row.id for row in left} & {row.id for row in rows}
    assert len(left) > 0.05 * len(rows)  # they do not count against limits.unusable
    old = {row.id: row for row in read_rows(Example, run.path / "seeds.jsonl")}
    changed = [row for row in rows if old.get(row.id) != row]
    assert len(scored) == len(changed) + len(left)
    assert f"{len(left)} left out ({len(left)} new answer below curriculum.teacher_floor, see unusable.jsonl)" in note(
        run, "refine"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("judge: reference\ncurriculum: {check_answers: true}", "needs a judge that scores answers"),
        ("curriculum: {name: uniform, check_drafts: true}", "`check_drafts` needs the curriculum `tapir` or `lion`"),
        (
            "curriculum: {name: reflection, check_answers: true}",
            "`check_answers` needs the curriculum `tapir` or `lion`",
        ),
    ],
)
def test_a_check_without_a_judge_or_new_rows_is_refused(text: str, said: str) -> None:
    with pytest.raises(TapirError, match=said):
        parse_recipe(f"teacher: pocket\n{text}", "r.yaml")


def test_where_no_row_can_be_trained_on_the_reasons_are_counted(tmp_path: Path) -> None:
    def reply(request: Request) -> str | None:
        return json.dumps({"answer_1": 2, "answer_2": 2}) if request.stage == "judge" else None

    with pytest.raises(TapirError) as caught:
        run_of(tmp_path, reply)
    assert "of 50 judged rows 50 whose teacher's own answer is below teacher_floor" in str(caught.value)
    assert "use another teacher or judge" in str(caught.value)
    judged = read_rows(Judgement, RunDir(tmp_path, "fake").round(1) / "judgements.jsonl")
    assert {row.teacher for row in judged} == {2}
    plan = read_record(RoundPlan, RunDir(tmp_path, "fake").round(1) / "plan.json")
    assert plan.notes[0].startswith("no row is hard and none is easy: 50 whose teacher's own answer")


def test_reasons_are_counted_by_kind_the_commonest_first() -> None:
    row = Example("a", ())
    drafts = [Draft(row, f"near-duplicate: ROUGE-L 0.{n}") for n in (75, 86, 91)]
    drafts += [Draft(row, "sets no task")] * 2 + [Draft(row, text) for text in ("x", "y")] + [Draft(row)]
    assert summarize_drafts(drafts, 2) == (
        "1 new instruction, 7 drafts rejected (3 near-duplicate, 2 sets no task, 1 x), 2 missing"
    )


def test_a_few_drafts_or_a_fifth_of_good_ones_are_worth_asking_for_more() -> None:
    good, bad = Draft(Example("a", ())), Draft(Example("a", ()), "sets no task")
    assert stop_reason([bad] * 9) == ""
    assert stop_reason([bad] * 15 + [good] * 5) == ""
    assert stop_reason([bad] * 16 + [good] * 4) == "no more asked for, because 16 of 20 drafts were rejected"


def test_a_round_of_few_rows_or_few_steps_is_warned_of() -> None:
    recipe = Recipe.model_validate({"teacher": "pocket", "curriculum": {"rows": 40}, "train": {"epochs": 2}})
    assert warn_few_rows(recipe, 12) == [
        "WARNING: 12 of the 40 wanted rows (curriculum.rows), less than half",
        "only 2 training steps for 12 rows (train.batch_size is 16), too few to learn much: "
        "lower it, or raise train.epochs",
    ]
    assert len(warn_few_rows(recipe, 20)) == 1
    assert warn_few_rows(override(recipe, {"train.batch_size": 4}), 20) == []
    assert warn_few_rows(override(recipe, {"train.packing": True}), 20) == []
