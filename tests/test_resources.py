"""The student's folder: from the Hub at one commit, and unchanged by a second process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import QUIET
from hub import MODEL, Hub, serving
from models import make_model

from tapir_local.errors import TapirError
from tapir_local.export.base import prepare_student_folder, student_folder
from tapir_local.files import write_json
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.text import parse_recipe
from tapir_local.run_dir import RunDir, lock_run
from tapir_local.stages.backends import real_backends

OLD, NEW = "a" * 40, "b" * 40
READ = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt"}
UNREAD = {"consolidated.safetensors", "original/consolidated.00.pth", "original/params.json", "onnx/config.json"}
UNREAD |= {"pytorch_model.bin", "README.md", "model.gguf", "consolidated-00001-of-00002.safetensors"}
# In its own process, since huggingface_hub reads environment variables when it is imported.
SETTLE = """
import json, sys
from pathlib import Path
from tapir_local.export.base import prepare_student_folder
from tapir_local.export.base import student_folder
from tapir_local.errors import TapirError
from tapir_local.recipe.text import parse_recipe
from tapir_local.run_dir import RunDir
run, recipe = RunDir(Path(sys.argv[1]), "r"), parse_recipe(sys.argv[2], "r")
try:
    folder = prepare_student_folder(recipe, run)
    assert student_folder(recipe, run) == folder
    print(json.dumps([folder.name, sorted(path.name for path in folder.iterdir())]))
except TapirError as error:
    print(json.dumps([str(error), []]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {name: name.encode() for name in sorted(READ | UNREAD)}
    with serving(Hub({"main": OLD, "v2": NEW}, files)) as opened:
        yield opened


def settled(hub: Hub, place: Path, revision: str = "", **variables: str) -> tuple[str, list[str]]:
    """The folder's name, or the error, and the names of its files."""
    recipe = f"teacher: pocket\nstudent: {{path: {MODEL}{revision and f', revision: {revision}'}}}"
    apart = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    known = {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "hf"), "HF_HUB_DISABLE_XET": "1", **variables}
    out = subprocess.run(
        [sys.executable, "-c", SETTLE, str(place), recipe],
        env={**apart, **known, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    said, names = json.loads(out)
    return said, names


def test_what_is_read_of_a_student_on_the_hub_is_fetched_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    assert settled(hub, tmp_path) == (OLD, sorted(READ))
    assert {name for _, name in hub.asked} == READ


def test_a_run_keeps_the_commit_that_it_began_with(hub: Hub, tmp_path: Path) -> None:
    assert settled(hub, tmp_path)[0] == OLD
    assert RunDir(tmp_path, "r").record()["student"] == {"path": MODEL, "revision": OLD}
    hub.branches["main"] = NEW  # a new commit is pushed
    asked = len(hub.asked)
    assert settled(hub, tmp_path)[0] == OLD
    assert len(hub.asked) == asked
    assert settled(hub, tmp_path / "another-run", HF_HOME=str(tmp_path / "hf"))[0] == NEW


def test_a_run_goes_on_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    assert settled(hub, tmp_path)[0] == OLD
    hub.url = "http://127.0.0.1:9"
    assert settled(hub, tmp_path) == (OLD, sorted(READ))
    assert (
        settled(hub, tmp_path / "new", HF_HOME=str(tmp_path / "hf"))[0] == OLD
    )  # the commit of main in the Hub's cache


@pytest.mark.parametrize("revision", ["v2", NEW])
def test_a_branch_or_a_commit_may_be_named(hub: Hub, tmp_path: Path, revision: str) -> None:
    assert settled(hub, tmp_path, revision)[0] == NEW
    assert RunDir(tmp_path, "r").record()["student"]["revision"] == NEW


def test_a_revision_that_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    said, _ = settled(hub, tmp_path, "v3")
    assert f"{MODEL}: there is no such folder, and the Hub has no such model at student.revision v3" in said


@pytest.mark.parametrize("path", ["pocket", "FOLDER"])
def test_a_revision_of_a_folder_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "student").mkdir()
    named = str(tmp_path / "student") if path == "FOLDER" else path
    recipe = parse_recipe(f"teacher: pocket\nstudent: {{path: {named}, revision: main}}", "r")
    for folder_of in (student_folder, prepare_student_folder):
        with pytest.raises(TapirError, match=r"student.revision \(main\) applies to models on the Hub"):
            folder_of(recipe, RunDir(tmp_path, "r"))


# The folder as a run sees it


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("template", ["alpaca", "OTHER", None])
def test_a_refused_second_process_writes_nothing_in_the_run(tmp_path: Path, template: str | None) -> None:
    model, other = make_model(tmp_path / "model"), tmp_path / "other.jinja"
    other.write_text((model / "chat_template.jinja").read_text() + "{# other #}")
    run = RunDir(tmp_path / "cache", "r")

    def recipe_of(named: str | None) -> str:
        chosen = str(other) if named == "OTHER" else named
        student = f"{{path: {model}{f', chat_template: {chosen}' if chosen else ''}}}"
        return f"name: r\nteacher: pocket\nstudent: {student}\nseeds: {{path: pocket, holdout: 10}}"

    first, second = (parse_recipe(recipe_of(named), "r") for named in ("alpaca", template))
    with lock_run(run):
        write_json(run.path / "run.json", {"stages": {}})
        prepare_student_folder(first, run)
        before = files(run.path)
        with pytest.raises(TapirError, match="is in use"), real_backends(second, run, print) as tools:
            distill(second, run, tools, QUIET)
        student_folder(second, run)
        assert files(run.path) == before


def test_a_student_that_will_not_do_is_refused_before_the_first_step_and_the_run_says_so(tmp_path: Path) -> None:
    model, run = make_model(tmp_path / "model"), RunDir(tmp_path / "cache", "r")
    (model / "chat_template.jinja").unlink()
    recipe = parse_recipe(f"name: r\nteacher: pocket\nstudent: {{path: {model}}}\nseeds: {{path: pocket}}", "r")
    with pytest.raises(TapirError, match="no chat template"), real_backends(recipe, run, print) as tools:
        distill(recipe, run, tools, QUIET)
    assert run.record()["status"].startswith("stopped before the first step: ")
    assert {path.name for path in run.path.iterdir()} <= {"recipe.yaml", "run.json", ".lock"}


def test_a_run_that_is_done_needs_its_student_no_more(tmp_path: Path) -> None:
    """The student is checked only if there is something left to train."""
    run = RunDir(tmp_path / "cache", "r")
    recipe = parse_recipe(f"name: r\nteacher: pocket\nstudent: {{path: {tmp_path / 'gone'}}}", "r")
    (run.round(0) / "adapter").mkdir(parents=True)
    with real_backends(recipe, run, print) as tools:
        tools.begin()
