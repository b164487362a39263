"""Escape special tokens that rows quote, so that only those written by the chat template are read as special.

`guard_text` inserts GUARD after the first character of every special token in a row's text. Templates trim, split and
join a guarded text like the original, and no tokenizer finds a special token in it. Two functions turn a rendered text
into token ids, `tokenize_rendered` here and `encode` in inference/tokens.py; both remove GUARD and read a guarded token
as plain text.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tapir_local.data.chat_template import render_student_prompt, render_training_text
from tapir_local.records import Message, Prompt

GUARD = "\ufdd0"  # a noncharacter, for internal use by programs (Unicode); two of them stand for one in the text
PRIVATE_USE_CODES = range(0x10_0000, 0x10FFFE)  # private use characters, for `rename_special_tokens`
# llama.cpp (src/llama-vocab.cpp, October 2026) treats these as control tokens whatever their type is, and those in
# ORDINARY_TOKENS as ordinary ones.
LLAMA_CPP_CONTROL_TOKENS = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> [e~[
<|fim_prefix|> <fim-prefix> <fim_prefix> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>
<|fim_suffix|> <fim-suffix> <fim_suffix> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>
<|fim_middle|> <fim-middle> <fim_middle> <MID> ▁<MID> <|code_middle|> <|middle|>
<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
"""
DEEPSEEK_CONTROL_TOKENS = ("end▁of▁sentence", "fim▁begin", "fim▁hole", "fim▁end")
CONTROL_TOKENS = frozenset(LLAMA_CPP_CONTROL_TOKENS.split()) | {
    f"<\uff5c{name}\uff5c>" for name in DEEPSEEK_CONTROL_TOKENS
}
ORDINARY_TOKENS = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})


@dataclass(frozen=True)
class SpecialTokenSet:
    """The special tokens of a tokenizer: their ids by text, and a pattern that matches the longest one at a position.

    Special tokens of one character are not included, because rows may need that character.
    """

    ids: Mapping[str, int]
    pattern: "re.Pattern[str]"


def is_special_token(text: str, special: bool) -> bool:
    """Whether llama.cpp treats an added token as special; the same rule is used for tokenizers of transformers."""
    return (special or text in CONTROL_TOKENS) and text not in ORDINARY_TOKENS


def make_special_tokens(ids: Mapping[str, int]) -> SpecialTokenSet:
    """Build a SpecialTokenSet from ids by text."""
    known = {text: number for text, number in ids.items() if len(text) > 1}
    return SpecialTokenSet(known, re.compile(longest_match_pattern(known) if known else r"(?!)"))


def longest_match_pattern(texts: Iterable[str]) -> str:
    """A regular expression that matches the longest of some texts, as a trie, because there may be thousands."""
    tails: dict[str, list[str]] = {}
    for text in texts:
        tails.setdefault(text[:1], []).append(text[1:])
    ends = tails.pop("", None) is not None
    parts = [re.escape(letter) + longest_match_pattern(rest) for letter, rest in tails.items()]
    joined = parts[0] if len(parts) == 1 and not ends else f"(?:{'|'.join(parts)})" if parts else ""
    return joined + ("?" if ends and parts else "")


def guard_text(text: str, known: SpecialTokenSet) -> str:
    """Insert GUARD into every special token in a text, so that none is left."""
    text = text.replace(GUARD, GUARD + GUARD)
    while known.pattern.search(text):  # a token may begin inside another
        text = known.pattern.sub(lambda found: found[0][0] + GUARD + found[0][1:], text)
    return text


def guard_messages(prompt: Sequence[Message], known: SpecialTokenSet) -> Prompt:
    """Guard the content of every message."""
    return tuple(Message(turn.role, guard_text(turn.content, known)) for turn in prompt)


def unguard_text(text: str) -> str:
    """The inverse of `guard_text`."""
    return re.sub(f"{GUARD}({GUARD}?)", r"\1", text)


def split_at_special_tokens(text: str, known: SpecialTokenSet) -> Iterator[tuple[str, int | None]]:
    """Split a text: yields (text without special tokens, None), which may be empty, and (token, id) alternately."""
    start = 0
    for found in known.pattern.finditer(text):
        yield text[start : found.start()], None
        yield found[0], known.ids[found[0]]
        start = found.end()
    yield text[start:], None


@dataclass(frozen=True)
class ChatFormat:
    """How to render conversations: a chat template, the texts of BOS and EOS, and the tokenizer's special tokens.

    Training and inference both use it, so neither reads a special token from the text of a row. `stops` are the texts
    of tokens that may end an answer; if there are none, any text may.
    """

    template: str
    bos: str
    eos: str
    special_tokens: SpecialTokenSet
    stops: tuple[str, ...] = ()

    def asked(self, prompt: Sequence[Message]) -> str:
        """Render a prompt for the student, guarded; TapirError as from `render_student_prompt`."""
        return render_student_prompt(
            self.template, guard_messages(prompt, self.special_tokens), bos_token=self.bos, eos_token=self.eos
        )

    def answered(self, prompt: Sequence[Message], completion: str) -> tuple[str, str]:
        """Render a training row as (prompt, answer), guarded; TapirError as from `render_training_text`."""
        turns, words = guard_messages(prompt, self.special_tokens), guard_text(completion, self.special_tokens)
        return render_training_text(
            self.template, turns, words, bos_token=self.bos, eos_token=self.eos, stops=self.stops
        )


def find_turn_end(added: Iterable[str], template: str, bos: str, eos: str) -> str | None:
    """The added token with which the template ends an answer; None if it uses none.

    TapirError if the template does not end an answer at all.
    """
    probe = "so be it"
    whole = render_training_text(template, (Message("user", "probe"),), probe, bos_token=bos, eos_token=eos)
    tail = whole[1].rpartition(probe)[2]
    return min((text for text in added if text in tail), key=lambda text: (tail.index(text), -len(text)), default=None)


# --- for tokenizers of transformers; inference/tokens.py does the same for llama.cpp


@lru_cache(maxsize=4)  # by the tokenizer's identity: no code adds tokens to a tokenizer in use
def special_tokens_of(tokenizer: Any) -> SpecialTokenSet:
    """The special tokens of a tokenizer of transformers: those marked special, BOS, EOS etc., and the end of a turn.

    The export writes the same ones as control tokens. Ordinary tokens of the vocabulary that llama.cpp reads as control
    tokens, such as Qwen's `</s>`, are included too, so that they are guarded and stay plain text there.
    """
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    names = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
    if tokenizer.chat_template:
        names |= {
            find_turn_end(added, tokenizer.get_chat_template(), tokenizer.bos_token or "", tokenizer.eos_token or "")
        }
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | names
    known = {text: number for text, number in added.items() if is_special_token(text, text in special)}
    plain_ones = {text: tokenizer.backend_tokenizer.token_to_id(text) for text in sorted(CONTROL_TOKENS - set(added))}
    return make_special_tokens(known | {text: number for text, number in plain_ones.items() if number is not None})


def chat_format_of(tokenizer: Any) -> ChatFormat:
    """The chat format of a tokenizer of transformers; an answer must end with one of its special tokens."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    return ChatFormat(tokenizer.get_chat_template(), bos, eos, special_tokens_of(tokenizer), stop_texts_of(tokenizer))


@lru_cache(maxsize=4)
def stop_texts_of(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokens that may end an answer."""
    special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*special, *special_tokens_of(tokenizer).ids]))


def tokenize_rendered(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of rendered texts; none are added, because the template has written the special ones."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    quoting = [number for number, text in enumerate(texts) if GUARD in text]
    found = tokenize_guarded(tokenizer, [texts[number] for number in quoting]) if quoting else []
    for number, own in zip(quoting, found, strict=True):
        ids[number] = own
    return ids


def tokenize_guarded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of guarded texts.

    Splitting a text at its special tokens would change the ids after them if a tokenizer treats the beginning of a text
    differently. So the text stays whole, and a copy of the tokenizer is used in which the special tokens are renamed.
    """
    sign = next(chr(code) for code in PRIVATE_USE_CODES if not any(chr(code) in text for text in texts))
    other, numbers, known = rename_special_tokens(tokenizer, sign)
    written = [unguard_text(known.sub(lambda found: sign + found[0], text)) for text in texts]
    return [
        [numbers.get(number, number) for number in found.ids]
        for found in other.encode_batch(written, add_special_tokens=False)
    ]


@lru_cache(maxsize=4)
def rename_special_tokens(tokenizer: Any, sign: str) -> tuple[Any, dict[int, int], "re.Pattern[str]"]:
    """A copy of a tokenizer with `sign` before every special token, the original ids by new id, and a pattern that
    matches the special tokens."""
    from tokenizers import Tokenizer

    state, known = json.loads(tokenizer.backend_tokenizer.to_str()), special_tokens_of(tokenizer)
    fill_vocabulary_gaps(state["model"], sign)
    originals = {token["content"]: token["id"] for token in state["added_tokens"]}
    names = {text: sign * (text in known.ids) + text for text in originals}
    for token in state["added_tokens"]:
        token["content"] = names[token["content"]]
    state["truncation"] = state["padding"] = None
    other = Tokenizer.from_str(json.dumps(state))
    numbers = {other.token_to_id(name): originals[text] for text, name in names.items()}
    own = make_special_tokens({text: number for text, number in originals.items() if text in known.ids})
    return other, {found: number for found, number in numbers.items() if found is not None}, own.pattern


def fill_vocabulary_gaps(model: dict[str, Any], sign: str) -> None:
    """Fill unused ids below the vocabulary's largest, so that no renamed token gets an id that is in use."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict) and vocabulary:
        free = set(range(max(vocabulary.values()))) - set(vocabulary.values())
        vocabulary.update({f"{sign}{number}": number for number in free})


def ids_after(prompt: Sequence[int], whole: Sequence[int]) -> list[int] | None:
    """The token ids of a whole text that follow its prompt's ids; None if a token spans the boundary.

    The completion's ids are then those of the completion tokenized by itself.
    """
    return list(whole[len(prompt) :]) if list(whole[: len(prompt)]) == list(prompt) else None
