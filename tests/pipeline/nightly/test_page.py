"""The page of a night: what it shows, and that nothing of the user's data becomes part of the page."""

from __future__ import annotations

import re
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.nightly import page, summary
from pipeline.nightly.summary import notify

NASTY = "<script>alert(1)</script>"


def night(date: str, status: str = "published", mrr: float | None = 0.2, **more: Any) -> dict[str, Any]:
    """A summary as a night writes it."""
    checks = [
        {"name": "neighbour churn", "value": 0.1, "bound": 0.5, "verdict": "pass", "reason": "10.0% are others"},
        {"name": "future", "value": None, "bound": 14, "verdict": "block", "reason": f"dated {NASTY}"},
    ]
    stage = {"stage": "ingest", "seconds": 7.25, "datasets": {"items": {"rows": 4707, "bytes": 2_500_000}}}
    return {
        "night": date, "run": date, "status": status, "reasons": [f"future: {NASTY}"] if status == "refused" else [],
        "previous": None, "training": {"plan": "reuse", "reason": "the model is 1 of 7 nights old", "nights_old": 1},
        "started_at": 0.0, "ended_at": 60.0, "stages": [stage], "checks": checks,
        "tonight": None if mrr is None else {"mrr": mrr, "volume": 1234, "rows": 9, "items": 3}, "forced": None, **more,
    }  # fmt: skip


class Elements(HTMLParser):
    """The tags of a page, and what would be fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "srcset") or (tag, name) == ("link", "href")
        ]


SEEN = {
    "map": [{"x": 0.0, "y": 1.0, "name": NASTY, "degree": 3}, {"x": 1.0, "y": 0.0, "name": "mug", "degree": 0}],
    "items": [
        {"name": NASTY, "degree": 3, "now": [["a", "stays"], ["b", "comes"]], "before": [["a", "stays"], ["c", "goes"]]}
    ],
}


def test_a_refused_night_says_why_beside_those_before() -> None:
    nights = [night("2011-03-04"), night("2011-03-05"), night("2011-03-06", "refused", 0.1)]
    text = page.render(nights[-1], nights, SEEN)
    assert "was refused, the release before it stays" in text
    assert text.count("<polyline") == 4, "a curve for everything that two nights tell"
    assert "<ins>comes</ins>" in text
    assert "<del>goes</del>" in text
    assert re.search(r"<th>ingest</th><td>7.2</td><td>7.2</td><td>7.2</td><td>4,707</td><td>2.5</td>", text)


@pytest.mark.parametrize("status", ["published", "refused", "failed", "out of time"])
def test_nothing_of_the_data_is_taken_for_html_and_nothing_is_fetched(status: str) -> None:
    ended = night("2011-03-05", status, None if status == "failed" else 0.2, reasons=[NASTY])
    found = Elements(page.render(ended, [ended], SEEN))
    assert "script" not in found.tags
    assert found.fetched == []
    assert found.tags.count("circle") == len(SEEN["map"])


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    """A real one, at its usual width: the picture has the page's paper, its ink and its map."""
    nights = [night("2011-03-04"), night("2011-03-05", mrr=0.21)]
    (tmp_path / "page.html").write_text(page.render(nights[-1], nights, SEEN))
    picture, address = tmp_path / "page.png", (tmp_path / "page.html").as_uri()
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    asked = ["--force-color-profile=srgb", "--window-size=1180,2400", f"--screenshot={picture}", address]
    subprocess.run([*command, *asked], check=True, capture_output=True, timeout=120)
    found = Image.open(picture).convert("RGB").getcolors(1 << 24)
    assert found is not None
    colours = sorted(count for count, _ in found)
    assert colours[-1] > 0.5 * sum(colours), "mostly paper"
    assert len(colours) > 100, "and letters, curves, a map"


def test_the_plane_keeps_what_varies_most() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 5)) * [0.1, 5.0, 0.1, 2.0, 0.1]
    flat = page.flattened(vectors)
    assert abs(np.corrcoef(flat[:, 0], vectors[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(flat[:, 1], vectors[:, 3])[0, 1]) > 0.99
    np.testing.assert_array_equal(page.flattened(np.ones((1, 3))), np.zeros((1, 2)))


def test_an_address_that_nobody_answers_is_said_without_its_secret(
    speaks_no_http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.nightly.summary.time.sleep", lambda _: None)
    for url, told in (
        ("http://127.0.0.1:9/s3cr3t", "http://127.0.0.1 did not take"),
        (f"http://{speaks_no_http}/s3cr3t", "http://127.0.0.1 did not take the summary: BadStatusLine"),
        ("http://127.0.0.1/s3cr3t and more", "http://127.0.0.1 did not take the summary: InvalidURL"),
        ("http://127.0.0.1:s3cr3t/", "http://127.0.0.1 did not take the summary: InvalidURL"),
        ("http://127.0.0.1:9/s3cr3t\u00e9", "http://127.0.0.1 did not take"),
        ("http://[s3cr3t/", "no http"),
        ("http:///s3cr3t", "no http"),
        ("file:///etc/s3cr3t", "no http"),
    ):
        monkeypatch.setenv(summary.WEBHOOK, url)
        problem = notify(night("2011-03-05"))
        assert told in problem
        assert "s3cr3t" not in problem
    monkeypatch.delenv(summary.WEBHOOK)
    assert notify(night("2011-03-05")) == ""


@pytest.fixture
def speaks_no_http() -> Iterator[str]:
    """Host and port of a server that answers in another language."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(b"220 ready\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
