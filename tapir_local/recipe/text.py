"""Read recipes from YAML, change them by `KEY=VALUE`, compare them, and write them back."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from tapir_local.errors import TapirError
from tapir_local.recipe.checks import ENDPOINT_ROLES, KINDS_BY_SETTING, find_faults, unused_settings
from tapir_local.recipe.old_names import current_path
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.settings import settings
from tapir_local.recipe.tasks import TASKS
from tapir_local.recipe.types import infer_kind
from tapir_local.recipe.yaml import annotation_at, read_yaml, write_yaml

# A teacher section with all of these settings was written by the program: people do not write out every default.
WRITTEN_BY_PROGRAM = frozenset(
    {"base_url", "model", "alias", "api_key_env", "temperature", "extra", "timeout", "attempts"}
)
DEFAULT_KINDS = {role: Recipe.model_fields[role].default.kind for role in ENDPOINT_ROLES}
PYDANTIC_TYPE_NAME = re.compile(
    r"constrained-\w+|literal\[.*\]|bool|int|float|str|\[key\]"
)  # pydantic's names of types in an error's location
URL_LOGIN = re.compile(r"(?<=://)[^/@\s'\"]+@")


def parse_recipe(text: str, where: str, *, kept: bool = False) -> Recipe:
    """Parse a recipe in YAML; TapirError with the path of every wrong setting.

    In a text that the program wrote (`to_yaml`), a value equal to the default counts as not given. A recipe `kept` by
    a run is accepted even if newer versions refuse some of its settings.
    """
    value = read_yaml(text, Recipe, where)
    if value is None:
        raise TapirError(
            "the recipe is empty", where=where, fix="`tapir-local recipes quickstart` prints a complete one."
        )
    if not isinstance(value, dict):
        raise TapirError("a recipe is a mapping of settings, such as `rounds: 3`", where=where)
    return validate_recipe(remove_defaults(value) if is_written_by_program(value) else value, where, kept=kept)


def validate_recipe(
    value: Mapping[str, Any], where: str, *, kept: bool = False, known: Sequence[str] | None = None
) -> Recipe:
    """Build a recipe from its settings; TapirError with the path of every wrong one.

    For a recipe `kept` by a run, faults that newer versions find are ignored: all of them, or those in `known`.
    """
    fix = "`tapir-local recipes --settings` lists every setting."
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        found = "; ".join(dict.fromkeys(format_fault(item) for item in error.errors()))
        raise TapirError(mask_logins(found), where=where, fix=fix) from error
    wrong = [] if kept and known is None else [text for text in find_faults(recipe) if text not in (known or ())]
    if wrong:
        raise TapirError(mask_logins("; ".join(wrong)), where=where, fix=fix)
    return recipe


def is_written_by_program(value: Mapping[str, Any]) -> bool:
    """Whether the program wrote the recipe, with every default."""
    teacher = value.get("teacher")
    return isinstance(teacher, dict) and teacher.keys() >= WRITTEN_BY_PROGRAM


def remove_defaults(value: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from their defaults, and every path and kind, which count as given in any case."""
    defaults = {path: default for path, _, default, _ in settings()}
    kept = {"path", "kind"}

    def less(part: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        out = dict[str, Any]()
        for name, item in part.items():
            path = f"{prefix}{name}"
            if isinstance(item, dict) and path not in defaults:
                out[name] = less(item, f"{path}.")
            elif name in kept or item != defaults.get(path):
                out[name] = item
        return out

    return less(value, "")


def mask_logins(text: str) -> str:
    """The text with user names and passwords in URLs replaced by ***."""
    return URL_LOGIN.sub("***@", text)


def format_fault(item: Any) -> str:
    """Format a validation error as `path: what is wrong`."""
    path = ".".join(str(part) for part in item["loc"] if not PYDANTIC_TYPE_NAME.fullmatch(str(part)))
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), sibling_settings(path), 1)
        return f"{path}: unknown setting" + (f" (did you mean {near[0]}?)" if near else "")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "string_pattern_mismatch":
        message = "must consist of letters, digits, dots, dashes and underscores, and begin with a letter or digit"
    given = f", not {item['input']!r}" if isinstance(item.get("input"), str | int | float) else ""
    return f"{path}: {message}{given}" if path else message


def sibling_settings(path: str) -> list[str]:
    """The settings that a recipe may have next to `path`."""
    path = re.sub(r"^tasks\..*\.", "tasks.LABEL.", path)
    prefix = path[: path.rfind(".") + 1]
    return sorted(
        {known.removeprefix(prefix).partition(".")[0] for known, *_ in settings() if known.startswith(prefix)}
    )


def override(
    recipe: Recipe, changes: Mapping[str, Any], *, kept: bool = False, where: str = "on the command line"
) -> Recipe:
    """The recipe with settings changed by path, validated again as a whole.

    A change that implies another kind of teacher or judge (`teacher.base_url`) replaces the recipe's kind and removes
    the settings that only the old kind uses. In a recipe `kept` by a run, only faults that the changes cause count.
    """
    value = recipe.model_dump(exclude_unset=True)
    if recipe.tasks is None and any(path.startswith("tasks.") for path in changes):
        value["tasks"] = {label: task.share for label, task in TASKS.items()}  # the other shares stay
    for given, new in changes.items():
        path = current_path(given)
        if path in ("seeds", "student") and isinstance(new, str):
            path = f"{path}.path"
        *sections, name = path.split(".")
        place = value
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise TapirError(f"{section} has no settings of its own", where=path)
        place[name] = new
    for role in ENDPOINT_ROLES:
        switch_kind(value, role, changes)
    return validate_recipe(value, where, kept=kept, known=find_faults(recipe) if kept else ())


def switch_kind(value: dict[str, Any], role: str, changes: Mapping[str, Any]) -> None:
    """Give a teacher or judge the kind that the changes imply, and drop settings that this kind does not use."""
    new = {path.removeprefix(f"{role}."): item for path, item in changes.items() if path.startswith(f"{role}.")}
    kind = new.get("kind") or infer_kind(new)
    section = value.get(role)
    if kind is None or not isinstance(section, dict) or kind == section.get("kind", DEFAULT_KINDS[role]):
        return
    kept = {name: item for name, item in section.items() if name in new or kind in KINDS_BY_SETTING.get(name, {kind})}
    value[role] = kept | {"kind": kind}


def describe_replaced_kinds(before: Recipe, after: Recipe) -> list[str]:
    """One sentence for each of teacher and judge whose kind the command line has replaced."""
    sentences = list[str]()
    for role in ENDPOINT_ROLES:
        old, new = getattr(before, role), getattr(after, role)
        gone = sorted(old.model_fields_set - new.model_fields_set - {"kind"})
        if old.kind != new.kind:
            without = f"; it does not use {', '.join(f'{role}.{name}' for name in gone)}" if gone else ""
            sentences.append(f"{role}: `kind: {new.kind}` from --set replaces the recipe's `kind: {old.kind}`{without}")
    return sentences


# Settings that change when, from where and at what cost answers come, but not the answers: a run may change them.
CHANGEABLE_ENDPOINT_SETTINGS = frozenset(
    {"api_key_env", "api_key_file", "concurrency", "timeout", "attempts", "batch", "price", "context", "stream"}
)
# Settings that change how a batch is computed, but not the result, up to rounding.
CHANGEABLE_TRAIN_SETTINGS = frozenset({"micro_batch_size", "gradient_checkpointing", "checkpoint_minutes", "launcher"})
# Other settings that change no row: texts, parallelism and tolerated failures.
CHANGEABLE_SETTINGS = (
    *("rounds", "about", "budget", "limits", "card", "student.concurrency"),
    *("judge.ahead", "judge.max_unjudged", "judge.health", "classifier.min_agreement", "export.min_agreement"),
)
# Settings that may grow during a run: a complete answer stays the same.
RAISABLE_SETTINGS = ("teacher.max_tokens", "judge.max_tokens")


def fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that must not change during a run: all except CHANGEABLE_… and those that the kinds do not use.

    For an endpoint with an `alias`, base_url may change too.
    """
    value = recipe.model_dump(mode="json")
    for path in CHANGEABLE_SETTINGS:
        section, _, name = path.rpartition(".")
        (value[section] if section else value).pop(name)
    for role in ENDPOINT_ROLES:
        endpoint = getattr(recipe, role)
        removed = {*CHANGEABLE_ENDPOINT_SETTINGS, *unused_settings(endpoint), *(["base_url"] if endpoint.alias else [])}
        value[role] = {name: item for name, item in value[role].items() if name not in removed}
    value["train"] = {name: item for name, item in value["train"].items() if name not in CHANGEABLE_TRAIN_SETTINGS}
    return value


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Parse the `KEY=VALUE`s of a command line; TapirError if one is given twice, directly or by its section."""
    changes = dict[str, Any]()
    for text in texts:
        path, value = parse_change(text)
        if other := next(
            (old for old in changes if f"{old}.".startswith(f"{path}.") or f"{path}.".startswith(f"{old}.")), ""
        ):
            both = path if other == path else f"{other} and {path}, one of which contains the other,"
            verb = "is" if other == path else "are"
            raise TapirError(f"{both} {verb} given twice", where="--set", fix="Keep one of them.")
        changes[path] = value
    return changes


def parse_change(text: str) -> tuple[str, Any]:
    """Parse `train.epochs=1` into a setting's path and its value, written as in a recipe."""
    path, equals, value = text.partition("=")
    path = current_path(path.strip())
    if not equals or not path:
        raise TapirError(f"not of the form KEY=VALUE: {text!r}", fix="Write it as --set train.epochs=1")
    return path, read_yaml(value, annotation_at(Recipe, path), f"--set {path}", path)


def diff_recipes(old: Recipe, new: Recipe, written: Mapping[str, Any] | None = None) -> list[str]:
    """`train.epochs: 2.0 -> 3.0` for every fixed setting in which two recipes differ.

    `written` is the old recipe as its run has kept it. A setting missing from it was added by a newer version of the
    program, so the run cannot have started with another value and the setting is not compared.
    """
    before, after = flatten(fixed_settings(old)), flatten(fixed_settings(new))
    return [
        mask_logins(f"{key}: {before.get(key)!r} -> {after.get(key)!r}")
        for key in sorted(before | after)
        if before.get(key) != after.get(key) and not (key in RAISABLE_SETTINGS and before[key] < after[key])
        if written is None or names_setting(written, key)
    ]


def names_setting(written: Mapping[str, Any], path: str) -> bool:
    """Whether a kept recipe, which names every setting of its version, names this one; tasks count as one setting."""
    section, _, name = path.partition(".")
    settings = written.get(section)
    if section == "tasks" or not isinstance(settings, dict):
        return section in written
    return name.partition(".")[0] in settings


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return out


def to_yaml(recipe: Recipe) -> str:
    """The recipe in YAML with every setting, including defaults."""
    return write_yaml(recipe.model_dump(mode="json"))
