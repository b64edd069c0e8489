"""The whole pipeline submitted to a real standalone cluster with packaged code, byte for byte the local run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import faiss
import numpy as np
import pytest

from infra.launch.local_cluster import SPARK_SUBMIT, standalone_cluster
from infra.launch.package import build, build_environment
from pipeline.contracts import schemas
from pipeline.contracts.datasets import arrow_to_vectors, open_manifest, read_table
from pipeline.contracts.storage import Storage
from tests.embeddings import clustered, write_embeddings
from tests.runs import ROOT, differences, environment, make_shop, pinsage

SUBMIT = [
    str(SPARK_SUBMIT), "--executor-memory", "512m", "--driver-memory", "1g", "--conf", "spark.driver.host=127.0.0.1",
]  # fmt: skip


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
                subprocess.run([*start, *common], env=where, cwd=elsewhere, check=True)
                continue
            command = [*SUBMIT, "--master", master, "--py-files", str(package), job, *common]
            _run(command, shipped, tmp_path, None)
        executors = list((tmp_path / "cluster").glob("worker-*/app-*/*/stderr"))
        used = {path.parts[-4] for path in executors}
        assert used == {"worker-0", "worker-1"}, "both workers had executors"
        shipped_copies = list((tmp_path / "cluster").glob("worker-*/app-*/*/pinsage.zip"))
        assert shipped_copies, "the code came to the executors as the package"
        for stage in (schemas.WALKS, schemas.INFERENCE):
            _shuffle_while_an_executor_dies(stage, tmp_path, [*SUBMIT, "--master", master], settings, package, shipped)
    assert differences(tmp_path / "run", tmp_path / "cluster-run") == []
    assert not _masters(), "nothing that was started is left"


def _shuffle_while_an_executor_dies(
    stage: schemas.Stage, tmp_path: Path, submit: list[str], settings: Path, package: Path, shipped: dict[str, str]
) -> None:
    """The stage by shuffle instead of replicating or gathering, and one of the two executors is killed: the same.

    Of embeddings this small to a last digit: MKL rounds products of fewer than 12 columns by the row's place.
    """
    run = tmp_path / f"shuffle-{stage.name}"
    for dataset in stage.reads:
        shutil.copytree(tmp_path / "run" / dataset.name, run / dataset.name)
    command = [
        *submit, "--py-files", str(package), str(ROOT / "jobs" / f"{stage.name}.py"), "--settings", str(settings),
        "--set", f"resources.run={run}", "--set", f"resources.{stage.name}.cluster_rounds=1", "--set",
        {"walks": "resources.walks.strategy=shuffle", "inference": "resources.inference.reducer=shuffle"}[stage.name],
    ]  # fmt: skip
    begun = {"walks": run / "walks" / "homes", "inference": run / schemas.EXCHANGE / "step-edges" / "_manifest.json"}
    _run(command, shipped, tmp_path, begun[stage.name])
    made, expected = (Storage(str(folder)) for folder in (run, tmp_path / "run"))
    (dataset,) = stage.writes
    manifests = [open_manifest(storage, dataset) for storage in (made, expected)]
    if stage is schemas.WALKS:
        now_bytes, then_bytes = ([(s.name, s.sha256) for s in manifest.shards] for manifest in manifests)
        assert now_bytes == then_bytes
    else:
        now, then = read_table(made, manifests[0]), read_table(expected, manifests[1])
        vectors, others = (arrow_to_vectors(table.column("embedding")) for table in (now, then))
        np.testing.assert_allclose(vectors, others, atol=2e-6)
        assert now.column("key").equals(then.column("key"))


@pytest.mark.cluster
def test_an_index_of_two_executors_is_that_of_one_process_though_one_dies(tmp_path: Path) -> None:
    """The stage by spark-submit, an executor killed while parts are made; the same as the trained index filled here."""
    vectors = clustered(40_000, width=32)
    write_embeddings(Storage(str(tmp_path / "run")), vectors, num_shards=40)
    settings = make_shop(tmp_path)
    shipped = {**environment(), "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    package, first = build(tmp_path / "pinsage.zip"), tmp_path / "run" / "index-parts" / "part-00000.faiss"
    with standalone_cluster(tmp_path / "cluster") as master:
        command = [
            *SUBMIT, "--master", master, "--py-files", str(package), str(ROOT / "jobs" / "index.py"), "--settings",
            str(settings), "--set", f"resources.run={tmp_path / 'run'}", "--set",
            "task.index.factory=IVF256,PQ16x4fs,Refine(SQfp16)",
        ]  # fmt: skip
        _run(command, shipped, tmp_path, first)
    published = tmp_path / "run" / "index"
    alone = faiss.read_index(str(published / "trained.faiss"))
    alone.add(vectors)
    assert bytes(faiss.serialize_index(alone).data) == (published / "index.faiss").read_bytes()


PROBE = """
from pyspark import SparkContext
def look(_):
    import sys, faiss, numba, pipeline.index, sklearn
    yield f"{sys.flags.no_site} {numba.__file__} {sklearn.__file__} {pipeline.index.__file__}"
print("probe:", *SparkContext.getOrCreate().parallelize([0], 1).mapPartitions(look).collect())
from jobs.stage import main
main("ingest")
"""


@pytest.mark.cluster
def test_executors_need_no_package_of_their_host(tmp_path: Path) -> None:
    """Code and packages both come with the job: the executors' Python is the host's bare one on the shipped archive."""
    settings = make_shop(tmp_path)
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    package = build(tmp_path / "pinsage.zip")
    archive = build_environment(tmp_path / "environment.tar.gz", without=["torch"])
    kept = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    hosts_python = f"{sys.base_prefix}/bin:{kept['PATH']}"
    with standalone_cluster(tmp_path / "cluster", num_workers=1) as master:
        command = [
            *SUBMIT, "--master", master, "--py-files", str(package), "--archives", f"{archive}#env",
            "--conf", "spark.pyspark.python=./env/bin/python",
            "--conf", f"spark.pyspark.driver.python={sys.executable}",
            "--conf", f"spark.executorEnv.PATH={hosts_python}", str(probe), "--settings", str(settings),
        ]  # fmt: skip
        _run(command, {**kept, "PYTHONSAFEPATH": "1"}, tmp_path, None)
    said = next(line for line in (tmp_path / "submitted.log").read_text().splitlines() if line.startswith("probe:"))
    no_site, *files = said.removeprefix("probe: ").split()
    assert no_site == "1", "nothing that is installed on the host is seen"
    assert [re.sub(r"^(\.|.*/worker-0/app-[^/]*/\d+)/", "", file) for file in files] == [
        "env/lib/numba/__init__.py", "env/lib/sklearn/__init__.py", "pinsage.zip/pipeline/index.py",
    ]  # fmt: skip
    assert open_manifest(Storage(str(tmp_path / "run")), schemas.INTERACTIONS).num_rows == 1440


def _run(command: list[str], where: dict[str, str], folder: Path, kill_at: Path | None) -> None:
    """Submit a job; once kill_at exists, kill one of its two executors."""
    log = folder / "submitted.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=where, cwd=folder, stdout=output, stderr=output)
        killed = 0
        while process.poll() is None:
            if kill_at is not None and not killed and kill_at.exists():
                killed = _executor(folder / "cluster")
                os.kill(killed, signal.SIGKILL)
            time.sleep(0.02)
    assert process.returncode == 0, f"{command}\n{log.read_text()[-6000:]}"
    assert killed or kill_at is None, f"the job was over before an executor could be killed\n{log.read_text()[-2000:]}"


def _executor(cluster: Path) -> int:
    """The process of an executor that a worker of this cluster started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if b"CoarseGrainedExecutorBackend" in command and (folder / "cwd").readlink().is_relative_to(cluster):
                return int(folder.name)
    raise AssertionError("no executor is running")


def _masters() -> list[str]:
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if "spark.deploy.master.Master" in line and "127.0.0.1" in line]
