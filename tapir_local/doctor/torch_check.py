"""Ask torch in a separate process what GPU it finds: a process that imports torch must not load llama.cpp after it.

`python -m tapir_local.doctor.torch_check` prints the answer as JSON.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from tapir_local.process import child_environment
from tapir_local.training.model import old_gpu_fault

MAX_TORCH_SECONDS = 120.0  # seconds; torch takes about 5 to import, more from a slow disk


@dataclass(frozen=True)
class TorchGpu:
    """The GPU that torch uses: its name, its bytes of memory, and why it is too old, "" if it is not."""

    name: str
    total: int
    too_old: str


def find_torch_gpu() -> TorchGpu | str:
    """The GPU that torch uses; if it uses none, why its process failed, "" if it did not."""
    command = [sys.executable, "-P", "-m", "tapir_local.doctor.torch_check"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=child_environment(),
            timeout=MAX_TORCH_SECONDS,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"torch gave no answer within {MAX_TORCH_SECONDS:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"torch ended with exit code {done.returncode}"])[-1]
    found = json.loads(done.stdout.splitlines()[-1])
    return TorchGpu(**found) if found else ""


def read_torch_gpu() -> TorchGpu | str:
    """The GPU that torch uses, "" if it uses none; imports torch."""
    import torch

    if not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(0)
    old = old_gpu_fault(torch.cuda.get_device_capability(0), torch.cuda.get_arch_list(), torch.__version__)
    return TorchGpu(properties.name, properties.total_memory, old)


if __name__ == "__main__":
    gpu = read_torch_gpu()
    print(json.dumps(asdict(gpu) if isinstance(gpu, TorchGpu) else None))
