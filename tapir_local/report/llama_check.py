"""Whether llama.cpp, as it was built, runs on this processor: tried in a process of its own.

`python -m tapir_local.report.llama_check` answers one question with quantized weights. A build for another processor,
or one that uses instructions that a virtual machine lists and cannot run (AMX), ends that process with SIGILL.
"""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tapir_local.process import child_environment
from tapir_local.records import Message
from tapir_local.resources import POCKET_STUDENT

QUANTS = ("q8_0", "q4_k_m")  # the blocks of 8 and of 4 bits, whose products are written for each kind of processor
LONGEST = 120.0  # seconds; it takes about 4


def fault_of_build() -> str:
    """What ended the trial, such as `SIGILL` or an import's error; "" where llama.cpp runs."""
    command = [sys.executable, "-P", "-m", "tapir_local.report.llama_check"]
    try:
        tried = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=child_environment(),
            timeout=LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {LONGEST:.0f} s"
    if tried.returncode < 0:
        return signal.Signals(-tried.returncode).name
    lines = tried.stderr.decode("utf-8", "replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "failed") if tried.returncode else ""


def main() -> None:
    """The child's side: answer with each kind of quantized weights."""
    from tapir_local.export.export import export_gguf
    from tapir_local.inference.generate import generate

    with tempfile.TemporaryDirectory() as folder:
        for quant in QUANTS:
            gguf = Path(folder) / f"{quant}.gguf"
            export_gguf(POCKET_STUDENT, gguf, adapter=None, quant=quant)
            generate(gguf, [(Message("user", "What is 3 + 4?"),)], max_tokens=4, context=128)


if __name__ == "__main__":
    main()
