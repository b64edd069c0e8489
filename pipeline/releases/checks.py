"""Whether a run can be what readers see: every dataset they open is there, whole, and of one lineage.

Reads manifests and a listing of the run's folder; with verify every byte. Memory: one piece of a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline.contracts import schemas
from pipeline.contracts.datasets import Manifest, find_manifest, open_manifest, read_file
from pipeline.contracts.errors import DataError
from pipeline.contracts.schemas import how_to_build
from pipeline.contracts.storage import Storage

NEEDED = (
    schemas.USERS,
    schemas.ITEMS,
    schemas.ITEM_USERS,
    schemas.USER_ITEMS,
    schemas.FEATURES,
    schemas.ENCODERS,
    schemas.NEIGHBOURS,
    schemas.MODEL,
    schemas.EMBEDDINGS,
    schemas.INDEX,
)
"""What `pinsage query` and `pinsage embed` read."""
OPTIONAL = (schemas.COMPACT, schemas.ROTATION, schemas.EVALUATION)
VERDICT = "gate/verdict.json"
_MADE_OF = (
    (schemas.FEATURES, schemas.ITEMS),
    (schemas.NEIGHBOURS, schemas.ITEM_USERS),
    (schemas.NEIGHBOURS, schemas.USER_ITEMS),
    (schemas.EMBEDDINGS, schemas.ITEMS),
    (schemas.EMBEDDINGS, schemas.FEATURES),
    (schemas.EMBEDDINGS, schemas.NEIGHBOURS),
    (schemas.EMBEDDINGS, schemas.MODEL),
    (schemas.INDEX, schemas.EMBEDDINGS),
    (schemas.COMPACT, schemas.EMBEDDINGS),
    (schemas.ROTATION, schemas.EMBEDDINGS),
    (schemas.EVALUATION, schemas.EMBEDDINGS),
    (schemas.EVALUATION, schemas.INDEX),
)
"""Which dataset must be made of which that lies beside it. The model's own inputs are not asked for: a night may
keep the model of an earlier one."""
_PIECE = 1 << 26


def check_run(storage: Storage, verify: bool = False) -> dict[str, Manifest]:
    """The manifests of all that readers open, by dataset. Raises DataError for the first thing that is wrong.

    Every file is there in its full size; verify: and has its checksum, which reads all of it.
    """
    manifests = {dataset.name: open_manifest(storage, dataset) for dataset in NEEDED}
    found = {dataset.name: find_manifest(storage, dataset) for dataset in OPTIONAL}
    manifests |= {name: manifest for name, manifest in found.items() if manifest is not None}
    for made, source in _MADE_OF:
        if made.name not in manifests:
            continue
        if manifests[made.name].lineage.inputs.get(source.name) != manifests[source.name].content:
            raise DataError(
                f"{storage.locate(made.name)} was made of another {source.name} than lies beside it, and a release is "
                f"of one lineage; {how_to_build(made.name)}"
            )
    there = {path: size for path, (size, _) in storage.files("").items()}
    for name, manifest in manifests.items():
        _check_files(storage, name, manifest, there, verify)
    return manifests


def _check_files(storage: Storage, name: str, manifest: Manifest, there: Mapping[str, int], verify: bool) -> None:
    """Raise DataError unless every file of the dataset is there, of its size and, with verify, of its checksum."""
    for shard in manifest.shards:
        found = there.get(f"{name}/{shard.name}")
        problem = ""
        if found != shard.bytes:
            problem = "is not there" if found is None else f"has {found:,} bytes, expected {shard.bytes:,}"
        elif verify and _sha256(storage, f"{name}/{shard.name}", shard.bytes) != shard.sha256:
            problem = "was changed after its manifest was written: it has another checksum"
        if problem:
            raise DataError(f"{storage.locate(f'{name}/{shard.name}')} {problem}; {how_to_build(name, 'again')}")


def quality_of(storage: Storage, manifests: Mapping[str, Manifest]) -> dict[str, float]:
    """What the run says of itself: the index's recall and, where it was evaluated, hit-rate and MRR, item to item."""
    report = json.loads(read_file(storage, manifests[schemas.INDEX.name], "recall.json"))
    found = {"recall": report.get("recall")}
    evaluation = manifests.get(schemas.EVALUATION.name)
    if evaluation is not None:
        slices = json.loads(read_file(storage, evaluation, "metrics.json"))["tasks"]["item_to_item"]["slices"]
        means = slices.get("all", {}).get("methods", {}).get("PinSage", {})
        names = [name for name in ("hit_rate@10", "mrr") if name in means] or list(means)[:1]
        found |= {name: means[name]["mean"] for name in names}
    return {name: float(value) for name, value in found.items() if value is not None}


def verdict_of(storage: Storage) -> dict[str, Any] | None:
    """What the gate wrote in the run; None if it was not asked. Raises DataError for a verdict that says neither."""
    try:
        tree = storage.read_with(VERDICT, json.loads)
        if tree["verdict"] not in ("passed", "refused"):
            raise ValueError(f"verdict is {tree['verdict']!r}")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{storage.locate(VERDICT)} is no verdict ({error!r}); run `pinsage gate` again") from None
    verdict: dict[str, Any] = tree
    return verdict


def _sha256(storage: Storage, path: str, size: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, _PIECE):
        digest.update(storage.read_range(path, start, min(start + _PIECE, size)))
    return digest.hexdigest()
