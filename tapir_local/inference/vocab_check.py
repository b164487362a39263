"""Whether llama.cpp can work with a GGUF's vocabulary, tried in another process: it ends the process over some.

`python -m tapir_local.inference.vocab_check GGUF` opens the vocabulary and tokenizes letters of every script.
"""

import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.inference.model import Advice, open_model
from tapir_local.inference.tokens import tokenized
from tapir_local.process import child_environment

STEP = 37  # of the letters up to U+FFFF: every byte that UTF-8 uses is among them


def check_vocabulary(gguf: Path, advice: Advice) -> None:
    """TapirError naming the GGUF where llama.cpp ends the process over its vocabulary.

    A GGUF that is no such, or cannot be opened, is left to whoever opens it.
    """
    if gguf.is_file():
        stat = gguf.stat()
        said = last_words(gguf, stat.st_size, stat.st_mtime_ns)
        if said:
            what = f"llama.cpp ends the process over its vocabulary: {said}"
            raise TapirError(what, where=str(gguf), fix=advice.unusable)


@lru_cache
def last_words(gguf: Path, size: int, changed: int) -> str:
    """The signal that ended the trial and its last line, "" where none did; tried once for each state of a file."""
    command = [sys.executable, "-P", "-m", "tapir_local.inference.vocab_check", str(gguf)]
    tried = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=child_environment())
    if tried.returncode >= 0:
        return ""
    lines = [line.strip() for line in tried.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return ": ".join([signal.Signals(-tried.returncode).name, *lines[-1:]])


def letters() -> str:
    """A text of many letters: all of Latin-1, some of every block, an emoji."""
    some = (chr(code) for code in range(0x100, 0x10000, STEP) if not 0xD800 <= code < 0xE000)
    return "".join(map(chr, range(0x100))) + "".join(some) + "🙂"


def main(gguf: Path) -> None:
    """The child's side."""
    try:
        with open_model(gguf, vocab_only=True) as model:
            for special in (True, False):
                tokenized(model, letters(), special=special)
    except TapirError:
        pass  # it is said by whoever opens the GGUF to work with it


if __name__ == "__main__":
    main(Path(sys.argv[1]))
