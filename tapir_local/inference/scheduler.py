"""Continuous batching: sequences join, read their prompts, write a token a step and leave, all in the same batches."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tapir_local.inference.batch import Batch, decode_batch, last_logits, make_batch, try_batch
from tapir_local.inference.context_plan import is_worth_sharing
from tapir_local.inference.lib import library, llama_error
from tapir_local.inference.model import Engine, Model
from tapir_local.inference.sampling import Sampler, Samplers, choose_tokens, drop, open_samplers, take
from tapir_local.inference.tokens import decode, is_end_token, token_bytes

Finish = Literal["stop", "length", "too_long"]
MAX_IDLE_GAP = (
    3  # idle sequences between two at work that are decoded along with them: one more part of a batch costs as much
)
MAX_IDLE_GAP_ON_GPU = 255  # where a part costs as much as reading all weights


@dataclass(frozen=True)
class Manner:
    """How answers are written. `context` is tokens of a prompt and its answer together, `schema` of JSON.

    An answer ends before the first of `stops` to appear in it.
    """

    max_tokens: int
    context: int
    temperature: float = 0.0
    schema: Mapping[str, Any] | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """The tokens of an answer and how it ends; `kept` is how many bytes of its text stand before a stop string."""

    tokens: list[int]
    finish: Finish
    kept: int | None = None

    def text(self, model: Model) -> str:
        return decode(model, self.tokens, self.kept)


OnAnswer = Callable[[int, Written], None]  # number of the prompt, its answer


@dataclass(eq=False)
class Running:
    """One answer in the making, in sequence `slot` of the context.

    `waiting` are the tokens not yet decoded: what is left of the prompt, later the token just drawn. `position` is
    where the first of them goes, `reserved` the cells the answer may come to fill, `tail` the text's last bytes.
    """

    number: int
    slot: int
    waiting: Sequence[int]
    position: int
    reserved: int
    sampler: Sampler
    written: list[int] = field(default_factory=list)
    tail: bytes = b""


def start_every(number: int) -> bool:
    """Every prompt is begun."""
    return True


def ignored(number: int, written: Written) -> None:
    """An answer that was read while it was written."""


@dataclass
class Scheduler:
    """A call of `answer_each`: what waits, what runs, what is free, and who is told.

    `most` is how many may run at once, lower than the slots once llama.cpp had no cells for them.
    """

    engine: Engine
    batch: Batch
    prompts: Sequence[list[int]]
    manner: Manner
    shared: int
    open_samplers: Samplers
    queue: deque[int]
    slots: list[int]
    free: int
    each: OnAnswer
    begin: Callable[[int], bool] = start_every
    running: list[Running] = field(default_factory=list)
    begun: set[int] = field(default_factory=set)
    most: int = 256


def prompt_fits(prompt: Sequence[int], manner: Manner) -> bool:
    """Whether a prompt leaves room for an answer."""
    return 0 < len(prompt) < manner.context


def cells_needed(prompt: Sequence[int], manner: Manner) -> int:
    """Cells that a prompt and its answer come to fill at the most."""
    return min(manner.context, len(prompt) + manner.max_tokens)


def answer_each(
    engine: Engine,
    prompts: Sequence[list[int]],
    each: OnAnswer,
    manner: Manner,
    seeds: Sequence[int],
    begin: Callable[[int], bool] = start_every,
) -> None:
    """Give `each` every answer as soon as it is done, in whatever order they end.

    `begin` is asked when a prompt's turn has come; one that it refuses is left out. What either raises ends the work.
    Where prompts begin alike, the engine's last sequence holds that beginning.
    """
    fitting = [number for number, prompt in enumerate(prompts) if prompt_fits(prompt, manner)]
    for number in sorted(set(range(len(prompts))) - set(fitting)):
        each(number, Written([], "too_long"))
    shared = common_prefix_length([prompts[number] for number in fitting])
    if not is_worth_sharing(shared, engine.split) or engine.sequences == 1:
        shared = 0
    slots, cells = list(range(engine.sequences - bool(shared)))[::-1], engine.cells - shared
    with open_samplers(engine.model, manner.temperature, seeds, manner.schema) as known:
        batch, queue = make_batch(engine.batch), deque(fitting)
        work = Scheduler(engine, batch, prompts, manner, shared, known, queue, slots, cells, each, begin)
        library().llama_memory_clear(engine.memory, False)
        prefill_shared(work)
        while work.queue or work.running:
            step(work)
    library().llama_memory_clear(engine.memory, False)


def common_prefix_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, one at least left over for each: its logits begin the answer."""
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)  # what the first and the last in order share, all between share
    same = next(
        (place for place, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]),
        min(len(low), len(high)),
    )
    return min(same, min(len(prompt) for prompt in prompts) - 1)


def prefill_shared(work: Scheduler) -> None:
    """Decode the common beginning once, into the last sequence."""
    tokens = work.prompts[work.queue[0]][: work.shared] if work.shared else []
    for start in range(0, len(tokens), work.engine.batch):
        chunk = tokens[start : start + work.engine.batch]
        work.batch.add(chunk, start, work.engine.sequences - 1)
        decode_batch(work.engine, work.batch)


def step(work: Scheduler) -> None:
    """Let prompts join, decode one batch, draw a token for each sequence at its end, let the finished leave."""
    join(work)
    if not work.running:  # none of the prompts left was to be begun
        return
    turns = in_turn(work)
    ready = fill(work, turns)
    if not try_batch(work.engine, work.batch):
        give_way(work)
        return
    for run, chunk in turns:
        run.position += len(chunk)
        run.waiting = run.waiting[len(chunk) :]
    if ready:
        tokens = choose_tokens(work.engine.model, [run.sampler for run in ready], last_logits(work.engine, len(ready)))
        for run, token in zip(ready, tokens, strict=True):
            go_on(work, run, token)


def in_turn(work: Scheduler) -> list[tuple[Running, Sequence[int]]]:
    """What each sequence gives to the batch: those writing a token, those that read as much as there is room for.

    llama.cpp computes split sequences together only if they follow one another, so there they are in order.
    """
    room, turns = work.batch.room, list[tuple[Running, Sequence[int]]]()
    for run in work.running:
        chunk = run.waiting[:room]
        if not chunk:
            break
        turns.append((run, chunk))
        room -= len(chunk)
    if work.engine.split:
        turns.sort(key=lambda turn: turn[0].slot)
    return turns


def fill(work: Scheduler, turns: Sequence[tuple[Running, Sequence[int]]]) -> list[Running]:
    """Put the turns into the batch; the sequences whose next token it tells, in the batch's order.

    Idle sequences get only rows that no turn needs.
    """
    ready, last = list[Running](), turns[0][0].slot
    spare = work.batch.room - sum(len(chunk) for _, chunk in turns)
    for run, chunk in turns:
        for idle in idle_between(work, last, run.slot, spare):
            work.batch.add(chunk[:1], 0, idle)
            spare -= 1
        last = run.slot
        whole = len(chunk) == len(run.waiting)
        if not work.batch.add(chunk, run.position, run.slot, (len(chunk) - 1,) if whole else ()):
            raise AssertionError("the turns were to fit into the batch")
        if whole:
            ready.append(run)
    return ready


def idle_between(work: Scheduler, last: int, slot: int, spare: int) -> range:
    """Empty sequences that are decoded with those at work, so that llama.cpp computes them in one piece.

    Each has one token in it, which nobody reads, and is emptied first. None where the gap is wide, as it costs more, or
    where the batch has no `spare` rows for it.
    """
    if not work.engine.split or slot - last <= 1:
        return range(0)
    gap = range(last + 1, slot)
    if len(gap) > min(spare, MAX_IDLE_GAP_ON_GPU if work.engine.model.on_gpu else MAX_IDLE_GAP):
        return range(0)
    for idle in gap:
        library().llama_memory_seq_rm(work.engine.memory, idle, -1, -1)
    return gap


def join(work: Scheduler) -> None:
    """Start the next prompts while there are sequences and cells for them. Those writing come first in a batch."""
    while work.queue and work.slots and len(work.running) < work.most:
        number = work.queue[0]
        prompt = work.prompts[number]
        reserved = cells_needed(prompt, work.manner) - work.shared
        if reserved > work.free and not work.engine.split:
            return
        work.queue.popleft()
        if number not in work.begun and not work.begin(number):
            continue
        work.begun.add(number)
        work.free -= reserved
        slot = work.slots.pop()
        library().llama_memory_seq_rm(work.engine.memory, slot, -1, -1)
        copy_shared(work, slot)
        sampler = take(work.samplers, number)
        work.running.append(Running(number, slot, prompt[work.shared :], work.shared, reserved, sampler))


def copy_shared(work: Scheduler, slot: int) -> None:
    """Let a sequence begin as all prompts do. Split cells can only be copied whole."""
    if work.shared:
        first, end = (-1, -1) if work.engine.split else (0, work.shared)
        library().llama_memory_seq_cp(work.engine.memory, work.engine.sequences - 1, slot, first, end)


def give_way(work: Scheduler) -> None:
    """There were no cells for the batch: the answer begun last is begun anew later, and fewer run from now on."""
    if len(work.running) == 1:
        model = work.engine.model
        raise llama_error(f"no room in the context of {work.engine.cells:,} tokens", model.gguf, model.advice.too_large)
    run = work.running[-1]
    free(work, run)
    work.queue.appendleft(run.number)
    work.most = len(work.running)


def go_on(work: Scheduler, run: Running, token: int | None) -> None:
    """Take the next token of an answer; one that ends the turn is not part of it."""
    if token is None or is_end_token(work.engine.model, token):
        leave(work, run, "stop")
        return
    run.written.append(token)
    run.waiting = (token,)
    kept = before_stop(work, run, token) if work.manner.stops else None
    if kept is not None:
        leave(work, run, "stop", kept)
    elif len(run.written) == work.manner.max_tokens or run.position + 1 >= work.manner.context:
        leave(work, run, "length")


def before_stop(work: Scheduler, run: Running, token: int) -> int | None:
    """How many bytes of the text stand before the first stop string, once a token has completed one.

    Only the last bytes are looked at, as many as a stop string that ends in this token can have.
    """
    model, stops = work.engine.model, [stop.encode() for stop in work.manner.stops]
    new = token_bytes(model, token)
    run.tail += new
    found = [place for stop in stops if (place := run.tail.find(stop)) >= 0]
    if found:
        return sum(len(token_bytes(model, token)) for token in run.written) - len(run.tail) + min(found)
    longest = max(map(len, stops)) - 1
    run.tail = run.tail[-longest:] if longest else b""
    return None


def leave(work: Scheduler, run: Running, finish: Finish, kept: int | None = None) -> None:
    """Free the sequence, its sampler and its cells for the next prompt, and hand the answer over."""
    free(work, run)
    work.each(run.number, Written(run.written, finish, kept))


def free(work: Scheduler, run: Running) -> None:
    library().llama_memory_seq_rm(work.engine.memory, run.slot, -1, -1)
    work.running.remove(run)
    work.slots.append(run.slot)
    work.free += run.reserved
    drop(work.samplers, run.number)
