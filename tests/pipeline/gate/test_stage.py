"""What the stage asks by itself: do the datasets belong together, do ids mean the same, which night is it."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark import SparkContext

from pipeline.contracts import datasets, schemas
from pipeline.contracts.datasets import Lineage, Manifest
from pipeline.contracts.storage import Storage
from pipeline.gate import measuring, stage
from pipeline.gate.measuring import Run

LINEAGE = Lineage("test", {}, {})


def write(storage: Storage, dataset: schemas.Dataset, tables: list[pa.Table], **metadata: Any) -> Manifest:
    shards = [datasets.write_shard(storage, dataset, number, table, LINEAGE) for number, table in enumerate(tables)]
    return datasets.commit(storage, dataset, shards, LINEAGE, metadata)


def run_of(storage: Storage, **manifests: Manifest) -> Run:
    return Run(storage, manifests, None, 1)


def test_a_runs_date_is_what_its_name_begins_with() -> None:
    assert stage.date_in("2011-03-05") == datetime.date(2011, 3, 5)
    assert stage.date_in("2011-03-05-b") == datetime.date(2011, 3, 5)
    assert stage.date_in("2011-13-05") is None
    assert stage.date_in("online-retail") is None


def test_datasets_of_different_tries_are_told_apart(storage: Storage) -> None:
    names = ("interactions", "items", "features", "model", "embeddings", "index", "evaluation")
    made: dict[str, Manifest] = {}
    for name in names:
        inputs = {source: made[source].content for source in made}
        made[name] = Manifest(name, 1, (), Lineage(name, {}, inputs), {"try": 1})
    assert stage.check_whole(run_of(storage, **made)).verdict == "pass"
    other = Manifest("model", 1, (), made["model"].lineage, {"try": 2})
    found = stage.check_whole(run_of(storage, **{**made, "model": other}))
    assert (found.verdict, found.value) == ("block", 2)
    assert "embeddings was made from other model, evaluation was made from other model" in found.reason


def items(keys: list[str], first: int) -> pa.Table:
    numbers = list(range(first, first + len(keys)))
    columns = [keys, numbers, [1] * len(keys), [0] * len(keys), [None] * len(keys)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schemas.ITEMS.arrow, strict=True)]
    return pa.table(arrays, schema=schemas.ITEMS.arrow)


@pytest.mark.parametrize(("keys", "expected"), [("abcdefg", (5, 1.0)), ("abxde", (5, 0.8)), ("abc", (3, 1.0))])
def test_ids_are_compared_by_key_whatever_the_shards(
    spark: SparkContext, storage: Storage, tmp_path: Any, keys: str, expected: tuple[int, float]
) -> None:
    live = Storage(f"{tmp_path}/live")
    then = write(live, schemas.ITEMS, [items(["a", "b", "c"], 0), items(["d", "e"], 3)])
    now = write(storage, schemas.ITEMS, [items(list(keys), 0)])
    assert measuring.count_alike(spark, run_of(storage, items=now), run_of(live, items=then), 1) == expected
    assert stage.check_ids(expected[1]).verdict == ("pass" if expected[1] == 1 else "block")


def test_a_survey_is_that_of_the_whole_matrix_whatever_the_shards(spark: SparkContext, storage: Storage) -> None:
    rng = np.random.default_rng(4)
    vectors = rng.normal(loc=1, size=(40, 6)).astype(np.float32)
    vectors[3], vectors[20:, 1], vectors[:, 4] = 0, 0, 0
    vectors[7, 2] = np.nan
    ids = pa.array(np.arange(40), pa.uint32())
    table = pa.table({"id": ids, "features": datasets.vectors_to_arrow(vectors)})
    described = [{"name": "words", "kind": "text", "start": 0, "stop": 5}, {"kind": "degree", "start": 5, "stop": 6}]
    manifest = write(
        storage, schemas.FEATURES, [table.slice(0, 11), table.slice(11)], columns=described, missing={"words": 4}
    )
    found = measuring.survey(spark, run_of(storage, features=manifest), "features", "features", 1)
    good = np.delete(vectors[:, :5].astype(np.float64), 7, axis=0)
    squares = (good**2).sum(axis=1)
    assert (found["total"], found["rows"], found["zeros"], found["not_finite"]) == (40, 40, 1, 1)
    assert (found["columns"], found["constant"], found["missing"]) == (5, 1, {"words": 0.1})
    assert found["norm"] == pytest.approx(np.sqrt(squares).mean())
    assert found["spread"] == pytest.approx(((good - good.mean(axis=0)) ** 2).sum() / squares.sum())


def test_items_without_content_columns_have_nothing_to_survey(spark: SparkContext, storage: Storage) -> None:
    table = pa.table({"id": pa.array([0], pa.uint32()), "features": datasets.vectors_to_arrow(np.ones((1, 1), "f4"))})
    described = [{"name": "degree", "kind": "degree", "start": 0, "stop": 1}]
    manifest = write(storage, schemas.FEATURES, [table], columns=described, missing={})
    found = measuring.survey(spark, run_of(storage, features=manifest), "features", "features", 1)
    assert found == {"columns": 0, "missing": {}}
