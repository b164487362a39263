"""Settings of a generation and of the llama.cpp context that it runs in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UBATCH, BATCH = 512, 2048  # tokens computed at once, and handed over at once: llama-batched-bench's


@dataclass(frozen=True)
class GenerationConfig:
    """How prompts are answered.

    `max_tokens` limits an answer, `context` a prompt and its answer together, both in tokens. At `temperature` 0 the
    likeliest token is taken; otherwise one is drawn, with a seed made of `seed` and the answer's id. `schema` is a JSON
    schema that every answer must match. An answer ends before the first of `stops` that appears in it.

    `parallel` is the maximum number of answers in progress at once; None chooses it (see context_plan). `threads` is
    None for all cores. `exact` makes answers independent of what else is in the batch; it takes about twice as long.
    `on_device` is for tests and benches: whether the device chooses likeliest tokens, None if that is faster.
    """

    max_tokens: int
    context: int
    temperature: float = 0.0
    seed: int = 0
    schema: Mapping[str, Any] | None = None
    stops: tuple[str, ...] = ()
    parallel: int | None = None
    threads: int | None = None
    exact: bool = False
    on_device: bool | None = None

    @property
    def greedy(self) -> bool:
        """Whether each answer takes the likeliest tokens, with no schema."""
        return self.temperature <= 0 and self.schema is None


@dataclass(frozen=True)
class ContextConfig:
    """A llama.cpp context of `cells` tokens for `sequences` conversations; see `open_context`.

    With `split`, each sequence has its own part of the cells. `exact` keeps keys and values in 32 bits, without flash
    attention; without `flash` there is none either (see uses_flash_attention). `threads` is None for all cores; `batch`
    is the maximum number of tokens per call. With `on_device`, only the likeliest token of each sequence can be read,
    not its logits (see device_choice).
    """

    cells: int
    sequences: int = 1
    split: bool = False
    exact: bool = False
    threads: int | None = None
    batch: int = BATCH
    on_device: bool = False
    flash: bool = True
