"""Tokens per second on one GPU with a random Llama of 7B shape, compared with llama-cpp-python and llama-batched-bench.

    CMAKE_ARGS="-DGGML_CUDA=on -DLLAVA_BUILD=OFF" pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    python bench/gpu_generate.py [--batched-bench PATH] [--parallel 64] [--prompt-tokens 128] [--max-tokens 128]
        [--vocabulary 32000] [--choose device|numpy|both]

The GGUF is written directly, with random q8_0 tensors (7.2 GB on disk, deleted at the end); it needs a GPU of 24 GB. If
llama.cpp was not built for a GPU, the script says so and ends; --cpu measures anyway, and --layers and --hidden make
the model smaller for it. Other options are those of bench/generate.py.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tapir_local.inference.lib import free_gpu_memory, library
from tapir_local.memory import check_disk_space, format_bytes, list_gpus

BENCH = Path(__file__).parent / "generate.py"
VOCABULARY, HEAD, BLOCK = 32_000, 128, 34  # bytes of a q8_0 block of 32 numbers: a scale in f16, 32 numbers in int8


def main() -> None:
    """Make the model, say what the GPU is, and measure."""
    options, passed = arguments()
    library()
    if not free_gpu_memory() and not options.cpu:
        sys.exit("This llama.cpp knows no GPU: build llama-cpp-python with CMAKE_ARGS=-DGGML_CUDA=on.")
    for gpu in list_gpus():
        print(f"{gpu.name}: {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        gguf = Path(folder) / f"llama-{options.layers}x{options.hidden}-q8_0.gguf"
        check_disk_space(gguf, 9 * 10**9 if options.layers == 32 else 10**9, "the random model")
        write_model(gguf, options.layers, options.hidden, options.vocabulary)
        print(f"{gguf.name}: {format_bytes(gguf.stat().st_size)}", flush=True)
        words = [sys.executable, str(BENCH), str(gguf), *([] if options.cpu else ["--gpu"]), *passed]
        sys.exit(subprocess.run(words).returncode)


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, and those that are passed on to bench/generate.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--folder", type=Path, help="folder for the model; default: a temporary folder")
    parser.add_argument("--cpu", action="store_true")
    options, passed = parser.parse_known_args()
    defaults = {"--parallel": 64, "--prompt-tokens": 128, "--max-tokens": 128, "--loop-prompts": 4}
    missing = [(name, str(value)) for name, value in defaults.items() if name not in passed]
    return options, [*passed, *(word for pair in missing for word in pair)]


def write_model(path: Path, layers: int, hidden: int, vocabulary: int = VOCABULARY) -> None:
    """A Llama 2 of this shape with random weights, tensor by tensor."""
    import gguf
    import numpy as np

    inner = 11_008 * hidden // 4096 // 32 * 32
    writer = gguf.GGUFWriter(path, "llama")
    write_settings(writer, layers, hidden, inner)
    write_vocabulary(writer, vocabulary)
    quantised = matrices(layers, hidden, inner, vocabulary)
    norms = [f"blk.{layer}.{name}_norm.weight" for layer in range(layers) for name in ("attn", "ffn")]
    for name, (rows, columns) in quantised.items():
        bytes_of_row = columns // 32 * BLOCK
        writer.add_tensor_info(
            name, (rows, bytes_of_row), np.dtype(np.uint8), rows * bytes_of_row, gguf.GGMLQuantizationType.Q8_0
        )
    for name in (*norms, "output_norm.weight"):
        writer.add_tensor_info(name, (hidden,), np.dtype(np.float32), 4 * hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    chance = np.random.default_rng(0)
    for rows, columns in quantised.values():
        writer.write_tensor_data(random_blocks(chance, rows, columns))
    for _ in range(len(norms) + 1):
        writer.write_tensor_data(np.ones(hidden, dtype=np.float32))
    writer.close()


def write_settings(writer: Any, layers: int, hidden: int, inner: int) -> None:
    """Write the metadata from which llama.cpp reads the shape."""
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(hidden // HEAD)
    writer.add_head_count_kv(hidden // HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)


def write_vocabulary(writer: Any, size: int) -> None:
    """Write tokens with texts, so that a rival can detokenize its answers."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (size - 259)]  # gguf.TokenType: unknown, control, bytes, normal
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *(f"▁w{number}" for number in range(size - 259))])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def matrices(layers: int, hidden: int, inner: int, vocabulary: int = VOCABULARY) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every matrix, by llama.cpp's name."""
    found = {"token_embd.weight": (vocabulary, hidden), "output.weight": (vocabulary, hidden)}
    for layer in range(layers):
        square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (hidden, hidden))
        shapes = {**square, "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in shapes.items()}
    return found


def random_blocks(chance: Any, rows: int, columns: int) -> Any:
    """q8_0 blocks: integers from -127 to 127 and a scale that keeps products of rows at about 1."""
    import numpy as np

    blocks = np.empty((rows, columns // 32, BLOCK), dtype=np.uint8)
    blocks[:, :, 2:] = chance.integers(0, 256, (rows, columns // 32, 32), dtype=np.uint8)
    blocks[:, :, :2] = np.array([1 / 74 / columns**0.5], dtype=np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


if __name__ == "__main__":
    main()
