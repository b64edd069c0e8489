"""Where compiled kernels are kept when the code comes as a zip, as `--py-files` brings it to executors.

Numba keeps them by the path of the zip, which is another in every application and on every executor: each stage would
compile anew, 25 seconds of it. Here they are kept by what the zip holds, so a host compiles a version of the code once.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from numba.core.caching import ZipCacheLocator


class ByContent(ZipCacheLocator):
    """A zip's kernels in the user's cache, in a folder that all of the zip decides: kernels inline one another."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        super().__init__(py_func, py_file)
        folder = Path(self._cache_path).parent / f"zip-{_digest(self._zip_path)}"
        self._cache_path = str(folder / self._internal_path.replace("/", "."))

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> ByContent | None:
        """The locator of a function of a zip; None for others, and where the user's cache cannot be written."""
        if ".zip/" not in py_file:
            return None
        locator = cls(py_func, py_file)
        try:
            locator.ensure_cache_path()
        except OSError:
            return None
        return locator


@lru_cache(maxsize=4)
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
