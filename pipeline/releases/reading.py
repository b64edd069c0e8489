"""What a reader opens: one release, whole and unchanged, however often the pointer moves meanwhile.

    from pipeline.releases.reading import Releases
    with Releases("s3://bucket/site").open() as release:          # or open("2011-03-05")
        keys, scores = release.index.search(["85123A"], k=10)
        release.space_id, release.changed()                       # the vectors' space; whether another is live now

Vectors of different space_id are not to be compared. Opening reads the pointer, a record and its manifests, and holds a
lease, which needs the right to write below `releases/leases`.
"""

from __future__ import annotations

import time
from functools import cached_property
from types import TracebackType

from pipeline.ann.reader import Index
from pipeline.contracts.errors import StorageError
from pipeline.contracts.schemas import INDEX
from pipeline.contracts.storage import Storage
from pipeline.releases.catalogue import Catalogue, Clock
from pipeline.releases.leases import Lease
from pipeline.releases.records import Record

_ATTEMPTS = 3  # to open the one that is live in the end: where it keeps moving, one that was live meanwhile will do
LEASE_SECONDS = 600.0


class Release:
    """An open release; close it, or use it as a context manager. Threads may share it."""

    def __init__(self, catalogue: Catalogue, record: Record, lease: Lease | None, cache: str | None) -> None:
        self.record, self.id, self.space_id = record, record.release, record.space_id
        self.url = f"{catalogue.storage.url.rstrip('/')}/{record.run}"
        self.storage = Storage(self.url)
        self._catalogue, self._lease, self._cache = catalogue, lease, cache

    @cached_property
    def index(self) -> Index:
        """Its index, opened at first use: see `pipeline.index.Index`; DataError if it is not what was published."""
        return Index.open(self.storage, self._cache, content=self.record.datasets[INDEX.name])

    def changed(self) -> bool:
        """Whether another release is live now. Raises StorageError if this one's lease could not be kept."""
        if self._lease is not None and self._lease.lost is not None:
            raise StorageError(
                f"the lease of release {self.id} could not be renewed, so it may be deleted: {self._lease.lost}; "
                "open the live release"
            )
        return self._catalogue.live().release != self.id

    def close(self) -> None:
        """Let it go; `pinsage gc` may then delete it. What was read or mapped stays usable as far as it is."""
        if self._lease is not None:
            self._lease.close()

    def __enter__(self) -> Release:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Releases:
    """The releases of a site, for readers. cache: as resources.cache."""

    def __init__(
        self, site: str, cache: str | None = None, lease_seconds: float = LEASE_SECONDS, clock: Clock = time.time
    ) -> None:
        self.catalogue = Catalogue(site, clock)
        self._cache, self._lease_seconds = cache, lease_seconds

    def open(self, release: str = "live", lease: bool = True) -> Release:
        """Open the live release, or one by its id, and hold it. Without lease nothing is written, and nothing held.

        The live release is one that was live at some moment of this call, the newer one where the pointer moved.
        Raises DataError if there is none, if it is being deleted, or if its run is not what was published.
        """
        attempt = 0
        while True:
            attempt += 1
            pointer = self.catalogue.live()
            name = pointer.release if release == "live" else release
            assert name is not None
            self.catalogue.resolve(name, pointer)
            kept = self._hold(name) if lease else None
            try:
                pointer = self.catalogue.live()  # the lease first, then the look: `gc` does the two the other way round
                if release == "live" and pointer.release != name and attempt < _ATTEMPTS:
                    continue
                record = self.catalogue.resolve(name, pointer)
                self.catalogue.confirm(record)
                opened, kept = Release(self.catalogue, record, kept, self._cache), None
                return opened
            finally:
                if kept is not None:
                    kept.close()

    def _hold(self, name: str) -> Lease:
        def still_there() -> None:
            self.catalogue.resolve(name, self.catalogue.live())

        return Lease(self.catalogue.storage, name, self._lease_seconds, self.catalogue.clock, still_there)
