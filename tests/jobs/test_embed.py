"""Items that came after the run: embedded as the run would have, found by what they are near to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.embed import Embedder
from jobs.inference import load_network
from pipeline.contracts import schemas
from pipeline.contracts.config import load_settings
from pipeline.contracts.datasets import arrow_to_vectors, open_manifest, read_table
from pipeline.contracts.errors import DataError, SettingsError
from pipeline.contracts.storage import Storage
from pipeline.exact_kernel import exact_neighbours
from pipeline.inference.reducers import read_lists
from pipeline.newcomers import Newcomers
from pipeline.walk_kernel import BipartiteGraph
from tests.jobs.conftest import Shop

pytestmark = pytest.mark.slow
LONELY = {"product": "new", "name": "red lonely thing", "price": None}
NEW_MUG = {"product": "new mug", "name": "violet", "price": 3.0}


@pytest.fixture(scope="module")
def embedder(finished: Shop) -> Embedder:
    return Embedder.open(str(finished.settings_file))


def stored(shop: Shop, key: str) -> np.ndarray:
    table = read_table(Storage(str(shop.run)), open_manifest(Storage(str(shop.run)), schemas.EMBEDDINGS))
    vector: np.ndarray = arrow_to_vectors(table.column("embedding"))[table.column("key").to_pylist().index(key)]
    return vector


def newcomers(shop: Shop, *overrides: str) -> Newcomers:
    settings = load_settings(str(shop.settings_file), overrides)
    storage = Storage(str(shop.run))
    return Newcomers(storage, settings, load_network(storage, open_manifest(storage, schemas.MODEL), settings))


def test_without_users_an_item_gets_what_the_run_gave_one_of_the_same_content(
    finished: Shop, embedder: Embedder
) -> None:
    keys, vectors = embedder.embed([LONELY])
    assert keys == ["new"]
    np.testing.assert_allclose(vectors[0], stored(finished, "lonely"), atol=1e-6)


def test_the_network_of_newcomers_is_that_of_the_run(finished: Shop) -> None:
    """Every item of the catalogue as if it were new, with its own neighbours: the run's embeddings again."""
    storage = Storage(str(finished.run))
    features, lists, embeddings = (
        read_table(storage, open_manifest(storage, dataset))
        for dataset in (schemas.FEATURES, schemas.NEIGHBOURS, schemas.EMBEDDINGS)
    )
    made = newcomers(finished).through(arrow_to_vectors(features.column("features")), read_lists(lists, 0))
    np.testing.assert_allclose(made, arrow_to_vectors(embeddings.column("embedding")), atol=1e-5)


def test_neighbours_are_those_of_an_item_of_the_catalogue_with_the_same_users(finished: Shop) -> None:
    """But for that item itself, which shares all users with the new one and comes first."""
    graph = BipartiteGraph.open(Storage(str(finished.run)), str(finished.folder / "cache"))
    items = np.flatnonzero(np.diff(graph.item_indptr) > 0)
    users = [graph.item_users[graph.item_indptr[item] : graph.item_indptr[item + 1]] for item in items]
    ids, scores, _ = newcomers(finished, "task.walks.compose=none", "task.walks.num_neighbours=6").neighbours(users)
    expected_ids, expected_scores, _ = exact_neighbours(graph, items, 5, 8192)
    for place, item in enumerate(items):
        others = ids[place] != item
        assert not others.all()
        assert scores[place][~others][0] == scores[place].max()
        assert np.array_equal(ids[place][others], expected_ids[place])
        assert np.array_equal(scores[place][others], expected_scores[place])


def test_users_bring_a_new_item_to_their_group(finished: Shop, embedder: Embedder) -> None:
    """Its title says nothing; baskets 1, 7, 13, ... buy group 1, the mugs."""
    known, users = stored(finished, "g1-03"), {"new mug": [f"basket {user:04d}" for user in range(1, 121, 6)]}
    _, alone = embedder.embed([NEW_MUG])
    _, touched = embedder.embed([NEW_MUG], users)
    assert touched[0] @ known > alone[0] @ known + 0.05
    nearest = finished_neighbours(finished, touched)
    assert sum(key.startswith("g1-") for key in nearest) >= 8, nearest


def finished_neighbours(shop: Shop, vectors: np.ndarray) -> list[str]:
    from pipeline.index import Index

    return Index.open(str(shop.run)).search(vectors, 10)[0][0]


@pytest.mark.parametrize(("limit", "holds"), [("min_item_degree", (9, 8)), ("max_item_degree", (3, 8))])
def test_the_graphs_limits_hold_for_new_items_too(
    finished: Shop, embedder: Embedder, limit: str, holds: tuple[int, int]
) -> None:
    """Else one would have neighbours tonight, and none in tomorrow's run."""
    users = {"new mug": [f"basket {user:04d}" for user in range(1, 49, 6)]}
    expected = embedder.embed([NEW_MUG], users)[1]
    within, beyond = (
        Embedder.open(load_settings(str(finished.settings_file), [f"task.graph.{limit}={number}"])) for number in holds
    )
    assert np.array_equal(beyond.embed([NEW_MUG], users)[1], expected)
    assert not np.allclose(within.embed([NEW_MUG], users)[1], expected)


def test_users_that_the_graph_does_not_know_say_nothing(embedder: Embedder) -> None:
    _, alone = embedder.embed([NEW_MUG])
    _, touched = embedder.embed([NEW_MUG], {"new mug": ["nobody", "basket 9999"], "other": ["basket 0001"]})
    assert np.array_equal(alone, touched)


def test_an_item_does_not_depend_on_its_company(embedder: Embedder) -> None:
    users = {"new mug": ["basket 0001", "basket 0007"]}
    many = [{**LONELY, "product": f"item {place}", "price": float(place)} for place in range(70)]
    keys, together = embedder.embed([*many, NEW_MUG, LONELY], users)
    assert keys[-2:] == ["new mug", "new"]
    for row, record in ((-2, NEW_MUG), (-1, LONELY)):
        np.testing.assert_allclose(together[row], embedder.embed([record], users)[1][0], atol=1e-6)


def test_a_missing_field_counts_as_missing(embedder: Embedder) -> None:
    full = embedder.embed([{"product": "a", "name": "red mug", "price": None}])[1]
    assert np.array_equal(full, embedder.embed([{"product": "a", "name": "red mug"}])[1])
    assert np.array_equal(full, embedder.embed(pa.table({"product": ["a"], "name": ["red mug"]}))[1])


def test_what_serves_needs_no_gpu_where_the_catalogue_is_embedded_on_one(finished: Shop, embedder: Embedder) -> None:
    other = Embedder.open(load_settings(str(finished.settings_file), ["resources.inference.device=cuda"]))
    np.testing.assert_array_equal(other.embed([NEW_MUG])[1], embedder.embed([NEW_MUG])[1])


def test_no_items_are_no_embeddings(embedder: Embedder) -> None:
    keys, vectors = embedder.embed([])
    assert keys == []
    assert vectors.shape == (0, 8)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"name": "red mug"}, ("record 1", "product")),
        ({"product": None, "name": "red mug"}, ("row 1", "key is null or empty")),
        ({"product": "b", "price": "cheap"}, ("row 1", "price of item 'b' is 'cheap'")),
    ],
)
def test_a_record_that_cannot_be_read_is_named(
    embedder: Embedder, record: dict[str, object], words: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as error:
        embedder.embed([{"product": "a", "name": "x", "price": "1"}, record])
    assert all(word in str(error.value) for word in words), error.value


def test_the_command_prints_lines_or_writes_parquet(finished: Shop, tmp_path: Path, embedder: Embedder) -> None:
    items, interactions = tmp_path / "new.jsonl", tmp_path / "touched.csv"
    items.write_text("".join(json.dumps(record) + "\n" for record in (LONELY, NEW_MUG)))
    interactions.write_text("basket,product\nbasket 0001,new mug\nbasket 0007,new mug\n,new\n")
    given = (str(items), "--interactions", str(interactions))
    outcome = finished.pinsage("embed", *given, "-k", "3")
    assert outcome.exit_code == 0, outcome.text
    lines = [json.loads(line) for line in outcome.text.splitlines()]
    assert [line["key"] for line in lines] == ["new", "new mug"]
    assert [len(line["nearest"]) for line in lines] == [3, 3]
    expected = embedder.embed([LONELY, NEW_MUG], {"new mug": ["basket 0001", "basket 0007"]})[1]
    np.testing.assert_allclose([line["embedding"] for line in lines], expected, atol=1e-6)
    outcome = finished.pinsage("embed", *given, "--output", str(tmp_path / "out.parquet"))
    assert outcome.exit_code == 0, outcome.text
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column("key").to_pylist() == ["new", "new mug"]
    np.testing.assert_allclose(arrow_to_vectors(table.column("embedding")), expected, atol=1e-6)


def test_the_command_says_what_is_missing(finished: Shop, shop: Shop, tmp_path: Path) -> None:
    items = tmp_path / "new.csv"
    items.write_text("product,title,price\nnew,red,1\n")
    outcome = finished.pinsage("embed", str(items))
    assert outcome.exit_code == 1
    assert "there is no column 'name'" in outcome.text
    outcome = shop.pinsage("embed", str(items))
    assert outcome.exit_code == 1
    assert "run `pinsage train`" in outcome.text


def test_a_model_that_the_embeddings_are_not_of_is_refused(finished: Shop, tmp_path: Path) -> None:
    shop = finished.copy(tmp_path / "shop")
    manifest = shop.run / "embeddings" / "_manifest.json"
    tree = json.loads(manifest.read_text())
    tree["lineage"]["inputs"]["model"] = "0" * 64
    manifest.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="another model"):
        newcomers(shop)


def test_without_content_there_is_nothing_to_embed(finished: Shop) -> None:
    settings = load_settings(str(finished.settings_file))
    data = settings.task.data.model_copy(update={"items": None})
    bare = settings.model_copy(update={"task": settings.task.model_copy(update={"data": data})})
    with pytest.raises(SettingsError, match=r"task\.data\.items"):
        Embedder.open(bare).embed([])


def even_shares(indptr: np.ndarray) -> np.ndarray:
    """Running shares of rows whose entries all weigh the same."""
    lengths = np.diff(indptr)
    places = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
    shares: np.ndarray = ((places + 1) * 2**32 // np.repeat(lengths, lengths) - 1).astype(np.uint32)
    return shares


def test_weighted_graphs_share_a_new_item_evenly(finished: Shop) -> None:
    """Its users count the same: on a graph of equal weights, as if it had none."""
    some, users = newcomers(finished), [np.array([1, 7, 13]), np.array([2])]
    expected = some.neighbours(users)
    graph = BipartiteGraph.open(Storage(str(finished.run)), str(finished.folder / "cache"))
    shares = {f"{side}_shares": even_shares(getattr(graph, f"{side}_indptr")) for side in ("item", "user")}
    vars(some)["_graph"] = replace(graph, **shares)
    found = some.neighbours(users)
    assert np.array_equal(found[2], expected[2])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=64)
