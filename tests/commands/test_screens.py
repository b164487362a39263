"""What the commands show and say: runs and their state, hints for guesses, questions, and commands that work."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command_line import ROOT, refused, tapir, tapir_on_terminal
from fakes import QUIET, World, fake_backends, make_recipe

from tapir_local.commands.main import cli
from tapir_local.pipeline.loop import distill, redo
from tapir_local.run_dir import RunDir, lock_run, write_progress
from tapir_local.terminal import options
from tapir_local.terminal.guesses import COMMAND_HINTS, OPTION_HINTS, SECTIONS


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run."""
    run = RunDir(tmp_path / "cache", "fake")
    distill(make_recipe(tmp_path), run, fake_backends(World()), QUIET)
    return run


def called(run: RunDir, *words: str) -> Result:
    """The output of a command on the cache of a run."""
    return CliRunner().invoke(cli, [*words, "--cache", str(run.cache)], catch_exceptions=False)


def state(run: RunDir) -> str:
    return str(json.loads(called(run, "status", "fake", "--json").stdout)["state"])


# The state of a run

REDONE = "stopped before round-01/train: redo deleted it and all later outputs"


def test_a_run_is_done_only_if_all_its_outputs_are_there(run: RunDir) -> None:
    assert state(run) == "done"
    (run.path / "model" / "student.gguf").unlink()
    (run.round(1) / "metrics.json").unlink()
    assert run.record()["status"] == "done"  # what the record still says
    assert state(run) == "not finished, round-01/evaluate is next"


def test_a_run_that_another_process_works_on_is_running(run: RunDir) -> None:
    redo(run, 1, "train")
    with lock_run(run):
        assert state(run) == f"running (process {os.getpid()}), in round-01/train"
    assert state(run) == REDONE


def test_status_says_first_how_far_a_run_is_and_shortens_what_is_left(run: RunDir) -> None:
    redo(run, 1, "train")
    lines = called(run, "status", "fake").stdout.splitlines()
    done = json.loads(called(run, "status", "fake", "--json").stdout)
    assert lines[0].startswith(f"run fake: {REDONE}; ")
    assert f"{done['stages_done']} of {done['stages']} stages are done" in lines[0]
    left = done["stages"] - done["stages_done"]
    assert any(line.startswith("round 1 train") and " next " in line for line in lines)
    assert any(line.startswith(f"{left - 1} more") and line.rstrip().endswith("up to end ship") for line in lines)


def test_runs_are_listed_with_state_and_best_round(run: RunDir, tmp_path: Path) -> None:
    (run.cache / "runs" / "broken").mkdir()
    (run.cache / "runs" / "broken" / "recipe.yaml").write_text("nonsense: 1\n")
    rows = {row["run"]: row for row in json.loads(called(run, "runs", "--json").stdout)}
    assert rows["fake"]["state"] == "done"
    assert rows["fake"]["rounds"] == {"done": 2, "planned": 2}
    assert rows["fake"]["best"]["round"] in (0, 1, 2)
    assert rows["fake"]["bytes"] > 0
    assert rows["broken"]["state"].startswith("unreadable: ")
    shown = called(run, "runs").stdout
    assert "fake " in shown
    assert "2 of 2" in shown
    empty = CliRunner().invoke(cli, ["runs", "--cache", str(tmp_path / "none")])
    assert (empty.exit_code, "There is no run in" in empty.stdout) == (0, True)


# Going on


def test_a_run_goes_on_by_its_name(run: RunDir) -> None:
    redo(run, 1, "plan")
    out = called(run, "distill", "fake", "--dry-run")
    assert out.exit_code == 0
    assert "run fake: calls of the remaining stages" in out.stdout
    assert "round-01/expand" in out.stdout


def test_a_recipe_is_preferred_to_a_run_of_its_name_and_an_unknown_name_is_refused(run: RunDir) -> None:
    assert "there is no such recipe" in refused("distill", "nope", "--cache", str(run.cache))
    out = called(run, "distill", "quickstart", "--dry-run")
    assert "run quickstart: calls of the remaining stages" in out.stdout


def test_redo_prints_the_command_that_makes_the_outputs_again(run: RunDir) -> None:
    out = called(run, "redo", "fake", "--round", "2", "--from", "evaluate")
    assert out.stdout.split() == ["end/ship", "round-02/evaluate"]
    assert "2 outputs deleted. Make them again:" in out.stderr
    assert f"distill fake --cache {run.cache}" in out.stderr


@pytest.mark.parametrize(("answer", "words", "deleted"), [("n", [], False), ("y", [], True), ("", ["--yes"], True)])
def test_redo_asks_on_a_terminal(run: RunDir, answer: str, words: list[str], deleted: bool) -> None:
    command = ["redo", "fake", "--round", "2", "--from", "evaluate", *words, "--cache", str(run.cache)]
    code, shown = tapir_on_terminal(*command, typed=f"{answer}\n")
    assert (code == 0) == deleted
    assert (run.round(2) / "metrics.json").exists() != deleted
    assert ("Delete 2 outputs, which took" in shown) == (not words)
    assert ("round-02/evaluate" in shown) == (not words)
    assert ("nothing was deleted" in shown) == (not deleted)


# Suggested commands


@pytest.mark.parametrize("name", [".venv/bin/tapir-local", "other/tapir-local"])
def test_suggested_commands_name_the_program_as_the_shell_finds_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / name
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert options.program_name() == name
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    assert options.program_name() == "tapir-local"


def test_suggested_commands_of_a_checkout_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "cli.py")])
    monkeypatch.chdir(tmp_path)
    command = [*shlex.split(options.program_name()), "--version"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.startswith("tapir-local, version ")


def test_a_cache_with_a_space_is_quoted_in_suggested_commands() -> None:
    assert shlex.split(options.cache_argument(Path("my cache"))) == ["--cache", "my cache"]


# Guesses


@pytest.mark.parametrize("word", COMMAND_HINTS)
def test_every_guess_leads_to_commands_that_exist(word: str) -> None:
    assert word not in cli.commands
    out = CliRunner().invoke(cli, [word])
    assert out.exit_code == 2
    assert f"No such command '{word}'. {COMMAND_HINTS[word]}." in " ".join(out.stderr.split())
    named = [part.split()[1] for part in COMMAND_HINTS[word].split("`")[1::2] if part.startswith("tapir-local ")]
    assert all(name in cli.commands or name in ("--help", "--version", "COMMAND") for name in named)


def test_a_recipe_in_place_of_a_command() -> None:
    assert "To run a recipe: `tapir-local distill my.yaml`." in refused("my.yaml", code=2)
    assert "To run a recipe: `tapir-local distill quickstart`." in refused("quickstart", code=2)
    assert "Did you mean 'distill'?" in refused("distil", code=2)


def test_options_of_other_programs_are_explained_and_silly_guesses_are_not_made() -> None:
    assert OPTION_HINTS["--model"] in refused("distill", "--model", "gpt", code=2)
    assert OPTION_HINTS["--output"] in refused("distill", "--output", "out", code=2)
    assert "`tapir-local status --json`" in refused("--json", "status", code=2)
    assert "Did you mean" not in refused("distill", "--yes", code=2)
    assert "Did you mean '--rounds'?" in refused("distill", "--round", "3", code=2)


def test_short_options_and_sections_of_the_help() -> None:
    assert tapir("-V").stdout == tapir("--version").stdout != ""
    text = tapir("-h").stdout
    assert text == tapir("--help").stdout
    assert tapir("calls", "list", "-h").stdout == tapir("calls", "list", "--help").stdout
    assert "…" not in text
    assert "..." not in text.replace("[ARGS]...", "")
    assert max(map(len, text.splitlines())) <= 80
    assert {name for names in SECTIONS.values() for name in names} == set(cli.commands)
    assert text.index("distill  ") < text.index("status  ") < text.index("chat  ")


@pytest.mark.parametrize(("shell", "mark"), [("bash", "complete -o nosort"), ("zsh", "#compdef"), ("fish", "complete")])
def test_the_completion_of_a_shell(shell: str, mark: str) -> None:
    script = tapir("completion", shell).stdout
    assert mark in script
    assert f"_TAPIR_LOCAL_COMPLETE={shell}_complete" in script


def test_the_completion_script_completes(tmp_path: Path) -> None:
    """Bash itself, with the script and a program of that name on the PATH."""
    program = tmp_path / "tapir-local"
    main = "from tapir_local.commands.main import main; main()"
    code = f"import sys; sys.argv[0] = 'tapir-local'; sys.path.insert(0, {str(ROOT)!r}); {main}"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "script").write_text(tapir("completion", "bash").stdout)
    ask = (
        "source script; COMP_WORDS=(tapir-local ru); COMP_CWORD=1; _tapir_local_completion tapir-local; echo $COMPREPLY"
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    out = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert out.stdout.strip() == "runs", out.stderr


# A run at work


def test_status_says_when_a_run_at_work_ends(run: RunDir) -> None:
    redo(run, 1, "train")
    assert json.loads(called(run, "status", "fake", "--json").stdout)["now"] is None
    found = {"process": os.getpid(), "step": "round-01/train", "round": 1, "rounds": 2, "done": 57, "total": 150}
    with lock_run(run):
        write_progress(run, {**found, "seconds_left": 41, "run_seconds_left": None, "ends": None})
        assert "\nround 1 of 2, train 38%, 0:41 left\n" in called(run, "status", "fake").stdout
        times = {"seconds_left": None, "run_seconds_left": 60, "ends": "2026-01-01T12:00:00+00:00"}
        write_progress(run, {**found, "total": None, **times})
        shown = called(run, "status", "fake").stdout
        assert re.search(r"^round 1 of 2, train; ends about \w{3} \d\d:\d\d$", shown, re.MULTILINE)
        assert json.loads(called(run, "status", "fake", "--json").stdout)["now"]["done"] == 57
        (run.path / ".progress.json").write_text("{")
        assert json.loads(called(run, "status", "fake", "--json").stdout)["now"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--display", "full"], "--display full needs a terminal"),
        (["-q", "--display", "log"], "--quiet and --display log contradict each other"),
    ],
)
def test_a_display_that_cannot_be_shown_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    assert said in refused("distill", "quickstart", *words, "--cache", str(tmp_path))
