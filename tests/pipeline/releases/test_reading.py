"""A reader keeps what it opened, is told when another is live, and holds it by a lease."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.contracts.errors import DataError, StorageError
from pipeline.contracts.storage import Storage
from pipeline.releases.catalogue import Catalogue
from pipeline.releases.leases import Lease, all_leases, held
from pipeline.releases.reading import Releases
from pipeline.releases.records import Pointer, seal
from tests.pipeline.releases.conftest import everywhere
from tests.releases import write_run

LEASE = 600.0


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def published(site: str, *names: str) -> Catalogue:
    catalogue = Catalogue(site)
    for night, name in enumerate(names):
        write_run(site, name, night, model=f"model {night}")
        catalogue.publish(name)
    return catalogue


@everywhere
def test_a_reader_keeps_what_it_opened_after_publish_and_rollback(place: str, tmp_path: Path) -> None:
    catalogue = published(place, "a", "b")
    readers = Releases(place, str(tmp_path))
    with readers.open() as release:
        before = release.index.neighbours("night1-0", 3)
        assert (release.id, release.changed()) == ("b", False)
        write_run(place, "c", 2)
        catalogue.publish("c")
        assert release.changed()
        catalogue.rollback("a")
        assert release.changed()
        assert release.index.neighbours("night1-0", 3) == before
        assert release.space_id == catalogue.record("b").space_id != catalogue.live().space_id
        with readers.open("c") as other, readers.open() as live:
            assert (other.id, live.id, live.changed(), other.changed()) == ("c", "a", False, True)
        assert [lease.release for lease in all_leases(catalogue.storage)] == ["b"]
    assert all_leases(catalogue.storage) == []


def test_an_index_that_was_built_again_after_opening_is_not_taken_for_the_published_one(place: str) -> None:
    catalogue = published(place, "a")
    with Releases(place).open() as release:
        published_content = catalogue.record("a").datasets["index"]
        write_run(place, "a", 5)
        with pytest.raises(
            DataError, match=rf"a/index is not what was published: .* expected {published_content[:12]}"
        ):
            release.index  # noqa: B018 (opened at first use)


@pytest.mark.parametrize(("moves", "opened"), [(0, "b"), (1, "a"), (2, "b"), (1000, "b")])
def test_a_pointer_that_keeps_moving_keeps_no_reader_out(
    place: str, moves: int, opened: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It moves after every first look, so that no second look finds what the first found."""
    catalogue, plain, looks = published(place, "a", "b"), Catalogue.live, 0

    def moving(self: Catalogue) -> Pointer:
        nonlocal looks
        pointer, looks = plain(self), looks + 1
        if looks % 2 and looks < 2 * moves:
            catalogue.publish("a" if pointer.release == "b" else "b")
        return pointer

    monkeypatch.setattr(Catalogue, "live", moving)
    with Releases(place).open() as release:
        release.index.neighbours(f"night{'ab'.index(opened)}-0", 1)
        assert (release.id, release.space_id) == (opened, catalogue.record(opened).space_id)
        assert [lease.release for lease in all_leases(catalogue.storage)] == [opened]
    assert looks == 2 * min(moves + 1, 3)


def test_a_reader_without_the_right_to_write_holds_nothing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = published(place, "a")
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_bytes", None)
        with Releases(place).open(lease=False) as release:
            assert release.id == "a"
    assert all_leases(catalogue.storage) == []


def test_what_cannot_be_opened_says_why(place: str) -> None:
    with pytest.raises(DataError, match="has no live release yet; `pinsage publish` makes a run one"):
        Releases(place).open()
    catalogue = published(place, "a", "b")
    for name, found in (("x", "has no release x"), ("../a", "cannot be a release")):
        with pytest.raises(DataError, match=found):
            Releases(place).open(name)
    write_run(place, "a", 5)
    with pytest.raises(DataError, match=r"release a: .* was built again after publishing"):
        Releases(place).open("a")
    catalogue.storage.delete("releases/b.json")
    with pytest.raises(DataError, match="has no release b: it was never published, or `pinsage gc` deleted it"):
        Releases(place).open()
    assert all_leases(catalogue.storage) == []


def test_the_record_of_a_publisher_that_was_killed_is_no_release(place: str) -> None:
    catalogue = published(place, "a")
    write_run(place, "b", 1)
    catalogue.publish("b")
    record = catalogue.storage.read_bytes("releases/b.json")
    other = published(f"{place}-2", "a")
    write_run(f"{place}-2", "b", 1)
    other.storage.write_bytes("releases/b.json", record)
    with pytest.raises(DataError, match="was never live: its publisher did not end"):
        Releases(f"{place}-2").open("b")
    assert [one.record.release for one in other.releases()[0]] == ["a"]


def test_a_record_and_a_pointer_of_two_publications_are_no_release_until_mended(place: str) -> None:
    catalogue = published(place, "a")
    other = replace(catalogue.record("a"), created_at=7.0)
    catalogue.storage.write_bytes("releases/a.json", seal(other))
    with pytest.raises(DataError, match=r"live.json names release a with another record than lies in .*a.json"):
        Releases(place).open()
    assert catalogue.publish("a") == other
    with Releases(place).open() as release:
        assert release.record == other


def test_a_lease_counts_until_it_expires_and_the_clocks_may_differ(place: str) -> None:
    catalogue, clock = published(place, "a"), Clock()
    release = Releases(place, lease_seconds=LEASE, clock=clock).open()
    storage, end = catalogue.storage, clock.now + LEASE
    assert [lease.expires_at for lease in all_leases(storage)] == [end]
    assert [len(held(storage, now, skew=300)) for now in (end, end + 300, end + 301)] == [1, 1, 0]
    release.close()
    assert held(storage, end, skew=300) == []


def test_a_lease_that_cannot_be_read_counts_for_ever(place: str) -> None:
    catalogue = published(place, "a")
    catalogue.storage.write_bytes("releases/leases/a/somebody.json", b"{")
    (found,) = held(catalogue.storage, 1e18, 0)
    assert found.release == "a"
    assert "unreadable" in found.who


def test_a_lease_is_renewed_while_the_release_is_open(place: str) -> None:
    catalogue, clock = published(place, "a"), Clock()
    asked = threading.Event()
    lease = Lease(catalogue.storage, "a", 0.03, clock, asked.set)
    clock.now += 5000
    assert asked.wait(10)  # its thread found itself late, wrote, and asks whether the release is still there
    assert [found.expires_at for found in all_leases(catalogue.storage)] == [clock.now + 0.03]
    lease.close()
    assert all_leases(catalogue.storage) == []


def test_who_slept_past_the_lease_and_lost_the_release_is_told(place: str) -> None:
    catalogue, clock = published(place, "a", "b"), Clock()
    release = Releases(place, lease_seconds=0.03, clock=clock).open("a")
    lease = release._lease
    assert lease is not None
    clock.now += 5000
    lease.renew()
    assert release.changed()
    catalogue.storage.delete("releases/a.json")
    clock.now += 5000
    for _ in range(1000):
        if lease.lost is None:
            lease._closed.wait(0.01)
    with pytest.raises(StorageError, match=r"the lease of release a could not be renewed.* has no release a"):
        release.changed()
    release.close()
