"""`init` writes a recipe that `distill` accepts, asks on a terminal, and replaces no file."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command_line import tapir_on_terminal

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.recipe.text import parse_recipe


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with seeds in it, on a machine without a GPU."""
    (tmp_path / "my.jsonl").write_text("".join(f'{{"instruction": "Say {n}", "output": "{n}"}}\n' for n in range(40)))
    (tmp_path / "bare.txt").write_text("".join(f"Say {n}\n" for n in range(40)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path


def init(*words: str) -> Result:
    return CliRunner().invoke(cli, ["init", *words, "--cache", "cache"], catch_exceptions=False)


def test_it_writes_a_recipe_checks_it_and_says_how_to_run_it(folder):
    out = init("mine.yaml", "--seeds", "my.jsonl", "--teacher", "gpt-4o-mini", "--student", "pocket", "--rounds", "1")
    assert out.exit_code == 0
    recipe = parse_recipe((folder / "mine.yaml").read_text(), "mine.yaml")
    assert (recipe.name, recipe.seeds.path, recipe.seeds.holdout, recipe.rounds) == ("mine", "my.jsonl", 8, 1)
    assert "my.jsonl: 40 rows, 40 with answers; 8 will be held out" in out.stderr
    assert "teacher's key MISSING" in " ".join(out.stdout.split())
    assert "run mine: calls of the remaining stages" in out.stdout
    assert "After adding what is missing (teacher's key), run it:\nexport OPENAI_API_KEY=...\n" in out.stderr
    assert "distill mine.yaml --cache cache" in out.stderr
    assert not (folder / "cache").exists()


def test_rows_with_answers_need_no_teacher_and_no_question(folder):
    out = init("--seeds", "my.jsonl", "--student", "pocket", "--yes")
    assert out.exit_code == 0
    recipe = parse_recipe((folder / "my.yaml").read_text(), "my.yaml")
    assert (recipe.teacher.kind, recipe.judge.kind, recipe.seeds.answers) == ("recorded", "reference", "file")
    assert "This run sends no requests" in out.stdout
    assert "\nRun it:\n" in out.stderr


def test_no_file_is_replaced_without_force(folder):
    (folder / "my.yaml").write_text("mine")
    words = ("--seeds", "my.jsonl", "--student", "pocket")
    with pytest.raises(TapirError, match="exists already") as refused:
        init(*words)
    assert "--force" in refused.value.fix
    assert (folder / "my.yaml").read_text() == "mine"
    assert init(*words, "--force").exit_code == 0
    with pytest.raises(TapirError, match="is a file that the command reads"):
        init("my.jsonl", *words, "--force")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "no seeds are given"),
        (["--seeds", "none.json"], "the seed file does not exist"),
        (["--seeds", "bare.txt"], "no teacher is given"),
        (["--seeds", "bare.txt", "--teacher", "recorded"], "no row has one"),
        (["--seeds", "bare.txt", "--teacher", "http://localhost:1"], "names no model"),
        (["--seeds", "my.jsonl", "--student", "no.gguf"], "there is no such GGUF"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_and_nothing_is_written(folder, words, what):
    with pytest.raises(TapirError, match=what):
        init(*words)
    assert not (folder / "my.yaml").exists()


@pytest.mark.parametrize("columns", ["frage", "question=", "ask=frage"])
def test_columns_are_named_as_a_recipe_names_them(columns):
    out = init("--seeds", "my.jsonl", "--columns", columns)
    assert out.exit_code == 2
    assert "Invalid value for --columns" in out.stderr


def test_it_asks_on_a_terminal_and_an_empty_answer_takes_the_proposal(folder):
    code, shown = tapir_on_terminal("init", "--cache", "cache", typed="my.jsonl\n\npocket\n0\n")
    assert code == 0, shown
    for question in ("File of seeds: ", "`recorded` for your answers [recorded]: ", "Student [smollm2]", "[1]: "):
        assert question in shown
    recipe = parse_recipe((folder / "my.yaml").read_text(), "my.yaml")
    assert (recipe.teacher.kind, recipe.student.path, recipe.rounds) == ("recorded", "pocket", 0)
