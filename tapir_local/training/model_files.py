"""The files of a model's folder: JSON settings, and where each tensor is in the safetensors files."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError

SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_SUFFIXES = {".json", ".jinja", ".model", ".txt"}  # of the tokenizer's files in a model's folder
COPY_AGAIN = "Download or copy the model again."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: `offset` is where its bytes start in the file, `dtype` is F32, BF16, …"""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


def read_model_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the model. Raises TapirError with the file's name if it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TapirError(
            "the file is missing",
            where=str(path),
            fix="Save model and tokenizer there with transformers' save_pretrained.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise TapirError(f"not JSON: {error}", where=str(path), fix="Save model and tokenizer again.") from error
    if not isinstance(found, dict):
        raise TapirError("not a JSON object", where=str(path), fix="Save model and tokenizer again.")
    return found


def has_safetensors(model_dir: Path) -> bool:
    """Whether the folder has weights in safetensors files."""
    return any((model_dir / name).is_file() for name in (INDEX, SINGLE_FILE))


def read_model_tensors(model_dir: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model by its name in transformers, in one or several files.

    Raises TapirError if files of the index are missing or damaged, or a tensor is not in its file.
    """
    index = model_dir / INDEX
    if not index.is_file():
        return read_header(model_dir / SINGLE_FILE)
    wanted = read_weight_map(index)
    files = sorted(set(wanted.values()))
    missing = [file for file in files if not (model_dir / file).is_file()]
    if missing:
        names = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        what = f"{len(missing)} of the model's {len(files)} weight files are missing: {names}"
        raise TapirError(what, where=str(model_dir), fix=COPY_AGAIN)
    found = {name: tensor for file in files for name, tensor in read_header(model_dir / file).items()}
    absent = [name for name in wanted if name not in found]
    if absent:
        what = f"tensor {absent[0]} is not in {wanted[absent[0]]}"
        raise TapirError(what, where=str(model_dir), fix=COPY_AGAIN)
    return found


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor. Raises TapirError if there is no map, or it names a file outside the model's folder."""
    files = read_model_json(index).get("weight_map")
    fix = "Get a complete copy of the model from a source that you trust."
    if not isinstance(files, dict) or not files:
        raise TapirError("it has no weight_map", where=str(index), fix=fix)
    odd = [file for file in files.values() if not isinstance(file, str) or not is_file_name(file)]
    if odd:
        raise TapirError(f"it names a file that is not in the model's folder: {odd[0]!r}", where=str(index), fix=fix)
    return files


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file, without a folder."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, sorted by name. Raises TapirError if it is missing, damaged or too short.

    The first 8 bytes are the length of the JSON header that follows; offsets in it count from its end.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if 8 + length > size:
                raise ValueError("the header is incomplete")
            entries = json.loads(opened.read(length))
        spans = {name: tuple(entry["data_offsets"]) for name, entry in entries.items() if name != "__metadata__"}
        found = {
            name: StoredTensor(file, 8 + length + start, entries[name]["dtype"], tuple(entries[name]["shape"]))
            for name, (start, _) in sorted(spans.items())
        }
        short = [name for name, (_, end) in spans.items() if 8 + length + end > size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TapirError(f"the weights cannot be read: {error}", where=str(file), fix=COPY_AGAIN) from error
    if short:
        raise TapirError(f"the file ends before tensor {short[0]} does", where=str(file), fix=COPY_AGAIN)
    return found


def check_same_shape(folder: Path, base: Path) -> None:
    """Raise TapirError if `folder` contains no complete model, or one of another shape than the base."""
    config = folder / "config.json"
    if not config.exists():
        what = "an adapter, not a complete model" if (folder / "adapter_config.json").exists() else "no model"
        raise TapirError(
            f"the earlier training left {what}",
            where=str(folder),
            fix="Keep train.method unchanged in a run, or set train.start to base.",
        )
    before, now = (json.loads(path.read_bytes()) for path in (config, base / "config.json"))
    for key in SHAPE_KEYS:
        if before.get(key) != now.get(key):
            what = f"the earlier model has {key} {before.get(key)}, but the student has {now.get(key)}"
            raise TapirError(what, where=str(folder), fix="Continue with the student that it was trained on.")


def copy_tokenizer_files(model: Path, out: Path) -> None:
    """Copy the student's tokenizer and template files to its trained weights, which makes a complete model."""
    for file in model.iterdir():
        if (
            file.suffix in TOKENIZER_SUFFIXES
            and not file.name.endswith(".index.json")
            and not (out / file.name).exists()
        ):
            shutil.copyfile(file, out / file.name)
