"""Ctrl-C while modules are imported, which takes seconds: an exit code and no traceback. Imported before all else.

Earlier than that Python itself prints one. What our processes start is started with interrupts held back therefore, and
is interrupted when it imports this module.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from pipeline.contracts.interrupts import is_interrupt

_told = sys.excepthook


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Of any other error all."""
    if not is_interrupt(error):
        _told(kind, error, traceback)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold interrupts back from this thread and from the processes that it starts in the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


sys.excepthook = _tell
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
