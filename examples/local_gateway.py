"""A Gateway on this machine, for developing, testing and trying things out offline.

A real HTTP server on 127.0.0.1 that speaks the Gateway's whole protocol: prefabs are plain Python
functions, files lie behind signed URLs that expire, and every error comes where it is due. As a
program it serves until stopped: `python local_gateway.py --port 8080 --prefab path/to/my-prefab`.
In code it is a context manager:

    with LocalGateway("path/to/my-prefab") as gateway:
        client = GatewayClient(gateway.base_url, internal_token=gateway.internal_token)

A prefab folder holds `prefab-manifest.json` and `src/main.py`. Its functions are called by name,
generators stream, input files are in `data/inputs/<key>/`, files left in `data/outputs/<key>/` are
given back, and secrets are environment variables. Edits of the code take effect with the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import email
import email.message
import hashlib
import hmac
import importlib
import inspect
import json
import logging
import math
import mimetypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, quote, unquote, urlencode

__all__ = ["CallFailed", "LocalGateway", "ReceivedRequest", "environment", "main"]

BLOCK_BYTES = 256 * 1024  # of file bodies: large enough for speed, small enough for the CPU's cache
HEAD_LINE_BYTES = 64 * 1024
IDLE_SECONDS = 5.0  # as the deployed server: it hangs up on an idle connection, unannounced
TRANSFER_SECONDS = 60.0  # the longest wait for bytes in the middle of a request or an answer
GRACE_SECONDS = 2.0  # for a prefab's process to end by itself
CLOSE_SECONDS = 3.0  # for calls under way to end when the gateway closes
USER, AGENT = "local-user", "local-agent"
S3_ROOT = "s3://local/"
EVENT_TYPES = frozenset({"start", "content", "progress", "done", "error"})
CREDENTIAL_HEADERS = ("x-internal-token", "x-api-key", "authorization")

logger = logging.getLogger("local_gateway")


class CallFailed(Exception):
    """Raised by a prefab function to end its call as FAILED, with this message and type."""

    def __init__(self, message: str, type: str = "CallFailed") -> None:
        super().__init__(message)
        self.type = type


# --- Answers --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Answer:
    status: int
    # Bytes; an open file (to be closed), offset and count; or chunks.
    body: bytes | tuple[BinaryIO, int, int] | Generator[bytes, None, None] = b""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


class _Refusal(Exception):
    """Ends the handling of a request with an answer other than a success."""

    def __init__(self, answer: _Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _json_bytes(value: Any) -> bytes:
    """The value as JSON, with null for NaN and the infinities as the Gateway does it."""
    try:
        text = _encode_json(value)
    except ValueError:  # NaN is rare: the detour is made only when there is one
        text = _encode_json(json.loads(json.dumps(value), parse_constant=lambda _: None))
    return text.encode("utf-8", "replace")


def _json_answer(value: Any, status: int = 200) -> _Answer:
    return _Answer(status, _json_bytes(value), {"content-type": "application/json"})


def _refusal(status: int, detail: Any) -> _Refusal:
    return _Refusal(_json_answer({"detail": detail}, status))


def _invalid(loc: Sequence[str | int], message: str, kind: str, value: Any = None) -> _Refusal:
    """A 422 with the list form of `detail`."""
    return _refusal(422, [{"type": kind, "loc": list(loc), "msg": message, "input": value}])


def _storage_refusal(status: int, code: str, message: str, **headers: str) -> _Refusal:
    """An error in the storage's own language, which is XML."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n{body}'
    return _Refusal(_Answer(status, text.encode(), {"content-type": "application/xml", **named}))


# --- Requests -------------------------------------------------------------------------


@dataclasses.dataclass
class _Request:
    method: str
    target: str  # path and query as they came
    headers: dict[str, str]  # names in lower case
    reader: BinaryIO
    unread: int  # bytes of the body
    content: bytes = b""  # of a JSON request

    def __post_init__(self) -> None:
        path, _, query = self.target.partition("?")
        self.path = unquote(path)
        self.query = dict(parse_qsl(query, keep_blank_values=True)) if query else {}

    def blocks(self) -> Iterator[bytes]:
        """What is left of the body, block by block."""
        while self.unread:
            block = self.reader.read(min(BLOCK_BYTES, self.unread))
            if not block:
                raise ConnectionResetError("the client hung up in the middle of a body")
            self.unread -= len(block)
            yield block

    def json(self) -> dict[str, Any]:
        """The body, which must be a JSON object."""
        try:
            value = json.loads(self.content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _refusal(400, "There was an error parsing the body") from error
        except ValueError as error:
            raise _invalid(["body"], "JSON decode error", "json_invalid", {}) from error
        return dict(_checked(value, dict, "body"))


def _number(fields: Mapping[str, str], where: str, name: str, default: int, largest: int) -> int:
    """An integer between 1 and `largest`, from a query or a form."""
    text = fields.get(name, str(default))
    if re.fullmatch(r"\d{1,10}", text) and 1 <= int(text) <= largest:
        return int(text)
    message = f"Input should be an integer between 1 and {largest}"
    raise _invalid([where, name], message, "int_range", text)


_KINDS: Mapping[type, str] = {str: "string", list: "list", dict: "dictionary"}


def _checked(value: Any, kind: type, *loc: str | int) -> Any:
    """The value if it is of this kind; 422 if not."""
    if not isinstance(value, kind):
        message = f"Input should be a valid {_KINDS[kind]}"
        raise _invalid(loc, message, f"{kind.__name__}_type", value)
    return value


def _field(owner: Mapping[str, Any], name: str, kind: type, *loc: str | int) -> Any:
    """A field that an object must have, of this kind."""
    if name not in owner:
        raise _invalid([*loc, name], "Field required", "missing")
    return _checked(owner[name], kind, *loc, name)


# --- Connections ----------------------------------------------------------------------


class _Connection:
    """One client's connection: request after request until either side hangs up."""

    def __init__(self, sock: socket.socket, handle: Callable[[_Request], _Answer],
                 idle_seconds: float) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock, self._reader = sock, sock.makefile("rb")
        self._handle, self._idle_seconds = handle, idle_seconds

    def serve(self) -> None:
        """Answer requests; a broken or idle connection simply ends."""
        with self._sock, self._reader, contextlib.suppress(OSError):
            while self._serve_one():
                pass
            # To close with bytes unread would be a reset, which could cost the client the answer.
            self._sock.shutdown(socket.SHUT_WR)
            self._sock.settimeout(self._idle_seconds)
            while self._reader.read(BLOCK_BYTES):
                pass

    def _serve_one(self) -> bool:
        """Read and answer one request; whether another may follow."""
        self._sock.settimeout(self._idle_seconds)
        line = self._reader.readline(HEAD_LINE_BYTES)
        if not line:
            return False
        self._sock.settimeout(TRANSFER_SECONDS)
        try:
            request = self._read_request(line)
        except _Refusal as refusal:  # where a malformed request ends, nobody knows
            self._send(refusal.answer, closing=True)
            return False
        answer = self._handle(request)
        # No endpoint takes HEAD; its refusal has a body all the same, after which nothing may come.
        closing = request.method == "HEAD" or request.headers.get("connection", "") == "close"
        self._send(answer, closing=closing)
        if closing or answer.status == 500:  # as the deployed server: it hangs up after a 500
            return False
        for _ in request.blocks():
            pass  # refused unread; on loopback that is soon over, and a reset could lose the answer
        return True

    def _read_request(self, line: bytes) -> _Request:
        headers: dict[str, str] = {}
        while (field := self._reader.readline(HEAD_LINE_BYTES)) not in (b"\r\n", b"\n", b""):
            name, colon, value = field.decode("latin-1").partition(":")
            if not colon:
                raise _refusal(400, "Broken request head")
            headers[name.lower()] = value.strip()
        words, length = line.decode("latin-1").split(), headers.get("content-length", "0")
        if not field or words[2:] != ["HTTP/1.1"] or not re.fullmatch("[0-9]+", length):
            raise _refusal(400, "Not an HTTP/1.1 request")
        if "transfer-encoding" in headers:  # like the storage; no client of the Gateway needs it
            raise _refusal(501, "A body needs a Content-Length")
        if "expect" in headers:
            self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return _Request(words[0], words[1], headers, self._reader, int(length))

    def _send(self, answer: _Answer, *, closing: bool) -> None:
        body, headers = answer.body, dict(answer.headers)
        if closing:
            headers["connection"] = "close"
        if isinstance(body, bytes):
            if answer.status != 204:
                headers["content-length"] = str(len(body))
            # Head and body in one write: the client's first read finds the whole answer.
            self._sock.sendall(_head(answer.status, headers) + body)
        elif isinstance(body, tuple):
            file, offset, count = body
            headers["content-length"] = str(count)
            with file:
                self._sock.sendall(_head(answer.status, headers))
                if count:
                    self._sock.sendfile(file, offset, count)
        else:
            headers["transfer-encoding"] = "chunked"
            self._send_chunks(_head(answer.status, headers), body)

    def _send_chunks(self, head: bytes, chunks: Generator[bytes, None, None]) -> None:
        """Send each chunk as soon as it is there; a client that is gone ends the generator."""
        with contextlib.closing(chunks):
            for chunk in chunks:  # begun before the first write: only then can closing it clean up
                self._sock.sendall(b"%b%x\r\n%b\r\n" % (head, len(chunk), chunk))
                head = b""
            self._sock.sendall(head + b"0\r\n\r\n")


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


# --- Multipart ------------------------------------------------------------------------


class _Multipart:
    """The parts of a `multipart/form-data` body (RFC 7578), read in constant memory."""

    def __init__(self, request: _Request) -> None:
        head = email.message.Message()
        head["content-type"] = request.headers.get("content-type", "")
        boundary = head.get_boundary()
        if head.get_content_type() != "multipart/form-data" or not boundary:
            raise _invalid(["body", "file"], "Field required", "missing")
        self._blocks = request.blocks()
        self._delimiter = b"\r\n--" + boundary.encode("latin-1")
        self._window = b"\r\n"  # makes the first delimiter look like all the others

    def parts(self) -> Iterator[tuple[str, str | None, Iterator[bytes]]]:
        """Name, file name and content of each part; read the content before the next part."""
        for _ in self._until(self._delimiter):
            pass
        while b"".join(self._until(b"\n")).strip() != b"--":
            text = b"".join(self._until(b"\r\n\r\n")).decode("utf-8", "replace")
            head = email.message_from_string(text)
            name = str(head.get_param("name", "", "content-disposition"))
            filename = head.get_filename()
            if filename is not None:  # without the escapes of browsers
                filename = re.sub("%(22|0D|0A)", lambda match: unquote(match[0]), filename)
            yield name, filename, self._until(self._delimiter)

    def _until(self, delimiter: bytes) -> Iterator[bytes]:
        """What comes before `delimiter`, in pieces; the delimiter itself is dropped."""
        kept = len(delimiter) - 1  # so many bytes may be the beginning of a delimiter cut in two
        while (end := self._window.find(delimiter)) < 0:
            certain = max(0, len(self._window) - kept)
            yield self._window[:certain]
            block = next(self._blocks, None)
            if block is None:
                raise _refusal(400, "There was an error parsing the body")
            self._window = self._window[certain:] + block
        piece, self._window = self._window[:end], self._window[end + len(delimiter) :]
        yield piece


# --- Storage --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Caller:
    user_id: str
    agent_id: str | None = None

    def folder(self, area: str, session_id: str = "") -> str:
        """Where this caller's agent has its files in `area` of the storage."""
        if self.agent_id is None:
            message = "This operation needs an agent context: use a token given to an agent"
            raise _refusal(400, {"error_code": "MISSING_AGENT_CONTEXT", "message": message})
        if session_id and session_id != _safe_name(session_id):
            raise _refusal(422, "Invalid session_id")
        return "/".join(filter(None, (area, self.user_id, self.agent_id, session_id)))


def _safe_name(name: str) -> str:
    """The last part of a client's file name, fit for a folder; its end is what is kept."""
    name = re.sub(r"[\x00-\x1f\x7f]", "_", name.replace("\\", "/").rpartition("/")[2])
    name = name.encode("utf-8", "replace")[-200:].decode("utf-8", "ignore")
    return name if name.strip(". ") else "file"


@dataclasses.dataclass(frozen=True)
class _File:
    key: str
    path: Path  # alone in its folder, whose name is unique
    expires_at: float = math.inf

    def entry(self) -> dict[str, Any]:
        """How listings show it."""
        state = self.path.stat()
        return {"key": self.key, "size": state.st_size, "last_modified": _iso(state.st_mtime),
                "s3_url": S3_ROOT + self.key}

    @property
    def etag(self) -> str:
        return f'"{self.path.parent.name}"'


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(seconds))


class _Store:
    """Files in a folder, under the keys that they would have in S3, and all of their endpoints."""

    def __init__(self, folder: Path, base_url: str) -> None:
        self._folder, self._base_url = folder, base_url
        self._files: dict[str, _File] = {}
        self._signing_key = os.urandom(32)

    def new_key(self, folder: str, name: str) -> str:
        """A key of its own for every upload, in the order of time as listings are."""
        return f"{folder}/{time.time_ns():016x}{uuid.uuid4().hex[:8]}/{_safe_name(name)}"

    def new_folder(self) -> Path:
        """The path of a folder that is not made yet."""
        return self._folder / uuid.uuid4().hex

    def write(self, key: str, blocks: Iterable[bytes], expires_at: float = math.inf) -> _File:
        """Keep what comes; if that breaks off, nothing is left."""
        new, old = self._place(key, expires_at), self._files.get(key)
        try:
            with new.path.open("wb") as file:
                file.writelines(blocks)
        except BaseException:
            shutil.rmtree(new.path.parent)
            raise
        self._files[key] = new
        if old:
            shutil.rmtree(old.path.parent, ignore_errors=True)
        return new

    def keep(self, key: str, path: Path) -> str:
        """Move a file into the storage; its URL."""
        new = self._place(key)
        path.replace(new.path)
        self._files[key] = new
        return S3_ROOT + key

    def _place(self, key: str, expires_at: float = math.inf) -> _File:
        folder = self.new_folder()
        folder.mkdir()
        return _File(key, folder / key.rpartition("/")[2], expires_at)

    def find(self, key: str) -> _File | None:
        file = self._files.get(key)
        if file and time.time() >= file.expires_at:
            self.delete(file)
            return None
        return file

    def find_url(self, s3_url: str, caller: _Caller) -> _File | None:
        """The file of an s3 URL. Somebody else's is as good as none."""
        before, _, key = s3_url.partition(S3_ROOT)
        return None if before or key.split("/")[1:2] != [caller.user_id] else self.find(key)

    def listing(self, folder: str) -> list[_File]:
        """The files below a folder, in the order of their keys."""
        keys = sorted(key for key in list(self._files) if key.startswith(f"{folder}/"))
        return [file for file in map(self.find, keys) if file]

    def delete(self, file: _File) -> None:
        if self._files.pop(file.key, None):
            shutil.rmtree(file.path.parent, ignore_errors=True)

    def _presigned(self, method: str, key: str, expires_in: int, content_type: str = "") -> str:
        """A URL that allows this one method on this one key for `expires_in` seconds."""
        expires = f"{time.time() + expires_in:.3f}"
        signature = self._signature(method, key, expires, content_type)
        query = urlencode({"Expires": expires, "Signature": signature})
        return f"{self._base_url}/storage/{quote(key)}?{query}"

    def _signature(self, *parts: str) -> str:
        message = "\n".join(parts).encode("utf-8", "surrogateescape")
        return hmac.new(self._signing_key, message, hashlib.sha256).hexdigest()

    def handle(self, request: _Request) -> _Answer:
        """Answer a request that came by a presigned URL."""
        if any(header in request.headers for header in CREDENTIAL_HEADERS):
            raise _storage_refusal(400, "InvalidArgument", "Only one auth mechanism allowed")
        key, put = request.path[len("/storage/") :], request.method == "PUT"
        expires = request.query.get("Expires", "")
        content_type = request.headers.get("content-type", "") if put else ""
        right = self._signature(request.method, key, expires, content_type)
        if not hmac.compare_digest(right.encode(), request.query.get("Signature", "").encode()):
            message = "The request signature does not match the method, key or headers"
            raise _storage_refusal(403, "SignatureDoesNotMatch", message)
        if time.time() > float(expires):
            raise _storage_refusal(403, "AccessDenied", "Request has expired")
        if put and "content-length" not in request.headers:
            raise _storage_refusal(411, "MissingContentLength", "Content-Length is missing")
        if put:
            return _Answer(200, b"", {"etag": self.write(key, request.blocks()).etag})
        return self._get(key, request.headers)

    def _get(self, key: str, headers: Mapping[str, str]) -> _Answer:
        file = self.find(key)
        if file is None:
            raise _storage_refusal(404, "NoSuchKey", "The specified key does not exist")
        shown = {"etag": file.etag, "accept-ranges": "bytes"}
        shown["content-type"] = mimetypes.guess_type(key)[0] or "binary/octet-stream"
        size = file.path.stat().st_size
        whole = headers.get("if-range", file.etag) != file.etag
        wanted = None if whole else _wanted_range(headers.get("range", ""), size)
        first, last = wanted or (0, size - 1)
        if wanted:
            shown["content-range"] = f"bytes {first}-{last}/{size}"
        body = file.path.open("rb"), first, last - first + 1
        return _Answer(206 if wanted else 200, body, shown)

    def generate_upload_url(self, request: _Request, caller: _Caller) -> _Answer:
        body = request.json()
        filename = _field(body, "filename", str, "body")
        content_type = _checked(body.get("content_type") or "", str, "body", "content_type")
        key = self.new_key(f"agent-inputs/{caller.user_id}", filename)
        upload_url = self._presigned("PUT", key, 3600, content_type)
        return _json_answer({"upload_url": upload_url, "s3_url": S3_ROOT + key})

    def upload(self, request: _Request, caller: _Caller) -> _Answer:
        folder = caller.folder("agent-outputs")
        _, filename, content = _up_to_file(request)
        return self._upload(folder, filename, content)

    def upload_temp(self, request: _Request, caller: _Caller) -> _Answer:
        caller.folder("agent-workspace")
        fields, filename, content = _up_to_file(request)
        ttl = _number(fields, "body", "ttl", 86400, 10**9)
        folder = caller.folder("agent-workspace", fields.get("session_id") or "default")
        return self._upload(folder, filename, content, time.time() + ttl)

    def _upload(self, folder: str, filename: str, content: Iterable[bytes],
                expires_at: float = math.inf) -> _Answer:
        file = self.write(self.new_key(folder, filename), content, expires_at)
        shown = {name: file.entry()[name] for name in ("s3_url", "size")}
        return _json_answer({"success": True, "filename": filename, **shown})

    def download(self, request: _Request, caller: _Caller) -> _Answer:
        caller.folder("agent-outputs")
        s3_url = _field(request.query, "s3_url", str, "query")
        mode = request.query.get("mode", "presigned")
        if mode != "presigned":
            raise _invalid(["query", "mode"], "Input should be 'presigned'", "literal_error", mode)
        expires_in = _number(request.query, "query", "expires_in", 3600, 7 * 24 * 3600)
        file = self.find_url(s3_url, caller)
        if file is None:
            raise _refusal(404, f"File not found: {s3_url}")
        return _json_answer({"presigned_url": self._presigned("GET", file.key, expires_in)})

    def list(self, request: _Request, caller: _Caller) -> _Answer:
        return self._page(request, caller.folder("agent-outputs"))

    def list_temp(self, request: _Request, caller: _Caller) -> _Answer:
        session_id = request.query.get("session_id", "")
        return self._page(request, caller.folder("agent-workspace", session_id))

    def _page(self, request: _Request, folder: str) -> _Answer:
        limit = _number(request.query, "query", "limit", 100, 1000)
        last_key = request.query.get("continuation_token", "")
        files = [file for file in self.listing(folder) if file.key > last_key]
        answer: dict[str, Any] = {"files": [file.entry() for file in files[:limit]]}
        if len(files) > limit:
            answer["next_token"] = files[limit - 1].key
        return _json_answer(answer)

    def cleanup_temp(self, request: _Request, caller: _Caller) -> _Answer:
        caller.folder("agent-workspace")  # its refusal comes first
        session_id = _field(request.query, "session_id", str, "query")
        files = self.listing(caller.folder("agent-workspace", session_id))
        for file in files:
            self.delete(file)
        return _json_answer({"deleted_count": len(files)})


def _up_to_file(request: _Request) -> tuple[dict[str, str], str, Iterator[bytes]]:
    """The fields before the file part, its file name, and its content that is yet to be read."""
    fields: dict[str, str] = {}
    for name, filename, content in _Multipart(request).parts():
        if name == "file" and filename is not None:
            return fields, filename, content
        fields[name] = b"".join(content).decode("utf-8", "replace")
    raise _invalid(["body", "file"], "Field required", "missing")


def _wanted_range(header: str, size: int) -> tuple[int, int] | None:
    """First and last byte; forms other than `bytes=1-` and `bytes=1-2` mean the whole file."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", header)
    if not match or (match[2] and int(match[2]) < int(match[1])):
        return None
    if int(match[1]) >= size:
        message = "The requested range is not satisfiable"
        raise _storage_refusal(416, "InvalidRange", message, content_range=f"bytes */{size}")
    return int(match[1]), min(int(match[2] or size), size - 1)


# --- Prefabs --------------------------------------------------------------------------

_JSON_TYPES: Mapping[str, type] = {
    "string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict,
}
_TYPE_NAMES = {python_type.__name__: name for name, python_type in _JSON_TYPES.items()}
_RESERVED = ("inputs", "outputs", "secrets", "closing")  # parameters that the gateway fills in


@dataclasses.dataclass(frozen=True)
class _Job:
    """One call of a function, and what the function gets."""

    caller: _Caller
    parameters: dict[str, Any]
    inputs: dict[str, list[Path]]
    secrets: dict[str, str]
    closing: threading.Event  # set when the gateway closes
    folder: Path  # made only where it is needed: most functions have no files
    cleanup: contextlib.ExitStack  # undone after the call

    @property
    def outputs(self) -> Path:
        """The folder for output files."""
        path = self.folder / "data" / "outputs"
        if not path.exists():
            path.mkdir(parents=True)
            self.cleanup.callback(shutil.rmtree, self.folder, ignore_errors=True)
        return path


_Run = Callable[[_Job], Any]  # a generator as outcome means a stream


class _Prefab:
    """A manifest, with all that it may leave out, and the functions that it describes."""

    def __init__(self, manifest: Mapping[str, Any], runs: Mapping[str, _Run],
                 status: str = "deployed") -> None:
        shared = _by_name(map(_secret, manifest.get("secrets", ())))
        functions = [_function(entry, shared) for entry in manifest["functions"]]
        secrets = [secret for entry in functions for secret in entry["secrets"]]
        named = {key: manifest[key] for key in ("id", "version")}
        self.functions, self.runs, self.status = _by_name(functions), runs, status
        self.spec = {**named, "name": manifest.get("name") or named["id"],
                     "description": manifest.get("description", ""), "functions": functions}
        self.entry = {  # in the directory
            **self.spec, "tags": manifest.get("tags", []), "deployment_status": status,
            "knative_service_url": None,
            "deployed_at": _iso(time.time()), "updated_at": _iso(time.time()),
            "requires_secrets": any(secret["required"] for secret in secrets),
            "secrets": list({**_by_name(secrets), **shared}.values()),
            **({"deployment_error": "The deployment failed"} if status == "failed" else {}),
        }


def _by_name(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in entries}


def _secret(given: str | Mapping[str, Any]) -> dict[str, Any]:
    named = {"name": given} if isinstance(given, str) else given
    return {"description": "", "instructions": "", "required": True, **named}


def _function(entry: Mapping[str, Any], shared: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A function's entry in a manifest; without secrets of its own it needs the `shared` ones."""
    own = map(_secret, entry.get("secrets", shared))
    parameters = [{"type": "any", "required": "default" not in parameter, **parameter}
                  for parameter in entry.get("parameters", ())]
    return {"description": "", "streaming": False, **entry, "parameters": parameters,
            "secrets": [shared.get(secret["name"], secret) for secret in own]}


def _parameters(function: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a call, defaults added; 422 if they do not fit."""
    declared = _by_name(function["parameters"])
    for name, value in given.items():
        if name not in declared:
            raise _refusal(422, f"Unknown parameter: {name}")
        if not _fits(value, declared[name]):
            kind = declared[name]["type"]
            raise _refusal(422, f"Parameter '{name}' must be of type {kind}")
    for name, parameter in declared.items():
        if parameter["required"] and name not in given:
            raise _refusal(422, f"Missing required parameter: {name}")
    defaults = {name: entry["default"] for name, entry in declared.items() if "default" in entry}
    return {**defaults, **given}


def _fits(value: Any, parameter: Mapping[str, Any]) -> bool:
    expected = _JSON_TYPES.get(parameter["type"], object)
    if value is None and not parameter["required"]:
        return True
    if isinstance(value, bool):  # in Python it is an int
        return expected in (bool, object)
    return isinstance(value, (int, float) if expected is float else expected)


def _describe(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The manifest entry of a Python function, from its signature and docstring."""
    signature = inspect.signature(function).parameters
    return {
        "name": name, "description": (inspect.getdoc(function) or "").partition("\n")[0],
        "parameters": [_describe_parameter(parameter) for parameter in signature.values()
                       if parameter.name not in _RESERVED],
        "streaming": inspect.isgeneratorfunction(function),
        **({} if "secrets" in signature else {"secrets": []}),
    }


def _describe_parameter(parameter: inspect.Parameter) -> dict[str, Any]:
    annotation = getattr(parameter.annotation, "__name__", str(parameter.annotation))
    kind = _TYPE_NAMES.get(annotation.partition("[")[0], "any")
    required = parameter.default is inspect.Parameter.empty
    default = {} if required else {"default": parameter.default}
    return {"name": parameter.name, "type": kind, **default}


def _call_python(function: Callable[..., Any]) -> _Run:
    reserved = [name for name in _RESERVED if name in inspect.signature(function).parameters]
    return lambda job: function(**job.parameters, **{name: getattr(job, name) for name in reserved})


# --- Prefab folders -------------------------------------------------------------------

_CHILD_FLAG = "--run-function"  # of this file's command line: it is the child's program, too


class _ChildError(Exception):
    """What a prefab's process reported, or that it died."""

    type = "ProcessDied"


def _load_prefab(folder: Path, processes: set[subprocess.Popen[bytes]]) -> _Prefab:
    """A prefab as its developer has it on disk; each call runs in a process of its own."""
    path = folder / "prefab-manifest.json"

    def run(name: str) -> _Run:
        return lambda job: _run_child(job, [str(folder), name, job.parameters], processes)

    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        prefab = _Prefab(manifest, {entry["name"]: run(entry["name"])
                                    for entry in manifest["functions"]})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not (folder / "src" / "main.py").is_file():
        raise ValueError(f"{folder} has no src/main.py")
    return prefab


def _run_child(job: _Job, order: Sequence[Any], processes: set[subprocess.Popen[bytes]]) -> Any:
    inputs = job.outputs.with_name("inputs")
    inputs.mkdir()
    for key, paths in job.inputs.items():
        (inputs / key).mkdir()
        for number, path in enumerate(paths, 1):
            target = inputs / key / path.name
            if target.exists():  # two of one name
                target = target.with_name(f"{number}-{path.name}")
            shutil.copyfile(path, target)  # what a function does to it must not change the storage
    process = job.cleanup.enter_context(_child(job, processes))
    messages = _ask_child(process, json.dumps(order).encode())
    kind, value = next(messages)
    return messages if kind == "stream" else value


@contextlib.contextmanager
def _child(
    job: _Job, processes: set[subprocess.Popen[bytes]]
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-B", str(Path(__file__).resolve()), _CHILD_FLAG]
    with subprocess.Popen(command, cwd=job.folder, env={**os.environ, **job.secrets},
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        processes.add(process)
        try:
            if job.closing.is_set():  # the gateway ended its processes just before
                process.terminate()
            yield process
        finally:
            process.terminate()  # no harm to one that has ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            process.kill()
            processes.discard(process)


def _ask_child(process: subprocess.Popen[bytes], order: bytes) -> Generator[Any, None, None]:
    """First the kind and value of the outcome, then, of a stream, its pieces."""
    assert process.stdin
    assert process.stdout
    with contextlib.suppress(BrokenPipeError):  # it died early; that shows below
        process.stdin.write(order)
        process.stdin.close()
    for line in process.stdout:
        kind, value = json.loads(line)
        if kind in ("stream", "piece"):
            yield (kind, value) if kind == "stream" else value
            continue
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)  # it is done, but may have exit handlers to run
        if kind == "value":
            yield kind, value
        elif kind == "error":
            error = _ChildError(value["message"])
            error.type = value["type"]
            raise error
        return
    raise _ChildError(f"its process ended with status {process.wait()}")


def _child_main() -> None:
    """Run one function for the gateway: the order on stdin, the outcome as lines on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gateway's; it ends its children
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # an exception: `finally` clauses are run
    folder, function, parameters = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w", encoding="ascii") as pipe:
        os.dup2(2, 1)  # what the function prints must not get between the lines

        def tell(kind: str, value: Any = None) -> None:
            pipe.write(json.dumps([kind, value]) + "\n")
            pipe.flush()

        try:
            sys.path[0:1] = [os.path.join(folder, "src"), folder]
            outcome = getattr(importlib.import_module("main"), function)(**parameters)
            if inspect.isgenerator(outcome):
                tell("stream")
                for piece in outcome:
                    tell("piece", piece)
                tell("end")
            else:
                tell("value", outcome)
        except Exception as error:  # noqa: BLE001 - whatever it is, the gateway is told
            traceback.print_exc()
            tell("error", _told(error))


def _told(error: Exception) -> dict[str, str]:
    return {"message": str(error), "type": getattr(error, "type", type(error).__name__)}


# --- Running calls --------------------------------------------------------------------

_CALL_FIELDS = ("prefab_id", "version", "function_name")


def _parse_calls(request: _Request) -> list[dict[str, Any]]:
    """The calls of a request, every field checked that is used below."""
    calls: list[dict[str, Any]] = _field(request.json(), "calls", list, "body")
    for index, call in enumerate(calls):
        loc = ("body", "calls", index)
        _checked(call, dict, *loc)
        for name in _CALL_FIELDS:
            _field(call, name, str, *loc)
        inputs = _field(call, "inputs", dict, *loc)
        _checked(inputs.get("parameters", {}), dict, *loc, "inputs", "parameters")
        for key, urls in _checked(inputs.get("files", {}), dict, *loc, "inputs", "files").items():
            for url in _checked(urls, list, *loc, "inputs", "files", key):
                _checked(url, str, *loc, "inputs", "files", key)
    return calls


class _Runner:
    """The directory of prefabs, the users' secrets, and the calls."""

    def __init__(self, gateway: LocalGateway) -> None:
        self._gateway = gateway
        self._prefabs: dict[tuple[str, str], _Prefab] = {}  # newest last
        self._secrets: dict[tuple[str, str, str], str] = {}  # of user, prefab and name
        self._used = 0
        self._lock = threading.Lock()

    def add(self, prefab: _Prefab) -> None:
        with self._lock:
            key = (prefab.spec["id"], prefab.spec["version"])
            self._prefabs.pop(key, None)
            self._prefabs[key] = prefab

    def prefabs(self) -> list[dict[str, Any]]:
        """The entries of all prefabs, newest first."""
        with self._lock:
            return [prefab.entry for prefab in self._prefabs.values()][::-1]

    def list_prefabs(self, request: _Request, _: _Caller) -> _Answer:
        status = request.query.get("status")
        return _json_answer([entry for entry in self.prefabs()
                             if status in (None, entry["deployment_status"])])

    def spec(self, _: _Request, __: _Caller, prefab_id: str, version: str) -> _Answer:
        return _json_answer(self._prefab(prefab_id, version).spec)

    def _prefab(self, prefab_id: str, version: str) -> _Prefab:
        prefab = self._prefabs.get((prefab_id, version))
        if prefab is None:
            raise _refusal(404, f"Prefab {prefab_id}@{version} not found")
        return prefab

    def set_secret(self, request: _Request, caller: _Caller) -> _Answer:
        body = request.json()
        fields = ("prefab_id", "secret_name", "secret_value")
        prefab_id, name, value = [_field(body, field, str, "body") for field in fields]
        with self._lock:
            self._secrets[caller.user_id, prefab_id, name] = value
        return _Answer(204)

    def _secrets_of(self, caller: _Caller) -> dict[tuple[str, str], str]:
        """The values of a user's secrets by prefab and name."""
        with self._lock:
            return {(prefab_id, name): value for (user, prefab_id, name), value
                    in sorted(self._secrets.items()) if user == caller.user_id}

    def list_secrets(self, _: _Request, caller: _Caller) -> _Answer:
        pairs = [dict(zip(("prefab_id", "secret_name"), pair)) for pair in self._secrets_of(caller)]
        return _json_answer({"secrets": pairs})

    def list_prefab_secrets(self, _: _Request, caller: _Caller, prefab_id: str) -> _Answer:
        names = [name for owner, name in self._secrets_of(caller) if owner == prefab_id]
        return _json_answer({"prefab_id": prefab_id, "secret_names": names})

    def delete_secret(self, _: _Request, caller: _Caller, prefab_id: str, name: str) -> _Answer:
        with self._lock:
            if self._secrets.pop((caller.user_id, prefab_id, name), None) is None:
                raise _refusal(404, f"Secret '{name}' for prefab '{prefab_id}' not found")
        return _Answer(204)

    def run(self, request: _Request, caller: _Caller) -> _Answer:
        """Run the calls of one POST one after another; the first HTTP error ends it."""
        calls = _parse_calls(request)
        self._charge(len(calls))
        job_id = str(uuid.uuid4())
        results: list[dict[str, Any]] = []
        for call in calls:
            with contextlib.ExitStack() as cleanup, _faults_of(call):
                try:
                    job, outcome = self._begin(call, caller, cleanup)
                    if isinstance(outcome, Generator) and len(calls) == 1:
                        events = self._events(job_id, job, outcome, cleanup.pop_all())
                        return _Answer(200, events, {"content-type": "text/event-stream"})
                    output = self._output(job, outcome)
                    results.append({"status": "SUCCESS", "output": output, "error": None})
                except CallFailed as failure:
                    results.append({"status": "FAILED", "output": None, "error": _told(failure)})
        done = all(result["status"] == "SUCCESS" for result in results)
        status = "COMPLETED" if done else "PARTIAL_SUCCESS"
        try:
            return _json_answer({"job_id": job_id, "status": status, "results": results})
        except (TypeError, ValueError, RecursionError) as error:
            raise _refusal(503, f"A prefab returned what JSON cannot carry: {error}") from error

    def _charge(self, count: int) -> None:
        quota = self._gateway.quota
        with self._lock:
            if quota is None or self._used + count <= quota:
                self._used += count
                return
            raise _refusal(429, {
                "error_code": "QUOTA_EXCEEDED", "message": "The quota of calls is used up",
                "limit": quota, "used": self._used, "quota_type": "calls",
            })

    def _begin(self, call: Mapping[str, Any], caller: _Caller,
               cleanup: contextlib.ExitStack) -> tuple[_Job, Any]:
        """Check the call against its prefab and run it; a stream has then only begun."""
        prefab_id, version, name = (call[field] for field in _CALL_FIELDS)
        prefab = self._prefab(prefab_id, version)
        if prefab.status != "deployed":
            raise _refusal(404, f"Prefab {prefab_id}@{version} is not deployed")
        if name not in prefab.functions:
            raise _refusal(404, f"Function {name} not found in prefab {prefab_id}")
        function, files = prefab.functions[name], call["inputs"].get("files", {})
        job = _Job(
            caller, _parameters(function, call["inputs"].get("parameters", {})),
            {key: self._inputs(key, urls, caller) for key, urls in files.items()},
            self._needed_secrets(prefab_id, function, caller),
            self._gateway.closing, self._gateway.store.new_folder(), cleanup,
        )
        self._gateway.executed.append((prefab_id, version, name))
        return job, prefab.runs[name](job)

    def _inputs(self, key: str, urls: Sequence[str], caller: _Caller) -> list[Path]:
        if key != _safe_name(key):
            raise _refusal(422, f"Invalid name of input files: {key}")
        files = [self._gateway.store.find_url(url, caller) for url in urls]
        if None in files:
            message = f"Input file not found: {urls[files.index(None)]}"
            raise CallFailed(message, "InputFileNotFound")
        return [file.path for file in files if file]

    def _needed_secrets(self, prefab_id: str, function: Mapping[str, Any],
                        caller: _Caller) -> dict[str, str]:
        values = {name: value for (owner, name), value in self._secrets_of(caller).items()
                  if owner == prefab_id}
        for secret in function["secrets"]:
            name = secret["name"]
            if secret["required"] and name not in values:
                message = f"Secret '{name}' for prefab '{prefab_id}' is not configured"
                raise _refusal(400, {
                    "error_code": "MISSING_SECRET", "message": message, "prefab_id": prefab_id,
                    "secret_name": name, "instructions": secret["instructions"],
                })
        return values

    def _output(self, job: _Job, outcome: Any) -> dict[str, Any]:
        """The envelope of what a function returned."""
        if isinstance(outcome, Generator):  # no stream of events among the results of several calls
            pieces = list(outcome)
            only_text = all(isinstance(piece, str) for piece in pieces)
            outcome = "".join(pieces) if only_text else pieces
        return {"status": "SUCCESS", "output": outcome, "files": self._output_files(job)}

    def _output_files(self, job: _Job) -> dict[str, list[str]]:
        """Move what the function left in its outputs folder into the storage."""
        files: dict[str, list[str]] = {}
        if not job.folder.exists():  # as after most calls
            return files
        store = self._gateway.store
        folder = f"agent-outputs/{job.caller.user_id}/{job.caller.agent_id or 'no-agent'}"
        for path in sorted(job.outputs.rglob("*")):
            if path.is_file() and not path.is_symlink():
                parts = path.relative_to(job.outputs).parts
                key = parts[0] if len(parts) > 1 else "output"
                url = store.keep(store.new_key(folder, path.name), path)
                files.setdefault(key, []).append(url)
        return files

    def _events(self, job_id: str, job: _Job, pieces: Generator[Any, None, None],
                cleanup: contextlib.ExitStack) -> Generator[bytes, None, None]:
        """The event stream of a function; ends it when the client is gone."""
        with cleanup, contextlib.closing(pieces):
            yield _event_bytes({"type": "start", "data": {"job_id": job_id}})
            try:
                for piece in pieces:
                    is_event = isinstance(piece, dict) and piece.get("type") in EVENT_TYPES
                    yield _event_bytes(piece if is_event else {"type": "content", "data": piece})
                done = {"job_id": job_id, "files": self._output_files(job)}
                yield _event_bytes({"type": "done", "data": done})
            except Exception as error:  # whatever the function raises ends its stream
                logger.info("a stream ended with %r", error, exc_info=True)
                yield _event_bytes({"type": "error", "data": _told(error)})


def _event_bytes(event: dict[str, Any]) -> bytes:
    return b"data: " + _json_bytes(event) + b"\n\n"


@contextlib.contextmanager
def _faults_of(call: Mapping[str, Any]) -> Iterator[None]:
    """Whatever else a prefab does wrong is a 503, as behind the deployed server."""
    try:
        yield
    except _Refusal:
        raise
    except Exception as error:
        prefab, told = f"{call['prefab_id']}@{call['version']}", _told(error)
        logger.info("%s failed", prefab, exc_info=True)
        message = f"Prefab {prefab} failed: {told['type']}: {told['message']}"
        raise _refusal(503, message) from error


# --- The prefabs that come with it ----------------------------------------------------


def _statistics(text: str) -> dict[str, Any]:
    """Count the characters, words and lines of a text, and its most common words."""
    words = text.split()
    common = Counter(word.lower().strip(".,;:!?\"'()") for word in words).most_common(5)
    return {
        "success": True, "message": f"{len(words)} words",
        "characters": len(text), "words": len(words), "lines": len(text.splitlines()),
        "most_common": [{"word": word, "count": count} for word, count in common],
    }


def _words(text: str, delay: float = 0.0) -> Iterator[str]:
    """Stream a text word by word, `delay` seconds apart; joined they are the text again."""
    for match in re.finditer(r"^\s+|\S+\s*", text):
        yield match[0]
        if delay:
            time.sleep(delay)


def _echo(value: Any) -> Any:
    """Give back the value."""
    return value


def _find(text: str, pattern: str) -> dict[str, Any]:
    """Find all matches of a regular expression."""
    try:
        matches = [{"start": m.start(), "text": m[0]} for m in re.finditer(pattern, text)]
    except re.error as error:
        return {"success": False, "error": str(error), "error_code": "BAD_PATTERN"}
    return {"success": True, "message": f"{len(matches)} matches", "matches": matches}


_Inputs = dict[str, list[Path]]  # names to files


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def _checksum(inputs: _Inputs, outputs: Path) -> dict[str, Any]:
    """Write the SHA-256 sums of the input files `files` into the file `checksums`."""
    sums = [{"name": path.name, "sha256": _sha256(path)} for path in _given(inputs)]
    lines = [f"{entry['sha256']}  {entry['name']}\n" for entry in sums]
    (outputs / "checksums").mkdir()
    (outputs / "checksums" / "SHA256SUMS.txt").write_text("".join(lines), encoding="utf-8")
    return {"success": True, "message": f"{len(sums)} files", "checksums": sums}


def _line_count(inputs: _Inputs) -> dict[str, Any]:
    """Count the lines of the input files `files`."""
    total = 0
    for path in _given(inputs):
        with path.open("rb") as file:
            total += sum(1 for _ in file)
    return {"success": True, "message": f"{total} lines", "lines": total}


def _concatenate(inputs: _Inputs, outputs: Path, name: str = "all.txt") -> dict[str, Any]:
    """Join the input files `files` into one output file."""
    with (outputs / _safe_name(name)).open("wb") as target:
        for path in _given(inputs):
            with path.open("rb") as source:
                shutil.copyfileobj(source, target, BLOCK_BYTES)
        size = target.tell()
    return {"success": True, "message": f"{size} bytes", "size": size}


def _inspect(inputs: _Inputs) -> Iterator[Any]:
    """Stream name, size and SHA-256 of the input files `files`, and the progress."""
    paths = _given(inputs)
    for done, path in enumerate(paths, 1):
        yield {"name": path.name, "size": path.stat().st_size, "sha256": _sha256(path)}
        yield {"type": "progress", "data": {"done": done, "total": len(paths)}}


def _given(inputs: _Inputs) -> list[Path]:
    if not inputs.get("files"):
        raise CallFailed("Give the input files under the key 'files'", "NoInputFiles")
    return inputs["files"]


def _sign(text: str, secrets: dict[str, str]) -> dict[str, Any]:
    """Sign a text with the caller's own key (HMAC-SHA256)."""
    digest = hmac.new(secrets["SIGNING_KEY"].encode(), text.encode(), hashlib.sha256)
    return {"success": True, "message": "signed", "signature": digest.hexdigest()}


def _fail(message: str = "This always fails") -> dict[str, Any]:
    """Report a business failure: the call succeeds, its result says it does not."""
    return {"success": False, "error": message, "error_code": "ALWAYS_FAILS"}


def _crash(message: str = "out of order") -> None:
    """Raise an error: the whole request is answered 503."""
    raise RuntimeError(message)


def _refuse(message: str = "refused") -> None:
    """End this call as FAILED; the others of the request go on."""
    raise CallFailed(message, "Refused")


def _slow(closing: threading.Event, seconds: float = 1.0) -> dict[str, Any]:
    """Answer after some seconds."""
    closing.wait(seconds)
    return {"success": True, "message": f"{seconds} seconds"}


def _stumble(text: str = "as far as it goes ") -> Iterator[str]:
    """Stream the words of a text, then break off with an error event."""
    yield from _words(text)
    raise RuntimeError("stumbled")


def _not_numbers() -> dict[str, Any]:
    """Return what JSON has no numbers for: it arrives as null."""
    return {"success": True, "nan": math.nan, "infinity": math.inf}


_Functions = Mapping[str, Callable[..., Any]]
_SIGNING_KEY = {
    "name": "SIGNING_KEY",
    "description": "The key of your signatures",
    "instructions": "Any text that only you know; store it with POST /v1/secrets",
}


def _add_own_prefabs(gateway: LocalGateway) -> None:
    texts: _Functions = {"statistics": _statistics, "words": _words, "echo": _echo}
    files: _Functions = {"checksum": _checksum, "line_count": _line_count,
                         "concatenate": _concatenate, "inspect": _inspect}
    faults: _Functions = {"fail": _fail, "crash": _crash, "refuse": _refuse, "slow": _slow,
                          "stumble": _stumble, "not_numbers": _not_numbers}
    add = gateway.add_prefab
    add("faulty", "1.0.0", faults, description="Errors on demand", tags=["test"])
    add("vault", "1.0.0", {"sign": _sign}, description="Needs a secret", secrets=[_SIGNING_KEY])
    add("file-tools", "1.0.0", files, description="Looks at files", tags=["files"])
    add("text-tools", "1.0.0", texts, description="Looks at texts", tags=["text"])
    newer = {**texts, "find": _find}
    add("text-tools", "1.1.0", newer, description="Looks at texts", tags=["text"])


# --- The gateway ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReceivedRequest:
    """A request as the gateway received it: what a test looks at."""

    method: str
    path: str  # with the query
    headers: Mapping[str, str]  # names in lower case
    body: bytes  # of JSON requests only


class LocalGateway:
    """A Gateway on 127.0.0.1. A context manager: serves inside the `with`.

    Args:
        prefab_folders: Folders of prefabs to serve besides those that come with it; a ValueError if
            such a folder or its manifest is not what it should be.
        port: 0 takes any free one; `base_url` tells which.
        allow_list: Whether requests without credentials are admitted, as a user without an agent.
        any_credential: Whether any credential is admitted, each as a user of its own. Any
            `X-Internal-Token` is then that of an agent.
        idle_timeout: Seconds after which an idle connection is closed, unannounced.
    """

    def __init__(self, *prefab_folders: str | os.PathLike[str], port: int = 0,
                 allow_list: bool = True, any_credential: bool = False,
                 idle_timeout: float = IDLE_SECONDS) -> None:
        self.base_url = ""  # known once it serves
        self.internal_token = f"agent-{uuid.uuid4().hex}"  # of an agent; the others are without one
        self.api_key = f"key-{uuid.uuid4().hex}"  # for `X-API-Key`, or to be exchanged for a token
        self.jwt_token = f"jwt-{uuid.uuid4().hex}"
        self.allow_list, self.any_credential = allow_list, any_credential
        self.down = False  # set it, and every gateway request is answered 503
        self.quota: int | None = None  # calls allowed in total
        self.requests: deque[ReceivedRequest] = deque(maxlen=10_000)  # the last ones
        self.executed: list[tuple[str, str, str]] = []  # prefab id, version, function of each call
        self.closing = threading.Event()  # given to functions that ask for it
        self._port, self._idle_timeout = port, idle_timeout
        self._resources = contextlib.ExitStack()
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._callers: dict[tuple[str, str], _Caller | None] = {  # None: expired
            ("x-internal-token", self.internal_token): _Caller(USER, AGENT),
            ("x-api-key", self.api_key): _Caller(USER),
            ("authorization", f"Bearer {self.jwt_token}"): _Caller(USER),
        }
        self._runner = _Runner(self)
        _add_own_prefabs(self)
        self._processes: set[subprocess.Popen[bytes]] = set()
        for folder in prefab_folders:
            self._runner.add(_load_prefab(Path(folder).resolve(), self._processes))

    def add_prefab(self, prefab_id: str, version: str,
                   functions: _Functions, *, name: str = "",
                   description: str = "", tags: Iterable[str] = (),
                   secrets: Iterable[str | Mapping[str, Any]] = (),
                   status: str = "deployed") -> None:
        """Serve plain Python functions as a prefab; a generator function streams.

        A function that names one of these parameters gets it from the gateway: `inputs` (name to
        paths of the input files, to be read only), `outputs` (a folder; what is left there is given
        back), `secrets` (name to value), `closing` (an event, set when the gateway closes).

        Args:
            secrets: Names, or manifest entries with `name`, `description`, `instructions` and
                `required`. Functions that take `secrets` are not run without the required ones.
            status: "deployed", or "failed": then it is listed but cannot be called.
        """
        manifest = {
            "id": prefab_id, "version": version, "name": name, "description": description,
            "tags": list(tags), "secrets": list(secrets),
            "functions": [_describe(key, function) for key, function in functions.items()],
        }
        runs = {key: _call_python(function) for key, function in functions.items()}
        self._runner.add(_Prefab(manifest, runs, status))

    def prefabs(self) -> list[dict[str, Any]]:
        """The directory's entries, newest first."""
        return self._runner.prefabs()

    def expire_tokens(self) -> None:
        """Refuse the tokens that were issued for API keys up to now."""
        for header, value in list(self._callers):
            if value.startswith("user-"):
                self._callers[header, value] = None

    def __enter__(self) -> LocalGateway:
        with contextlib.ExitStack() as resources:
            listener = socket.create_server(("127.0.0.1", self._port), backlog=128)
            resources.enter_context(listener)
            self.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            folder = resources.enter_context(tempfile.TemporaryDirectory())
            self.store = _Store(Path(folder).resolve(), self.base_url)
            self._routes = self._make_routes()
            acceptor = threading.Thread(target=self._accept, args=[listener], daemon=True)
            acceptor.start()
            resources.callback(self._end_connections)
            resources.callback(self._end_accepting, listener, acceptor)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:  # that client is gone already, or too many are here
                time.sleep(0.01)
                continue
            if self.closing.is_set():
                sock.close()
                return
            thread = threading.Thread(target=self._serve, args=[sock], daemon=True)
            self._connections[thread] = sock
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        _Connection(sock, self._handle, self._idle_timeout).serve()
        self._connections.pop(threading.current_thread(), None)

    def _end_accepting(self, listener: socket.socket, acceptor: threading.Thread) -> None:
        self.closing.set()
        # `accept` returns for a client, and on some systems for nothing else.
        socket.create_connection(listener.getsockname()).close()
        acceptor.join()

    def _end_connections(self) -> None:
        for process in list(self._processes):
            process.terminate()
        connections = list(self._connections.items())
        for _, sock in connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread, _ in connections:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _make_routes(self) -> list[tuple[str, re.Pattern[str], Callable[..., _Answer]]]:
        runner, files = self._runner, self.store
        table: list[tuple[str, str, Callable[..., _Answer]]] = [
            ("POST", "/v1/internal/run", runner.run),
            ("POST", "/v1/run", runner.run),
            ("GET", "/v1/prefabs", runner.list_prefabs),
            ("GET", "/v1/prefabs/{}/{}/spec", runner.spec),
            ("POST", "/v1/secrets", runner.set_secret),
            ("GET", "/v1/secrets", runner.list_secrets),
            ("GET", "/v1/secrets/{}", runner.list_prefab_secrets),
            ("DELETE", "/v1/secrets/{}/{}", runner.delete_secret),
            ("POST", "/v1/auth/convert_to_internal_token", self._exchange),
            ("POST", "/internal/files/generate_upload_url", files.generate_upload_url),
            ("POST", "/internal/files/upload", files.upload),
            ("POST", "/internal/files/upload_temp", files.upload_temp),
            ("GET", "/internal/files/download", files.download),
            ("GET", "/internal/files/list", files.list),
            ("GET", "/internal/files/list_temp", files.list_temp),
            ("DELETE", "/internal/files/cleanup_temp", files.cleanup_temp),
        ]
        return [(method, re.compile(path.replace("{}", "([^/]+)")), handler)
                for method, path, handler in table]

    def _handle(self, request: _Request) -> _Answer:
        """The answer to any request."""
        started = time.perf_counter()
        try:
            answer = self._dispatch(request)
        except _Refusal as refusal:
            answer = refusal.answer
        except OSError:  # in the middle of the body
            raise
        except Exception:
            logger.exception("%s %s", request.method, request.path)
            text = {"content-type": "text/plain; charset=utf-8"}
            answer = _Answer(500, b"Internal Server Error", text)
        milliseconds = (time.perf_counter() - started) * 1000
        logger.debug("%s %s %d %.1f ms", request.method, request.path, answer.status, milliseconds)
        return answer

    def _dispatch(self, request: _Request) -> _Answer:
        if request.headers.get("content-type", "").startswith("application/json"):
            request.content = b"".join(request.blocks())
        self.requests.append(
            ReceivedRequest(request.method, request.target, request.headers, request.content))
        if request.path.startswith("/storage/"):
            return self.store.handle(request)
        if self.down:
            raise _refusal(503, "The gateway is down")
        handler, arguments = self._find_route(request)
        return handler(request, self._caller(request), *arguments)

    def _find_route(self, request: _Request) -> tuple[Callable[..., _Answer], Sequence[str]]:
        path_exists = False
        for method, pattern, handler in self._routes:
            match = pattern.fullmatch(request.path)
            if match and method == request.method:
                return handler, match.groups()
            path_exists = path_exists or match is not None
        raise _refusal(405, "Method Not Allowed") if path_exists else _refusal(404, "Not Found")

    def _caller(self, request: _Request) -> _Caller:
        """Who sent the request, by a credential that this endpoint takes."""
        taken = {"/v1/internal/run": CREDENTIAL_HEADERS[:1], "/v1/run": CREDENTIAL_HEADERS[1:]}
        given = [header for header in CREDENTIAL_HEADERS if header in request.headers]
        if request.path == "/v1/auth/convert_to_internal_token":
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() == "bearer":
                return self._known_caller("x-api-key", key)
        elif not given and self.allow_list and request.path != "/v1/run":
            return _Caller(USER)
        else:
            for header in taken.get(request.path, CREDENTIAL_HEADERS):
                if header in given:
                    return self._known_caller(header, request.headers[header])
        raise _refusal(401, "Not authenticated")

    def _known_caller(self, header: str, value: str) -> _Caller:
        stranger = _stranger(header, value) if self.any_credential and value else None
        caller = self._callers.get((header, value), stranger)
        if caller is None:
            raise _refusal(401, "Could not validate credentials")
        return caller

    def _exchange(self, _: _Request, caller: _Caller) -> _Answer:
        token = f"user-{uuid.uuid4().hex}"
        self._callers["x-internal-token", token] = caller
        return _json_answer({"internal_token": token})


def _stranger(header: str, value: str) -> _Caller:
    """A user made up for a credential: the same one every time."""
    user_id = f"user-{hashlib.sha256(value.encode('latin-1')).hexdigest()[:12]}"
    return _Caller(user_id, AGENT if header == "x-internal-token" else None)


@contextlib.contextmanager
def environment(credential: str = "agent") -> Iterator[LocalGateway | None]:
    """Provide a gateway for `GatewayClient.from_env()`: the environment's, or one of our own.

    If `GATEWAY_BASE_URL` is set, that one is used as it is, and the value is None. Otherwise a
    local gateway serves inside the `with`, and the environment names it and its credential.

    Args:
        credential: "agent" for an agent's token, "api_key", or "none" for the allow-list.
    """
    if os.environ.get("GATEWAY_BASE_URL"):
        yield None
        return
    with LocalGateway() as gateway:
        variables = {
            "GATEWAY_BASE_URL": gateway.base_url,
            "X_INTERNAL_TOKEN": gateway.internal_token if credential == "agent" else "",
            "AGENT_BUILDER_API_KEY": gateway.api_key if credential == "api_key" else "",
            "GATEWAY_JWT_TOKEN": "",
        }
        before = {name: os.environ.get(name) for name in variables}
        try:
            for name, value in variables.items():
                _set_variable(name, value)
            yield gateway
        finally:
            for name, old in before.items():
                _set_variable(name, old)


def _set_variable(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value:
        os.environ[name] = value


# --- The command line -----------------------------------------------------------------


def _announce(gateway: LocalGateway) -> None:
    print(f"export GATEWAY_BASE_URL={gateway.base_url}")
    print(f"export X_INTERNAL_TOKEN={gateway.internal_token}  # an agent's, as agent files need it")
    print("# or, instead of that token, one of:")
    print(f"# export AGENT_BUILDER_API_KEY={gateway.api_key}")
    print(f"# export GATEWAY_JWT_TOKEN={gateway.jwt_token}")
    print("# prefabs:")
    for prefab in gateway.prefabs():
        functions = ", ".join(function["name"] for function in prefab["functions"])
        print(f"#   {prefab['id']} {prefab['version']}: {functions}")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; the exit status."""
    parser = argparse.ArgumentParser(description="Serve a Gateway on this machine.")
    add = parser.add_argument
    add("--port", type=int, default=8080, help="0 takes any free one (default: %(default)s)")
    add("--prefab", action="append", default=[], metavar="DIR", help="a prefab folder to serve")
    add("--any-credential", action="store_true", help="admit any credential")
    add("--quota", type=int, metavar="N", help="answer calls after the first N with 429")
    add("--down", action="store_true", help="answer everything with 503")
    add("-v", "--verbose", action="store_true", help="log every request")
    arguments = parser.parse_args(argv)
    level = logging.DEBUG if arguments.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with LocalGateway(*arguments.prefab, port=arguments.port,
                          any_credential=arguments.any_credential) as gateway:
            gateway.quota, gateway.down = arguments.quota, arguments.down
            _announce(gateway)
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:  # the way to stop it
        return 0
    except (OSError, OverflowError, ValueError) as error:  # a taken port, a broken manifest
        print(f"local_gateway: {error} (--port 0 takes any free port)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    if sys.argv[1:] == [_CHILD_FLAG]:
        _child_main()
    else:
        sys.exit(main())
