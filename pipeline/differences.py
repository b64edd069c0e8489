"""Which rows of tonight's features and neighbours are others than in an earlier run: noted by who makes them.

The stage that makes a shard has its rows in memory. It keeps a digest of each, 8 bytes, and, if `task.data.previous`
has digests too, the rows that differ as a small dataset of the same columns. Inference then finds its changes without
reading either night's features and neighbours. Both lie below `differences`; whatever is missing there or of another
earlier run is worked out again from the digests and tonight's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline.contracts import schemas
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    Shard,
    arrow_to_lists,
    arrow_to_vectors,
    begin,
    commit,
    decode_table,
    find_manifest,
    finished_file,
    read_rows,
    write_shard,
)
from pipeline.contracts.errors import PipelineError
from pipeline.contracts.rows import describe_rows, read_range, settle, write_rows
from pipeline.contracts.schemas import Dataset
from pipeline.contracts.storage import Storage
from pipeline.digests import digest_lists, digest_rows
from pipeline.spark import Task, run_tasks

MOST = 0.5
"""Share of a shard beyond which its other rows are not kept: everything has to be made again then."""


@dataclass(frozen=True)
class Digests:
    """A digest of every row of a dataset as it is now, in the dataset's order."""

    storage: Storage
    manifest: Manifest

    @classmethod
    def find(cls, storage: Storage, dataset: Dataset) -> Digests | None:
        """Those of a run's dataset; None if there are none, or they are of other rows."""
        try:
            whole, found = find_manifest(storage, dataset), find_manifest(storage, _digests(dataset))
        except PipelineError:
            return None
        if whole is None or found is None or found.metadata["of"] != whole.content:
            return None
        return cls(storage, found)

    def read(self, start: int, stop: int) -> NDArray[np.uint64]:
        """Of rows [start, stop), as far as there are so many."""
        return read_range(self.storage, self.manifest, start, min(stop, self.manifest.num_rows))[:, 0]


class Noting:
    """What a stage notes of the shards of consecutive rows that it makes; goes along to tasks."""

    def __init__(
        self, storage: Storage, dataset: Dataset, lineage: Lineage, previous: str | None, attempt: Lineage | None = None
    ) -> None:
        """Of a dataset of that lineage, whose finished shards are those of the attempt's: None for the same."""
        self._storage, self._dataset, self._lineage = storage, dataset, lineage
        self._attempt = attempt or lineage
        self._earlier = None if previous is None else Digests.find(Storage(previous), dataset)

    def begin(self) -> None:
        """Withdraw the dataset, and what was noted of its former rows."""
        for name in (self._dataset, _digests(self._dataset), _rows(self._dataset)):
            begin(self._storage, name)

    def store(
        self, spark: SparkContext, num_shards: int, make: Callable[[int], pa.Table], label: str,
        metadata: Mapping[str, object],
    ) -> Manifest:  # fmt: skip
        """Make the dataset of what make returns for every shard's number, but those that an interrupted attempt has."""
        self.begin()
        storage, dataset, attempt = self._storage, self._dataset, self._attempt

        def work(task: Task) -> Task:
            finished = finished_file(storage, dataset, task["shard"], attempt)
            if finished is None:
                table = make(task["shard"])
                shard = write_shard(storage, dataset, task["shard"], table, attempt)
            else:
                shard, table = finished[0], decode_table(finished[1])
            return {"shard": asdict(shard), "noted": self.note(task["shard"], table)}

        results = run_tasks(spark, [{"shard": number} for number in range(num_shards)], work, label)
        shards = (Shard(**result["shard"]) for result in results)
        whole = commit(storage, dataset, shards, self._lineage, metadata)
        self.commit(whole, [result["noted"] for result in results])
        return whole

    def note(self, number: int, table: pa.Table) -> dict[str, Any]:
        """Store the digests of one shard, and its rows that differ; returns what commit needs, for JSON."""
        digests = digests_of(table)
        stored = write_rows(self._storage, _digests(self._dataset), number, digests[:, None], self._lineage)
        found: dict[str, Any] = {"digests": asdict(stored)}
        if self._earlier is not None and table.num_rows:
            start = table.column("id")[0].as_py()
            try:
                changed = differing(digests, self._earlier, start)
            except PipelineError:  # the earlier run's are damaged: tonight is not made from it then
                return found
            found["first"] = start
            if len(changed) <= MOST * table.num_rows:
                rows = write_shard(self._storage, _rows(self._dataset), number, table.take(changed), self._lineage)
                found["rows"] = asdict(rows)
        return found

    def commit(self, whole: Manifest, noted: Sequence[dict[str, Any]]) -> None:
        """Publish what was noted of all shards of the dataset."""
        digests = [Shard(**note["digests"]) for note in noted]
        settle(self._storage, _digests(self._dataset), digests)
        told = {**describe_rows("uint64", 1), "of": whole.content}
        commit(self._storage, _digests(self._dataset), digests, self._lineage, told)
        kept = [note for note in noted if "rows" in note]
        if self._earlier is not None and len(kept) == len(noted):
            told = {
                "of": whole.content, "since": self._earlier.manifest.metadata["of"],
                "firsts": [note["first"] for note in kept],
            }  # fmt: skip
            commit(self._storage, _rows(self._dataset), (Shard(**note["rows"]) for note in kept), self._lineage, told)
        else:
            self._storage.delete(_rows(self._dataset))


def find_changed(
    storage: Storage, whole: Manifest, earlier: Storage, then: Manifest, dataset: Dataset
) -> Callable[[int, int], pa.Table] | None:
    """Of rows [start, stop): those that differ from the earlier run's, and those that it has not; None if unknown.

    As the stage noted them, else by the digests of both.
    """
    try:
        noted = find_manifest(storage, _rows(dataset))
    except PipelineError:
        noted = None
    if noted is not None and (noted.metadata["of"], noted.metadata["since"]) == (whole.content, then.content):
        return lambda start, stop: _noted_rows(storage, noted, start, stop)
    digests, former = Digests.find(storage, dataset), Digests.find(earlier, dataset)
    if digests is None or former is None:
        return None

    def compare(start: int, stop: int) -> pa.Table:
        changed = differing(digests.read(start, stop), former, start)
        if not len(changed):
            return read_rows(storage, whole, start, start)
        return read_rows(storage, whole, start, stop).take(changed)

    return compare


def differing(digests: NDArray[np.uint64], earlier: Digests, start: int) -> NDArray[np.int64]:
    """Places of rows from start on whose digest is another than earlier; all of those that are new."""
    former = earlier.read(start, start + len(digests))
    is_other = np.ones(len(digests), np.bool_)
    is_other[: len(former)] = digests[: len(former)] != former
    return np.flatnonzero(is_other)


def _noted_rows(storage: Storage, noted: Manifest, start: int, stop: int) -> pa.Table:
    if start >= stop:
        return read_rows(storage, noted, 0, 0)
    firsts = np.array(noted.metadata["firsts"])
    low, high = np.searchsorted(firsts, [start, stop - 1], side="right") - 1
    ends = np.cumsum([0, *(shard.rows for shard in noted.shards)])
    rows = read_rows(storage, noted, int(ends[low]), int(ends[high + 1]))
    ids = rows.column("id").to_numpy()
    return rows.slice(np.searchsorted(ids, start), int(((ids >= start) & (ids < stop)).sum()))


def _digests(dataset: Dataset) -> str:
    return f"{schemas.DIFFERENCES}/{dataset.name}-digests"


def _rows(dataset: Dataset) -> str:
    return f"{schemas.DIFFERENCES}/{dataset.name}"


def digests_of(table: pa.Table) -> NDArray[np.uint64]:
    """A digest of every row of FEATURES or NEIGHBOURS [n], of all its bits but its id's."""
    if "features" in table.column_names:
        return digest_rows(arrow_to_vectors(table.column("features")))
    indptr, ids = arrow_to_lists(table.column("neighbours"))
    return digest_lists(indptr, ids, arrow_to_lists(table.column("weights"))[1])
