"""An S3 endpoint of its own process, and a proxy before it that does what networks and object stores do at night.

    with moto_server() as upstream, FaultyProxy(upstream, seed=1, rates={"500": 0.1}) as proxy: ...

Faults are drawn from a seed. No request of one name is met by more than `in_a_row` faults one after the other: time
mends them, as it does in life.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import select
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

FAULTS = ("500", "503", "reset", "hang", "slow", "truncated", "cut", "stale")
"""reset: the connection breaks; hang: no answer comes; slow: the body comes in pieces; truncated: less of it than its
length says; cut: less, and its length says so too; stale: a listing of before."""
_OF_BODIES = ("slow", "truncated", "cut")
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing-key-id",
    "AWS_SECRET_ACCESS_KEY": "testing-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "FSSPEC_S3": '{"config_kwargs": {"read_timeout": 3}}',
}
"""Credentials of the endpoint, as a user would give them."""


class Answer(NamedTuple):
    """What upstream said."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


def kind_of(method: str, target: str, ranged: bool) -> str:
    """GET, RANGE, HEAD, PUT, DELETE or LIST; POST by what it asks for."""
    asked = parse_qs(urlsplit(target).query, keep_blank_values=True)
    if method == "GET" and ("list-type" in asked or "prefix" in asked):
        return "LIST"
    if method == "GET":
        return "RANGE" if ranged else "GET"
    return next((f"POST {name}" for name in ("delete", "uploads", "uploadId") if name in asked), method)


class FaultyProxy:
    """Passes HTTP requests on to upstream, but for its faults. counts: requests by kind; caused: faults by name."""

    def __init__(
        self, upstream: str, seed: int = 0, rates: Mapping[str, float] | None = None, in_a_row: int = 1
    ) -> None:
        self.upstream, self.rates, self.in_a_row = urlsplit(upstream).netloc, dict(rates or {}), in_a_row
        self.counts: Counter[str] = Counter()
        self.caused: Counter[str] = Counter()
        self._random, self._lock, self._over = random.Random(seed), threading.Lock(), threading.Event()
        self._row: Counter[tuple[str, str]] = Counter()
        self._lists: dict[str, bytes] = {}
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or every answer waits 40 ms for the client's acknowledgement

            def handle_one_request(self) -> None:
                with suppress(ConnectionError, TimeoutError):
                    super().handle_one_request()

            def do_GET(self) -> None:
                proxy._serve(self)

            do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815 (names given by http.server)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def _choose(self, kind: str, name: tuple[str, str]) -> str | None:
        with self._lock:
            self.counts[kind] += 1
            drawn = self._random.random()
            for fault, rate in self.rates.items():
                if 0 <= drawn < rate and self._row[name] < self.in_a_row and self._suits(fault, kind):
                    self._row[name] += 1
                    return fault
                drawn -= rate
            self._row[name] = 0
            return None

    @staticmethod
    def _suits(fault: str, kind: str) -> bool:
        if fault == "stale":
            return kind == "LIST"
        return kind in ("GET", "RANGE", "LIST") if fault in ("truncated", "cut", "slow") else True

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        kind = kind_of(request.command, request.path, "Range" in request.headers)
        fault = self._choose(kind, (request.command, f"{request.path} {request.headers.get('Range', '')}"))
        answer = None
        if fault in ("reset", "hang") and self._random.random() < 0.5:
            answer = self._forward(request, body)  # done, and the client never learns
        if fault == "cut" and kind == "LIST":
            fault = "truncated"  # half of an XML document is none
        if fault:
            with self._lock:
                self.caused[fault] += 1
        if fault in ("500", "503"):
            code = "InternalError" if fault == "500" else "SlowDown"
            text = f"<Error><Code>{code}</Code><Message>we are sorry</Message></Error>".encode()
            self._reply(request, Answer(int(fault), [("Content-Type", "application/xml")], text))
        elif fault == "reset":
            self._break(request)
        elif fault == "hang":
            select.select([request.connection], [], [], 30)  # until the client gives up
            self._break(request)
        else:
            answer = answer or self._forward(request, body)
            if kind == "LIST" and answer.status == 200:
                before = self._lists.get(request.path)
                self._lists[request.path] = before if fault == "stale" and before is not None else answer.body
                answer = answer._replace(body=self._lists[request.path])
            self._reply(request, answer, fault if fault in _OF_BODIES else None)

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> Answer:
        headers = {
            name: value for name, value in request.headers.items() if name.lower() not in ("expect", "connection")
        }
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        try:
            connection.request(request.command, request.path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, response.getheaders(), response.read())
        finally:
            connection.close()

    def _reply(self, request: BaseHTTPRequestHandler, answer: Answer, fault: str | None = None) -> None:
        left_out = ("content-length", "transfer-encoding", "connection", "date", "server")
        body = answer.body[: len(answer.body) // 2] if fault == "cut" else answer.body
        request.send_response(answer.status)
        for name, value in answer.headers:
            if name.lower() not in left_out and not (fault == "cut" and name.lower().startswith("x-amz-checksum")):
                request.send_header(name, value)
        own = next((value for name, value in answer.headers if name.lower() == "content-length"), None)
        length = own if request.command == "HEAD" and own is not None else str(len(body))
        request.send_header("Content-Length", length)
        request.end_headers()
        if request.command == "HEAD":
            return
        if fault == "truncated":
            request.wfile.write(body[: len(body) // 2])
            self._break(request)
        elif fault == "slow":
            for start in range(0, len(body), max(1, len(body) // 4)):
                request.wfile.write(body[start : start + max(1, len(body) // 4)])
                request.wfile.flush()
                self._over.wait(0.05)
        else:
            request.wfile.write(body)

    @staticmethod
    def _break(request: BaseHTTPRequestHandler) -> None:
        """End the connection so that the other side notices at once."""
        request.close_connection = True
        request.wfile.flush()
        if sys.platform == "linux":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.connection.close()


@contextmanager
def moto_server() -> Iterator[str]:
    """moto's S3 endpoint in a process of its own; gives its URL."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        seen = []
        for line in process.stderr:
            seen.append(line)
            found = re.search(r"Running on (http://127\.0\.0\.1:\d+)", line)
            if found:
                break
        else:
            raise RuntimeError(f"moto did not start: {''.join(seen)}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
        yield found.group(1)
    finally:
        process.terminate()
        process.wait()
