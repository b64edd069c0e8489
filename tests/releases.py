"""Tiny runs of a site, fabricated dataset by dataset: what a release needs, with a real index, and no Spark.

And processes that race for its pointer, or are killed while they move it.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
import uuid
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from pipeline.ann import keys as key_files
from pipeline.contracts import datasets, schemas
from pipeline.contracts.datasets import Lineage, Manifest
from pipeline.contracts.errors import ConflictError
from pipeline.contracts.storage import Storage
from pipeline.releases.catalogue import Catalogue
from pipeline.releases.records import Pointer

WIDTH = 4


def write_run(site: str, name: str, night: int, model: str = "model", items: int = 12) -> Storage:
    """A whole run of this night below the site; equal model texts are equal models. Item i's key tells the night."""
    storage = Storage(f"{site}/runs/{name}")
    for path, data in _files(night, model, items).items():
        storage.write_bytes(path, data, lasting=False)
    storage.write_bytes("night.json", b"{}", lasting=False)  # beside the datasets, as in every night's run
    return storage


@lru_cache(maxsize=32)
def _files(night: int, model: str, items: int) -> dict[str, bytes]:
    """What such a run holds, by path."""
    storage = Storage(f"memory://{uuid.uuid4()}")
    made: dict[str, Manifest] = {}

    def commit(
        dataset: schemas.Dataset, reads: tuple[schemas.Dataset, ...], files: dict[str, bytes], rows: int
    ) -> None:
        lineage = Lineage("test", {}, {source.name: made[source.name].content for source in reads})
        datasets.begin(storage, dataset)
        stored = [datasets.write_file(storage, dataset.name, file, data, lineage, rows) for file, data in files.items()]
        made[dataset.name] = datasets.commit(storage, dataset, stored, lineage)

    keys = pa.array([f"night{night}-{item}" for item in range(items)])
    ids = pa.array(np.arange(items), pa.uint32())
    zeros = pa.array(np.zeros(items), pa.int64())
    vectors = np.random.default_rng([night, *model.encode()]).normal(size=(items, WIDTH)).astype(np.float32)
    rows = pa.table([keys, ids, zeros, zeros, keys], names=["key", "id", "degree", "first_seen", "title"])
    embeddings = pa.table({"key": keys, "id": ids, "embedding": datasets.vectors_to_arrow(vectors)})
    shard = datasets.shard_name(0)
    commit(schemas.USERS, (), {shard: b"users"}, 1)
    commit(schemas.ITEMS, (), {shard: datasets.encode_table(rows).tobytes()}, items)
    for graph in (schemas.ITEM_USERS, schemas.USER_ITEMS):
        commit(graph, (schemas.USERS, schemas.ITEMS), {shard: b"edges %d" % night}, items)
    commit(schemas.FEATURES, (schemas.ITEMS,), {shard: b"features %d" % night}, items)
    commit(schemas.ENCODERS, (schemas.ITEMS,), {"encoders.json": b"{}"}, 0)
    commit(schemas.NEIGHBOURS, (schemas.ITEM_USERS, schemas.USER_ITEMS), {shard: b"neighbours %d" % night}, items)
    commit(schemas.MODEL, (schemas.FEATURES, schemas.NEIGHBOURS), {"model.safetensors": model.encode()}, 0)
    commit(schemas.EMBEDDINGS, schemas.INFERENCE.reads, {shard: datasets.encode_table(embeddings).tobytes()}, items)
    commit(schemas.INDEX, (schemas.EMBEDDINGS,), _index_files(keys, vectors), items)
    made_files = {path: storage.read_bytes(path) for path in storage.files("")}
    storage.delete("")
    return made_files


def _index_files(keys: pa.Array, vectors: np.ndarray) -> dict[str, bytes]:
    index = faiss.IndexFlatIP(WIDTH)
    index.add(vectors)
    with TemporaryDirectory() as folder:
        part, table, lookup = (Path(folder) / name for name in ("part", "keys.arrow", "lookup.arrow"))
        part.write_bytes(key_files.encode_part(pa.chunked_array([keys]), 0))
        key_files.write_tables([part], table, lookup)
        return {
            "index.faiss": faiss.serialize_index(index).tobytes(),
            "keys.arrow": table.read_bytes(),
            "lookup.arrow": lookup.read_bytes(),
            "recall.json": json.dumps(
                {"recall": 1.0, "search": {}, "k": 10, "target": 0.95, "factory": "Flat"}
            ).encode(),
        }


def race(site: str, names: tuple[str, str], rounds: int, barrier: Any, told: Any) -> None:
    """Publish one run, then the other, and so on, each time with another process that saw the same pointer.

    Tells who was live after each round by this process's word: its release, or the error that names another's.
    """
    catalogue, change = Catalogue(site), Catalogue.change

    def together(*arguments: Any) -> Pointer:
        barrier.wait(60)
        return change(catalogue, *arguments)

    catalogue.change = together  # type: ignore[assignment,method-assign]
    for number in range(rounds):
        try:
            told.put((number, "won", catalogue.publish(names[number % 2]).release))
        except ConflictError as error:
            told.put((number, "lost", str(error)))
        barrier.wait(60)


def kill_publishers(site: str, names: list[str], rounds: int, longest: float) -> int:
    """Start a process that publishes these runs for ever, kill -9 it some time after its first; so many times.

    longest is the most seconds that it is left to go on. Returns how often the pointer moved.
    """
    random.seed(0)
    for _ in range(rounds):
        ready, started = os.pipe()
        child = os.fork()
        if child == 0:
            first = names.index(Catalogue(site).live().release or "") + 1
            for number in range(first, 1 << 30):
                Catalogue(site).publish(names[number % len(names)])
                os.write(started, b"!")
        os.read(ready, 1)
        time.sleep(random.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it ended by itself"
        os.close(ready)
        os.close(started)
    return Catalogue(site).live().sequence


if __name__ == "__main__":
    importlib.import_module("s3fs")  # before the forks: each child opens a connection of its own, and no module
    print(kill_publishers(sys.argv[1], sys.argv[4:], int(sys.argv[2]), float(sys.argv[3])))
