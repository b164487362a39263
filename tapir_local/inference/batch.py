"""llama.cpp's batches in NumPy arrays: add tokens of many sequences, decode them, and read their logits."""

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.inference.config import UBATCH
from tapir_local.inference.device_choice import deferred_interrupts
from tapir_local.inference.lib import library, llama_error
from tapir_local.inference.model import Engine
from tapir_local.records import Array

NO_FREE_CELLS = 1  # llama.h: llama_decode found no cells for the batch, and has changed nothing


@dataclass(frozen=True)
class Batch:
    """A llama_batch over NumPy arrays: the tokens of a step are written by NumPy, not one by one through ctypes.

    `add` collects rows, one per token, and raises when the arrays are full. `write` copies the rows into the arrays
    when they are decoded. The arrays hold `size` rows. `places` are the rows' places among the tokens of their `add`.
    """

    view: Any
    token: Array
    pos: Array
    seq: Array
    logits: Array
    kept: tuple[Array, ...]
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """The number of rows that the arrays hold."""
        return len(self.token)

    @property
    def free_rows(self) -> int:
        """The number of rows that can still be added."""
        return len(self.token) - len(self.tokens)

    def add(self, tokens: Sequence[int], position: int, slot: int, wanted: Sequence[int] = ()) -> None:
        """Add tokens of the sequence `slot`, the first of them at `position`.

        `wanted` are the indices of the tokens whose logits are needed, in order. OverflowError, with nothing added,
        if the batch has fewer free rows than there are tokens.
        """
        if len(tokens) > self.free_rows:
            raise OverflowError(f"{len(tokens)} tokens do not fit into the {self.free_rows} free rows of the batch")
        self.wanted.extend(len(self.tokens) + place for place in wanted)
        self.tokens.extend(tokens)
        self.positions.extend(range(position, position + len(tokens)))
        self.slots.extend([slot] * len(tokens))
        self.places.extend(range(len(tokens)))

    def interleave(self) -> None:
        """Reorder the rows: the first token of each call of `add`, then the second of each, and so on.

        This is the order in which llama.cpp computes split sequences. In another order it swaps whole rows of logits to
        give them back in the batch's order. With 152,000 tokens and 64 answers of different lengths, a token took
        100 µs of choosing with these swaps and 69 µs without; on the device 159 µs and 10 µs.
        """
        if not any(self.places):
            return
        order = sorted(range(len(self.places)), key=self.places.__getitem__)
        for rows in (self.tokens, self.positions, self.slots, self.places):
            rows[:] = [rows[place] for place in order]
        wanted = set(self.wanted)
        self.wanted[:] = [row for row, place in enumerate(order) if place in wanted]

    def write(self) -> int:
        """Write the rows into the arrays and remove them from the lists; the number of rows."""
        count = len(self.tokens)
        self.token[:count], self.pos[:count], self.seq[:count] = self.tokens, self.positions, self.slots
        self.logits[:count] = 0
        self.logits[self.wanted] = 1
        for rows in (self.tokens, self.positions, self.slots, self.places, self.wanted):
            rows.clear()
        self.view.n_tokens = count
        return count


def make_batch(size: int) -> Batch:
    """An empty batch of `size` rows; each row belongs to one sequence."""
    import numpy as np

    token, pos, seq = (np.zeros(size, dtype=np.int32) for _ in range(3))
    counts, logits = np.ones(size, dtype=np.int32), np.zeros(size, dtype=np.int8)
    pointers = seq.ctypes.data + seq.itemsize * np.arange(size, dtype=np.uintp)
    arrays: dict[str, Array] = {"token": token, "pos": pos, "n_seq_id": counts, "seq_id": pointers, "logits": logits}
    view = library().llama_batch()
    for name, kind in view._fields_:
        if name in arrays:
            setattr(view, name, ctypes.cast(arrays[name].ctypes.data, kind))
    return Batch(view, token, pos, seq, logits, (counts, pointers))


def try_batch(engine: Engine, batch: Batch) -> bool:
    """Run the model over the rows of the batch; False, with the context unchanged, if no cells were free.

    The batch is empty afterwards. TapirError for llama.h's other codes.
    """
    batch.write()
    with deferred_interrupts() if engine.on_device else nullcontext():
        code = library().llama_decode(engine.context, batch.view)
    if code not in (0, NO_FREE_CELLS):
        raise llama_error(f"llama_decode gave {code}", engine.model.gguf, engine.model.advice.too_large)
    return bool(code == 0)


def decode_batch(engine: Engine, batch: Batch) -> None:
    """Run the model over the rows of the batch. TapirError if the context has no cells for them."""
    if not try_batch(engine, batch):
        raise full_context_error(engine)


def full_context_error(engine: Engine) -> TapirError:
    """The error for a context without enough free cells."""
    what = f"no room in the context of {engine.cells:,} tokens"
    return llama_error(what, engine.model.gguf, engine.model.advice.too_large)


def last_logits(engine: Engine, count: int) -> Array:
    """The logits of the last decoding: float32 (count, vocabulary), one row for each wanted token, in order.

    The array is llama.cpp's own memory and is valid until the next decoding.
    """
    import numpy as np

    llama = library()
    width = llama.llama_vocab_n_tokens(engine.model.vocab)
    return np.ctypeslib.as_array(llama.llama_get_logits(engine.context), (count, width))


def compute_logits(engine: Engine, tokens: Sequence[int]) -> Array:
    """The logits after each token of a text: float32 of shape (tokens, vocabulary)."""
    import numpy as np

    size = min(engine.batch, UBATCH)
    batch = make_batch(size)
    library().llama_memory_clear(engine.memory, False)
    rows = []
    for start in range(0, len(tokens), size):
        chunk = tokens[start : start + size]
        batch.add(chunk, start, 0, range(len(chunk)))
        decode_batch(engine, batch)
        rows.append(last_logits(engine, len(chunk)).copy())
    return np.concatenate(rows)
