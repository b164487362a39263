"""The batches submitted to a Batch API whose answers are not fetched yet, kept in the store's file."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tapir_local.printable import format_count
from tapir_local.store.schema import connect, transaction
from tapir_local.store.store import Store, explain_store_errors


@dataclass(frozen=True)
class BatchLimits:
    """What fits into a batch (requests, bytes), and the seconds between status requests.

    `settle` is how long a new batch may take to appear in the server's list, `output` the most bytes that are read of
    an output or error file: 50,000 answers of 20 KB, five times what the store's answers need on average.
    """

    requests: int = 50_000
    size: int = 200_000_000
    first_wait: float = 5.0
    longest_wait: float = 60.0
    settle: float = 60.0
    output: int = 1 << 30


DEFAULT_BATCH_LIMITS = BatchLimits()


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """A batch that was submitted, or was about to be when its process ended.

    `tag` is our own name for it. `file` and `server` are the endpoint's ids of its input file and of the batch, ""
    while unknown. `state` is the last known status, `created` the time (Unix seconds) of the latest attempt to submit.
    """

    tag: str
    file: str = ""
    server: str = ""
    state: str = ""
    created: float = 0.0


class PendingBatches:
    """The pending batches in a store's file, used by one thread at a time; each change is on disk on return.

    A read-only store has none. TapirError if the file cannot be used.
    """

    def __init__(self, store: Store) -> None:
        self.path = store.path
        with explain_store_errors(self.path):
            self._conn = connect(self.path, write=True) if store.writes else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._conn:
            self._conn.close()

    def contains(self, key: bytes) -> bool:
        """Whether a pending batch contains the request with this key."""
        return bool(self._rows("select 1 from batch_keys k join batches b on b.tag = k.tag where k.key = ?", key))

    def of_endpoint(self, endpoint: str) -> list[tuple[PendingBatch, list[bytes]]]:
        """The endpoint's batches with answers to fetch, oldest first, and their keys in order."""
        rows = self._rows(
            "select b.tag, b.file, b.server, b.state, b.created, k.key from batches b"
            " join batch_keys k on k.tag = b.tag where b.endpoint = ? order by b.created, b.tag, k.key",
            endpoint,
        )
        found: dict[PendingBatch, list[bytes]] = {}
        for *fields, key in rows:
            found.setdefault(PendingBatch(*fields), []).append(key)
        return list(found.items())

    def keys(self, tag: str) -> set[bytes]:
        """The keys whose answers are still to be fetched from a batch."""
        return {key for (key,) in self._rows("select key from batch_keys where tag = ?", tag)}

    def add(self, tag: str, endpoint: str) -> None:
        """Record a batch that is about to be submitted."""
        self._do("insert into batches values (?, ?, '', '', '', ?)", [(tag, endpoint, time.time())])

    def add_keys(self, tag: str, keys: Sequence[bytes]) -> None:
        """Record that the answers to these keys will come from the batch."""
        self._do("insert into batch_keys (tag, key) values (?, ?)", [(tag, key) for key in keys])

    def set_submitting(self, tag: str, file: str) -> None:
        """Record an attempt to submit: from now on the endpoint may have the batch, made of the input `file`."""
        self._do("update batches set file = ?, created = ? where tag = ?", [(file, time.time(), tag)])

    def set_server_id(self, tag: str, server: str) -> None:
        """Record the endpoint's id of the batch."""
        self._do("update batches set server = ? where tag = ?", [(server, tag)])

    def set_state(self, tag: str, state: str) -> None:
        """Record the status that the endpoint last reported."""
        self._do("update batches set state = ? where tag = ?", [(state, tag)])

    def remove_keys(self, tag: str, keys: Sequence[bytes]) -> None:
        """Forget keys whose answers have been stored, or will not come."""
        self._do("delete from batch_keys where tag = ? and key = ?", [(tag, key) for key in keys])

    def remove(self, tag: str) -> None:
        """Forget a batch that was never made, or that will bring no answers."""
        self._do("delete from batch_keys where tag = ?", [(tag,)])
        self._do("delete from batches where tag = ? and server = ''", [(tag,)])

    def _rows(self, sql: str, value: Any) -> list[Any]:
        if not self._conn:
            return []
        with explain_store_errors(self.path):
            return self._conn.execute(sql, (value,)).fetchall()

    def _do(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if self._conn:
            with explain_store_errors(self.path), transaction(self._conn):
                self._conn.executemany(sql, rows)


def describe_pending_batches(store: Store, endpoint: str, unanswered: frozenset[bytes]) -> str:
    """`1 batch is pending with 20 requests; …` for an interrupted run; "" if no batch contains an unanswered key."""
    with PendingBatches(store) as pending:
        submitted = [keys for batch, keys in pending.of_endpoint(endpoint) if batch.file]
    counts = [count for keys in submitted if (count := len(unanswered.intersection(keys)))]
    if not counts:
        return ""
    batches = format_count(len(counts), "batch is", "batches are")
    requests = format_count(sum(counts), "request")
    return f"{batches} pending with {requests}; run the same command again to fetch the answers"
