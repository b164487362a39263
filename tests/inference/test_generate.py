"""Batched answers of a GGUF are those of transformers, in order, and stop at the right place."""

from codecs import getincrementaldecoder
from dataclasses import replace
from pathlib import Path

import pytest
from models import make_adapter, make_model, merged_model
from students import CONFIG, PROMPTS

from tapir_local.errors import TapirError
from tapir_local.export.export import export_adapter, export_gguf
from tapir_local.inference.config import ContextConfig, GenerationConfig
from tapir_local.inference.generate import Callbacks, answer_tokens, chat_stream, encode_prompt, generate
from tapir_local.inference.model import open_context, open_engine, open_model, read_gguf_template
from tapir_local.inference.tokens import decode, encode, is_end_token, token_bytes, tokenize_texts
from tapir_local.records import Completion, Message


def regrets(model_dir: Path, adapter: Path, prompts: list, answers: list[list[int]]) -> list[float]:
    """For each token written, transformers' best logit minus the logit of the chosen token."""
    import torch
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), merged_model(model_dir, adapter)
    found = []
    for prompt, written in zip(prompts, answers, strict=True):
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([asked + written])).logits[0, len(asked) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(written)[:, None])[:, 0]
        found += (logits.max(dim=1).values - chosen).tolist()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("exact", [True, False])
def test_every_token_is_the_one_that_transformers_would_choose(students, family: str, exact: bool) -> None:
    """Up to the rounding of half-precision keys and values; without rounding if exact."""
    student = students[family]
    with (
        open_model(student.gguf) as model,
        open_context(model, ContextConfig(cells=2048, sequences=9, exact=exact)) as engine,
    ):
        tokens = [encode_prompt(model, prompt) for prompt in PROMPTS]
        answers = answer_tokens(
            engine, tokens, GenerationConfig(max_tokens=24, context=256, temperature=0), [0] * len(tokens)
        )
    written = [ids for ids, _ in answers]
    assert sum(map(len, written)) > 20
    assert max(regrets(student.model, student.adapter, PROMPTS, written)) < (1e-4 if exact else 0.02)


def test_batching_changes_no_answer(llama) -> None:
    alone = generate(llama.gguf, PROMPTS, replace(CONFIG, parallel=1, exact=True))
    assert generate(llama.gguf, PROMPTS, replace(CONFIG, parallel=8, exact=True)) == alone
    assert generate(llama.gguf, PROMPTS, replace(CONFIG, parallel=3, exact=True)) == alone
    assert len({answer.text for answer in alone}) > 5


def test_results_are_in_the_order_of_the_prompts(llama) -> None:
    names = [f"row-{number}" for number in range(len(PROMPTS))]
    forwards = generate(llama.gguf, PROMPTS, replace(CONFIG, parallel=3), ids=names)
    backwards = generate(llama.gguf, PROMPTS[::-1], replace(CONFIG, parallel=3, exact=True), ids=names[::-1])
    assert [answer.id for answer in forwards] == names
    assert backwards[::-1] == forwards


def test_a_batch_smaller_than_a_prompt_changes_nothing(llama) -> None:
    long = [*PROMPTS, (Message("user", "Count to nine. " * 60),)]
    assert generate(llama.gguf, long, GenerationConfig(max_tokens=8, context=512))[:-1] == generate(
        llama.gguf, PROMPTS, GenerationConfig(max_tokens=8, context=512)
    )


def test_max_tokens_and_the_context_cut(llama) -> None:
    short = generate(llama.gguf, PROMPTS, GenerationConfig(max_tokens=2, context=256))
    assert all(answer.tokens <= 2 and answer.finish in ("length", "stop") for answer in short)
    with open_model(llama.gguf, vocab_only=True) as model:
        assert {answer.finish for answer in short} >= {"length"}
        size = len(encode(model, "<|bos|><|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"))
    tight = generate(llama.gguf, [(Message("user", "x"),)], GenerationConfig(max_tokens=50, context=size + 3))[0]
    assert (tight.tokens, tight.finish) == (3, "length") or tight.finish == "stop"


def test_a_prompt_that_does_not_fit_is_kept(llama) -> None:
    long = (Message("user", "word " * 300),)
    found = generate(llama.gguf, [PROMPTS[0], long, PROMPTS[1]], GenerationConfig(max_tokens=4, context=64))
    assert [answer.finish == "too_long" for answer in found] == [False, True, False]
    assert (found[1].text, found[1].tokens) == ("", 0)
    assert [found[0], found[2]] == [
        replace(a, id=str(2 * n))
        for n, a in enumerate(generate(llama.gguf, PROMPTS[:2], GenerationConfig(max_tokens=4, context=64)))
    ]


def test_nothing_to_do(llama) -> None:
    assert generate(llama.gguf, [], CONFIG) == []
    assert (
        generate(llama.gguf, [(Message("user", "word " * 300),)], GenerationConfig(max_tokens=4, context=64))[0].finish
        == "too_long"
    )


def test_the_templates_end_of_turn_stops_an_answer(tmp_path: Path) -> None:
    """The template ends a turn with a token that llama.cpp does not know as an end token, and that is not EOS."""
    folder = make_model(tmp_path / "model", template="{% for m in messages %}{{ m.content }}<tool>{% endfor %}")
    export_gguf(folder, tmp_path / "out.gguf", adapter=None, quant="f32")
    with open_model(tmp_path / "out.gguf", vocab_only=True) as model:
        tool, bos = (encode(model, text)[0] for text in ("<tool>", "<|bos|>"))
        assert is_end_token(model, tool)
        assert not is_end_token(model, bos)
        assert decode(model, encode(model, "<|im_start|>a<|eos|>")) == "a"


def test_an_answer_stops_before_its_end_token(llama) -> None:
    """At a high temperature some answers draw an end token early; none shows it."""
    answers = generate(llama.gguf, PROMPTS * 8, GenerationConfig(max_tokens=100, context=256, temperature=4.0))
    stopped = [answer for answer in answers if answer.finish == "stop"]
    assert stopped
    assert all(answer.tokens < 100 for answer in stopped)
    assert not any("<|" in answer.text for answer in answers)


def test_progress_counts_up_to_all(llama) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        llama.gguf,
        PROMPTS,
        replace(CONFIG, parallel=4),
        callbacks=Callbacks(progress=lambda done, total: seen.append((done, total))),
    )
    assert seen[-1] == (len(PROMPTS), len(PROMPTS))
    assert seen == sorted(seen)


def test_each_answer_is_handed_over_as_it_ends(llama) -> None:
    seen: list[Completion] = []

    def cut(completion: Completion) -> None:
        seen.append(completion)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(llama.gguf, PROMPTS, replace(CONFIG, parallel=2), callbacks=Callbacks(result=cut))
    whole = {answer.id: answer for answer in generate(llama.gguf, PROMPTS, replace(CONFIG, parallel=2))}
    assert [whole[answer.id] for answer in seen] == seen
    assert {answer.id for answer in seen} < {str(number) for number in range(6)}


# Stop strings


def test_a_stop_string_ends_an_answer_wherever_it_lies_in_the_tokens(llama) -> None:
    """Pieces of two to seven characters of an answer: within a token, at its end, over several tokens."""
    config = CONFIG
    whole = generate(llama.gguf, PROMPTS[:3], config)
    text = whole[1].text
    pieces = {text[at : at + size] for at in range(0, len(text) - 7, 3) for size in (2, 4, 7)}
    pieces = [piece for piece in pieces if "\ufffd" not in piece]
    assert len(pieces) > 10
    for stop in pieces:
        for found, uncut in zip(generate(llama.gguf, PROMPTS[:3], replace(config, stops=(stop,))), whole, strict=True):
            assert found.text == uncut.text.split(stop)[0]
            assert found.finish == ("stop" if stop in uncut.text else uncut.finish)
            assert found.tokens <= uncut.tokens


def test_the_first_of_several_stop_strings_ends_an_answer(llama) -> None:
    [whole] = generate(llama.gguf, PROMPTS[1:2], CONFIG)
    early, late = whole.text[3:6], whole.text[12:15]
    [found] = generate(llama.gguf, PROMPTS[1:2], replace(CONFIG, stops=(late, early, "not in it")))
    assert found.text == whole.text[: whole.text.index(early)]


# Model files, templates and chat


def test_missing_or_broken_files_do_not_crash(llama, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "cut.gguf").write_bytes(llama.gguf.read_bytes()[:20_000])
    for name, words in (("none.gguf", "missing"), ("text.gguf", "not a GGUF"), ("cut.gguf", "cannot load")):
        with pytest.raises(TapirError, match=words) as caught:
            generate(tmp_path / name, PROMPTS, CONFIG)
        assert name in caught.value.where
        assert caught.value.fix
    with pytest.raises(TapirError, match="adapter is missing"):
        generate(llama.gguf, PROMPTS, CONFIG, adapter=tmp_path / "none.gguf")
    with pytest.raises(TapirError, match="cannot load the adapter"):
        generate(llama.gguf, PROMPTS, CONFIG, adapter=llama.gguf)


def test_an_adapter_writes_as_the_merged_model_and_is_refused_over_another_base(students, tmp_path: Path) -> None:
    student, lora = students["llama"], tmp_path / "lora.gguf"
    base = tmp_path / "base.gguf"
    export_gguf(student.model, base, adapter=None, quant="f32")
    export_adapter(student.model, student.adapter, lora)
    config = replace(CONFIG, exact=True)
    assert generate(base, PROMPTS, config, adapter=lora) == generate(student.gguf, PROMPTS, config)
    wide = make_model(tmp_path / "wide", hidden_size=32)
    export_gguf(wide, tmp_path / "wide.gguf", adapter=None, quant="f32")
    for other in (tmp_path / "wide.gguf", students["qwen2"].gguf):
        with pytest.raises(TapirError, match="cannot load the adapter over this model") as caught:
            generate(other, PROMPTS, CONFIG, adapter=lora)
        assert caught.value.where == str(lora)
        assert "base" in caught.value.fix


def test_llama_cpp_is_silent(llama, tmp_path: Path, capfd) -> None:
    generate(llama.gguf, PROMPTS[:1], CONFIG)
    (tmp_path / "cut.gguf").write_bytes(llama.gguf.read_bytes()[:20_000])
    with pytest.raises(TapirError, match=r"llama\.cpp: .+"):
        generate(tmp_path / "cut.gguf", PROMPTS, CONFIG)
    assert capfd.readouterr() == ("", "")


def test_no_second_bos(llama) -> None:
    text = "<|bos|><|im_start|>user\nhi<|im_end|>\n"
    for special in (False, True):
        [ids] = tokenize_texts(llama.gguf, [text], add_special=special)
        [bos] = tokenize_texts(llama.gguf, ["<|bos|>"])
        assert ids.count(bos[0]) == 1


def test_template_bos_and_eos_are_in_the_gguf(llama) -> None:
    template, bos, eos = read_gguf_template(llama.gguf)
    assert template == (llama.model / "chat_template.jinja").read_text()
    assert (bos, eos) == ("<|bos|>", "<|eos|>")


def test_chat_writes_what_generate_writes_in_whole_characters(llama) -> None:
    answers = generate(llama.gguf, PROMPTS, CONFIG)
    with open_engine(llama.gguf, context=256, parallel=1) as engine:
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            pieces = list(chat_stream(engine, prompt, max_tokens=CONFIG.max_tokens))
            assert "".join(pieces) == answer.text
            assert all(pieces)
        with pytest.raises(TapirError, match="tokens, the context"):
            list(chat_stream(engine, [Message("user", "word " * 300)], max_tokens=4))


def test_characters_spread_over_tokens_come_whole(llama) -> None:
    """The tokenizer has no merge for the emoji: it is four tokens of one byte each."""
    with open_model(llama.gguf, vocab_only=True) as model:
        ids = encode(model, "a🦙b")
        assert len(ids) >= 5
        assert decode(model, ids) == "a🦙b"
        assert decode(model, ids[:-2]).endswith("\ufffd")
        decoder = getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(token_bytes(model, token)) for token in ids]
        assert "".join(pieces) == "a🦙b"
        assert not any("\ufffd" in text for text in pieces)


def test_an_adapter_of_another_shape_is_one_error(llama, tmp_path: Path) -> None:
    other = make_model(tmp_path / "wide", hidden_size=32)
    adapter = make_adapter(other, tmp_path / "lora")
    with pytest.raises(TapirError, match="does not match a weight"):
        export_gguf(llama.model, tmp_path / "out.gguf", adapter=adapter, quant="f32")
    assert not (tmp_path / "out.gguf").exists()


def test_the_context_is_limited_to_the_models_own(llama) -> None:
    said: list[str] = []
    long = [PROMPTS[0], (Message("user", "word " * 900),)]
    found = generate(
        llama.gguf, long, GenerationConfig(max_tokens=4, context=8192), callbacks=Callbacks(warn=said.append)
    )
    assert [answer.finish == "too_long" for answer in found] == [False, True]
    assert said == ["prompts longer than the 512 tokens that the model was made for: 1"]
