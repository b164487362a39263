"""The help texts: whole at 80 columns, and as the page docs/commands.md."""

import re

import click
import pytest
from click.testing import CliRunner

from tapir_local.commands.calls import calls_group
from tapir_local.commands.main import cli
from tapir_local.commands.reference import commands_markdown
from tapir_local.resources import POCKET_SEEDS


@pytest.mark.parametrize("group", [cli, calls_group], ids=["tapir-local", "calls"])
def test_the_list_of_commands_is_not_cut_at_80_columns(group: click.Group) -> None:
    text = CliRunner().invoke(group, ["--help"], terminal_width=80).output
    assert "..." not in text.partition("Commands:")[2]


def test_the_page_has_every_command_with_its_options_and_examples() -> None:
    page = commands_markdown()
    for name, command in {**cli.commands, **{f"calls {name}": it for name, it in calls_group.commands.items()}}.items():
        section = page.partition(f"# `tapir-local {name}`\n")[2].partition("\n## ")[0]
        assert f"tapir-local {name} [OPTIONS]" in section
        assert "Example:" in section
        for option in command.params:
            if isinstance(option, click.Option):
                assert f"| `{option.opts[-1]}" in section or option.opts[0] in section
                assert option.help


def test_defaults_and_bars_stand_in_the_table() -> None:
    page = commands_markdown()
    assert "[default: 20; x&gt;=1]" in page or "[default: 20; x>=1]" in page
    assert r"`--parallel 1-255\|auto`" in page


def test_the_row_of_the_examples_of_why_exists() -> None:
    """Its words are those of one row of the quickstart's seeds."""
    epilog = cli.commands["why"].epilog or ""
    (words,) = re.findall(r'"(.+)"', epilog)
    assert POCKET_SEEDS.read_text(encoding="utf-8").count(words) == 1
    assert "seed-00017" in epilog
