"""The DAG in a real Airflow 3, in its own environment `.airflow` (`make airflow`): loaded, and run to both ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.contracts import schemas
from tests.runs import ROOT, differences, make_shop, pinsage

AIRFLOW = Path(os.environ.get("PINSAGE_AIRFLOW", ROOT / ".airflow"))
DAGS = ROOT / "infra" / "airflow" / "dags"
NIGHT = "2020-09-24"
"""The day after the shop's last event: on an earlier one the gate refuses them as of the future."""
pytestmark = [
    pytest.mark.airflow,
    pytest.mark.skipif(
        not (AIRFLOW / ".stamp").exists(), reason="no Airflow: `make airflow` installs it; the DAG was not loaded"
    ),
]

DESCRIBE = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1])
dag = bag.dags.get("pinsage_nightly")
tasks = dag.tasks if dag else []
print("\\n" + json.dumps({
    "errors": bag.import_errors,
    "after": {t.task_id: sorted(t.upstream_task_ids) for t in tasks},
    "hours": {t.task_id: t.execution_timeout and t.execution_timeout.total_seconds() / 3600 for t in tasks},
    "retries": {t.task_id: t.retries for t in tasks},
    "active": dag and [dag.max_active_runs, dag.catchup, len(dag.deadline)],
}))
"""


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program of Airflow's environment, with a database of its own; keywords are environment variables."""
    home = tmp_path_factory.mktemp("airflow")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "PYTHON", "SPARK_"))}
    settings = {
        "AIRFLOW_HOME": str(home), "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS), "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
    }  # fmt: skip

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [str(AIRFLOW / "bin" / words[0]), *words[1:]]
        where = {**kept, **settings, **variables}
        return subprocess.run(command, env=where, cwd=home, capture_output=True, text=True, check=False)

    made = run("airflow", "db", "migrate")
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-4000:]
    return run


@pytest.fixture(scope="module")
def dag(airflow: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, Any]:
    """What Airflow made of the file."""
    done = airflow("python", "-c", DESCRIBE, str(DAGS))
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_it_loads_without_errors_and_one_night_runs_at_a_time(dag: dict[str, Any]) -> None:
    assert dag["errors"] == {}
    assert dag["active"] == [1, False, 1], "one run at a time, no catching up, one deadline"


def test_a_stage_waits_for_exactly_the_stages_whose_datasets_it_needs(dag: dict[str, Any]) -> None:
    writers = {dataset.name: stage.name for stage in schemas.STAGES for dataset in stage.writes}
    needed: dict[str, set[str]] = {}
    for stage in schemas.STAGES:
        direct = {writers[dataset.name] for dataset in stage.reads}
        needed[stage.name] = direct.union(*(needed[name] for name in direct))

    def before(name: str) -> set[str]:
        return set(dag["after"][name]).union(*(before(other) for other in dag["after"][name]))

    assert {name: before(name) - {"begin"} for name in needed} == needed
    assert all("begin" in before(name) for name in needed)
    assert set(dag["after"]["finish"]) == {"begin", *needed}, "a stage that fails ends the night, not the lock's time"


def test_every_command_is_tried_again_and_stopped_in_time(dag: dict[str, Any]) -> None:
    commands = {"begin", "finish", *(stage.name for stage in schemas.STAGES)}
    assert all(dag["retries"][name] == 3 and 0 < dag["hours"][name] <= 24 for name in commands)
    assert dag["retries"]["refused"] == 0, "the gate's verdict does not change by asking again"


def _night(
    settings: Path, airflow: Callable[..., subprocess.CompletedProcess[str]], tools: str = "", **variables: str
) -> tuple[dict[str, str], str]:
    """Run NIGHT with the settings; returns how every task ended and what was printed. tools are put before PATH."""
    where = {
        "AIRFLOW_VAR_PINSAGE_SETTINGS": str(settings), "PYSPARK_PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        "AIRFLOW_VAR_PINSAGE_PATH": f"{tools}:{Path(sys.executable).parent}", **variables,
    }  # fmt: skip
    done = airflow("airflow", "dags", "test", "pinsage_nightly", NIGHT, **where)
    listed = airflow("airflow", "tasks", "states-for-dag-run", "-o", "json", "pinsage_nightly", f"{NIGHT}T00:00:00")
    states = {row["task_id"]: row["state"] for row in json.loads(listed.stdout[listed.stdout.index("[{") :])}
    return states, done.stdout + done.stderr


def test_a_night_refused_by_the_gate_ends_red_with_the_reason(
    tmp_path: Path, airflow: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Tried is what Airflow makes of exit code 3; no stage does anything here, and no gate is asked."""
    refusing = tmp_path / "pinsage"
    refusing.write_text("#!/bin/sh\necho 'volume: 12 events, at least 900 expected'\n[ $2 = begin ] || exit 3\n")
    refusing.chmod(0o755)
    nothing = {"AIRFLOW_VAR_PINSAGE_SPARK_SUBMIT": "true", "AIRFLOW_VAR_PINSAGE_TORCHRUN": "true"}
    states, said = _night(tmp_path / "shop.yaml", airflow, str(tmp_path), **nothing)
    assert states["finish"] == "success", said[-6000:]
    assert (states["refused"], states["published"]) == ("failed", "skipped")
    assert "the release was not published: refused volume: 12 events, at least 900 expected" in said


@pytest.mark.slow
@pytest.mark.skipif(
    "PINSAGE_AIRFLOW_NIGHT" not in os.environ, reason="a night with every stage takes two minutes: `make airflow-test`"
)
def test_a_night_in_airflow_publishes_the_bytes_of_a_run_without(
    tmp_path: Path, airflow: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Nine spark-submits and a torchrun, as tasks, for a date of long ago; then the same settings by `pinsage run`."""
    settings, site = make_shop(tmp_path), tmp_path / "site"
    tree = yaml.safe_load(settings.read_text())
    tree["resources"] = {**tree["resources"], "site": str(site)}
    settings.write_text(yaml.safe_dump(tree))
    states, said = _night(settings, airflow)
    assert set(states.values()) == {"success", "skipped"}, said[-8000:]
    assert [name for name, state in states.items() if state == "skipped"] == ["refused"]
    assert json.loads((site / "releases" / "live.json").read_text())["stack"] == [NIGHT]
    again = tmp_path / "again"
    pinsage("run", "--settings", str(site / "runs" / NIGHT / "settings.yaml"), "--set", f"resources.run={again}")
    different = differences(site / "runs" / NIGHT, again)
    assert [name for name in different if not name.startswith("gate/")] == []
