"""A small run folder with a planted structure, written through the contracts: what training reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, dump_settings, parse_settings
from pipeline.contracts.datasets import Lineage, commit, lists_to_arrow, vectors_to_arrow, write_shard
from pipeline.contracts.storage import Storage

LINEAGE = Lineage("test", {}, {})
INTERACTIONS = {"paths": "none", "user": "user", "item": "item", "timestamp": "time"}


@dataclass(frozen=True)
class Run:
    """A run folder, its settings, the same in a file, and what was planted: every item's group."""

    storage: Storage
    settings: Settings
    file: Path
    groups: NDArray[np.int64]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """Write a run whose datasets the caller may replace: see `plant` for what is in them."""

    def make(
        model: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        resources: dict[str, Any] | None = None,
        name: str = "run",
        **datasets: Any,
    ) -> Run:
        small = {"num_layers": 2, "hidden_dimensions": 32, "output_dimensions": 16, **(model or {})}
        curriculum = [{"from_epoch": 1, "uniform": 40}, {"from_epoch": 2, "uniform": 40, "hard": 2}]
        steps = {"epochs": 3, "batch_size": 96, "learning_rate": 0.01, "curriculum": curriculum, **(training or {})}
        settings = parse_settings(
            {
                "task": {"seed": 7, "data": {"interactions": INTERACTIONS}, "model": small, "training": steps},
                "resources": {
                    "run": str(tmp_path / name),
                    "cache": str(tmp_path / "cache"),
                    "training": {"threads": 1, "device": "cpu", **(resources or {})},
                },
            }
        )
        storage = Storage(settings.resources.run)
        planted = {**plant(), **datasets}
        groups = planted.pop("groups")
        write(storage, **planted)
        file = tmp_path / f"{name}.yaml"
        file.write_text(dump_settings(settings))
        return Run(storage, settings, file, groups)

    return make


def plant(num_items: int = 240, num_groups: int = 4, num_pairs: int = 1000) -> dict[str, Any]:
    """Items whose group shows in their neighbours' features alone, behind a louder pattern that means nothing.

    Features are a colour and a stronger noise pattern, both independent of the item's own group; its neighbours all
    have the colour of its group. Pairs are within groups, hard negatives across.
    """
    generator = np.random.default_rng(5)
    groups, colours = generator.permuted(np.tile(np.arange(num_items) % num_groups, (2, 1)), axis=1)
    noise = 3.0 * generator.normal(size=(num_items, 12)).astype(np.float32)
    features = np.concatenate([np.eye(num_groups, dtype=np.float32)[colours], noise], axis=1)
    neighbours = [generator.choice(np.flatnonzero(colours == group), 6, replace=False) for group in groups]
    query = generator.integers(0, num_items, num_pairs)
    positive = np.array([generator.choice(np.flatnonzero(groups == groups[q])) for q in query])
    hard = [generator.choice(np.flatnonzero(groups != group), 5) for group in groups]
    return {
        "groups": groups,
        "features": features,
        "neighbours": neighbours,
        "weights": [np.arange(6, 0, -1) / 21] * num_items,
        "query": query,
        "positive": positive,
        "hard": hard,
        "questions": (query[:150], positive[:150], [[int(q)] for q in query[:150]]),
    }


def write(
    storage: Storage,
    features: Any,
    neighbours: Any,
    weights: Any,
    query: Any,
    positive: Any,
    hard: Any,
    questions: Any,
    columns: Any = (),
) -> None:
    """Store what training reads, in three shards each; lists are one array per item."""
    statistics = {"mean": features.mean(0).tolist(), "std": features.std(0).tolist(), "columns": list(columns)}

    def ids(rows: Any) -> pa.Array:
        return pa.array(np.arange(len(rows)), pa.uint32())

    tables = {
        schemas.FEATURES: {"id": ids(features), "features": vectors_to_arrow(features)},
        schemas.NEIGHBOURS: {
            "id": ids(neighbours),
            "neighbours": _lists(neighbours, np.uint32),
            "weights": _lists(weights, np.float32),
        },
        schemas.HARD_NEGATIVES: {"id": ids(hard), "negatives": _lists(hard, np.uint32)},
        schemas.PAIRS: {
            "query": pa.array(query, pa.uint32()),
            "positive": pa.array(positive, pa.uint32()),
            "timestamp": pa.array(np.zeros(len(query)), pa.int64()),
        },
        schemas.QUESTIONS: {
            "query": pa.array(questions[0], pa.uint32()),
            "target": pa.array(questions[1], pa.uint32()),
            "seen": _lists(questions[2], np.uint32),
        },
    }
    for dataset, arrays in tables.items():
        table = pa.table(arrays)
        bounds = [0, table.num_rows // 3, table.num_rows // 3, table.num_rows]
        pieces = [table.slice(a, b - a) for a, b in itertools.pairwise(bounds)]
        shards = [write_shard(storage, dataset, number, piece, LINEAGE) for number, piece in enumerate(pieces)]
        commit(storage, dataset, shards, LINEAGE, statistics if dataset is schemas.FEATURES else None)


def _lists(rows: Any, dtype: Any) -> pa.ListArray:
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return lists_to_arrow(
        indptr, np.concatenate([np.zeros(0), *(np.asarray(row, dtype) for row in rows)]).astype(dtype)
    )
