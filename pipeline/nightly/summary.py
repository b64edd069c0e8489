"""How a night ended: `nights/<night>.json` of the site, `nights/latest.prom` for Prometheus, and a webhook."""

from __future__ import annotations

import http.client
import json
import os
import time
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
    site.write_bytes(f"{NIGHTS}/latest.prom", prometheus(summary).encode())
    return site.locate(path)


def read(site: Storage, night: str) -> dict[str, Any] | None:
    """The summary of a night, None if there is none. Raises DataError for one that cannot be read."""
    path = f"{NIGHTS}/{night}.json"
    try:
        tree = site.read_with(path, json.loads)
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
        run.read_with(f"{METRICS}/{stage.name}.json", json.loads) for stage in STAGES if f"{stage.name}.json" in names
    ]


def prometheus(summary: Mapping[str, Any]) -> str:
    """The summary as Prometheus' text format: for the textfile collector of a node exporter, or a push gateway."""
    data, data_names = summary.get("tonight") or {}, ("mrr", "volume", "rows", "items")
    lines = [
        "# TYPE pinsage_night_published gauge", f"pinsage_night_published {int(summary['status'] == 'published')}",
        "# TYPE pinsage_night_ended_timestamp_seconds gauge",
        f"pinsage_night_ended_timestamp_seconds {summary['ended_at']:.0f}",
        "# TYPE pinsage_night_seconds gauge",
        f"pinsage_night_seconds {summary['ended_at'] - summary['started_at']:.1f}",
        "# TYPE pinsage_stage_seconds gauge",
        *(f'pinsage_stage_seconds{{stage="{one["stage"]}"}} {one["seconds"]:.3f}' for one in summary["stages"]),
        "# TYPE pinsage_dataset_bytes gauge",
        *(
            f'pinsage_dataset_bytes{{dataset="{name}"}} {made["bytes"]}'
            for one in summary["stages"] for name, made in one["datasets"].items()
        ),
        "# TYPE pinsage_check gauge",
        *(
            f'pinsage_check{{check="{check["name"]}",verdict="{check["verdict"]}"}} {check["value"]}'
            for check in summary["checks"] if check["value"] is not None
        ),
    ]  # fmt: skip
    for name in data_names:
        if data.get(name) is not None:
            lines += [f"# TYPE pinsage_night_{name} gauge", f"pinsage_night_{name} {data[name]}"]
    return "\n".join(lines) + "\n"


def notify(summary: Mapping[str, Any]) -> str:
    """Send the summary to the webhook of the environment, if there is one; what went wrong, in words, or nothing.

    Whatever the address is and whoever answers there, the night has ended as it did; the words hold nothing secret.
    """
    url = os.environ.get(WEBHOOK, "")
    if not url:
        return ""
    headers = {"Content-Type": "application/json"}
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not of the web")
        request = urllib.request.Request(url, json.dumps(summary).encode(), headers, method="POST")
    except ValueError:
        return f"{WEBHOOK} is no http or https address: nobody was told"
    problem = ""
    for attempt in range(_ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
                return ""
        except (OSError, http.client.HTTPException, ValueError) as error:  # their words may have the path
            told = f"{type(error).__name__} {getattr(error, 'code', '')}".rstrip()
            problem = f"{parts.scheme}://{parts.hostname} did not take the summary: {told}"
            time.sleep(attempt)
    return problem
