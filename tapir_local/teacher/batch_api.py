"""The requests to a Batch API: in spite of pauses and lost replies, each is answered, and each batch made once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.records import T
from tapir_local.teacher.batch_lines import URL, id_of
from tapir_local.teacher.endpoint import hidden
from tapir_local.teacher.pending import Away, Sent
from tapir_local.teacher.rate_limit import backoff, wait_asked
from tapir_local.teacher.refusals import AGAIN, Trouble, trouble_of
from tapir_local.teacher.wire import words_of

if TYPE_CHECKING:
    import openai
    from openai.types import Batch


TAG = "tapir_local"  # the field of a batch's metadata that holds our tag
DAY = 86_400.0
RESUME = "Run the same command again: nothing paid for is lost, and what is away is fetched."


@dataclass(frozen=True)
class Bounds:
    """What fits into a batch (requests, bytes), and the seconds between looks at it.

    `settle` is how long a batch may take to show in the server's list after it was made.
    """

    requests: int = 50_000
    size: int = 200_000_000
    first_wait: float = 5.0
    longest_wait: float = 60.0
    settle: float = 60.0


BOUNDS = Bounds()


class BatchServer:
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
            return id_of(await self.client.files.create(file=(f"{tag}.jsonl", lines), purpose="batch"))

        return await self.asked(send)

    async def submit(self, tag: str, file: str, away: Away, bounds: Bounds) -> str:
        """The id of a batch of an uploaded file; the store knows the tag, and is told of each try."""
        return await self.asked(lambda: self.submit_once(tag, file, away, bounds))

    async def submit_once(self, tag: str, file: str, away: Away, bounds: Bounds) -> str:
        """Make a batch; where the reply is lost, find out whether it was made before anyone tries again."""
        import openai

        away.trying(tag, file)
        try:
            made = await self.client.batches.create(
                input_file_id=file, endpoint=URL, completion_window="24h", metadata={TAG: tag}
            )
            return id_of(made)
        except (openai.APIError, ValueError) as error:
            status = getattr(error, "status_code", 0)
            if not 400 <= status < 500 or status in AGAIN:
                server = await self.look_for(Sent(tag, file, created=time.time()), bounds)
                if server:
                    return server
            elif status != 429:
                away.forget(tag)
            raise

    async def look_for(self, batch: Sent, bounds: Bounds) -> str:
        """The server's id of a batch that it may have made without our hearing of it; "" when it did not."""
        while True:
            late = time.time() > batch.created + bounds.settle
            server = await self.asked(lambda: self.listed(batch))
            if server or late:
                return server
            self.say("looking whether an earlier batch was made")
            await asyncio.sleep(min(bounds.settle, bounds.first_wait))

    async def listed(self, batch: Sent) -> str:
        """The id under which the server lists our tag or input file, newest batches first; "" for none."""
        async for made in self.client.batches.list(limit=100):
            if (made.metadata or {}).get(TAG) == batch.tag or made.input_file_id == batch.file:
                return id_of(made)
            if made.created_at < batch.created - DAY:  # clocks differ, though not by a day
                break
        return ""

    async def look(self, server: str) -> Batch:
        """The batch of this id as it is now."""

        async def send() -> Batch:
            made = await self.client.batches.retrieve(server)
            id_of(made)
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

    async def asked(self, send: Callable[[], Awaitable[T]]) -> T:
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
            pause = wait_asked(trouble.headers) or backoff(tries, random.Random(f"batch-{tries}").random())
            why = hidden(trouble.why, self.client)
            if trouble.then in ("stop", "row") or loop.time() + pause - began > self.patience:
                raise TapirError(why, where=self.identity, fix=trouble.fix)
            self.say(f"{why}; trying again")
            await asyncio.sleep(pause)

    def trouble_of(self, error: Exception, tries: int) -> Trouble:
        """What an error means; a connection that was never made is given up after two tries."""
        import openai

        if isinstance(error, openai.APIStatusError):
            return trouble_of(error.response, self.endpoint)
        if isinstance(error, openai.APIConnectionError):
            never = not self.reached and tries > 1
            cause = error.__cause__ or error
            why, _ = words_of(cause.__cause__ or cause, self.endpoint)
            return Trouble("stop" if never else "again", why, fix=RESUME)
        return Trouble("stop", str(error), fix="See that base_url ends as the endpoint's own manual says.")
