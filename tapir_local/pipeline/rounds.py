"""BASELINE and ROUND: a round's stages in order. Each reads files and writes one output that is whole or absent."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tapir_local.files import read_record, read_rows, write_record, write_rows
from tapir_local.memory import format_bytes
from tapir_local.method import metrics
from tapir_local.method.baselines import CURRICULA
from tapir_local.method.curriculum import PlanInput
from tapir_local.pipeline.context import Stage, Work
from tapir_local.pipeline.expand import expand, few_steps, refine
from tapir_local.pipeline.judge import judge_name, refuse_unjudged, write_judgements
from tapir_local.pipeline.prepare import PREPARE
from tapir_local.pipeline.rows import after, pool, seeds, student_task
from tapir_local.recipe.schema import POOL_CURRICULA, judges_pool
from tapir_local.records import Completion, Example, Judgement, Metrics, RoundPlan
from tapir_local.resumable import OrderedWriter, resume_writing
from tapir_local.training.job import LEFT_OUT
from tapir_local.unusable import Unusable, format_left_out, record_unusable

__all__ = ["BASELINE", "PREPARE", "ROUND"]


def mix(work: Work, out: Path) -> str:
    """Round 0's rows: the seeds as the teacher answered them."""
    rows = seeds(work)
    wanted = work.recipe.curriculum.first_rows or len(rows)
    chosen = work.chance("mix").sample(rows, min(wanted, len(rows)))
    write_rows(out, chosen)
    return "; ".join([f"{len(chosen):,} rows", *few_steps(work.recipe, len(chosen))])


def answer(work: Work, out: Path) -> str:
    """The last round's student answers the pool, where the curriculum asks how hard its rows are."""
    if not judges_pool(work.recipe.curriculum):
        write_rows(out, [])
        return "not needed: the curriculum does not ask how hard a row is"
    return student_answers(work, pool(work), work.run.round(work.number - 1), out)


def student_answers(work: Work, rows: Sequence[Example], student: Path, out: Path) -> str:
    """Completions of a round's GGUF for some rows. Those that a cut attempt has written are kept.

    The others are then batched otherwise, so at near ties they may differ from an uncut attempt's (see generate.py).
    """
    gguf = student / "student.gguf"
    with resume_writing(out, student_task(work, gguf, rows), Completion) as (file, done):
        left, found = rows[len(done) :], list[Completion]()
        ordered = OrderedWriter[Completion](file, [row.id for row in left])
        if left:
            prompts, ids = [row.prompt for row in left], [row.id for row in left]
            found = work.tools.generate(gguf, prompts, ids, after(work, len(done), len(rows)), ordered.add)
    return told([*done, *found], len(done))


def told(answers: Sequence[Completion], kept: int) -> str:
    """How many answers there are, how many of them a cut attempt had kept, and what is to be said of others."""
    cut, unasked = (sum(row.finish == "length" for row in answers), sum(not row.asked for row in answers))
    said = f"{len(answers):,} answers, {sum(row.tokens for row in answers):,} tokens"
    said += f", {cut:,} cut at the limit" if cut else ""
    said += f", {unasked:,} rows that could not be asked" if unasked else ""
    return said + (f"; {kept:,} of them were there already" if kept else "")


def judge(work: Work, out: Path) -> str:
    """The pool's rows judged: the teacher's answer and the student's, as the recipe's judge.mode says."""
    completions = read_rows(Completion, work.folder / "answers.jsonl")
    if not judges_pool(work.recipe.curriculum):
        write_rows(out, [])
        return "not needed: there are no answers"
    return write_judgements(work, "judge", pool(work), completions, out)


def plan(work: Work, out: Path) -> str:
    """What this round trains on."""
    known = situation(work)
    refuse_unjudged(work, known.judgements)
    planned = CURRICULA[work.recipe.curriculum.name](known)
    write_record(out, planned)
    return "; ".join([summary(planned), *planned.notes])


def situation(work: Work) -> PlanInput:
    """What is known when this round is planned."""
    held = read_rows(Example, work.run.path / "holdout.jsonl")
    before = read_rows(Judgement, work.run.round(work.number - 1) / "holdout-judgements.jsonl")
    return PlanInput(
        pool=pool(work),
        seeds=seeds(work),
        judgements=read_rows(Judgement, work.folder / "judgements.jsonl"),
        targets={label: task.share for label, task in work.recipe.task_table().items()},
        settings=work.recipe.curriculum,
        number=work.number,
        can_expand=work.recipe.can_expand,
        rng=work.chance("plan"),
        gaps=metrics.gaps_by_task(held, before),
    )


def summary(planned: RoundPlan) -> str:
    """The plan in a phrase."""
    if planned.curriculum not in POOL_CURRICULA:
        return f"{len(planned.drawn) + len(planned.reflected):,} of {planned.pool:,} seeds taken"
    counts = f"{len(planned.hard):,} of them chosen, {planned.to_write:,} to write"
    return f"{planned.pool_hard:,} of {planned.pool:,} rows hard; {counts}, {len(planned.replay):,} easy ones replayed"


def train(work: Work, out: Path) -> str:
    """The student, from what the last round trained or from the base, on this round's rows."""
    go_on = work.number > 0 and work.recipe.train.start == "previous"
    previous = work.run.round(work.number - 1) / "adapter" if go_on else None
    rows, seed = work.folder / "train.jsonl", work.recipe.random_seed + work.number
    try:
        work.tools.train(rows, previous, seed, out, work.progress)
    finally:  # also where so many are left out that nothing was trained
        left = untrained(work)
        record_unusable(work.run, work.step, left)
    base = f"the last round's {'weights' if work.recipe.train.method == 'full' else 'adapter'}" if go_on else "the base"
    return f"from {base}{format_left_out(left)}"


def untrained(work: Work) -> list[Unusable]:
    """The round's rows that the training left out: too long for the student, or refused by its chat template."""
    path = work.folder / "train" / LEFT_OUT
    return [replace(row, step=work.step) for row in read_rows(Unusable, path)] if path.exists() else []


def export(work: Work, out: Path) -> str:
    """The student as GGUF."""
    work.tools.export(work.folder / "adapter", out, work.progress)
    alone, quant = work.recipe.export.rounds == "adapter", work.recipe.export.quant
    return f"{format_bytes(out.stat().st_size)}, " + (f"an adapter over the base's {quant}" if alone else quant)


def gate(work: Work, out: Path) -> str:
    """Whether the GGUF is the trained model: a report, or the run stops."""
    work.tools.gate(
        work.folder / "adapter", work.folder / "student.gguf", work.folder / "train.jsonl", out, work.progress
    )
    return "the GGUF agrees with the trained model"


def holdout_answer(work: Work, out: Path) -> str:
    """This round's student answers the holdout."""
    return student_answers(work, read_rows(Example, work.run.path / "holdout.jsonl"), work.folder, out)


def holdout_judge(work: Work, out: Path) -> str:
    """The holdout's answers judged."""
    completions = read_rows(Completion, work.folder / "holdout-answers.jsonl")
    return write_judgements(
        work, "holdout-judge", read_rows(Example, work.run.path / "holdout.jsonl"), completions, out
    )


def evaluate(work: Work, out: Path) -> str:
    """Win rate and accuracy on the holdout."""
    rows = read_rows(Example, work.run.path / "holdout.jsonl")
    completions = read_rows(Completion, work.folder / "holdout-answers.jsonl")
    judgements = read_rows(Judgement, work.folder / "holdout-judgements.jsonl")
    found = metrics.compute_metrics(
        work.number, rows, completions, judgements, checked(work, rows, completions), judge_name(work.recipe)
    )
    if work.recipe.judge.kind == "reference":
        found = metrics.without_win_rate(found, rows, judgements)
    write_record(out, found)
    return headline(found, metrics_before(work))


def metrics_before(work: Work) -> Metrics | None:
    """The last round's metrics, None in the first."""
    return read_record(Metrics, work.run.round(work.number - 1) / "metrics.json") if work.number else None


def checked(work: Work, rows: Iterable[Example], completions: Iterable[Completion]) -> dict[str, bool | None]:
    """By id, whether the recipe's checker finds an answer right; None where it cannot tell or there is none."""
    check = work.tools.check
    return {row.id: check(row, text.text) if check else None for row, text in zip(rows, completions, strict=True)}


def headline(found: Metrics, before: Metrics | None = None) -> str:
    """Win rate, or likeness and its change, and accuracy in a phrase, and whether the holdout is large enough."""
    win_rate = "win rate unknown" if found.win_rate is None else f"win rate {found.win_rate:.1%}"
    if found.student_score is not None and metrics.is_rouge_only(found.win_rate, found.student_score):
        win_rate = f"likeness {found.student_score:.2f} of 10"
        if before and before.student_score is not None:
            win_rate += f" ({found.student_score - before.student_score:+.2f} on round {before.round})"
    some = f" of the {found.checked:,} rows that a checker can tell of" if found.checked != found.rows else ""
    said = win_rate if found.accuracy is None else f"{win_rate}, accuracy {found.accuracy:.1%}{some}"
    unjudged = f"{found.unjudged:,} unjudged rows left out of the win rate" if found.unjudged else ""
    return "; ".join(part for part in (said, unjudged, metrics.warn_small_holdout(found)) if part)


STUDENT = (
    Stage("train", "adapter", train),
    Stage("export", "student.gguf", export),
    Stage("gate", "gate.json", gate),
    Stage("holdout-answer", "holdout-answers.jsonl", holdout_answer, resumes="holdout-answers.jsonl"),
    Stage("holdout-judge", "holdout-judgements.jsonl", holdout_judge),
    Stage("evaluate", "metrics.json", evaluate),
)
BASELINE = (Stage("mix", "train.jsonl", mix), *STUDENT)
ROUND = (
    Stage("answer", "answers.jsonl", answer, resumes="answers.jsonl"),
    Stage("judge", "judgements.jsonl", judge),
    Stage("plan", "plan.json", plan),
    Stage("expand", "expanded.jsonl", expand, resumes="expand-scores.jsonl"),
    Stage("refine", "train.jsonl", refine, resumes="refine-scores.jsonl"),
    *STUDENT,
)
