"""`python cli.py` in a checkout: the program's commands, which are in tapir_local.commands.main."""

from tapir_local.commands.distill import carry_out, distill, load_recipe
from tapir_local.commands.main import cli, main, show

__all__ = ["carry_out", "cli", "distill", "load_recipe", "main", "show"]

if __name__ == "__main__":
    main()
