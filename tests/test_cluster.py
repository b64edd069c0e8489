"""The whole pipeline submitted to a real standalone cluster with packaged code, byte for byte the local run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infra.launch.local_cluster import SPARK_SUBMIT, standalone_cluster
from infra.launch.package import build
from pipeline.contracts import schemas
from tests.runs import ROOT, differences, environment, make_shop, pinsage


@pytest.mark.cluster
def test_a_cluster_gives_the_bytes_of_a_local_run(tmp_path: Path) -> None:
    """Every stage by spark-submit to a master and two workers, training by torchrun with two ranks."""
    settings = make_shop(tmp_path)
    ranks = ("--set", "resources.training.ranks=2")
    pinsage("run", "--settings", str(settings), *ranks)
    package = build(tmp_path / "pinsage.zip")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shipped = {**environment(), "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    common = ("--settings", str(settings), *ranks, "--set", f"resources.run={tmp_path / 'cluster-run'}")
    with standalone_cluster(tmp_path / "cluster") as master:
        for stage in schemas.STAGES:
            job = str(ROOT / "jobs" / f"{stage.name}.py")
            if stage is schemas.TRAIN:
                start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", job]
                where = {**shipped, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
            else:
                start = [
                    str(SPARK_SUBMIT), "--master", master, "--py-files", str(package), "--executor-memory", "512m",
                    "--driver-memory", "1g", "--conf", "spark.driver.host=127.0.0.1", job,
                ]  # fmt: skip
                where = shipped
            done = subprocess.run(
                [*start, *common], env=where, cwd=elsewhere, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{stage.name}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        executors = list((tmp_path / "cluster").glob("worker-*/app-*/*/stderr"))
        used = {path.parts[-4] for path in executors}
        assert used == {"worker-0", "worker-1"}, "both workers had executors"
        shipped_copies = list((tmp_path / "cluster").glob("worker-*/app-*/*/pinsage.zip"))
        assert shipped_copies, "the code came to the executors as the package"
    assert differences(tmp_path / "run", tmp_path / "cluster-run") == []
    assert not _masters(), "nothing that was started is left"


def _masters() -> list[str]:
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if "spark.deploy.master.Master" in line and "127.0.0.1" in line]
