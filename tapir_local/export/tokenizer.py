"""Convert a Hugging Face tokenizer to the metadata that llama.cpp tokenizes by."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapir_local.data.chat_template import NO_TEMPLATE
from tapir_local.data.special_tokens import find_turn_end
from tapir_local.errors import TapirError
from tapir_local.inference.model import NFC_PRE_TOKENIZERS, NORMALIZER_KEY, UNICODE_FORMS
from tapir_local.inference.tokens import SENTENCEPIECE_SPACE
from tapir_local.training.model_files import read_model_json

# llama.cpp splits text by rules that it knows by name (src/llama-vocab.cpp), so only tokenizers with one of these rules
# can be exported. The keys are made from tokenizer.json's pre_tokenizer by `pre_tokenizer_step`.
WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CONTRACTION_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST_PATTERN = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER_CLASS, LOWER_CLASS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PREFIX_PATTERN = r"[^\r\n\p{L}\p{N}]?"
TEKKEN_PATTERN = (
    rf"{PREFIX_PATTERN}{UPPER_CLASS}*{LOWER_CLASS}+|{PREFIX_PATTERN}{UPPER_CLASS}+{LOWER_CLASS}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (rf"{CONTRACTION_PATTERN}|{WORD_PATTERN}|\p{{N}}|{REST_PATTERN}", "bytes"): "qwen2",
    (rf"{CONTRACTION_PATTERN}|{WORD_PATTERN}|\p{{N}}{{1,3}}|{REST_PATTERN}", "bytes"): "llama-bpe",
    (TEKKEN_PATTERN, "bytes"): "tekken",
}


@dataclass(frozen=True)
class VocabToken:
    """A row of the vocabulary: its text, the number of its gguf.TokenType and, for SentencePiece, its score."""

    text: str
    kind: int
    score: float = 0.0


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's metadata in the GGUF. `special` maps bos, eos, unk, pad and eot to ids.

    `model` is llama.cpp's name of the algorithm: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    `normalization` is the normalizer's Unicode form, which our own inference applies because llama.cpp does not.
    """

    model: str
    pre_tokenizer: str
    tokens: tuple[VocabToken, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    space_prefix: bool
    chat_template: str
    normalization: str = ""


def read_model_vocabulary(model_dir: Path, rows: int) -> Vocabulary:
    """The tokenizer in a model's folder, padded to the embedding's `rows`. Raises TapirError if llama.cpp does not
    support it."""
    tokenizer = read_tokenizer_json(model_dir)
    model = bpe_model(tokenizer, model_dir)
    template, texts = read_model_template(model_dir), special_token_texts(model_dir)
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())} | model["vocab"]
    special = {name: ids[text] for name, text in texts.items() if text in ids} | end_of_turn_id(
        tokenizer, template, texts
    )
    control = {text for text, number in ids.items() if number in special.values()}
    if is_sentencepiece(tokenizer):
        check_byte_tokens(model, model_dir)
        prefixed = adds_space_prefix(tokenizer, read_model_json(model_dir / "tokenizer_config.json"))
        tokens = tuple(pad_vocabulary(sentencepiece_tokens(tokenizer, control), rows, model_dir))
        return Vocabulary("llama", "default", tokens, (), special, prefixed, template)
    tokens = tuple(pad_vocabulary(byte_level_tokens(tokenizer, control), rows, model_dir))
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    pre_tokenizer = pre_tokenizer_name(tokenizer, model_dir)
    normalization = normalization_form(tokenizer, pre_tokenizer, model_dir)
    return Vocabulary("gpt2", pre_tokenizer, tokens, merges, special, False, template, normalization)


def bpe_model(tokenizer: Mapping[str, Any], model_dir: Path) -> Mapping[str, Any]:
    """The `model` of tokenizer.json. Raises TapirError if it is not BPE, or marks the parts of words."""
    model = tokenizer.get("model") or {}
    kind = model.get("type", "unknown")
    odd = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    lacking = [name for name, form in (("vocab", dict), ("merges", list)) if not isinstance(model.get(name), form)]
    if kind == "BPE" and not odd and not lacking:
        return dict(model)
    what = f"a tokenizer of type {kind}"
    if kind == "BPE":
        what = f"a BPE tokenizer without {lacking[0]}" if lacking else f"a BPE tokenizer with {' and '.join(odd)}"
    raise TapirError(
        f"{what} cannot be exported",
        where=str(model_dir / "tokenizer.json"),
        fix="Use a model with a byte-level BPE tokenizer (Llama 3, Qwen, SmolLM) or SentencePiece's BPE (Llama 2, "
        "Gemma) whose tokenizer.json has its merges.",
    )


def is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """Whether it is BPE over SentencePiece pieces: bytes are a fallback (`<0x0A>`), not the alphabet of every text."""
    kinds = {step.get("type") for step in component_steps(tokenizer, "pre_tokenizer", "pretokenizers")}
    return bool(tokenizer["model"].get("byte_fallback")) and "ByteLevel" not in kinds


def check_byte_tokens(model: Mapping[str, Any], model_dir: Path) -> None:
    """Raise TapirError unless every byte has a token: llama.cpp aborts the process if one is missing."""
    missing = [name for name in (f"<0x{number:02X}>" for number in range(256)) if name not in model["vocab"]]
    if missing:
        raise TapirError(
            f"a tokenizer with byte_fallback lacks {len(missing)} of the 256 tokens for single bytes: {missing[0]} …",
            where=str(model_dir / "tokenizer.json"),
            fix="Use the tokenizer that the model was published with. One that transformers converted from a GGUF may "
            "be wrong.",
        )


def component_steps(tokenizer: Mapping[str, Any], part: str, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre_tokenizer or decoder, which is a single step or a sequence."""
    whole = tokenizer.get(part) or {}
    return list(whole.get(inner, [whole] if whole else []))


def normalization_form(tokenizer: Mapping[str, Any], pre_tokenizer: str, model_dir: Path) -> str:
    """The normalizer's Unicode form, "" for none. Raises TapirError if it does more."""
    kinds = [str(step.get("type")) for step in component_steps(tokenizer, "normalizer", "normalizers")]
    if not kinds and pre_tokenizer in NFC_PRE_TOKENIZERS:
        kinds = loaded_normalizer(model_dir)
    if len(kinds) > 1 or not set(kinds) <= set(UNICODE_FORMS):
        raise TapirError(
            f"llama.cpp does not support its normalizer: {', '.join(kinds)}",
            where=str(model_dir / "tokenizer.json"),
            fix=f"Supported normalizers, one step each: {', '.join(UNICODE_FORMS)}.",
        )
    return kinds[0] if kinds else ""


def loaded_normalizer(model_dir: Path) -> list[str]:
    """The steps of the normalizer as transformers loads it: Qwen2Tokenizer applies NFC whatever tokenizer.json says."""
    return [str(step.get("type")) for step in component_steps(load_backend(model_dir), "normalizer", "normalizers")]


def load_backend(model_dir: Path) -> dict[str, Any]:
    """The tokenizer as transformers loads it, in the format of tokenizer.json."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    return dict(json.loads(loaded.backend_tokenizer.to_str()))


def read_tokenizer_json(model_dir: Path) -> dict[str, Any]:
    """tokenizer.json; if the folder has only SentencePiece's tokenizer.model, what transformers converts it to."""
    if (model_dir / "tokenizer.json").is_file() or not (model_dir / "tokenizer.model").is_file():
        return read_model_json(model_dir / "tokenizer.json")
    try:
        return load_backend(model_dir)
    except (ImportError, OSError, ValueError) as error:
        raise TapirError(
            f"transformers cannot read its SentencePiece file: {str(error).strip().splitlines()[0]}",
            where=str(model_dir / "tokenizer.model"),
            fix="pip install sentencepiece protobuf, or save the tokenizer there with save_pretrained.",
        ) from error


def read_model_template(model_dir: Path) -> str:
    """The chat template that transformers would use: the .jinja file takes precedence over tokenizer_config.json."""
    template_file = model_dir / "chat_template.jinja"
    if template_file.is_file():
        return template_file.read_text(encoding="utf-8")
    template = read_model_json(model_dir / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not template:
        raise TapirError(
            "the tokenizer has no chat template",
            where=str(model_dir),
            fix=NO_TEMPLATE,
        )
    return str(template)


def special_token_texts(model_dir: Path) -> dict[str, str]:
    """The texts of the bos, eos, unk and pad tokens named in the tokenizer's settings."""
    settings = read_model_json(model_dir / "tokenizer_config.json")
    older = model_dir / "special_tokens_map.json"
    named = (read_model_json(older) if older.is_file() else {}) | {
        key: value for key, value in settings.items() if value is not None
    }
    entries = {name: named.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    texts = {name: entry.get("content") if isinstance(entry, dict) else entry for name, entry in entries.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str) and text}


def end_of_turn_id(tokenizer: Mapping[str, Any], template: str, texts: Mapping[str, str]) -> dict[str, int]:
    """The token with which the template ends an answer, as llama.cpp's `eot`: generation must stop there whatever eos
    is."""
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}
    found = find_turn_end(added, template, texts.get("bos", ""), texts.get("eos", ""))
    return {} if found is None else {"eot": added[found]}


def pre_tokenizer_name(tokenizer: Mapping[str, Any], model_dir: Path) -> str:
    """llama.cpp's name for how text is split before merging."""
    steps = tokenizer.get("pre_tokenizer") or {}
    parts = tuple(pre_tokenizer_step(step) for step in steps.get("pretokenizers", [steps]))
    if parts not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS.values())
        where = str(model_dir / "tokenizer.json")
        raise TapirError(
            f"llama.cpp has no name for its pre_tokenizer {' then '.join(parts)}",
            where=where,
            fix=f"Supported: {known}.",
        )
    return PRE_TOKENIZERS[parts]


def pre_tokenizer_step(step: Mapping[str, Any]) -> str:
    """One step of a pre_tokenizer: a regular expression, or a word for the built-in ones."""
    kind = step.get("type", "none")
    if kind == "Split" and not step.get("invert"):
        return str(step["pattern"].get("Regex", step["pattern"]))
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "gpt2" if step.get("use_regex", True) else "bytes"
    return "digits" if kind == "Digits" and step.get("individual_digits") else str(kind)


def byte_level_tokens(tokenizer: Mapping[str, Any], control: Collection[str]) -> dict[int, VocabToken]:
    """Tokens by id: NORMAL ones of the vocabulary, with CONTROL (special) and USER_DEFINED (added) ones on top."""
    from gguf import TokenType

    rows = {number: VocabToken(text, TokenType.NORMAL) for text, number in tokenizer["model"]["vocab"].items()}
    return rows | added_tokens(tokenizer, control)


def added_tokens(tokenizer: Mapping[str, Any], control: Collection[str]) -> dict[int, VocabToken]:
    """Tokens that are matched before the text is split; those in `control` are special whatever tokenizer.json says.

    The token that ends a turn is always special, so that the text of a row cannot end a turn.
    """
    from gguf import TokenType

    kinds = {True: TokenType.CONTROL, False: TokenType.USER_DEFINED}
    return {
        token["id"]: VocabToken(token["content"], kinds[bool(token["special"]) or token["content"] in control])
        for token in tokenizer.get("added_tokens", ())
    }


def sentencepiece_tokens(tokenizer: Mapping[str, Any], control: Collection[str]) -> dict[int, VocabToken]:
    """Tokens by id, with the scores that order the merges: minus the rank of the first merge that produces the token.

    tokenizer.model contains these same scores; tokenizer.json keeps them as the order of its merges. Gemma's added
    tokens of several `▁` are normal tokens, found by merging as in transformers, because the text has spaces in their
    place.
    """
    from gguf import TokenType

    ranks: dict[str, int] = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    rows = {}
    for text, number in tokenizer["model"]["vocab"].items():
        kind = TokenType.BYTE if len(text) == 6 and text.startswith("<0x") else TokenType.NORMAL
        rows[number] = VocabToken(text, kind, -float(ranks.get(text, len(ranks) * 2)))
    runs = {number for number, row in rows.items() if row.text == SENTENCEPIECE_SPACE * len(row.text)}
    rows |= {number: row for number, row in added_tokens(tokenizer, control).items() if number not in runs}
    unknown = tokenizer["model"]["vocab"].get(tokenizer["model"].get("unk_token"))
    return rows if unknown is None else rows | {unknown: VocabToken(rows[unknown].text, TokenType.UNKNOWN)}


def adds_space_prefix(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether each text between special tokens starts with SentencePiece's `▁` (llama.cpp: add_space_prefix).

    transformers 5 rebuilds a LlamaTokenizer whatever tokenizer.json says, and prefixes every text only in `legacy`
    mode. The newer mode, which prefixes only the very start (`prepend_scheme: first`), does not exist in llama.cpp; a
    chat template starts with a special token, so no prefix is needed there.
    """
    if str(settings.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer":
        return bool(settings.get("legacy")) and settings.get("add_prefix_space") is not False
    normalizer, cutter = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    prepends = any(step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer]))
    return prepends or (cutter.get("type") == "Metaspace" and cutter.get("prepend_scheme") == "always")


def pad_vocabulary(rows: Mapping[int, VocabToken], size: int, model_dir: Path) -> Iterator[VocabToken]:
    """Tokens in order of id, with the embedding's spare rows as UNUSED."""
    from gguf import TokenType

    if max(rows) >= size:
        fix = "Resize the model's embeddings to the tokenizer and save both."
        raise TapirError(
            f"the tokenizer has token {max(rows)}, but the embedding has {size} rows", where=str(model_dir), fix=fix
        )
    texts = Counter(row.text for row in rows.values())
    if texts.total() > len(texts):
        raise TapirError(
            f"two of its tokens have the same text, {texts.most_common(1)[0][0]!r}, which llama.cpp cannot load",
            where=str(model_dir / "tokenizer.json"),
            fix="Use the tokenizer that the model was published with.",
        )
    for number in range(size):
        spare = f"[PAD{number}]"
        yield rows.get(number) or VocabToken(spare if spare not in texts else f"[UNUSED PAD{number}]", TokenType.UNUSED)


def write_vocabulary(writer: Any, vocab: Vocabulary) -> None:
    """Write the vocabulary to a gguf.GGUFWriter.

    add_bos_token is false for every model: only the chat template writes BOS, as in training. A runtime that added its
    own would produce two.
    """
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre_tokenizer)
    writer.add_token_list([token.text for token in vocab.tokens])
    writer.add_token_types([token.kind for token in vocab.tokens])
    if vocab.model == "llama":
        writer.add_token_scores([token.score for token in vocab.tokens])
        writer.add_add_space_prefix(vocab.space_prefix)
    else:
        writer.add_token_merges(list(vocab.merges))
    if vocab.normalization or vocab.pre_tokenizer in NFC_PRE_TOKENIZERS:
        writer.add_string(NORMALIZER_KEY, vocab.normalization or "none")
    for name, number in vocab.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(vocab.chat_template)
