"""The stages of a round, in order; each reads files and writes one output that is complete or absent."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.files import read_record, read_rows, write_record, write_rows
from tapir_local.memory import format_bytes
from tapir_local.method import metrics
from tapir_local.method.baselines import CURRICULA
from tapir_local.method.curriculum import PlanInput
from tapir_local.method.judge_quality import check_both_answers, measure_judge
from tapir_local.method.judging import preference_pairs
from tapir_local.printable import format_count
from tapir_local.recipe.curriculum_settings import POOL_CURRICULA, judges_pool
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Completion, Example, Judgement, Metrics, RoundPlan, SchedulePart
from tapir_local.resumable import OrderedWriter, resume_writing
from tapir_local.run_dir import RunDir
from tapir_local.stages.ahead import judging_ahead
from tapir_local.stages.context import Stage, Work
from tapir_local.stages.expand import expand_stage, refine_stage, warn_few_steps
from tapir_local.stages.judge import judge_name, refuse_unjudged, refuse_useless_judge, write_judgements
from tapir_local.stages.run_rows import judged_answers, offset_progress, read_answered_seeds, read_pool, resumable_task
from tapir_local.training.job import LEFT_OUT_FILE
from tapir_local.training.loss import describe_loss, read_losses
from tapir_local.unusable import Unusable, format_left_out, read_unusable, record_unusable


def mix_stage(work: Work, out: Path) -> str:
    """The training rows of round 0: the seeds with the teacher's answers."""
    rows = read_answered_seeds(work)
    wanted = work.recipe.curriculum.first_rows or len(rows)
    chosen = work.rng("mix").sample(rows, min(wanted, len(rows)))
    write_rows(out, chosen)
    return "; ".join([format_count(len(chosen), "row"), *warn_few_steps(work.recipe, len(chosen))])


def answer_stage(work: Work, out: Path) -> str:
    """The last round's student answers the pool, if the curriculum measures difficulty."""
    if not judges_pool(work.recipe.curriculum):
        write_rows(out, [])
        return "not needed: the curriculum does not measure difficulty"
    return generate_answers(work, read_pool(work), work.run.round(work.number - 1), out, "judge")


def generate_answers(work: Work, rows: Sequence[Example], student: Path, out: Path, judge_stage: str = "") -> str:
    """Write the answers of a round's student to some rows; answers from an interrupted attempt are kept.

    The remaining rows then run in other batches, so near-ties may be decided differently (see generate.py). Where
    `judge.ahead` allows, the judge is meanwhile asked about the answers in the file, as in the stage `judge_stage`. If
    that is "", it is not asked.
    """
    gguf = student / "student.gguf"
    with (
        resume_writing(out, resumable_task(work, gguf, rows), Completion) as (file, done),
        judging_ahead(work, judge_stage, rows, file) as written,
    ):
        left, found = rows[len(done) :], list[Completion]()
        written.judge(done)
        ordered = OrderedWriter[Completion](file, [row.id for row in left], written.judge)
        if left:
            found = work.backends.generate(
                gguf=gguf,
                prompts=[row.prompt for row in left],
                ids=[row.id for row in left],
                progress=offset_progress(work, len(done), len(rows)),
                on_result=ordered.add,
            )
    return summarize_answers([*done, *found], len(done)) + written.summary()


def summarize_answers(answers: Sequence[Completion], kept: int) -> str:
    """How many answers there are, how many were cut, and how many an interrupted attempt had written."""
    cut, unasked = (sum(row.finish == "length" for row in answers), sum(not row.asked for row in answers))
    tokens = sum(row.tokens for row in answers)
    said = f"{format_count(len(answers), 'answer')}, {format_count(tokens, 'token')}"
    said += f", {cut:,} cut at the limit" if cut else ""
    said += f", {format_count(unasked, 'row')} could not be asked" if unasked else ""
    return said + (f"; {kept:,} of them from an earlier attempt" if kept else "")


def judge_stage(work: Work, out: Path) -> str:
    """Judgements of the teacher's and the student's answers to the pool, as judge.mode says."""
    completions = read_rows(Completion, work.folder / "answers.jsonl")
    if not judges_pool(work.recipe.curriculum):
        write_rows(out, [])
        return "not needed: there are no answers"
    return write_judgements(work, "judge", read_pool(work), completions, out)


def plan_stage(work: Work, out: Path) -> str:
    """The plan of this round: which rows it trains on, and which are to be written."""
    known = read_situation(work)
    refuse_unjudged(work, known.judgements)
    if work.recipe.judge.health == "stop" and known.judgements:
        completions = read_rows(Completion, work.folder / "answers.jsonl")
        right = check_both_answers(work.backends.check, known.pool, completions)
        refuse_useless_judge(work, measure_judge(known.judgements, right), "judgements.jsonl")
    planned = CURRICULA[work.recipe.curriculum.name](known)
    write_record(out, planned)
    return "; ".join([summarize_plan(planned), *planned.notes])


def read_situation(work: Work) -> PlanInput:
    """What a curriculum needs to plan this round."""
    held = read_rows(Example, work.run.path / "holdout.jsonl")
    before = read_rows(Judgement, work.run.round(work.number - 1) / "holdout-judgements.jsonl")
    return PlanInput(
        pool=read_pool(work),
        seeds=read_answered_seeds(work),
        judgements=read_rows(Judgement, work.folder / "judgements.jsonl"),
        targets={label: task.share for label, task in work.recipe.task_table().items()},
        settings=work.recipe.curriculum,
        number=work.number,
        can_expand=work.recipe.can_expand,
        rng=work.rng("plan"),
        gaps=metrics.gaps_by_task(held, before),
        earlier=read_earlier_judgements(work),
        trained=read_last_trained(work),
    )


def read_earlier_judgements(work: Work) -> dict[str, Judgement]:
    """By row id, the last judgement in an earlier round; empty if no setting uses it."""
    if work.recipe.curriculum.mfd_ceiling is None and not work.recipe.curriculum.learnable:
        return {}
    files = [work.run.round(number) / "judgements.jsonl" for number in range(1, work.number)]
    return {row.id: row for file in files for row in read_rows(Judgement, file)}


def read_last_trained(work: Work) -> frozenset[str]:
    """Ids of the rows that the last round trained on; empty if no setting uses it, and in round 1."""
    if not work.recipe.curriculum.learnable or work.number <= 1:
        return frozenset()
    last = work.number - 1
    left = {row.id for row in read_unusable(work.run) if row.step == f"round-{last:02d}/train"}
    rows = read_rows(Example, work.run.round(last) / "train.jsonl")
    return frozenset(row.id for row in rows if row.id not in left)


def summarize_plan(planned: RoundPlan) -> str:
    """The plan in a phrase."""
    if planned.curriculum not in POOL_CURRICULA:
        return f"{len(planned.drawn) + len(planned.reflected):,} of {format_count(planned.pool, 'seed')} taken"
    hard = f"{planned.pool_hard:,} of {format_count(planned.pool, 'row')} hard"
    taken = f"{len(planned.hard):,} hard, {planned.to_write:,} to write, {len(planned.replay):,} easy (replay)"
    return f"{hard}; takes {taken}"


def pairs_stage(work: Work, out: Path) -> str:
    """The preference pairs of all rounds; none if they do not fill a step, and then the round has no other stage."""
    judged = judged_answers(work.run, range(1, work.number))
    pairs, cut = preference_pairs(judged, work.recipe.curriculum.mfd_threshold)
    least = work.recipe.train.batch_size
    write_rows(out, pairs if len(pairs) >= least else [])
    said = format_count(len(pairs), "pair")
    if len(pairs) < least:
        said = f"round skipped: {said}, fewer than train.batch_size ({least:,}); the last round's student stays"
    return said + (f"; {cut:,} more left out: the student's answer was cut" if cut else "")


def has_too_few_pairs(folder: Path) -> bool:
    """Whether the round on preference pairs, in this folder, found too few to train on."""
    path = folder / PAIRS_STAGE.output
    return path.exists() and not path.stat().st_size


def last_trained_round(run: RunDir, recipe: Recipe) -> int:
    """The last round of a finished run: that on preference pairs, unless there were too few."""
    skipped = recipe.pairs_round and has_too_few_pairs(run.round(recipe.pairs_round))
    return recipe.rounds if skipped else recipe.all_rounds


def refuse_moved_pairs(old: Recipe, new: Recipe, run: RunDir) -> None:
    """TapirError if a recipe makes a round that has begun the one on preference pairs, or no longer that one."""
    for number in {old.pairs_round, new.pairs_round}:
        if number and old.pairs_round != new.pairs_round and (run.round(number) / PAIRS_STAGE.output).exists():
            first, now = ("pairs", "is") if number == old.pairs_round else ("answer", "is not")
            raise TapirError(
                f"round {number} of run {run.name!r} {now} the one on preference pairs, which comes after all others",
                where="rounds",
                fix=f"Undo it before you change their number: tapir-local redo {run.name} --round {number} "
                f"--from {first}",
            )


def train_stage(work: Work, out: Path) -> str:
    """The student, trained on this round's rows, from the last round's weights or from the base."""
    part = schedule_part(work.number, work.recipe.rounds)
    go_on = work.number > 0 and (work.recipe.train.start == "previous" or part == "preference")
    previous = work.run.round(work.number - 1) / "adapter" if go_on else None
    rows, seed = work.folder / "train.jsonl", work.recipe.random_seed + work.number
    try:
        work.backends.train(rows=rows, previous=previous, seed=seed, part=part, out=out, progress=work.progress)
    finally:  # also if so many rows are left out that nothing is trained
        left = rows_left_out_of_training(work)
        record_unusable(work.run, work.step, left)
    base = f"the last round's {'weights' if work.recipe.train.method == 'full' else 'adapter'}" if go_on else "the base"
    loss = describe_loss(read_losses(out / "train_log.jsonl"))
    return f"from {base}{loss and ', ' + loss}{format_left_out(left)}"


def schedule_part(number: int, rounds: int) -> SchedulePart:
    """The part of round `number` in a schedule over the rounds 0 to `rounds`, after which one trains on pairs."""
    if number > rounds:
        return "preference"
    if rounds == 0:
        return "whole"
    return "first" if number == 0 else "middle" if number < rounds else "last"


def rows_left_out_of_training(work: Work) -> list[Unusable]:
    """The round's rows that are too long for the student or refused by its chat template."""
    path = work.folder / "train" / LEFT_OUT_FILE
    return [replace(row, step=work.step) for row in read_rows(Unusable, path)] if path.exists() else []


def export_stage(work: Work, out: Path) -> str:
    """The student as GGUF."""
    work.backends.export(adapter=work.folder / "adapter", out=out, progress=work.progress)
    alone, quant = work.recipe.export.rounds == "adapter", work.recipe.export.quant
    return f"{format_bytes(out.stat().st_size)}, " + (f"an adapter for the base in {quant}" if alone else quant)


def gate_stage(work: Work, out: Path) -> str:
    """The report of a comparison of the GGUF with the trained model; the run stops if they differ."""
    work.backends.gate(
        adapter=work.folder / "adapter",
        gguf=work.folder / "student.gguf",
        rows=work.folder / "train.jsonl",
        out=out,
        progress=work.progress,
    )
    return "the GGUF agrees with the trained model"


def holdout_answer_stage(work: Work, out: Path) -> str:
    """This round's student answers the holdout."""
    return generate_answers(work, read_holdout(work), work.folder, out, "holdout-judge")


def holdout_judge_stage(work: Work, out: Path) -> str:
    """Judgements of the holdout's answers."""
    completions = read_rows(Completion, work.folder / "holdout-answers.jsonl")
    return write_judgements(work, "holdout-judge", read_holdout(work), completions, out)


def evaluate_stage(work: Work, out: Path) -> str:
    """Win rate and accuracy on the holdout."""
    found = compute_holdout_metrics(work, work.number, work.folder)
    if found.judge_quality:
        refuse_useless_judge(work, found.judge_quality, "holdout-judgements.jsonl")
    write_record(out, found)
    return summarize_metrics(found, previous_metrics(work))


def compute_holdout_metrics(work: Work, number: int, folder: Path) -> Metrics:
    """The metrics of round `number` from the answers and judgements of the holdout in `folder`."""
    rows = read_holdout(work)
    completions = read_rows(Completion, folder / "holdout-answers.jsonl")
    judgements = read_rows(Judgement, folder / "holdout-judgements.jsonl")
    right, judge = check_answers(work, rows, completions), judge_name(work.recipe)
    found = metrics.compute_metrics(number, rows, completions, judgements, right, judge)
    quality = measure_judge(judgements, check_both_answers(work.backends.check, rows, completions))
    found = replace(found, judge_quality=quality)
    return metrics.without_win_rate(found, rows, judgements) if work.recipe.judge.kind == "reference" else found


def read_holdout(work: Work) -> list[Example]:
    """The holdout with the teacher's answers."""
    return read_rows(Example, work.run.path / "holdout.jsonl")


def previous_metrics(work: Work) -> Metrics | None:
    """The last round's metrics; None in round 0."""
    return read_record(Metrics, work.run.round(work.number - 1) / "metrics.json") if work.number else None


def check_answers(work: Work, rows: Iterable[Example], completions: Iterable[Completion]) -> dict[str, bool | None]:
    """By row id whether the recipe's checker finds the answer right; None if it cannot tell or there is none."""
    check = work.backends.check
    return {row.id: check(row, text.text) if check else None for row, text in zip(rows, completions, strict=True)}


def summarize_metrics(found: Metrics, before: Metrics | None = None) -> str:
    """Win rate (or likeness with its change) and accuracy, and a note if the holdout is too small."""
    win_rate = "win rate unknown" if found.win_rate is None else f"win rate {found.win_rate:.1%}"
    if found.student_score is not None and metrics.is_rouge_only(found.win_rate, found.student_score):
        win_rate = f"likeness {found.student_score:.2f} of 10"
        if before and before.student_score is not None:
            win_rate += f" ({found.student_score - before.student_score:+.2f} on round {before.round})"
    some = ""
    if found.checked is not None and found.checked != found.rows:
        some = f" of the {format_count(found.checked, 'row')} that the checker can decide"
    said = win_rate if found.accuracy is None else f"{win_rate}, accuracy {found.accuracy:.1%}{some}"
    unjudged = f"{format_count(found.unjudged, 'unjudged row')} left out of the win rate" if found.unjudged else ""
    notes = (said, unjudged, metrics.describe_length_effect(found), metrics.warn_small_holdout(found))
    return "; ".join(part for part in notes if part)


STUDENT_STAGES = (
    Stage("train", "adapter", train_stage),
    Stage("export", "student.gguf", export_stage),
    Stage("gate", "gate.json", gate_stage),
    Stage("holdout-answer", "holdout-answers.jsonl", holdout_answer_stage, resumes="holdout-answers.jsonl"),
    Stage("holdout-judge", "holdout-judgements.jsonl", holdout_judge_stage),
    Stage("evaluate", "metrics.json", evaluate_stage),
)
BASELINE_STAGES = (Stage("mix", "train.jsonl", mix_stage), *STUDENT_STAGES)
ROUND_STAGES = (
    Stage("answer", "answers.jsonl", answer_stage, resumes="answers.jsonl"),
    Stage("judge", "judgements.jsonl", judge_stage),
    Stage("plan", "plan.json", plan_stage),
    Stage("expand", "expanded.jsonl", expand_stage, resumes="expand-scores.jsonl"),
    Stage("refine", "train.jsonl", refine_stage, resumes="refine-scores.jsonl"),
    *STUDENT_STAGES,
)
PAIRS_STAGE = Stage("pairs", "train.jsonl", pairs_stage)
PREFERENCE_STAGES = (PAIRS_STAGE, *STUDENT_STAGES)
