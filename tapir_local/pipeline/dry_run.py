"""Estimate what the rest of a run will ask and cost, without asking.

Each stage whose inputs exist runs in a temporary copy of the run's folder, with backends that look requests up in the
store and send none: its calls are exact. Steps that need a student that is not trained yet are estimated from the
recipe.
"""

import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tapir_local.files import read_record, read_rows, write_rows
from tapir_local.method import prompts
from tapir_local.method.curriculum import challenge_of_round
from tapir_local.pipeline.loop import Step, missing_file_error, recipe_steps, refuse_changed_recipe
from tapir_local.recipe.curriculum_settings import Curriculum, judges_pool
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Answer, Example, Progress, Request, RoundPlan, instruction_of
from tapir_local.resources import find_model_folder, named_student_gguf, read_chat_template
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import AskBackend, Backends, Work
from tapir_local.stages.judge import judge_endpoint
from tapir_local.stages.row_check import (
    CHARACTERS_PER_TOKEN,
    StudentFormat,
    placeholder_format,
    read_gguf_format,
    read_student_format,
)
from tapir_local.store import keys
from tapir_local.store.queries import mean_tokens_by_stage
from tapir_local.store.store import Store
from tapir_local.teacher.budget import endpoint_price, money_for_tokens
from tapir_local.teacher.endpoint import endpoint_identity, request_body
from tapir_local.teacher.session import AskSession

# Rough sizes, used until the store has calls of a stage.
PROMPT_FRAME_TOKENS = 150  # tokens of the prompt around an instruction
REPLY_TOKENS = {
    "label": 12,
    "tasks": 12,
    "judge": 20,
    "holdout-judge": 20,
    "untrained-judge": 20,
    "expand": 60,
}  # by stage
EXPECTED_ANSWER_TOKENS = 250  # tokens of an answer, and of the replies of all other stages
ANSWERS_IN_PROMPT = {"judge": 2, "holdout-judge": 2, "untrained-judge": 2, "refine": 1}  # by stage
DRAFTS_PER_ROW = 1.25  # drafts asked for until one is kept
LABELS_SAMPLED = 100  # requests for labels whose mean size stands for all

StageTokens = Mapping[str, tuple[float, float]]  # mean tokens (in, out) of a stage's calls in the store


@dataclass(frozen=True)
class CostEstimate:
    """What a step will ask. `hits` are in the store; `money` is for the rest, None if the price is unknown.

    `exact` means that calls and hits were counted request by request; otherwise they are estimates, and `hits` is None.
    """

    step: str
    calls: int
    hits: int | None
    tokens_in: int
    tokens_out: int
    money: float | None
    exact: bool

    @property
    def to_pay(self) -> int:
        """Calls that are not in the store."""
        return self.calls - (self.hits or 0)


class MissingInput(Exception):
    """The rest of a stage depends on something that does not exist yet."""


@dataclass
class DryRun:
    """Records what a step asks; its backends look requests up in the store and send none."""

    recipe: Recipe
    store: Store | None
    asked: list[tuple[Request, Endpoint]] = field(default_factory=list)
    missing: list[tuple[Request, Endpoint]] = field(default_factory=list)

    def backends(self) -> Backends:
        """Backends with which every call of a model, and every request that is not in the store, ends the step."""

        def unavailable(**_: Any) -> Any:
            raise MissingInput

        return Backends(
            teacher=self.look_up(self.recipe.teacher),
            judge=self.look_up(judge_endpoint(self.recipe)),
            generate=unavailable,
            classify=unavailable,
            train=unavailable,
            export=unavailable,
            export_untrained=unavailable,
            score=unavailable,
            gate=unavailable,
            ship=unavailable,
            student_format=lambda: dry_run_format(self.recipe),
        )

    def look_up(self, endpoint: Endpoint) -> AskBackend:
        """Answers from the store; MissingInput if one is not there."""

        def ask(requests: Sequence[Request], progress: Progress) -> list[Answer]:
            self.asked += [(request, endpoint) for request in requests]
            if not self.store:
                self.missing += [(request, endpoint) for request in requests]
                raise MissingInput
            asking = AskSession(requests, endpoint, self.store, "")
            jobs = asking.look_up()
            self.missing += [(requests[place], endpoint) for job in jobs for place in job.places[:1]]
            if jobs:
                raise MissingInput
            return [answer for answer in asking.answers if answer]

        return ask


def dry_run_format(recipe: Recipe) -> StudentFormat:
    """The student's format; a placeholder that accepts every row if the student would have to be downloaded first."""
    settings = recipe.student
    template = read_chat_template(settings.chat_template) if settings.chat_template else None
    if gguf := named_student_gguf(settings.path):
        return read_gguf_format(gguf, settings.max_length, template)
    if settings.path != "pocket" and not Path(settings.path).is_dir():
        return placeholder_format(settings.max_length)
    return read_student_format(find_model_folder(settings.path), settings.max_length, template)


def estimate_costs(recipe: Recipe, run: RunDir) -> list[CostEstimate]:
    """An estimate for every pending step that asks an endpoint; nothing is sent, and nothing in the run changes."""
    refuse_changed_recipe(recipe, run)
    path = run.cache / "teacher.db"
    with ExitStack() as stack:
        store = stack.enter_context(Store(path, "read-only")) if path.exists() else None
        tokens = mean_tokens_by_stage(path) if path.exists() else {}
        copy = RunDir(Path(stack.enter_context(tempfile.TemporaryDirectory())), run.name)
        link_files(run.path, copy.path)
        steps = recipe_steps(copy, recipe)
        found = [estimate_step(step, recipe, copy, store, tokens) for step in steps if not step.done]
    return [row for row in found if row.calls]


def link_files(source: Path, target: Path) -> None:
    """Make `target` a copy of a folder in which every file is a symbolic link to the original."""
    target.mkdir(parents=True)
    for folder, _, files in os.walk(source):
        place = target / Path(folder).relative_to(source)
        place.mkdir(exist_ok=True)
        # A file that a stage is writing now must not be opened by others.
        for name in (name for name in files if not name.endswith((".partial", ".partial.json"))):
            (place / name).symlink_to((Path(folder) / name).absolute())


def estimate_step(step: Step, recipe: Recipe, copy: RunDir, store: Store | None, tokens: StageTokens) -> CostEstimate:
    """The calls of a step, counted by running it in the copy, or estimated if it cannot run."""
    dry_run = DryRun(recipe, store)
    step.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        step.stage.run(Work(recipe, copy, dry_run.backends(), step.number or 0, step.name), step.output)
    except MissingInput:
        pass
    except FileNotFoundError as error:
        if not is_pending_output(error, recipe, copy):
            raise missing_file_error(error, copy, step.name) from error
    done = step.done
    if step.stage.name == "tasks" and not done:
        # The split into holdout and seeds will differ, but both together ask for the same.
        write_rows(step.output, [replace(row, task="Others") for row in rows_read_so_far(copy)])
    if dry_run.asked:
        counted = count_calls(step, dry_run, tokens)
        return counted if done else with_later_drafts(counted, step)
    return CostEstimate(step.name, 0, 0, 0, 0, 0.0, True) if done else estimate_by_recipe(step, recipe, copy, tokens)


def is_pending_output(error: FileNotFoundError, recipe: Recipe, copy: RunDir) -> bool:
    """Whether a missing file is the output of a step that is not done yet."""
    missing = Path(str(error.filename))
    outputs = [step.output for step in recipe_steps(copy, recipe) if not step.done]
    return any(missing == output or output in missing.parents for output in outputs)


def count_calls(step: Step, dry_run: DryRun, tokens: StageTokens) -> CostEstimate:
    """The calls that a step asked for; equal requests are paid once."""
    unique = {
        keys.request_key(endpoint_identity(endpoint), request_body(request, endpoint), request.draw): request
        for request, endpoint in dry_run.missing
    }
    sizes = [request_tokens(request, tokens) for request in unique.values()]
    total = sum(size[0] for size in sizes), sum(size[1] for size in sizes)
    calls = len(dry_run.asked)
    return make_estimate(step, dry_run.asked[0][1], (calls, calls - len(unique)), total)


def with_later_drafts(found: CostEstimate, step: Step) -> CostEstimate:
    """An expansion's estimate, scaled from its first drafts to all of them; that of another step is unchanged."""
    path = step.output.parent / "plan.json"
    wanted = read_record(RoundPlan, path).to_write if step.stage.name == "expand" and path.exists() else 0
    if wanted <= found.calls or not found.to_pay:
        return found
    more = (wanted - (found.hits or 0)) / found.to_pay
    sizes = round(more * found.tokens_in), round(more * found.tokens_out)
    money = None if found.money is None else more * found.money
    return replace(found, calls=wanted, tokens_in=sizes[0], tokens_out=sizes[1], money=money)


def request_tokens(request: Request, tokens: StageTokens) -> tuple[float, float]:
    """(tokens of a request by its characters, tokens of its reply by the stage's other replies)."""
    characters = sum(len(turn.content) for turn in request.messages)
    reply = (
        tokens[request.stage][1] if request.stage in tokens else REPLY_TOKENS.get(request.stage, EXPECTED_ANSWER_TOKENS)
    )
    return characters / CHARACTERS_PER_TOKEN, min(reply, request.max_tokens)


def estimate_by_recipe(step: Step, recipe: Recipe, copy: RunDir, tokens: StageTokens) -> CostEstimate:
    """The calls of a step that cannot run, from the recipe and the number of seeds."""
    if step.stage.name == "tasks":
        return estimate_unsure_labels(step, recipe, rows_read_so_far(copy), tokens)
    stage, instructions = step.stage.name, [instruction_of(row.prompt) for row in rows_read_so_far(copy)]
    calls = expected_calls(stage, step.number or 0, recipe, len(instructions))
    instruction = (
        statistics.fmean(map(len, instructions)) / CHARACTERS_PER_TOKEN if instructions else PROMPT_FRAME_TOKENS
    )
    alone = stage.endswith("judge") and recipe.judge.mode == "single"
    answers = (1 if alone else ANSWERS_IN_PROMPT.get(stage, 0)) * EXPECTED_ANSWER_TOKENS
    rough = PROMPT_FRAME_TOKENS + instruction + answers, REPLY_TOKENS.get(stage, EXPECTED_ANSWER_TOKENS)
    size_in, size_out = tokens.get(stage, rough)
    endpoint = judge_endpoint(recipe) if stage.endswith("judge") else recipe.teacher
    return make_estimate(step, endpoint, (calls, None), (calls * size_in, calls * size_out))


def estimate_unsure_labels(step: Step, recipe: Recipe, rows: Sequence[Example], tokens: StageTokens) -> CostEstimate:
    """The most labels that a classifier, not trained yet, can leave to the teacher."""
    settings = recipe.classifier
    unlabeled = [row for row in rows if not row.task]
    calls = min(settings.ask_at_most, max(0, len(unlabeled) - settings.labelled))
    if not settings.ask_below or not recipe.can_expand:
        calls = 0
    sample = unlabeled[:LABELS_SAMPLED]
    requests = [Request(prompts.classify_prompt(row.prompt, recipe.task_table()), row.id, "label") for row in sample]
    sizes = [request_tokens(request, tokens) for request in requests] or [(0.0, 0.0)]
    size_in, size_out = (statistics.fmean(size[side] for size in sizes) for side in (0, 1))
    return make_estimate(step, recipe.teacher, (calls, None), (calls * size_in, calls * size_out))


def rows_read_so_far(copy: RunDir) -> list[Example]:
    """The rows of the seed file, [] if it has not been read yet."""
    path = copy.path / "rows.jsonl"
    return read_rows(Example, path) if path.exists() else []


def expected_calls(stage: str, number: int, recipe: Recipe, rows: int) -> int:
    """The calls of a stage of round `number`, from the recipe and the number of seeds and holdout rows together.

    For a judge that scores each answer alone, only new answers count: earlier scores are in the store.
    """
    plan, held = recipe.curriculum, recipe.seeds.holdout
    pool = rows - held + sum(rows_to_write(plan, n)[0] for n in range(1, number))
    drawn = min(pool, plan.pool or pool)
    judged, alone = recipe.judge.kind != "reference", recipe.judge.mode == "single"
    new, refined = rows_to_write(plan, number) if number and recipe.can_expand else (0, 0)
    drafts = 1.0 if plan.name == "reflection" else DRAFTS_PER_ROW  # a rewriting has one draft
    again = unscored_answers(recipe, number, pool, drawn) if alone else drawn
    calls = {
        "judge": (drawn + again) * judged * judges_pool(plan),
        "untrained-judge": 2 * held * judged,
        "holdout-judge": (1 if alone else 2) * held * judged,
        "expand": round(new * (drafts + plan.check_drafts)),
        "refine": refined + refined * plan.check_answers,
    }
    return calls.get(stage, 0)


def unscored_answers(recipe: Recipe, number: int, pool: int, drawn: int) -> int:
    """The teacher's answers among a round's `drawn` rows that no earlier round has scored, roughly.

    These are rows that no earlier round drew, and rows that the round before wrote or rewrote.
    """
    if number <= 1 or not pool:
        return drawn
    share, plan = drawn / pool, recipe.curriculum
    rewritten = rows_to_write(plan, number - 1)[1] if recipe.can_expand else 0
    return min(drawn, round(drawn * (1 - share) ** (number - 1) + rewritten * share))


def rows_to_write(plan: Curriculum, number: int) -> tuple[int, int]:
    """(new instructions, answers) that the teacher writes in round `number`, if enough rows are available."""
    if plan.name in ("lion", "reflection"):
        return plan.rows, plan.rows
    if plan.name != "tapir":
        return 0, 0
    hard = challenge_of_round(plan, number) * plan.rows
    new = round(hard * plan.expand_share)
    return new, {"hard": round(hard), "all": plan.rows, "off": new}[plan.refine]


def make_estimate(
    step: Step, endpoint: Endpoint, calls: tuple[int, int | None], tokens: tuple[float, float]
) -> CostEstimate:
    """The estimate of a step with its money; `calls` are (all, hits or None), `tokens` (in, out)."""
    sizes = round(tokens[0]), round(tokens[1])
    exact = calls[1] is not None and step.stage.name != "expand"  # rejected drafts are asked for again
    return CostEstimate(step.name, *calls, *sizes, money_for_tokens(endpoint_price(endpoint), *sizes), exact)
