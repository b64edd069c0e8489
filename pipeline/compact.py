"""Embeddings in fewer bytes, for readers who want them: int8 with a scale, and fewer dimensions.

Reads EMBEDDINGS; writes COMPACT, a column for every form that task.compact asks for, and ROTATION. int8: value = int8 *
scale of the item. Fewer dimensions: the embedding times the first columns of ROTATION, the principal directions of a
sample about 0, so that inner products lose least; a query is turned by the same matrix (`turned`). COMPACT's metadata
says what each form costs: recall@10 of exact search by it within the sample, and how long its vectors are. Memory: the
sample, at most SAMPLE rows, on the driver; a shard per task.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import SparkContext
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipeline.contracts.config import Compact, Settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    arrow_to_vectors,
    begin,
    commit,
    open_manifest,
    read_file,
    read_shard,
    vectors_to_arrow,
    write_file,
)
from pipeline.contracts.errors import DataError, SettingsError
from pipeline.contracts.rows import describe_rows, read_own_rows
from pipeline.contracts.schemas import COMPACT, COMPACT_WORK, EMBEDDINGS, ROTATION
from pipeline.contracts.sharding import sample_rows
from pipeline.contracts.storage import Storage
from pipeline.spark import Task, say
from pipeline.steps import Made, Output, Report, run_step

SAMPLE, QUERIES, K = 50_000, 500, 10
ROTATION_FILE = "rotation.npy"
_LARGEST = 127

Floats = NDArray[np.float32]


def run(spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Make every form that is wanted; without any, empty datasets."""
    wanted, embeddings = settings.task.compact, open_manifest(storage, EMBEDDINGS)
    begin(storage, COMPACT)
    begin(storage, ROTATION)
    if not (wanted.int8 or wanted.dimensions) or not embeddings.num_rows:
        commit(storage, ROTATION, [], lineage)
        commit(storage, COMPACT, [], lineage, {"forms": {}})
        return
    sample = _sample(spark, storage, embeddings, lineage, settings.task.seed)
    with threadpool_limits(settings.resources.threads):
        _check_width(wanted, sample.shape[1])
        directions = principal_directions(sample)
        true = _nearest(sample)
        told = {name: _measured(sample, true, *form) for name, form in _forms(sample, wanted, directions).items()}
    buffer = io.BytesIO()
    np.save(buffer, directions)
    commit(storage, ROTATION, [write_file(storage, ROTATION.name, ROTATION_FILE, buffer.getvalue(), lineage)], lineage)
    for name, found in told.items():
        say(f"compact: {name}: {found['bytes']} bytes an item, recall@{K} {found['recall']:.3f} in a sample")

    def make(task: Task) -> tuple[Sequence[Made], Report]:
        table = read_shard(storage, embeddings, task["shard"])
        vectors = _single(arrow_to_vectors(table.column("embedding")))
        columns: dict[str, Any] = {"key": table.column("key"), "id": table.column("id")}
        if wanted.int8:
            codes, scales = to_int8(vectors)
            columns |= {"int8": _as_column(codes), "scale": pa.array(scales)}
        for count in wanted.dimensions:
            with np.errstate(over="ignore"):
                turned = (vectors @ directions[:, :count]).astype(np.float16)
            is_finite = np.isfinite(turned).all(axis=1)
            if not is_finite.all():
                row = int(np.argmin(is_finite))
                raise DataError(
                    f"the embedding of item {table.column('key')[row].as_py()} is too long for the float16 of "
                    f"task.compact.dimensions {count}: set task.model.normalise_output, or leave that out"
                )
            columns[f"first_{count}"] = vectors_to_arrow(turned)
        return [pa.table(columns)], {}

    metadata = {"forms": told, "sample": len(sample), "queries": min(QUERIES, len(sample))}
    tasks = [{"shard": shard} for shard in range(len(embeddings.shards))]
    output = Output(COMPACT, describe=lambda _: metadata)
    run_step(spark, storage, lineage, f"{COMPACT_WORK}/step-forms", tasks, [output], make, "compact: forms")
    storage.delete(COMPACT_WORK)


def to_int8(vectors: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Codes [n, d] and scales [n]: a row's largest value becomes 127; a row of zeros has a scale of 0."""
    scales = np.abs(vectors).max(axis=1, initial=0) / np.float32(_LARGEST)
    codes: NDArray[np.int8] = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
    return codes, scales.astype(np.float32)


def principal_directions(sample: Floats) -> Floats:
    """The directions [d, d] that a sample's vectors [n, d] are longest in, one per column, longest first.

    About 0, not the mean: it is inner products that are to be kept. A column's largest entry is above 0.
    """
    wide = sample.astype(np.float64)
    _, directions = np.linalg.eigh(wide.T @ wide)
    directions = directions[:, ::-1]
    signs = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])])
    result: Floats = np.ascontiguousarray(directions * signs).astype(np.float32)
    return result


def turned(storage: Storage, vectors: NDArray[np.floating], dimensions: int) -> Floats:
    """Queries [n, d] for the column first_{dimensions} of COMPACT: [n, dimensions]."""
    data = read_file(storage, open_manifest(storage, ROTATION), ROTATION_FILE)
    rotation = np.load(io.BytesIO(data), allow_pickle=False)
    result: Floats = _single(np.asarray(vectors)) @ rotation[:, :dimensions]
    return result


def _check_width(wanted: Compact, width: int) -> None:
    wide = [count for count in wanted.dimensions if count >= width]
    if wide:
        raise SettingsError(
            f"task.compact.dimensions has {wide[0]}, and embeddings have {width}; give fewer, or leave it out"
        )


def _sample(spark: SparkContext, storage: Storage, embeddings: Manifest, lineage: Lineage, seed: int) -> Floats:
    """At most SAMPLE embeddings from all over the catalogue."""
    drawn = sample_rows(embeddings.num_rows, SAMPLE, seed)
    bounds = np.cumsum([0, *(shard.rows for shard in embeddings.shards)])
    parts = [drawn[(drawn >= start) & (drawn < stop)] - start for start, stop in pairwise(bounds)]
    name = f"{COMPACT_WORK}/sample"

    def take(task: Task) -> tuple[Sequence[Made], Report]:
        column = read_shard(storage, embeddings, task["shard"], ["embedding"]).column("embedding")
        rows = _single(arrow_to_vectors(column))[parts[task["shard"]]]
        return [rows], {"width": rows.shape[1]}

    output = Output(name, raw=True, describe=lambda reports: describe_rows("float32", reports[0]["width"]))
    tasks = [{"shard": shard} for shard in range(len(parts))]
    run_step(spark, storage, lineage, f"{COMPACT_WORK}/step-sample", tasks, [output], take, "compact: sample")
    taken = open_manifest(storage, name)
    return np.concatenate([read_own_rows(storage, taken, shard) for shard in range(len(parts))])


def _forms(sample: Floats, wanted: Compact, directions: Floats) -> dict[str, tuple[int, Floats]]:
    """Of every form its bytes an item, and the sample as a reader of it would see it."""
    forms = {}
    if wanted.int8:
        codes, scales = to_int8(sample)
        forms["int8"] = (sample.shape[1] + 4, codes.astype(np.float32) * scales[:, None])
    for count in wanted.dimensions:
        with np.errstate(over="ignore"):  # a row for which it is too much is named when the forms are made
            turned_sample = (sample @ directions[:, :count]).astype(np.float16)
        forms[f"first_{count}"] = (2 * count, _single(turned_sample))
    return forms


def _measured(sample: Floats, true: NDArray[np.int64], size: int, seen: Floats) -> Report:
    """What a form costs: bytes, recall of exact search by inner product, and lengths beside the embeddings' own."""
    shared = [len(np.intersect1d(one, other)) for one, other in zip(true, _nearest(seen), strict=True)]
    own, kept = (np.linalg.norm(vectors.astype(np.float64), axis=1) for vectors in (sample, seen))
    lengths = kept[own > 0] / own[own > 0]
    return {
        "bytes": size, "recall": float(np.sum(shared) / max(1, true.size)),
        "norm_share_mean": float(lengths.mean()) if len(lengths) else 1.0,
        "norm_share_least": float(lengths.min()) if len(lengths) else 1.0,
    }  # fmt: skip


def _nearest(vectors: Floats) -> NDArray[np.int64]:
    """Of QUERIES rows, evenly spread, the K others of largest inner product [QUERIES, K]; equals by row."""
    queries = np.linspace(0, len(vectors) - 1, min(QUERIES, len(vectors))).astype(np.int64)
    k = min(K, len(vectors) - 1)
    scores = vectors[queries] @ vectors.T
    scores[np.arange(len(queries)), queries] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _single(vectors: NDArray[np.floating]) -> Floats:
    return vectors.astype(np.float32, copy=False)


def _as_column(codes: NDArray[np.int8]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])
