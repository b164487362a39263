"""Rows that quote special tokens: guarded before they are rendered, so that only the template's own marks count.

A guarded text has GUARD after the first letter of every mark that a row quotes. Templates trim, split and join it as
they would the plain text, and no tokenizer finds the mark in it. `ids_of` and `tokens.encode` are the two places that
turn a rendered text into token ids; both take GUARD out again and read marks only where none was.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tapir_local.data.chat_template import asked_text, training_text
from tapir_local.records import Message, Prompt

GUARD = "\ufdd0"  # a noncharacter: Unicode keeps it for a program's own use; doubled, it stands for itself
SIGNS = range(0x10_0000, 0x10FFFE)  # of private use, for `renamed`
# llama.cpp (src/llama-vocab.cpp, October 2026) makes control tokens of these whatever their type says, and ordinary
# ones of those in UNCONTROLLED.
NAMES = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> [e~[
<|fim_prefix|> <fim-prefix> <fim_prefix> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>
<|fim_suffix|> <fim-suffix> <fim_suffix> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>
<|fim_middle|> <fim-middle> <fim_middle> <MID> ▁<MID> <|code_middle|> <|middle|>
<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
"""
DEEPSEEK = ("end▁of▁sentence", "fim▁begin", "fim▁hole", "fim▁end")
CONTROLLED = frozenset(NAMES.split()) | {f"<\uff5c{name}\uff5c>" for name in DEEPSEEK}
UNCONTROLLED = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})


@dataclass(frozen=True)
class Marks:
    """The special tokens of a tokenizer: their ids by text, and what finds the longest one at a place.

    A special token of one letter is no mark: rows could not hold that letter without it.
    """

    ids: Mapping[str, int]
    pattern: "re.Pattern[str]"


def is_special(text: str, special: bool) -> bool:
    """Whether an added token is read as a special one by llama.cpp; the same is asked of transformers' tokens."""
    return (special or text in CONTROLLED) and text not in UNCONTROLLED


def marks(ids: Mapping[str, int]) -> Marks:
    """Marks of special tokens with these ids."""
    known = {text: number for text, number in ids.items() if len(text) > 1}
    return Marks(known, re.compile(any_of(known) if known else r"(?!)"))


def any_of(texts: Iterable[str]) -> str:
    """A regular expression that matches the longest of some texts; by their letters, for there may be thousands."""
    tails: dict[str, list[str]] = {}
    for text in texts:
        tails.setdefault(text[:1], []).append(text[1:])
    ends = tails.pop("", None) is not None
    parts = [re.escape(letter) + any_of(rest) for letter, rest in tails.items()]
    joined = parts[0] if len(parts) == 1 and not ends else f"(?:{'|'.join(parts)})" if parts else ""
    return joined + ("?" if ends and parts else "")


def guard(text: str, known: Marks) -> str:
    """The text with GUARD in every mark that it quotes: it has none any more."""
    text = text.replace(GUARD, GUARD + GUARD)
    while known.pattern.search(text):  # a mark may begin within another
        text = known.pattern.sub(lambda found: found[0][0] + GUARD + found[0][1:], text)
    return text


def guarded(prompt: Sequence[Message], known: Marks) -> Prompt:
    """A conversation with all its words guarded."""
    return tuple(Message(turn.role, guard(turn.content, known)) for turn in prompt)


def plain(text: str) -> str:
    """The text that was guarded."""
    return re.sub(f"{GUARD}({GUARD}?)", r"\1", text)


def pieces(text: str, known: Marks) -> Iterator[tuple[str, int | None]]:
    """A text in order: (text without a mark, None), which may be empty, and (mark, its id) in turn."""
    start = 0
    for found in known.pattern.finditer(text):
        yield text[start : found.start()], None
        yield found[0], known.ids[found[0]]
        start = found.end()
    yield text[start:], None


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become text: a chat template, the texts that it may write by name, and the tokenizer's marks.

    Training and inference both render by it, so that neither reads a special token out of a row's own words. `stops`
    are the texts of which one must end an answer; any text will do where there are none.
    """

    template: str
    bos: str
    eos: str
    marks: Marks
    stops: tuple[str, ...] = ()

    def asked(self, prompt: Sequence[Message]) -> str:
        """A prompt as a student is asked it, guarded; TapirError as from template.asked_text."""
        return asked_text(self.template, guarded(prompt, self.marks), bos_token=self.bos, eos_token=self.eos)

    def answered(self, prompt: Sequence[Message], completion: str) -> tuple[str, str]:
        """The prompt, and what a student ought to write, both guarded; TapirError as from template.training_text."""
        turns, words = guarded(prompt, self.marks), guard(completion, self.marks)
        return training_text(self.template, turns, words, bos_token=self.bos, eos_token=self.eos, stops=self.stops)


def turn_end(added: Iterable[str], template: str, bos: str, eos: str) -> str | None:
    """The added token that the template ends an answer with; None where it ends it with none.

    TapirError where the template ends no answer at all.
    """
    probe = "so be it"
    whole = training_text(template, (Message("user", "probe"),), probe, bos_token=bos, eos_token=eos)
    tail = whole[1].rpartition(probe)[2]
    return min((text for text in added if text in tail), key=lambda text: (tail.index(text), -len(text)), default=None)


# --- transformers' side; llama.cpp's is in tokens.py


@lru_cache(maxsize=4)  # by the tokenizer's identity: nobody adds tokens to one that is in use
def marks_of(tokenizer: Any) -> Marks:
    """The marks of a tokenizer of transformers: its special tokens, those it names, and the one that ends a turn.

    The export makes control tokens of the same ones. Of the vocabulary's plain tokens those are marks that llama.cpp
    reads in any text all the same, as Qwen's `</s>`: guarded, they stay plain text there too.
    """
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    names = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
    if tokenizer.chat_template:
        names |= {turn_end(added, tokenizer.get_chat_template(), tokenizer.bos_token or "", tokenizer.eos_token or "")}
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | names
    known = {text: number for text, number in added.items() if is_special(text, text in special)}
    plain_ones = {text: tokenizer.backend_tokenizer.token_to_id(text) for text in sorted(CONTROLLED - set(added))}
    return marks(known | {text: number for text, number in plain_ones.items() if number is not None})


def format_of(tokenizer: Any) -> ChatFormat:
    """The chat format of a tokenizer of transformers; an answer must end with one of its special tokens."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    return ChatFormat(tokenizer.get_chat_template(), bos, eos, marks_of(tokenizer), stops_of(tokenizer))


@lru_cache(maxsize=4)
def stops_of(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokens that may end an answer."""
    special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*special, *marks_of(tokenizer).ids]))


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each rendered text, none added: the template has written the special ones."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    quoting = [number for number, text in enumerate(texts) if GUARD in text]
    found = quoted_ids(tokenizer, [texts[number] for number in quoting]) if quoting else []
    for number, own in zip(quoting, found, strict=True):
        ids[number] = own
    return ids


def ids_after(prompt: Sequence[int], whole: Sequence[int]) -> list[int] | None:
    """The token ids of a whole text that follow its prompt's ids; None if a token spans the boundary.

    The completion's ids are then those of the completion tokenized by itself.
    """
    return list(whole[len(prompt) :]) if list(whole[: len(prompt)]) == list(prompt) else None


def quoted_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of guarded texts.

    Cutting a text at its marks would change what follows them where a tokenizer treats a text's beginning in a way of
    its own. So the text stays whole, and a tokenizer is used that knows each mark by another name.
    """
    sign = next(chr(code) for code in SIGNS if not any(chr(code) in text for text in texts))
    other, numbers, known = renamed(tokenizer, sign)
    written = [plain(known.sub(lambda found: sign + found[0], text)) for text in texts]
    return [
        [numbers.get(number, number) for number in found.ids]
        for found in other.encode_batch(written, add_special_tokens=False)
    ]


@lru_cache(maxsize=4)
def renamed(tokenizer: Any, sign: str) -> tuple[Any, dict[int, int], "re.Pattern[str]"]:
    """A copy of the tokenizer in which every mark is written with a sign before it, what its ids are in the original,
    and what finds those marks."""
    from tokenizers import Tokenizer

    state, known = json.loads(tokenizer.backend_tokenizer.to_str()), marks_of(tokenizer)
    fill_gaps(state["model"], sign)
    originals = {token["content"]: token["id"] for token in state["added_tokens"]}
    names = {text: sign * (text in known.ids) + text for text in originals}
    for token in state["added_tokens"]:
        token["content"] = names[token["content"]]
    state["truncation"] = state["padding"] = None
    other = Tokenizer.from_str(json.dumps(state))
    numbers = {other.token_to_id(name): originals[text] for text, name in names.items()}
    own = marks({text: number for text, number in originals.items() if text in known.ids})
    return other, {found: number for found, number in numbers.items() if found is not None}, own.pattern


def fill_gaps(model: dict[str, Any], sign: str) -> None:
    """Give every number below the vocabulary's largest a text, so that no renamed mark is given one that is in use."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict) and vocabulary:
        free = set(range(max(vocabulary.values()))) - set(vocabulary.values())
        vocabulary.update({f"{sign}{number}": number for number in free})
