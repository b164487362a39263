"""A pretended GPU for the training process: Unsloth's own GPU code then runs on a CPU.

Python imports this file when it starts, if the folder is on PYTHONPATH. Functions of torch.cuda return fixed answers,
the device "cuda" becomes the CPU, and Triton's interpreter runs Unsloth's kernels, one program of a grid after another.

What this cannot show, and what therefore needs a GPU:
- bf16, which the interpreter computes wrongly, so trainings use f16; 8-bit Adam, and qlora's 4-bit kernels;
- torch.compile and the kernels that it makes (UNSLOTH_COMPILE_DISABLE), flash and flex attention, xformers;
- Unsloth's gradient checkpointing with offloading to main memory, as it copies between two memories;
- anything of CUDA: memory and its lack, streams, several cards, compiled Triton kernels, speed.
"""

import os
import sys
from types import SimpleNamespace
from typing import Any

GIB = 1 << 30
VARIABLES = {
    "TRITON_INTERPRET": "1",
    "TRITON_LIBCUDA_PATH": "/",  # otherwise Unsloth, as root, runs ldconfig to find libcuda
    "UNSLOTH_COMPILE_DISABLE": "1",
    "UNSLOTH_ENABLE_FLEX_ATTENTION": "0",  # it has no backward pass on a CPU
    "HF_DEACTIVATE_ASYNC_LOAD": "1",  # a TorchFunctionMode holds for one thread only
}
ANSWERS = {
    "is_available": True,
    "is_initialized": True,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "get_device_name": "CPU",
    "get_device_capability": (9, 0),
    "get_arch_list": ["sm_90"],
    "is_bf16_supported": True,
    "get_device_properties": SimpleNamespace(
        name="CPU", total_memory=8 * GIB, is_integrated=False, major=9, minor=0, multi_processor_count=1
    ),
    "mem_get_info": (8 * GIB, 8 * GIB),
    "memory_allocated": GIB,
    "memory_reserved": GIB,
    "max_memory_allocated": GIB,
    "max_memory_reserved": GIB,
    "memory_stats": {},
    "reset_peak_memory_stats": None,
    "synchronize": None,
    "empty_cache": None,
}


def pretend_gpu() -> None:
    """Give this process a GPU."""
    os.environ.update(VARIABLES)
    import torch
    from torch.overrides import TorchFunctionMode
    from triton import language
    from triton.runtime.interpreter import interpreter_semantic

    cast = language.cast  # Unsloth keeps a reference to it, which the interpreter does not replace
    language.cast = lambda *args, **more: cast(*args, **{"_semantic": interpreter_semantic, **more})
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    for name in ("get_rng_state", "set_rng_state"):  # for checkpoints, which also keep the CPU's
        setattr(torch.cuda.random, name, lambda *_: None)
    torch._C._cuda_getCurrentRawStream = lambda *_: 0  # type: ignore[attr-defined]

    class OnCpu(TorchFunctionMode):
        """Replaces the GPU by the CPU in every call of torch."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = {name: on_cpu(value) if name == "device" else value for name, value in (kwargs or {}).items()}
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            if func is torch.device and args and type(args[0]) is int:
                return torch.device("cpu", 0)
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.to:
                args = (args[0], *map(on_cpu, args[1:2]), *args[2:])
            return func(*args, **kwargs)

    def on_cpu(device: Any) -> Any:
        gpu = type(device) is int or str(device).startswith("cuda")
        return "cpu" if gpu and isinstance(device, int | str | torch.device) else device

    OnCpu().__enter__()


if "tapir_local.training.train" in sys.orig_argv:
    pretend_gpu()
