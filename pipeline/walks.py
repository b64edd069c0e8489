"""Every item's nearest items by personalised PageRank, and their weights.

Reads ITEM_USERS and USER_ITEMS; writes NEIGHBOURS. Estimator `exact` reads the first item-user-item hop and adds a
second by composing rows; `walks` counts the visits of random walks, as the paper. How the graph reaches the tasks, see
`neighbourhoods`. A task makes one shard; memory: that shard's rows, and with strategy `shuffle` its part of the graph.
"""

from __future__ import annotations

import pyarrow as pa
from pyspark.sql import SparkSession

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage
from pipeline.contracts.storage import Storage
from pipeline.neighbourhoods import Neighbourhoods, blocks, choose, neighbour_rows
from pipeline.spark import say


def run(spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Find every item's neighbours, one shard per task."""
    walks = settings.task.walks
    choice = choose(storage, settings.resources)
    say(f"walks: estimator {walks.estimator}, strategy {choice.strategy}: {choice.reason}")
    near = Neighbourhoods(spark, storage, settings, lineage, schemas.WALKS.name, choice.strategy)
    top, bounds = walks.num_neighbours, near.bounds
    if walks.estimator == "walks":
        visited = near.visited()

        def make(shard: int) -> pa.Table:
            return neighbour_rows(*bounds(shard), visited(shard, top))

    elif walks.compose_rows:
        composed = near.composed(near.store_rows(top), walks.compose_rows, top)

        def make(shard: int) -> pa.Table:
            compose = composed(shard)
            return neighbour_rows(*bounds(shard), (compose(items, top, None) for items in blocks(*bounds(shard))))

    else:
        first_hop = near.first_hop()

        def make(shard: int) -> pa.Table:
            hop = first_hop(shard)
            return neighbour_rows(*bounds(shard), (hop(items, top) for items in blocks(*bounds(shard))))

    report = {"items": near.num_items, "num_neighbours": top, "strategy": choice.strategy, "reason": choice.reason}
    near.store(schemas.NEIGHBOURS, make, "walks: top neighbours", report)
    near.clean()
