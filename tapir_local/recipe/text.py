"""Recipes as text: read from YAML, changed by `KEY=VALUE`, compared, listed setting by setting."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from tapir_local.errors import TapirError
from tapir_local.files import expand_home
from tapir_local.recipe.checks import ENDPOINT_ROLES, KINDS_BY_SETTING, find_faults, unused_settings
from tapir_local.recipe.own_tasks import OwnTask
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.tasks import TASKS
from tapir_local.recipe.types import Settings, infer_kind
from tapir_local.recipe.yaml import annotation_at, read_yaml, write_yaml

# A teacher's section that names all of these is the program's own writing: nobody writes out every default.
WRITTEN_BY_PROGRAM = frozenset(
    {"base_url", "model", "alias", "api_key_env", "temperature", "extra", "timeout", "attempts"}
)
DEFAULT_KINDS = {role: Recipe.model_fields[role].default.kind for role in ENDPOINT_ROLES}
PYDANTIC_TYPE_NAME = re.compile(
    r"constrained-\w+|literal\[.*\]|bool|int|float|str|\[key\]"
)  # pydantic's names of a setting's types
URL_LOGIN = re.compile(r"(?<=://)[^/@\s'\"]+@")


def parse_recipe(text: str, where: str, *, kept: bool = False) -> Recipe:
    """A recipe from YAML; TapirError with the path of every faulty key.

    In a text that the program wrote (`to_yaml`) a value that is its setting's default counts as not given. One that a
    run has `kept` is read though newer versions refuse what it asks for.
    """
    value = read_yaml(text, Recipe, where)
    if value is None:
        raise TapirError("the recipe is empty", where=where, fix="`tapir-local recipes quickstart` prints a whole one.")
    if not isinstance(value, dict):
        raise TapirError("a recipe is a mapping of settings, such as `rounds: 3`", where=where)
    return validate_recipe(remove_defaults(value) if is_written_by_program(value) else value, where, kept=kept)


def validate_recipe(
    value: Mapping[str, Any], where: str, *, kept: bool = False, known: Sequence[str] | None = None
) -> Recipe:
    """A recipe from its settings; TapirError with the path of every faulty one.

    Of a recipe that a run has `kept` the faults that newer versions find are let be, all or those `known`.
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
    """Whether settings are those of a recipe that the program wrote out, with all defaults."""
    teacher = value.get("teacher")
    return isinstance(teacher, dict) and teacher.keys() >= WRITTEN_BY_PROGRAM


def remove_defaults(value: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not their defaults, paths and kinds kept: these are named even where they are the usual."""
    usual = {path: default for path, _, default, _ in settings()}
    kept = {"path", "kind"}

    def less(part: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        out = dict[str, Any]()
        for name, item in part.items():
            path = f"{prefix}{name}"
            if isinstance(item, dict) and path not in usual:
                out[name] = less(item, f"{path}.")
            elif name in kept or item != usual.get(path):
                out[name] = item
        return out

    return less(value, "")


def mask_logins(text: str) -> str:
    """The text without names and passwords in its URLs."""
    return URL_LOGIN.sub("***@", text)


def format_fault(item: Any) -> str:
    """One validation error as `path: what is wrong`."""
    path = ".".join(str(part) for part in item["loc"] if not PYDANTIC_TYPE_NAME.fullmatch(str(part)))
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), sibling_settings(path), 1)
        return f"{path}: unknown setting" + (f" (did you mean {near[0]}?)" if near else "")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "string_pattern_mismatch":
        message = "may have letters, digits, dots, dashes and underscores, the first a letter or a digit"
    given = f", not {item['input']!r}" if isinstance(item.get("input"), str | int | float) else ""
    return f"{path}: {message}{given}" if path else message


def sibling_settings(path: str) -> list[str]:
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


def path_settings() -> Iterator[tuple[str, str]]:
    """(section, name) of every setting that names a file or a folder."""
    for section, field in Recipe.model_fields.items():
        kind = next((part for part in (field.annotation, *get_args(field.annotation)) if is_section(part)), None)
        for name, inner in kind.model_fields.items() if kind else ():
            if any(getattr(mark, "func", None) is expand_home for mark in inner.metadata):
                yield section, name


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


def override(
    recipe: Recipe, changes: Mapping[str, Any], *, kept: bool = False, where: str = "on the command line"
) -> Recipe:
    """The recipe with some settings changed, each named by its path; checked as a whole again.

    Where the changes say who teaches or judges (`teacher.base_url`), the recipe's own kind yields, and with it what
    only that kind used. In a recipe that a run has `kept`, only what the changes make wrong is refused.
    """
    value = recipe.model_dump(exclude_unset=True)
    if recipe.tasks is None and any(path.startswith("tasks.") for path in changes):
        value["tasks"] = {label: task.share for label, task in TASKS.items()}  # one share changes, the others stay
    for path, new in changes.items():
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
    """Give a teacher or judge the kind that the changes ask for, and drop what the recipe said of another kind."""
    new = {path.removeprefix(f"{role}."): item for path, item in changes.items() if path.startswith(f"{role}.")}
    kind = new.get("kind") or infer_kind(new)
    section = value.get(role)
    if kind is None or not isinstance(section, dict) or kind == section.get("kind", DEFAULT_KINDS[role]):
        return
    stays = {name: item for name, item in section.items() if name in new or kind in KINDS_BY_SETTING.get(name, {kind})}
    value[role] = stays | {"kind": kind}


def describe_replaced_kinds(before: Recipe, after: Recipe) -> list[str]:
    """What the command line put in the place of the recipe's own teacher or judge, in sentences."""
    said = list[str]()
    for role in ENDPOINT_ROLES:
        old, new = getattr(before, role), getattr(after, role)
        gone = sorted(old.model_fields_set - new.model_fields_set - {"kind"})
        if old.kind != new.kind:
            without = f"; the recipe's {', '.join(f'{role}.{name}' for name in gone)} no longer applies" if gone else ""
            said.append(f"{role}: `kind: {new.kind}` by --set, not the recipe's `kind: {old.kind}`{without}")
    return said


# What decides when, from whom and at what cost answers come, but not which: free to change while a run is under way.
CHANGEABLE_ENDPOINT_SETTINGS = frozenset(
    {"api_key_env", "api_key_file", "concurrency", "timeout", "attempts", "batch", "price", "context", "stream"}
)
# What decides how a batch goes through the hardware, but not what is learned from it, up to rounding.
CHANGEABLE_TRAIN_SETTINGS = frozenset({"micro_batch_size", "gradient_checkpointing", "checkpoint_minutes", "launcher"})
# Other settings that decide no row: words, how many answers at once, and how much may go wrong.
CHANGEABLE_SETTINGS = (
    *("rounds", "about", "budget", "limits", "card", "student.parallel"),
    *("judge.max_unjudged", "classifier.min_agreement", "export.min_agreement"),
)
RAISABLE_SETTINGS = (
    "teacher.max_tokens",
    "judge.max_tokens",
)  # may grow in mid-run: a whole answer stays whole with more room


def fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """What a run keeps from its start to its end: all but UNDECIDING, FREE, CARRIED and what the kinds do not use.

    Where `alias` names an endpoint for the store, its address may change too.
    """
    value = recipe.model_dump(mode="json")
    for path in CHANGEABLE_SETTINGS:
        section, _, name = path.rpartition(".")
        (value[section] if section else value).pop(name)
    for role in ENDPOINT_ROLES:
        endpoint = getattr(recipe, role)
        away = {*CHANGEABLE_ENDPOINT_SETTINGS, *unused_settings(endpoint), *(["base_url"] if endpoint.alias else [])}
        value[role] = {name: item for name, item in value[role].items() if name not in away}
    value["train"] = {name: item for name, item in value["train"].items() if name not in CHANGEABLE_TRAIN_SETTINGS}
    return value


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Every `KEY=VALUE` of a command line; TapirError for a setting that is given twice, alone or in its section."""
    changes = dict[str, Any]()
    for text in texts:
        path, value = parse_change(text)
        if other := next(
            (old for old in changes if f"{old}.".startswith(f"{path}.") or f"{path}.".startswith(f"{old}.")), ""
        ):
            both = f"{path} is" if other == path else f"{other} and {path} are one within the other, and so"
            raise TapirError(f"{both} given twice", where="--set", fix="Keep one of them.")
        changes[path] = value
    return changes


def parse_change(text: str) -> tuple[str, Any]:
    """`train.epochs=1` as a setting's path and its new value, spelled as in a recipe."""
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals or not path:
        raise TapirError(f"not a change of a setting: {text!r}", fix="Write it as --set train.epochs=1")
    return path, read_yaml(value, annotation_at(Recipe, path), f"--set {path}", path)


def diff_recipes(old: Recipe, new: Recipe, written: Mapping[str, Any] | None = None) -> list[str]:
    """`train.epochs: 2.0 -> 3.0` for every lasting setting in which two recipes differ.

    `written` is the old recipe as its run has kept it. A setting that it does not name came with a newer version of the
    program, so the run cannot have been started with another value of it.
    """
    before, after = flatten(fixed_settings(old)), flatten(fixed_settings(new))
    return [
        mask_logins(f"{key}: {before.get(key)!r} -> {after.get(key)!r}")
        for key in sorted(before | after)
        if before.get(key) != after.get(key) and not (key in RAISABLE_SETTINGS and before[key] < after[key])
        if written is None or names_setting(written, key)
    ]


def names_setting(written: Mapping[str, Any], path: str) -> bool:
    """Whether a kept recipe, in which every setting is written out, names this one; tasks count as one setting."""
    section, _, name = path.partition(".")
    settings = written.get(section)
    if section == "tasks" or not isinstance(settings, dict):
        return section in written
    return name.partition(".")[0] in settings


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return out


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every setting written out."""
    return write_yaml(recipe.model_dump(mode="json"))
