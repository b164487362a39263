"""What the read stage leaves out of the seeds, and what it says of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tapir_local.data.dataset import Faulty, Seeds
from tapir_local.data.formats import Table
from tapir_local.errors import TapirError
from tapir_local.pipeline.context import Work
from tapir_local.records import Example
from tapir_local.unusable import MAX_TEXT_KEPT, Unusable

MANY, SOME = 0.2, 3  # near-duplicates, as a share of the rows and in number, from which the stage warns


def leave_out(work: Work, found: Seeds, unusable: Sequence[Unusable]) -> None:
    """Leave out the rows that cannot be read; where they are too many for one reason, the error is the reason's own."""
    try:
        work.leave_out(unusable, len(found.table.rows))
    except TapirError as error:
        if len({row.kind for row in unusable}) == 1:
            found.refuse(error.fix)
        raise


def drawn(work: Work, examples: list[Example], where: str) -> list[Example]:
    """As many of the rows as seeds.limit says, at random; TapirError where a holdout would leave none to train on."""
    limit, held = work.recipe.seeds.limit, work.recipe.seeds.holdout
    if limit is not None and limit < len(examples):
        kept = set(work.chance("read").sample(range(len(examples)), limit))
        examples = [example for number, example in enumerate(examples) if number in kept]
    if len(examples) <= held:
        raise TapirError(
            f"{len(examples)} rows are too few for a holdout of {held} and something to train on",
            where=where,
            fix="Add rows or set seeds.holdout lower.",
        )
    return examples


def unreadable(work: Work, table: Table, row: Faulty) -> Unusable:
    """The record of a row that cannot be read, known by its line."""
    fault = row.fault
    detail = "" if fault.said == fault.kind else fault.said
    place = f"{Path(table.where).name}, {table.unit} {row.number}"
    return Unusable(work.step, place, fault.kind, detail, row.text[:MAX_TEXT_KEPT])


def not_read(unread: Mapping[str, int], most: int = 5) -> str:
    """`not read: column 'notes' (12 rows)`; "" where all text was read."""
    names = [f"{name} ({count:,} row{'s' if count > 1 else ''})" for name, count in unread.items()]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"not read: {', '.join(names[:most])}{more}" if names else ""


def many_alike(alike: int, rows: int) -> str:
    """A warning where many rows go as near-duplicates."""
    if alike < SOME or alike <= MANY * rows:
        return ""
    return (
        f"WARNING: {alike / rows:.0%} of the rows are near-duplicates of others. Look at rejected-seeds.jsonl; "
        "a higher seeds.max_rouge keeps more, null keeps all"
    )
