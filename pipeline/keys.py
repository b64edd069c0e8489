"""Kernel of ingest: outside keys to 64-bit hashes, and sorted hashes to ids.

A key is known by its hash: of an int64 a bijection, so that no two meet and the hash gives the key back; of a text 64
bits, with 32 independent ones beside them to check. Two texts of one hash are found by those wherever rows of that hash
come together, and are an error, never one key. (Texts that share all 96 bits would pass as one: with four billion keys
the chance of a single such pair is 1e-10.) The rank of its hash is what makes a key's id, whoever computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.contracts.datasets import Manifest, one_array
from pipeline.contracts.errors import DataError
from pipeline.contracts.replica import map_values
from pipeline.contracts.storage import Storage

RANGE_ROWS = 4_000_000
"""Keys that one task sorts at once, about; the ids do not depend on it."""
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_FIRST_BACK, _SECOND_BACK = np.uint64(pow(_FIRST, -1, 1 << 64)), np.uint64(pow(_SECOND, -1, 1 << 64))
_PRIMES = np.array(
    [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5], np.uint64
)
_BATCH = 512
"""Look-ups under way at once: memory serves them together."""


@dataclass(frozen=True)
class Keys:
    """Keys as hashes, with checks and texts if they are text; of integers the hashes are all."""

    hashes: NDArray[np.uint64]
    checks: NDArray[np.uint32] | None = None
    texts: pa.StringArray | None = None

    def __len__(self) -> int:
        return len(self.hashes)

    def take(self, places: NDArray[np.integer]) -> Keys:
        """The keys at these places."""
        if self.checks is None or self.texts is None:
            return Keys(self.hashes[places])
        return Keys(self.hashes[places], self.checks[places], self.texts.take(pa.array(places)))

    @property
    def outside(self) -> pa.Array:
        """The keys as they came: int64 or text."""
        return pa.array(_unmixed(self.hashes)) if self.texts is None else self.texts

    @property
    def shown(self) -> pa.Array:
        """The keys as text."""
        return self.outside.cast(pa.string())

    @property
    def columns(self) -> dict[str, Any]:
        """As the columns that from_table reads: nothing that can be computed again is moved."""
        return {"hash": self.hashes} if self.texts is None else {"key": self.texts}


def column(integers: bool) -> pa.Field:
    """The column that Keys.columns has for integer or text keys."""
    return pa.field("hash", pa.uint64()) if integers else pa.field("key", pa.string())


def from_table(table: pa.Table) -> Keys:
    """Keys from their column, see Keys.columns."""
    if "key" in table.column_names:
        return hashed(table.column("key"))
    return Keys(table.column("hash").to_numpy())


def hashed(keys: pa.ChunkedArray | pa.Array) -> Keys:
    """Keys of an int64 or string column without nulls."""
    array = one_array(keys)
    if pa.types.is_integer(array.type):
        return Keys(_mixed(array.to_numpy()))
    _, offsets, data = array.buffers()
    if not len(array):
        return Keys(np.zeros(0, np.uint64), np.zeros(0, np.uint32), array)
    starts = np.frombuffer(offsets, np.int32, len(array) + 1, 4 * array.offset)
    letters = np.frombuffer(data if data is not None and data.size else b"\0", np.uint8)
    hashes, checks = hash_text(starts, letters)
    return Keys(hashes, checks, array)


def concatenated(parts: Sequence[Keys]) -> Keys:
    """All keys of parts that are of one kind."""
    hashes = np.concatenate([part.hashes for part in parts])
    if any(part.checks is None for part in parts):
        return Keys(hashes)
    return Keys(
        hashes,
        np.concatenate([part.checks for part in parts if part.checks is not None]),
        pa.concat_arrays([part.texts for part in parts if part.texts is not None]),
    )


def grouped(keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order of the keys by hash, rows of one key in theirs, and where in it each key's rows begin.

    Raises DataError if two different keys have one hash.
    """
    order = np.argsort(keys.hashes, kind="stable")
    ranked = keys.hashes[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = ranked[1:] != ranked[:-1]
    if keys.checks is not None:
        checks = keys.checks[order]
        _refuse_collisions(keys, order, np.flatnonzero(~is_first[1:] & (checks[1:] != checks[:-1])))
    return order, np.flatnonzero(is_first)


def distinct(keys: Keys) -> Keys:
    """Every key once, in the order of the hashes. Raises DataError if two different keys have one hash."""
    if keys.checks is not None:
        order, starts = grouped(keys)
        return keys.take(order[starts])
    ranked = np.sort(keys.hashes)
    is_first = np.ones(len(ranked), dtype=bool)
    is_first[1:] = ranked[1:] != ranked[:-1]
    return Keys(ranked[is_first])


def counted(keys: Keys, counts: NDArray[np.int64] | None = None) -> tuple[Keys, NDArray[np.int64]]:
    """As distinct, with how often each key occurs, or the sum of its counts."""
    order, starts = grouped(keys)
    if not len(order):
        return keys, np.zeros(0, np.int64)
    if counts is None:
        return keys.take(order[starts]), np.diff(np.append(starts, len(order)))
    return keys.take(order[starts]), np.add.reduceat(counts[order], starts)


def united(earlier: Keys, ids: NDArray[np.int64], tonight: Keys) -> tuple[Keys, NDArray[np.int64], NDArray[np.bool_]]:
    """Distinct keys of an earlier run and of tonight: in the order of hashes, with earlier ids (else -1), and which are
    there tonight."""
    both = concatenated([earlier, tonight])
    order, starts = grouped(both)
    is_old = order[starts] < len(earlier)
    known = np.full(len(starts), -1, np.int64)
    known[is_old] = ids[order[starts][is_old]]
    sizes = np.diff(np.append(starts, len(order)))
    return both.take(order[starts]), known, ~is_old | (sizes == 2)


def count_ranges(num_rows: int) -> int:
    """How many ranges of hashes to sort so many keys in: a power of two."""
    return 1 << max(0, -(-num_rows // RANGE_ROWS) - 1).bit_length()


def range_of(hashes: NDArray[np.uint64], num_ranges: int) -> NDArray[np.uint64]:
    """The range of each hash, by its top bits."""
    if num_ranges == 1:
        return np.zeros(len(hashes), np.uint64)
    return hashes >> np.uint64(64 - (num_ranges.bit_length() - 1))


def _refuse_collisions(keys: Keys, order: NDArray[np.int64], places: NDArray[np.int64]) -> None:
    if len(places) and keys.texts is not None:
        one, other = (keys.texts[int(order[places[0] + step])].as_py() for step in (0, 1))
        raise DataError(
            f"the keys {one!r} and {other!r} are different and have the same 64-bit hash, so one would be taken for "
            "the other; rename one of them"
        )


# ------------------------------------------------------------------------------------------------ look-up


class KeyTable:
    """The sorted hashes of a side, mapped from this host's one copy, and the id of each.

    Hashes are even, so an index on their top bits finds a key's place within a few neighbours: two waits for memory per
    key, which look-ups of one batch share. Memory of the process: the index, a byte or two per key.
    """

    def __init__(
        self, hashes: NDArray[np.uint64], checks: NDArray[np.uint32] | None, ids: NDArray[np.integer] | None
    ) -> None:
        self.hashes, self.checks, self.ids = hashes, checks, ids
        bits = min(max(1, (len(hashes) // 4).bit_length()), 40)
        self.shift = np.uint64(64 - bits)
        width = np.uint32 if len(hashes) < 1 << 32 else np.int64
        self.starts = _index(hashes, self.shift, np.zeros((1 << bits) + 1, width))

    @classmethod
    def open(cls, storage: Storage, manifest: Manifest, cache: str | None) -> KeyTable:
        """The table of a dataset with columns hash, of texts check, and id unless the row is the id."""
        key = (storage.url, manifest.content, cache)
        if key not in _opened:
            while len(_opened) > 2:
                _opened.pop(next(iter(_opened)))
            names = manifest.metadata["columns"]
            found: dict[str, NDArray[Any]] = {}
            for name, dtype in (("hash", np.uint64), ("check", np.uint32), ("id", np.uint32)):
                if name in names:
                    nothing = np.zeros(0, dtype)
                    found[name] = map_values(storage, manifest, name, cache) if manifest.num_rows else nothing
            _opened[key] = cls(found["hash"], found.get("check"), found.get("id"))
        return _opened[key]

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """The id of each key, -1 where it is unknown. Raises DataError if another key has its hash."""
        found: NDArray[np.int64] = _find(keys.hashes, self.hashes, self.starts, self.shift)[0]
        if not len(self.hashes):
            return found
        known, rows = found >= 0, np.maximum(found, 0)
        if self.checks is not None and keys.texts is not None:
            other = np.flatnonzero(known & (self.checks[rows] != keys.checks))
            if len(other):
                raise DataError(
                    f"the key {keys.texts[int(other[0])].as_py()!r} has the same 64-bit hash as another, so one would "
                    "be taken for the other; rename it"
                )
        if self.ids is not None:
            found = np.where(known, self.ids[rows], np.int64(-1))
        return found


_opened: dict[tuple[str, str, str | None], KeyTable] = {}
"""The tables that this process has mapped."""


def table_of(keys: Keys, **more: Any) -> pa.Table:
    """Rows of a KeyTable's dataset: sorted keys as hash and, of texts, check and key; and further columns."""
    columns: dict[str, Any] = {"hash": keys.hashes}
    if keys.checks is not None:
        columns |= {"check": keys.checks, "key": keys.texts}
    return pa.table({**columns, **more})


def keys_of(table: pa.Table) -> Keys:
    """The keys of table_of's rows."""
    hashes = table.column("hash").to_numpy()
    if "key" not in table.column_names:
        return Keys(hashes)
    return Keys(hashes, table.column("check").to_numpy(), pa.concat_arrays(table.column("key").chunks))


def commonest(keys: Keys, counts: NDArray[np.int64], number: int) -> list[tuple[int, str]]:
    """The keys with the highest counts, as (count, key), equal counts by key."""
    if not len(keys):
        return []
    least = np.partition(counts, -min(number, len(counts)))[-min(number, len(counts))]
    places = np.flatnonzero(counts >= least)
    rows = pa.table({"count": counts[places], "key": keys.take(places).shown})
    best = pc.select_k_unstable(rows, k=number, sort_keys=[("count", "descending"), ("key", "ascending")])
    return [(row["count"], row["key"]) for row in rows.take(best).to_pylist()]


@numba.njit(cache=True, nogil=True)
def _mixed(keys: Any) -> Any:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), a bijection of 64 bits."""
    result = np.empty(len(keys), np.uint64)
    for k in range(len(keys)):
        value = np.uint64(keys[k])
        value = (value ^ (value >> np.uint64(30))) * np.uint64(_FIRST)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(_SECOND)
        result[k] = value ^ (value >> np.uint64(31))
    return result


@numba.njit(cache=True, nogil=True)
def _unmixed(hashes: Any) -> Any:
    """The keys that _mixed gives these hashes."""
    result = np.empty(len(hashes), np.int64)
    for k in range(len(hashes)):
        value = hashes[k]
        value = (value ^ (value >> np.uint64(31)) ^ (value >> np.uint64(62))) * _SECOND_BACK
        value = (value ^ (value >> np.uint64(27)) ^ (value >> np.uint64(54))) * _FIRST_BACK
        result[k] = np.int64(value ^ (value >> np.uint64(30)) ^ (value >> np.uint64(60)))
    return result


@numba.njit(cache=True, nogil=True, inline="always")
def _rotated(value: Any, bits: Any) -> Any:
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@numba.njit(cache=True, nogil=True)
def hash_text(offsets: Any, letters: Any) -> Any:
    """(64-bit hash, 32-bit check) of each text, from an Arrow string array's buffers.

    Two lanes over the text's words of 8 bytes, each as XXH64 treats the end of its input, from constants of their own.
    """
    p1, p2, p3, p4, p5 = _PRIMES
    count = len(offsets) - 1
    hashes, checks = np.empty(count, np.uint64), np.empty(count, np.uint32)
    for k in range(count):
        place, stop = np.int64(offsets[k]), np.int64(offsets[k + 1])
        one = p5 + np.uint64(stop - place)
        two = p3 ^ (np.uint64(stop - place) * p4)
        while place < stop:
            word = np.uint64(0)
            if stop - place >= 8:
                for j in range(8):
                    word |= np.uint64(letters[place + j]) << np.uint64(8 * j)
            else:
                for j in range(stop - place):
                    word |= np.uint64(letters[place + j]) << np.uint64(8 * j)
            place += 8
            one = _rotated(one ^ (_rotated(word * p2, 31) * p1), 27) * p1 + p4
            two = _rotated(two ^ (_rotated(word * p3, 33) * p5), 29) * p2 + p1
        one = (one ^ (one >> np.uint64(33))) * p2
        one = (one ^ (one >> np.uint64(29))) * p3
        two = (two ^ (two >> np.uint64(31))) * p1
        two = (two ^ (two >> np.uint64(30))) * p2
        hashes[k] = one ^ (one >> np.uint64(32))
        checks[k] = np.uint32(two >> np.uint64(32))
    return hashes, checks


@numba.njit(cache=True, nogil=True)
def _index(hashes: Any, shift: Any, starts: Any) -> Any:
    """Where the hashes of each value of the top bits begin in their order: starts is filled and returned."""
    bucket = np.int64(0)
    for k in range(len(hashes)):
        own = np.int64(hashes[k] >> shift)
        while bucket <= own:
            starts[bucket] = k
            bucket += 1
    while bucket < len(starts):
        starts[bucket] = len(hashes)
        bucket += 1
    return starts


@numba.njit(cache=True, nogil=True)
def _find(wanted: Any, hashes: Any, starts: Any, shift: Any) -> Any:
    """The place of each wanted hash among the sorted ones, -1 where it is not there."""
    result = np.empty(len(wanted), np.int64)
    places, touched = np.empty(_BATCH, np.int64), np.uint64(0)
    for first in range(0, len(wanted), _BATCH):
        count = min(_BATCH, len(wanted) - first)
        for k in range(count):
            places[k] = starts[wanted[first + k] >> shift]
        if len(hashes):
            for k in range(count):  # reads that wait for nothing, so that they wait together
                touched ^= hashes[min(places[k] + 3, len(hashes) - 1)]
        for k in range(count):
            want, place = wanted[first + k], places[k]
            while place < len(hashes) and hashes[place] < want:
                place += 1
            result[first + k] = place if place < len(hashes) and hashes[place] == want else -1
    return result, touched  # or the reads would be left out
