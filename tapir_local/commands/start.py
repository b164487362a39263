"""Commands to use before a first run: `recipes` and `doctor`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tapir_local.errors import TapirError
from tapir_local.terminal.options import cache_option, help_examples, json_option
from tapir_local.terminal.output import echo, print_json, print_table

if TYPE_CHECKING:
    from tapir_local.doctor.doctor import MachineCheck


@click.command(
    name="recipes",
    epilog=help_examples(
        "tapir-local recipes", "tapir-local recipes quickstart", "tapir-local recipes --settings curriculum"
    ),
)
@click.argument("name", required=False)
@click.option("--settings", "list_settings", is_flag=True, help="List all settings, or those that begin with NAME.")
@json_option
def recipes_command(name: str | None, list_settings: bool, as_json: bool) -> None:
    """List the recipes that come with the program. With NAME, print that one.

    With --json, NAME's settings are printed as JSON, those that it leaves out with their defaults.

    A recipe from another source can run commands (train.launcher, export.converter), send a key other than
    OPENAI_API_KEY to a host that it names, and send the loss of each training to wandb. Read it before you use it;
    `distill` asks you once to allow this, or takes --trust.
    """
    from tapir_local.resources import find_recipe, read_recipe_text

    if list_settings:
        print_settings(name or "", as_json)
    elif name and as_json:
        print_recipe_json(find_recipe(name))
    elif name:
        echo(read_recipe_text(find_recipe(name)), nl=False)
    else:
        print_recipes(as_json)


def print_recipes(as_json: bool) -> None:
    """Print a row for each recipe."""
    from tapir_local.recipe.text import parse_recipe
    from tapir_local.report.tables import text_table
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
        print_table(
            text_table("recipes", ["name", "about", "command"], [list(row.values()) for row in rows], whole=["name"])
        )


def print_recipe_json(path: Path) -> None:
    """Print a recipe as JSON: its name, the command that runs it, and every setting."""
    from tapir_local.recipe.text import parse_recipe
    from tapir_local.resources import read_recipe_text

    text = read_recipe_text(path)
    settings = parse_recipe(text, str(path)).model_dump(mode="json")
    print_json({"name": path.stem, "command": text.splitlines()[0].lstrip("# "), "settings": settings})


def print_settings(prefix: str, as_json: bool) -> None:
    """Print a row for each setting whose path begins with `prefix`; TapirError if there is none."""
    from tapir_local.recipe.settings import setting_rows
    from tapir_local.report.tables import text_table

    rows = [row for row in setting_rows() if row.setting.startswith(prefix)]
    if not rows:
        sections = ", ".join(dict.fromkeys(row.section.partition(".")[0] for row in setting_rows() if row.section))
        raise TapirError(f"no setting begins with {prefix!r}", where="--settings", fix=f"Sections are: {sections}.")
    if as_json:
        print_json(
            [{"setting": row.setting, "type": row.type, "default": row.default, "meaning": row.meaning} for row in rows]
        )
    else:
        cells = [[row.setting, row.type, row.default_text, row.meaning] for row in rows]
        print_table(
            text_table(
                "settings of a recipe",
                ["setting", "type", "default", "meaning"],
                cells,
                whole=["setting"],
                ranks={"type": 1},
            )
        )


@click.command(
    name="doctor",
    epilog=help_examples("tapir-local doctor", "tapir-local doctor my.yaml", "tapir-local doctor my.yaml --ask"),
)
@click.argument("recipe", required=False)
@click.option("--ask", is_flag=True, help="Send one short request to each endpoint of RECIPE; it may cost money.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a setting of RECIPE; repeatable.")
@cache_option
@json_option
def doctor_command(recipe: str | None, ask: bool, changes: tuple[str, ...], cache: Path | None, as_json: bool) -> None:
    """Check whether this machine is ready, and for RECIPE.

    With RECIPE, also checks its seeds, student, chat template, memory, disk, keys and endpoints, and that what is not
    on this machine can be downloaded. RECIPE is a recipe or a run. Exits with 1 if something that is needed is missing.
    """
    from dataclasses import asdict

    from tapir_local.doctor.doctor import check_machine
    from tapir_local.resources import default_cache

    if recipe is None and (ask or changes):
        raise click.UsageError("--ask and --set need a RECIPE")
    place = cache or default_cache()
    found = check_recipe_file(recipe, changes, place, ask=ask) if recipe else []
    checks = [check for check in check_machine(place) if not (found and check.name == "API key")]
    if as_json:
        print_json([asdict(check) for check in [*checks, *found]])
    else:
        print_checks("doctor", checks)
        if found:
            print_checks(f"doctor: {recipe}", found)
    if any(check.ok is False for check in [*checks, *found]):
        sys.exit(1)


def check_recipe_file(named: str, changes: Sequence[str], cache: Path, *, ask: bool) -> "list[MachineCheck]":
    """The checks of a recipe, or of a run's; its notices go to stderr."""
    from tapir_local.commands.distill import resolve_recipe
    from tapir_local.doctor.recipe_checks import check_recipe
    from tapir_local.recipe.text import parse_changes

    recipe, _, notices = resolve_recipe(named, parse_changes(changes), cache)
    for notice in notices:
        echo(notice, err=True)
    return check_recipe(recipe, cache, ask=ask)


def print_checks(title: str, checks: "Sequence[MachineCheck]") -> None:
    """Print a row for each check, with what to do where it is not good."""
    from tapir_local.report.tables import text_table

    words = {True: "good", False: "MISSING", None: "-"}
    rows = [[check.name, words[check.ok], check.found, "" if check.ok else check.fix] for check in checks]
    print_table(text_table(title, ["check", "", "found", "what to do"], rows, whole=["check", ""]))
