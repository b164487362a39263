"""Where Unsloth keeps the Python code that it generates for the installed versions of its libraries."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile

from tapir_local.files import private_folder

GENERATED_FROM = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft")  # what the code is generated from


def generated_code_folder(cache: Path | None, versions: Mapping[str, str]) -> Path | None:
    """The folder in `cache` for code generated for these versions, which is created; None without a cache or Unsloth,
    or if nothing can be written there.

    Unsloth puts the folder first on sys.path, so only its owner may write in it. It compares the files with what it
    would write, under a lock, so several trainings may share the folder, and it may be deleted between them.
    """
    if cache is None or "unsloth" not in versions:
        return None
    names = [f"{name}-{versions[name]}" for name in GENERATED_FROM if name in versions]
    folder = cache.absolute() / "_".join(names)
    try:
        private_folder(folder)
        with TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None
