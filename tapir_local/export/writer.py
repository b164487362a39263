"""A GGUF written block by block: what is planned, how large it will be, and the writing."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import IO, Any

from tapir_local.inference.lib import cores
from tapir_local.records import Array, Progress

# Weights of a block, 1 MB in float32, which a core's cache holds: two threads made 436 million weights of q8_0 a second
# of them, 275 of blocks of a quarter, 387 of blocks four times as large.
BLOCK = 1 << 18


@dataclass(frozen=True)
class Planned:
    """A tensor of the GGUF: its name, ggml type and shape, and how to make its rows from one to another in float32."""

    name: str
    quant: Any
    shape: tuple[int, ...]
    read: Callable[[int, int], Array]


@dataclass(frozen=True)
class Blocks:
    """A tensor that is made while it is written: what gguf.GGUFWriter asks of the array that it is given."""

    nbytes: int
    made: Iterator[Array]

    def tofile(self, file: IO[bytes]) -> None:
        """Write every block behind the other."""
        for block in self.made:
            block.tofile(file)


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
    """The file itself: what was added to gguf.GGUFWriter, then each tensor, block by block."""
    for tensor in tensors:
        shape, size = byte_shape(tensor), size_of(tensor)
        writer.add_tensor_info(tensor.name, shape, storage(tensor.quant), size, raw_dtype=tensor.quant)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ThreadPoolExecutor(cores()) as pool:
            for number, tensor in enumerate(tensors, 1):
                writer.write_tensor_data(Blocks(size_of(tensor), made(tensor, pool)))
                progress(number, len(tensors), tensor.name)
        writer.flush()
    finally:
        writer.close()


def made(tensor: Planned, pool: ThreadPoolExecutor) -> Iterator[Array]:
    """The tensor's blocks in order, in its type; the next few are in the making while one is written."""

    def make(start: int, stop: int) -> Array:
        return quantised(tensor.read(start, stop), tensor.quant)

    waiting: deque[Future[Array]] = deque()
    for start, stop in spans(tensor.shape):
        waiting.append(pool.submit(make, start, stop))
        if len(waiting) > 2 * cores():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def quantised(weight: Array, quant: Any) -> Array:
    """Weights in float32 as a ggml type.

    gguf's own `quantize` goes through them by 16 rows, in Python: a third of the speed with two threads.
    """
    from gguf import GGML_QUANT_SIZES, quants

    if quant.name in ("F32", "F16"):
        return quants.quantize(weight, quant)
    return getattr(quants, quant.name).quantize_blocks(weight.reshape(-1, GGML_QUANT_SIZES[quant][0]))


def spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """A tensor's rows in blocks of about BLOCK weights: from, up to."""
    step = max(1, BLOCK // prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
