"""Check in a child process whether llama.cpp can read a GGUF's vocabulary: it ends the process over some.

`python -m tapir_local.inference.vocab_check GGUF` opens the vocabulary and tokenizes letters of every script.
"""

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.inference.model import Advice, open_model
from tapir_local.inference.tokens import tokenize_text
from tapir_local.process import child_environment, signal_and_last_line

LETTER_STEP = 37  # every 37th letter up to U+FFFF: together they have every byte that UTF-8 uses


def check_vocabulary(gguf: Path, advice: Advice) -> None:
    """TapirError naming the GGUF if llama.cpp ends the process over its vocabulary.

    A file that is not a GGUF, or cannot be opened, gives no error here: opening it gives one.
    """
    if gguf.is_file():
        stat = gguf.stat()
        message = crash_message(gguf, stat.st_size, stat.st_mtime_ns)
        if message:
            what = f"llama.cpp ends the process over its vocabulary: {message}"
            raise TapirError(what, where=str(gguf), fix=advice.unusable)


@lru_cache
def crash_message(gguf: Path, size: int, changed: int) -> str:
    """The signal that ended the child process and its last line; "" if none did. Run once per version of a file."""
    command = [sys.executable, "-P", "-m", "tapir_local.inference.vocab_check", str(gguf)]
    tried = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=child_environment())
    ended_by, last_line = signal_and_last_line(tried.returncode, tried.stderr)
    return ": ".join(filter(None, [ended_by, last_line])) if ended_by else ""


def sample_letters() -> str:
    """A text of many letters: all of Latin-1, some of every block, an emoji."""
    some = (chr(code) for code in range(0x100, 0x10000, LETTER_STEP) if not 0xD800 <= code < 0xE000)
    return "".join(map(chr, range(0x100))) + "".join(some) + "🙂"


def read_vocabulary(gguf: Path) -> None:
    """The work of the child process."""
    try:
        with open_model(gguf, vocab_only=True) as model:
            for special in (True, False):
                tokenize_text(model, sample_letters(), special=special)
    except TapirError:
        pass  # opening the GGUF to work with it gives the same error


if __name__ == "__main__":
    read_vocabulary(Path(sys.argv[1]))
