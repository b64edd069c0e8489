"""Embeddings for tests of the index: vectors of some shape, stored as a run's dataset, and the stage run on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from pyspark import SparkContext

from pipeline import index
from pipeline.contracts import datasets
from pipeline.contracts.config import Settings, parse_settings
from pipeline.contracts.datasets import Lineage
from pipeline.contracts.schemas import EMBEDDINGS, INDEX, INDEX_STAGE
from pipeline.contracts.storage import Storage

LINEAGE = Lineage("test", {}, {})


def make_settings(storage: Storage, resources: dict[str, Any] | None = None, **changes: object) -> Settings:
    """Settings of an index in the storage's folder; changes are of task.index, but previous of task.data."""
    data = {"interactions": {"paths": "x.parquet", "user": "u", "item": "i", "timestamp": "t"}}
    if "previous" in changes:
        data["previous"] = changes.pop("previous")  # type: ignore[assignment]
    where = {"run": storage.url, "cache": f"{storage.url}-cache", "index": resources or {}}
    return parse_settings({"task": {"data": data, "index": {"num_queries": 200, **changes}}, "resources": where})


def write_embeddings(storage: Storage, vectors: np.ndarray, num_shards: int = 3, prefix: str = "item-") -> None:
    """Vectors [n, d] as embeddings of item-0, item-1, ..."""
    keys = pa.array([f"{prefix}{i}" for i in range(len(vectors))], pa.string())
    ids = pa.array(np.arange(len(vectors)), pa.uint32())
    table = pa.table({"key": keys, "id": ids, "embedding": datasets.vectors_to_arrow(vectors)})
    size = -(-len(vectors) // num_shards)
    shards = [
        datasets.write_shard(storage, EMBEDDINGS, number, table.slice(number * size, size), LINEAGE)
        for number in range(num_shards)
    ]
    datasets.commit(storage, EMBEDDINGS, shards, LINEAGE)


def build(
    spark: SparkContext, storage: Storage, resources: dict[str, Any] | None = None, **changes: object
) -> dict[str, str]:
    """Run the stage; the checksum of every file of the index."""
    settings = make_settings(storage, resources, **changes)
    index.run(spark, storage, settings, datasets.trace(storage, INDEX_STAGE, settings))
    return {shard.name: shard.sha256 for shard in datasets.open_manifest(storage, INDEX).shards}


def clustered(num: int, width: int = 16, seed: int = 1) -> np.ndarray:
    """Unit vectors around 50 centres."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(50, width))[rng.integers(50, size=num)] + 0.4 * rng.normal(size=(num, width))
    unit: np.ndarray = (vectors / np.linalg.norm(vectors, axis=1)[:, None]).astype(np.float32)
    return unit


def uniform(num: int, width: int = 16, seed: int = 2) -> np.ndarray:
    """Vectors in all directions and of all lengths: the hardest case, and not of unit length."""
    return np.random.default_rng(seed).normal(size=(num, width)).astype(np.float32)


def duplicates(num: int, width: int = 16, seed: int = 3) -> np.ndarray:
    """Most vectors are copies: 40 of them make up nine tenths."""
    rng = np.random.default_rng(seed)
    vectors = clustered(num, width, seed)
    copied = rng.random(num) < 0.9
    vectors[copied] = vectors[rng.integers(40, size=int(copied.sum()))]
    return vectors


KINDS = {"clustered": clustered, "uniform": uniform, "duplicates": duplicates}
