"""A published index, opened from any URL: keys or vectors in, keys and inner products out. Needs no Spark.

From a disk of this machine the index is mapped where it lies; from elsewhere its files are copied once to the cache, by
content, and mapped there; the copy goes when the run has another index, or nobody opened it for two weeks. An open
index is never changed, so threads may share it. Memory: what searches touch; for a batch of queries given by key, the
shards of embeddings that hold them, one at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from filelock import FileLock
from numpy.typing import NDArray

from pipeline.ann.asking import Filter, ask
from pipeline.ann.keys import Keys, KeyTable, as_texts
from pipeline.ann.searching import unsearchable
from pipeline.contracts import datasets, replica
from pipeline.contracts.datasets import Manifest, Shard
from pipeline.contracts.errors import DataError
from pipeline.contracts.schemas import EMBEDDINGS, INDEX, ITEMS, how_to_build
from pipeline.contracts.storage import Storage

INDEX_FILE, LISTS_FILE, KEYS_FILE, LOOKUP_FILE = "index.faiss", "lists.ivfdata", "keys.arrow", "lookup.arrow"
RECALL_FILE = "recall.json"
BATCH = 4096
"""Queries that one call to FAISS gets: what it holds for them stays small."""
_PIECE = 1 << 26

Vectors = NDArray[np.floating]
Found = tuple[list[list[str]], list[list[float]]]


@dataclass(frozen=True)
class Index:
    """A published index. keys is the table of its items; recall its own report (see recall.json)."""

    storage: Storage
    faiss_index: faiss.Index
    keys: KeyTable
    embeddings: Manifest | None
    recall: dict[str, Any]

    @classmethod
    def open(
        cls, run: str | Storage, cache: str | None = None, verify: bool = True, *, content: str | None = None
    ) -> Index:
        """Open the index of a run's folder; verify compares every file with its checksum first, which reads it once.

        cache: as resources.cache. content: of the manifest that it must have. Raises DataError if it has another, if
        there is none, if a file is not what was published, or if it is not of the embeddings that lie beside it.
        Without embeddings beside it, only vectors can be searched for.
        """
        storage = run if isinstance(run, Storage) else Storage(run)
        manifest = datasets.open_manifest(storage, INDEX)
        if content is not None and manifest.content != content:
            raise DataError(
                f"{storage.locate(INDEX.name)} is not what was published: its content is {manifest.content[:12]}, "
                f"expected {content[:12]}; it was built again, so `pinsage rollback` to another release, and give "
                "every night's run a folder of its own"
            )
        embeddings = datasets.find_manifest(storage, EMBEDDINGS)
        if embeddings is not None and manifest.lineage.inputs[EMBEDDINGS.name] != embeddings.content:
            raise DataError(
                f"{storage.locate(INDEX.name)} was built from other embeddings than those beside it; "
                "run `pinsage index`"
            )
        report = json.loads(datasets.read_file(storage, manifest, RECALL_FILE))
        names = (INDEX_FILE, LISTS_FILE, KEYS_FILE, LOOKUP_FILE)
        files = [shard for shard in manifest.shards if shard.name in names]
        with _local_folder(storage, manifest.content, files, cache, verify) as folder:
            table = KeyTable(folder / KEYS_FILE, folder / LOOKUP_FILE)
            return cls(storage, _open(folder, files), table, embeddings, report)

    def search(
        self,
        queries: Vectors | Keys,
        k: int = 10,
        allow: Keys | None = None,
        deny: Keys | None = None,
        exclude_self: bool = True,
    ) -> Found:
        """Keys and scores of the k best items of each query, best first; fewer only where fewer are left.

        queries are vectors [n, d] or keys of items, which are not among their own results unless exclude_self is
        False. allow: only these items are found; deny: these are not. With a filter, or k above twice what was tuned
        for, a query is searched ever wider until it has all it is due and wider hardly changes that: all lists at the
        widest; of a graph efSearch 4096, which may find fewer. Raises DataError for a key that no item has, with the
        nearest ones there are, and for a vector that is not finite or all zeros.
        """
        if isinstance(queries, np.ndarray) and (queries.ndim != 1 or queries.dtype.kind not in "iuUO"):
            own, vectors = np.full(len(queries), -1), queries
            self._check(queries)
        else:
            own = self.keys.known_rows(queries, "queries")
            vectors = self._vectors(own)
        hidden = own if exclude_self else np.full(len(own), -1)
        allowed = None if allow is None else self.keys.known_rows(allow, "allow")
        denied = self.keys.known_rows(() if deny is None else deny, "deny")
        only = Filter.of(self.faiss_index, len(self.keys), allowed, denied)
        k = min(k, only.left)
        if k < 1:
            return [[] for _ in vectors], [[] for _ in vectors]
        keys: list[list[str]] = []
        scores: list[list[float]] = []
        for first in range(0, len(vectors), BATCH):
            block = _as_float32(vectors[first : first + BATCH])
            rows, their_scores = ask(self.faiss_index, self.recall, block, hidden[first : first + BATCH], k, only)
            kept = rows >= 0
            flat = self.keys.keys(rows[kept])
            ends = np.cumsum(kept.sum(axis=1)).tolist()
            keys += [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            scores += [line[good].tolist() for line, good in zip(their_scores, kept, strict=True)]
        return keys, scores

    def neighbours(self, item_key: str | int, k: int, exclude_self: bool = True) -> tuple[list[str], list[float]]:
        """Keys and scores of the k items nearest to one item, best first."""
        keys, scores = self.search([item_key], k, exclude_self=exclude_self)
        return keys[0], scores[0]

    def vector(self, item_key: str | int) -> NDArray[np.float32]:
        """An item's embedding [d], as stored. Raises DataError with the nearest known keys if there is no such item."""
        vector: NDArray[np.float32] = self.vectors([item_key])[0]
        return vector

    def vectors(self, item_keys: Keys) -> NDArray[np.float32]:
        """As vector, of many [n, d]: every shard that holds some is read once."""
        return self._vectors(self.keys.known_rows(item_keys))

    def titles(self, item_keys: Keys) -> list[str]:
        """Titles of items, from the shards of items that hold them; blank where there is none.

        An item's row in the index is its id, by which items are ordered. Where the items beside the index are others by
        now, the key there is another too, and the title stays blank.
        """
        keys = as_texts(item_keys, "keys")
        found, items = [""] * len(keys), datasets.find_manifest(self.storage, ITEMS)
        if items is None:
            return found
        for shard, places, inside in _by_shard(items, self.keys.rows(keys)):
            table = datasets.read_shard(self.storage, items, shard, ["key", "title"]).take(pa.array(inside))
            for place, row in zip(places.tolist(), table.to_pylist(), strict=True):
                if row["key"] == keys[place]:
                    found[place] = row["title"] or ""
        return found

    def _vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings of rows [n, d], read from the shards that hold them."""
        if self.embeddings is None:
            raise DataError(
                f"{self.storage.url} has no embeddings beside its index, so items have no vectors there; search with "
                "vectors, or open the run that has both"
            )
        found = np.empty((len(rows), self.faiss_index.d), np.float32)
        for shard, places, inside in _by_shard(self.embeddings, rows):
            column = datasets.read_shard(self.storage, self.embeddings, shard, ["embedding"]).column("embedding")
            found[places] = datasets.arrow_to_vectors(column)[inside]
        return found

    def _check(self, vectors: Vectors) -> None:
        """Raise DataError unless these are vectors [n, d] that can be searched for."""
        if vectors.ndim != 2 or vectors.shape[1] != self.faiss_index.d or vectors.dtype.kind not in "fiu":
            raise DataError(
                f"vectors are {list(vectors.shape)} of {vectors.dtype}, expected [any number, {self.faiss_index.d}] of "
                "float32 or float16"
            )
        for first in range(0, len(vectors), BATCH):
            block = _as_float32(vectors[first : first + BATCH])
            count, row, what = unsearchable(block)
            if count:
                raise DataError(
                    f"vectors row {first + row} is {what}, expected finite float32 numbers that are not all 0; look at "
                    "what made it, or leave it out"
                )


def _by_shard(
    manifest: Manifest, rows: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """The shards that hold some of the rows: which shard, the places of those rows, and where they lie within it."""
    ends = np.cumsum([shard.rows for shard in manifest.shards], dtype=np.int64)
    owners = np.searchsorted(ends, rows, side="right")
    for shard in np.unique(owners[(rows >= 0) & (owners < len(ends))]).tolist():
        places = np.flatnonzero((owners == shard) & (rows >= 0))
        yield shard, places, rows[places] - (ends[shard] - manifest.shards[shard].rows)


def _as_float32(vectors: Vectors) -> NDArray[np.float32]:
    """As FAISS takes them; what is too large for it becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(vectors, dtype=np.float32)


# ------------------------------------------------------------------------------------------------ files


def open_files(storage: Storage, files: Sequence[Shard], folder: str, verify: bool) -> faiss.Index:
    """The FAISS index of an index's files, mapped; those of another machine are copied to folder first."""
    return _open(_fetch(storage, files, Path(folder), verify), files)


def _open(folder: Path, files: Sequence[Shard]) -> faiss.Index:
    """An index on a local disk, its lists and codes mapped as far as FAISS can for its kind."""
    apart = any(shard.name == LISTS_FILE for shard in files)  # FAISS maps lists of their own, and then nothing else
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY if apart else faiss.IO_FLAG_MMAP_IFC
    return faiss.read_index(str(folder / INDEX_FILE), flags)


@contextmanager
def _local_folder(
    storage: Storage, content: str, files: Sequence[Shard], cache: str | None, verify: bool
) -> Iterator[Path]:
    """Where the files lie on this machine: in place, or in the cache, where nobody removes them before they are open.

    Copies of what the run's index was before go when a new one is made.
    """
    if storage.is_local:
        yield _fetch(storage, files, Path(), verify)
        return
    home = replica.home_of(storage, INDEX.name, cache)
    folder = replica.copy_in(home, content, "files")
    with ExitStack() as held:
        with replica.kept_in(home, "a local copy of the index"):
            home.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(home / "files.lock"))
            if not folder.exists():
                replica.remove_others(folder)
            _fetch(storage, files, folder, verify)
        with suppress(OSError):  # of a copy that is not ours to mark: another user's
            os.utime(folder)
        yield folder


def _fetch(storage: Storage, files: Sequence[Shard], folder: Path, verify: bool) -> Path:
    if storage.is_local:
        folder = Path(storage.locate(INDEX.name))
    else:
        folder.mkdir(parents=True, exist_ok=True)
    for shard in files:
        local = folder / shard.name
        problem: str | None = "is not copied yet"
        for _ in range(1 if storage.is_local else 2):  # a copy may be cut on its way
            if not storage.is_local and not (local.exists() and local.stat().st_size == shard.bytes):
                _download(storage, shard, local)
            problem = _difference(local, shard, verify)
            if problem is None:
                break
            if not storage.is_local:
                local.unlink(missing_ok=True)
        if problem:
            raise DataError(f"{local} {problem}; {how_to_build(INDEX.name, 'again')}")
    return folder


def _download(storage: Storage, shard: Shard, local: Path) -> None:
    path, temporary = f"{INDEX.name}/{shard.name}", local.with_suffix(".tmp")
    replica.check_room(local.parent, shard.bytes)
    try:
        with open(temporary, "wb") as file:
            for start in range(0, shard.bytes, _PIECE):
                file.write(_read(storage, path, start, min(start + _PIECE, shard.bytes)))
        os.replace(temporary, local)
    finally:
        temporary.unlink(missing_ok=True)


def _read(storage: Storage, path: str, start: int, stop: int) -> bytes:
    try:
        return storage.read_range(path, start, stop)
    except FileNotFoundError:
        remedy = how_to_build(INDEX.name, "again")
        raise DataError(f"{storage.locate(path)} is in the manifest but not there; {remedy}") from None


def _difference(local: Path, shard: Shard, verify: bool) -> str | None:
    """What makes a file another than the manifest says; None if nothing does."""
    if not local.exists():
        return "is in the manifest but not there"
    if local.stat().st_size != shard.bytes:
        return f"has {local.stat().st_size:,} bytes, expected {shard.bytes:,}"
    if verify and _sha256(local) != shard.sha256:
        return "was changed after its manifest was written: it has another checksum"
    return None


def _sha256(local: Path) -> str:
    digest = hashlib.sha256()
    with open(local, "rb") as file:
        read: Callable[[], bytes] = lambda: file.read(1 << 22)  # noqa: E731
        for block in iter(read, b""):
            digest.update(block)
    return digest.hexdigest()
