"""Slow, obvious versions of the fast code."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray


def expected_visits(
    adjacency: NDArray[np.float64], item: int, max_hops: int, restart_probability: float
) -> NDArray[np.float64]:
    """Expected visits [items] of one walk from item; adjacency [items, users] holds edge weights.

    A walk makes hop h + 1 with probability (1 - restart) ** h; a hop goes to a user in proportion to the item's edge
    weights and on to an item in proportion to the user's. The start itself is not counted.
    """
    to_user = adjacency / np.maximum(adjacency.sum(axis=1, keepdims=True), 1e-300)
    to_item = (adjacency / np.maximum(adjacency.sum(axis=0, keepdims=True), 1e-300)).T
    position = np.zeros(len(adjacency))
    position[item] = 1.0
    visits = np.zeros(len(adjacency))
    for hop in range(max_hops):
        position = position @ to_user @ to_item
        visits += (1.0 - restart_probability) ** hop * position
    visits[item] = 0.0
    return visits


def largest(scores: NDArray[np.float64], degrees: NDArray[np.int64], num_kept: int) -> list[tuple[float, int]]:
    """(score, item) of the largest positive scores: equal ones by 8-bit log of the degree descending, then by id."""

    def rank(degree: int) -> int:
        length = degree.bit_length()
        return min(255, 8 * length + ((degree << 3 >> (length - 1)) & 7)) if degree else 0

    found = [(-score, -rank(int(degrees[item])), item) for item, score in enumerate(scores) if score > 0]
    return [(-score, item) for score, _, item in sorted(found)[:num_kept]]


def composed(rows: NDArray[np.float64], item: int, restart_probability: float) -> NDArray[np.float64]:
    """An item's row [items] plus the rows of its neighbours, each by its weight and the chance to go on."""
    scores = rows[item] + (1.0 - restart_probability) * (rows[item] @ rows)
    scores[item] = 0.0
    return np.asarray(scores)


def successors(events: list[tuple[int, int, int]], window: int, max_gap: int) -> Counter[tuple[int, int]]:
    """Pairs (query, positive) of (user, item, time) events in order: each event with the user's next `window` ones."""
    found: Counter[tuple[int, int]] = Counter()
    for user in {event[0] for event in events}:
        history = [event for event in events if event[0] == user]
        for place, (_, item, time) in enumerate(history):
            for _, later, moment in history[place + 1 : place + 1 + window]:
                if later != item and (not max_gap or moment - time <= max_gap):
                    found[item, later] += 1
    return found
