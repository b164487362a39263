"""What the requests to one endpoint cost: the most before they go, and what may have been billed when they end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Budget
from tapir_local.records import Request, noop
from tapir_local.store.reply import Reply
from tapir_local.teacher.budget import NOTHING, Cost, Purse, money_of, most_tokens, price_of, reply_bound
from tapir_local.teacher.endpoint import body_of, identity_of, role_of

ENDED = ("stop", "length")  # finish reasons of replies for which something was generated


class Bill(NamedTuple):
    """Tokens and money of one request. `estimated`: the server stated none, and this is the most that it can be."""

    tokens_in: int
    tokens_out: int
    price: float | None
    estimated: bool = False

    @property
    def cost(self) -> Cost:
        """The same as a cost of one call."""
        return Cost(1, self.tokens_in + self.tokens_out, self.price or 0.0)


class Account:
    """The bills of an endpoint, counted against a run's budget. `warn` is told once of what makes them uncertain."""

    def __init__(self, endpoint: Endpoint, purse: Purse, warn: Callable[[str], None]) -> None:
        self.endpoint, self.purse, self.price = endpoint, purse, price_of(endpoint)
        self.name = " ".join(filter(None, (identity_of(endpoint), endpoint.model)))
        self.warn = warn

    @property
    def bills(self) -> bool:
        """Whether somebody else answers, who may bill it."""
        return self.price is not NOTHING

    def most(self, body: Mapping[str, Any]) -> Bill:
        """The most that a request can cost, and as much more as the endpoint has been seen to take."""
        tokens_in, tokens_out = most_tokens(body)
        more_in, more_out = self.purse.beyond.get(self.name, (0, 0))
        return self.priced(tokens_in + more_in, tokens_out + more_out, estimated=True)

    def priced(self, tokens_in: int, tokens_out: int, *, estimated: bool = False, discount: float = 1.0) -> Bill:
        """A bill at the endpoint's price."""
        price = money_of(self.price, discount * tokens_in, discount * tokens_out)
        return Bill(tokens_in, tokens_out, price, estimated)

    def reserve(self, body: Mapping[str, Any]) -> Bill | None:
        """The most that a request can cost, set aside; None where the budget has no room for it now."""
        bill = self.most(body)
        return bill if self.purse.reserve(bill.cost) else None

    def of_reply(self, body: Mapping[str, Any], reply: Reply, size: int, discount: float = 1.0) -> Bill:
        """What a reply of `size` bytes cost: by its own usage, or the most where it states none that can be true."""
        written = reply.tokens_out or not (reply.text or reply.finish in ENDED)
        if reply.tokens_in and written:
            self.compare(body, reply)
            return self.priced(reply.tokens_in, reply.tokens_out, discount=discount)
        most = self.most(body)
        tokens_out = max(reply.tokens_out, most.tokens_out or size)  # no token is shorter than a byte
        found = self.priced(reply.tokens_in or most.tokens_in, tokens_out, estimated=True, discount=discount)
        self.once(
            "usage",
            f"{self.name}: replies state no credible token counts; each is counted as the most that it may have taken, "
            f"such as {found.tokens_in:,} tokens of prompt and {found.tokens_out:,} of reply",
        )
        return found

    def compare(self, body: Mapping[str, Any], reply: Reply) -> None:
        """Where a reply took more than was thought possible, say so, and let later requests reserve more."""
        tokens_in, tokens_out = most_tokens(body)
        over = (reply.tokens_in - tokens_in, reply.tokens_out - tokens_out if tokens_out else 0)
        if max(over) <= 0:
            return
        known = self.purse.beyond.get(self.name, (0, 0))
        self.purse.beyond[self.name] = (max(known[0], over[0]), max(known[1], over[1]))
        if self.purse.limited:
            self.once(
                "beyond",
                f"{self.name}: a reply took {reply.tokens_in:,} tokens of prompt and {reply.tokens_out:,} of reply, "
                f"though {tokens_in:,} and {tokens_out:,} were thought to be the most; the requests in flight may pass "
                "the budget, and later ones reserve more",
            )

    def once(self, kind: str, text: str) -> None:
        """Warn of a kind of thing the first time in a run."""
        if (self.name, kind) not in self.purse.warned:
            self.purse.warned.add((self.name, kind))
            self.warn(text)

    def refuse_unbounded(self, body: Mapping[str, Any]) -> None:
        """TapirError where a budget of tokens or money has to know how long a reply can be, and nothing says so."""
        if not self.purse.needs_bound or reply_bound(body):
            return
        role = role_of(self.endpoint)
        raise TapirError(
            "a budget of tokens or money needs a bound of a reply's length, and the requests set none",
            where=f"{role}.extra",
            fix=f"Write a bound of a name that the endpoint takes, such as {role}: {{extra: {{max_tokens: null, "
            f"max_completion_tokens: {self.endpoint.max_tokens}}}}}, or use budget.calls alone.",
        )


def check_bounds(budget: Budget, *endpoints: Endpoint) -> None:
    """TapirError, before anything is asked, where an endpoint's replies have no bound that the budget needs."""
    for endpoint in endpoints:
        if getattr(endpoint, "kind", "openai") == "openai":
            account = Account(endpoint, Purse(budget), noop)
            account.refuse_unbounded(body_of(Request((), "", "", max_tokens=endpoint.max_tokens), endpoint))
