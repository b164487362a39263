"""Send requests over HTTP: many at once, each answered once, despite rate limits, failures and timeouts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import orjson

from tapir_local.errors import TapirError
from tapir_local.printable import format_count
from tapir_local.store.reply import Reply
from tapir_local.teacher.budget import Bill
from tapir_local.teacher.endpoint import (
    chat_url_and_headers,
    mask_key,
    mask_key_in_answer,
    mask_key_in_body,
    open_http_client,
    open_openai_client,
    unencrypted_key_warning,
)
from tapir_local.teacher.pending_batches import PendingBatches
from tapir_local.teacher.rate_limit import RequestPacer, SendQueue, allowance_wait, backoff_seconds, requested_wait
from tapir_local.teacher.refusals import (
    RERUN_CLAUSE,
    RequestFailure,
    classify_error_response,
    classify_unreadable_reply,
)
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

INTERRUPT_GRACE_SECONDS = 10.0  # that requests in flight get to finish after Ctrl-C
CLAIM_POLL_SECONDS = 0.05  # between checks of a request that another thread or process is asking
BUDGET_POLL_SECONDS = 0.05  # between checks whether requests in flight have left room in the budget
STATUS_REQUEST_TIMEOUT, STATUS_SERVER_ERROR, STATUS_UNAVAILABLE = 408, 500, 503
MAX_LOADING_SECONDS = 600.0  # that a server may take to load its model; `patience` if that is less
LOADING_POLL_SECONDS = 2.0  # between requests to a server that loads its model, unless it names a time

WARNED_ENDPOINTS: set[str] = set()  # whose unencrypted key was warned of, once per process


class LiveSender:
    """Sends the jobs of a session by live requests: a queue, workers that send, and the handling of each reply."""

    def __init__(self, session: AskSession, pending: PendingBatches) -> None:
        self.session, self.endpoint, self.store = session, session.endpoint, session.store
        self.pending, self.patience = pending, session.options.patience
        self.loading_since: float | None = None
        self.refused_since: float | None = None
        self.wants_usage = True  # whether a stream is asked to end with the token counts
        self.in_batches: list[RequestJob] = []
        self.reached = False
        self.in_flight = 0
        self.pacer = RequestPacer()

    async def send(
        self, jobs: list[RequestJob], more: AsyncIterator[list[RequestJob]] | None = None
    ) -> list[RequestJob]:
        """Send the jobs, as many at once as the endpoint allows; returns those that are now in a pending batch.

        `more` brings further jobs meanwhile. When it ends, what is in flight is finished and nothing else is sent.
        """
        most = self.endpoint.concurrency if more else min(self.endpoint.concurrency, len(jobs))
        self.loop, self.queue = asyncio.get_running_loop(), SendQueue(jobs, most, may_grow=more is not None)
        self.session.options.meter.limit(most)
        async with open_http_client(self.endpoint, self.session.options.transport) as self.http:
            self.client = open_openai_client(self.endpoint, self.http)
            self.url, self.headers = chat_url_and_headers(self.client)
            self.warn_of_key()
            workers = [asyncio.create_task(self.work(number)) for number in range(most)]
            workers += [asyncio.create_task(self.take_more(more))] if more else []
            try:
                await asyncio.wait(workers)
            except asyncio.CancelledError as interrupted:
                self.queue.stop(interrupted)
                self.tell_of_requests_in_flight()
                await asyncio.wait(workers, timeout=INTERRUPT_GRACE_SECONDS)
                raise
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if self.queue.failed:
            raise self.queue.failed
        return self.in_batches

    async def work(self, number: int) -> None:
        """One worker: sends one job after another."""
        try:
            while (job := await self.queue.next(number)) is not None:
                await self.claim_and_send(job)
        except BaseException as error:
            self.queue.stop(error)
            raise

    async def take_more(self, more: AsyncIterator[list[RequestJob]]) -> None:
        """Queue the jobs that `more` brings; close the queue when it ends."""
        try:
            async for jobs in more:
                self.queue.add(jobs)
            self.queue.close()
        except BaseException as error:
            self.queue.stop(error)
            raise

    async def claim_and_send(self, job: RequestJob) -> None:
        """Send a job unless another thread or process is asking it or has answered it."""
        if not self.store.claim(job.key):
            self.queue.put_back(job, CLAIM_POLL_SECONDS)
            return
        stored: Future[None] | None = None
        try:
            raw = self.store.get(job.key)
            if raw:
                self.finish(job, self.session.read_raw(job.body, raw), paid=False)
            elif self.pending.contains(job.key):
                self.in_batches.append(job)
                self.queue.mark_done()
            elif await self.reserve(job):
                stored = await self.send_once(job)
        finally:
            if stored:
                stored.add_done_callback(lambda _: self.store.release(job.key))
            else:
                self.store.release(job.key)

    async def reserve(self, job: RequestJob) -> bool:
        """Wait until the maximum cost of a job fits the budget; False, and an error in the queue, if it never will."""
        while not self.session.reserve(job):
            if not self.session.budget.has_reservations:
                self.queue.stop(self.session.over_budget_error(job))
            if self.queue.ended:
                return False
            await asyncio.sleep(BUDGET_POLL_SECONDS)
        return True

    async def send_once(self, job: RequestJob) -> Future[None] | None:
        """Send a job once and handle its reply; returns the future of the store's write if an answer came."""
        sent = self.loop.time()
        try:
            if (wait := self.pacer.next_delay(sent, self.queue.limit)) > 0:
                await asyncio.sleep(wait)
            await self.record_sent(job)
            sent = self.loop.time()
            with self.count_in_flight():
                return await self.post(job, sent)
        except asyncio.CancelledError:
            if job.sent:
                seconds = self.loop.time() - sent
                with suppress(TapirError):
                    self.session.store_attempt(job, "interrupted while in flight", b"", seconds, job.reserved)
            raise
        finally:
            self.session.release(job)

    @contextmanager
    def count_in_flight(self) -> Iterator[None]:
        """Count a request while its reply is waited for, and as abandoned if it is cancelled."""
        self.in_flight += 1
        try:
            with self.session.options.meter.in_flight():
                yield
        except asyncio.CancelledError:
            self.session.abandoned += 1
            raise
        finally:
            self.in_flight -= 1

    async def record_sent(self, job: RequestJob) -> None:
        """Record a job that is about to be sent; if a budget counts it, wait until the record is on disk."""
        if not self.session.billing.is_billed:
            return
        recorded = self.session.record_sent(job)
        if self.session.budget.has_limits:
            await asyncio.wrap_future(recorded)

    async def post(self, job: RequestJob, sent: float) -> Future[None] | None:
        """Post one request and handle its reply or failure."""
        body = orjson.dumps(body_for_stream(job.body, self.wants_usage) if self.endpoint.stream else job.body)
        request = self.http.build_request("POST", self.url, content=body, headers=self.headers)
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                response = await post_request(self.http, request)
        except transport_errors() as error:
            bill = None if never_sent(error) else job.reserved
            failure = classify_transport_error(error, self.endpoint, self.reached, job.tries)
            self.handle_failure(job, failure, sent, bill)
            return None
        if response.is_success:
            return self.handle_reply(job, response, sent)
        self.reached = True
        bill = job.reserved if may_be_billed(response) else None
        self.handle_failure(job, classify_error_response(response, self.endpoint), sent, bill)
        return None

    def handle_reply(self, job: RequestJob, response: httpx2.Response, sent: float) -> Future[None] | None:
        """Store a reply before anything else, then see whether it is an answer."""
        raw, seconds = response.content, self.loop.time() - sent
        self.reached, self.refused_since, self.loading_since = True, None, None
        self.pacer.add_duration(seconds)
        try:
            raw = join_stream(raw) if self.endpoint.stream and is_event_stream(raw) else raw
            raw = mask_key_in_answer(raw, self.client)
            reply = self.session.read_raw(job.body, raw)
        except ValueError as error:
            self.handle_unreadable_reply(job, response, raw, error, sent)
            return None
        stored = self.session.store_reply(job, raw, reply, seconds)
        if stored:
            stored.add_done_callback(self.stop_if_not_stored)
        self.queue.count_answer()
        self.session.options.meter.limit(self.queue.limit)
        pause = allowance_wait(response.headers)
        if pause:
            self.pause(min(pause, self.patience))
        if reply.again and job.tries + 1 < self.endpoint.attempts:
            self.retry(job)
        else:
            self.finish(job, reply, paid=True)
        if useless := self.session.useless_replies_error(job, reply.why, reply.finish == "length"):
            self.queue.stop(useless)
        return stored

    def handle_unreadable_reply(
        self, job: RequestJob, response: httpx2.Response, raw: bytes, error: ValueError, sent: float
    ) -> None:
        """Handle a reply of status 200 that is not a chat completion, or a stream that was cut."""
        failure = classify_unreadable_reply(raw, response.headers, self.endpoint)
        if self.endpoint.stream and is_event_stream(raw):
            failure = RequestFailure("retry", str(error), raw, names_cause=False, when_exhausted="skip_row")
        self.session.outcomes.count_unreadable()
        self.session.options.meter.count("unreadable")
        self.handle_failure(job, failure, sent, job.reserved)
        if useless := self.session.useless_replies_error(job, mask_key(failure.why, self.client)):
            self.queue.stop(useless)

    def stop_if_not_stored(self, stored: Future[None]) -> None:
        """Stop asking if the store could not write; called by the store's thread."""
        error = stored.exception()
        if error:
            with suppress(RuntimeError):  # the loop has ended: `flush` will raise the same error
                self.loop.call_soon_threadsafe(self.queue.stop, error)

    def handle_failure(self, job: RequestJob, failure: RequestFailure, sent: float, bill: Bill | None = None) -> None:
        """Record a request without an answer and what may have been billed; then retry, wait, skip the row or stop."""
        why = mask_key(failure.why, self.client)
        body, seconds = mask_key_in_body(failure.body, self.client), self.loop.time() - sent
        self.session.store_attempt(job, why, body, seconds, bill)
        tries = min(failure.max_tries or self.endpoint.attempts, self.endpoint.attempts)
        if self.wants_usage and self.endpoint.stream and "stream_options" in why:
            self.wants_usage = False
            self.queue.put_back(job, 0.0)
        elif failure.action == "wait":
            self.wait_for_rate_limit(job, failure, why)
        elif failure.action == "wait_for_model":
            self.wait_for_model(job, failure, why)
        elif failure.action == "retry" and job.tries + 1 < tries:
            self.retry(job, requested_wait(failure.headers), why)
        else:
            self.skip_row_or_stop(job, failure._replace(why=why))

    def retry(self, job: RequestJob, requested: float | None = None, why: str = "") -> None:
        """Try again after the time that the server requests, or after a jittered backoff."""
        if requested is not None and requested > self.patience:
            self.stop_at_rate_limit(job, why, requested)
            return
        job.tries += 1
        self.session.options.meter.count("retries")
        self.session.tries[job.key] = job.tries
        job.live_before = self.session.outcomes.live
        wait = backoff_seconds(job.tries, random.Random(f"{job.key.hex()}-{job.tries}").random())
        self.queue.put_back(job, wait if requested is None else requested)

    def wait_for_model(self, job: RequestJob, failure: RequestFailure, why: str) -> None:
        """Pause all requests while the server loads its model. No attempt is used up."""
        now = self.loop.time()
        self.loading_since = now if self.loading_since is None else self.loading_since
        longest = min(MAX_LOADING_SECONDS, self.patience)
        pause = min(requested_wait(failure.headers) or LOADING_POLL_SECONDS, longest)
        if now + pause - self.loading_since > longest:
            fix = f"Read the server's log to see why its model does not load, then {RERUN_CLAUSE}"
            what = f"{why}; the server is still loading its model after {longest:,.0f} s"
            self.queue.stop(self.session.row_error(job, what, fix))
            return
        status = f"the server is loading its model ({now - self.loading_since:,.0f} s)"
        self.session.options.tell(self.session.finished, len(self.session.requests), status)
        self.pause(pause)
        self.queue.put_back(job, pause)

    def pause(self, seconds: float) -> None:
        """Send nothing for `seconds`."""
        self.queue.pause(seconds)
        self.session.options.meter.pause(seconds)

    def wait_for_rate_limit(self, job: RequestJob, failure: RequestFailure, why: str) -> None:
        """After a 429, wait. No attempt is used up.

        All requests wait if the server says how long, or refuses everything; otherwise only this job waits.
        """
        now = self.loop.time()
        self.refused_since = now if self.refused_since is None else self.refused_since
        rounds_refused = self.queue.count_refusal()
        self.session.options.meter.count("rate_limited")
        self.session.options.meter.limit(self.queue.limit)
        job.rate_limited += 1
        chance = random.Random(f"{job.key.hex()}-{now}").random()
        requested = requested_wait(failure.headers)
        pause = requested or backoff_seconds(max(rounds_refused, job.rate_limited), chance)
        if now + pause - self.refused_since > self.patience:
            self.stop_at_rate_limit(job, why, pause)
            return
        if requested or rounds_refused:
            self.pause(pause)
        self.queue.put_back(job, pause)

    def stop_at_rate_limit(self, job: RequestJob, why: str, wait: float) -> None:
        """Stop asking: the server wants a longer pause than `patience` allows."""
        what = f"{why}; the next request may be sent in {wait:,.0f} s"
        self.queue.stop(self.session.row_error(job, what, f"Wait, and then {RERUN_CLAUSE}"))

    def skip_row_or_stop(self, job: RequestJob, failure: RequestFailure) -> None:
        """Leave a job's row out, or stop asking, depending on the failure."""
        if error := self.session.skip_row_or_error(job, failure):
            self.queue.stop(error)
        else:
            self.queue.mark_done()

    def tell_of_requests_in_flight(self) -> None:
        """After Ctrl-C, say what is waited for."""
        if self.in_flight:
            requests = format_count(self.in_flight, "request")
            seconds = f"at most {INTERRUPT_GRACE_SECONDS:g} s for {requests} in flight"
            self.session.warn(f"stopping; waiting {seconds}. Another Ctrl-C abandons them")

    def warn_of_key(self) -> None:
        """Warn once that the key is sent unencrypted over a network."""
        warning = unencrypted_key_warning(self.endpoint, self.client.api_key)
        if warning and self.session.identity not in WARNED_ENDPOINTS:
            WARNED_ENDPOINTS.add(self.session.identity)
            self.session.warn(warning)

    def finish(self, job: RequestJob, reply: Reply, paid: bool) -> None:
        """Set the answers of a job's places and take it out of the queue."""
        self.session.finish_job(job, reply, paid)
        self.queue.mark_done()


def never_sent(error: Exception) -> bool:
    """Whether a request failed before a server received it; if a connection broke later, the server may have worked."""
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
    if status == STATUS_UNAVAILABLE:
        return requested_wait(response.headers) is None and b"loading" not in response.content.lower()
    return status >= STATUS_SERVER_ERROR or status == STATUS_REQUEST_TIMEOUT
