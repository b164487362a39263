"""What the doctor says of a recipe: each need that is not met has a line with what to do."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import loaded_modules, record_loaded_modules, tapir
from server import Server

from tapir_local.commands.main import cli
from tapir_local.doctor.doctor import MachineCheck
from tapir_local.doctor.recipe_checks import check_recipe
from tapir_local.recipe.text import parse_recipe

RECIPE = """
name: mine
seeds: {path: SEEDS, holdout: 10}
student: pocket
teacher: {model: m, base_url: URL, api_key_env: MY_KEY}
classifier: {model: small}
curriculum: {rows: 60}
"""


@pytest.fixture(autouse=True)
def seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MY_KEY", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(f'{{"instruction": "Say {n}", "output": "{n}"}}\n' for n in range(40)))
    return path


def checks(folder: Path, text: str = RECIPE, url: str = "http://localhost:9", *, ask: bool = False) -> dict:
    recipe = parse_recipe(text.replace("SEEDS", str(folder / "seeds.jsonl")).replace("URL", url), "mine.yaml")
    return {check.name: check for check in check_recipe(recipe, folder / "cache", ask=ask)}


def test_a_recipe_that_can_run_is_good(tmp_path):
    found = checks(tmp_path)
    assert {name for name, check in found.items() if check.ok is not True} == set()
    assert found["seeds"].found.startswith(
        "40 rows, 10 of them held out; 40 with answers, but the teacher writes its own"
    )
    assert found["student"].found == "pocket, with its own chat template"
    assert "rows per round" not in found


@pytest.mark.parametrize(
    ("change", "name", "ok", "words", "fix"),
    [
        ({"holdout: 10": "holdout: 40"}, "seeds", False, "not enough rows", "--set seeds.holdout=8"),
        ({"SEEDS": "nowhere.jsonl"}, "seeds", False, "does not exist", "--seeds"),
        ({"rows: 60": "rows: 500"}, "rows per round", None, "500 rows are to come from 30 seeds", "at most 90"),
        ({"student: pocket": "student: {path: o/n}"}, "student", None, "o/n is not in the Hub's cache", "downloaded"),
        ({"student: pocket": "student: {path: /no/such}"}, "student", False, "no such folder", "Correct"),
        ({"student: pocket": "student: {path: no.gguf}"}, "student", False, "missing", "student.path"),
        (
            {"model: small": "model: o/n, labelled: 20"},
            "classifier",
            None,
            "o/n is not in the Hub's cache",
            "downloaded",
        ),
        ({"rows: 60}": "rows: 60}\ntrain: {method: qlora}"}, "train.method", False, "needs a GPU", "LoRA"),
        ({"rows: 60}": "rows: 60}\ntrain: {report_to: mlflow}"}, "tracker", False, "mlflow", "pip install mlflow"),
        ({"URL": "https://api.example"}, "teacher's key", False, "no API key", "export MY_KEY="),
        ({"URL": "http://localhost:1"}, "teacher's key", True, "a server on this machine may need none", ""),
        ({"model: m, base_url: URL, api_key_env: MY_KEY": "gguf: no.gguf"}, "teacher", False, "no.gguf", "path"),
    ],
)
def test_what_is_missing_has_a_line_with_what_to_do(tmp_path, monkeypatch, change, name, ok, words, fix):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = RECIPE
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    found: MachineCheck = checks(tmp_path, text)[name]
    assert found.ok is ok, found
    assert words in found.found
    assert fix in found.fix


def test_an_offline_machine_is_told_what_it_cannot_download(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = checks(tmp_path, RECIPE.replace("student: pocket", "student: {path: o/n}"))
    assert found["student"].ok is False
    assert "HF_HUB_OFFLINE is set" in found["student"].found
    assert found["Hub"].found.startswith("offline")


def test_an_endpoint_is_asked_once_and_nothing_is_stored(tmp_path: Path, server: Server) -> None:
    assert "teacher answers" not in checks(tmp_path, url=server.url)
    assert server.bodies == []
    found = checks(tmp_path, url=server.url, ask=True)["teacher answers"]
    assert found.ok
    assert found.found
    assert len(server.bodies) == 1
    assert not (tmp_path / "cache").exists()
    silent = checks(tmp_path, ask=True)["teacher answers"]
    assert silent.ok is False
    assert "nothing listens at localhost:9" in silent.found


def test_the_command_names_what_is_missing_and_imports_neither_torch_nor_llama(tmp_path, seeds):
    path = tmp_path / "my.yaml"
    path.write_text(RECIPE.replace("SEEDS", str(seeds)).replace("URL", "https://api.example"))
    (tmp_path / "modules").mkdir()
    variables = record_loaded_modules(tmp_path / "modules")
    out = tapir("doctor", str(path), "--json", "--cache", str(tmp_path / "cache"), **variables)
    assert out.returncode == 1, out.stderr
    rows = {row["name"]: row for row in json.loads(out.stdout)}
    assert rows["teacher's key"]["ok"] is False
    assert "API key" not in rows
    assert rows["llama.cpp"]["found"].startswith("runs on this processor; backends: CPU")
    assert "torch" in rows or "torch for the GPU" in rows
    assert not any(line.split() == ["torch", "llama_cpp"] for line in loaded_modules(tmp_path / "modules"))


def test_options_without_a_recipe_are_refused():
    out = CliRunner().invoke(cli, ["doctor", "--ask"])
    assert out.exit_code == 2
    assert "--ask and --set need a RECIPE" in out.stderr
