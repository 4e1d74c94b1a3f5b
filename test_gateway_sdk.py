"""Tests of gateway_sdk: real sockets, real files, nothing patched.

First what each section of the module does, in its order; then faults, in tables of operations and
what can go wrong; then the command line, the README, the places where the module runs, the examples.

Two kinds of servers stand behind them. The local gateway of `examples/` behaves as the protocol says;
a `Script` says byte for byte what the test wants, and records what it was sent.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import copy
import email.utils
import functools
import gc
import hashlib
import hmac
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import logging
import multiprocessing
import operator
import os
import pickle
import random
import re
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
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime
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


# --- Helpers --------------------------------------------------------------------------------------

S3 = "s3://bucket/agent-outputs/u/a/r.txt"
HIDDEN = (
    'Hush"h\u00fcsh/hush%41'  # a secret; as quoted, escaped or cut as it may be, "hush" is left
)
NO_BODY = answer(body=b"")
UNAVAILABLE = answer({"detail": "down"}, 503)
REFUSED = answer({"detail": "Could not validate credentials"}, 401)
CREDENTIAL_HEADERS = {"x-internal-token", "x-api-key", "authorization", "proxy-authorization"}


def run(client: GatewayClient, **options: Any) -> Any:
    return client.run("p", "1.0.0", "f", {"n": 1}, **options)


def call(number: int = 0) -> PrefabCall:
    return PrefabCall("p", "1.0.0", "f", {"n": number})


def error_of(given: Answer, act: Callable[[GatewayClient], Any] = run, **options: Any) -> Any:
    """The error that `act` raises when the server answers so."""
    with Script(given) as server, client_of(server, **{"max_retries": 0, **options}) as client:
        with pytest.raises(GatewayError) as caught:
            act(client)
    return caught.value


def text_of(error: BaseException) -> str:
    """All that a traceback would show."""
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def send(data: bytes) -> Callable[[socket.socket], None]:
    return lambda sock: sock.sendall(data)


def link(query: str = "X-Sig=1") -> Answer:
    """Presigned URLs that lead back to the server that gives them."""

    def give(sock: socket.socket) -> None:
        url = "http://{}:{}/bucket/o.bin?{}".format(*sock.getsockname(), query)
        sock.sendall(answer({"presigned_url": url, "upload_url": url, "s3_url": S3}))

    return Steps((give,))


LINK = link()


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a Python of its own makes of the code."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None], host: str = "127.0.0.1") -> Iterator[int]:
    """The port of a server that hands its one connection to `serve`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET

    def accept() -> None:
        with listener.accept()[0] as sock, contextlib.suppress(OSError):
            serve(sock)

    with socket.create_server((host, 0), family=family) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(WAIT_SECONDS)


class TlsScript(Script):
    """A `Script` behind TLS, for the name localhost."""

    def __init__(self, certificate: Path, *answers: Answer) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(str(certificate))
        super().__init__(*answers)
        self.url = f"https://localhost:{self.port}"

    def _serve(self, sock: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            with self._context.wrap_socket(sock, server_side=True) as tls:
                super()._serve(tls, number)


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


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which are not waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture(autouse=True)
def _closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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

ERRORS = [
    GatewayError("m", {"a": [1]}),
    AuthenticationError("m"),
    PrefabNotFoundError("p", "1.0.0"),
    ValidationError("m", {"errors": []}),
    QuotaExceededError("m", 10, 9, "calls"),
    MissingSecretError("p", "KEY", "Ask for one"),
    AgentContextRequiredError(),
    ServiceUnavailableError("m"),
    GatewayTimeoutError("m"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in range(6)),
    ],
    ids=["copy", "deepcopy", *(f"pickle {p}" for p in range(6))],
)
def test_every_error_pickles_and_copies(error: GatewayError, duplicate: Any) -> None:
    original = copy.copy(error)
    original.status_code, original.error_code = 418, "TEAPOT"
    second = duplicate(original)
    assert (type(second), str(second), vars(second)) == (type(error), str(error), vars(original))


def test_errors_form_the_tree_that_users_catch_by() -> None:
    assert all(isinstance(error, GatewayError) for error in ERRORS)
    assert issubclass(ValidationError, ValueError)
    assert issubclass(GatewayTimeoutError, (ServiceUnavailableError,))
    assert issubclass(GatewayTimeoutError, TimeoutError)
    assert not issubclass(ServiceUnavailableError, TimeoutError)


def test_errors_are_made_as_in_the_older_sdk() -> None:
    plain = GatewayError("m", {"a": 1})
    assert (plain.message, plain.details, str(plain)) == ("m", {"a": 1}, "m")
    assert (plain.status_code, plain.error_code, GatewayError("m").details) == (None, None, {})
    missing = PrefabNotFoundError("p", "1.0.0", "gone")
    assert (missing.prefab_id, missing.version, missing.message) == ("p", "1.0.0", "gone")
    assert "p@1.0.0" in str(PrefabNotFoundError("p", "1.0.0"))
    quota = QuotaExceededError("m", 10, 9, "calls")
    assert (quota.message, quota.limit, quota.used, quota.quota_type) == ("m", 10, 9, "calls")
    secret = MissingSecretError("p", "KEY", instructions="Ask for one")
    assert (secret.prefab_id, secret.secret_name, secret.instructions) == (
        "p",
        "KEY",
        "Ask for one",
    )
    assert secret.error_code == "MISSING_SECRET" and "Ask for one" in str(secret)
    assert MissingSecretError("p", "KEY").instructions is None
    assert AgentContextRequiredError("m").message == "m"
    assert AgentContextRequiredError().error_code == "MISSING_AGENT_CONTEXT"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("0", 0), ("120", 120), (" 7 ", 7), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("", None),
     ("soon", None), ("-5", None), ("1e3", None), ("nan", None), ("٣", None)],
)  # fmt: skip
def test_retry_after_is_read_in_both_forms(value: str, seconds: float | None) -> None:
    assert gateway_sdk._retry_after_seconds(value) == seconds


def test_retry_after_as_a_date_is_counted_from_now() -> None:
    date = email.utils.formatdate(time.time() + 3600, usegmt=True)
    assert 3000 < gateway_sdk._retry_after_seconds(date) <= 3600


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the time zone cannot be set here")
def test_a_retry_after_without_a_zone_is_in_gmt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:
        assert 3000 < gateway_sdk._retry_after_seconds(time.asctime(time.gmtime(time.time() + 3600))) <= 3600
    finally:
        monkeypatch.undo()
        time.tzset()


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


ENVELOPE = {"status": "SUCCESS", "output": {"success": True, "message": "hi"}, "files": {"a": [S3]}}


@pytest.mark.parametrize(
    ("output", "result", "function_result", "files"),
    [
        (ENVELOPE, ENVELOPE, ENVELOPE["output"], {"a": [S3]}),
        ({"output": None, "files": None}, {"output": None, "files": None}, {}, {}),
        ({"output": [1]}, {"output": [1]}, [1], {}),
        ({"output": 0}, {"output": 0}, 0, {}),
        ({"output": False, "files": {}}, {"output": False, "files": {}}, False, {}),
        ({"result": 5}, 5, {}, {}),
        ({"result": None}, None, {}, {}),
        ({"success": True}, {"success": True}, {}, {}),
        (None, None, {}, {}),
        ("text", "text", {}, {}),
    ],
    ids=["envelope", "nulls", "list", "zero", "false", "result", "null result", "older", "none",
         "text"],
)  # fmt: skip
def test_a_result_reads_both_shapes_of_output(
    output: Any, result: Any, function_result: Any, files: Any
) -> None:
    made = PrefabResult(CallStatus.SUCCESS, output)
    assert (made.get_result(), made.get_function_result()) == (result, function_result)
    assert (made.get_files(), made.get_file_urls()) == (
        files,
        [u for v in files.values() for u in v],
    )
    assert made.get("no such key", "default") == "default"


@pytest.mark.parametrize(
    "output", [None, "text", [1], {}, {"output": None}, {"output": "text"}, {"output": [{}]}, 3],
    ids=repr
)  # fmt: skip
def test_business_fields_are_never_missed(output: Any) -> None:
    made = PrefabResult("SUCCESS", output)
    assert made.get_business_success() is False
    assert made.get_business_message() == ""
    assert made.get_business_error() is made.get_business_error_code() is None


def test_business_fields_come_from_what_the_function_returned() -> None:
    inner = {"success": True, "message": "m", "error": "e", "error_code": "E"}
    made = PrefabResult("SUCCESS", {"output": inner, "success": False, "message": "outer"})
    assert made.get_business_success() is True and made.get_business_message() == "m"
    assert (made.get_business_error(), made.get_business_error_code()) == ("e", "E")


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


def test_an_event_keeps_its_whole_object() -> None:
    raw = {"type": "error", "data": {"message": "m"}, "error_code": "E"}
    known = StreamEvent.from_dict(raw)
    assert (known.type, known.data, known.raw) == (StreamEventType.ERROR, {"message": "m"}, raw)
    unknown = StreamEvent.from_dict({"type": "thought", "data": 1})
    assert (unknown.type, unknown.data, unknown.raw["type"]) == ("content", 1, "thought")


def test_a_directory_entry_may_lack_nearly_everything() -> None:
    whole = {
        "id": "p", "version": "1.0.0", "name": "P", "description": "d", "tags": ["t"],
        "deployment_status": "deployed", "functions": [{"name": "f"}], "requires_secrets": True,
        "secrets": [{"name": "KEY"}], "is_official": True, "author": "a", "github_url": "g",
    }  # fmt: skip
    with Script(answer([whole, {"id": "q", "version": "2", "tags": None, "new": 1}])) as server:
        first, second = client_of(server).list_prefabs()
    assert isinstance(first, PrefabInfo) and first.raw == whole
    told = {("status" if k == "deployment_status" else "prefab_id" if k == "id" else k): v
            for k, v in whole.items() if k != "github_url"}  # fmt: skip
    assert {name: getattr(first, name) for name in told} == told
    assert (second.prefab_id, second.tags, second.functions, second.secrets) == ("q", [], [], [])
    assert (second.status, second.is_official, second.author) == (None, False, None)


def test_versions_sort_by_number_and_releases_after_their_candidates() -> None:
    ordered = ["0.9", "1.0.0-alpha", "1.0.0-rc.1", "1.0.0-rc.2", "1.0.0-rc.10", "1.0.0", "1.9.0",
               "1.10.0", "v1.11.0", "2.0.0+build", "10.0.0"]  # fmt: skip
    assert sorted({*ordered}, key=gateway_sdk._version_key) == ordered
    assert sorted(["latest", "1.0", "", "1..0", "x-y"], key=gateway_sdk._version_key)


# --- Requests -------------------------------------------------------------------------------------

BODY = {"prefab_id": "p", "version": "1.0.0", "function_name": "f",
        "inputs": {"parameters": {"n": 1}}}  # fmt: skip
BODY_WITH_FILES = {**BODY, "inputs": {"parameters": {}, "files": {"video": [S3]}}}
PAGE = answer({"files": []})
ENDPOINTS: dict[str, tuple[Any, str, str, Any, bytes]] = {
    "run": (run, "POST", "RUN", {"calls": [BODY]}, ran()),
    "run with files": (lambda c: c.run("p", "1.0.0", "f", files={"video": [S3]}),
                       "POST", "RUN", {"calls": [BODY_WITH_FILES]}, ran()),
    "stream": (lambda c: list(run(c, stream=True)), "POST", "RUN", {"calls": [BODY]}, ran()),
    "prefab": (lambda c: c.prefab("p", "1.0.0").f(n=1), "POST", "RUN", {"calls": [BODY]}, ran()),
    "batch": (lambda c: c.run_batch([call(1)]), "POST", "RUN", {"calls": [BODY]}, ran()),
    "single request": (
        lambda c: c.run_batch([call(1), PrefabCall("p", "1.0.0", "f", {}, {"video": [S3]})],
                              single_request=True),
        "POST", "RUN", {"calls": [BODY, BODY_WITH_FILES]}, answer({"results": [{}, {}]})),
    "directory": (lambda c: c.list_prefabs(), "GET", "/v1/prefabs", None, answer([])),
    "directory by status": (lambda c: c.list_prefabs(status="failed"),
                            "GET", "/v1/prefabs?status=failed", None, answer([])),
    "spec": (lambda c: c.get_prefab_spec("p", "1.0.0"),
             "GET", "/v1/prefabs/p/1.0.0/spec", None, answer({})),
    "set a secret": (lambda c: c.set_secret("p", "KEY", "v"), "POST", "/v1/secrets",
                     {"prefab_id": "p", "secret_name": "KEY", "secret_value": "v"},
                     answer(status=204, body=b"")),
    "delete a secret": (lambda c: c.delete_secret("p", "KEY"),
                        "DELETE", "/v1/secrets/p/KEY", None, answer(status=204, body=b"")),
    "list secrets": (lambda c: c.list_secrets(),
                     "GET", "/v1/secrets", None, answer({"secrets": []})),
    "list a prefab's secrets": (lambda c: c.list_secrets("p"), "GET", "/v1/secrets/p", None,
                                answer({"prefab_id": "p", "secret_names": ["KEY"]})),
    "presigned URL": (lambda c: c.get_presigned_url(S3), "GET",
                      f"/internal/files/download?s3_url={S3}&mode=presigned&expires_in=3600", None,
                      answer({"presigned_url": "http://h/"})),
    "list files": (lambda c: c.list_files(), "GET", "/internal/files/list?limit=100", None, PAGE),
    "list files from a page on": (lambda c: c.list_files(5, "next"), "GET",
                                  "/internal/files/list?limit=5&continuation_token=next", None,
                                  PAGE),
    "list temporary files": (lambda c: c.list_temp_files(), "GET",
                             "/internal/files/list_temp?limit=100", None, PAGE),
    "list a session's files": (
        lambda c: c.list_temp_files("s", 7, "next"), "GET",
        "/internal/files/list_temp?limit=7&session_id=s&continuation_token=next", None, PAGE),
    "clean up": (lambda c: c.cleanup_temp_files("s"), "DELETE",
                 "/internal/files/cleanup_temp?session_id=s", None, answer({"deleted_count": 3})),
}  # fmt: skip
MODES: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "internal token": ({"internal_token": TOKEN}, {"x-internal-token": TOKEN}, "/v1/internal/run"),
    "allow-list": ({}, {}, "/v1/internal/run"),
    "JWT": ({"jwt_token": "j.w.t"}, {"authorization": "Bearer j.w.t"}, "/v1/run"),
    "JWT with Bearer": ({"jwt_token": "Bearer j.w.t"}, {"authorization": "Bearer j.w.t"},
                        "/v1/run"),
    "API key": ({"api_key": "key-1"}, {"x-api-key": "key-1"}, "/v1/run"),
    "exchanged API key": ({}, {"x-internal-token": TOKEN}, "/v1/internal/run"),
}  # fmt: skip


def target_parts(target: str) -> tuple[str, dict[str, str]]:
    parts = urllib.parse.urlsplit(target)
    return parts.path, dict(urllib.parse.parse_qsl(parts.query, strict_parsing=bool(parts.query)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_each_endpoint_is_asked_as_the_protocol_says(endpoint: str, mode: str) -> None:
    act, method, target, content, given = ENDPOINTS[endpoint]
    options, credential, run_path = MODES[mode]
    if mode == "exchanged API key":
        with Script(answer({"internal_token": TOKEN}), given) as server:
            act(GatewayClient.from_api_key("key-1", server.url))
            exchange, received = server.received
        assert exchange[:2] == ("POST", "/v1/auth/convert_to_internal_token") and not exchange.body
        assert exchange.headers["authorization"] == "Bearer key-1"
        assert not {"x-internal-token", "x-api-key", "content-type"} & {*exchange.headers}
    else:
        with Script(given) as server:
            act(GatewayClient(server.url, **options))
            (received,) = server.received
    headers = {"host": f"127.0.0.1:{server.port}", **credential}
    if content is not None:
        headers["content-type"] = "application/json"
        headers["content-length"] = str(len(received.body))
        assert received.json == content
    assert received.method == method and (content is not None or not received.body)
    assert target_parts(received.target) == target_parts(target.replace("RUN", run_path))
    assert received.headers.get("accept-encoding", "identity") == "identity"
    incidental = {"user-agent", "accept", "accept-encoding", "connection"}
    assert {k: v for k, v in received.headers.items() if k not in incidental} == headers


@pytest.mark.parametrize("content_type", [None, "video/mp4"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if "exchanged" not in mode])
def test_presigned_requests_carry_what_was_signed_and_no_credential(
    mode: str, content_type: str | None, tmp_path: Path
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"film")
    with Script(LINK, NO_BODY, LINK, answer(body=b"film")) as server:
        client = GatewayClient(server.url, **MODES[mode][0])
        assert client.upload_input_file(tmp_path / "a.mp4", content_type) == S3
        client.download_file(S3, tmp_path / "b.mp4")
    step, put, _, get = server.received
    assert step[:2] == ("POST", "/internal/files/generate_upload_url")
    assert step.json == {"filename": "a.mp4", "content_type": content_type}
    assert put[:2] == ("PUT", "/bucket/o.bin?X-Sig=1") and put.body == b"film"
    assert put.headers["content-length"] == "4" and put.headers.get("content-type") == content_type
    assert "transfer-encoding" not in put.headers
    assert get[:2] == ("GET", "/bucket/o.bin?X-Sig=1") and "range" not in get.headers
    assert not CREDENTIAL_HEADERS & {*put.headers, *get.headers}
    assert MODES[mode][1].items() <= step.headers.items()


def test_a_presigned_url_arrives_as_it_was_signed(tmp_path: Path) -> None:
    signed = "/b/a%20b%2Fc+d~(1)!/%E4%BD%A0?X-Amz-Credential=k%2F1&sig=a%2Bb/c=&empty=&x=1+2"
    with Script(answer(body=b"")) as storage:
        with Script(answer({"presigned_url": storage.url + signed})) as server:
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


@pytest.mark.parametrize(
    "base_url",
    ["", "gateway", "gateway:80", "//gateway", "ftp://gateway", "http://", "http:///v1",
     "https://:80",
     "http://gate way", "http://gateway:port", "http://gateway:99999", "http://gateway?a=1", 5,
     b"http://gateway"],
    ids=repr,
)  # fmt: skip
def test_a_base_url_that_is_no_http_url_is_refused(base_url: Any) -> None:
    with pytest.raises(ValidationError, match="base_url"):
        GatewayClient(base_url)


def test_a_token_given_as_base_url_is_recognized_and_not_shown() -> None:
    with pytest.raises(ValidationError, match="internal_token=") as caught:
        GatewayClient("eyJhbGciOiJIUzI1NiJ9.e30." + HIDDEN)
    assert "hush" not in text_of(caught.value)


def test_base_url_comes_from_the_environment_if_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GatewayClient().base_url == DEFAULT_BASE_URL == "http://nodeport.sensedeal.vip:30566"
    monkeypatch.setenv("GATEWAY_BASE_URL", "")
    assert GatewayClient().base_url == DEFAULT_BASE_URL
    monkeypatch.setenv("GATEWAY_BASE_URL", "http://env.example/x/")
    assert GatewayClient().base_url == "http://env.example/x"
    assert GatewayClient("http://given.example").base_url == "http://given.example"


def test_ipv6_addresses_work() -> None:
    heads: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        heads.append(sock.recv(65536))
        sock.sendall(ran())

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with listening(serve, "::1") as port:
        assert run(GatewayClient(f"http://[::1]:{port}/")).is_success()
    assert b"\r\nHost: [::1]:%d\r\n" % port in heads[0]


@pytest.mark.parametrize(
    ("value", "segment"),
    [("a/b", "a%2Fb"), ("a b", "a%20b"), ("a?b#c", "a%3Fb%23c"), ("100%", "100%25"),
     ("%2F", "%252F"),
     ("ü你", "%C3%BC%E4%BD%A0"), ("a+b", "a%2Bb"), ("...", "..."), ("../x", "..%2Fx")],
)  # fmt: skip
def test_an_id_stays_one_segment_of_the_path(value: str, segment: str) -> None:
    secret = answer({"secret_names": []})
    with Script(answer({}), answer({}), secret, NO_BODY, NO_BODY) as server:
        client = client_of(server)
        client.get_prefab_spec(value, "1")
        client.get_prefab_spec("p", value)
        client.list_secrets(value)
        client.delete_secret(value, "KEY")
        client.delete_secret("p", value)
    assert [received.target for received in server.received] == [
        f"/v1/prefabs/{segment}/1/spec", f"/v1/prefabs/p/{segment}/spec", f"/v1/secrets/{segment}",
        f"/v1/secrets/{segment}/KEY", f"/v1/secrets/p/{segment}",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [".", "..", "", 3], ids=repr)
def test_an_id_that_would_be_another_path_is_refused(value: Any) -> None:
    with Script() as server:
        client = client_of(server)
        for act in (
            lambda: client.get_prefab_spec(value, "1"),
            lambda: client.get_prefab_spec("p", value),
            lambda: client.list_secrets(value),
            lambda: client.delete_secret(value, "KEY"),
            lambda: client.delete_secret("p", value),
        ):
            with pytest.raises(ValidationError):
                act()
    assert not server.received


def test_query_values_arrive_as_they_were_given() -> None:
    odd = "a+b/c=&d é?#%20"
    with Script(PAGE, PAGE, answer({"deleted_count": 0})) as server:
        client = client_of(server)
        client.list_files(continuation_token=odd)
        client.list_temp_files(odd)
        client.cleanup_temp_files(odd)
    queries = [received.target.partition("?")[2] for received in server.received]
    assert [list(target_parts("?" + query)[1].values())[-1] for query in queries] == [odd] * 3
    assert not any(re.search(r"[+ #]", query) for query in queries)


def test_parameters_arrive_whole() -> None:
    sent = {"ü": '你好\u2028\x00"\\', "n": 2**80, "f": 0.1, "none": None, "deep": [[{"": []}]]}
    with Script(ran()) as server:
        client_of(server).run("p", "1.0.0", "f", sent)
    assert server.received[0].json["calls"][0]["inputs"]["parameters"] == sent


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    "value",
    [datetime(2024, 1, 1), float("nan"), float("inf"), {1, 2}, b"bytes", "\ud800", LOOP,
     {(1, 2): 3}],
    ids=["datetime", "nan", "infinity", "set", "bytes", "surrogate", "loop", "tuple as key"],
)  # fmt: skip
def test_a_parameter_that_json_cannot_carry_is_named_before_anything_is_sent(value: Any) -> None:
    with Script() as server, pytest.raises(ValidationError, match="'culprit'"):
        client_of(server).run("p", "1.0.0", "f", {"fine": 1, "culprit": value})
    assert not server.received


@pytest.mark.parametrize(
    "files",
    [{"v": "s3://b/k"}, {"v": ["/tmp/a.mp4"]}, {"v": ["https://b/k"]}, {"v": [Path("a.mp4")]},
     {"v": None},
     {"v": [S3, "a.mp4"]}, {"v": ["s3://"]}, {"v": {S3: 1}}, [S3], S3],
    ids=str,
)  # fmt: skip
def test_files_that_are_no_lists_of_s3_urls_are_refused_before_anything_is_sent(files: Any) -> None:
    with Script() as server:
        for act in (
            lambda c: c.run("p", "1.0.0", "f", {}, files),
            lambda c: c.prefab("p", "1.0.0").call("f", files=files),
            lambda c: c.run_batch([call(), PrefabCall("p", "1.0.0", "f", {}, files)]),
        ):
            with pytest.raises(ValidationError) as caught:
                act(client_of(server))
            assert "upload_input_file" in str(caught.value) or not isinstance(files, dict)
    assert not server.received


@pytest.mark.parametrize(
    "act",
    [
        lambda c: c.run("", "1.0.0", "f"),
        lambda c: c.run("p", None, "f"),
        lambda c: c.run("p", "1.0.0", 3),
        lambda c: c.run("p", "1.0.0", "f", ["list"]),
        lambda c: run(c, timeout=0),
        lambda c: run(c, timeout=-1),
        lambda c: run(c, timeout="5"),
        lambda c: run(c, timeout=float("nan")),
        lambda c: c.run_batch([call()], max_workers=0),
        lambda c: c.run_batch([call()], single_request=True, executor=concurrent.futures.Executor()),
        lambda c: c.get_presigned_url("https://b/k"),
        lambda c: c.get_presigned_url(None),
        lambda c: c.download_file(S3, "f", mode="stream"),
        lambda c: c.upload_temp_file(__file__, ttl=0),
        lambda c: c.upload_temp_file(__file__, ttl="1"),
        lambda c: c.cleanup_temp_files(""),
        lambda c: c.set_secret("p", "", "v"),
        lambda c: c.set_secret("p", "KEY", None),
        lambda c: c.upload_input_file(__file__, "a/b\r\nX: y"),
    ],
    ids=lambda act: inspect.getsource(act).strip().partition(": c.")[2] or "run",
)
def test_bad_arguments_are_refused_before_anything_is_sent(act: Any) -> None:
    with Script() as server:
        with pytest.raises((ValidationError, TypeError)):
            act(client_of(server))
    assert not server.received


@pytest.mark.parametrize(
    "options",
    [{"timeout": 0}, {"timeout": "5"}, {"max_retries": -1}, {"max_retries": 1.5}, {"ssl_context": "x"}],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        GatewayClient("http://gateway.example", **options)


# --- Credentials ----------------------------------------------------------------------------------

VARIABLES = ("X_INTERNAL_TOKEN", "AGENT_BUILDER_API_KEY", "GATEWAY_JWT_TOKEN")
NAMES = ("internal_token", "api_key", "jwt_token")


@pytest.mark.parametrize("names", [*itertools.combinations(NAMES, 2), NAMES], ids="+".join)
def test_more_than_one_credential_is_an_error(names: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        GatewayClient("http://gateway.example", **dict.fromkeys(names, HIDDEN))
    assert "hush" not in text_of(caught.value).lower()


@pytest.mark.parametrize(
    ("variables", "headers"),
    [
        ({}, {}),
        (dict.fromkeys(VARIABLES, ""), {}),
        ({"X_INTERNAL_TOKEN": "t"}, {"x-internal-token": "t"}),
        ({"AGENT_BUILDER_API_KEY": "k"}, {"x-internal-token": "exchanged"}),
        ({"GATEWAY_JWT_TOKEN": "j"}, {"authorization": "Bearer j"}),
        ({"GATEWAY_JWT_TOKEN": "j", "X_INTERNAL_TOKEN": ""}, {"authorization": "Bearer j"}),
    ],
    ids=str,
)
def test_from_env_takes_the_credential_that_is_set(
    variables: dict[str, str], headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    exchange = [answer({"internal_token": "exchanged"})] if "k" in variables.values() else []
    with Script(*exchange, ran()) as server:
        monkeypatch.setenv("GATEWAY_BASE_URL", server.url)
        run(GatewayClient.from_env(timeout=WAIT_SECONDS))
    received = server.received[-1].headers.items()
    assert {k: v for k, v in received if k in CREDENTIAL_HEADERS} == headers
    assert len(server.received) == len(exchange) + 1


@pytest.mark.parametrize("names", [*itertools.combinations(VARIABLES, 2), VARIABLES], ids="+".join)
def test_from_env_refuses_to_choose(names: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names:
        monkeypatch.setenv(name, "hush")
    with pytest.raises(ValidationError) as caught:
        GatewayClient.from_env(base_url="http://gateway.example")
    assert "hush" not in text_of(caught.value).lower()


def test_the_constructor_picks_no_credential_out_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "t")
    with Script(ran()) as server:
        run(GatewayClient(server.url))
    assert not CREDENTIAL_HEADERS & {*server.received[0].headers}


UNSENDABLE = ["hush\n", "hush\r\nX-Evil: 1", "hush\x7f", "hush\u20ac", "hush\u2028"]
NO_TEXT = ["\x00hush", "", b"hush", 7]  # which an environment variable cannot be, or is as if unset


@pytest.mark.parametrize(
    ("name", "value"),
    [*itertools.product([*NAMES, "from_api_key"], UNSENDABLE + NO_TEXT),
     *itertools.product(VARIABLES, UNSENDABLE)],
    ids=ascii,
)  # fmt: skip
def test_a_credential_that_no_header_can_carry_is_refused_without_showing_it(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Any = GatewayClient
    if name in VARIABLES:
        monkeypatch.setenv(name, value)
        make = GatewayClient.from_env
    elif name == "from_api_key":
        make = lambda base_url: GatewayClient.from_api_key(value, base_url)  # noqa: E731
    options = {name: value} if name in NAMES else {}
    with Script() as server, pytest.raises(ValidationError) as caught:
        make(base_url=server.url, **options)
    assert "hush" not in text_of(caught.value) and not server.received


@pytest.mark.parametrize("mode", MODES)
def test_repr_shows_the_mode_and_never_the_secret(mode: str) -> None:
    with Script(answer({"internal_token": TOKEN})) as server:
        if mode == "exchanged API key":
            client = GatewayClient.from_api_key("key-1", server.url)
        else:
            client = GatewayClient(server.url, **MODES[mode][0])
    others = {repr(GatewayClient(server.url, **options)) for options, _, _ in MODES.values()}
    assert not re.search(f"{TOKEN}|j.w.t|key-1", repr(client))
    assert server.url in repr(client) and len(others) == 4


def test_an_expired_token_is_exchanged_again_once_however_many_threads_see_it() -> None:
    barrier = threading.Barrier(8)

    def refuse_all_at_once(sock: socket.socket) -> None:
        barrier.wait(WAIT_SECONDS)
        sock.sendall(REFUSED)

    first, second = (answer({"internal_token": token}) for token in ("first", "second"))
    refusals = [Steps((refuse_all_at_once,))] * 8
    with Script(first, *refusals, second, *[ran()] * 8) as server:
        client = GatewayClient.from_api_key("key-1", server.url, timeout=WAIT_SECONDS)
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            results = list(threads.map(lambda _: run(client), range(8)))
    assert all(result.is_success() for result in results)
    tokens = [received.headers.get("x-internal-token") for received in server.received]
    assert tokens == [None, *["first"] * 8, None, *["second"] * 8]


@pytest.mark.parametrize(
    "act",
    [lambda c: c.list_prefabs(), lambda c: list(run(c, stream=True)),
     lambda c: c.run_batch([call()]),
     lambda c: c.upload_file(__file__)],
    ids=["GET", "stream", "batch", "upload"],
)  # fmt: skip
def test_every_kind_of_request_survives_the_end_of_its_token(act: Any) -> None:
    with LocalGateway(any_credential=False) as gateway:
        client = GatewayClient.from_api_key(gateway.api_key, gateway.base_url)
        gateway.expire_tokens()
        with contextlib.suppress(AgentContextRequiredError, PrefabNotFoundError):
            act(client)
        tokens = [r.headers.get("x-internal-token") for r in gateway.requests]
    first, refused, second, accepted = tokens
    assert first is second is None and refused != accepted


def test_a_token_that_is_refused_though_it_is_new_is_an_error() -> None:
    tokens = [answer({"internal_token": token}) for token in ("first", "second")]
    with Script(tokens[0], REFUSED, tokens[1], REFUSED) as server:
        client = GatewayClient.from_api_key("key-1", server.url)
        with pytest.raises(AuthenticationError):
            run(client)
    assert len(server.received) == 4


@pytest.mark.parametrize(
    ("given", "kind"),
    [(REFUSED, AuthenticationError), (answer({}), GatewayError), (answer([]), GatewayError),
     (answer({"internal_token": "a\nb"}), GatewayError),
     (answer({"internal_token": 5}), GatewayError),
     (answer({"internal_token": ""}), GatewayError), (answer(body=b"<html>"), GatewayError)],
    ids=["401", "no token", "list", "line break", "number", "empty", "HTML"],
)  # fmt: skip
def test_an_exchange_that_gives_no_token_is_an_error(given: bytes, kind: Any) -> None:
    with Script(given) as server, pytest.raises(kind):
        GatewayClient.from_api_key("key-1", server.url)
    assert len(server.received) == 1


# --- Connections ----------------------------------------------------------------------------------


def test_a_connection_is_used_again() -> None:
    others = [answer({"detail": "x"}, 404), answer([]), answer(status=204, body=b"")]
    with Script(ran(), *others, chunked(event("done")), ran()) as server:
        client = client_of(server)
        run(client)
        with pytest.raises(GatewayError):
            run(client)
        client.list_prefabs()
        client.delete_secret("p", "KEY")
        list(run(client, stream=True))
        run(client)
    assert server.connections == 1 and len(server.received) == 6


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


def test_there_are_never_more_connections_than_calls_at_once() -> None:
    with Script(*[ran()] * 60) as server:
        client = client_of(server)
        for _ in range(3):
            assert client.run_batch([call()] * 20, max_workers=3).all_success()
    assert server.connections <= 3


@pytest.mark.parametrize(
    "end",
    [lambda s: s.shutdown(socket.SHUT_WR), send(b"HTTP/1.1 408 Slow\r\nContent-Length: 0\r\n\r\n")],
    ids=["closed", "sent something"],
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


@pytest.mark.parametrize(("limit", "connections"), [(3600.0, 1), (0.0, 2)], ids=["fresh", "stale"])
def test_a_connection_that_was_idle_for_too_long_is_dropped(
    limit: float, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gateway_sdk._IDLE_SECONDS == 4
    monkeypatch.setattr(gateway_sdk, "_IDLE_SECONDS", limit)
    with Script(ran(), ran()) as server, client_of(server) as client:
        run(client)
        run(client)
        assert server.connections == connections
        server.wait_until(lambda: server.open_connections <= 1)


@pytest.mark.parametrize(
    "given",
    [answer([], Connection="close"), HangUp(b"HTTP/1.0 200 OK\r\n\r\n[]"),
     HangUp(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n[]")],
    ids=["Connection: close", "HTTP/1.0 without length", "HTTP/1.0"],
)  # fmt: skip
def test_a_connection_that_the_server_will_close_is_not_kept(given: Answer) -> None:
    with Script(given, answer([])) as server:
        client = client_of(server)
        assert client.list_prefabs() == client.list_prefabs() == []
    assert [received.connection for received in server.received] == [0, 1]


def test_a_small_request_is_one_write() -> None:
    pieces: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        while pieces.append(sock.recv(65536)) or pieces[-1]:
            if pieces[-1].endswith(b"}]}"):
                sock.sendall(ran())

    with listening(serve) as port, GatewayClient(f"http://127.0.0.1:{port}") as client:
        for _ in range(30):
            run(client)
    assert len(pieces) == 30 + 1 and all(p.startswith(b"POST ") for p in pieces[:-1])


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


@pytest.mark.parametrize("mode", MODES)
def test_a_client_pickles_without_its_connections(mode: str) -> None:
    exchanged = [answer({"internal_token": TOKEN})] if mode == "exchanged API key" else []
    with Script(*exchanged, ran(), ran()) as server:
        if exchanged:
            client = GatewayClient.from_api_key("key-1", server.url)
        else:
            client = GatewayClient(server.url, timeout=7, **MODES[mode][0])
        run(client)
        copied = pickle.loads(pickle.dumps(client))
        run(copied)
    first, second = server.received[-2:]
    assert first[:2] == second[:2] and first.headers == second.headers
    assert first.connection != second.connection
    assert (copied.base_url, copied.timeout) == (client.base_url, client.timeout)


def test_a_pickled_client_still_exchanges_its_key() -> None:
    tokens = [answer({"internal_token": token}) for token in ("first", "second")]
    with Script(tokens[0], REFUSED, tokens[1], ran()) as server:
        client = pickle.loads(pickle.dumps(GatewayClient.from_api_key("key-1", server.url)))
        assert run(client).is_success()


def test_a_client_with_an_ssl_context_says_that_it_cannot_be_pickled() -> None:
    with pytest.raises(TypeError, match="ssl_context"):
        pickle.dumps(GatewayClient("https://h", ssl_context=ssl.create_default_context()))


def test_a_client_can_be_closed_twice_and_is_a_context_manager() -> None:
    with Script(ran()) as server:
        with client_of(server) as client:
            run(client)
            assert server.open_connections == 1
        client.close()
        server.wait_until(lambda: server.open_connections == 0)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
@pytest.mark.parametrize("login", ["", "user:p%40ss@"])
def test_http_goes_through_the_proxy(
    variable: str, login: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_no_proxy_is_honoured(no_proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Script() as proxy, Script(ran()) as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", no_proxy)
        assert run(client_of(server)).is_success()
    assert not proxy.connections


@pytest.mark.parametrize("login", ["", "user:p%40ss@"])
def test_https_goes_through_a_tunnel(
    login: str, certificate: Path, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bytes] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificate))

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock.dup(), server_side=True) as tls:
            inside.append(tls.recv(65536))
            tls.sendall(ran())
            tls.recv(1)

    with Script(Steps((send(b"HTTP/1.1 200 Connected\r\n\r\n"), serve))) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{login}127.0.0.1:{proxy.port}")
        with GatewayClient("https://localhost:9", api_key="key-1", ssl_context=trusting) as client:
            assert run(client).is_success()
    (connect,) = proxy.received
    assert connect[:2] == ("CONNECT", "localhost:9") and "x-api-key" not in connect.headers
    assert ("proxy-authorization" in connect.headers) == bool(login)
    assert b"proxy-auth" not in inside[0].lower() and inside[0].startswith(b"POST /v1/run HTTP/1.1")


def test_a_proxy_that_cannot_be_used_is_an_error_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "socks5://user:hush@proxy.example:1080")
    with pytest.raises(GatewayError, match="(?i)http_proxy") as caught:
        run(GatewayClient("http://gateway.invalid"))
    assert "hush" not in text_of(caught.value)


def test_a_proxy_that_repeats_its_password_does_not_have_it_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    login = base64.b64encode(b"user:hush-hush").decode()
    with Script(answer({"detail": f"who is user:hush-hush, {login}?"}, 407)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://user:hush%2Dhush@127.0.0.1:{proxy.port}")
        with pytest.raises(GatewayError, match="who is") as caught:
            run(GatewayClient("http://gateway.invalid"))
    assert "hush" not in text_of(caught.value) and login not in text_of(caught.value)


def test_an_error_names_the_proxy_through_which_there_is_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as bound:  # it refuses
        bound.bind(("127.0.0.1", 0))
        proxy = f"127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("HTTP_PROXY", f"http://user:hush@{proxy}")
        with pytest.raises(ServiceUnavailableError, match=f"gateway.invalid through the proxy {proxy}") as caught:
            run(GatewayClient("http://gateway.invalid"))
    assert "hush" not in text_of(caught.value)


def test_https_uses_the_given_ssl_context(
    certificate: Path, trusting: ssl.SSLContext, tmp_path: Path
) -> None:
    (tmp_path / "f.bin").write_bytes(os.urandom(700_000))
    uploaded = answer({"s3_url": S3})
    with TlsScript(certificate, ran(), uploaded, chunked(event("done")), ran()) as server:
        with GatewayClient(server.url, ssl_context=trusting, timeout=WAIT_SECONDS) as client:
            assert run(client).is_success()
            client.upload_file(tmp_path / "f.bin")
            assert [e.type for e in run(client, stream=True)] == ["done"]
            assert run(client).is_success()
    assert server.connections == 1
    assert (tmp_path / "f.bin").read_bytes() in server.received[1].body


def test_ssl_cert_file_is_honoured(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with TlsScript(certificate, ran()) as server, GatewayClient(server.url) as client:
        assert run(client).is_success()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_wrong_certificate_is_an_error_and_nothing_is_sent(
    host: str, certificate: Path, trusting: ssl.SSLContext
) -> None:
    context = trusting if host == "127.0.0.1" else None  # trusted, but for another name
    with TlsScript(certificate, ran()) as server:
        client = GatewayClient(f"https://{host}:{server.port}", ssl_context=context, max_retries=1)
        with pytest.raises(ServiceUnavailableError, match="(?i)certificate") as caught:
            run(client)
    assert caught.value.status_code is None
    assert not server.received and server.connections == 2


# --- Transport ------------------------------------------------------------------------------------


def by_client(act: Callable[[GatewayClient, Path], Any]) -> Callable[..., Any]:
    return lambda url, path, **options: act(GatewayClient(url, **options), path)


# What sends, what is answered before the request in question, and what ends it well.
SENDING: dict[str, tuple[Callable[..., Any], list[Answer], list[Answer]]] = {
    "GET": (by_client(lambda c, _: c.list_prefabs()), [], [answer([])]),
    "DELETE": (by_client(lambda c, _: c.delete_secret("p", "KEY")), [], [NO_BODY]),
    "presigned GET": (
        by_client(lambda c, path: c.download_file(S3, path.with_name("new"))),
        [LINK], [answer(body=b"data")]),
    "presigned PUT": (by_client(lambda c, path: c.upload_input_file(path)), [LINK], [NO_BODY]),
    "token exchange": (lambda url, _, **options: GatewayClient.from_api_key("key-1", url,
                       **options),
                       [], [answer({"internal_token": "t"})]),
    "generate_upload_url": (
        by_client(lambda c, path: c.upload_input_file(path)), [], [LINK, NO_BODY]),
    "run": (by_client(lambda c, _: run(c)), [], [ran()]),
    "stream": (by_client(lambda c, _: list(run(c, stream=True))), [], [ran()]),
    "batch in one request": (
        by_client(lambda c, _: c.run_batch([call()], single_request=True)), [], [ran()]),
    "upload": (by_client(lambda c, path: c.upload_file(path)), [], [answer({"s3_url": S3})]),
    "temporary upload": (
        by_client(lambda c, path: c.upload_temp_file(path)), [], [answer({"s3_url": S3})]),
}  # fmt: skip
REPEATABLE = list(SENDING)[:6]
DIRECT = [name for name, (_, before, _) in SENDING.items() if not before]
LOST: dict[str, Answer] = {
    "hung up": HangUp(),
    "reset": HangUp(reset=True),
    "head cut": HangUp(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "head cut between lines": HangUp(b"HTTP/1.1 200 OK\r\nX: y\r\n"),
    "body cut": HangUp(answer(body=b"0123456789")[:-3]),
    "chunks cut": HangUp(chunked(b"[]", end=False, content_type="application/json")),
    "502": answer(body=b"<html>", status=502),
    "503": UNAVAILABLE,
    "504": answer(body=b"", status=504),
}
FINAL: dict[str, Answer] = {
    "500": answer(body=b"Internal Server Error", status=500),
    "501": answer(None, 501),
    "429": answer({"detail": "quota"}, 429, Retry_After="0"),
    "404": answer({"detail": "x"}, 404),
    "408": answer({"detail": "x"}, 408),
    "307": answer(None, 307, Location="/"),
}
SILENT: dict[str, Answer] = {
    "no answer in time": Pause(),
    "no body in time": Pause(answer(body=b"0123456789")[:-3]),
}


@pytest.mark.parametrize("fault", [*LOST, *FINAL, *SILENT])
@pytest.mark.parametrize("name", SENDING)
def test_only_what_can_do_no_harm_is_sent_again(name: str, fault: str, tmp_path: Path) -> None:
    act, before, good = SENDING[name]
    given: Answer = {**LOST, **FINAL, **SILENT}[fault]
    repeated = fault in LOST and name in REPEATABLE
    timeout = WAIT_SECONDS if fault not in SILENT else 0.5 if before else 0.05
    followed = fault == "307" and name == "presigned GET"
    error: Any = None
    (tmp_path / "file").write_bytes(b"content")
    with Script(*before, given, *good) as server:
        try:
            act(server.url, tmp_path / "file", timeout=timeout)
        except GatewayError as raised:
            error = raised
    attempts = server.received[len(before) :][: 2 if repeated or followed else 1]
    assert len(server.received) == len(before) + (1 + len(good) if repeated or followed else 1)
    if followed:
        assert error is None
    elif repeated:
        first, second = attempts
        assert error is None and first[:2] == second[:2] and first.body == second.body
        assert first.connection != second.connection  # a retry opens a fresh one
    else:
        assert isinstance(error, GatewayTimeoutError) == (fault in SILENT)
        assert isinstance(error, ServiceUnavailableError) == (fault not in list(FINAL)[2:])
        assert error.status_code == (int(fault) if fault.isdecimal() else None)
        assert server.received[-1].method in str(error)


@pytest.mark.parametrize("fault", ["refused", "unknown host"])
@pytest.mark.parametrize("name", DIRECT)
def test_everything_is_sent_again_where_there_was_no_connection(
    name: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups: list[Any] = []
    look_up = socket.getaddrinfo

    def counted(*arguments: Any, **options: Any) -> Any:
        lookups.append(arguments)
        if fault == "unknown host":
            raise socket.gaierror(-2, "Name or service not known")
        return look_up(*arguments, **options)

    (tmp_path / "file").write_bytes(b"content")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(socket, "getaddrinfo", counted)
    with pytest.raises(ServiceUnavailableError) as caught:
        SENDING[name][0](f"http://127.0.0.1:{port}", tmp_path / "file", max_retries=3)
    assert len(lookups) == 4 and caught.value.status_code is None


@pytest.mark.parametrize("name", DIRECT)
def test_everything_is_sent_again_where_the_proxy_made_no_connection(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with Script(*[answer(body=b"", status=502)] * 9) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(ServiceUnavailableError):
            SENDING[name][0]("https://gateway.invalid", tmp_path / "file", max_retries=1)
    assert [received.method for received in proxy.received] == ["CONNECT"] * 2


@pytest.mark.parametrize("max_retries", [0, 1, 5])
@pytest.mark.parametrize("fault", LOST)
def test_max_retries_is_how_often_at_most_it_is_sent_again(fault: str, max_retries: int) -> None:
    with Script(*[LOST[fault]] * 9) as server, pytest.raises(ServiceUnavailableError):
        client_of(server, max_retries=max_retries).list_prefabs()
    assert len(server.received) == 1 + max_retries


@pytest.mark.parametrize("fault", [HangUp(), HangUp(reset=True)], ids=["closed", "reset"])
def test_a_call_on_a_used_connection_that_may_have_run_is_not_sent_again(fault: Answer) -> None:
    with Script(ran(), fault, ran()) as server:
        client = client_of(server)
        run(client)
        with pytest.raises(ServiceUnavailableError, match="may have run"):
            run(client)
    assert [received.connection for received in server.received] == [0, 0]


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
    assert delays == ([] if delay is None else [delay]) or (delay is ... and 0 <= delays[0] < 0.01)


def test_retries_wait_longer_and_longer_with_full_jitter(
    delays: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_sdk, "_BACKOFF_BASE_SECONDS", 0.5)
    with Script(*[UNAVAILABLE] * 40) as server, pytest.raises(ServiceUnavailableError):
        client_of(server, max_retries=39).list_prefabs()
    caps = [min(8.0, 0.5 * 2**number) for number in range(39)]
    assert all(0 <= delay <= cap for delay, cap in zip(delays, caps)) and len(delays) == 39
    assert max(delays) > 4 and min(delays[4:]) < 4 and len({*delays}) > 30


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_of_a_presigned_get_is_followed(status: int, tmp_path: Path) -> None:
    with Script(answer(body=b"data")) as other:
        moved = answer(body=b"gone", status=status, Location=f"{other.url}/there?sig=2")
        relative = answer(body=b"", status=status, Location="else?where")
        with Script(LINK, relative, moved) as server:
            client_of(server).download_file(S3, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"data"
    assert server.received[2].target == "/bucket/else?where"
    assert other.received[0].target == "/there?sig=2"
    assert not CREDENTIAL_HEADERS & {*other.received[0].headers}


@pytest.mark.parametrize("hops", [5, 6])
def test_at_most_five_redirects_are_followed(hops: int, tmp_path: Path) -> None:
    with Script(LINK, *[answer(None, 302, Location="/on")] * hops, answer(body=b"data")) as server:
        client = client_of(server)
        if hops == 5:
            client.download_file(S3, tmp_path / "f")
        else:
            with pytest.raises(GatewayError, match="redirects"):
                client.download_file(S3, tmp_path / "f")
    assert len(server.received) == 1 + 5 + 1


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://h/x", "http://[/"])
def test_a_redirect_to_what_is_no_http_url_is_an_error(location: str, tmp_path: Path) -> None:
    with Script(LINK, answer(None, 302, Location=location)) as server:
        with pytest.raises(GatewayError, match="Location"):
            client_of(server).download_file(S3, tmp_path / "f")
    assert not list(tmp_path.iterdir()) and len(server.received) == 2


def test_a_redirect_from_https_to_http_is_refused_and_the_other_way_followed(
    certificate: Path, trusting: ssl.SSLContext, tmp_path: Path
) -> None:
    options: Any = {"ssl_context": trusting, "timeout": WAIT_SECONDS}
    with (
        Script() as plain,
        TlsScript(certificate, answer(None, 302, Location=plain.url)) as storage,
    ):
        with Script(answer({"presigned_url": storage.url + "/o?sig=1"})) as server:
            with client_of(server, **options) as client:
                with pytest.raises(GatewayError, match="https to http"):
                    client.download_file(S3, tmp_path / "f")
    assert not plain.connections
    with TlsScript(certificate, answer(body=b"data")) as secure:
        moved = answer(None, 302, Location=secure.url)
        with Script(LINK, moved) as server, client_of(server, **options) as client:
            client.download_file(S3, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"data"


@pytest.mark.parametrize("name", [name for name in SENDING if name != "presigned GET"])
@pytest.mark.parametrize("status", [301, 307])
def test_any_other_redirect_is_an_error(name: str, status: int, tmp_path: Path) -> None:
    act, before, _ = SENDING[name]
    (tmp_path / "file").write_bytes(b"content")
    with Script() as other:
        with Script(*before, answer(None, status, Location=f"{other.url}/x?sig=2")) as server:
            with pytest.raises(GatewayError) as caught:
                act(server.url, tmp_path / "file")
    assert type(caught.value) is GatewayError and caught.value.status_code == status
    assert "sig=2" not in text_of(caught.value) and not other.connections


def test_an_early_answer_counts_more_than_the_broken_pipe(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(30_000_000))

    def refuse(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(answer({"detail": "too much for us"}, 413, Connection="close"))

    with listening(refuse) as port, pytest.raises(GatewayError, match="too much for us") as caught:
        GatewayClient(f"http://127.0.0.1:{port}").upload_file(tmp_path / "big")
    assert caught.value.status_code == 413


def test_interim_answers_are_skipped() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    with Script(interim + ran(), ran()) as server:
        client = client_of(server)
        assert run(client).is_success() and run(client).is_success()
    assert server.connections == 1


def test_the_timeout_is_for_each_wait_and_each_call(tmp_path: Path) -> None:
    with Script(Pause(), Pause(), ran()) as server:
        with pytest.raises(TimeoutError):
            run(client_of(server), timeout=0.05)
        with pytest.raises(GatewayTimeoutError, match="timeout="):
            run(client_of(server, timeout=0.05), timeout=None)
        assert run(client_of(server, timeout=None)).is_success()


def test_each_request_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "gateway_sdk")
    with Script(UNAVAILABLE, answer({"files": []}), ran(), HangUp()) as server:
        client = client_of(server)
        client.list_files(continuation_token="page-2")
        run(client)
        with pytest.raises(ServiceUnavailableError):
            run(client)
    assert {record.levelname for record in caplog.records} == {"DEBUG"}
    assert {record.name for record in caplog.records} == {"gateway_sdk"}
    lines = [record.getMessage() for record in caplog.records if " ms" in record.getMessage()]
    listing, call_ = r"GET /internal/files/list\b.*", r"POST /v1/internal/run\b.*"
    expected = [listing + "503.* 1", listing + "200.* 2", call_ + "200.* 1", call_ + " 1"]
    assert len(lines) == 4 and all(map(re.match, expected, lines)), lines
    (reason,) = [
        record.getMessage() for record in caplog.records if " ms" not in record.getMessage()
    ]
    assert "503" in reason and "down" in reason and "page-2" not in caplog.text


# Nothing that is shown has a secret in it, not even where the gateway repeats it.
WHO: dict[str, Callable[[str, Path], Any]] = {
    "internal token": lambda url, _: run(GatewayClient(url, internal_token=HIDDEN, max_retries=1)),
    "token that streams": lambda url, _: list(
        run(GatewayClient(url, internal_token=HIDDEN, max_retries=1), stream=True)),
    "token of a batch": lambda url, _: raise_first(
        GatewayClient(url, internal_token=HIDDEN).run_batch([call(), call()])),
    "API key": lambda url, _: GatewayClient(url, api_key=HIDDEN, max_retries=1).list_prefabs(),
    "JWT": lambda url, _: GatewayClient(url, jwt_token=HIDDEN).list_files(),
    "exchanged API key": lambda url, _: GatewayClient.from_api_key(HIDDEN, url, max_retries=1),
    "secret": lambda url, _: GatewayClient(url).set_secret("p", "KEY", HIDDEN),
    "presigned GET": lambda url, path: GatewayClient(url).download_file(S3, path),
    "presigned PUT": lambda url, path: GatewayClient(url).upload_input_file(__file__),
}  # fmt: skip
QUOTED = urllib.parse.quote(HIDDEN, safe="")
ECHOES: dict[str, Callable[[str], Answer]] = {
    "string": lambda s: answer({"detail": f"bad {s}"}, 400),
    "fields": lambda s: answer({"detail": {"error_code": s, "message": s, s: [{s: s}]}}, 401),
    "details": lambda s: answer({"error_code": "X", "message": "m", "details": {"given": s}}, 429),
    "no message": lambda s: answer({"detail": {"given": s}}, 400),
    "list": lambda s: answer({"detail": [{"loc": ["body", s], "msg": s, "input": s}]}, 422),
    "missing secret": lambda s: answer(
        {"detail": {"error_code": "MISSING_SECRET", "secret_name": s, "instructions": s}}, 400),
    "JSON string": lambda s: answer(s, 500),
    "HTML": lambda s: answer(body=f"<p>{s}</p>".encode(), status=502),
    "XML": lambda s: answer(body=f"<Code>{s}</Code><Message>{s}</Message>".encode(), status=403),
    "quoted": lambda s: answer(body=urllib.parse.quote(s, safe="").encode(), status=503),
    "reason": lambda s: f"HTTP/1.1 400 {s}\r\nContent-Length: 0\r\n\r\n".encode("latin-1"),
    "status line": lambda s: HangUp(f"{s}\r\n\r\n".encode("latin-1")),
    "status": lambda s: HangUp(f"HTTP/1.1 {s} OK\r\n\r\n".encode("latin-1")),
    "chunk size": lambda s: HangUp(chunked(end=False) + f"{s}\r\n".encode("latin-1")),
    "location": lambda s: answer({}, 307, Location=f"ftp://h/{s}?{QUOTED}"),
    "not JSON": lambda s: answer(body=s.encode()),
    "other JSON": lambda s: answer({"given": s, "results": s}),
    "other results": lambda s: answer({"results": [s, {"given": s}], "files": 1}),
}  # fmt: skip


def raise_first(batch: BatchResult) -> None:
    assert "hush" not in repr(batch).lower()
    for failed in batch.get_failed():
        if failed.exception:
            raise failed.exception


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("who", WHO)
def test_no_secret_is_shown_anywhere(
    who: str, echo: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    shown: dict[str, Any] = {}
    before = [link(f"X-Sig={QUOTED}&X-Expires=5")] if who.startswith("presigned") else []
    with Script(*before, *[ECHOES[echo](HIDDEN)] * 3) as server:
        try:
            WHO[who](server.url, tmp_path / "f")
        except GatewayError as error:
            shown = {
                "message": error.message, "str": str(error), "repr": repr(error),
                "args": error.args,
                "details": error.details, "attributes": vars(error), "traceback": text_of(error),
                "pickle": pickle.dumps(error),
            }  # fmt: skip
    assert len(server.received) > len(before)
    shown["log"] = [(record.getMessage(), record.args) for record in caplog.records]
    leaks = {channel: text for channel, text in shown.items() if "hush" in repr(text).lower()}
    assert not leaks


# --- Error mapping --------------------------------------------------------------------------------

ACTS: dict[str, tuple[Callable[[GatewayClient], Any], str]] = {
    "run": (run, "POST /v1/internal/run"),
    "stream": (lambda c: run(c, stream=True), "POST /v1/internal/run"),
    "directory": (lambda c: c.list_prefabs(), "GET /v1/prefabs"),
    "spec": (lambda c: c.get_prefab_spec("p", "1.0.0"), "GET /v1/prefabs/p/1.0.0/spec"),
    "files": (lambda c: c.list_files(), "GET /internal/files/list"),
    "secrets": (lambda c: c.delete_secret("p", "KEY"), "DELETE /v1/secrets/p/KEY"),
}
PREFAB = {"prefab_id": "p", "version": "1.0.0"}
QUOTA = {"limit": 10, "used": 11, "quota_type": "calls"}
NO_QUOTA = {"limit": 0, "used": 0, "quota_type": "unknown"}
SECRET = {"prefab_id": "q", "secret_name": "KEY", "instructions": "Ask for one"}
PLAIN_SECRET = "Secret 'KEY' for prefab 'q' is not configured"


def coded(code: str, **fields: Any) -> dict[str, Any]:
    return {"error_code": code, "message": "the reason", **fields}


MAPPING = [
    ("run", 401, {"detail": "the reason"}, AuthenticationError, {}),
    ("directory", 401, {"detail": "the reason"}, AuthenticationError, {}),
    ("files", 403, {"detail": "the reason"}, AuthenticationError, {}),
    ("run", 404, {"detail": "the reason"}, PrefabNotFoundError, PREFAB),
    ("stream", 404, {"detail": "the reason"}, PrefabNotFoundError, PREFAB),
    ("spec", 404, {"detail": coded("GONE")}, PrefabNotFoundError, {**PREFAB, "error_code": "GONE"}),
    ("directory", 404, {"detail": "the reason"}, PrefabNotFoundError, {}),
    ("files", 404, {"detail": "the reason"}, GatewayError, {}),
    ("secrets", 404, {"detail": "the reason"}, GatewayError, {}),
    ("run", 422, {"detail": "the reason"}, ValidationError, {}),
    ("run", 422, {"detail": coded("BAD")}, ValidationError, {"error_code": "BAD"}),
    ("run", 422, {"detail": [{"msg": "the reason"}, "odd", None, {"loc": 3}]}, ValidationError, {}),
    ("run", 429, {"detail": "the reason"}, QuotaExceededError, NO_QUOTA),
    ("run", 429, {"detail": coded("QUOTA_EXCEEDED", **QUOTA)}, QuotaExceededError, QUOTA),
    ("files", 429, coded("Q", details=QUOTA), QuotaExceededError, {**QUOTA, "error_code": "Q"}),
    ("run", 429, {"detail": coded("Q", details=QUOTA)}, QuotaExceededError, QUOTA),
    ("run", 429, {"detail": coded("Q", limit=None)}, QuotaExceededError, NO_QUOTA),
    ("run", 400, {"detail": coded("MISSING_SECRET", **SECRET)}, MissingSecretError, SECRET),
    ("run", 400, coded("MISSING_SECRET", details=SECRET), MissingSecretError, SECRET),
    ("run", 400, {"detail": PLAIN_SECRET}, MissingSecretError,
     {**SECRET, "instructions": None, "error_code": "MISSING_SECRET"}),
    ("files", 400, {"detail": coded("MISSING_AGENT_CONTEXT")}, AgentContextRequiredError,
     {"error_code": "MISSING_AGENT_CONTEXT"}),
    ("files", 400, coded("MISSING_AGENT_CONTEXT"), AgentContextRequiredError, {}),
    ("run", 400, {"detail": coded("OTHER")}, GatewayError, {"error_code": "OTHER"}),
    ("run", 409, {"detail": coded("MISSING_SECRET", **SECRET)}, GatewayError, {}),
    ("run", 418, {"detail": "the reason"}, GatewayError, {"error_code": None}),
    ("run", 500, b"the reason", ServiceUnavailableError, {}),
    ("run", 503, {"detail": "the reason"}, ServiceUnavailableError, {}),
    ("run", 599, coded("DOWN"), ServiceUnavailableError, {"error_code": "DOWN"}),
    ("run", 302, {"detail": "x"}, GatewayError, {}),
    ("directory", 304, b"", GatewayError, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "status", "body", "kind", "attributes"), MAPPING,
    ids=[f"{name} {status} {str(body)[:40]}" for name, status, body, _, _ in MAPPING],
)  # fmt: skip
def test_an_error_answer_becomes_its_exception(
    name: str, status: int, body: Any, kind: type[GatewayError], attributes: dict[str, Any]
) -> None:
    act, asked = ACTS[name]
    given = (
        answer(body, status) if not isinstance(body, bytes) else answer(body=body, status=status)
    )
    error = error_of(given, act)
    assert type(error) is kind and error.status_code == status
    assert {key: getattr(error, key) for key in attributes} == attributes
    assert asked in str(error) and str(status) in str(error) and str(error) == error.message
    said = PLAIN_SECRET if PLAIN_SECRET in str(body) else "the reason"
    assert said in str(error) or status < 400


FORMS = {
    "string": ({"detail": "the reason"}, {}),
    "object": ({"detail": coded("E", more=1)}, {"error_code": "E", "more": 1}),
    "bare": (coded("E", more=1), {"error_code": "E", "more": 1}),
    "bare with details": (coded("E", details={"more": 1}), {"error_code": "E", "more": 1}),
    "details beside": (coded("E", more=1, details={"n": 2}),
                       {"error_code": "E", "more": 1, "n": 2}),
    "object without code": ({"detail": {"message": "the reason"}}, {}),
    "list": ({"detail": [{"loc": ["body"], "msg": "the reason"}]}, {}),
    "HTML": (b"<html>the reason</html>", {}),
    "text in latin-1": (b"the reason \xff", {}),
    "empty": (b"", {}),
    "null": (None, {}),
    "number": (5, {}),
    "empty object": ({}, {}),
    "deep": (b"[" * 9999, {}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, GatewayError), (401, AuthenticationError), (404, PrefabNotFoundError),
     (422, ValidationError),
     (429, QuotaExceededError), (503, ServiceUnavailableError)],
)  # fmt: skip
def test_every_form_of_body_is_understood(status: int, kind: Any, form: str) -> None:
    body, fields = FORMS[form]
    given = (
        answer(body, status) if not isinstance(body, bytes) else answer(body=body, status=status)
    )
    error = error_of(given)
    assert type(error) is kind and error.status_code == status
    assert fields.items() <= error.details.items() and error.error_code == fields.get("error_code")
    assert ("the reason" in str(error)) == ("the reason" in str(body))
    assert pickle.loads(pickle.dumps(error)).details == error.details


def test_a_422_reads_as_one_line_per_field() -> None:
    problems = [
        {
            "loc": ["body", "calls", 0, "version"],
            "msg": "Field required",
            "type": "missing",
            "url": "u",
        },
        {"loc": ["query", "limit"], "msg": "Input should be an integer", "input": "x"},
    ]
    error = error_of(answer({"detail": problems}, 422))
    lines = [line.strip() for line in str(error).splitlines()[1:]]
    assert lines == [
        "body.calls.0.version: Field required",
        "query.limit: Input should be an integer",
    ]


@pytest.mark.parametrize("status", [200, 400, 503])
def test_of_what_is_not_json_the_first_500_characters_are_shown(status: int) -> None:
    error = error_of(answer(body=b"<html>" + b"x" * 9000, status=status))
    assert "<html>" + "x" * 494 in str(error) and "x" * 495 not in str(error)


@pytest.mark.parametrize(
    ("name", "body"),
    [("run", b""), ("run", b"<html>"), ("run", b"null"), ("run", b"[]"), ("run", b"{}"),
     ("run", b'{"results": {}}'), ("run", b'{"results": []}'), ("run", b'{"results": [null]}'),
     ("run", b'{"results": [{}, {}]}'), ("run", b'{"results": [NaN]}'), ("run", b"\xff"),
     ("run", b"[" * 9999),
     ("stream", b"<html>"), ("stream", b'{"results": []}'), ("directory", b"{}"),
     ("directory", b"[1]"),
     ("directory", b'[{"id": "p"}]'), ("spec", b"[]"), ("files", b"{}"),
     ("files", b'{"files": null}')],
)  # fmt: skip
def test_a_200_that_is_not_what_was_promised_is_an_error(name: str, body: bytes) -> None:
    act, asked = ACTS[name]
    error = error_of(answer(body=body), act)
    assert type(error) is GatewayError and error.status_code == 200 and asked in str(error)


@pytest.mark.parametrize(
    ("status", "detail", "remedy"),
    [(401, "x", "credential"), (404, "x", "list_prefabs"),
     (400, PLAIN_SECRET, "set_secret('q', 'KEY'"),
     (400, coded("MISSING_SECRET", **SECRET), "Ask for one"),
     (400, coded("MISSING_AGENT_CONTEXT"), "upload_input_file")],
    ids=str,
)  # fmt: skip
def test_an_error_names_its_remedy(status: int, detail: Any, remedy: str) -> None:
    assert remedy in str(error_of(answer({"detail": detail}, status)))


def test_an_error_body_that_breaks_off_still_has_its_status() -> None:
    error = error_of(HangUp(answer({"detail": "x"}, 401)[:-3]))
    assert type(error) is AuthenticationError and error.status_code == 401


# --- Running --------------------------------------------------------------------------------------


def test_a_function_runs(client: GatewayClient) -> None:
    result = client.run("text-tools", "1.1.0", "statistics", {"text": "a b"})
    assert result.is_success() and result.status == CallStatus.SUCCESS and result.error is None
    assert result.job_id and result.exception is None
    assert result.get_business_success() and result.get_business_message() == "2 words"


def test_a_business_failure_is_a_success_of_the_call(client: GatewayClient) -> None:
    result = client.run("faulty", "1.0.0", "fail", {"message": "no"})
    assert result.is_success() and not result.get_business_success()
    assert (result.get_business_error(), result.get_business_error_code()) == ("no", "ALWAYS_FAILS")


def test_a_failed_call_is_a_result_and_not_an_error(client: GatewayClient) -> None:
    result = client.run("faulty", "1.0.0", "refuse", {"message": "no"})
    assert result.status == "FAILED" and result.error == {"message": "no", "type": "Refused"}
    assert result.output is None and result.get_function_result() == {} and not result.exception


@pytest.mark.parametrize(
    ("names", "parameters", "kind"),
    [(("nothing", "1.0.0", "f"), {}, PrefabNotFoundError),
     (("text-tools", "9.9.9", "echo"), {}, PrefabNotFoundError),
     (("text-tools", "1.0.0", "nothing"), {}, PrefabNotFoundError),
     (("text-tools", "1.0.0", "statistics"), {}, ValidationError),
     (("vault", "1.0.0", "sign"), {"text": "x"}, MissingSecretError),
     (("faulty", "1.0.0", "crash"), {}, ServiceUnavailableError)],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_run_raises(
    stream: bool, names: Any, parameters: Any, kind: Any, client: GatewayClient
) -> None:
    with pytest.raises(kind):
        client.run(*names, parameters, stream=stream)


def test_any_function_of_a_prefab_is_a_method(client: GatewayClient) -> None:
    tools = client.prefab("text-tools", "1.1.0")
    assert isinstance(tools, Prefab) and "text-tools" in repr(tools)
    assert tools.echo(value=[1]).get_function_result() == [1]
    assert tools.call("echo", value=2).get_function_result() == 2
    events = tools.stream("words", text="a b")
    assert [e.data for e in events if e.type == "content"] == ["a ", "b"]
    assert pickle.loads(pickle.dumps(tools)).echo(value=3).get_function_result() == 3
    assert copy.copy(tools).echo(value=4).get_function_result() == 4
    for name in ("_ipython_display_", "__wrapped__", "_x"):
        assert not hasattr(tools, name)


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


def test_the_directory_is_listed(client: GatewayClient, gateway: LocalGateway) -> None:
    listed = client.list_prefabs()
    assert [prefab.raw for prefab in listed] == gateway.prefabs()
    assert [(p.prefab_id, p.version) for p in listed][:2] == [
        ("text-tools", "1.1.0"),
        ("text-tools", "1.0.0"),
    ]
    vault = next(prefab for prefab in listed if prefab.prefab_id == "vault")
    assert vault.requires_secrets and vault.secrets[0]["name"] == "SIGNING_KEY"
    assert client.list_prefabs(status="failed") == []


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
    assert [index for index, _, _ in reported][-1] == 0 and {t for _, _, t in reported} == {
        threading.get_ident()
    }
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
        calls = [PrefabCall("p", "1.0.0", "f")] * (3 * workers)
        options = {} if workers == 8 else {"max_workers": workers}
        assert client.run_batch(calls, **options).all_success()
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
            batch = client.run_batch(
                mixed_calls(), executor=executor, on_result=lambda i, _, to=reported: to.append(i)
            )
            assert executor.submit(int).result() == 0  # it is the caller's, and still open
        check_mixed(batch)
        assert sorted(reported) == [0, 1, 2, 3, 4]


def test_an_executor_that_breaks_fails_its_calls_and_not_the_batch(client: GatewayClient) -> None:
    class Broken(concurrent.futures.Executor):
        def submit(self, *_: Any, **__: Any) -> Any:
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            future.set_exception(RuntimeError("worker lost"))
            return future

    batch = client.run_batch(mixed_calls(), executor=Broken())
    assert batch.status == "FAILED" and len(batch.results) == 5
    assert "worker lost" in str(batch.results[0].error)


def test_a_call_that_the_executor_cancels_has_nothing_to_do_with_credentials(client: GatewayClient) -> None:
    class Cancelling(concurrent.futures.Executor):
        def submit(self, *_: Any, **__: Any) -> Any:
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            future.cancel()
            return future

    first, second = client.run_batch([call(), call()], executor=Cancelling()).results
    assert type(first.exception) is ServiceUnavailableError and "cancelled" in str(first.exception)
    assert first is not second


@pytest.mark.parametrize("code", ["E", None])
def test_the_error_of_a_result_has_the_code_of_its_exception(code: str | None) -> None:
    with Script(answer({"error_code": code, "message": "m"}, 422)) as server:
        (result,) = client_of(server).run_batch([call()]).results
    assert result.error and result.error.get("error_code") == code
    assert ("error_code" in result.error) == bool(code)


@pytest.mark.parametrize("executor", [None, concurrent.futures.ThreadPoolExecutor])
def test_after_a_refused_credential_nothing_more_is_sent(executor: Any) -> None:
    with Script(*[REFUSED] * 9) as server, contextlib.ExitStack() as stack:
        options = {"executor": stack.enter_context(executor(1))} if executor else {"max_workers": 1}
        with pytest.raises(AuthenticationError) as caught:
            client_of(server).run_batch([call(n) for n in range(9)], **options)
    assert caught.value.status_code == 401 and len(server.received) <= (2 if executor else 1)


@pytest.mark.parametrize("single_request", [False, True])
def test_a_refused_credential_is_raised(single_request: bool) -> None:
    with Script(*[REFUSED] * 3) as server, pytest.raises(AuthenticationError):
        client_of(server).run_batch([call()] * 3, single_request=single_request)


def test_a_refused_credential_does_not_hide_a_call_that_may_have_run() -> None:
    with Script(UNAVAILABLE, REFUSED) as server:
        batch = client_of(server).run_batch([call(), call()], max_workers=1)
    first, second = (result.exception for result in batch.results)
    assert first and first.may_have_run and isinstance(second, AuthenticationError)


def test_a_refused_credential_does_not_cost_the_results_that_there_are() -> None:
    with Script(ran("paid for"), REFUSED, ran()) as server:
        batch = client_of(server).run_batch([call(n) for n in range(4)], max_workers=1)
    assert len(server.received) == 2 and batch.status == "PARTIAL_SUCCESS"
    assert batch.results[0].get_function_result() == "paid for"
    assert all(isinstance(r.exception, AuthenticationError) for r in batch.results[1:])


def test_a_403_may_concern_one_prefab_and_is_a_result() -> None:
    with Script(*[answer({"detail": "not yours"}, 403)] * 3) as server:
        batch = client_of(server).run_batch([call()] * 3, max_workers=1)
    assert len(server.received) == 3 and batch.status == "FAILED"
    assert all(isinstance(result.exception, AuthenticationError) for result in batch.results)


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
    with pytest.raises(PrefabNotFoundError):
        client.run_batch(mixed_calls(), single_request=True)


@pytest.mark.parametrize("single_request", [False, True])
def test_an_empty_batch_sends_nothing(single_request: bool) -> None:
    with Script() as server:
        batch = client_of(server).run_batch(iter(()), single_request=single_request)
    assert batch == BatchResult(None, "COMPLETED", []) and batch.all_success()
    assert not server.received


@pytest.mark.parametrize(
    "bad",
    [{"prefab_id": "p"}, None, PrefabCall("p", "1.0.0", ""),
     PrefabCall("p", "1.0.0", "f", {"x": {1}}),
     PrefabCall("p", "1.0.0", "f", {}, {"v": ["a.mp4"]})],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("single_request", [False, True])
def test_a_bad_call_stops_its_batch_before_anything_is_sent(bad: Any, single_request: bool) -> None:
    with Script() as server, pytest.raises(ValidationError):
        client_of(server).run_batch([call()] * 20 + [bad], single_request=single_request)
    assert not server.received


def test_calls_are_read_whole_before_anything_is_sent() -> None:
    def failing() -> Iterator[PrefabCall]:
        yield call()
        raise LookupError("the caller's own")

    with Script() as server, pytest.raises(LookupError):
        client_of(server).run_batch(failing())
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
            output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert (output, process.returncode) == (b"interrupted\n", 0) and len(server.received) == 2


# --- Streaming ------------------------------------------------------------------------------------

HEAD = chunked(end=False)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


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


def leave_by_break(stream: EventStream) -> None:
    for _ in stream:
        break


def leave_with(stream: EventStream) -> None:
    with stream as entered:
        assert next(entered).data == 1


def leave_with_an_error(stream: EventStream) -> None:
    with contextlib.suppress(LookupError), stream:
        raise LookupError


def close_twice(stream: EventStream) -> None:
    assert next(stream).data == 1
    stream.close()
    stream.close()


@cpython_only
@pytest.mark.parametrize("leave", [leave_by_break, leave_with, leave_with_an_error, close_twice])
def test_leaving_a_stream_frees_its_connection(leave: Any) -> None:
    with Script(Pause(HEAD + chunk(event("content", 1)) + chunk(event("content", 2)))) as server:
        stream = run(client_of(server), stream=True)
        leave(stream)
        server.wait_until(lambda: server.open_connections == 0)
        assert list(stream) == []


@cpython_only
def test_a_stream_that_nobody_has_any_more_frees_its_connection() -> None:
    with Script(Pause(HEAD + chunk(event("content", 1)))) as server:
        client = client_of(server)
        stream = run(client, stream=True)
        assert next(stream).data == 1
        del stream
        gc.collect()
        server.wait_until(lambda: server.open_connections == 0)


def test_a_stream_is_an_iterator(client: GatewayClient) -> None:
    stream = client.run("text-tools", "1.1.0", "words", {"text": "a b"}, stream=True)
    assert isinstance(stream, EventStream) and next(stream).type is StreamEventType.START
    assert [(e.type, e.data) for e in stream][:2] == [("content", "a "), ("content", "b")]
    with pytest.raises(StopIteration):
        next(stream)


def test_a_stream_of_a_plain_function_is_its_result(client: GatewayClient) -> None:
    content, done = client.run("text-tools", "1.1.0", "echo", {"value": 5}, stream=True)
    assert (content.type, done.type) == (StreamEventType.CONTENT, StreamEventType.DONE)
    assert content.data == client.run("text-tools", "1.1.0", "echo", {"value": 5}).get_result()
    (failed,) = client.run("faulty", "1.0.0", "refuse", {"message": "no"}, stream=True)
    assert failed.type == "error" and failed.data == {"message": "no", "type": "Refused"}


@pytest.mark.parametrize(
    ("contents", "value"),
    [(["a ", "b"], "a b"), ([{"n": 1}, {"n": 2}], [{"n": 1}, {"n": 2}]), (["a", 1], ["a", 1]),
     (["a"], "a")],
    ids=str,
)  # fmt: skip
def test_a_streaming_function_called_for_its_result_gives_one(contents: Any, value: Any) -> None:
    events = [event("start"), event("progress", 1), *(event("content", c) for c in contents)]
    with Script(chunked(*events, event("done", {"job_id": "j"}))) as server:
        result = run(client_of(server))
    assert result.is_success() and result.get_function_result() == value


def test_an_error_event_makes_such_a_result_failed_and_keeps_what_came(
    client: GatewayClient,
) -> None:
    result = client.run("faulty", "1.0.0", "stumble", {"text": "so far"})
    assert result.status == "FAILED" and result.error and result.error["message"] == "stumbled"
    assert result.get_function_result() == "so far"


def test_an_error_event_is_yielded_and_not_raised(client: GatewayClient) -> None:
    events = list(client.run("faulty", "1.0.0", "stumble", {"text": "x"}, stream=True))
    assert [e.type for e in events] == ["start", "content", "error"]
    assert events[-1].data["message"] == "stumbled"


def test_events_after_done_are_still_handed_over() -> None:
    with Script(chunked(event("done"), event("content", "late"), event("done")), ran()) as server:
        client = client_of(server)
        assert [e.type for e in run(client, stream=True)] == ["done", "content", "done"]
        run(client)
    assert server.connections == 1


PLAIN_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CUT_STREAMS: dict[str, Answer] = {
    "between chunks": HangUp(HEAD + chunk(event("content", 1))),
    "inside a chunk": HangUp(HEAD + chunk(event("content", 1)) + chunk(event("content", 2))[:-9]),
    "reset": HangUp(HEAD + chunk(event("content", 1)) + b"5\r\nda", reset=False),
    "by length": HangUp(PLAIN_HEAD + b"Content-Length: 999\r\n\r\n" + event("content", 1)),
    "without length": HangUp(PLAIN_HEAD + b"\r\n" + event("content", 1)),
}


@pytest.mark.parametrize("cut", CUT_STREAMS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_stream_that_breaks_never_just_ends(cut: str, stream: bool) -> None:
    seen = []
    with Script(CUT_STREAMS[cut]) as server, pytest.raises(ServiceUnavailableError):
        for received in run(client_of(server), stream=stream):
            seen.append(received.data)
    assert seen == ([1] if stream else []) and len(server.received) == 1


def test_a_stream_without_a_length_that_says_done_is_whole() -> None:
    with Script(HangUp(PLAIN_HEAD + b"\r\n" + event("content", 1) + event("done"))) as server:
        assert [e.type for e in run(client_of(server), stream=True)] == ["content", "done"]


def test_a_stream_that_falls_silent_times_out() -> None:
    with Script(Pause(HEAD + chunk(event("content", 1)))) as server:
        stream = run(client_of(server), stream=True, timeout=0.1)
        assert next(stream).data == 1
        with pytest.raises(GatewayTimeoutError):
            next(stream)


# --- Files ----------------------------------------------------------------------------------------

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
    [
        ("plain.txt", "plain.txt", "text/plain"),
        ('quo"te.png', "quo%22te.png", "image/png"),
        ("line\nbreak\r.json", "line%0Abreak%0D.json", "application/json"),
        ("ümlaut 你好.pdf", "ümlaut 你好.pdf", "application/pdf"),
        (
            "back\\slash;semi=.no-such-type",
            "back\\slash;semi=.no-such-type",
            "application/octet-stream",
        ),
        ("100%41", "100%41", "application/octet-stream"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="has no such names")
def test_multipart_bodies_are_written_as_browsers_do(
    name: str, sent: str, media_type: str, tmp_path: Path
) -> None:
    content = b"\r\n--not the boundary\r\n\x00\xff"
    (tmp_path / name).write_bytes(content)
    with Script(*[answer({"s3_url": S3})] * 3) as server:
        client = client_of(server)
        client.upload_file(tmp_path / name)
        client.upload_temp_file(tmp_path / name, 60, "s-1")
        client.upload_temp_file(tmp_path / name)
    fields = [
        "",
        'ttl"\r\n\r\n60\r\n--{0}\r\n{1}session_id"\r\n\r\ns-1\r\n--{0}\r\n{1}',
        'ttl"\r\n\r\n86400\r\n--{0}\r\n{1}',
    ]
    targets = ["upload", "upload_temp", "upload_temp"]
    for received, target, before in zip(server.received, targets, fields):
        media, _, boundary = received.headers["content-type"].partition("; boundary=")
        form = 'Content-Disposition: form-data; name="'
        head = f"--{boundary}\r\n{form}{before.format(boundary, form)}"
        head += f'file"; filename="{sent}"\r\nContent-Type: {media_type}\r\n\r\n'
        assert received.body == head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        assert (
            received[:2] == ("POST", f"/internal/files/{target}") and media == "multipart/form-data"
        )
        assert received.headers["x-internal-token"] == TOKEN
        assert received.headers["content-length"] == str(len(received.body))


@pytest.mark.parametrize("upload", UPLOADS)
def test_a_file_that_cannot_be_uploaded_is_an_error_before_anything_is_sent(
    upload: str, tmp_path: Path
) -> None:
    with Script() as server:
        for path, kind in (("missing", FileNotFoundError), (".", (OSError, ValidationError))):
            with pytest.raises(kind):
                UPLOADS[upload](client_of(server), tmp_path / path)
        if os.path.exists("/dev/zero"):
            with pytest.raises(ValidationError):
                UPLOADS[upload](client_of(server), "/dev/zero")
    assert not server.received


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="no devices here")
def test_a_device_is_no_target_and_stays_a_device(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    with Script(LINK, LINK) as server:
        for path in ("/dev/null", tmp_path / "link"):
            with pytest.raises((ValidationError, OSError)):
                client_of(server).download_file(S3, path)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and not server.received


def test_a_folder_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with Script() as server, pytest.raises((ValidationError, OSError)):
        client_of(server).download_file(S3, tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "x" and not server.received


@pytest.mark.skipif(os.name == "nt", reason="has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_of_a_download_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with Script(LINK, answer(body=b"data")) as server:
            client_of(server).download_file(S3, tmp_path / "f")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o666 & ~umask


def test_a_bare_name_is_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Script(LINK, answer(body=b"data")) as server:
        client_of(server).download_file(S3, "result.pdf")
    assert (tmp_path / "result.pdf").read_bytes() == b"data"


BAD_DOWNLOADS: dict[str, tuple[Answer, type[GatewayError], str]] = {
    "cut": (HangUp(answer(body=b"0123456789")[:-3]), ServiceUnavailableError, "cut short"),
    "chunks cut": (HangUp(chunked(b"0123", end=False)), ServiceUnavailableError, "cut short"),
    "404": (
        answer(body=b"<Code>NoSuchKey</Code><Message>gone</Message>", status=404),
        GatewayError,
        "gone",
    ),
    "403": (answer(body=b"Request has expired", status=403), GatewayError, "expired"),
    "500": (answer(body=b"broken", status=500), ServiceUnavailableError, "broken"),
    "503": (answer(body=b"SlowDown", status=503), ServiceUnavailableError, "SlowDown"),
}


@pytest.mark.parametrize("bad", BAD_DOWNLOADS)
def test_a_failed_download_leaves_everything_as_it_was(bad: str, tmp_path: Path) -> None:
    given, kind, said = BAD_DOWNLOADS[bad]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").write_text("old")
    for target in ("kept/old", "kept/new", "made/for/it/new"):
        with Script(LINK, given) as server, pytest.raises(GatewayError, match=said) as caught:
            client_of(server, max_retries=0).download_file(S3, tmp_path / target)
        assert type(caught.value) is kind
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
        assert left == ["kept", "kept/old"] and (tmp_path / "kept" / "old").read_text() == "old"


def test_an_error_of_on_progress_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(_: int, __: Any) -> None:
        raise LookupError("the caller's own")

    with Script(LINK, answer(body=b"data")) as server, pytest.raises(LookupError):
        client_of(server).download_file(S3, tmp_path / "made" / "f", on_progress=fail)
    assert not list(tmp_path.iterdir())


def part(data: bytes, start: int, tag: str = '"1"', total: Any = 10) -> bytes:
    span = f"bytes {start}-{start + len(data) - 1}/{total}"
    return answer(body=data, status=206, ETag=tag, Content_Range=span)


RESUMED: dict[str, tuple[bytes, str | None]] = {
    "goes on": (part(b"3456789", 3), "bytes=3-"),
    "changed": (answer(body=b"0123456789", ETag='"2"'), "bytes=3-"),
}


@pytest.mark.parametrize("how", RESUMED)
def test_a_broken_download_goes_on_where_it_was(how: str, tmp_path: Path) -> None:
    given, wanted = RESUMED[how]
    old = b"012" if how == "goes on" else b"abc"
    broken = HangUp(answer(body=old + b"3456789", ETag='"1"')[:-7])
    steps: list[tuple[int, Any]] = []
    with Script(LINK, broken, given) as server:
        client_of(server).download_file(S3, tmp_path / "f", on_progress=lambda *s: steps.append(s))
    assert (tmp_path / "f").read_bytes() == b"0123456789"
    headers = server.received[2].headers
    assert (headers.get("range"), headers.get("if-range")) == (wanted, '"1"')
    assert steps[0] == (0, 10) and steps[-1] == (10, 10)


@pytest.mark.parametrize(
    "given",
    [part(b"456789", 4), part(b"3456789", 3, '"2"'), answer(body=b"", status=416)],
    ids=["another place", "another object", "no such place"],
)  # fmt: skip
def test_a_part_that_does_not_fit_is_not_used(given: bytes, tmp_path: Path) -> None:
    broken = HangUp(answer(body=b"abc3456789", ETag='"1"')[:-7])
    with Script(LINK, broken, given, answer(body=b"0123456789", ETag='"2"')) as server:
        client_of(server).download_file(S3, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"0123456789"
    assert "range" not in server.received[-1].headers


def test_without_a_strong_etag_a_broken_download_starts_over(tmp_path: Path) -> None:
    broken = HangUp(answer(body=b"abc3456789", ETag='W/"1"')[:-7])
    with Script(LINK, broken, answer(body=b"0123456789")) as server:
        client_of(server).download_file(S3, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"0123456789"
    assert "range" not in server.received[-1].headers


def test_a_download_goes_on_within_max_retries(tmp_path: Path) -> None:
    broken = HangUp(answer(body=b"0123456789", ETag='"1"')[:-7])
    with Script(LINK, broken, *[HangUp()] * 9) as server, pytest.raises(ServiceUnavailableError):
        client_of(server, max_retries=3).download_file(S3, tmp_path / "f")
    assert len(server.received) == 1 + 4 and not list(tmp_path.iterdir())


def test_a_download_of_unknown_length_says_so(tmp_path: Path) -> None:
    steps: list[tuple[int, Any]] = []
    with Script(LINK, chunked(b"0123", b"45", content_type="binary/octet-stream")) as server:
        client_of(server).download_file(S3, tmp_path / "f", on_progress=lambda *s: steps.append(s))
    assert (tmp_path / "f").read_bytes() == b"012345"
    assert steps[0] == (0, None) and steps[-1] == (6, None)


@pytest.mark.parametrize(
    "url", ["", "file:///etc/passwd", "ftp://h/x", "/o?sig=1", "s3://b/k", 5, None], ids=repr
)
def test_a_presigned_url_that_is_no_http_url_is_an_error(url: Any, tmp_path: Path) -> None:
    given = answer({"presigned_url": url, "upload_url": url, "s3_url": S3})
    with Script(given, given) as server:
        with pytest.raises(GatewayError):
            client_of(server).download_file(S3, tmp_path / "f")
        with pytest.raises(GatewayError):
            client_of(server).upload_input_file(__file__)
    assert not list(tmp_path.iterdir()) and len(server.received) == 2


def test_a_presigned_url_serves_anyone(tmp_path: Path, client: GatewayClient) -> None:
    (tmp_path / "f").write_bytes(b"data")
    url = client.get_presigned_url(client.upload_file(tmp_path / "f")["s3_url"], expires_in=60)
    with urllib.request.urlopen(url) as response:
        assert response.read() == b"data"


def test_files_are_listed_page_by_page(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"data")
    with LocalGateway() as gateway, client_of(gateway) as client:
        kept = {client.upload_file(tmp_path / "f")["s3_url"] for _ in range(5)}
        temporary = {client.upload_temp_file(tmp_path / "f", 60, "s")["s3_url"] for _ in range(3)}
        client.upload_temp_file(tmp_path / "f", session_id="other")
        first = client.list_files(limit=2)
        second = client.list_files(2, first["next_token"])
        assert len(first["files"]) == len(second["files"]) == 2 and first["files"][0]["size"] == 4
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
    with Script(*[answer({"files": [{}], "next_token": "same"})] * 9) as server:
        with pytest.raises(GatewayError):
            list(client_of(server).iter_files())
    assert len(server.received) == 2


@pytest.mark.parametrize("session_id", [None, "mine"])
@pytest.mark.parametrize("error", [None, LookupError, KeyboardInterrupt])
def test_a_temporary_session_is_cleaned_up_error_or_not(
    error: Any, session_id: str | None, tmp_path: Path, client: GatewayClient
) -> None:
    (tmp_path / "f").write_bytes(b"data")
    with pytest.raises(error) if error else contextlib.nullcontext():
        with client.temp_session(session_id) as given:
            assert given == session_id or (session_id is None and given)
            client.upload_temp_file(tmp_path / "f", session_id=given)
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


def test_file_operations_need_an_agent(gateway: LocalGateway, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"data")
    with GatewayClient(gateway.base_url) as client:
        assert client.upload_input_file(tmp_path / "f").startswith("s3://")
        for act in (
            lambda: client.upload_file(tmp_path / "f"),
            lambda: client.upload_temp_file(tmp_path / "f"),
            lambda: client.list_files(),
            lambda: client.list_temp_files(),
            lambda: client.cleanup_temp_files("s"),
            lambda: client.download_file(S3, tmp_path / "g"),
        ):
            with pytest.raises(AgentContextRequiredError):
                act()


# --- Secrets --------------------------------------------------------------------------------------


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


# --- The module -----------------------------------------------------------------------------------


SUBMODULES = """
import {0}gateway_sdk
from {0}gateway_sdk.exceptions import GatewayError, ValidationError
from {0}gateway_sdk.models import PrefabCall, StreamEventType
import {0}gateway_sdk.models as models
assert GatewayError is {0}gateway_sdk.GatewayError and ValidationError.__mro__[1] is GatewayError
assert PrefabCall is {0}gateway_sdk.PrefabCall is models.PrefabCall
import pickle
assert pickle.loads(pickle.dumps(StreamEventType.DONE)) is StreamEventType.DONE
"""


@pytest.mark.parametrize("package", ["", "mypkg.", "mypkg.inner."])
def test_the_submodules_of_the_older_sdk_can_be_imported(package: str, tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*package.split("."))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(gateway_sdk.__file__, folder / "gateway_sdk.py")
    for code in (SUBMODULES, "\n".join(SUBMODULES.splitlines()[2:4])):
        done = python(code.format(package), PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    code = """if True:
        import logging, os, signal, socket, sys, threading
        before = dict(os.environ), [signal.getsignal(s) for s in signal.valid_signals()]
        connections = []
        sys.addaudithook(lambda name, _: name.startswith("socket.") and connections.append(name))
        import gateway_sdk
        client = gateway_sdk.GatewayClient("http://gateway.invalid")
        assert before == (dict(os.environ), [signal.getsignal(s) for s in signal.valid_signals()])
        assert threading.active_count() == 1 and socket.getdefaulttimeout() is None
        assert not logging.getLogger().handlers and not connections, connections
        assert logging.getLogger("gateway_sdk").level == logging.NOTSET
    """
    done = python(code, GATEWAY_JWT_TOKEN="a\nb", X_INTERNAL_TOKEN="t")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_works_where_ssl_cannot_be_imported(tmp_path: Path) -> None:
    code = """if True:
        import sys
        sys.modules["ssl"] = sys.modules["_ssl"] = None
        import gateway_sdk
        client = gateway_sdk.GatewayClient(sys.argv[1])
        assert client.run("p", "1.0.0", "f").is_success() and client.list_prefabs() == []
        client.download_file("s3://b/k", sys.argv[2])
        try:
            gateway_sdk.GatewayClient("https://localhost").list_prefabs()
        except gateway_sdk.GatewayError as error:
            print(error)
    """
    with Script(ran(), UNAVAILABLE, answer([]), LINK, answer(body=b"data")) as server:
        done = python(code, server.url, tmp_path / "f")
    assert (done.returncode, done.stderr) == (0, "") and "ssl" in done.stdout
    assert (tmp_path / "f").read_bytes() == b"data"


FUZZ_SEED = int(os.environ.get("GATEWAY_FUZZ_SEED", 20240229))
FUZZ_COUNT = int(os.environ.get("GATEWAY_FUZZ_COUNT", 150))  # of each kind
LARGE_MIB = int(os.environ.get("GATEWAY_LARGE_MIB", 256))
SHORT_SECONDS = 0.2  # a timeout that is meant to run out

# --- Faults: every operation meets every fault ----------------------------------------------------


class Routed(Script):
    """A `Script` whose answers are chosen by a function that is given the request."""

    def __init__(self, choose: Callable[[Received], Answer]) -> None:
        super().__init__()
        self._choose: Any = choose
        self._answers: Any = self

    def __len__(self) -> int:
        return 1

    def popleft(self) -> Answer:
        return self._choose(self.received[-1])


class Raw(Script):
    """A server that leaves every connection to a function of its socket."""

    def __init__(self, serve: Callable[[socket.socket], object]) -> None:
        super().__init__()
        self._serve_raw = serve

    def _exchange(self, sock: socket.socket, number: int) -> bool:
        self._serve_raw(sock)
        return False


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


OBJECT = bytes(range(256)) * 40
EVENTS = event("content", "a") + event("content", "b") + event("done")


def good(request: Received, storage: str) -> tuple[bytes, str]:
    """Payload and content type of the right answer; `storage` is where presigned URLs lead."""
    path = request.target.partition("?")[0]
    if path == "/v1/internal/run":
        if request.json["calls"][0]["function_name"] == "words":
            return EVENTS, "text/event-stream"
        return ran("ok").partition(b"\r\n\r\n")[2], "application/json"
    if path.startswith("/storage/"):
        return (OBJECT if request.method == "GET" else b"<ok/>"), "application/octet-stream"
    content = {
        "/v1/prefabs": [{"id": "p", "version": "1"}],
        "/v1/secrets": {"stored": True},
        "/internal/files/generate_upload_url": {"upload_url": f"{storage}/storage/in",
            "s3_url": "s3://b/in"},
        "/internal/files/upload": {"success": True, "s3_url": "s3://b/up", "filename": "in.bin",
            "size": 9},
        "/internal/files/download": {"presigned_url": f"{storage}/storage/out?signature=x"},
        "/internal/files/cleanup_temp": {"deleted_count": 3},
    }[path]
    return json.dumps(content).encode(), "application/json"


def requests_to(server: Script, operation: Operation) -> list[Received]:
    """The requests that count for an operation, without that which warms a connection up."""
    found = [r for r in server.received if f"{r.method} {r.target}".startswith(operation.route)]
    return [request for request in found if not request.target.endswith("=warm")]


def batch_of_three(client: GatewayClient, _: Path) -> Any:
    results = client.run_batch([PrefabCall("p", "1", "f", {"n": n}) for n in range(3)]).results
    assert len(results) == 3
    for result in results:
        if result.exception:
            assert result.status == CallStatus.FAILED
            raise result.exception
    return [result.get_function_result() for result in results]


def download(client: GatewayClient, folder: Path) -> bytes:
    client.download_file("s3://b/out", folder / "new" / "out.bin")
    content = (folder / "new" / "out.bin").read_bytes()
    shutil.rmtree(folder / "new")
    return content


class Operation(NamedTuple):
    """A call of the SDK, what it gives when all is well, and which of its requests meets faults."""

    call: Callable[[GatewayClient, Path], Any]
    gives: Any
    route: str
    reads: str = "json"  # or "events", "object", "nothing"
    count: int = 1  # requests that it takes

    @property
    def repeatable(self) -> bool:
        return not re.match("POST (?!/internal/files/generate_upload_url)", self.route)

    @property
    def storage(self) -> bool:
        return "/storage/" in self.route


OPERATIONS = {
    "list_prefabs": Operation(lambda c, f: [p.prefab_id for p in c.list_prefabs()], ["p"],
        "GET /v1/prefabs"),
    "run": Operation(lambda c, f: c.run("p", "1", "f").get_function_result(), "ok",
        "POST /v1/internal/run"),
    "run-stream": Operation(
        lambda c, f: [event.data for event in c.run("p", "1", "words", stream=True)],
        ["a", "b", None], "POST /v1/internal/run", "events"),
    "run-of-a-stream": Operation(
        lambda c, f: c.run("p", "1", "words").get_function_result(), "ab", "POST /v1/internal/run",
            "events"),
    "run_batch": Operation(batch_of_three, ["ok"] * 3, "POST /v1/internal/run", count=3),
    "upload_input_file-url": Operation(
        lambda c, f: c.upload_input_file(f / "in.bin"), "s3://b/in",
            "POST /internal/files/generate_upload_url"),
    "upload_input_file-put": Operation(
        lambda c, f: c.upload_input_file(f / "in.bin"), "s3://b/in", "PUT /storage/in", "nothing"),
    "upload_file": Operation(
        lambda c, f: c.upload_file(f / "in.bin")["s3_url"], "s3://b/up",
            "POST /internal/files/upload"),
    "download_file": Operation(download, OBJECT, "GET /storage/out", "object"),
    "get_presigned_url": Operation(
        lambda c, f: c.get_presigned_url("s3://b/out").rpartition("?")[2],
        "signature=x", "GET /internal/files/download"),
    "set_secret": Operation(lambda c, f: c.set_secret("p", "KEY", "s3cr3t"), None,
        "POST /v1/secrets", "nothing"),
    "cleanup_temp_files": Operation(
        lambda c, f: c.cleanup_temp_files("s"), 3, "DELETE /internal/files/cleanup_temp"),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


class Outcome(NamedTuple):
    """The class of the error and its status (`...`: any); if a repeatable request is repeated."""

    error: type[GatewayError]
    status: Any = None
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


def whole(payload: bytes, kind: str, status: int = 200) -> bytes:
    return answer(status=status, body=payload, Content_Type=kind)


def unframed(payload: bytes, kind: str, version: str = "1.1") -> HangUp:
    return HangUp(f"HTTP/{version} 200 OK\r\nContent-Type: {kind}\r\n\r\n".encode() + payload)


def endless(start: bytes, block: bytes) -> Steps:
    def send(sock: socket.socket) -> None:
        sock.sendall(start)
        for _ in range(2**26 // len(block)):
            sock.sendall(block)
        raise AssertionError("the client would read for ever")

    return Steps((send,))


def bytewise(payload: bytes, kind: str) -> Steps:
    """Every byte of the head and the first ones of the body by itself."""
    text = whole(payload, kind)
    pieces = [*(text[index : index + 1] for index in range(200)), text[200:]]
    return Steps(tuple(operator.methodcaller("sendall", piece) for piece in pieces))


def unended(payload: bytes, kind: str) -> bytes:
    """The payload in a chunk, behind which no other comes."""
    return chunked(*filter(None, [payload]), end=False, content_type=kind)


def with_chunks(body: bytes) -> Callable[[bytes, str], HangUp]:
    """A body in chunks that are wrong."""
    return lambda payload, kind: HangUp(unended(b"", kind) + body)


def refusing(status: int, repeated: bool, **headers: str) -> Fault:
    body = {"detail": "no"}
    outcome = Outcome(ServiceUnavailableError, status, repeated)
    return Fault(lambda payload, kind: answer(body, status, **headers), outcome)


HOUR_AGO, IN_AN_HOUR = (email.utils.formatdate(time.time() + s, usegmt=True) for s in (-3600, 3600))
OK = b"HTTP/1.1 200 OK\r\n"
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
FAULTS = {
    "hang-up-before-the-answer": Fault(lambda p, k: HangUp(), LOST_ANSWER),
    "reset-before-the-answer": Fault(lambda p, k: HangUp(reset=True), LOST_ANSWER),
    "hang-up-in-the-status-line": Fault(lambda p, k: HangUp(whole(p, k)[:10]), LOST_ANSWER),
    "reset-in-the-status-line": Fault(lambda p, k: HangUp(whole(p, k)[:10], reset=True), LOST_ANSWER),
    "hang-up-in-a-header": Fault(lambda p, k: HangUp(whole(p, k)[:40]), LOST_ANSWER),
    "hang-up-between-headers": Fault(lambda p, k: HangUp(whole(p, k).partition(b"Content-Type")[0]),
        LOST_ANSWER),
    "hang-up-before-the-blank-line": Fault(lambda p, k: HangUp(whole(b"", k)[:-2]), LOST_ANSWER),
    "reset-in-the-headers": Fault(lambda p, k: HangUp(whole(p, k)[:40], reset=True), LOST_ANSWER),
    "hang-up-before-the-body": Fault(lambda p, k: HangUp(whole(p, k)[: -len(p)]), LOST_ANSWER),
    "hang-up-in-the-body": Fault(lambda p, k: HangUp(whole(p, k)[: -len(p) // 2]), LOST_ANSWER),
    "body-one-byte-short": Fault(lambda p, k: HangUp(whole(p, k)[:-1]), LOST_ANSWER),
    "reset-in-the-body": Fault(lambda p, k: HangUp(whole(p, k)[: -len(p) // 2], reset=True), LOST_ANSWER),
    "hang-up-between-chunks": Fault(lambda p, k: HangUp(unended(p[:9], k)), LOST_ANSWER),
    "hang-up-in-a-chunk": Fault(lambda p, k: HangUp(unended(p, k)[:-9]), LOST_ANSWER),
    "reset-in-a-chunk": Fault(lambda p, k: HangUp(unended(p, k)[:-9], True), LOST_ANSWER),
    # Events have said that they are done.
    "no-last-chunk": Fault(lambda p, k: HangUp(unended(p, k)), LOST_ANSWER, {"events": FINE}),
    "chunk-size-negative": Fault(with_chunks(b"-5\r\nhello\r\n0\r\n\r\n"), LOST_ANSWER),
    "chunk-size-not-hex": Fault(with_chunks(b"xyz\r\nhello\r\n0\r\n\r\n"), LOST_ANSWER),
    "chunk-size-empty": Fault(with_chunks(b"\r\nhello\r\n0\r\n\r\n"), LOST_ANSWER),
    "chunk-size-too-small": Fault(with_chunks(b"2\r\nhello\r\n0\r\n\r\n"), LOST_ANSWER),
    "chunk-size-too-large": Fault(with_chunks(b"fffffff\r\nhello\r\n0\r\n\r\n"), LOST_ANSWER),
    "chunk-size-beyond-64-bits": Fault(with_chunks(b"f" * 17 + b"\r\nhello\r\n0\r\n\r\n"), LOST_ANSWER),
    "chunk-size-cut": Fault(with_chunks(b"5\r\nhello\r\n0"), LOST_ANSWER),
    "chunk-line-endless": Fault(lambda p, k: endless(unended(b"", k) + b"5;", b"x" * 65536), LOST_ANSWER),
    "status-line-garbage": Fault(lambda p, k: HangUp(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), LOST_ANSWER),
    "status-line-without-number": Fault(lambda p, k: HangUp(b"HTTP/1.1 OK\r\n\r\n"), LOST_ANSWER),
    "status-line-endless": Fault(lambda p, k: endless(b"", b"H" * 65536), LOST_ANSWER),
    "headers-endless": Fault(lambda p, k: endless(OK, b"X-Filler: 1\r\n" * 1000), LOST_ANSWER),
    "header-endless": Fault(lambda p, k: endless(OK + b"X: ", b"x" * 65536), LOST_ANSWER),
    "length-negative": Fault(lambda p, k: HangUp(OK + b"Content-Length: -1\r\n\r\n" + p), LOST_ANSWER),
    "length-not-a-number": Fault(lambda p, k: HangUp(OK + b"Content-Length: 1x\r\n\r\n" + p), LOST_ANSWER),
    "length-of-5000-digits": Fault(
        lambda p, k: HangUp(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + p), LOST_ANSWER),
    "http-1.0": Fault(lambda p, k: HangUp(whole(p, k).replace(b"/1.1", b"/1.0")), FINE),
    "http-1.0-without-length": Fault(lambda p, k: unframed(p, k, "1.0"), FINE,
        {"object": UNUSABLE}),
    "http-1.1-without-length": Fault(lambda p, k: unframed(p, k), FINE, {"object": UNUSABLE}),
    "chunks": Fault(lambda p, k: chunked(p[:7], p[7:], content_type=k), FINE),
    "connection-close": Fault(lambda p, k: HangUp(answer(body=p, Content_Type=k,
        Connection="close")), FINE),
    "100-first": Fault(lambda p, k: b"HTTP/1.1 100 Continue\r\n\r\n" + whole(p, k), FINE),
    "103-first": Fault(lambda p, k: EARLY + whole(p, k), FINE),
    "many-interim-answers-first": Fault(lambda p, k: EARLY * 50 + whole(p, k), FINE),
    "interim-answers-without-end": Fault(lambda p, k: endless(b"", EARLY * 1000), LOST_ANSWER),
    "interim-answer-only": Fault(lambda p, k: HangUp(EARLY), LOST_ANSWER),
    "204": Fault(
        lambda p, k: b"HTTP/1.1 204 No Content\r\n\r\n", Outcome(GatewayError, 204),
            {"nothing": FINE}),
    "bytewise": Fault(bytewise, FINE),
    "answer-to-nothing-behind-it": Fault(lambda p, k: whole(p, k) + whole(b"!", k, 500), FINE),
    "silence-before-the-answer": Fault(lambda p, k: Pause(), TIMED_OUT, timeout=SHORT_SECONDS),
    "silence-in-the-body": Fault(
        lambda p, k: Pause(whole(p, k)[: -len(p) // 2]), TIMED_OUT, timeout=SHORT_SECONDS),
    "429": Fault(lambda p, k: answer({"detail": "no"}, 429, Retry_After="0"),
                 Outcome(QuotaExceededError, 429), {"storage": Outcome(GatewayError, 429)}),
    "500": refusing(500, repeated=False),
    "502": refusing(502, repeated=True),
    "503": refusing(503, repeated=True),
    "504": refusing(504, repeated=True),
    "503-and-hang-up": Fault(
        lambda p, k: HangUp(answer(status=503, body=b"busy")[:-2]),
            Outcome(ServiceUnavailableError, 503, True)),
    "503-retry-now": refusing(503, repeated=True, Retry_After="0"),
    "503-retry-since-an-hour": refusing(503, repeated=True, Retry_After=HOUR_AGO),
    "503-retry-after-61": refusing(503, repeated=False, Retry_After="61"),
    "503-retry-in-an-hour": refusing(503, repeated=False, Retry_After=IN_AN_HOUR),
    "503-retry-after-nonsense": refusing(503, repeated=True, Retry_After="soon, \xe4h"),
}
CELLS = [pytest.param(operation, fault, once, id=f"{name}-{label}-{'once' if once else 'always'}")
         for name, operation in OPERATIONS.items() for label, fault in FAULTS.items()
                 for once in (True, False)
         if once or fault.outcome not in (FINE, TIMED_OUT)]


@pytest.mark.parametrize(("operation", "fault", "once"), CELLS)
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
    with nothing_left(tmp_path), Routed(choose) as server, client_of(server,
            timeout=fault.timeout) as client:
        if once:
            client.list_prefabs("warm")  # the fault meets a connection that is used again
        requests = operation.count
        if outcome and outcome.repeated and operation.repeatable:
            requests += 1 if once else 2
            outcome = FINE if once else outcome
        if outcome:
            with pytest.raises(GatewayError) as caught:
                operation.call(client, tmp_path)
            assert type(caught.value) is outcome.error
            assert outcome.status in (..., caught.value.status_code)
        else:
            assert operation.call(client, tmp_path) == operation.gives
        assert len(requests_to(server, operation)) == requests
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.bin"]
        faults = iter(())
        assert operation.call(client, tmp_path) == operation.gives


@pytest.mark.parametrize(("name", "where"), [
    *((name, "refused") for name in OPERATIONS),
    *((name, "no-such-host") for name in ("list_prefabs", "run", "upload_input_file-put")),
])
def test_no_connection_is_a_service_unavailable_error(name: str, where: str,
        tmp_path: Path) -> None:
    operation = OPERATIONS[name]
    (tmp_path / "in.bin").write_bytes(b"x")
    with socket.socket() as bound:  # but not listening
        bound.bind(("127.0.0.1", 0))
        nowhere = {"refused": f"http://127.0.0.1:{bound.getsockname()[1]}",
            "no-such-host": "http://a.invalid"}[where]
        with nothing_left(tmp_path), Routed(lambda request: whole(*good(request,
                nowhere))) as server:
            with GatewayClient(server.url if operation.storage else nowhere,
                    internal_token=TOKEN) as client:
                with pytest.raises(ServiceUnavailableError, match="no connection to") as caught:
                    operation.call(client, tmp_path)
    assert type(caught.value) is ServiceUnavailableError
    assert caught.value.status_code is None
    assert TOKEN not in str(caught.value)


@each_operation
def test_without_a_connection_every_request_is_repeated(
    operation: Operation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture
) -> None:
    """The proxy refuses, until the first line of the log says that it did."""

    class WayOpener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            os.environ["http_proxy"] = ""

    logger, handler = logging.getLogger("gateway_sdk"), WayOpener()
    caplog.set_level(logging.DEBUG, "gateway_sdk")
    (tmp_path / "in.bin").write_bytes(b"x")
    with socket.socket() as bound, Routed(lambda request: whole(*good(request,
            server.url))) as server:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{bound.getsockname()[1]}")
        logger.addHandler(handler)
        try:
            with client_of(server) as client:
                assert operation.call(client, tmp_path) == operation.gives
        finally:
            logger.removeHandler(handler)
        assert len(requests_to(server, operation)) == operation.count


@each_operation
def test_a_server_that_hangs_up_unread_may_have_run_it_all_the_same(operation: Operation,
        tmp_path: Path) -> None:
    (tmp_path / "in.bin").write_bytes(b"x")
    with nothing_left(tmp_path), Raw(lambda sock: None) as nobody, client_of(nobody) as client:
        with Routed(lambda request: whole(*good(request, nobody.url))) as server:
            if operation.storage:
                client = client_of(server)
            with pytest.raises(ServiceUnavailableError) as caught:
                operation.call(client, tmp_path)
            client.close()
        assert type(caught.value) is ServiceUnavailableError
        assert nobody.connections == operation.count * (3 if operation.repeatable else 1)


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@each_operation
def test_a_connection_that_was_closed_while_idle_costs_no_call(
    operation: Operation, reset: bool, tmp_path: Path
) -> None:
    def choose(request: Received) -> Answer:
        text = whole(*good(request, server.url))
        return HangUp(text, reset) if request.target.endswith("=warm") else text

    (tmp_path / "in.bin").write_bytes(b"x")
    with nothing_left(tmp_path), Routed(choose) as server, client_of(server,
            max_retries=0) as client:
        if reset:  # must not overtake the answer
            server._choose = lambda request: Steps((
                lambda sock: sock.sendall(whole(*good(request, server.url))),
                lambda sock: server.wait_until(lambda: done),
                lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                    struct.pack("ii", 1, 0)),
                socket.socket.close))
        done: list[bool] = []
        client.list_prefabs("warm")
        with server._changed:
            done.append(True)
            server._changed.notify_all()
        for thread in server._threads[1:]:
            thread.join(WAIT_SECONDS)
        server._choose = choose
        assert operation.call(client, tmp_path) == operation.gives
        assert server.received[1].connection != server.received[0].connection
        assert len(requests_to(server, operation)) == operation.count


def test_a_retry_opens_a_fresh_connection_though_another_one_is_idle() -> None:
    together = threading.Barrier(2)
    first = Steps((lambda sock: together.wait(WAIT_SECONDS), lambda sock: sock.sendall(ran("ok"))))
    with Script(first, first, HangUp(), answer([])) as server, client_of(server) as client:
        client.run_batch([PrefabCall("p", "1", "f")] * 2)
        assert client.list_prefabs() == []
        assert [request.connection for request in server.received[2:]][1] == 2


@pytest.mark.parametrize("name", ["run", "run-stream", "download_file"])
def test_an_answer_that_trickles_may_take_longer_than_the_timeout(name: str,
        tmp_path: Path) -> None:
    def trickle(sock: socket.socket, text: bytes) -> None:
        for start in range(5):
            sock.sendall(text[start * len(text) // 5 : (start + 1) * len(text) // 5])
            never.wait(0.12)

    never, operation = threading.Event(), OPERATIONS[name]

    def choose(request: Received) -> Answer:
        text = whole(*good(request, slow.url))
        return Steps((lambda sock: trickle(sock, text),)) if requests_to(slow, operation) else text

    slow = Routed(choose)
    with slow, client_of(slow, timeout=0.45) as client:
        assert operation.call(client, tmp_path) == operation.gives


def test_retry_after_is_waited_for() -> None:
    times: list[float] = []

    def choose(request: Received) -> Answer:
        times.append(time.monotonic())
        return answer(status=503, Retry_After="1") if len(times) == 1 else answer([])

    with Routed(choose) as server, client_of(server) as client:
        assert client.list_prefabs() == []
    assert len(times) == 2
    assert times[1] - times[0] >= 1


@pytest.mark.parametrize("kept_open", [False, True], ids=["hang-up", "kept-open-unread"])
@pytest.mark.parametrize("name", ["upload_file", "upload_input_file"])
def test_an_early_413_is_reported_rather_than_the_broken_upload(
    name: str, kept_open: bool, tmp_path: Path
) -> None:
    heads: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        head = read_head(sock)[0]
        heads.append(head)
        if b"generate_upload_url" in head:
            sock.sendall(answer({"upload_url": f"{server.url}/storage/in?sig=x",
                "s3_url": "s3://b/in"}))
        else:
            sock.sendall(answer({"detail": "larger than 1 MB"}, 413))
            if kept_open:
                ended.wait(WAIT_SECONDS)

    ended = threading.Event()
    with open(tmp_path / "in.bin", "wb") as file:
        file.truncate(64 * 2**20)
    with nothing_left(tmp_path), Raw(serve) as server, client_of(server,
            timeout=SHORT_SECONDS) as client:
        with pytest.raises(GatewayError, match="413.*larger than 1 MB") as caught:
            getattr(client, name)(tmp_path / "in.bin")
        ended.set()
    assert type(caught.value) is GatewayError
    assert caught.value.status_code == 413
    assert len(heads) == (1 if name == "upload_file" else 2)


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


# --- Faults: answers that are not what they should be ---------------------------------------------

NOT_JSON = {
    "empty": b"", "blank": b" \r\n", "truncated": b'{"results": [', "html": b"<html>502</html>",
    "not-utf-8": b'{"a": "\xff"}', "utf-16": '{"a": 1}'.encode("utf-16"), "nan": b'{"a": NaN}',
    "infinity": b"[-Infinity]", "two-values": b"{} {}", "deep-lists": b"[" * 100_000,
    "deep-lists-closed": b"[" * 100_000 + b"]" * 100_000, "deep-objects": b'{"a":' * 100_000,
    "long-number": b"9" * 10_000 + b"x", "null": b"null", "text": b'"text"', "number": b"3",
        "true": b"true",
}
JSON_READERS = [name for name, operation in OPERATIONS.items() if operation.reads == "json"]
WRONG_FIELDS = {
    "list_prefabs": ["{}", '["\\ud800"]', '{"prefabs": []}', "[1]", "[null]",
        '[{"id": "p", "version": "1", "x": -Infinity}]', "[[]]", "[{}]", '[{"id": "p"}]',
            '[{"version": "1"}]',
                     '[{"id": 1, "version": "1"}]', '[{"id": "p", "version": null}]',
                         '[{"id": "p", "version": 1}]',
                     '[{"id": "p", "version": ["1"]}]'],
    "run": ["[]", "{}", '{"results": null}', '{"results": {}}', '{"results": []}',
        '{"results": [1]}',
            '{"results": [null]}', '{"results": [{"status": "SUCCESS", "output": NaN}]}',
                '{"results": [[]]}', '{"results": [{}, {}]}', '{"results": "ab"}'],
    "upload_input_file-url": ["[]", "{}", '{"upload_url": "http://h/"}',
        '{"upload_url": 1, "s3_url": "s3://b/k"}',
                              '{"upload_url": "", "s3_url": "s3://b/k"}',
                              '{"upload_url": "ftp://h/", "s3_url": "s3://b/k"}',
                              '{"upload_url": "http://[h/", "s3_url": "s3://b/k"}',
                              '{"upload_url": "http://h:99999/", "s3_url": "s3://b/k"}',
                              '{"upload_url": "/relative", "s3_url": "s3://b/k"}',
                              '{"upload_url": "http://h\\u0000/", "s3_url": "s3://b/k"}',
                              '{"upload_url": "http://h/", "s3_url": null}'],
    "upload_file": ["[]", "{}", '{"s3_url": null}', '{"s3_url": "s3://b/k", "size": Infinity}',
        '{"s3_url": ["s3://b/k"]}'],
    "get_presigned_url": ["[]", "{}", '{"presigned_url": null}',
        '{"presigned_url": {"url": "http://h/"}}'],
    "cleanup_temp_files": ["[]", "{}", '{"deleted_count": null}', '{"deleted_count": "3"}',
        '{"deleted_count": 1.5}'],
}
WRONG_FIELDS["run_batch"] = WRONG_FIELDS["run"]
WRONG_BODIES = [pytest.param(name, body, id=f"{name}-{label}") for name in JSON_READERS
                for label, body in NOT_JSON.items()]
WRONG_BODIES += [pytest.param(name, body.encode(), id=f"{name}-{body}") for name in JSON_READERS
                 for body in WRONG_FIELDS[name]]


@pytest.mark.parametrize(("name", "body"), WRONG_BODIES)
def test_an_answer_that_is_not_as_promised_is_a_plain_gateway_error(name: str, body: bytes,
        tmp_path: Path) -> None:
    operation = OPERATIONS[name]
    (tmp_path / "in.bin").write_bytes(b"x")
    with nothing_left(tmp_path), Routed(lambda request: answer(body=body)) as server, client_of(
            server) as client:
        with pytest.raises(GatewayError) as caught:
            operation.call(client, tmp_path)
        assert len(server.received) == operation.count
        assert server.connections <= operation.count
    assert type(caught.value) is GatewayError
    assert len(str(caught.value)) < 2000
    assert TOKEN not in repr(caught.value.details)


def test_a_version_that_cannot_be_part_of_a_url_is_a_gateway_error() -> None:
    with Script(answer([{"id": "p", "version": "\ud800"}])) as server, client_of(server) as client:
        with pytest.raises(GatewayError):
            client.get_prefab_spec("p")


@pytest.mark.parametrize("stream", [False, True], ids=["result", "stream"])
@pytest.mark.parametrize("body", [*NOT_JSON.values(), *map(str.encode, WRONG_FIELDS["run"])], ids=[
    *NOT_JSON, *WRONG_FIELDS["run"]])
def test_a_streaming_run_is_as_strict_about_plain_json(body: bytes, stream: bool) -> None:
    with Script(answer(body=body), ran("ok")) as server, client_of(server) as client:
        with pytest.raises(GatewayError) as caught:
            client.run("p", "1", "f", stream=stream)
        assert type(caught.value) is GatewayError
        assert client.run("p", "1", "f").get_function_result() == "ok"
        assert server.connections == 1


ERROR_BODIES = {
    **NOT_JSON, "no-detail": b"{}", "null-detail": b'{"detail": null}',
        "number-detail": b'{"detail": 3}',
    "empty-list": b'{"detail": []}', "list-of-numbers": b'{"detail": [1, null, []]}',
    "wrong-loc": b'{"detail": [{"loc": 3, "msg": null}, {"loc": [["a"], {}, null]}]}',
    "wrong-message": b'{"detail": {"message": ["a"], "error_code": ["b"], "details": [1]}}',
    "wrong-code": b'{"error_code": {"a": 1}, "message": 3, "details": "x"}',
    "wrong-fields":
        b'{"detail": {"limit": "x", "used": [], "quota_type": 3, "prefab_id": {}, "x": 1}}',
    "surrogate": b'{"detail": "\\ud800"}',
        "braces": b'{"detail": {"prefab_id": "{0}{x!r}", "message": "%s {}"}}',
}
STATUS_CLASSES = {400: GatewayError, 401: AuthenticationError, 403: AuthenticationError,
    404: PrefabNotFoundError,
                  409: GatewayError, 422: ValidationError, 429: QuotaExceededError,
                      500: ServiceUnavailableError,
                  501: ServiceUnavailableError, 599: ServiceUnavailableError}


@pytest.mark.parametrize("body", ERROR_BODIES.values(), ids=ERROR_BODIES)
def test_the_status_decides_whatever_the_body_of_an_error_looks_like(body: bytes) -> None:
    with Script(*(answer(status=status, body=body) for status in STATUS_CLASSES)) as server:
        with client_of(server) as client:
            for status, error_class in STATUS_CLASSES.items():
                with pytest.raises(GatewayError) as caught:
                    client.run("p", "1", "f")
                assert (type(caught.value), caught.value.status_code) == (error_class, status)
                assert str(status) in str(caught.value)
        if len(body) < 50_000:  # a long one is not worth reading to its end
            assert server.connections == 1


def test_json_at_any_depth_gives_a_result_or_a_gateway_error() -> None:
    """Also where reading it just works, but writing it into the error's message would not."""

    def readable(depth: int) -> bool:
        try:
            json.loads("[" * depth + "]" * depth)
        except RecursionError:
            return False
        return True

    low, high = 1, 200_000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if readable(middle) else (low, middle)
    shapes = ('{"results": [%s]}', '{"results": [{"status": "FAILED", "error": %s}]}', "[%s]",
        "[{}, {}, %s]",
              '[{"id": "p", "x": %s}]',
                  '{"results": [{"status": "SUCCESS", "output": %s}], "job_id": []}')
    bodies = [shape % ("[" * depth + "]" * depth) for shape in shapes
        for depth in range(low - 60, low + 5, 2)]
    given = iter(bodies * 3)

    def choose(request: Received) -> Answer:
        text = next(given).encode()
        return answer(body=text, status=422 if request.target.endswith("/spec") else 200)

    with Routed(choose) as server, client_of(server) as client:
        calls = (lambda: client.run("p", "1", "f"), client.list_prefabs,
            lambda: client.get_prefab_spec("p", "1"))
        for call in calls:
            for _ in bodies:
                with contextlib.suppress(GatewayError):
                    call()


# --- Faults: transfers ----------------------------------------------------------------------------

NEW_OBJECT = OBJECT[::-1] + b"new"
SHORT_OBJECT = OBJECT[:500]
SIZE = len(OBJECT)


def stored(request: Received, content: bytes = OBJECT, etag: str | None = '"1"',
        cut: int | None = None, *,
           ranges: bool = True, if_range: bool = True, framed: str = "length",
               **wrong: Any) -> Answer:
    """A storage's answer to a GET; `cut` is the place in the object where it hangs up."""
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
    text = chunked(payload[:left], end=cut is None)
    head = answer(status=status, body=b"", **headers).replace(b"Content-Length: 0\r\n", b"")[:-2]
    text = head + text.partition(b"\r\n")[2]
    return text if left is None else HangUp(text)


class Transfer(NamedTuple):
    """Answers to the GETs of a download, and where each has to start (`If-Range`: first ETag)."""

    answers: list[dict[str, Any]]
    starts: list[int | tuple[int, str] | None]  # None: without a Range; or with another ETag
    content: bytes | None = OBJECT  # None: it fails


TRANSFERS = {
    "one-cut": Transfer([{"cut": 1000}, {}], [None, 1000]),
    "two-cuts": Transfer([{"cut": 1000}, {"cut": 5000}, {}], [None, 1000, 5000]),
    "cut-at-once-then-again": Transfer([{"cut": 1}, {"cut": 1}, {}], [None, 1, 1]),
    "cut-before-the-last-byte": Transfer([{"cut": SIZE - 1}, {}], [None, SIZE - 1]),
    "cut-behind-the-last-byte": Transfer([{"cut": SIZE}], [None]),
    "last-chunk-missing": Transfer([{"cut": SIZE, "framed": "chunks"}, {}, {}], [None, SIZE, None]),
    "chunks": Transfer([{"framed": "chunks"}], [None]),
    "chunks-cut": Transfer(
        [{"framed": "chunks", "cut": 1000}, {"framed": "chunks", "cut": 5000}, {}],
            [None, 1000, 5000]),
    "more-cuts-than-retries": Transfer(
        [{"cut": 1000}, {"cut": 2000}, {"cut": 3000}], [None, 1000, 2000], None),
    "other-etag-200": Transfer(
        [{"cut": 1000}, {"content": NEW_OBJECT, "etag": '"2"'}], [None, 1000], NEW_OBJECT),
    "other-etag-206": Transfer(
        [{"cut": 1000}, *[{"content": NEW_OBJECT, "etag": '"2"', "if_range": False}] * 2],
        [None, 1000, None], NEW_OBJECT),
    "no-etag-206": Transfer(
        [{"cut": 1000}, *[{"content": NEW_OBJECT, "etag": None, "if_range": False}] * 2],
        [None, 1000, None], NEW_OBJECT),
    "other-etag-cut-too": Transfer(
        [{"cut": 1000}, {"content": NEW_OBJECT, "etag": '"2"', "cut": 700},
         {"content": NEW_OBJECT, "etag": '"2"'}], [None, 1000, (700, '"2"')], NEW_OBJECT),
    "shrunk-416": Transfer(
        [{"cut": 1000}, *[{"content": SHORT_OBJECT, "etag": '"2"', "if_range": False}] * 2],
        [None, 1000, None], SHORT_OBJECT),
    "shrunk-200": Transfer(
        [{"cut": 1000}, {"content": SHORT_OBJECT, "etag": '"2"'}], [None, 1000], SHORT_OBJECT),
    "emptied-200": Transfer([{"cut": 1000}, {"content": b"", "etag": '"2"'}], [None, 1000], b""),
    "range-ignored": Transfer([{"cut": 1000}, {"ranges": False}], [None, 1000]),
    "no-etag": Transfer([{"cut": 1000, "etag": None}, {"etag": None}], [None, None]),
    "weak-etag": Transfer([{"cut": 1000, "etag": 'W/"1"'}, {"etag": 'W/"1"'}], [None, None]),
    "span-elsewhere": Transfer([{"cut": 1000}, {"span": "bytes 5-10239/10240"}, {}],
        [None, 1000, None]),
    "span-missing": Transfer([{"cut": 1000}, {"span": ""}, {}], [None, 1000, None]),
    "span-garbage": Transfer([{"cut": 1000}, {"span": "bytes x-y/z"}, {}], [None, 1000, None]),
    "span-of-5000-digits": Transfer(
        [{"cut": 1000}, {"span": f"bytes {'9' * 5000}-/*"}, {}], [None, 1000, None]),
    "neither-length-nor-chunks": Transfer([{"framed": "close"}], [None], None),
    "empty": Transfer([{"content": b""}], [None], b""),
}


def transferred(answers: list[dict[str, Any]], target: Path) -> tuple[list[Received],
        GatewayError | None]:
    """A download from a storage that gives these answers: its GETs, and the error."""
    given = iter(answers)

    def choose(request: Received) -> Answer:
        if request.target.startswith("/internal/"):
            return answer({"presigned_url": f"{server.url}/storage/out?signature=x"})
        options = next(given)
        if options.get("framed") == "close":
            return unframed(OBJECT, "application/octet-stream")
        return stored(request, **options)

    error = None
    with Routed(choose) as server, client_of(server) as client:
        try:
            client.download_file("s3://b/out", target)
        except GatewayError as caught:
            error = caught
    assert next(given, None) is None, "fewer requests than answers"
    return server.received[1:], error


@pytest.mark.parametrize("transfer", TRANSFERS.values(), ids=TRANSFERS)
def test_a_download_goes_on_where_it_broke_or_starts_over(transfer: Transfer,
        tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with nothing_left(tmp_path):
        requests, error = transferred(transfer.answers, target)
    asked = [(request.headers.get("range"), request.headers.get("if-range"))
        for request in requests]
    expected = [start if isinstance(start, tuple) else (start, '"1"') for start in transfer.starts]
    assert asked == [(None, None) if start is None else (f"bytes={start}-", etag) for start,
        etag in expected]
    assert (error is None) == (transfer.content is not None)
    assert target.read_bytes() == (b"old" if transfer.content is None else transfer.content)


@pytest.mark.parametrize(("end", "span"), [
    (9000, "bytes 1000-8999/10240"), (9000, "bytes 1000-8999/*"), (9000, "bytes 1000-10239/10240"),
], ids=["said", "said-without-total", "not-said"])
def test_a_range_answered_in_part_is_never_taken_for_the_whole(end: int, span: str,
        tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    given = iter([{"cut": 1000}, {"end": end, "span": span}])

    def choose(request: Received) -> Answer:
        if request.target.startswith("/internal/"):
            return answer({"presigned_url": f"{server.url}/storage/out"})
        return stored(request, **next(given, {}))

    with Routed(choose) as server, client_of(server) as client, contextlib.suppress(GatewayError):
        client.download_file("s3://b/out", target)
    assert target.read_bytes() in (b"old", OBJECT)


@pytest.mark.parametrize("seed", range(6))
def test_a_download_in_pieces_is_the_object_byte_for_byte(seed: int, tmp_path: Path) -> None:
    chance = random.Random(FUZZ_SEED + seed)
    content = chance.randbytes(300_000) if hasattr(chance, "randbytes") else bytes(
        chance.getrandbits(8) for _ in range(300_000))
    cuts = sorted(chance.sample(range(1, len(content)), 5))

    def choose(request: Received) -> Answer:
        if request.target.startswith("/internal/"):
            return answer({"presigned_url": f"{server.url}/storage/out"})
        framed = chance.choice(["length", "chunks"])
        return stored(request, content, '"1"', cuts.pop(0) if cuts else None, framed=framed)

    progress: list[tuple[int, int | None]] = []
    with nothing_left(), Routed(choose) as server, client_of(server, max_retries=5) as client:
        client.download_file("s3://b/out", tmp_path / "out.bin",
            on_progress=lambda *p: progress.append(p))
        assert len(server.received) == 7
    assert (tmp_path / "out.bin").read_bytes() == content
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert progress[0][0] == 0
    assert progress[-1][0] == len(content)


CHILD = "import sys; from gateway_sdk import GatewayClient; client = GatewayClient(sys.argv[1])\n"


def start_child(code: str, *arguments: Any) -> subprocess.Popen[bytes]:
    folder = os.path.dirname(gateway_sdk.__file__)
    environment = {**os.environ, "PYTHONPATH": folder}
    return subprocess.Popen([sys.executable, "-c", CHILD + code, *map(str, arguments)],
                            stdout=subprocess.PIPE, env=environment)


def test_a_process_that_is_killed_in_a_download_leaves_the_old_file(tmp_path: Path) -> None:
    def choose(request: Received) -> Answer:
        if request.target.startswith("/internal/"):
            return answer({"presigned_url": f"{server.url}/storage/out"})
        return Pause(answer(body=OBJECT)[:-1])

    code = (
        "def show(done, total): done and print(done, flush=True)\n"
        "client.download_file('s3://b/out', sys.argv[2], on_progress=show)"
    )
    (tmp_path / "out.bin").write_bytes(b"old")
    with Routed(choose) as server, start_child(code, server.url, tmp_path / "out.bin") as child:
        assert child.stdout
        assert child.stdout.readline().strip().isdigit()
        child.kill()
        child.wait(WAIT_SECONDS)
    assert (tmp_path / "out.bin").read_bytes() == b"old"


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


@pytest.mark.skipif(not os.path.exists("/proc/self/status"),
    reason="reads the peak of the memory there")
@pytest.mark.parametrize("call", ["upload_input_file(sys.argv[2])", "upload_file(sys.argv[2])",
                                  "download_file('s3://b/out', sys.argv[2] + '.new')"])
def test_a_large_file_takes_little_memory(call: str, tmp_path: Path) -> None:
    size = LARGE_MIB * 2**20
    moved: list[int] = []

    def serve(sock: socket.socket) -> None:
        while True:
            try:
                head, body = read_head(sock)
            except ConnectionError:
                return
            if head.startswith(b"GET /storage"):
                sock.sendall(answer(body=b"", ETag='"1"').replace(b"Length: 0",
                    b"Length: %d" % size))
                block = bytes(2**20)
                for _ in range(LARGE_MIB):
                    sock.sendall(block)
                moved.append(size)
                continue
            length = length_in(head) if head.startswith(b"P") else 0
            receive(sock, length - len(body))
            moved.append(length)
            sock.sendall(answer({"upload_url": f"{server.url}/storage/in", "s3_url": "s3://b/k",
                "version": "1",
                                 "presigned_url": f"{server.url}/storage/out"}))

    # The peak of VmHWM, as that of `ru_maxrss` has the parent's in it.
    code = (
        "client.get_prefab_spec('p', '1')\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "import mimetypes, selectors, uuid; mimetypes.init()\n"
        f"before = peak(); client.{call}; print(peak() - before)"
    )
    with open(tmp_path / "large.bin", "wb") as file:
        file.truncate(size)
    with Raw(serve) as server, start_child(code, server.url, tmp_path / "large.bin") as child:
        output = child.communicate()[0]
    assert child.returncode == 0
    assert max(moved) >= size
    assert int(output) < (64 if sys.implementation.name == "pypy" else 16) * 1024  # it collects late
    if "download" in call:
        assert os.path.getsize(tmp_path / "large.bin.new") == size
        os.unlink(tmp_path / "large.bin.new")


@pytest.mark.parametrize("reset", [False, True], ids=["hang-up", "reset"])
@pytest.mark.parametrize("name", ["upload_input_file", "upload_file"])
def test_a_broken_upload_is_sent_again_from_its_start_or_not_at_all(
    name: str, reset: bool, tmp_path: Path
) -> None:
    content = bytes(random.Random(FUZZ_SEED).getrandbits(8) for _ in range(2**16)) * 64
    uploads: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        head, body = read_head(sock)
        if b"generate_upload_url" in head:
            sock.sendall(answer({"upload_url": f"{server.url}/storage/in?sig=x",
                "s3_url": "s3://b/in"}))
        elif uploads:
            uploads.append(body + receive(sock, length_in(head) - len(body), keep=True))
            sock.sendall(answer({}))
        else:
            uploads.append(body + receive(sock, 100_000, keep=True))
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    (tmp_path / "in.bin").write_bytes(content)
    progress: list[tuple[int, int | None]] = []
    with nothing_left(tmp_path), Raw(serve) as server, client_of(server) as client:
        upload = functools.partial(getattr(client, name), tmp_path / "in.bin",
                                   on_progress=lambda *p: progress.append(p))
        if name == "upload_file":
            with pytest.raises(ServiceUnavailableError):
                upload()
        else:
            assert upload() == "s3://b/in"
    assert uploads[1:] == ([] if name == "upload_file" else [content])
    if name == "upload_input_file":
        assert (progress[0], progress[-1]) == ((0, len(content)), (len(content), len(content)))


@pytest.mark.parametrize("name", ["upload_input_file", "upload_file"])
def test_a_file_that_shrinks_while_it_is_sent_is_an_error_and_never_sent_again(name: str,
        tmp_path: Path) -> None:
    path = tmp_path / "in.bin"
    path.write_bytes(b"x" * 300_000)
    with nothing_left(tmp_path), Routed(lambda r: whole(*good(r, server.url))) as server:
        with client_of(server) as client:
            with pytest.raises(GatewayError, match="shorter") as caught:
                getattr(client, name)(path,
                    on_progress=lambda done, total: done or os.truncate(path, 1000))
            path.write_bytes(b"x" * 300_000)
            getattr(client, name)(path)
    assert type(caught.value) is GatewayError
    uploads = [r for r in server.received if int(r.headers["content-length"]) >= 300_000]
    assert sorted(b"\0" in upload.body for upload in uploads) == [False,
        True]  # what did not come is padded


@pytest.mark.parametrize("name", ["upload_input_file", "upload_file"])
def test_of_a_file_that_grows_while_it_is_sent_goes_what_was_announced(name: str,
        tmp_path: Path) -> None:
    def grow(done: int, _: int | None) -> None:
        with open(path, "ab") as file:
            file.write(b"y" * 1000)

    path = tmp_path / "in.bin"
    path.write_bytes(b"x" * 300_000)
    with Routed(lambda r: whole(*good(r, server.url))) as server, client_of(server) as client:
        getattr(client, name)(path, on_progress=grow)
        assert client.cleanup_temp_files("s") == 3  # the connection has nothing left over in it
    (upload,) = [r for r in server.received if len(r.body) >= 300_000]
    assert upload.body.count(b"x" * 300_000) == 1
    assert b"yyy" not in upload.body


# --- Faults: the format of event streams ----------------------------------------------------------


def parsed(*chunks: bytes) -> list[tuple[str, Any]]:
    return [(str(event.type), event.data) for event in gateway_sdk._parse_events(iter(chunks))]


def content(*values: Any) -> list[tuple[str, Any]]:
    return [("content", value) for value in values]


A, B = b'{"type": "content", "data": "a"}', b'{"type": "content", "data": "b"}'
FORMATS = {
    "lf": (b"data: %b\n\ndata: %b\n\n" % (A, B), content("a", "b")),
    "crlf": (b"data: %b\r\n\r\ndata: %b\r\n\r\n" % (A, B), content("a", "b")),
    "cr": (b"data: %b\r\rdata: %b\r\r" % (A, B), content("a", "b")),
    "lf-crlf": (b"data: %b\n\r\ndata: %b\r\n\n" % (A, B), content("a", "b")),
    "cr-crlf": (b"data: %b\r\r\ndata: %b\r\n\r" % (A, B), content("a", "b")),
    "crlf-then-lf": (b"data: one\r\n\ndata: two\r\n\n", content("one", "two")),
    "cr-lf-are-one-end": (b"data: 1\r\ndata: 2\r\n\r\n", content(1, 2)),
    "many-blank-lines": (b"\n\n\n\r\r\n\ndata: %b\n\n\n\n\n\ndata: %b\n\n" % (A, B),
        content("a", "b")),
    "no-space": (b"data:%b\n\n" % A, content("a")),
    "one-space-only-is-taken": (b"data:  text \n\n", content(" text ")),
    "tab-is-kept": (b"data:\ttext\n\n", content("\ttext")),
    "several-data-lines": (b'data: {"type": "content",\ndata: "data": "a"}\n\n', content("a")),
    "several-text-lines": (b"data: one\ndata: two\n\n", content("one\ntwo")),
    "empty-data-line-between": (b"data: one\ndata\ndata: two\n\n", content("one\n\ntwo")),
    "event-field": (b"event: progress\ndata: 5\n\n", [("progress", 5)]),
    "event-field-last-counts": (b"event: start\nevent: progress\ndata: 5\n\n", [("progress", 5)]),
    "event-field-does-not-last": (b"event: progress\ndata: 5\n\ndata: 6\n\n",
        [("progress", 5), ("content", 6)]),
    "event-field-unknown": (b"event: message\ndata: 5\n\n", content(5)),
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
    "nul": (b"data: a\0b\n\n", content("a\0b")),
    "no-data": (b"event: done\n\nid: 1\n\ndata:\n\ndata: %b\n\n" % A, content("a")),
    "blank-lines-left-out": (b"data: %b\ndata: %b\n" % (A, B), content("a", "b")),
    "blank-lines-left-out-crlf": (b"data: %b\r\ndata: %b\r\n\r\n" % (A, B), content("a", "b")),
    "one-line-not-json": (b"data: %b\ndata: b\n\n" % A, content(A.decode() + "\nb")),
    "done-marker": (b"data: %b\n\ndata: [DONE]\n\n" % A, [("content", "a"), ("done", "[DONE]")]),
    "not-json": (b"data: hello\n\n", content("hello")),
    "half-json": (b'data: {"type": "content", "da\n\n', content('{"type": "content", "da')),
    "json-with-a-tail": (b"data: %b tail\n\n" % A, content(A.decode() + " tail")),
    "json-with-white-space": (b"data: \t %b \t\n\n" % A, content("a")),
    "json-without-type": (b'data: {"text": "a"}\n\n', content({"text": "a"})),
    "json-not-an-object": (b'data: [1]\n\ndata: "s"\n\ndata: null\n\ndata: 0\n\n',
        content([1], "s", None, 0)),
    "type-not-text": (b'data: {"type": 3, "data": 4}\n\n', content({"type": 3, "data": 4})),
    "type-unknown": (b'data: {"type": "delta", "data": "a"}\n\n', content("a")),
    "types": (b"".join(map(event, ("start", "content", "progress", "error", "done"))),
              [(name, None) for name in ("start", "content", "progress", "error", "done")]),
    "events-after-done": (event("done") + event("content", 1), [("done", None), ("content", 1)]),
    "no-last-blank-line": (b"data: %b\n\ndata: %b\n" % (A, B), content("a", "b")),
    "no-last-line-end": (b"data: %b\n\ndata: %b" % (A, B), content("a", "b")),
    "too-deep": (b"data: " + b"[" * 5000 + b"\n\n", content("[" * 5000)),
    "long-number": (b"data: " + b"9" * 5000 + b"x\n\n", content("9" * 5000 + "x")),
    "empty": (b"", []),
    "only-line-ends": (b"\r\n\r\n\n\r", []),
}


@pytest.mark.parametrize(("stream", "expected"), FORMATS.values(), ids=FORMATS)
def test_the_event_stream_format_is_read_however_the_bytes_are_cut(stream: bytes,
        expected: Any) -> None:
    ends = [] if b"\r" in stream else [b"\r\n", b"\r"]
    for text in {stream, *(stream.replace(b"\n", end) for end in ends)}:
        assert parsed(text) == expected
        assert parsed(*(text[index : index + 1] for index in range(len(text)))) == expected
        for place in range(0, len(text), 1 + len(text) // 500):
            assert parsed(text[:place], b"", text[place:]) == expected


def test_an_unknown_type_stays_in_raw() -> None:
    (only,) = gateway_sdk._parse_events(
        [b'data: {"type": "delta", "data": 1, "metadata": {"n": 2}}\n\n'])
    assert only.type is StreamEventType.CONTENT
    assert only.raw == {"type": "delta", "data": 1, "metadata": {"n": 2}}


@pytest.mark.parametrize("blank", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\n\r", b"\r\n\r"])
def test_an_event_is_handed_over_with_its_blank_line(blank: bytes) -> None:
    taken: list[bytes] = []

    def chunks() -> Iterator[bytes]:
        for chunk in (b"data: 1", blank[:1], blank[1:], b"data: 2", blank):
            taken.append(chunk)
            yield chunk

    events = gateway_sdk._parse_events(chunks())
    assert next(events).data == 1
    assert len(taken) == 3
    assert next(events).data == 2
    assert len(taken) == 5
    assert list(events) == []


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_a_large_event_in_small_pieces_arrives_whole(end: bytes) -> None:
    text = "x" * 2**22
    stream = b"data: " + json.dumps({"type": "content", "data": text}).encode() + end
    assert parsed(*(stream[at : at + 1024] for at in range(0, len(stream), 1024))) == content(text)


def answered_stream(given: Answer, **options: Any) -> tuple[list[tuple[str, Any]],
        GatewayError | None]:
    """The events of a stream over a socket, and the error that it ended with."""
    events: list[tuple[str, Any]] = []
    with nothing_left(), Script(given) as server, client_of(server, **options) as client:
        try:
            with client.run("p", "1", "words", stream=True) as stream:
                for event in stream:
                    events.append((str(event.type), event.data))
        except GatewayError as error:
            return events, error
        finally:
            assert len(server.received) == 1
    return events, None


DONE, STREAM = ("done", None), "text/event-stream"
A_EVENT, HALF = b"data: %b\n\n" % A, b'data: {"type": "content", "data": "b'
SHORTLY = {"timeout": SHORT_SECONDS}
ENDS: dict[str, tuple[Answer, list[tuple[str, Any]], Any, dict[str, Any]]] = {
    "chunked-done": (chunked(A_EVENT, event("done")), [*content("a"), DONE], None, {}),
    "chunked-without-done": (chunked(A_EVENT), content("a"), None, {}),
    "chunked-without-last-blank-line": (chunked(A_EVENT[:-2]), content("a"), None, {}),
    "chunked-nothing": (chunked(), [], None, {}),
    "length-done": (whole(A_EVENT + event("done"), STREAM), [*content("a"), DONE], None, {}),
    "unframed-done": (unframed(A_EVENT + event("done"), STREAM), [*content("a"), DONE], None, {}),
    "unframed-done-marker": (
        unframed(A_EVENT + b"data: [DONE]\n\n", STREAM), [*content("a"), ("done", "[DONE]")], None,
            {}),
    "unframed-done-without-blank-line": (
        unframed(A_EVENT + event("done").strip(), STREAM), [*content("a"), DONE], None, {}),
    "unframed-error": (unframed(A_EVENT + event("error", "x"), STREAM),
        [*content("a"), ("error", "x")], None, {}),
    "unframed-without-done": (unframed(A_EVENT, STREAM), content("a"), ServiceUnavailableError, {}),
    "unframed-nothing": (unframed(b"", STREAM), [], ServiceUnavailableError, {}),
    "unframed-in-an-event": (unframed(A_EVENT + HALF, STREAM), content("a"),
        ServiceUnavailableError, {}),
    "error-is-yielded": (chunked(event("error", "x"), A_EVENT), [("error", "x"), *content("a")],
        None, {}),
    "events-after-done": (chunked(event("done"), A_EVENT), [DONE, *content("a")], None, {}),
    "cut": (HangUp(chunked(A_EVENT, end=False)), content("a"), ServiceUnavailableError, {}),
    "cut-in-an-event": (HangUp(chunked(A_EVENT, HALF, end=False)), content("a"),
        ServiceUnavailableError, {}),
    "cut-before-the-blank-line": (
        HangUp(chunked(A_EVENT, b"data: %b\n" % B, end=False)), content("a"),
            ServiceUnavailableError, {}),
    "cut-in-a-chunk": (HangUp(chunked(A_EVENT, HALF, end=False)[:-9]), content("a"),
        ServiceUnavailableError, {}),
    "bad-chunk": (
        HangUp(chunked(A_EVENT, end=False) + b"-1\r\n"), content("a"), ServiceUnavailableError, {}),
    "silence": (Pause(chunked(A_EVENT, end=False)), content("a"), GatewayTimeoutError, SHORTLY),
    "done-then-cut": (HangUp(chunked(A_EVENT, event("done"), end=False)), [*content("a"), DONE],
        None, {}),
    "done-then-silence": (Pause(chunked(A_EVENT, event("done"), end=False)), [*content("a"), DONE],
        None, SHORTLY),
    "done-then-silence-without-timeout": (
        Pause(chunked(A_EVENT, event("done"), end=False)), [*content("a"), DONE], None,
            {"timeout": None}),
    "error-then-cut": (HangUp(chunked(event("error", "x"), end=False)), [("error", "x")], None, {}),
    "done-cut-before-the-blank-line": (
        HangUp(chunked(A_EVENT, event("done")[:-1], end=False)), content("a"),
            ServiceUnavailableError, {}),
}


@pytest.mark.parametrize(("given", "events", "error", "options"), ENDS.values(), ids=ENDS)
def test_a_stream_never_just_ends_as_if_it_were_complete(
    given: Answer, events: list[Any], error: Any, options: dict[str, Any]
) -> None:
    got, raised = answered_stream(given, **options)
    assert got == events
    assert (raised and type(raised)) == error


QUICK_ENDS = {label: end for label, end in ENDS.items() if end[3] != {"timeout": None}}


@pytest.mark.parametrize(
    ("given", "events", "error", "options"), QUICK_ENDS.values(), ids=QUICK_ENDS)
def test_the_result_of_a_stream_is_as_strict_about_its_end(
    given: Answer, events: list[Any], error: Any, options: dict[str, Any]
) -> None:
    with nothing_left(), Script(given) as server, client_of(server, **options) as client:
        if error:
            with pytest.raises(GatewayError) as caught:
                client.run("p", "1", "words")
            assert type(caught.value) is error
            return
        result = client.run("p", "1", "words")
    assert result.is_success() == ("error" not in dict(events))
    assert result.get_function_result() == ("a" if content("a")[0] in events else "")


# --- Faults: random ones --------------------------------------------------------------------------


def reference_events(stream: bytes) -> list[tuple[str, Any]]:
    """WHATWG HTML §9.2.6, a character at a time, with what the SDK adds to it."""
    text, lines, line, found = stream.decode("utf-8", "replace"), [], "", []
    text = text[1:] if text.startswith("\ufeff") else text
    for index, character in enumerate(text):
        if character == "\n" and index and text[index - 1] == "\r":
            continue
        if character in "\r\n":
            lines.append(line)
            line = ""
        else:
            line += character
    name, data = "", []
    for line in (*lines, line, ""):  # noqa: B020 - what has no blank line behind it counts too
        if not line:
            found += reference_event(name, data)
            name, data = "", []
        field, _, value = line.partition(":")
        value = value[1:] if value[:1] == " " else value
        if field == "data":
            data.append(value)
        if field == "event":
            name = value
    return found


def reference_event(name: str, lines: list[str]) -> list[tuple[str, Any]]:
    types = ("start", "content", "progress", "done", "error")
    fallback = name if name in types else "content"
    data = "\n".join(lines)
    if not data:
        return []
    for candidates in ([data], lines):
        try:
            values = [{"type": "done", "data": candidate} if candidate == "[DONE]" else json.loads(candidate)
                      for candidate in candidates]
        except ValueError:
            continue
        events = []
        for value in values:
            if isinstance(value, dict) and isinstance(value.get("type"), str):
                events.append((value["type"] if value["type"] in types else "content",
                    value.get("data")))
            else:
                events.append((fallback, value))
        return events
    return [("done" if data == "[DONE]" else fallback, data)]


TOKENS = [b"\n", b"\n", b"\n\n", b"\r", b"\r\n", b"\r\n\r\n", b"data: ", b"data:", b"data: ",
    b"data", b":", b" ", A, B,
          b"[DONE]", b"event: done", b"event:progress", b"event", b"id: 1", b": note", b"1",
              b"null", b'{"a":', b"2}",
          b'"', b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc3", b"\xa4", b"\xff", b"\0", b"NaN", b"text",
              b"\t", b"[", b"]"]


FIELDS = [b"data", b"data: ", b"data:", b"data: ", b"event: ", b"event:", b"id: ", b": ", b"",
    b"\xef\xbb\xbfdata: "]
VALUES = [A, B, b"one", b"1", b'{"a":', b"2}", b"[DONE]", b"progress", b"done", b"\xff\xe2\x80\xa8",
    b"", b" ", b"x:y"]


def random_stream(chance: random.Random) -> bytes:
    """Lines as they may come; and now and then anything."""
    if chance.random() < 0.3:
        return b"".join(chance.choice(TOKENS) for _ in range(chance.randrange(30)))
    ends = chance.choice([[b"\n"], [b"\r\n"], [b"\r"], [b"\n", b"\r\n", b"\r"]])
    lines = [chance.choice(FIELDS) + chance.choice(VALUES) if chance.random() < 0.7 else b""
             for _ in range(chance.randrange(12))]
    return b"".join(line + chance.choice(ends) for line in lines)[chance.randrange(2) :]


def random_pieces(chance: random.Random, data: bytes) -> list[bytes]:
    places = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(8)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)])]


def test_random_event_streams_are_read_as_the_standard_says() -> None:
    chance = random.Random(FUZZ_SEED)
    for _ in range(FUZZ_COUNT * 20):
        stream = random_stream(chance)
        pieces = random_pieces(chance, stream)
        assert repr(parsed(*pieces)) == repr(reference_events(stream)), pieces


def random_chunks(chance: random.Random, payload: bytes) -> bytes:
    """The payload in chunks, as odd as they may be (RFC 9112 §7.1)."""
    body = b""
    for piece in filter(None, random_pieces(chance, payload)):
        size = b"%x" % len(piece)
        size = chance.choice([size, size.upper(), b"000" + size])
        body += size + chance.choice([b"", b";a=b", b' ; name="x;y"',
            b" "]) + b"\r\n" + piece + b"\r\n"
    return body + chance.choice([b"0", b"000", b"0;last"]) + b"\r\n" + chance.choice([b"",
        b"X-Sum: 1\r\n"]) + b"\r\n"


def test_random_chunks_give_the_payload_and_random_cuts_an_error() -> None:
    chance, given = random.Random(FUZZ_SEED), collections.deque[Any]()
    with Routed(lambda request: given.popleft()) as server, client_of(server,
            max_retries=0) as client:
        for _ in range(FUZZ_COUNT):
            text = "".join(chance.choice("ab\r\n0;äß€ ") for _ in range(chance.randrange(400)))
            payload = ran(text).partition(b"\r\n\r\n")[2]
            body = random_chunks(chance, payload)
            head = chunked(end=False, content_type="application/json")
            given.append(head + body)
            assert client.run("p", "1", "f").get_function_result() == (text if text is not None
                else {})
            last = max(body.rindex(end) for end in (b"\r\n0\r\n", b"\r\n000\r\n",
                b"\r\n0;last\r\n") if end in body)
            given.append(HangUp(head + body[: chance.randrange(last + 3)]))
            with pytest.raises(ServiceUnavailableError):
                client.run("p", "1", "f")


def random_value(chance: random.Random, depth: int = 0) -> Any:
    plain = [None, True, False, 0, -1, 2**70, 1.5, "", "x", "SUCCESS", "FAILED", "s3://b/k",
        "\ud800", "{0}", "ä\0\n",
             [], {}, "http://[", "//", "http://127.0.0.1:1/x", "9" * 50]
    if depth > 2 or chance.random() < 0.6:
        return chance.choice(plain)
    values = [random_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return values if chance.random() < 0.5 else {
        f"{chance.choice(['id', 'message', 'files', 'x'])}": v for v in values}


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


ENTRY = {"id": "p", "version": "1.2.0", "name": "P", "tags": ["a"], "functions": [{"name": "f"}],
    "secrets": [{"a": 1}],
         "deployment_status": "deployed"}
RUN = {"job_id": "j", "status": "COMPLETED", "results": [
    {"status": "SUCCESS", "output": {"status": "SUCCESS",
        "output": {"success": True, "message": "m", "result": 1},
                                     "files": {"out": ["s3://b/k"]}},
                                         "error": {"message": "m", "type": "t"}}]}
FILES = {"files": [{"key": "k", "size": 1, "s3_url": "s3://b/k"}], "next_token": "t"}
PROBLEM = {"detail": {"error_code": "MISSING_SECRET", "message": "m", "details": {
    "prefab_id": "p", "secret_name": "s", "instructions": "i", "limit": 1, "used": 2,
        "quota_type": "q"}}}
PROBLEMS = [PROBLEM, PROBLEM["detail"], {"detail": "text"},
            {"detail": [{"loc": ["body", 0, "x"], "msg": "m", "type": "t"}]}]


def read_result(result: PrefabResult) -> None:
    result.get("x"), result.get_result(), result.get_function_result(), result.get_files(
        ), result.get_file_urls()
    result.get_business_success(), result.get_business_message(), result.get_business_error()
    result.get_business_error_code(), result.is_success(), repr(result), BatchResult("j", "x",
        [result]).all_success()


READERS: dict[str, tuple[Any, Callable[[GatewayClient], object]]] = {
    "run": (RUN, lambda c: read_result(c.run("p", "1", "f"))),
    "run-stream": (RUN, lambda c: repr(list(c.run("p", "1", "f", stream=True)))),
    "run_batch": (RUN, lambda c: read_result(c.run_batch([PrefabCall("p", "1", "f")]).results[0])),
    "single-request": (RUN, lambda c: c.run_batch([PrefabCall("p", "1", "f")],
        single_request=True)),
    "list_prefabs": ([ENTRY, {**ENTRY, "version": "1.10.0"}], lambda c: repr(c.list_prefabs())),
    "get_prefab_spec": ([ENTRY, {**ENTRY, "version": "1.10.0"}], lambda c: c.get_prefab_spec("p")),
    "list_secrets": ({"secrets": [{"prefab_id": "p", "secret_name": "s"}]},
        lambda c: c.list_secrets()),
    "secrets-of-one": ({"secret_names": ["s"]}, lambda c: c.list_secrets("p")),
    "list_files": (FILES, lambda c: c.list_files()),
    "iter_files": (FILES, lambda c: list(itertools.islice(c.iter_files(), 3))),
    "get_presigned_url": ({"presigned_url": "http://h/"},
        lambda c: c.get_presigned_url("s3://b/k")),
    "cleanup_temp_files": ({"deleted_count": 3}, lambda c: c.cleanup_temp_files("s")),
    "set_secret": ({}, lambda c: c.set_secret("p", "S", "secret")),
}


@pytest.mark.parametrize("name", READERS)
def test_random_answers_give_a_result_or_a_gateway_error(name: str) -> None:
    """In turns: another structure, another status with such a body, other bytes anywhere."""
    chance = random.Random(f"{FUZZ_SEED} {name}")
    given: Answer = b""
    valid, call = READERS[name]
    with nothing_left(), Routed(lambda request: given) as server, client_of(server,
            max_retries=0) as client:
        for turn in range(FUZZ_COUNT):
            if turn % 3 == 0:
                given = answer(mutated(chance, valid))
            elif turn % 3 == 1:
                status = chance.choice([301, 304, 400, 401, 403, 404, 409, 418, 422, 429, 500, 503,
                    599])
                given = answer(mutated(chance, chance.choice(PROBLEMS)), status)
            else:
                text = bytearray(chance.choice([answer(valid),
                    chunked(json.dumps(valid).encode())]))
                for _ in range(chance.randrange(1, 5)):
                    place = chance.randrange(len(text))
                    text[place : place + chance.randrange(3)] = bytes(
                        chance.choice(b'\r\n \0:;0159af-"{}[]\xff\xe4')
                            for _ in range(chance.randrange(3)))
                given = HangUp(bytes(text))
            try:
                call(client)
            except GatewayError as error:
                assert TOKEN not in f"{error} {error.details}"
            except BaseException:
                print("the answer was", given)
                raise


def test_random_bytes_in_an_event_stream_give_events_or_a_gateway_error() -> None:
    chance = random.Random(FUZZ_SEED)
    given: Answer = b""
    with nothing_left(), Routed(lambda request: given) as server, client_of(server) as client:
        for _ in range(FUZZ_COUNT):
            stream = random_stream(chance)
            expected = reference_events(stream)
            given = chunked(*filter(None, random_pieces(chance, stream)))
            events = list(client.run("p", "1", "words", stream=True))
            assert repr([(str(event.type), event.data) for event in events]) == repr(expected)
            assert isinstance(client.run("p", "1", "words"), PrefabResult)
            place = chance.randrange(len(given))
            given = HangUp(
                given[:place] + bytes([chance.randrange(256)]) + given[place + 1 : chance.randrange(
                place, len(given)) + 1])
            with client_of(server) as other, contextlib.suppress(GatewayError):
                list(other.run("p", "1", "words", stream=True))


# --- Callbacks, closing and odd values ------------------------------------------------------------


@pytest.mark.parametrize("raised", [OSError("my disk"), TimeoutError("mine"), BrokenPipeError(), KeyError("k")])
@pytest.mark.parametrize("upload", ["upload_input_file", "upload_file"])
def test_an_error_of_a_callback_is_the_callers_and_nothing_is_sent_again(
        upload: str, raised: Exception, tmp_path: Path) -> None:
    def fail(done: int, total: int | None) -> None:
        if done:
            raise raised

    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    with Script(*[answer({"upload_url": "http://127.0.0.1:1/", "s3_url": "s3://b/k"})] * 3) as server:
        first = answer({"upload_url": f"{server.url}/put", "s3_url": "s3://b/k"})
        server._answers.clear()
        server._answers.extend([first] * 9)
        with client_of(server) as client, pytest.raises(type(raised)) as caught:
            getattr(client, upload)(path, on_progress=fail)
        assert caught.value is raised
        assert len([request for request in server.received if request.target != "/put"]) <= 1


def test_a_stream_that_is_closed_in_its_own_loop_just_ends() -> None:
    with Script(Pause(chunked(event("content", 1), event("content", 2), end=False))) as server:
        client = client_of(server)
        stream = client.run("p", "1", "f", stream=True)
        seen = []
        for item in stream:
            seen.append(item.data)
            stream.close()
        assert seen == [1]
        assert list(stream) == []


def test_closing_a_stream_ends_another_threads_wait_without_an_error() -> None:
    with Script(Pause(chunked(event("content", 1), end=False))) as server:
        stream = client_of(server).run("p", "1", "f", stream=True)
        first, ended = threading.Event(), []

        def read() -> None:
            for _ in stream:
                first.set()
            ended.append(True)

        thread = threading.Thread(target=read)
        thread.start()
        assert first.wait(WAIT_SECONDS)
        stream.close()
        thread.join(WAIT_SECONDS)
        assert ended == [True]


@pytest.mark.parametrize("escaped", [r"ab\/cdefghij-secret", r"\u0061b/cdefghij-secret"])
def test_a_secret_that_json_escapes_is_not_shown_in_the_details_either(escaped: str) -> None:
    token = "ab/cdefghij-secret"
    body = b'{"detail": {"message": "bad %b", "list": ["%b"], "%b": 1}}' % ((escaped.encode(),) * 3)
    with Script(answer(status=401, body=body)) as server, pytest.raises(AuthenticationError) as caught:
        client_of(server, internal_token=token).list_prefabs()
    assert token not in f"{caught.value} {caught.value.details}"
    assert "***" in str(caught.value)


@pytest.mark.parametrize("body", [
    b'{"internal_token": "hush-hush', b'{"token": "hush-hush"}', b'["hush-hush"]', b"hush-hush",
    b'{"internal_token": {"value": "hush-hush"}}',
])  # fmt: skip
def test_an_exchanged_token_is_not_shown_where_its_answer_is_odd(body: bytes) -> None:
    with Script(answer(body=body)) as server, pytest.raises(GatewayError) as caught:
        GatewayClient.from_api_key("key-1", server.url)
    assert "hush" not in text_of(caught.value) + repr(caught.value.details)


@pytest.mark.parametrize("given", [
    answer({"url": "https://s3/b/k?X-Sig=hush-hush"}), answer("https://s3/b/k?X-Sig=hush-hush"),
    answer({"detail": "403 for url: https://s3/b/k?X-Sig=hush-hush"}, 503),
])  # fmt: skip
def test_the_query_of_a_url_in_an_answer_is_not_shown(given: bytes) -> None:
    error = error_of(given, lambda c: c.get_presigned_url(S3))
    assert "hush" not in text_of(error) + repr(error.details) and "https://s3/b/k?***" in str(error)


@pytest.mark.parametrize("echo", ["a+b/c=HUSH-HUSH", "a b/c=HUSH-HUSH", "SECOND-HUSH"])
def test_both_urls_of_a_redirect_are_hidden(echo: str, tmp_path: Path) -> None:
    answers = (link("Sig=a+b/c=HUSH-HUSH&T=a%20b/c=HUSH-HUSH"), answer(status=302, Location="/z?t=SECOND-HUSH"),
               answer({"detail": f"denied for {echo}"}, 403))
    with Script(*answers) as server, pytest.raises(GatewayError, match=r"denied for \*\*\*") as caught:
        client_of(server).download_file(S3, tmp_path / "f")
    assert "HUSH" not in text_of(caught.value)


@pytest.mark.parametrize("suffix", ["?a=1", "#a", "/?", "/p#"])
def test_a_base_url_has_neither_a_query_nor_a_fragment(suffix: str) -> None:
    with pytest.raises(ValidationError, match="base_url"):
        GatewayClient(f"http://127.0.0.1:1{suffix}")


def test_a_target_below_a_file_is_refused_before_the_transfer(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with Script(link()) as server, pytest.raises(OSError, match="file"):
        client_of(server).download_file(S3, tmp_path / "file" / "folder" / "f")
    assert len(server.received) == 1 and (tmp_path / "file").read_bytes() == b"old"


def test_a_redirect_to_nowhere_is_not_followed(tmp_path: Path) -> None:
    with Script(link(), answer(status=302)) as server, pytest.raises(GatewayError, match="Location is missing"):
        client_of(server).download_file(S3, tmp_path / "f")
    assert len(server.received) == 2


def test_a_404_is_about_the_prefab_that_was_asked_for() -> None:
    error = error_of(answer({"detail": {"message": "m", "version": "api-v7"}}, 404))
    assert (error.prefab_id, error.version) == ("p", "1.0.0")


def test_an_error_body_of_null_says_nothing() -> None:
    assert "None" not in str(error_of(answer(body=b"null", status=500)))


@pytest.mark.parametrize("options", [{"jwt_token": "j"}, {"internal_token": "i"}, {"api_key": "k"}], ids=str)
def test_an_exchanged_key_allows_no_second_credential(options: Any) -> None:
    with Script() as server, pytest.raises(TypeError):
        GatewayClient.from_api_key("key-1", server.url, **options)
    assert not server.received


def test_events_behind_an_error_event_are_waited_for_and_missed() -> None:
    late, never = event("content", "late"), event("done", None)
    with Script(chunked(event("error", "e"), late, never), HangUp(chunked(event("error", "e"), late, end=False)),
                HangUp(chunked(event("error", "e"), end=False))) as server:
        client = client_of(server)
        assert [e.data for e in client.run("p", "1", "f", stream=True)] == ["e", "late", None]
        with pytest.raises(ServiceUnavailableError):
            list(client.run("p", "1", "f", stream=True))
        assert [e.data for e in client.run("p", "1", "f", stream=True)] == ["e"]


def test_a_gathered_stream_that_breaks_keeps_what_came() -> None:
    error = error_of(HangUp(chunked(event("content", "paid"), event("content", "for"), end=False)))
    assert type(error) is ServiceUnavailableError and error.may_have_run
    assert error.details["partial_output"] == ["paid", "for"]


def test_after_done_a_short_timeout_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    hung_up = []

    def serve(sock: socket.socket) -> None:
        sock.sendall(chunked(event("done", None), end=False))
        sock.settimeout(WAIT_SECONDS)
        hung_up.append(sock.recv(1))

    monkeypatch.setattr(gateway_sdk, "_AFTER_DONE_SECONDS", 10 * WAIT_SECONDS)
    with Script(Steps((serve,))) as server, client_of(server, timeout=0.2) as client:
        assert len(list(client.run("p", "1", "f", stream=True))) == 1
    assert hung_up == [b""]


@pytest.mark.parametrize(("data", "output", "files"), [
    ({"answer": 42}, {"answer": 42}, None), ({"answer": 42, "files": {"a": [S3]}}, {"answer": 42}, {"a": [S3]}),
    ({"files": {"a": [S3]}}, "", {"a": [S3]}), (None, "", None), ("text", "text", None), ("[DONE]", "", None),
])  # fmt: skip
def test_what_done_brings_is_the_result_where_there_are_no_contents(data: Any, output: Any, files: Any) -> None:
    with Script(chunked(event("progress", 1), event("done", data))) as server:
        result = run(client_of(server))
    assert (result.output["output"], result.get_files()) == (output, files or {})


def test_lines_without_blank_ones_may_end_with_done() -> None:
    lines = event("content", 1).rstrip() + b"\n" + event("content", 2).rstrip() + b"\ndata: [DONE]\n"
    assert parsed(lines) == [("content", 1), ("content", 2), ("done", "[DONE]")]


def test_of_a_presigned_url_short_words_stay_readable_elsewhere(tmp_path: Path) -> None:
    answers = (link("X-Expires=600&X-Signed=host&X-Signature=0123456789abcdef"),
               answer({"detail": "Is the host right? 600 0123456789abcdef"}, 403))
    with Script(*answers) as server, pytest.raises(GatewayError, match=r"Is the host right\? 600 \*\*\*"):
        client_of(server).download_file(S3, tmp_path / "f")


@pytest.mark.parametrize("timeout", [2**31 / 1000, 4294968, 1e9, float("inf"), float("nan"), 0, -1, True, "60"])
def test_a_timeout_that_cannot_be_kept_is_refused(timeout: Any) -> None:
    with pytest.raises(ValidationError, match="timeout"):
        GatewayClient("http://127.0.0.1", timeout=timeout)


@pytest.mark.parametrize("value", [10**5000, [[]] * 3, object()], ids=["huge", "list", "object"])
def test_a_refused_value_is_named_briefly(value: Any) -> None:
    client = GatewayClient("http://127.0.0.1:1")
    for refused in (lambda: client.list_files(limit=value), lambda: client.run("p", "1", "f", [value]),
                    lambda: client.run("p", "1", "f", files={"a": value}), lambda: client.download_file(value, "x"),
                    lambda: client.upload_temp_file(__file__, ttl=value)):
        with pytest.raises(ValidationError) as caught:
            refused()
        assert len(str(caught.value)) < 300


def test_a_download_that_the_disk_has_no_room_for_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    with Script(answer({"presigned_url": "http://127.0.0.1:1/"})) as server:
        server._answers.clear()
        server._answers.extend([answer({"presigned_url": f"{server.url}/o"}), answer(body=b"x" * 3000)])
        code = f"""import resource, signal, sys
from gateway_sdk import GatewayClient
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
try:
    GatewayClient({server.url!r}).download_file("s3://b/k", "new/folder/file")
except OSError as error:
    print(type(error).__name__, error.errno)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.stdout.startswith("OSError"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_version_of_the_directory_may_be_any_text() -> None:
    entries = [{"id": "p", "version": version} for version in ("9" * 5000, "1.0", "a b", "")]
    with Script(answer(entries), answer({"id": "p"})) as server, client_of(server) as client:
        assert client.get_prefab_spec("p") == {"id": "p"}
        assert server.received[1].target == f"/v1/prefabs/p/{'9' * 5000}/spec"


@pytest.mark.parametrize("files", [5, True, {"a": 5}, {"a": {"b": 1}}, ["s3://b/k"]], ids=str)
def test_files_of_an_odd_shape_are_no_files(files: Any) -> None:
    result = PrefabResult(CallStatus.SUCCESS, {"status": "SUCCESS", "output": 1, "files": files})
    assert (result.get_files(), result.get_file_urls()) == ({}, [])


def test_what_is_no_url_among_the_files_is_left_out() -> None:
    result = PrefabResult(CallStatus.SUCCESS, {"output": 1, "files": {"a": [5, S3, None], "b": "s3://b/k"}})
    assert result.get_files() == {"a": [S3], "b": ["s3://b/k"]}
    assert result.get_file_urls() == [S3, "s3://b/k"]


def test_an_executor_that_takes_nothing_says_that_nothing_ran(client: GatewayClient) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        pass
    batch = client.run_batch([PrefabCall("text-tools", "1.1.0", "echo", {"value": 1})] * 2, executor=executor)
    assert batch.status == "FAILED"
    assert not any(result.exception.may_have_run for result in batch.results if result.exception)
    with pytest.raises(ValidationError, match="executor"):
        client.run_batch([], executor=5)  # type: ignore[arg-type]


# --- Command line ---------------------------------------------------------------------------------

SDK = ROOT / "gateway_sdk.py"
COMMANDS = ("run", "list", "spec", "batch", "upload", "download", "ls", "cleanup", "url", "secret")
ECHO = ("run", "text-tools", "1.1.0", "echo")
WORDS = ("run", "text-tools", "1.1.0", "words")
SIGN = ("run", "vault", "1.0.0", "sign", "-p", "text=t")
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
        return [json.loads(line) for line in self.out.splitlines()]

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
    url, token = (server.url, TOKEN) if isinstance(server, Script) else (server.base_url, server.internal_token)
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
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
    """Runs a command as an agent, in this process and in a folder with two small files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATEWAY_BASE_URL", gateway.base_url)
    monkeypatch.setenv("X_INTERNAL_TOKEN", gateway.internal_token)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(f"this is\n{name}\n")

    def run(*arguments: Any, stdin: str = "") -> Ended:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        try:
            status = gateway_sdk.main(list(arguments))
        except SystemExit as stop:
            status = stop.code
        return Ended(status, *capsys.readouterr())

    return run


def call_line(function: str = "echo", prefab_id: str = "text-tools", version: str = "1.1.0", **parameters: Any) -> str:
    call = {"prefab_id": prefab_id, "version": version, "function_name": function, "parameters": parameters}
    return json.dumps(call, ensure_ascii=False) + "\n"


def signature(key: str) -> str:
    return hmac.new(key.encode(), b"t", hashlib.sha256).hexdigest()


def test_a_call_prints_its_result_as_one_document(cli: Any, gateway: LocalGateway) -> None:
    result = cli(*ECHO, "-p", "value=1").json
    assert {"status", "output", "error", "job_id"} == set(result)
    assert (result["status"], result["output"]["output"]) == ("SUCCESS", 1)
    assert gateway.requests[-1].headers["x-internal-token"] == gateway.internal_token
    assert cli("--version") == (0, f"{gateway_sdk.__version__}\n", "")


@pytest.mark.parametrize(("text", "value"), [
    ("3", 3), ("-1.5", -1.5), ("true", True), ("null", None), ("[1, 2]", [1, 2]), ('{"a": {}}', {"a": {}}),
    ("text", "text"), ('"3"', "3"), ("", ""), ("a=b", "a=b"), ("two words", "two words"), ("中文", "中文"),
    ("1.2.3", "1.2.3"), ("{not json", "{not json"), ("NaN", "NaN"), ("-Infinity", "-Infinity"),
])
def test_a_parameter_is_json_if_it_can_be_else_text(cli: Any, text: str, value: Any) -> None:
    assert cli(*ECHO, "-p", f"value={text}").value == value


@pytest.mark.parametrize("data", ['{"value": "from -d"}', "@data.json", "-"], ids=["text", "file", "stdin"])
def test_all_parameters_come_from_a_text_a_file_or_stdin_and_single_ones_win(cli: Any, data: str) -> None:
    Path("data.json").write_text('{"value": "from -d"}')
    for more, value in (((), "from -d"), (("-p", "value=2"), 2)):
        assert cli(*ECHO, "-d", data, *more, stdin='{"value": "from -d"}').value == value
        assert cli(*ECHO, *more, "-d", data, stdin='{"value": "from -d"}').value == value


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
        for folder, name in (("a", "same.txt"), ("b", "same.txt"), ("b", "other")):
            (outputs / folder).mkdir(exist_ok=True)
            (outputs / folder / name).write_text(folder + name)

    gateway.add_prefab("twins", "1.0.0", {"make": make})
    result = cli("run", "twins", "1.0.0", "make", "--save", "new/folder").json
    saved = {path.name: path.read_text() for path in Path("new/folder").iterdir()}
    assert sorted(saved.values()) == ["asame.txt", "bother", "bsame.txt"]
    assert {"same.txt", "other"} < set(saved)
    assert sorted(map(Path, result["saved"])) == sorted(Path("new/folder").iterdir())
    failed = cli("run", "twins", "1.0.0", "make", "--save", "a.txt")  # which is no folder
    assert failed.lines[0]["status"] == "SUCCESS"
    assert "a.txt" in failed.error(out=failed.out)


def test_a_stream_prints_its_contents_or_whole_events_as_json_lines(cli: Any) -> None:
    assert cli(*WORDS, "-p", "text=one 二 three", "--stream") == (0, "one 二 three\n", "")
    events = cli(*WORDS, "-p", "text=one 二 three", "--stream", "--json")
    contents = [event["data"] for event in events.lines if event["type"] == "content"]
    assert (events.status, contents, events.lines[-1]["type"], events.err) == (0, ["one ", "二 ", "three"], "done", "")
    assert cli(*ECHO, "-p", "value=1", "--stream", "--json").lines[-1]["type"] == "done"  # does not stream


def test_an_error_event_or_a_failed_call_fails_the_command_after_its_output(cli: Any) -> None:
    for option in ((), ("--json",)):
        stream = cli("run", "faulty", "1.0.0", "stumble", "-p", "text=as far", "--stream", *option)
        assert "far" in stream.out
        assert "stumbled" in stream.error(out=stream.out)
    assert stream.lines[-1]["type"] == "error"
    refused = cli("run", "faulty", "1.0.0", "refuse", "-p", "message=not today")
    assert [result["status"] for result in refused.lines] == ["FAILED"]
    assert "not today" in refused.error(out=refused.out)
    assert cli("run", "faulty", "1.0.0", "fail").value["success"] is False  # it ran: a failure of its own


def test_the_directory_and_a_specification_are_printed(cli: Any, gateway: LocalGateway) -> None:
    assert cli("list").json == cli("list", "--status", "deployed").json == gateway.prefabs()
    assert cli("list", "--status", "failed").json == []
    assert cli("spec", "text-tools").json["version"] == "1.1.0"
    assert cli("spec", "text-tools", "1.0.0").json["version"] == "1.0.0"


@pytest.mark.parametrize("source", ["calls.jsonl", "-"], ids=["file", "stdin"])
def test_a_batch_prints_a_line_per_call_in_their_order(cli: Any, source: str) -> None:
    texts = [*map(str, range(9)), "a\u2028b\u2029c\x85d 中文"]  # all of which JSON allows within a line
    lines = "\n".join(call_line(value=text) for text in texts) + "\n\n"
    Path("calls.jsonl").write_text(lines, encoding="utf-8")
    ended = cli("batch", source, "--workers", "4", stdin=lines)
    assert (ended.status, ended.err) == (0, "")
    assert [json.loads(line)["output"]["output"] for line in ended.out.rstrip("\n").split("\n")] == texts


def test_a_failed_call_of_a_batch_fails_the_command_and_costs_no_other_result(cli: Any) -> None:
    Path("calls.jsonl").write_text(call_line(value=1) + call_line("crash", "faulty", "1.0.0") + call_line(value=3))
    ended = cli("batch", "calls.jsonl")
    assert [line["status"] for line in ended.lines] == ["SUCCESS", "FAILED", "SUCCESS"]
    assert ended.lines[1]["error"]["type"] == "ServiceUnavailableError"
    assert "out of order" in ended.error(out=ended.out)
    Path("calls.jsonl").write_text("")
    assert cli("batch", "calls.jsonl") == (0, "", "")


@pytest.mark.parametrize("line", ["not json", "[1]", '"text"', '{"prefab_id": "a"}', '{"unknown": 1}',
                                  '{"prefab_id": 1, "version": "1", "function_name": "f"}'])
def test_a_batch_with_a_bad_line_sends_nothing(cli: Any, gateway: LocalGateway, line: str) -> None:
    gateway.requests.clear()
    cli("batch", "-", stdin=f"{call_line(value=1)}{line}\n").error(2)
    assert not gateway.requests


def test_files_go_up_are_listed_and_come_down_again(cli: Any) -> None:
    kept = cli("upload", "a.txt").json
    assert (kept["filename"], kept["size"], "/agent-outputs/" in kept["s3_url"]) == ("a.txt", 14, True)
    assert [made["filename"] for made in cli("upload", "a.txt", "b.txt").json] == ["a.txt", "b.txt"]
    assert kept["s3_url"] in [file["s3_url"] for file in cli("ls").json]
    assert cli("url", kept["s3_url"]).json["presigned_url"].startswith("http://127.0.0.1")
    Path("a.txt").unlink()
    Path("folder").mkdir()
    targets = {"as.txt": "as.txt", "folder": "folder/a.txt", "new/": "new/a.txt", "deep/er": "deep/er", "": "a.txt"}
    for target, made in targets.items():
        got = cli("download", kept["s3_url"], *[target] * bool(target)).json
        assert (Path(got["path"]), got["size"], Path(made).read_text()) == (Path(made), 14, "this is\na.txt\n")


def test_temporary_files_are_a_sessions_and_go_with_it(cli: Any) -> None:
    made = cli("upload", "--temp", "--ttl", "60", "--session", "one", "a.txt").json["s3_url"]
    other = cli("upload", "--temp", "a.txt").json["s3_url"]
    listed = {option: {file["s3_url"] for file in cli("ls", *option.split()).json}
              for option in ("", "--temp", "--temp --session one")}
    assert listed["--temp --session one"] == {made}
    assert {made, other} <= listed["--temp"]
    assert made not in listed[""]
    assert cli("cleanup", "one").json == {"deleted_count": 1}
    assert cli("ls", "--temp", "--session", "one").json == []


def test_a_secret_is_read_from_stdin_and_never_printed(cli: Any) -> None:
    assert "private" not in str(cli("secret", "set", "vault", "SIGNING_KEY", stdin="very private\n").json)
    assert cli(*SIGN).value["signature"] == signature("very private")
    entry = {"prefab_id": "vault", "secret_name": "SIGNING_KEY"}
    assert (cli("secret", "list").json, cli("secret", "list", "vault").json) == ([entry], [entry])
    assert cli("secret", "delete", "vault", "SIGNING_KEY").status == 0
    assert cli("secret", "list").json == []
    assert "SIGNING_KEY" in cli(*SIGN).error()


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after the command"])
def test_global_options_are_taken(cli: Any, before: bool) -> None:
    with Script(answer([]), Pause()) as server:
        given, short = ("--base-url", server.url), ("--base-url", server.url, "--timeout", "0.05")
        assert (cli(*given, "list") if before else cli("list", *given)) == (0, "[]\n", "")
        assert "0.05 s" in (cli(*short, *ECHO) if before else cli(*ECHO, *short)).error()
        assert len(server.received) == 2


def test_the_debug_log_goes_to_stderr_without_the_credential(gateway: LocalGateway, lone: Path) -> None:
    ended = ended_python(lone, "-v", *ECHO, "-p", "value=1", env=environment_for(gateway))
    assert (ended.status, ended.lines[0]["status"]) == (0, "SUCCESS")
    assert "POST /v1/internal/run 200" in ended.err
    assert gateway.internal_token not in ended.err


def test_a_pair_without_its_separator_is_told(cli: Any) -> None:
    status, out, err = cli("run", "a", "1", "f", "-p", "novalue")
    assert (status, out) == (2, "") and "NAME=VALUE" in err.splitlines()[-1] and "'novalue'" in err


def test_several_messages_are_one_line(cli: Any) -> None:
    problems = [{"loc": ["body", "calls", number], "msg": f"bad {number}", "type": "x"} for number in range(2)]
    with Script(answer({"detail": problems}, 422)) as server:
        assert "; body.calls.0: bad 0; body.calls.1: bad 1" in cli("--base-url", server.url, *ECHO).error()


@pytest.mark.parametrize(("line", "reason"), [
    ("list --base-url http://127.0.0.1:{port}", "no connection to http://127.0.0.1:{port}"), ("upload no", "no"),
    ("run no-such 1 f", "no-such"), ("run a 1 f -f files=no.txt", "no.txt"), ("run a 1 f -d @no.json", "no.json"),
    ("spec text-tools 9.9.9", "text-tools"), ("spec no-such", "no-such"), ("batch no.jsonl", "no.jsonl"),
    ("url s3://local/agent-outputs/nobody/nothing/f", "/internal/files/download"),
    ("download s3://local/agent-outputs/nobody/nothing/f f", "/internal/files/download"),
])
def test_what_fails_is_one_line_on_stderr(cli: Any, line: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # where nobody listens any more
    assert reason.format(port=port) in cli(*line.format(port=port).split()).error()


@pytest.mark.parametrize("line", [
    "", "no-such-command", "run", "run a 1", "run a 1 f -p novalue", "run a 1 f -f novalue", "run a 1 f -d [1]",
    "run a 1 f -d {broken", "run a 1 f -d 1", "spec", "spec ..", "batch", "batch - --workers 0", "batch - --workers x",
    "upload", "upload .", "upload a.txt --temp --ttl 0", "upload a.txt --input --temp", "upload a.txt --session s",
    "upload a.txt --ttl 5", "download", "download https://example.com/f", "url report.pdf", "cleanup", "secret",
    "secret show", "secret set vault", "secret delete vault", "secret set vault NAME value", "list --timeout 0",
    "list --timeout soon",
    "list --base-url ftp://x", "list --base-url token-of-mine", "list --token t", "list --api-key k",
    "list --jwt-token j", "list --internal-token i", "spec \udcff", "ls --temp --session \udcff", "cleanup \udcff",
    "run a 1 f -p value=\udcff", "secret set vault \udcff", "run a 1 f -d @latin-1.json",
])
def test_wrong_usage_is_told_and_nothing_is_sent(cli: Any, gateway: LocalGateway, line: str) -> None:
    Path("latin-1.json").write_bytes(b'{"value": "\xe4"}')
    gateway.requests.clear()
    ended = cli(*line.split(), stdin=call_line(value=1))
    assert (ended.status, ended.out, list(gateway.requests)) == (2, "", [])
    assert "error: " in ended.err


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
    sent = {"x-internal-token", "x-api-key", "authorization"} & set(gateway.requests[-1].headers)
    assert sent == ({header} if header else set())


@pytest.fixture
def shell(gateway: LocalGateway, tmp_path: Path) -> Callable[..., Ended]:
    """Runs lines of bash, with `python` and `gateway-sdk` being these."""
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, command in (("python", f'"{sys.executable}"'), ("gateway-sdk", f'"{sys.executable}" "{SDK}"')):
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)
    environment = environment_for(gateway, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")

    def run(lines: str, cwd: Path = tmp_path) -> Ended:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", lines], cwd=str(cwd), env=environment,
                              capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_that_works(
        cli: Any, shell: Any, client: GatewayClient, monkeypatch: Any, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    overview, shown = cli("--help"), cli(command, "--help")
    assert (overview.status, overview.err, shown.status, shown.err) == (0, "", 0, "")
    assert re.search(rf"^ +{command}\b", overview.out, re.M)
    (example,) = re.findall(rf"^example: (gateway-sdk {command} .+)$", shown.out, re.M)
    for name in re.findall(r"(?<![\w/])\w+\.(?!jsonl)[a-z]+", example):
        Path(name).write_text("a file\n")
    Path("calls.jsonl").write_text(call_line(value=1))
    example = re.sub(r"s3://\S+", client.upload_file("a.txt")["s3_url"], example)
    assert shell(example).json is not None


class Terminal:
    """A terminal of its own, in which a process can write and read."""

    def __init__(self) -> None:
        self._controller, self.end = os.openpty()
        self.shown = b""

    def answer(self, prompt: bytes, typed: bytes) -> None:
        os.close(self.end)
        while prompt not in self.shown:
            self.shown += os.read(self._controller, 4096)
        os.write(self._controller, typed)

    def rest(self) -> str:
        """All that was shown, once nobody else has the terminal open."""
        with contextlib.suppress(OSError):  # how Linux tells the end
            while chunk := os.read(self._controller, 4096):
                self.shown += chunk
        os.close(self._controller)
        return self.shown.decode()


@posix
@pytest.mark.parametrize("line", [
    "upload a.txt", "upload --input a.txt", "upload --temp a.txt", "download {url} copy.txt", "batch calls.jsonl",
    "run file-tools 1.0.0 concatenate -f files=a.txt --save saved",
])
def test_progress_is_shown_on_a_terminal_and_nowhere_else(
        cli: Any, client: GatewayClient, monkeypatch: Any, line: str) -> None:
    Path("calls.jsonl").write_text(call_line(value=1))
    arguments = line.format(url=client.upload_file("a.txt")["s3_url"]).split()
    assert cli(*arguments).json  # and nothing on stderr
    terminal = Terminal()
    with open(terminal.end, "w") as stderr, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)
        assert cli(*arguments).json
    shown = terminal.rest()
    assert all(re.search(part, shown) for part in ("100 ?%", r"\d s left", r"\d [a-zA-Z]+/s", r"\n$"))


@posix
@pytest.mark.parametrize("typed", ["by hand\n", "\n", "\x04"], ids=["a line", "an empty line", "end of file"])
def test_a_secret_is_asked_for_without_an_echo(
        client: GatewayClient, gateway: LocalGateway, lone: Path, typed: str) -> None:
    terminal = Terminal()
    with started(lone, "secret", "set", "vault", "SIGNING_KEY", env=environment_for(gateway), stdin=terminal.end,
                 stderr=terminal.end, start_new_session=True) as process:
        gateway.requests.clear()
        terminal.answer(b"SIGNING_KEY", typed.encode())
        out, status = process.stdout.read().decode(), process.wait()
    shown = terminal.rest()
    assert "hand" not in shown + out
    assert "Traceback" not in shown
    if typed.strip("\n\x04"):
        assert (status, json.loads(out)["secret_name"]) == (0, "SIGNING_KEY")
        signed = client.run("vault", "1.0.0", "sign", {"text": "t"}).get_function_result()
        assert signed["signature"] == signature("by hand")
        client.delete_secret("vault", "SIGNING_KEY")
    else:
        assert (status in (1, 2), out, list(gateway.requests)) == (True, "", [])


@posix
@pytest.mark.parametrize(("line", "replies", "kept"), [
    ("run a 1 f", [Pause()], b""), ("list", [Pause()], b""), ("batch calls.jsonl --workers 1", [ran("first"), Pause()],
    b"first"), ("run a 1 f --stream", [Pause(chunked(event("content", "first\n"), end=False))], b"first"),
    ("run a 1 f --stream --json", [Pause(chunked(event("content", "first"), end=False))], b"first"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_ctrl_c_exits_130_without_a_word_and_sends_nothing_more(
        lone: Path, line: str, replies: list[Answer], kept: bytes) -> None:
    with Script(*replies) as server, \
            started(lone, *line.split(), cwd=str(lone.parent), env=environment_for(server)) as process:
        assert not kept or kept in process.stdout.readline()  # each as it came
        server.wait_until(lambda: len(server.received) == len(replies))
        process.send_signal(signal.SIGINT)
        assert [shown.strip() for shown in process.communicate()] == [b"", b""]
        assert (process.returncode, len(server.received)) == (130, len(replies))


@posix
@pytest.mark.parametrize("line", ["list", "run a 1 f", "run a 1 f --stream", "run a 1 f --stream --json",
                                  "batch calls.jsonl"])
def test_a_reader_that_has_seen_enough_is_no_error(lone: Path, line: str) -> None:
    closed = threading.Event()
    reply = answer([]) if line == "list" else ran()
    reply = chunked(event("content", "more\n"), event("done")) if "--stream" in line else reply
    late = Steps((lambda _: closed.wait(WAIT_SECONDS), lambda sock: sock.sendall(reply)))
    with Script(*[late] * 9) as server, \
            started(lone, *line.split(), cwd=str(lone.parent), env=environment_for(server)) as process:
        server.wait_until(lambda: server.received)
        process.stdout.close()
        closed.set()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@posix
@pytest.mark.parametrize(("line", "statuses"), [
    ("upload a.txt >&-", (0, 1)), ("upload a.txt 2>&-", (0,)), ("upload a.txt > /dev/full", (1,)),
    ("secret set vault K <&-", (1, 2)), ("run text-tools 1.1.0 echo -d - <&-", (1, 2)),
])
def test_a_closed_or_full_stream_is_no_traceback(cli: Any, shell: Any, line: str, statuses: Any) -> None:
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    ended = shell(f"gateway-sdk {line}")
    assert ended.status in statuses, ended.err
    assert ended.err.count("\n") == (ended.status != 0)
    assert ("s3://" in ended.out) == ("2>" in line)


def test_a_terminal_without_unicode_gets_chinese_escaped(gateway: LocalGateway, lone: Path) -> None:
    plain = environment_for(gateway, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    result = ended_python(lone, *ECHO, "-d", r'{"value": "\u4e2d\ud83d\ude00"}', env=plain)
    words = ended_python(lone, *WORDS, "-d", r'{"text": "\u4e2d"}', "--stream", env=plain)
    failed = ended_python(lone, "run", "faulty", "1.0.0", "refuse", "-d", r'{"message": "\u4e2d"}', env=plain)
    assert (result.value, words.status, words.err, failed.status) == ("中😀", 0, "", 1)
    if sys.platform.startswith("linux"):  # others take C for UTF-8
        assert (result.out + failed.out + failed.err).isascii()
        assert words.out == "\\u4e2d\n"


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
    assert len(blocks) > 15
    return [block for block in blocks if block[0] != "text"]


@pytest.mark.parametrize("name", READMES)
def test_every_block_of_the_readme_works(name: str, cli: Any, shell: Any, capsys: Any, caplog: Any) -> None:
    caplog.set_level(logging.NOTSET, "gateway_sdk")  # which is undone at the end, whatever a block sets
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for language, code, line in blocks_of(name):
        if language == "python":
            exec(compile("\n" * line + code, name, "exec"), namespace)
            continue
        ended = shell(code, ROOT) if "python examples/" in code else shell(code)
        assert (ended.status, ended.out != "") == (0, True), f"{name}:{line}: {ended.err}"
    namespace["client"].close()
    out, err = capsys.readouterr()
    assert "'words': 2" in out
    assert not re.search("fail", out + err, re.I)
    assert (namespace["batch"].all_success(), namespace["result"].is_success()) == (True, True)


class _WithoutTexts(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("" if isinstance(node.value, str) else node.value)


def test_the_readmes_have_the_same_code_apart_from_comments_and_texts() -> None:
    def bare(language: str, code: str, _: int) -> str:
        if language == "python":
            return ast.dump(_WithoutTexts().visit(ast.parse(code)))
        return re.sub(r"""'[^']*'|"[^"]*"|(?<!\S)#.*""", "", code)

    english, chinese = ([bare(*block) for block in blocks_of(name)] for name in READMES)
    assert english == chinese


def test_the_public_names_are_those_of_the_contract() -> None:
    assert sorted(gateway_sdk.__all__) == sorted(PUBLIC)
    assert all(hasattr(gateway_sdk, name) for name in PUBLIC)
    own = {node.name for node in TREE.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    assert {name for name in own if not name.startswith("_")} <= PUBLIC | {"main"}


def test_the_newest_version_of_the_changelog_is_this_one() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(\d.*?)\]", text, re.M)[0] == gateway_sdk.__version__


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


def test_everything_public_is_documented() -> None:
    tops = [node for node in TREE.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    methods = [node for top in tops if top.name in PUBLIC for node in top.body if isinstance(node, ast.FunctionDef)
               and not any(getattr(decorator, "id", "") == "overload" for decorator in node.decorator_list)]
    public = [node for node in tops + methods if not node.name.startswith("_")]
    assert len(public) > 50
    assert [node.name for node in public if not ast.get_docstring(node)] == []


# --- Everywhere -----------------------------------------------------------------------------------

CALLS_IN_CODE = """
with gateway_sdk.GatewayClient.from_env() as client:
    print(client.run("text-tools", "1.1.0", "echo", {"value": 1}).get_function_result())
    print(sum(1 for _ in client.run("text-tools", "1.1.0", "words", {"text": "a b"}, stream=True)) > 2)
"""
PRINTED = "1\nTrue\n"


@pytest.mark.parametrize("way", ["-I -S FILE", "-O FILE", "-OO FILE", "-bb -E -s FILE", "-X dev -W error FILE",
                                 "-m gateway_sdk"])
def test_it_runs_in_any_way_and_needs_nothing_of_the_environment(gateway: LocalGateway, lone: Path, way: str) -> None:
    needed = {"GATEWAY_BASE_URL", "X_INTERNAL_TOKEN", "SYSTEMROOT"}  # no HOME, no PATH
    little = {name: value for name, value in environment_for(gateway).items() if name in needed}
    command = [sys.executable, "-B", *way.replace("FILE", lone.name).split()]
    ended = []
    for arguments in ((*ECHO, "-d", '{"value": 1}'), ("spec", "no-such"), ("no-such",)):
        done = subprocess.run([*command, *arguments], cwd=str(lone.parent), env=little, capture_output=True,
                              timeout=60, check=False)
        ended.append(Ended(done.returncode, done.stdout.decode(), done.stderr.decode()))
    assert ended[0].value == 1
    assert "no-such" in ended[1].error()
    assert (ended[2].status, ended[2].out, "Traceback" in ended[2].err) == (2, "", False)


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
def test_an_import_has_no_side_effects(lone: Path) -> None:
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


EXAMPLES = ROOT / "examples"


# --- Examples -------------------------------------------------------------------------------------


def environment_of(gateway: LocalGateway | None, example: str = "") -> dict[str, str]:
    """A clean environment; with a gateway, its URL and the credential that the example takes."""
    kept = ("PATH", "HOME", "LANG", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "USERPROFILE", "COVERAGE_PROCESS_START")
    made = {name: os.environ[name] for name in kept if name in os.environ}
    made["PYTHONIOENCODING"] = "utf-8"
    if gateway:
        api_key = example == "third_party"
        name = "AGENT_BUILDER_API_KEY" if api_key else "X_INTERNAL_TOKEN"
        value = gateway.api_key if api_key else gateway.internal_token
        made.update({"GATEWAY_BASE_URL": gateway.base_url, name: value})
    return made


def run_example(name: str, gateway: LocalGateway | None, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs an example from another folder, as a user would; the folder must stay empty."""
    command = [sys.executable, "-X", "dev", "-W", "default", str(EXAMPLES / f"{name}.py")]
    options = {"cwd": folder, "env": environment_of(gateway, name), "encoding": "utf-8", "timeout": 60}
    done = subprocess.run(command, capture_output=True, check=False, **options)
    assert list(folder.iterdir()) == []
    return done


EXPECTED_LINES = {
    "basic_usage": [
        "words: 6",
        "find: 2 matches",
        "deployed: text-tools 1.1.0 - .*",
        r"newest text-tools: 1\.1\.0 \['statistics', 'words', 'echo', 'find'\]",
        "call 3: FAILED",
        r"batch: PARTIAL_SUCCESS, words \[1, 2, 3\], failed \['ServiceUnavailableError'\]",
        "bad input: .*Missing required parameter: text",
        "not found: no-such-prefab 1.1.0",
        r"missing secret: SIGNING_KEY\. .+",
        "signed: [0-9a-f]{64}",
    ],
    "streaming": [
        "So much depends upon a red wheel barrow glazed with rain water",
        "complete: 12 pieces",
        "found 'red': .*",
        "start",
        r"content: streaming\.py has [\d,]+ bytes",
        "progress: 1 of 2",
        "progress: 2 of 2",
        "done",
        "error: RuntimeError: stumbled",
    ],
    "file_operations": [
        r"kept: first\.txt, 1,700,000 bytes",
        "listed: True",
        "shared: http://[^?]* - the same bytes: True",
        "temporary files: 2",
        r".*100%",
        r"downloaded: both\.txt, 3,400,000 bytes",
        "temporary files afterwards: 0",
    ],
    "third_party": [
        "checksum: [0-9a-f]{64}",
        "lines of the output file: 1",
        "output file: s3://.*",
        "for agents only: .* answered 400: .*",
        "not downloaded: .*",
    ],
    "distributed_batch": [
        r"process pool: COMPLETED, words \[1, 2, .*, 20\]",
        r"Dask: (COMPLETED, words \[1, 2, .*, 20\]|not installed.*)",
    ],
}


RUNNABLE_EXAMPLES = [
    # PyPy 7.3.11 has a process pool that cannot start.
    pytest.param(example, marks=cpython_only) if example == "distributed_batch" else example
    for example in EXPECTED_LINES
]


@pytest.mark.parametrize("whose", ["its own gateway", "a gateway that runs already"])
@pytest.mark.parametrize("example", RUNNABLE_EXAMPLES)
def test_an_example_shows_what_it_promises(
    example: str, whose: str, gateway: LocalGateway, tmp_path: Path
) -> None:
    outside = None if whose == "its own gateway" else gateway
    before = len(gateway.requests)
    done = run_example(example, outside, tmp_path)
    assert done.returncode == 0, done.stderr
    if example != "distributed_batch":  # Dask has warnings of its own
        assert done.stderr == ""
    for line in EXPECTED_LINES[example]:
        assert re.search(f"(?m)^{line}$", done.stdout.replace("\r", "\n")), (line, done.stdout)
    assert (len(gateway.requests) > before) == (outside is not None)
    for secret in (gateway.internal_token, gateway.api_key, "X-Amz", "signature="):
        assert secret not in done.stdout


@pytest.mark.parametrize("example", RUNNABLE_EXAMPLES)
def test_an_example_fails_loudly(example: str, tmp_path: Path) -> None:
    with LocalGateway() as gateway:
        gateway.quota = 0
        done = run_example(example, gateway, tmp_path)
    assert done.returncode != 0
    assert "quota" in done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("distributed"), reason="needs dask[distributed]")
def test_the_dask_part_runs_where_dask_is_installed(gateway: LocalGateway, tmp_path: Path) -> None:
    before = len(gateway.executed)
    assert "Dask: COMPLETED" in run_example("distributed_batch", gateway, tmp_path).stdout
    assert len(gateway.executed) - before == 40


# --- The agent with FastAPI -----------------------------------------------------------------------

needs_fastapi = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))), reason="needs fastapi and uvicorn"
)


class Agent:
    """The example in a process of its own, and requests to it."""

    def __init__(self, gateway: LocalGateway) -> None:
        self.gateway = gateway
        self.log: list[str] = []

    def __enter__(self) -> Agent:
        command = [sys.executable, "-X", "dev", str(EXAMPLES / "fastapi_agent.py")]
        environment = {**environment_of(self.gateway), "PORT": "0", "PYTHONUNBUFFERED": "1"}
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


def len_of(text: str) -> int:
    return len(text)


@needs_fastapi
def test_the_agent_closes_the_upstream_stream_when_its_caller_hangs_up(agent: Agent) -> None:
    gated = Gated()
    agent.gateway.add_prefab("file-tools", "1.0.0", {"inspect": gated.inspect})
    with agent.post("/inspect", b"some text") as response:
        assert read_event(response)["type"] == "start"
        gated.gate.release()
        assert read_event(response)["data"] == "some text"
        with client_of(agent.gateway) as client:
            assert len(client.list_temp_files()["files"]) == 1
    # The function now waits and sends nothing: only the agent can know that its caller has gone.
    wait_for(lambda: any(r.method == "DELETE" for r in agent.gateway.requests))
    with client_of(agent.gateway) as client:
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


def refuse_secret(secrets: dict[str, str], text: str) -> None:
    raise AssertionError("it must not run")


def raise_error(text: str) -> None:
    raise RuntimeError("out of order")


@needs_fastapi
@pytest.mark.parametrize(
    ("function", "token", "path", "status", "error"),
    [
        (len_of, "", "/statistics", 401, None),
        (len_of, "stranger", "/statistics", 401, "AuthenticationError"),
        (len_of, "stranger", "/words", 401, "AuthenticationError"),
        (len_of, "an API key's", "/inspect", 403, "AgentContextRequiredError"),
        (refuse_secret, None, "/statistics", 409, "MissingSecretError"),
        (lambda text, more: None, None, "/statistics", 422, "ValidationError"),
        (raise_error, None, "/statistics", 503, "ServiceUnavailableError"),
        (None, None, "/statistics", 502, "PrefabNotFoundError"),
    ],
)
def test_the_agent_answers_errors_with_a_fitting_status(
    agent: Agent, function: Any, token: str | None, path: str, status: int, error: str | None
) -> None:
    functions = {"statistics": function, "words": function} if function else {"other": len_of}
    agent.gateway.add_prefab("text-tools", "1.1.0", functions, secrets=["KEY"] if function is refuse_secret else [])
    if token == "an API key's":
        exchange = urllib.request.Request(f"{agent.gateway.base_url}/v1/auth/convert_to_internal_token",
                                          b"", {"Authorization": f"Bearer {agent.gateway.api_key}"})
        with urllib.request.urlopen(exchange) as exchanged:
            token = json.load(exchanged)["internal_token"]
    with agent.post(path, {"text": "a b c"}, token) as response:
        answer = json.load(response)
        assert (response.status, answer.get("error")) == (status, error)


@needs_fastapi
def test_the_agent_tells_a_timeout_from_other_faults() -> None:
    import fastapi_agent

    for error, status in ((GatewayTimeoutError("late"), 504), (ServiceUnavailableError("down"), 503)):
        assert asyncio.run(fastapi_agent.answer_error(None, error)).status_code == status  # type: ignore[arg-type]


@needs_fastapi
def test_the_agent_says_so_when_a_quota_is_used_up(agent: Agent) -> None:
    agent.gateway.quota = 0
    try:
        with agent.post("/statistics", {"text": "a"}) as response:
            assert (response.status, json.load(response)["error"]) == (429, "QuotaExceededError")
    finally:
        agent.gateway.quota = None


@needs_fastapi
def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    half = event("content", "half")
    with Script(HangUp(head + b"%x\r\n%b\r\n" % (len(half), half))) as server:
        server.base_url, server.internal_token = server.url, TOKEN  # type: ignore[attr-defined]
        with Agent(server) as agent, agent.post("/words", {"text": "a"}) as response:  # type: ignore[arg-type]
            assert read_event(response)["data"] == "half"
            broken = read_event(response)
            assert (broken["type"], broken["data"]["type"]) == ("error", "ServiceUnavailableError")
            assert response.read() == b""


@needs_fastapi
def test_the_agent_logs_no_tokens_and_no_tracebacks(agent: Agent) -> None:
    with agent.post("/statistics", {"text": "a"}, "not-to-be-logged") as response:
        assert response.status == 401
    wait_for(lambda: sum("401 Unauthorized" in line for line in agent.log))
    log = "".join(agent.log)
    for unwanted in (agent.gateway.internal_token, "not-to-be-logged", "Traceback", "Warning", "never retrieved"):
        assert unwanted not in log, log
