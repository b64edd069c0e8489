"""The session with Spark: started early, light, and found again; what its processes are told.

A session starts in 5.5 seconds and 7 core-seconds, a small inference and the imports included: a context without SQL,
in a JVM that starts beside the imports of a fork of the caller, from which workers are forked and spoken to over Unix
sockets.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from py4j.protocol import Py4JError
from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkException

from pipeline.contracts.config import SparkResources
from pipeline.contracts.errors import ResourceError
from pipeline.contracts.interrupts import interrupts_first
from pipeline.contracts.safety import SECRET_NAMES
from pipeline.jvm import LIGHT, archive_options
from pipeline.worker_daemon import AHEAD, IMPORTS, fork_ahead, may_fork

_LOCATORS = "UserProvidedCacheLocator,InTreeCacheLocator,UserWideCacheLocator,IPythonCacheLocator,ZipCacheLocator"
"""Where numba looks for compiled kernels of its own accord."""
_LONGEST_FOLDER = 61
"""Letters of a folder that Spark takes for its sockets: a socket's path has 104 at most."""
_QUIET = Path(__file__).with_name("log4j2.properties")


def launch(resources: SparkResources, imports: Sequence[str] = ()) -> None:
    """Let Spark's JVM start, and return at once: what the caller imports and reads meanwhile takes no time then.

    session waits for it; if it did not start, session tries again, and says why. What the caller has imported, a local
    session's workers have too, and what imports names.
    """
    if _is_submitted() or SparkContext._gateway is not None:
        return
    settings = _settings(resources, imports)
    _fork_ahead(dict(settings.getAll()))

    def start() -> None:
        with suppress(Exception):
            SparkContext._ensure_initialized(conf=settings)

    threading.Thread(target=start, name="spark", daemon=True).start()


def session(resources: SparkResources, name: str, imports: Sequence[str] = ()) -> SparkContext:
    """Start Spark, or find it. Settings given to spark-submit win over ours.

    imports are modules that most workers will need: a local session imports them once, before it forks its workers. A
    context is enough: tasks need no SQL, whose session takes Spark a second more to start. Raises ResourceError if
    the driver's port is taken, or if Java or the master cannot be reached.
    """
    if resources.driver_port:
        check_port(resources.driver_port, "resources.spark.driver_port")
    if _stopping:
        _stopping.pop().join()
    try:
        with interrupts_first(), _own_interrupts():
            spark = SparkContext.getOrCreate(_settings(resources, imports).setAppName(name))
    except (PySparkException, Py4JError, RuntimeError, OSError) as error:
        java = getattr(error, "java_exception", None)
        reason = (str(error) if java is None else str(java.getMessage())).splitlines()[0].rstrip(".")
        raise ResourceError(
            f"Spark did not start on {resources.master or 'the submitted master'}: {reason}; Java 17 or newer must be "
            "installed (`java -version`), and resources.spark.master must be right and answer"
        ) from error
    spark.setLogLevel("ERROR")
    return spark


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Let an interrupt go on meaning what it means to the caller once the block has made a session.

    pyspark's handler would ask the JVM to cancel all jobs, over the connection on which the interrupted call waits:
    that fails, in forty lines. Who stops the session ends its jobs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
        for logger in (None, "py4j.clientserver"):
            logging.getLogger(logger).addFilter(_is_no_interrupt)  # added once, however often


def _is_no_interrupt(record: logging.LogRecord) -> bool:
    """Not what py4j logs, with tracebacks, before it lets the interrupt through, which closes the connection."""
    return record.msg not in (
        "KeyboardInterrupt while sending command.", "Exception occurred while shutting down connection",
    )  # fmt: skip


def is_forked_ahead() -> bool:
    """Whether launch, called now, forks this process, so that workers have what it has imported by then."""
    return may_fork() and not _is_submitted() and SparkContext._gateway is None


def _fork_ahead(settings: dict[str, str]) -> None:
    """Let what workers are forked from import while the JVM starts, where it is a fork of this process."""
    folder, sign = settings.get("spark.python.unix.domain.socket.dir"), "spark.executorEnv."
    if folder is None or _ahead:
        return
    own = {name.removeprefix(sign): value for name, value in settings.items() if name.startswith(sign)}
    if set(own) - _OURS or os.environ["PYSPARK_PYTHON"] != sys.executable:
        return  # what else workers are given may count as they start, or before what they import is imported
    threads = {"OMP_NUM_THREADS": settings.get("spark.task.cpus", "1")}  # as Spark tells its workers
    path = f"{folder}/{_AHEAD_NAME}"
    child = fork_ahead(path, {**os.environ, **threads, **own})
    if child is not None:
        _ahead[path] = child
        atexit.register(_end_ahead)


def _end_ahead() -> None:
    """Let the process that was forked end, and wait for it."""
    while _ahead:
        _, child = _ahead.popitem()
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)


_ahead: dict[str, int] = {}
"""The process that was forked ahead, by its socket; one in a process's life."""
_AHEAD_NAME = "ahead"
_OURS = {"OMP_WAIT_POLICY", "NUMBA_CACHE_LOCATOR_CLASSES", IMPORTS}
"""Of the environment that workers are given, what this module sets."""
_stopping: list[threading.Thread] = []
"""What still stops the last session."""


def stop(spark: SparkContext) -> None:
    """Stop Spark. For a thread of its own, which sleeps up to a second, pyspark waits by itself."""

    def end() -> None:
        with suppress(Exception):
            spark.setLogLevel("OFF")  # tasks that are cut off would say what they find gone
        spark.stop()

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    _stopping.append(thread)
    while thread.is_alive() and spark._jsc is not None:
        thread.join(0.01)
    _end_ahead()


def _is_submitted() -> bool:
    return bool(os.environ.get("SPARK_ENV_LOADED") or os.environ.get("PYSPARK_GATEWAY_PORT"))


def _settings(resources: SparkResources, imports: Sequence[str] = ()) -> SparkConf:
    """What Spark is started with, and, in the environment, what its processes inherit."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tasks side by side: spinning threads cost up to 8 times
    submitted = _is_submitted()
    wanted = {
        "spark.driver.memory": resources.driver_memory,
        "spark.redaction.regex": f"(?i){SECRET_NAMES}",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.python.worker.reuse": "true",
        "spark.executorEnv.OMP_WAIT_POLICY": "PASSIVE",
        "spark.executorEnv.NUMBA_CACHE_LOCATOR_CLASSES": f"pipeline.kernel_cache.ByContent,{_LOCATORS}",
        "spark.driver.extraJavaOptions": LIGHT,
        "spark.executor.extraJavaOptions": LIGHT,
        **({"spark.driver.port": str(resources.driver_port)} if resources.driver_port else {}),
    }
    if resources.master and not submitted:
        wanted["spark.master"] = resources.master
        if resources.master.startswith("local"):
            wanted |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1", **_unix_sockets()}
            wanted["spark.python.daemon.module"] = "pipeline.worker_daemon"
            wanted[f"spark.executorEnv.{IMPORTS}"] = ",".join(imports)
            wanted |= {f"spark.executorEnv.{AHEAD}": path for path in _ahead}
    wanted |= resources.conf
    if not submitted:
        options = wanted.get("spark.driver.extraJavaOptions", "")
        if _QUIET.exists() and "log4j" not in options:
            options = f"{options} -Dlog4j2.configurationFile={_QUIET.as_uri()}".strip()
        if "Archive" not in options and "-Xshare" not in options:
            options = f"{options} {archive_options(wanted.get('spark.driver.extraClassPath', ''))}".strip()
        wanted["spark.driver.extraJavaOptions"] = options
    given = _submitted_settings() if submitted else {}
    return SparkConf().setAll([pair for pair in wanted.items() if pair[0] not in given])


@lru_cache(maxsize=1)
def _unix_sockets() -> dict[str, str]:
    """Settings for sockets of this machine between Spark and its Python workers, in a folder closed to other users.

    Over TCP every task waited 40 ms for an acknowledgement that the system delays. Not on clusters: a container's
    temporary folder may have too long a name for a socket in it.
    """
    prefix = "pinsage-spark-"
    if not hasattr(socket, "AF_UNIX") or len(f"{tempfile.gettempdir()}/{prefix}") > _LONGEST_FOLDER - 8:
        return {}
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"spark.python.unix.domain.socket.enabled": "true", "spark.python.unix.domain.socket.dir": folder}


def _submitted_settings() -> dict[str, str]:
    """What spark-submit was given, with the cluster's own defaults."""
    SparkContext._ensure_initialized()
    return dict(SparkConf().getAll())


def is_running() -> bool:
    """Whether this process has a session."""
    found = SparkContext._active_spark_context
    return found is not None and found._jsc is not None


def check_port(port: int, setting: str) -> None:
    """Raise ResourceError if this machine's port is taken; setting is named in the message."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ResourceError(
                f"{setting}: port {port} cannot be opened ({error.strerror}); choose another, or 0 for any free one"
            ) from None
