"""Interactions at any size, with communities planted in them: `python -m infra.bench.generate --help` from the root.

    python -m infra.bench.generate --items 50000000 --users 10000000 --edges 1000000000 --out DIR

Writes DIR/interactions/part-NNNNN.parquet (user, item, timestamp in epoch seconds; with --weights also event), with
--features D also DIR/items/part-NNNNN.parquet (item, topic, content), and last DIR/generator.json. Shards are blocks of
users; rows of a user lie together in no order. The same arguments give the same bytes with any number of workers.

The model. Items lie in topics of about a thousand, topics on a ring. A user's degree is lognormal; the degrees sum to
--edges exactly, and a user has an item at most once. Of a user's items 70 % are from its topic (another topic for every
256 items), 20 % from topics up to three away, 10 % from the whole catalogue. Popularity is a power law in both: within
a topic the share of the item at relative rank u falls as u ** -0.6, in the catalogue as 1 / (rank + 3), whose first
ranks are hubs. At 17 edges an item and 57 a user: item degree median 11, 99th percentile about 100; user degree median
37, 99th percentile about 320. With --cell-items C a topic is cells of about C items, each with popular and rare
ones, of which content says nothing: three quarters of what a user has from a topic of its own are from one cell.

Keys are 40-bit numbers that say nothing of topic or popularity, unlike the generator's own numbers ("places"). Random
numbers are a hash of (seed, user, draw). A worker holds one row group: about 400 MB, whatever the size. On 2 cores 100
million edges took 22 s and 0.86 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infra.bench.measure import in_threads, num_cores
from pipeline.mixing import GOLDEN, mix
from pipeline.walk_kernel import BipartiteGraph, degree_ranks

SHARD_EDGES, SHARD_ITEMS, ROW_GROUP_EDGES = 10_000_000, 1_000_000, 1_000_000
FIRST_SECOND, LAST_SECOND = 1_672_531_200, 1_735_689_600  # 2023 and 2024
EVENTS = ("view", "save", "buy")  # 70, 25 and 5 % of the interactions
DEGREE_SIGMA = 0.93  # of the lognormal; the mean is 1.54 times the median
USER, ITEM, ROW, MOMENT = range(4)  # streams of random numbers
KEY_BITS = np.uint64((1 << 40) - 1)


@dataclass(frozen=True)
class Catalogue:
    """What is generated: sizes and seed."""

    items: int
    users: int
    edges: int
    seed: int = 0
    shard_edges: int = SHARD_EDGES
    cell_items: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.items <= 1 << 32 and 0 < self.users <= 1 << 32):
            raise ValueError(f"items {self.items} and users {self.users} must both be 1 to 2^32")
        if not 0 <= self.edges <= self.items * self.users // 4:
            raise ValueError(
                f"{self.edges} edges do not fit {self.items} items x {self.users} users: a quarter at most"
            )

    @property
    def num_topics(self) -> int:
        return max(self.items // 1024, min(16, self.items // 32), 1)

    @property
    def num_cells(self) -> int:
        """Cells of a topic; 1 where there are none."""
        return max(1, self.items // self.num_topics // self.cell_items) if self.cell_items else 1

    @property
    def num_shards(self) -> int:
        return max(1, min(math.ceil(self.edges / self.shard_edges), self.users))

    def users_of(self, shard: int) -> tuple[int, int]:
        """The shard's first user and the one after its last."""
        return shard * self.users // self.num_shards, (shard + 1) * self.users // self.num_shards


def degrees(catalogue: Catalogue) -> Iterator[NDArray[np.int64]]:
    """Shard by shard, how many items each user has: one, if there are enough edges, and a lognormal share.

    They sum to catalogue.edges, but for users at half the catalogue, who get no more (tiny catalogues only).
    """
    shards = [catalogue.users_of(shard) for shard in range(catalogue.num_shards)]
    bounds = np.cumsum([0.0] + [_shares(first, end, np.uint64(catalogue.seed)).sum() for first, end in shards])
    least = min(1, catalogue.edges // catalogue.users)
    scale = (catalogue.edges - least * catalogue.users) / bounds[-1]
    for (first, end), start, stop in zip(shards, bounds, bounds[1:], strict=False):
        upto = start + np.cumsum(_shares(first, end, np.uint64(catalogue.seed)))
        upto[-1] = stop
        edges = np.floor(np.concatenate([[start], upto]) * scale + 0.5).astype(np.int64)
        yield np.minimum(np.maximum(np.diff(edges), 0) + least, max(1, catalogue.items // 2))


def keys(numbers: NDArray[np.integer], side: int, seed: int) -> NDArray[np.int64]:
    """The outside keys of USER or ITEM numbers: a bijection of the 40-bit integers, other for each seed and side."""
    found: NDArray[np.int64] = _keys(np.asarray(numbers, np.int64), np.uint64(seed), side)
    return found


def topics(places: NDArray[np.integer], num_items: int, num_topics: int) -> NDArray[np.int32]:
    """The topic of each item, by place: topic t has the places from t * num_items // num_topics on."""
    bounds = np.arange(1, num_topics) * num_items // num_topics
    return np.searchsorted(bounds, places, side="right").astype(np.int32)


def graph(num_items: int, num_users: int, num_edges: int, seed: int = 0) -> BipartiteGraph:
    """The same model in memory, unweighted: dense item ids in random order, users' lists shuffled, items' ascending."""
    catalogue = Catalogue(num_items, num_users, num_edges, seed, shard_edges=max(1, num_edges))
    lengths = next(degrees(catalogue))
    ids = np.random.default_rng(seed).permutation(num_items).astype(np.uint32)
    user_indptr = np.concatenate([[0], np.cumsum(lengths)])
    user_items = np.empty(user_indptr[-1], np.uint32)

    def draw(users: NDArray[np.int64]) -> None:
        if len(users):
            first, stop = int(users[0]), int(users[-1]) + 1
            rows, some = lengths[first:stop], user_items[user_indptr[first] : user_indptr[stop]]
            _draw_items(first, rows, num_items, catalogue.num_topics, 1, _spread(num_items), np.uint64(seed), some)
            _shuffle_rows(first, rows, some, np.uint64(seed))
            some[:] = ids[some]

    in_threads(draw, np.arange(num_users), num_cores())
    item_indptr, item_users = transpose(user_indptr, user_items, num_items)
    return make_graph(item_indptr, item_users, user_indptr, user_items)


def make_graph(
    item_indptr: NDArray[np.int64],
    item_users: NDArray[np.uint32],
    user_indptr: NDArray[np.int64],
    user_items: NDArray[np.uint32],
) -> BipartiteGraph:
    """An unweighted graph of both directions."""
    none = np.empty(0, np.uint32)
    return BipartiteGraph(item_indptr, item_users, none, user_indptr, user_items, none, degree_ranks(item_indptr))


@numba.njit(cache=True, inline="always")
def _stream(seed: Any, kind: Any, number: Any) -> Any:
    return mix(mix(seed + GOLDEN) ^ (np.uint64(number) * GOLDEN + (np.uint64(kind) << np.uint64(56))))


@numba.njit(cache=True, inline="always")
def _uniform(bits: Any) -> Any:
    """In [0, 1)."""
    return np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@numba.njit(cache=True, nogil=True)
def _keys(numbers: Any, seed: Any, side: Any) -> Any:
    secret = _stream(seed, side, -1)
    found = np.empty(len(numbers), np.int64)
    for k in range(len(numbers)):
        value = (np.uint64(numbers[k]) + secret) & KEY_BITS
        for _ in range(2):  # each line can be undone, so no two numbers meet
            value = ((value ^ (value >> np.uint64(21))) * np.uint64(0xBF58476D1CE4E5B9)) & KEY_BITS
            value = ((value ^ (value >> np.uint64(19))) * np.uint64(0x94D049BB133111EB)) & KEY_BITS
        found[k] = np.int64(value ^ (value >> np.uint64(20)))
    return found


@numba.njit(cache=True, nogil=True)
def _shares(first: Any, end: Any, seed: Any) -> Any:
    """Lognormal weights of users [first, end)."""
    found = np.empty(end - first, np.float64)
    for user in range(first, end):
        stream = _stream(seed, USER, user)
        radius = math.sqrt(-2.0 * math.log(1.0 - _uniform(mix(stream))))
        found[user - first] = math.exp(DEGREE_SIGMA * radius * math.cos(2.0 * math.pi * _uniform(mix(stream + GOLDEN))))
    return found


def _spread(num_items: int) -> int:
    """A multiplier that sends the catalogue's popularity ranks to places all over it, each to its own."""
    multiplier = int(num_items * 0.6180339887) | 1
    while math.gcd(multiplier, num_items) != 1:
        multiplier += 2
    return multiplier


@numba.njit(cache=True, nogil=True)
def _draw_items(
    first_user: Any, lengths: Any, num_items: Any, num_topics: Any, num_cells: Any, spread: Any, seed: Any, items: Any
) -> None:  # fmt: skip
    """Each user's items, by place and without repeats, one user after another into items [lengths.sum()]."""
    capacity = 16
    while capacity < 2 * lengths.max():
        capacity *= 2
    places = np.empty(capacity, np.uint32)  # of a hash set that is emptied by counting its owner up
    owners = np.zeros(capacity, np.int64)
    head = math.log((num_items + 3.0) / 3.0)
    end = 0
    for row in range(len(lengths)):
        length = lengths[row]
        small = 16
        while small < 2 * length:
            small *= 2
        mask = np.uint64(small - 1)
        stream = _stream(seed, ROW, first_user + row)
        num_homes = np.uint64(1 + length // 256)
        start, draw = end, np.uint64(0)
        while end < start + length:
            bits = mix(stream + draw * GOLDEN)
            kind, chance = bits & np.uint64(1023), _uniform(mix(bits ^ GOLDEN))
            if draw > np.uint64(64 * length):  # its topics are used up
                place = np.int64(chance * num_items)
            elif kind >= np.uint64(922):
                rank = min(np.int64(3.0 * (math.exp(chance * head) - 1.0)), num_items - 1)
                place = rank * spread % num_items
            else:
                home = (bits >> np.uint64(10) & np.uint64(0xFFFFF)) % num_homes
                own = mix(stream ^ (home + np.uint64(1)) * GOLDEN)
                topic = np.int64(own % np.uint64(num_topics))
                if kind >= np.uint64(717):
                    away = np.int64((bits >> np.uint64(32)) % np.uint64(6))
                    topic = (topic + (away + 1 if away < 3 else 2 - away) + 3 * num_topics) % num_topics
                low = topic * num_items // num_topics
                high = (topic + 1) * num_items // num_topics
                place = low + np.int64((high - low) * chance * chance * math.sqrt(chance))
                if num_cells > 1 and kind < np.uint64(538):  # three quarters of 717
                    cell = np.int64((own >> np.uint64(32)) % np.uint64(num_cells))
                    place += cell - (place - low) % num_cells
                    place -= num_cells if place >= high else 0
            draw += np.uint64(1)
            slot = mix(np.uint64(place) + GOLDEN) & mask
            while owners[slot] == row + 1 and places[slot] != place:
                slot = (slot + np.uint64(1)) & mask
            if owners[slot] != row + 1:
                owners[slot], places[slot] = row + 1, place
                items[end] = place
                end += 1


@numba.njit(cache=True, nogil=True)
def _moments_and_events(first_user: Any, lengths: Any, seed: Any, moments: Any, events: Any) -> None:
    """Seconds between a user's first day, drawn, and the end; and event types, where events is not empty."""
    end = 0
    for row in range(len(lengths)):
        stream = _stream(seed, MOMENT, first_user + row)
        joined = FIRST_SECOND + np.int64(_uniform(mix(stream)) * 0.95 * (LAST_SECOND - FIRST_SECOND))
        for k in range(lengths[row]):
            bits = mix(stream + np.uint64(k + 1) * GOLDEN)
            moments[end] = joined + np.int64(_uniform(bits) * (LAST_SECOND - joined))
            if len(events):
                kind = bits & np.uint64(1023)
                events[end] = 0 if kind < np.uint64(717) else 1 if kind < np.uint64(973) else 2
            end += 1


@numba.njit(cache=True, nogil=True)
def _shuffle_rows(first_row: Any, lengths: Any, values: Any, seed: Any) -> None:
    """Fisher and Yates in every row: later draws met more repeats, so drawing order favours the popular."""
    start = 0
    for row in range(len(lengths)):
        stream = _stream(seed, ITEM, first_row + row)
        for k in range(lengths[row] - 1, 0, -1):
            other = start + np.int64(mix(stream + np.uint64(k) * GOLDEN) % np.uint64(k + 1))
            values[start + k], values[other] = values[other], values[start + k]
        start += lengths[row]


def transpose(
    indptr: NDArray[np.int64], values: NDArray[np.uint32], num_columns: int
) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Rows to columns by counting: indptr [num_columns + 1] and row numbers, ascending in each column.

    Every core reads all values and writes the columns of its own.
    """
    upto = np.concatenate([[0], np.cumsum(np.bincount(values, minlength=num_columns))])
    rows, place, cores = np.empty(len(values), np.uint32), upto[:-1].copy(), num_cores()
    cuts = np.searchsorted(upto, np.linspace(0, len(values), cores + 1)[1:-1]).clip(max=num_columns)
    bounds = [0, *cuts.tolist(), num_columns]
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(lambda low, high: _transpose(indptr, values, low, high, place, rows), bounds, bounds[1:]))
    return upto, rows


@numba.njit(cache=True, nogil=True)
def _transpose(indptr: Any, values: Any, low: Any, high: Any, place: Any, rows: Any) -> None:
    """Of the columns from low to high alone."""
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            if low <= values[k] < high:
                rows[place[values[k]]] = row
                place[values[k]] += 1


@numba.njit(cache=True, nogil=True)
def _hexadecimal(numbers: Any, letter: Any, text: Any) -> None:
    """letter and ten hexadecimal digits for each number: text is uint8 [11 x numbers]."""
    for k in range(len(numbers)):
        text[11 * k] = letter
        for digit in range(10):
            value = (numbers[k] >> (36 - 4 * digit)) & 15
            text[11 * k + 1 + digit] = 48 + value if value < 10 else 87 + value


def _key_array(numbers: NDArray[np.integer], side: int, seed: int, string_keys: bool) -> pa.Array:
    found = keys(numbers, side, seed)
    if not string_keys:
        return pa.array(found)
    text = np.empty(11 * len(found), np.uint8)
    _hexadecimal(found, ord("u" if side == USER else "i"), text)
    offsets = np.arange(0, len(text) + 1, 11, dtype=np.int32)
    return pa.StringArray.from_buffers(len(found), pa.py_buffer(offsets), pa.py_buffer(text))


def _write_interactions(task: tuple[Catalogue, int, NDArray[np.int64], Path, bool, bool]) -> int:
    """One shard, a row group at a time; returns its rows."""
    catalogue, shard, lengths, folder, string_keys, weights = task
    first, spread, seed = catalogue.users_of(shard)[0], _spread(catalogue.items), np.uint64(catalogue.seed)
    key = pa.string() if string_keys else pa.int64()
    schema = pa.schema([("user", key), ("item", key), ("timestamp", pa.int64())] + [("event", pa.string())] * weights)
    delta = "DELTA_LENGTH_BYTE_ARRAY" if string_keys else "DELTA_BINARY_PACKED"
    upto = np.cumsum(lengths)
    cuts = np.searchsorted(upto, np.arange(ROW_GROUP_EDGES, int(upto[-1]), ROW_GROUP_EDGES))
    options: dict[str, Any] = {
        "compression": "zstd", "compression_level": 1, "use_dictionary": ["user", "event"], "write_statistics": True,
        "column_encoding": {"item": delta, "timestamp": "DELTA_BINARY_PACKED"},
    }  # fmt: skip
    target = folder / f"part-{shard:05d}.parquet"
    with pq.ParquetWriter(target.with_suffix(".tmp"), schema, **options) as writer:
        for begin, end in zip([0, *cuts], [*cuts, len(lengths)], strict=True):
            block = lengths[begin:end]
            size, user = int(block.sum()), first + int(begin)
            items = np.empty(size, np.uint32)
            communities = catalogue.num_topics, catalogue.num_cells
            _draw_items(user, block, catalogue.items, *communities, spread, seed, items)
            moments, kinds = np.empty(size, np.int64), np.empty(size if weights else 0, np.int8)
            _moments_and_events(user, block, seed, moments, kinds)
            users = np.repeat(np.arange(user, user + len(block)), block)
            columns = [
                _key_array(users, USER, catalogue.seed, string_keys),
                _key_array(items, ITEM, catalogue.seed, string_keys),
                pa.array(moments),
            ]
            if weights:
                columns.append(pa.DictionaryArray.from_arrays(pa.array(kinds), list(EVENTS)).cast(pa.string()))
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(size, 1))
    target.with_suffix(".tmp").rename(target)
    return int(upto[-1])


def _centres(num_topics: int, first: int, end: int, width: int, seed: int) -> NDArray[np.float32]:
    """Unit vectors of topics [first, end): neighbours on the ring are alike."""
    own = {}
    for topic in {t % num_topics for t in range(first - 1, end + 1)}:
        own[topic] = np.random.default_rng([seed, topic]).standard_normal(width, np.float32)
    found = np.stack(
        [own[t] + 0.5 * (own[(t - 1) % num_topics] + own[(t + 1) % num_topics]) for t in range(first, end)]
    )
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def _write_items(task: tuple[Catalogue, int, Path, bool, int]) -> int:
    """One shard of the catalogue: unit vectors at a cosine of about 0.6 to their topic's centre; returns its rows."""
    catalogue, shard, folder, string_keys, width = task
    places = np.arange(shard * SHARD_ITEMS, min((shard + 1) * SHARD_ITEMS, catalogue.items))
    of = topics(places, catalogue.items, catalogue.num_topics)
    vectors = np.random.default_rng([catalogue.seed, 1 << 40, shard]).standard_normal((len(places), width), np.float32)
    vectors *= 4 / 3 / math.sqrt(width)
    vectors += _centres(catalogue.num_topics, int(of[0]), int(of[-1]) + 1, width, catalogue.seed)[of - of[0]]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    content = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), width)
    table = pa.table({"item": _key_array(places, ITEM, catalogue.seed, string_keys), "topic": of, "content": content})
    target = folder / f"part-{shard:05d}.parquet"
    pq.write_table(table, target.with_suffix(".tmp"), compression="zstd", compression_level=1, use_dictionary=["topic"])
    target.with_suffix(".tmp").rename(target)
    return len(places)


def write(
    catalogue: Catalogue,
    out: Path,
    workers: int = 0,
    string_keys: bool = False,
    weights: bool = False,
    features: int = 0,
) -> dict[str, Any]:
    """The whole data set under out, by that many processes (0: one for each core); returns what generator.json says."""
    started = time.perf_counter()
    folders = {"interactions": out / "interactions"} | ({"items": out / "items"} if features else {})
    for folder in folders.values():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty: name another --out, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**asdict(catalogue), "string_keys": string_keys, "weights": weights, "features": features}
    shards = (
        (catalogue, shard, lengths, folders["interactions"], string_keys, weights)
        for shard, lengths in enumerate(degrees(catalogue))
    )
    blocks = range(math.ceil(catalogue.items / SHARD_ITEMS) if features else 0)
    with nullcontext() if workers == 1 else multiprocessing.get_context("spawn").Pool(workers or None) as pool:
        spread = pool.imap_unordered if pool else map
        report["rows"] = sum(spread(_write_interactions, shards))
        sum(spread(_write_items, [(catalogue, k, folders["items"], string_keys, features) for k in blocks]))
    for name, folder in folders.items():
        report[f"{name}_bytes"] = sum(path.stat().st_size for path in folder.iterdir())
    (out / "generator.json").write_text(json.dumps(report, indent=1) + "\n")
    return {**report, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("items", "users", "edges"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 is one for each core")
    parser.add_argument("--shard-edges", type=int, default=SHARD_EDGES, help="about so many rows to a file")
    parser.add_argument(
        "--cell-items", type=int, default=0, help="about so many items to a cell of a topic; 0: no cells"
    )
    parser.add_argument("--string-keys", action="store_true", help="keys as u0123456789 and i0123456789, hexadecimal")
    parser.add_argument("--weights", action="store_true", help=f"a column event: {', '.join(EVENTS)}")
    parser.add_argument("--features", type=int, default=0, help="width of content vectors in items/; 0 is no items/")
    given = parser.parse_args()
    try:
        catalogue = Catalogue(given.items, given.users, given.edges, given.seed, given.shard_edges, given.cell_items)
        report = write(catalogue, given.out, given.workers, given.string_keys, given.weights, given.features)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
