"""Embeddings of items that the catalogue does not have yet: from content and, if anybody touched them, their users.

Reads ENCODERS and, for items with users, the graph, FEATURES and NEIGHBOURS as copies mapped by this host. A new item's
neighbours are found as the stage `walks` finds them, by the estimator `exact`; then the network is computed for it and
for what it reads, two neighbourhoods deep: some milliseconds. Without users it is one row through the network. Needs no
Spark. Memory: what is mapped, beside the vectors of 64 items' neighbours' neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Manifest, open_manifest, read_shard
from pipeline.contracts.errors import DataError
from pipeline.contracts.replica import map_lists, map_vectors, padded
from pipeline.contracts.storage import Storage
from pipeline.encoders import VectorEncoder, load_encoders
from pipeline.exact_kernel import Found, exact_neighbours
from pipeline.inference.halves import as_single
from pipeline.inference.network import Array, Lists, Network
from pipeline.keys import hashed
from pipeline.neighbourhoods import composed_here, normalised
from pipeline.sources import CONTENT_PREFIX
from pipeline.walk_kernel import BipartiteGraph, degree_ranks

BATCH = 64
"""Items with users that are embedded together: of each, thousands of rows are read."""


class Newcomers:
    """A run's encoders, graph and network, ready to embed items that came after it. Threads may share it."""

    def __init__(self, storage: Storage, settings: Settings, network: Network) -> None:
        """Raises DataError if the run has no embeddings, or if they are of another model than the one beside them."""
        self._storage, self._settings, self._network = storage, settings, network
        embeddings = open_manifest(storage, schemas.EMBEDDINGS)
        for dataset in (schemas.MODEL, schemas.FEATURES, schemas.NEIGHBOURS):
            if embeddings.lineage.inputs[dataset.name] != open_manifest(storage, dataset).content:
                raise DataError(
                    f"{storage.locate(schemas.EMBEDDINGS.name)} was made of another {dataset.name} than lies beside "
                    "it: new items would not fit to it; run `pinsage inference`"
                )
        self._encoders = load_encoders(storage)
        self.num_items = embeddings.num_rows

    @property
    def vector_widths(self) -> dict[str, int]:
        """How long vectors in content must be, by the column's name in the settings."""
        return {
            block.name: block.encoder.width
            for block in self._encoders.blocks
            if isinstance(block.encoder, VectorEncoder)
        }

    def user_ids(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """The id of every user, -1 for one that the graph does not know."""
        known, order = self._users
        hashes = hashed(pa.array(keys, pa.string())).hashes
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return np.where(known[places] == hashes, order[places], -1)

    def embed(self, content: pa.Table, users: Sequence[NDArray[np.integer]] | None = None) -> NDArray[np.float32]:
        """Embeddings [n, d] of items of this content, as the table CONTENT has it, touched by these users' ids.

        As in the graph, an item of fewer users than task.graph.min_item_degree has no neighbours, and one of more than
        max_item_degree keeps so many; of a new item nobody knows when, so these are drawn.
        """
        rows = [np.unique(own) for own in users] if users is not None else [np.zeros(0, np.int64)] * content.num_rows
        degrees = np.array([len(row) for row in rows], np.int64)
        encoded = self._encoders.encode(content.append_column("degree", pa.array(degrees)))
        features = as_single(self._encoders.narrow(encoded, np.dtype(self._settings.task.features.dtype)))
        result = np.zeros((len(features), self._settings.task.model.output_dimensions), np.float32)
        limits = self._settings.task.graph
        is_alone = degrees < limits.min_item_degree
        alone, others = np.flatnonzero(is_alone), np.flatnonzero(~is_alone)
        if limits.max_item_degree:
            rows = [_some(row, limits.max_item_degree, self._settings.task.seed) for row in rows]
        if len(alone):
            nobody = np.zeros((len(alone), 1), np.int64), np.zeros((len(alone), 1), np.float32)
            result[alone] = self.through(features[alone], nobody)
        for start in range(0, len(others), BATCH):
            some = others[start : start + BATCH]
            found = self.neighbours([rows[place] for place in some])
            result[some] = self.through(features[some], (found[0].astype(np.int64), normalised(found[1])))
        if not np.isfinite(result).all():
            raise DataError("the model makes NaN or infinity of this content: it has diverged; run `pinsage train`")
        return result

    def neighbours(self, users: Sequence[NDArray[np.integer]]) -> Found:
        """The nearest items of the catalogue to new items that these users touched: ids [n, T], scores, and lengths."""
        graph, walks = self._graph, self._settings.task.walks
        lengths = np.array([len(row) for row in users], np.int64)
        shares = np.zeros(0, np.uint32)
        if len(graph.item_shares):  # a new item's users count the same
            shares = np.concatenate([_even_shares(length) for length in lengths])
        new = BipartiteGraph(
            np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(users).astype(np.uint32), shares,
            graph.user_indptr, graph.user_items, graph.user_shares, self._ranks,
            (self.num_items + np.arange(len(users))).astype(np.uint32),
        )  # fmt: skip
        found = exact_neighbours(new, np.arange(len(users)), walks.num_neighbours, walks.entry_budget)
        return composed_here(graph, self.num_items + np.arange(len(users)), found, walks)

    def through(self, features: Array, lists: Lists) -> Array:
        """Embeddings [n, d] of new items: features [n, F] as stored, neighbours [n, T]; padding weighs 0."""
        network = self._network
        hidden = network.standardise(features, np.full(len(features), -1))
        for layer in range(network.num_layers):
            hidden = self._next(layer, hidden, lists)
        return as_single(network.head(hidden))

    def _next(self, layer: int, own: Array, lists: Lists) -> Array:
        """The next vectors of items [n, d] of any kind, from their own and from what their neighbours say."""
        index, weights = self._network.lists(layer, *lists)
        used = weights > 0
        ids, places = np.unique(index[used], return_inverse=True)
        if not len(ids):
            width = self._network.project(layer, own[:1]).shape[1]
            return self._network.combine(layer, own, np.zeros((len(own), width), np.float32))
        messages = as_single(self._network.project(layer, self._hidden(layer, ids)))
        indptr = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
        if self._network.reduction == "max":
            pooled = np.zeros((len(own), messages.shape[1]), np.float32)
            np.maximum.at(pooled, np.repeat(np.arange(len(own)), np.diff(indptr)), messages[places])
        else:
            pooled = csr_matrix((weights[used], places, indptr), shape=(len(own), len(ids))) @ messages
        return self._network.combine(layer, own, pooled)

    def _hidden(self, layer: int, ids: NDArray[np.integer]) -> Array:
        """What a layer gets of items of the catalogue [n, d]."""
        hidden = self._network.standardise(as_single(self._features[ids]), ids)
        indptr, neighbours, weights = self._lists
        if not layer:
            return hidden
        width = self._settings.task.walks.num_neighbours
        lists = padded(indptr, neighbours, ids, width, np.int64), padded(indptr, weights, ids, width, np.float32)
        for before in range(layer):
            hidden = self._next(before, hidden, lists)
        return hidden

    @cached_property
    def _features(self) -> NDArray[Any]:
        manifest = open_manifest(self._storage, schemas.FEATURES)
        return np.asarray(map_vectors(self._storage, manifest, "features", self._settings.resources.cache))

    @cached_property
    def _lists(self) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
        storage, cache = self._storage, self._settings.resources.cache
        manifest = open_manifest(storage, schemas.NEIGHBOURS)
        indptr, neighbours = map_lists(storage, manifest, "neighbours", cache)
        return indptr, neighbours, map_lists(storage, manifest, "weights", cache)[1]

    @cached_property
    def _graph(self) -> BipartiteGraph:
        return BipartiteGraph.open(self._storage, self._settings.resources.cache)

    @cached_property
    def _ranks(self) -> NDArray[np.uint8]:
        ranks = self._graph.item_ranks
        return ranks if len(ranks) else degree_ranks(self._graph.item_indptr)

    @cached_property
    def _users(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Hashes of all users' keys, ascending, and their ids: 16 bytes a user."""
        hashes = np.concatenate(_key_hashes(self._storage, open_manifest(self._storage, schemas.USERS)))
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order


def content_of(table: pa.Table) -> pa.Table:
    """The content columns of what `sources.clean_items` gives."""
    return table.select([name for name in table.column_names if name.startswith(CONTENT_PREFIX)])


def _key_hashes(storage: Storage, users: Manifest) -> list[NDArray[np.uint64]]:
    return [
        hashed(read_shard(storage, users, number, ["key"]).column("key")).hashes for number in range(len(users.shards))
    ]


def _even_shares(count: int) -> NDArray[np.uint32]:
    """Running shares of edges that weigh the same, as the graph stores them."""
    return (((np.arange(1, count + 1, dtype=np.uint64)) << np.uint64(32)) // np.uint64(count) - np.uint64(1)).astype(
        np.uint32
    )


def _some(users: NDArray[np.integer], most: int, seed: int) -> NDArray[np.integer]:
    """At most so many of them, ascending."""
    if len(users) <= most:
        return users
    drawn: NDArray[np.integer] = np.sort(np.random.default_rng(seed).choice(users, most, replace=False))
    return drawn
