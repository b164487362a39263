"""What needs the user's permission: commands that a recipe runs, and keys that it sends to its hosts."""

from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.recipe.text import parse_recipe
from tapir_local.resources import recipe_files
from tapir_local.terminal.trust import find_risks, require_trust

ABROAD = "teacher: {model: m, base_url: 'https://other.example/v1', KEY}"
JUDGED = "teacher: pocket\njudge: {model: m, base_url: 'https://other.example/v1', KEY}"


@pytest.mark.parametrize(
    ("text", "does"),
    [
        ("teacher: pocket\ntrain: {launcher: sh x.sh}", ["runs the command: sh x.sh"]),
        ("teacher: pocket\nexport: {converter: /tmp/x.py}", ["runs the Python script or folder: /tmp/x.py"]),
        ("teacher: pocket\ntrain: {report_to: tensorboard}", []),
        (
            "teacher: pocket\ntrain: {report_to: wandb}",
            ["sends the loss and the settings of each training to wandb's server"],
        ),
        (ABROAD.replace("KEY", "api_key_env: AWS"), ["sends the environment variable AWS to other.example"]),
        (JUDGED.replace("KEY", "api_key_env: AWS"), ["sends the environment variable AWS to other.example"]),
        (ABROAD.replace("KEY", "api_key_file: /etc/x"), ["sends what the file /etc/x holds to other.example"]),
        (ABROAD.replace("KEY", "timeout: 5"), []),
        (ABROAD.replace("KEY", "api_key_env: AWS").replace("https://other.example", "http://127.0.0.1:8000"), []),
        ("teacher: {model: m, api_key_env: MINE}", []),
    ],
)
def test_the_risks_of_a_recipe(text: str, does: list[str]) -> None:
    assert [risk.does for risk in find_risks(parse_recipe(text, "r"))] == does


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: path.stem)
def test_no_shipped_recipe_has_a_risk(path: Path) -> None:
    assert find_risks(parse_recipe(path.read_text(encoding="utf-8"), path.name)) == []


def test_each_risk_is_asked_about_once(tmp_path: Path) -> None:
    recipe = parse_recipe(ABROAD.replace("KEY", "api_key_env: AWS") + "\ntrain: {launcher: sh}", "r")
    asked = []

    def agree(found: list[object]) -> bool:
        asked.append(len(found))
        return len(asked) > 1

    with pytest.raises(TapirError, match="runs the command: sh; it sends the environment variable AWS"):
        require_trust(recipe, tmp_path / "r.yaml", {}, tmp_path, agree)
    for _ in range(2):
        require_trust(recipe, tmp_path / "r.yaml", {}, tmp_path, agree)
    moved = parse_recipe(ABROAD.replace("KEY", "api_key_env: AWS").replace("other", "third"), "r")
    require_trust(moved, tmp_path / "r.yaml", {}, tmp_path, agree)
    assert asked == [2, 2, 1]


def test_an_unreadable_file_of_permissions_allows_nothing(tmp_path: Path) -> None:
    (tmp_path / "trusted.json").write_text("[")
    with pytest.raises(TapirError):
        require_trust(
            parse_recipe("teacher: pocket\ntrain: {launcher: sh}", "r"), tmp_path / "r", {}, tmp_path, lambda _: False
        )
