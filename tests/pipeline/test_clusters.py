"""Items that share users share a home; every item has one, and homes are of equal size."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark import SparkContext

from pipeline.clusters import lay_out
from pipeline.contracts import schemas
from pipeline.contracts.datasets import Lineage, open_manifest, read_table
from pipeline.contracts.storage import Storage
from tests.synthetic import compressed, store_graph


@pytest.mark.parametrize("rounds", [0, 5])
def test_planted_groups_share_homes_and_nothing_is_lost(spark: SparkContext, storage: Storage, rounds: int) -> None:
    """Four groups whose items are every fourth id: by id every home has all of them, by label hardly two."""
    generator = np.random.default_rng(0)
    same = np.arange(80)[:, None] % 4 == np.arange(60)[None, :] % 4
    adjacency = (generator.random((80, 60)) < np.where(same, 0.4, 0.01)).astype(float)
    store_graph(storage, compressed(adjacency), 4)
    item_users, user_items = (open_manifest(storage, d) for d in (schemas.ITEM_USERS, schemas.USER_ITEMS))
    cache = f"{storage.url}-cache"
    homes = lay_out(spark, storage, Lineage("walks", {}, {}), item_users, user_items, rounds, "walks/homes", cache)

    found = [homes.read(storage, shard) for shard in range(4)]
    ids = np.concatenate([rows.column("id").to_numpy() for rows in found])
    assert sorted(ids.tolist()) == list(range(80))
    assert [rows.num_rows for rows in found] == [20, 20, 20, 20]
    whole = read_table(storage, item_users)
    home = read_table(storage, homes.home).column("home").to_numpy()
    groups = []
    for shard, rows in enumerate(found):
        places = rows.column("id").to_numpy()
        assert (np.diff(places.astype(int)) > 0).all()
        assert rows.equals(whole.take(places))
        assert (home[places] == shard).all()
        groups.append(len(np.unique(places % 4)))
    assert (groups == [4, 4, 4, 4]) if rounds == 0 else (groups == [1, 1, 1, 1])
