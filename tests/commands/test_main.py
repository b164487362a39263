"""The commands as typed by a user: messages, stdout and stderr, and exit codes."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from command_line import ROOT, refused, tapir, tapir_on_terminal

from tapir_local import __version__
from tapir_local.commands.calls import calls_group
from tapir_local.commands.distill import recipe_changes, resolve_recipe
from tapir_local.commands.main import cli
from tapir_local.errors import TapirError


@pytest.mark.parametrize("system", ["darwin", "win32", "freebsd14"])
def test_a_system_other_than_linux_is_refused_in_one_sentence(system: str) -> None:
    code = f"import sys; sys.argv = ['tapir-local', 'recipes']; import cli; sys.platform = {system!r}; cli.main()"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert out.returncode == 1
    assert out.stderr.startswith(f"error: tapir-local runs on Linux only, and this is {system}\n")
    assert out.stdout == ""


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_an_example_and_is_documented(name: str) -> None:
    text = cli.commands[name].get_help(click.Context(cli.commands[name], info_name=name))
    assert "Example:" in text
    assert f"tapir-local {name}" in (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(calls_group.commands))
def test_every_command_on_the_store_has_an_example_and_is_documented(name: str) -> None:
    text = calls_group.commands[name].get_help(click.Context(calls_group.commands[name], info_name=name))
    assert f"  tapir-local calls {name}" in text.partition("Example:")[2]
    assert f"tapir-local calls {name}" in (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


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


def test_doctor_says_that_llama_cpp_was_built_for_another_processor(tmp_path: Path) -> None:
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    code = "from tapir_local.doctor.doctor import check_llama\nfound = check_llama()\nprint(found.ok, found.found)"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout.strip() == "False ends with SIGILL"


def test_doctor_reports_a_missing_compiler_if_it_is_needed(tmp_path: Path) -> None:
    """Without llama_cpp and without a compiler the advice is to install one."""
    code = (
        "import sys\nsys.modules['llama_cpp'] = None\n"
        "from tapir_local.doctor.doctor import check_compiler\nfound = check_compiler()\nprint(found.ok, found.fix)"
    )
    env = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert out.startswith("False Install one")


def test_make_reports_a_missing_compiler(tmp_path: Path) -> None:
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


# In place of Python: makes an environment whose pip and python write down their arguments and CMAKE_ARGS.
FAKE_PYTHON = """#!/bin/sh
[ "$2" = venv ] || exit 0
mkdir -p .venv/bin
for tool in pip python; do
  printf '#!/bin/sh\\necho "%s $* $CMAKE_ARGS" >>log\\n' $tool >.venv/bin/$tool
  chmod +x .venv/bin/$tool
done
"""


def make_for_gpu(folder: Path, *tools: str) -> subprocess.CompletedProcess[str]:
    """Run `make install GPU=1` on the Makefile in a folder, with a fake Python and these other tools on the PATH."""
    (folder / "Makefile").write_text((ROOT / "Makefile").read_text())
    if not (folder / "pyproject.toml").exists():
        (folder / "pyproject.toml").write_text('"llama-cpp-python==1.2.3",\n')
    place = folder / "bin"
    if not place.exists():
        place.mkdir()
        for name in ("make", "sh", "sed", "mkdir", "chmod", "touch", "ls"):
            (place / name).symlink_to(shutil.which(name) or name)
        for name in ("python3", *tools):
            (place / name).write_text(FAKE_PYTHON)
            (place / name).chmod(0o755)
    command, env = ["make", "install", "GPU=1"], {"PATH": str(place)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, check=False)


def test_make_for_a_gpu_reports_a_missing_nvcc_before_it_installs(tmp_path: Path) -> None:
    out = make_for_gpu(tmp_path)
    assert out.returncode != 0
    (error,) = [line for line in out.stderr.splitlines() if line.startswith("error: ")]
    assert "nvcc, which is not on the PATH" in error
    assert not (tmp_path / ".venv").exists()


def test_make_for_a_gpu_installs_unsloth_and_compiles_llama_cpp_with_cuda(tmp_path: Path) -> None:
    """A llama.cpp without CUDA, which pip may have in its cache, is compiled again; a second `make` does nothing."""
    for _ in range(2):
        out = make_for_gpu(tmp_path, "nvcc", "c++")
        assert out.returncode == 0, out.stderr
    calls = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("pip")]
    assert [line.split(" -D")[0].split()[-1] for line in calls] == [
        "torch>=2.11,<=2.13.0",
        ".[dev]",
        ".[dev,gpu]",
        "llama-cpp-python==1.2.3",
    ]
    assert all("-DGGML_CUDA=on" in line for line in calls)
    assert "--no-cache-dir" in calls[-1]


def test_the_error_for_an_unknown_recipe_lists_the_known_ones() -> None:
    assert "quickstart" in refused("distill", "nope.yaml")


def test_a_broken_recipe_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("teacher: pocket\ntrain: {epoch: 3}\n")
    assert "train.epoch: unknown setting (did you mean epochs?)" in refused("distill", "my.yaml", cwd=tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "the seed file does not exist"),
        ("", "no rows in it"),
        ("[1, 2", "not JSON"),
        ('{"instruction": "a"}\n{"output": "b"}\n', "line 2: a row of no known format; its keys: output"),
    ],
)
def test_bad_seeds_are_refused_and_the_run_can_be_resumed(tmp_path: Path, text: str | None, said: str) -> None:
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
    assert "a small program, not an LLM" in " ".join(tapir("--help").stdout.split())


def test_a_wheel_carries_the_recipes_the_pocket_files_and_the_commands(tmp_path: Path) -> None:
    """Built without a network from the checkout, then read as an installed package from another folder."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*pip, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    assert {path.name for path in place.iterdir()} == {"tapir_local", f"tapir_local-{__version__}.dist-info"}
    code = (
        "import sys; sys.argv = ['tapir-local', 'recipes', '--json']\n"
        "from tapir_local.commands.main import main; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=True)
    assert {"quickstart", "recorded"} <= {row["name"] for row in json.loads(out.stdout)}
    assert (place / "tapir_local" / "assets" / "pocket_student" / "model.safetensors").is_file()
    assert (place / "tapir_local" / "assets" / "pocket_seeds.json").is_file()


@pytest.mark.parametrize("words", [["seeds.path=nowhere.json"], ["name=other", "seeds.path=nowhere.json"]])
def test_settings_with_their_own_option_can_be_set_with_set_too(words: list[str], tmp_path: Path) -> None:
    changes = [word for text in words for word in ("--set", text)]
    with pytest.raises(TapirError, match=r"nowhere\.json: the seed file does not exist"):
        CliRunner().invoke(cli, ["distill", "--cache", str(tmp_path), *changes], catch_exceptions=False)


def test_an_option_overrides_the_same_setting() -> None:
    changes = recipe_changes(["rounds=7", "name=a"], rounds=2, name=None, seeds=None, random_seed=None)
    recipe = resolve_recipe("quickstart", changes)[0]
    assert (recipe.rounds, recipe.name) == (2, "a")


# Recipes as files


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("my.yaml", "about: caf\xe9".encode("latin-1"), "my.yaml, line 1: not UTF-8: byte 0xe9"),
        ("my.yaml", b"", "my.yaml: the recipe is empty"),
        ("my.yaml", b"train: {}\nteacher: pocket\ntrain: {}", "my.yaml: train: given twice, in lines 1 and 3"),
        ("my.yml", b"teacher: pocket", "my.yaml: there is no such recipe\n  Did you mean my.yml?"),
        ("me.yaml", b"teacher: pocket", "Did you mean me.yaml?"),
        (
            "my.yaml/recipe.yaml",
            b"teacher: pocket",
            "this is a folder, not a recipe\n  Give the recipe in it: my.yaml/rec",
        ),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused_in_one_sentence(
    name: str, data: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
    assert said in refused("distill", "my.yaml", cwd=tmp_path)


def test_a_name_that_is_too_long_for_a_file_is_an_unknown_recipe() -> None:
    assert "there is no such recipe" in refused("distill", "x" * 300)


def test_a_recipe_without_a_student_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("teacher: {model: m, base_url: 'http://127.0.0.1:9/v1'}\n")
    said = refused("distill", "my.yaml", "--dry-run", cwd=tmp_path)
    assert "my.yaml: student.path: not set; write `student: {path: …}`" in said
    assert "seeds.path: not set" in said
    out = tapir("distill", "my.yaml", "--dry-run", "--set", "student=pocket", "--set", "seeds=pocket", cwd=tmp_path)
    assert out.returncode == 0
    assert out.stderr.startswith("WARNING: student.path is `pocket`")
    assert "prepare/label" in out.stdout


def test_a_dry_run_that_asks_nobody_says_so_instead_of_an_empty_table(tmp_path: Path) -> None:
    rows = [{"instruction": f"Name the number {n}.", "output": f"It is {n}."} for n in range(60)]
    (tmp_path / "seeds.json").write_text(json.dumps(rows))
    out = tapir("distill", "recorded", "--seeds", "seeds.json", "--cache", "c", "--dry-run", cwd=tmp_path)
    assert (out.returncode, out.stdout) == (0, "This run sends no requests, so it costs nothing.\n")


def test_a_setting_without_effect_is_reported_first(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("teacher: pocket\ntrain: {method: full, lora_rank: 4}\n")
    out = tapir("distill", "my.yaml", "--dry-run", cwd=tmp_path)
    assert out.stderr.startswith("train.lora_rank has no effect: `train.method: full` trains all weights")


def test_a_change_may_fix_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("teacher: pocket\nstudent: {max_length: 256}\n")
    assert "student.max_tokens" in refused("distill", "my.yaml", "--dry-run", cwd=tmp_path)
    assert tapir("distill", "my.yaml", "--dry-run", "--set", "student.max_tokens=99", cwd=tmp_path).returncode == 0


def test_home_is_expanded_if_the_shell_did_not(tmp_path: Path) -> None:
    out = tapir("distill", "quickstart", "--seeds=~/none.json", "--cache=~/c", "--dry-run", HOME=str(tmp_path))
    assert f"{tmp_path / 'none.json'}: the seed file does not exist" in out.stderr
    assert f"{tmp_path / 'c'}" in tapir("status", "--cache=~/c", HOME=str(tmp_path)).stderr


# Recipes from other sources

LAUNCHED = "teacher: pocket\nname: t\nseeds: nowhere.json\ntrain: {launcher: torchrun}\n"


def test_a_recipe_that_runs_a_command_needs_permission_once(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(LAUNCHED)
    words = ("distill", "my.yaml", "--cache", "c")
    assert "my.yaml: this recipe runs the command: torchrun\n  If you wrote it" in refused(*words, cwd=tmp_path)
    assert not (tmp_path / "c").exists()
    assert "the seed file does not exist" in refused(*words, "--trust", cwd=tmp_path)
    assert "the seed file does not exist" in refused(*words, cwd=tmp_path)  # remembered
    (tmp_path / "my.yaml").write_text(LAUNCHED.replace("torchrun", "torchrun; rm"))
    assert "torchrun; rm" in refused(*words, cwd=tmp_path)


def test_settings_typed_by_the_user_need_no_permission_and_are_remembered(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(LAUNCHED.replace("train: {launcher: torchrun}", ""))
    words = ("distill", "my.yaml", "--cache", "c")
    assert "the seed file does not exist" in refused(*words, "--set", "train.launcher=torchrun", cwd=tmp_path)
    (tmp_path / "my.yaml").write_text(LAUNCHED)
    assert "the seed file does not exist" in refused(*words, cwd=tmp_path)


@pytest.mark.parametrize(
    ("answer", "said"), [("n", "this recipe runs the command"), ("y", "the seed file does not exist")]
)
def test_on_a_terminal_the_user_is_asked_for_permission(answer: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(LAUNCHED)
    code, shown = tapir_on_terminal("distill", "my.yaml", "--cache", "c", typed=f"{answer}\n", cwd=tmp_path)
    assert code == 1
    assert "This recipe runs the command: torchrun" in shown
    assert "Allow this? Answer y only if you trust the recipe [y/N]" in shown
    assert said in shown


def test_a_dry_run_needs_no_permission(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(LAUNCHED.replace("nowhere.json", "pocket"))
    assert tapir("distill", "my.yaml", "--cache", "c", "--dry-run", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "c").exists()
