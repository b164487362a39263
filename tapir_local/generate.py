"""Many prompts to one GGUF: continuous batching on llama.cpp, so that a student answers a holdout in one go."""

import codecs
import ctypes
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tapir_local.errors import TapirError
from tapir_local.llama import (
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
from tapir_local.template import render

Array = Any  # numpy.ndarray; numpy is imported where it is used
Finish = Literal["stop", "length", "too_long"]
MAX_SEQUENCES = 256  # llama.cpp's LLAMA_MAX_SEQ


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
    sampler: Any
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


@dataclass
class Work:
    """A call of `answer`: what waits, what runs, what is free, what is done."""

    engine: Engine
    batch: Batch
    prompts: Sequence[list[int]]
    max_tokens: int
    context: int
    shared: int
    sampler_of: Callable[[int], Any]
    queue: deque[int]
    slots: list[int]
    free: int
    running: list[Running] = field(default_factory=list)
    done: dict[int, tuple[list[int], Finish]] = field(default_factory=dict)


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
    progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Answer every prompt, `parallel` at a time; results are in the order of `prompts`, their ids `ids` or numbers.

    `context` is tokens of a prompt and its answer together. `finish` is `stop` at any token that llama.cpp knows to end
    a turn, `length` at `max_tokens` or at the context's end, and `too_long`, with no text, where the prompt leaves no
    room for an answer. Greedy at temperature 0; else each answer is drawn with its own seed, made of `seed` and its id.
    The same call gives the same answers; at another `parallel`, near ties may fall otherwise unless `exact` (slower).
    `progress` is told (answers done, answers wanted). TapirError when the GGUF or the adapter cannot be loaded.
    """
    names = [str(number) for number in range(len(prompts))] if ids is None else list(ids)
    if len(names) != len(prompts):
        raise TapirError(f"{len(names)} ids for {len(prompts)} prompts", fix="Give one id for each prompt.")
    if not prompts:
        return []
    with open_model(gguf, adapter=adapter) as model:
        tokens = [encode_prompt(model, prompt) for prompt in prompts]
        seeds = [random.Random(f"{seed}-generate-{name}").getrandbits(31) for name in names]
        sequences, cells = size(tokens, max_tokens, context, parallel)
        with open_context(model, cells=cells, sequences=sequences + 1, threads=threads, exact=exact) as engine:
            answers = answer(
                engine,
                tokens,
                max_tokens=max_tokens,
                context=context,
                temperature=temperature,
                seeds=seeds,
                progress=progress,
            )
        return [
            Completion(name, decode(model, written), finish, len(written))
            for name, (written, finish) in zip(names, answers, strict=True)
        ]


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
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[list[int], Finish]]:
    """Token ids written to each prompt, and how they end. The engine's last sequence holds the shared beginning."""
    fitting = [number for number, prompt in enumerate(prompts) if 0 < len(prompt) < context]
    shared = common([prompts[number] for number in fitting])
    with samplers(temperature, seeds) as sampler_of:
        work = Work(
            engine,
            make_batch(engine.batch),
            prompts,
            max_tokens,
            context,
            shared,
            sampler_of,
            deque(fitting),
            [],
            engine.cells - shared,
        )
        work.slots = list(range(engine.sequences - 1))[::-1]
        work.done = {number: ([], "too_long") for number in range(len(prompts)) if number not in set(fitting)}
        prefill_shared(work)
        while work.queue or work.running:
            before = len(work.done)
            step(work)
            if progress and len(work.done) > before:
                progress(len(work.done), len(prompts))
    library().llama_memory_clear(engine.memory, False)
    return [work.done[number] for number in range(len(prompts))]


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
        reserved = min(work.context, len(prompt) + work.max_tokens) - work.shared
        if reserved > work.free:
            return
        work.queue.popleft()
        work.free -= reserved
        slot = work.slots.pop()
        if work.shared:
            library().llama_memory_seq_cp(work.engine.memory, work.engine.sequences - 1, slot, 0, work.shared)
        work.running.append(
            Running(number, slot, prompt[work.shared :], work.shared, reserved, work.sampler_of(number))
        )


def draw(work: Work, run: Running, row: int) -> None:
    """The next token of an answer; a token that ends the turn is not part of it."""
    llama = library()
    token = llama.llama_sampler_sample(run.sampler, work.engine.context, row)
    if is_end(work.engine.model, token):
        leave(work, run, "stop")
        return
    run.written.append(token)
    run.waiting = [token]
    if len(run.written) == work.max_tokens or run.position + 1 >= work.context:
        leave(work, run, "length")


def leave(work: Work, run: Running, finish: Finish) -> None:
    """Free the sequence and its cells for the next prompt."""
    library().llama_memory_seq_rm(work.engine.memory, run.slot, -1, -1)
    work.running.remove(run)
    work.slots.append(run.slot)
    work.free += run.reserved
    work.done[run.number] = (run.written, finish)


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
        raise failure(f"llama_decode gave {code}", engine.model.gguf, "Set student.parallel lower and run again.")


@contextmanager
def samplers(temperature: float, seeds: Sequence[int]) -> Iterator[Callable[[int], Any]]:
    """A sampler chain for the answer of a number: one for all when greedy, one each when drawn."""
    llama = library()
    chains: dict[int, Any] = {}

    def chain_of(number: int) -> Any:
        key = number if temperature > 0 else -1
        if key not in chains:
            chains[key] = make_sampler(temperature, seeds[number])
        return chains[key]

    try:
        yield chain_of
    finally:
        for chain in chains.values():
            llama.llama_sampler_free(chain)


def make_sampler(temperature: float, seed: int) -> Any:
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
    with samplers(temperature, [seed]) as sampler_of:
        batch, cells = make_batch(engine.batch), engine.cells
        work = Work(engine, batch, [prompt], max_tokens, cells, 0, sampler_of, deque([0]), [0], cells)
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
