"""A run ships model/ of its last round, complete or absent, with a card that states only known facts."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from fakes import QUIET, World, fake_backends, make_recipe

from tapir_local.errors import TapirError
from tapir_local.files import remove_path
from tapir_local.pipeline.loop import distill, list_steps, redo
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override, parse_recipe, validate_recipe
from tapir_local.records import Progress
from tapir_local.report.status import run_status
from tapir_local.run_dir import RunDir
from tapir_local.stages.ship import NOT_STATED, describe_endpoint, escape_cell, front_matter, published_recipe

FILES = ["Modelfile", "README.md", "SHA256SUMS", "gate.json", "recipe.yaml", "student.gguf"]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path)


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> RunDir:
    return done(recipe, RunDir(tmp_path, "fake"))


def done(recipe: Recipe, run: RunDir) -> RunDir:
    distill(recipe, run, fake_backends(World()), QUIET)
    return run


def contents(run: RunDir) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run.path / "model").iterdir())}


def test_model_has_the_last_rounds_student_and_its_files(run: RunDir) -> None:
    found = contents(run)
    assert list(found) == FILES
    assert found["student.gguf"] == (run.round(2) / "student.gguf").read_bytes()
    assert yaml.safe_load(found["recipe.yaml"])["seeds"]["path"] == "seeds.json"


def test_sha256sum_finds_every_file_as_it_was(run: RunDir) -> None:
    asked = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    said = subprocess.run(asked, cwd=run.path / "model", capture_output=True, text=True, check=True).stdout
    assert said == "".join(f"{name}: OK\n" for name in FILES if name != "SHA256SUMS")
    (run.path / "model" / "README.md").write_text("better than its teacher")
    assert subprocess.run(asked, cwd=run.path / "model", capture_output=True, check=False).returncode == 1


def test_status_shows_the_stage(run: RunDir) -> None:
    (stage,) = run_status(run)["end"]
    assert (stage["name"], stage["done"]) == ("ship", True)
    remove_path(run.path / "model")
    assert run_status(run)["state"] != "unknown"
    assert not run_status(run)["end"][0]["done"]


def test_a_deleted_model_is_made_again_with_the_same_bytes(recipe: Recipe, run: RunDir) -> None:
    before = contents(run)
    remove_path(run.path / "model")
    assert distill(recipe, run, fake_backends(World()), QUIET) == 1
    assert contents(run) == before


def test_another_number_of_rounds_makes_it_again(recipe: Recipe, run: RunDir) -> None:
    done(override(recipe, {"rounds": 3}), run)
    assert contents(run)["student.gguf"] == (run.round(3) / "student.gguf").read_bytes()
    assert b"| 3 |" in contents(run)["README.md"]
    assert distill(override(recipe, {"rounds": 1}), run, fake_backends(World()), QUIET) == 1
    assert contents(run)["student.gguf"] == (run.round(1) / "student.gguf").read_bytes()


def test_there_is_no_model_while_more_rounds_run(recipe: Recipe, run: RunDir) -> None:
    world = World()
    world.fail_at = 30
    with pytest.raises(KeyboardInterrupt):
        distill(override(recipe, {"rounds": 3}), run, fake_backends(world), QUIET)
    assert not (run.path / "model").exists()


def test_redo_of_anything_before_it_removes_it(run: RunDir) -> None:
    assert redo(run, 2, "evaluate") == ["end/ship", "round-02/evaluate"]
    assert not (run.path / "model").exists()


def test_it_alone_can_be_redone(recipe: Recipe, run: RunDir) -> None:
    assert redo(run, None, "ship") == ["end/ship"]
    assert distill(recipe, run, fake_backends(World()), QUIET) == 1


def test_another_card_is_accepted_and_makes_it_again(recipe: Recipe, run: RunDir) -> None:
    assert b"CC BY 4.0" not in contents(run)["README.md"]
    assert distill(override(recipe, {"card.data_license": "CC BY 4.0"}), run, fake_backends(World()), QUIET) == 1
    assert b"| the seeds | CC BY 4.0 |" in contents(run)["README.md"]


CHANGED = {
    **{"budget.calls": 10**6, "limits.unusable": 0.5, "judge.max_unjudged": 0.5, "train.micro_batch_size": 2},
    **{"teacher.concurrency": 3, "teacher.timeout": 9, "student.concurrency": 2, "train.checkpoint_minutes": 0},
}


@pytest.mark.parametrize("path", CHANGED)
def test_what_a_model_does_not_depend_on_leaves_it_as_it_is(path: str, recipe: Recipe, run: RunDir) -> None:
    before = (run.path / "model").stat().st_ino, contents(run)
    assert distill(override(recipe, {path: CHANGED[path]}), run, fake_backends(World()), QUIET) == 0
    assert ((run.path / "model").stat().st_ino, contents(run)) == before


def test_another_description_makes_it_again(recipe: Recipe, run: RunDir) -> None:
    assert distill(override(recipe, {"about": "Better words."}), run, fake_backends(World()), QUIET) == 1
    assert b"Better words." in contents(run)["README.md"]


def test_what_is_published_names_no_folder_of_the_makers_machine(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    changes = {
        **{"student.path": str(tmp_path / "models/mine"), "classifier.model": str(tmp_path / "encoder")},
        **{"student.chat_template": str(tmp_path / "t.jinja"), "export.converter": str(tmp_path / "convert.py")},
        **{"train.launcher": f"{tmp_path}/bin/accelerate launch", "judge.gguf": str(tmp_path / "judge.gguf")},
    }
    run = done(override(recipe, changes), RunDir(tmp_path, "fake"))
    for name, data in contents(run).items():
        assert str(tmp_path).encode() not in data, name
    output = contents(run)["README.md"].decode()
    assert "| base | mine |" in output
    assert "| seeds | seeds.json: " in output
    assert "the GGUF judge.gguf" in output
    published = parse_recipe(contents(run)["recipe.yaml"].decode(), "published")
    assert (published.train.launcher, published.student.chat_template) == ("accelerate launch", "t.jinja")
    assert distill(override(recipe, changes), run, fake_backends(World()), QUIET) == 0


def test_what_is_published_holds_no_password_and_no_query(recipe: Recipe) -> None:
    endpoint = {"kind": "openai", "model": "m", "base_url": "https://me:secret@host:8000/v1?key=hidden"}
    kept = validate_recipe({"teacher": endpoint}, "kept", kept=True)  # newer recipes are refused
    assert "https://host:8000/v1\n" in published_recipe(kept)
    assert describe_endpoint(kept.teacher) == "m at https://host:8000/v1"
    assert not {"secret", "hidden"} & set(re.findall(r"\w+", published_recipe(kept)))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_cut_leaves_none_and_the_same_command_makes_it(recipe: Recipe, tmp_path: Path, error: BaseException) -> None:
    from dataclasses import replace

    def cut(*, student: Path, out: Path, progress: Progress) -> None:
        (out / "student.gguf").write_text("half")
        raise error

    run = RunDir(tmp_path, "fake")
    with pytest.raises((KeyboardInterrupt, TapirError)):
        distill(recipe, run, replace(fake_backends(World()), ship=cut), QUIET)
    assert not list_steps(run, 2)[-1].done
    assert distill(recipe, run, fake_backends(World()), QUIET) == 1
    assert list(contents(run)) == FILES
    assert not (run.path / "model.partial").exists()


def test_the_card_says_what_is_not_known(run: RunDir) -> None:
    text = contents(run)["README.md"].decode()
    said = text.partition("## Licenses and terms")[2].partition("##")[0]
    assert said.count(NOT_STATED) == 5
    note = "; the card does not state card.license, card.base_license, card.data_license, card.terms, card.language"
    assert run.record()["stages"]["end/ship"]["note"].endswith(note)
    head = yaml.safe_load(text.split("---")[1])
    assert head == {"tags": ["gguf", "tapir-local"]}


def test_the_card_repeats_what_the_recipe_states_and_no_more(recipe: Recipe, tmp_path: Path) -> None:
    stated = {"license": "apache-2.0", "base_license": "llama2", "terms": "none | known", "language": "en"}
    whole = override(recipe, {f"card.{name}": text for name, text in stated.items()})
    text = contents(done(whole, RunDir(tmp_path, "fake")))["README.md"].decode()
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert "| the base | llama2 |" in text
    assert r"| none \| known |" in text
    assert text.count(NOT_STATED) == 1


def test_the_card_has_every_rounds_metrics_with_their_intervals(run: RunDir) -> None:
    text = contents(run)["README.md"].decode()
    rows = [line for line in text.splitlines() if line.startswith(("| 0 |", "| 1 |", "| 2 |"))]
    rate = run_status(run)["rounds"][2]["metrics"]
    assert len(rows) == 3
    low, high = rate["win_rate_interval"]
    assert f"| {rate['win_rate']:.1%} | {low:.1%} to {high:.1%} |" in rows[2]
    assert "600 texts tokenized" in text
    assert "| training | lora; epochs per round: 2;" in text


def test_a_base_on_the_hub_is_named_for_it_and_a_folder_is_not(recipe: Recipe) -> None:
    assert "base_model: Qwen/Qwen3-4B" in front_matter(override(recipe, {"student.path": "Qwen/Qwen3-4B"}))
    assert "base_model" not in front_matter(override(recipe, {"student.path": "/models/qwen"}))


def test_a_folder_with_a_name_like_the_hubs_is_a_folder(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(override(recipe, {"student.path": "models/qwen"}))


def test_a_cell_stays_one_cell() -> None:
    assert escape_cell("a | b\n\nc") == r"a \| b c"
