"""What the rest of a run will ask and cost: stages are played through on the store alone, as far as that goes.

A stage whose inputs are there is run in a throw-away copy of the run's folder, by tools that look requests up and send
none: its calls are exact. What needs a student that is not trained yet is estimated from the recipe, and says so.
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
from tapir_local.pipeline.backends import judge_of
from tapir_local.pipeline.context import Tools, Work
from tapir_local.pipeline.loop import Step, missing_file, refuse_changed, sequence
from tapir_local.pipeline.student_text import StudentText, any_student, read_student_text
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Curriculum, Recipe, judges_pool
from tapir_local.records import Answer, Example, Request, RoundPlan, instruction_of
from tapir_local.resources import find_model_folder, read_chat_template
from tapir_local.run_dir import RunDir
from tapir_local.store import keys
from tapir_local.store.schema import tokens_by_stage
from tapir_local.store.store import Store
from tapir_local.teacher.budget import money_of, price_of
from tapir_local.teacher.endpoint import body_of, identity_of
from tapir_local.teacher.session import Asking

LETTERS = 4  # characters of a token, roughly, in English; used until the store knows a stage's calls
FRAME = 150  # tokens of the prompt around an instruction, roughly
WRITTEN = {"label": 12, "tasks": 12, "judge": 20, "holdout-judge": 20, "expand": 60}  # tokens of a reply, roughly
ANSWER = 250  # and of an answer
SHOWN = {"judge": 2, "holdout-judge": 2, "refine": 1}  # answers that stand in a prompt
DRAFTS = 1.25  # drafts for a row that is kept, roughly


@dataclass(frozen=True)
class Foreseen:
    """What a step will take. `hits` are in the store already; `money` is of the rest, None where the price is unknown.

    `exact` says that calls and hits were counted request by request; else they are estimates and hits unknown.
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
        return self.calls - (self.hits or 0)


class Unreached(Exception):
    """The rest of a stage depends on what is not there yet."""


@dataclass
class Scout:
    """Tools that send nothing, and what they were asked in the present step."""

    recipe: Recipe
    store: Store | None
    asked: list[tuple[Request, Endpoint]] = field(default_factory=list)
    missing: list[tuple[Request, Endpoint]] = field(default_factory=list)

    def tools(self) -> Tools:
        """What a stage is given: questions are looked up, and nothing is trained or generated."""

        def unreached(*_: Any) -> Any:
            raise Unreached

        return Tools(
            teacher=lambda requests, _: self.look_up(requests, self.recipe.teacher),
            judge=lambda requests, _: self.look_up(requests, judge_of(self.recipe)),
            generate=unreached,
            classify=unreached,
            train=unreached,
            export=unreached,
            score=unreached,
            gate=unreached,
            ship=unreached,
            student_text=lambda: student_text(self.recipe),
        )

    def look_up(self, requests: Sequence[Request], endpoint: Endpoint) -> list[Answer]:
        """The stored answers; Unreached where one is missing."""
        self.asked += [(request, endpoint) for request in requests]
        if not self.store:
            self.missing += [(request, endpoint) for request in requests]
            raise Unreached
        asking = Asking(requests, endpoint, self.store, "")
        jobs = asking.look_up()
        self.missing += [(requests[place], endpoint) for job in jobs for place in job.places[:1]]
        if jobs:
            raise Unreached
        return [answer for answer in asking.answers if answer]


def student_text(recipe: Recipe) -> StudentText:
    """The student's chat template and tokens; where the student would first be downloaded, one that takes every row."""
    settings = recipe.student
    if settings.path != "pocket" and not Path(settings.path).is_dir():
        return any_student(settings.max_length)
    template = read_chat_template(settings.chat_template) if settings.chat_template else None
    return read_student_text(find_model_folder(settings.path), settings.max_length, template)


def forecast(recipe: Recipe, run: RunDir) -> list[Foreseen]:
    """Every step still to do that asks somebody; nothing is sent or written."""
    refuse_changed(recipe, run)
    path = run.cache / "teacher.db"
    with ExitStack() as stack:
        store = stack.enter_context(Store(path, "read-only")) if path.exists() else None
        known = tokens_by_stage(path) if path.exists() else {}
        copy = RunDir(Path(stack.enter_context(tempfile.TemporaryDirectory())), run.name)
        link(run.path, copy.path)
        steps = sequence(copy, recipe.rounds)
        found = [foresee(step, recipe, copy, store, known) for step in steps if not step.done]
    return [row for row in found if row.calls]


def link(source: Path, target: Path) -> None:
    """A folder whose files are links to another's."""
    target.mkdir(parents=True)
    for folder, _, files in os.walk(source):
        place = target / Path(folder).relative_to(source)
        place.mkdir(exist_ok=True)
        # What a stage is appending to just now is not for others to open.
        for name in (name for name in files if not name.endswith((".partial", ".partial.json"))):
            (place / name).symlink_to((Path(folder) / name).absolute())


def foresee(
    step: Step, recipe: Recipe, copy: RunDir, store: Store | None, known: Mapping[str, tuple[float, float]]
) -> Foreseen:
    """A step played through, or estimated where it cannot be."""
    scout = Scout(recipe, store)
    step.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        step.stage.run(Work(recipe, copy, scout.tools(), step.number or 0, step.name), step.output)
    except Unreached:
        pass
    except FileNotFoundError as error:
        if not awaited(error, recipe, copy):
            raise missing_file(error, copy, step.name) from error
    done = step.done
    if step.stage.name == "tasks" and not done:
        # The split between holdout and seeds will be another; what is asked of both together is the same.
        write_rows(step.output, [replace(row, task="Others") for row in rows_of(copy)])
    if scout.asked:
        return counted(step, scout, known) if done else with_rest(counted(step, scout, known), step)
    return Foreseen(step.name, 0, 0, 0, 0, 0.0, True) if done else estimated(step, recipe, copy, known)


def awaited(error: FileNotFoundError, recipe: Recipe, copy: RunDir) -> bool:
    """Whether what a stage did not find is the output of a step that is still to be done."""
    missing = Path(str(error.filename))
    outputs = [step.output for step in sequence(copy, recipe.rounds) if not step.done]
    return any(missing == output or output in missing.parents for output in outputs)


def counted(step: Step, scout: Scout, known: Mapping[str, tuple[float, float]]) -> Foreseen:
    """What a step asked for, and what of it would be paid; equal requests are paid once."""
    unique = {
        keys.key(identity_of(endpoint), body_of(request, endpoint), request.draw): request
        for request, endpoint in scout.missing
    }
    sizes = [sizes_of(request, known) for request in unique.values()]
    tokens = sum(size[0] for size in sizes), sum(size[1] for size in sizes)
    return priced(step, len(scout.asked), len(scout.asked) - len(unique), *tokens, scout.asked[0][1])


def with_rest(found: Foreseen, step: Step) -> Foreseen:
    """An expansion with the drafts that it asks for once its first ones are there; any other step as it is."""
    path = step.output.parent / "plan.json"
    wanted = read_record(RoundPlan, path).to_write if step.stage.name == "expand" and path.exists() else 0
    if wanted <= found.calls or not found.to_pay:
        return found
    more = (wanted - (found.hits or 0)) / found.to_pay
    sizes = round(more * found.tokens_in), round(more * found.tokens_out)
    money = None if found.money is None else more * found.money
    return replace(found, calls=wanted, tokens_in=sizes[0], tokens_out=sizes[1], money=money)


def sizes_of(request: Request, known: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Tokens of a request, by its letters, and of its reply, as the stage's others were."""
    letters = sum(len(turn.content) for turn in request.messages)
    written = known[request.stage][1] if request.stage in known else WRITTEN.get(request.stage, ANSWER)
    return letters / LETTERS, min(written, request.max_tokens)


def estimated(step: Step, recipe: Recipe, copy: RunDir, known: Mapping[str, tuple[float, float]]) -> Foreseen:
    """What a step that cannot be played through may ask, by the recipe and the number of seeds."""
    if step.stage.name == "tasks":
        return unsure(step, recipe, rows_of(copy), known)
    stage, instructions = step.stage.name, [instruction_of(row.prompt) for row in rows_of(copy)]
    calls = expected_calls(stage, step.number or 0, recipe, len(instructions))
    instruction = statistics.fmean(map(len, instructions)) / LETTERS if instructions else FRAME
    alone = stage.endswith("judge") and recipe.judge.mode == "single"
    shown = (1 if alone else SHOWN.get(stage, 0)) * ANSWER
    size_in, size_out = known.get(stage, (FRAME + instruction + shown, WRITTEN.get(stage, ANSWER)))
    endpoint = judge_of(recipe) if stage.endswith("judge") else recipe.teacher
    return priced(step, calls, None, calls * size_in, calls * size_out, endpoint)


def unsure(step: Step, recipe: Recipe, rows: Sequence[Example], known: Mapping[str, tuple[float, float]]) -> Foreseen:
    """The most labels that a classifier, not trained yet, can leave to the teacher; requests as for other labels."""
    settings = recipe.classifier
    unlabelled = [row for row in rows if not row.task]
    calls = min(settings.ask_at_most, max(0, len(unlabelled) - settings.labelled))
    if not settings.ask_below or not recipe.can_expand:
        calls = 0
    requests = [
        Request(prompts.classify_prompt(row.prompt, recipe.task_table()), row.id, "label") for row in unlabelled[:100]
    ]
    sizes = [sizes_of(request, known) for request in requests] or [(0.0, 0.0)]
    size_in, size_out = (statistics.fmean(size[side] for size in sizes) for side in (0, 1))
    return priced(step, calls, None, calls * size_in, calls * size_out, recipe.teacher)


def rows_of(copy: RunDir) -> list[Example]:
    """The seeds as read, [] where that has not been done."""
    path = copy.path / "rows.jsonl"
    return read_rows(Example, path) if path.exists() else []


def expected_calls(stage: str, number: int, recipe: Recipe, rows: int) -> int:
    """Calls of a stage of round `number`, from the recipe and the number of seeds and holdout rows together.

    Of a judge who scores each answer alone, only what was not asked before: what it said of an answer of the teacher's
    is in the store.
    """
    plan, held = recipe.curriculum, recipe.seeds.holdout
    pool = rows - held + sum(written(plan, n)[0] for n in range(1, number))
    drawn = min(pool, plan.pool or pool)
    judged, alone = recipe.judge.kind != "reference", recipe.judge.mode == "single"
    new, refined = written(plan, number) if number and recipe.can_expand else (0, 0)
    again = 1.0 if plan.name == "reflection" else DRAFTS  # of a rewriting there is one draft
    asked = {
        "judge": (drawn + (new_answers(recipe, number, pool, drawn) if alone else drawn)) * judged * judges_pool(plan),
        "holdout-judge": (1 if alone and number else 2) * held * judged,
        "expand": round(new * (again + plan.check_drafts)),
        "refine": refined + refined * plan.check_answers,
    }
    return asked.get(stage, 0)


def new_answers(recipe: Recipe, number: int, pool: int, drawn: int) -> int:
    """Teacher's answers among a round's `drawn` rows that no earlier round has scored, roughly.

    Those of rows that no draw has taken, and those that the round before wrote or rewrote.
    """
    if number <= 1 or not pool:
        return drawn
    share, plan = drawn / pool, recipe.curriculum
    rewritten = written(plan, number - 1)[1] if recipe.can_expand else 0
    return min(drawn, round(drawn * (1 - share) ** (number - 1) + rewritten * share))


def written(plan: Curriculum, number: int) -> tuple[int, int]:
    """(new instructions, answers) that the teacher writes in round `number` of a curriculum, its shortages left out."""
    if plan.name in ("lion", "reflection"):
        return plan.rows, plan.rows
    if plan.name != "tapir":
        return 0, 0
    hard = challenge_of_round(plan, number) * plan.rows
    new = round(hard * plan.expand_share)
    return new, {"hard": round(hard), "all": plan.rows, "off": new}[plan.refine]


def priced(
    step: Step, calls: int, hits: int | None, tokens_in: float, tokens_out: float, endpoint: Endpoint
) -> Foreseen:
    """A forecast with its money."""
    sizes = round(tokens_in), round(tokens_out)
    exact = hits is not None and step.stage.name != "expand"  # rejected drafts are written again
    return Foreseen(step.name, calls, hits, *sizes, money_of(price_of(endpoint), *sizes), exact)
