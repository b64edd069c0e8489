"""Embeddings to a FAISS index that states its own recall.

Reads embeddings, writes index: index.faiss, keys.parquet (row = FAISS id) and recall.json. The index is trained on a
sample, filled shard by shard in the order of the ids, and its search is widened until it finds what exact search
finds, as often as the settings ask. Scores are inner products. Built by the driver with resources.threads threads, so
that the bytes are the same every time. Memory: the index, the training sample and one shard; disk: the embeddings,
mapped from the host's cache. Time: training, then one pass over the embeddings for adding and one for exact search.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from pipeline.contracts import datasets
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, Manifest, Shard
from pipeline.contracts.errors import DataError, SettingsError
from pipeline.contracts.replica import map_vectors
from pipeline.contracts.schemas import EMBEDDINGS, INDEX
from pipeline.contracts.storage import Storage
from pipeline.spark import progress

INDEX_FILE, KEYS_FILE, RECALL_FILE = "index.faiss", "keys.parquet", "recall.json"
FLAT_LIMIT = 20_000
"""Up to here exact search costs well under a millisecond per query and core: nothing to approximate."""
POINTS_PER_CENTROID = 39
"""FAISS's own lower limit, below which k-means centroids are noise."""
NEAR_KEYS = 10_000
"""How many keys that begin alike are looked at to guess what a mistyped key meant."""

Vectors = NDArray[np.floating]
Block = tuple[int, NDArray[np.float32]]


def run(spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Build the index, tune it, measure it; an interrupted build goes on after the last finished file."""
    embeddings = datasets.open_manifest(storage, EMBEDDINGS)
    datasets.begin(storage, INDEX)
    vectors = map_vectors(storage, embeddings, "embedding", settings.resources.cache)
    task = settings.task.index
    factory = choose_factory(len(vectors), task.train_rows) if task.factory == "auto" else task.factory
    with omp_threads(settings.resources.threads):
        stored = datasets.finished_shard(storage, INDEX, INDEX_FILE, lineage)
        if stored is None:
            check_vectors(storage, embeddings, vectors)
            index = train(vectors, factory, task.train_rows, settings.task.seed)
            with progress("index: add", len(vectors)) as advance:
                for _, block in _blocks(vectors, embeddings):
                    index.add(block)
                    advance(len(block))
            stored = _store_index(storage, index, lineage, len(vectors))
        else:
            index = deserialize(storage.read_bytes(f"{INDEX.name}/{INDEX_FILE}"))
        report = measure(
            index, vectors, list(_bounds(embeddings)), task.k, task.num_queries, task.recall_target, settings.task.seed
        )
    report |= {"factory": factory, "bytes_per_vector": round(stored.bytes / len(vectors), 1)}
    text = json.dumps(report, indent=1, sort_keys=True).encode()
    keys = _store_keys(storage, embeddings, lineage)
    recall = datasets.write_file(storage, INDEX.name, RECALL_FILE, text, lineage)
    metadata = {name: report[name] for name in ("recall", "search")}
    datasets.commit(storage, INDEX, [stored, keys, recall], lineage, metadata)


# ------------------------------------------------------------------------------------------------ building


def choose_factory(num_vectors: int, train_rows: int) -> str:
    """Flat where exact search is cheap, else inverted lists: about 4 sqrt(N), each centroid seeing enough points."""
    if num_vectors <= FLAT_LIMIT:
        return "Flat"
    nlist = min(round(4 * num_vectors**0.5), min(train_rows, num_vectors) // POINTS_PER_CENTROID)
    return f"IVF{nlist},Flat" if nlist > 1 else "Flat"


def train(vectors: Vectors, factory: str, train_rows: int, seed: int) -> faiss.Index:
    """An empty, trained index. The sample is evenly spread over the rows, beginning at a place the seed decides.

    Raises SettingsError if FAISS does not know the factory string, or cannot train it on so few vectors.
    """
    num_vectors, width = vectors.shape
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise SettingsError(
            f"task.index.factory {factory}: FAISS does not build it for {width} dimensions ({_reason(error)}); use auto"
        ) from None
    size = min(train_rows, num_vectors)
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None and inverted.nlist > size:
        raise SettingsError(
            f"task.index.factory {factory} has {inverted.nlist:,} lists, and there are {size:,} vectors to train "
            "them on; use fewer lists, or auto"
        )
    if not index.is_trained:
        offset = np.random.default_rng([seed, 1]).random()
        rows = ((np.arange(size) + offset) * num_vectors / size).astype(np.int64).clip(max=num_vectors - 1)
        if inverted is not None:
            inverted.cp.min_points_per_centroid = 1
            inverted.cp.seed = int(np.random.default_rng([seed, 2]).integers(2**31))
        try:
            index.train(np.ascontiguousarray(vectors[rows], dtype=np.float32))
        except RuntimeError as error:
            raise SettingsError(
                f"task.index.factory {factory}: FAISS cannot train it on {size:,} vectors ({_reason(error)}); use auto"
            ) from None
    return index


def check_vectors(storage: Storage, embeddings: Manifest, vectors: Vectors) -> None:
    """Raise DataError, naming shard, row and key, for an embedding that is not finite or is all zeros."""
    if len(vectors) == 0:
        raise DataError(f"{storage.locate(EMBEDDINGS.name)} is empty: there is nothing to index; look at the items")
    for number, (start, block) in enumerate(_blocks(vectors, embeddings)):
        squares = np.einsum("nd,nd->n", block, block, dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(squares) | (squares == 0))
        if len(bad):
            row = int(bad[0])
            key = datasets.read_shard(storage, embeddings, number, ["key"]).column("key")[row].as_py()
            what = "all zeros" if squares[row] == 0 else "not finite"
            raise DataError(
                f"embeddings shard {number} row {row} (item {key}): the embedding is {what}, as are {len(bad) - 1:,} "
                "more of the shard, expected finite numbers that are not all 0; training has diverged: lower "
                "task.training.learning_rate and run `pinsage train` again"
            )
        assert start == sum(shard.rows for shard in embeddings.shards[:number])


def _store_index(storage: Storage, index: faiss.Index, lineage: Lineage, rows: int) -> Shard:
    with tempfile.TemporaryDirectory(prefix="pinsage-index-") as folder:
        local = os.path.join(folder, INDEX_FILE)
        faiss.write_index(index, local)
        return datasets.put_large_file(storage, INDEX.name, INDEX_FILE, local, lineage, rows=rows)


def _store_keys(storage: Storage, embeddings: Manifest, lineage: Lineage) -> Shard:
    """Stream key and id of every shard into one Parquet file, a row group per shard."""
    with tempfile.TemporaryDirectory(prefix="pinsage-index-") as folder:
        local = Path(folder) / KEYS_FILE
        schema = pa.schema([pa.field("key", pa.string()), pa.field("id", pa.uint32())])
        with pq.ParquetWriter(local, schema, compression="zstd") as writer:
            for number in range(len(embeddings.shards)):
                writer.write_table(datasets.read_shard(storage, embeddings, number, ["key", "id"]).cast(schema))
        return datasets.put_large_file(storage, INDEX.name, KEYS_FILE, local, lineage, rows=embeddings.num_rows)


def _bounds(embeddings: Manifest) -> Iterator[tuple[int, int]]:
    start = 0
    for shard in embeddings.shards:
        yield start, start + shard.rows
        start += shard.rows


def _blocks(vectors: Vectors, embeddings: Manifest) -> Iterator[Block]:
    """(first row, float32 vectors) of every shard, one at a time."""
    for start, stop in _bounds(embeddings):
        yield start, np.ascontiguousarray(vectors[start:stop], dtype=np.float32)


def _reason(error: Exception) -> str:
    """What a FAISS exception says, without its C++ function and file."""
    return str(error).strip().splitlines()[-1].rpartition("Error: ")[2].strip()


@contextmanager
def omp_threads(count: int) -> Iterator[None]:
    """Let FAISS use this many threads: sums, and with them the bytes of an index, depend on it."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


# ------------------------------------------------------------------------------------------------ recall


def measure(
    index: faiss.Index,
    vectors: Vectors,
    bounds: Sequence[tuple[int, int]],
    k: int,
    num_queries: int,
    target: float,
    seed: int,
) -> dict[str, Any]:
    """Widen the index's search until its recall@k on tuning queries reaches target; report recall on other queries.

    The queries are items, whose own entry is left out. A found item counts if it scores as high as the exact k-th, so
    duplicates stand for each other. Tuning stops where even the lower end of recall's 95 % interval reaches the
    target. Returns plain values: `search` holds the parameters, `curve` recall and compared vectors by width.
    """
    num_vectors = len(vectors)
    k = min(k, num_vectors - 1)
    count = min(num_queries, num_vectors // 2)
    chosen = np.random.default_rng([seed, 3]).permutation(num_vectors)
    tuning, reported = np.sort(chosen[:count]), np.sort(chosen[count : 2 * count])
    report: dict[str, Any] = {"k": k, "target": target, "num_vectors": num_vectors, "search": {}, "curve": []}
    report |= {"num_queries": count, "nlist": _nlist(index)}
    if k < 1:
        return report | {"recall": 1.0, "reached": True}
    exact = exact_kth_scores(vectors, bounds, np.concatenate([tuning, reported]), k)
    name, widths = _widths(index)
    for width in widths:
        set_search(index, {name: width} if name else {})
        hits, compared = recall(index, vectors, tuning, exact[:count], k)
        report["curve"].append({"width": width, "recall": float(hits.mean()), "compared": compared})
        report["search"] = {name: width} if name else {}
        if hits.mean() - 1.96 * hits.std() / len(hits) ** 0.5 >= target:
            break
    hits, _ = recall(index, vectors, reported, exact[count:], k)
    return report | {"recall": float(hits.mean()), "reached": bool(hits.mean() >= target)}


def exact_kth_scores(
    vectors: Vectors, bounds: Sequence[tuple[int, int]], queries: NDArray[np.int64], k: int
) -> NDArray[np.float32]:
    """The k-th highest inner product of every query row with any other row, found by comparing all of them."""
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    asked = np.ascontiguousarray(vectors[queries], dtype=np.float32)
    with progress("index: exact search", len(vectors)) as advance:
        for start, stop in bounds:
            if start == stop:
                continue
            block = np.ascontiguousarray(vectors[start:stop], dtype=np.float32)
            width = min(k + 1, len(block))
            scores, rows = faiss.knn(asked, block, width, metric=faiss.METRIC_INNER_PRODUCT)
            scores[rows + start == queries[:, None]] = -np.inf
            joined = np.concatenate([best, scores], axis=1)
            best = -np.partition(-joined, k - 1, axis=1)[:, :k]
            advance(stop - start)
    kth: NDArray[np.float32] = best.min(axis=1)
    return kth


def recall(
    index: faiss.Index, vectors: Vectors, queries: NDArray[np.int64], exact: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float64], float]:
    """Each query's share of its true k nearest that the index finds, and how many vectors it compared on average."""
    asked = np.ascontiguousarray(vectors[queries], dtype=np.float32)
    statistics: Any = faiss.cvar.indexIVF_stats  # type: ignore[attr-defined]
    statistics.reset()
    _, found = index.search(asked, k + 1)
    compared = statistics.ndis / len(queries) if _nlist(index) else float(index.ntotal)
    others = (found >= 0) & (found != queries[:, None])
    others &= np.cumsum(others, axis=1) <= k
    scores = np.empty(found.shape, dtype=np.float32)
    for column in range(found.shape[1]):
        scores[:, column] = np.einsum("qd,qd->q", asked, vectors[found[:, column]].astype(np.float32))
    slack = 1e-5 * np.maximum(np.abs(exact), 1e-30)
    return (others & (scores >= (exact - slack)[:, None])).sum(axis=1) / k, compared


def _nlist(index: faiss.Index) -> int | None:
    inverted = faiss.try_extract_index_ivf(index)
    return None if inverted is None else int(inverted.nlist)


def _widths(index: faiss.Index) -> tuple[str, list[int]]:
    """The parameter that widens this kind of index's search, and the values to try, narrow first."""
    nlist = _nlist(index)
    if nlist is not None:
        return "nprobe", [*(2**power for power in range(nlist.bit_length()) if 2**power < nlist), nlist]
    if isinstance(faiss.downcast_index(index), faiss.IndexHNSW):
        return "efSearch", [2**power for power in range(4, 13)]
    return "", [0]


def set_search(index: faiss.Index, parameters: dict[str, int]) -> None:
    """Set FAISS's own search parameters: nprobe of inverted lists, efSearch of HNSW."""
    for name, value in parameters.items():
        faiss.ParameterSpace().set_index_parameter(index, name, value)


# ------------------------------------------------------------------------------------------------ reading


def deserialize(data: bytes) -> faiss.Index:
    """An index from the bytes of its file."""
    return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))


@dataclass(frozen=True)
class Index:
    """A published index: keys and vectors in, keys and inner products out. Searching is thread-safe."""

    storage: Storage
    faiss_index: faiss.Index
    keys: pa.ChunkedArray
    embeddings: Manifest
    recall: dict[str, Any]

    @classmethod
    def open(cls, storage: Storage) -> Index:
        """Read the index of a run. Raises DataError if there is none, or if it is not of the run's embeddings."""
        manifest = datasets.open_manifest(storage, INDEX)
        embeddings = datasets.open_manifest(storage, EMBEDDINGS)
        if manifest.lineage.inputs[EMBEDDINGS.name] != embeddings.content:
            raise DataError(
                f"{storage.locate(INDEX.name)} was built from other embeddings than those beside it; "
                "run `pinsage index`"
            )
        index = deserialize(datasets.read_file(storage, manifest, INDEX_FILE))
        report = json.loads(datasets.read_file(storage, manifest, RECALL_FILE))
        set_search(index, report["search"])
        keys = pq.read_table(pa.BufferReader(datasets.read_file(storage, manifest, KEYS_FILE))).column("key")
        return cls(storage, index, keys, embeddings, report)

    def search(self, vectors: Vectors, k: int) -> tuple[list[list[str]], list[list[float]]]:
        """Keys and scores of the k best items for each of [n, d] vectors, best first; fewer if the index has fewer."""
        if vectors.ndim != 2 or vectors.shape[1] != self.faiss_index.d:
            raise DataError(f"vectors are {list(vectors.shape)}, expected [any number, {self.faiss_index.d}]")
        scores, rows = self.faiss_index.search(np.ascontiguousarray(vectors, dtype=np.float32), min(k, len(self.keys)))
        keys = [[self.keys[row].as_py() for row in found[found >= 0].tolist()] for found in rows]
        return keys, [line[found >= 0].tolist() for line, found in zip(scores, rows, strict=True)]

    def vector(self, item_key: str) -> NDArray[np.float32]:
        """An item's embedding [d], as stored. Raises DataError with the nearest known keys if there is no such item."""
        row = self.keys.index(item_key).as_py()
        if row < 0:
            alike = self.keys.filter(pc.starts_with(self.keys, item_key[:2]))[:NEAR_KEYS].to_pylist()
            near = difflib.get_close_matches(item_key, alike, n=3, cutoff=0.6)
            first = ", ".join(self.keys[:3].to_pylist())
            hint = f"did you mean {' or '.join(near)}?" if near else f"the first are {first}"
            raise DataError(f"no item has the key {item_key!r} among {len(self.keys):,}; {hint}")
        column = datasets.read_rows(self.storage, self.embeddings, row, row + 1, ["embedding"]).column("embedding")
        vector: NDArray[np.float32] = datasets.arrow_to_vectors(column)[0].astype(np.float32)
        return vector

    def neighbours(self, item_key: str, k: int, exclude_self: bool = True) -> tuple[list[str], list[float]]:
        """Keys and scores of the k items nearest to one item, best first."""
        keys, scores = self.search(self.vector(item_key)[None], k + 1 if exclude_self else k)
        kept = [pair for pair in zip(keys[0], scores[0], strict=True) if not exclude_self or pair[0] != item_key][:k]
        return [key for key, _ in kept], [score for _, score in kept]
