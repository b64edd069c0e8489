"""Random walks on a graph that no host holds: walkers move in supersteps, many in one row.

A row is (source, node, count): so many of the source's walks stand at the node. The owner of the node's list splits it
over the list's entries by drawing, and equal rows are added up before they are sent on, so a first hop is as many rows
as the item has users, never one per walk. Every hop is two shuffles; its visits go to the source's owner, who counts.
Each side's rows are cut into cells that bound a task's memory, and what a hub's cell receives is cut into parts, tasks
of their own. Draws are keyed by (seed, source, node, hop, cell, part): the same for every attempt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline.contracts.datasets import Lineage, Manifest, arrow_to_lists, read_shard
from pipeline.contracts.errors import SettingsError
from pipeline.contracts.replica import padded
from pipeline.contracts.sharding import shard_bounds, shard_of, stage_seed
from pipeline.contracts.storage import Storage
from pipeline.exchange import MAX_DESTINATIONS, destination_rows, gather, scatter
from pipeline.mixing import GOLDEN, mix
from pipeline.walk_kernel import pick

WALKERS = pa.schema([("source", pa.uint32()), ("node", pa.uint32()), ("count", pa.uint32())])
_CELL_VISITS = 1 << 24
"""Visits that one task counts at once, about 30 bytes each."""
_TASK_ROWS = 1 << 24
"""Rows that one task moves; a hub's cell gets more and is shared out."""
_DRAWS = 1 << 22


@dataclass(frozen=True)
class Walk:
    """How long and how often to walk."""

    num_walks: int
    max_hops: int
    restart_probability: float
    seed: int


@dataclass(frozen=True)
class Counted:
    """Where the visits of every source are: an exchange per hop, by cells of items."""

    visits: tuple[Manifest, ...]
    cells_per_shard: int


def move_walkers(
    spark: SparkContext, storage: Storage, lineage: Lineage, item_users: Manifest, user_items: Manifest, walk: Walk,
    scratch: str,
) -> Counted:  # fmt: skip
    """Walk from every item; the visits lie in scratch datasets below `scratch`, which are the caller's to delete.

    Raises SettingsError for more walks than there may be cells for.
    """
    items, users = _Side(item_users, walk.num_walks * 2), _Side(user_items, walk.num_walks * 2)
    cells = max(2 * items.num_cells, users.num_cells)
    if cells > MAX_DESTINATIONS:
        raise SettingsError(
            f"{walk.num_walks:,} walks from each of {items.num_rows:,} items are sent to {cells:,} places, at most "
            f"{MAX_DESTINATIONS:,}; lower task.walks.num_walks, or set task.walks.estimator: exact"
        )
    visits: list[Manifest] = []
    for hop in range(walk.max_hops):
        name, last = f"{scratch}/hop{hop + 1}", hop + 1 == walk.max_hops
        standing = None if hop == 0 else (visits[-1], items.num_cells)

        def to_users(cell: _Cell, hop: int = hop, standing: _Standing = standing) -> tuple[pa.Table, Any]:
            moved = _moved(storage, items, cell, standing, walk, 2 * hop)
            return moved, shard_of(moved["node"].to_numpy(), users.num_rows, users.num_cells)

        asked = _step(spark, storage, lineage, f"{name}-users", items, standing, to_users, users.num_cells)

        def to_items(cell: _Cell, hop: int = hop, last: bool = last, asked: Manifest = asked) -> tuple[pa.Table, Any]:
            seen = _moved(storage, users, cell, (asked, 0), walk, 2 * hop + 1)
            counted = shard_of(seen["source"].to_numpy(), items.num_rows, items.num_cells)
            if last:
                return seen, counted
            left = survivors(seen, walk, hop, cell.number, cell.part)
            onward = shard_of(left["node"].to_numpy(), items.num_rows, items.num_cells) + items.num_cells
            return pa.concat_tables([seen, left]), np.concatenate([counted, onward])

        destinations = items.num_cells * (1 if last else 2)
        visits.append(_step(spark, storage, lineage, f"{name}-items", users, (asked, 0), to_items, destinations))
        storage.delete(asked.dataset)
    return Counted(tuple(visits), items.cells_per_shard)


def counted_visits(
    storage: Storage, counted: Counted, cell: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.int64]]:
    """The visits of the cell's items: (source, item, visits), sorted by source and item, without the source itself."""
    arrived = pa.concat_tables([gather(storage, hop, cell, WALKERS) for hop in counted.visits])
    sources, nodes, counts = (arrived[name].to_numpy() for name in WALKERS.names)
    others = sources != nodes
    return added_up(sources[others], nodes[others], counts[others])


def top_visits(
    visits: tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.int64]], start: int, stop: int,
    num_neighbours: int, ranks: NDArray[np.uint8],
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """The most visited items of the sources [start, stop), as walk_kernel.visit_counts gives them."""
    sources, nodes, counts = visits
    order = np.lexsort((nodes, -ranks[nodes].astype(np.int16), -counts, sources))
    sources, nodes, counts = sources[order], nodes[order], counts[order]
    bounds = np.searchsorted(sources, np.arange(start, stop + 1))
    lengths = np.minimum(np.diff(bounds), num_neighbours)
    rows = np.arange(stop - start)
    ids = padded(bounds, nodes, rows, num_neighbours, np.uint32)
    return ids, padded(bounds, counts, rows, num_neighbours, np.int64), lengths


def survivors(rows: pa.Table, walk: Walk, hop: int, cell: int, part: int) -> pa.Table:
    """The walks of each row that go on after a hop: each with 1 - restart_probability, drawn for itself.

    Other cells and parts have rows of the same source and node: their walks must not go on together.
    """
    sources, nodes, counts = added_up(*(rows[name].to_numpy() for name in WALKERS.names))
    key = np.uint64(stage_seed(walk.seed, f"stop {hop} cell {cell} part {part}"))
    left = _surviving(sources, nodes, counts, key, 1.0 - walk.restart_probability)
    going = left > 0
    return pa.table([sources[going], nodes[going], left[going]], schema=WALKERS)


def added_up(
    sources: NDArray[np.uint32], nodes: NDArray[np.uint32], counts: NDArray[np.integer]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.int64]]:
    """Rows of equal source and node as one, sorted by source and node."""
    keys = (sources.astype(np.uint64) << np.uint64(32)) | nodes
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    firsts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
    totals = np.add.reduceat(counts[order].astype(np.int64), firsts) if len(keys) else np.zeros(0, np.int64)
    kept = keys[firsts]
    return (kept >> np.uint64(32)).astype(np.uint32), kept.astype(np.uint32), totals


class _Side:
    """The items or the users: their lists, and how their rows are cut into cells."""

    def __init__(self, lists: Manifest, visits_per_row: int) -> None:
        self.lists, self.num_rows, self.num_shards = lists, lists.num_rows, len(lists.shards)
        rows = max(1, -(-self.num_rows // self.num_shards))
        self.cells_per_shard = max(1, min(rows, -(-rows * visits_per_row // _CELL_VISITS)))
        self.num_cells = self.num_shards * self.cells_per_shard


class _Cell(NamedTuple):
    """A task: a cell, and which part of the rows that stand there."""

    number: int
    part: int = 0
    num_parts: int = 1


_Standing = tuple[Manifest, int] | None
"""Where the walkers are: the exchange they were sent through and the destination of the first cell; None: at home."""


def _step(
    spark: SparkContext, storage: Storage, lineage: Lineage, name: str, side: _Side, standing: _Standing,
    move: Callable[[_Cell], tuple[pa.Table, Any]], num_destinations: int,
) -> Manifest:  # fmt: skip
    """One shuffle: a task per cell, several for a cell where many rows stand."""
    label = f"walks: {name.rsplit('/', 1)[-1]}"
    tasks = [_Cell(number) for number in range(side.num_cells)]
    if standing is not None:
        arrived, first = standing
        rows = destination_rows(spark, storage, arrived, f"{label}, rows")[first : first + side.num_cells]
        parts = np.clip(-(-rows // _TASK_ROWS), 1, len(arrived.shards))
        tasks = [_Cell(number, part, int(count)) for number, count in enumerate(parts) for part in range(count)]
    return scatter(
        spark, storage, name, lineage, len(tasks), lambda number: move(tasks[number]), num_destinations, label
    )


def _moved(storage: Storage, side: _Side, cell: _Cell, standing: _Standing, walk: Walk, step: int) -> pa.Table:
    """The walks that stand in a cell, or at first one row per item, one step further on."""
    shard = cell.number // side.cells_per_shard
    table = read_shard(storage, side.lists, shard, ["neighbours", "shares"])
    indptr, ids = arrow_to_lists(table.column("neighbours"))
    shares = arrow_to_lists(table.column("shares"))[1]
    first = shard_bounds(side.num_rows, side.num_shards, shard)[0]
    if standing is None:
        start, stop = shard_bounds(side.num_rows, side.num_cells, cell.number)
        nodes = np.arange(start, stop, dtype=np.uint32)[np.diff(indptr)[start - first : stop - first] > 0]
        sources, counts = nodes, np.full(len(nodes), walk.num_walks, np.int64)
    else:
        arrived = gather(storage, standing[0], standing[1] + cell.number, WALKERS, cell.part, cell.num_parts)
        sources, nodes, counts = added_up(*(arrived[name].to_numpy() for name in WALKERS.names))
    key = stage_seed(walk.seed, f"step {step} part {cell.part}")
    return split(sources, nodes, counts, (indptr, ids, shares), first, np.uint64(key))


def split(
    sources: NDArray[np.uint32], nodes: NDArray[np.uint32], counts: NDArray[np.int64],
    lists: tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]], first: int, key: np.uint64,
) -> pa.Table:  # fmt: skip
    """Draw an entry of its node's list for every walk; lists are the rows from `first` on. Equal ends are one row."""
    ends, done, pieces = np.cumsum(counts), 0, [WALKERS.empty_table()]
    while done < len(counts):
        before = int(ends[done - 1]) if done else 0
        stop = max(done + 1, int(np.searchsorted(ends, before + _DRAWS, side="right")))
        size = int(ends[stop - 1]) - before
        drawn_sources, drawn_nodes = np.empty(size, np.uint32), np.empty(size, np.uint32)
        chosen = slice(done, stop)
        _draw(sources[chosen], nodes[chosen], counts[chosen], *lists, first, key, drawn_sources, drawn_nodes)
        columns = added_up(drawn_sources, drawn_nodes, np.ones(size, np.int64))
        pieces.append(pa.table([columns[0], columns[1], columns[2].astype(np.uint32)], schema=WALKERS))
        done = stop
    return pa.concat_tables(pieces)


@numba.njit(cache=True, nogil=True)
def _draw(
    sources: Any, nodes: Any, counts: Any, indptr: Any, ids: Any, shares: Any, first: Any, key: Any,
    out_sources: Any, out_nodes: Any,
) -> None:  # fmt: skip
    """Every walk's next node: uniform over the list, or in proportion to its shares."""
    place, weighted = 0, len(shares) > 0
    for row in range(len(sources)):
        start = indptr[nodes[row] - first]
        degree = indptr[nodes[row] - first + 1] - start
        stream = mix(mix(key + GOLDEN) ^ mix((np.uint64(sources[row]) << np.uint64(32)) | np.uint64(nodes[row])))
        for walk in range(counts[row]):
            point = np.int64(mix(stream + np.uint64(walk) * GOLDEN) >> np.uint64(32))
            out_sources[place] = sources[row]
            out_nodes[place] = ids[pick(point, start, degree, shares, weighted)]
            place += 1


@numba.njit(cache=True, nogil=True)
def _surviving(sources: Any, nodes: Any, counts: Any, key: Any, probability: Any) -> Any:
    """A binomial draw per row."""
    left = np.zeros(len(sources), np.uint32)
    threshold = np.uint64(probability * 4294967296.0)
    for row in range(len(sources)):
        node = (np.uint64(sources[row]) << np.uint64(32)) | np.uint64(nodes[row])
        stream = mix(mix(key + GOLDEN) ^ mix(node + GOLDEN))
        for walk in range(counts[row]):
            if (mix(stream + np.uint64(walk) * GOLDEN) >> np.uint64(32)) < threshold:
                left[row] += 1
    return left
