"""`tapir-local distill`: the recipe with what the command line says instead, the run, and what it tells of itself."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tapir_local.commands.common import HomePath, cache_option, cache_words, echo, example, print_table
from tapir_local.errors import TapirError

if TYPE_CHECKING:
    from rich.console import Console

    from tapir_local.commands.trust import Risk
    from tapir_local.pipeline.loop import Step, Watch
    from tapir_local.recipe.schema import Recipe
    from tapir_local.run_dir import RunDir
    from tapir_local.store.store import Mode


@click.command(
    epilog=example("tapir-local distill --rounds 3", "tapir-local distill recipes/recorded.yaml --seeds my.json")
)
@click.argument("recipe", default="quickstart")
@click.option("--rounds", type=click.IntRange(min=0), help="Rounds after the baseline, instead of the recipe's.")
@click.option("--name", help="Name of the run, instead of the recipe's.")
@click.option("--seeds", type=HomePath(), help="File of seeds, instead of the recipe's.")
@click.option("--random-seed", type=click.IntRange(min=0), help="Where chance begins, instead of the recipe's.")
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a setting of the recipe; repeatable."
)
@click.option("--replay", is_flag=True, help="Ask nobody: every answer must be in the store, or the run stops.")
@click.option("--dry-run", is_flag=True, help="Only tell what the rest of the run will ask and cost; asks nobody.")
@click.option("--trust", is_flag=True, help="Let RECIPE run the commands and send the keys that it names.")
@cache_option
def distill(
    recipe: str,
    rounds: int | None,
    name: str | None,
    seeds: Path | None,
    random_seed: int | None,
    changes: tuple[str, ...],
    replay: bool,
    dry_run: bool,
    trust: bool,
    cache: Path | None,
) -> None:
    """Run RECIPE, or go on with it where it was cut.

    RECIPE is a YAML file or the name of one that comes with the program (see `tapir-local recipes`). Paths in it are
    from the current folder. One that runs a command (train.launcher, export.converter), or sends another key than
    OPENAI_API_KEY to a host that it names, needs --trust or an answer on a terminal, once.
    """
    from tapir_local.commands.trust import require_trust

    given = changes_of(changes, rounds=rounds, name=name, seeds=seeds, random_seed=random_seed)
    chosen, path, said = settled(recipe, given)
    run = run_dir(cache, chosen.name)
    for line in said:
        echo(line, err=True)
    if dry_run:
        foretell(chosen, run)
        return
    require_trust(chosen, path, given, run.cache, lambda risks: agreed(risks, trust))
    if count := carry_out(chosen, run, replay):
        print_rounds(run)
        echo(f"\n{count} stages done. {what_now(run, cache)}", err=True)
    else:
        echo(
            f"Run {run.name!r} is done already: {chosen.rounds} rounds. tapir-local status {run.name} shows it.",
            err=True,
        )
        echo(what_now(run, cache), err=True)


def what_now(run: "RunDir", cache: Path | None) -> str:
    """Where the student is and how one talks to it."""
    model, name = run.path / "model", run.name.lower()
    return (
        f"The student is in {model}, with a Modelfile, a card and checksums.\n"
        f"Talk to it:  tapir-local chat {run.name}{cache_words(cache)}\n"
        f"In Ollama:   ollama create {name} -f {shlex.quote(str(model / 'Modelfile'))} && ollama run {name}"
    )


def load_recipe(
    named: str,
    sets: Sequence[str],
    *,
    rounds: int | None,
    name: str | None,
    seeds: Path | None,
    random_seed: int | None,
) -> "Recipe":
    """The recipe with what the command line says instead."""
    changes = changes_of(sets, rounds=rounds, name=name, seeds=seeds, random_seed=random_seed)
    return settled(named, changes)[0]


def changes_of(
    sets: Sequence[str], *, rounds: int | None, name: str | None, seeds: Path | None, random_seed: int | None
) -> dict[str, Any]:
    """What the command line says of settings; an option of its own is stronger than --set."""
    from tapir_local.recipe.text import parse_changes

    options = {
        "rounds": rounds,
        "name": name,
        "random_seed": random_seed,
        "seeds.path": seeds and str(seeds.absolute()),
    }
    return parse_changes(sets) | {key: value for key, value in options.items() if value is not None}


def settled(named: str, changes: Mapping[str, Any]) -> tuple["Recipe", Path, list[str]]:
    """A named recipe with the changes, its file, and what the user should know of it before it runs."""
    from tapir_local.recipe.checks import find_notices, find_unnamed
    from tapir_local.recipe.text import describe_replaced_kinds, override, parse_recipe
    from tapir_local.resources import find_recipe, read_recipe_text

    path = find_recipe(named)
    # A change may mend what the file alone would be refused for.
    written = recipe = parse_recipe(read_recipe_text(path), str(path), kept=bool(changes))
    if changes:
        recipe = override(written, changes, where=f"{path} with the command line's settings")
    if missing := find_unnamed(recipe):
        raise TapirError("; ".join(missing), where=str(path), fix="Write it into the recipe, or add it with --set.")
    return recipe, path, [*describe_replaced_kinds(written, recipe), *find_notices(recipe)]


def agreed(risks: "Sequence[Risk]", trust: bool) -> bool:
    """Whether the user lets a recipe do this: by --trust, or by an answer on a terminal."""
    if trust or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return trust
    for risk in risks:
        echo(f"This recipe {risk.does}", err=True)
    return click.confirm("Is that what you want?", default=False, err=True)


def foretell(recipe: "Recipe", run: "RunDir") -> None:
    """A table of the calls to come."""
    from tapir_local.pipeline.backends import judge_of
    from tapir_local.pipeline.dry_run import forecast
    from tapir_local.report.terminal import forecast_table
    from tapir_local.teacher.account import check_bounds

    check_bounds(recipe.budget, recipe.teacher, judge_of(recipe))
    print_table(forecast_table(forecast(recipe, run), run.name))


def carry_out(recipe: "Recipe", run: "RunDir", replay: bool) -> int:
    """The loop with the real tools and a progress bar; with `replay`, from the store alone."""
    from rich.console import Console

    from tapir_local.pipeline.backends import real_tools
    from tapir_local.pipeline.loop import distill as loop
    from tapir_local.pipeline.loop import sequence
    from tapir_local.report.terminal import watched
    from tapir_local.tables import plain_text

    console, steps = Console(stderr=True), sequence(run, recipe.rounds)
    done = sum(step.done for step in steps)
    mode: Mode = "replay" if replay else "on"

    def say(text: str) -> None:
        console.print(plain_text(text), soft_wrap=True)

    with real_tools(recipe, run, say, mode) as tools, watched(console, done, len(steps)) as watch:
        return loop(recipe, run, tools, watch if replay else with_receipts(watch, run, console))


def with_receipts(watch: "Watch", run: "RunDir", console: "Console") -> "Watch":
    """The same, and after each round what it cost."""
    from dataclasses import replace

    from tapir_local.report.costs import costs
    from tapir_local.report.terminal import receipt

    def ends(step: "Step", taken: Mapping[str, Any]) -> None:
        watch.ends(step, taken)
        if step.stage.name == "evaluate" and (run.cache / "teacher.db").exists():
            found = [costs(run.cache / "teacher.db", by, run.name, step.number) for by in ("stage", "task")]
            console.print(*receipt(f"round {step.number}: receipt", *found), sep="\n")

    return replace(watch, ends=ends)


def run_dir(cache: Path | None, name: str) -> "RunDir":
    """The folder of a run that may not be there yet."""
    from tapir_local.resources import default_cache
    from tapir_local.run_dir import RunDir

    return RunDir(cache or default_cache(), name)


def print_rounds(run: "RunDir") -> None:
    """The table of rounds."""
    from tapir_local.report.status import status_of
    from tapir_local.report.terminal import rounds_table

    print_table(rounds_table(status_of(run)))
