"""Write docs/commands.md and docs/settings.md from the code: `make docs`. tests/test_docs.py holds them equal."""

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

SETTINGS = """# Settings of a recipe

This page is generated from the code. `tapir-local recipes --settings` prints the same.

A recipe is a YAML file with these settings. `--set KEY=VALUE` changes one on the command line, for example
`--set curriculum.rows=2000`. An unknown key, a key given twice, or a value of the wrong type is an error.
"""


def commands(group: click.Group, before: str = "tapir-local") -> Iterator[tuple[str, click.Command]]:
    """Every command with its whole name."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, f"{before} {name}")
        else:
            yield f"{before} {name}", command


def setting_paths() -> set[str]:
    """Every setting and every section of a recipe."""
    from tapir_local.recipe.settings import section_meanings, setting_rows

    return {*section_meanings(), *(row.setting for row in setting_rows())}


def cell(text: str) -> str:
    """A text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def settings_page() -> str:
    """The whole of docs/settings.md."""
    from tapir_local.recipe.settings import section_meanings, setting_rows

    about, parts = section_meanings(), [SETTINGS]
    rows = sorted(setting_rows(), key=lambda row: list(about).index(row.section))
    for section, group in groupby(rows, key=lambda row: row.section):
        parts.append(f"## {section or 'The recipe itself'}\n\n{about[section]}\n")
        parts += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for row in group:
            default = f"`{row.default_text}`" if row.default_text else ""
            parts.append(f"| `{row.setting}` | {cell(row.type)} | {cell(default)} | {cell(row.meaning)} |")
        parts.append("")
    return "\n".join(parts)


def pages() -> dict[Path, str]:
    """Every generated page with its text."""
    from tapir_local.commands.reference import commands_markdown

    return {HERE / "commands.md": commands_markdown().rstrip() + "\n", HERE / "settings.md": settings_page()}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
        print(page.relative_to(HERE.parent))
