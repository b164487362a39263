"""Client of OpenAI's Batch API: build input files, submit each batch exactly once, read output and error files."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import orjson

from tapir_local.errors import TapirError
from tapir_local.printable import format_count
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.records import T
from tapir_local.store.reply import parse_reply_json
from tapir_local.teacher.endpoint import mask_key, mask_key_in_answer
from tapir_local.teacher.pending_batches import PendingBatch, PendingBatches
from tapir_local.teacher.rate_limit import backoff_seconds, requested_wait
from tapir_local.teacher.refusals import RETRIED_STATUSES, RequestFailure, classify_error_response
from tapir_local.teacher.responses import describe_transport_error, replace_half_surrogates, transport_errors
from tapir_local.teacher.session import AskSession, RequestJob

if TYPE_CHECKING:
    import openai
    from openai.types import Batch

BATCH_TAG_KEY = "tapir_local"  # the field of a batch's metadata that holds our tag
DAY_SECONDS = 86_400.0
RESUME_SENTENCE = "Run the same command again: nothing paid for is lost, and pending batches are fetched."
CHAT_ENDPOINT: Final = "/v1/chat/completions"
ENDED_STATUSES = frozenset({"completed", "failed", "expired", "cancelled"})
QUEUE_FULL_CODE = "token_limit_exceeded"  # too many tokens of the account are waiting in batches already


class BatchClient:
    """Sends requests to an endpoint's Batch API, with retries. `say` is called with what is waited for.

    Every method raises NotFoundError unchanged, since its meaning depends on the request, and TapirError for other
    refusals and after `patience` seconds without a reply. The server keeps all files, input and output, so what was
    paid for can also be fetched from there by hand.
    """

    def __init__(self, client: openai.AsyncOpenAI, session: AskSession, say: Callable[[str], None]) -> None:
        self.client, self.endpoint, self.identity = client, session.endpoint, session.identity
        self.patience, self.limits, self.say = session.options.patience, session.options.batch_limits, say
        self.reached = False

    async def upload(self, tag: str, lines: bytes) -> str:
        """Upload an input file and return its id."""

        async def send() -> str:
            return server_id(await self.client.files.create(file=(f"{tag}.jsonl", lines), purpose="batch"))

        return await self.call_with_retries(send)

    async def submit(self, tag: str, file: str, pending: PendingBatches) -> str:
        """Submit an uploaded file as a batch and return its id; each attempt is recorded in `pending`."""
        return await self.call_with_retries(lambda: self.submit_once(tag, file, pending))

    async def submit_once(self, tag: str, file: str, pending: PendingBatches) -> str:
        """Create a batch; if the reply is lost, find out whether the batch exists before trying again."""
        import openai

        pending.set_submitting(tag, file)
        try:
            made = await self.client.batches.create(
                input_file_id=file, endpoint=CHAT_ENDPOINT, completion_window="24h", metadata={BATCH_TAG_KEY: tag}
            )
            return server_id(made)
        except (openai.APIError, ValueError) as error:
            status = getattr(error, "status_code", 0)
            if not 400 <= status < 500 or status in RETRIED_STATUSES:
                server = await self.find_batch(PendingBatch(tag, file, created=time.time()))
                if server:
                    return server
            elif status != 429:
                pending.remove(tag)
            raise

    async def find_batch(self, batch: PendingBatch) -> str:
        """The server's id of a batch whose creation was not confirmed; "" if the server did not create it."""
        while True:
            late = time.time() > batch.created + self.limits.settle
            server = await self.call_with_retries(lambda: self.find_in_list(batch))
            if server or late:
                return server
            self.say("checking whether an earlier batch was created")
            await asyncio.sleep(min(self.limits.settle, self.limits.first_wait))

    async def find_in_list(self, batch: PendingBatch) -> str:
        """The id of the batch in the server's list that has our tag or input file, newest first; "" if none has."""
        async for made in self.client.batches.list(limit=100):
            if (made.metadata or {}).get(BATCH_TAG_KEY) == batch.tag or made.input_file_id == batch.file:
                return server_id(made)
            if made.created_at < batch.created - DAY_SECONDS:  # clocks differ by less than a day
                break
        return ""

    async def retrieve(self, server: str) -> Batch:
        """The current state of the batch with this id."""

        async def send() -> Batch:
            made = await self.client.batches.retrieve(server)
            server_id(made)
            return made

        return await self.call_with_retries(send)

    async def download(self, file: str) -> bytes:
        """The content of a file on the server; empty if the server says twice that the file is gone."""
        import openai

        for wait in (self.limits.settle, 0.0):
            try:
                return await self.call_with_retries(lambda: self.read_file(file))
            except openai.NotFoundError:
                await asyncio.sleep(wait)
        return b""

    async def read_file(self, file: str) -> bytes:
        """One attempt to read a file on the server; TapirError if it is larger than the limit, so that memory lasts."""
        import openai

        async with self.client.files.with_streaming_response.content(file) as response:
            body = bytearray()
            try:
                async for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > self.limits.output:
                        raise TapirError(
                            f"the file {file} is larger than {self.limits.output:,} bytes",
                            where=self.identity,
                            fix="Ask the endpoint's operator: a batch's answers do not need as much.",
                        )
            except transport_errors() as error:
                raise openai.APIConnectionError(request=response.http_request) from error
            return mask_key_in_answer(bytes(body), self.client)

    async def call_with_retries(self, send: Callable[[], Awaitable[T]]) -> T:
        """The result of one request, retried after the pauses that the server requests and after lost connections."""
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
                failure = self.classify(error, tries)
            else:
                self.reached = True
                return found
            pause = requested_wait(failure.headers) or backoff_seconds(tries, random.Random(f"batch-{tries}").random())
            why = mask_key(failure.why, self.client)
            if failure.action in ("stop", "skip_row") or loop.time() + pause - began > self.patience:
                raise TapirError(why, where=self.identity, fix=failure.fix)
            self.say(f"{why}; trying again")
            await asyncio.sleep(pause)

    def classify(self, error: Exception, tries: int) -> RequestFailure:
        """What an error means; a server that was never reached is given up after two tries."""
        import openai

        if isinstance(error, openai.APIStatusError):
            return classify_error_response(error.response, self.endpoint)
        if isinstance(error, openai.APIConnectionError):
            never = not self.reached and tries > 1
            cause = error.__cause__ or error
            why, _ = describe_transport_error(cause.__cause__ or cause, self.endpoint)
            return RequestFailure("stop" if never else "retry", why, fix=RESUME_SENTENCE)
        return RequestFailure("stop", str(error), fix="Check base_url against the endpoint's documentation.")


def batch_line(job: RequestJob) -> bytes:
    """A request as a line of a batch's input file; its custom_id is the job's key."""
    line = {"custom_id": job.key.hex(), "method": "POST", "url": CHAT_ENDPOINT, "body": dict(job.body)}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def split_into_batches(jobs: Sequence[RequestJob], most: int, size: int) -> Iterator[list[RequestJob]]:
    """The jobs in order, in parts of at most `most` requests and `size` bytes; a larger request gets its own part."""
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
    """The lines of an output or error file by key; lines that are not JSON or have no key are skipped."""
    found: dict[bytes, Any] = {}
    for text in raw.split(b"\n"):
        try:
            line = parse_reply_json(text)
            found[bytes.fromhex(line["custom_id"])] = line
        except (ValueError, KeyError, TypeError):
            continue
    return found


def reply_body_of_line(line: Any) -> bytes | None:
    """The reply's body in a result line, as JSON; None if the line has none or reports an error."""
    response = line.get("response") if line else None
    if not isinstance(response, dict) or response.get("status_code") != 200:
        return None
    return orjson.dumps(replace_half_surrogates(response.get("body")))


def classify_result_line(line: Any, endpoint: Endpoint, default: str) -> RequestFailure:
    """Why a result line has no reply; `default` if the line is None or does not say."""
    import httpx2

    response, error = (line.get("response"), line.get("error")) if line else (None, None)
    if isinstance(response, dict):
        status = response.get("status_code")
        content = orjson.dumps(replace_half_surrogates(response.get("body")))
        refusal = httpx2.Response(status if isinstance(status, int) else 500, content=content)
        return classify_error_response(refusal, endpoint)
    if isinstance(error, dict):  # batch_expired, batch_cancelled, request_timeout
        return RequestFailure(
            "retry", f"{error.get('code')}: {error.get('message')}", orjson.dumps(replace_half_surrogates(error))
        )
    return RequestFailure("retry", default)


def server_id(made: Any) -> str:
    """The id of what the server created or returned; ValueError for a reply without one, such as a web page."""
    found = getattr(made, "id", None)
    if not isinstance(found, str) or not found:
        raise ValueError("the reply is not one of a Batch API")
    return found


def has_ended(made: Batch) -> bool:
    """Whether a batch will bring no more answers; False until the answers that it counts can be fetched."""
    counts = made.request_counts
    unfetchable = counts and counts.completed and not made.output_file_id
    return made.status == "failed" or (made.status in ENDED_STATUSES and not unfetchable)


def queue_was_full(made: Batch) -> bool:
    """Whether a batch failed only because too many tokens of the account were waiting."""
    errors = made.errors.data if made.errors else None
    return made.status == "failed" and any(error.code == QUEUE_FULL_CODE for error in errors or [])


def describe_failed_batch(made: Batch) -> str:
    """The server's messages about a batch that failed."""
    errors = (made.errors.data if made.errors else None) or []
    words = [f"line {error.line}: {error.message}" if error.line else str(error.message) for error in errors]
    return "; ".join(words)[:1000] or "the endpoint does not say why"


def describe_batch_progress(batches: Sequence[Batch]) -> str:
    """`2 batches (in_progress, validating): 120 of 1,000 answered`; a validating batch counts as 0 of 0."""
    if not batches:
        return "waiting for answers that another run is asking for"
    many = format_count(len(batches), "batch", "batches")
    states = ", ".join(sorted({made.status for made in batches}))
    counts = [made.request_counts for made in batches if made.request_counts]
    completed, total = sum(count.completed for count in counts), sum(count.total for count in counts)
    return f"{many} ({states}): {completed:,} of {total:,} answered"
