"""The whole pipeline submitted to a real standalone cluster with packaged code, byte for byte the local run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import faiss
import pytest

from infra.launch.local_cluster import SPARK_SUBMIT, standalone_cluster
from infra.launch.package import build
from pipeline.contracts import schemas
from pipeline.contracts.storage import Storage
from tests.embeddings import clustered, write_embeddings
from tests.runs import ROOT, differences, environment, make_shop, pinsage

SUBMIT = [
    str(SPARK_SUBMIT), "--executor-memory", "512m", "--driver-memory", "1g", "--conf", "spark.driver.host=127.0.0.1",
]  # fmt: skip


@pytest.mark.cluster
def test_a_cluster_gives_the_bytes_of_a_local_run(tmp_path: Path) -> None:
    """Every stage by spark-submit to a master and two workers, training by torchrun with two ranks.

    Inference shuffles where it gathered before, and loses an executor on the way.
    """
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
            given: tuple[str, ...] = ()
            if stage is schemas.INFERENCE:  # locally it gathered
                given = ("--set", "resources.inference.reducer=shuffle")
            command = [*SUBMIT, "--master", master, "--py-files", str(package), job, *common, *given]
            begun = tmp_path / "cluster-run" / schemas.EXCHANGE / "step-edges" / "_manifest.json"
            _run(command, shipped, tmp_path, begun if given else None)
        shutil.rmtree(tmp_path / "cluster-run" / schemas.EXCHANGE)
        executors = list((tmp_path / "cluster").glob("worker-*/app-*/*/stderr"))
        used = {path.parts[-4] for path in executors}
        assert used == {"worker-0", "worker-1"}, "both workers had executors"
        shipped_copies = list((tmp_path / "cluster").glob("worker-*/app-*/*/pinsage.zip"))
        assert shipped_copies, "the code came to the executors as the package"
        _walk_by_shuffle_while_an_executor_dies(tmp_path, master, package, settings, shipped)
    assert differences(tmp_path / "run", tmp_path / "cluster-run") == []
    assert not _masters(), "nothing that was started is left"


def _walk_by_shuffle_while_an_executor_dies(
    tmp_path: Path, master: str, package: Path, settings: Path, shipped: dict[str, str]
) -> None:
    """Lists are shipped instead of a replicated graph, and one of the two executors is killed: the same neighbours."""
    run = tmp_path / "shuffle-run"
    for name in ("item_users", "user_items"):
        shutil.copytree(tmp_path / "run" / name, run / name)
    command = [
        *SUBMIT, "--master", master, "--py-files", str(package), str(ROOT / "jobs" / "walks.py"), "--settings",
        str(settings), "--set", f"resources.run={run}", "--set", "resources.walks.strategy=shuffle", "--set",
        "resources.walks.cluster_rounds=1",
    ]  # fmt: skip
    _run(command, shipped, tmp_path, run / "walks" / "homes")
    names = sorted(path.name for path in (run / "neighbours").glob("*.parquet"))
    assert names == sorted(path.name for path in (tmp_path / "run" / "neighbours").glob("*.parquet"))
    for name in names:
        assert (run / "neighbours" / name).read_bytes() == (tmp_path / "run" / "neighbours" / name).read_bytes(), name


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
