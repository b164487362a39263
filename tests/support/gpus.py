"""A fake nvidia-smi, for tests of what the program does on a machine with GPUs."""

from pathlib import Path

import pytest


def put_driver(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, driver: str = "580.65.06", capability: str = "8.9"
) -> None:
    """Put an nvidia-smi on the PATH that lists one GPU of 24 GB, which CUDA_VISIBLE_DEVICES does not hide.

    An empty driver or capability is a field that this nvidia-smi does not know.
    """
    tool = folder / "tools" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f"  *driver_version*) echo '{driver}' ;;\n"
        f"  *compute_cap*) echo '{capability}' ;;\n"
        "  *) echo 'NVIDIA A, 20480, 24576' ;;\n"
        "esac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
