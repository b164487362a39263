"""The end of a run: model/, with one whole GGUF, its gate's report, a Modelfile, a card and checksums."""

from pathlib import Path

from tapir_local.files import atomic_write, file_sha256
from tapir_local.memory import format_bytes
from tapir_local.pipeline.card import card
from tapir_local.pipeline.context import Stage, Work
from tapir_local.pipeline.published import published, shown
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import parse_recipe
from tapir_local.run_dir import RunDir

SUMS = "SHA256SUMS"


def ship(work: Work, out: Path) -> str:
    """The last round's student with all that goes along with it, whole or absent."""
    with atomic_write(out) as partial:
        partial.mkdir()
        work.tools.ship(work.run.round(work.recipe.rounds), partial, work.progress)
        (partial / "recipe.yaml").write_text(published(work.recipe), encoding="utf-8")
        (partial / "README.md").write_text(card(work.run, work.recipe, partial), encoding="utf-8")
        (partial / SUMS).write_text(sums(sorted(partial.iterdir())), encoding="utf-8")
    return f"{out}: student.gguf, {format_bytes((out / 'student.gguf').stat().st_size)}, with Modelfile and card"


def sums(files: list[Path]) -> str:
    """Lines for `sha256sum -c`."""
    return "".join(f"{file_sha256(path)}  {path.name}\n" for path in files)


def stale(run: RunDir, recipe: Recipe) -> bool:
    """Whether model/ is there and was made by other settings: of another number of rounds, or with another card.

    Settings that it does not depend on, such as the budget, leave it as it is.
    """
    path = run.path / SHIP.output / "recipe.yaml"
    return path.exists() and shown(parse_recipe(path.read_text(encoding="utf-8"), str(path), kept=True)) != shown(
        recipe
    )


SHIP = Stage("ship", "model", ship)
