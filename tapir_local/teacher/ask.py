"""Ask a teacher or a judge through the store: many requests at once, none paid for twice, none lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from tapir_local.errors import TapirError
from tapir_local.printable import format_count
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.records import Answer, Request
from tapir_local.store.store import Store
from tapir_local.teacher.batch import send_batches
from tapir_local.teacher.endpoint import askable_kind
from tapir_local.teacher.gguf import answer_with_gguf
from tapir_local.teacher.http import LiveSender
from tapir_local.teacher.pending_batches import PendingBatches, describe_pending_batches
from tapir_local.teacher.session import DEFAULT_ASK_OPTIONS, AskOptions, AskSession, RequestJob


def ask(
    requests: Sequence[Request],
    endpoint: Endpoint,
    store: Store,
    *,
    run: str,
    options: AskOptions = DEFAULT_ASK_OPTIONS,
) -> list[Answer]:
    """Answers in the order of the requests, from the store if it has them.

    `run` names the run in the store's record of uses. A GGUF is opened only if something is to be asked of it, and is
    closed again on return. An answer that was cut, filtered or stayed empty is returned with its `finish` and is not an
    error. Neither is a row that the endpoint refused while it answered others (finish `refused` or `content_filter`,
    the server's message in `why`). TapirError if the endpoint or the GGUF cannot be used, refuses everything for
    `options.patience` seconds, or answers nothing that can be used, or if the budget is spent. What arrived before an
    error is in the store.
    """
    session = AskSession(requests, endpoint, store, run, options)
    try:
        missing = session.look_up()
        if missing and askable_kind(endpoint) == "gguf":
            answer_with_gguf(session, missing)
        elif missing:
            with add_notes_on_interrupt(session, missing):
                asyncio.run(send_missing(session, missing))
            session.check_any_answered()
    finally:
        store.flush()
    return [answer for answer in session.answers if answer]


@contextmanager
def add_notes_on_interrupt(session: AskSession, jobs: Sequence[RequestJob]) -> Iterator[None]:
    """Add notes about abandoned requests and pending batches to the KeyboardInterrupt that Ctrl-C raises."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if session.abandoned:
            requests = format_count(session.abandoned, "request was", "requests were")
            stopped.add_note(f"{requests} in flight and abandoned: what was sent may be paid for a second time")
        with suppress(TapirError):
            keys = frozenset(job.key for job in jobs)
            if note := describe_pending_batches(session.store, session.identity, keys):
                stopped.add_note(note)
        raise


async def send_missing(session: AskSession, jobs: list[RequestJob]) -> None:
    """Answer the jobs by batch or by live requests, as the recipe says.

    Jobs in a pending batch are waited for in either case: sent live they would be paid for twice.
    """
    with PendingBatches(session.store) as pending:
        while jobs:
            if session.endpoint.batch or pending.of_endpoint(session.identity):
                jobs = await send_batches(session, pending, jobs)
            if jobs:
                jobs = await LiveSender(session, pending).send(jobs)
