"""What of a recipe may leave the maker's machine: names of models and files, no folders and no passwords."""

import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.settings import path_settings
from tapir_local.recipe.text import fixed_settings
from tapir_local.recipe.yaml import write_yaml
from tapir_local.resources import HUB_NAME

SHOWN = ("rounds", "about", "card")  # settings that may change in mid-run and that a model's card shows


def on_the_hub(path: str) -> bool:
    """Whether a model or data set is named as on the Hub and is no file or folder here."""
    return bool(HUB_NAME.fullmatch(path)) and not Path(path).exists()


def public_name(path: str) -> str:
    """The last part of a path; a name on the Hub as it is."""
    return path if on_the_hub(path) else last_part(path)


def last_part(path: str) -> str:
    """`qwen` of `/models/qwen/`."""
    return Path(path).name or path


def public_url(url: str) -> str:
    """A URL without a user's name, a password and what follows `?`, which may hold a key."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def public_command(line: str) -> str:
    """A command whose words name no folder of this machine."""
    try:
        words = shlex.split(line)
    except ValueError:
        words = line.split()
    return shlex.join(last_part(word) if word.startswith(("/", "~")) else word for word in words)


def published(recipe: Recipe) -> str:
    """The recipe as YAML with every setting written out, for those who get the model."""
    value = recipe.model_dump(mode="json")
    for section, name in path_settings():
        if value[section][name]:
            value[section][name] = public_name(value[section][name])
    for role in ("teacher", "judge"):
        if value[role]["base_url"]:
            value[role]["base_url"] = public_url(value[role]["base_url"])
    if recipe.train.launcher:
        value["train"]["launcher"] = public_command(recipe.train.launcher)
    return write_yaml(value)


def shown(recipe: Recipe) -> dict[str, Any]:
    """What a model/ is made of or says: it is to be made again only where this differs. Paths count by their names."""
    value = fixed_settings(recipe) | {name: recipe.model_dump(mode="json")[name] for name in SHOWN}
    for section, name in path_settings():
        if value[section].get(name):
            value[section][name] = last_part(value[section][name])
    for role in ("teacher", "judge"):
        if value[role].get("base_url"):
            value[role]["base_url"] = public_url(value[role]["base_url"])
    return value
