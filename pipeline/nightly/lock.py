"""One night at a time: a lock on storage that its holder keeps alive.

`lock.json` of the site names the holder and when it last said that it lives; a thread says so every few seconds. A lock
whose process is known to be gone, of the same host, boot and container, is taken over at once; one that by the clock
was silent for `EXPIRY_SECONDS`, or is of the future, after a while in which it did not change: clocks jump, and those
of two hosts differ. Every write replaces what the writer saw and nothing else, so of two one wins, and a holder that
was taken for dead notices at its next beat and stops.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.contracts.errors import ConflictError, DataError, PipelineError
from pipeline.contracts.storage import Storage

LOCK = "lock.json"
BEAT_SECONDS = 15.0
EXPIRY_SECONDS = 300.0


@dataclass(frozen=True)
class Holder:
    """Who holds the lock; run is empty where nobody does. process is the pid and when it began, in kernel ticks.

    boot is where a pid means that process: a start of the host, and there a container.
    """

    token: str
    night: str
    run: str
    host: str
    boot: str
    process: tuple[int, int]
    taken_at: float
    beat_at: float

    @property
    def is_gone(self) -> bool:
        """Whether the lock is free, or its process is known to be dead."""
        here = (self.host, self.boot) == (socket.gethostname(), _boot())
        return not self.run or (here and not _is_alive(*self.process))

    def seems_gone(self, now: float, expiry: float) -> bool:
        """Whether its last word, by the clock, is too old or of the future."""
        return abs(now - self.beat_at) > expiry


class LostLockError(PipelineError):
    """Somebody else has taken the lock: this night was silent too long."""

    explains_interrupt = True


class Lock:
    """The lock, as its holder has it."""

    def __init__(self, storage: Storage, holder: Holder, stored: bytes) -> None:
        self._storage, self._holder, self._stored = storage, holder, stored
        self._ended = threading.Event()
        self._writing = threading.Lock()  # a beat on its way and the end would each take the other for another night
        self.lost = ""

    def check(self) -> None:
        """Raise LostLockError if the lock is no longer ours."""
        if self.lost:
            raise LostLockError(self.lost)

    def beat_until_ended(self, every: float, expiry: float, clock: Callable[[], float]) -> None:
        """Say every few seconds that the holder lives; interrupt the main thread when the lock is lost."""
        while not self._ended.wait(every):
            with self._writing:
                if self._ended.is_set():
                    return
                lost = self._beat(clock(), expiry)
                if lost and not self._ended.is_set():
                    self.lost = lost
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # a wait in a call ends too
                    return

    def _beat(self, now: float, expiry: float) -> str:
        """Say that the holder lives; why the lock is lost, if it is."""
        try:
            if self._replace(Holder(**{**asdict(self._holder), "beat_at": now})):
                return ""
            return f"{self._storage.locate(LOCK)} was taken over by another night: this one had been silent"
        except PipelineError as error:
            return f"the lock could not be kept alive: {error}" if now - self._holder.beat_at >= expiry / 2 else ""

    def free(self) -> None:
        """Let others have it, once a beat that is on its way has arrived."""
        self._ended.set()
        with self._writing:
            if not self.lost:
                with suppress(PipelineError):  # it expires by itself
                    self._replace(Holder(**{**asdict(self._holder), "run": "", "beat_at": time.time()}))

    def _replace(self, holder: Holder) -> bool:
        data = _encode(holder)
        if not self._storage.write_if(LOCK, self._stored, data):
            return False
        self._holder, self._stored = holder, data
        return True


@contextmanager
def hold(
    site: Storage, night: str, run: str, clock: Callable[[], float] = time.time, beat: float = BEAT_SECONDS,
    expiry: float = EXPIRY_SECONDS,
) -> Iterator[Lock]:  # fmt: skip
    """The site's lock while the block runs. Raises ConflictError, naming the holder, if another night has it."""
    lock = take(site, night, run, clock, beat, expiry)
    beating = threading.Thread(target=lock.beat_until_ended, args=(beat, expiry, clock), name="lock", daemon=True)
    beating.start()
    try:
        yield lock
    except KeyboardInterrupt:
        lock.check()
        raise
    finally:
        lock.free()
        beating.join()


def take(site: Storage, night: str, run: str, clock: Callable[[], float], beat: float, expiry: float) -> Lock:
    """The lock, without a thread that keeps it alive. Raises ConflictError if another has it."""
    stored, found = _look(site)
    if found is not None and not found.is_gone:
        seems_gone = found.seems_gone(clock(), expiry)
        if seems_gone:
            time.sleep(3 * beat)
        if not seems_gone or _look(site)[0] != stored:
            raise _held(site, found, clock(), expiry)
    now = clock()
    mine = Holder(uuid.uuid4().hex, night, run, socket.gethostname(), _boot(), _self(), now, now)
    if not site.write_if(LOCK, stored, _encode(mine)):
        found = _look(site)[1]
        raise (
            ConflictError(f"{site.url}: another night began this moment")
            if found is None
            else _held(site, found, now, expiry)
        )
    return Lock(site, mine, _encode(mine))


def _look(site: Storage) -> tuple[bytes | None, Holder | None]:
    try:
        return site.read_with(LOCK, lambda stored: (stored, _decode(stored, site.locate(LOCK))))
    except FileNotFoundError:
        return None, None


def _held(site: Storage, holder: Holder, now: float, expiry: float) -> ConflictError:
    return ConflictError(
        f"{site.url} is locked: night {holder.night} runs on {holder.host}, process {holder.process[0]}, and last said "
        f"so {max(0.0, now - holder.beat_at):.0f} s ago; wait for it, or, if it was killed, {expiry:.0f} s from then on"
    )


def _encode(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _decode(data: bytes, where: str) -> Holder:
    try:
        tree = json.loads(data)
        return Holder(**{**tree, "process": (int(tree["process"][0]), int(tree["process"][1]))})
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{where} is no lock of a night ({error!r}); delete it if no night runs") from None


def _boot() -> str:
    """What is another after every start of this host and in every namespace of pids; empty where nothing tells."""
    found = ""
    with suppress(OSError):
        found = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        found += f" {os.readlink('/proc/self/ns/pid')}"
    return found


def _self() -> tuple[int, int]:
    return os.getpid(), _began(os.getpid())


def _is_alive(pid: int, began: int) -> bool:
    """Whether the process that had this pid then is still there; True where the system does not tell."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    now = _began(pid)
    return not began or not now or now == began


def _began(pid: int) -> int:
    """When a process began, in ticks since the boot; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
