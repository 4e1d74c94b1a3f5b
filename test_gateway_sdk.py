"""Tests of gateway_sdk, in the order of the module: real sockets, real files, nothing patched.

Two kinds of servers stand behind them. The local gateway of `examples/` behaves as the protocol says;
a `Script` says byte for byte what the test wants, and records what it was sent.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import gateway_sdk
from gateway_sdk import (
    AgentContextRequiredError,
    AuthenticationError,
    BatchResult,
    CallStatus,
    EventStream,
    GatewayClient,
    GatewayError,
    GatewayTimeoutError,
    MissingSecretError,
    PrefabCall,
    PrefabInfo,
    PrefabNotFoundError,
    PrefabResult,
    QuotaExceededError,
    ServiceUnavailableError,
    StreamEvent,
    StreamEventType,
    ValidationError,
)

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "examples"))

from local_gateway import LocalGateway  # noqa: E402 - lies in examples/

TOKEN = "token-of-the-agent"
WAIT_SECONDS = 10.0  # for what must happen; only a failing test waits that long

# --- Servers --------------------------------------------------------------------------------------


class Received(NamedTuple):
    """One request as it came in."""

    method: str
    target: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    connection: int  # number of the connection that it came on, from 0

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class HangUp(NamedTuple):
    """Send these bytes, then close the connection (FIN), or reset it (RST)."""

    sent_before: bytes = b""
    reset: bool = False


class Pause(NamedTuple):
    """Send these bytes, then nothing until the client hangs up or the server is closed."""

    sent_before: bytes = b""


class Steps(NamedTuple):
    """Call these one after another with the connection's socket."""

    steps: tuple[Callable[[socket.socket], object], ...]


Answer = Any  # bytes (the connection stays open), HangUp, Pause, Steps


def answer(content: Any = None, status: int = 200, *, body: bytes | None = None, **headers: str) -> bytes:
    """A whole answer with `Content-Length`; `content` is sent as JSON, `body` as it is."""
    body = json.dumps(content).encode() if body is None else body
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join((*lines, "\r\n")).encode("latin-1") + body


def chunked(*chunks: bytes, end: bool = True, content_type: str = "text/event-stream") -> bytes:
    """An answer in chunks; without `end`, the last chunk is missing."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + (b"0\r\n\r\n" if end else b"")


def ran(output: Any = "ok", **fields: Any) -> bytes:
    """The answer to a run request with one successful call."""
    entry = {"status": "SUCCESS", "output": {"status": "SUCCESS", "output": output}, "error": None, **fields}
    return answer({"job_id": "job-1", "status": "COMPLETED", "results": [entry]})


def event(type_: str, data: Any = None, **fields: Any) -> bytes:
    """One event as deployed gateways write it."""
    return b"data: " + json.dumps({"type": type_, "data": data, **fields}).encode() + b"\n\n"


class Script:
    """A server on loopback that gives one scripted answer per request, then closes connections.

    A `bytes` answer leaves the connection open for the next request.
    """

    def __init__(self, *answers: Answer) -> None:
        self.received: list[Received] = []
        self.connections = 0
        self._answers = collections.deque(answers)
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(WAIT_SECONDS)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Waits until `condition()` is true; requests and connections wake it."""
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_SECONDS), "it did not happen"

    @property
    def open_connections(self) -> int:
        return len(self._sockets)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                number, self.connections = self.connections, self.connections + 1
                self._sockets.add(sock)
                self._changed.notify_all()
            thread = threading.Thread(target=self._serve, args=(sock, number), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError), sock:
            try:
                while self._exchange(sock, number):
                    pass
            finally:
                with self._changed:
                    self._sockets.discard(sock)
                    self._changed.notify_all()

    def _exchange(self, sock: socket.socket, number: int) -> bool:
        head = b""
        while b"\r\n\r\n" not in head:
            received = sock.recv(65536)
            if not received:
                return False
            head += received
        head, _, body = head.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        while len(body) < int(headers.get("content-length", 0)):
            body += sock.recv(65536) or b"\0" * 2**20  # a client that went away: the test will tell
        method, target, _ = first.split(" ")
        with self._changed:
            self.received.append(Received(method, target, headers, body, number))
            given = self._answers.popleft() if self._answers else HangUp()
            self._changed.notify_all()
        return self._play(sock, given)

    def _play(self, sock: socket.socket, given: Answer) -> bool:
        if isinstance(given, bytes):
            sock.sendall(given)
            return True
        if isinstance(given, Steps):
            for step in given.steps:
                step(sock)
            return True
        if given.sent_before:
            sock.sendall(given.sent_before)
        if isinstance(given, Pause):
            sock.recv(1)
        elif given.reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False


def client_of(server: Script | LocalGateway, **options: Any) -> GatewayClient:
    """A client with an agent's token that fails quickly where it must fail."""
    url, token = (server.url, TOKEN) if isinstance(server, Script) else (server.base_url, server.internal_token)
    return GatewayClient(url, **{"internal_token": token, "timeout": WAIT_SECONDS, **options})


@pytest.fixture(scope="module")
def gateway() -> Iterator[LocalGateway]:
    with LocalGateway() as running:
        yield running


@pytest.fixture
def client(gateway: LocalGateway) -> Iterator[GatewayClient]:
    with client_of(gateway) as made:
        yield made


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials or proxies of the machine, and retries without the wait."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("GATEWAY_", "X_INTERNAL_", "AGENT_BUILDER_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(gateway_sdk, "_BACKOFF_BASE_SECONDS", 0.001)
