"""The paper's ablations: every row of its tables 1 and 4, trained and ranked on the same test events.

    python -m infra.bench.ablation --out DIR [--settings infra/settings/ml-1m.yaml] [--set task.training.epochs=4] ...

A row is a settings file of infra/settings; all rows share the data of --settings (default: the demo's shop) and take
the overrides of --set. The stages before training run once for rows that agree on them. Every test event is a question
as in the evaluation: item before, full catalogue, seen items left out. Intervals are 95 %, by bootstrap over users, and
so are those of a row's lead over PinSage. The last line printed is one JSON object; DIR/ablation.md has the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from infra.bench.measure import machine
from model.catalogue import embed_all
from model.distributed import Group
from model.loader import Loader, Position
from model.trainer import Trainer
from pipeline import ranking
from pipeline.contracts.config import Settings, load_settings
from pipeline.contracts.datasets import open_manifest, read_table
from pipeline.contracts.schemas import INTERACTIONS
from pipeline.contracts.storage import Storage
from pipeline.questions import Events, item_to_item

FOLDER = Path(__file__).resolve().parents[1] / "settings"
STAGES = ("ingest", "graph", "features", "walks", "pairs")


@dataclass(frozen=True)
class Row:
    """A row of the paper: its name there, our settings file, and what the paper reports, hit-rate and MRR."""

    name: str
    file: str
    paper: tuple[float, float]


ROWS = (
    Row("annotation (one content column)", "paper_content_text", (0.14, 0.19)),
    Row("combined (all content)", "paper_content", (0.27, 0.37)),
    Row("max-pooling", "paper_max_pooling", (0.39, 0.37)),
    Row("mean-pooling", "paper_mean_pooling", (0.41, 0.51)),
    Row("mean-pooling-xent", "paper_mean_pooling_xent", (0.29, 0.35)),
    Row("mean-pooling-hard", "paper_mean_pooling_hard", (0.46, 0.56)),
    Row("PinSage, T = 10", "paper_t10", (0.60, 0.51)),
    Row("PinSage, T = 20", "paper_t20", (0.63, 0.54)),
    Row("PinSage", "pinsage_paper", (0.67, 0.59)),
)
"""The paper's hit-rate is at 500 among 5 million items, ours at 10: only the order of the rows can be compared."""


def row_settings(row: Row, data: str, overrides: list[str], out: Path) -> Settings:
    """The row's model and training on the data of another settings file, in the folder of runs below out."""
    own, shared = load_settings(str(FOLDER / f"{row.file}.yaml")), load_settings(data)
    tree = shared.model_dump(mode="json")
    tree["task"]["model"] = own.task.model.model_dump(mode="json")
    tree["task"]["training"] = own.task.training.model_dump(mode="json")
    columns = (shared.task.data.items.columns if shared.task.data.items else ())[:1]
    text = row.file == "paper_content_text"
    if text:
        tree["task"]["data"]["items"]["columns"] = [column.model_dump(mode="json") for column in columns]
    tree["resources"]["run"] = str(out / ("text" if text else "all"))
    file = out / f"{row.file}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return load_settings(str(file), overrides)


def prepare(settings: Settings, file: Path, overrides: list[str]) -> None:
    """Run the stages before training, as a user would."""
    for stage in STAGES:
        command = [sys.executable, "-m", "jobs.cli", stage, "--settings", str(file)]
        subprocess.run([*command, *(word for each in overrides for word in ("--set", each))], check=True)


def train(settings: Settings) -> tuple[torch.Tensor, dict[str, Any]]:
    """Every item's embedding [N, d] after training, and what it took."""
    loader = Loader(Storage(settings.resources.run), settings)
    trainer, began = Trainer(settings, loader, Group()), time.perf_counter()
    position, stop = Position(1, 0), Position(settings.task.training.epochs + 1, 0)
    while position < stop:
        trainer.mine(position)
        until = trainer.mined_until(position, stop)
        for here, batch in loader.batches(position, until, torch.device("cpu")):
            trainer.step(here, batch)
            if loader.after(here).epoch > here.epoch:
                trainer.end_epoch(here.epoch)
        position = trainer.done.position
    found = {"seconds": round(time.perf_counter() - began, 1), "history": trainer.done.history}
    return embed_all(trainer.model, loader, Group()), found


def test_questions(settings: Settings, most: int) -> tuple[ranking.Questions, np.ndarray]:
    """The test events of a run as questions, at most so many, and their users."""
    storage = Storage(settings.resources.run)
    rows = read_table(storage, open_manifest(storage, INTERACTIONS))
    columns = (rows.column(name).to_numpy() for name in ("user_id", "item_id", "timestamp", "split"))
    events = Events(*(column.astype(np.int64) for column in columns))
    count = item_to_item(events)[0]["queries"]
    chosen = np.sort(np.random.default_rng(0).choice(count, min(most, count), replace=False))
    _, questions, users = item_to_item(events, chosen)
    return questions, users


def main(arguments: list[str] | None = None) -> None:
    """Train every row, print the table, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and the table")
    parser.add_argument("--settings", default=str(FOLDER / "online-retail.yaml"), help="whose data")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="dotted.key=value")
    parser.add_argument("--questions", type=int, default=20_000, help="test events ranked, at most")
    parser.add_argument("--rows", nargs="*", help="settings files of the rows to do, all if not given")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    facts = machine()
    print(json.dumps(facts, indent=1))
    values: dict[str, np.ndarray] = {}
    rows: dict[str, dict[str, Any]] = {}
    users = np.zeros(0, np.int64)
    prepared: set[str] = set()
    for row in ROWS:
        if chosen.rows and row.file not in chosen.rows:
            continue
        settings = row_settings(row, chosen.settings, chosen.overrides, chosen.out)
        torch.set_num_threads(settings.resources.training.threads)
        if settings.resources.run not in prepared:
            prepare(settings, chosen.out / f"{row.file}.yaml", chosen.overrides)
            prepared.add(settings.resources.run)
        vectors, found = train(settings)
        questions, users = test_questions(settings, chosen.questions)
        ranks = ranking.vector_ranks(questions, ranking.Catalogue(vectors.numpy()))
        metrics = ranking.query_metrics(ranks, questions.rows, questions.num_queries, (10,))
        names = ranking.metric_names((10,))
        values[row.file] = metrics[:, [names.index("hit_rate@10"), names.index("mrr")]]
        rows[row.file] = {"name": row.name, "paper": row.paper, **found}
        print(f"{row.name}: {values[row.file].mean(0).round(4).tolist()} in {found['seconds']} s", flush=True)
    stacked = np.stack(list(values.values()), axis=1)
    samples = ranking.bootstrap_means(stacked.reshape(len(stacked), -1), users, 1000, 0).reshape(1000, -1, 2)
    last = samples[:, -1]
    lines = [
        f"{len(stacked):,} test events; hit-rate@10 and MRR with 95 % intervals, and the lead of the last row.", "",
        "| row | paper, hit-rate / MRR | hit-rate@10 | MRR | last row's lead in MRR | training |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for place, found in enumerate(rows.values()):
        means, lead = stacked[:, place].mean(0), last[:, 1] - samples[:, place, 1]
        spans = [np.percentile(samples[:, place, metric], [2.5, 97.5]) for metric in (0, 1)]
        hit, mrr = (f"{mean:.4f} ({low:.4f} to {high:.4f})" for mean, (low, high) in zip(means, spans, strict=True))
        low, high = np.percentile(lead, [2.5, 97.5])
        found |= {"hit_rate": [means[0], *spans[0]], "mrr": [means[1], *spans[1]], "lead": [lead.mean(), low, high]}
        paper = f"{found['paper'][0]:.0%} / {found['paper'][1]:.2f}"
        shown = f"{lead.mean():+.4f} ({low:+.4f} to {high:+.4f})"
        lines.append(f"| {found['name']} | {paper} | {hit} | {mrr} | {shown} | {found['seconds']:.0f} s |")
    text = "\n".join(lines)
    (chosen.out / "ablation.md").write_text(text + "\n")
    print(text)
    tree = {name: {key: row[key] for key in ("hit_rate", "mrr", "lead", "seconds")} for name, row in rows.items()}
    print(json.dumps({"overrides": chosen.overrides, "questions": len(stacked), "rows": tree}, default=float))


if __name__ == "__main__":
    main()
