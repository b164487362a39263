"""`tapir-local init`: write a recipe for a file of seeds and this machine."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tapir_local.errors import TapirError
from tapir_local.terminal.options import HomePath, cache_argument, cache_option, help_examples, program_name
from tapir_local.terminal.output import echo

if TYPE_CHECKING:
    from tapir_local.doctor.proposal import Choices, SeedFacts

TEACHER_QUESTION = "Teacher: a model at OpenAI, URL/MODEL of a server, a .gguf file, or `recorded` for your answers"


@click.command(
    name="init",
    epilog=help_examples(
        "tapir-local init",
        "tapir-local init my.yaml --seeds my.jsonl --teacher gpt-4o-mini",
        "tapir-local init my.yaml --seeds my.csv --teacher http://localhost:8000/v1/Qwen/Qwen3-8B --yes",
    ),
)
@click.argument("path", type=HomePath(), default="my.yaml")
@click.option("--seeds", help="File of seeds, a dataset's folder, or `pocket`.")
@click.option("--columns", metavar="NAME=COLUMN,...", help="Columns of the file, such as instruction=frage.")
@click.option("--teacher", help="A model at OpenAI, URL/MODEL of a server, a .gguf file, or `recorded`.")
@click.option("--student", help="A model's folder, a GGUF, or its name on the Hub.")
@click.option("--rounds", type=click.IntRange(min=0), help="Rounds after round 0.")
@click.option("-y", "--yes", is_flag=True, help="Take the proposals without asking.")
@click.option("--force", is_flag=True, help="Replace PATH if it exists.")
@cache_option
def init_command(
    path: Path,
    seeds: str | None,
    columns: str | None,
    teacher: str | None,
    student: str | None,
    rounds: int | None,
    yes: bool,
    force: bool,
    cache: Path | None,
) -> None:
    """Write a recipe for your seeds and this machine.

    Reads the seeds, looks at the memory and the GPU, and asks what was not given on the command line. Then it writes
    PATH, a commented recipe (my.yaml by default), checks it as `doctor` does, and estimates the calls as `distill
    --dry-run` does. Nothing is sent to anyone. It never asks for a key: it names the variable that must hold it.
    """
    from tapir_local.doctor.proposal import check_choices, describe_seeds, inspect_seeds, recipe_yaml
    from tapir_local.files import check_output, write_text
    from tapir_local.resources import default_cache

    check_output(path, [Path(seeds)] if seeds else [], force=force, fix="Choose another name, or add --force.")
    asks = not yes and sys.stdin.isatty() and sys.stderr.isatty()
    named = parse_columns(columns)
    facts = inspect_seeds(seeds or ask_seeds(asks), named)
    echo(describe_seeds(facts), err=True)
    choices = choose(path, facts, cache or default_cache(), (teacher, student, rounds), asks=asks)
    check_choices(choices)
    write_text(path, recipe_yaml(choices, path))
    echo(f"{path} written", err=True)
    show_next(path, choices, cache)


def ask_seeds(asks: bool) -> str:
    """The file of seeds that the user types; TapirError if nobody can be asked."""
    if not asks:
        raise TapirError("no seeds are given", fix="Name the file of your instructions: --seeds FILE")
    return str(click.prompt("File of seeds", err=True))


def parse_columns(text: str | None) -> dict[str, str]:
    """The columns that an option names."""
    from typing import get_args

    from tapir_local.recipe.schema import Column

    pairs = [pair.partition("=") for pair in (text or "").split(",") if pair.strip()]
    if not all(mark and name.strip() and column.strip() for name, mark, column in pairs):
        raise click.BadParameter("write it as instruction=frage,output=antwort", param_hint="--columns")
    found = {name.strip(): column.strip() for name, _, column in pairs}
    if unknown := sorted(found.keys() - set(get_args(Column))):
        names = ", ".join(get_args(Column))
        raise click.BadParameter(f"{unknown[0]} is none of {names}", param_hint="--columns")
    return found


def choose(
    path: Path, facts: "SeedFacts", cache: Path, given: tuple[str | None, str | None, int | None], *, asks: bool
) -> "Choices":
    """What the options say, and for the rest what the user answers, or the proposals if nobody can be asked."""
    from tapir_local.doctor.proposal import Choices, free_name, propose_student
    from tapir_local.run_dir import list_runs

    teacher, student, rounds = given
    if teacher is None:
        proposed = "recorded" if facts.answered == facts.rows else None
        if not asks and proposed is None:
            fix = "Name a teacher: --teacher MODEL, URL/MODEL, or FILE.gguf"
            raise TapirError("no teacher is given, and not all rows have answers", where=facts.path, fix=fix)
        teacher = str(click.prompt(TEACHER_QUESTION, default=proposed, err=True)) if asks else proposed
    if student is None:
        proposed, why = propose_student()
        echo(why, err=True)
        student = str(click.prompt("Student", default=proposed, err=True)) if asks else proposed
    if rounds is None:
        number = 1 if teacher == "recorded" else 3
        question = "Rounds after round 0"
        rounds = click.prompt(question, default=number, type=click.IntRange(min=0), err=True) if asks else number
    name = free_name(path.stem, [run.name for run in list_runs(cache)])
    return Choices(name, facts, str(teacher), student, rounds)


def show_next(path: Path, choices: "Choices", cache: Path | None) -> None:
    """Check the recipe, estimate its calls, and print the command that runs it."""
    from tapir_local.commands.distill import print_cost_estimate, resolve_recipe
    from tapir_local.commands.start import print_checks
    from tapir_local.doctor.proposal import key_variable
    from tapir_local.doctor.recipe_checks import check_recipe
    from tapir_local.resources import default_cache
    from tapir_local.run_dir import RunDir

    recipe, _, notices = resolve_recipe(str(path), {}, cache or default_cache())
    for notice in notices:
        echo(notice, err=True)
    checks = check_recipe(recipe, cache or default_cache())
    print_checks(f"doctor: {path}", checks)
    program = f"{program_name()} distill {path}{cache_argument(cache)}"
    missing = [check.name for check in checks if check.ok is False]
    if {"seeds", "student"} & set(missing):
        echo(f"\nTo see what the run will ask, add what is missing, then:  {program} --dry-run", err=True)
    else:
        print_cost_estimate(recipe, RunDir(cache or default_cache(), recipe.name))
    variable = key_variable(choices.teacher)
    export = f"export {variable}=...\n" if variable else ""
    before = f"After adding what is missing ({', '.join(missing)}), run it:" if missing else "Run it:"
    echo(f"\n{before}\n{export}{program}", err=True)
