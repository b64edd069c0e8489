"""Sites on a disk, in memory and behind a real HTTP endpoint that speaks S3."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline.contracts.storage import Storage

PLACES = ("disk", "memory", "s3")
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """A bucket of a moto server that answers one request at a time, so that of two conditional puts one is first."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("releases-test")
        yield "s3://releases-test"
    server.shutdown()
    thread.join()


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty site at the kind of place that the test names."""
    kind = getattr(request, "param", "memory")
    if kind == "s3":
        yield f"{request.getfixturevalue('bucket')}/{uuid.uuid4()}"
    elif kind == "disk":
        yield str(tmp_path / "site")
    else:
        site = f"memory://{uuid.uuid4()}"
        yield site
        Storage(site).delete("")  # what lies in memory makes listings slow


everywhere = pytest.mark.parametrize("place", PLACES, indirect=True)
