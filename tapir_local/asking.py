"""One call of `ask`: what the store has, what is still to be asked, and what is kept of each reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tapir_local import keys
from tapir_local.budget import NO_COST, Cost, Purse, dearest, money_of, price_of
from tapir_local.endpoint import body_of, identity_of, role_of
from tapir_local.errors import TapirError
from tapir_local.giving_up import Outcomes
from tapir_local.recipe import Budget, Endpoint
from tapir_local.records import Answer, Request
from tapir_local.refusals import RERUN, Trouble
from tapir_local.replies import Reading, Reply, read_reply
from tapir_local.store import Store
from tapir_local.storerows import Attempt, Call, Use

if TYPE_CHECKING:
    from concurrent.futures import Future

LOOKED_UP = 1000  # requests, until progress is told

Progress = Callable[[int, int, int], None]


@dataclass(slots=True)
class Job:
    """A request to be sent once, for every place among the requests where it stands. `dearest` is what it may cost."""

    request: Request
    key: bytes
    text: bytes
    body: Mapping[str, Any]
    places: list[int]
    tries: int = 0
    refusals: int = 0  # answers of 429
    dearest: Cost = NO_COST


def quiet(done: int, total: int, hits: int) -> None:
    """No progress shown."""


def unheard(text: str) -> None:
    """No warning shown."""


class Asking:
    """The requests of one call of `ask`, the answers known so far, and the way of a reply into the store."""

    def __init__(
        self,
        requests: Sequence[Request],
        endpoint: Endpoint,
        store: Store,
        run: str,
        progress: Progress = quiet,
        purse: Purse | None = None,
        warn: Callable[[str], None] = unheard,
    ) -> None:
        self.requests, self.endpoint, self.store, self.run = requests, endpoint, store, run
        self.progress, self.warn = progress, warn
        self.purse, self.price = purse or Purse(Budget()), price_of(endpoint)
        self.identity = identity_of(endpoint)
        self.answers: list[Answer | None] = [None] * len(requests)
        self.finished = self.hits = 0
        self.served: dict[str, list[tuple[str, str]]] = {}
        self.outcomes = Outcomes(self.whole_before, self.answered_ever)

    def look_up(self) -> list[Job]:
        """Serve the hits; the jobs for the rest, one for requests that are the same."""
        jobs: dict[bytes, Job] = {}
        uses: list[Use] = []
        for start in range(0, len(self.requests), LOOKED_UP):
            some = [self.job(place) for place in range(start, min(start + LOOKED_UP, len(self.requests)))]
            known = self.store.get_many([job.key for job in some])
            for job in some:
                raw = known.get(job.key)
                if raw is not None:
                    reply = self.read(job.body, raw)
                    self.outcomes.hit(reply)
                    self.serve(job.places[0], job.key, reply, hit=True)
                    uses.append(self.use(job.places[0], job.key))
                elif job.key in jobs:
                    jobs[job.key].places += job.places
                else:
                    jobs[job.key] = self.missing(job)
            self.progress(self.finished, len(self.requests), self.hits)
        self.store.used(uses)
        return list(jobs.values())

    def job(self, place: int) -> Job:
        """What is asked by the request at `place`."""
        request = self.requests[place]
        body = body_of(request, self.endpoint)
        text = keys.asked(self.identity, body, request.draw)
        return Job(request, keys.key_of(text), text, body, [place])

    def missing(self, job: Job) -> Job:
        """A job that the store has no answer to, to be sent; TapirError where nothing may be."""
        if self.store.mode == "replay":
            raise self.store.missing(job.text, job.request.stage, job.request.row)
        job.dearest = dearest(job.body, self.price)
        return job

    def serve(self, place: int, key: bytes, reply: Reply, hit: bool) -> None:
        """The answer to the request at `place`."""
        tokens = (reply.tokens_in, reply.tokens_out)
        self.answers[place] = Answer(reply.text, reply.finish, hit, *tokens, key.hex(), reply.why)
        self.finished += 1
        self.hits += hit

    def read(self, body: Mapping[str, Any], raw: bytes) -> Reply:
        """A reply to this body as text, with or without what the model thought aloud; ValueError where it is none."""
        endpoint = self.endpoint
        return read_reply(raw, Reading(endpoint.thinking, room_in(body), role_of(endpoint)))

    def use(self, place: int, key: bytes, paid: bool = False) -> Use:
        """The record that this run's row used a call."""
        request = self.requests[place]
        return Use(self.run, request.round, request.stage, request.row, key, int(paid))

    def keep(self, job: Job, raw: bytes, reply: Reply, seconds: float, discount: float = 1.0) -> Future[None] | None:
        """Into the store: among the calls if it may serve again, else among the attempts.

        It cost `discount` of the endpoint's price.
        """
        tokens = (reply.tokens_in, reply.tokens_out)
        price = self.spend(*tokens, discount)
        self.notice(job, reply)
        self.outcomes.came(reply)
        if not reply.keeps:
            why = f"finish {reply.finish or 'unknown'}" + ("" if reply.text.strip() else ", empty")
            self.note(job, why, raw, seconds, tokens, price)
            return None
        uses = [self.use(place, job.key, place == job.places[0]) for place in job.places]
        return self.store.put(self.call(job, raw, reply, seconds, price), uses)

    def call(self, job: Job, raw: bytes, reply: Reply, seconds: float, price: float | None) -> Call:
        """What is stored of an answer."""
        kind = " ".join(filter(None, (self.identity, job.body.get("model"), job.request.stage)))
        tokens = (reply.tokens_in, reply.tokens_out)
        return Call(job.text, raw, reply.finish, kind, reply.model, reply.fingerprint, *tokens, seconds, price)

    def spend(self, tokens_in: int, tokens_out: int, discount: float = 1.0) -> float | None:
        """Count a reply against the budget; its price."""
        price = money_of(self.price, discount * tokens_in, discount * tokens_out)
        self.purse.spend(Cost(1, tokens_in + tokens_out, price or 0.0))
        return price

    def notice(self, job: Job, reply: Reply) -> None:
        """Warn when another model than until now stands behind the same name: old and new answers differ in kind."""
        now, name = (reply.model, reply.fingerprint), str(job.body.get("model", ""))
        if name not in self.served:
            self.served[name] = self.store.served(f"{self.identity} {name} ") or [now]
        if now not in self.served[name]:
            told = [" ".join(filter(None, pair)) or "nameless" for pair in (now, self.served[name][-1])]
            self.served[name].append(now)
            self.warn(f"{self.identity}: {name!r} is served by {told[0]} now, until here it was {told[1]}")

    def note(
        self,
        job: Job,
        why: str,
        raw: bytes,
        seconds: float,
        tokens: tuple[int, int] = (0, 0),
        price: float | None = None,
    ) -> None:
        """Keep an attempt that brought no answer to serve again."""
        request = job.request
        who = (job.key, self.run, request.round, request.stage, request.row)
        self.store.note(Attempt(*who, why, raw, *tokens, seconds, price))

    def refusal(self, job: Job, why: str, fix: str) -> TapirError:
        """The error that names the row which was not answered."""
        tried = f" (tried {job.tries + 1} times)" if job.tries else ""
        return TapirError(f"{why}{tried}", where=self.place(job), fix=fix)

    def give_up(self, job: Job, trouble: Trouble) -> TapirError | None:
        """Leave the job's row out where the trouble is its own; the error that stops everything where it is not."""
        if not self.outcomes.is_rows_own(trouble, job.tries + 1):
            return self.refusal(job, trouble.why, trouble.fix)
        self.finish(job, Reply("", trouble.finish, why=trouble.why), paid=True)
        return None

    def refuse_nothing(self) -> None:
        """TapirError where nothing was answered, and no server said what is wrong with any row."""
        if trouble := self.outcomes.for_nothing():
            raise TapirError(trouble.why, where=self.identity, fix=trouble.fix)

    def hopeless(self, job: Job, why: str, cut: bool = False) -> TapirError | None:
        """The error that stops before more is paid, when the last replies were all useless; `why` the last one was."""
        if not self.outcomes.is_hopeless():
            return None
        role = role_of(self.endpoint)
        why = why or f"the reply was cut at {role}.max_tokens"
        what = f"{self.outcomes.useless:,} replies in a row cannot be used; the last: {why}"
        raised = f"Raise {role}.max_tokens (now {self.endpoint.max_tokens:,}), or have shorter answers asked for."
        return TapirError(what, where=self.place(job), fix=raised if cut else f"Correct the cause. {RERUN}")

    def whole_before(self) -> int:
        """The whole answers that the stage had before."""
        request = self.requests[0]
        return self.store.whole_answers(self.run, request.round, request.stage)

    def answered_ever(self) -> bool:
        """Whether the store has an answer of this endpoint."""
        return bool(self.store.served(f"{self.identity} "))

    def place(self, job: Job) -> str:
        """Where a job stands, for people."""
        return f"{self.identity}, stage {job.request.stage}, row {job.request.row}"

    def finish(self, job: Job, reply: Reply, paid: bool) -> None:
        """Serve every place of a job; only the first of them was paid for."""
        for place in job.places:
            self.serve(place, job.key, reply, hit=not paid or place != job.places[0])
        if not paid:
            self.store.used([self.use(place, job.key) for place in job.places])
        self.progress(self.finished, len(self.requests), self.hits)


def room_in(body: Mapping[str, Any]) -> int:
    """The tokens that a request allows its reply, 0 where it does not say."""
    found = body.get("max_tokens") or body.get("max_completion_tokens")
    return found if type(found) is int else 0
