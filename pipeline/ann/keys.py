"""Keys of the items of an index: row to key, and key to row without reading all of them.

keys.arrow has the keys in the order of the rows; lookup.arrow has a 64-bit hash of every key and its row, ordered by
hash. Both are uncompressed Arrow files that are mapped, not read: 100 million keys take address space, not memory. They
are written from parts, a part per shard of embeddings, in memory of a part and of a 256th of the hashes.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.contracts.datasets import one_array
from pipeline.contracts.errors import DataError

Keys = Iterable[Any]
"""Text or integers: a list, a set, an array [n]."""
NEAR_KEYS = 10_000
"""How many keys that begin alike are looked at to guess what a mistyped key meant."""
BUCKETS = 256
_ENTRY = np.dtype([("hash", "<u8"), ("row", "<u4")])
_KEYS = pa.schema([pa.field("key", pa.large_string(), nullable=False)])
_LOOKUP = pa.schema([pa.field("hash", pa.uint64(), nullable=False), pa.field("row", pa.uint32(), nullable=False)])


def hash_keys(keys: Sequence[str]) -> NDArray[np.uint64]:
    """A hash of each key, the same everywhere; two in a thousand million keys may share one."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, "<u8")


def as_texts(keys: Keys, name: str) -> list[str]:
    """Keys as they are stored: an integer as its digits. Raises DataError, naming the first, for what is neither."""
    if isinstance(keys, (str, bytes)):
        raise DataError(f"{name} is the text {keys!r}, expected a list of keys")
    if isinstance(keys, np.ndarray) and keys.ndim != 1:
        raise DataError(f"{name} is an array {list(keys.shape)}, expected a list or a one-dimensional array of keys")
    texts = list(keys)
    for place, key in enumerate(texts):
        if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
            texts[place] = str(key)
        elif not isinstance(key, str):
            raise DataError(
                f"{name}: key {place} is {key!r} of type {type(key).__name__}, expected text or an integer; give "
                "vectors as an array [n, d]"
            )
    return texts


def encode_part(keys: pa.ChunkedArray, first: int) -> bytes:
    """The keys of rows [first, first + n), and their hashes in order."""
    column = one_array(keys.cast(pa.large_string()))
    hashes = hash_keys(column.to_pylist())
    order = np.argsort(hashes, kind="stable")
    table = pa.table(
        {"key": column, "hash": pa.array(hashes[order]), "row": pa.array((order + first).astype(np.uint32))}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(column)))
    return bytes(sink.getvalue())


def write_tables(parts: Sequence[str | Path], keys_file: str | Path, lookup_file: str | Path) -> None:
    """Both files from the local files of all parts, in the order of the rows."""
    opened = [pa.ipc.open_file(pa.memory_map(str(part))).read_all() for part in parts]
    with pa.ipc.new_file(str(keys_file), _KEYS) as writer:
        for part in opened:
            writer.write_table(part.select(["key"]).cast(_KEYS), max_chunksize=max(1, part.num_rows))
    hashes = [part.column("hash").to_numpy() for part in opened]
    rows = [part.column("row").to_numpy() for part in opened]
    with pa.ipc.new_file(str(lookup_file), _LOOKUP) as writer:
        for bucket in range(BUCKETS):
            cuts = [_bounds(part, bucket) for part in hashes]
            found = np.concatenate([part[low:high] for part, (low, high) in zip(hashes, cuts, strict=True)])
            owners = np.concatenate([part[low:high] for part, (low, high) in zip(rows, cuts, strict=True)])
            order = np.lexsort((owners, found))
            batch = pa.record_batch([pa.array(found[order]), pa.array(owners[order])], schema=_LOOKUP)
            writer.write_batch(batch)


def _bounds(hashes: NDArray[np.uint64], bucket: int) -> tuple[int, int]:
    edges = np.array([bucket << 56, ((bucket + 1) << 56) - 1], np.uint64)
    return int(np.searchsorted(hashes, edges[0])), int(np.searchsorted(hashes, edges[1], side="right"))


class KeyTable:
    """Keys by row and rows by key, from two mapped files."""

    def __init__(self, keys_file: str | Path, lookup_file: str | Path) -> None:
        keys = pa.ipc.open_file(pa.memory_map(str(keys_file)))
        lookup = pa.ipc.open_file(pa.memory_map(str(lookup_file)))
        self._chunks = [keys.get_batch(number).column(0) for number in range(keys.num_record_batches)]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)
        batches = [lookup.get_batch(number) for number in range(lookup.num_record_batches)]
        self._hashes = [batch.column(0).to_numpy() for batch in batches]
        self._rows = [batch.column(1).to_numpy() for batch in batches]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """The keys of rows."""
        places = np.searchsorted(self._ends, rows, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])[places]
        found: list[str] = [""] * len(rows)
        for chunk in np.unique(places):
            own = np.flatnonzero(places == chunk)
            taken = self._chunks[chunk].take(pa.array((rows - starts)[own])).to_pylist()
            for place, key in zip(own.tolist(), taken, strict=True):
                found[place] = key
        return found

    def rows(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """The row of each key, -1 for a key that no item has."""
        found = np.full(len(keys), -1, np.int64)
        hashes = hash_keys(keys)
        buckets = (hashes >> np.uint64(56)).astype(np.int64)
        for bucket in np.unique(buckets):
            own = np.flatnonzero(buckets == bucket)
            known, rows = self._hashes[bucket], self._rows[bucket]
            places = np.searchsorted(known, hashes[own])
            while len(own):  # a second round only for keys that share a hash
                inside = places < len(known)
                own, places = own[inside], places[inside]
                same = known[places] == hashes[own]
                own, places = own[same], places[same]
                candidates = rows[places].astype(np.int64)
                right = np.array([keys[o] == key for o, key in zip(own, self.keys(candidates), strict=True)], bool)
                found[own[right]] = candidates[right]
                own, places = own[~right], places[~right] + 1
        return found

    def known_rows(self, keys: Keys, name: str = "keys") -> NDArray[np.int64]:
        """As rows, but DataError, with the nearest known keys, for one that no item has; name is what they are."""
        texts = as_texts(keys, name)
        rows = self.rows(texts)
        if (rows < 0).any():
            raise DataError(self._unknown(texts[int(np.argmin(rows))]))
        return rows

    def _unknown(self, key: str) -> str:
        alike: list[str] = []
        for some in self._alike(key[:2]):
            alike += some
            if len(alike) >= NEAR_KEYS:
                break
        near = difflib.get_close_matches(key, alike[:NEAR_KEYS], n=3, cutoff=0.6)
        first = ", ".join(self.keys(np.arange(min(3, len(self)))))
        hint = f"did you mean {' or '.join(near)}?" if near else f"the first are {first}"
        return f"no item has the key {key!r} among {len(self):,}; {hint}"

    def _alike(self, start: str) -> Iterator[list[str]]:
        for chunk in self._chunks:
            yield chunk.filter(pc.starts_with(chunk, start)).to_pylist()
