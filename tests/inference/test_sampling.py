"""Tokens are drawn with the odds of their logits, and a schema allows only answers that match it."""

import json
import random
from dataclasses import replace

import pytest
from students import CONFIG, PROMPTS

from tapir_local.errors import TapirError
from tapir_local.inference.batch import compute_logits
from tapir_local.inference.config import ContextConfig, GenerationConfig
from tapir_local.inference.generate import encode_prompt, generate
from tapir_local.inference.model import open_context, open_model
from tapir_local.inference.sampling import GREEDY, Sampler, draw_token, open_grammar, open_samplers, pick_token
from tapir_local.inference.tokens import encode, is_end_token

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
def test_every_answer_matches_the_schema(llama, temperature: float) -> None:
    config = replace(CONFIG, max_tokens=80, temperature=temperature, parallel=4)
    answers = generate(llama.gguf, PROMPTS, replace(config, schema=PERSON))
    people = [json.loads(answer.text) for answer in answers]
    assert {answer.finish for answer in answers} == {"stop"}
    assert all(list(person) == ["age", "name", "tall"] for person in people)
    assert {person["age"] for person in people} <= {1, 10, 100}
    assert len({answer.text for answer in answers}) > 3
    assert generate(llama.gguf, PROMPTS, replace(config, schema=PERSON)) == answers


def test_a_schema_cut_at_max_tokens_is_no_json_and_says_so(llama) -> None:
    (answer,) = generate(llama.gguf, PROMPTS[:1], GenerationConfig(max_tokens=3, context=256, schema=PERSON))
    assert (answer.finish, answer.tokens) == ("length", 3)


@pytest.mark.parametrize(
    "schema",
    [{"type": "nosuch"}, {"enum": 5}, {"properties": 3}, {"$ref": "http://x/y"}, {"$ref": "#/a"}, {"enum": []}],
    ids=str,
)
def test_an_invalid_schema_is_an_error_and_no_crash(llama, schema: dict) -> None:
    with pytest.raises(TapirError, match="JSON schema") as caught:
        generate(llama.gguf, PROMPTS, replace(CONFIG, schema=schema))
    assert caught.value.fix


def test_a_grammar_that_allows_nothing_more_ends_the_answer(llama) -> None:
    """llama.cpp ends the process if its grammar has to accept a token that it refuses."""
    with open_model(llama.gguf) as model, open_context(model, ContextConfig(cells=256, sequences=1)) as engine:
        row = compute_logits(engine, encode(model, "a b"))[0]
        for chance in (None, random.Random(1)):
            assert pick_token(model, Sampler(1.0, chance, open_grammar(model, r'root ::= "\x00"')), row) is None
        ended = pick_token(model, Sampler(0.0, None, open_grammar(model, 'root ::= ""')), row)
        assert ended is not None
        assert is_end_token(model, ended)


def test_a_grammar_does_not_change_the_odds_of_allowed_tokens(llama) -> None:
    """Two letters are allowed: they are drawn with the odds that their logits give."""
    with open_model(llama.gguf) as model, open_context(model, ContextConfig(cells=256, sequences=1)) as engine:
        prompt = encode_prompt(model, PROMPTS[0])
        row = compute_logits(engine, prompt)[-1]
        [[a], [b]] = (encode(model, letter) for letter in "ab")
        drawn = []
        for seed in range(300):
            with open_samplers(model, 1.0, [seed], {"enum": []}) as known:
                known.grammar = "root ::= [ab]"
                drawn.append(pick_token(model, known.start(0), row))
    odds = 1 / (1 + 2.718281828 ** float(row[b] - row[a]))
    assert set(drawn) == {a, b}
    assert abs(drawn.count(a) / 300 - odds) < 0.1


def test_tokens_are_drawn_by_the_softmax_at_a_temperature() -> None:
    """Compared with the exact odds; the vocabulary ends within a block."""
    import numpy as np

    row = np.random.default_rng(1).normal(0, 3, 1300).astype(np.float32)
    row[::7] = -np.inf  # as for tokens that a grammar refuses
    odds = np.exp((row - row.max()) / 0.7) / np.exp((row - row.max()) / 0.7).sum()
    drawn = [draw_token(Sampler(0.7, random.Random(seed)), row) for seed in range(4000)]
    counts = np.bincount(drawn, minlength=1300)
    likely = odds > 0.005
    assert (counts[row == -np.inf] == 0).all()
    assert (abs(counts - 4000 * odds)[likely] < 5 * np.sqrt(4000 * odds[likely])).all()
    assert draw_token(GREEDY, row) == row.argmax()


def test_draws_differ_by_seed_and_id_but_not_by_batch(llama) -> None:
    config = replace(CONFIG, temperature=1.5, exact=True)
    drawn = generate(llama.gguf, PROMPTS, replace(config, seed=1, parallel=8))
    assert generate(llama.gguf, PROMPTS, replace(config, seed=1, parallel=1)) == drawn
    assert generate(llama.gguf, PROMPTS, replace(config, seed=2, parallel=8)) != drawn
    twice = generate(llama.gguf, [PROMPTS[0]] * 4, replace(config, seed=1))
    assert len({answer.text for answer in twice}) > 1
