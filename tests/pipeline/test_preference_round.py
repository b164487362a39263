"""The round after the last one, which trains on preference pairs: `train.preference: dpo`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fakes import QUIET, World, fake_backends, make_recipe, outputs, train

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.files import read_rows
from tapir_local.pipeline.dry_run import estimate_costs
from tapir_local.pipeline.loop import distill, recipe_steps, redo
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override, parse_recipe
from tapir_local.records import Example, Judgement, PreferencePair
from tapir_local.report.run_results import read_run_results
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import Backends
from tapir_local.stages.shipped_round import read_shipped_round


def on_pairs(folder: Path, **changes: Any) -> Recipe:
    return override(make_recipe(folder), {"train.preference": "dpo", "train.batch_size": 8, **changes})


def watched(trained: list[tuple[Any, ...]]) -> Backends:
    """Fake backends that record what each training starts from."""

    def watch(**job: Any) -> None:
        previous = job["previous"]
        trained.append((job["part"], previous and previous.parent.name, job["out"].parent.name))
        train(**job)

    return replace(fake_backends(World()), train=watch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, Recipe, list[tuple[Any, ...]]]:
    folder = tmp_path_factory.mktemp("pairs")
    run, trained = RunDir(folder, "fake"), list[tuple[Any, ...]]()
    recipe = on_pairs(folder)
    distill(recipe, run, watched(trained), QUIET)
    return run, recipe, trained


def command(run: RunDir, *words: str) -> Any:
    found = CliRunner().invoke(cli, [*words, "--cache", str(run.cache)])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def test_one_round_more_trains_on_the_pairs_of_all_rounds_from_the_last_adapter(finished) -> None:
    run, recipe, trained = finished
    assert trained[-1] == ("preference", "round-02", "round-03")
    assert [part for part, _, _ in trained[:-1]] == ["first", "middle", "last"]
    assert all(step.done for step in recipe_steps(run, recipe))
    pairs = read_rows(PreferencePair, run.round(3) / "train.jsonl")
    lost = {
        row.id for n in (1, 2) for row in read_rows(Judgement, run.round(n) / "judgements.jsonl") if row.student == 2
    }
    assert {pair.id for pair in pairs} == lost
    assert {(pair.completion[:5], pair.rejected, pair.difficulty) for pair in pairs} == {("right", "no idea", 7)}
    assert {pair.judged_in for pair in pairs} == {1, 2}
    shipped = read_shipped_round(run, recipe.rounds)
    assert shipped
    assert shipped["round"] == 3
    card = (run.path / "model" / "README.md").read_text()
    assert "| preference pairs | round 3, DPO; beta 0.1, learning rate 1e-05 |" in card


def test_commands_show_it_as_one_more_round(finished) -> None:
    run, _, _ = finished
    status = command(run, "status", "fake", "--json")
    assert status["state"] == "done"
    assert status["stages_done"] == status["stages"]
    assert [row["number"] for row in status["rounds"]] == [0, 1, 2, 3]
    assert [stage["name"] for stage in status["rounds"][3]["stages"]][:3] == ["pairs", "train", "export"]
    assert status["rounds"][3]["metrics"]["round"] == 3
    assert status["rounds"][3]["stages"][0]["note"].startswith(
        f"{len(read_rows(Example, run.round(3) / 'train.jsonl'))} pairs"
    )
    assert command(run, "runs", "--json")[0]["rounds"] == {"done": 3, "planned": 3}
    assert command(run, "show", "fake", "--json")["round"] == 3
    pair = read_rows(PreferencePair, run.round(3) / "train.jsonl")[0]
    rounds = {row["round"]: row for row in command(run, "why", "fake", pair.id, "--json")["rounds"]}
    assert (rounds[3]["use"], rounds[3]["why"]) == ("pair", "both answers are a preference pair")


def test_the_dataset_of_a_run_has_the_newest_answers_and_not_those_of_pairs(finished, tmp_path: Path) -> None:
    run, _, _ = finished
    newest: dict[str, str] = {}
    for number in range(3):
        newest |= {row.id: row.completion for row in read_rows(Example, run.round(number) / "train.jsonl")}
    out = tmp_path / "rows.jsonl"
    said = CliRunner().invoke(
        cli, ["dataset", "fake", str(out), "--format", "prompt-completion", "--cache", str(run.cache)]
    )
    assert said.exit_code == 0, said.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["id"]: row["completion"][0]["content"] for row in rows} == newest


def test_the_round_is_undone_and_made_again(finished, tmp_path: Path) -> None:
    run, recipe, _ = finished
    before = outputs(run)
    assert redo(run, 3, "pairs")[-1] == "round-03/pairs"
    assert not (run.round(3) / "train.jsonl").exists()
    assert (run.round(2) / "metrics.json").exists()
    assert distill(recipe, run, fake_backends(World()), QUIET) == 8
    assert outputs(run) == before
    assert estimate_costs(recipe, run) == []
    with pytest.raises(TapirError, match="no stage 'plan'"):
        redo(run, 3, "plan")


@pytest.mark.parametrize(("rounds", "advice"), [(3, "--round 3 --from pairs"), (1, "--round 2 --from answer")])
def test_the_number_of_rounds_stays_once_the_round_has_begun(finished, rounds: int, advice: str) -> None:
    run, recipe, _ = finished
    with pytest.raises(TapirError) as caught:
        distill(override(recipe, {"rounds": rounds}), run, fake_backends(World()), QUIET)
    assert "preference pairs" in caught.value.what
    assert "redo fake --round" in str(caught.value)
    before = outputs(run)
    assert "rounds: 2\n" in before["recipe.yaml"].decode()


def test_too_few_pairs_skip_the_round_with_a_notice(tmp_path: Path) -> None:
    run, recipe = RunDir(tmp_path, "fake"), on_pairs(tmp_path, **{"train.batch_size": 500})
    ended: list[tuple[str, str]] = []
    watch = replace(QUIET, ends=lambda step, taken: ended.append((step.name, taken["note"])))
    distill(recipe, run, fake_backends(World()), watch)
    assert [name for name, _ in ended[-2:]] == ["round-03/pairs", "end/ship"]
    assert ended[-2][1].startswith("round skipped: ")
    assert "fewer than train.batch_size (500)" in ended[-2][1]
    assert read_shipped_round(run, recipe.rounds) == {"round": 2, "why": "the last round"}
    assert sorted(path.name for path in run.round(3).iterdir()) == ["train.jsonl"]
    assert distill(recipe, run, fake_backends(World()), QUIET) == 0
    status = command(run, "status", "fake", "--json")
    assert (status["state"], status["stages_done"]) == ("done", status["stages"])
    assert command(run, "show", "fake", "--json")["round"] == 2
    assert [found.number for found in read_run_results([run])[0].rounds] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train.method": "full"}, "needs LoRA"),
        ({"train.backend": "unsloth"}, "trains with TRL"),
        ({"train.launcher": "accelerate launch"}, "in one process"),
        ({"rounds": 0}, "needs `rounds`"),
        ({"curriculum.name": "uniform"}, "judges the pool"),
        ({"curriculum.difficulty": False}, "judges the pool"),
        ({"judge": "reference"}, "measures likeness"),
    ],
)
def test_what_cannot_train_on_pairs_is_refused_before_anything_is_paid(tmp_path: Path, changes, complaint: str) -> None:
    with pytest.raises(TapirError, match="preference: dpo") as caught:
        on_pairs(tmp_path, **changes)
    assert complaint in str(caught.value)


def test_without_the_setting_nothing_changes() -> None:
    recipe = parse_recipe("name: x\nteacher: {kind: pocket}\n", "x.yaml")
    assert (recipe.train.preference, recipe.pairs_round, recipe.all_rounds) == ("none", None, 3)
