"""Score completions: the log-probability that a GGUF gives to each, many at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tapir_local.data.special_tokens import ids_after
from tapir_local.errors import TapirError
from tapir_local.inference.batch import Batch, decode_batch, last_logits, make_batch
from tapir_local.inference.config import UBATCH
from tapir_local.inference.context_plan import open_first_fitting_context, plan_scoring_context
from tapir_local.inference.generate import Callbacks, encode_prompt
from tapir_local.inference.lib import library
from tapir_local.inference.model import Engine, Model, open_model, require_template
from tapir_local.inference.tokens import chat_format, encode
from tapir_local.records import Array, Prompt, Scored

MAX_TEXTS = 64  # texts in the context at once
USUAL_CELLS = 2048  # tokens in the context, unless a text is longer
NO_CALLBACKS = Callbacks[Scored]()


@dataclass(frozen=True)
class ScoredText:
    """Token ids of a text; those from `start` on are scored."""

    number: int
    ids: list[int]
    start: int


class ScoreCollector:
    """Collects the results by the text's number, and calls the callbacks; `names` are the results' ids."""

    def __init__(self, names: Sequence[str], callbacks: Callbacks[Scored]) -> None:
        self.names, self.callbacks = names, callbacks
        self.found: dict[int, Scored] = {}

    def add(self, texts: Sequence[ScoredText], logprobs: Mapping[int, float]) -> None:
        """Add the results of some texts; a text without a log-probability has 0 tokens."""
        for text in texts:
            tokens = len(text.ids) - text.start if text.number in logprobs else 0
            self.found[text.number] = Scored(self.names[text.number], logprobs.get(text.number, 0.0), tokens)
        if self.callbacks.result:
            for text in texts:
                self.callbacks.result(self.found[text.number])

    def report(self) -> None:
        """Call the progress callback."""
        if self.callbacks.progress:
            self.callbacks.progress(len(self.found), len(self.names))


def score_completions(
    gguf: Path,
    texts: Sequence[tuple[Prompt, str]],
    *,
    context: int,
    ids: Sequence[str] | None = None,
    adapter: Path | None = None,
    callbacks: Callbacks[Scored] = NO_CALLBACKS,
) -> list[Scored]:
    """The natural log-probability of each completion after its prompt, including the token that ends the turn.

    Prompt and completion are tokenized as train.py does it. Results are in the order of `texts`, named by `ids` or by
    their number. A text longer than `context` tokens, or that the chat template cannot render, has 0 tokens. TapirError
    if the GGUF or the adapter cannot be loaded, or memory is too small for the longest text.
    """
    collector = ScoreCollector([str(n) for n in range(len(texts))] if ids is None else list(ids), callbacks)
    if not texts:
        return []
    with open_model(gguf, adapter=adapter) as model:
        require_template(model)
        tokens = [text_to_score_or_empty(model, number, *text) for number, text in enumerate(texts)]
        fitting = sorted((text for text in tokens if 0 < len(text.ids) <= context), key=lambda text: len(text.ids))
        numbers = {text.number for text in fitting}
        collector.add([text for text in tokens if text.number not in numbers], {})
        score_texts(model, fitting, collector)
    return [collector.found[number] for number in range(len(texts))]


def score_texts(model: Model, texts: Sequence[ScoredText], collector: ScoreCollector) -> None:
    """Score texts that fit into the context, the shortest first."""
    longest = max((len(text.ids) for text in texts), default=1)
    plans = [plan_scoring_context(model, cells, MAX_TEXTS) for cells in (max(USUAL_CELLS, longest), longest)]
    with open_first_fitting_context(model, plans, batch=UBATCH) as (engine, plan):
        batch = make_batch(engine.batch)
        for group in group_texts(texts, plan.cells):
            collector.add(group, score_group(engine, batch, group))
            collector.report()


def text_to_score_or_empty(model: Model, number: int, prompt: Prompt, completion: str) -> ScoredText:
    """As `text_to_score`; without ids if the chat template cannot render the text."""
    try:
        return text_to_score(model, number, prompt, completion)
    except TapirError:
        return ScoredText(number, [], 0)


def text_to_score(model: Model, number: int, prompt: Prompt, completion: str) -> ScoredText:
    """The ids of a prompt, and those that follow them in the ids of the whole text, as in train.token_rows."""
    head = encode_prompt(model, prompt)
    asked, answer = chat_format(model).answered(prompt, completion)
    joined = encode(model, asked + answer)
    after = ids_after(head, joined)
    tail = encode(model, answer) if after is None else after
    return ScoredText(number, head + tail, len(head))


def group_texts(texts: Sequence[ScoredText], cells: int) -> Iterator[list[ScoredText]]:
    """Groups of texts that fit into the context together."""
    group: list[ScoredText] = []
    used = 0
    for text in texts:
        if group and (used + len(text.ids) > cells or len(group) == MAX_TEXTS):
            yield group
            group, used = [], 0
        group.append(text)
        used += len(text.ids)
    if group:
        yield group


def score_group(engine: Engine, batch: Batch, group: Sequence[ScoredText]) -> dict[int, float]:
    """The log-probability of each text of a group, by its number; the last token of a text predicts nothing."""
    found = {text.number: 0.0 for text in group}
    targets: list[tuple[int, int]] = []  # for each wanted row of the batch, the token it predicts and its text's number
    library().llama_memory_clear(engine.memory, False)
    for slot, text in enumerate(group):
        start, end = 0, len(text.ids) - 1
        while start < end:
            chunk = text.ids[start : min(end, start + batch.free_rows)]
            wanted = range(max(0, text.start - 1 - start), len(chunk))
            batch.add(chunk, start, slot, wanted)
            targets += [(text.ids[start + place + 1], text.number) for place in wanted]
            start += len(chunk)
            if not batch.free_rows:
                add_scores(engine, batch, targets, found)
    add_scores(engine, batch, targets, found)
    return found


def add_scores(engine: Engine, batch: Batch, targets: list[tuple[int, int]], found: dict[int, float]) -> None:
    """Decode the batch, and add the log-probability of each target to its text; batch and targets are then empty."""
    import numpy as np

    if batch.free_rows == batch.size:
        return
    decode_batch(engine, batch)
    tokens = np.array([token for token, _ in targets])
    for (_, number), value in zip(targets, target_logprobs(engine, tokens), strict=True):
        found[number] += float(value)
    targets.clear()


def target_logprobs(engine: Engine, targets: Array) -> Array:
    """The log-probability of each target token in its row of the last decoding's logits."""
    import numpy as np

    if not len(targets):
        return targets
    rows = last_logits(engine, len(targets))
    top = rows.max(axis=1, keepdims=True)
    return rows[np.arange(len(targets)), targets] - top[:, 0] - np.log(np.exp(rows - top).sum(axis=1, dtype=np.float64))
