"""Every item's nearest items by personalised PageRank, and their weights.

Reads ITEM_USERS and USER_ITEMS; writes NEIGHBOURS. Estimator `exact` reads the first item-user-item hop and adds a
second where that is short; `walks` counts the visits of random walks, as the paper. Which lists are others than in an
earlier run is noted. How the graph reaches the tasks,
see `neighbourhoods`. A task makes one shard; memory: its rows, and with strategy `shuffle` its part of the graph.
"""

from __future__ import annotations

import pyarrow as pa
from pyspark import SparkContext

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage
from pipeline.contracts.storage import Storage
from pipeline.differences import Noting
from pipeline.neighbourhoods import Neighbourhoods, blocks, choose, neighbour_rows
from pipeline.spark import say


def run(spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Find every item's neighbours, one shard per task."""
    walks = settings.task.walks
    choice = choose(storage, settings.resources)
    say(f"walks: estimator {walks.estimator}, strategy {choice.strategy}: {choice.reason}")
    near = Neighbourhoods(spark, storage, settings, lineage, schemas.WALKS.name, choice.strategy)
    top, in_order = walks.num_neighbours, walks.estimator == "walks"
    if in_order:
        visited, consecutive = near.visited(), near.consecutive()

        def make(shard: int) -> pa.Table:
            return neighbour_rows(consecutive(shard), visited(shard, top))

    else:
        nearest, items_of = near.nearest(top), near.items_of()

        def make(shard: int) -> pa.Table:
            find, items = nearest(shard), items_of(shard)
            return neighbour_rows(items, (find(block) for block in blocks(items)))

    report = {"items": near.num_items, "num_neighbours": top}
    noting = Noting(storage, schemas.NEIGHBOURS, lineage, settings.task.data.previous, near.attempt)
    near.store(schemas.NEIGHBOURS, make, "walks: top neighbours", report, in_order, noting)
    near.clean()
