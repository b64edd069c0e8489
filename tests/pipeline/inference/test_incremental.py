"""From an earlier run: the bytes of a whole run, at the cost of what changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline import steps
from pipeline.contracts import schemas
from pipeline.contracts.config import parse_settings
from pipeline.contracts.datasets import (
    Lineage,
    arrow_to_vectors,
    commit,
    find_manifest,
    lists_to_arrow,
    open_manifest,
    read_shard,
    read_table,
    vectors_to_arrow,
    write_file,
    write_shard,
)
from pipeline.contracts.errors import StorageError
from pipeline.contracts.rows import read_own_rows
from pipeline.contracts.sharding import shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.differences import Noting
from pipeline.inference import incremental, stage, ways
from pipeline.inference.earlier import continued_bounds
from pipeline.inference.incremental import shards_together
from pipeline.spark import run_tasks
from tests.pipeline.inference.test_stage import WIDTH, PlainNetwork
from tests.synthetic import shop_settings

Array = NDArray[Any]
LINEAGE = Lineage("before", {}, {})


class World:
    """Items in groups of ten, whose neighbours are of their group; six are new on the second night."""

    def __init__(self, num_items: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.features = generator.random((num_items, WIDTH)).astype(np.float32)
        self.lists = [
            np.sort(generator.choice(np.arange(item // 10 * 10, min(num_items, item // 10 * 10 + 10)), 4)).tolist()
            for item in range(num_items)
        ]

    def store(
        self, storage: Storage, num_shards: int, model: bytes = b"model", previous: Storage | None = None
    ) -> None:
        """As the stages before inference leave them."""
        count = len(self.features)
        written: dict[schemas.Dataset, list[Any]] = {
            d: [] for d in (schemas.ITEMS, schemas.FEATURES, schemas.NEIGHBOURS)
        }
        for shard in range(num_shards):
            start, stop = shard_bounds(count, num_shards, shard)
            ids = pa.array(np.arange(start, stop), pa.uint32())
            rows = self.lists[start:stop]
            indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
            flat = np.array([i for row in rows for i in row], np.uint32)
            weights = np.concatenate([np.full(len(row), 1 / max(1, len(row)), np.float32) for row in rows])
            zeros = pa.array([0] * (stop - start), pa.int64())
            keys = pa.array([f"key {i}" for i in range(start, stop)])
            tables = {
                schemas.ITEMS: [keys, ids, zeros, zeros, pa.nulls(stop - start, pa.string())],
                schemas.FEATURES: [ids, vectors_to_arrow(self.features[start:stop])],
                schemas.NEIGHBOURS: [ids, lists_to_arrow(indptr, flat), lists_to_arrow(indptr, weights)],
            }
            for dataset, columns in tables.items():
                table = pa.table(columns, names=[column.name for column in dataset.columns or ()])
                written[dataset].append(write_shard(storage, dataset, shard, table, LINEAGE))
        for dataset, shards in written.items():
            commit(storage, dataset, shards, LINEAGE, {"num_neighbours": 4} if dataset is schemas.NEIGHBOURS else {})
        self.note(storage, previous)
        commit(storage, schemas.MODEL, [write_file(storage, "model", "model.json", model, LINEAGE)], LINEAGE)

    def note(self, storage: Storage, previous: Storage | None) -> None:
        """As the stages that make features and neighbours note what they are, and what is new."""
        for dataset in (schemas.FEATURES, schemas.NEIGHBOURS):
            noting, whole = (
                Noting(storage, dataset, LINEAGE, None if previous is None else previous.url),
                open_manifest(storage, dataset),
            )
            noted = [noting.note(shard, read_shard(storage, whole, shard)) for shard in range(len(whole.shards))]
            noting.commit(whole, noted)


def embed(
    spark: SparkContext, storage: Storage, network: PlainNetwork, rows: int = 25, previous: Storage | None = None,
    keeps: bool = True, **inference: Any,
) -> tuple[Array, dict[str, Any]]:  # fmt: skip
    """The stage's embeddings and metadata."""
    tree = shop_settings(Path("data"), Path(storage.url))
    tree["resources"] |= {"rows_per_shard": rows, "inference": {"reducer": "gather", "keep_layers": keeps}}
    tree["task"]["inference"] = inference
    tree["task"]["data"]["previous"] = None if previous is None else previous.url
    read = schemas.INFERENCE.reads
    lineage = Lineage("inference", dict(inference), {d.name: open_manifest(storage, d).content for d in read})
    stage.run(spark, storage, parse_settings(tree), lineage, network)
    manifest = open_manifest(storage, schemas.EMBEDDINGS)
    return arrow_to_vectors(read_table(storage, manifest).column("embedding")), manifest.metadata


def cosines(one: Array, other: Array) -> Array:
    """Row by row; 1 where there is nothing to compare."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.where(lengths > 0, (one * other).sum(axis=1) / np.where(lengths > 0, lengths, 1), 1.0)


@pytest.mark.parametrize(
    ("num_shards", "rows", "cores", "changed", "expected"),
    [
        (80, 50_000, 2, 0, 8), (80, 50_000, 2, 40_000, 8), (80, 50_000, 2, 80_000, 4), (80, 50_000, 2, 10**6, 1),
        (80, 50_000, 8, 40_000, 2), (80, 50_000, 200, 40_000, 1), (80, 200_000, 2, 40_000, 2), (80, 10**6, 2, 1, 1),
        (3, 25, 1, 1, 1), (0, 25, 1, 0, 1),
    ],
)  # fmt: skip
def test_tasks_take_more_shards_where_little_is_made_of_each_and_cores_have_enough(
    num_shards: int, rows: int, cores: int, changed: int, expected: int
) -> None:
    assert shards_together(num_shards, rows, cores, changed) == expected


@pytest.mark.parametrize(
    ("inference", "noted", "together"),
    [({}, True, 3), ({"layer_dtype": "float16"}, True, 1), ({"layer_dtype": "float16"}, False, 3)],
)
def test_what_changed_is_made_again_to_the_bytes_of_a_whole_run(
    spark: SparkContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inference: dict[str, Any], noted: bool,
    together: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(incremental, "shards_together", lambda *sizes: together)
    network, world = PlainNetwork(2), World(94)
    first, second, whole, third = (Storage(str(tmp_path / name)) for name in ("first", "second", "whole", "third"))
    world.store(first, 4)
    before, _ = embed(spark, first, network, **inference)
    changed = World(100)
    changed.features[:94], changed.lists[:94] = world.features, world.lists
    changed.features[[3, 47]] += np.float32(0.25)
    changed.lists[61] = [60, 62, 69]
    for storage, before_it in ((second, first if noted else None), (whole, None)):
        changed.store(storage, 4, previous=before_it)
    again, told = embed(spark, second, network, previous=first, **inference)
    expected, _ = embed(spark, whole, network, **inference)
    np.testing.assert_array_equal(again, expected)
    assert len(again) == 100
    reached = np.flatnonzero((again[:94] != before).any(axis=1)) // 10
    assert set(reached.tolist()) <= {0, 4, 6, 9}
    remade = told["remade"]
    assert remade["changed items"] == 2 + 1 + 6
    assert remade["messages of layer 1"] == 2 + 6
    drift, moved = told["drift"], cosines(again[:94], before) < 0.99
    assert (drift["compared"], drift["same_model"]) == (94, True)
    assert drift["moved_share"] == pytest.approx(moved.mean())
    assert drift["cosine_mean"] == pytest.approx(cosines(again[:94], before).mean(), abs=1e-6)
    assert 9 < remade["vectors of layer 1"] <= remade["embeddings"] <= 40
    # the third night goes on from the second's kept layers, cut otherwise, and ends a chain of two
    changed.features[20] += np.float32(0.5)
    changed.store(third, 3)
    chained, told = embed(spark, third, network, rows=40, previous=second, **inference)
    assert told["remade"]["changed items"] == 1
    whole.delete(schemas.EMBEDDINGS.name)
    changed.store(whole, 3)
    np.testing.assert_array_equal(chained, embed(spark, whole, network, **inference)[0])


@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_a_chain_of_nights_ends_where_a_whole_run_does(spark: SparkContext, tmp_path: Path, reduction: str) -> None:
    """What is kept is a base, shared by all nights, and one patch, until that has a quarter of the items."""
    network, world, random = PlainNetwork(2), World(200), np.random.default_rng(5)
    network.reduction = reduction
    last = Storage(str(tmp_path / "night-0"))
    world.store(last, 4)
    embed(spark, last, network)
    base = Path(last.url) / "layers" / "projected-1"
    inodes = {file.name: file.stat().st_ino for file in base.glob("*.rows")}
    patched = []
    for night in range(1, 6):
        more = World(200 + 3 * night)
        more.features[: len(world.lists)], more.lists[: len(world.lists)] = world.features, world.lists
        world = more
        some = random.permutation(200)[:3]
        world.features[some] *= np.float32(0.75)
        world.lists[int(random.integers(200))] = random.permutation(len(world.lists))[:4].tolist()
        here, whole = Storage(str(tmp_path / f"night-{night}")), Storage(str(tmp_path / f"whole-{night}"))
        world.store(here, 4, previous=last)
        world.store(whole, 4)
        found, told = embed(spark, here, network, previous=last)
        np.testing.assert_array_equal(found, embed(spark, whole, network)[0])
        assert "remade" in told
        kept = [open_manifest(here, f"layers/{name}") for name in ("projected-1", "projected-2")]
        patched.append([manifest.metadata.get("patched", False) for manifest in kept])
        assert kept[0].num_rows == 200
        files = list((Path(here.url) / "layers" / "projected-1").glob("*.rows"))
        assert {file.name: file.stat().st_ino for file in files} == inodes
        last.delete(schemas.LAYERS.name)  # as when a night has ended: what tonight has of it stays
        last = here
    assert patched[0] == [True, True]
    assert [True, False] in patched  # of the second layer more than a quarter was made again by then


def test_a_largest_value_that_is_in_a_patch_is_missed_when_it_goes(
    spark: SparkContext, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network, world = PlainNetwork(2), World(60)
    first, second, third, whole = (Storage(str(tmp_path / name)) for name in ("first", "second", "third", "whole"))
    world.features[5] *= np.float32(100)
    world.store(first, 2)
    embed(spark, first, network)
    world.features[5] *= np.float32(1.001)
    world.store(second, 2, previous=first)
    assert "remade" in embed(spark, second, network, previous=first)[1]
    assert 5 in read_own_rows(second, open_manifest(second, "layers/projected-1-ids"), 0)
    world.features[5] /= np.float32(100)
    for storage, previous in ((third, second), (whole, None)):
        world.store(storage, 2, previous=previous)
    capfd.readouterr()
    found, told = embed(spark, third, network, previous=second)
    assert "largest values of a layer changed by a power of two" in capfd.readouterr().err
    assert "remade" not in told
    np.testing.assert_array_equal(found, embed(spark, whole, network)[0])


def test_nothing_changed_nothing_is_made(spark: SparkContext, tmp_path: Path) -> None:
    world, network = World(40), PlainNetwork(2)
    first, second = (Storage(str(tmp_path / name)) for name in ("first", "second"))
    for storage in (first, second):
        world.store(storage, 2)
    before, _ = embed(spark, first, network)
    after, told = embed(spark, second, network, previous=first)
    np.testing.assert_array_equal(before, after)
    assert not any(told["remade"].values())
    assert told["drift"] == {"compared": 40, "same_model": True, "cosine_mean": 1, "moved_share": 0}


def test_shards_of_the_same_items_keep_their_bounds_and_bytes(spark: SparkContext, tmp_path: Path) -> None:
    network, world = PlainNetwork(2), World(100)
    first, second, whole = (Storage(str(tmp_path / name)) for name in ("first", "second", "whole"))
    world.store(first, 4)
    embed(spark, first, network)
    world.features[[3, 47]] += np.float32(0.25)
    for storage in (second, whole):
        world.store(storage, 4)
    embed(spark, second, network, previous=first)
    embed(spark, whole, network)
    made, expected, former = (open_manifest(storage, schemas.EMBEDDINGS).shards for storage in (second, whole, first))
    assert made == expected
    assert [one == other for one, other in zip(made, former, strict=True)] == [False, False, True, True]
    more = World(130)
    more.features[:100], more.lists[:100] = world.features, world.lists
    third = Storage(str(tmp_path / "third"))
    more.store(third, 5)
    found, _ = embed(spark, third, network, previous=second)
    grown = open_manifest(third, schemas.EMBEDDINGS).shards
    assert [shard.rows for shard in grown] == [25, 25, 25, 25, 15, 15]
    assert grown[:4] == made
    whole.delete(schemas.EMBEDDINGS.name)
    more.store(whole, 5)
    np.testing.assert_array_equal(found, embed(spark, whole, network)[0])


@pytest.mark.parametrize(
    ("former", "num_items", "expected"),
    [
        ([25, 25], 50, [0, 25, 50]),
        ([25, 25], 51, [0, 25, 50, 51]),
        ([25, 25, 1], 80, [0, 25, 50, 65, 80]),  # what was too small is cut anew
        ([25, 26], 60, [0, 25, 42, 60]),  # as is what is too large
        ([10], 10, [0, 10]),
        ([], 0, [0, 0]),
    ],
)
def test_bounds_go_on_from_the_earlier_runs(former: list[int], num_items: int, expected: list[int]) -> None:
    assert continued_bounds(former, num_items, 25) == expected


def test_lost_embeddings_are_made_again_beside_layers_that_were_kept(spark: SparkContext, tmp_path: Path) -> None:
    world, network, storage = World(40), PlainNetwork(2), Storage(str(tmp_path / "run"))
    world.store(storage, 2)
    before, _ = embed(spark, storage, network)
    storage.delete(schemas.EMBEDDINGS.name)
    np.testing.assert_array_equal(embed(spark, storage, network)[0], before)


def test_broken_off_at_each_of_its_steps_it_ends_as_what_the_next_night_goes_on_from(
    spark: SparkContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time half way through a step more: the embeddings are there when all is that is kept beside them."""
    network, world = PlainNetwork(2), World(120)
    first, second, whole, third = (Storage(str(tmp_path / name)) for name in ("first", "second", "whole", "third"))
    world.store(first, 2)
    embed(spark, first, network)
    world.features[[3, 47]] += np.float32(0.25)
    for storage, previous in ((second, first), (whole, None)):
        world.store(storage, 2, previous=previous)
    expected, _ = embed(spark, whole, network)
    broken: list[str] = []

    class BrokenOffError(Exception):
        pass

    def breaking(session: SparkContext, tasks: Any, work: Any, label: str) -> Any:
        if label in broken:
            return run_tasks(session, tasks, work, label)
        broken.append(label)
        run_tasks(session, tasks[: (len(tasks) + 1) // 2], work, label)
        raise BrokenOffError

    with monkeypatch.context() as patch:
        for module in (steps, incremental):
            patch.setattr(module, "run_tasks", breaking)
        for _ in range(100):
            try:
                found, told = embed(spark, second, network, previous=first)
                break
            except BrokenOffError:
                assert find_manifest(second, schemas.EMBEDDINGS) is None
    np.testing.assert_array_equal(found, expected)
    assert {"inference: combine layer 2 again", "inference: keep sums", "inference: base of sums"} <= set(broken)
    assert told["remade"]["changed items"] == 2
    world.features[20] += np.float32(0.5)
    whole.delete(schemas.EMBEDDINGS.name)
    for storage, previous in ((third, second), (whole, None)):
        world.store(storage, 2, previous=previous)
    chained, told = embed(spark, third, network, previous=second)
    assert told["remade"]["changed items"] == 1
    np.testing.assert_array_equal(chained, embed(spark, whole, network)[0])


def test_changes_against_another_earlier_run_are_not_gone_on_from(
    spark: SparkContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tonight goes on from the second night and is killed; that is rolled back, and tonight goes on from the first."""
    network, world = PlainNetwork(2), World(120)
    first, second, third, whole = (Storage(str(tmp_path / name)) for name in ("first", "second", "third", "whole"))
    world.store(first, 4)
    embed(spark, first, network)
    world.features[3] += np.float32(0.25)
    world.store(second, 4, previous=first)
    embed(spark, second, network, previous=first)
    world.features[77] += np.float32(0.25)
    world.store(third, 4, previous=second)
    world.store(whole, 4)

    def breaking(session: SparkContext, tasks: Any, work: Any, label: str) -> Any:
        if label == "inference: combine layer 1 again":
            raise KeyboardInterrupt
        return run_tasks(session, tasks, work, label)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "run_tasks", breaking)
        with pytest.raises(KeyboardInterrupt):
            embed(spark, third, network, previous=second)
    world.note(third, first)
    found, told = embed(spark, third, network, previous=first)
    np.testing.assert_array_equal(found, embed(spark, whole, network)[0])
    assert told["remade"]["changed items"] == 2


def test_a_whole_run_that_has_begun_is_gone_on_with_whatever_could_be_done_else(
    spark: SparkContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails at the end of an incremental run has put the earlier run's layers in the place of tonight's."""
    network, world = PlainNetwork(2), World(100)
    first, second, whole = (Storage(str(tmp_path / name)) for name in ("first", "second", "whole"))
    world.store(first, 4)
    embed(spark, first, network)
    world.features[[3, 47]] += np.float32(0.25)
    world.store(second, 4, previous=first)
    world.store(whole, 4)
    expected, _ = embed(spark, whole, network)
    labels: list[str] = []

    def breaking(session: SparkContext, tasks: Any, work: Any, label: str) -> Any:
        labels.append(label)
        if label == "inference: base of sums":
            raise StorageError("no answer")
        if label == "inference: combine layer 1" and labels.count(label) == 1:
            raise KeyboardInterrupt
        return run_tasks(session, tasks, work, label)

    for module in (steps, incremental):
        monkeypatch.setattr(module, "run_tasks", breaking)
    with pytest.raises(KeyboardInterrupt):
        embed(spark, second, network, previous=first)
    assert "inference: base of sums" in labels
    found, told = embed(spark, second, network, previous=first)
    np.testing.assert_array_equal(found, expected)
    assert "remade" not in told
    assert [labels.count(f"inference: {label}") for label in ("project layer 1", "find changes")] == [1, 1]


@pytest.mark.parametrize(
    ("damaged", "is_gone"), [("layers/projected-1/part-00001.rows", True), ("embeddings/part-00001.parquet", False)]
)
def test_what_is_damaged_in_the_earlier_run_is_not_needed(
    spark: SparkContext, tmp_path: Path, capfd: pytest.CaptureFixture[str], damaged: str, is_gone: bool
) -> None:
    network, world = PlainNetwork(2), World(100)
    first, second, other, whole = (Storage(str(tmp_path / name)) for name in ("first", "second", "other", "whole"))
    world.store(first, 4)
    embed(spark, first, network)
    world.features[[3, 47]] += np.float32(0.25)
    world.store(second, 4, previous=first)
    world.store(whole, 4)
    world.store(other, 4, model=b"another", previous=first)
    broken = Path(first.locate(damaged))
    if is_gone:
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:-1])
    expected, _ = embed(spark, whole, network)
    capfd.readouterr()
    found, told = embed(spark, second, network, previous=first)
    assert re.search(rf"inference: all items, as .*{re.escape(damaged)}", capfd.readouterr().err)
    np.testing.assert_array_equal(found, expected)
    assert "remade" not in told
    found, told = embed(spark, other, network, previous=first)
    np.testing.assert_array_equal(found, expected)
    assert told["drift"]["compared"] == (100 if damaged.startswith("layers") else 75)


def test_what_was_kept_is_let_go_of_so_that_nothing_speaks_of_files_that_are_gone(
    spark: SparkContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, world = PlainNetwork(2), World(40)
    first, second = (Storage(str(tmp_path / name)) for name in ("first", "second"))
    world.store(first, 2)
    embed(spark, first, network)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", lambda *_: None)  # killed before it has deleted anything else
        ways.let_go(first)
    world.store(second, 2, previous=first)
    _, told = embed(spark, second, network, previous=first)
    assert "remade" not in told
    ways.let_go(first)
    assert first.names("layers") == []


def test_with_other_shards_none_of_the_former_files_stay(spark: SparkContext, tmp_path: Path) -> None:
    world, network, storage = World(100), PlainNetwork(2), Storage(str(tmp_path / "run"))
    world.store(storage, 4)
    embed(spark, storage, network, rows=10)
    embed(spark, storage, network, rows=50)
    assert [name for name in storage.names("layers/projected-1") if name.endswith(".rows")] == [
        "part-00000.rows", "part-00001.rows",
    ]  # fmt: skip


@pytest.mark.parametrize("noted", [True, False])
def test_an_earlier_shard_that_was_changed_is_not_copied(
    spark: SparkContext, tmp_path: Path, capfd: pytest.CaptureFixture[str], noted: bool
) -> None:
    """By the digests that the earlier run noted or, without any, by checksums; wherever in the file the change is."""
    network, world = PlainNetwork(2), World(50)
    first, whole = (Storage(str(tmp_path / name)) for name in ("first", "whole"))
    world.store(first, 2)
    embed(spark, first, network)
    manifest = open_manifest(first, schemas.EMBEDDINGS)
    assert len(manifest.metadata["shard_digests"]) == len(manifest.shards) == 2
    if not noted:
        told = {name: value for name, value in manifest.metadata.items() if name != "shard_digests"}
        commit(first, schemas.EMBEDDINGS, manifest.shards, manifest.lineage, told)
    world.features[3] += np.float32(0.25)
    world.store(whole, 2)
    expected, _ = embed(spark, whole, network)
    path = f"embeddings/{manifest.shards[1].name}"
    written = first.read_bytes(path)
    places = [None, *range(0, len(written), max(1, len(written) // 5))]
    for number, place in enumerate(places):
        second = Storage(str(tmp_path / f"second-{number}"))
        world.store(second, 2)
        changed = bytearray(written)
        if place is not None:
            changed[place] ^= 4
        first.write_bytes(path, bytes(changed))
        if place is None:
            found, told = embed(spark, second, network, previous=first)
            np.testing.assert_array_equal(found, expected)
            assert told["remade"]["changed items"] == 1
        else:
            found, told = embed(spark, second, network, previous=first)
            reason = f"all items, as .*{manifest.shards[1].name} was changed after its manifest"
            assert re.search(reason, capfd.readouterr().err)
            assert "remade" not in told
            np.testing.assert_array_equal(found, expected)


def another_model(world: World, storage: Storage) -> None:
    world.store(storage, 2, model=b"another")


def larger_values(world: World, storage: Storage) -> None:
    world.features[5] *= np.float32(100)
    world.store(storage, 2)


def much_else(world: World, storage: Storage) -> None:
    world.features[:11] += np.float32(0.25)
    world.store(storage, 2)


def not_noted(world: World, storage: Storage) -> None:
    world.store(storage, 2)
    storage.delete(schemas.DIFFERENCES)


def longer_lists(world: World, storage: Storage) -> None:
    world.store(storage, 2)
    neighbours = open_manifest(storage, schemas.NEIGHBOURS)
    commit(storage, schemas.NEIGHBOURS, neighbours.shards, LINEAGE, {"num_neighbours": 5})


def fewer_items(world: World, storage: Storage) -> None:
    world.features, world.lists = world.features[:30], [[0]] * 30
    world.store(storage, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_model, "all items, as the model is another"),
        (larger_values, "all items, as the largest values of a layer changed by a power of two"),
        (fewer_items, "all items, as items were numbered anew"),
        (much_else, "all items, as 11 of 40 changed"),
        (not_noted, "all items, as it is not known what changed of features and neighbours"),
        (longer_lists, "all items, as lists of neighbours are of another length"),
    ],
)
def test_what_cannot_be_gone_on_from_is_made_whole(
    spark: SparkContext, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Callable[..., None], reason: str
) -> None:
    world, network = World(40), PlainNetwork(2)
    first, second, whole = (Storage(str(tmp_path / name)) for name in ("first", "second", "whole"))
    world.store(first, 2)
    embed(spark, first, network)
    for storage in (second, whole):
        fresh = World(40)
        change(fresh, storage)
    capfd.readouterr()
    found, told = embed(spark, second, network, previous=first)
    assert reason in capfd.readouterr().err
    assert "remade" not in told
    assert told["drift"]["same_model"] == (change is not another_model)
    np.testing.assert_array_equal(found, embed(spark, whole, network)[0])
