"""What a run may spend and has spent; a request goes only when the dearest answer to it still fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.recipe import Budget, Endpoint, Price

MILLION = 1_000_000
BATCH_DISCOUNT = 0.5  # of the Batch API, as its vendor has it
NOTHING = Price(input=0.0, output=0.0)
TEMPLATE = 16  # tokens that a chat template may add to each message, and to the whole


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


def price_of(endpoint: Endpoint) -> Price | None:
    """What a million tokens cost there: nothing on this machine, None where the recipe does not say."""
    if getattr(endpoint, "kind", "openai") in ("pocket", "gguf"):
        return NOTHING
    if endpoint.price and endpoint.batch:
        return Price(input=endpoint.price.input * BATCH_DISCOUNT, output=endpoint.price.output * BATCH_DISCOUNT)
    return endpoint.price


def money_of(price: Price | None, tokens_in: float, tokens_out: float) -> float | None:
    """The price of a call, None where it is unknown."""
    return None if price is None else (tokens_in * price.input + tokens_out * price.output) / MILLION


def dearest(body: Mapping[str, Any], price: Price | None) -> Cost:
    """More than which an answer to this body cannot cost: no token is shorter than a byte, no reply than max_tokens."""
    messages = body["messages"]
    tokens_in = sum(len(str(turn["content"]).encode()) + TEMPLATE for turn in messages) + TEMPLATE
    tokens_out = int(body.get("max_tokens") or body.get("max_completion_tokens") or 0)
    return Cost(1, tokens_in + tokens_out, money_of(price, tokens_in, tokens_out) or 0.0)


class Purse:
    """A run's budget: what was spent, and what the requests in flight may come to cost."""

    def __init__(self, budget: Budget, spent: Cost = NO_COST) -> None:
        self.budget, self.spent, self.held = budget, spent, NO_COST

    def hold(self, cost: Cost) -> bool:
        """Set a cost aside; False where the budget does not reach that far."""
        if over(self.budget, self.spent + self.held + cost):
            return False
        self.held = self.held + cost
        return True

    def owe(self, cost: Cost) -> None:
        """Set aside what was asked for before, whether there is room or not."""
        self.held = self.held + cost

    def free(self, held: Cost) -> None:
        """What was set aside may go to others."""
        self.held = self.held - held

    def spend(self, cost: Cost) -> None:
        """So much was spent."""
        self.spent = self.spent + cost

    @property
    def waiting(self) -> bool:
        """Whether requests in flight may yet turn out cheaper than was set aside for them."""
        return self.held.calls > 0

    def empty(self, where: str) -> TapirError:
        """The error that stops the run."""
        limits = self.budget.model_dump(exclude_none=True)
        told = ", ".join(f"{name} {getattr(self.spent, name):,.6g} of {limit:,.6g}" for name, limit in limits.items())
        return TapirError(
            f"the budget is spent ({told}); the next request might pass it",
            where=where,
            fix="Raise it (--set budget.calls=…, or in the recipe) and run the same command again: it goes on here.",
        )


def over(budget: Budget, cost: Cost) -> bool:
    """Whether a cost passes any of the limits."""
    pairs = ((budget.calls, cost.calls), (budget.tokens, cost.tokens), (budget.money, cost.money))
    return any(limit is not None and spent > limit for limit, spent in pairs)
