"""Publishing, rolling back and pinning; what is not whole, not one or not ours is refused with what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pipeline.contracts import schemas, storage
from pipeline.contracts.errors import ConflictError, DataError
from pipeline.contracts.storage import Storage
from pipeline.releases.catalogue import Catalogue
from pipeline.releases.records import LIVE, Pointer, Record, checked_id, seal
from tests.pipeline.releases.conftest import everywhere
from tests.releases import write_run


def published(site: str, *names: str) -> Catalogue:
    """A site on which runs of these names were published, one after the other."""
    catalogue = Catalogue(site)
    for night, name in enumerate(names):
        write_run(site, name, night)
        catalogue.publish(name)
    return catalogue


def test_a_rollback_is_some_twenty_requests_at_most(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the pointer, the record and the manifests that this names, and moves the pointer."""
    catalogue = published(place, *"abcdefgh")
    requests: list[str] = []
    once = storage.retry

    def counted(action: str, *rest: Any) -> Any:
        requests.append(action)
        return once(action, *rest)

    monkeypatch.setattr(storage, "retry", counted)
    catalogue.rollback("a")
    assert 3 <= len(requests) <= 20, requests


@everywhere
def test_the_pointer_goes_forth_and_back(place: str) -> None:
    catalogue = published(place, "a", "b", "c")
    live = catalogue.live()
    assert (live.release, live.previous, live.sequence) == ("c", "b", 3)
    assert catalogue.rollback().release == "b"
    assert catalogue.rollback().release == "a"
    with pytest.raises(DataError, match="no previous release to go back to"):
        catalogue.rollback()
    assert catalogue.rollback("c").release == "c"
    assert catalogue.live().stack == ("a", "c")
    with pytest.raises(DataError, match="release c is live already"):
        catalogue.rollback("c")


def test_a_rollback_does_not_lead_to_what_was_rolled_back_from(place: str) -> None:
    catalogue = published(place, "good", "bad")
    catalogue.rollback()
    write_run(place, "better", 7)
    catalogue.publish("better")
    assert catalogue.live().withdrawn == ("bad",)
    assert catalogue.rollback().release == "good"


def test_a_record_says_what_was_published(place: str) -> None:
    run = write_run(place, "a", 0)
    gate = {"verdict": "passed", "checks": []}
    run.write_bytes("gate/verdict.json", json.dumps(gate).encode())
    catalogue = Catalogue(place, clock=lambda: 1000.0)
    record = catalogue.publish(f"{place}/runs/a")
    assert catalogue.record("a") == record
    assert (record.release, record.run, record.created_at, record.num_items) == ("a", "runs/a", 1000.0, 12)
    assert (record.quality, record.gate, record.forced) == ({"recall": 1.0}, gate, False)
    assert {dataset.name for dataset in (schemas.MODEL, schemas.INDEX, schemas.ENCODERS)} <= set(record.datasets)
    assert catalogue.live().space_id == record.space_id == record.datasets["model"]


def test_equal_models_make_one_space_and_others_another(place: str) -> None:
    catalogue = Catalogue(place)
    spaces = []
    for night, model in enumerate(("old", "old", "new")):
        write_run(place, f"n{night}", night, model)
        spaces.append(catalogue.publish(f"n{night}").space_id)
    assert spaces[0] == spaces[1] != spaces[2]


def test_what_the_gate_refused_is_published_only_by_force(place: str) -> None:
    run = write_run(place, "a", 0)
    catalogue = Catalogue(place)
    run.write_bytes("gate/verdict.json", b'{"verdict": "refused", "forced": null}')
    with pytest.raises(DataError, match=r"the gate refused .*gate/verdict.json says why.*--force"):
        catalogue.publish("a")
    assert catalogue.publish("a", force=True).forced
    write_run(place, "b", 1).write_bytes("gate/verdict.json", b'{"verdict": "refused", "forced": {"why": "sale"}}')
    assert catalogue.publish("b").gate == {"verdict": "refused", "forced": {"why": "sale"}}
    run.write_bytes("gate/verdict.json", b'{"verdict": "?"}')
    with pytest.raises(DataError, match="is no verdict"):
        catalogue.publish("a")


@pytest.mark.parametrize("place", ["disk", "memory"], indirect=True)
def test_a_run_that_is_not_whole_is_refused_and_the_old_release_stays(place: str) -> None:
    catalogue = published(place, "a")
    run = write_run(place, "b", 1)
    index = f"{schemas.INDEX.name}/index.faiss"
    whole = run.read_bytes(index)
    for damage, found in (
        (whole[:-1], f"has {len(whole) - 1:,} bytes, expected {len(whole):,}"),
        (None, "is not there"),
    ):
        if damage is None:
            run.delete(index)
        else:
            run.write_bytes(index, damage)
        with pytest.raises(DataError, match=f"index.faiss {found}; run `pinsage index --force`"):
            catalogue.publish("b")
    run.write_bytes(index, whole[:-1] + b"?")
    with pytest.raises(DataError, match=r"index.faiss was changed after its manifest was written"):
        catalogue.publish("b", verify=True)
    for dataset in (schemas.MODEL, schemas.NEIGHBOURS, schemas.USERS):
        write_run(place, "b", 1).delete(f"{dataset.name}/_manifest.json")
        with pytest.raises(DataError, match=f"has no {dataset.name} yet; run `pinsage"):
            catalogue.publish("b")
    assert catalogue.live().release == "a"
    assert catalogue.names() == ["a"]


@pytest.mark.parametrize(
    ("foreign", "made", "source"),
    [("index", "index", "embeddings"), ("model", "embeddings", "model"), ("embeddings", "embeddings", "model")],
)
def test_a_run_of_two_lineages_is_refused(place: str, foreign: str, made: str, source: str) -> None:
    run, other = write_run(place, "a", 0), write_run(place, "other", 0, "other model")
    for name in other.names(foreign):
        run.write_bytes(f"{foreign}/{name}", other.read_bytes(f"{foreign}/{name}"))
    with pytest.raises(DataError, match=f"/{made} was made of another {source} than lies beside it"):
        Catalogue(place).publish("a")


def test_a_release_never_changes(place: str) -> None:
    catalogue = published(place, "a", "b")
    write_run(place, "a", 9)
    with pytest.raises(DataError, match="release a was published with other content than runs/a has now"):
        catalogue.publish("a")
    with pytest.raises(DataError, match=r"release a: .*/runs/a/\w+ was built again after publishing"):
        catalogue.rollback()
    Storage(f"{place}/runs/a").delete("")
    with pytest.raises(DataError, match=r"release a: .*/runs/a/\w+ is gone after publishing"):
        catalogue.rollback("a")
    assert catalogue.live().release == "b"


def test_publishing_again_changes_nothing(place: str) -> None:
    catalogue = published(place, "a", "b")
    stored = catalogue.storage.read_bytes(LIVE)
    assert catalogue.publish("b") == catalogue.record("b")
    assert catalogue.storage.read_bytes(LIVE) == stored


def test_who_was_slower_is_told_who_was_quicker(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = published(place, "a")
    write_run(place, "b", 1)
    write_run(place, "c", 2)
    change = Catalogue.change

    def late(self: Catalogue, *arguments: object) -> Pointer:
        monkeypatch.setattr(Catalogue, "change", change)
        Catalogue(place).publish("c")
        return change(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Catalogue, "change", late)
    with pytest.raises(
        ConflictError, match=r"cannot publish b: .*, process \d+ was quicker: release c is live by its pub"
    ):
        catalogue.publish("b")
    assert catalogue.live().release == "c"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc", "", ".hidden", "live", "a" * 101, "ü", "x\n", "a..b"])
def test_an_id_that_leads_elsewhere_is_refused(place: str, name: str) -> None:
    catalogue = published(place, "a")
    calls = (checked_id, catalogue.record, catalogue.pin, catalogue.unpin, catalogue.rollback)
    for call in calls if name else calls[:4]:
        with pytest.raises(DataError, match="cannot be a release: its id is the name of its run's folder"):
            call(name)
    with pytest.raises(DataError):
        catalogue.publish(name)


def test_a_run_of_another_place_is_refused(place: str) -> None:
    with pytest.raises(DataError, match=r"is not a run of .*; set resources.run to .*/runs/NAME"):
        Catalogue(place).publish("memory://elsewhere/runs/a")


def test_a_pointer_that_is_not_ours_is_refused_until_it_is_mended(place: str) -> None:
    catalogue = published(place, "a", "b")
    good = catalogue.storage.read_bytes(LIVE)
    tree = json.loads(good)
    spoiled = (b"", good[:50], b"[]", b'{"version": 1}', json.dumps({**tree, "stack": ["a", "../x"]}).encode())
    for bad in spoiled:
        catalogue.storage.write_bytes(LIVE, bad)
        for call in (catalogue.live, catalogue.rollback, lambda: catalogue.publish("a")):
            with pytest.raises(DataError, match=r"live.json is not what we wrote: .*`pinsage rollback RELEASE` writes"):
                call()
        listed, problems = catalogue.releases()
        assert ([one.record.release for one in listed], len(problems)) == (["a", "b"], 1)
        assert catalogue.rollback("b").release == "b"
        assert catalogue.live().stack == ("a", "b")


def test_a_pointer_that_is_gone_is_no_site_without_releases(place: str) -> None:
    """Or the next publisher would begin a stack of its own, and `gc` delete all that is below."""
    catalogue = published(place, "a", "b")
    seen = catalogue.live()
    catalogue.storage.delete(LIVE)
    write_run(place, "c", 2)
    change = lambda: catalogue.change(lambda pointer: pointer, seen)  # noqa: E731
    for call in (catalogue.live, lambda: catalogue.publish("c"), lambda: catalogue.publish("b"), change):
        with pytest.raises(DataError, match=r"live.json is gone, .* records of a.*`pinsage rollback RELEASE` writes"):
            call()
    listed, problems = catalogue.releases()
    assert ([one.record.release for one in listed], len(problems)) == (["a", "b"], 1)
    assert catalogue.names() == ["a", "b"]
    catalogue.rollback("a")
    assert (catalogue.live().stack, catalogue.live().withdrawn) == (("a",), ("b",))
    assert catalogue.publish("c").release == catalogue.live().release == "c"


def test_a_pointer_of_another_version_or_to_elsewhere_is_refused(place: str) -> None:
    catalogue = published(place, "a")
    _, pointer = catalogue.pointer()
    catalogue.storage.write_bytes(LIVE, seal(replace(pointer, stack=("../../x",))))
    with pytest.raises(DataError, match="cannot be a release"):
        catalogue.live()
    catalogue.storage.write_bytes(LIVE, seal(pointer).replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(DataError, match="it is of version 2, this code reads version 1"):
        catalogue.live()


def test_a_record_that_is_not_its_own_is_refused(place: str) -> None:
    catalogue = published(place, "a", "b")
    record = catalogue.storage.read_bytes("releases/a.json")
    for bad, found in (
        (record[:-9], "is not what we wrote"),
        (seal(Record("b", 0, "", "", {}, 0, 0)), "under another"),
    ):
        catalogue.storage.write_bytes("releases/a.json", bad)
        with pytest.raises(DataError, match=found):
            catalogue.rollback()


@everywhere
def test_pins_are_kept_until_unpinned(place: str) -> None:
    catalogue = published(place, "a", "b")
    catalogue.pin("a", "quarterly audit")
    listed, problems = catalogue.releases()
    assert [(one.record.release, one.live, one.previous, one.pinned) for one in listed] == [
        ("a", False, True, True),
        ("b", True, False, False),
    ]
    assert not problems
    assert b"quarterly audit" in catalogue.pins()["a"]
    catalogue.unpin("a")
    with pytest.raises(DataError, match="release a is not pinned"):
        catalogue.unpin("a")
    with pytest.raises(DataError, match="has no release c"):
        catalogue.pin("c")


@pytest.mark.parametrize("file", [LIVE, "releases/b.json"])
def test_what_came_cut_short_over_the_network_is_asked_for_again(
    place: str, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Once is an accident; what is always short is broken, and said to be."""
    catalogue, whole, left = published(place, "a", "b"), Storage.read_bytes, [1]

    def cut(storage: Storage, path: str) -> bytes:
        data = whole(storage, path)
        if path != file or not left[0]:
            return data
        left[0] -= 1
        return data[:-30]

    monkeypatch.setattr(Storage, "read_bytes", cut)
    assert catalogue.resolve("live", catalogue.live()).release == "b"
    left[0] = 100
    with pytest.raises(DataError, match="is not what we wrote"):
        catalogue.resolve("live", catalogue.live())
