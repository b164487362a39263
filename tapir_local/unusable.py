"""unusable.jsonl in a run's folder: the rows that were left out, at which step and why, and when there are too many."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tapir_local.errors import TapirError
from tapir_local.files import RunDir, read_rows, write_rows

UNUSABLE_FILE = "unusable.jsonl"
MAX_ROWS_NAMED = 5  # rows that an error names
MAX_LIMIT_ADVISED = 0.5  # where more rows than this are unusable, something is wrong with all of them
MAX_REASONS_NAMED = 3  # reasons that an error or a closing line names
MAX_TEXT_KEPT = 200  # characters of a row's text that are kept


@dataclass(frozen=True)
class Unusable:
    """A row that a step (`prepare/seeds`, `round-01/refine`) left out.

    `kind` is the reason in a few words, the same for all rows of a kind, so that they can be counted
    (`cut at teacher.max_tokens`); `detail` is what holds for this row alone, such as the server's own words; `text` is
    the beginning of the row.
    """

    step: str
    id: str
    kind: str
    detail: str = ""
    text: str = ""

    @property
    def reason(self) -> str:
        """The kind, and the detail where there is any."""
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


def read_unusable(run: RunDir) -> list[Unusable]:
    """Every row that a run left out, in the order of its steps; [] where there is none."""
    path = run.path / UNUSABLE_FILE
    return read_rows(Unusable, path) if path.exists() else []


def record_unusable(run: RunDir, step: str, rows: Sequence[Unusable]) -> None:
    """Record the rows that a step left out, in place of those of an earlier attempt at the step."""
    others = [row for row in read_unusable(run) if row.step != step]
    if rows or (run.path / UNUSABLE_FILE).exists():
        write_rows(run.path / UNUSABLE_FILE, [*others, *rows])


def remove_unusable(run: RunDir, steps: Collection[str]) -> None:
    """Remove the rows of steps whose outputs were deleted."""
    if (run.path / UNUSABLE_FILE).exists():
        write_rows(run.path / UNUSABLE_FILE, [row for row in read_unusable(run) if row.step not in steps])


def refuse_too_many(rows: Sequence[Unusable], total: int, limit: float, where: str) -> None:
    """TapirError where more than the share `limit` of `total` rows is unusable: the commonest reasons, the first rows.

    One row among several is never too many, however few they are, unless the limit is 0.
    """
    if len(rows) <= limit * total or (limit and len(rows) == 1 < total):
        return
    first = "; ".join(f"{row.id} ({row.reason})" for row in rows[:MAX_ROWS_NAMED])
    share = -(-100 * len(rows) // total) / 100
    more = f", or allow more: --set limits.unusable={share:g}" if share <= MAX_LIMIT_ADVISED else ""
    raise TapirError(
        f"{len(rows):,} of {total:,} rows ({len(rows) / total:.0%}) cannot be used: {commonest(rows)}. "
        f"limits.unusable allows {limit:.0%}. The first: {first}",
        where=where,
        fix=f"{NAME} in the run's folder lists all of them. Correct the cause{more}.",
    )


def format_common_reasons(rows: Sequence[Unusable]) -> str:
    """`3 refused by the server, 1 cut at teacher.max_tokens`: the commonest kinds with their counts."""
    counts = Counter(row.kind for row in rows).most_common()
    others = sum(count for _, count in counts[MAX_REASONS_NAMED:])
    said = ", ".join(f"{count:,} {kind}" for kind, count in counts[:MAX_REASONS_NAMED])
    return said + (f", {others:,} for other reasons" if others else "")


def format_left_out(rows: Sequence[Unusable]) -> str:
    """What a closing line says of the rows left out; "" where there is none."""
    return f", {len(rows):,} left out ({commonest(rows)}; {NAME})" if rows else ""
