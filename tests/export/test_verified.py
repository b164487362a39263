"""A GGUF made by hand has its name only when it has passed the gate."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from tapir_local.errors import TapirError
from tapir_local.export.probes import PROBES
from tapir_local.export.verified import export_checked, trained_rows
from tapir_local.files import write_rows
from tapir_local.inference.model import template_of
from tapir_local.records import Example, Message
from tapir_local.resources import read_chat_template


def test_the_command_writes_a_gguf_and_the_gates_report(llama, tmp_path: Path) -> None:
    out = tmp_path / "student.gguf"
    words = ["export", str(llama.model), str(out), "--adapter", str(llama.adapter), "--quant", "f16"]
    found = CliRunner().invoke(cli.cli, words, catch_exceptions=False)
    assert "texts tokenised alike" in found.stderr
    assert json.loads((tmp_path / "student.gguf.gate.json").read_text())["failed"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.gguf", "student.gguf.gate.json"]
    assert found.stdout == f"{sha256(out.read_bytes()).hexdigest()}  {out}\n"


def test_a_modelfile_beside_it_where_it_is_asked_for(llama, tmp_path: Path) -> None:
    words = ["export", str(llama.model), str(tmp_path / "base.gguf"), "--modelfile", "--no-gate"]
    CliRunner().invoke(cli.cli, words, catch_exceptions=False)
    text = (tmp_path / "base.gguf.Modelfile").read_text()
    assert text.startswith("FROM ./base.gguf\nTEMPLATE")
    assert "num_ctx" not in text  # nothing is known of how it was trained
    assert CliRunner().invoke(cli.cli, [*words, "--adapter-only"]).exit_code == 2


def test_without_the_gate_there_is_no_report(llama, tmp_path: Path) -> None:
    out = tmp_path / "base.gguf"
    assert export_checked(str(llama.model), out, adapter=None, quant="q8_0", check=False) is None
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_the_rows_of_a_run_are_probed_too(llama, tmp_path: Path) -> None:
    """Prompt and whole row of each, beside the probes; a file beside another's adapter is let alone."""
    shutil.copytree(llama.adapter, tmp_path / "adapter")
    write_rows(tmp_path / "train.jsonl", [Example(str(n), (Message("user", f"Say {n}."),), f"{n}") for n in range(5)])
    assert trained_rows(tmp_path / "adapter", tmp_path / "work") == tmp_path / "work/rows.jsonl"
    (tmp_path / "adapter/resolved.json").write_text("{}")
    report = export_checked(
        str(llama.model), tmp_path / "out.gguf", adapter=tmp_path / "adapter", quant="f32", check=True
    )
    assert report
    assert (report.probes, report.min_agreement) == (PROBES + 10, 0.99)


def test_a_gguf_that_fails_does_not_get_its_name(llama, tmp_path: Path) -> None:
    """The model's template changes between export and gate."""
    model = tmp_path / "model"
    model.mkdir()
    for file in llama.model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "student.gguf"

    template = (model / "chat_template.jinja").read_text()

    def spoil(done: int, total: int, note: str) -> None:
        (model / "chat_template.jinja").write_text("{# another #}" + template)

    with pytest.raises(TapirError, match=r"not the trained model: template"):
        export_checked(str(model), out, adapter=None, quant="f32", check=True, progress=spoil)
    assert not out.exists()
    assert (tmp_path / "student.gguf.unchecked").exists()
    assert (tmp_path / "student.gguf.work" / "report.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"quant": "q9"}, "no such quant"), ({"adapter": Path("none")}, "adapter"), ({"model": "/none"}, "none")],
)
def test_what_will_not_do_is_said_and_nothing_is_left(llama, tmp_path: Path, changes: dict, said: str) -> None:
    given = {"model": str(llama.model), "adapter": None, "quant": "f16"} | changes
    out = tmp_path / "out.gguf"
    with pytest.raises(TapirError, match=said):
        export_checked(given["model"], out, adapter=given["adapter"], quant=given["quant"], check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--base", "base.gguf"], "--base"),
        (["--base", "base.gguf", "--adapter", "lora"], "--base"),
        (["--adapter", "lora", "--adapter-only", "--no-gate", "--base", "base.gguf"], "--base"),
        (["--adapter", "lora", "--adapter-only", "--no-gate", "--converter", "llama.cpp"], "--converter"),
    ],
)
def test_what_would_be_ignored_is_refused(llama, tmp_path: Path, words: list[str], option: str) -> None:
    """With --base and no --adapter-only the gate once checked the base, and the new file was shipped unchecked."""
    (tmp_path / "base.gguf").write_bytes(llama.gguf.read_bytes())
    given = [str(tmp_path / word) if word == "base.gguf" else word for word in words]
    given = [str(llama.adapter) if word == "lora" else word for word in given]
    found = CliRunner().invoke(cli.cli, ["export", str(llama.model), str(tmp_path / "out.gguf"), *given])
    assert f"{option}: it is of no use here" in str(found.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_a_file_that_is_there_is_not_overwritten(llama, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(TapirError, match="exists already"):
        export_checked(str(llama.model), tmp_path / "out.gguf", adapter=None, quant="f16", check=True)
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_a_base_without_a_template_is_exported_with_one_that_is_named(llama, tmp_path: Path) -> None:
    model = tmp_path / "base"
    shutil.copytree(llama.model, model)
    (model / "chat_template.jinja").unlink()
    before = sorted(path.name for path in model.iterdir())
    words = ["export", str(model), str(tmp_path / "base.gguf"), "--no-gate"]
    with pytest.raises(TapirError, match="chat template") as caught:
        CliRunner().invoke(cli.cli, words, catch_exceptions=False)
    assert "of `tapir-local export` it is --chat-template" in str(caught.value)
    found = CliRunner().invoke(cli.cli, [*words, "--chat-template", "alpaca"], catch_exceptions=False)
    assert found.exit_code == 0
    assert template_of(tmp_path / "base.gguf")[0] == read_chat_template("alpaca")
    assert sorted(path.name for path in model.iterdir()) == before
    with pytest.raises(TapirError, match="no such chat template"):
        CliRunner().invoke(cli.cli, [*words, "--chat-template", "none.jinja"], catch_exceptions=False)
