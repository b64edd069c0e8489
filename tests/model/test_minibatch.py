"""Blocks against a recursive oracle, and the leakage test: no list shows an edge that is being predicted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.minibatch import Blocks, Ids, NeighbourTable, build_blocks, distinct, hide

NOTHING = hide(np.zeros(0, np.uint32), np.zeros(0, np.uint32))


def table_of(lists: list[list[int]]) -> NeighbourTable:
    """Lists with weights falling from first to last, each summing to 1."""
    lengths = [len(row) for row in lists]
    weights = [np.arange(n, 0, -1) / (n * (n + 1) / 2) for n in lengths]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = [item for row in lists for item in row]
    return NeighbourTable.of(indptr, np.array(flat, np.uint32), np.concatenate(weights).astype(np.float32))


def shown(blocks: Blocks, layer: int) -> dict[int, dict[int, float]]:
    """Every list that a layer (from 1) pools, in ids, without padding."""
    result: dict[int, dict[int, float]] = {}
    for row in range(blocks.sizes[layer]):
        entries = zip(blocks.index[row], blocks.weights[row], strict=True)
        result[int(blocks.ids[row])] = {int(blocks.ids[i]): float(w) for i, w in entries if w}
    return result


def slow_blocks(table: NeighbourTable, seeds: Ids, pairs: set[tuple[int, int]], num_layers: int) -> list[set[int]]:
    """The nodes of every layer, from the features up, by sets."""
    nodes = [set(seeds.tolist())]
    for _ in range(num_layers):
        below = set(nodes[0])
        for node in nodes[0]:
            below |= set(slow_list(table, node, pairs))
        nodes.insert(0, below)
    return nodes


def slow_list(table: NeighbourTable, node: int, pairs: set[tuple[int, int]]) -> dict[int, float]:
    """A node's list without the hidden entries, scaled back to sum 1."""
    row = slice(table.indptr[node], table.indptr[node + 1])
    entries = zip(table.neighbours[row].tolist(), table.weights[row].tolist(), strict=True)
    left = {n: w for n, w in entries if (node, n) not in pairs and (n, node) not in pairs}
    return {n: w / sum(left.values()) for n, w in left.items()}


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[tuple[int, int]]]:
    """Lists of up to 12 items, distinct seeds, and pairs to hide."""
    size = draw(st.integers(1, 12))
    items = st.integers(0, size - 1)
    lists = draw(st.lists(st.lists(items, unique=True, max_size=5), min_size=size, max_size=size))
    return lists, draw(st.lists(items, unique=True)), draw(st.lists(st.tuples(items, items), max_size=6))


@settings(deadline=None)  # the first call compiles
@given(graphs(), st.integers(0, 3))
def test_blocks_hold_what_the_recursive_oracle_finds(
    graph: tuple[list[list[int]], list[int], list[tuple[int, int]]], num_layers: int
) -> None:
    lists, seeds, pairs = graph
    table, seed_ids = table_of(lists), np.array(seeds, np.uint32)
    ends = np.array(pairs, np.uint32).reshape(-1, 2)
    blocks = build_blocks(table, seed_ids, hide(ends[:, 0], ends[:, 1]), [table.width] * num_layers)
    nodes = slow_blocks(table, seed_ids, set(pairs), num_layers)
    assert blocks.sizes == tuple(len(layer) for layer in nodes)
    assert blocks.ids[: len(seeds)].tolist() == seeds
    for layer, expected in enumerate(nodes):
        assert set(blocks.ids[: blocks.sizes[layer]].tolist()) == expected
        if layer:
            for node, found in shown(blocks, layer).items():
                assert found == pytest.approx(slow_list(table, node, set(pairs)), abs=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_only_link_of_a_pair_is_seen_by_neither_end_at_any_hop(num_layers: int) -> None:
    """0 and 1 know each other and nobody else; 2 knows both, 3 knows 2: both meet again at the second and third hop."""
    table = table_of([[1], [0], [0, 1], [2]])
    seeds = np.array([3, 2, 0, 1], np.uint32)
    open_blocks = build_blocks(table, seeds, NOTHING, [2] * num_layers)
    blocks = build_blocks(table, seeds, hide(np.array([0], np.uint32), np.array([1], np.uint32)), [2] * num_layers)
    for layer in range(1, num_layers + 1):
        assert shown(open_blocks, layer)[0] == {1: 1.0}
        assert shown(blocks, layer)[0] == shown(blocks, layer)[1] == {}
        assert shown(blocks, layer)[2] == pytest.approx({0: 2 / 3, 1: 1 / 3})
    alone = build_blocks(
        table, np.array([0], np.uint32), hide(np.array([1], np.uint32), np.array([0], np.uint32)), [2] * num_layers
    )
    assert alone.ids.tolist() == [0]


def test_what_is_left_of_a_list_sums_to_one_and_other_lists_are_untouched() -> None:
    table = table_of([[1, 2, 3], [3, 2]])
    table.weights[3:] = [0.6, 0.3]
    blocks = build_blocks(table_with_rows(table, 4), np.arange(2, dtype=np.uint32), hide(*ids([0], [2])), [3])
    assert blocks.weights.tolist() == [pytest.approx([0.75, 0.25, 0]), pytest.approx([0.6, 0.3, 0])]
    assert blocks.weights[1, 0] == np.float32(0.6)


def test_many_ids_are_renumbered_as_a_sort_would() -> None:
    drawn = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32) // 7 * 7
    drawn = np.concatenate([drawn, drawn[::-3]])
    found, places = distinct(drawn, num_items=2**32)
    _, first = np.unique(drawn, return_index=True)
    np.testing.assert_array_equal(found, drawn[np.sort(first)])
    np.testing.assert_array_equal(found[places], drawn)


def ids(*lists: list[int]) -> list[NDArray[np.uint32]]:
    """Lists as id arrays."""
    return [np.array(row, np.uint32) for row in lists]


def table_with_rows(table: NeighbourTable, rows: int) -> NeighbourTable:
    """The table with empty rows at the end."""
    missing = rows + 1 - len(table.indptr)
    return NeighbourTable.of(np.pad(table.indptr, (0, missing), "edge"), table.neighbours, table.weights)
