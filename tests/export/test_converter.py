"""llama.cpp's converter for architectures that we do not support: a substitute script that calls our own export."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import ValidationError
from students import Student

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.export import converter as converting
from tapir_local.export.converter import Converter
from tapir_local.export.export import check_exportable, export_gguf
from tapir_local.export.gate import GateLimits, verify_gguf
from tapir_local.export.gated_export import ExportConfig, export_with_gate
from tapir_local.recipe.schema import Export
from tapir_local.records import Example, Message

ROWS = [Example(str(n), (Message("user", f"What is {n} times {n}?"),), f"It is {n * n}.") for n in range(4)]
STAND_IN = '''
"""Takes the words that llama.cpp's script takes, and a family that only it knows."""
import argparse, json, os, pathlib, sys
import gguf_beside
asked = argparse.ArgumentParser()
asked.add_argument("model", type=pathlib.Path)
asked.add_argument("--outfile", type=pathlib.Path)
asked.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0"])
asked = asked.parse_args()
assert os.environ["HF_HUB_OFFLINE"] == "1"
config = json.loads((asked.model / "config.json").read_text())
assert config["architectures"] == ["FalconForCausalLM"], "only Falcon is known"
assert json.loads((asked.model / "tokenizer_config.json").read_text())["add_bos_token"] is False
(asked.model / "config.json").unlink()
(asked.model / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
from tapir_local.export.export import export_gguf
export_gguf(asked.model, asked.outfile, adapter=None, quant=asked.outtype)
print("done", asked.outtype)
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A llama.cpp checkout: the script, and the gguf package beside it."""
    folder = tmp_path / "llama.cpp"
    (folder / "gguf-py").mkdir(parents=True)
    (folder / "gguf-py/gguf_beside.py").write_text("")
    (folder / converting.CONVERTER_SCRIPT).write_text(STAND_IN)
    return folder / converting.CONVERTER_SCRIPT


@pytest.fixture
def falcon(llama: Student, tmp_path: Path) -> Path:
    """A model that claims another architecture; its model_type is still Llama's, so that transformers loads it."""
    folder = tmp_path / "falcon"
    shutil.copytree(llama.model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["FalconForCausalLM"]}))
    return folder


def test_without_it_the_architecture_is_refused_and_the_fix_names_it(falcon: Path, tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="FalconForCausalLM is not supported") as caught:
        export_gguf(falcon, tmp_path / "out.gguf", adapter=None, quant="f16")
    for word in ("Gemma3ForCausalLM", "Qwen2ForCausalLM", "--converter", "convert_hf_to_gguf.py"):
        assert word in str(caught.value.fix)


@pytest.mark.parametrize("quant", ["f16", "q6_k"])
def test_a_merged_and_converted_model_passes_the_gate(
    llama: Student, falcon: Path, script: Path, tmp_path: Path, quant: str
) -> None:
    """Given the folder instead of the script; the merged model is deleted afterwards."""
    out = tmp_path / "out" / "student.gguf"
    seen: list[str] = []
    export_gguf(
        falcon,
        out,
        adapter=llama.adapter,
        quant=quant,
        converter=Converter(script.parent, tmp_path / "log"),
        progress=lambda done, total, note: seen.append(note),
    )
    assert verify_gguf(falcon, llama.adapter, out, ROWS, limits=GateLimits(0.5)).passed
    assert [path.name for path in out.parent.iterdir()] == ["student.gguf"]
    assert (tmp_path / "log").read_text() == "done f16\n"
    assert seen[-1] == "converted"


def test_the_command(falcon: Path, script: Path, tmp_path: Path) -> None:
    words = ["export", str(falcon), str(tmp_path / "base.gguf"), "--converter", str(script)]
    assert "texts with the same token ids" in CliRunner().invoke(cli, words, catch_exceptions=False).stderr


def test_an_error_has_its_last_line_and_its_log(llama: Student, script: Path, tmp_path: Path) -> None:
    with pytest.raises(TapirError, match=r"exit code 1.*only Falcon is known") as caught:
        export_with_gate(str(llama.model), tmp_path / "out.gguf", ExportConfig("f16", converter=script, check=False))
    assert "AssertionError" in Path(caught.value.where).read_text()
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".gguf", ".partial", ".model")]


def test_a_converter_that_writes_nothing(falcon: Path, tmp_path: Path) -> None:
    (tmp_path / "idle.py").write_text("print('nothing to do')")
    with pytest.raises(TapirError, match="the converter's GGUF is missing"):
        export_gguf(
            falcon,
            tmp_path / "out.gguf",
            adapter=None,
            quant="f16",
            converter=Converter(tmp_path / "idle.py", tmp_path / "log"),
        )


def test_a_missing_converter(falcon: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none.py"):
        with pytest.raises(TapirError, match="the converter is missing"):
            check_exportable(falcon, place)


def test_the_template_is_checked_before_any_paid_call(falcon: Path, script: Path) -> None:
    check_exportable(falcon, script)
    (falcon / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    with pytest.raises(TapirError):
        check_exportable(falcon, script)


def test_an_adapter_of_another_base(falcon: Path, script: Path, students, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(TapirError, match="PEFT cannot merge the adapter"):
        export_gguf(
            falcon, out, adapter=students["qwen3"].adapter, quant="f16", converter=Converter(script, tmp_path / "log")
        )
    assert not list(tmp_path.glob("out*"))


def test_the_recipe_takes_a_path() -> None:
    assert Export(converter="~/llama.cpp").converter == str(Path.home() / "llama.cpp")
    with pytest.raises(ValidationError):
        Export(converter=3)
