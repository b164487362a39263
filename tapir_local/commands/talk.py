"""Commands that use a student and its rows: `chat`, `serve`, `dataset` and `judge-check`."""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tapir_local.terminal.options import (
    HomePath,
    cache_argument,
    cache_option,
    help_examples,
    json_option,
    program_name,
    select_run,
)
from tapir_local.terminal.output import echo, print_json, print_table

if TYPE_CHECKING:
    from tapir_local.talk.models import ModelFinder, ModelSource


@click.command(
    name="chat",
    epilog=help_examples(
        "tapir-local chat quickstart",
        'tapir-local chat quickstart --prompt "What is 12 + 7?" --vs base',
        "tapir-local chat quickstart --vs other-run",
        "tapir-local chat student.gguf",
    ),
)
@click.argument("model", required=False, metavar="[RUN|GGUF]")
@click.option(
    "--round",
    "number",
    type=click.IntRange(min=0),
    help="Round whose student answers; by default the one in model/ or, before the run is done, the last one.",
)
@click.option("--prompt", help="Answer this prompt and exit.")
@click.option("--system", default="", help="System prompt of the conversation.")
@click.option(
    "--vs",
    metavar="base|RUN|GGUF",
    help="Show the answers of another model too: the untrained student (`base`), another run's student, or a GGUF.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Sampling temperature; 0 always takes the most likely token.",
    show_default=True,
)
@click.option("--random-seed", type=click.IntRange(min=0), help="Seed of sampling: the same seed, the same replies.")
@cache_option
def chat_command(
    model: str | None,
    number: int | None,
    prompt: str | None,
    system: str,
    vs: str | None,
    temperature: float,
    random_seed: int | None,
    cache: Path | None,
) -> None:
    """Talk to the student of RUN, or to any GGUF.

    Type a question and press Enter. /help lists the commands, such as /system, /vs and /round; /bye ends the chat.
    Ctrl-C stops an answer.
    """
    import secrets

    from tapir_local.talk.conversation import Chat, answer_once, open_chat_models

    accept_any_bytes()
    finder, source = find_model(cache, model, number)
    sources = [source, *([finder.find(vs)] if vs else [])]
    seed = secrets.randbits(31) if random_seed is None else random_seed
    with open_chat_models(sources, seed) as models:
        chat = Chat(models, temperature, lambda text: echo(text, nl=False), finder, seed)
        if system:
            chat.set_system(system)
        if prompt is not None:
            answer_once(models, prompt, temperature, chat.write)
        else:
            chat.loop(LineReader("Type /bye or press Ctrl-C again to end the chat."))


def find_model(cache: Path | None, name: str | None, number: int | None) -> tuple["ModelFinder", "ModelSource"]:
    """What finds models, and the one that a command names: a run's student (of a round), or a GGUF."""
    from tapir_local.errors import TapirError
    from tapir_local.resources import default_cache
    from tapir_local.talk.models import ModelFinder, gguf_file_source, is_gguf_name, student_source

    def tell(text: str) -> None:
        echo(text, err=True)

    if name is not None and is_gguf_name(name):
        if number is not None:
            raise click.UsageError("--round is for runs; a GGUF has no rounds")
        return ModelFinder(cache or default_cache(), None, tell), gguf_file_source(name)
    if name is not None and any(letter.isspace() for letter in name):
        fix = "To ask the last run's student one question: tapir-local chat --prompt TEXT"
        raise TapirError(f"{name!r} is not the name of a run", fix=fix)
    run = select_run(cache, name)
    return ModelFinder(run.cache, run, tell), student_source(run, number)


def accept_any_bytes() -> None:
    """From now on bytes on the standard input that are not UTF-8 become lone surrogates, and are no error."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


class LineReader:
    """Reads lines from the terminal. Ctrl-C there ends the input; with a `hint` only the second one in a row does."""

    def __init__(self, hint: str = "") -> None:
        self.interrupted, self.hint = False, hint

    def __call__(self) -> str | None:
        """A line; None at the end of the input."""
        from tapir_local.interrupts import RECEIVED

        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            if RECEIVED or not sys.stdin.isatty():  # SIGTERM or SIGHUP, or a script
                raise
            echo(f"\n{self.hint}", err=True)
            again, self.interrupted = self.interrupted or not self.hint, True
            return None if again else ""
        self.interrupted = False
        return line


@click.command(
    name="serve",
    epilog=help_examples(
        "tapir-local serve quickstart", "tapir-local serve quickstart --round 2 --port 9000", "tapir-local serve x.gguf"
    ),
)
@click.argument("model", required=False, metavar="[RUN|GGUF]")
@click.option(
    "--round",
    "number",
    type=click.IntRange(min=0),
    help="Round to serve; by default the one in model/ or, before the run is done, the last one.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True, help="Port to listen at.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 is every network.")
@click.option(
    "--context", type=click.IntRange(min=32), help="Maximum tokens of a conversation.  [default: student.max_length]"
)
@cache_option
def serve_command(
    model: str | None, number: int | None, port: int, host: str, context: int | None, cache: Path | None
) -> None:
    """Serve the student of RUN, or any GGUF, over HTTP.

    Starts llama.cpp's server, which speaks the OpenAI API, and prints its base_url and a curl command. Uses
    `llama-server` if it is on PATH, else llama-cpp-python's server. Ctrl-C stops it.
    """
    from dataclasses import replace

    from tapir_local.interrupts import RECEIVED
    from tapir_local.talk.serve import ServerConfig, open_server, serve_until_stopped, usage_lines

    _, source = find_model(cache, model, number)
    if context is not None:
        source = replace(source, context=context)
    config = ServerConfig(host, port)
    if not config.is_loopback:
        warning = f"WARNING: {host} is not loopback: whoever reaches this machine can use the model; there is no key"
        echo(warning, err=True)
    echo(f"starting the server of {source.name} …", err=True)
    with open_server(source, config) as child:
        try:
            echo("\n".join(usage_lines(source, config)))
            serve_until_stopped(child)
        except KeyboardInterrupt:
            if RECEIVED:  # SIGTERM or SIGHUP, which have exit codes of their own
                raise
            echo("\nstopped", err=True)


@click.command(
    name="dataset",
    epilog=help_examples(
        "tapir-local dataset quickstart rows.jsonl",
        "tapir-local dataset quickstart rows.parquet --round 2 --format alpaca",
        "tapir-local dataset quickstart pairs.jsonl --preferences",
    ),
)
@click.argument("run")
@click.argument("out", type=HomePath())
@click.option(
    "--round", "number", type=click.IntRange(min=0), help="Rows of this round only; by default of all rounds."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["messages", "prompt-completion", "alpaca", "sharegpt"]),
    default="messages",
    show_default=True,
    help="Format of the rows.",
)
@click.option(
    "--preferences",
    is_flag=True,
    help="Write preference pairs for DPO instead: both answers to each row on which the teacher's scored far higher.",
)
@click.option(
    "--margin",
    type=click.FloatRange(0, 9),
    help="The scores of a pair differ by more than this, in each order.  [default: curriculum.mfd_threshold]",
)
@click.option("--force", is_flag=True, help="Replace OUT and its card if they exist.")
@cache_option
def dataset_command(
    run: str,
    out: Path,
    number: int | None,
    form: str,
    preferences: bool,
    margin: float | None,
    force: bool,
    cache: Path | None,
) -> None:
    """Write the distilled rows of RUN to a file.

    OUT is JSON lines, or Parquet if it ends in .parquet. A card next to it, OUT.card.md, says where the rows come from:
    teacher, tasks, licenses and the file's SHA-256. `distill --seeds OUT` reads it, and so does TRL.
    """
    from tapir_local.talk.dataset_file import DatasetConfig, write_dataset

    if margin is not None and not preferences:
        raise click.UsageError("--margin is for --preferences")
    if preferences and form != "messages":
        raise click.UsageError("--preferences has one format: prompt, chosen and rejected, as messages")
    found = write_dataset(select_run(cache, run), out, DatasetConfig(form, number, preferences, margin, force))
    for note in found.notes:
        echo(note, err=True)
    echo(f"{found.rows:,} {'pairs' if preferences else 'rows'}; the card is {found.card}", err=True)
    echo(f"{found.sha256}  {out}")


@click.command(
    name="judge-check",
    epilog=help_examples("tapir-local judge-check quickstart", "tapir-local judge-check quickstart --json"),
)
@click.argument("run")
@click.option("--round", "number", type=click.IntRange(min=0), help="Round to check; by default the last judged one.")
@click.option("--rows", type=click.IntRange(min=1), default=50, show_default=True, help="Number of rows to show.")
@cache_option
@json_option
def judge_check_command(run: str, number: int | None, rows: int, cache: Path | None, as_json: bool) -> None:
    """Judge answers yourself, and compare with the judge of RUN.

    Shows held-out instructions, each with the student's and the teacher's answer in random order, and asks which is
    better. Then shows how far the judge agrees with you, and how many rows you need. Verdicts are kept in the run's
    folder; the same command goes on where you stopped. --json asks nothing and prints the result.
    """
    from tapir_local.report.person import check_report, check_table, open_judge_check
    from tapir_local.talk.judge_check import ask_verdicts

    accept_any_bytes()
    check = open_judge_check(select_run(cache, run), number)
    if not as_json:
        ask_verdicts(check, rows, LineReader(), lambda text: echo(text, err=True))
    found = check_report(check, rows)
    if as_json:
        print_json(found)
    else:
        print_table(check_table(found))
        if found["left"]:
            echo(f"Go on with: {program_name()} judge-check {check.run.name}{cache_argument(cache)}", err=True)
