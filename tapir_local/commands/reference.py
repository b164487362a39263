"""Write the help of all commands as one page of Markdown."""

from collections.abc import Iterator

import click

from tapir_local.commands.main import cli
from tapir_local.terminal.options import FOR_EVERY_MACHINE

PAGE_HEAD = """# Commands

This page is generated from the help texts of the program. `tapir-local COMMAND --help` prints the same.
"""


def commands_markdown() -> str:
    """Every command with its usage, options, defaults and examples, as docs/commands.md has it."""
    with click.Context(cli, info_name="tapir-local") as context:
        context.meta[FOR_EVERY_MACHINE] = True
        return "\n".join([PAGE_HEAD, *command_sections(cli, context)])


def command_sections(command: click.Command, context: click.Context) -> Iterator[str]:
    """The section of a command and, for a group, those of its commands."""
    level = "##" if context.parent is None or context.parent.parent is None else "###"
    yield f"{level} `{context.command_path}`\n"
    yield f"{help_paragraphs(command)}\n"
    yield f"```\n{context.command_path} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    if options := options_table(command, context):
        yield f"{options}\n"
    if command.epilog:
        yield f"{epilog_block(command.epilog)}\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            if found := command.get_command(context, name):
                yield from command_sections(found, click.Context(found, info_name=name, parent=context))


def help_paragraphs(command: click.Command) -> str:
    """The help text of a command, a line for each paragraph."""
    paragraphs = (command.help or "").split("\n\n")
    return escape_markdown("\n\n".join(" ".join(text.split()) for text in paragraphs))


def options_table(command: click.Command, context: click.Context) -> str:
    """A table of the options and what they mean, with their defaults in brackets; "" if there are none but --help."""
    records = [
        record
        for option in command.get_params(context)
        if isinstance(option, click.Option)
        and "--help" not in option.opts
        and (record := option.get_help_record(context))
    ]
    rows = [f"| `{name.replace('|', chr(92) + '|')}` | {escape_markdown(text)} |" for name, text in records]
    return "\n".join(["| option | meaning |", "|---|---|", *rows]) if rows else ""


def epilog_block(epilog: str) -> str:
    """The examples or the exit codes after a help text, as a block of code under their title."""
    title, *lines = epilog.removeprefix("\b\n").splitlines()
    return "\n".join([title, "", "```", *(line.removeprefix("  ") for line in lines), "```"])


def escape_markdown(text: str) -> str:
    """A text in which Markdown shows `*`, `<` and `|` as they are; code in backticks stays as it is."""
    pieces = text.split("`")
    return "`".join(
        piece if place % 2 else piece.replace("*", r"\*").replace("<", "&lt;").replace("|", r"\|")
        for place, piece in enumerate(pieces)
    )
