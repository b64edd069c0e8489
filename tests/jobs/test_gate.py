"""The gate on real runs of a small shop: a good second night passes, each planted bad one is refused by its check."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark import SparkContext
from safetensors.numpy import load, save

from jobs.gate import read_history
from pipeline import ingest
from pipeline.contracts import datasets, schemas
from pipeline.contracts.config import Settings, load_settings
from pipeline.contracts.errors import DataError
from pipeline.contracts.storage import Storage
from pipeline.gate import data
from pipeline.gate.alignment import mean_cosine, read_alignment
from tests.jobs.conftest import Outcome, Shop
from tests.synthetic import shop_settings, write_shop

FIRST = datetime.date(2020, 9, 13)  # of write_shop's first basket
LIVE, TONIGHT = FIRST + datetime.timedelta(days=52), FIRST + datetime.timedelta(days=59)
Table: TypeAlias = pa.Table


class Night(Shop):
    """A shop whose run is named by its night, with the data that was known then: twelve baskets a day."""

    @property
    def run(self) -> Path:
        return self.folder / self.folder.name

    @property
    def storage(self) -> Storage:
        return Storage(str(self.run))

    def settings(self) -> Settings:
        return load_settings(str(self.settings_file))

    def write(self, until: datetime.date, previous: Path | None, spoil: Callable[[Table], Table]) -> None:
        """The data until that day's end, spoilt or not, and the settings."""
        write_shop(self.folder, num_users=720)
        path = self.folder / "interactions.parquet"
        table = pq.read_table(path)
        start = data.day_number(FIRST) * data.DAY
        when = start + (table["when"].to_numpy() - 1_600_000_000) * 2
        table = table.set_column(2, "when", pa.array(when))
        known = table.filter(pa.array(when < (data.day_number(until) + 1) * data.DAY))
        pq.write_table(spoil(known), path)
        tree = shop_settings(self.folder, self.run)
        tree["task"]["training"] |= {"epochs": 4, "learning_rate": 0.01}
        tree["task"]["data"]["previous"] = None if previous is None else str(previous)
        tree["task"]["gate"] = {"align": True}
        tree["resources"] |= {"rows_per_shard": 100, "events_per_shard": 3000}
        self.settings_file.write_text(json.dumps(tree), encoding="utf-8")

    def judge(self, live: Night, *arguments: str) -> tuple[Outcome, dict[str, Any]]:
        """What the command says, and its verdict."""
        outcome = self.pinsage("gate", "--against", str(live.run), *arguments)
        assert outcome.exit_code in (0, 3), outcome.text
        return outcome, json.loads((self.run / "gate" / "verdict.json").read_text())


def blocked(verdict: dict[str, Any]) -> set[str]:
    return {check["name"] for check in verdict["checks"] if check["verdict"] == "block"}


def whole(table: Table) -> Table:
    return table


def is_new(table: Table) -> np.ndarray:
    return np.asarray(table["when"].to_numpy() >= (data.day_number(LIVE) + 1) * data.DAY)


@pytest.fixture(scope="session")
def live_data(tmp_path_factory: pytest.TempPathFactory, spark: SparkContext) -> Night:
    """What the live release's run was made from."""
    night = Night(tmp_path_factory.mktemp("gate") / LIVE.isoformat())
    night.write(LIVE, None, whole)
    outcome = night.pinsage("ingest")
    assert outcome.exit_code == 0, outcome.text
    return night


@pytest.fixture(scope="session")
def live(live_data: Night) -> Night:
    """The live release's run."""
    outcome = live_data.pinsage("run")
    assert outcome.exit_code == 0, outcome.text
    return live_data


@pytest.fixture(scope="session")
def good(live: Night) -> Night:
    """A week later; to be copied, not changed."""
    night = Night(live.folder.parent / TONIGHT.isoformat())
    night.write(TONIGHT, live.run, whole)
    outcome = night.pinsage("run")
    assert outcome.exit_code == 0, outcome.text
    return night


@pytest.fixture
def copied(good: Night, tmp_path: Path) -> Night:
    """The good night's run elsewhere, to spoil."""
    shutil.copytree(good.folder, tmp_path / good.folder.name, ignore=shutil.ignore_patterns("gate"))
    night = Night(tmp_path / good.folder.name)
    tree = json.loads(night.settings_file.read_text())
    tree["resources"] |= {"run": str(night.run), "cache": str(tmp_path / "cache")}
    night.settings_file.write_text(json.dumps(tree))
    return night


def test_a_good_second_night_passes_and_can_be_read_in_the_live_space(good: Night, live: Night) -> None:
    outcome, verdict = good.judge(live)
    assert (outcome.exit_code, verdict["verdict"]) == (0, "passed"), outcome.text
    assert "passed: this run may be released" in outcome.text
    graded = {check["name"]: check["verdict"] for check in verdict["checks"]}
    assert {graded[name] for name in ("volume", "events per user", "MRR against live", "copied days", "future")} == {
        "pass"
    }
    assert verdict["quality"]["counts"]["known_to_both"] == verdict["quality"]["slices"]["all"]["questions"]
    assert (verdict["run"], verdict["live"], verdict["night"]) == (good.run.name, live.run.name, TONIGHT.isoformat())
    space, matrix = verdict["space"], read_alignment(str(good.run))
    assert matrix is not None
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-9)
    assert space["aligned_to"] == space["live"] != space["own"]
    now, then = (vectors_of(night.storage) for night in (good, live))
    assert mean_cosine(now[: len(then)] @ matrix, then) == pytest.approx(space["cosine"], abs=0.1)
    assert mean_cosine(now[: len(then)] @ matrix, then) > mean_cosine(now[: len(then)], then) + 0.01


def test_a_first_release_is_judged_by_itself(live: Night) -> None:
    outcome = live.pinsage("gate")
    assert outcome.exit_code == 0, outcome.text
    verdict = json.loads((live.run / "gate" / "verdict.json").read_text())
    assert verdict["live"] is None
    assert "comparison with live" in {check["name"] for check in verdict["checks"] if check["verdict"] == "skip"}
    assert "aligned_to" not in verdict["space"]


def vectors_of(storage: Storage) -> np.ndarray:
    table = datasets.read_table(storage, datasets.open_manifest(storage, schemas.EMBEDDINGS), ["embedding"])
    return np.asarray(datasets.arrow_to_vectors(table["embedding"]))


def test_a_model_of_random_weights_is_refused_and_only_force_lets_it_through(copied: Night, live: Night) -> None:
    storage = copied.storage
    manifest = datasets.open_manifest(storage, schemas.MODEL)
    rng = np.random.default_rng(1)
    files = {shard.name: datasets.read_file(storage, manifest, shard.name) for shard in manifest.shards}
    weights = load(files["model.safetensors"])
    for name in sorted(weights.keys() - {"mean", "std"}):
        weights[name] = rng.normal(size=weights[name].shape).astype(weights[name].dtype)
    files["model.safetensors"] = save(weights)
    datasets.begin(storage, schemas.MODEL)
    shards = [datasets.write_file(storage, "model", *file, manifest.lineage) for file in files.items()]
    datasets.commit(storage, schemas.MODEL, shards, manifest.lineage, manifest.metadata)
    outcome = copied.pinsage("run")
    assert outcome.exit_code == 0, outcome.text
    assert "train: up to date\ninference: embed every item" in outcome.text
    outcome, verdict = copied.judge(live)
    assert outcome.exit_code == 3, outcome.text
    assert "MRR against live" in blocked(verdict), outcome.text
    assert blocked(verdict) <= {
        "MRR against live", "hit-rate@10 against live", "MRR against live, cold items", "MRR over content-only kNN",
        "hit-rate@10 against live, cold items", "MRR over popularity", "neighbour churn", "embedding drift",
        "spread against live", "embedding spread",
    }  # fmt: skip
    assert copied.pinsage("gate", "--against", str(live.run), "--force").exit_code == 1
    outcome, verdict = copied.judge(live, "--force", "--reason", "the old one is [worse]")
    assert outcome.exit_code == 0
    assert verdict["verdict"] == "refused"
    assert verdict["forced"]["reason"] == "the old one is [worse]"
    assert "the old one is [worse]" in outcome.text


def test_zeroed_features_are_refused(copied: Night, live: Night) -> None:
    storage = copied.storage
    manifest = datasets.open_manifest(storage, schemas.FEATURES)
    tables = [datasets.read_shard(storage, manifest, number) for number in range(len(manifest.shards))]
    datasets.begin(storage, schemas.FEATURES)
    shards = []
    for number, table in enumerate(tables):
        zeros = np.zeros_like(datasets.arrow_to_vectors(table["features"]))
        table = table.set_column(1, "features", datasets.vectors_to_arrow(zeros))
        shards.append(datasets.write_shard(storage, schemas.FEATURES, number, table, manifest.lineage))
    datasets.commit(storage, schemas.FEATURES, shards, manifest.lineage, manifest.metadata)
    outcome, verdict = copied.judge(live)
    assert outcome.exit_code == 3
    assert blocked(verdict) == {"one run", "items without content", "constant content columns"}


def half_of_the_rows(table: Table) -> Table:
    drawn = np.random.default_rng(2).random(len(table)) < 0.5
    return table.filter(pa.array(~is_new(table) | drawn))


def half_of_the_baskets(table: Table) -> Table:
    numbers = np.array([int(key.split()[1]) for key in table["basket"].to_pylist()])
    return table.filter(pa.array(~is_new(table) | (numbers % 2 == 0)))


def in_the_future(table: Table) -> Table:
    return table.set_column(2, "when", pa.array(table["when"].to_numpy() + is_new(table) * 86_400 * 365))


def a_day_twice(table: Table) -> Table:
    days = table["when"].to_numpy() // data.DAY
    return pa.concat_tables([table, table.filter(pa.array(days == data.day_number(TONIGHT) - 2))])


def a_day_in_place_of_another(table: Table) -> Table:
    days, last = table["when"].to_numpy() // data.DAY, data.day_number(TONIGHT)
    again = table.filter(pa.array(days == last - 3))
    again = again.set_column(2, "when", pa.array(again["when"].to_numpy() + 3 * data.DAY))
    keys = pa.array([f"{key} again" for key in again["basket"].to_pylist()])
    return pa.concat_tables([table.filter(pa.array(days != last)), again.set_column(0, "basket", keys)])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (half_of_the_rows, {"events per user"}),
        (half_of_the_baskets, {"volume"}),
        (in_the_future, {"future"}),
        (a_day_twice, {"repeated events"}),
        (a_day_in_place_of_another, {"copied days"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_spoilt_data_is_refused_by_its_check(
    spark: SparkContext, live_data: Night, tmp_path: Path, spoil: Callable[[Table], Table], expected: set[str]
) -> None:
    night = Night(tmp_path / TONIGHT.isoformat())
    night.write(TONIGHT, live_data.run, spoil)
    settings = night.settings()
    lineage = datasets.trace(night.storage, schemas.INGEST, settings, ingest.inputs(settings.task.data))
    ingest.run(spark, night.storage, settings, lineage)
    now, old = (
        data.Input.of(
            *(datasets.open_manifest(run.storage, dataset) for dataset in (schemas.INTERACTIONS, schemas.ITEMS))
        )
        for run in (night, live_data)
    )
    measured = data.measure_data(now, old, TONIGHT, LIVE, settings.task.gate)
    found = {c.name for c in data.check_data(now, old, measured, [], settings.task.gate) if c.verdict == "block"}
    assert found >= expected
    assert found <= expected | {"volume"}


def test_earlier_nights_are_read_by_date_alone_or_inside_a_verdict(tmp_path: Path) -> None:
    (tmp_path / "2020-09-02.json").write_text(json.dumps({"volume": 7, "night": "2020-09-02"}))
    (tmp_path / "2020-09-01.json").write_text(json.dumps({"tonight": {"volume": 5}}))
    (tmp_path / "notes.txt").write_text("none of them")
    found = read_history(str(tmp_path))
    assert [(night["night"], night["volume"]) for night in found] == [("2020-09-01", 5), ("2020-09-02", 7)]
    assert read_history(str(tmp_path / "nothing")) == []
    (tmp_path / "2020-09-03.json").write_text("{")
    with pytest.raises(DataError, match=r"2020-09-03.json is no night's summary"):
        read_history(str(tmp_path))
