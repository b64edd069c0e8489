"""The steps that Spark carries out: a sample, then one pass that adds, checks and searches exactly; and the merge.

A part is a run of shards: its task reads each of them once, refuses vectors that cannot be searched, adds them to a
copy of the trained index, and keeps the true neighbours of the queries among them, and the keys. All lies in the
scratch folder `index-parts` with receipts: a lost task redoes its own part, a restarted stage does what is missing.
Memory of a task: its part of the index and one shard; of the driver: the sample, and the index or, on disk, a list.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline.ann import keys as key_files
from pipeline.ann import parts
from pipeline.ann.devices import Floats, ListFinder
from pipeline.ann.recall import Exact, exact_neighbours, merge_exact
from pipeline.ann.searching import unsearchable
from pipeline.ann.training import Sample
from pipeline.contracts import datasets
from pipeline.contracts.datasets import Lineage, Manifest, Shard
from pipeline.contracts.errors import DataError
from pipeline.contracts.schemas import INDEX_PARTS, how_to_build
from pipeline.contracts.storage import Storage
from pipeline.contracts.vectors import vectors_in
from pipeline.spark import Task, run_tasks

MAX_PARTS = 256
"""More shards than this share parts: every part is a file that the merge holds open."""
TRAINED = "trained.faiss"


@dataclass(frozen=True)
class Source:
    """The embeddings, and where what is made of them is kept meanwhile; travels to every task."""

    storage: Storage
    embeddings: Manifest
    lineage: Lineage
    threads: int

    def first_row(self, shard: int) -> int:
        """The row that a shard begins with."""
        return sum(stored.rows for stored in self.embeddings.shards[:shard])

    def vectors(self, shard: int) -> tuple[Floats, pa.ChunkedArray]:
        """A shard's embeddings [n, d] and keys. Raises DataError, naming shard, row and key, for one that is bad."""
        data = datasets.read_stored(self.storage, self.embeddings.dataset, self.embeddings.shards[shard])
        vectors = np.ascontiguousarray(vectors_in(data, "embedding"), dtype=np.float32)
        keys = datasets.decode_table(data, ["key"]).column("key")
        check_vectors(vectors, keys, shard)
        return vectors, keys

    def finished(self, file: str) -> Shard | None:
        """The scratch file, if an interrupted attempt finished it."""
        return datasets.finished_shard(self.storage, INDEX_PARTS, file, self.lineage)

    def content(self, file: str) -> bytes | None:
        """What a finished scratch file holds."""
        found = datasets.finished_file(self.storage, INDEX_PARTS, file, self.lineage)
        return None if found is None else found[1]

    def read(self, file: Shard) -> bytes:
        """What a scratch file holds, checked."""
        return datasets.read_stored(self.storage, INDEX_PARTS, file)

    def keep(self, file: str, data: bytes | memoryview, rows: int = 0) -> Shard:
        """Store a scratch file with its receipt."""
        return datasets.write_file(self.storage, INDEX_PARTS, file, bytes(data), self.lineage, rows)

    def fetch(self, file: Shard, folder: str) -> str:
        """A scratch file as a local one, checked; where it lies, if that is this machine."""
        if self.storage.is_local:
            return self.storage.locate(f"{INDEX_PARTS}/{file.name}")
        local = os.path.join(folder, file.name)
        Path(local).write_bytes(self.read(file))
        return local


def check_vectors(vectors: Floats, keys: pa.ChunkedArray, shard: int) -> None:
    """Raise DataError for an embedding that is not finite or is all zeros."""
    count, row, what = unsearchable(vectors)
    if count:
        raise DataError(
            f"embeddings shard {shard} row {row} (item {keys[row].as_py()}): the embedding is {what}, as are "
            f"{count - 1:,} more of the shard, expected finite numbers that are not all 0; training has diverged: "
            "lower task.training.learning_rate and run `pinsage train` again"
        )


# ------------------------------------------------------------------------------------------------ sample


def take_sample(spark: SparkContext, source: Source, sample: Sample) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Training vectors [n, d], query vectors [q, d] and query ids [q], in the order of the rows."""

    def work(task: Task) -> Task:
        place = task["place"]
        file = f"sample-{sample.shards[place]:05d}.npy"
        stored = source.finished(file)
        if stored is None:
            vectors, _ = source.vectors(sample.shards[place])
            rows = np.concatenate([sample.train[place], sample.queries[place]])
            stored = source.keep(file, _npy(vectors[rows]), rows=len(rows))
        return asdict(stored)

    tasks = [{"place": place} for place in range(len(sample.shards))]
    files = run_tasks(spark, tasks, work, "index: sample")
    taken = [_from_npy(source.read(Shard(**file))) for file in files]
    train = np.concatenate([part[: len(rows)] for part, rows in zip(taken, sample.train, strict=True)])
    queries = np.concatenate([part[len(rows) :] for part, rows in zip(taken, sample.train, strict=True)])
    firsts = np.concatenate([[0], np.cumsum([shard.rows for shard in source.embeddings.shards])])
    ids = [rows + firsts[shard] for shard, rows in zip(sample.shards, sample.queries, strict=True)]
    return train, queries, np.concatenate(ids).astype(np.int64)


def _npy(array: NDArray[Any]) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def _from_npy(data: bytes) -> NDArray[Any]:
    array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array


# ------------------------------------------------------------------------------------------------ parts


@dataclass(frozen=True)
class Part:
    """What one task left: a part of the index (None where it is built in one process), keys, and true neighbours."""

    index: Shard | None
    keys: Shard
    exact: Shard


@dataclass(frozen=True)
class Queries:
    """What every task needs to find true neighbours: query vectors, their ids, how many neighbours to keep."""

    vectors: Floats
    ids: NDArray[np.int64]
    depth: int


def part_bounds(num_shards: int) -> list[tuple[int, int]]:
    """First shard and one past the last of every part."""
    number = min(num_shards, MAX_PARTS)
    return [(part * num_shards // number, (part + 1) * num_shards // number) for part in range(number)]


def add_parts(spark: SparkContext, source: Source, queries: Queries, gpu: bool, with_index: bool) -> list[Part]:
    """One pass over all shards, a task for each part; the trained index is read from the scratch folder."""
    asked = source.keep("queries.npy", _npy(queries.vectors))
    ids, depth = queries.ids, queries.depth

    def work(task: Task) -> Task:
        number, (low, high) = task["part"], task["shards"]
        names = [f"part-{number:05d}.{kind}" for kind in ("faiss", "keys", "exact")]
        found = [source.finished(name) for name in names]
        if (with_index and None in found) or None in found[1:]:
            with parts.omp_threads(source.threads):
                vectors = _from_npy(source.read(asked))
                made = _make_part(source, Queries(vectors, ids, depth), low, high, gpu, with_index)
            found = [
                None if data is None else source.keep(name, data, rows)
                for name, (data, rows) in zip(names, made, strict=True)
            ]
        return {
            "files": [None if file is None else asdict(file) for file in (found if with_index else [None, *found[1:]])]
        }

    tasks = [{"part": part, "shards": shards} for part, shards in enumerate(part_bounds(len(source.embeddings.shards)))]
    done = run_tasks(spark, tasks, work, "index: add, search exactly")
    return [Part(*(None if file is None else Shard(**file) for file in result["files"])) for result in done]  # type: ignore[arg-type]


def _make_part(
    source: Source, queries: Queries, low: int, high: int, gpu: bool, with_index: bool
) -> list[tuple[bytes | memoryview | None, int]]:
    index = parts.loosen(read_trained(source))
    lists = parts.outer_lists(index)
    finder = ListFinder(lists, gpu) if gpu and lists is not None else None
    first = source.first_row(low)
    neighbours, keys = [], []
    for shard in range(low, high):
        vectors, own_keys = source.vectors(shard)
        start = source.first_row(shard)
        if len(vectors):
            if with_index:
                parts.fill(index, vectors, start, finder)
            neighbours.append(exact_neighbours(queries.vectors, queries.ids, vectors, start, queries.depth))
        keys.append(own_keys)
    if not neighbours:
        nothing = np.zeros((0, index.d), np.float32)
        neighbours = [exact_neighbours(queries.vectors, queries.ids, nothing, first, queries.depth)]
    exact = merge_exact(neighbours)
    stacked = np.stack([exact.ids, exact.scores.view(np.int32).astype(np.int64)])
    key_column = pa.chunked_array([chunk for column in keys for chunk in column.chunks], pa.string())
    count = len(key_column)
    data = faiss.serialize_index(index).data if with_index else None
    return [(data, count), (key_files.encode_part(key_column, first), count), (_npy(stacked), 0)]


def true_neighbours(source: Source, made: Sequence[Part]) -> Exact:
    """The exact neighbours of the queries among all parts."""

    def read() -> Iterator[Exact]:
        for part in made:
            ids, bits = _from_npy(source.read(part.exact))
            yield Exact(ids, bits.astype(np.int32).view(np.float32))

    return merge_exact(read())


# ------------------------------------------------------------------------------------------------ one index


def merge_bytes(source: Source, made: Sequence[Part], whole: int) -> int:
    """Local disk that an index of so many bytes and its keys take while they are merged, with parts from elsewhere."""
    keys = sum(part.keys.bytes for part in made)
    fetched = 0 if source.storage.is_local else keys + sum(part.index.bytes for part in made if part.index is not None)
    return whole + keys + fetched


def merge_parts(source: Source, made: Sequence[Part], folder: str, lists_file: str | None) -> faiss.Index:
    """All parts as one index: in memory or, with lists_file, its lists in that file of folder."""
    files = [source.fetch(part.index, folder) for part in made if part.index is not None]
    if lists_file is None:
        return parts.merge((faiss.read_index(file) for file in files), read_trained(source))
    return parts.merge_on_disk(read_trained(source), files, lists_file)


def read_trained(source: Source) -> faiss.Index:
    """The trained, empty index."""
    return faiss.deserialize_index(np.frombuffer(trained_file(source, source.lineage.inputs[TRAINED]), np.uint8))


def trained_file(source: Source, sha256: str) -> bytes:
    """The trained, empty index as stored, checked."""
    path = f"{INDEX_PARTS}/{TRAINED}"

    def check(data: bytes) -> bytes:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("another checksum")
        return data

    try:
        return source.storage.read_with(path, check)
    except (FileNotFoundError, ValueError) as error:
        remedy = how_to_build(INDEX_PARTS, "again")
        raise DataError(f"{source.storage.locate(path)} is not as it was written ({error}); {remedy}") from None


def build_here(source: Source, trained: faiss.Index) -> faiss.Index:
    """Add all shards here, for what cannot be merged. A graph is filled by one thread: its links depend on it."""
    base, _ = parts.split(trained)
    graph = isinstance(base, faiss.IndexHNSW)
    with parts.omp_threads(1 if graph else faiss.omp_get_max_threads()):
        for shard in range(len(source.embeddings.shards)):
            vectors, _ = source.vectors(shard)
            if len(vectors):
                trained.add(vectors)
    return trained


def write_key_tables(source: Source, made: Sequence[Part], folder: str) -> tuple[str, str]:
    """Local files of keys and of their lookup."""
    keys, lookup = os.path.join(folder, "keys.arrow"), os.path.join(folder, "lookup.arrow")
    key_files.write_tables([source.fetch(part.keys, folder) for part in made], keys, lookup)
    return keys, lookup
