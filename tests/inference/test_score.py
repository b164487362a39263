"""Log-probabilities of completions are those of transformers, in any batch; IFD is computed from them."""

import math
from pathlib import Path

import pytest
from models import CHATML, make_model, merged_model

from tapir_local.errors import TapirError
from tapir_local.export.export import export_adapter, export_gguf
from tapir_local.inference.context_plan import open_first_fitting_context, plan_scoring_context
from tapir_local.inference.generate import Callbacks
from tapir_local.inference.model import open_model
from tapir_local.inference.score import score_completions
from tapir_local.method.judging import ifd, perplexity
from tapir_local.records import Message, Scored

TEXTS = [
    ((Message("user", f"What is {n} times {n}?" * (1 + n % 4)),), f"{n} x {n} = {n * n} 🙂" * (1 + n % 3))
    for n in range(1, 90)
]


def expected(model_dir: Path, adapter: Path) -> list[tuple[float, int]]:
    """Log-probability and number of tokens by transformers, one text at a time."""
    import torch
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), merged_model(model_dir, adapter)
    found = []
    for prompt, completion in TEXTS:
        turns = [{"role": "user", "content": prompt[0].content}]
        head = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        ids = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": completion}])["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(dim=1)
        wanted = ids[len(head) :]
        found.append((float(sum(logprobs[len(head) - 1 + n, id] for n, id in enumerate(wanted))), len(wanted)))
    return found


def test_log_probabilities_are_those_of_transformers(students) -> None:
    for student in students.values():
        found = score_completions(student.gguf, TEXTS, context=512)
        for scored, (logprob, tokens) in zip(found, expected(student.model, student.adapter), strict=True):
            assert scored.tokens == tokens
            assert scored.logprob == pytest.approx(logprob, abs=0.02 * tokens)  # f16 keys and values


def test_results_are_in_order_and_do_not_depend_on_what_else_is_scored(llama) -> None:
    together, alone = (
        score_completions(llama.gguf, TEXTS[:9], context=512),
        score_completions(llama.gguf, [TEXTS[4]], context=512, ids=["x"]),
    )
    assert [scored.id for scored in together] == [str(n) for n in range(9)]
    assert alone[0].id == "x"
    assert together[4].logprob == pytest.approx(alone[0].logprob, abs=0.05)


def test_a_text_longer_than_the_context_has_no_tokens_and_no_ifd(llama) -> None:
    long, short = score_completions(llama.gguf, [(TEXTS[0][0], "word " * 200), TEXTS[0]], context=100)
    assert (long.tokens, long.logprob) == (0, 0.0)
    assert math.isnan(ifd(long, short))
    assert not ifd(long, short) > 0


def test_a_text_longer_than_a_batch_is_scored_whole(llama) -> None:
    [long] = score_completions(llama.gguf, [(TEXTS[0][0], "word " * 700)], context=4096)
    assert long.tokens > 700
    assert long.logprob < -700


def test_an_adapter_over_its_base_scores_as_the_merged_model(llama, tmp_path: Path) -> None:
    base, lora = tmp_path / "base.gguf", tmp_path / "lora.gguf"
    export_gguf(llama.model, base, adapter=None, quant="f32")
    export_adapter(llama.model, llama.adapter, lora)
    merged, over = (
        score_completions(llama.gguf, TEXTS[:9], context=512),
        score_completions(base, TEXTS[:9], adapter=lora, context=512),
    )
    assert [one.tokens for one in over] == [one.tokens for one in merged]
    assert all(abs(a.logprob - b.logprob) < 0.02 * a.tokens for a, b in zip(over, merged, strict=True))
    assert score_completions(base, TEXTS[:1], context=512)[0].logprob != pytest.approx(over[0].logprob, abs=0.5)


def test_no_memory_for_the_longest_text_is_an_error_with_the_numbers(llama) -> None:
    with open_model(llama.gguf) as model:
        plans = [plan_scoring_context(model, cells, 64) for cells in (2**31 - 300, 2**30)]
        with (
            pytest.raises(TapirError, match=r"takes [\d,.]+ GB, and .* are free"),
            open_first_fitting_context(model, plans),
        ):
            pytest.fail("there is no such memory")


def test_nothing_to_score(llama) -> None:
    assert score_completions(llama.gguf, [], context=100) == []


def test_a_missing_gguf_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="missing"):
        score_completions(tmp_path / "no.gguf", TEXTS, context=100)


def test_perplexity_and_ifd_by_hand() -> None:
    given, alone = Scored("a", -2 * math.log(2), 2), Scored("a", -2 * math.log(8), 2)  # 1/2 and 1/8 per token
    assert perplexity(given) == pytest.approx(2)
    assert ifd(given, alone) == pytest.approx(0.25)


def test_each_result_is_handed_over_as_it_is_done(llama) -> None:
    texts = [*TEXTS[:5], ((Message("user", "word " * 400),), "x"), ((Message("user", "x"),), "")]
    seen = list[Scored]()
    found = score_completions(llama.gguf, texts, context=200, callbacks=Callbacks(result=seen.append))
    assert sorted(seen, key=lambda row: int(row.id)) == found
    assert [row.tokens == 0 for row in found] == [False] * 5 + [True, False]


def test_a_text_that_the_template_refuses_has_no_tokens(tmp_path: Path) -> None:
    strict = "{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + CHATML
    export_gguf(make_model(tmp_path / "m", template=strict), tmp_path / "m.gguf", adapter=None, quant="f32")
    user, reply = Message("user", "Hi"), Message("assistant", "Hello")
    found = score_completions(tmp_path / "m.gguf", [((user,), "a"), ((user, reply, user), "a")], context=200)
    assert [row.tokens > 0 for row in found] == [True, False]
