"""What a reply's `usage` says that it took: tokens of the prompt, and of everything generated for it."""

from collections.abc import Mapping
from typing import Any

MOST = 10**9  # tokens; no request takes as many, so a larger count is a server's mistake


def counts_of(usage: Any) -> tuple[int, int]:
    """(prompt, generated) tokens; 0 for what is not stated, (0, 0) where a number cannot be true.

    Servers count hidden reasoning inside `completion_tokens`, beside it, or in `total_tokens` alone, and cached prompt
    tokens inside the prompt's or beside it. Where that cannot be told, the larger count is taken.
    """
    try:
        prompt = prompt_of(usage)
        written = max(number(usage, "completion_tokens"), number(usage, "output_tokens"))
        hidden = max(number(place, "reasoning_tokens") for place in parts_of(usage, "completion", "output"))
        total = number(usage, "total_tokens")
    except ValueError:
        return 0, 0
    outside = hidden > written or not total
    return prompt, max(written, total - prompt, written + hidden if outside else 0)


def prompt_of(usage: Any) -> int:
    """Tokens of a prompt, cached ones among them."""
    prompt, named = number(usage, "prompt_tokens"), number(usage, "input_tokens")
    split = number(usage, "prompt_cache_hit_tokens") + number(usage, "prompt_cache_miss_tokens")
    beside = number(usage, "cache_read_input_tokens") + number(usage, "cache_creation_input_tokens")
    stated = max(prompt, named + (beside if named and not prompt else 0), split)
    cached = max(number(place, "cached_tokens") for place in parts_of(usage, "prompt", "input"))
    return stated + cached if cached > stated else stated


def parts_of(usage: Any, *names: str) -> list[Any]:
    """A `usage` and its details of some name, where such numbers stand."""
    return [usage, *(usage.get(f"{name}_tokens_details") for name in names if isinstance(usage, Mapping))]


def number(place: Any, name: str) -> int:
    """A count, 0 where it is absent or null; ValueError where it is no number of tokens."""
    value = place.get(name) if isinstance(place, Mapping) else None
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST or value != int(value):
        raise ValueError(f"{name} is {value!r}")
    return int(value)
