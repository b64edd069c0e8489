"""What a person starts: the commands of `pinsage`, and scripts for spark-submit and torchrun."""

from __future__ import annotations

import sys
from types import TracebackType

_told = sys.excepthook


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Of an interrupt nothing but the exit code: one that comes while modules are imported, which takes seconds."""
    if not issubclass(kind, KeyboardInterrupt):
        _told(kind, error, traceback)


sys.excepthook = _tell
