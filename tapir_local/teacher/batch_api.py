"""Client of OpenAI's Batch API: build input files, submit each batch exactly once, read output and error files."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import orjson

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.teacher.endpoint import mask_key
from tapir_local.teacher.pending_batches import PendingBatch, PendingBatches
from tapir_local.teacher.rate_limit import backoff_seconds, requested_wait
from tapir_local.teacher.refusals import RETRIED_STATUSES, RequestFailure, classify_error_response
from tapir_local.teacher.responses import describe_transport_error
from tapir_local.teacher.session import RequestJob

if TYPE_CHECKING:
    import openai
    from openai.types import Batch

Reply_T = TypeVar("T")

BATCH_TAG_KEY = "tapir_local"  # the field of a batch's metadata that holds our tag
DAY_SECONDS = 86_400.0
RESUME_SENTENCE = "Run the same command again: nothing paid for is lost, and what is away is fetched."


@dataclass(frozen=True)
class BatchLimits:
    """What fits into a batch (requests, bytes), and the seconds between looks at it.

    `settle` is how long a batch may take to show in the server's list after it was made.
    """

    requests: int = 50_000
    size: int = 200_000_000
    first_wait: float = 5.0
    longest_wait: float = 60.0
    settle: float = 60.0


DEFAULT_BATCH_LIMITS = BatchLimits()


class BatchClient:
    """An endpoint's Batch API. `say` is told what is waited for.

    Every method raises NotFoundError as it is, since what it means depends on the request, and TapirError for other
    refusals and after `patience` seconds without a reply. The server keeps all files, input and output: what was paid
    for can be fetched from there too.
    """

    def __init__(
        self, client: openai.AsyncOpenAI, endpoint: Endpoint, identity: str, patience: float, say: Callable[[str], None]
    ) -> None:
        self.client, self.endpoint, self.identity = client, endpoint, identity
        self.patience, self.say = patience, say
        self.reached = False

    async def upload(self, tag: str, lines: bytes) -> str:
        """The id of an input file."""

        async def send() -> str:
            return server_id(await self.client.files.create(file=(f"{tag}.jsonl", lines), purpose="batch"))

        return await self.asked(send)

    async def submit(self, tag: str, file: str, away: PendingBatches, bounds: BatchLimits) -> str:
        """The id of a batch of an uploaded file; the store knows the tag, and is told of each try."""
        return await self.asked(lambda: self.submit_once(tag, file, away, bounds))

    async def submit_once(self, tag: str, file: str, away: PendingBatches, bounds: BatchLimits) -> str:
        """Make a batch; where the reply is lost, find out whether it was made before anyone tries again."""
        import openai

        away.trying(tag, file)
        try:
            made = await self.client.batches.create(
                input_file_id=file, endpoint=CHAT_ENDPOINT, completion_window="24h", metadata={BATCH_TAG_KEY: tag}
            )
            return server_id(made)
        except (openai.APIError, ValueError) as error:
            status = getattr(error, "status_code", 0)
            if not 400 <= status < 500 or status in RETRIED_STATUSES:
                server = await self.look_for(PendingBatch(tag, file, created=time.time()), bounds)
                if server:
                    return server
            elif status != 429:
                away.forget(tag)
            raise

    async def look_for(self, batch: PendingBatch, bounds: BatchLimits) -> str:
        """The server's id of a batch that it may have made without our hearing of it; "" when it did not."""
        while True:
            late = time.time() > batch.created + bounds.settle
            server = await self.asked(lambda: self.listed(batch))
            if server or late:
                return server
            self.say("looking whether an earlier batch was made")
            await asyncio.sleep(min(bounds.settle, bounds.first_wait))

    async def listed(self, batch: PendingBatch) -> str:
        """The id under which the server lists our tag or input file, newest batches first; "" for none."""
        async for made in self.client.batches.list(limit=100):
            if (made.metadata or {}).get(BATCH_TAG_KEY) == batch.tag or made.input_file_id == batch.file:
                return server_id(made)
            if made.created_at < batch.created - DAY_SECONDS:  # clocks differ, though not by a day
                break
        return ""

    async def look(self, server: str) -> Batch:
        """The batch of this id as it is now."""

        async def send() -> Batch:
            made = await self.client.batches.retrieve(server)
            server_id(made)
            return made

        return await self.asked(send)

    async def content(self, file: str, settle: float) -> bytes:
        """What a file on the server holds; nothing when it is gone, which the server has to say twice."""
        import openai

        for wait in (settle, 0.0):
            try:
                return (await self.asked(lambda: self.client.files.content(file))).content
            except openai.NotFoundError:
                await asyncio.sleep(wait)
        return b""

    async def asked(self, send: Callable[[], Awaitable[Reply_T]]) -> Reply_T:
        """The reply to one request, in spite of pauses that the server asks for and a network that comes and goes."""
        import openai

        loop, tries = asyncio.get_running_loop(), 0
        began = loop.time()
        while True:
            try:
                found = await send()
            except openai.NotFoundError:
                raise
            except (openai.APIError, ValueError) as error:
                tries += 1
                trouble = self.trouble_of(error, tries)
            else:
                self.reached = True
                return found
            pause = requested_wait(trouble.headers) or backoff_seconds(tries, random.Random(f"batch-{tries}").random())
            why = mask_key(trouble.why, self.client)
            if trouble.then in ("stop", "row") or loop.time() + pause - began > self.patience:
                raise TapirError(why, where=self.identity, fix=trouble.fix)
            self.say(f"{why}; trying again")
            await asyncio.sleep(pause)

    def trouble_of(self, error: Exception, tries: int) -> RequestFailure:
        """What an error means; a connection that was never made is given up after two tries."""
        import openai

        if isinstance(error, openai.APIStatusError):
            return classify_error_response(error.response, self.endpoint)
        if isinstance(error, openai.APIConnectionError):
            never = not self.reached and tries > 1
            cause = error.__cause__ or error
            why, _ = describe_transport_error(cause.__cause__ or cause, self.endpoint)
            return RequestFailure("stop" if never else "again", why, fix=RESUME_SENTENCE)
        return RequestFailure("stop", str(error), fix="See that base_url ends as the endpoint's own manual says.")


CHAT_ENDPOINT: Final = "/v1/chat/completions"
ENDED_STATUSES = frozenset({"completed", "failed", "expired", "cancelled"})
QUEUE_FULL_CODE = "token_limit_exceeded"  # too many tokens of the account are waiting in batches already


def batch_line(job: RequestJob) -> bytes:
    """A request as a line of a batch's input, named by its key."""
    line = {"custom_id": job.key.hex(), "method": "POST", "url": CHAT_ENDPOINT, "body": dict(job.body)}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def split_into_batches(jobs: Sequence[RequestJob], most: int, size: int) -> Iterator[list[RequestJob]]:
    """The jobs in order, in parts of at most `most` requests and `size` bytes; a larger one is a part of its own."""
    part: list[RequestJob] = []
    filled = 0
    for job in jobs:
        length = len(batch_line(job))
        if part and (len(part) == most or filled + length > size):
            yield part
            part, filled = [], 0
        part.append(job)
        filled += length
    if part:
        yield part


def parse_result_lines(raw: bytes) -> dict[bytes, Any]:
    """The lines of an output or error file by key; those that are no JSON or name no key are left out."""
    found: dict[bytes, Any] = {}
    for text in raw.split(b"\n"):
        try:
            line = orjson.loads(text)
            found[bytes.fromhex(line["custom_id"])] = line
        except (ValueError, KeyError, TypeError):
            continue
    return found


def reply_body_of_line(line: Any) -> bytes | None:
    """The body of the reply in a line, as JSON; None where there is none or it is an error's."""
    response = line.get("response") if line else None
    if not isinstance(response, dict) or response.get("status_code") != 200:
        return None
    return orjson.dumps(response.get("body"))


def classify_result_line(line: Any, endpoint: Endpoint, otherwise: str) -> RequestFailure:
    """Why a line holds no reply; `otherwise` where it does not say, or is None."""
    import httpx2

    response, error = (line.get("response"), line.get("error")) if line else (None, None)
    if isinstance(response, dict):
        status = response.get("status_code")
        content = orjson.dumps(response.get("body"))
        refusal = httpx2.Response(status if isinstance(status, int) else 500, content=content)
        return classify_error_response(refusal, endpoint)
    if isinstance(error, dict):  # batch_expired, batch_cancelled, request_timeout
        return RequestFailure("again", f"{error.get('code')}: {error.get('message')}", orjson.dumps(error))
    return RequestFailure("again", otherwise)


def server_id(made: Any) -> str:
    """The id of what the server made or showed; ValueError for a reply that is no such thing, as a web page."""
    found = getattr(made, "id", None)
    if not isinstance(found, str) or not found:
        raise ValueError("the reply is not one of a Batch API")
    return found


def has_ended(made: Batch) -> bool:
    """Whether nothing more will come of a batch; not before the answers it counts can be fetched."""
    counts = made.request_counts
    pending = counts and counts.completed and not made.output_file_id
    return made.status == "failed" or (made.status in ENDED_STATUSES and not pending)


def queue_was_full(made: Batch) -> bool:
    """Whether a batch failed only because too many tokens were waiting."""
    errors = made.errors.data if made.errors else None
    return made.status == "failed" and any(error.code == QUEUE_FULL_CODE for error in errors or [])


def describe_failed_batch(made: Batch) -> str:
    """What the server says of a batch that failed."""
    errors = (made.errors.data if made.errors else None) or []
    words = [f"line {error.line}: {error.message}" if error.line else str(error.message) for error in errors]
    return "; ".join(words)[:1000] or "the endpoint does not say why"


def describe_batch_progress(batches: Sequence[Batch]) -> str:
    """`2 batches (in_progress, validating): 120 of 1,000 answered`; while it validates, the server counts 0 of 0."""
    if not batches:
        return "waiting for answers that another run is asking for"
    many = "batch" if len(batches) == 1 else f"{len(batches)} batches"
    states = ", ".join(sorted({made.status for made in batches}))
    counts = [made.request_counts for made in batches if made.request_counts]
    completed, total = sum(count.completed for count in counts), sum(count.total for count in counts)
    return f"{many} ({states}): {completed:,} of {total:,} answered"
