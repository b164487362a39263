"""The commands as a person types them: what they say, where, and with which exit code."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import cli
from tapir_local.calls_cli import calls
from tapir_local.errors import TapirError

ROOT = Path(__file__).parent.parent


def tapir(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in its own process."""
    command = [sys.executable, str(ROOT / "cli.py"), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


def refused(*words: str, cwd: Path | None = None, code: int = 1) -> str:
    """What is said of a wrong command: on stderr, no traceback, the exit code."""
    out = tapir(*words, cwd=cwd)
    assert out.returncode == code, out.stderr
    assert "Traceback" not in out.stderr
    assert out.stdout == ""
    return out.stderr


@pytest.mark.parametrize("system", ["darwin", "win32", "freebsd14"])
def test_another_system_than_linux_is_refused_in_one_sentence(system: str) -> None:
    code = f"import sys; sys.argv = ['tapir-local', 'recipes']; import cli; sys.platform = {system!r}; cli.main()"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert out.returncode == 1
    assert out.stderr.startswith(f"error: tapir-local runs on Linux only, and this is {system}\n")
    assert out.stdout == ""


@pytest.mark.parametrize("name", sorted(cli.cli.commands))
def test_every_command_has_an_example_and_stands_in_the_readme(name: str) -> None:
    text = cli.cli.commands[name].get_help(click.Context(cli.cli.commands[name], info_name=name))
    assert "Example:" in text
    assert f"tapir-local {name}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(calls.commands))
def test_every_command_on_the_store_has_an_example_and_stands_in_the_readme(name: str) -> None:
    text = calls.commands[name].get_help(click.Context(calls.commands[name], info_name=name))
    assert f"  tapir-local calls {name}" in text.partition("Example:")[2]
    assert f"tapir-local calls {name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in (ROOT / "tapir_local").glob("*.py") if path.name not in readme]
    assert missing == ["__init__.py"]


def test_recipes_are_found_from_another_folder(tmp_path: Path) -> None:
    names = [row["name"] for row in json.loads(tapir("recipes", "--json", cwd=tmp_path).stdout)]
    assert {"quickstart", "recorded"} <= set(names)
    assert tapir("recipes", "quickstart", cwd=tmp_path).stdout == (ROOT / "recipes" / "quickstart.yaml").read_text()


def test_settings_are_listed_with_their_meaning() -> None:
    rows = json.loads(tapir("recipes", "--settings", "--json").stdout)
    assert {row["setting"] for row in rows} >= {
        "rounds",
        "train.learning_rate",
        "teacher.base_url",
        "judge.max_unjudged",
    }


def test_doctor_reports_as_data() -> None:
    rows = json.loads(tapir("doctor", "--json").stdout)
    assert {row["name"] for row in rows} >= {"Python", "C++ compiler", "GPU", "disk"}


def test_doctor_says_that_the_compiler_is_missing_where_it_is_needed(tmp_path: Path) -> None:
    """Without llama_cpp on the path and without a compiler there is one thing to do."""
    code = (
        "import sys\nsys.modules['llama_cpp'] = None\n"
        "from tapir_local.doctor import compiler\nfound = compiler()\nprint(found.ok, found.fix)"
    )
    env = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert out.startswith("False Install one")


def test_make_says_that_there_is_no_compiler(tmp_path: Path) -> None:
    """The same Makefile, in a folder without an environment, on a PATH with Python and no compiler."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").touch()
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, target in {"python3": sys.executable, "make": "/usr/bin/make", "sh": "/bin/sh"}.items():
        (tools / name).symlink_to(target)
    out = subprocess.run(
        ["make", "install"], capture_output=True, text=True, cwd=tmp_path, env={"PATH": str(tools)}, check=False
    )
    assert out.returncode != 0
    assert "there is no C++ compiler" in out.stderr


def test_an_unknown_recipe_names_those_there_are() -> None:
    assert "quickstart" in refused("distill", "nope.yaml")


def test_a_broken_recipe_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("teacher: pocket\ntrain: {epoch: 3}\n")
    assert "train.epoch: unknown setting (did you mean epochs?)" in refused("distill", "my.yaml", cwd=tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file of seeds"),
        ("", "no rows in it"),
        ("[1, 2", "not JSON"),
        ('{"instruction": "a"}\n{"output": "b"}\n', "line 2: a row of no known form; its keys: output"),
    ],
)
def test_bad_seeds_are_refused_and_leave_a_run_that_can_go_on(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "seeds.json").write_text(text)
    words = ("distill", "recorded", "--seeds", "seeds.json", "--cache", "cache")
    assert said in refused(*words, cwd=tmp_path)
    assert said in refused(*words, cwd=tmp_path)


def test_a_name_with_a_path_in_it() -> None:
    assert "name" in refused("distill", "quickstart", "--name", "../x")


def test_an_unknown_run_or_round_or_command(tmp_path: Path) -> None:
    assert "no run 'nope'" in refused("status", "nope", "--cache", str(tmp_path))
    assert "no run yet" in refused("status", "--cache", str(tmp_path))
    assert "No such command 'dance'" in refused("dance", code=2)
    assert "No such option" in refused("status", "--colour", code=2)


def test_a_negative_number_of_rounds() -> None:
    assert "-1" in refused("distill", "--rounds", "-1", code=2)


def test_help_says_what_the_teacher_is() -> None:
    assert "a programme, no LLM" in " ".join(tapir("--help").stdout.split())


def test_a_wheel_carries_the_recipes_the_pocket_files_and_the_commands(tmp_path: Path) -> None:
    """Built without a network from the checkout, then read as an installed package from another folder."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*pip, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    code = "import sys; sys.argv = ['tapir-local', 'recipes', '--json']; import cli; cli.main()"
    env = {**os.environ, "PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=True)
    assert {"quickstart", "recorded"} <= {row["name"] for row in json.loads(out.stdout)}
    assert (place / "tapir_local" / "assets" / "pocket_student" / "model.safetensors").is_file()
    assert (place / "tapir_local" / "assets" / "pocket_seeds.json").is_file()


@pytest.mark.parametrize("words", [["seeds.path=nowhere.json"], ["name=other", "seeds.path=nowhere.json"]])
def test_a_setting_that_has_an_option_of_its_own_can_be_set_without_it(words: list[str], tmp_path: Path) -> None:
    changes = [word for text in words for word in ("--set", text)]
    with pytest.raises(TapirError, match=r"nowhere\.json: there is no such file of seeds"):
        CliRunner().invoke(cli.cli, ["distill", "--cache", str(tmp_path), *changes], catch_exceptions=False)


def test_an_option_is_stronger_than_the_same_setting() -> None:
    recipe = cli.load_recipe("quickstart", ["rounds=7", "name=a"], rounds=2, name=None, seeds=None, random_seed=None)
    assert (recipe.rounds, recipe.name) == (2, "a")
