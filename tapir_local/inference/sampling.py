"""Choose the next token of an answer: the likeliest or a drawn one, and with a grammar only one that it allows.

llama.cpp's own samplers are not used for the choice: on a CPU, each first copies the whole vocabulary into its own
table. With 152,000 tokens, the likeliest took them 160 µs per row and NumPy 10 µs, a drawn one 1,240 µs and 130 µs; a
0.5B model in q8_0 takes 6,400 µs for the row on two cores. For a GPU, see device_choice.
"""

import ctypes
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.inference.batch import last_logits
from tapir_local.inference.device_choice import tokens_from_device
from tapir_local.inference.lib import LLAMA_LOG, library, llama_error
from tapir_local.inference.model import REMAKE_ADVICE, Engine, Model
from tapir_local.inference.tokens import is_end_token
from tapir_local.records import Array

SUM_BLOCK = 512  # tokens whose weights are summed before a drawn token is searched among them
SCHEMA_ADVICE = "Give a JSON schema of objects, arrays, strings, numbers and enums, without external references."
# llama-cpp-python 0.3.36 allows control characters such as line ends in a string; JSON does not.
ANY_CHARACTER, NO_CONTROL = r'[^"\\]', r'[^"\\\x7F\x00-\x1F]'
SCHEMA_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Sampler:
    """How the tokens of an answer are chosen: drawn with `chance`, or the likeliest if it is None.

    `grammar` follows the text written so far; None if any text is allowed.
    """

    temperature: float = 0.0
    chance: random.Random | None = None
    grammar: Any = None


GREEDY = Sampler()


@dataclass
class Samplers:
    """The samplers of the answers in progress, by the answer's number; `seeds` has one seed per answer."""

    model: Model
    temperature: float
    seeds: Sequence[int]
    grammar: str = ""
    active: dict[int, Sampler] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        """Whether every answer takes the likeliest token, with no grammar."""
        return self.temperature <= 0 and not self.grammar

    def start(self, number: int) -> Sampler:
        """The sampler of an answer that starts. TapirError if llama.cpp cannot read the grammar."""
        if self.greedy:
            return GREEDY
        grammar = open_grammar(self.model, self.grammar) if self.grammar else None
        chance = random.Random(self.seeds[number]) if self.temperature > 0 else None
        self.active[number] = Sampler(self.temperature, chance, grammar)
        return self.active[number]

    def end(self, number: int) -> None:
        """Free the sampler of an answer that has ended."""
        sampler = self.active.pop(number, GREEDY)
        if sampler.grammar:
            library().llama_sampler_free(sampler.grammar)


@contextmanager
def open_samplers(
    model: Model, temperature: float, seeds: Sequence[int], schema: Mapping[str, Any] | None = None
) -> Iterator[Samplers]:
    """Samplers for as many answers as there are `seeds`; `schema` limits the answers to its JSON. Freed at the end."""
    samplers = Samplers(model, temperature, seeds, "" if schema is None else grammar_from_schema(schema))
    try:
        yield samplers
    finally:
        for number in list(samplers.active):
            samplers.end(number)


def grammar_from_schema(schema: Mapping[str, Any]) -> str:
    """A llama.cpp grammar of the texts that a JSON schema allows; TapirError if none can be made.

    llama-cpp-python ignores `minimum` and `maximum`: list the numbers in an `enum` instead.
    """
    library()  # the only place that imports llama_cpp, so that its log is captured
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        return str(json_schema_to_gbnf(json.dumps(schema))).replace(ANY_CHARACTER, NO_CONTROL)
    except SCHEMA_ERRORS as error:
        raise TapirError(
            f"no grammar can be made of the JSON schema: {error}", where="schema", fix=SCHEMA_ADVICE
        ) from error


def open_grammar(model: Model, text: str) -> Any:
    """A grammar at its start. llama.cpp returns a NULL pointer object on failure; using it would crash."""
    LLAMA_LOG.clear()
    made = library().llama_sampler_init_grammar(model.vocab, text.encode(), b"root")
    if not made:
        raise llama_error("llama.cpp cannot read the grammar of the JSON schema", model.gguf, SCHEMA_ADVICE)
    return made


def next_tokens(engine: Engine, chosen_by: Sequence[Sampler]) -> list[int | None]:
    """The token after each wanted token of the last decoding, in order, chosen by its sampler; see `pick_token`.

    An engine that chooses on the device gives no logits, so all samplers must be greedy: ValueError. Drawn tokens are
    never chosen on the device, because llama.cpp would draw other tokens for the same seed. TapirError if the device
    found no likeliest token.
    """
    if not engine.on_device:
        return choose_tokens(engine.model, chosen_by, last_logits(engine, len(chosen_by)))
    if any(sampler is not GREEDY for sampler in chosen_by):
        raise ValueError("this context gives only the likeliest tokens")
    tokens = tokens_from_device(engine.context, len(chosen_by))
    if min(tokens) < 0:
        raise llama_error("no token can be chosen: the model gives no numbers", engine.model.gguf, REMAKE_ADVICE)
    return list[int | None](tokens)


def choose_tokens(model: Model, chosen_by: Sequence[Sampler], rows: Array) -> list[int | None]:
    """The token after each row of logits, float32 (answers, vocabulary), chosen by its sampler; see `pick_token`."""
    if all(sampler is GREEDY for sampler in chosen_by):
        return list(rows.argmax(axis=1).tolist())
    return [pick_token(model, sampler, row) for sampler, row in zip(chosen_by, rows, strict=True)]


def pick_token(model: Model, sampler: Sampler, row: Array) -> int | None:
    """The token after a row of logits; None if the grammar is at its end and the model has no end token.

    A token is drawn without the grammar and kept if the grammar allows it, otherwise drawn again among the allowed
    ones. The distribution is the same, and the grammar rarely checks the whole vocabulary: 150,000 tokens take it 23 ms
    on one core, one token 0.07 ms. A grammar must not accept a token that it refuses: that ends the process.
    """
    token: int | None = draw_token(sampler, row)
    if sampler.grammar is None or token is None:
        return token
    if not grammar_allows(sampler.grammar, token):
        token = pick_allowed_token(sampler, row)
    if token is not None and not is_end_token(model, token):
        library().llama_sampler_accept(sampler.grammar, token)
    return token


def draw_token(sampler: Sampler, row: Array) -> int:
    """The likeliest token, or one drawn from the softmax at a temperature: no top-k, top-p or penalty.

    The place of the drawn number in the cumulative sum is searched by blocks first, so that few sums are needed.
    """
    import numpy as np

    likeliest = int(row.argmax())
    if sampler.chance is None:
        return likeliest
    weights = np.exp((row - row[likeliest]) / np.float32(sampler.temperature))
    sums = np.add.reduceat(weights, np.arange(0, len(weights), SUM_BLOCK), dtype=np.float64).cumsum()
    aim = sampler.chance.random() * float(sums[-1])
    block = int(np.searchsorted(sums, aim, side="right"))
    inner = weights[block * SUM_BLOCK : (block + 1) * SUM_BLOCK].cumsum(dtype=np.float64)
    before = float(sums[block - 1]) if block else 0.0
    token = block * SUM_BLOCK + int(np.searchsorted(inner, aim - before, side="right"))
    return token if token < len(weights) and weights[token] > 0 else likeliest  # sums differ in their last bit


def grammar_allows(grammar: Any, token: int) -> bool:
    """Whether the grammar allows a token after the text written so far."""
    llama = library()
    one = (llama.llama_token_data * 1)(llama.llama_token_data(token, 0.0, 0.0))
    llama.llama_sampler_apply(grammar, ctypes.byref(llama.llama_token_data_array(one, 1, -1, False)))
    return bool(one[0].logit == 0.0)


def pick_allowed_token(sampler: Sampler, row: Array) -> int | None:
    """A token among all that the grammar allows; None if it allows none."""
    import numpy as np

    llama = library()
    table = np.zeros(len(row), dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    table["id"], table["logit"] = np.arange(len(row)), row
    data = ctypes.cast(table.ctypes.data, ctypes.POINTER(llama.llama_token_data))
    llama.llama_sampler_apply(sampler.grammar, ctypes.byref(llama.llama_token_data_array(data, len(row), -1, False)))
    return draw_token(sampler, table["logit"]) if np.isfinite(table["logit"]).any() else None
