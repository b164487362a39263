"""List every setting of a recipe, with its type in plain words, default and meaning."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tapir_local.files import expand_home
from tapir_local.recipe.own_tasks import OwnTask
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.types import Settings

TYPE_WORDS = {str: "text", bool: "true or false", int: "whole number", float: "number", NoneType: "null"}


@dataclass(frozen=True)
class SettingRow:
    """One setting of a recipe.

    `setting` is its path (`train.epochs`), `type` its type in words (`number above 0`), `default` the value if it is
    left out (None if it is `required`), `meaning` the help text, `section` the part of the path before the last dot.
    """

    setting: str
    type: str
    default: Any
    meaning: str
    section: str
    required: bool = False

    @property
    def default_text(self) -> str:
        """The default as it is written in a recipe, or `(required)`."""
        return "(required)" if self.required else format_default(self.default)


def setting_rows() -> list[SettingRow]:
    """Every setting of a recipe, in the order of the schema."""
    return list(walk_settings())


def section_meanings() -> dict[str, str]:
    """The first line of each section's description, by the section's path; "" is the top level."""
    found = {"": first_doc_line(Recipe)}
    for name, field in Recipe.model_fields.items():
        if section := section_of(field.annotation):
            found[name] = first_doc_line(section)
            found |= {
                f"{name}.{inner}": first_doc_line(part)
                for inner, item in section.model_fields.items()
                if (part := section_of(item.annotation))
            }
    return found | {"tasks.LABEL": first_doc_line(OwnTask)}


def first_doc_line(model: type[BaseModel]) -> str:
    """The first line of a section's docstring."""
    return (model.__doc__ or "").strip().splitlines()[0]


def settings() -> Iterator[tuple[str, str, Any, str]]:
    """(path, type, default, help) of every setting."""
    yield from ((row.setting, row.type, row.default, row.meaning) for row in walk_settings())


def walk_settings(model: type[BaseModel] = Recipe, section: str = "") -> Iterator[SettingRow]:
    """The settings of a section and of the sections in it."""
    for name, field in model.model_fields.items():
        path, meaning = f"{section}.{name}".lstrip("."), field.description or ""
        if inner := section_of(field.annotation):
            yield from walk_settings(inner, path)
        elif path == "tasks":
            yield SettingRow(path, "settings by label, or null", None, meaning, section)
            yield from walk_settings(OwnTask, "tasks.LABEL")
        else:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            kind = describe_type(field.annotation, field.metadata)
            yield SettingRow(path, kind, default, meaning, section, field.is_required())


def path_settings() -> Iterator[tuple[str, str]]:
    """(section, name) of every setting that names a file or a folder."""
    for section, field in Recipe.model_fields.items():
        kind = section_of(field.annotation)
        for name, inner in kind.model_fields.items() if kind else ():
            if is_path(inner.metadata):
                yield section, name


def section_of(annotation: Any) -> type[Settings] | None:
    """The section of settings that an annotation allows; None if it allows none."""
    return next((part for part in (annotation, *get_args(annotation)) if is_section(part)), None)


def is_section(annotation: Any) -> bool:
    """Whether an annotation is a section of settings."""
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def is_path(metadata: Sequence[Any]) -> bool:
    """Whether the metadata of a setting says that it names a file or a folder."""
    return any(getattr(mark, "func", None) is expand_home for mark in metadata)


def describe_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The type of a setting in words: `number, 0 to 1, or null`; `lora, qlora or full`."""
    words = list(dict.fromkeys(alternatives(annotation, metadata)))
    if "true or false" in words:  # `auto, true or false`
        words[words.index("true or false") :] = ["true", "false", *words[words.index("true or false") + 1 :]]
    if len(words) > 1 and any("," in word for word in words):
        return ", or ".join(words)
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def alternatives(annotation: Any, metadata: Sequence[Any]) -> Iterator[str]:
    """Each type or word that an annotation allows, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from alternatives(parts[0], [*metadata, *flat_metadata(parts[1:])])
    elif origin in (Union, UnionType):
        for part in parts:
            yield from alternatives(part, metadata)
    elif origin is Literal:
        yield from map(str, parts)
    elif annotation is str and is_path(metadata):
        yield "path"
    elif annotation in (int, float):
        yield f"{TYPE_WORDS[annotation]}{describe_bounds(metadata)}"
    else:
        yield TYPE_WORDS.get(annotation, "mapping" if origin is Mapping else str(annotation))


def flat_metadata(marks: Sequence[Any]) -> list[Any]:
    """The metadata of an annotation, with what pydantic's Field holds taken out of it."""
    return [item for mark in marks for item in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]


def describe_bounds(metadata: Sequence[Any]) -> str:
    """The limits of a number: ` above 0`, `, 1 or more`, `, 0 to 1`; "" without limits."""
    found = {
        name: getattr(mark, name)
        for mark in metadata
        for name in ("ge", "gt", "le")
        if getattr(mark, name, None) is not None
    }
    if "gt" in found:
        return f" above {found['gt']:g}"
    if "ge" in found:
        return f", {found['ge']:g} to {found['le']:g}" if "le" in found else f", {found['ge']:g} or more"
    return ""


def format_default(value: Any) -> str:
    """A default as it is written in a recipe: `null`, `true`, `{}`, `0.5`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return '""' if value == "" else str(value)
