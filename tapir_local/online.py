"""Send requests over HTTP: many at once, each answered once, in spite of all that servers and networks do."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING

import orjson

from tapir_local.account import Bill
from tapir_local.asking import Asking, Job
from tapir_local.away import Away
from tapir_local.endpoint import chat_of, client_of, hidden, hidden_in, http_of, key_place
from tapir_local.errors import TapirError
from tapir_local.pace import Line, Pace, backoff, used_up, wait_asked
from tapir_local.replies import Reply, Trouble, read_reply, trouble_of

if TYPE_CHECKING:
    from concurrent.futures import Future

    import httpx2

GRACE = 10.0  # seconds that requests in flight get to come home after Ctrl-C
ASKED_ELSEWHERE = 0.05  # seconds between looks at a request that another thread or process is asking
SHORT_OF_MONEY = 0.05  # seconds between looks at a budget that requests in flight may leave room in
TIMED_OUT, SERVER_ERROR, UNAVAILABLE = 408, 500, 503
NOTHING_LOST = "run the same command again: nothing paid for is lost."


class Online:
    """The jobs of an Asking on their way: a line of those waiting, workers that send, and what becomes of each."""

    def __init__(self, asking: Asking, away: Away, patience: float) -> None:
        self.asking, self.endpoint, self.store = asking, asking.endpoint, asking.store
        self.away, self.patience = away, patience
        self.left: list[Job] = []
        self.refused_since: float | None = None
        self.reached = False
        self.pace = Pace()

    async def send(self, jobs: list[Job], transport: httpx2.AsyncBaseTransport | None) -> list[Job]:
        """Send the jobs, as many at once as the endpoint bears; those in a batch since come back."""
        most = min(self.endpoint.concurrency, len(jobs))
        self.loop, self.line = asyncio.get_running_loop(), Line(jobs, most)
        async with http_of(self.endpoint, transport) as self.http:
            self.client = client_of(self.endpoint, self.http)
            self.url, self.headers = chat_of(self.client)
            workers = [asyncio.create_task(self.work(number)) for number in range(most)]
            try:
                await asyncio.wait(workers)
            except asyncio.CancelledError as interrupted:
                self.line.stop(interrupted)
                await asyncio.wait(workers, timeout=GRACE)
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

    async def claim_and_try(self, job: Job) -> None:
        """Send a job unless somebody else is at it, or was meanwhile."""
        if not self.store.claim(job.key):
            self.line.later(job, ASKED_ELSEWHERE)
            return
        kept: Future[None] | None = None
        try:
            raw = self.store.get(job.key)
            if raw:
                self.finish(job, read_reply(raw), paid=False)
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

    async def affordable(self, job: Job) -> bool:
        """Wait until the budget has room for the most that a job can cost; False, and the end, when it never will."""
        while not self.asking.reserve(job):
            if not self.asking.purse.waiting:
                self.line.stop(self.asking.over_budget(job))
            if self.line.failed:
                return False
            await asyncio.sleep(SHORT_OF_MONEY)
        return True

    async def attempt(self, job: Job) -> Future[None] | None:
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

    async def record(self, job: Job) -> None:
        """Record a job that is about to be sent: on the disk before it goes, where a budget counts it."""
        if not self.asking.account.bills:
            return
        recorded = self.asking.send(job)
        if self.asking.purse.limited:
            await asyncio.wrap_future(recorded)

    async def exchange(self, job: Job, sent: float) -> Future[None] | None:
        """One request and what came of it."""
        import httpx2

        try:
            async with asyncio.timeout(self.endpoint.timeout):
                response = await self.http.post(self.url, content=orjson.dumps(job.body), headers=self.headers)
        except (TimeoutError, httpx2.RequestError) as error:
            self.suffer(job, self.broken(error, job), sent, None if never_sent(error) else job.reserved)
            return None
        if response.is_success:
            return self.received(job, response, sent)
        trouble = trouble_of(response, key_place(self.endpoint), str(self.endpoint.model))
        self.suffer(job, trouble, sent, job.reserved if may_be_billed(response) else None)
        return None

    def received(self, job: Job, response: httpx2.Response, sent: float) -> Future[None] | None:
        """Store what came before anything else, then see whether it is an answer."""
        raw, seconds = response.content, self.loop.time() - sent
        self.reached, self.refused_since = True, None
        self.pace.took(seconds)
        try:
            reply = read_reply(raw)
        except ValueError:
            self.suffer(job, Trouble("again", "the reply is not a chat completion", raw), sent, job.reserved)
            return None
        kept = self.asking.keep(job, raw, reply, seconds)
        if kept:
            kept.add_done_callback(self.written)
        self.line.answered()
        pause = used_up(response.headers)
        if pause:
            self.line.hold(min(pause, self.patience))
        if reply.finish == "stop" and not kept and job.tries + 1 < self.endpoint.attempts:
            self.again(job)
        else:
            self.finish(job, reply, paid=True)
        return kept

    def written(self, kept: Future[None]) -> None:
        """Called by the store's thread: when it could not write, nothing more is asked for."""
        error = kept.exception()
        if error:
            with suppress(RuntimeError):  # the loop has ended: `flush` will raise the same error
                self.loop.call_soon_threadsafe(self.line.stop, error)

    def suffer(self, job: Job, trouble: Trouble, sent: float, bill: Bill | None = None) -> None:
        """No answer came: note it with what may have been billed for it, and try again, wait, or stop."""
        why = hidden(trouble.why, self.client)
        self.asking.note(job, why, hidden_in(trouble.body, self.client), self.loop.time() - sent, bill)
        if trouble.then == "filtered":
            self.finish(job, Reply("", "content_filter", "", "", 0, 0), paid=True)
        elif trouble.then == "wait":
            self.wait(job, trouble, why)
        elif trouble.then == "again" and job.tries + 1 < self.endpoint.attempts:
            self.again(job, wait_asked(trouble.headers))
        else:
            self.give_up(job, why, trouble.fix)

    def again(self, job: Job, asked: float | None = None) -> None:
        """Another try, after the time that the server asks for or a jittered backoff."""
        job.tries += 1
        wait = backoff(job.tries, random.Random(f"{job.key.hex()}-{job.tries}").random())
        self.line.later(job, wait if asked is None else min(asked, self.patience))

    def wait(self, job: Job, trouble: Trouble, why: str) -> None:
        """429: all wait when the server says how long, or refuses everything; else this job. No attempt is used up."""
        now = self.loop.time()
        self.refused_since = now if self.refused_since is None else self.refused_since
        over = self.line.refused()
        job.refusals += 1
        chance = random.Random(f"{job.key.hex()}-{now}").random()
        asked = wait_asked(trouble.headers)
        pause = asked or backoff(max(over, job.refusals), chance)
        if now + pause - self.refused_since > self.patience:
            self.give_up(job, f"{why}; the next request may go in {pause:.0f} s", f"Wait, and {NOTHING_LOST}")
            return
        if asked or over:
            self.line.hold(pause)
        self.line.later(job, pause)

    def broken(self, error: TimeoutError | httpx2.RequestError, job: Job) -> Trouble:
        """No connection, one that broke, or no answer in time. A server that was never reached is given up soon."""
        import httpx2

        late = TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout, httpx2.PoolTimeout
        if isinstance(error, late):
            return Trouble("again", f"no answer within {self.endpoint.timeout:g} s")
        fix = f"Start the server or mend base_url, and {NOTHING_LOST}"
        never = isinstance(error, httpx2.ConnectError) and not self.reached and job.tries > 0
        return Trouble("stop" if never else "again", f"no connection ({str(error) or type(error).__name__})", fix=fix)

    def give_up(self, job: Job, why: str, fix: str) -> None:
        """Stop asking, for this reason."""
        self.line.stop(self.asking.refusal(job, why, fix))

    def finish(self, job: Job, reply: Reply, paid: bool) -> None:
        """Serve a job's places, and out of the line with it."""
        self.asking.finish(job, reply, paid)
        self.line.done()


def never_sent(error: Exception) -> bool:
    """Whether a request failed before a server had it; a connection that broke later may have been worked on."""
    import aiohttp
    import httpx2

    unsent = (httpx2.ConnectError, httpx2.ProxyError, httpx2.UnsupportedProtocol, httpx2.PoolTimeout)
    return isinstance(error, unsent) or isinstance(error.__cause__, aiohttp.ConnectionTimeoutError)


def may_be_billed(response: httpx2.Response) -> bool:
    """Whether a server may have worked on a request before it answered with an error.

    Vendors do not bill their own failures, but behind a gateway's 5xx or 408 a server may have generated a whole reply.
    A 503 that says when to come back refuses before any work, as a 429 does; so do all other 4xx.
    """
    status = response.status_code
    if status == UNAVAILABLE:
        return wait_asked(response.headers) is None and b"loading" not in response.content.lower()
    return status >= SERVER_ERROR or status == TIMED_OUT
