"""Where the files are that come with the program: recipes, and the pocket student and seeds."""

import os
import re
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.recipe import Recipe
from tapir_local.rundir import RunDir, remove, whole

HERE = Path(__file__).parent
CHECKOUT = HERE.parent
POCKET_STUDENT = HERE / "assets" / "pocket_student"
CHAT_TEMPLATES = HERE / "assets" / "chat_templates"
POCKET_SEEDS = HERE / "assets" / "pocket_seeds.json"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SUFFIXES = frozenset({".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst"})


def recipes_folder() -> Path:
    """Beside the package in a checkout, within it in an installed wheel."""
    installed = HERE / "recipes"
    return installed if installed.is_dir() else CHECKOUT / "recipes"


def recipe_files() -> list[Path]:
    """The recipes that come with the program."""
    return sorted(recipes_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A file as given, or one that comes with the program by its path, its file's name or its stem."""
    given = Path(name)
    if given.is_file():
        return given
    for path in recipe_files():
        if name in (path.stem, path.name, f"recipes/{path.name}"):
            return path
    known = ", ".join(path.stem for path in recipe_files())
    raise TapirError(
        "there is no such recipe",
        where=name,
        fix=f"Name a YAML file, or one of those that come with the program: {known}.",
    )


def default_cache() -> Path:
    """TAPIR_LOCAL_CACHE; else `cache` in the checkout that the program runs from; else in the current folder."""
    named = os.environ.get("TAPIR_LOCAL_CACHE")
    if named:
        return Path(named)
    return (CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()) / "cache"


def model_folder(named: str) -> Path:
    """A recipe's student.path as a folder: `pocket`, a folder, or a Hub name, looked up in its cache or downloaded.

    TapirError where it is none of these, or the Hub cannot be reached.
    """
    if named == "pocket" or Path(named).is_dir():
        return POCKET_STUDENT if named == "pocket" else Path(named)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(named, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TapirError(
            "there is no such folder, and the Hub has no such model or cannot be reached",
            where=named,
            fix="Download the model where there is a network and name its folder in student.path.",
        ) from error


def student_folder(recipe: Recipe, run: RunDir) -> Path:
    """The student as it is trained, exported and compared: its own folder or, with another chat template, a run's view.

    The view is links to the student's files, and the template as it was at the run's first training, so that neither
    a student that others use is changed, nor a run in its midst.
    """
    model = model_folder(recipe.student.path)
    if recipe.student.chat_template is None:
        return model
    view = run.path / "student" / (Path(recipe.student.path).name or "student")
    if not (view.is_dir() and (run.round(0) / "adapter").is_dir()):
        template = chat_template(recipe.student.chat_template)
        remove(view)
        with whole(view) as partial:
            partial.mkdir()
            for file in model.iterdir():
                if file.is_file() and file.name != "chat_template.jinja":
                    (partial / file.name).symlink_to(file.absolute())
            (partial / "chat_template.jinja").write_text(template, encoding="utf-8")
    return view


def chat_template(named: str) -> str:
    """The text of a recipe's student.chat_template; TapirError where there is no such file."""
    known = sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja"))
    path = CHAT_TEMPLATES / f"{named}.jinja" if named in known else Path(named)
    if not path.is_file():
        raise TapirError(
            "there is no such chat template",
            where=named,
            fix=f"Name a Jinja file in student.chat_template, or one that comes with the program: {', '.join(known)}.",
        )
    return path.read_text(encoding="utf-8")


def seeds_path(named: str) -> Path | None:
    """A recipe's seeds.path as a file or a folder, `pocket` resolved; None where it can only be a name on the Hub.

    TapirError where it is none of these.
    """
    path = POCKET_SEEDS if named == "pocket" else Path(named)
    if path.exists():
        return path
    if HUB_NAME.fullmatch(named) and path.suffix.lower() not in SUFFIXES:
        return None
    raise TapirError(
        "there is no such file of seeds",
        where=str(path),
        fix="Name a file or a dataset's folder with --seeds; a dataset on the Hub with --set seeds.path=OWNER/NAME.",
    )
