"""Matrices too large for one process, as raw rows: what passes between the layers of inference.

A dataset whose shards are rows of one type and width as memory has them, without a header: `part-00007.rows`, its
manifest's metadata saying dtype and width. Nothing is decoded: a task reads its own shard, or maps all of them as one
table. Shards on a local disk are mapped where they lie, one behind the other, each from where a huge page may begin, so
that the table has unused rows between them: Table.places says where an id is. Others are copied to the host first
(`replica`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts.datasets import Lineage, Manifest, Shard, leave_receipt, overlapping, read_file
from pipeline.contracts.errors import StorageError
from pipeline.contracts.host import is_on_this_host
from pipeline.contracts.storage import Storage

_ANONYMOUS = getattr(mmap, "MAP_ANONYMOUS", 0x20) | mmap.MAP_PRIVATE | 0x4000  # without a reserve
_FIXED = mmap.MAP_SHARED | 0x10


_HUGE = 1 << 21
"""Bytes of a huge page: a table of 1 GB is read at random a third faster where the system maps it by these."""
_MOST_ADDRESSES = 1 << 45
"""A quarter of what a process has, of which gaps may take most."""
_MADV_RANDOM, _MADV_HUGEPAGE = 1, 14
_DENSE = 0.2
"""Rows of a small page that are read, from which on all of the file may be."""
_STREAMED = 0.1
"""From here on, if the page cache has them not: a random page costs ten times as much work and time as one in a row."""
_SETTLED_AT_ONCE = 8
_GONE = "{} is in the manifest but not there; run `pinsage inference --force`"
_OTHER_SIZE = (
    "{} has {:,} bytes, expected {:,}: it was changed after its manifest was written; run `pinsage inference --force`"
)


def rows_name(number: int) -> str:
    """`part-00007.rows`: by partition, never by attempt."""
    return f"part-{number:05d}.rows"


def write_rows(storage: Storage, name: str, number: int, matrix: NDArray[Any], lineage: Lineage) -> Shard:
    """Store a matrix [n, width] as one shard, with its receipt; not yet safe from a crash of the machine."""
    data = np.ascontiguousarray(matrix).reshape(-1).view(np.uint8).data
    file = rows_name(number)
    checksum = storage.write_bytes(f"{name}/{file}", data, lasting=False)
    return leave_receipt(storage, name, Shard(file, len(matrix), data.nbytes, checksum), lineage)


def settle(storage: Storage, dataset: str, shards: Sequence[Shard]) -> None:
    """Make what write_rows wrote safe from a crash of the machine: most of it is on the disk by the end of a stage."""
    with ThreadPoolExecutor(_SETTLED_AT_ONCE) as pool:
        for _ in pool.map(lambda shard: storage.settle(f"{dataset}/{shard.name}"), shards):
            pass


def describe_rows(dtype: str, width: int) -> dict[str, Any]:
    """The metadata that a dataset of rows is committed with."""
    return {"dtype": np.dtype(dtype).str, "width": width}


def read_own_rows(storage: Storage, manifest: Manifest, number: int) -> NDArray[Any]:
    """One shard as a matrix [n, width], checked against the manifest. Read-only."""
    data = read_file(storage, manifest, manifest.shards[number].name)
    return np.frombuffer(data, manifest.metadata["dtype"]).reshape(-1, manifest.metadata["width"])


def read_range(storage: Storage, manifest: Manifest, start: int, stop: int) -> NDArray[Any]:
    """Rows [start, stop), of the shards that hold them, checked as read_own_rows does; none, if stop is not larger."""
    parts = overlapping(manifest, start, stop)
    return np.concatenate([read_own_rows(storage, manifest, number)[low:high] for number, low, high in parts])


@dataclass(frozen=True)
class Table:
    """All rows of a dataset, memory-mapped: rows [R, width], and where each shard's first row is."""

    rows: NDArray[Any]
    first_ids: NDArray[np.int64]
    first_places: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        """How many rows are of the dataset: fewer than rows has where there are gaps."""
        return len(self.rows) - int(self.first_places[-1] - self.first_ids[-1]) if len(self.first_ids) else 0

    def parts(self) -> list[NDArray[Any]]:
        """The rows of every shard."""
        counts = np.diff(self.first_ids, append=self.num_rows)
        return [self.rows[first : first + count] for first, count in zip(self.first_places, counts, strict=True)]

    def places(self, ids: NDArray[np.integer]) -> NDArray[np.integer]:
        """Where the rows of these ids, of any shape, are."""
        if np.array_equal(self.first_ids, self.first_places):
            return ids
        gaps = self.first_places - self.first_ids
        moved: NDArray[np.int64] = ids + gaps[np.searchsorted(self.first_ids, ids, side="right") - 1]
        return moved


def whole_table(manifest: Manifest, rows: NDArray[Any]) -> Table:
    """A table of rows that lie one behind the other without gaps."""
    first_ids = _first_ids(manifest)
    return Table(rows, first_ids, first_ids)


def is_dense(manifest: Manifest, share: float) -> bool:
    """Whether so large a share of the rows, at random, is on most of their pages."""
    return _row_share(manifest, share) > _DENSE


def is_streamed(manifest: Manifest, share: float) -> bool:
    """Whether so large a share of the rows, at random, is read sooner, and for less work, by reading all of them."""
    return _row_share(manifest, share) > _STREAMED


def _row_share(manifest: Manifest, share: float) -> float:
    """Of pages that are read for a share of the rows, about."""
    dtype, width = _kind_of(manifest)
    return share * max(1, mmap.PAGESIZE // (dtype.itemsize * width))


def _kind_of(manifest: Manifest) -> tuple[np.dtype[Any], int]:
    """The type and number of a row's values."""
    return np.dtype(manifest.metadata["dtype"]), int(manifest.metadata["width"])


def _is_on_a_disk_here(storage: Storage) -> bool:
    return storage.is_local and sys.platform == "linux" and is_on_this_host(storage.root)


def take_rows(storage: Storage, manifest: Manifest, ids: NDArray[np.integer]) -> NDArray[Any] | None:
    """Rows [n, width] of some ids, ascending, off a disk of this machine, past the page cache, one shard at a time.

    None where that is not such a disk, or most of what is read is in memory: mapped rows are there already. Raises
    StorageError for a file that is gone or has another size.
    """
    if not (len(ids) and _is_on_a_disk_here(storage)):
        return None
    parts = list(overlapping(manifest, int(ids[0]), int(ids[-1]) + 1))
    shards = [manifest.shards[number] for number, _, _ in parts]
    if 2 * sum(storage.is_in_memory(f"{manifest.dataset}/{shard.name}") for shard in shards) >= len(shards):
        return None
    dtype, width = _kind_of(manifest)
    rows, place, first = np.empty((len(ids), width), dtype), 0, int(_first_ids(manifest)[parts[0][0]])
    for shard in shards:
        path = f"{manifest.dataset}/{shard.name}"
        try:
            data = storage.load(path, lambda _: None)
        except FileNotFoundError:
            raise StorageError(_GONE.format(storage.locate(path))) from None
        if len(data) != shard.bytes:
            raise StorageError(_OTHER_SIZE.format(storage.locate(path), len(data), shard.bytes))
        stop = int(np.searchsorted(ids, first + shard.rows))
        rows[place:stop] = np.frombuffer(data, dtype).reshape(-1, width)[ids[place:stop] - first]
        place, first = stop, first + shard.rows
    return rows


def map_in_place(storage: Storage, manifest: Manifest, dense: bool = True) -> Table | None:
    """The shards where they lie as one read-only table, or None where that is not on a disk of this machine.

    dense: most pages will be read; else the system is told to read none along that is not asked for.
    """
    if not _is_on_a_disk_here(storage):
        return None
    dtype, width = _kind_of(manifest)
    counts = np.array([shard.rows for shard in manifest.shards], np.int64)
    size = dtype.itemsize * width
    for boundary in (_HUGE, mmap.PAGESIZE):
        unit = boundary // gcd(boundary, size)  # rows from a boundary to the next
        first_places = np.concatenate([[0], np.cumsum(-(-counts // unit) * unit)[:-1]])
        if int(first_places[-1]) * size < _MOST_ADDRESSES:
            break
    offsets = first_places * size
    paths = [storage.locate(f"{manifest.dataset}/{shard.name}") for shard in manifest.shards]
    advice = _MADV_HUGEPAGE if dense else _MADV_RANDOM
    memory = _map_together(paths, [shard.bytes for shard in manifest.shards], offsets.tolist(), advice)
    return Table(memory.view(dtype).reshape(-1, width), _first_ids(manifest), first_places)


def _first_ids(manifest: Manifest) -> NDArray[np.int64]:
    counts = [shard.rows for shard in manifest.shards]
    return np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)


def _map_together(paths: Sequence[str], sizes: Sequence[int], offsets: Sequence[int], advice: int) -> NDArray[np.uint8]:
    """Files as one array of bytes, each at its offset, a multiple of the page size; what lies between is not there.

    The array begins where a huge page may.

    The mapping goes with the array. Raises StorageError for a file that is gone or has another size.
    """
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype, library.mmap.argtypes = ctypes.c_void_p, [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    total = max((offset + size for offset, size in zip(offsets, sizes, strict=True)), default=0)
    if not total:
        return np.zeros(0, np.uint8)

    def place(address: int | None, size: int, protection: int, flags: int, file: int, what: str) -> int:
        found = library.mmap(address, size, protection, flags, file, 0)
        if found in (None, ctypes.c_void_p(-1).value):
            raise StorageError(f"cannot map {what}: {os.strerror(ctypes.get_errno())}; is there an address limit?")
        return int(found)

    reserved = total + _HUGE
    found = place(None, reserved, 0, _ANONYMOUS, -1, f"{total:,} bytes of address space")
    base = -(-found // _HUGE) * _HUGE
    memory = (ctypes.c_uint8 * total).from_address(base)
    weakref.finalize(memory, library.munmap, found, reserved)
    for path, size, offset in zip(paths, sizes, offsets, strict=True):
        if not size:
            continue
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise StorageError(_GONE.format(path)) from None
        try:
            if os.fstat(file).st_size != size:
                raise StorageError(_OTHER_SIZE.format(path, os.fstat(file).st_size, size))
            place(base + offset, size, mmap.PROT_READ, _FIXED, file, path)
            library.madvise(base + offset, size, advice)  # only advice: a system may not know it
        finally:
            os.close(file)
    return np.ctypeslib.as_array(memory)
