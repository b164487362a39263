"""The rows of the store's tables: calls, who used them, and attempts that brought none; and how each is inserted."""

import time
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Call:
    """A request and the answer that will serve it again.

    `request` is what keys.asked wrote and its SHA-256 the key; `answer` the body of the reply as it came. `kind` names
    the calls that look like this one (endpoint, model, stage): they share a sample. Prices are in the recipe's money.
    `estimated` is 1 where the server stated no credible token counts, and these are the most that it may have billed.
    """

    request: bytes
    answer: bytes
    finish: str
    kind: str
    model: str = ""
    fingerprint: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    price: float | None = None
    created: float = field(default_factory=time.time)
    estimated: int = 0


@dataclass(frozen=True, slots=True)
class Use:
    """Who asked for a call; `paid` is 1 where this use sent it."""

    run: str
    round: int
    stage: str
    row: str
    key: bytes
    paid: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """Something else than a usable answer came; `why` says whether an error, a refusal or an empty answer.

    Tokens and price are those that may have been billed for it, 0 where nothing was; `estimated` is 1 where they are
    the most that it can have been.
    """

    key: bytes
    run: str
    round: int
    stage: str
    row: str
    why: str
    answer: bytes = b""
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    price: float | None = None
    created: float = field(default_factory=time.time)
    estimated: int = 0


class InFlight(NamedTuple):
    """A request that is about to be sent: the attempt that stays in the store should its process die meanwhile."""

    attempt: Attempt


class Landed(NamedTuple):
    """The request of this attempt has ended, and what became of it is stored: the attempt is removed."""

    attempt: Attempt


# The rows as the tables have them. attrgetter is five times as fast as a dict of a record's fields.
CALL_VALUES = attrgetter(*(name for name in Call.__slots__ if name not in ("request", "answer", "kind")))
USE, ATTEMPT = attrgetter(*Use.__slots__), attrgetter(*Attempt.__slots__)
INSERT_CALL = (
    "insert or ignore into calls (id, key, sample, request, answer, finish, model, fingerprint, tokens_in, tokens_out,"
    " seconds, price, created, estimated) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
INSERT_USE = (
    f"insert into uses ({', '.join(Use.__slots__)}) values (?, ?, ?, ?, ?, ?)"
    " on conflict do update set paid = max(paid, excluded.paid) where excluded.paid > paid"
)
INSERT_ATTEMPT = (
    f"insert into attempts ({', '.join(Attempt.__slots__)}) values ({', '.join('?' * len(Attempt.__slots__))})"
)
