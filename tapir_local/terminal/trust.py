"""Ask the user before a recipe runs commands or sends keys to other hosts, and remember the answers."""

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import click

from tapir_local.errors import TapirError
from tapir_local.files import write_json
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Recipe
from tapir_local.resources import recipes_folder
from tapir_local.teacher.endpoint import is_loopback
from tapir_local.terminal.output import echo

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Risk:
    """Something that a recipe makes this machine do: the settings that cause it, and a description."""

    settings: tuple[str, ...]
    does: str

    @property
    def digest(self) -> str:
        """The key under which a permission is stored.

        It covers the words of `does`: changing them asks every user again.
        """
        return hashlib.sha256(f"{self.settings[0]}\0{self.does}".encode()).hexdigest()


def find_risks(recipe: Recipe) -> list[Risk]:
    """The commands that a recipe runs, and what it sends: other keys than OPENAI_API_KEY, losses to wandb."""
    risks = list[Risk]()
    if recipe.train.launcher:
        risks.append(Risk(("train.launcher",), f"runs the command: {recipe.train.launcher}"))
    if recipe.export.converter:
        risks.append(Risk(("export.converter",), f"runs the Python script or folder: {recipe.export.converter}"))
    if recipe.train.report_to == "wandb":
        risks.append(Risk(("train.report_to",), "sends the loss and the settings of each training to wandb's server"))
    return [*risks, *key_risks("teacher", recipe.teacher), *key_risks("judge", recipe.judge)]


def key_risks(role: str, endpoint: Endpoint) -> Iterator[Risk]:
    """A key file, or an environment variable other than the default one, that is sent to a host of the recipe."""
    base_url = endpoint.base_url
    if getattr(endpoint, "kind", "") != "openai" or not base_url or is_loopback(base_url):
        return
    host = urlsplit(base_url).netloc
    if endpoint.api_key_file:
        settings = (f"{role}.api_key_file", f"{role}.base_url")
        yield Risk(settings, f"sends what the file {endpoint.api_key_file} holds to {host}")
    elif endpoint.api_key_env != DEFAULT_KEY_VARIABLE:
        settings = (f"{role}.api_key_env", f"{role}.base_url")
        yield Risk(settings, f"sends the environment variable {endpoint.api_key_env} to {host}")


def require_trust(
    recipe: Recipe, path: Path, own: Collection[str], cache: Path, agree: Callable[[list[Risk]], bool]
) -> None:
    """TapirError unless the user allows what the file of a recipe makes this machine do.

    No question is asked about recipes that come with the program, about settings that the user typed (`own`, given by
    --set), and about what was allowed before in this cache. `agree` is asked about the rest. What it allows is stored
    in trusted.json.
    """
    risks, file = find_risks(recipe), cache / "trusted.json"
    known = read_permissions(file)
    new = [risk for risk in risks if risk.digest not in known]
    unsure = [risk for risk in new if not is_typed_by_user(risk, own)]
    if unsure and path.resolve().parent != recipes_folder().resolve() and not agree(unsure):
        raise TapirError(
            f"this recipe {'; it '.join(risk.does for risk in unsure)}",
            where=str(path),
            fix="If you wrote it or have read it, add --trust. You need it again only if the command or host changes.",
        )
    if new:
        write_json(file, known | {risk.digest: f"{risk.settings[0]}: {risk.does}" for risk in new})


def ask_permission(risks: Sequence[Risk], trust: bool) -> bool:
    """Whether the user allows a recipe to do this: by --trust, or by an answer in the terminal."""
    if trust or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return trust
    for risk in risks:
        echo(f"This recipe {risk.does}", err=True)
    return click.confirm("Allow this? Answer y only if you trust the recipe", default=False, err=True)


def is_typed_by_user(risk: Risk, own: Collection[str]) -> bool:
    """Whether the user typed one of the settings of a risk, or the section of one."""
    return any(setting in own or setting.partition(".")[0] in own for setting in risk.settings)


def read_permissions(file: Path) -> dict[str, str]:
    """What was allowed before, by digest; {} if the file is missing or unreadable."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}
