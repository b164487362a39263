"""Ask by OpenAI's Batch API: half the price, answers within a day, and no request submitted twice."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tapir_local.errors import TapirError
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
    mask_key,
    mask_key_in_body,
    open_http_client,
    open_openai_client,
)
from tapir_local.teacher.pending_batches import DEFAULT_BATCH_LIMITS, BatchLimits, PendingBatch, PendingBatches
from tapir_local.teacher.refusals import RequestFailure, classify_unreadable_reply
from tapir_local.teacher.session import AskSession, RequestJob

if TYPE_CHECKING:
    import httpx2
    from openai.types import Batch

Tell = Callable[[int, int, str], None]

LOST_AFTER_SECONDS = (
    2 * DAY_SECONDS
)  # a batch ends within a day: what the endpoint does not know after two, it never will
TURN_POLL_SECONDS = 0.2  # seconds between looks at whether another thread or process has finished submitting
CLAIM_SIZE = 1000  # keys claimed at once: a claim costs more the more there are (10,000 take 2.3 s, 1,000 take 0.01 s)


class SubmittedBatch(NamedTuple):
    """A batch that is away, and those of our jobs that it answers."""

    batch: PendingBatch
    jobs: list[RequestJob]


def untold(done: int, total: int, text: str) -> None:
    """Nobody is told."""


async def send_batches(
    asking: AskSession,
    away: PendingBatches,
    jobs: list[RequestJob],
    *,
    patience: float,
    bounds: Bounds = DEFAULT_BATCH_LIMITS,
    tell: Tell = untold,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> list[RequestJob]:
    """Answer the jobs by batches: those that are away already are waited for, the rest is submitted.

    Where the recipe asks the live API nothing is submitted, and the jobs that no batch holds come back. `tell` is
    called with (done, all, what the batches are at). TapirError when the endpoint has no Batch API or cannot be used,
    refuses a batch or a row, or is out of reach for `patience` seconds; what came before is in the store.
    """
    import openai

    endpoint = asking.endpoint
    if endpoint.batch and askable_kind(endpoint) != "openai":
        raise TapirError("only an endpoint of kind `openai` can be asked by batch", fix="Leave `batch` out.")
    if endpoint.batch and not asking.store.writes:
        what = "batches need the store, which remembers those that are away"
        raise TapirError(what, where=str(asking.store.path), fix="Open it for writing, or set `batch: false`.")

    def say(text: str) -> None:
        tell(asking.finished, len(asking.requests), text)

    async with open_openai_client(endpoint, open_http_client(endpoint, transport)) as client:
        server = BatchClient(client, endpoint, asking.identity, patience, say)
        try:
            return await BatchSender(asking, away, server, bounds).send(jobs)
        except openai.NotFoundError as error:
            what = f"there is no Batch API here ({error.status_code} for {error.request.url.path})"
            raise TapirError(what, where=asking.identity, fix="Set `batch: false` to ask the live API.") from error


class BatchSender:
    """The jobs of an Asking that batches answer: those without an answer, and how much the server has room for."""

    def __init__(self, asking: AskSession, away: PendingBatches, server: BatchClient, bounds: BatchLimits) -> None:
        self.asking, self.endpoint, self.store = asking, asking.endpoint, asking.store
        self.away, self.server, self.bounds = away, server, bounds
        self.waiting: dict[bytes, RequestJob] = {}
        self.most, self.room = bounds.requests, sys.maxsize  # requests in a batch, and batches away at once
        self.pause = bounds.first_wait
        self.failed: TapirError | None = None

    async def send(self, jobs: list[RequestJob]) -> list[RequestJob]:
        """Until every job is answered, or is held by no batch and none may be submitted: those come back."""
        self.waiting = {job.key: job for job in jobs}
        while self.waiting:
            async with self.turn():
                parts = await self.found()
                if self.endpoint.batch:
                    parts += await self.submit(parts)
            if not parts and not self.endpoint.batch:
                break
            if not parts and self.waiting:
                self.refuse_unaffordable()
            await self.watch(parts)
        return list(self.waiting.values())

    def refuse_unaffordable(self) -> None:
        """TapirError when nothing is away and the budget has no room for what is left."""
        job = next(iter(self.waiting.values()))
        if not self.asking.reserve(job) and not self.asking.purse.waiting:
            raise self.asking.over_budget(job)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """One thread or process at a time looks for the endpoint's batches, submits and fetches."""
        name = keys.hash_request(f"batches of {self.asking.identity}".encode())
        while not self.store.claim(name):
            await asyncio.sleep(TURN_POLL_SECONDS)
        try:
            yield
        finally:
            self.store.release(name)

    async def found(self) -> list[SubmittedBatch]:
        """The batches that hold waiting jobs; in our turn, one without the server's id was left by a cut run."""
        parts = []
        for batch, held in self.away.holding(self.asking.identity):
            jobs = [self.waiting[key] for key in held if key in self.waiting]
            if jobs and not batch.server:
                batch = replace(batch, server=await self.adopted(batch))
            if jobs and batch.server:
                parts.append(SubmittedBatch(batch, jobs))
                for job in jobs:
                    self.asking.reserve_anyway(job)
        return parts

    async def adopted(self, batch: PendingBatch) -> str:
        """The server's id of a batch whose making was cut; "" when it was never made, and is forgotten."""
        server = await self.server.look_for(batch, self.bounds) if batch.file else ""
        if server:
            self.away.named(batch.tag, server)
        else:
            self.away.forget(batch.tag)
        return server

    async def submit(self, parts: Sequence[SubmittedBatch]) -> list[SubmittedBatch]:
        """Submit what no batch holds, in as many batches as it takes and the server has room for."""
        held = {job.key for part in parts for job in part.jobs}
        left = [job for job in self.waiting.values() if job.key not in held and self.asking.reserve(job)]
        made: list[SubmittedBatch] = []
        for jobs in split_into_batches(left, self.most, self.bounds.size):
            if len(parts) + len(made) >= self.room:
                break
            made += await self.submit_part(jobs)
        return made

    async def submit_part(self, jobs: Sequence[RequestJob]) -> list[SubmittedBatch]:
        """One batch of those jobs that nobody asks live just now; its tag and keys are on the disk before it is."""
        tag = uuid.uuid4().hex
        self.away.begin(tag, self.asking.identity)
        mine: list[RequestJob] = []
        for start in range(0, len(jobs), CLAIM_SIZE):
            mine += self.hold(tag, jobs[start : start + CLAIM_SIZE])
        if not mine:
            self.away.forget(tag)
            return []
        self.server.say(f"uploading {len(mine):,} requests")
        file = await self.server.upload(tag, b"".join(map(batch_line, mine)))
        server = await self.server.submit(tag, file, self.away, self.bounds)
        self.away.named(tag, server)
        return [SubmittedBatch(PendingBatch(tag, file, server, created=time.time()), mine)]

    def hold(self, tag: str, jobs: Sequence[RequestJob]) -> list[RequestJob]:
        """Those of the jobs that nobody asks or has answered meanwhile; they are the batch's from here on."""
        mine, claimed = [], [job for job in jobs if self.store.claim(job.key)]
        try:
            for job in claimed:
                raw = self.store.get(job.key)
                if raw:
                    self.finish(job, self.asking.read(job.body, raw), paid=False)
                else:
                    mine.append(job)
            self.away.hold(tag, [job.key for job in mine])
        finally:
            for job in claimed:
                self.store.release(job.key)
        return mine

    async def watch(self, parts: Sequence[SubmittedBatch]) -> None:
        """Look at each batch once; fetch from those that have ended, or wait a while."""
        looked = [(part, made) for part in parts if (made := await self.look(part))]
        self.server.say(describe_batch_progress([made for _, made in looked]))
        ended = [(part, made) for part, made in looked if has_ended(made)]
        if ended:
            self.pause = self.bounds.first_wait
            self.make_room(looked)
            async with self.turn():
                for part, made in ended:
                    await self.fetch(part, made)
        elif self.waiting:
            await asyncio.sleep(self.pause)
            self.pause = min(self.bounds.longest_wait, 1.5 * self.pause)
        if self.failed:
            raise self.failed

    async def look(self, part: SubmittedBatch) -> Batch | None:
        """The batch as the server has it; None when it is long gone from there."""
        import openai

        batch = part.batch
        try:
            made = await self.server.look(batch.server)
        except openai.NotFoundError as error:
            if time.time() < batch.created + LOST_AFTER_SECONDS:
                raise self.unknown(part) from error
            self.away.forget(batch.tag)
            for job in part.jobs:
                self.asking.note(job, f"batch {batch.server} is gone from the server", b"", 0.0, job.reserved)
                self.asking.release(job)
            return None
        if made.status != batch.state:
            self.away.heard(batch.tag, made.status)
        return made

    def unknown(self, part: SubmittedBatch) -> TapirError:
        """The error for a batch that the endpoint does not know and ought to."""
        what = f"the endpoint does not know batch {part.batch.server}, which holds {len(part.jobs):,} of the requests"
        fix = f"See that the key in the {key_place(self.endpoint)} is of the account that submitted it."
        return TapirError(
            what, where=self.asking.identity, fix=f"{fix} Two days after it was made it is given up for lost."
        )

    def make_room(self, looked: Sequence[tuple[SubmittedBatch, Batch]]) -> None:
        """Let no more batches be away than found room just now, and one more for each that has ended.

        Where a single one finds no room, batches of half its size are tried; of a single request, there is no smaller.
        """
        refused = [(len(part.jobs), made) for part, made in looked if queue_was_full(made)]
        if refused:
            self.room = max(1, len(looked) - len(refused))
        if refused and len(looked) == 1:
            ((size, made),) = refused
            self.most = max(1, size // 2)
            if size == 1:
                self.fail(made, "Wait until other batches of the account are done, then run the same command again.")
        else:
            ended = sum(made.status != "failed" and has_ended(made) for _, made in looked)
            self.room = min(sys.maxsize, self.room + ended)

    def fail(self, made: Batch, fix: str) -> None:
        """Stop, with the server's words on a batch that failed; a live run asks its requests instead."""
        if not self.endpoint.batch:
            return
        what = mask_key(f"batch {made.id} failed: {words_of(made)}", self.server.client)
        self.failed = self.failed or TapirError(what, where=self.asking.identity, fix=fix)

    async def fetch(self, part: SubmittedBatch, made: Batch) -> None:
        """Store what a batch that has ended brought to our jobs, unless another process did so before our turn."""
        tag = part.batch.tag
        if made.status == "failed":
            self.away.forget(tag)
            if not queue_was_full(made):
                self.fail(made, "Mend what it names (model, account, `extra`), then run the same command again.")
            return
        owed = self.away.keys(tag)
        jobs = [job for job in part.jobs if job.key in owed]
        lines = await self.lines(made) if jobs else {}
        for job in jobs:
            self.take(job, lines.get(job.key), made)
        self.store.flush()
        self.away.fetched(tag, [job.key for job in jobs])

    async def lines(self, made: Batch) -> dict[bytes, Any]:
        """The lines of a batch's output and error files by key; the files are in memory whole."""
        found: dict[bytes, Any] = {}
        for file in filter(None, (made.error_file_id, made.output_file_id)):
            found |= parse_result_lines(await self.server.content(file, self.bounds.settle))
        return found

    def take(self, job: RequestJob, line: Any, made: Batch) -> None:
        """Store what came to a job as a live reply is stored, then see whether it is an answer."""
        seconds = float(made.completed_at - made.created_at) if made.completed_at else 0.0
        raw = reply_body_of_line(line)
        if raw is None:
            otherwise = f"no answer in batch {made.id}, which is {made.status}"
            lost = line is None and made.status == "completed"  # answered, and billed, though no line holds the answer
            self.suffer(
                job, classify_result_line(line, self.endpoint, otherwise), seconds, job.reserved if lost else None
            )
            return
        try:
            reply = self.asking.read(job.body, raw)
        except ValueError:
            self.suffer(job, classify_unreadable_reply(raw, {}, self.endpoint), seconds, job.reserved)
            return
        share = 1.0 if self.endpoint.batch else BATCH_DISCOUNT  # asked live now, it was still a batch that was paid for
        self.asking.keep(job, raw, reply, seconds, share)
        self.asking.release(job)
        if reply.again and job.tries + 1 < self.endpoint.attempts:
            job.tries += 1
        else:
            self.finish(job, reply, paid=True)
        self.failed = self.failed or self.asking.hopeless(job, reply.why, reply.finish == "length")

    def suffer(self, job: RequestJob, trouble: RequestFailure, seconds: float, bill: Bill | None = None) -> None:
        """No answer came: note it with what may have been billed for it; into the next batch with the job, or stop."""
        client = self.server.client
        why = mask_key(trouble.why, client)
        self.asking.note(job, why, mask_key_in_body(trouble.body, client), seconds, bill)
        self.asking.release(job)
        tries = min(trouble.tries or self.endpoint.attempts, self.endpoint.attempts)
        if trouble.then not in ("stop", "row") and job.tries + 1 < tries:
            job.tries += 1
        elif error := self.asking.give_up(job, trouble._replace(why=why)):
            self.failed = self.failed or error
        else:
            del self.waiting[job.key]

    def finish(self, job: RequestJob, reply: Reply, paid: bool) -> None:
        """Serve a job's places."""
        del self.waiting[job.key]
        self.asking.release(job)
        self.asking.finish(job, reply, paid)
