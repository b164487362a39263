"""What the sections of a recipe share: no unknown key, numbers that are numbers, paths from `~`, and short forms."""

import math
import shlex
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from tapir_local.files import expand_home


class Settings(BaseModel):
    """Frozen; a key that it does not know is an error, and so is a number that is true, false, infinite or NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def true_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take `true` for 1, and does not look into a mapping of anything such as `extra`."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and wants_number(kind):
            raise ValueError("a number is wanted")
        if Mapping[str, Any] in allowed_types(kind) and not is_finite(value):
            raise ValueError("every number in it must be finite")
        return value


def allowed_types(kind: Any) -> list[Any]:
    """The types that a setting's annotation allows: `int | None` is [int, NoneType]."""
    origin = get_origin(kind)
    if origin is Annotated:
        return allowed_types(get_args(kind)[0])
    if origin in (Union, UnionType):
        return [choice for part in get_args(kind) for choice in allowed_types(part)]
    return [kind]


def wants_number(kind: Any) -> bool:
    """Whether a setting's annotation wants a number, and no truth value."""
    found = allowed_types(kind)
    return bool({int, float} & set(found)) and bool not in found


def is_finite(value: Any) -> bool:
    """Whether no number in nested mappings and lists is infinite or NaN."""
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


Share = Annotated[float, Field(ge=0, le=1)]
FilePath = Annotated[
    str, AfterValidator(expand_home)
]  # every setting that names a file or folder has one of these types
OptionalPath = Annotated[str | None, AfterValidator(expand_home)]
KIND_BY_SETTING = {"gguf": "gguf", "base_url": "openai", "model": "openai"}  # settings that say who is asked


def expand_kind_shorthand(word: Any) -> Any:
    """`teacher: pocket` means `teacher: {kind: pocket}`."""
    return {"kind": word} if isinstance(word, str) else word


def expand_path_shorthand(word: Any) -> Any:
    """`seeds: mine.jsonl` means `seeds: {path: mine.jsonl}`."""
    return {"path": word} if isinstance(word, str) else word


def infer_kind(given: Mapping[str, Any]) -> str | None:
    """The kind of a teacher or judge of whom these settings are given, None where they do not say."""
    return next((kind for name, kind in KIND_BY_SETTING.items() if given.get(name)), None)


def expand_switch(word: Any) -> Any:
    """YAML reads a bare `off` as false and `on` as true."""
    return {False: "off", True: "hard"}.get(word, word) if isinstance(word, bool) else word


def join_command(word: Any) -> Any:
    """A command as a list of words means the same words in a line."""
    return shlex.join(word) if isinstance(word, list | tuple) and all(isinstance(part, str) for part in word) else word
