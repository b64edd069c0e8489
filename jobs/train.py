"""`torchrun --nproc-per-node 2 jobs/train.py --settings FILE`: starts the process group and runs the trainer.

`python jobs/train.py --settings FILE` trains in one process. The model depends on the number of ranks only as far as
sums of floats depend on their order; and on what neighbour_dropout and content_dropout hide, which is of a rank's part
of a batch.
"""

from __future__ import annotations

from jobs.interrupts import held_back

# isort: split
import argparse
import logging
import os
import sys
import time

from model.lifetime import choose_allocator, die_with_parent, give_up, is_given_up
from pipeline.contracts import schemas
from pipeline.contracts.config import load_settings
from pipeline.contracts.datasets import check_sources, is_up_to_date
from pipeline.contracts.errors import PipelineError
from pipeline.contracts.interrupts import interrupts_first
from pipeline.contracts.safety import Redacting
from pipeline.contracts.storage import Storage

if __name__ == "__main__":
    with held_back():
        choose_allocator()
# OpenMP reads this when torch is imported: threads that spin while they wait made steps 8 times longer on a busy host.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before torch's slow import too, so that no rank outlives a launcher that is killed meanwhile.
if "TORCHELASTIC_RUN_ID" in os.environ:
    die_with_parent()
if is_given_up():
    sys.exit(1)

from model import distributed, trainer
from model.lineage import adopt
from model.lineage import lineage as training_lineage

MOMENT_SECONDS = 5
"""What stops one rank mostly stops all, and the first says it for them: torchrun then ends the others, who wait this
long before they speak. A rank that fails alone is heard, later."""


def main() -> int:
    """Train as one rank; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train PinSage; under torchrun, as one of several ranks.")
    parser.add_argument("--settings", "-s", default="pinsage.yaml", help="settings file: a path or any fsspec URL")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="dotted.key=value", help="override a setting"
    )
    parser.add_argument("--force", action="store_true", help="train from the beginning even if nothing changed")
    arguments = parser.parse_args()
    is_first = distributed.world()[0] == 0
    logging.basicConfig(format="training: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(Redacting())
    logging.getLogger("model").setLevel(logging.INFO if is_first else logging.ERROR)
    try:
        is_first_start = (
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        )  # else there is what it has made since
        with interrupts_first():
            run(arguments.settings, arguments.overrides, arguments.force and is_first_start)
    except PipelineError as error:
        give_up()
        if not is_first:
            time.sleep(MOMENT_SECONDS)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if is_first:
            print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def run(source: str, overrides: list[str], force: bool) -> None:
    """Join the other ranks and train, unless the model is there already."""
    settings = load_settings(source, overrides)
    storage = Storage(settings.resources.run)
    is_first, world_size = distributed.world()[0] == 0, distributed.world()[1]
    lineage = training_lineage(storage, settings, world_size)
    if not force and is_up_to_date(storage, schemas.TRAIN, lineage):
        if is_first:
            print("training: up to date")
        return
    if not settings.task.training.epochs:
        if is_first:
            adopt(storage, settings, lineage)
        return
    for dataset in schemas.TRAIN.reads:
        check_sources(storage, dataset)
    with distributed.start(settings.resources.training) as group:
        if force and group.is_first:
            storage.delete(schemas.TRAINING)
        trainer.train(storage, settings, lineage, group)


if __name__ == "__main__":
    sys.exit(main())
