"""Settings that were renamed are read under their old names: in recipes, with --set, and in the recipes of old runs."""

import pytest

from tapir_local.errors import TapirError
from tapir_local.recipe.old_names import OLD_NAMES
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.settings import settings
from tapir_local.recipe.text import diff_recipes, override, parse_changes, parse_recipe, to_yaml
from tapir_local.recipe.yaml import read_yaml

OLD = "teacher: pocket\nstudent: {parallel: 7}\ncard: {licence: no, base_licence: MIT, data_licence: 1.10}"
NEW = "teacher: pocket\nstudent: {concurrency: 7}\ncard: {license: no, base_license: MIT, data_license: 1.10}"


def test_old_names_lead_to_settings_that_exist() -> None:
    paths = {path for path, *_ in settings()}
    assert set(OLD_NAMES.values()) <= paths
    assert not set(OLD_NAMES) & paths


def test_a_recipe_with_old_names_is_the_recipe_with_new_ones() -> None:
    assert parse_recipe(OLD, "r") == parse_recipe(NEW, "r")
    assert parse_recipe(OLD, "r").card.license == "no"  # a word is read as the type of the setting under its new name
    assert parse_recipe(OLD.replace("{licence", "{<<: {licence: x}, licence"), "r").card.license == "no"


@pytest.mark.parametrize("old", OLD_NAMES)
def test_old_names_are_read_on_the_command_line(old: str) -> None:
    section, _, name = old.partition(".")
    for change in (f"{old}=5", f"{section}={{{name}: 5}}"):
        recipe = override(parse_recipe("teacher: pocket", "r"), parse_changes([change]))
        assert str(getattr(recipe, section).model_dump()[OLD_NAMES[old].partition(".")[2]]) == "5"
    assert override(parse_recipe("teacher: pocket", "r"), {old: "5"}) == recipe


@pytest.mark.parametrize("old", OLD_NAMES)
def test_a_setting_under_both_names_is_given_twice(old: str) -> None:
    section, _, name = old.partition(".")
    new = OLD_NAMES[old]
    with pytest.raises(TapirError, match=f"{new}: given twice"):
        parse_recipe(f"teacher: pocket\n{section}: {{{name}: 5, {new.partition('.')[2]}: 5}}", "r")
    with pytest.raises(TapirError, match="given twice"):
        parse_changes([f"{old}=5", f"{new}=5"])


def test_a_run_begun_under_the_old_names_goes_on_under_the_new_ones() -> None:
    """The kept recipe of an old run names every setting of its version."""
    kept = to_yaml(parse_recipe(NEW, "r"))
    for old, new in OLD_NAMES.items():
        kept = kept.replace(f"  {new.partition('.')[2]}:", f"  {old.partition('.')[2]}:", 1)
    assert "  parallel: 7\n" in kept
    assert "  licence: 'no'\n" in kept
    old = parse_recipe(kept, "recipe.yaml", kept=True)
    assert old == parse_recipe(to_yaml(parse_recipe(NEW, "r")), "recipe.yaml", kept=True)
    assert diff_recipes(old, parse_recipe(NEW, "r"), read_yaml(kept, Recipe, "recipe.yaml")) == []
