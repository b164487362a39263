"""Base and adapter to GGUF, and the gate that rejects wrong exports."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from models import CHATML, largest_difference, let_a_runtime_add_bos, make_adapter, make_model
from students import Student

from tapir_local.errors import TapirError
from tapir_local.export import architectures, export, tokenizer
from tapir_local.export.export import ExportJob, export_gguf
from tapir_local.export.gate import GateJob, GateLimits, GateReport, gate_main, run_gate, verify_gguf
from tapir_local.files import write_record, write_rows
from tapir_local.inference.model import metadata, open_model
from tapir_local.records import Example, Message, from_json, to_json

ROWS = [
    Example(str(n), (Message("user", f"What is {n} times {n % 7}?"),), f"It is {n * (n % 7)}, naïve 你好 🙂.")
    for n in range(6)
]
LLAMA2_TOKENIZER = Path(__file__).parents[3] / "shared/data/tokenizers/granite-7b-lab"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_merged_logits_equal_those_of_transformers(students, family: str) -> None:
    student = students[family]
    assert largest_difference(student.model, student.adapter, student.gguf) < 1e-4


def test_mistral_shards_and_bf16(tmp_path: Path) -> None:
    """Weights in several bfloat16 files, as they are on the Hub."""
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / "one", "mistral")
    import torch

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    shards = tmp_path / "shards"
    shutil.copytree(folder, shards, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    export_gguf(shards, tmp_path / "out.gguf", adapter=None, quant="f32")
    export_gguf(shards, tmp_path / "small.gguf", adapter=None, quant="q4_k_m")  # made from bf16
    model.float().save_pretrained(folder)
    assert largest_difference(folder, None, tmp_path / "out.gguf") < 1e-4
    assert largest_difference(folder, None, tmp_path / "small.gguf") < 4


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0}),
        ("llama", {"rope_type": "llama3", **LLAMA3}),
        ("llama", YARN),
        ("qwen2", {**YARN, "attention_factor": 0.8}),
        ("qwen3", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}),
        ("llama", {**YARN, "beta_fast": 32, "beta_slow": 1}),
        ("gemma2", {"rope_type": "linear", "factor": 2.0}),
    ],
    ids=["linear", "llama3", "yarn", "yarn attention_factor", "yarn mscale", "yarn betas", "gemma2 linear"],
)
def test_rope_scaling(tmp_path: Path, family: str, scaling: dict) -> None:
    folder = make_model(
        tmp_path / "model", family, rope_parameters={"rope_theta": 10000.0, **scaling}, max_position_embeddings=512
    )
    export_gguf(folder, tmp_path / "out.gguf", adapter=None, quant="f32")
    assert largest_difference(folder, None, tmp_path / "out.gguf") < (5e-2 if family == "gemma2" else 1e-3)


@pytest.mark.parametrize("older", [False, True])
def test_gemma_3_with_its_own_pattern_of_layers_and_scaling(tmp_path: Path, older: bool) -> None:
    """Seven layers, the sixth with full attention, with their own base frequency and scaling; also in transformers 4's
    format."""
    bases = {"sliding_attention": {"rope_theta": 10000.0}, "full_attention": {"rope_type": "linear", "factor": 8.0}}
    bases["full_attention"]["rope_theta"] = 1e6
    folder = make_model(tmp_path / "model", "gemma3_text", num_hidden_layers=7, layer_types=None, rope_parameters=bases)
    if older:
        edit(folder / "config.json", in_the_older_way)
    export_gguf(folder, tmp_path / "out.gguf", adapter=None, quant="f32")
    assert largest_difference(folder, None, tmp_path / "out.gguf") < 5e-2


def in_the_older_way(config: dict) -> None:
    """Gemma 3's config as transformers 4 wrote it, without defaults."""
    for name in ("rope_parameters", "layer_types", "_sliding_window_pattern", "tie_word_embeddings"):
        config.pop(name, None)
    config |= {"sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 10000.0}
    config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}


def test_mistrals_window_ends_the_context(tmp_path: Path) -> None:
    """llama.cpp has no sliding window for it: inside the window both are equal."""
    folder = make_model(tmp_path / "model", "mistral", sliding_window=100)
    export_gguf(folder, tmp_path / "out.gguf", adapter=None, quant="f32")
    with open_model(tmp_path / "out.gguf") as model:
        assert metadata(model, "llama.context_length") == "100"
    assert largest_difference(folder, None, tmp_path / "out.gguf") < 1e-4


@pytest.mark.parametrize(
    "changes", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}]
)
def test_lora_scales(llama: Student, tmp_path: Path, changes: dict) -> None:
    adapter = make_adapter(llama.model, tmp_path / "lora", **changes)
    export_gguf(llama.model, tmp_path / "out.gguf", adapter=adapter, quant="f32")
    assert largest_difference(llama.model, adapter, tmp_path / "out.gguf") < 1e-4


@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"])
def test_every_quant_loads_and_is_close(llama: Student, tmp_path: Path, quant: str) -> None:
    out = tmp_path / "out.gguf"
    export_gguf(llama.model, out, adapter=llama.adapter, quant=quant)
    limit = {"f16": 0.05, "bf16": 0.3, "q8_0": 1, "q6_k": 2, "q5_k_m": 4, "q4_k_m": 4}[quant]
    assert 0 < largest_difference(llama.model, llama.adapter, out) < limit
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert out.stat().st_size < llama.gguf.stat().st_size


def test_the_same_twice(llama: Student, tmp_path: Path) -> None:
    export_gguf(llama.model, tmp_path / "again.gguf", adapter=llama.adapter, quant="f32")
    assert (tmp_path / "again.gguf").read_bytes() == llama.gguf.read_bytes()


@pytest.mark.parametrize(("block", "quant"), [(1, "q8_0"), (300, "bf16"), (5000, "f32")])
def test_the_same_file_in_blocks_of_any_size(
    llama: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, quant: str
) -> None:
    for name in ("whole", "blocks"):
        export_gguf(llama.model, tmp_path / name, adapter=llama.adapter, quant=quant)
        monkeypatch.setattr("tapir_local.export.writer.BLOCK_WEIGHTS", block)
    assert (tmp_path / "blocks").read_bytes() == (tmp_path / "whole").read_bytes()


def test_sentencepiece_vocabulary() -> None:
    """LLaMA-2's vocabulary with chat tokens added: ids equal those of transformers; tokenizer.model is not read."""
    if not LLAMA2_TOKENIZER.is_dir():
        pytest.skip("the tokenizer is not on this machine")
    vocab = tokenizer.read_model_vocabulary(LLAMA2_TOKENIZER, 32008)
    assert (vocab.model, vocab.space_prefix, len(vocab.tokens)) == ("llama", False, 32008)
    assert vocab.special == {"bos": 1, "eos": 32000, "unk": 0, "pad": 32001, "eot": 32000}


@pytest.mark.parametrize("files", ["tokenizer.json", "tokenizer.model"])
def test_sentencepiece_ids(tmp_path: Path, files: str) -> None:
    """The same vocabulary in a model of one layer, with the gate's probes; also from SentencePiece's own file."""
    if not LLAMA2_TOKENIZER.is_dir():
        pytest.skip("the tokenizer is not on this machine")
    folder = make_model(tmp_path / "model", vocab_size=32008, num_hidden_layers=1, hidden_size=16)
    for path in folder.glob("*oken*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink()
    for path in LLAMA2_TOKENIZER.glob("*oken*"):
        if path.name not in {"tokenizer.json", "tokenizer.model"} - {files}:
            shutil.copy(path, folder)
    export_gguf(folder, tmp_path / "out.gguf", adapter=None, quant="f32")
    report = verify_gguf(folder, None, tmp_path / "out.gguf", ROWS, limits=GateLimits(0.9))
    assert report.probes > 500
    assert report.passed, report


# --- what cannot be exported


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", lambda c: c.update(architectures=["FalconForCausalLM"]), "FalconForCausalLM is not supported"),
        ("config.json", lambda c: c.update(hidden_act="gelu"), "hidden_act gelu"),
        ("config.json", lambda c: c.update(architectures=["Gemma3ForConditionalGeneration"]), "is not supported"),
        ("config.json", lambda c: c["rope_parameters"].update(YARN, beta_fast=16), "yarn's beta_fast 16"),
        ("config.json", lambda c: c["rope_parameters"].update(YARN, truncate=False), "truncate"),
        (
            "config.json",
            lambda c: c["rope_parameters"].update(rope_type="longrope"),
            "does not support rope scaling of type longrope",
        ),
        ("tokenizer.json", lambda c: c["model"].update(type="Unigram"), "type Unigram"),
        ("tokenizer.json", lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "no name for its pre_tokenizer"),
        (
            "tokenizer.json",
            lambda c: c["added_tokens"].append({"id": 900, "content": "<new>", "special": True}),
            "token 900",
        ),
        ("chat_template.jinja", None, "no chat template"),
        ("model.safetensors", None, "cannot be read"),
        ("tokenizer.json", None, "missing"),
    ],
)
def test_models_that_are_refused(
    llama: Student, tmp_path: Path, file: str, change: Callable | None, words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama.model, folder)
    edit(folder / file, change) if change else (folder / file).unlink()
    with pytest.raises(TapirError, match=words) as caught:
        export_gguf(folder, tmp_path / "out.gguf", adapter=None, quant="f32")
    assert caught.value.fix
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 64}, r"query_pre_attn_scalar 64 \(llama.cpp uses 32\)"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping None"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_act silu"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", **LLAMA3}}, "type llama3"),
    ],
)
def test_settings_that_llama_cpp_would_ignore(tmp_path: Path, family: str, changes: dict, words: str) -> None:
    folder = make_model(tmp_path / "model", family)
    edit(folder / "config.json", lambda config: config.update(changes))
    with pytest.raises(TapirError, match=words):
        export.check_exportable(folder)


def test_a_missing_shard_is_named(llama: Student, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "shards"
    shutil.copytree(llama.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(llama.model).save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(TapirError, match=rf"1 of the model's {len(shards)} weight files are missing: {shards[1].name}"):
        export_gguf(folder, tmp_path / "out.gguf", adapter=None, quant="f32")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None])
def test_a_shard_outside_the_folder_is_not_read(llama: Student, tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama.model, folder)
    shutil.copy(llama.model / "model.safetensors", tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors", "lm_head.weight": name}}))
    with pytest.raises(TapirError, match="names a file that is not in the model's folder") as caught:
        export_gguf(folder, tmp_path / "out.gguf", adapter=None, quant="f32")
    assert caught.value.where == str(index)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map_is_an_error(llama: Student, tmp_path: Path, text: str) -> None:
    shutil.copytree(llama.model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(TapirError, match="no weight_map"):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf", adapter=None, quant="f32")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m['content'] }} {% endfor %}", "no token that ends the assistant's turn"),
        (CHATML.replace("<|im_end|>", "***"), "does not end an answer with a token of the tokenizer"),
    ],
    ids=["nothing", "no token"],
)
def test_a_template_that_does_not_close_the_turn(tmp_path: Path, template: str, words: str) -> None:
    folder = make_model(tmp_path / "model", template=template)
    with pytest.raises(TapirError, match=words):
        export.check_exportable(folder)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="missing"):
        export_gguf(tmp_path, tmp_path / "out.gguf", adapter=None, quant="f32")


def test_a_shortened_weights_file(llama: Student, tmp_path: Path) -> None:
    shutil.copytree(llama.model, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(TapirError, match="ends before tensor"):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf", adapter=None, quant="f32")


@pytest.mark.parametrize(
    "setting", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"peft_type": "LOHA"}]
)
def test_adapters_that_are_more_than_lora(llama: Student, tmp_path: Path, setting: dict) -> None:
    shutil.copytree(llama.adapter, tmp_path / "lora")
    edit(tmp_path / "lora/adapter_config.json", lambda c: c.update(setting))
    with pytest.raises(TapirError, match="only plain LoRA"):
        export_gguf(llama.model, tmp_path / "out.gguf", adapter=tmp_path / "lora", quant="f32")


def test_no_such_quant(llama: Student, tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="no such quant: q3"):
        export_gguf(llama.model, tmp_path / "out.gguf", adapter=None, quant="q3")


# --- the gate


def gate_report(student: Student, gguf: Path, adapter: Path | None = None) -> GateReport:
    return verify_gguf(student.model, adapter or student.adapter, gguf, ROWS, limits=GateLimits(0.9))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_correct_gguf_passes(students, family: str) -> None:
    report = gate_report(students[family], students[family].gguf)
    assert report.passed, report
    assert report.probes > 500
    assert report.figures.agreement == 1
    assert from_json(GateReport, to_json(report)) == report
    assert report.bos_trained == (1 if family == "llama" else 0)


def test_a_wrong_rope_order_is_caught(llama: Student, tmp_path: Path, monkeypatch) -> None:
    llama_family = architectures.ARCHITECTURES["LlamaForCausalLM"]
    monkeypatch.setitem(architectures.ARCHITECTURES, "LlamaForCausalLM", replace(llama_family, interleaved=False))
    export_gguf(llama.model, tmp_path / "out.gguf", adapter=llama.adapter, quant="q4_k_m")
    report = gate_report(llama, tmp_path / "out.gguf")
    assert set(report.failed) == {"logits", "agreement"}
    assert report.figures.kl > 0.3


def test_an_omitted_adapter_is_caught(llama: Student, tmp_path: Path) -> None:
    export_gguf(llama.model, tmp_path / "out.gguf", adapter=None, quant="q8_0")
    assert set(gate_report(llama, tmp_path / "out.gguf").failed) == {"logits", "adapter", "agreement"}


def test_another_rounds_adapter_is_caught(llama: Student, tmp_path: Path) -> None:
    other = make_adapter(llama.model, tmp_path / "other", seed=9)
    assert "logits" in gate_report(llama, llama.gguf, other).failed


def rewritten(
    student: Student, folder: Path, change: Callable[[tokenizer.Vocabulary], tokenizer.Vocabulary], monkeypatch
) -> Path:
    """An export with a changed tokenizer."""
    read = tokenizer.read_model_vocabulary
    monkeypatch.setattr(export, "read_model_vocabulary", lambda *arguments: change(read(*arguments)))
    export_gguf(student.model, folder / "out.gguf", adapter=student.adapter, quant="f32")
    return folder / "out.gguf"


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (lambda vocab: replace(vocab, chat_template=CHATML), {"template"}),
        (lambda vocab: replace(vocab, pre_tokenizer="gpt-2"), {"tokens"}),
        (lambda vocab: replace(vocab, merges=vocab.merges[:-40]), {"tokens"}),
        (lambda vocab: replace(vocab, special={**vocab.special, "eos": 7}), {"eos"}),
        (lambda vocab: replace(vocab, tokens=tuple(replace(t, kind=1) for t in vocab.tokens)), {"tokens"}),
    ],
    ids=["template", "splitting", "merges", "eos", "added tokens lost"],
)
def test_a_wrong_vocabulary_is_caught(
    llama: Student, tmp_path: Path, monkeypatch, change: Callable, failed: set
) -> None:
    assert failed <= set(gate_report(llama, rewritten(llama, tmp_path, change, monkeypatch)).failed)


def test_a_second_bos_is_caught(llama: Student, tmp_path: Path, monkeypatch) -> None:
    let_a_runtime_add_bos(monkeypatch)
    export_gguf(llama.model, tmp_path / "out.gguf", adapter=llama.adapter, quant="f32")
    report = gate_report(llama, tmp_path / "out.gguf")
    assert report.failed == ("bos",)
    assert (report.bos_trained, report.bos_gguf) == (1, 2)


def test_jobs_in_their_own_process(llama: Student, tmp_path: Path) -> None:
    """An export, a gate that passes, and a gate that fails without writing gate.json."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "student.gguf"
    write_rows(rows, ROWS)
    seen: list[tuple[int, int, str]] = []
    job = ExportJob(llama.model, out, "q8_0", llama.adapter)
    export.run_export(job, tmp_path / "export", lambda *news: seen.append(news))
    assert seen[-1][:2] == (len(seen), len(seen))
    passing = GateJob(llama.model, out, rows, tmp_path / "gate.json", 0.5, llama.adapter)
    run_gate(passing, tmp_path / "gate")
    assert json.loads(passing.out.read_text())["failed"] == []
    passing.out.unlink()
    other = make_adapter(llama.model, tmp_path / "other", seed=9)
    write_record(tmp_path / "gate/job.json", replace(passing, adapter=other))
    with pytest.raises(TapirError, match=r"logits \(divergence"):
        gate_main(tmp_path / "gate", lambda *news: None)
    assert not passing.out.exists()
    assert "logits" in json.loads((tmp_path / "gate/report.json").read_text())["failed"]
