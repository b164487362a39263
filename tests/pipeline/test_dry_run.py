"""A dry run counts the calls that can be counted from the store and the files, and estimates the others."""

from pathlib import Path

import pytest
from fakes import QUIET, World, fake_backends, make_recipe

from tapir_local.errors import TapirError
from tapir_local.files import read_record, read_rows
from tapir_local.method import prompts
from tapir_local.pipeline.dry_run import CostEstimate, estimate_costs
from tapir_local.pipeline.loop import distill, redo
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override
from tapir_local.records import Example, Request, RoundPlan
from tapir_local.report.costs import no_calls_sentence
from tapir_local.run_dir import RunDir
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask

PRICED = {
    "teacher": {"kind": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1", "price": {"input": 1, "output": 2}}
}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return override(make_recipe(tmp_path), {"classifier.labelled": 30})


def by_step(found: list[CostEstimate]) -> dict[str, CostEstimate]:
    return {row.step: row for row in found}


def test_a_new_run_is_counted_up_to_the_first_student_and_estimated_beyond(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "cache", "fake")
    found = by_step(estimate_costs(recipe, run))
    assert [
        (found[name].calls, found[name].hits) for name in ("prepare/label", "prepare/holdout", "prepare/seeds")
    ] == [
        (30, 0),
        (10, 0),
        (50, 0),
    ]
    assert found["round-00/holdout-judge"].calls == 20
    assert found["round-01/judge"].calls == 2 * 50
    assert found["round-01/refine"].calls == 6  # alpha 0.3 of 20 rows
    assert "round-02/expand" in found
    assert not run.cache.exists()  # nothing was written


def test_what_the_store_has_is_not_counted_as_to_be_paid(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "cache", "fake")
    distill(override(recipe, {"rounds": 0}), RunDir(tmp_path / "other", "fake"), fake_backends(World()), QUIET)
    rows = read_rows(Example, tmp_path / "other" / "runs" / "fake" / "rows.jsonl")
    teacher = recipe.teacher
    wanted = [
        Request(prompts.answer_prompt(row.prompt), row.id, "seeds", 0, 0, teacher.temperature, teacher.max_tokens)
        for row in rows[:25]
    ]
    with Store(run.cache / "teacher.db") as store:
        ask(wanted, teacher, store, run="another")
    found = by_step(estimate_costs(recipe, run))
    answered = [found[name] for name in ("prepare/holdout", "prepare/seeds")]
    assert sum(row.hits or 0 for row in answered) == 25
    assert sum(row.to_pay for row in answered) == 35


def test_a_finished_run_asks_nothing_and_an_undone_stage_is_counted(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "cache", "fake")
    distill(recipe, run, fake_backends(World()), QUIET)
    assert estimate_costs(recipe, run) == []
    assert no_calls_sentence(recipe) == "The rest of this run sends no requests, so it costs nothing."
    redo(run, 2, "refine")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    plan = read_record(RoundPlan, run.round(2) / "plan.json")
    found = by_step(estimate_costs(recipe, run))
    kept = len([row for row in read_rows(Example, run.path / "seeds.jsonl") if row.id in plan.hard])
    assert found["round-02/refine"].exact
    assert found["round-02/refine"].calls >= kept
    assert set(found) == {"round-02/refine", "round-02/holdout-judge"}
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert after == before  # a dry run changes nothing


def test_a_judge_in_single_mode_is_not_asked_about_the_teachers_answers_again(recipe: Recipe, tmp_path: Path) -> None:
    alone = override(recipe, {"judge.mode": "single"})
    found = by_step(estimate_costs(alone, RunDir(tmp_path / "cache", "fake")))
    calls = {name: row.calls for name, row in found.items() if name.endswith("judge")}
    assert calls == {
        "prepare/untrained-judge": 20,
        "round-00/holdout-judge": 10,
        "round-01/judge": 100,
        "round-01/holdout-judge": 10,
        "round-02/judge": 53 + 6,  # three new rows in the pool, six answers that round 1 wrote or rewrote
        "round-02/holdout-judge": 10,
    }
    few = by_step(estimate_costs(override(alone, {"curriculum.pool": 10}), RunDir(tmp_path / "cache", "fake")))
    assert few["round-02/judge"].calls == 10 + 9  # a fifth of the pool was drawn before, and some rows are new


def test_money_is_known_where_the_price_is(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "cache", "fake")
    priced = by_step(estimate_costs(override(recipe, PRICED), run))["prepare/label"]
    assert priced.money == pytest.approx((priced.tokens_in + 2 * priced.tokens_out) / 1e6)
    unpriced = by_step(
        estimate_costs(override(recipe, {**PRICED, "teacher": {**PRICED["teacher"], "price": None}}), run)
    )
    assert unpriced["prepare/label"].money is None
    assert by_step(estimate_costs(recipe, run))["prepare/label"].money == 0  # the pocket teacher costs nothing


def test_another_recipe_than_the_run_began_with_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "cache", "fake")
    distill(override(recipe, {"rounds": 0}), run, fake_backends(World()), QUIET)
    with pytest.raises(TapirError, match="another recipe"):
        estimate_costs(override(recipe, {"curriculum.rows": 7}), run)


def test_a_classifier_without_its_predictions_is_named(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "cache", "fake")
    distill(recipe, run, fake_backends(World()), QUIET)
    redo(run, None, "tasks")
    (run.path / "classifier" / "predictions.jsonl").unlink()
    said = "prepare/tasks needs a file that does not exist: classifier/predictions.jsonl"
    attempts = {
        said: lambda: estimate_costs(recipe, run),
        "the output of prepare/classify was changed": lambda: distill(recipe, run, fake_backends(World()), QUIET),
    }
    for words, attempt in attempts.items():
        with pytest.raises(TapirError, match=words) as caught:
            attempt()
        assert "tapir-local redo fake --from classify" in str(caught.value)
