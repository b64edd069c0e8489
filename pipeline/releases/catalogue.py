"""Which run readers see: publish, roll back, list, pin.

A run becomes a release in two writes, each whole: its record, then the pointer `releases/live.json`, replaced only
while it is what the publisher saw. Killed anywhere, a publisher leaves the old release live or the new one. Of two,
one wins. Every decision that must not cross another, `gc`'s included, is a conditional write of the pointer. Cost: some
reads of manifests; a rollback is one write.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from pipeline.contracts import schemas
from pipeline.contracts.datasets import find_manifest
from pipeline.contracts.errors import ConflictError, DataError
from pipeline.contracts.storage import Storage
from pipeline.releases.checks import check_run, quality_of, verdict_of
from pipeline.releases.leases import Held, held
from pipeline.releases.records import (
    FOLDER,
    LIVE,
    RUNS,
    Pointer,
    Record,
    checked_id,
    digest,
    record_path,
    seal,
    unseal,
    whoami,
)

Clock = Callable[[], float]
Change = Callable[[Pointer], Pointer]
_MEND = "`pinsage rollback RELEASE` writes it anew; `pinsage releases` lists what it can be"


@dataclass(frozen=True)
class Listed:
    """A release, and what keeps it."""

    record: Record
    live: bool
    previous: bool
    withdrawn: bool
    pinned: bool
    leases: tuple[Held, ...]
    collecting: bool


class Catalogue:
    """The releases of a site, any fsspec URL. Memory: manifests."""

    def __init__(self, site: str, clock: Clock = time.time) -> None:
        self.storage, self.clock = Storage(site), clock

    # -------------------------------------------------------------------------------------------- looking

    def pointer(self) -> tuple[bytes | None, Pointer]:
        """The pointer, as stored and as read; None and an empty one before the first release. DataError if broken."""
        where = self.storage.locate(LIVE)
        try:
            return self.storage.read_with(LIVE, lambda data: (data, unseal(Pointer, data, where, _MEND)))
        except FileNotFoundError:
            return None, Pointer()

    def kept_pointer(self, own: Collection[str] = ()) -> Pointer:
        """The pointer. Raises DataError if it is gone: nothing lies there, and records do, of others than own.

        own: releases that may be a first one, whose publisher was killed between its record and the pointer.
        """
        stored, pointer = self.pointer()
        if stored is None and (others := sorted(set(self.names()) - set(own))):
            stored, pointer = self.pointer()  # the first publisher may have ended since
            if stored is None:
                raise self._gone(others)
        return pointer

    def _gone(self, names: Sequence[str]) -> DataError:
        return DataError(
            f"{self.storage.locate(LIVE)} is gone, expected beside the records of {', '.join(names)}: nobody knows "
            "which release is live; `pinsage rollback RELEASE` writes it anew"
        )

    def live(self) -> Pointer:
        """The pointer, if it names a release."""
        pointer = self.kept_pointer()
        if pointer.release is None:
            raise DataError(f"{self.storage.url} has no live release yet; `pinsage publish` makes a run one")
        checked_id(pointer.release)
        return pointer

    def record(self, release: str) -> Record:
        """The record of a release. Raises DataError if there is none, or a broken one."""
        return self._record(release)[1]

    def _record(self, release: str) -> tuple[bytes, Record]:
        path = record_path(release)
        where, mend = self.storage.locate(path), f"delete it and run `pinsage publish` on {RUNS}/{release} again"
        try:
            data, record = self.storage.read_with(path, lambda data: (data, unseal(Record, data, where, mend)))
        except FileNotFoundError:
            raise DataError(
                f"{self.storage.url} has no release {release}: it was never published, or `pinsage gc` deleted it; "
                "`pinsage releases` lists those there are"
            ) from None
        if record.release != release:
            raise DataError(f"{where} is the record of release {record.release} under another name; delete it")
        return data, record

    def resolve(self, release: str, pointer: Pointer) -> Record:
        """The record of a release (`live`: the live one) that readers may open, as the pointer has it."""
        name = pointer.release if release == "live" else checked_id(release)
        assert name is not None, "asked of `live` before"
        if name in pointer.collecting:
            raise DataError(f"release {name} of {self.storage.url} is being deleted by `pinsage gc`; open another")
        data, record = self._record(name)
        if name not in pointer.released:
            raise DataError(f"{name} of {self.storage.url} was never live: its publisher did not end; publish it again")
        if name == pointer.release and digest(data) != pointer.record:
            raise DataError(
                f"{self.storage.locate(LIVE)} names release {name} with another record than lies in "
                f"{self.storage.locate(record_path(name))}; run `pinsage rollback` to a release that is whole"
            )
        return record

    def confirm(self, record: Record) -> None:
        """Raise DataError unless the manifests of a release's datasets are those that were published."""
        run = Storage(f"{self.storage.url.rstrip('/')}/{record.run}")
        with ThreadPoolExecutor(16) as pool:  # all at once: a rollback waits for this
            manifests = list(pool.map(partial(find_manifest, run), record.datasets))
        for (name, content), manifest in zip(record.datasets.items(), manifests, strict=True):
            if manifest is None or manifest.content != content:
                what = "is gone" if manifest is None else "was built again"
                raise DataError(
                    f"release {record.release}: {run.locate(name)} {what} after publishing, so it is not what was "
                    "tested; `pinsage rollback` to another release, and give every night's run a folder of its own"
                )

    def names(self) -> list[str]:
        """Ids of all records, sorted."""
        files = [name.removesuffix(".json") for name in self.storage.names(FOLDER) if name.endswith(".json")]
        return [name for name in files if name != "live" and not name.startswith(".")]

    def pins(self) -> dict[str, bytes]:
        """Pinned releases, and what was said when."""
        folder = f"{FOLDER}/pins"
        names = [name for name in self.storage.names(folder) if name.endswith(".json") and not name.startswith(".")]
        return {name.removesuffix(".json"): self.storage.read_bytes(f"{folder}/{name}") for name in names}

    def releases(self, skew: float = 0.0) -> tuple[list[Listed], list[str]]:
        """All releases, oldest first, and what is wrong with those that cannot be listed, or with the pointer.

        skew: leases count so many seconds longer. Without a pointer that can be read, all records are listed.
        """
        found: list[Listed] = []
        problems: list[str] = []
        try:
            pointer = self.kept_pointer()
        except DataError as error:
            problems.append(str(error))
            pointer = Pointer(withdrawn=tuple(self.names()))
        pins, leases = self.pins(), held(self.storage, self.clock(), skew)
        for name in self.names():
            if name not in pointer.released:
                continue
            try:
                record = self.record(name)
            except DataError as error:
                problems.append(str(error))
                continue
            own = tuple(lease for lease in leases if lease.release == name)
            found.append(
                Listed(
                    record, name == pointer.release, name == pointer.previous, name in pointer.withdrawn, name in pins,
                    own, name in pointer.collecting,
                )
            )  # fmt: skip
        return sorted(found, key=lambda listed: (listed.record.created_at, listed.record.release)), problems

    # -------------------------------------------------------------------------------------------- moving the pointer

    def publish(self, run: str, verify: bool = False, force: bool = False) -> Record:
        """Make a run below the site's runs/ the live release; run is its URL or its name.

        verify reads every byte; force publishes what the gate refused, and the record says so. Raises DataError if the
        run is not whole or the pointer is gone, ConflictError if it was moved meanwhile. A release that is live already
        stays so.
        """
        release = self.id_of(run)
        seen = self.kept_pointer(own=(release,))
        _refuse_collected(release, seen)
        record = self._examine(release, verify, force)
        if seen.release is None:
            self.storage.check_conditions(f"{FOLDER}/.probe-{time.time_ns()}")
        data, record = self._store(record, seen)
        if seen.release == release and seen.record == digest(data):
            return record

        def push(pointer: Pointer) -> Pointer:
            _refuse_collected(release, pointer)
            stack = (*(name for name in pointer.stack if name != release), release)
            withdrawn = tuple(name for name in pointer.withdrawn if name != release)
            return self._moved(pointer, stack, withdrawn, data, record, "publish")

        self.change(push, seen, f"publish {release}")
        return record

    def _examine(self, release: str, verify: bool, force: bool) -> Record:
        """The record that the run would have now. Raises DataError if it cannot be a release."""
        storage = Storage(f"{self.storage.url.rstrip('/')}/{RUNS}/{release}")
        manifests = check_run(storage, verify)
        gate = verdict_of(storage)
        refused = gate is not None and gate["verdict"] == "refused" and not gate.get("forced")
        if refused and not force:
            raise DataError(
                f"the gate refused {storage.url}: {storage.locate('gate/verdict.json')} says why; "
                "publish it all the same with --force"
            )
        model = manifests[schemas.MODEL.name].content
        return Record(
            release, self.clock(), whoami(), model, {name: manifests[name].content for name in sorted(manifests)},
            manifests[schemas.ITEMS.name].num_rows, sum(manifest.num_bytes for manifest in manifests.values()),
            quality_of(storage, manifests), gate, refused,
        )  # fmt: skip

    def rollback(self, release: str | None = None) -> Record:
        """Make the previous release live again, or the one named; it must be as it was published.

        What is above it becomes withdrawn, so that the next rollback does not lead back to it. With a release named, a
        pointer that cannot be read is written anew. Raises DataError, or ConflictError if the pointer moves meanwhile.
        """
        stored, seen, broken = self._way_back(release)
        target = release or seen.previous
        if target is None:
            raise DataError(f"{self.storage.url} has no previous release to go back to; `pinsage releases` lists all")
        if checked_id(target) == seen.release and not broken:
            raise DataError(f"release {target} is live already; `pinsage releases` lists the others")
        if target not in seen.released:
            raise DataError(
                f"{self.storage.url} has no release {target} that was ever live; `pinsage releases` lists all"
            )
        _refuse_collected(target, seen)
        data, record = self._record(target)
        self.confirm(record)

        def pop(pointer: Pointer) -> Pointer:
            _refuse_collected(target, pointer)
            height = pointer.stack.index(target) if target in pointer.stack else len(pointer.stack)
            above = pointer.stack[height + 1 :]
            withdrawn = (*(name for name in pointer.withdrawn if name != target), *above)
            return self._moved(pointer, (*pointer.stack[:height], target), withdrawn, data, record, "rollback")

        if broken:
            if not self.storage.write_if(LIVE, stored, seal(pop(seen), nonce=True)):
                raise ConflictError(f"{self.storage.locate(LIVE)} was mended meanwhile; look with `pinsage releases`")
            return record
        self.change(pop, seen, f"roll back to {target}")
        return record

    def change(self, change: Change, seen: Pointer | None = None, action: str = "") -> Pointer:
        """Replace the pointer by what change makes of it, unless somebody has moved it since it was seen.

        seen None: whoever moved it. Raises ConflictError, naming who was quicker, DataError if it was deleted.
        """
        while True:
            stored, now = self.pointer()
            if stored is None and (seen is None or seen.sequence):
                raise self._gone(self.names())
            if seen is not None and now.sequence != seen.sequence:
                when = datetime.datetime.fromtimestamp(now.moved_at).isoformat(sep=" ", timespec="seconds")
                raise ConflictError(
                    f"cannot {action}: {now.moved_by} was quicker: release {now.release} is live by its {now.action} "
                    f"of {when}; compare with that, then run this again"
                )
            data = seal(change(now), nonce=True)
            if self.storage.write_if(LIVE, stored, data):
                return unseal(Pointer, data, self.storage.locate(LIVE), _MEND)

    def _moved(
        self, pointer: Pointer, stack: tuple[str, ...], withdrawn: tuple[str, ...], data: bytes, record: Record,
        action: str,
    ) -> Pointer:  # fmt: skip
        return replace(
            pointer, sequence=pointer.sequence + 1, stack=stack, withdrawn=withdrawn, record=digest(data),
            space_id=record.space_id, moved_at=self.clock(), moved_by=whoami(), action=action,
        )  # fmt: skip

    def _store(self, record: Record, seen: Pointer) -> tuple[bytes, Record]:
        """Write the record; one that lies there of the same data, by a publisher that was killed, counts as ours."""
        path, data = record_path(record.release), seal(record)
        if self.storage.write_if(path, None, data):
            return data, record
        found, there = self._record(record.release)
        if there.datasets == record.datasets:
            return found, there
        if record.release not in seen.released and self.storage.write_if(path, found, data):
            return data, record
        raise DataError(
            f"release {record.release} was published with other content than {RUNS}/{record.release} has now, and a "
            "release never changes; give the run a folder of its own and publish that"
        )

    def _way_back(self, release: str | None) -> tuple[bytes | None, Pointer, bool]:
        """The pointer as stored and as read; if it cannot be read, what it may have been, and True."""
        try:
            stored, seen = self.pointer()
        except DataError:
            if release is None:
                raise
            return self.storage.read_bytes(LIVE), self._remembered(checked_id(release)), True
        if stored is None and release is not None and self.names():
            return None, self._remembered(checked_id(release)), True
        return stored, seen, False

    def _remembered(self, release: str) -> Pointer:
        """What the pointer may have been, from the records alone: for one that cannot be read."""
        records = []
        for name in self.names():
            with suppress(DataError):
                records.append(self.record(name))
        order = [record.release for record in sorted(records, key=lambda record: record.created_at)]
        if release not in order:
            raise DataError(
                f"{self.storage.url} has no release {release} that is whole: it has {', '.join(order) or 'none'}"
            )
        height = order.index(release)
        return Pointer(
            sequence=int(self.clock()), stack=tuple(order[: height + 1]), withdrawn=tuple(order[height + 1 :])
        )

    # -------------------------------------------------------------------------------------------- pins

    def pin(self, release: str, reason: str = "") -> None:
        """Keep a release from `gc` until it is unpinned."""
        self.resolve(checked_id(release), self.pointer()[1])
        path = f"{FOLDER}/pins/{release}.json"
        pin = {"release": release, "reason": reason, "pinned_at": self.clock(), "pinned_by": whoami()}
        self.storage.write_bytes(path, json.dumps(pin).encode())
        try:
            self.resolve(release, self.pointer()[1])  # `gc` may have begun with it; it looks for pins after saying so
        except DataError:
            self.storage.delete(path)
            raise

    def unpin(self, release: str) -> None:
        """Let `gc` have it again when it is old. Raises DataError if it is not pinned."""
        if checked_id(release) not in self.pins():
            raise DataError(f"release {release} is not pinned; `pinsage releases` shows which are")
        self.storage.delete(f"{FOLDER}/pins/{release}.json")

    def id_of(self, run: str) -> str:
        """The id of a run below the site, given by its URL or its name. Raises DataError for one elsewhere."""
        home = f"{self.storage.locate(RUNS)}/"
        if "/" not in run and "\\" not in run:
            return checked_id(run)
        place = Storage(run).root
        if not place.startswith(home):
            raise DataError(
                f"{run} is not a run of {self.storage.url}: a release is a run below {home}; "
                f"set resources.run to {self.storage.url.rstrip('/')}/{RUNS}/NAME"
            )
        return checked_id(place.removeprefix(home))


def _refuse_collected(release: str, pointer: Pointer) -> None:
    if release in pointer.collecting:
        raise DataError(
            f"release {release} is being deleted by `pinsage gc`; run that again to its end, or choose another"
        )
