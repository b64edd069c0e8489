"""One night at a time, whatever happens to the one before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.contracts.errors import ConflictError, DataError
from pipeline.contracts.storage import Storage
from pipeline.nightly import lock
from tests.runs import environment

HOLD = """
import sys, time
from pipeline.contracts.storage import Storage
from pipeline.nightly.lock import hold
with hold(Storage(sys.argv[1]), "2011-03-05", "runs/2011-03-05"):
    print("held", flush=True)
    time.sleep(60)
"""
RACE = """
import sys
from pipeline.contracts.errors import ConflictError
from pipeline.contracts.storage import Storage
from pipeline.nightly.lock import hold
sys.stdin.readline()
try:
    with hold(Storage(sys.argv[1]), "2011-03-05", "runs/2011-03-05"):
        print("held", flush=True)
        sys.stdin.readline()
except ConflictError:
    print("refused", flush=True)
"""


def test_a_second_night_is_refused_with_the_name_of_the_first(storage: Storage) -> None:
    told = f"night 2011-03-05 runs on .*process {os.getpid()}"
    with lock.hold(storage, "2011-03-05", "runs/2011-03-05"), pytest.raises(ConflictError, match=told):
        lock.take(storage, "2011-03-06", "runs/2011-03-06", time.time, 0.01, 300)
    with lock.hold(storage, "2011-03-06", "runs/2011-03-06"):
        assert json.loads(storage.read_bytes(lock.LOCK))["run"] == "runs/2011-03-06"
    assert json.loads(storage.read_bytes(lock.LOCK))["run"] == ""


def test_the_lock_of_a_killed_process_is_free_at_once(storage: Storage) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, storage.url], stdout=subprocess.PIPE, env=environment())
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ConflictError):
        lock.take(storage, "2011-03-05", "runs/2011-03-05", time.time, 0.01, 300)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock.hold(storage, "2011-03-05", "runs/2011-03-05"):
        pass


def test_a_process_of_another_container_is_not_known_to_be_gone(storage: Storage) -> None:
    """Its pid means another process here, or none, though the host's name and boot are the same."""
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespace of pids can be made here: that a night in another container is let live is unproved")
    command = [*apart, sys.executable, "-c", HOLD, storage.url]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ConflictError, match="night 2011-03-05 runs on"):
        lock.take(storage, "2011-03-05", "runs/2011-03-05", time.time, 0.01, 300)
    holder.kill()
    holder.communicate()


@pytest.mark.parametrize("skew", [-1000.0, 1000.0, 86_400.0])
def test_a_silent_lock_of_another_host_is_taken_over_whatever_its_clock(storage: Storage, skew: float) -> None:
    """Also one of the future: a clock that jumped must not lock a site for a day."""
    _elsewhere(storage, skew)
    with lock.hold(storage, "2011-03-05", "runs/2011-03-05", beat=0.01):
        pass


def test_a_lock_that_lives_is_left_whatever_its_clock(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock is an hour behind, but it changes while we look."""
    _elsewhere(storage, -3600.0)
    monkeypatch.setattr("pipeline.nightly.lock.time.sleep", lambda _: _elsewhere(storage, -3590.0))
    with pytest.raises(ConflictError, match="night 2011-03-04 runs on elsewhere"):
        lock.take(storage, "2011-03-05", "runs/2011-03-05", time.time, 0.01, 300)


def test_who_was_taken_for_dead_stops(storage: Storage) -> None:
    """The holder is interrupted at its next beat, and says why."""

    def night() -> None:
        with lock.hold(storage, "2011-03-05", "runs/2011-03-05", beat=0.02):
            _elsewhere(storage, 0.0)
            time.sleep(60)

    with pytest.raises(lock.LostLockError, match="taken over by another night"):
        night()
    assert json.loads(storage.read_bytes(lock.LOCK))["host"] == "elsewhere", "the other's lock is left alone"


def test_beats_keep_it(storage: Storage) -> None:
    with lock.hold(storage, "2011-03-05", "runs/2011-03-05", beat=0.02) as held:
        first = json.loads(storage.read_bytes(lock.LOCK))["beat_at"]
        deadline = time.monotonic() + 60
        while json.loads(storage.read_bytes(lock.LOCK))["beat_at"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        held.check()


class Distant(Storage):
    """Storage whose conditional writes, those of the beat, are on their way until they are let through."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.on_its_way, self.let_through = threading.Event(), threading.Event()

    def write_if(self, path: str, expected: bytes | None, data: bytes) -> bool:
        if threading.current_thread() is not threading.main_thread():
            self.on_its_way.set()
            assert self.let_through.wait(60)
        return super().write_if(path, expected, data)


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_night_that_ends_while_a_beat_is_on_its_way_ends_well(storage: Storage, taken_over: bool) -> None:
    """The beat is not taken for another night, nor the end by the beat; and who has ended has nothing to lose."""
    distant = Distant(storage.url)

    def let_through(held: lock.Lock) -> None:
        assert held._ended.wait(60)
        distant.let_through.set()

    with lock.hold(distant, "2011-03-05", "runs/2011-03-05", beat=0.01) as held:
        assert distant.on_its_way.wait(60)
        if taken_over:
            _elsewhere(storage, 0.0)
        helper = threading.Thread(target=let_through, args=(held,))
        helper.start()
    helper.join()
    assert held.lost == ""
    found = json.loads(storage.read_bytes(lock.LOCK))
    assert found["run"] == ("runs/2011-03-04" if taken_over else "")


def test_of_many_that_begin_at_once_one_gets_it(storage: Storage) -> None:
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, storage.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
        )
        for _ in range(4)
    ]
    for one in racing:
        assert one.stdin is not None
        one.stdin.write(b"\n")
        one.stdin.flush()
    answers = []
    for one in racing:
        assert one.stdout is not None
        answers.append(one.stdout.readline())
    for one in racing:
        one.communicate(b"\n")
    assert sorted(answers) == [b"held\n", *[b"refused\n"] * 3]


def test_what_is_no_lock_is_said(storage: Storage) -> None:
    storage.write_bytes(lock.LOCK, b"{}")
    with pytest.raises(DataError, match="no lock of a night"):
        lock.take(storage, "2011-03-05", "runs/2011-03-05", time.time, 0.01, 300)


def _elsewhere(storage: Storage, skew: float) -> None:
    """A lock of another host, whose last word was so many seconds ago, or ahead."""
    now = time.time() + skew
    holder = lock.Holder("token", "2011-03-04", "runs/2011-03-04", "elsewhere", "boot", (1, 1), now, now)
    path = Path(storage.locate(lock.LOCK))
    stored = path.read_bytes() if path.exists() else None
    assert storage.write_if(lock.LOCK, stored, lock._encode(replace(holder, token=str(skew))))
