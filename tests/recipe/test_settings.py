"""The list of settings that people read: types in plain words, defaults as in a recipe, meanings in plain English."""

import pytest

from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.settings import section_meanings, setting_rows, settings

ROWS = {row.setting: row for row in setting_rows()}


@pytest.mark.parametrize(
    ("setting", "words", "default"),
    [
        ("name", "text", "run"),
        ("about", "text", '""'),
        ("rounds", "whole number, 0 or more", "3"),
        ("seeds.path", "path", "pocket"),
        ("seeds.max_rouge", "number, 0 to 1, or null", "0.9"),
        ("seeds.columns", "mapping", "{}"),
        ("student.concurrency", "whole number, 1 to 256, or auto", "32"),
        ("student.chat_template", "path or null", "null"),
        ("teacher.price.input", "number, 0 or more", "(required)"),
        ("train.method", "lora, qlora or full", "lora"),
        ("train.epochs", "number above 0", "2.0"),
        ("train.packing", "true or false", "false"),
        ("train.gradient_checkpointing", "auto, true or false", "auto"),
        ("train.launcher", "text or null", "null"),
        ("checker", "pocket, tasks or null", "null"),
        ("tasks.LABEL.share", "number, 0 or more", "(required)"),
    ],
)
def test_types_and_defaults_are_shown_in_plain_words(setting: str, words: str, default: str) -> None:
    assert (ROWS[setting].type, ROWS[setting].default_text) == (words, default)


def test_no_type_shows_the_inside_of_python() -> None:
    odd = [row for row in setting_rows() if set("[](){}<>_=|'") & set(row.type.replace("q4_k_m", "").replace("_", ""))]
    assert odd == []


def test_every_setting_and_every_section_has_a_meaning() -> None:
    assert all(row.meaning for row in setting_rows())
    assert {row.section for row in setting_rows()} <= section_meanings().keys()
    assert all(section_meanings().values())


def test_rows_are_the_settings_of_the_schema() -> None:
    assert [row.setting for row in setting_rows()] == [path for path, *_ in settings()]
    assert {row.setting.partition(".")[0] for row in setting_rows()} == Recipe.model_fields.keys()
