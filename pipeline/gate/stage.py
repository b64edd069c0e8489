"""May tonight's run be released: measure, ask every question, write `gate/verdict.json`.

Reads a finished run, the live release's run and the summaries of earlier nights; writes GATE into tonight's run. A run
passes unless a check blocks; warnings are for people. Cost: one pass over the catalogues of both runs for a sample of
items and one for the test events, as the evaluation's.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pyspark import SparkContext

from pipeline.contracts import datasets
from pipeline.contracts.config import Settings, select
from pipeline.contracts.datasets import Lineage, find_manifest
from pipeline.contracts.schemas import GATE
from pipeline.contracts.storage import Storage
from pipeline.gate import alignment, checks, data, measuring
from pipeline.gate.checks import ORDER, Check
from pipeline.gate.measuring import Run

VERDICT = "verdict.json"
PASSED, REFUSED = "passed", "refused"


@dataclass(frozen=True)
class Force:
    """Who lets a refused run through, and why."""

    by: str
    reason: str


def judge(
    spark: SparkContext,
    storage: Storage,
    settings: Settings,
    live: Storage | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    night: datetime.date | None = None,
    force: Force | None = None,
) -> dict[str, Any]:
    """The verdict on the run in storage, written and returned.

    live is the run that readers see now (None: this would be the first release), history the summaries of earlier
    nights (see `data`), the latest last. night is the date of tonight's data: by default the run's name, if it begins
    with one, else today. Raises DataError if a dataset of a run is missing.
    """
    tonight, gate, seed = Run.open(storage, settings), settings.task.gate, settings.task.seed
    before = None if live is None else Run.open(live, settings)
    night = night or date_in(tonight.name) or datetime.datetime.now(datetime.timezone.utc).date()
    metrics = tonight.tree("evaluation", "metrics.json")
    now, old = _input(tonight), None if before is None else _input(before)
    earlier = [past for past in history if past.get("night") and past["night"] < night.isoformat()]
    measured = data.measure_data(now, old, night, _night_before(before, old, earlier), gate)
    mrr = metrics["tasks"]["item_to_item"]["slices"].get("all", {}).get("methods", {}).get("PinSage", {}).get("mrr")
    measured["mrr"] = None if mrr is None else mrr["mean"]

    found = [check_whole(tonight), *data.check_data(now, old, measured, earlier, gate)]
    found += [*checks.check_floors(metrics, gate), checks.check_trend(measured["mrr"], earlier, gate)]
    recall = tonight.tree("index", "recall.json")["recall"]
    found.append(checks.check_recall(recall, settings.task.index.recall_target, gate))
    surveys = [
        [measuring.survey(spark, run, name, column, seed) for name, column in _VECTORS] if run else [None, None]
        for run in (tonight, before)
    ]
    found += checks.check_embeddings(surveys[0][0], surveys[1][0], tonight["items"].num_rows, gate)  # type: ignore[arg-type]
    found += checks.check_features(surveys[0][1], surveys[1][1], gate)  # type: ignore[arg-type]
    space: dict[str, Any] = {"own": tonight.space_id}
    quality: dict[str, Any] | None = None
    turned: alignment.Alignment | None = None
    if before is None:
        found.append(checks.skip("comparison with live", "there is no live release: this would be the first"))
    else:
        compared, quality, turned = _compare(spark, tonight, before, settings)
        found += compared
        space |= _space(before, turned)

    found.sort(key=lambda check: ORDER.index(check.verdict))
    refused = any(check.verdict == "block" for check in found)
    verdict = {
        "verdict": REFUSED if refused else PASSED, "run": tonight.name,
        "live": before.name if before else None,
        "night": night.isoformat(), "judged_at": time.time(), "checks": [asdict(check) for check in found],
        "tonight": measured, "quality": quality, "space": space,
        "forced": {**asdict(force), "at": time.time()} if force and refused else None,
    }  # fmt: skip
    _write(tonight, before, settings, verdict, turned if "aligned_to" in space else None)
    return verdict


_VECTORS = (("embeddings", "embedding"), ("features", "features"))


def _compare(
    spark: SparkContext, tonight: Run, live: Run, settings: Settings
) -> tuple[list[Check], dict[str, Any] | None, alignment.Alignment | None]:
    """All that needs the live run's vectors: checks, quality, and the rotation if it is wanted."""
    gate, seed = settings.task.gate, settings.task.seed
    now, then = (run["item_users"].metadata["degrees"]["before"]["histogram"] for run in (tonight, live))
    found = [checks.check_degrees(now, then, gate)]
    common, alike = measuring.count_alike(spark, tonight, live, seed)
    found.append(check_ids(alike))
    if alike < 1 or not common:
        return found, None, None
    quality = measuring.compare_quality(spark, tonight, live, common, settings)
    found += checks.check_quality(quality["slices"], gate)
    churn = measuring.measure_churn(spark, tonight, live, common, settings)
    vectors, old = measuring.paired_vectors(tonight, live, common, seed)
    turned = None
    if vectors.shape[1] == old.shape[1]:
        matrix = alignment.read_alignment(live.storage) if gate.align else None
        turned = alignment.fit(vectors, old if matrix is None else old @ matrix)
    same = tonight.space_id == live.space_id
    found += checks.check_movement(churn, None if turned is None else 1 - turned.cosine, same, gate)
    return found, {**quality, "common_items": common}, turned if gate.align else None


def _space(live: Run, turned: alignment.Alignment | None) -> dict[str, Any]:
    """The live release's space, and, where tonight's vectors were aligned, the one that they can be turned to.

    That is the oldest of the chain: what the live release itself was aligned to, if it was.
    """
    found: dict[str, Any] = {"live": live.space_id}
    if turned is not None:
        manifest = find_manifest(live.storage, GATE)
        aligned = None
        if manifest is not None:
            told = json.loads(datasets.read_file(live.storage, manifest, VERDICT))
            aligned = told["space"].get("aligned_to")
        found |= {"aligned_to": aligned or live.space_id, "cosine": turned.cosine}
    return found


def check_whole(run: Run) -> Check:
    """Whether embeddings, index and evaluation speak of one another: a half rebuilt run is no release."""
    stale = [
        f"{dataset} was made from other {source}"
        for dataset, sources in _MADE_FROM.items()
        for source in sources
        if run[dataset].lineage.inputs.get(source, run[source].content) != run[source].content
    ]
    remedy = "datasets of different tries are mixed; `pinsage run` makes them one"
    return checks.at_most("one run", len(stale), 0, ", ".join(stale) or "all datasets belong together", remedy)


_MADE_FROM = {
    "embeddings": ("items", "features", "model"), "index": ("embeddings",),
    "evaluation": ("interactions", "items", "features", "embeddings", "index", "model"),
}  # fmt: skip


def check_ids(alike: float) -> Check:
    """Whether an id means the same item in both runs; without that nothing can be compared item by item."""
    return checks.at_least(
        "stable ids", alike, 1.0, f"{alike:.2%} of the common ids stand for the same item as in the live release",
        "set task.data.previous to the live release's run; after a wanted renumbering use --force",
    )  # fmt: skip


def date_in(name: str) -> datetime.date | None:
    """The date that a run's name begins with."""
    match = re.match(r"\d{4}-\d\d-\d\d", name)
    try:
        return datetime.date.fromisoformat(match.group()) if match else None
    except ValueError:
        return None


def _input(run: Run) -> data.Input:
    return data.Input.of(run["interactions"], run["items"])


def _night_before(
    live: Run | None, found: data.Input | None, history: Sequence[Mapping[str, Any]]
) -> datetime.date | None:
    """The day up to which data was judged already: that of the live release or of a night since, whichever is later."""
    if live is None or found is None:
        return None
    night = date_in(live.name) or data.date_of(max(found.days, default=0) if found.days else 0)
    return max([night, *(datetime.date.fromisoformat(past["night"]) for past in history)])


def _write(
    tonight: Run, live: Run | None, settings: Settings, verdict: Mapping[str, Any], turned: alignment.Alignment | None
) -> None:
    read = {name: manifest.content for name, manifest in tonight.manifests.items()}
    read |= {} if live is None else {f"live {name}": manifest.content for name, manifest in live.manifests.items()}
    lineage = Lineage(GATE.name, select(settings, ["task.gate"]), read)
    files = {VERDICT: (json.dumps(verdict, indent=1) + "\n").encode()}
    if turned is not None:
        files[alignment.ALIGNMENT] = alignment.dump_alignment(np.asarray(turned.matrix))
    datasets.begin(tonight.storage, GATE)
    stored = [datasets.write_file(tonight.storage, GATE.name, *file, lineage) for file in files.items()]
    datasets.commit(tonight.storage, GATE, stored, lineage)
