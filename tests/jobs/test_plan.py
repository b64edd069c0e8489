"""`pinsage plan`: what a person reads, which rates it goes by, and what it says of numbers that cannot be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs import calibrate, plan
from jobs.cli import app
from pipeline.contracts import schemas
from pipeline.plan import Rates, Scale
from tests.jobs.conftest import Shop

SIZES = (
    "--items",
    "1e6",
    "--users",
    "2e5",
    "--edges",
    "20_000_000",
    "--memory",
    "24GiB",
    "--disk",
    "1T",
    "--cores",
    "2",
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


PLANNED = [stage for stage in schemas.STAGES[:-1] if stage is not schemas.COMPACT_STAGE]
"""Nothing is made compact unless asked for."""


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output + result.stderr).split())


def test_it_prints_a_row_for_every_stage_and_whether_it_fits() -> None:
    code, text = call(*SIZES, "--memory", "512G")
    assert code == 0, text
    for stage in PLANNED:
        assert f"│ {stage.name}" in text
    assert "1,000,000 items, 200,000 users, 20,000,000 interactions, 16,999," in text
    assert "strategy replicate: the graph takes 0.1" in text
    assert "fits: memory and disk of every host" in text
    assert "rates shipped with this version" in text


def test_it_says_what_does_not_fit_and_what_to_do() -> None:
    code, text = call(*SIZES, "--cores", "2", "--memory", "1GiB")
    assert code == 0, text
    assert "does not fit: ingest: needs" in text
    assert "on a host that has 1.00 GiB; lower resources.rows_per_shard" in text


def test_json_has_the_same_stages_and_the_rates() -> None:
    result = CliRunner().invoke(app, ["plan", *SIZES, "--json"])
    assert result.exit_code == 0, result.output
    tree = json.loads(result.stdout)
    assert [stage["name"].split(",")[0] for stage in tree["stages"]] == [stage.name for stage in PLANNED]
    assert tree["strategy"] == "replicate"
    assert tree["rates"] == asdict(Rates())
    assert all(stage["seconds"] > 0 and stage["steps"] for stage in tree["stages"])


def test_it_plans_with_the_settings_file_that_is_given(shop: Shop) -> None:
    def steps(*arguments: str) -> list[str]:
        result = CliRunner().invoke(app, ["plan", *SIZES, "--json", "-s", str(shop.settings_file), *arguments])
        assert result.exit_code == 0, result.output
        tree = json.loads(result.stdout)
        return [step["name"] for stage in tree["stages"] if stage["name"] == "walks" for step in stage["steps"]]

    shop.configure(lambda tree: tree["task"].setdefault("walks", {}).update(estimator="exact", compose="none"))
    assert steps() == ["copy of the graph", "first hop"]
    assert steps("--set", "task.walks.compose=all")[-1] == "compose"
    assert steps("--set", "task.walks.compose=short")[-1] == "second hop of short rows"
    assert "lay items out" in steps("--set", "resources.walks.strategy=shuffle")


def test_measured_rates_are_used_and_named(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    slow = replace(Rates(), exact_item_us=5e6)
    path.write_text(json.dumps({"date": "2026-01-02", "machine": "a box", "rates": asdict(slow)}))
    code, text = call(*SIZES, "--cores", "2", "--constants", str(path))
    assert code == 0, text
    assert f"rates measured on a box, 2026-01-02: {path}" in text
    assert re.search(r"walks │ 2\d\.?\d* d ", text), "5 s an item on two cores"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--items", "1e6"), "--users, --edges: not given; for example: pinsage plan --items"),
        ((*SIZES, "--items", "many"), "--items is 'many', expected a whole number such as 1000000 or 1e6"),
        ((*SIZES, "--items", "1.5"), "--items is '1.5'"),
        ((*SIZES, "--items", "inf"), "--items is 'inf'"),
        ((*SIZES, "--items", "0"), "items is 0, expected at least 1"),
        ((*SIZES, "--users", "1e10"), "users is 10,000,000,000; ids are 32-bit"),
        ((*SIZES, "--edges", "1e15"), "do not fit 1,000,000 items x 200,000 users"),
        ((*SIZES, "--hosts", "0"), "hosts is 0, expected more than 0"),
        ((*SIZES, "--cores", "-2"), "cores is -2, expected more than 0"),
        ((*SIZES, "--network", "0"), "network is 0.0, expected more than 0"),
        ((*SIZES, "--memory", "lots"), "--memory is 'lots', expected a size such as 512G"),
        ((*SIZES, "--memory", "0"), "memory is 0, expected more than 0"),
        ((*SIZES, "--neighbours", "0"), "--neighbours is 0, expected at least 1"),
        ((*SIZES, "--set", "task.seed=1"), "--set changes a settings file: give --settings too"),
        ((*SIZES, "--constants", "/nowhere/rates.json"), "cannot read /nowhere/rates.json"),
    ],
)
def test_numbers_that_cannot_be_are_one_message(arguments: tuple[str, ...], message: str) -> None:
    code, text = call(*arguments)
    assert code == 1
    assert message in text
    assert "Traceback" not in text


def test_a_file_that_holds_no_rates_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    for content, message in (("[]", "is no file of rates"), ("{", "is no file of rates")):
        path.write_text(content)
        code, text = call(*SIZES, "--cores", "2", "--constants", str(path))
        assert code == 1
        assert message in text
    path.write_text(json.dumps({"date": "", "machine": "", "rates": {"speed": 1.0}}))
    assert "is of another version" in call(*SIZES, "--constants", str(path))[1]


@pytest.mark.slow
def test_calibrating_measures_every_rate_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On little data, which says nothing of the machine but that every measurement runs."""
    measure = calibrate.calibrate
    monkeypatch.setattr(calibrate, "calibrate", lambda say, busy_cores: measure(say, 0.01, min(busy_cores, 1)))
    path = tmp_path / "deep" / "rates.json"
    code, text = call("--calibrate", "--constants", str(path))
    assert code == 0, text
    assert "calibrate: walks measured" in text
    known, source = plan.load_rates(path, must_exist=True)
    assert str(path) in source
    for rate in fields(Rates):
        assert rate.name in text
        assert getattr(known, rate.name) >= 0
    positive = [rate.name for rate in fields(Rates) if not rate.name.endswith(("_doubling", "_task_bytes"))]
    zero = {name for name in positive if getattr(known, name) == 0}
    assert zero <= {"exact_item_us", "exact_user_ns", "compose_item_us", "compose_row_ns"}, "a fit may leave one out"


def test_planning_loads_neither_kernels_nor_spark_nor_torch() -> None:
    code = "import sys, pipeline.plan; print([m for m in ('numba', 'pyspark', 'torch', 'faiss') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_made_up_events_have_the_degrees_that_are_planned_with() -> None:
    events = calibrate._events(200_000)
    assert len(events.users) == pytest.approx(200_000, rel=0.02)
    scale = Scale(events.num_items, events.num_users, len(events.users))
    assert (scale.edges // scale.items, scale.edges // scale.users) == pytest.approx((20, 100), abs=1)
