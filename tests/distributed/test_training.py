"""Real processes: two ranks against one, a trainer killed and started again, ranks that fail, a launcher that dies."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from model import checkpoint
from pipeline.contracts import schemas
from pipeline.contracts.datasets import open_manifest, read_file
from tests.model.conftest import Run

MakeRun = Callable[..., Run]
ROOT = Path(__file__).resolve().parents[2]
PLAIN = [sys.executable, "-u", "jobs/train.py"]
TORCHRUN = [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone"]
TWO_RANKS = [*TORCHRUN, "--nproc-per-node=2", "jobs/train.py"]
THREE_RANKS = [*TORCHRUN, "--nproc-per-node=3", "jobs/train.py"]
LAUNCH = [
    sys.executable, "-m", "jobs.launch", "--standalone", "--nproc-per-node=2", "--max-restarts=3",
    "--module", "jobs.train",
]  # fmt: skip
FILES = ("model.safetensors", "model.json", "history.json")


def start(command: list[str], run: Run, *arguments: str, alone: bool = False) -> subprocess.Popen[str]:
    """Start a trainer whose output can be read line by line; alone: as the group of a terminal of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--settings", str(run.file), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=alone,
    )


def finish(command: list[str], run: Run, *arguments: str) -> str:
    """Train to the end and return what was printed."""
    process = start(command, run, *arguments)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    return output


def files(run: Run) -> dict[str, bytes]:
    """The model's files, checked against the manifest."""
    manifest = open_manifest(run.storage, schemas.MODEL)
    return {file: read_file(run.storage, manifest, file) for file in FILES}


def test_two_and_three_ranks_train_as_one_process_does(make_run: MakeRun) -> None:
    """Negatives from the batch of all ranks, and measurements, included."""
    training = {
        "optimizer": "sgd", "learning_rate": 0.03, "epochs": 2, "loss": "softmax",
        "curriculum": [{"from_epoch": 1, "uniform": 31, "in_batch": True}],
    }  # fmt: skip
    runs = [make_run(name=name, training=training) for name in ("alone", "two", "three")]
    finish(PLAIN, runs[0])
    for run, command in zip(runs[1:], (TWO_RANKS, THREE_RANKS), strict=True):
        output = finish(command, run)
        assert output.count("epoch 2/2") == 1, "only the first rank speaks"
        assert "up to date" in finish(command, run)
    histories = [json.loads(files(run)["history.json"]) for run in runs]
    weights = [safetensors.torch.load(files(run)["model.safetensors"]) for run in runs]
    for history, tensors in zip(histories[1:], weights[1:], strict=True):
        found, expected = ([line["loss"] for line in lines] for lines in (history, histories[0]))
        assert found == pytest.approx(expected, rel=1e-5)
        found, expected = ([line["mrr"] for line in lines] for lines in (history, histories[0]))
        assert found == pytest.approx(expected, rel=0.05)  # two items that swap ranks move that of 150 questions
        torch.testing.assert_close(tensors, weights[0], rtol=1e-3, atol=1e-5)


def test_two_ranks_mine_negatives_as_one_process_does(make_run: MakeRun) -> None:
    """A last bit can change which of two items is mined, so the curves agree less closely."""
    row = {"from_epoch": 1, "uniform": 31, "hardest": 1, "mined": 2}
    training = {"optimizer": "sgd", "epochs": 1, "curriculum": [row], "mining": {"every_steps": 4, "ranks": [5, 20]}}
    runs = [make_run(name=name, training=training) for name in ("alone", "together")]
    for run, command in zip(runs, (PLAIN, TWO_RANKS), strict=True):
        finish(command, run)
    alone, together = (json.loads(files(run)["history.json"])[0] for run in runs)
    assert together["loss"] == pytest.approx(alone["loss"], rel=0.01)


@pytest.mark.parametrize("command", [PLAIN, THREE_RANKS], ids=["one process", "three ranks"])
def test_a_trainer_killed_at_a_random_moment_ends_with_the_same_bytes(make_run: MakeRun, command: list[str]) -> None:
    changes: dict[str, Any] = {"training": {"epochs": 10}, "resources": {"checkpoint_every_steps": 2}}
    unbroken, broken = make_run(name="unbroken", **changes), make_run(name="broken", **changes)
    finish(command, unbroken)
    process = start(command, broken)
    assert process.stdout is not None
    epoch = int(np.random.default_rng().integers(1, 8))
    for line in process.stdout:
        if f"epoch {epoch}/10" in line:
            break
    ranks = children(process.pid)
    process.kill()
    process.wait()
    for rank in ranks:
        wait_for_end(rank)
    assert checkpoint.read(broken.storage) is not None, f"killed in epoch {epoch}"
    assert "going on from the checkpoint" in finish(command, broken)
    assert files(broken) == files(unbroken), f"killed in epoch {epoch}"


def test_a_killed_rank_is_started_again_with_the_others_and_the_result_is_the_same(make_run: MakeRun) -> None:
    """SIGKILL to one of two ranks: torchrun starts both again, by the same words, from the last checkpoint.

    --force, which is among them, means the first start.
    """
    changes: dict[str, Any] = {"training": {"epochs": 10}, "resources": {"checkpoint_every_steps": 2}}
    unbroken, broken = make_run(name="unbroken", **changes), make_run(name="broken", **changes)
    finish(TWO_RANKS, unbroken)
    process = start([*TORCHRUN, "--nproc-per-node=2", "--max-restarts=2", "jobs/train.py"], broken, "--force")
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 3/10" in line:
            break
    os.kill(children(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "going on from the checkpoint" in output
    assert files(broken) == files(unbroken)


@pytest.mark.parametrize("moment", ["the launcher imports", "ranks import", "ranks train"])
def test_ctrl_c_at_any_moment_leaves_no_traceback_and_no_process(make_run: MakeRun, moment: str) -> None:
    """All processes of a terminal are sent it."""
    process = start(LAUNCH, make_run(training={"epochs": 50}), alone=True)
    if moment == "the launcher imports":
        wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    elif moment == "ranks import":
        wait_until(lambda: len(children(process.pid)) == 2)
    else:
        assert process.stdout is not None
        assert any("epoch 1/50" in line for line in process.stdout)
    ranks = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode in (130, -signal.SIGINT)
    assert not {"Traceback", "signal"} & set(output.split()), output
    for rank in ranks:
        wait_for_end(rank)


def test_what_a_person_must_mend_is_not_tried_again(make_run: MakeRun) -> None:
    run = make_run(training={"optimizer": "sgd", "learning_rate": 1e30}, model={"normalise_output": False})
    process = start(LAUNCH, run)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert output.count("error: the loss is") == 1, output


def test_ranks_that_fail_end_with_one_message(make_run: MakeRun) -> None:
    run = make_run(training={"optimizer": "sgd", "learning_rate": 1e30}, model={"normalise_output": False})
    process = start(TWO_RANKS, run)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert output.count("error: the loss is") == 1, output


def test_a_rank_that_fails_alone_ends_the_others(make_run: MakeRun, tmp_path: Path) -> None:
    """The second rank stops in its second batch; the first, waiting for it in a collective call, is ended."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        "from jobs import train\n"
        "from model.loader import Loader\n"
        "from pipeline.contracts.errors import StorageError\n"
        "whole = Loader.batch\n"
        "def batch(self, epoch, step):\n"
        "    if self.rank == 1 and step == 1:\n"
        "        raise StorageError('the disk of rank 1 is gone')\n"
        "    return whole(self, epoch, step)\n"
        "Loader.batch = batch\n"
        "train.MOMENT_SECONDS = 0\n"
        "sys.exit(train.main())\n"
    )
    process = start([*TWO_RANKS[:-1], str(script)], make_run())
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "error: the disk of rank 1 is gone" in output


def test_bad_settings_are_one_message_and_exit_code_one(make_run: MakeRun) -> None:
    process = start(PLAIN, make_run(), "--set", "task.training.epoch=3")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "task.training.epoch: unknown setting; did you mean epochs?" in output
    assert "Traceback" not in output


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a process to its parent: it went unproved")
def test_a_process_tied_to_its_parent_ends_with_it() -> None:
    child = "from model.lifetime import die_with_parent; die_with_parent(); print('tied', flush=True); input()"
    parent = (
        "import subprocess, sys; "
        f"process = subprocess.Popen([sys.executable, '-c', {child!r}]); print(process.pid, flush=True); process.wait()"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "tied\n"
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_for_end(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc reads these settings")
def test_a_process_starts_again_with_the_allocator_of_trainers_and_keeps_what_was_chosen(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom model.lifetime import ALLOCATOR, choose_allocator\n"
        "print(len(ALLOCATOR.keys() & os.environ.keys()))\nchoose_allocator()\n"
        "print(os.environ['MALLOC_ARENA_MAX'], os.environ['MALLOC_TRIM_THRESHOLD_'], *sys.argv[1:])\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "MALLOC_ARENA_MAX": "3"}
    command = [sys.executable, "-u", str(script), "a b"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["1", "4", "3 8589934592 a b"]


def children(pid: int) -> list[int]:
    """The processes that pid has started, where the kernel tells."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_for_end(pid: int) -> None:
    """Return when the process has ended; fail if it is still there after a while."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, _, _ = select.select([watched], [], [], 30)
    os.close(watched)
    assert ended, f"process {pid} outlived its launcher"
