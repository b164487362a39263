"""Write a GGUF block by block: the planned tensors, their size, and the writing."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import IO, Any

from tapir_local.export.weights import FloatArray
from tapir_local.inference.lib import thread_count
from tapir_local.records import Progress

# Weights per block: 1 MB in float32, which fits a core's cache. With two threads, q8_0 ran at 436 million weights per
# second; with blocks of a quarter of the size at 275 million, with blocks four times as large at 387 million.
BLOCK_WEIGHTS = 1 << 18


# Bits per weight by the number that a row's length must be a multiple of: Q4_K or Q5_0, Q5_K or Q5_1, Q6_K or Q8_0.
K_QUANT_BITS = {"q4_k_m": {256: 4.5, 32: 5.5}, "q5_k_m": {256: 5.5, 32: 6.0}, "q6_k": {256: 6.5625, 32: 8.5}}
Q6_K_TENSORS = ("token_embd.", "output.", "attn_v.", "ffn_down.")  # in q4_k_m and q5_k_m too; some layers have less


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the GGUF: its name, ggml type and shape, and a function that reads a range of its rows in float32."""

    name: str
    quant: Any
    shape: tuple[int, ...]
    read: Callable[[int, int], FloatArray]


@dataclass(frozen=True)
class TensorBlocks:
    """A tensor that is produced while it is written: the interface that gguf.GGUFWriter expects of an array."""

    nbytes: int
    made: Iterator[FloatArray]

    def tofile(self, file: IO[bytes]) -> None:
        """Write all blocks one after another."""
        for block in self.made:
            block.tofile(file)


def file_type_number(quant: str) -> int:
    """llama.cpp's number for the type of most weights."""
    import gguf

    return int(gguf.LlamaFileType.ALL_F32 if quant == "F32" else gguf.LlamaFileType[f"MOSTLY_{quant}"])


def tensor_type(name: str, shape: tuple[int, ...], quant: Any) -> Any:
    """F32 for vectors and norms, as llama.cpp requires; F16 if a row is not a multiple of the type's block size."""
    import gguf

    if len(shape) == 1 or name.endswith("_norm.weight"):
        return gguf.GGMLQuantizationType.F32
    block = gguf.GGML_QUANT_SIZES[quant][0]
    return quant if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def storage_dtype(quant: Any) -> Any:
    """The numpy type in which gguf returns a ggml type: bytes for all types except plain floats."""
    import numpy as np

    return np.dtype({"F32": np.float32, "F16": np.float16}.get(quant.name, np.uint8))


def byte_shape(tensor: PlannedTensor) -> tuple[int, ...]:
    """The shape that GGUFWriter expects: in bytes if the type is not a plain float."""
    from gguf import quant_shape_to_byte_shape

    plain = tensor.quant.name in ("F32", "F16")
    return tensor.shape if plain else tuple(quant_shape_to_byte_shape(tensor.shape, tensor.quant))


def tensor_bytes(tensor: PlannedTensor) -> int:
    """The tensor's bytes in the file."""
    return int(prod(byte_shape(tensor))) * int(storage_dtype(tensor.quant).itemsize)


def k_quant_bytes(tensor: PlannedTensor, quant: str) -> int:
    """The most bytes that llama.cpp makes of a tensor in a k-quant (src/llama-quant.cpp).

    A k-quant needs rows of a multiple of 256 weights. Other rows get a type with blocks of 32 and more bits.
    """
    if tensor_type(tensor.name, tensor.shape, tensor.quant).name == "F32":
        return 4 * prod(tensor.shape)
    kind = "q6_k" if any(part in tensor.name for part in Q6_K_TENSORS) else quant
    bits = next((bits for size, bits in K_QUANT_BITS[kind].items() if tensor.shape[-1] % size == 0), 16)
    return round(prod(tensor.shape) * bits / 8)


def write_tensors(writer: Any, tensors: Sequence[PlannedTensor], progress: Progress) -> None:
    """Write the file: the metadata added to gguf.GGUFWriter, then each tensor block by block."""
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


def make_blocks(tensor: PlannedTensor, pool: ThreadPoolExecutor) -> Iterator[FloatArray]:
    """The tensor's blocks in order, in its type; the next few are computed while one is written."""

    def make(start: int, stop: int) -> FloatArray:
        return quantize_block(tensor.read(start, stop), tensor.quant)

    waiting: deque[Future[FloatArray]] = deque()
    for start, stop in row_spans(tensor.shape):
        waiting.append(pool.submit(make, start, stop))
        if len(waiting) > 2 * thread_count():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def quantize_block(weight: FloatArray, quant: Any) -> FloatArray:
    """Convert float32 weights to a ggml type.

    gguf's own `quantize` processes 16 rows at a time in Python, at a third of the speed with two threads.
    """
    from gguf import GGML_QUANT_SIZES, quants

    if quant.name in ("F32", "F16"):
        return quants.quantize(weight, quant)
    return getattr(quants, quant.name).quantize_blocks(weight.reshape(-1, GGML_QUANT_SIZES[quant][0]))


def row_spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of a tensor's rows, each of about BLOCK_WEIGHTS weights."""
    step = max(1, BLOCK_WEIGHTS // prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
