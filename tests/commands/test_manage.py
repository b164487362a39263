"""Runs as a whole: resumed, shipped with another round, chosen by the holdout, and deleted."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command_line import refused, tapir_on_terminal
from fakes import QUIET, World, fake_backends, make_recipe

from tapir_local.commands.distill import open_display, print_end, with_receipts
from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.method.prompts import answer_prompt
from tapir_local.pipeline.loop import distill, redo
from tapir_local.pipeline.manage import delete_run, ship_round
from tapir_local.recipe.endpoints import Teacher
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override
from tapir_local.records import Completion, Message, Request
from tapir_local.report.compare import compare_rounds, compare_runs, round_verdict
from tapir_local.report.status import run_status
from tapir_local.run_dir import RunDir, list_runs, lock_run
from tapir_local.stages import backends
from tapir_local.stages.context import Backends
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask


def answers_right(numbers: set[int]) -> Backends:
    """Backends whose students of these rounds answer everything right, and the others nothing."""

    def generate(*, gguf: Path, prompts: list, ids: list, on_result: Callable, **_: object) -> list[Completion]:
        text = "right" if gguf.parent.name in {f"round-{number:02d}" for number in numbers} else "no idea"
        found = [Completion(id, text, "stop", 2) for id in ids]
        for row in found:
            on_result(row)
        return found

    return replace(fake_backends(World()), generate=generate)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run whose round 1 is the best."""
    folder = tmp_path_factory.mktemp("finished")
    run = RunDir(folder / "cache", "fake")
    distill(make_recipe(folder), run, answers_right({1}), QUIET)
    return run


@pytest.fixture
def recipe(finished: RunDir) -> Recipe:
    return make_recipe(finished.cache.parent)


@pytest.fixture
def made(finished: RunDir, tmp_path: Path) -> RunDir:
    """A copy of the finished run."""
    shutil.copytree(finished.cache, tmp_path / "cache")
    return RunDir(tmp_path / "cache", "fake")


def called(run: RunDir, *words: str) -> Result:
    return CliRunner().invoke(cli, [*words, "--cache", str(run.cache)], catch_exceptions=False)


@pytest.fixture
def fakes_for_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands find the fakes where they look for llama.cpp and torch."""

    @contextmanager
    def fakes(*_: object) -> Iterator[Backends]:
        yield answers_right({1})

    monkeypatch.setattr(backends, "real_backends", fakes)


# Which round model/ has


def test_the_last_round_is_shipped_and_the_best_if_the_recipe_says_so(recipe, made):
    assert run_status(made)["shipped"] == {"round": 2, "why": "the last round"}
    assert distill(override(recipe, {"ship": "best"}), made, answers_right({1}), QUIET) == 1
    shipped = run_status(made)["shipped"]
    assert shipped["round"] == 1
    assert shipped["why"].startswith(
        "better than the last: its accuracy is 100.0 points above that of round 2, p = 0.0"
    )
    assert (made.path / "model/student.gguf").read_bytes() == (made.round(1) / "student.gguf").read_bytes()
    card = (made.path / "model/README.md").read_text()
    assert "; round 1 is this student." in card
    assert "| round | 1: better than the last" in card


def test_an_earlier_round_that_is_better_by_chance_is_not_shipped(recipe, tmp_path):
    """One right answer more of ten: McNemar's p is 1."""
    run, best = RunDir(tmp_path / "cache", "fake"), override(recipe, {"ship": "best"})
    plain = answers_right(set())

    def generate(*, gguf: Path, ids: list, on_result: Callable, **others: object) -> list[Completion]:
        found = plain.generate(gguf=gguf, ids=ids, on_result=lambda row: None, **others)  # type: ignore[arg-type]
        if gguf.parent.name == "round-00":
            found[0] = replace(found[0], text="right")
        for row in found:
            on_result(row)
        return found

    distill(best, run, replace(plain, generate=generate), QUIET)
    rounds = [row["metrics"]["accuracy"] for row in run_status(run)["rounds"]]
    assert rounds[0] > rounds[2]
    shipped = run_status(run)["shipped"]
    assert shipped == {"round": 2, "why": "the last round, as no earlier one has a higher accuracy beyond chance"}


def test_a_round_is_shipped_by_hand_and_every_report_says_so(recipe, made, fakes_for_commands, capsys):
    print_end(open_display("lines", False, recipe, made, None), made.cache, 1)
    assert "ship fake --round 1 --cache" in capsys.readouterr().err
    out = called(made, "ship", "fake", "--round", "1")
    assert (out.exit_code, out.stdout) == (0, f"{made.path}/model\n")
    assert (made.path / "model/student.gguf").read_bytes() == (made.round(1) / "student.gguf").read_bytes()
    assert "model/ has round 1: chosen with `ship --round`" in called(made, "status", "fake").stdout
    assert "round 1 is this student" in (made.path / "model/README.md").read_text()
    sums = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=made.path / "model", check=False)
    assert sums.returncode == 0
    assert "The best is round 1: round 2 is" in round_verdict(compare_rounds(made))
    assert "model/ has round 1." in round_verdict(compare_rounds(made))
    print_end(open_display("lines", False, recipe, made, None), made.cache, 1)
    assert "ship fake" not in capsys.readouterr().err
    assert "already" in called(made, "ship", "fake", "--round", "1").stderr
    assert not (made.path / "model.new").exists()
    assert run_status(made)["state"] == "done"


def test_what_was_chosen_by_hand_lasts_until_rounds_or_ship_change(recipe, made):
    ship_round(made, 0, answers_right({1}), QUIET)
    assert distill(recipe, made, answers_right({1}), QUIET) == 0
    assert distill(override(recipe, {"card.license": "MIT"}), made, answers_right({1}), QUIET) == 1
    assert run_status(made)["shipped"]["round"] == 0
    distill(override(recipe, {"rounds": 3}), made, answers_right({1}), QUIET)
    assert run_status(made)["shipped"]["round"] == 3


def test_compare_takes_the_round_in_model(recipe, made, tmp_path):
    other = RunDir(tmp_path / "cache", "other")
    distill(override(recipe, {"name": "other"}), other, answers_right({1}), QUIET)
    ship_round(made, 1, answers_right({1}), QUIET)
    found = compare_runs([made, other])
    assert [(row["run"], row["round"]) for row in found["rounds"] if row["chosen"]] == [("fake", 1), ("other", 2)]
    assert "fake: round 1 is compared, which is in model/; the last is round 2." in found["notes"]


def test_a_round_that_is_not_there_and_a_run_at_work_are_refused(made):
    with pytest.raises(TapirError, match="has no finished round 7"):
        called(made, "ship", "fake", "--round", "7")
    before = (made.path / "model").stat().st_ino
    with lock_run(made), pytest.raises(TapirError, match="in use by process"):
        ship_round(made, 1, answers_right({1}), QUIET)
    assert (made.path / "model").stat().st_ino == before


def test_an_interrupted_ship_leaves_the_old_model(made):
    def cut(**_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ship_round(made, 1, replace(answers_right({1}), ship=cut), QUIET)
    assert (made.path / "model/student.gguf").read_bytes() == (made.round(2) / "student.gguf").read_bytes()
    assert run_status(made)["shipped"]["round"] == 2


def test_a_round_has_one_line_on_its_calls_and_none_if_it_asked_nothing(recipe, made, capsys):
    with Store(made.cache / "teacher.db") as store:
        request = Request(answer_prompt((Message("user", "What is 2 + 3?"),)), "seed-1", "seeds")
        ask([request], Teacher(kind="pocket"), store, run="fake")
    display = open_display("lines", False, recipe, made, None)
    for number in (0, 1):
        step = next(step for step in display.state.steps if step.name == f"round-{number:02d}/evaluate")
        with_receipts(QUIET, display, None).ends(step, {})
    said = " ".join(capsys.readouterr().err.split())
    assert re.fullmatch(r"\S+ preparation and round 0: 1 call asked, 0 from the store; no money spent", said)


# resume


def test_resume_goes_on_with_the_runs_recipe(made, fakes_for_commands):
    redo(made, 1, "evaluate")
    out = called(made, "resume", "--set", "card.license=MIT")
    assert out.exit_code == 0, out.stderr
    assert run_status(made)["state"] == "done"
    assert "license: MIT" in (made.path / "recipe.yaml").read_text()
    assert "is done already" in called(made, "resume", "fake").stderr
    with pytest.raises(TapirError, match=r"learning_rate: 0.0002 -> 1.0"):
        called(made, "resume", "fake", "--set", "train.learning_rate=1")
    with pytest.raises(TapirError, match="there is no run 'nope'"):
        called(made, "resume", "nope")
    with pytest.raises(TapirError, match="Did you mean fake"):
        called(made, "status", "fakr")


# rm


def test_rm_deletes_runs_and_keeps_the_store(made, recipe):
    store = made.cache / "teacher.db"
    store.write_bytes(b"calls")
    out = called(made, "rm", "fake", "--yes")
    assert (out.exit_code, out.stdout) == (0, "fake\n")
    assert "1 run deleted. Paid calls stay in" in out.stderr
    assert (list_runs(made.cache), list((made.cache / "runs").iterdir())) == ([], [])
    assert store.read_bytes() == b"calls"


def test_rm_refuses_without_a_terminal_with_a_wrong_name_and_a_run_at_work(made):
    assert "no terminal to ask in, so nothing was deleted" in refused("rm", "fake", "--cache", str(made.cache))
    with pytest.raises(TapirError, match="there is no run 'nope'"):
        called(made, "rm", "fake", "nope", "--yes")
    with lock_run(made), pytest.raises(TapirError, match=f"in use by process {os.getpid()}"):
        called(made, "rm", "fake", "--yes")
    assert run_status(made)["state"] == "done"


def test_what_an_interrupted_deletion_leaves_is_a_run_that_resumes(recipe, made, monkeypatch):
    from tapir_local.pipeline import manage

    plain, deleted = manage.remove_path, []

    def cut(path: Path) -> None:
        if len(deleted) == 4:
            raise KeyboardInterrupt
        deleted.append(path)
        plain(path)

    monkeypatch.setattr(manage, "remove_path", cut)
    with pytest.raises(KeyboardInterrupt):
        delete_run(made)
    assert [run.name for run in list_runs(made.cache)] == ["fake"]
    assert distill(recipe, made, answers_right({1}), QUIET) == 4
    assert run_status(made)["state"] == "done"


@pytest.mark.parametrize(("words", "answer", "done"), [(["rm"], "n", False), (["rm"], "y", True)])
def test_rm_asks_on_a_terminal(made, words, answer, done):
    code, shown = tapir_on_terminal(*words, "fake", "--cache", str(made.cache), typed=f"{answer}\n")
    assert (code == 0) == done
    assert "Delete 1 run?" in shown
    assert " MB  done" in shown
    assert made.exists != done


def test_a_list_of_runs_has_only_the_beginning_of_a_long_error(made):
    """`status` has all of it, with one mark at its end."""
    shutil.rmtree(made.path / "model")
    error = "stopped in end/ship after 2 s: " + 40 * "three rows are too long; " + "set limits.unusable=0.2."
    record = json.loads((made.path / "run.json").read_text())
    (made.path / "run.json").write_text(json.dumps(record | {"status": error}))
    for shown in (called(made, "runs"), called(made, "rm", "fake", "--yes")):
        assert "stopped in end/ship after 2 s: three rows" in " ".join(shown.output.split())
        assert "set limits" not in shown.output
        assert "…" in shown.output


def test_status_of_a_run_of_an_older_version_names_its_last_round(made):
    record = json.loads((made.path / "run.json").read_text())
    del record["shipped"]
    (made.path / "run.json").write_text(json.dumps(record))
    assert run_status(made)["shipped"] == {"round": 2, "why": "the last round"}
