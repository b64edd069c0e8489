"""Ctrl-C while modules are imported, which takes seconds: an exit code and no traceback. Imported before all else."""

from __future__ import annotations

import sys
from types import TracebackType

_told = sys.excepthook


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Of any other error all."""
    if not issubclass(kind, KeyboardInterrupt):
        _told(kind, error, traceback)


sys.excepthook = _tell
