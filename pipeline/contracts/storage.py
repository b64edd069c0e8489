"""The only door to storage: whole objects in, whole objects out, on any fsspec URL.

An object is written completely or not at all: on an object store by one put, elsewhere to a temporary name beside it,
then renamed. Reads and writes are retried here and nowhere else. `write_if` (see `conditional`) decides between writers
of one object. A Storage pickles to its URL, so Spark tasks and training ranks open their own. Memory: one object at a
time.

Credentials come from the environment or the SDK's chain, never by a URL. A listing may be old: nothing here or above
may rest on what it lacks. A body may be cut on its way: what has a checksum is read by `read_with`, which asks again.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.contracts import conditional, host
from pipeline.contracts.errors import DataError, StorageError
from pipeline.contracts.safety import holds_secret

T = TypeVar("T")
ATTEMPTS = 6
"""With the pauses between them about 40 s: a store that answers nothing for half a minute ends no run."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 20.0
_REREADS = 2
"""How often what differs from its checksum is asked for again where it came over a network."""
_FINAL = (
    PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError, ImportError, ValueError, TypeError,
    AttributeError,
)  # fmt: skip
_FINAL_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
_FINAL_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}
"""Of libraries that need not be installed: who has no credentials now has none in a minute."""
_S3 = ("s3", "s3a")
_S3_CLIENT = {"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard", "total_max_attempts": 3}}
"""Nothing hangs for ever; three attempts for each request, as one transfer may be thousands of them."""
_BULK = 1000  # the most keys that S3 deletes by one request
_INPUT_BUFFER = 1 << 22
_PUTS_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"}
"""Protocols whose put shows a reader all of an object or nothing; the others may be caught half way."""
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "modificationTime")
"""What file systems call the mark that changes when a file does."""
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modificationTime", "created")
"""What they call the time of the last write; the memory file system knows only when a file was made."""


_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)
"""What a file system answers that gives a file no second name."""


class Storage:
    """A folder at an fsspec URL; paths are relative to it, with forward slashes, and cannot leave it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._filesystem, root = retry(f"open {url}", lambda: filesystem_of(url))
        self.root = root.rstrip("/") or "/"
        self._is_s3 = not set(_S3).isdisjoint(conditional.protocols_of(self._filesystem))

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
        options = {"max_concurrency": 1} if self._is_s3 else {}  # more would ask for the size before every read
        data: bytes = retry(f"read {full}", lambda: self._filesystem.cat_file(full, **options))
        return data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object, fewer where it ends before. Raises as read_bytes."""
        full = self.locate(path)
        data = b""
        for _ in range(1 if self.is_local else 1 + _REREADS):
            data = retry(f"read {full}", lambda: self._filesystem.cat_file(full, start=start, end=stop))
            if len(data) == stop - start:
                break
        return data

    def load(self, path: str, look: Callable[[memoryview], object]) -> memoryview:
        """As read_bytes, for the caller to change; look is shown piece after piece, while the processor has it at hand.

        All pieces but the last are of one size, a multiple of 4096. What is large and was not in memory (the page
        cache) will not be.
        """
        if not self.is_local:
            found = memoryview(bytearray(self.read_bytes(path)))
            look(found)
            return found
        full = self.locate(path)
        try:
            return host.read(full, look, partial(retry, f"read {full}"))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise explain(f"read {full}", error) from error

    def is_in_memory(self, path: str) -> bool:
        """Whether a local file is in the page cache, most of it; False for none."""
        with suppress(OSError), open(self.locate(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size > 0 and host.is_cached(file.fileno(), size)
        return False

    def read_with(self, path: str, parse: Callable[[bytes], T], span: tuple[int, int] | None = None) -> T:
        """What parse makes of an object, or of a span of it; of bytes not as written it raises ValueError or DataError.

        Those are then asked for again if they came over a network, where an answer may be cut short; else, or in the
        end, its error is raised. Raises as read_bytes.
        """
        for left in range(0 if self.is_local else _REREADS, -1, -1):
            data = self.read_bytes(path) if span is None else self.read_range(path, *span)
            try:
                return parse(data)
            except (ValueError, DataError):
                if not left:
                    raise
        raise AssertionError("unreachable")

    def write_bytes(self, path: str, data: bytes | memoryview, lasting: bool = True, read_soon: bool = True) -> str:
        """Write the whole object, or nothing: a reader sees the old or the new one (HDFS, SFTP: for a moment none).

        Returns the SHA-256 of the data in hex, made piece by piece while the processor has them at hand. Not lasting:
        what a run can make again, and a local disk may lose if the machine goes down before it is written. Not read
        soon: if it is large, it does not take the place of other files in a local host's memory.
        """
        full, checksum = self.locate(path), ""

        def write(target: str) -> None:
            nonlocal checksum
            if self.is_local:
                checksum = host.write(target, memoryview(data).cast("B"), lasting, read_soon)
            else:
                self._filesystem.pipe_file(target, bytes(data))
                checksum = hashlib.sha256(data).hexdigest()

        self._store(f"write {full} ({len(data):,} bytes)", full, write)
        return checksum

    def settle(self, path: str) -> None:
        """Make an object that was written as not lasting safe from a crash of the machine."""
        if self.is_local:
            full = self.locate(path)
            retry(f"settle {full}", partial(_flush, full))

    def write_if(self, path: str, expected: bytes | None, data: bytes) -> bool:
        """Write the whole object if expected (None: nothing) is what lies there; else do nothing, and say False.

        Of two who expect the same, one gets True. An object written so is written only so, and never twice with the
        same content. Raises StorageError where the store cannot promise that.
        """
        full = self.locate(path)
        write = partial(self.write_bytes, path, data)

        def attempt() -> bool:
            return conditional.write_if(self._filesystem, full, expected, data, write)

        action, folder = f"write {full} ({len(data):,} bytes)", self.root if self.is_local else ""
        try:
            return retry(action, attempt, folder)
        except FileNotFoundError as error:
            raise explain(action, error, folder) from error

    def check_conditions(self, probe: str) -> None:
        """Raise StorageError if write_if cannot be trusted here; writes an object at probe and deletes it."""
        full = self.locate(probe)
        try:
            conditional.check(self._filesystem, full)
        except FileNotFoundError as error:
            raise explain(f"write {full}", error) from error
        finally:
            self.delete(probe)

    def put_file(self, local: str | Path, path: str) -> None:
        """Store a local file under path, whole or not at all; for objects too large for memory."""
        full = self.locate(path)

        def write(target: str) -> None:
            if self.is_local:
                shutil.copyfile(local, target)
                _flush(target)
            else:
                self._filesystem.put_file(str(local), target)

        self._store(f"write {full}", full, write)

    def copy_from(self, other: Storage, path: str) -> None:
        """Have another folder's object at the same path here too: a second name on one local disk, else a copy.

        The copy is made by the store itself where both folders are in one. Objects are replaced, never changed, so a
        second name stays what it is.
        """
        source, full = other.locate(path), self.locate(path)

        def copy(target: str) -> None:
            if self.is_local and other.is_local:
                try:
                    os.link(source, target)
                except OSError as error:
                    if error.errno not in _NO_LINK:
                        raise
                    shutil.copyfile(source, target)
                    _flush(target)
            elif self._filesystem is other._filesystem:
                self._filesystem.cp_file(source, target)
            else:
                self._filesystem.pipe_file(target, other.read_bytes(path))

        both = self.is_local and other.is_local and os.path.exists(full) and os.path.exists(source)
        if both and os.path.samefile(source, full):
            return  # to rename one name of a file to another does nothing
        self._store(f"copy {source} to {full}", full, copy)

    @contextmanager
    def stream(self, path: str) -> Iterator[BinaryIO]:
        """A file to write an object to piece by piece; it is there, whole, when the block ends without an error."""
        full = self.locate(path)
        folder, _, name = full.rpartition("/")
        if self.is_local:
            os.makedirs(folder, exist_ok=True)
        local = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp" if self.is_local else None
        try:
            with open(local, "wb") if local else tempfile.NamedTemporaryFile(prefix="pinsage-") as file:
                yield file  # type: ignore[misc]
                file.flush()
                if not local:
                    self.put_file(file.name, path)
            if local:
                os.replace(local, full)
        except OSError as error:
            raise explain(f"write {full}", error, self.root if self.is_local else "") from error
        finally:
            if local:
                with suppress(FileNotFoundError):
                    os.remove(local)

    def _store(self, action: str, full: str, write: Callable[[str], None]) -> None:
        """Let write fill the object, by way of a temporary name where readers could see it half written."""
        folder = self.root if self.is_local else ""
        if _PUTS_WHOLE & conditional.protocols_of(self._filesystem):
            attempt = partial(write, full)
        else:
            attempt = partial(self._write_and_rename, full, write)
        try:
            retry(action, attempt, folder)
        except FileNotFoundError as error:  # a bucket that does not exist, say: for a writer that is a refusal
            raise explain(action, error, folder) from error

    def _write_and_rename(self, full: str, write: Callable[[str], None]) -> None:
        folder, _, name = full.rpartition("/")
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
        self._filesystem.makedirs(folder, exist_ok=True)
        try:
            write(temporary)
            if self.is_local:
                os.replace(temporary, full)
                return
            if self._filesystem.exists(full):  # HDFS and SMB rename to no name that is taken
                self._filesystem.rm_file(full)
            self._filesystem.mv(temporary, full)
        except BaseException:
            with suppress(Exception):
                self._filesystem.rm_file(temporary)
            raise

    def names(self, path: str) -> list[str]:
        """Names directly below a folder, sorted; empty if there is no folder. Unfinished writes are not listed."""
        return sorted(name for name in self._list(path) if not _UNFINISHED.fullmatch(name))

    def _list(self, path: str) -> list[str]:
        full = self.locate(path)
        self._filesystem.invalidate_cache()
        try:
            names = retry(f"list {full}", lambda: self._filesystem.ls(full, detail=False))
        except FileNotFoundError:
            return []
        return [name.rstrip("/").rsplit("/", 1)[-1] for name in names]

    def files(self, path: str) -> dict[str, tuple[int, float]]:
        """Bytes of every object below a folder, and when it was last written (seconds since 1970), by path in it."""
        full = self.locate(path)
        self._filesystem.invalidate_cache()
        try:
            found = retry(f"list {full}", lambda: self._filesystem.find(full, detail=True))
        except FileNotFoundError:
            return {}
        below = len(self._filesystem._strip_protocol(full).rstrip("/")) + 1
        return {name[below:]: (int(info["size"] or 0), _written(info)) for name, info in found.items()}

    def delete(self, path: str) -> None:
        """Remove an object, or a folder with all below it; nothing there is fine."""
        full = self.locate(path)

        def delete() -> None:
            with suppress(FileNotFoundError):
                if self._is_s3 and "/" in full:  # s3fs looks five times whether there is something
                    self._delete_keys(full)
                else:
                    self._filesystem.rm(full, recursive=True)

        retry(f"delete {full}", delete)

    def _delete_keys(self, full: str) -> None:
        parent, _, name = full.rpartition("/")
        every = [full, *self._filesystem.find(parent, prefix=f"{name}/")]
        bucket, keys = full.split("/", 1)[0], [key.split("/", 1)[1] for key in every]
        for first in range(0, len(keys), _BULK):
            asked = {"Objects": [{"Key": key} for key in keys[first : first + _BULK]], "Quiet": True}
            refused = self._filesystem.call_s3("delete_objects", Bucket=bucket, Delete=asked).get("Errors")
            if refused:  # of single keys; the answer as a whole is a success
                raise OSError(f"{len(refused)} objects were not deleted: {refused[0]}")

    def remove(self, path: str) -> None:
        """Remove one object, of which no listing needs to know; nothing there is fine."""
        full = self.locate(path)

        def remove() -> None:
            with suppress(FileNotFoundError):
                self._filesystem.rm_file(full)

        retry(f"delete {full}", remove)

    def remove_unfinished(self, path: str, before: float | None = None) -> None:
        """Remove what interrupted writes left in a folder; call it when nobody writes there.

        before: only what was last written before that time, and below its folders too; then others may write.
        """
        if _PUTS_WHOLE & conditional.protocols_of(self._filesystem):
            return
        old = self._list(path) if before is None else [n for n, (_, time) in self.files(path).items() if time < before]
        for name in old:
            if _UNFINISHED.fullmatch(name.rsplit("/", 1)[-1]):
                self.remove(f"{path}/{name}")

    def check_writable(self) -> None:
        """Raise StorageError, before work starts, if nothing can be written here."""
        probe = f".writable-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"")
        self.remove(probe)


def _flush(path: str) -> None:
    """Have a file that was written be on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def filesystem_of(url: str) -> tuple[Any, str]:
    """The file system behind a URL, and the path on it. For S3 with limits to waiting and without cached listings.

    What the user's own fsspec configuration says (FSSPEC_S3 in the environment) goes above ours. Raises StorageError
    for a URL with credentials: it would be stored with every run and shown in every message.
    """
    if holds_secret(url):
        raise StorageError(
            f"{url} holds a key or a secret; take it out, and give credentials by the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY), a profile or a role"
        )
    options: dict[str, Any] = {}
    for protocol in _S3:
        if f"{protocol}://" in url:
            client: dict[str, Any] = dict(_S3_CLIENT)
            if any(name in os.environ for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")):
                client["s3"] = {"addressing_style": "path"}  # MinIO and its like have no host name for each bucket
            given = fsspec.config.conf.get(protocol, {})
            client |= given.get("config_kwargs", {})
            options[protocol] = {"use_listings_cache": False, **given, "config_kwargs": client}
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    if options and hasattr(filesystem, "retries"):
        filesystem.retries = 1  # s3fs's own: botocore tries each request again, and `retry` all of them together
    return filesystem, path


class _Ranges(io.RawIOBase):
    """An object of known size, read by ranges; an answer that is shorter than asked for is an error, to be retried."""

    def __init__(self, filesystem: Any, path: str, size: int) -> None:
        self._filesystem, self._path, self._size, self._place = filesystem, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = max(0, offset + (0, self._place, self._size)[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        stop = min(self._place + len(buffer), self._size)
        if stop <= self._place:
            return 0

        def read() -> bytes:
            data: bytes = self._filesystem.cat_file(self._path, start=self._place, end=stop)
            if len(data) != stop - self._place:
                raise OSError(f"{len(data):,} bytes came, expected {stop - self._place:,}")
            return data

        buffer[: stop - self._place] = retry(f"read {self._path}", read)
        count, self._place = stop - self._place, stop
        return count


@contextmanager
def open_input(url: str, compression: str | None = None) -> Iterator[BinaryIO]:
    """A file of the user's, to read; compression `infer` goes by its ending. Of an object store, all of it or an error.

    Raises FileNotFoundError, or what the file system raises; the caller explains it.
    """
    filesystem, path = filesystem_of(url)
    if not _PUTS_WHOLE & conditional.protocols_of(filesystem):
        with fsspec.open(url, "rb", compression=compression) as file:
            yield file
        return
    size = retry(f"read {url}", lambda: filesystem.info(path)["size"])
    with io.BufferedReader(_Ranges(filesystem, path, int(size)), _INPUT_BUFFER) as file:
        kind = fsspec.core.get_compression(path, compression)
        yield fsspec.compression.compr[kind](file, mode="rb") if kind else file


def retry(action: str, attempt: Callable[[], T], folder: str = "") -> T:
    """What a call to a file system gives, tried a few times with growing pauses unless time cannot mend its refusal.

    Raises FileNotFoundError as it comes and StorageError for every other refusal, of whatever type: what object stores
    raise (botocore, gcsfs) has no common base. Its cause is kept. folder is where the room on a full disk is measured.
    """
    for remaining in range(ATTEMPTS - 1, -1, -1):
        try:
            return attempt()
        except (FileNotFoundError, MemoryError, StorageError):
            raise
        except Exception as error:
            final = isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES
            if final or getattr(error, "errno", None) in _FINAL_ERRNO or not remaining:
                raise explain(action, error, folder) from error
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 4 ** (ATTEMPTS - 1 - remaining))
            time.sleep(pause * (0.5 + random.random() / 2))  # not all tasks again in the same moment
    raise AssertionError("unreachable")


def explain(action: str, error: Exception, folder: str = "") -> StorageError:
    """What a file system's refusal means to a person, and what to do; to be raised from it."""
    code = getattr(error, "errno", None)
    remedy = "check the address and the credentials"
    if code in (errno.ENOSPC, errno.EDQUOT):
        free = f"{shutil.disk_usage(_nearest_folder(folder)).free:,} bytes are free there; " if folder else ""
        remedy = f"{free}make room or move resources.run, then run again"
    elif isinstance(error, PermissionError) or code == errno.EROFS:
        right = "write" if action.startswith(("write", "delete")) else "read"
        remedy = f"give this user the right to {right} there, or choose another folder"
    elif isinstance(error, (NotADirectoryError, FileExistsError)):
        remedy = "a file stands where a folder is needed; choose another resources.run"
    elif isinstance(error, ImportError):
        remedy = "install the package that speaks this protocol (s3 and gcs are extras of this one)"
    found = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, (OSError, ImportError, ValueError)):  # a name says more than what comes with it
        found = f"{type(error).__name__}: {found}"
    return StorageError(f"cannot {action}: {found}; {remedy}")


def _nearest_folder(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _written(info: Mapping[str, Any]) -> float:
    """When a file was last written, by whatever name its file system has for that."""
    value = next((info[mark] for mark in _TIMES if info.get(mark)), 0.0)
    if isinstance(value, str):
        value = datetime.datetime.fromisoformat(value.replace("Z", "+00:00"))
    return float(value.timestamp() if isinstance(value, datetime.datetime) else value)


def describe_inputs(url: str) -> list[dict[str, Any]]:
    """The files that a path, glob or folder names: url, size (None if unknown) and a stamp that changes when one does.

    Of a folder, what lies in hidden folders (`_temporary`, `.cache`) or is hidden itself is left out. Used to know
    whether the user's files changed since the last run. Raises FileNotFoundError if there are none, else StorageError.
    """
    return retry(f"list {url}", lambda: _describe(url))


def _describe(url: str) -> list[dict[str, Any]]:
    filesystem, path = filesystem_of(url)
    filesystem.invalidate_cache()
    if any(sign in path for sign in "*?[") and not filesystem.exists(path):
        names = [name for name in filesystem.glob(path) if not filesystem.isdir(name)]
    elif filesystem.isdir(path):
        below = len(path.rstrip("/"))
        names = [name for name in filesystem.find(path) if not re.search(r"/[_.]", name[below:])]
    else:
        names = [path]  # if there is none, `info` says so; `exists` would hide missing credentials
    if not names:
        raise FileNotFoundError(url)
    found = []
    for name in sorted(names):
        info = filesystem.info(name)
        stamp = next((str(info[mark]) for mark in _STAMPS if info.get(mark)), "")
        found.append(
            {
                "url": str(filesystem.unstrip_protocol(name)),
                "bytes": None if info.get("size") is None else int(info["size"]),
                "stamp": stamp or json.dumps({**info, "name": None}, sort_keys=True, default=str),
            }
        )
    return found
