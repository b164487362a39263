"""One call of `ask`: what the store has, what is still to be asked, and what is kept of each reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Budget
from tapir_local.records import Answer, Request, noop
from tapir_local.store import keys
from tapir_local.store.compression import LARGEST
from tapir_local.store.reply import Reading, Reply, read_reply
from tapir_local.store.rows import Attempt, Call, Use
from tapir_local.store.store import Store
from tapir_local.teacher.account import Account, Bill
from tapir_local.teacher.budget import BOUNDS, Purse, reply_bound
from tapir_local.teacher.endpoint import body_of, identity_of, role_of
from tapir_local.teacher.giving_up import Outcomes
from tapir_local.teacher.refusals import RERUN, Trouble

if TYPE_CHECKING:
    from concurrent.futures import Future

LOOKED_UP = 1000  # requests, until progress is told
LIMITS_TRIED = 16  # values of max_tokens under which an answer is looked for

CallProgress = Callable[[int, int, int], None]  # called with (done, total, hits)


@dataclass(slots=True)
class Job:
    """A request to be sent once, for every place among the requests where it stands.

    `reserved` is what was set aside for it in the budget, `sent` the attempt that the store has while it is in flight.
    """

    request: Request
    key: bytes
    text: bytes
    body: Mapping[str, Any]
    places: list[int]
    tries: int = 0
    refusals: int = 0  # answers of 429
    reserved: Bill | None = None
    sent: Attempt | None = None


class Asking:
    """The requests of one call of `ask`, the answers known so far, and the way of a reply into the store."""

    def __init__(
        self,
        requests: Sequence[Request],
        endpoint: Endpoint,
        store: Store,
        run: str,
        progress: CallProgress = noop,
        purse: Purse | None = None,
        warn: Callable[[str], None] = noop,
    ) -> None:
        self.requests, self.endpoint, self.store, self.run = requests, endpoint, store, run
        self.progress, self.warn = progress, warn
        self.purse = purse or Purse(Budget())
        self.account, self.identity = Account(endpoint, self.purse, warn), identity_of(endpoint)
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
            shorter = self.with_less_room([job for job in some if job.key not in known])
            for job in some:
                raw = known.get(job.key)
                key, reply = (
                    (job.key, self.read(job.body, raw)) if raw is not None else shorter.get(job.key, (b"", None))
                )
                if reply:
                    self.outcomes.hit(reply)
                    self.serve(job.places[0], key, reply, hit=True)
                    uses.append(self.use(job.places[0], key))
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

    def with_less_room(self, jobs: Sequence[Job]) -> dict[bytes, tuple[bytes, Reply]]:
        """By key of a job, the whole answer to the same request with a smaller max_tokens, and the key of that one.

        An answer that ended by itself is what a longer limit would have brought too, so that whoever raises max_tokens
        pays for the answers that were cut, and for no other.
        """
        found: dict[bytes, tuple[bytes, Reply]] = {}
        for limit in self.limits if jobs else ():
            bodies = [(job, with_limit(job.body, limit)) for job in jobs if limit < reply_bound(job.body)]
            shorter = {keys.key(self.identity, body, job.request.draw): (job, body) for job, body in bodies}
            for key, raw in self.store.get_many(list(shorter)).items():
                job, body = shorter[key]
                reply = self.read(body, raw)
                if reply.complete:
                    found.setdefault(job.key, (key, reply))
        return found

    @cached_property
    def limits(self) -> list[int]:
        """The values of max_tokens that this endpoint's model was asked with before, largest first."""
        name = " ".join(filter(None, (self.identity, self.endpoint.model)))
        return self.store.limits(f"{name} ")[:LIMITS_TRIED]

    def missing(self, job: Job) -> Job:
        """A job that the store has no answer to, to be sent; TapirError where nothing may be."""
        if self.store.mode == "replay":
            raise self.store.missing(job.text, job.request.stage, job.request.row)
        self.account.refuse_unbounded(job.body)
        return job

    def reserve(self, job: Job) -> bool:
        """Set aside the most that a job can cost; False where the budget has no room for it now."""
        job.reserved = job.reserved or self.account.reserve(job.body)
        return job.reserved is not None

    def reserve_anyway(self, job: Job) -> None:
        """Set aside the most that a job can cost which was submitted before, whatever the budget is now."""
        if not job.reserved:
            job.reserved = self.account.most(job.body)
            self.purse.reserve_anyway(job.reserved.cost)

    def release(self, job: Job) -> None:
        """What was set aside for a job may go to others."""
        if job.reserved:
            self.purse.release(job.reserved.cost)
            job.reserved = None

    def over_budget(self, job: Job) -> TapirError:
        """The error that stops the run before a job for which the budget has no room."""
        return self.purse.empty(self.place(job), self.account.most(job.body).cost)

    def send(self, job: Job) -> Future[None]:
        """Record in the store that a job is about to be sent: should this process die, it counts as billed."""
        bill = job.reserved or self.account.most(job.body)
        job.sent = self.attempt(job, "sent; this process ended before an answer came", bill=bill)
        return self.store.send(job.sent)

    def serve(self, place: int, key: bytes, reply: Reply, hit: bool) -> None:
        """The answer to the request at `place`."""
        tokens = (reply.tokens_in, reply.tokens_out)
        self.answers[place] = Answer(reply.text, reply.finish, hit, *tokens, key.hex(), reply.why)
        self.finished += 1
        self.hits += hit

    def read(self, body: Mapping[str, Any], raw: bytes) -> Reply:
        """A reply to this body as text, with or without what the model thought aloud; ValueError where it is none."""
        endpoint = self.endpoint
        return read_reply(raw, Reading(endpoint.thinking, reply_bound(body), role_of(endpoint)))

    def use(self, place: int, key: bytes, paid: bool = False) -> Use:
        """The record that this run's row used a call."""
        request = self.requests[place]
        return Use(self.run, request.round, request.stage, request.row, key, int(paid))

    def keep(self, job: Job, raw: bytes, reply: Reply, seconds: float, discount: float = 1.0) -> Future[None] | None:
        """Into the store: among the calls if it may serve again, else among the attempts.

        It cost `discount` of the endpoint's price.
        """
        bill = self.account.of_reply(job.body, reply, len(raw), discount)
        self.notice(job, reply)
        self.outcomes.came(reply)
        if not reply.keeps or len(raw) > LARGEST:
            why = f"finish {reply.finish or 'unknown'}" + ("" if reply.text.strip() else ", empty")
            self.note(job, why, raw[:LARGEST], seconds, bill)
            return None
        self.purse.spend(bill.cost, bill.estimated)
        uses = [self.use(place, job.key, place == job.places[0]) for place in job.places]
        sent, job.sent = job.sent, None
        return self.store.put(self.call(job, raw, reply, seconds, bill), uses, sent)

    def call(self, job: Job, raw: bytes, reply: Reply, seconds: float, bill: Bill) -> Call:
        """What is stored of an answer."""
        kind = " ".join(filter(None, (self.identity, job.body.get("model"), job.request.stage)))
        served, tokens = (reply.model, reply.fingerprint), (bill.tokens_in, bill.tokens_out)
        estimated = int(bill.estimated)
        return Call(job.text, raw, reply.finish, kind, *served, *tokens, seconds, bill.price, estimated=estimated)

    def notice(self, job: Job, reply: Reply) -> None:
        """Warn when another model than until now stands behind the same name: old and new answers differ in kind."""
        now, name = (reply.model, reply.fingerprint), str(job.body.get("model", ""))
        if name not in self.served:
            self.served[name] = self.store.served(f"{self.identity} {name} ") or [now]
        if now not in self.served[name]:
            told = [" ".join(filter(None, pair)) or "nameless" for pair in (now, self.served[name][-1])]
            self.served[name].append(now)
            self.warn(f"{self.identity}: {name!r} is served by {told[0]} now, until here it was {told[1]}")

    def note(self, job: Job, why: str, raw: bytes, seconds: float, bill: Bill | None = None) -> None:
        """Keep an attempt that brought no answer to serve again, and count what may have been billed for it."""
        if bill:
            self.purse.spend(bill.cost, bill.estimated)
        sent, job.sent = job.sent, None
        self.store.note(self.attempt(job, why, raw, seconds, bill), sent)

    def attempt(self, job: Job, why: str, raw: bytes = b"", seconds: float = 0.0, bill: Bill | None = None) -> Attempt:
        """The record of an attempt."""
        request, (tokens_in, tokens_out, price, estimated) = job.request, bill or Bill(0, 0, None)
        who = (job.key, self.run, request.round, request.stage, request.row)
        cost = (tokens_in, tokens_out, seconds, price)
        return Attempt(*who, why, raw, *cost, estimated=int(estimated))

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


def with_limit(body: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """The body with another bound of its reply."""
    name = next(name for name in BOUNDS if name in body)
    return {**body, name: limit}
