"""A night that goes on from an earlier one's encoders and model, as they are or trained further."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.contracts import schemas
from pipeline.contracts.datasets import open_manifest
from pipeline.contracts.storage import Storage
from tests.jobs.conftest import Shop


def _tonight(shop: Shop, change: Callable[[dict[str, Any]], object] | None = None, epochs: int = 0) -> Storage:
    """Settings of a second run on top of the shop's first; its folder."""

    def on_top(tree: dict[str, Any]) -> None:
        for part in ("data", "features", "training"):
            tree["task"].setdefault(part, {})["previous"] = "run"
        tree["task"]["training"]["epochs"] = epochs
        tree["resources"]["run"] = "tonight"
        if change is not None:
            change(tree)

    shop.configure(on_top)
    return Storage(str(shop.folder / "tonight"))


def test_without_an_epoch_the_model_is_the_earlier_one(finished: Shop, tmp_path: Path) -> None:
    """Byte for byte, and its encoders too; pairs are not made, and nothing is left to do the second time."""
    shop = finished.copy(tmp_path / "shop")
    before, tonight = Storage(str(shop.run)), _tonight(shop)
    outcome = shop.pinsage("run")
    assert outcome.exit_code == 0, outcome.text
    assert "pairs: not needed" in outcome.text
    for dataset in (schemas.MODEL, schemas.ENCODERS):
        assert open_manifest(tonight, dataset).content == open_manifest(before, dataset).content, dataset.name
    assert open_manifest(tonight, schemas.EMBEDDINGS).shards == open_manifest(before, schemas.EMBEDDINGS).shards
    assert not (shop.folder / "tonight" / "pairs").exists()
    again = shop.pinsage("run").text
    assert "train: up to date" in again
    assert "done in" not in again


def test_training_starts_from_the_earlier_model(finished: Shop, tmp_path: Path) -> None:
    """One epoch more begins where many ended, not at the loss of random weights."""
    shop = finished.copy(tmp_path / "shop")
    first, _ = _losses(Storage(str(shop.run)))
    tonight = _tonight(shop, epochs=1)
    for stage in ("ingest", "graph", "features", "walks", "pairs", "train"):
        outcome = shop.pinsage(stage)
        assert outcome.exit_code == 0, outcome.text
    assert _losses(tonight)[0] < first
    inputs = open_manifest(tonight, schemas.MODEL).lineage.inputs
    assert inputs["previous model"] == open_manifest(Storage(str(shop.run)), schemas.MODEL).content


def _losses(storage: Storage) -> tuple[float, float]:
    history = json.loads(storage.read_bytes("model/history.json"))
    return history[0]["loss"], history[-1]["loss"]


@pytest.mark.parametrize(
    ("change", "stage", "complaint"),
    [
        (
            lambda tree: tree["task"].setdefault("model", {}).update(output_dimensions=24),
            "train",
            "task.model.output_dimensions was",
        ),
        (
            lambda tree: tree["task"].update(features={"text_dimensions": 8, "text_buckets": 512}),
            "train",
            "other encoders",
        ),
        (lambda tree: tree["task"]["data"]["items"]["columns"].pop(), "features", "read the columns"),
        (lambda tree: tree["task"]["training"].pop("previous"), "ingest", "epochs is 0"),
        (lambda tree: tree["task"]["training"].update(previous="tonight"), "ingest", "are both"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_made_of_it(
    finished: Shop, tmp_path: Path, change: Callable[[dict[str, Any]], object], stage: str, complaint: str
) -> None:
    shop = finished.copy(tmp_path / "shop")
    tonight = _tonight(shop, change)
    for name in ("ingest", "graph", "features", "walks", "train"):
        outcome = shop.pinsage(name)
        if name == stage:
            break
        assert outcome.exit_code == 0, outcome.text
    assert (outcome.exit_code, complaint in outcome.text) == (1, True), outcome.text
    assert tonight.names("model") == []
