"""`tapir-local evaluate`: a student on AlpacaEval, MT-Bench or one's own questions, against another or graded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tapir_local.errors import TapirError
from tapir_local.printable import format_count
from tapir_local.terminal.options import HomePath, cache_option, help_examples, json_option
from tapir_local.terminal.output import bar_progress, echo, print_json, print_table

if TYPE_CHECKING:
    from tapir_local.evaluation.answers import Player
    from tapir_local.evaluation.evaluate import EvaluationJob
    from tapir_local.evaluation.questions import QuestionSet
    from tapir_local.evaluation.rates import EvaluationResult
    from tapir_local.recipe.schema import Recipe
    from tapir_local.records import Progress
    from tapir_local.run_dir import RunDir

QUESTION_PATH = HomePath()
GGUF_MAX_TOKENS = 512  # of an answer of a GGUF, which has no recipe
ESTIMATE_CAPTION = (
    "Counted: every request was looked up in the store. Estimate: the answers to be judged are not made yet. A judge's "
    "reply that cannot be read is asked for once more. Tokens are rough: a quarter of the characters."
)
LEAST_CONTEXT = 4096  # tokens of a conversation and its answer; limited to the model's own context


@click.command(
    name="evaluate",
    epilog=help_examples(
        "tapir-local evaluate my-run alpaca_eval.json --dry-run",
        "tapir-local evaluate my-run mt_bench_question.jsonl --references gpt-4.jsonl -o my-run.jsonl",
        "tapir-local evaluate my-run questions.jsonl --against base",
        "tapir-local evaluate student.gguf questions.jsonl --against teacher --recipe my.yaml --json",
        "tapir-local evaluate --annotations annotations.json --gamed df_gamed.csv",
    ),
)
@click.argument("student", required=False)
@click.argument("questions", required=False, metavar="[FILE]", type=QUESTION_PATH)
@click.option(
    "--against", metavar="file|teacher|base|RUN|GGUF", help="Opponent; by default the answers in FILE, if any."
)
@click.option("--grade", is_flag=True, help="Grade each answer from 1 to 10 instead of comparing it.")
@click.option("--references", metavar="FILE|none", help="MT-Bench's reference answers, in FastChat's format.")
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first questions.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Maximum tokens per answer.  [default: the recipe's]")
@click.option(
    "--round",
    "number",
    type=click.IntRange(min=0),
    help="Round whose student answers; by default the one in model/ or, before the run is done, the last one.",
)
@click.option("--recipe", help="Recipe or run that has the judge.  [default: the run's own]")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a setting, such as judge.model.")
@click.option(
    "--gamed", type=QUESTION_PATH, help="AlpacaEval's df_gamed.csv, for length control as AlpacaEval 2.0 has it."
)
@click.option("--annotations", type=QUESTION_PATH, help="Compute the rates of a file of annotations, and ask nothing.")
@click.option("-o", "--out", type=QUESTION_PATH, help="File for the answers: model_outputs.json, or FastChat's format.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--dry-run", is_flag=True, help="Show what will be asked and what it costs, and ask nothing.")
@click.option("--trust", is_flag=True, help="Allow the recipe to send the keys that it names.")
@cache_option
@json_option
def evaluate_command(
    student: str | None, questions: Path | None, annotations: Path | None, as_json: bool, **options: Any
) -> None:
    """Evaluate STUDENT on AlpacaEval, MT-Bench or your own questions.

    STUDENT is a run or a GGUF. FILE has AlpacaEval's instructions, MT-Bench's questions, or rows in any format of
    seeds. The judge compares each answer with the opponent's, in both orders, for a win rate with and without length
    control; without an opponent, and for questions of several turns, it grades each answer from 1 to 10.

    The judge, the teacher and the budget are those of the run, or of --recipe. Answers are kept in the folder
    evaluations/ of the cache and judgements in the store: the same command resumes, and a second one pays nothing.
    """
    from tapir_local.evaluation.annotations import read_gamed_baselines
    from tapir_local.evaluation.evaluate import rates_of_annotations

    given = sorted(name for name, value in options.items() if value and name not in ("gamed", "cache"))
    if annotations:
        if student or questions or given:
            raise click.UsageError("--annotations takes no STUDENT, and only --gamed and --json beside it")
        gamed = read_gamed_baselines(options["gamed"]) if options["gamed"] else None
        show_evaluation(rates_of_annotations(annotations, gamed), as_json)
        return
    if student is None or questions is None:
        raise click.UsageError("name a run or a GGUF, and a FILE of questions; or --annotations FILE")
    job, path, changed = build_job(student, questions, options)
    if options["dry_run"]:
        show_estimate(job, as_json)
        return
    check_trust(job, path, changed, options["trust"])
    show_evaluation(run_evaluation(job, options["out"], options["force"]), as_json)


def build_job(student: str, questions: Path, options: dict[str, Any]) -> tuple["EvaluationJob", Path, dict[str, Any]]:
    """(the job of the command line, the file of its recipe, the settings that were typed)."""
    from tapir_local.evaluation.annotations import read_gamed_baselines
    from tapir_local.evaluation.evaluate import EvaluationJob
    from tapir_local.evaluation.questions import read_questions
    from tapir_local.evaluation.verdicts import require_judge
    from tapir_local.inference.config import GenerationConfig
    from tapir_local.recipe.text import parse_changes
    from tapir_local.resources import default_cache

    cache, changed = options["cache"] or default_cache(), parse_changes(options["changes"])
    found = read_questions(questions, options["references"], options["limit"])
    recipe, path, run = find_judge(student, options["recipe"], changed, cache)
    require_judge(recipe, str(path))
    player = find_player(student, run, options["number"], cache)
    own = recipe.student if run else None
    config = GenerationConfig(
        options["max_tokens"] or (own.max_tokens if own else GGUF_MAX_TOKENS),
        max(own.max_length if own else 0, LEAST_CONTEXT),
        parallel=own.concurrency if own and own.concurrency != "auto" else None,
        seed=recipe.random_seed,
    )
    against = find_opponent(options["against"], options["grade"], found, run, cache)
    gamed = read_gamed_baselines(options["gamed"]) if options["gamed"] else None
    return EvaluationJob(player, found, against, recipe, config, cache, gamed), path, changed


def find_judge(
    student: str, recipe: str | None, changed: dict[str, Any], cache: Path
) -> tuple["Recipe", Path, "RunDir | None"]:
    """(recipe with the judge, its file, the student's run or None for a GGUF)."""
    from tapir_local.commands.distill import resolve_recipe
    from tapir_local.run_dir import find_run

    run = None if is_gguf(student) else find_run(cache, student)
    if run is None and recipe is None and not any(name.partition(".")[0] == "judge" for name in changed):
        fix = "Name a recipe or run with --recipe, or a judge with --set judge.model=NAME or --set judge.gguf=FILE."
        raise TapirError("a GGUF names no judge", where=student, fix=fix)
    found, path, _ = resolve_recipe(recipe or (run.name if run else "quickstart"), changed, cache)
    return found, path, run


def is_gguf(name: str) -> bool:
    """Whether a student's name is that of a GGUF file, rather than of a run."""
    return name.lower().endswith(".gguf") or Path(name).is_file()


def find_player(name: str, run: "RunDir | None", number: int | None, cache: Path) -> "Player":
    """The student of a run, or a GGUF; TapirError if there is none."""
    from tapir_local.evaluation.answers import Player
    from tapir_local.export.base import student_files
    from tapir_local.files import expand_home
    from tapir_local.inference.model import check_gguf
    from tapir_local.pipeline.loop import kept_recipe
    from tapir_local.talk.models import find_student_gguf

    if run is None:
        if number is not None:
            raise TapirError("--round selects a round of a run, and this is a GGUF", where=name, fix="Leave it out.")
        path = Path(expand_home(name) or "")
        check_gguf(path, "student", "Name a run or a GGUF.")
        return Player(path.stem, path)
    files = student_files(kept_recipe(run), run, find_student_gguf(run, number))
    shown = run.name if number is None else f"{run.name} round {number}"
    return Player(shown, files.gguf, files.adapter)


def find_opponent(
    against: str | None, grade: bool, questions: "QuestionSet", run: "RunDir | None", cache: Path
) -> "Player | str | None":
    """The opponent that --against names; without it the answers in FILE, or None to grade."""
    from tapir_local.evaluation.answers import Player
    from tapir_local.evaluation.evaluate import FILE_ANSWERS, TEACHER
    from tapir_local.export.base import base_gguf
    from tapir_local.pipeline.loop import kept_recipe
    from tapir_local.run_dir import find_run

    if grade and against:
        raise click.UsageError("give --grade or --against, not both: a grade has no opponent")
    if against is None:
        answered = questions.turns == 1 and any(question.answer for question in questions.questions)
        return FILE_ANSWERS if answered and not grade else None
    if against in (FILE_ANSWERS, TEACHER):
        return against
    if against == "base":
        if run is None:
            fix = "Name the base model's GGUF with --against."
            raise TapirError("only a run has a base model", where="--against base", fix=fix)
        return Player(f"{run.name} untrained", base_gguf(kept_recipe(run), run))
    return find_player(against, None if is_gguf(against) else find_run(cache, against), None, cache)


def check_trust(job: "EvaluationJob", path: Path, changed: dict[str, Any], trust: bool) -> None:
    """TapirError unless the user allows the keys that the recipe sends to hosts that it names."""
    from tapir_local.terminal.trust import ask_permission, require_trust

    require_trust(job.recipe, path, changed, job.cache, lambda risks: ask_permission(risks, trust))


def run_evaluation(job: "EvaluationJob", out: Path | None, force: bool) -> "EvaluationResult":
    """Evaluate with progress on stderr, and write the student's answers to OUT."""
    from tapir_local.evaluation.evaluate import evaluate, make_answers
    from tapir_local.evaluation.outputs import write_outputs
    from tapir_local.files import check_output
    from tapir_local.stages.backends import real_backends

    if out:
        check_output(out, [job.questions.path, job.student.gguf], force=force)
    with evaluation_progress("answers") as (progress, _):
        answers = make_answers(job, progress)
    if out:
        write_outputs(out, job.questions, answers, job.student.name)
    with (
        evaluation_progress("judging") as (progress, tell),
        real_backends(job.recipe, job.place, tell) as backends,
    ):
        return evaluate(job, backends, progress)


@contextmanager
def evaluation_progress(what: str) -> Iterator[tuple["Progress", Callable[[str], None]]]:
    """A bar for answers or judgements, which takes remarks too, and a function that prints a message."""
    with bar_progress(what) as (show, tell):

        def progress(done: int, total: int, said: str) -> None:
            show(done, total) if total else tell(said)

        yield progress, tell


def show_evaluation(found: "EvaluationResult", as_json: bool) -> None:
    """Print an evaluation as JSON, or as a table with its notes."""
    from dataclasses import asdict

    from tapir_local.report.evaluation_tables import evaluation_table
    from tapir_local.tables import plain_text

    if as_json:
        print_json(asdict(found))
        return
    notes = [*found.notes]
    if found.cut:
        notes.append(
            f"{format_count(found.cut, 'answer was', 'answers were')} cut at the limit of tokens (--max-tokens)"
        )
    if found.folder:
        notes.append(
            f"{format_count(found.paid, 'call')} asked, {found.hits:,} from the store; "
            f"answers and judgements: {found.folder}"
        )
    print_table(evaluation_table(found), *([plain_text("\n".join(notes))] if notes else []))


def show_estimate(job: "EvaluationJob", as_json: bool) -> None:
    """Print what an evaluation will ask."""
    from dataclasses import asdict

    from tapir_local.evaluation.estimate import estimate_evaluation
    from tapir_local.report.costs import cost_estimate_table

    left, rows = estimate_evaluation(job)
    if as_json:
        print_json({"answers": left, "calls": [asdict(row) for row in rows]})
        return
    echo(f"{format_count(left, 'answer is', 'answers are')} left to be made on this machine.", err=True)
    table = cost_estimate_table(rows, job.place.name)
    table.title, table.caption = f"{job.student.name} on {job.questions.path.name}: calls", ESTIMATE_CAPTION
    print_table(table)
