"""Check in a separate process whether the installed build of llama.cpp runs on this processor.

`python -m tapir_local.doctor.llama_check` answers one question with quantized weights. SIGILL ends that process if the
build is for another processor, or uses instructions that a virtual machine lists but cannot run (AMX).
"""

import re
import tempfile
from pathlib import Path

from tapir_local.doctor.child_check import check_fault, run_check
from tapir_local.records import Message
from tapir_local.resources import POCKET_STUDENT

CHECKED_QUANTS = ("q8_0", "q4_k_m")  # 8-bit and 4-bit blocks: their kernels differ between kinds of processor


def llama_build_fault() -> str:
    """What ended the check, such as `SIGILL` or an import error; "" if llama.cpp runs."""
    return check_fault(["-m", "tapir_local.doctor.llama_check"])


def llama_backends() -> str:
    """The backends that llama.cpp was built with, such as `CPU, CUDA`; "" if it does not say."""
    done = run_check(["-c", "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"])
    said = done.stdout.decode("utf-8", "replace") if done else ""
    return ", ".join(dict.fromkeys(re.findall(r"(\w+) : ", said)))


def run_llama_check() -> None:
    """Answer a question with each kind of quantized weights; runs in the separate process."""
    from tapir_local.export.export import export_gguf
    from tapir_local.inference.config import GenerationConfig
    from tapir_local.inference.generate import generate

    with tempfile.TemporaryDirectory() as folder:
        for quant in CHECKED_QUANTS:
            gguf = Path(folder) / f"{quant}.gguf"
            export_gguf(POCKET_STUDENT, gguf, adapter=None, quant=quant)
            generate(gguf, [(Message("user", "What is 3 + 4?"),)], GenerationConfig(max_tokens=4, context=128))


if __name__ == "__main__":
    run_llama_check()
