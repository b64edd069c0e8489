"""This machine: how much memory it has, and its files, block by block, with the page cache or past it.

A night's embeddings are written once, and read by another stage or the next night. Where they are a good part of the
host's memory, their copies in the page cache drive out what is read over and over, and making them is work: on a
virtual machine, whose host gives it a page at the first touch, a GB written costs 0.4 to 1.5 core-seconds, past the
cache (O_DIRECT) 0.2, and half the time. Blocks are on their way to or from the disk while others are looked at.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np

_REMOTE = ("nfs", "cifs", "smb", "fuse", "lustre", "ceph", "gpfs", "9p", "afs", "glusterfs", "beegfs")
"""File systems whose every page would be fetched from another machine."""
_LARGE = 1 << 20
_PIECE, _BLOCK = 1 << 20, 1 << 22
"""Bytes that are moved at a time: where they pass a buffer a processor's own cache holds them, else more."""
_PAGE = mmap.PAGESIZE
_DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What a file system answers that does not know O_DIRECT."""


def physical_memory() -> int:
    """Bytes of this host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def write(path: str, data: memoryview, lasting: bool = True, read_soon: bool = True) -> str:
    """Write a new file; its SHA-256 in hex, made while the processor has the bytes at hand.

    lasting: it is on the disk then. Of a large file that lasts and will not be read soon, no more is in the page cache
    than was before. Raises OSError.
    """
    if lasting and not read_soon and _is_direct(path, len(data)):
        checksum = _write_past_cache(path, data)
        if checksum is not None:
            return checksum
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        _reserve(file.fileno(), len(data))
        for first in range(0, len(data), _PIECE):
            left = data[first : first + _PIECE]
            digest.update(left)
            while left := left[file.write(left) or 0 :]:
                pass
        if lasting:
            os.fsync(file.fileno())
    return digest.hexdigest()


def read(path: str, look: Callable[[memoryview], object], persist: Callable[[Callable[[], None]], None]) -> memoryview:
    """All of a file, to be changed; look is shown block after block, all but the last of a multiple of a page.

    A large file of ours that the page cache has not, it will not have afterwards. persist calls what reads a block,
    again if it likes. Raises OSError.
    """
    with _opened(path, os.O_RDONLY) as file:
        size = os.fstat(file).st_size
        data = _aligned(size)
        past = _open_past_cache(path) if _is_direct(path, size) and not is_cached(file, size) else None
        if past is not None:
            try:
                return _read_ahead(past, file, data, size, look, persist)
            finally:
                os.close(past)
        for first in range(0, size, _PIECE):
            stop = min(first + _PIECE, size)
            persist(partial(_fill, file, data[first:stop], first, stop - first))
            look(data[first:stop])
    return data[:size]


def is_on_this_host(path: str) -> bool:
    """Whether the file system that holds a path is of a disk of this machine, as far as /proc tells."""
    device = os.stat(path).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            if before.split()[2] == name:
                return not after.split()[0].startswith(_REMOTE)
    return True


def _is_direct(path: str, size: int) -> bool:
    return bool(
        _DIRECT and size >= _LARGE and sys.platform == "linux" and is_on_this_host(os.path.dirname(path) or ".")
    )


def is_cached(file: int, size: int) -> bool:
    """Whether most of an open file's pages are in the page cache. Of Linux; the file is not empty."""
    found = np.ones(-(-size // _PAGE), np.uint8)
    with suppress(OSError, ValueError), mmap.mmap(file, size, prot=mmap.PROT_READ) as mapped:
        pages = np.frombuffer(mapped, np.uint8)
        ctypes.CDLL(None).mincore(ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(size), found.ctypes)
        del pages
    return bool(2 * np.count_nonzero(found & 1) > len(found))


def _write_past_cache(path: str, data: memoryview) -> str | None:
    """The SHA-256; None, with no file, where the file system does not know O_DIRECT."""
    digest, in_place = hashlib.sha256(), not np.frombuffer(data, np.uint8).ctypes.data % _PAGE
    size = _BLOCK if in_place else _PIECE
    buffers = [memoryview(mmap.mmap(-1, size)) for _ in range(2)]
    try:
        with (
            _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _DIRECT) as file,
            ThreadPoolExecutor(1) as behind,
        ):
            _reserve(file, len(data))
            writing = behind.submit(lambda: None)
            for number, first in enumerate(range(0, len(data), size)):
                block = moved = data[first : first + size]
                if not in_place or len(block) % _PAGE:
                    buffer = buffers[number % 2]
                    buffer[: len(block)] = block
                    moved = buffer[: -(-len(block) // _PAGE) * _PAGE]
                digest.update(block)
                writing.result()
                writing = behind.submit(_drain, file, moved, first)
            writing.result()
            os.ftruncate(file, len(data))
            os.fsync(file)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        with suppress(FileNotFoundError):
            os.remove(path)
        return None
    return digest.hexdigest()


def _read_ahead(
    past: int, file: int, data: memoryview, size: int, look: Callable[[memoryview], object],
    persist: Callable[[Callable[[], None]], None],
) -> memoryview:  # fmt: skip
    """A file past the page cache, opened so and as usual, each block while the one before is looked at."""

    def block(first: int) -> None:
        stop = min(first + _BLOCK, size)
        room, size_of_block = data[first : -(-stop // _PAGE) * _PAGE], stop - first
        try:
            _fill(past, room, first, size_of_block)
        except OSError:
            persist(partial(_fill, file, room[:size_of_block], first, size_of_block))

    with ThreadPoolExecutor(1) as ahead:
        reading = ahead.submit(block, 0)
        for first in range(0, size, _BLOCK):
            reading.result()
            if first + _BLOCK < size:
                reading = ahead.submit(block, first + _BLOCK)
            look(data[first : min(first + _BLOCK, size)])
    return data[:size]


def _aligned(size: int) -> memoryview:
    """Room for that many bytes in whole pages."""
    room = np.empty(-(-size // _PAGE) * _PAGE + _PAGE, np.uint8)
    start = -room.ctypes.data % _PAGE
    return room[start : start + len(room) - _PAGE].data


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    file = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _open_past_cache(path: str) -> int | None:
    """To be read; None where the file system does not know O_DIRECT."""
    try:
        return os.open(path, os.O_RDONLY | _DIRECT | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return None


def _fill(file: int, room: memoryview, place: int, size: int) -> None:
    """Read so many bytes from a place of a file on, and what of the room is left if there is more."""
    done = 0
    while done < size:
        count = os.preadv(file, [room[done:]], place + done)
        if not count:
            raise OSError("it became shorter while it was read")
        done += count


def _drain(file: int, block: memoryview, place: int) -> None:
    while block:
        count = os.pwrite(file, block, place)
        block, place = block[count:], place + count


def _reserve(file: int, size: int) -> None:
    """Ask the system for a large file's place on disk at once, where it can: writing takes two thirds of the time."""
    if size >= _LARGE and sys.platform == "linux":
        setting: Any = getattr(ctypes.CDLL(None), "fallocate", None)
        if setting is not None:
            setting(file, 0, ctypes.c_long(0), ctypes.c_long(size))
