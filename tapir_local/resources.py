"""Where the files are that come with the program: recipes, and the pocket student and seeds."""

import difflib
import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.files import expand_home

PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parent
POCKET_STUDENT = PACKAGE / "assets" / "pocket_student"
CHAT_TEMPLATES = PACKAGE / "assets" / "chat_templates"
POCKET_SEEDS = PACKAGE / "assets" / "pocket_seeds.json"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Of a model on the Hub: weights, config, tokenizer and template as transformers reads them. Folders, such as original/
# and onnx/, and Mistral's consolidated.safetensors hold the same weights again.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
HUB_FILES_IGNORED = ["*/*", "consolidated*"]
SEED_FILE_SUFFIXES = frozenset(
    {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst"}
)


def recipes_folder() -> Path:
    """Beside the package in a checkout, within it in an installed wheel."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else CHECKOUT / "recipes"


def recipe_files() -> list[Path]:
    """The recipes that come with the program."""
    return sorted(recipes_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A file as given, or one that comes with the program by its path, its file's name or its stem.

    TapirError where there is none, with files of a like name, and those that come with the program.
    """
    given = Path(expand_home(name) or "")
    with suppress(OSError, ValueError):  # a name that is too long, or holds a NUL
        if given.exists() and not given.is_dir():
            return given
    for path in recipe_files():
        if name in (path.stem, path.name, f"recipes/{path.name}"):
            return path
    if name and is_folder(given):
        kept = given / "recipe.yaml"
        fix = f"Name the recipe in it: {kept}" if kept.is_file() else "Name a YAML file."
        raise TapirError("this is a folder, not a recipe", where=name, fix=fix)
    known = ", ".join(path.stem for path in recipe_files())
    like = similar_recipes(given)
    meant = f"Did you mean {' or '.join(like)}? " if like else ""
    raise TapirError(
        "there is no such recipe",
        where=name,
        fix=f"{meant}Name a YAML file, or one of those that come with the program: {known}.",
    )


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; a name that is too long is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def similar_recipes(missing: Path) -> list[str]:
    """YAML files beside a path that is not there, and recipes that come with the program, with names like it."""
    try:
        beside = [path for path in missing.parent.iterdir() if path.suffix in (".yaml", ".yml") and path.is_file()]
    except OSError:
        beside = []
    named = {path.name: str(path) for path in beside} | {path.stem: path.stem for path in recipe_files()}
    same = [str(path) for path in beside if path.stem == missing.stem]
    return sorted(same) or [named[name] for name in difflib.get_close_matches(missing.name, named, 2)]


def read_recipe_text(path: Path) -> str:
    """A recipe's text; TapirError where it cannot be read, or is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TapirError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        perhaps = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise TapirError(
            f"not UTF-8: byte 0x{data[error.start]:02x}",
            where=f"{path}, line {data.count(10, 0, error.start) + 1}",
            fix=f"Save it as UTF-8; if it is {perhaps}: iconv -f {perhaps} -t UTF-8 {path.name}",
        ) from error


def default_cache() -> Path:
    """TAPIR_LOCAL_CACHE; else `cache` in the checkout that the program runs from; else in the current folder."""
    named = os.environ.get("TAPIR_LOCAL_CACHE")
    if named:
        return Path(expand_home(named) or "")
    return (CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()) / "cache"


def find_model_folder(named: str, revision: str | None = None) -> Path:
    """A recipe's student.path as a folder: `pocket`, a folder, or a Hub name, looked up in its cache or downloaded.

    `revision` is a branch, tag or commit of a Hub name. TapirError where it is none of these, or the Hub cannot be
    reached.
    """
    if named != "pocket" and not Path(named).is_dir():
        return download_model(named, revision)
    if revision is not None:
        what = f"student.revision ({revision}) is for a model on the Hub, and this one is a folder"
        raise TapirError(what, where=named, fix="Leave student.revision out.")
    return POCKET_STUDENT if named == "pocket" else Path(named)


def download_model(named: str, revision: str | None, *, complete: bool = False) -> Path:
    """The folder of a model in the Hub's cache, named by its commit; what is missing is downloaded.

    `complete` says that an earlier call has downloaded this revision, so that nobody is asked while it is there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    download = partial(
        snapshot_download, named, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_IGNORED
    )
    if complete:
        with suppress(LocalEntryNotFoundError):
            return Path(download(local_files_only=True))
    try:
        return Path(download())
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at student.revision {revision}" if revision else ""
        raise TapirError(
            f"there is no such folder, and the Hub has no such model{at} or cannot be reached",
            where=named,
            fix="Download the model where there is a network and name its folder in student.path.",
        ) from error


def read_chat_template(named: str) -> str:
    """The text of a recipe's student.chat_template; TapirError where there is no such file."""
    known = sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja"))
    path = CHAT_TEMPLATES / f"{named}.jinja" if named in known else Path(expand_home(named) or "")
    if not path.is_file():
        raise TapirError(
            "there is no such chat template",
            where=named,
            fix=f"Name a Jinja file in student.chat_template, or one that comes with the program: {', '.join(known)}.",
        )
    return path.read_text(encoding="utf-8")


def find_seeds(named: str) -> Path | None:
    """A recipe's seeds.path as a file or a folder, `pocket` resolved; None where it can only be a name on the Hub.

    TapirError where it is none of these.
    """
    path = POCKET_SEEDS if named == "pocket" else Path(named)
    if path.exists():
        return path
    if HUB_NAME.fullmatch(named) and path.suffix.lower() not in SEED_FILE_SUFFIXES:
        return None
    raise TapirError(
        "there is no such file of seeds",
        where=str(path),
        fix="Name a file or a dataset's folder with --seeds; a dataset on the Hub with --set seeds.path=OWNER/NAME.",
    )
