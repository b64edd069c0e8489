"""One local Spark session for all tests, temporary storage, and a small shop's data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark import SparkContext

from pipeline.contracts.config import SparkResources
from pipeline.contracts.storage import Storage
from pipeline.session import session

LONGEST = ("test_cluster", "test_end_to_end")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that two processes end together."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkContext]:
    """A real Spark on two local cores."""
    found = session(SparkResources(master="local[2]", driver_memory="1g"), "tests")
    yield found
    found.stop()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty run folder."""
    return Storage(str(tmp_path / "run"))
