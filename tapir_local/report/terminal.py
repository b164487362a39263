"""Rich: records in; tables, progress and closing lines out."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from tapir_local.method.metrics import is_rouge_only
from tapir_local.pipeline.dry_run import Foreseen
from tapir_local.pipeline.loop import Step, Watch
from tapir_local.printable import printable
from tapir_local.recipe.schema import POOL_CURRICULA
from tapir_local.tables import PlainTable, join_styled, plain_text

# Without a terminal there is no bar: a line so often (seconds) is the sign of life in a log.
LOG_EVERY = 30.0


class Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="cyan")


@contextmanager
def watched(console: Console, done: int, total: int) -> Iterator[Watch]:
    """A Watch that shows a bar for the step at work and keeps one line for each that has ended, `done` before now."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield Shown(console, bars, done, total).watch()


class Shown:
    """What is on the screen: how many steps have ended, the bar of the present one, when a line was last logged."""

    def __init__(self, console: Console, bars: Progress, done: int, total: int) -> None:
        self.console, self.bars, self.total, self.count = console, bars, total, done
        self.bar = bars.add_task("", visible=False, said="")
        self.step, self.logged = "", 0.0

    def watch(self) -> Watch:
        """The callables that the loop is given."""
        return Watch(self.begins, self.progress, self.ends)

    def begins(self, step: Step) -> None:
        """A new bar."""
        self.step, self.logged = step.name, time.monotonic()
        self.bars.reset(self.bar, total=None, description=step.name, visible=True, said="")

    def progress(self, done: int, total: int, said: str) -> None:
        """Move the bar; without a terminal, now and then a line."""
        self.bars.update(self.bar, completed=done, total=total or None, said=printable(said))
        if not self.console.is_terminal and time.monotonic() - self.logged > LOG_EVERY:
            self.logged = time.monotonic()
            self.console.print(plain_text(f"  {self.step}: {done:,} of {total:,} {said}"), soft_wrap=True)

    def ends(self, step: Step, taken: Mapping[str, Any]) -> None:
        """The closing line: what came out, calls, seconds."""
        self.count += 1
        self.bars.update(self.bar, visible=False)
        place, seconds = f"{self.count:>{len(str(self.total))}}/{self.total}", f"  {taken['seconds']:.1f} s"
        said = f"  {taken['note']}{calls_phrase(taken)}"
        line = join_styled((place, "dim"), " ", (step.name, "bold"), said, (seconds, "dim"))
        self.console.print(line, soft_wrap=True)


def calls_phrase(taken: Mapping[str, Any]) -> str:
    """`; 1,200 calls paid, 300 hits`, or nothing where none was made."""
    if not taken["paid"] + taken["hits"]:
        return ""
    return f"; {taken['paid']:,} calls paid, {taken['hits']:,} hits"


def percent(value: float | None) -> str:
    """A rate for people; a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"


def interval(pair: Sequence[float] | None) -> str:
    """A 95 % interval for people."""
    return "" if pair is None else f"{pair[0]:.0%} to {pair[1]:.0%}"


def rounds_table(status: Mapping[str, Any]) -> PlainTable:
    """A row a round: win rate and accuracy on the holdout with their intervals, seconds."""
    table = PlainTable(f"run {status['run']}: the holdout, round by round", caption(status))
    for name in ("round", "win rate", "95 %", "accuracy", "95 %", "score", "judged", "unjudged", "seconds"):
        table.add_column(name, justify="right")
    before: Mapping[str, Any] = {}
    for row in status["rounds"]:
        found = row["metrics"] or {}
        seconds = sum(stage["seconds"] or 0 for stage in row["stages"])
        table.add_row(
            str(row["number"]),
            percent(found.get("win_rate")),
            interval(found.get("win_rate_interval")),
            accuracy_cell(found),
            interval(found.get("accuracy_interval")),
            score_cell(found, before),
            str(found.get("judged", "-")),
            str(found.get("unjudged", "-")),
            f"{seconds:,.0f}",
        )
        before = found
    return table


def score_cell(found: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Mean scores, `3.5 : 10.0`; of likeness the student's and its change on the round before, `3.50 (+0.25)`."""
    score, last = found.get("student_score"), before.get("student_score")
    if score is None or not is_rouge_only(found.get("win_rate"), score):
        return scores_phrase([score, found.get("teacher_score")])
    return f"{score:.2f}" + ("" if last is None else f" ({score - last:+.2f})")


def accuracy_cell(found: Mapping[str, Any]) -> str:
    """The accuracy, and of how many rows where a checker cannot tell of all."""
    checked = found.get("checked")
    some = f" of {checked:,}" if checked is not None and checked != found["rows"] else ""
    return percent(found.get("accuracy")) + (some if found.get("accuracy") is not None else "")


def caption(status: Mapping[str, Any]) -> str:
    """What the numbers mean and what was paid."""
    calls, judge = status["calls"], next((row["metrics"]["judge"] for row in status["rounds"] if row["metrics"]), "")
    metrics = [row["metrics"] for row in status["rounds"] if row["metrics"]]
    if metrics and is_rouge_only(metrics[-1].get("win_rate"), metrics[-1].get("student_score")):
        scored = f"Score: {judge}, 1 to 10 where the words are the same, and its change on the round before. "
        return f"{scored}{calls['paid']:,} calls paid, {calls['hits']:,} from the store. State: {status['state']}."
    scored = (
        f"Win rate against the teacher's answers (a tie is half a win) and mean score of student : teacher, 1 to 10, "
        f"judged by {judge}. "
        if judge
        else ""
    )
    return f"{scored}{calls['paid']:,} calls paid, {calls['hits']:,} from the store. State: {status['state']}."


def stages_table(status: Mapping[str, Any]) -> PlainTable:
    """A row a stage: done or not, seconds, calls, its closing phrase."""
    table = PlainTable(f"run {status['run']}: stages")
    told = [*unusable_phrase(status), *(f"WARNING: {text}" for text in status["warnings"])]
    table.caption = "\n".join(told) or None
    for name in ("stage", "done"):
        table.add_column(name)
    for name in ("seconds", "paid", "hits"):
        table.add_column(name, justify="right")
    table.add_column("")
    rounds = ((f"round {row['number']}", row["stages"]) for row in status["rounds"])
    for place, stages in [("prepare", status["prepare"]), *rounds, ("end", status["end"])]:
        for stage in stages:
            numbers = (shown(stage.get(key)) for key in ("seconds", "paid", "hits"))
            table.add_row(
                f"{place} {stage['name']}", "yes" if stage["done"] else "no", *numbers, stage.get("note") or ""
            )
    return table


def unusable_phrase(found: Mapping[str, Any]) -> list[str]:
    """A line that says how many rows were left out and how to see them; none where none was."""
    kinds = Counter[str]()
    for counts in found["unusable"].values():
        kinds.update(counts)
    said = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    total = kinds.total()
    rows = "1 row" if total == 1 else f"{total:,} rows"
    return [f"{rows} left out: {said}. `tapir-local show {found['run']} --unusable` lists them."] if total else []


def unusable_tables(found: Mapping[str, Any], most: int = 20) -> list[PlainTable]:
    """The rows left out, counted by step and reason, and the first of them."""
    counts = [[step, kind, f"{n:,}"] for step, kinds in found["by_step"].items() for kind, n in kinds.items()]
    rows = [[row["step"], row["id"], row["kind"], row["detail"], row["text"]] for row in found["rows"][:most]]
    table = plain_table(f"run {found['run']}: rows left out", ["step", "reason", "rows"], counts)
    if not rows:
        table.caption = "No row was left out."
        return [table]
    first = plain_table(f"run {found['run']}: the first rows", ["step", "row", "reason", "in particular", "text"], rows)
    first.caption = f"All {len(found['rows']):,} are in unusable.jsonl of the run's folder; --json prints them."
    return [table, first]


def shown(value: float | None) -> str:
    """A number for people."""
    return "" if value is None else f"{value:,}"


def tasks_table(title: str, rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> PlainTable:
    """A row a task; `columns` maps a key of its values to how it is shown: `rate`, `score` or `count`."""
    table = PlainTable(title)
    table.add_column("task")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for task, values in rows.items():
        table.add_row(task, *(cell(values.get(name), kind) for name, kind in columns.items()))
    return table


def cell(value: float | None, kind: str) -> str:
    """A value of a `rate`, a `score` or a `count`, for people."""
    if kind == "score":
        return "-" if value is None else f"{value:.2f}"
    return percent(value) if kind == "rate" else f"{int(value or 0):,}"


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> PlainTable:
    """Text in columns."""
    table = PlainTable(title)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def round_tables(found: Mapping[str, Any]) -> list[PlainTable]:
    """A round's plan, metrics and answers, as far as they are there."""
    title = f"run {found['run']}, round {found['round']}"
    tables = [plan_table(title, found["plan"])] if found["plan"] else []
    tables += [judge_table(title, found["judge"])] if found["judge"] else []
    if found["metrics"]:
        alike = is_rouge_only(found["metrics"]["win_rate"], found["metrics"]["student_score"])
        columns = {
            "rows": "count",
            **({"student_score": "score"} if alike else {"win_rate": "rate"}),
            "accuracy": "rate",
        }
        tables.append(tasks_table(f"{title}: the holdout by task", found["metrics"]["by_task"], columns))
    cells = [
        [row["task"], row["instruction"], row["teacher"], row["student"], scores_phrase(row["scores"])]
        for row in found["answers"]
    ]
    answers = plain_table(f"{title}: some answers", ["task", "instruction", "teacher", "student", "scores"], cells)
    answers.caption = "\n".join(unusable_phrase(found)) or None
    return [*tables, answers]


def plan_table(title: str, plan: Mapping[str, Any]) -> PlainTable:
    """A row a task: the share asked and got, new rows."""
    new: Counter[str] = Counter()
    for expansion in plan["expansions"]:
        new[expansion["task"]] += expansion["rows"]
    rows = {
        task: {
            "asked": plan["asked"].get(task),
            "got": share,
            "to write": new[task],
            "short": plan["short"].get(task, 0),
        }
        for task, share in plan["got"].items()
    }
    columns = {"asked": "rate", "got": "rate", "to write": "count", "short": "count"}
    table = tasks_table(f"{title}: the plan ({plan['curriculum']})", rows, columns)
    table.caption = ". ".join([plan_phrase(plan), *plan["notes"]])
    return table


def plan_phrase(plan: Mapping[str, Any]) -> str:
    """What a plan takes."""
    if plan["curriculum"] not in POOL_CURRICULA:
        return f"{len(plan['drawn']) + len(plan['reflected']):,} of {plan['pool']:,} seeds taken"
    hard = f"{plan['pool_hard']:,} of {plan['pool']:,} rows hard"
    alpha = f"alpha asked {plan['alpha']:.0%}, got {plan['alpha_got']:.0%}"
    return f"{hard}; {alpha}; {len(plan['replay']):,} easy rows replayed"


# What a judge's table shows: the key of records.JudgeQuality, what it says to people, and its form.
JUDGED: Mapping[str, tuple[str, str]] = {
    "rows": ("rows judged", "{:,}"),
    "unjudged": ("rows unreadable", "{:,}"),
    "agreement": ("the two orders name the same winner, or both tie", "{:.1%}"),
    "order_difference": ("an answer's two scores differ by (mean)", "{:.2f}"),
    "position_bias": ("the answer shown first scores more by (mean)", "{:+.2f}"),
    "ties": ("both answers score the same", "{:.1%}"),
    "length_bias": ("rank correlation of length with score", "{:+.2f}"),
}


def judge_table(title: str, sets: Mapping[str, Mapping[str, Any]]) -> PlainTable:
    """A row a measure, a column each for the pool's judgements and the holdout's; a dash where there is no measure."""
    table = PlainTable(f"{title}: the judge")
    table.add_column("")
    for name in sets:
        table.add_column(name, justify="right")
    for key, (words, form) in JUDGED.items():
        values = (found.get(key) for found in sets.values())
        table.add_row(words, *("-" if value is None else form.format(value) for value in values))
    table.caption = "; ".join(f"{name}: {note}" for name, found in sets.items() for note in found["notes"]) or None
    return table


def scores_phrase(scores: Sequence[float | None] | None) -> str:
    """`3.5 : 10.0`, the student's and the teacher's."""
    if scores is None or scores[0] is None or scores[1] is None:
        return "-"
    return f"{scores[0]:.1f} : {scores[1]:.1f}"


def money(value: float | None) -> str:
    """Money for people, to a cent, or to four places where it is little."""
    if value is None:
        return "unknown"
    return f"{value:,.2f}" if value >= 1 or not value else f"{value:,.4f}"


def forecast_table(rows: Sequence[Foreseen], run: str) -> PlainTable:
    """A row a stage that will ask somebody, and their sum."""
    table = PlainTable(f"run {run}: what the rest will ask")
    table.add_column("stage")
    for name in ("calls", "in the store", "to pay", "tokens in", "tokens out", "money"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        hits = "?" if row.hits is None else f"{row.hits:,}"
        told = (
            f"{row.calls:,}",
            hits,
            f"{row.to_pay:,}",
            f"{row.tokens_in:,}",
            f"{row.tokens_out:,}",
            money(row.money),
        )
        table.add_row(row.step, *told, "counted" if row.exact else "estimate")
    sums = [sum(getattr(row, name) for row in rows) for name in ("calls", "to_pay", "tokens_in", "tokens_out")]
    unknown = any(row.money is None and row.to_pay for row in rows)
    total = money(None if unknown else sum(row.money or 0.0 for row in rows))
    table.add_section()
    table.add_row("all", f"{sums[0]:,}", "", *(f"{value:,}" for value in sums[1:]), total, "")
    table.caption = (
        "Counted: every request was looked up. Estimate: it depends on a student or a classifier that is not trained "
        "yet (of prepare/tasks, the most it can be); what of it the store has is not known. Tokens are rough: a "
        "quarter of the letters, and replies as long as the stage's others."
    )
    return table


def cost_table(title: str, rows: Sequence[Mapping[str, Any]], by: str) -> PlainTable:
    """A row for each value of `by`: calls paid and from the store, tokens, money, what the store saved; their sum."""
    table = PlainTable(title)
    table.add_column(by, min_width=13)
    numbers = ("paid", "from_store", "failed", "tokens_in", "tokens_out")
    for name in (*numbers, "money", "saved"):
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(str(row[by]), *(f"{row[name]:,}" for name in numbers), *moneys([row]))
    table.add_section()
    table.add_row("all", *(f"{sum(row[name] for row in rows):,}" for name in numbers), *moneys(rows))
    table.caption = costs_caption(rows)
    return table


def costs_caption(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What the numbers of failed attempts and of estimated ones mean, where there are any."""
    said = []
    if any(row["failed"] for row in rows):
        said.append("Failed: attempts without an answer. What may have been billed is in the tokens and the money.")
    if count := sum(row["estimated"] for row in rows):
        said.append(f"Of {count:,} calls and attempts no token counts came; the most that they may be is counted.")
    return " ".join(said) or None


def moneys(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(paid, saved by the store) for people; calls of an unknown price are said, not counted as nothing."""
    unknown = sum(row["unpriced"] for row in rows)
    paid = sum(row["money"] for row in rows)
    told = (
        f"{money(paid)} + {unknown:,} of unknown price" if unknown and paid else "unknown" if unknown else money(paid)
    )
    saved = sum(row["saved"] for row in rows)
    return told, "unknown" if any(row["unpriced_hits"] for row in rows) and not saved else money(saved)


def receipt(
    title: str, stages: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]]
) -> tuple[PlainTable, Text] | tuple[()]:
    """What a round cost by stage, and a line of what each task did; nothing where nobody was asked."""
    if not stages:
        return ()
    dearest = sorted(tasks, key=lambda row: -row["paid"])
    told = (f"{row['task']} {row['paid']:,} paid, {row['from_store']:,} from the store" for row in dearest)
    return cost_table(title, stages, "stage"), plain_text(f"By task: {'; '.join(told)}.")
