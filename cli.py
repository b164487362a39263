"""`python cli.py` in a checkout: the program's commands, which are in tapir_local.commands."""

from tapir_local.commands import cli, main, show
from tapir_local.distill_cli import carry_out, distill, load_recipe

__all__ = ["carry_out", "cli", "distill", "load_recipe", "main", "show"]

if __name__ == "__main__":
    main()
