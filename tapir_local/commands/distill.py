"""`tapir-local distill`: apply the command line to the recipe, run it or estimate its cost, and say how it went."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tapir_local.commands.options import HomePath, cache_argument, cache_option, help_examples
from tapir_local.commands.output import echo, print_table
from tapir_local.errors import TapirError

if TYPE_CHECKING:
    from rich.console import Console

    from tapir_local.pipeline.loop import Step, Watch
    from tapir_local.recipe.schema import Recipe
    from tapir_local.run_dir import RunDir
    from tapir_local.store.store import Mode


@click.command(
    name="distill",
    epilog=help_examples("tapir-local distill --rounds 3", "tapir-local distill recipes/recorded.yaml --seeds my.json"),
)
@click.argument("recipe", default="quickstart")
@click.option("--rounds", type=click.IntRange(min=0), help="Rounds after round 0 (overrides the recipe).")
@click.option("--name", help="Name of the run (overrides the recipe).")
@click.option("--seeds", type=HomePath(), help="File of seeds (overrides the recipe).")
@click.option("--random-seed", type=click.IntRange(min=0), help="Random seed (overrides the recipe).")
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a setting of the recipe; repeatable."
)
@click.option("--replay", is_flag=True, help="Take every answer from the store; stop with an error if one is missing.")
@click.option("--dry-run", is_flag=True, help="Show what the rest of the run will ask and cost, and ask nothing.")
@click.option("--require-gpu", is_flag=True, help="Stop with an error if training or answering would run on the CPU.")
@click.option("--trust", is_flag=True, help="Allow RECIPE to run the commands and send the keys that it names.")
@cache_option
def distill_command(
    recipe: str,
    rounds: int | None,
    name: str | None,
    seeds: Path | None,
    random_seed: int | None,
    changes: tuple[str, ...],
    replay: bool,
    dry_run: bool,
    require_gpu: bool,
    trust: bool,
    cache: Path | None,
) -> None:
    """Run RECIPE, or resume its run if it was stopped.

    RECIPE is a YAML file or the name of a recipe that comes with the program (see `tapir-local recipes`). Paths in it
    are relative to the current folder. A recipe that runs a command (train.launcher, export.converter), or sends a key
    other than OPENAI_API_KEY to a host that it names, needs your permission once: --trust, or an answer in the
    terminal.
    """
    from tapir_local.commands.trust import ask_permission, require_trust
    from tapir_local.report import gpu_check
    from tapir_local.resources import default_cache
    from tapir_local.run_dir import RunDir

    given = recipe_changes(changes, rounds=rounds, name=name, seeds=seeds, random_seed=random_seed)
    chosen, path, messages = resolve_recipe(recipe, given)
    run = RunDir(cache or default_cache(), chosen.name)
    for message in messages:
        echo(message, err=True)
    if dry_run:
        print_cost_estimate(chosen, run)
        return
    require_trust(chosen, path, given, run.cache, lambda risks: ask_permission(risks, trust))
    if require_gpu:
        gpu_check.require_gpu()
    count = run_recipe(chosen, run, replay)
    if count:
        print_rounds(run)
        echo(f"\n{count} stages done. {next_steps(run, cache)}", err=True)
    else:
        done = f"Run {run.name!r} is done already: {chosen.rounds} rounds. `tapir-local status {run.name}` shows it."
        echo(f"{done}\n{next_steps(run, cache)}", err=True)


def next_steps(run: "RunDir", cache: Path | None) -> str:
    """Where the student is, and the commands to talk to it."""
    model, name = run.path / "model", run.name.lower()
    return (
        f"The student is in {model}, with a Modelfile, a model card and checksums.\n"
        f"Talk to it:  tapir-local chat {run.name}{cache_argument(cache)}\n"
        f"In Ollama:   ollama create {name} -f {shlex.quote(str(model / 'Modelfile'))} && ollama run {name}"
    )


def recipe_changes(
    sets: Sequence[str], *, rounds: int | None, name: str | None, seeds: Path | None, random_seed: int | None
) -> dict[str, Any]:
    """The settings that the command line changes, by path; an option such as --rounds overrides --set."""
    from tapir_local.recipe.text import parse_changes

    options = {
        "rounds": rounds,
        "name": name,
        "random_seed": random_seed,
        "seeds.path": seeds and str(seeds.absolute()),
    }
    return parse_changes(sets) | {key: value for key, value in options.items() if value is not None}


def resolve_recipe(named: str, changes: Mapping[str, Any]) -> tuple["Recipe", Path, list[str]]:
    """(recipe with the changes, its file, messages that the user should read before it runs)."""
    from tapir_local.recipe.checks import find_notices, find_unnamed
    from tapir_local.recipe.text import describe_replaced_kinds, override, parse_recipe
    from tapir_local.resources import find_recipe, read_recipe_text

    path = find_recipe(named)
    # The file alone may have an error that a change fixes.
    written = recipe = parse_recipe(read_recipe_text(path), str(path), kept=bool(changes))
    if changes:
        recipe = override(written, changes, where=f"{path} with the command line's settings")
    if missing := find_unnamed(recipe):
        raise TapirError("; ".join(missing), where=str(path), fix="Write it into the recipe, or add it with --set.")
    return recipe, path, [*describe_replaced_kinds(written, recipe), *find_notices(recipe)]


def print_cost_estimate(recipe: "Recipe", run: "RunDir") -> None:
    """Print a table of the calls that the rest of the run will make, or that there are none."""
    from tapir_local.pipeline.backends import judge_endpoint
    from tapir_local.pipeline.dry_run import estimate_costs
    from tapir_local.report.costs import cost_estimate_table, no_calls_sentence
    from tapir_local.teacher.budget import check_reply_limits

    check_reply_limits(recipe.budget, recipe.teacher, judge_endpoint(recipe))
    if rows := estimate_costs(recipe, run):
        print_table(cost_estimate_table(rows, run.name))
    else:
        echo(no_calls_sentence(recipe))


def run_recipe(recipe: "Recipe", run: "RunDir", replay: bool) -> int:
    """Run the stages that are not done yet, with a progress bar; return their number. `replay`: ask the store only."""
    from rich.console import Console

    from tapir_local.pipeline.backends import real_backends
    from tapir_local.pipeline.loop import distill, list_steps
    from tapir_local.report.gpu_check import idle_gpu_remarks
    from tapir_local.report.progress import watch_run
    from tapir_local.tables import plain_text

    console, steps = Console(stderr=True), list_steps(run, recipe.rounds)
    done = sum(step.done for step in steps)
    mode: Mode = "replay" if replay else "on"

    def say(text: str) -> None:
        console.print(plain_text(text), soft_wrap=True)

    for remark in idle_gpu_remarks() if done < len(steps) else ():
        say(remark)
    with real_backends(recipe, run, say, mode) as tools, watch_run(console, done, len(steps)) as watch:
        return distill(recipe, run, tools, watch if replay else with_receipts(watch, run, console))


def with_receipts(watch: "Watch", run: "RunDir", console: "Console") -> "Watch":
    """The same watch, which also prints after each round what it cost."""
    from dataclasses import replace

    from tapir_local.report.costs import round_receipt, summarize_costs

    def ends(step: "Step", taken: Mapping[str, Any]) -> None:
        watch.ends(step, taken)
        if step.stage.name == "evaluate" and (run.cache / "teacher.db").exists():
            found = [summarize_costs(run.cache / "teacher.db", by, run.name, step.number) for by in ("stage", "task")]
            console.print(*round_receipt(f"round {step.number}: receipt", *found), sep="\n")

    return replace(watch, ends=ends)


def print_rounds(run: "RunDir") -> None:
    """Print the table of rounds."""
    from tapir_local.report.status import run_status
    from tapir_local.report.status_tables import rounds_table

    print_table(rounds_table(run_status(run)))
