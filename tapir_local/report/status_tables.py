"""Tables of a run: its stages, its rounds, one round's plan, judge and answers, and the rows that were left out."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tapir_local.memory import format_bytes
from tapir_local.method.metrics import is_rouge_only
from tapir_local.printable import format_count
from tapir_local.recipe.curriculum_settings import POOL_CURRICULA
from tapir_local.report.status import short_state
from tapir_local.report.tables import (
    number_cell,
    percent_cell,
    percent_interval_cell,
    score_pair_cell,
    task_table,
    text_table,
)
from tapir_local.run_dir import UNTRAINED_ROUND
from tapir_local.tables import PlainTable, format_clock, format_seconds

# A row of the judge's table: the key of records.JudgeQuality, its description, its format.
JUDGE_MEASURES: Mapping[str, tuple[str, str]] = {
    "rows": ("rows judged", "{:,}"),
    "unjudged": ("rows without a readable score", "{:,}"),
    "agreement": ("both orders give the same winner, or a tie", "{:.1%}"),
    "order_difference": ("difference between an answer's two scores (mean)", "{:.2f}"),
    "position_bias": ("how much more the answer shown first scores (mean)", "{:+.2f}"),
    "ties": ("both answers have the same score", "{:.1%}"),
    "length_bias": ("rank correlation of length and score", "{:+.2f}"),
    "checker_rows": ("rows where the checker finds exactly one answer right", "{:,}"),
    "checker_agreement": ("there, the right answer scores more", "{:.1%}"),
}
# What the health of a judge means, by the word in records.JudgeQuality.
HEALTH_MEANING: Mapping[str, str] = {
    "good": "nothing found that speaks against its scores",
    "doubtful": "use its scores with care",
    "useless": "its scores say nothing about the answers: do not use what was planned from them",
    "unknown": "too few judged rows to say how good its scores are",
}

# The columns of the table of rounds, each with its rank (see PlainTable): 1 and above may be left out.
ROUND_COLUMNS = (
    ("round", 0),
    ("win rate", 0),
    ("95 %", 1),
    ("accuracy", 0),
    ("95 %", 1),
    ("score", 2),
    ("judged", 3),
    ("unjudged", 4),
    ("at equal length", 6),
    ("seconds", 5),
)


def rounds_table(status: Mapping[str, Any]) -> PlainTable:
    """A row for each round: win rate and accuracy on the holdout with their intervals, scores, seconds."""
    table = PlainTable(f"run {status['run']}: the holdout, round by round", rounds_caption(status))
    for name, rank in ROUND_COLUMNS:
        table.add_numbers(name, rank=rank)
    before: Mapping[str, Any] = {}
    untrained: dict[str, Any] = {"number": "untrained", "metrics": status.get("untrained"), "stages": []}
    for row in [*([untrained] if untrained["metrics"] else []), *status["rounds"]]:
        found = row["metrics"] or {}
        seconds = sum(stage["seconds"] or 0 for stage in row["stages"])
        table.add_row(
            str(row["number"]),
            percent_cell(found.get("win_rate")),
            percent_interval_cell(found.get("win_rate_interval")),
            accuracy_cell(found),
            percent_interval_cell(found.get("accuracy_interval")),
            score_cell(found, before),
            str(found.get("judged", "-")),
            str(found.get("unjudged", "-")),
            percent_cell(found.get("length_controlled")),
            f"{seconds:,.0f}",
        )
        before = found
    return table


def score_cell(found: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Mean scores, `3.5 : 10.0`; for likeness the student's score and its change from the round before."""
    score, last = found.get("student_score"), before.get("student_score")
    if score is None or not is_rouge_only(found.get("win_rate"), score):
        return score_pair_cell([score, found.get("teacher_score")])
    return f"{score:.2f}" + ("" if last is None else f" ({score - last:+.2f})")


def accuracy_cell(found: Mapping[str, Any]) -> str:
    """The accuracy, with the number of rows if the checker could not check them all."""
    checked = found.get("checked")
    some = f" of {checked:,}" if checked is not None and checked != found["rows"] else ""
    return percent_cell(found.get("accuracy")) + (some if found.get("accuracy") is not None else "")


def rounds_caption(status: Mapping[str, Any]) -> str:
    """What the numbers mean, how many calls were made, and the state of the run."""
    metrics = [row["metrics"] for row in status["rounds"] if row["metrics"]]
    judge = metrics[0]["judge"] if metrics else ""
    if metrics and is_rouge_only(metrics[-1].get("win_rate"), metrics[-1].get("student_score")):
        scored = f"Score: {judge}, 1 to 10 (10: the same words), and its change from the round before. "
    elif judge:
        scored = (
            "Win rate against the teacher's answers (a tie counts as half a win) and mean scores of student : "
            f"teacher, 1 to 10, judged by {judge}. At equal length: the length-controlled win rate. "
        )
    else:
        scored = ""
    if metrics and metrics[-1].get("accuracy") is None:
        scored += "Accuracy needs a checker (`checker` in the recipe). "
    asked, hits = format_count(status["calls"]["paid"], "call"), status["calls"]["hits"]
    return f"{scored}{asked} asked, {hits:,} from the store. State: {status['state'].rstrip('.')}."


def stages_table(status: Mapping[str, Any]) -> PlainTable:
    """A row for each stage: done or not, seconds, calls, its closing phrase."""
    table = PlainTable(
        f"run {status['run']}: {status['state'].rstrip('.')}; "
        f"{status['stages_done']} of {status['stages']} stages are done\n"
        f"{progress_line(status['now'])}{status['folder']}"
    )
    shipped = status["shipped"]
    model = [f"model/ has round {shipped['round']}: {shipped['why']}"] if shipped else []
    lines = [*model, *unusable_lines(status), *(f"WARNING: {text}" for text in status["warnings"])]
    table.caption = "\n".join(lines) or None
    table.add_column("stage", no_wrap=True)
    table.add_column("done", no_wrap=True)
    table.add_numbers("seconds")
    table.add_numbers("asked", "hits", rank=1)
    table.add_column("result")
    rounds = ((f"round {row['number']}", row["stages"]) for row in status["rounds"])
    places = [("prepare", status["prepare"]), *rounds, ("end", status["end"])]
    stages = [(f"{place} {stage['name']}", stage) for place, found in places for stage in found]
    waiting = [name for name, stage in stages if not stage["done"]]
    for name, stage in stages:
        if stage["done"] or name == waiting[0]:
            numbers = (number_cell(stage.get(key)) for key in ("seconds", "paid", "hits"))
            said = (stage.get("note") or "").partition("; ")[0]
            table.add_row(name, "yes" if stage["done"] else "next", *numbers, said)
    if len(waiting) > 1:
        table.add_row(f"{len(waiting) - 1} more", "no", "", "", "", f"up to {waiting[-1]}")
    return table


def progress_line(now: Mapping[str, Any] | None) -> str:
    """`round 1 of 3, train 38 %, 0:41 left; ends about 03:10`, with the end of its line; "" without progress."""
    if not now:
        return ""
    group, _, stage = str(now["step"]).partition("/")
    place = group if now["round"] is None else f"round {now['round']} of {now['rounds']}"
    share = f" {now['done'] / now['total']:.0%}" if now["total"] else ""
    left = "" if now["seconds_left"] is None else f", {format_seconds(now['seconds_left'])} left"
    ends = datetime.fromisoformat(now["ends"]).timestamp() if now["ends"] else None
    about = "" if ends is None else f"; ends about {format_clock(ends, time.time())}"
    return f"{place}, {stage}{share}{left}{about}\n"


def runs_table(rows: Sequence[Mapping[str, Any]], cache: str) -> PlainTable:
    """A row for each run: state, evaluated rounds, best round, calls, size, when it last changed."""
    table = PlainTable(f"runs in {cache}", "Best: the highest accuracy or, without a checker, win rate or score.")
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    table.add_numbers("rounds", rank=2)
    table.add_column("best", no_wrap=True)
    table.add_numbers("calls", rank=4)
    table.add_numbers("size", rank=3)
    table.add_column("changed (UTC)", no_wrap=True, rank=1)
    for row in rows:
        rounds = row["rounds"] or {"done": None, "planned": "?"}
        done = "-" if rounds["done"] is None else rounds["done"]
        changed = str(row["updated"] or "")[:16].replace("T", " ")
        cells = (f"{done} of {rounds['planned']}", best_cell(row["best"]), f"{row['calls']:,}")
        table.add_row(row["run"], short_state(row["state"]), *cells, format_bytes(row["bytes"]), changed)
    return table


def best_cell(best: Mapping[str, Any] | None) -> str:
    """`59.6% in round 3`, or a dash before the first evaluation."""
    if not best:
        return "-"
    value = f"{best['value']:.2f}" if best["metric"] == "student_score" else percent_cell(best["value"])
    return f"{value} in round {best['round']}"


def unusable_lines(found: Mapping[str, Any]) -> list[str]:
    """A line that says how many rows were left out and how to list them; [] if none were."""
    kinds = Counter[str]()
    for counts in found["unusable"].values():
        kinds.update(counts)
    reasons = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    total = kinds.total()
    rows = format_count(total, "row")
    return [f"{rows} left out: {reasons}. `tapir-local show {found['run']} --unusable` lists them."] if total else []


def unusable_tables(found: Mapping[str, Any], most: int = 20) -> list[PlainTable]:
    """The rows that were left out, counted by step and reason, and the first of them."""
    counts = [[step, kind, f"{n:,}"] for step, kinds in found["by_step"].items() for kind, n in kinds.items()]
    rows = [[row["step"], row["id"], row["kind"], row["detail"], row["text"]] for row in found["rows"][:most]]
    table = text_table(f"run {found['run']}: rows left out", ["step", "reason", "rows"], counts, whole=["step", "rows"])
    if not rows:
        table.caption = "No row was left out."
        return [table]
    columns = ["step", "row", "reason", "details", "text"]
    title, ranks = f"run {found['run']}: the first rows", {"details": 1, "step": 2}
    first = text_table(title, columns, rows, whole=["step", "row"], ranks=ranks)
    first.caption = f"unusable.jsonl in the run's folder has all {len(found['rows']):,}; --json prints them."
    return [table, first]


def round_tables(found: Mapping[str, Any]) -> list[PlainTable]:
    """The plan, judge, metrics and answers of a round, as far as they exist."""
    title = f"run {found['run']}, round {found['round']}"
    tables = [plan_table(title, found["plan"])] if found["plan"] else []
    tables += [judge_table(title, found["judge"], found["judge_check"])] if found["judge"] else []
    tables += [by_task_table(title, found["metrics"], found["before"])] if found["metrics"] else []
    return [*tables, answers_table(title, found)]


def by_task_table(title: str, metrics: Mapping[str, Any], before: Mapping[str, Any] | None) -> PlainTable:
    """A row for each task of the holdout: win rate or score, accuracy, and the change from the round before."""
    rows = metrics["by_task"]
    rated = not is_rouge_only(metrics["win_rate"], metrics["student_score"])
    columns = {"rows": "count", **({"win_rate": "rate"} if rated else {"student_score": "score"}), "accuracy": "rate"}
    caption = None
    if before:
        checked = any(values.get("accuracy") is not None for values in rows.values())
        name = "accuracy" if checked else "win_rate" if rated else "student_score"
        columns["change"] = "points" if checked or rated else "difference"
        rows = {
            task: {**values, "change": exceeding(values.get(name), before["by_task"].get(task, {}).get(name))}
            for task, values in rows.items()
        }
        last = "the untrained student" if before["round"] == UNTRAINED_ROUND else f"round {before['round']}"
        unit = " in points" if checked or rated else ""
        caption = f"Change: {name.replace('_', ' ')} less that of {last}{unit}; with few rows it may be chance."
    table = task_table(f"{title}: the holdout by task", rows, columns)
    table.caption = caption
    return table


def exceeding(value: float | None, before: float | None) -> float | None:
    """How much a value exceeds the one before; None if there is no such value."""
    return None if value is None or before is None else value - before


def answers_table(title: str, found: Mapping[str, Any]) -> PlainTable:
    """The answers of a round that were chosen, with their scores."""
    cells = [
        [row["id"], row["task"], row["instruction"], row["teacher"], row["student"], score_pair_cell(row["scores"])]
        for row in found["answers"]
    ]
    answers = text_table(
        f"{title}: answers to the holdout",
        ["row", "task", "instruction", "teacher", "student", "scores"],
        cells,
        whole=["row", "scores"],
        ranks={"scores": 1, "task": 2},
    )
    explain = [f"`tapir-local why {found['run']} {row['id']}` explains a row." for row in found["answers"][:1]]
    shown, matching = len(found["answers"]), found["matching"]
    more = [f"{shown:,} of {format_count(matching, 'answer')}; --limit shows more."] if shown < matching else []
    if not shown:
        more = ["No answer matches." if found["metrics"] else "The student has not answered the holdout yet."]
    answers.caption = "\n".join([*more, *explain, *unusable_lines(found)])
    return answers


def plan_table(title: str, plan: Mapping[str, Any]) -> PlainTable:
    """A row for each task: target share, share in the plan, rows to write, rows that are missing."""
    new: Counter[str] = Counter()
    for expansion in plan["expansions"]:
        new[expansion["task"]] += expansion["rows"]
    rows = {
        task: {
            "target": plan["asked"].get(task),
            "share": share,
            "to write": new[task],
            "missing": plan["short"].get(task, 0),
        }
        for task, share in plan["got"].items()
    }
    columns = {"target": "rate", "share": "rate", "to write": "count", "missing": "count"}
    table = task_table(f"{title}: the plan ({plan['curriculum']})", rows, columns)
    table.caption = ". ".join([plan_phrase(plan), *plan["notes"]])
    return table


def plan_phrase(plan: Mapping[str, Any]) -> str:
    """What a plan selects."""
    if plan["curriculum"] not in POOL_CURRICULA:
        return f"{len(plan['drawn']) + len(plan['reflected']):,} of {format_count(plan['pool'], 'seed')} selected"
    hard = f"{plan['pool_hard']:,} of {format_count(plan['pool'], 'row')} hard"
    alpha = f"hard share (alpha) {plan['alpha_got']:.0%}, target {plan['alpha']:.0%}"
    return f"{hard}; {alpha}; {format_count(len(plan['replay']), 'easy row')} replayed"


def judge_table(
    title: str, sets: Mapping[str, Mapping[str, Any]], person: Mapping[str, Any] | None = None
) -> PlainTable:
    """A row for each measure, a column each for the judgements of pool and holdout; a dash if there is no value."""
    table = PlainTable(f"{title}: the judge")
    table.add_column("")
    table.add_numbers(*sets)
    for key, (description, form) in JUDGE_MEASURES.items():
        values = (found.get(key) for found in sets.values())
        table.add_row(description, *("-" if value is None else form.format(value) for value in values))
    lines = [judge_meaning(name, found) for name, found in sets.items()]
    lines += [f"judge-check: {person['meaning']}"] if person else []
    table.caption = "\n".join(lines) or None
    return table


def judge_meaning(name: str, found: Mapping[str, Any]) -> str:
    """What the figures of the judge's scores of `pool` or `holdout` mean, in words."""
    said = [*found["notes"], HEALTH_MEANING.get(found.get("health", ""), "")]
    return f"{name}: {'; '.join(filter(None, said))}"
