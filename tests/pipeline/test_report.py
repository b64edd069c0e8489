"""The page and the tables: everything shown, everything escaped, nothing loaded, the same bytes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from pipeline import report

METHODS = {"PinSage": 0.4, "popularity": 0.1, "item-kNN": 0.3, "content-only kNN": 0.2}
EVIL = '<script>alert("x")</script> & [red]co.'


def value(mean: float) -> dict[str, float | None]:
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.02}


def degrees_of(side: str, nodes: int) -> dict[str, Any]:
    """A power law whose upper end the limits cut off, of users."""
    before = [[0, 30], *([2**k, max(1, nodes // 3**k)] for k in range(9 if side == "items" else 7))]
    after = before[:5] if side == "users" else before
    numbers = {"mean": 21.25, "median": 8, "p99": 180, "without_edges": 30, "max": 200}
    return {
        "removed": {"above_limit": 1234 if side == "users" else 0, "below_minimum": 0},
        "degrees": {"before": {**numbers, "histogram": before}, "after": {**numbers, "max": 16, "histogram": after}},
    }


def make_metrics(**changes: Any) -> dict[str, Any]:
    names = ["mrr", *(f"{name}@{k}" for k in (10, 50) for name in ("hit_rate", "recall", "ndcg"))]
    counts = {"queries": 900, "targets": 1000, "users": 500, "candidates": 4000.5}
    found = {
        "counts": counts,
        "methods": {method: {name: value(mean) for name in names} for method, mean in METHODS.items()},
        "leads": {
            method: {name: value(0.4 - mean) for name in ("mrr", "hit_rate@10")}
            for method, mean in METHODS.items()
            if method != "PinSage"
        },
    }
    empty = {"counts": {"queries": 0, "targets": 0, "users": 0}}
    item_counts = {"test_events": 5000, "without_earlier_item": 10, "target_seen_before": 90, "queries": 4900}
    user_counts = {"users_with_test_events": 7, "without_history": 7, "without_new_items": 0, "queries": 0}
    near = {"key": "k2", "title": None, "degree": 3, "score": 0.75}
    example = {"key": "k1", "title": EVIL, "degree": 12, "neighbours": [near, {**near, "key": "k3", "title": EVIL}]}
    border = {"items": 4700, "degree_at_most": None}
    curve = [{"width": w, "recall": r, "compared": 70.0 * w} for w, r in ((1, 0.5), (2, 0.8), (4, 0.97))]
    metrics = {
        "name": EVIL,
        "protocol": [EVIL],
        "tasks": {
            "item_to_item": {
                "counts": item_counts,
                "num_ranked": 1000,
                "slices": {"all": found, "cold": empty, "tail": found},
            },
            "user_to_item": {"counts": user_counts, "num_ranked": 0, "slices": {}},
        },
        "catalogue": {"items": 4707, "users": 39_516, "events": 991_910, "edges": 800_000, "dimensions": 128},
        "slices": {
            "all": border,
            "cold": {"items": 30, "degree_at_most": 0},
            "tail": {"items": 3760, "degree_at_most": 250},
        },
        "embeddings": {
            "mean_norm": 1.0,
            "norm_deviation": 0.0,
            "mean_cosine": 0.1,
            "cosine_deviation": 0.2,
            "cosine_kurtosis": 0.5,
            "coverage@10": 0.6,
        },
        "examples": [example],
        "index": {
            "k": 10,
            "recall": 0.96,
            "reached": True,
            "target": 0.95,
            "search": {"nprobe": 4},
            "curve": curve,
            "num_queries": 1000,
            "factory": "auto",
            "bytes_per_vector": 520.1,
            "num_vectors": 4707,
            "nlist": 64,
        },
        "graph": {"users": degrees_of("users", 39_516), "items": degrees_of("items", 4707)},
        "training": [
            {
                "epoch": e,
                "loss": 1 / e,
                "pairs": 10,
                "mrr": mrr,
                "hit_rate@10": 2 * mrr,
                "questions": 1500,
                "candidates": 4000,
                "full_catalogue": False,
            }
            for e, mrr in ((1, 0.1), (2, 0.25), (3, 0.2))
        ],
        "settings": {"task.evaluation": {"k": [10, 50]}, "task.name": EVIL},
        "lineage": {"fingerprint": "ab" * 32, "inputs": {"items": "cd" * 32}, "code": "0.1.0"},
    }
    return metrics | changes


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def printed(metrics: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        for part in report.terminal(metrics):
            console.print(part)
    return capture.get()


def test_text_from_the_data_is_escaped_everywhere() -> None:
    html = report.render(make_metrics())
    assert "<script" not in html
    page = Page(html)
    assert page.open == []
    assert page.text.count('<script>alert("x")</script> & [red]co.') >= 4  # title, heading, protocol, examples


def test_the_page_loads_nothing() -> None:
    html = report.render(make_metrics())
    assert "http" not in html
    assert not re.search(r"url\(|@import|<link|<iframe|<img", html)
    assert all(name not in ("src", "href", "srcset") for _, attributes in Page(html).tags for name in attributes)


def test_equal_metrics_give_equal_bytes_after_a_round_trip() -> None:
    metrics = make_metrics()
    assert report.render(metrics) == report.render(json.loads(json.dumps(metrics, sort_keys=True)))


def test_the_page_shows_every_method_slice_and_number() -> None:
    page = Page(report.render(make_metrics()))
    for text in (
        *METHODS,
        "0.4000",
        "0.3900 to 0.4200",
        "+0.3000",
        "over popularity",
        "better",
        "k2",
        "0.750",
        "4,707",
        "nprobe 4",
        "1,234 above the limit",
        "200 → 16",
    ):
        assert text in page.text
    assert "no user has both training history and test events" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 7


def test_a_sparse_run_still_has_a_page() -> None:
    metrics = make_metrics(training=None, examples=[], graph={})
    metrics["index"] |= {"curve": [{"width": 0, "recall": 1.0, "compared": 4707.0}], "search": {}}
    metrics["tasks"]["item_to_item"] |= {"slices": {}, "num_ranked": 0}
    page = Page(report.render(metrics))
    assert "no test event has an earlier item" in page.text
    assert "exact search" in page.text
    assert "nearest neighbours" not in page.text.lower()
    assert printed(metrics)


def test_intervals_that_are_not_known_are_left_out() -> None:
    metrics = make_metrics()
    found = metrics["tasks"]["item_to_item"]["slices"]["all"]
    for part in (*found["methods"].values(), *found["leads"].values()):
        for numbers in part.values():
            numbers.update(low=None, high=None)
    assert "too few users to say" in report.render(metrics)
    assert "None" not in printed(metrics)


def test_the_terminal_marks_the_best_and_says_what_was_counted() -> None:
    metrics = make_metrics()
    text = printed(metrics)
    assert "1,000 of 4,900 events ranked" in " ".join(text.split())
    assert "0.400 ±0.015" in text
    assert "nothing to rank" in text
    assert '<script>alert("x")</script> & [red]co.' in text
    assert max(map(len, text.splitlines())) <= 100
    table = report.evaluation_table(metrics, "item_to_item")
    assert isinstance(table, Table)
    best = table.columns[2]._cells
    assert [cell for cell in best if "bold" in str(cell)] == ["[bold green]0.400 ±0.015[/]"] * 2


def test_ticks_are_round_and_cover_the_range() -> None:
    assert report.nice_ticks(0, 0.43) == [0, 0.2, 0.4, 0.6]
    assert report.nice_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    for low, high in ((0, 3e-5), (0.951, 0.9991), (-3, 170), (5, 5), (0, 0)):
        ticks = report.nice_ticks(low, high)
        assert 2 <= len(ticks) <= 7
        assert ticks[0] <= low <= high <= ticks[-1]


def test_a_degree_curve_counts_the_nodes_of_at_least_that_degree() -> None:
    """By hand: 5 without edges, 100 of degree 1, 9 of 2 to 9, 1 of 10 or more."""
    points = report.reached([[0, 5], [1, 100], [2, 9], [10, 1]])
    assert points == [(1.0, 110.0), (2.0, 10.0), (10.0, 1.0)]
    page = Page(report.log_curves([points, points[:2]], "items, at least", "users"))
    before, after = ((a["class"], a["points"] or "") for tag, a in page.tags if tag == "polyline")
    assert (before[0], after[0]) == ("curve former", "curve")
    assert before[1].startswith(after[1])
    heights = [float(point.split(",")[1]) for point in before[1].split()]
    assert heights[2] == pytest.approx(180), "1 is on the axis"
    assert heights[2] - heights[1] == pytest.approx(56), "10 is a third of the way to 1000"
    for word in ("1", "10", "100", "1k"):
        assert word in page.text
    assert report.log_curves([[], []], "x", "y")


@pytest.mark.parametrize("count", [1, 2])
def test_bars_grow_with_their_values(count: int) -> None:
    groups = [(f"slice {n}", [("PinSage", value(0.4)), ("popularity", value(0.1))]) for n in range(count)]
    rects = [attributes for tag, attributes in Page(report.bars(groups, "MRR")).tags if tag == "rect"]
    heights = [float(rect["height"] or 0) for rect in rects]
    assert len(heights) == 2 * count
    assert heights[0] == pytest.approx(4 * heights[1], abs=0.3)


def test_training_shows_the_best_measurement_and_among_how_many_it_was_made() -> None:
    page = report.render(make_metrics())
    assert "MRR 0.2500, hit-rate@10 0.5000, epoch 2" in page
    assert "1,500 questions among a fixed sample of 4,000 items" in page
    assert "MRR on validation events" in page
    bare = [{"epoch": e, "loss": 1 / e, "pairs": 10} for e in (1, 2)]
    assert "best on validation" not in report.render(make_metrics(training=bare))
