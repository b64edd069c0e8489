"""The process that a local session's Python workers are forked from, with what all of them need already imported.

Spark's own takes pyspark from a zip, which holds no compiled code, and leaves it to every worker to import what its
first task needs, and numba to make ready for what is compiled. Of what is imported here only Arrow's allocator has a
thread, and does without in a fork.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

IMPORTS = "PINSAGE_IMPORTS"
"""Environment variable: more modules to import, with commas between."""
NEEDED = ("numba", "pyarrow.compute", "pyarrow.parquet", "pyspark.worker", "pipeline.spark")


def main() -> None:
    """Import, and serve Spark until it ends."""
    gc.disable()  # what is imported stays: looking for garbage among it takes a tenth of the time
    sys.path[:] = [entry for entry in sys.path if not is_copy(entry, sys.path)]
    for name in (*NEEDED, *filter(None, os.environ.get(IMPORTS, "").split(","))):
        import_module(name)
    import_module("pyarrow").array([""])  # imports pandas, if that is installed
    import_module("pipeline.mixing").mix(0)  # the first compiled call of a process takes half a second
    gc.collect()
    gc.freeze()
    gc.enable()
    daemon: Any = import_module("pyspark.daemon")
    daemon.worker = quiet(daemon.worker)
    daemon.manager()


def is_copy(entry: str, entries: Sequence[str]) -> bool:
    """Whether a path to import from is a zip of a pyspark that lies installed in another of them."""
    folders = Path(entry).parents
    return entry.endswith(".zip") and len(folders) > 3 and folders[2].name == "pyspark" and str(folders[3]) in entries


def quiet(worker: Callable[..., int]) -> Callable[..., int]:
    """A worker that, when Spark has closed its socket, ends without a traceback: that is how a session ends."""

    def work(*arguments: Any) -> int:
        try:
            return worker(*arguments)
        except BrokenPipeError:
            return 1

    return work


if __name__ == "__main__":
    main()
