"""Tests of gateway_sdk: real sockets, real files, nothing patched.

First what each section of the module does, in its order; then faults, in tables of operations and
what can go wrong; then the command line, the README, the places where the module runs, the examples.

Two kinds of servers stand behind them. The local gateway of `examples/` behaves as the protocol says;
a `Script` says byte for byte what the test wants, and records what it was sent.

Most tests are tables. The name of a row says what is tried, and a comment above a table what its columns are.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import email.utils
import functools
import gc
import hashlib
import hmac
import html
import http.client
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import operator
import os
import pickle
import queue
import random
import re
import runpy
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
import urllib.parse
import urllib.request
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import gateway_sdk
from gateway_sdk import (
    DEFAULT_BASE_URL,
    AgentContextRequiredError,
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
sys.path.insert(0, str(ROOT / "examples"))

from local_gateway import LocalGateway

cpython_only = pytest.mark.skipif(sys.implementation.name != "cpython", reason="counts on CPython's own ways")
Patch = pytest.MonkeyPatch
TOKEN = "token-of-the-agent"
WAIT_SECONDS = 10.0  # for what must happen; only a failing test waits that long
FUZZ_SEED = int(os.environ.get("GATEWAY_FUZZ_SEED", 20240229))
FUZZ_COUNT = int(os.environ.get("GATEWAY_FUZZ_COUNT", 150))  # of each kind
SHORT_SECONDS = 0.1  # a timeout that is meant to run out

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

    def __init__(self, *answers: Answer, host: str = "127.0.0.1") -> None:
        self.received: list[Received] = []
        self.connections = 0
        self._answers = collections.deque(answers)
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
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
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
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


def client_of(server: Script | LocalGateway, **options: Any) -> GatewayClient:
    """A client with an agent's token that fails quickly where it must fail."""
    url, token = (server.url, TOKEN) if isinstance(server, Script) else (server.base_url, server.internal_token)
    if isinstance(server, TlsScript):
        options.setdefault("ssl_context", server.trusting)
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
def _clean(monkeypatch: Patch) -> None:
    """No credentials or proxies of the machine, and retries without the wait."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("GATEWAY_", "X_INTERNAL_", "AGENT_BUILDER_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(gateway_sdk, "_BACKOFF_BASE_SECONDS", 0.001)
    monkeypatch.setattr(gateway_sdk, "_CONNECT_BACKOFF_BASE_SECONDS", 0.001)


# --- Helpers --------------------------------------------------------------------------------------

S3 = "s3://bucket/agent-outputs/u/a/r.txt"
HIDDEN = 'Hush"h\u00fcsh/hush%41'  # a secret: as quoted, escaped or cut as it may be, "hush" is left
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
    """What any tool that prints or sends an error may get at: causes and contexts, with all they carry."""
    texts = [text_of(error)]
    found: BaseException | None = error
    while found:
        texts += [str(found), repr(found), repr(found.args), repr(vars(found))]
        texts += [repr(getattr(found, name)) for name in ("doc", "object", "line") if hasattr(found, name)]
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
    "internal token": Mode({"internal_token": TOKEN}, {"x-internal-token": TOKEN}, "/v1/internal/run"),
    "allow-list": Mode({}, {}, "/v1/internal/run"),
    "JWT": Mode({"jwt_token": "j.w.t"}, {"authorization": "Bearer j.w.t"}, "/v1/run"),
    "JWT with Bearer": Mode({"jwt_token": "Bearer j.w.t"}, {"authorization": "Bearer j.w.t"}, "/v1/run"),
    "JWT with BEARER": Mode({"jwt_token": "BEARER  j.w.t"}, {"authorization": "Bearer j.w.t"}, "/v1/run"),
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


@contextlib.contextmanager
def nothing_left(*folders: Path) -> Iterator[None]:
    """No file descriptor, thread or file is more than there was."""

    def things() -> collections.Counter[Any]:
        found: list[Any] = [path for folder in folders for path in folder.rglob("*")]
        for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
            with contextlib.suppress(OSError):  # that of the listing itself
                found.append(os.readlink(f"/proc/self/fd/{number}"))
        return collections.Counter(found)

    if sys.implementation.name != "cpython":
        gc.collect()  # what earlier tests let go of, where nothing counts references
    before, threads = things(), set(threading.enumerate())
    yield
    if sys.implementation.name != "cpython":
        gc.collect()
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
    (GatewayError("m", {"a": 1}), {"message": "m", "details": {"a": 1}, "args": ("m",), "status_code": None}),
    (AuthenticationError("m"), {"details": {}, "error_code": None}),
    (PrefabNotFoundError("p", "1.0.0"), {"prefab_id": "p", "version": "1.0.0", "message": "Prefab p@1.0.0 not found"}),
    (PrefabNotFoundError("p", "1.0.0", "gone"), {"prefab_id": "p", "version": "1.0.0", "message": "gone"}),
    (ValidationError("m", {"errors": []}), {"details": {"errors": []}}),
    (QuotaExceededError("m", 10, 9, "calls"), {"message": "m", "limit": 10, "used": 9, "quota_type": "calls"}),
    (MissingSecretError("p", "KEY", instructions="Ask for one"),
     {"prefab_id": "p", "secret_name": "KEY", "instructions": "Ask for one", "error_code": "MISSING_SECRET"}),
    (MissingSecretError("p", "KEY"), {"instructions": None}),
    (AgentContextRequiredError("m"), {"message": "m"}),
    (AgentContextRequiredError(), {"error_code": "MISSING_AGENT_CONTEXT"}),
    (ServiceUnavailableError("m"), {"message": "m"}),
    (GatewayTimeoutError("m"), {"message": "m"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "attributes"), MADE, ids=repr)
def test_errors_are_made_as_in_the_older_sdk_and_pickle_and_copy(error: Any, attributes: dict[str, Any]) -> None:
    assert {name: getattr(error, name) for name in attributes} == attributes
    assert str(error) == error.message and (attributes.get("instructions") or "") in error.message
    original = copy.copy(error)
    original.status_code, original.error_code = 418, "TEAPOT"
    pickled = [pickle.loads(pickle.dumps(original, protocol)) for protocol in range(6)]
    for second in (original, copy.copy(original), copy.deepcopy(original), *pickled):
        assert (type(second), str(second), vars(second)) == (type(error), str(error), vars(original))


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
    [("0", 0), ("120", 120), (" 7 ", 7), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("9" * 999, math.inf),
     *((odd, None) for odd in ("", "soon", "-5", "1e3", "1e999", "nan", "٣", "Fri, 31 Dec 99999 23:59:59 GMT",
                               "Fri, 31 Dec 999999999999 23:59:59 GMT"))],
)  # fmt: skip
def test_retry_after_is_read_in_both_forms(value: str, seconds: float | None) -> None:
    assert gateway_sdk._retry_after_seconds(value) == seconds


@pytest.mark.parametrize("zone", ["UTC", "Asia/Shanghai"])
def test_retry_after_as_a_date_is_counted_from_now_and_in_gmt_without_a_zone(zone: str, monkeypatch: Patch) -> None:
    set_zone = getattr(time, "tzset", lambda: None)
    monkeypatch.setenv("TZ", zone)
    set_zone()
    try:
        in_an_hour = time.time() + 3600
        for date in (email.utils.formatdate(in_an_hour, usegmt=True), time.asctime(time.gmtime(in_an_hour))):
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
    ("list files", 429, coded("Q", details=QUOTA), QuotaExceededError, {**QUOTA, "error_code": "Q"}),
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
    assert ENDPOINTS[name].asked in str(error) and str(status) in str(error) and str(error) == error.message
    said = PLAIN_SECRET if PLAIN_SECRET in str(body) else "the reason"
    assert said in str(error) or status < 400


NOT_JSON = {
    "empty": b"", "blank": b" \r\n", "truncated": b'{"results": [', "html": b"<html>502</html>",
    "not-utf-8": b'{"a": "\xff"}', "utf-16": '{"a": 1}'.encode("utf-16"), "nan": b'{"a": NaN}',
    "infinity": b"[-Infinity]", "two-values": b"{} {}", "deep-lists": b"[" * 100_000,
    "deep-lists-closed": b"[" * 100_000 + b"]" * 100_000, "deep-objects": b'{"a":' * 100_000,
    "long-number": b"9" * 10_000 + b"x", "null": b"null", "text": b'"text"', "number": b"3", "true": b"true",
}
# The body of an error, and the fields that are read of it.
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "string": (REASON, {}),
    "object": ({"detail": coded("E", more=1)}, {"error_code": "E", "more": 1}),
    "bare": (coded("E", more=1), {"error_code": "E", "more": 1}),
    "bare with details": (coded("E", details={"more": 1}), {"error_code": "E", "more": 1}),
    "details beside": (coded("E", more=1, details={"n": 2}), {"error_code": "E", "more": 1, "n": 2}),
    "object without code": ({"detail": {"message": "the reason"}}, {}),
    "list": ({"detail": [{"loc": ["body"], "msg": "the reason"}]}, {}),
    "text in latin-1": (b"the reason \xff", {}),
    "empty object": ({}, {}),
    "null detail": ({"detail": None}, {}),
    "number detail": ({"detail": 3}, {}),
    "empty list": ({"detail": []}, {}),
    "list of numbers": ({"detail": [1, None, []]}, {}),
    "odd places": ({"detail": [{"loc": 3, "msg": None}, {"loc": [["a"], {}, None]}]}, {}),
    "odd message": ({"detail": {"message": ["a"], "error_code": ["b"], "details": [1]}}, {"error_code": ["b"]}),
    "odd code": ({"error_code": {"a": 1}, "message": 3, "details": "x"}, {"error_code": {"a": 1}}),
    "odd fields": ({"detail": {"limit": "x", "used": [], "quota_type": 3, "prefab_id": {}, "x": 1}}, {"x": 1}),
    "surrogate": ({"detail": "\ud800"}, {}),
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
            assert fields.items() <= error.details.items() and error.error_code == fields.get("error_code")
            assert ("the reason" in str(error)) == ("the reason" in str(body))
            assert name != "null" or "None" not in str(error)
            assert repr(pickle.loads(pickle.dumps(error)).details) == repr(error.details)
    short = len(answers[0]) < 50_000  # a long one is not worth reading to its end
    assert server.connections == (1 if short else len(STATUS_CLASSES))


def test_a_422_reads_as_one_line_per_field() -> None:
    missing = {"loc": ["body", "calls", 0, "version"], "msg": "Field required", "type": "missing", "url": "u"}
    wrong = {"loc": ["query", "limit"], "msg": "Input should be an integer", "input": "x"}
    lines = str(error_of(run, answer({"detail": [missing, wrong]}, 422))).partition(" 422: ")[2].splitlines()
    fields = ["body.calls.0.version: Field required", "query.limit: Input should be an integer"]
    assert [line.strip() for line in lines] == fields


def test_on_one_line_a_422_reads_without_stray_marks(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
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
    [(401, "x", "credential"), (404, "x", "list_prefabs"), (400, PLAIN_SECRET, "set_secret('q', 'KEY'"),
     (400, coded("MISSING_SECRET", **SECRET), "Ask for one"),
     (400, coded("MISSING_AGENT_CONTEXT"), "upload_input_file")],
    ids=str,
)  # fmt: skip
def test_an_error_names_its_remedy(status: int, detail: Any, remedy: str) -> None:
    assert remedy in str(error_of(run, answer({"detail": detail}, status)))


@pytest.mark.parametrize("name", ["run", "stream", "directory", "spec", "list files", "delete a secret"])
def test_a_route_that_does_not_exist_is_no_missing_prefab(name: str) -> None:
    error = error_of(ENDPOINTS[name].act, answer({"detail": "Not Found"}, 404))
    assert type(error) is GatewayError and error.status_code == 404
    assert "base_url" in str(error) and "list_prefabs" not in str(error)
    assert re.search("endpoint|route", str(error)) and "credential" in str(error)


@pytest.mark.parametrize(
    "detail",
    ["Prefab not found", "Function f not found in p", {"message": "Not Found"}, {"message": "m", "version": "v7"}],
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
    [jwt(), jwt(exp=4_000_000_000), jwt(exp="soon"), jwt(exp=None), jwt(exp=1e300), jwt(exp=-1e300), jwt(exp=True),
     jwt(exp=float("nan")), jwt(exp=[1]), "a.b.c", "hush.%%%.x", "a..c", "...", "a.W10.c", "a.bnVsbA.c", "a.gICA.c"],
    ids=["no exp", "valid", "text", "null", "too late", "too early", "true", "nan", "list", "short", "no base64",
         "empty", "dots", "JSON list", "JSON null", "not UTF-8"],
)  # fmt: skip
def test_of_any_other_jwt_no_date_is_told(token: str) -> None:
    error = error_of(run, REFUSED, internal_token=None, jwt_token=token)
    assert type(error) is AuthenticationError and "JWT" in str(error)
    assert not re.search(r"\d{4}-\d\d-\d\d", str(error)) and "hush" not in all_of(error)


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
    "envelope with outer fields": ({**FULL_ENVELOPE, "success": False, "message": "outer"}, BUSINESS, {"a": [S3]}),
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
    "some odd files": ({"output": 1, "files": {"a": [5, S3, None], "b": S3 + "2"}}, 1, {"a": [S3], "b": [S3 + "2"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_function_gave_is_found_in_every_shape_of_output(name: str) -> None:
    output, value, files = OUTPUTS[name]
    value = output if value is ... else value
    result = PrefabResult(CallStatus.SUCCESS, output)
    assert (result.get_function_result(), type(result.get_function_result())) == (value, type(value))
    is_named = isinstance(output, dict) and "result" in output
    assert result.get_result() == (output["result"] if is_named else output)
    fields = value if isinstance(value, dict) else {}
    told = (result.get_business_success(), result.get_business_message(), result.get_business_error(),
            result.get_business_error_code())  # fmt: skip
    assert told == (fields.get("success", False), fields.get("message", ""), fields.get("error"),
                    fields.get("error_code"))  # fmt: skip
    assert (result.get_files(), result.get_file_urls()) == (files, [url for urls in files.values() for url in urls])
    assert result.get("no such key", "default") == "default"


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


@pytest.mark.parametrize("error", ["text", ["list"], 5], ids=repr)
def test_an_error_of_a_call_that_is_no_object_is_its_message(error: Any) -> None:
    with Script(ran(status="FAILED", error=error)) as server:
        assert run(client_of(server)).error == {"message": str(error)}


def test_numbers_that_json_does_not_have_do_not_cost_a_paid_answer() -> None:
    body = b'{"job_id": "j", "status": "COMPLETED", "results": [{"status": "SUCCESS", "output": {"output": [%b]}}]}'
    given = answer(body=body % b"NaN, Infinity, -Infinity, 1")
    with Script(given, given, chunked(b'data: {"type": "content", "data": NaN}\n\n', event("done"))) as server:
        client = client_of(server)
        for value in (run(client).get_function_result(), next(run(client, stream=True)).data["output"]):
            assert math.isnan(value[0]) and value[1:] == [math.inf, -math.inf, 1]
        assert math.isnan(next(run(client, stream=True)).data)


def test_a_directory_entry_may_lack_nearly_everything() -> None:
    same = {"version": "1.0.0", "name": "P", "description": "d", "tags": ["t"], "functions": [{"name": "f"}],
            "requires_secrets": True, "secrets": [{"name": "KEY"}], "is_official": True, "author": "a"}  # fmt: skip
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
    "model": (type("Model", (), {"model_dump": 1, "__repr__": lambda _: "hush"})(), ["Model", "model_dump()"]),
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
NO_FILES = [{"v": "s3://b/k"}, {"v": ["/tmp/a.mp4"]}, {"v": ["https://b/k"]}, {"v": [Path("a.mp4")]}, {"v": None},
            {"v": [S3, "a.mp4"]}, {"v": ["s3://"]}, {"v": {S3: 1}}]  # fmt: skip
# What is wrong with a call, and the words that tell so.
BAD_CALLS: list[tuple[dict[str, Any], list[str]]] = [
    ({"prefab_id": ""}, ["prefab_id"]), ({"version": None}, ["version"]), ({"version": 1.1}, ["version", "1.1"]),
    ({"function_name": 77}, ["function_name", "77"]), ({"parameters": ["list"]}, ["parameters"]),
    ({"parameters": {"fine": 1, "culprit": LOOP}}, ["culprit"]),
    *(({"parameters": PLACES["rows[0].when"](value)}, [" rows[0].when ", *words]) for value, words in NO_JSON.values()),
    *(({"parameters": fill(date(2024, 1, 1))}, [f" {place} ", "isoformat()"]) for place, fill in PLACES.items()),
    ({"files": [S3]}, ["files"]), ({"files": S3}, ["files"]),
    *(({"files": files}, ["upload_input_file"]) for files in NO_FILES),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD_CALLS, ids=ascii)
def test_a_call_that_cannot_be_sent_is_refused_with_its_reason(change: dict[str, Any], words: list[str]) -> None:
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
            assert all(word in str(caught.value) for word in words) and "hush" not in all_of(caught.value)
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
    "dict in a batch": (lambda c: c.run_batch([{"prefab_id": "p"}]), r"PrefabCall\(\*\*"),
    "dict in a single request": (lambda c: c.run_batch([call(), {"prefab_id": "p"}], single_request=True),
                                 r"PrefabCall\(\*\*"),
    "no workers": (lambda c: c.run_batch([call()], max_workers=0), "max_workers"),
    "no executor": (lambda c: c.run_batch([], executor=5), "executor"),
    "single request on an executor": (
        lambda c: c.run_batch([call()], single_request=True, executor=concurrent.futures.Executor()), "executor"),
    "on_result that is no function": (lambda c: c.run_batch([call()], on_result="print"), "on_result"),
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
    "input of a type with a line break": (lambda c: c.upload_input_file(__file__, "a/b\r\nX: y"), "content_type"),
    "no session": (lambda c: c.cleanup_temp_files(""), "session_id"),
    "no name of a secret": (lambda c: c.set_secret("p", "", "v"), "secret_name"),
    "no secret": (lambda c: c.set_secret("p", "KEY", None), "secret_value"),
    "huge number as limit": (lambda c: c.list_files(limit=10**5000), "limit"),
    "list as time": (lambda c: c.upload_temp_file(__file__, ttl=[[]] * 3), "ttl"),
    "huge number as files": (lambda c: c.run("p", "1", "f", files={"a": 10**5000}), "files"),
    "object as URL": (lambda c: c.download_file(object(), "x"), "s3_url"),
    "half a surrogate pair in a query": (lambda c: c.list_files(continuation_token="\ud800"), "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_an_argument_that_cannot_be_used_is_refused_briefly_and_with_the_way_out(name: str) -> None:
    act, words = BAD_ARGUMENTS[name]
    with Script() as server, client_of(server) as client, pytest.raises((ValidationError, TypeError)) as caught:
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
        "", "gateway", "gateway:80", "//gateway", "ftp://gateway", "http://", "http:///v1", "https://:80",
        "http://gate way", "http://gateway:port", "http://gateway:99999", "http://gateway:0", "http://me:pw@gateway",
        "http://gateway?a=1", "http://gateway#a", "http://gateway/?", "http://gateway/p#", 5, b"http://gateway",
        "http://gate\nway", "ht\ntp://gateway", *(f"http://gateway/a{blank}b" for blank in ("\n", "\r", "\t", " \n")))),
     *(("timeout", value) for value in (0, -1, True, "5", float("nan"), float("inf"), 2**31 / 1000)),
     ("max_retries", -1), ("max_retries", 1.5), ("max_retries", True), ("ssl_context", "x")],
    ids=repr,
)  # fmt: skip
def test_an_option_that_cannot_be_used_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        GatewayClient(**{"base_url": "http://gateway.example", name: value})


@pytest.mark.parametrize("from_environment", [False, True], ids=["given", "from the environment"])
def test_blanks_around_base_url_never_get_into_the_path(from_environment: bool, monkeypatch: Patch) -> None:
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


PAIRS_AND_ALL = [*itertools.combinations(NAMES, 2), NAMES, *itertools.combinations(VARIABLES, 2), VARIABLES]


@pytest.mark.parametrize("names", PAIRS_AND_ALL, ids="+".join)
def test_more_than_one_credential_is_an_error(names: Any, monkeypatch: Patch) -> None:
    options = {name: "hush" for name in names if name in NAMES}
    for name in set(names) - set(options):
        monkeypatch.setenv(name, "hush")
    make: Any = GatewayClient if options else GatewayClient.from_env
    with pytest.raises(ValidationError) as caught:
        make(base_url="http://gateway.example", **options)
    assert "hush" not in text_of(caught.value).lower()


@pytest.mark.parametrize("options", [{"jwt_token": "j"}, {"internal_token": "i"}, {"api_key": "k"}], ids=str)
def test_an_exchanged_key_allows_no_second_credential(options: Any) -> None:
    with Script() as server, pytest.raises(TypeError):
        GatewayClient.from_api_key("key-1", server.url, **options)
    assert not server.received


# --- Requests -------------------------------------------------------------------------------------


class Endpoint(NamedTuple):
    """A method of the client, the one request that it sends (RUN: the mode's path), and a fitting answer."""

    act: Callable[[GatewayClient], Any]
    request: str
    content: Any
    given: bytes

    @property
    def asked(self) -> str:
        """How messages name the request of a client with an agent's token."""
        return self.request.partition("?")[0].replace("RUN", "/v1/internal/run")


BODY = {"prefab_id": "p", "version": "1.0.0", "function_name": "f", "inputs": {"parameters": {"n": 1}}}
BODY_WITH_FILES = {**BODY, "inputs": {"parameters": {}, "files": {"video": [S3]}}}
PAGE = answer({"files": []})
GONE = answer(status=204, body=b"")
ENDPOINTS = {
    "run": Endpoint(run, "POST RUN", {"calls": [BODY]}, ran()),
    "run with files": Endpoint(
        lambda c: c.run("p", "1.0.0", "f", files={"video": [S3]}), "POST RUN", {"calls": [BODY_WITH_FILES]}, ran()),
    "stream": Endpoint(lambda c: list(run(c, stream=True)), "POST RUN", {"calls": [BODY]}, ran()),
    "prefab": Endpoint(lambda c: c.prefab("p", "1.0.0").f(n=1), "POST RUN", {"calls": [BODY]}, ran()),
    "batch": Endpoint(lambda c: c.run_batch([call(1)]), "POST RUN", {"calls": [BODY]}, ran()),
    "single request": Endpoint(
        lambda c: c.run_batch([call(1), PrefabCall("p", "1.0.0", "f", {}, {"video": [S3]})], single_request=True),
        "POST RUN", {"calls": [BODY, BODY_WITH_FILES]}, answer({"results": [{}, {}]})),
    "directory": Endpoint(lambda c: c.list_prefabs(), "GET /v1/prefabs", None, answer([])),
    "directory by status": Endpoint(
        lambda c: c.list_prefabs(status="failed"), "GET /v1/prefabs?status=failed", None, answer([])),
    "spec": Endpoint(lambda c: c.get_prefab_spec("p", "1.0.0"), "GET /v1/prefabs/p/1.0.0/spec", None, answer({})),
    "set a secret": Endpoint(
        lambda c: c.set_secret("p", "KEY", "v"), "POST /v1/secrets",
        {"prefab_id": "p", "secret_name": "KEY", "secret_value": "v"}, GONE),
    "delete a secret": Endpoint(lambda c: c.delete_secret("p", "KEY"), "DELETE /v1/secrets/p/KEY", None, GONE),
    "list secrets": Endpoint(lambda c: c.list_secrets(), "GET /v1/secrets", None, answer({"secrets": []})),
    "list a prefab's secrets": Endpoint(
        lambda c: c.list_secrets("p"), "GET /v1/secrets/p", None, answer({"prefab_id": "p", "secret_names": ["KEY"]})),
    "presigned URL": Endpoint(
        lambda c: c.get_presigned_url(S3),
        f"GET /internal/files/download?s3_url={S3}&mode=presigned&expires_in=3600", None,
        answer({"presigned_url": "http://h/"})),
    "list files": Endpoint(lambda c: c.list_files(), "GET /internal/files/list?limit=100", None, PAGE),
    "list files from a page on": Endpoint(
        lambda c: c.list_files(5, "next"), "GET /internal/files/list?limit=5&continuation_token=next", None, PAGE),
    "list temporary files": Endpoint(
        lambda c: c.list_temp_files(), "GET /internal/files/list_temp?limit=100", None, PAGE),
    "list a session's files": Endpoint(
        lambda c: c.list_temp_files("s", 7, "next"),
        "GET /internal/files/list_temp?limit=7&session_id=s&continuation_token=next", None, PAGE),
    "clean up": Endpoint(
        lambda c: c.cleanup_temp_files("s"), "DELETE /internal/files/cleanup_temp?session_id=s", None,
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
        headers.update({"content-type": "application/json", "content-length": str(len(received.body))})
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
    with Script(NO_BODY) as storage, Script(answer({"presigned_url": storage.url + signed})) as server:
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


@pytest.mark.parametrize(
    ("value", "segment"),
    [("a/b", "a%2Fb"), ("a b", "a%20b"), ("a?b#c", "a%3Fb%23c"), ("100%", "100%25"), ("%2F", "%252F"),
     ("ü你", "%C3%BC%E4%BD%A0"), ("a+b", "a%2Bb"), ("...", "..."), ("../x", "..%2Fx")],
)  # fmt: skip
def test_an_id_stays_one_segment_of_the_path(value: str, segment: str) -> None:
    with Script(*[answer({"secret_names": []})] * len(ID_TAKERS)) as server:
        for take in ID_TAKERS.values():
            take(client_of(server), value)
    assert [received.target for received in server.received] == [path.replace("ID", segment) for path in ID_TAKERS]


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


INTERIM_AND_ANSWER = b"HTTP/1.1 103 Early Hints\r\n\r\n" + answer(body=b"0123456789")
# An inner way of `http.client`: what is sent, what is done with the answer after `begin`, and what comes of it.
WAYS: dict[str, tuple[bytes, Callable[[Any], Any], Any]] = {
    "reads from what makefile gives": (INTERIM_AND_ANSWER, lambda r: r.fp is r.given, True),
    "begin stops at an interim answer": (INTERIM_AND_ANSWER, lambda r: r.status, 103),
    "begin reads no head while there are headers": (INTERIM_AND_ANSWER, lambda r: [r.begin(), r.status], [None, 103]),
    "begin reads a head while headers is None": (
        INTERIM_AND_ANSWER, lambda r: [setattr(r, "headers", None), r.begin(), r.status], [None, None, 200]),
    "length is what the head says": (answer(body=b"0123456789"), lambda r: r.length, 10),
    "length counts down": (answer(body=b"0123456789"), lambda r: [r.read1(4), r.length], [b"0123", 6]),
    "length is None with chunks": (HEAD, lambda r: [r.length, r.chunked, r.will_close], [None, True, False]),
    "length is None without a head's word": (OK + b"\r\n", lambda r: [r.length, r.chunked], [None, False]),
    "will_close is false with a length": (answer(body=b""), lambda r: r.will_close, False),
    "will_close is true where only the end tells": (OK + b"\r\n", lambda r: r.will_close, True),
    "will_close is true where the head says so": (answer(Connection="close"), lambda r: r.will_close, True),
    "read1 returns what is there": (HEAD + chunk(b"first"), lambda r: r.read1(99), b"first"),
    "read1 returns nothing at the end": (chunked(b"all"), lambda r: [r.read1(99), r.read1(99)], [b"all", b""]),
}


@pytest.mark.parametrize("way", WAYS)
def test_http_client_still_has_the_inner_way_that_the_sdk_relies_on(way: str) -> None:
    """On an answer of `http.client` itself, so that it names what another Python changed."""
    sent, act, expected = WAYS[way]
    ours, peer = socket.socketpair()
    ours.settimeout(WAIT_SECONDS)
    with ours, peer, ours.makefile("rb") as file:
        like_a_socket: Any = types.SimpleNamespace(makefile=lambda _mode: file)  # all that it needs of one
        with http.client.HTTPResponse(like_a_socket) as response:
            vars(response)["given"] = file
            peer.sendall(sent)
            response.begin()
            assert act(response) == expected


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
    [(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + answer([]), True),
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


def test_connections_that_were_idle_for_too_long_are_dropped(tmp_path: Path, monkeypatch: Patch) -> None:
    assert gateway_sdk._IDLE_SECONDS == 4
    monkeypatch.setattr(gateway_sdk, "_IDLE_SECONDS", 3600.0)
    with Script(answer(body=b"data")) as storage:
        with Script(answer({"presigned_url": storage.url}), ran(), ran()) as server, client_of(server) as client:
            client.download_file(S3, tmp_path / "f")
            run(client)
            assert (server.connections, storage.open_connections) == (1, 1)
            monkeypatch.setattr(gateway_sdk, "_IDLE_SECONDS", 0.0)
            run(client)
            assert server.connections == 2
            storage.wait_until(lambda: storage.open_connections == 0)  # though nothing more is asked of it


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


@cpython_only
def test_a_connection_is_kept_alive_below_http_while_a_call_takes_its_time(script: Any) -> None:
    def peer_port(sock: Any) -> int:
        with contextlib.suppress(OSError, IndexError):
            return sock.getpeername()[1]
        return 0

    with script(Pause(OPEN_STREAM)) as server, client_of(server) as client, run(client, stream=True):
        sockets = [thing for thing in gc.get_objects() if isinstance(thing, socket.socket)]
        (sock,) = [sock for sock in sockets if sock.fileno() >= 0 and peer_port(sock) == server.port]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert 0 < sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60


# The first answer, with which the server sends more, in one TLS record; and how the client gets it.
FIRST: dict[str, tuple[bytes, Callable[[GatewayClient], Any]]] = {
    "length": (ran("first"), run),
    "long body": (ran("." * 12_000), run),  # longer than the reader's buffer: the stray one stays in the socket
    "chunks": (chunked(ran("first").partition(b"\r\n\r\n")[2], content_type="application/json"), run),
    "stream": (chunked(event("done")), lambda c: list(run(c, stream=True))),
    "no body": (NO_BODY, lambda c: c.delete_secret("p", "KEY")),
}
STRAYS = {"whole answer": ran("stray"), "half an answer": ran("stray")[:30], "line end": b"\r\n"}


@pytest.mark.parametrize(
    ("first", "stray"), [*((first, "whole answer") for first in FIRST), *(("length", stray) for stray in STRAYS)]
)
def test_bytes_behind_an_answer_are_never_the_next_calls_answer(first: str, stray: str, script: Any) -> None:
    given, act = FIRST[first]
    with script(given + STRAYS[stray], ran("second"), ran("second")) as server:
        client = client_of(server, max_retries=0)
        act(client)
        assert run(client).get_function_result() == run(client).get_function_result() == "second"
    assert [received.connection for received in server.received] == [0, 1, 1]


def test_a_5xx_whose_connection_dies_unannounced_costs_no_other_call_of_a_batch() -> None:
    def die(sock: socket.socket) -> None:
        sock.recv(65536)  # the next request, if there is one, is never answered
        raise OSError

    bad = Steps((send(answer(body=b"Internal Server Error", status=500, Content_Type="text/plain")), die))
    with Script(*[bad if number % 20 == 7 else ran(number) for number in range(100)]) as server:
        batch = client_of(server).run_batch([call(number) for number in range(100)])
    assert [result.exception.status_code for result in batch.get_failed() if result.exception] == [500] * 5
    assert len(batch.get_failed()) == 5 and len(server.received) == 100


@pytest.mark.parametrize(("variable", "login"), [("HTTP_PROXY", ""), ("http_proxy", "user:p%40ss@")])
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


def test_https_goes_through_a_tunnel(certificate: Path, trusting: ssl.SSLContext, monkeypatch: Patch) -> None:
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
    assert connect.headers["proxy-authorization"] == "Basic " + base64.b64encode(b"user:p@ss").decode()
    assert b"proxy-auth" not in inside[0].lower() and inside[0].startswith(b"POST /v1/run HTTP/1.1")


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
    assert server.connections == 1 and not delays and not server.received and not caught.value.may_have_run


def test_https_to_an_http_port_is_told_and_not_tried_again(delays: list[float]) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(answer({"detail": "what?"}, 400, Connection="close"))

    with Raw(serve) as server, pytest.raises(ServiceUnavailableError, match="http://"):
        run(GatewayClient(f"https://127.0.0.1:{server.port}"))
    assert server.connections == 1 and not delays


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


def test_waits_for_a_connection_double_from_one_second_up_to_eight(refusing: str, real_delays: list[float]) -> None:
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


def test_other_waits_double_from_half_a_second_up_to_eight(real_delays: list[float]) -> None:
    with Script(*[UNAVAILABLE] * 40 * 6) as server, client_of(server, max_retries=5) as client:
        for _ in range(40):
            with pytest.raises(ServiceUnavailableError):
                client.list_prefabs()
    for attempt, cap in enumerate([0.5, 1, 2, 4, 8]):
        assert cap / 2 < max(real_delays[attempt::5]) <= cap


def test_a_redirect_is_followed_also_to_another_host_but_not_from_https_to_http(
    certificate: Path, trusting: ssl.SSLContext, tmp_path: Path
) -> None:
    options: Any = {"ssl_context": trusting, "timeout": WAIT_SECONDS}
    with Script() as plain, TlsScript(certificate, moved(plain.url)) as storage:
        with Script(answer({"presigned_url": storage.url + "/o?sig=1"})) as server:
            with client_of(server, **options) as client, pytest.raises(GatewayError, match="https to http"):
                client.download_file(S3, tmp_path / "f")
    assert not plain.connections
    with TlsScript(certificate, answer(body=b"data")) as secure:
        with Script(LINK, moved("else?where"), moved(f"{secure.url}/there?sig=2")) as server:
            with client_of(server, **options) as client:
                client.download_file(S3, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"data"
    assert (server.received[2].target, secure.received[0].target) == ("/bucket/else?where", "/there?sig=2")
    assert not CREDENTIAL_HEADERS & {*secure.received[0].headers}


@pytest.mark.parametrize(
    ("location", "target"),
    [("/b\u00fccket/\u4f60.bin?sig=\u00e9", "/b%C3%BCcket/%E4%BD%A0.bin?sig=%C3%A9"),
     ("/a%20b/%C3%BC", "/a%20b/%C3%BC"), ("/a b", "/a%20b")],
    ids=["UTF-8", "encoded", "space"],
)  # fmt: skip
def test_a_redirect_leads_where_its_location_says_also_in_raw_utf_8(location: str, target: str, tmp_path: Path) -> None:
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
    assert {(record.levelname, record.name) for record in caplog.records} == {("DEBUG", "gateway_sdk")}
    lines = [record.getMessage() for record in caplog.records]
    listing, call_ = r"GET /internal/files/list\b.*", r"POST /v1/internal/run\b.*"
    expected = [listing + "503.* 1", listing + "200.* 2", call_ + "200.* 1", call_ + " 1"]
    requests = [line for line in lines if " ms" in line]
    assert len(requests) == 4 and all(map(re.match, expected, requests)), requests
    (reason,) = [line for line in lines if " ms" not in line]
    assert "503" in reason and "down" in reason and "page-2" not in caplog.text


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
    assert all(isinstance(error, GatewayTimeoutError) and not error.may_have_run for error in errors)
    assert len([received for received in server.received if is_exchange(received)]) == 2


def test_after_an_exchange_that_failed_the_next_call_tries_again() -> None:
    failed = answer({"detail": "no"}, 500)
    with Script(TOKEN_ANSWERS[0], REFUSED, failed, REFUSED, TOKEN_ANSWERS[1], ran()) as server:
        client = GatewayClient.from_api_key("key-1", server.url, timeout=WAIT_SECONDS)
        with pytest.raises(ServiceUnavailableError):
            run(client)
        assert run(client).is_success()
    tokens = [received.headers.get("x-internal-token") for received in server.received]
    assert tokens == [None, "first", None, "first", None, "second"]


@pytest.mark.parametrize(
    "act",
    [lambda c: c.list_prefabs(), lambda c: list(run(c, stream=True)), lambda c: c.run_batch([call()]),
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
    with Script(TOKEN_ANSWERS[0], REFUSED, TOKEN_ANSWERS[1], REFUSED) as server, pytest.raises(AuthenticationError):
        run(GatewayClient.from_api_key("key-1", server.url))
    assert len(server.received) == 4


@pytest.mark.parametrize(
    ("given", "status"),
    [(REFUSED, 401), (answer({"detail": "x"}, 400), 400),
     *((answer(content), 200) for content in ({}, [], {"internal_token": 5}, {"token": "hush-hush"}, ["hush-hush"],
                                              {"internal_token": {"value": "hush-hush"}})),
     *((answer({"internal_token": token}), None) for token in ("", "hush\nhush")),
     *((answer(body=body), 200) for body in (
         b"<html>", b"hush-hush", b'{"internal_token": "hush-hush', b'{"internal_token": "hush-hush\xff"}',
         b'{"internal_token": "hush-hush"} x'))],
    ids=ascii,
)  # fmt: skip
def test_an_exchange_that_gives_no_good_token_is_an_error_that_shows_none_and_keeps_no_connection(
    given: bytes, status: int | None
) -> None:
    with Script(given) as server:
        with pytest.raises(GatewayError) as caught:
            GatewayClient.from_api_key("key-1", server.url)
        server.wait_until(lambda: server.open_connections == 0)  # though the error is kept, and the frames in it
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
}  # fmt: skip
TOLD = [(who, echo) for number, who in enumerate(WHO) for place, echo in enumerate(ECHOES) if number < 3 or place < 4]


def values_of(batch: BatchResult) -> list[Any]:
    """What the calls of a batch gave. Raises what one of them would have raised."""
    assert "hush" not in repr(batch).lower()
    for failed in batch.get_failed():
        assert failed.exception
        raise failed.exception
    return [result.get_function_result() for result in batch.results]


@pytest.mark.parametrize(("who", "echo"), TOLD)
def test_no_secret_is_shown_anywhere(who: str, echo: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown: list[Any] = []
    before = [link(f"X-Sig={QUOTED}&X-Expires=5")] if who.startswith("presigned") else []
    with Script(*before, *[ECHOES[echo](HIDDEN)] * 3) as server:
        try:
            WHO[who](server.url, tmp_path / "f")
        except GatewayError as error:
            shown += [str(error), repr(error), error.args, vars(error), text_of(error), pickle.dumps(error)]
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
    assert "invalid ***" in str(error_of(run, answer({"detail": "invalid id"}, 400), internal_token="id"))


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
    "HTML of Jinja": lambda text: html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
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
    with Script(refused, *(answer([], Content_Encoding=name) for name in ("Identity", ""))) as server:
        client = client_of(server)
        with pytest.raises(AuthenticationError):
            run(client)
        assert client.list_prefabs() == client.list_prefabs() == []


def test_a_file_that_was_stored_encoded_comes_as_it_is(tmp_path: Path) -> None:
    with Script(link("a=1"), answer(body=b"\x1f\x8b...", Content_Encoding="gzip")) as server:
        client_of(server).download_file(S3, tmp_path / "f.gz")
    assert (tmp_path / "f.gz").read_bytes() == b"\x1f\x8b..."


def test_a_timeout_that_was_set_later_is_checked_too() -> None:
    with Script() as server, client_of(server) as client:
        client.timeout = "soon"  # type: ignore[assignment]
        with pytest.raises(ValidationError, match="timeout"):
            client.list_prefabs()


def test_almost_a_secret_does_not_take_long_to_tell_from_it() -> None:
    """It would take longer than the world is old if each special character had two patterns that match it."""
    almost = "a/=+& \\\\\\" * 60
    with Script(answer({"detail": f"{almost} is too short"}, 422)) as server, client_of(server) as client:
        with pytest.raises(ValidationError, match="is too short"):
            client.set_secret("p", "S", f"{almost}END")


SIGNED = "https://s3/b/k?X-Sig=hush-hush"


@pytest.mark.parametrize(("status", "body", "shown"), [
    *((401, f'{{"detail": {{"message": "bad {escaped}", "list": ["{escaped}"], "{escaped}": 1}}}}', "bad ***")
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


@pytest.mark.parametrize(("echo", "shown"), [
    ("a+b/c=HUSH-HUSH", "***"), ("a b/c=HUSH-HUSH", "***"), ("SECOND-HUSH", "***"),
    ("host? 600 0123456789abcdef", "host? 600 ***"),  # short words are no secrets
])
def test_both_urls_of_a_redirect_are_hidden_but_not_their_short_words(echo: str, shown: str, tmp_path: Path) -> None:
    query = "Sig=a+b/c=HUSH-HUSH&T=a%20b/c=HUSH-HUSH&Expires=600&Signed=host&Signature=0123456789abcdef"
    answers = (link(query), answer(status=302, Location="/z?t=SECOND-HUSH"), answer({"detail": f"it was {echo}"}, 403))
    with Script(*answers) as server, pytest.raises(GatewayError, match=re.escape(f"it was {shown}")) as caught:
        client_of(server).download_file(S3, tmp_path / "f")
    assert "HUSH" not in text_of(caught.value)


# --- Event stream ---------------------------------------------------------------------------------

WHOLE_STREAM = chunked(event("content", 1), event("done"))
OPEN_STREAM = HEAD + chunk(event("content", 1) + event("content", 2))  # nothing more comes


def test_each_event_is_handed_over_when_it_has_arrived() -> None:
    taken = [threading.Event() for _ in range(3)]
    steps: list[Any] = [send(HEAD)]
    for number, gate in enumerate(taken):
        steps += [send(chunk(event("content", number))), lambda _, gate=gate: gate.wait(WAIT_SECONDS)]
    with Script(Steps((*steps, send(b"0\r\n\r\n")))) as server:
        for number, received in enumerate(run(client_of(server), stream=True)):
            assert received.data == number and not taken[number].is_set()
            taken[number].set()
    assert all(gate.is_set() for gate in taken)


def parsed(*chunks: bytes) -> list[tuple[str, Any]]:
    return [(str(event.type), event.data) for event in gateway_sdk._parse_events(iter(chunks))]


def content(*values: Any) -> list[tuple[str, Any]]:
    return [("content", value) for value in values]


A, B = b'{"type": "content", "data": "a"}', b'{"type": "content", "data": "b"}'
FORMATS = {
    "lf": (b"data: %b\n\ndata: %b\n\n" % (A, B), content("a", "b")),
    "lf-crlf": (b"data: %b\n\r\ndata: %b\r\n\n" % (A, B), content("a", "b")),
    "cr-crlf": (b"data: %b\r\r\ndata: %b\r\n\r" % (A, B), content("a", "b")),
    "crlf-then-lf": (b"data: one\r\n\ndata: two\r\n\n", content("one", "two")),
    "cr-lf-are-one-end": (b"data: 1\r\ndata: 2\r\n\r\n", content(1, 2)),
    "many-blank-lines": (b"\n\n\n\r\r\n\ndata: %b\n\n\n\n\n\ndata: %b\n\n" % (A, B), content("a", "b")),
    "no-space": (b"data:%b\n\n" % A, content("a")),
    "one-space-only-is-taken": (b"data:  text \n\n", content(" text ")),
    "several-data-lines": (b'data: {"type": "content",\ndata: "data": "a"}\n\n', content("a")),
    "empty-data-line-between": (b"data: one\ndata\ndata: two\n\n", content("one\n\ntwo")),
    "event-field": (b"event: progress\ndata: 5\n\n", [("progress", 5)]),
    "event-field-does-not-last": (b"event: progress\ndata: 5\n\ndata: 6\n\n", [("progress", 5), ("content", 6)]),
    "event-field-of-text": (b"event: error\ndata: it broke\n\n", [("error", "it broke")]),
    "type-wins-over-event-field": (b"event: progress\ndata: %b\n\n" % A, content("a")),
    "id-and-retry": (b"id: 7\nretry: 100\ndata: %b\nid\nretry: x\n\n" % A, content("a")),
    "unknown-field": (b"datum: 1\nDATA: 2\n data: 3\ndata : 4\ndata: %b\n\n" % A, content("a")),
    "comments": (b": keep-alive\n\n:\n\n:data: 9\ndata: %b\n: x\n\n" % A, content("a")),
    "comment-inside": (b"data: one\n: x\ndata: two\n\n", content("one\ntwo")),
    "byte-order-mark": (b"\xef\xbb\xbfdata: %b\n\n" % A, content("a")),
    "second-byte-order-mark": (b"\xef\xbb\xbf\xef\xbb\xbfdata: 1\n\ndata: %b\n\n" % A, content("a")),
    "later-byte-order-mark": (b"data: %b\n\n\xef\xbb\xbfdata: 1\n\n" % A, content("a")),
    "utf-8": ("data: {\"data\": \"äß€😀\"}\n\ndata: ü€😀\n\n".encode(), content({"data": "äß€😀"}, "ü€😀")),
    "not-utf-8": (b"data: a\xffb\n\n", content("a\ufffdb")),
    "other-line-separators": ("data: a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\n\n".encode(),
                              content("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg")),
    "line-separator-in-json": ('data: {"type": "content", "data": "a\u2028b"}\n\n'.encode(), content("a\u2028b")),
    "no-data": (b"event: done\n\nid: 1\n\ndata:\n\ndata: %b\n\n" % A, content("a")),
    "blank-lines-left-out": (b"data: %b\ndata: %b\ndata: [DONE]\n" % (A, B),
                             [*content("a", "b"), ("done", "[DONE]")]),
    "one-line-not-json": (b"data: %b\ndata: b\n\n" % A, content(A.decode() + "\nb")),
    "done-marker": (b"data: %b\n\ndata: [DONE]\n\n" % A, [("content", "a"), ("done", "[DONE]")]),
    "not-json": (b"data: hello\n\n", content("hello")),
    "json-with-a-tail": (b"data: %b tail\n\n" % A, content(A.decode() + " tail")),
    "json-with-white-space": (b"data: \t %b \t\n\n" % A, content("a")),
    "json-without-type": (b'data: {"text": "a"}\n\n', content({"text": "a"})),
    "json-not-an-object": (b'data: [1]\n\ndata: "s"\n\ndata: null\n\ndata: 0\n\n', content([1], "s", None, 0)),
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
def test_the_event_stream_format_is_read_however_the_bytes_are_cut(stream: bytes, expected: Any) -> None:
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
    assert (next(events).data, len(taken)) == (1, 3)
    assert (next(events).data, len(taken)) == (2, 5)
    assert list(events) == []


def test_an_event_keeps_its_whole_object() -> None:
    raw = {"type": "error", "data": {"message": "m"}, "error_code": "E"}
    known = StreamEvent.from_dict(raw)
    assert (known.type, known.data, known.raw) == (StreamEventType.ERROR, {"message": "m"}, raw)
    unknown = StreamEvent.from_dict({"type": "thought", "data": 1})
    assert (unknown.type, unknown.data, unknown.raw["type"]) == ("content", 1, "thought")


@pytest.mark.parametrize("odd", [5, None, ["content"], {"a": 1}, True, 1.5], ids=repr)
def test_an_event_whose_type_is_no_text_is_content_with_its_data(odd: Any) -> None:
    (first,) = gateway_sdk._parse_events(iter([b"data: %b\n\n" % json.dumps({"type": odd, "data": 1}).encode()]))
    assert (first.type, first.data, first.raw) == (StreamEventType.CONTENT, 1, {"type": odd, "data": 1})
    assert StreamEvent.from_dict(first.raw) == first


DONE, ERROR = ("done", None), ("error", "x")
A_EVENT, HALF = b"data: %b\n\n" % A, b'data: {"type": "content", "data": "b'
# The answer, the events that are read from it, and the error behind them.
ENDS: dict[str, tuple[Answer, list[tuple[str, Any]], type[GatewayError] | None]] = {
    "chunked-done": (chunked(A_EVENT, event("done")), [*content("a"), DONE], None),
    "chunked-without-last-blank-line": (chunked(A_EVENT[:-2]), content("a"), None),
    "chunked-nothing": (chunked(), [], None),
    "length-done": (whole(A_EVENT + event("done"), STREAM), [*content("a"), DONE], None),
    "unframed-done": (unframed(A_EVENT + event("done"), STREAM), [*content("a"), DONE], None),
    "unframed-done-without-blank-line": (
        unframed(A_EVENT + event("done").strip(), STREAM), [*content("a"), DONE], None),
    "unframed-error": (unframed(A_EVENT + event("error", "x"), STREAM), [*content("a"), ERROR], None),
    "unframed-without-done": (unframed(A_EVENT, STREAM), content("a"), ServiceUnavailableError),
    "unframed-nothing": (unframed(b"", STREAM), [], ServiceUnavailableError),
    "unframed-in-an-event": (unframed(A_EVENT + HALF, STREAM), content("a"), ServiceUnavailableError),
    "events-after-done": (chunked(event("done"), A_EVENT), [DONE, *content("a")], None),
    "events-after-error-and-done": (
        chunked(event("error", "x"), A_EVENT, event("done")), [ERROR, *content("a"), DONE], None),
    "cut": (HangUp(chunked(A_EVENT, end=False)), content("a"), ServiceUnavailableError),
    "cut-in-a-chunk": (HangUp(chunked(A_EVENT, HALF, end=False)[:-9]), content("a"), ServiceUnavailableError),
    "bad-chunk": (HangUp(chunked(A_EVENT, end=False) + b"-1\r\n"), content("a"), ServiceUnavailableError),
    "silence": (Pause(chunked(A_EVENT, end=False)), content("a"), GatewayTimeoutError),
    "done-then-cut": (HangUp(chunked(A_EVENT, event("done"), end=False)), [*content("a"), DONE], None),
    "done-then-silence": (Pause(chunked(A_EVENT, event("done"), end=False)), [*content("a"), DONE], None),
    "error-then-cut": (HangUp(chunked(event("error", "x"), end=False)), [ERROR], None),
    "error-and-content-then-cut": (
        HangUp(chunked(event("error", "x"), A_EVENT, end=False)), [ERROR, *content("a")], ServiceUnavailableError),
    "done-cut-before-the-blank-line": (
        HangUp(chunked(A_EVENT, event("done")[:-1], end=False)), content("a"), ServiceUnavailableError),
}


@pytest.mark.parametrize(("given", "events", "error"), ENDS.values(), ids=ENDS)
def test_a_stream_never_just_ends_as_if_it_were_complete(given: Answer, events: list[Any], error: Any) -> None:
    """Neither where its events are read one by one, nor where its result is asked for."""
    timeout = SHORT_SECONDS if isinstance(given, Pause) else WAIT_SECONDS
    contents = [data for kind, data in events if kind == "content"]
    got, raised = [], None
    with nothing_left(), Script(given, given) as server, client_of(server, timeout=timeout) as client:
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


@pytest.mark.parametrize(("timeout", "after_done"), [(None, SHORT_SECONDS), (SHORT_SECONDS, 10 * WAIT_SECONDS)])
def test_after_done_the_shorter_of_two_times_is_waited(
    timeout: float | None, after_done: float, monkeypatch: Patch
) -> None:
    """The client's timeout, or that for what has said that it is done; then the client hangs up."""
    hung_up = []

    def serve(sock: socket.socket) -> None:
        sock.sendall(chunked(event("done"), end=False))
        sock.settimeout(WAIT_SECONDS)
        hung_up.append(sock.recv(1))

    monkeypatch.setattr(gateway_sdk, "_AFTER_DONE_SECONDS", after_done)
    with Script(Steps((serve,))) as server, client_of(server, timeout=timeout) as client:
        assert [event.type for event in run(client, stream=True)] == ["done"]
    assert hung_up == [b""]


def test_all_ways_to_read_a_stream_can_be_mixed() -> None:
    events = [event("content", number) for number in range(6)]
    with Script(chunked(*events, event("done"))) as server:
        stream = run(client_of(server), stream=True)
        assert isinstance(stream, EventStream) and iter(stream) is stream
        assert [received.data for received in itertools.islice(stream, 1)] == [0]
        assert next(stream).data == 1
        assert [(one.data, two.data) for one, two in itertools.islice(zip(stream, stream), 1)] == [(2, 3)]
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
# The events of a call for a result; and its value, its files, and its error.
RESULTS_OF_EVENTS: dict[str, tuple[list[bytes], Any, Any, Any]] = {
    "texts": ([event("content", "a "), event("content", "b")], "a b", {}, None),
    "one text": ([A_TEXT, event("done", "x")], "a", {}, None),
    "objects": ([event("content", {"n": 1}), event("content", {"n": 2})], [{"n": 1}, {"n": 2}], {}, None),
    "mixed": ([A_TEXT, event("content", 1)], ["a", 1], {}, None),
    "done with an object": ([event("progress", 1), event("done", {"n": 1})], {"n": 1}, {}, None),
    "done with a text": ([event("done", "text")], "text", {}, None),
    "done with files": ([event("done", WITH_FILES)], {"n": 1}, {"a": [S3]}, None),
    "done with files only": ([event("done", {"files": {"a": [S3]}})], "", {"a": [S3]}, None),
    "done with nothing": ([event("done")], "", {}, None),
    "done as a marker": ([event("done", "[DONE]")], "", {}, None),
    "error with nothing": ([A_TEXT, event("error")], "a", {}, {"message": "The function reported an error."}),
    "error with a text": ([A_TEXT, event("error", "x")], "a", {}, {"message": "x"}),
    "error with a list": ([A_TEXT, event("error", ["x"])], "a", {}, {"message": "['x']"}),
    "error with a message beside": ([A_TEXT, event("error", message="m")], "a", {}, {"message": "m"}),
    "error with a code beside": ([event("error", {"message": "m"}, error_code="E")], "", {}, CODED),
}


@pytest.mark.parametrize("name", RESULTS_OF_EVENTS)
def test_a_streaming_function_called_for_its_result_gives_one(name: str) -> None:
    events, *expected = RESULTS_OF_EVENTS[name]
    with Script(chunked(event("start"), *events)) as server:
        result = run(client_of(server))
    assert [result.output["output"], result.get_files(), result.error] == expected
    assert result.is_success() == (result.error is None)


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
        stream = run(client, stream=True, timeout=SHORT_SECONDS if name == "timed out" else WAIT_SECONDS)
        assert next(stream).type == "content"
        if end is next:
            assert next(stream).data == 2
        with pytest.raises(ServiceUnavailableError) if end is next else contextlib.nullcontext():
            end(stream)
        for read in (lambda: next(stream, None), lambda: list(stream), lambda: next(stream)):
            with pytest.raises(GatewayError, match="cannot be read on" if end is next else "closed before its end"):
                read()


def test_a_stream_that_was_read_to_its_end_just_stops() -> None:
    with Script(WHOLE_STREAM) as server:
        stream = run(client_of(server), stream=True)
        assert [received.type for received in stream] == ["content", "done"]
        stream.close()
        assert [*stream, *stream] == [] and next(stream, None) is None


@contextlib.contextmanager
def interrupted(at: int, act: Callable[[], object]) -> Iterator[list[int]]:
    """Runs `act` once in the middle of the thread's work: before the line number `at` of the module's lines.

    Lines of `http.client` count too, as an answer is read by both. Gives how many lines are left until then.
    """
    left = [at]
    files = {gateway_sdk.__file__, sys.modules["http.client"].__file__}

    def enter_function(frame: Any, kind: str, value: Any) -> Any:
        return pass_line if frame.f_code.co_filename in files else None

    def pass_line(frame: Any, kind: str, value: Any) -> Any:
        if kind == "line":
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

    with Script(*[WHOLE_STREAM, ran()] * 2000) as server, client_of(server, max_retries=0) as client:
        for at in itertools.count(1):
            stream = run(client, stream=True)
            reader = threading.Thread(target=read, args=(stream, at), daemon=True)
            reader.start()
            reader.join(WAIT_SECONDS)
            assert not reader.is_alive(), f"closed at line {at}, it waits for ever"
            sock = stream._response.connection.sock
            assert sock.fileno() == -1 or not sock._closed, f"closed at line {at}, its descriptor stays open"
            assert run(client).is_success()
            if not reached or at == 2000:
                break
    assert not unexpected and at > 10


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
def test_what_is_uploaded_comes_back(upload: str, size: str, tmp_path: Path, client: GatewayClient) -> None:
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
     ("back\\slash;semi=.no-such-type", "back\\slash;semi=.no-such-type", "application/octet-stream"),
     ("100%41", "100%41", "application/octet-stream")],
)  # fmt: skip
@pytest.mark.skipif(os.name == "nt", reason="has no such names")
def test_multipart_bodies_are_written_as_browsers_do(name: str, sent: str, media_type: str, tmp_path: Path) -> None:
    content = b"\r\n--not the boundary\r\n\x00\xff"
    (tmp_path / name).write_bytes(content)
    with Script(*[STORED] * 3) as server:
        client = client_of(server)
        client.upload_file(tmp_path / name)
        client.upload_temp_file(tmp_path / name, 60, "s-1")
        client.upload_temp_file(tmp_path / name)
    forms = [{}, {"ttl": "60", "session_id": "s-1"}, {"ttl": "86400"}]
    for received, target, form in zip(server.received, ["upload", "upload_temp", "upload_temp"], forms):
        media, _, boundary = received.headers["content-type"].partition("; boundary=")
        start = f"--{boundary}\r\nContent-Disposition: form-data; name="
        head = "".join(f'{start}"{key}"\r\n\r\n{value}\r\n' for key, value in form.items())
        head += f'{start}"file"; filename="{sent}"\r\nContent-Type: {media_type}\r\n\r\n'
        assert received.body == head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        assert received[:2] == ("POST", f"/internal/files/{target}") and media == "multipart/form-data"
        assert received.headers["x-internal-token"] == TOKEN
        assert received.headers["content-length"] == str(len(received.body))


@pytest.mark.parametrize("upload", UPLOADS)
@pytest.mark.parametrize(
    ("source", "kind"),
    [("missing", FileNotFoundError), (".", (OSError, ValidationError)), ("/dev/zero", ValidationError),
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
def test_an_early_413_is_reported_rather_than_the_broken_upload(name: str, kept_open: bool, tmp_path: Path) -> None:
    ended = threading.Event()

    def serve(sock: socket.socket) -> None:
        if b"generate_upload_url" in read_head(sock)[0]:
            sock.sendall(answer({"upload_url": f"{server.url}/storage/in?sig=x", "s3_url": "s3://b/in"}))
        else:
            sock.sendall(answer({"detail": "larger than 1 MB"}, 413))
            if kept_open:
                ended.wait(WAIT_SECONDS)

    with open(tmp_path / "in.bin", "wb") as file:
        file.truncate(64 * 2**20)
    with nothing_left(tmp_path), Raw(serve) as server, client_of(server, timeout=SHORT_SECONDS) as client:
        with pytest.raises(GatewayError, match="413.*larger than 1 MB") as caught:
            UPLOADS[name](client, tmp_path / "in.bin")
        ended.set()
    assert (type(caught.value), caught.value.status_code) == (GatewayError, 413)
    assert server.connections == (1 if name == "permanent" else 2)


@pytest.mark.parametrize("end", [lambda sock: None, reset], ids=["hang-up", "reset"])
@pytest.mark.parametrize("name", ["permanent", "input"])
def test_a_broken_upload_is_sent_again_from_its_start_or_not_at_all(name: str, end: Any, tmp_path: Path) -> None:
    content = random.Random(FUZZ_SEED).getrandbits(8 * 2**22).to_bytes(2**22, "big")
    uploads: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        head, body = read_head(sock)
        if b"generate_upload_url" in head:
            sock.sendall(answer({"upload_url": f"{server.url}/storage/in?sig=x", "s3_url": "s3://b/in"}))
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
            assert UPLOADS[name](*arguments, on_progress=lambda *step: progress.append(step)) == "s3://b/in"
            assert (progress[0], progress[-1]) == ((0, len(content)), (len(content), len(content)))
    assert uploads[1:] == ([] if name == "permanent" else [content])


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
    uploads = [received.body for received in server.received if int(received.headers["content-length"]) >= 300_000]
    first, *more = sorted(uploads, key=lambda body: b"z" not in body)
    assert b"\0" not in first and all(b"\0" in body for body in more) and len(more) <= 1  # what did not come is padded


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
    redirects = [answer(body=b"gone", status=status, Location="/on") for status in (301, 302, 303, 307, 308)]
    with Script(LINK, *redirects, answer(body=b"data")) as server:
        client_of(server).download_file(S3, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"data"


# What the storage answers, and the error that comes of it if nothing is sent again.
BAD_DOWNLOADS: dict[str, tuple[list[Answer], type[GatewayError], str]] = {
    "cut": ([HangUp(answer(body=b"0123456789")[:-3])], ServiceUnavailableError, "cut short"),
    "chunks cut": ([HangUp(chunked(b"0123", end=False))], ServiceUnavailableError, "cut short"),
    "without a length": ([unframed(b"data", "text/plain")], GatewayError, "length"),
    "404": ([answer(body=b"<Code>NoSuchKey</Code><Message>gone</Message>", status=404)], GatewayError, "gone"),
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


@pytest.mark.parametrize("target", ["file/f", "file/folder/f", "n" * 300, "/proc/self/f"], ids=ascii)
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


def stored(request: Received, content: bytes = OBJECT, etag: str | None = '"1"', cut: int | None = None, *,
           ranges: bool = True, if_range: bool = True, framed: str = "length", **wrong: Any) -> Answer:
    """A storage's answer to a GET; `cut` is the place in the object where it hangs up."""
    if framed == "close":
        return unframed(content, "application/octet-stream")
    start, headers = 0, {"ETag": etag} if etag else {}
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


CUT: dict[str, Any] = {"cut": 1000}
NEW: dict[str, Any] = {"content": NEW_OBJECT, "etag": '"2"'}
SHRUNK: dict[str, Any] = {"content": SHORT_OBJECT, "etag": '"2"'}
TRANSFERS = {
    "one-cut": Transfer([CUT, {}], [None, 1000]),
    "two-cuts": Transfer([CUT, {"cut": 5000}, {}], [None, 1000, 5000]),
    "cut-before-the-last-byte": Transfer([{"cut": SIZE - 1}, {}], [None, SIZE - 1]),
    "cut-behind-the-last-byte": Transfer([{"cut": SIZE}], [None]),
    "last-chunk-missing": Transfer([{"cut": SIZE, "framed": "chunks"}, {}, {}], [None, SIZE, None]),
    "chunks": Transfer([{"framed": "chunks"}], [None]),
    "chunks-cut": Transfer(
        [{"framed": "chunks", "cut": 1000}, {"framed": "chunks", "cut": 5000}, {}], [None, 1000, 5000]),
    "more-cuts-than-retries": Transfer([CUT, {"cut": 2000}, {"cut": 3000}], [None, 1000, 2000], None),
    "other-etag-200": Transfer([CUT, NEW], [None, 1000], NEW_OBJECT),
    "other-etag-206": Transfer([CUT, *[{**NEW, "if_range": False}] * 2], [None, 1000, None], NEW_OBJECT),
    "other-etag-206-of-the-same-length": Transfer(
        [CUT, *[{"content": OBJECT[::-1], "etag": '"2"', "if_range": False}] * 2], [None, 1000, None], OBJECT[::-1]),
    "same-etag-206-of-another-length": Transfer([CUT, *[{"content": NEW_OBJECT}] * 2], [None, 1000, None], NEW_OBJECT),
    "no-etag-206": Transfer(
        [CUT, *[{"content": NEW_OBJECT, "etag": None, "if_range": False}] * 2], [None, 1000, None], NEW_OBJECT),
    "other-etag-cut-too": Transfer([CUT, {**NEW, "cut": 700}, NEW], [None, 1000, (700, '"2"')], NEW_OBJECT),
    "shrunk-416": Transfer([CUT, *[{**SHRUNK, "if_range": False}] * 2], [None, 1000, None], SHORT_OBJECT),
    "emptied-200": Transfer([CUT, {"content": b"", "etag": '"2"'}], [None, 1000], b""),
    "range-ignored": Transfer([CUT, {"ranges": False}], [None, 1000]),
    "no-etag": Transfer([{"cut": 1000, "etag": None}, {"etag": None}], [None, None]),
    "weak-etag": Transfer([{"cut": 1000, "etag": 'W/"1"'}, {"etag": 'W/"1"'}], [None, None]),
    "span-elsewhere": Transfer([CUT, {"span": "bytes 5-10239/10240"}, {}], [None, 1000, None]),
    "span-garbage": Transfer([CUT, {"span": "bytes x-y/z"}, {}], [None, 1000, None]),
    "span-of-5000-digits": Transfer([CUT, {"span": f"bytes {'9' * 5000}-/*"}, {}], [None, 1000, None]),
    "only-a-part-of-the-rest": Transfer([CUT, {"end": 9000, "span": "bytes 1000-8999/10240"}, {}], [None, 1000, 9000]),
    "only-a-part-of-the-rest-without-total": Transfer(
        [CUT, {"end": 9000, "span": "bytes 1000-8999/*"}, {}], [None, 1000, None]),
    "only-a-part-of-the-rest-without-a-word": Transfer([CUT, {"end": 9000}, {}], [None, 1000, 9000]),
    "neither-length-nor-chunks": Transfer([{"framed": "close"}], [None], None),
    "empty": Transfer([{"content": b""}], [None], b""),
}


def storage_of(give: Callable[[Received], Answer]) -> Routed:
    """A gateway whose presigned URLs lead back to itself, where `give` answers."""

    def choose(request: Received) -> Answer:
        url = f"{server.url}/storage/out?signature=x"
        return answer({"presigned_url": url}) if request.target.startswith("/internal/") else give(request)

    server = Routed(choose)
    return server


@pytest.mark.parametrize("transfer", TRANSFERS.values(), ids=TRANSFERS)
def test_a_download_goes_on_where_it_broke_or_starts_over(transfer: Transfer, tmp_path: Path) -> None:
    target, given, failed = tmp_path / "out.bin", iter(transfer.answers), False
    progress: list[tuple[int, Any]] = []
    target.write_bytes(b"old")
    with nothing_left(tmp_path), storage_of(lambda request: stored(request, **next(given))) as server:
        with client_of(server) as client:
            try:
                client.download_file("s3://b/out", target, on_progress=lambda *step: progress.append(step))
            except GatewayError:
                failed = True
    asked = [(r.headers.get("range"), r.headers.get("if-range")) for r in server.received[1:]]
    expected = [start if isinstance(start, tuple) else (start, '"1"') for start in transfer.starts]
    assert asked == [(None, None) if start is None else (f"bytes={start}-", etag) for start, etag in expected]
    assert len(asked) == len(transfer.answers)
    assert failed == (transfer.content is None)
    assert target.read_bytes() == (b"old" if failed else transfer.content)
    if not failed:
        length = len(target.read_bytes())
        assert progress[0][0] == 0 and progress[-1] in ((length, length), (length, None))


@cpython_only  # on PyPy 8 a loop that does nothing but read a file in blocks takes twice its size
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of the memory there")
def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    allowed = 16 * 2**20
    size = 4 * allowed
    moved: list[int] = []

    def serve(sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                head, body = read_head(sock)
                if head.startswith(b"GET /storage"):
                    sock.sendall(answer(body=b"", ETag='"1"').replace(b"Length: 0", b"Length: %d" % size))
                    block = bytes(2**20)
                    for _ in range(size // len(block)):
                        sock.sendall(block)
                    moved.append(size)
                    continue
                length = length_in(head) if head.startswith(b"P") else 0
                receive(sock, length - len(body))
                moved.append(length)
                sock.sendall(answer({"upload_url": f"{server.url}/storage/in", "s3_url": "s3://b/k", "version": "1",
                                     "presigned_url": f"{server.url}/storage/out"}))

    # The peak of VmHWM, as that of `ru_maxrss` has the parent's in it.
    code = (
        "import sys; from gateway_sdk import GatewayClient; client = GatewayClient(sys.argv[1])\n"
        "client.get_prefab_spec('p', '1')\n"
        "def peak():\n"
        "    with open('/proc/self/status') as file: return int(file.read().split('VmHWM:')[1].split()[0])\n"
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


@pytest.mark.parametrize("raised", [TimeoutError("mine"), KeyError("k")], ids=repr)
@pytest.mark.parametrize("name", ["upload_input_file", "upload_file", "download_file"])
def test_an_error_of_a_callback_is_the_callers_and_nothing_is_sent_again_or_left(
        name: str, raised: Exception, tmp_path: Path) -> None:
    def fail(done: int, total: int | None) -> None:
        if done:
            raise raised

    (tmp_path / "file").write_bytes(b"x" * 1000)
    arguments = [S3, tmp_path / "new" / "folder" / "f"] if name == "download_file" else [tmp_path / "file"]
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
    with Script(*[answer({"files": [{}], "next_token": "same"})] * 9) as server, pytest.raises(GatewayError):
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


def test_the_first_error_counts_more_than_that_of_the_cleaning_up() -> None:
    with Script(*[answer({"detail": "x"}, 400)] * 2) as server:
        client = client_of(server)
        with pytest.raises(LookupError), client.temp_session():
            raise LookupError
        with pytest.raises(GatewayError), client.temp_session():
            pass
    assert [received.method for received in server.received] == ["DELETE"] * 2


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
        assert client.run_batch([PrefabCall("p", "1.0.0", "f")] * (3 * workers), **options).all_success()
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
    assert unknown.error["message"] == unknown.exception.message and "error_code" not in unknown.error
    assert refused.exception is None and refused.error and refused.error["type"] == "Refused"
    assert isinstance(crashed.exception, ServiceUnavailableError) and crashed.output is None


def test_a_failed_call_of_a_batch_does_not_cost_the_others(client: GatewayClient) -> None:
    check_mixed(client.run_batch(mixed_calls()))


@cpython_only
def test_any_executor_runs_a_batch(client: GatewayClient) -> None:
    threads = concurrent.futures.ThreadPoolExecutor(2)
    spawning = multiprocessing.get_context("spawn")
    processes = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawning)
    for executor in (threads, processes):
        reported: list[int] = []
        with executor:
            batch = client.run_batch(mixed_calls(), executor=executor, on_result=lambda i, _, to=reported: to.append(i))
            assert executor.submit(int).result() == 0  # it is the caller's, and still open
        check_mixed(batch)
        assert sorted(reported) == [0, 1, 2, 3, 4]


def cancelled() -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.cancel()
    return future


def broken() -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_exception(RuntimeError("worker lost"))
    return future


def refused() -> concurrent.futures.Future[Any]:
    raise RuntimeError("pool is closed")


def mixed_up() -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_result("of another task")
    return future


@pytest.mark.parametrize(
    ("submit", "said", "may_have_run"),
    [(broken, "worker lost", True), (cancelled, "cancelled", False), (refused, "pool is closed", False),
     (mixed_up, "of another task", True)],
)
def test_an_executor_that_does_not_run_its_calls_fails_them_and_not_the_batch(
    submit: Any, said: str, may_have_run: bool, client: GatewayClient
) -> None:
    class Executor(concurrent.futures.Executor):
        def submit(self, *_: Any, **__: Any) -> Any:
            return submit()

    batch = client.run_batch(mixed_calls(), executor=Executor())
    assert batch.status == "FAILED" and len({id(result) for result in batch.results}) == 5
    for result in batch.results:
        assert type(result.exception) is ServiceUnavailableError and said in str(result.error)
        assert result.exception.may_have_run == may_have_run


def test_what_arrived_before_an_interruption_is_reported_and_the_rest_cancelled(client: GatewayClient) -> None:
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
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.run_batch([call()] * 5, executor=RunsThree(), on_result=on_result)
    assert reported == [0, 1, 2] and [future.cancelled() for future in futures] == [False] * 3 + [True] * 2


FORBIDDEN = answer({"error_code": "E", "message": "not yours"}, 403)  # which may concern one prefab
# What is answered to the calls that are sent, one after another, and the exceptions of all results.
REFUSALS: dict[str, tuple[list[Answer], list[Any]]] = {
    "behind a call that may have run": ([UNAVAILABLE, REFUSED], [ServiceUnavailableError, AuthenticationError]),
    "behind a result": ([ran("paid for"), REFUSED], [type(None), *[AuthenticationError] * 3]),
    "of single calls": ([FORBIDDEN] * 3, [AuthenticationError] * 3),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_credential_does_not_hide_what_became_of_other_calls(name: str) -> None:
    answers, kinds = REFUSALS[name]
    with Script(*answers, *[ran()] * 9) as server:
        batch = client_of(server).run_batch([call(number) for number in range(len(kinds))], max_workers=1)
    assert len(server.received) == len(answers)
    assert [type(result.exception) for result in batch.results] == kinds
    assert batch.status == ("PARTIAL_SUCCESS" if type(None) in kinds else "FAILED")
    first = batch.results[0]
    assert first.get_function_result() == ("paid for" if first.is_success() else {})
    assert kinds[0] is not ServiceUnavailableError or (first.exception and first.exception.may_have_run)
    assert answers[0] is not FORBIDDEN or (first.error and first.error["error_code"] == "E")


@pytest.mark.parametrize("way", ["threads", "one thread", "an executor", "a single request"])
def test_a_credential_that_is_refused_from_the_start_is_raised_and_nothing_more_is_sent(way: str) -> None:
    with Script(*[REFUSED] * 20) as server, concurrent.futures.ThreadPoolExecutor(1) as executor:
        ways: dict[str, Any] = {"threads": {}, "one thread": {"max_workers": 1}, "an executor": {"executor": executor},
                                "a single request": {"single_request": True}}  # fmt: skip
        with pytest.raises(AuthenticationError) as caught:
            client_of(server).run_batch([call(number) for number in range(20)], **ways[way])
    most = {"threads": 8, "an executor": 2}.get(way, 1)
    assert caught.value.status_code == 401 and 1 <= len(server.received) <= most


def test_a_single_request_has_one_job(client: GatewayClient, gateway: LocalGateway) -> None:
    before, reported = len(gateway.requests), []
    calls = [mixed_calls()[0], mixed_calls()[2]]
    batch = client.run_batch(iter(calls), single_request=True, on_result=lambda index, _: reported.append(index))
    assert len(gateway.requests) == before + 1 and reported == [0, 1]
    assert batch.status == "PARTIAL_SUCCESS" and batch.job_id
    assert {result.job_id for result in batch.results} == {batch.job_id}
    assert client.run_batch([calls[1]], single_request=True).status == "FAILED"
    with pytest.raises(PrefabNotFoundError):
        client.run_batch(mixed_calls(), single_request=True)


@pytest.mark.parametrize("single_request", [False, True])
def test_an_empty_batch_sends_nothing(single_request: bool) -> None:
    with Script() as server:
        batch = client_of(server).run_batch(iter(()), single_request=single_request)
    assert batch == BatchResult(None, "COMPLETED", []) and batch.all_success()
    assert not server.received


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_ctrl_c_ends_a_batch_at_once_and_nothing_more_is_sent() -> None:
    code = """if True:
        import signal, sys, gateway_sdk
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background lacks
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
    """A server that answers no call but the first until the gate is open. At the end all workers are done."""
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
        server.wait_until(lambda: len(server.received) == 3)  # the first call's worker has taken the next one
        signal.setitimer(signal.ITIMER_REAL, 0.004, 0.0005)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, press_again), signal.signal(signal.SIGINT, signal.default_int_handler)
    with holding_all_but_the_first(threading.Event()) as server, client_of(server) as client:
        try:
            with pytest.raises(KeyboardInterrupt):
                client.run_batch([call()] * 3000, max_workers=2, on_result=press)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before[0])
            signal.signal(signal.SIGINT, before[1])
    assert len(server.received) == 3, f"{pressed} more presses"


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
        found.append(sum(isinstance(thing, (PrefabResult, GatewayError)) for thing in gc.get_objects()))
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
            with client_of(server, internal_token="two") as other:  # another identity never shares it
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


def test_on_a_pool_of_threads_too_the_calls_share_connections() -> None:
    with Routed(lambda received: ran()) as server, client_of(server) as client:
        with concurrent.futures.ThreadPoolExecutor(2) as executor:
            assert client.run_batch([call()] * 20, executor=executor).all_success()
        assert server.connections <= 2


@cpython_only
def test_a_client_that_no_other_process_can_have_says_so_and_that_nothing_was_sent(trusting: ssl.SSLContext) -> None:
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
    assert GatewayClient("HTTP://Given.example:80/").base_url == "http://given.example"  # one origin, one pool
    with pytest.raises(AttributeError):  # for good: another gateway needs another client
        GatewayClient().base_url = "http://other.example"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("variables", "headers"),
    [({}, {}), (dict.fromkeys(VARIABLES, ""), {}), ({"X_INTERNAL_TOKEN": "t"}, {"x-internal-token": "t"}),
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
    assert {name: value for name, value in received.headers.items() if name in CREDENTIAL_HEADERS} == headers
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
        pickle.dumps(GatewayClient("https://h", ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)))


def test_a_client_can_be_closed_twice_and_is_a_context_manager() -> None:
    with Script(ran()) as server:
        with client_of(server) as client:
            run(client)
            assert server.open_connections == 1
        client.close()
        server.wait_until(lambda: server.open_connections == 0)


def test_any_function_of_a_prefab_is_a_method(client: GatewayClient) -> None:
    tools = client.prefab("text-tools", "1.1.0")
    assert isinstance(tools, Prefab) and repr(tools) == "Prefab(prefab_id='text-tools', version='1.1.0')"
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


def test_versions_sort_by_number_and_releases_after_their_candidates() -> None:
    ordered = ["0.9", "1.0.0-alpha", "1.0.0-rc.1", "1.0.0-rc.2", "1.0.0-rc.10", "1.0.0", "1.9.0", "1.10.0",
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
    with Script(answer(entries), answer({"id": "p"}), answer(odd)) as server, client_of(server) as client:
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
    with pytest.raises(GatewayError) as gone:
        client.delete_secret("vault", "SIGNING_KEY")
    assert type(gone.value) is GatewayError and gone.value.status_code == 404


@pytest.mark.skipif(sys.version_info < (3, 10), reason="the notation `X | Y` cannot be evaluated there")
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
                if inspect.isfunction(value) and (method == "__init__" or not method.startswith("_")):
                    typing.get_type_hints(value)
        hints = typing.get_type_hints(gateway_sdk.GatewayClient.__init__)
        print("ssl_context" in hints, "executor" in typing.get_type_hints(gateway_sdk.GatewayClient.run_batch))
    """
    done = python(code)
    assert (done.stdout, done.stderr) == ("True True\n", "")


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
        "/internal/files/generate_upload_url": {"upload_url": f"{storage}/storage/in?sig=x", "s3_url": "s3://b/in"},
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
    "list_prefabs": Operation(lambda c, f: [p.prefab_id for p in c.list_prefabs()], ["p"], "GET /v1/prefabs"),
    "run": Operation(lambda c, f: c.run("p", "1", "f").get_function_result(), "ok", RUN_ROUTE),
    "run-stream": Operation(
        lambda c, f: [event.data for event in c.run("p", "1", "words", stream=True)],
        ["a", "b", None], RUN_ROUTE, "events"),
    "run-of-a-stream": Operation(
        lambda c, f: c.run("p", "1", "words").get_function_result(), "ab", RUN_ROUTE, "events"),
    "run_batch": Operation(lambda c, f: values_of(c.run_batch([call()] * 3)), ["ok"] * 3, RUN_ROUTE, count=3),
    "single_request": Operation(
        lambda c, f: [r.output for r in c.run_batch([call(), call()], single_request=True).results],
        ["ok", "ok"], RUN_ROUTE),
    "upload_input_file-url": Operation(
        lambda c, f: c.upload_input_file(f / "in.bin"), "s3://b/in", "POST /internal/files/generate_upload_url"),
    "upload_input_file-put": Operation(
        lambda c, f: c.upload_input_file(f / "in.bin"), "s3://b/in", "PUT /storage/in", "nothing"),
    "upload_file": Operation(
        lambda c, f: c.upload_file(f / "in.bin")["s3_url"], "s3://b/up", "POST /internal/files/upload"),
    "upload_temp_file": Operation(
        lambda c, f: c.upload_temp_file(f / "in.bin")["s3_url"], "s3://b/up", "POST /internal/files/upload_temp"),
    "download_file": Operation(download, OBJECT, "GET /storage/out", "object"),
    "get_presigned_url": Operation(
        lambda c, f: c.get_presigned_url("s3://b/out").rpartition("?")[2],
        "signature=x", "GET /internal/files/download"),
    "set_secret": Operation(lambda c, f: c.set_secret("p", "KEY", "s3cr3t"), None, "POST /v1/secrets", "nothing"),
    "delete_secret": Operation(lambda c, f: c.delete_secret("p", "KEY"), None, "DELETE /v1/secrets/p/KEY", "nothing"),
    "cleanup_temp_files": Operation(lambda c, f: c.cleanup_temp_files("s"), 3, "DELETE /internal/files/cleanup_temp"),
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
    **{f"chunks-{body!r:.30}": lost(lambda p, k, body=body: HangUp(unended(b"", k) + body)) for body in (
        b"-5\r\nhello\r\n0\r\n\r\n", b"xyz\r\nhello\r\n0\r\n\r\n", b"\r\nhello\r\n0\r\n\r\n",
        b"2\r\nhello\r\n0\r\n\r\n", b"fffffff\r\nhello\r\n0\r\n\r\n", b"f" * 17 + b"\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nX-Su", b"5\r\nhello\r\n0")},
    "chunk-line-endless": lost(lambda p, k: endless(unended(b"", k) + b"5;", b"x" * 65536)),
    "status-line-garbage": lost(lambda p, k: HangUp(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")),
    "status-line-without-number": lost(lambda p, k: HangUp(b"HTTP/1.1 OK\r\n\r\n")),
    "status-line-endless": lost(lambda p, k: endless(b"", b"H" * 65536)),
    "headers-endless": lost(lambda p, k: endless(OK, b"X-Filler: 1\r\n" * 1000)),
    "header-endless": lost(lambda p, k: endless(OK + b"X: ", b"x" * 65536)),
    **{f"length-{length!r:.9}": lost(lambda p, k, length=length: HangUp(OK + b"Content-Length: %b\r\n\r\n" % length))
       for length in (b"-1", b"1x", b"9" * 5000)},
    "http-1.0": Fault(lambda p, k: HangUp(whole(p, k).replace(b"/1.1", b"/1.0")), FINE),
    "http-1.0-without-length": Fault(lambda p, k: unframed(p, k, "1.0"), FINE, {"object": UNUSABLE}),
    "http-1.1-without-length": Fault(lambda p, k: unframed(p, k), FINE, {"object": UNUSABLE}),
    "chunks": Fault(lambda p, k: chunked(p[:7], p[7:], content_type=k), FINE),
    "chunks-with-extensions-and-a-trailer": Fault(
        lambda p, k: unended(b"", k) + b"00%X ; a=\"b;c\"\r\n%b\r\n000;last\r\nX-Sum: 1\r\n\r\n" % (len(p), p), FINE),
    "connection-close": Fault(lambda p, k: HangUp(answer(body=p, Content_Type=k, Connection="close")), FINE),
    "100-first": Fault(lambda p, k: b"HTTP/1.1 100 Continue\r\n\r\n" + whole(p, k), FINE),
    "many-interim-answers-first": Fault(lambda p, k: EARLY * 50 + whole(p, k), FINE),
    "interim-answers-without-end": lost(lambda p, k: endless(b"", EARLY * 1000)),
    "interim-answer-only": lost(lambda p, k: HangUp(EARLY)),
    "204": Fault(lambda p, k: b"HTTP/1.1 204 No Content\r\n\r\n", Outcome(GatewayError, 204), {"nothing": FINE}),
    "bytewise": Fault(bytewise, FINE),
    "answer-to-nothing-behind-it": Fault(lambda p, k: whole(p, k) + whole(b"!", k, 500), FINE),
    "silence-before-the-answer": Fault(lambda p, k: Pause(), TIMED_OUT, timeout=SHORT_SECONDS),
    "silence-in-the-body": Fault(lambda p, k: Pause(whole(p, k)[: -len(p) // 2]), TIMED_OUT, timeout=SHORT_SECONDS),
    "429": Fault(lambda p, k: answer({"detail": "no"}, 429, Retry_After="0"),
                 Outcome(QuotaExceededError, 429), {"storage": Outcome(GatewayError, 429)}),
    "500": unavailable(500, repeated=False),
    "502": unavailable(502, repeated=True),
    "503": unavailable(503, repeated=True),
    "504": unavailable(504, repeated=True),
    "503-and-hang-up": Fault(
        lambda p, k: HangUp(answer(status=503, body=b"busy")[:-2]), Outcome(ServiceUnavailableError, 503, True)),
    "503-retry-after-61": unavailable(503, repeated=False, Retry_After="61"),
    "503-retry-in-an-hour": unavailable(503, repeated=False, Retry_After=IN_AN_HOUR),
    "503-retry-after-nonsense": unavailable(503, repeated=True, Retry_After="soon, \xe4h"),
    "307": Fault(lambda p, k: moved("/storage/elsewhere?sig=2", 307), Outcome(GatewayError, 307), {"object": FINE}),
}  # fmt: skip
# Operations that read their answers in different ways meet every fault. The others share that code
# with them, and meet one fault of each kind.
DIFFERENT = ("list_prefabs", "run-stream", "download_file")
ONE_OF_EACH_KIND = (
    "hang-up-before-the-answer", "hang-up-in-the-body", "http-1.1-without-length", "chunks", "204",
    "silence-before-the-answer", "429", "500", "503", "503-retry-after-61", "307",
)


def fault_cells() -> Iterator[Any]:
    """Operations and the faults that they meet: once, or always, if that leads to another end or to more requests."""
    for name, operation in OPERATIONS.items():
        for label in FAULTS if name in DIFFERENT else ONE_OF_EACH_KIND:
            yield pytest.param(operation, FAULTS[label], True, id=f"{name}-{label}-once")
    for name, label in itertools.product(("list_prefabs", "run", "download_file"), ONE_OF_EACH_KIND):
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
    with nothing_left(tmp_path), Routed(choose) as server, client_of(server, timeout=fault.timeout) as client:
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
            assert operation.route.partition(" ")[0] in str(caught.value) and "sig=" not in str(caught.value)
            unsure = outcome.error in (ServiceUnavailableError, GatewayTimeoutError) or outcome.status in (200, 204)
            assert caught.value.may_have_run == (unsure and not operation.repeatable)
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


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "from_api_key"])  # which is tried below
def test_without_a_connection_every_request_is_repeated_and_fails_if_that_is_not_allowed(
    name: str, tmp_path: Path, refusing: str, monkeypatch: Patch
) -> None:
    """The proxy refuses, until the wait before the second attempt."""

    def open_the_way(_: float) -> None:
        os.environ["http_proxy"] = ""

    operation = OPERATIONS[name]
    (tmp_path / "in.bin").write_bytes(b"x")
    monkeypatch.setattr(time, "sleep", open_the_way)
    with Routed(lambda request: whole(*good(request, server.url))) as server:
        monkeypatch.setenv("http_proxy", f"http://{refusing}")
        with nothing_left(tmp_path), client_of(server, max_retries=0) as client:
            with pytest.raises(ServiceUnavailableError, match=f"no connection to {server.url}") as caught:
                operation.call(client, tmp_path)
            assert (type(caught.value), caught.value.status_code) == (ServiceUnavailableError, None)
            assert TOKEN not in str(caught.value)
        with client_of(server) as client:
            assert operation.call(client, tmp_path) == operation.gives
        assert len(requests_to(server, operation)) == operation.count


@pytest.mark.parametrize(
    "act",
    [lambda url, **options: run(GatewayClient(url, **options)), functools.partial(GatewayClient.from_api_key, "k")],
    ids=["call", "exchange"],
)
@pytest.mark.parametrize("url", ["http://{refusing}/prefix", "http://host.invalid", "https://behind.the.proxy"])
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
    assert [received.method for received in proxy.received] == ["CONNECT"] * (4 if "proxy" in url else 0)


# --- Faults: answers that are not what they should be ---------------------------------------------

WRONG_RUNS = [
    "[]", "{}", '{"results": null}', '{"results": {}}', '{"results": []}', '{"results": [1]}', '{"results": [null]}',
    '{"results": [[]]}', '{"results": [{}, {}]}', '{"results": "ab"}',
]
WRONG_FIELDS = {
    "list_prefabs": [
        "{}", '["\\ud800"]', '{"prefabs": []}', "[1]", "[null]", "[[]]", "[{}]", '[{"id": "p"}]', '[{"version": "1"}]',
        '[{"id": 1, "version": "1"}]', '[{"id": "p", "version": null}]',
        '[{"id": "p", "version": 1}]', '[{"id": "p", "version": ["1"]}]',
    ],
    "run": WRONG_RUNS,
    "run-plain-stream": WRONG_RUNS,
    "run_batch": ["[]", '{"results": []}', '{"results": [null]}', '{"results": [{}, {}]}'],
    "upload_input_file-url": ["[]", "{}", '{"upload_url": "http://h/"}', '{"upload_url": "http://h/", "s3_url": null}'],
    "upload_file": ["[]", "{}", '{"s3_url": null}', '{"s3_url": ["s3://b/k"]}'],
    "get_presigned_url": ["[]", "{}", '{"presigned_url": null}', '{"presigned_url": {"url": "http://h/"}}'],
    "cleanup_temp_files": ["[]", "{}", '{"deleted_count": null}', '{"deleted_count": "3"}', '{"deleted_count": 1.5}'],
}
JSON_READERS = {
    **OPERATIONS, "run-plain-stream": Operation(lambda c, f: c.run("p", "1", "f", stream=True), None, RUN_ROUTE)}


def wrong_bodies() -> Iterator[Any]:
    """All that is no JSON for a GET and for calls, and for each operation what is not the JSON that it needs."""
    for name in ("list_prefabs", "run", "run-plain-stream"):
        for label, body in NOT_JSON.items():
            yield pytest.param(name, body, id=f"{name}-{label}")
    for name, bodies in WRONG_FIELDS.items():
        for text in bodies:
            yield pytest.param(name, text.encode(), id=f"{name}-{text}")


@pytest.mark.parametrize(("name", "body"), list(wrong_bodies()))
def test_an_answer_that_is_not_as_promised_is_a_plain_gateway_error(name: str, body: bytes, tmp_path: Path) -> None:
    operation = JSON_READERS[name]
    (tmp_path / "in.bin").write_bytes(b"x")
    with nothing_left(tmp_path), Routed(lambda request: answer(body=body)) as server, client_of(server) as client:
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
    cases += [(shape, limit - 60) for shape in written]  # once only: `str` takes a second for a list of such depth
    answers = []
    for shape, depth in cases:
        kind = STREAM if shape.startswith("data:") else "application/json"
        answers += [whole((shape % ("[" * depth + "]" * depth)).encode(), kind, status) for status in (200, 200, 422)]
    with Script(*answers) as server, client_of(server) as client:
        for _ in cases:
            for act in (lambda: run(client).get_business_message(), client.list_prefabs, client.list_files):
                with contextlib.suppress(GatewayError):
                    act()
    assert len(server.received) == len(answers)


# --- Faults: random and long ones -----------------------------------------------------------------


def random_value(chance: random.Random, depth: int = 0) -> Any:
    plain = [None, True, False, 0, -1, 2**70, 1.5, "", "x", "SUCCESS", "FAILED", "s3://b/k", "\ud800", "{0}", "ä\0\n",
             [], {}, "http://[", "//", "http://127.0.0.1:1/x", "9" * 50]
    if depth > 2 or chance.random() < 0.6:
        return chance.choice(plain)
    values = [random_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return values if chance.random() < 0.5 else {chance.choice(["id", "message", "files", "x"]): v for v in values}


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


ENVELOPE = {"status": "SUCCESS", "output": {"success": True, "message": "m"}, "files": {"out": [S3]}}
RUN = {"job_id": "j", "results": [{"status": "SUCCESS", "output": ENVELOPE, "error": {"message": "m", "type": "t"}}]}
ENTRY = {"id": "p", "version": "1.2.0", "name": "P", "tags": ["a"], "functions": [{"name": "f"}], "secrets": [{"a": 1}]}
VALID: dict[str, Any] = {
    "run": RUN, "stream": RUN, "batch": RUN, "single request": {"results": RUN["results"] * 2}, "directory": [ENTRY],
    "newest spec": [ENTRY, {**ENTRY, "version": "1.10.0"}], "list files": {"files": [{"key": "k"}], "next_token": "t"},
    "list secrets": {"secrets": [{"prefab_id": "p", "secret_name": "s"}]}, "clean up": {"deleted_count": 3},
    "list a prefab's secrets": {"secret_names": ["s"]}, "presigned URL": {"presigned_url": "http://h/"},
}
PROBLEM = {"error_code": "MISSING_SECRET", "message": "m", "details": {
    "prefab_id": "p", "secret_name": "s", "instructions": "i", "limit": 1, "used": 2, "quota_type": "q"}}
PROBLEMS = [{"detail": PROBLEM}, PROBLEM, {"detail": "text"}, {"detail": [{"loc": ["body", 0, "x"], "msg": "m"}]}]


def with_other_bytes(chance: random.Random, text: bytes) -> bytes:
    changed = bytearray(text)
    for _ in range(chance.randrange(1, 5)):
        place = chance.randrange(len(changed))
        other = [chance.choice(b'\r\n \0:;0159af-"{}[]\xff\xe4') for _ in range(chance.randrange(3))]
        changed[place : place + chance.randrange(3)] = bytes(other)
    return bytes(changed)


@pytest.mark.parametrize("name", VALID)
def test_random_answers_give_a_result_or_a_gateway_error(name: str) -> None:
    """In turns: another structure, another status with such a body, other bytes anywhere."""
    chance = random.Random(f"{FUZZ_SEED} {name}")
    given: Answer = b""
    act = ENDPOINTS[name].act if name in ENDPOINTS else lambda c: c.get_prefab_spec("p")
    with nothing_left(), Routed(lambda request: given) as server, client_of(server, max_retries=0) as client:
        for turn in range(FUZZ_COUNT):
            if turn % 3 == 0:
                given = answer(mutated(chance, VALID[name]))
            elif turn % 3 == 1:
                given = answer(mutated(chance, chance.choice(PROBLEMS)), chance.choice([301, *STATUS_CLASSES]))
            else:
                text = json.dumps(VALID[name]).encode()
                right = chance.choice([answer(body=text), chunked(text), chunked(EVENTS[:50], EVENTS[50:])])
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
    """All in one process, which would take minutes if a text were looked through again and again."""
    texts = ["\n ", " \r\n", " ", "\t", "http:", "https://a?", "'", "<", "&amp;", "%41", "Secret '' for prefab '"]
    problems = ["a" + long_text(text) + "b" for text in texts]
    problems += [long_text("Secret '")[:40_000] + "' for prefab '" * 1400, "Secret '" + long_text("' for prefab '")]
    bodies = ["<Code></Code>", "<Code>", "<Code></Code> <Message>", "<Code>" + long_text("a"), "{", '{"a":', '"']
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
    versions = ["1" * LONG, long_text("1."), long_text("1a"), long_text("a-"), "v" * LONG, long_text(".")]
    commands.append(["spec", "p"])
    answers += [answer([{"id": "p", "version": version} for version in versions]), answer({})]
    download = ["download", S3, str(tmp_path / "f")]
    for location in ("/../", "/a", "%41", "?", "a.", "\xe4"):
        commands.append(download)
        answers += [LINK, answer(status=302, Location="ftp://h/" + location * (60_000 // len(location)))]
    for content_range in ("1", "bytes ", "-", "/1"):
        commands.append(download)
        value = "bytes 0-" + content_range * (60_000 // len(content_range))
        answers += [LINK, answer({"detail": "x"}, 416, Content_Range=value)]
    for host in ("a.", "a", "\u00e4", "%", "-"):
        commands.append(download)
        answers.append(answer({"presigned_url": f"http://{long_text(host)}/o"}))
    code = """if True:
        import json, sys, gateway_sdk
        for arguments in json.loads(sys.argv[1]):
            gateway_sdk.main(arguments)
    """
    with Script(*answers) as server:
        done = python(code, json.dumps(commands), GATEWAY_BASE_URL=server.url, X_INTERNAL_TOKEN=TOKEN)
    assert done.returncode == 0 and len(server.received) == len(answers)


# --- Command line ---------------------------------------------------------------------------------

SDK = ROOT / "gateway_sdk.py"
ECHO = ("run", "text-tools", "1.1.0", "echo")
WORDS = ("run", "text-tools", "1.1.0", "words")
SIGN = ("run", "vault", "1.0.0", "sign", "-p", "text=t")
FAILED_CALL = answer({"results": [{"status": "FAILED", "error": {"message": "out of luck"}}]})
NASTY = "\x1b]0;pwned\x07\x1b[2J\x00\x7f\x9b31m\u202e\u2067gnp"  # what a terminal would obey
WORST_BYTES = 64 * 1024
ENDINGS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}  # signals and the exit statuses that they lead to
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
        assert (self.status, self.out, self.err.count("\n"), self.err[:7]) == (status, out, 1, "error: ")
        return self.err


def environment_for(server: Any, **more: str) -> dict[str, str]:
    """The environment of an agent's process."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if server is None:
        return {**own, **more}
    url, token = (server.url, TOKEN) if isinstance(server, Script) else (server.base_url, server.internal_token)
    return {**own, "GATEWAY_BASE_URL": url, "X_INTERNAL_TOKEN": token, "PYTHONDONTWRITEBYTECODE": "1", **more}


@contextlib.contextmanager
def started(*arguments: Any, **options: Any) -> Iterator[Any]:
    """A Python process that warns of everything, and is killed if it does not end."""
    command = [sys.executable, "-X", "dev", "-W", "error", *map(str, arguments)]
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # or a child of `nohup` ignores it
    with subprocess.Popen(command, **options) as process:
        signal.signal(signal.SIGINT, before)
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
def cli(gateway: LocalGateway, monkeypatch: Any, capsys: Any, tmp_path: Path) -> Callable[..., Ended]:
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
    for name, command in (("python", interpreter), ("python3", interpreter), ("gateway-sdk", f'{interpreter} "{SDK}"')):
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)
    environment = environment_for(gateway, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")

    def run(lines: str, cwd: Path = tmp_path) -> Ended:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", lines], cwd=str(cwd), env=environment,
                              capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
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
    """What `act` returns, and what it shows on a terminal that has these streams of this process."""
    terminal = Terminal(columns)
    shown: list[str] = []
    reader = threading.Thread(target=lambda: shown.append(terminal.rest()))
    with open(terminal.end, "w", encoding="utf-8") as stream, pytest.MonkeyPatch.context() as patched:
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


def call_line(function: str = "echo", prefab_id: str = "text-tools", version: str = "1.1.0", **parameters: Any) -> str:
    call = {"prefab_id": prefab_id, "version": version, "function_name": function, "parameters": parameters}
    return json.dumps(call, ensure_ascii=False) + "\n"


def signature(key: str) -> str:
    return hmac.new(key.encode(), b"t", hashlib.sha256).hexdigest()


# What is shown, and how


@pytest.mark.parametrize(("line", "reply", "hint"), [
    ("run vault 1.0.0 sign -p text=t", None, "gateway-sdk secret set vault SIGNING_KEY"),
    ("run no-such 1 f", None, "gateway-sdk list"),
    ("run text-tools 1.1.0 no-such", None, "gateway-sdk spec PREFAB"),
    ("ls", answer({"detail": {"error_code": "MISSING_AGENT_CONTEXT"}}, 400), "gateway-sdk upload --input"),
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
@pytest.mark.parametrize("name", ["a" * 200, "\u6587\u4ef6" * 40, "\u6587" + "a\u6587" * 60, "e\u0301" * 80,
                                  "x\x1b[2J\ny"], ids=["ascii", "wide", "mixed", "combining", "control"])
@pytest.mark.parametrize("columns", [40, 41, 80])
def test_the_bar_takes_one_line_of_the_terminal(cli: Any, name: str, columns: int) -> None:
    Path(name).write_bytes(b"x" * 100_000)
    ended, shown = on_terminal(lambda: cli("upload", "--input", name), "stderr", columns=columns)
    assert ended.json
    assert shown.count("\n") == 1 and shown.endswith("\r\n")
    drawn = [line for line in re.split("[\r\n]+", shown) if line.strip()]  # more than once where it takes its time
    for line in drawn:
        assert len(cells_of(line)) < columns
        assert line.isprintable() or "\u0301" in line
    assert "0.1 of 0.1 MiB, 100 %" in drawn[-1]
    assert len(name) < 10 or "\u0301" in name or len(cells_of(drawn[-1])) >= columns - 2  # as much as has room


@posix
@pytest.mark.parametrize("line", [
    "upload a.txt", "upload --input a.txt", "upload --temp a.txt", "download {url} copy.txt", "batch calls.jsonl",
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
    body = Steps((send(HEAD + piece), wait_until_the_bar_is_due, send(piece), lambda _: go_on.wait(WAIT_SECONDS), end))
    terminal = Terminal()
    with Script(link(), body, answer({"detail": "gone"}, 404)) as server, started(
            lone, "download", "s3://b/o.bin", "o.bin", cwd=str(lone.parent), env=environment_for(server),
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
        assert (status, [line[:7] for line in left]) == ((1, ["error: "]) if how == "is cut" else (130, ["interru"]))


@posix
@pytest.mark.parametrize(("line", "reply"), [
    ("run a 1 f", answer({"detail": NASTY}, 400)),
    ("run a 1 f", answer(body=NASTY.encode(), status=400)),
    ("run a 1 f --stream", chunked(event("error", {"message": NASTY}))),
    ("run a 1 f --stream", chunked(event("content", f"a\tb\n{NASTY}"), event("done"))),
    ("run a 1 f", answer({"results": [{"status": "FAILED", "output": None, "error": {"message": NASTY}}]})),
    ("run a 1 f", ran(NASTY)),
], ids=["message", "text", "event", "content", "result", "document"])
def test_control_characters_of_a_gateway_do_not_reach_the_terminal(cli: Any, line: str, reply: bytes) -> None:
    _, shown = on_terminal(lambda: cli(*line.split(), replies=[reply]), "stdout", "stderr")
    assert "pwned" in shown and "gnp" in shown
    assert {character for character in shown if not character.isprintable()} <= {"\r", "\n", "\t"}
    assert ("a\tb\r\n" in shown) == (b"a\\tb" in reply)


def test_a_pipe_gets_the_contents_of_a_stream_as_they_are(cli: Any) -> None:
    reply = chunked(event("content", f"a\tb\r\n{NASTY}"), event("done"))
    assert cli("run", "a", "1", "f", "--stream", replies=[reply]).out == f"a\tb\r\n{NASTY}\n"


@pytest.mark.parametrize("worst", [
    " " * WORST_BYTES, "\n" * WORST_BYTES, " \n" * (WORST_BYTES // 2), "client.set_secret('" * (WORST_BYTES // 19),
    "client.set_secret('" + "a" * WORST_BYTES, "client.get_prefab_spec('" + "a'" * (WORST_BYTES // 2),
    "upload_input_file(" * (WORST_BYTES // 18), "upload_input_file(" + "a" * WORST_BYTES, "\x1b" * WORST_BYTES,
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
    assert long < 0.05 or min(seconds(worst) for _ in range(3)) < 24 * seconds(worst[: len(worst) // 8])


@posix
def test_a_terminal_gets_indented_json_but_lines_stay_lines(cli: Any) -> None:
    _, document = on_terminal(lambda: cli(*ECHO, "-p", "value=1"), "stdout")
    assert "\r\n  " in document and json.loads(document)["output"]["output"] == 1
    _, line = on_terminal(lambda: cli("batch", "-", stdin=call_line(value=1)), "stdout")
    assert line.count("\n") == 1 and json.loads(line)["index"] == 0
    _, events = on_terminal(lambda: cli(*ECHO, "-p", "value=1", "--stream", "--json"), "stdout")
    assert [json.loads(event)["type"] for event in events.splitlines()] == ["content", "done"]


def test_a_locale_without_unicode_reads_utf_8_and_shows_escapes(gateway: LocalGateway, lone: Path) -> None:
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
def test_a_terminal_gets_a_line_for_each_prefab_and_anything_else_json(cli: Any, gateway: LocalGateway) -> None:
    entries = [{"id": "long-name", "version": "1.0.0", "description": f"one\ntwo {NASTY} " + "x" * 70_000},
               {"id": "b", "version": "10.2.3", "deployment_status": "failed", "description": "\u6587" * 60}]
    _, shown = on_terminal(lambda: cli("list", replies=[answer(entries)]), "stdout", columns=60)
    first, second, end = screen(shown)
    assert first.startswith("long-name 1.0.0  one two") and second.startswith("b 10.2.3         (failed) \u6587")
    assert (end, max(len(cells_of(line)) for line in (first, second)) <= 60) == ("", True)
    assert first.isprintable()
    assert on_terminal(lambda: cli("list", replies=[answer([])]), "stdout")[1] == ""
    assert cli("list", replies=[answer(entries)]).json == entries


@pytest.mark.parametrize("line", ["run a 1 f", "run a 1 f --stream --json", "run a 1 f --stream", "spec a 1", "list"])
def test_what_json_does_not_have_is_null(cli: Any, line: str) -> None:
    numbers = [float("nan"), float("inf"), {"a": -float("inf")}]
    reply = {"run": ran(numbers), "spec": answer({"id": numbers}),
             "list": answer([{"id": "a", "version": "1", "n": numbers}])}[line.split()[0]]
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
    ("3", 3), ("-1.5", -1.5), ("true", True), ("null", None), ("[1, 2]", [1, 2]), ('{"a": {}}', {"a": {}}),
    ("text", "text"), ('"3"', "3"), ("", ""), ("a=b", "a=b"), ("two words", "two words"), ("中文", "中文"),
    ("1.2.3", "1.2.3"), ("{not json", "{not json"), ("NaN", "NaN"), ("-Infinity", "-Infinity"), ("[NaN]", "[NaN]"),
])
def test_a_parameter_is_json_if_it_can_be_else_text(cli: Any, text: str, value: Any) -> None:
    assert cli(*ECHO, "-p", f"value={text}").value == value


@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("data", ['{"value": "中"}', "@data.json", "-"], ids=["text", "file", "stdin"])
def test_all_parameters_come_from_a_text_a_file_or_stdin_and_single_ones_win(cli: Any, data: str, bom: str) -> None:
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
def test_a_file_or_stdin_in_another_encoding_is_read_by_its_byte_order_mark(cli: Any, encoding: str) -> None:
    def encoded(text: str) -> bytes:
        return ("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding)

    Path("data.json").write_bytes(encoded('{"value": "\u4e2d"}'))  # as `>` of PowerShell writes
    assert cli(*ECHO, "-d", "@data.json").value == "\u4e2d"
    assert cli(*ECHO, "-d", "-", stdin=Path("data.json").read_bytes()).value == "\u4e2d"
    assert cli(*ECHO, "-p", "value=@data.json").value == '{"value": "\u4e2d"}'
    assert cli("batch", "-", stdin=encoded(call_line(value="\u4e2d"))).json["output"]["output"] == "\u4e2d"
    assert cli("secret", "set", "vault", "SIGNING_KEY", stdin=encoded("priv\u00e4\r\n")).status == 0
    assert cli(*SIGN).value["signature"] == signature("priv\u00e4")
    assert cli("secret", "delete", "vault", "SIGNING_KEY").status == 0


@pytest.mark.parametrize(("line", "told"), [
    *((line, "error: ") for line in (
        "", "no-such-command", "run", "spec ..", "batch",
        "batch - --workers x", "upload", "upload .", "upload a.txt --temp --ttl 0", "upload a.txt --input --temp",
        "upload a.txt --session s", "upload a.txt --ttl 5", "download", "download https://example.com/f",
        "url report.pdf", "cleanup", "secret", "secret show",
        "secret set vault NAME value", "list --timeout 0", "list --timeout soon", "list --base-url ftp://x",
        "list --token t", "list --api-key k", "list --jwt-token j", "list --internal-token i", "spec \udcff",
        "ls --temp --session \udcff", "cleanup \udcff", "run a 1 f -p value=\udcff", "secret set vault \udcff",
        "run a 1 f --stream --save x", "run a 1 f --stream --result", "run a 1 f -p =3",
        "run a 1 f -P text", "url s3://b/o --expires 0", "url s3://b/o --expires 1.5", "list --timeout nan",
        "list --timeout inf", "list --retries x", "list --retries=-1", "upload a.txt --content-type text/plain",
        "upload a.txt --temp --content-type text/plain", "upload a.txt --input --ttl 5",
    )),
    ("run a 1 f -d @latin-1.json", "latin-1.json is not UTF-8. Save it as UTF-8"),
    ("run a 1 f -p x=@latin-1.json", "latin-1.json is not UTF-8. Save it as UTF-8"),
    ("batch latin-1.json", "latin-1.json is not UTF-8. Save it as UTF-8"),
    ("run a 1", "FUNCTION (usage: gateway-sdk run PREFAB VERSION FUNCTION"),
    ("run a", "VERSION, FUNCTION (usage: gateway-sdk run PREFAB VERSION FUNCTION"),
    ("spec", "PREFAB (usage: gateway-sdk spec PREFAB [VERSION]"),
    ("secret delete vault", "NAME (usage: gateway-sdk secret delete PREFAB NAME"),
    ("batch - --workers 0", "--workers: a whole number from 1 on is needed, not '0' (usage: gateway-sdk batch FILE"),
    ("run a 1 f --save a.txt", "Nothing can be saved in a.txt"),
    ("run a 1 f --save a.txt/x/y", "a.txt is not a folder"),
    ("run a 1 f -f x=a.txt -p novalue", "-p NAME=VALUE is needed, not 'novalue'"),
    ("run a 1 f -f x=a.txt -f novalue", "-f NAME=PATH is needed, not 'novalue'"),
    ("secret set vault", "NAME (usage: gateway-sdk secret set PREFAB NAME"),
    ("run a 1 f -d [1]", "-d must be a JSON object"),
    ("run a 1 f -d 1", "-d must be a JSON object"),
    *((f"run a 1 f -d {data}", "-d is not JSON")
      for data in ("{broken", '{"value":NaN}', '{"value":[-Infinity]}', '{"value":1e999}', "[" * 100_000)),
], ids=lambda text: text[:40])
def test_wrong_usage_is_told_and_nothing_is_sent(cli: Any, gateway: LocalGateway, line: str, told: str) -> None:
    Path("latin-1.json").write_bytes(b'{"value": "\xe4"}')
    gateway.requests.clear()
    assert told in cli(*line.split(), stdin=call_line(value=1)).error(2)
    assert not gateway.requests


@pytest.mark.parametrize("content", [b"\xe4", "k".encode("utf-16-le"), "k".encode("utf-16-be"), b"\xff\xfek"],
                         ids=["latin-1", "UTF-16 without a mark", "big-endian", "half a character"])
@pytest.mark.parametrize("line", ["secret set v K", "run a 1 f -d -", "run a 1 f -p x=@-", "batch -"])
def test_stdin_that_is_not_utf_8_is_wrong_usage(cli: Any, gateway: LocalGateway, line: str, content: bytes) -> None:
    gateway.requests.clear()
    assert "stdin is not UTF-8. Save it as UTF-8" in cli(*line.split(), stdin=content).error(2)
    assert not gateway.requests


def test_a_missing_input_is_noticed_before_any_other_is_uploaded(cli: Any, gateway: LocalGateway) -> None:
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


def test_a_local_file_is_uploaded_as_an_input_before_the_call(cli: Any, gateway: LocalGateway) -> None:
    url = cli("upload", "--input", "a.txt").json["s3_url"]
    gateway.requests.clear()
    ended = cli("run", "file-tools", "1.0.0", "line_count", "-f", "files=a.txt", "-f", f"files={url}")
    assert ended.value["lines"] == 4
    first, second, third = [(request.method, request.path) for request in gateway.requests]
    assert first == ("POST", "/internal/files/generate_upload_url")
    assert (second[0], third) == ("PUT", ("POST", "/v1/internal/run"))


def test_output_files_are_saved_by_name_and_numbered_and_cost_no_result(cli: Any, gateway: LocalGateway) -> None:
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
    assert value.err.count("saved: ") == 3 and str(Path("new", "folder", "3-same.txt")) not in value.err
    assert {path.name: path.read_text() for path in Path("new/folder").iterdir()}.items() > saved.items()
    Path("new/folder/same.txt").unlink()
    Path("new/folder/same.txt").symlink_to("nowhere")  # which is a name in use, too
    entry = {"status": "SUCCESS", "output": {"status": "SUCCESS", "output": 1, "files": {"a": [S3, S3]}}}
    replies = [answer({"results": [entry]}), link(), answer(body=b"saved"), answer({"detail": "gone"}, 404)]
    failed = cli("run", "a", "1", "f", "--save", "some", replies=replies)
    assert "gone" in failed.error(out=failed.out)
    assert [Path(path).read_bytes() for path in failed.lines[0]["saved"]] == [b"saved"]
    assert [path.name for path in Path("some").iterdir()] == ["r.txt"]  # nothing is left of the other


def test_the_value_of_a_function_is_printed_alone(cli: Any) -> None:
    line = ("run", "a", "1", "f", "--result")
    for value, printed in (("a\tb", "a\tb\n"), ("a\r\n\n", "a\r\n\n"), ("", "\n"), ({"a": None}, '{"a": null}\n'), (3, "3\n"), (None, "{}\n")):
        assert cli(*line, replies=[ran(value)]) == (0, printed, "")
    assert "out of luck" in cli(*line, replies=[FAILED_CALL]).error(1)
    partial = chunked(event("content", "so far"), event("error", "out of luck"))
    assert "out of luck" in cli(*line, replies=[partial]).error(1, out="so far\n")


@pytest.mark.parametrize("more", [[], ["--result"], ["--stream"], ["--stream", "--json"]], ids=" ".join)
def test_a_functions_own_failure_fails_the_command_if_that_is_wanted(cli: Any, more: list[str]) -> None:
    def end(value: Any, *options: str) -> Ended:
        reply = chunked(event("done", value)) if "--stream" in more else ran(value)
        return cli("run", "a", "1", "f", *more, *options, replies=[reply])

    assert end({"success": False, "error": "no luck"}).status == 0
    for value, reason in (({"success": False, "error": "no luck", "message": "m"}, "no luck"),
                          ({"success": False, "message": "m"}, "m"), ({"success": False}, "no reason")):
        failed = end(value, "--fail")
        assert failed.error(out=failed.out) == f'error: The function reports "success": false: {reason}\n'
        assert '"success": false' in failed.out
    for value in ({"success": True}, {}, {"success": None}, "text", [], {"success": 0}):
        assert end(value, "--fail").status == 0


def test_a_stream_prints_its_contents_or_whole_events_as_json_lines(cli: Any) -> None:
    assert cli(*WORDS, "-p", "text=one 二 three", "--stream") == (0, "one 二 three\n", "")
    events = cli(*WORDS, "-p", "text=one 二 three", "--stream", "--json")
    contents = [event["data"] for event in events.lines if event["type"] == "content"]
    assert (events.status, contents, events.lines[-1]["type"], events.err) == (0, ["one ", "二 ", "three"], "done", "")
    assert cli(*ECHO, "-p", "value=1", "--stream", "--json").lines[-1]["type"] == "done"  # does not stream
    reply = chunked(event("content", {"a": None}, step=1), event("done"))
    assert cli("run", "a", "1", "f", "--stream", replies=[reply]).out == '{"a": null}\n\n'
    assert cli("run", "a", "1", "f", "--stream", "--json", replies=[reply]).lines[0]["step"] == 1


@pytest.mark.parametrize(("events", "printed", "told"), [
    ([event("progress", 1), event("done", {"a": 1}), event("done", {"b": 2, "job_id": "j", "files": {"x": [S3]}})],
     '{"a": 1, "b": 2}\n', f"file: {S3}\n"),
    ([event("done", "text")], "text\n", ""),
    ([event("content", "text"), event("done", {"a": 1, "files": {"x": [S3]}})], "text\n", f"file: {S3}\n"),
    ([event("ping"), event("done", {"a": 1})], '{"a": 1}\n', ""),
    ([event("content"), event("done")], "null\n\n", ""),
    ([event("content", "a"), event("content", "b")], "ab\n", ""),
    ([event("start"), event("done")], "", ""),
], ids=["two done events", "text", "contents and files", "heartbeat", "null", "no end", "nothing"])
def test_a_stream_whose_result_is_in_its_end_prints_that(cli: Any, events: Any, printed: str, told: str) -> None:
    assert cli("run", "a", "1", "f", "--stream", replies=[chunked(*events)]) == (0, printed, told)


@posix
@pytest.mark.parametrize("end", [chunk(event("error", "out of luck")) + b"0\r\n\r\n", b"", chunk(b"data: {")],
                         ids=["error", "cut", "cut within an event"])
def test_a_line_of_contents_ends_before_an_error_is_told(cli: Any, end: bytes) -> None:
    reply = HangUp(chunked(event("content", "so far"), end=False) + end)
    _, shown = on_terminal(lambda: cli("run", "a", "1", "f", "--stream", replies=[reply]), "stdout", "stderr")
    first, second, last = screen(shown)
    assert (first, second[:7], last) == ("so far", "error: ", "")


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["contents", "events"])
def test_an_error_event_fails_the_command_after_its_output(cli: Any, more: list[str]) -> None:
    ended = cli("run", "faulty", "1.0.0", "stumble", "-p", "text=as far", "--stream", *more)
    assert "far" in ended.out
    assert "stumbled" in ended.error(out=ended.out)
    assert not more or ended.lines[-1]["type"] == "error"


def test_a_failed_call_fails_the_command_but_a_functions_own_failure_does_not(cli: Any, monkeypatch: Any) -> None:
    refused = cli("run", "faulty", "1.0.0", "refuse", "-p", "message=not today")
    assert [result["status"] for result in refused.lines] == ["FAILED"]
    assert refused.error(out=refused.out) == "error: FAILED: not today\n"
    odd = cli("run", "a", "1", "f", replies=[answer({"results": [{"status": "FAILED", "error": {"code": 7}}]})])
    assert "7" in odd.error(out=odd.out)
    assert cli("run", "faulty", "1.0.0", "fail").value["success"] is False  # it ran
    monkeypatch.setenv("COLUMNS", "200")
    assert '"success": false' in cli("run", "--help").out  # and how to have it fail


@pytest.mark.parametrize("url", ["https://a/b", "s3://", "file.txt", "s3://b/\ud800", ""])
def test_an_odd_url_of_the_gateway_is_its_fault_and_costs_no_result(cli: Any, url: str) -> None:
    entry = {"status": "SUCCESS", "output": {"status": "SUCCESS", "output": None, "files": {"a": [url]}}}
    ended = cli("run", "a", "1", "f", "--save", "x", replies=[answer({"results": [entry]})])
    assert ended.lines[0]["status"] == "SUCCESS"
    ended.error(1, out=ended.out)


def test_an_odd_url_of_an_uploaded_input_is_the_gateways_fault(cli: Any) -> None:
    def give(sock: Any) -> None:
        url = "http://{}:{}/o?X=1".format(*sock.getsockname())
        sock.sendall(answer({"upload_url": url, "s3_url": "https://a/b"}))

    ended = cli("run", "a", "1", "f", "-f", "x=a.txt", replies=[Steps((give,)), NO_BODY])
    assert "'https://a/b', and not an s3:// URL" in ended.error()


# batch


@pytest.mark.parametrize("form", ["lines", "array", "indented"])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n "], ids=["plain", "byte order mark", "blank line"])
def test_a_batch_prints_a_line_per_call_in_their_order(cli: Any, form: str, before: str) -> None:
    texts = ["[0]", *map(str, range(1, 9)), "a\u2028b\u2029c\x85d 中文"]  # all of which JSON allows within a line
    lines = [call_line(value=text) for text in texts]
    given = before + "\n".join([*lines, "\n"])
    if form != "lines":
        given = before + json.dumps([*map(json.loads, lines)], indent=2 if form == "indented" else None)
    Path("calls.jsonl").write_text(given, encoding="utf-8")
    for source in ("calls.jsonl", "-"):
        ended = cli("batch", source, "--workers", "4", stdin=given)
        assert (ended.status, ended.err) == (0, "")
        assert [(line["index"], line["output"]["output"]) for line in ended.lines] == [*enumerate(texts)]


def test_a_batch_keeps_the_order_when_the_first_call_takes_longest(cli: Any, gateway: LocalGateway) -> None:
    third_began = threading.Event()

    def wait_if_first(number: int) -> int:
        if number == 0:
            assert third_began.wait(WAIT_SECONDS)  # then the second is done
        elif number == 2:
            third_began.set()
        return number

    gateway.add_prefab("late", "1.0.0", {"f": wait_if_first})
    calls = "".join(call_line("f", "late", "1.0.0", number=number) for number in range(3))
    assert [line["index"] for line in cli("batch", "-", "--workers", "2", stdin=calls).lines] == [0, 1, 2]


def test_a_failed_call_of_a_batch_fails_the_command_and_costs_no_other_result(cli: Any) -> None:
    crash = call_line("crash", "faulty", "1.0.0")
    ended = cli("batch", "-", stdin=f"{call_line(value=1)}{crash}\n{crash}{call_line(value=3)}")
    assert [(line["index"], line["status"]) for line in ended.lines] == [
        (0, "SUCCESS"), (1, "FAILED"), (2, "FAILED"), (3, "SUCCESS")]
    assert ended.lines[1]["error"]["type"] == "ServiceUnavailableError"
    unknown = cli("batch", "-", stdin=call_line(prefab_id="no-such"))
    assert all("gateway-sdk list" in text and "client." not in text for text in unknown[1:])
    told = ended.error(out=ended.out)
    assert told.startswith("error: 2 of 4 calls failed, the first with index 1: FAILED: ")
    assert told.count("out of order") == 1
    refused = cli("batch", "-", "--workers", "1", stdin=call_line() * 3, replies=[REFUSED])
    assert ([line["index"] for line in refused.lines], refused.status) == ([0, 1, 2], 1)


@pytest.mark.parametrize(("reply", "may_have_run"), [
    (FAILED_CALL, True), (answer({"results": [{"status": "TIMED_OUT", "error": None}]}), True),
    (UNAVAILABLE, True), (HangUp(), True), (answer({"detail": "no"}, 404), False), (answer({"detail": "no"}, 422), False),
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
    *((call_line() + line, "with index 1") for line in ("[1]", '"text"', '{"prefab_id": "a"}', '\n{"unknown": 1}')),
    (call_line() + "not json", "Line 2"), (call_line() + "\n{", "Line 3"), (call_line(value=float("nan")), "Line 1"),
    (call_line() + '{"prefab_id": 1, "version": "1", "function_name": "f"}', "prefab_id"),
    ("[1]", "index 0"), ('[{"unknown": 1}]', "'unknown', which is no field"), ("[", "not JSON"),
    ('[{"prefab_id": "a", "version": "1"}]', "index 0 lacks 'function_name'"), ('[{"a": NaN}]', "not JSON"),
    ("[" * 100_000, "not JSON"),
], ids=lambda text: text[-30:])
def test_a_bad_call_of_a_batch_is_named_and_nothing_is_sent(cli: Any, gateway: Any, text: str, told: str) -> None:
    gateway.requests.clear()
    assert told in cli("batch", "-", stdin=text).error(2)
    assert not gateway.requests


# The other commands


def test_files_go_up_are_listed_and_come_down_again(cli: Any) -> None:
    kept = cli("upload", "a.txt").json
    assert (kept["filename"], kept["size"], "/agent-outputs/" in kept["s3_url"]) == ("a.txt", 14, True)
    assert [made["filename"] for made in cli("upload", "a.txt", "b.txt").json] == ["a.txt", "b.txt"]
    broken_off = cli("upload", "a.txt", "no.txt")
    assert [made["filename"] for made in broken_off.lines[0]] == ["a.txt"]
    assert "no.txt" in broken_off.error(out=broken_off.out)
    assert kept["s3_url"] in [file["s3_url"] for file in cli("ls").json]
    assert cli("url", kept["s3_url"]).json["presigned_url"].startswith("http://127.0.0.1")
    Path("a.txt").unlink()
    Path("folder").mkdir()
    targets = {"as.txt": "as.txt", "folder": "folder/a.txt", "new/": "new/a.txt", "deep/er": "deep/er", "": "a.txt"}
    Path("as.txt").write_text("old")  # this name is the user's, so it is replaced
    for target, made in targets.items():
        got = cli("download", kept["s3_url"], *[target] * bool(target)).json
        assert (Path(got["path"]), got["size"], Path(made).read_text()) == (Path(made), 14, "this is\na.txt\n")
    Path("a.txt").write_text("mine")
    for made in ("2-a.txt", "3-a.txt"):  # a name that the gateway chose replaces nothing
        assert Path(cli("download", kept["s3_url"]).json["path"]) == Path(made)
    assert (Path("a.txt").read_text(), Path("3-a.txt").read_text()) == ("mine", "this is\na.txt\n")


@pytest.mark.parametrize(("url", "name"), [
    ("s3://b/..", "_"), ("s3://b/a\\b:c\x1b", "a_b_c_"), ("s3://b/", "_"), ("s3://b/.bashrc", ".bashrc"),
    ('s3://b/<a>"b|c?d*e', "_a__b_c_d_e"), ("s3://b/a. .", "a_"), ("s3://b/CON", "_CON"), ("s3://b/nul.txt", "_nul.txt"),
    ("s3://b/Com\xb2 .x", "_Com\xb2 .x"), ("s3://b/console.txt", "console.txt"), ("s3://b/com10", "com10"),
    ("s3://b/a\u202egnp.exe", "a_gnp.exe"), ("s3://b/" + "\u6587" * 300 + ".pdf", "\u6587" * 78 + ".pdf"),
], ids=lambda text: ascii(text)[:30])
def test_a_name_that_some_system_refuses_is_changed(cli: Any, url: str, name: str) -> None:
    assert Path(cli("download", url, "made/", replies=[link(), answer(body=b"x")]).json["path"]) == Path("made", name)


def test_the_options_of_urls_and_uploads_reach_the_gateway(cli: Any, gateway: LocalGateway) -> None:
    kept = cli("upload", "a.txt").json["s3_url"]
    gateway.requests.clear()
    assert cli("url", kept, "--expires", "77").status == 0
    assert "expires_in=77" in gateway.requests[-1].path
    assert cli("upload", "--input", "a.txt", "--content-type", "video/mp4").json["s3_url"].startswith("s3://")
    assert gateway.requests[-1].headers["content-type"] == "video/mp4"  # of the PUT, whose signature it is in


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
            ("\ufeff very\r\nprivaté \r\n", " very\r\nprivaté "), ("private\n\n", "private\n"), ("private", "private"),
    ):  # the mark and one line's end are not the secret's
        assert "priva" not in str(cli("secret", "set", "vault", "SIGNING_KEY", stdin=given).json)
        assert cli(*SIGN).value["signature"] == signature(secret)
    entry = {"prefab_id": "vault", "secret_name": "SIGNING_KEY"}
    assert [cli("secret", "list", *more).json for more in ([], ["vault"], ["other"])] == [[entry], [entry], []]
    assert cli("secret", "delete", "vault", "SIGNING_KEY").status == 0
    assert cli("secret", "list").json == []
    assert "SIGNING_KEY" in cli(*SIGN).error()
    for nothing in ("", "\n", "\r\n", "\ufeff"):
        assert "The secret is empty" in cli("secret", "set", "vault", "SIGNING_KEY", stdin=nothing).error(2)


@posix
@pytest.mark.parametrize("typed", ["by hand\n", "\x04"], ids=["a line", "end of file"])
def test_a_secret_is_asked_for_without_an_echo(
        client: GatewayClient, gateway: LocalGateway, lone: Path, typed: str) -> None:
    terminal = Terminal()
    with started(lone, "secret", "set", "vault", "SIGNING_KEY", env=environment_for(gateway), stdin=terminal.end,
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
    assert cli("list", "--status", "failed").json == []
    assert cli("spec", "text-tools").json["version"] == "1.1.0"
    assert cli("spec", "text-tools", "1.0.0").json["version"] == "1.0.0"


# Options, environment, exit status


@pytest.mark.parametrize(
    "command", ["run", "list", "spec", "batch", "upload", "download", "ls", "cleanup", "url", "secret"])
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
    ("run", "PREFAB VERSION FUNCTION"), ("batch", "FILE"), ("spec", "PREFAB [VERSION]"), ("upload", "PATH..."),
    ("download", "S3_URL [TARGET]"), ("url", "S3_URL"), ("cleanup", "SESSION"), ("secret set", "PREFAB NAME"),
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
    ("AGENT_BUILDER_API_KEY", "api_key", "x-internal-token"), ("GATEWAY_JWT_TOKEN", "jwt_token", "authorization"),
    ("X_INTERNAL_TOKEN", "internal_token", "x-internal-token"), ("", "", ""),
])
def test_the_credential_is_the_environments_and_two_are_wrong_usage(
        cli: Any, gateway: LocalGateway, monkeypatch: Any, name: str, attribute: str, header: str) -> None:
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


def test_the_debug_log_goes_to_stderr_without_credentials_and_control_characters(lone: Path) -> None:
    with Script(answer({"detail": NASTY}, 503, Retry_After="0"), answer({})) as server:
        ended = ended_python(lone, "-v", "spec", "a", "1", env=environment_for(server))
    assert (ended.status, ended.out) == (0, "{}\n")
    assert "GET /v1/prefabs/a/1/spec 200" in ended.err
    assert TOKEN not in ended.err
    assert "gnp" in ended.err and ended.err.replace("\n", "").isprintable()


@pytest.mark.parametrize(("line", "reason"), [
    ("list --base-url http://127.0.0.1:{port}", "no connection to http://127.0.0.1:{port}"), ("upload no", "no"),
    ("run no-such 1 f", "no-such"), ("run a 1 f -f files=no.txt", "no.txt"), ("run a 1 f -d @no.json", "no.json"),
    ("spec no-such", "no-such"), ("spec text-tools 9.9.9", "text-tools"), ("batch no.jsonl", "no.jsonl"),
    ("url s3://local/agent-outputs/nobody/nothing/f", "/internal/files/download"),
    ("download s3://local/agent-outputs/nobody/nothing/f f", "/internal/files/download"),
])
def test_what_fails_is_one_line_on_stderr(cli: Any, line: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # where nobody listens any more
    assert reason.format(port=port) in cli(*line.format(port=port).split()).error()


PROBLEMS = [{"loc": ["body", "calls", number], "msg": f"bad {number}", "type": "x"} for number in range(2)]


@pytest.mark.parametrize(("reply", "told"), [
    (answer({"detail": PROBLEMS}, 422), "422: body.calls.0: bad 0; body.calls.1: bad 1\n"),
    (answer({"detail": "first:\n second\n"}, 400), "first: second\n"),
    *((answer(body=body), "GET /v1/prefabs") for body in (b"[", b"null", b'[{"id": 1}]', b"\xff", b"[" * 100_000)),
], ids=["several messages", "several lines", "cut", "null", "no version", "not UTF-8", "deep"])
def test_an_odd_answer_is_one_line_and_no_wrong_usage(cli: Any, reply: bytes, told: str) -> None:
    assert told in cli("list", replies=[reply]).error(1)


# Signals, and pipes that are closed or full


@posix
@pytest.mark.parametrize(("name", "line", "replies", "kept", "told"), [
    ("SIGINT", "batch calls.jsonl --workers 1", [ran("first"), Pause()], b"first",
     "calls that have no line on stdout may have run"),
    ("SIGHUP", "run a 1 f --stream", [Pause(chunked(event("content", "first"), end=False))], b"first\n",
     "the call may have run"),
    ("SIGTERM", "run a 1 f", [Pause()], b"", "the call may have run"),
    ("SIGINT", "run a 1 f -f x=calls.jsonl", [LINK, Pause()], b"", "no call was made"),
    ("SIGTERM", "list", [Pause()], b"", "no call was made"),
], ids=["batch", "stream", "run", "upload", "list"])
def test_a_signal_ends_any_command_with_one_line_and_nothing_more_is_sent(
        lone: Path, name: str, line: str, replies: list[Answer], kept: bytes, told: str) -> None:
    with Script(*replies) as server, \
            started(lone, *line.split(), cwd=str(lone.parent), env=environment_for(server)) as process:
        server.wait_until(lambda: len(server.received) == len(replies))
        out = os.read(process.stdout.fileno(), len(kept.strip())) if kept else b""  # each as it came
        process.send_signal(getattr(signal, name))
        rest, err = process.communicate()
        assert kept in out + rest
        assert (process.returncode, err.decode()) == (ENDINGS[name], f"interrupted: {told}.\n")
        assert len(server.received) == len(replies)


@posix
@pytest.mark.parametrize("name", ENDINGS)
def test_a_batch_that_a_signal_ends_prints_all_results_that_have_arrived(lone: Path, name: str) -> None:
    (lone.parent / "calls").write_text("".join(call_line(value=number) for number in range(60)))
    all_but_the_first = threading.Event()

    def choose(received: Received) -> Answer:
        if b'{"value":0}' in received.body:
            return Pause()
        if len(server.received) == 60:  # by then, the answers of all but the other workers are there
            all_but_the_first.set()
        return ran(received.json["calls"][0]["inputs"]["parameters"]["value"])

    with Routed(choose) as server, started(lone, "batch", "calls", cwd=str(lone.parent), env=environment_for(server),
                                           ) as process:
        assert all_but_the_first.wait(WAIT_SECONDS)
        process.send_signal(getattr(signal, name))
        lines = [json.loads(line) for line in process.stdout]
        assert process.wait() == ENDINGS[name]
    assert len(lines) >= 59 - 7
    assert [line["index"] for line in lines] == [line["output"]["output"] for line in lines] == sorted(
        {line["index"] for line in lines} - {0})


@posix
def test_a_line_that_is_begun_is_finished_and_a_second_signal_ends_at_once(lone: Path) -> None:
    (lone.parent / "calls").write_text("".join(call_line(value=number) for number in range(24)))
    for second in (False, True):
        with Script(*[ran("x" * 100_000)] * 24) as server, started(
                lone, "batch", "calls", cwd=str(lone.parent), env=environment_for(server)) as process:
            server.wait_until(lambda: len(server.received) == 24)
            assert process.stdout.read(1) == b"{"
            process.send_signal(signal.SIGINT)  # while it waits for a reader in the middle of a line
            if second:
                process.send_signal(signal.SIGTERM)
                assert process.wait(WAIT_SECONDS) == 143
                continue
            lines = [json.loads(line) for line in (b"{" + process.stdout.read()).splitlines()]
            assert process.wait() == 130
            assert [line["index"] for line in lines] == sorted({line["index"] for line in lines})
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


@posix
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(lone: Path, name: str) -> None:
    number, sent = getattr(signal, name), threading.Event()
    late = Steps((lambda _: sent.wait(WAIT_SECONDS), send(ran("all the same"))))
    before = signal.signal(number, signal.SIG_IGN)  # a child inherits that, as from `nohup`
    try:
        with Script(late) as server, started(lone, "run", "a", "1", "f", env=environment_for(server)) as process:
            server.wait_until(lambda: server.received)
            process.send_signal(number)
            sent.set()
            out, err = process.communicate()
            assert (process.returncode, json.loads(out)["output"]["output"], err) == (0, "all the same", b"")
    finally:
        signal.signal(number, before)


@posix
@pytest.mark.parametrize("line", ["run a 1 f --save saved", "download s3://b/o.bin saved/o.bin"])
def test_a_signal_leaves_no_part_of_a_file(lone: Path, line: str) -> None:
    entry = {"status": "SUCCESS", "output": {"status": "SUCCESS", "output": 1, "files": {"a": ["s3://b/o.bin"]}}}
    result = [answer({"results": [entry]})] if line.startswith("run") else []
    part = Pause(OK + b"Content-Length: 9\r\n\r\npart")
    folder = lone.parent / "saved"
    folder.mkdir()
    with Script(*result, LINK, part) as server, \
            started(lone, *line.split(), cwd=str(lone.parent), env=environment_for(server)) as process:
        deadline = time.monotonic() + WAIT_SECONDS
        while len([*folder.iterdir()]) < 1 + len(result):  # the part; and `--save` has taken the name
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
    assert cli("list", replies=[Steps((lambda _: seen.extend(handlers()), send(answer([]))))]).json == []
    assert handlers() == before
    assert [new == old for new, old in zip(seen, before)] == [old == signal.SIG_IGN for old in before]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # where there are no signals to take
        assert pool.submit(cli, "list").result().status == 0


@posix
def test_pipes_that_make_nobody_wait_lose_nothing(lone: Path) -> None:
    reader, writer = os.pipe()
    source, sink = os.pipe()
    os.set_blocking(writer, False)
    os.set_blocking(source, False)
    text = "x" * 300_000
    with Script(ran(text)) as server, started(lone, "run", "a", "1", "f", "-d", "-", env=environment_for(server),
                                             stdin=source, stdout=writer) as process:
        os.close(writer)
        os.write(sink, b'{"value":')
        deadline = time.monotonic() + WAIT_SECONDS
        while select.select([source], [], [], 0)[0]:  # until it has read this, and waits for the rest
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
    with Script(ran("paid for")) as server, started(
            lone, "-v", "run", "a", "1", "f", env=environment_for(server), stderr=writer) as process:
        assert json.loads(process.stdout.read())["output"]["output"] == "paid for"
        assert process.wait() == 0
    os.close(writer)


@posix
def test_an_interrupted_batch_prints_the_results_that_it_has(lone: Path, gateway: LocalGateway) -> None:
    closing, terminal = threading.Event(), Terminal()

    def wait_longer_if_first(number: int) -> int:
        closing.wait(3 * WAIT_SECONDS if number == 0 else 0.2)  # until a bar is due
        return number

    gateway.add_prefab("patient", "1.0.0", {"f": wait_longer_if_first})
    (lone.parent / "calls").write_text("".join(call_line("f", "patient", "1.0.0", number=n) for n in range(2)))
    with started(lone, "batch", "calls", cwd=str(lone.parent), env=environment_for(gateway),
                 stderr=terminal.end) as process:
        terminal.wait_for(b"1 of 2 calls")
        process.send_signal(signal.SIGINT)
        (line,) = process.stdout.readlines()
        assert (json.loads(line)["index"], process.wait(WAIT_SECONDS)) == (1, 130)
    closing.set()
    assert screen(terminal.rest()) == ["interrupted: calls that have no line on stdout may have run.", ""]


@posix
@pytest.mark.parametrize(("line", "reply"), [
    ("run a 1 f --stream", chunked(event("content", "more\n"), event("done"))), ("batch calls.jsonl", ran()),
], ids=["stream", "batch"])
def test_a_reader_that_has_seen_enough_is_no_error(lone: Path, line: str, reply: bytes) -> None:
    closed = threading.Event()
    late = Steps((lambda _: closed.wait(WAIT_SECONDS), send(reply)))
    with Script(*[late] * 9) as server, \
            started(lone, *line.split(), cwd=str(lone.parent), env=environment_for(server)) as process:
        server.wait_until(lambda: server.received)
        process.stdout.close()
        closed.set()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@posix
@pytest.mark.parametrize(("line", "statuses"), [
    ("upload a.txt >&-", (0, 1)), ("upload a.txt 2>&-", (0,)), ("upload a.txt > /dev/full", (1,)),
    ("secret set vault K <&-", (1, 2)), ("run >&- 2>&-", (2,)), ("run 2> /dev/full", (2,)), ("--help | true", (0,)),
    ("run --help > /dev/full", (0,)),
])
def test_a_closed_or_full_stream_is_no_traceback(cli: Any, shell: Any, line: str, statuses: Any) -> None:
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    ended = shell(f"gateway-sdk {line}")
    assert ended.status in statuses, ended.err
    assert ended.err.count("\n") == (ended.status != 0 and "2>" not in line)
    assert ("s3://" in ended.out) == ("a.txt 2>" in line)


# The file as a program, and within one


def test_a_program_can_call_main_and_print_besides(cli: Any, gateway: LocalGateway) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli("list").status == 0
    assert json.loads(out.getvalue()) == gateway.prefabs()
    code = "import gateway_sdk; print('before'); gateway_sdk.main(['list']); print('behind')"
    printed = ended_python("-c", code, cwd=str(ROOT), env=environment_for(gateway)).out.splitlines()
    assert (printed[0], json.loads(printed[1]), printed[2]) == ("before", gateway.prefabs(), "behind")


@posix
def test_the_file_is_a_program(lone: Path) -> None:
    assert SDK.read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")
    done = subprocess.run([f"./{lone.name}", "--version"], cwd=str(lone.parent), capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{gateway_sdk.__version__}\n".encode())


def test_an_older_python_is_told_which_one_is_needed(lone: Path) -> None:
    ast.parse(lone.read_text(encoding="utf-8"), feature_version=(3, 8))  # or it could not tell
    old = f"import sys, runpy; sys.version_info = (3, 8, 18); sys.argv = [{str(lone)!r}, 'list']\n"
    told = "gateway_sdk needs Python 3.9 or newer, and this is Python "
    script = ended_python("-c", f"{old}runpy.run_path(sys.argv[0], run_name='__main__')")
    assert (script.status, script.out, script.err[: len(told)], script.err.count("\n")) == (1, "", told, 1)
    imported = ended_python("-c", f"""{old}
try:
    runpy.run_path(sys.argv[0])
except ImportError as error:
    print(error)""")
    assert (imported.status, imported.out[: len(told)], imported.err) == (0, told, "")


def test_the_command_line_uses_few_privates_of_the_module() -> None:
    lines = SDK.read_text(encoding="utf-8").splitlines()
    (banner,) = [number for number, line in enumerate(lines, 1) if line.startswith("# --- Command line ---")]
    section = [node for node in TREE.body if node.lineno > banner]
    targets = [target for node in section if isinstance(node, ast.Assign) for target in node.targets]
    own = {node.name for node in section if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    own |= {target.id for target in targets if isinstance(target, ast.Name)}
    nodes = [node for top in section for node in ast.walk(top)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    own_attributes = {node.attr for node in nodes
                      if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("self", "os")}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)} - own_attributes
    used = {name for name in (names - own) | attributes if re.match("_[^_]", name)}
    assert used - {"_"} == {"_Json", "_in_shell"}


# --- README and repository ------------------------------------------------------------------------

READMES = ("README.md", "README.zh-CN.md")
TREE = ast.parse(SDK.read_text(encoding="utf-8"))
PUBLIC = {
    "GatewayClient", "Prefab", "PrefabCall", "PrefabResult", "BatchResult", "CallStatus", "StreamEvent",
    "StreamEventType", "EventStream", "PrefabInfo", "GatewayError", "AuthenticationError", "PrefabNotFoundError",
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


def test_every_block_of_the_readme_works(cli: Any, shell: Any, capsys: Any, caplog: Any) -> None:
    caplog.set_level(logging.NOTSET, "gateway_sdk")  # which is undone at the end, whatever a block sets
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for language, code, line in blocks_of("README.md"):
        if language == "python":
            exec(compile("\n" * line + code, "README.md", "exec"), namespace)
            continue
        ended = shell(code, ROOT) if re.search("python3? examples/", code) else shell(code)
        assert (ended.status, ended.out != "") == (0, True), f"line {line}: {ended.err}"
    namespace["client"].close()
    out, err = capsys.readouterr()
    assert "'words': 2" in out
    assert not re.search("fail", out + err, re.I)
    assert (namespace["batch"].all_success(), namespace["result"].is_success()) == (True, True)


def test_the_manifest_of_the_readme_serves_a_function(tmp_path: Path) -> None:
    manifest = re.search(r'```text\n(\{"id": "my-prefab".*?)```', (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert manifest
    (tmp_path / "prefab-manifest.json").write_text(manifest[1])
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.py").write_text("def greet(name):\n    return 'Hello, ' + name\n")
    with LocalGateway(tmp_path) as gateway, client_of(gateway) as client:
        assert client.prefab("my-prefab", "1.0.0").greet(name="you").get_function_result() == "Hello, you"
    (tmp_path / "prefab-manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="prefab-manifest.json cannot be used"):
        LocalGateway(tmp_path)


def test_the_readmes_have_the_same_code_apart_from_comments() -> None:
    def without_comments(language: str, code: str, _: int) -> str:
        return ast.dump(ast.parse(code)) if language == "python" else re.sub(r"(?<!\S)#.*", "", code)

    english, chinese = ([without_comments(*block) for block in blocks_of(name)] for name in READMES)
    assert english == chinese


def test_the_newest_version_of_the_changelog_is_this_one() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(\d.*?)\]", text, re.M)[0] == gateway_sdk.__version__


def test_the_public_names_are_those_of_the_contract_and_documented() -> None:
    assert sorted(gateway_sdk.__all__) == sorted(PUBLIC)
    assert all(hasattr(gateway_sdk, name) for name in PUBLIC)
    tops = [node for node in TREE.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert {node.name for node in tops if not node.name.startswith("_")} <= PUBLIC | {"main"}
    methods = [node for top in tops if top.name in PUBLIC for node in top.body if isinstance(node, ast.FunctionDef)
               and not any(getattr(decorator, "id", "") == "overload" for decorator in node.decorator_list)]
    public = [node for node in tops + methods if not node.name.startswith("_")]
    assert len(public) > 50
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_no_name_of_the_module_is_used_above_its_definition() -> None:
    defined: dict[Any, int] = {}
    for node in TREE.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for name in (getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)):
            defined.setdefault(name, node.lineno)
    assert {"GatewayClient", "main", "DEFAULT_BASE_URL"} <= set(defined)
    hints = [getattr(node, field, None) for node in ast.walk(TREE) for field in ("annotation", "returns")]
    hinted = {id(part) for hint in hints if hint for part in ast.walk(hint)}
    used = [(node.id, node.lineno) for top in TREE.body for node in ast.walk(top)
            if isinstance(node, ast.Name) and id(node) not in hinted and defined.get(node.id, 0) > top.lineno]
    assert used == []


def imported_names() -> set[str]:
    nodes = list(ast.walk(TREE))
    assert not any(node.level for node in nodes if isinstance(node, ast.ImportFrom))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.skipif(sys.version_info < (3, 10), reason="Python 3.9 does not say what its standard library is")
def test_only_the_standard_library_is_imported() -> None:
    assert {"json"} < {name.partition(".")[0] for name in imported_names()} <= set(sys.stdlib_module_names)


# --- Everywhere -----------------------------------------------------------------------------------

CALLS_IN_CODE = """
with gateway_sdk.GatewayClient.from_env() as client:
    print(client.run("text-tools", "1.1.0", "echo", {"value": 1}).get_function_result())
    print(sum(1 for _ in client.run("text-tools", "1.1.0", "words", {"text": "a b"}, stream=True)) > 2)
"""
PRINTED = "1\nTrue\n"


@pytest.mark.parametrize("way", ["-I -S FILE", "-OO FILE", "-bb -E -s FILE", "-X dev -W error FILE", "-m gateway_sdk"])
def test_it_runs_in_any_way_and_needs_nothing_of_the_environment(gateway: LocalGateway, lone: Path, way: str) -> None:
    needed = {"GATEWAY_BASE_URL", "X_INTERNAL_TOKEN", "SYSTEMROOT"}  # no HOME, no PATH
    little = {name: value for name, value in environment_for(gateway).items() if name in needed}
    command = [sys.executable, "-B", *way.replace("FILE", lone.name).split(), *ECHO, "-d", '{"value": 1}']
    done = subprocess.run(command, cwd=str(lone.parent), env=little, capture_output=True, encoding="utf-8", timeout=60)
    assert Ended(done.returncode, done.stdout, done.stderr).value == 1


@pytest.mark.parametrize(("name", "place"), [
    ("gateway_sdk", "all.zip"), ("mypkg.inner.gateway_sdk", "."), ("imported_by_it.gateway_sdk", "."),
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
        (package / "__init__.py").write_text("from .gateway_sdk import *" if "imported" in name else "")
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


def test_without_ssl_http_works_and_https_is_a_clear_error(gateway: LocalGateway, lone: Path) -> None:
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
def test_an_unprivileged_user_can_use_it_from_a_folder_that_is_read_only(gateway: LocalGateway) -> None:
    code = f"""import importlib, os, sys
for name in {sorted(imported_names() | {"encodings.idna", "encodings.utf_8_sig", "locale"})}:
    importlib.import_module(name)  # as Python itself may lie in root's home
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
os.environ["HOME"], sys.path[0], sys.dont_write_bytecode = "/nonexistent", os.getcwd(), False
import gateway_sdk
{CALLS_IN_CODE}
assert gateway_sdk.main(["upload", "gateway_sdk.py"]) == 0
sys.exit(gateway_sdk.main("run file-tools 1.0.0 checksum -f files=gateway_sdk.py --save saved".split()))"""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(str(SDK), folder)
        os.chmod(folder, 0o555)
        ended = ended_python("-c", code, cwd=folder, env=environment_for(gateway))
        assert os.listdir(folder) == ["gateway_sdk.py"]
        os.chmod(folder, 0o755)
    *printed, uploaded, result = ended.out.splitlines()
    assert (printed, json.loads(uploaded)["size"]) == (PRINTED.split(), SDK.stat().st_size)
    assert json.loads(result)["status"] == "SUCCESS"
    assert os.path.basename(folder) in ended.error(out=ended.out)  # in which nothing can be made


@cpython_only
def test_an_import_changes_nothing_and_takes_no_time_for_what_few_need(lone: Path) -> None:
    code = """import logging, os, signal, socket, sys, threading
def state():
    root = logging.getLogger()
    return (dict(os.environ), os.getcwd(), threading.enumerate(), root.handlers[:], root.level, root.manager.disable,
            socket.getdefaulttimeout(), signal.getsignal(signal.SIGINT), sys.path[:], sys.excepthook, sys.stdout,
            sys.stderr, os.listdir("."), sys.getrecursionlimit())
seen, before = [], state()
def watch(event, arguments):
    writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writing or event.startswith(("socket.", "subprocess.", "os.putenv", "os.mkdir", "os.fork", "_thread.start")):
        seen.append((event, arguments))
sys.addaudithook(watch)
import gateway_sdk
assert (state(), seen) == (before, []), seen
own = logging.getLogger("gateway_sdk")
assert own.level == 0 and {type(handler) for handler in own.handlers} <= {logging.NullHandler}
print({"argparse", "concurrent.futures", "urllib.request", "asyncio", "getpass"} & set(sys.modules))"""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
    assert ended_python("-c", code, cwd=str(lone.parent), env=environment) == (0, "set()\n", "")


# --- Examples -------------------------------------------------------------------------------------

EXAMPLES = ROOT / "examples"
EXPECTED_LINES = {
    "basic_usage": [
        "words: 6", "find: 2 matches", "deployed: text-tools 1.1.0 - .*",
        r"newest text-tools: 1\.1\.0 \['statistics', 'words', 'echo', 'find'\]", "call 3: FAILED",
        r"batch: PARTIAL_SUCCESS, words \[1, 2, 3\], failed \['ServiceUnavailableError'\]",
        "bad input: .*Missing required parameter: text", "not found: no-such-prefab 1.1.0",
        r"missing secret: SIGNING_KEY\. .+", "signed: [0-9a-f]{64}",
    ],
    "streaming": [
        "So much depends upon a red wheel barrow glazed with rain water", "complete: 12 pieces", "found 'red': .*",
        "start", r"content: streaming\.py has [\d,]+ bytes", "progress: 1 of 2", "progress: 2 of 2", "done",
        "error: RuntimeError: stumbled",
    ],
    "file_operations": [
        r"kept: first\.txt, 1,700,000 bytes", "listed: True", "shared: http://[^?]* - the same bytes: True",
        "temporary files: 2", r".*100%", r"downloaded: both\.txt, 3,400,000 bytes", "temporary files afterwards: 0",
    ],
    "third_party": [
        "checksum: [0-9a-f]{64}", "lines of the output file: 1", "output file: s3://.*",
        "for agents only: .* answered 400: .*", "not downloaded: .*",
    ],
    "distributed_batch": [
        r"process pool: COMPLETED, words \[1, 2, .*, 20\]",
        r"Dask: COMPLETED, words \[1, 2, .*, 20\]" if importlib.util.find_spec("distributed")
        else r"Dask: not installed.*",
    ],
}


def environment_of_example(name: str, gateway: LocalGateway) -> dict[str, str]:
    if name == "third_party":  # this one is not an agent
        return {"GATEWAY_BASE_URL": gateway.base_url, "AGENT_BUILDER_API_KEY": gateway.api_key}
    return {"GATEWAY_BASE_URL": gateway.base_url, "X_INTERNAL_TOKEN": gateway.internal_token}


@pytest.mark.parametrize(("example", "runs_already"), [
    *((name, True) for name in EXPECTED_LINES if name != "distributed_batch"),
    pytest.param("distributed_batch", True, marks=cpython_only),  # PyPy 7.3.11 has a process pool that cannot start
    ("file_operations", False), ("third_party", False),  # with a gateway of their own, each for another credential
])
def test_an_example_shows_what_it_promises(
        example: str, runs_already: bool, gateway: LocalGateway, tmp_path: Path) -> None:
    with client_of(gateway) as client, contextlib.suppress(GatewayError):
        client.delete_secret("vault", "SIGNING_KEY")  # which another test may have left
    requests, executed = len(gateway.requests), len(gateway.executed)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1"}
    if runs_already:
        environment.update(environment_of_example(example, gateway))
    command = [sys.executable, "-X", "dev", "-W", "default", str(EXAMPLES / f"{example}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" or example == "distributed_batch"  # Dask has warnings of its own
    assert list(tmp_path.iterdir()) == []
    for line in EXPECTED_LINES[example]:
        assert re.search(f"(?m)^{line}$", done.stdout.replace("\r", "\n")), (line, done.stdout)
    assert (len(gateway.requests) > requests) == runs_already
    if example == "distributed_batch":
        assert len(gateway.executed) == executed + 20 * done.stdout.count("COMPLETED")
    for secret in (gateway.internal_token, gateway.api_key, "X-Amz", "signature="):
        assert secret not in done.stdout


@pytest.mark.parametrize("example", EXPECTED_LINES)
def test_an_example_fails_loudly(example: str, gateway: LocalGateway, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(gateway, "quota", 0)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(tmp_path)
    for name, value in environment_of_example(example, gateway).items():
        monkeypatch.setenv(name, value)
    with pytest.raises((GatewayError, SystemExit), match="quota"), concurrent.futures.ThreadPoolExecutor(1) as pool:
        if example == "distributed_batch":  # a pool of processes takes its time, and fails no louder
            importlib.import_module(example).count_words(GatewayClient.from_env(), pool, "a thread")
        else:
            runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")


# --- The agent with FastAPI -----------------------------------------------------------------------

needs_fastapi = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))), reason="needs fastapi and uvicorn"
)


class Agent:
    """The example in a process of its own, and requests to it."""

    def __init__(self, gateway: Any) -> None:
        self.gateway = gateway
        self.log: list[str] = []

    def __enter__(self) -> Agent:
        command = [sys.executable, "-X", "dev", str(EXAMPLES / "fastapi_agent.py")]
        environment = environment_for(self.gateway, PORT="0", PYTHONUNBUFFERED="1")
        del environment["X_INTERNAL_TOKEN"]  # the tokens are those of its callers
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        for line in self.process.stdout:
            self.log.append(line)
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise AssertionError("".join(self.log))
        self._reader = threading.Thread(target=self.log.extend, args=[self.process.stdout], daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(WAIT_SECONDS)
        self._reader.join(WAIT_SECONDS)
        self.process.stdout.close()

    @contextlib.contextmanager
    def post(self, path: str, content: Any, token: str | None = None) -> Iterator[http.client.HTTPResponse]:
        """An answer; the connection is closed at the end, read to its end or not."""
        token = self.gateway.internal_token if token is None else token
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "X-Internal-Token": token}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        with contextlib.closing(connection):
            connection.request("POST", path, body, {name: value for name, value in headers.items() if value})
            with connection.getresponse() as response:
                yield response


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with LocalGateway() as gateway, Agent(gateway) as running:
        yield running


def read_event(response: http.client.HTTPResponse) -> dict[str, Any]:
    """The next event, which must have arrived whole before the one after it is made."""
    line = response.readline()
    assert line.startswith(b"data: "), line
    assert response.readline() == b"\n"
    return json.loads(line[6:])


class Gated:
    """A streaming function that gives its next event when it is told to, and notes when it is cut off."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.cut_off = threading.Event()

    def words(self, text: str, delay: float = 0.0) -> Iterator[str]:
        yield from self._stream(text.split())

    def inspect(self, inputs: dict[str, list[Path]]) -> Iterator[str]:
        yield from self._stream([path.read_text() for path in inputs["files"]] * 1000)

    def _stream(self, pieces: list[str]) -> Iterator[str]:
        try:
            for piece in pieces:
                assert self.gate.acquire(timeout=3 * WAIT_SECONDS)  # longer than any reader waits
                yield piece
        except GeneratorExit:  # the gateway could not send on: its client is gone
            self.cut_off.set()
            raise


@needs_fastapi
def test_the_agent_answers_with_what_its_prefab_found(agent: Agent) -> None:
    with agent.post("/statistics", {"text": "a b c"}) as response:
        assert (response.status, json.load(response)["words"]) == (200, 3)
    assert agent.gateway.requests[-1].headers["x-internal-token"] == agent.gateway.internal_token


@needs_fastapi
def test_the_agent_passes_each_event_on_at_once(agent: Agent) -> None:
    gated = Gated()
    agent.gateway.add_prefab("text-tools", "1.1.0", {"words": gated.words})
    with agent.post("/words", {"text": "one two"}) as response:
        assert response.getheader("Content-Type", "").startswith("text/event-stream")
        assert read_event(response)["type"] == "start"
        for word in ("one", "two"):  # the next one is not made before this one was read here
            gated.gate.release()
            assert read_event(response)["data"] == word
        assert read_event(response)["type"] == "done"
        assert response.read() == b""


@needs_fastapi
def test_the_agent_serves_others_while_a_stream_waits(agent: Agent) -> None:
    gated = Gated()
    agent.gateway.add_prefab("text-tools", "1.1.0", {"words": gated.words, "statistics": len_of})
    with contextlib.ExitStack() as open_streams:
        for _ in range(50):  # more than asyncio's own threads
            response = open_streams.enter_context(agent.post("/words", {"text": "one"}))
            assert read_event(response)["type"] == "start"
        with agent.post("/statistics", {"text": "a b c"}) as response:
            assert json.load(response) == 5
        gated.gate.release(50)


@needs_fastapi
def test_the_agent_closes_the_upstream_stream_when_its_caller_hangs_up(agent: Agent) -> None:
    gated = Gated()
    agent.gateway.add_prefab("file-tools", "1.0.0", {"inspect": gated.inspect})
    with client_of(agent.gateway) as client:
        with agent.post("/inspect", b"some text") as response:
            assert read_event(response)["type"] == "start"
            gated.gate.release()
            assert read_event(response)["data"] == "some text"
            assert len(client.list_temp_files()["files"]) == 1
        # The function now waits and sends nothing: only the agent can know that its caller has gone.
        wait_for(lambda: any(r.method == "DELETE" for r in agent.gateway.requests))
        assert client.list_temp_files()["files"] == []
    gated.gate.release(1000)
    assert gated.cut_off.wait(WAIT_SECONDS)


@needs_fastapi
def test_the_agent_cleans_up_after_a_stream_and_after_a_refusal(agent: Agent) -> None:
    def count_deletes() -> int:
        return sum(r.method == "DELETE" and "session_id=" in r.path for r in agent.gateway.requests)

    def nothing(inputs: dict[str, list[Path]]) -> Iterator[str]:
        yield from ()

    for functions, status in (({"inspect": nothing}, 200), ({"other": nothing}, 502)):
        agent.gateway.add_prefab("file-tools", "1.0.0", functions)
        before = count_deletes()
        with agent.post("/inspect", b"some text") as response:
            assert response.status == status
            response.read()
        wait_for(lambda: count_deletes() == before + 1)  # noqa: B023 - called at once


def wait_for(condition: Callable[[], object]) -> None:
    """Waits until something is true that no event tells about."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def len_of(text: str) -> int:
    return len(text)


@needs_fastapi
@pytest.mark.parametrize(("function", "token", "path", "status", "error"), [
    (len_of, "", "/statistics", 401, None),
    (len_of, "stranger", "/statistics", 401, "AuthenticationError"),
    (len_of, "stranger", "/words", 401, "AuthenticationError"),
    (len_of, "an API key's", "/inspect", 403, "AgentContextRequiredError"),
    (lambda secrets, text: None, None, "/statistics", 409, "MissingSecretError"),
    (lambda text, more: None, None, "/statistics", 422, "ValidationError"),
    ("over the quota", None, "/statistics", 429, "QuotaExceededError"),
    (lambda text: 1 / 0, None, "/statistics", 503, "ServiceUnavailableError"),
    (None, None, "/statistics", 502, "PrefabNotFoundError"),
])
def test_the_agent_answers_errors_with_a_fitting_status(
        agent: Agent, monkeypatch: Any, function: Any, token: str | None, path: str, status: int, error: str | None
) -> None:
    if function == "over the quota":
        monkeypatch.setattr(agent.gateway, "quota", 0)
        function = len_of
    secrets = ["KEY"] if error == "MissingSecretError" else []
    functions = {"statistics": function, "words": function} if function else {"other": len_of}
    agent.gateway.add_prefab("text-tools", "1.1.0", functions, secrets=secrets)
    if token == "an API key's":
        exchanging = GatewayClient.from_api_key(agent.gateway.api_key, agent.gateway.base_url)
        token = exchanging._transport.credential["X-Internal-Token"]
    with agent.post(path, {"text": "a b c"}, token) as response:
        assert (response.status, json.load(response).get("error")) == (status, error)


@needs_fastapi
def test_the_agent_tells_a_timeout_from_other_faults() -> None:
    import fastapi_agent

    for error, status in ((GatewayTimeoutError("late"), 504), (ServiceUnavailableError("down"), 503)):
        assert asyncio.run(fastapi_agent.answer_error(None, error)).status_code == status  # type: ignore[arg-type]


@needs_fastapi
def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    import fastapi_agent

    async def read(stream: EventStream) -> list[Any]:
        return [json.loads(text[6:]) async for text in fastapi_agent.server_sent_events(stream)]

    with Script(HangUp(HEAD + chunk(event("content", "half")))) as server, client_of(server) as client:
        half, broken = asyncio.run(read(run(client, stream=True)))
    assert half["data"] == "half"
    assert (broken["type"], broken["data"]["type"]) == ("error", "ServiceUnavailableError")


@needs_fastapi
def test_the_agent_logs_no_tokens_and_no_tracebacks(agent: Agent) -> None:
    with agent.post("/statistics", {"text": "a"}, "not-to-be-logged") as response:
        assert response.status == 401
    wait_for(lambda: sum("401 Unauthorized" in line for line in agent.log))
    log = "".join(agent.log)
    for unwanted in (agent.gateway.internal_token, "not-to-be-logged", "Traceback", "Warning", "never retrieved"):
        assert unwanted not in log, log


# --- The MCP server -------------------------------------------------------------------------------

needs_mcp = pytest.mark.skipif(not importlib.util.find_spec("mcp"), reason="needs mcp")

import mcp_server

START_SECONDS = 60.0  # a slow machine takes long for the import of `mcp`

# A spec as prefabs publish it, and the schema of its tool.
MERGE_SPEC = {"id": "papers", "version": "0.2.0", "description": "Works on papers", "functions": [{
    "name": "merge",
    "description": "Merge papers",
    "parameters": [
        {"name": "title", "type": "str", "description": "Of the whole", "required": True},
        {"name": "style", "type": "string", "enum": ["plain", "bold"], "default": "plain"},
        {"name": "page", "type": "object", "required": False, "properties": {
            "size": {"type": "string", "required": True}, "margins": {"type": "array", "items": {"type": "float"}}}},
        {"name": "clip", "type": "InputFile", "required": False},  # as older specs have it
        {"name": "clips", "type": "array", "items": {"type": "InputFile"}, "required": False},
    ],
    "files": {
        "papers": {"type": "array", "items": {"type": "InputFile"}, "minItems": 1, "required": True},
        "title": {"type": "InputFile", "description": "A picture for the title page"},
        "merged": {"type": "array", "items": {"type": "OutputFile"}},
    },
}]}
STRINGS = {"type": "array", "items": {"type": "string"}}
MERGE_SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "description": "Of the whole"},
        "style": {"type": "string", "enum": ["plain", "bold"], "default": "plain"},
        "page": {"type": "object", "required": ["size"], "properties": {
            "size": {"type": "string"}, "margins": {"type": "array", "items": {"type": "number"}}}},
        "clip": {"type": "string", "description": mcp_server.FILE_HINT},
        "clips": {**STRINGS, "description": mcp_server.FILE_HINT},
        "papers": {**STRINGS, "minItems": 1, "description": mcp_server.FILE_HINT},
        "title_files": {**STRINGS, "description": f"A picture for the title page {mcp_server.FILE_HINT}"},
    },
    "required": ["title", "papers"],
    "additionalProperties": False,
}


def call_tool(gateway: Any, prefab: str, name: str, save: Any = None, reported: Any = None, **arguments: Any) -> Any:
    """Calls a tool in this process: all of the server but MCP itself. What it reports goes into `reported`."""
    async def report(text: str) -> None:
        reported.append(text)

    with client_of(gateway) as client:
        prefabs = mcp_server.Prefabs(client, [prefab], save)
        return asyncio.run(prefabs.call_tool(name, arguments, report))


def tools_of(gateway: LocalGateway | Script, *wanted: str) -> dict[str, mcp_server.Tool]:
    with client_of(gateway) as client:
        return asyncio.run(mcp_server.load_tools(client, wanted))


def texts_of(result: dict[str, Any]) -> list[str]:
    return [block["text"] for block in result["content"] if block["type"] == "text"]


# Names and schemas

FUNCTIONS = [
    ("text-tools", "words"), ("text-tools", "_words"), ("text-tools_", "words"), ("a__b", "c"), ("a", "b__c"),
    ("a_b", "c"), ("a", "b_c"), ("a.b", "c"), ("a b", "c"), ("a", "b.c"), ("数据", "查询"), ("数据", "查找"), ("", "a"),
    ("long" * 20, "function"), ("long" * 20, "other"), ("x" * 30, "y" * 32), ("x" * 30, "y" * 33),
    ("A", "b"), ("a", "B"),
]


def test_tools_have_names_that_are_unique_and_that_every_model_takes() -> None:
    versions = ("", "1.0.0", "1_0_0", "1.0.1")
    names = [mcp_server.tool_name(*pair, version) for pair in FUNCTIONS for version in versions]
    assert len(set(names)) == len(FUNCTIONS) * len(versions) > 50
    assert [name for name in names if not re.fullmatch("[A-Za-z0-9_-]{1,64}", name)] == []
    assert names[0] == "text-tools__words"


def test_a_tool_keeps_its_name_when_other_prefabs_come_and_versions_go() -> None:
    with LocalGateway() as gateway:
        before = set(tools_of(gateway))
        gateway.add_prefab("text_tools", "1.0.0", {"words": len_of, "wörds": len_of})
        gateway.add_prefab("text-tools", "2.0.0", {"words": len_of})
        after = tools_of(gateway)
    assert before - set(after) == {"text-tools__statistics", "text-tools__echo", "text-tools__find"}
    assert (after["text-tools__words"].version, after["text_tools__words"].prefab_id) == ("2.0.0", "text_tools")


def test_the_schema_has_all_that_a_spec_says() -> None:
    tool = mcp_server.make_tool(MERGE_SPEC, MERGE_SPEC["functions"][0], pinned=False)
    assert (tool.name, tool.schema) == ("papers__merge", MERGE_SCHEMA)
    assert tool.description == "Merge papers\n\nPrefab papers 0.2.0. Works on papers"


@pytest.mark.parametrize(("entry", "schema"), [
    ({"type": "bool", "default": False}, {"type": "boolean", "default": False}),
    ({"type": "integer", "minimum": 1, "maximum": 9}, {"type": "integer", "minimum": 1, "maximum": 9}),
    ({"type": "string | array"}, {"type": ["string", "array"], "items": {}}),
    ({"type": "list[str]"}, {"type": "array", "items": {}}),
    ({"type": "any"}, {}), ({"type": "Paper"}, {}), ({}, {}),
    ({"type": "string", "default": None}, {"type": "string"}),
    ({"type": "array", "items": {"type": "object", "properties": {"n": {"type": "int"}}}},
     {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}}),
    ({"type": "object", "required": ["b"], "properties": {"a": {}, "b": {"type": "object", "required": ["c"]}}},
     {"type": "object", "required": ["b"], "properties": {"a": {}, "b": {"type": "object"}}}),
])
def test_a_specs_type_becomes_json_schema(entry: dict[str, Any], schema: dict[str, Any]) -> None:
    assert mcp_server.schema_of(entry) == schema


@pytest.mark.parametrize(("entry", "required"), [
    ({}, ["a"]), ({"required": True, "default": 1}, ["a"]), ({"default": 1}, None), ({"required": False}, None)])
def test_a_parameter_is_required_unless_the_spec_says_otherwise(entry: dict[str, Any], required: Any) -> None:
    assert mcp_server.object_schema({"a": entry}, default_required=True).get("required") == required


def test_the_newest_deployed_versions_are_served_unless_others_are_asked_for() -> None:
    with LocalGateway() as gateway:
        for version in ("1.9.0", "1.10.0", "1.10.0-rc.1"):
            gateway.add_prefab("p", version, {"f": len_of})
        gateway.add_prefab("p", "2.0.0", {"f": len_of}, status="failed")
        assert tools_of(gateway)["p__f"].version == "1.10.0"
        assert list(tools_of(gateway, "p")) == ["p__f"]
        both = tools_of(gateway, "p@1.9.0", "p@1.10.0-rc.1", "p")
        assert [tool.version for tool in both.values()] == ["1.9.0", "1.10.0-rc.1", "1.10.0"]
        for wanted in ("q", "q@1.0.0"):
            with pytest.raises(GatewayError, match=f"{wanted}: "):
                tools_of(gateway, wanted)


def test_a_prefab_whose_spec_is_no_use_costs_no_other_one(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_server, "SPECS_AT_ONCE", 1)  # so that the specs are asked for in this order
    good = {"id": "good", "version": "1.0.0", "functions": [{"name": "f", "description": "half a pair: \ud83d"}]}
    deep = functools.reduce(lambda inner, _: {"properties": {"a": inner}}, range(200), {"name": "a"})
    deep_function = {"name": "f", "parameters": [{"name": "a", **deep}]}
    specs = {"bad": {**good, "functions": ["f"]}, "deep": {**good, "functions": [deep_function]},
             "good": good, "worse": {}}
    directory = answer([{"id": name, "version": "1.0.0"} for name in specs])
    pairs = [(directory, answer(spec)) for spec in specs.values()]
    with Script(directory, *itertools.chain(*pairs)) as server:
        tools = tools_of(server)
    assert [(name, tool.description[:14]) for name, tool in tools.items()] == [("good__f", "half a pair: ?")]
    assert re.findall(r"left out: (\w+):", capsys.readouterr().err) == ["bad", "deep", "worse"]


@pytest.fixture
def mcp_main(gateway: LocalGateway, monkeypatch: Any, capsys: Any) -> Callable[..., Ended]:
    """Runs the server as a program, in this process and as if `mcp` were not installed."""
    monkeypatch.setitem(sys.modules, "mcp", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("GATEWAY_BASE_URL", gateway.base_url)
    monkeypatch.setenv("X_INTERNAL_TOKEN", gateway.internal_token)
    return lambda *arguments: Ended(mcp_server.main(arguments), *capsys.readouterr())


@pytest.mark.parametrize("runs_already", [False, True], ids=["a gateway of its own", "one that runs already"])
def test_the_tools_are_listed_for_models_without_the_package(
        runs_already: bool, mcp_main: Any, gateway: LocalGateway, monkeypatch: Any) -> None:
    gateway.add_prefab("listed", "1.0.0", {"count": len_of})
    if not runs_already:
        monkeypatch.delenv("GATEWAY_BASE_URL")
    done = mcp_main("--list")
    assert (done.status, done.err) == (0, "")
    tools = {tool["function"]["name"]: tool for tool in json.loads(done.out)}
    assert ("listed__count" in tools) == runs_already
    assert tools["text-tools__statistics"] == {"type": "function", "function": {
        "name": "text-tools__statistics",
        "description": "Count the characters, words and lines of a text, and its most common words.\n\n"
                       "Prefab text-tools 1.1.0. Looks at texts",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"],
                       "additionalProperties": False},
    }}


def test_the_server_says_what_is_missing(mcp_main: Any, gateway: LocalGateway, monkeypatch: Any) -> None:
    assert mcp_main("--list", "--prefab", "q")[:2] == (1, "")
    monkeypatch.setattr(gateway, "down", True)
    down = "mcp_server: GET /v1/prefabs answered 503: The gateway is down\n"
    assert mcp_main("--list") == (1, "", down)
    bare = mcp_main()
    assert (bare.status, bare.out, "pip install mcp" in bare.err) == (1, "", True)


@pytest.mark.parametrize("name", READMES)
def test_the_configuration_of_the_readme_starts_a_server(name: str, mcp_main: Any) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    (block,) = re.findall(r'^```\w*\n(\{\n  "mcpServers".*?)^```$', text, re.M | re.S)
    (server,) = json.loads(block)["mcpServers"].values()
    assert {"GATEWAY_BASE_URL", "X_INTERNAL_TOKEN"} == set(server["env"])
    script, *options = server["args"]
    assert (server["command"], script) == ("python", "/path/to/examples/mcp_server.py")
    done = mcp_main(*options, "--list")
    assert (done.status, done.err, len(json.loads(done.out)) > 0) == (0, "", True)


# Calls, without MCP


@pytest.mark.parametrize(("value", "text", "structured"), [
    ({"a": None, "n": 2**70}, '{"a": null, "n": 1180591620717411303424}', {"a": None, "n": 2**70}),
    ([1, "é"], '[1, "é"]', {"result": [1, "é"]}),
    ("plain text", "plain text", {"result": "plain text"}),
    ("", "", {"result": ""}),
    (3, "3", {"result": 3}),
    (None, "{}", {}),
    ({"success": True}, '{"success": true}', {"success": True}),
])
def test_a_result_is_structured_content_and_text(value: Any, text: str, structured: Any, gateway: LocalGateway) -> None:
    result = call_tool(gateway, "text-tools", "text-tools__echo", value=value)
    assert result == {"content": [{"type": "text", "text": text}], "structuredContent": structured, "isError": False}


def test_local_files_are_uploaded_to_where_the_spec_wants_them(content_file: Path) -> None:
    local, kept = str(content_file), "s3://b/kept"
    uploads = [link(), NO_BODY] * 3
    name = mcp_server.tool_name("papers", "merge", "0.2.0")
    with Script(answer(MERGE_SPEC), *uploads, ran("done")) as server:
        result = call_tool(server, "papers@0.2.0", name, title="t", papers=[local, kept], title_files=local,
                           clip=local, clips=[kept])
    assert texts_of(result) == ["done"]
    assert [request.body for request in server.received if request.method == "PUT"] == [b"content"] * 3
    assert server.received[-1].json["calls"][0]["inputs"] == {
        "parameters": {"title": "t", "clip": S3, "clips": [kept]}, "files": {"papers": [S3, kept], "title": [S3]}}


def test_output_files_are_saved_to_a_folder(gateway: LocalGateway, content_file: Path, tmp_path: Path) -> None:
    files, folder = {"files": [str(content_file)]}, tmp_path / "new" / "folder"
    for path in (folder / "SHA256SUMS.txt", folder / "2-SHA256SUMS.txt"):  # no file takes another's place
        result = call_tool(gateway, "file-tools", "file-tools__checksum", folder, files=files)
        (file,) = result["structuredContent"]["output_files"]
        assert (file["path"], file["uri"], file["name"]) == (str(path), path.as_uri(), "checksums")
        assert path.read_text().endswith("  content\n")
        assert result["content"][-1]["uri"] == path.as_uri()
        assert json.loads(texts_of(result)[1]) == {"output_files": [file]}
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("saved", [True, False])
def test_files_that_cannot_be_had_do_not_cost_the_result(
        saved: bool, gateway: LocalGateway, content_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gateway, "internal_token", None)  # the client's, which then is no agent
    files, folder = {"files": [str(content_file)]}, tmp_path / "folder"
    result = call_tool(gateway, "file-tools", "file-tools__checksum", folder if saved else None, files=files)
    (file,) = result["structuredContent"]["output_files"]
    assert ("agent" in file["error"], "uri" in file) == (True, False)
    assert (result["structuredContent"]["success"], result["isError"]) == (True, False)
    assert list(tmp_path.iterdir()) == [content_file]


@pytest.mark.parametrize(("events", "text", "problem"), [
    ([event("start"), event("content", "a "), event("content", "b"), event("done", None)], "a b", None),
    ([event("content", "a"), event("content", {"b": 1}), event("done")], '["a", {"b": 1}]', None),
    ([event("progress", 0.5), event("done", {"x": 1})], '{"x": 1}', None),
    ([event("content", "half"), event("error", {"message": "stumbled"})], "half", "stumbled"),
    ([event("content", "half"), event("error", "stumbled")], "half", "stumbled"),
    ([event("content", "half")], "half", "cut short"),
    ([event("content", "a"), b"data: [DONE]\n\n"], "a", None),
    ([event("start"), event("done")], "", None),
    ([event("content", "half a pair: \ud83d"), event("done")], "half a pair: ?", None),
])
def test_a_stream_gives_the_whole_at_its_end(events: list[bytes], text: str, problem: str | None) -> None:
    spec = {"id": "p", "version": "1.0.0", "functions": [{"name": "f", "streaming": True}]}
    stream = chunked(*events, end=problem != "cut short")
    given = HangUp(stream) if problem == "cut short" else stream
    reported: list[str] = []
    with Script(answer(spec), given) as server:
        result = call_tool(server, "p@1.0.0", mcp_server.tool_name("p", "f", "1.0.0"), None, reported)
    assert texts_of(result)[-1] == text
    assert (result["isError"], problem is None or problem in texts_of(result)[0]) == (bool(problem), True)
    assert len(reported) == sum(b'"content"' in line or b'"progress"' in line for line in events)
    assert "\ud83d" not in "".join(reported)


# Over stdio, with the client of the package


@contextlib.asynccontextmanager
async def open_session(gateway: LocalGateway, log: Any) -> AsyncIterator[Any]:
    import mcp
    from mcp.client.stdio import stdio_client

    arguments = ["-X", "dev", str(EXAMPLES / "mcp_server.py")]
    parameters = mcp.StdioServerParameters(command=sys.executable, args=arguments, env=environment_for(gateway))
    async with stdio_client(parameters, log) as streams, mcp.ClientSession(*streams) as session:
        await session.initialize()
        yield session


class ToolClient(NamedTuple):
    """The package's own client of the server in a process of its own, for tests that are not asynchronous."""

    portal: Any  # to where the session lives
    session: Any

    def list(self) -> dict[str, Any]:
        """The tools by name, as they are on the wire."""
        tools = self.portal.call(self.session.list_tools).tools
        return {tool.name: tool.model_dump(by_alias=True, exclude_none=True) for tool in tools}

    def call(self, name: str, **arguments: Any) -> Any:
        """The result of a call, as it is on the wire."""
        return self.start(name, **arguments).result(3 * WAIT_SECONDS)

    def start(self, name: str, on_progress: Callable[[Any], object] = lambda _: None, **arguments: Any) -> Any:
        """Starts a call, whose result will be in a future."""
        async def report(progress: float, total: float | None, message: str | None) -> None:
            on_progress((progress, message))

        async def call() -> Any:
            result = await self.session.call_tool(name, arguments, progress_callback=report)
            return result.model_dump(by_alias=True, mode="json", exclude_none=True)

        return self.portal.start_task_soon(call)


@pytest.fixture(scope="module")
def tool_client(gateway: LocalGateway) -> Iterator[ToolClient]:
    from anyio.from_thread import start_blocking_portal

    with tempfile.TemporaryFile("w+", encoding="utf-8") as log, start_blocking_portal() as portal:
        with portal.wrap_async_context_manager(open_session(gateway, log)) as session:
            yield ToolClient(portal, session)
        log.seek(0)
        shown = log.read()
    for unwanted in (gateway.internal_token, "Traceback", "Warning", "never retrieved"):
        assert unwanted not in shown, shown


@needs_mcp
def test_mcp_lists_the_tools_as_they_are_now(tool_client: ToolClient, gateway: LocalGateway) -> None:
    before = tool_client.list()
    assert before["text-tools__echo"]["inputSchema"] == tools_of(gateway)["text-tools__echo"].schema
    gateway.add_prefab("later", "1.0.0", {"count": len_of})
    assert set(tool_client.list()) - set(before) == {"later__count"}
    gateway.add_prefab("latest", "1.0.0", {"count": len_of})  # found although it is in no list
    assert tool_client.call("latest__count", text="four")["structuredContent"] == {"result": 4}


@needs_mcp
def test_mcp_gives_what_is_nested_too_deeply_as_text(tool_client: ToolClient, gateway: LocalGateway) -> None:
    deep = functools.reduce(lambda inner, _: {"a": inner}, range(400), 1)
    gateway.add_prefab("odd", "1.0.0", {"deep": lambda: deep})
    assert texts_of(tool_client.call("odd__deep"))[0].startswith('{"a": {"a":')
    assert tool_client.call("text-tools__echo", value=1)["structuredContent"] == {"result": 1}


@needs_mcp
def test_mcp_reports_contents_and_progress_at_once(tool_client: ToolClient, gateway: LocalGateway) -> None:
    gated, progress = Gated(), queue.Queue()

    def words(text: str, outputs: Path) -> Iterator[Any]:
        (outputs / "words.txt").write_text(text)
        yield from gated.words(text)
        yield {"type": "progress", "data": {"done": 2}}

    gateway.add_prefab("gated", "1.0.0", {"words": words})
    running = tool_client.start("gated__words", progress.put, text="one two")
    for expected in ((1, "one"), (2, "two")):  # the next word is not made before this one was heard of here
        gated.gate.release()
        assert progress.get(timeout=WAIT_SECONDS) == expected
    assert progress.get(timeout=WAIT_SECONDS) == (3, '{"done": 2}')
    result = running.result(WAIT_SECONDS)
    (file,) = result["structuredContent"]["output_files"]
    assert (result["structuredContent"]["result"], texts_of(result)[0]) == ("onetwo", "onetwo")
    with urllib.request.urlopen(file["uri"]) as download:
        assert download.read() == b"one two"


@needs_mcp
def test_mcp_takes_and_gives_files(tool_client: ToolClient, content_file: Path) -> None:
    result = tool_client.call("file-tools__checksum", files={"files": [str(content_file)]})
    (link,) = [block for block in result["content"] if block["type"] == "resource_link"]
    assert link["name"] == "SHA256SUMS.txt"
    with urllib.request.urlopen(link["uri"]) as download:
        assert download.read().endswith(b"  content\n")
    (file,) = result["structuredContent"]["output_files"]
    again = tool_client.call("file-tools__line_count", files={"files": file["s3_url"]})  # its URL is an input
    assert again["structuredContent"]["lines"] == 1


@needs_mcp
@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("faulty__refuse", {"message": "not today"}, "not today"),
    ("faulty__fail", {"message": "no luck"}, r"no luck \(ALWAYS_FAILS\)"),
    ("faulty__crash", {}, r"POST /v1/internal/run answered 503: .*RuntimeError: out of order"),
    ("faulty__stumble", {"text": "so far"}, "stumbled"),
    ("vault__sign", {"text": "x"}, r"(?s)Secret 'SIGNING_KEY' .* secret set vault SIGNING_KEY"),
    ("text-tools__statistics", {}, "answered 422: Missing required parameter: text"),
    ("text-tools__statistics", {"text": "a", "txt": "b"}, r"has no argument txt\. It takes: text\."),
    ("text-tools__statistics", {"text": 5}, "answered 422: Parameter 'text' must be of type string"),
    ("file-tools__line_count", {}, "Give the input files under the key 'files'"),
    ("file-tools__line_count", {"files": ["a.txt"]}, "files must be an object"),
    ("file-tools__line_count", {"files": {"files": 3}}, "must be an array of local paths or s3:// URLs, not 3"),
    ("file-tools__line_count", {"files": {"files": "http://a/b"}}, "files must be .*, not http://a/b"),
    ("file-tools__line_count", {"files": {"files": ["no/such"]}}, "FileNotFoundError: .*no/such"),
    ("file-tools__line_count", {"files": {"files": [str(ROOT)]}}, "not a regular file"),
    ("file-tools__line_count", {"files": {"files": ["s3://local/x"]}}, "Input file not found: s3://local/x"),
    ("no_such_tool", {}, "Unknown tool: no_such_tool"),
])
def test_mcp_tells_of_a_failure_and_goes_on(
        name: str, arguments: dict[str, Any], message: str, tool_client: ToolClient) -> None:
    result = tool_client.call(name, **arguments)
    assert (result["isError"], bool(re.search(message, texts_of(result)[0]))) == (True, True), result
    if name == "faulty__stumble":
        assert texts_of(result)[1] == "so far"  # what came before
    if name == "faulty__fail":
        assert result["structuredContent"]["error_code"] == "ALWAYS_FAILS"
    assert tool_client.call("text-tools__echo", value=1)["isError"] is False


@needs_mcp
def test_mcp_outlives_a_gateway_that_is_down(
        tool_client: ToolClient, gateway: LocalGateway, monkeypatch: Any) -> None:
    assert tool_client.call("text-tools__echo", value=1)["isError"] is False
    with monkeypatch.context() as patched:
        patched.setattr(gateway, "down", True)
        result = tool_client.call("text-tools__echo", value=1)
        assert (result["isError"], "answered 503: The gateway is down" in texts_of(result)[0]) == (True, True)
        with pytest.raises(Exception, match="answered 503: The gateway is down"):
            tool_client.list()
    assert tool_client.call("text-tools__echo", value=1)["isError"] is False


@needs_mcp
def test_mcp_runs_twenty_calls_at_once(tool_client: ToolClient, gateway: LocalGateway) -> None:
    together = threading.Barrier(20)

    def meet(number: int) -> int:
        together.wait(3 * WAIT_SECONDS)  # breaks unless all are here at once
        return number

    gateway.add_prefab("party", "1.0.0", {"meet": meet})
    assert "party__meet" in tool_client.list()  # or each of the twenty would look for it
    calls = [tool_client.start("party__meet", number=number) for number in range(20)]
    results = [call.result(3 * WAIT_SECONDS)["structuredContent"] for call in calls]
    assert results == [{"result": number} for number in range(20)]


@needs_mcp
def test_mcp_cancels_a_call(tool_client: ToolClient, gateway: LocalGateway) -> None:
    gated, session, reported = Gated(), tool_client.session, threading.Event()

    def send_a_word() -> bool:
        gated.gate.release()
        return gated.cut_off.is_set()

    gateway.add_prefab("endless", "1.0.0", {"words": gated.words})
    gated.gate.release()
    call = tool_client.start("endless__words", lambda _: reported.set(), text="word " * 9999)
    assert reported.wait(WAIT_SECONDS)
    if hasattr(session, "_request_id"):  # the client of mcp 1 does not say it by itself
        from mcp import types

        params = {"requestId": session._request_id - 1}
        cancelled = types.CancelledNotification(method="notifications/cancelled", params=params)
        tool_client.portal.call(session.send_notification, types.ClientNotification(cancelled))
    call.cancel()
    wait_for(send_a_word)  # the gateway finds out by sending that nobody listens any more
    assert tool_client.call("text-tools__echo", value=1)["isError"] is False


# The process

NOISY = """
import os, subprocess, sys, mcp_server

class NoisyPrefabs(mcp_server.Prefabs):
    async def call_tool(self, *arguments):
        print("noise")
        os.write(1, b"noise")
        subprocess.run([sys.executable, "-S", "-c", "import sys; print('noise', sys.stdin.read())"])
        return await super().call_tool(*arguments)

mcp_server.Prefabs = NoisyPrefabs
sys.exit(mcp_server.main())
"""


class NoisyServer:
    """The server in a process that prints. It is spoken to line by line, without the package."""

    def __init__(self, gateway: LocalGateway) -> None:
        environment = {**environment_for(gateway), "PYTHONPATH": str(EXAMPLES)}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, "-c", NOISY], env=environment, encoding="utf-8", **pipes)
        self._watchdog = threading.Timer(2 * START_SECONDS, self.process.kill)
        self._watchdog.start()

    def __enter__(self) -> NoisyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        with self.process:
            self.process.kill()

    def send(self, method: str, number: int | None = None, **params: Any) -> None:
        asked = {} if number is None else {"id": number}
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **asked, "method": method, "params": params}) + "\n")
        self.process.stdin.flush()

    def receive(self) -> Any:
        return json.loads(self.process.stdout.readline())

    def greet(self) -> None:
        client_info = {"name": "test", "version": "1"}
        self.send("initialize", 0, protocolVersion="2025-06-18", capabilities={}, clientInfo=client_info)
        assert self.receive()["result"]["serverInfo"]["name"] == "gateway"
        self.send("notifications/initialized")


@pytest.fixture(scope="module")
def noisy_servers(gateway: LocalGateway) -> Iterator[list[NoisyServer]]:
    with contextlib.ExitStack() as stack:  # they start side by side, as a start is slow
        yield [stack.enter_context(NoisyServer(gateway)) for _ in range(2)]


@posix
@needs_mcp
@pytest.mark.parametrize(("how", "status"), [("its client closes stdin", 0), ("it is interrupted", 130)])
def test_mcp_has_only_messages_on_stdout_and_ends_with_its_client(
        how: str, status: int, noisy_servers: list[NoisyServer], gateway: LocalGateway) -> None:
    gated, begun, closing = Gated(), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        closing.wait(3 * START_SECONDS)

    gateway.add_prefab("hanging", "1.0.0", {"wait": wait, "words": gated.words})
    server = noisy_servers.pop()
    with server:
        server.greet()
        server.send("tools/call", 1, name="text-tools__echo", arguments={"value": "a\nb\u2028é"})
        assert server.receive()["result"]["structuredContent"] == {"result": "a\nb\u2028é"}
        server.send("tools/call", 2, name="hanging__wait", arguments={})
        server.send("tools/call", 3, name="hanging__words", arguments={"text": "a " * 99}, _meta={"progressToken": 7})
        gated.gate.release()
        assert server.receive()["method"] == "notifications/progress"
        assert begun.wait(WAIT_SECONDS)
        if how == "it is interrupted":
            server.process.send_signal(signal.SIGINT)
        else:
            server.process.stdin.close()
        try:
            assert server.process.wait(START_SECONDS) == status  # although a call hangs and another one streams
            assert [json.loads(line)["jsonrpc"] for line in server.process.stdout] in ([], ["2.0"] * 2)
            log = server.process.stderr.read()
            assert ("noise" in log, "Traceback" in log) == (True, False), log
            gated.gate.release(99)
            assert gated.cut_off.wait(WAIT_SECONDS)
        finally:
            closing.set()


# --- The skill ------------------------------------------------------------------------------------

SKILL = EXAMPLES / "skill" / "gateway-sdk" / "SKILL.md"


def skill_blocks(language: str = r"\w+") -> list[tuple[str, str]]:
    """Language and code of the skill's blocks."""
    text = SKILL.read_text(encoding="utf-8")
    return re.findall(rf"^```({language})\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture
def run_skill(monkeypatch: Any, capsys: Any) -> Callable[..., tuple[str, str, int]]:
    """Runs the Python block of the skill that has these words in it, against a `Script`.

    It gives what the script printed, what it ended with, and the number of requests.
    """
    def run(words: str, *replies: Answer) -> tuple[str, str, int]:
        (code,) = [code for _, code in skill_blocks("python") if words in code]
        code = code.replace("range(20)", "range(3)").replace("max_workers=8", "max_workers=1")
        told = ""
        with Script(*replies) as server:
            monkeypatch.setenv("GATEWAY_BASE_URL", server.url)
            try:
                exec(compile(code, "SKILL.md", "exec"), {"__name__": "__main__"})
            except SystemExit as stop:
                told = str(stop)
            return capsys.readouterr().out, told, len(server.received)

    return run


def test_every_block_of_the_skill_works_where_there_is_only_the_one_file(
        shell: Callable[..., Ended], gateway: LocalGateway, tmp_path: Path) -> None:
    sandbox = tmp_path / "sandbox"
    sandbox.mkdir()
    shutil.copy(str(SDK), str(sandbox))
    shown = []
    for language, code in skill_blocks():
        if language == "python":
            (sandbox / "script.py").write_text(code, encoding="utf-8")
            code = "python3 script.py"
        ended = shell(code, sandbox)
        assert (ended.status, re.findall("failed|did not run|may have run", ended.out)) == (0, []), code + ended.err
        shown.append(ended.out)
    out = "".join(shown)
    assert "X_INTERNAL_TOKEN" in shown[0]
    assert gateway.internal_token not in out
    assert "'words': 2" in out
    assert out.count("one two three") == 2
    assert '"streaming": true' in out
    lines = (sandbox / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["output"]["output"] for line in lines] == [1, 2]
    assert [path.name for path in (sandbox / "results").iterdir()] == ["SHA256SUMS.txt"]
    assert (sandbox / "made" / "checksums.txt").read_text() == (sandbox / "results" / "SHA256SUMS.txt").read_text()


@pytest.mark.parametrize(("given", "message"), [
    (REFUSED, "It may have run: False"),
    (UNAVAILABLE, "It may have run: True"),
    (HangUp(), "It may have run: True"),
    (ran({"success": False, "error": "out of luck"}), "out of luck"),
    (FAILED_CALL, "out of luck"),
], ids=["refused", "unavailable", "hang up", "a failure of its own", "a failed call"])
def test_the_script_of_the_skill_sends_once_and_tells_what_failed(run_skill: Any, given: Any, message: str) -> None:
    out, told, sent = run_skill("from_env(timeout=300)", given)
    assert (out, message in told, sent) == ("", True, 1)


def test_the_stream_of_the_skill_tells_of_an_error_event(run_skill: Any) -> None:
    out, told, _ = run_skill("stream=True", chunked(event("content", "so far"), event("error", "out of luck")))
    assert (out, "out of luck" in told) == ("so far", True)


def test_the_batch_of_the_skill_tells_what_may_be_repeated(run_skill: Any) -> None:
    out, _, sent = run_skill("run_batch", FAILED_CALL, HangUp(), answer({"detail": "wrong"}, 422))
    ran_or_may_have = "ran or may have run, do not repeat"
    assert [line.partition(":")[0] for line in out.splitlines()] == [ran_or_may_have, ran_or_may_have, "did not run"]
    assert sent == 3


def test_the_skill_has_the_form_of_a_skill_and_says_what_each_error_means() -> None:
    _, front, body = SKILL.read_text(encoding="utf-8").split("---\n", 2)
    assert re.findall(r"^(\w+):", front, re.M) == ["name", "description"]
    assert f"name: {SKILL.parent.name}\n" in front
    assert len(" ".join(front.split())) < 1024
    assert body.count("\n") < 150
    assert {language for language, _ in skill_blocks()} == {"bash", "python"}
    errors = {name for name in gateway_sdk.__all__ if name.endswith("Error")}
    assert set(re.findall(r"^\| `(\w+Error)`", body, re.M)) == errors
