"""Load llama.cpp's library, capture its log, and read its devices' free memory."""

import ctypes
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.memory import count_cpus, list_gpus, list_visible_gpus
from tapir_local.process import OWNED_VARIABLE

LLAMA_LOG: deque[str] = deque(maxlen=8)
WARNING, CONTINUED = 3, 5  # ggml.h: GGML_LOG_LEVEL_WARN (errors are 4), GGML_LOG_LEVEL_CONT
GPU = 1  # ggml-backend.h: GGML_BACKEND_DEVICE_TYPE_GPU; one that shares main memory is 2


@cache
def library() -> Any:
    """llama_cpp, with its log kept in LLAMA_LOG for the text of errors instead of printed."""
    with patient_threads():
        import llama_cpp

    llama_cpp.llama_log_set(log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@contextmanager
def patient_threads() -> Iterator[None]:
    """Make OpenMP's waiting threads sleep after a short time instead of spinning, if libgomp is loaded in this block.

    libgomp reads its settings when it is loaded; settings of the user's environment are kept. On two busy cores, the
    pocket student wrote 93 tokens per second with two spinning threads, 1,140 with two that sleep, 1,060 with one.
    """
    names = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
    if not names:
        os.environ["GOMP_SPINCOUNT"] = "1000"
    try:
        yield
    finally:
        if not names:
            del os.environ["GOMP_SPINCOUNT"]


@cache
def log_callback(llama_cpp: Any) -> Any:
    """The function that captures warnings and errors; cached, because llama.cpp calls it until the process ends.

    In a process of its own they also go to standard error, its log file: CUDA's errors precede the end of the process.
    """
    said = [0]

    def keep(level: int, text: bytes, _: Any) -> None:
        said[0] = said[0] if level == CONTINUED else level
        if said[0] in (WARNING, WARNING + 1) and text.strip():
            LLAMA_LOG.append(text.decode("utf-8", "replace").strip())
            if os.environ.get(OWNED_VARIABLE):
                print(LLAMA_LOG[-1], file=sys.stderr)

    return llama_cpp.llama_log_callback(keep)


def llama_error(what: str, where: Path, fix: str) -> TapirError:
    """A TapirError that ends with llama.cpp's last log lines."""
    log = "; ".join(LLAMA_LOG)
    return TapirError(f"{what} (llama.cpp: {log})" if log else what, where=str(where), fix=fix)


def thread_count() -> int:
    """The number of threads to use: OMP_NUM_THREADS if it is set, otherwise every core that this process may use."""
    return int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0] or count_cpus())


def has_gpu() -> bool:
    """Whether llama.cpp finds a device to compute on besides the processor.

    It counts the devices (cudaGetDeviceCount) and opens none, so no CUDA context is made.
    """
    return bool(library().llama_supports_gpu_offload())


def unused_gpu_remark() -> str:
    """The remark that a GPU is present but llama.cpp was built without CUDA; "" if there is nothing to report.

    llama.cpp is loaded only if the driver lists a GPU that is not hidden by CUDA_VISIBLE_DEVICES.
    """
    cards = list_visible_gpus()
    if not cards or has_gpu():
        return ""
    return (
        f"llama.cpp cannot use {cards[0].name}, so answers are generated on the CPU, which is much slower. Build it "
        "with CUDA: `make llama GPU=1` in the checkout; `tapir-local doctor` shows what this needs."
    )


def free_gpu_memory() -> int:
    """Bytes free on all GPUs that llama.cpp was built for, as it reports them; 0 if there is none.

    This opens a CUDA context on each, which takes 0.3 to 0.6 GB until the process ends.
    """
    if not has_gpu():
        return 0
    try:
        devices = ggml_library()
    except (ImportError, AttributeError):  # a llama-cpp-python with ggml in another place
        return sum(gpu.free for gpu in list_gpus())
    numbers = range(devices.ggml_backend_dev_count())
    return sum(free_device_memory(devices, devices.ggml_backend_dev_get(number)) for number in numbers)


@cache
def ggml_library() -> Any:
    """The functions for ggml's devices: llama-cpp-python 0.3.36 loads the library and declares none of them."""
    library()
    from llama_cpp._ggml import libggml

    libggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    libggml.ggml_backend_dev_get.argtypes, libggml.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
    libggml.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    size = ctypes.POINTER(ctypes.c_size_t)
    libggml.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size, size]
    libggml.ggml_backend_dev_memory.restype = None
    return libggml


def free_device_memory(devices: Any, device: Any) -> int:
    """Bytes free on a device; 0 if it is not a GPU with its own memory."""
    if devices.ggml_backend_dev_type(device) != GPU:
        return 0
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    devices.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return free.value
