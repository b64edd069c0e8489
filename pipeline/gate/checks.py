"""What the gate asks of model, index and graph: measurements in, one Check each out. Nothing is read here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.contracts.config import Gate

Grade = Literal["pass", "warn", "block", "skip"]
ORDER: tuple[Grade, ...] = ("block", "warn", "pass", "skip")
FEW_TARGETS = 20
"""With fewer different items asked for, a comparison is of those items and says nothing of others."""
METRICS = {"mrr": "MRR", "hit_rate@10": "hit-rate@10"}


@dataclass(frozen=True)
class Check:
    """One question, its answer, and in words what that means; value and bound are None where there is no number."""

    name: str
    value: float | None
    bound: float | None
    verdict: Grade
    reason: str


def at_most(name: str, value: float, bound: float, found: str, remedy: str, warn: float | None = None) -> Check:
    """Blocks above the bound, and for what is no number; warns above warn. remedy is said of what does not pass."""
    grade: Grade = "pass" if value <= (bound if warn is None else min(warn, bound)) else "warn"
    if not value <= bound:
        grade = "block"
    return _checked(name, value, bound, grade, found, remedy)


def at_least(name: str, value: float, bound: float, found: str, remedy: str, warn: float | None = None) -> Check:
    """As at_most, the other way round."""
    mirrored = at_most(name, -value, -bound, found, remedy, None if warn is None else -warn)
    return _checked(name, value, bound, mirrored.verdict, found, remedy)


def skip(name: str, reason: str) -> Check:
    """A question that could not be asked."""
    return Check(name, None, None, "skip", reason)


def _checked(name: str, value: float, bound: float, grade: Grade, found: str, remedy: str) -> Check:
    known = value if math.isfinite(value) else None
    return Check(name, known, bound, grade, found if grade == "pass" else f"{found}: {remedy}")


# ------------------------------------------------------------------------------------------------ quality


def check_quality(slices: Mapping[str, Mapping[str, Any]], settings: Gate) -> list[Check]:
    """Tonight's run against the live one on the same questions, over all items and over cold ones.

    slices are as ranking.compare gives them, of the methods `tonight` and `live`, with the numbers of `questions` and
    of different `targets`. Blocks where a loss is larger than tolerated and its whole 95 % interval is a loss.
    """
    found = []
    for name, tolerated in (("all", settings.tolerated_loss), ("cold", settings.tolerated_cold_loss)):
        compared = slices.get(name, {"questions": 0})
        for metric, label in METRICS.items():
            title = f"{label} against live" + ("" if name == "all" else f", {name} items")
            if compared["questions"] < settings.min_questions:
                asked = f"only {compared['questions']} test events that both runs can answer"
                found.append(skip(title, f"{asked}, {settings.min_questions} are needed"))
            elif compared["targets"] < FEW_TARGETS:
                found.append(skip(title, f"only {compared['targets']} different items are asked for"))
            else:
                now, then = (compared["methods"][run][metric]["mean"] for run in ("tonight", "live"))
                lead = compared["leads"]["live"][metric]
                found.append(check_loss(title, now, then, lead["low"], lead["high"], tolerated))
    return found


def check_loss(name: str, now: float, then: float, low: float | None, high: float | None, tolerated: float) -> Check:
    """Blocks if now is below then by more than the tolerated share and high, the best that the loss may be, is below 0.

    Warns if only one of the two is so. low and high are None where all questions are of one user: then nothing is sure.
    """
    loss = (then - now) / then if then > 0 else 0.0
    significant, large = high is not None and high < 0, loss > tolerated
    grade: Grade = "block" if significant and large else "warn" if significant or large else "pass"
    interval = "" if low is None or high is None else f", 95 % interval of the difference {low:+.4f} to {high:+.4f}"
    reason = f"{now:.4f} tonight, {then:.4f} live, {-loss:+.1%}{interval}"
    if grade == "block":
        reason += f": readers would notice; more than {tolerated:.0%} is lost. Look at tonight's training and features"
    elif grade == "warn":
        reason += ": a loss, but small" if significant else ": a loss, but it may be chance"
    return Check(name, loss, tolerated, grade, reason)


def check_floors(metrics: Mapping[str, Any], settings: Gate) -> list[Check]:
    """The run's own evaluation: PinSage's MRR, item to item, against the baselines that a broken model loses to."""
    whole = metrics["tasks"]["item_to_item"]["slices"].get("all", {})
    found = []
    for baseline, times in (("popularity", settings.over_popularity), ("content-only kNN", settings.over_content)):
        name = f"MRR over {baseline}"
        if not times or baseline not in whole.get("methods", {}):
            found.append(skip(name, "not asked" if not times else "this run's evaluation has no such baseline"))
        elif whole["counts"]["queries"] < settings.min_questions:
            found.append(skip(name, f"only {whole['counts']['queries']} test events"))
        else:
            own, other = (whole["methods"][method]["mrr"]["mean"] for method in ("PinSage", baseline))
            ratio = own / other if other > 0 else math.inf if own > 0 else 0.0
            text = f"PinSage {own:.4f}, {baseline} {other:.4f}"
            remedy = "the model is broken or untrained; look at the training's loss and at the features"
            found.append(_floor(name, ratio, times, text, remedy))
    return found


def _floor(name: str, ratio: float, times: float, text: str, remedy: str) -> Check:
    if math.isinf(ratio):
        return Check(name, None, times, "pass", text)
    return at_least(name, ratio, times, text, remedy)


def check_trend(now: float | None, history: Sequence[Mapping[str, Any]], settings: Gate) -> Check:
    """Warns where MRR on each night's own test events sinks slowly, by steps too small for the other checks."""
    past = [night["mrr"] for night in history[-settings.nights :] if night.get("mrr") is not None]
    if now is None or len(past) < 3:
        return skip("MRR over the nights", f"{len(past)} earlier nights tell theirs, 3 are needed")
    usual = float(np.median(past))
    share = now / usual if usual > 0 else 1.0
    bound = 1 - 2 * settings.tolerated_loss
    text = f"{now:.4f} tonight, {usual:.4f} in the median of {len(past)} nights"
    grade: Grade = "pass" if share >= bound else "warn"
    reason = text if grade == "pass" else f"{text}: quality is sinking, or the test events are harder; watch it"
    return Check("MRR over the nights", share, bound, grade, reason)


# ------------------------------------------------------------------------------------------------ index, vectors, graph


def check_recall(recall: float, target: float, settings: Gate) -> Check:
    """The index's own report of recall against exact search."""
    text = f"recall {recall:.4f}, target {target:g}"
    return at_least(
        "index recall", recall, target - settings.recall_slack, text,
        "searches would miss true neighbours; run `pinsage index --force`, or set task.index.reuse: false", target,
    )  # fmt: skip


def check_embeddings(now: Mapping[str, Any], then: Mapping[str, Any] | None, items: int, settings: Gate) -> list[Check]:
    """Coverage, length and variance; now and then are as measuring.survey gives them, items is the catalogue's size."""
    rows = max(1, now["rows"])
    covered = now["total"] / max(1, items) * (1 - (now["zeros"] + now["not_finite"]) / rows)
    text = f"{now['total']:,} embeddings for {items:,} items, {now['zeros'] / rows:.2%} zeros"
    found = [
        at_least(
            "coverage", covered, settings.min_coverage, text + (f", {now['not_finite']} NaN" * bool(now["not_finite"])),
            "items would be unfindable; run `pinsage inference --force`",
        ),
        at_least(
            "embedding spread", now["spread"], settings.min_spread,
            f"variance {now['spread']:.4f} of the squared length", "the embeddings have collapsed: all items are alike",
        ),
    ]  # fmt: skip
    if then is None:
        return found
    kept = now["spread"] / then["spread"] if then["spread"] > 0 else 1.0
    factor = max(now["norm"], 1e-30) / max(then["norm"], 1e-30)
    return [
        *found,
        at_least(
            "spread against live", kept, settings.min_spread_kept, f"{now['spread']:.4f}, live {then['spread']:.4f}",
            "the embeddings are collapsing; look at the loss and the learning rate",
        ),
        at_most(
            "embedding length against live", max(factor, 1 / factor), settings.norm_factor,
            f"mean length {now['norm']:.4g}, live {then['norm']:.4g}",
            "inner products are no longer on the live release's scale",
        ),
    ]  # fmt: skip


def check_features(now: Mapping[str, Any], then: Mapping[str, Any] | None, settings: Gate) -> list[Check]:
    """Blank items and constant columns of the content; as measuring.survey gives them, with `missing` shares by column.

    Without a live release the bounds are as if it had none of either.
    """
    if not now["columns"]:
        return [skip("content", "the items have no content columns")]
    old = then or {"zeros": 0, "rows": 1, "constant": 0, "columns": 1, "missing": {}}
    rises = {name: share - old["missing"].get(name, 0.0) for name, share in now["missing"].items()}
    worst = max(rises, key=lambda name: rises[name], default=None)
    blank, before = now["zeros"] / max(1, now["rows"]), old["zeros"] / max(1, old["rows"])
    constant, earlier = now["constant"] / now["columns"], old["constant"] / max(1, old["columns"])
    remedy = "the catalogue's content did not arrive whole; look at the items file"
    allowed = settings.max_blank_rise if then else 0.5
    found = [
        at_most(
            "items without content", blank - before, allowed, f"{blank:.2%} all zeros, live {before:.2%}", remedy,
        ),
        at_most(
            "constant content columns", constant - earlier, settings.max_constant_rise if then else 0.5,
            f"{now['constant']} of {now['columns']}, live {earlier:.1%}", remedy,
        ),
    ]  # fmt: skip
    if worst is not None and then is not None:
        text = f"{worst} is missing for {now['missing'][worst]:.2%}, live {old['missing'].get(worst, 0.0):.2%}"
        found.append(at_most("missing content", rises[worst], allowed, text, remedy))
    return found


def check_movement(churn: float, drift: float | None, same_model: bool, settings: Gate) -> list[Check]:
    """Neighbours replaced and vectors moved since the live release, by whether its model is still used."""
    model = "the same model" if same_model else "a new model"
    bounds = (settings.churn, settings.drift) if same_model else (settings.churn_new_model, settings.drift_new_model)
    remedy = "readers would see another catalogue; look at what changed in data, features and settings"
    found = [
        at_most("neighbour churn", churn, bounds[0], f"{churn:.1%} of the ten nearest are others ({model})", remedy)
    ]
    if drift is None:
        return [*found, skip("embedding drift", "the live release's embeddings have another width")]
    text = f"mean cosine {1 - drift:.4f} after rotation ({model})"
    return [*found, at_most("embedding drift", drift, bounds[1], text, remedy)]


def degree_shift(now: Sequence[Sequence[int]], then: Sequence[Sequence[int]]) -> float:
    """How far items moved in log2(1 + degree), on average, between two histograms [[degree, items], ...].

    The earth mover's distance: halved degrees are one octave. Indices that compare bins would jump where a catalogue of
    much the same degree grows over a bin's border.
    """
    degrees = np.array(sorted({int(degree) for histogram in (now, then) for degree, _ in histogram}))
    if not len(degrees):
        return 0.0
    shares = []
    for histogram in (now, then):
        counts = np.zeros(len(degrees))
        for degree, items in histogram:
            counts[np.searchsorted(degrees, degree)] += items
        shares.append(np.cumsum(counts) / max(1.0, counts.sum()))
    return float(np.sum(np.abs(shares[0] - shares[1])[:-1] * np.diff(np.log2(1 + degrees))))


def check_degrees(now: Sequence[Sequence[int]], then: Sequence[Sequence[int]], settings: Gate) -> Check:
    """How far the popularity of items is from what it was."""
    shift = degree_shift(now, then)
    return at_most(
        "degree distribution", shift, settings.max_degree_shift, f"items moved by {shift:.3f} octaves of degree",
        "they are touched by far more or fewer users than in the live release: events lost, doubled or wrongly keyed",
        settings.max_degree_shift / 2,
    )  # fmt: skip
