"""The rows that a run leaves out, and why: unusable.jsonl in the run's folder, and the limit on their number."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tapir_local.errors import TapirError
from tapir_local.files import read_rows, write_rows
from tapir_local.printable import format_count
from tapir_local.run_dir import RunDir

UNUSABLE_FILE = "unusable.jsonl"
MAX_ROWS_NAMED = 5  # rows that an error message lists
MAX_LIMIT_ADVISED = 0.5  # of a higher share of unusable rows the cause is general, and raising the limit is no advice
MAX_REASONS_NAMED = 3  # reasons that an error or a stage's last line lists
MAX_TEXT_KEPT = 200  # characters of a row's text


@dataclass(frozen=True)
class Unusable:
    """A row that a step (`prepare/seeds`, `round-01/refine`) left out.

    `kind` is the reason in a few words, identical for all rows with that reason, so that they can be counted
    (`cut at teacher.max_tokens`). `detail` applies to this row only, such as the server's message. `text` is the
    beginning of the row.
    """

    step: str
    id: str
    kind: str
    detail: str = ""
    text: str = ""

    @property
    def reason(self) -> str:
        """The kind, followed by the detail if there is one."""
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


def read_unusable(run: RunDir) -> list[Unusable]:
    """Every row that a run left out, in the order of its steps."""
    path = run.path / UNUSABLE_FILE
    return read_rows(Unusable, path) if path.exists() else []


def record_unusable(run: RunDir, step: str, rows: Sequence[Unusable]) -> None:
    """Record the rows that a step left out; they replace those of an earlier attempt at the same step."""
    others = [row for row in read_unusable(run) if row.step != step]
    if rows or (run.path / UNUSABLE_FILE).exists():
        write_rows(run.path / UNUSABLE_FILE, [*others, *rows])


def remove_unusable(run: RunDir, steps: Collection[str]) -> None:
    """Remove the rows of steps whose outputs were deleted."""
    if (run.path / UNUSABLE_FILE).exists():
        write_rows(run.path / UNUSABLE_FILE, [row for row in read_unusable(run) if row.step not in steps])


def refuse_too_many(rows: Sequence[Unusable], total: int, limit: float, where: str) -> None:
    """Raise TapirError if more than the share `limit` of `total` rows is unusable, with the common reasons and rows.

    A single unusable row among several is always allowed, unless the limit is 0.
    """
    if len(rows) <= limit * total or (limit and len(rows) == 1 < total):
        return
    named: dict[str, list[str]] = {}
    for row in rows[:MAX_ROWS_NAMED]:
        named.setdefault(row.reason, []).append(row.id)
    first = "; ".join(
        f"{' and '.join(filter(None, [', '.join(ids[:-1]), ids[-1]]))} ({reason})" for reason, ids in named.items()
    )
    share = -(-100 * len(rows) // total) / 100
    more = f", or allow more: --set limits.unusable={share:g}" if share <= MAX_LIMIT_ADVISED else ""
    raise TapirError(
        f"{len(rows):,} of {format_count(total, 'row')} ({len(rows) / total:.0%}) cannot be used: "
        f"{format_common_reasons(rows)}. limits.unusable allows {limit:.0%}. The first: {first}",
        where=where,
        fix=f"{UNUSABLE_FILE} in the run's folder lists all of them. Fix the cause{more}.",
    )


def name_all(ids: Sequence[str]) -> str:
    """`seed-1, seed-2 and seed-3`."""
    return " and ".join(filter(None, [", ".join(ids[:-1]), ids[-1]]))


def format_common_reasons(rows: Sequence[Unusable]) -> str:
    """The most common kinds with their counts: `3 refused by the server, 1 cut at teacher.max_tokens`."""
    counts = Counter(row.kind for row in rows).most_common()
    others = sum(count for _, count in counts[MAX_REASONS_NAMED:])
    said = ", ".join(f"{count:,} {kind}" for kind, count in counts[:MAX_REASONS_NAMED])
    return said + (f", {others:,} for other reasons" if others else "")


def format_left_out(rows: Sequence[Unusable]) -> str:
    """The end of a stage's last line: how many rows were left out and why; "" if none were."""
    return f", {len(rows):,} left out ({format_common_reasons(rows)}, see {UNUSABLE_FILE})" if rows else ""
