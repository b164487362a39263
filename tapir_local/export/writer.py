"""A GGUF written block by block: what is planned, how large it will be, and the writing."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import IO, Any

from tapir_local.inference.lib import thread_count
from tapir_local.process import Progress

Array = Any  # numpy.ndarray; numpy is imported where it is used
# Weights of a block, 1 MB in float32, which a core's cache holds: two threads made 436 million weights of q8_0 a second
# of them, 275 of blocks of a quarter, 387 of blocks four times as large.
BLOCK_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the GGUF: its name, ggml type and shape, and how to make its rows from one to another in float32."""

    name: str
    quant: Any
    shape: tuple[int, ...]
    read: Callable[[int, int], Array]


@dataclass(frozen=True)
class TensorBlocks:
    """A tensor that is made while it is written: what gguf.GGUFWriter asks of the array that it is given."""

    nbytes: int
    make_blocks: Iterator[Array]

    def tofile(self, file: IO[bytes]) -> None:
        """Write every block behind the other."""
        for block in self.made:
            block.tofile(file)


def file_type_number(quant: str) -> int:
    """llama.cpp's number for what most of the weights are."""
    import gguf

    return int(gguf.LlamaFileType.ALL_F32 if quant == "F32" else gguf.LlamaFileType[f"MOSTLY_{quant}"])


def tensor_type(name: str, shape: tuple[int, ...], quant: Any) -> Any:
    """Vectors and norms in F32, as llama.cpp wants them; F16 where a row is no whole number of the type's blocks."""
    import gguf

    if len(shape) == 1 or name.endswith("_norm.weight"):
        return gguf.GGMLQuantizationType.F32
    block = gguf.GGML_QUANT_SIZES[quant][0]
    return quant if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def storage_dtype(quant: Any) -> Any:
    """The numpy type in which gguf hands over a ggml type: bytes for all but plain floats."""
    import numpy as np

    return np.dtype({"F32": np.float32, "F16": np.float16}.get(quant.name, np.uint8))


def byte_shape(tensor: PlannedTensor) -> tuple[int, ...]:
    """The shape as GGUFWriter wants it: of bytes where the type is not a plain float."""
    from gguf import quant_shape_to_byte_shape

    plain = tensor.quant.name in ("F32", "F16")
    return tensor.shape if plain else tuple(quant_shape_to_byte_shape(tensor.shape, tensor.quant))


def tensor_bytes(tensor: PlannedTensor) -> int:
    """Bytes of the tensor in the file."""
    return int(prod(byte_shape(tensor))) * int(storage_dtype(tensor.quant).itemsize)


def write_tensors(writer: Any, tensors: Sequence[PlannedTensor], progress: Progress) -> None:
    """The file itself: what was added to gguf.GGUFWriter, then each tensor, block by block."""
    for tensor in tensors:
        shape, size = byte_shape(tensor), tensor_bytes(tensor)
        writer.add_tensor_info(tensor.name, shape, storage_dtype(tensor.quant), size, raw_dtype=tensor.quant)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ThreadPoolExecutor(thread_count()) as pool:
            for number, tensor in enumerate(tensors, 1):
                writer.write_tensor_data(TensorBlocks(tensor_bytes(tensor), make_blocks(tensor, pool)))
                progress(number, len(tensors), tensor.name)
        writer.flush()
    finally:
        writer.close()


def make_blocks(tensor: PlannedTensor, pool: ThreadPoolExecutor) -> Iterator[Array]:
    """The tensor's blocks in order, in its type; the next few are in the making while one is written."""

    def make(start: int, stop: int) -> Array:
        return quantize_block(tensor.read(start, stop), tensor.quant)

    waiting: deque[Future[Array]] = deque()
    for start, stop in row_spans(tensor.shape):
        waiting.append(pool.submit(make, start, stop))
        if len(waiting) > 2 * thread_count():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def quantize_block(weight: Array, quant: Any) -> Array:
    """Weights in float32 as a ggml type.

    gguf's own `quantize` goes through them by 16 rows, in Python: a third of the speed with two threads.
    """
    from gguf import GGML_QUANT_SIZES, quants

    if quant.name in ("F32", "F16"):
        return quants.quantize(weight, quant)
    return getattr(quants, quant.name).quantize_blocks(weight.reshape(-1, GGML_QUANT_SIZES[quant][0]))


def row_spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """A tensor's rows in blocks of about BLOCK weights: from, up to."""
    step = max(1, BLOCK_WEIGHTS // prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
