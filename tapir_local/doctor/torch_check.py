"""Ask torch in a separate process what GPU it finds: a process that imports torch must not load llama.cpp after it.

`python -m tapir_local.doctor.torch_check` prints the answer as JSON.
"""

import json
from dataclasses import asdict, dataclass

from tapir_local.doctor.child_check import CHECK_TIMEOUT, run_check
from tapir_local.training.model import old_gpu_fault


@dataclass(frozen=True)
class TorchGpu:
    """The GPU that torch uses: its name, its bytes of memory, and why it is too old, "" if it is not."""

    name: str
    total: int
    too_old: str


def find_torch_gpu() -> TorchGpu | str:
    """The GPU that torch uses; if it uses none, why its process failed, "" if it did not."""
    done = run_check(["-m", "tapir_local.doctor.torch_check"])
    if done is None:
        return f"torch gave no answer within {CHECK_TIMEOUT:.0f} s"
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return (lines or [f"torch ended with exit code {done.returncode}"])[-1]
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
