"""What a run may spend and has spent; a request is sent only if its worst-case cost still fits the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from tapir_local.errors import TapirError
from tapir_local.printable import format_count
from tapir_local.recipe.endpoints import Endpoint, Price
from tapir_local.recipe.schema import Budget
from tapir_local.records import Request, noop
from tapir_local.store.reply import Reply
from tapir_local.teacher.endpoint import endpoint_identity, endpoint_role, request_body

TOKENS_PER_PRICE = 1_000_000
BATCH_DISCOUNT = 0.5  # share of the price that OpenAI's Batch API costs
FREE_PRICE = Price(input=0.0, output=0.0)
REPLY_LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")  # names of a request's limit on its reply
REPLY_COUNT_FIELDS = ("n", "best_of")  # how many replies are generated for one request
FIELDS_COUNTED_SEPARATELY = frozenset({"messages", "model", *REPLY_LIMIT_FIELDS, *REPLY_COUNT_FIELDS})
NUMBER_TYPES = (int, float)
LIMIT_RAISE_FACTOR = 1.25  # of an exceeded limit: the next one that a message proposes
TEMPLATE_TOKENS = 16  # that a chat template may add to each message, and to the whole prompt
GENERATED_FINISHES = ("stop", "length")  # finish reasons of replies for which tokens were generated


@dataclass(frozen=True, slots=True)
class Cost:
    """Calls, tokens of prompts and replies, and money; `money` counts only calls with a known price."""

    calls: int = 0
    tokens: int = 0
    money: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.calls + other.calls, self.tokens + other.tokens, self.money + other.money)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.calls - other.calls, self.tokens - other.tokens, self.money - other.money)


NO_COST = Cost()


def endpoint_price(endpoint: Endpoint) -> Price | None:
    """The price per million tokens: zero for what runs on this machine, None if the recipe does not state one."""
    if getattr(endpoint, "kind", "openai") in ("pocket", "gguf"):
        return FREE_PRICE
    if endpoint.price and endpoint.batch:
        return Price(input=endpoint.price.input * BATCH_DISCOUNT, output=endpoint.price.output * BATCH_DISCOUNT)
    return endpoint.price


def money_for_tokens(price: Price | None, tokens_in: float, tokens_out: float) -> float | None:
    """What a call costs in money, None if the price is unknown."""
    return None if price is None else (tokens_in * price.input + tokens_out * price.output) / TOKENS_PER_PRICE


def max_request_tokens(body: Mapping[str, Any]) -> tuple[int, int]:
    """The (prompt, reply) tokens that a request cannot exceed.

    No token is shorter than a byte, and no reply longer than its limit. A schema, tools and similar fields count as
    part of the prompt. The second number is 0 if the body sets no limit on the reply.
    """
    contents = [str(turn["content"]).encode() for turn in body["messages"]]
    others = [value for name, value in body.items() if name not in FIELDS_COUNTED_SEPARATELY]
    others = [orjson.dumps(value) for value in others if not isinstance(value, NUMBER_TYPES)]
    tokens_in = sum(len(text) + TEMPLATE_TOKENS for text in contents) + sum(map(len, others)) + TEMPLATE_TOKENS
    return tokens_in, max_reply_tokens(body) * max(1, *(positive_int(body.get(name)) for name in REPLY_COUNT_FIELDS))


def max_reply_tokens(body: Mapping[str, Any]) -> int:
    """The tokens that a body allows a reply, 0 if it sets no limit."""
    return max(positive_int(body.get(name)) for name in REPLY_LIMIT_FIELDS)


def positive_int(value: Any) -> int:
    """The value if it is a whole number above 0, otherwise 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


class BudgetTracker:
    """A run's budget: its limits, what may have been billed, and what requests in flight may still cost.

    `estimated` is the part of `spent` that no server stated; it is counted at its maximum. `excess` holds, per endpoint
    and model, by how many (prompt, reply) tokens a reply exceeded the computed maximum of its request; later requests
    reserve that much more. `warned` holds the warnings given so far.
    """

    def __init__(self, limits: Budget, spent: Cost = NO_COST, estimated: Cost = NO_COST) -> None:
        self.limits, self.spent, self.estimated, self.reserved = limits, spent, estimated, NO_COST
        self.excess: dict[str, tuple[int, int]] = {}
        self.warned: set[tuple[str, str]] = set()

    @property
    def has_limits(self) -> bool:
        """Whether any limit is set."""
        return bool(self.limits.model_dump(exclude_none=True))

    @property
    def needs_reply_limit(self) -> bool:
        """Whether the maximum length of a reply must be known."""
        return self.limits.tokens is not None or self.limits.money is not None

    @property
    def has_reservations(self) -> bool:
        """Whether requests in flight may still cost less than was reserved for them."""
        return self.reserved.calls > 0

    def reserve(self, cost: Cost) -> bool:
        """Reserve a request's maximum cost; False if it does not fit the budget."""
        if exceeded_limits(self.limits, self.spent + self.reserved + cost):
            return False
        self.reserved = self.reserved + cost
        return True

    def reserve_anyway(self, cost: Cost) -> None:
        """Reserve for a request that was sent before, whether it fits the budget or not."""
        self.reserved = self.reserved + cost

    def release(self, cost: Cost) -> None:
        """Make a reserved amount available to other requests."""
        left = self.reserved - cost
        self.reserved = left if left.calls else NO_COST  # drops rounding errors

    def spend(self, cost: Cost, estimated: bool = False) -> None:
        """Count what may have been billed."""
        self.spent = self.spent + cost
        if estimated:
            self.estimated = self.estimated + cost

    def exhausted_error(self, where: str, cost: Cost) -> TapirError:
        """The error that stops the run before a request that may cost `cost`."""
        names = exceeded_limits(self.limits, self.spent + self.reserved + cost)
        settings = " ".join(self.larger_limit(name, cost) for name in names)
        return TapirError(
            f"the budget is spent: {', '.join(self.describe_limit(name, cost) for name in names)}",
            where=where,
            fix=f"Add {settings} to the same command; it resumes from here.",
        )

    def describe_limit(self, name: str, cost: Cost) -> str:
        """`money 0.0193 of 0.02 (0.004 of it estimated), and the next request may cost 0.0012`."""
        spent, estimated = getattr(self.spent, name), getattr(self.estimated, name)
        part = (
            f" ({estimated:,.6g} of it estimated, for lost replies and those without token counts)" if estimated else ""
        )
        reserved = getattr(self.reserved, name)
        wait = f", {reserved:,.6g} reserved for requests in flight" if reserved else ""
        limit = getattr(self.limits, name)
        return (
            f"{name} {spent:,.6g} of {limit:,.6g}{part}{wait}, and the next request may cost {getattr(cost, name):,.6g}"
        )

    def larger_limit(self, name: str, cost: Cost) -> str:
        """`--set budget.money=0.04`: a limit that lets the run continue for a while."""
        needed = getattr(self.spent + self.reserved + cost, name)
        limit = max(needed, LIMIT_RAISE_FACTOR * getattr(self.limits, name))
        return f"--set budget.{name}={round_up_to_two_digits(limit if name == 'money' else math.ceil(limit))}"


def exceeded_limits(limits: Budget, cost: Cost) -> list[str]:
    """The names of the limits that a cost exceeds."""
    return [name for name, limit in limits.model_dump(exclude_none=True).items() if getattr(cost, name) > limit]


def round_up_to_two_digits(value: float) -> str:
    """The value rounded up to two significant digits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1) if value > 0 else 1.0
    return f"{math.ceil(value / step * (1 - 1e-12)) * step:.12f}".rstrip("0").rstrip(".")


class Bill(NamedTuple):
    """Tokens and money of one request. `estimated`: the server stated none, and this is the maximum."""

    tokens_in: int
    tokens_out: int
    price: float | None
    estimated: bool = False

    @property
    def cost(self) -> Cost:
        """The same as the cost of one call."""
        return Cost(1, self.tokens_in + self.tokens_out, self.price or 0.0)


class EndpointBilling:
    """Computes the bills of one endpoint for a run's budget. `warn` is called once for each cause of uncertainty."""

    def __init__(self, endpoint: Endpoint, budget: BudgetTracker, warn: Callable[[str], None]) -> None:
        self.endpoint, self.budget, self.price = endpoint, budget, endpoint_price(endpoint)
        self.name = " ".join(filter(None, (endpoint_identity(endpoint), endpoint.model)))
        self.warn = warn

    @property
    def is_billed(self) -> bool:
        """Whether a remote server answers, which may bill for it."""
        return self.price is not FREE_PRICE

    def worst_case(self, body: Mapping[str, Any]) -> Bill:
        """The maximum that a request can cost, plus the excess that this endpoint has shown."""
        tokens_in, tokens_out = max_request_tokens(body)
        more_in, more_out = self.budget.excess.get(self.name, (0, 0))
        return self.bill_for(tokens_in + more_in, tokens_out + more_out, estimated=True)

    def bill_for(self, tokens_in: int, tokens_out: int, *, estimated: bool = False, discount: float = 1.0) -> Bill:
        """A bill at the endpoint's price."""
        price = money_for_tokens(self.price, discount * tokens_in, discount * tokens_out)
        return Bill(tokens_in, tokens_out, price, estimated)

    def reserve(self, body: Mapping[str, Any]) -> Bill | None:
        """Reserve the maximum that a request can cost; None if it does not fit the budget now."""
        bill = self.worst_case(body)
        return bill if self.budget.reserve(bill.cost) else None

    def bill_for_reply(self, body: Mapping[str, Any], reply: Reply, size: int, discount: float = 1.0) -> Bill:
        """What a reply of `size` bytes cost: by its stated usage, or the maximum if that cannot be true."""
        written = reply.tokens_out or not (reply.text or reply.finish in GENERATED_FINISHES)
        if reply.tokens_in and written:
            self.record_excess(body, reply)
            return self.bill_for(reply.tokens_in, reply.tokens_out, discount=discount)
        most = self.worst_case(body)
        tokens_out = max(reply.tokens_out, most.tokens_out or size)  # no token is shorter than a byte
        found = self.bill_for(reply.tokens_in or most.tokens_in, tokens_out, estimated=True, discount=discount)
        self.warn_once(
            "usage",
            f"{self.name}: replies state no credible token counts; each is counted at its maximum, "
            f"for example {format_count(found.tokens_in, 'token')} of prompt and {found.tokens_out:,} of reply",
        )
        return found

    def record_excess(self, body: Mapping[str, Any], reply: Reply) -> None:
        """If a reply took more than the computed maximum, warn, and let later requests reserve more."""
        tokens_in, tokens_out = max_request_tokens(body)
        over = (reply.tokens_in - tokens_in, reply.tokens_out - tokens_out if tokens_out else 0)
        if max(over) <= 0:
            return
        known = self.budget.excess.get(self.name, (0, 0))
        self.budget.excess[self.name] = (max(known[0], over[0]), max(known[1], over[1]))
        if self.budget.has_limits:
            self.warn_once(
                "beyond",
                f"{self.name}: a reply took {format_count(reply.tokens_in, 'token')} of prompt "
                f"and {reply.tokens_out:,} of reply; the expected maximum was {tokens_in:,} and {tokens_out:,}. "
                "The requests in flight may exceed the budget; later ones reserve more",
            )

    def warn_once(self, kind: str, text: str) -> None:
        """Warn only once per run for each kind of warning."""
        if (self.name, kind) not in self.budget.warned:
            self.budget.warned.add((self.name, kind))
            self.warn(text)

    def require_reply_limit(self, body: Mapping[str, Any]) -> None:
        """Raise TapirError if the budget needs a limit on the reply's length and the request sets none."""
        if not self.budget.needs_reply_limit or max_reply_tokens(body):
            return
        role = endpoint_role(self.endpoint)
        raise TapirError(
            "a budget of tokens or money needs a limit on the length of a reply, and the requests set none",
            where=f"{role}.extra",
            fix=f"Set the limit under a name that the endpoint accepts, such as {role}: {{extra: {{max_tokens: null, "
            f"max_completion_tokens: {self.endpoint.max_tokens}}}}}, or use budget.calls alone.",
        )


def check_reply_limits(budget: Budget, *endpoints: Endpoint) -> None:
    """Raise TapirError, before anything is asked, if an endpoint's replies have no limit that the budget needs."""
    for endpoint in endpoints:
        if getattr(endpoint, "kind", "openai") == "openai":
            billing = EndpointBilling(endpoint, BudgetTracker(budget), noop)
            billing.require_reply_limit(request_body(Request((), "", "", max_tokens=endpoint.max_tokens), endpoint))
