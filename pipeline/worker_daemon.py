"""The process that a local session's Python workers are forked from, with what all of them need already imported.

Spark's own takes pyspark from a zip, which holds no compiled code, and leaves it to every worker to import what its
first task needs, and numba to make ready for what is compiled. Of what is imported here only Arrow's allocator has a
thread, and does without in a fork.

Where it may, a session forks it from the driver, before Spark's JVM starts (`fork_ahead`): it has the driver's modules
then, and imports the rest while the JVM starts. When Spark asks for its daemon, what it starts hands its streams over
to the one that waits, on a Unix socket, and stays as long as that lives. What keeps it from that (other threads, an
environment that is another, a fork that died or does not answer) costs time and nothing else: Spark's process is the
daemon itself then.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

IMPORTS, AHEAD = "PINSAGE_IMPORTS", "PINSAGE_AHEAD"
"""Environment variables: more modules to import, with commas between; the socket of the process forked ahead."""
NEEDED = ("numba", "pyarrow.compute", "pyarrow.parquet", "pyspark.worker", "pipeline.spark")
_UNFORKABLE = ("torch", "faiss")
"""Libraries whose threads, if the driver has used them, a fork would wait for."""
_READ_EARLY = ("OMP_", "MKL_", "OPENBLAS_", "KMP_", "NUMBA_NUM", "TORCH_", "PYTORCH_")
"""How variables begin that libraries read as they are imported."""
_PR_SET_PDEATHSIG = 1
_TAKEN = b"+"
_STREAMS = (0, "r"), (1, "w"), (2, "w")
_SIZE = struct.Struct("!q")
_PATIENCE = 60.0
"""Seconds that Spark's process waits for the one that was forked."""


def main() -> None:
    """Be the daemon, or wait for the one that was forked ahead; serve Spark until it ends."""
    path = os.environ.get(AHEAD)
    if path and _hand_over(path):
        return
    prepare()
    serve()


def prepare() -> None:
    """Import what workers need."""
    gc.disable()  # what is imported stays: looking for garbage among it takes a tenth of the time
    sys.path[:] = [entry for entry in sys.path if not is_copy(entry, sys.path)]
    for name in NEEDED:
        import_module(name)
    _import_named()
    import_module("pyarrow").array([""])  # imports pandas, if that is installed
    import_module("pipeline.mixing").mix(0)  # the first compiled call of a process takes half a second
    gc.freeze()
    gc.enable()


def _import_named() -> None:
    """Import what the environment names."""
    for name in filter(None, os.environ.get(IMPORTS, "").split(",")):
        import_module(name)


def limit_threads(count: int) -> None:
    """Let BLAS and OpenMP, loaded in the driver with as many threads as there are cores, use so many."""
    import_module("threadpoolctl").threadpool_limits(count)


def serve() -> None:
    """Fork workers for Spark until it ends."""
    daemon: Any = import_module("pyspark.daemon")
    daemon.worker = quiet(daemon.worker)
    daemon.manager()


def may_fork() -> bool:
    """Whether this process can be forked, and go on in the fork with what it has."""
    is_alone = threading.active_count() == 1 and not any(name in sys.modules for name in _UNFORKABLE)
    return sys.platform == "linux" and is_alone


def fork_ahead(path: str, environment: Mapping[str, str]) -> int | None:
    """Fork a process that imports and then waits at a Unix socket to become the daemon; its number.

    environment is what Spark will give its workers. None, and no fork, where that is not safe: other threads may hold
    locks that nobody would release.
    """
    if not may_fork():
        return None
    with suppress(OSError, AttributeError):
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(path)
        server.listen(1)
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        with warnings.catch_warnings():  # Python counts OpenBLAS's threads, which outlive a fork
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            _wait(server, parent, environment)
        server.close()
        return child
    return None


def _wait(server: socket.socket, parent: int, environment: Mapping[str, str]) -> None:
    """In the fork: import, be handed Spark's streams, serve. Never returns to what the driver was doing."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Spark's JVM and all that it starts
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            return
        os.environ.clear()
        os.environ.update(environment)
        prepare()
        limit_threads(int(environment["OMP_NUM_THREADS"]))
        connection, _ = server.accept()
        server.close()
        size, streams, *_ = socket.recv_fds(connection, _SIZE.size, 3)
        given = json.loads(_receive(connection, *_SIZE.unpack(size)))
        if _early(given["environment"]) != _early(environment):
            return
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
            os.close(stream)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, 1, errors="backslashreplace") for n, mode in _STREAMS)
        os.environ.clear()
        os.environ.update(given["environment"])
        sys.argv = given["arguments"]
        _import_named()
        connection.sendall(_TAKEN + _SIZE.pack(os.getpid()))
        _to_spare.append(connection)
        code = 0
        serve()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        os._exit(code)


_to_spare: list[socket.socket] = []
"""What a daemon holds and its workers should not: it says that the daemon lives."""


def _hand_over(path: str) -> bool:
    """Let the process that waits there be Spark's daemon, and end with it; False if it cannot be."""
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_PATIENCE)
        connection.connect(path)
        given = json.dumps({"environment": dict(os.environ), "arguments": sys.argv}).encode()
        socket.send_fds(connection, [_SIZE.pack(len(given))], [0, 1, 2])
        connection.sendall(given)
        answer = _receive(connection, len(_TAKEN) + _SIZE.size)
    except OSError:
        return False
    if not answer.startswith(_TAKEN):
        return False
    (daemon,) = _SIZE.unpack(answer[len(_TAKEN) :])

    def end(*_: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(daemon, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # Spark sees that they end when they do
        os.dup2(nothing, stream)
    connection.settimeout(None)
    _receive(connection, 1)
    return True


def _receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer if the other end closes."""
    found = b""
    while len(found) < size and (part := connection.recv(size - len(found))):
        found += part
    return found


def _early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_EARLY)}


def is_copy(entry: str, entries: Sequence[str]) -> bool:
    """Whether a path to import from is a zip of a pyspark that lies installed in another of them."""
    folders = Path(entry).parents
    return entry.endswith(".zip") and len(folders) > 3 and folders[2].name == "pyspark" and str(folders[3]) in entries


def quiet(worker: Callable[..., int]) -> Callable[..., int]:
    """A worker that, when Spark has closed its socket, ends without a traceback: that is how a session ends.

    Nor with one of the file around the socket: from Python 3.13 on a file that cannot be flushed says so when it goes.
    """

    def work(*arguments: Any) -> int:
        while _to_spare:
            _to_spare.pop().close()
        others = sys.unraisablehook
        sys.unraisablehook = lambda found: None if isinstance(found.exc_value, BrokenPipeError) else others(found)
        try:
            return worker(*arguments)
        except BrokenPipeError:
            return 1

    return work


if __name__ == "__main__":
    main()
