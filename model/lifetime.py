"""How a process that trains begins and ends: its allocator, its launcher. Imports no torch, whose import is slow."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

PARENT = "PINSAGE_PARENT"
"""Environment variable with the process id of the launcher that expects its children to end with it."""
VERDICT = "PINSAGE_VERDICT"
"""Environment variable with the file in which a rank notes that to start again is no use: it would fail the same."""
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}
"""glibc keeps what large tensors leave behind for the next ones, as pages fresh from the kernel cost more than the work
done in them: steps of ml-1m took 803 ms so and 1 589 without, for 4.5 GB in place of 0.7. oneDNN's cache is by shape,
and no two batches have one; with bfloat16 memory grows all the same: 7.0 GB after 48 steps so, 8.2 with a large cache.
"""
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, so that a killed launcher leaves no trainer writing.

    parent is the process id to expect; if it ended before this call, this process ends too. None takes the one that
    PINSAGE_PARENT names, or else the present one. Linux only; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    named = os.environ.get(PARENT)
    expected = parent if parent is not None else int(named) if named else os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)


def choose_allocator() -> None:
    """Start this process again with the settings of ALLOCATOR, which are read at its start; those that are set stay."""
    if sys.platform == "linux" and not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], ALLOCATOR | dict(os.environ))


def expect_children() -> None:
    """Name this process as the one whose end its children must not outlive."""
    os.environ[PARENT] = str(os.getpid())


def give_up() -> None:
    """Have ranks that torchrun starts again end at once: what ended this one is for a person to mend."""
    if VERDICT in os.environ:
        with suppress(OSError), open(os.environ[VERDICT], "w"):
            pass


def is_given_up() -> bool:
    """Whether a rank of an earlier start has given up."""
    return os.path.exists(os.environ.get(VERDICT, ""))
