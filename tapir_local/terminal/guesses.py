"""The group of all commands: its help in the order of the work, and hints for names from other programs."""

from difflib import SequenceMatcher
from typing import Any

import click

from tapir_local.terminal.output import echo

# Commands by what they are for, in the order in which they are needed.
SECTIONS = {
    "Make a student": ("init", "recipes", "doctor", "distill", "resume", "redo"),
    "Look at runs": ("runs", "status", "show", "why", "plan", "compare", "report", "judge-check", "rm"),
    "Use the student": ("ship", "chat", "serve", "evaluate", "generate", "export", "dataset"),
    "Other": ("calls", "completion"),
}
# What people type who know other programs, and what does it here.
COMMAND_HINTS = {
    **dict.fromkeys(("train", "run", "start"), "`tapir-local distill RECIPE` runs a recipe"),
    "continue": "`tapir-local resume RUN` resumes a run",
    **dict.fromkeys(("ls", "list"), "`tapir-local runs` lists the runs, `tapir-local calls list` the calls"),
    **dict.fromkeys(("delete", "remove"), "`tapir-local rm RUN` deletes a run, `tapir-local redo` stages of a run"),
    **dict.fromkeys(
        ("test", "results"),
        "`tapir-local status RUN` shows the results of every round, `show` one round, `compare` several runs",
    ),
    **dict.fromkeys(("eval", "benchmark"), "`tapir-local evaluate RUN FILE` evaluates a student on questions of yours"),
    **dict.fromkeys(("server", "api"), "`tapir-local serve RUN` serves the student over HTTP, as OpenAI does"),
    "rows": "`tapir-local dataset RUN OUT` writes the distilled rows to a file",
    **dict.fromkeys(
        ("dpo", "preferences"),
        "`tapir-local dataset RUN OUT --preferences` writes preference pairs to a file, "
        "`--set train.preference=dpo` trains on them",
    ),
    **dict.fromkeys(("new", "create"), "`tapir-local init my.yaml` writes a recipe for your seeds"),
    **dict.fromkeys(("ask", "talk", "prompt"), "`tapir-local chat RUN --prompt TEXT` asks the student"),
    **dict.fromkeys(("cost", "costs", "money"), "`tapir-local calls cost` shows what was paid"),
    **dict.fromkeys(("settings", "config"), "`tapir-local recipes --settings` lists all settings"),
    **dict.fromkeys(("check", "env", "info"), "`tapir-local doctor` checks this machine"),
    "help": "`tapir-local --help` and `tapir-local COMMAND --help` explain everything",
    "version": "`tapir-local --version` prints the version",
}
OPTION_HINTS = {
    "--json": "Put --json after the command: `tapir-local status --json`",
    "--teacher": "That is `--set teacher.model=NAME`",
    "--model": "That is `--set teacher.model=NAME`, or `--set student.path=FOLDER` for the student",
    "--student": "That is `--set student.path=FOLDER`",
    "--epochs": "That is `--set train.epochs=N`",
    "--learning-rate": "That is `--set train.learning_rate=X`",
    "--lr": "That is `--set train.learning_rate=X`",
    "--seed": "That is `--random-seed N`",
    "--output": "The student goes to model/ in the folder of the run, below --cache",
    "--budget": "That is `--set budget.money=X`",
    "--show-completion": "`tapir-local completion bash` prints the script",
    "--install-completion": "`tapir-local completion bash` prints the script",
}
LEAST_LIKENESS = 0.75  # of an option's name to a guess; below it, a suggestion is more silly than helpful


class CommandGroup(click.Group):
    """A group that lists its commands by purpose and explains commands that it does not have."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the work, then any others."""
        ordered = [name for names in SECTIONS.values() for name in names if name in self.commands]
        return [*ordered, *sorted(self.commands.keys() - set(ordered))]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in sections, each with its whole first sentence."""
        width = max(map(len, self.commands))
        for title, names in SECTIONS.items():
            with formatter.section(title):
                found = [(name, self.commands[name]) for name in names if name in self.commands]
                formatter.write_dl([(name.ljust(width), first_sentence(command)) for name, command in found])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that was typed; an error with a hint if there is none."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            hint = COMMAND_HINTS.get(args[0].lower())
            if args[0].endswith((".yaml", ".yml")) or is_recipe_name(args[0]):
                hint = f"To run a recipe: `tapir-local distill {args[0]}`"
            if hint is None:
                raise
            raise click.UsageError(f"No such command {args[0]!r}. {hint}.", ctx) from error


def first_sentence(command: click.Command) -> str:
    """The first sentence of a command's help."""
    return " ".join((command.help or "").split("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def is_recipe_name(name: str) -> bool:
    """Whether a recipe of this name comes with the program."""
    from tapir_local.resources import recipe_files

    return name in {path.stem for path in recipe_files()}


def sharpen_hint(error: click.exceptions.NoSuchOption) -> None:
    """Say what does the work of an option that does not exist; drop suggestions that are not much like it."""
    changed: Any = error
    likely = [name for name in error.possibilities or () if likeness(name, error.option_name) >= LEAST_LIKENESS]
    changed.possibilities = likely
    if not likely and (hint := OPTION_HINTS.get(error.option_name)):
        changed.message = f"{error.message} {hint}."


def plain_words(error: click.ClickException) -> None:
    """Replace Click's names of types in a message: `'three' is not a whole number`."""
    changed: Any = error
    for theirs, ours in (("valid integer range", "whole number"), ("valid float range", "number")):
        changed.message = changed.message.replace(f"is not a {theirs}", f"is not a {ours}")


def likeness(one: str, other: str) -> float:
    """How alike two options are without their dashes, 0 to 1."""
    return SequenceMatcher(None, one.lstrip("-"), other.lstrip("-")).ratio()


@click.command(
    name="completion",
    epilog="\b\nExample:\n  tapir-local completion bash > ~/.local/share/bash-completion/completions/tapir-local",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the script that completes commands and options in SHELL.

    For zsh, write it to a file named _tapir-local in a folder of $fpath; for fish, to
    ~/.config/fish/completions/tapir-local.fish. Or evaluate the output in the file that your shell reads at its start.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"there is no completion for {shell}")
    root = context.find_root().command
    echo(kind(root, {}, "tapir-local", "_TAPIR_LOCAL_COMPLETE").source(), nl=False)
