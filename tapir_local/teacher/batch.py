"""Ask by OpenAI's Batch API: half the price, answers within a day, and no request submitted twice."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tapir_local.errors import TapirError
from tapir_local.printable import format_count
from tapir_local.store import keys
from tapir_local.store.reply import Reply
from tapir_local.teacher.batch_api import (
    DAY_SECONDS,
    BatchClient,
    batch_line,
    classify_result_line,
    describe_batch_progress,
    describe_failed_batch,
    has_ended,
    parse_result_lines,
    queue_was_full,
    reply_body_of_line,
    split_into_batches,
)
from tapir_local.teacher.budget import BATCH_DISCOUNT, Bill
from tapir_local.teacher.endpoint import (
    askable_kind,
    describe_key_source,
    endpoint_role,
    mask_key,
    mask_key_in_body,
    open_http_client,
    open_openai_client,
)
from tapir_local.teacher.pending_batches import PendingBatch, PendingBatches
from tapir_local.teacher.refusals import RequestFailure, classify_unreadable_reply
from tapir_local.teacher.session import AskSession, RequestJob

if TYPE_CHECKING:
    from openai.types import Batch

LOST_AFTER_SECONDS = 2 * DAY_SECONDS  # a batch ends within a day; one that is unknown after two days is lost
TURN_POLL_SECONDS = 0.2  # between checks whether another thread or process has finished submitting
CLAIM_SIZE = 1000  # keys claimed at once: the cost of a claim grows with them (10,000 take 2.3 s, 1,000 take 0.01 s)


class SubmittedBatch(NamedTuple):
    """A pending batch and those of our jobs that it will answer."""

    batch: PendingBatch
    jobs: list[RequestJob]


async def send_batches(session: AskSession, pending: PendingBatches, jobs: list[RequestJob]) -> list[RequestJob]:
    """Answer the jobs by batches: pending batches are waited for, the remaining jobs are submitted.

    If the recipe asks by live requests nothing is submitted, and the jobs that are in no batch are returned. TapirError
    if the endpoint has no Batch API or cannot be used, refuses a batch or a row, or cannot be reached for
    `session.options.patience` seconds; answers that came before the error are in the store.
    """
    import openai

    endpoint, options = session.endpoint, session.options
    check_batch_settings(session)

    def say(text: str) -> None:
        options.tell(session.finished, len(session.requests), text)

    async with open_openai_client(endpoint, open_http_client(endpoint, options.transport)) as client:
        try:
            return await BatchSender(session, pending, BatchClient(client, session, say)).send(jobs)
        except openai.NotFoundError as error:
            what = f"the endpoint has no Batch API ({error.status_code} for {error.request.url.path})"
            fix = f"Set {endpoint_role(endpoint)}.batch: false to ask by live requests."
            raise TapirError(what, where=session.identity, fix=fix) from error


def check_batch_settings(session: AskSession) -> None:
    """Raise TapirError if the recipe asks by batch, and the endpoint's kind or the store does not allow it."""
    endpoint, role = session.endpoint, endpoint_role(session.endpoint)
    if not endpoint.batch:
        return
    if askable_kind(endpoint) != "openai":
        what = "only an endpoint of kind `openai` can be asked by batch"
        raise TapirError(what, where=f"{role}.batch", fix="Remove the setting from the recipe.")
    if not session.store.writes:
        what = "batches need a writable store, which records the pending ones"
        fix = f"Open the store for writing, or set {role}.batch: false."
        raise TapirError(what, where=str(session.store.path), fix=fix)


class BatchSender:
    """Answers the jobs of a session by batches, as many at once as the server accepts."""

    def __init__(self, session: AskSession, pending: PendingBatches, client: BatchClient) -> None:
        self.session, self.endpoint, self.store = session, session.endpoint, session.store
        self.pending, self.client, self.limits = pending, client, session.options.batch_limits
        self.unanswered: dict[bytes, RequestJob] = {}
        self.max_requests, self.max_batches = self.limits.requests, sys.maxsize  # in a batch; pending at once
        self.pause = self.limits.first_wait
        self.failed: TapirError | None = None

    async def send(self, jobs: list[RequestJob]) -> list[RequestJob]:
        """Work until every job is answered; returns jobs that are in no batch if none may be submitted."""
        self.unanswered = {job.key: job for job in jobs}
        while self.unanswered:
            async with self.turn():
                batches = await self.find_pending()
                if self.endpoint.batch:
                    batches += await self.submit(batches)
            if not batches and not self.endpoint.batch:
                break
            if not batches and self.unanswered:
                self.check_budget()
            await self.watch(batches)
        return list(self.unanswered.values())

    def check_budget(self) -> None:
        """Raise TapirError if no batch is pending and the remaining jobs do not fit the budget."""
        job = next(iter(self.unanswered.values()))
        if not self.session.reserve(job) and not self.session.budget.has_reservations:
            raise self.session.over_budget_error(job)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Let one thread or process at a time look for the endpoint's batches, submit and fetch."""
        name = keys.hash_request(f"batches of {self.session.identity}".encode())
        while not self.store.claim(name):
            await asyncio.sleep(TURN_POLL_SECONDS)
        try:
            yield
        finally:
            self.store.release(name)

    async def find_pending(self) -> list[SubmittedBatch]:
        """The pending batches with unanswered jobs. One without the server's id was left by an interrupted run."""
        batches = []
        for batch, batch_keys in self.pending.of_endpoint(self.session.identity):
            jobs = [self.unanswered[key] for key in batch_keys if key in self.unanswered]
            if jobs and not batch.server:
                batch = replace(batch, server=await self.recover_id(batch))
            if jobs and batch.server:
                batches.append(SubmittedBatch(batch, jobs))
                for job in jobs:
                    self.session.reserve_anyway(job)
        return batches

    async def recover_id(self, batch: PendingBatch) -> str:
        """The server's id of a batch whose submission was interrupted; "", and it is removed, if never created."""
        server = await self.client.find_batch(batch) if batch.file else ""
        if server:
            self.pending.set_server_id(batch.tag, server)
        else:
            self.pending.remove(batch.tag)
        return server

    async def submit(self, batches: Sequence[SubmittedBatch]) -> list[SubmittedBatch]:
        """Submit the jobs that are in no batch, in as many batches as needed and as the server accepts."""
        pending = {job.key for batch in batches for job in batch.jobs}
        left = [job for job in self.unanswered.values() if job.key not in pending and self.session.reserve(job)]
        made: list[SubmittedBatch] = []
        for jobs in split_into_batches(left, self.max_requests, self.limits.size):
            if len(batches) + len(made) >= self.max_batches:
                break
            made += await self.submit_batch(jobs)
        return made

    async def submit_batch(self, jobs: Sequence[RequestJob]) -> list[SubmittedBatch]:
        """Submit one batch of the jobs not in flight elsewhere; its tag and keys are on disk before it is sent."""
        tag = uuid.uuid4().hex
        self.pending.add(tag, self.session.identity)
        mine: list[RequestJob] = []
        for start in range(0, len(jobs), CLAIM_SIZE):
            mine += self.claim_for_batch(tag, jobs[start : start + CLAIM_SIZE])
        if not mine:
            self.pending.remove(tag)
            return []
        self.client.say(f"uploading {format_count(len(mine), 'request')}")
        file = await self.client.upload(tag, b"".join(map(batch_line, mine)))
        server = await self.client.submit(tag, file, self.pending)
        self.pending.set_server_id(tag, server)
        return [SubmittedBatch(PendingBatch(tag, file, server, created=time.time()), mine)]

    def claim_for_batch(self, tag: str, jobs: Sequence[RequestJob]) -> list[RequestJob]:
        """Record as the batch's those jobs that no other run is asking or has answered; returns them."""
        mine, claimed = [], [job for job in jobs if self.store.claim(job.key)]
        try:
            for job in claimed:
                raw = self.store.get(job.key)
                if raw:
                    self.finish(job, self.session.read_raw(job.body, raw), paid=False)
                else:
                    mine.append(job)
            self.pending.add_keys(tag, [job.key for job in mine])
        finally:
            for job in claimed:
                self.store.release(job.key)
        return mine

    async def watch(self, batches: Sequence[SubmittedBatch]) -> None:
        """Ask for the status of each batch once; fetch from those that have ended, or wait a while."""
        seen = [(batch, made) for batch in batches if (made := await self.retrieve(batch))]
        self.client.say(describe_batch_progress([made for _, made in seen]))
        ended = [(batch, made) for batch, made in seen if has_ended(made)]
        if ended:
            self.pause = self.limits.first_wait
            self.adapt_limits(seen)
            async with self.turn():
                for batch, made in ended:
                    await self.fetch(batch, made)
        elif self.unanswered:
            await asyncio.sleep(self.pause)
            self.pause = min(self.limits.longest_wait, 1.5 * self.pause)
        if self.failed:
            raise self.failed

    async def retrieve(self, submitted: SubmittedBatch) -> Batch | None:
        """The batch as the server has it; None if the server has forgotten it after LOST_AFTER_SECONDS."""
        import openai

        batch = submitted.batch
        try:
            made = await self.client.retrieve(batch.server)
        except openai.NotFoundError as error:
            if time.time() < batch.created + LOST_AFTER_SECONDS:
                raise self.unknown_batch_error(submitted) from error
            self.pending.remove(batch.tag)
            for job in submitted.jobs:
                why = f"batch {batch.server} is gone from the server"
                self.session.store_attempt(job, why, b"", 0.0, job.reserved)
                self.session.release(job)
            return None
        if made.status != batch.state:
            self.pending.set_state(batch.tag, made.status)
        return made

    def unknown_batch_error(self, submitted: SubmittedBatch) -> TapirError:
        """The error for a batch that the endpoint should know and does not."""
        count = len(submitted.jobs)
        what = f"the endpoint does not know batch {submitted.batch.server}, which contains {count:,} of the requests"
        key = describe_key_source(self.endpoint)
        fix = f"Check that the key in the {key} belongs to the account that submitted the batch."
        fix = f"{fix} Two days after its creation the batch is treated as lost."
        return TapirError(what, where=self.session.identity, fix=fix)

    def adapt_limits(self, seen: Sequence[tuple[SubmittedBatch, Batch]]) -> None:
        """Keep no more batches pending than the server just accepted, and one more for each that has ended.

        If even a single batch was refused for lack of space, batches of half its size are tried, down to one request.
        """
        refused = [(len(batch.jobs), made) for batch, made in seen if queue_was_full(made)]
        if refused:
            self.max_batches = max(1, len(seen) - len(refused))
        if refused and len(seen) == 1:
            ((size, made),) = refused
            self.max_requests = max(1, size // 2)
            if size == 1:
                self.fail(made, "Wait until other batches of the account are done, then run the same command again.")
        else:
            ended = sum(made.status != "failed" and has_ended(made) for _, made in seen)
            self.max_batches = min(sys.maxsize, self.max_batches + ended)

    def fail(self, made: Batch, fix: str) -> None:
        """Stop with the server's message about a failed batch; a run that asks live sends its requests instead."""
        if not self.endpoint.batch:
            return
        what = mask_key(f"batch {made.id} failed: {describe_failed_batch(made)}", self.client.client)
        self.failed = self.failed or TapirError(what, where=self.session.identity, fix=fix)

    async def fetch(self, submitted: SubmittedBatch, made: Batch) -> None:
        """Store the answers of a batch that has ended, unless another process did so before our turn."""
        tag = submitted.batch.tag
        if made.status == "failed":
            self.pending.remove(tag)
            if not queue_was_full(made):
                self.fail(
                    made, "Correct what the message names (model, account, extra), then run the same command again."
                )
            return
        left = self.pending.keys(tag)
        jobs = [job for job in submitted.jobs if job.key in left]
        lines = await self.download_lines(made) if jobs else {}
        for job in jobs:
            self.handle_result(job, lines.get(job.key), made)
        self.store.flush()
        self.pending.remove_keys(tag, [job.key for job in jobs])

    async def download_lines(self, made: Batch) -> dict[bytes, Any]:
        """The lines of a batch's output and error files by key; both files are held in memory."""
        found: dict[bytes, Any] = {}
        for file in filter(None, (made.error_file_id, made.output_file_id)):
            found |= parse_result_lines(await self.client.download(file))
        return found

    def handle_result(self, job: RequestJob, line: Any, made: Batch) -> None:
        """Store a job's result as a live reply is stored, then check whether it is an answer."""
        seconds = float(made.completed_at - made.created_at) if made.completed_at else 0.0
        raw = reply_body_of_line(line)
        if raw is None:
            default = f"no answer in batch {made.id}, whose status is {made.status}"
            lost = line is None and made.status == "completed"  # answered and billed, though no line has the answer
            failure = classify_result_line(line, self.endpoint, default)
            self.handle_failure(job, failure, seconds, job.reserved if lost else None)
            return
        try:
            reply = self.session.read_raw(job.body, raw)
        except ValueError:
            self.handle_failure(job, classify_unreadable_reply(raw, {}, self.endpoint), seconds, job.reserved)
            return
        discount = 1.0 if self.endpoint.batch else BATCH_DISCOUNT  # without `batch` the price is that of live requests
        self.session.store_reply(job, raw, reply, seconds, discount)
        self.session.release(job)
        if reply.again and job.tries + 1 < self.endpoint.attempts:
            job.tries += 1
        else:
            self.finish(job, reply, paid=True)
        self.failed = self.failed or self.session.useless_replies_error(job, reply.why, reply.finish == "length")

    def handle_failure(
        self, job: RequestJob, failure: RequestFailure, seconds: float, bill: Bill | None = None
    ) -> None:
        """Record a job without an answer and what may have been billed; then leave it for the next batch, or stop."""
        client = self.client.client
        why = mask_key(failure.why, client)
        self.session.store_attempt(job, why, mask_key_in_body(failure.body, client), seconds, bill)
        self.session.release(job)
        tries = min(failure.max_tries or self.endpoint.attempts, self.endpoint.attempts)
        if failure.action not in ("stop", "skip_row") and job.tries + 1 < tries:
            job.tries += 1
        elif error := self.session.skip_row_or_error(job, failure._replace(why=why)):
            self.failed = self.failed or error
        else:
            del self.unanswered[job.key]

    def finish(self, job: RequestJob, reply: Reply, paid: bool) -> None:
        """Set the answers of a job's places."""
        del self.unanswered[job.key]
        self.session.release(job)
        self.session.finish_job(job, reply, paid)
