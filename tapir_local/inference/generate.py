"""Answer many prompts with one GGUF, by continuous batching on llama.cpp.

Batching and determinism. The same call gives the same answers, in the order of its prompts. If the order or the number
of answers in progress changes, an answer shares llama.cpp's batches with other answers, and their arithmetic rounds
differently. If two tokens' logits are within that rounding (about 5e-3 with keys and values in 16 bits), the other
token may be taken, and the answer may continue differently. `exact` avoids this: with keys and values in 32 bits and
without flash attention, answers are the same in any order and at any number in progress. On a GPU, kernels are chosen
by the size of the batch, so only one answer at a time (`parallel=1` and `exact`) is sure there. With a temperature,
each answer is drawn with its own seed, made of the call's seed and its id, whatever else is drawn in the same batch.
"""

import codecs
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from tapir_local.errors import TapirError
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.context_plan import ContextPlan, open_planned_context
from tapir_local.inference.model import (
    STUDENT_ADVICE,
    Advice,
    Engine,
    Model,
    ignore_message,
    open_model,
    require_template,
    trained_context,
)
from tapir_local.inference.sampling import open_samplers
from tapir_local.inference.scheduler import (
    Finish,
    OnAnswer,
    Scheduler,
    Written,
    answer_each,
    cells_needed,
    common_prefix_length,
    ignore_answer,
    prompt_fits,
)
from tapir_local.inference.tokens import chat_format, encode, token_bytes
from tapir_local.printable import format_count
from tapir_local.records import Completion, Message, Prompt

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Callbacks(Generic[ResultT]):
    """Functions to call while prompts are answered or texts scored; None for those that are not wanted.

    `result` gets every result as soon as it is there, `progress` gets (results so far, results wanted), `warn` gets
    messages for people, and `plan` gets the context plan before the first result.
    """

    result: Callable[[ResultT], None] | None = None
    progress: Callable[[int, int], None] | None = None
    warn: Callable[[str], None] = ignore_message
    plan: Callable[[ContextPlan], None] | None = None


SILENT = Callbacks[Completion]()


@dataclass(frozen=True)
class PromptGroup:
    """Prompts that are answered with the same settings; with a temperature, each is drawn with its own seed."""

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    config: GenerationConfig


@dataclass(frozen=True)
class PromptReply:
    """An answer to a prompt, with the numbers of tokens of both.

    `finish` is a Completion's. `refusal` says why the chat template cannot render the prompt; it is then `refused`.
    """

    text: str
    finish: Literal["stop", "length", "too_long", "refused"]
    tokens: int
    prompt_tokens: int
    refusal: str = ""


@dataclass(frozen=True)
class ReplyHooks:
    """Functions to call while groups of prompts are answered. Prompts are numbered across the groups.

    `opened` is called with the length of the longest text that the model was trained for, `may_start` before a prompt
    is begun, which it can refuse, and `reply` with each answer as it ends. An exception of any of them ends the work.
    """

    opened: Callable[[int], None]
    may_start: Callable[[int], bool]
    reply: Callable[[int, PromptReply], None]
    warn: Callable[[str], None] = ignore_message


def generate(
    gguf: Path,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    adapter: Path | None = None,
    ids: Sequence[str] | None = None,
    callbacks: Callbacks[Completion] = SILENT,
) -> list[Completion]:
    """Answer every prompt with a GGUF, which is opened and closed again; see `complete_prompts`.

    TapirError if the GGUF or the adapter cannot be loaded, or memory is too small for the weights.
    """
    names = prompt_ids(ids, len(prompts))
    if not prompts:
        return []
    with open_model(gguf, adapter=adapter, warn=callbacks.warn) as model:
        return complete_prompts(model, prompts, config, names, callbacks)


def complete_prompts(
    model: Model,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    ids: Sequence[str],
    callbacks: Callbacks[Completion] = SILENT,
) -> list[Completion]:
    """Answer every prompt; results are in the order of `prompts` and carry their `ids`.

    The context is limited to the model's own. `finish` is `stop` at any token that llama.cpp knows to end a turn and
    before a stop string, and `length` at `max_tokens` or at the end of the context. Without a text it is `too_long` if
    the prompt leaves no cells for an answer, and `refused` if the chat template cannot render the prompt; a warning
    says why. A warning is also given if memory is too short for `config.parallel` answers at once.

    TapirError if memory is too small for a single answer, or no grammar can be made of the schema.
    """
    tokens = encode_prompts(model, prompts, callbacks.warn)
    config = replace(config, context=limit_context(model, config.context, tokens, callbacks.warn))
    seeds = [random.Random(f"{config.seed}-generate-{id}").getrandbits(31) for id in ids]
    found: dict[int, Completion] = {}
    collect = completion_collector(model, ids, tokens, found, callbacks)
    with open_context_for(model, tokens, config, callbacks.warn) as (engine, plan):
        if callbacks.plan:
            callbacks.plan(plan)
        answer_each(engine, tokens, collect, config, seeds)
    return [found[number] for number in range(len(prompts))]


def reply_to_groups(
    gguf: Path, groups: Sequence[PromptGroup], hooks: ReplyHooks, advice: Advice = STUDENT_ADVICE
) -> None:
    """Answer groups of prompts with a GGUF, which is opened once; the context is limited to the model's own.

    TapirError as by `complete_prompts`, or if the GGUF has no chat template, or cannot be loaded.
    """
    with open_model(gguf, advice=advice, warn=hooks.warn) as model:
        hooks.opened(trained_context(model))
        require_template(model)
        first = 0
        for group in groups:
            config = replace(group.config, context=min(group.config.context, trained_context(model)))
            reply_to_group(model, replace(group, config=config), first, hooks)
            first += len(group.prompts)


def reply_to_group(model: Model, group: PromptGroup, first: int, hooks: ReplyHooks) -> None:
    """Answer the prompts of a group, which are numbered from `first`."""
    tokens = encode_prompts(model, group.prompts, hooks.warn)

    def collect(number: int, written: Written) -> None:
        refusal = "" if tokens[number] else template_refusal(model, group.prompts[number])
        finish = "refused" if refusal else written.finish
        counts = (len(written.tokens), len(tokens[number]))
        hooks.reply(first + number, PromptReply(written.text(model), finish, *counts, refusal))

    def may_start(number: int) -> bool:
        return hooks.may_start(first + number)

    with open_context_for(model, tokens, group.config, hooks.warn) as (engine, _):
        answer_each(engine, tokens, collect, group.config, group.seeds, may_start)


def template_refusal(model: Model, prompt: Prompt) -> str:
    """Why the chat template refuses a prompt."""
    try:
        encode_prompt(model, prompt)
    except TapirError as error:
        return error.what
    return "the chat template renders nothing"


def prompt_ids(ids: Sequence[str] | None, prompts: int) -> list[str]:
    """An id for each prompt, its number if no ids are given. TapirError if their number is another."""
    names = [str(number) for number in range(prompts)] if ids is None else list(ids)
    if len(names) != prompts:
        raise TapirError(
            f"{format_count(len(names), 'id')} for {format_count(prompts, 'prompt')}",
            fix="Give one id for each prompt.",
        )
    return names


def completion_collector(
    model: Model,
    ids: Sequence[str],
    prompts: Sequence[list[int]],
    found: dict[int, Completion],
    callbacks: Callbacks[Completion],
) -> OnAnswer:
    """A function that stores every answer in `found` as it ends, and calls the callbacks."""

    def collect(number: int, written: Written) -> None:
        finish = written.finish if prompts[number] else "refused"
        found[number] = Completion(ids[number], written.text(model), finish, len(written.tokens))
        if callbacks.result:
            callbacks.result(found[number])
        if callbacks.progress:
            callbacks.progress(len(found), len(ids))

    return collect


def encode_prompt(model: Model, prompt: Prompt) -> list[int]:
    """Token ids of a prompt rendered with the GGUF's own chat template, as train.py renders it.

    A system turn becomes part of the user's turn if the template has no system role. A special token that the prompt
    quotes is plain text. TapirError if the template refuses the prompt.
    """
    return encode(model, chat_format(model).asked(prompt))


def encode_prompts(
    model: Model, prompts: Sequence[Prompt], warn: Callable[[str], None] = ignore_message
) -> list[list[int]]:
    """Token ids of every prompt; none for one that the template refuses, and `warn` gets their number and a reason."""
    found, refusals = list[list[int]](), list[str]()
    require_template(model)
    for prompt in prompts:
        try:
            found.append(encode_prompt(model, prompt))
        except TapirError as error:
            found.append([])
            refusals.append(error.what)
    if refusals:
        warn(f"prompts that cannot be asked: {len(refusals):,} of {len(prompts):,}; the first: {refusals[0]}")
    return found


def limit_context(
    model: Model, context: int, prompts: Sequence[list[int]], warn: Callable[[str], None] = ignore_message
) -> int:
    """The context, limited to what the model was trained for: beyond that it writes nonsense."""
    longest = trained_context(model)
    lost = sum(longest <= len(prompt) < context for prompt in prompts)
    if lost:
        warn(f"prompts longer than the {longest:,} tokens that the model was made for: {lost:,}")
    return min(context, longest)


@contextmanager
def open_context_for(
    model: Model,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    warn: Callable[[str], None] = ignore_message,
) -> Iterator[tuple[Engine, ContextPlan]]:
    """A context as large as these prompts and their answers need and memory allows."""
    fitting = [prompt for prompt in prompts if prompt_fits(prompt, config)]
    needs = [cells_needed(prompt, config) for prompt in fitting] or [1]
    with open_planned_context(model, needs, config, shared=common_prefix_length(fitting), warn=warn) as opened:
        yield opened


def answer_tokens(
    engine: Engine, prompts: Sequence[list[int]], config: GenerationConfig, seeds: Sequence[int]
) -> list[tuple[list[int], Finish]]:
    """The token ids written after each prompt, and how the answer ends."""
    found: dict[int, Written] = {}
    answer_each(engine, prompts, found.__setitem__, config, seeds)
    return [(found[number].tokens, found[number].finish) for number in range(len(prompts))]


def chat_stream(
    engine: Engine, messages: Sequence[Message], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[str]:
    """The answer to a conversation, piece by piece as it is written; each piece is whole characters.

    Clears the engine's context. TapirError if the conversation leaves no cells for an answer.
    """
    model, prompt = engine.model, encode_prompt(engine.model, tuple(messages))
    if len(prompt) >= engine.cells:
        raise TapirError(
            f"the conversation has {format_count(len(prompt), 'token')}, the context {engine.cells}",
            fix="Begin a new conversation.",
        )
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    config = GenerationConfig(max_tokens, engine.cells, temperature)
    with open_samplers(model, temperature, [seed]) as samplers:
        scheduler = Scheduler(engine, [prompt], config, samplers, ignore_answer)
        scheduler.prefill_shared()
        scheduler.start_prompts()
        run, seen = scheduler.running[0], 0
        while scheduler.unfinished:
            scheduler.step()
            text = "".join(characters.decode(token_bytes(model, token)) for token in run.written[seen:])
            seen = len(run.written)
            if text:
                yield text
    if rest := characters.decode(b"", final=True):
        yield rest
