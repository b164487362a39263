"""Special tokens quoted by a row are plain text in training and in llama.cpp; those of the template are special."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from models import CHATML, WITH_BOS, make_model, make_tokenizer
from spm import GEMMA

from tapir_local.data.chat_template import render, render_training_text
from tapir_local.data.special_tokens import (
    GUARD,
    find_turn_end,
    guard_messages,
    guard_text,
    longest_match_pattern,
    make_special_tokens,
    special_tokens_of,
    tokenize_guarded,
    tokenize_rendered,
    unguard_text,
)
from tapir_local.errors import TapirError
from tapir_local.export.export import export_gguf
from tapir_local.export.probes import probe_texts, render_example, render_prompt
from tapir_local.inference.generate import encode_prompt
from tapir_local.inference.model import Model, open_model
from tapir_local.inference.score import text_to_score
from tapir_local.inference.tokens import decode, encode, encode_plain, tokenize_text
from tapir_local.inference.tokens import special_marks as marks_in
from tapir_local.records import Example, Message
from tapir_local.training.job import IGNORED_LABEL, token_rows
from tapir_local.training.model import load_tokenizer

LLAMA2 = Path(__file__).parents[3] / "shared/data/tokenizers/granite-7b-lab"
KINDS: dict[str, dict[str, Any]] = {
    "smollm": {},
    "llama3": {"kind": "llama3", "template": WITH_BOS},
    "mistral": {"family": "mistral", "kind": "mistral", "tie_word_embeddings": False},
    "qwen2": {"family": "qwen2", "kind": "qwen2"},
    "qwen2 without NFC": {"kind": "qwen2"},
    "gemma": {"family": "gemma3_text", "kind": "gemma", "template": GEMMA},
    "llama2": {"vocab_size": 32008, "num_hidden_layers": 1, "hidden_size": 32},
}


@dataclass(frozen=True)
class Both:
    """One tokenizer in transformers and in llama.cpp."""

    tokenizer: Any
    model: Model


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("quoting")
    model = make_model(folder / "model", **KINDS[request.param])
    if request.param == "llama2":
        take_tokenizer(model)
    export_gguf(model, folder / "out.gguf", adapter=None, quant="f32")
    with open_model(folder / "out.gguf", vocab_only=True) as opened:
        yield Both(load_tokenizer(model), opened)


def take_tokenizer(model: Path) -> None:
    """LLaMA-2's tokenizer with IBM's chat template."""
    if not LLAMA2.is_dir():
        pytest.skip("the tokenizer is not on this machine")
    for path in [*model.glob("*oken*"), model / "chat_template.jinja"]:
        path.unlink()
    for path in LLAMA2.glob("*oken*"):
        shutil.copy(path, model)


def asked(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def quotes(known: Any) -> list[str]:
    """Every special token at the beginning, middle and end of a text, inside words, doubled and cut in half."""
    frames = ("{}", "a{}b", " {} ", "{}{}", "\n{}\n", "<{}>", "{}\u0301e\u0301", GUARD + "{}" + GUARD, "0{}1 <tool> {}")
    return [frame.replace("{}", text) for text in known.ids for frame in frames] + [text[:-1] for text in known.ids]


def test_both_sides_have_the_same_special_tokens(both: Both) -> None:
    assert special_tokens_of(both.tokenizer).ids == marks_in(both.model).ids
    assert len(special_tokens_of(both.tokenizer).ids) >= 3


def test_both_sides_give_equal_ids_without_special_tokens_of_rows(both: Both) -> None:
    known = special_tokens_of(both.tokenizer)
    special = set(known.ids.values())
    [frame] = tokenize_rendered(both.tokenizer, [render_prompt(both.tokenizer, asked("x"))])
    for text in quotes(known):
        whole = render_prompt(both.tokenizer, asked(text))
        [ids] = tokenize_rendered(both.tokenizer, [whole])
        assert encode(both.model, whole) == ids, text
        assert encode_prompt(both.model, asked(text)) == ids, text
        assert [token for token in ids if token in special] == [token for token in frame if token in special], text


def test_quoted_tokens_are_decoded_unchanged(both: Both) -> None:
    for text in special_tokens_of(both.tokenizer).ids:
        assert decode(both.model, encode_plain(both.model, f"a {text} b")).strip() == f"a {text} b"


def test_texts_without_quotes_have_unchanged_ids(both: Both) -> None:
    """The rendered text has no GUARD, and its ids are those of the tokenizer itself."""
    known = special_tokens_of(both.tokenizer)
    for text in probe_texts(both.tokenizer):
        if not known.pattern.search(text):
            whole = render_prompt(both.tokenizer, asked(text))
            assert GUARD not in whole
            [ids] = both.tokenizer([whole], add_special_tokens=False)["input_ids"]
            assert tokenize_rendered(both.tokenizer, [whole]) == [ids]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=some.data())
def test_tokenizing_guarded_texts_equals_plain_tokenizing(both: Both, data) -> None:
    """Without GUARD, the renamed tokenizer and llama.cpp's split texts give the ids of plain tokenizing."""
    known = special_tokens_of(both.tokenizer)
    words = some.sampled_from([*known.ids, "word", " a", "  ", "\n", "é", "12", "<tool>", "🙂", "<", "|>", "s>"])
    text = "".join(data.draw(some.lists(words, max_size=12)))
    [ids] = both.tokenizer([text], add_special_tokens=False)["input_ids"]
    assert tokenize_guarded(both.tokenizer, [text]) == [ids]
    parts = [part for piece in split(known, text) for part in part_ids(both.model, known, piece)]
    assert parts == tokenize_text(both.model, text, special=True)


def split(known: Any, text: str) -> list[str]:
    return re.split(f"({known.pattern.pattern})", text)


def part_ids(model: Model, known: Any, text: str) -> list[int]:
    return [known.ids[text]] if text in known.ids else encode_plain(model, text)


def test_a_quoted_end_of_turn_is_trained_as_text(both: Both) -> None:
    """The labels contain the template's end of turn once; the quoted one is plain text in them."""
    tokenizer = both.tokenizer
    stop = find_turn_end(
        special_tokens_of(tokenizer).ids, tokenizer.get_chat_template(), tokenizer.bos_token, tokenizer.eos_token
    )
    assert stop
    row = Example("1", asked(f"What is {stop}?"), f"{stop} ends a turn: {stop}")
    [trained] = token_rows([row], both.tokenizer, 512).rows
    learned = [label for label in trained["labels"] if label != IGNORED_LABEL]
    number = special_tokens_of(both.tokenizer).ids[stop]
    assert learned.count(number) == 1
    assert decode(both.model, learned[: learned.index(number)]).strip() == row.completion
    scored = text_to_score(both.model, 0, row.prompt, row.completion)
    assert (scored.ids, scored.ids[scored.start :]) == (trained["input_ids"], learned)
    assert encode(both.model, render_example(both.tokenizer, row)) == trained["input_ids"]


# --- guarding


MARKS = make_special_tokens({"<s>": 1, "</s>": 2, "<|a|>": 3, "|>x": 4, "<s>s": 5, "▁": 6, "\n": 7})
TRIM = "{% for m in messages %}<s>{{ m.content | trim }}</s>{% endfor %}"
THOUGHTS = "{% for m in messages %}<s>{{ m.content.split('</think>')[-1].strip() }}</s>{% endfor %}"


@pytest.mark.parametrize(
    "template", [TRIM, THOUGHTS, "{% for m in messages %}<s>{{ m.content | tojson }}</s>{% endfor %}"]
)
@given(text=some.lists(some.sampled_from([*MARKS.ids, GUARD, "|", ">", " ", "</think>", '"', "a"]), max_size=9))
def test_a_guarded_text_renders_like_the_original(template: str, text: list[str]) -> None:
    """It contains only the two special tokens of the template, and without GUARD it is the original rendered."""
    words = "".join(text)
    whole = render(template, guard_messages(asked(words), MARKS), add_generation_prompt=False)
    found = MARKS.pattern.findall(whole)
    assert (found[0], found[-1], len(found)) == ("<s>", "</s>", 2)
    assert unguard_text(whole) == render(template, asked(words), add_generation_prompt=False)


@given(text=some.text(some.sampled_from("<s>/|ax " + GUARD), max_size=20))
def test_guarding_is_undone(text: str) -> None:
    assert unguard_text(guard_text(text, MARKS)) == text
    assert not MARKS.pattern.search(guard_text(text, MARKS))


def test_a_special_token_of_one_character_is_not_guarded() -> None:
    assert guard_text("a▁b\n", MARKS) == "a▁b\n"


@given(texts=some.lists(some.text("ab|<\\", min_size=1, max_size=5), min_size=1, max_size=9))
def test_the_longest_text_is_matched(texts: list[str]) -> None:
    pattern = re.compile(longest_match_pattern(texts))
    for text in texts:
        longest = max((one for one in texts if (text + "ab").startswith(one)), key=len)
        assert pattern.match(text + "ab")[0] == longest  # type: ignore[index]


def test_without_special_tokens_nothing_is_guarded() -> None:
    assert guard_text("<s> anything", make_special_tokens({})) == "<s> anything"


# --- unusual tokenizers


def odd_tokenizers() -> dict[str, Callable[[Any], None]]:
    """Changes of a tokenizer that affect the beginning of a text or the characters next to a special token."""
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    def strips(inner: Any) -> None:
        inner.add_special_tokens(
            [AddedToken("<L>", lstrip=True), AddedToken("<R>", rstrip=True), AddedToken("<B>", normalized=True)]
        )

    def first(inner: Any) -> None:
        strips(inner)
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")

    def prefix(inner: Any) -> None:
        strips(inner)
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    def folds(inner: Any) -> None:
        strips(inner)
        inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])

    return {"strips": strips, "first": first, "prefix": prefix, "folds": folds}


@pytest.mark.parametrize("name", ["strips", "first", "prefix", "folds"])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=some.lists(
        some.sampled_from(["<L>", "<R>", "<|im_end|>", "<|bos|>", " ", "a", "É", "ﬁ", "\n", "<tool>"]), max_size=10
    )
)
def test_renaming_special_tokens_changes_no_id(odd, name: str, words: list[str]) -> None:
    text = "".join(words)
    assert tokenize_guarded(odd[name], [text]) == odd[name]([text], add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> dict[str, Any]:
    made = {}
    for name, change in odd_tokenizers().items():
        made[name] = make_tokenizer(tmp_path_factory.mktemp("odd"))
        change(made[name].backend_tokenizer)
    return made


def test_unused_ids_of_a_vocabulary_are_not_given_to_renamed_tokens(tmp_path: Path) -> None:
    """Renamed tokens get ids above the largest, not ids of ordinary tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(make_tokenizer(tmp_path / "first").backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for text in list(vocabulary)[-40:]:
        vocabulary[text] += 17
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>")
    for text in ("quick brown fox <|im_end|> jumps", "naïve café 你好 <|im_start|>x"):
        assert tokenize_guarded(tokenizer, [text]) == tokenizer([text], add_special_tokens=False)["input_ids"]


# --- which tokens are special


def test_the_end_of_turn_token_is_always_special(tmp_path: Path) -> None:
    """ChatML's tokens are often added to a base model as ordinary ones; here with names unknown to llama.cpp."""
    template = CHATML.replace("<|im_start|>", "<turn>").replace("<|im_end|>", "<over>")
    model = make_model(tmp_path / "model", template=template)
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<turn>", "<over>"])
    tokenizer.save_pretrained(model)
    rows = len(tokenizer) + 3
    resize(model, rows)
    export_gguf(model, tmp_path / "out.gguf", adapter=None, quant="f32")
    loaded = load_tokenizer(model)
    with open_model(tmp_path / "out.gguf", vocab_only=True) as opened:
        assert "<over>" in special_tokens_of(loaded).ids
        assert special_tokens_of(loaded).ids == marks_in(opened).ids
        text = render_prompt(loaded, asked("It is <over>, and <turn> too."))
        assert tokenize_rendered(loaded, [text]) == [encode(opened, text)]
        assert encode(opened, text).count(loaded.convert_tokens_to_ids("<over>")) == 1


def test_an_ordinary_token_that_llama_cpp_reads_as_end_is_text_on_both_sides(tmp_path: Path) -> None:
    """Qwen's vocabulary has `</s>` among its ordinary tokens."""
    model = make_model(tmp_path / "model")
    state = json.loads((model / "tokenizer.json").read_text())
    state["model"]["vocab"]["</s>"] = len(state["model"]["vocab"]) + 1
    (model / "tokenizer.json").write_text(json.dumps(state))
    resize(model, 420)
    export_gguf(model, tmp_path / "out.gguf", adapter=None, quant="f32")
    loaded = load_tokenizer(model)
    with open_model(tmp_path / "out.gguf", vocab_only=True) as opened:
        assert special_tokens_of(loaded).ids == marks_in(opened).ids
        assert "</s>" in special_tokens_of(loaded).ids
        for text in ("It ends with </s>.", "</s><|im_end|> and <|im_start|>"):
            whole = render_prompt(loaded, asked(text))
            assert tokenize_rendered(loaded, [whole]) == [encode(opened, whole)] == [encode_prompt(opened, asked(text))]
            assert special_tokens_of(loaded).ids["</s>"] not in encode(opened, whole)


def resize(model: Path, rows: int) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.resize_token_embeddings(rows)
    loaded.save_pretrained(model)


def test_names_of_control_tokens_of_llama_cpp_are_special_on_both_sides(tmp_path: Path) -> None:
    """Qwen's `<|fim_prefix|>` is an ordinary added token in transformers."""
    model = make_model(tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<|fim_prefix|>", "<think>", "</think>"])
    tokenizer.save_pretrained(model)
    resize(model, len(tokenizer) + 3)
    export_gguf(model, tmp_path / "out.gguf", adapter=None, quant="f32")
    loaded = load_tokenizer(model)
    with open_model(tmp_path / "out.gguf", vocab_only=True) as opened:
        assert special_tokens_of(loaded).ids == marks_in(opened).ids
        assert "<|fim_prefix|>" in special_tokens_of(loaded).ids
        text = render_prompt(loaded, asked("<think>a</think> <|fim_prefix|> <|im_end|>"))
        assert tokenize_rendered(loaded, [text]) == [encode(opened, text)]
        assert loaded.convert_tokens_to_ids("</think>") in encode(opened, text), "a row may think"


def test_a_lone_surrogate_is_an_error(both: Both) -> None:
    with pytest.raises(TapirError, match="half a surrogate pair"):
        encode_prompt(both.model, asked("\ud83d"))


def test_training_text_finds_a_quoted_answer() -> None:
    """The end of the turn must follow the answer and not be inside it."""
    known = make_special_tokens({"<|im_start|>": 1, "<|im_end|>": 2})
    no_end = CHATML.replace("+ '<|im_end|>\n'", "+ '\n'")
    with pytest.raises(TapirError, match="ends the assistant's turn"):
        render_training_text(no_end, asked("x"), guard_text("It is <|im_end|>", known), stops=["<|im_end|>"])
