"""Where a run's seeds came from, kept with the run: a file that was edited since is refused, not passed over."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapir_local.data.files import read_table
from tapir_local.errors import TapirError
from tapir_local.files import file_sha256, write_json
from tapir_local.recipe.schema import Recipe, Seeds
from tapir_local.resources import find_seeds
from tapir_local.run_dir import RunDir

Source = Mapping[str, Any]  # path, bytes, sha256; of a folder the files too, of the Hub the revision


def digest(seeds: Seeds) -> Source:
    """What identifies the seeds: a file's size and SHA-256, a folder's of every file, a Hub dataset's revision."""
    path = find_seeds(seeds.path)
    if path is None:
        return {"path": seeds.path, "revision": hub_revision(seeds.path)}
    try:
        return digest_at(path, seeds.path)
    except OSError as error:
        raise TapirError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def digest_at(path: Path, named: str) -> Source:
    """What identifies a file or a folder."""
    if path.is_file():
        return {"path": named, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    files = {str(file.relative_to(path)): digest_of(file) for file in sorted(path.rglob("*")) if is_data(file, path)}
    whole = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    return {"path": named, "bytes": sum(size for size, _ in files.values()), "sha256": whole, "files": files}


def is_data(file: Path, folder: Path) -> bool:
    """Whether a folder's file is part of the data: not hidden, and no lock or cache of `datasets`."""
    parts = file.relative_to(folder).parts
    return file.is_file() and not any(part.startswith((".", "cache-")) or part.endswith(".lock") for part in parts)


def digest_of(file: Path) -> list[Any]:
    """A file's size and SHA-256."""
    return [file.stat().st_size, file_sha256(file)]


def hub_revision(name: str) -> str:
    """The commit of a dataset on the Hub; "" where the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(name, timeout=10).sha or ""
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return ""


def keep_source(run: RunDir, source: Source, rows: int) -> None:
    """Write into run.json what a run's seeds were."""
    write_json(run.path / "run.json", {**run.record(), "seeds": {**source, "rows": rows}})


def same_seeds(old: Recipe, new: Recipe, run: RunDir) -> Recipe:
    """The new recipe with the old one's path where the file at the new path is the one that the run read.

    TapirError where the file at the old path is not. A file that is no longer there cannot be compared, and a run that
    has read it needs it no more; nor are datasets of the Hub asked for again.
    """
    kept = run.record().get("seeds")
    if not kept or "sha256" not in kept:
        return new
    moved = new.seeds.path != old.seeds.path
    found = digest(new.seeds) if is_there(new.seeds) else {}
    if found.get("sha256") == kept["sha256"]:
        return new.model_copy(update={"seeds": new.seeds.model_copy(update={"path": old.seeds.path})})
    if not moved and found.get("sha256"):
        refuse_edited(run, kept, found, new.seeds)
    return new


def is_there(seeds: Seeds) -> bool:
    """Whether the seeds lie on this machine."""
    try:
        return find_seeds(seeds.path) is not None
    except TapirError:
        return False


def refuse_edited(run: RunDir, kept: Source, found: Source, seeds: Seeds) -> None:
    """TapirError with what the seeds were and are."""
    try:
        rows = f", {len(read_table(seeds).rows):,} rows"
    except TapirError:
        rows = ", which cannot be read"
    was = f"{kept['bytes']:,} bytes, {kept['rows']:,} rows, SHA-256 {kept['sha256'][:12]}"
    now = f"{found['bytes']:,} bytes{rows}, SHA-256 {found['sha256'][:12]}"
    raise TapirError(
        f"the seeds were edited since run {run.name!r} read them: then {was}; now {now}{files(kept, found)}",
        where=str(found["path"]),
        fix="Name a new run with --name: calls that are the same are in the store and cost nothing. Or put back the "
        "seeds as they were.",
    )


def files(kept: Source, found: Source, most: int = 5) -> str:
    """Which files of a folder changed, came or went."""
    old, new = dict(kept.get("files", {})), dict(found.get("files", {}))
    names = sorted(name for name in old | new if list(old.get(name, ())) != list(new.get(name, ())))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"; changed: {', '.join(names[:most])}{more}" if names else ""
