"""The next token of an answer: the likeliest or a drawn one, and with a grammar only such as it lets through."""

import ctypes
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.llama import LOG, Engine, Model, failure, is_end, library

SHARED = -1  # stands for every answer that needs no sampler of its own
NO_SCHEMA = "Give a JSON schema of objects, arrays, strings, numbers and enums, without references to elsewhere."
# llama-cpp-python 0.3.36 lets a string have bare line ends and the like, which JSON does not.
ANY_CHARACTER, NO_CONTROL = r'[^"\\]', r'[^"\\\x7F\x00-\x1F]'
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Sampler:
    """How the tokens of an answer are chosen. `grammar` knows what was written; None where any text will do."""

    chain: Any
    grammar: Any = None


@dataclass
class Samplers:
    """The samplers of the answers under way: one for all when greedy without a grammar, else one each."""

    model: Model
    temperature: float
    seeds: Sequence[int]
    grammar: str = ""
    held: dict[int, Sampler] = field(default_factory=dict)

    def owner(self, number: int) -> int:
        """Under which number the sampler of an answer is held."""
        return number if self.temperature > 0 or self.grammar else SHARED


@contextmanager
def samplers(
    model: Model, temperature: float, seeds: Sequence[int], schema: Mapping[str, Any] | None = None
) -> Iterator[Samplers]:
    """Samplers for as many answers as there are `seeds`, which `schema` holds to its JSON; freed at the end."""
    made = Samplers(model, temperature, seeds, "" if schema is None else grammar_of(schema))
    try:
        yield made
    finally:
        for number in list(made.held):
            free(made.held.pop(number))


def take(known: Samplers, number: int) -> Sampler:
    """The sampler of an answer that begins. TapirError when llama.cpp cannot read the grammar."""
    owner = known.owner(number)
    if owner not in known.held:
        grammar = open_grammar(known.model, known.grammar) if known.grammar else None
        known.held[owner] = Sampler(make_chain(known.temperature, known.seeds[number]), grammar)
    return known.held[owner]


def drop(known: Samplers, number: int) -> None:
    """The answer has ended: free what was its own."""
    if known.owner(number) == number:
        free(known.held.pop(number))


def free(sampler: Sampler) -> None:
    for part in (sampler.chain, sampler.grammar):
        if part:
            library().llama_sampler_free(part)


def make_chain(temperature: float, seed: int) -> Any:
    """Greedy, or the plain softmax at a temperature: no top-k, top-p or penalty."""
    llama = library()
    params = llama.llama_sampler_chain_default_params()
    params.no_perf = True
    chain = llama.llama_sampler_chain_init(params)
    if temperature <= 0:
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_greedy())
    else:
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(temperature))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(seed))
    return chain


def grammar_of(schema: Mapping[str, Any]) -> str:
    """The texts that a JSON schema admits, as a grammar of llama.cpp's; TapirError where it cannot be one.

    llama-cpp-python heeds neither `minimum` nor `maximum`: name the numbers in an `enum`.
    """
    library()  # it alone imports llama_cpp, with its log put aside
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        return str(json_schema_to_gbnf(json.dumps(schema))).replace(ANY_CHARACTER, NO_CONTROL)
    except FAULTS as error:
        raise TapirError(
            f"no grammar can be made of the JSON schema: {error}", where="schema", fix=NO_SCHEMA
        ) from error


def open_grammar(model: Model, text: str) -> Any:
    """A grammar at its beginning. A failure is a NULL pointer object, and using one would crash."""
    LOG.clear()
    made = library().llama_sampler_init_grammar(model.vocab, text.encode(), b"root")
    if not made:
        raise failure("llama.cpp cannot read the grammar of the JSON schema", model.gguf, NO_SCHEMA)
    return made


def pick(engine: Engine, sampler: Sampler, row: int) -> int | None:
    """The token that follows the batch's row; None where the grammar is at its end and the model knows no end token.

    A token is drawn freely and kept if the grammar lets it through, else drawn again among those that it does. The
    distribution is the same, and the grammar seldom looks at the whole vocabulary: 150,000 tokens took it 23 ms on one
    core, one token 0.07 ms. It is not in llama.cpp's chain, which would make it accept a token even where it refuses
    all of them, and that ends the process.
    """
    llama = library()
    token: int | None = llama.llama_sampler_sample(sampler.chain, engine.context, row)
    if sampler.grammar is None or token is None:
        return token
    if not admits(sampler.grammar, token):
        token = pick_admitted(engine, sampler, row)
    if token is not None and not is_end(engine.model, token):
        llama.llama_sampler_accept(sampler.grammar, token)
    return token


def admits(grammar: Any, token: int) -> bool:
    """Whether the grammar lets a token follow what was written."""
    llama = library()
    one = (llama.llama_token_data * 1)(llama.llama_token_data(token, 0.0, 0.0))
    llama.llama_sampler_apply(grammar, ctypes.byref(llama.llama_token_data_array(one, 1, -1, False)))
    return bool(one[0].logit == 0.0)


def pick_admitted(engine: Engine, sampler: Sampler, row: int) -> int | None:
    """A token among all that the grammar lets follow; None where there is none."""
    import numpy as np

    llama = library()
    count = llama.llama_vocab_n_tokens(engine.model.vocab)
    table = np.zeros(count, dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    table["id"] = np.arange(count)
    table["logit"] = np.ctypeslib.as_array(llama.llama_get_logits_ith(engine.context, row), (count,))
    data = ctypes.cast(table.ctypes.data, ctypes.POINTER(llama.llama_token_data))
    found = llama.llama_token_data_array(data, count, -1, False)
    llama.llama_sampler_apply(sampler.grammar, ctypes.byref(found))
    if not np.isfinite(table["logit"]).any():
        return None
    llama.llama_sampler_apply(sampler.chain, ctypes.byref(found))
    return int(found.data[found.selected].id)
