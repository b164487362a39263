"""Recipes as text: read from YAML, changed by `KEY=VALUE`, compared, listed setting by setting."""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tapir_local.errors import TapirError
from tapir_local.own_tasks import OwnTask, Settings
from tapir_local.recipe import Recipe
from tapir_local.tasks import TASKS


def parse_recipe(text: str, where: str) -> Recipe:
    """A recipe from YAML; TapirError with the path of every faulty key."""
    try:
        value = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise TapirError(f"not YAML: {' '.join(str(error).split())}", where=where) from error
    if not isinstance(value, dict):
        raise TapirError("a recipe is a mapping of settings", where=where)
    return validated(value, where)


def validated(value: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from its settings; TapirError with the path of every faulty one."""
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        faults = "; ".join(dict.fromkeys(fault(item) for item in error.errors()))
        raise TapirError(faults, where=where, fix="`tapir-local recipes --settings` lists every setting.") from error


def fault(item: Any) -> str:
    """One validation error as `path: what is wrong`."""
    path = ".".join(str(part) for part in item["loc"]).removesuffix(".[key]")
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), siblings(path), 1)
        return f"{path}: unknown setting" + (f" (did you mean {near[0]}?)" if near else "")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "string_pattern_mismatch":
        message = "may have letters, digits, dots, dashes and underscores, the first a letter or a digit"
    given = f", not {item['input']!r}" if isinstance(item.get("input"), str | int | float) else ""
    return f"{path}: {message}{given}" if path else message


def siblings(path: str) -> list[str]:
    """The keys that a recipe may have at the place of `path`."""
    path = re.sub(r"^tasks\..*\.", "tasks.LABEL.", path)
    prefix = path[: path.rfind(".") + 1]
    return sorted(
        {known.removeprefix(prefix).partition(".")[0] for known, *_ in settings() if known.startswith(prefix)}
    )


def settings(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """(path, type, default, help) of every setting."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        section = next((part for part in (kind, *get_args(kind)) if is_section(part)), None)
        if section:
            yield from settings(section, f"{prefix}{name}.")
        elif name == "tasks":
            yield f"{prefix}{name}", "mapping of labels | None", None, field.description or ""
            yield from settings(OwnTask, f"{prefix}{name}.LABEL.")
        else:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            yield f"{prefix}{name}", type_name(kind), default, field.description or ""


def is_section(kind: Any) -> bool:
    """Whether a setting's type is a section of settings."""
    return isinstance(kind, type) and issubclass(kind, Settings)


def type_name(kind: Any) -> str:
    """`int`, `float | None`, `previous | base` as people write them."""
    words = str(kind) if not isinstance(kind, type) else kind.__name__
    for noise in ("typing.", "collections.abc.", "Literal", "Union", "[", "]", "'"):
        words = words.replace(noise, " " if noise == "[" else "")
    words = " ".join(words.replace("NoneType", "None").replace(", ", " | ").split())
    return f"{words.removeprefix('Optional ')} | None" if words.startswith("Optional ") else words


def overridden(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with some settings changed, each named by its path; checked as a whole again."""
    value = recipe.model_dump()
    if recipe.tasks is None and any(path.startswith("tasks.") for path in changes):
        value["tasks"] = {label: task.share for label, task in TASKS.items()}  # one share changes, the others stay
    for path, new in changes.items():
        *sections, name = path.split(".")
        place = value
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise TapirError(f"{section} has no settings of its own", where=path)
        place[name] = new
    return validated(value, "on the command line")


# What decides when, from whom and at what cost answers come, but not which: free to change while a run is under way.
FREE = frozenset(
    {"api_key_env", "api_key_file", "concurrency", "timeout", "attempts", "batch", "price", "context", "stream"}
)
# What decides how a batch goes through the hardware, but not what is learned from it, up to rounding.
CARRIED = frozenset({"micro_batch_size", "gradient_checkpointing", "checkpoint_minutes", "launcher"})


def lasting(recipe: Recipe) -> dict[str, Any]:
    """What a run keeps from its start to its end: all but `rounds`, `budget`, `limits`, `card`, FREE and CARRIED."""
    value = recipe.model_dump(mode="json", exclude={"rounds", "budget", "limits", "card"})
    for role in ("teacher", "judge"):
        value[role] = {name: item for name, item in value[role].items() if name not in FREE}
    value["train"] = {name: item for name, item in value["train"].items() if name not in CARRIED}
    return value


def read_change(text: str) -> tuple[str, Any]:
    """`train.epochs=1` as a setting's path and its new value, spelled as in a recipe."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise TapirError(f"not a change of a setting: {text!r}", fix="Write it as --set train.epochs=1")
    try:
        return path.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise TapirError(f"{value!r} is not a value: {' '.join(str(error).split())}", where=path) from error


def differing(old: Recipe, new: Recipe) -> list[str]:
    """`train.epochs: 2.0 -> 3.0` for every lasting setting in which two recipes differ."""
    before, after = flat(lasting(old)), flat(lasting(new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return out


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every setting written out."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text
