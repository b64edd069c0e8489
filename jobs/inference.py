"""`spark-submit jobs/inference.py --settings FILE`: hands the exported network to the stage `inference`.

The only place where `model` and `pipeline` meet: pipeline/inference.py gets array functions, not torch.
"""

from __future__ import annotations

import json

from pyspark.sql import SparkSession

from model.export import Exported, load_exported
from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, Manifest, open_manifest, read_file
from pipeline.contracts.storage import Storage
from pipeline.inference import stage


def run_inference(spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Load the trained network and embed every item with it."""
    stage.run(spark, storage, settings, lineage, load_network(storage, open_manifest(storage, schemas.MODEL), settings))


def load_network(storage: Storage, model: Manifest, settings: Settings) -> Exported:
    """The trained network of a run."""
    description = json.loads(read_file(storage, model, "model.json"))
    network = load_exported(read_file(storage, model, "model.safetensors"), description)
    network.set_threads(settings.resources.threads)
    return network


if __name__ == "__main__":
    from jobs.stage import main

    main("inference")
