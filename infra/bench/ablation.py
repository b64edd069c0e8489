"""What each choice is worth: every row trained on the same data and ranked on the same held-out events.

    python -m infra.bench.ablation paper --out DIR [--settings FILE] [--set task.training.epochs=3] ...
    python -m infra.bench.ablation since --out DIR

`paper`: the rows of the paper's tables 1 and 4, each a settings file of infra/settings, on test events. `since`: what
has been learned since, one change at a time to the settings of --settings, on validation events, as settings are chosen
on those. All rows share the data of --settings (default: the demo's shop) and take the overrides of --set. The stages
before training run once for rows that agree on them. A question is an event, as in the evaluation: item before, full
catalogue, seen items left out; new items are those without a training event. Intervals are 95 %, by bootstrap over
users, and so are the leads. The last line printed is one JSON object; DIR/TABLE.md has the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as jobs/train.py sets it

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from infra.bench.measure import machine
from model.catalogue import embed_all
from model.distributed import Group
from model.lifetime import choose_allocator
from model.loader import Loader
from model.trainer import Trainer
from pipeline.contracts.config import Settings, dump_settings, load_settings
from pipeline.contracts.datasets import open_manifest, read_table
from pipeline.contracts.schemas import INTERACTIONS, ITEMS, TEST_SPLIT, VALIDATION_SPLIT
from pipeline.contracts.storage import Storage
from pipeline.questions import Events, item_to_item
from pipeline.ranking import Catalogue, Questions, bootstrap_means, metric_names, query_metrics, vector_ranks

FOLDER = Path(__file__).resolve().parents[1] / "settings"
RESAMPLES = 1000
STAGES = ("ingest", "graph", "features", "walks", "pairs")


@dataclass(frozen=True)
class Row:
    """A row: a settings file whose model and training it takes, or changes to those of --settings.

    paper is what the paper reports, hit-rate and MRR.
    """

    name: str
    file: str | None = None
    changes: tuple[str, ...] = ()
    paper: tuple[float, float] | None = None


PAPER = (
    Row("annotation (one content column)", "paper_content_text", paper=(0.14, 0.19)),
    Row("combined (all content)", "paper_content", paper=(0.27, 0.37)),
    Row("max-pooling", "paper_max_pooling", paper=(0.39, 0.37)),
    Row("mean-pooling", "paper_mean_pooling", paper=(0.41, 0.51)),
    Row("mean-pooling-xent", "paper_mean_pooling_xent", paper=(0.29, 0.35)),
    Row("mean-pooling-hard", "paper_mean_pooling_hard", paper=(0.46, 0.56)),
    Row("PinSage, T = 10", "paper_t10", paper=(0.60, 0.51)),
    Row("PinSage, T = 20", "paper_t20", paper=(0.63, 0.54)),
    Row("PinSage", "pinsage_paper", paper=(0.67, 0.59)),
)
"""The paper's hit-rate is at 500 among 5 million items, ours at 10: only the order of the rows can be compared."""


def _negatives(row: str) -> str:
    return f"task.training.curriculum=[{{from_epoch: 1, {row}}}]"


SINCE = (
    Row("max-margin, as the paper", changes=("task.training.loss=max_margin",)),
    Row("BPR", changes=("task.training.loss=bpr",)),
    Row("in-batch negatives, uncorrected", changes=(
        _negatives("uniform: 0, in_batch: true"), "task.training.correct_sampling=false",
    )),
    Row("in-batch negatives, logQ", changes=(_negatives("uniform: 0, in_batch: true"),)),
    Row("mixed: 500 uniform and in-batch, logQ", changes=(_negatives("uniform: 500, in_batch: true"),)),
    Row("500 uniform, 500 popular", changes=(_negatives("uniform: 500, popular: 500"),)),
    Row("6 hard by PPR rank", changes=(_negatives("uniform: 1000, hard: 6"),)),
    Row("10 hardest of the shared", changes=(_negatives("uniform: 1000, hardest: 10"),)),
    Row("mined from epoch 2", changes=(
        "task.training.curriculum=[{from_epoch: 1, uniform: 1000}, {from_epoch: 2, uniform: 1000, mined: 6}]",
    )),
    Row("attention", changes=("task.model.pooling=attention",)),
    Row("residual", changes=("task.model.residual=true",)),
    Row("head over all layers", changes=("task.model.head_input=all",)),
    Row("fan-outs 10, 50", changes=("task.model.fan_outs=[10, 50]",)),
    Row("neighbour dropout 0.1", changes=("task.training.neighbour_dropout=0.1",)),
    Row("neighbour dropout 0.3", changes=("task.training.neighbour_dropout=0.3",)),
    Row("content dropout 0.1", changes=("task.training.content_dropout=0.1",)),
    Row("4 pairs in a row", changes=("task.training.consecutive_pairs=4",)),
    Row("16 pairs in a row", changes=("task.training.consecutive_pairs=16",)),
    Row("16 pairs in a row, 1 000 uniform", changes=(
        "task.training.consecutive_pairs=16", _negatives("uniform: 1000"),
    )),
    Row("1 000 uniform", changes=(_negatives("uniform: 1000"),)),
    Row("bfloat16", changes=("task.training.precision=bfloat16",)),
    Row("the settings as they are"),
)  # fmt: skip
TABLES = {"paper": (PAPER, TEST_SPLIT), "since": (SINCE, VALIDATION_SPLIT)}


def row_settings(row: Row, data: str, overrides: list[str], out: Path) -> tuple[Settings, Path]:
    """The row's settings in the folder of runs below out, and their file."""
    shared = load_settings(data)
    tree = shared.model_dump(mode="json")
    run = "all"
    if row.file is not None:
        own = load_settings(str(FOLDER / f"{row.file}.yaml")).task
        tree["task"] |= {"model": own.model.model_dump(mode="json"), "training": own.training.model_dump(mode="json")}
    if row.file == "paper_content_text":
        tree["task"]["data"]["items"]["columns"], run = tree["task"]["data"]["items"]["columns"][:1], "one-column"
    tree["resources"]["run"] = str(out.resolve() / run)
    file = out / f"{''.join(letter if letter.isalnum() else '-' for letter in row.name)}.yaml"
    file.write_text(yaml.safe_dump(tree))
    file.write_text(dump_settings(load_settings(str(file), [*row.changes, *overrides])))
    return load_settings(str(file)), file


def prepare(file: Path) -> None:
    """Run the stages before training, as a user would."""
    for stage in STAGES:
        subprocess.run([sys.executable, "-m", "jobs.cli", stage, "--settings", str(file)], check=True)


def train(settings: Settings) -> tuple[torch.Tensor, dict[str, Any]]:
    """Every item's embedding [N, d] after training, and what it took."""
    loader = Loader(Storage(settings.resources.run), settings)
    trainer, began = Trainer(settings, loader, Group()), time.perf_counter()
    for position, batch in trainer.batches():
        trainer.step(position, batch)
        if loader.ends_epoch(position):
            trainer.end_epoch(position.epoch)
    found = {"seconds": round(time.perf_counter() - began, 1), "history": trainer.done.history}
    return embed_all(trainer.model, loader, Group()), found


def questions_of(settings: Settings, split: int, most: int) -> tuple[Questions, NDArray[np.int64], NDArray[np.bool_]]:
    """The events of a split as questions, at most so many, their users, and which have a new item as target."""
    storage = Storage(settings.resources.run)
    rows = read_table(storage, open_manifest(storage, INTERACTIONS))
    columns = (rows.column(name).to_numpy() for name in ("user_id", "item_id", "timestamp", "split"))
    events = Events(*(column.astype(np.int64) for column in columns))
    count = item_to_item(events, split=split)[0]["queries"]
    chosen = np.sort(np.random.default_rng(0).choice(count, min(most, count), replace=False))
    _, questions, users = item_to_item(events, chosen, split)
    degrees = read_table(storage, open_manifest(storage, ITEMS)).column("degree").to_numpy()
    return questions, users, degrees[questions.targets] == 0


def main(arguments: list[str] | None = None) -> None:
    """Train every row, print the table, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and the table")
    parser.add_argument("--settings", default=str(FOLDER / "online-retail.yaml"), help="whose data")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="dotted.key=value")
    parser.add_argument("--questions", type=int, default=20_000, help="held-out events ranked, at most")
    parser.add_argument("--rows", nargs="*", help="names of the rows to do, all if not given")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    rows, split = TABLES[chosen.table]
    rows = tuple(row for row in rows if not chosen.rows or row.name in chosen.rows)
    print(json.dumps(machine(), indent=1))
    values: list[NDArray[np.float64]] = []
    found: list[dict[str, Any]] = []
    prepared: set[str] = set()
    for row in rows:
        settings, file = row_settings(row, chosen.settings, chosen.overrides, chosen.out)
        torch.set_num_threads(settings.resources.training.threads)
        if settings.resources.run not in prepared:
            prepare(file)
            prepared.add(settings.resources.run)
        vectors, took = train(settings)
        questions, users, new = questions_of(settings, split, chosen.questions)
        ranks = vector_ranks(questions, Catalogue(vectors.numpy()))
        metrics, names = query_metrics(ranks, questions.rows, questions.num_queries, (10,)), metric_names((10,))
        values.append(metrics[:, [names.index("hit_rate@10"), names.index("mrr")]])
        found.append(
            {"name": row.name, "paper": row.paper, "new": values[-1][new].mean(0).tolist() if new.any() else [], **took}
        )
        print(f"{row.name}: {values[-1].mean(0).round(4).tolist()} in {took['seconds']} s", flush=True)
    text = table(np.stack(values, axis=1), users, int(new.sum()), found)
    (chosen.out / f"{chosen.table}.md").write_text(text + "\n")
    print(text)
    print(json.dumps({"table": chosen.table, "overrides": chosen.overrides, "rows": found}, default=float))


def table(values: NDArray[np.float64], users: NDArray[np.int64], num_new: int, rows: list[dict[str, Any]]) -> str:
    """Means with intervals, and each row's lead over the last; adds them to rows. values is [questions, rows, 2]."""
    samples = bootstrap_means(values.reshape(len(values), -1), users, RESAMPLES, 0).reshape(RESAMPLES, -1, 2)
    lines = [
        f"{len(values):,} events, {num_new:,} of them of new items; 95 % intervals.",
        "",
        "| row | paper, hit-rate / MRR | hit-rate@10 | MRR | lead in MRR over the last row | new items | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for place, row in enumerate(rows):
        lead = samples[:, place, 1] - samples[:, -1, 1]
        for metric, name in enumerate(("hit_rate", "mrr")):
            low, high = np.percentile(samples[:, place, metric], [2.5, 97.5])
            row[name] = [float(values[:, place, metric].mean()), float(low), float(high)]
        row["lead"] = [float(value) for value in (lead.mean(), *np.percentile(lead, [2.5, 97.5]))]
        paper = "" if row["paper"] is None else f"{row['paper'][0]:.0%} / {row['paper'][1]:.2f}"
        hit, mrr = ("{:.4f} ({:.4f} to {:.4f})".format(*row[name]) for name in ("hit_rate", "mrr"))
        shown = "{:+.4f} ({:+.4f} to {:+.4f})".format(*row["lead"])
        new = "{:.3f} / {:.3f}".format(*row["new"]) if num_new else ""
        lines.append(f"| {row['name']} | {paper} | {hit} | {mrr} | {shown} | {new} | {row['seconds']:.0f} s |")
    return "\n".join(lines)


if __name__ == "__main__":
    choose_allocator()
    main()
