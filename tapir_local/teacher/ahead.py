"""Ask an endpoint in a thread of its own while the caller does something else; what comes is in the store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.records import Answer, Request, noop
from tapir_local.store.store import Store
from tapir_local.teacher.ask import add_notes_on_interrupt
from tapir_local.teacher.http import LiveSender
from tapir_local.teacher.pending_batches import PendingBatches
from tapir_local.teacher.session import AskOptions, AskSession, EarlierTries, RequestJob


@dataclass
class AheadResults:
    """What came of the requests that were asked ahead.

    `paid` are the keys of the calls that were paid for and are in the store. `unstored` are the answers that the store
    does not keep, such as refusals, and `earlier` the attempts that brought none. `error` is set if so many replies
    were useless that no more should be paid for.
    """

    paid: set[str] = field(default_factory=set)
    unstored: dict[Request, Answer] = field(default_factory=dict)
    earlier: EarlierTries = field(default_factory=EarlierTries)
    error: TapirError | None = None


class AheadAsker:
    """Sends requests in the order in which they are added, from a thread of its own.

    The thread calls `before_asking` before it asks about what was added. An error ends the asking and nothing else: who
    asks again through the store gets it. Warnings are kept for the end, because the caller writes to the terminal.
    """

    def __init__(
        self, endpoint: Endpoint, store: Store, run: str, options: AskOptions, before_asking: Callable[[], None] = noop
    ) -> None:
        self._say, self._warnings, self._interrupted = options.warn, list[str](), False
        quiet = replace(options, progress=noop, tell=noop, warn=self._warn)
        self.session, self._before_asking = AskSession([], endpoint, store, run, quiet), before_asking
        self._error: BaseException | None = None
        self._inbox: asyncio.Queue[Sequence[Request] | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="ask ahead", daemon=True)
        self._thread.start()
        self._started.wait()

    @property
    def paid(self) -> int:
        """The number of requests answered so far that were not in the store."""
        return self.session.finished - self.session.hits

    def add(self, requests: Sequence[Request]) -> None:
        """Ask these requests after those added before."""
        self._call(self._inbox.put_nowait, requests)

    def close(self) -> None:
        """Send nothing more, and wait for what is in flight."""
        self._call(self._inbox.put_nowait, None)
        try:
            self._ended.wait()
        except KeyboardInterrupt:
            self.interrupt()
            raise

    def interrupt(self) -> None:
        """Send nothing more, and give what is in flight some seconds, as `ask` does on Ctrl-C; a second one cancels."""
        self._interrupted = True
        self._call(self._inbox.put_nowait, None)
        try:
            self._cancel_and_wait()
        except KeyboardInterrupt:
            self._cancel_and_wait()

    def tell_warnings(self) -> None:
        """Say the warnings that have come so far."""
        while self._warnings:
            self._say(self._warnings.pop(0))

    def results(self) -> AheadResults:
        """What came of the requests, once closed."""
        session = self.session
        pairs = zip(session.requests, session.answers, strict=True)
        paid = {request: answer for request, answer in pairs if answer and not answer.hit}
        session.store.flush()
        stored = session.store.get_many([bytes.fromhex(answer.key) for answer in paid.values()])
        earlier = EarlierTries(session.tries, session.outcomes.useless)
        found = AheadResults({key.hex() for key in stored}, earlier=earlier)
        if session.outcomes.are_useless() and isinstance(self._error, TapirError):
            found.error = self._error
        if not session.outcomes.failure_of_all():  # if all failed for one reason, the next to ask finds and reports it
            found.unstored = {request: answer for request, answer in paid.items() if answer.key not in found.paid}
        return found

    def _work(self) -> None:
        """The thread: an event loop of its own."""
        try:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()
                self._started.set()
                runner.run(self._send())
        except BaseException as error:  # noqa: BLE001 - also the cancellation
            self._error = error
        finally:
            self._started.set()
            self._ended.set()

    async def _send(self) -> None:
        self._task = asyncio.current_task()
        with PendingBatches(self.session.store) as pending:
            await LiveSender(self.session, pending).send([], self._added_jobs())

    async def _added_jobs(self) -> AsyncIterator[list[RequestJob]]:
        """The jobs for what is added, until the end."""
        while (requests := await self._inbox.get()) is not None:
            self._before_asking()
            yield self.session.add(requests)

    def _call(self, act: Callable[..., object], *values: object) -> None:
        """Let the thread's loop call a function; nothing happens if an error has ended it."""
        with suppress(RuntimeError):
            if self._loop:
                self._loop.call_soon_threadsafe(act, *values)

    def _cancel_and_wait(self) -> None:
        if self._task:
            self._call(self._task.cancel)
        self._ended.wait()  # not Thread.join: once interrupted, Python 3.11 and 3.12 take a running thread for ended

    def _warn(self, text: str) -> None:
        if self._interrupted:
            self._say(text)
        else:
            self._warnings.append(text)


@contextmanager
def asking_ahead(asker: AheadAsker, found: Callable[[AheadResults], None]) -> Iterator[AheadAsker]:
    """Close the asker at the end of the block, interrupt it on Ctrl-C; then `found` gets what came."""
    with add_notes_on_interrupt(asker.session, ()):
        try:
            yield asker
            asker.close()
        except KeyboardInterrupt:
            asker.interrupt()
            raise
        except BaseException:
            asker.close()
            raise
        finally:
            asker.tell_warnings()
            with suppress(TapirError):  # of the store: the next to ask through it gets the error
                found(asker.results())
