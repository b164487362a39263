"""Many prompts to one GGUF: continuous batching on llama.cpp, so that a student answers a holdout in one go."""

import codecs
import ctypes
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tapir_local.errors import TapirError
from tapir_local.llama import (
    STUDENT,
    Advice,
    Engine,
    Model,
    decode,
    encode,
    failure,
    is_end,
    library,
    open_context,
    open_model,
    piece,
    template,
)
from tapir_local.records import Completion, Message, Prompt
from tapir_local.sampling import Sampler, Samplers, drop, pick, samplers, take
from tapir_local.template import render

Array = Any  # numpy.ndarray; numpy is imported where it is used
Finish = Literal["stop", "length", "too_long"]
Each = Callable[[int, list[int], Finish], None]  # number of the prompt, tokens written, how they end
MAX_SEQUENCES = 256  # llama.cpp's LLAMA_MAX_SEQ


@dataclass(frozen=True)
class Manner:
    """How answers are written. `context` is tokens of a prompt and its answer together, `schema` of JSON."""

    max_tokens: int
    context: int
    temperature: float = 0.0
    schema: Mapping[str, Any] | None = None


@dataclass(eq=False)
class Running:
    """One answer in the making, in sequence `slot` of the context.

    `waiting` are the tokens not yet decoded: what is left of the prompt, later the token just drawn. `position` is
    where the first of them goes, `reserved` the cells the answer may come to fill.
    """

    number: int
    slot: int
    waiting: Sequence[int]
    position: int
    reserved: int
    sampler: Sampler
    written: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """llama_batch over arrays of ours: a step's tokens are written by numpy, not one by one through ctypes."""

    view: Any
    token: Array
    pos: Array
    seq: Array
    logits: Array
    kept: tuple[Array, ...]


def always(number: int) -> bool:
    """Every prompt is begun."""
    return True


def ignored(number: int, written: list[int], finish: Finish) -> None:
    """An answer that was read while it was written."""


@dataclass
class Work:
    """A call of `answer_each`: what waits, what runs, what is free, and who is told."""

    engine: Engine
    batch: Batch
    prompts: Sequence[list[int]]
    manner: Manner
    shared: int
    samplers: Samplers
    queue: deque[int]
    slots: list[int]
    free: int
    each: Each
    begin: Callable[[int], bool] = always
    running: list[Running] = field(default_factory=list)


def generate(
    gguf: Path,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    context: int,
    parallel: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    adapter: Path | None = None,
    ids: Sequence[str] | None = None,
    threads: int | None = None,
    exact: bool = False,
    schema: Mapping[str, Any] | None = None,
    advice: Advice = STUDENT,
    each: Callable[[Completion], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Answer every prompt, `parallel` at a time; results are in the order of `prompts`, their ids `ids` or numbers.

    `context` is tokens of a prompt and its answer together. `finish` is `stop` at any token that llama.cpp knows to end
    a turn, `length` at `max_tokens` or at the context's end, and `too_long`, with no text, where the prompt leaves no
    room for an answer. Greedy at temperature 0; else each answer is drawn with its own seed, made of `seed` and its id.
    The same call gives the same answers; at another `parallel`, near ties may fall otherwise unless `exact` (slower).
    `schema` holds every answer to the JSON that it describes, up to where `max_tokens` cuts it. `each` is given every
    answer as soon as it is done, `progress` is told (answers done, answers wanted). TapirError when the GGUF or the
    adapter cannot be loaded, or nothing can be held to the schema.
    """
    names = [str(number) for number in range(len(prompts))] if ids is None else list(ids)
    if len(names) != len(prompts):
        raise TapirError(f"{len(names)} ids for {len(prompts)} prompts", fix="Give one id for each prompt.")
    if not prompts:
        return []
    with open_model(gguf, adapter=adapter, advice=advice) as model:
        tokens = [encode_prompt(model, prompt) for prompt in prompts]
        seeds = [random.Random(f"{seed}-generate-{name}").getrandbits(31) for name in names]
        sequences, cells = size(tokens, max_tokens, context, parallel)
        found: dict[int, Completion] = {}

        def keep(number: int, written: list[int], finish: Finish) -> None:
            found[number] = Completion(names[number], decode(model, written), finish, len(written))
            if each:
                each(found[number])
            if progress:
                progress(len(found), len(prompts))

        with open_context(model, cells=cells, sequences=sequences + 1, threads=threads, exact=exact) as engine:
            answer_each(engine, tokens, keep, Manner(max_tokens, context, temperature, schema), seeds)
        return [found[number] for number in range(len(prompts))]


def encode_prompt(model: Model, prompt: Prompt) -> list[int]:
    """Token ids of a prompt as the GGUF's own template renders it: what train.py trained on."""
    text = render(template(model), prompt, add_generation_prompt=True, bos_token=model.bos, eos_token=model.eos)
    return encode(model, text)


def size(prompts: Sequence[list[int]], max_tokens: int, context: int, parallel: int) -> tuple[int, int]:
    """Sequences, and the cells that the longest of them need at once: far fewer than parallel · context as a rule."""
    sequences = max(1, min(parallel, len(prompts), MAX_SEQUENCES - 1))
    needs = sorted(
        (min(context, len(prompt) + max_tokens) for prompt in prompts if len(prompt) < context), reverse=True
    )
    return sequences, max(context, sum(needs[:sequences]))


def answer(
    engine: Engine,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int,
    context: int,
    temperature: float,
    seeds: Sequence[int],
) -> list[tuple[list[int], Finish]]:
    """Token ids written to each prompt, and how they end."""
    found: dict[int, tuple[list[int], Finish]] = {}

    def keep(number: int, written: list[int], finish: Finish) -> None:
        found[number] = (written, finish)

    answer_each(engine, prompts, keep, Manner(max_tokens, context, temperature), seeds)
    return [found[number] for number in range(len(prompts))]


def answer_each(
    engine: Engine,
    prompts: Sequence[list[int]],
    each: Each,
    manner: Manner,
    seeds: Sequence[int],
    begin: Callable[[int], bool] = always,
) -> None:
    """Give `each` every answer as soon as it is done, in whatever order they end.

    `begin` is asked when a prompt's turn has come; one that it refuses is left out. What either raises ends the work.
    The engine's last sequence holds the shared beginning.
    """
    fitting = [number for number, prompt in enumerate(prompts) if 0 < len(prompt) < manner.context]
    for number in sorted(set(range(len(prompts))) - set(fitting)):
        each(number, [], "too_long")
    shared = common([prompts[number] for number in fitting])
    slots, cells = list(range(engine.sequences - 1))[::-1], engine.cells - shared
    with samplers(engine.model, manner.temperature, seeds, manner.schema) as known:
        batch, queue = make_batch(engine.batch), deque(fitting)
        work = Work(engine, batch, prompts, manner, shared, known, queue, slots, cells, each, begin)
        prefill_shared(work)
        while work.queue or work.running:
            step(work)
    library().llama_memory_clear(engine.memory, False)


def common(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, one at least left over for each: its logits begin the answer."""
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)  # what the first and the last in order share, all between share
    same = next(
        (place for place, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]),
        min(len(low), len(high)),
    )
    return min(same, min(len(prompt) for prompt in prompts) - 1)


def prefill_shared(work: Work) -> None:
    """Decode the common beginning once, into the last sequence."""
    tokens = work.prompts[work.queue[0]][: work.shared] if work.shared else []
    for start in range(0, len(tokens), work.engine.batch):
        chunk = tokens[start : start + work.engine.batch]
        put(work.batch, 0, chunk, start, work.engine.sequences - 1)
        decode_batch(work.engine, work.batch, len(chunk))


def step(work: Work) -> None:
    """Let prompts join, decode one batch, draw a token for each sequence at its end, let the finished leave."""
    join(work)
    if not work.running:  # none of the prompts left was to be begun
        return
    drawing: list[tuple[Running, int]] = []
    count = 0
    for run in work.running:
        chunk = run.waiting[: work.engine.batch - count]
        if not chunk:
            break
        put(work.batch, count, chunk, run.position, run.slot)
        count += len(chunk)
        run.position += len(chunk)
        run.waiting = run.waiting[len(chunk) :]
        if not run.waiting:
            work.batch.logits[count - 1] = 1
            drawing.append((run, count - 1))
    decode_batch(work.engine, work.batch, count)
    for run, row in drawing:
        draw(work, run, row)


def join(work: Work) -> None:
    """Start the next prompts while there are sequences and cells for them. Those writing come first in a batch."""
    while work.queue and work.slots:
        number = work.queue[0]
        prompt = work.prompts[number]
        reserved = min(work.manner.context, len(prompt) + work.manner.max_tokens) - work.shared
        if reserved > work.free:
            return
        work.queue.popleft()
        if not work.begin(number):
            continue
        work.free -= reserved
        slot = work.slots.pop()
        if work.shared:
            library().llama_memory_seq_cp(work.engine.memory, work.engine.sequences - 1, slot, 0, work.shared)
        sampler = take(work.samplers, number)
        work.running.append(Running(number, slot, prompt[work.shared :], work.shared, reserved, sampler))


def draw(work: Work, run: Running, row: int) -> None:
    """The next token of an answer; a token that ends the turn is not part of it."""
    token = pick(work.engine, run.sampler, row)
    if token is None or is_end(work.engine.model, token):
        leave(work, run, "stop")
        return
    run.written.append(token)
    run.waiting = [token]
    if len(run.written) == work.manner.max_tokens or run.position + 1 >= work.manner.context:
        leave(work, run, "length")


def leave(work: Work, run: Running, finish: Finish) -> None:
    """Free the sequence, its sampler and its cells for the next prompt, and hand the answer over."""
    library().llama_memory_seq_rm(work.engine.memory, run.slot, -1, -1)
    work.running.remove(run)
    work.slots.append(run.slot)
    work.free += run.reserved
    drop(work.samplers, run.number)
    work.each(run.number, run.written, finish)


def logits(engine: Engine, tokens: Sequence[int]) -> Array:
    """What the model makes of a text at each of its tokens: float32 of shape (tokens, vocabulary)."""
    import numpy as np

    llama, batch = library(), make_batch(engine.batch)
    width = llama.llama_vocab_n_tokens(engine.model.vocab)
    llama.llama_memory_clear(engine.memory, False)
    rows = []
    for start in range(0, len(tokens), engine.batch):
        chunk = tokens[start : start + engine.batch]
        put(batch, 0, chunk, start, 0)
        batch.logits[: len(chunk)] = 1
        decode_batch(engine, batch, len(chunk))
        pointer = llama.llama_get_logits(engine.context)
        rows.append(np.ctypeslib.as_array(pointer, (len(chunk), width)).copy())
    return np.concatenate(rows)


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
    if len(tokens) == 1:
        batch.token[at], batch.pos[at], batch.seq[at] = tokens[0], position, slot
        return
    end = at + len(tokens)
    batch.token[at:end] = tokens
    batch.pos[at:end] = range(position, position + len(tokens))
    batch.seq[at:end] = slot


def decode_batch(engine: Engine, batch: Batch, count: int) -> None:
    """Run the model over the batch's first `count` rows; llama.h's codes other than 0 are no user's doing."""
    batch.view.n_tokens = count
    code = library().llama_decode(engine.context, batch.view)
    batch.logits[:count] = 0
    if code:
        raise failure(f"llama_decode gave {code}", engine.model.gguf, engine.model.advice.too_large)


def chat_stream(
    engine: Engine, messages: Sequence[Message], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[str]:
    """The answer to a conversation, piece by piece as it is written; each piece is whole characters.

    Uses the engine's first sequence from its beginning. TapirError when the conversation leaves no room for an answer.
    """
    model, prompt = engine.model, encode_prompt(engine.model, tuple(messages))
    if len(prompt) >= engine.cells:
        raise TapirError(
            f"the conversation has {len(prompt)} tokens, the context {engine.cells}", fix="Begin a new conversation."
        )
    llama = library()
    llama.llama_memory_clear(engine.memory, False)
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    manner = Manner(max_tokens, engine.cells, temperature)
    with samplers(model, temperature, [seed]) as known:
        queue, free = deque([0]), engine.cells
        work = Work(engine, make_batch(engine.batch), [prompt], manner, 0, known, queue, [0], free, ignored)
        join(work)
        run, seen = work.running[0], 0
        while work.running:
            step(work)
            text = "".join(characters.decode(piece(model, token)) for token in run.written[seen:])
            seen = len(run.written)
            if text:
                yield text
    if rest := characters.decode(b"", final=True):
        yield rest
