"""Which reducer, and why."""

from __future__ import annotations

from pyspark import SparkContext

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, open_manifest
from pipeline.contracts.host import physical_memory
from pipeline.contracts.storage import Storage
from pipeline.inference import ways
from pipeline.inference.network import Network
from pipeline.inference.reducers import Gather, Reducer
from pipeline.inference.shuffle import Shuffle
from pipeline.spark import say


def make_reducer(
    spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage, network: Network
) -> Reducer:
    """The reducer that the settings name, or the first that fits; says which, and why.

    What an attempt by another left is gone then.
    """
    name, resources = "gather", settings.resources.inference
    if network.num_layers:
        name, reason = choose(settings, open_manifest(storage, schemas.ITEMS).num_rows)
        say(f"inference: {name}, {reason}")
    if name == "gather":
        ways.go_on(storage, schemas.LAYERS.name, lineage, {"reducer": name, "keeps": resources.keep_layers})
        return Gather(storage, settings, lineage, network)
    layout = {"cluster_rounds": resources.cluster_rounds, "hub_share": resources.hub_share}
    ways.go_on(storage, schemas.LAYERS.name, lineage, {"reducer": name, "keeps": False, **layout})
    return Shuffle(spark, storage, settings, lineage, network)


def choose(settings: Settings, num_items: int) -> tuple[str, str]:
    """Gather if a layer of messages fits what a host may give, else shuffle; or what the settings name."""
    resources = settings.resources.inference
    if resources.reducer != "auto":
        return resources.reducer, "as resources.inference.reducer says"
    item_bytes = 2 if settings.task.inference.layer_dtype == "float16" else 4
    size = num_items * settings.task.model.hidden_dimensions * item_bytes
    memory, given = int(resources.host_memory or 0), "resources.inference.host_memory"
    if not memory:
        memory, given = physical_memory() // 2, "half of this host's memory"
    fits = size <= memory
    reason = f"as a layer takes {size / 2**30:,.2f} GiB, and {given} is {memory / 2**30:,.2f} GiB"
    return "gather" if fits else "shuffle", reason
