"""The commands: parse, call, print. Data goes to stdout, what is said to people to stderr."""

import io
import sys
from pathlib import Path

import click

from tapir_local import __version__
from tapir_local.commands.calls import calls
from tapir_local.commands.common import (
    cache_option,
    chosen_run,
    echo,
    example,
    json_option,
    print_json,
    print_table,
    refuse_other_systems,
)
from tapir_local.commands.distill import distill
from tapir_local.commands.models import export, generate
from tapir_local.commands.runs import compare, plan, why
from tapir_local.errors import TapirError

EXIT_CODES = """\b
Exit codes:
  0    done
  1    an error that the message says how to put right
  2    a command or an option that does not exist
  130  stopped with Ctrl-C; the same command goes on"""


@click.group(epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="tapir-local")
def cli() -> None:
    """Distil a teacher LLM into a small student by TAPIR, on this machine.

    With nothing named, the quickstart runs: a pocket teacher (a programme, no LLM) and a pocket student, no key, no
    GPU, no download.
    """


@cli.command(epilog=example("tapir-local status", "tapir-local status quickstart --json"))
@click.argument("run", required=False)
@cache_option
@json_option
def status(run: str | None, cache: Path | None, as_json: bool) -> None:
    """What is done of RUN, its stages and its metrics; without RUN, of the run worked on last."""
    from tapir_local.report.status import status_of
    from tapir_local.report.terminal import rounds_table, stages_table

    found = status_of(chosen_run(cache, run))
    if as_json:
        print_json(found)
    else:
        print_table(stages_table(found), rounds_table(found))


@cli.command(
    epilog=example(
        "tapir-local show quickstart",
        "tapir-local show quickstart --round 2 --json",
        "tapir-local show quickstart --labels",
        "tapir-local show quickstart --unusable",
    )
)
@click.argument("run", required=False)
@click.option("--round", "number", type=click.IntRange(min=0), help="The round; the last evaluated one if left out.")
@click.option(
    "--labels", is_flag=True, help="Instead: who labelled the rows of each task, and what the classifier confuses."
)
@click.option("--unusable", is_flag=True, help="Show the rows that were left out, with step and reason, instead.")
@cache_option
@json_option
def show(run: str | None, number: int | None, labels: bool, unusable: bool, cache: Path | None, as_json: bool) -> None:
    """A round of RUN: its plan, its metrics by task, and some answers of its student."""
    from tapir_local.report.labels import label_tables, labels_of
    from tapir_local.report.status import round_of, unusable_of
    from tapir_local.report.terminal import round_tables, unusable_tables

    if labels and unusable:
        raise click.UsageError("give --labels or --unusable, not both")
    if (labels or unusable) and number is not None:
        raise click.UsageError(f"--{'labels' if labels else 'unusable'} is of the whole run, not of a round")
    place = chosen_run(cache, run)
    found = labels_of(place) if labels else unusable_of(place) if unusable else round_of(place, number)
    tables = label_tables if labels else unusable_tables if unusable else round_tables
    if as_json:
        print_json(found)
    else:
        print_table(*tables(found))


@cli.command(
    epilog=example("tapir-local redo quickstart --round 2 --from plan", "tapir-local redo quickstart --from seeds")
)
@click.argument("run")
@click.option(
    "--round",
    "number",
    type=click.IntRange(min=0),
    help="The round; without it, a stage of the preparation, or `ship`, the last.",
)
@click.option("--from", "stage", required=True, help="The stage; it and all that follow are deleted, the last first.")
@cache_option
def redo(run: str, number: int | None, stage: str, cache: Path | None) -> None:
    """Delete the outputs of a stage of RUN and of every later one, so that `distill` makes them again.

    Paid calls stay in the store.
    """
    from tapir_local.pipeline.loop import redo as undo

    gone = undo(chosen_run(cache, run), number, stage)
    echo("\n".join(gone) if gone else "nothing was there", err=False)
    echo(f"{len(gone)} outputs deleted. `tapir-local distill` with the run's recipe makes them again.", err=True)


@cli.command(
    epilog=example("tapir-local chat quickstart", 'tapir-local chat quickstart --prompt "What is 12 + 7?" --vs base')
)
@click.argument("run", required=False)
@click.option(
    "--round", "number", type=click.IntRange(min=0), help="The round whose student answers; the last one if left out."
)
@click.option("--prompt", help="Answer this and end.")
@click.option("--vs", type=click.Choice(["base"]), help="Show the untrained student's answer too.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, help="0 is the likeliest answer.", show_default=True
)
@click.option("--random-seed", type=click.IntRange(min=0), help="Draw the same replies each time.")
@cache_option
def chat(
    run: str | None,
    number: int | None,
    prompt: str | None,
    vs: str | None,
    temperature: float,
    random_seed: int | None,
    cache: Path | None,
) -> None:
    """Talk to the student of RUN: /reset forgets the conversation, /exit ends it."""
    from tapir_local.commands.chat import converse, once, students

    place = chosen_run(cache, run)
    with students(place, number, vs, lambda text: echo(text, err=True), random_seed) as answering:
        if prompt is not None:
            once(answering, prompt, temperature, lambda text: echo(text, nl=False))
        else:
            converse(answering, temperature, read_line, lambda text: echo(text, nl=False))


def read_line() -> str | None:
    """A line from the terminal; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


@cli.command(epilog=example("tapir-local recipes", "tapir-local recipes quickstart", "tapir-local recipes --settings"))
@click.argument("name", required=False)
@click.option(
    "--settings", "list_settings", is_flag=True, help="List every setting with its type, default and meaning."
)
@json_option
def recipes(name: str | None, list_settings: bool, as_json: bool) -> None:
    """List the recipes that come with the program; with NAME, print the text of one.

    A recipe from elsewhere can run commands (train.launcher, export.converter) and send a key other than
    OPENAI_API_KEY to a host that it names. Read it first; `distill` then wants your answer, or --trust, once.
    """
    from tapir_local.resources import find_recipe, read_recipe_text

    if list_settings:
        print_settings(as_json)
    elif name:
        echo(read_recipe_text(find_recipe(name)), nl=False)
    else:
        print_recipes(as_json)


def print_recipes(as_json: bool) -> None:
    """A row a recipe."""
    from tapir_local.recipe.text import parse_recipe
    from tapir_local.report.terminal import plain_table
    from tapir_local.resources import read_recipe_text, recipe_files

    rows = []
    for path in recipe_files():
        text = read_recipe_text(path)
        rows.append(
            {
                "name": path.stem,
                "about": parse_recipe(text, str(path)).about,
                "command": text.splitlines()[0].lstrip("# "),
            }
        )
    if as_json:
        print_json(rows)
    else:
        print_table(plain_table("recipes", ["name", "about", "command"], [list(row.values()) for row in rows]))


def print_settings(as_json: bool) -> None:
    """A row a setting."""
    from tapir_local.recipe.settings import setting_rows
    from tapir_local.report.terminal import plain_table

    rows = setting_rows()
    if as_json:
        print_json(
            [{"setting": row.setting, "type": row.type, "default": row.default, "meaning": row.meaning} for row in rows]
        )
    else:
        cells = [[row.setting, row.type, row.default_text, row.meaning] for row in rows]
        print_table(plain_table("settings of a recipe", ["setting", "type", "default", "meaning"], cells))


@cli.command(epilog=example("tapir-local doctor"))
@cache_option
@json_option
def doctor(cache: Path | None, as_json: bool) -> None:
    """Is this machine ready? Exits with 1 where something that is needed is missing."""
    from dataclasses import asdict

    from tapir_local.report.doctor import examine
    from tapir_local.report.terminal import plain_table
    from tapir_local.resources import default_cache

    checks = examine(cache or default_cache())
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        words = {True: "good", False: "MISSING", None: "-"}
        rows = [[check.name, words[check.ok], check.found, "" if check.ok else check.fix] for check in checks]
        print_table(plain_table("doctor", ["", "", "found", "what to do"], rows))
    if any(check.ok is False for check in checks):
        sys.exit(1)


for command in (calls, compare, distill, export, generate, plan, why):
    cli.add_command(command)


def main() -> None:
    """The console script: one line for an error that can be put right, no traceback."""
    try:
        refuse_other_systems(sys.platform)
        cli.main(standalone_mode=False)
    except TapirError as error:
        click.secho("error: ", err=True, nl=False, fg="red", bold=True)
        echo(str(error), err=True)
        sys.exit(1)
    except click.ClickException as error:
        words = io.StringIO()
        error.show(words)
        echo(words.getvalue(), err=True, nl=False)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as stopped:
        echo("\nstopped; the same command goes on from here, and nothing paid for is lost", err=True)
        for note in getattr(stopped.__cause__ or stopped, "__notes__", ()):
            echo(note, err=True)
        sys.exit(130)
