"""Random students for the trial on a GPU: python bench/gpu/students.py OUT qwen2-1.5b gemma2-tiny ...

A name is a family and a size of bench/random_student.py, or the size `tiny`: two layers and 8,192 tokens. A family's
tokenizer is trained once and copied to its other sizes.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from random_student import SHAPES, Shape, make_student


def main() -> None:
    """Make every student that is named, and print how long each took."""
    out, first = Path(sys.argv[1]), dict[str, Path]()
    for name in sys.argv[2:]:
        began, (family, size) = time.monotonic(), name.rsplit("-", 1)
        rest = next(iter(SHAPES[family].values())).rest
        SHAPES[family]["tiny"] = Shape((256, 512, 2, 4, 2, 8192), True, rest | {"head_dim": 64})
        make_student(out / name, family, size, tokenizer=first.get(family))
        first.setdefault(family, out / name)
        print(f"{name} {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
