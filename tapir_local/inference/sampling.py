"""The next token of an answer: the likeliest or a drawn one, and with a grammar only such as it lets through.

llama.cpp's own samplers are not used for the choice: each copies the whole vocabulary into a table of its own first. Of
152,000 tokens the likeliest took them 160 µs a row and numpy 10, a drawn one 1,240 and 130, where a 0.5B model in q8_0
takes 6,400 for the row on two cores.
"""

import ctypes
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.inference.lib import LOG, failure, library
from tapir_local.inference.model import Model
from tapir_local.inference.tokens import is_end
from tapir_local.records import Array

BLOCK = 512  # tokens summed together before a drawn one is sought among them
NO_SCHEMA = "Give a JSON schema of objects, arrays, strings, numbers and enums, without references to elsewhere."
# llama-cpp-python 0.3.36 lets a string have bare line ends and the like, which JSON does not.
ANY_CHARACTER, NO_CONTROL = r'[^"\\]', r'[^"\\\x7F\x00-\x1F]'
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Sampler:
    """How the tokens of an answer are chosen: drawn by `chance`, the likeliest where it is None.

    `grammar` knows what was written; None where any text will do.
    """

    temperature: float = 0.0
    chance: random.Random | None = None
    grammar: Any = None


GREEDY = Sampler()


@dataclass
class Samplers:
    """The samplers of the answers under way, by their number."""

    model: Model
    temperature: float
    seeds: Sequence[int]
    grammar: str = ""
    held: dict[int, Sampler] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        """Whether every answer takes the likeliest token, whatever it is."""
        return self.temperature <= 0 and not self.grammar


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
            drop(made, number)


def take(known: Samplers, number: int) -> Sampler:
    """The sampler of an answer that begins. TapirError when llama.cpp cannot read the grammar."""
    if known.greedy:
        return GREEDY
    grammar = open_grammar(known.model, known.grammar) if known.grammar else None
    chance = random.Random(known.seeds[number]) if known.temperature > 0 else None
    known.held[number] = Sampler(known.temperature, chance, grammar)
    return known.held[number]


def drop(known: Samplers, number: int) -> None:
    """The answer has ended: free what was its own."""
    sampler = known.held.pop(number, GREEDY)
    if sampler.grammar:
        library().llama_sampler_free(sampler.grammar)


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


def choose(model: Model, chosen_by: Sequence[Sampler], rows: Array) -> list[int | None]:
    """The token that follows each row of logits, float32 (answers, vocabulary), by the answer's sampler; see `pick`."""
    if all(sampler is GREEDY for sampler in chosen_by):
        return list(rows.argmax(axis=1).tolist())
    return [pick(model, sampler, row) for sampler, row in zip(chosen_by, rows, strict=True)]


def pick(model: Model, sampler: Sampler, row: Array) -> int | None:
    """The token that follows a row of logits; None where the grammar is at its end and the model knows no end token.

    A token is drawn freely and kept if the grammar lets it through, else drawn again among those that it does. The
    distribution is the same, and the grammar seldom looks at the whole vocabulary: 150,000 tokens took it 23 ms on one
    core, one token 0.07 ms. A grammar is never made to accept a token that it refuses: that ends the process.
    """
    token: int | None = draw(sampler, row)
    if sampler.grammar is None or token is None:
        return token
    if not admits(sampler.grammar, token):
        token = pick_admitted(sampler, row)
    if token is not None and not is_end(model, token):
        library().llama_sampler_accept(sampler.grammar, token)
    return token


def draw(sampler: Sampler, row: Array) -> int:
    """The likeliest token, or one drawn from the plain softmax at a temperature: no top-k, top-p or penalty.

    Where the drawn number falls in the sum of all weights is sought by blocks, so that few sums are made one by one.
    """
    import numpy as np

    likeliest = int(row.argmax())
    if sampler.chance is None:
        return likeliest
    weights = np.exp((row - row[likeliest]) / np.float32(sampler.temperature))
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64).cumsum()
    aim = sampler.chance.random() * float(sums[-1])
    block = int(np.searchsorted(sums, aim, side="right"))
    inner = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    before = float(sums[block - 1]) if block else 0.0
    token = block * BLOCK + int(np.searchsorted(inner, aim - before, side="right"))
    return token if token < len(weights) and weights[token] > 0 else likeliest  # sums differ in their last bit


def admits(grammar: Any, token: int) -> bool:
    """Whether the grammar lets a token follow what was written."""
    llama = library()
    one = (llama.llama_token_data * 1)(llama.llama_token_data(token, 0.0, 0.0))
    llama.llama_sampler_apply(grammar, ctypes.byref(llama.llama_token_data_array(one, 1, -1, False)))
    return bool(one[0].logit == 0.0)


def pick_admitted(sampler: Sampler, row: Array) -> int | None:
    """A token among all that the grammar lets follow; None where there is none."""
    import numpy as np

    llama = library()
    table = np.zeros(len(row), dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    table["id"], table["logit"] = np.arange(len(row)), row
    data = ctypes.cast(table.ctypes.data, ctypes.POINTER(llama.llama_token_data))
    llama.llama_sampler_apply(sampler.grammar, ctypes.byref(llama.llama_token_data_array(data, len(row), -1, False)))
    return draw(sampler, table["logit"]) if np.isfinite(table["logit"]).any() else None
