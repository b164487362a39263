"""Fixtures of several files that ask a teacher: no API key, no pauses, and a GGUF that answers."""

import shutil
from pathlib import Path

import pytest
from models import make_model

from tapir_local.export.export import export_gguf
from tapir_local.teacher import http


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of this machine is neither used nor needed."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry almost at once."""
    monkeypatch.setattr(http, "backoff_seconds", lambda tries, chance: 0.01)


@pytest.fixture(scope="session")
def talker(tmp_path_factory) -> Path:
    """A model that never prefers a special token, so that no greedy answer is empty."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("talker")
    weights = make_model(folder / "m") / "model.safetensors"
    found = load_file(weights)
    found["lm_head.weight"][:6] = found["lm_head.weight"][400:] = 0
    save_file(found, weights, metadata={"format": "pt"})
    export_gguf(folder / "m", folder / "m.gguf", adapter=None, quant="f32")
    return folder / "m.gguf"


@pytest.fixture
def gguf(talker: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(talker, tmp_path / "teacher.gguf"))
