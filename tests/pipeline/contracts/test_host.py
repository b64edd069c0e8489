"""Files with the page cache or past it: the same bytes, and what stays in memory."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.contracts import host
from pipeline.contracts.errors import StorageError
from pipeline.contracts.storage import Storage

MEBIBYTE = 1 << 20
SIZES = [0, 1, MEBIBYTE, 4 * MEBIBYTE, (5 << 20) + 17, 9 * MEBIBYTE + 4096]


def placed(data: bytes, offset: int) -> memoryview:
    """The bytes, so far behind where a page begins."""
    room = np.zeros(len(data) + 2 * host._PAGE, np.uint8)
    start = -room.ctypes.data % host._PAGE + offset
    room[start : start + len(data)] = np.frombuffer(data, np.uint8)
    return room[start : start + len(data)].data


def is_cached(path: Path) -> bool:
    """Whether a file is in the page cache."""
    file = os.open(path, os.O_RDONLY)
    try:
        return host.is_cached(file, path.stat().st_size)
    finally:
        os.close(file)


def knows_direct(folder: Path) -> bool:
    """Whether the file system of a folder can be written past the page cache."""
    return host._is_direct(str(folder / "x"), MEBIBYTE) and (
        host._write_past_cache(str(folder / "x"), memoryview(bytes(MEBIBYTE))) is not None
    )


def read(path: Path) -> tuple[bytes, list[bytes]]:
    """A file, and the blocks that were shown."""
    shown: list[bytes] = []
    found = host.read(str(path), lambda block: shown.append(bytes(block)), lambda attempt: attempt())
    return bytes(found), shown


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("read_soon", [True, False])
def test_what_is_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, offset: int, read_soon: bool
) -> None:
    data, path = os.urandom(size), tmp_path / "file"
    monkeypatch.setattr(host, "is_cached", lambda file, size: read_soon)
    assert host.write(str(path), placed(data, offset), True, read_soon) == hashlib.sha256(data).hexdigest()
    assert path.read_bytes() == data
    found, shown = read(path)
    assert found == data == b"".join(shown)
    assert all(len(block) % 4096 == 0 for block in shown[:-1])


def test_what_will_not_be_read_soon_stays_out_of_memory_by_writing_and_by_reading(tmp_path: Path) -> None:
    if not knows_direct(tmp_path):
        pytest.skip("needs a file system that knows O_DIRECT")
    data, soon, later = os.urandom(9 * MEBIBYTE), tmp_path / "soon", tmp_path / "later"
    host.write(str(soon), memoryview(data))
    host.write(str(later), memoryview(data), read_soon=False)
    assert (is_cached(soon), is_cached(later)) == (True, False)
    assert read(later)[0] == read(soon)[0] == data
    assert (is_cached(soon), is_cached(later)) == (True, False)
    host.write(str(later), memoryview(data), lasting=False, read_soon=False)
    assert is_cached(later)


def refusing(call: Callable[..., int]) -> Callable[..., int]:
    """A system call as of a file system that does not know O_DIRECT."""
    opens = call is os.open

    def refuse(*arguments: int) -> int:
        if not opens or arguments[1] & host._DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return call(*arguments)

    return refuse


@pytest.mark.skipif(not host._DIRECT, reason="this system has no O_DIRECT")
@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_where_writing_past_the_cache_is_refused_it_is_written_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    data, path = os.urandom(5 * MEBIBYTE), tmp_path / "file"
    monkeypatch.setattr(os, call, refusing(getattr(os, call)))
    assert host.write(str(path), memoryview(data), read_soon=False) == hashlib.sha256(data).hexdigest()
    assert path.read_bytes() == data
    assert is_cached(path)


@pytest.mark.skipif(not host._DIRECT, reason="this system has no O_DIRECT")
def test_where_reading_past_the_cache_is_refused_it_is_read_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = os.urandom(5 * MEBIBYTE), tmp_path / "file"
    path.write_bytes(data)
    monkeypatch.setattr(host, "is_cached", lambda file, size: False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing(os.open))
        assert read(path)[0] == data
    fill, asked = host._fill, []

    def refuse(file: int, room: memoryview, place: int, size: int) -> None:
        asked.append(size)
        if len(asked) % 2:
            raise OSError(errno.EINVAL, "no")
        fill(file, room, place, size)

    monkeypatch.setattr(host, "_fill", refuse)
    found, shown = read(path)
    assert found == data == b"".join(shown)
    assert asked == [4 * MEBIBYTE, 4 * MEBIBYTE, MEBIBYTE, MEBIBYTE]


def test_a_block_that_cannot_be_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, data = Storage(str(tmp_path)), os.urandom(9 * MEBIBYTE)
    storage.write_bytes("file", data, read_soon=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    preadv, failures = os.preadv, [False, True, True, True, False, True]

    def fail(file: int, rooms: list[memoryview], place: int) -> int:
        if failures and failures.pop(0):
            raise OSError(errno.EIO, "a cable is loose")
        return preadv(file, rooms, place)

    monkeypatch.setattr(os, "preadv", fail)
    assert bytes(storage.load("file", lambda block: None)) == data
    assert not failures


@pytest.mark.parametrize("read_soon", [True, False])
def test_a_full_disk_is_told_of_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_soon: bool
) -> None:
    storage = Storage(str(tmp_path))

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left.*make room"):
        storage.write_bytes("file", bytes(5 * MEBIBYTE), read_soon=read_soon)
    assert not any(tmp_path.iterdir())


def test_a_file_that_became_shorter_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * MEBIBYTE))
    monkeypatch.setattr(os, "preadv", lambda *arguments: 0)
    with pytest.raises(OSError, match="became shorter"):
        read(path)


def test_file_systems_of_other_machines_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.is_on_this_host(str(tmp_path))
    monkeypatch.setattr(host, "_REMOTE", ("",))
    assert not host.is_on_this_host(str(tmp_path))
    assert not host._is_direct(str(tmp_path / "file"), MEBIBYTE)


def test_the_memory_of_this_host_is_at_least_what_runs_the_tests() -> None:
    assert host.physical_memory() > 1 << 28


def test_a_file_that_cannot_be_mapped_counts_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * MEBIBYTE))

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENODEV, "no such device")

    monkeypatch.setattr("mmap.mmap", refuse)
    assert is_cached(path)
    assert read(path)[0] == bytes(2 * MEBIBYTE)
