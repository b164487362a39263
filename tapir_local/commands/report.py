"""The command `report`: runs as one HTML file."""

from pathlib import Path

import click

from tapir_local.terminal.options import HomePath, cache_option, help_examples, select_run
from tapir_local.terminal.output import echo


@click.command(
    name="report",
    epilog=help_examples("tapir-local report quickstart", "tapir-local report tapir uniform -o comparison.html"),
)
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option(
    "-o",
    "--output",
    "out",
    type=HomePath(),
    help="HTML file to write.  [default: report.html in the folder of RUN, or report-compared.html for several runs]",
)
@click.option("--force", is_flag=True, help="Overwrite a file that is not a report.")
@cache_option
def report_command(runs: tuple[str, ...], out: Path | None, force: bool, cache: Path | None) -> None:
    """Write the results of RUN as an HTML page.

    The page has charts, every answer to the holdout, the new rows, costs and checks. It is one file that loads nothing
    from the network. Several runs are compared with the first one. Without RUN, the run that was worked on last is
    taken. The page contains the texts of your rows: share it only with people who may read them.
    """
    from tapir_local.memory import format_bytes
    from tapir_local.page.build import default_output, write_page

    places = [select_run(cache, name) for name in runs] or [select_run(cache, None)]
    path = out or default_output(places)
    size = write_page(places, path, force=force)
    echo(f"{path}: {format_bytes(size)}")
