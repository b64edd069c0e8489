"""Embeddings in fewer bytes: what they give back, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark import SparkContext

from pipeline import compact
from pipeline.contracts.config import Settings, parse_settings
from pipeline.contracts.datasets import arrow_to_vectors, open_manifest, read_table, trace
from pipeline.contracts.errors import DataError, SettingsError
from pipeline.contracts.schemas import COMPACT, COMPACT_STAGE, COMPACT_WORK, ROTATION
from pipeline.contracts.storage import Storage
from tests.embeddings import clustered, make_settings, write_embeddings


def settings_of(storage: Storage, **forms: Any) -> Settings:
    tree = make_settings(storage).model_dump(mode="json")
    tree["task"]["compact"] = forms
    return parse_settings(tree)


def make(spark: SparkContext, storage: Storage, **forms: Any) -> dict[str, Any]:
    """Run the stage; COMPACT's metadata."""
    settings = settings_of(storage, **forms)
    compact.run(spark, storage, settings, trace(storage, COMPACT_STAGE, settings))
    return open_manifest(storage, COMPACT).metadata["forms"]  # type: ignore[no-any-return]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def test_int8_gives_the_vectors_back_to_half_a_step() -> None:
    vectors = np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32)
    vectors[3] = 0
    codes, scales = compact.to_int8(vectors)
    assert codes.dtype == np.int8
    assert np.abs(codes[np.arange(100) != 3]).max(axis=1).tolist() == [127] * 99
    assert scales[3] == 0
    assert (np.abs(codes * scales[:, None] - vectors) <= scales[:, None] * 0.501).all()


def test_directions_are_orthonormal_and_the_longest_come_first() -> None:
    """A sample longer in one planted direction than in another, and than in all others."""
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(8, 8)))[0].astype(np.float32)
    sample = (random.normal(size=(5000, 8)) * np.array([5, 3, 1, 1, 1, 1, 0.5, 0.1])).astype(np.float32) @ basis.T
    found = compact.principal_directions(sample)
    np.testing.assert_allclose(found.T @ found, np.eye(8), atol=1e-5)
    assert abs(found[:, 0] @ basis[:, 0]) > 0.99
    assert abs(found[:, 1] @ basis[:, 1]) > 0.99
    assert abs(found[:, 7] @ basis[:, 7]) > 0.99


@pytest.mark.slow
def test_forms_are_columns_beside_key_and_id(spark: SparkContext, storage: Storage) -> None:
    vectors = clustered(900)
    write_embeddings(storage, vectors)
    told = make(spark, storage, int8=True, dimensions=[4, 12])
    assert [told[name]["bytes"] for name in ("int8", "first_4", "first_12")] == [20, 8, 24]
    assert not storage.names(COMPACT_WORK)
    table = read_table(storage, open_manifest(storage, COMPACT))
    assert table.column_names == ["key", "id", "int8", "scale", "first_4", "first_12"]
    assert table.column("key")[17].as_py() == "item-17"
    codes, scales = arrow_to_vectors(table.column("int8")), table.column("scale").to_numpy()
    np.testing.assert_allclose(codes * scales[:, None], vectors, atol=0.01)
    queries = compact.turned(storage, vectors[:5], 12)
    kept = arrow_to_vectors(table.column("first_12")).astype(np.float32)
    np.testing.assert_allclose(queries, kept[:5], atol=1e-3)
    assert np.abs(queries @ kept.T - vectors[:5] @ vectors.T).mean() < 0.1


@pytest.mark.slow
def test_recall_and_lengths_are_those_that_a_reader_finds(spark: SparkContext, storage: Storage) -> None:
    vectors = clustered(400)
    write_embeddings(storage, vectors)
    told = make(spark, storage, int8=True, dimensions=[2, 15])
    assert told["int8"]["recall"] > 0.95
    assert told["first_2"]["recall"] < told["first_15"]["recall"] <= 1
    assert told["int8"]["norm_share_mean"] == pytest.approx(1, abs=0.01)
    table = read_table(storage, open_manifest(storage, COMPACT))
    lengths = np.linalg.norm(arrow_to_vectors(table.column("first_2")).astype(float), axis=1)
    assert told["first_2"]["norm_share_mean"] == pytest.approx(lengths.mean(), abs=0.01)
    seen = arrow_to_vectors(table.column("first_2")).astype(np.float32)
    hits = [len(set(nearest(vectors, row)) & set(nearest(seen, row))) for row in range(400)]
    assert told["first_2"]["recall"] == pytest.approx(np.mean(hits) / 10, abs=1e-6)


def nearest(vectors: np.ndarray, row: int) -> list[int]:
    """The ten rows of the largest inner products, without itself."""
    scores = vectors @ vectors[row]
    scores[row] = -np.inf
    return np.argsort(-scores, kind="stable")[:10].tolist()  # type: ignore[no-any-return]


def test_what_is_too_long_for_half_precision_is_named(spark: SparkContext, storage: Storage) -> None:
    """An embedding of finite halves may be longer, turned, than any of its numbers."""
    vectors = clustered(300)
    vectors[17] = 60_000
    write_embeddings(storage, vectors)
    with pytest.raises(
        DataError, match=r"the embedding of item item-17 is too long for the float16 of task.compact.dim"
    ):
        make(spark, storage, dimensions=[4])


def test_nothing_is_made_unless_asked_for(spark: SparkContext, storage: Storage) -> None:
    write_embeddings(storage, clustered(30))
    assert make(spark, storage) == {}
    assert open_manifest(storage, COMPACT).num_rows == 0
    assert open_manifest(storage, ROTATION).shards == ()


def test_more_dimensions_than_there_are_is_an_error(spark: SparkContext, storage: Storage) -> None:
    write_embeddings(storage, clustered(30))
    with pytest.raises(SettingsError, match=r"task\.compact\.dimensions has 16, and embeddings have 16"):
        make(spark, storage, dimensions=[16])


@pytest.mark.slow
def test_the_shards_of_the_embeddings_change_only_the_shards(spark: SparkContext, tmp_path: Path) -> None:
    found = []
    for count in (1, 4):
        storage = Storage(str(tmp_path / str(count)))
        write_embeddings(storage, clustered(200), count)
        make(spark, storage, int8=True, dimensions=[8])
        found.append(read_table(storage, open_manifest(storage, COMPACT)).combine_chunks())
    assert found[0].equals(found[1])
