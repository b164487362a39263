"""The end of a run: model/, with one whole GGUF, its gate's report, a Modelfile, a card and checksums."""

from pathlib import Path

from tapir_local.memory import size
from tapir_local.pipeline.context import Stage, Work
from tapir_local.pipeline.ship import model_card, model_settings, published_recipe
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import parse_recipe
from tapir_local.rundir import RunDir, sha256, whole

CHECKSUMS_FILE = "SHA256SUMS"


def ship_stage(work: Work, out: Path) -> str:
    """The last round's student with all that goes along with it, whole or absent."""
    with whole(out) as partial:
        partial.mkdir()
        work.tools.ship(work.run.round(work.recipe.rounds), partial, work.progress)
        (partial / "recipe.yaml").write_text(published_recipe(work.recipe), encoding="utf-8")
        (partial / "README.md").write_text(model_card(work.run, work.recipe, partial), encoding="utf-8")
        (partial / CHECKSUMS_FILE).write_text(checksum_lines(sorted(partial.iterdir())), encoding="utf-8")
    return f"{out}: student.gguf, {size((out / 'student.gguf').stat().st_size)}, with Modelfile and card"


def checksum_lines(files: list[Path]) -> str:
    """Lines for `sha256sum -c`."""
    return "".join(f"{sha256(path)}  {path.name}\n" for path in files)


def is_model_stale(run: RunDir, recipe: Recipe) -> bool:
    """Whether model/ is there and was made by other settings: of another number of rounds, or with another card.

    Settings that it does not depend on, such as the budget, leave it as it is.
    """
    path = run.path / SHIP_STAGE.output / "recipe.yaml"
    return path.exists() and model_settings(
        parse_recipe(path.read_text(encoding="utf-8"), str(path), kept=True)
    ) != model_settings(recipe)


SHIP_STAGE = Stage("ship", "model", ship_stage)
