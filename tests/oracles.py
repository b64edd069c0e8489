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
