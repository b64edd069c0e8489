"""Leases: a reader says that it holds a release, and until when; `gc` waits for it.

`releases/leases/<id>/<holder>.json` is renewed by a thread every third of its length while the release is open, and
deleted when it is closed; a reader that dies leaves it to expire. Clocks of readers and of `gc` may differ by what
resources.releases.clock_skew_seconds says: `gc` counts a lease for so much longer. Cost: one small write per renewal.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

from pipeline.contracts.errors import PipelineError
from pipeline.contracts.storage import Storage
from pipeline.releases.records import FOLDER, checked_id, whoami

LEASES = f"{FOLDER}/leases"


@dataclass(frozen=True)
class Held:
    """A lease: who holds which release until when (seconds since 1970, by the holder's clock)."""

    release: str
    holder: str
    who: str
    expires_at: float

    @property
    def path(self) -> str:
        """Where it lies."""
        return f"{LEASES}/{self.release}/{self.holder}.json"


def held(storage: Storage, now: float, skew: float) -> list[Held]:
    """All leases that count at this moment; skew: for so many seconds after their end."""
    return [lease for lease in all_leases(storage) if now <= lease.expires_at + skew]


def all_leases(storage: Storage) -> list[Held]:
    """Every lease, expired ones too. One that cannot be read counts for ever: nobody knows until when."""
    found = []
    for release in storage.names(LEASES):
        for name in storage.names(f"{LEASES}/{release}"):
            holder = name.removesuffix(".json")
            with suppress(FileNotFoundError):  # closed since it was listed
                data = storage.read_bytes(f"{LEASES}/{release}/{name}")
                try:
                    tree = json.loads(data)
                    found.append(Held(release, holder, str(tree["who"]), float(tree["expires_at"])))
                except (ValueError, KeyError, TypeError):
                    found.append(Held(release, holder, f"unreadable: {LEASES}/{release}/{name}", float("inf")))
    return found


class Lease:
    """Holds a release from when it is made until it is closed. still_there is asked when a renewal came too late."""

    def __init__(
        self,
        storage: Storage,
        release: str,
        seconds: float,
        clock: Callable[[], float],
        still_there: Callable[[], object],
    ) -> None:
        self._storage, self._seconds, self._clock, self._still_there = storage, seconds, clock, still_there
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:40].lstrip(".")
        self.held = Held(checked_id(release), f"{host}-{os.getpid()}-{uuid.uuid4().hex[:12]}", whoami(), 0.0)
        self._refusal: PipelineError | None = None
        self._closed = threading.Event()
        self.renew()
        self._thread = threading.Thread(target=self._keep, name=f"lease of {release}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> PipelineError | None:
        """Why it could not be renewed, once it has expired and the release may be deleted; None while it is held."""
        return self._refusal if self._clock() > self.held.expires_at else None

    def renew(self) -> None:
        """Say that the reader is there. After a pause longer than the lease, see whether the release still is."""
        now = self._clock()
        late = 0.0 < self.held.expires_at < now
        self.held = Held(self.held.release, self.held.holder, self.held.who, now + self._seconds)
        self._storage.write_bytes(self.held.path, json.dumps(asdict(self.held)).encode(), lasting=False)
        if late:
            self._still_there()

    def close(self) -> None:
        """Let the release go."""
        self._closed.set()
        self._thread.join()
        with suppress(PipelineError):  # it expires by itself
            self._storage.delete(self.held.path)

    def _keep(self) -> None:
        while not self._closed.wait(self._seconds / 3):
            kept = self.held
            try:
                self.renew()
                self._refusal = None
            except PipelineError as error:  # told to whoever asks the release; the next round may mend it
                self.held, self._refusal = kept, error
