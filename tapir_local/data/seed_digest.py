"""Record a digest of the seeds in a run, and refuse to continue the run if the seeds were edited."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapir_local.data.files import read_table
from tapir_local.errors import TapirError
from tapir_local.files import file_sha256, write_json
from tapir_local.printable import format_count
from tapir_local.recipe.schema import Recipe, Seeds
from tapir_local.resources import find_seeds
from tapir_local.run_dir import RunDir

SeedDigest = Mapping[str, Any]  # path, bytes, sha256; for a folder also files; for the Hub path and revision


def digest_seeds(seeds: Seeds) -> SeedDigest:
    """The digest of the seeds: size and SHA-256 of a file or of each file of a folder, or the revision on the Hub."""
    path = find_seeds(seeds.path)
    if path is None:
        return {"path": seeds.path, "revision": hub_revision(seeds.path)}
    try:
        return digest_path(path, seeds.path)
    except OSError as error:
        raise TapirError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def digest_path(path: Path, named: str) -> SeedDigest:
    """The digest of a file or a folder; `named` is the path as the recipe writes it."""
    if path.is_file():
        return {"path": named, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    files = {
        str(file.relative_to(path)): size_and_digest(file)
        for file in sorted(path.rglob("*"))
        if is_data_file(file, path)
    }
    whole = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    return {"path": named, "bytes": sum(size for size, _ in files.values()), "sha256": whole, "files": files}


def is_data_file(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is part of the data: not hidden, and not a lock or cache of `datasets`."""
    parts = file.relative_to(folder).parts
    return file.is_file() and not any(part.startswith((".", "cache-")) or part.endswith(".lock") for part in parts)


def size_and_digest(file: Path) -> list[Any]:
    """[size in bytes, SHA-256] of a file."""
    return [file.stat().st_size, file_sha256(file)]


def hub_revision(name: str) -> str:
    """The commit of a dataset on the Hub; "" if the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(name, timeout=10).sha or ""
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return ""


def record_seed_digest(run: RunDir, source: SeedDigest, rows: int) -> None:
    """Write the digest and number of the seeds to run.json."""
    write_json(run.path / "run.json", {**run.record(), "seeds": {**source, "rows": rows}})


def accept_moved_seeds(old: Recipe, new: Recipe, run: RunDir) -> Recipe:
    """The new recipe; if its seeds are the file that the run has read, at another path, with the old path.

    TapirError if the file at the old path was edited. A file that no longer exists is not compared, because the run has
    read it already. Datasets on the Hub are not checked.
    """
    kept = run.record().get("seeds")
    if not kept or "sha256" not in kept:
        return new
    moved = new.seeds.path != old.seeds.path
    found = digest_seeds(new.seeds) if seeds_exist(new.seeds) else {}
    if found.get("sha256") == kept["sha256"]:
        return new.model_copy(update={"seeds": new.seeds.model_copy(update={"path": old.seeds.path})})
    if not moved and found.get("sha256"):
        refuse_edited_seeds(run, kept, found, new.seeds)
    return new


def seeds_exist(seeds: Seeds) -> bool:
    """Whether the seeds exist on this machine."""
    try:
        return find_seeds(seeds.path) is not None
    except TapirError:
        return False


def refuse_edited_seeds(run: RunDir, kept: SeedDigest, found: SeedDigest, seeds: Seeds) -> None:
    """TapirError with the digests of the seeds before and now."""
    try:
        rows = f", {format_count(len(read_table(seeds).rows), 'row')}"
    except TapirError:
        rows = ", which cannot be read"
    was = f"{kept['bytes']:,} bytes, {format_count(kept['rows'], 'row')}, SHA-256 {kept['sha256'][:12]}"
    now = f"{found['bytes']:,} bytes{rows}, SHA-256 {found['sha256'][:12]}"
    changed = describe_changed_files(kept, found)
    raise TapirError(
        f"the seeds were edited since run {run.name!r} read them: then {was}; now {now}{changed}",
        where=str(found["path"]),
        fix="Start a new run with --name: calls that are the same are in the store and cost nothing. Or restore the "
        "seeds.",
    )


def describe_changed_files(kept: SeedDigest, found: SeedDigest, most: int = 5) -> str:
    """Name the files of a folder that were changed, added or removed; "" if there are none."""
    old, new = dict(kept.get("files", {})), dict(found.get("files", {}))
    names = sorted(name for name in old | new if list(old.get(name, ())) != list(new.get(name, ())))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"; changed: {', '.join(names[:most])}{more}" if names else ""
