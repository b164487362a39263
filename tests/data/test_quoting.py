"""Special tokens that a row quotes are text, in training as in llama.cpp, and the template's own are not."""

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

from tapir_local.data.chat_template import render, training_text
from tapir_local.data.quoting import GUARD, any_of, guard, guarded, ids_of, marks, marks_of, plain, quoted_ids, turn_end
from tapir_local.errors import TapirError
from tapir_local.export.export import export_gguf
from tapir_local.export.probes import probe_texts, render_example, render_prompt
from tapir_local.inference.generate import encode_prompt
from tapir_local.inference.model import Model, open_model
from tapir_local.inference.score import tokens_of
from tapir_local.inference.tokens import decode, encode, text_ids, tokenized
from tapir_local.inference.tokens import marks_of as marks_in
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
    """A tokenizer in transformers, and in llama.cpp."""

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
    """LLaMA-2's, with IBM's chat template."""
    if not LLAMA2.is_dir():
        pytest.skip("the tokenizer is not on this machine")
    for path in [*model.glob("*oken*"), model / "chat_template.jinja"]:
        path.unlink()
    for path in LLAMA2.glob("*oken*"):
        shutil.copy(path, model)


def asked(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def quotes(known: Any) -> list[str]:
    """Every mark at the beginning, in the middle and at the end of a text, in words, doubled and half."""
    frames = ("{}", "a{}b", " {} ", "{}{}", "\n{}\n", "<{}>", "{}\u0301e\u0301", GUARD + "{}" + GUARD, "0{}1 <tool> {}")
    return [frame.replace("{}", text) for text in known.ids for frame in frames] + [text[:-1] for text in known.ids]


def test_both_sides_know_the_same_marks(both: Both) -> None:
    assert marks_of(both.tokenizer).ids == marks_in(both.model).ids
    assert len(marks_of(both.tokenizer).ids) >= 3


def test_both_sides_give_the_same_ids_with_no_special_token_of_the_rows(both: Both) -> None:
    known = marks_of(both.tokenizer)
    special = set(known.ids.values())
    [frame] = ids_of(both.tokenizer, [render_prompt(both.tokenizer, asked("x"))])
    for text in quotes(known):
        whole = render_prompt(both.tokenizer, asked(text))
        [ids] = ids_of(both.tokenizer, [whole])
        assert encode(both.model, whole) == ids, text
        assert encode_prompt(both.model, asked(text)) == ids, text
        assert [token for token in ids if token in special] == [token for token in frame if token in special], text


def test_what_is_quoted_comes_back_as_it_was_written(both: Both) -> None:
    for text in marks_of(both.tokenizer).ids:
        assert decode(both.model, text_ids(both.model, f"a {text} b")).strip() == f"a {text} b"


def test_texts_that_quote_nothing_have_the_ids_that_they_always_had(both: Both) -> None:
    """Character for character the text that was rendered before, and the tokenizers' own answer."""
    known = marks_of(both.tokenizer)
    for text in probe_texts(both.tokenizer):
        if not known.pattern.search(text):
            whole = render_prompt(both.tokenizer, asked(text))
            assert GUARD not in whole
            [ids] = both.tokenizer([whole], add_special_tokens=False)["input_ids"]
            assert ids_of(both.tokenizer, [whole]) == [ids]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=some.data())
def test_the_way_for_quoted_texts_gives_what_the_plain_way_gives(both: Both, data) -> None:
    """Real marks among any text, no quotes: the renamed tokenizer, and llama.cpp part by part, change nothing."""
    known = marks_of(both.tokenizer)
    words = some.sampled_from([*known.ids, "word", " a", "  ", "\n", "é", "12", "<tool>", "🙂", "<", "|>", "s>"])
    text = "".join(data.draw(some.lists(words, max_size=12)))
    [ids] = both.tokenizer([text], add_special_tokens=False)["input_ids"]
    assert quoted_ids(both.tokenizer, [text]) == [ids]
    parts = [part for piece in split(known, text) for part in part_ids(both.model, known, piece)]
    assert parts == tokenized(both.model, text, special=True)


def split(known: Any, text: str) -> list[str]:
    return re.split(f"({known.pattern.pattern})", text)


def part_ids(model: Model, known: Any, text: str) -> list[int]:
    return [known.ids[text]] if text in known.ids else text_ids(model, text)


def test_a_completion_that_quotes_the_end_of_a_turn_is_trained_on_as_text(both: Both) -> None:
    """One end of turn in what is learned, the template's; the quoted one is in it as words."""
    tokenizer = both.tokenizer
    stop = turn_end(marks_of(tokenizer).ids, tokenizer.get_chat_template(), tokenizer.bos_token, tokenizer.eos_token)
    assert stop
    row = Example("1", asked(f"What is {stop}?"), f"{stop} ends a turn: {stop}")
    [trained] = token_rows([row], both.tokenizer, 512).rows
    learned = [label for label in trained["labels"] if label != IGNORED_LABEL]
    number = marks_of(both.tokenizer).ids[stop]
    assert learned.count(number) == 1
    assert decode(both.model, learned[: learned.index(number)]).strip() == row.completion
    scored = tokens_of(both.model, 0, row.prompt, row.completion)
    assert (scored.ids, scored.ids[scored.start :]) == (trained["input_ids"], learned)
    assert encode(both.model, render_example(both.tokenizer, row)) == trained["input_ids"]


# --- guarding


MARKS = marks({"<s>": 1, "</s>": 2, "<|a|>": 3, "|>x": 4, "<s>s": 5, "▁": 6, "\n": 7})
TRIM = "{% for m in messages %}<s>{{ m.content | trim }}</s>{% endfor %}"
THOUGHTS = "{% for m in messages %}<s>{{ m.content.split('</think>')[-1].strip() }}</s>{% endfor %}"


@pytest.mark.parametrize(
    "template", [TRIM, THOUGHTS, "{% for m in messages %}<s>{{ m.content | tojson }}</s>{% endfor %}"]
)
@given(text=some.lists(some.sampled_from([*MARKS.ids, GUARD, "|", ">", " ", "</think>", '"', "a"]), max_size=9))
def test_a_guarded_text_renders_as_the_plain_one(template: str, text: list[str]) -> None:
    """Only the two marks of the template can be found in it, and without the guards it is the plain text rendered."""
    words = "".join(text)
    whole = render(template, guarded(asked(words), MARKS), add_generation_prompt=False)
    found = MARKS.pattern.findall(whole)
    assert (found[0], found[-1], len(found)) == ("<s>", "</s>", 2)
    assert plain(whole) == render(template, asked(words), add_generation_prompt=False)


@given(text=some.text(some.sampled_from("<s>/|ax " + GUARD), max_size=20))
def test_guarding_is_undone(text: str) -> None:
    assert plain(guard(text, MARKS)) == text
    assert not MARKS.pattern.search(guard(text, MARKS))


def test_a_special_token_of_one_letter_stays_what_it_is() -> None:
    assert guard("a▁b\n", MARKS) == "a▁b\n"


@given(texts=some.lists(some.text("ab|<\\", min_size=1, max_size=5), min_size=1, max_size=9))
def test_the_longest_of_several_texts_is_found(texts: list[str]) -> None:
    pattern = re.compile(any_of(texts))
    for text in texts:
        longest = max((one for one in texts if (text + "ab").startswith(one)), key=len)
        assert pattern.match(text + "ab")[0] == longest  # type: ignore[index]


def test_a_tokenizer_without_special_tokens_quotes_nothing() -> None:
    assert guard("<s> anything", marks({})) == "<s> anything"


# --- tokenizers with ways of their own


def odd_tokenizers() -> dict[str, Callable[[Any], None]]:
    """Changes after which a tokenizer treats the beginning of a text, or what stands beside a mark, in its own way."""
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
def test_renaming_the_marks_changes_no_id(odd, name: str, words: list[str]) -> None:
    text = "".join(words)
    assert quoted_ids(odd[name], [text]) == odd[name]([text], add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> dict[str, Any]:
    made = {}
    for name, change in odd_tokenizers().items():
        made[name] = make_tokenizer(tmp_path_factory.mktemp("odd"))
        change(made[name].backend_tokenizer)
    return made


def test_numbers_that_a_vocabulary_leaves_out_are_nobodys(tmp_path: Path) -> None:
    """Renamed marks get numbers after the largest, not such as an ordinary token has."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(make_tokenizer(tmp_path / "first").backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for text in list(vocabulary)[-40:]:
        vocabulary[text] += 17
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>")
    for text in ("quick brown fox <|im_end|> jumps", "naïve café 你好 <|im_start|>x"):
        assert quoted_ids(tokenizer, [text]) == tokenizer([text], add_special_tokens=False)["input_ids"]


# --- what is special


def test_the_token_that_ends_a_turn_is_special_whatever_its_flag_says(tmp_path: Path) -> None:
    """ChatML's tokens are often added as ordinary ones to a base; here under names that llama.cpp does not know."""
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
        assert "<over>" in marks_of(loaded).ids
        assert marks_of(loaded).ids == marks_in(opened).ids
        text = render_prompt(loaded, asked("It is <over>, and <turn> too."))
        assert ids_of(loaded, [text]) == [encode(opened, text)]
        assert encode(opened, text).count(loaded.convert_tokens_to_ids("<over>")) == 1


def test_a_plain_token_that_llama_cpp_takes_for_the_end_is_text_on_both_sides(tmp_path: Path) -> None:
    """Qwen's vocabulary has `</s>` among its ordinary tokens."""
    model = make_model(tmp_path / "model")
    state = json.loads((model / "tokenizer.json").read_text())
    state["model"]["vocab"]["</s>"] = len(state["model"]["vocab"]) + 1
    (model / "tokenizer.json").write_text(json.dumps(state))
    resize(model, 420)
    export_gguf(model, tmp_path / "out.gguf", adapter=None, quant="f32")
    loaded = load_tokenizer(model)
    with open_model(tmp_path / "out.gguf", vocab_only=True) as opened:
        assert marks_of(loaded).ids == marks_in(opened).ids
        assert "</s>" in marks_of(loaded).ids
        for text in ("It ends with </s>.", "</s><|im_end|> and <|im_start|>"):
            whole = render_prompt(loaded, asked(text))
            assert ids_of(loaded, [whole]) == [encode(opened, whole)] == [encode_prompt(opened, asked(text))]
            assert marks_of(loaded).ids["</s>"] not in encode(opened, whole)


def resize(model: Path, rows: int) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.resize_token_embeddings(rows)
    loaded.save_pretrained(model)


def test_names_that_llama_cpp_takes_for_control_tokens_are_special_on_both_sides(tmp_path: Path) -> None:
    """Qwen's `<|fim_prefix|>` is an ordinary added token in transformers."""
    model = make_model(tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<|fim_prefix|>", "<think>", "</think>"])
    tokenizer.save_pretrained(model)
    resize(model, len(tokenizer) + 3)
    export_gguf(model, tmp_path / "out.gguf", adapter=None, quant="f32")
    loaded = load_tokenizer(model)
    with open_model(tmp_path / "out.gguf", vocab_only=True) as opened:
        assert marks_of(loaded).ids == marks_in(opened).ids
        assert "<|fim_prefix|>" in marks_of(loaded).ids
        text = render_prompt(loaded, asked("<think>a</think> <|fim_prefix|> <|im_end|>"))
        assert ids_of(loaded, [text]) == [encode(opened, text)]
        assert loaded.convert_tokens_to_ids("</think>") in encode(opened, text), "a row may think"


def test_half_a_letter_is_said(both: Both) -> None:
    with pytest.raises(TapirError, match="half a surrogate pair"):
        encode_prompt(both.model, asked("\ud83d"))


def test_training_text_finds_a_quoted_answer() -> None:
    """The end of the turn must follow the answer's words, not be among them."""
    known = marks({"<|im_start|>": 1, "<|im_end|>": 2})
    no_end = CHATML.replace("+ '<|im_end|>\n'", "+ '\n'")
    with pytest.raises(TapirError, match="ends the assistant's turn"):
        training_text(no_end, asked("x"), guard("It is <|im_end|>", known), stops=["<|im_end|>"])
