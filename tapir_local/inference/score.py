"""Log-probabilities that a GGUF gives to completions it is shown, many at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapir_local.data.quoting import ids_after
from tapir_local.errors import TapirError
from tapir_local.inference.batch import Batch, decode_batch, last_logits, make_batch
from tapir_local.inference.context_plan import open_first, planned_reading
from tapir_local.inference.generate import encode_prompt
from tapir_local.inference.lib import library
from tapir_local.inference.model import UBATCH, Engine, Model, open_model, template
from tapir_local.inference.tokens import encode, format_of
from tapir_local.records import Prompt, Scored

SEQUENCES = 64  # texts in the context at once
CELLS = 2048  # and tokens, where none is longer


@dataclass(frozen=True)
class Tokens:
    """Token ids of a text; those from `start` on are scored."""

    number: int
    ids: list[int]
    start: int


def ignored(found: Scored) -> None:
    """Nobody waits for single results."""


def score(
    gguf: Path,
    texts: Sequence[tuple[Prompt, str]],
    *,
    context: int,
    ids: Sequence[str] | None = None,
    adapter: Path | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    each: Callable[[Scored], None] = ignored,
) -> list[Scored]:
    """The log-probability (natural) of each completion after its prompt, with the token that ends the turn.

    Prompt and completion are tokenised as train.py does. In the order of `texts`; `ids` name them, or numbers do. A
    text longer than `context` tokens, or that the chat template cannot render, has 0 tokens. `each` is given every
    result as soon as it is there. TapirError when the GGUF or the adapter cannot be loaded, or memory has no room for
    the longest text.
    """
    names = [str(number) for number in range(len(texts))] if ids is None else list(ids)
    if not texts:
        return []
    found: dict[int, Scored] = {}

    def keep(some: Mapping[int, Scored]) -> None:
        found.update(some)
        for one in some.values():
            each(one)

    with open_model(gguf, adapter=adapter) as model:
        template(model)
        tokens = [tokens_or_none(model, number, *text) for number, text in enumerate(texts)]
        fitting = sorted((text for text in tokens if 0 < len(text.ids) <= context), key=lambda text: len(text.ids))
        wanted = {text.number for text in fitting}
        keep({text.number: Scored(names[text.number], 0.0, 0) for text in tokens if text.number not in wanted})
        longest = max((len(text.ids) for text in fitting), default=1)
        plans = [planned_reading(model, cells, SEQUENCES) for cells in (max(CELLS, longest), longest)]
        with open_first(model, plans, threads=threads, batch=UBATCH) as (engine, plan):
            batch = make_batch(engine.batch)
            for group in groups(fitting, plan.cells):
                values = score_group(engine, batch, group)
                sizes = {text.number: len(text.ids) - text.start for text in group}
                keep({number: Scored(names[number], value, sizes[number]) for number, value in values.items()})
                if progress:
                    progress(len(found), len(texts))
    return [found[number] for number in range(len(texts))]


def tokens_or_none(model: Model, number: int, prompt: Prompt, completion: str) -> Tokens:
    """A text's ids; none where the chat template cannot render it."""
    try:
        return tokens_of(model, number, prompt, completion)
    except TapirError:
        return Tokens(number, [], 0)


def tokens_of(model: Model, number: int, prompt: Prompt, completion: str) -> Tokens:
    """A text's ids: the prompt's, then what follows them in the ids of the whole, as in train.token_rows."""
    head = encode_prompt(model, prompt)
    asked, answer = format_of(model).answered(prompt, completion)
    joined = encode(model, asked + answer)
    after = ids_after(head, joined)
    tail = encode(model, answer) if after is None else after
    return Tokens(number, head + tail, len(head))


def groups(texts: Sequence[Tokens], cells: int) -> Iterator[list[Tokens]]:
    """Texts that fit into the context together."""
    group: list[Tokens] = []
    used = 0
    for text in texts:
        if group and (used + len(text.ids) > cells or len(group) == SEQUENCES):
            yield group
            group, used = [], 0
        group.append(text)
        used += len(text.ids)
    if group:
        yield group


def score_group(engine: Engine, batch: Batch, group: Sequence[Tokens]) -> dict[int, float]:
    """The log-probability of each text of a group, by its number; the last token of a text predicts nothing."""
    found = {text.number: 0.0 for text in group}
    asked: list[
        tuple[int, int]
    ] = []  # the token that each wanted row of the batch is to foretell, and the text's number
    library().llama_memory_clear(engine.memory, False)
    for slot, text in enumerate(group):
        start, end = 0, len(text.ids) - 1
        while start < end:
            chunk = text.ids[start : min(end, start + batch.room)]
            wanted = range(max(0, text.start - 1 - start), len(chunk))
            batch.add(chunk, start, slot, wanted)
            asked += [(text.ids[start + place + 1], text.number) for place in wanted]
            start += len(chunk)
            if not batch.room:
                read_scores(engine, batch, asked, found)
    read_scores(engine, batch, asked, found)
    return found


def read_scores(engine: Engine, batch: Batch, asked: list[tuple[int, int]], found: dict[int, float]) -> None:
    """Decode the batch, and add what each row of it gives to its text; both are empty afterwards."""
    import numpy as np

    if batch.room == batch.size:
        return
    decode_batch(engine, batch)
    for (_, number), value in zip(asked, logprobs(engine, np.array([token for token, _ in asked])), strict=True):
        found[number] += float(value)
    asked.clear()


def logprobs(engine: Engine, targets: Any) -> Any:
    """The log-probability of each target in the row of logits that the last decoding left for it."""
    import numpy as np

    if not len(targets):
        return targets
    rows = last_logits(engine, len(targets))
    top = rows.max(axis=1, keepdims=True)
    return rows[np.arange(len(targets)), targets] - top[:, 0] - np.log(np.exp(rows - top).sum(axis=1, dtype=np.float64))
