"""`python cli.py` in a checkout: the program's commands, which are in tapir_local.commands.main."""

from tapir_local.commands.distill import distill_command, load_recipe, run_recipe
from tapir_local.commands.main import cli, main
from tapir_local.commands.runs import show_command

__all__ = ["carry_out", "cli", "distill", "load_recipe", "main", "show"]

if __name__ == "__main__":
    main()
