"""llama.cpp's batches over arrays of ours: tokens of many sequences put in, decoded, and their logits taken out."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tapir_local.libllama import failure, library
from tapir_local.llama import UBATCH, Engine

Array = Any  # numpy.ndarray; numpy is imported where it is used
NO_ROOM = 1  # llama.h: llama_decode found no cells for the batch, and has changed nothing


@dataclass(frozen=True)
class Batch:
    """llama_batch over arrays of ours: a step's tokens are written by numpy, not one by one through ctypes."""

    view: Any
    token: Array
    pos: Array
    seq: Array
    logits: Array
    kept: tuple[Array, ...]


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


def put(batch: Batch, at: int, tokens: Sequence[int], position: int, slot: int) -> None:
    """Write tokens of one sequence into the batch from row `at`."""
    end = at + len(tokens)
    batch.token[at:end] = tokens
    batch.pos[at:end] = range(position, position + len(tokens))
    batch.seq[at:end] = slot


def try_batch(engine: Engine, batch: Batch, count: int) -> bool:
    """Run the model over the batch's first `count` rows; False, and nothing is changed, where no cells were free.

    llama.h's other codes are no user's doing.
    """
    batch.view.n_tokens = count
    code = library().llama_decode(engine.context, batch.view)
    batch.logits[:count] = 0
    if code not in (0, NO_ROOM):
        raise failure(f"llama_decode gave {code}", engine.model.gguf, engine.model.advice.too_large)
    return bool(code == 0)


def decode_batch(engine: Engine, batch: Batch, count: int) -> None:
    """Run the model over the batch's first `count` rows. TapirError where the context has no cells for them."""
    if not try_batch(engine, batch, count):
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
        put(batch, 0, chunk, start, 0)
        batch.logits[: len(chunk)] = 1
        decode_batch(engine, batch, len(chunk))
        rows.append(last_logits(engine, len(chunk)).copy())
    return np.concatenate(rows)
