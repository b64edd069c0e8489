"""An interrupt that stays one. Imports next to nothing, as it is there before all else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_first() -> Iterator[None]:
    """Let an interrupt be one where a library that cleans up after it fails with an error of its own.

    py4j, say, is cut off from the JVM while it lets Ctrl-C through, and then asks the JVM for something else.
    """
    try:
        yield
    except Exception as error:
        if is_interrupt(error):
            raise KeyboardInterrupt from error
        raise


def is_interrupt(error: BaseException | None) -> bool:
    """Whether the error is an interrupt, or was raised while one was let through; not if it says what that was for."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        if getattr(error, "explains_interrupt", False):
            return False
        error = error.__context__
    return error is not None
