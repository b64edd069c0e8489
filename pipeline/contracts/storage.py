"""The only door to storage: whole objects in, whole objects out, on any fsspec URL.

An object is written completely or not at all: on a file system to a temporary name beside it, then renamed; on an
object store by one put. Reads and writes are retried here and nowhere else. A Storage pickles to its URL, so Spark
tasks and training ranks open their own. Memory: one object at a time.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.contracts.errors import StorageError

T = TypeVar("T")
ATTEMPTS = 4
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_FINAL_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)


class Storage:
    """A folder at an fsspec URL; paths are relative to it, with forward slashes, and cannot leave it."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            filesystem, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise StorageError(f"cannot open {url}: {error}") from None
        self._filesystem = filesystem
        self.root = root.rstrip("/") or "/"

    def __getstate__(self) -> str:
        return self.url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on a file system of this machine."""
        return isinstance(self._filesystem, LocalFileSystem)

    def locate(self, path: str) -> str:
        """The full path of an object, for messages and for libraries that want a file name."""
        parts = PurePosixPath(path).parts
        if PurePosixPath(path).is_absolute() or ".." in parts:
            raise StorageError(f"{path!r} points outside {self.url}")
        return f"{self.root}/{path}" if path else self.root

    def read_bytes(self, path: str) -> bytes:
        """The whole object. Raises FileNotFoundError if there is none, StorageError for any other refusal."""
        full = self.locate(path)
        data: bytes = self._retry(f"read {full}", lambda: self._filesystem.cat_file(full))
        return data

    def write_bytes(self, path: str, data: bytes | memoryview) -> None:
        """Write the whole object, or nothing: a reader sees the old one or the new one."""
        full = self.locate(path)

        def write() -> None:
            if not self.is_local:
                self._filesystem.pipe_file(full, bytes(data))
                return
            os.makedirs(os.path.dirname(full), exist_ok=True)
            temporary = f"{os.path.dirname(full)}/.{os.path.basename(full)}.{uuid.uuid4().hex}.tmp"
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, full)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

        self._retry(f"write {full} ({len(data):,} bytes)", write)

    def put_file(self, local: str | Path, path: str) -> None:
        """Store a local file under path, whole or not at all; for objects too large for memory."""
        full = self.locate(path)

        def put() -> None:
            if not self.is_local:
                self._filesystem.put_file(str(local), full)
                return
            os.makedirs(os.path.dirname(full), exist_ok=True)
            temporary = f"{os.path.dirname(full)}/.{os.path.basename(full)}.{uuid.uuid4().hex}.tmp"
            try:
                shutil.copyfile(local, temporary)
                os.replace(temporary, full)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

        self._retry(f"write {full}", put)

    def exists(self, path: str) -> bool:
        """Whether an object or a folder of objects is there."""
        full = self.locate(path)
        return bool(self._retry(f"look for {full}", lambda: self._filesystem.exists(full)))

    def size(self, path: str) -> int:
        """Bytes of an object. Raises FileNotFoundError if there is none."""
        full = self.locate(path)
        self._filesystem.invalidate_cache()
        return int(self._retry(f"look at {full}", lambda: self._filesystem.size(full)))

    def names(self, path: str) -> list[str]:
        """Names directly below a folder, sorted; empty if there is no folder. Unfinished writes are not listed."""
        full = self.locate(path)
        self._filesystem.invalidate_cache()
        try:
            names = self._retry(f"list {full}", lambda: self._filesystem.ls(full, detail=False))
        except FileNotFoundError:
            return []
        base = (name.rstrip("/").rsplit("/", 1)[-1] for name in names)
        return sorted(name for name in base if not name.endswith(".tmp"))

    def delete(self, path: str) -> None:
        """Remove an object, or a folder with all below it; nothing there is fine."""
        full = self.locate(path)

        def delete() -> None:
            try:
                self._filesystem.rm(full, recursive=True)
            except FileNotFoundError:
                return

        self._retry(f"delete {full}", delete)

    def remove_unfinished(self, path: str) -> None:
        """Remove what interrupted writes left in a local folder; call it when nobody writes there."""
        if self.is_local:
            for leftover in Path(self.locate(path)).glob(".*.tmp"):
                leftover.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Raise StorageError, before work starts, if nothing can be written here."""
        probe = f".writable-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"")
        self.delete(probe)

    def _retry(self, action: str, attempt: Callable[[], T]) -> T:
        """Try a few times with growing pauses; refusals that time does not mend are raised at once."""
        for remaining in range(ATTEMPTS - 1, -1, -1):
            try:
                return attempt()
            except FileNotFoundError:
                raise
            except OSError as error:
                if isinstance(error, _FINAL) or error.errno in _FINAL_ERRNO or not remaining:
                    raise StorageError(self._explain(action, error)) from error
                time.sleep((ATTEMPTS - remaining) * 0.2 * (1 + random.random()))
        raise AssertionError("unreachable")

    def _explain(self, action: str, error: OSError) -> str:
        remedy = "check the address and the credentials"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_nearest_folder(self.root)).free if self.is_local else 0
            remedy = f"{free:,} bytes are free there; make room or move resources.run, then run again"
        elif isinstance(error, PermissionError) or error.errno == errno.EROFS:
            right = "write" if action.startswith(("write", "delete")) else "read"
            remedy = f"give this user the right to {right} there, or choose another folder"
        elif isinstance(error, (NotADirectoryError, FileExistsError)):
            remedy = "a file stands where a folder is needed; choose another resources.run"
        return f"cannot {action}: {error.strerror or error}; {remedy}"


def _nearest_folder(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def describe_inputs(url: str) -> list[dict[str, Any]]:
    """The files that a path, glob or folder names: url, size and a stamp that changes when the file does.

    Raises FileNotFoundError if there are none. Used to know whether the user's files changed since the last run.
    """
    filesystem, path = fsspec.core.url_to_fs(url)
    if any(sign in path for sign in "*?[") and not filesystem.exists(path):
        names = [name for name in filesystem.glob(path) if not filesystem.isdir(name)]
    elif filesystem.isdir(path):
        names = [name for name in filesystem.find(path) if not name.rsplit("/", 1)[-1].startswith(("_", "."))]
    else:
        names = [path] if filesystem.exists(path) else []
    if not names:
        raise FileNotFoundError(url)
    found = []
    for name in sorted(names):
        info = filesystem.info(name)
        marks = ("ETag", "etag", "md5Hash", "mtime", "LastModified")
        stamp = next((str(info[mark]) for mark in marks if info.get(mark)), "")
        found.append({"url": str(filesystem.unstrip_protocol(name)), "bytes": int(info["size"]), "stamp": stamp})
    return found
