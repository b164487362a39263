"""Do torch and llama.cpp work in one process? python bench/gpu/together.py torch|llama STUDENT.gguf: which comes first.

On an H200, with llama.cpp built with CUDA, both orders ended by SIGSEGV; without a GPU they work. Under cuda-gdb this
shows where: cuda-gdb -batch -ex run -ex bt --args python bench/gpu/together.py torch STUDENT.gguf
"""

import sys
from pathlib import Path


def main() -> None:
    """Import both, open the GGUF on the CPU, and say how far it came."""
    if sys.argv[1] == "torch":
        import torch
    from tapir_local.inference.config import ContextConfig
    from tapir_local.inference.lib import library
    from tapir_local.inference.model import open_context, open_model

    library()
    import torch

    print(f"both are loaded: torch {torch.__version__}", flush=True)
    with open_model(Path(sys.argv[2]), on_cpu=True) as model, open_context(model, ContextConfig(256, 1)):
        print("a GGUF is open", flush=True)


if __name__ == "__main__":
    main()
