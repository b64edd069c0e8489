"""What a run did, as a page to look at and as tables for the terminal.

Both are made from the evaluation's metrics and nothing else: no clock, no storage, no request to anywhere. The same
metrics give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.console import RenderableType
from rich.markup import escape as unmarked
from rich.table import Table

from pipeline.contracts.safety import printable

Metrics = Mapping[str, Any]
Point = tuple[float, float]
TASKS = {"item_to_item": "Item to item", "user_to_item": "User to item"}
METHODS = ("PinSage", "content-only kNN", "item-kNN", "popularity")
"""In this order everywhere; the colour of a method is its place."""
FEW_USERS = 30
"""Below this a bootstrap interval is too narrow to be believed."""


# ------------------------------------------------------------------------------------------------ terminal


def terminal(metrics: Metrics) -> list[RenderableType]:
    """The evaluation table of each task and a table of examples, to print one after the other."""
    parts: list[RenderableType] = [evaluation_table(metrics, task) for task in TASKS]
    return parts + ([examples_table(metrics)] if metrics["examples"] else [])


def evaluation_table(metrics: Metrics, task: str) -> Table | str:
    """Methods by metrics with the half-width of their 95 % intervals, the best of each slice in bold; or why not."""
    result = metrics["tasks"][task]
    if not result["slices"]:
        return f"[bold]{TASKS[task]}[/]: nothing to rank, {_why_empty(result, task)}\n"
    names = _shown_metrics(metrics)
    table = Table(title=f"{TASKS[task]}: {_counts_line(result, task)}", title_justify="left", title_style="bold")
    for heading in ("targets", "method"):
        table.add_column(heading, no_wrap=heading == "method")
    for name in names:
        table.add_column(_label(name), justify="right")
    for slice_name, found in sorted(result["slices"].items()):
        counts = found["counts"]
        about = f"{slice_name} {counts['targets']:,}"
        for place, method in enumerate(_methods(found)):
            values = found["methods"][method]
            cells = []
            for name in names:
                text = _interval(values[name])
                cells.append(f"[bold green]{text}[/]" if method in _best(found, name) else text)
            table.add_row(about if place == 0 else "", plain(method), *cells)
        if not _methods(found):
            table.add_row(about, "[dim]nothing to rank[/]")
        table.add_section()
    return table


def examples_table(metrics: Metrics) -> Table:
    """A few items and their nearest neighbours by name."""
    table = Table(title="Nearest neighbours", title_justify="left", title_style="bold", show_lines=True)
    table.add_column("item")
    table.add_column("nearest, with scores")
    for example in metrics["examples"]:
        near = "\n".join(f"{n['score']:.3f}  {plain(_name(n))}" for n in example["neighbours"][:5])
        table.add_row(f"[bold]{plain(_name(example))}[/]\n{example['degree']:,} interactions", near)
    return table


# ------------------------------------------------------------------------------------------------ page


def render(metrics: Metrics) -> str:
    """One HTML page that needs nothing else: styles and drawings are inside."""
    parts = [
        _tiles(metrics),
        "<h2>Quality on unseen events</h2>",
        *(_task_section(metrics, task) for task in TASKS),
        "<h3>How it was measured</h3>",
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in metrics['protocol'])}</ul>",
        "<h2>Nearest neighbours</h2>" if metrics["examples"] else "",
        f'<div class="cards">{"".join(_example(example) for example in metrics["examples"])}</div>',
        _graph_section(metrics.get("graph", {})),
        "<h2>Index, training, embeddings</h2>",
        f'<div class="cards wide">{_index_card(metrics["index"])}{_training_card(metrics["training"])}'
        f"{_embeddings_card(metrics['embeddings'])}</div>",
        "<h2>Where this comes from</h2>",
        _provenance(metrics),
    ]
    return page(f"{metrics['name']}: evaluation", parts)


def page(name: str, parts: Sequence[str]) -> str:
    title = escape(name)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main><h1>{title}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _tiles(metrics: Metrics) -> str:
    catalogue = metrics["catalogue"]
    tiles = [
        (f"{catalogue['items']:,}", "items"),
        (f"{catalogue['users']:,}", "users"),
        (f"{catalogue['events']:,}", "events"),
        (f"{catalogue['dimensions']:,}", "dimensions"),
        (f"{metrics['index']['recall']:.3f}", f"index recall@{metrics['index']['k']}"),
    ]
    every = metrics["tasks"]["item_to_item"]["slices"].get("all", {}).get("methods", {}).get("PinSage")
    if every:
        tiles = [(f"{every['mrr']['mean']:.4f}", "PinSage MRR"), *tiles]
        hit = next(name for name in every if name.startswith("hit_rate"))
        tiles = [(f"{every[hit]['mean']:.1%}", f"PinSage {_label(hit)}"), *tiles]
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles)
    return f'<div class="tiles">{boxes}</div>'


def _task_section(metrics: Metrics, task: str) -> str:
    result = metrics["tasks"][task]
    head = f"<h3>{TASKS[task]}</h3><p>{escape(_counts_line(result, task))}.</p>"
    if not result["slices"]:
        return f"{head}<p>Nothing to rank: {escape(_why_empty(result, task))}.</p>"
    names = [name for name in _metric_names(metrics) if task == "user_to_item" or not name.startswith("recall")]
    hit = next(name for name in names if name.startswith("hit_rate"))
    charts = "".join(
        f"<figure><figcaption>{_label(name)}, with 95 % intervals</figcaption>"
        f"{bars(_bar_groups(result, name), _label(name))}</figure>"
        for name in (hit, "mrr")
    )
    rows, leads = [], []
    for slice_name, found in sorted(result["slices"].items()):
        counts, border = found["counts"], metrics["slices"][slice_name]
        limit = border["degree_at_most"]
        about = f"{counts['targets']:,} targets of {counts['queries']:,} queries by {counts['users']:,} users"
        if limit is not None:
            about += f"; targets with at most {limit:,} training interactions, {border['items']:,} items"
        if "candidates" in counts:
            about += f"; {counts['candidates']:,.0f} candidates on average"
        heading = f"{slice_name} <small>{escape(about)}</small>"
        rows.append(f'<tr class="slice"><th colspan="{len(names) + 1}">{heading}</th></tr>')
        for method in _methods(found):
            cells = "".join(_cell(found["methods"][method][name], method in _best(found, name)) for name in names)
            rows.append(f"<tr><th>{escape(method)}</th>{cells}</tr>")
            lead = found["leads"].get(method, {})
            cells = "".join(_lead_cell(value, counts["users"]) for _, value in sorted(lead.items()))
            if cells:
                leads.append(f"<tr><th>{slice_name}: over {escape(method)}</th>{cells}</tr>")
    lead_names = sorted(
        next((lead for part in result["slices"].values() for lead in part.get("leads", {}).values()), {})
    )
    return (
        f'{head}<div class="charts">{charts}</div>{_legend(result)}{html_table(["method", *map(_label, names)], rows)}'
        f"<h4>PinSage's lead, paired</h4>{html_table(['slice', *map(_label, lead_names)], leads)}"
    )


def html_table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cell(value: Metrics, best: bool) -> str:
    spread = "" if value["low"] is None else f"<small>{value['low']:.4f} to {value['high']:.4f}</small>"
    return f"<td{' class=best' if best else ''}>{value['mean']:.4f}{spread}</td>"


def _lead_cell(value: Metrics, num_users: int) -> str:
    """PinSage minus another method, and whether the paired interval leaves 0 out."""
    if value["low"] is None or num_users < FEW_USERS:
        return f"<td>{value['mean']:+.4f} <i>too few users to say</i></td>"
    sure = "better" if value["low"] > 0 else "worse" if value["high"] < 0 else "not clear"
    return f"<td>{value['mean']:+.4f} <i>{sure}</i><small>{value['low']:+.4f} to {value['high']:+.4f}</small></td>"


def _example(example: Metrics) -> str:
    near = "".join(
        f"<li><div><span>{escape(_name(n))}</span><small>{n['score']:.3f}</small></div></li>"
        for n in example["neighbours"]
    )
    about = f"{example['degree']:,} interactions, key {example['key']}"
    return f'<div class="card"><b>{escape(_name(example))}</b><small>{escape(about)}</small><ol>{near}</ol></div>'


def _graph_section(graph: Metrics) -> str:
    """Degrees of both sides before and after the limits, and what these removed."""
    cards = "".join(
        _degrees_card(side, other, graph[side])
        for side, other in (("users", "items"), ("items", "users"))
        if "degrees" in graph.get(side, {})
    )
    return f'<h2>Graph</h2><div class="cards wide">{cards}</div>' if cards else ""


def _degrees_card(side: str, other: str, found: Metrics) -> str:
    both = [found["degrees"][when] for when in ("before", "after")]
    facts = {
        label: " → ".join(dict.fromkeys(f"{degrees[name]:{',.1f' if name == 'mean' else ','}}" for degrees in both))
        for name, label in (
            ("mean", f"{other} each"), ("median", "median"), ("p99", "99th percentile"), ("max", "most"),
            ("without_edges", f"{side} without edges"),
        )
    }  # fmt: skip
    facts["edges removed"] = (
        f"{found['removed']['above_limit']:,} above the limit, {found['removed']['below_minimum']:,} below the minimum"
    )
    drawing = log_curves([reached(degrees["histogram"]) for degrees in both], f"{other}, at least", side)
    note = f"<figcaption>{side} with at least so many {other}, before the limits (wide, pale) and after</figcaption>"
    return f'<div class="card"><b>{side.capitalize()}</b>{fact_list(facts)}<figure>{note}{drawing}</figure></div>'


def reached(histogram: Sequence[Sequence[int]]) -> list[Point]:
    """(degree, how many have it or a higher one) from [least degree, nodes] by ascending bin, without degree 0."""
    points: list[Point] = []
    total = 0
    for degree, nodes in reversed(histogram):
        total += nodes
        if degree:
            points.append((float(degree), float(total)))
    return points[::-1]


def _index_card(index: Metrics) -> str:
    curve = [(float(place), float(point["recall"])) for place, point in enumerate(index["curve"])]
    name, labels = next(iter(index["search"]), ""), [str(point["width"]) for point in index["curve"]]
    drawing = line(curve, name, "recall", labels) if len(curve) > 1 else ""
    note = f"<figcaption>recall@{index['k']} by {escape(name)}</figcaption>" if drawing else ""
    warned = "".join(f"<p>{escape(warning)}</p>" for warning in index.get("warnings", ()))
    return (
        f'<div class="card"><b>Index</b>{fact_list(_index_facts(index))}{warned}<figure>{note}{drawing}</figure></div>'
    )


def _index_facts(index: Metrics) -> dict[str, Any]:
    search = ", ".join(f"{name} {value}" for name, value in index["search"].items()) or "exact search"
    facts = {
        "factory": index["factory"],
        "chosen as": index.get("reason", ""),
        "search": search,
        f"recall@{index['k']}": f"{index['recall']:.4f} on {index['num_queries']:,} fresh queries",
        "target": f"{index['target']:g}, {'met' if index['reached'] else 'not met'}",
        "bytes per vector": index["bytes_per_vector"],
        "vectors compared": f"{index.get('compared', index['num_vectors']) / index['num_vectors']:.1%} per query",
    }
    trained = index.get("trained", {})
    if "from" in trained:
        facts["quantizer"] = f"of the index {trained['from'][:10]}, used again"
    elif "retrained" in trained:
        facts["quantizer"] = f"trained anew: {trained['retrained']}"
    if "lists" in index:
        lists = index["lists"]
        facts["lists"] = f"{index['nlist']:,}, {lists['empty']:,} empty, the largest {lists['largest']:,} vectors"
        facts["imbalance"] = f"{lists['imbalance']:.2f} (1: all lists equal)"
    return {name: value for name, value in facts.items() if value != ""}


def index_page(index: Metrics, clock: Metrics) -> str:
    """One HTML page of an index: its facts, recall by queries a second, and the seconds of its build."""
    points = sorted((point["queries_per_second"], point["recall"]) for point in clock["speeds"])
    drawing = line(points, f"queries a second, {clock['threads']} threads, one batch", "recall") if points else ""
    rows = "".join(
        f"<tr><th>{escape(', '.join(f'{n} {v}' for n, v in point['search'].items()) or 'exact search')}</th>"
        f"<td>{point['recall']:.4f}</td><td>{point['queries_per_second']:,.0f}</td></tr>"
        for point in clock["speeds"]
    )
    seconds = {name: f"{value:.1f} s" for name, value in clock["seconds"].items()}
    seconds["all"] = f"{sum(clock['seconds'].values()):.1f} s"
    parts = [
        f'<div class="cards wide">{_index_card(index)}<div class="card"><b>Build</b>{fact_list(seconds)}</div></div>',
        f"<h2>Recall and speed</h2><figure>{drawing}</figure>" if drawing else "",
        '<div class="scroll"><table><thead><tr><th>search</th><th>recall</th><th>queries a second</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
    ]
    return page("Index", parts)


def _training_card(history: Sequence[Metrics] | None) -> str:
    epochs = [epoch for epoch in history or [] if math.isfinite(epoch["loss"])]
    if not epochs:
        return ""
    curve = [(float(epoch["epoch"]), float(epoch["loss"])) for epoch in epochs]
    facts = {"epochs": len(epochs), "last loss": f"{curve[-1][1]:.4f}"}
    drawing = line(curve, "epoch", "loss") if len(curve) > 1 else ""
    figures = (
        "<figure><figcaption>training loss; harder negatives join by the curriculum, so it may rise</figcaption>"
        f"{drawing}</figure>"
    )
    asked = [epoch for epoch in epochs if "mrr" in epoch]
    if asked:
        best = max(asked, key=lambda epoch: float(epoch["mrr"]))
        among = "all" if best["full_catalogue"] else "a fixed sample of"
        facts["best validation"] = (
            f"MRR {best['mrr']:.4f}, hit-rate@10 {best['hit_rate@10']:.4f}, epoch {best['epoch']}"
        )
        facts["asked"] = f"{best['questions']:,} questions among {among} {best['candidates']:,} items"
    if len(asked) > 1:
        points = [(float(epoch["epoch"]), float(epoch["mrr"])) for epoch in asked]
        figures += f"<figure><figcaption>MRR on validation events</figcaption>{line(points, 'epoch', 'MRR')}</figure>"
    return f'<div class="card"><b>Training</b>{fact_list(facts)}{figures}</div>'


def _embeddings_card(health: Metrics) -> str:
    facts = {
        "norm": f"{health['mean_norm']:.4f} ± {health['norm_deviation']:.4f}",
        "cosine of random pairs": f"{health['mean_cosine']:.4f} ± {health['cosine_deviation']:.4f}",
        "its excess kurtosis": f"{health['cosine_kurtosis']:.2f}",
        "coverage@10": f"{health['coverage@10']:.1%}",
    }
    return (
        f'<div class="card"><b>Embeddings</b>{fact_list(facts)}<p class="note">Cosines of random pairs should spread '
        "around 0: a high mean or a small spread says that all items look alike. Coverage is the share of different "
        "items among the ten nearest of a sample, of the most there could be.</p></div>"
    )


def _provenance(metrics: Metrics) -> str:
    lineage = metrics["lineage"]
    inputs = {name: content[:16] for name, content in sorted(lineage["inputs"].items())}
    settings = _flatten(metrics["settings"])
    data = fact_list({name.replace("_", " "): value for name, value in metrics.get("data", {}).items()})
    return (
        f"<details><summary>What became of the interactions</summary>{data}</details>"
        f"<details><summary>Inputs, by content</summary>{fact_list({'code': lineage['code'], **inputs})}</details>"
        f"<details><summary>Settings of this evaluation</summary>{fact_list(settings)}</details>"
        f'<p class="note">Fingerprint <code>{escape(lineage["fingerprint"])}</code></p>'
    )


def fact_list(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"<dl>{rows}</dl>"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


# ------------------------------------------------------------------------------------------------ drawings


def bars(groups: Sequence[tuple[str, Sequence[tuple[str, Metrics]]]], label: str) -> str:
    """Grouped bars with interval whiskers: (group, (method, {mean, low, high})...)."""
    width, height, left, bottom = 520, 230, 46, 26
    tops = [v["high"] if v["high"] is not None else v["mean"] for _, values in groups for _, v in values]
    ticks = nice_ticks(0, max(tops, default=0) or 1)

    def y(value: float) -> float:
        return 8 + (height - 8 - bottom) * (1 - value / ticks[-1])

    parts = _grid(ticks, y, left, width)
    room = (width - left - 8) / max(1, len(groups))
    for g, (group, values) in enumerate(groups):
        step = room * 0.84 / max(1, len(values))
        for v, (method, value) in enumerate(values):
            x = left + room * (g + 0.08) + step * v
            about = f"{method}, {group}: {value['mean']:.4f}"
            parts.append(
                f'<rect class="m{_place(method)}" x="{x + step * 0.08:.1f}" y="{y(value["mean"]):.1f}" rx="2" '
                f'width="{step * 0.84:.1f}" height="{max(0.0, y(0) - y(value["mean"])):.1f}">'
                f"<title>{escape(about)}</title></rect>"
            )
            if value["low"] is not None:
                middle = x + step / 2
                low, high = y(value["low"]), y(value["high"])
                parts.append(f'<path class="whisker" d="M{middle:.1f} {low:.1f}V{high:.1f}"/>')
        parts.append(_text(left + room * (g + 0.5), height - 8, group))
    return _svg(width, height, parts, label)


def line(points: Sequence[Point], x_label: str, y_label: str, names: Sequence[str] = ()) -> str:
    """One curve with dots; names, if given, are written along the x axis, one for each point, instead of numbers."""
    width, height, left, bottom = 420, 220, 50, 40
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks = xs if names else nice_ticks(min(xs), max(xs))
    y_ticks = nice_ticks(min(ys), max(ys))

    def x(value: float) -> float:
        return left + 14 + (width - left - 32) * (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def y(value: float) -> float:
        return 12 + (height - 12 - bottom) * (1 - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    parts = _grid(y_ticks, y, left, width)
    words = names or [f"{tick:g}" for tick in x_ticks]
    parts += [_text(x(tick), height - 22, word) for tick, word in zip(x_ticks, words, strict=True)]
    parts.append(_text((left + width) / 2, height - 5, x_label))
    parts.append(f'<polyline class="curve" points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)}"/>')
    for a, b in points:
        parts.append(f'<circle class="dot" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5"><title>{b:.4f}</title></circle>')
    return _svg(width, height, parts, f"{y_label} against {x_label}")


def log_curves(curves: Sequence[Sequence[Point]], x_label: str, y_label: str) -> str:
    """A pale curve and one over it, their points at least 1, on logarithmic axes that begin at 1."""
    width, height, left, bottom = 420, 220, 50, 40
    highest = [max((point[axis] for points in curves for point in points), default=1) for axis in (0, 1)]
    x_last, y_last = (max(1, math.ceil(math.log10(value))) for value in highest)

    def x(value: float) -> float:
        return left + 6 + (width - left - 26) * math.log10(value) / x_last

    def y(value: float) -> float:
        return 12 + (height - 12 - bottom) * (1 - math.log10(value) / y_last)

    parts = _grid([10.0**power for power in range(y_last + 1)], y, left, width)
    parts += [_text(x(10.0**power), height - 22, _short(10.0**power)) for power in range(x_last + 1)]
    parts.append(_text((left + width) / 2, height - 5, x_label))
    for style, points in zip(("curve former", "curve"), curves, strict=True):
        drawn = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts.append(f'<polyline class="{style}" points="{drawn}"/>')
    return _svg(width, height, parts, f"{y_label} against {x_label}, both logarithmic")


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, at least two, from at or below low to at or above high."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if raw <= power * factor * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _grid(ticks: Sequence[float], y: Any, left: int, width: int) -> list[str]:
    return [
        f'<path class="grid" d="M{left} {y(tick):.1f}H{width - 8}"/>'
        + _text(left - 6, y(tick) + 4, _short(tick), "end")
        for tick in ticks
    ]


def _short(number: float) -> str:
    """1k, 10M, 1G; as it is below 1000 or if not a power of ten."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit and math.log10(number).is_integer():
            return f"{number / unit:g}{name}"
    return f"{number:g}"


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _legend(result: Metrics) -> str:
    found = {method for part in result["slices"].values() for method in part.get("methods", {})}
    keys = "".join(f'<span><i class="k{_place(m)}"></i>{escape(m)}</span>' for m in METHODS if m in found)
    return f'<div class="legend">{keys}</div>'


# ------------------------------------------------------------------------------------------------ words


def _bar_groups(result: Metrics, name: str) -> list[tuple[str, list[tuple[str, Metrics]]]]:
    return [
        (part, [(method, found["methods"][method][name]) for method in _methods(found)])
        for part, found in sorted(result["slices"].items())
    ]


def _methods(found: Metrics) -> list[str]:
    return sorted(found.get("methods", {}), key=_place)


def _place(method: str) -> int:
    return METHODS.index(method)


def _best(found: Metrics, name: str) -> set[str]:
    means = {method: values[name]["mean"] for method, values in found["methods"].items()}
    return {method for method, mean in means.items() if mean == max(means.values()) > 0}


def _metric_names(metrics: Metrics) -> list[str]:
    """hit-rates, MRR, NDCGs and recalls of the K that were measured, in the order they are shown."""
    ks = metrics["settings"]["task.evaluation"]["k"]
    return [*(f"hit_rate@{k}" for k in ks), "mrr", *(f"ndcg@{k}" for k in ks), *(f"recall@{k}" for k in ks)]


def _shown_metrics(metrics: Metrics) -> list[str]:
    """Those that fit a terminal of 100 columns."""
    ks = metrics["settings"]["task.evaluation"]["k"][:2]
    return [*(f"hit_rate@{k}" for k in ks), "mrr", f"ndcg@{ks[0]}"]


def _label(name: str) -> str:
    metric, at, k = name.partition("@")
    return {"hit_rate": "hit-rate", "mrr": "MRR", "ndcg": "NDCG", "recall": "Recall"}[metric] + at + k


def _interval(value: Metrics) -> str:
    spread = "" if value["low"] is None else f" ±{(value['high'] - value['low']) / 2:.3f}"
    return f"{value['mean']:.3f}{spread}"


def _counts_line(result: Metrics, task: str) -> str:
    counts = result["counts"]
    ranked, queries = result["num_ranked"], counts["queries"]
    drawn = f"{ranked:,} of {queries:,}" if ranked < queries else f"all {queries:,}" if queries else "no"
    if task == "item_to_item":
        return (
            f"{drawn} events ranked; of {counts['test_events']:,} test events {counts['without_earlier_item']:,} have "
            f"no earlier item and {counts['target_seen_before']:,} repeat one"
        )
    return (
        f"{drawn} users ranked; of {counts['users_with_test_events']:,} with test events {counts['without_history']:,} "
        f"have no training history and {counts['without_new_items']:,} touched nothing new"
    )


def _why_empty(result: Metrics, task: str) -> str:
    """Why a task has nothing to rank."""
    counts = result["counts"]
    if task == "item_to_item":
        return "no test event has an earlier item of its user and a new target"
    if counts["users_with_test_events"] and counts["without_history"] == counts["users_with_test_events"]:
        return "no user has both training history and test events (users that live for one moment, such as invoices)"
    return "no user with training history touched a new item in the test period"


def plain(text: str) -> str:
    """Text from the user's data for a terminal: neither markup nor control characters."""
    return unmarked(printable(text))


def _name(item: Metrics) -> str:
    return str(item["title"] or item["key"])


STYLE = """
:root{--paper:#fbfaf7;--card:#fff;--ink:#1d2328;--dim:#5d676f;--line:#e0ddd6;--best:#e3f3e6;--m0:#c8102e;--m1:#2f6f9f;
--m2:#5b9a68;--m3:#b9b2a3}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--card:#1d2226;--ink:#e8e6e1;--dim:#9aa4ab;--line:#343b41;
--best:#1d3a26;--m0:#ff5a6e;--m1:#6db3e3;--m2:#7fc18d;--m3:#857f73}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:26px;margin:0 0 16px}
h2{font-size:20px;margin:40px 0 8px;border-bottom:1px solid var(--line);padding-bottom:4px}
h3{font-size:16px;margin:24px 0 4px}p{margin:4px 0 12px}small{color:var(--dim);font-size:12px}
.note{color:var(--dim);font-size:13px}
.tiles{display:flex;flex-wrap:wrap;gap:10px}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 16px;flex:1 1 110px}
.tiles b{display:block;font-size:22px;font-variant-numeric:tabular-nums}.tiles span{color:var(--dim);font-size:13px}
.charts{display:flex;flex-wrap:wrap;gap:16px}.charts figure{flex:1 1 320px}
figure{margin:0;min-width:0}figcaption{color:var(--dim);font-size:13px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--dim);font-size:12px}
.grid{stroke:var(--line)}.whisker{stroke:var(--ink);stroke-width:1.5}
.curve{fill:none;stroke:var(--m0);stroke-width:2}.dot{fill:var(--m0)}
.former{stroke:var(--m3);stroke-width:6;opacity:.6}
.m0{fill:var(--m0)}.m1{fill:var(--m1)}.m2{fill:var(--m2)}.m3{fill:var(--m3)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:4px 0 12px;font-size:13px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.k0{background:var(--m0)}.k1{background:var(--m1)}.k2{background:var(--m2)}.k3{background:var(--m3)}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;font-weight:400;
vertical-align:top}
th:first-child{text-align:left}thead th{color:var(--dim);font-size:13px}td small{display:block}
tbody th{font-weight:500}
td i{font-style:normal;color:var(--dim);font-size:13px}
h4{font-size:14px;margin:16px 0 6px}
tbody tr:not(.slice)>th{position:sticky;left:0;background:var(--card)}
.slice th{background:var(--paper);font-weight:600;white-space:normal}.slice small{font-weight:400;margin-left:8px}
.best{background:var(--best);font-weight:600}.best small{font-weight:400}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(260px,1fr));gap:14px}
.wide{grid-template-columns:repeat(auto-fill,minmax(300px,1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;min-width:0}
.card>small{display:block}.card ol{margin:8px 0 0;padding-left:22px;font-size:14px}
.card li>div{display:flex;justify-content:space-between;gap:8px;align-items:baseline}
.card li span{overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:auto 1fr;gap:2px 14px;margin:8px 0;font-size:13px}dt{color:var(--dim)}
dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}details{margin:6px 0}summary{cursor:pointer}
code{font-size:12px;overflow-wrap:anywhere}
"""
