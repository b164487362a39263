"""Run the program from a checkout: `python cli.py`."""

from tapir_local.commands.main import main

if __name__ == "__main__":
    main()
