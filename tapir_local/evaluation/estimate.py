"""Estimate what an evaluation will ask and cost, without asking."""

from contextlib import ExitStack, suppress

from tapir_local.evaluation.answers import Player, answer_questions, turn_file
from tapir_local.evaluation.evaluate import (
    EvaluationJob,
    answer_place,
    asked_texts,
    check_job,
    opponent_answers,
)
from tapir_local.evaluation.verdicts import ANSWER_STAGE, EVALUATE_STAGE, EvaluationWork, grade_answers, judge_against
from tapir_local.files import read_rows
from tapir_local.pipeline.dry_run import CostEstimate, DryRun, MissingInput, request_tokens
from tapir_local.records import Completion, instruction_of, noop
from tapir_local.stages.judge import judge_endpoint
from tapir_local.stages.row_check import CHARACTERS_PER_TOKEN
from tapir_local.store.keys import request_key
from tapir_local.store.queries import mean_tokens_by_stage
from tapir_local.store.store import Store
from tapir_local.teacher.budget import endpoint_price, money_for_tokens
from tapir_local.teacher.endpoint import endpoint_identity, request_body

VERDICT_TOKENS = 20  # of a judge's reply


def estimate_evaluation(job: EvaluationJob) -> tuple[int, list[CostEstimate]]:
    """(answers that models on this machine still have to make, the calls of the teacher and of the judge).

    Calls are counted request by request as far as the answers are there. Else the judge's are those of the first
    asking, without repetitions of unreadable replies, and it is not known which of them the store has.
    """
    check_job(job)
    left = sum(answers_left(job, one) for one in (job.student, job.against) if isinstance(one, Player))
    path = job.cache / "teacher.db"
    with ExitStack() as stack:
        store = stack.enter_context(Store(path, "read-only")) if path.exists() else None
        dry_run = DryRun(job.recipe, store)
        work = EvaluationWork(job.recipe, job.place, dry_run.backends())
        with suppress(MissingInput):
            ask_without_sending(job, work, left)
        rows = [count_requests(job, dry_run, stage) for stage in (ANSWER_STAGE, EVALUATE_STAGE)]
    found = [row for row in rows if row.calls]
    return left, found if rows[1].calls else [*found, unknown_requests(job)]


def ask_without_sending(job: EvaluationJob, work: EvaluationWork, left: int) -> None:
    """Ask the teacher and, if no answer is `left` to be made, the judge; MissingInput at what is not in the store."""
    place, questions = answer_place(job, noop), job.questions.questions
    others = {} if isinstance(job.against, Player | None) else opponent_answers(job, work, place)
    if left:
        raise MissingInput
    answers = answer_questions(job.student, questions, job.config, place)
    if job.against is None:
        grade_answers(work, questions, answers)
    else:
        others = others or opponent_answers(job, work, place)
        judge_against(work, questions, asked_texts(answers[0]), others)


def answers_left(job: EvaluationJob, player: Player) -> int:
    """The answers that a model still has to make."""
    files = [turn_file(job.place.path, player, job.config, turn) for turn in range(job.questions.turns)]
    total = sum(question.turns for question in job.questions.questions)
    return total - sum(len(read_rows(Completion, file)) for file in files if file.exists())


def count_requests(job: EvaluationJob, dry_run: DryRun, stage: str) -> CostEstimate:
    """The requests of a stage that the dry run asked for; equal ones are paid once."""
    asked = [pair for pair in dry_run.asked if pair[0].stage == stage]
    missing = {
        request_key(endpoint_identity(where), request_body(request, where), request.draw): request
        for request, where in dry_run.missing
        if request.stage == stage
    }
    tokens = mean_tokens_by_stage(job.cache / "teacher.db") if dry_run.store else {}
    sizes = [request_tokens(request, tokens) for request in missing.values()]
    total = round(sum(size[0] for size in sizes)), round(sum(size[1] for size in sizes))
    money = money_for_tokens(endpoint_price(asked[0][1]), *total) if asked else None
    name = "the teacher's answers" if stage == ANSWER_STAGE else "judging"
    return CostEstimate(name, len(asked), len(asked) - len(missing), *total, money, True)


def unknown_requests(job: EvaluationJob) -> CostEstimate:
    """The judge's calls before the answers are known: one for each grade, two for each comparison."""
    questions, endpoint = job.questions.questions, judge_endpoint(job.recipe)
    calls = sum(question.turns for question in questions) if job.against is None else 2 * len(questions)
    answers = 1 if job.against is None or job.recipe.judge.mode == "single" else 2
    prompt = sum(len(instruction_of(question.opening)) for question in questions) / len(questions)
    size = prompt / CHARACTERS_PER_TOKEN + answers * job.config.max_tokens
    total = round(calls * size), VERDICT_TOKENS * calls
    return CostEstimate("judging", calls, None, *total, money_for_tokens(endpoint_price(endpoint), *total), False)
