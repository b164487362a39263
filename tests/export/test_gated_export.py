"""A GGUF exported by hand gets its name only after it has passed the gate."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from click.testing import CliRunner

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.export.gated_export import ExportConfig, adapter_training_rows, export_with_gate
from tapir_local.export.probes import PROBE_COUNT
from tapir_local.files import write_rows
from tapir_local.inference.model import read_gguf_template
from tapir_local.records import Example, Message
from tapir_local.resources import read_chat_template


def test_the_command_writes_a_gguf_and_the_gates_report(llama, tmp_path: Path) -> None:
    out = tmp_path / "student.gguf"
    words = ["export", str(llama.model), str(out), "--adapter", str(llama.adapter), "--quant", "f16"]
    found = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert "texts with the same token ids" in found.stderr
    assert json.loads((tmp_path / "student.gguf.gate.json").read_text())["failed"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.gguf", "student.gguf.gate.json"]
    assert found.stdout == f"{sha256(out.read_bytes()).hexdigest()}  {out}\n"


def test_a_modelfile_is_written_on_request(llama, tmp_path: Path) -> None:
    words = ["export", str(llama.model), str(tmp_path / "base.gguf"), "--modelfile", "--no-gate"]
    CliRunner().invoke(cli, words, catch_exceptions=False)
    text = (tmp_path / "base.gguf.Modelfile").read_text()
    assert text.startswith("FROM ./base.gguf\nTEMPLATE")
    assert "num_ctx" not in text  # how it was trained is unknown
    assert CliRunner().invoke(cli, [*words, "--adapter-only"]).exit_code == 2


def test_without_the_gate_there_is_no_report(llama, tmp_path: Path) -> None:
    out = tmp_path / "base.gguf"
    assert export_with_gate(str(llama.model), out, ExportConfig("q8_0", check=False)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_the_rows_of_a_run_are_probed_too(llama, tmp_path: Path) -> None:
    """The prompt and the whole text of each row are compared besides the probes; a train.jsonl beside a foreign adapter
    is ignored."""
    shutil.copytree(llama.adapter, tmp_path / "adapter")
    write_rows(tmp_path / "train.jsonl", [Example(str(n), (Message("user", f"Say {n}."),), f"{n}") for n in range(5)])
    assert adapter_training_rows(tmp_path / "adapter", tmp_path / "work") == tmp_path / "work/rows.jsonl"
    (tmp_path / "adapter/resolved.json").write_text("{}")
    report = export_with_gate(str(llama.model), tmp_path / "out.gguf", ExportConfig("f32", tmp_path / "adapter"))
    assert report
    assert (report.probes, report.min_agreement) == (PROBE_COUNT + 10, 0.99)


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
        export_with_gate(str(model), out, ExportConfig("f32"), spoil)
    assert not out.exists()
    assert (tmp_path / "student.gguf.unchecked").exists()
    assert (tmp_path / "student.gguf.work" / "report.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"quant": "q9"}, "no such quant"), ({"adapter": Path("none")}, "adapter"), ({"model": "/none"}, "none")],
)
def test_an_invalid_argument_is_an_error_and_leaves_no_files(llama, tmp_path: Path, changes: dict, said: str) -> None:
    given = {"model": str(llama.model), "adapter": None, "quant": "f16"} | changes
    out = tmp_path / "out.gguf"
    with pytest.raises(TapirError, match=said):
        export_with_gate(given["model"], out, ExportConfig(given["quant"], given["adapter"]))
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
def test_an_option_that_would_be_ignored_is_refused(llama, tmp_path: Path, words: list[str], option: str) -> None:
    """With --base but without --adapter-only the gate once checked the base, and the new file was written unchecked."""
    (tmp_path / "base.gguf").write_bytes(llama.gguf.read_bytes())
    given = [str(tmp_path / word) if word == "base.gguf" else word for word in words]
    given = [str(llama.adapter) if word == "lora" else word for word in given]
    found = CliRunner().invoke(cli, ["export", str(llama.model), str(tmp_path / "out.gguf"), *given])
    assert f"{option}: the option has no effect here" in str(found.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_an_existing_file_is_not_overwritten(llama, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(TapirError, match="the file exists already"):
        export_with_gate(str(llama.model), tmp_path / "out.gguf", ExportConfig("f16"))
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_a_base_without_a_template_is_exported_with_a_given_one(llama, tmp_path: Path) -> None:
    model = tmp_path / "base"
    shutil.copytree(llama.model, model)
    (model / "chat_template.jinja").unlink()
    before = sorted(path.name for path in model.iterdir())
    words = ["export", str(model), str(tmp_path / "base.gguf"), "--no-gate"]
    with pytest.raises(TapirError, match="chat template") as caught:
        CliRunner().invoke(cli, words, catch_exceptions=False)
    assert "of `tapir-local export` is --chat-template" in str(caught.value)
    found = CliRunner().invoke(cli, [*words, "--chat-template", "alpaca"], catch_exceptions=False)
    assert found.exit_code == 0
    assert read_gguf_template(tmp_path / "base.gguf")[0] == read_chat_template("alpaca")
    assert sorted(path.name for path in model.iterdir()) == before
    with pytest.raises(TapirError, match="no such chat template"):
        CliRunner().invoke(cli, [*words, "--chat-template", "none.jinja"], catch_exceptions=False)
