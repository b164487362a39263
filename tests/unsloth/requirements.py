"""Print what `make test-unsloth` installs, one requirement a line; with `gpu`, the packages installed without their own
requirements.

torchvision, torchao and xformers are left out: their wheels fit one build of torch, and with another nothing can be
imported. llama-cpp-python is left out because it would be compiled.
"""

import sys
import tomllib
from pathlib import Path

# What Unsloth imports or declares, besides our own requirements. Triton's interpreter was tried in this version.
UNSLOTH_NEEDS = (
    "bitsandbytes==0.50.2",
    "triton==3.9.0",
    "cut-cross-entropy",
    "einops",
    "hf_transfer",
    "msgspec",
    "nest-asyncio",
    "pillow",
    "structlog",
    "tyro",
    "wheel",
)


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    ours = [name for name in (*project["dependencies"], *extras["test"]) if not name.startswith("llama-cpp-python")]
    print(*(extras["gpu"] if sys.argv[1:] == ["gpu"] else (*ours, *UNSLOTH_NEEDS)), sep="\n")


if __name__ == "__main__":
    main()
