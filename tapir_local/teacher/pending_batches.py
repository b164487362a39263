"""The batches that are away: our tag for each, the endpoint's ids, and the keys whose answers are to be fetched."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tapir_local.store.schema import connect, transaction
from tapir_local.store.store import Store, explain_store_errors


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """A batch that was submitted, or was about to be when its process ended.

    `file` and `server` are the endpoint's ids of its input and of itself, "" while not known; `state` is what was last
    heard of it, `created` the time (Unix seconds) of the latest try to submit it.
    """

    tag: str
    file: str = ""
    server: str = ""
    state: str = ""
    created: float = 0.0


class PendingBatches:
    """The batches in a store's file, for one thread at a time; each change is on the disk when its method returns.

    With a store that writes nothing there are none. TapirError when the file cannot be used.
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

    def holds(self, key: bytes) -> bool:
        """Whether the answer to a key is to come from a batch."""
        return bool(self._rows("select 1 from batch_keys k join batches b on b.tag = k.tag where k.key = ?", key))

    def holding(self, endpoint: str) -> list[tuple[PendingBatch, list[bytes]]]:
        """The endpoint's batches with answers still to be fetched, oldest first, and their keys in order."""
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

    def begin(self, tag: str, endpoint: str) -> None:
        """A batch is about to be submitted."""
        self._do("insert into batches values (?, ?, '', '', '', ?)", [(tag, endpoint, time.time())])

    def hold(self, tag: str, keys: Sequence[bytes]) -> None:
        """The answers to these keys are to come from the batch."""
        self._do("insert into batch_keys (tag, key) values (?, ?)", [(tag, key) for key in keys])

    def trying(self, tag: str, file: str) -> None:
        """From now on the endpoint may have the batch, made of the input `file`."""
        self._do("update batches set file = ?, created = ? where tag = ?", [(file, time.time(), tag)])

    def named(self, tag: str, server: str) -> None:
        """The endpoint's id of the batch."""
        self._do("update batches set server = ? where tag = ?", [(server, tag)])

    def heard(self, tag: str, state: str) -> None:
        """The status that the endpoint gave last."""
        self._do("update batches set state = ? where tag = ?", [(state, tag)])

    def fetched(self, tag: str, keys: Sequence[bytes]) -> None:
        """The batch owes nothing more for these keys: their answers are in the store, or will not come."""
        self._do("delete from batch_keys where tag = ? and key = ?", [(tag, key) for key in keys])

    def forget(self, tag: str) -> None:
        """The batch was never made, or nothing will come of it."""
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


def describe_pending_batches(store: Store, endpoint: str, asked: frozenset[bytes]) -> str:
    """What to tell whoever stops while the keys `asked` are without an answer; "" where no batch holds any of them."""
    with PendingBatches(store) as away:
        made = [keys for batch, keys in away.holding(endpoint) if batch.file]
    owed = [count for keys in made if (count := len(asked.intersection(keys)))]
    if not owed:
        return ""
    batches = "1 batch is" if len(owed) == 1 else f"{len(owed)} batches are"
    return f"{batches} away with {sum(owed):,} requests; the same command fetches the answers"
