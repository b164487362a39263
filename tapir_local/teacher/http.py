"""Send requests over HTTP: many at once, each answered once, in spite of all that servers and networks do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import orjson

from tapir_local.errors import TapirError
from tapir_local.store.reply import Reply
from tapir_local.teacher.budget import Bill
from tapir_local.teacher.endpoint import (
    chat_url_and_headers,
    mask_key,
    mask_key_in_body,
    open_http_client,
    open_openai_client,
    unencrypted_key_warning,
)
from tapir_local.teacher.pending_batches import PendingBatches
from tapir_local.teacher.rate_limit import RequestPacer, SendQueue, allowance_wait, backoff_seconds, requested_wait
from tapir_local.teacher.refusals import RequestFailure, classify_error_response, classify_unreadable_reply
from tapir_local.teacher.responses import (
    body_for_stream,
    classify_transport_error,
    is_event_stream,
    join_stream,
    post_request,
    transport_errors,
)
from tapir_local.teacher.session import AskSession, RequestJob

if TYPE_CHECKING:
    from concurrent.futures import Future

    import httpx2

INTERRUPT_GRACE_SECONDS = 10.0  # seconds that requests in flight get to come home after Ctrl-C
CLAIM_POLL_SECONDS = 0.05  # seconds between looks at a request that another thread or process is asking
BUDGET_POLL_SECONDS = 0.05  # seconds between looks at a budget that requests in flight may leave room in
TIMED_OUT, SERVER_ERROR, UNAVAILABLE = 408, 500, 503
NOTHING_LOST = "run the same command again: nothing paid for is lost."
MAX_LOADING_SECONDS = 600.0  # seconds that a server may take to load its model; `patience`, where that is less
LOADING_POLL_SECONDS = 2.0  # seconds between requests to a server that loads its model, where it names none

Told = Callable[[int, int, str], None]
WARNED_ENDPOINTS: set[str] = set()  # endpoints of which a key in the clear was told; once a process


def nothing_told(done: int, total: int, text: str) -> None:
    """Nobody is told."""


class LiveSender:
    """The jobs of an Asking on their way: a line of those waiting, workers that send, and what becomes of each."""

    def __init__(self, asking: AskSession, away: PendingBatches, patience: float, tell: Told = nothing_told) -> None:
        self.asking, self.endpoint, self.store = asking, asking.endpoint, asking.store
        self.away, self.patience, self.tell = away, patience, tell
        self.loading_since: float | None = None
        self.usage_too = True  # whether a stream is asked to end in the count of tokens
        self.left: list[RequestJob] = []
        self.refused_since: float | None = None
        self.reached = False
        self.pace = RequestPacer()

    async def send(self, jobs: list[RequestJob], transport: httpx2.AsyncBaseTransport | None) -> list[RequestJob]:
        """Send the jobs, as many at once as the endpoint bears; those in a batch since come back."""
        most = min(self.endpoint.concurrency, len(jobs))
        self.loop, self.line = asyncio.get_running_loop(), SendQueue(jobs, most)
        async with open_http_client(self.endpoint, transport) as self.http:
            self.client = open_openai_client(self.endpoint, self.http)
            self.url, self.headers = chat_url_and_headers(self.client)
            self.warn_of_key()
            workers = [asyncio.create_task(self.work(number)) for number in range(most)]
            try:
                await asyncio.wait(workers)
            except asyncio.CancelledError as interrupted:
                self.line.stop(interrupted)
                await asyncio.wait(workers, timeout=INTERRUPT_GRACE_SECONDS)
                raise
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if self.line.failed:
            raise self.line.failed
        return self.left

    async def work(self, number: int) -> None:
        """One of the requests in flight after another."""
        try:
            while (job := await self.line.next(number)) is not None:
                await self.claim_and_try(job)
        except BaseException as error:
            self.line.stop(error)
            raise

    async def claim_and_try(self, job: RequestJob) -> None:
        """Send a job unless somebody else is at it, or was meanwhile."""
        if not self.store.claim(job.key):
            self.line.later(job, CLAIM_POLL_SECONDS)
            return
        kept: Future[None] | None = None
        try:
            raw = self.store.get(job.key)
            if raw:
                self.finish(job, self.asking.read(job.body, raw), paid=False)
            elif self.away.holds(job.key):
                self.left.append(job)
                self.line.done()
            elif await self.affordable(job):
                kept = await self.attempt(job)
        finally:
            if kept:
                kept.add_done_callback(lambda _: self.store.release(job.key))
            else:
                self.store.release(job.key)

    async def affordable(self, job: RequestJob) -> bool:
        """Wait until the budget has room for the most that a job can cost; False, and the end, when it never will."""
        while not self.asking.reserve(job):
            if not self.asking.purse.waiting:
                self.line.stop(self.asking.over_budget(job))
            if self.line.failed:
                return False
            await asyncio.sleep(BUDGET_POLL_SECONDS)
        return True

    async def attempt(self, job: RequestJob) -> Future[None] | None:
        """Send a job once, in its turn, and see to what comes; what the store owes when it came to an answer."""
        sent = self.loop.time()
        try:
            if (wait := self.pace.turn(sent, self.line.limit)) > 0:
                await asyncio.sleep(wait)
            await self.record(job)
            sent = self.loop.time()
            return await self.exchange(job, sent)
        except asyncio.CancelledError:
            if job.sent:
                with suppress(TapirError):
                    self.asking.note(job, "interrupted while in flight", b"", self.loop.time() - sent, job.reserved)
            raise
        finally:
            self.asking.release(job)

    async def record(self, job: RequestJob) -> None:
        """Record a job that is about to be sent: on the disk before it goes, where a budget counts it."""
        if not self.asking.account.bills:
            return
        recorded = self.asking.send(job)
        if self.asking.purse.limited:
            await asyncio.wrap_future(recorded)

    async def exchange(self, job: RequestJob, sent: float) -> Future[None] | None:
        """One request and what came of it."""
        body = orjson.dumps(body_for_stream(job.body, self.usage_too) if self.endpoint.stream else job.body)
        request = self.http.build_request("POST", self.url, content=body, headers=self.headers)
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                response = await post_request(self.http, request)
        except transport_errors() as error:
            bill = None if never_sent(error) else job.reserved
            self.suffer(job, classify_transport_error(error, self.endpoint, self.reached, job.tries), sent, bill)
            return None
        if response.is_success:
            return self.received(job, response, sent)
        self.reached = True
        bill = job.reserved if may_be_billed(response) else None
        self.suffer(job, classify_error_response(response, self.endpoint), sent, bill)
        return None

    def received(self, job: RequestJob, response: httpx2.Response, sent: float) -> Future[None] | None:
        """Store what came before anything else, then see whether it is an answer."""
        raw, seconds = response.content, self.loop.time() - sent
        self.reached, self.refused_since, self.loading_since = True, None, None
        self.pace.took(seconds)
        try:
            raw = join_stream(raw) if self.endpoint.stream and is_event_stream(raw) else raw
            reply = self.asking.read(job.body, raw)
        except ValueError as error:
            self.unread(job, response, raw, error, sent)
            return None
        kept = self.asking.keep(job, raw, reply, seconds)
        if kept:
            kept.add_done_callback(self.written)
        self.line.answered()
        pause = allowance_wait(response.headers)
        if pause:
            self.line.hold(min(pause, self.patience))
        if reply.again and job.tries + 1 < self.endpoint.attempts:
            self.again(job)
        else:
            self.finish(job, reply, paid=True)
        if hopeless := self.asking.hopeless(job, reply.why, reply.finish == "length"):
            self.line.stop(hopeless)
        return kept

    def unread(self, job: RequestJob, response: httpx2.Response, raw: bytes, error: ValueError, sent: float) -> None:
        """A reply of status 200 came that is no chat completion, or a stream that was cut."""
        trouble = classify_unreadable_reply(raw, response.headers, self.endpoint)
        if self.endpoint.stream and is_event_stream(raw):
            trouble = RequestFailure("again", str(error), raw, sure=False, last="row")
        self.asking.outcomes.unread()
        self.suffer(job, trouble, sent, job.reserved)
        if hopeless := self.asking.hopeless(job, mask_key(trouble.why, self.client)):
            self.line.stop(hopeless)

    def written(self, kept: Future[None]) -> None:
        """Called by the store's thread: when it could not write, nothing more is asked for."""
        error = kept.exception()
        if error:
            with suppress(RuntimeError):  # the loop has ended: `flush` will raise the same error
                self.loop.call_soon_threadsafe(self.line.stop, error)

    def suffer(self, job: RequestJob, trouble: RequestFailure, sent: float, bill: Bill | None = None) -> None:
        """No answer came: note what may have been billed; try again, wait, leave the row out, or stop."""
        why = mask_key(trouble.why, self.client)
        self.asking.note(job, why, mask_key_in_body(trouble.body, self.client), self.loop.time() - sent, bill)
        tries = min(trouble.tries or self.endpoint.attempts, self.endpoint.attempts)
        if self.usage_too and self.endpoint.stream and "stream_options" in why:
            self.usage_too = False
            self.line.later(job, 0.0)
        elif trouble.then == "wait":
            self.wait(job, trouble, why)
        elif trouble.then == "load":
            self.wait_for_model(job, trouble, why)
        elif trouble.then == "again" and job.tries + 1 < tries:
            self.again(job, requested_wait(trouble.headers), why)
        else:
            self.give_up_row(job, trouble._replace(why=why))

    def again(self, job: RequestJob, asked: float | None = None, why: str = "") -> None:
        """Another try, after the time that the server asks for or a jittered backoff."""
        if asked is not None and asked > self.patience:
            self.give_up(job, f"{why}; the next request may go in {asked:,.0f} s", f"Wait, and {NOTHING_LOST}")
            return
        job.tries += 1
        wait = backoff_seconds(job.tries, random.Random(f"{job.key.hex()}-{job.tries}").random())
        self.line.later(job, wait if asked is None else asked)

    def wait_for_model(self, job: RequestJob, trouble: RequestFailure, why: str) -> None:
        """Its server loads its model: nobody asks for a while. No attempt is used up."""
        now = self.loop.time()
        self.loading_since = now if self.loading_since is None else self.loading_since
        longest = min(MAX_LOADING_SECONDS, self.patience)
        pause = min(requested_wait(trouble.headers) or LOADING_POLL_SECONDS, longest)
        if now + pause - self.loading_since > longest:
            fix = f"See what the server writes about its model, and {NOTHING_LOST}"
            self.give_up(job, f"{why}; the server still loads its model after {longest:,.0f} s", fix)
            return
        waited = f"the server loads its model ({now - self.loading_since:,.0f} s)"
        self.tell(self.asking.finished, len(self.asking.requests), waited)
        self.line.hold(pause)
        self.line.later(job, pause)

    def wait(self, job: RequestJob, trouble: RequestFailure, why: str) -> None:
        """429: all wait when the server says how long, or refuses everything; else this job. No attempt is used up."""
        now = self.loop.time()
        self.refused_since = now if self.refused_since is None else self.refused_since
        over = self.line.refused()
        job.refusals += 1
        chance = random.Random(f"{job.key.hex()}-{now}").random()
        asked = requested_wait(trouble.headers)
        pause = asked or backoff_seconds(max(over, job.refusals), chance)
        if now + pause - self.refused_since > self.patience:
            self.give_up(job, f"{why}; the next request may go in {pause:.0f} s", f"Wait, and {NOTHING_LOST}")
            return
        if asked or over:
            self.line.hold(pause)
        self.line.later(job, pause)

    def give_up(self, job: RequestJob, why: str, fix: str) -> None:
        """Stop asking, for this reason."""
        self.line.stop(self.asking.refusal(job, why, fix))

    def give_up_row(self, job: RequestJob, trouble: RequestFailure) -> None:
        """Leave a job's row out, or stop asking, whichever the trouble means."""
        if error := self.asking.give_up(job, trouble):
            self.line.stop(error)
        else:
            self.line.done()

    def warn_of_key(self) -> None:
        """Say once that the key goes unencrypted over a network."""
        warning = unencrypted_key_warning(self.endpoint, self.client.api_key)
        if warning and self.asking.identity not in WARNED_ENDPOINTS:
            WARNED_ENDPOINTS.add(self.asking.identity)
            self.asking.warn(warning)

    def finish(self, job: RequestJob, reply: Reply, paid: bool) -> None:
        """Serve a job's places, and out of the line with it."""
        self.asking.finish(job, reply, paid)
        self.line.done()


def never_sent(error: Exception) -> bool:
    """Whether a request failed before a server had it; a connection that broke later may have been worked on."""
    import aiohttp
    import httpx2

    unsent = (httpx2.ConnectError, httpx2.ProxyError, httpx2.UnsupportedProtocol, httpx2.PoolTimeout, httpx2.InvalidURL)
    unreached = (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError, aiohttp.ConnectionTimeoutError)
    return isinstance(error, unsent) or isinstance(error.__cause__ or error, unreached)


def may_be_billed(response: httpx2.Response) -> bool:
    """Whether a server may have worked on a request before it answered with an error.

    Vendors do not bill their own failures, but behind a gateway's 5xx or 408 a server may have generated a whole reply.
    A 503 that says when to come back refuses before any work, as a 429 does; so do all other 4xx.
    """
    status = response.status_code
    if status == UNAVAILABLE:
        return requested_wait(response.headers) is None and b"loading" not in response.content.lower()
    return status >= SERVER_ERROR or status == TIMED_OUT
