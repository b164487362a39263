"""Commands that change a run as a whole: `resume`, `ship` and `rm`."""

import sys
from pathlib import Path
from typing import Any

import click

from tapir_local.commands.distill import distill_command
from tapir_local.errors import TapirError
from tapir_local.terminal.options import cache_argument, cache_option, help_examples, program_name, select_run
from tapir_local.terminal.output import bar_progress, echo

SETTLED_OPTIONS = {"recipe", "name", "seeds", "random_seed"}  # of distill: a run that has begun has them already


@click.pass_context
def resume_run(context: click.Context, /, run: str | None, cache: Path | None, **options: Any) -> None:
    """Resume RUN with the recipe that it began with.

    Without RUN, resume the run that was worked on last. `distill RUN` does the same, unless a recipe has this name.
    Settings that change no finished output may change, such as rounds and budget.
    """
    from tapir_local.terminal.events import RunEvents, telling_stop

    with telling_stop(RunEvents() if options["as_json"] and not options["dry_run"] else None):
        place = select_run(cache, run)
    context.invoke(distill_command, recipe=str(place.path / "recipe.yaml"), cache=cache, **options)


resume_command = click.Command(
    "resume",
    params=[
        click.Argument(["run"], required=False),
        *(option for option in distill_command.params if option.name not in SETTLED_OPTIONS),
    ],
    callback=resume_run,
    help=resume_run.__doc__,
    epilog=help_examples("tapir-local resume", "tapir-local resume my-run --set budget.money=30"),
)


@click.command(
    name="ship",
    epilog=help_examples("tapir-local ship my-run --round 2", "tapir-local resume my-run --set ship=best"),
)
@click.argument("run")
@click.option("--round", "number", type=click.IntRange(min=0), required=True, help="Round whose student model/ gets.")
@click.option("-y", "--yes", is_flag=True, help="Replace model/ without asking; without a terminal nothing is asked.")
@cache_option
def ship_command(run: str, number: int, yes: bool, cache: Path | None) -> None:
    """Make model/ of RUN from the student of another round.

    The new model/ replaces the old one, which can be made again from its round, so nothing is lost. `status`, the model
    card and `compare` name the round. The choice lasts until the recipe's `rounds` or `ship` changes: then model/ is
    made again as the setting `ship` says.
    """
    from tapir_local.pipeline.loop import Watch, kept_recipe
    from tapir_local.pipeline.manage import check_shippable, ship_round
    from tapir_local.records import noop
    from tapir_local.stages.backends import real_backends
    from tapir_local.stages.shipped_round import read_shipped_round

    place = select_run(cache, run)
    check_shippable(place, number)
    recipe = kept_recipe(place)
    there = read_shipped_round(place, recipe.rounds)
    if there and there["round"] == number:
        echo(f"model/ has round {number} already", err=True)
        return
    if there and not confirm(f"model/ has round {there['round']}. Replace it with round {number}?", yes):
        echo("nothing was changed", err=True)
        sys.exit(1)
    with (
        real_backends(recipe, place, lambda text: echo(text, err=True)) as tools,
        bar_progress("ship") as (show, _),
    ):
        watch = Watch(noop, lambda done, total, said: show(done, total), noop)
        note = ship_round(place, number, tools, watch)
    echo(note, err=True)
    echo(str(place.path / "model"))


def confirm(question: str, yes: bool) -> bool:
    """The answer to a question in the terminal; yes without a terminal, or if the option says so."""
    asked = not yes and sys.stdin.isatty() and sys.stderr.isatty()
    return click.confirm(question, default=False, err=True) if asked else True


@click.command(name="rm", epilog=help_examples("tapir-local rm my-run", "tapir-local rm test-1 test-2 --yes"))
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("-y", "--yes", is_flag=True, help="Delete without asking; needed if there is no terminal to ask in.")
@cache_option
def rm_command(runs: tuple[str, ...], yes: bool, cache: Path | None) -> None:
    """Delete the folders of runs, after a question.

    Paid calls stay in the store: the same recipe makes the run again without paying twice. Base GGUFs stay too. A run
    that a process works on is refused.
    """
    from tapir_local.memory import format_bytes
    from tapir_local.pipeline.manage import delete_run
    from tapir_local.printable import format_count
    from tapir_local.report.status import disk_bytes, read_run_state, short_state
    from tapir_local.run_dir import lock_holder

    places = [select_run(cache, name) for name in dict.fromkeys(runs)]
    for place in places:
        if holder := lock_holder(place):
            fix = "Nothing was deleted. Stop that process first, or wait until it ends."
            raise TapirError(f"run {place.name!r} is in use by {holder}", where=str(place.path), fix=fix)
    for place in places:
        echo(f"  {place.path}  {format_bytes(disk_bytes(place.path))}  {short_state(read_run_state(place))}", err=True)
    if not yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise TapirError("there is no terminal to ask in, so nothing was deleted", fix="Add --yes.")
    if not confirm(f"Delete {format_count(len(places), 'run')}?", yes):
        echo("nothing was deleted", err=True)
        sys.exit(1)
    for place in places:
        delete_run(place)
        echo(place.name)
    command = f"{program_name()} calls stats{cache_argument(cache)}"
    stays = f"Paid calls stay in {places[0].cache / 'teacher.db'} (`{command}`), and base GGUFs in base/."
    echo(f"{format_count(len(places), 'run')} deleted. {stays}", err=True)
