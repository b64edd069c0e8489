"""Storage: an object is there whole or not at all; what time mends is tried again, what it does not is explained."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contracts.errors import StorageError
from pipeline.contracts.storage import ATTEMPTS, Storage, describe_inputs


class FlakyFileSystem(MemoryFileSystem):
    """A memory file system whose reads and writes fail: as often as `failures` has entries."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    failures: list[BaseException] = []  # noqa: RUF012
    calls = 0
    seen: list[bytes | None] = []  # noqa: RUF012
    """What a reader of run/a finds while something is written."""

    def _answer(self) -> None:
        FlakyFileSystem.calls += 1
        if FlakyFileSystem.failures:
            raise FlakyFileSystem.failures.pop(0)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        self._answer()
        data: bytes = super().cat_file(path, *arguments, **options)
        return data

    def pipe_file(self, path: str, value: bytes, *arguments: Any, **options: Any) -> None:
        self._answer()
        super().pipe_file(path, value[: len(value) // 2], *arguments, **options)
        self.seen.append(next((file.getvalue() for name, file in self.store.items() if name.endswith("run/a")), None))
        super().pipe_file(path, value, *arguments, **options)

    def put_file(self, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())


class LibraryError(Exception):
    """Stands for botocore's and gcsfs's own errors, which are no OSError."""


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A storage that can be told to fail; pauses between attempts take no time."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    FlakyFileSystem.failures, FlakyFileSystem.calls, FlakyFileSystem.seen = [], 0, []
    FlakyFileSystem.store.clear()
    return Storage("flaky://bucket/run")


@pytest.fixture(params=["plain path", "file://", "memory://"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """The same folder behind every kind of address that needs no network."""
    bases = {
        "plain path": str(tmp_path / "run"),
        "file://": f"file://{tmp_path}/run",
        "memory://": f"memory://{uuid.uuid4()}",
    }
    return Storage(bases[request.param])


# ------------------------------------------------------------------------------------------------ objects


def test_what_is_written_is_read_again_and_a_second_write_wins(anywhere: Storage) -> None:
    anywhere.write_bytes("a/b/c.bin", b"first")
    anywhere.write_bytes("a/b/c.bin", memoryview(b"second"))
    assert anywhere.read_bytes("a/b/c.bin") == b"second"
    assert anywhere.names("a/b") == ["c.bin"]


def test_an_object_is_shared_with_another_folder_and_outlives_it(anywhere: Storage, tmp_path: Path) -> None:
    anywhere.write_bytes("folder/object", b"data")
    here = Storage(str(tmp_path / "elsewhere"))
    beside = Storage(f"{anywhere.url}/beside")
    for copy in (here, beside, here):
        copy.copy_from(anywhere, "folder/object")
        assert copy.names("folder") == ["object"]
    anywhere.write_bytes("folder/object", b"other")
    assert here.read_bytes("folder/object") == beside.read_bytes("folder/object") == b"data"
    anywhere.remove("folder/object")
    assert here.read_bytes("folder/object") == beside.read_bytes("folder/object") == b"data"
    with pytest.raises(StorageError):
        here.copy_from(anywhere, "folder/object")


@pytest.mark.parametrize("size", [0, 1, 3 << 20, (3 << 20) + 17])
def test_what_is_loaded_is_shown_in_order_and_the_callers_own(anywhere: Storage, size: int) -> None:
    data, shown = os.urandom(size), list[bytes]()
    assert anywhere.write_bytes("object", data) == hashlib.sha256(data).hexdigest()
    found = anywhere.load("object", lambda piece: shown.append(bytes(piece)))
    assert bytes(found) == data == b"".join(shown)
    assert all(len(piece) % 4096 == 0 for piece in shown[:-1])
    found[:1] = found[:1]
    with pytest.raises(FileNotFoundError):
        anywhere.load("nothing", print)


@given(data=st.binary(max_size=2000))
def test_any_bytes_survive(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    storage = Storage(str(tmp_path_factory.getbasetemp() / "bytes"))
    storage.write_bytes("x", data)
    assert storage.read_bytes("x") == data


def test_names_are_sorted_and_only_those_directly_below(anywhere: Storage) -> None:
    for path in ("b", "a/deeper", "c/d/e"):
        anywhere.write_bytes(path, b"")
    assert anywhere.names("") == ["a", "b", "c"]
    assert anywhere.names("c") == ["d"]
    assert anywhere.names("nowhere") == []


def test_what_is_not_there_is_file_not_found(anywhere: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        anywhere.read_bytes("nothing")


def test_deleting_removes_a_folder_with_all_below_and_nothing_is_fine(anywhere: Storage) -> None:
    anywhere.write_bytes("a/b/c", b"1")
    anywhere.write_bytes("ab", b"2")
    anywhere.delete("a")
    anywhere.delete("a")
    assert anywhere.names("") == ["ab"]


def test_a_local_file_is_stored_whole(anywhere: Storage, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 100_000)
    anywhere.put_file(tmp_path / "large", "model/large.bin")
    assert anywhere.read_bytes("model/large.bin") == b"x" * 100_000
    assert anywhere.names("model") == ["large.bin"]


def test_a_storage_travels_to_tasks_as_its_address(anywhere: Storage) -> None:
    anywhere.write_bytes("a", b"1")
    copy = pickle.loads(pickle.dumps(anywhere))
    assert (copy.url, copy.read_bytes("a")) == (anywhere.url, b"1")


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../other", "a/.."])
def test_no_path_leads_out_of_the_folder(anywhere: Storage, path: str) -> None:
    with pytest.raises(StorageError, match="points outside"):
        anywhere.read_bytes(path)
    with pytest.raises(StorageError, match="points outside"):
        anywhere.write_bytes(path, b"")
    with pytest.raises(StorageError, match="points outside"):
        anywhere.delete(path)


def test_an_unknown_kind_of_address_is_named() -> None:
    with pytest.raises(StorageError, match="cannot open nosuch://bucket"):
        Storage("nosuch://bucket/run")


# ------------------------------------------------------------------------------------------------ whole or not at all


@pytest.mark.parametrize("crash", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_the_old_object_and_nothing_else(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, crash: BaseException
) -> None:
    storage.write_bytes("folder/object", b"old")

    def fail(descriptor: int) -> None:
        raise crash

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((StorageError, KeyboardInterrupt)):
        storage.write_bytes("folder/object", b"new and longer")
    assert storage.read_bytes("folder/object") == b"old"
    assert os.listdir(storage.locate("folder")) == ["object"]


def test_a_write_that_was_killed_is_not_listed_and_can_be_swept(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After kill -9 nobody tidies up: the child dies between its write and its rename."""
    storage.write_bytes("folder/object", b"old")
    child = os.fork()
    if not child:
        monkeypatch.setattr(os, "replace", lambda source, target: os._exit(9))
        storage.write_bytes("folder/object", b"new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(os.listdir(storage.locate("folder"))) == 2
    assert storage.names("folder") == ["object"]
    assert storage.read_bytes("folder/object") == b"old"
    storage.remove_unfinished("folder")
    assert os.listdir(storage.locate("folder")) == ["object"]


def test_a_copy_that_breaks_off_leaves_the_old_object(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes("model/large", b"old")
    (tmp_path / "large").write_bytes(b"new")

    def fail(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match="No space left on device"):
        storage.put_file(tmp_path / "large", "model/large")
    assert storage.read_bytes("model/large") == b"old"
    assert os.listdir(storage.locate("model")) == ["large"]


@pytest.mark.parametrize("large", [False, True])
def test_where_a_put_shows_halves_an_object_is_written_aside_and_renamed(
    flaky: Storage, tmp_path: Path, large: bool
) -> None:
    """HDFS, SFTP: neither a file system of this machine nor an object store."""
    (tmp_path / "new").write_bytes(b"newer")
    flaky.write_bytes("a", b"old")
    if large:
        flaky.put_file(tmp_path / "new", "a")
    else:
        flaky.write_bytes("a", b"newer")
    assert FlakyFileSystem.seen == [None, b"old"], "at no moment half an object"
    assert flaky.read_bytes("a") == b"newer"
    assert len(FlakyFileSystem.store) == 1


def test_an_object_store_gets_an_object_by_one_put(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, names = Storage(f"memory://{uuid.uuid4()}"), []
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, value: names.append(path))
    storage.write_bytes("a", b"1")
    assert names == [f"{storage.root}/a"]


# ------------------------------------------------------------------------------------------------ trying again


@pytest.mark.parametrize(
    "failure",
    [TimeoutError("slow"), ConnectionResetError("reset"), OSError(errno.EIO, "I/O error"), LibraryError("throttled")],
)
def test_what_time_may_mend_is_tried_again(flaky: Storage, failure: BaseException) -> None:
    FlakyFileSystem.failures = [failure] * (ATTEMPTS - 1)
    flaky.write_bytes("a", b"1")
    FlakyFileSystem.failures = [failure] * (ATTEMPTS - 1)
    assert flaky.read_bytes("a") == b"1"
    assert FlakyFileSystem.calls == 2 * ATTEMPTS


def test_it_is_not_tried_for_ever_and_the_message_says_what_was_tried(flaky: Storage) -> None:
    FlakyFileSystem.failures = [ConnectionResetError("connection reset by peer")] * (ATTEMPTS + 5)
    with pytest.raises(
        StorageError, match=r"cannot write .*bucket/run/a \(1 bytes\): .*reset by peer; check the address"
    ):
        flaky.write_bytes("a", b"1")
    assert FlakyFileSystem.calls == ATTEMPTS


def test_an_error_of_a_librarys_own_is_explained_and_kept_as_the_cause(flaky: Storage) -> None:
    FlakyFileSystem.failures = [LibraryError("no credentials")] * ATTEMPTS
    with pytest.raises(StorageError, match=r"LibraryError: no credentials; check .*credentials") as caught:
        flaky.read_bytes("a")
    assert isinstance(caught.value.__cause__, LibraryError)


def test_a_bucket_that_is_not_there_is_a_refusal_to_who_writes(flaky: Storage) -> None:
    FlakyFileSystem.failures = [FileNotFoundError("the bucket does not exist")]
    with pytest.raises(StorageError, match=r"cannot write .*the bucket does not exist"):
        flaky.write_bytes("a", b"1")


@pytest.mark.parametrize(
    ("failure", "remedy"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "give this user the right to write there, or choose another",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "give this user the right to write there"),
        (OSError(errno.ENOSPC, "No space left on device"), "make room or move resources.run"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "a file stands where a folder is needed"),
    ],
)
def test_what_time_does_not_mend_is_said_at_once_with_the_remedy(flaky: Storage, failure: OSError, remedy: str) -> None:
    FlakyFileSystem.failures = [failure]
    with pytest.raises(StorageError, match=remedy):
        flaky.write_bytes("a", b"1")
    assert FlakyFileSystem.calls == 1


def test_what_is_not_there_is_not_waited_for(flaky: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        flaky.read_bytes("nothing")
    assert FlakyFileSystem.calls == 1


def test_a_reader_without_the_right_to_read_is_told_so(flaky: Storage) -> None:
    FlakyFileSystem.failures = [PermissionError(errno.EACCES, "Permission denied")]
    with pytest.raises(StorageError, match=r"cannot read .*give this user the right to read there"):
        flaky.read_bytes("a")


# ------------------------------------------------------------------------------------------------ before work starts


def test_the_probe_for_writing_leaves_nothing(anywhere: Storage) -> None:
    anywhere.check_writable()
    assert anywhere.names("") == []


@pytest.mark.parametrize("run", ["file", "file/below"])
def test_a_file_in_the_way_of_the_folder_is_explained(tmp_path: Path, run: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"a file stands where a folder is needed; choose another resources\.run"):
        Storage(str(tmp_path / run)).check_writable()


# ------------------------------------------------------------------------------------------------ the user's files


def test_a_file_a_glob_and_a_folder_name_their_files(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "deep/c.csv", "_SUCCESS", ".hidden.csv", "deep/_temporary/0/d.csv", ".git/e.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(pattern: str) -> list[str]:
        return [entry["url"].removeprefix(f"file://{tmp_path}/") for entry in describe_inputs(f"{tmp_path}{pattern}")]

    assert found("/a.csv") == ["a.csv"]
    assert found("/[ab].csv") == ["a.csv", "b.csv"]
    assert found("/**/c.csv") == ["deep/c.csv"]
    assert found("") == ["a.csv", "b.csv", "deep/c.csv"]
    assert describe_inputs(f"{tmp_path}/a.csv")[0]["bytes"] == 5


def test_a_file_whose_name_has_signs_of_a_glob_is_found(tmp_path: Path) -> None:
    (tmp_path / "sales [2024].csv").write_text("x")
    assert [entry["bytes"] for entry in describe_inputs(f"{tmp_path}/sales [2024].csv")] == [1]


@pytest.mark.parametrize("pattern", ["/nothing.csv", "/*.nothing", "/empty"])
def test_a_path_that_names_nothing_is_file_not_found(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        describe_inputs(f"{tmp_path}{pattern}")


def test_a_file_that_changed_is_described_differently(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    before = describe_inputs(str(tmp_path / "a"))
    assert before == describe_inputs(f"file://{tmp_path}/a")
    os.utime(tmp_path / "a", (1, 1))
    assert describe_inputs(str(tmp_path / "a")) != before


def test_files_are_described_on_any_file_system() -> None:
    folder = f"memory://{uuid.uuid4()}"
    with fsspec.open(f"{folder}/part-0.csv", "wb") as file:
        file.write(b"abc")
    assert [(entry["url"], entry["bytes"]) for entry in describe_inputs(f"{folder}/*.csv")] == [
        (f"{folder.replace('memory://', 'memory:///')}/part-0.csv", 3)
    ]


def test_a_file_that_changed_where_none_keeps_the_time_is_described_differently() -> None:
    url = f"memory://{uuid.uuid4()}/a"
    found = []
    for data in (b"one", b"two"):
        with fsspec.open(url, "wb") as file:
            file.write(data)
        found.append(describe_inputs(url))
        assert found[-1] == describe_inputs(url)
    assert found[0] != found[1]


def test_a_file_of_unknown_size_is_described(flaky: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky.write_bytes("a", b"1")
    monkeypatch.setattr(FlakyFileSystem, "info", lambda self, path: {"name": path, "size": None, "type": "file"})
    assert [entry["bytes"] for entry in describe_inputs("flaky://bucket/run/a")] == [None]


def test_files_that_cannot_be_asked_for_are_explained(flaky: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"cannot list nosuch://a"):
        describe_inputs("nosuch://a")

    def no_credentials(self: FlakyFileSystem, path: str) -> None:
        raise LibraryError("no credentials")

    monkeypatch.setattr(FlakyFileSystem, "info", no_credentials)
    with pytest.raises(StorageError, match=r"cannot list flaky://bucket/a: LibraryError: no credentials"):
        describe_inputs("flaky://bucket/a")

    def no_package(url: str, **options: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", no_package)
    with pytest.raises(StorageError, match="cannot list s3://b/a: Install s3fs to access S3; install the package"):
        describe_inputs("s3://b/a")
