"""What was paid, what the store saved, and what the rest of a run will cost: as data and as tables."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tapir_local.files import read_rows
from tapir_local.pipeline.dry_run import CostEstimate
from tapir_local.printable import format_count
from tapir_local.recipe.checks import asks_no_endpoint
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Example
from tapir_local.report.tables import money_cell
from tapir_local.run_dir import RunDir, run_of_name
from tapir_local.stages.prepare import PREPARE_STAGES
from tapir_local.stages.rounds import ROUND_STAGES
from tapir_local.stages.untrained import UNTRAINED_STAGES
from tapir_local.store.queries import has_estimates, open_store
from tapir_local.tables import PlainTable

CostGrouping = Literal["run", "round", "stage", "task"]

STAGE_ORDER = [stage.name for stage in (*PREPARE_STAGES, *UNTRAINED_STAGES, *ROUND_STAGES)]

# The requests of a judge carry the id of a row, then `#` and the number of the request.
CALL_FILTER = """
(:run is null or {of}run = :run) and (:round is null or {of}round = :round)
and (:row is null or {of}row = :row or substr({of}row, 1, length(:row) + 1) = :row || '#')
"""
USES_QUERY = """
select u.run, u.round, u.stage, u.row, u.paid, c.tokens_in, c.tokens_out, c.price, {estimated} from uses u
join calls c on c.key = u.key where {whose} order by c.id
"""
FAILURES_QUERY = """
select run, round, stage, row, tokens_in, tokens_out, price, {estimated} from attempts
where run != '' and {whose} order by id
"""
COST_FIELDS = "paid from_store failed tokens_in tokens_out money saved unpriced unpriced_hits estimated"
ZERO_COSTS: Mapping[str, float] = dict.fromkeys(COST_FIELDS.split(), 0)


def summarize_costs(
    store: Path, by: CostGrouping, run: str | None = None, number: int | None = None, row: str | None = None
) -> list[dict[str, Any]]:
    """A row for each value of `by`: rounds and stages in their order, runs by name, tasks by their number of calls.

    `paid` and `from_store` are calls; tokens are those of paid calls; `money` and `saved` are in the currency of the
    prices. `unpriced` calls were paid at a price that the recipe does not give, `unpriced_hits` are hits on such calls.
    `failed` are attempts without a usable answer, some of which were or may have been billed. For `estimated` calls
    and attempts the server gave no token counts; the largest possible counts are used.
    """
    groups = CostGroups(by, store.parent)
    sums: dict[str, dict[str, Any]] = defaultdict(lambda: dict(ZERO_COSTS))
    whose = {"run": run, "round": number, "row": row}
    with open_store(store) as conn:
        mark = "estimated" if has_estimates(conn) else "0"
        used_calls = USES_QUERY.format(estimated=mark, whose=CALL_FILTER.format(of="u."))
        failed_calls = FAILURES_QUERY.format(estimated=mark, whose=CALL_FILTER.format(of=""))
        for name, round_, stage, row_, paid, *sizes in conn.execute(used_calls, whose):
            value = groups.group(name, round_, stage, row_)
            add_call(sums[value], "paid" if paid else "from_store", *sizes)
        for name, round_, stage, row_, *sizes in conn.execute(failed_calls, whose):
            value = groups.group(name, round_, stage, row_)
            add_call(sums[value], "failed", *sizes)
    return sorted(({by: value, **found} for value, found in sums.items()), key=lambda row: cost_sort_key(by, row))


@dataclass(frozen=True)
class CostGroups:
    """The group of a call: its run, round, stage or task. The tasks of each run in the cache are read only once."""

    by: CostGrouping
    cache: Path
    tasks: dict[str, dict[str, str]] = field(default_factory=dict)

    def group(self, run: str, number: int, stage: str, row: str) -> str:
        """The value of `by` for a call."""
        if self.by != "task":
            return {"run": run, "round": str(number), "stage": stage}[self.by]
        if run not in self.tasks:
            folder = run_of_name(self.cache, run)
            self.tasks[run] = row_tasks(folder) if folder else {}
        return self.tasks[run].get(row.partition("#")[0], "unknown")


def cost_sort_key(by: CostGrouping, row: Mapping[str, Any]) -> tuple[int, str]:
    """The key that sorts the rows of a grouping."""
    value = str(row[by])
    if by == "stage":
        return (STAGE_ORDER.index(value) if value in STAGE_ORDER else len(STAGE_ORDER), value)
    place = int(value) if by == "round" else -row["paid"] if by == "task" else 0
    return (place, value)


def add_call(sums: dict[str, Any], kind: str, *sizes: Any) -> None:
    """Count a call or an attempt: tokens of prompt and reply, price, and whether they are estimated."""
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


def row_tasks(run: RunDir) -> dict[str, str]:
    """The task of each row of a run, by id, from the files that exist."""
    files = [run.path / f"{name}.jsonl" for name in ("labels", "labelled", "seeds", "holdout")]
    files += sorted(run.path.glob("round-*/train.jsonl"))
    return {row.id: row.task for row in read_examples(file for file in files if file.exists())}


def read_examples(files: Iterable[Path]) -> Iterable[Example]:
    """The rows of several files."""
    for file in files:
        yield from read_rows(Example, file)


def no_calls_sentence(recipe: Recipe) -> str:
    """What a dry run prints instead of a table if no stage will make calls; earlier stages may have made some."""
    subject = "This run" if asks_no_endpoint(recipe) else "The rest of this run"
    return f"{subject} sends no requests, so it costs nothing."


def cost_estimate_table(rows: Sequence[CostEstimate], run: str) -> PlainTable:
    """A row for each stage that will make calls, and their sum."""
    table = PlainTable(f"run {run}: calls of the remaining stages")
    table.add_column("stage", no_wrap=True)
    table.add_numbers("calls")
    table.add_numbers("in the\nstore", rank=3)
    table.add_numbers("to pay")
    table.add_numbers("tokens\nin", "tokens\nout", rank=2)
    table.add_numbers("money")
    table.add_column("", no_wrap=True, rank=1)
    for row in rows:
        hits = "?" if row.hits is None else f"{row.hits:,}"
        numbers = (
            f"{row.calls:,}",
            hits,
            f"{row.to_pay:,}",
            f"{row.tokens_in:,}",
            f"{row.tokens_out:,}",
            money_cell(row.money),
        )
        table.add_row(row.step, *numbers, "counted" if row.exact else "estimate")
    sums = [sum(getattr(row, name) for row in rows) for name in ("calls", "to_pay", "tokens_in", "tokens_out")]
    unknown = any(row.money is None and row.to_pay for row in rows)
    total = money_cell(None if unknown else sum(row.money or 0.0 for row in rows))
    table.add_section()
    table.add_row("all", f"{sums[0]:,}", "", *(f"{value:,}" for value in sums[1:]), total, "")
    table.caption = (
        "Counted: every request was looked up in the store. Estimate: the requests depend on a student or a classifier "
        "that is not trained yet, so it is not known which of them the store has; for prepare/tasks the estimate is "
        "the largest possible number. Tokens are rough: a quarter of the characters, and replies as long as the "
        "stage's other replies."
    )
    return table


def cost_table(title: str, rows: Sequence[Mapping[str, Any]], by: str) -> PlainTable:
    """A row for each value of `by`, and their sum: calls, tokens, money, and what the store saved."""
    table = PlainTable(title)
    table.add_column(by, no_wrap=True)
    failed = ("failed",) if any(row["failed"] for row in rows) else ()
    numbers = ("paid", "from_store", *failed, "tokens_in", "tokens_out")
    for name, rank in {**dict.fromkeys(numbers, 1), "paid": 0, "tokens_in": 3, "tokens_out": 2}.items():
        table.add_numbers("asked" if name == "paid" else name.replace("_", "\n"), rank=rank)
    table.add_numbers("money", "saved")
    for row in rows:
        table.add_row(str(row[by]), *(f"{row[name]:,}" for name in numbers), *money_cells([row]))
    table.add_section()
    table.add_row("all", *(f"{sum(row[name] for row in rows):,}" for name in numbers), *money_cells(rows))
    table.caption = costs_caption(rows)
    return table


def costs_caption(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What the numbers of failed attempts and of estimated calls mean, if there are any."""
    sentences = []
    if any(row["failed"] for row in rows):
        sentences.append("Failed: attempts without an answer. Tokens and money include those that may be billed.")
    if count := sum(row["unpriced"] for row in rows):
        sentences.append(
            f"Not in the sums: {format_count(count, 'call')} without a known price (teacher.price, judge.price)."
        )
    if count := sum(row["estimated"] for row in rows):
        calls = format_count(count, "call or attempt has", "calls and attempts have")
        sentences.append(f"{calls} no token counts; the largest possible counts are used.")
    return " ".join(sentences) or None


def money_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(paid, saved by the store); calls without a known price are counted apart, not as free."""
    unknown = sum(row["unpriced"] for row in rows)
    paid = sum(row["money"] for row in rows)
    known = money_cell(paid)
    paid_cell = known if not unknown else f"{known} + ?" if paid else "unknown"
    saved = sum(row["saved"] for row in rows)
    return paid_cell, "unknown" if any(row["unpriced_hits"] for row in rows) and not saved else money_cell(saved)


def round_receipt(stages: Sequence[Mapping[str, Any]], command: str) -> str:
    """What a round cost, in a line; "" if there were no calls. Where money was spent, `command` shows it by stage."""
    if not stages:
        return ""
    paid, hits, failed = (sum(row[name] for row in stages) for name in ("paid", "from_store", "failed"))
    money, saved = money_cells(stages)
    missed = f", {format_count(failed, 'failed attempt')}" if failed else ""
    said = f"{format_count(paid, 'call')} asked, {hits:,} from the store{missed}"
    if not any(row[name] for row in stages for name in ("money", "saved", "unpriced", "unpriced_hits")):
        return f"{said}; no money spent"
    return f"{said}; money {money}, saved {saved}. By stage: {command}"
