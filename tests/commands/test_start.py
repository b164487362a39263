"""What is printed before a first run: recipes, settings by section, cost estimates as JSON; errors in plain words."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import refused

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.recipe.text import override, parse_recipe
from tapir_local.resources import download_model


def printed(*words: str) -> object:
    return json.loads(CliRunner().invoke(cli, list(words), catch_exceptions=False).stdout)


def test_settings_are_listed_by_prefix_without_words_of_the_libraries():
    rows = printed("recipes", "--settings", "curriculum.max", "--json")
    assert [row["setting"] for row in rows] == ["curriculum.max_opening", "curriculum.max_rouge"]
    assert not [
        row for row in printed("recipes", "--settings", "--json") if "FieldInfo" in row["type"] + row["meaning"]
    ]
    with pytest.raises(TapirError, match="no setting begins with 'nope'") as error:
        CliRunner().invoke(cli, ["recipes", "--settings", "nope"], catch_exceptions=False)
    assert "curriculum" in error.value.fix


def test_a_recipe_is_printed_as_json_with_every_setting():
    found = printed("recipes", "quickstart", "--json")
    assert (found["name"], found["settings"]["teacher"]["kind"]) == ("quickstart", "pocket")
    assert found["settings"]["curriculum"]["drafts"] == 3  # a default


def test_a_cost_estimate_is_printed_as_json(tmp_path: Path):
    found = printed(
        "distill", "recorded", "--set", "seeds.path=pocket", "--dry-run", "--json", "--cache", str(tmp_path)
    )
    assert found == {"run": "recorded", "stages": [], "all": {**dict.fromkeys(NUMBERS, 0), "money": 0}}


NUMBERS = ("calls", "to_pay", "tokens_in", "tokens_out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train.learning_rate": "high"}, "train.learning_rate: must be a number, not 'high'"),
        ({"rounds": 1.5}, "rounds: must be a whole number, not 1.5"),
        ({"train.packing": "perhaps"}, "train.packing: must be true or false, not 'perhaps'"),
        ({"curriculum.mfd": 1}, r"curriculum.mfd: unknown setting \(did you mean .*mfd_threshold\?\)"),
        ({"teacher.api_key": "sk-1"}, "a key does not belong in a recipe"),
    ],
)
def test_a_wrong_setting_is_explained_in_plain_words(change, words):
    with pytest.raises(TapirError, match=words) as error:
        override(parse_recipe("teacher: pocket", "r"), change)
    assert "sk-1" not in str(error.value)


def test_a_wrong_number_on_the_command_line_is_called_no_whole_number():
    assert "'three' is not a whole number." in refused("distill", "--rounds", "three", code=2)


def test_the_help_names_the_real_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TAPIR_LOCAL_CACHE", str(tmp_path / "c"))
    shown = "".join(CliRunner().invoke(cli, ["status", "--help"]).stdout.split())
    assert f"[default:{tmp_path}/c]" in shown


def test_a_download_that_is_forbidden_names_the_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TapirError, match="because HF_HUB_OFFLINE is set"):
        download_model("no-such-owner/no-such-model", None)
