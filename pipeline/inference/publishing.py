"""EMBEDDINGS as they are published, and what the manifest says of them: lengths, coverage, drift since last time."""

from __future__ import annotations

import hashlib
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    arrow_to_vectors,
    decode_table,
    encode_table,
    find_manifest,
    load_stored,
    open_manifest,
    read_rows,
    read_stored,
    shard_of_rows,
    vectors_to_arrow,
)
from pipeline.contracts.errors import PipelineError
from pipeline.contracts.host import physical_memory
from pipeline.contracts.storage import Storage
from pipeline.contracts.vectors import find_vectors, is_stored_alike
from pipeline.digests import ByteDigest
from pipeline.inference.halves import as_single
from pipeline.inference.network import Array
from pipeline.mixing import read_only
from pipeline.steps import Encoded, Report

_IN_MEMORY = 8
"""Of so many parts of a host's memory, embeddings that fit one stay in it for who reads them next."""
STILL = 0.99
"""An item whose embedding has a smaller cosine with its former one has moved."""


class Publisher:
    """Rows of EMBEDDINGS from vectors of consecutive items; goes along to tasks."""

    def __init__(self, storage: Storage, settings: Settings, lineage: Lineage) -> None:
        self._storage, self._items = storage, open_manifest(storage, schemas.ITEMS)
        self._missing = open_manifest(storage, schemas.FEATURES).metadata.get("missing", {})
        self._earlier, self._former = _former(settings.task.data.previous)
        self._is_gone_on_from = settings.resources.inference.keep_layers
        model = schemas.MODEL.name
        self._same_model = self._former is not None and self._former.lineage.inputs.get(model) == lineage.inputs.get(
            model
        )

    def rows(self, start: int, stop: int, vectors: Array, then: pa.Table | None = None) -> tuple[Encoded, Report]:
        """The rows of items [start, stop), and what describe needs of them; then are the earlier run's, if known."""
        known = read_rows(self._storage, self._items, start, stop, ["key", "id", "degree"])
        table = pa.table({"key": known["key"], "id": known["id"], "embedding": vectors_to_arrow(vectors)})
        schemas.EMBEDDINGS.check(table.schema, f"embeddings of items {start:,} to {stop:,}")
        drift = self._drift(start, known["key"], vectors, then)
        return self._made(encode_table(table), known, {**_statistics(vectors), "drift": drift})

    def renewed(self, start: int, stop: int, ids: NDArray[np.int64], vectors: Array) -> tuple[Encoded, Report]:
        """The rows of items [start, stop): the earlier run's, with the vectors of the items ids, ascending, in place.

        Where a shard of the earlier run has just these items, its bytes serve, else they are made of its rows.
        """
        found = self._former_bytes(start, stop)
        try:
            places = None if found is None else find_vectors(found[1], "embedding")
        except ValueError:
            places = None
        if found is None or places is None or (places.dtype, places.width) != (vectors.dtype, vectors.shape[1]):
            whole = np.zeros((stop - start, vectors.shape[1]), vectors.dtype)
            rows = self.former(start, stop)
            if rows is not None:
                whole[: rows.num_rows] = arrow_to_vectors(rows["embedding"])
            whole[ids - start] = vectors
            return self.rows(start, stop, whole, rows)
        known, data = found
        drift = _drift(as_single(vectors), as_single(places.take(data, ids - start)))
        same = stop - start - len(ids)
        drift = {"compared": stop - start, "cosines": drift["cosines"] + same, "moved": drift["moved"]}
        places.replace(data, ids - start, vectors)
        return self._made(data, known, {**_statistics(*places.pages(data)), "drift": drift})

    def _former_bytes(self, start: int, stop: int) -> tuple[pa.Table, memoryview] | None:
        """Degrees of the items [start, stop), and the earlier run's shard of just these items, to be changed.

        None if it has none, or they had other keys.
        """
        former, earlier, storage, items = self._former, self._earlier, self._storage, self._items
        number = None if former is None else shard_of_rows(former, start, stop)
        if former is None or earlier is None or number is None:
            return None
        shard, known = former.shards[number], former.metadata.get("shard_digests")
        digest, expected = (ByteDigest(), known[number]) if known else (hashlib.sha256(), shard.sha256)
        data, own = load_stored(earlier, former.dataset, shard, digest, expected), shard_of_rows(items, start, stop)
        if own is not None:
            stored = read_stored(storage, items.dataset, items.shards[own])
            if is_stored_alike(stored, data, "key"):
                return decode_table(stored, ["degree"]), data
        rows = read_rows(storage, items, start, stop, ["key", "degree"])
        return (rows, data) if decode_table(data, ["key"])["key"].equals(rows["key"]) else None

    def describe(self, reports: list[Report]) -> dict[str, Any]:
        """What the manifest says of all embeddings.

        spread is the mean squared distance from their mean: 0 where all are alike. missing_content counts items by
        column of the content; drift is None where no earlier run has embeddings of the same width. Where layers are
        kept, shard_digests are of the shards' bytes: the next night copies most of them, and compares these faster than
        checksums.
        """
        items = sum(report["items"] for report in reports)
        number = max(1, items)
        mean = sum(report["norm_sum"] for report in reports) / number
        squares = sum(report["norm_squares"] for report in reports) / number
        centre = np.sum([report["sums"] for report in reports], axis=0) / number
        norms = [norm for report in reports for norm in report["norms"]]
        return {
            "items": items, "zeros": sum(report["zeros"] for report in reports), "norm_mean": mean,
            "norm_deviation": max(0.0, squares - mean**2) ** 0.5, "norm_least": min(norms, default=0.0),
            "norm_most": max(norms, default=0.0), "spread": max(0.0, squares - float(centre @ centre)),
            "without_edges": sum(report["without_edges"] for report in reports), "missing_content": self._missing,
            "drift": self._described_drift([report["drift"] for report in reports if report["drift"]]),
            "width": len(centre),
            **({"shard_digests": [report["digest"] for report in reports]} if self._is_gone_on_from else {}),
        }  # fmt: skip

    def former(self, start: int, stop: int) -> pa.Table | None:
        """Keys and embeddings of items [start, stop) in the earlier run; None if it has none of them."""
        former, earlier = self._former, self._earlier
        if former is None or earlier is None or start >= former.num_rows:
            return None
        return read_rows(earlier, former, start, min(stop, former.num_rows), ["key", "embedding"])

    def _made(self, data: memoryview, items: pa.Table, report: Report) -> tuple[Encoded, Report]:
        """A shard, and with what else goes to its report."""
        report = report | {"without_edges": pc.sum(pc.equal(items["degree"], 0)).as_py() or 0}
        if self._is_gone_on_from:
            digest = ByteDigest()
            digest.update(data)
            report["digest"] = digest.hexdigest()
        whole = len(data) * self._items.num_rows // max(1, items.num_rows)
        return Encoded(data, items.num_rows, whole * _IN_MEMORY <= physical_memory()), report

    def _drift(self, start: int, keys: pa.ChunkedArray, vectors: Array, rows: pa.Table | None = None) -> Report | None:
        """Of the items that the earlier run numbers alike: how far they are from where they were."""
        try:
            rows = self.former(start, start + len(keys)) if rows is None else rows
        except PipelineError:  # damaged there, which is no reason to have no embeddings tonight
            return None
        if rows is None:
            return None
        then = as_single(arrow_to_vectors(rows["embedding"]))
        if then.shape[1] != vectors.shape[1]:
            return None
        same = pc.equal(keys.slice(0, len(then)), rows["key"]).to_numpy()
        return _drift(as_single(vectors[: len(then)])[same], then[same])

    def _described_drift(self, reports: list[Report]) -> dict[str, Any] | None:
        compared = sum(report["compared"] for report in reports)
        if not compared:
            return None
        return {
            "compared": compared, "same_model": self._same_model,
            "cosine_mean": sum(report["cosines"] for report in reports) / compared,
            "moved_share": sum(report["moved"] for report in reports) / compared,
        }  # fmt: skip


def _former(url: str | None) -> tuple[Storage | None, Manifest | None]:
    """The earlier run and its embeddings, if it has any that can be read."""
    if url is None:
        return None, None
    try:
        storage = Storage(url)
        return storage, find_manifest(storage, schemas.EMBEDDINGS)
    except PipelineError:
        return None, None


def _drift(now: NDArray[np.float32], then: NDArray[np.float32]) -> Report:
    """How far vectors [n, d] are from where they were, by their cosines."""
    products = np.empty((3, len(now)), np.float64)
    _multiply(read_only(now), read_only(now), products[0])
    _multiply(read_only(then), read_only(then), products[1])
    _multiply(read_only(now), read_only(then), products[2])
    lengths = np.sqrt(products[0] * products[1])
    cosines = np.where(lengths > 0, products[2] / np.where(lengths > 0, lengths, 1), 1.0)
    return {"compared": len(cosines), "cosines": float(cosines.sum()), "moved": int((cosines < STILL).sum())}


def _statistics(*parts: Array) -> Report:
    """Of a shard's embeddings: how many, how many are all zeros, their lengths, and their sum."""
    squares, sums = np.empty(sum(map(len, parts)), np.float64), np.zeros(parts[0].shape[1], np.float64)
    first = 0
    for part in parts:
        _add_up(read_only(as_single(part)), squares[first : first + len(part)], sums)
        first += len(part)
    norms = np.sqrt(squares)
    return {
        "items": len(norms),
        "zeros": int((norms == 0).sum()),
        "norm_sum": float(norms.sum()),
        "norm_squares": float(squares.sum()),
        "norms": [float(norms.min()), float(norms.max())] if len(norms) else [],
        "sums": sums.tolist(),
    }


@numba.njit(nogil=True, cache=True, fastmath={"reassoc"})
def _multiply(one: Any, other: Any, products: Any) -> None:
    """Inner products row by row, in float64."""
    for row in range(len(products)):
        total = 0.0
        for j in range(one.shape[1]):
            total += np.float64(one[row, j]) * np.float64(other[row, j])
        products[row] = total


@numba.njit(nogil=True, cache=True, fastmath={"reassoc"})
def _add_up(rows: Any, squares: Any, sums: Any) -> None:
    """Every row's squared length, and the sum of all rows, in float64."""
    for row in range(len(rows)):
        total = 0.0
        for j in range(len(sums)):
            value = np.float64(rows[row, j])
            total += value * value
            sums[j] += value
        squares[row] = total
