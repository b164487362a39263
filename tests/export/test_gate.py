"""The gate on Gemma and SentencePiece: correct exports pass, wrong ones are caught, and memory may be small."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import loaded_modules, record_loaded_modules
from models import CHATML, let_a_runtime_add_bos, make_adapter
from spm import GEMMA
from students import Student, make_student

from tapir_local import memory
from tapir_local.errors import TapirError
from tapir_local.export import architectures, export, tokenizer
from tapir_local.export import probes as probing
from tapir_local.export.export import export_gguf
from tapir_local.export.gate import (
    Figures,
    GateJob,
    GateLimits,
    GateReport,
    adapter_figures,
    gate_memory,
    lacks_adapter,
    log_softmax,
    verify_gguf,
)
from tapir_local.export.gguf_side import GgufSide, GgufSideJob, gguf_side_main
from tapir_local.export.probes import FRAGMENTS, PROBE_COUNT, gate_texts, probe_texts, sample_prompts
from tapir_local.export.reference import load_reference, reference_logits
from tapir_local.files import read_record, write_record, write_rows
from tapir_local.inference import model
from tapir_local.inference.lib import library
from tapir_local.inference.model import open_model
from tapir_local.process import Parent
from tapir_local.records import Example, Message
from tapir_local.training.model import load_tokenizer

ROWS = [Example(str(n), (Message("user", f"What is {n} times {n}?"),), f"  It is {n * n} 🙂.") for n in range(9)]


@pytest.fixture(scope="module", params=["gemma2", "gemma3_text"])
def gemma(request, tmp_path_factory) -> Student:
    return make_student(tmp_path_factory.mktemp("gemma"), request.param, kind="gemma", template=GEMMA)


def gate_report(student: Student, gguf: Path, adapter: Path | None = None, free: int | None = None) -> GateReport:
    return verify_gguf(student.model, adapter or student.adapter, gguf, ROWS, limits=GateLimits(0.9, free))


def test_a_correct_gemma_passes(gemma: Student) -> None:
    report = gate_report(gemma, gemma.gguf)
    assert report.passed, report
    assert (report.bos_trained, report.bos_gguf, report.mismatches) == (1, 1, 0)
    assert report.figures.largest_difference < 0.05  # llama.cpp reads GELU from a 16-bit table


def test_the_gguf_is_compared_on_the_cpu_even_if_llama_cpp_has_a_gpu(
    gemma: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that claims to use a GPU with memory for every layer; the load's parameters are recorded."""
    llama, loads = library(), list[tuple[int, bool]]()
    load = llama.llama_model_load_from_file

    def load_and_record(path: bytes, params: Any) -> Any:
        loads.append((params.n_gpu_layers, params.devices == ctypes.addressof(model.NO_DEVICES)))
        return load(path, params)

    monkeypatch.setattr(llama, "llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr(model, "free_gpu_memory", lambda: 24 << 30)
    monkeypatch.setattr(llama, "llama_model_load_from_file", load_and_record)
    with open_model(gemma.gguf) as opened:
        assert (opened.on_gpu, loads.pop()) == (1.0, (-1, False))
    job = GgufSideJob(gemma.gguf, None, ("Hello",), "Hello", (1,), (ROWS[0].prompt,))
    write_record(tmp_path / "job.json", job)
    gguf_side_main(tmp_path, Parent(lambda report: None))
    assert loads == [(0, True)]
    assert read_record(GgufSide, tmp_path / "found.json").ids[0]


def test_torch_and_llama_cpp_are_never_in_one_process(llama: Student, tmp_path: Path) -> None:
    """With CUDA they crash together."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    job = GateJob(llama.model, llama.gguf, tmp_path / "rows.jsonl", tmp_path / "gate.json", 0.9, llama.adapter)
    write_record(tmp_path / "job.json", job)
    command = [sys.executable, "-m", "tapir_local.export.gate", str(tmp_path)]
    environment = os.environ | record_loaded_modules(tmp_path)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert loaded_modules(tmp_path) == {"torch", "llama_cpp"}
    assert not list(llama.gguf.parent.glob("*.gate"))


# --- wrong exports are caught


def broken(student: Student, out: Path, monkeypatch, **changes: object) -> GateReport:
    """An export with a changed architecture."""
    for name, family in architectures.ARCHITECTURES.items():
        monkeypatch.setitem(architectures.ARCHITECTURES, name, replace(family, **changes))
    export_gguf(student.model, out, adapter=student.adapter, quant="f32")
    return gate_report(student, out)


def test_norms_without_their_offset(gemma: Student, tmp_path: Path, monkeypatch) -> None:
    report = broken(gemma, tmp_path / "out.gguf", monkeypatch, norm_offset=0.0)
    assert {"logits", "agreement"} <= set(report.failed)


def test_a_wrong_rope_order(gemma: Student, tmp_path: Path, monkeypatch) -> None:
    assert "logits" in broken(gemma, tmp_path / "out.gguf", monkeypatch, interleaved=True).failed


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_a_softcap_that_is_lost(tmp_path: Path, monkeypatch, setting: str) -> None:
    """Caps far below this model's scores, so that they matter; the GGUF has Gemma 2's default caps."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, setting: 1.0}
    student = make_student(tmp_path, "gemma2", kind="gemma", template=GEMMA, **caps)
    assert gate_report(student, student.gguf).passed
    write = architectures.write_attention_windows

    def without(writer, config, family, sliding) -> None:
        write(writer, {**config, setting: None}, family, sliding)

    monkeypatch.setattr(architectures, "write_attention_windows", without)
    export_gguf(student.model, tmp_path / "out.gguf", adapter=student.adapter, quant="f32")
    assert "logits" in gate_report(student, tmp_path / "out.gguf").failed


def test_a_window_that_is_lost(gemma: Student, tmp_path: Path, monkeypatch) -> None:
    """The GGUF's sliding window is longer than any answer."""
    write = architectures.write_attention_windows

    def longer(writer, config, family, sliding) -> None:
        write(writer, {**config, "sliding_window": 4096}, family, sliding)

    monkeypatch.setattr(architectures, "write_attention_windows", longer)
    export_gguf(gemma.model, tmp_path / "out.gguf", adapter=gemma.adapter, quant="f32")
    assert "logits" in gate_report(gemma, tmp_path / "out.gguf").failed


def test_an_adapter_is_seen_through_noise_ten_times_its_effect() -> None:
    chance = np.random.default_rng(0)
    base, adapter, noise = (scale * chance.standard_normal((300, 400)) for scale in (2.0, 0.05, 0.5))
    trained = base + adapter

    def figures(*logits):
        return adapter_figures(*map(log_softmax, logits))

    assert figures(trained, trained, base) == (pytest.approx(0.05**2, rel=0.1), pytest.approx(1.0))
    assert figures(trained + noise, trained, base)[1] == pytest.approx(1.0, abs=0.2)
    assert figures(base + noise, trained, base)[1] == pytest.approx(0.0, abs=0.2)
    assert figures(base + noise, base, base) == (0.0, None)


@pytest.mark.parametrize(
    ("kl", "effect", "share", "lacks"),
    [
        (0.005, 0.01, 0.0, True),
        (0.01, 0.01, 0.3, False),
        (0.074, 0.01, 0.0, False),
        (0.02, 0.01, 0.2, True),
        (9.0, 0.1, 0.0, True),
    ],
)
def test_an_adapter_is_missed_only_where_quantization_lets_it_be_seen(kl, effect, share, lacks) -> None:
    assert lacks_adapter(Figures(kl, 0.1, 1.0, 0.9, 600, effect, share), 0.1) == lacks
    assert not lacks_adapter(Figures(kl, None, 1.0, 0.9, 600), 0.1)


def test_a_swapped_adapter(gemma: Student, tmp_path: Path) -> None:
    assert "logits" in gate_report(gemma, gemma.gguf, make_adapter(gemma.model, tmp_path / "other", seed=9)).failed


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (lambda vocab: replace(vocab, chat_template=CHATML), "template"),
        (lambda vocab: replace(vocab, space_prefix=True), "tokens"),
        (lambda vocab: replace(vocab, tokens=tuple(replace(t, score=0.0) for t in vocab.tokens)), "tokens"),
        (
            lambda vocab: replace(vocab, tokens=tuple(replace(t, kind=1) if t.kind == 4 else t for t in vocab.tokens)),
            "tokens",
        ),
        (lambda vocab: replace(vocab, special={**vocab.special, "eos": 7}), "eos"),
    ],
    ids=["template", "space prefix", "scores", "added tokens lost", "eos"],
)
def test_a_wrong_vocabulary(gemma: Student, tmp_path: Path, monkeypatch, change: Callable, failed: str) -> None:
    read = tokenizer.read_model_vocabulary
    monkeypatch.setattr(export, "read_model_vocabulary", lambda *arguments: change(read(*arguments)))
    export_gguf(gemma.model, tmp_path / "out.gguf", adapter=gemma.adapter, quant="f32")
    assert failed in gate_report(gemma, tmp_path / "out.gguf").failed


def test_a_second_bos(gemma: Student, tmp_path: Path, monkeypatch) -> None:
    let_a_runtime_add_bos(monkeypatch)
    export_gguf(gemma.model, tmp_path / "out.gguf", adapter=gemma.adapter, quant="f32")
    assert gate_report(gemma, tmp_path / "out.gguf").failed == ("bos",)


# --- what is compared


def test_rows_are_probed_as_they_were_trained_on(gemma: Student) -> None:
    """Prompts as asked, many probes, and whole rows with their completions and the end of the turn."""
    texts = gate_texts(load_tokenizer(gemma.model), ROWS)
    assert len(texts) == PROBE_COUNT + 2 * len(ROWS)
    assert texts[3] == "<bos><start_of_turn>user\nWhat is 3 times 3?<end_of_turn>\n<start_of_turn>model\n"
    assert texts[-1].endswith("<start_of_turn>model\nIt is 64 🙂.<end_of_turn>\n")


def test_a_completion_that_alone_is_tokenized_differently_is_caught(
    gemma: Student, tmp_path: Path, monkeypatch
) -> None:
    """No probes, prompts with equal token ids, and a GGUF without one of the completion's tokens."""
    read = tokenizer.read_model_vocabulary

    def without_tool(*arguments: object) -> tokenizer.Vocabulary:
        vocab = read(*arguments)
        return replace(vocab, tokens=tuple(replace(t, kind=1) if t.text == "<tool>" else t for t in vocab.tokens))

    monkeypatch.setattr(export, "read_model_vocabulary", without_tool)
    monkeypatch.setattr(probing, "probe_texts", lambda tokenizer: [])
    export_gguf(gemma.model, tmp_path / "out.gguf", adapter=gemma.adapter, quant="f32")
    rows = [*ROWS, Example("tool", (Message("user", "Call it."),), "<tool>now")]
    report = verify_gguf(gemma.model, gemma.adapter, tmp_path / "out.gguf", rows, limits=GateLimits(0.9))
    assert (report.failed, report.mismatches) == (("tokens",), 1)
    assert "<tool>now" in report.examples[0].text


def test_every_added_token_and_fragment_is_among_the_probes(gemma: Student) -> None:
    """Gemma's tokens of several ▁ are spaces in a text."""
    found = probe_texts(load_tokenizer(gemma.model))
    assert set(FRAGMENTS) <= set(found)
    for text in ("<tool>", "<start_of_turn>", "<eos>", "a          b"):
        assert any(text in probe for probe in found)


def test_without_rows_the_fallback_prompts_are_used() -> None:
    assert len(sample_prompts([])) == 8
    assert len(sample_prompts(ROWS * 9)) == 17


# --- small memory


@pytest.mark.parametrize("adapted", [False, True])
def test_layer_by_layer_it_is_the_same(gemma: Student, adapted: bool) -> None:
    """Texts of several lengths, four per forward pass, with the adapter and with it switched off."""
    texts = [([5, 6, 7, 8, 9], 2), ([11, 12], 1), (list(range(20, 60)), 20), ([3], 0), ([4, 4, 4], 0)]
    adapter = gemma.adapter if adapted else None
    whole, streamed = load_reference(gemma.model, adapter), load_reference(gemma.model, adapter, free=400_000)
    assert (whole.streamed, streamed.streamed) == (False, True)
    pairs = zip(reference_logits(whole, texts), reference_logits(streamed, texts), strict=True)
    for (expected, base), (found, base_found) in pairs:
        assert abs(expected - found).max() < 1e-4
        assert (base is None) == (not adapted)
        assert base is None or (abs(base - base_found).max() < 1e-4 < abs(base - found).max())


def test_the_gate_says_that_it_read_layer_by_layer(gemma: Student, capfd) -> None:
    with open_model(gemma.gguf, vocab_only=True) as opened:
        beside = gate_memory(library().llama_vocab_n_tokens(opened.vocab))
    report = gate_report(gemma, gemma.gguf, free=beside + 400_000)
    assert report.streamed
    assert report.passed, report
    assert "in 32 bits" in capfd.readouterr().err


def test_too_little_memory_for_streaming(gemma: Student) -> None:
    with pytest.raises(TapirError, match=r"not enough memory for the comparison: .* MB in 32 bits"):
        gate_report(gemma, gemma.gguf, free=1000)


def test_no_room_on_the_disk(gemma: Student, tmp_path: Path, monkeypatch) -> None:
    """Raised before anything is written."""
    usage = memory.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(TapirError, match="not enough disk space for the GGUF and the 16-bit GGUF"):
        export_gguf(gemma.model, tmp_path / "out.gguf", adapter=None, quant="q4_k_m")
    assert not list(tmp_path.iterdir())


def test_the_required_disk_space_is_the_files_size(gemma: Student, tmp_path: Path, monkeypatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(export, "check_disk_space", lambda path, wanted, what: asked.append(wanted))
    export_gguf(gemma.model, tmp_path / "out.gguf", adapter=None, quant="q8_0")
    assert asked[0] == pytest.approx((tmp_path / "out.gguf").stat().st_size, rel=0.03)


def test_no_memory(gemma: Student, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(TapirError, match="not enough memory for the export"):
        export_gguf(gemma.model, tmp_path / "out.gguf", adapter=None, quant="q8_0")
    assert not list(tmp_path.iterdir())
