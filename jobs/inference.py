"""`spark-submit jobs/inference.py --settings FILE`: hands the exported network to the stage `inference`.

The only place where `model` and `pipeline` meet: pipeline/inference.py gets array functions, not torch.
"""

from __future__ import annotations

import json
import os
from functools import partial

from pyspark import SparkContext

from model.export import BLOCK, GPU_BLOCK, Exported, load_exported
from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, Manifest, open_manifest, read_file
from pipeline.contracts.storage import Storage
from pipeline.inference import stage
from pipeline.spark import assigned_gpu, say


def run_inference(spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Load the trained network and embed every item with it."""
    stage.run(spark, storage, settings, lineage, load_network(storage, open_manifest(storage, schemas.MODEL), settings))


def load_network(storage: Storage, model: Manifest, settings: Settings) -> Exported:
    """The trained network of a run."""
    description = json.loads(read_file(storage, model, "model.json"))
    network = load_exported(read_file(storage, model, "model.safetensors"), description)
    network.set_threads(settings.resources.threads)
    inference, device = settings.task.inference, settings.resources.inference.device
    if inference.precision == "bfloat16" and device == "cpu" and _emulates():
        say(
            "inference: task.inference.precision is bfloat16, which this processor has not in hardware: products take "
            "several times as long as with float32"
        )
    block = BLOCK if device == "cpu" else GPU_BLOCK
    network.set_place(inference.precision, partial(_device_of_task, device), block, _tasks_of_a_gpu(settings))
    return network


def _tasks_of_a_gpu(settings: Settings) -> int:
    """How many tasks Spark may give to one GPU at once: as it is told, else as many as this machine has cores."""
    amount = float(settings.resources.spark.conf.get("spark.task.resource.gpu.amount", 0))
    return max(1, round(1 / amount)) if amount else os.cpu_count() or 1


def _emulates() -> bool:
    from model.trainer import emulates_bfloat16  # imported here, as torch takes seconds

    return emulates_bfloat16()


def _device_of_task(device: str) -> str:
    """The device of the task that calls: of GPUs the one that Spark assigned to it, else the first."""
    return "cpu" if device == "cpu" else f"cuda:{assigned_gpu() or 0}"


if __name__ == "__main__":
    from jobs.stage import main

    main("inference")
