"""Options that several commands share, and the runs and stores that they name."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tapir_local.errors import TapirError

if TYPE_CHECKING:
    from tapir_local.run_dir import RunDir


def help_examples(*commands: str) -> str:
    """The last lines of a help text: commands to copy."""
    return "\b\nExample:\n" + "\n".join(f"  {command}" for command in commands)


# Key in a Click context's meta: the help is for every machine, so it names no folder of this one.
FOR_EVERY_MACHINE = "tapir_local.for_every_machine"


class HomePath(click.Path):
    """A path in which a leading `~` is expanded. Shells do not expand it in `--cache=~/x`."""

    def __init__(self, *, file_okay: bool = True) -> None:
        super().__init__(path_type=Path, file_okay=file_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from tapir_local.files import check_path_text, expand_home

        converted: Any = super().convert((expand_home(value) or "") if isinstance(value, str) else value, param, ctx)
        path = Path(converted)
        check_path_text(path)
        return path


class CacheOption(click.Option):
    """The option --cache, whose help names the folder that is used without it."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Name and help text; in a page of documentation, which is for every machine, without the real folder."""
        from tapir_local.resources import default_cache

        name, text = super().get_help_record(ctx) or ("", "")
        place = "cache" if ctx.meta.get(FOR_EVERY_MACHINE) else relative_to_here(default_cache())
        return name, text.replace("[default: cache]", f"[default: {place}]")


cache_option = click.option(
    "--cache",
    cls=CacheOption,
    type=HomePath(file_okay=False),
    help="Folder that holds the store and the runs.  [default: cache]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def store_path(cache: Path | None) -> Path:
    """The path of the store in a cache folder."""
    from tapir_local.resources import default_cache

    return (cache or default_cache()) / "teacher.db"


def select_run(cache: Path | None, name: str | None) -> "RunDir":
    """The run with this name or, without a name, the run that was worked on last; TapirError if there is none."""
    from tapir_local.resources import default_cache
    from tapir_local.run_dir import find_run, list_runs

    place = cache or default_cache()
    if name is not None:
        return find_run(place, name)
    runs = list_runs(place)
    if not runs:
        fix = "Start one with `tapir-local distill`, or name the folder with its runs with --cache."
        raise TapirError("there is no run yet", where=str(place), fix=fix)
    return max(runs, key=lambda run: (run.path / "run.json").stat().st_mtime)


def cache_argument(cache: Path | None) -> str:
    """The option that a suggested command needs to use the same cache, or an empty string."""
    return f" --cache {shlex.quote(str(cache))}" if cache else ""


def program_name() -> str:
    """How to call this program in a suggested command: `tapir-local` if the shell finds it, else its path."""
    called = Path(sys.argv[0])
    if called.suffix == ".py":
        return shlex.join([relative_to_here(Path(sys.executable)), relative_to_here(called)])
    if called.name != "tapir-local" or not called.exists():
        return "tapir-local"
    found = shutil.which("tapir-local")
    return "tapir-local" if found and Path(found).resolve() == called.resolve() else relative_to_here(called)


def relative_to_here(path: Path) -> str:
    """A path as it is typed in the current folder: relative if it lies inside, else absolute."""
    whole = path.absolute()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(whole)
