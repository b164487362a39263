"""Ask a teacher or a judge through the store: many requests at once, none paid for twice, none lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.records import Answer, Request, noop
from tapir_local.store.store import Store
from tapir_local.teacher.batch import Tell, send_batches, untold
from tapir_local.teacher.batch_api import BOUNDS, Bounds
from tapir_local.teacher.budget import Purse
from tapir_local.teacher.endpoint import kind_of
from tapir_local.teacher.gguf import answer_here
from tapir_local.teacher.http import Online
from tapir_local.teacher.pending import Away, left_away
from tapir_local.teacher.session import Asking, CallProgress, Job

if TYPE_CHECKING:
    import httpx2

PATIENCE = 900.0  # seconds of nothing but 429 until the run stops and says so


def ask(
    requests: Sequence[Request],
    endpoint: Endpoint,
    store: Store,
    *,
    run: str,
    progress: CallProgress = noop,
    purse: Purse | None = None,
    warn: Callable[[str], None] = noop,
    transport: httpx2.AsyncBaseTransport | None = None,
    patience: float = PATIENCE,
    bounds: Bounds = BOUNDS,
    tell: Tell = untold,
) -> list[Answer]:
    """Answers in the order of the requests, from the store where it has them.

    `run` names the run in the store's record of uses; `progress` is called with (done, all, hits); `purse` is the run's
    budget; `warn` is told when another model answers than before; `transport` takes the place of the network; `bounds`
    are those of batches, and `tell` is called with (done, all, what they are at). A GGUF is opened only if something is
    to be asked of it, and closed again on return. An answer that was cut, filtered or stayed empty comes back with its
    `finish` and is no error; so does one whose row the endpoint refused, while it answered others (finish `refused` or
    `content_filter`, the server's words in `why`). TapirError when the endpoint or the GGUF cannot be used, refuses
    everything for `patience` seconds, answers nothing that can be used, or the budget is spent; what arrived before is
    in the store.
    """
    asking = Asking(requests, endpoint, store, run, progress, purse, warn)
    try:
        missing = asking.look_up()
        if missing and kind_of(endpoint) == "gguf":
            answer_here(asking, missing)
        elif missing:
            with away_noted(asking, missing):
                asyncio.run(send(asking, missing, patience, bounds, tell, transport))
            asking.refuse_nothing()
    finally:
        store.flush()
    return [answer for answer in asking.answers if answer]


@contextmanager
def away_noted(asking: Asking, jobs: Sequence[Job]) -> Iterator[None]:
    """Ctrl-C carries a note on the batches that it leaves away."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        with suppress(TapirError):
            if note := left_away(asking.store, asking.identity, frozenset(job.key for job in jobs)):
                stopped.add_note(note)
        raise


async def send(
    asking: Asking,
    jobs: list[Job],
    patience: float,
    bounds: Bounds,
    tell: Tell,
    transport: httpx2.AsyncBaseTransport | None,
) -> None:
    """Answer the jobs by batch or live, as the recipe says.

    What a batch holds already is waited for in either case: asked live it would be paid for twice.
    """
    with Away(asking.store) as away:
        while jobs:
            if asking.endpoint.batch or away.holding(asking.identity):
                jobs = await send_batches(
                    asking, away, jobs, patience=patience, bounds=bounds, tell=tell, transport=transport
                )
            if jobs:
                jobs = await Online(asking, away, patience, tell).send(jobs, transport)
