"""Copies of a GGUF with other metadata or other tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REMOVED = object()


def metadata_of(gguf: Path) -> dict[str, Any]:
    """Every key of a GGUF except the reader's own."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


def tensors_of(gguf: Path) -> dict[str, Any]:
    """The ReaderTensor of every tensor by name."""
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}


def copy_gguf(
    source: Path,
    out: Path,
    changes: Mapping[str, Any] | None = None,
    rename: Callable[[str], str | None] = lambda name: name,
) -> Path:
    """Write a copy: `changes` sets keys or removes them (REMOVED); `rename` gives a tensor's name, None leaves it out.

    The keys of the architecture follow `general.architecture`.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader, changes = GGUFReader(source), dict(changes or {})
    old = reader.fields["general.architecture"].contents()
    new = changes.pop("general.architecture", old)
    writer = GGUFWriter(out, new)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in changes:
            continue
        name = new + key.removeprefix(old) if key.startswith(old + ".") else key
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for key, value in changes.items():
        if value is not REMOVED:
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        name = rename(tensor.name)
        if name is not None:
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
