"""A GGUF's tokens: encode texts to token ids, and decode ids to text."""

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
from tapir_local.inference.lib import library, llama_error
from tapir_local.inference.model import Model, open_model, require_template

SENTENCEPIECE_SPACE = "▁"  # SentencePiece's
C_SPACES = " \t\n\v\f\r"  # C's isspace


def is_end_token(model: Model, token: int) -> bool:
    """Whether llama.cpp ends a turn at the token."""
    known = model.ends.get(token)
    if known is None:
        known = model.ends[token] = bool(library().llama_vocab_is_eog(model.vocab, token))
    return known


def encode(model: Model, text: str, *, add_special: bool = False) -> list[int]:
    """Token ids of a rendered text: its marks become special tokens, and none is added unless `add_special`.

    Guarded text (see quoting.py) is encoded as plain text.
    """
    if GUARD not in text and is_normalized(model, text):
        return tokenize_text(model, text, special=True, add_special=add_special)
    ids = tokenize_text(model, "", special=True, add_special=add_special)
    for part, mark in strip_beside_marks(model, list(split_at_special_tokens(text, special_marks(model)))):
        ids += encode_plain(model, unguard_text(part)) if mark is None else [mark]
    return ids


def tokenize_text(model: Model, text: str, *, special: bool, add_special: bool = False) -> list[int]:
    """Token ids as llama.cpp gives them; with `special`, special tokens in the text are recognized."""
    llama = library()
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        what = f"not Unicode text: half a surrogate pair, {error.object[error.start]!a}"
        raise TapirError(what, fix="Remove it from the text.") from error
    size = len(raw) + 4  # a token is at least one byte, except BOS, EOS and SentencePiece's leading space
    while True:
        tokens = (llama.llama_token * size)()
        count = llama.llama_tokenize(model.vocab, raw, len(raw), tokens, size, add_special, special)
        if count >= 0:
            return list(tokens[:count])
        if -count <= size:
            raise llama_error(f"llama.cpp cannot tokenize {text[:40]!r}", model.gguf, model.advice.unusable)
        size = -count


def is_normalized(model: Model, text: str) -> bool:
    """Whether the text is in the Unicode form that the tokenizer expects; most texts are, and the check is fast."""
    return model.form is None or unicodedata.is_normalized(model.form, text)


def strip_beside_marks(model: Model, parts: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
    """The parts without the white space that a special token strips beside it, as llama.cpp's own parser does it."""
    found = []
    for place, (text, mark) in enumerate(parts):
        if mark is None:
            after = parts[place + 1][1] if place + 1 < len(parts) else None
            text = text.rstrip(C_SPACES) if after is not None and has_attribute(model, after, "LSTRIP") else text
            before = parts[place - 1][1] if place else None
            text = text.lstrip(C_SPACES) if before is not None and has_attribute(model, before, "RSTRIP") else text
        found.append((text, mark))
    return found


def has_attribute(model: Model, token: int, name: str) -> bool:
    """Whether a token has one of llama.cpp's attributes."""
    llama = library()
    return bool(llama.llama_vocab_get_attr(model.vocab, token) & getattr(llama, f"LLAMA_TOKEN_ATTR_{name}"))


def encode_plain(model: Model, text: str) -> list[int]:
    """Token ids of a text without special tokens, normalized first if the tokenizer expects that."""
    if model.form and not is_normalized(model, text):
        text = "".join(
            part if mark is not None else unicodedata.normalize(model.form, part)
            for part, mark in split_at_special_tokens(text, special_tokens(model).defined)
        )
    llama, ids = library(), tokenize_text(model, text, special=False)
    if llama.llama_vocab_type(model.vocab) != llama.LLAMA_VOCAB_TYPE_SPM:
        return ids
    special = set(special_marks(model).ids.values())
    return [part for token in ids for part in (split_special(model, token) if token in special else (token,))]


def split_special(model: Model, special: int) -> tuple[int, ...]:
    """The two tokens of a plain text that llama.cpp joined into a special token.

    Its SentencePiece joins two neighbors if their joint text is that of any token, even a special one; transformers
    does not. The special token itself if no two tokens have its text.
    """
    text = token_as_written(model, special)
    halves = ((single_token(model, text[:at]), single_token(model, text[at:])) for at in range(1, len(text)))
    return next(((left[0], right[0]) for left, right in halves if left and right), (special,))


def chat_format(model: Model) -> ChatFormat:
    """The chat format of a GGUF; TapirError if it has no template."""
    return ChatFormat(require_template(model), model.bos, model.eos, special_marks(model))


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens with attributes: the special ones (`marks`), and the user-defined ones, which any text may contain."""

    marks: SpecialTokenSet
    defined: SpecialTokenSet


def special_marks(model: Model) -> SpecialTokenSet:
    """The special tokens of a GGUF."""
    return special_tokens(model).marks


def special_tokens(model: Model) -> SpecialTokens:
    """The special tokens, read once: it takes about 50 ms for 150,000 tokens."""
    if not model.lists:
        llama = library()
        count = llama.llama_vocab_n_tokens(model.vocab)
        attributes = [(number, llama.llama_vocab_get_attr(model.vocab, number)) for number in range(count)]
        control = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN
        special = {token_as_written(model, number): number for number, of in attributes if of & control}
        own = llama.LLAMA_TOKEN_ATTR_USER_DEFINED
        defined = {
            token_as_written(model, number): number for number, of in attributes if of & own and not of & control
        }
        model.lists.append(SpecialTokens(make_special_tokens(special), make_special_tokens(defined)))
    known: SpecialTokens = model.lists[0]
    return known


def single_token(model: Model, text: str) -> list[int]:
    """The one token that a text consists of, in a list; empty if it does not."""
    ids = [
        token
        for token in tokenize_text(model, text, special=False)
        if token_as_written(model, token) != SENTENCEPIECE_SPACE
    ]
    return ids if len(ids) == 1 and token_as_written(model, ids[0]) == text else []


def token_as_written(model: Model, token: int) -> str:
    """A token's text as the vocabulary has it."""
    return str(library().llama_vocab_get_text(model.vocab, token).decode("utf-8", "replace"))


def token_bytes(model: Model, token: int) -> bytes:
    """The bytes of a token's text; none for a special token. A character may consist of several tokens."""
    known = model.pieces.get(token)
    if known is None:
        known = model.pieces[token] = read_token_bytes(model, token)
    return known


def read_token_bytes(model: Model, token: int) -> bytes:
    """As `token_bytes`, without the cache."""
    llama = library()
    buffer = ctypes.create_string_buffer(64)
    count = llama.llama_token_to_piece(model.vocab, token, buffer, len(buffer), 0, False)
    if count < 0:
        buffer = ctypes.create_string_buffer(-count)
        count = llama.llama_token_to_piece(model.vocab, token, buffer, len(buffer), 0, False)
    return buffer.raw[:count]


def decode(model: Model, tokens: Sequence[int], most: int | None = None) -> str:
    """The text of an answer, or its first `most` bytes: spaces stay as they are, invalid UTF-8 becomes U+FFFD."""
    return b"".join(token_bytes(model, token) for token in tokens)[:most].decode("utf-8", "replace")


def tokenize_texts(gguf: Path, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
    """Token ids of several texts; only the vocabulary is loaded."""
    with open_model(gguf, vocab_only=True) as model:
        return [encode(model, text, add_special=add_special) for text in texts]
