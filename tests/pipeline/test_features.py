"""Features: encoders on planted content, and the stage over any number of shards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark import SparkContext

from pipeline import features
from pipeline.contracts import schemas, sharding
from pipeline.contracts.config import FeatureColumn, Features, Settings, parse_settings
from pipeline.contracts.datasets import (
    Lineage,
    arrow_to_vectors,
    commit,
    finished_shard,
    open_manifest,
    read_table,
    write_shard,
)
from pipeline.contracts.errors import DataError, ResourceError
from pipeline.contracts.sharding import shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.encoders import TfidfEncoder, _count_words, _weigh, dump_encoders, fit_encoders, load_encoders

LINEAGE = Lineage("ingest", {}, {})
NAMES = pa.list_(pa.string())
VECTORS = pa.list_(pa.float32())


def encode(values: list[Any], arrow_type: pa.DataType, settings: Features | None = None, **column: Any) -> np.ndarray:
    """One column through a fresh encoder, with its missing flag if it has one but without the degree."""
    table = pa.table({"content_x": pa.array(values, arrow_type)})
    fitted = fit_encoders([table], [FeatureColumn(name="x", **column)], settings or Features(), 0)
    return fitted.encode(table)[:, :-1]


# ------------------------------------------------------------------------------------------------ one column


def test_numbers_are_standardised_and_a_missing_one_is_the_mean_with_a_flag() -> None:
    encoded = encode([1.0, 3.0, None], pa.float64(), kind="numeric")
    assert encoded.tolist() == [[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def test_log_is_taken_before_standardising() -> None:
    encoded = encode([0.0, np.e - 1, np.e**2 - 1], pa.float64(), kind="numeric", log=True)
    np.testing.assert_allclose(encoded[:, 0], np.array([-1, 0, 1]) * np.sqrt(1.5), atol=1e-6)


def test_a_constant_or_wholly_missing_number_is_zero() -> None:
    assert encode([7.0, 7.0], pa.float64(), kind="numeric").tolist() == [[0.0], [0.0]]
    np.testing.assert_allclose(encode([0.2] * 4707, pa.float64(), kind="numeric"), 0, atol=1e-6)
    assert encode([None, None], pa.float64(), kind="numeric").tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_categories_are_slots_by_frequency_then_name_and_rows_have_length_one() -> None:
    values = [["b", "z"], ["b"], ["c"], ["d"], None]
    encoded = encode(values, NAMES, Features(categories=2), kind="categorical")
    half = float(np.sqrt(0.5))
    expected = [[half, 0.0, half, 0.0], [1.0, 0, 0, 0], [0.0, 1, 0, 0], [0.0, 0, 1, 0], [0.0, 0, 0, 1]]
    np.testing.assert_allclose(encoded, expected, rtol=1e-6)


def test_a_name_that_was_never_seen_goes_to_the_slot_of_the_others() -> None:
    column = FeatureColumn(name="x", kind="categorical")
    fitted = fit_encoders([pa.table({"content_x": pa.array([["a"]], NAMES)})], [column], Features(), 0)
    tomorrow = pa.table({"content_x": pa.array([["z", "y"], ["a"]], NAMES)})
    assert fitted.encode(tomorrow).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_vectors_stay_as_they_are_and_a_missing_one_is_their_mean() -> None:
    encoded = encode([[1.0, 2.0], None, [3.0, 6.0]], VECTORS, kind="vector")
    assert encoded.tolist() == [[1, 2, 0], [2, 4, 1], [3, 6, 0]]


def test_texts_about_one_thing_are_nearer_than_texts_about_another() -> None:
    texts = [f"{a} {b} lamp light" for a in ("red", "blue") for b in ("glass", "metal")]
    texts += [f"{a} {b} tea cup" for a in ("green", "pink") for b in ("bone", "stone")]
    encoded = encode([*texts, None], pa.string(), Features(text_dimensions=4), kind="text")
    vectors, flags = encoded[:, :-1], encoded[:, -1]
    np.testing.assert_allclose(np.linalg.norm(vectors[:-1], axis=1), 1.0, rtol=1e-5)
    assert not vectors[-1].any()
    assert flags.tolist() == [0.0] * 8 + [1.0]
    likeness = vectors[:-1] @ vectors[:-1].T
    assert likeness[:4, :4].min() > likeness[:4, 4:].max() + 0.3


def test_text_has_no_more_dimensions_than_its_rank() -> None:
    assert encode(["one two", "one two", "three"], pa.string(), kind="text").shape == (3, 2)
    assert encode(["", "!?"], pa.string(), kind="text").shape == (2, 0)
    assert encode([None], pa.string(), kind="text").tolist() == [[1.0]]


def test_words_that_were_never_seen_give_zeros_and_not_nan() -> None:
    fitted = fit_encoders(
        [pa.table({"content_x": ["one two", "three four"]})], [FeatureColumn(name="x", kind="text")], Features(), 0
    )
    assert not fitted.encode(pa.table({"content_x": ["quite unknown"]})).any()


def test_the_svd_keeps_nearly_what_the_exact_one_does() -> None:
    random = np.random.default_rng(0)
    words = np.array([f"w{n}" for n in range(300)])
    texts = [" ".join(random.choice(words, 6, p=np.arange(300, 0, -1) / 45150)) for _ in range(400)]
    table = pa.table({"content_x": texts})
    fitted = fit_encoders([table], [FeatureColumn(name="x", kind="text")], Features(text_dimensions=20), 0)
    encoder = fitted.blocks[0].encoder
    assert isinstance(encoder, TfidfEncoder)
    weighted = _weigh(_count_words(pa.array(texts), len(encoder.idf)), encoder.idf)
    exact = np.linalg.eigvalsh((weighted @ weighted.T).toarray().astype(np.float64))[-20:].sum()
    assert np.linalg.norm(weighted @ encoder.components) ** 2 > 0.95 * exact, (
        "random words: the flattest spectrum there is"
    )


def test_a_text_model_that_cannot_run_says_what_to_install_or_change() -> None:
    with pytest.raises(ResourceError, match=r"text_encoder.*(pip install|cannot be loaded)"):
        encode(["a"], pa.string(), Features(text_encoder="/no/such/model"), kind="text")


def test_a_vector_column_without_a_vector_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"column x has no vector in 2 items.*task\.data\.items\.columns"):
        encode([None, None], VECTORS, kind="vector")


# ------------------------------------------------------------------------------------------------ the stage

COLUMNS: list[dict[str, Any]] = [
    {"name": "title", "kind": "text"},
    {"name": "price", "kind": "numeric", "log": True},
    {"name": "tags", "kind": "categorical"},
    {"name": "image", "kind": "vector"},
]


def make_settings(columns: list[dict[str, Any]], **feature_settings: Any) -> Settings:
    interactions = {"paths": "x.csv", "user": "u", "item": "i", "timestamp": "t"}
    items = {"paths": "y.csv", "key": "i", "columns": columns} if columns else None
    task = {"data": {"interactions": interactions, "items": items}, "features": feature_settings}
    return parse_settings({"task": task, "resources": {"run": "unused"}})


def make_catalogue(storage: Storage, num_items: int, num_shards: int, with_content: bool = True) -> None:
    """ITEMS and CONTENT as ingest writes them; every fifth item has no content at all."""
    random = np.random.default_rng(1)
    words = ["red", "blue", "lamp", "cup", "tea", "light", "bag", "box"]
    titles = [" ".join(random.choice(words, 3)) for _ in range(num_items)]
    absent = np.arange(num_items) % 5 == 4
    ids = pa.array(np.arange(num_items), pa.uint32())
    content = {
        "id": ids,
        "content_title": pa.array(titles, mask=absent),
        "content_price": pa.array(random.exponential(10, num_items), mask=absent),
        "content_tags": pa.array(
            [None if absent[n] else [words[n % 8], words[n % 3]] for n in range(num_items)], NAMES
        ),
        "content_image": pa.array(
            [None if absent[n] else random.normal(size=4).tolist() for n in range(num_items)], VECTORS
        ),
    }
    items = {
        "key": [f"k{n:05d}" for n in range(num_items)],
        "id": ids,
        "degree": pa.array(np.arange(num_items) % 7, pa.int64()),
        "first_seen": pa.array(np.zeros(num_items), pa.int64()),
        "title": pa.array(titles),
    }
    for dataset, columns in ((schemas.CONTENT, content), (schemas.ITEMS, items)):
        table = pa.table(columns if with_content or dataset is schemas.ITEMS else {"id": ids})
        bounds = [shard_bounds(num_items, num_shards, number) for number in range(num_shards)]
        pieces = [table.slice(start, stop - start) for start, stop in bounds]
        shards = [write_shard(storage, dataset, number, piece, LINEAGE) for number, piece in enumerate(pieces)]
        commit(storage, dataset, shards, LINEAGE)


def run(
    spark: SparkContext, storage: Storage, settings: Settings, version: str = "1"
) -> tuple[np.ndarray, dict[str, Any]]:
    features.run(spark, storage, settings, Lineage("features", {"version": version}, {}))
    manifest = open_manifest(storage, schemas.FEATURES)
    table = read_table(storage, manifest)
    assert table.column("id").to_pylist() == list(range(table.num_rows))
    return arrow_to_vectors(table.column("features")), manifest.metadata


def test_the_stage_gives_the_same_rows_from_1_3_and_7_shards(spark: SparkContext, tmp_path: Any) -> None:
    results = []
    for num_shards in (1, 3, 7):
        storage = Storage(str(tmp_path / str(num_shards)))
        make_catalogue(storage, 100, num_shards)
        results.append(run(spark, storage, make_settings(COLUMNS, fit_rows=60)))
    first, described = results[0]
    for vectors, metadata in results[1:]:
        np.testing.assert_array_equal(vectors, first)
        assert metadata["columns"] == described["columns"]
        np.testing.assert_allclose(metadata["std"], described["std"], rtol=1e-9)
    kinds = [(entry["name"], entry["kind"]) for entry in described["columns"]]
    flags = [(name, "missing") for name in ("title", "price", "tags", "image")]
    assert [kind for kind in kinds if kind[1] == "missing"] == flags
    assert kinds[-1] == ("degree", "degree")
    assert described["columns"][-1]["stop"] == first.shape[1]
    assert described["missing"] == dict.fromkeys(("title", "price", "tags", "image"), 20)
    assert np.isfinite(first).all()
    np.testing.assert_allclose(first[:, -1], np.log1p(np.arange(100) % 7), rtol=1e-6)
    np.testing.assert_allclose(described["mean"], first.mean(axis=0, dtype=np.float64), atol=1e-9)
    np.testing.assert_allclose(described["std"], first.std(axis=0, dtype=np.float64), atol=1e-7)


def test_a_refit_writes_the_same_bytes(spark: SparkContext, storage: Storage) -> None:
    make_catalogue(storage, 60, 2)
    contents = []
    for version in ("1", "2"):
        run(spark, storage, make_settings(COLUMNS), version)
        contents.append([open_manifest(storage, d).content for d in (schemas.FEATURES, schemas.ENCODERS)])
    assert contents[0] == contents[1]


def test_an_interrupted_run_keeps_its_finished_shards_and_ends_with_the_same_bytes(
    spark: SparkContext, storage: Storage, tmp_path: Any
) -> None:
    settings, lineage = make_settings(COLUMNS), Lineage("features", {"version": "1"}, {})
    make_catalogue(storage, 60, 3)
    run(spark, storage, settings)
    unbroken = open_manifest(storage, schemas.FEATURES)
    other = Storage(str(tmp_path / "other"))
    make_catalogue(other, 60, 3)
    run(spark, other, settings)
    table = read_table(other, open_manifest(other, schemas.FEATURES)).slice(0, 20)
    storage.delete("features")
    write_shard(storage, schemas.FEATURES, 0, table, lineage)
    assert finished_shard(storage, schemas.FEATURES, 0, lineage)
    run(spark, storage, settings)
    assert open_manifest(storage, schemas.FEATURES).content == unbroken.content


def test_without_content_the_degree_is_all_there_is(spark: SparkContext, storage: Storage) -> None:
    make_catalogue(storage, 10, 2, with_content=False)
    vectors, metadata = run(spark, storage, make_settings([]))
    assert vectors.shape == (10, 1)
    assert metadata["columns"] == [{"name": "degree", "kind": "degree", "start": 0, "stop": 1}]


def test_stored_encoders_give_what_the_stage_stored(spark: SparkContext, storage: Storage) -> None:
    make_catalogue(storage, 30, 2)
    vectors, _ = run(spark, storage, make_settings(COLUMNS))
    content = read_table(storage, open_manifest(storage, schemas.CONTENT))
    alone = load_encoders(storage).encode(content.slice(7, 1))
    np.testing.assert_array_equal(alone[0, :-1], vectors[7, :-1])
    assert alone[0, -1] == 0, "an item that nobody has touched yet has degree 0"
    assert dump_encoders(load_encoders(storage)).keys() == {"encoders.npz", "encoders.json"}


def test_half_precision_is_stored_when_asked_and_what_does_not_fit_is_refused(
    spark: SparkContext, storage: Storage
) -> None:
    columns = {"id": pa.array([0, 1], pa.uint32()), "content_image": pa.array([[1.0, 2.0], [3.0, 1e6]], VECTORS)}
    make_catalogue(storage, 2, 1)
    shard = write_shard(storage, schemas.CONTENT, 0, pa.table(columns), LINEAGE)
    commit(storage, schemas.CONTENT, [shard], LINEAGE)
    with pytest.raises(DataError, match=r"column image.*too large for float16.*task\.features\.dtype"):
        run(spark, storage, make_settings(COLUMNS[3:], dtype="float16"))
    make_catalogue(storage, 20, 1)
    vectors, _ = run(spark, storage, make_settings(COLUMNS, dtype="float16"), "2")
    assert vectors.dtype == np.float16


def test_the_sample_is_spread_evenly() -> None:
    assert (sharding.sample_rows(1000, 100, 0) // 10).tolist() == list(range(100))
    assert sharding.sample_rows(1000, 100, 0).tolist() == sharding.sample_rows(1000, 100, 0).tolist()
    assert sharding.sample_rows(3, 5, 0).tolist() == [0, 1, 2]
    assert sharding.sample_rows(0, 5, 0).tolist() == []


def test_a_sentence_transformers_model_gives_rows_of_length_one() -> None:
    """Runs where the `text` extra and the model are already there: tests use no network."""
    pytest.importorskip("sentence_transformers", reason="the text extra is not installed: sentence models unproved")
    try:
        encoded = encode(["a lamp", None], pa.string(), Features(text_encoder="all-MiniLM-L6-v2"), kind="text")
    except ResourceError as error:
        pytest.skip(f"sentence models unproved: {error}")
    np.testing.assert_allclose(np.linalg.norm(encoded[:, :-1], axis=1), [1.0, 0.0], atol=1e-5)
