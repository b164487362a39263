"""llama.cpp's batches over arrays of ours: tokens of many sequences put in, decoded, and their logits taken out."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tapir_local.inference.lib import failure, library
from tapir_local.inference.model import UBATCH, Engine
from tapir_local.records import Array

NO_ROOM = 1  # llama.h: llama_decode found no cells for the batch, and has changed nothing


@dataclass(frozen=True)
class Batch:
    """llama_batch over arrays of ours: a step's tokens are written by numpy, not one by one through ctypes.

    Rows are collected by `add`, which refuses those that the arrays have no room for, and are written into the arrays
    once, when they are decoded. The arrays hold `size` rows.
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
    wanted: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Rows that the arrays hold."""
        return len(self.token)

    @property
    def room(self) -> int:
        """Rows that can still be added."""
        return len(self.token) - len(self.tokens)

    def add(self, tokens: Sequence[int], position: int, slot: int, wanted: Sequence[int] = ()) -> bool:
        """Add tokens of one sequence from a position on; False, and nothing is changed, where there is no room.

        `wanted` are the places among them whose logits are asked for, in their order.
        """
        if len(tokens) > self.room:
            return False
        self.wanted.extend(len(self.tokens) + place for place in wanted)
        self.tokens.extend(tokens)
        self.positions.extend(range(position, position + len(tokens)))
        self.slots.extend([slot] * len(tokens))
        return True

    def write(self) -> int:
        """Write the rows into the arrays and begin again with none; how many they are."""
        count = len(self.tokens)
        self.token[:count], self.pos[:count], self.seq[:count] = self.tokens, self.positions, self.slots
        self.logits[:count] = 0
        self.logits[self.wanted] = 1
        for rows in (self.tokens, self.positions, self.slots, self.wanted):
            rows.clear()
        self.view.n_tokens = count
        return count


def make_batch(size: int) -> Batch:
    """An empty batch of `size` tokens, each of one sequence."""
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
    """Run the model over the rows of the batch; False, and nothing is changed, where no cells were free.

    The batch is empty afterwards. llama.h's other codes are no user's doing.
    """
    batch.write()
    code = library().llama_decode(engine.context, batch.view)
    if code not in (0, NO_ROOM):
        raise failure(f"llama_decode gave {code}", engine.model.gguf, engine.model.advice.too_large)
    return bool(code == 0)


def decode_batch(engine: Engine, batch: Batch) -> None:
    """Run the model over the rows of the batch. TapirError where the context has no cells for them."""
    if not try_batch(engine, batch):
        raise failure(
            f"no room in the context of {engine.cells:,} tokens", engine.model.gguf, engine.model.advice.too_large
        )


def last_logits(engine: Engine, count: int) -> Array:
    """What the last decoding left: float32 (count, vocabulary), one row for each that was wanted, in their order.

    The array is llama.cpp's own memory, good until the next decoding.
    """
    import numpy as np

    llama = library()
    width = llama.llama_vocab_n_tokens(engine.model.vocab)
    return np.ctypeslib.as_array(llama.llama_get_logits(engine.context), (count, width))


def logits(engine: Engine, tokens: Sequence[int]) -> Array:
    """What the model makes of a text at each of its tokens: float32 of shape (tokens, vocabulary)."""
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
