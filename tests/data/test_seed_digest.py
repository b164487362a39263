"""A run records a digest of its seeds, and is refused if they were edited."""

from pathlib import Path

import pytest
from fakes import QUIET, World, fake_backends, make_recipe

from tapir_local.errors import TapirError
from tapir_local.files import file_sha256
from tapir_local.pipeline.dry_run import estimate_costs
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override
from tapir_local.run_dir import RunDir


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Recipe, RunDir]:
    """A run that was interrupted after its seeds were read."""
    recipe, run, world = make_recipe(tmp_path), RunDir(tmp_path, "fake"), World()
    world.fail_at = 3
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, run, fake_backends(world), QUIET)
    return recipe, run


def test_the_digest_of_the_seeds_is_recorded(begun: tuple[Recipe, RunDir]) -> None:
    recipe, run = begun
    path = Path(recipe.seeds.path)
    kept = {"path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path), "rows": 60}
    assert run.record()["seeds"] == kept


def test_edited_seeds_are_refused_with_what_changed(begun: tuple[Recipe, RunDir]) -> None:
    recipe, run = begun
    path = Path(recipe.seeds.path)
    before = path.read_bytes()
    path.write_text('[{"instruction": "paint it"}]')
    said = rf"{path}: .*then {len(before):,} bytes, 60 rows, SHA-256 \w{{12}}; now 29 bytes, 1 row(.|\n)*--name"
    for start in (lambda: distill(recipe, run, fake_backends(World()), QUIET), lambda: estimate_costs(recipe, run)):
        with pytest.raises(TapirError, match=said):
            start()
    path.write_bytes(before)
    assert distill(recipe, run, fake_backends(World()), QUIET)


def test_moved_seeds_are_accepted(begun: tuple[Recipe, RunDir], tmp_path: Path) -> None:
    recipe, run = begun
    moved = Path(recipe.seeds.path).rename(tmp_path / "moved.json")
    recipe = override(recipe, {"seeds.path": str(moved)})
    assert distill(recipe, run, fake_backends(World()), QUIET)
    moved.unlink()  # the run has read its seeds already
    assert not distill(recipe, run, fake_backends(World()), QUIET)


def test_different_seeds_are_a_different_recipe(begun: tuple[Recipe, RunDir], tmp_path: Path) -> None:
    recipe, run = begun
    (tmp_path / "other.json").write_text('[{"instruction": "paint it"}]')
    with pytest.raises(TapirError, match=r"another recipe: seeds.path: .*other.json"):
        distill(override(recipe, {"seeds.path": str(tmp_path / "other.json")}), run, fake_backends(World()), QUIET)


def test_changed_files_of_a_folder_are_named(tmp_path: Path) -> None:
    recipe, run = make_recipe(tmp_path), RunDir(tmp_path, "fake")
    (tmp_path / "data").mkdir()
    file = Path(recipe.seeds.path).rename(tmp_path / "data" / "train.json")
    recipe = override(recipe, {"seeds.path": str(tmp_path / "data")})
    distill(recipe, run, fake_backends(World()), QUIET)
    file.write_bytes(file.read_bytes() + b"\n")
    (tmp_path / "data" / "more.json").write_text("[]")
    with pytest.raises(TapirError, match=r"changed: more\.json, train\.json"):
        distill(recipe, run, fake_backends(World()), QUIET)
