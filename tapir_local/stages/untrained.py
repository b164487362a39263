"""The untrained student on the holdout: what every round is compared with. No later stage reads these outputs."""

from pathlib import Path

from tapir_local.files import atomic_write, read_rows, write_record
from tapir_local.memory import format_bytes
from tapir_local.records import Completion
from tapir_local.run_dir import UNTRAINED_ROUND
from tapir_local.stages.context import Stage, Work
from tapir_local.stages.judge import write_judgements
from tapir_local.stages.rounds import compute_holdout_metrics, generate_answers, read_holdout, summarize_metrics


def untrained_export_stage(work: Work, out: Path) -> str:
    """The untrained student as GGUF, made once for all runs of the cache."""
    with atomic_write(out) as partial:
        work.backends.export_untrained(out=partial, progress=work.progress)
    return f"the untrained student, {format_bytes(out.stat().st_size)}"


def untrained_answer_stage(work: Work, out: Path) -> str:
    """The untrained student answers the holdout."""
    return generate_answers(work, read_holdout(work), out.parent, out, "untrained-judge")


def untrained_judge_stage(work: Work, out: Path) -> str:
    """Judgements of the untrained student's answers."""
    completions = read_rows(Completion, out.parent / "holdout-answers.jsonl")
    return write_judgements(work, "untrained-judge", read_holdout(work), completions, out)


def untrained_evaluate_stage(work: Work, out: Path) -> str:
    """Win rate and accuracy of the untrained student."""
    found = compute_holdout_metrics(work, UNTRAINED_ROUND, out.parent)
    write_record(out, found)
    return f"the untrained student: {summarize_metrics(found)}"


UNTRAINED_STAGES = (
    Stage("untrained-export", "untrained/student.gguf", untrained_export_stage, independent=True),
    Stage(
        "untrained-answer",
        "untrained/holdout-answers.jsonl",
        untrained_answer_stage,
        resumes="holdout-answers.jsonl",
        independent=True,
    ),
    Stage("untrained-judge", "untrained/holdout-judgements.jsonl", untrained_judge_stage, independent=True),
    Stage("untrained-evaluate", "untrained/metrics.json", untrained_evaluate_stage, independent=True),
)
