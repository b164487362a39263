"""Batched answers of a GGUF: the same as transformers', in order, stopped where they ought to be."""

import json
import random
from codecs import getincrementaldecoder
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
from models import make_adapter, make_model, merged_model

from tapir_local.errors import TapirError
from tapir_local.export.adapter import export_adapter
from tapir_local.export.export import export_gguf
from tapir_local.inference.batch import logits, make_batch
from tapir_local.inference.generate import answer, chat_stream, encode_prompt, generate
from tapir_local.inference.model import Engine, Model, open_context, open_engine, open_model, template_of
from tapir_local.inference.sampling import GREEDY, Sampler, draw, open_grammar, pick, samplers, take
from tapir_local.inference.scheduler import Manner, Work, Written, answer_each, common, leave, step
from tapir_local.inference.tokens import decode, encode, is_end, piece, tokenize
from tapir_local.records import Completion, Message

SUBJECTS = (
    "7 times 8",
    "the sum of 12 and 34",
    "a fox",
    "naïve café",
    "你好",
    "🙂",
    "x",
    "def add(a, b):",
    "the lazy dog",
    "9",
)
PROMPTS = [(Message("user", f"What is {subject}?" * (1 + number % 3)),) for number, subject in enumerate(SUBJECTS)]
SETTINGS = {"max_tokens": 24, "context": 256}


def regrets(model_dir: Path, adapter: Path, prompts: list, answers: list[list[int]]) -> list[float]:
    """By how much, at each token written, transformers' best logit exceeds that of the token chosen."""
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
    """Up to the rounding of half-precision keys and values, which is none when exact."""
    student = students[family]
    with open_model(student.gguf) as model, open_context(model, cells=2048, sequences=9, exact=exact) as engine:
        tokens = [encode_prompt(model, prompt) for prompt in PROMPTS]
        answers = answer(engine, tokens, max_tokens=24, context=256, temperature=0, seeds=[0] * len(tokens))
    written = [ids for ids, _ in answers]
    assert sum(map(len, written)) > 20
    assert max(regrets(student.model, student.adapter, PROMPTS, written)) < (1e-4 if exact else 0.02)


def test_batching_changes_no_answer(llama) -> None:
    alone = generate(llama.gguf, PROMPTS, parallel=1, exact=True, **SETTINGS)
    assert generate(llama.gguf, PROMPTS, parallel=8, exact=True, **SETTINGS) == alone
    assert generate(llama.gguf, PROMPTS, parallel=3, exact=True, **SETTINGS) == alone
    assert len({answer.text for answer in alone}) > 5


def test_results_are_in_the_order_of_the_prompts(llama) -> None:
    names = [f"row-{number}" for number in range(len(PROMPTS))]
    forwards = generate(llama.gguf, PROMPTS, ids=names, parallel=3, **SETTINGS)
    backwards = generate(llama.gguf, PROMPTS[::-1], ids=names[::-1], parallel=3, exact=True, **SETTINGS)
    assert [answer.id for answer in forwards] == names
    assert backwards[::-1] == forwards


def test_a_batch_smaller_than_a_prompt_changes_nothing(llama) -> None:
    long = [*PROMPTS, (Message("user", "Count to nine. " * 60),)]
    assert generate(llama.gguf, long, max_tokens=8, context=512)[:-1] == generate(
        llama.gguf, PROMPTS, max_tokens=8, context=512
    )


def test_max_tokens_and_the_context_cut(llama) -> None:
    short = generate(llama.gguf, PROMPTS, max_tokens=2, context=256)
    assert all(answer.tokens <= 2 and answer.finish in ("length", "stop") for answer in short)
    with open_model(llama.gguf, vocab_only=True) as model:
        assert {answer.finish for answer in short} >= {"length"}
        size = len(encode(model, "<|bos|><|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"))
    tight = generate(llama.gguf, [(Message("user", "x"),)], max_tokens=50, context=size + 3)[0]
    assert (tight.tokens, tight.finish) == (3, "length") or tight.finish == "stop"


def test_a_prompt_that_does_not_fit_is_kept(llama) -> None:
    long = (Message("user", "word " * 300),)
    found = generate(llama.gguf, [PROMPTS[0], long, PROMPTS[1]], max_tokens=4, context=64)
    assert [answer.finish == "too_long" for answer in found] == [False, True, False]
    assert (found[1].text, found[1].tokens) == ("", 0)
    assert [found[0], found[2]] == [
        replace(a, id=str(2 * n)) for n, a in enumerate(generate(llama.gguf, PROMPTS[:2], max_tokens=4, context=64))
    ]


def test_nothing_to_do(llama) -> None:
    assert generate(llama.gguf, [], **SETTINGS) == []
    assert generate(llama.gguf, [(Message("user", "word " * 300),)], max_tokens=4, context=64)[0].finish == "too_long"


def test_the_templates_end_of_turn_stops_an_answer(tmp_path: Path) -> None:
    """The template ends a turn with a token that llama.cpp knows nothing of, and that is not EOS."""
    folder = make_model(tmp_path / "model", template="{% for m in messages %}{{ m.content }}<tool>{% endfor %}")
    export_gguf(folder, tmp_path / "out.gguf", adapter=None, quant="f32")
    with open_model(tmp_path / "out.gguf", vocab_only=True) as model:
        tool, bos = (encode(model, text)[0] for text in ("<tool>", "<|bos|>"))
        assert is_end(model, tool)
        assert not is_end(model, bos)
        assert decode(model, encode(model, "<|im_start|>a<|eos|>")) == "a"


def test_an_answer_stops_before_its_end_token(llama) -> None:
    """Drawn hot, some of many answers meet an end token early; none shows it."""
    answers = generate(llama.gguf, PROMPTS * 8, max_tokens=100, context=256, temperature=4.0)
    stopped = [answer for answer in answers if answer.finish == "stop"]
    assert stopped
    assert all(answer.tokens < 100 for answer in stopped)
    assert not any("<|" in answer.text for answer in answers)


def test_draws_differ_by_seed_and_id_but_not_by_batch(llama) -> None:
    settings = {**SETTINGS, "temperature": 1.5, "exact": True}
    drawn = generate(llama.gguf, PROMPTS, seed=1, parallel=8, **settings)
    assert generate(llama.gguf, PROMPTS, seed=1, parallel=1, **settings) == drawn
    assert generate(llama.gguf, PROMPTS, seed=2, parallel=8, **settings) != drawn
    twice = generate(llama.gguf, [PROMPTS[0]] * 4, seed=1, **settings)
    assert len({answer.text for answer in twice}) > 1


def test_progress_counts_up_to_all(llama) -> None:
    seen: list[tuple[int, int]] = []
    generate(llama.gguf, PROMPTS, parallel=4, progress=lambda done, total: seen.append((done, total)), **SETTINGS)
    assert seen[-1] == (len(PROMPTS), len(PROMPTS))
    assert seen == sorted(seen)


def test_each_answer_is_handed_over_before_the_next_begins(llama) -> None:
    seen: list[Completion] = []

    def cut(completion: Completion) -> None:
        seen.append(completion)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(llama.gguf, PROMPTS, parallel=2, each=cut, **SETTINGS)
    whole = {answer.id: answer for answer in generate(llama.gguf, PROMPTS, parallel=2, **SETTINGS)}
    assert [whole[answer.id] for answer in seen] == seen
    assert {answer.id for answer in seen} < {str(number) for number in range(6)}


def test_a_prompt_may_be_refused_when_its_turn_has_come(llama) -> None:
    found: dict[int, list[int]] = {}
    asked: list[tuple[int, int]] = []

    def begin(number: int) -> bool:
        asked.append((number, len(found)))
        return number not in (0, 4, 9)

    with open_model(llama.gguf) as model, open_context(model, cells=1024, sequences=3) as engine:
        tokens = [encode_prompt(model, prompt) for prompt in PROMPTS]
        manner = Manner(24, 256)
        answer_each(engine, tokens, lambda n, written: found.update({n: written.tokens}), manner, [0] * 10, begin)
        answer_each(engine, tokens, lambda *_: pytest.fail("none was to be begun"), manner, [0] * 10, lambda _: False)
    assert sorted(found) == [1, 2, 3, 5, 6, 7, 8]
    assert [number for number, _ in asked] == list(range(10))
    assert max(number - 2 - done for number, done in asked) <= 3, "asked late, not all at the start"


# Stop strings


def test_a_stop_string_ends_an_answer_wherever_it_lies_in_the_tokens(llama) -> None:
    """Every piece of two to seven bytes of an answer: within a token, at its end, over several."""
    settings = {"max_tokens": 24, "context": 256}
    whole = generate(llama.gguf, PROMPTS[:3], **settings)
    text = whole[1].text
    pieces = {text[at : at + size] for at in range(0, len(text) - 7, 3) for size in (2, 4, 7)}
    pieces = [piece for piece in pieces if "\ufffd" not in piece]
    assert len(pieces) > 10
    for stop in pieces:
        for found, uncut in zip(generate(llama.gguf, PROMPTS[:3], stops=[stop], **settings), whole, strict=True):
            assert found.text == uncut.text.split(stop)[0]
            assert found.finish == ("stop" if stop in uncut.text else uncut.finish)
            assert found.tokens <= uncut.tokens


def test_the_first_of_several_stop_strings_ends_an_answer(llama) -> None:
    [whole] = generate(llama.gguf, PROMPTS[1:2], **SETTINGS)
    early, late = whole.text[3:6], whole.text[12:15]
    [found] = generate(llama.gguf, PROMPTS[1:2], stops=[late, early, "not in it"], **SETTINGS)
    assert found.text == whole.text[: whole.text.index(early)]


# Cells


@pytest.mark.parametrize("split", [False, True])
def test_shared_and_split_cells_give_the_same_answers(students, split: bool) -> None:
    """Prompts that begin alike, so that the beginning is copied, and more of them than places."""
    head = "You are asked a question, and answer it in few words, or in one where one is enough. " * 2
    asked = [(Message("system", head), *prompt) for prompt in PROMPTS]
    for student in students.values():
        alone = generate(student.gguf, asked, parallel=1, exact=True, max_tokens=12, context=512)
        with open_model(student.gguf) as model:
            tokens = [encode_prompt(model, prompt) for prompt in asked]
            assert common(tokens) > 32
            with open_context(model, cells=4 * 512, sequences=4, exact=True, split=split) as engine:
                found = answer(engine, tokens, max_tokens=12, context=512, temperature=0, seeds=[0] * 10)
            assert [decode(model, ids) for ids, _ in found] == [one.text for one in alone]


def test_sequences_that_end_leave_gaps_that_change_nothing(llama) -> None:
    """Twelve places, answers of 1 to 12 tokens in a scattered order, and none to follow: gaps narrow and wide."""
    lengths = [3, 12, 1, 1, 9, 2, 2, 2, 2, 2, 11, 5]
    with open_model(llama.gguf) as model:
        tokens = [encode_prompt(model, PROMPTS[number % 10]) for number in range(12)]
        ends = [answers_of(model, [ids], 1)[0][:length] for ids, length in zip(tokens, lengths, strict=True)]
        found = dict[int, list[int]]()
        with open_context(model, cells=12 * 256, sequences=12, exact=True, split=True) as engine:
            cut_at(engine, tokens, lengths, found)
    assert [found[number] for number in range(12)] == ends


def answers_of(model: Model, tokens: list[list[int]], sequences: int) -> list[list[int]]:
    """Twelve tokens for each prompt, whatever ends a turn."""
    found = dict[int, list[int]]()
    with open_context(model, cells=256 * sequences, sequences=sequences, exact=True, split=True) as engine:
        cut_at(engine, tokens, [12] * len(tokens), found)
    return [found[number] for number in range(len(tokens))]


def cut_at(engine: Engine, tokens: list[list[int]], lengths: list[int], found: dict[int, list[int]]) -> None:
    """Answers of these lengths: the context that each may fill is cut through the prompt's own room."""
    engine.model.ends.update(dict.fromkeys(range(500), False))
    with samplers(engine.model, 0.0, [0] * len(tokens)) as known:
        batch, slots = make_batch(engine.batch), list(range(engine.sequences))[::-1]
        keep = lambda number, written: found.update({number: written.tokens})  # noqa: E731
        work = Work(
            engine, batch, tokens, Manner(12, 256), 0, known, deque(range(len(tokens))), slots, engine.cells, keep
        )
        while work.queue or work.running:
            step(work)
            for run in [run for run in work.running if len(run.written) == lengths[run.number]]:
                leave(work, run, "length")


def test_a_context_without_cells_for_all_lets_the_last_begin_anew(llama) -> None:
    """The engine is told of more cells than there are: llama.cpp finds none, and one answer after another waits."""
    asked = [(Message("user", "Count the words. " * 6 + subject),) for subject in SUBJECTS]
    alone = generate(llama.gguf, asked, parallel=1, exact=True, max_tokens=40, context=250)
    began: list[int] = []
    found: dict[int, str] = {}
    with open_model(llama.gguf) as model, open_context(model, cells=256, sequences=9, exact=True) as engine:
        tokens = [encode_prompt(model, prompt) for prompt in asked]
        assert sum(map(len, tokens[:8])) > 256

        def begin(number: int) -> bool:
            began.append(number)
            return True

        def keep(number: int, written: Written) -> None:
            found[number] = written.text(model)

        answer_each(replace(engine, cells=10_000), tokens, keep, Manner(40, 250), [0] * 10, begin)
    assert [found[number] for number in range(10)] == [one.text for one in alone]
    assert sorted(began) == list(range(10)), "each is begun once for those who count"


def test_a_context_without_cells_for_one_is_an_error(llama) -> None:
    asked = (Message("user", "Count the words. " * 60),)
    with open_model(llama.gguf) as model, open_context(model, cells=256, sequences=2) as engine:
        tokens = [encode_prompt(model, asked)] * 2
        with pytest.raises(TapirError, match="no room in the context"):
            answer_each(replace(engine, cells=9999), tokens, print, Manner(5, 9999), [0, 0])


# Held to a schema

PERSON = {
    "type": "object",
    "properties": {
        "age": {"enum": [1, 10, 100]},
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "tall": {"type": "boolean"},
    },
    "required": ["age", "name", "tall"],
}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_a_schema_is_kept_to_whatever_the_model_would_say(llama, temperature: float) -> None:
    settings = {**SETTINGS, "max_tokens": 80, "temperature": temperature, "parallel": 4}
    answers = generate(llama.gguf, PROMPTS, schema=PERSON, **settings)
    people = [json.loads(answer.text) for answer in answers]
    assert {answer.finish for answer in answers} == {"stop"}
    assert all(list(person) == ["age", "name", "tall"] for person in people)
    assert {person["age"] for person in people} <= {1, 10, 100}
    assert len({answer.text for answer in answers}) > 3
    assert generate(llama.gguf, PROMPTS, schema=PERSON, **settings) == answers


def test_what_a_grammar_admits_is_drawn_as_often_as_without_it(llama) -> None:
    """Two letters, drawn first freely and then from what is let through: their odds are those of their logits."""
    with open_model(llama.gguf) as model, open_context(model, cells=256, sequences=1) as engine:
        prompt = encode_prompt(model, PROMPTS[0])
        row = logits(engine, prompt)[-1]
        [[a], [b]] = (encode(model, letter) for letter in "ab")
        drawn = []
        for seed in range(300):
            with samplers(model, 1.0, [seed], {"enum": []}) as known:
                known.grammar = "root ::= [ab]"
                drawn.append(pick(model, take(known, 0), row))
    odds = 1 / (1 + 2.718281828 ** float(row[b] - row[a]))
    assert set(drawn) == {a, b}
    assert abs(drawn.count(a) / 300 - odds) < 0.1


def test_tokens_are_drawn_by_the_softmax_at_a_temperature() -> None:
    """Against NumPy's own draws of the same odds; the vocabulary ends within a block."""
    import numpy as np

    row = np.random.default_rng(1).normal(0, 3, 1300).astype(np.float32)
    row[::7] = -np.inf  # what a grammar refuses
    odds = np.exp((row - row.max()) / 0.7) / np.exp((row - row.max()) / 0.7).sum()
    drawn = [draw(Sampler(0.7, random.Random(seed)), row) for seed in range(4000)]
    counts = np.bincount(drawn, minlength=1300)
    likely = odds > 0.005
    assert (counts[row == -np.inf] == 0).all()
    assert (abs(counts - 4000 * odds)[likely] < 5 * np.sqrt(4000 * odds[likely])).all()
    assert draw(GREEDY, row) == row.argmax()


def test_a_schema_cut_at_max_tokens_is_no_json_and_says_so(llama) -> None:
    (answer,) = generate(llama.gguf, PROMPTS[:1], max_tokens=3, context=256, schema=PERSON)
    assert (answer.finish, answer.tokens) == ("length", 3)


@pytest.mark.parametrize(
    "schema",
    [{"type": "nosuch"}, {"enum": 5}, {"properties": 3}, {"$ref": "http://x/y"}, {"$ref": "#/a"}, {"enum": []}],
    ids=str,
)
def test_what_is_no_schema_is_an_error_and_no_crash(llama, schema: dict) -> None:
    with pytest.raises(TapirError, match="JSON schema") as caught:
        generate(llama.gguf, PROMPTS, schema=schema, **SETTINGS)
    assert caught.value.fix


def test_a_grammar_that_lets_nothing_follow_ends_the_answer(llama) -> None:
    """llama.cpp ends the process when its grammar is to accept a token that it refused."""
    with open_model(llama.gguf) as model, open_context(model, cells=256, sequences=1) as engine:
        row = logits(engine, encode(model, "a b"))[0]
        for chance in (None, random.Random(1)):
            assert pick(model, Sampler(1.0, chance, open_grammar(model, r'root ::= "\x00"')), row) is None
        ended = pick(model, Sampler(0.0, None, open_grammar(model, 'root ::= ""')), row)
        assert ended is not None
        assert is_end(model, ended)


def test_what_all_prompts_begin_with() -> None:
    assert common([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 9]]) == 2
    assert common([[1, 2], [1, 2, 3]]) == 1
    assert common([[1, 2], [1, 2]]) == 1
    assert common([[1, 2, 3]]) == common([]) == 0


def test_missing_or_broken_files_do_not_crash(llama, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "cut.gguf").write_bytes(llama.gguf.read_bytes()[:20_000])
    for name, words in (("none.gguf", "missing"), ("text.gguf", "no GGUF"), ("cut.gguf", "cannot load")):
        with pytest.raises(TapirError, match=words) as caught:
            generate(tmp_path / name, PROMPTS, **SETTINGS)
        assert name in caught.value.where
        assert caught.value.fix
    with pytest.raises(TapirError, match="adapter is missing"):
        generate(llama.gguf, PROMPTS, adapter=tmp_path / "none.gguf", **SETTINGS)
    with pytest.raises(TapirError, match="cannot load the adapter"):
        generate(llama.gguf, PROMPTS, adapter=llama.gguf, **SETTINGS)


def test_an_adapter_writes_as_the_merged_model_and_another_bases_is_refused(students, tmp_path: Path) -> None:
    student, lora = students["llama"], tmp_path / "lora.gguf"
    base = tmp_path / "base.gguf"
    export_gguf(student.model, base, adapter=None, quant="f32")
    export_adapter(student.model, student.adapter, lora)
    settings = {**SETTINGS, "exact": True}
    assert generate(base, PROMPTS, adapter=lora, **settings) == generate(student.gguf, PROMPTS, **settings)
    wide = make_model(tmp_path / "wide", hidden_size=32)
    export_gguf(wide, tmp_path / "wide.gguf", adapter=None, quant="f32")
    for other in (tmp_path / "wide.gguf", students["qwen2"].gguf):
        with pytest.raises(TapirError, match="cannot load the adapter over this model") as caught:
            generate(other, PROMPTS, adapter=lora, **SETTINGS)
        assert caught.value.where == str(lora)
        assert "base" in caught.value.fix


def test_llama_cpp_is_silent(llama, tmp_path: Path, capfd) -> None:
    generate(llama.gguf, PROMPTS[:1], **SETTINGS)
    (tmp_path / "cut.gguf").write_bytes(llama.gguf.read_bytes()[:20_000])
    with pytest.raises(TapirError, match=r"llama\.cpp: .+"):
        generate(tmp_path / "cut.gguf", PROMPTS, **SETTINGS)
    assert capfd.readouterr() == ("", "")


def test_no_second_bos(llama) -> None:
    text = "<|bos|><|im_start|>user\nhi<|im_end|>\n"
    for special in (False, True):
        [ids] = tokenize(llama.gguf, [text], add_special=special)
        [bos] = tokenize(llama.gguf, ["<|bos|>"])
        assert ids.count(bos[0]) == 1


def test_template_bos_and_eos_come_with_the_gguf(llama) -> None:
    template, bos, eos = template_of(llama.gguf)
    assert template == (llama.model / "chat_template.jinja").read_text()
    assert (bos, eos) == ("<|bos|>", "<|eos|>")


def test_chat_writes_what_generate_writes_in_whole_characters(llama) -> None:
    answers = generate(llama.gguf, PROMPTS, **SETTINGS)
    with open_engine(llama.gguf, context=256, parallel=1) as engine:
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            pieces = list(chat_stream(engine, prompt, max_tokens=SETTINGS["max_tokens"]))
            assert "".join(pieces) == answer.text
            assert all(pieces)
        with pytest.raises(TapirError, match="tokens, the context"):
            list(chat_stream(engine, [Message("user", "word " * 300)], max_tokens=4))


def test_characters_spread_over_tokens_come_whole(llama) -> None:
    """The emoji is in no merge of the tokenizer: four tokens of a byte each."""
    with open_model(llama.gguf, vocab_only=True) as model:
        ids = encode(model, "a🦙b")
        assert len(ids) >= 5
        assert decode(model, ids) == "a🦙b"
        assert decode(model, ids[:-2]).endswith("\ufffd")
        decoder = getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(piece(model, token)) for token in ids]
        assert "".join(pieces) == "a🦙b"
        assert not any("\ufffd" in text for text in pieces)


def test_an_adapter_of_another_shape_is_one_error(llama, tmp_path: Path) -> None:
    other = make_model(tmp_path / "wide", hidden_size=32)
    adapter = make_adapter(other, tmp_path / "lora")
    with pytest.raises(TapirError, match="does not match a weight"):
        export_gguf(llama.model, tmp_path / "out.gguf", adapter=adapter, quant="f32")
    assert not (tmp_path / "out.gguf").exists()


def test_the_context_ends_where_the_model_was_not_made_for_more(llama) -> None:
    said: list[str] = []
    long = [PROMPTS[0], (Message("user", "word " * 900),)]
    found = generate(llama.gguf, long, max_tokens=4, context=8192, tell=said.append)
    assert [answer.finish == "too_long" for answer in found] == [False, True]
    assert said == ["prompts longer than the 512 tokens that the model was made for: 1"]
