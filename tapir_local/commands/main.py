"""The command group `tapir-local`, its exit codes, and how errors reach the user."""

import errno
import io
import os
import sys
from contextlib import suppress

import click

from tapir_local import __version__
from tapir_local.commands.calls import calls_group
from tapir_local.commands.distill import distill_command
from tapir_local.commands.evaluate import evaluate_command
from tapir_local.commands.init import init_command
from tapir_local.commands.manage import resume_command, rm_command, ship_command
from tapir_local.commands.models import export_command, generate_command
from tapir_local.commands.report import report_command
from tapir_local.commands.runs import (
    compare_command,
    plan_command,
    redo_stages_command,
    runs_command,
    show_command,
    status_command,
    why_command,
)
from tapir_local.commands.start import doctor_command, recipes_command
from tapir_local.commands.talk import chat_command, dataset_command, judge_check_command, serve_command
from tapir_local.errors import TapirError
from tapir_local.interrupts import stop_exit_code, stop_on_signals
from tapir_local.terminal.guesses import CommandGroup, completion_command, plain_words, sharpen_hint
from tapir_local.terminal.output import echo, silence_output

EXIT_CODES_HELP = """\b
Exit codes:
  0    done
  1    an error; the message says how to fix it
  2    no such command or option
  130  stopped with Ctrl-C; run the same command again to resume
  143  stopped by SIGTERM, and 129 by SIGHUP; the same applies"""


@click.group(cls=CommandGroup, epilog=EXIT_CODES_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="tapir-local")
def cli() -> None:
    """Distill a teacher LLM into a small student with TAPIR, on this machine.

    Without a recipe, `distill` runs the quickstart. Its teacher is a small program, not an LLM, so it needs no API
    key, no GPU and no download.
    """


for command in (
    calls_group,
    chat_command,
    compare_command,
    completion_command,
    dataset_command,
    distill_command,
    doctor_command,
    evaluate_command,
    export_command,
    generate_command,
    init_command,
    judge_check_command,
    plan_command,
    recipes_command,
    redo_stages_command,
    resume_command,
    rm_command,
    report_command,
    runs_command,
    ship_command,
    serve_command,
    show_command,
    status_command,
    why_command,
):
    cli.add_command(command)


def check_system(system: str) -> None:
    """TapirError on a system (`sys.platform`) other than Linux: the store's locks exist only there."""
    if system != "linux":
        fix = "Use a machine with Linux; on Windows, use WSL 2."
        raise TapirError(f"tapir-local runs on Linux only, and this is {system}", fix=fix)


def show_os_error(error: OSError) -> None:
    """Print what the system says of a file, or of the output if the error names none."""
    silence_output()
    if error.errno == errno.EPIPE:  # the reader of a pipe, such as `head`, has seen enough
        return
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "output"
    with suppress(OSError):
        echo(f"error: {place}: {error.strerror or error}", err=True)


def main() -> None:
    """Run the console script. An error that the user can fix is printed without a traceback."""
    try:
        check_system(sys.platform)
        stop_on_signals()
        cli.main(standalone_mode=False)
    except TapirError as error:
        click.secho("error: ", err=True, nl=False, fg="red", bold=True)
        echo(str(error), err=True)
        sys.exit(1)
    except OSError as error:  # of a file, a folder or the output; what is wrong with it is not in this program
        show_os_error(error)
        sys.exit(1)
    except click.ClickException as error:
        if isinstance(error, click.exceptions.NoSuchOption):
            sharpen_hint(error)
        plain_words(error)
        message = io.StringIO()
        error.show(message)
        echo(message.getvalue(), err=True, nl=False)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as stopped:
        echo("\nstopped; run the same command again to resume. Every answer that arrived is kept", err=True)
        for note in getattr(stopped.__cause__ or stopped, "__notes__", ()):
            echo(note, err=True)
        sys.exit(stop_exit_code())
