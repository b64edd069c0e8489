"""Two publishers, and publishers that are killed: one wins, and a reader never sees a mixture."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.contracts.errors import DataError
from pipeline.contracts.storage import Storage
from pipeline.releases.catalogue import Catalogue
from pipeline.releases.reading import Releases
from pipeline.releases.records import LIVE
from tests.releases import race, write_run
from tests.runs import ROOT, environment


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def check_reader(site: str, nights: dict[str, int], cache: Path) -> str:
    """Open the live release as a reader does: pointer, record and index are of one night; its id."""
    with Releases(site, str(cache), lease_seconds=3600).open() as release:
        key = f"night{nights[release.id]}-3"
        release.index.neighbours(key, 1)
        assert release.record.datasets["model"] == release.space_id
        return release.id


@pytest.mark.parametrize(
    ("place", "rounds"), [("disk", 50), pytest.param("s3", 2, marks=pytest.mark.slow)], indirect=["place"]
)
def test_of_two_publishers_who_saw_the_same_one_wins_and_the_other_is_told(place: str, rounds: int) -> None:
    names = [("a0", "a1"), ("b0", "b1")]
    for night, name in enumerate(["first", *names[0], *names[1]]):
        write_run(place, name, night)
    Catalogue(place).publish("first")
    spawn = multiprocessing.get_context("spawn")
    barrier, told = spawn.Barrier(2), spawn.Queue()
    racers = [spawn.Process(target=race, args=(place, own, rounds, barrier, told)) for own in names]
    for racer in racers:
        racer.start()
    answers = [told.get(timeout=100) for _ in range(2 * rounds)]
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    for number in range(rounds):
        outcomes = {kind: text for at, kind, text in answers if at == number}
        assert set(outcomes) == {"won", "lost"}
        assert f"was quicker: release {outcomes['won']} is live" in outcomes["lost"]
    assert Catalogue(place).live().sequence == rounds + 1


@pytest.mark.parametrize(
    ("place", "rounds", "longest"),
    [("disk", 60, 0.08), pytest.param("s3", 2, 1.0, marks=pytest.mark.slow)],
    indirect=["place"],
)
def test_a_publisher_killed_at_any_moment_leaves_one_release_whole(
    place: str, rounds: int, longest: float, tmp_path: Path
) -> None:
    nights = {f"n{night}": night for night in range(4)}
    for name, night in nights.items():
        write_run(place, name, night)
    Catalogue(place).publish("n0")
    command = [sys.executable, "-m", "tests.releases", place, str(rounds), str(longest), *nights]
    killer = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    seen = [check_reader(place, nights, tmp_path)]
    while killer.poll() is None:
        seen.append(check_reader(place, nights, tmp_path))
    assert killer.returncode == 0
    moves = int(killer.communicate()[0])
    assert moves > rounds
    assert len(set(seen)) > 1
    assert Catalogue(place).publish("n1").release == "n1"
    assert check_reader(place, nights, tmp_path) == "n1"


def crashing(patch: pytest.MonkeyPatch, at: int, after: bool) -> Callable[[], int]:
    """Let the change of storage number `at` be the last, done or not; what is given counts the changes."""
    changes = 0

    def counted(name: str) -> Callable[..., Any]:
        plain = getattr(Storage, name)

        def change(self: Storage, *arguments: Any, **options: Any) -> Any:
            nonlocal changes
            own, changes = changes, changes + 1
            if own == at and not after:
                raise Killed
            result = plain(self, *arguments, **options)
            if own == at:
                raise Killed
            return result

        return change

    for name in ("write_bytes", "write_if", "delete"):
        patch.setattr(Storage, name, counted(name))
    return lambda: changes


def actions(site: str) -> dict[str, tuple[Callable[[], object], set[str]]]:
    """What is killed at each of its changes, and what may be live then."""
    return {
        "publish": (lambda: Catalogue(site).publish("c"), {"b", "c"}),
        "rollback": (lambda: Catalogue(site).rollback(), {"b", "a"}),
        "first": (lambda: Catalogue(site).publish("a"), {"", "a"}),
    }


@pytest.mark.parametrize("action", ["publish", "rollback", "first"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_each_of_its_changes_the_old_or_the_new_is_live(action: str, after: bool, tmp_path: Path) -> None:
    nights = {"a": 0, "b": 1, "c": 2}
    for at in range(50):
        site = f"memory://{uuid.uuid4()}"
        for name, night in nights.items():
            write_run(site, name, night)
        catalogue = Catalogue(site)
        for name in () if action == "first" else ("a", "b"):
            catalogue.publish(name)
        run, allowed = actions(site)[action]
        with pytest.MonkeyPatch.context() as patch:
            crashing(patch, at, after)
            try:
                run()
                break
            except Killed:
                pass
        live = check_reader(site, nights, tmp_path) if catalogue.storage.names("releases").count("live.json") else ""
        assert live in allowed
        target = {"publish": "c", "first": "a", "rollback": "a"}[action]
        if action != "rollback" or live != target:
            run()
        assert check_reader(site, nights, tmp_path) == target
        Storage(site).delete("")  # what lies in memory makes listings slow
    else:
        pytest.fail("it never came to its end")
    assert at >= {"publish": 2, "rollback": 1, "first": 2}[action]


def test_of_two_conditional_puts_one_wins(bucket: str) -> None:
    storage = Storage(f"{bucket}/{uuid.uuid4()}")
    seen = None
    with ThreadPoolExecutor(2) as pool:
        for number in range(50):
            contents = [b"%d of one" % number, b"%d of the other" % number]
            won = list(pool.map(partial(storage.write_if, "live", seen), contents))
            assert sorted(won) == [False, True]
            seen = storage.read_bytes("live")
            assert seen == contents[won.index(True)]


def test_an_answer_that_got_lost_is_known_as_done(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The put was done, its answer not received, and the retry is refused: what lies there is our own."""
    storage = Storage(f"{bucket}/{uuid.uuid4()}")
    filesystem = storage._filesystem
    put, lost = filesystem.pipe_file, [True, True]

    def loses_the_answer(*arguments: Any, **options: Any) -> None:
        put(*arguments, **options)
        if lost:
            lost.pop()
            raise TimeoutError("no answer")

    monkeypatch.setattr(filesystem, "pipe_file", loses_the_answer)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert storage.write_if("live", None, b"first")
    assert storage.write_if("live", b"first", b"second")
    assert not lost
    assert not storage.write_if("live", b"first", b"third")
    assert storage.read_bytes("live") == b"second"


def test_a_store_that_ignores_conditions_is_refused_before_the_first_release(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = f"{bucket}/{uuid.uuid4()}"
    write_run(site, "a", 0)
    catalogue = Catalogue(site)
    filesystem = catalogue.storage._filesystem
    put = filesystem.pipe_file
    plain = lambda path, data, **condition: put(path, data)  # noqa: E731
    monkeypatch.setattr(filesystem, "pipe_file", plain)
    with pytest.raises(Exception, match=r"writes although the condition of the write .*two publishers could both win"):
        catalogue.publish("a")
    assert catalogue.names() == []
    with pytest.raises(DataError, match="has no live release yet"):
        catalogue.live()
    assert LIVE.split("/")[1] not in catalogue.storage.names("releases")
