"""Datasets: a folder of shards and a manifest written last. Without its manifest a dataset does not exist.

A manifest holds the schema version, every shard's name, rows, bytes and SHA-256, where it came from (Lineage: settings
and the contents of what was read, as one fingerprint) and free metadata. Its `content` hash covers what the shards
hold and nothing of when or where, so a dataset rebuilt to the same bytes leaves everything downstream up to date.
While a dataset is being built, every finished shard leaves a receipt with the lineage's fingerprint: a restarted stage
asks `finished_shard` and does only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from importlib import metadata as packages
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.contracts.config import Settings, select
from pipeline.contracts.errors import DataError
from pipeline.contracts.schemas import SCHEMA_VERSION, STAGES, Dataset, Stage, how_to_build
from pipeline.contracts.storage import Storage

MANIFEST = "_manifest.json"
RECEIPTS = "_building"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_OURS = re.compile(r"part-\d+\.(?:parquet|rows|blocks)|checkpoint\.pt")
"""Names that only stages give: an old version's shards, a finished training's checkpoint. Receipts name the rest."""
_LEVELS = 2
"""Of a manifest that are laid out line by line."""
Data = TypeVar("Data", bound="bytes | memoryview")
_MAX_LIST_ENTRIES = 2**31 - 1
"""Of one list column in one shard: Arrow and Parquet count them in 32 bits."""


@dataclass(frozen=True)
class Shard:
    """One stored file of a dataset; bytes is its size and sha256 its checksum in hex."""

    name: str
    rows: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Raise ValueError for what no stage writes: a manifest from elsewhere must not lead to other files."""
        if not _NAME.fullmatch(self.name) or self.rows < 0 or self.bytes < 0:
            raise ValueError(f"{self.name!r} with {self.rows} rows, {self.bytes} bytes is no file of a dataset")

    def check(self, data: Data) -> Data:
        """The data, if it is what was stored; else ValueError."""
        if len(data) != self.bytes or hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError(f"it has {len(data):,} bytes, expected {self.bytes:,} bytes of another checksum")
        return data


@dataclass(frozen=True)
class Lineage:
    """What a stage's outputs depend on; equal fingerprints mean equal outputs."""

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that the stage's outputs depend on."""
        return _digest({"schema_version": SCHEMA_VERSION, **asdict(self)})


@dataclass(frozen=True)
class Manifest:
    """A finished dataset."""

    dataset: str
    schema_version: int
    shards: tuple[Shard, ...]
    lineage: Lineage
    metadata: dict[str, Any] = field(default_factory=dict)
    code_version: str = ""
    created_at: float = 0.0

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Stored bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def content(self) -> str:
        """SHA-256 of what is stored: equal whenever the shards and the metadata are, whenever they were made."""
        shards = [(shard.name, shard.rows, shard.sha256) for shard in self.shards]
        return _digest([self.dataset, self.schema_version, shards, self.metadata])


# ------------------------------------------------------------------------------------------------ manifests


def find_manifest(storage: Storage, dataset: Dataset | str) -> Manifest | None:
    """The dataset's manifest, or None if the dataset does not exist.

    Raises DataError for one that cannot be read or was written under another schema version.
    """
    name = dataset if isinstance(dataset, str) else dataset.name
    path = f"{name}/{MANIFEST}"
    try:
        found = storage.read_with(path, lambda data: _parse_manifest(data, name))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(
            f"{storage.locate(path)} is not a manifest ({error}); delete the folder {name} and run again"
        ) from None
    if isinstance(found, Manifest):
        return found
    raise DataError(
        f"{storage.locate(path)} has schema version {found}, this code reads version {SCHEMA_VERSION}; "
        "choose another resources.run, or delete that run to build it again"
    )


def _parse_manifest(data: bytes, name: str) -> Any:
    """The manifest of the dataset of that name, or the schema version if it is another. ValueError if it is neither."""
    try:
        tree = json.loads(data)
        if tree["schema_version"] != SCHEMA_VERSION:
            return tree["schema_version"]
        manifest = Manifest(
            dataset=tree["dataset"],
            schema_version=tree["schema_version"],
            shards=tuple(Shard(**shard) for shard in tree["shards"]),
            lineage=Lineage(**tree["lineage"]),
            metadata=tree["metadata"],
            code_version=tree["code_version"],
            created_at=tree["created_at"],
        )
        is_whole = tree["content"] == manifest.content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from None
    if manifest.dataset != name:
        raise ValueError(f"it is of the dataset {manifest.dataset!r}")
    if not is_whole:
        raise ValueError("its content differs from its own checksum")
    return manifest


def finished_manifest(storage: Storage, dataset: Dataset | str, lineage: Lineage) -> Manifest | None:
    """The manifest if the dataset was made from this lineage by this version of the code, else None.

    For a stage of several steps: what a killed attempt finished need not be made again.
    """
    manifest = find_manifest(storage, dataset)
    if manifest is None or manifest.code_version != code_version():
        return None
    return manifest if manifest.lineage.fingerprint == lineage.fingerprint else None


def open_manifest(storage: Storage, dataset: Dataset | str) -> Manifest:
    """The dataset's manifest; DataError names the stage to run if the dataset does not exist."""
    manifest = find_manifest(storage, dataset)
    if manifest is None:
        name = dataset if isinstance(dataset, str) else dataset.name
        raise DataError(f"{storage.url} has no {name} yet; {how_to_build(name)}")
    return manifest


def trace(storage: Storage, stage: Stage, settings: Settings, inputs: Mapping[str, str] | None = None) -> Lineage:
    """What the stage's outputs depend on now; reads the manifests of the stage's inputs.

    inputs adds what is not a dataset of the run, such as the user's files. Raises DataError if an input is missing.
    """
    found = {dataset.name: open_manifest(storage, dataset).content for dataset in stage.reads}
    return Lineage(stage.name, select(settings, stage.settings), {**found, **(inputs or {})})


def is_up_to_date(storage: Storage, stage: Stage, lineage: Lineage) -> bool:
    """Whether all of the stage's outputs exist and were made from exactly this lineage."""
    manifests = [find_manifest(storage, dataset) for dataset in stage.writes]
    return all(found is not None and found.lineage.fingerprint == lineage.fingerprint for found in manifests)


def commit(
    storage: Storage,
    dataset: Dataset | str,
    shards: Iterable[Shard],
    lineage: Lineage,
    metadata: Mapping[str, Any] | None = None,
) -> Manifest:
    """Make the shards a dataset: clear what earlier versions left, write the manifest, then clear the receipts.

    A kill before the manifest leaves no dataset, and the next attempt sweeps; one after it leaves receipts beside a
    manifest, which `begin` distrusts. Files of names that are not ours stay.
    """
    name = dataset if isinstance(dataset, str) else dataset.name
    manifest = Manifest(
        dataset=name,
        schema_version=SCHEMA_VERSION,
        shards=tuple(sorted(shards, key=lambda shard: (len(shard.name), shard.name))),
        lineage=lineage,
        metadata=dict(metadata or {}),
        code_version=code_version(),
        created_at=time.time(),
    )
    told = {"shards": [*map(vars, manifest.shards)], "lineage": asdict(lineage), "content": manifest.content}
    text = _laid_out(vars(manifest) | told)
    received = {receipt.removesuffix(".json") for receipt in storage.names(f"{name}/{RECEIPTS}")}
    kept = {shard.name for shard in manifest.shards}
    for other in storage.names(name):
        if other not in kept and (other in received or _OURS.fullmatch(other)):
            storage.remove(f"{name}/{other}")
    storage.remove_unfinished(name)
    storage.write_bytes(f"{name}/{MANIFEST}", text.encode())
    storage.delete(f"{name}/{RECEIPTS}")
    return manifest


def _laid_out(tree: Any, line: str = "\n") -> str:
    """JSON for people too: a line for each key of objects, and for each object of a list, encoded by the C encoder.

    With an indent json encodes in Python: of a step's reports ten times as long.
    """
    inner = f"{line} "
    if isinstance(tree, dict) and tree and len(line) <= _LEVELS:
        items = (f"{json.dumps(name)}: {_laid_out(value, inner)}" for name, value in sorted(tree.items()))
        return f"{{{inner}{f',{inner}'.join(items)}{line}}}"
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return f"[{inner}{f',{inner}'.join(json.dumps(value, sort_keys=True) for value in tree)}{line}]"
    return json.dumps(tree, sort_keys=True)


def check_sources(storage: Storage, dataset: Dataset) -> None:
    """Raise DataError if the dataset, or what it was made of, was made of another dataset than lies beside it now."""
    made = find_manifest(storage, dataset)
    if made is None:
        return
    for source in (source for stage in STAGES if dataset in stage.writes for source in stage.reads):
        found, content = find_manifest(storage, source), made.lineage.inputs.get(source.name)
        if found is None or content is None:
            continue
        if found.content != content:
            raise DataError(
                f"{storage.locate(dataset.name)} was made of another {source.name} than lies beside it now; "
                f"{how_to_build(dataset.name)}"
            )
        check_sources(storage, source)


def begin(storage: Storage, dataset: Dataset | str) -> None:
    """Withdraw the dataset before its shards are overwritten, so that no manifest speaks of other bytes.

    Receipts beside a manifest are those of a finished attempt whose commit was killed, not of one to go on with. The
    manifest is asked for itself: a listing may be too old to have it.
    """
    name = dataset if isinstance(dataset, str) else dataset.name
    with suppress(FileNotFoundError):
        storage.read_bytes(f"{name}/{MANIFEST}")
        storage.delete(f"{name}/{RECEIPTS}")
        storage.remove(f"{name}/{MANIFEST}")


def take_over(storage: Storage, earlier: Storage, dataset: Dataset, lineage: Lineage) -> Manifest:
    """Make a small dataset of files of another run this run's, byte for byte: equal content, a lineage of its own."""
    found = open_manifest(earlier, dataset)
    files = {shard: read_file(earlier, found, shard.name) for shard in found.shards}
    begin(storage, dataset)
    shards = [write_file(storage, dataset.name, s.name, data, lineage, s.rows) for s, data in files.items()]
    return commit(storage, dataset, shards, lineage, found.metadata)


def withdraw_broken(storage: Storage, folder: str = "") -> list[str]:
    """Forget every dataset of a run, or of a folder of it, finished or of a step, of which a file is gone or changed.

    Returns their names.

    Also what the steps of the stages that made these have kept: one that is over would not be run again. Reads every
    byte that a manifest speaks of, a file at a time: for when a stage has failed and nobody knows why.
    """
    found: list[str] = []
    stages: set[str | None] = set()
    steps: dict[str, str] = {}
    for path in sorted(f"{folder}/{path}".lstrip("/") for path in storage.files(folder)):
        name, _, file = path.rpartition("/")
        if file != MANIFEST:
            continue
        manifest: Manifest | None = None
        try:
            manifest = find_manifest(storage, name)
            for shard in () if manifest is None else manifest.shards:
                read_stored(storage, name, shard)
        except DataError:
            found.append(name)
            stages.add(None if manifest is None else manifest.lineage.fingerprint)
        else:
            if manifest is not None and "/" in name:
                steps[name] = manifest.lineage.fingerprint
    kept = [name for name, stage in steps.items() if stage in stages or None in stages]
    for name in (*found, *kept):
        storage.delete(f"{name}/{MANIFEST}")
        storage.delete(f"{name}/{RECEIPTS}")
    return found


# ------------------------------------------------------------------------------------------------ shards


def shard_name(number: int) -> str:
    """`part-00007.parquet`: by partition, never by attempt."""
    return f"part-{number:05d}.parquet"


def encode_table(table: pa.Table) -> memoryview:
    """A table as Parquet bytes: zstd, one row group, the same bytes for the same rows. Vectors are as they are.

    Ids and times are stored as packed differences: of interactions a fifth smaller than Arrow's own choice, and written
    and read in less than half the time. The least and largest of all numbers in a shard's vectors would tell nobody
    anything, and cost as much as writing them.
    """
    sink = pa.BufferOutputStream()
    leaves = dict(map(_leaf, table.schema))
    packed = [name for name, kind in leaves.items() if pa.types.is_integer(kind) and kind.bit_width >= 32]
    vectors = [name for name, kind in leaves.items() if pa.types.is_floating(kind) and "." in name]
    pq.write_table(
        table.replace_schema_metadata(None).combine_chunks(),
        sink,
        compression={name: "none" if name in vectors else "zstd" for name in leaves},
        row_group_size=max(1, table.num_rows),
        store_schema=True,
        use_dictionary=[name for name in leaves if name not in packed and name not in vectors],
        write_statistics=[name for name in leaves if name not in vectors],
        column_encoding=dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
    )
    return memoryview(sink.getvalue())


def decode_table(data: bytes | memoryview, columns: Sequence[str] | None = None) -> pa.Table:
    """A table, or some columns of it, from Parquet bytes. KeyError for a column that it has not.

    Without Arrow's datasets, as which pyarrow would read a single file too, in twice the time.
    """
    file = pq.ParquetFile(pa.BufferReader(data))
    absent = [] if columns is None else sorted(set(columns) - set(file.schema_arrow.names))
    if absent:
        raise KeyError(f"no column {', '.join(absent)} among {', '.join(file.schema_arrow.names)}")
    return file.read(columns=None if columns is None else list(columns))


def _leaf(field: pa.Field) -> tuple[str, pa.DataType]:
    """What Parquet calls the column that holds a field's values, and their type."""
    name, kind = field.name, field.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        name, kind = f"{name}.list.element", kind.value_type
    return name, kind


def write_shard(storage: Storage, dataset: Dataset | str, number: int, table: pa.Table, lineage: Lineage) -> Shard:
    """Check and store one shard, and leave a receipt for a restart. Overwriting it with the same rows is harmless."""
    name = dataset if isinstance(dataset, str) else dataset.name
    if isinstance(dataset, Dataset):
        dataset.check(table.schema, f"{name} shard {number}")
    return write_file(storage, name, shard_name(number), encode_table(table), lineage, rows=table.num_rows)


def write_file(
    storage: Storage, name: str, file: str, data: bytes | memoryview, lineage: Lineage, rows: int = 0,
    read_soon: bool = True,
) -> Shard:  # fmt: skip
    """Store one file of a dataset that is not a table (a model, an index), with its receipt."""
    checksum = storage.write_bytes(f"{name}/{file}", data, read_soon=read_soon)
    return leave_receipt(storage, name, Shard(file, rows, len(data), checksum), lineage)


def put_large_file(storage: Storage, name: str, file: str, local: str | Path, lineage: Lineage, rows: int = 0) -> Shard:
    """Store a local file too large for memory as one file of a dataset, with its receipt."""
    digest = hashlib.sha256()
    size = 0
    with open(local, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            size += len(block)
    storage.put_file(local, f"{name}/{file}")
    return leave_receipt(storage, name, Shard(file, rows, size, digest.hexdigest()), lineage)


def leave_receipt(storage: Storage, name: str, shard: Shard, lineage: Lineage) -> Shard:
    """Note that a shard of this lineage is finished, and by which version of the code."""
    receipt = {"fingerprint": lineage.fingerprint, "code_version": code_version(), **asdict(shard)}
    storage.write_bytes(_receipt_path(name, shard.name), json.dumps(receipt).encode(), lasting=False)
    return shard


def withdraw_receipt(storage: Storage, name: str, file: str) -> None:
    """Let a file not count as finished, if it does: it is about to be made anew."""
    storage.remove(_receipt_path(name, file))


def _receipt_path(name: str, file: str) -> str:
    return f"{name}/{RECEIPTS}/{file}.json"


def finished_shard(storage: Storage, dataset: Dataset | str, file: int | str, lineage: Lineage) -> Shard | None:
    """The shard that an interrupted attempt of the same lineage and code finished, checked byte for byte; else None."""
    found = finished_file(storage, dataset, file, lineage)
    return None if found is None else found[0]


def finished_file(
    storage: Storage, dataset: Dataset | str, file: int | str, lineage: Lineage
) -> tuple[Shard, bytes] | None:
    """As finished_shard, with what the shard holds."""
    name = dataset if isinstance(dataset, str) else dataset.name
    file = shard_name(file) if isinstance(file, int) else file
    try:
        receipt = storage.read_with(_receipt_path(name, file), json.loads)
        if (receipt.pop("fingerprint"), receipt.pop("code_version")) != (lineage.fingerprint, code_version()):
            return None
        shard = Shard(**receipt)
        return (shard, storage.read_with(f"{name}/{file}", shard.check)) if shard.name == file else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_file(storage: Storage, manifest: Manifest, file: str) -> bytes:
    """One file of a dataset, checked against the manifest. Raises DataError if it is gone or was changed."""
    shard = next((shard for shard in manifest.shards if shard.name == file), None)
    if shard is None:
        raise DataError(f"{manifest.dataset} has no file {file}; {how_to_build(manifest.dataset)}")
    return read_stored(storage, manifest.dataset, shard)


def read_shard(storage: Storage, manifest: Manifest, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """One shard as a table, checked against the manifest, whose writer checked the schema."""
    data = read_stored(storage, manifest.dataset, manifest.shards[number])
    return decode_table(data, columns)


def read_rows(
    storage: Storage, manifest: Manifest, start: int, stop: int, columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows [start, stop) in the dataset's order, from the shards that hold them."""
    parts = overlapping(manifest, start, stop)
    return pa.concat_tables(read_shard(storage, manifest, n, columns).slice(a, b - a) for n, a, b in parts)


def overlapping(manifest: Manifest, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The shards that hold rows [start, stop), and which of their own rows; no row of the last, if none does."""
    first, found = 0, False
    for number, shard in enumerate(manifest.shards):
        low, high = max(start, first), min(stop, first + shard.rows)
        if low < high or (not found and number == len(manifest.shards) - 1):
            found = True
            yield number, max(0, low - first), max(0, low - first, high - first)
        first += shard.rows


def shard_of_rows(manifest: Manifest, start: int, stop: int) -> int | None:
    """The shard of just the rows [start, stop), at least one, if there is such a shard."""
    first = 0
    for number, shard in enumerate(manifest.shards):
        if first == start and shard.rows == stop - start > 0:
            return number
        first += shard.rows
    return None


def read_table(storage: Storage, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
    """The whole dataset in memory: only for what is known to be small."""
    return read_rows(storage, manifest, 0, manifest.num_rows, columns)


def read_stored(storage: Storage, name: str, shard: Shard) -> bytes:
    """A file of the dataset of that name, checked. Raises DataError if it is gone or was changed."""
    with _as_written(storage, name, shard) as path:
        return storage.read_with(path, shard.check)


class Digest(Protocol):
    """What hashlib's objects are."""

    def update(self, data: memoryview, /) -> None:
        """Take in what follows."""

    def hexdigest(self) -> str:
        """Of all that was taken in."""


def load_stored(storage: Storage, name: str, shard: Shard, digest: Digest, expected: str) -> memoryview:
    """As read_stored, for the caller to change; on a local disk checked by another digest, whose text is known."""
    if not storage.is_local:
        return memoryview(bytearray(read_stored(storage, name, shard)))
    with _as_written(storage, name, shard) as path:
        data = storage.load(path, digest.update)
        if len(data) != shard.bytes or digest.hexdigest() != expected:
            raise ValueError(f"it has {len(data):,} bytes, expected {shard.bytes:,} bytes of another digest")
        return data


@contextmanager
def _as_written(storage: Storage, name: str, shard: Shard) -> Iterator[str]:
    """The path of a file; DataError for what reading and checking it raise."""
    path = f"{name}/{shard.name}"
    try:
        yield path
    except FileNotFoundError:
        remedy = how_to_build(name, "again")
        raise DataError(f"{storage.locate(path)} is in the manifest but not there; {remedy}") from None
    except ValueError as error:
        raise DataError(
            f"{storage.locate(path)} was changed after its manifest was written: {error}; {how_to_build(name, 'again')}"
        ) from None


# ------------------------------------------------------------------------------------------------ arrays and Arrow


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as a single array, without a copy where it is one already: Arrow's own combining makes one always."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def vectors_to_arrow(matrix: NDArray[np.floating]) -> pa.FixedSizeListArray:
    """[N, width] float32 or float16 as one fixed-size-list column."""
    values = pa.array(np.ascontiguousarray(matrix).reshape(-1))
    field = pa.field("element", values.type, nullable=False)
    return pa.FixedSizeListArray.from_arrays(values, type=pa.list_(field, matrix.shape[1]))


def arrow_to_vectors(column: pa.ChunkedArray | pa.FixedSizeListArray) -> NDArray[np.floating]:
    """A fixed-size-list column as [N, width]."""
    array = one_array(column)
    values: NDArray[np.floating] = array.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(array), array.type.list_size)


def lists_to_arrow(indptr: NDArray[np.integer], values: NDArray[Any]) -> pa.ListArray:
    """Row r is values[indptr[r]:indptr[r + 1]], as one list column of non-null elements."""
    offsets, elements = list_offsets(indptr), pa.array(values)
    field = pa.field("element", elements.type, nullable=False)
    return pa.ListArray.from_arrays(offsets, elements, type=pa.list_(field))


def list_offsets(indptr: NDArray[np.integer]) -> pa.Array:
    """Offsets of a list column as Arrow wants them, 32-bit; DataError for more entries than they can count."""
    if indptr[-1] > _MAX_LIST_ENTRIES:
        raise DataError(
            f"the lists of one shard or input piece have {indptr[-1]:,} entries, and a column holds at most "
            f"{_MAX_LIST_ENTRIES:,}; lower resources.rows_per_shard or resources.events_per_shard, or cut the input "
            "into smaller files or row groups"
        )
    return pa.array(indptr, pa.int32())


def arrow_to_lists(column: pa.ChunkedArray | pa.ListArray) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """A list column as (indptr [N + 1], values), with indptr from 0."""
    array = one_array(column)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
    return offsets - offsets[0], values


@lru_cache(maxsize=1)
def code_version() -> str:
    """The version of this package, kept with every dataset."""
    try:
        return packages.version("pinsage-pipeline")
    except packages.PackageNotFoundError:
        return "unpackaged"


def _digest(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
