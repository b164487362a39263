"""A GGUF written tensor by tensor: what is planned, how large it will be, and the writing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tapir_local.process import Progress

Array = Any  # numpy.ndarray; numpy is imported where it is used


@dataclass(frozen=True)
class Planned:
    """A tensor of the GGUF: its name, ggml type and shape, and how to make it in float32."""

    name: str
    quant: Any
    shape: tuple[int, ...]
    read: Callable[[], Array]


def file_type(quant: str) -> int:
    """llama.cpp's number for what most of the weights are."""
    import gguf

    return int(gguf.LlamaFileType.ALL_F32 if quant == "F32" else gguf.LlamaFileType[f"MOSTLY_{quant}"])


def type_of(name: str, shape: tuple[int, ...], quant: Any) -> Any:
    """Vectors and norms in F32, as llama.cpp wants them; F16 where a row is no whole number of the type's blocks."""
    import gguf

    if len(shape) == 1 or name.endswith("_norm.weight"):
        return gguf.GGMLQuantizationType.F32
    block = gguf.GGML_QUANT_SIZES[quant][0]
    return quant if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def storage(quant: Any) -> Any:
    """The numpy type in which gguf hands over a ggml type: bytes for all but plain floats."""
    import numpy as np

    return np.dtype({"F32": np.float32, "F16": np.float16}.get(quant.name, np.uint8))


def byte_shape(tensor: Planned) -> tuple[int, ...]:
    """The shape as GGUFWriter wants it: of bytes where the type is not a plain float."""
    from gguf import quant_shape_to_byte_shape

    plain = tensor.quant.name in ("F32", "F16")
    return tensor.shape if plain else tuple(quant_shape_to_byte_shape(tensor.shape, tensor.quant))


def size_of(tensor: Planned) -> int:
    """Bytes of the tensor in the file."""
    return int(prod(byte_shape(tensor))) * int(storage(tensor.quant).itemsize)


def write_tensors(writer: Any, tensors: Sequence[Planned], progress: Progress) -> None:
    """The file itself: what was added to gguf.GGUFWriter, then each tensor as it is made, and nothing of it kept."""
    from gguf import quants

    for tensor in tensors:
        shape, size = byte_shape(tensor), size_of(tensor)
        writer.add_tensor_info(tensor.name, shape, storage(tensor.quant), size, raw_dtype=tensor.quant)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, tensor in enumerate(tensors, 1):
            writer.write_tensor_data(quants.quantize(tensor.read(), tensor.quant))
            progress(number, len(tensors), tensor.name)
        writer.flush()
    finally:
        writer.close()
