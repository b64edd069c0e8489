"""Tiny runs of a site, fabricated dataset by dataset: what a release needs, with a real index, and no Spark."""

from __future__ import annotations

import json
import uuid
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import pyarrow as pa

from pipeline.ann import keys as key_files
from pipeline.contracts import datasets, schemas
from pipeline.contracts.datasets import Lineage, Manifest
from pipeline.contracts.storage import Storage

WIDTH = 4


def write_run(site: str, name: str, night: int, model: str = "model", items: int = 12) -> Storage:
    """A whole run of this night below the site; equal model texts are equal models. Item i's key tells the night."""
    storage = Storage(f"{site}/runs/{name}")
    for path, data in _files(night, model, items).items():
        storage.write_bytes(path, data, lasting=False)
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
    commit(schemas.ITEMS, (), {shard: datasets.encode_table(rows)}, items)
    for graph in (schemas.ITEM_USERS, schemas.USER_ITEMS):
        commit(graph, (schemas.USERS, schemas.ITEMS), {shard: b"edges %d" % night}, items)
    commit(schemas.FEATURES, (schemas.ITEMS,), {shard: b"features %d" % night}, items)
    commit(schemas.ENCODERS, (schemas.ITEMS,), {"encoders.json": b"{}"}, 0)
    commit(schemas.NEIGHBOURS, (schemas.ITEM_USERS, schemas.USER_ITEMS), {shard: b"neighbours %d" % night}, items)
    commit(schemas.MODEL, (schemas.FEATURES, schemas.NEIGHBOURS), {"model.safetensors": model.encode()}, 0)
    commit(schemas.EMBEDDINGS, schemas.INFERENCE.reads, {shard: datasets.encode_table(embeddings)}, items)
    commit(schemas.INDEX, (schemas.EMBEDDINGS,), _index_files(keys, vectors), items)
    return {path: storage.read_bytes(path) for path in storage.files("")}


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
            "recall.json": json.dumps({"recall": 1.0, "search": {}, "factory": "Flat"}).encode(),
        }
