"""A run of fake backends and its recipe."""

from pathlib import Path

import pytest
from fakes import make_recipe

from tapir_local.recipe.schema import Recipe
from tapir_local.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path, "fake")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path)
