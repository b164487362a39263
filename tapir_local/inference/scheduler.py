"""Continuous batching: sequences join, read their prompts, write one token per step, and leave, in the same batches."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tapir_local.inference.batch import decode_batch, full_context_error, make_batch, try_batch
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.context_plan import is_worth_sharing
from tapir_local.inference.lib import library
from tapir_local.inference.model import Engine, Model
from tapir_local.inference.sampling import Sampler, Samplers, next_tokens, open_samplers
from tapir_local.inference.tokens import decode, is_end_token, token_bytes

Finish = Literal["stop", "length", "too_long"]
# Idle sequences between two active ones are decoded too, so that llama.cpp computes all in one piece. Two pieces cost
# as much more as about 3 rows on a CPU; on a GPU, as reading all weights again.
MAX_IDLE_GAP, MAX_IDLE_GAP_ON_GPU = 3, 255


@dataclass(frozen=True)
class Written:
    """The tokens of an answer and how it ends; `kept` is the number of bytes of its text before a stop string."""

    tokens: list[int]
    finish: Finish
    kept: int | None = None

    def text(self, model: Model) -> str:
        """The text of the answer, up to the stop string."""
        return decode(model, self.tokens, self.kept)


OnAnswer = Callable[[int, Written], None]  # called with the number of the prompt and its answer


@dataclass(eq=False)
class Running:
    """One answer in progress, in sequence `slot` of the context.

    `waiting` are the tokens not yet decoded: the rest of the prompt, later the token just chosen. `position` is where
    the first of them goes, `reserved` the number of cells the answer may fill, `tail` the last bytes of its text.
    """

    number: int
    slot: int
    waiting: Sequence[int]
    position: int
    reserved: int
    sampler: Sampler
    written: list[int] = field(default_factory=list)
    tail: bytes = b""


Turn = tuple[Running, Sequence[int]]  # an answer, and the tokens of it that go into the next batch


def start_every(number: int) -> bool:
    """A `may_start` that starts every prompt."""
    return True


def ignore_answer(number: int, written: Written) -> None:
    """An `OnAnswer` for a caller that reads the answer while it is written."""


def prompt_fits(prompt: Sequence[int], config: GenerationConfig) -> bool:
    """Whether the context has cells for a prompt and at least one token of an answer."""
    return 0 < len(prompt) < config.context


def cells_needed(prompt: Sequence[int], config: GenerationConfig) -> int:
    """The maximum number of cells that a prompt and its answer fill."""
    return min(config.context, len(prompt) + config.max_tokens)


def common_prefix_length(prompts: Sequence[list[int]]) -> int:
    """The number of tokens that all prompts start with, less than any prompt's length.

    At least one token per prompt is left, because its logits give the first token of the answer.
    """
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)  # in sorted order, all prompts share what the first and the last share
    same = next(
        (place for place, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]),
        min(len(low), len(high)),
    )
    return min(same, min(len(prompt) for prompt in prompts) - 1)


def answer_each(
    engine: Engine,
    prompts: Sequence[list[int]],
    on_answer: OnAnswer,
    config: GenerationConfig,
    seeds: Sequence[int],
    may_start: Callable[[int], bool] = start_every,
) -> None:
    """Call `on_answer` with every answer as soon as it is complete, in the order in which they end.

    `may_start` is called with a prompt's number when its turn comes; a prompt that it refuses is left out. An exception
    of either ends the work. If the prompts have a common prefix, the engine's last sequence may hold it.
    """
    for number, prompt in enumerate(prompts):
        if not prompt_fits(prompt, config):
            on_answer(number, Written([], "too_long"))
    with open_samplers(engine.model, config.temperature, seeds, config.schema) as samplers:
        Scheduler(engine, prompts, config, samplers, on_answer, may_start).run()
    library().llama_memory_clear(engine.memory, False)


class Scheduler:
    """Answers prompts by continuous batching in the engine's context.

    `queue` has the numbers of the prompts not yet started, `running` the answers in progress, `free_slots` the unused
    sequences and `free_cells` the number of cells that no answer has reserved. `max_running` limits the answers in
    progress; it is lowered when llama.cpp finds no cells for a batch. The first `shared` tokens of every prompt are
    held in the engine's last sequence. Prompts that do not fit into the context are left out.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[list[int]],
        config: GenerationConfig,
        samplers: Samplers,
        on_answer: OnAnswer,
        may_start: Callable[[int], bool] = start_every,
    ) -> None:
        self.engine, self.prompts, self.config, self.samplers = engine, prompts, config, samplers
        self.on_answer, self.may_start = on_answer, may_start
        self.queue = deque(number for number, prompt in enumerate(prompts) if prompt_fits(prompt, config))
        self.shared = self.choose_shared()
        self.batch = make_batch(engine.batch)
        self.free_slots = list(range(engine.sequences - bool(self.shared)))[::-1]
        self.free_cells = engine.cells - self.shared
        self.running: list[Running] = []
        self.started: set[int] = set()
        self.max_running = engine.sequences

    def choose_shared(self) -> int:
        """The length of the common prefix to compute once; 0 if it is not worth a sequence of its own."""
        shared = common_prefix_length([self.prompts[number] for number in self.queue])
        return shared if is_worth_sharing(shared, self.engine.split) and self.engine.sequences > 1 else 0

    @property
    def unfinished(self) -> bool:
        """Whether prompts are waiting or answers are in progress."""
        return bool(self.queue or self.running)

    def run(self) -> None:
        """Answer all prompts."""
        self.prefill_shared()
        while self.unfinished:
            self.step()

    def prefill_shared(self) -> None:
        """Clear the context, and decode the common prefix into the last sequence."""
        library().llama_memory_clear(self.engine.memory, False)
        tokens = self.prompts[self.queue[0]][: self.shared] if self.shared else []
        for start in range(0, len(tokens), self.engine.batch):
            chunk = tokens[start : start + self.engine.batch]
            self.batch.add(chunk, start, self.engine.sequences - 1)
            decode_batch(self.engine, self.batch)

    def step(self) -> None:
        """Start prompts, decode one batch, choose a token for each sequence that is ready, and end finished answers."""
        self.start_prompts()
        if not self.running:  # `may_start` refused all prompts that were left
            return
        turns = self.next_turns()
        ready = self.fill_batch(turns)
        if not try_batch(self.engine, self.batch):
            self.make_way()
            return
        for run, chunk in turns:
            run.position += len(chunk)
            run.waiting = run.waiting[len(chunk) :]
        if ready:
            tokens = next_tokens(self.engine, [run.sampler for run in ready])
            for run, token in zip(ready, tokens, strict=True):
                self.append_token(run, token)

    def start_prompts(self) -> None:
        """Start the next prompts while there are sequences and cells for them.

        Answers that already write come first in a batch.
        """
        while self.queue and self.free_slots and len(self.running) < self.max_running:
            number = self.queue[0]
            prompt = self.prompts[number]
            reserved = cells_needed(prompt, self.config) - self.shared
            if reserved > self.free_cells and not self.engine.split:
                return
            self.queue.popleft()
            if number not in self.started and not self.may_start(number):
                continue
            self.started.add(number)
            self.free_cells -= reserved
            slot = self.free_slots.pop()
            library().llama_memory_seq_rm(self.engine.memory, slot, -1, -1)
            self.copy_shared(slot)
            sampler = self.samplers.start(number)
            self.running.append(Running(number, slot, prompt[self.shared :], self.shared, reserved, sampler))

    def copy_shared(self, slot: int) -> None:
        """Copy the common prefix into a sequence. Split cells can only be copied as a whole."""
        if self.shared:
            first, end = (-1, -1) if self.engine.split else (0, self.shared)
            library().llama_memory_seq_cp(self.engine.memory, self.engine.sequences - 1, slot, first, end)

    def next_turns(self) -> list[Turn]:
        """The tokens of each answer for the next batch: one if it writes, as many as fit if it reads its prompt.

        llama.cpp computes split sequences together only if their numbers follow one another, so these are sorted.
        """
        free_rows, turns = self.batch.free_rows, list[Turn]()
        for run in self.running:
            chunk = run.waiting[:free_rows]
            if not chunk:
                break
            turns.append((run, chunk))
            free_rows -= len(chunk)
        if self.engine.split:
            turns.sort(key=lambda turn: turn[0].slot)
        return turns

    def fill_batch(self, turns: Sequence[Turn]) -> list[Running]:
        """Put the turns into the batch; the answers whose next token it gives, in the batch's order.

        Idle sequences get only rows that no turn needs.
        """
        ready, last = list[Running](), turns[0][0].slot
        spare = self.batch.free_rows - sum(len(chunk) for _, chunk in turns)
        for run, chunk in turns:
            for idle in self.clear_idle_between(last, run.slot, spare):
                self.batch.add(chunk[:1], 0, idle)
                spare -= 1
            last = run.slot
            whole = len(chunk) == len(run.waiting)
            self.batch.add(chunk, run.position, run.slot, (len(chunk) - 1,) if whole else ())
            if whole:
                ready.append(run)
        if self.engine.split:
            self.batch.interleave()
            ready.sort(key=lambda run: len(run.waiting))
        return ready

    def clear_idle_between(self, last: int, slot: int, spare: int) -> range:
        """Empty the idle sequences between two active ones, which are decoded too; see MAX_IDLE_GAP.

        Each gets one token, whose result is not used. No sequences if the gap is so wide that it costs more, or wider
        than the `spare` rows of the batch.
        """
        if not self.engine.split or slot - last <= 1:
            return range(0)
        gap = range(last + 1, slot)
        if len(gap) > min(spare, MAX_IDLE_GAP_ON_GPU if self.engine.model.on_gpu else MAX_IDLE_GAP):
            return range(0)
        for idle in gap:
            library().llama_memory_seq_rm(self.engine.memory, idle, -1, -1)
        return gap

    def make_way(self) -> None:
        """After a batch found no cells: put the answer started last back into the queue, and run fewer from now on."""
        if len(self.running) == 1:
            raise full_context_error(self.engine)
        run = self.running[-1]
        self.release(run)
        self.queue.appendleft(run.number)
        self.max_running = len(self.running)

    def append_token(self, run: Running, token: int | None) -> None:
        """Add the next token to an answer; one that ends the turn is not part of the answer."""
        if token is None or is_end_token(self.engine.model, token):
            self.finish(run, "stop")
            return
        run.written.append(token)
        run.waiting = (token,)
        kept = self.bytes_before_stop(run, token) if self.config.stops else None
        if kept is not None:
            self.finish(run, "stop", kept)
        elif len(run.written) == self.config.max_tokens or run.position + 1 >= self.config.context:
            self.finish(run, "length")

    def bytes_before_stop(self, run: Running, token: int) -> int | None:
        """The number of bytes of the text before the first stop string; None if no token has completed one.

        Only the last bytes are searched, as many as a stop string that ends in this token can have.
        """
        model, stops = self.engine.model, [stop.encode() for stop in self.config.stops]
        run.tail += token_bytes(model, token)
        found = [place for stop in stops if (place := run.tail.find(stop)) >= 0]
        if found:
            return sum(len(token_bytes(model, one)) for one in run.written) - len(run.tail) + min(found)
        longest = max(map(len, stops)) - 1
        run.tail = run.tail[-longest:] if longest else b""
        return None

    def finish(self, run: Running, finish: Finish, kept: int | None = None) -> None:
        """Free what the answer held, and hand it over."""
        self.release(run)
        self.on_answer(run.number, Written(run.written, finish, kept))

    def release(self, run: Running) -> None:
        """Free the sequence, the cells and the sampler of an answer for the next prompt."""
        library().llama_memory_seq_rm(self.engine.memory, run.slot, -1, -1)
        self.running.remove(run)
        self.free_slots.append(run.slot)
        self.free_cells += run.reserved
        self.samplers.end(run.number)
