"""Recipes that run commands or send keys to other hosts: what they would do, and what the user has agreed to."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tapir_local.errors import TapirError
from tapir_local.files import write_json
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Recipe
from tapir_local.resources import recipes_folder
from tapir_local.teacher.endpoint import is_loopback

USUAL_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Risk:
    """Something that a recipe makes this machine do: the settings that say it, and what it is in words."""

    settings: tuple[str, ...]
    does: str

    @property
    def digest(self) -> str:
        """What an agreement is remembered by: a changed command or host is another one."""
        return hashlib.sha256(f"{self.settings[0]}\0{self.does}".encode()).hexdigest()


def risks(recipe: Recipe) -> list[Risk]:
    """The commands that a recipe runs, and the keys other than OPENAI_API_KEY that it sends to hosts that it names."""
    found = list[Risk]()
    if recipe.train.launcher:
        found.append(Risk(("train.launcher",), f"runs the command: {recipe.train.launcher}"))
    if recipe.export.converter:
        found.append(Risk(("export.converter",), f"runs the Python script or folder: {recipe.export.converter}"))
    return [*found, *keys_sent("teacher", recipe.teacher), *keys_sent("judge", recipe.judge)]


def keys_sent(role: str, endpoint: Endpoint) -> Iterator[Risk]:
    """A key's file, or a variable of another name than the usual one, that goes to a host that the recipe names."""
    base_url = endpoint.base_url
    if getattr(endpoint, "kind", "") != "openai" or not base_url or is_loopback(base_url):
        return
    host = urlsplit(base_url).netloc
    if endpoint.api_key_file:
        settings = (f"{role}.api_key_file", f"{role}.base_url")
        yield Risk(settings, f"sends what the file {endpoint.api_key_file} holds to {host}")
    elif endpoint.api_key_env != USUAL_KEY:
        settings = (f"{role}.api_key_env", f"{role}.base_url")
        yield Risk(settings, f"sends the environment variable {endpoint.api_key_env} to {host}")


def require_trust(
    recipe: Recipe, path: Path, own: Collection[str], cache: Path, agree: Callable[[list[Risk]], bool]
) -> None:
    """TapirError unless the user agrees to what a recipe's file makes this machine do.

    What comes with the program, what the user has typed (`own`, settings given by --set), and what was agreed to before
    in this cache needs no answer. `agree` is asked about the rest; what it takes is remembered in trusted.json.
    """
    found, file = risks(recipe), cache / "trusted.json"
    known = remembered(file)
    new = [risk for risk in found if risk.digest not in known]
    unsure = [risk for risk in new if not named(risk, own)]
    if unsure and path.resolve().parent != recipes_folder().resolve() and not agree(unsure):
        raise TapirError(
            f"this recipe {'; it '.join(risk.does for risk in unsure)}",
            where=str(path),
            fix="If you wrote it or have read it, add --trust: it is remembered until the command or the host changes.",
        )
    if new:
        write_json(file, known | {risk.digest: f"{risk.settings[0]}: {risk.does}" for risk in new})


def named(risk: Risk, own: Collection[str]) -> bool:
    """Whether the user has typed one of a risk's settings, or its section."""
    return any(setting in own or setting.partition(".")[0] in own for setting in risk.settings)


def remembered(file: Path) -> dict[str, str]:
    """What was agreed to, by digest; {} where the file is not there or not readable."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}
