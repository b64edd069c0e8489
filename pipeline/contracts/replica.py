"""Host-local, memory-mapped copies of a dataset's columns, shared by every process of the host.

A walk step or a feature lookup is then a memory access. A copy is made once per host and dataset content, under a file
lock, from shards checked against the manifest; its folder is named by the manifest's content hash, so it can never be
stale. Making one removes those that nobody used for two weeks. Disk: the raw arrays. Memory: one shard while copying.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from numpy.typing import DTypeLike, NDArray

from pipeline.contracts.datasets import Manifest, arrow_to_lists, arrow_to_vectors, read_shard
from pipeline.contracts.errors import StorageError
from pipeline.contracts.storage import Storage

_OWNER_DIGITS, _DIGITS = 12, 24  # of the hashes of the run's URL and of the content, in the folders' names
_KEPT_SECONDS = 14 * 24 * 3600
"""Long enough for a weekly run to find its copies; a cache that nobody clears would fill the disk."""


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
    owner = hashlib.sha256(storage.url.encode()).hexdigest()[:_OWNER_DIGITS]
    root = default_cache() if cache is None else Path(cache)
    home = root / owner / manifest.dataset.replace("/", "-")
    folder = home / f"{manifest.content[:_DIGITS]}-{column}"
    done = folder / "done.json"
    if done.exists():
        with suppress(OSError):  # of a copy that is not ours to mark: another user's, or on a read-only disk
            os.utime(done)
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f"{column}.lock"):
            if not done.exists():
                for old in home.glob(f"{'?' * _DIGITS}-{column}"):
                    shutil.rmtree(old, ignore_errors=True)
                _remove_unused(root)
                try:
                    _copy(storage, manifest, column, folder, kind)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                done.write_text(json.dumps({"dataset": manifest.dataset, "rows": manifest.num_rows}))
    except OSError as error:
        raise StorageError(
            f"cannot keep a local copy of {manifest.dataset} in {home}: {error}; make room there or set resources.cache"
        ) from error
    return folder


def _remove_unused(root: Path) -> None:
    """Remove the copies, of any run, that were last used long ago; who still has one open keeps reading it."""
    for folder in root.glob(f"{'?' * _OWNER_DIGITS}/*/{'?' * _DIGITS}-*/"):
        done = folder / "done.json"
        with suppress(FileNotFoundError):  # another process removes it too
            if (done if done.exists() else folder).stat().st_mtime < time.time() - _KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _copy(storage: Storage, manifest: Manifest, column: str, folder: Path, kind: str) -> None:
    """Stream the shards into raw files, then give each its .npy header by writing it first with the final shape."""
    folder.mkdir(parents=True)
    lengths: list[NDArray[np.int64]] = []
    raw = folder / "values.raw"
    dtype: np.dtype[Any] = np.dtype(np.float32)
    width: int | None = None
    with open(raw, "wb") as file:
        for number in range(len(manifest.shards)):
            table = read_shard(storage, manifest, number, [column])
            if kind == "vectors":
                values = arrow_to_vectors(table.column(column))
                width = values.shape[1]
            elif kind == "lists":
                indptr, values = arrow_to_lists(table.column(column))
                lengths.append(np.diff(indptr))
            else:
                values = _plain(table.column(column))
            dtype = values.dtype
            _check_room(folder, values.nbytes)
            np.ascontiguousarray(values).tofile(file)
    count = raw.stat().st_size // dtype.itemsize
    _add_header(raw, folder / "values.npy", dtype, (count,) if width is None else (count // max(width, 1), width))
    if kind == "lists":
        np.save(folder / "indptr.npy", np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64))


def _plain(column: pa.ChunkedArray) -> NDArray[Any]:
    values: NDArray[Any] = column.to_numpy()
    return values


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + (1 << 20):
        raise OSError(f"{needed:,} more bytes are needed and {free:,} are free")


def _add_header(raw: Path, target: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Turn raw values into a .npy file; the values are copied once, on the same disk."""
    with open(target, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, header)
        with open(raw, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 22)
    os.remove(raw)
