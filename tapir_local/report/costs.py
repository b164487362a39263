"""What was paid and what the store saved: by run, round, stage or task."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from tapir_local.files import read_rows
from tapir_local.pipeline.rounds import PREPARE, ROUND
from tapir_local.records import Example
from tapir_local.run_dir import RunDir, run_of_name
from tapir_local.store.queries import opened
from tapir_local.store.schema import has_estimates

STAGES = [stage.name for stage in (*PREPARE, *ROUND)]
By = Literal["run", "round", "stage", "task"]

# A judge's requests carry the row's id and, behind a #, which of them it is.
WHOSE = """
(:run is null or {of}run = :run) and (:round is null or {of}round = :round)
and (:row is null or {of}row = :row or substr({of}row, 1, length(:row) + 1) = :row || '#')
"""
PAID = """
select u.run, u.round, u.stage, u.row, u.paid, c.tokens_in, c.tokens_out, c.price, {estimated} from uses u
join calls c on c.key = u.key where {whose} order by c.id
"""
FAILED = """
select run, round, stage, row, tokens_in, tokens_out, price, {estimated} from attempts
where run != '' and {whose} order by id
"""
SUMS = "paid from_store failed tokens_in tokens_out money saved unpriced unpriced_hits estimated"
NOTHING: Mapping[str, float] = dict.fromkeys(SUMS.split(), 0)


def costs(
    store: Path, by: By, run: str | None = None, number: int | None = None, row: str | None = None
) -> list[dict[str, Any]]:
    """A row for each value of `by`: rounds and stages in their order, runs by name, tasks by their calls.

    `paid` and `from_store` are calls; tokens are those paid for; `money` and `saved` are in the money of the prices;
    `unpriced` calls were paid at a price that the recipe does not say, `unpriced_hits` were such when first paid.
    `failed` are attempts without a usable answer, some of which were or may have been billed; of `estimated` calls and
    attempts the server stated no token counts, and theirs are the most that they can be.
    """
    tasks: dict[str, dict[str, str]] = {}
    sums: dict[str, dict[str, Any]] = defaultdict(lambda: dict(NOTHING))
    whose = {"run": run, "round": number, "row": row}
    with opened(store) as conn:
        mark = "estimated" if has_estimates(conn) else "0"
        paid_calls = PAID.format(estimated=mark, whose=WHOSE.format(of="u."))
        failed_calls = FAILED.format(estimated=mark, whose=WHOSE.format(of=""))
        for name, round_, stage, row_, paid, *sizes in conn.execute(paid_calls, whose):
            value = value_of(by, store.parent, tasks, name, round_, stage, row_)
            add(sums[value], "paid" if paid else "from_store", *sizes)
        for name, round_, stage, row_, *sizes in conn.execute(failed_calls, whose):
            value = value_of(by, store.parent, tasks, name, round_, stage, row_)
            add(sums[value], "failed", *sizes)
    return sorted(({by: value, **found} for value, found in sums.items()), key=lambda row: rank(by, row))


def rank(by: By, row: Mapping[str, Any]) -> tuple[int, str]:
    """A row's place among others of its kind."""
    value = str(row[by])
    if by == "stage":
        return (STAGES.index(value) if value in STAGES else len(STAGES), value)
    place = int(value) if by == "round" else -row["paid"] if by == "task" else 0
    return (place, value)


def add(sums: dict[str, Any], kind: str, *sizes: Any) -> None:
    """Count a call or an attempt of (prompt, reply) tokens and a price, estimated or not."""
    tokens_in, tokens_out, price, estimated = sizes
    sums[kind] += 1
    if kind == "from_store":
        sums["saved"] += price or 0.0
        sums["unpriced_hits"] += price is None
        return
    sums["estimated"] += estimated
    sums["tokens_in"] += tokens_in
    sums["tokens_out"] += tokens_out
    sums["money"] += price or 0.0
    sums["unpriced"] += price is None and tokens_in + tokens_out > 0


def value_of(by: By, cache: Path, tasks: dict[str, dict[str, str]], run: str, number: int, stage: str, row: str) -> str:
    """What a call is counted under."""
    if by != "task":
        return {"run": run, "round": str(number), "stage": stage}[by]
    if run not in tasks:
        folder = run_of_name(cache, run)
        tasks[run] = tasks_of(folder) if folder else {}
    return tasks[run].get(row.partition("#")[0], "unknown")


def tasks_of(run: RunDir) -> dict[str, str]:
    """The task of each row of a run, as far as its folder is there."""
    files = [run.path / f"{name}.jsonl" for name in ("labels", "labelled", "seeds", "holdout")]
    files += sorted(run.path.glob("round-*/train.jsonl"))
    return {row.id: row.task for row in examples(file for file in files if file.exists())}


def examples(files: Iterable[Path]) -> Iterable[Example]:
    """The rows of several files."""
    for file in files:
        yield from read_rows(Example, file)
