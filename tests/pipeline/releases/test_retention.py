"""What is old by count and by days goes, whole; what is live, led back to, pinned, leased or being built stays."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contracts.errors import ConflictError, DataError
from pipeline.contracts.storage import Storage
from pipeline.nightly.lock import hold
from pipeline.releases import retention
from pipeline.releases.catalogue import Catalogue
from pipeline.releases.leases import all_leases
from pipeline.releases.reading import Releases
from pipeline.releases.records import LIVE
from pipeline.releases.retention import DAY, beyond, collect, make_plan
from tests.pipeline.releases.conftest import everywhere
from tests.pipeline.releases.test_races import Killed, crashing
from tests.releases import write_run

NIGHTS = ("n0", "n1", "n2", "n3", "n4")


def nightly(site: str, names: tuple[str, ...] = NIGHTS) -> Catalogue:
    """A release a day, the last one published now."""
    for night, name in enumerate(names):
        write_run(site, name, night)
        then = time.time() - (len(names) - 1 - night) * DAY
        Catalogue(site, clock=lambda then=then: then).publish(name)  # type: ignore[misc]
    return Catalogue(site)


def in_days(site: str, days: float) -> Catalogue:
    """The same site, seen so many days later."""
    return Catalogue(site, clock=lambda: time.time() + days * DAY)


def runs(site: str) -> list[str]:
    return Storage(site).names("runs")


@given(
    ages=st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.floats(0, 40 * DAY)),
    count=st.integers(1, 9),
    days=st.floats(0, 40),
)
def test_only_what_is_old_by_both_measures_is_old(ages: dict[str, float], count: int, days: float) -> None:
    old = beyond(ages, count, days)
    assert all(ages[name] > days * DAY for name in old)
    assert len(ages) - len(old) >= min(count, len(ages))
    for name in set(ages) - old:
        younger = sum(1 for other in ages if ages[other] < ages[name])
        assert ages[name] <= days * DAY or younger < count


@pytest.mark.parametrize(
    ("count", "days", "left"),
    [(1, 100.0, "01234"), (5, 0.0, "01234"), (3, 0.0, "234"), (1, 1.5, "34"), (1, 0.0, "34"), (2, 2.5, "234")],
)
def test_a_release_goes_when_count_and_days_say_so_and_the_way_back_stays(
    place: str, count: int, days: float, left: str
) -> None:
    nightly(place)
    catalogue = in_days(place, 0.01)
    planned, _ = make_plan(catalogue, count, days, 0)
    assert runs(place) == list(NIGHTS)
    done = collect(catalogue, count, days, 0)
    assert done == planned
    assert [name[1] for name in runs(place)] == list(left) == [name[1] for name in catalogue.names()]
    assert catalogue.live().stack == tuple(runs(place))
    assert set(done.releases) | set(done.kept) == set(NIGHTS)
    assert all(size > 1000 for size in done.releases.values())
    assert catalogue.rollback().release == "n3"


@everywhere
def test_what_is_held_stays_until_it_is_let_go(place: str, tmp_path: Path) -> None:
    nightly(place)
    catalogue = in_days(place, 100)
    catalogue.pin("n0")
    with Releases(place, str(tmp_path), clock=catalogue.clock).open("n1") as release:
        done = collect(catalogue, 1, 1.0, 300)
        assert list(done.releases) == ["n2"]
        assert done.kept["n0"] == "pinned"
        assert done.kept["n1"].startswith("leased by ")
        assert (done.kept["n3"], done.kept["n4"]) == ("a rollback leads to it", "live")
        assert release.index.neighbours("night1-0", 2)
    catalogue.unpin("n0")
    assert list(collect(catalogue, 1, 1.0, 300).releases) == ["n0", "n1"]
    assert runs(place) == ["n3", "n4"]
    assert catalogue.storage.names("releases/leases") == []


def test_the_lease_of_a_reader_that_died_ends(place: str) -> None:
    nightly(place)
    release = Releases(place, lease_seconds=600).open("n0")
    lease = release._lease
    assert lease is not None
    lease._closed.set()  # its thread is gone, its lease is not: as after kill -9
    seconds = Catalogue(place, clock=lambda: lease.held.expires_at + 299)
    assert "n0" in make_plan(seconds, 1, 0.0, 300)[0].kept
    late = Catalogue(place, clock=lambda: lease.held.expires_at + 301)
    assert "n0" in collect(late, 1, 0.0, 300).releases
    assert all_leases(late.storage) == []


def test_runs_that_never_became_a_release_go_when_nothing_was_written_to_them(place: str) -> None:
    nightly(place, ("n0",))
    for name in ("refused", "building", "manual", "base"):
        write_run(place, name, 9)
    storage = Storage(place)
    lock = {"run": f"{place}/runs/building", "night": "2011-03-05", "beat": 12.5}
    storage.write_bytes("lock.json", json.dumps(lock).encode())
    tree = {"task": {"data": {"previous": f"{place}/runs/base"}}}
    storage.write_bytes("runs/building/settings.yaml", yaml.safe_dump(tree).encode())
    assert collect(in_days(place, 13), 1, 14.0, 0, keep=("manual",)).runs == {}
    done = collect(in_days(place, 15), 1, 14.0, 0, keep=("manual",))
    assert list(done.runs) == ["refused"]
    assert done.kept == {
        "base": "previous of building", "building": "being built", "manual": "named by the settings",
        "n0": "live",
    }  # fmt: skip
    assert runs(place) == ["base", "building", "manual", "n0"]


def test_every_attempt_of_the_night_in_progress_stays_until_it_ends(place: str) -> None:
    """Its lock names the first one, whichever the night goes on with."""
    nightly(place, ("n0",))
    attempts, others = ["2011-03-20", "2011-03-20-2"], ["2011-03-2", "2011-03-21"]
    for name in (*attempts, *others):
        write_run(place, name, 9)
    catalogue = in_days(place, 99)
    with hold(catalogue.storage, "2011-03-20", "runs/2011-03-20"):
        assert list(collect(catalogue, 1, 1.0, 0).runs) == others
    assert list(collect(catalogue, 1, 1.0, 0).runs) == attempts


def test_what_has_no_runs_name_stays_and_stops_nothing(place: str) -> None:
    """Also on a site where it is said already that it goes, as `gc` once did."""
    catalogue = nightly(place)
    strangers = (".DS_Store", "live", "my experiment", "x" * 101)
    for name in strangers:
        catalogue.storage.write_bytes(f"runs/{name}" if name[0] == "." else f"runs/{name}/notes", b"mine")
    catalogue.change(lambda pointer: replace(pointer, collecting=("n0", *strangers)))
    done = collect(in_days(place, 99), 1, 0.0, 0)
    assert list(done.releases) == ["n0", "n1", "n2"]
    assert done.runs == {}
    assert {name: done.kept[name] for name in strangers} == dict.fromkeys(strangers, "no run's name")
    assert runs(place) == sorted([*strangers, "n3", "n4"])
    assert (catalogue.live().stack, catalogue.live().collecting) == (("n3", "n4"), ())


def test_what_is_not_understood_is_not_deleted(place: str) -> None:
    nightly(place)
    storage = Storage(place)
    for path, found in (
        ("lock.json", "is no lock of a night"),
        ("releases/n2.json", "is not what we wrote"),
        (LIVE, "is not what we wrote"),
    ):
        before = storage.read_bytes(path) if path != "lock.json" else None
        storage.write_bytes(path, b"[1]")
        with pytest.raises(DataError, match=found):
            collect(in_days(place, 99), 1, 0.0, 0)
        storage.delete(path)
        if before is not None:
            storage.write_bytes(path, before)
    assert runs(place) == list(NIGHTS)


def test_nothing_is_deleted_while_the_pointer_is_gone(place: str) -> None:
    catalogue = nightly(place)
    catalogue.storage.delete(LIVE)
    with pytest.raises(DataError, match=r"live.json is gone"):
        collect(in_days(place, 99), 1, 0.0, 0)
    assert runs(place) == catalogue.names() == list(NIGHTS)
    catalogue.rollback("n4")
    assert list(collect(in_days(place, 99), 1, 0.0, 0).releases) == ["n0", "n1", "n2"]


def test_a_pointer_that_goes_while_runs_are_deleted_is_not_begun_anew(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = nightly(place)
    meanwhile(monkeypatch, lambda: catalogue.storage.delete(LIVE), "_delete")
    with pytest.raises(DataError, match=r"live.json is gone"):
        collect(in_days(place, 99), 1, 0.0, 0)
    catalogue.rollback("n4")
    assert catalogue.live().stack == ("n3", "n4")


def meanwhile(patch: pytest.MonkeyPatch, event: Callable[[], object], name: str) -> None:
    """Let an event happen right before one of `collect`'s steps."""
    plain = getattr(retention, name)

    def step(*arguments: object) -> object:
        patch.setattr(retention, name, plain)
        event()
        return plain(*arguments)

    patch.setattr(retention, name, step)


def test_a_rollback_before_it_is_said_what_goes_wins(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = nightly(place)
    meanwhile(monkeypatch, lambda: catalogue.rollback("n0"), "_drop_expired")
    with pytest.raises(
        ConflictError, match=r"cannot delete old ones: .* was quicker: release n0 is live by its rollback"
    ):
        collect(in_days(place, 99), 1, 0.0, 0)
    assert runs(place) == list(NIGHTS)


def test_what_is_said_to_go_cannot_be_opened_pinned_published_or_led_back_to(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = nightly(place)

    def all_refused() -> None:
        for call in (lambda: Releases(place).open("n0"), lambda: catalogue.pin("n0"), lambda: catalogue.rollback("n0")):
            with pytest.raises(DataError, match=r"n0 .*is being deleted by `pinsage gc`"):
                call()
        with pytest.raises(DataError, match="is being deleted"):
            catalogue.publish("n0")
        assert all_leases(catalogue.storage) == []

    meanwhile(monkeypatch, all_refused, "_delete")
    assert list(collect(in_days(place, 99), 1, 0.0, 0).releases) == ["n0", "n1", "n2"]


def test_a_lease_that_came_before_it_was_said_is_heeded(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nightly(place)
    catalogue = in_days(place, 99)
    held = []
    meanwhile(
        monkeypatch, lambda: held.append(Releases(place, clock=catalogue.clock).open("n0")), "_drop_expired"
    )  # after the plan, before the pointer says so
    done = collect(catalogue, 1, 0.0, 0)
    assert list(done.releases) == ["n1", "n2"]
    assert done.kept["n0"].startswith("leased by ")
    assert catalogue.pointer()[1].collecting == ()
    held[0].close()
    with Releases(place).open("n0") as again:
        assert again.id == "n0"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_each_of_its_changes_no_half_is_opened_and_the_next_ends_it(after: bool, tmp_path: Path) -> None:
    for at in range(200):
        site = f"memory://{uuid.uuid4()}"
        nightly(site, ("n0", "n1", "n2", "n3"))
        write_run(site, "refused", 9)
        catalogue = in_days(site, 99)
        with pytest.MonkeyPatch.context() as patch:
            crashing(patch, at, after)
            try:
                collect(catalogue, 1, 0.0, 0)
                break
            except Killed:
                pass
        with Releases(site, str(tmp_path)).open() as live:
            assert live.id == "n3"
        refused: set[str] = set()
        for name in ("n0", "n1", "n2"):
            try:
                with Releases(site, str(tmp_path)).open(name) as release:
                    assert release.storage.read_bytes("users/part-00000.parquet") == b"users"
                    assert release.index.neighbours(f"night{name[1]}-0", 2)
            except DataError:
                refused.add(name)
        assert refused <= {"n0", "n1"}
        collect(catalogue, 1, 0.0, 0)
        assert (runs(site), catalogue.names()) == (["n2", "n3"], ["n2", "n3"])
        assert (catalogue.live().stack, catalogue.live().collecting) == (("n2", "n3"), ())
        Storage(site).delete("")  # what lies in memory makes listings slow
    else:
        pytest.fail("it never came to its end")
    assert at > 30


def test_what_killed_writers_left_is_swept_after_a_day(tmp_path: Path) -> None:
    site = str(tmp_path / "site")
    nightly(site)
    left = f".live.json.{uuid.uuid4().hex}.tmp"
    (tmp_path / "site" / "releases" / left).write_bytes(b"half")
    collect(in_days(site, 0.5), 9, 0.0, 0)
    assert left in Storage(site)._list("releases")
    collect(in_days(site, 1.5), 9, 0.0, 0)
    assert left not in Storage(site)._list("releases")
