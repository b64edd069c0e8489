"""Conditional writes: an object is written only while what lies there is what the writer last saw.

Of two writers who saw the same, one wins. S3: `If-None-Match` and `If-Match` with the entity tag; Google's store:
`ifGenerationMatch`; local disks: an flock on a file of the folder, which the kernel lets go of when its holder dies,
and a rename; `memory://`: a lock of the process. Other protocols are refused: nothing there decides who was first.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from pipeline.contracts.errors import StorageError

Put = Callable[[Any, str, "str | None", bytes], None]
"""Writes an object on condition that it has a mark (None: that there is none)."""
_MEMORY = threading.Lock()
_REFUSALS = {"PreconditionFailed", "412"}


def write_if(filesystem: Any, full: str, expected: bytes | None, data: bytes, write: Callable[[], object]) -> bool:
    """Store data at full if expected (None: nothing) lies there now; whether it did. write is the plain, whole write.

    Contents must never repeat, as a network may lose the answer to a write that was done: tried again it is refused,
    and known as done by what then lies there. Raises StorageError for a protocol that has no such write.
    """
    protocols = protocols_of(filesystem)
    put = _puts(protocols)
    if put is not None:
        return _put(filesystem, full, expected, data, put)
    if not protocols & {"file", "local", "memory"}:
        raise StorageError(
            f"{full}: {'/'.join(sorted(protocols))} has no write that depends on what lies there, so nothing would "
            "decide which of two publishers wins; keep resources.site on s3, gs or a file system of this machine"
        )
    with _MEMORY if "memory" in protocols else _folder_lock(full.rpartition("/")[0]):
        if _read(filesystem, full) != expected:
            return False
        write()
        return True


def check(filesystem: Any, full: str) -> None:
    """Raise StorageError if the store writes although a condition does not hold, as some that speak S3 do.

    Leaves an object at full, or none.
    """
    put = _puts(protocols_of(filesystem))
    if put is None:
        return  # a lock decides, or write_if refuses
    put(filesystem, full, None, b"first")
    first = _mark(filesystem, full)
    put(filesystem, full, first, b"second")
    for mark in (None, first):
        try:
            put(filesystem, full, mark, b"third")
        except OSError as error:
            if not _refused(error):
                raise
        else:
            raise StorageError(
                f"{full}: the store writes although the condition of the write (If-None-Match, If-Match or generation) "
                "does not hold, so two publishers could both win; keep resources.site on a store that heeds it"
            )


def protocols_of(filesystem: Any) -> set[str]:
    """The names that a file system goes by."""
    return {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)


def _puts(protocols: set[str]) -> Put | None:
    if protocols & {"s3", "s3a"}:
        return _put_s3
    return _put_gs if protocols & {"gs", "gcs"} else None


def _mark(filesystem: Any, full: str) -> str:
    """What the store calls this content of the object."""
    filesystem.invalidate_cache()
    info = filesystem.info(full)
    mark = info.get("ETag") or info.get("generation")
    if not mark:
        raise StorageError(f"{full}: the store gives it no ETag or generation, so it cannot be replaced safely")
    return str(mark)


@contextmanager
def _folder_lock(folder: str) -> Iterator[None]:
    """Held by one writer of this folder at a time, among threads, processes and, on a share with locks, hosts."""
    os.makedirs(folder, exist_ok=True)
    handle = os.open(f"{folder}/.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _put(filesystem: Any, full: str, expected: bytes | None, data: bytes, put: Put) -> bool:
    """Read the mark of what lies there, see that it is what is expected, and put on condition that it has that mark.

    The mark is read before the content: if another write falls between, the mark is old and the put is refused.
    """
    try:
        mark = None if expected is None else _mark(filesystem, full)
        found = None if expected is None else _read(filesystem, full)
        if found != expected:
            return found == data
        put(filesystem, full, mark, data)
        return True
    except FileNotFoundError:  # what was expected is gone; a bucket that is not there fails in the plain read before
        if expected is None:
            raise
        return False
    except OSError as error:
        if not _refused(error):
            raise
        return _read(filesystem, full) == data


def _put_s3(filesystem: Any, full: str, mark: str | None, data: bytes) -> None:
    filesystem.pipe_file(full, data, **({"IfNoneMatch": "*"} if mark is None else {"IfMatch": mark}))


def _put_gs(filesystem: Any, full: str, mark: str | None, data: bytes) -> None:
    bucket, key, _ = filesystem.split_path(full)
    filesystem.call(
        "POST",
        f"{filesystem._location}/upload/storage/v1/b/{quote(bucket)}/o",
        uploadType="media",
        name=key,
        ifGenerationMatch=mark or "0",
        headers={"Content-Type": "application/octet-stream"},
        data=data,
        json_out=True,
    )
    filesystem.invalidate_cache()


def _refused(error: OSError) -> bool:
    """Whether the store says that the condition did not hold."""
    answer = getattr(error.__cause__, "response", None) or {}
    return isinstance(error, FileExistsError) or answer.get("Error", {}).get("Code") in _REFUSALS


def _read(filesystem: Any, full: str) -> bytes | None:
    try:
        data: bytes = filesystem.cat_file(full)
        return data
    except FileNotFoundError:
        return None
