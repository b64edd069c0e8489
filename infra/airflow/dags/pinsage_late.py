"""What happens when a night is late: one line in the log, and a POST to PINSAGE_WEBHOOK if that is set.

Airflow calls it in the executor once the deadline of the DAG `pinsage_nightly` has passed with its run unfinished. The
address is read from the environment of the worker, as it may hold a secret.
"""

from __future__ import annotations

import json
import logging
import os
import urllib.request
from typing import Any


def tell(context: dict[str, Any], **_: object) -> None:
    """Say which run is late. Raises OSError if the webhook does not answer, so that the alert shows as failed."""
    run = context.get("dag_run") or {}
    message = {
        "event": "late",
        "dag": run.get("dag_id"),
        "run": run.get("dag_run_id") or run.get("run_id"),
        "night": str(run.get("logical_date") or run.get("run_after") or "")[:10],
    }
    logging.getLogger(__name__).error("the night is late: %s", message)
    address = os.environ.get("PINSAGE_WEBHOOK")
    if address:
        request = urllib.request.Request(address, json.dumps(message).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30):
            pass
