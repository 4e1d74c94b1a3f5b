"""Tests of gateway_sdk: real sockets, real files, nothing patched.

First what each section of the module does, in its order; then faults, in tables of operations and
what can go wrong; then the command line, the README, the places where the module runs. The tests of
examples stand in `examples/tests/` and use the servers and fixtures of this file.

Two kinds of servers stand behind them. The local gateway of `examples/` behaves as the protocol
says; a `Script` says byte for byte what the test wants, and records what it was sent.

Most tests are tables. The name of a row says what is tried, and a comment above a table what its
columns are.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import dataclasses
import email.utils
import functools
import gc
import gzip
import hashlib
import hmac
import html
import http.client
import inspect
import io
import itertools
import json
import linecache
import logging
import math
import multiprocessing
import operator
import os
import pickle
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import unittest.mock
import urllib.parse
import urllib.request
import uuid
import warnings
import weakref
import zipfile
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import local_gateway
import pytest
from local_gateway import LocalGateway

import gateway_sdk
from gateway_sdk import (
    DEFAULT_BASE_URL,
    AgentContextRequiredError,
    AsyncEventStream,
    AsyncGatewayClient,
    AuthenticationError,
    BatchResult,
    CallStatus,
    EventStream,
    GatewayClient,
    GatewayError,
    GatewayTimeoutError,
    MissingSecretError,
    Prefab,
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
cpython_only = pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="counts on CPython's own ways"
)
# Whether what nothing refers to goes at once, and in order.
COUNTS_REFERENCES = sys.implementation.name == "cpython" and getattr(
    sys, "_is_gil_enabled", lambda: True
)()
Patch = pytest.MonkeyPatch
TOKEN = "token-of-the-agent"
WAIT_SECONDS = 10.0  # for what must happen; only a failing test waits that long
FUZZ_SEED = int(os.environ.get("GATEWAY_FUZZ_SEED", 20240229))
FUZZ_COUNT = int(os.environ.get("GATEWAY_FUZZ_COUNT", 150))  # of each kind
SHORT_SECONDS = 0.1  # a timeout that is meant to run out
LONG_SECONDS = 6 * WAIT_SECONDS  # one that is not, but ends a test that would hang

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


def answer(
    content: Any = None, status: int = 200, *, body: bytes | None = None, **headers: str
) -> bytes:
    """A whole answer with `Content-Length`; `content` is sent as JSON, `body` as it is."""
    body = json.dumps(content).encode() if body is None else body
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join((*lines, "\r\n")).encode("latin-1") + body


def chunked(*chunks: bytes, end: bool = True, content_type: str = "text/event-stream") -> bytes:
    """An answer in chunks; without `end`, the last chunk is missing."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n".encode()
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    return (
        head
        + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks)
        + (b"0\r\n\r\n" if end else b"")
    )


def ran(output: Any = "ok", **fields: Any) -> bytes:
    """The answer to a run request with one successful call."""
    entry = {
        "status": "SUCCESS",
        "output": {"status": "SUCCESS", "output": output},
        "error": None,
        **fields,
    }
    return answer({"job_id": "job-1", "status": "COMPLETED", "results": [entry]})


def event(type_: str, data: Any = None, **fields: Any) -> bytes:
    """One event as deployed gateways write it."""
    return b"data: " + json.dumps({"type": type_, "data": data, **fields}).encode() + b"\n\n"


class Script:
    """A server on loopback that gives one scripted answer per request, then closes connections.

    A `bytes` answer leaves the connection open for the next request.
    """

    def __init__(self, *answers: Answer, host: str = "127.0.0.1") -> None:
        self.received: list[Received] = []
        self.connections = 0
        self._answers = collections.deque(answers)
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
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

    def choose(self, request: Received) -> Answer:
        """The answer to a request. `Routed` has another way to find it."""
        return self._answers.popleft() if self._answers else HangUp()

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
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        while len(body) < int(headers.get("content-length", 0)):
            body += sock.recv(65536) or b"\0" * 2**20  # a client that went away: the test will tell
        method, target, _ = first.split(" ")
        with self._changed:
            self.received.append(Received(method, target, headers, body, number))
            given = self.choose(self.received[-1])
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
            reset(sock)
        return False


class Routed(Script):
    """A `Script` whose answers are chosen by a function that is given the request."""

    def __init__(self, choose: Callable[[Received], Answer]) -> None:
        super().__init__()
        self.choose = choose  # type: ignore[method-assign]


class Raw(Script):
    """A server that leaves every connection to a function of its socket."""

    def __init__(self, serve: Callable[[socket.socket], object]) -> None:
        super().__init__()
        self._serve_raw = serve

    def _exchange(self, sock: socket.socket, number: int) -> bool:
        self._serve_raw(sock)
        return False


class TlsScript(Script):
    """A `Script` behind TLS, for the name localhost. `client_of` makes clients that trust it."""

    def __init__(self, certificate: Path, *answers: Answer) -> None:
        self.trusting = ssl.create_default_context(cafile=str(certificate))
        self._context = tls_context(certificate)
        super().__init__(*answers)
        self.url = f"https://localhost:{self.port}"

    def _serve(self, sock: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(sock, server_side=True) as tls:
            with self._changed:
                self._sockets.add(tls)  # which stands for the other one from now on
                self._sockets.discard(sock)
            super()._serve(tls, number)
        with self._changed:
            self._sockets.discard(sock)
            self._changed.notify_all()


def tls_context(certificate: Path) -> ssl.SSLContext:
    """That of a server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificate))
    return context


def reset(sock: socket.socket) -> None:
    """Makes the end of a connection an RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def client_of(server: Script | LocalGateway, kind: Any = GatewayClient, **options: Any) -> Any:
    """A client with an agent's token that fails quickly where it must fail."""
    url, token = (
        (server.url, TOKEN)
        if isinstance(server, Script)
        else (server.base_url, server.internal_token)
    )
    if isinstance(server, TlsScript):
        options.setdefault("ssl_context", server.trusting)
    return kind(url, **{"internal_token": token, "timeout": WAIT_SECONDS, **options})


@pytest.fixture(scope="module")
def gateway() -> Iterator[LocalGateway]:
    with LocalGateway() as running:
        yield running


@pytest.fixture
def client(gateway: LocalGateway) -> Iterator[GatewayClient]:
    with client_of(gateway) as made:
        yield made


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, and a terminal that is closed ends.

    A job in the background ignores the one, one under `nohup` the other, and so would each process
    that a test starts.
    """
    kept = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    if hasattr(signal, "SIGHUP"):
        kept[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, before in kept.items():
        signal.signal(number, before)


@pytest.fixture(scope="session", autouse=True)
def _frozen() -> None:
    """The thousands of tests are no garbage: no collection needs to look them through again."""
    if hasattr(gc, "freeze"):  # PyPy has none
        gc.freeze()


@pytest.fixture(autouse=True)
def _clean(monkeypatch: Patch) -> None:
    """No credentials or proxies of the machine, and retries without the wait."""
    for name in list(os.environ):
        if name.lower().endswith(
            "_proxy") or name.startswith(("GATEWAY_", "X_INTERNAL_", "AGENT_BUILDER_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(gateway_sdk, "_BACKOFF_BASE_SECONDS", 0.001)
    monkeypatch.setattr(gateway_sdk, "_CONNECT_BACKOFF_BASE_SECONDS", 0.001)


# --- Helpers --------------------------------------------------------------------------------------

S3 = "s3://bucket/agent-outputs/u/a/r.txt"
# A secret: as quoted, escaped or cut as it may be, "hush" is left.
HIDDEN = 'Hush"h\u00fcsh/hush%41'
NO_BODY = answer(body=b"")
UNAVAILABLE = answer({"detail": "down"}, 503)
REFUSED = answer({"detail": "Could not validate credentials"}, 401)
CREDENTIAL_HEADERS = {"x-internal-token", "x-api-key", "authorization", "proxy-authorization"}
HEAD = chunked(end=False)
OK = b"HTTP/1.1 200 OK\r\n"
STREAM = "text/event-stream"


def run(client: GatewayClient, **options: Any) -> Any:
    return client.run("p", "1.0.0", "f", {"n": 1}, **options)


def call(number: int = 0) -> PrefabCall:
    return PrefabCall("p", "1.0.0", "f", {"n": number})


def moved(location: str, status: int = 302) -> bytes:
    return answer(None, status, Location=location)


def error_of(act: Callable[[GatewayClient], Any], *answers: Answer, **options: Any) -> Any:
    """The error that `act` raises when the server answers so."""
    with Script(*answers) as server, client_of(server, **{"max_retries": 0, **options}) as client:
        with pytest.raises(GatewayError) as caught:
            act(client)
    return caught.value


def text_of(error: BaseException) -> str:
    """All that a traceback would show."""
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def all_of(error: BaseException) -> str:
    """What a tool that prints or sends an error may get at: its causes and contexts."""
    texts = [text_of(error)]
    found: BaseException | None = error
    while found:
        texts += [str(found), repr(found), repr(found.args), repr(vars(found))]
        texts += [
            repr(getattr(found, name)) for name in ("doc", "object", "line") if hasattr(found, name)
        ]
        found = found.__cause__ or found.__context__
    return "\n".join(texts)


def send(data: bytes) -> Callable[[socket.socket], None]:
    return lambda sock: sock.sendall(data)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def link(query: str = "X-Sig=1") -> Answer:
    """Presigned URLs that lead back to the server that gives them."""

    def give(sock: socket.socket) -> None:
        url = "http://{}:{}/bucket/o.bin?{}".format(*sock.getsockname(), query)
        sock.sendall(answer({"presigned_url": url, "upload_url": url, "s3_url": S3}))

    return Steps((give,))


def together(count: int, given: bytes) -> Steps:
    """An answer that waits until so many requests are there."""
    barrier = threading.Barrier(count)
    return Steps((lambda _: barrier.wait(WAIT_SECONDS), send(given)))


def whole(payload: bytes, kind: str = "application/json", status: int = 200) -> bytes:
    return answer(status=status, body=payload, Content_Type=kind)


def unframed(payload: bytes, kind: str, version: str = "1.1") -> HangUp:
    return HangUp(f"HTTP/{version} 200 OK\r\nContent-Type: {kind}\r\n\r\n".encode() + payload)


def unended(payload: bytes, kind: str) -> bytes:
    """The payload in a chunk, behind which no other comes."""
    return chunked(*filter(None, [payload]), end=False, content_type=kind)


def closing(given: bytes) -> HangUp:
    """The answer with the end of its connection announced, so that no client keeps it."""
    return HangUp(given.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))


def is_exchange(received: Received) -> bool:
    return received.target == "/v1/auth/convert_to_internal_token"


LINK = link()


class Mode(NamedTuple):
    """A kind of credential: how a client is given it, and what it sends then."""

    options: dict[str, str]
    headers: dict[str, str]
    run_path: str


EXCHANGED = "exchanged API key"
MODES = {
    "internal token": Mode({"internal_token": TOKEN}, {"x-internal-token": TOKEN},
                           "/v1/internal/run"),
    "allow-list": Mode({}, {}, "/v1/internal/run"),
    "JWT": Mode({"jwt_token": "j.w.t"}, {"authorization": "Bearer j.w.t"}, "/v1/run"),
    "JWT with Bearer": Mode({"jwt_token": "Bearer j.w.t"}, {"authorization": "Bearer j.w.t"},
                            "/v1/run"),
    "JWT with BEARER": Mode({"jwt_token": "BEARER  j.w.t"}, {"authorization": "Bearer j.w.t"},
                            "/v1/run"),
    "API key": Mode({"api_key": "key-1"}, {"x-api-key": "key-1"}, "/v1/run"),
    EXCHANGED: Mode({}, {"x-internal-token": TOKEN}, "/v1/internal/run"),
}
TOKEN_ANSWERS = [answer({"internal_token": token}) for token in ("first", "second")]


def exchange_of(mode: str) -> list[Answer]:
    """The answers that a client of this mode needs to be made."""
    return [answer({"internal_token": TOKEN})] if mode == EXCHANGED else []


def client_in(mode: str, url: str, **options: Any) -> GatewayClient:
    if mode == EXCHANGED:
        return GatewayClient.from_api_key("key-1", url, **options)
    return GatewayClient(url, **MODES[mode].options, **options)


def exchange_a_key(client: GatewayClient) -> None:
    GatewayClient.from_api_key("key-1", client.base_url)


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a Python of its own makes of the code."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


def collect() -> None:
    """Frees what nothing refers to."""
    with warnings.catch_warnings():
        if not COUNTS_REFERENCES:
            # A socket may go before the connection that would have closed it.
            warnings.simplefilter("ignore", ResourceWarning)
        # In PyPy, what only a thing with a `__del__` refers to goes in the next round.
        for _ in range(1 if COUNTS_REFERENCES else 4):
            gc.collect()


@contextlib.contextmanager
def nothing_left(*folders: Path) -> Iterator[None]:
    """No file descriptor, thread or file is more than there was."""

    def things() -> collections.Counter[Any]:
        found: list[Any] = [path for folder in folders for path in folder.rglob("*")]
        for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
            with contextlib.suppress(OSError):  # that of the listing itself
                found.append(os.readlink(f"/proc/self/fd/{number}"))
        return collections.Counter(found)

    if not COUNTS_REFERENCES:
        collect()  # what earlier tests let go of
    before, threads = things(), set(threading.enumerate())
    yield
    if not COUNTS_REFERENCES:
        collect()
    for thread in set(threading.enumerate()) - threads:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive(), thread
    assert not things() - before  # what was there may go: an earlier test's connection, say


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost, and its key, in one file."""
    openssl = shutil.which("openssl") or pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    options = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    options += " -addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem"
    subprocess.run([openssl, *options.split()], cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return both


@pytest.fixture
def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


@pytest.fixture(params=["http", "https"])
def script(request: pytest.FixtureRequest, certificate: Path) -> Callable[..., Script]:
    """Makes a `Script`: a test runs once with a plain one, and once with one behind TLS."""
    return functools.partial(TlsScript, certificate) if request.param == "https" else Script


@pytest.fixture
def refusing() -> Iterator[str]:
    """An address that refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def content_file(tmp_path: Path) -> Path:
    """A small file to upload. Beside it there is room for downloads."""
    path = tmp_path / "content"
    path.write_bytes(b"content")
    return path


@pytest.fixture
def delays(monkeypatch: Patch) -> list[float]:
    """The waits between attempts, which are not waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture(autouse=True)
def _closed(monkeypatch: Patch) -> Iterator[None]:
    """Closes the clients of a test: one that hangs on a caught error would live for a while."""
    made: list[GatewayClient] = []
    init = GatewayClient.__init__

    def recorded(self: GatewayClient, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(GatewayClient, "__init__", recorded)
    yield
    for client in made:
        client.close()


# --- Errors ---------------------------------------------------------------------------------------

# Errors made as in the older SDK, and what they then have.
MADE = [
    (GatewayError("m", {"a": 1}),
     {"message": "m", "details": {"a": 1}, "args": ("m",), "status_code": None}),
    (AuthenticationError("m"), {"details": {}, "error_code": None}),
    (PrefabNotFoundError("p", "1.0.0"),
     {"prefab_id": "p", "version": "1.0.0", "message": "Prefab p@1.0.0 not found"}),
    (PrefabNotFoundError("p", "1.0.0", "gone"),
     {"prefab_id": "p", "version": "1.0.0", "message": "gone"}),
    (ValidationError("m", {"errors": []}), {"details": {"errors": []}}),
    (QuotaExceededError("m", 10, 9, "calls"),
     {"message": "m", "limit": 10, "used": 9, "quota_type": "calls"}),
    (MissingSecretError("p", "KEY", instructions="Ask for one"),
     {"prefab_id": "p", "secret_name": "KEY", "instructions": "Ask for one",
      "error_code": "MISSING_SECRET"}),
    (MissingSecretError("p", "KEY"), {"instructions": None}),
    (AgentContextRequiredError("m"), {"message": "m"}),
    (AgentContextRequiredError(), {"error_code": "MISSING_AGENT_CONTEXT"}),
    (ServiceUnavailableError("m"), {"message": "m"}),
    (GatewayTimeoutError("m"), {"message": "m"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "attributes"), MADE, ids=repr)
def test_errors_are_made_as_in_the_older_sdk_and_pickle_and_copy(
    error: Any, attributes: dict[str, Any]
) -> None:
    assert {name: getattr(error, name) for name in attributes} == attributes
    assert str(error) == error.message and (attributes.get("instructions") or "") in error.message
    original = copy.copy(error)
    original.status_code, original.error_code = 418, "TEAPOT"
    pickled = [pickle.loads(pickle.dumps(original, protocol)) for protocol in range(6)]
    for second in (original, copy.copy(original), copy.deepcopy(original), *pickled):
        assert type(second) is type(error)
        assert str(second) == str(error)
        assert vars(second) == vars(original)


def test_a_deep_copy_of_an_error_shares_nothing_with_it() -> None:
    error = GatewayError("m", {"given": [{"a": 1}]})
    copy.deepcopy(error).details["given"][0]["a"] = 2
    assert error.details == {"given": [{"a": 1}]}


def test_errors_form_the_tree_that_users_catch_by() -> None:
    assert all(isinstance(error, GatewayError) for error, _ in MADE)
    assert issubclass(ValidationError, ValueError)
    assert issubclass(GatewayTimeoutError, ServiceUnavailableError)
    assert issubclass(GatewayTimeoutError, TimeoutError)
    assert not issubclass(ServiceUnavailableError, TimeoutError)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("0", 0), ("120", 120), (" 7 ", 7), ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
     ("9" * 999, math.inf),
     *((odd, None)
       for odd in ("", "soon", "-5", "1e3", "1e999", "nan", "٣", "Fri, 31 Dec 99999 23:59:59 GMT",
                               "Fri, 31 Dec 999999999999 23:59:59 GMT"))],
)  # fmt: skip
def test_retry_after_is_read_in_both_forms(value: str, seconds: float | None) -> None:
    assert gateway_sdk._retry_after_seconds(value) == seconds


@pytest.mark.parametrize("zone", ["UTC", "Asia/Shanghai"])
def test_retry_after_as_a_date_is_counted_from_now_and_in_gmt_without_a_zone(
    zone: str, monkeypatch: Patch
) -> None:
    set_zone = getattr(time, "tzset", lambda: None)
    monkeypatch.setenv("TZ", zone)
    set_zone()
    try:
        in_an_hour = time.time() + 3600
        for date in (email.utils.formatdate(in_an_hour, usegmt=True),
                     time.asctime(time.gmtime(in_an_hour))):
            assert 3000 < gateway_sdk._retry_after_seconds(date) <= 3600
    finally:
        monkeypatch.undo()
        set_zone()


PREFAB = {"prefab_id": "p", "version": "1.0.0"}
QUOTA = {"limit": 10, "used": 11, "quota_type": "calls"}
NO_QUOTA = {"limit": 0, "used": 0, "quota_type": "unknown"}
SECRET = {"prefab_id": "q", "secret_name": "KEY", "instructions": "Ask for one"}
PLAIN_SECRET = "Secret 'KEY' for prefab 'q' is not configured"
REASON = {"detail": "the reason"}


def coded(code: str, **fields: Any) -> dict[str, Any]:
    return {"error_code": code, "message": "the reason", **fields}
# What is asked (see ENDPOINTS), status and body of the answer, the error and its attributes.
MAPPING = [
    ("run", 401, REASON, AuthenticationError, {}),
    ("directory", 401, REASON, AuthenticationError, {}),
    ("list files", 403, REASON, AuthenticationError, {}),
    ("run", 404, REASON, PrefabNotFoundError, PREFAB),
    ("stream", 404, REASON, PrefabNotFoundError, PREFAB),
    ("spec", 404, {"detail": coded("GONE")}, PrefabNotFoundError, {**PREFAB, "error_code": "GONE"}),
    ("directory", 404, REASON, PrefabNotFoundError, {}),
    ("list files", 404, REASON, GatewayError, {}),
    ("delete a secret", 404, REASON, GatewayError, {}),
    ("run", 422, {"detail": coded("BAD")}, ValidationError, {"error_code": "BAD"}),
    ("run", 422, {"detail": [{"msg": "the reason"}, "odd", None, {"loc": 3}]}, ValidationError, {}),
    ("run", 429, REASON, QuotaExceededError, NO_QUOTA),
    ("run", 429, {"detail": coded("QUOTA_EXCEEDED", **QUOTA)}, QuotaExceededError, QUOTA),
    ("list files", 429, coded("Q", details=QUOTA), QuotaExceededError,
     {**QUOTA, "error_code": "Q"}),
    ("run", 429, {"detail": coded("Q", details=QUOTA)}, QuotaExceededError, QUOTA),
    ("run", 429, {"detail": coded("Q", limit=None)}, QuotaExceededError, NO_QUOTA),
    ("run", 400, {"detail": coded("MISSING_SECRET", **SECRET)}, MissingSecretError, SECRET),
    ("run", 400, coded("MISSING_SECRET", details=SECRET), MissingSecretError, SECRET),
    ("run", 400, {"detail": PLAIN_SECRET}, MissingSecretError,
     {**SECRET, "instructions": None, "error_code": "MISSING_SECRET"}),
    ("list files", 400, {"detail": coded("MISSING_AGENT_CONTEXT")}, AgentContextRequiredError,
     {"error_code": "MISSING_AGENT_CONTEXT"}),
    ("list files", 400, coded("MISSING_AGENT_CONTEXT"), AgentContextRequiredError, {}),
    ("run", 400, {"detail": coded("OTHER")}, GatewayError, {"error_code": "OTHER"}),
    ("run", 400, {"detail": coded("MISSING_SECRET")}, MissingSecretError,
     {"prefab_id": "p", "secret_name": "unknown", "instructions": None}),
    ("list files", 400, coded("MISSING_SECRET"), MissingSecretError,
     {"prefab_id": "unknown", "secret_name": "unknown", "instructions": None}),
    ("run", 429, {"detail": coded("Q", limit=0, used=3)}, QuotaExceededError,
     {"limit": 0, "used": 3, "quota_type": "unknown"}),
    ("run", 400,
     {"detail": coded("E", status_code=1, may_have_run=True, retry_after=5, request_id="x")},
     GatewayError, {"may_have_run": False, "retry_after": None, "request_id": None}),
    ("run", 409, {"detail": coded("MISSING_SECRET", **SECRET)}, GatewayError, {}),
    ("run", 418, REASON, GatewayError, {"error_code": None}),
    ("run", 500, b"the reason", ServiceUnavailableError, {}),
    ("run", 503, REASON, ServiceUnavailableError, {}),
    ("run", 599, coded("DOWN"), ServiceUnavailableError, {"error_code": "DOWN"}),
    ("run", 302, {"detail": "x"}, GatewayError, {}),
    ("directory", 304, b"", GatewayError, {}),
]  # fmt: skip


def answered(body: Any, status: int) -> bytes:
    return answer(body=body, status=status) if isinstance(body, bytes) else answer(body, status)


@pytest.mark.parametrize(
    ("name", "status", "body", "kind", "attributes"), MAPPING,
    ids=[f"{name} {status} {str(body)[:40]}" for name, status, body, _, _ in MAPPING],
)  # fmt: skip
def test_an_answer_that_is_no_success_becomes_its_exception(
    name: str, status: int, body: Any, kind: type[GatewayError], attributes: dict[str, Any]
) -> None:
    error = error_of(ENDPOINTS[name].act, answered(body, status))
    assert type(error) is kind and error.status_code == status
    assert {key: getattr(error, key) for key in attributes} == attributes
    assert ENDPOINTS[name].asked in str(error)
    assert str(status) in str(error)
    assert str(error) == error.message
    said = PLAIN_SECRET if PLAIN_SECRET in str(body) else "the reason"
    assert said in str(error) or status < 400


NOT_JSON = {
    "empty": b"", "blank": b" \r\n", "truncated": b'{"results": [', "html": b"<html>502</html>",
    "not-utf-8": b'{"a": "\xff"}', "utf-16": '{"a": 1}'.encode("utf-16"), "nan": b'{"a": NaN}',
    "infinity": b"[-Infinity]", "two-values": b"{} {}", "deep-lists": b"[" * 100_000,
    "deep-lists-closed": b"[" * 100_000 + b"]" * 100_000, "deep-objects": b'{"a":' * 100_000,
    "long-number": b"9" * 10_000 + b"x", "null": b"null", "text": b'"text"', "number": b"3",
    "true": b"true",
}
# The body of an error, and the fields that are read of it.
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "string": (REASON, {}),
    "object": ({"detail": coded("E", more=1)}, {"error_code": "E", "more": 1}),
    "bare": (coded("E", more=1), {"error_code": "E", "more": 1}),
    "bare with details": (coded("E", details={"more": 1}), {"error_code": "E", "more": 1}),
    "details beside": (coded("E", more=1, details={"n": 2}),
                       {"error_code": "E", "more": 1, "n": 2}),
    "object without code": ({"detail": {"message": "the reason"}}, {}),
    "list": ({"detail": [{"loc": ["body"], "msg": "the reason"}]}, {}),
    "text in latin-1": (b"the reason \xff", {}),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps({"detail": coded("E", more=1)}).encode(),
                        {"error_code": "E", "more": 1}),
    "empty object": ({}, {}),
    "null detail": ({"detail": None}, {}),
    "number detail": ({"detail": 3}, {}),
    "empty list": ({"detail": []}, {}),
    "list of numbers": ({"detail": [1, None, []]}, {}),
    "odd places": ({"detail": [{"loc": 3, "msg": None}, {"loc": [["a"], {}, None]}]}, {}),
    "odd message": ({"detail": {"message": ["a"], "error_code": ["b"], "details": [1]}},
                    {"error_code": ["b"]}),
    "odd code": ({"error_code": {"a": 1}, "message": 3, "details": "x"}, {"error_code": {"a": 1}}),
    "odd fields": ({"detail": {"limit": "x", "used": [], "quota_type": 3, "prefab_id": {}, "x": 1}},
                   {"x": 1}),
    "surrogate": ({"detail": "\ud800"}, {}),
    "raw control characters": (
        b'{"error_code": "E", "message": "the reason\t\x01"}', {"error_code": "E"}),
    "braces": ({"detail": {"prefab_id": "{0}{x!r}", "message": "%s {}"}}, {}),
    **{name: (body, {}) for name, body in NOT_JSON.items()},
}
STATUS_CLASSES = {
    400: GatewayError, 401: AuthenticationError, 403: AuthenticationError, 404: PrefabNotFoundError,
    422: ValidationError, 429: QuotaExceededError, 503: ServiceUnavailableError,
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_every_form_of_body_is_understood_and_the_status_decides(name: str) -> None:
    body, fields = BODIES[name]
    answers = [answered(body, status) for status in STATUS_CLASSES]
    with Script(*answers) as server, client_of(server) as client:
        for status, kind in STATUS_CLASSES.items():
            with pytest.raises(GatewayError, match=str(status)) as caught:
                run(client)
            error = caught.value
            assert type(error) is kind and error.status_code == status
            assert fields.items() <= error.details.items()
            assert error.error_code == fields.get("error_code")
            assert ("the reason" in str(error)) == ("the reason" in str(body))
            assert name != "null" or "None" not in str(error)
            assert repr(pickle.loads(pickle.dumps(error)).details) == repr(error.details)
    short = len(answers[0]) < 50_000  # a long one is not worth reading to its end
    assert server.connections == (1 if short else len(STATUS_CLASSES))


def test_a_422_reads_as_one_line_per_field() -> None:
    missing = {
        "loc": ["body", "calls", 0, "version"],
        "msg": "Field required",
        "type": "missing",
        "url": "u",
    }
    wrong = {"loc": ["query", "limit"], "msg": "Input should be an integer", "input": "x"}
    lines = (
        str(error_of(run, answer({"detail": [missing, wrong]}, 422)))
        .partition(" 422: ")[2]
        .splitlines()
    )
    fields = ["body.calls.0.version: Field required", "query.limit: Input should be an integer"]
    assert [line.strip() for line in lines] == fields


def test_on_one_line_a_422_reads_without_stray_marks(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [{"loc": ["body", "a"], "msg": "bad"}, {"loc": ["body", "b"], "msg": "worse"}]
    with Script(answer({"detail": problems}, 422)) as server:
        monkeypatch.setenv("GATEWAY_BASE_URL", server.url)
        assert gateway_sdk.main(["run", "p", "1", "f"]) == 1
    assert "answered 422: body.a: bad; body.b: worse" in capsys.readouterr().err


@pytest.mark.parametrize("status", [200, 400, 503])
def test_of_what_is_not_json_the_first_500_characters_are_shown(status: int) -> None:
    error = error_of(run, answer(body=b"<html>" + b"x" * 9000, status=status))
    assert "<html>" + "x" * 494 in str(error) and "x" * 495 not in str(error)


@pytest.mark.parametrize(
    ("status", "detail", "remedy"),
    [(401, "x", "credential"), (404, "x", "list_prefabs"),
     (400, PLAIN_SECRET, "set_secret('q', 'KEY'"),
     (400, coded("MISSING_SECRET", **SECRET), "Ask for one"),
     (400, coded("MISSING_AGENT_CONTEXT"), "upload_input_file")],
    ids=str,
)  # fmt: skip
def test_an_error_names_its_remedy(status: int, detail: Any, remedy: str) -> None:
    assert remedy in str(error_of(run, answer({"detail": detail}, status)))


# What is asked, how it is answered, the advice to a program, and the same for the shell.
ADVICE: dict[str, tuple[Callable[[GatewayClient], Any], Answer, str, str]] = {
    "no such prefab": (run, answer(REASON, 404), "client.list_prefabs()", "gateway-sdk list"),
    "no such function": (run, answer(REASON, 404), "client.get_prefab_spec(", "gateway-sdk spec"),
    "no such spec": (
        lambda c: c.get_prefab_spec("p"), answer([]), "client.list_prefabs()", "gateway-sdk list"),
    "missing secret": (
        run, answer({"detail": coded("MISSING_SECRET", **SECRET)}, 400),
        "client.set_secret('q', 'KEY'", "gateway-sdk secret set q KEY"),
    "missing secret in plain words": (
        run, answer({"detail": PLAIN_SECRET}, 400),
        "client.set_secret('q', 'KEY'", "gateway-sdk secret set q KEY"),
    "no agent": (
        lambda c: c.list_files(), answer({"detail": coded("MISSING_AGENT_CONTEXT")}, 400),
        "upload_input_file(", "gateway-sdk upload --input"),
    "no agent's token": (
        lambda c: c.list_files(), answer({"detail": coded("MISSING_AGENT_CONTEXT")}, 400),
        "internal_token=", "X_INTERNAL_TOKEN"),
    "no such endpoint": (run, answer({"detail": "Not Found"}, 404), "base_url", "--base-url"),
    "redirect": (run, moved("http://elsewhere/"), "base_url", "--base-url"),
    "timeout": (lambda c: run(c, timeout=SHORT_SECONDS), Pause(), "timeout=", "--timeout"),
    "no connection": (
        lambda c: run(GatewayClient("http://127.0.0.1:1", max_retries=0)), NO_BODY, "base_url",
        "--base-url"),
    "a token as base_url": (
        lambda c: GatewayClient("token-of-mine"), NO_BODY, "internal_token=", "X_INTERNAL_TOKEN"),
    "a local file": (
        lambda c: run(c, files={"v": ["a.mp4"]}), NO_BODY, "upload_input_file(",
        "gateway-sdk upload --input"),
}  # fmt: skip
PYTHON_ADVICE = r"client\.|\b[a-z_]+=|_file\(|\bbase_url\b"


@pytest.mark.parametrize("name", ADVICE)
def test_advice_is_worded_for_python_and_for_the_shell(name: str) -> None:
    act, given, in_python, in_shell = ADVICE[name]
    error = error_of(act, given)
    assert in_python in str(error) and not re.search(r"gateway-sdk |--[a-z]", str(error))
    for same in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert in_shell in same._in_shell()
        assert not re.search(PYTHON_ADVICE, same._in_shell()), same._in_shell()


@pytest.mark.parametrize(
    ("error", "in_shell"),
    [(MissingSecretError("p", "KEY"), "gateway-sdk secret set p KEY"),
     (MissingSecretError("p", "KEY", instructions="Ask for one"), "Ask for one"),
     (AgentContextRequiredError(), "gateway-sdk upload --input")],
    ids=repr,
)  # fmt: skip
def test_errors_that_a_program_makes_have_advice_for_the_shell_too(
    error: Any, in_shell: str
) -> None:
    assert in_shell in error._in_shell() and not re.search(PYTHON_ADVICE, error._in_shell())


OWN_WORDS = [
    error for error, _ in MADE if type(error) is not MissingSecretError and len(str(error)) < 40
]


@pytest.mark.parametrize("error", OWN_WORDS, ids=repr)
def test_what_the_maker_of_an_error_says_is_said_in_the_shell_too(error: Any) -> None:
    assert str(error) in error._in_shell()


# What sounds like advice of the SDK, but is the gateway's own message.
LIKE_ADVICE = [
    "Call client.list_prefabs() first",
    "larger timeout= than base_url has",
    "upload_input_file(x) failed",
    "client.set_secret('a', 'b', value)",
    "Is base_url right?",
]


@pytest.mark.parametrize("status", [400, 404, 422, 503])
def test_what_the_gateway_says_is_not_reworded_for_the_shell(status: int) -> None:
    for said in LIKE_ADVICE:
        for content in ({"detail": said}, {"error_code": "E", "message": said}):
            error = error_of(run, answer(content, status))
            assert said in str(error) and said in error._in_shell()


@pytest.mark.parametrize("name", ["a b", "it's", "$(reboot)", "a;b", "-x"])
def test_a_name_in_the_advice_for_the_shell_is_quoted_as_the_shell_needs_it(name: str) -> None:
    asked = {"prefab_id": "q", "secret_name": name}
    error = error_of(run, answer({"detail": coded("MISSING_SECRET", **asked)}, 400))
    assert f"set q {shlex.quote(name)}" in error._in_shell().replace(" -- ", " ")


def test_an_error_has_the_id_of_its_request() -> None:
    statuses = (400, 401, 404, 422, 429, 500, 503, 307)
    bodies = [(b"{}", status) for status in statuses] + [(b"<html>", 200), (b"[1]", 200)]
    for name in ("X-Request-ID", "x-request-id", "X_REQUEST_ID"):
        for body, status in bodies:
            error = error_of(run, answer(status=status, body=body, **{name: "req-7"}))
            assert (error.status_code, error.request_id) == (status, "req-7")
            assert pickle.loads(pickle.dumps(error)).request_id == "req-7"


def test_an_error_without_an_answer_or_an_id_has_none() -> None:
    assert error_of(run, REFUSED).request_id is None
    assert error_of(run, HangUp()).request_id is None
    assert all(error.request_id is None for error, _ in MADE)
    error = GatewayError("m")
    assert (error.status_code, error.retry_after, error.may_have_run) == (None, None, False)


def test_of_a_batch_too_each_error_has_the_id_of_its_request() -> None:
    answers = [answer(REASON, 400, X_Request_ID=f"req-{number}") for number in range(3)]
    with Script(*answers) as server, client_of(server) as client:
        batch = client.run_batch([call(number) for number in range(3)], max_workers=1)
    found = [result.exception and result.exception.request_id for result in batch.results]
    assert found == ["req-0", "req-1", "req-2"]


CHINESE = "\u7f51\u5173\u9519\u8bef"  # "gateway error"
REASON_TEXT = json.dumps({"detail": coded("E", more=CHINESE)}, ensure_ascii=False)
# An error's body, its headers, and what the message shows of it.
PAGES: dict[str, tuple[bytes, dict[str, str], str]] = {
    "GBK": (
        f"<h1>{CHINESE}</h1>".encode("gbk"), {"Content_Type": "text/html; charset=gbk"}, CHINESE),
    "GB18030, quoted": (
        CHINESE.encode("gb18030"), {"Content_Type": 'text/html; charset="GB18030"'}, CHINESE),
    "upper case": (CHINESE.encode("gbk"), {"Content_Type": "TEXT/HTML;CHARSET=GBK"}, CHINESE),
    "another parameter first": (
        CHINESE.encode("big5", "replace"), {"Content_Type": "text/html; level=1; charset=big5"},
        CHINESE[:1]),
    "JSON in GBK": (
        REASON_TEXT.encode("gbk"), {"Content_Type": "application/json; charset=gbk"}, "the reason"),
    "Latin-1": (
        "gesch\u00fctzt".encode("latin-1"), {"Content_Type": "text/plain; charset=iso-8859-1"},
        "gesch\u00fctzt"),
    "UTF-16": (CHINESE.encode("utf-16"), {"Content_Type": "text/plain; charset=utf-16"}, CHINESE),
    "GBK without a word": (
        b"the reason " + CHINESE.encode("gbk"), {"Content_Type": "text/html"}, "the reason"),
    **{f"charset {name!r}": (
        b"the reason", {"Content_Type": f"text/plain; charset={name}"}, "the reason")
       for name in ("", "x-odd", "base64", "undefined", "unicode_escape", "\xe4", "utf-8\0")},
    "gzip": (gzip.compress(REASON_TEXT.encode()), {"Content_Encoding": "gzip"}, "the reason"),
    "GZIP": (gzip.compress(REASON_TEXT.encode()), {"Content_Encoding": "GZIP"}, "the reason"),
    "x-gzip": (gzip.compress(REASON_TEXT.encode()), {"Content_Encoding": "x-gzip"}, "the reason"),
    "deflate": (zlib.compress(REASON_TEXT.encode()), {"Content_Encoding": "deflate"}, "the reason"),
    "page in gzip": (
        gzip.compress(f"<h1>{CHINESE}</h1>".encode()), {"Content_Encoding": "gzip"}, CHINESE),
    "GBK in gzip": (
        gzip.compress(CHINESE.encode("gbk")),
        {"Content_Encoding": "gzip", "Content_Type": "text/html; charset=gbk"}, CHINESE),
    "byte order mark": (b"\xef\xbb\xbf" + REASON_TEXT.encode(), {}, "the reason"),
    "byte order mark in front of a page": (
        b"\xef\xbb\xbf<h1>the reason</h1>", {}, ": <h1>the reason"),
    "byte order mark in gzip": (
        gzip.compress(b"\xef\xbb\xbf" + REASON_TEXT.encode()), {"Content_Encoding": "gzip"},
        "the reason"),
}  # fmt: skip


@pytest.mark.parametrize("status", [400, 502])
@pytest.mark.parametrize("name", PAGES)
def test_what_an_error_says_is_read_in_its_own_letters(name: str, status: int) -> None:
    body, headers, shown = PAGES[name]
    error = error_of(run, answer(body=body, status=status, **headers))
    assert error.status_code == status and shown in str(error)
    assert "\ufeff" not in str(error) and ("\ufffd" not in str(error) or "without" in name)
    if shown == "the reason" and not name.startswith(("charset", "GBK")):
        assert error.error_code == "E" and error.details["more"] == CHINESE


@pytest.mark.parametrize(
    "body",
    [
        b"no gzip",
        gzip.compress(REASON_TEXT.encode())[:-12],
        gzip.compress(json.dumps(coded("E", more="x" * 2**22)).encode()),
        gzip.compress(b"x" * 9) * 9,
    ],
    ids=["none", "cut", "bomb", "members"],
)
def test_the_status_counts_where_what_was_packed_cannot_be_read(body: bytes) -> None:
    error = error_of(run, answer(body=body, status=403, Content_Encoding="gzip"))
    assert type(error) is AuthenticationError and len(str(error)) < 2000
    assert len(repr(error.details)) < 2**18


@pytest.mark.parametrize("value", ["group/prefab", "/", "a/b/c"])
def test_a_bare_404_of_a_path_with_an_encoded_slash_says_that(value: str) -> None:
    not_found = answer({"detail": "Not Found"}, 404)
    for take in ID_TAKERS.values():
        for given in (value, "plain-name"):
            error = error_of(lambda client, take=take, given=given: take(client, given), not_found)
            assert type(error) is GatewayError and error.status_code == 404
            assert ("slash" in str(error).lower()) == (given == value)


@pytest.mark.parametrize("name",
                         ["run", "stream", "directory", "spec", "list files", "delete a secret"])
def test_a_route_that_does_not_exist_is_no_missing_prefab(name: str) -> None:
    error = error_of(ENDPOINTS[name].act, answer({"detail": "Not Found"}, 404))
    assert type(error) is GatewayError and error.status_code == 404
    assert "base_url" in str(error) and "list_prefabs" not in str(error)
    assert re.search("endpoint|route", str(error)) and "credential" in str(error)


@pytest.mark.parametrize(
    "detail",
    ["Prefab not found", "Function f not found in p", {"message": "Not Found"},
     {"message": "m", "version": "v7"}],
    ids=str,
)
def test_a_404_that_says_more_is_about_the_prefab_that_was_asked_for(detail: Any) -> None:
    error = error_of(run, answer({"detail": detail}, 404))
    assert type(error) is PrefabNotFoundError and "get_prefab_spec" in str(error)
    assert (error.prefab_id, error.version) == ("p", "1.0.0")


# What is sent, by the words that name it.
CREDENTIALS: dict[str, dict[str, Any]] = {
    "internal.token": {"internal_token": "hush-hush"},
    "api.key": {"internal_token": None, "api_key": "hush-hush"},
    "jwt": {"internal_token": None, "jwt_token": "hush-hush"},
    "allow.?list": {"internal_token": None},
}


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("sent", [*CREDENTIALS, "exchange"])
def test_a_refusal_names_the_kind_of_credential_that_was_sent(sent: str, status: int) -> None:
    given = answer({"detail": "no"}, status)
    if sent == "exchange":
        error, sent = error_of(exchange_a_key, given), "api.key"
    else:
        error = error_of(run, given, **CREDENTIALS[sent])
    told = str(error).replace("/internal/run", "").replace("convert_to_internal_token", "")
    assert type(error) is AuthenticationError and "hush" not in all_of(error)
    assert [words for words in CREDENTIALS if re.search(f"(?i){words}", told)] == [sent]


def jwt(**claims: Any) -> str:
    def encoded(part: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")

    return f"{encoded({'alg': 'HS256'})}.{encoded({'sub': 'hush-hush', **claims})}.c2lnbmF0dXJl"


@pytest.mark.parametrize("prefix", ["", "Bearer ", "bearer "])
def test_an_expired_jwt_says_since_when(prefix: str) -> None:
    token = prefix + jwt(exp=1_577_923_200)  # noon UTC: the same day nearly everywhere
    error = error_of(run, REFUSED, internal_token=None, jwt_token=token)
    assert "2020-01-0" in str(error) and "expired" in str(error).lower()
    assert "hush" not in all_of(error) and token.split(".")[1] not in all_of(error)


@pytest.mark.parametrize(
    "token",
    [jwt(), jwt(exp=4_000_000_000), jwt(exp="soon"), jwt(exp=None), jwt(exp=1e300), jwt(exp=-1e300),
     jwt(exp=True),
     jwt(exp=float("nan")), jwt(exp=[1]), "a.b.c", "hush.%%%.x", "a..c", "...", "a.W10.c",
     "a.bnVsbA.c", "a.gICA.c"],
    ids=["no exp", "valid", "text", "null", "too late", "too early", "true", "nan", "list", "short",
         "no base64",
         "empty", "dots", "JSON list", "JSON null", "not UTF-8"],
)  # fmt: skip
def test_of_any_other_jwt_no_date_is_told(token: str) -> None:
    error = error_of(run, REFUSED, internal_token=None, jwt_token=token)
    assert type(error) is AuthenticationError and "JWT" in str(error)
    assert not re.search(r"\d{4}-\d\d-\d\d", str(error)) and "hush" not in all_of(error)


# What is done, and how that is answered; each answer has an id.
WITH_ID: dict[str, tuple[Callable[[Any], Any], bytes]] = {
    **{f"{status}": (run, answer({"detail": "no"}, status, X_Request_ID="r-1"))
       for status in (401, 403, 404, 409, 422, 429, 503)},
    "secret": (run, answer({"error_code": "MISSING_SECRET"}, 400, x_request_id="r-1")),
    "500": (run, answer(body=b"Internal Server Error", status=500, X_Request_ID="r-1")),
    "stream": (lambda c: run(c, stream=True), answer({"detail": "no"}, 422, X_REQUEST_ID="r-1")),
    "redirect": (lambda c: c.list_prefabs(), answer(None, 307, Location="/", X_Request_ID="r-1")),
    "no JSON": (lambda c: c.list_prefabs(), answer(body=b"<html>", X_Request_ID="r-1")),
    "no list": (run, answer({}, X_Request_ID=" r-1 ")),
    "exchange": (exchange_a_key, answer({"detail": "no"}, 401, X_Request_ID="r-1")),
}


@pytest.mark.parametrize("name", WITH_ID)
def test_an_error_has_the_request_id_of_its_answer(name: str) -> None:
    act, given = WITH_ID[name]
    error = error_of(act, given)
    assert error.request_id == "r-1"
    assert pickle.loads(pickle.dumps(error)).request_id == copy.copy(error).request_id == "r-1"
    without = re.sub(rb"(?i)x-request-id: *r-1 *\r\n", b"", given)
    assert without != given and error_of(act, without).request_id is None


@pytest.mark.parametrize("kind", ["application/json", STREAM])
def test_an_answer_that_is_cut_short_has_its_request_id(kind: str) -> None:
    cut = HangUp(answer(body=b"data: 1", X_Request_ID="r-1", Content_Type=kind)[:-3])
    error = error_of(lambda c: PrefabResult.from_events(run(c, stream=True)), cut)
    assert error.request_id == "r-1" and error.may_have_run


def test_an_error_without_an_answer_has_no_request_id() -> None:
    assert error_of(run, HangUp()).request_id is GatewayError("m").request_id is None
    last = [answer(None, 503, X_Request_ID=f"r-{number}") for number in range(3)]
    error = error_of(lambda client: client.list_prefabs(), *last, max_retries=2)
    assert error.request_id == "r-2"


# --- Data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", [*CallStatus, *StreamEventType], ids=repr)
def test_enums_are_their_text(member: Any) -> None:
    assert member == member.value == str(member) == f"{member}" == "%s" % member  # noqa: UP031
    assert json.dumps(member) == json.dumps(member.value)
    assert pickle.loads(pickle.dumps(member)) is member


def test_a_call_leaves_out_files_when_there_are_none() -> None:
    names = {"prefab_id": "p", "version": "1.0.0", "function_name": "f"}
    for files in (None, {}):
        bare = PrefabCall("p", "1.0.0", "f", {"n": 1}, files)
        assert bare.to_dict() == {**names, "inputs": {"parameters": {"n": 1}}}
    full = PrefabCall("p", "1.0.0", "f", {}, files={"video": [S3]})
    assert full.to_dict() == {**names, "inputs": {"parameters": {}, "files": {"video": [S3]}}}


BUSINESS = {"success": True, "message": "m", "error": "e", "error_code": "E"}
FULL_ENVELOPE = {"status": "SUCCESS", "output": BUSINESS, "files": {"a": [S3]}}
# The output of a call, what its function gave (of an envelope the inner output), and its files.
OUTPUTS: dict[str, tuple[Any, Any, Any]] = {
    "envelope": (FULL_ENVELOPE, BUSINESS, {"a": [S3]}),
    "envelope with outer fields": ({**FULL_ENVELOPE, "success": False, "message": "outer"},
                                   BUSINESS, {"a": [S3]}),
    "only an output": ({"output": [1]}, [1], {}),
    "an output and unknown keys": ({"output": "x", "words": 2}, "x", {}),
    "zero in an envelope": ({"output": 0}, 0, {}),
    "false in an envelope": ({"output": False, "files": {}}, False, {}),
    "null in an envelope": ({"status": "SUCCESS", "output": None, "files": None}, {}, {}),
    "envelope without output": ({"status": "SUCCESS"}, {}, {}),
    "envelope with files": ({"status": "SUCCESS", "files": {"a": [S3]}}, {}, {"a": [S3]}),
    "failed envelope": ({"status": "FAILED", "output": None, "error": "of the runtime"}, {}, {}),
    "envelope with metadata": ({"status": "SUCCESS", "error": None, "metadata": {}}, {}, {}),
    "null": (None, {}, {}),
    "dict": (BUSINESS, BUSINESS, {}),
    "failure": ({"success": False, "error": "no", "error_code": "E"}, ..., {}),
    "status and a key of its own": ({"status": "ready", "words": 2}, ..., {}),
    "files without status": ({"files": {"a": [S3]}}, ..., {"a": [S3]}),
    "result": ({"result": 5}, ..., {}),
    "null as result": ({"result": None}, ..., {}),
    "text": ("text", ..., {}),
    "list": ([1, 2], ..., {}),
    "number": (7, ..., {}),
    "zero": (0, ..., {}),
    "false": (False, ..., {}),
    "empty": ({}, ..., {}),
    **{f"files {odd}": ({"status": "SUCCESS", "output": 1, "files": odd}, 1, {})
       for odd in (5, True, {"a": 5}, {"a": {"b": 1}}, [S3])},
    "some odd files": ({"output": 1, "files": {"a": [5, S3, None], "b": S3 + "2"}}, 1,
                       {"a": [S3], "b": [S3 + "2"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_function_gave_is_found_in_every_shape_of_output(name: str) -> None:
    output, value, files = OUTPUTS[name]
    value = output if value is ... else value
    result = PrefabResult(CallStatus.SUCCESS, output)
    assert result.get_function_result() == value
    assert type(result.get_function_result()) is type(value)
    is_named = isinstance(output, dict) and "result" in output
    assert result.get_result() == (output["result"] if is_named else output)
    fields = value if isinstance(value, dict) else {}
    told = (result.get_business_success(), result.get_business_message(),
            result.get_business_error(),
            result.get_business_error_code())  # fmt: skip
    assert told == (fields.get("success", False), fields.get("message", ""), fields.get("error"),
                    fields.get("error_code"))  # fmt: skip
    assert result.get_files() == files
    assert result.get_file_urls() == [url for urls in files.values() for url in urls]
    assert result.get("no such key", "default") == "default"


def test_a_result_is_four_fields_and_two_attributes_beside_them() -> None:
    names = ["status", "output", "error", "job_id"]
    assert [one.name for one in dataclasses.fields(PrefabResult)] == names
    bare = PrefabResult(CallStatus.SUCCESS, 1, None, "job-1")
    assert (bare.raw, bare.exception) == ({}, None)
    assert bare == PrefabResult("SUCCESS", 1, job_id="job-1") != PrefabResult("SUCCESS", 2)
    assert bare.to_dict() == {"status": "SUCCESS", "output": 1, "error": None, "job_id": "job-1"}
    assert type(bare.to_dict()["status"]) is str
    with pytest.raises(TypeError):
        PrefabResult("SUCCESS", raw={})  # type: ignore[call-arg]


FAILED_ENTRY = {"status": "FAILED", "output": None, "error": {"message": "m", "type": "T"}}
A_FAILED_CALL = answer({"job_id": "job-2", "results": [FAILED_ENTRY]})
# What becomes of three calls, and whether they may have run although they failed.
FATES: list[tuple[Answer, bool | None]] = [
    (ran({"n": [1, 2]}), None), (A_FAILED_CALL, None), (answer({"detail": "no"}, 404), False),
    (HangUp(), True), (UNAVAILABLE, True),
]  # fmt: skip


@pytest.fixture
def mixed_batch() -> BatchResult:
    with Script(*(given for given, _ in FATES)) as server, client_of(server) as client:
        return client.run_batch([call()] * len(FATES), max_workers=1)


def test_results_become_json_also_those_of_calls_that_raised(mixed_batch: BatchResult) -> None:
    whole = json.loads(json.dumps(dataclasses.asdict(mixed_batch)))
    assert whole["status"] == "PARTIAL_SUCCESS" and len(whole["results"]) == len(FATES)
    for result, told, (_, may_have_run) in zip(mixed_batch.results, whole["results"], FATES):
        assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
        assert {**told, "error": None} == {**result.to_dict(), "error": None}
        assert (result.exception is None) == (may_have_run is None)
        if result.exception:
            error = result.to_dict()["error"]
            assert error["may_have_run"] is result.exception.may_have_run is may_have_run
            assert result.error and result.error["may_have_run"] is may_have_run
            assert (error["message"], error["type"]) == (
                result.exception.message, type(result.exception).__name__)
        else:
            assert result.raw["status"] == result.status


def test_a_result_takes_what_is_beside_its_fields_along(mixed_batch: BatchResult) -> None:
    for take in (copy.copy, copy.deepcopy, lambda result: pickle.loads(pickle.dumps(result))):
        for result in mixed_batch.results:
            taken = take(result)
            assert (taken, taken.raw) == (result, result.raw)
            assert type(taken.exception) is type(result.exception)


@pytest.mark.skipif(sys.version_info < (3, 10), reason="`X | Y` cannot be evaluated there")
def test_results_are_fields_of_pydantic(mixed_batch: BatchResult) -> None:
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(BatchResult)
    told = json.loads(adapter.dump_json(mixed_batch))
    assert told == json.loads(json.dumps(dataclasses.asdict(mixed_batch)))
    assert adapter.validate_python(told).results[0] == mixed_batch.results[0]


def test_files_beside_the_output_are_found() -> None:
    with Script(ran(files={"a": [S3], "b": [S3 + "1", S3 + "2"]})) as server:
        result = run(client_of(server))
    assert result.get_files() == {"a": [S3], "b": [S3 + "1", S3 + "2"]}
    assert result.get_file_urls() == [S3, S3 + "1", S3 + "2"]


@pytest.mark.parametrize("status", ["QUEUED", "success", None, 7], ids=repr)
def test_a_status_that_the_sdk_does_not_know_is_no_success(status: Any) -> None:
    with Script(ran(status=status)) as server:
        result = run(client_of(server))
    assert not result.is_success() and result.get_function_result() == "ok"
    assert BatchResult("j", "COMPLETED", [result]).get_failed() == [result]


def test_a_byte_order_mark_in_front_of_json_does_no_harm() -> None:
    with Script(answer(body=b"\xef\xbb\xbf[]")) as server:
        assert client_of(server).list_prefabs() == []


LONG_NUMBER = b"9" * 5000  # more digits than `int` takes from a text unless it is told to
RUN_BODY = (
    b'{"job_id": "j", "status": "COMPLETED", "results": '
    b'[{"status": "SUCCESS", "output": {"status": "SUCCESS", "output": %b}}]}'
)
# What a function gave, as it stands in the answer, and what is read of it.
ODD_VALUES: dict[str, tuple[bytes, Any]] = {
    "tab": (b'"a\tb"', "a\tb"),
    "line ends": (b'"a\r\nb\nc"', "a\r\nb\nc"),
    "control characters": (b'"a\x00\x01\x0b\x1f\x7fb"', "a\x00\x01\x0b\x1f\x7fb"),
    "colour of a terminal": (b'["\x1b[31mred\x1b[0m"]', ["\x1b[31mred\x1b[0m"]),
    "tab in a key": (b'{"a\tb": 1}', {"a\tb": 1}),
    "long integer": (LONG_NUMBER, 10**5000 - 1),
    "long negative integer": (b"-" + LONG_NUMBER, 1 - 10**5000),
    "very long integer": (b"1" + b"0" * 99_999 + b"7", 10**100_000 + 7),
    "very long negative integer": (b"-1" + b"0" * 99_999 + b"7", -(10**100_000) - 7),
    "long integer in an object": (b'{"n": [1, %b]}' % LONG_NUMBER, {"n": [1, 10**5000 - 1]}),
    "byte that is not UTF-8": (b'"caf\xe9!"', "caf\ufffd!"),
    "byte that is not UTF-8 in a key": (b'{"caf\xe9": 1}', {"caf\ufffd": 1}),
    "half a character": (b'"caf\xc3"', "caf\ufffd"),
    "all of them": (b'["\t", %b, "\xff"]' % LONG_NUMBER, ["\t", 10**5000 - 1, "\ufffd"]),
}


@pytest.mark.parametrize("name", ODD_VALUES)
def test_what_json_does_not_allow_does_not_cost_a_paid_answer(name: str) -> None:
    written, value = ODD_VALUES[name]
    given = answer(body=RUN_BODY % written)
    behind_a_mark = answer(body=b"\xef\xbb\xbf" + RUN_BODY % written)
    with Script(given, behind_a_mark, given) as server, client_of(server) as client:
        assert run(client).get_function_result() == value
        assert run(client).get_function_result() == value
        assert next(run(client, stream=True)).data["output"] == value


@pytest.mark.parametrize("name", [name for name in ODD_VALUES if name != "line ends"])
def test_an_event_may_have_in_its_json_what_json_does_not_allow(name: str) -> None:
    written, value = ODD_VALUES[name]
    given = chunked(b'data: {"type": "content", "data": [%b]}\n\n' % written, event("done"))
    with Script(given, given) as server, client_of(server) as client:
        assert next(run(client, stream=True)).data == [value]
        assert run(client).get_function_result() == [[value]]


# The answer to a call with an integer of 5,000 digits in it, and whether the call succeeded.
LONG_NUMBERS: dict[str, tuple[bytes, bool]] = {
    "status": (b'{"results": [{"status": %b}]}', False),
    "error": (b'{"results": [{"status": "FAILED", "error": %b}]}', False),
    "message": (b'{"results": [{"status": "FAILED", "error": {"message": %b}}]}', False),
    "job_id": (b'{"results": [{"status": "SUCCESS"}], "job_id": %b}', True),
    "files": (b'{"results": [{"status": "SUCCESS", "files": %b}]}', True),
    "business message": (
        b'{"results": [{"status": "SUCCESS", "output": {"message": [%b]}}]}', True),
    "error event": (b'data: {"type": "error", "data": %b}\n\n', False),
    "error event in an object": (b'data: {"type": "error", "data": {"message": %b}}\n\n', False),
    "error code": (b'data: {"type": "error", "error_code": %b}\n\n', False),
    "done event": (b'data: {"type": "done", "data": {"n": %b}}\n\n', True),
}  # fmt: skip


@pytest.mark.parametrize("place", LONG_NUMBERS)
def test_a_long_number_costs_no_result_wherever_it_stands(place: str) -> None:
    payload, succeeded = LONG_NUMBERS[place]
    kind = STREAM if payload.startswith(b"data:") else "application/json"
    with Script(whole(payload % LONG_NUMBER, kind)) as server:
        result = run(client_of(server))
    assert result.is_success() == succeeded and result.get_files() == {}
    assert isinstance(result.get_business_message(), str)


@pytest.mark.parametrize(
    "body",
    ['{"detail": %s}', '{"detail": {"n": %s}}', '{"message": %s, "error_code": %s}',
     '{"detail": [{"loc": ["body", %s], "msg": %s}]}'],
)  # fmt: skip
def test_a_long_number_in_an_error_leaves_it_what_its_status_says(body: str) -> None:
    text = body.replace("%s", LONG_NUMBER.decode()).encode()
    error = error_of(run, answer(body=text, status=422))
    assert type(error) is ValidationError and error.status_code == 422
    assert "422" in str(error) and ENDPOINTS["run"].asked in str(error)


@pytest.mark.parametrize("names", [["prefab_id"], ["secret_name"], ["prefab_id", "secret_name"]])
def test_a_long_number_as_the_name_of_a_secret_costs_no_error(names: list[str]) -> None:
    fields = ", ".join(f'"{name}": [{LONG_NUMBER.decode()}]' for name in names)
    body = f'{{"detail": {{"error_code": "MISSING_SECRET", {fields}}}}}'
    error = error_of(run, answer(body=body.encode(), status=400))
    assert type(error) is MissingSecretError and "too large" in str(error)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_may_come_in_any_of_its_encodings(encoding: str) -> None:
    body = (RUN_BODY % '"\u4f60 ok"'.encode()).decode().encode(encoding)
    with Script(answer(body=body)) as server:
        assert run(client_of(server)).get_function_result() == "\u4f60 ok"


@pytest.mark.parametrize("error", ["text", ["list"], 5], ids=repr)
def test_an_error_of_a_call_that_is_no_object_is_its_message(error: Any) -> None:
    with Script(ran(status="FAILED", error=error)) as server:
        assert run(client_of(server)).error == {"message": str(error)}


def test_what_a_result_has_beside_its_four_fields_is_no_argument_and_no_data() -> None:
    with Script(ran(5, new=[1])) as server:
        result = run(client_of(server))
    fields = {"status": "SUCCESS", "output": {"status": "SUCCESS", "output": 5}, "error": None}
    assert result.raw == {**fields, "new": [1]} and result.exception is None
    assert dataclasses.asdict(result) == result.to_dict() == {**fields, "job_id": "job-1"}
    assert PrefabResult(*result.to_dict().values()) == PrefabResult(**result.to_dict()) == result
    for name in ("raw", "exception"):
        with pytest.raises(TypeError, match=name):
            PrefabResult("SUCCESS", **{name: None})


def test_the_data_of_a_result_says_whether_a_call_that_raised_may_have_run() -> None:
    failed = ran(status="FAILED", error=coded("E"))
    answers = [ran(1), answer(REASON, 404), failed, UNAVAILABLE, HangUp()]
    with Script(*answers) as server:
        batch = client_of(server).run_batch([call()] * len(answers), max_workers=1)
    written = json.loads(json.dumps([result.to_dict() for result in batch.results]))
    assert written == json.loads(json.dumps(dataclasses.asdict(batch)))["results"]
    told = [result["error"] and result["error"].get("may_have_run") for result in written]
    assert told == [None, False, None, True, True]


def test_numbers_that_json_does_not_have_do_not_cost_a_paid_answer() -> None:
    body = b'{"job_id": "j", "results": [{"status": "SUCCESS", "output": {"output": [%b]}}]}'
    given = answer(body=body % b"NaN, Infinity, -Infinity, 1")
    with Script(given, given,
                chunked(b'data: {"type": "content", "data": NaN}\n\n', event("done"))) as server:
        client = client_of(server)
        for value in (run(client).get_function_result(),
                      next(run(client, stream=True)).data["output"]):
            assert math.isnan(value[0]) and value[1:] == [math.inf, -math.inf, 1]
        assert math.isnan(next(run(client, stream=True)).data)


evaluates_unions = pytest.mark.skipif(
    sys.version_info < (3, 10), reason="the notation `X | Y` cannot be evaluated there"
)
RESULT_FIELDS = ["status", "output", "error", "job_id"]


def batch_of_all_kinds() -> BatchResult:
    """Results of a call that ran, one that failed, one that was refused, one that was lost."""
    failed = {"status": "FAILED", "output": None, "error": {"message": "m", "type": "t"}}
    answers = [ran({"a": [1]}), answer({"results": [failed]}), answer(coded("E"), 422), HangUp()]
    with Script(*answers) as server, client_of(server, max_retries=0) as client:
        batch = client.run_batch([call(number) for number in range(4)], max_workers=1)
    assert [bool(result.exception) for result in batch.results] == [False, False, True, True]
    return batch


def test_a_result_has_four_fields_and_beside_them_what_it_came_from() -> None:
    assert [field.name for field in dataclasses.fields(PrefabResult)] == RESULT_FIELDS
    made = PrefabResult("SUCCESS", {"a": 1}, None, "j")
    assert (made.raw, made.exception) == ({}, None)
    assert made == PrefabResult("SUCCESS", {"a": 1}, job_id="j")
    ran_, _, refused, _ = batch_of_all_kinds().results
    for again in (copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        assert again(refused) == refused and isinstance(again(refused).exception, ValidationError)
        assert again(ran_) == ran_ and again(ran_).raw["output"]["output"] == {"a": [1]}


def test_a_batch_can_be_written_as_json_also_if_calls_raised() -> None:
    batch = batch_of_all_kinds()
    written = json.loads(json.dumps(dataclasses.asdict(batch)))
    assert written["status"] == "PARTIAL_SUCCESS" and len(written["results"]) == 4
    for document, result in zip(written["results"], batch.results):
        assert list(document) == RESULT_FIELDS
        assert document["status"] == result.status and document["output"] == result.output
        assert document["error"] == result.error
        assert json.loads(json.dumps(result.to_dict())) == document
    assert written["results"][2]["error"]["type"] == "ValidationError"


def test_events_calls_and_entries_of_the_directory_can_be_written_as_json_too() -> None:
    entry = PrefabInfo._from_dict(
        {"id": "p", "version": "1", "deployment_status": "deployed", "x": [1]}
    )
    happened = StreamEvent.from_dict({"type": "content", "data": {"a": 1}, "metadata": {}})
    for value in (entry, happened, call(3), PrefabCall("p", "1", "f", {"a": 1}, {"v": [S3]})):
        assert json.loads(json.dumps(dataclasses.asdict(value)))


@evaluates_unions
def test_results_are_fields_of_pydantic_models() -> None:
    pydantic = pytest.importorskip("pydantic")
    batch = batch_of_all_kinds()
    model = pydantic.create_model("Report", batch=(BatchResult, ...), first=(PrefabResult, ...))
    written = json.loads(model(batch=batch, first=batch.results[0]).model_dump_json())
    assert written["batch"] == json.loads(json.dumps(dataclasses.asdict(batch)))
    assert list(written["first"]) == RESULT_FIELDS and model.model_json_schema()
    assert model.model_validate(written).batch.results[2].error == batch.results[2].error


@evaluates_unions
def test_results_are_response_models_of_fastapi() -> None:
    fastapi = pytest.importorskip("fastapi")
    batch, app = batch_of_all_kinds(), fastapi.FastAPI()

    async def give_batch() -> Any:
        return batch

    async def give_last() -> Any:
        return batch.results[3]

    async def ask(path: str) -> Any:
        sent: list[Any] = []
        scope = {
            "type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "headers": [],
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        }  # fmt: skip
        asked = iter([{"type": "http.request", "body": b""}])

        async def receive() -> Any:
            return next(asked, {"type": "http.disconnect"})

        async def keep(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, keep)
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))

    app.get("/batch", response_model=BatchResult)(give_batch)
    app.get("/last", response_model=PrefabResult)(give_last)
    written = json.loads(json.dumps(dataclasses.asdict(batch)))
    assert asyncio.run(ask("/batch")) == (200, written)
    assert asyncio.run(ask("/last")) == (200, written["results"][3])
    assert app.openapi()["components"]["schemas"]["PrefabResult"]


def test_a_directory_entry_may_lack_nearly_everything() -> None:
    same = {"version": "1.0.0", "name": "P", "description": "d", "tags": ["t"],
            "functions": [{"name": "f"}],
            "requires_secrets": True, "secrets": [{"name": "KEY"}], "is_official": True,
            "author": "a"}  # fmt: skip
    whole = {**same, "id": "p", "deployment_status": "deployed", "github_url": "g"}
    with Script(answer([whole, {"id": "q", "version": "2", "tags": None, "new": 1}])) as server:
        first, second = client_of(server).list_prefabs()
    assert isinstance(first, PrefabInfo) and first.raw == whole
    told = {**same, "prefab_id": "p", "status": "deployed"}
    assert {name: getattr(first, name) for name in told} == told
    assert (second.prefab_id, second.tags, second.functions, second.secrets) == ("q", [], [], [])
    assert (second.status, second.is_official, second.author) == (None, False, None)


# --- Arguments: what cannot be used is refused before anything is sent ----------------------------



# What JSON cannot carry, and the words that tell so.
NO_JSON: dict[str, tuple[Any, list[str]]] = {
    "datetime": (datetime(2024, 1, 1), ["datetime", "isoformat()"]),
    "date": (date(2024, 1, 1), ["date", "isoformat()"]),
    "model": (type("Model", (), {"model_dump": 1, "__repr__": lambda _: "hush"})(),
              ["Model", "model_dump()"]),
    "array": (type("Array", (), {"tolist": 1})(), ["Array", "tolist()"]),
    "set": ({1, 2}, ["set", "list("]),
    "generator": ((number for number in range(3)), ["generator", "list("]),
    "keys": ({"a": 1}.keys(), ["dict_keys", "list("]),
    "map": (map(str, [1]), ["map", "list("]),
    "bytes": (b"hush-hush", ["bytes"]),
    "object": (object(), ["object"]),
    "not a number": (float("nan"), ["nan"]),
    "infinity": (float("inf"), ["inf"]),
    "half a surrogate pair": ("\ud800", ["str"]),
    "tuple as key": ({(1, 2): 3}, ["tuple", "key"]),
    "bytes as key": ({b"hush-hush": 3}, ["bytes", "key"]),
    "set as key": ({frozenset(): 3}, ["frozenset", "key"]),
}
# The parameters of a call with such a value in them, by the path that tells where it is.
PLACES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "rows[0].when": lambda value: {"fine": 1, "rows": [{"when": value}, {"when": 1}]},
    "a.b.c[1][2]": lambda value: {"a": {"b": {"c": [0, (1, 2, value)]}}},
    "when": lambda value: {"when": value},
}
LOOP: list[Any] = []
LOOP.append(LOOP)
NO_FILES = [{"v": "s3://b/k"}, {"v": ["/tmp/a.mp4"]}, {"v": ["https://b/k"]},
            {"v": [Path("a.mp4")]}, {"v": None},
            {"v": [S3, "a.mp4"]}, {"v": ["s3://"]}, {"v": {S3: 1}}]  # fmt: skip
# What is wrong with a call, and the words that tell so.
BAD_CALLS: list[tuple[dict[str, Any], list[str]]] = [
    ({"prefab_id": ""}, ["prefab_id"]), ({"version": None}, ["version"]),
    ({"version": 1.1}, ["version", "1.1"]),
    ({"function_name": 77}, ["function_name", "77"]), ({"parameters": ["list"]}, ["parameters"]),
    ({"parameters": {"fine": 1, "culprit": LOOP}}, ["culprit"]),
    *(({"parameters": PLACES["rows[0].when"](value)}, ["rows[0].when", *words])
      for value, words in NO_JSON.values()),
    *(({"parameters": fill(date(2024, 1, 1))}, [place, "isoformat()"])
      for place, fill in PLACES.items()),
    ({"files": [S3]}, ["files"]), ({"files": S3}, ["files"]),
    *(({"files": files}, ["upload_input_file"]) for files in NO_FILES),
    *(({"files": files}, ["files", "upload_input_file"]) for files in (
        ["report.txt"], "report.txt", Path("report.txt"), ("a.mp4", "b.mp4"), [Path("a.mp4")],
        b"report.txt")),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD_CALLS, ids=ascii)
def test_a_call_that_cannot_be_sent_is_refused_with_its_reason(
    change: dict[str, Any], words: list[str]
) -> None:
    bad = dataclasses.replace(call(), **change)
    names = (bad.prefab_id, bad.version, bad.function_name)
    with Script() as server, client_of(server) as client:
        for act in (
            lambda: client.run(*names, bad.parameters, bad.files),
            lambda: client.run(*names, bad.parameters, bad.files, stream=True),
            lambda: client.run_batch([call()] * 20 + [bad]),
            lambda: client.run_batch([call(), bad], single_request=True),
        ):
            with pytest.raises(ValidationError) as caught:
                act()
            assert all(word in str(caught.value) for word in words)
            assert "hush" not in all_of(caught.value)
    assert not server.received


def test_parameters_too_deep_for_json_are_an_error_and_no_crash() -> None:
    deep: list[Any] = []
    for _ in range(200_000):  # which no Python writes
        deep = [deep]
    try:
        with Script() as server, pytest.raises(ValidationError, match="deep"):
            client_of(server).run("p", "1", "f", {"deep": deep})
    finally:
        while deep:  # let go of it level by level
            deep = deep[0]


A_PATH = r"\b(The|the|a) path\b"
BAD_ARGUMENTS: dict[str, tuple[Callable[[GatewayClient], Any], str]] = {
    **{f"timeout={value!r}": (lambda c, value=value: run(c, timeout=value), "timeout")
       for value in (0, -1, "5", True, float("nan"), float("inf"), 2**31 / 1000)},
    "nothing in a batch": (lambda c: c.run_batch([call(), None]), "PrefabCall"),
    "a call as a batch": (lambda c: c.run_batch(call()), "list of PrefabCall"),
    "nothing as a batch": (lambda c: c.run_batch(None), "list of PrefabCall"),
    "a number as a batch": (lambda c: c.run_batch(5, single_request=True), "list of PrefabCall"),
    "zero byte in a path": (lambda c: c.upload_file("a\0b"), "path of a file"),
    "zero byte in a target": (lambda c: c.download_file(S3, "a\0b"), "path of a file"),
    "dict in a batch": (lambda c: c.run_batch([{"prefab_id": "p"}]), r"PrefabCall\(\*\*"),
    "dict in a single request": (lambda c: c.run_batch([call(), {"prefab_id": "p"}],
                                                       single_request=True),
                                 r"PrefabCall\(\*\*"),
    "no workers": (lambda c: c.run_batch([call()], max_workers=0), "max_workers"),
    "no executor": (lambda c: c.run_batch([], executor=5), "executor"),
    "single request on an executor": (
        lambda c: c.run_batch([call()], single_request=True,
                              executor=concurrent.futures.Executor()), "executor"),
    "on_result that is no function": (lambda c: c.run_batch([call()], on_result="print"),
                                      "on_result"),
    "parameter by position": (lambda c: c.prefab("p", "1").fn("text"), "by name"),
    "presigned URL of https": (lambda c: c.get_presigned_url("https://b/k"), "s3://"),
    "presigned URL of nothing": (lambda c: c.get_presigned_url(None), "s3://"),
    "download of a path": (lambda c: c.download_file("r.txt", "f"), r"s3://(?!.*upload)"),
    "download in another mode": (lambda c: c.download_file(S3, "f", mode="stream"), "mode"),
    "download to a number": (lambda c: c.download_file(S3, 3), ""),
    "upload of bytes": (lambda c: c.upload_file(b"hush-hush"), A_PATH),
    "upload of a file": (lambda c: c.upload_file(io.BytesIO(b"hush")), A_PATH),
    "upload of a descriptor": (lambda c: c.upload_file(0), A_PATH),
    "input of bytes": (lambda c: c.upload_input_file(b"hush"), A_PATH),
    "temporary file of a file": (lambda c: c.upload_temp_file(io.BytesIO(b"hush")), A_PATH),
    "temporary file for no time": (lambda c: c.upload_temp_file(__file__, ttl=0), "ttl"),
    "temporary file for a text": (lambda c: c.upload_temp_file(__file__, ttl="1"), "ttl"),
    "input of a type with a line break": (lambda c: c.upload_input_file(__file__, "a/b\r\nX: y"),
                                          "content_type"),
    "no session": (lambda c: c.cleanup_temp_files(""), "session_id"),
    "no name of a secret": (lambda c: c.set_secret("p", "", "v"), "secret_name"),
    "no secret": (lambda c: c.set_secret("p", "KEY", None), "secret_value"),
    "huge number as limit": (lambda c: c.list_files(limit=10**5000), "limit"),
    "list as time": (lambda c: c.upload_temp_file(__file__, ttl=[[]] * 3), "ttl"),
    "huge number as files": (lambda c: c.run("p", "1", "f", files={"a": 10**5000}), "files"),
    "object as URL": (lambda c: c.download_file(object(), "x"), "s3_url"),
    "half a surrogate pair in a query": (lambda c: c.list_files(continuation_token="\ud800"),
                                         "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_an_argument_that_cannot_be_used_is_refused_briefly_and_with_the_way_out(name: str) -> None:
    act, words = BAD_ARGUMENTS[name]
    with (
        Script() as server,
        client_of(server) as client,
        pytest.raises((ValidationError, TypeError)) as caught,
    ):
        act(client)
    assert re.search(words, str(caught.value)) and "hush" not in str(caught.value)
    assert len(str(caught.value)) < 300 and not server.received


# What takes an id, by its path with ID for the id.
ID_TAKERS: dict[str, Callable[[GatewayClient, str], Any]] = {
    "/v1/prefabs/ID/1/spec": lambda c, value: c.get_prefab_spec(value, "1"),
    "/v1/prefabs/p/ID/spec": lambda c, value: c.get_prefab_spec("p", value),
    "/v1/secrets/ID": lambda c, value: c.list_secrets(value),
    "/v1/secrets/ID/KEY": lambda c, value: c.delete_secret(value, "KEY"),
    "/v1/secrets/p/ID": lambda c, value: c.delete_secret("p", value),
}


@pytest.mark.parametrize("value", [".", "..", "", 3], ids=repr)
def test_an_id_that_would_be_another_path_is_refused(value: Any) -> None:
    with Script() as server:
        for take in ID_TAKERS.values():
            with pytest.raises(ValidationError):
                take(client_of(server), value)
    assert not server.received


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("base_url", value) for value in (
        "", "gateway", "gateway:80", "//gateway", "ftp://gateway", "http://", "http:///v1",
        "https://:80",
        "http://gate way", "http://gateway:port", "http://gateway:99999", "http://gateway:0",
        "http://me:pw@gateway",
        "http://gateway?a=1", "http://gateway#a", "http://gateway/?", "http://gateway/p#", 5,
        b"http://gateway",
        "http://gate\nway", "ht\ntp://gateway",
        *(f"http://gateway/a{blank}b" for blank in ("\n", "\r", "\t", " \n")))),
     *(("timeout", value)
       for value in (0, -1, True, "5", float("nan"), float("inf"), 2**31 / 1000)),
     ("max_retries", -1), ("max_retries", 1.5), ("max_retries", True), ("ssl_context", "x")],
    ids=repr,
)  # fmt: skip
def test_an_option_that_cannot_be_used_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        GatewayClient(**{"base_url": "http://gateway.example", name: value})


@pytest.mark.parametrize("from_environment", [False, True], ids=["given", "from the environment"])
def test_blanks_around_base_url_never_get_into_the_path(
    from_environment: bool, monkeypatch: Patch
) -> None:
    for shape in (" {}", "{} ", "{}\n", "{}\r\n", "\t{}\t", "\n{}"):
        value = shape.format("http://gateway.example/x")
        monkeypatch.setenv("GATEWAY_BASE_URL", value)
        client = GatewayClient(None if from_environment else value)
        assert client.base_url == "http://gateway.example/x"


def test_a_token_given_as_base_url_is_recognized_and_not_shown() -> None:
    with pytest.raises(ValidationError, match="internal_token=") as caught:
        GatewayClient("eyJhbGciOiJIUzI1NiJ9.e30." + HIDDEN)
    assert "hush" not in all_of(caught.value)


NAMES = ("internal_token", "api_key", "jwt_token")
VARIABLES = ("X_INTERNAL_TOKEN", "AGENT_BUILDER_API_KEY", "GATEWAY_JWT_TOKEN")
UNSENDABLE = ["hush\n", "hush\r\nX-Evil: 1", "hush\x7f", "hush\u20ac", "hush\u2028"]
NO_TEXT = ["\x00hush", "", b"hush", 7]  # which an environment variable cannot be, or is as if unset


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("internal_token", value) for value in UNSENDABLE),
     *itertools.product(["api_key", "jwt_token", "from_api_key", *VARIABLES], UNSENDABLE[:2]),
     *itertools.product([*NAMES, "from_api_key"], NO_TEXT)],
    ids=ascii,
)  # fmt: skip
def test_a_credential_that_no_header_can_carry_is_refused_without_showing_it(
    name: str, value: Any, monkeypatch: Patch
) -> None:
    with Script() as server, pytest.raises(ValidationError) as caught:
        if name in VARIABLES:
            monkeypatch.setenv(name, value)
            GatewayClient.from_env(base_url=server.url)
        elif name == "from_api_key":
            GatewayClient.from_api_key(value, server.url)
        else:
            GatewayClient(server.url, **{name: value})
    assert "hush" not in text_of(caught.value) and not server.received


PAIRS_AND_ALL = [
    *itertools.combinations(NAMES, 2),
    NAMES,
    *itertools.combinations(VARIABLES, 2),
    VARIABLES,
]


@pytest.mark.parametrize("names", PAIRS_AND_ALL, ids="+".join)
def test_more_than_one_credential_is_an_error(names: Any, monkeypatch: Patch) -> None:
    options = {name: "hush" for name in names if name in NAMES}
    for name in set(names) - set(options):
        monkeypatch.setenv(name, "hush")
    make: Any = GatewayClient if options else GatewayClient.from_env
    with pytest.raises(ValidationError) as caught:
        make(base_url="http://gateway.example", **options)
    assert "hush" not in text_of(caught.value).lower()


@pytest.mark.parametrize("options", [{"jwt_token": "j"}, {"internal_token": "i"}, {"api_key": "k"}],
                         ids=str)
def test_an_exchanged_key_allows_no_second_credential(options: Any) -> None:
    with Script() as server, pytest.raises(TypeError):
        GatewayClient.from_api_key("key-1", server.url, **options)
    assert not server.received


# What is wrong with the call of index 500, and how the message begins to tell so.
BAD_AT_500: dict[str, tuple[Any, str]] = {
    "parameter": (dataclasses.replace(call(), parameters={"when": date(2024, 1, 1)}),
                  r"\bcalls\[500\]\.inputs\.parameters\.when\b.*isoformat"),
    "parameter inside": (dataclasses.replace(call(), parameters={"rows": [{"a": {1}}]}),
                         r"\bcalls\[500\]\.inputs\.parameters\.rows\[0\]\.a\b.*list\("),
    "not a number": (dataclasses.replace(call(), parameters={"x": [0, float("nan")]}),
                     r"\bcalls\[500\]\.inputs\.parameters\.x\[1\].*nan"),
    "file": (dataclasses.replace(call(), files={"v": ["a.mp4"]}),
             r"calls\[500\]: .*\n.*upload_input_file"),
    "files": (dataclasses.replace(call(), files=["report.txt"]),
              r"calls\[500\]: .*\n.*upload_input_file"),
    "name": (dataclasses.replace(call(), prefab_id=""), r"calls\[500\]: .*prefab_id"),
    "version": (dataclasses.replace(call(), version=1.1), r"calls\[500\]: .*version.*1\.1"),
    "dict": ({"prefab_id": "p"}, r"calls\[500\]: .*PrefabCall\(\*\*"),
    "nothing": (None, r"calls\[500\]: .*PrefabCall"),
}  # fmt: skip


@pytest.mark.parametrize("single_request", [False, True])
@pytest.mark.parametrize("name", BAD_AT_500)
def test_the_bad_call_of_a_batch_is_named(name: str, single_request: bool) -> None:
    bad, said = BAD_AT_500[name]
    calls = (bad if number == 500 else call(number) for number in range(600))
    with Script() as server, client_of(server) as client:
        with pytest.raises(ValidationError, match=said):
            client.run_batch(calls, single_request=single_request)
    assert not server.received


class Yielding:
    """It has every attribute, as a `Prefab`, a mock or the proxy of a remote object."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: None


@pytest.mark.parametrize(
    "value", [GatewayClient("http://h").prefab("p", "1"), unittest.mock.MagicMock(), Yielding()],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_has_every_attribute_gets_no_advice_for_a_date(value: Any) -> None:
    with Script() as server, client_of(server) as client:
        with pytest.raises(ValidationError, match=r"\bwhen\b") as caught:
            client.run("p", "1", "f", {"when": value})
    assert type(value).__name__ in str(caught.value)
    assert not re.search(r"isoformat|model_dump|tolist", str(caught.value)) and not server.received


URL_FOR_TOKEN = ["http://gateway", "https://gateway:8443/x", "HTTP://gateway", " https://gateway"]


@pytest.mark.parametrize("url", URL_FOR_TOKEN)
@pytest.mark.parametrize("name", [*NAMES, "from_api_key", *VARIABLES])
def test_a_url_as_a_credential_is_an_error_that_names_base_url(
    name: str, url: str, monkeypatch: Patch
) -> None:
    with Script() as server, pytest.raises(ValidationError, match="base_url="):
        if name in VARIABLES:
            monkeypatch.setenv(name, url)
            GatewayClient.from_env(base_url=server.url)
        elif name == "from_api_key":
            GatewayClient.from_api_key(url, server.url)
        else:
            GatewayClient(server.url, **{name: url})  # type: ignore[arg-type]
    assert not server.received


def test_the_order_of_the_older_sdk_is_an_error_that_names_what_goes_where() -> None:
    with pytest.raises(ValidationError, match="base_url="):
        GatewayClient(None, "http://my-gateway")
    for arguments in (("some-token", "http://my-gateway"), ("some-token",)):
        with pytest.raises(ValidationError, match="internal_token="):
            GatewayClient(*arguments)


@pytest.mark.parametrize("bad", ["", ".", "..", "a\nb", "\t", "\x7f", None, 3, b"KEY"], ids=repr)
def test_a_secret_that_could_not_be_deleted_cannot_be_set(bad: Any) -> None:
    with Script() as server, client_of(server) as client:
        for names in ((bad, "KEY"), ("p", bad)):
            for act in (lambda names=names: client.set_secret(*names, "value"),
                        lambda names=names: client.delete_secret(*names)):  # fmt: skip
                with pytest.raises(ValidationError):
                    act()
    assert not server.received


@pytest.mark.parametrize("name", ["MY_KEY", "a/b", "a b", "\u4f60", "...", "%2F"])
def test_a_secret_that_can_be_deleted_can_be_set(name: str) -> None:
    with Script(GONE, GONE) as server, client_of(server) as client:
        client.set_secret("p", name, "value")
        client.delete_secret("p", name)
    set_, deleted = server.received
    assert set_.json["secret_name"] == name
    assert urllib.parse.unquote(deleted.target) == f"/v1/secrets/p/{name}"


# A presigned URL where something else belongs.
MISTAKEN = "https://s3.example/b/k.bin?X-Amz-Credential=hush-id&X-Amz-Signature=hush-hush-hush"
MISTAKEN_FORMS = {
    "https": MISTAKEN,
    "capitals": MISTAKEN.replace("https", "HTTPS"),
    "no scheme": MISTAKEN.partition("//")[2],
    "another scheme": MISTAKEN.replace("https", "oss"),
    "quotes in it": MISTAKEN.replace("hush-id", "a'b\"c"),
    "line break in it": MISTAKEN.replace("hush-id", "a\nb"),
}
MISTAKES: dict[str, Callable[[GatewayClient, str], Any]] = {
    "download": lambda c, url: c.download_file(url, "k.bin"),
    "presigned URL": lambda c, url: c.get_presigned_url(url),
    "file of a call": lambda c, url: run(c, files={"v": [url]}),
    "second file of a call": lambda c, url: run(c, files={"v": [S3, url]}),
    "bare file of a call": lambda c, url: run(c, files={"v": url}),
    "files of a call": lambda c, url: run(c, files=[url]),
    "text as files": lambda c, url: run(c, files=url),
    "stream": lambda c, url: run(c, files={"v": [url]}, stream=True),
    "name of a file": lambda c, url: run(c, files={url: ["a.mp4"]}),
    "batch": lambda c, url: c.run_batch([call(), PrefabCall("p", "1", "f", {}, {"v": [url]})]),
    "upload": lambda c, url: c.upload_file(url),
    "input": lambda c, url: c.upload_input_file(url),
    "base_url": lambda c, url: GatewayClient(url),
    "target": lambda c, url: c.download_file(S3, f"{url}/"),
    "version": lambda c, url: c.get_prefab_spec("p", url + "\n"),
}


@pytest.mark.parametrize("form", MISTAKEN_FORMS)
@pytest.mark.parametrize("name", MISTAKES)
def test_a_presigned_url_given_by_mistake_is_not_shown(
    name: str, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    if form == "no scheme" and name in ("upload", "input"):
        pytest.skip("as a path of a file as any other")
    with Script() as server, client_of(server) as client:
        with pytest.raises((GatewayError, OSError)) as caught:
            MISTAKES[name](client, MISTAKEN_FORMS[form])
    assert "hush" not in all_of(caught.value) and "hush" not in caplog.text and not server.received


# --- Requests -------------------------------------------------------------------------------------


class Endpoint(NamedTuple):
    """A method of the client, what it asks for (RUN: the mode's path), and a fitting answer."""

    act: Callable[[GatewayClient], Any]
    request: str
    content: Any
    given: bytes

    @property
    def asked(self) -> str:
        """How messages name the request of a client with an agent's token."""
        return self.request.partition("?")[0].replace("RUN", "/v1/internal/run")


BODY = {
    "prefab_id": "p",
    "version": "1.0.0",
    "function_name": "f",
    "inputs": {"parameters": {"n": 1}},
}
BODY_WITH_FILES = {**BODY, "inputs": {"parameters": {}, "files": {"video": [S3]}}}
PAGE = answer({"files": []})
GONE = answer(status=204, body=b"")
ENDPOINTS = {
    "run": Endpoint(run, "POST RUN", {"calls": [BODY]}, ran()),
    "run with files": Endpoint(
        lambda c: c.run("p", "1.0.0", "f", files={"video": [S3]}), "POST RUN",
        {"calls": [BODY_WITH_FILES]}, ran()),
    "stream": Endpoint(lambda c: list(run(c, stream=True)), "POST RUN", {"calls": [BODY]}, ran()),
    "prefab": Endpoint(lambda c: c.prefab("p", "1.0.0").f(n=1), "POST RUN", {"calls": [BODY]},
                       ran()),
    "batch": Endpoint(lambda c: c.run_batch([call(1)]), "POST RUN", {"calls": [BODY]}, ran()),
    "single request": Endpoint(
        lambda c: c.run_batch([call(1), PrefabCall("p", "1.0.0", "f", {}, {"video": [S3]})],
                              single_request=True),
        "POST RUN", {"calls": [BODY, BODY_WITH_FILES]}, answer({"results": [{}, {}]})),
    "directory": Endpoint(lambda c: c.list_prefabs(), "GET /v1/prefabs", None, answer([])),
    "directory by status": Endpoint(
        lambda c: c.list_prefabs(status="failed"), "GET /v1/prefabs?status=failed", None,
        answer([])),
    "spec": Endpoint(lambda c: c.get_prefab_spec("p", "1.0.0"), "GET /v1/prefabs/p/1.0.0/spec",
                     None, answer({})),
    "set a secret": Endpoint(
        lambda c: c.set_secret("p", "KEY", "v"), "POST /v1/secrets",
        {"prefab_id": "p", "secret_name": "KEY", "secret_value": "v"}, GONE),
    "delete a secret": Endpoint(lambda c: c.delete_secret("p", "KEY"), "DELETE /v1/secrets/p/KEY",
                                None, GONE),
    "list secrets": Endpoint(lambda c: c.list_secrets(), "GET /v1/secrets", None,
                             answer({"secrets": []})),
    "list a prefab's secrets": Endpoint(
        lambda c: c.list_secrets("p"), "GET /v1/secrets/p", None,
        answer({"prefab_id": "p", "secret_names": ["KEY"]})),
    "presigned URL": Endpoint(
        lambda c: c.get_presigned_url(S3),
        f"GET /internal/files/download?s3_url={S3}&mode=presigned&expires_in=3600", None,
        answer({"presigned_url": "http://h/"})),
    "list files": Endpoint(lambda c: c.list_files(), "GET /internal/files/list?limit=100", None,
                           PAGE),
    "list files from a page on": Endpoint(
        lambda c: c.list_files(5, "next"),
        "GET /internal/files/list?limit=5&continuation_token=next", None, PAGE),
    "list temporary files": Endpoint(
        lambda c: c.list_temp_files(), "GET /internal/files/list_temp?limit=100", None, PAGE),
    "list a session's files": Endpoint(
        lambda c: c.list_temp_files("s", 7, "next"),
        "GET /internal/files/list_temp?limit=7&session_id=s&continuation_token=next", None, PAGE),
    "clean up": Endpoint(
        lambda c: c.cleanup_temp_files("s"), "DELETE /internal/files/cleanup_temp?session_id=s",
        None,
        answer({"deleted_count": 3})),
}  # fmt: skip


def target_parts(target: str) -> tuple[str, dict[str, str]]:
    parts = urllib.parse.urlsplit(target)
    return parts.path, dict(urllib.parse.parse_qsl(parts.query, strict_parsing=bool(parts.query)))


@pytest.mark.parametrize(
    ("mode", "name"),
    [*(("internal token", name) for name in ENDPOINTS),
     *((mode, name) for mode in list(MODES)[1:] for name in ("run", "directory", "presigned URL"))],
)  # fmt: skip
def test_each_endpoint_is_asked_as_the_protocol_says(mode: str, name: str) -> None:
    endpoint = ENDPOINTS[name]
    with Script(*exchange_of(mode), endpoint.given) as server:
        endpoint.act(client_in(mode, server.url))
    *exchange, received = server.received
    for first in exchange:
        assert first[:2] == ("POST", "/v1/auth/convert_to_internal_token") and not first.body
        assert first.headers["authorization"] == "Bearer key-1"
        assert not {"x-internal-token", "x-api-key", "content-type"} & {*first.headers}
    headers = {"host": f"127.0.0.1:{server.port}", **MODES[mode].headers}
    if endpoint.content is None:
        assert not received.body
    else:
        headers.update(
            {"content-type": "application/json", "content-length": str(len(received.body))}
        )
        assert received.json == endpoint.content
    method, _, target = endpoint.request.replace("RUN", MODES[mode].run_path).partition(" ")
    assert (received.method, target_parts(received.target)) == (method, target_parts(target))
    assert received.headers.get("accept-encoding", "identity") == "identity"
    incidental = {"user-agent", "accept", "accept-encoding", "connection"}
    assert {k: v for k, v in received.headers.items() if k not in incidental} == headers
    assert len(exchange) == (mode == EXCHANGED)


@pytest.mark.parametrize("content_type", [None, "video/mp4"])
@pytest.mark.parametrize("mode", ["internal token", "JWT", "API key"])
def test_presigned_requests_carry_what_was_signed_and_no_credential(
    mode: str, content_type: str | None, tmp_path: Path
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"film")
    with Script(LINK, NO_BODY, LINK, answer(body=b"film")) as server:
        client = client_in(mode, server.url)
        assert client.upload_input_file(tmp_path / "a.mp4", content_type) == S3
        client.download_file(S3, tmp_path / "b.mp4")
    step, put, _, get = server.received
    assert step[:2] == ("POST", "/internal/files/generate_upload_url")
    assert step.json == {"filename": "a.mp4", "content_type": content_type}
    assert MODES[mode].headers.items() <= step.headers.items()
    assert put[:2] == ("PUT", "/bucket/o.bin?X-Sig=1") and put.body == b"film"
    assert put.headers["content-length"] == "4" and put.headers.get("content-type") == content_type
    assert "transfer-encoding" not in put.headers
    assert get[:2] == ("GET", "/bucket/o.bin?X-Sig=1") and "range" not in get.headers
    assert not CREDENTIAL_HEADERS & {*put.headers, *get.headers}


def test_a_presigned_url_arrives_as_it_was_signed(tmp_path: Path) -> None:
    signed = "/b/a%20b%2Fc+d~(1)!/%E4%BD%A0?X-Amz-Credential=k%2F1&sig=a%2Bb/c=&empty=&x=1+2"
    with (
        Script(NO_BODY) as storage,
        Script(answer({"presigned_url": storage.url + signed})) as server,
    ):
        client_of(server).download_file(S3, tmp_path / "f")
    assert storage.received[0].target == signed


@pytest.mark.parametrize("prefix", ["", "/", "/gateway", "/gateway/", "/a/b/"])
def test_a_path_prefix_of_base_url_is_kept_and_its_last_slash_does_not_matter(prefix: str) -> None:
    with Script(ran(), answer([])) as server:
        client = GatewayClient(server.url + prefix)
        run(client)
        client.list_prefabs()
    targets = [received.target for received in server.received]
    assert targets == [prefix.rstrip("/") + path for path in ("/v1/internal/run", "/v1/prefabs")]
    assert client.base_url == server.url + prefix.rstrip("/")


def test_ipv6_addresses_work() -> None:
    try:
        server = Script(ran(), host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        assert run(GatewayClient(f"http://[::1]:{server.port}/")).is_success()
    assert server.received[0].headers["host"] == f"[::1]:{server.port}"


EMPTY: dict[str, tuple[Callable[[GatewayClient], Any], Answer]] = {
    "token": (lambda c: c.list_files(continuation_token=""), PAGE),
    "token and session": (lambda c: c.list_temp_files(session_id="", continuation_token=""), PAGE),
    "session of all pages": (lambda c: list(c.iter_temp_files(session_id="")), PAGE),
    "status": (lambda c: c.list_prefabs(status=""), answer([])),
    "session of an upload": (
        lambda c: c.upload_temp_file(ROOT / "LICENSE", session_id=""),
        answer({"s3_url": S3}),
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_token_session_or_status_is_not_sent(name: str) -> None:
    act, given = EMPTY[name]
    with Script(given) as server, client_of(server) as client:
        act(client)
    (received,) = server.received
    assert not re.search("session_id|continuation_token|status", received.target)
    assert b'name="session_id"' not in received.body


def link_local_address() -> str:
    """One of this machine, with its zone."""
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as table:
        for digits, _, _, scope, _, interface in map(str.split, table):
            if scope == "20":
                return f"{':'.join(re.findall('....', digits))}%{interface}"
    return pytest.skip("no link-local address here")


@pytest.mark.parametrize("zone", ["number", "name", "link-local"])
def test_an_ipv6_zone_chooses_the_interface_and_is_not_sent(zone: str) -> None:
    """RFC 6874 writes `%` as `%25`; RFC 9110 has no zones in `Host`."""
    address = link_local_address() if zone == "link-local" else "::1"
    try:
        server = Script(ran(), host=address)
        loopback = socket.if_nametoindex("lo")
        named = {"number": f"::1%{loopback}", "name": "::1%lo", "link-local": address}[zone]
        socket.getaddrinfo(named, server.port, type=socket.SOCK_STREAM)
    except OSError:
        pytest.skip("this machine does not know such an address")
    with server:
        url = f"http://[{named.replace('%', '%25')}]:{server.port}"
        assert run(GatewayClient(url, timeout=WAIT_SECONDS, max_retries=0)).is_success()
    assert server.received[0].headers["host"] == f"[{address.partition('%')[0]}]:{server.port}"


def test_a_host_that_is_percent_encoded_is_sent_whole() -> None:
    """Only what stands in brackets has a zone."""
    with Script(ran()) as server:
        url = f"http://local%68ost:{server.port}"
        assert run(GatewayClient(url, timeout=WAIT_SECONDS, max_retries=0)).is_success()
    assert server.received[0].headers["host"] == f"local%68ost:{server.port}"


@pytest.mark.parametrize(
    ("value", "segment"),
    [("a/b", "a%2Fb"), ("a b", "a%20b"), ("a?b#c", "a%3Fb%23c"), ("100%", "100%25"),
     ("%2F", "%252F"),
     ("ü你", "%C3%BC%E4%BD%A0"), ("a+b", "a%2Bb"), ("...", "..."), ("../x", "..%2Fx")],
)  # fmt: skip
def test_an_id_stays_one_segment_of_the_path(value: str, segment: str) -> None:
    with Script(*[answer({"secret_names": []})] * len(ID_TAKERS)) as server:
        for take in ID_TAKERS.values():
            take(client_of(server), value)
    assert [received.target for received in server.received] == [
        path.replace("ID", segment) for path in ID_TAKERS
    ]


def test_query_values_arrive_as_they_were_given() -> None:
    odd = "a+b/c=&d é?#%20"
    with Script(PAGE, PAGE, answer({"deleted_count": 0})) as server:
        client = client_of(server)
        client.list_files(continuation_token=odd)
        client.list_temp_files(odd)
        client.cleanup_temp_files(odd)
    for received in server.received:
        assert list(target_parts(received.target)[1].values())[-1] == odd
        assert not re.search(r"[+ #]", received.target)


def test_parameters_arrive_whole() -> None:
    sent = {"ü": '你好\u2028\x00"\\', "n": 2**80, "f": 0.1, "none": None, "deep": [[{"": []}]]}
    with Script(ran()) as server:
        client_of(server).run("p", "1.0.0", "f", sent)
    assert server.received[0].json["calls"][0]["inputs"]["parameters"] == sent


# --- Connections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [0, 1])
def test_the_connection_that_was_used_last_is_used_first(last: int) -> None:
    with Script(*[chunked(event("done"))] * 2, *[ran()] * 3) as server:
        client = client_of(server)
        streams = [run(client, stream=True), run(client, stream=True)]
        for stream in (streams[1 - last], streams[last]):
            assert [e.type for e in stream] == ["done"]
        for _ in range(3):
            run(client)
    assert [received.connection for received in server.received] == [0, 1, last, last, last]


@pytest.mark.parametrize(
    ("given", "kept"),
    [(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + answer([]),
      True),
     (answer([], Connection="close"), False), (HangUp(b"HTTP/1.0 200 OK\r\n\r\n[]"), False),
     (HangUp(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n[]"), False)],
    ids=["interim answers", "Connection: close", "HTTP/1.0 without length", "HTTP/1.0"],
)  # fmt: skip
def test_a_connection_is_kept_unless_the_server_will_close_it(given: Answer, kept: bool) -> None:
    with Script(given, answer([])) as server:
        client = client_of(server)
        assert client.list_prefabs() == client.list_prefabs() == []
    assert [received.connection for received in server.received] == [0, 0 if kept else 1]


@pytest.mark.parametrize(
    "end",
    [lambda sock: sock.shutdown(socket.SHUT_WR), lambda sock: (reset(sock), sock.close()),
     send(b"HTTP/1.1 408 Slow\r\nContent-Length: 0\r\n\r\n")],
    ids=["closed", "reset", "sent something"],
)  # fmt: skip
def test_a_connection_that_the_server_ended_while_it_was_idle_is_not_used(end: Any) -> None:
    idle, ended = threading.Event(), threading.Event()
    steps = (send(ran()), lambda _: idle.wait(WAIT_SECONDS), end, lambda _: ended.set())
    with Script(Steps(steps), ran()) as server:
        client = client_of(server, max_retries=0)
        run(client)
        idle.set()
        assert ended.wait(WAIT_SECONDS) and run(client).is_success()
    assert [received.connection for received in server.received] == [0, 1]


def test_connections_that_were_idle_for_too_long_are_dropped(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    assert gateway_sdk._IDLE_SECONDS == 4
    monkeypatch.setattr(gateway_sdk, "_IDLE_SECONDS", 3600.0)
    with Script(answer(body=b"data")) as storage:
        with (
            Script(answer({"presigned_url": storage.url}), ran(), ran()) as server,
            client_of(server) as client,
        ):
            client.download_file(S3, tmp_path / "f")
            run(client)
            assert (server.connections, storage.open_connections) == (1, 1)
            monkeypatch.setattr(gateway_sdk, "_IDLE_SECONDS", 0.0)
            run(client)
            assert server.connections == 2
            # Though nothing more is asked of it.
            storage.wait_until(lambda: storage.open_connections == 0)


def test_of_many_connections_that_become_idle_a_hundred_are_kept() -> None:
    with Script(*[chunked(event("done"))] * 102) as server, client_of(server) as client:
        streams = [run(client, stream=True) for _ in range(102)]
        assert server.open_connections == 102
        for stream in streams:
            assert [e.type for e in stream] == ["done"]
        server.wait_until(lambda: server.open_connections <= 100)
        assert server.open_connections == 100


def test_a_small_request_is_one_write() -> None:
    pieces: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        while pieces.append(sock.recv(65536)) or pieces[-1]:
            if pieces[-1].endswith(b"}]}"):
                sock.sendall(ran())

    with Raw(serve) as server, client_of(server) as client:
        for _ in range(30):
            run(client)
    assert len(pieces) == 30 + 1 and all(piece.startswith(b"POST ") for piece in pieces[:-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_touch_the_connections_of_its_parent() -> None:
    with Script(ran(), ran("child"), ran("parent")) as server, client_of(server) as client:
        run(client)
        child = os.fork()
        if not child:
            status = 1
            with contextlib.suppress(BaseException):
                status = run(client).get_function_result() != "child"
                client.close()
                del client
                gc.collect()
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert run(client).get_function_result() == "parent"
    assert [received.connection for received in server.received] == [0, 1, 0]


# What a program still has when it ends, in a module that Python takes apart after the SDK's own.
HELD_AT_THE_END = {
    "a client and its copy": "copied = pickle.loads(pickle.dumps(client)); copied.list_prefabs()",
    "a client of two processes": "os.fork() and os.wait()",
    "a client that was not made":
        "client = caught(lambda: gateway_sdk.GatewayClient('http://h', timeout='soon'))",
    "an open stream": "stream = client.run('p', '1', 'f', stream=True); next(stream)",
}


@cpython_only
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("sockets", ["Python's", "gevent's"])
@pytest.mark.parametrize("held", HELD_AT_THE_END)
def test_nothing_is_said_of_what_is_open_when_python_ends(held: str, sockets: str) -> None:
    code = f"""if True:
        import codecs, os, pickle, sys
        if sys.argv[2] == "gevent's":
            from gevent import monkey
            monkey.patch_all()
        import gateway_sdk

        def caught(act):
            try:
                act()
            except ValueError as error:
                return error

        client = gateway_sdk.GatewayClient(sys.argv[1])
        client.list_prefabs()
        {HELD_AT_THE_END[held]}
        # Error handlers outlive all modules, and so do these two, which are then emptied in turn.
        kept = sys.modules["__main__"], gateway_sdk
        # Since some 3.13, Python empties its own sockets first, and no open one can be closed then.
        if {held == "an open stream"} and sys.version_info >= (3, 13):
            kept = ()
        codecs.register_error("kept", lambda error, kept=kept: kept)
    """
    if sockets == "gevent's":
        pytest.importorskip("gevent")
    with Routed(lambda r: Pause(OPEN_STREAM) if r.method == "POST" else answer([])) as server:
        done = python(code, server.url, sockets)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@cpython_only
def test_a_connection_is_kept_alive_below_http_while_a_call_takes_its_time(script: Any) -> None:
    def peer_port(sock: Any) -> int:
        with contextlib.suppress(OSError, IndexError):
            return sock.getpeername()[1]
        return 0

    with (
        script(Pause(OPEN_STREAM)) as server,
        client_of(server) as client,
        run(client, stream=True),
    ):
        sockets = [thing for thing in gc.get_objects() if isinstance(thing, socket.socket)]
        (sock,) = [
            sock for sock in sockets if sock.fileno() >= 0 and peer_port(sock) == server.port
        ]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert 0 < sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60


def test_a_socket_option_that_is_refused_costs_no_call() -> None:
    code = """if True:
        import errno, socket, sys

        class Sandboxed(socket.socket):
            def setsockopt(self, level, option, *value):
                if option in refused:
                    raise reason
                super().setsockopt(level, option, *value)

        socket.socket = Sandboxed
        import gateway_sdk

        names = ["TCP_NODELAY", "SO_KEEPALIVE", "TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"]
        options = [{getattr(socket, name)} for name in names if hasattr(socket, name)]
        results = []
        for number in (errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOPROTOOPT, errno.ENOSYS):
            reason = OSError(number, "refused")
            for refused in (*options, set.union(*options)):
                with gateway_sdk.GatewayClient(sys.argv[1], timeout=10) as client:
                    results.append(client.run("p", "1", "f").get_function_result())
        assert len(results) >= 10
        print(*sorted(set(results)))
    """
    with Routed(lambda received: ran()) as server:
        ended = python(code, server.url)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("ok\n", "", 0)


# The first answer, with which the server sends more, in one TLS record; and how the client gets it.
FIRST: dict[str, tuple[bytes, Callable[[GatewayClient], Any]]] = {
    "length": (ran("first"), run),
    # Longer than the reader's buffer: the stray one stays in the socket.
    "long body": (ran("." * 12_000), run),
    "chunks": (chunked(ran("first").partition(b"\r\n\r\n")[2], content_type="application/json"),
               run),
    "stream": (chunked(event("done")), lambda c: list(run(c, stream=True))),
    "no body": (NO_BODY, lambda c: c.delete_secret("p", "KEY")),
}
STRAYS = {"whole answer": ran("stray"), "half an answer": ran("stray")[:30], "line end": b"\r\n"}


@pytest.mark.parametrize(
    ("first", "stray"),
    [*((first, "whole answer") for first in FIRST), *(("length", stray) for stray in STRAYS)]
)
def test_bytes_behind_an_answer_are_never_the_next_calls_answer(
    first: str, stray: str, script: Any
) -> None:
    given, act = FIRST[first]
    with script(given + STRAYS[stray], ran("second"), ran("second")) as server:
        client = client_of(server, max_retries=0)
        act(client)
        assert run(client).get_function_result() == run(client).get_function_result() == "second"
    assert [received.connection for received in server.received] == [0, 1, 1]


FIRST_BODY = ran("first").partition(b"\r\n\r\n")[2]
COUNT = len(FIRST_BODY)
LENGTH = b"Content-Length: %d" % COUNT
LONGER = b"Content-Length: %d" % (COUNT + 1)
SHORTER = b"Content-Length: %d" % (COUNT - 1)
IN_CHUNKS = b"Transfer-Encoding: chunked"
STREAM_TYPE = b"Content-Type: text/event-stream"
LAST_CHUNK = b"0\r\n\r\n"
CHUNKS = chunk(FIRST_BODY) + LAST_CHUNK
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EVENT_CHUNKS = chunk(event("content", 1)) + chunk(event("done"))
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"


def headed(*lines: bytes, body: bytes = FIRST_BODY, start: bytes = b"HTTP/1.1 200 OK") -> bytes:
    """An answer with these lines in its head, and no others."""
    return b"\r\n".join((start, *lines, b"", body))


def in_chunks(
    size: bytes = b"%x" % COUNT, *, end: bytes = b"\r\n", last: bytes = LAST_CHUNK
) -> bytes:
    """A body in one chunk, of which the size, the end, and what follows are written so."""
    return size + b"\r\n" + FIRST_BODY + end + last


# What stands in front of the length.
ODD_LINES: dict[str, list[bytes]] = {
    "blank before the colon": [b"X-Frame-Options : DENY"],
    "tab before the colon": [b"X-Frame-Options\t: DENY"],
    "blank in the name": [b"X Frame Options: DENY"],
    "length of another name": [b"Not A Content-Length: 3"],
    "no colon": [b"DENY"],
    "words without a colon": [b"this server says hello"],
    "no name": [b": DENY"],
    "only a colon": [b":"],
    "blank in front": [b" Content-Length: 3"],
    "tab in front": [b"\tX-Frame-Options: DENY"],
    "folded": [b"X-Note: one", b" two"],
    "folded with a tab, twice": [b"X-Note: one", b"\ttwo: three", b" four"],
    "folded without a text": [b"X-Note: one", b" ", b"X-More: 1"],
    "folded like a length": [b"X-Note : one", b" Content-Length: 3"],
    "folded without a colon": [b"no colon", b" Content-Length: 3"],
    "control characters": [b"X-\x01Note: \x00\x7f", b"\x00"],
    "other line separators": [b"X-Note: a\x0bb\x0cc\x1cd\x85e"],
    "length behind a bare CR": [b"X-Note: one\rContent-Length: 3"],
    "UTF-8": ["X-Note: \u4f60".encode(), "\u4f60: 1".encode()],
    "not UTF-8": [b"X-Note: \xff\xfe", b"\xff\xfe"],
    "head of a mail": [b"From mailer Thu Jan  1 00:00:00 1970", b"Subject: =?utf-8?q?x?="],
    "101 fields": [b"X-Field: 1"] * 101,
    "1,000 fields": [b"X-%d: 1" % number for number in range(1000)],
    "101 odd lines": [b"X : 1", b"no colon"] * 51,
    "6,000 short fields": [b"X: 1234"] * 6000,
    "field of 60,000 characters": [b"X-Note: " + b"x" * 60_000],
}


@pytest.mark.parametrize("name", ODD_LINES)
def test_an_odd_line_of_a_head_costs_neither_the_answer_nor_its_connection(name: str) -> None:
    with Script(headed(*ODD_LINES[name], LENGTH), ran("second")) as server:
        client = client_of(server, timeout=3)
        assert run(client).get_function_result() == "first"
        assert run(client).get_function_result() == "second"
    assert [received.connection for received in server.received] == [0, 0]


# Answers that say where they end, each in its way.
WHOLE_ANSWERS: dict[str, bytes] = {
    "length with blanks around": headed(b"Content-Length: \t%d \t" % COUNT),
    "length without a blank": headed(b"Content-Length:%d" % COUNT),
    "length with a blank before the colon": headed(b"Content-Length : %d" % COUNT),
    "length in other letters": headed(b"CONTENT-length: %d" % COUNT),
    "length with zeros in front": headed(b"Content-Length: 000%d" % COUNT),
    "length twice in a field": headed(b"Content-Length: %d, %d" % (COUNT, COUNT)),
    "length three times in a field": headed(b"Content-Length: %d,%d , %d" % (COUNT, COUNT, COUNT)),
    "length in two fields": headed(LENGTH, b"X: 1", LENGTH),
    "length in three fields": headed(LENGTH, LENGTH, b"content-length : %d" % COUNT),
    "blank behind chunked": headed(b"Transfer-Encoding: chunked ", body=CHUNKS),
    "tabs around chunked": headed(b"Transfer-Encoding:\tchunked\t", body=CHUNKS),
    "chunked with a blank before the colon": headed(b"Transfer-Encoding : chunked", body=CHUNKS),
    "chunked in capitals": headed(b"TRANSFER-ENCODING: Chunked", body=CHUNKS),
    "chunked behind odd lines": headed(b"X : 1", b"no colon", IN_CHUNKS, body=CHUNKS),
    "chunked behind 101 fields": headed(*[b"X: 1"] * 101, IN_CHUNKS, body=CHUNKS),
    "chunk extensions": headed(
        IN_CHUNKS, body=in_chunks(b'%X;a;b="c;d"' % COUNT, last=b"0;e=1\r\n\r\n")),
    "blanks around chunk extensions": headed(IN_CHUNKS, body=in_chunks(b"%x \t; a = b" % COUNT)),
    "chunk sizes with zeros in front": headed(
        IN_CHUNKS, body=in_chunks(b"000%x" % COUNT, last=b"000\r\n\r\n")),
    "trailers": headed(IN_CHUNKS, body=in_chunks(last=b"0\r\nX-Sum: 1\r\nX-Count: 2\r\n\r\n")),
    "odd trailers": headed(
        IN_CHUNKS, body=in_chunks(last=b"0\r\nX : 1\r\nno colon\r\n two\r\n\r\n")),
    "length as a trailer": headed(
        IN_CHUNKS, body=in_chunks(last=b"0\r\nContent-Length: 3\r\n\r\n")),
    "keep-alive": headed(LENGTH, b"Connection: keep-alive"),
    "no reason": headed(LENGTH, start=b"HTTP/1.1 200"),
    "blank and no reason": headed(LENGTH, start=b"HTTP/1.1 200 "),
    "reason in UTF-8": headed(LENGTH, start="HTTP/1.1 200 \u597d".encode()),
    "99 times status 100 first": CONTINUE * 99 + headed(LENGTH),
    "99 times status 103 first": HINTS * 99 + headed(LENGTH),
    "both statuses first": (CONTINUE + HINTS) * 49 + headed(LENGTH),
    "odd interim answer first": b"HTTP/1.1 103 Hints\r\nX : 1\r\nno colon\r\n\r\n" + headed(LENGTH),
    "interim answer with a length first": (
        b"HTTP/1.1 100 Continue\r\nContent-Length: 0\r\n\r\n" + headed(LENGTH)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE_ANSWERS)
def test_an_answer_that_says_where_it_ends_is_read_and_leaves_its_connection(name: str) -> None:
    with Script(WHOLE_ANSWERS[name], ran("second")) as server:
        client = client_of(server, timeout=3)
        assert run(client).get_function_result() == "first"
        assert run(client).get_function_result() == "second"
    assert [received.connection for received in server.received] == [0, 0]


# Answers that can be read, but behind which something else may follow than the next one.
DOUBTFUL_ANSWERS: dict[str, Answer] = {
    "length in front of chunks": headed(LENGTH, IN_CHUNKS, body=CHUNKS),
    "length behind chunks": headed(IN_CHUNKS, b"Content-Length: 3", body=CHUNKS),
    "two lengths beside chunks": headed(LENGTH, IN_CHUNKS, LONGER, body=CHUNKS),
    "length beside chunks with a blank": headed(LENGTH, IN_CHUNKS + b" ", body=CHUNKS),
    "chunked, chunked": headed(b"Transfer-Encoding: chunked, chunked", body=CHUNKS),
    "chunked in two fields": headed(IN_CHUNKS, b"X: 1", IN_CHUNKS, body=CHUNKS),
    "identity, chunked": headed(b"Transfer-Encoding: identity, chunked", body=CHUNKS),
    "identity beside a length": headed(b"Transfer-Encoding: Identity", LENGTH),
    "identity, then the end": HangUp(headed(b"Transfer-Encoding: identity")),
    "close behind keep-alive": headed(LENGTH, b"Connection: keep-alive", b"Connection: close"),
    "close in front of keep-alive": headed(LENGTH, b"Connection: close", b"Connection: keep-alive"),
    "close in the third line": headed(
        LENGTH, b"Connection: keep-alive", b"Connection: x-own", b"X: 1", b"Connection: x , CLOSE"),
    "close in a list": headed(LENGTH, b"Connection: keep-alive,close"),
    "close in capitals": headed(LENGTH, b"CONNECTION: Close"),
    "close with a blank before the colon": headed(LENGTH, b"Connection : close"),
    "close behind odd lines": headed(LENGTH, b"X : 1", b"no colon", b"Connection: close"),
    "close behind 101 fields": headed(LENGTH, *[b"X: 1"] * 101, b"Connection: close"),
    "close beside chunks": headed(
        IN_CHUNKS, b"Connection: keep-alive", b"Connection: close", body=CHUNKS),
    "HTTP/1.0": headed(LENGTH, start=b"HTTP/1.0 200 OK"),
    "HTTP/1.0 and close behind keep-alive": headed(
        LENGTH, b"Connection: keep-alive", b"Connection: close", start=b"HTTP/1.0 200 OK"),
    "HTTP/1.0 in chunks": headed(
        IN_CHUNKS, b"Connection: keep-alive", body=CHUNKS, start=b"HTTP/1.0 200 OK"),
    "CR in a chunk extension": headed(IN_CHUNKS, body=in_chunks(b"%x;a\rb" % COUNT)),
    "two lengths, then the end": HangUp(headed(LENGTH, LONGER)),
    "the longer length first, then the end": HangUp(headed(LONGER, LENGTH)),
    "the shorter length first, then the end": HangUp(headed(SHORTER, LENGTH)),
    "two lengths in a field, then the end": HangUp(headed(LENGTH + b", %d" % (COUNT + 1))),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBTFUL_ANSWERS)
def test_what_can_be_read_is_read_but_a_doubtful_connection_is_not_used_again(name: str) -> None:
    with Script(DOUBTFUL_ANSWERS[name], ran("second")) as server:
        client = client_of(server, timeout=3, max_retries=0)
        assert run(client).get_function_result() == "first"
        assert run(client).get_function_result() == "second"
    assert [received.connection for received in server.received] == [0, 1]


def will_reset(sock: socket.socket) -> None:
    """Has the connection end in a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# What comes behind the last chunk, whose body is whole (RFC 9112 section 8).
CUT_TRAILERS: dict[str, Answer] = {
    "the end": HangUp(),
    "the end in a line end": HangUp(b"\r"),
    "the end in a field": HangUp(b"X-Su"),
    "the end behind a field": HangUp(b"X-Sum: 1\r\n"),
    "a reset": Steps((will_reset, socket.socket.close)),
    "silence": Pause(),
    "silence in a field": Pause(b"X-Su"),
    "silence behind a field": Pause(b"X-Sum: 1\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["result", "stream"])
@pytest.mark.parametrize("name", CUT_TRAILERS)
def test_what_is_cut_short_behind_the_last_chunk_costs_no_result(name: str, stream: bool) -> None:
    def choose(received: Received) -> Answer:
        if len(server.received) > 1:
            return ran("second")
        given = CUT_TRAILERS[name]
        before = given.sent_before if isinstance(given, (HangUp, Pause)) else b""
        last = b"0\r\n" + before
        whole = headed(IN_CHUNKS, body=in_chunks(last=last))
        if stream:
            whole = headed(STREAM_TYPE, IN_CHUNKS, body=chunk(event("content", "first")) + last)
        if isinstance(given, Steps):
            return Steps((send(whole), *given.steps))
        return given._replace(sent_before=whole)

    with Routed(choose) as server, client_of(server, max_retries=0) as client:
        first = run(client, stream=stream, timeout=SHORT_SECONDS)
        result = PrefabResult.from_events(first) if stream else first
        assert result.get_function_result() == "first"
        assert run(client).get_function_result() == "second"
    assert [received.connection for received in server.received] == [0, 1]


HEX = b"%x" % COUNT
# Answers whose end cannot be told, or only by a guess.
BROKEN_ANSWERS: dict[str, bytes] = {
    "size with 0x": headed(IN_CHUNKS, body=in_chunks(b"0x" + HEX)),
    "size with 0X and zeros": headed(IN_CHUNKS, body=in_chunks(b"0X00" + HEX)),
    "size with an underscore": headed(IN_CHUNKS, body=in_chunks(HEX[:1] + b"_" + HEX[1:])),
    "size with a plus": headed(IN_CHUNKS, body=in_chunks(b"+" + HEX)),
    "size with a blank in front": headed(IN_CHUNKS, body=in_chunks(b" " + HEX)),
    "size with a tab in front": headed(IN_CHUNKS, body=in_chunks(b"\t" + HEX)),
    "size with a form feed in front": headed(IN_CHUNKS, body=in_chunks(b"\x0c" + HEX)),
    "size with 0x and an extension": headed(IN_CHUNKS, body=in_chunks(b"0x" + HEX + b";a=b")),
    "size and words": headed(IN_CHUNKS, body=in_chunks(HEX + b" bytes")),
    "size +0 at the end": headed(IN_CHUNKS, body=in_chunks(last=b"+0\r\n\r\n")),
    "size -0 at the end": headed(IN_CHUNKS, body=in_chunks(last=b"-0\r\n\r\n")),
    "size 0x0 at the end": headed(IN_CHUNKS, body=in_chunks(last=b"0x0\r\n\r\n")),
    "size 0_0 at the end": headed(IN_CHUNKS, body=in_chunks(last=b"0_0\r\n\r\n")),
    "two other bytes behind a chunk": headed(IN_CHUNKS, body=in_chunks(end=b"XX")),
    "two line feeds behind a chunk": headed(IN_CHUNKS, body=in_chunks(end=b"\n\n")),
    "LF and CR behind a chunk": headed(IN_CHUNKS, body=in_chunks(end=b"\n\r")),
    "CR and another byte behind a chunk": headed(IN_CHUNKS, body=in_chunks(end=b"\rX")),
    "LF behind a chunk": headed(IN_CHUNKS, body=in_chunks(end=b"\n")),
    "nothing behind a chunk": headed(IN_CHUNKS, body=in_chunks(end=b"")),
    "gzip, chunked": headed(b"Transfer-Encoding: gzip, chunked", body=CHUNKS),
    "gzip and chunked in two fields": headed(b"Transfer-Encoding: gzip", IN_CHUNKS, body=CHUNKS),
    "chunked and gzip in two fields": headed(IN_CHUNKS, b"Transfer-Encoding: gzip", body=CHUNKS),
    "unknown coding": headed(b"Transfer-Encoding: x-own"),
    "unknown coding beside a length": headed(b"Transfer-Encoding: x-own", LENGTH),
    "almost chunked": headed(b"Transfer-Encoding: xchunked", body=CHUNKS),
    "two lengths": headed(LENGTH, LONGER),
    "the shorter length first": headed(SHORTER, LENGTH),
    "two lengths in a field": headed(LENGTH + b", %d" % (COUNT - 1)),
    "length of 19 digits": headed(b"Content-Length: 1%018d" % COUNT),
    "status 101": headed(start=b"HTTP/1.1 101 Switching Protocols", body=b""),
    "5, 6": headed(b"Content-Length: 5, 6"),
    "length with a plus": headed(b"Content-Length: +%d" % COUNT),
    "length with an underscore": headed(b"Content-Length: %d_%d" % divmod(COUNT, 10)),
    "length with 0x": headed(b"Content-Length: 0x" + HEX),
    "chunks of HTTP/1.0": headed(IN_CHUNKS, body=CHUNKS, start=b"HTTP/1.0 200 OK"),
    "100 times status 100 first": CONTINUE * 100 + headed(LENGTH),
    "100 times status 103 first": HINTS * 100 + headed(LENGTH),
    "100 times both statuses first": (CONTINUE + HINTS) * 50 + headed(LENGTH),
    "1,000 times status 100 first": CONTINUE * 1000 + headed(LENGTH),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
def test_behind_an_answer_whose_end_cannot_be_told_the_next_call_gets_its_own(name: str) -> None:
    with Script(BROKEN_ANSWERS[name], ran("second")) as server:
        client = client_of(server, max_retries=0)
        with contextlib.suppress(GatewayError):  # as far as it can be read, it is
            assert run(client, timeout=SHORT_SECONDS).get_function_result() == "first"
        assert run(client).get_function_result() == "second"
    assert [received.connection for received in server.received] == [0, 1]


# Answers with two lengths, of which either may be right, on a connection that stays open.
TWO_LENGTHS = {
    "the shorter is right": headed(LENGTH, LONGER),
    "the longer is right": headed(SHORTER, LENGTH),
    "in one field": headed(LENGTH + b", %d" % (COUNT + 1)),
    "beside one that is none": headed(LENGTH + b", x"),
}


@pytest.mark.parametrize("name", TWO_LENGTHS)
def test_of_two_lengths_the_shorter_is_enough_for_a_result(name: str) -> None:
    with Script(TWO_LENGTHS[name], ran("second")) as server:
        client = client_of(server, timeout=SHORT_SECONDS)
        assert run(client).get_function_result() == "first"
        assert run(client, timeout=5).get_function_result() == "second"
    assert [received.connection for received in server.received] == [0, 1]


def test_silence_behind_the_last_chunk_is_not_waited_for(monkeypatch: Patch) -> None:
    monkeypatch.setattr(gateway_sdk, "_SILENCE_SECONDS", 0.05)
    started = time.monotonic()
    for silent in (Pause(headed(IN_CHUNKS, body=in_chunks(last=b"0\r\n"))),
                   Pause(headed(STREAM_TYPE, IN_CHUNKS, body=EVENT_CHUNKS + b"0\r\nX-Su"))):
        with Script(silent) as server:
            assert run(client_of(server, timeout=600)).is_success()
    assert time.monotonic() - started < 100, "it was waited for the timeout"


def test_what_is_shorter_than_both_of_its_lengths_is_cut_short() -> None:
    cut = HangUp(headed(b"Content-Length: 200", b"Content-Length: 300", body=b"[ "))
    with Script(cut, answer([])) as server:
        assert client_of(server).list_prefabs() == []
    assert len(server.received) == 2
    error = error_of(run, cut)
    assert type(error) is ServiceUnavailableError and error.may_have_run


def test_an_error_with_two_lengths_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_sdk, "_SILENCE_SECONDS", 0.05)
    body = b'{"detail": "no such tool"}'
    lengths = [b"Content-Length: %d" % (len(body) + more) for more in (0, 1)]
    refusal = headed(*lengths, body=body, start=b"HTTP/1.1 400 Bad Request")
    started = time.monotonic()
    with Script(refusal) as server, pytest.raises(GatewayError, match="no such tool"):
        run(client_of(server, timeout=600))
    assert time.monotonic() - started < 100, "it was waited for the timeout"


# Event streams whose connection is not used again, and the data of the events that they have.
DOUBTFUL_STREAMS: dict[str, tuple[bytes, list[Any]]] = {
    "length beside chunks": (
        headed(STREAM_TYPE, LENGTH, IN_CHUNKS, body=EVENT_CHUNKS + LAST_CHUNK), [1, None]),
    "close in a second line": (
        headed(STREAM_TYPE, IN_CHUNKS, b"Connection: keep-alive", b"Connection: close",
               body=EVENT_CHUNKS + LAST_CHUNK), [1, None]),
    "size with 0x behind done": (
        headed(STREAM_TYPE, IN_CHUNKS, body=EVENT_CHUNKS + b"0x0\r\n\r\n"), [1, None]),
    "other bytes behind done": (
        headed(STREAM_TYPE, IN_CHUNKS, body=EVENT_CHUNKS[:-2] + b"XX" + LAST_CHUNK), [1, None]),
    "two lengths": (
        headed(STREAM_TYPE, b"Content-Length: 5, 6", body=event("content", 1) + event("done")),
        [1, None]),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBTFUL_STREAMS)
def test_a_stream_is_handed_over_but_its_doubtful_connection_is_not_used_again(name: str) -> None:
    given, told = DOUBTFUL_STREAMS[name]
    with Script(given, ran("second")) as server:
        client = client_of(server, max_retries=0)
        stream = run(client, stream=True, timeout=0.2)
        assert [received.data for received in stream] == told
        assert run(client).get_function_result() == "second"
    assert [received.connection for received in server.received] == [0, 1]


@pytest.mark.parametrize("name", [name for name in BROKEN_ANSWERS if " times " in name])
def test_a_hundred_interim_answers_are_too_many(name: str) -> None:
    error = error_of(run, BROKEN_ANSWERS[name])
    assert type(error) is ServiceUnavailableError and error.may_have_run


# The head of an answer that can have no body, and whether its connection is used again.
BODILESS: dict[str, tuple[bytes, bool]] = {
    "204": (b"204 No Content\r\n\r\n", True),
    "204 with a length of none": (b"204 No Content\r\nContent-Length: 0\r\n\r\n", True),
    "204 with a length": (b"204 No Content\r\nContent-Length: 5\r\n\r\n", False),
    "204 with chunks": (b"204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", False),
    "204 with a length behind others": (b"204 On\r\nX : 1\r\nContent-Length: 5\r\n\r\n", False),
    "204 with two lengths": (b"204 On\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\n", False),
    "304 with a length": (b"304 Not Modified\r\nContent-Length: 5\r\n\r\n", False),
    "304 with chunks": (b"304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", False),
}  # fmt: skip


@pytest.mark.parametrize("name", BODILESS)
def test_a_body_that_comes_late_behind_204_or_304_is_never_the_next_calls_answer(name: str) -> None:
    head, kept = BODILESS[name]
    with Script(b"HTTP/1.1 " + head, ran("second")) as server:
        client = client_of(server, max_retries=0)
        with pytest.raises(GatewayError) if b"304" in head else contextlib.nullcontext():
            client.delete_secret("p", "KEY")
        assert run(client).get_function_result() == "second"
    assert [received.connection for received in server.received] == [0, 0 if kept else 1]


@pytest.mark.parametrize(
    "lines",
    [[b"X: " + b"x" * 1000] * 80, [b"X: 1"] * 15_000, [b"x" * 1000] * 80, [b"X: " + b"x" * 80_000]],
    ids=["80 long fields", "15,000 short ones", "80 odd lines", "one"],
)  # fmt: skip
def test_a_head_of_more_than_64_kib_is_an_error(lines: list[bytes]) -> None:
    with Script(headed(*lines, LENGTH), ran("second")) as server:
        client = client_of(server, max_retries=0)
        with pytest.raises(ServiceUnavailableError) as caught:
            run(client)
        assert caught.value.may_have_run and len(str(caught.value)) < 1000
        assert run(client).get_function_result() == "second"


@pytest.mark.parametrize("stream", [False, True], ids=["result", "stream"])
def test_the_body_of_an_error_is_not_waited_for_without_end(stream: bool) -> None:
    """Each of its bytes comes in time, but there is always one more."""
    hung_up: list[bool] = []

    def drip(sock: socket.socket) -> None:
        sock.settimeout(0.02)
        for _ in range(int(WAIT_SECONDS / 0.02)):
            try:
                sock.sendall(chunk(b"x"))
                hung_up.append(sock.recv(1) == b"")
            except socket.timeout:
                continue
            except OSError:
                hung_up.append(True)
            return

    given = Steps((send(headed(IN_CHUNKS, body=b"", start=b"HTTP/1.1 500 Oops")), drip))
    with Script(given) as server, pytest.raises(ServiceUnavailableError) as caught:
        run(client_of(server), stream=stream, timeout=0.2)
    assert caught.value.status_code == 500 and "xxx" in str(caught.value) and hung_up == [True]


@pytest.mark.parametrize(
    "sent",
    [b"x" * 60_000 + b"\r\n\r\n", b"<html>" * 20_000, b"\x16\x03\x01\x02" * 15_000 + b"\n",
     b"RTSP/1.0 200 " + b"x" * 60_000 + b"\r\n\r\n", b"HTTP/1.1 " + b"2" * 60_000 + b"\r\n\r\n",
     headed(IN_CHUNKS, body=b"x" * 60_000 + b"\r\n\r\n"),
     headed(b"Content-Length: " + b"9" * 60_000)],
    ids=["a line", "no line", "bytes", "another protocol", "status", "chunk size", "length"],
)  # fmt: skip
def test_what_is_not_http_makes_a_short_message(sent: bytes) -> None:
    error = error_of(run, HangUp(sent))
    assert type(error) is ServiceUnavailableError and error.may_have_run
    assert len(str(error)) < 1000 and len(text_of(error)) < 20_000


def half_a_record(
    certificate: Path, cut: int, lying: threading.Event
) -> Callable[[socket.socket], None]:
    """Answers a call over TLS and begins a record, the end of which waits for another request."""

    def serve(sock: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = tls_context(certificate).wrap_bio(incoming, outgoing, server_side=True)

        def exchange(act: Callable[[], Any]) -> Any:
            while True:
                try:
                    return act()
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    received = sock.recv(65536)
                    if not received:
                        raise OSError from None
                    incoming.write(received)

        exchange(tls.do_handshake)
        exchange(lambda: tls.read(65536))
        tls.write(ran("second" if lying.is_set() else "first"))
        given = outgoing.read()
        tls.write(ran("stray"))
        record = outgoing.read()
        sock.sendall(given + record[:cut])
        lying.set()
        exchange(lambda: tls.read(65536))
        sock.sendall(record[cut:])

    return serve


@pytest.mark.parametrize("cut", [1, 5, 30, -1])
def test_half_a_tls_record_is_never_the_beginning_of_the_next_calls_answer(
    cut: int, certificate: Path, trusting: ssl.SSLContext
) -> None:
    lying = threading.Event()
    with Raw(half_a_record(certificate, cut, lying)) as server:
        url = f"https://localhost:{server.port}"
        client = GatewayClient(url, ssl_context=trusting, timeout=WAIT_SECONDS, max_retries=0)
        assert run(client).get_function_result() == "first"
        assert lying.wait(WAIT_SECONDS) and run(client).get_function_result() == "second"
        assert server.connections == 2
        client.close()


def test_a_5xx_whose_connection_dies_unannounced_costs_no_other_call_of_a_batch() -> None:
    def die(sock: socket.socket) -> None:
        sock.recv(65536)  # the next request, if there is one, is never answered
        raise OSError

    bad = Steps(
        (send(answer(body=b"Internal Server Error", status=500, Content_Type="text/plain")), die)
    )
    with Script(*[bad if number % 20 == 7 else ran(number) for number in range(100)]) as server:
        batch = client_of(server).run_batch([call(number) for number in range(100)])
    assert [result.exception.status_code for result in batch.get_failed() if result.exception] == [
        500
    ] * 5
    assert len(batch.get_failed()) == 5 and len(server.received) == 100


@pytest.mark.parametrize(("variable", "login"),
                         [("HTTP_PROXY", ""), ("http_proxy", "user:p%40ss@")])
def test_http_goes_through_the_proxy(variable: str, login: str, monkeypatch: Patch) -> None:
    with Script(ran(), ran()) as proxy:
        monkeypatch.setenv(variable, f"http://{login}127.0.0.1:{proxy.port}")
        client = GatewayClient("http://gateway.invalid:8080/x", internal_token=TOKEN)
        assert run(client).is_success() and run(client).is_success()
    received = proxy.received[1]
    assert received.target == "http://gateway.invalid:8080/x/v1/internal/run"
    assert received.headers["host"] == "gateway.invalid:8080"
    sent = received.headers.get("proxy-authorization")
    assert sent == ("Basic " + base64.b64encode(b"user:p@ss").decode() if login else None)
    assert proxy.connections == 1


@pytest.mark.parametrize("no_proxy", ["127.0.0.1", "*", "x.example, 127.0.0.1"])
def test_no_proxy_is_honoured(no_proxy: str, monkeypatch: Patch) -> None:
    with Script() as proxy, Script(ran()) as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", no_proxy)
        assert run(client_of(server)).is_success()
    assert not proxy.connections


def test_https_goes_through_a_tunnel(
    certificate: Path, trusting: ssl.SSLContext, monkeypatch: Patch
) -> None:
    inside: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        with tls_context(certificate).wrap_socket(sock.dup(), server_side=True) as tls:
            inside.append(tls.recv(65536))
            tls.sendall(ran())
            tls.recv(1)

    with Script(Steps((send(b"HTTP/1.1 200 Connected\r\n\r\n"), serve))) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:p%40ss@127.0.0.1:{proxy.port}")
        with GatewayClient("https://localhost:9", api_key="key-1", ssl_context=trusting) as client:
            assert run(client).is_success()
    (connect,) = proxy.received
    assert connect[:2] == ("CONNECT", "localhost:9") and "x-api-key" not in connect.headers
    assert (
        connect.headers["proxy-authorization"] == "Basic " + base64.b64encode(b"user:p@ss").decode()
    )
    assert b"proxy-auth" not in inside[0].lower() and inside[0].startswith(b"POST /v1/run HTTP/1.1")


# What a proxy answers to CONNECT.
TUNNEL_HEADS: dict[str, bytes] = {
    "odd lines": headed(b"X-Proxy : 1", b"no colon", b"X: 1", b" two", body=b""),
    "101 fields": headed(*[b"X: 1"] * 101, body=b""),
    "length": headed(b"Content-Length: 5", body=b""),
    "two lengths and chunks": headed(b"Content-Length: 5, 6", IN_CHUNKS, body=b""),
    "interim answers first": CONTINUE + HINTS + headed(body=b""),
    "no reason": headed(start=b"HTTP/1.0 200", body=b""),
}


@pytest.mark.parametrize("name", TUNNEL_HEADS)
def test_what_a_proxy_says_beside_its_yes_costs_no_tunnel(
    name: str, certificate: Path, trusting: ssl.SSLContext, monkeypatch: Patch
) -> None:
    def serve(sock: socket.socket) -> None:
        with tls_context(certificate).wrap_socket(sock.dup(), server_side=True) as tls:
            tls.recv(65536)
            tls.sendall(ran())
            tls.recv(1)

    with Script(Steps((send(TUNNEL_HEADS[name]), serve))) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        client = GatewayClient("https://localhost:9", ssl_context=trusting, timeout=3)
        assert run(client).is_success()
        client.close()


def test_a_tunnel_to_an_ipv6_address_has_its_brackets(monkeypatch: Patch) -> None:
    with Script(answer(status=502)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(ServiceUnavailableError):
            run(GatewayClient("https://[fd00::1]:8443", max_retries=0))
    (connect,) = proxy.received
    assert connect[:2] == ("CONNECT", "[fd00::1]:8443")
    assert connect.headers.get("host", "[fd00::1]:8443") == "[fd00::1]:8443"


@pytest.mark.parametrize(
    ("proxy", "said"),
    [("socks5://user:hush@proxy.example:1080", "(?i)http_proxy"),
     ("http://user:hush/hush@proxy.example:1080", "(?i)http_proxy.*percent-encoded"),
     ("http://user:hush%2Dhush@127.0.0.1:{repeating}", "who is"),
     ("http://user:hush@{refusing}", "gateway.invalid through the proxy {refusing}")],
)  # fmt: skip
def test_an_error_of_the_proxy_names_it_without_its_password(
    proxy: str, said: str, refusing: str, monkeypatch: Patch
) -> None:
    login = base64.b64encode(b"user:hush-hush").decode()
    with Script(answer({"detail": f"who is user:hush-hush, {login}?"}, 407)) as repeating:
        places = {"repeating": repeating.port, "refusing": refusing}
        monkeypatch.setenv("HTTP_PROXY", proxy.format(**places))
        with pytest.raises(GatewayError, match=said.format(**places)) as caught:
            run(GatewayClient("http://gateway.invalid"))
    assert "hush" not in all_of(caught.value) and login not in all_of(caught.value)


@pytest.mark.parametrize(
    ("variables", "secure"),
    [({"ALL_PROXY": "http://{proxy}"}, False), ({"all_proxy": "http://{proxy}"}, False),
     ({"ALL_PROXY": "{proxy}"}, False), ({"ALL_PROXY": "http://user:p%40ss@{proxy}"}, False),
     ({"ALL_PROXY": "http://{proxy}"}, True), ({"all_proxy": "http://{proxy}"}, True),
     ({"HTTP_PROXY": "http://{proxy}", "ALL_PROXY": "http://{other}"}, False),
     ({"HTTPS_PROXY": "http://{other}", "ALL_PROXY": "http://{proxy}"}, False),
     ({"HTTPS_PROXY": "http://{proxy}", "ALL_PROXY": "http://{other}"}, True),
     ({"ALL_PROXY": "http://{proxy}", "NO_PROXY": "else.invalid"}, False)],
    ids=str,
)  # fmt: skip
def test_all_proxy_counts_where_the_scheme_has_no_proxy_of_its_own(
    variables: dict[str, str], secure: bool, monkeypatch: Patch
) -> None:
    given = answer({"detail": "no tunnel"}, 403) if secure else ran("through the proxy")
    with Script(given) as proxy, Script() as other:
        for name, value in variables.items():
            places = {"proxy": f"127.0.0.1:{proxy.port}", "other": f"127.0.0.1:{other.port}"}
            monkeypatch.setenv(name, value.format(**places))
        client = GatewayClient(f"http{'s' * secure}://gateway.invalid", max_retries=0)
        with pytest.raises(GatewayError) if secure else contextlib.nullcontext():
            assert run(client).get_function_result() == "through the proxy"
    (received,) = proxy.received
    assert received.method == ("CONNECT" if secure else "POST") and not other.connections
    login = "Basic " + base64.b64encode(b"user:p@ss").decode() if "@" in str(variables) else None
    assert received.headers.get("proxy-authorization") == login


# Hosts that are asked for, and a NO_PROXY with which they are asked straight.
STRAIGHT = [
    *(("127.0.0.1", value) for value in (
        "127.0.0.1", "127.0.0.0/8", "127.0.0.1/32", "10.0.0.0/8,127.0.0.0/8", "0.0.0.0/0",
        " x.example , 127.0.0.0/8 ,", "127.0.0.1:{port}", "*")),
    *(("[::1]", value) for value in (
        "[::1]", "::1", "::1/128", "[::1]:{port}", "::/0", "0:0:0:0:0:0:0:1", "1.0.0.0/8, [::1]",
        "*")),
    *(("api.example.invalid", value) for value in (
        "api.example.invalid", "example.invalid", ".example.invalid", "API.Example.Invalid",
        "invalid", "api.example.invalid:{port}", "x, .example.invalid,", "*")),
    *(("api.example.invalid.", value) for value in ("api.example.invalid", ".example.invalid")),
]  # fmt: skip
# The same, with which they are asked through the proxy.
THROUGH = [
    *(("127.0.0.1", value) for value in (
        "", ",", "10.0.0.0/8", "128.0.0.0/1", "127.0.0.1:1", "127.0.0.1/99", "127.0.0.0/x",
        "127.0.0.0/", "/8", "/", "7.0.0.1", ".0.0.1", "::1", "::/0", "[::1]", "[", "]", "[]",
        "\u4f60", "1.2.3.4.5/8")),
    *(("[::1]", value) for value in (
        "127.0.0.1", "0.0.0.0/0", "fe80::/10", "[::1]:1", "::2", "[::2]", "::1/129", "1")),
    *(("api.example.invalid", value) for value in (
        "ple.invalid", "other.invalid", "api.example", "api.example.invalid:1",
        "x.api.example.invalid", "10.0.0.0/8", "::/0")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("host", "no_proxy", "straight"),
    [*((*row, True) for row in STRAIGHT), *((*row, False) for row in THROUGH)],
)
def test_no_proxy_takes_names_suffixes_addresses_and_networks(
    host: str, no_proxy: str, straight: bool, monkeypatch: Patch
) -> None:
    try:
        server = Script(ran("straight"), host="::1" if host == "[::1]" else "127.0.0.1")
    except OSError:
        pytest.skip("no IPv6 here")
    with server, Script(ran("proxy")) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", no_proxy.format(port=server.port))
        client = GatewayClient(f"http://{host}:{server.port}", max_retries=0, timeout=WAIT_SECONDS)
        with contextlib.suppress(ServiceUnavailableError):  # such a name leads nowhere
            assert run(client).get_function_result() == ("straight" if straight else "proxy")
    assert proxy.connections == (0 if straight else 1)
    assert server.connections == (1 if straight and "invalid" not in host else 0)


# What is no proxy for us, and what reading it as a URL may stumble over.
NO_PROXIES = [
    "socks5://user:hush@proxy.example:1080", "socks5h://user:hush@proxy.example",
    "SOCKS4://hush@proxy.example", "https://user:hush@proxy.example",
    "ftp://user:hush@proxy.example", "http://user:hush@", "http://", "http:///x",
    "http://user:hush@[::1", "http://user:hush@::1]", "http://user:[hush]@proxy.example",
    "http://user:hush@proxy.example:port", "http://user:hush@proxy.example:99999",
    "http://user:hush@proxy.example:-1", "http://user:hush\u2100@proxy.example",
    "http://user:hush@proxy.example\u2100", "http://user:hush/hush@proxy.example",
    "http://user:hush#hush@proxy.example", "http://user:hush?hush@proxy.example",
    "http://user:hush@pro xy.example", "user:hush@[proxy", "http://hush:12345#6@proxy.example",
    "http://hush:12345/6@proxy.example", "http://hush:12345?6@proxy.example",
    f"http://user:hush@{'p' * 70}.example",
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("proxy", NO_PROXIES, ids=ascii)
def test_a_proxy_that_cannot_be_used_is_an_error_that_names_the_variable_alone(
    proxy: str, scheme: str, monkeypatch: Patch
) -> None:
    for variable in (f"{scheme.upper()}_PROXY", "ALL_PROXY", "all_proxy"):
        with monkeypatch.context() as patched:
            patched.setenv(variable, proxy)
            client = GatewayClient(f"{scheme}://gateway.invalid", max_retries=0)
            for act in (run, lambda c: c.list_prefabs(), lambda c: run(c, stream=True)):
                with pytest.raises(GatewayError, match=f"(?i){variable}") as caught:
                    act(client)
                assert "hush" not in all_of(caught.value) and not caught.value.may_have_run


def test_a_proxy_that_cannot_be_used_harms_nobody_who_is_not_to_use_it(monkeypatch: Patch) -> None:
    with Script(ran(), ran()) as server:
        monkeypatch.setenv("HTTPS_PROXY", "socks5://proxy.example")
        assert run(client_of(server)).is_success()
        monkeypatch.setenv("ALL_PROXY", "socks5://proxy.example")
        monkeypatch.setenv("NO_PROXY", "127.0.0.0/8")
        assert run(client_of(server)).is_success()


@pytest.mark.parametrize("url", [
    "https://evil%0d%0aX-Injected%3a%20yes%0d%0aX/",
    "https://[fe80::1%0aX-Injected:yes]/", "https://evil%20host/", "https://evil%00/",
])
@pytest.mark.parametrize("place", ["link", "redirect"])
def test_no_url_puts_a_line_into_what_a_proxy_is_asked(
    url: str, place: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    answers = [LINK, moved(url)] if place == "redirect" else [answer({"presigned_url": url})]
    with Script() as proxy, Script(*answers) as server:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(GatewayError, match="not an? "):
            client_of(server, max_retries=0).download_file(S3, tmp_path / "f")
    assert not proxy.connections


# What a proxy answers, or the gateway behind it: the error cannot tell.
PROXIED: dict[str, tuple[Callable[[GatewayClient], Any], Answer]] = {
    **{f"{status}": (run, answer({"detail": "no"}, status))
       for status in (400, 401, 403, 404, 407, 422, 429, 503)},
    "no such route": (run, answer({"detail": "Not Found"}, 404)),
    "page": (run, answer(body=b"<html>blocked</html>", status=403, Content_Type="text/html")),
    "bad gateway": (
        lambda c: c.list_prefabs(), answer(body=b"<html>Bad Gateway</html>", status=502)),
    "of a stream": (lambda c: run(c, stream=True), answer(body=b"", status=504)),
    "of an upload": (lambda c: c.upload_file(ROOT / "LICENSE"), answer(body=b"", status=413)),
    "of a batch": (
        lambda c: values_of(c.run_batch([call(), call()])), answer(body=b"", status=503)),
    "redirect": (run, moved("http://login.example/")),
    "hang-up": (run, HangUp()),
    "hang-up in the answer": (run, HangUp(ran()[:-3])),
    "timeout": (lambda c: run(c, timeout=SHORT_SECONDS), Pause()),
    "not HTTP": (run, HangUp(b"220 ftp.example ready\r\n")),
}  # fmt: skip


@pytest.mark.parametrize("name", PROXIED)
def test_a_failure_through_a_proxy_names_it_and_no_proxy(name: str, monkeypatch: Patch) -> None:
    act, given = PROXIED[name]
    with Script(given, given) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://user:hush@127.0.0.1:{proxy.port}")
        with pytest.raises(GatewayError, match="NO_PROXY") as caught:
            act(GatewayClient("http://gateway.invalid", max_retries=0, timeout=WAIT_SECONDS))
    assert f"127.0.0.1:{proxy.port}" in str(caught.value) and "hush" not in all_of(caught.value)
    monkeypatch.delenv("HTTP_PROXY")
    error = error_of(act, given, given)
    assert "NO_PROXY" not in str(error) and "proxy" not in str(error)


@pytest.mark.parametrize("status", [403, 407, 502])
def test_a_tunnel_that_fails_names_the_proxy_and_no_proxy(
    status: int, refusing: str, monkeypatch: Patch
) -> None:
    with Script(answer({"detail": "no"}, status)) as proxy:
        for address in (f"127.0.0.1:{proxy.port}", refusing):
            monkeypatch.setenv("HTTPS_PROXY", f"http://user:hush@{address}")
            with pytest.raises(ServiceUnavailableError, match="NO_PROXY") as caught:
                run(GatewayClient("https://gateway.invalid", max_retries=0))
            assert address in str(caught.value) and "hush" not in all_of(caught.value)
            assert not caught.value.may_have_run


@pytest.mark.parametrize("name", ["download_file", "upload_input_file"])
def test_a_failure_of_the_storage_through_a_proxy_names_it_too(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    url = "http://storage.invalid/o?X-Sig=1"
    given = answer({"presigned_url": url, "upload_url": url, "s3_url": S3})
    arguments = [S3, tmp_path / "f"] if name == "download_file" else [ROOT / "LICENSE"]
    with Script(answer(body=b"blocked", status=403)) as proxy, Script(given) as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with pytest.raises(GatewayError, match="NO_PROXY") as caught:
            getattr(client_of(server, max_retries=0), name)(*arguments)
    assert f"127.0.0.1:{proxy.port}" in str(caught.value)


@pytest.mark.parametrize("reused", [False, True], ids=["first request", "on its connection"])
@pytest.mark.parametrize("act", [run, lambda c: run(c, stream=True), lambda c: c.list_prefabs()],
                         ids=["run", "stream", "GET"])  # fmt: skip
def test_the_login_of_a_proxy_is_hidden_on_a_connection_that_is_used_again_too(
    act: Any, reused: bool, monkeypatch: Patch
) -> None:
    login = base64.b64encode(b"user:hush/hush-hush").decode()
    echo = f"who is user:hush/hush-hush, user:hush%2Fhush-hush, Basic {login}?"
    refused = answer({"detail": {"message": echo, "given": [echo]}}, 407)
    with Script(*[ran()] * reused, refused) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://user:hush%2Fhush-hush@127.0.0.1:{proxy.port}")
        client = GatewayClient("http://gateway.invalid", max_retries=0)
        if reused:
            run(client)
        with pytest.raises(GatewayError, match="who is") as caught:
            act(client)
    assert "hush" not in all_of(caught.value) and login not in all_of(caught.value)
    assert proxy.connections == 1


def test_a_host_with_a_dot_at_its_end_has_the_certificate_of_the_host(
    certificate: Path, trusting: ssl.SSLContext, monkeypatch: Patch
) -> None:
    """The proxy leads to it, as not every machine finds `localhost.` by itself."""
    asked: list[Any] = []
    context = tls_context(certificate)
    context.sni_callback = lambda _socket, name, _context: asked.append(name)

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock.dup(), server_side=True) as tls:
            tls.recv(65536)
            tls.sendall(ran())
            tls.recv(1)

    with Script(Steps((send(b"HTTP/1.1 200 Connected\r\n\r\n"), serve))) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with GatewayClient("https://localhost.:9", ssl_context=trusting, max_retries=0) as client:
            assert run(client).is_success()
    assert asked == ["localhost"]


@pytest.mark.parametrize("place", ["missing/folder/keys.log", "."])
def test_a_place_for_tls_keys_that_cannot_be_written_costs_no_call_or_is_named(
    place: str, certificate: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with TlsScript(certificate, ran("it works")) as server:
        monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / place))
        try:
            outcome = run(GatewayClient(server.url, max_retries=0)).get_function_result()
        except GatewayError as error:
            outcome = str(error)
            assert not error.may_have_run and "base_url" not in outcome
    assert outcome == "it works" or "SSLKEYLOGFILE" in outcome


OUT_OF_FILES = """if True:
    import os, resource, ssl, sys, urllib.request, gateway_sdk
    context = ssl.create_default_context(cafile=sys.argv[1])
    options = {"max_retries": 0, "ssl_context": context}
    clients = [gateway_sdk.GatewayClient(url, **options) for url in sys.argv[2:]]
    for client in clients:
        assert client.list_prefabs() == []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    while True:
        try:
            os.open(os.devnull, os.O_RDONLY)
        except OSError:
            break
    for client in clients:
        try:
            client.list_prefabs()
        except gateway_sdk.GatewayError as error:
            print(error.may_have_run, " ".join(str(error).split()))
"""


# PyPy does not tell why an address could not be looked up.
@cpython_only
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of open files")
def test_too_many_open_files_are_no_matter_of_base_url(certificate: Path) -> None:
    closing = answer([], Connection="close")
    with Script(closing, closing) as plain, TlsScript(certificate, closing) as secure:
        urls = (plain.url, "http://gateway.invalid", secure.url)
        done = python(OUT_OF_FILES, certificate, *urls, HTTP_PROXY=plain.url, NO_PROXY="127.0.0.1")
    assert done.stderr == ""
    failed = done.stdout.splitlines()
    assert len(failed) == 3
    for line in failed:
        assert line.startswith("False ") and "open files" in line
        assert "base_url" not in line and "gateway run?" not in line


# What stands for `socket.socket` in programs that replace it, as seen from outside.
REPLACED_SOCKETS = """
import socket
real = socket.socket

class Green:
    def __init__(self, family=-1, type=-1, proto=-1, fileno=None):
        self._fd = real(family, type, proto, fileno)

    def __getattr__(self, name):
        return getattr(self._fd, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def makefile(self, mode="r", BUFFERING=-1):
        return self._fd.makefile(mode, BUFFERING)

socket.socket = socket.SocketType = Green
"""
WORLDS = {
    "like eventlet": REPLACED_SOCKETS.replace("BUFFERING", "buffering"),
    "like httpretty": REPLACED_SOCKETS.replace("BUFFERING", "bufsize"),
    "eventlet": "import eventlet; eventlet.monkey_patch()",
    "gevent": "from gevent import monkey; monkey.patch_all()",
}
IN_ANY_WORLD = """
import json, sys, gateway_sdk
outcomes = []

def outcome(act):
    try:
        outcomes.append(act())
    except gateway_sdk.GatewayError as error:
        outcomes.append([type(error).__name__, error.status_code])

def leave_a_stream(end):
    stream = client.run("p", "1", "f", stream=True)
    first = next(stream).data
    end(stream)
    return first

def run(**options):
    return client.run("p", "1", "f", {}, **options).get_function_result()

gateway_sdk._BACKOFF_BASE_SECONDS = 0.001
client = gateway_sdk.GatewayClient(sys.argv[1], timeout=10)
outcome(run)
outcome(run)
outcome(run)
outcome(lambda: run(timeout=0.2))
outcome(client.list_prefabs)
outcome(lambda: leave_a_stream(gateway_sdk.EventStream.close))
outcome(lambda: leave_a_stream(list))
outcome(run)
calls = [gateway_sdk.PrefabCall("p", "1", "f")] * 3
outcome(lambda: [result.get_function_result() for result in client.run_batch(calls).results])
client.close()
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("world", WORLDS)
def test_replaced_sockets_serve_as_well(world: str) -> None:
    if world in ("eventlet", "gevent"):
        pytest.importorskip(world)
    quiet = "import warnings; warnings.simplefilter('ignore')"
    answers = [
        ran("one"), ran("two"), answer({"detail": "no"}, 500), Pause(), UNAVAILABLE, answer([]),
        Pause(HEAD + chunk(event("content", "a"))), HangUp(HEAD + chunk(event("content", "b"))),
        HangUp(), *[ran("batch")] * 3,
    ]  # fmt: skip
    with Script(*answers) as server:
        done = python(f"{quiet}\n{WORLDS[world]}\n{IN_ANY_WORLD}", server.url, NO_PROXY="*")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [
        "one", "two", ["ServiceUnavailableError", 500], ["GatewayTimeoutError", None], [], "a",
        ["ServiceUnavailableError", None], ["ServiceUnavailableError", None], ["batch"] * 3,
    ]  # fmt: skip
    assert len(server.received) == len(answers)


# Pyodide has the module, but a connection is refused, or seems to come about and takes no byte.
NO_SOCKETS = """if True:
    import http.client, socket, sys, time, urllib.request
    time.sleep = lambda seconds: None

    def fail(*_):
        raise BlockingIOError(26, "Operation in progress")

    class Socket(socket.socket):
        def connect(self, address):
            if refused:
                fail()
            self.send = self.sendall = self.recv = self.recv_into = fail

    socket.socket = Socket
    sys.platform = "emscripten"
    import gateway_sdk
    client = gateway_sdk.GatewayClient("http://127.0.0.1:1", max_retries=0)
    calls = [gateway_sdk.PrefabCall("p", "1", "f")]
    for refused in (True, False):
        for act in (
            lambda: client.run("p", "1", "f"), lambda: client.run("p", "1", "f", stream=True),
            lambda: client.list_prefabs(), lambda: client.upload_file(gateway_sdk.__file__),
            lambda: client.run_batch(calls, single_request=True),
            lambda: gateway_sdk.GatewayClient.from_api_key("k", client.base_url, max_retries=0),
        ):
            try:
                act()
            except gateway_sdk.GatewayError as error:
                print(error.may_have_run, "socket" in str(error), "may have run" in str(error))
"""


def test_in_a_browser_it_is_said_that_there_are_no_sockets() -> None:
    done = python(NO_SOCKETS)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["False True False"] * 12


def test_a_wrong_certificate_is_told_in_the_words_of_the_shell_too(certificate: Path) -> None:
    with TlsScript(certificate) as server, pytest.raises(ServiceUnavailableError) as caught:
        GatewayClient(server.url).list_prefabs()
    assert "ssl_context=" in str(caught.value) and "SSL_CERT_FILE" in caught.value._in_shell()
    assert not re.search(PYTHON_ADVICE, caught.value._in_shell())


def test_https_uses_the_given_ssl_context(certificate: Path, tmp_path: Path) -> None:
    (tmp_path / "f.bin").write_bytes(os.urandom(700_000))
    answers = [ran(), answer({"s3_url": S3}), chunked(event("done")), ran()]
    with TlsScript(certificate, *answers) as server, client_of(server) as client:
        assert run(client).is_success()
        client.upload_file(tmp_path / "f.bin")
        assert [e.type for e in run(client, stream=True)] == ["done"]
        assert run(client).is_success()
    assert server.connections == 1
    assert (tmp_path / "f.bin").read_bytes() in server.received[1].body


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"], ids=["not trusted", "another name"])
def test_a_wrong_certificate_is_an_error_with_a_remedy_and_nothing_is_sent(
    host: str, certificate: Path, trusting: ssl.SSLContext, delays: list[float]
) -> None:
    context = trusting if host == "127.0.0.1" else None
    with TlsScript(certificate, ran()) as server, pytest.raises(ServiceUnavailableError) as caught:
        GatewayClient(f"https://{host}:{server.port}", ssl_context=context).list_prefabs()
    assert re.search("(?i)certificate", str(caught.value)) and caught.value.status_code is None
    assert "ssl_context" in str(caught.value) and "SSL_CERT_FILE" in str(caught.value)
    assert server.connections == 1
    assert not delays
    assert not server.received
    assert not caught.value.may_have_run


def refusing_clients(certificate: Path, version: str, *, lingers: bool = True) -> Raw:
    """A server that wants a certificate of its client, and knows none that would do."""
    context = tls_context(certificate)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    context.verify_mode = ssl.CERT_REQUIRED

    def serve(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            context.wrap_socket(sock.dup(), server_side=True)
        # What is left unread at an end would make it a reset, which may overtake the reason for it.
        while lingers and sock.recv(65536):
            pass

    server = Raw(serve)
    server.url = f"https://localhost:{server.port}"
    return server


# With TLS 1.3 the client learns of it when it waits for the answer.
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("shown", [False, True], ids=["no certificate", "an unknown certificate"])
@pytest.mark.parametrize(
    "act",
    [run, lambda c: c.list_prefabs(), lambda c: run(c, stream=True),
     lambda c: c.upload_file(__file__)],
    ids=["call", "GET", "stream", "upload"],
)  # fmt: skip
def test_a_server_that_refuses_the_clients_certificate_has_run_nothing(
    act: Any, shown: bool, version: str, certificate: Path, trusting: ssl.SSLContext, delays: Any
) -> None:
    if shown:
        trusting.load_cert_chain(str(certificate))
    with refusing_clients(certificate, version) as server:
        with client_of(server, ssl_context=trusting, max_retries=2) as client:
            with pytest.raises(ServiceUnavailableError, match="ssl_context") as caught:
                act(client)
    assert server.connections == 1 and not delays
    assert not caught.value.may_have_run and "may have run" not in str(caught.value)
    assert "http://" not in str(caught.value)


def test_a_refused_certificate_is_told_also_where_sending_broke_off(
    certificate: Path, trusting: ssl.SSLContext
) -> None:
    with refusing_clients(certificate, "TLSv1_3", lingers=False) as server:
        with client_of(server, ssl_context=trusting, max_retries=0) as client:
            with pytest.raises(ServiceUnavailableError, match="ssl_context") as caught:
                client.run("p", "1", "f", {"large": "x" * 10_000_000})
    assert not caught.value.may_have_run


def test_a_batch_that_is_refused_for_its_certificate_has_run_nothing(
    certificate: Path, trusting: ssl.SSLContext, delays: list[float]
) -> None:
    with refusing_clients(certificate, "TLSv1_3") as server:
        with client_of(server, ssl_context=trusting, max_retries=2) as client:
            batch = client.run_batch([call(), call()])
    assert server.connections == 2 and not delays
    for result in batch.results:
        assert result.exception and "ssl_context" in str(result.exception)
        assert not result.exception.may_have_run


def test_a_certificate_that_the_server_knows_opens_it(
    certificate: Path, trusting: ssl.SSLContext
) -> None:
    trusting.load_cert_chain(str(certificate))
    with TlsScript(certificate, ran()) as server, client_of(server, ssl_context=trusting) as client:
        server._context.load_verify_locations(str(certificate))
        server._context.verify_mode = ssl.CERT_REQUIRED
        assert run(client).is_success()


@pytest.mark.parametrize(
    "end", [HangUp(), HangUp(reset=True), HangUp(OK)], ids=["hang-up", "reset", "half a head"]
)
def test_an_answer_that_is_lost_over_tls_may_have_run_all_the_same(
    end: Answer, certificate: Path
) -> None:
    with TlsScript(certificate, end) as server, client_of(server) as client:
        with pytest.raises(ServiceUnavailableError, match="may have run") as caught:
            run(client)
    assert caught.value.may_have_run and len(server.received) == 1
    assert "ssl_context" not in str(caught.value)


@pytest.mark.parametrize(("given", "connections"), [
    (answer({"detail": "what?"}, 400, Connection="close"), 1), (b"", 3),
], ids=["the server speaks http", "the server hangs up"])
def test_https_to_an_http_port_is_told_and_not_tried_again_unlike_a_lost_connection(
    given: bytes, connections: int, delays: list[float]
) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(65536)  # the greeting
        sock.sendall(given)

    with Raw(serve) as server, pytest.raises(ServiceUnavailableError) as caught:
        run(GatewayClient(f"https://127.0.0.1:{server.port}"))
    assert ("must begin with http://" in str(caught.value)) == (given != b"")
    assert (server.connections, len(delays)) == (connections, connections - 1)
    assert not caught.value.may_have_run


class Place:
    """An address that refuses connections, or lets them wait for ever, until it is opened."""

    def __init__(self, dead: bool = False) -> None:
        self._bound = socket.socket()
        self._bound.bind(("127.0.0.1", 0))
        self.address = self._bound.getsockname()
        self._waiting: list[socket.socket] = []
        # Where one connection waits to be accepted, and no more may, nobody else is answered.
        if dead:
            self._bound.listen(0)
            self._waiting = [socket.socket(), socket.socket()]
        for sock in self._waiting:
            sock.setblocking(False)
            sock.connect_ex(self.address)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (*self._waiting, self._bound):
            sock.close()

    def open(self) -> None:
        """From now on it takes connections, and never says a word."""
        for sock in self._waiting:
            sock.close()
        if self._waiting:
            self._bound.accept()[0].close()
        self._bound.listen(9)


@pytest.fixture
def resolve(monkeypatch: Patch) -> Callable[..., str]:
    """Stands for the resolver: gives a URL of a name that has these addresses, in this order."""
    real = socket.getaddrinfo

    def answer_with(*addresses: tuple[str, int]) -> str:
        def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
            if host not in ("gateway.test", b"gateway.test"):
                return real(host, *arguments, **options)
            kind = socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
            return [(*kind, address) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        return "http://gateway.test:1"

    return answer_with


full_queues = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="there the kernel lets others wait for ever"
)
A_WHILE = WAIT_SECONDS + 2  # a timeout that is too long to be waited


@full_queues
@pytest.mark.parametrize(
    "act",
    [run, lambda c: c.list_prefabs(),
     lambda c: GatewayClient.from_api_key("key-1", c.base_url, timeout=c.timeout)],
    ids=["call", "GET", "exchange"],
)  # fmt: skip
def test_the_timeout_is_for_all_addresses_of_a_host_together(
    act: Any, resolve: Any, delays: list[float]
) -> None:
    with Place(dead=True) as dead:
        url = resolve(*[dead.address] * int(A_WHILE / SHORT_SECONDS))
        started = time.monotonic()
        with GatewayClient(url, timeout=SHORT_SECONDS) as client:
            with pytest.raises(GatewayTimeoutError) as caught:
                act(client)
        assert time.monotonic() - started < WAIT_SECONDS
    assert not delays and not caught.value.may_have_run and "timeout=" in str(caught.value)


@pytest.mark.parametrize("kind", [pytest.param("dead", marks=full_queues), "refusing"])
def test_an_address_that_answered_is_the_first_one_next_time(
    kind: str, resolve: Any, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(gateway_sdk, "_ADDRESS_SECONDS", 2 * SHORT_SECONDS)
    answers = [answer([], Connection="close")] * 2
    with Place(dead=kind == "dead") as first, Script(*answers, *answers) as server:
        started = time.monotonic()
        url = resolve(first.address, ("127.0.0.1", server.port))
        with GatewayClient(url, timeout=A_WHILE) as client:
            assert client.list_prefabs() == []
            first.open()  # who tries it first from now on waits for the whole timeout
            assert client.list_prefabs() == client.list_prefabs() == []
        assert time.monotonic() - started < WAIT_SECONDS
    assert len(server.received) == server.connections == 3


@full_queues
@pytest.mark.parametrize("dead", [1, 2])
def test_of_a_short_timeout_the_last_address_gets_its_share(dead: int, resolve: Any) -> None:
    # Three, for a machine so busy that it does not answer at once.
    with Place(dead=True) as first, Script(*[answer([])] * 3) as server:
        url = resolve(*[first.address] * dead, ("127.0.0.1", server.port))
        assert GatewayClient(url, timeout=4 * SHORT_SECONDS).list_prefabs() == []


def test_if_the_address_that_answered_is_gone_the_others_are_tried(resolve: Any) -> None:
    with Script(*[answer([], Connection="close")] * 2) as other:
        with Place() as first, Script(answer([], Connection="close")) as server:
            places = [first.address, ("127.0.0.1", server.port), ("127.0.0.1", other.port)]
            with GatewayClient(resolve(*places), timeout=WAIT_SECONDS) as client:
                assert client.list_prefabs() == []
                server.__exit__()
                assert client.list_prefabs() == client.list_prefabs() == []
    assert (len(server.received), len(other.received)) == (1, 2)


@full_queues
@pytest.mark.parametrize(
    "order", [("dead", "refusing"), ("refusing", "dead"), ("refusing", "refusing")], ids=str
)
def test_where_no_address_answers_the_end_comes_soon(
    order: tuple[str, str], resolve: Any, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(gateway_sdk, "_ADDRESS_SECONDS", 2 * SHORT_SECONDS)
    with Place(order[0] == "dead") as first, Place(order[1] == "dead") as second:
        # Only for the last one is all of it waited.
        timeout = A_WHILE if order[1] == "refusing" else SHORT_SECONDS
        url = resolve(first.address, second.address)
        started = time.monotonic()
        with GatewayClient(url, timeout=timeout, max_retries=0) as client:
            with pytest.raises(ServiceUnavailableError, match="no connection") as caught:
                run(client)
        assert time.monotonic() - started < WAIT_SECONDS
    assert not caught.value.may_have_run and caught.value.status_code is None


# --- Transport ------------------------------------------------------------------------------------
#
# What is sent again after which fault: see "Faults: every operation meets every fault".


def test_a_retry_opens_a_fresh_connection_though_another_one_is_idle() -> None:
    first = together(2, ran())
    with Script(first, first, HangUp(), answer([])) as server, client_of(server) as client:
        client.run_batch([call(), call()])
        assert client.list_prefabs() == []
    assert server.received[3].connection == 2


@pytest.mark.parametrize(
    ("value", "delay"),
    [("7", 7), ("0", 0), ("60", 60), ("61", None), ("99999999999", None), ("soon", ...),
     ("7 ", 7), ("\t7\t", 7), ("Wed, 21 Oct 2015 07:28:00 GMT \t", 0),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Fri, 31 Dec 9999 23:59:59 GMT", None)],
)  # fmt: skip
def test_retry_after_is_obeyed_up_to_a_minute(value: str, delay: Any, delays: list[float]) -> None:
    with Script(answer(None, 503, Retry_After=value), answer([])) as server:
        with contextlib.suppress(ServiceUnavailableError):
            client_of(server).list_prefabs()
    assert len(server.received) == (1 if delay is None else 2)
    if delay is ...:  # as if there were no such header
        assert len(delays) == 1 and 0 <= delays[0] < 0.01
    else:
        assert delays == ([] if delay is None else [delay])


@pytest.fixture
def real_delays(delays: list[float], monkeypatch: Patch) -> list[float]:
    """As long as users wait, but not waited."""
    monkeypatch.undo()
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(time, "sleep", delays.append)
    return delays


def test_waits_for_a_connection_double_from_one_second_up_to_eight(
    refusing: str, real_delays: list[float]
) -> None:
    client = GatewayClient(f"http://{refusing}", max_retries=1100)  # any number can be asked for
    with pytest.raises(ServiceUnavailableError, match="no connection"):
        run(client)
    assert len(real_delays) == 1100 and 4 < max(real_delays) <= 8 and min(real_delays) < 4
    assert len({*real_delays}) > 1000  # full jitter
    del real_delays[:]
    client = GatewayClient(f"http://{refusing}", max_retries=3)
    for _ in range(40):
        with pytest.raises(ServiceUnavailableError):
            run(client)
    for attempt, cap in enumerate([1, 2, 4]):
        assert cap / 2 < max(real_delays[attempt::3]) <= cap
        # A restart takes its time, and nothing was sent.
        assert min(real_delays[attempt::3]) >= cap / 2


def test_other_waits_double_from_half_a_second_up_to_eight(real_delays: list[float]) -> None:
    with Script(*[UNAVAILABLE] * 40 * 6) as server, client_of(server, max_retries=5) as client:
        for _ in range(40):
            with pytest.raises(ServiceUnavailableError):
                client.list_prefabs()
    for attempt, cap in enumerate([0.5, 1, 2, 4, 8]):
        assert cap / 2 < max(real_delays[attempt::5]) <= cap
        assert min(real_delays[attempt::5]) < cap / 2


def test_a_redirect_is_followed_also_to_another_host_but_not_from_https_to_http(
    certificate: Path, trusting: ssl.SSLContext, tmp_path: Path
) -> None:
    options: Any = {"ssl_context": trusting, "timeout": WAIT_SECONDS}
    with Script() as plain, TlsScript(certificate, moved(plain.url)) as storage:
        with Script(answer({"presigned_url": storage.url + "/o?sig=1"})) as server:
            with (
                client_of(server, **options) as client,
                pytest.raises(GatewayError, match="https to http"),
            ):
                client.download_file(S3, tmp_path / "f")
    assert not plain.connections
    with TlsScript(certificate, answer(body=b"data")) as secure:
        with Script(LINK, moved("else?where"), moved(f"{secure.url}/there?sig=2")) as server:
            with client_of(server, **options) as client:
                client.download_file(S3, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"data"
    assert server.received[2].target == "/bucket/else?where"
    assert secure.received[0].target == "/there?sig=2"
    assert not CREDENTIAL_HEADERS & {*secure.received[0].headers}


@pytest.mark.parametrize(
    ("location", "target"),
    [("/b\u00fccket/\u4f60.bin?sig=\u00e9", "/b%C3%BCcket/%E4%BD%A0.bin?sig=%C3%A9"),
     ("/a%20b/%C3%BC", "/a%20b/%C3%BC"), ("/a b", "/a%20b"),
     ("/a?sig=1 ", "/a?sig=1"), ("\t/a \t", "/a"),
     ("/voil\u00e0", "/voil%C3%A0"), ("/\u5145 ", "/%E5%85%85"),
     ("\r\n /a", "/a"), ("/a\r\n \t", "/a"), ("\r\n\t\r\n /a\r\n ", "/a")],
    ids=["UTF-8", "encoded", "space", "space behind", "tabs around", "A0 at the end",
         "85 at the end", "folded in front", "folded behind", "folded all around"],
)  # fmt: skip
def test_a_redirect_leads_where_its_location_says_also_in_raw_utf_8(
    location: str, target: str, tmp_path: Path
) -> None:
    with Script(LINK, moved(location.encode().decode("latin-1")), answer(body=b"data")) as server:
        client_of(server).download_file(S3, tmp_path / "f")
    assert server.received[2].target == target


def test_the_timeout_is_for_each_wait_and_each_call() -> None:
    with Script(Pause(), Pause(), ran()) as server:
        with pytest.raises(TimeoutError, match=r"0\.05 s"):
            run(client_of(server), timeout=0.05)
        with pytest.raises(GatewayTimeoutError, match="timeout="):
            run(client_of(server, timeout=0.05), timeout=None)
        assert run(client_of(server, timeout=None)).is_success()


def test_an_answer_that_trickles_may_take_longer_than_the_timeout() -> None:
    def trickle(sock: socket.socket) -> None:
        text = ran("ok")
        for start in range(0, len(text), 1 + len(text) // 8):
            sock.sendall(text[start : start + 1 + len(text) // 8])
            never.wait(0.1)

    never = threading.Event()
    with Script(Steps((trickle,))) as server, client_of(server, timeout=0.6) as client:
        assert run(client).get_function_result() == "ok"


def test_each_request_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "gateway_sdk")
    with Script(UNAVAILABLE, PAGE, ran(), HangUp()) as server:
        client = client_of(server)
        client.list_files(continuation_token="page-2")
        run(client)
        with pytest.raises(ServiceUnavailableError):
            run(client)
    assert {(record.levelname, record.name) for record in caplog.records} == {
        ("DEBUG", "gateway_sdk")
    }
    lines = [record.getMessage() for record in caplog.records]
    listing, call_ = r"GET /internal/files/list\b.*", r"POST /v1/internal/run\b.*"
    expected = [listing + "503.* 1", listing + "200.* 2", call_ + "200.* 1", call_ + " 1"]
    requests = [line for line in lines if " ms" in line]
    assert len(requests) == 4 and all(map(re.match, expected, requests)), requests
    (reason,) = [line for line in lines if " ms" not in line]
    assert "503" in reason and "down" in reason and "page-2" not in caplog.text


SDK_LOGGER = logging.getLogger("gateway_sdk")


class Troubled:
    """Raises, whatever it is asked for: stands for what others have made of `logging`."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise self._error


def add_handler(error: Exception) -> None:
    """One that raises this, and not only where `logging` would catch it."""
    SDK_LOGGER.addHandler(type("Handler", (logging.Handler,), {"emit": Troubled(error)})())


def half_imported(**attributes: Any) -> types.ModuleType:
    """`logging` as another thread finds it that imports it at this moment."""
    module = types.ModuleType("logging")
    vars(module).update(attributes)
    return module


# What is wrong with the log.
LOG_TROUBLES: dict[str, Callable[[Patch], object]] = {
    "handler": lambda patch: add_handler(LookupError("x")),
    "full disk": lambda patch: add_handler(OSError(28, "No space left on device")),
    "slow handler": lambda patch: add_handler(TimeoutError("x")),
    "handler over HTTP": lambda patch: add_handler(ServiceUnavailableError("x")),
    "filter": lambda patch: SDK_LOGGER.addFilter(Troubled(AttributeError("x"))),
    "record": lambda patch: patch.setattr(logging.Logger, "makeRecord", Troubled(TypeError("x"))),
    "level": lambda patch: patch.setattr(logging.Logger, "isEnabledFor", Troubled(ValueError("x"))),
    "getLogger": lambda patch: patch.setattr(logging, "getLogger", Troubled(NameError("x"))),
    "half imported": lambda patch: patch.setitem(sys.modules, "logging", half_imported()),
    "half imported, no root": lambda patch: patch.setitem(
        sys.modules, "logging", half_imported(getLogger=Troubled(NameError("x")), DEBUG=10)),
    "half imported, no methods": lambda patch: patch.setitem(
        sys.modules, "logging", half_imported(getLogger=lambda name: object())),
}  # fmt: skip


@pytest.mark.parametrize("name", LOG_TROUBLES)
def test_trouble_with_the_log_costs_no_call(name: str) -> None:
    answers = [ran(), UNAVAILABLE, answer([]), WHOLE_STREAM, ran(), ran(), answer(REASON, 404)]
    before = SDK_LOGGER.level, SDK_LOGGER.handlers[:], SDK_LOGGER.filters[:]
    SDK_LOGGER.setLevel(logging.DEBUG)
    try:
        with Patch.context() as patch, Script(*answers) as server, client_of(server) as client:
            LOG_TROUBLES[name](patch)
            assert run(client).get_function_result() == "ok"
            assert client.list_prefabs() == []
            assert [received.data for received in run(client, stream=True)] == [1, None]
            assert values_of(client.run_batch([call(), call()])) == ["ok", "ok"]
            with pytest.raises(PrefabNotFoundError):
                run(client)
    finally:
        level, SDK_LOGGER.handlers, SDK_LOGGER.filters = before
        SDK_LOGGER.setLevel(level)
    assert len(server.received) == len(answers)


def test_a_call_in_the_middle_of_an_import_of_logging_is_not_lost() -> None:
    """As in a thread while another imports `requests`, say. Here: before each line of `logging`."""
    code = """if True:
        import sys, gateway_sdk
        for name in [name for name in sys.modules if name.partition(".")[0] == "logging"]:
            del sys.modules[name]
        client = gateway_sdk.GatewayClient(sys.argv[1], timeout=10)
        results = []

        def enter(frame, kind, value):
            if frame.f_globals.get("__name__") == "logging" and frame.f_code.co_name == "<module>":
                return at_line

        def at_line(frame, kind, value):
            if kind == "line":
                results.append(client.run("p", "1", "f").get_function_result())
            return at_line

        sys.settrace(enter)
        import logging
        sys.settrace(None)
        assert len(results) > 100 and hasattr(logging, "getLogger")
        print(*sorted(set(results)))
    """
    with Routed(lambda received: ran()) as server:
        ended = python(code, server.url)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("ok\n", "", 0)


def test_an_expired_token_is_exchanged_again_once_however_many_threads_see_it() -> None:
    answers = [TOKEN_ANSWERS[0], *[together(8, REFUSED)] * 8, TOKEN_ANSWERS[1], *[ran()] * 8]
    with Script(*answers) as server:
        client = GatewayClient.from_api_key("key-1", server.url, timeout=WAIT_SECONDS)
        client = pickle.loads(pickle.dumps(client))  # a copy can do so too
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            results = list(threads.map(lambda _: run(client), range(8)))
    assert all(result.is_success() for result in results)
    tokens = [received.headers.get("x-internal-token") for received in server.received]
    assert tokens == [None, *["first"] * 8, None, *["second"] * 8]


def test_who_waited_for_a_token_exchange_that_failed_fails_with_it() -> None:
    threads = 10
    exchanges = iter([TOKEN_ANSWERS[0], Pause()])
    refused = together(threads, REFUSED)

    def fail(_: int) -> GatewayError:
        with pytest.raises(GatewayError) as caught:
            run(client)
        return caught.value

    with Routed(lambda received: next(exchanges) if is_exchange(received) else refused) as server:
        client = GatewayClient.from_api_key("key-1", server.url, timeout=5 * SHORT_SECONDS)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            errors = list(pool.map(fail, range(threads)))
    assert all(
        isinstance(error, GatewayTimeoutError) and not error.may_have_run for error in errors
    )
    # Each its own: a traceback is of one thread.
    assert len({id(error) for error in errors}) == threads
    assert len([received for received in server.received if is_exchange(received)]) == 2


def test_after_an_exchange_that_failed_the_next_call_tries_again() -> None:
    def fail() -> weakref.ref[Any]:
        held = threading.Event()  # stands for all that the functions in the error's traceback hold
        with pytest.raises(ServiceUnavailableError):
            run(client)
        return weakref.ref(held)

    failed = answer({"detail": "no"}, 500)
    with Script(TOKEN_ANSWERS[0], REFUSED, failed, REFUSED, TOKEN_ANSWERS[1], ran()) as server:
        client = GatewayClient.from_api_key("key-1", server.url, timeout=WAIT_SECONDS)
        reference = fail()
        collect()
        # The client keeps the error for others, but not what its traceback holds.
        assert reference() is None
        assert run(client).is_success()
    tokens = [received.headers.get("x-internal-token") for received in server.received]
    assert tokens == [None, "first", None, "first", None, "second"]


@pytest.mark.parametrize(
    "act",
    [lambda c: c.list_prefabs(), lambda c: list(run(c, stream=True)),
     lambda c: c.run_batch([call()]),
     lambda c: c.upload_file(__file__)],
    ids=["GET", "stream", "batch", "upload"],
)  # fmt: skip
def test_every_kind_of_request_survives_the_end_of_its_token(act: Any) -> None:
    with LocalGateway() as gateway:
        client = GatewayClient.from_api_key(gateway.api_key, gateway.base_url)
        gateway.expire_tokens()
        with contextlib.suppress(AgentContextRequiredError, PrefabNotFoundError):
            act(client)
        tokens = [r.headers.get("x-internal-token") for r in gateway.requests]
    first, refused, second, accepted = tokens
    assert first is second is None and refused != accepted


def test_a_new_token_that_is_refused_too_is_an_error() -> None:
    with (
        Script(TOKEN_ANSWERS[0], REFUSED, TOKEN_ANSWERS[1], REFUSED) as server,
        pytest.raises(AuthenticationError),
    ):
        run(GatewayClient.from_api_key("key-1", server.url))
    assert len(server.received) == 4


@pytest.mark.parametrize(
    ("given", "status"),
    [(REFUSED, 401), (answer({"detail": "x"}, 400), 400),
     *((answer(content), 200)
       for content in ({}, [], {"internal_token": 5}, {"token": "hush-hush"}, ["hush-hush"],
                                              {"internal_token": {"value": "hush-hush"}})),
     *((answer({"internal_token": token}), None) for token in ("", "hush\nhush")),
     *((answer(body=body), 200) for body in (
         b"<html>", b"hush-hush", b'{"internal_token": "hush-hush',
         b'{"internal_token": "hush-hush"} x')),
     *((HangUp(given), None) for given in (
         HEAD + b'{"internal_token": "hush-hush"}\r\n', b'{"internal_token": "hush-hush"}\r\n\r\n',
         HEAD + b'5\r\n{"internal_token": "hush-hush"}\r\n')),
     (answer(body=b'{"internal_token": "hush-hush\xff"}'), None)],
    ids=ascii,
)  # fmt: skip
def test_an_exchange_that_gives_no_good_token_is_an_error_that_shows_none_and_keeps_no_connection(
    given: bytes, status: int | None
) -> None:
    with Script(given) as server:
        with pytest.raises(GatewayError) as caught:
            GatewayClient.from_api_key("key-1", server.url, max_retries=0)
        # Though the error is kept, and the frames in it.
        server.wait_until(lambda: server.open_connections == 0)
    assert caught.value.status_code == status and len(server.received) == 1
    assert "hush" not in all_of(caught.value)


# Nothing that is shown has a secret in it, not even where the gateway repeats it.
WHO: dict[str, Callable[[str, Path], Any]] = {
    "internal token": lambda url, _: run(GatewayClient(url, internal_token=HIDDEN, max_retries=1)),
    "exchanged API key": lambda url, _: GatewayClient.from_api_key(HIDDEN, url, max_retries=1),
    "presigned GET": lambda url, path: GatewayClient(url).download_file(S3, path),
    "token that streams": lambda url, _: list(
        run(GatewayClient(url, internal_token=HIDDEN, max_retries=1), stream=True)),
    "token of a batch": lambda url, _: values_of(
        GatewayClient(url, internal_token=HIDDEN).run_batch([call(), call()])),
    "API key": lambda url, _: GatewayClient(url, api_key=HIDDEN, max_retries=1).list_prefabs(),
    "JWT": lambda url, _: GatewayClient(url, jwt_token=HIDDEN).list_files(),
    "secret": lambda url, _: GatewayClient(url).set_secret("p", "KEY", HIDDEN),
    "presigned PUT": lambda url, path: GatewayClient(url).upload_input_file(__file__),
}  # fmt: skip
QUOTED = urllib.parse.quote(HIDDEN, safe="")
ECHOES: dict[str, Callable[[str], Answer]] = {
    "fields": lambda s: answer({"detail": {"error_code": s, "message": s, s: [{s: s}]}}, 401),
    "quoted": lambda s: answer(body=urllib.parse.quote(s, safe="").encode(), status=503),
    "status line": lambda s: HangUp(f"{s}\r\n\r\n".encode("latin-1")),
    "other JSON": lambda s: answer({"given": s, "results": s}),
    "string": lambda s: answer({"detail": f"bad {s}"}, 400),
    "details": lambda s: answer({"error_code": "X", "message": "m", "details": {"given": s}}, 429),
    "no message": lambda s: answer({"detail": {"given": s}}, 400),
    "list": lambda s: answer({"detail": [{"loc": ["body", s], "msg": s, "input": s}]}, 422),
    "missing secret": lambda s: answer(
        {"detail": {"error_code": "MISSING_SECRET", "secret_name": s, "instructions": s}}, 400),
    "JSON string": lambda s: answer(s, 500),
    "HTML": lambda s: answer(body=f"<p>{s}</p>".encode(), status=502),
    "XML": lambda s: answer(body=f"<Code>{s}</Code><Message>{s}</Message>".encode(), status=403),
    "reason": lambda s: f"HTTP/1.1 400 {s}\r\nContent-Length: 0\r\n\r\n".encode("latin-1"),
    "status": lambda s: HangUp(f"HTTP/1.1 {s} OK\r\n\r\n".encode("latin-1")),
    "chunk size": lambda s: HangUp(HEAD + f"{s}\r\n".encode("latin-1")),
    "location": lambda s: answer({}, 307, Location=f"ftp://h/{s}?{QUOTED}"),
    "not JSON": lambda s: answer(body=s.encode()),
    "other results": lambda s: answer({"results": [s, {"given": s}], "files": 1}),
    "request id": lambda s: answer({"detail": "no"}, 400, X_Request_ID=s),
    "reason where it is cut": lambda s: (
        f"HTTP/1.1 400 {'y' * 490}{s}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")),
    "location where it is cut": lambda s: answer({}, 307, Location=f"ftp://h/{'y' * 485}/{s}"),
    "chunk size where it is cut": lambda s: HangUp(HEAD + f"{'y' * 70}{s}\r\n".encode("latin-1")),
}  # fmt: skip
TOLD = [
    (who, echo)
    for number, who in enumerate(WHO)
    for place, echo in enumerate(ECHOES)
    if number < 3 or place < 4
]


def values_of(batch: BatchResult) -> list[Any]:
    """What the calls of a batch gave. Raises what one of them would have raised."""
    assert "hush" not in repr(batch).lower()
    for failed in batch.get_failed():
        assert failed.exception
        raise failed.exception
    return [result.get_function_result() for result in batch.results]


@pytest.mark.parametrize(("who", "echo"), TOLD)
def test_no_secret_is_shown_anywhere(
    who: str, echo: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    shown: list[Any] = []
    before = [link(f"X-Sig={QUOTED}&X-Expires=5")] if who.startswith("presigned") else []
    with Script(*before, *[ECHOES[echo](HIDDEN)] * 3) as server:
        try:
            WHO[who](server.url, tmp_path / "f")
        except GatewayError as error:
            shown += [str(error), repr(error), error.args, vars(error), text_of(error),
                      pickle.dumps(error)]
    assert len(server.received) > len(before)
    shown += [(record.getMessage(), record.args) for record in caplog.records]
    assert not [text for text in shown if "hush" in repr(text).lower()]


def test_an_api_key_that_was_exchanged_is_not_shown_later_either() -> None:
    with Script(TOKEN_ANSWERS[0], answer({"detail": f"who is {HIDDEN}?"}, 400)) as server:
        client = GatewayClient.from_api_key(HIDDEN, server.url)
        with pytest.raises(GatewayError, match=re.escape("who is ***?")) as caught:
            run(client)
    assert "hush" not in str(caught.value)


def test_a_short_secret_is_hidden_only_where_it_stands_alone() -> None:
    assert "invalid ***" in str(
        error_of(run, answer({"detail": "invalid id"}, 400), internal_token="id")
    )


# Headers of a caller, what an answer says of them, and what is shown of that.
ECHOED_HEADERS = [
    ({"Authorization": "Bearer hush-hush-hush"}, "token hush-hush-hush", "token ***"),
    ({"authorization": "Basic aHVzaDpodXNo=="}, "aHVzaDpodXNo== is old", "*** is old"),
    ({"Cookie": "a=1; sid=hush-hush-hush"}, "sid=hush-hush-hush, a=1", "sid=***, a=1"),
    ({"Cf-Access-Client-Secret": "hush-hush-hush"}, "hush-hush-hush", "***"),
    ({"X-Door-Key": "hush-hush for hush"}, "hush-hush for hush?", "***?"),
    # Values that are no secrets, or short words.
    ({"X-Canary": "production"}, "production is down", "production is down"),
    ({"Cookie": "a=1; mode=canary"}, "1 canary, a cookie", "1 canary, a cookie"),
    ({"X-Key-Version": "1"}, "1 of 1", "1 of 1"),
    ({"traceparent": "00-0123456789-01"}, "00-0123456789-01", "00-0123456789-01"),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "said", "shown"), ECHOED_HEADERS, ids=str)
@pytest.mark.parametrize("is_function", [False, True])
def test_what_is_secret_in_given_headers_is_hidden_in_messages(
    headers: dict[str, str], said: str, shown: str, is_function: bool
) -> None:
    given = answer({"detail": f"it was: {said}"}, 403)
    error = error_of(run, given, headers=(lambda: headers) if is_function else headers)
    assert f"it was: {shown}\n" in f"{error}\n"
    assert not re.search("hush|aHVz", all_of(error))


CLOTHED = "hush &hush \"hush\" 'hush' <hush>+hush/hush=hush%41"  # as it may be cut, "hush" is left


def lower_case_codes(text: str) -> str:
    return re.sub(r"%[0-9A-F]{2}", lambda found: found[0].lower(), text)


def numbered(text: str, form: str) -> str:
    return re.sub(r"[&\"'<>+/=]", lambda found: form.format(ord(found[0])), text)


CLOTHES: dict[str, Callable[[str], str]] = {
    "HTML": html.escape,
    "HTML text": lambda text: html.escape(text, quote=False),
    "HTML by number": lambda text: numbered(text, "&#{};"),
    "HTML by three digits": lambda text: numbered(text, "&#{:03};"),
    "HTML by hex number": lambda text: numbered(text, "&#x{:x};"),
    "HTML by upper-case hex number": lambda text: numbered(text, "&#x{:02X};"),
    "HTML apostrophes": lambda text: html.escape(text).replace("&#x27;", "&apos;"),
    "HTML of Jinja": lambda text: html.escape(
        text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
    "form": urllib.parse.quote_plus,
    "form with slashes": lambda text: urllib.parse.quote_plus(text, safe="/"),
    "form, lower case": lambda text: lower_case_codes(urllib.parse.quote_plus(text)),
    "lower case": lambda text: lower_case_codes(urllib.parse.quote(text, safe="")),
    "lower case with slashes": lambda text: lower_case_codes(urllib.parse.quote(text)),
}


@pytest.mark.parametrize("clothes", CLOTHES)
def test_a_secret_is_recognized_in_any_clothes(clothes: str) -> None:
    shown = CLOTHES[clothes](CLOTHED)
    page = answer(body=f"<p>bad: {shown}</p>".encode(), status=400, Content_Type="text/html")
    for given in (page, answer({"detail": f"bad: {shown}"}, 401)):
        error = error_of(run, given, internal_token=CLOTHED)
        assert "bad: ***" in str(error) and "hush" not in all_of(error)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("media_type", ["application/json", "text/event-stream"])
def test_an_encoded_answer_is_an_error_that_says_so(media_type: str, stream: bool) -> None:
    encoded = answer(body=b"\x1f\x8b...", Content_Type=media_type, Content_Encoding="gzip")
    with Script(encoded) as server, client_of(server) as client:
        with pytest.raises(GatewayError, match="200, but the body is in gzip") as caught:
            run(client, stream=stream)
    assert (type(caught.value), caught.value.may_have_run) == (GatewayError, True)


def test_the_status_of_an_encoded_error_counts_and_identity_is_no_encoding() -> None:
    refused = answer(body=b"\x1f\x8b...", status=401, Content_Encoding="gzip")
    with Script(refused,
                *(answer([], Content_Encoding=name) for name in ("Identity", ""))) as server:
        client = client_of(server)
        with pytest.raises(AuthenticationError):
            run(client)
        assert client.list_prefabs() == client.list_prefabs() == []


# A content type, and whether it is that of a stream.
MEDIA_TYPES: dict[str, bool] = {
    "application/json, text/event-stream": False,
    "application/json,text/event-stream;charset=utf-8": False,
    "APPLICATION/JSON ; charset=UTF-8": False,
    'application/json; profile="text/event-stream"': False,
    "text/json": False,
    "text/event-streams": False,
    "text/event-stream, application/json": True,
    "text/event-stream,text/event-stream": True,
    "text/event-stream;charset=utf-8": True,
    "Text/Event-Stream ; charset=utf-8": True,
    " \ttext/event-stream \t": True,
    "text/event-stream;": True,
    'text/event-stream; a="b,c"': True,
}


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
def test_a_media_type_is_read_up_to_its_first_mark(media_type: str) -> None:
    is_stream = MEDIA_TYPES[media_type]
    payload = event("content", "first") + event("done") if is_stream else FIRST_BODY
    given = whole(payload, media_type)
    with Script(given, given, ran("second")) as server, client_of(server) as client:
        assert run(client).get_function_result() == "first"
        content, done = run(client, stream=True)
        assert (content.data if is_stream else content.data["output"]) == "first"
        assert done.type == "done" and run(client).get_function_result() == "second"


@pytest.mark.parametrize(
    "encoding", ["UTF-8", "utf-8", "none", "None", "identity", "IDENTITY \t", "", " "]
)
def test_an_encoding_that_is_none_costs_no_answer(encoding: str, tmp_path: Path) -> None:
    plain = answer(body=FIRST_BODY, Content_Encoding=encoding)
    events = event("content", "first") + event("done")
    stream = answer(body=events, Content_Type=STREAM, Content_Encoding=encoding)
    missing = answer({"detail": coded("GONE")}, 404, Content_Encoding=encoding)
    with Script(plain, stream, stream, missing) as server, client_of(server) as client:
        assert [run(client).get_function_result() for _ in range(2)] == ["first", "first"]
        assert next(run(client, stream=True)).data == "first"
        with pytest.raises(PrefabNotFoundError) as caught:
            run(client)
    assert caught.value.error_code == "GONE"


def test_a_file_that_was_stored_encoded_comes_as_it_is(tmp_path: Path) -> None:
    with Script(link("a=1"), answer(body=b"\x1f\x8b...", Content_Encoding="gzip")) as server:
        client_of(server).download_file(S3, tmp_path / "f.gz")
    assert (tmp_path / "f.gz").read_bytes() == b"\x1f\x8b..."


def test_a_timeout_that_was_set_later_is_checked_too() -> None:
    with Script() as server, client_of(server) as client:
        client.timeout = "soon"  # type: ignore[assignment]
        with pytest.raises(ValidationError, match="timeout"):
            client.list_prefabs()
        other = async_client_of(server)
        other.timeout = "soon"  # type: ignore[assignment]
        with pytest.raises(ValidationError, match="timeout"):
            in_loop(other.list_prefabs())


def test_almost_a_secret_does_not_take_long_to_tell_from_it() -> None:
    """Two patterns for each special character would make it take longer than the world is old."""
    almost = "a/=+& \\\\\\" * 60
    with (
        Script(answer({"detail": f"{almost} is too short"}, 422)) as server,
        client_of(server) as client,
    ):
        with pytest.raises(ValidationError, match="is too short"):
            client.set_secret("p", "S", f"{almost}END")


SIGNED = "https://s3/b/k?X-Sig=hush-hush"


@pytest.mark.parametrize(("status", "body", "shown"), [
    *((401, f'{{"detail": {{"message": "bad {escaped}", "list": ["{escaped}"], "{escaped}": 1}}}}',
       "bad ***")
      for escaped in (r"hush\/hush-secret", r"hus\u0068/hush-secret")),
    (200, '{"you": "hush/hush-secret\xff"}', "***"), (200, '{"you": "hush/hush-secret"', "***"),
    *((status, json.dumps(content), "https://s3/b/k?***") for status, content in (
        (200, {"url": SIGNED}), (200, SIGNED), (503, {"detail": f"403 for url: {SIGNED}"}))),
], ids=ascii)  # fmt: skip
def test_no_secret_is_shown_where_an_answer_is_odd(status: int, body: str, shown: str) -> None:
    """The token as JSON may escape it, or in what is not JSON; and the query of a presigned URL."""
    given = answer(body=body.encode("latin-1"), status=status)
    token = "hush/hush-secret"  # not below: a traceback shows the lines of the code
    error = error_of(lambda c: c.get_presigned_url(S3), given, internal_token=token)
    assert shown in str(error) and "hush" not in all_of(error)


@pytest.mark.parametrize("secret", [
    "https://discord.example/api/webhooks/112233/hush-hush?wait=true",
    "http://vault/?q=correct horse hush-hush staple",
])
@pytest.mark.parametrize("status", [400, 422, 503])
def test_a_secret_that_is_a_url_is_hidden_whole(secret: str, status: int) -> None:
    detail = [{"loc": ["body"], "msg": f"bad {secret}", "input": {"value": secret}}]
    for content in ({"detail": detail}, f"bad {secret}", {"detail": f"bad {secret}"}):
        given = answer(content, status)
        error = error_of(lambda c: c.set_secret("p", "HOOK", secret), given)
        assert "***" in str(error)
        assert not re.search("hush|112233|horse", f"{error} {error.details}")


@pytest.mark.parametrize(("echo", "shown"), [
    ("a+b/c=HUSH-HUSH", "***"), ("a b/c=HUSH-HUSH", "***"), ("SECOND-HUSH", "***"),
    ("host? 600 0123456789abcdef", "host? 600 ***"),  # short words are no secrets
])
def test_both_urls_of_a_redirect_are_hidden_but_not_their_short_words(
    echo: str, shown: str, tmp_path: Path
) -> None:
    query = (
        "Sig=a+b/c=HUSH-HUSH&T=a%20b/c=HUSH-HUSH&Expires=600&Signed=host&Signature=0123456789abcdef"
    )
    answers = (
        link(query),
        answer(status=302, Location="/z?t=SECOND-HUSH"),
        answer({"detail": f"it was {echo}"}, 403),
    )
    with (
        Script(*answers) as server,
        pytest.raises(GatewayError, match=re.escape(f"it was {shown}")) as caught,
    ):
        client_of(server).download_file(S3, tmp_path / "f")
    assert "HUSH" not in text_of(caught.value)


# One level of escapes, as a server writes a text into another.
LEVELS: dict[str, Callable[[str], str]] = {
    "repr": lambda text: repr(text)[1:-1],
    "repr of bytes": lambda text: repr(text.encode())[2:-1],
    "JSON": lambda text: json.dumps(text)[1:-1],
    "URL": lambda text: urllib.parse.quote(text, safe=""),
    "HTML": html.escape,
}
# A secret with all that an escape may change: "hush" is left of it wherever it is not recognized.
PRIVATE_KEY = """-----BEGIN KEY-----
hush/Aa+0=
\thush"hush'hush\\n\\hush<&amp;%41>\r
\u00fc\u4f60hush==
-----END KEY-----
"""
DEEP = [
    ("JSON",) * 7, ("repr",) * 6, ("URL",) * 9, ("HTML",) * 9, ("repr", "repr", "JSON", "URL"),
    ("repr", "JSON", "URL", "HTML") * 2, ("HTML", "URL", "JSON", "repr") * 2,
]  # fmt: skip


def dressed(text: str, levels: Iterable[str]) -> str:
    for level in levels:
        text = LEVELS[level](text)
    return text


@pytest.mark.parametrize("outer", LEVELS)
@pytest.mark.parametrize("middle", LEVELS)
def test_a_secret_is_recognized_at_any_depth_of_escapes(middle: str, outer: str) -> None:
    chains = [(inner, middle, outer) for inner in LEVELS] + DEEP * (middle == outer == "repr")
    for levels in chains:
        shown = dressed(PRIVATE_KEY, levels)
        said = f"cannot parse '{shown}' here"
        page = answer(body=said.encode(), status=400)
        for given in (page, answer({"detail": {"message": said, "given": [shown]}}, 422)):
            error = error_of(lambda client: client.set_secret("p", "KEY", PRIVATE_KEY), given)
            assert "hush" not in all_of(error), levels
            assert re.search(r"(?s)cannot parse '.*\*\*\*.*' here", str(error)), levels


CARRIED = {
    "internal token": 'hush"/hush\\hush<&>%41hush', "JWT": "hush-hush.e30.hush'+hush==",
    "API key": "hush-hush \u00fc 'hush'", "exchanged API key": "hush&hush/+hush=",
    "secret": '{"hush": "hush\\n"}\n',
}  # fmt: skip
# What is done with it: not in the lines above, as a traceback shows the lines of the code.
CARRIERS: dict[str, Callable[[str, str], Any]] = {
    "internal token": lambda url, secret: run(GatewayClient(url, internal_token=secret)),
    "JWT": lambda url, secret: run(GatewayClient(url, jwt_token=f"Bearer {secret}")),
    "API key": lambda url, secret: GatewayClient(url, api_key=secret).list_files(),
    "exchanged API key": lambda url, secret: GatewayClient.from_api_key(secret, url),
    "secret": lambda url, secret: GatewayClient(url).set_secret("p", "KEY", secret),
}


@pytest.mark.parametrize(
    "levels", [(), ("JSON", "repr"), ("URL", "repr", "JSON"), ("HTML", "URL", "JSON")], ids=" ".join
)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_secrets_of_every_kind_are_recognized_in_nested_escapes(
    carrier: str, levels: tuple[str, ...]
) -> None:
    secret = CARRIED[carrier]
    shown = dressed(secret, levels)
    with Script(answer({"detail": f"it was {shown}; no more"}, 400)) as server:
        with pytest.raises(GatewayError, match=r"(?s)it was .*\*\*\*.*; no more") as caught:
            CARRIERS[carrier](server.url, secret)
    assert "hush" not in all_of(caught.value)


@pytest.mark.parametrize(
    "levels", [("URL",), ("URL", "JSON", "repr"), ("HTML", "URL"), ("repr", "repr")], ids=" ".join
)
def test_the_query_of_a_presigned_url_is_recognized_in_nested_escapes(
    levels: tuple[str, ...], tmp_path: Path
) -> None:
    query = "X-Credential=hush%2Fhush%2Fs3&X-Signature=hush+hush/hush%3Dhush"
    signature = urllib.parse.unquote(query.rpartition("=")[2])
    shown = " ".join(dressed(text, levels) for text in (query, signature))
    with Script(link(query), answer({"detail": f"it was {shown}"}, 403)) as server:
        with pytest.raises(GatewayError, match="it was") as caught:
            client_of(server).download_file(S3, tmp_path / "f")
    assert "hush" not in all_of(caught.value)


# A credential or a secret, and how a server echoes it.
TIDIED: dict[str, tuple[dict[str, str], str]] = {
    "blanks in front": ({"internal_token": "   hush-hush-hush"}, "hush-hush-hush"),
    "blanks behind": ({"api_key": "hush-hush-hush  "}, "hush-hush-hush"),
    "quotes": ({"internal_token": '"hush-hush-hush"'}, "hush-hush-hush"),
    "single quotes": ({"api_key": "'hush-hush-hush'"}, "hush-hush-hush"),
    "quotes in blanks": ({"internal_token": " \"'hush-hush-hush'\" "}, "hush-hush-hush"),
    "Bearer": ({"jwt_token": "Bearer hush.hush.hush"}, "hush.hush.hush"),
    "bearer in blanks": ({"jwt_token": "  bearer   hush.hush.hush  "}, "hush.hush.hush"),
    "quoted JWT": ({"jwt_token": '"hush.hush.hush"'}, "hush.hush.hush"),
    "blanks inside": ({"internal_token": "hush  hush  hush"}, "hush hush hush"),
    "line end of a secret": ({"secret": "hush-hush-hush\n"}, "hush-hush-hush"),
    "quoted line of a secret": ({"secret": '"hush-hush-hush"\r\n'}, "hush-hush-hush"),
    "lines of a secret": ({"secret": PRIVATE_KEY}, " ".join(PRIVATE_KEY.split())),
    "other line ends": ({"secret": PRIVATE_KEY}, PRIVATE_KEY.replace("\n", "\r\n")),
    "no line ends": ({"secret": PRIVATE_KEY}, "".join(PRIVATE_KEY.split())),
    "quotes inside": ({"internal_token": 'hush "hush" hush'}, "hush hush hush"),
}  # fmt: skip


@pytest.mark.parametrize("name", TIDIED)
def test_a_secret_is_recognized_without_the_blanks_and_quotes_around_it(name: str) -> None:
    options, shown = TIDIED[name]
    secret = options.get("secret")
    act = (lambda client: client.set_secret("p", "KEY", secret)) if secret else run
    credential = {} if secret else {"internal_token": None, **options}
    said = f"it was <{shown}>!"
    for content in ({"detail": said}, {"detail": {"message": said, "token": shown}}):
        error = error_of(act, answer(content, 401), **credential)
        assert re.search(r"(?s)it was <.*\*\*\*.*>!", str(error)) and "hush" not in all_of(error)


# Secrets with few of the characters that no escape changes, or none.
BARE = [
    "!!!???***###", "p@$$w0rd!#%&", "\u5bc6\u7801\u4f60\u597d\u4e16\u754c\u5bc6\u5319",
    "\U0001f511\U0001f512\U0001f510\U0001f5dd\U0001f50f\U0001f513",
    "\u043a\u043b\u044e\u0447-\u043f\u0430\u0440\u043e\u043b\u044c",
    "\u5bc6ab\u7801c1\u5319", "\u00fc\u00e4\u00f6\u00df\u00e9\u00e8\u00ea\u00ee\u00f4",
    "<<<^^^>>>|||", "%%%&&&;;;===",
    "~^~|/(){}[];:",
]  # fmt: skip
SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "JSON": lambda text: json.dumps(text)[1:-1],
    "JSON of JSON": lambda text: json.dumps(json.dumps(text)[1:-1])[1:-1],
    "URL": lambda text: urllib.parse.quote(text, safe=""),
    "URL in lower case": lambda text: lower_case_codes(urllib.parse.quote(text, safe="")),
    "URL of URL": lambda text: urllib.parse.quote(urllib.parse.quote(text, safe="")),
    "HTML": html.escape,
    "HTML by number": lambda text: html.escape(text).encode("ascii", "xmlcharrefreplace").decode(),
    "ascii": lambda text: ascii(text)[1:-1],
    "repr of bytes": lambda text: repr(text.encode())[2:-1],
}


@pytest.mark.parametrize("secret", BARE, ids=ascii)
def test_a_secret_of_few_letters_and_digits_or_none_is_hidden_too(secret: str) -> None:
    for spelling, spell in SPELLINGS.items():
        shown = spell(secret)
        alone = {"error_code": "E", "message": shown}
        for status, content in ((400, {"detail": f"it was {shown} here"}), (422, alone)):
            given = answer(content, status)
            error = error_of(lambda client: client.set_secret("p", "KEY", secret), given)
            left = text_of(error) + str(vars(error))
            assert "***" in str(error) and shown not in left, spelling
            assert repr(shown)[1:-1] not in left, spelling
            assert shown[: 2 * len(shown) // 3] not in left, spelling
            assert shown[len(shown) // 3 :] not in left, spelling
            assert status == 422 or re.search("it was .* here", str(error))


@pytest.mark.parametrize("token", [word for word in BARE if word.isascii()], ids=repr)
def test_a_token_of_symbols_is_hidden_too(token: str) -> None:
    error = error_of(run, answer({"detail": f"it was {token} here"}, 401), internal_token=token)
    assert token not in all_of(error) and token[:-2] not in str(error)


# A short secret, a text, and what is shown of it.
SHORT_SECRETS = [
    *(("test", text, text) for text in (
        "no prefab test-tools", "the latest one", "test_mode is on", "my-test failed", "contest",
        "test2", "test.tools", "unit_test", "t e s t", "Testing")),
    *(("id", text, text) for text in (
        "invalid", "prefab_id is missing", "session-id: 5", "id_token", "idle")),
    *((word, text, text) for word, text in (
        ("k-1", "task-12 failed"), ("-id-", "invalid"), ("!", "invalid"), ("-", "test-tools"),
        (".", "no file a.txt"), ("/", "no path a/b"), ("1", "code 1001 of v1.1"),
        ("\u4f60", "\u4f60\u597d"))),
    *(("test", text, text.replace("test", "***")) for text in (
        "bad token test", "'test'", '"test"', "who is test?", "(test)", "test: unknown",
        "test, that is who", "<b>test</b>", "token=test", "it was test.", "test")),
    ("id", "id", "***"), ("id", "invalid id", "invalid ***"),
    ("k-1", "key k-1 is bad", "key *** is bad"),
]  # fmt: skip


@pytest.mark.parametrize(("secret", "said", "shown"), SHORT_SECRETS)
def test_a_short_secret_is_hidden_where_it_stands_alone_and_changes_no_other_word(
    secret: str, said: str, shown: str
) -> None:
    other_words = {"error_code": "E_TEST_1", "name": "test-tools.v1/id-1"}
    given = answer({"detail": {"message": said, **other_words}}, 400)
    acts = {"secret": lambda client: client.set_secret("p", "KEY", secret), "token": run}
    for kind, act in acts.items():
        if kind == "token" and not secret.isascii():
            continue
        error = error_of(act, given, **({"internal_token": secret} if kind == "token" else {}))
        assert str(error).partition(" answered 400: ")[2] == shown
        assert error.details["name"] == "test-tools.v1/id-1" and error.error_code == "E_TEST_1"


@pytest.mark.parametrize(
    "token", ["test", "id", "tools", "p", "1", "1.0.0", "KEY", "v1", "POST", "404", "secret"]
)
def test_what_code_reads_is_never_changed_by_a_short_secret(token: str) -> None:
    names = ("test-tools", "1.0.0")
    missing = {"error_code": "MISSING_SECRET", "prefab_id": "p", "secret_name": "KEY"}
    quota = coded("KEY", limit=1, used=404, quota_type="id")
    not_found = error_of(lambda c: c.run(*names, "f"), answer(REASON, 404), internal_token=token)
    assert (not_found.prefab_id, not_found.version, not_found.status_code) == (*names, 404)
    assert "POST /v1/internal/run answered 404" in str(not_found)
    no_secret = error_of(run, answer({"detail": missing}, 400), internal_token=token)
    assert (no_secret.prefab_id, no_secret.secret_name) == ("p", "KEY")
    assert no_secret.error_code == no_secret.details["error_code"] == "MISSING_SECRET"
    used_up = error_of(run, answer({"detail": quota}, 429), internal_token=token)
    assert (used_up.limit, used_up.used) == (1, 404)
    assert (used_up.quota_type, used_up.error_code) == ("id", "KEY")
    set_ = error_of(lambda c: c.set_secret("test-tools", "KEY", token), answer(REASON, 400))
    assert str(set_).startswith("POST /v1/secrets answered 400")
    failed = {"status": "FAILED", "output": {"id": "test", "test": 1}}
    failed["error"] = {"message": "id test", "type": "KEY"}
    with Script(answer({"results": [failed]})) as server:
        result = run(client_of(server, internal_token=token))
    assert (result.output, result.error) == (failed["output"], failed["error"])


@pytest.mark.parametrize("status", [200, 400, 502])
def test_a_secret_across_the_500th_character_is_hidden(status: int) -> None:
    secret = "hush-" * 8 + "end"
    for start in (460, 480, 495, 499):
        body = "<p>" + "x " * (start // 2) + secret + " y" * 50
        error = error_of(run, answer(body=body.encode(), status=status), internal_token=secret)
        assert "hush" not in all_of(error)


@pytest.mark.parametrize("kind", ["gzip", "GBK", "byte order mark", "request id", "retry-after"])
def test_a_secret_is_hidden_in_whatever_an_error_is_read_from(kind: str) -> None:
    secret = "hush-hush/hush"
    detail = {"message": f"{CHINESE}: {secret}", "given": secret}
    text = json.dumps({"detail": detail}, ensure_ascii=False)
    given = {
        "gzip": answer(body=gzip.compress(text.encode()), status=400, Content_Encoding="gzip"),
        "GBK": answer(body=text.encode("gbk"), status=400, Content_Type="text/html; charset=gbk"),
        "byte order mark": answer(body=b"\xef\xbb\xbf" + text.encode(), status=400),
        "request id": answer(REASON, 400, X_Request_ID=secret),
        "retry-after": answer(REASON, 503, Retry_After=secret),
    }[kind]
    assert "hush" not in all_of(error_of(run, given, internal_token=secret))


# Secrets and texts that nearly have them: the time must not be that of one times the other.
HOSTILE_TIME = """if True:
    import faulthandler, json, sys, gateway_sdk
    faulthandler.dump_traceback_later(40, exit=True)
    client = gateway_sdk.GatewayClient(sys.argv[1], max_retries=0)
    with open(sys.argv[2], encoding="utf-8") as file:
        secrets = json.load(file)
    for secret in secrets:
        try:
            client.set_secret("p", "KEY", secret)
        except gateway_sdk.GatewayError as error:
            assert "told" in str(error), error
    try:
        client.download_file("s3://b/k", sys.argv[2] + ".new")
    except gateway_sdk.GatewayError as error:
        assert "told" in str(error), error
    print("done")
"""


def test_no_secret_and_no_text_take_long_to_tell_from_each_other(tmp_path: Path) -> None:
    size, count = 60_000, 10_000
    pieces = ["ab", "\\", '\\"', "%2", "%25", "&amp;", "&#", "\\u", "\\u005c", "!?", "\u4f60", " "]
    frozen = "{" + '\\"a' * 24
    told: list[tuple[str, Any]] = [(frozen, f"{frozen}x"), (f"{frozen * 4}x", frozen * 5)]
    for piece in pieces:
        long = piece * (count // len(piece))
        told.append((f"{long}END", [piece * (size // len(json.dumps(piece))), f"{long}EN"]))
    halves = "a" * (count // 2)
    told.append((f"{halves}b{halves}", "a" * size))
    told.append(("ab" * (count // 2), ["ab"] * (size // 6)))  # as many texts as there can be
    told.append(("!?" * (count // 2), {f"!{number}": "?" for number in range(size // 12)}))
    query = "&".join(f"k{number}={'a' * 12}{number}" for number in range(1500))
    answers = [answer({"detail": {"message": "told", "given": given}}, 400) for _, given in told]
    answers += [
        link(query),
        answer({"detail": {"message": "told", "given": ["a" * 100] * 500}}, 403),
    ]
    (tmp_path / "secrets").write_text(json.dumps([secret for secret, _ in told]))
    with Script(*answers) as server:
        done = python(HOSTILE_TIME, server.url, tmp_path / "secrets")
    assert (done.stdout, done.stderr) == ("done\n", "")


def module_locals(error: BaseException) -> list[str]:
    """The local variables of this module's frames, as crash reporters print them."""
    told = functools.partial(traceback.TracebackException, capture_locals=True)
    waiting = [told(type(error), error, error.__traceback__)]
    found = []
    while waiting:
        shown = waiting.pop()
        waiting += [other for other in (shown.__cause__, shown.__context__) if other]
        for frame in shown.stack:
            if Path(frame.filename).name == "gateway_sdk.py":
                variables = (frame.locals or {}).items()
                found += [f"{frame.name}: {name} = {text}" for name, text in variables]
    return found


WORD = "hush-hush-hush"
SIGNED_LINK = f"http://127.0.0.1:1/b/k?X-Sig={WORD}"
WITH_CREDENTIAL: dict[str, Callable[[str], GatewayClient]] = {
    "internal token": lambda url: GatewayClient(url, internal_token=WORD, max_retries=1),
    "API key": lambda url: GatewayClient(url, api_key=WORD, max_retries=1),
    "JWT": lambda url: GatewayClient(url, jwt_token=f"Bearer {WORD}", max_retries=1),
}
WHO_IS = f"who is {WORD}?"
FAILING: dict[str, tuple[Callable[[GatewayClient], Any], list[Answer]]] = {
    "401": (run, [answer({"detail": WHO_IS}, 401)]),
    "500": (run, [answer({"detail": {"message": WHO_IS, "given": [WHO_IS]}}, 500)]),
    "503, twice": (lambda c: c.list_prefabs(), [answer(body=WHO_IS.encode(), status=503)] * 2),
    "no JSON": (run, [answer(body=WHO_IS.encode())]),
    "other JSON": (run, [answer({"results": WHO_IS})]),
    "first line": (run, [HangUp(WHO_IS.encode() + b"\r\n")]),
    "half a head": (run, [HangUp(OK + b"X-Echo: %b\r\nX-Ec" % WORD.encode())]),
    "half a field": (run, [HangUp(OK + b"X-Echo: %b" % WORD.encode())]),
    "silence in the head": (
        lambda c: run(c, timeout=SHORT_SECONDS),
        [Pause(OK + b"X-Echo: %b\r\n" % WORD.encode())],
    ),
    "a reset in the head": (
        run,
        [Steps((send(OK + b"X-Echo: %b\r\n" % WORD.encode()), will_reset, socket.socket.close))],
    ),
    "reason and an encoded body": (
        run,
        [b"HTTP/1.1 200 %b\r\nContent-Encoding: br\r\nContent-Length: 0\r\n\r\n" % WORD.encode()],
    ),
    "redirect": (run, [moved(f"/v1?{WORD}", 307)]),
    "hang-up": (run, [HangUp()]),
    "timeout": (lambda c: run(c, timeout=SHORT_SECONDS), [Pause()]),
    "stream": (
        lambda c: list(run(c, stream=True)),
        [HangUp(HEAD + chunk(event("content", "a")))],
    ),
    "stream that is refused": (lambda c: run(c, stream=True), [answer({"detail": WHO_IS}, 403)]),
    "batch": (
        lambda c: values_of_raised(c.run_batch([call(), call()])),
        [answer({"detail": WHO_IS}, 422)] * 2,
    ),
    "refused batch": (
        lambda c: c.run_batch([call(), call()], max_workers=1),
        [answer({"detail": WHO_IS}, 401)],
    ),
    "single request": (
        lambda c: c.run_batch([call()] * 2, single_request=True),
        [answer({"detail": WHO_IS}, 422)],
    ),
    "upload": (lambda c: c.upload_file(ROOT / "LICENSE"), [answer({"detail": WHO_IS}, 403)]),
    "step before an upload": (
        lambda c: c.upload_input_file(ROOT / "LICENSE"),
        [answer({"detail": WHO_IS}, 500)],
    ),
    "download": (lambda c: c.download_file(S3, "f"), [answer({"detail": WHO_IS}, 404)]),
    "bad parameters": (lambda c: c.run("p", "1", "f", {"when": {1}}), []),
    "bad files": (lambda c: run(c, files={"v": ["a.mp4"]}), []),
    "bad limit": (lambda c: c.list_files(limit=0), []),
}


def values_of_raised(batch: BatchResult) -> None:
    raise batch.results[0].exception or AssertionError("it did not fail")


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("mode", WITH_CREDENTIAL)
def test_no_frame_of_the_module_shows_the_credential(mode: str, name: str) -> None:
    act, answers = FAILING[name]
    with Script(*answers) as server, pytest.raises(GatewayError) as caught:
        act(WITH_CREDENTIAL[mode](server.url))
    assert len(server.received) == len(answers)
    assert not [text for text in module_locals(caught.value) if "hush" in text.lower()]


def exchanged(url: str) -> GatewayClient:
    return GatewayClient.from_api_key(WORD, url, max_retries=0)


def from_environment(url: str, headers: Any = None, **variables: str) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        for name, value in variables.items():
            patched.setenv(name, value)
        return GatewayClient.from_env(base_url=url, max_retries=0, headers=headers)


def through_proxy(url: str, proxy: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HTTP_PROXY", proxy)
        run(GatewayClient(url, max_retries=0))


EXCHANGE_ANSWERS = {
    "401": [answer({"detail": WHO_IS}, 401)], "500": [answer({"detail": WHO_IS}, 500)],
    "hang-up": [HangUp()],
    "other field": [answer({"token": WORD})],
    "odd token": [answer({"internal_token": f"{WORD}\n"})],
    "half an answer": [HangUp(answer({"internal_token": WORD})[:-5])],
    "text": [answer(body=WORD.encode())],
    "list": [answer([WORD])], "number": [answer({"internal_token": {"value": WORD}})],
}  # fmt: skip
PREFAB_MISTAKES: dict[str, Callable[[Any], Any]] = {
    "call": lambda prefab: prefab.call("f", files={"v": [SIGNED_LINK]}, more=SIGNED_LINK),
    "stream": lambda prefab: prefab.stream("f", files={"v": [SIGNED_LINK]}, more=SIGNED_LINK),
    "method": lambda prefab: prefab.f(files={"v": [SIGNED_LINK]}, more=SIGNED_LINK),
    "no name": lambda prefab: prefab.f(SIGNED_LINK, more=SIGNED_LINK),
}
PATH_MISTAKES: dict[str, Callable[[Any], Any]] = {
    "file": lambda client: client.upload_file(SIGNED_LINK),
    "input": lambda client: client.upload_input_file(SIGNED_LINK),
    "input of a bad type": lambda client: client.upload_input_file(SIGNED_LINK, "\n"),
    "temporary file": lambda client: client.upload_temp_file(SIGNED_LINK),
    "temporary file for no time": lambda client: client.upload_temp_file(SIGNED_LINK, 0),
    "target": lambda client: client.download_file(S3, SIGNED_LINK),
    "both": lambda client: client.download_file(SIGNED_LINK, SIGNED_LINK),
}
DOOR = {"X-Door-Secret": WORD, "Cookie": f"a=1; sid={WORD}"}
BAD_DOOR = {**DOOR, "Host": "h"}
# Clients with such headers, which fail sooner or later.
WITH_HEADERS: dict[str, tuple[Callable[[str], Any], list[Answer]]] = {
    "constructor": (lambda url: GatewayClient(url, headers=BAD_DOOR), []),
    "constructor: value": (lambda url: GatewayClient(url, headers={"X-A": f"{WORD}\n"}), []),
    "constructor: timeout": (lambda url: GatewayClient(url, timeout=-1, headers=DOOR), []),
    "function": (lambda url: run(GatewayClient(url, headers=lambda: BAD_DOOR)), []),
    "no mapping": (lambda url: run(GatewayClient(url, headers=lambda: [WORD])), []),  # type: ignore
    "echo": (
        lambda url: run(GatewayClient(url, headers=DOOR)), [answer({"detail": WHO_IS}, 403)]),
    "echo of a function's": (
        lambda url: run(GatewayClient(url, headers=lambda: DOOR)),
        [answer({"detail": WHO_IS}, 500)]),
    "exchange": (
        lambda url: GatewayClient.from_api_key("key-1", url, headers=DOOR),
        [answer({"detail": WHO_IS}, 401)]),
    "exchange: constructor": (
        lambda url: GatewayClient.from_api_key("key-1", url, headers=BAD_DOOR), []),
    "exchange: token as base_url": (lambda _: GatewayClient.from_api_key("key-1", WORD), []),
    "environment": (lambda url: from_environment(url, BAD_DOOR, GATEWAY_JWT_TOKEN="j"), []),
    "environment: exchange": (
        lambda url: from_environment(url, DOOR, AGENT_BUILDER_API_KEY="key-1"),
        [answer({"detail": WHO_IS}, 401)]),
    "async": (lambda url: AsyncGatewayClient(url, headers=BAD_DOOR), []),
    "async exchange": (
        lambda url: in_loop(AsyncGatewayClient.from_api_key("key-1", url, headers=DOOR)),
        [answer({"detail": WHO_IS}, 401)]),
    "async exchange: token as base_url": (
        lambda _: in_loop(AsyncGatewayClient.from_api_key("key-1", WORD)), []),
}  # fmt: skip
# What fails with a secret in hand, given the address of a server with these answers.
HOLDING: dict[str, tuple[Callable[[str], Any], list[Answer]]] = {
    **{f"exchange: {name}": (exchanged, answers) for name, answers in EXCHANGE_ANSWERS.items()},
    "exchange: refused": (lambda _: exchanged("http://127.0.0.1:1"), []),
    "exchange: bad timeout": (lambda url: GatewayClient.from_api_key(WORD, url, -1), []),
    "exchange: unsendable": (lambda url: GatewayClient.from_api_key(f"{WORD}\n", url), []),
    "token of an exchange": (
        lambda url: run(exchanged(url)),
        [answer({"internal_token": WORD}), answer({"detail": WHO_IS}, 400)]),
    "second exchange": (
        lambda url: run(exchanged(url)),
        [answer({"internal_token": WORD}), REFUSED, answer({"detail": WHO_IS}, 500)]),
    "environment: key": (
        lambda url: from_environment(url, AGENT_BUILDER_API_KEY=WORD),
        [answer({"detail": WHO_IS}, 401)]),
    "environment: two": (
        lambda url: from_environment(url, X_INTERNAL_TOKEN=WORD, GATEWAY_JWT_TOKEN=WORD), []),
    "environment: unsendable": (
        lambda url: from_environment(url, GATEWAY_JWT_TOKEN=f"{WORD}\n"), []),
    "constructor: timeout": (lambda url: GatewayClient(url, internal_token=WORD, timeout=-1), []),
    "constructor: two": (lambda url: GatewayClient(url, internal_token=WORD, api_key=WORD), []),
    "constructor: unsendable": (lambda url: GatewayClient(url, jwt_token=f"{WORD}\n"), []),
    "constructor: base_url": (lambda _: GatewayClient("ftp://h", api_key=WORD), []),
    "constructor: token as base_url": (lambda _: GatewayClient(WORD), []),
    "refused connection": (
        lambda _: run(GatewayClient("http://127.0.0.1:1", api_key=WORD, max_retries=1)), []),
    "secret: 400": (
        lambda url: GatewayClient(url).set_secret("p", "K", WORD),
        [answer({"detail": WHO_IS}, 400)]),
    "secret: hang-up": (lambda url: GatewayClient(url).set_secret("p", "K", WORD), [HangUp()]),
    "secret: refused": (
        lambda _: GatewayClient("http://127.0.0.1:1", max_retries=1).set_secret("p", "K", WORD),
        []),
    "secret: bad name": (lambda url: GatewayClient(url).set_secret("", "K", WORD), []),
    "secret: bytes": (
        lambda url: GatewayClient(url).set_secret("p", "K", WORD.encode()), []),  # type: ignore
    "secret: no JSON": (lambda url: GatewayClient(url).set_secret("p", "K", WORD + "\ud800"), []),
    "download: 403": (
        lambda url: GatewayClient(url).download_file(S3, "f"),
        [link(f"X-Sig={WORD}"), answer({"detail": WHO_IS}, 403)]),
    "download: cut": (
        lambda url: GatewayClient(url, max_retries=0).download_file(S3, "f"),
        [link(f"X-Sig={WORD}"), HangUp(answer(body=b"data", ETag='"1"')[:-1])]),
    "download: refused": (
        lambda url: GatewayClient(url, max_retries=1).download_file(S3, "f"),
        [answer({"presigned_url": SIGNED_LINK})]),
    "download: redirect": (
        lambda url: GatewayClient(url).download_file(S3, "f"),
        [link("X-Sig=1"), moved(f"/there?{WORD}"), answer(body=b"", status=404)]),
    "download: bad redirect": (
        lambda url: GatewayClient(url).download_file(S3, "f"),
        [link("X-Sig=1"), moved(f"ftp://h/?{WORD}")]),
    **{f"download: {url[:9]}": (
        lambda server, url=url: GatewayClient(server).download_file(S3, "f"),
        [answer({"presigned_url": url})])
       for url in (f"ftp://h/?s={WORD}", f"http://[h/?s={WORD}", f"/b/k?s={WORD}")},
    "upload: 403": (
        lambda url: GatewayClient(url).upload_input_file(ROOT / "LICENSE"),
        [link(f"X-Sig={WORD}"), answer({"detail": WHO_IS}, 403)]),
    "upload: hang-up": (
        lambda url: GatewayClient(url, max_retries=0).upload_input_file(ROOT / "LICENSE"),
        [link(f"X-Sig={WORD}"), HangUp()]),
    "upload: refused": (
        lambda url: GatewayClient(url, max_retries=0).upload_input_file(ROOT / "LICENSE"),
        [answer({"upload_url": SIGNED_LINK, "s3_url": S3})]),
    "presigned URL: other JSON": (
        lambda url: GatewayClient(url).get_presigned_url(S3), [answer({"url": SIGNED_LINK})]),
    "presigned URL by mistake": (lambda url: GatewayClient(url).get_presigned_url(SIGNED_LINK), []),
    "download by mistake": (lambda url: GatewayClient(url).download_file(SIGNED_LINK, "f"), []),
    "file of a call by mistake": (
        lambda url: run(GatewayClient(url), files={"v": [SIGNED_LINK]}), []),
    **{f"prefab by mistake: {name}": (
        lambda url, act=act: act(GatewayClient(url).prefab("p", "1")), [])
       for name, act in PREFAB_MISTAKES.items()},
    **{f"path by mistake: {name}": (lambda url, act=act: act(GatewayClient(url)), [])
       for name, act in PATH_MISTAKES.items()},
    **{f"headers: {name}": row for name, row in WITH_HEADERS.items()},
    "proxy: refused": (
        lambda url: through_proxy("http://gateway.invalid", f"http://u:{WORD}@127.0.0.1:1"), []),
    "proxy: 407": (
        lambda url: through_proxy("http://gateway.invalid", url.replace("//", f"//u:{WORD}@")),
        [answer({"detail": WHO_IS}, 407)]),
    "proxy: no tunnel": (
        lambda url: through_proxy("http://gateway.invalid", f"socks5://u:{WORD}@h"), []),
    "proxy: no URL": (
        lambda url: through_proxy("http://gateway.invalid", f"http://u:{WORD}@[h"), []),
}  # fmt: skip


@pytest.mark.parametrize("name", HOLDING)
def test_no_frame_of_the_module_shows_what_it_holds(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    act, answers = HOLDING[name]
    monkeypatch.chdir(tmp_path)
    with Script(*answers) as server, pytest.raises((GatewayError, ValueError)) as caught:
        act(server.url)
    assert len(server.received) == len(answers)
    shown = [text.lower() for text in module_locals(caught.value)]
    login = base64.b64encode(f"u:{WORD}".encode()).decode().lower()
    assert not [text for text in shown if "hush" in text or login in text]
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("mode", [*WITH_CREDENTIAL, EXCHANGED])
def test_the_attributes_of_a_client_show_no_credential(mode: str) -> None:
    with Script(answer({"internal_token": WORD})) as server:
        client = WITH_CREDENTIAL.get(mode, exchanged)(server.url)
        prefab = client.prefab("p", "1")
        assert "hush" not in f"{vars(client)!r} {client!r} {client!s} {vars(prefab)!r} {prefab!r}"


# Answers whose parts are longer than a message should be.
LONG_WORD = "y" * 60_000
LONG_ANSWERS: dict[str, Answer] = {
    "no HTTP": HangUp(b"220 ftp.example " + LONG_WORD.encode() + b"\r\n"),
    "no line": HangUp(LONG_WORD.encode()),
    "bytes": HangUp(bytes(range(128, 256)) * 400 + b"\r\n"),
    "control characters": HangUp(b"\x1b[2J\0\x07" * 9000 + b"\r\n"),
    "version": HangUp(f"HTTP/{LONG_WORD} 200 OK\r\n\r\n".encode()),
    "status": HangUp(f"HTTP/1.1 {LONG_WORD} OK\r\n\r\n".encode()),
    "reason": f"HTTP/1.1 400 {LONG_WORD}\r\nContent-Length: 0\r\n\r\n".encode(),
    "reason of 503": f"HTTP/1.1 503 {LONG_WORD}\r\nContent-Length: 0\r\n\r\n".encode(),
    "redirect": answer({}, 307, Location=f"http://elsewhere/{LONG_WORD}"),
    "encoding": answer({}, Content_Encoding=LONG_WORD),
    "length": HangUp(OK + f"Content-Length: {LONG_WORD}\r\n\r\n".encode()),
    "chunk size": HangUp(HEAD + f"{LONG_WORD}\r\n".encode()),
    "page": answer(body=LONG_WORD.encode(), status=502),
    "no JSON": answer(body=LONG_WORD.encode()),
}


@pytest.mark.parametrize("name", LONG_ANSWERS)
def test_what_is_no_message_of_the_gateway_is_told_in_short(name: str) -> None:
    error = error_of(run, LONG_ANSWERS[name])
    assert len(str(error)) < 1200 and len(text_of(error)) < 20_000
    assert name != "no HTTP" or "220 ftp.example" in str(error)


@pytest.mark.parametrize("place", ["connect", "redirect of a storage"])
def test_what_a_proxy_or_a_storage_says_is_told_in_short(
    place: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    long_reason = f"HTTP/1.1 403 {LONG_WORD}\r\nContent-Length: 0\r\n\r\n".encode()
    answers = [long_reason] if place == "connect" else [LINK, moved(f"ftp://h/{LONG_WORD}")]
    with Script(*answers) as server:
        with pytest.raises(GatewayError) as caught:
            if place == "connect":
                monkeypatch.setenv("HTTPS_PROXY", server.url)
                run(GatewayClient("https://gateway.invalid", max_retries=0))
            else:
                client_of(server).download_file(S3, tmp_path / "f")
    assert len(str(caught.value)) < 1200


def test_retries_uploads_and_sessions_leave_the_programs_random_numbers_as_they_are(
    content_file: Path,
) -> None:
    random.seed(7)
    before = random.getstate()
    answers = [UNAVAILABLE, answer([]), HangUp(), answer([]), ran(), ran()]
    answers += [answer({"s3_url": S3}), answer({"deleted_count": 0})]
    with Script(*answers) as server, client_of(server) as client:
        assert client.list_prefabs() == client.list_prefabs() == []
        client.run_batch([call(), call()], max_workers=1)
        client.upload_file(content_file)
        with client.temp_session():
            pass
    assert len(server.received) == 8 and random.getstate() == before
    with contextlib.suppress(ServiceUnavailableError):
        run(GatewayClient("http://127.0.0.1:1", max_retries=2))
    assert random.getstate() == before


def test_programs_that_seed_their_random_numbers_alike_do_not_wait_alike(
    refusing: str, real_delays: list[float]
) -> None:
    for _ in range(2):
        random.seed(7)
        with pytest.raises(ServiceUnavailableError):
            GatewayClient(f"http://{refusing}", max_retries=3).list_prefabs()
    assert len(real_delays) == 6 and real_delays[:3] != real_delays[3:]


with_signals = pytest.mark.skipif(
    not hasattr(signal, "pthread_kill"), reason="no signals to a thread here"
)


SIGNAL = getattr(signal, "SIGUSR1", None)


@contextlib.contextmanager
def handling(act: Callable[[], object], number: Any = SIGNAL) -> Iterator[list[BaseException]]:
    """A signal has the main thread do this, wherever it is. Gives what that raises."""
    raised: list[BaseException] = []

    def handle(*_: object) -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)
            raise

    before = signal.signal(number, handle)
    try:
        yield raised
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(number, before)


def interrupt(_: object = None) -> None:
    """Sends the signal to the main thread, which has most likely read what was sent before."""
    threading.Event().wait(0.005)
    signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)


def signalled(sent: bytes = b"") -> Steps:
    """Sends these bytes and the signal, and then nothing more."""
    return Steps((send(sent), interrupt, lambda sock: sock.recv(1)))


def both_signalled() -> list[Answer]:
    """No answer to two requests; when both are there, the signal."""
    met = threading.Barrier(2)

    def wait(_: object) -> None:
        met.wait(WAIT_SECONDS)

    def end(sock: socket.socket) -> None:
        sock.recv(1)

    return [Steps((wait, interrupt, end)), Steps((wait, end))]


# What is being done when the signal comes: how the requests are answered, and what waits for it.
MOMENTS: dict[str, tuple[Callable[[], list[Answer]], Callable[[GatewayClient, Path], Any]]] = {
    "before the head": (lambda: [signalled()], lambda c, f: run(c)),
    "before the head of a GET": (lambda: [signalled()], lambda c, f: c.list_prefabs()),
    "in the head": (lambda: [signalled(OK[:10])], lambda c, f: run(c)),
    "in the body": (lambda: [signalled(ran()[:-5])], lambda c, f: run(c)),
    "in the body of a GET": (lambda: [signalled(PAGE[:-5])], lambda c, f: c.list_files()),
    "between chunks": (lambda: [signalled(OPEN_STREAM)], lambda c, f: run(c)),
    "behind done": (
        lambda: [signalled(chunked(event("content", "a"), event("done"), end=False))],
        lambda c, f: run(c)),
    "in a stream": (lambda: [signalled(OPEN_STREAM)], lambda c, f: list(run(c, stream=True))),
    "in an error's body": (lambda: [signalled(UNAVAILABLE[:-5])], lambda c, f: run(c)),
    "between attempts": (
        lambda: [Steps((send(answer(None, 503, Retry_After="50")), interrupt))],
        lambda c, f: c.list_prefabs()),
    "in a download": (
        lambda: [LINK, signalled(answer(body=b"0123456789")[:-5])],
        lambda c, f: c.download_file(S3, f / "new")),
    "in an exchange": (
        lambda: [signalled()],
        lambda c, f: GatewayClient.from_api_key("key-1", c.base_url, timeout=WAIT_SECONDS)),
    "in a batch": (both_signalled, lambda c, f: c.run_batch([call(), call()])),
    "in a single request": (
        lambda: [signalled()], lambda c, f: c.run_batch([call(), call()], single_request=True)),
}  # fmt: skip


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def read_in_vain() -> None:
    """Fails where the SDK itself may: in a read of a socket."""
    ours, peer = socket.socketpair()
    with ours, peer, ours.makefile("rb") as file:
        ours.settimeout(0.001)
        file.read(1)


# Of a request that a handler or a callback makes itself.
OTHERS_ERRORS = {
    "a 503 of another call": ServiceUnavailableError._create("mine", status_code=503),
    "a 403 of another call": AuthenticationError._create("mine", status_code=403),
    "a 401 of another call": AuthenticationError._create("mine", status_code=401),
    "a 422 of another call": ValidationError._create(
        "mine: Missing required parameter: n", status_code=422),
    "another call that is lost": ServiceUnavailableError._create("mine", _fault="lost"),
    "another call without a connection": ServiceUnavailableError._create(
        "mine", _fault="unreachable"),
}  # fmt: skip
HANDLERS: dict[str, Callable[[], Callable[[], object]]] = {
    **{type(error).__name__: lambda error=error: raising(copy.copy(error)) for error in (
        TimeoutError("mine"), ConnectionResetError("mine"), BrokenPipeError("mine"),
        OSError(5, "mine"), InterruptedError("mine"), BlockingIOError("mine"), EOFError("mine"),
        ssl.SSLError("mine"),
        ssl.SSLWantReadError("mine"), http.client.RemoteDisconnected("mine"), ValueError("mine"),
        ServiceUnavailableError("mine"), GatewayTimeoutError("mine"), StopIteration("mine"),
        socket.gaierror(-2, "mine"), UnicodeError("mine"), SystemExit(3), KeyboardInterrupt())},
    **{name: lambda error=error: raising(error) for name, error in OTHERS_ERRORS.items()},
    "a missing file": lambda: (ROOT / "missing").read_bytes,
    "a socket of its own": lambda: read_in_vain,
}  # fmt: skip


def check_what_a_handler_raises(handler: str, act: Callable[[], Any], number: Any = SIGNAL) -> None:
    with handling(HANDLERS[handler](), number) as raised:
        if number != SIGNAL:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
        try:
            act()
        except BaseException as error:
            assert raised == [error]
        else:
            raise AssertionError("what the handler raised is lost")


@with_signals
@pytest.mark.parametrize(
    "handler",
    ["TimeoutError", "ConnectionResetError", "another call without a connection",
     "a 422 of another call"],
)
@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_signal_handler_raises_is_the_callers_whenever_it_comes(
    moment: str, handler: str, tmp_path: Path
) -> None:
    make_answers, act = MOMENTS[moment]
    answers = make_answers()
    with Script(*answers, ran()) as server, client_of(server) as client:
        check_what_a_handler_raises(handler, lambda: act(client, tmp_path))
        assert len(server.received) == len(answers)
        assert run(client).is_success()
    assert not list(tmp_path.iterdir())


@with_signals
@pytest.mark.parametrize("act", [run, lambda c: list(run(c, stream=True))], ids=["call", "stream"])
def test_a_stop_iteration_of_a_signal_handler_ends_no_answer_early(act: Any) -> None:
    with Script(signalled(OPEN_STREAM)) as server, client_of(server) as client:
        with handling(raising(StopIteration("mine"))), pytest.raises(
            (StopIteration, RuntimeError)
        ) as caught:
            act(client)
    # It cannot come out of an iterator as it is.
    assert "mine" in repr([caught.value, caught.value.__cause__])


@with_signals
@pytest.mark.parametrize("handler", HANDLERS)
def test_whatever_a_signal_handler_raises_is_the_callers(handler: str, script: Any) -> None:
    with script(signalled(), ran()) as server, client_of(server) as client:
        check_what_a_handler_raises(handler, client.list_prefabs)
        assert len(server.received) == 1
        assert run(client).is_success()


@with_signals
@full_queues
@pytest.mark.parametrize(
    "handler",
    ["TimeoutError", "ConnectionResetError", "ValueError", "UnicodeError", "gaierror",
     "another call without a connection", "a socket of its own"],
)  # fmt: skip
def test_what_a_signal_handler_raises_while_a_connection_is_made_is_the_callers(
    handler: str,
) -> None:
    with Place(dead=True) as dead:
        client = GatewayClient("http://{}:{}".format(*dead.address), timeout=WAIT_SECONDS)
        check_what_a_handler_raises(handler, lambda: run(client), signal.SIGALRM)


@with_signals
@pytest.mark.parametrize(
    "handler", ["TimeoutError", "ConnectionResetError", "BrokenPipeError", "a socket of its own"]
)
@pytest.mark.parametrize("upload", ["permanent", "input"])
def test_what_a_signal_handler_raises_while_a_file_is_sent_is_the_callers(
    upload: str, handler: str, tmp_path: Path
) -> None:
    ended = threading.Event()
    heads: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        heads.append(read_head(sock)[0])
        if b"generate_upload_url" in heads[-1]:
            given_url = {"upload_url": f"{server.url}/storage/in?sig=x", "s3_url": "s3://b/in"}
            sock.sendall(answer(given_url, Connection="close"))
        else:
            interrupt()
            ended.wait(WAIT_SECONDS)

    with open(tmp_path / "in.bin", "wb") as file:
        file.truncate(64 * 2**20)
    with Raw(serve) as server, client_of(server) as client:
        check_what_a_handler_raises(handler, lambda: UPLOADS[upload](client, tmp_path / "in.bin"))
        ended.set()
    assert len(heads) == (1 if upload == "permanent" else 2)


# What a handler or a finalizer does with the client.
USES: dict[str, Callable[[GatewayClient], Any]] = {
    "call": lambda c: run(c).is_success(),
    "GET": lambda c: c.list_prefabs() == [],
    "stream": lambda c: len(list(run(c, stream=True))) == 2,
    "single request": lambda c: c.run_batch([call(), call()], single_request=True).all_success(),
    "presigned URL": lambda c: c.get_presigned_url(S3) == "http://h/",
    "copy": lambda c: run(pickle.loads(pickle.dumps(c))).is_success(),
    "close": lambda c: c.close() is None,
}


class Exchanging(Routed):
    """A gateway whose first token is over. Before it gives the second one, it calls `meanwhile`."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.tokens = 0
        self._meanwhile = meanwhile
        super().__init__(self._choose)

    def _choose(self, received: Received) -> Answer:
        if is_exchange(received):
            self.tokens += 1
            given = send(answer({"internal_token": f"token-{self.tokens}"}))
            return Steps((lambda _: self._meanwhile(), given) if self.tokens == 2 else (given,))
        if received.headers["x-internal-token"] == "token-1":
            return REFUSED
        if received.method == "POST":
            entry = {"status": "SUCCESS", "output": "ok"}
            return answer({"results": [entry] * len(received.json["calls"])})
        return answer({"presigned_url": "http://h/"} if "download" in received.target else [])


@with_signals
@pytest.mark.parametrize("use", USES)
def test_a_signal_handler_may_use_the_client_while_its_thread_exchanges_the_key(use: str) -> None:
    used = threading.Event()

    def meanwhile() -> None:
        interrupt()
        used.wait(WAIT_SECONDS)

    def handle() -> None:
        signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS / 2)
        assert USES[use](client)
        signal.setitimer(signal.ITIMER_REAL, 0)
        used.set()

    stuck = AssertionError("it waits for what its own thread holds")
    with Exchanging(meanwhile) as server, handling(raising(stuck), signal.SIGALRM):
        client = GatewayClient.from_api_key("key-1", server.url, timeout=WAIT_SECONDS)
        with handling(handle) as raised:
            assert run(client).is_success() and run(client).is_success()
    assert not raised and used.is_set() and server.tokens <= 4


@pytest.mark.parametrize("use", ["call", "GET"])
def test_a_finalizer_may_use_the_client_at_any_moment_of_an_exchange(use: str) -> None:
    """Before every eleventh line of the thread that makes the call."""
    unexpected: list[tuple[int, BaseException]] = []
    reached = True

    def act(client: GatewayClient, at: int) -> None:
        nonlocal reached
        try:
            with interrupted(at, lambda: USES[use](client)) as left:
                assert run(client).is_success()
        except BaseException as error:
            unexpected.append((at, error))
        reached = left[0] <= 0

    for at in itertools.count(1, 11):
        with Exchanging() as server:
            client = GatewayClient.from_api_key("key-1", server.url, timeout=WAIT_SECONDS)
            thread = threading.Thread(target=act, args=(client, at), daemon=True)
            thread.start()
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive(), f"used at line {at}, it waits for its own thread"
        if not reached:
            break
    assert not unexpected and at > 100


# --- Event stream ---------------------------------------------------------------------------------

WHOLE_STREAM = chunked(event("content", 1), event("done"))
OPEN_STREAM = HEAD + chunk(event("content", 1) + event("content", 2))  # nothing more comes


def test_each_event_is_handed_over_when_it_has_arrived() -> None:
    taken = [threading.Event() for _ in range(3)]
    steps: list[Any] = [send(HEAD)]
    for number, gate in enumerate(taken):
        steps += [
            send(chunk(event("content", number))),
            lambda _, gate=gate: gate.wait(WAIT_SECONDS),
        ]
    with Script(Steps((*steps, send(b"0\r\n\r\n")))) as server:
        for number, received in enumerate(run(client_of(server), stream=True)):
            assert received.data == number and not taken[number].is_set()
            taken[number].set()
    assert all(gate.is_set() for gate in taken)


def parsed(*chunks: bytes) -> list[tuple[str, Any]]:
    parsed_lists = gateway_sdk._parse_events(iter(chunks))
    return [(str(event.type), event.data) for events in parsed_lists for event in events]


def content(*values: Any) -> list[tuple[str, Any]]:
    return [("content", value) for value in values]


A, B = b'{"type": "content", "data": "a"}', b'{"type": "content", "data": "b"}'
FORMATS = {
    "lf": (b"data: %b\n\ndata: %b\n\n" % (A, B), content("a", "b")),
    "lf-crlf": (b"data: %b\n\r\ndata: %b\r\n\n" % (A, B), content("a", "b")),
    "cr-crlf": (b"data: %b\r\r\ndata: %b\r\n\r" % (A, B), content("a", "b")),
    "crlf-then-lf": (b"data: one\r\n\ndata: two\r\n\n", content("one", "two")),
    "cr-lf-are-one-end": (b"data: 1\r\ndata: 2\r\n\r\n", content(1, 2)),
    "many-blank-lines": (b"\n\n\n\r\r\n\ndata: %b\n\n\n\n\n\ndata: %b\n\n" % (A, B),
                         content("a", "b")),
    "no-space": (b"data:%b\n\n" % A, content("a")),
    "one-space-only-is-taken": (b"data:  text \n\n", content(" text ")),
    "several-data-lines": (b'data: {"type": "content",\ndata: "data": "a"}\n\n', content("a")),
    "empty-data-line-between": (b"data: one\ndata\ndata: two\n\n", content("one\n\ntwo")),
    "event-field": (b"event: progress\ndata: 5\n\n", [("progress", 5)]),
    "event-field-does-not-last": (b"event: progress\ndata: 5\n\ndata: 6\n\n",
                                  [("progress", 5), ("content", 6)]),
    "event-field-of-text": (b"event: error\ndata: it broke\n\n", [("error", "it broke")]),
    "type-wins-over-event-field": (b"event: progress\ndata: %b\n\n" % A, content("a")),
    "id-and-retry": (b"id: 7\nretry: 100\ndata: %b\nid\nretry: x\n\n" % A, content("a")),
    "unknown-field": (b"datum: 1\nDATA: 2\n data: 3\ndata : 4\ndata: %b\n\n" % A, content("a")),
    "comments": (b": keep-alive\n\n:\n\n:data: 9\ndata: %b\n: x\n\n" % A, content("a")),
    "comment-inside": (b"data: one\n: x\ndata: two\n\n", content("one\ntwo")),
    "byte-order-mark": (b"\xef\xbb\xbfdata: %b\n\n" % A, content("a")),
    "second-byte-order-mark": (b"\xef\xbb\xbf\xef\xbb\xbfdata: 1\n\ndata: %b\n\n" % A,
                               content("a")),
    "later-byte-order-mark": (b"data: %b\n\n\xef\xbb\xbfdata: 1\n\n" % A, content("a")),
    "utf-8": ("data: {\"data\": \"äß€😀\"}\n\ndata: ü€😀\n\n".encode(),
              content({"data": "äß€😀"}, "ü€😀")),
    "not-utf-8": (b"data: a\xffb\n\n", content("a\ufffdb")),
    "other-line-separators": ("data: a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\n\n".encode(),
                              content("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg")),
    "line-separator-in-json": ('data: {"type": "content", "data": "a\u2028b"}\n\n'.encode(),
                               content("a\u2028b")),
    "no-data": (b"event: done\n\nid: 1\n\ndata:\n\ndata: %b\n\n" % A, content("a")),
    "blank-lines-left-out": (b"data: %b\ndata: %b\ndata: [DONE]\n" % (A, B),
                             [*content("a", "b"), ("done", "[DONE]")]),
    "one-line-not-json": (b"data: %b\ndata: b\n\n" % A, content(A.decode() + "\nb")),
    "done-marker": (b"data: %b\n\ndata: [DONE]\n\n" % A, [("content", "a"), ("done", "[DONE]")]),
    "not-json": (b"data: hello\n\n", content("hello")),
    "json-with-a-tail": (b"data: %b tail\n\n" % A, content(A.decode() + " tail")),
    "json-with-white-space": (b"data: \t %b \t\n\n" % A, content("a")),
    "json-without-type": (b'data: {"text": "a"}\n\n', content({"text": "a"})),
    "json-not-an-object": (b'data: [1]\n\ndata: "s"\n\ndata: null\n\ndata: 0\n\n',
                           content([1], "s", None, 0)),
    "type-not-text": (b'data: {"type": 3, "data": 4}\n\n', content(4)),
    "type-unknown": (b'data: {"type": "delta", "data": "a"}\n\n', content("a")),
    "types": (b"".join(map(event, ("start", "content", "progress", "error", "done"))),
              [(name, None) for name in ("start", "content", "progress", "error", "done")]),
    "no-last-blank-line": (b"data: %b\n\ndata: %b\n" % (A, B), content("a", "b")),
    "no-last-line-end": (b"data: %b\n\ndata: %b" % (A, B), content("a", "b")),
    "too-deep": (b"data: " + b"[" * 5000 + b"\n\n", content("[" * 5000)),
    "long-number": (b"data: " + b"9" * 5000 + b"x\n\n", content("9" * 5000 + "x")),
    "empty": (b"", []),
    "only-line-ends": (b"\r\n\r\n\n\r", []),
}


@pytest.mark.parametrize(("stream", "expected"), FORMATS.values(), ids=FORMATS)
def test_the_event_stream_format_is_read_however_the_bytes_are_cut(
    stream: bytes, expected: Any
) -> None:
    ends = [] if b"\r" in stream else [b"\r\n", b"\r"]
    for text in {stream, *(stream.replace(b"\n", end) for end in ends)}:
        assert parsed(text) == expected
        assert parsed(*(text[index : index + 1] for index in range(len(text)))) == expected
        for place in range(0, len(text), 1 + len(text) // 200):
            assert parsed(text[:place], b"", text[place:]) == expected


@pytest.mark.parametrize("blank", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\n\r", b"\r\n\r"])
def test_an_event_is_handed_over_with_its_blank_line(blank: bytes) -> None:
    taken: list[bytes] = []

    def chunks() -> Iterator[bytes]:
        for chunk in (b"data: 1", blank[:1], blank[1:], b"data: 2", blank):
            taken.append(chunk)
            yield chunk

    events = gateway_sdk._parse_events(chunks())
    assert ([event.data for event in next(events)], len(taken)) == ([1], 3)
    assert ([event.data for event in next(events)], len(taken)) == ([2], 5)
    assert list(events) == []


def test_an_event_keeps_its_whole_object() -> None:
    raw = {"type": "error", "data": {"message": "m"}, "error_code": "E"}
    known = StreamEvent.from_dict(raw)
    assert (known.type, known.data, known.raw) == (StreamEventType.ERROR, {"message": "m"}, raw)
    unknown = StreamEvent.from_dict({"type": "thought", "data": 1})
    assert (unknown.type, unknown.data, unknown.raw["type"]) == ("content", 1, "thought")


@pytest.mark.parametrize("odd", [5, None, ["content"], {"a": 1}, True, 1.5], ids=repr)
def test_an_event_whose_type_is_no_text_is_content_with_its_data(odd: Any) -> None:
    ((first,),) = gateway_sdk._parse_events(
        iter([b"data: %b\n\n" % json.dumps({"type": odd, "data": 1}).encode()])
    )
    assert first.type == StreamEventType.CONTENT
    assert first.data == 1
    assert first.raw == {"type": odd, "data": 1}
    assert StreamEvent.from_dict(first.raw) == first


DONE, ERROR = ("done", None), ("error", "x")
A_EVENT, HALF = b"data: %b\n\n" % A, b'data: {"type": "content", "data": "b'
# The answer, the events that are read from it, and the error behind them.
ENDS: dict[str, tuple[Answer, list[tuple[str, Any]], type[GatewayError] | None]] = {
    "chunked-done": (chunked(A_EVENT, event("done")), [*content("a"), DONE], None),
    "chunked-without-last-blank-line": (chunked(A_EVENT[:-2]), content("a"), None),
    "length-done": (whole(A_EVENT + event("done"), STREAM), [*content("a"), DONE], None),
    "unframed-done": (unframed(A_EVENT + event("done"), STREAM), [*content("a"), DONE], None),
    "unframed-done-without-blank-line": (
        unframed(A_EVENT + event("done").strip(), STREAM), [*content("a"), DONE], None),
    "unframed-error": (unframed(A_EVENT + event("error", "x"), STREAM), [*content("a"), ERROR],
                       None),
    "unframed-without-done": (unframed(A_EVENT, STREAM), content("a"), ServiceUnavailableError),
    "unframed-error-and-content": (
        unframed(event("error", "x") + A_EVENT, STREAM),
        [ERROR, *content("a")], ServiceUnavailableError),
    "unframed-error-and-progress": (
        unframed(event("error", "x") + event("progress"), STREAM),
        [ERROR, ("progress", None)], ServiceUnavailableError),
    "unframed-done-and-content": (
        unframed(event("done") + A_EVENT, STREAM),
        [DONE, *content("a")], ServiceUnavailableError),
    "unframed-content-and-start": (
        unframed(A_EVENT + event("start"), STREAM),
        [*content("a"), ("start", None)], ServiceUnavailableError),
    "unframed-two-dones": (
        unframed(event("done") + A_EVENT + event("done"), STREAM),
        [DONE, *content("a"), DONE], None),
    "unframed-error-and-comment": (
        unframed(event("error", "x") + b": bye\n\n", STREAM), [ERROR], None),
    "unframed-nothing": (unframed(b"", STREAM), [], ServiceUnavailableError),
    "unframed-in-an-event": (unframed(A_EVENT + HALF, STREAM), content("a"),
                             ServiceUnavailableError),
    "events-after-done": (chunked(event("done"), A_EVENT), [DONE, *content("a")], None),
    "events-after-error-and-done": (
        chunked(event("error", "x"), A_EVENT, event("done")), [ERROR, *content("a"), DONE], None),
    "cut": (HangUp(chunked(A_EVENT, end=False)), content("a"), ServiceUnavailableError),
    "cut-in-a-chunk": (HangUp(chunked(A_EVENT, HALF, end=False)[:-9]), content("a"),
                       ServiceUnavailableError),
    "bad-chunk": (HangUp(chunked(A_EVENT, end=False) + b"-1\r\n"), content("a"),
                  ServiceUnavailableError),
    "silence": (Pause(chunked(A_EVENT, end=False)), content("a"), GatewayTimeoutError),
    "done-then-cut": (HangUp(chunked(A_EVENT, event("done"), end=False)), [*content("a"), DONE],
                      None),
    "done-then-silence": (Pause(chunked(A_EVENT, event("done"), end=False)), [*content("a"), DONE],
                          None),
    "error-then-cut": (HangUp(chunked(event("error", "x"), end=False)), [ERROR], None),
    "error-and-content-then-cut": (
        HangUp(chunked(event("error", "x"), A_EVENT, end=False)), [ERROR, *content("a")],
        ServiceUnavailableError),
    "done-and-content-then-cut": (
        HangUp(chunked(event("done"), A_EVENT, end=False)),
        [DONE, *content("a")], ServiceUnavailableError),
    "done-and-progress-then-cut": (
        HangUp(chunked(event("done"), event("progress"), end=False)),
        [DONE, ("progress", None)], ServiceUnavailableError),
    "done-and-content-then-silence": (
        Pause(chunked(event("done"), A_EVENT, end=False)),
        [DONE, *content("a")], GatewayTimeoutError),
    "error-then-silence": (Pause(chunked(event("error", "x"), end=False)),
        [ERROR], None),
    "error-and-content-then-silence": (
        Pause(chunked(event("error", "x"), A_EVENT, end=False)),
        [ERROR, *content("a")], GatewayTimeoutError),
    "error-and-done-then-cut": (
        HangUp(chunked(event("error", "x"), event("done"), end=False)),
        [ERROR, DONE], None),
    "done-content-done-then-cut": (
        HangUp(chunked(event("done"), A_EVENT, event("done"), end=False)),
        [DONE, *content("a"), DONE], None),
    "done-then-cut-in-a-comment": (
        HangUp(chunked(A_EVENT, event("done"), b": keep-al", end=False)),
        [*content("a"), DONE], None),
    "done-cut-before-the-blank-line": (
        HangUp(chunked(A_EVENT, event("done")[:-1], end=False)), content("a"),
        ServiceUnavailableError),
}


@pytest.mark.parametrize(("given", "events", "error"), ENDS.values(), ids=ENDS)
def test_a_stream_never_just_ends_as_if_it_were_complete(
    given: Answer, events: list[Any], error: Any
) -> None:
    """Neither where its events are read one by one, nor where its result is asked for."""
    timeout = SHORT_SECONDS if isinstance(given, Pause) else WAIT_SECONDS
    contents = [data for kind, data in events if kind == "content"]
    got, raised = [], None
    with (
        nothing_left(),
        Script(given, given) as server,
        client_of(server, timeout=timeout) as client,
    ):
        try:
            with run(client, stream=True) as stream:
                for event in stream:
                    got.append((str(event.type), event.data))
        except GatewayError as caught:
            raised = type(caught)
        assert (got, raised, len(server.received)) == (events, error, 1)
        if error:
            with pytest.raises(error) as broken:
                run(client)
            assert (type(broken.value), broken.value.may_have_run) == (error, True)
            assert broken.value.details["partial_output"] == contents
        else:
            result = run(client)
            assert result.is_success() == (ERROR not in events)
            assert result.get_function_result() == "".join(contents)


@pytest.mark.parametrize(
    ("timeout", "after_done"), [(None, SHORT_SECONDS), (SHORT_SECONDS, 10 * WAIT_SECONDS)]
)
@pytest.mark.parametrize("last", ["done", "error"])
def test_after_done_or_error_the_timeout_is_waited_or_a_minute_where_there_is_none(
    last: str, timeout: float | None, after_done: float, monkeypatch: Patch
) -> None:
    """And then the client hangs up."""
    hung_up = []

    def serve(sock: socket.socket) -> None:
        sock.sendall(chunked(event(last), end=False))
        sock.settimeout(WAIT_SECONDS)
        hung_up.append(sock.recv(1))

    monkeypatch.setattr(gateway_sdk, "_AFTER_DONE_SECONDS", after_done)
    with Script(Steps((serve,))) as server, client_of(server, timeout=timeout) as client:
        assert [event.type for event in run(client, stream=True)] == [last]
    assert hung_up == [b""]


@pytest.mark.parametrize("last", ["done", "error"])
def test_what_follows_done_or_error_after_a_while_is_handed_over_too(
    last: str, monkeypatch: Patch
) -> None:
    """As the gateway's file URLs do, which it sends when its uploads are finished."""
    # Which is only for a client that has no timeout.
    monkeypatch.setattr(gateway_sdk, "_AFTER_DONE_SECONDS", SHORT_SECONDS)
    never = threading.Event()
    steps = (
        send(chunked(A_TEXT, event(last, {"n": 1}), end=False)),
        lambda _: never.wait(2 * SHORT_SECONDS),
        send(chunk(event("done", WITH_FILES)) + LAST_CHUNK),
    )
    with Script(Steps(steps)) as server:
        events = list(run(client_of(server), stream=True))
    told = [("content", "a"), (last, {"n": 1}), ("done", WITH_FILES)]
    assert [(received.type, received.data) for received in events] == told


@pytest.mark.parametrize("last", ["done", "error"])
def test_a_stream_whose_last_event_has_no_blank_line_does_not_wait_for_the_next_call(
    last: str,
) -> None:
    """Its connection is that call's by then."""
    read_to_its_end = threading.Event()
    body = chunked(A_TEXT, event(last)[:-1])
    call_of_another = Steps((lambda _: read_to_its_end.wait(WAIT_SECONDS), send(ran())))
    with Script(body, call_of_another) as server, client_of(server) as client:
        stream = run(client, stream=True)
        assert [next(stream).type, next(stream).type] == ["content", last]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            other = pool.submit(run, client, timeout=3)
            server.wait_until(lambda: len(server.received) == 2)
            assert list(stream) == []
            still_waited = not other.done()
            read_to_its_end.set()
            assert other.result().is_success() and still_waited
    assert [received.connection for received in server.received] == [0, 0]


@pytest.mark.parametrize(
    "pieces",
    [[event("done", 1)] * 6,
     [event("done", 1) + event("content", 1), *[b": keep-alive\n\n"] * 5, event("done", 1)]],
    ids=["events all the time", "no longer done"],
)  # fmt: skip
def test_an_event_after_done_starts_the_wait_anew(pieces: list[bytes]) -> None:
    never = threading.Event()
    steps: list[Any] = [send(HEAD)]
    for piece in pieces:
        steps += [send(chunk(piece)), lambda _: never.wait(0.1)]
    with Script(Steps((*steps, send(LAST_CHUNK)))) as server:
        events = list(run(client_of(server), stream=True, timeout=0.4))
    assert len(events) == b"".join(pieces).count(b"data:")


HEARTBEAT = b'data: {"type": "ping"}\n\n'
# What a server may send that is no event, or one that says nothing.
NO_EVENTS = {
    "heartbeats": HEARTBEAT,
    "silence": b"",
    "comments": b": keep-alive\n\n",
    "blank lines": b"\r\n\r\n",
    "a name": b"event: ping\n\n",
    "other fields": b"id: 7\nretry: 1\n\n",
    "data without an end": b"data: 1\n",
    "a line without an end": b"x",
}


def going_on(last: str, filler: str, hung_up: list[str]) -> Steps:
    """Sends `done` or `error`, then what is no event again and again, until the client hangs up."""

    def serve(sock: socket.socket) -> None:
        sock.sendall(chunked(A_TEXT, event(last), end=False))
        sock.settimeout(0.02)
        for _ in range(int(WAIT_SECONDS / 2 / 0.02)):
            try:
                if NO_EVENTS[filler]:
                    sock.sendall(chunk(NO_EVENTS[filler]))
                if not sock.recv(1):
                    break
            except socket.timeout:
                continue
            except OSError:
                break
        else:
            return  # it would read on for ever
        hung_up.append(f"{last}, {filler}")

    return Steps((serve,))


@pytest.mark.parametrize("beat", [HEARTBEAT, b"event: ping\ndata: {}\n\n"], ids=repr)
def test_a_heartbeat_behind_done_changes_nothing(beat: bytes) -> None:
    done = A_TEXT + event("done") + beat
    apart = chunked(A_TEXT, event("done"), beat, end=False)
    for given in (HangUp(chunked(done, end=False)), HangUp(apart), unframed(done, STREAM)):
        with Script(given, given) as server, client_of(server) as client:
            assert run(client).get_function_result() == "a"
            assert len(list(run(client, stream=True))) == 3


@pytest.mark.parametrize("last", ["done", "error"])
def test_a_stream_ends_when_the_timeout_has_brought_no_event_after_done_or_error(last: str) -> None:
    hung_up: list[str] = []
    with Script(going_on(last, "comments", hung_up)) as server:
        stream = run(client_of(server), stream=True, timeout=0.3)
        assert [received.type for received in stream] == ["content", last]
        server.wait_until(lambda: server.open_connections == 0)
    assert hung_up == [f"{last}, comments"]


def test_a_result_is_there_when_the_timeout_has_brought_no_event_after_done_or_error() -> None:
    """Whatever else comes. All at once, as each takes its time."""
    cases = [*itertools.product(("done", "error"), NO_EVENTS)]
    hung_up: list[str] = []

    def choose(received: Received) -> Answer:
        return going_on(*cases[received.json["calls"][0]["inputs"]["parameters"]["n"]], hung_up)

    with Routed(choose) as server, client_of(server) as client:
        calls = [call(number) for number in range(len(cases))]
        batch = client.run_batch(calls, max_workers=len(calls), timeout=0.4)
        server.wait_until(lambda: server.open_connections == 0)
    assert [result.get_function_result() for result in batch.results] == ["a"] * len(cases)
    succeeded = [result.is_success() for result in batch.results]
    assert succeeded == [last == "done" for last, _ in cases]
    assert sorted(hung_up) == sorted(f"{last}, {filler}" for last, filler in cases)


THREE_RESULTS = json.dumps({"results": [{"status": "SUCCESS", "output": {"output": "ok"}}] * 3})
ONE_RESULT = RUN_BODY % b'"ok"'
# A body that comes as an event stream, but has no event in it.
NO_STREAMS: dict[str, bytes] = {
    "nothing": b"",
    "blank lines": b"\r\n\n\n",
    "byte order mark": b"\xef\xbb\xbf",
    "comments": b": welcome\n\n: keep-alive\n\n",
    "event without data": b"event: done\n\n",
    "unknown event with empty data": b"event: ping\ndata:\n\ndata: \n\n",
    "id and retry": b"id: 1\nretry: 1000\n\n",
    "JSON lines": b'{"type": "content", "data": "a"}\n{"type": "done", "data": null}\n',
    "JSON lines with blank lines": b'{"type": "content", "data": "a"}\n\n{"type": "done"}\n\n',
    "an event as bare JSON": b'{"type": "content", "data": "a"}',
    "page": b"<html>\n<title>Bad gateway</title>\n</html>\n",
    "text": b"Internal Server Error",
    "half of a result": ONE_RESULT[:-3],
    "other JSON": b'{"results": []}',
    "list": b"[1, 2]",
    "null": b"null",
    "error": b'{"detail": "the function is gone"}',
    "coded error": b'{"error_code": "E", "message": "the function is gone"}',
}


@pytest.mark.parametrize("name", NO_STREAMS)
def test_a_stream_without_an_event_is_an_error_that_shows_what_came(name: str) -> None:
    payload = NO_STREAMS[name]
    given = chunked(*filter(None, [payload[:9], payload[9:]]))
    with Script(given, given, whole(payload, STREAM), ran("second")) as server:
        client = client_of(server, max_retries=0)
        for act in (run, lambda c: list(run(c, stream=True)), run):
            with pytest.raises(GatewayError) as caught:
                act(client)
            error = caught.value
            assert type(error) is GatewayError and error.status_code == 200 and error.may_have_run
            shown = payload.decode("utf-8-sig").strip()[:20].partition("\n")[0]
            assert (shown in str(error) or "error" in name) and ENDPOINTS["run"].asked in str(error)
            assert "gone" in str(error) or "error" not in name
        assert run(client).get_function_result() == "second"


# How one result is written into a body that comes as an event stream.
RESULT_BODIES: dict[str, bytes] = {
    "one line": ONE_RESULT,
    "line end behind it": ONE_RESULT + b"\r\n",
    "blanks in front": b"\n\n  " + ONE_RESULT,
    "indented": json.dumps(json.loads(ONE_RESULT), indent=2).encode(),
    "blank lines inside": ONE_RESULT.replace(b", ", b",\n\n"),
    "byte order mark": b"\xef\xbb\xbf" + ONE_RESULT,
    "carriage returns": json.dumps(json.loads(ONE_RESULT), indent=0).replace("\n", "\r").encode(),
    "raw tab": ONE_RESULT.replace(b'"j"', b'"\t"'),
}


@pytest.mark.parametrize("name", RESULT_BODIES)
def test_a_result_that_comes_as_an_event_stream_is_no_less_a_result(name: str) -> None:
    payload = RESULT_BODIES[name]
    given = chunked(payload[:9], payload[9:])
    ended = unframed(payload, STREAM)
    with Script(given, given, whole(payload, STREAM), ended, ended) as server:
        client = client_of(server)
        for stream in (False, True, False, True, False):
            if stream:
                content, done = run(client, stream=True)
                assert (content.data["output"], done.type) == ("ok", "done")
            else:
                result = run(client)
                assert result.is_success() and result.get_function_result() == "ok"


def test_a_failed_result_that_comes_as_an_event_stream_is_its_error() -> None:
    given = whole(b'{"results": [{"status": "FAILED", "error": {"message": "m"}}]}', STREAM)
    with Script(given, given) as server, client_of(server) as client:
        assert run(client).error == {"message": "m"}
        (failed,) = run(client, stream=True)
    assert (failed.type, failed.data) == ("error", {"message": "m"})


# Events whose data is empty, or a marker, and the types that they have. All end their stream.
EMPTY_EVENTS: dict[str, tuple[bytes, list[str]]] = {
    "error": (b"event: error\ndata:\n\n", ["error"]),
    "error without a colon": (b"event: error\ndata\n\n", ["error"]),
    "error with a blank": (b"event:error\ndata: \n\n", ["error"]),
    "error, data first": (b"data:\nevent: error\n\n", ["error"]),
    "error with CRLF": (b"event: error\r\ndata:\r\n\r\n", ["error"]),
    "error and done": (b"event: error\ndata:\n\nevent: done\ndata:\n\n", ["error", "done"]),
    "done": (b"event: done\ndata:\n\n", ["done"]),
    "done without a colon": (b"event: done\ndata\n\n", ["done"]),
    "start and done": (b"event: start\ndata:\n\nevent: done\ndata: \n\n", ["start", "done"]),
    "progress and done": (
        b"event: progress\ndata:\n\nevent: done\ndata:\n\n", ["progress", "done"]),
    "content and done": (b"event: content\ndata:\n\nevent: done\ndata:\n\n", ["content", "done"]),
    "unknown and done": (b"event: ping\ndata:\n\nevent: done\ndata:\n\n", ["done"]),
    "marker": (b"data: [DONE]\n\n", ["done"]),
    "marker with a blank behind": (b"data: [DONE] \n\n", ["done"]),
    "marker with a blank in front": (b"data:  [DONE]\n\n", ["done"]),
    "marker with tabs around": (b"data:\t[DONE] \t\n\n", ["done"]),
    "marker with CRLF": (b"data: [DONE] \r\n\r\n", ["done"]),
    "marker of an event": (b"event: done\ndata: [DONE] \n\n", ["done"]),
}  # fmt: skip


@pytest.mark.parametrize("framed", [True, False], ids=["framed", "unframed"])
@pytest.mark.parametrize("name", EMPTY_EVENTS)
def test_an_event_may_say_all_by_its_name(name: str, framed: bool) -> None:
    written, types_ = EMPTY_EVENTS[name]
    given = whole(A_TEXT + written, STREAM) if framed else unframed(A_TEXT + written, STREAM)
    with Script(given, given) as server, client_of(server) as client:
        events = list(run(client, stream=True))
        result = run(client)
    assert [received.type for received in events] == ["content", *types_]
    assert all(not received.data or received.data.strip() == "[DONE]" for received in events[1:])
    assert result.is_success() == ("error" not in types_) and result.get_function_result() == "a"


# Lines of a stream with names beside types, and the events that they are.
NAMED_EVENTS: dict[str, tuple[bytes, list[tuple[str, Any]]]] = {
    "error": (b'event: error\ndata: {"type": "rate_limit", "message": "quota"}\n\n',
              [("error", {"type": "rate_limit", "message": "quota"})]),
    "error, data first": (
        b'data: {"type": "x"}\nevent: error\n\n', [("error", {"type": "x"})]),
    "error with a number as its type": (
        b'event: error\ndata: {"type": [5]}\n\n', [("error", {"type": [5]})]),
    "done": (b'event: done\ndata: {"type": "result", "value": 5}\n\n',
             [("done", {"type": "result", "value": 5})]),
    "content": (b'event: content\ndata: {"type": "text", "data": "a"}\n\n',
                [("content", {"type": "text", "data": "a"})]),
    "a known type wins": (
        b'event: done\ndata: {"type": "content", "data": "a"}\n\n', [("content", "a")]),
    "an unknown name": (
        b'event: delta\ndata: {"type": "text", "data": "a"}\n\n', [("content", "a")]),
    "without blank lines": (
        b'event: content\ndata: {"n": 1}\nevent: done\ndata: {"n": 2}\n\n',
        [("content", {"n": 1}), ("done", {"n": 2})]),
    "without blank lines, one name": (
        b'event: content\ndata: {"n": 1}\ndata: {"n": 2}\n\n',
        [("content", {"n": 1}), ("content", {"n": 2})]),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED_EVENTS)
def test_a_known_name_of_an_event_says_more_than_an_unknown_type(name: str) -> None:
    written, expected = NAMED_EVENTS[name]
    given = whole(written, STREAM)
    with Script(given, given) as server, client_of(server) as client:
        events = list(run(client, stream=True))
        result = run(client)
    assert [(received.type, received.data) for received in events] == expected
    assert result.is_success() == (expected[-1][0] != "error")
    if name == "error":
        assert result.error and result.error["message"] == "quota"
    if name == "done":
        assert result.get_function_result() == expected[0][1]


def test_all_ways_to_read_a_stream_can_be_mixed() -> None:
    events = [event("content", number) for number in range(6)]
    with Script(chunked(*events, event("done"))) as server:
        stream = run(client_of(server), stream=True)
        assert isinstance(stream, EventStream) and iter(stream) is stream
        assert [received.data for received in itertools.islice(stream, 1)] == [0]
        assert next(stream).data == 1
        assert [(one.data, two.data) for one, two in itertools.islice(zip(stream, stream), 1)] == [
            (2, 3)
        ]
        for received in stream:
            assert received.data == 4
            break
        assert [received.type for received in stream] == ["content", "done"]


def test_a_stream_of_a_plain_function_is_its_result(client: GatewayClient) -> None:
    content, done = client.run("text-tools", "1.1.0", "echo", {"value": 5}, stream=True)
    assert (content.type, done.type) == (StreamEventType.CONTENT, StreamEventType.DONE)
    assert content.data == client.run("text-tools", "1.1.0", "echo", {"value": 5}).get_result()
    (failed,) = client.run("faulty", "1.0.0", "refuse", {"message": "no"}, stream=True)
    assert failed.type == "error" and failed.data == {"message": "no", "type": "Refused"}


A_TEXT = event("content", "a")
WITH_FILES = {"n": 1, "files": {"a": [S3]}}
CODED = {"message": "m", "error_code": "E"}
done_with = functools.partial(event, "done")
BROUGHT = done_with({"job_id": "job-1", "files": {"a": [S3]}})  # the gateway's, after its uploads
# The events of a call for a result; and its value, its files, and its error.
RESULTS_OF_EVENTS: dict[str, tuple[list[bytes], Any, Any, Any]] = {
    "texts": ([event("content", "a "), event("content", "b")], "a b", {}, None),
    "one text": ([A_TEXT, event("done", "x")], "a", {}, None),
    "objects": ([event("content", {"n": 1}), event("content", {"n": 2})], [{"n": 1}, {"n": 2}], {},
                None),
    "mixed": ([A_TEXT, event("content", 1)], ["a", 1], {}, None),
    "done with an object": ([event("progress", 1), event("done", {"n": 1})], {"n": 1}, {}, None),
    "done with a text": ([event("done", "text")], "text", {}, None),
    "done with files": ([event("done", WITH_FILES)], {"n": 1}, {"a": [S3]}, None),
    "done with files only": ([event("done", {"files": {"a": [S3]}})], "", {"a": [S3]}, None),
    "done with files that are no object": (
        [done_with({"n": 1, "files": ["a"]})], {"n": 1}, {}, None),
    "done with nothing": ([event("done")], "", {}, None),
    "done as a marker": ([event("done", "[DONE]")], "", {}, None),
    "error with nothing": ([A_TEXT, event("error")], "a", {},
                           {"message": "The function reported an error."}),
    "error with a text": ([A_TEXT, event("error", "x")], "a", {}, {"message": "x"}),
    "error with a list": ([A_TEXT, event("error", ["x"])], "a", {}, {"message": "['x']"}),
    "error with a message beside": ([A_TEXT, event("error", message="m")], "a", {},
                                    {"message": "m"}),
    "error with a code beside": ([event("error", {"message": "m"}, error_code="E")], "", {}, CODED),
    "content and a summary": ([A_TEXT, event("content", "b"), done_with({"n": 1})], "ab", {}, None),
    "two dones": ([done_with({"n": 1}), done_with({"m": 2})], {"n": 1, "m": 2}, {}, None),
    "two dones with the same field": (
        [done_with({"n": 1, "m": 1}), done_with({"n": 2})], {"n": 2, "m": 1}, {}, None),
    "three dones": (
        [done_with({"n": 1}), event("done"), done_with({"m": 2})], {"n": 1, "m": 2}, {}, None),
    "done, then files": ([done_with({"n": 1}), BROUGHT], {"n": 1}, {"a": [S3]}, None),
    "files, then done": ([BROUGHT, done_with({"n": 1})], {"n": 1}, {"a": [S3]}, None),
    "content, done, then files": (
        [A_TEXT, done_with({"n": 1}), BROUGHT], "a", {"a": [S3]}, None),
    "done with nothing, then files": ([event("done"), BROUGHT], "", {"a": [S3]}, None),
    "files of two dones": (
        [done_with({"files": {"a": [S3]}}), done_with({"files": {"b": [S3]}})],
        "", {"a": [S3], "b": [S3]}, None),
    "job_id only": ([done_with({"n": 1}), done_with({"job_id": "job-1"})], {"n": 1}, {}, None),
    "done with a text, then files": ([done_with("text"), BROUGHT], "text", {"a": [S3]}, None),
    "done with a text, then an object": (
        [done_with("text"), done_with({"n": 1})], {"n": 1}, {}, None),
    "done with an object, then a text": (
        [done_with({"n": 1}), done_with("text")], "text", {}, None),
    "two dones with texts": ([done_with("a"), done_with("b")], "b", {}, None),
    "done with a text, then nothing": ([done_with("text"), done_with("")], "text", {}, None),
    "done with a list": ([done_with([1, 2])], [1, 2], {}, None),
    "done with zero": ([done_with(0)], 0, {}, None),
    "done with false, then a marker": ([done_with(False), done_with("[DONE]")], False, {}, None),
    "done, then a marker": ([done_with({"n": 1}), done_with("[DONE]")], {"n": 1}, {}, None),
    "a marker, then files": ([done_with("[DONE]"), BROUGHT], "", {"a": [S3]}, None),
    "progress and done": (
        [event("progress", 1), event("progress", {"p": 2}), done_with({"n": 1})],
        {"n": 1}, {}, None),
    "progress only": ([event("progress", {"p": 1})], "", {}, None),
    "heartbeats": (
        [HEARTBEAT, A_TEXT, event("heartbeat"), event("content", "b"), HEARTBEAT], "ab", {}, None),
    "heartbeats and done": (
        [HEARTBEAT, event("keep-alive", time=1), done_with({"n": 1})], {"n": 1}, {}, None),
    "heartbeats only": ([HEARTBEAT, event("done")], "", {}, None),
    "heartbeats without an end": ([HEARTBEAT, HEARTBEAT], "", {}, None),
    "objects and heartbeats": ([event("content", {"n": 1}), HEARTBEAT], [{"n": 1}], {}, None),
    "unknown types with data": ([event("thought", "a"), event("thought", "b")], "ab", {}, None),
    "error, then files": (
        [A_TEXT, event("error", "x"), BROUGHT], "a", {"a": [S3]}, {"message": "x"}),
    "error, then content": (
        [A_TEXT, event("error", "x"), event("content", "b")], "ab", {}, {"message": "x"}),
    "done, then an error": (
        [done_with({"n": 1}), event("error", "x")], {"n": 1}, {}, {"message": "x"}),
}


@pytest.mark.parametrize("name", RESULTS_OF_EVENTS)
def test_a_streaming_function_called_for_its_result_gives_one(name: str) -> None:
    events, *expected = RESULTS_OF_EVENTS[name]
    with Script(chunked(event("start"), *events)) as server:
        result = run(client_of(server))
    assert [result.output["output"], result.get_files(), result.error] == expected
    assert result.is_success() == (result.error is None)


@pytest.mark.parametrize("name", RESULTS_OF_EVENTS)
def test_the_events_that_were_read_give_the_same_result(name: str) -> None:
    events = chunked(event("start"), *RESULTS_OF_EVENTS[name][0])
    with Script(*[events] * 3) as server, client_of(server) as client:
        expected = run(client)
        result = PrefabResult.from_events(run(client, stream=True))
        read = list(run(client, stream=True))
    for made in (result, PrefabResult.from_events(read), PrefabResult.from_events(iter(read))):
        assert (made, made.raw) == (expected, expected.raw)
    assert [one["type"] for one in expected.raw["events"]] == [one.raw["type"] for one in read]


PLAIN_FAILURE = {"status": "FAILED", "output": {"output": {"n": 1}}, "error": {"message": "no"}}
PLAIN_ANSWERS = {
    **{f"{value!r}": ran(value) for value in ({"success": True}, [{"a": 1}], "text", None, [])},
    "files": ran({"n": 1}, files={"a": [S3]}),
    "a value itself": answer({"results": [{"status": "SUCCESS", "output": {"result": 5}}]}),
    "failed": answer({"job_id": "j", "results": [PLAIN_FAILURE]}),
    "unknown status": answer({"results": [{"status": "TIMED_OUT", "output": 1}]}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN_ANSWERS)
def test_the_events_of_a_function_that_does_not_stream_give_its_result(name: str) -> None:
    with Script(*[PLAIN_ANSWERS[name]] * 2) as server, client_of(server) as client:
        expected = run(client)
        read = list(run(client, stream=True))
    for events in (read, iter(read), pickle.loads(pickle.dumps(read)), EventStream(read)):
        result = PrefabResult.from_events(events)
        assert (result, result.raw) == (expected, expected.raw)
        assert result.get_business_success() == expected.get_business_success()


def test_a_stream_that_another_thread_closes_gives_no_result() -> None:
    def close(sock: socket.socket) -> None:
        # The reader waits for more, or is about to.
        threading.Thread(target=stream.close).start()
        sock.recv(1)

    made = threading.Event()
    steps = (send(OPEN_STREAM), lambda _: made.wait(WAIT_SECONDS), close)
    with Script(Steps(steps)) as server, client_of(server) as client:
        stream = run(client, stream=True)
        made.set()
        with pytest.raises(GatewayError, match="closed before its end") as caught:
            PrefabResult.from_events(stream)
    assert caught.value.may_have_run and type(caught.value) is GatewayError


def test_a_stream_that_breaks_gives_no_result_but_what_was_paid_for() -> None:
    with Script(HangUp(OPEN_STREAM)) as server, client_of(server) as client:
        stream = run(client, stream=True)
        with pytest.raises(ServiceUnavailableError) as broken:
            PrefabResult.from_events(stream)
    assert broken.value.details["partial_output"] == [1, 2]


OWN_EVENTS = [StreamEvent(StreamEventType.CONTENT, "a"), StreamEvent.from_dict({"type": "done"})]
ITERABLES: dict[str, Callable[[], Any]] = {
    "list": lambda: OWN_EVENTS, "tuple": lambda: (*OWN_EVENTS,),
    "iterator": lambda: iter(OWN_EVENTS), "generator": lambda: (one for one in OWN_EVENTS),
    "stream": lambda: EventStream(OWN_EVENTS),
}  # fmt: skip


@pytest.mark.parametrize("kind", ITERABLES)
def test_a_stream_can_be_made_of_events(kind: str) -> None:
    stream = EventStream(ITERABLES[kind]())
    assert iter(stream) is stream
    with stream as entered:
        assert list(entered) == OWN_EVENTS
    assert [*stream] == [] and next(stream, None) is None
    assert PrefabResult.from_events(EventStream(ITERABLES[kind]())).get_function_result() == "a"
    left = EventStream(ITERABLES[kind]())
    assert next(left).data == "a"
    left.close()
    left.close()
    with pytest.raises(GatewayError, match="closed before its end"):
        next(left)


@cpython_only
@pytest.mark.parametrize("way", ["break", "with", "error in a with", "close", "drop"])
def test_leaving_a_stream_frees_its_connection_without_the_garbage_collector(way: str) -> None:
    with Script(Pause(OPEN_STREAM)) as server, client_of(server) as client:
        gc.disable()
        try:
            stream = run(client, stream=True)
            if way == "break":
                opened, stream = [stream], None
                for _ in opened.pop():
                    break
            elif way == "with":
                with stream as entered:
                    assert next(entered).data == 1
            elif way == "error in a with":
                with contextlib.suppress(LookupError), stream:
                    raise LookupError
            elif way == "close":
                stream.close()
                stream.close()
            else:
                stream = None
            server.wait_until(lambda: server.open_connections == 0)
        finally:
            gc.enable()


@pytest.mark.parametrize("name", RESULTS_OF_EVENTS)
def test_all_events_of_a_result_are_kept_as_they_came(name: str) -> None:
    events = [event("start"), *RESULTS_OF_EVENTS[name][0]]
    with Script(chunked(*events)) as server:
        result = run(client_of(server))
    decoded = [json.loads(sent.removeprefix(b"data: ")) for sent in events]
    assert result.raw["events"] == decoded
    named = any(b'"job_id"' in sent for sent in events)
    assert result.job_id == ("job-1" if named else None)


@pytest.mark.parametrize("name", RESULTS_OF_EVENTS)
def test_a_stream_that_was_read_gives_the_result_that_the_call_would_have_given(name: str) -> None:
    given = chunked(event("start"), *RESULTS_OF_EVENTS[name][0])
    with Script(given, given, given) as server, client_of(server) as client:
        result = run(client)
        events = list(run(client, stream=True))
        made = [PrefabResult.from_events(run(client, stream=True))]
    forms = (events, tuple(events), iter(events), EventStream(events))
    made += [PrefabResult.from_events(form) for form in forms]
    assert made == [result] * 5
    assert [one.raw["events"] for one in made] == [result.raw["events"]] * 5
    assert [one.get_files() for one in made] == [result.get_files()] * 5


def test_a_result_of_a_stream_that_broke_is_no_result() -> None:
    with Script(HangUp(chunked(A_TEXT, end=False))) as server:
        with pytest.raises(ServiceUnavailableError):
            PrefabResult.from_events(run(client_of(server), stream=True))


MADE_EVENTS = [
    StreamEvent(StreamEventType.START, None),
    StreamEvent(StreamEventType.CONTENT, "a"),
    StreamEvent.from_dict({"type": "content", "data": "b"}),
    StreamEvent.from_dict({"type": "done", "data": {"n": 1}}),
]


@pytest.mark.parametrize(
    "kind", [list, tuple, iter, collections.deque, EventStream], ids=lambda kind: kind.__name__
)
def test_a_stream_can_be_made_of_events_of_ones_own(kind: Any) -> None:
    stream = EventStream(kind(MADE_EVENTS))
    assert isinstance(stream, EventStream) and iter(stream) is stream
    assert next(stream) == MADE_EVENTS[0]
    rest = [("content", "a"), ("content", "b"), ("done", {"n": 1})]
    assert [(received.type, received.data) for received in stream] == rest
    stream.close()
    assert list(stream) == [] and next(stream, None) is None
    result = PrefabResult.from_events(EventStream(kind(MADE_EVENTS)))
    assert result.is_success() and result.get_function_result() == "ab"


def test_a_stream_of_ones_own_ends_as_any_other() -> None:
    def breaking() -> Iterator[StreamEvent]:
        yield MADE_EVENTS[0]
        raise ServiceUnavailableError("it broke")

    stream = EventStream(MADE_EVENTS)
    with stream as entered:
        assert entered is stream and next(stream).type == "start"
    with pytest.raises(GatewayError, match="closed before its end"):
        next(stream)
    broken = EventStream(breaking())
    with pytest.raises(ServiceUnavailableError, match="it broke"):
        list(broken)
    with pytest.raises(GatewayError, match="cannot be read on"):
        list(broken)
    assert list(EventStream([])) == []


# How the server goes on, and what makes the stream end before its end.
UNFINISHED: dict[str, tuple[Answer, Callable[[Any], Any]]] = {
    "timed out": (Pause(OPEN_STREAM), next),
    "broken": (HangUp(OPEN_STREAM), next),
    "closed": (Pause(OPEN_STREAM), lambda stream: stream.close()),
    "left": (Pause(OPEN_STREAM), lambda stream: stream.__exit__()),
    "closed though it was whole": (ran(5), lambda stream: stream.close()),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_a_stream_that_did_not_come_to_its_end_is_never_read_on_as_if_it_had(name: str) -> None:
    given, end = UNFINISHED[name]
    with Script(given) as server, client_of(server) as client:
        stream = run(
            client, stream=True, timeout=SHORT_SECONDS if name == "timed out" else WAIT_SECONDS
        )
        assert next(stream).type == "content"
        if end is next:
            assert next(stream).data == 2
        with pytest.raises(ServiceUnavailableError) if end is next else contextlib.nullcontext():
            end(stream)
        for read in (lambda: next(stream, None), lambda: list(stream), lambda: next(stream)):
            with pytest.raises(GatewayError,
                               match="cannot be read on" if end is next
                               else "closed before its end") as caught:
                read()
            assert caught.value.may_have_run and str(caught.value).count("may have run") == 1


def test_a_stream_that_was_read_to_its_end_just_stops() -> None:
    with Script(WHOLE_STREAM) as server:
        stream = run(client_of(server), stream=True)
        assert [received.type for received in stream] == ["content", "done"]
        stream.close()
        assert [*stream, *stream] == [] and next(stream, None) is None


@contextlib.contextmanager
def interrupted(at: int, act: Callable[[], object]) -> Iterator[list[int]]:
    """Runs `act` once in the middle of the thread's work: before the module's line number `at`.

    Lines of `http.client` count too, as an answer is read by both. Gives how many lines are left
    until then.
    """
    left = [at]
    files = {gateway_sdk.__file__, sys.modules["http.client"].__file__}

    def enter_function(frame: Any, kind: str, value: Any) -> Any:
        return pass_line if frame.f_code.co_filename in files else None

    def pass_line(frame: Any, kind: str, value: Any) -> Any:
        # Since Python 3.11 the line `try:` itself is outside of all blocks; no signal comes there.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if kind == "line" and line != "try:":
            left[0] -= 1
            if left[0] == 0:
                act()
        return pass_line

    before = sys.gettrace()
    sys.settrace(enter_function)
    try:
        yield left
    finally:
        sys.settrace(before)


def close_at_once(stream: Any) -> None:
    """As a signal handler does, which runs in the thread that it interrupts."""
    stream.close()


def close_elsewhere(stream: Any) -> None:
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(0.5)  # it may have to wait for the thread that waits here


@pytest.mark.parametrize("close", [close_at_once, close_elsewhere])
def test_a_stream_may_be_closed_at_any_moment_of_being_read(close: Callable[[Any], None]) -> None:
    unexpected: list[tuple[int, BaseException]] = []
    reached = True

    def read(stream: Any, at: int) -> None:
        nonlocal reached
        try:
            with interrupted(at, lambda: close(stream)) as left:
                for _ in stream:
                    pass
        except GatewayError:
            pass
        except BaseException as error:
            unexpected.append((at, error))
        reached = left[0] <= 0

    with (
        Script(*[WHOLE_STREAM, ran()] * 2000) as server,
        client_of(server, max_retries=0) as client,
    ):
        for at in itertools.count(1):
            stream = run(client, stream=True)
            reader = threading.Thread(target=read, args=(stream, at), daemon=True)
            reader.start()
            reader.join(WAIT_SECONDS)
            assert not reader.is_alive(), f"closed at line {at}, it waits for ever"
            sock = stream._response._connection._sock
            assert sock.fileno() == -1 or not sock._closed, (
                f"closed at line {at}, its descriptor stays open"
            )
            assert run(client).is_success()
            if not reached or at == 2000:
                break
    assert not unexpected and at > 10


def hang_up(_: socket.socket) -> None:
    raise OSError


def say_more_and_hang_up(sock: socket.socket) -> None:
    sock.sendall(chunk(event("content", 2)))
    raise OSError


# What comes while two threads want the next event, and what becomes of the one that waits for it.
TWO_READERS: dict[str, tuple[Callable[[socket.socket], object], Any]] = {
    "the rest": (send(chunk(event("content", 2) + event("done")) + LAST_CHUNK), [2, None]),
    "an event, then a break": (say_more_and_hang_up, ServiceUnavailableError),
    "a break": (hang_up, ServiceUnavailableError),
    "a bad chunk": (send(b"xyz\r\n"), ServiceUnavailableError),
    "silence": (lambda sock: sock.recv(1), GatewayTimeoutError),
}


@pytest.mark.parametrize("name", TWO_READERS)
def test_a_second_reader_of_a_stream_gets_an_error_of_its_own_and_spoils_nothing(name: str) -> None:
    comes, outcome = TWO_READERS[name]
    gate = threading.Event()
    outcomes: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        try:
            outcomes.put([received.data for received in stream])
        except BaseException as error:
            outcomes.put(error)

    steps = (send(HEAD + chunk(event("content", 1))), lambda _: gate.wait(WAIT_SECONDS), comes)
    with Script(Steps(steps)) as server, client_of(server) as client:
        stream = run(client, stream=True, timeout=0.5 if name == "silence" else WAIT_SECONDS)
        assert next(stream).data == 1
        for _ in range(2):
            threading.Thread(target=read, daemon=True).start()
        second = outcomes.get(timeout=WAIT_SECONDS)
        gate.set()
        first = outcomes.get(timeout=WAIT_SECONDS)
    assert type(second) is GatewayError, second
    assert (first if isinstance(outcome, list) else type(first)) == outcome
    assert "cannot be read on" not in str(first)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that interrupt here")
def test_a_signal_handler_that_reads_the_stream_that_the_loop_waits_for_spoils_nothing() -> None:
    gate = threading.Event()
    errors: list[BaseException] = []

    def read_too(_: int, frame: Any) -> None:
        if frame.f_code.co_filename == socket.__file__:
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                next(stream)
            except BaseException as error:
                errors.append(error)
            gate.set()

    rest = chunk(event("content", 2) + event("done")) + LAST_CHUNK
    steps = (send(HEAD + chunk(event("content", 1))), lambda _: gate.wait(WAIT_SECONDS), send(rest))
    with Script(Steps(steps)) as server, client_of(server) as client:
        stream = run(client, stream=True)
        assert next(stream).data == 1
        before = signal.signal(signal.SIGALRM, read_too)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        try:
            assert [received.data for received in stream] == [2, None]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert [type(error) for error in errors] == [GatewayError]


def test_closing_a_stream_ends_the_wait_of_another_thread_without_an_error(script: Any) -> None:
    outcome: queue.Queue[Any] = queue.Queue()

    def read(stream: Any) -> None:
        try:
            for received in stream:
                outcome.put(received.data)
            outcome.put("end")
        except BaseException as error:
            outcome.put(error)

    with script(Pause(OPEN_STREAM), ran()) as server, client_of(server) as client:
        stream = run(client, stream=True)
        threading.Thread(target=read, args=(stream,), daemon=True).start()
        assert [outcome.get(timeout=WAIT_SECONDS) for _ in range(2)] == [1, 2]
        stream.close()
        assert outcome.get(timeout=WAIT_SECONDS) == "end"
        assert run(client).is_success()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that interrupt here")
def test_a_signal_handler_may_close_the_stream_that_the_loop_waits_for(script: Any) -> None:
    seen: list[Any] = []

    def close_if_it_waits(_: int, frame: Any) -> None:
        if frame.f_code.co_filename == socket.__file__ or "ssl" in frame.f_code.co_filename:
            signal.setitimer(signal.ITIMER_REAL, 0)
            stream.close()

    with script(Pause(OPEN_STREAM), ran()) as server, client_of(server) as client:
        stream = run(client, stream=True)
        before = signal.signal(signal.SIGALRM, close_if_it_waits)
        try:
            for received in stream:
                seen.append(received.data)
                signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert seen == [1, 2]
        server.wait_until(lambda: server.open_connections == 0)
        assert run(client).is_success()


# What else is done at the same time as the reader's thread finds its stream closed.
CLOSERS: dict[str, Callable[[GatewayClient, EventStream], Any]] = {
    "one": lambda client, stream: [stream.close],
    "three": lambda client, stream: [stream.close] * 3,
    "the end of a with": lambda client, stream: [stream.__exit__, stream.close],
    "the client's": lambda client, stream: [
        functools.partial(client.close, cancel=True), stream.close],
}


@pytest.mark.parametrize("closers", CLOSERS)
def test_no_two_threads_are_closing_a_socket_at_the_same_time(
    closers: str, monkeypatch: Patch
) -> None:
    """Without the GIL both may close its descriptor: the second one what was opened meanwhile."""
    connected: list[Any] = []
    overlaps: list[int] = []

    class Watched(socket.socket):
        closing = 0

        def connect(self, address: Any) -> None:
            connected.append(self)
            super().connect(address)

        def connect_ex(self, address: Any) -> int:
            connected.append(self)
            return super().connect_ex(address)

        def recv_into(self, *arguments: Any) -> int:
            if armed.is_set():
                waiting.set()
            return super().recv_into(*arguments)

        def close(self) -> None:
            self.closing += 1
            if self.closing > 1:
                overlaps.append(self.closing)
                second.set()
            elif self in connected:
                second.wait(0.05)  # for another thread to come, too
            super().close()
            self.closing -= 1

    def read() -> None:
        with contextlib.suppress(GatewayError):  # closed before it was read on
            for received in stream:
                if received.data == 2:
                    armed.set()

    def close(act: Callable[[], object]) -> None:
        waiting.wait(0.5)
        act()

    armed, waiting, second = threading.Event(), threading.Event(), threading.Event()
    monkeypatch.setattr(socket, "socket", Watched)
    with Script(Pause(OPEN_STREAM)) as server, client_of(server) as client:
        stream = run(client, stream=True)
        closing = CLOSERS[closers](client, stream)
        with concurrent.futures.ThreadPoolExecutor(1 + len(closing)) as threads:
            for done in [threads.submit(read), *(threads.submit(close, act) for act in closing)]:
                done.result(WAIT_SECONDS)
        server.wait_until(lambda: server.open_connections == 0)
    assert connected and not overlaps
    assert [sock.fileno() for sock in connected] == [-1] * len(connected)


def test_closing_from_many_threads_closes_no_descriptor_of_another() -> None:
    """Seldom, and only without the GIL, a second close hit: hence many streams, for a while."""
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    until = time.monotonic() + (0.3 if has_gil else 5)
    closed = threading.Event()

    def open_and_close() -> None:
        while not closed.is_set():
            for number in os.pipe():
                os.close(number)  # fails if it is closed already

    def read(stream: EventStream, barrier: threading.Barrier) -> None:
        next(stream)
        barrier.wait(WAIT_SECONDS)
        list(stream)

    def close(stream: EventStream, barrier: threading.Barrier) -> None:
        barrier.wait(WAIT_SECONDS)
        stream.close()

    with Routed(lambda received: Pause(OPEN_STREAM)) as server, client_of(server) as client:
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            stranger = threads.submit(open_and_close)
            try:
                while time.monotonic() < until:
                    stream, barrier = run(client, stream=True), threading.Barrier(3)
                    acts = [threads.submit(act, stream, barrier) for act in (read, close, close)]
                    for done in acts:
                        with contextlib.suppress(GatewayError):  # closed before it was read on
                            done.result(WAIT_SECONDS)
            finally:
                closed.set()
        stranger.result(WAIT_SECONDS)


@pytest.mark.parametrize("data", [b"{}", b"null", b""], ids=["object", "null", "nothing"])
def test_a_heartbeat_by_its_name_is_no_content(data: bytes) -> None:
    beat = b"event: ping\ndata: %b\n\n" % data
    with Script(chunked(beat, A_TEXT, beat, event("done"))) as server:
        assert run(client_of(server)).get_function_result() == "a"
    if data:
        with Script(chunked(beat)) as server:
            assert [received.data for received in run(client_of(server), stream=True)] == [None]


# --- Files ----------------------------------------------------------------------------------------

STORED = answer({"s3_url": S3})
SIZES = {"empty": 0, "small": 5, "large": 3_000_001}
UPLOADS: dict[str, Callable[..., str]] = {
    "input": lambda c, path, **options: c.upload_input_file(path, **options),
    "permanent": lambda c, path, **options: c.upload_file(path, **options)["s3_url"],
    "temporary": lambda c, path, **options: c.upload_temp_file(path, **options)["s3_url"],
}


def rising(steps: list[tuple[int, Any]], total: int) -> bool:
    done = [step for step, _ in steps]
    totals = {total for _, total in steps}
    return done == sorted(done) and (done[0], done[-1]) == (0, total) and totals == {total}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("upload", UPLOADS)
def test_what_is_uploaded_comes_back(
    upload: str, size: str, tmp_path: Path, client: GatewayClient
) -> None:
    source, target = tmp_path / "ü q.bin", tmp_path / "new" / "folder" / "b.bin"
    source.write_bytes(os.urandom(SIZES[size]))
    up: list[tuple[int, Any]] = []
    down: list[tuple[int, Any]] = []
    s3_url = UPLOADS[upload](client, source, on_progress=lambda *step: up.append(step))
    assert s3_url.startswith("s3://") and rising(up, SIZES[size])
    if upload == "input":  # such a one is read by prefabs
        lines = client.prefab("file-tools", "1.0.0").checksum(files={"files": [s3_url]})
        s3_url = lines.get_file_urls()[0]
        client.download_file(s3_url, target)
        digest = lines.get_function_result()["checksums"][0]["sha256"]
        assert target.read_text() == f"{digest}  ü q.bin\n"
    else:
        client.download_file(s3_url, str(target), on_progress=lambda *step: down.append(step))
        assert target.read_bytes() == source.read_bytes() and rising(down, SIZES[size])
    assert [path.name for path in target.parent.iterdir()] == ["b.bin"]


@pytest.mark.parametrize(
    ("name", "sent", "media_type"),
    [("plain.txt", "plain.txt", "text/plain"), ('quo"te.png', "quo%22te.png", "image/png"),
     ("line\nbreak\r.json", "line%0Abreak%0D.json", "application/json"),
     ("ümlaut 你好.pdf", "ümlaut 你好.pdf", "application/pdf"),
     ("back\\slash;semi=.no-such-type", "back\\slash;semi=.no-such-type",
      "application/octet-stream"),
     ("100%41", "100%41", "application/octet-stream")],
)  # fmt: skip
@pytest.mark.skipif(os.name == "nt", reason="has no such names")
def test_multipart_bodies_are_written_as_browsers_do(
    name: str, sent: str, media_type: str, tmp_path: Path
) -> None:
    content = b"\r\n--not the boundary\r\n\x00\xff"
    (tmp_path / name).write_bytes(content)
    with Script(*[STORED] * 3) as server:
        client = client_of(server)
        client.upload_file(tmp_path / name)
        client.upload_temp_file(tmp_path / name, 60, "s-1")
        client.upload_temp_file(tmp_path / name)
    forms = [{}, {"ttl": "60", "session_id": "s-1"}, {"ttl": "86400"}]
    for received, target, form in zip(server.received, ["upload", "upload_temp", "upload_temp"],
                                      forms):
        media, _, boundary = received.headers["content-type"].partition("; boundary=")
        start = f"--{boundary}\r\nContent-Disposition: form-data; name="
        head = "".join(f'{start}"{key}"\r\n\r\n{value}\r\n' for key, value in form.items())
        head += f'{start}"file"; filename="{sent}"\r\nContent-Type: {media_type}\r\n\r\n'
        assert received.body == head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        assert received[:2] == ("POST", f"/internal/files/{target}")
        assert media == "multipart/form-data"
        assert received.headers["x-internal-token"] == TOKEN
        assert received.headers["content-length"] == str(len(received.body))


@pytest.mark.parametrize("upload", UPLOADS)
@pytest.mark.parametrize(
    ("source", "kind"),
    [("missing", FileNotFoundError), (".", (OSError, ValidationError)),
     ("/dev/zero", ValidationError),
     ("/proc/cpuinfo", ValidationError)],  # which says that it is empty
)  # fmt: skip
def test_a_file_that_cannot_be_uploaded_is_an_error_before_anything_is_sent(
    upload: str, source: str, kind: Any, tmp_path: Path
) -> None:
    if source.startswith("/") and not os.path.exists(source):
        pytest.skip("no such file here")
    with Script() as server, pytest.raises(kind):
        UPLOADS[upload](client_of(server), tmp_path / source)
    assert not server.received


def read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    """The head of a request, and what came along of its body."""
    head = b""
    while b"\r\n\r\n" not in head:
        received = sock.recv(65536)
        if not received:
            raise ConnectionError("the client went away")
        head += received
    head, _, body = head.partition(b"\r\n\r\n")
    return head, body


def receive(sock: socket.socket, length: int, keep: bool = False) -> bytes:
    """Reads so many bytes; gives them if asked to."""
    kept, buffer = [], bytearray(2**20)
    while length:
        count = sock.recv_into(buffer, min(length, len(buffer)))
        if not count:
            raise ConnectionError("the client went away")
        length -= count
        if keep:
            kept.append(bytes(buffer[:count]))
    return b"".join(kept)


def length_in(head: bytes) -> int:
    return int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]


@pytest.mark.parametrize("kept_open", [False, True], ids=["hang-up", "kept-open-unread"])
@pytest.mark.parametrize("name", ["permanent", "input"])
def test_an_early_413_is_reported_rather_than_the_broken_upload(
    name: str, kept_open: bool, tmp_path: Path
) -> None:
    ended = threading.Event()

    def serve(sock: socket.socket) -> None:
        if b"generate_upload_url" in read_head(sock)[0]:
            sock.sendall(
                answer({"upload_url": f"{server.url}/storage/in?sig=x", "s3_url": "s3://b/in"})
            )
        else:
            sock.sendall(answer({"detail": "larger than 1 MB"}, 413))
            if kept_open:
                ended.wait(WAIT_SECONDS)

    with open(tmp_path / "in.bin", "wb") as file:
        file.truncate(64 * 2**20)
    with (
        nothing_left(tmp_path),
        Raw(serve) as server,
        client_of(server, timeout=SHORT_SECONDS) as client,
    ):
        with pytest.raises(GatewayError, match="413.*larger than 1 MB") as caught:
            UPLOADS[name](client, tmp_path / "in.bin")
        ended.set()
    assert (type(caught.value), caught.value.status_code) == (GatewayError, 413)
    assert server.connections == (1 if name == "permanent" else 2)


@pytest.mark.parametrize("end", [lambda sock: None, reset], ids=["hang-up", "reset"])
@pytest.mark.parametrize("name", ["permanent", "input"])
def test_a_broken_upload_is_sent_again_from_its_start_or_not_at_all(
    name: str, end: Any, tmp_path: Path
) -> None:
    content = random.Random(FUZZ_SEED).getrandbits(8 * 2**22).to_bytes(2**22, "big")
    uploads: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        head, body = read_head(sock)
        if b"generate_upload_url" in head:
            sock.sendall(
                answer({"upload_url": f"{server.url}/storage/in?sig=x", "s3_url": "s3://b/in"})
            )
        elif uploads:
            uploads.append(body + receive(sock, length_in(head) - len(body), keep=True))
            sock.sendall(answer({}))
        else:
            uploads.append(body + receive(sock, 100_000, keep=True))
            end(sock)

    (tmp_path / "in.bin").write_bytes(content)
    progress: list[tuple[int, Any]] = []
    with nothing_left(tmp_path), Raw(serve) as server, client_of(server) as client:
        arguments = (client, tmp_path / "in.bin")
        if name == "permanent":
            with pytest.raises(ServiceUnavailableError, match="sending broke off"):
                UPLOADS[name](*arguments)
        else:
            assert (
                UPLOADS[name](*arguments, on_progress=lambda *step: progress.append(step))
                == "s3://b/in"
            )
            assert (progress[0], progress[-1]) == ((0, len(content)), (len(content), len(content)))
    assert uploads[1:] == ([] if name == "permanent" else [content])


def leave(_: socket.socket) -> None:
    """Does nothing more: the connection is closed."""


# What comes while most of the file is still to be sent, and what ends the connection behind it.
EARLY_ANSWERS: dict[str, tuple[bytes, Callable[[socket.socket], object]]] = {
    "200": (STORED, leave),
    "200 and a reset": (STORED, reset),
    "200 that says close": (answer({"s3_url": S3}, Connection="close"), leave),
    "200 without a body": (NO_BODY, leave),
    "200 in chunks": (
        chunked(STORED.partition(b"\r\n\r\n")[2], content_type="application/json"), leave),
    "200 behind 100": (b"HTTP/1.1 100 Continue\r\n\r\n" + STORED, leave),
    "201": (answer({"s3_url": S3}, 201), leave),
    "204": (GONE, leave),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "early", "always"),
    [*((name, early, True) for name in ("input", "permanent") for early in EARLY_ANSWERS),
     ("input", "200", False), ("input", "200 and a reset", False), ("temporary", "200", True)],
)  # fmt: skip
def test_an_upload_that_broke_off_has_not_arrived_whatever_was_answered(
    name: str, early: str, always: bool, tmp_path: Path
) -> None:
    given, end = EARLY_ANSWERS[early]
    size, arrived = 16 * 2**20, []  # more than the kernels of both sides keep

    def serve(sock: socket.socket) -> None:
        head, body = read_head(sock)
        if b"generate_upload_url" in head:
            given_url = {"upload_url": f"{server.url}/storage/in?sig=x", "s3_url": "s3://b/in"}
            sock.sendall(answer(given_url, Connection="close"))
        elif arrived and not always:
            receive(sock, length_in(head) - len(body))
            arrived.append(length_in(head))
            sock.sendall(answer({}))
        else:
            arrived.append(len(body + receive(sock, 100_000, keep=True)))
            sock.sendall(given)
            end(sock)

    with open(tmp_path / "in.bin", "wb") as file:
        file.truncate(size)
    with nothing_left(tmp_path), Raw(serve) as server, client_of(server, max_retries=1) as client:
        if name == "input" and not always:
            assert UPLOADS[name](client, tmp_path / "in.bin") == "s3://b/in"
        else:
            with pytest.raises(ServiceUnavailableError) as caught:
                UPLOADS[name](client, tmp_path / "in.bin")
            assert caught.value.may_have_run == (name != "input")
            assert ("may have run" in str(caught.value)) == (name != "input")
            assert "sig=" not in str(caught.value)
    assert len(arrived) == (2 if name == "input" else 1)
    assert arrived[1:] == [size] or always or name != "input"


def test_an_early_answer_of_a_server_that_reads_on_counts(tmp_path: Path) -> None:
    def serve(sock: socket.socket) -> None:
        head, body = read_head(sock)
        sock.sendall(STORED)
        receive(sock, length_in(head) - len(body))

    with open(tmp_path / "in.bin", "wb") as file:
        file.truncate(16 * 2**20)
    with Raw(serve) as server, client_of(server) as client:
        assert client.upload_file(tmp_path / "in.bin")["s3_url"] == S3


# What the type is; of what not every Python knows, that it is not the type of what is inside.
COMPRESSED = {
    "data.csv.gz": "application/gzip",
    "page.html.gz": "application/gzip",
    "image.svgz": "application/gzip",
    "all.tar.gz": "application/gzip",
    "all.tgz": "application/gzip",
    "only.gz": "application/gzip",
    "data.json.xz": "application/(x-)?xz",
    "all.txz": "application/(x-)?xz",
    "text.txt.bz2": "application/(x-)?bzip2?",
    "all.tbz2": "application/(x-)?bzip2?",
    "text.txt.Z": "application/(x-)?(compress|octet-stream)",
    "page.html.br": "application/(x-)?(br.*|octet-stream)",
    "data.csv.zst": "application/(x-)?(zstd|octet-stream)",
    "DATA.CSV.GZ": "application/(gzip|octet-stream)",
    "data.gz.csv": "text/csv",
    "gz.txt": "text/plain",
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_type_of_a_compressed_file_is_that_of_its_compression(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with Script(STORED, STORED) as server, client_of(server) as client:
        client.upload_file(tmp_path / name)
        client.upload_temp_file(tmp_path / name)
    for received in server.received:
        part = received.body.partition(b'name="file"')[2].partition(b"\r\n\r\n")[0].decode()
        assert re.search(f"\r\nContent-Type: {COMPRESSED[name]}$", part)


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"y")


def shrink(path: Path) -> None:
    os.truncate(path, 1000)


@pytest.mark.parametrize(("change", "said"), [(shrink, "shorter"), (grow, "longer")])
@pytest.mark.parametrize("name", ["permanent", "input"])
def test_a_file_that_changes_while_it_is_sent_is_an_error_and_never_sent_again(
    name: str, change: Any, said: str, tmp_path: Path
) -> None:
    def store(received: Received) -> Answer:
        return LINK if received.target.endswith("generate_upload_url") else answer({"s3_url": S3})

    path = tmp_path / "in.bin"
    path.write_bytes(b"x" * 300_000)
    with nothing_left(tmp_path), Routed(store) as server, client_of(server) as client:
        with pytest.raises(GatewayError, match=said) as caught:
            UPLOADS[name](client, path, on_progress=lambda done, total: done or change(path))
        path.write_bytes(b"z" * 300_000)
        UPLOADS[name](client, path)
    assert type(caught.value) is GatewayError
    uploads = [
        received.body
        for received in server.received
        if int(received.headers["content-length"]) >= 300_000
    ]
    first, *more = sorted(uploads, key=lambda body: b"z" not in body)
    # What did not come is padded.
    assert b"\0" not in first and all(b"\0" in body for body in more) and len(more) <= 1


def test_a_device_and_a_folder_are_no_targets_and_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    targets = [tmp_path / "full"]
    if os.path.exists("/dev/null"):
        (tmp_path / "link").symlink_to("/dev/null")
        targets += [Path("/dev/null"), tmp_path / "link"]
    with Script() as server:
        for target in targets:
            with pytest.raises((ValidationError, OSError)):
                client_of(server).download_file(S3, target)
    assert (tmp_path / "full" / "file").read_text() == "x" and not server.received
    assert len(targets) == 1 or stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(os.name == "nt", reason="has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_bare_name_is_a_target_and_its_permissions_follow_the_umask(
    umask: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(umask)
    try:
        with Script(LINK, answer(body=b"data")) as server:
            client_of(server).download_file(S3, "result.pdf")
    finally:
        os.umask(before)
    assert (tmp_path / "result.pdf").read_bytes() == b"data"
    assert stat.S_IMODE((tmp_path / "result.pdf").stat().st_mode) == 0o666 & ~umask


def test_a_presigned_url_that_leads_through_five_redirects_is_followed(tmp_path: Path) -> None:
    redirects = [
        answer(body=b"gone", status=status, Location="/on") for status in (301, 302, 303, 307, 308)
    ]
    with Script(LINK, *redirects, answer(body=b"data")) as server:
        client_of(server).download_file(S3, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"data"


# What the storage answers, and the error that comes of it if nothing is sent again.
BAD_DOWNLOADS: dict[str, tuple[list[Answer], type[GatewayError], str]] = {
    "cut": ([HangUp(answer(body=b"0123456789")[:-3])], ServiceUnavailableError, "cut short"),
    "chunks cut": ([HangUp(chunked(b"0123", end=False))], ServiceUnavailableError, "cut short"),
    "without a length": ([unframed(b"data", "text/plain")], GatewayError, "length"),
    "404": ([answer(body=b"<Code>NoSuchKey</Code><Message>gone</Message>", status=404)],
            GatewayError, "gone"),
    "403": ([answer(body=b"Request has expired", status=403)], GatewayError, "expired"),
    "500": ([answer(body=b"broken", status=500)], ServiceUnavailableError, "broken"),
    "503": ([answer(body=b"SlowDown", status=503)], ServiceUnavailableError, "SlowDown"),
    "six redirects": ([moved("/on")] * 6, GatewayError, "redirects"),
    "redirect to nowhere": ([answer(status=302)], GatewayError, "Location is missing"),
    "redirect to a file": ([moved("file:///etc/passwd")], GatewayError, "Location"),
    "redirect to ftp": ([moved("ftp://h/x")], GatewayError, "Location"),
    "redirect to no URL": ([moved("http://[/")], GatewayError, "Location"),
}


@pytest.mark.parametrize("bad", BAD_DOWNLOADS)
def test_a_failed_download_leaves_everything_as_it_was(bad: str, tmp_path: Path) -> None:
    answers, kind, said = BAD_DOWNLOADS[bad]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").write_text("old")
    for target in ("kept/old", "kept/new", "made/for/it/new"):
        with Script(LINK, *answers) as server, pytest.raises(GatewayError, match=said) as caught:
            client_of(server, max_retries=0).download_file(S3, tmp_path / target)
        assert type(caught.value) is kind and len(server.received) == 1 + len(answers)
        assert caught.value.error_code == ("NoSuchKey" if bad == "404" else None)
        assert not str(caught.value).rstrip().endswith(":")
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
        assert left == ["kept", "kept/old"] and (tmp_path / "kept" / "old").read_text() == "old"


@pytest.mark.parametrize("target", ["file/f", "file/folder/f", "n" * 300, "/proc/self/f"],
                         ids=ascii)
def test_a_target_that_cannot_be_written_is_an_error_before_the_transfer_that_names_it(
    target: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    if target.startswith("/proc") and not os.path.isdir("/proc/self"):
        pytest.skip("no folder here that nobody can write to")
    with Script(LINK) as server, pytest.raises((OSError, ValidationError)) as caught:
        client_of(server).download_file(S3, tmp_path / target)
    assert target[:5] in str(caught.value) and ".part" not in f"{caught.value} {caught.value!r}"
    assert len(server.received) <= 1 and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="files may be of any size here")
def test_an_error_of_writing_names_the_target_and_leaves_nothing(tmp_path: Path) -> None:
    """As if the disk were full after 1,000 bytes: while blocks come, and at the end of the file."""
    code = """if True:
        import errno, resource, sys
        from gateway_sdk import GatewayClient
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for target in sys.argv[2:]:
            try:
                GatewayClient(sys.argv[1]).download_file("s3://b/k", target)
            except OSError as error:
                named = error.filename == target and target in str(error)
                print(errno.errorcode[error.errno], named, ".part" in f"{error} {error!r}")
    """
    bodies = [answer(body=b"x" * size) for size in (1001, 3000, 100_000, 1_000_000)]
    bodies.append(chunked(b"x" * 900, b"x" * 200, content_type="text/plain"))
    targets = [tmp_path / name for name in ("old", "b", "new/folder/c", "d", "e")]
    targets[0].write_bytes(b"old")
    given = [step for body in bodies for step in (LINK, body)]
    with Script(*given) as server:
        done = python(code, server.url, *targets)
    assert (done.stderr, done.stdout) == ("", "EFBIG True False\n" * 5)
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    assert targets[0].read_bytes() == b"old"


def make_folder(target: Path) -> None:
    target.mkdir()


def lose_folder(target: Path) -> None:
    shutil.rmtree(target.parent)


def bar_folder(target: Path) -> None:
    shutil.rmtree(target.parent)
    target.parent.write_bytes(b"")


@pytest.mark.parametrize("change", [make_folder, lose_folder, bar_folder])
def test_an_error_of_a_target_that_changes_meanwhile_names_it(change: Any, tmp_path: Path) -> None:
    target = tmp_path / "folder" / "new.bin"
    target.parent.mkdir()

    def on_progress(done: int, _: int | None) -> None:
        if not done:
            change(target)

    with Script(LINK, answer(body=b"x" * 100_000)) as server, pytest.raises(OSError) as caught:
        client_of(server).download_file(S3, target, on_progress=on_progress)
    assert str(target.parent) in str(caught.value)
    assert ".part" not in f"{caught.value} {caught.value!r}"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "folder"]


@pytest.mark.parametrize("url", [
    "", "file:///etc/passwd", "ftp://h/x", "/o?sig=1", "s3://b/k", "http://[h/", "http://h:99999/",
    "http://h h/", 5, None,
], ids=repr)  # fmt: skip
def test_a_presigned_url_that_is_no_http_url_is_an_error(url: Any, tmp_path: Path) -> None:
    given = answer({"presigned_url": url, "upload_url": url, "s3_url": S3})
    with Script(given, given) as server:
        with pytest.raises(GatewayError):
            client_of(server).download_file(S3, tmp_path / "f")
        with pytest.raises(GatewayError):
            client_of(server).upload_input_file(__file__)
    assert not list(tmp_path.iterdir()) and len(server.received) == 2


OBJECT = bytes(range(256)) * 40
NEW_OBJECT = OBJECT[::-1] + b"new"
SHORT_OBJECT = OBJECT[:500]
SIZE = len(OBJECT)


def stored(request: Received, content: bytes = OBJECT, etag: str | None = '"1"',
           cut: int | None = None, *,
           ranges: bool = True, if_range: bool = True, framed: str = "length", encoding: str = "",
           status: int = 200, **wrong: Any) -> Answer:
    """A storage's answer to a GET; `cut` is the place in the object where it hangs up."""
    if framed == "close":
        return unframed(content, "application/octet-stream")
    if status >= 400:
        body = b"<Error><Code>Sorry</Code><Message>not now</Message></Error>"
        return answer(status=status, body=body)
    start, headers = 0, {"ETag": etag} if etag else {}
    headers.update({"Content_Encoding": encoding} if encoding else {})
    asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
    if asked and ranges and (not if_range or request.headers.get("if-range") == etag):
        start = int(asked[1])
        if start >= len(content):
            return answer(status=416, body=b"<Error><Code>InvalidRange</Code></Error>")
        shown = wrong.get("span", f"bytes {start}-{len(content) - 1}/{len(content)}")
        headers.update({"Content_Range": shown} if shown else {})
    payload, status = content[start : wrong.get("end")], 206 if start else 200
    left = None if cut is None else cut - start
    if framed == "length":
        text = answer(status=status, body=payload, **headers)
        return text if left is None else HangUp(text[: len(text) - len(payload) + left])
    head = answer(status=status, body=b"", **headers).replace(b"Content-Length: 0\r\n", b"")[:-2]
    text = head + chunked(payload[:left], end=cut is None).partition(b"\r\n")[2]
    return text if left is None else HangUp(text)


class Transfer(NamedTuple):
    """Answers to the GETs of a download, and where each has to start (`If-Range`: first ETag)."""

    answers: list[dict[str, Any]]
    starts: list[int | tuple[int, str] | None]  # None: without a Range; or with another ETag
    content: bytes | None = OBJECT  # None: it fails
    max_retries: int = 2


CUT: dict[str, Any] = {"cut": 1000}
NEW: dict[str, Any] = {"content": NEW_OBJECT, "etag": '"2"'}
SHRUNK: dict[str, Any] = {"content": SHORT_OBJECT, "etag": '"2"'}
BUSY: dict[str, Any] = {"status": 503}
GZIP: dict[str, Any] = {"encoding": "gzip"}
TRANSFERS = {
    "one-cut": Transfer([CUT, {}], [None, 1000]),
    "two-cuts": Transfer([CUT, {"cut": 5000}, {}], [None, 1000, 5000]),
    "cut-before-the-last-byte": Transfer([{"cut": SIZE - 1}, {}], [None, SIZE - 1]),
    "cut-behind-the-last-byte": Transfer([{"cut": SIZE}], [None]),
    "last-chunk-missing": Transfer([{"cut": SIZE, "framed": "chunks"}, {}, {}], [None, SIZE, None]),
    "chunks": Transfer([{"framed": "chunks"}], [None]),
    "chunks-cut": Transfer(
        [{"framed": "chunks", "cut": 1000}, {"framed": "chunks", "cut": 5000}, {}],
        [None, 1000, 5000]),
    # While each attempt brings more of the object than any before, the retries are counted anew.
    "more-cuts-than-retries": Transfer(
        [*({"cut": cut} for cut in range(1000, 8000, 1000)), {}], [None, *range(1000, 8000, 1000)]),
    "more-cuts-than-one-retry": Transfer(
        [CUT, {"cut": 2000}, {"cut": 3000}, {}], [None, 1000, 2000, 3000], OBJECT, 1),
    "a-byte-more-each-time": Transfer(
        [*({"cut": cut} for cut in range(1000, 1005)), {}], [None, *range(1000, 1005)]),
    "more-cuts-of-chunks-than-retries": Transfer(
        [*({"cut": cut, "framed": "chunks"} for cut in range(1000, 6000, 1000)), {}],
        [None, *range(1000, 6000, 1000)]),
    "more-cuts-from-the-start-than-retries": Transfer(
        [*({"cut": cut, "etag": None} for cut in range(1000, 6000, 1000)), {"etag": None}],
        [None] * 6),
    "more-cuts-with-ranges-ignored-than-retries": Transfer(
        [CUT, *({"cut": cut, "ranges": False} for cut in range(2000, 6000, 1000)), {}],
        [None, *range(1000, 6000, 1000)]),
    "unavailable-between-the-cuts": Transfer(
        [CUT, BUSY, {"cut": 2000}, BUSY, {"cut": 3000}, BUSY, {}],
        [None, 1000, 1000, 2000, 2000, 3000, 3000]),
    "a-cut-without-a-retry": Transfer([CUT], [None], None, 0),
    "cuts-without-a-byte-more": Transfer([CUT] * 3, [None, 1000, 1000], None),
    "cuts-without-a-byte-more-in-the-end": Transfer(
        [CUT, {"cut": 2000}, {"cut": 3000}, {"cut": 3000}, {"cut": 3000}],
        [None, 1000, 2000, 3000, 3000], None),
    "fewer-bytes-each-time": Transfer(
        [{"cut": cut, "etag": None} for cut in (1000, 900, 800)], [None] * 3, None),
    "fewer-bytes-with-ranges-ignored": Transfer(
        [CUT, *({"cut": cut, "ranges": False} for cut in (500, 700))], [None, 1000, 500], None),
    "unavailable-after-a-cut": Transfer([CUT, BUSY, BUSY], [None, 1000, 1000], None),
    "other-etag-200": Transfer([CUT, NEW], [None, 1000], NEW_OBJECT),
    "other-etag-206": Transfer([CUT, *[{**NEW, "if_range": False}] * 2], [None, 1000, None],
                               NEW_OBJECT),
    "other-etag-206-of-the-same-length": Transfer(
        [CUT, *[{"content": OBJECT[::-1], "etag": '"2"', "if_range": False}] * 2],
        [None, 1000, None], OBJECT[::-1]),
    "same-etag-206-of-another-length": Transfer([CUT, *[{"content": NEW_OBJECT}] * 2],
                                                [None, 1000, None], NEW_OBJECT),
    "no-etag-206": Transfer(
        [CUT, *[{"content": NEW_OBJECT, "etag": None, "if_range": False}] * 2], [None, 1000, None],
        NEW_OBJECT),
    "other-etag-cut-too": Transfer([CUT, {**NEW, "cut": 700}, NEW], [None, 1000, (700, '"2"')],
                                   NEW_OBJECT),
    "shrunk-416": Transfer([CUT, *[{**SHRUNK, "if_range": False}] * 2], [None, 1000, None],
                           SHORT_OBJECT),
    "shrunk-416-twice": Transfer(
        [CUT, {**SHRUNK, "if_range": False}, {**SHRUNK, "cut": 300},
         *[{"content": OBJECT[:200], "etag": '"3"', "if_range": False}] * 2],
        [None, 1000, None, (300, '"2"'), None], OBJECT[:200], 4),
    "shrunk-416-after-a-last-retry": Transfer(
        [CUT, {"cut": 2000}, {"cut": 3000}, *[{**SHRUNK, "if_range": False}] * 2],
        [None, 1000, 2000, 3000, None], SHORT_OBJECT),
    "416-to-no-range": Transfer([{"status": 416}], [None], None),
    "emptied-200": Transfer([CUT, {"content": b"", "etag": '"2"'}], [None, 1000], b""),
    "range-ignored": Transfer([CUT, {"ranges": False}], [None, 1000]),
    "no-etag": Transfer([{"cut": 1000, "etag": None}, {"etag": None}], [None, None]),
    "weak-etag": Transfer([{"cut": 1000, "etag": 'W/"1"'}, {"etag": 'W/"1"'}], [None, None]),
    "span-elsewhere": Transfer([CUT, {"span": "bytes 5-10239/10240"}, {}], [None, 1000, None]),
    "span-garbage": Transfer([CUT, {"span": "bytes x-y/z"}, {}], [None, 1000, None]),
    "span-of-5000-digits": Transfer([CUT, {"span": f"bytes {'9' * 5000}-/*"}, {}],
                                    [None, 1000, None]),
    "only-a-part-of-the-rest": Transfer([CUT, {"end": 9000, "span": "bytes 1000-8999/10240"}, {}],
                                        [None, 1000, 9000]),
    "only-a-part-of-the-rest-without-total": Transfer(
        [CUT, {"end": 9000, "span": "bytes 1000-8999/*"}, {}], [None, 1000, None]),
    "only-a-part-of-the-rest-without-a-word": Transfer([CUT, {"end": 9000}, {}],
                                                       [None, 1000, 9000]),
    "blanks-behind-the-span": Transfer([CUT, {"span": "bytes 1000-10239/10240 \t"}], [None, 1000]),
    "blanks-behind-the-etag": Transfer(
        [{"cut": 1000, "etag": '"1" '}, {"etag": '"1"\t', "if_range": False}], [None, 1000]),
    "blanks-around-the-etag": Transfer(
        [{"cut": 1000, "etag": ' \t"1" '}, {"if_range": False}], [None, 1000]),
    "neither-length-nor-chunks": Transfer([{"framed": "close"}], [None], None),
    "empty": Transfer([{"content": b""}], [None], b""),
    "encoding-gone": Transfer([{**CUT, **GZIP}, {}, {}], [None, 1000, None]),
    "encoding-new": Transfer([CUT, GZIP, GZIP], [None, 1000, None]),
    "encoding-other": Transfer([{**CUT, **GZIP}, *[{"encoding": "br"}] * 2], [None, 1000, None]),
    "encoding-gone-and-cut-again": Transfer(
        [{**CUT, **GZIP}, {}, {"cut": 500}, {}], [None, 1000, None, 500], OBJECT, 4),
    "encoding-the-same": Transfer([{**CUT, **GZIP}, {"encoding": "GZIP"}], [None, 1000]),
    "encoding-that-is-none": Transfer([{**CUT, "encoding": "identity"}, {}], [None, 1000]),
}


def storage_of(give: Callable[[Received], Answer]) -> Routed:
    """A gateway whose presigned URLs lead back to itself, where `give` answers."""

    def choose(request: Received) -> Answer:
        url = f"{server.url}/storage/out?signature=x"
        return (
            answer({"presigned_url": url})
            if request.target.startswith("/internal/")
            else give(request)
        )

    server = Routed(choose)
    return server


@pytest.mark.parametrize("transfer", TRANSFERS.values(), ids=TRANSFERS)
def test_a_download_goes_on_where_it_broke_or_starts_over(
    transfer: Transfer, tmp_path: Path
) -> None:
    target, given, failed = tmp_path / "out.bin", iter(transfer.answers), False
    progress: list[tuple[int, Any]] = []
    target.write_bytes(b"old")
    with (
        nothing_left(tmp_path),
        storage_of(lambda request: stored(request, **next(given))) as server,
    ):
        with client_of(server, max_retries=transfer.max_retries) as client:
            try:
                client.download_file(
                    "s3://b/out", target, on_progress=lambda *step: progress.append(step)
                )
            except GatewayError:
                failed = True
    at_storage = [r for r in server.received if r.target.startswith("/storage/")]
    asked = [(r.headers.get("range"), r.headers.get("if-range")) for r in at_storage]
    expected = [start if isinstance(start, tuple) else (start, '"1"') for start in transfer.starts]
    assert asked == [
        (None, None) if start is None else (f"bytes={start}-", etag) for start, etag in expected
    ]
    assert len(asked) == len(transfer.answers)
    assert failed == (transfer.content is None)
    assert target.read_bytes() == (b"old" if failed else transfer.content)
    if not failed:
        length = len(target.read_bytes())
        assert progress[0][0] == 0 and progress[-1] in ((length, length), (length, None))


@pytest.mark.parametrize(("retry_after", "waited"), [("7", 7), ("60", 60), ("61", None)])
def test_a_storage_that_is_busy_in_the_middle_of_a_download_says_how_long(
    retry_after: str, waited: int | None, tmp_path: Path, delays: list[float]
) -> None:
    busy = answer(body=b"SlowDown", status=503, Retry_After=retry_after)
    given = iter([CUT, busy, {"cut": 2000}, busy, {}])

    def give(request: Received) -> Answer:
        step = next(given)
        return step if step is busy else stored(request, **step)

    with storage_of(give) as server, client_of(server, max_retries=2) as client:
        ends = contextlib.nullcontext() if waited else pytest.raises(ServiceUnavailableError)
        with ends:
            client.download_file(S3, tmp_path / "out.bin")
    assert [delay for delay in delays if delay >= 1] == ([waited] * 2 if waited else [])
    assert len(delays) == (4 if waited else 1)


# Storages that give a part of the object to each request, and never what is missing.
HOPELESS: dict[str, Callable[[Received, int], Answer]] = {
    "416 to each range": lambda r, _: stored(r, status=416 if "range" in r.headers else 200, **CUT),
    "403 to each range": lambda r, _: stored(r, status=403 if "range" in r.headers else 200, **CUT),
    "another object each time": lambda r, n: stored(r, etag=f'"{n}"', if_range=False, **CUT),
    "another encoding each time": lambda r, n: stored(r, encoding=f"x-{n}", **CUT),
    "another length each time": lambda r, n: stored(r, OBJECT + b"." * n, if_range=False, **CUT),
}


@pytest.mark.parametrize("storage", HOPELESS)
def test_a_storage_that_never_gives_the_rest_is_given_up(storage: str, tmp_path: Path) -> None:
    numbers = itertools.count()

    def give(request: Received) -> Answer:
        number = next(numbers)
        return HOPELESS[storage](request, number) if number < 50 else stored(request)

    with nothing_left(tmp_path), storage_of(give) as server, client_of(server) as client:
        with pytest.raises(GatewayError):
            client.download_file(S3, tmp_path / "new" / "out.bin")
    assert next(numbers) < 20


EXPIRED: dict[str, Any] = {"status": 403}
# Of each request to the storage: the number of the presigned URL, where it has to start, and the
# answer. Then what comes of it all: the object, or an error of this status.
EXPIRIES: dict[str, tuple[list[tuple[int, Any, dict[str, Any]]], Any]] = {
    "403": ([(1, None, CUT), (1, 1000, EXPIRED), (2, 1000, {})], OBJECT),
    "400": ([(1, None, CUT), (1, 1000, {"status": 400}), (2, 1000, {})], OBJECT),
    "401": ([(1, None, CUT), (1, 1000, {"status": 401}), (2, 1000, {})], OBJECT),
    "twice": (
        [(1, None, CUT), (1, 1000, EXPIRED), (2, 1000, {"cut": 2000}), (2, 2000, EXPIRED),
         (3, 2000, {})], OBJECT),
    "after many cuts": (
        [(1, None, CUT), (1, 1000, {"cut": 2000}), (1, 2000, {"cut": 3000}),
         (1, 3000, {"cut": 4000}), (1, 4000, EXPIRED), (2, 4000, {})], OBJECT),
    "without an ETag": (
        [(1, None, {"cut": 1000, "etag": None}), (1, None, EXPIRED), (2, None, {"etag": None})],
        OBJECT),
    "of a new object": ([(1, None, CUT), (1, 1000, EXPIRED), (2, 1000, NEW)], NEW_OBJECT),
    "of an object that is gone": (
        [(1, None, CUT), (1, 1000, EXPIRED), (2, 1000, {"status": 404})], 404),
    "of a new URL too": ([(1, None, CUT), (1, 1000, EXPIRED), (2, 1000, EXPIRED)], 403),
    "from the start": ([(1, None, EXPIRED)], 403),
    "404": ([(1, None, CUT), (1, 1000, {"status": 404})], 404),
}


@pytest.mark.parametrize("expiry", EXPIRIES)
def test_a_presigned_url_that_expires_meanwhile_is_asked_for_anew(
    expiry: str, tmp_path: Path
) -> None:
    steps, end = EXPIRIES[expiry]
    links, given = itertools.count(1), iter(steps)

    def choose(request: Received) -> Answer:
        if request.target.startswith("/internal/"):
            return answer({"presigned_url": f"{server.url}/{next(links)}?signature=hush-hush-hush"})
        return stored(request, **next(given, (0, 0, EXPIRED))[2])

    (tmp_path / "out.bin").write_bytes(b"old")
    with nothing_left(tmp_path), Routed(choose) as server, client_of(server) as client:
        whole = isinstance(end, bytes)
        with contextlib.nullcontext() if whole else pytest.raises(GatewayError) as caught:
            client.download_file(S3, tmp_path / "out.bin")
    asked = [request for request in server.received if "signature" in request.target]
    assert [(request.target[:2], request.headers.get("range")) for request in asked] == [
        (f"/{number}", None if start is None else f"bytes={start}-") for number, start, _ in steps]
    assert len(server.received) - len(asked) == max(number for number, _, _ in steps)
    assert (tmp_path / "out.bin").read_bytes() == (end if caught is None else b"old")
    if caught:
        assert (type(caught.value), caught.value.status_code) == (GatewayError, end)
        assert "not now" in str(caught.value) and "hush" not in all_of(caught.value)


@cpython_only  # on PyPy 8 a loop that does nothing but read a file in blocks takes twice its size
@pytest.mark.skipif(not os.path.exists("/proc/self/status"),
                    reason="reads the peak of the memory there")
def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    allowed = 16 * 2**20
    size = 4 * allowed
    moved: list[int] = []

    def serve(sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                head, body = read_head(sock)
                if head.startswith(b"GET /storage"):
                    sock.sendall(
                        answer(body=b"", ETag='"1"').replace(b"Length: 0", b"Length: %d" % size)
                    )
                    block = bytes(2**20)
                    for _ in range(size // len(block)):
                        sock.sendall(block)
                    moved.append(size)
                    continue
                length = length_in(head) if head.startswith(b"P") else 0
                receive(sock, length - len(body))
                moved.append(length)
                sock.sendall(
                    answer(
                        {
                            "upload_url": f"{server.url}/storage/in",
                            "s3_url": "s3://b/k",
                            "version": "1",
                            "presigned_url": f"{server.url}/storage/out",
                        }
                    )
                )

    # The peak of VmHWM, as that of `ru_maxrss` has the parent's in it.
    code = (
        "import sys; from gateway_sdk import GatewayClient; client = GatewayClient(sys.argv[1])\n"
        "client.get_prefab_spec('p', '1')\n"
        "def peak():\n"
        "    with open('/proc/self/status') as file:\n"
        "        return int(file.read().split('VmHWM:')[1].split()[0])\n"
        "import mimetypes, selectors, uuid; mimetypes.init()\n"
        "before = peak()\n"
        "for call in (client.upload_input_file, client.upload_file):\n"
        "    call(sys.argv[2]); print(peak() - before)\n"
        "client.download_file('s3://b/out', sys.argv[2] + '.new'); print(peak() - before)"
    )
    with open(tmp_path / "large.bin", "wb") as file:
        file.truncate(size)
    with Raw(serve) as server:
        done = python(code, server.url, tmp_path / "large.bin")
    assert (done.returncode, done.stderr) == (0, "")
    assert sum(length >= size for length in moved) == 3
    assert all(1024 * int(kilobytes) < allowed for kilobytes in done.stdout.split())
    assert os.path.getsize(tmp_path / "large.bin.new") == size


@pytest.mark.parametrize("raised", [
    TimeoutError("mine"), KeyError("k"), OSError(28, "mine"), ConnectionResetError("mine"),
    BrokenPipeError("mine"), http.client.RemoteDisconnected("mine"), StopIteration("mine"),
    ServiceUnavailableError("mine"), GatewayTimeoutError("mine"), KeyboardInterrupt("mine"),
    SystemExit("mine"), *OTHERS_ERRORS.values(),
], ids=[*range(11), *OTHERS_ERRORS])  # fmt: skip
@pytest.mark.parametrize("name", ["upload_input_file", "upload_file", "download_file"])
def test_an_error_of_a_callback_is_the_callers_and_nothing_is_sent_again_or_left(
        name: str, raised: BaseException, tmp_path: Path) -> None:
    def fail(done: int, total: int | None) -> None:
        if done:
            raise raised

    (tmp_path / "file").write_bytes(b"x" * 1000)
    arguments = (
        [S3, tmp_path / "new" / "folder" / "f"] if name == "download_file" else [tmp_path / "file"]
    )
    second = answer(body=b"x" * 3000) if name == "download_file" else LINK
    with Script(LINK, second, *[LINK] * 9) as server, client_of(server) as client:
        with pytest.raises(type(raised)) as caught:
            getattr(client, name)(*arguments, on_progress=fail)
        assert caught.value is raised
    assert len(server.received) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_presigned_url_serves_anyone(content_file: Path, client: GatewayClient) -> None:
    url = client.get_presigned_url(client.upload_file(content_file)["s3_url"], expires_in=60)
    with urllib.request.urlopen(url) as response:
        assert response.read() == b"content"


def test_files_are_listed_page_by_page(content_file: Path) -> None:
    with LocalGateway() as gateway, client_of(gateway) as client:
        kept = {client.upload_file(content_file)["s3_url"] for _ in range(5)}
        temporary = {client.upload_temp_file(content_file, 60, "s")["s3_url"] for _ in range(3)}
        client.upload_temp_file(content_file, session_id="other")
        first = client.list_files(limit=2)
        second = client.list_files(2, first["next_token"])
        assert len(first["files"]) == len(second["files"]) == 2 and first["files"][0]["size"] == 7
        assert not client.list_files().get("next_token")
        assert {file["s3_url"] for file in client.list_files()["files"]} == kept
        before = len(gateway.requests)
        pages = client.iter_files(page_size=2)
        assert next(pages)["key"] and len(gateway.requests) == before + 1  # a page at a time
        assert {file["s3_url"] for file in client.iter_files(page_size=2)} == kept
        assert len(gateway.requests) == before + 1 + 3
        assert {file["s3_url"] for file in client.iter_temp_files("s", page_size=2)} == temporary
        assert len(list(client.iter_temp_files())) == len(client.list_temp_files()["files"]) == 4
        assert client.cleanup_temp_files("s") == 3 and client.cleanup_temp_files("s") == 0
        assert len(list(client.iter_temp_files())) == 1 and len(list(client.iter_files())) == 5


def test_a_listing_without_an_end_is_an_error() -> None:
    with (
        Script(*[answer({"files": [{}], "next_token": "same"})] * 9) as server,
        pytest.raises(GatewayError),
    ):
        list(client_of(server).iter_files())
    assert len(server.received) == 2


@pytest.mark.parametrize("session_id", [None, "mine"])
@pytest.mark.parametrize("error", [None, LookupError, KeyboardInterrupt])
def test_a_temporary_session_is_cleaned_up_error_or_not(
    error: Any, session_id: str | None, content_file: Path, client: GatewayClient
) -> None:
    with pytest.raises(error) if error else contextlib.nullcontext():
        with client.temp_session(session_id) as given:
            assert given == session_id or (session_id is None and given)
            client.upload_temp_file(content_file, session_id=given)
            assert len(client.list_temp_files(given)["files"]) == 1
            if error:
                raise error
    assert client.list_temp_files(given)["files"] == []


def test_a_session_may_be_given_as_a_uuid() -> None:
    with LocalGateway() as gateway, client_of(gateway) as client:
        given = uuid.uuid4()
        with client.temp_session(given) as session_id:  # type: ignore[arg-type]
            assert session_id == str(given)
            client.upload_temp_file(ROOT / "LICENSE", session_id=session_id)
            assert len(client.list_temp_files(session_id)["files"]) == 1
        assert client.list_temp_files(session_id)["files"] == []


@pytest.mark.parametrize(
    "given", [uuid.uuid4(), 5, 1.5, b"s", ["s"], object(), "\ud800", Path("s")], ids=ascii
)
def test_a_session_that_could_not_be_cleaned_up_does_not_begin(given: Any) -> None:
    began = False
    with Routed(lambda _: answer({"deleted_count": 0})) as server, client_of(server) as client:
        try:
            with client.temp_session(given):
                began = True
        except (ValidationError, TypeError):
            assert not began and not server.received
        else:
            assert [received.method for received in server.received] == ["DELETE"]


def test_the_first_error_counts_more_than_that_of_the_cleaning_up() -> None:
    with Script(*[answer({"detail": "x"}, 400)] * 2) as server:
        client = client_of(server)
        with pytest.raises(LookupError), client.temp_session():
            raise LookupError
        with pytest.raises(GatewayError), client.temp_session():
            pass
    assert [received.method for received in server.received] == ["DELETE"] * 2


def test_an_upload_that_came_too_slowly_for_the_storage_is_sent_again(
    content_file: Path, delays: list[float]
) -> None:
    slow = b"<Error><Code>RequestTimeout</Code><Message>too slow</Message></Error>"
    with Script(link(), answer(body=slow, status=400), answer()) as server:
        assert client_of(server).upload_input_file(content_file) == S3
    assert [received.method for received in server.received] == ["POST", "PUT", "PUT"]
    assert len(delays) == 1


# --- Batches --------------------------------------------------------------------------------------


def test_a_batch_keeps_the_order_and_reports_each_result_as_it_comes() -> None:
    others_are_in = threading.Event()
    reported: list[tuple[int, Any, int]] = []

    def last_first(number: int) -> int:
        assert number or others_are_in.wait(WAIT_SECONDS)
        return number

    def on_result(index: int, result: PrefabResult) -> None:
        reported.append((index, result.get_function_result(), threading.get_ident()))
        if len(reported) == 2:
            others_are_in.set()

    with LocalGateway() as gateway, client_of(gateway) as client:
        gateway.add_prefab("p", "1.0.0", {"f": last_first})
        calls = (PrefabCall("p", "1.0.0", "f", {"number": number}) for number in range(3))
        batch = client.run_batch(calls, on_result=on_result)
        assert len(gateway.requests) == 3
    assert [result.get_function_result() for result in batch.results] == [0, 1, 2]
    assert reported[-1][0] == 0 and {thread for _, _, thread in reported} == {threading.get_ident()}
    assert all(index == value for index, value, _ in reported)
    assert (batch.status, batch.job_id, batch.all_success()) == ("COMPLETED", None, True)
    assert len({result.job_id for result in batch.results}) == 3


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_as_many_calls_run_at_once_as_there_are_workers(workers: int) -> None:
    barrier = threading.Barrier(workers)
    running: list[int] = []
    peaks: list[int] = []

    def meet() -> None:
        running.append(1)
        peaks.append(len(running))
        barrier.wait(WAIT_SECONDS)
        running.pop()

    with LocalGateway() as gateway, client_of(gateway) as client:
        gateway.add_prefab("p", "1.0.0", {"f": meet})
        options = {} if workers == 8 else {"max_workers": workers}  # 8 is the default
        assert client.run_batch(
            [PrefabCall("p", "1.0.0", "f")] * (3 * workers), **options
        ).all_success()
    assert max(peaks) <= workers


def mixed_calls() -> list[PrefabCall]:
    return [
        PrefabCall("text-tools", "1.1.0", "echo", {"value": "first"}),
        PrefabCall("nothing", "1.0.0", "f"),
        PrefabCall("faulty", "1.0.0", "refuse"),
        PrefabCall("faulty", "1.0.0", "crash"),
        PrefabCall("text-tools", "1.1.0", "words", {"text": "a stream"}),
    ]


def check_mixed(batch: BatchResult) -> None:
    first, unknown, refused, crashed, streamed = batch.results
    assert batch.status == "PARTIAL_SUCCESS" and batch.get_failed() == [unknown, refused, crashed]
    assert first.get_function_result() == "first" and streamed.get_function_result() == "a stream"
    assert isinstance(unknown.exception, PrefabNotFoundError) and unknown.status == "FAILED"
    assert unknown.exception.prefab_id == "nothing" and unknown.error
    assert unknown.error["type"] == "PrefabNotFoundError"
    assert unknown.error["message"] == unknown.exception.message
    assert "error_code" not in unknown.error
    assert refused.exception is None and refused.error and refused.error["type"] == "Refused"
    assert isinstance(crashed.exception, ServiceUnavailableError) and crashed.output is None
    assert unknown.error["may_have_run"] is False
    assert crashed.error and crashed.error["may_have_run"] is True
    assert "may_have_run" not in refused.error  # it has run


def test_a_failed_call_of_a_batch_does_not_cost_the_others(client: GatewayClient) -> None:
    check_mixed(client.run_batch(mixed_calls()))


def test_the_threads_of_a_batch_have_the_callers_context() -> None:
    trace: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")
    seen: list[tuple[str, str]] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((threading.current_thread().name, trace.get()))

    logger, recorder = logging.getLogger("gateway_sdk"), Recorder(logging.DEBUG)
    before = logger.level
    logger.addHandler(recorder)
    logger.setLevel(logging.DEBUG)
    try:
        with Script(*[together(4, ran())] * 4) as server, client_of(server) as client:
            trace.set("request-7")
            assert client.run_batch([call()] * 4, max_workers=4).all_success()
    finally:
        logger.removeHandler(recorder)
        logger.setLevel(before)
    assert len(seen) >= 4 and {value for _, value in seen} == {"request-7"}
    assert len({name for name, _ in seen}) >= 4


def test_batches_of_two_callers_keep_their_contexts_apart() -> None:
    trace: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")
    seen: list[tuple[str, str]] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((record.getMessage(), trace.get()))

    def act(name: str) -> None:
        trace.set(name)
        with Script(*[meeting] * 2) as server, client_of(server) as client:
            client.run_batch([PrefabCall(name, "1", "f")] * 2, max_workers=2)

    meeting = together(4, ran())
    logger, recorder = logging.getLogger("gateway_sdk"), Recorder(logging.DEBUG)
    before = logger.level
    logger.addHandler(recorder)
    logger.setLevel(logging.DEBUG)
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as callers:
            list(callers.map(act, ["first", "second"]))
    finally:
        logger.removeHandler(recorder)
        logger.setLevel(before)
    assert sorted(value for _, value in seen) == ["first"] * 2 + ["second"] * 2


@cpython_only
def test_any_executor_runs_a_batch(client: GatewayClient) -> None:
    threads = concurrent.futures.ThreadPoolExecutor(2)
    spawning = multiprocessing.get_context("spawn")
    processes = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawning)
    for executor in (threads, processes):
        reported: list[int] = []
        with executor:
            batch = client.run_batch(
                mixed_calls(), executor=executor, on_result=lambda i, _, to=reported: to.append(i)
            )
            assert executor.submit(int).result() == 0  # it is the caller's, and still open
        check_mixed(batch)
        assert sorted(reported) == [0, 1, 2, 3, 4]


def cancelled() -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.cancel()
    return future


def failed(error: BaseException) -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_exception(error)
    return future


def broken() -> concurrent.futures.Future[Any]:
    return failed(RuntimeError("worker lost"))


def cancelled_by_itself() -> concurrent.futures.Future[Any]:
    return failed(concurrent.futures.CancelledError("cancelled by the cluster"))


def refused() -> concurrent.futures.Future[Any]:
    raise RuntimeError("pool is closed")


def mixed_up() -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_result("of another task")
    return future


# Python's own pools give back as cancelled only what they have not begun; Dask's does others, too.
KINDS = [
    concurrent.futures.Executor,
    concurrent.futures.ThreadPoolExecutor,
    concurrent.futures.ProcessPoolExecutor,
]


@pytest.mark.parametrize(
    ("submit", "said", "may_have_run", "kinds"),
    [(broken, "worker lost", True, KINDS), (cancelled_by_itself, "cancelled", True, KINDS[:1]),
     (cancelled, "cancelled", True, KINDS[:1]), (cancelled, "cancelled", False, KINDS[1:]),
     (refused, "pool is closed", False, KINDS), (mixed_up, "of another task", True, KINDS)],
)  # fmt: skip
def test_an_executor_that_does_not_run_its_calls_fails_them_and_not_the_batch(
    submit: Any, said: str, may_have_run: bool, kinds: list[Any], client: GatewayClient
) -> None:
    for kind in kinds:

        class Executor(kind):  # type: ignore[misc]
            def submit(self, *_: Any, **__: Any) -> Any:
                return submit()

        with Executor() as executor:
            batch = client.run_batch(mixed_calls(), executor=executor)
        assert batch.status == "FAILED" and len({id(result) for result in batch.results}) == 5
        for result in batch.results:
            assert isinstance(result.exception, ServiceUnavailableError)
            assert said in str(result.error)
            check_may_have_run(result, may_have_run)


def check_may_have_run(result: PrefabResult, expected: bool) -> None:
    """Exception, message and `error` say the same, also when they are pickled, and as JSON."""
    for copied in (result, pickle.loads(pickle.dumps(result))):
        assert copied.exception and copied.error
        assert copied.exception.may_have_run == expected
        assert copied.error["may_have_run"] is expected
        for message in (copied.exception.message, copied.error["message"]):
            assert ("may have run" in message) == expected
    assert json.loads(json.dumps(result.to_dict()))["error"]["may_have_run"] is expected


class Careless(concurrent.futures.Executor):
    """Runs its calls in threads, and lets them be cancelled while they run, as a cluster does."""

    def __init__(self) -> None:
        self.futures: list[concurrent.futures.Future[Any]] = []
        self._threads: list[threading.Thread] = []

    def submit(self, function: Any, *arguments: Any, **_: Any) -> Any:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def work() -> None:
            result = function(*arguments)
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_result(result)

        self.futures.append(future)
        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()
        return future

    def shutdown(self, wait: bool = True, **_: Any) -> None:
        for thread in self._threads:
            thread.join(WAIT_SECONDS)


@pytest.mark.parametrize("by_the_batch", [True, False], ids=["after a 401", "by the executor"])
def test_a_call_that_was_cancelled_while_it_ran_may_have_run(by_the_batch: bool) -> None:
    gate = threading.Event()
    held = Steps((lambda _: gate.wait(WAIT_SECONDS), send(ran())))

    def first(_: socket.socket) -> None:
        server.wait_until(lambda: len(server.received) == 4)

    def choose(received: Received) -> Answer:
        if received.json["calls"][0]["inputs"]["parameters"]["n"]:
            return held
        return Steps((first, send(REFUSED if by_the_batch else ran("first"))))

    def on_result(index: int, result: PrefabResult) -> None:
        reported.append(index)
        if index == 0 and not by_the_batch:
            for future in executor.futures:
                future.cancel()

    reported: list[int] = []
    calls = [call(number) for number in range(4)]
    with Routed(choose) as server, client_of(server) as client, Careless() as executor:
        batch = client.run_batch(calls, executor=executor, on_result=on_result)
        gate.set()
    assert sorted(reported) == [0, 1, 2, 3] and len(server.received) == 4
    for result in batch.results[1:]:
        check_may_have_run(result, True)
    if by_the_batch:
        assert batch.status == "FAILED"
        assert isinstance(batch.results[0].exception, AuthenticationError)
        check_may_have_run(batch.results[0], False)
    else:
        assert batch.status == "PARTIAL_SUCCESS"
        assert batch.results[0].get_function_result() == "first"


class NamedPool(concurrent.futures.ThreadPoolExecutor):
    """One of somebody's own."""


@pytest.mark.parametrize("kind", [concurrent.futures.ThreadPoolExecutor, NamedPool])
@pytest.mark.parametrize("by_the_batch", [True, False], ids=["after a 401", "by the executor"])
def test_a_call_that_a_pool_had_not_begun_has_not_run(by_the_batch: bool, kind: Any) -> None:
    second = REFUSED if by_the_batch else ran("second")
    begun = threading.Event()
    answers = [ran("first"), Steps((lambda _: begun.wait(WAIT_SECONDS), send(second)))]

    def on_result(index: int, result: PrefabResult) -> None:
        if index == 0:
            server.wait_until(lambda: len(server.received) == 2)
            for future in [] if by_the_batch else executor.futures[2:]:
                future.cancel()
            begun.set()

    class Pool(kind):  # type: ignore[misc]
        def submit(self, *arguments: Any, **options: Any) -> Any:
            self.futures.append(super().submit(*arguments, **options))
            return self.futures[-1]

        futures: list[concurrent.futures.Future[Any]] = []

    calls = [call(number) for number in range(5)]
    with Script(*answers, *[ran()] * 9) as server, client_of(server) as client, Pool(1) as executor:
        executor.futures = []
        batch = client.run_batch(calls, executor=executor, on_result=on_result)
    assert len(server.received) == 2 and batch.results[0].get_function_result() == "first"
    assert batch.results[1].is_success() != by_the_batch
    for result in batch.results[2:]:
        check_may_have_run(result, False)


class OfItsOwn(BaseException):
    """Nobody but its author catches it."""


# What ends a batch out of `on_result`, and the results that are handed over.
BATCH_ENDS: list[tuple[BaseException, list[int]]] = [
    *((error, [0, 1, 2]) for error in (
        KeyboardInterrupt(), SystemExit(3), GeneratorExit(), asyncio.CancelledError(), OfItsOwn())),
    *((error, [0]) for error in (
        LookupError("mine"), OSError(5, "mine"), TimeoutError("mine"), StopIteration("mine"),
        ServiceUnavailableError("mine"))),
]  # fmt: skip


@pytest.mark.parametrize(("raised", "handed"), BATCH_ENDS, ids=repr)
def test_what_arrived_before_an_interruption_is_reported_and_the_rest_cancelled(
    raised: BaseException, handed: list[int], client: GatewayClient
) -> None:
    futures: list[concurrent.futures.Future[Any]] = []
    reported: list[int] = []

    class RunsThree(concurrent.futures.Executor):
        def submit(self, function: Any, *arguments: Any, **_: Any) -> Any:
            futures.append(concurrent.futures.Future())
            if len(futures) <= 3:
                futures[-1].set_result(function(*arguments))
            return futures[-1]

    def on_result(index: int, result: PrefabResult) -> None:
        reported.append(index)
        if index == 0:
            raise raised

    with pytest.raises(type(raised)) as caught:
        client.run_batch([call()] * 5, executor=RunsThree(), on_result=on_result)
    assert caught.value is raised and reported == handed
    assert [future.cancelled() for future in futures] == [False] * 3 + [True] * 2


@pytest.mark.parametrize(("raised", "handed"), BATCH_ENDS, ids=repr)
@pytest.mark.parametrize("count", [1, 3])
def test_of_a_single_request_all_results_are_reported_whatever_ends_it(
    count: int, raised: BaseException, handed: list[int]
) -> None:
    def on_result(index: int, result: PrefabResult) -> None:
        reported.append(index)
        if index == 0:
            raise raised

    reported: list[int] = []
    given = answer({"results": [{"status": "SUCCESS"}] * count})
    with Script(given) as server, client_of(server) as client:
        with pytest.raises(type(raised)) as caught:
            client.run_batch([call()] * count, single_request=True, on_result=on_result)
    assert caught.value is raised and reported == handed[:count]


@pytest.mark.parametrize("raised", [error for error, handed in BATCH_ENDS if len(handed) == 3],
                         ids=repr)
def test_what_arrived_before_an_executor_was_interrupted_is_reported(raised: BaseException) -> None:
    reported: list[int] = []

    class TakesTwo(concurrent.futures.Executor):
        def submit(self, function: Any, *arguments: Any, **_: Any) -> Any:
            if len(server.received) == 2:
                raise raised
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            future.set_result(function(*arguments))
            return future

    def on_result(index: int, result: PrefabResult) -> None:
        reported.append(index)

    with Routed(lambda received: ran()) as server, client_of(server) as client:
        with pytest.raises(type(raised)) as caught:
            client.run_batch([call()] * 5, executor=TakesTwo(), on_result=on_result)
    assert caught.value is raised and reported == [0, 1] and len(server.received) == 2


@with_signals
@pytest.mark.parametrize(
    ("name", "raised"),
    [("SIGTERM", SystemExit(143)), ("SIGINT", KeyboardInterrupt()), ("SIGHUP", OfItsOwn()),
     ("SIGALRM", GeneratorExit())],
    ids=str,
)  # fmt: skip
def test_a_signal_that_ends_a_batch_costs_no_result_that_has_arrived(
    name: str, raised: BaseException
) -> None:
    number = getattr(signal, name)
    reported: list[int] = []
    gate = threading.Event()
    held = Steps((lambda _: gate.wait(WAIT_SECONDS), send(ran())))

    def on_result(index: int, result: PrefabResult) -> None:
        # When the only worker has sent the last call, the results of all others have arrived.
        if not reported:
            server.wait_until(lambda: len(server.received) == 100)
        reported.append(index)
        if index == 37:
            signal.raise_signal(number)

    with Routed(lambda received: ran() if len(server.received) < 100 else held) as server:
        with client_of(server) as client, handling(raising(raised), number):
            with pytest.raises(type(raised)) as caught:
                client.run_batch([call()] * 100, max_workers=1, on_result=on_result)
        gate.set()
    assert caught.value is raised and reported == [*range(99)]


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, OfItsOwn])
@pytest.mark.parametrize("single_request", [False, True])
def test_no_result_is_lost_wherever_between_its_arrival_and_on_result_a_batch_is_ended(
    single_request: bool, raised: Any
) -> None:
    """Before each line of the thread that hands over the results, when all of them are there."""
    answers = {False: ran(), True: answer({"results": [{"status": "SUCCESS"}] * 4})}

    def end() -> None:
        raise raised

    def comes_to_its_end(at: int) -> bool:
        """Whether there were fewer lines than that."""
        reported: list[int] = []
        done = False
        with client_of(server) as client, concurrent.futures.ThreadPoolExecutor(1) as executor:
            with contextlib.suppress(raised), contextlib.ExitStack() as stack:

                def on_result(index: int, result: PrefabResult) -> None:
                    reported.append(index)
                    if index == 0:
                        executor.shutdown()  # waits until it has run all calls
                        stack.enter_context(interrupted(at, end))
                        trace_entered_frames()

                how: Any = {"single_request": True} if single_request else {"executor": executor}
                client.run_batch([call()] * 4, on_result=on_result, **how)
                done = True
        assert sorted({*reported}) == [0, 1, 2, 3], f"ended at line {at}"
        return done

    def trace_entered_frames() -> None:
        frame: Any = sys._getframe(2)
        enter_function: Any = sys.gettrace()
        while frame:
            frame.f_trace = enter_function(frame, "call", None) or frame.f_trace
            frame = frame.f_back

    with Routed(lambda received: answers[single_request]) as server:
        at = next(at for at in itertools.count(1) if comes_to_its_end(at))
    assert at > 5


FORBIDDEN = answer({"error_code": "E", "message": "not yours"}, 403)  # which may concern one prefab
# How calls fail.
WAYS_TO_FAIL: list[Answer] = [
    UNAVAILABLE, FORBIDDEN, HangUp(), HangUp(reset=True), HangUp(ran()[:-9]), HangUp(OPEN_STREAM),
    answer({"detail": "no such prefab"}, 404), answer(body=b"<html>"), answer({"results": []}),
    answer({"detail": [{"loc": ["body", "calls", 0], "msg": "bad", "type": "x"}]}, 422),
]  # fmt: skip


@cpython_only
@pytest.mark.parametrize(
    "way", ["in threads", "on an executor", "without an answer", "without a connection"]
)
def test_a_failed_result_does_not_keep_its_request(way: str, refusing: str) -> None:
    import tracemalloc  # PyPy has none

    size, repeated = 400_000, 2
    silent = way == "without an answer"
    answers = [Pause()] * len(WAYS_TO_FAIL) if silent else WAYS_TO_FAIL
    timeout = SHORT_SECONDS if silent else WAIT_SECONDS
    with Script(*answers * repeated) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        url = f"http://{refusing}" if way == "without a connection" else server.url
        with GatewayClient(url, timeout=timeout, max_retries=0) as client:
            tracemalloc.start()
            try:
                text = "x" * size
                calls = [PrefabCall("p", "1.0.0", "f", {"text": text}) for _ in answers * repeated]
                batch = client.run_batch(calls, executor=pool if way == "on an executor" else None)
                client.close()
                server.wait_until(lambda: server.open_connections == 0)
                server.received.clear()  # it had the bodies
                gc.collect()
                kept = tracemalloc.get_traced_memory()[0]
            finally:
                tracemalloc.stop()
    assert len([result for result in batch.results if result.exception]) == len(calls)
    # Nor those of one kind. Without the GIL, what threads held may go later.
    most = repeated if COUNTS_REFERENCES else len(calls) // 2
    assert kept - size < size * most


def test_context_variables_reach_the_threads_of_a_batch() -> None:
    """Seen by what runs there: a handler of the log."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: list[tuple[str, bool]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((variable.get(), threading.current_thread() is asking))

    def ask(value: str) -> list[str]:
        """A batch with this value. Gives those that its threads saw."""
        variable.set(value)
        client.run_batch([call(), call(), call()], max_workers=2)
        return [value for value, is_asking in seen if not is_asking]

    asking = threading.current_thread()
    logger, handler = logging.getLogger("gateway_sdk"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with Routed(lambda received: ran()) as server, client_of(server) as client:
            for value in ("first", "second"):
                del seen[:]
                values = contextvars.copy_context().run(ask, value)
                assert len(values) >= 3 and {*values} == {value}
            del seen[:]
            with concurrent.futures.ThreadPoolExecutor(2) as askers:
                askings = [askers.submit(contextvars.Context().run, ask, value)
                           for value in ("third", "fourth")]  # fmt: skip
            assert all(asking.result() for asking in askings)
            assert {value for value, _ in seen} == {"third", "fourth"}
            assert collections.Counter(value for value, _ in seen)["third"] == len(seen) / 2
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert variable.get() == "none"


def test_the_exceptions_of_a_batch_keep_no_frames_alive() -> None:
    with Script() as server, client_of(server, max_retries=0) as client:
        (result,) = client.run_batch([call()]).results
    error = result.exception
    assert error and error.__traceback__ is None
    assert not error.__context__ or error.__context__.__traceback__ is None


# What is answered to the calls that are sent, one after another, and the exceptions of all results.
REFUSALS: dict[str, tuple[list[Answer], list[Any]]] = {
    "behind a call that may have run": ([UNAVAILABLE, REFUSED],
                                        [ServiceUnavailableError, AuthenticationError]),
    "behind a result": ([ran("paid for"), REFUSED], [type(None), *[AuthenticationError] * 3]),
    "of single calls": ([FORBIDDEN] * 3, [AuthenticationError] * 3),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_credential_does_not_hide_what_became_of_other_calls(name: str) -> None:
    answers, kinds = REFUSALS[name]
    with Script(*answers, *[ran()] * 9) as server:
        batch = client_of(server).run_batch(
            [call(number) for number in range(len(kinds))], max_workers=1
        )
    assert len(server.received) == len(answers)
    assert [type(result.exception) for result in batch.results] == kinds
    assert batch.status == ("PARTIAL_SUCCESS" if type(None) in kinds else "FAILED")
    first = batch.results[0]
    assert first.get_function_result() == ("paid for" if first.is_success() else {})
    assert kinds[0] is not ServiceUnavailableError or (
        first.exception and first.exception.may_have_run
    )
    assert answers[0] is not FORBIDDEN or (first.error and first.error["error_code"] == "E")
    for unsent in batch.results[len(answers):]:
        check_may_have_run(unsent, False)


@pytest.mark.parametrize("way", ["threads", "one thread", "an executor", "a single request"])
def test_a_credential_that_is_refused_from_the_start_is_raised_and_nothing_more_is_sent(
    way: str
) -> None:
    with Script(*[REFUSED] * 20) as server, concurrent.futures.ThreadPoolExecutor(1) as executor:
        ways: dict[str, Any] = {"threads": {}, "one thread": {"max_workers": 1},
                                "an executor": {"executor": executor},
                                "a single request": {"single_request": True}}  # fmt: skip
        with pytest.raises(AuthenticationError) as caught:
            client_of(server).run_batch([call(number) for number in range(20)], **ways[way])
    most = {"threads": 8, "an executor": 2}.get(way, 1)
    assert caught.value.status_code == 401 and 1 <= len(server.received) <= most


# An event stream that answers a request with several calls.
STREAMS_FOR_MANY: dict[str, Answer] = {
    "whole": chunked(A_TEXT, event("done")),
    "with an object": whole(event("done", {"n": 1}), STREAM),
    "unframed": unframed(A_TEXT + event("done"), STREAM),
    "failed": chunked(event("error", "x")),
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", STREAMS_FOR_MANY)
def test_one_event_stream_is_not_the_result_of_several_calls(name: str, count: int) -> None:
    with Script(STREAMS_FOR_MANY[name], ran("second")) as server:
        client = client_of(server, max_retries=0)
        with pytest.raises(GatewayError) as caught:
            client.run_batch([call()] * count, single_request=True)
        assert type(caught.value) is GatewayError and caught.value.may_have_run
        assert len(server.received) == 1 and run(client).get_function_result() == "second"


def test_results_that_come_as_an_event_stream_are_those_of_their_calls() -> None:
    answers = [whole(THREE_RESULTS.encode(), STREAM), chunked(A_TEXT, BROUGHT)]
    with Script(*answers) as server, client_of(server) as client:
        assert values_of(client.run_batch([call()] * 3, single_request=True)) == ["ok"] * 3
        one = client.run_batch([call()], single_request=True)
    assert values_of(one) == ["a"] and one.results[0].get_files() == {"a": [S3]}


def test_a_single_request_has_one_job(client: GatewayClient, gateway: LocalGateway) -> None:
    before, reported = len(gateway.requests), []
    calls = [mixed_calls()[0], mixed_calls()[2]]
    batch = client.run_batch(
        iter(calls), single_request=True, on_result=lambda index, _: reported.append(index)
    )
    assert len(gateway.requests) == before + 1 and reported == [0, 1]
    assert batch.status == "PARTIAL_SUCCESS" and batch.job_id
    assert {result.job_id for result in batch.results} == {batch.job_id}
    assert client.run_batch([calls[1]], single_request=True).status == "FAILED"
    of_one = client.run_batch([calls[0]])
    assert of_one.job_id and of_one.job_id == of_one.results[0].job_id
    assert client.run_batch(mixed_calls()[1:2]).job_id is None
    with pytest.raises(PrefabNotFoundError):
        client.run_batch(mixed_calls(), single_request=True)


FIELDS = [{"loc": ["body", "calls", 1, "version"], "msg": "field required", "type": "missing"}]
TELLING_FIELDS = [{**FIELDS[0], "input": {}, "ctx": {"error": {}}, "url": "https://e.example/"}]
# What a request is answered, and whether calls of it may have run: if it is one call, and if it is
# three, of which the first may have been good.
REFUSED_REQUESTS: dict[str, tuple[bytes, bool, bool]] = {
    "400": (answer({"detail": "no"}, 400), False, True),
    "400 for a secret": (answer({"detail": PLAIN_SECRET}, 400), False, True),
    "400 for a secret by its code": (answer({"error_code": "MISSING_SECRET"}, 400), False, True),
    "401": (REFUSED, False, False),
    "401 in HTML": (answer(body=b"<h1>Unauthorized</h1>", status=401), False, False),
    "403": (FORBIDDEN, False, True),
    "404 for the prefab": (answer({"detail": "Prefab p not found"}, 404), False, True),
    "404 for the function": (answer({"detail": "Function f not found in p"}, 404), False, True),
    "409": (answer({"detail": "busy"}, 409), False, True),
    "422 as a text": (answer({"detail": "Type mismatch for parameter n"}, 422), False, True),
    "422 as an object": (answer({"detail": {"message": "bad"}}, 422), False, True),
    "422 as a list": (answer({"detail": FIELDS}, 422), False, False),
    "422 as a list that tells more": (answer({"detail": TELLING_FIELDS}, 422), False, False),
    "422 as a list of somebody else's": (answer({"detail": ["bad", "worse"]}, 422), False, True),
    "422 in HTML": (answer(body=b"<h1>No</h1>", status=422), False, True),
    "429": (answer({"detail": "too many"}, 429), False, True),
    "500": (answer(body=b"Internal Server Error", status=500), True, True),
    "502": (answer(body=b"<h1>Bad Gateway</h1>", status=502), True, True),
    "503": (UNAVAILABLE, True, True),
    "504 without a body": (answer(body=b"", status=504), True, True),
    "no answer": (HangUp(), True, True),
    "half a JSON": (answer(body=b"{"), True, True),
    "too few results": (answer({"results": []}), True, True),
}  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSED_REQUESTS)
def test_a_refused_request_says_whether_calls_of_it_may_have_run(refusal: str) -> None:
    given, of_one, of_three = REFUSED_REQUESTS[refusal]
    for act, expected in (
        (run, of_one), (lambda c: run(c, stream=True), of_one),
        (lambda c: c.run_batch([call()], single_request=True), of_one),
        (lambda c: c.run_batch([call()] * 3, single_request=True), of_three),
    ):  # fmt: skip
        error = error_of(act, given)
        assert error.may_have_run == expected == ("may have run" in str(error))
    with Script(given, given) as server, client_of(server) as client:
        calls = [call(), call()] if refusal.startswith("401") else [call()]
        with contextlib.suppress(AuthenticationError):
            for result in client.run_batch(calls).results:
                check_may_have_run(result, of_one)


def test_where_one_of_several_calls_lacks_a_parameter_the_others_may_have_run() -> None:
    given = answer({"detail": "Missing required parameter: n"}, 422)
    with Script(given, ran()) as server, client_of(server) as client:
        with pytest.raises(ValidationError, match="may have run") as caught:
            client.run_batch([call(), call()], single_request=True)
    assert caught.value.may_have_run and len(server.received) == 1


@pytest.mark.parametrize(
    "act",
    [lambda c: c.list_prefabs(), lambda c: c.list_files(), lambda c: c.delete_secret("p", "KEY"),
     lambda c: c.get_presigned_url(S3), lambda c: c.cleanup_temp_files("s"),
     lambda c: c.upload_input_file(__file__),
     lambda c: GatewayClient.from_api_key("key-1", c.base_url, max_retries=0)],
    ids=["prefabs", "files", "secret", "presigned URL", "cleanup", "input file", "exchange"],
)  # fmt: skip
@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_of_what_does_no_harm_twice_nobody_says_that_it_may_have_run(act: Any, status: int) -> None:
    error = error_of(act, answer({"detail": "no"}, status))
    assert not error.may_have_run and "may have run" not in str(error)


@pytest.mark.parametrize("single_request", [False, True])
def test_an_empty_batch_sends_nothing(single_request: bool) -> None:
    with Script() as server:
        batch = client_of(server).run_batch(iter(()), single_request=single_request)
    assert batch == BatchResult(None, "COMPLETED", []) and batch.all_success()
    assert not server.received


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_ctrl_c_ends_a_batch_at_once_and_nothing_more_is_sent() -> None:
    code = """if True:
        import sys, gateway_sdk
        client = gateway_sdk.GatewayClient(sys.argv[1], timeout=None)
        try:
            client.run_batch([gateway_sdk.PrefabCall("p", "1", "f")] * 20, max_workers=2)
        except KeyboardInterrupt:
            print("interrupted")
    """
    with Script(Pause(), Pause(), *[ran()] * 20) as server:
        command = [sys.executable, "-W", "error", "-c", code, server.url]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
            server.wait_until(lambda: len(server.received) == 2)
            process.send_signal(signal.SIGINT)
            try:
                output, _ = process.communicate(timeout=WAIT_SECONDS)
            finally:
                process.kill()  # where it has not ended
    assert (output, process.returncode) == (b"interrupted\n", 0) and len(server.received) == 2


@contextlib.contextmanager
def holding_all_but_the_first(gate: threading.Event) -> Iterator[Script]:
    """A server that answers the first call, and others once the gate is open. All workers end."""
    held = Steps((lambda _: gate.wait(2 * WAIT_SECONDS), send(ran())))
    before = set(threading.enumerate())
    with Routed(lambda received: held if len(server.received) > 1 else ran()) as server:
        yield server
        gate.set()
        for thread in set(threading.enumerate()) - before - set(server._threads):
            thread.join(2 * WAIT_SECONDS)
            assert not thread.is_alive(), "a worker never ends"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that interrupt here")
def test_however_often_ctrl_c_is_pressed_nothing_new_is_sent() -> None:
    pressed = 0

    def inside_the_batch(frame: Any) -> bool:
        while frame:
            if frame.f_code is GatewayClient.run_batch.__code__:
                return True
            frame = frame.f_back
        return False

    def press_again(_: int, frame: Any) -> None:
        nonlocal pressed
        if inside_the_batch(frame):
            pressed += 1
            raise KeyboardInterrupt

    def press(index: int, result: PrefabResult) -> None:
        # The first call's worker has taken the next one.
        server.wait_until(lambda: len(server.received) == 3)
        signal.setitimer(signal.ITIMER_REAL, 0.004, 0.0005)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, press_again)
    with holding_all_but_the_first(threading.Event()) as server, client_of(server) as client:
        try:
            with pytest.raises(KeyboardInterrupt):
                client.run_batch([call()] * 3000, max_workers=2, on_result=press)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert len(server.received) == 3, f"{pressed} more presses"


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_batch_closes_the_connections_of_its_calls(raised: Any) -> None:
    def fail(index: int, result: PrefabResult) -> None:
        server.wait_until(lambda: len(server.received) == 4)
        raise raised

    def choose(received: Received) -> Answer:
        first = received.json["calls"][0]["inputs"]["parameters"]["n"] == 0
        return closing(ran()) if first else Pause()

    with nothing_left(), Routed(choose) as server, client_of(server, timeout=None) as client:
        with pytest.raises(raised):
            client.run_batch([call(n) for n in range(20)], max_workers=3, on_result=fail)
        server.wait_until(lambda: server.open_connections == 0)
        assert len(server.received) == 4
        server.choose = lambda received: ran()
        assert run(client).is_success()


def test_an_error_of_on_result_stops_a_batch_like_ctrl_c() -> None:
    def fail(index: int, result: PrefabResult) -> None:
        server.wait_until(lambda: len(server.received) == 3)
        raise LookupError("the caller's own")

    with holding_all_but_the_first(threading.Event()) as server, client_of(server) as client:
        with pytest.raises(LookupError):
            client.run_batch([call()] * 300, max_workers=2, on_result=fail)
    assert len(server.received) == 3


@cpython_only
def test_results_are_not_made_before_their_calls_have_been_answered() -> None:
    def count(sock: socket.socket) -> None:
        found.append(
            sum(isinstance(thing, (PrefabResult, GatewayError)) for thing in gc.get_objects())
        )
        sock.sendall(ran())

    found: list[int] = []
    gc.collect()
    before = sum(isinstance(thing, (PrefabResult, GatewayError)) for thing in gc.get_objects())
    with Script(Steps((count,)), *[ran()] * 499) as server, client_of(server) as client:
        assert client.run_batch([call()] * 500, max_workers=1).all_success()
    assert found[0] - before < 10


@cpython_only
def test_the_memory_of_a_request_is_given_back_when_it_was_sent() -> None:
    import tracemalloc  # PyPy has none

    count, size = 60, 200_000
    used: dict[int, int] = {}

    def measure(index: int, result: PrefabResult) -> None:
        used[index] = tracemalloc.get_traced_memory()[0]

    calls = [PrefabCall("p", "1.0.0", "f", {"text": "x" * size}) for _ in range(count)]
    with Routed(lambda received: ran()) as server, client_of(server) as client:
        tracemalloc.start()
        try:
            client.run_batch(calls, max_workers=1, on_result=measure)
        finally:
            tracemalloc.stop()
        kept_by_the_server = size * count  # `received` has the bodies
    assert used[count - 1] - kept_by_the_server < size * count / 2


@cpython_only
def test_in_a_worker_process_the_calls_of_a_client_share_its_connection_and_its_token(
    certificate: Path, monkeypatch: Patch
) -> None:
    exchanged: list[str] = []

    def choose(received: Received) -> Answer:
        if is_exchange(received):
            exchanged.append(f"token-{len(exchanged)}")
            return answer({"internal_token": exchanged[-1]})
        token = received.headers.get("x-internal-token")
        return REFUSED if token == "token-0" else ran(token)

    calls = [call(number) for number in range(20)]
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    spawning = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawning) as executor:
        with Routed(choose) as server, client_of(server, internal_token="one") as client:
            batch = client.run_batch(calls, executor=executor)
            assert [result.get_function_result() for result in batch.results] == ["one"] * 20
            assert server.connections <= 2
            # Another identity never shares it.
            with client_of(server, internal_token="two") as other:
                batch = other.run_batch(calls, executor=executor)
            assert [result.get_function_result() for result in batch.results] == ["two"] * 20
            assert server.connections <= 4
        with TlsScript(certificate, *[ran()] * 20) as server, GatewayClient(server.url) as client:
            assert client.run_batch(calls, executor=executor).all_success()
            assert server.connections <= 2
        with Routed(choose) as server, GatewayClient.from_api_key("key-1", server.url) as client:
            batch = client.run_batch(calls, executor=executor)
            assert [result.get_function_result() for result in batch.results] == ["token-1"] * 20
            assert exchanged == ["token-0", "token-1"] and server.connections <= 3
        # Of ten clients, the process keeps what the last eight had.
        with Routed(lambda received: ran()) as server:
            for token in map(str, range(10)):
                with client_of(server, internal_token=token) as client:
                    assert client.run_batch(calls[:1], executor=executor).all_success()
            server.wait_until(lambda: server.open_connections <= 8)
            assert server.open_connections == 8


def test_on_a_pool_of_threads_too_the_calls_share_connections() -> None:
    with Routed(lambda received: ran()) as server, client_of(server) as client:
        with concurrent.futures.ThreadPoolExecutor(2) as executor:
            assert client.run_batch([call()] * 20, executor=executor).all_success()
        assert server.connections <= 2


@cpython_only
def test_a_client_that_no_other_process_can_have_says_so_and_that_nothing_was_sent(
    trusting: ssl.SSLContext
) -> None:
    spawning = multiprocessing.get_context("spawn")
    with Script() as server, client_of(server, ssl_context=trusting) as client:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawning) as executor:
            batch = client.run_batch([call(), call()], executor=executor)
    for result in batch.results:
        assert result.exception and "ssl_context" in str(result.error)
        assert not result.exception.may_have_run and "may have run" not in str(result.error)
    assert not server.received


# --- Client ---------------------------------------------------------------------------------------


def test_base_url_comes_from_the_environment_if_not_given(monkeypatch: Patch) -> None:
    assert GatewayClient().base_url == DEFAULT_BASE_URL == "http://nodeport.sensedeal.vip:30566"
    monkeypatch.setenv("GATEWAY_BASE_URL", "")
    assert GatewayClient().base_url == DEFAULT_BASE_URL
    monkeypatch.setenv("GATEWAY_BASE_URL", "http://env.example/x/")
    assert GatewayClient().base_url == "http://env.example/x"
    assert GatewayClient("http://given.example").base_url == "http://given.example"
    # One origin, one pool.
    assert GatewayClient("HTTP://Given.example:80/").base_url == "http://given.example"
    with pytest.raises(AttributeError):  # for good: another gateway needs another client
        GatewayClient().base_url = "http://other.example"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("variables", "headers"),
    [({}, {}), (dict.fromkeys(VARIABLES, ""), {}),
     ({"X_INTERNAL_TOKEN": "t"}, {"x-internal-token": "t"}),
     ({"AGENT_BUILDER_API_KEY": "k"}, {"x-internal-token": "first"}),
     ({"GATEWAY_JWT_TOKEN": "j"}, {"authorization": "Bearer j"}),
     ({"GATEWAY_JWT_TOKEN": "j", "X_INTERNAL_TOKEN": ""}, {"authorization": "Bearer j"})],
    ids=str,
)  # fmt: skip
def test_from_env_takes_the_credential_that_is_set_and_the_constructor_takes_none(
    variables: dict[str, str], headers: dict[str, str], monkeypatch: Patch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    exchange = TOKEN_ANSWERS[:1] if "k" in variables.values() else []
    with Script(*exchange, ran(), ran()) as server:
        monkeypatch.setenv("GATEWAY_BASE_URL", server.url)
        run(GatewayClient.from_env(timeout=WAIT_SECONDS))
        run(GatewayClient())
    *_, received, bare = server.received
    assert {
        name: value for name, value in received.headers.items() if name in CREDENTIAL_HEADERS
    } == headers
    assert not CREDENTIAL_HEADERS & {*bare.headers} and len(server.received) == len(exchange) + 2


@pytest.mark.parametrize("mode", MODES)
def test_repr_shows_the_mode_and_never_the_secret(mode: str) -> None:
    with Script(*exchange_of(mode)) as server:
        shown = repr(client_in(mode, server.url))
    others = {repr(GatewayClient(server.url, **other.options)) for other in MODES.values()}
    assert not re.search(f"{TOKEN}|j.w.t|key-1", shown)
    assert server.url in shown and len(others) == 4


@pytest.mark.parametrize("mode", MODES)
def test_a_client_pickles_without_its_connections(mode: str) -> None:
    with Script(*exchange_of(mode), ran(), ran()) as server:
        client = client_in(mode, server.url, timeout=7)
        run(client)
        copied = pickle.loads(pickle.dumps(client))
        run(copied)
    first, second = server.received[-2:]
    assert first[:2] == second[:2] and first.headers == second.headers
    assert first.connection != second.connection
    assert (copied.base_url, copied.timeout) == (client.base_url, client.timeout)


def test_a_client_with_an_ssl_context_says_that_it_cannot_be_pickled() -> None:
    with pytest.raises(TypeError, match="ssl_context"):
        pickle.dumps(
            GatewayClient("https://h", ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        )


def test_a_client_can_be_closed_twice_and_is_a_context_manager() -> None:
    with Script(ran()) as server:
        with client_of(server) as client:
            run(client)
            assert server.open_connections == 1
        client.close()
        server.wait_until(lambda: server.open_connections == 0)


class InThisThread(concurrent.futures.Executor):
    """Runs each call where it is submitted."""

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Any:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(function(*arguments, **options))
        return future


class Headers:
    """A function that gives other headers each time, and notes who asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self) -> dict[str, str]:
        self.asked.append(threading.get_ident())
        return {"traceparent": f"t-{len(self.asked)}", "X-Canary": "yes"}


def traces(server: Script) -> list[str | None]:
    return [received.headers.get("traceparent") for received in server.received]


class Pickling(InThisThread):
    """Runs a copy of each call, as another process would."""

    def submit(self, /, *given: Any, **options: Any) -> Any:
        return super().submit(*pickle.loads(pickle.dumps(given)), **options)


class Pure(InThisThread):
    """Takes what has equal arguments for one task, as Dask does."""

    def __init__(self) -> None:
        self.tasks: dict[bytes, Any] = {}

    def submit(self, /, *given: Any, **options: Any) -> Any:
        key = pickle.dumps((given, options))
        if key not in self.tasks:
            self.tasks[key] = super().submit(*given, **options)
        return self.tasks[key]


def test_each_of_several_equal_calls_is_made_where_equal_tasks_are_taken_for_one() -> None:
    pure = Pure()
    with Script(*map(ran, range(6))) as server, client_of(server) as client:
        for count in (4, 2):
            batch = client.run_batch([call()] * count, executor=pure)
            assert len(set(values_of(batch))) == count
    assert len(server.received) == 6


@pytest.mark.parametrize("name", ENDPOINTS)
def test_headers_of_a_function_go_with_each_request_and_are_asked_for_once(name: str) -> None:
    headers, endpoint = Headers(), ENDPOINTS[name]
    with Script(endpoint.given) as server, client_of(server, headers=headers) as client:
        endpoint.act(client)
    assert traces(server) == ["t-1"] and server.received[0].headers["x-canary"] == "yes"
    assert headers.asked == [threading.get_ident()]


@pytest.mark.parametrize("mode", MODES)
def test_headers_of_a_mapping_go_along_whatever_the_credential_is(mode: str) -> None:
    headers = types.MappingProxyType({"traceparent": "t-1", "User-Agent": "mine/1.0"})
    with Script(*exchange_of(mode), ran(), answer([])) as server:
        client = client_in(mode, server.url, headers=headers)
        run(client)
        client.list_prefabs()
    assert set(traces(server)) == {"t-1"}
    for received in server.received[-2:]:
        assert received.headers.items() >= MODES[mode].headers.items()
        assert received.headers["user-agent"] == "mine/1.0"


def test_a_header_that_the_sdk_sends_itself_is_replaced_and_not_doubled() -> None:
    heads: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        heads.append(read_head(sock)[0].lower())
        sock.sendall(answer([]))

    headers = {"user-agent": "m", "ACCEPT": "a/b"}
    with Raw(serve) as server, client_of(server, headers=headers) as client:
        client.list_prefabs()
    lines = [line for line in heads[0].split(b"\r\n") if line.startswith((b"user-", b"accept:"))]
    assert sorted(lines) == [b"accept: a/b", b"user-agent: m"]


def test_a_client_of_the_environment_or_of_a_key_has_headers_too(monkeypatch: Patch) -> None:
    monkeypatch.setenv("AGENT_BUILDER_API_KEY", "key-1")
    with Script(TOKEN_ANSWERS[0], ran(), TOKEN_ANSWERS[0], ran()) as server:
        run(GatewayClient.from_env(base_url=server.url, headers=Headers()))
        run(GatewayClient.from_api_key("key-1", server.url, headers=Headers()))
    assert traces(server) == ["t-1", "t-2"] * 2


def test_each_attempt_of_a_request_has_the_same_headers() -> None:
    headers = Headers()
    with Script(UNAVAILABLE, HangUp(), answer([]), PAGE) as server:
        with client_of(server, headers=headers) as client:
            client.list_prefabs()
            client.list_files()
    assert traces(server) == ["t-1"] * 3 + ["t-2"] and len(headers.asked) == 2


def test_a_call_that_is_repeated_with_a_new_token_has_the_same_headers() -> None:
    with Script(TOKEN_ANSWERS[0], REFUSED, TOKEN_ANSWERS[1], ran()) as server:
        assert run(GatewayClient.from_api_key("key-1", server.url, headers=Headers())).is_success()
    _, refused, _, repeated = traces(server)
    assert refused == repeated == "t-2"


@pytest.mark.parametrize("more", [
    {}, {"max_workers": 1}, {"executor": InThisThread()}, {"executor": Pickling()},
], ids=["threads", "one thread", "executor", "other process"])  # fmt: skip
def test_each_call_of_a_batch_has_headers_of_its_own_from_the_callers_thread(more: Any) -> None:
    headers = Headers()
    with Routed(lambda _: ran()) as server:
        with client_of(server, headers=lambda: headers()) as client:  # which can't be pickled
            assert client.run_batch([call(n) for n in range(5)], **more).all_success()
    assert headers.asked == [threading.get_ident()] * 5
    sent = {r.json["calls"][0]["inputs"]["parameters"]["n"]: r.headers for r in server.received}
    assert [sent[n]["traceparent"] for n in range(5)] == ["t-1", "t-2", "t-3", "t-4", "t-5"]


def test_each_page_and_each_step_of_an_upload_is_a_request_of_its_own(content_file: Path) -> None:
    pages = [answer({"files": [{}], "next_token": str(n)}) for n in range(2)]
    with Script(*pages, PAGE, LINK, NO_BODY) as server:
        with client_of(server, headers=Headers()) as client:
            assert len(list(client.iter_files())) == 2
            client.upload_input_file(content_file)
    assert traces(server) == ["t-1", "t-2", "t-3", "t-4", None]


def test_given_headers_never_go_to_a_storage_or_to_a_proxy(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    with Script(LINK, moved("/else"), answer(body=b"x")) as server:
        with client_of(server, headers=Headers()) as client:
            client.download_file(S3, tmp_path / "f")
    assert traces(server) == ["t-1", None, None]
    assert not any("x-canary" in received.headers for received in server.received[1:])
    with Script(answer(None, 502), ran()) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with pytest.raises(GatewayError):
            run(GatewayClient("https://gateway.invalid", headers=Headers(), max_retries=0))
        # This one goes to the gateway, though the proxy reads it on its way.
        run(GatewayClient("http://gateway.invalid", headers=Headers()))
    assert [received.method for received in proxy.received] == ["CONNECT", "POST"]
    assert traces(proxy) == [None, "t-1"] and "x-canary" not in proxy.received[0].headers


OWN_HEADERS = (
    "Host", "Content-Length", "Transfer-Encoding", "Content-Type", "Connection", "Range",
    "If-Range", "Expect", "Upgrade", "TE", "Accept-Encoding",
)  # fmt: skip
# What is given as headers; and, but for the kinds of credentials, that of an internal token.
BAD_HEADERS: dict[str, Any] = {
    **{f"name {name!r}": {name: "v"} for name in (
        "", "a b", " a", "a:", "a\nb", "a\r\nHost", "\0", "\u00e4", "\u4f60", 5, None, ("a",))},
    **{f"value {value!r}": {"X-A": value} for value in (
        "hush\nhush", "hush\r", "hush\r\nX-B: 1", "hush\0", "hush\u4f60", "hush\x7f",
        5, None, b"hush")},
    **{f"{name}": {name: "v"} for name in OWN_HEADERS},
    **{name.upper(): {name.upper(): "v"} for name in OWN_HEADERS[:2]},
    **{name.lower(): {name.lower(): "v"} for name in OWN_HEADERS[:4]},
    "the credential": {"X-Internal-Token": "hush"},
    "the credential again": {"x-internal-TOKEN": "hush"},
    "a good one before it": {"X-A": "1", "Host": "h"},
    "text": "X-A: 1", "number": 5, "pairs": [("X-A", "1")], "names": {"X-A"},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_headers_that_cannot_be_sent_are_refused(name: str) -> None:
    given = BAD_HEADERS[name]
    with Script(*[ran()] * 9) as server:
        with pytest.raises(ValidationError) as at_once:
            client_of(server, headers=given)
        with client_of(server, headers=lambda: given) as client:
            for act in (run, lambda c: c.run_batch([call()] * 3), lambda c: c.list_prefabs()):
                with pytest.raises(ValidationError) as later:
                    act(client)
    for caught in (at_once, later):
        assert "header" in str(caught.value).lower() and "hush" not in all_of(caught.value)
    assert not server.connections


@pytest.mark.parametrize("mode", ["JWT", "API key", EXCHANGED])
def test_the_header_of_any_credential_in_use_is_refused(mode: str) -> None:
    (own,) = MODES[mode].headers
    for name in (own, own.title(), own.upper()):
        with Script(*exchange_of(mode)) as server, pytest.raises(ValidationError):
            client_in(mode, server.url, headers={name: "v"})


def test_a_front_door_may_have_a_credential_of_its_own() -> None:
    door = {"authorization": "Basic eDp5", "x-api-key": "k", "cookie": "c=1"}
    other_door = {"x-door": "p\u00e4ss 1"}
    with Script(ran(), ran()) as server:
        run(client_of(server, headers=door))
        run(GatewayClient(server.url, jwt_token="j.w.t", headers=other_door))
    first, second = (received.headers for received in server.received)
    assert first.items() >= {**door, "x-internal-token": TOKEN}.items()
    assert second.items() >= {**other_door, "authorization": "Bearer j.w.t"}.items()


def test_what_the_function_of_headers_raises_is_the_callers_and_nothing_is_sent() -> None:
    def fail() -> Any:
        if next(times) >= 2:
            raise error
        return {}

    error = LookupError("mine")
    with Script(*[ran()] * 9) as server, client_of(server, headers=fail) as client:
        for act in (lambda c: c.run_batch([call()] * 5), run, lambda c: c.list_prefabs()):
            times = itertools.count(0 if "batch" in act.__code__.co_names[0] else 2)
            with pytest.raises(LookupError) as caught:
                act(client)
            assert caught.value is error
    assert not server.received


def test_headers_are_not_shown_and_a_pickled_client_keeps_them() -> None:
    with Script(ran()) as server:
        client = client_of(server, headers={"X-Door": "hush-hush"})
        assert "hush" not in repr(client)
        run(pickle.loads(pickle.dumps(client)))
    assert server.received[0].headers["x-door"] == "hush-hush"


# A gateway that reads parameters flat, as the published server does. A client finds it out itself.

MISSING = answer({"detail": "Missing required parameter: text"}, 422)
MISSING_OTHER = answer({"detail": "Missing required parameter: other"}, 422)


def flat_gateway(received: Received) -> Answer:
    """Runs calls that have a `text` among their inputs: it gives these back."""
    inputs = [one["inputs"] for one in received.json["calls"]]
    if not all("text" in given for given in inputs):
        return MISSING
    if received.json["calls"][0]["function_name"] == "words":
        return chunked(event("content", inputs[0]), event("done"))
    outputs = [{"status": "SUCCESS", "output": given} for given in inputs]
    return answer({"results": [{"status": "SUCCESS", "output": output} for output in outputs]})


def inputs_of(server: Script) -> list[Any]:
    """Those of each request; a list where it has several calls."""
    found = [[one["inputs"] for one in received.json["calls"]] for received in server.received]
    return [inputs[0] if len(inputs) == 1 else inputs for inputs in found]


OTHER_S3 = S3 + ".2"
# The parameters and the files of a call, and what they are when they are sent flat.
FLAT_INPUTS: dict[str, tuple[Any, Any, Any]] = {
    "parameters": ({"text": "hi", "n": [1]}, None, {"text": "hi", "n": [1]}),
    "null": ({"text": None}, None, {"text": None}),
    "an empty value": ({"text": "", "more": {}}, {}, {"text": "", "more": {}}),
    "like an envelope": ({"text": {"parameters": 1}}, None, {"text": {"parameters": 1}}),
    "a file": (None, {"text": [S3]}, {"text": S3}),
    "two files": ({}, {"text": [S3, OTHER_S3]}, {"text": [S3, OTHER_S3]}),
    "a tuple of files": ({}, {"text": (S3, OTHER_S3)}, {"text": [S3, OTHER_S3]}),
    "parameters and files": ({"n": 1}, {"text": [S3], "more": [S3, S3]},
                             {"n": 1, "text": S3, "more": [S3, S3]}),
    "files beside the parameter": ({"text": "hi"}, {"in": [S3]}, {"text": "hi", "in": S3}),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAT_INPUTS)
def test_a_gateway_that_reads_parameters_flat_is_noticed_and_remembered(name: str) -> None:
    parameters, files, flat = FLAT_INPUTS[name]
    nested = PrefabCall("p", "1.0.0", "f", parameters, files).to_dict()["inputs"]
    with Routed(flat_gateway) as server, client_of(server, max_retries=0) as client:
        for _ in range(2):
            assert client.run("p", "1.0.0", "f", parameters, files).get_function_result() == flat
    assert inputs_of(server) == [json.loads(json.dumps(nested)), flat, flat]
    first, second = server.received[:2]
    assert first.target == second.target and first.connection == second.connection


TEXT = {"text": "hi"}
A_TEXT_CALL = PrefabCall("p", "1.0.0", "f", TEXT)

def first_of(events: Any) -> Any:
    first, *_ = events
    return first.data


FLAT_WAYS: dict[str, Callable[[Any], Any]] = {
    "prefab": lambda c: c.prefab("p", "1.0.0").f(**TEXT).get_function_result(),
    "stream": lambda c: first_of(c.run("p", "1.0.0", "words", TEXT, stream=True)),
    "stream of a prefab": lambda c: first_of(c.prefab("p", "1.0.0").stream("words", **TEXT)),
    "stream of a plain function": lambda c: first_of(
        c.run("p", "1.0.0", "f", TEXT, stream=True))["output"],
    "stream for its result": lambda c: c.run("p", "1.0.0", "words", TEXT).get_function_result()[0],
    "batch": lambda c: values_of(c.run_batch([A_TEXT_CALL]))[0],
    "batch on an executor": lambda c: values_of(
        c.run_batch([A_TEXT_CALL], executor=InThisThread()))[0],
    "single request of one": lambda c: values_of(
        c.run_batch([A_TEXT_CALL], single_request=True))[0],
}  # fmt: skip


@pytest.mark.parametrize("awaits", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("name", FLAT_WAYS)
def test_every_way_to_call_goes_on_flat(name: str, awaits: bool) -> None:
    def twice(client: Any) -> None:
        assert [FLAT_WAYS[name](client), FLAT_WAYS[name](client)] == [TEXT, TEXT]

    with Routed(flat_gateway) as server:
        if awaits:
            awaited(twice, server, max_retries=0)
        else:
            twice(client_of(server, max_retries=0))
    assert inputs_of(server) == [{"parameters": TEXT}, TEXT, TEXT]


@pytest.mark.parametrize(
    "name", ["my text", "\u6587\u672c", "a.b", "text: more", "(text)", "'text'", "Text"]
)
def test_the_parameter_that_is_missed_may_have_any_name(name: str) -> None:
    missed = answer({"detail": f"Missing required parameter: {name}"}, 422)
    with Script(missed, ran()) as server, client_of(server) as client:
        assert client.run("p", "1.0.0", "f", {name: 1}).is_success()
    assert inputs_of(server) == [{"parameters": {name: 1}}, {name: 1}]


SENTENCE = "Missing required parameter: text"
# Answers that do not say so: the call is not sent again, and the next one is as ever.
NOT_FLAT: dict[str, Answer] = {
    "really missing": MISSING_OTHER,
    "another name": answer({"detail": f"{SENTENCE} (a string)"}, 422),
    "a part of a name": answer({"detail": SENTENCE[:-1]}, 422),
    "in another case": answer({"detail": f"{SENTENCE[:-4]}TEXT"}, 422),
    "mistyped": answer({"detail": "Type mismatch for parameter text: expected string"}, 422),
    "a list": answer({"detail": [{"loc": ["body", "text"], "msg": "Field required"}]}, 422),
    "400": answer({"detail": SENTENCE}, 400),
    "503": answer({"detail": SENTENCE}, 503),
}


@pytest.mark.parametrize("name", NOT_FLAT)
def test_what_is_really_missing_is_an_error_at_once(name: str) -> None:
    with Script(NOT_FLAT[name], ran()) as server, client_of(server) as client:
        with pytest.raises(GatewayError) as caught:
            client.run("p", "1.0.0", "f", TEXT)
        assert len(server.received) == 1 and caught.value.status_code in (400, 422, 503)
        assert client.run("p", "1.0.0", "f", TEXT).is_success()
    assert inputs_of(server) == [{"parameters": TEXT}] * 2


# How the call is answered when it is sent flat, and the error that comes of it.
FLAT_ENDS: dict[str, tuple[Answer, type[GatewayError], bool]] = {
    "missing all the same": (MISSING, ValidationError, False),
    "missing another one": (MISSING_OTHER, ValidationError, False),
    "hang-up": (HangUp(), ServiceUnavailableError, True),
    "503": (UNAVAILABLE, ServiceUnavailableError, True),
    "silence": (Pause(), GatewayTimeoutError, True),
    "quota": (answer(None, 429), QuotaExceededError, False),
}


@pytest.mark.parametrize("in_batch", [False, True], ids=["call", "batch"])
@pytest.mark.parametrize("name", FLAT_ENDS)
def test_nothing_is_sent_a_third_time(name: str, in_batch: bool) -> None:
    given, kind, may_have_run = FLAT_ENDS[name]
    timeout = SHORT_SECONDS if name == "silence" else WAIT_SECONDS
    with Script(MISSING, given, ran()) as server:
        with client_of(server, timeout=timeout) as client:
            if in_batch:
                (result,) = client.run_batch([A_TEXT_CALL]).results
                error: Any = result.exception
            else:
                with pytest.raises(GatewayError) as caught:
                    client.run("p", "1.0.0", "f", TEXT)
                error = caught.value
    assert (type(error), error.may_have_run) == (kind, may_have_run)
    assert inputs_of(server) == [{"parameters": TEXT}, TEXT]


def test_a_gateway_that_misses_a_parameter_in_either_form_is_not_taken_for_flat() -> None:
    """Or every later call would come to it without its parameters."""
    with Script(MISSING, MISSING, ran()) as server, client_of(server) as client:
        with pytest.raises(ValidationError, match=SENTENCE):
            client.run("p", "1.0.0", "f", TEXT)
        assert client.run("p", "1.0.0", "f", TEXT).is_success()
    assert inputs_of(server)[2] == {"parameters": TEXT}


def test_a_request_with_several_calls_is_never_sent_again_as_some_may_have_run() -> None:
    calls = [PrefabCall("p", "1.0.0", "f", {"text": n}) for n in range(2)]
    with Routed(flat_gateway) as server, client_of(server) as client:
        with pytest.raises(ValidationError, match=SENTENCE) as caught:
            client.run_batch(calls, single_request=True)
        assert caught.value.may_have_run and "may have run" in str(caught.value)
        assert len(server.received) == 1
        assert client.run("p", "1.0.0", "f", TEXT).is_success()  # which finds it out
        assert client.run_batch(calls, single_request=True).all_success()
    assert inputs_of(server)[-1] == [{"text": 0}, {"text": 1}] and len(server.received) == 4


def test_calls_under_way_when_it_is_found_out_are_each_sent_again_flat() -> None:
    def choose(received: Received) -> Answer:
        given = flat_gateway(received)
        return four_under_way if given is MISSING else given

    four_under_way = together(4, MISSING)
    calls = [PrefabCall("p", "1.0.0", "f", {"text": n}) for n in range(10)]
    seen: list[int] = []
    with Routed(choose) as server, client_of(server) as client:
        report = lambda index, _: seen.append(index)  # noqa: E731
        batch = client.run_batch(calls, max_workers=4, on_result=report)
        assert values_of(batch) == [{"text": n} for n in range(10)] and sorted(seen) == [*range(10)]
        assert client.run_batch(calls).all_success()
    nested = [one for one in inputs_of(server) if "parameters" in one]
    assert len(nested) == 4 and len(server.received) == 4 + 10 + 10


@pytest.mark.parametrize("kind", [InThisThread, Pickling])
def test_on_an_executor_too_the_calls_of_a_batch_go_on_flat(kind: Any) -> None:
    executor = kind()
    calls = [PrefabCall("p", "1.0.0", "f", {"text": n}) for n in range(3)]
    with Routed(flat_gateway) as server, client_of(server) as client:
        batch = client.run_batch(calls, executor=executor)
        assert values_of(batch) == [{"text": n} for n in range(3)]
        count = len(server.received)
        assert client.run("p", "1.0.0", "f", TEXT).is_success()
        assert client.run_batch(calls, executor=executor).all_success()
    assert 4 <= count <= 6  # in another process it may be found out anew
    assert inputs_of(server)[-3:] == [{"text": n} for n in range(3)]


def test_a_copy_of_a_client_knows_what_its_original_knew() -> None:
    with Routed(flat_gateway) as server:
        client = client_of(server)
        before = pickle.loads(pickle.dumps(client))
        client.run("p", "1.0.0", "f", TEXT)
        after = pickle.loads(pickle.dumps(client))
        for one in (client, after, before):
            assert one.run("p", "1.0.0", "f", TEXT).is_success()
    nested = {"parameters": TEXT}
    assert inputs_of(server) == [nested, TEXT, TEXT, TEXT, nested, TEXT]


def test_both_forms_of_a_call_have_the_same_headers() -> None:
    with Routed(flat_gateway) as server, client_of(server, headers=Headers()) as client:
        client.run("p", "1.0.0", "f", TEXT)
        client.run("p", "1.0.0", "f", TEXT)
    assert traces(server) == ["t-1", "t-1", "t-2"]


@pytest.mark.parametrize("awaits", [False, True], ids=["sync", "async"])
def test_the_local_gateway_can_read_parameters_flat(awaits: bool) -> None:
    def act(client: Any) -> None:
        counted = client.run("text-tools", "1.1.0", "statistics", TEXT)
        assert counted.get_function_result()["words"] == 1
        events = client.run("text-tools", "1.1.0", "words", {"text": "a b"}, stream=True)
        assert [one.data for one in events if one.type == "content"] == ["a ", "b"]
        calls = [PrefabCall("text-tools", "1.1.0", "echo", {"value": n}) for n in range(3)]
        assert values_of(client.run_batch(calls)) == [0, 1, 2]
        with pytest.raises(ValidationError, match="Missing required parameter: text"):
            client.run("text-tools", "1.1.0", "statistics", {})

    with LocalGateway() as gateway:
        gateway.flat = True
        if awaits:
            awaited(act, gateway)
        else:
            act(client_of(gateway))
        assert len(gateway.executed) == 5 and len(gateway.requests) == 7


def test_a_gateway_that_reads_parameters_flat_may_be_replaced_by_one_that_does_not() -> None:
    with LocalGateway() as gateway, client_of(gateway) as client:
        for flat in (True, False, True):
            gateway.flat = flat
            for n in range(2):
                counted = client.run("text-tools", "1.1.0", "statistics", {"text": "a " * n})
                assert counted.get_function_result()["words"] == n
        # The form is looked for once each time.
        assert len(gateway.requests) == 9


def test_without_a_free_descriptor_an_error_says_so_and_that_nothing_ran() -> None:
    code = """
        import resource, sys
        import gateway_sdk
        gateway_sdk._CONNECT_BACKOFF_BASE_SECONDS = 0.001
        client = gateway_sdk.GatewayClient("http://127.0.0.1:1", max_retries=1)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        for act in (client.list_prefabs, lambda: client.run("p", "1", "f")):
            try:
                act()
            except gateway_sdk.ServiceUnavailableError as error:
                print(error.may_have_run, "ulimit" in str(error))
    """
    pytest.importorskip("resource")
    done = python(inspect.cleandoc(code))
    assert (done.stdout.split(), done.stderr) == (["False", "True"] * 2, "")


def test_a_longer_wait_than_is_waited_for_is_told() -> None:
    with Script(answer({"detail": "busy"}, 503, Retry_After=61)) as server:
        with pytest.raises(ServiceUnavailableError, match="busy\n.*61 s") as caught:
            client_of(server).list_prefabs()
    assert caught.value.retry_after == 61


def test_any_function_of_a_prefab_is_a_method(client: GatewayClient) -> None:
    tools = client.prefab("text-tools", "1.1.0")
    assert isinstance(tools, Prefab)
    assert repr(tools) == "Prefab(prefab_id='text-tools', version='1.1.0')"
    assert tools.echo(value=[1]).get_function_result() == [1]
    assert tools.call("echo", value=2).get_function_result() == 2
    events = tools.stream("words", text="a b")
    assert [e.data for e in events if e.type == "content"] == ["a ", "b"]
    assert pickle.loads(pickle.dumps(tools)).echo(value=3).get_function_result() == 3
    assert copy.copy(tools).echo(value=4).get_function_result() == 4
    assert not any(hasattr(tools, name) for name in ("_ipython_display_", "__wrapped__", "_x"))


def test_parameters_may_have_any_name() -> None:
    parameters = {"self": 1, "function_name": 2, "prefab_id": 3, "stream": 4, "timeout": 5}
    with Script(ran(), ran(), ran()) as server:
        prefab = client_of(server).prefab("p", "1.0.0")
        prefab.call("f", files={"v": [S3]}, **parameters)
        prefab.f(**parameters)
        prefab.stream("f", **parameters)
    inputs = [received.json["calls"][0]["inputs"] for received in server.received]
    assert [given["parameters"] for given in inputs] == [parameters] * 3
    assert [given.get("files") for given in inputs] == [{"v": [S3]}, None, None]


IN_USE = {"internal token": TOKEN, EXCHANGED: TOKEN}


@pytest.mark.parametrize("mode", MODES)
def test_the_token_in_use_can_be_read_but_not_set(mode: str) -> None:
    with Script(*exchange_of(mode), ran()) as server:
        client = client_in(mode, server.url)
        assert client.internal_token == IN_USE.get(mode)
        for one, name in itertools.product((client, AsyncGatewayClient(server.url)), NAMES):
            with pytest.raises(AttributeError, match=r"(?i)\bclient\b") as caught:
                setattr(one, name, "hush-hush")
            assert "another" in str(caught.value) and "hush" not in str(caught.value)
        for same in (client, pickle.loads(pickle.dumps(client))):
            assert same.internal_token == IN_USE.get(mode)
        run(client)
    sent = server.received[-1].headers
    assert {name: sent[name] for name in CREDENTIAL_HEADERS & {*sent}} == MODES[mode].headers


def test_the_token_in_use_is_the_last_one_that_was_exchanged() -> None:
    with Script(TOKEN_ANSWERS[0], REFUSED, TOKEN_ANSWERS[1], ran()) as server:
        client = GatewayClient.from_api_key("key-1", server.url)
        assert client.internal_token == "first"
        run(client)
        assert client.internal_token == "second"


# Options with which no client comes about.
NO_CLIENTS: dict[str, dict[str, Any]] = {
    "base_url": {"base_url": "ftp://h"}, "timeout": {"timeout": -1}, "retries": {"max_retries": -1},
    "credential": {"internal_token": "hush\n"},
    "two": {"internal_token": "hush", "api_key": "hush"},
    "context": {"ssl_context": "x"}, "JWT": {"jwt_token": 5}, "URL": {"api_key": "http://hush"},
}  # fmt: skip


@pytest.mark.parametrize("name", ["GatewayClient", "AsyncGatewayClient"])
def test_a_client_that_did_not_come_about_can_be_shown(name: str) -> None:
    kind = getattr(gateway_sdk, name)
    unfinished = kind.__new__(kind)
    assert name in repr(unfinished) and name in str(unfinished) and name in f"{[unfinished]}"
    for options in NO_CLIENTS.values():
        with pytest.raises(ValidationError) as caught:
            kind(**{"base_url": "http://h", **options})
        for frame, _ in traceback.walk_tb(caught.value.__traceback__):
            if isinstance(frame.f_locals.get("self"), kind):
                shown = repr(frame.f_locals["self"])
                assert name in shown and "hush" not in shown


# Names that serializers, `dict()` and the like ask for, of objects that they do not know.
PROTOCOLS = [
    "to_dict", "model_dump", "model_dump_json", "dict", "keys", "items", "values", "tolist",
    "toDict", "toJSON", "to_numpy", "to_pandas", "toPandas", "to_plotly_json", "getdoc",
    "isoformat", "__len__", "__iter__", "__getitem__", "__fspath__", "__array__", "__json__",
]  # fmt: skip


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_prefab_has_no_function_of_a_name_that_protocols_ask_for(name: str) -> None:
    with Script(ran("called"), ran("called")) as server, client_of(server) as client:
        prefab = client.prefab("p", "1")
        assert not hasattr(prefab, name)
        if not name.startswith("_"):
            with pytest.raises(AttributeError, match=rf"call\(.{name}"):
                getattr(prefab, name)
        assert not server.received
        assert prefab.call(name, a=1).get_function_result() == "called"
        assert next(prefab.stream(name, a=1)).data["output"] == "called"
    called = [received.json["calls"][0]["function_name"] for received in server.received]
    assert called == [name, name]


SERIALIZERS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "two stars": lambda prefab: {**prefab},
    "update": lambda prefab: {}.update(prefab),
    "list": list,
    "len": len,
    "in": lambda prefab: 1 in prefab,
    "item": lambda prefab: prefab["a"],
    "path": os.fspath,
    **{f"JSON by {name}": functools.partial(json.dumps, default=operator.methodcaller(name))
       for name in ("to_dict", "toDict", "model_dump", "dict", "tolist", "isoformat")},
}  # fmt: skip


@pytest.mark.parametrize("name", SERIALIZERS)
def test_a_serializer_sends_no_call(name: str) -> None:
    with Script(ran({})) as server, client_of(server) as client:
        with pytest.raises((TypeError, AttributeError)):
            SERIALIZERS[name](client.prefab("p", "1"))
    assert not server.received


def module_functions() -> Iterator[types.FunctionType]:
    """All functions that are defined in the module, those of its classes too."""
    for value in vars(gateway_sdk).values():
        members = vars(value).values() if isinstance(value, type) else [value]
        for member in members:
            if isinstance(member, property):
                member = member.fget
            member = getattr(member, "__func__", member)
            while hasattr(member, "__wrapped__"):
                member = member.__wrapped__
            if isinstance(member, types.FunctionType) and member.__module__ == "gateway_sdk":
                yield member


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_of(constant)


def test_what_functions_use_of_the_module_can_be_pickled() -> None:
    """As cloudpickle does it by value. Without it, plain pickle tells nearly the same."""
    used = {
        name
        for function in module_functions()
        for code in codes_of(function.__code__)
        for name in code.co_names
    }
    assert {"GatewayError", "os"} <= used
    unpicklable = []
    for name in sorted(used & set(vars(gateway_sdk))):
        value = getattr(gateway_sdk, name)
        if isinstance(value, types.ModuleType):
            continue
        try:
            pickle.dumps(value)
        except Exception as error:
            unpicklable.append(f"{name}: {error}")
    assert not unpicklable


BY_VALUE = """if True:
    import sys, cloudpickle, gateway_sdk
    from gateway_sdk import GatewayClient, GatewayError, PrefabCall
    cloudpickle.register_pickle_by_value(gateway_sdk)
    client = GatewayClient(sys.argv[1], internal_token="t", timeout=10)

    def work():
        calls = [PrefabCall("p", "1", "f")] * 2
        stream = [event.data for event in client.run("p", "1", "f", stream=True)]
        try:
            client.list_files()
        except GatewayError as error:
            failed = error.status_code
        return client.run_batch(calls).all_success(), stream, failed

    with open(sys.argv[2], "wb") as file:
        cloudpickle.dump((work, client.run_batch, PrefabCall), file)
"""
BY_VALUE_ELSEWHERE = """if True:
    import pickle, sys
    with open(sys.argv[1], "rb") as file:
        work, run_batch, PrefabCall = pickle.load(file)
    print(work(), run_batch([PrefabCall("p", "1", "f")]).status, "gateway_sdk" in sys.modules)
"""


def test_cloudpickle_takes_the_module_by_value_to_where_it_is_not(tmp_path: Path) -> None:
    pytest.importorskip("cloudpickle")
    refused = answer({"detail": "no"}, 400)
    stream = chunked(event("content", "a"), event("done", "b"))
    with Script(stream, refused, ran(), ran(), ran()) as server:
        done = python(BY_VALUE, server.url, tmp_path / "work")
        assert (done.returncode, done.stderr) == (0, "")
        done = python(BY_VALUE_ELSEWHERE, tmp_path / "work", PYTHONPATH="")
    assert (done.stdout, done.stderr) == ("(True, ['a', 'b'], 400) COMPLETED False\n", "")


def test_versions_sort_by_number_and_releases_after_their_candidates() -> None:
    ordered = ["0.9", "1.0.0-alpha", "1.0.0-rc.1", "1.0.0-rc.2", "1.0.0-rc.10", "1.0.0", "1.9.0",
               "1.10.0",
               "v1.11.0", "2.0.0+build", "10.0.0"]  # fmt: skip
    assert sorted({*ordered}, key=gateway_sdk._version_key) == ordered
    assert sorted(["latest", "1.0", "", "1..0", "x-y"], key=gateway_sdk._version_key)


def test_the_newest_version_is_looked_at_if_none_is_given() -> None:
    with LocalGateway() as gateway, client_of(gateway) as client:
        for version in ("1.9.0", "1.10.0", "1.10.0-rc.1", "1.2.0"):
            gateway.add_prefab("p", version, {})
        gateway.add_prefab("p", "2.0.0", {}, status="failed")
        gateway.add_prefab("broken", "1.0.0", {}, status="failed")
        assert client.get_prefab_spec("p")["version"] == "1.10.0"
        assert client.get_prefab_spec("p", "2.0.0")["version"] == "2.0.0"
        assert client.get_prefab_spec("broken")["version"] == "1.0.0"
        assert client.get_prefab_spec("text-tools")["functions"]
        for arguments in (("none",), ("none", "1"), ("p", "3")):
            with pytest.raises(PrefabNotFoundError) as caught:
                client.get_prefab_spec(*arguments)
            assert caught.value.prefab_id == arguments[0]
            assert "list_prefabs" in str(caught.value) and "latest" not in str(caught.value)


def test_a_version_of_the_directory_may_be_any_text_that_a_url_can_carry() -> None:
    entries = [{"id": "p", "version": version} for version in ("9" * 5000, "1.0", "a b", "")]
    odd = [{"id": "p", "version": "\ud800"}]
    with (
        Script(answer(entries), answer({"id": "p"}), answer(odd)) as server,
        client_of(server) as client,
    ):
        assert client.get_prefab_spec("p") == {"id": "p"}
        assert server.received[1].target == f"/v1/prefabs/p/{'9' * 5000}/spec"
        with pytest.raises(GatewayError):
            client.get_prefab_spec("p")


def test_a_secret_is_set_used_listed_and_deleted(client: GatewayClient) -> None:
    with pytest.raises(MissingSecretError) as caught:
        client.run("vault", "1.0.0", "sign", {"text": "x"})
    missing = caught.value
    assert (missing.prefab_id, missing.secret_name) == ("vault", "SIGNING_KEY")
    assert missing.instructions and missing.instructions in str(missing)
    assert client.set_secret(missing.prefab_id, missing.secret_name, "ü key") is None
    assert client.run("vault", "1.0.0", "sign", {"text": "x"}).get_business_success()
    entry = {"prefab_id": "vault", "secret_name": "SIGNING_KEY"}
    assert client.list_secrets() == client.list_secrets("vault") == [entry]
    assert client.list_secrets("text-tools") == []
    assert client.delete_secret("vault", "SIGNING_KEY") is None
    assert client.list_secrets() == []
    assert client.delete_secret("vault", "SIGNING_KEY") is None  # an unknown one is no error


@pytest.mark.skipif(sys.version_info < (3, 10),
                    reason="the notation `X | Y` cannot be evaluated there")
def test_type_hints_of_everything_public_can_be_evaluated() -> None:
    code = """if True:
        import inspect, typing, gateway_sdk
        for name in gateway_sdk.__all__:
            owner = getattr(gateway_sdk, name)
            if not inspect.isclass(owner):
                continue
            typing.get_type_hints(owner)
            for method, value in vars(owner).items():
                value = getattr(value, "__func__", value)
                public = method == "__init__" or not method.startswith("_")
                if inspect.isfunction(value) and public:
                    typing.get_type_hints(value)
        client = gateway_sdk.GatewayClient
        print("ssl_context" in typing.get_type_hints(client.__init__))
        print("executor" in typing.get_type_hints(client.run_batch))
    """
    done = python(code)
    assert (done.stdout, done.stderr) == ("True\nTrue\n", "")


@pytest.mark.parametrize("name", [name for name in gateway_sdk.__all__
                                  if dataclasses.is_dataclass(getattr(gateway_sdk, name))])
def test_type_hints_of_data_can_be_evaluated_on_every_python(name: str) -> None:
    # As pydantic does, for a field or a response model.
    data_class = getattr(gateway_sdk, name)
    fields = {one.name for one in dataclasses.fields(data_class)}
    assert fields <= get_type_hints(data_class).keys()


def test_to_a_type_checker_the_submodules_are_no_variables() -> None:
    tree = ast.parse(Path(gateway_sdk.__file__).read_text(encoding="utf-8"))
    seen = list(tree.body)
    for statement in tree.body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            seen += statement.body
    assigned = [target.id for statement in seen if isinstance(statement, ast.Assign)
                for target in statement.targets if isinstance(target, ast.Name)]  # fmt: skip
    assert assigned and not {"exceptions", "models"} & {*assigned}
    assert gateway_sdk.exceptions is gateway_sdk.models is gateway_sdk


# --- Async client ---------------------------------------------------------------------------------
#
# That its results and errors are those of the other client, fault by fault, is tried below as well:
# see "Faults: every operation meets every fault".


def async_client_of(server: Script | LocalGateway, **options: Any) -> AsyncGatewayClient:
    """What `client_of` makes, to be awaited."""
    return client_of(server, AsyncGatewayClient, **options)


def in_loop(work: Awaitable[Any]) -> Any:
    """`asyncio.run`, with a bound so that a test that hangs fails."""

    async def bounded() -> Any:
        return await asyncio.wait_for(work, LONG_SECONDS)

    return asyncio.run(bounded())


async def until(server: Script, condition: Callable[[], object]) -> None:
    """Waits for a server as `wait_until` does, while the loop goes on."""
    await asyncio.to_thread(server.wait_until, condition)


async def give_up(
    server: Script, awaitable: Awaitable[Any], reached: Callable[[], object]
) -> None:
    """Cancels what is awaited as soon as the server has come so far."""
    task = asyncio.ensure_future(awaitable)
    await until(server, reached)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def data_of(events: AsyncIterator[StreamEvent]) -> list[Any]:
    return [received.data async for received in events]


class Blocking:
    """An async client behind the interface of the other one, for tables that serve both."""

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._client, self._loop = client, loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        return functools.partial(self._call, found) if callable(found) else found

    def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        waiting = asyncio.run_coroutine_threadsafe(
            self._settle(method, *arguments, **options), self._loop
        )
        return waiting.result(3 * WAIT_SECONDS)

    async def _settle(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        given = method(*arguments, **options)
        if inspect.isawaitable(given):
            given = await given
        if hasattr(given, "__aiter__"):
            return [item async for item in given]
        return Blocking(given, self._loop) if isinstance(given, AsyncPrefab) else given


AsyncPrefab = type(AsyncGatewayClient("http://h").prefab("p", "1.0.0"))


def awaited(act: Callable[[Any], Any], server: Script | LocalGateway, **options: Any) -> Any:
    """What `act` gives or raises if its client is an async one."""

    async def main() -> Any:
        async with async_client_of(server, **options) as client:
            return await asyncio.to_thread(act, Blocking(client, asyncio.get_running_loop()))

    return in_loop(main())


def outcome_of(act: Callable[[], Any]) -> Any:
    """What `act` gives; or the error that it raises, in a form that can be compared."""
    try:
        return act()
    except Exception as error:
        return type(error), str(error), vars(error)


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_the_async_client_refuses_the_same_arguments_by_the_same_error(name: str) -> None:
    act, _ = BAD_ARGUMENTS[name]
    with Script() as server, client_of(server) as client:
        assert outcome_of(lambda: awaited(act, server)) == outcome_of(lambda: act(client))
    assert not server.received


# Methods that send: `close`, and what is inherited from `object`, do not.
METHODS = sorted(
    name for name, value in vars(GatewayClient).items()
    if callable(getattr(GatewayClient, name)) and not name.startswith("_") and name != "close"
)  # fmt: skip


def arguments_of(function: Callable[..., Any]) -> dict[str, Any]:
    given = inspect.signature(function).parameters.values()
    return {one.name: (one.kind, one.default) for one in given}


SIGNATURES = {name: arguments_of(getattr(GatewayClient, name)) for name in ["__init__", *METHODS]}


@pytest.mark.parametrize("name", SIGNATURES)
def test_each_method_takes_the_same_arguments_as_that_of_the_other_client(name: str) -> None:
    more = {"max_workers": (inspect.Parameter.KEYWORD_ONLY, None)}
    expected = {**SIGNATURES[name], **(more if name in ("__init__", "from_api_key") else {})}
    assert arguments_of(getattr(AsyncGatewayClient, name)) == expected
    assert name == "__init__" or inspect.getdoc(getattr(AsyncGatewayClient, name))


MORE_ENDPOINTS: dict[str, tuple[Callable[[Any], Any], bytes]] = {
    "batch of three": (
        lambda c: c.run_batch([call(n) for n in range(3)], max_workers=1), ran("each")),
    "batch on an executor": (
        lambda c: c.run_batch([call(), call()], executor=InThisThread()), ran("each")),
    "no batch": (lambda c: c.run_batch([]), ran()),
    "prefab by name": (lambda c: c.prefab("p", "1.0.0").call("f", n=1), ran(1)),
    "prefab that streams": (lambda c: list(c.prefab("p", "1.0.0").stream("f")), WHOLE_STREAM),
    "stream": (lambda c: list(run(c, stream=True)), WHOLE_STREAM),
    "stream for its result": (run, WHOLE_STREAM),
    "pages": (lambda c: list(c.iter_files(7)), answer({"files": [{"key": 1}, {"key": 2}]})),
    "pages of a session": (
        lambda c: list(c.iter_temp_files("s", 7)), answer({"files": [{"key": 1}]})),
}  # fmt: skip
# Calls and what they are answered; and what they are answered, or given, if it goes wrong.
SAME = {**{name: (one.act, one.given) for name, one in ENDPOINTS.items()}, **MORE_ENDPOINTS}
WRONG: dict[str, Answer] = {
    "401": REFUSED,
    "404": answer({"detail": "no such prefab"}, 404),
    "secret": answer({"detail": {"error_code": "MISSING_SECRET", "secret_name": "KEY"}}, 400),
    "422": answer({"detail": [{"loc": ["body", 0], "msg": "no", "type": "t"}]}, 422),
    "429": answer({"detail": {"message": "all used", "limit": 3, "used": 3}}, 429),
    "503": answer({"detail": "down"}, 503, X_Request_ID="r-1"),
    "hang-up": HangUp(),
    "not JSON": answer(body=b"<html>"),
}


@pytest.mark.parametrize("name", SAME)
def test_it_gives_and_raises_what_the_other_client_does(name: str) -> None:
    act, given = SAME[name]
    answers = {"fine": given, **WRONG}
    current = ""

    def sent(server: Script) -> list[Any]:
        return [(one.method, one.target, one.headers, one.body) for one in server.received]

    def outcomes(use: Callable[[Script], Any]) -> dict[str, tuple[Any, list[Any]]]:
        nonlocal current
        found = {}
        for current in answers:
            del server.received[:]
            found[current] = outcome_of(lambda: use(server)), sent(server)
        return found

    with Routed(lambda received: answers[current]) as server:
        with client_of(server, max_retries=1) as client:
            expected = outcomes(lambda _: act(client))
        assert outcomes(lambda _: awaited(act, server, max_retries=1)) == expected
    assert name == "no batch" or any(isinstance(one, tuple) for one, _ in expected.values())


ASYNC_BAD_ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "a local path": lambda c: c.run("p", "1.0.0", "f", files={"in": ["in.txt"]}),
    "no number": lambda c: c.run("p", "1.0.0", "f", {"n": math.nan}),
    "no file": lambda c: c.upload_file("no such file"),
    "no call": lambda c: c.run_batch([call(), {"prefab_id": "p"}]),
    "no function": lambda c: c.run_batch([call()], on_result=5),
    "no session": lambda c: c.cleanup_temp_files(""),
    "no mode": lambda c: c.download_file(S3, "f", "direct"),
    "no timeout": lambda c: run(c, timeout=0),
    "no names": lambda c: c.prefab("p", "1.0.0").f(1),
}


@pytest.mark.parametrize("name", ASYNC_BAD_ARGUMENTS)
def test_what_cannot_be_used_is_refused_as_the_other_client_does(name: str) -> None:
    with Script() as server, client_of(server) as client:
        expected = outcome_of(lambda: ASYNC_BAD_ARGUMENTS[name](client))
        assert outcome_of(lambda: awaited(ASYNC_BAD_ARGUMENTS[name], server)) == expected
    assert isinstance(expected, tuple) and not server.connections


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "4"], ids=repr)
def test_a_number_of_workers_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError, match="max_workers"):
        AsyncGatewayClient("http://h", max_workers=value)
    with Script() as server, pytest.raises(ValidationError, match="max_workers"):
        in_loop(AsyncGatewayClient.from_api_key("k", server.url, max_workers=value))
    assert not server.connections


@pytest.mark.parametrize("mode", MODES)
def test_it_is_made_with_any_credential_and_shows_none(
    mode: str, monkeypatch: Patch
) -> None:
    class Agent(AsyncGatewayClient):
        pass

    async def main() -> Any:
        if mode == EXCHANGED:
            made = await Agent.from_api_key("key-1", server.url, timeout=7)
        else:
            made = Agent(server.url, timeout=7, **MODES[mode].options)
        async with made as client:
            assert client is made and type(client) is Agent
            assert (client.base_url, client.timeout) == (server.url, 7)
            assert client.internal_token == (TOKEN if "x-internal-token" in headers else None)
            assert not re.search(f"{TOKEN}|j.w.t|key-1", repr(client))
            assert server.url in repr(client)
            return await run(client)

    headers = MODES[mode].headers
    with Script(*exchange_of(mode), ran()) as server:
        assert in_loop(main()).is_success()
    received = server.received[-1]
    assert received.target == MODES[mode].run_path
    assert {k: v for k, v in received.headers.items() if k in CREDENTIAL_HEADERS} == headers


@pytest.mark.parametrize("variable", [None, "X_INTERNAL_TOKEN", "AGENT_BUILDER_API_KEY"])
def test_it_takes_the_credential_of_the_environment(
    variable: str | None, monkeypatch: Patch
) -> None:
    async def main() -> None:
        async with await AsyncGatewayClient.from_env(timeout=7, max_workers=1) as client:
            await run(client)

    if variable:
        monkeypatch.setenv(variable, TOKEN)
    exchange = exchange_of(EXCHANGED) if variable == "AGENT_BUILDER_API_KEY" else []
    with Script(*exchange, ran()) as server:
        monkeypatch.setenv("GATEWAY_BASE_URL", server.url)
        in_loop(main())
    assert server.received[-1].headers.get("x-internal-token") == (TOKEN if variable else None)


def test_a_client_that_was_made_outside_of_a_loop_serves_one_loop_after_another() -> None:
    async def use() -> tuple[Any, list[Any]]:
        return (await run(client)).output["output"], await data_of(await run(client, stream=True))

    answers = [ran(5), chunked(event("content", 1), event("content", 2))]
    with nothing_left(), Script(*answers * 2) as server:
        client = async_client_of(server)
        assert in_loop(use()) == in_loop(use()) == (5, [1, 2])
        assert server.connections == 1
        in_loop(client.close())
        in_loop(client.close())
        server.wait_until(lambda: server.open_connections == 0)


def test_a_worker_that_waits_lets_go_of_its_last_call() -> None:
    async def main() -> None:
        async with async_client_of(server) as client:
            parameters = Weak(n=1)
            weakref.finalize(parameters, gone.set)
            await client.run("p", "1.0.0", "f", parameters)
            del parameters
            collect()
            assert await asyncio.to_thread(gone.wait, WAIT_SECONDS)

    class Weak(dict):  # type: ignore[type-arg]
        """To which there can be weak references."""

    gone = threading.Event()
    with Script(ran()) as server:
        in_loop(main())


def test_a_client_that_is_dropped_leaves_no_thread_and_no_connection() -> None:
    code = """if True:
        import asyncio, gc, socket, sys, threading, gateway_sdk
        gateway_sdk._IDLE_SECONDS = 0.1
        async def main():
            client = gateway_sdk.AsyncGatewayClient(sys.argv[1])
            await asyncio.gather(*(client.run("p", "1", "f") for _ in range(3)))
        asyncio.run(main())
        for _ in range(4):
            gc.collect()
        for thread in threading.enumerate():
            if thread is not threading.main_thread():
                thread.join(10)
        sockets = [one for one in gc.get_objects() if isinstance(one, socket.socket)]
        print(threading.active_count(), [one for one in sockets if one.fileno() != -1])
    """
    with Script(*[together(3, ran())] * 3) as server:
        done = python(code, server.url)
    assert (done.stderr, done.stdout) == ("", "1 []\n")


def test_two_hundred_calls_run_at_once_and_their_threads_are_used_again() -> None:
    async def main() -> None:
        async with async_client_of(server) as client:
            results = await asyncio.gather(*(run(client) for _ in range(200)))
            assert all(result.is_success() for result in results)
            before = set(threading.enumerate())
            for _ in range(30):
                await run(client)
            assert not set(threading.enumerate()) - before - set(server._threads)

    with nothing_left(), Script(*[together(200, ran())] * 200, *[ran()] * 30) as server:
        in_loop(main())


def test_threads_are_only_as_many_as_calls_were_in_flight() -> None:
    async def main() -> None:
        before = set(threading.enumerate())
        async with async_client_of(server) as client:
            for _ in range(30):
                await run(client)
            # The last job's thread may not yet be waiting for another one when the next one starts.
            assert len(set(threading.enumerate()) - before - set(server._threads)) < 20

    with Script(*[ran()] * 30) as server:
        in_loop(main())


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_calls_run_at_once_than_there_are_workers(workers: int) -> None:
    running: list[int] = []
    peaks: list[int] = []

    def meet() -> None:
        running.append(1)
        peaks.append(len(running))
        barrier.wait(WAIT_SECONDS)
        running.pop()

    async def main() -> None:
        async with async_client_of(gateway, max_workers=workers) as client:
            prefab = client.prefab("p", "1.0.0")
            results = await asyncio.gather(*(prefab.f() for _ in range(3 * workers)))
            assert all(result.is_success() for result in results)

    barrier = threading.Barrier(workers)
    with LocalGateway() as gateway:
        gateway.add_prefab("p", "1.0.0", {"f": meet})
        in_loop(main())
    assert max(peaks) <= workers


def test_what_needs_several_requests_needs_no_more_than_one_worker(content_file: Path) -> None:
    async def main() -> None:
        async with async_client_of(gateway, max_workers=1) as client:
            calls = [PrefabCall("text-tools", "1.1.0", "echo", {"value": n}) for n in range(5)]
            batch = await client.run_batch(calls, on_result=lambda index, _: seen.append(index))
            assert values_of(batch) == [*range(5)] == sorted(seen)
            async with client.temp_session() as session:
                for _ in range(3):
                    await client.upload_temp_file(content_file, session_id=session)
                found = [one async for one in client.iter_temp_files(session, page_size=2)]
                assert len(found) == 3
            assert (await client.list_temp_files(session))["files"] == []
            url = (await client.upload_file(content_file))["s3_url"]
            await client.download_file(url, content_file.with_name("down"))
            words = await client.prefab("text-tools", "1.1.0").stream("words", text="a b")
            assert "b" in await data_of(words)
            assert (await run_echo(client, 7)).get_function_result() == 7

    async def run_echo(client: Any, value: Any) -> Any:
        return await client.prefab("text-tools", "1.1.0").echo(value=value)

    seen: list[int] = []
    with LocalGateway() as gateway:
        in_loop(main())
    assert content_file.with_name("down").read_bytes() == b"content"


def test_files_are_listed_a_page_at_a_time() -> None:
    async def main() -> None:
        async with async_client_of(server) as client:
            files = client.iter_files(page_size=1)
            assert [(await files.__anext__())["key"], len(server.received)] == [1, 1]
            assert [(await files.__anext__())["key"], len(server.received)] == [2, 2]
            with pytest.raises(StopAsyncIteration):
                await files.__anext__()

    pages = [answer({"files": [{"key": 1}], "next_token": "n"}), answer({"files": [{"key": 2}]})]
    with Script(*pages) as server:
        in_loop(main())


@pytest.mark.parametrize("error", [None, LookupError, asyncio.CancelledError])
def test_an_async_session_is_cleaned_up_error_or_not(error: Any, gateway: LocalGateway) -> None:
    async def main() -> list[Any]:
        async with async_client_of(gateway) as client:
            with pytest.raises(error) if error else contextlib.nullcontext():
                async with client.temp_session() as session:
                    await client.upload_temp_file(__file__, session_id=session)
                    assert len((await client.list_temp_files(session))["files"]) == 1
                    if error:
                        raise error
            return (await client.list_temp_files(session))["files"]

    assert in_loop(main()) == []


def test_a_session_whose_task_is_cancelled_is_cleaned_up() -> None:
    async def main() -> None:
        entered = asyncio.Event()

        async def stay(client: Any) -> None:
            async with client.temp_session("mine"):
                entered.set()
                await asyncio.Event().wait()

        async with async_client_of(server) as client:
            task = asyncio.ensure_future(stay(client))
            await entered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [one.target for one in server.received] == [
                "/internal/files/cleanup_temp?session_id=mine"
            ]

    with Script(answer({"deleted_count": 1})) as server:
        in_loop(main())


# Cancelling: a call that is given up lets go of everything, wherever it stands.


class Deaf(Script):
    """A server that reads no more than the first byte, until it is told to read the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = 0
        self.listens = threading.Event()

    def _exchange(self, sock: socket.socket, number: int) -> bool:
        sock.recv(1, socket.MSG_PEEK)
        with self._changed:
            self.begun += 1
            self._changed.notify_all()
        self.listens.wait(3 * WAIT_SECONDS)
        sock.settimeout(2 * WAIT_SECONDS)
        while sock.recv(2**20):
            pass
        return False

    def __exit__(self, *about: object) -> None:
        self.listens.set()
        super().__exit__(*about)


class Full(Script):
    """A server that accepts no connection: its queue is full, and whoever comes must wait.

    `open_connections` counts those that wait, which only the system knows about.
    """

    def __init__(self) -> None:
        self.received = []
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # PyPy takes 0 for 1.
        count = 2 if sys.implementation.name == "pypy" else 1
        self._first = [socket.create_connection(("127.0.0.1", self.port)) for _ in range(count)]

    def __exit__(self, *_: object) -> None:
        for sock in (*self._first, self._listener):
            sock.close()

    @property
    def open_connections(self) -> int:
        waiting = re.compile(f"[0-9A-F]{{8}}:{self.port:04X} 02 ")  # peer and state: SYN_SENT
        return len(waiting.findall(Path("/proc/net/tcp").read_text()))

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Looks again and again, as no event tells about it."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.002)


def deaf_at(url: str) -> Deaf:
    server = Deaf()
    server.url = url.format(port=server.port)
    return server


def upload(client: Any, folder: Path, method: str) -> Any:
    """Of more than fits into the buffers of sockets."""
    with open(folder / "large", "wb") as file:
        file.truncate(2**26)
    return getattr(client, method)(folder / "large")


def received(count: int) -> Callable[[Any], bool]:
    return lambda server: len(server.received) == count


class Phase(NamedTuple):
    """Where a request stands: a server that leaves it there, the call, and how to tell.

    `act` gives what is to be awaited if the client is an async one.
    """

    make: Callable[[pytest.FixtureRequest], Any]
    act: Callable[[Any, Path], Any]
    reached: Callable[[Any], object]
    may_have_run: bool = False
    is_used: bool = False  # the connection, by an earlier request


def tls_script(*answers: Answer) -> Callable[[pytest.FixtureRequest], Script]:
    return lambda request: TlsScript(request.getfixturevalue("certificate"), *answers)


def exchanging(*answers: Answer) -> Callable[[Any], Script]:
    """Of a server that exchanges the key for one token, which is soon refused."""
    return lambda _: Script(TOKEN_ANSWERS[0], REFUSED, *answers)


WAIT_LONG = answer({"detail": "down"}, 503, Retry_After="30")
PHASES = {
    "waiting for a connection": Phase(
        lambda _: Full(), lambda c, _: run(c), lambda server: server.open_connections == 1),
    "waiting for a proxy": Phase(
        lambda _: deaf_at("https://gateway.invalid"), lambda c, _: run(c), lambda s: s.begun == 1),
    "in the handshake of TLS": Phase(
        lambda _: deaf_at("https://127.0.0.1:{port}"), lambda c, _: run(c), lambda s: s.begun == 1),
    "sending a call": Phase(
        lambda _: Deaf(), lambda c, _: c.run("p", "1.0.0", "f", {"text": "x" * 2**24}),
        lambda server: server.begun == 1, may_have_run=True),
    "sending a file": Phase(
        lambda _: Deaf(), lambda c, folder: upload(c, folder, "upload_file"),
        lambda server: server.begun == 1, may_have_run=True),
    "waiting for the answer": Phase(
        lambda _: Script(Pause()), lambda c, _: run(c), received(1), may_have_run=True),
    "waiting for the answer over TLS": Phase(
        tls_script(Pause()), lambda c, _: run(c), received(1), may_have_run=True),
    "waiting for what may be asked again": Phase(
        lambda _: Script(Pause(), answer([])), lambda c, _: c.list_prefabs(), received(1)),
    "waiting for the answer on a used connection": Phase(
        lambda _: Script(answer([]), Pause()), lambda c, _: run(c), received(2), True, True),
    "in the body on a used connection": Phase(
        tls_script(answer([]), Pause(ran()[:-5])), lambda c, _: run(c), received(2), True, True),
    "in the head of the answer": Phase(
        lambda _: Script(Pause(OK + b"X-A: 1\r\nX-")), lambda c, _: run(c), received(1), True),
    "in the body of the answer": Phase(
        lambda _: Script(Pause(ran()[:-5])), lambda c, _: run(c), received(1), True),
    "in the body over TLS": Phase(
        tls_script(Pause(ran()[:-5])), lambda c, _: run(c), received(1), True),
    "in the body of what may be asked again": Phase(
        lambda _: Script(Pause(answer([])[:-1]), answer([])),
        lambda c, _: c.list_prefabs(), received(1)),
    "in the events of a result": Phase(
        lambda _: Script(Pause(OPEN_STREAM)), lambda c, _: run(c), received(1), True),
    "in a download": Phase(
        lambda _: Script(LINK, Pause(answer(body=b"x" * 100)[:-1]), LINK, answer(body=b"x" * 100)),
        lambda c, folder: c.download_file(S3, folder / "new" / "f"), received(2)),
    "between two attempts": Phase(
        lambda _: Script(WAIT_LONG, answer([])), lambda c, _: c.list_prefabs(),
        lambda server: server.received and not server.open_connections),
    "in a single request": Phase(
        lambda _: Script(Pause()), lambda c, _: c.run_batch([call(), call()], single_request=True),
        received(1), may_have_run=True),
}  # fmt: skip


@contextlib.contextmanager
def in_phase(name: str, request: pytest.FixtureRequest, monkeypatch: Patch) -> Iterator[Any]:
    """The phase and its server. At the end its connection is closed, and nothing more was sent."""
    if "waiting for a connection" in name and not os.path.exists("/proc/net/tcp"):
        pytest.skip("only Linux leaves it waiting, and tells who waits")
    phase = PHASES[name]
    with phase.make(request) as server:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield phase, server
        if isinstance(server, Deaf):
            server.listens.set()
        server.wait_until(lambda: server.open_connections == 0)
        assert isinstance(server, (Full, Deaf)) or phase.reached(server)


@pytest.mark.parametrize("name", PHASES)
def test_a_call_that_is_cancelled_closes_its_connection_and_leaves_no_thread(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Patch
) -> None:
    async def main(phase: Phase, server: Any) -> None:
        async with async_client_of(server, timeout=LONG_SECONDS) as client:
            if phase.is_used:
                await client.list_prefabs()
            await give_up(server, phase.act(client, tmp_path), lambda: phase.reached(server))

    with nothing_left(), in_phase(name, request, monkeypatch) as (phase, server):
        in_loop(main(phase, server))
    assert [path.name for path in tmp_path.rglob("*")] in ([], ["large"])


@pytest.mark.parametrize("name", PHASES)
def test_closing_a_client_can_end_what_its_threads_wait_for(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Patch
) -> None:
    outcome: queue.Queue[Any] = queue.Queue()

    def work() -> None:
        try:
            outcome.put(phase.act(client, tmp_path))
        except BaseException as error:
            outcome.put(error)

    with nothing_left(), in_phase(name, request, monkeypatch) as (phase, server):
        with client_of(server, timeout=None) as client:
            if phase.is_used:
                client.list_prefabs()
            threading.Thread(target=work, daemon=True).start()
            server.wait_until(lambda: phase.reached(server))
            client.close(cancel=True)
            error = outcome.get(timeout=WAIT_SECONDS)
    assert isinstance(error, GatewayError), error
    assert error.may_have_run == phase.may_have_run


@cpython_only
def test_a_call_may_be_ended_at_any_moment() -> None:
    """Before each line that is run until it waits for more events: it must not do so any more."""
    timeout, ended_at = 4 * SHORT_SECONDS, 0.0

    def end() -> None:
        nonlocal ended_at
        ended_at = time.monotonic()
        client.close(cancel=True)

    with Routed(lambda _: Pause(OPEN_STREAM)) as server:
        for at in itertools.count(1):
            client = client_of(server, timeout=timeout)
            started = time.monotonic()
            with interrupted(at, end), pytest.raises(GatewayError) as caught:
                run(client)
            if ended_at < started or ended_at - started >= timeout:
                break  # this was behind the wait
            assert not isinstance(caught.value, GatewayTimeoutError), f"line {at} does not notice"
        server.wait_until(lambda: server.open_connections == 0)
    assert at > 50


def test_closing_a_client_ends_a_wait_of_the_main_thread_too() -> None:
    def close() -> None:
        server.wait_until(lambda: server.received and not server.open_connections)
        time.sleep(SHORT_SECONDS)  # no event tells that it waits
        client.close(cancel=True)

    with Script(WAIT_LONG, answer([])) as server, client_of(server) as client:
        closing_it = threading.Thread(target=close)
        closing_it.start()
        started = time.monotonic()
        with pytest.raises(GatewayError):
            client.list_prefabs()
        assert time.monotonic() - started < WAIT_SECONDS  # of the 30 that it was told to wait
        closing_it.join()
    assert len(server.received) == 1


def test_closing_a_client_ends_no_call_unless_it_is_told_to() -> None:
    gate = threading.Event()
    with Script(Steps((lambda _: gate.wait(WAIT_SECONDS), send(ran(5))))) as server:
        with client_of(server) as client, concurrent.futures.ThreadPoolExecutor(1) as threads:
            running = threads.submit(run, client)
            server.wait_until(lambda: server.received)
            client.close()
            gate.set()
            assert running.result(WAIT_SECONDS).get_function_result() == 5


@pytest.mark.parametrize("waiting", [True, False], ids=["being waited for", "between two events"])
def test_closing_a_client_with_cancel_breaks_its_streams_off(waiting: bool) -> None:
    outcome: queue.Queue[Any] = queue.Queue()

    def read(stream: Any) -> None:
        try:
            outcome.put([received.data for received in stream])
        except BaseException as error:
            outcome.put(error)

    with nothing_left(), Script(Pause(OPEN_STREAM)) as server, client_of(server) as client:
        stream = run(client, stream=True, timeout=LONG_SECONDS)
        assert [next(stream).data, next(stream).data] == [1, 2]
        reader = threading.Thread(target=read, args=(stream,), daemon=True)
        if waiting:
            reader.start()
        client.close(cancel=True)
        server.wait_until(lambda: server.open_connections == 0)
        if not waiting:
            reader.start()
        assert isinstance(outcome.get(timeout=WAIT_SECONDS), GatewayError)  # and not as if complete


def test_a_call_that_takes_too_long_gives_its_thread_to_the_next_one() -> None:
    async def main() -> None:
        async with async_client_of(server, timeout=LONG_SECONDS, max_workers=1) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(run(client), SHORT_SECONDS)
            await until(server, lambda: server.open_connections == 0)
            for _ in range(3):
                reached = functools.partial(received(len(server.received) + 1), server)
                await give_up(server, run(client), reached)
            open_way.set()
            assert (await run(client)).get_function_result() == "ok"

    open_way = threading.Event()
    with nothing_left(), Routed(lambda _: ran() if open_way.is_set() else Pause()) as server:
        in_loop(main())


def test_a_call_that_waits_for_a_worker_can_be_given_up_and_is_never_sent() -> None:
    async def main() -> None:
        async with async_client_of(server, max_workers=1) as client:
            first = asyncio.ensure_future(run(client))
            await until(server, lambda: server.received)
            waiting = [asyncio.ensure_future(run(client)) for _ in range(3)]
            await asyncio.sleep(0)  # they begin
            for task in waiting:
                task.cancel()
            assert all(isinstance(one, asyncio.CancelledError) for one in
                       await asyncio.gather(*waiting, return_exceptions=True))
            gate.set()
            assert (await first).is_success() and (await run(client)).is_success()
        assert len(server.received) == 2

    gate = threading.Event()
    with Script(Steps((lambda _: gate.wait(WAIT_SECONDS), send(ran()))), *[ran()] * 5) as server:
        in_loop(main())


@pytest.mark.parametrize("first", [True, False], ids=["when it is made", "later"])
def test_a_token_exchange_can_be_given_up(first: bool, monkeypatch: Patch) -> None:
    # The thread of a client that nobody got ends when it has been idle.
    monkeypatch.setattr(gateway_sdk, "_IDLE_SECONDS", SHORT_SECONDS)

    async def main() -> None:
        making = AsyncGatewayClient.from_api_key("key-1", server.url, LONG_SECONDS)
        if first:
            await give_up(server, making, lambda: server.received)
        else:
            async with await making as client:
                await give_up(server, run(client), lambda: len(server.received) == 3)
        await until(server, lambda: server.open_connections == 0)

    answers = [Pause()] if first else [TOKEN_ANSWERS[0], REFUSED, Pause()]
    with nothing_left(), Script(*answers, TOKEN_ANSWERS[1], ran()) as server:
        in_loop(main())
        assert len(server.received) == len(answers)


def test_a_token_exchange_that_is_given_up_costs_no_other_call() -> None:
    def choose(received: Received) -> Answer:
        if is_exchange(received):
            return next(exchanges)
        return ran() if received.headers["x-internal-token"] == "second" else REFUSED

    async def main() -> None:
        async with await AsyncGatewayClient.from_api_key("key-1", server.url) as client:
            first = asyncio.ensure_future(run(client))
            await until(server, lambda: len(server.received) == 3)  # its exchange waits
            others = [asyncio.ensure_future(run(client)) for _ in range(3)]
            await until(server, lambda: len(server.received) == 6)  # they were refused, too
            first.cancel()
            assert all(result.is_success() for result in await asyncio.gather(*others))
            with pytest.raises(asyncio.CancelledError):
                await first

    exchanges = iter([TOKEN_ANSWERS[0], Pause(), TOKEN_ANSWERS[1]])
    with Routed(choose) as server:
        in_loop(main())
    assert sum(map(is_exchange, server.received)) == 3


def test_a_call_that_waits_for_a_thread_is_not_sent_once_it_is_cancelled() -> None:
    async def first(client: AsyncGatewayClient) -> None:
        try:
            await run(client)
        finally:
            # The loop stands still, so that the other task does not get to know.
            server.wait_until(lambda: len(server.received) == 2)

    async def main() -> None:
        async with async_client_of(server, max_workers=1) as client:
            works = first(client), run(client), client.list_prefabs()
            running, waiting, last = map(asyncio.ensure_future, works)
            await until(server, lambda: len(server.received) == 1)
            assert running.cancel() and waiting.cancel()
            assert await last == []
        assert running.cancelled() and waiting.cancelled()
        assert [received.method for received in server.received] == ["POST", "GET"]

    def choose(received: Received) -> Answer:
        return Pause() if received.method == "POST" else answer([])

    with nothing_left(), Routed(choose) as server:
        in_loop(main())


def test_a_batch_that_is_cancelled_ends_its_calls_and_sends_nothing_more() -> None:
    async def main() -> None:
        async with async_client_of(server, timeout=LONG_SECONDS) as client:
            batch = client.run_batch([call(n) for n in range(20)], max_workers=3, on_result=report)
            await give_up(server, batch, lambda: len(server.received) == 4)
            await until(server, lambda: server.open_connections == 0)
        assert (len(server.received), reported) == (4, [0])

    def report(index: int, result: PrefabResult) -> None:
        reported.append(index)

    def choose(received: Received) -> Answer:
        number = received.json["calls"][0]["inputs"]["parameters"]["n"]
        return Pause() if number else closing(ran())

    reported: list[int] = []
    with nothing_left(), Routed(choose) as server:
        in_loop(main())


def test_results_that_arrived_before_a_batch_was_cancelled_are_reported() -> None:
    async def main() -> None:
        async with async_client_of(server) as client:
            calls = [call(number) for number in range(9)]
            task = asyncio.ensure_future(client.run_batch(calls, max_workers=1, on_result=report))
            tasks.append(task)
            with pytest.raises(asyncio.CancelledError):
                await task

    def report(index: int, result: PrefabResult) -> None:
        if not reported:  # the loop cannot take any more results while it waits here
            server.wait_until(lambda: len(server.received) == 4)
            tasks[0].cancel()
        reported.append(index)

    tasks: list[asyncio.Future[Any]] = []
    reported: list[int] = []
    with nothing_left(), Script(ran(), ran(), ran(), Pause(), ran()) as server:
        in_loop(main())
    assert (reported, len(server.received)) == ([0, 1, 2], 4)


def test_what_on_result_raises_ends_a_batch_and_comes_out() -> None:
    async def main() -> None:
        async with async_client_of(server) as client:
            with pytest.raises(LookupError, match="mine"):
                await client.run_batch([call()] * 300, max_workers=2, on_result=fail)

    def fail(index: int, result: PrefabResult) -> None:
        server.wait_until(lambda: len(server.received) == 3)
        raise LookupError("mine")

    with holding_all_but_the_first(threading.Event()) as server:
        in_loop(main())
    assert len(server.received) == 3


@pytest.mark.parametrize(
    ("raised", "handed"),
    [(KeyboardInterrupt(), [0, 1, 2]), (SystemExit(3), [0, 1, 2]), (OfItsOwn(), [0, 1, 2]),
     (LookupError("mine"), [0])],
    ids=repr,
)  # fmt: skip
def test_what_arrived_before_an_interruption_is_reported_in_the_loop_too(
    raised: BaseException, handed: list[int]
) -> None:
    async def main() -> None:
        async with async_client_of(server) as client:
            with pytest.raises(type(raised)) as caught:
                await client.run_batch([call()] * 3, single_request=True, on_result=fail)
            assert caught.value is raised

    def fail(index: int, result: PrefabResult) -> None:
        reported.append(index)
        if index == 0:
            raise raised

    reported: list[int] = []
    with Script(answer({"results": [{"status": "SUCCESS"}] * 3})) as server:
        in_loop(main())
    assert reported == handed


# Streams.


@pytest.mark.parametrize(("given", "events", "error"), ENDS.values(), ids=ENDS)
def test_an_async_stream_ends_as_the_other_one_does(given: Answer, events: Any, error: Any) -> None:
    async def main() -> tuple[list[Any], Any]:
        got, raised = [], None
        async with async_client_of(server, timeout=timeout) as client:
            try:
                async with await run(client, stream=True) as stream:
                    assert isinstance(stream, AsyncEventStream) and stream.__aiter__() is stream
                    async for one in stream:
                        got.append((str(one.type), one.data))
            except GatewayError as caught:
                raised = type(caught)
            if not raised:
                assert [one async for one in stream] == []  # it was at its end: it just stops
        return got, raised

    timeout = SHORT_SECONDS if isinstance(given, Pause) else WAIT_SECONDS
    with nothing_left(), Script(given) as server:
        assert in_loop(main()) == (events, error)


def test_each_event_comes_through_the_loop_when_it_has_arrived() -> None:
    async def main() -> None:
        async with async_client_of(server) as client:
            number = 0
            async for one in await run(client, stream=True):
                assert one.data == number and not taken[number].is_set()
                taken[number].set()
                number += 1

    taken = [threading.Event() for _ in range(3)]
    steps: list[Any] = [send(HEAD)]
    for number, gate in enumerate(taken):
        steps += [send(chunk(event("content", number))), lambda _, g=gate: g.wait(WAIT_SECONDS)]
    with Script(Steps((*steps, send(b"0\r\n\r\n")))) as server:
        in_loop(main())
    assert all(gate.is_set() for gate in taken)


async def leave_by_break(stream: Any) -> None:
    async for _ in stream:
        break


async def leave_by_error(stream: Any) -> None:
    with contextlib.suppress(LookupError):
        async with stream:
            raise LookupError


async def leave_with(stream: Any) -> None:
    async with stream as entered:
        assert (await entered.__anext__()).data == 1


async def leave_by_close(stream: Any) -> None:
    await stream.close()
    await stream.close()


async def leave_unread(stream: Any) -> None:
    pass


async def leave_between_events(stream: Any) -> None:
    assert [(await stream.__anext__()).data, (await stream.__anext__()).data] == [1, 2]


async def leave_by_timeout(stream: Any) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(data_of(stream), SHORT_SECONDS)


async def leave_by_cancel(stream: Any) -> None:
    last = asyncio.Event()

    async def read() -> None:
        async for one in stream:
            if one.data == 2:
                last.set()

    task = asyncio.ensure_future(read())
    await last.wait()
    await asyncio.sleep(0)  # the reader asks for the next event
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


LEAVING = {
    "break": leave_by_break,
    "with": leave_with,
    "error in a with": leave_by_error,
    "close": leave_by_close,
    "drop": leave_unread,
    "drop after events": leave_between_events,
    "cancel": leave_by_cancel,
    "timeout": leave_by_timeout,
}


@pytest.mark.parametrize("way", LEAVING)
def test_leaving_an_async_stream_closes_its_connection(way: str, script: Any) -> None:
    async def main() -> None:
        async with async_client_of(server, timeout=LONG_SECONDS) as client:
            stream = await run(client, stream=True)
            await LEAVING[way](stream)
            if way in ("break", "drop", "drop after events"):  # the others close it themselves
                del stream
                collect()
            await until(server, lambda: server.open_connections == 0)
            assert (await run(client)).is_success()  # on any thread that there is

    with nothing_left(), script(Pause(OPEN_STREAM), closing(ran())) as server:
        in_loop(main())


@pytest.mark.parametrize("way", ["close", "with", "cancel", "timeout"])
def test_an_async_stream_that_was_left_is_never_read_on_as_if_it_were_whole(way: str) -> None:
    async def main() -> None:
        async with async_client_of(server, timeout=LONG_SECONDS) as client:
            stream = await run(client, stream=True)
            await LEAVING[way](stream)
            for _ in range(2):
                with pytest.raises(GatewayError, match="closed before its end"):
                    await stream.__anext__()

    with Script(Pause(OPEN_STREAM)) as server:
        in_loop(main())


@pytest.mark.parametrize("how", ["dropped", "closed elsewhere"])
def test_a_stream_may_outlive_its_loop(how: str) -> None:
    async def main() -> Any:
        stream = await run(client, stream=True)
        assert (await stream.__anext__()).data == 1
        return stream

    with nothing_left(), Script(Pause(OPEN_STREAM)) as server:
        client = async_client_of(server, timeout=LONG_SECONDS)
        stream = in_loop(main())
        if how == "closed elsewhere":
            in_loop(stream.close())
        del stream
        collect()
        server.wait_until(lambda: server.open_connections == 0)
        in_loop(client.close())


def test_closing_an_async_stream_ends_the_wait_of_another_task_without_an_error() -> None:
    async def main() -> None:
        async with async_client_of(server, timeout=LONG_SECONDS) as client:
            stream = await run(client, stream=True)
            reader = asyncio.ensure_future(data_of(stream))
            await asyncio.sleep(SHORT_SECONDS)  # so that it mostly waits for the third event
            await stream.close()
            assert [1, 2][: len(await reader)] == reader.result()
            await until(server, lambda: server.open_connections == 0)

    with nothing_left(), Script(Pause(OPEN_STREAM)) as server:
        in_loop(main())


def test_a_stream_closes_while_all_workers_are_busy() -> None:
    async def main() -> None:
        async with async_client_of(server, timeout=LONG_SECONDS, max_workers=2) as client:
            stream = await run(client, stream=True)
            reader = asyncio.ensure_future(data_of(stream))
            calls = [asyncio.ensure_future(run(client)) for _ in range(2)]
            await until(server, lambda: len(server.received) >= 2)
            await stream.close()
            await until(server, lambda: ended.is_set())
            for task in calls:
                task.cancel()
            await asyncio.gather(reader, *calls, return_exceptions=True)

    def stream_until_left(sock: socket.socket) -> None:
        sock.sendall(OPEN_STREAM)
        sock.recv(1)
        with server._changed:
            ended.set()
            server._changed.notify_all()

    ended = threading.Event()
    with nothing_left(), Script(Steps((stream_until_left,)), Pause(), Pause()) as server:
        in_loop(main())


def test_a_second_reader_of_an_async_stream_gets_an_error_and_spoils_nothing() -> None:
    async def main() -> None:
        async with async_client_of(server) as client:
            stream = await run(client, stream=True)
            readers = [asyncio.ensure_future(stream.__anext__()) for _ in range(2)]
            (refused,), (first,) = await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
            with pytest.raises(GatewayError):
                await refused
            gate.set()
            assert [(await first).data, *await data_of(stream)] == [1, None]

    gate = threading.Event()
    late = WHOLE_STREAM[len(HEAD) :]
    with Script(Steps((send(HEAD), lambda _: gate.wait(WAIT_SECONDS), send(late)))) as server:
        in_loop(main())


def test_a_slow_reader_holds_the_sender_back() -> None:
    size, most = 2**16, 2**10  # 64 MiB in all, of which buffers hold a tenth
    sent = 0

    def flood(sock: socket.socket) -> None:
        nonlocal sent
        sock.sendall(HEAD)
        for sent in range(most):
            data = chunk(event("content", [sent, "x" * size]))
            if not select.select([], [sock], [], 0.3)[1]:
                held.set()
            sock.sendall(data)
            if held.is_set():
                break
        held.set()
        sock.sendall(chunk(event("done")) + b"0\r\n\r\n")

    async def main() -> list[int]:
        async with async_client_of(server) as client, await run(client, stream=True) as stream:
            numbers = [(await stream.__anext__()).data[0]]
            await asyncio.to_thread(held.wait, 3 * WAIT_SECONDS)
            return numbers + [one.data[0] async for one in stream if one.type == "content"]

    held = threading.Event()
    with Script(Steps((flood,))) as server:
        assert in_loop(main()) == [*range(sent + 1)]  # none was lost meanwhile
    assert 0 < sent < most - 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """None of its parent's lives on there, not even an idle one."""

    async def call_and_close() -> bool:
        result = await run(client)
        await client.close()
        return result.get_function_result() == "child"

    with Script(ran(), ran("child"), ran("parent")) as server:
        client = async_client_of(server)
        in_loop(run(client))
        child = os.fork()
        if not child:
            status = 1
            with contextlib.suppress(BaseException):
                status = not asyncio.run(asyncio.wait_for(call_and_close(), WAIT_SECONDS / 2))
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert in_loop(run(client)).get_function_result() == "parent"


def test_an_async_client_that_was_used_pickles_and_copies_without_its_threads() -> None:
    async def main() -> list[Any]:
        async with async_client_of(server, max_workers=3) as client:
            used = [await run(client)]
            for copied in (pickle.loads(pickle.dumps(client)), copy.copy(client)):
                assert copied.internal_token == TOKEN and not copied._crews
                used.append(await run(copied))
            return [result.get_function_result() for result in used]

    with Script(ran(1), ran(2), ran(3)) as server:
        assert in_loop(main()) == [1, 2, 3]


# The loop.


@contextlib.asynccontextmanager
async def beating(then: Callable[[], object]) -> AsyncIterator[None]:
    """Calls `then` after twenty beats of the loop, which come only if nothing blocks it."""

    async def beat() -> None:
        for _ in range(20):
            await asyncio.sleep(0.001)
        then()

    heart = asyncio.ensure_future(beat())
    yield
    await heart


def test_the_loop_beats_while_fifty_calls_are_in_flight_and_while_the_client_closes() -> None:
    async def main() -> None:
        client = async_client_of(server)
        streams = [asyncio.ensure_future(data_of(await run(client, stream=True))) for _ in range(5)]
        async with beating(first.set):  # nothing is answered before the heart has beaten
            results = await asyncio.gather(*(run(client) for _ in range(50)))
        assert all(result.is_success() for result in results)
        late = [asyncio.ensure_future(run(client)) for _ in range(5)]
        await until(server, lambda: len(server.received) == 60)
        async with beating(second.set):
            await client.close()
        await asyncio.gather(*streams, *late, return_exceptions=True)

    def held(gate: threading.Event, given: bytes) -> Steps:
        return Steps((lambda _: opened.append(gate.wait(WAIT_SECONDS)), send(given)))

    def choose(received: Received) -> Answer:
        if len(server.received) <= 5:
            return Steps((send(HEAD), *held(second, chunk(event("done")) + b"0\r\n\r\n").steps))
        return held(first if len(server.received) <= 55 else second, ran())

    opened: list[bool] = []
    first, second = threading.Event(), threading.Event()
    with nothing_left(), Routed(choose) as server:
        in_loop(main())
    assert opened == [True] * 60


class SlowPath(os.PathLike):  # type: ignore[type-arg]
    """A path that is told only after the loop has beaten: as on a disk far away."""

    def __init__(self, path: Path) -> None:
        self.path, self.beaten, self.waited = path, threading.Event(), []

    def __fspath__(self) -> str:
        self.waited.append(self.beaten.wait(WAIT_SECONDS))
        return str(self.path)


class SlowParameters(dict):  # type: ignore[type-arg]
    """Parameters that take a while to be written as JSON."""

    def __init__(self) -> None:
        super().__init__(value=1)
        self.beaten, self.waited = threading.Event(), []

    def items(self) -> Any:
        self.waited.append(self.beaten.wait(WAIT_SECONDS))
        return super().items()


def test_the_loop_beats_while_files_are_opened_and_parameters_written(
    content_file: Path, gateway: LocalGateway
) -> None:
    async def main() -> None:
        async with async_client_of(gateway) as client:
            async with beating(upload.beaten.set):
                url = (await client.upload_file(upload))["s3_url"]
            async with beating(target.beaten.set):
                await client.download_file(url, target)
            async with beating(parameters.beaten.set):
                await client.run("text-tools", "1.1.0", "echo", parameters)

    upload, target = SlowPath(content_file), SlowPath(content_file.with_name("down"))
    parameters = SlowParameters()
    in_loop(main())
    slow = [upload, target]
    if sys.implementation.name == "cpython":
        # PyPy writes parameters without asking for their items.
        slow.append(parameters)
    assert all(one.waited and all(one.waited) for one in slow)
    assert target.path.read_bytes() == b"content"


def test_callbacks_are_called_where_they_may_be_slow_or_touch_the_loop(
    content_file: Path, gateway: LocalGateway
) -> None:
    async def main() -> None:
        def report(index: int, result: PrefabResult) -> None:
            asyncio.get_running_loop()
            reporters.append(threading.get_ident())

        def progress(done: int, total: int | None) -> None:
            in_workers.append(threading.get_ident())

        async with async_client_of(gateway) as client:
            for more in ({}, {"single_request": True}, {"executor": InThisThread()}):
                await client.run_batch([call_to_echo] * 3, on_result=report, **more)
            uploaded = await client.upload_file(content_file, on_progress=progress)
            await client.upload_input_file(content_file, on_progress=progress)
            await client.upload_temp_file(content_file, on_progress=progress)
            await client.download_file(uploaded["s3_url"], content_file, on_progress=progress)
            assert reporters == [threading.get_ident()] * 9
            assert len(in_workers) >= 8 and threading.get_ident() not in in_workers

    call_to_echo = PrefabCall("text-tools", "1.1.0", "echo", {"value": 1})
    reporters: list[int] = []
    in_workers: list[int] = []
    in_loop(main())


@pytest.mark.parametrize("name", ["upload_file", "download_file"])
def test_what_on_progress_raises_comes_out_of_an_awaited_transfer(
    name: str, tmp_path: Path
) -> None:
    async def main() -> None:
        async with async_client_of(server) as client:
            await getattr(client, name)(*arguments, on_progress=fail)

    def fail(done: int, total: int | None) -> None:
        if done:
            raise error

    error = KeyError("mine")
    arguments = [S3, tmp_path / "f"] if name == "download_file" else [__file__]
    with Script(LINK, answer(body=b"x" * 3000)) as server:
        with pytest.raises(KeyError) as caught:
            in_loop(main())
    assert caught.value is error and not [*tmp_path.iterdir()]


@contextlib.contextmanager
def logged(note: Callable[[], object]) -> Iterator[list[Any]]:
    """What `note` gives in the threads that log requests: handlers look up a trace's id there."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if " ms" in record.getMessage():
                noted.append(note())

    noted: list[Any] = []
    logger, handler = logging.getLogger("gateway_sdk"), Handler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield noted
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def test_context_variables_reach_the_threads(content_file: Path) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: dict[str, set[str]] = {}

    async def work(client: Any, name: str) -> None:
        def progress(done: int, total: int | None) -> None:
            seen.setdefault(name, set()).add(variable.get())

        variable.set(name)
        await client.run("p", "1.0.0", "f", {"name": name})
        await client.upload_file(content_file, on_progress=progress)
        calls = [PrefabCall("p", "1.0.0", "f", {"name": name})] * 3
        assert (await client.run_batch(calls)).all_success()
        await data_of(await client.run("p", "1.0.0", "f", {"name": name}, stream=True))

    async def main() -> None:
        async with async_client_of(server, headers=lambda: {"X-Trace": variable.get()}) as client:
            await asyncio.gather(*(work(client, name) for name in "abc"))

    with Routed(lambda one: answer({"s3_url": S3}) if "upload" in one.target else ran()) as server:
        with logged(variable.get) as noted:
            in_loop(main())
    assert sorted(noted) == sorted("abc" * 6)
    assert seen == {name: {name} for name in "abc"}
    calls = [one for one in server.received if "upload" not in one.target]
    assert len(calls) == 3 * 5
    for one in calls:
        (asked,) = one.json["calls"]
        assert one.headers["x-trace"] == asked["inputs"]["parameters"]["name"]


PROGRAM = """if True:
    import asyncio, signal, sys, gateway_sdk
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background lacks

    async def read(client):
        async for event in await client.run("p", "1", "stream", stream=True):
            pass

    async def main(how):
        client = gateway_sdk.AsyncGatewayClient(sys.argv[1], timeout=None)
        calls = [gateway_sdk.PrefabCall("p", "1", "f")] * 20
        waiting = [client.run("p", "1", "f"), client.run_batch(calls, max_workers=2), read(client)]
        waiting = [asyncio.ensure_future(one) for one in waiting]
        if how == "the loop ends":
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        else:
            # Before Python 3.11, a Ctrl-C within a step of the loop loses that step: not in here.
            loop = asyncio.get_running_loop()
            loop.call_later(0.2, lambda: print("waiting", flush=True))
            await asyncio.gather(*waiting)

    try:
        asyncio.run(main(sys.argv[2]))
        print("ended")
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.parametrize("how", ["the loop ends", "Ctrl-C"])
def test_the_end_does_not_wait_for_calls_that_were_given_up(how: str) -> None:
    def choose(received: Received) -> Answer:
        return Pause(OPEN_STREAM if b"stream" in received.body else b"")

    with Routed(choose) as server:
        command = [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, server.url, how]
        options: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        options["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, **options) as process:
            server.wait_until(lambda: len(server.received) == 4)
            if how == "Ctrl-C":
                assert process.stdout and process.stdout.readline() == b"waiting\n"
                process.send_signal(signal.SIGINT)
            try:
                out, err = process.communicate(b"\n", timeout=WAIT_SECONDS)
            finally:
                process.kill()  # where it has not ended
    printed = b"interrupted\n" if how == "Ctrl-C" else b"ended\n"
    assert (out, err, process.returncode, len(server.received)) == (printed, b"", 0, 4)


def test_it_works_on_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        async with async_client_of(server, timeout=LONG_SECONDS) as client:
            assert (await run(client)).get_function_result() == "ok"
            assert await data_of(await run(client, stream=True)) == [1, None]
            await give_up(server, run(client), lambda: len(server.received) == 3)
            await leave_by_cancel(await run(client, stream=True))
            await until(server, lambda: server.open_connections == 0)

    answers = [ran(), closing(WHOLE_STREAM), Pause(), Pause(OPEN_STREAM)]
    with Script(*answers) as server:
        loop = uvloop.new_event_loop()
        try:
            loop.run_until_complete(main())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()


def test_a_session_is_cleaned_up_also_where_every_wait_is_cancelled() -> None:
    """As anyio does in a cancelled scope."""
    async def use(client: Any) -> None:
        async def hold() -> None:
            async with client.temp_session("s"):
                await asyncio.sleep(LONG_SECONDS)

        task = asyncio.ensure_future(hold())
        await asyncio.sleep(0)
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        await until(server, lambda: len(server.received) == 1)

    with Script(answer({"deleted_count": 1})) as server:
        in_loop(use(async_client_of(server)))
    assert server.received[0].method == "DELETE"


def test_the_wait_between_attempts_needs_no_clock(refusing: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(gateway_sdk, "_CONNECT_BACKOFF_BASE_SECONDS", 0.01)
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)
    with pytest.raises(ServiceUnavailableError):
        GatewayClient(f"http://{refusing}").list_prefabs()


def test_asyncio_is_not_imported_before_it_is_needed() -> None:
    code = """if True:
        import sys
        from gateway_sdk import *
        with GatewayClient(sys.argv[1]) as client:
            client.run("p", "1", "f")
            list(client.run("p", "1", "f", stream=True))
            client.run_batch([PrefabCall("p", "1", "f")] * 2)
            client.close(cancel=True)
        print("asyncio" in sys.modules, AsyncGatewayClient.__name__, AsyncEventStream.__name__)
    """
    with Routed(lambda _: ran()) as server:
        done = python(code, server.url)
    assert (done.stderr, done.stdout) == ("", "False AsyncGatewayClient AsyncEventStream\n")


# --- Faults: every operation meets every fault ----------------------------------------------------

EVENTS = event("content", "a") + event("content", "b") + event("done")


def good(request: Received, storage: str) -> tuple[bytes, str]:
    """Payload and content type of the right answer; `storage` is where presigned URLs lead."""
    path = request.target.partition("?")[0]
    if path == "/v1/internal/run":
        calls = request.json["calls"]
        if calls[0]["function_name"] == "words":
            return EVENTS, STREAM
        entry = {"status": "SUCCESS", "output": "ok"}
        return json.dumps({"results": [entry] * len(calls)}).encode(), "application/json"
    if path.startswith("/storage/"):
        return (OBJECT if request.method == "GET" else b"<ok/>"), "application/octet-stream"
    content = {
        "/v1/auth/convert_to_internal_token": {"internal_token": "t"},
        "/v1/prefabs": [{"id": "p", "version": "1"}],
        "/v1/secrets": {"stored": True},
        "/v1/secrets/p/KEY": {"deleted": True},
        "/internal/files/generate_upload_url": {
            "upload_url": f"{storage}/storage/in?sig=x",
            "s3_url": "s3://b/in",
        },
        "/internal/files/upload": {"s3_url": "s3://b/up"},
        "/internal/files/upload_temp": {"s3_url": "s3://b/up"},
        "/internal/files/download": {"presigned_url": f"{storage}/storage/out?signature=x"},
        "/internal/files/cleanup_temp": {"deleted_count": 3},
    }[path]
    return json.dumps(content).encode(), "application/json"


def requests_to(server: Script, operation: Operation) -> list[Received]:
    """The requests that count for an operation, without that which warms a connection up."""
    found = [r for r in server.received if f"{r.method} {r.target}".startswith(operation.route)]
    return [request for request in found if not request.target.endswith("=warm")]


def download(client: GatewayClient, folder: Path) -> bytes:
    client.download_file("s3://b/out", folder / "new" / "out.bin")
    content = (folder / "new" / "out.bin").read_bytes()
    shutil.rmtree(folder / "new")
    return content


def exchange(client: GatewayClient, _: Path) -> bool:
    with GatewayClient.from_api_key("key-1", client.base_url, timeout=client.timeout):
        return True


class Operation(NamedTuple):
    """A call of the SDK, what it gives when all is well, and which of its requests meets faults."""

    call: Callable[[GatewayClient, Path], Any]
    gives: Any
    route: str
    reads: str = "json"  # or "events", "object", "nothing"
    count: int = 1  # requests that it takes

    @property
    def repeatable(self) -> bool:
        return not re.match("POST (?!/internal/files/generate_upload_url|/v1/auth)", self.route)

    @property
    def storage(self) -> bool:
        return "/storage/" in self.route


RUN_ROUTE = "POST /v1/internal/run"
OPERATIONS = {
    "list_prefabs": Operation(lambda c, f: [p.prefab_id for p in c.list_prefabs()], ["p"],
                              "GET /v1/prefabs"),
    "run": Operation(lambda c, f: c.run("p", "1", "f").get_function_result(), "ok", RUN_ROUTE),
    "run-stream": Operation(
        lambda c, f: [event.data for event in c.run("p", "1", "words", stream=True)],
        ["a", "b", None], RUN_ROUTE, "events"),
    "run-of-a-stream": Operation(
        lambda c, f: c.run("p", "1", "words").get_function_result(), "ab", RUN_ROUTE, "events"),
    "run_batch": Operation(lambda c, f: values_of(c.run_batch([call()] * 3)), ["ok"] * 3, RUN_ROUTE,
                           count=3),
    "single_request": Operation(
        lambda c, f: [r.output for r in c.run_batch([call(), call()], single_request=True).results],
        ["ok", "ok"], RUN_ROUTE),
    "upload_input_file-url": Operation(
        lambda c, f: c.upload_input_file(f / "in.bin"), "s3://b/in",
        "POST /internal/files/generate_upload_url"),
    "upload_input_file-put": Operation(
        lambda c, f: c.upload_input_file(f / "in.bin"), "s3://b/in", "PUT /storage/in", "nothing"),
    "upload_file": Operation(
        lambda c, f: c.upload_file(f / "in.bin")["s3_url"], "s3://b/up",
        "POST /internal/files/upload"),
    "upload_temp_file": Operation(
        lambda c, f: c.upload_temp_file(f / "in.bin")["s3_url"], "s3://b/up",
        "POST /internal/files/upload_temp"),
    "download_file": Operation(download, OBJECT, "GET /storage/out", "object"),
    "get_presigned_url": Operation(
        lambda c, f: c.get_presigned_url("s3://b/out").rpartition("?")[2],
        "signature=x", "GET /internal/files/download"),
    "set_secret": Operation(lambda c, f: c.set_secret("p", "KEY", "s3cr3t"), None,
                            "POST /v1/secrets", "nothing"),
    "delete_secret": Operation(lambda c, f: c.delete_secret("p", "KEY"), None,
                               "DELETE /v1/secrets/p/KEY", "nothing"),
    "cleanup_temp_files": Operation(lambda c, f: c.cleanup_temp_files("s"), 3,
                                    "DELETE /internal/files/cleanup_temp"),
    "from_api_key": Operation(exchange, True, "POST /v1/auth/convert_to_internal_token"),
}  # fmt: skip


class Outcome(NamedTuple):
    """The class of the error and its status, and whether a repeatable request is repeated."""

    error: type[GatewayError]
    status: int | None = None
    repeated: bool = False


FINE = None
LOST_ANSWER = Outcome(ServiceUnavailableError, None, repeated=True)
TIMED_OUT = Outcome(GatewayTimeoutError)
UNUSABLE = Outcome(GatewayError, 200)


class Fault(NamedTuple):
    """What is made of the right answer, and what comes of it; `but` says for whom otherwise."""

    make: Callable[[bytes, str], Answer]
    outcome: Outcome | None
    but: dict[str, Outcome | None] = {}
    timeout: float = WAIT_SECONDS


def endless(start: bytes, block: bytes) -> Steps:
    def flood(sock: socket.socket) -> None:
        sock.sendall(start)
        for _ in range(2**26 // len(block)):
            sock.sendall(block)
        raise AssertionError("the client would read for ever")

    return Steps((flood,))


def bytewise(payload: bytes, kind: str) -> Steps:
    """Every byte of the head and the first ones of the body by itself."""
    text = whole(payload, kind)
    pieces = [*(text[index : index + 1] for index in range(200)), text[200:]]
    return Steps(tuple(operator.methodcaller("sendall", piece) for piece in pieces))


def lost(make: Callable[[bytes, str], Answer]) -> Fault:
    """After this there is no whole answer."""
    return Fault(make, LOST_ANSWER)


def unavailable(status: int, repeated: bool, **headers: str) -> Fault:
    outcome = Outcome(ServiceUnavailableError, status, repeated)
    return Fault(lambda payload, kind: answer({"detail": "no"}, status, **headers), outcome)


IN_AN_HOUR = email.utils.formatdate(time.time() + 3600, usegmt=True)
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
# Of the payload `p` and the content type `k` of the right answer.
FAULTS = {
    "hang-up-before-the-answer": lost(lambda p, k: HangUp()),
    "reset-before-the-answer": lost(lambda p, k: HangUp(reset=True)),
    "hang-up-in-the-status-line": lost(lambda p, k: HangUp(whole(p, k)[:10])),
    "hang-up-in-a-header": lost(lambda p, k: HangUp(whole(p, k)[:40])),
    "hang-up-between-headers": lost(lambda p, k: HangUp(whole(p, k).partition(b"Content-Type")[0])),
    "hang-up-before-the-blank-line": lost(lambda p, k: HangUp(whole(b"", k)[:-2])),
    "hang-up-before-the-body": lost(lambda p, k: HangUp(whole(p, k)[: -len(p)])),
    "hang-up-in-the-body": lost(lambda p, k: HangUp(whole(p, k)[: -(len(p) + 1) // 2])),
    "reset-in-the-body": lost(lambda p, k: HangUp(whole(p, k)[: -(len(p) + 1) // 2], True)),
    "body-one-byte-short": lost(lambda p, k: HangUp(whole(p, k)[:-1])),
    "hang-up-between-chunks": lost(lambda p, k: HangUp(unended(p[:9], k))),
    "hang-up-in-a-chunk": lost(lambda p, k: HangUp(unended(p, k)[:-9])),
    # Events have said that they are done.
    "no-last-chunk": Fault(lambda p, k: HangUp(unended(p, k)), LOST_ANSWER, {"events": FINE}),
    **{f"chunks-{body!r:.30}": lost(lambda p, k, body=body: HangUp(unended(b"", k) + body))
       for body in (
        b"-5\r\nhello\r\n0\r\n\r\n", b"xyz\r\nhello\r\n0\r\n\r\n", b"\r\nhello\r\n0\r\n\r\n",
        b"2\r\nhello\r\n0\r\n\r\n", b"fffffff\r\nhello\r\n0\r\n\r\n",
        b"f" * 17 + b"\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n0")},
    "trailer-cut-short": Fault(lambda p, k: HangUp(unended(p, k) + b"0\r\nX-Su"), FINE),
    "chunk-line-endless": lost(lambda p, k: endless(unended(b"", k) + b"5;", b"x" * 65536)),
    "status-line-garbage": lost(lambda p, k: HangUp(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")),
    "status-line-without-number": lost(lambda p, k: HangUp(b"HTTP/1.1 OK\r\n\r\n")),
    "status-line-endless": lost(lambda p, k: endless(b"", b"H" * 65536)),
    "headers-endless": lost(lambda p, k: endless(OK, b"X-Filler: 1\r\n" * 1000)),
    "header-endless": lost(lambda p, k: endless(OK + b"X: ", b"x" * 65536)),
    **{
        f"length-{length!r:.9}": lost(
            lambda p, k, length=length: HangUp(OK + b"Content-Length: %b\r\n\r\n" % length))
       for length in (b"-1", b"1x", b"9" * 5000)},
    "http-1.0": Fault(lambda p, k: HangUp(whole(p, k).replace(b"/1.1", b"/1.0")), FINE),
    "http-1.0-without-length": Fault(lambda p, k: unframed(p, k, "1.0"), FINE,
                                     {"object": UNUSABLE}),
    "http-1.1-without-length": Fault(lambda p, k: unframed(p, k), FINE, {"object": UNUSABLE}),
    "chunks": Fault(lambda p, k: chunked(p[:7], p[7:], content_type=k), FINE),
    "chunks-with-extensions-and-a-trailer": Fault(
        lambda p, k: unended(b"", k)
        + b"00%X ; a=\"b;c\"\r\n%b\r\n000;last\r\nX-Sum: 1\r\n\r\n" % (len(p), p), FINE),
    "connection-close": Fault(lambda p, k: HangUp(answer(body=p, Content_Type=k,
                                                         Connection="close")), FINE),
    "100-first": Fault(lambda p, k: b"HTTP/1.1 100 Continue\r\n\r\n" + whole(p, k), FINE),
    "many-interim-answers-first": Fault(lambda p, k: EARLY * 50 + whole(p, k), FINE),
    "interim-answers-without-end": lost(lambda p, k: endless(b"", EARLY * 1000)),
    "interim-answer-only": lost(lambda p, k: HangUp(EARLY)),
    "204": Fault(lambda p, k: b"HTTP/1.1 204 No Content\r\n\r\n", Outcome(GatewayError, 204),
                 {"nothing": FINE}),
    "bytewise": Fault(bytewise, FINE),
    "answer-to-nothing-behind-it": Fault(lambda p, k: whole(p, k) + whole(b"!", k, 500), FINE),
    "silence-before-the-answer": Fault(lambda p, k: Pause(), TIMED_OUT, timeout=SHORT_SECONDS),
    "silence-in-the-body": Fault(lambda p, k: Pause(whole(p, k)[: -len(p) // 2]), TIMED_OUT,
                                 timeout=SHORT_SECONDS),
    "429": Fault(lambda p, k: answer({"detail": "no"}, 429, Retry_After="0"),
                 Outcome(QuotaExceededError, 429), {"storage": Outcome(GatewayError, 429)}),
    "500": unavailable(500, repeated=False),
    "502": unavailable(502, repeated=True),
    "503": unavailable(503, repeated=True),
    "504": unavailable(504, repeated=True),
    "503-and-hang-up": Fault(
        lambda p, k: HangUp(answer(status=503, body=b"busy")[:-2]),
        Outcome(ServiceUnavailableError, 503, True)),
    "503-retry-after-61": unavailable(503, repeated=False, Retry_After="61"),
    "503-retry-in-an-hour": unavailable(503, repeated=False, Retry_After=IN_AN_HOUR),
    "503-retry-after-nonsense": unavailable(503, repeated=True, Retry_After="soon, \xe4h"),
    "307": Fault(lambda p, k: moved("/storage/elsewhere?sig=2", 307), Outcome(GatewayError, 307),
                 {"object": FINE}),
}  # fmt: skip
# Operations that read their answers in different ways meet every fault. The others share that code
# with them, and meet one fault of each kind.
DIFFERENT = ("list_prefabs", "run-stream", "download_file")
ONE_OF_EACH_KIND = (
    "hang-up-before-the-answer", "hang-up-in-the-body", "http-1.1-without-length", "chunks", "204",
    "silence-before-the-answer", "429", "500", "503", "503-retry-after-61", "307",
)


def fault_cells() -> Iterator[Any]:
    """Operations and the faults that they meet.

    Once, or always, if that leads to another end or to more requests.
    """
    for name, operation in OPERATIONS.items():
        for label in FAULTS if name in DIFFERENT else ONE_OF_EACH_KIND:
            yield pytest.param(operation, FAULTS[label], True, id=f"{name}-{label}-once")
    for name, label in itertools.product(("list_prefabs", "run", "download_file"),
                                         ONE_OF_EACH_KIND):
        if FAULTS[label].outcome not in (FINE, TIMED_OUT):
            yield pytest.param(OPERATIONS[name], FAULTS[label], False, id=f"{name}-{label}-always")


@pytest.mark.parametrize(("operation", "fault", "once"), list(fault_cells()))
def test_every_fault_ends_as_documented_and_the_client_works_on(
    operation: Operation, fault: Fault, once: bool, tmp_path: Path
) -> None:
    faults = itertools.repeat(fault, 1 if once else 10**6)

    def choose(request: Received) -> Answer:
        payload, kind = good(request, server.url)
        current = next(faults, None) if request in requests_to(server, operation) else None
        return current.make(payload, kind) if current else whole(payload, kind)

    outcome = fault.but.get("storage" if operation.storage else "", fault.outcome)
    outcome = fault.but.get(operation.reads, outcome)
    (tmp_path / "in.bin").write_bytes(b"x" * 3000)
    with (
        nothing_left(tmp_path),
        Routed(choose) as server,
        client_of(server, timeout=fault.timeout) as client,
    ):
        if once:
            client.list_prefabs("warm")  # the fault meets a connection that is used again
        requests = operation.count
        if outcome and outcome.repeated and operation.repeatable:
            requests += 1 if once else 2
            outcome = FINE if once else outcome
        if outcome:
            with pytest.raises(GatewayError) as caught:
                operation.call(client, tmp_path)
            assert (type(caught.value), caught.value.status_code) == (outcome.error, outcome.status)
            assert operation.route.partition(" ")[0] in str(caught.value)
            assert "sig=" not in str(caught.value)
            unsure = outcome.error in (
                ServiceUnavailableError,
                GatewayTimeoutError,
            ) or outcome.status in (200, 204)
            if operation is OPERATIONS["single_request"] and outcome.status == 429:
                unsure = True  # the first of its calls may have been good
            assert caught.value.may_have_run == (unsure and not operation.repeatable)
            assert caught.value.may_have_run == ("may have run" in str(caught.value))
        else:
            assert operation.call(client, tmp_path) == operation.gives
        asked = requests_to(server, operation)
        assert len(asked) == requests
        if requests > operation.count == 1:  # what is sent again is the same, on a fresh connection
            assert asked[0][:2] == asked[1][:2] and asked[0].body == asked[1].body
            assert asked[0].connection != asked[1].connection
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.bin"]
        faults = iter(())
        assert operation.call(client, tmp_path) == operation.gives


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "from_api_key"])
def test_the_async_client_meets_faults_as_the_other_one_does(name: str, tmp_path: Path) -> None:
    def choose(request: Received) -> Answer:
        payload, kind = good(request, server.url)
        is_first = requests_to(server, operation) == [request]
        return fault.make(payload, kind) if is_first else whole(payload, kind)

    def outcome(use: Callable[[], Any]) -> Any:
        del server.received[:]
        return outcome_of(use), [request[:2] for request in server.received]

    operation = OPERATIONS[name]
    (tmp_path / "in.bin").write_bytes(b"x" * 3000)
    with nothing_left(tmp_path), Routed(choose) as server, client_of(server) as client:
        for label in ONE_OF_EACH_KIND:
            fault = FAULTS[label]
            if fault.outcome is not TIMED_OUT:  # which takes its time
                expected = outcome(lambda: operation.call(client, tmp_path))
                act = lambda awaiting: operation.call(awaiting, tmp_path)  # noqa: E731
                assert outcome(lambda: awaited(act, server)) == expected, label  # noqa: B023


@pytest.mark.parametrize("name", WRONG)
def test_an_awaited_exchange_fails_as_the_other_one_does(name: str) -> None:
    with Routed(lambda _: WRONG[name]) as server:
        expected, awaited_ = (outcome_of(make) for make in (
            lambda: GatewayClient.from_api_key("key-1", server.url),
            lambda: in_loop(AsyncGatewayClient.from_api_key("key-1", server.url)),
        ))
        assert expected == awaited_ and issubclass(expected[0], GatewayError)
        server.wait_until(lambda: server.open_connections == 0)


# Which is tried below.
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "from_api_key"])
def test_without_a_connection_every_request_is_repeated_and_fails_if_that_is_not_allowed(
    name: str, tmp_path: Path, refusing: str, monkeypatch: Patch
) -> None:
    """The proxy refuses, until the wait before the second attempt."""

    def open_the_way(*_: Any) -> None:
        os.environ["http_proxy"] = ""

    operation = OPERATIONS[name]
    (tmp_path / "in.bin").write_bytes(b"x")
    monkeypatch.setattr(gateway_sdk._Flight, "wait", open_the_way)
    with Routed(lambda request: whole(*good(request, server.url))) as server:
        monkeypatch.setenv("http_proxy", f"http://{refusing}")
        with nothing_left(tmp_path), client_of(server, max_retries=0) as client:
            with pytest.raises(ServiceUnavailableError,
                               match=f"no connection to {server.url}") as caught:
                operation.call(client, tmp_path)
            assert (type(caught.value), caught.value.status_code) == (ServiceUnavailableError, None)
            assert TOKEN not in str(caught.value)
        with client_of(server) as client:
            assert operation.call(client, tmp_path) == operation.gives
        assert len(requests_to(server, operation)) == operation.count


@pytest.mark.parametrize(
    "act",
    [lambda url, **options: run(GatewayClient(url, **options)),
     functools.partial(GatewayClient.from_api_key, "k")],
    ids=["call", "exchange"],
)
@pytest.mark.parametrize("url",
                         ["http://{refusing}/prefix", "http://host.invalid",
                          "https://behind.the.proxy"])
def test_where_there_is_no_connection_base_url_is_named_and_a_call_too_is_sent_again(
    act: Any, url: str, refusing: str, delays: list[float], monkeypatch: Patch
) -> None:
    url = url.format(refusing=refusing)
    with Script(*[answer(body=b"", status=502)] * 9) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(ServiceUnavailableError) as caught:
            act(url, max_retries=3)
    assert len(delays) == 3 and caught.value.status_code is None
    assert url.replace("/prefix", "") in str(caught.value)
    assert re.search(r"\bbase_url\b", str(caught.value)) and "GATEWAY_BASE_URL" in str(caught.value)
    assert [received.method for received in proxy.received] == ["CONNECT"] * (
        4 if "proxy" in url else 0
    )


# --- Faults: answers that are not what they should be ---------------------------------------------

WRONG_RUNS = [
    "[]", "{}", '{"results": null}', '{"results": {}}', '{"results": []}', '{"results": [1]}',
    '{"results": [null]}',
    '{"results": [[]]}', '{"results": [{}, {}]}', '{"results": "ab"}',
]
WRONG_FIELDS = {
    "list_prefabs": [
        "{}", '["\\ud800"]', '{"prefabs": []}', "[1]", "[null]", "[[]]", "[{}]", '[{"id": "p"}]',
        '[{"version": "1"}]',
        '[{"id": 1, "version": "1"}]', '[{"id": "p", "version": null}]',
        '[{"id": "p", "version": 1}]', '[{"id": "p", "version": ["1"]}]',
    ],
    "run": WRONG_RUNS,
    "run-plain-stream": WRONG_RUNS,
    "run_batch": ["[]", '{"results": []}', '{"results": [null]}', '{"results": [{}, {}]}'],
    "upload_input_file-url": ["[]", "{}", '{"upload_url": "http://h/"}',
                              '{"upload_url": "http://h/", "s3_url": null}'],
    "upload_file": ["[]", "{}", '{"s3_url": null}', '{"s3_url": ["s3://b/k"]}'],
    "get_presigned_url": ["[]", "{}", '{"presigned_url": null}',
                          '{"presigned_url": {"url": "http://h/"}}'],
    "cleanup_temp_files": ["[]", "{}", '{"deleted_count": null}', '{"deleted_count": "3"}',
                           '{"deleted_count": 1.5}'],
}
JSON_READERS = {
    **OPERATIONS,
    "run-plain-stream": Operation(lambda c, f: c.run("p", "1", "f", stream=True), None, RUN_ROUTE),
}


def wrong_bodies() -> Iterator[Any]:
    """All that is no JSON for a GET and for calls; for each operation, JSON that it cannot use."""
    for name in ("list_prefabs", "run", "run-plain-stream"):
        for label, body in NOT_JSON.items():
            yield pytest.param(name, body, id=f"{name}-{label}")
    for name, bodies in WRONG_FIELDS.items():
        for text in bodies:
            yield pytest.param(name, text.encode(), id=f"{name}-{text}")


@pytest.mark.parametrize(("name", "body"), list(wrong_bodies()))
def test_an_answer_that_is_not_as_promised_is_a_plain_gateway_error(
    name: str, body: bytes, tmp_path: Path
) -> None:
    operation = JSON_READERS[name]
    (tmp_path / "in.bin").write_bytes(b"x")
    with (
        nothing_left(tmp_path),
        Routed(lambda request: answer(body=body)) as server,
        client_of(server) as client,
    ):
        with pytest.raises(GatewayError) as caught:
            operation.call(client, tmp_path)
        assert len(server.received) == operation.count
        server.choose = lambda request: ran("ok")
        assert run(client).get_function_result() == "ok"
        assert server.connections <= operation.count
    assert type(caught.value) is GatewayError and len(str(caught.value)) < 2000
    if caught.value.status_code is not None:  # it is about the answer, and not about a URL in it
        assert caught.value.status_code == 200 and operation.route in str(caught.value)
    assert TOKEN not in repr(caught.value.details)


# What servers say, with full stops and empty lines of their own.
SAYINGS = [
    "It is down.", "It is down.\n", "\n\nIt is down\n\n", "first.\n\nsecond.", "a\r\n\r\nb",
    "x.\n \n\t\ny", "Why?", "No!", "",
]  # fmt: skip
Provocation = tuple[Callable[[GatewayClient], Any], Answer]


def shapes_of(said: str) -> list[Any]:
    """The bodies that say so."""
    secret = {"error_code": "MISSING_SECRET", "secret_name": "K", "instructions": said}
    return [
        {"detail": said}, {"error_code": "E", "message": said}, {"detail": secret}, {"error": said},
        {"detail": [{"loc": ["body"], "msg": said}, {"loc": ["query"], "msg": said}]},
        said.encode(), f"<Error><Code>E</Code><Message>{said}</Message></Error>".encode(),
    ]  # fmt: skip


def read_on(client: GatewayClient, end: Callable[[EventStream], object]) -> None:
    stream = run(client, stream=True)
    with contextlib.suppress(GatewayError):
        end(stream)
    next(stream)


def on_executor(client: GatewayClient, submit: Any) -> None:
    class Executor(concurrent.futures.Executor):
        def submit(self, *_: Any, **__: Any) -> Any:
            return submit()

    values_of_raised(client.run_batch([call()], executor=Executor()))


def provoke_by_tables(kind: str, folder: Path) -> Iterator[Provocation]:
    """What is asked and how it is answered, of the tables of this file."""
    if kind == "statuses":
        for name, status, body, _, _ in MAPPING:
            yield ENDPOINTS[name].act, answered(body, status)
    elif kind == "bodies":
        for body, _ in BODIES.values():
            if len(str(body)) < 1000:  # a long one says no more
                yield from ((run, answered(body, status)) for status in (400, 503))
    elif kind == "sayings":
        for said, status in itertools.product(SAYINGS, (400, 401, 404, 503)):
            yield from ((run, answered(body, status)) for body in shapes_of(said))
    elif kind == "wrong fields":
        for name, bodies in WRONG_FIELDS.items():
            for text in bodies:
                act = JSON_READERS[name].call
                yield lambda c, act=act: act(c, folder), answer(body=text.encode())
    elif kind == "no JSON":
        yield from ((run, answer(body=body)) for body in NOT_JSON.values() if len(body) < 1000)
    elif kind == "advice":
        yield from ((act, given) for act, given, _, _ in ADVICE.values())
    elif kind == "long answers":
        yield from ((run, given) for given in LONG_ANSWERS.values())
    elif kind == "faults":
        for label, fault in FAULTS.items():
            given = fault.make(b'{"results": []}', "application/json")
            if "endless" not in label and "without-end" not in label:
                yield lambda c, timeout=fault.timeout: run(c, timeout=timeout), given


def provoke_by_arguments(kind: str, folder: Path) -> Iterator[Provocation]:
    """What is refused before anything is sent, and streams and executors that fail."""
    if kind == "calls":
        for change, _ in BAD_CALLS:
            bad = dataclasses.replace(call(), **change)
            yield lambda c, bad=bad: c.run_batch([call(), bad]), NO_BODY
            yield lambda c, bad=bad: c.run("p", "1", "f", bad.parameters, bad.files), NO_BODY
    elif kind == "arguments":
        yield from ((act, NO_BODY) for act, _ in BAD_ARGUMENTS.values())
        yield from ((lambda c, take=take: take(c, "."), NO_BODY) for take in ID_TAKERS.values())
        yield from ((lambda c, act=act: act(c, MISTAKEN), NO_BODY) for act in MISTAKES.values())
    elif kind == "clients":
        for options in NO_CLIENTS.values():
            options = {"base_url": "http://h", **options}
            yield lambda _, options=options: GatewayClient(**options), NO_BODY
        for sent in (*CREDENTIALS.values(), {"internal_token": None, "jwt_token": jwt(exp=1)}):
            yield lambda c, sent=sent: run(GatewayClient(c.base_url, **sent)), REFUSED
        for given in (REFUSED, HangUp(), *(answers[0] for answers in EXCHANGE_ANSWERS.values())):
            yield exchange_a_key, given
    elif kind == "streams":
        broken_off = (HangUp(OPEN_STREAM), HangUp(HEAD))
        for end, given in itertools.product((list, EventStream.close), broken_off):
            yield lambda c, end=end: read_on(c, end), given
    elif kind == "executors":
        for submit in (cancelled, broken, refused, mixed_up):
            yield lambda c, submit=submit: on_executor(c, submit), NO_BODY


TABLES = [
    "statuses", "bodies", "sayings", "wrong fields", "no JSON", "advice", "long answers", "faults",
]  # fmt: skip
ARGUMENTS = ["calls", "arguments", "clients", "streams", "executors"]
# An empty line; two full stops, but not three; a full stop behind another end of a sentence.
ILL_FORMED = re.compile(r"\A\s|\s\Z|\n[^\S\n]*\n|(?<![.'])\.\.(?![.'])|[?!]\.(?!\w)|\s\.(?=\s|\Z)")


@pytest.mark.parametrize("kind", [*TABLES, *ARGUMENTS])
def test_no_message_has_an_empty_line_or_two_full_stops(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in.bin").write_bytes(b"x")
    provoke, messages = provoke_by_tables if kind in TABLES else provoke_by_arguments, []
    for act, given in provoke(kind, tmp_path):
        with Script(given) as server, client_of(server, max_retries=0) as client:
            try:
                act(client)
            except (GatewayError, TypeError, OSError) as error:
                messages.append(str(error))
    assert len(messages) > 3
    assert not [message for message in messages if ILL_FORMED.search(message)]


def readable_depth() -> int:
    """How deep JSON may be nested until reading it fails."""
    low, high = 1, 200_000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            json.loads("[" * middle + "]" * middle)
            low = middle
        except RecursionError:
            high = middle
    return low


def test_json_at_any_depth_gives_a_result_or_a_gateway_error() -> None:
    """Also where reading it just works, but writing it into the error's message would not."""
    limit = readable_depth()
    shapes = ('{"results": [%s]}', "[{}, {}, %s]", '[{"id": "p", "x": %s}]',
              '{"results": [{"status": "SUCCESS", "output": %s}], "job_id": []}')  # fmt: skip
    written = ('{"results": [{"status": "FAILED", "error": %s}]}', '{"results": [{"status": %s}]}',
               '{"results": [{"status": "SUCCESS", "output": {"output": {"message": %s}}}]}',
               'data: {"type": "error", "data": %s}\n\n')  # fmt: skip
    cases = [(shape, depth) for shape in shapes for depth in range(limit - 60, limit + 5, 3)]
    # Once only: `str` takes a second for a list of such depth.
    cases += [(shape, limit - 60) for shape in written]
    answers = []
    for shape, depth in cases:
        kind = STREAM if shape.startswith("data:") else "application/json"
        answers += [
            whole((shape % ("[" * depth + "]" * depth)).encode(), kind, status)
            for status in (200, 200, 422)
        ]
    with Script(*answers) as server, client_of(server) as client:
        for _ in cases:
            for act in (lambda: run(client).get_business_message(), client.list_prefabs,
                        client.list_files):
                with contextlib.suppress(GatewayError):
                    act()
    assert len(server.received) == len(answers)


# --- Faults: random and long ones -----------------------------------------------------------------


def random_value(chance: random.Random, depth: int = 0) -> Any:
    plain = [None, True, False, 0, -1, 2**70, 1.5, "", "x", "SUCCESS", "FAILED", "s3://b/k",
             "\ud800", "{0}", "ä\0\n",
             [], {}, "http://[", "//", "http://127.0.0.1:1/x", "9" * 50]
    if depth > 2 or chance.random() < 0.6:
        return chance.choice(plain)
    values = [random_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return (
        values
        if chance.random() < 0.5
        else {chance.choice(["id", "message", "files", "x"]): v for v in values}
    )


def mutated(chance: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which something is something else."""
    if chance.random() < 0.15 or not isinstance(value, (dict, list)):
        return random_value(chance)
    if not value:
        return [random_value(chance)]
    if isinstance(value, list):
        index = chance.randrange(len(value))
        kept = [] if chance.random() < 0.2 else [mutated(chance, value[index])]
        return [*value[:index], *kept, *value[index + 1 :]]
    key = chance.choice(list(value))
    rest = {name: item for name, item in value.items() if name != key}
    return rest if chance.random() < 0.2 else {**rest, key: mutated(chance, value[key])}


def read_results(outcome: Any) -> None:
    """Calls all that a result can be asked for."""
    for result in outcome.results if isinstance(outcome, BatchResult) else [outcome]:
        if isinstance(result, PrefabResult):
            for name in dir(result):
                if name.startswith(("get_", "is_")):
                    repr((result, getattr(result, name)()))


ENVELOPE = {
    "status": "SUCCESS",
    "output": {"success": True, "message": "m"},
    "files": {"out": [S3]},
}
RUN = {
    "job_id": "j",
    "results": [{"status": "SUCCESS", "output": ENVELOPE, "error": {"message": "m", "type": "t"}}],
}
ENTRY = {"id": "p", "version": "1.2.0", "name": "P", "tags": ["a"], "functions": [{"name": "f"}],
         "secrets": [{"a": 1}]}
VALID: dict[str, Any] = {
    "run": RUN, "stream": RUN, "batch": RUN, "single request": {"results": RUN["results"] * 2},
    "directory": [ENTRY],
    "newest spec": [ENTRY, {**ENTRY, "version": "1.10.0"}],
    "list files": {"files": [{"key": "k"}], "next_token": "t"},
    "list secrets": {"secrets": [{"prefab_id": "p", "secret_name": "s"}]},
    "clean up": {"deleted_count": 3},
    "list a prefab's secrets": {"secret_names": ["s"]},
    "presigned URL": {"presigned_url": "http://h/"},
}
PROBLEM = {"error_code": "MISSING_SECRET", "message": "m", "details": {
    "prefab_id": "p", "secret_name": "s", "instructions": "i", "limit": 1, "used": 2,
    "quota_type": "q"}}
PROBLEMS = [
    {"detail": PROBLEM},
    PROBLEM,
    {"detail": "text"},
    {"detail": [{"loc": ["body", 0, "x"], "msg": "m"}]},
]


def with_other_bytes(chance: random.Random, text: bytes) -> bytes:
    changed = bytearray(text)
    for _ in range(chance.randrange(1, 5)):
        place = chance.randrange(len(changed))
        other = [
            chance.choice(b'\r\n \0:;0159af-"{}[]\xff\xe4') for _ in range(chance.randrange(3))
        ]
        changed[place : place + chance.randrange(3)] = bytes(other)
    return bytes(changed)


@pytest.mark.parametrize("name", VALID)
def test_random_answers_give_a_result_or_a_gateway_error(name: str) -> None:
    """In turns: another structure, another status with such a body, other bytes anywhere."""
    chance = random.Random(f"{FUZZ_SEED} {name}")
    given: Answer = b""
    act = ENDPOINTS[name].act if name in ENDPOINTS else lambda c: c.get_prefab_spec("p")
    with (
        nothing_left(),
        Routed(lambda request: given) as server,
        client_of(server, max_retries=0) as client,
    ):
        for turn in range(FUZZ_COUNT):
            if turn % 3 == 0:
                given = answer(mutated(chance, VALID[name]))
            elif turn % 3 == 1:
                given = answer(
                    mutated(chance, chance.choice(PROBLEMS)), chance.choice([301, *STATUS_CLASSES])
                )
            else:
                text = json.dumps(VALID[name]).encode()
                right = chance.choice(
                    [answer(body=text), chunked(text), chunked(EVENTS[:50], EVENTS[50:])]
                )
                given = HangUp(with_other_bytes(chance, right))
            try:
                read_results(act(client))
            except GatewayError as error:
                assert TOKEN not in f"{error} {error.details}"
            except BaseException:
                print("the answer was", given)
                raise


LONG = 60_000  # with what stands around it, not more than is read of an error's body


def long_text(piece: str) -> str:
    return piece * (LONG // len(json.dumps(piece)[1:-1]))


def test_no_text_of_a_server_takes_long_to_read(tmp_path: Path) -> None:
    """In one process, which would take minutes if a text were looked through again and again."""
    texts = ["\n ", " \r\n", " ", "\t", "http:", "https://a?", "'", "<", "&amp;", "%41",
             "Secret '' for prefab '"]
    problems = ["a" + long_text(text) + "b" for text in texts]
    problems += [
        long_text("Secret '")[:40_000] + "' for prefab '" * 1400,
        "Secret '" + long_text("' for prefab '"),
    ]
    bodies = ["<Code></Code>", "<Code>", "<Code></Code> <Message>", "<Code>" + long_text("a"), "{",
              '{"a":', '"']
    commands, answers = [], []
    for text in problems:
        commands.append(["list"])
        answers.append(answer({"detail": text}, 400))
    for body in ["<Code></Code>" + long_text(" "), *map(long_text, bodies)]:
        commands.append(["list"])
        answers.append(answer(body=body.encode(), status=400))
    commands.append(["list"])
    answers.append(answer(body=b"http:" * 1_200_000))
    for value in ("1", "1.", "1 ", ".", "Mon, ", "1 Jan ", ":"):
        commands.append(["list"])
        answers.append(answer({"detail": "x"}, 429, Retry_After=value * (60_000 // len(value))))
    versions = ["1" * LONG, long_text("1."), long_text("1a"), long_text("a-"), "v" * LONG,
                long_text(".")]
    commands.append(["spec", "p"])
    answers += [answer([{"id": "p", "version": version} for version in versions]), answer({})]
    download = ["download", S3, str(tmp_path / "f")]
    for location in ("/../", "/a", "%41", "?", "a.", "\xe4"):
        commands.append(download)
        answers += [
            LINK,
            answer(status=302, Location="ftp://h/" + location * (60_000 // len(location))),
        ]
    for content_range in ("1", "bytes ", "-", "/1"):
        commands.append(download)
        value = "bytes 0-" + content_range * (60_000 // len(content_range))
        answers += [LINK, answer({"detail": "x"}, 416, Content_Range=value)]
    for host in ("a.", "a", "\u00e4", "%", "-"):
        commands.append(download)
        answers.append(answer({"presigned_url": f"http://{long_text(host)}/o"}))
    code = """if True:
        import json, sys, gateway_sdk
        gateway_sdk._CONNECT_BACKOFF_BASE_SECONDS = 0.001
        for arguments in json.loads(sys.argv[1]):
            gateway_sdk.main(arguments)
    """
    with Script(*answers) as server:
        done = python(
            code, json.dumps(commands), GATEWAY_BASE_URL=server.url, X_INTERNAL_TOKEN=TOKEN
        )
    assert done.returncode == 0 and len(server.received) == len(answers)


# --- Command line ---------------------------------------------------------------------------------

FAILED_CALL = answer({"results": [{"status": "FAILED", "error": {"message": "out of luck"}}]})

SDK = ROOT / "gateway_sdk.py"
ECHO = ("run", "text-tools", "1.1.0", "echo")
WORDS = ("run", "text-tools", "1.1.0", "words")
SIGN = ("run", "vault", "1.0.0", "sign", "-p", "text=t")
NASTY = "\x1b]0;pwned\x07\x1b[2J\x00\x7f\x9b31m\u202e\u2067gnp"  # what a terminal would obey
WORST_BYTES = 64 * 1024
# Signals and the exit statuses that they lead to.
ENDINGS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
posix = pytest.mark.skipif(os.name != "posix", reason="terminals and signals as POSIX has them")


class Ended(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document that a command which is done has printed."""
        assert (self.status, self.err, self.out.count("\n")) == (0, "", 1)
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.rstrip("\n").split("\n")]

    @property
    def value(self) -> Any:
        """What the function returned, of a `run`."""
        return self.json["output"]["output"]

    def error(self, status: int = 1, out: str = "") -> str:
        """The one line that a command which failed has printed."""
        assert self.status == status
        assert self.out == out
        assert self.err.count("\n") == 1
        assert self.err[:7] == "error: "
        return self.err


def environment_for(server: Any, **more: str) -> dict[str, str]:
    """The environment of an agent's process."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if server is None:
        return {**own, **more}
    url, token = (
        (server.url, TOKEN)
        if isinstance(server, Script)
        else (server.base_url, server.internal_token)
    )
    return {**own, "GATEWAY_BASE_URL": url, "X_INTERNAL_TOKEN": token,
            "PYTHONDONTWRITEBYTECODE": "1", **more}


@contextlib.contextmanager
def started(*arguments: Any, **options: Any) -> Iterator[Any]:
    """A Python process that warns of everything, and is killed if it does not end."""
    command = [sys.executable, "-X", "dev", "-W", "error", *map(str, arguments)]
    options = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        **options,
    }
    with subprocess.Popen(command, **options) as process:
        watchdog = threading.Timer(2 * WAIT_SECONDS, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def ended_python(*arguments: Any, stdin: bytes = b"", **options: Any) -> Ended:
    with started(*arguments, stdin=subprocess.PIPE, **options) as process:
        out, err = process.communicate(stdin)
    assert b"Traceback" not in err, err.decode()
    return Ended(process.returncode, out.decode(), err.decode())


@pytest.fixture
def lone(tmp_path: Path) -> Path:
    """The one file, in a folder with no other but one of calls."""
    (tmp_path / "calls.jsonl").write_text("".join(call_line(value=number) for number in range(9)))
    return Path(shutil.copy(str(SDK), str(tmp_path)))


@pytest.fixture
def cli(
    gateway: LocalGateway, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> Callable[..., Ended]:
    """Runs a command as an agent, in this process and in a folder with two small files.

    Given `replies`, it runs against a `Script` of these.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATEWAY_BASE_URL", gateway.base_url)
    monkeypatch.setenv("X_INTERNAL_TOKEN", gateway.internal_token)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(f"this is\n{name}\n")

    def run(*arguments: Any, stdin: Any = b"", replies: Any = None) -> Ended:
        content = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "latin-1"))
        if replies:
            with Script(*replies) as server:
                return run("--base-url", server.url, *arguments, stdin=stdin)
        try:
            status = gateway_sdk.main(list(arguments))
        except SystemExit as stop:
            status = stop.code
        return Ended(status, *capsys.readouterr())

    return run


@pytest.fixture
def shell(gateway: LocalGateway, tmp_path: Path) -> Callable[..., Ended]:
    """Runs lines of bash, with `python` and `gateway-sdk` being these."""
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    folder = tmp_path / "programs"
    folder.mkdir()
    interpreter = f'"{sys.executable}"'
    # As pip makes it. It need not compile the file, which each start of the file itself does.
    entry = folder / "entry_point.py"
    importing = f"import sys\nsys.path[0] = {str(ROOT)!a}\nfrom gateway_sdk import main\n"
    entry.write_text(importing + "sys.exit(main())\n")
    for name, command in (("python", interpreter), ("python3", interpreter),
                          ("gateway-sdk", f'{interpreter} "{entry}"')):
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)
    environment = environment_for(gateway, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")

    def run(lines: str, cwd: Path = tmp_path) -> Ended:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", lines],
            cwd=str(cwd),
            env=environment,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


class Terminal:
    """A terminal of its own, in which a process can write and read."""

    def __init__(self, columns: int = 80) -> None:
        import fcntl
        import termios

        self._controller, self.end = os.openpty()
        self._shown = b""
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def wait_for(self, shown: bytes) -> None:
        """Waits until this is shown by a process, which alone has the terminal open from now on."""
        os.close(self.end)
        while shown not in self._shown:
            self._shown += os.read(self._controller, 4096)

    def type(self, keys: bytes) -> None:
        os.write(self._controller, keys)

    def rest(self) -> str:
        """All that was shown, once nobody else has the terminal open."""
        with contextlib.suppress(OSError):  # how Linux tells the end
            while chunk := os.read(self._controller, 4096):
                self._shown += chunk
        os.close(self._controller)
        return self._shown.decode()


def on_terminal(act: Callable[[], Any], *streams: str, columns: int = 80) -> tuple[Any, str]:
    """What `act` returns, and what it shows on a terminal with these streams of this process."""
    terminal = Terminal(columns)
    shown: list[str] = []
    reader = threading.Thread(target=lambda: shown.append(terminal.rest()))
    with (
        open(terminal.end, "w", encoding="utf-8") as stream,
        pytest.MonkeyPatch.context() as patched,
    ):
        for name in streams:
            patched.setattr(sys, name, stream)
        reader.start()
        value = act()
    reader.join(WAIT_SECONDS)
    return value, shown[0]


def cells_of(text: str) -> list[str]:
    """The text by cells of a terminal. Behind a character that takes two, the second is empty."""
    cells = []
    for character in text:
        wide = unicodedata.east_asian_width(character) in "WF"
        cells.extend([character, ""] if wide else [character])
    return cells


def screen(shown: str) -> list[str]:
    """The lines that are left on a terminal which knows CR and LF."""
    left = []
    for line in shown.replace("\r\n", "\n").split("\n"):
        cells: list[str] = []
        for written in map(cells_of, line.split("\r")):
            cells[: len(written)] = written
        left.append("".join(cells).rstrip())
    return left


def call_line(
    function: str = "echo", prefab_id: str = "text-tools", version: str = "1.1.0", **parameters: Any
) -> str:
    call = {
        "prefab_id": prefab_id,
        "version": version,
        "function_name": function,
        "parameters": parameters,
    }
    return json.dumps(call, ensure_ascii=False) + "\n"


def signature(key: str) -> str:
    return hmac.new(key.encode(), b"t", hashlib.sha256).hexdigest()


# What is shown, and how


@pytest.mark.parametrize(("line", "reply", "hint"), [
    ("run vault 1.0.0 sign -p text=t", None, "gateway-sdk secret set vault SIGNING_KEY"),
    ("run no-such 1 f", None, "gateway-sdk list"),
    ("run text-tools 1.1.0 no-such", None, "gateway-sdk spec PREFAB"),
    ("ls", answer({"detail": {"error_code": "MISSING_AGENT_CONTEXT"}}, 400),
     "gateway-sdk upload --input"),
    ("download r.txt", None, "s3"),
    ("run a 1 f --timeout 0.05", Pause(), "--timeout"),
    ("list --base-url x", None, "--base-url"),
    ("list --base-url token-of-mine", None, "X_INTERNAL_TOKEN"),
    ("list", answer({"detail": "Not Found"}, 404), "--base-url"),
    ("url r.txt", None, "s3"),
    ("batch -", None, "s3://"),
])
def test_hints_are_commands_and_options(cli: Any, line: str, reply: Any, hint: str) -> None:
    local_file = json.dumps({**json.loads(call_line()), "files": {"a": ["a.txt"]}})
    ended = cli(*line.split(), stdin=local_file, replies=[reply] if reply else ())
    assert hint in ended.err
    assert not re.search(r"client\.|[a-z_]+=|\w\(|base_url", ended.err), ended.err


def test_names_of_files_are_told_as_they_are(cli: Any) -> None:
    ended = cli("upload", "timeout=base_url.txt")
    assert ended.error(1) == "error: No such file or directory: 'timeout=base_url.txt'\n"


@posix
@pytest.mark.parametrize("name",
                         ["a" * 200, "\u6587\u4ef6" * 40, "\u6587" + "a\u6587" * 60, "e\u0301" * 80,
                                  "x\x1b[2J\ny"],
                         ids=["ascii", "wide", "mixed", "combining", "control"])
@pytest.mark.parametrize("columns", [40, 41, 80])
def test_the_bar_takes_one_line_of_the_terminal(cli: Any, name: str, columns: int) -> None:
    Path(name).write_bytes(b"x" * 100_000)
    ended, shown = on_terminal(lambda: cli("upload", "--input", name), "stderr", columns=columns)
    assert ended.json
    assert shown.count("\n") == 1 and shown.endswith("\r\n")
    # More than once where it takes its time.
    drawn = [line for line in re.split("[\r\n]+", shown) if line.strip()]
    for line in drawn:
        assert len(cells_of(line)) < columns
        assert line.isprintable() or "\u0301" in line
    assert "0.1 of 0.1 MiB, 100 %" in drawn[-1]
    # As much as has room.
    assert len(name) < 10 or "\u0301" in name or len(cells_of(drawn[-1])) >= columns - 2


@posix
@pytest.mark.parametrize("line", [
    "upload a.txt", "upload --input a.txt", "upload --temp a.txt", "download {url} copy.txt",
    "batch calls.jsonl",
    "run file-tools 1.0.0 concatenate -f files=a.txt --save saved",
])
def test_progress_is_shown_on_a_terminal_and_nowhere_else_unless_it_is_not_wanted(
        cli: Any, client: GatewayClient, line: str) -> None:
    Path("calls.jsonl").write_text(call_line(value=1))
    arguments = line.format(url=client.upload_file("a.txt")["s3_url"]).split()
    assert cli(*arguments).json  # and nothing on stderr
    ended, shown = on_terminal(lambda: cli(*arguments), "stderr")
    assert ended.json
    unit = "calls" if line.startswith("batch") else "MiB"
    parts = (f"of .* {unit}", "100 ?%", f"[0-9] {unit}/s", "[0-9] s passed", "0 s left", r"\n$")
    assert [part for part in parts if not re.search(part, shown)] == []
    assert on_terminal(lambda: cli("-q", *arguments), "stderr")[1] == ""


@posix
@pytest.mark.parametrize("how", ["ends", "is cut", "is interrupted"])
def test_the_bar_is_gone_before_anything_else_is_shown(lone: Path, how: str) -> None:
    go_on = threading.Event()

    def wait_until_the_bar_is_due(_: Any) -> None:
        threading.Event().wait(0.15)

    piece = chunk(b"x" * 1000)
    end = send(b"0\r\n\r\n") if how == "ends" else lambda sock: sock.shutdown(2)
    body = Steps(
        (
            send(HEAD + piece),
            wait_until_the_bar_is_due,
            send(piece),
            lambda _: go_on.wait(WAIT_SECONDS),
            end,
        )
    )
    terminal = Terminal()
    with Script(link(), body, answer({"detail": "gone"}, 404)) as server, started(
            lone, "download", "s3://b/o.bin", "o.bin", cwd=str(lone.parent),
            env=environment_for(server),
            stdout=terminal.end, stderr=terminal.end) as process:
        terminal.wait_for(b"o.bin")
        if how == "is interrupted":
            process.send_signal(signal.SIGINT)
        else:
            go_on.set()
        shown = terminal.rest()
        status = process.wait(WAIT_SECONDS)
        go_on.set()
    *left, last = screen(shown)
    assert last == ""
    if how == "ends":
        assert (status, json.loads("".join(left))["size"]) == (0, 2000)
    else:
        expected = (1, ["error: "]) if how == "is cut" else (130, ["interru"])
        assert (status, [line[:7] for line in left]) == expected


@posix
@pytest.mark.parametrize(("line", "reply"), [
    ("run a 1 f", answer({"detail": NASTY}, 400)),
    ("run a 1 f", answer(body=NASTY.encode(), status=400)),
    ("run a 1 f --stream", chunked(event("error", {"message": NASTY}))),
    ("run a 1 f --stream", chunked(event("content", f"a\tb\n{NASTY}"), event("done"))),
    ("run a 1 f",
     answer({"results": [{"status": "FAILED", "output": None, "error": {"message": NASTY}}]})),
    ("run a 1 f", ran(NASTY)),
], ids=["message", "text", "event", "content", "result", "document"])
def test_control_characters_of_a_gateway_do_not_reach_the_terminal(
    cli: Any, line: str, reply: bytes
) -> None:
    _, shown = on_terminal(lambda: cli(*line.split(), replies=[reply]), "stdout", "stderr")
    assert "pwned" in shown and "gnp" in shown
    assert {character for character in shown if not character.isprintable()} <= {"\r", "\n", "\t"}
    assert ("a\tb\r\n" in shown) == (b"a\\tb" in reply)


def test_a_pipe_gets_the_contents_of_a_stream_as_they_are(cli: Any) -> None:
    reply = chunked(event("content", f"a\tb\r\n{NASTY}"), event("done"))
    assert cli("run", "a", "1", "f", "--stream", replies=[reply]).out == f"a\tb\r\n{NASTY}\n"


@pytest.mark.parametrize("worst", [
    " " * WORST_BYTES, "\n" * WORST_BYTES, " \n" * (WORST_BYTES // 2),
    "client.set_secret('" * (WORST_BYTES // 19),
    "client.set_secret('" + "a" * WORST_BYTES,
    "client.get_prefab_spec('" + "a'" * (WORST_BYTES // 2),
    "upload_input_file(" * (WORST_BYTES // 18), "upload_input_file(" + "a" * WORST_BYTES,
    "\x1b" * WORST_BYTES,
    "client.set_secret('a', 'b', " + "x" * WORST_BYTES, ":; " * (WORST_BYTES // 3),
], ids=lambda text: repr(text[:24]))
def test_the_worst_message_takes_no_longer_than_it_is_long(cli: Any, worst: str) -> None:
    """Eight times the text would take 64 times as long if the time were quadratic."""
    def seconds(text: str) -> float:
        reply = answer({"results": [{"status": "FAILED", "error": {"message": f"a{text}b"}}]})
        begun = time.process_time()
        assert cli("run", "a", "1", "f", replies=[reply]).status == 1
        return time.process_time() - begun

    long = seconds(worst)
    assert long < 0.05 or min(seconds(worst) for _ in range(3)) < 24 * seconds(
        worst[: len(worst) // 8]
    )


@posix
def test_a_terminal_gets_indented_json_but_lines_stay_lines(cli: Any) -> None:
    _, document = on_terminal(lambda: cli(*ECHO, "-p", "value=1"), "stdout")
    assert "\r\n  " in document and json.loads(document)["output"]["output"] == 1
    _, line = on_terminal(lambda: cli("batch", "-", stdin=call_line(value=1)), "stdout")
    assert line.count("\n") == 1 and json.loads(line)["index"] == 0
    _, events = on_terminal(lambda: cli(*ECHO, "-p", "value=1", "--stream", "--json"), "stdout")
    assert [json.loads(event)["type"] for event in events.splitlines()] == ["content", "done"]


def test_a_locale_without_unicode_reads_utf_8_and_shows_escapes(
    gateway: LocalGateway, lone: Path
) -> None:
    def end(*arguments: str, stdin: bytes = b"") -> Ended:
        plain = environment_for(gateway, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        ended = ended_python(lone, *arguments, stdin=stdin, env=plain, cwd=str(lone.parent))
        c_is_utf_8 = not sys.platform.startswith("linux") or sys.implementation.name == "pypy"
        assert c_is_utf_8 or (ended.out + ended.err).isascii()
        return ended

    (lone.parent / "data.json").write_bytes('{"message": "中"}'.encode())
    assert end(*ECHO, "-d", "-", stdin='{"value": "中😀"}'.encode()).value == "中😀"
    words = end(*WORDS, "-d", '{"text": "\\u4e2d"}', "--stream")
    assert (words.status, words.out in ("\\u4e2d\n", "中\n"), words.err) == (0, True, "")
    failed = end("run", "faulty", "1.0.0", "refuse", "-d", "@data.json")
    assert failed.lines[0]["error"]["message"] == "中"
    assert "\\u4e2d" in failed.err or "中" in failed.err


@posix
def test_a_terminal_gets_a_line_for_each_prefab_and_anything_else_json(
    cli: Any, gateway: LocalGateway
) -> None:
    entries = [
        {"id": "long-name", "version": "1.0.0", "description": f"one\ntwo {NASTY} " + "x" * 70_000},
        {
            "id": "b",
            "version": "10.2.3",
            "deployment_status": "failed",
            "description": "\u6587" * 60,
        },
    ]
    _, shown = on_terminal(lambda: cli("list", replies=[answer(entries)]), "stdout", columns=60)
    first, second, end = screen(shown)
    assert first.startswith("long-name 1.0.0  one two")
    assert second.startswith("b 10.2.3         (failed) \u6587")
    assert (end, max(len(cells_of(line)) for line in (first, second)) <= 60) == ("", True)
    assert first.isprintable()
    assert on_terminal(lambda: cli("list", replies=[answer([])]), "stdout")[1] == ""
    assert cli("list", replies=[answer(entries)]).json == entries


@pytest.mark.parametrize(
    "line", ["run a 1 f", "run a 1 f --stream --json", "run a 1 f --stream", "spec a 1", "list"]
)
def test_what_json_does_not_have_is_null(cli: Any, line: str) -> None:
    numbers = [float("nan"), float("inf"), {"a": -float("inf")}]
    reply = {"run": ran(numbers), "spec": answer({"id": numbers}),
             "list": answer([{"id": "a", "version": "1", "n": numbers}])}[line.split(maxsplit=1)[0]]
    if "--stream" in line:
        reply = chunked(event("content", numbers), event("done"))
    printed = cli(*line.split(), replies=[reply]).out
    assert "[null, null, {" in printed
    for document in filter(None, printed.split("\n")):
        json.loads(document, parse_constant=pytest.fail)


def test_an_integer_of_any_length_is_printed_whole() -> None:
    code = """import gateway_sdk
gateway_sdk._Terminal().print_json({"long": 10**5000})"""
    assert ended_python("-c", code, cwd=str(ROOT)) == (0, '{"long": 1' + "0" * 5000 + "}\n", "")


# What is read


@pytest.mark.parametrize(("text", "value"), [
    ("3", 3), ("-1.5", -1.5), ("true", True), ("null", None), ("[1, 2]", [1, 2]),
    ('{"a": {}}', {"a": {}}),
    ("text", "text"), ('"3"', "3"), ("", ""), ("a=b", "a=b"), ("two words", "two words"),
    ("中文", "中文"),
    ("1.2.3", "1.2.3"), ("{not json", "{not json"), ("NaN", "NaN"), ("-Infinity", "-Infinity"),
    ("[NaN]", "[NaN]"),
])
def test_a_parameter_is_json_if_it_can_be_else_text(cli: Any, text: str, value: Any) -> None:
    assert cli(*ECHO, "-p", f"value={text}").value == value


@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("data", ['{"value": "中"}', "@data.json", "-"],
                         ids=["text", "file", "stdin"])
def test_all_parameters_come_from_a_text_a_file_or_stdin_and_single_ones_win(
    cli: Any, data: str, bom: str
) -> None:
    given = f'{bom}{{"value": "中"}}'
    Path("data.json").write_text(given, encoding="utf-8")
    for more, value in (((), "中"), (("-p", "value=2"), 2), (("-p", "value=二"), "二")):
        assert cli(*ECHO, "-d", data, *more, stdin=given).value == value
        assert cli(*ECHO, *more, "-d", data, stdin=given).value == value


def test_a_parameter_is_the_text_of_a_file_or_a_text_in_any_case(cli: Any) -> None:
    text = ' {"a": 1}\r\n\u4e2d\n'
    Path("@f").write_bytes(text.encode())
    assert cli(*ECHO, "-p", "value=@@f").value == text
    assert cli(*ECHO, "-p", "value=@-", stdin=text).value == text
    for given in ("3", "null", '"3"', "@f", "a=b", ""):
        assert cli(*ECHO, "-P", f"value={given}").value == given
    Path("@f").write_text('{"value": 1}')
    assert cli(*ECHO, "-d", "@@f").value == 1  # and not the file f
    assert "'f'" in cli(*ECHO, "-d", "@f").error(1)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_file_or_stdin_in_another_encoding_is_read_by_its_byte_order_mark(
    cli: Any, encoding: str
) -> None:
    def encoded(text: str) -> bytes:
        return ("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding)

    Path("data.json").write_bytes(encoded('{"value": "\u4e2d"}'))  # as `>` of PowerShell writes
    assert cli(*ECHO, "-d", "@data.json").value == "\u4e2d"
    assert cli(*ECHO, "-d", "-", stdin=Path("data.json").read_bytes()).value == "\u4e2d"
    assert cli(*ECHO, "-p", "value=@data.json").value == '{"value": "\u4e2d"}'
    assert cli("batch", "-", stdin=encoded(call_line(value="\u4e2d"))).value == "\u4e2d"
    assert cli("secret", "set", "vault", "SIGNING_KEY", stdin=encoded("priv\u00e4\r\n")).status == 0
    assert cli(*SIGN).value["signature"] == signature("priv\u00e4")
    assert cli("secret", "delete", "vault", "SIGNING_KEY").status == 0


@pytest.mark.parametrize(("line", "told"), [
    *((line, "error: ") for line in (
        "", "no-such-command", "run", "spec ..", "batch", "batch - --workers x", "upload",
        "upload .", "upload a.txt --temp --ttl 0", "upload a.txt --input --temp",
        "upload a.txt --session s", "upload a.txt --ttl 5", "download",
        "download https://example.com/f", "url report.pdf", "cleanup", "secret", "secret show",
        "secret set vault NAME value", "list --timeout 0", "list --timeout soon",
        "list --base-url ftp://x", "list --token t", "list --api-key k", "list --jwt-token j",
        "list --internal-token i", "spec \udcff", "ls --temp --session \udcff",
        "cleanup \udcff", "run a 1 f -p value=\udcff", "secret set vault \udcff",
        "run a 1 f --stream --save x", "run a 1 f --stream --result", "run a 1 f -p =3",
        "run a 1 f -P text", "url s3://b/o --expires 0", "url s3://b/o --expires 1.5",
        "list --timeout nan", "list --timeout inf", "list --retries x", "list --retries=-1",
        "upload a.txt --content-type text/plain",
        "upload a.txt --temp --content-type text/plain", "upload a.txt --input --ttl 5",
    )),
    ("run a 1 f -d @latin-1.json", "latin-1.json is not UTF-8. Save it as UTF-8"),
    ("run a 1 f -p x=@latin-1.json", "latin-1.json is not UTF-8. Save it as UTF-8"),
    ("batch latin-1.json", "latin-1.json is not UTF-8. Save it as UTF-8"),
    ("run a 1", "FUNCTION (usage: gateway-sdk run PREFAB VERSION FUNCTION"),
    ("run a", "VERSION, FUNCTION (usage: gateway-sdk run PREFAB VERSION FUNCTION"),
    ("spec", "PREFAB (usage: gateway-sdk spec PREFAB [VERSION]"),
    ("secret delete vault", "NAME (usage: gateway-sdk secret delete PREFAB NAME"),
    ("batch - --workers 0",
     "--workers: a whole number from 1 on is needed, not '0' (usage: gateway-sdk batch FILE"),
    ("run a 1 f -f x=a.txt -p novalue", "-p/--parameter: NAME=... is needed, not 'novalue'"),
    ("run a 1 f -f x=a.txt -f novalue", "-f/--file: NAME=... is needed, not 'novalue'"),
    ("secret set vault", "NAME (usage: gateway-sdk secret set PREFAB NAME"),
    ("run a 1 f -d [1]", "-d must be a JSON object"),
    ("run a 1 f -d 1", "-d must be a JSON object"),
    *((f"run a 1 f -d {data}", "-d is not JSON")
      for data in ("{broken", '{"value":NaN}', '{"value":[-Infinity]}', '{"value":1e999}',
                   "[" * 100_000)),
], ids=lambda text: text[:40])
def test_wrong_usage_is_told_and_nothing_is_sent(
    cli: Any, gateway: LocalGateway, line: str, told: str
) -> None:
    Path("latin-1.json").write_bytes(b'{"value": "\xe4"}')
    gateway.requests.clear()
    assert told in cli(*line.split(), stdin=call_line(value=1)).error(2)
    assert not gateway.requests


@pytest.mark.parametrize(
    "content", [b"\xe4", "k".encode("utf-16-le"), "k".encode("utf-16-be"), b"\xff\xfek"],
    ids=["latin-1", "UTF-16 without a mark", "big-endian", "half a character"],
)
@pytest.mark.parametrize(
    "line", ["secret set v K", "run a 1 f -d -", "run a 1 f -p x=@-", "batch -"]
)
def test_stdin_that_is_not_utf_8_is_wrong_usage(
    cli: Any, gateway: LocalGateway, line: str, content: bytes
) -> None:
    gateway.requests.clear()
    assert "stdin is not UTF-8. Save it as UTF-8" in cli(*line.split(), stdin=content).error(2)
    assert not gateway.requests


def test_a_missing_input_is_noticed_before_any_other_is_uploaded(
    cli: Any, gateway: LocalGateway
) -> None:
    gateway.requests.clear()
    assert "no.txt" in cli("run", "a", "1", "f", "-f", "x=a.txt", "-f", "x=no.txt").error(1)
    Path("folder").mkdir()
    assert "folder" in cli("run", "a", "1", "f", "-f", "x=a.txt", "-f", "y=folder").error(1)
    assert not gateway.requests


# run


def test_a_call_prints_its_result_as_one_document(cli: Any) -> None:
    ended = cli(*ECHO, "-p", "value=中")
    assert {"status", "output", "error", "job_id"} == set(ended.json)
    assert (ended.json["status"], ended.value) == ("SUCCESS", "中")
    assert "中" in ended.out


def test_a_local_file_is_uploaded_as_an_input_before_the_call(
    cli: Any, gateway: LocalGateway
) -> None:
    url = cli("upload", "--input", "a.txt").json["s3_url"]
    gateway.requests.clear()
    ended = cli(
        "run", "file-tools", "1.0.0", "line_count", "-f", "files=a.txt", "-f", f"files={url}"
    )
    assert ended.value["lines"] == 4
    first, second, third = [(request.method, request.path) for request in gateway.requests]
    assert first == ("POST", "/internal/files/generate_upload_url")
    assert (second[0], third) == ("PUT", ("POST", "/v1/internal/run"))


def test_output_files_are_saved_by_name_and_numbered_and_cost_no_result(
    cli: Any, gateway: LocalGateway
) -> None:
    def make(outputs: Path) -> None:
        for folder, name in (("a", "3-same.txt"), ("b", "same.txt"), ("c", "same.txt")):
            (outputs / folder).mkdir(exist_ok=True)
            (outputs / folder / name).write_text(folder)

    gateway.add_prefab("twins", "1.0.0", {"make": make})
    result = cli("run", "twins", "1.0.0", "make", "--save", "new/folder").json
    saved = {path.name: path.read_text() for path in Path("new/folder").iterdir()}
    assert sorted(saved.values()) == ["a", "b", "c"]
    assert {"same.txt", "3-same.txt"} < set(saved)
    assert sorted(map(Path, result["saved"])) == sorted(Path("new/folder").iterdir())
    value = cli("run", "twins", "1.0.0", "make", "--save", "new/folder", "--result")
    assert (value.status, value.out) == (0, "{}\n")
    assert value.err.count("saved: ") == 3
    assert str(Path("new", "folder", "3-same.txt")) not in value.err
    after = {path.name: path.read_text() for path in Path("new/folder").iterdir()}
    assert after.items() > saved.items()
    Path("new/folder/same.txt").unlink()
    Path("new/folder/same.txt").symlink_to("nowhere")  # which is a name in use, too
    output = {"status": "SUCCESS", "output": 1, "files": {"a": [S3, S3]}}
    result = answer({"results": [{"status": "SUCCESS", "output": output}]})
    replies = [result, link(), answer(body=b"saved"), answer({"detail": "gone"}, 404)]
    failed = cli("run", "a", "1", "f", "--save", "some", replies=replies)
    assert "gone" in failed.error(out=failed.out)
    assert [Path(path).read_bytes() for path in failed.lines[0]["saved"]] == [b"saved"]
    # Nothing is left of the other one.
    assert [path.name for path in Path("some").iterdir()] == ["r.txt"]


def test_the_value_of_a_function_is_printed_alone(cli: Any) -> None:
    line = ("run", "a", "1", "f", "--result")
    for value, printed in (
        ("a\tb", "a\tb\n"),
        ("a\r\n\n", "a\r\n\n"),
        ("", "\n"),
        ({"a": None}, '{"a": null}\n'),
        (3, "3\n"),
        (None, "{}\n"),
    ):
        assert cli(*line, replies=[ran(value)]) == (0, printed, "")
    assert "out of luck" in cli(*line, replies=[FAILED_CALL]).error(1)
    partial = chunked(event("content", "so far"), event("error", "out of luck"))
    assert "out of luck" in cli(*line, replies=[partial]).error(1, out="so far\n")


@pytest.mark.parametrize(
    "more", [[], ["--result"], ["--stream"], ["--stream", "--json"]], ids=" ".join
)
def test_a_functions_own_failure_fails_the_command_if_that_is_wanted(
    cli: Any, more: list[str]
) -> None:
    def end(value: Any, *options: str) -> Ended:
        reply = chunked(event("done", value)) if "--stream" in more else ran(value)
        return cli("run", "a", "1", "f", *more, *options, replies=[reply])

    assert end({"success": False, "error": "no luck"}).status == 0
    for value, reason in (
        ({"success": False, "error": "no luck", "message": "m"}, "no luck"),
        ({"success": False, "message": "m"}, "m"),
        ({"success": False}, "no reason"),
    ):
        failed = end(value, "--fail")
        told = failed.error(out=failed.out)
        assert told == f'error: The function reports "success": false: {reason}\n'
        assert '"success": false' in failed.out
    for value in ({"success": True}, {}, {"success": None}, "text", [], {"success": 0}):
        assert end(value, "--fail").status == 0


def test_a_stream_prints_its_contents_or_whole_events_as_json_lines(cli: Any) -> None:
    assert cli(*WORDS, "-p", "text=one 二 three", "--stream") == (0, "one 二 three\n", "")
    events = cli(*WORDS, "-p", "text=one 二 three", "--stream", "--json")
    contents = [event["data"] for event in events.lines if event["type"] == "content"]
    assert events.status == 0
    assert contents == ["one ", "二 ", "three"]
    assert events.lines[-1]["type"] == "done"
    assert events.err == ""
    # Does not stream.
    assert cli(*ECHO, "-p", "value=1", "--stream", "--json").lines[-1]["type"] == "done"
    reply = chunked(event("content", {"a": None}, step=1), event("done"))
    assert cli("run", "a", "1", "f", "--stream", replies=[reply]).out == '{"a": null}\n\n'
    assert cli("run", "a", "1", "f", "--stream", "--json", replies=[reply]).lines[0]["step"] == 1


@pytest.mark.parametrize(("events", "printed", "told"), [
    ([event("progress", 1), event("done", {"a": 1}),
      event("done", {"b": 2, "job_id": "j", "files": {"x": [S3]}})],
     '{"a": 1, "b": 2}\n', f"file: {S3}\n"),
    ([event("done", "text")], "text\n", ""),
    ([event("content", "text"), event("done", {"a": 1, "files": {"x": [S3]}})],
     "text\n", f"file: {S3}\n"),
    ([event("ping"), event("done", {"a": 1})], '{"a": 1}\n', ""),
    ([event("content"), event("done")], "null\n\n", ""),
    ([event("content", "a"), event("content", "b")], "ab\n", ""),
    ([event("start"), event("done")], "", ""),
], ids=["two done events", "text", "contents and files", "heartbeat", "null", "no end", "nothing"])
def test_a_stream_whose_result_is_in_its_end_prints_that(
    cli: Any, events: Any, printed: str, told: str
) -> None:
    assert cli("run", "a", "1", "f", "--stream", replies=[chunked(*events)]) == (0, printed, told)


@posix
@pytest.mark.parametrize(
    "end", [chunk(event("error", "out of luck")) + b"0\r\n\r\n", b"", chunk(b"data: {")],
    ids=["error", "cut", "cut within an event"],
)
def test_a_line_of_contents_ends_before_an_error_is_told(cli: Any, end: bytes) -> None:
    reply = HangUp(chunked(event("content", "so far"), end=False) + end)
    _, shown = on_terminal(
        lambda: cli("run", "a", "1", "f", "--stream", replies=[reply]), "stdout", "stderr"
    )
    first, second, last = screen(shown)
    assert (first, second[:7], last) == ("so far", "error: ", "")


@pytest.mark.parametrize("more", [[], ["--stream"]], ids=["result", "stream"])
def test_the_only_content_of_a_stream_may_report_a_failure(cli: Any, more: list[str]) -> None:
    reply = chunked(event("content", {"success": False, "error": "too dark"}), event("done"))
    ended = cli("run", "a", "1", "f", "--fail", *more, replies=[reply])
    assert "too dark" in ended.error(1, out=ended.out)


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["contents", "events"])
def test_an_error_event_fails_the_command_after_its_output(cli: Any, more: list[str]) -> None:
    ended = cli("run", "faulty", "1.0.0", "stumble", "-p", "text=as far", "--stream", *more)
    assert "far" in ended.out
    assert "stumbled" in ended.error(out=ended.out)
    assert not more or ended.lines[-1]["type"] == "error"


def test_a_failed_call_fails_the_command_but_a_functions_own_failure_does_not(
    cli: Any, monkeypatch: Any
) -> None:
    refused = cli("run", "faulty", "1.0.0", "refuse", "-p", "message=not today")
    assert [result["status"] for result in refused.lines] == ["FAILED"]
    assert refused.error(out=refused.out) == "error: FAILED: not today\n"
    odd = cli(
        "run",
        "a",
        "1",
        "f",
        replies=[answer({"results": [{"status": "FAILED", "error": {"code": 7}}]})],
    )
    assert "7" in odd.error(out=odd.out)
    assert cli("run", "faulty", "1.0.0", "fail").value["success"] is False  # it ran
    monkeypatch.setenv("COLUMNS", "200")
    assert '"success": false' in cli("run", "--help").out  # and how to have it fail


@pytest.mark.parametrize("url", ["https://a/b", "s3://", "file.txt", "s3://b/\ud800", ""])
def test_an_odd_url_of_the_gateway_is_its_fault_and_costs_no_result(cli: Any, url: str) -> None:
    entry = {
        "status": "SUCCESS",
        "output": {"status": "SUCCESS", "output": None, "files": {"a": [url]}},
    }
    ended = cli("run", "a", "1", "f", "--save", "x", replies=[answer({"results": [entry]})])
    assert ended.lines[0]["status"] == "SUCCESS"
    ended.error(1, out=ended.out)


def test_an_odd_url_of_an_uploaded_input_is_the_gateways_fault(cli: Any) -> None:
    def give(sock: Any) -> None:
        url = "http://{}:{}/o?X=1".format(*sock.getsockname())
        sock.sendall(answer({"upload_url": url, "s3_url": "https://a/b"}))

    ended = cli("run", "a", "1", "f", "-f", "x=a.txt", replies=[Steps((give,)), NO_BODY])
    assert "'https://a/b', and not an s3:// URL" in ended.error()


@pytest.mark.parametrize(("options", "is_told"), [
    ("-p text=1", True), ("-p text=true --stream", True), ("-p a=null", True),
    ("-p text=1 -P text=1", False), ("-P text=1", False), ("-p text=x", False),
    ("-d {}", False),
])
def test_a_refused_call_tells_how_a_number_is_passed_as_text(
    cli: Any, options: str, is_told: bool
) -> None:
    refused = answer({"detail": "text must be a string"}, 422)
    told = cli("run", "a", "1", "f", *options.split(), replies=[refused]).error()
    assert "text must be a string" in told
    assert ("-P NAME=TEXT passes it as text" in told) == is_told


@pytest.mark.parametrize("reply", [answer({"detail": "no"}, 404), FAILED_CALL])
def test_what_is_no_refusal_of_a_parameter_has_no_hint_to_text(cli: Any, reply: bytes) -> None:
    ended = cli("run", "a", "1", "f", "-p", "text=1", replies=[reply])
    assert ended.status == 1 and "-P" not in ended.err


# batch


@pytest.mark.parametrize("form", ["lines", "array", "indented"])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n "],
                         ids=["plain", "byte order mark", "blank line"])
def test_a_batch_prints_a_line_per_call(cli: Any, form: str, before: str) -> None:
    # All of which JSON allows within a line.
    texts = ["[0]", *map(str, range(1, 9)), "a\u2028b\u2029c\x85d 中文"]
    lines = [call_line(value=text) for text in texts]
    given = before + "\n".join([*lines, "\n"])
    if form != "lines":
        given = before + json.dumps(
            [*map(json.loads, lines)], indent=2 if form == "indented" else None
        )
    Path("calls.jsonl").write_text(given, encoding="utf-8")
    for source in ("calls.jsonl", "-"):
        ended = cli("batch", source, "--workers", "4", stdin=given)
        assert (ended.status, ended.err) == (0, "")
        printed = sorted((line["index"], line["output"]["output"]) for line in ended.lines)
        assert printed == [*enumerate(texts)]


@posix
def test_a_batch_prints_each_result_as_soon_as_it_comes(lone: Path, gateway: LocalGateway) -> None:
    second_is_printed = threading.Event()

    def wait_if_first(number: int) -> int:
        assert number or second_is_printed.wait(WAIT_SECONDS)
        return number

    gateway.add_prefab("late", "1.0.0", {"f": wait_if_first})
    calls = "".join(call_line("f", "late", "1.0.0", number=number) for number in range(2))
    (lone.parent / "calls").write_text(calls)
    with started(lone, "batch", "calls", env=environment_for(gateway),
                 cwd=str(lone.parent)) as process:
        first_line = json.loads(process.stdout.readline())
        second_is_printed.set()
        (line,) = map(json.loads, process.stdout)
        assert ([first_line["index"], line["index"]], process.wait()) == ([1, 0], 0)


def test_a_failed_call_of_a_batch_fails_the_command_and_costs_no_other_result(cli: Any) -> None:
    crash = call_line("crash", "faulty", "1.0.0")
    ended = cli("batch", "-", stdin=f"{call_line(value=1)}{crash}\n{crash}{call_line(value=3)}")
    lines = sorted(ended.lines, key=lambda line: line["index"])
    assert [(line["index"], line["status"]) for line in lines] == [
        (0, "SUCCESS"), (1, "FAILED"), (2, "FAILED"), (3, "SUCCESS")]
    assert lines[1]["error"]["type"] == "ServiceUnavailableError"
    unknown = cli("batch", "-", stdin=call_line(prefab_id="no-such"))
    assert all("gateway-sdk list" in text and "client." not in text for text in unknown[1:])
    told = ended.error(out=ended.out)
    assert told.startswith("error: 2 of 4 calls failed, the first with index 1: FAILED: ")
    assert told.count("out of order") == 1
    refused = cli("batch", "-", "--workers", "1", stdin=call_line() * 3, replies=[REFUSED])
    assert ([line["index"] for line in refused.lines], refused.status) == ([0, 1, 2], 1)


@pytest.mark.parametrize(("reply", "may_have_run"), [
    (FAILED_CALL, True), (answer({"results": [{"status": "TIMED_OUT", "error": None}]}), True),
    (UNAVAILABLE, True), (HangUp(), True),
    (answer({"detail": "no"}, 404), False), (answer({"detail": "no"}, 422), False),
], ids=["failed", "odd status", "503", "cut", "404", "422"])
def test_a_failed_line_of_a_batch_says_whether_the_call_may_have_run(
        cli: Any, reply: Any, may_have_run: bool) -> None:
    with Script(reply) as server:
        ended = cli("batch", "-", "--base-url", server.url, stdin=call_line())
    assert (ended.status, ended.lines[0]["error"]["may_have_run"]) == (1, may_have_run)


@pytest.mark.parametrize("text", ["", "\n", "[]"])
def test_an_empty_batch_is_done(cli: Any, text: str) -> None:
    assert cli("batch", "-", stdin=text) == (0, "", "")


@pytest.mark.parametrize(("text", "told"), [
    *((call_line() + line, "with index 1")
      for line in ("[1]", '"text"', '{"prefab_id": "a"}', '\n{"unknown": 1}')),
    (call_line() + "not json", "Line 2"), (call_line() + "\n{", "Line 3"),
    (call_line(value=float("nan")), "Line 1"),
    (call_line() + '{"prefab_id": 1, "version": "1", "function_name": "f"}', "prefab_id"),
    ("[1]", "index 0"), ('[{"unknown": 1}]', "'unknown', which is no field"), ("[", "not JSON"),
    ('[{"prefab_id": "a", "version": "1"}]', "index 0 lacks 'function_name'"),
    ('[{"a": NaN}]', "not JSON"),
    ("[" * 100_000, "not JSON"),
], ids=lambda text: text[-30:])
def test_a_bad_call_of_a_batch_is_named_and_nothing_is_sent(
    cli: Any, gateway: Any, text: str, told: str
) -> None:
    gateway.requests.clear()
    assert told in cli("batch", "-", stdin=text).error(2)
    assert not gateway.requests


# The other commands


def test_files_go_up_are_listed_and_come_down_again(cli: Any) -> None:
    kept = cli("upload", "a.txt").json
    assert kept["filename"] == "a.txt"
    assert kept["size"] == 14
    assert "/agent-outputs/" in kept["s3_url"]
    assert [made["filename"] for made in cli("upload", "a.txt", "b.txt").json] == ["a.txt", "b.txt"]
    broken_off = cli("upload", "a.txt", "no.txt")
    assert [made["filename"] for made in broken_off.lines[0]] == ["a.txt"]
    assert "no.txt" in broken_off.error(out=broken_off.out)
    assert kept["s3_url"] in [file["s3_url"] for file in cli("ls").json]
    assert cli("url", kept["s3_url"]).json["presigned_url"].startswith("http://127.0.0.1")
    Path("a.txt").unlink()
    Path("folder").mkdir()
    targets = {
        "as.txt": "as.txt",
        "folder": "folder/a.txt",
        "new/": "new/a.txt",
        "deep/er": "deep/er",
        "": "a.txt",
    }
    Path("as.txt").write_text("old")  # this name is the user's, so it is replaced
    for target, made in targets.items():
        got = cli("download", kept["s3_url"], *[target] * bool(target)).json
        assert (Path(got["path"]), got["size"]) == (Path(made), 14)
        assert Path(made).read_text() == "this is\na.txt\n"
    Path("a.txt").write_text("mine")
    for made in ("2-a.txt", "3-a.txt"):  # a name that the gateway chose replaces nothing
        assert Path(cli("download", kept["s3_url"]).json["path"]) == Path(made)
    assert (Path("a.txt").read_text(), Path("3-a.txt").read_text()) == ("mine", "this is\na.txt\n")


@pytest.mark.parametrize(("url", "name"), [
    ("s3://b/..", "_"), ("s3://b/a\\b:c\x1b", "a_b_c_"), ("s3://b/", "_"),
    ("s3://b/.bashrc", ".bashrc"), ('s3://b/<a>"b|c?d*e', "_a__b_c_d_e"), ("s3://b/a. .", "a_"),
    ("s3://b/CON", "_CON"), ("s3://b/nul.txt", "_nul.txt"), ("s3://b/Com\xb2 .x", "_Com\xb2 .x"),
    ("s3://b/console.txt", "console.txt"), ("s3://b/com10", "com10"),
    ("s3://b/a\u202egnp.exe", "a_gnp.exe"),
    ("s3://b/" + "\u6587" * 300 + ".pdf", "\u6587" * 78 + ".pdf"),
], ids=lambda text: ascii(text)[:30])
def test_a_name_that_some_system_refuses_is_changed(cli: Any, url: str, name: str) -> None:
    ended = cli("download", url, "made/", replies=[link(), answer(body=b"x")])
    assert Path(ended.json["path"]) == Path("made", name)


def test_the_options_of_urls_and_uploads_reach_the_gateway(cli: Any, gateway: LocalGateway) -> None:
    kept = cli("upload", "a.txt").json["s3_url"]
    gateway.requests.clear()
    assert cli("url", kept, "--expires", "77").status == 0
    assert "expires_in=77" in gateway.requests[-1].path
    uploaded = cli("upload", "--input", "a.txt", "--content-type", "video/mp4")
    assert uploaded.json["s3_url"].startswith("s3://")
    # That of the PUT, in whose signature it is.
    assert gateway.requests[-1].headers["content-type"] == "video/mp4"


def test_temporary_files_are_a_sessions_and_go_with_it(cli: Any, gateway: LocalGateway) -> None:
    made = cli("upload", "--temp", "--ttl", "60", "--session", "one", "a.txt").json["s3_url"]
    other = cli("upload", "--temp", "a.txt").json["s3_url"]
    listed = {line: {file["s3_url"] for file in cli(*line.split()).json}
              for line in ("ls", "ls --temp", "ls --session one", "ls --temp --session one")}
    assert listed["ls --session one"] == listed["ls --temp --session one"] == {made}
    assert {made, other} <= listed["ls --temp"]
    assert made not in listed["ls"]
    assert cli("cleanup", "one").json == {"deleted_count": 1}
    assert cli("ls", "--temp", "--session", "one").json == []


def test_a_secret_is_read_from_stdin_and_never_printed(cli: Any) -> None:
    for given, secret in (
        ("\ufeff very\r\nprivaté \r\n", " very\r\nprivaté "),
        ("private\n\n", "private\n"),
        ("private", "private"),
    ):  # the mark and one line's end are not the secret's
        assert "priva" not in str(cli("secret", "set", "vault", "SIGNING_KEY", stdin=given).json)
        assert cli(*SIGN).value["signature"] == signature(secret)
    entry = {"prefab_id": "vault", "secret_name": "SIGNING_KEY"}
    assert [cli("secret", "list", *more).json for more in ([], ["vault"], ["other"])] == [
        [entry],
        [entry],
        [],
    ]
    assert cli("secret", "delete", "vault", "SIGNING_KEY").status == 0
    assert cli("secret", "list").json == []
    assert "SIGNING_KEY" in cli(*SIGN).error()
    for nothing in ("", "\n", "\r\n", "\ufeff"):
        ended = cli("secret", "set", "vault", "SIGNING_KEY", stdin=nothing)
        assert "The secret is empty" in ended.error(2)


@posix
@pytest.mark.parametrize("typed", ["by hand\n", "\x04"], ids=["a line", "end of file"])
def test_a_secret_is_asked_for_without_an_echo(
        client: GatewayClient, gateway: LocalGateway, lone: Path, typed: str) -> None:
    terminal = Terminal()
    with started(lone, "secret", "set", "vault", "SIGNING_KEY", env=environment_for(gateway),
                 stdin=terminal.end,
                 stderr=terminal.end, start_new_session=True) as process:
        gateway.requests.clear()
        terminal.wait_for(b"SIGNING_KEY")
        terminal.type(typed.encode())
        out, status = process.stdout.read().decode(), process.wait()
    shown = terminal.rest()
    assert "hand" not in shown + out
    assert "Traceback" not in shown
    if typed == "\x04":
        assert (status, out, list(gateway.requests)) == (2, "", [])
        assert screen(shown)[-2].startswith("error: The secret is empty")  # on a line of its own
    else:
        assert (status, json.loads(out)["secret_name"]) == (0, "SIGNING_KEY")
        signed = client.run("vault", "1.0.0", "sign", {"text": "t"}).get_function_result()
        assert signed["signature"] == signature("by hand")
        client.delete_secret("vault", "SIGNING_KEY")


def test_the_directory_and_a_specification_are_printed(cli: Any, gateway: LocalGateway) -> None:
    assert cli("list").json == cli("list", "--status", "deployed").json == gateway.prefabs()
    assert cli("spec", "text-tools").json["version"] == "1.1.0"
    assert cli("spec", "text-tools", "1.0.0").json["version"] == "1.0.0"


def test_a_status_that_no_prefab_has_is_told(cli: Any) -> None:
    told = "no prefab has the status 'deploid'\n"
    assert cli("list", "--status", "deploid") == (0, "[]\n", told)
    assert cli("list", replies=[answer([])]) == (0, "[]\n", "")


# Options, environment, exit status


@pytest.mark.parametrize(
    "command",
    ["run", "list", "spec", "batch", "upload", "download", "ls", "cleanup", "url", "secret"])
def test_every_command_has_help_with_an_example_that_works(
        cli: Any, client: GatewayClient, monkeypatch: Any, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    overview, shown = cli("--help"), cli(command, "--help")
    assert (overview.status, overview.err, shown.status, shown.err) == (0, "", 0, "")
    assert re.search(rf"^ +{command}\b", overview.out, re.M)
    (example,) = re.findall(rf"^example: gateway-sdk ({command} .+)$", shown.out, re.M)
    Path("report.txt").write_text("a file\n")
    Path("calls.jsonl").write_text(call_line(value=1))
    example = re.sub(r"s3://\S+", client.upload_file("a.txt")["s3_url"], example)
    assert cli(*shlex.split(example)).json is not None


@pytest.mark.parametrize(("command", "arguments"), [
    ("run", "PREFAB VERSION FUNCTION"), ("batch", "FILE"), ("spec", "PREFAB [VERSION]"),
    ("upload", "PATH..."), ("download", "S3_URL [TARGET]"), ("url", "S3_URL"),
    ("cleanup", "SESSION"), ("secret set", "PREFAB NAME"),
    ("secret list", "[PREFAB]"), ("secret delete", "PREFAB NAME"),
])
def test_every_argument_stands_in_the_usage_and_has_a_text(
        cli: Any, monkeypatch: Any, command: str, arguments: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    usage, *others = cli(*command.split(), "--help").out.splitlines()
    assert usage == f"usage: gateway-sdk {command} {arguments} [options]"
    described = others[others.index("positional arguments:") + 1:]
    described = described[: described.index("")]
    assert [line.split()[0] for line in described] == re.findall(r"\w+", arguments)
    assert all(len(line.split()) > 1 for line in described)


def test_the_help_of_batch_has_the_fields_of_a_call_and_a_line_that_works(cli: Any) -> None:
    shown = cli("batch", "--help").out
    assert all(field.name in shown for field in dataclasses.fields(PrefabCall))
    (line,) = re.findall("^{.*}$", shown, re.M)
    assert cli("batch", "-", stdin=line).json["index"] == 0


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after the command"])
def test_global_options_are_taken(cli: Any, before: bool) -> None:
    with Script(answer([]), Pause(), UNAVAILABLE, UNAVAILABLE, answer([])) as server:
        given, short = ("--base-url", server.url), ("--base-url", server.url, "--timeout", "0.05")
        assert (cli(*given, "list") if before else cli("list", *given)) == (0, "[]\n", "")
        assert "0.05 s" in (cli(*short, *ECHO) if before else cli(*ECHO, *short)).error()
        once = (*given, "--retries", "0")
        assert "503" in (cli(*once, "list") if before else cli("list", *once)).error()
        assert len(server.received) == 3
        assert cli(*given, "list").json == []  # which takes two attempts
    assert cli("--version") == (0, f"{gateway_sdk.__version__}\n", "")


@pytest.mark.parametrize(("name", "attribute", "header"), [
    ("AGENT_BUILDER_API_KEY", "api_key", "x-internal-token"),
    ("GATEWAY_JWT_TOKEN", "jwt_token", "authorization"),
    ("X_INTERNAL_TOKEN", "internal_token", "x-internal-token"), ("", "", ""),
])
def test_the_credential_is_the_environments_and_two_are_wrong_usage(
        cli: Any, gateway: LocalGateway, monkeypatch: Any, name: str, attribute: str,
        header: str) -> None:
    if name not in ("", "X_INTERNAL_TOKEN"):
        monkeypatch.setenv(name, getattr(gateway, attribute))
        error = cli(*ECHO).error(2)
        assert name in error
        assert getattr(gateway, attribute) not in error
    if name != "X_INTERNAL_TOKEN":
        monkeypatch.delenv("X_INTERNAL_TOKEN")
    assert cli(*ECHO, "-p", "value=1").value == 1
    sent = CREDENTIAL_HEADERS & set(gateway.requests[-1].headers)
    assert sent == ({header} if header else set())


def test_the_debug_log_goes_to_stderr_without_credentials_and_control_characters(
    lone: Path
) -> None:
    with Script(answer({"detail": NASTY}, 503, Retry_After="0"), answer({})) as server:
        ended = ended_python(lone, "-v", "spec", "a", "1", env=environment_for(server))
    assert (ended.status, ended.out) == (0, "{}\n")
    assert "GET /v1/prefabs/a/1/spec 200" in ended.err
    assert TOKEN not in ended.err
    assert "gnp" in ended.err and ended.err.replace("\n", "").isprintable()


@pytest.mark.parametrize(("line", "reason"), [
    ("list --base-url http://127.0.0.1:{port}", "no connection to http://127.0.0.1:{port}"),
    ("upload no", "no"),
    ("run no-such 1 f", "no-such"), ("run a 1 f -f files=no.txt", "no.txt"),
    ("run a 1 f -d @no.json", "no.json"),
    ("spec no-such", "no-such"), ("spec text-tools 9.9.9", "text-tools"),
    ("batch no.jsonl", "no.jsonl"),
    ("url s3://local/agent-outputs/nobody/nothing/f", "/internal/files/download"),
    ("download s3://local/agent-outputs/nobody/nothing/f f", "/internal/files/download"),
])
def test_what_fails_is_one_line_on_stderr(cli: Any, line: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # where nobody listens any more
    assert reason.format(port=port) in cli(*line.format(port=port).split()).error()


PROBLEMS = [
    {"loc": ["body", "calls", number], "msg": f"bad {number}", "type": "x"} for number in range(2)
]


@pytest.mark.parametrize(("reply", "told"), [
    (answer({"detail": PROBLEMS}, 422), "422: body.calls.0: bad 0; body.calls.1: bad 1\n"),
    (answer({"detail": "first:\n second\n"}, 400), "first: second\n"),
    *((answer(body=body), "GET /v1/prefabs")
      for body in (b"[", b"null", b'[{"id": 1}]', b"\xff", b"[" * 100_000)),
], ids=["several messages", "several lines", "cut", "null", "no version", "not UTF-8", "deep"])
def test_an_odd_answer_is_one_line_and_no_wrong_usage(cli: Any, reply: bytes, told: str) -> None:
    assert told in cli("list", replies=[reply]).error(1)


# Signals, and pipes that are closed or full


@posix
@pytest.mark.parametrize(("name", "line", "replies", "kept", "told"), [
    ("SIGINT", "batch calls.jsonl --workers 1", [ran("first"), Pause()], b"first",
     "calls that have no line on stdout may have run"),
    ("SIGHUP", "run a 1 f --stream", [Pause(chunked(event("content", "first"), end=False))],
     b"first\n", "the call may have run"),
    ("SIGTERM", "run a 1 f", [Pause()], b"", "the call may have run"),
    ("SIGINT", "run a 1 f -f x=calls.jsonl", [LINK, Pause()], b"", "no call was made"),
    ("SIGTERM", "list", [Pause()], b"", "no call was made"),
], ids=["batch", "stream", "run", "upload", "list"])
def test_a_signal_ends_any_command_with_one_line_and_nothing_more_is_sent(
        lone: Path, name: str, line: str, replies: list[Answer], kept: bytes, told: str) -> None:
    with (
        Script(*replies) as server,
        started(lone, *line.split(), cwd=str(lone.parent), env=environment_for(server)) as process,
    ):
        server.wait_until(lambda: len(server.received) == len(replies))
        # Each as it came.
        out = os.read(process.stdout.fileno(), len(kept.strip())) if kept else b""
        process.send_signal(getattr(signal, name))
        rest, err = process.communicate()
        assert kept in out + rest
        assert (process.returncode, err.decode()) == (ENDINGS[name], f"interrupted: {told}.\n")
        assert len(server.received) == len(replies)


@posix
@pytest.mark.parametrize("name", ENDINGS)
def test_a_batch_that_a_signal_ends_prints_all_results_that_have_arrived(
    lone: Path, name: str
) -> None:
    (lone.parent / "calls").write_text("".join(call_line(value=number) for number in range(60)))
    all_but_the_first = threading.Event()

    def choose(received: Received) -> Answer:
        if b'{"value":0}' in received.body:
            return Pause()
        # By then, the answers of all but the other workers are there.
        if len(server.received) == 60:
            all_but_the_first.set()
        return ran(received.json["calls"][0]["inputs"]["parameters"]["value"])

    with (
        Routed(choose) as server,
        started(
            lone, "batch", "calls", cwd=str(lone.parent), env=environment_for(server)
        ) as process,
    ):
        assert all_but_the_first.wait(WAIT_SECONDS)
        process.send_signal(getattr(signal, name))
        lines = [json.loads(line) for line in process.stdout]
        assert process.wait() == ENDINGS[name]
    assert len(lines) >= 59 - 7
    indexes = [line["index"] for line in lines]
    assert indexes == [line["output"]["output"] for line in lines]
    assert len(indexes) == len({*indexes} - {0})


@posix
def test_a_line_that_is_begun_is_finished_and_a_second_signal_ends_at_once(lone: Path) -> None:
    (lone.parent / "calls").write_text("".join(call_line(value=number) for number in range(24)))
    for second in (False, True):
        with (
            Script(*[ran("x" * 100_000)] * 24) as server,
            started(
                lone, "batch", "calls", cwd=str(lone.parent), env=environment_for(server)
            ) as process,
        ):
            server.wait_until(lambda: len(server.received) == 24)
            assert process.stdout.read(1) == b"{"
            # While it waits for a reader in the middle of a line.
            process.send_signal(signal.SIGINT)
            if second:
                process.send_signal(signal.SIGTERM)
                assert process.wait(WAIT_SECONDS) == 143
                continue
            lines = [json.loads(line) for line in (b"{" + process.stdout.read()).splitlines()]
            assert process.wait() == 130
            assert len({line["index"] for line in lines}) == len(lines)
            assert len(lines) >= 24 - 8  # as many as calls are on their way at once may be missing


def test_a_signal_that_comes_twice_at_the_same_moment_or_too_late_changes_nothing() -> None:
    code = """import gateway_sdk, time
terminal = gateway_sdk._Terminal()
terminal.finish()
terminal._on_signal(1, None)
terminal.tell("as before")
terminal = gateway_sdk._Terminal()
with terminal.whole():
    for number in (1, 1, 1):  # as SIGHUP does when a terminal is closed
        terminal._on_signal(number, None)
    print("once", flush=True)
    time.sleep(0.11)
    terminal._on_signal(1, None)"""
    assert ended_python("-c", code, cwd=str(ROOT)) == (129, "once\n", "as before\n")


# PyPy does not tell which signals are ignored.
@cpython_only
@posix
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(lone: Path, name: str) -> None:
    number, sent = getattr(signal, name), threading.Event()
    late = Steps((lambda _: sent.wait(WAIT_SECONDS), send(ran("all the same"))))
    before = signal.signal(number, signal.SIG_IGN)  # a child inherits that, as from `nohup`
    try:
        with (
            Script(late) as server,
            started(lone, "run", "a", "1", "f", env=environment_for(server)) as process,
        ):
            server.wait_until(lambda: server.received)
            process.send_signal(number)
            sent.set()
            out, err = process.communicate()
            assert (process.returncode, err) == (0, b"")
            assert json.loads(out)["output"]["output"] == "all the same"
    finally:
        signal.signal(number, before)


@posix
@pytest.mark.parametrize("line", ["run a 1 f --save saved", "download s3://b/o.bin saved/o.bin"])
def test_a_signal_leaves_no_part_of_a_file(lone: Path, line: str) -> None:
    entry = {
        "status": "SUCCESS",
        "output": {"status": "SUCCESS", "output": 1, "files": {"a": ["s3://b/o.bin"]}},
    }
    result = [answer({"results": [entry]})] if line.startswith("run") else []
    part = Pause(OK + b"Content-Length: 9\r\n\r\npart")
    folder = lone.parent / "saved"
    folder.mkdir()
    with (
        Script(*result, LINK, part) as server,
        started(lone, *line.split(), cwd=str(lone.parent), env=environment_for(server)) as process,
    ):
        deadline = time.monotonic() + WAIT_SECONDS
        # The part; and `--save` has taken the name.
        while len([*folder.iterdir()]) < 1 + len(result):
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
        assert process.returncode == 143
    assert [*folder.iterdir()] == []
    if result:  # which was paid for
        assert (json.loads(out)["saved"], err) == ([], b"interrupted: the call has run.\n")


@posix
def test_main_takes_signals_that_are_not_ignored_and_gives_them_back(cli: Any) -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(getattr(signal, name)) for name in ENDINGS]

    seen: list[Any] = []
    before = handlers()
    look = Steps((lambda _: seen.extend(handlers()), send(answer([]))))
    assert cli("list", replies=[look]).json == []
    assert handlers() == before
    kept = [new == old for new, old in zip(seen, before)]
    assert kept == [old == signal.SIG_IGN for old in before]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # where there are no signals to take
        assert pool.submit(cli, "list").result().status == 0


@posix
def test_pipes_that_make_nobody_wait_lose_nothing(lone: Path) -> None:
    reader, writer = os.pipe()
    source, sink = os.pipe()
    os.set_blocking(writer, False)
    os.set_blocking(source, False)
    text = "x" * 300_000
    with (
        Script(ran(text)) as server,
        started(
            lone, "run", "a", "1", "f", "-d", "-",
            env=environment_for(server), stdin=source, stdout=writer,
        ) as process,
    ):
        os.close(writer)
        os.write(sink, b'{"value":')
        deadline = time.monotonic() + WAIT_SECONDS
        # Until it has read this, and waits for the rest.
        while select.select([source], [], [], 0)[0]:
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)
        os.write(sink, b" 1}")
        os.close(sink)
        server.wait_until(lambda: server.received)
        assert server.received[0].json["calls"][0]["inputs"]["parameters"] == {"value": 1}
        with open(reader, "rb") as pipe:
            assert json.load(pipe)["output"]["output"] == text
        assert (process.stderr.read(), process.wait()) == (b"", 0)
    os.close(source)


@posix
@pytest.mark.parametrize("target", ["a closed pipe", "/dev/full"])
def test_a_log_that_nobody_can_read_costs_no_result(lone: Path, target: str) -> None:
    if target == "a closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    elif os.path.exists(target):
        writer = os.open(target, os.O_WRONLY)
    else:
        pytest.skip("there is no /dev/full")
    with (
        Script(ran("paid for")) as server,
        started(
            lone, "-v", "run", "a", "1", "f", env=environment_for(server), stderr=writer
        ) as process,
    ):
        assert json.loads(process.stdout.read())["output"]["output"] == "paid for"
        assert process.wait() == 0
    os.close(writer)


@posix
def test_an_interrupted_batch_prints_the_results_that_it_has(
    lone: Path, gateway: LocalGateway
) -> None:
    closing, terminal = threading.Event(), Terminal()

    def wait_longer_if_first(number: int) -> int:
        closing.wait(3 * WAIT_SECONDS if number == 0 else 0.2)  # until a bar is due
        return number

    gateway.add_prefab("patient", "1.0.0", {"f": wait_longer_if_first})
    (lone.parent / "calls").write_text(
        "".join(call_line("f", "patient", "1.0.0", number=n) for n in range(2))
    )
    with started(lone, "batch", "calls", cwd=str(lone.parent), env=environment_for(gateway),
                 stderr=terminal.end) as process:
        terminal.wait_for(b"1 of 2 calls")
        process.send_signal(signal.SIGINT)
        (line,) = process.stdout.readlines()
        assert (json.loads(line)["index"], process.wait(WAIT_SECONDS)) == (1, 130)
    closing.set()
    told = "interrupted: calls that have no line on stdout may have run."
    assert screen(terminal.rest()) == [told, ""]


@posix
def test_a_run_that_nobody_reads_tells_its_status_all_the_same(lone: Path) -> None:
    closed = threading.Event()
    late = Steps((lambda _: closed.wait(WAIT_SECONDS), send(FAILED_CALL)))
    with Script(late) as server, \
            started(lone, "run", "a", "1", "f", env=environment_for(server)) as process:
        server.wait_until(lambda: server.received)
        process.stdout.close()
        closed.set()
        assert b"out of luck" in process.stderr.read() and process.wait() == 1


@posix
@pytest.mark.parametrize("line", ["secret set vault KEY", "secret delete vault KEY", "cleanup s"])
def test_what_is_interrupted_may_have_been_done(lone: Path, line: str) -> None:
    stdin = subprocess.PIPE if "set" in line else subprocess.DEVNULL
    with Script(Pause()) as server, \
            started(lone, *line.split(), env=environment_for(server), stdin=stdin) as process:
        if process.stdin:
            process.stdin.write(b"x")
            process.stdin.close()
        server.wait_until(lambda: server.received)
        process.send_signal(signal.SIGINT)
        assert b"may have been done" in process.stderr.read() and process.wait() == 130


@pytest.mark.parametrize("folder", ["", "a.txt", "a.txt/x/y"])
def test_what_cannot_be_a_folder_to_save_to_is_refused_before_the_call(
    cli: Any, gateway: LocalGateway, folder: str
) -> None:
    gateway.requests.clear()
    ended = cli("run", "a", "1", "f", "-f", "x=a.txt", "--save", folder)
    assert repr(folder.removesuffix("/y")) in ended.error()
    assert not gateway.requests


@posix
@pytest.mark.parametrize(("line", "reply"), [
    ("run a 1 f --stream", chunked(event("content", "more\n"), event("done"))),
    ("batch calls.jsonl", ran()),
], ids=["stream", "batch"])
def test_a_reader_that_has_seen_enough_is_no_error(lone: Path, line: str, reply: bytes) -> None:
    closed = threading.Event()
    late = Steps((lambda _: closed.wait(WAIT_SECONDS), send(reply)))
    with Script(*[late] * 9) as server, \
            started(lone, *line.split(), cwd=str(lone.parent),
                    env=environment_for(server)) as process:
        server.wait_until(lambda: server.received)
        process.stdout.close()
        closed.set()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@posix
@pytest.mark.parametrize(("line", "statuses"), [
    ("upload a.txt 2>&-", (0,)), ("upload a.txt > /dev/full", (1,)),
    ("secret set vault K <&-", (1, 2)), ("run >&- 2>&-", (1,)), ("run 2> /dev/full", (2,)),
    ("--help | true", (0,)), ("run --help > /dev/full", (1,)),
])
def test_a_closed_or_full_stream_is_no_traceback(
    cli: Any, shell: Any, line: str, statuses: Any
) -> None:
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    ended = shell(f"gateway-sdk {line}")
    assert ended.status in statuses, ended.err
    assert ended.err.count("\n") == (ended.status != 0 and "2>" not in line)
    assert ("s3://" in ended.out) == ("a.txt 2>" in line)


@pytest.mark.parametrize("line", ["list", "run text-tools 1.1.0 echo -P value=1", "run --help"])
def test_nothing_is_sent_if_its_result_could_not_be_printed(
    shell: Any, gateway: LocalGateway, line: str
) -> None:
    gateway.requests.clear()
    assert "stdout is closed" in shell(f"gateway-sdk {line} >&-").error()
    assert not gateway.requests


# The file as a program, and within one


def test_a_program_can_call_main_and_print_besides(cli: Any, gateway: LocalGateway) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli("list").status == 0
    assert json.loads(out.getvalue()) == gateway.prefabs()
    code = "import gateway_sdk; print('before'); gateway_sdk.main(['list']); print('behind')"
    printed = ended_python("-c", code, cwd=str(ROOT), env=environment_for(gateway)).out.splitlines()
    assert (printed[0], printed[2]) == ("before", "behind")
    assert json.loads(printed[1]) == gateway.prefabs()


@posix
def test_the_file_is_a_program(lone: Path) -> None:
    assert SDK.read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")
    # A machine may have a `python3.15` and no `python3`.
    (lone.parent / "python3").symlink_to(sys.executable)
    path = os.pathsep.join([str(lone.parent), os.environ["PATH"]])
    done = subprocess.run(
        [f"./{lone.name}", "--version"], cwd=str(lone.parent), capture_output=True, timeout=60,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{gateway_sdk.__version__}\n".encode())


def test_an_older_python_is_told_which_one_is_needed(lone: Path) -> None:
    ast.parse(lone.read_text(encoding="utf-8"), feature_version=(3, 8))  # or it could not tell
    old = f"import sys, runpy; sys.version_info = (3, 8, 18); sys.argv = [{str(lone)!r}, 'list']\n"
    told = "gateway_sdk needs Python 3.9 or newer, and this is Python "
    script = ended_python("-c", f"{old}runpy.run_path(sys.argv[0], run_name='__main__')")
    assert (script.status, script.out, script.err.count("\n")) == (1, "", 1)
    assert script.err.startswith(told)
    imported = ended_python("-c", f"""{old}
try:
    runpy.run_path(sys.argv[0])
except ImportError as error:
    print(error)""")
    assert (imported.status, imported.out[: len(told)], imported.err) == (0, told, "")


def test_the_command_line_uses_few_privates_of_the_module() -> None:
    lines = SDK.read_text(encoding="utf-8").splitlines()
    (banner,) = [
        number for number, line in enumerate(lines, 1) if line.startswith("# --- Command line ---")
    ]
    section = [node for node in TREE.body if node.lineno > banner]
    targets = [
        target for node in section if isinstance(node, ast.Assign) for target in node.targets
    ]
    own = {node.name for node in section if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    own |= {target.id for target in targets if isinstance(target, ast.Name)}
    nodes = [node for top in section for node in ast.walk(top)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    own_attributes = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("self", "os")
    }
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)} - own_attributes
    used = {name for name in (names - own) | attributes if re.match("_[^_]", name)}
    assert used - {"_"} == {"_Json", "_in_shell", "_contents"}


# --- README and repository ------------------------------------------------------------------------

READMES = ("README.md", "README.zh-CN.md")
EXAMPLES_READMES = ("examples/README.md", "examples/README.zh-CN.md")
TREE = ast.parse(SDK.read_text(encoding="utf-8"))
PUBLIC = {
    "AsyncEventStream", "AsyncGatewayClient",
    "GatewayClient", "Prefab", "PrefabCall", "PrefabResult", "BatchResult", "CallStatus",
    "StreamEvent",
    "StreamEventType", "EventStream", "PrefabInfo", "GatewayError", "AuthenticationError",
    "PrefabNotFoundError",
    "ValidationError", "QuotaExceededError", "MissingSecretError", "AgentContextRequiredError",
    "ServiceUnavailableError", "GatewayTimeoutError", "DEFAULT_BASE_URL", "__version__",
}


def blocks_of(name: str) -> list[tuple[str, str, int]]:
    """Language, code and line of a README's blocks, but for those that are only text."""
    if not (ROOT / name).exists():
        pytest.skip(f"there is no {name}")
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    blocks = [(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in found]
    assert {language for language, _, _ in blocks} == {"python", "bash", "text"}
    assert len(blocks) > 10
    return [block for block in blocks if block[0] != "text"]


def prose_of(name: str) -> list[str]:
    """The lines of a README; those of its blocks, and what stands in backquotes, are left empty."""
    def emptied(block: re.Match[str]) -> str:
        return "```" + "\n" * block[0].count("\n")

    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub("^```.*?^```$", emptied, text, flags=re.M | re.S)
    return re.sub("`[^`\n]+`", "``", text).split("\n")


# A block that begins so is a file, not a piece of a session.
is_file = re.compile(r"# (\w+\.py)\n").match
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def opentelemetry_within_a_span() -> Any:
    """As much of the package as the README uses: it need not be installed."""
    tracer = types.SimpleNamespace(start_as_current_span=contextlib.nullcontext)
    return types.SimpleNamespace(
        propagate=types.SimpleNamespace(inject=lambda headers: headers.update(traceparent=TRACE)),
        trace=types.SimpleNamespace(get_tracer=lambda name: tracer),
    )


def test_every_block_of_the_readme_works(
    cli: Any, shell: Any, monkeypatch: Any, capsys: Any, caplog: Any
) -> None:
    caplog.set_level(logging.NOTSET, "gateway_sdk")  # undone at the end, whatever a block sets
    monkeypatch.setitem(sys.modules, "opentelemetry", opentelemetry_within_a_span())
    # The calls that are given up would sleep for a minute: the gateway need not wait for them.
    monkeypatch.setattr(local_gateway, "CLOSE_SECONDS", SHORT_SECONDS)
    for copied in (SDK, ROOT / "examples/local_gateway.py"):
        shutil.copy(str(copied), copied.name)
    session: dict[str, Any] = {"__name__": "__main__"}
    with LocalGateway() as gateway:  # of its own, since it gets one more prefab
        monkeypatch.setenv("GATEWAY_BASE_URL", gateway.base_url)
        monkeypatch.setenv("X_INTERNAL_TOKEN", gateway.internal_token)
        settings = f"export GATEWAY_BASE_URL={gateway.base_url}"
        settings += f" X_INTERNAL_TOKEN={gateway.internal_token}\n"
        for language, code, line in blocks_of("README.md"):
            file = is_file(code)
            if language == "python" and not file:
                exec(compile("\n" * line + code, "README.md", "exec"), session)
                continue
            if file:
                Path(file[1]).write_text(code, encoding="utf-8")
                code = f"python -m pytest -q -p no:cacheprovider {file[1]}"
            ended = shell(settings + code)
            told = f"line {line}: {ended.out}{ended.err}"
            assert (ended.status, ended.out != "") == (0, True), told
            if "mkdir -p my-prefab" in code:
                assert gateway.add_folder("my-prefab").error is None
        session["client"].close()
    assert TRACE in [request.headers.get("traceparent") for request in gateway.requests]
    out, err = capsys.readouterr()
    assert "'words': 2" in out
    assert not re.search("fail", out + err, re.I)
    assert (session["batch"].all_success(), session["given_up"].may_have_run) == (True, True)
    saved = [path.read_text() for path in Path("results").glob("report*.txt")]
    assert saved == ["A FILE TO WORK ON\n."]
    ours = {"a.txt", "b.txt", "programs", SDK.name, "local_gateway.py", "test_greeting.py"}
    left = {path.name for path in Path().iterdir()} - ours
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert left <= {line.strip("/") for line in ignored}


@pytest.mark.parametrize("name", READMES)
def test_the_python_of_the_readme_can_be_pasted_into_any_python(name: str) -> None:
    sessions = [code for language, code, _ in blocks_of(name)
                if language == "python" and not is_file(code)]
    assert len(sessions) > 5
    for code in sessions:
        lines = re.sub('""".*?"""', "...", code, flags=re.S).rstrip().splitlines()
        assert not lines[-1].startswith(" "), f"It waits for another Enter: {lines[-1]}"
        for before, after in zip(lines, lines[1:]):
            # Up to Python 3.12, a blank line ends what is indented, and nothing else does.
            assert before or not after.startswith(" "), after
            goes_on = not after or after.startswith((" ", "except", "else", "finally"))
            assert not before.startswith(" ") or goes_on, after


def test_the_readmes_have_the_same_code_apart_from_comments() -> None:
    def without_comments(language: str, code: str, _: int) -> str:
        if language == "python":
            return ast.dump(ast.parse(code))
        return re.sub(r"(?<!\S)#.*", "", code)

    english, chinese = ([without_comments(*block) for block in blocks_of(name)] for name in READMES)
    assert english == chinese


@pytest.mark.parametrize(("english", "chinese"), [READMES, EXAMPLES_READMES])
def test_the_readmes_have_the_same_lines(english: str, chinese: str) -> None:
    def kind(line: str) -> str:
        return (re.match("#+ |- |```|", line) or [""])[0] + "|" * line.count("|")

    def names_in_tables(name: str) -> list[list[str]]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return [sorted(re.findall("`[^`]+`", line)) for line in lines if line.startswith("|")]

    assert list(map(kind, prose_of(english))) == list(map(kind, prose_of(chinese)))
    assert names_in_tables(english) == names_in_tables(chinese)


@pytest.mark.parametrize("name", [*READMES, *EXAMPLES_READMES])
def test_a_readme_shows_no_asterisks_and_no_blanks_of_wrapped_lines(name: str) -> None:
    for line in prose_of(name):
        for place, mark in enumerate(re.finditer(r"\*+", line)):
            outer, inner = line[:mark.start()][-1:], line[mark.end():][:1]
            if place % 2:
                outer, inner = inner, outer
            # By CommonMark, with punctuation inside and a letter outside it is no emphasis.
            assert inner.isalnum() or not outer.isalnum(), line
        assert not re.search("[\u3000-\u303f\uff00-\uffef] [^|]", line), line


@pytest.mark.parametrize("name", [*READMES, *EXAMPLES_READMES])
def test_every_link_of_a_readme_leads_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^):]+)\)", "\n".join(prose_of(name)))
    assert links
    for link in links:
        path, _, place = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        titles = re.findall("^#+ (.+)", target.read_text(encoding="utf-8"), re.M)
        # As GitHub makes them of headings.
        places = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not place or place in places, link


@pytest.mark.parametrize("name", READMES)
def test_the_readme_has_every_method_with_its_arguments_and_every_type(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for method, function in inspect.getmembers(GatewayClient, inspect.isroutine):
        if not method.startswith("_"):
            parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter
                          in inspect.signature(function).parameters.values()]
            own = [parameter for parameter in parameters if parameter.name != "self"]
            owner = "GatewayClient." if inspect.ismethod(function) else ""
            assert f"`{owner}{method}{inspect.Signature(own)}`".replace("'", '"') in text
    wanted = PUBLIC - {"DEFAULT_BASE_URL", "__version__", "CallStatus"}
    assert [each for each in sorted(wanted) if f"`{each}" not in text] == []
    for record in (PrefabResult, BatchResult, PrefabInfo, StreamEvent, Prefab, EventStream):
        names = {*getattr(record, "__dataclass_fields__", ()), *vars(record)} - {"from_dict"}
        public = [each for each in names if not each.startswith("_")]
        assert [each for each in public if not re.search(rf"`(\w+\.)?{each}[`(]", text)] == []


def test_the_newest_version_of_the_changelog_is_this_one() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(\d.*?)\]", text, re.M)[0] == gateway_sdk.__version__


def test_the_public_names_are_those_of_the_contract_and_documented() -> None:
    assert sorted(gateway_sdk.__all__) == sorted(PUBLIC)
    assert all(hasattr(gateway_sdk, name) for name in PUBLIC)
    tops = [node for node in TREE.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert {node.name for node in tops if not node.name.startswith("_")} <= PUBLIC | {"main"}
    methods = [
        node
        for top in tops
        if top.name in PUBLIC
        for node in top.body
        if isinstance(node, ast.FunctionDef)
        and not any(getattr(decorator, "id", "") == "overload" for decorator in node.decorator_list)
    ]
    public = [node for node in tops + methods if not node.name.startswith("_")]
    assert len(public) > 50
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_no_name_of_the_module_is_used_above_its_definition() -> None:
    defined: dict[Any, int] = {}
    for node in TREE.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for name in (getattr(node, "name", None),
                     *(getattr(target, "id", None) for target in targets)):
            defined.setdefault(name, node.lineno)
    assert {"GatewayClient", "main", "DEFAULT_BASE_URL"} <= set(defined)
    hints = [
        getattr(node, field, None) for node in ast.walk(TREE) for field in ("annotation", "returns")
    ]
    hinted = {id(part) for hint in hints if hint for part in ast.walk(hint)}
    used = [
        (node.id, node.lineno)
        for top in TREE.body
        for node in ast.walk(top)
        if isinstance(node, ast.Name)
        and id(node) not in hinted
        and defined.get(node.id, 0) > top.lineno
    ]
    assert used == []


def test_the_module_keeps_the_limits_that_contributing_names() -> None:
    assert SDK.stat().st_size <= 226_000
    for node in ast.walk(TREE):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = (ast.get_docstring(node, clean=False) or "").count("\n")
            assert node.end_lineno - node.lineno - docstring <= 45, node.name


def test_every_section_of_the_module_is_in_the_picture_of_contributing() -> None:
    sections = re.findall("^# --- (.+?) -+$", SDK.read_text(encoding="utf-8"), re.M)
    picture = (
        (ROOT / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .partition("```text")[2]
        .partition("```")[0]
    )
    assert [name for name in sections if name.lower() not in picture] == []
    assert len(sections) > 10


def imported_names() -> set[str]:
    """What the module imports when it runs, and not for type checkers alone."""
    checks = [node for node in TREE.body if ast.unparse(node).startswith("if TYPE_CHECKING:")]
    unseen = {id(part) for check in checks for node in check.body for part in ast.walk(node)}
    nodes = [node for node in ast.walk(TREE) if id(node) not in unseen]
    assert not any(node.level for node in nodes if isinstance(node, ast.ImportFrom))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.skipif(sys.version_info < (3, 10),
                    reason="Python 3.9 does not say what its standard library is")
def test_only_the_standard_library_is_imported() -> None:
    assert (
        {"json"}
        < {name.partition(".")[0] for name in imported_names()}
        <= set(sys.stdlib_module_names)
    )


# --- Everywhere -----------------------------------------------------------------------------------

CALLS_IN_CODE = """
with gateway_sdk.GatewayClient.from_env() as client:
    print(client.run("text-tools", "1.1.0", "echo", {"value": 1}).get_function_result())
    events = client.run("text-tools", "1.1.0", "words", {"text": "a b"}, stream=True)
    print(sum(1 for _ in events) > 2)
"""
PRINTED = "1\nTrue\n"


@pytest.mark.parametrize("way",
                         ["-I -S FILE", "-OO FILE", "-bb -E -s FILE", "-X dev -W error FILE",
                          "-m gateway_sdk"])
def test_it_runs_in_any_way_and_needs_nothing_of_the_environment(
    gateway: LocalGateway, lone: Path, way: str
) -> None:
    needed = {"GATEWAY_BASE_URL", "X_INTERNAL_TOKEN", "SYSTEMROOT"}  # no HOME, no PATH
    little = {name: value for name, value in environment_for(gateway).items() if name in needed}
    command = [sys.executable, "-B", *way.replace("FILE", lone.name).split(), *ECHO, "-d",
               '{"value": 1}']
    done = subprocess.run(
        command, cwd=str(lone.parent), env=little, capture_output=True, encoding="utf-8", timeout=60
    )
    assert Ended(done.returncode, done.stdout, done.stderr).value == 1


@pytest.mark.parametrize(("name", "place"), [
    ("gateway_sdk", "all.zip"), ("mypkg.inner.gateway_sdk", "."),
    ("imported_by_it.gateway_sdk", "."),
])
def test_it_works_from_an_archive_and_vendored_in_a_package(
        gateway: LocalGateway, tmp_path: Path, name: str, place: str) -> None:
    package = tmp_path.joinpath(*name.split(".")[:-1])
    package.mkdir(parents=True, exist_ok=True)
    if place == "all.zip":
        with zipfile.ZipFile(tmp_path / place, "w") as archive:
            archive.write(SDK, "gateway_sdk.py")
    else:
        shutil.copy(str(SDK), str(package))
        (package / "__init__.py").write_text(
            "from .gateway_sdk import *" if "imported" in name else ""
        )
    code = f"""import pickle
from {name}.exceptions import GatewayError
from {name}.models import PrefabCall
import {name} as gateway_sdk
assert (GatewayError, PrefabCall) == (gateway_sdk.GatewayError, gateway_sdk.PrefabCall)
assert type(pickle.loads(pickle.dumps(GatewayError("x")))) is GatewayError
assert {str(tmp_path)!r} in gateway_sdk.__file__
{CALLS_IN_CODE}"""
    environment = environment_for(gateway, PYTHONPATH=str(tmp_path / place))
    assert ended_python("-c", code, env=environment, cwd=str(tmp_path)) == (0, PRINTED, "")


def test_without_ssl_http_works_and_https_is_a_clear_error(
    gateway: LocalGateway, lone: Path
) -> None:
    code = f"""import sys
sys.modules["ssl"] = sys.modules["_ssl"] = None  # which makes an import of it fail
import gateway_sdk
{CALLS_IN_CODE}
try:
    gateway_sdk.GatewayClient("https://127.0.0.1:1", max_retries=0).list_prefabs()
except gateway_sdk.GatewayError as error:
    print("ssl" in str(error))"""
    ended = ended_python("-c", code, cwd=str(lone.parent), env=environment_for(gateway))
    assert ended == (0, f"{PRINTED}True\n", "")


@posix
def test_an_unprivileged_user_can_use_it_from_a_folder_that_is_read_only(
    gateway: LocalGateway
) -> None:
    code = f"""import importlib, os, sys
for name in {sorted(imported_names() | {"encodings.idna", "encodings.utf_8_sig", "locale"})}:
    importlib.import_module(name)  # as Python itself may lie in root's home
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
os.environ["HOME"], sys.path[0], sys.dont_write_bytecode = "/nonexistent", os.getcwd(), False
import gateway_sdk
{CALLS_IN_CODE}
assert gateway_sdk.main(["upload", "gateway_sdk.py"]) == 0
line = "run file-tools 1.0.0 checksum -f files=gateway_sdk.py --save ."
sys.exit(gateway_sdk.main(line.split()))"""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(str(SDK), folder)
        os.chmod(folder, 0o555)
        ended = ended_python("-c", code, cwd=folder, env=environment_for(gateway))
        assert os.listdir(folder) == ["gateway_sdk.py"]
        os.chmod(folder, 0o755)
    *printed, uploaded, result = ended.out.splitlines()
    assert (printed, json.loads(uploaded)["size"]) == (PRINTED.split(), SDK.stat().st_size)
    assert json.loads(result)["status"] == "SUCCESS"
    assert "Permission denied" in ended.error(out=ended.out)  # where nothing can be saved


@cpython_only
def test_an_import_changes_nothing_and_takes_no_time_for_what_few_need(lone: Path) -> None:
    code = """import logging, os, signal, socket, sys, threading
def state():
    root = logging.getLogger()
    return (dict(os.environ), os.getcwd(), threading.enumerate(), root.handlers[:], root.level,
            root.manager.disable, socket.getdefaulttimeout(), signal.getsignal(signal.SIGINT),
            sys.path[:], sys.excepthook, sys.stdout, sys.stderr, os.listdir("."),
            sys.getrecursionlimit())
seen, before = [], state()
def watch(event, arguments):
    flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
    changes = ("socket.", "subprocess.", "os.putenv", "os.mkdir", "os.fork", "_thread.start")
    if flags & (os.O_WRONLY | os.O_RDWR) or event.startswith(changes):
        seen.append((event, arguments))
sys.addaudithook(watch)
import gateway_sdk
assert (state(), seen) == (before, []), seen
own = logging.getLogger("gateway_sdk")
assert own.level == 0 and {type(handler) for handler in own.handlers} <= {logging.NullHandler}
few_need = {"argparse", "concurrent.futures", "urllib.request", "asyncio", "getpass"}
print(few_need & set(sys.modules))"""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
    assert ended_python("-c", code, cwd=str(lone.parent), env=environment) == (0, "set()\n", "")
