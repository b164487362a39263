"""Many prompts to one GGUF: continuous batching on llama.cpp, so that a student answers a holdout in one go.

Batching and determinism. The same call gives the same answers, in the order of its prompts. In another order, or at
another number in flight, an answer stands beside others in llama.cpp's batches, whose arithmetic then rounds otherwise:
where two tokens' logits lie within that rounding (about 5e-3 with keys and values in 16 bits) the other may be taken,
and with it another end of the answer. `exact` does without: keys and values in 32 bits and no flash attention give the
same answers in any order and at any number in flight; one at a time (`parallel=1` and `exact`) is the plainest. On a
GPU kernels are chosen by the size of the batch, so there only one at a time is sure. An answer that is drawn has its
own seed, made of the call's and its id: what is drawn beside it counts for no more than that.
"""

import codecs
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.inference.batch import make_batch
from tapir_local.inference.context_plan import ContextPlan, open_planned_context
from tapir_local.inference.lib import library
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
    Manner,
    OnAnswer,
    Scheduler,
    Written,
    answer_each,
    cells_needed,
    common_prefix_length,
    ignored,
    join,
    prompt_fits,
    start_every,
    step,
)
from tapir_local.inference.tokens import chat_format, encode, token_bytes
from tapir_local.records import Completion, Message, Prompt


def generate(
    gguf: Path,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    context: int,
    parallel: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    adapter: Path | None = None,
    ids: Sequence[str] | None = None,
    threads: int | None = None,
    exact: bool = False,
    schema: Mapping[str, Any] | None = None,
    stops: Sequence[str] = (),
    advice: Advice = STUDENT_ADVICE,
    each: Callable[[Completion], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] = ignore_message,
    planned: Callable[[ContextPlan], None] | None = None,
) -> list[Completion]:
    """Answer every prompt, at most `parallel` at a time; results are in the order of `prompts`, with `ids` or numbers.

    `context` is tokens of a prompt and its answer together, the model's own at the most. `finish` is `stop` at any
    token that llama.cpp knows to end a turn and before the first of `stops` in the text, `length` at `max_tokens` or at
    the context's end, and with no text `too_long` where the prompt leaves no room for an answer, `refused` where the
    chat template cannot render it (`tell` is told why). Greedy at
    temperature 0; else each answer is drawn with its own seed, made of `seed` and its id. The same call gives the same
    answers; at another `parallel`, near ties may fall otherwise unless `exact` (slower). Without `parallel` as many are
    in flight as are of use and as free memory has room for; fewer where it is short, of which `tell` is told. `schema`
    holds every answer to the JSON that it describes, up to where `max_tokens` cuts it. `each` is given every answer as
    soon as it is done, `progress` is told (answers done, answers wanted), `planned` given the context's numbers before
    the first. TapirError when the GGUF or the adapter cannot be loaded, memory has no room for the weights or for a
    single answer, or nothing can be held to the schema.
    """
    names = prompt_ids(ids, len(prompts))
    if not prompts:
        return []
    with open_model(gguf, adapter=adapter, advice=advice, tell=tell) as model:
        tokens = encode_prompts(model, prompts, tell)
        manner = Manner(max_tokens, limit_context(model, context, tokens, tell), temperature, schema, tuple(stops))
        seeds = [random.Random(f"{seed}-generate-{name}").getrandbits(31) for name in names]
        found: dict[int, Completion] = {}
        answer_all(
            model,
            tokens,
            completion_collector(model, names, tokens, found, each, progress),
            manner,
            seeds,
            parallel=parallel,
            threads=threads,
            exact=exact,
            tell=tell,
            planned=planned,
        )
        return [found[number] for number in range(len(prompts))]


def prompt_ids(ids: Sequence[str] | None, prompts: int) -> list[str]:
    """An id for each prompt, its number where none are given."""
    names = [str(number) for number in range(prompts)] if ids is None else list(ids)
    if len(names) != prompts:
        raise TapirError(f"{len(names)} ids for {prompts} prompts", fix="Give one id for each prompt.")
    return names


def completion_collector(
    model: Model,
    names: Sequence[str],
    prompts: Sequence[list[int]],
    found: dict[int, Completion],
    each: Callable[[Completion], None] | None,
    progress: Callable[[int, int], None] | None,
) -> OnAnswer:
    """What takes every answer as it is done into `found`, and tells `each` and `progress`."""

    def keep(number: int, written: Written) -> None:
        finish = written.finish if prompts[number] else "refused"
        found[number] = Completion(names[number], written.text(model), finish, len(written.tokens))
        if each:
            each(found[number])
        if progress:
            progress(len(found), len(names))

    return keep


def encode_prompt(model: Model, prompt: Prompt) -> list[int]:
    """Token ids of a prompt as the GGUF's own template renders it: what train.py trained on.

    A system turn goes into the user's where the template has no system role. TapirError when the template refuses the
    prompt. A special token that the prompt quotes is text.
    """
    return encode(model, chat_format(model).asked(prompt))


def encode_prompts(
    model: Model, prompts: Sequence[Prompt], tell: Callable[[str], None] = ignore_message
) -> list[list[int]]:
    """Token ids of every prompt, none for one that the template refuses; `tell` is told how many these are and why."""
    found, refusals = list[list[int]](), list[str]()
    require_template(model)
    for prompt in prompts:
        try:
            found.append(encode_prompt(model, prompt))
        except TapirError as error:
            found.append([])
            refusals.append(error.what)
    if refusals:
        tell(f"prompts that cannot be asked: {len(refusals):,} of {len(prompts):,}; the first: {refusals[0]}")
    return found


def limit_context(
    model: Model, context: int, prompts: Sequence[list[int]], tell: Callable[[str], None] = ignore_message
) -> int:
    """The context, no longer than what the model was made for, beyond which it writes nonsense."""
    longest = trained_context(model)
    lost = sum(longest <= len(prompt) < context for prompt in prompts)
    if lost:
        tell(f"prompts longer than the {longest:,} tokens that the model was made for: {lost:,}")
    return min(context, longest)


def answer_all(
    model: Model,
    prompts: Sequence[list[int]],
    each: OnAnswer,
    manner: Manner,
    seeds: Sequence[int],
    *,
    parallel: int | None,
    threads: int | None = None,
    exact: bool = False,
    begin: Callable[[int], bool] = start_every,
    tell: Callable[[str], None] = ignore_message,
    planned: Callable[[ContextPlan], None] | None = None,
) -> None:
    """`answer_each` in a context as large as these prompts need and memory has room for."""
    fitting = [prompt for prompt in prompts if prompt_fits(prompt, manner)]
    needs = [cells_needed(prompt, manner) for prompt in fitting] or [1]
    with open_planned_context(
        model, needs, parallel=parallel, shared=common_prefix_length(fitting), threads=threads, exact=exact, tell=tell
    ) as (engine, plan):
        if planned:
            planned(plan)
        answer_each(engine, prompts, each, manner, seeds, begin)


def answer_tokens(
    engine: Engine,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int,
    context: int,
    temperature: float,
    seeds: Sequence[int],
) -> list[tuple[list[int], Finish]]:
    """Token ids written to each prompt, and how they end."""
    found: dict[int, Written] = {}
    answer_each(engine, prompts, found.__setitem__, Manner(max_tokens, context, temperature), seeds)
    return [(found[number].tokens, found[number].finish) for number in range(len(prompts))]


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
    with open_samplers(model, temperature, [seed]) as known:
        queue, free = deque([0]), engine.cells
        work = Scheduler(engine, make_batch(engine.batch), [prompt], manner, 0, known, queue, [0], free, ignored)
        join(work)
        run, seen = work.running[0], 0
        while work.running:
            step(work)
            text = "".join(characters.decode(token_bytes(model, token)) for token in run.written[seen:])
            seen = len(run.written)
            if text:
                yield text
    if rest := characters.decode(b"", final=True):
        yield rest
