"""Host-local, memory-mapped copies of a dataset's columns, shared by every process of the host.

A walk step or a feature lookup is then a memory access. A copy is made once per host and dataset content, under a file
lock, from shards checked against the manifest; its folder is named by the manifest's content hash, so it can never be
stale. One that was broken off goes on at the next shard. A finished copy carries its checksums: they are compared again
whenever a file's size or time of change is not what it was, and a copy that differs is made anew. Making one removes
those that nobody used for two weeks, of what passes between steps for some hours, and, where room is short, those that
were not used for longest. Disk: the raw arrays, asked for before copying. Memory: one shard while copying.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import DTypeLike, NDArray

from pipeline.contracts.datasets import Manifest, arrow_to_lists, read_shard, read_stored
from pipeline.contracts.errors import StorageError
from pipeline.contracts.rows import Table, map_in_place, read_own_rows, whole_table
from pipeline.contracts.storage import Storage
from pipeline.contracts.vectors import vectors_in

_OWNER_DIGITS, _DIGITS = 12, 24  # of the hashes of the run's URL and of the content, in the folders' names
_HEADER_BYTES = 128
_KEPT_SECONDS = 14 * 24 * 3600
"""Long enough for a weekly run to find its copies; a cache that nobody clears would fill the disk."""
_PASSING_SECONDS = 6 * 3600
"""Copies of what passes between a stage's steps: longer than one lasts, and shorter than from night to night."""
_IN_USE_SECONDS = 3600
"""Copies that were used so lately do not make room for others."""
_PASSING, _STAYING = "rows", "base"


def default_cache() -> Path:
    """The folder used when resources.cache is not set: in the temporary folder, one per user and closed to others.

    Raises StorageError if another user made it: what is mapped from there would be theirs to change.
    """
    folder = Path(tempfile.gettempdir()) / f"pinsage-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise StorageError(f"cannot make {folder} for local copies: {error.strerror}; set resources.cache") from error
    if folder.lstat().st_uid != os.getuid():
        raise StorageError(
            f"the folder for local copies {folder} belongs to another user; set resources.cache to a folder of yours, "
            "or have that one removed"
        )
    folder.chmod(0o700)
    return folder


def home_of(storage: Storage, dataset: str, cache: str | None) -> Path:
    """The folder of this host's copies of a dataset of a run, below the cache; it need not be there."""
    owner = hashlib.sha256(storage.url.encode()).hexdigest()[:_OWNER_DIGITS]
    return (default_cache() if cache is None else Path(cache)) / owner / dataset.replace("/", "-")


def copy_in(home: Path, content: str, part: str) -> Path:
    """The folder of a copy of the content of that hash, or of a part of it."""
    return home / f"{content[:_DIGITS]}-{part}"


def forget(storage: Storage, dataset: str, cache: str | None) -> None:
    """Remove this host's copies of a dataset, or a folder of some, that is no more; those on other hosts grow old."""
    home = home_of(storage, dataset, cache)
    for own in (home, *home.parent.glob(f"{home.name}-*")):
        shutil.rmtree(own, ignore_errors=True)


@contextmanager
def kept_in(folder: Path, what: str) -> Iterator[None]:
    """StorageError, which says what to do, for a local folder's refusal to hold what the block writes there."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot keep {what} in {folder}: {error}; make room there or set resources.cache"
        ) from error


def check_room(folder: Path, needed: int) -> None:
    """Raise OSError if so many bytes do not fit, even if other copies, those not used for longest first, make room."""
    wanted = needed + (1 << 20)
    if (free := shutil.disk_usage(folder).free) >= wanted:
        return
    aged: list[tuple[float, Path, int]] = []
    for other in folder.parents[2].glob(f"{'?' * _OWNER_DIGITS}/*/{'?' * _DIGITS}-*/"):
        with suppress(OSError):  # another process removes it too
            if other != folder and (used := (other / "done.json").stat().st_mtime) < time.time() - _IN_USE_SECONDS:
                aged.append((used, other, sum(file.stat().st_size for file in other.iterdir())))
    if free + sum(size for _, _, size in aged) >= wanted:  # else it would be of no use that they go
        for _, other, _ in sorted(aged):
            shutil.rmtree(other, ignore_errors=True)
            if (free := shutil.disk_usage(folder).free) >= wanted:
                return
    raise OSError(f"about {needed:,} more bytes are needed and {free:,} are free")


def remove_others(copy: Path) -> None:
    """Remove what its making replaces or makes room for: copies of other content, and of any run those long unused."""
    _, part = copy.name.split("-", 1)
    for old in copy.parent.glob(f"{'?' * _DIGITS}-{part}"):
        if old != copy:
            shutil.rmtree(old, ignore_errors=True)
    _remove_unused(copy.parents[2])


def map_values(storage: Storage, manifest: Manifest, column: str, cache: str | None) -> NDArray[Any]:
    """A plain numeric column as a read-only memory-mapped array [N]."""
    folder = _replicate(storage, manifest, column, cache, "values")
    return _open(folder, "values")


def map_vectors(storage: Storage, manifest: Manifest, column: str, cache: str | None) -> NDArray[Any]:
    """A fixed-size-list column as a read-only memory-mapped array [N, width]."""
    folder = _replicate(storage, manifest, column, cache, "vectors")
    return _open(folder, "values")


def map_lists(
    storage: Storage, manifest: Manifest, column: str, cache: str | None
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """A list column as read-only memory-mapped (indptr int64 [N + 1], values)."""
    folder = _replicate(storage, manifest, column, cache, "lists")
    return _open(folder, "indptr"), _open(folder, "values")


def map_rows(storage: Storage, manifest: Manifest, cache: str | None, dense: bool = True, stays: bool = False) -> Table:
    """A dataset of raw rows as one read-only table: where it lies, if that is a disk of this machine, else a copy.

    dense: whether most of its pages will be read. stays: whether later runs will have the same files under another URL:
    they find this copy then.
    """
    in_place = map_in_place(storage, manifest, dense)
    if in_place is not None:
        return in_place
    column = _STAYING if stays else _PASSING
    return whole_table(manifest, _open(_replicate(storage, manifest, column, cache, "rows"), "values"))


@dataclass(frozen=True)
class Rows:
    """What map_rows maps, for a process to keep by: equal for equal content in the same place."""

    url: str
    content: str
    cache: str | None
    dense: bool
    stays: bool
    storage: Storage = field(compare=False)
    manifest: Manifest = field(compare=False)

    @classmethod
    def of(
        cls, storage: Storage, manifest: Manifest, cache: str | None, dense: bool = True, stays: bool = False
    ) -> Rows:
        """Of a dataset of raw rows."""
        return cls(storage.locate(manifest.dataset), manifest.content, cache, dense, stays, storage, manifest)

    def map(self) -> Table:
        """As map_rows."""
        return map_rows(self.storage, self.manifest, self.cache, self.dense, self.stays)


def padded(
    indptr: NDArray[np.int64], values: NDArray[Any], rows: NDArray[np.integer], width: int, dtype: DTypeLike
) -> NDArray[Any]:
    """Lists of the given rows as [len(rows), width], cut or padded with 0 on the right."""
    starts = indptr[rows]
    lengths = np.minimum(indptr[np.asarray(rows) + 1] - starts, width)
    columns = np.arange(width)
    inside = columns[None, :] < lengths[:, None]
    result = np.zeros((len(starts), width), dtype=dtype)
    result[inside] = values[(starts[:, None] + columns[None, :])[inside]]
    return result


def _open(folder: Path, name: str) -> NDArray[Any]:
    array: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return array


def _replicate(storage: Storage, manifest: Manifest, column: str, cache: str | None, kind: str) -> Path:
    home, content = home_of(storage, manifest.dataset, cache), manifest.content
    if column == _STAYING:
        kind_of_rows = f"{manifest.metadata['dtype']} {manifest.metadata['width']}"
        files = " ".join(shard.sha256 for shard in manifest.shards)
        content = hashlib.sha256(f"{kind_of_rows} {files}".encode()).hexdigest()
        home = home.parents[1] / content[:_OWNER_DIGITS] / home.name
    folder = copy_in(home, content, column)
    done = folder / "done.json"
    if _is_unchanged(folder):
        with suppress(OSError):  # of a copy that is not ours to mark: another user's, or on a read-only disk
            os.utime(done)
        return folder
    with kept_in(home, f"a local copy of {manifest.dataset}"):
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f"{column}.lock"):
            if not _is_intact(folder):
                if done.exists():
                    shutil.rmtree(folder, ignore_errors=True)
                remove_others(folder)
                try:
                    _copy(storage, manifest, column, folder, kind)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
    return folder


def _is_unchanged(folder: Path) -> bool:
    """Whether the copy is finished and its files have the sizes and times of change that were noted."""
    try:
        files = json.loads((folder / "done.json").read_text())["files"]
        return all(note["stat"] == _stat(folder / name) for name, note in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_intact(folder: Path) -> bool:
    """Whether the copy is finished and its files hold what was written; their new times are noted then."""
    if _is_unchanged(folder):
        return True
    try:
        done = json.loads((folder / "done.json").read_text())
        for name, note in done["files"].items():
            if _checksum(folder / name) != note["crc"]:
                return False
            note["stat"] = _stat(folder / name)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    _write_note(folder / "done.json", done)
    return True


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _checksum(path: Path, size: int | None = None) -> int:
    """CRC-32 of what follows the header, or of so many bytes of it. Raises ValueError if there are fewer."""
    crc, left = 0, size
    with open(path, "rb") as file:
        file.seek(_HEADER_BYTES)
        while block := file.read(1 << 24 if left is None else min(left, 1 << 24)):
            crc = zlib.crc32(block, crc)
            left = None if left is None else left - len(block)
    if left:
        raise ValueError(f"{path} is {left:,} bytes too short")
    return crc


def _write_note(path: Path, tree: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(tree))
    os.replace(temporary, path)


def _remove_unused(root: Path) -> None:
    """Remove the copies, of any run, that were last used long ago; who still has one open keeps reading it."""
    for folder in root.glob(f"{'?' * _OWNER_DIGITS}/*/{'?' * _DIGITS}-*/"):
        kept = _PASSING_SECONDS if folder.name.endswith(f"-{_PASSING}") else _KEPT_SECONDS
        with suppress(FileNotFoundError):  # another process removes it too
            if _last_used(folder) < time.time() - kept:
                shutil.rmtree(folder, ignore_errors=True)


def _last_used(folder: Path) -> float:
    done = folder / "done.json"
    return (done if done.exists() else folder).stat().st_mtime


def _copy(storage: Storage, manifest: Manifest, column: str, folder: Path, kind: str) -> None:
    """Append shard after shard to raw .npy files, noting how far they are, then fill in the headers."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.json"
    try:
        state = json.loads(progress.read_text())
        for name, note in state["files"].items():  # after a crash of the machine less may be there than was noted
            if _checksum(folder / f"{name}.npy", note["count"] * np.dtype(note["dtype"]).itemsize) != note["crc"]:
                raise ValueError(f"{folder / name} is not as it was written")
        files = {name: _Growing(folder / f"{name}.npy", **note) for name, note in state["files"].items()}
        first = int(state["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        names = ("values", "indptr") if kind == "lists" else ("values",)
        files, first = {name: _Growing(folder / f"{name}.npy") for name in names}, 0
        if kind == "lists":
            files["indptr"].append(np.zeros(1, np.int64))
    stored = sum(shard.bytes for shard in manifest.shards)
    read = sum(shard.bytes for shard in manifest.shards[:first])
    for number in range(first, len(manifest.shards)):
        if kind == "rows":
            array: NDArray[Any] = read_own_rows(storage, manifest, number)
        elif kind == "vectors":
            array = vectors_in(read_stored(storage, manifest.dataset, manifest.shards[number]), column)
        else:
            values = read_shard(storage, manifest, number, [column]).column(column)
            if kind == "lists":
                indptr, array = arrow_to_lists(values)
                files["indptr"].append(indptr[1:] + files["values"].count)
            else:
                array = values.to_numpy()
        size = max(1, manifest.shards[number].bytes)  # raw rows may be none
        check_room(folder, int(array.nbytes * (stored - read) / size))
        read += size
        files["values"].append(array)
        notes = {name: file.note() for name, file in files.items()}
        _write_note(progress, {"shards": number + 1, "files": notes})
    for file in files.values():
        file.finish()
    noted = {f.path.name: {"crc": f.crc, "stat": _stat(f.path)} for f in files.values()}
    _write_note(folder / "done.json", {"dataset": manifest.dataset, "rows": manifest.num_rows, "files": noted})
    progress.unlink()


class _Growing:
    """A .npy file that grows at its end; its header, of fixed size, is written last. count is in elements."""

    def __init__(self, path: Path, count: int = 0, crc: int = 0, dtype: str = "<f4", width: int | None = None) -> None:
        self.path, self.count, self.crc, self.dtype, self.width = path, count, crc, dtype, width
        self._file = open(path, "r+b" if count else "w+b")  # noqa: SIM115 (closed by finish)
        self._file.truncate(_HEADER_BYTES + count * np.dtype(dtype).itemsize)
        self._file.seek(0, os.SEEK_END)

    def append(self, array: NDArray[Any]) -> None:
        """Add rows, all of one type and width."""
        array = np.ascontiguousarray(array)
        self.dtype, self.width = array.dtype.str, array.shape[1] if array.ndim == 2 else None
        self.count += array.size
        data = array.reshape(-1).view(np.uint8).data
        self.crc = zlib.crc32(data, self.crc)
        self._file.write(data)

    def note(self) -> dict[str, Any]:
        """What continues the file after a kill; the file's bytes are handed to the system before."""
        self._file.flush()
        return {"count": self.count, "crc": self.crc, "dtype": self.dtype, "width": self.width}

    def finish(self) -> None:
        """Write the header and make sure of the disk."""
        shape = (self.count,) if self.width is None else (self.count // max(self.width, 1), self.width)
        text = f"{{'descr': {self.dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
        magic = np.lib.format.magic(1, 0) + (_HEADER_BYTES - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(magic + text.ljust(_HEADER_BYTES - 11).encode("latin1") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
