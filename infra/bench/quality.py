"""How near the estimators come to exact personalised PageRank, for how much work, on small graphs, made up and real.

    python -m infra.bench.quality --out infra/bench/results/quality-DATE [--data FOLDER]

FOLDER has one folder for each data set, with an interactions.parquet: user_key, item_key and maybe quantity. Without
--data: the demo's shop and a graph of the generator. Where there are quantities the graph is also taken weighted, an
edge by 1 + log2(pieces). Prints tables and writes quality.json and plots, by work and by item degree, under --out.
Takes about 2 minutes a graph and 2 GB at most.

The truth is power iteration, restart 0.5, for a sample of items. Work is the processor's time on one thread, medians in
alternation. "exact 2048, 200 wide, + 16 x 50" is the 200 best of the first hop, read under a budget of 2048, composed
with 50 entries each of the rows of the first 16 of them. Reading an item's own first hop is counted, that of the rows
composed is not: they are made once for all. Needs the extra `bench`, for matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infra.bench import generate, measure
from pipeline.exact_kernel import ONE, Rows, compose, exact_neighbours
from pipeline.walk_kernel import BipartiteGraph, degree_ranks, visit_counts, walks_per_hop

NEIGHBOURS, RESTART, MAX_HOPS, BUDGET = 50, 0.5, 3, 2048
NUM_WALKS = (50, 100, 200, 400, 800, 1600, 3200, 6400)
BUDGETS = (256, 512, 1024, 2048, 4096, 8192)
COMPOSED = ((16, 50), (32, 50), (100, 100))
OWN_WIDTHS = (NEIGHBOURS, 4 * NEIGHBOURS)
SCORES = {
    "overlap": "overlap with the exact top 50",
    "mass": "share of the exact top 50's mass",
    "l1": "L1 error of the weights",
}
DEMO = Path(__file__).resolve().parents[1] / "demo"
NUM_TIMED, ROUNDS, NUM_DECILES = 2000, 5, 10
BY_DEGREE = ("walks 200", "walks 1600", "exact 512", "exact 2048", "exact 2048, 200 wide, + 32 x 50")


@dataclass(frozen=True)
class Method:
    """One way to find neighbours: its family is a line in the plots, its label a point."""

    family: str
    label: str
    find: Callable[[NDArray[np.int64]], measure.Found]

    @property
    def name(self) -> str:
        return f"{self.family} {self.label}"


def build_graph(
    users: NDArray[np.integer], items: NDArray[np.integer], weights: NDArray[np.float64] | None, seed: int = 0
) -> BipartiteGraph:
    """The graph of dense edges without repeats, users' lists in random order; weighted by positive weights, or not."""
    order = np.random.default_rng(seed).permutation(len(users))
    order = order[np.argsort(users[order], kind="stable")]
    back = np.lexsort((users, items))
    item_indptr, user_indptr = (np.concatenate([[0], np.cumsum(np.bincount(ids))]) for ids in (items, users))
    return BipartiteGraph(
        item_indptr, users[back].astype(np.uint32), _shares(item_indptr, weights, back),
        user_indptr, items[order].astype(np.uint32), _shares(user_indptr, weights, order), degree_ranks(item_indptr),
    )  # fmt: skip


def _shares(
    indptr: NDArray[np.int64], weights: NDArray[np.float64] | None, order: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Running shares of each row's weight, as BipartiteGraph has them; every row has an edge."""
    if weights is None:
        return np.empty(0, np.uint32)
    upto = np.concatenate([[0.0], np.cumsum(weights[order])])
    degrees = np.diff(indptr)
    parts = (upto[1:] - np.repeat(upto[indptr[:-1]], degrees)) / np.repeat(np.diff(upto[indptr]), degrees)
    shares: NDArray[np.uint32] = np.minimum(np.maximum(np.round(parts * 2.0**32), 1) - 1, 2.0**32 - 1).astype(np.uint32)
    shares[indptr[1:] - 1] = 2**32 - 1
    return shares


def read_graphs(folder: Path) -> Iterator[tuple[str, BipartiteGraph]]:
    """The data set's graph, and its weighted one if it has quantities."""
    table = pq.read_table(folder / "interactions.parquet")
    users, items = (_numbers(table[name]) for name in ("user_key", "item_key"))
    pairs, place = np.unique(users << 32 | items, return_inverse=True)
    users, items = pairs >> 32, pairs & (2**32 - 1)
    name = "online-retail" if folder == DEMO else folder.name
    yield name, build_graph(users, items, None)
    if "quantity" in table.column_names:
        pieces = np.bincount(place, table["quantity"].to_numpy())
        yield name + ", weighted", build_graph(users, items, 1.0 + np.log2(np.maximum(pieces, 1.0)))


def _numbers(keys: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(keys.combine_chunks().dictionary_encode().indices, np.int64)


def methods(graph: BipartiteGraph, seed: int = 0) -> list[Method]:
    """All that is compared; the rows that compositions read are made here."""
    rows = {width: _rows(graph, width) for width in sorted({width for _, width in COMPOSED})}

    def walks(num_walks: int, items: NDArray[np.int64]) -> measure.Found:
        return visit_counts(graph, items, walks_per_hop(num_walks, MAX_HOPS, RESTART), NEIGHBOURS, seed)

    def exact(budget: int, items: NDArray[np.int64]) -> measure.Found:
        return exact_neighbours(graph, items, NEIGHBOURS, budget)

    def composed(own: int, num_rows: int, width: int, items: NDArray[np.int64]) -> measure.Found:
        nearest = exact_neighbours(graph, items, own, BUDGET)
        return compose(rows[width], items, num_rows, width, RESTART, NEIGHBOURS, graph.item_ranks, own=nearest)

    found = [Method("walks", str(num), partial(walks, num)) for num in NUM_WALKS]
    found += [Method("exact", str(budget), partial(exact, budget)) for budget in BUDGETS]
    for own in OWN_WIDTHS:
        family = f"exact {BUDGET}, {own} wide, +"
        found += [Method(family, f"{num} x {width}", partial(composed, own, num, width)) for num, width in COMPOSED]
    return found


def _rows(graph: BipartiteGraph, width: int) -> Rows:
    items = np.arange(len(graph.item_indptr) - 1)
    ids, scores, lengths = exact_neighbours(graph, items, width, BUDGET)
    kept = np.arange(width) < lengths[:, None]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return Rows(indptr, ids[kept], (scores[kept] / ONE).astype(np.float32))


def study(graph: BipartiteGraph, num_queries: int, seed: int = 0) -> dict[str, Any]:
    """Means of every method over a sample of items, over each tenth of it by degree, and microseconds an item."""
    degrees = np.diff(graph.item_indptr)
    random = np.random.default_rng(seed)
    items = random.choice(len(degrees), min(num_queries, len(degrees)), replace=False)
    items = items[np.argsort(degrees[items], kind="stable")]
    timed = random.choice(len(degrees), min(NUM_TIMED, len(degrees)), replace=False)
    exact = measure.exact_ppr(graph, items, NEIGHBOURS, RESTART)
    tenths = np.array_split(np.arange(len(items)), NUM_DECILES)
    compared = methods(graph, seed)
    seconds = measure.alternate({method.name: partial(method.find, timed) for method in compared}, ROUNDS)
    results = {}
    for method in compared:
        scores = measure.quality(method.find(items), exact)
        results[method.name] = {
            "family": method.family,
            "label": method.label,
            "us_per_item": round(float(np.median(seconds[method.name].processor)) / len(timed) * 1e6, 2),
            **{score: round(float(np.nanmean(values)), 4) for score, values in scores.items()},
            "by_degree": {
                score: [round(float(np.nanmean(values[part])), 4) for part in tenths]
                for score, values in scores.items()
            },
        }
    return {
        "items": len(degrees),
        "users": len(graph.user_indptr) - 1,
        "edges": len(graph.item_users),
        "queries": len(items),
        "degrees": [[int(degrees[items[part[0]]]), int(degrees[items[part[-1]]])] for part in tenths],
        "fewer_than_50": round(float((exact.lengths < NEIGHBOURS).mean()), 4),
        "load": measure.load(),
        "methods": results,
    }


def plot(results: dict[str, dict[str, Any]], out: Path) -> None:
    """Two pictures a score: against work, and against item degree; a panel for each graph."""
    import_module("matplotlib").use("Agg")
    plt, image = import_module("matplotlib.pyplot"), import_module("PIL.Image")
    style = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    plt.rcParams.update(style | {"axes.spines.top": False, "axes.spines.right": False})
    columns = min(len(results), 3 if len(results) <= 6 else 4)
    lines = -(-len(results) // columns)
    for score, words in SCORES.items():
        for kind in ("work", "degree"):
            figure, axes = plt.subplots(
                lines, columns, figsize=(3.7 * columns, 3.2 * lines), squeeze=False, sharey=True, layout="constrained"
            )
            for panel, (name, result) in zip(axes.flat, results.items(), strict=False):
                (_by_work if kind == "work" else _by_degree)(panel, result, score)
                panel.set_title(f"{name}: {result['items']:,} items, {result['edges']:,} edges", fontsize=9)
                panel.set_ylim(0, 2 if score == "l1" else 1.02)
            for panel in axes.flat[len(results) :]:
                panel.set_visible(False)
            for row in axes:
                row[0].set_ylabel(words)
            handles, labels = axes[0, 0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
            figure.savefig(out / "picture.png", dpi=100)
            colours = image.open(out / "picture.png").convert("RGB").quantize(64)  # a fourth of the bytes
            colours.save(out / f"{score}-by-{kind}.png", optimize=True)
            (out / "picture.png").unlink()
            plt.close(figure)


def _by_work(panel: Any, result: dict[str, Any], score: str) -> None:
    families = dict.fromkeys(point["family"] for point in result["methods"].values())
    for family, marker in zip(families, "osD^vP", strict=False):
        points = [point for point in result["methods"].values() if point["family"] == family]
        work, value = [point["us_per_item"] for point in points], [point[score] for point in points]
        panel.plot(
            work, value, marker=marker, markersize=4, linewidth=1.2, label=family.replace("+", "+ composed rows")
        )
        if family in ("walks", "exact"):
            for point, x, y in zip(points, work, value, strict=True):
                if point["label"] in ("200", "1600", "6400", "512", "2048"):
                    below = (family == "walks") != (score == "l1")
                    where: dict[str, Any] = {
                        "xytext": (3, -10) if below else (-3, 5),
                        "ha": "left" if below else "right",
                    }
                    panel.annotate(
                        point["label"], (x, y), textcoords="offset points", fontsize=7, color="0.35", **where
                    )
    panel.set_xscale("log")
    panel.set_xticks([digit * 10**power for power in range(5) for digit in (1, 2, 5)])
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("")
    work = [point["us_per_item"] for point in result["methods"].values()]
    panel.set_xlim(min(work) * 0.75, max(work) * 1.6)
    panel.set_xlabel("core-microseconds an item")


def _by_degree(panel: Any, result: dict[str, Any], score: str) -> None:
    for name, marker in zip(BY_DEGREE, "os^Dv", strict=True):
        values = result["methods"][name]["by_degree"][score]
        panel.plot(range(1, len(values) + 1), values, marker=marker, markersize=4, linewidth=1.2, label=name)
    panel.set_xticks(range(1, len(result["degrees"]) + 1))
    panel.set_xticklabels([f"{low}\n{high}" for low, high in result["degrees"]], fontsize=7)
    panel.set_xlabel("item degree, from and to, of each tenth of the items")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="a folder of data sets; default: the demo's")
    parser.add_argument("--sets", nargs="*", help="names of data sets in it; default: all")
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument(
        "--items", type=int, default=50_000, help="of the generator's graph; 0.3 users and 17 edges each"
    )
    given = parser.parse_args(arguments)
    folders = sorted(path.parent for path in given.data.glob("*/interactions.parquet")) if given.data else [DEMO]
    folders = [folder for folder in folders if not given.sets or folder.name in given.sets]
    about = measure.machine()
    print("\n".join(f"{name:12} {value}" for name, value in about.items()), flush=True)

    def graphs() -> Iterator[tuple[str, BipartiteGraph]]:
        yield "generator", generate.graph(given.items, given.items * 3 // 10, given.items * 17, 0)
        for folder in folders:
            yield from read_graphs(folder)

    results = {}
    for name, graph in graphs():
        results[name] = result = study(graph, given.queries)
        sizes = ", ".join(f"{result[key]:,} {key}" for key in ("items", "users", "edges", "queries"))
        print(f"\n{name}: {sizes}; load average {result['load'][0]}")
        print(f"{'':32}{'us/item':>10}{'overlap':>10}{'mass':>8}{'L1':>8}")
        for method, point in result["methods"].items():
            print(
                f"{method:32}{point['us_per_item']:10.1f}{point['overlap']:10.3f}{point['mass']:8.3f}{point['l1']:8.2f}"
            )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "quality.json").write_text(json.dumps({"machine": about, "graphs": results}) + "\n")
    plot(results, given.out)


if __name__ == "__main__":
    main()
