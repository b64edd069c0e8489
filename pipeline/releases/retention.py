"""Which releases and runs are old, and deleting them so that no reader meets half of one.

A release goes when it is beyond the newest `keep_count` and older than `keep_days`, and nothing holds it: not live, not
what a rollback leads to, not pinned, not leased, not named as `task.data.previous` by a run that is still to be
published. A run that never became a release goes when nothing was written to it for `keep_days`; what lies below runs/
and has no run's name stays. The pointer says first what goes, so that nobody publishes, opens or goes back to it; then
leases and pins are looked for again; then the record, the manifests and the data go, in this order. Killed anywhere,
the next `gc` ends it. Cost: a listing of the runs' files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import yaml

from pipeline.contracts.datasets import MANIFEST
from pipeline.contracts.errors import DataError
from pipeline.contracts.schemas import RESOLVED
from pipeline.contracts.storage import Storage
from pipeline.releases.catalogue import Catalogue
from pipeline.releases.leases import LEASES, all_leases, held
from pipeline.releases.records import FOLDER, RUNS, Pointer, is_id, record_path

DAY = 86_400.0
LOCK = "lock.json"
"""Of the night in progress: what is named as its run, as its night or, `NIGHT-2`, as an attempt of that stays."""


@dataclass(frozen=True)
class Plan:
    """What goes, with its bytes, and what stays and why; by name of the run, which a release shares."""

    releases: dict[str, int]
    runs: dict[str, int]
    kept: dict[str, str]


def beyond(ages: Mapping[str, float], keep_count: int, keep_days: float) -> set[str]:
    """Names that are old by both measures: not among the newest keep_count, and older than keep_days.

    ages are seconds; of equal ages the greater name is the newer.
    """
    order = sorted(ages, key=lambda name: (-ages[name], name))
    return {name for name in order[: max(0, len(order) - keep_count)] if ages[name] > keep_days * DAY}


def make_plan(
    catalogue: Catalogue, keep_count: int, keep_days: float, skew: float, keep: Collection[str] = ()
) -> tuple[Plan, Pointer]:
    """What `collect` would delete now, and the pointer that this follows from. keep: runs that stay in any case.

    Raises DataError for anything that cannot be read: what is not understood is not deleted.
    """
    pointer = catalogue.kept_pointer()
    storage, now = catalogue.storage, catalogue.clock()
    records = {name: catalogue.record(name) for name in catalogue.names()}
    released = {name: now - record.created_at for name, record in records.items() if name in pointer.released}
    ages, sizes = _runs(storage, now)
    strangers = {name for name in ages if not is_id(name)}  # somebody's notes, a file of a desktop
    ages = {name: age for name, age in ages.items() if name not in strangers}
    old = beyond(released, keep_count, keep_days)
    unpublished = set(ages) - set(released)
    old |= {name for name in unpublished if ages[name] > keep_days * DAY}
    old |= set(records) - set(released) - set(ages)  # the record of a publisher that was killed, and no run any more
    building = _being_built(storage, list(ages))
    kept = {
        name: f"among the newest {keep_count}"
        if released.get(name, 0.0) > keep_days * DAY
        else f"{keep_days:g} days young"
        for name in (set(released) | unpublished) - old
    }
    needed = _needed(storage, [name for name in unpublished if name not in old or name in building or name in keep])
    holds = _holds(catalogue, pointer, skew)
    reasons = {name: f"previous of {other}" for name, other in needed.items()} | holds
    reasons |= dict.fromkeys(building, "being built") | dict.fromkeys(keep, "named by the settings")
    kept |= {name: reasons[name] for name in set(released) | unpublished if name in reasons}
    kept |= dict.fromkeys(strangers, "no run's name")
    begun = {name for name in pointer.collecting if is_id(name)}
    going = (old - set(kept)) | {name for name in begun if name not in holds or name not in records}
    of_release = {name: sizes.get(name, 0) for name in sorted(going) if name in released or name in pointer.released}
    others = {name: sizes.get(name, 0) for name in sorted(going) if name not in of_release}
    return Plan(of_release, others, {name: kept[name] for name in sorted(kept) if name not in going}), pointer


def collect(catalogue: Catalogue, keep_count: int, keep_days: float, skew: float, keep: Collection[str] = ()) -> Plan:
    """Delete what is old; what was deleted and what was kept. Raises ConflictError if the pointer moves meanwhile."""
    plan, seen = make_plan(catalogue, keep_count, keep_days, skew, keep)
    going = {**plan.releases, **plan.runs}
    catalogue.storage.remove_unfinished(FOLDER, before=catalogue.clock() - DAY)
    _drop_expired(catalogue, skew)
    if not going and not seen.collecting:
        return plan
    seen = catalogue.change(
        lambda pointer: replace(pointer, collecting=tuple(sorted({*pointer.collecting, *going}))),
        seen,
        "delete old ones",
    )
    holds = _holds(catalogue, seen, skew)
    building = _being_built(catalogue.storage, [*going])
    whole = set(catalogue.names())
    late = {name: holds.get(name, "being built") for name in going if name in building or name in {*holds} & whole}
    for name in going:
        if name not in late:
            _delete(catalogue.storage, name)
    gone = set(going) - set(late)

    def forget(pointer: Pointer) -> Pointer:
        stack, withdrawn = (
            [name for name in names if name not in gone] for names in (pointer.stack, pointer.withdrawn)
        )
        rest = [name for name in pointer.collecting if name not in {*going, *seen.collecting}]
        return replace(pointer, stack=tuple(stack), withdrawn=tuple(withdrawn), collecting=tuple(rest))

    catalogue.change(forget)
    return Plan(
        {name: size for name, size in plan.releases.items() if name in gone},
        {name: size for name, size in plan.runs.items() if name in gone},
        plan.kept | late,
    )


def _runs(storage: Storage, now: float) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds since each run was last written to, and its bytes."""
    newest: dict[str, float] = dict.fromkeys(storage.names(RUNS), 0.0)
    sizes: dict[str, int] = dict.fromkeys(newest, 0)
    for path, (size, written) in storage.files(RUNS).items():
        name = path.split("/", 1)[0]
        newest[name], sizes[name] = max(newest.get(name, 0.0), written), sizes.get(name, 0) + size
    return {name: now - written for name, written in newest.items()}, sizes


def _holds(catalogue: Catalogue, pointer: Pointer, skew: float) -> dict[str, str]:
    """Why a release must stay, whatever its age; by release."""
    found = {lease.release: f"leased by {lease.who}" for lease in held(catalogue.storage, catalogue.clock(), skew)}
    found |= dict.fromkeys(catalogue.pins(), "pinned")
    if pointer.previous is not None:
        found[pointer.previous] = "a rollback leads to it"
    if pointer.release is not None:
        found[pointer.release] = "live"
    return found


def _being_built(storage: Storage, names: Sequence[str]) -> set[str]:
    """The run that the night in progress builds, by its lock, and whatever is named as an attempt of that night."""
    try:
        tree = storage.read_with(LOCK, json.loads)
        run, night = str(tree["run"]).rstrip("/").rsplit("/", 1)[-1], str(tree["night"])
    except FileNotFoundError:
        return set()
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{storage.locate(LOCK)} is no lock of a night ({error!r}), so nobody knows which run is being built; "
            "delete it when no night runs"
        ) from None
    if not run:  # its night has ended
        return set()
    return {name for name in names if name in (run, night) or name.startswith(f"{night}-")}


def _needed(storage: Storage, runs: Sequence[str]) -> dict[str, str]:
    """Runs that those to be published still read as task.data.previous, and by which of them."""
    found = {}
    for name in runs:
        try:
            tree = yaml.safe_load(storage.read_bytes(f"{RUNS}/{name}/{RESOLVED}"))
            previous = tree["task"]["data"].get("previous")
        except FileNotFoundError:
            continue
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            where = storage.locate(f"{RUNS}/{name}/{RESOLVED}")
            raise DataError(f"{where} holds no settings ({error!r}); delete that run, or run it again") from None
        if previous:
            found[str(previous).rstrip("/").rsplit("/", 1)[-1]] = name
    return found


def _drop_expired(catalogue: Catalogue, skew: float) -> None:
    for lease in all_leases(catalogue.storage):
        if lease.expires_at + skew < catalogue.clock():
            catalogue.storage.delete(lease.path)


def _delete(storage: Storage, name: str) -> None:
    """The record, so that it is no release; the manifests, so that it is no run; then the data."""
    storage.delete(record_path(name))
    for path in storage.files(f"{RUNS}/{name}"):
        if path.rpartition("/")[2] == MANIFEST:
            storage.delete(f"{RUNS}/{name}/{path}")
    storage.delete(f"{RUNS}/{name}")
    storage.delete(f"{LEASES}/{name}")
