"""What a run may spend and has spent; a request goes only when the most that it can cost still fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Endpoint, Price
from tapir_local.recipe.schema import Budget

TOKENS_PER_PRICE = 1_000_000
BATCH_DISCOUNT = 0.5  # of the Batch API, as its vendor has it
FREE_PRICE = Price(input=0.0, output=0.0)
REPLY_LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")  # what a body may call the bound of a reply
REPLY_COUNT_FIELDS = ("n", "best_of")  # how many replies are generated for one request
FIELDS_COUNTED_SEPARATELY = frozenset({"messages", "model", *REPLY_LIMIT_FIELDS, *REPLY_COUNT_FIELDS})
NUMBER_TYPES = (int, float)
LIMIT_RAISE_FACTOR = 1.25  # of a limit that was met: the next one to propose
TEMPLATE_TOKENS = 16  # tokens that a chat template may add to each message, and to the whole


@dataclass(frozen=True, slots=True)
class Cost:
    """Calls, tokens of prompts and replies, and money; `money` counts only what has a price."""

    calls: int = 0
    tokens: int = 0
    money: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.calls + other.calls, self.tokens + other.tokens, self.money + other.money)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.calls - other.calls, self.tokens - other.tokens, self.money - other.money)


NO_COST = Cost()


def endpoint_price(endpoint: Endpoint) -> Price | None:
    """What a million tokens cost there: nothing on this machine, None where the recipe does not say."""
    if getattr(endpoint, "kind", "openai") in ("pocket", "gguf"):
        return FREE_PRICE
    if endpoint.price and endpoint.batch:
        return Price(input=endpoint.price.input * BATCH_DISCOUNT, output=endpoint.price.output * BATCH_DISCOUNT)
    return endpoint.price


def money_for_tokens(price: Price | None, tokens_in: float, tokens_out: float) -> float | None:
    """The price of a call, None where it is unknown."""
    return None if price is None else (tokens_in * price.input + tokens_out * price.output) / TOKENS_PER_PRICE


def max_request_tokens(body: Mapping[str, Any]) -> tuple[int, int]:
    """(prompt, reply) tokens that a request cannot exceed: no token is shorter than a byte, no reply than its bound.

    A schema, tools or the like are part of the prompt too. The second is 0 where the body sets no bound.
    """
    said = [str(turn["content"]).encode() for turn in body["messages"]]
    more = [
        orjson.dumps(value)
        for name, value in body.items()
        if name not in FIELDS_COUNTED_SEPARATELY and not isinstance(value, NUMBER_TYPES)
    ]
    tokens_in = sum(len(text) + TEMPLATE_TOKENS for text in said) + sum(map(len, more)) + TEMPLATE_TOKENS
    return tokens_in, max_reply_tokens(body) * max(1, *(positive_int(body.get(name)) for name in REPLY_COUNT_FIELDS))


def max_reply_tokens(body: Mapping[str, Any]) -> int:
    """The tokens that a body allows a reply, 0 where it names no bound."""
    return max(positive_int(body.get(name)) for name in REPLY_LIMIT_FIELDS)


def positive_int(value: Any) -> int:
    """A whole number above 0; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


class BudgetTracker:
    """A run's budget: what may have been billed, and what the requests in flight may come to cost.

    `estimated` is the part of `spent` that no server stated: the most that it may be. `beyond` holds, by endpoint and
    model, how far (prompt, reply) tokens went beyond what was thought to be a request's most; later requests reserve
    that much more. `warned` are the warnings that were given.
    """

    def __init__(self, budget: Budget, spent: Cost = NO_COST, estimated: Cost = NO_COST) -> None:
        self.budget, self.spent, self.estimated, self.reserved = budget, spent, estimated, NO_COST
        self.beyond: dict[str, tuple[int, int]] = {}
        self.warned: set[tuple[str, str]] = set()

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return bool(self.budget.model_dump(exclude_none=True))

    @property
    def needs_bound(self) -> bool:
        """Whether a reply's greatest length has to be known."""
        return self.budget.tokens is not None or self.budget.money is not None

    def reserve(self, cost: Cost) -> bool:
        """Set a request's greatest cost aside; False where the budget does not reach that far."""
        if exceeded_limits(self.budget, self.spent + self.reserved + cost):
            return False
        self.reserved = self.reserved + cost
        return True

    def reserve_anyway(self, cost: Cost) -> None:
        """Set aside what was asked for before, whether there is room or not."""
        self.reserved = self.reserved + cost

    def release(self, cost: Cost) -> None:
        """What was set aside may go to others."""
        left = self.reserved - cost
        self.reserved = left if left.calls else NO_COST  # without what rounding leaves

    def spend(self, cost: Cost, estimated: bool = False) -> None:
        """Count what may have been billed."""
        self.spent = self.spent + cost
        if estimated:
            self.estimated = self.estimated + cost

    @property
    def waiting(self) -> bool:
        """Whether requests in flight may yet turn out cheaper than was set aside for them."""
        return self.reserved.calls > 0

    def empty(self, where: str, cost: Cost) -> TapirError:
        """The error that stops the run before a request that may cost so much."""
        names = exceeded_limits(self.budget, self.spent + self.reserved + cost)
        return TapirError(
            f"the budget is spent: {', '.join(self.told(name, cost) for name in names)}",
            where=where,
            fix=f"Add {' '.join(self.raised(name, cost) for name in names)} to the same command: it goes on from here.",
        )

    def told(self, name: str, cost: Cost) -> str:
        """`money 0.0193 of 0.02 (0.004 of it estimated), and the next request may cost 0.0012`."""
        spent, guessed = getattr(self.spent, name), getattr(self.estimated, name)
        part = f" ({guessed:,.6g} of it for replies that never came or state no usage, at the most)" if guessed else ""
        held = getattr(self.reserved, name)
        wait = f", {held:,.6g} reserved for requests in flight" if held else ""
        limit = getattr(self.budget, name)
        return (
            f"{name} {spent:,.6g} of {limit:,.6g}{part}{wait}, and the next request may cost {getattr(cost, name):,.6g}"
        )

    def raised(self, name: str, cost: Cost) -> str:
        """`--set budget.money=0.04`: a limit that lets the run go on for a while."""
        needed = getattr(self.spent + self.reserved + cost, name)
        limit = max(needed, LIMIT_RAISE_FACTOR * getattr(self.budget, name))
        return f"--set budget.{name}={rounded_up(limit if name == 'money' else math.ceil(limit))}"


def exceeded_limits(budget: Budget, cost: Cost) -> list[str]:
    """The limits that a cost passes."""
    limits = budget.model_dump(exclude_none=True)
    return [name for name, limit in limits.items() if getattr(cost, name) > limit]


def round_up_to_two_digits(value: float) -> str:
    """A number not below this one, of two digits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1) if value > 0 else 1.0
    return f"{math.ceil(value / step * (1 - 1e-12)) * step:.12f}".rstrip("0").rstrip(".")
