"""A tiny student: a base, an adapter and both as one GGUF."""

from pathlib import Path
from typing import NamedTuple

from models import make_adapter, make_model

from tapir_local.export.export import export_gguf


class Student(NamedTuple):
    """A base, an adapter on it, and the two merged as an f32 GGUF."""

    model: Path
    adapter: Path
    gguf: Path


def make_student(folder: Path, family: str, **changes: object) -> Student:
    model = make_model(folder / family, family, **changes)
    adapter = make_adapter(model, folder / f"{family}-lora")
    export_gguf(model, folder / f"{family}.gguf", adapter=adapter, quant="f32")
    return Student(model, adapter, folder / f"{family}.gguf")
