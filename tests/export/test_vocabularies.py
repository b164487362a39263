"""Every type of tokenizer is exported or refused with a reason, and an abort of llama.cpp gives one clear error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from models import CHATML, make_model, make_tokenizer
from spm import GEMMA, make_gemma_tokenizer

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.export import tokenizer
from tapir_local.export.export import check_exportable, export_gguf
from tapir_local.export.gate import GateJob, find_mismatches, load_tokenizer, run_gate
from tapir_local.export.probes import gate_texts
from tapir_local.export.tokenizer import read_model_vocabulary
from tapir_local.files import write_rows
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.llama_process import GenerateJob, LlamaPlace, run_generate_job
from tapir_local.inference.model import open_model
from tapir_local.inference.prompt_file import PROMPT_FILE_ADVICE
from tapir_local.inference.tokens import encode
from tapir_local.inference.vocab_check import check_vocabulary
from tapir_local.records import Message


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def other_models() -> dict[str, Any]:
    """One model of every type in `tokenizers` besides BPE."""
    from tokenizers import models

    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("▁a", -2.0), ("b", -3.0)]
    words = {"<unk>": 0, "[UNK]": 1, "a": 2, "##b": 3}
    return {
        "Unigram": models.Unigram(pieces, unk_id=0, byte_fallback=False),
        "WordPiece": models.WordPiece(words, unk_token="[UNK]"),
        "WordLevel": models.WordLevel(words, unk_token="[UNK]"),
    }


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_a_tokenizer_of_another_type_is_refused_by_name_before_anything_is_paid(tmp_path: Path, kind: str) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    model = make_model(tmp_path / "model")
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(other_models()[kind]), eos_token="<|im_end|>")
    made.chat_template = CHATML
    made.save_pretrained(model)
    with pytest.raises(TapirError, match=f"a tokenizer of type {kind} cannot be exported") as caught:
        check_exportable(model)
    assert caught.value.where.endswith("tokenizer.json")
    assert caught.value.fix


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda c: c["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "does not support its normalizer: Lowercase"),
        (
            lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}),
            "Strip",
        ),
        (lambda c: c.pop("model"), "type unknown"),
        (lambda c: c["model"].pop("merges"), "without merges"),
        (lambda c: c["model"].update(vocab=[]), "without vocab"),
        (
            lambda c: c["added_tokens"].append({"id": 401, "content": "<tool>", "special": False}),
            "the same text, '<tool>'",
        ),
    ],
)
def test_what_llama_cpp_does_not_support_is_refused_by_name(tmp_path: Path, change: Callable, said: str) -> None:
    model = make_model(tmp_path / "model")
    edit(model / "tokenizer.json", change)
    with pytest.raises(TapirError, match=said) as caught:
        check_exportable(model)
    assert caught.value.fix


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "7", "null", "{", "\xff"])
def test_a_file_without_a_json_object_is_named(tmp_path: Path, file: str, text: str) -> None:
    model = make_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    (model / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(TapirError, match=r"not (a )?JSON") as caught:
        check_exportable(model)
    assert caught.value.where == str(model / file)


def test_byte_fallback_does_not_make_a_byte_level_tokenizer_sentencepiece(tmp_path: Path) -> None:
    """transformers converts SmolLM2's tokenizer from a GGUF like this: BPE with byte_fallback, but byte-level
    splitting."""
    model = make_model(tmp_path / "model", kind="gpt2")
    edit(model / "tokenizer.json", lambda c: c["model"].update(byte_fallback=True))
    export_gguf(model, tmp_path / "out.gguf", adapter=None, quant="f32")
    tokenizer = load_tokenizer(model)
    with open_model(tmp_path / "out.gguf", vocab_only=True) as opened:
        texts = gate_texts(tokenizer, [])
        assert find_mismatches(tokenizer, [encode(opened, text) for text in texts], texts) == []


def without_bytes(model: Path) -> None:
    """Remove the tokens for single bytes from a SentencePiece vocabulary and close the gap."""

    def drop(content: dict[str, Any]) -> None:
        kept = [text for text in content["model"]["vocab"] if not (text.startswith("<0x") and text != "<0x0A>")]
        content["model"]["vocab"] = {text: number for number, text in enumerate(kept)}
        for token in content["added_tokens"]:
            token["id"] = content["model"]["vocab"].get(token["content"], len(kept))

    edit(model / "tokenizer.json", drop)


def test_sentencepiece_without_its_bytes_is_refused(tmp_path: Path) -> None:
    make_gemma_tokenizer(tmp_path)
    assert read_model_vocabulary(tmp_path, 600).model == "llama"
    without_bytes(tmp_path)
    with pytest.raises(TapirError, match="lacks 255 of the 256 tokens for single bytes: <0x00>"):
        read_model_vocabulary(tmp_path, 600)


@pytest.fixture(scope="module")
def fatal(tmp_path_factory) -> Path:
    """A GGUF like those this program once wrote: llama.cpp aborts the process on most texts."""
    folder = tmp_path_factory.mktemp("fatal")
    model = make_model(folder / "model", "gemma3_text", kind="gemma", template=GEMMA)
    without_bytes(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "check_byte_tokens", lambda *_: None)
        export_gguf(model, folder / "out.gguf", adapter=None, quant="f32")
    return folder / "out.gguf"


def test_an_abort_of_the_library_gives_one_clear_error(fatal: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"instruction": "Ünïcödé 你好"}\n')
    words = ["generate", str(fatal), str(tmp_path / "asked.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    found = CliRunner().invoke(cli, words)
    assert isinstance(found.exception, TapirError)
    assert "llama.cpp ends the process over its vocabulary: SIGABRT: what()" in found.exception.what
    assert found.exception.where == str(fatal)
    assert not (tmp_path / "out.jsonl").exists()


def test_an_abort_in_a_process_of_its_own_is_told_with_the_librarys_words(fatal: Path, tmp_path: Path) -> None:
    """As an abort of CUDA ends a stage: here it is a real one of llama.cpp on the processor."""
    job = GenerateJob(fatal, ((Message("user", "Ünïcödé 你好"),),), GenerationConfig(max_tokens=4, context=128))
    with pytest.raises(TapirError, match=r"llama.cpp ended its process by SIGABRT: .*terminate called") as caught:
        run_generate_job(job, place=LlamaPlace(apart=True, folder=tmp_path / "llama"))
    assert "terminate called" in (tmp_path / "llama" / "llama_process.log").read_text()
    assert caught.value.where == str(tmp_path / "llama" / "llama_process.log")


def test_the_gate_names_the_gguf_that_aborted_its_process(fatal: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [])
    job = GateJob(fatal.parent / "model", fatal, tmp_path / "rows.jsonl", tmp_path / "gate.json")
    with pytest.raises(TapirError, match=r"the GGUF cannot be used: .*SIGABRT: .*what\(\)") as caught:
        run_gate(job, tmp_path / "work")
    assert caught.value.where == str(fatal)
    assert not (tmp_path / "gate.json").exists()


def test_a_valid_vocabulary_is_checked_once_and_a_missing_file_is_ignored(llama, tmp_path: Path) -> None:
    for _ in range(2):
        check_vocabulary(llama.gguf, PROMPT_FILE_ADVICE)
    check_vocabulary(tmp_path / "none.gguf", PROMPT_FILE_ADVICE)
    (tmp_path / "text.gguf").write_text("no model")
    check_vocabulary(tmp_path / "text.gguf", PROMPT_FILE_ADVICE)


# --- Unicode forms


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_texts_are_normalized_as_the_tokenizer_does(tmp_path: Path, form: str) -> None:
    model = make_model(tmp_path / "model")
    edit(model / "tokenizer.json", lambda c: c.update(normalizer={"type": form}))
    export_gguf(model, tmp_path / "out.gguf", adapter=None, quant="f32")
    tokenizer = load_tokenizer(model)
    with open_model(tmp_path / "out.gguf", vocab_only=True) as opened:
        assert opened.form == form
        for text in (
            "nai\u0308ve café ﬁne ½",
            "a\u0323\u0302 <tool> <|im_end|>\u0338",
            "\u1112\u1161\u11ab한",
            "plain",
        ):
            [ids] = tokenizer([text], add_special_tokens=False)["input_ids"]
            assert encode(opened, text) == ids


@pytest.mark.parametrize(("family", "form"), [("qwen2", "NFC"), ("llama", None)])
def test_the_normalization_is_that_of_the_tokenizer_in_transformers(
    tmp_path: Path, family: str, form: str | None
) -> None:
    """Both split text like Qwen, and neither file names a normalizer; for qwen2, transformers uses its own class."""
    model = make_model(tmp_path / "model", family, kind="qwen2")
    export_gguf(model, tmp_path / "out.gguf", adapter=None, quant="f32")
    with open_model(tmp_path / "out.gguf", vocab_only=True) as opened:
        assert opened.form == form


def test_a_foreign_gguf_is_normalized_by_the_name_of_its_pre_tokenizer(tmp_path: Path, monkeypatch) -> None:
    model = make_model(tmp_path / "model", "qwen2", kind="qwen2")
    monkeypatch.setattr(tokenizer, "NORMALIZER_KEY", "general.comment")
    export_gguf(model, tmp_path / "out.gguf", adapter=None, quant="f32")
    with open_model(tmp_path / "out.gguf", vocab_only=True) as opened:
        assert opened.form == "NFC"
        assert encode(opened, "cafe\u0301") == encode(opened, "café")


def test_spare_rows_have_unique_names(tmp_path: Path) -> None:
    """llama.cpp aborts the process if two tokens have the same text."""
    tokenizer = make_tokenizer(tmp_path)
    spare = len(tokenizer) + 1
    tokenizer.add_tokens([f"[PAD{spare}]"])
    tokenizer.save_pretrained(tmp_path)
    texts = [token.text for token in read_model_vocabulary(tmp_path, spare + 5).tokens]
    assert len(set(texts)) == len(texts) == spare + 5
