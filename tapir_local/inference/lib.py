"""llama.cpp's library: how it is loaded, what it logs, its devices and their memory."""

import ctypes
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.memory import count_cpus, list_gpus

LOG: deque[str] = deque(maxlen=8)
WARNING, CONTINUED = 3, 5  # ggml.h: GGML_LOG_LEVEL_WARN (errors are 4), GGML_LOG_LEVEL_CONT
GPU = 1  # ggml-backend.h: GGML_BACKEND_DEVICE_TYPE_GPU; one that shares main memory is 2


@cache
def library() -> Any:
    """llama_cpp, with what it logs kept in LOG for a TapirError's text instead of printed."""
    with patient_threads():
        import llama_cpp

    llama_cpp.llama_log_set(log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@contextmanager
def patient_threads() -> Iterator[None]:
    """Let threads that OpenMP starts from here on sleep soon when they wait, instead of spinning.

    libgomp reads its settings when it is loaded; an environment that names its own is left alone. On two cores that
    others were using, the pocket student wrote 93 tokens a second with two spinning threads, 1,140 so, 1,060 with one.
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
    """Cached, for llama.cpp calls it as long as the process lives."""
    said = [0]

    def keep(level: int, text: bytes, _: Any) -> None:
        said[0] = said[0] if level == CONTINUED else level
        if said[0] in (WARNING, WARNING + 1) and text.strip():
            LOG.append(text.decode("utf-8", "replace").strip())

    return llama_cpp.llama_log_callback(keep)


def failure(what: str, where: Path, fix: str) -> TapirError:
    """A TapirError that ends with llama.cpp's last words."""
    words = "; ".join(LOG)
    return TapirError(f"{what} (llama.cpp: {words})" if words else what, where=str(where), fix=fix)


def cores() -> int:
    """Threads to use: OMP_NUM_THREADS where it is set, otherwise every core that this process may use."""
    return int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0] or count_cpus())


def gpu_memory() -> int:
    """Bytes free on all GPUs that llama.cpp was built for together, by its own reckoning; 0 without one."""
    if not library().llama_supports_gpu_offload():
        return 0
    try:
        devices = ggml()
    except (ImportError, AttributeError):  # a llama-cpp-python that shows ggml elsewhere
        return sum(gpu.free for gpu in list_gpus())
    numbers = range(devices.ggml_backend_dev_count())
    return sum(free_on(devices, devices.ggml_backend_dev_get(number)) for number in numbers)


@cache
def ggml() -> Any:
    """ggml's devices: llama-cpp-python 0.3.36 loads the library and names none of its functions."""
    library()
    from llama_cpp._ggml import libggml

    libggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    libggml.ggml_backend_dev_get.argtypes, libggml.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
    libggml.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    size = ctypes.POINTER(ctypes.c_size_t)
    libggml.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size, size]
    libggml.ggml_backend_dev_memory.restype = None
    return libggml


def free_on(devices: Any, device: Any) -> int:
    """Bytes free on a device, 0 where it has no memory of its own."""
    if devices.ggml_backend_dev_type(device) != GPU:
        return 0
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    devices.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return free.value
