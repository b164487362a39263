"""`tapir-local distill`: apply the command line to the recipe, run it or estimate its cost, and say how it went."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tapir_local.errors import TapirError
from tapir_local.terminal.options import HomePath, cache_argument, cache_option, help_examples, program_name
from tapir_local.terminal.output import echo, print_json, print_table

if TYPE_CHECKING:
    from tapir_local.pipeline.dry_run import CostEstimate
    from tapir_local.pipeline.loop import Step, Watch
    from tapir_local.recipe.schema import Recipe
    from tapir_local.run_dir import RunDir
    from tapir_local.store.store import Mode
    from tapir_local.terminal.events import RunEvents
    from tapir_local.terminal.progress import RunDisplay


@click.command(
    name="distill",
    epilog=help_examples(
        "tapir-local distill --rounds 3",
        "tapir-local distill recipes/recorded.yaml --seeds my.json",
        "tapir-local distill my-run",
    ),
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
@click.option(
    "--json", "as_json", is_flag=True, help="Print each event as a line of JSON; with --dry-run, one JSON object."
)
@click.option("--require-gpu", is_flag=True, help="Stop with an error if training or answering would run on the CPU.")
@click.option(
    "--trust",
    is_flag=True,
    help="Allow RECIPE to run commands, and to send keys and losses to the hosts that it names.",
)
@click.option(
    "--display",
    type=click.Choice(["full", "lines", "log", "none"]),
    help="Full screen, lines with a bar, lines alone, or nothing.  [default: full on a terminal, lines in a pipe]",
)
@click.option("-q", "--quiet", is_flag=True, help="The same as --display none: print errors and the final table only.")
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
    as_json: bool,
    require_gpu: bool,
    trust: bool,
    display: str | None,
    quiet: bool,
    cache: Path | None,
) -> None:
    """Run RECIPE, or resume its run if it was stopped.

    RECIPE is a YAML file, the name of a recipe that comes with the program (see `tapir-local recipes`), or the name of
    a run, which resumes with the recipe that it began with. Paths in a recipe are relative to the current folder. A
    recipe that runs a command (train.launcher, export.converter), sends a key other than OPENAI_API_KEY to a host that
    it names, or sends the loss of each training to wandb needs your permission once: --trust, or an answer in the
    terminal. What happens is also written to run.log in the run's folder.
    """
    from tapir_local.doctor import gpu_check
    from tapir_local.resources import default_cache
    from tapir_local.run_dir import RunDir
    from tapir_local.terminal.events import RunEvents, telling_stop
    from tapir_local.terminal.trust import ask_permission, require_trust

    events = RunEvents() if as_json and not dry_run else None
    with telling_stop(events):
        given = recipe_changes(changes, rounds=rounds, name=name, seeds=seeds, random_seed=random_seed)
        chosen, path, messages = resolve_recipe(recipe, given, cache or default_cache())
        run = RunDir(cache or default_cache(), chosen.name)
        shown = open_display(display, quiet, chosen, run, events)
        show_messages(shown, messages, dry_run)
        if dry_run:
            print_cost_estimate(chosen, run, as_json=as_json)
            return
        require_trust(chosen, path, given, run.cache, lambda risks: ask_permission(risks, trust))
        if require_gpu:
            gpu_check.require_gpu()
        print_end(shown, cache, run_recipe(shown, replay, cache))


def open_display(
    kind: str | None, quiet: bool, recipe: "Recipe", run: "RunDir", events: "RunEvents | None"
) -> "RunDisplay":
    """The display that the options ask for; beside `events` there is none unless one is asked for."""
    from rich.console import Console

    from tapir_local.terminal.events import refuse_mixed_screen
    from tapir_local.terminal.progress import RunDisplay, choose_display

    console = Console(stderr=True)
    shown = choose_display(kind or ("none" if events else None), quiet, console)
    refuse_mixed_screen(events, shown)
    return RunDisplay(console, shown, recipe, run, events=events)


def show_messages(display: "RunDisplay", messages: Sequence[str], dry_run: bool) -> None:
    """Show what the user should read before the run."""
    from tapir_local.tables import plain_text

    if display.events:
        display.events.start(display.state)
    for message in messages:
        if display.events:
            display.events.warning(message)
        if display.kind != "none" or dry_run:
            display.console.print(plain_text(message), soft_wrap=not display.console.is_terminal)


def print_end(display: "RunDisplay", cache: Path | None, count: int) -> None:
    """Print the rounds, if any of the `count` steps was run, and what to do next."""
    run, quiet = display.run, display.kind == "none"
    if display.events:
        display.events.done(display.state, count)
    better = print_rounds(run) if count and not display.events else None
    if not count and not quiet:
        echo(f"Run {run.name!r} is done already; `{program_name()} status {run.name}` shows it.", err=True)
    if not quiet:
        echo(f"\n{next_steps(run, cache, better)}", err=True)


def next_steps(run: "RunDir", cache: Path | None, better: int | None = None) -> str:
    """Where the student is, and the commands to talk to it and to look at it; `better` is a round to ship instead."""
    model, name = run.path / "model", run.name.lower()
    program, place = program_name(), cache_argument(cache)
    ship = f"Ship round {better}:   {program} ship {run.name} --round {better}{place}\n"
    instead = "" if better is None else ship
    return (
        f"The student is in {model}, with a Modelfile, a model card and checksums.\n"
        f"Talk to it:     {program} chat {run.name} --vs base{place}\n"
        f"Its answers:    {program} show {run.name}{place}\n"
        f"As a page:      {program} report {run.name}{place}\n{instead}"
        f"In Ollama:      ollama create {name} -f {shlex.quote(str(model / 'Modelfile'))} && ollama run {name}"
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


def find_recipe_or_run(named: str, cache: Path | None) -> tuple[Path, bool]:
    """(file of a recipe, whether a run in `cache` keeps it), by the name of a recipe or, if there is none, of a run."""
    from tapir_local.resources import find_recipe
    from tapir_local.run_dir import run_of_name

    try:
        path = find_recipe(named)
        return path, cache is not None and path.name == "recipe.yaml" and path.parent.parent == cache / "runs"
    except TapirError:
        run = run_of_name(cache, named) if cache else None
        if run is None or not run.exists:
            raise
        return run.path / "recipe.yaml", True


def resolve_recipe(
    named: str, changes: Mapping[str, Any], cache: Path | None = None
) -> tuple["Recipe", Path, list[str]]:
    """(recipe with the changes, its file, messages that the user should read before it runs).

    `named` is a recipe, or a run in `cache`.
    """
    from tapir_local.recipe.checks import find_notices, find_unnamed
    from tapir_local.recipe.text import describe_replaced_kinds, override, parse_recipe
    from tapir_local.resources import read_recipe_text

    path, of_run = find_recipe_or_run(named, cache)
    # The file alone may have an error that a change fixes.
    written = recipe = parse_recipe(read_recipe_text(path), str(path), kept=of_run or bool(changes))
    if changes:
        recipe = override(written, changes, kept=of_run, where=f"{path} with the command line's settings")
    if missing := find_unnamed(recipe):
        raise TapirError("; ".join(missing), where=str(path), fix="Write it into the recipe, or add it with --set.")
    return recipe, path, [*describe_replaced_kinds(written, recipe), *find_notices(recipe)]


def print_cost_estimate(recipe: "Recipe", run: "RunDir", *, as_json: bool = False) -> None:
    """Print a table of the calls that the rest of the run will make, or that there are none; or the same as JSON."""
    from tapir_local.doctor.recipe_checks import check_rows, count_table_rows
    from tapir_local.pipeline.dry_run import estimate_costs
    from tapir_local.report.costs import cost_estimate_table, no_calls_sentence
    from tapir_local.stages.judge import judge_endpoint
    from tapir_local.teacher.budget import check_reply_limits

    check_reply_limits(recipe.budget, recipe.teacher, judge_endpoint(recipe))
    rows = estimate_costs(recipe, run)
    if as_json:
        print_json(estimate_record(run, rows))
    elif rows:
        print_table(cost_estimate_table(rows, run.name))
    else:
        echo(no_calls_sentence(recipe))
    if odd := check_rows(recipe, count_table_rows(recipe)):
        echo(f"{odd.found}. {odd.fix}", err=True)


def estimate_record(run: "RunDir", rows: "Sequence[CostEstimate]") -> dict[str, Any]:
    """A cost estimate as data: each stage, and the sums; money is null if a price is unknown."""
    from dataclasses import asdict

    money = [row.money for row in rows]
    sums = {name: sum(getattr(row, name) for row in rows) for name in ("calls", "to_pay", "tokens_in", "tokens_out")}
    known = None if None in money else sum(value for value in money if value is not None)
    return {
        "run": run.name,
        "stages": [{**asdict(row), "to_pay": row.to_pay} for row in rows],
        "all": {**sums, "money": known},
    }


def run_recipe(display: "RunDisplay", replay: bool, cache: Path | None) -> int:
    """Run the stages that are not done yet and show them; return their number. `replay`: ask the store only."""
    from tapir_local.doctor.gpu_check import idle_gpu_remarks
    from tapir_local.pipeline.loop import distill
    from tapir_local.stages.backends import real_backends

    recipe, run, steps = display.recipe, display.run, display.state.steps
    done = sum(step.done for step in steps)
    mode: Mode = "replay" if replay else "on"
    if done < len(steps):
        for remark in idle_gpu_remarks():
            display.say(remark)
        display.print_header(done)
    with real_backends(recipe, run, display.say, mode) as tools, display.showing(tools) as watch:
        return distill(recipe, run, tools, watch if replay else with_receipts(watch, display, cache))


def with_receipts(watch: "Watch", display: "RunDisplay", cache: Path | None) -> "Watch":
    """The same watch, which also writes a line after each round that says what it cost."""
    from dataclasses import replace

    from tapir_local.report.costs import round_receipt, summarize_costs

    run = display.run

    def ends(step: "Step", taken: Mapping[str, Any]) -> None:
        watch.ends(step, taken)
        if step.stage.name == "evaluate" and (run.cache / "teacher.db").exists():
            stages = summarize_costs(run.cache / "teacher.db", "stage", run.name, step.number)
            title = f"round {step.number}" if step.number else "preparation and round 0"
            command = f"{program_name()} calls cost --run {run.name} --round {step.number}"
            if receipt := round_receipt(stages, command + cache_argument(cache)):
                display.lines.write(f"{title}: {receipt}")

    return replace(watch, ends=ends)


def print_rounds(run: "RunDir") -> int | None:
    """Print the rounds with their changes, and what they achieved; returns the best round if model/ has another."""
    from tapir_local.report.compare import compare_rounds, fallen_sentence, round_verdict
    from tapir_local.report.compare_tables import rounds_of_run_table
    from tapir_local.run_dir import UNTRAINED_ROUND
    from tapir_local.tables import plain_text

    found = compare_rounds(run)
    sentences = [text for text in (round_verdict(found), fallen_sentence(found)) if text]
    print_table(rounds_of_run_table(found), *map(plain_text, sentences))
    return found["best"] if found["best"] not in (found["shipped"], UNTRAINED_ROUND) else None
