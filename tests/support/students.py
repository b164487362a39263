"""A tiny student: a base, an adapter and both as one GGUF; and prompts to ask it."""

from pathlib import Path
from typing import NamedTuple

from models import make_adapter, make_model

from tapir_local.export.export import export_gguf
from tapir_local.inference.config import GenerationConfig
from tapir_local.records import Message

SUBJECTS = (
    "7 times 8",
    "the sum of 12 and 34",
    "a fox",
    "naïve café",
    "你好",
    "🙂",
    "x",
    "def add(a, b):",
    "the lazy dog",
    "9",
)
PROMPTS = [(Message("user", f"What is {subject}?" * (1 + number % 3)),) for number, subject in enumerate(SUBJECTS)]
CONFIG = GenerationConfig(max_tokens=24, context=256)


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
