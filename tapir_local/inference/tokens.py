"""A GGUF's tokens: texts to their ids, and ids to the texts that they stand for."""

import ctypes
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tapir_local.data.special_tokens import (
    GUARD,
    ChatFormat,
    SpecialTokenSet,
    make_special_tokens,
    split_at_special_tokens,
    unguard_text,
)
from tapir_local.errors import TapirError
from tapir_local.inference.lib import failure, library
from tapir_local.inference.model import Model, open_model, template

SPACE = "▁"  # SentencePiece's
SPACES = " \t\n\v\f\r"  # C's isspace


def is_end(model: Model, token: int) -> bool:
    """True for the tokens at which llama.cpp stops."""
    known = model.ends.get(token)
    if known is None:
        known = model.ends[token] = bool(library().llama_vocab_is_eog(model.vocab, token))
    return known


def encode(model: Model, text: str, *, add_special: bool = False) -> list[int]:
    """Token ids of a rendered text: its marks are read as special tokens, and none is added unless `add_special`.

    What is guarded (see quoting.py) is read as plain text.
    """
    if GUARD not in text and is_composed(model, text):
        return tokenized(model, text, special=True, add_special=add_special)
    ids = tokenized(model, "", special=True, add_special=add_special)
    for part, mark in stripped(model, list(split_at_special_tokens(text, marks_of(model)))):
        ids += text_ids(model, unguard_text(part)) if mark is None else [mark]
    return ids


def tokenized(model: Model, text: str, *, special: bool, add_special: bool = False) -> list[int]:
    """Token ids as llama.cpp gives them, with special tokens read in the text where `special`."""
    llama = library()
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        what = f"not Unicode text: half a surrogate pair, {error.object[error.start]!a}"
        raise TapirError(what, fix="Remove it from the text.") from error
    room = len(raw) + 4  # a token is at least a byte, but for BOS, EOS and SentencePiece's leading space
    while True:
        tokens = (llama.llama_token * room)()
        count = llama.llama_tokenize(model.vocab, raw, len(raw), tokens, room, add_special, special)
        if count >= 0:
            return list(tokens[:count])
        if -count <= room:
            raise failure(f"llama.cpp cannot tokenise {text[:40]!r}", model.gguf, model.advice.unusable)
        room = -count


def is_composed(model: Model, text: str) -> bool:
    """Whether the text is in the form that the tokenizer expects; most texts are, and the answer is quick."""
    return model.form is None or unicodedata.is_normalized(model.form, text)


def stripped(model: Model, parts: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
    """The parts without the white space that a special token takes with it, as llama.cpp's own search for them does."""
    found = []
    for place, (text, mark) in enumerate(parts):
        if mark is None:
            after = parts[place + 1][1] if place + 1 < len(parts) else None
            text = text.rstrip(SPACES) if after is not None and has(model, after, "LSTRIP") else text
            before = parts[place - 1][1] if place else None
            text = text.lstrip(SPACES) if before is not None and has(model, before, "RSTRIP") else text
        found.append((text, mark))
    return found


def has(model: Model, token: int, name: str) -> bool:
    """Whether a token has one of llama.cpp's attributes."""
    llama = library()
    return bool(llama.llama_vocab_get_attr(model.vocab, token) & getattr(llama, f"LLAMA_TOKEN_ATTR_{name}"))


def text_ids(model: Model, text: str) -> list[int]:
    """Token ids of a text without special tokens, composed first where the tokenizer expects that."""
    if model.form and not is_composed(model, text):
        text = "".join(
            part if mark is not None else unicodedata.normalize(model.form, part)
            for part, mark in split_at_special_tokens(text, lists_of(model).defined)
        )
    llama, ids = library(), tokenized(model, text, special=False)
    if llama.llama_vocab_type(model.vocab) != llama.LLAMA_VOCAB_TYPE_SPM:
        return ids
    special = set(marks_of(model).ids.values())
    return [part for token in ids for part in (made_of(model, token) if token in special else (token,))]


def made_of(model: Model, special: int) -> tuple[int, ...]:
    """The two tokens of a plain text that llama.cpp took for a special one.

    Its SentencePiece joins two neighbors where their text together is any token's, a special one's too; transformers
    does not. The special token itself where no two tokens have its text.
    """
    text = raw_text(model, special)
    halves = ((single(model, text[:at]), single(model, text[at:])) for at in range(1, len(text)))
    return next(((left[0], right[0]) for left, right in halves if left and right), (special,))


def format_of(model: Model) -> ChatFormat:
    """The chat format of a GGUF; TapirError where it has no template."""
    return ChatFormat(template(model), model.bos, model.eos, marks_of(model))


@dataclass(frozen=True)
class Lists:
    """What a vocabulary's attributes say: the marks, and the tokens that users defined, which any text may hold."""

    marks: SpecialTokenSet
    defined: SpecialTokenSet


def marks_of(model: Model) -> SpecialTokenSet:
    """The special tokens of a GGUF."""
    return lists_of(model).marks


def lists_of(model: Model) -> Lists:
    """The lists, read once: it takes about 50 ms for 150,000 tokens."""
    if not model.lists:
        llama = library()
        count = llama.llama_vocab_n_tokens(model.vocab)
        attributes = [(number, llama.llama_vocab_get_attr(model.vocab, number)) for number in range(count)]
        control = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN
        special = {raw_text(model, number): number for number, of in attributes if of & control}
        own = llama.LLAMA_TOKEN_ATTR_USER_DEFINED
        defined = {raw_text(model, number): number for number, of in attributes if of & own and not of & control}
        model.lists.append(Lists(make_special_tokens(special), make_special_tokens(defined)))
    known: Lists = model.lists[0]
    return known


def single(model: Model, text: str) -> list[int]:
    """The token that a text is, if it is one."""
    ids = [token for token in tokenized(model, text, special=False) if raw_text(model, token) != SPACE]
    return ids if len(ids) == 1 and raw_text(model, ids[0]) == text else []


def raw_text(model: Model, token: int) -> str:
    """A token as the vocabulary writes it."""
    return str(library().llama_vocab_get_text(model.vocab, token).decode("utf-8", "replace"))


def piece(model: Model, token: int) -> bytes:
    """The bytes a token stands for; none for a special one. A character may be spread over several tokens."""
    known = model.pieces.get(token)
    if known is None:
        known = model.pieces[token] = read_piece(model, token)
    return known


def read_piece(model: Model, token: int) -> bytes:
    llama = library()
    buffer = ctypes.create_string_buffer(64)
    count = llama.llama_token_to_piece(model.vocab, token, buffer, len(buffer), 0, False)
    if count < 0:
        buffer = ctypes.create_string_buffer(-count)
        count = llama.llama_token_to_piece(model.vocab, token, buffer, len(buffer), 0, False)
    return buffer.raw[:count]


def decode(model: Model, tokens: Sequence[int], most: int | None = None) -> str:
    """The text of an answer, or its first `most` bytes, as written: no spaces tidied, no UTF-8 shown as U+FFFD."""
    return b"".join(piece(model, token) for token in tokens)[:most].decode("utf-8", "replace")


def tokenize(gguf: Path, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
    """Token ids of several texts; only the vocabulary is loaded."""
    with open_model(gguf, vocab_only=True) as model:
        return [encode(model, text, add_special=add_special) for text in texts]
