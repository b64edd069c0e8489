"""A night as a page: how it ended and why, beside the nights before, and the catalogue as readers would meet it.

One HTML file that needs nothing else. `look` reads what it shows of the vectors: a sample of items, from few shards of
each dataset, so its memory does not grow with the catalogue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.ann.reader import Index
from pipeline.contracts import schemas
from pipeline.contracts.datasets import Manifest, open_manifest, read_shard
from pipeline.contracts.errors import DataError
from pipeline.contracts.sharding import sample_rows
from pipeline.contracts.storage import Storage
from pipeline.report import html_table, line, page

Summary = Mapping[str, Any]
SHOWN_NIGHTS = 30
ITEMS, NEAR = 20, 5
"""Items that are shown with their neighbours, and how many of these."""
MAPPED = 1500
_SHARDS = 8
_STAGE_NIGHTS = 7
_WORDS = {
    "published": "is what readers see now", "refused": "was refused, the release before it stays",
    "failed": "did not end", "out of time": "ran out of time",
}  # fmt: skip


def look(run: Storage, previous: Storage | None, cache: str | None, seed: int) -> dict[str, Any]:
    """What the page shows of a finished run: a map of some items, and the commonest of them with their neighbours.

    previous: the live release's run before, whose neighbours stand beside tonight's.
    """
    items, index = open_manifest(run, schemas.ITEMS), Index.open(run, cache)
    shards = sample_rows(len(items.shards), _SHARDS, seed).tolist()
    tables = [read_shard(run, items, shard, ["key", "id", "title", "degree"]) for shard in shards]
    rows = [row for table in tables for row in table.to_pylist()]
    chosen = sample_rows(len(rows), MAPPED, seed)
    places = flattened(index.vectors([rows[place]["key"] for place in chosen.tolist()]))
    shown = sorted(rows, key=lambda row: (-row["degree"], row["id"]))[:ITEMS]
    keys = [row["key"] for row in shown]
    now, before = _neighbours(index, keys), {}
    if previous is not None:
        before = _neighbours(Index.open(previous, cache), keys)
    titles = _titles(run, items, {key for near in (*now.values(), *before.values()) for key in near})
    return {
        "map": [
            {"x": float(x), "y": float(y), "name": _name(rows[place]), "degree": rows[place]["degree"]}
            for (x, y), place in zip(places, chosen.tolist(), strict=True)
        ],
        "items": [
            {
                "name": _name(row), "degree": row["degree"],
                "now": [[key, titles.get(key) or key] for key in now.get(row["key"], [])],
                "before": [[key, titles.get(key) or key] for key in before.get(row["key"], [])],
            }
            for row in shown
        ],
    }  # fmt: skip


def flattened(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    """Vectors [n, d] on the plane of their two principal directions [n, 2]; zeros where there are fewer."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, keepdims=True)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * np.sign(axes[:2].sum(axis=1, keepdims=True) + 1e-300)  # a direction has no sign of its own
    flat = np.zeros((len(vectors), 2))
    flat[:, : len(axes)] = centred @ axes.T
    return flat


def _neighbours(index: Index, keys: Sequence[str]) -> dict[str, list[str]]:
    """Keys of the nearest items of those that the index has."""
    found = {}
    for key in keys:
        try:
            found[key] = index.neighbours(key, NEAR)[0]
        except DataError:  # an item that is new tonight
            continue
    return found


def _titles(run: Storage, items: Manifest, keys: set[str]) -> dict[str, str | None]:
    """Titles of some keys, by one pass over a few shards at most: of the others the key is shown."""
    found: dict[str, str | None] = {}
    for number in range(min(len(items.shards), 4 * _SHARDS)):
        table = read_shard(run, items, number, ["key", "title"])
        pairs = zip(table.column("key").to_pylist(), table.column("title").to_pylist(), strict=True)
        found |= {key: title for key, title in pairs if key in keys}
        if len(found) == len(keys):
            break
    return found


def _name(row: Mapping[str, Any]) -> str:
    return str(row["title"] or row["key"])


# ------------------------------------------------------------------------------------------------ page


def render(tonight: Summary, nights: Sequence[Summary], seen: Mapping[str, Any] | None) -> str:
    """The page of a night; nights are the summaries up to it, by date, itself the last; seen is what `look` gave."""
    nights = nights[-SHOWN_NIGHTS:]
    why = "".join(f"<li>{escape(reason)}</li>" for reason in tonight["reasons"])
    ended = _WORDS.get(tonight["status"]) or str(tonight["status"])
    parts = [
        f"<p>Run {escape(tonight['run'])} <b>{escape(ended)}</b>. {escape(_what(tonight))}</p>",
        f'<ul class="why">{why}</ul>' if why else "",
        _tiles(tonight),
        "<h2>Checks of the gate</h2>" + _checks(tonight["checks"]) if tonight["checks"] else "",
        "<h2>Beside the nights before</h2>",
        f'<div class="charts">{"".join(_trends(nights))}</div>',
        _nights(nights),
        "<h2>What it took</h2>",
        _stages(nights[-_STAGE_NIGHTS:]),
    ]
    if seen is not None:
        cards = "".join(_card(item) for item in seen["items"])
        parts += [
            "<h2>The catalogue on a plane</h2>",
            f'<p class="note">{len(seen["map"]):,} items by the two principal directions of their embeddings; larger '
            "are more popular. Names show under the pointer.</p>",
            drawn_map(seen["map"]),
            "<h2>Neighbours, tonight and before</h2>",
            '<p class="note">Of the most popular of some items. <ins>New tonight</ins>, <del>gone</del>.</p>',
            f'<div class="cards">{cards}</div>',
        ]
    parts.append(
        f'<p><a href="../runs/{escape(tonight["run"])}/evaluation/report.html">The evaluation of this run</a>: quality '
        "by slice, curves of training, examples.</p>"
    )
    return page(f"Night {tonight['night']}", [f"<style>{STYLE}</style>", *parts])


def _what(tonight: Summary) -> str:
    training = tonight["training"]
    plan = {"scratch": "trained from random weights", "warm": "trained further", "reuse": "kept"}[training["plan"]]
    on = "it goes on from nothing" if tonight["previous"] is None else f"it goes on from {tonight['previous']}"
    told = f"The model was {plan}, as {training['reason']}; {on}."
    if tonight.get("forced"):
        told += f" It was forced by {tonight['forced']['by']}: {tonight['forced']['reason']}."
    return told


def _tiles(tonight: Summary) -> str:
    data, took = tonight.get("tonight") or {}, tonight["ended_at"] - tonight["started_at"]
    tiles = [("MRR", f"{data['mrr']:.4f}")] if data.get("mrr") is not None else []
    for name, words in (("volume", "new events"), ("rows", "events"), ("items", "items")):
        if data.get(name) is not None:
            tiles.append((words, f"{data[name]:,}"))
    tiles.append(("took", f"{took:,.0f} s"))
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in tiles)
    return f'<div class="tiles">{boxes}</div>'


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for check in checks:
        numbers = "".join(f"<td>{'' if check[k] is None else f'{check[k]:.4g}'}</td>" for k in ("value", "bound"))
        grade = escape(check["verdict"])
        rows.append(
            f'<tr><th>{escape(check["name"])}</th><td class="{grade}">{grade}</td>{numbers}'
            f'<td class="words">{escape(check["reason"])}</td></tr>'
        )
    return html_table(["check", "verdict", "value", "bound", "what was found"], rows)


_TRENDS = (
    ("MRR on the night's own test events", lambda night: (night.get("tonight") or {}).get("mrr")),
    ("new events", lambda night: (night.get("tonight") or {}).get("volume")),
    ("neighbour churn", lambda night: _value(night, "neighbour churn")),
    ("embedding drift", lambda night: _value(night, "embedding drift")),
    ("index recall", lambda night: _value(night, "index recall")),
    ("seconds", lambda night: night["ended_at"] - night["started_at"]),
)


def _value(night: Summary, name: str) -> float | None:
    return next((check["value"] for check in night["checks"] if check["name"] == name), None)


def _trends(nights: Sequence[Summary]) -> list[str]:
    """A curve for everything that at least two of the nights tell."""
    drawings = []
    for words, of in _TRENDS:
        told = [(place, of(night)) for place, night in enumerate(nights)]
        points = [(float(place), float(value)) for place, value in told if value is not None]
        if len(points) > 1:
            every = max(1, -(-len(points) // 5))
            dates = [nights[int(place)]["night"][5:] for place, _ in points]
            names = [date if number % every == 0 else "" for number, date in enumerate(dates)]
            drawings.append(
                f"<figure><figcaption>{escape(words)}</figcaption>{line(points, '', words, names)}</figure>"
            )
    return drawings


def _nights(nights: Sequence[Summary]) -> str:
    rows = []
    for night in reversed(nights):
        data = night.get("tonight") or {}
        mrr, volume, took = data.get("mrr"), data.get("volume"), night["ended_at"] - night["started_at"]
        numbers = ("" if mrr is None else f"{mrr:.4f}", "" if volume is None else f"{volume:,}", f"{took:,.0f}")
        cells = [night["training"]["plan"], *numbers]
        why = "; ".join(night["reasons"])
        verdict = {"published": "pass", "refused": "block"}.get(night["status"], "warn")
        rows.append(
            f'<tr><th>{escape(night["night"])}</th><td class="{verdict}">{escape(night["status"])}</td>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + f'<td class="words">{escape(why[:300])}</td></tr>'
        )
    return html_table(["night", "ended", "model", "MRR", "new events", "seconds", "why"], rows)


def _stages(nights: Sequence[Summary]) -> str:
    """Seconds of every stage, and what it stored tonight, by night."""
    names = [stage.name for stage in schemas.STAGES]
    rows = []
    tonight = {stage["stage"]: stage for stage in nights[-1]["stages"]}
    for name in names:
        seconds = [next((s["seconds"] for s in night["stages"] if s["stage"] == name), None) for night in nights]
        stored = tonight.get(name, {}).get("datasets", {}).values()
        cells = ["" if value is None else f"{value:,.1f}" for value in seconds]
        made = [f"{sum(each['rows'] for each in stored):,}", f"{sum(each['bytes'] for each in stored) / 1e6:,.1f}"]
        rows.append(f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in [*cells, *made])}</tr>")
    return html_table(["stage, seconds", *(night["night"][5:] for night in nights), "rows", "MB"], rows)


def drawn_map(points: Sequence[Mapping[str, Any]]) -> str:
    """Items as dots whose area grows with the logarithm of their degree, named under the pointer."""
    width, height, edge = 900, 520, 14
    xs, ys = ([point[axis] for point in points] for axis in ("x", "y"))

    def place(value: float, values: Sequence[float], length: int) -> float:
        low, high = min(values), max(values)
        return edge + (length - 2 * edge) * ((value - low) / (high - low) if high > low else 0.5)

    def dot(point: Mapping[str, Any]) -> str:
        centre = f'cx="{place(point["x"], xs, width):.1f}" cy="{place(point["y"], ys, height):.1f}"'
        name = f"{escape(point['name'])}, {point['degree']:,}"
        return f'<circle {centre} r="{1.5 + 0.9 * math.log10(1 + point["degree"]):.1f}"><title>{name}</title></circle>'

    dots = "".join(map(dot, points))
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="map of items">{dots}</svg>'
    return f'<div class="card map">{drawing}</div>'


def _card(item: Mapping[str, Any]) -> str:
    former = {key for key, _ in item["before"]}
    present = {key for key, _ in item["now"]}
    lines = [
        f"<li>{escape(name) if key in former or not former else f'<ins>{escape(name)}</ins>'}</li>"
        for key, name in item["now"]
    ]
    gone = "".join(f"<li><del>{escape(name)}</del></li>" for key, name in item["before"] if key not in present)
    return (
        f'<div class="card"><b>{escape(item["name"])}</b><small>{item["degree"]:,} interactions</small>'
        f"<ol>{''.join(lines)}</ol>{f'<ul>{gone}</ul>' if gone else ''}</div>"
    )


STYLE = """
td.pass{color:var(--m2)}td.block{color:var(--m0);font-weight:600}td.warn{color:#b8860b;font-weight:600}
td.skip{color:var(--dim)}
table:has(td.words) thead th:last-child{text-align:left}
td.words{white-space:normal;text-align:left;min-width:300px}
ul.why li{color:var(--m0)}
.map circle{fill:var(--m1);fill-opacity:.55}
.card ul{margin:4px 0 0;padding-left:22px;font-size:14px;list-style:none}
ins{text-decoration:none;color:var(--m2);font-weight:600}del{color:var(--dim)}
"""
