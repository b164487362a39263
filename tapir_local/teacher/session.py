"""One call of `ask`: which answers the store has, which requests are to be sent, and what is stored of each reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tapir_local.errors import TapirError
from tapir_local.inference.llama_process import ANYWHERE, LlamaPlace
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Budget
from tapir_local.records import Answer, Progress, Request, noop
from tapir_local.store import keys
from tapir_local.store.compression import MAX_DECOMPRESSED_BYTES
from tapir_local.store.reply import Reply, ReplyOptions, parse_reply
from tapir_local.store.rows import Attempt, Call, Use
from tapir_local.store.store import Store
from tapir_local.teacher.budget import REPLY_LIMIT_FIELDS, Bill, BudgetTracker, EndpointBilling, max_reply_tokens
from tapir_local.teacher.endpoint import endpoint_identity, endpoint_role, request_body
from tapir_local.teacher.pending_batches import DEFAULT_BATCH_LIMITS, BatchLimits
from tapir_local.teacher.rate_limit import CallMeter
from tapir_local.teacher.refusals import RERUN_SENTENCE, RequestFailure, RequestOutcomes

if TYPE_CHECKING:
    from concurrent.futures import Future

    import httpx2

LOOKUP_SIZE = 1000  # requests looked up at once, before progress is reported
MAX_ATTEMPT_BYTES = 1 << 20  # of a reply that cannot be used: enough to see why
MAX_LIMITS_TRIED = 16  # values of max_tokens for which an answer is looked up
DEFAULT_PATIENCE = 900.0  # seconds of nothing but 429 until the run stops with an error

CallProgress = Callable[[int, int, int], None]  # called with (done, total, hits)


@dataclass
class EarlierTries:
    """Requests of a stage that were sent before it began and brought no answer, so that it continues counting.

    `tries` counts the attempts by key, `useless` the last replies in a row that could not be used.
    """

    tries: dict[bytes, int] = field(default_factory=dict)
    useless: int = 0


@dataclass(frozen=True)
class AskOptions:
    """How `ask` spends, reports and waits.

    `budget` limits what may be spent. `progress` is called with (done, total, hits), `tell` with (done, total, status)
    while batches or a loading server are waited for, and `warn` with a text when, for example, another model answers
    than before. `transport` replaces the network. `patience` is the number of seconds after which a server that refuses
    everything, or that cannot be reached for a batch, is given up. `batch_limits` apply to the Batch API. `llama` is
    where llama.cpp runs if a GGUF answers. `meter` counts the requests for a display. `earlier` are the attempts that
    count as those of this call.
    """

    budget: BudgetTracker | None = None
    progress: CallProgress = noop
    warn: Callable[[str], None] = noop
    tell: Progress = noop
    transport: httpx2.AsyncBaseTransport | None = None
    patience: float = DEFAULT_PATIENCE
    batch_limits: BatchLimits = DEFAULT_BATCH_LIMITS
    llama: LlamaPlace = ANYWHERE
    meter: CallMeter = field(default_factory=CallMeter)
    earlier: EarlierTries | None = None


DEFAULT_ASK_OPTIONS = AskOptions()


@dataclass(slots=True)
class RequestJob:
    """A request to be sent once, even if it occurs several times among the requests (`places`).

    `rate_limited` counts its answers of 429. `live_before` is how many completions had come when this request was last
    put back to be sent again; -1 if it was not. `reserved` is what was reserved for it in the budget, `sent` the
    attempt that the store has recorded while it is in flight.
    """

    request: Request
    key: bytes
    body: Mapping[str, Any]
    places: list[int]
    tries: int = 0
    rate_limited: int = 0
    live_before: int = -1
    reserved: Bill | None = None
    sent: Attempt | None = None


class AskSession:
    """The requests of one call of `ask`, the answers known so far, and how a reply gets into the store."""

    def __init__(
        self,
        requests: Sequence[Request],
        endpoint: Endpoint,
        store: Store,
        run: str,
        options: AskOptions = DEFAULT_ASK_OPTIONS,
    ) -> None:
        self.requests, self.endpoint, self.store, self.run = list(requests), endpoint, store, run
        self.options, self.warn = options, options.warn
        self.budget = options.budget or BudgetTracker(Budget())
        self.billing, self.identity = EndpointBilling(endpoint, self.budget, self.warn), endpoint_identity(endpoint)
        self.answers: list[Answer | None] = [None] * len(requests)
        self.finished = self.hits = 0
        self.abandoned = 0  # requests that were in flight when the run was stopped
        self.served_models: dict[str, list[tuple[str, str]]] = {}
        self.outcomes = RequestOutcomes(self.count_complete_before, self.has_answered_before)
        earlier = options.earlier or EarlierTries()
        self.tries, self.outcomes.useless = dict(earlier.tries), earlier.useless

    def add(self, requests: Sequence[Request]) -> list[RequestJob]:
        """Add requests, answer those that the store has, and return a job for each different one that is left."""
        first = len(self.requests)
        self.requests += requests
        self.answers += [None] * len(requests)
        return self.look_up(first)

    def look_up(self, first: int = 0) -> list[RequestJob]:
        """Answer what the store has; return a job for each different request that is left, from `first` on."""
        jobs: dict[bytes, RequestJob] = {}
        uses: list[Use] = []
        for start in range(first, len(self.requests), LOOKUP_SIZE):
            some = [self.make_job(place) for place in range(start, min(start + LOOKUP_SIZE, len(self.requests)))]
            replies = self.stored_replies(some)
            for job in some:
                if job.key in replies:
                    key, reply = replies[job.key]
                    self.outcomes.count_hit(reply)
                    self.set_answer(job.places[0], key, reply, hit=True)
                    uses.append(self.use_record(job.places[0], key))
                elif job.key in jobs:
                    jobs[job.key].places += job.places
                else:
                    self.check_sendable(job)
                    jobs[job.key] = job
            self.options.progress(self.finished, len(self.requests), self.hits)
        self.store.used(uses)
        return list(jobs.values())

    def make_job(self, place: int) -> RequestJob:
        """The job for the request at `place`."""
        request = self.requests[place]
        body = request_body(request, self.endpoint)
        key = keys.request_key(self.identity, body, request.draw)
        return RequestJob(request, key, body, [place], self.tries.get(key, 0))

    def request_text(self, job: RequestJob) -> bytes:
        """The text of a job that the store keeps, whose hash is its key.

        It is made again when it is needed: orjson's bytes hold up to 9 KB for a text of 1.5 KB, which a stage with
        100,000 requests would keep for each of them.
        """
        return keys.request_text(self.identity, job.body, job.request.draw)

    def stored_replies(self, jobs: Sequence[RequestJob]) -> dict[bytes, tuple[bytes, Reply]]:
        """For each job's key that has an answer in the store: the key of the call that has it, and its reply."""
        known = self.store.get_many([job.key for job in jobs])
        found = self.shorter_replies([job for job in jobs if job.key not in known])
        return found | {job.key: (job.key, self.read_raw(job.body, known[job.key])) for job in jobs if job.key in known}

    def shorter_replies(self, jobs: Sequence[RequestJob]) -> dict[bytes, tuple[bytes, Reply]]:
        """For each job's key: the key and reply of the same request with a smaller max_tokens, if that is complete.

        An answer that ended by itself is what a larger limit would have brought too. So after max_tokens is raised,
        only the answers that were cut are paid for again.
        """
        found: dict[bytes, tuple[bytes, Reply]] = {}
        for limit in self.known_limits if jobs else ():
            larger = [job for job in jobs if limit < max_reply_tokens(job.body)]
            bodies = [(job, body_with_reply_limit(job.body, limit)) for job in larger]
            shorter = {keys.request_key(self.identity, body, job.request.draw): (job, body) for job, body in bodies}
            for key, raw in self.store.get_many(list(shorter)).items():
                job, body = shorter[key]
                reply = self.read_raw(body, raw)
                if reply.complete:
                    found.setdefault(job.key, (key, reply))
        return found

    @cached_property
    def known_limits(self) -> list[int]:
        """The values of max_tokens that this endpoint's model was asked with before, largest first."""
        name = " ".join(filter(None, (self.identity, self.endpoint.model)))
        return self.store.limits(f"{name} ")[:MAX_LIMITS_TRIED]

    def check_sendable(self, job: RequestJob) -> None:
        """Raise TapirError if nothing may be sent (replay mode), or the budget needs a limit that the job lacks."""
        if self.store.mode == "replay":
            raise self.store.missing(self.request_text(job), job.request.stage, job.request.row)
        self.billing.require_reply_limit(job.body)

    def reserve(self, job: RequestJob) -> bool:
        """Reserve the maximum that a job can cost; False if it does not fit the budget now."""
        job.reserved = job.reserved or self.billing.reserve(job.body)
        return job.reserved is not None

    def reserve_anyway(self, job: RequestJob) -> None:
        """Reserve the maximum that a job submitted before can cost, whether it fits the budget or not."""
        if not job.reserved:
            job.reserved = self.billing.worst_case(job.body)
            self.budget.reserve_anyway(job.reserved.cost)

    def release(self, job: RequestJob) -> None:
        """Release what was reserved for a job."""
        if job.reserved:
            self.budget.release(job.reserved.cost)
            job.reserved = None

    def over_budget_error(self, job: RequestJob) -> TapirError:
        """The error that stops the run before a job that does not fit the budget."""
        return self.budget.exhausted_error(self.describe_place(job), self.billing.worst_case(job.body).cost)

    def record_sent(self, job: RequestJob) -> Future[None]:
        """Record in the store that a job is about to be sent: if this process dies, it counts as billed."""
        bill = job.reserved or self.billing.worst_case(job.body)
        job.sent = self.attempt_record(job, "sent; this process ended before an answer came", bill=bill)
        return self.store.send(job.sent)

    def set_answer(self, place: int, key: bytes, reply: Reply, hit: bool) -> None:
        """Set the answer to the request at `place`."""
        tokens = (reply.tokens_in, reply.tokens_out)
        self.answers[place] = Answer(reply.text, reply.finish, hit, *tokens, key.hex(), reply.why)
        self.finished += 1
        self.hits += hit

    def read_raw(self, body: Mapping[str, Any], raw: bytes) -> Reply:
        """The reply to this body, its text with or without the model's thinking; ValueError if it is not a reply."""
        endpoint = self.endpoint
        return parse_reply(raw, ReplyOptions(endpoint.thinking, max_reply_tokens(body), endpoint_role(endpoint)))

    def use_record(self, place: int, key: bytes, paid: bool = False) -> Use:
        """The record that a row of this run used a call."""
        request = self.requests[place]
        return Use(self.run, request.round, request.stage, request.row, key, int(paid))

    def store_reply(
        self, job: RequestJob, raw: bytes, reply: Reply, seconds: float, discount: float = 1.0
    ) -> Future[None] | None:
        """Store a reply: among the calls if it may answer the same request again, otherwise among the attempts.

        It cost `discount` times the endpoint's price. The future ends when a call is on disk; None for an attempt.
        """
        bill = self.billing.bill_for_reply(job.body, reply, len(raw), discount)
        self.warn_of_changed_model(job, reply)
        self.outcomes.count_reply(reply)
        self.options.meter.count("replies")
        if not reply.keeps or len(raw) > MAX_DECOMPRESSED_BYTES:
            why = f"finish {reply.finish or 'unknown'}" + ("" if reply.text.strip() else ", empty")
            self.store_attempt(job, why, raw, seconds, bill)
            return None
        self.budget.spend(bill.cost, bill.estimated)
        uses = [self.use_record(place, job.key, place == job.places[0]) for place in job.places]
        sent, job.sent = job.sent, None
        return self.store.put(self.call_record(job, raw, reply, seconds, bill), uses, sent)

    def call_record(self, job: RequestJob, raw: bytes, reply: Reply, seconds: float, bill: Bill) -> Call:
        """The record of an answered call."""
        kind = " ".join(filter(None, (self.identity, job.body.get("model"), job.request.stage)))
        served, tokens = (reply.model, reply.fingerprint), (bill.tokens_in, bill.tokens_out)
        estimated = int(bill.estimated)
        text = self.request_text(job)
        return Call(text, raw, reply.finish, kind, *served, *tokens, seconds, bill.price, estimated=estimated)

    def warn_of_changed_model(self, job: RequestJob, reply: Reply) -> None:
        """Warn if another model than before answers under the same name: old and new answers then differ in kind."""
        now, name = (reply.model, reply.fingerprint), str(job.body.get("model", ""))
        if name not in self.served_models:
            self.served_models[name] = self.store.served(f"{self.identity} {name} ") or [now]
        if now not in self.served_models[name]:
            new, old = [
                " ".join(filter(None, pair)) or "an unnamed model" for pair in (now, self.served_models[name][-1])
            ]
            self.served_models[name].append(now)
            self.warn(f"{self.identity}: {name!r} is now served by {new}; before it was {old}")

    def store_attempt(self, job: RequestJob, why: str, raw: bytes, seconds: float, bill: Bill | None = None) -> None:
        """Store an attempt without an answer that can be used again, and count what may have been billed for it."""
        if bill:
            self.budget.spend(bill.cost, bill.estimated)
        sent, job.sent = job.sent, None
        self.store.note(self.attempt_record(job, why, raw[:MAX_ATTEMPT_BYTES], seconds, bill), sent)

    def attempt_record(
        self, job: RequestJob, why: str, raw: bytes = b"", seconds: float = 0.0, bill: Bill | None = None
    ) -> Attempt:
        """The record of an attempt."""
        request, (tokens_in, tokens_out, price, estimated) = job.request, bill or Bill(0, 0, None)
        who = (job.key, self.run, request.round, request.stage, request.row)
        cost = (tokens_in, tokens_out, seconds, price)
        return Attempt(*who, why, raw, *cost, estimated=int(estimated))

    def row_error(self, job: RequestJob, why: str, fix: str) -> TapirError:
        """The error that names the row without an answer."""
        tried = f" (tried {job.tries + 1} times)" if job.tries else ""
        return TapirError(f"{why}{tried}", where=self.describe_place(job), fix=fix)

    def skip_row_or_error(self, job: RequestJob, failure: RequestFailure) -> TapirError | None:
        """Leave the job's row out if the failure concerns only this row; otherwise return the error that stops all."""
        answered_since = self.outcomes.live - job.live_before
        if not self.outcomes.may_skip_row(failure, job.tries + 1, answered_since):
            return self.row_error(job, failure.why, failure.fix)
        self.finish_job(job, Reply("", failure.finish, why=failure.why), paid=True)
        return None

    def check_any_answered(self) -> None:
        """Raise TapirError if nothing was answered and no server stated what is wrong with any row."""
        if failure := self.outcomes.failure_of_all():
            raise TapirError(failure.why, where=self.identity, fix=failure.fix)

    def useless_replies_error(self, job: RequestJob, why: str, cut: bool = False) -> TapirError | None:
        """The error that stops before more is paid if the last replies were all useless; `why` the last one was."""
        if not self.outcomes.are_useless():
            return None
        role = endpoint_role(self.endpoint)
        why = why or f"the reply was cut at {role}.max_tokens"
        what = f"{self.outcomes.useless:,} replies in a row cannot be used; the last: {why}"
        raised = f"Raise {role}.max_tokens (now {self.endpoint.max_tokens:,}), or ask for shorter answers."
        fix = raised if cut else f"Correct the cause. {RERUN_SENTENCE}"
        return TapirError(what, where=self.describe_place(job), fix=fix)

    def count_complete_before(self) -> int:
        """How many complete answers the stage had before this call."""
        request = self.requests[0]
        return self.store.whole_answers(self.run, request.round, request.stage)

    def has_answered_before(self) -> bool:
        """Whether the store has any answer of this endpoint."""
        return bool(self.store.served(f"{self.identity} "))

    def describe_place(self, job: RequestJob) -> str:
        """`https://api.example/v1, stage judge, row seed-00017`, for messages."""
        return f"{self.identity}, stage {job.request.stage}, row {job.request.row}"

    def finish_job(self, job: RequestJob, reply: Reply, paid: bool) -> None:
        """Set the answer of every place of a job; only the first of them was paid for."""
        for place in job.places:
            self.set_answer(place, job.key, reply, hit=not paid or place != job.places[0])
        if not paid:
            self.store.used([self.use_record(place, job.key) for place in job.places])
        self.options.progress(self.finished, len(self.requests), self.hits)


def body_with_reply_limit(body: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """The body with another limit on its reply."""
    name = next(name for name in REPLY_LIMIT_FIELDS if name in body)
    return {**body, name: limit}
