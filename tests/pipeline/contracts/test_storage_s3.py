"""Storage on a real S3 endpoint, through a proxy that fails: what is written is whole, and read as it was written."""

from __future__ import annotations

import gzip
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from infra.bench.faults import ENVIRONMENT, FAULTS, FaultyProxy, moto_server
from pipeline.contracts.datasets import (
    Lineage,
    begin,
    commit,
    find_manifest,
    finished_shard,
    open_manifest,
    read_table,
    write_shard,
)
from pipeline.contracts.errors import DataError, StorageError
from pipeline.contracts.storage import Storage, describe_inputs, filesystem_of, open_input

MANY = 12
CLIENT = {"read_timeout": 1, "retries": {"total_max_attempts": 1}}
"""Only our own retries, whose pauses can be made short."""
BODY = bytes(range(256)) * 40
LINEAGE = Lineage("test", {}, {})


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    """The endpoint without faults; a process of its own."""
    with moto_server() as url:
        yield url


@pytest.fixture
def faulty(upstream: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[FaultyProxy, Storage]]]:
    """Makes a proxy with the faults asked for, and an empty folder behind it."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fsspec.config, "conf", {"s3": {"config_kwargs": CLIENT}})
    monkeypatch.setattr("pipeline.contracts.storage._FIRST_PAUSE", 0.01)
    monkeypatch.setattr("pipeline.contracts.storage._LONGEST_PAUSE", 0.1)
    started: list[FaultyProxy] = []

    def make(seed: int = 0, in_a_row: int = 1, **rates: float) -> tuple[FaultyProxy, Storage]:
        proxy = FaultyProxy(upstream, seed, {name.lstrip("_"): rate for name, rate in rates.items()}, in_a_row)
        started.append(proxy.__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        filesystem, _ = filesystem_of("s3://bucket")
        rates_then, proxy.rates = proxy.rates, {}
        if not filesystem.exists("bucket"):
            filesystem.mkdir("bucket")
        proxy.rates = rates_then
        return proxy, Storage(f"s3://bucket/{uuid.uuid4().hex}")

    yield make
    for proxy in started:
        proxy.__exit__()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


Faulty = Callable[..., tuple[FaultyProxy, Storage]]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_survives_every_fault(faulty: Faulty, tmp_path: Path, fault: str) -> None:
    """One request in four fails, hangs for a second or lies; nothing is lost and nothing is half."""
    share = 0.06 if fault == "hang" else 0.25
    proxy, storage = faulty(seed=3, **{f"_{fault}": share})
    (tmp_path / "large").write_bytes(BODY * 3)

    def whole(data: bytes) -> bytes:
        if data != BODY:
            raise ValueError("cut")
        return data

    for number in range(MANY):
        storage.write_bytes(f"folder/{number:02d}", BODY)
        assert storage.read_with(f"folder/{number:02d}", whole) == BODY
        assert storage.read_range(f"folder/{number:02d}", 100, 400) == BODY[100:400]
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(f"folder/none-{number}")
    storage.put_file(tmp_path / "large", "large")
    with storage.stream("streamed") as file:
        file.write(BODY * 2)
    for name, size in (("large", 3), ("streamed", 2)):
        with open_input(f"{storage.url}/{name}") as file:
            assert file.read() == BODY * size
        assert describe_inputs(f"{storage.url}/{name}")[0]["bytes"] == size * len(BODY)
    if fault != "stale":
        assert storage.names("folder") == [f"{number:02d}" for number in range(MANY)]
    storage.check_writable()
    storage.remove("large")
    storage.delete("folder")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("large")
    if fault != "stale":
        assert storage.names("folder") == []
        assert proxy.caused[fault] >= 3
    assert set(proxy.caused) <= {fault, "truncated"}


def test_a_store_that_never_answers_is_given_up_and_named(faulty: Faulty) -> None:
    _, storage = faulty(in_a_row=1000, _hang=1.0)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot read bucket/.*/a: .*[Tt]ime"):
        storage.read_bytes("a")
    assert time.monotonic() - started < 100


def test_without_credentials_nothing_is_waited_for(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, _ = faulty()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    before = sum(proxy.counts.values())
    with pytest.raises(StorageError, match="NoCredentialsError"):
        Storage("s3://bucket/run").read_bytes("a")
    assert sum(proxy.counts.values()) == before


def test_an_operation_takes_as_many_requests_as_it_must(faulty: Faulty) -> None:
    proxy, storage = faulty()

    def requests(action: Callable[[], object]) -> dict[str, int]:
        proxy.counts.clear()
        action()
        return dict(proxy.counts)

    assert requests(lambda: storage.write_bytes("a/b", BODY)) == {"PUT": 1}
    assert requests(lambda: storage.read_bytes("a/b")) == {"GET": 1}
    assert requests(lambda: storage.read_range("a/b", 1, 5)) == {"RANGE": 1}
    assert requests(lambda: storage.names("a")) == {"LIST": 1}
    assert requests(lambda: storage.remove_unfinished("a")) == {}
    assert requests(lambda: storage.remove("a/b")) == {"DELETE": 1}
    assert requests(lambda: storage.delete("a")) == {"LIST": 1, "POST delete": 1}


# ------------------------------------------------------------------------------------------------ datasets


TABLE = pa.table({"id": pa.array(range(2000), pa.int64())})


def test_a_body_that_was_cut_with_its_length_is_read_again_and_one_that_stays_cut_is_refused(faulty: Faulty) -> None:
    proxy, storage = faulty()
    commit(storage, "numbers", [write_shard(storage, "numbers", 0, TABLE, LINEAGE)], LINEAGE)
    proxy.rates = {"cut": 1.0}
    assert read_table(storage, open_manifest(storage, "numbers")) == TABLE
    assert proxy.caused["cut"] == 2, "once the manifest, once the shard"
    proxy.rates = {}
    manifest = open_manifest(storage, "numbers")
    proxy.rates, proxy.in_a_row = {"cut": 1.0}, 1000
    with pytest.raises(DataError, match="was changed after its manifest was written"):
        read_table(storage, manifest)
    with pytest.raises(DataError, match="is not a manifest"):
        open_manifest(storage, "numbers")


def test_a_shard_that_lies_there_cut_is_made_again_before_it_is_published(faulty: Faulty) -> None:
    _, storage = faulty()
    shard = write_shard(storage, "numbers", 0, TABLE, LINEAGE)
    assert finished_shard(storage, "numbers", 0, LINEAGE) == shard
    storage.write_bytes(f"numbers/{shard.name}", storage.read_bytes(f"numbers/{shard.name}")[:-10])
    assert finished_shard(storage, "numbers", 0, LINEAGE) is None


def test_a_listing_of_before_hides_no_manifest_from_who_withdraws_it(faulty: Faulty) -> None:
    proxy, storage = faulty()
    assert storage.names("numbers") == []
    shard = write_shard(storage, "numbers", 0, TABLE, LINEAGE)
    commit(storage, "numbers", [shard], LINEAGE)
    proxy.rates, proxy.in_a_row = {"stale": 1.0}, 1000
    assert storage.names("numbers") != ["_manifest.json", shard.name], "the listing is old"
    begin(storage, "numbers")
    assert find_manifest(storage, "numbers") is None


def test_a_listing_of_before_publishes_nothing_that_is_not_there(faulty: Faulty) -> None:
    """The second version has fewer shards; old listings show those of the first, deleted, or none at all."""
    proxy, storage = faulty(in_a_row=1000)
    for version, count in enumerate((3, 1, 2)):
        lineage = Lineage("test", {"version": version}, {})
        begin(storage, "numbers")
        shards = [write_shard(storage, "numbers", n, TABLE.slice(n, 5 + version), lineage) for n in range(count)]
        commit(storage, "numbers", shards, lineage)
        manifest = open_manifest(storage, "numbers")
        assert [shard.name for shard in manifest.shards] == [shard.name for shard in shards]
        assert read_table(storage, manifest).num_rows == count * (5 + version)
        proxy.rates = {"stale": 0.7}


# ------------------------------------------------------------------------------------------------ the user's files


@pytest.mark.parametrize("fault", ["cut", "truncated", "reset", "500"])
def test_a_text_file_of_the_user_comes_whole_or_not_at_all(faulty: Faulty, fault: str) -> None:
    """It has no checksum of ours, and half of a CSV file is a CSV file."""
    proxy, storage = faulty()
    lines = b"".join(b"%d,x\n" % number for number in range(5000))
    storage.write_bytes("lines.csv.gz", gzip.compress(lines))
    storage.write_bytes("lines.csv", lines)
    proxy.rates = {fault: 0.6}
    for name in ("lines.csv.gz", "lines.csv"):
        with open_input(f"{storage.url}/{name}", "infer") as file:
            assert b"".join(file) == lines
    proxy.in_a_row, proxy.rates = 1000, {fault: 1.0}
    with pytest.raises(StorageError, match="cannot read"), open_input(f"{storage.url}/lines.csv", "infer") as file:
        file.read()
