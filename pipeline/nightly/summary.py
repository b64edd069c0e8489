"""How a night ended: `nights/<night>.json` of the site, and the same to a webhook."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pipeline.contracts.errors import DataError
from pipeline.contracts.schemas import METRICS, STAGES
from pipeline.contracts.storage import Storage

NIGHTS = "nights"
WEBHOOK = "PINSAGE_WEBHOOK"
"""Environment variable with the URL that summaries are sent to. It may hold a secret, so it is no setting."""
Status = Literal["published", "refused", "failed", "out of time"]
_ATTEMPTS, _TIMEOUT_SECONDS = 3, 10.0


def write(site: Storage, night: str, summary: Mapping[str, Any]) -> str:
    """Keep the summary of a night's last run; returns where."""
    path = f"{NIGHTS}/{night}.json"
    site.write_bytes(path, (json.dumps(summary, indent=1, sort_keys=True) + "\n").encode())
    return site.locate(path)


def read(site: Storage, night: str) -> dict[str, Any] | None:
    """The summary of a night, None if there is none. Raises DataError for one that cannot be read."""
    path = f"{NIGHTS}/{night}.json"
    try:
        tree = json.loads(site.read_bytes(path))
        if not isinstance(tree["status"], str):
            raise ValueError("its status is no text")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{site.locate(path)} is no night's summary ({error!r}); delete it") from None
    found: dict[str, Any] = tree
    return found


def read_all(site: Storage) -> list[dict[str, Any]]:
    """The summaries of all nights, by date."""
    names = [name.removesuffix(".json") for name in site.names(NIGHTS) if name.endswith(".json")]
    return [found for found in (read(site, name) for name in sorted(names)) if found is not None]


def stages(run: Storage) -> list[dict[str, Any]]:
    """What the clock said of the run's stages, in their order."""
    names = set(run.names(METRICS))
    return [
        json.loads(run.read_bytes(f"{METRICS}/{stage.name}.json")) for stage in STAGES if f"{stage.name}.json" in names
    ]


def notify(summary: Mapping[str, Any]) -> str:
    """Send the summary to the webhook of the environment, if there is one; what went wrong, in words, or nothing."""
    url = os.environ.get(WEBHOOK, "")
    if not url:
        return ""
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.hostname}"
    if parts.scheme not in ("http", "https"):
        return f"{WEBHOOK} is no http or https address: nobody was told"
    request = urllib.request.Request(
        url, json.dumps(summary).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    problem = ""
    for attempt in range(_ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
                return ""
        except (OSError, urllib.error.URLError, ValueError) as error:
            problem = f"{shown} did not take the summary: {type(error).__name__} {getattr(error, 'code', '')}".rstrip()
            time.sleep(attempt)
    return problem
