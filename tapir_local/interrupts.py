"""Stop the program on SIGTERM and SIGHUP as on Ctrl-C: requests in flight finish, and what arrived is kept.

Schedulers, containers and a closed terminal send these signals. By default they end a process at once.
"""

import errno
import os
import signal
import sys
import termios
from contextlib import suppress
from types import FrameType

SIGNAL_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
RECEIVED: list[signal.Signals] = []  # those that stopped this process and are not Ctrl-C


def stop_on_signals() -> None:
    """From now on SIGTERM and SIGHUP do what Ctrl-C does. A signal that is ignored, as by `nohup`, stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A job in the background of a script. asyncio stops its tasks in order only if Python handles SIGINT, so this
        # handler is set for the other signals, and SIGINT itself is blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop_like_ctrl_c)


def stop_like_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Handle a signal as the current handler of Ctrl-C would: asyncio's while requests are sent."""
    RECEIVED.append(signal.Signals(number))
    replace_lost_terminal()
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def replace_lost_terminal() -> None:
    """Send the output to /dev/null if its terminal is gone: an error in printing would end the program too early."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            try:
                termios.tcgetattr(stream.fileno())
            except termios.error as error:
                if error.args[0] == errno.EIO:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def interrupt_reason() -> str:
    """The name of the signal that stopped the program: `Ctrl-C`, `SIGTERM` or `SIGHUP`."""
    return SIGNAL_NAMES[RECEIVED[0] if RECEIVED else signal.SIGINT]


def stop_exit_code() -> int:
    """128 and the number of the signal, as shells report it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + (RECEIVED[0] if RECEIVED else signal.SIGINT)
