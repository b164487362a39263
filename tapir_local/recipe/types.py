"""Base class, types and shorthands that the sections of a recipe share."""

import math
import shlex
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from tapir_local.files import expand_home


class Settings(BaseModel):
    """A frozen section of settings; unknown keys, booleans as numbers, infinity and NaN are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def true_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` as a number, which pydantic reads as 1, and numbers in `extra` that are not finite."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and wants_number(kind):
            raise ValueError("must be a number")
        if Mapping[str, Any] in allowed_types(kind) and not is_finite(value):
            raise ValueError("must contain only finite numbers")
        return value


def allowed_types(kind: Any) -> list[Any]:
    """The types that an annotation allows: `int | None` gives [int, NoneType]."""
    origin = get_origin(kind)
    if origin is Annotated:
        return allowed_types(get_args(kind)[0])
    if origin in (Union, UnionType):
        return [choice for part in get_args(kind) for choice in allowed_types(part)]
    return [kind]


def wants_number(kind: Any) -> bool:
    """Whether an annotation allows a number and no boolean."""
    found = allowed_types(kind)
    return bool({int, float} & set(found)) and bool not in found


def is_finite(value: Any) -> bool:
    """Whether nested mappings and lists contain only finite numbers."""
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


Share = Annotated[float, Field(ge=0, le=1)]
FilePath = Annotated[str, AfterValidator(expand_home)]  # the types of settings that name a file or folder
OptionalPath = Annotated[str | None, AfterValidator(expand_home)]
KIND_BY_SETTING = {"gguf": "gguf", "base_url": "openai", "model": "openai"}  # settings that imply a kind of endpoint


def expand_kind_shorthand(word: Any) -> Any:
    """Read `teacher: pocket` as `teacher: {kind: pocket}`."""
    return {"kind": word} if isinstance(word, str) else word


def expand_path_shorthand(word: Any) -> Any:
    """Read `seeds: mine.jsonl` as `seeds: {path: mine.jsonl}`."""
    return {"path": word} if isinstance(word, str) else word


def infer_kind(given: Mapping[str, Any]) -> str | None:
    """The kind of a teacher or judge that the given settings imply; None if they imply none."""
    return next((kind for name, kind in KIND_BY_SETTING.items() if given.get(name)), None)


def expand_switch(word: Any) -> Any:
    """Undo YAML's reading of `off` as false and `on` as true."""
    return {False: "off", True: "hard"}.get(word, word) if isinstance(word, bool) else word


def join_command(word: Any) -> Any:
    """Join a command given as a list of words into one line."""
    return shlex.join(word) if isinstance(word, list | tuple) and all(isinstance(part, str) for part in word) else word
