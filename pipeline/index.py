"""Embeddings to a FAISS index that states its own recall.

Reads embeddings, writes index: index.faiss (and lists.ivfdata where it is too large for memory), trained.faiss, the
keys both ways, and recall.json. A sample trains the quantizer in the driver; Spark tasks add the shards to copies of
it, side by side; the parts are merged, and the search is widened until it finds what exact search finds as often as the
settings ask. Scores are inner products. The bytes are the same every time: what the clock said lies in `index-log`.
Time: one pass over a part of the embeddings for the sample, one over all of them for adding, checking and exact search.
Memory and disk: see `ann/building.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from pyspark import SparkContext

from pipeline import report
from pipeline.ann import building, parts, recall, training, trial
from pipeline.ann.building import TRAINED, Part, Queries, Source
from pipeline.ann.choice import Choice, check_given, choose, make
from pipeline.ann.devices import Floats, uses_gpu
from pipeline.ann.reader import INDEX_FILE, KEYS_FILE, LISTS_FILE, LOOKUP_FILE, RECALL_FILE, Index, open_files
from pipeline.ann.searching import compared
from pipeline.contracts import datasets
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, Manifest, Shard
from pipeline.contracts.errors import DataError, SettingsError
from pipeline.contracts.replica import check_room, copy_in, home_of, kept_in, remove_others
from pipeline.contracts.schemas import EMBEDDINGS, INDEX, INDEX_LOG, INDEX_PARTS
from pipeline.contracts.storage import Storage
from pipeline.spark import progress, say

__all__ = ["Index", "run"]

OVERDRAWN = 5
"""So many times the queries are drawn, to ask for items that have no copies where most have."""
OVERFULL = 50
"""A list so many times the mean makes its queries slow: worth a warning."""
NOTE, REFUSED = "trained.json", "refused.txt"
"""Where a trained quantizer comes from; why a former one does not do."""
UNEVEN = 4.0
"""So much more is compared than if all lists were equal: worth a warning."""


@dataclass(frozen=True)
class Trained:
    """A trained, empty index: its file, where it comes from, and how its lists took the sample it was trained on."""

    index: faiss.Index
    origin: dict[str, Any]
    few: str | None


@dataclass
class Build:
    """What all steps of one build share; seconds of each step go to the log.

    The source's lineage, which scratch files and receipts have, also names the factory and the device: the next attempt
    may find another. The index is of lineage, that of the stage.
    """

    spark: SparkContext
    source: Source
    lineage: Lineage
    settings: Settings
    choice: Choice
    gpu: bool
    width: int
    seconds: dict[str, float]
    speeds: list[dict[str, Any]]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the block's seconds under a name."""
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


def run(spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Build the index, tune it, measure it; an interrupted build goes on after the last finished file."""
    embeddings = datasets.open_manifest(storage, EMBEDDINGS)
    if embeddings.num_rows == 0:
        raise DataError(f"{storage.locate(EMBEDDINGS.name)} is empty: there is nothing to index; look at the items")
    gpu = uses_gpu(settings.resources.index.device)
    width = _width(storage, embeddings)
    choice = choose_index(settings, embeddings.num_rows, width, gpu)
    datasets.begin(storage, INDEX)
    inputs = {**lineage.inputs, "factory": choice.factory, "device": "cuda" if gpu else "cpu"}
    source = Source(storage, embeddings, replace(lineage, inputs=inputs), settings.resources.threads)
    build = Build(spark, source, lineage, settings, choice, gpu, width, {}, [])
    with parts.omp_threads(settings.resources.index.threads or settings.resources.threads):
        _build(build)
    storage.delete(INDEX_PARTS)


def choose_index(settings: Settings, num_vectors: int, width: int, gpu: bool) -> Choice:
    """The factory string that the settings mean. Raises SettingsError before any work if it cannot be built or held."""
    task = settings.task.index
    if task.factory == "auto":
        merging = int(settings.resources.index.merge_memory)
        return choose(num_vectors, width, task.memory, task.recall_target, task.train_rows, gpu, merging)
    choice = check_given(task.factory, num_vectors, width, task.memory)
    trial.attempt(task.factory, width)
    return choice


def _build(build: Build) -> None:
    task, source = build.settings.task.index, build.source
    num_vectors = source.embeddings.num_rows
    k = min(task.k, num_vectors - 1)
    count = min(task.num_queries, num_vectors // 2)
    empty = make(build.choice.factory, build.width)
    lists = parts.inverted_lists(empty)
    nlist = None if lists is None else int(lists.nlist)
    on_disk = _merges_on_disk(build, empty)
    size = training.sample_size(num_vectors, nlist, task.train_rows)
    say(f"index: {build.choice.factory} ({build.choice.reason}), about {build.choice.bytes:,} bytes")
    with build.timed("sample"):
        rows = [shard.rows for shard in source.embeddings.shards]
        drawn = training.draw(rows, size, OVERDRAWN * 2 * count, build.settings.task.seed)
        sample, queries, ids = building.take_sample(build.spark, source, drawn)
    order = np.random.default_rng([build.settings.task.seed, 3]).permutation(len(ids))
    order = order[recall.singles_first(queries[order])][: 2 * count]
    order = np.concatenate([order[::2], order[1::2]])  # as many of each kind to tune on as to measure on
    queries, ids = np.ascontiguousarray(queries[order]), ids[order]
    asked = Queries(queries, ids, recall.depth(k))
    with _local_folder(build) as folder:
        while True:
            trained = _trained(build, sample)
            made, index, stored = _add_and_merge(build, trained, asked, on_disk, folder)
            with build.timed("tune"):
                found = _measure(build, index, asked, count, k, made)
            if found["reached"] or "from" not in trained.origin:
                break
            _refuse_former(build, f"recall {found['recall']:.4f} with it is below the target {task.recall_target:g}")
        _publish(build, trained, made, stored, found, folder)


# ------------------------------------------------------------------------------------------------ steps


@contextmanager
def _local_folder(build: Build) -> Iterator[str]:
    """An empty folder below the cache for the files of the index; what a killed attempt left there is removed."""
    home = home_of(build.source.storage, INDEX_PARTS, build.settings.resources.cache)
    folder = copy_in(home, build.source.lineage.fingerprint, "merge")
    with kept_in(home, "the index while it is merged"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    remove_others(folder)
    try:
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _merges_on_disk(build: Build, empty: faiss.Index) -> bool:
    limit = int(build.settings.resources.index.merge_memory)
    if build.choice.bytes <= limit:
        return False
    if parts.can_lie_on_disk(empty):
        return True
    raise SettingsError(
        f"{build.choice.factory} takes about {build.choice.bytes:,} bytes, more than resources.index.merge_memory "
        f"({limit:,}), and FAISS cannot keep this kind on disk; raise it on a driver that has the memory, or set "
        "task.index.memory, so that a smaller index is chosen"
    )


def _trained(build: Build, sample: Floats) -> Trained:
    """From an interrupted attempt, from an earlier night while it holds, or trained now."""
    source = build.source
    stored, noted = source.content(TRAINED), source.content(NOTE)
    if stored is not None and noted is not None:
        note = json.loads(noted)
        return Trained(_deserialize(stored), note["origin"], note["few"])
    index, origin = _former(build, sample)
    if index is None:
        with build.timed("train"), progress("index: train", len(sample)) as advance:
            index = training.train(sample, build.choice.factory, build.settings.task.seed, build.gpu)
            advance(len(sample))
        origin["condition"] = training.condition(index, sample, build.gpu)
    few = training.few_points(index, len(sample)) if "from" not in origin else None
    data = faiss.serialize_index(index).data
    origin["sha256"] = hashlib.sha256(data).hexdigest()
    source.keep(TRAINED, data)
    source.keep(NOTE, json.dumps({"origin": origin, "few": few}).encode())
    return Trained(index, origin, few)


def _former(build: Build, sample: Floats) -> tuple[faiss.Index | None, dict[str, Any]]:
    """The trained index of the earlier night, if it may serve again, and where it is from; else None, and why not."""
    url, source = build.settings.task.data.previous, build.source
    if url is None or not build.settings.task.index.reuse:
        return None, {}
    refused = source.content(REFUSED)
    if refused is not None:
        return None, {"retrained": refused.decode()}
    earlier = Storage(url)
    manifest = datasets.find_manifest(earlier, INDEX)
    if manifest is None or not any(shard.name == TRAINED for shard in manifest.shards):
        return None, {"retrained": "the earlier run has no trained index"}
    factory, then = manifest.metadata["factory"], manifest.metadata["trained"]
    if factory != build.choice.factory:
        return None, {"retrained": f"the earlier index is {factory}"}
    index = _deserialize(datasets.read_file(earlier, manifest, TRAINED))
    if index.d != sample.shape[1]:
        return None, {"retrained": f"the earlier index has {index.d} dimensions"}
    why = training.still_holds(training.condition(index, sample, build.gpu), then["condition"])
    if why is not None:
        say(f"index: the quantizer of {url} is not used again: {why}")
        return None, {"retrained": why}
    say(f"index: the quantizer of {url} is used again")
    return index, {"from": then.get("from", manifest.content), "condition": then["condition"]}


def _refuse_former(build: Build, why: str) -> None:
    """Note, also for a restart, that the former quantizer does not do; parts made with it no longer count."""
    say(f"index: the former quantizer does not do: {why}; training anew")
    build.source.keep(REFUSED, why.encode())
    for name in (TRAINED, NOTE):
        build.source.storage.remove(f"{INDEX_PARTS}/{name}")


def _add_and_merge(
    build: Build, trained: Trained, asked: Queries, on_disk: bool, folder: str
) -> tuple[list[Part], faiss.Index, list[Shard]]:
    """The parts, the filled index, and its stored files."""
    inputs = {**build.source.lineage.inputs, TRAINED: trained.origin["sha256"]}
    source = replace(build.source, lineage=replace(build.source.lineage, inputs=inputs))
    in_parts = parts.can_be_merged(trained.index)
    with build.timed("add, search exactly"):
        made = building.add_parts(build.spark, source, asked, build.gpu, in_parts)
    names = [INDEX_FILE, LISTS_FILE] if on_disk else [INDEX_FILE]
    stored = [datasets.finished_shard(source.storage, INDEX, name, source.lineage) for name in names]
    local = [os.path.join(folder, name) for name in names]
    if None in stored:
        with build.timed("merge"), progress("index: merge", build.source.embeddings.num_rows):
            with kept_in(Path(folder), "the index while it is merged"):  # FAISS dies where a file it maps cannot grow
                check_room(Path(folder), building.merge_bytes(source, made, build.choice.bytes))
            if in_parts:
                index = building.merge_parts(source, made, folder, local[1] if on_disk else None)
            else:
                index = building.build_here(source, trained.index)
            faiss.write_index(index, local[0])
            rows = (source.embeddings.num_rows, 0)
            stored = [
                datasets.put_large_file(source.storage, INDEX.name, name, file, source.lineage, count)
                for name, file, count in zip(names, local, rows, strict=False)
            ]
    else:
        files = [shard for shard in stored if shard is not None]
        index = open_files(source.storage, files, folder, verify=not source.storage.is_local)
    return made, index, [shard for shard in stored if shard is not None]


def _measure(build: Build, index: faiss.Index, asked: Queries, count: int, k: int, made: list[Part]) -> dict[str, Any]:
    """Tune on the first half of the queries, measure on the second; plain values, the same for equal runs."""
    target = build.settings.task.index.recall_target
    sizes = parts.list_sizes(index)
    found: dict[str, Any] = {
        "k": k, "target": target, "num_vectors": int(index.ntotal), "num_queries": count,
        "nlist": None if sizes is None else len(sizes),
    }  # fmt: skip
    if sizes is not None:
        found["lists"] = {
            "imbalance": training.spread(sizes), "empty": int((sizes == 0).sum()), "largest": int(sizes.max()),
            "mean": float(sizes.mean()),
        }  # fmt: skip
    if k < 1:
        return found | {"recall": 1.0, "reached": True, "search": {}, "curve": [], "tried": [], "compared": 0.0}
    exact = building.true_neighbours(build.source, made)
    halves = np.arange(len(asked.ids)) < count
    used = recall.telling(asked.vectors, exact, k)
    tuning, fresh = np.flatnonzero(used & halves), np.flatnonzero(used & ~halves)
    if not (len(tuning) and len(fresh)):
        tuning, fresh = np.flatnonzero(halves), np.flatnonzero(~halves)
    found |= {"num_queries": len(fresh), "copies": int((~used).sum())}
    search, tried = recall.tune(index, asked.vectors[tuning], asked.ids[tuning], exact.rows(tuning), k, target)
    vectors, ids = asked.vectors[fresh], asked.ids[fresh]
    curve: list[dict[str, Any]] = []
    for around in recall.wider(index, search):
        share = float(recall.hits(index, vectors, ids, exact.rows(fresh), k, around).mean())
        seen = compared(index, vectors, around, sizes)
        curve.append({"search": around, "width": next(iter(around.values()), 0), "recall": share, "compared": seen})
        speed = recall.queries_per_second(index, vectors, k, around)
        build.speeds.append({"search": around, "recall": share, "queries_per_second": speed})
    own = next(point for point in curve if point["search"] == search)
    return found | {
        "recall": own["recall"], "reached": bool(own["recall"] >= target), "search": search,
        "compared": own["compared"], "curve": curve, "tried": tried,
    }  # fmt: skip


def _publish(
    build: Build, trained: Trained, made: list[Part], stored: list[Shard], found: dict[str, Any], folder: str
) -> None:
    """The keys, the report, the manifest; then what the clock said."""
    source = build.source
    found |= {
        "factory": build.choice.factory, "reason": build.choice.reason, "trained": trained.origin,
        "bytes_per_vector": round(sum(shard.bytes for shard in stored) / found["num_vectors"], 1),
        "warnings": _warnings(trained, found),
    }  # fmt: skip
    for warning in found["warnings"]:
        say(f"index: {warning}")
    keys = building.write_key_tables(source, made, folder)
    rows = source.embeddings.num_rows
    stored += [
        datasets.put_large_file(source.storage, INDEX.name, name, file, source.lineage, rows)
        for name, file in zip((KEYS_FILE, LOOKUP_FILE), keys, strict=True)
    ]
    data = building.trained_file(source, trained.origin["sha256"])
    stored.append(datasets.write_file(source.storage, INDEX.name, TRAINED, data, source.lineage))
    text = json.dumps(found, indent=1, sort_keys=True).encode()
    stored.append(datasets.write_file(source.storage, INDEX.name, RECALL_FILE, text, source.lineage))
    if all(shard.name != LISTS_FILE for shard in stored):  # an earlier build here may have had its lists apart
        source.storage.remove(f"{INDEX.name}/{LISTS_FILE}")
    metadata = {name: found[name] for name in ("recall", "search", "factory", "trained")}
    datasets.commit(source.storage, INDEX, stored, build.lineage, metadata)
    clock = {"seconds": build.seconds, "speeds": build.speeds, "threads": faiss.omp_get_max_threads()}
    source.storage.write_bytes(f"{INDEX_LOG}/clock.json", json.dumps(clock, indent=1).encode())
    source.storage.write_bytes(f"{INDEX_LOG}/report.html", report.index_page(found, clock).encode())


def _warnings(trained: Trained, found: dict[str, Any]) -> list[str]:
    """What is legal and still not as it should be."""
    warnings = [trained.few] if trained.few else []
    lists = found.get("lists")
    if lists and lists["imbalance"] > UNEVEN:
        warnings.append(f"the lists are uneven: {lists['imbalance']:.1f} times the comparisons of equal ones")
    if lists and lists["largest"] > OVERFULL * lists["mean"]:
        warnings.append(f"the largest list has {lists['largest']:,} vectors, {lists['mean']:,.0f} on average")
    if lists and lists["empty"] > found["nlist"] / 10:
        warnings.append(f"{lists['empty']:,} of {found['nlist']:,} lists are empty")
    if not found["reached"]:
        warnings.append(f"recall@{found['k']} is {found['recall']:.4f}, below the target {found['target']:g}")
    return warnings


def _width(storage: Storage, embeddings: Manifest) -> int:
    number = next(number for number, shard in enumerate(embeddings.shards) if shard.rows)
    return int(datasets.read_shard(storage, embeddings, number, ["embedding"]).schema.field("embedding").type.list_size)


def _deserialize(data: bytes) -> faiss.Index:
    return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
