"""The folder in which Unsloth keeps the code that it generates."""

import stat
from pathlib import Path

import pytest

from tapir_local.training.generated_code import generated_code_folder

VERSIONS = {"torch": "2.13.0+cpu", "unsloth": "2026.10.7", "unsloth_zoo": "2026.10.7", "datasets": "4.8.5"}


def test_each_set_of_versions_has_a_folder_of_its_own_that_only_its_owner_can_enter(tmp_path: Path) -> None:
    first = generated_code_folder(tmp_path / "unsloth", VERSIONS)
    other = generated_code_folder(tmp_path / "unsloth", {**VERSIONS, "unsloth_zoo": "2026.10.9"})
    assert first == tmp_path / "unsloth" / "unsloth-2026.10.7_unsloth_zoo-2026.10.7_torch-2.13.0+cpu"
    assert other == tmp_path / "unsloth" / "unsloth-2026.10.7_unsloth_zoo-2026.10.9_torch-2.13.0+cpu"
    for folder in (first, other):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert list(folder.iterdir()) == []


def test_the_folder_does_not_depend_on_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = generated_code_folder(Path("cache/unsloth"), VERSIONS)
    assert found
    assert found.is_absolute()
    assert found.parent == tmp_path / "cache" / "unsloth"


def test_nothing_is_created_without_unsloth_or_a_cache(tmp_path: Path) -> None:
    assert generated_code_folder(tmp_path / "unsloth", {"torch": "2.13.0"}) is None
    assert generated_code_folder(None, VERSIONS) is None
    assert list(tmp_path.iterdir()) == []


def test_there_is_none_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "unsloth").write_text("a file where the folder belongs")
    assert generated_code_folder(tmp_path / "unsloth", VERSIONS) is None
    assert generated_code_folder(Path("/proc/unsloth"), VERSIONS) is None
