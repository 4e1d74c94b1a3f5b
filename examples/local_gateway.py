"""A Gateway on this machine, for developing, testing and trying things out offline.

It is a real HTTP server on 127.0.0.1 that speaks the Gateway's whole protocol. Prefabs are plain
Python functions, files lie in a folder behind signed URLs that expire, and every error comes where
the Gateway would send it. As a program it serves until it is stopped:

    python examples/local_gateway.py --port 8080 --prefab path/to/my-prefab

and in code it is a context manager:

    with LocalGateway("path/to/my-prefab") as gateway:
        client = GatewayClient(gateway.base_url, internal_token=gateway.internal_token)

A prefab folder holds `prefab-manifest.json` and `src/main.py`. Its functions are called by name,
generators stream, input files are in `data/inputs/<key>/`, files left in `data/outputs/<key>/` are
given back, and secrets are environment variables. Edits of the code take effect with the next call.

From top to bottom: answers, requests, multipart, storage, prefabs, prefab folders, running calls,
the prefabs that come with it, the gateway, the command line.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import dataclasses
import hashlib
import hmac
import importlib.util
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
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, Callable, NoReturn
from urllib.parse import parse_qsl, quote, unquote, urlencode

__all__ = ["CallFailed", "LocalGateway", "ReceivedRequest", "environment", "main"]

BLOCK_BYTES = 256 * 1024  # of file bodies: large enough for speed, small enough for the CPU's cache
HEAD_LINE_BYTES = 64 * 1024
IDLE_SECONDS = 5.0  # as the deployed server: it hangs up on an idle connection, unannounced
TRANSFER_SECONDS = 60.0  # the longest wait for bytes in the middle of a request or an answer
GRACE_SECONDS = 2.0  # for a prefab's process to end by itself
CLOSE_SECONDS = 3.0  # for calls under way to end when the gateway closes
USER, AGENT, NO_AGENT = "local-user", "local-agent", "no-agent"
EVENT_TYPES = frozenset({"start", "content", "progress", "done", "error"})
CREDENTIAL_HEADERS = ("x-internal-token", "x-api-key", "authorization")

logger = logging.getLogger("local_gateway")


class CallFailed(Exception):  # noqa: N818 - reads as what it says: raise CallFailed(...)
    """Raised by a prefab function to end its call as FAILED, with this message and type."""

    def __init__(self, message: str, type: str = "CallFailed") -> None:  # noqa: A002
        super().__init__(message)
        self.message = message
        self.type = type


# --- Answers ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _FileSlice:
    """A stretch of an open file that is to be sent, and the file closed after it."""

    file: BinaryIO
    offset: int
    count: int


@dataclasses.dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes | _FileSlice | Generator[bytes, None, None] = b""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hang_up: bool = False


class _Refusal(Exception):  # noqa: N818 - an answer on its way out, not always an error
    """Ends the handling of a request with an answer other than a success."""

    def __init__(self, answer: _Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def _json_answer(value: Any, status: int = 200) -> _Answer:
    return _Answer(status, _json_bytes(value), {"content-type": "application/json"})


def _refusal(status: int, detail: Any) -> _Refusal:
    return _Refusal(_json_answer({"detail": detail}, status))


def _storage_refusal(status: int, code: str, message: str, **headers: str) -> _Refusal:
    """An error in the storage's own language, which is XML."""
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    )
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers["content-type"] = "application/xml"
    return _Refusal(_Answer(status, body.encode(), headers))


_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _json_bytes(value: Any) -> bytes:
    """The value as JSON, with null for NaN and the infinities as the Gateway does it.

    Raises:
        TypeError, ValueError, RecursionError: it holds something that JSON cannot carry.
    """
    try:
        text = _encode_json(value)
    except ValueError:  # NaN is rare: the slow copy is made only when there is one
        text = _encode_json(_without_nan(value))
    return text.encode("utf-8", "replace")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


# --- Requests --------------------------------------------------------------------------


class _Body:
    """A request's body as it comes from the socket, by length or in chunks."""

    def __init__(
        self, reader: BinaryIO, headers: Mapping[str, str], invite: Callable[[], None]
    ) -> None:
        self.chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        length = headers.get("content-length")
        if length is not None and not (length.isascii() and length.isdigit()):
            raise _refusal(400, "Invalid Content-Length")
        self.length = None if length is None or self.chunked else int(length)
        self._reader = reader
        self._left = self.length or 0
        self._more_chunks = self.chunked
        self._invite = invite
        self.awaited = headers.get("expect", "").lower() == "100-continue"

    def read(self, size: int = BLOCK_BYTES) -> bytes:
        """The next `size` bytes, fewer at the end of a chunk or of the body, b"" after it."""
        if self.awaited:
            self.awaited = False
            self._invite()
        if self._more_chunks and not self._left:
            self._start_chunk()
        wanted = min(size, self._left)
        data = self._reader.read(wanted)
        if len(data) < wanted:
            raise ConnectionResetError("the client hung up in the middle of a body")
        self._left -= wanted
        if self._more_chunks and not self._left:
            self._reader.readline()  # the line break that ends a chunk
        return data

    def _start_chunk(self) -> None:
        try:
            self._left = int(self._reader.readline(HEAD_LINE_BYTES).partition(b";")[0], 16)
        except ValueError:
            raise ConnectionResetError("broken chunk") from None
        if not self._left:
            self._more_chunks = False
            while self._reader.readline(HEAD_LINE_BYTES).strip():
                pass  # trailers

    def blocks(self) -> Iterator[bytes]:
        """What is left of the body, block by block."""
        return iter(self.read, b"")


@dataclasses.dataclass
class _Request:
    method: str
    target: str  # path and query as they came
    path: str  # decoded
    headers: dict[str, str]  # names in lower case
    body: _Body
    content: bytes = b""  # of a JSON request

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    def query_number(self, name: str, default: int, largest: int) -> int:
        """An integer of the query between 1 and `largest`."""
        text = self.query.get(name, str(default))
        if re.fullmatch(r"\d{1,9}", text) and 1 <= int(text) <= largest:
            return int(text)
        message = f"Input should be an integer between 1 and {largest}"
        raise _refusal(422, [_problem(["query", name], message, "int_range", text)])

    def query_text(self, name: str) -> str:
        if name not in self.query:
            raise _refusal(422, [_problem(["query", name], "Field required", "missing", None)])
        return self.query[name]


def _problem(loc: Sequence[Any], message: str, kind: str, value: Any) -> dict[str, Any]:
    return {"type": kind, "loc": list(loc), "msg": message, "input": value}


class _JsonReader:
    """Takes a JSON body apart and notes all that is wrong with it, as the Gateway does."""

    _KINDS: Mapping[type, tuple[str, str]] = {
        str: ("Input should be a valid string", "string_type"),
        list: ("Input should be a valid list", "list_type"),
        dict: ("Input should be a valid dictionary", "dict_type"),
    }

    def __init__(self) -> None:
        self.problems: list[dict[str, Any]] = []

    def document(self, request: _Request) -> dict[str, Any]:
        """The body, an object; anything else is refused at once."""
        try:
            text = request.content.decode("utf-8")
        except UnicodeDecodeError:
            raise _refusal(400, "There was an error parsing the body") from None
        if not text:
            raise _refusal(422, [_problem(["body"], "Field required", "missing", None)])
        try:
            value = json.loads(text)
        except ValueError as error:
            loc = ["body", getattr(error, "pos", 0)]
            raise _refusal(422, [_problem(loc, "JSON decode error", "json_invalid", {})]) from None
        value = self.checked(value, dict, ["body"])
        self.refuse_if_wrong()
        return dict(value)

    def checked(self, value: Any, kind: type, loc: Sequence[Any]) -> Any:
        """The value; an empty one of the right kind, and a note, if it is of another kind."""
        if isinstance(value, kind):
            return value
        self.problems.append(_problem(loc, *self._KINDS[kind], value))
        return kind()

    def field(
        self, owner: Mapping[str, Any], name: str, kind: type, loc: Sequence[Any], *,
        required: bool = True,
    ) -> Any:  # fmt: skip
        """A field of an object, checked; an empty value where an optional one is missing."""
        if name in owner:
            return self.checked(owner[name], kind, [*loc, name])
        if required:
            self.problems.append(_problem([*loc, name], "Field required", "missing", dict(owner)))
        return kind()

    def refuse_if_wrong(self) -> None:
        if self.problems:
            raise _refusal(422, self.problems)


@dataclasses.dataclass(frozen=True)
class _Caller:
    user_id: str
    agent_id: str | None = None

    def agent_folder(self, area: str) -> str:
        """Where this caller's agent has its files in `area` of the storage."""
        if self.agent_id is None:
            message = "This operation needs an agent context: use a token given to an agent"
            raise _refusal(400, {"error_code": "MISSING_AGENT_CONTEXT", "message": message})
        return f"{area}/{self.user_id}/{self.agent_id}"


class _Connection:
    """One client's connection: request after request until either side hangs up."""

    def __init__(
        self, sock: socket.socket, handle: Callable[[_Request], _Answer], idle_seconds: float
    ) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._handle = handle
        self._idle_seconds = idle_seconds
        self._reader = sock.makefile("rb")

    def serve(self) -> None:
        """Answer requests; a broken or idle connection simply ends."""
        with self._sock, self._reader, contextlib.suppress(OSError):
            while self._serve_one():
                pass

    def _serve_one(self) -> bool:
        """Read and answer one request; whether another may follow."""
        self._sock.settimeout(self._idle_seconds)
        try:
            request = self._read_request()
        except _Refusal as refusal:  # where a malformed request ends, nobody knows
            self._send(refusal.answer, closing=True)
            return False
        if request is None:
            return False
        self._sock.settimeout(TRANSFER_SECONDS)
        answer = self._handle(request)
        # A client that was not invited to send its body may or may not do so: that ends it, too.
        closing = request.body.awaited or "close" in request.headers.get("connection", "").lower()
        self._send(answer, closing=closing, bodiless=request.method == "HEAD")
        if closing or answer.hang_up:
            return False
        for _ in request.body.blocks():
            pass  # refused unread; on loopback that is soon over, and a reset could lose the answer
        return True

    def _read_request(self) -> _Request | None:
        line = self._reader.readline(HEAD_LINE_BYTES)
        if not line.endswith(b"\n"):
            return None
        words = line.decode("latin-1").split()
        if len(words) != 3 or words[2] != "HTTP/1.1":
            raise _refusal(400, "Not an HTTP/1.1 request")
        headers: dict[str, str] = {}
        while (line := self._reader.readline(HEAD_LINE_BYTES)) not in (b"\r\n", b"\n"):
            name, colon, value = line.decode("latin-1").partition(":")
            if not line.endswith(b"\n") or not colon:
                raise _refusal(400, "Broken request head")
            headers[name.lower()] = value.strip()
        path = unquote(words[1].partition("?")[0])
        body = _Body(self._reader, headers, self._invite)
        return _Request(words[0], words[1], path, headers, body)

    def _invite(self) -> None:
        self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _send(self, answer: _Answer, *, closing: bool, bodiless: bool = False) -> None:
        body, headers = answer.body, dict(answer.headers)
        if closing:
            headers["connection"] = "close"
        if isinstance(body, bytes):
            if answer.status != 204:
                headers["content-length"] = str(len(body))
            # Head and body in one write: the client's first read finds the whole answer.
            self._sock.sendall(_head(answer.status, headers) + (b"" if bodiless else body))
        elif isinstance(body, _FileSlice):
            headers["content-length"] = str(body.count)
            with body.file:
                self._sock.sendall(_head(answer.status, headers))
                if body.count and not bodiless:
                    self._sock.sendfile(body.file, body.offset, body.count)
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


# --- Multipart -------------------------------------------------------------------------


class _Multipart:
    """The parts of a `multipart/form-data` body (RFC 7578), read in constant memory."""

    def __init__(self, request: _Request) -> None:
        boundary = re.search(
            r'^multipart/form-data.*;\s*boundary=("?)([^";]+)\1',
            request.headers.get("content-type", ""),
            re.IGNORECASE,
        )
        if not boundary:
            raise _refusal(422, [_problem(["body", "file"], "Field required", "missing", None)])
        self._body = request.body
        self._delimiter = b"\r\n--" + boundary[2].rstrip().encode("latin-1")
        self._window = b"\r\n"  # makes the first delimiter look like all the others

    def parts(self) -> Iterator[tuple[str, str | None, Iterator[bytes]]]:
        """Name, file name and content of each part; read the content before the next part."""
        self._skip_to_delimiter()
        while b"".join(self._until(b"\n")).strip() != b"--":
            head = b"\n" + b"".join(self._until(b"\r\n\r\n"))
            parameters = _disposition(head.decode("utf-8", "replace"))
            yield parameters.get("name", ""), parameters.get("filename"), self._content()

    def _skip_to_delimiter(self) -> None:
        for _ in self._content():
            pass

    def _content(self) -> Iterator[bytes]:
        return self._until(self._delimiter)

    def _until(self, delimiter: bytes) -> Iterator[bytes]:
        """What comes before `delimiter`, in pieces; the delimiter itself is dropped."""
        kept = len(delimiter) - 1  # so many bytes may be the beginning of a delimiter cut in two
        while (end := self._window.find(delimiter)) < 0:
            certain = max(0, len(self._window) - kept)
            yield self._window[:certain]
            block = self._body.read()
            if not block:
                raise _refusal(400, "There was an error parsing the body")
            self._window = self._window[certain:] + block
        piece, self._window = self._window[:end], self._window[end + len(delimiter) :]
        yield piece


def _disposition(head: str) -> dict[str, str]:
    """The parameters of a part's Content-Disposition: `name` and perhaps `filename`."""
    line = re.search(r"\ncontent-disposition:([^\r\n]*)", head, re.IGNORECASE)
    parameters: dict[str, str] = {}
    pattern = r';\s*([\w*]+)=(?:"((?:\\["\\]|[^"])*)"|([^;]*))'
    for name, quoted, plain in re.findall(pattern, line[1] if line else ""):
        if name.endswith("*"):  # RFC 5987, as some older clients write it: charset'language'text
            parameters[name[:-1]] = unquote(plain.rpartition("'")[2].strip())
        else:
            parameters.setdefault(name, _unescape(quoted) or plain.strip())
    return parameters


def _unescape(text: str) -> str:
    """A quoted string without its escapes: curl's backslashes, or what browsers write."""
    text = re.sub(r'\\(["\\])', r"\1", text)
    return re.sub("%(22|0D|0A)", lambda match: unquote(match[0]), text, flags=re.IGNORECASE)


# --- Storage ---------------------------------------------------------------------------

_UNSAFE = re.compile(r"[\x00-\x1f\x7f/\\]" if os.name != "nt" else r'[\x00-\x1f\x7f/\\<>:"|?*]')


def _is_safe(name: str) -> bool:
    """Whether the name is one step down in a folder, and nothing else."""
    size = len(name.encode("utf-8", "replace"))
    return bool(name.strip(". ")) and size <= 255 and not _UNSAFE.search(name)


def _safe_name(name: str) -> str:
    """The last part of a client's file name, fit for a folder; its end is what is kept."""
    name = _UNSAFE.sub("_", name.replace("\\", "/").rpartition("/")[2])
    name = name.encode("utf-8", "replace")[-200:].decode("utf-8", "ignore")
    return name if _is_safe(name) else "file"


class _Store:
    """Files in a folder, under the keys that they would have in S3, behind signed URLs.

    A key says all there is to know of a file, so that a folder used again needs no index:
    `area/user/[agent/[session/]]unique/name`. The unique part grows with time, which keeps
    listings in the order of upload, and ends with the second in which a temporary file expires.
    """

    def __init__(self, folder: Path) -> None:
        self._files = folder / "files"
        self._scratch = folder / "scratch"
        self._files.mkdir(parents=True, exist_ok=True)
        self._scratch.mkdir(exist_ok=True)
        self._signing_key = os.urandom(32)

    def new_key(self, folder: str, name: str, ttl_seconds: int | None = None) -> str:
        """A key of its own for every upload, so that files of one name do not collide."""
        expiry = "" if ttl_seconds is None else f"-{int(time.time()) + ttl_seconds}"
        return f"{folder}/{time.time_ns():016x}{uuid.uuid4().hex[:8]}{expiry}/{_safe_name(name)}"

    def find(self, key: str) -> Path | None:
        """The file of a key, if there is one. No key leads out of the storage's folder."""
        parts = key.split("/")
        path = self._files.joinpath(*parts)
        if not 4 <= len(parts) <= 6 or not all(map(_is_safe, parts)) or not path.is_file():
            return None
        if parts[0] == "agent-workspace" and time.time() >= int(parts[-2].rpartition("-")[2]):
            shutil.rmtree(path.parent, ignore_errors=True)
            return None
        return path

    def find_url(self, s3_url: str, caller: _Caller) -> tuple[str, Path] | None:
        """Key and file of the caller's s3 URL. Somebody else's file is as good as none."""
        before, _, key = s3_url.partition("s3://local/")
        path = None if before or key.split("/")[1:2] != [caller.user_id] else self.find(key)
        return (key, path) if path else None

    def scratch(self) -> Path:
        """A path beside the storage, for what is not whole yet."""
        return self._scratch / uuid.uuid4().hex

    def receive(self, blocks: Iterable[bytes]) -> Path:
        """Write a file that is not in the storage yet; if that breaks off, nothing is left."""
        path = self.scratch()
        try:
            with path.open("wb") as file:
                file.writelines(blocks)
        except BaseException:
            path.unlink()
            raise
        return path

    def keep(self, path: Path, key: str) -> str:
        """Move a whole file into the storage; its s3 URL."""
        target = self._files.joinpath(*key.split("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
        return f"s3://local/{key}"

    def listing(self, folder: str) -> Iterator[tuple[str, Path]]:
        """Keys and files below a folder, in the order of their keys."""
        top = self._files.joinpath(*folder.split("/"))
        for path in sorted(path for path in top.rglob("*") if path.is_file()):
            key = path.relative_to(self._files).as_posix()
            if self.find(key):
                yield key, path

    def delete(self, path: Path) -> None:
        """Remove a file and the folder that was its alone."""
        shutil.rmtree(path.parent, ignore_errors=True)

    def presigned(self, method: str, key: str, expires_in: int, content_type: str = "") -> str:
        """Path and query that allow this one method on this one key for `expires_in` seconds."""
        date = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        query = {
            "X-Amz-Algorithm": "LOCAL-HMAC-SHA256",
            "X-Amz-Date": date,
            "X-Amz-Expires": str(expires_in),
            "X-Amz-SignedHeaders": "content-type;host" if content_type else "host",
            "X-Amz-Signature": self._signature(method, key, date, str(expires_in), content_type),
        }
        return f"/storage/{quote(key)}?{urlencode(query)}"

    def _signature(self, *parts: str) -> str:
        message = "\n".join(parts).encode("utf-8", "surrogateescape")
        return hmac.new(self._signing_key, message, hashlib.sha256).hexdigest()

    def handle(self, request: _Request) -> _Answer:
        """Answer a request that came by a presigned URL."""
        if any(header in request.headers for header in CREDENTIAL_HEADERS):
            raise _storage_refusal(400, "InvalidArgument", "Only one auth mechanism allowed")
        key = request.path[len("/storage/") :]
        self._check_signature(request, key)
        return self._put(request, key) if request.method == "PUT" else self._get(request, key)

    def _check_signature(self, request: _Request, key: str) -> None:
        query = request.query
        date, expires = query.get("X-Amz-Date", ""), query.get("X-Amz-Expires", "")
        content_type = request.headers.get("content-type", "") if request.method == "PUT" else ""
        right = self._signature(request.method, key, date, expires, content_type)
        if not hmac.compare_digest(right.encode(), query.get("X-Amz-Signature", "").encode()):
            message = "The request signature does not match the method, key or headers"
            raise _storage_refusal(403, "SignatureDoesNotMatch", message)
        signed_at = datetime.strptime(date + "+0000", "%Y%m%dT%H%M%SZ%z")
        if time.time() > signed_at.timestamp() + int(expires):
            raise _storage_refusal(403, "AccessDenied", "Request has expired")

    def _put(self, request: _Request, key: str) -> _Answer:
        if request.body.chunked:
            message = "A header you provided implies functionality that is not implemented"
            raise _storage_refusal(501, "NotImplemented", message)
        if request.body.length is None:
            message = "You must provide the Content-Length HTTP header"
            raise _storage_refusal(411, "MissingContentLength", message)
        self.keep(self.receive(request.body.blocks()), key)
        path = self.find(key)
        return _Answer(200, b"", {"etag": _etag(path.stat())} if path else {})

    def _get(self, request: _Request, key: str) -> _Answer:
        path = self.find(key)
        if path is None:
            raise _storage_refusal(404, "NoSuchKey", "The specified key does not exist")
        with contextlib.ExitStack() as on_error:
            file = on_error.enter_context(path.open("rb"))
            state = os.fstat(file.fileno())
            headers = {
                "accept-ranges": "bytes",
                "etag": _etag(state),
                "last-modified": formatdate(state.st_mtime, usegmt=True),
                "content-type": mimetypes.guess_type(path.name)[0] or "binary/octet-stream",
            }
            wanted = _wanted_range(request, headers, state.st_size)
            if wanted is None:
                answer = _Answer(200, _FileSlice(file, 0, state.st_size), headers)
            else:
                first, last = wanted
                headers["content-range"] = f"bytes {first}-{last}/{state.st_size}"
                answer = _Answer(206, _FileSlice(file, first, last - first + 1), headers)
            on_error.pop_all()  # whoever sends the answer closes the file
        return answer


def _etag(state: os.stat_result) -> str:
    return f'"{state.st_mtime_ns:x}-{state.st_size:x}"'


def _wanted_range(
    request: _Request, headers: Mapping[str, str], size: int
) -> tuple[int, int] | None:
    """First and last byte that are asked for; None for the whole (RFC 9110, section 14)."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    condition = request.headers.get("if-range")
    changed = condition not in (None, headers["etag"], headers["last-modified"])
    if changed or not match or match[0] == "bytes=-":
        return None
    if not match[1]:  # the last so many bytes
        first, last = max(0, size - int(match[2])), size - 1
    elif match[2] and int(match[2]) < int(match[1]):
        return None
    else:
        first, last = int(match[1]), min(int(match[2] or size), size - 1)
    if first > last:
        message = "The requested range is not satisfiable"
        raise _storage_refusal(416, "InvalidRange", message, content_range=f"bytes */{size}")
    return first, last


class _FileEndpoints:
    """The `/internal/files` part of the Gateway."""

    def __init__(self, store: _Store, base_url: str) -> None:
        self._store = store
        self._base_url = base_url

    def generate_upload_url(self, request: _Request, caller: _Caller) -> _Answer:
        reader = _JsonReader()
        body = {k: v for k, v in reader.document(request).items() if v is not None}
        filename = reader.field(body, "filename", str, ["body"])
        content_type = reader.field(body, "content_type", str, ["body"], required=False)
        reader.refuse_if_wrong()
        key = self._store.new_key(f"agent-inputs/{caller.user_id}", filename)
        upload_url = self._base_url + self._store.presigned("PUT", key, 3600, content_type)
        return _json_answer({"upload_url": upload_url, "s3_url": f"s3://local/{key}"})

    def upload(self, request: _Request, caller: _Caller) -> _Answer:
        return self._upload(request, caller.agent_folder("agent-outputs"), temporary=False)

    def upload_temp(self, request: _Request, caller: _Caller) -> _Answer:
        return self._upload(request, caller.agent_folder("agent-workspace"), temporary=True)

    def _upload(self, request: _Request, folder: str, *, temporary: bool) -> _Answer:
        fields: dict[str, str] = {}
        with contextlib.ExitStack() as on_error:
            received: tuple[str, Path] | None = None
            for name, filename, content in _Multipart(request).parts():
                if filename is None or name != "file" or received:
                    fields[name] = b"".join(content).decode("utf-8", "replace")
                else:
                    received = filename, self._store.receive(content)
                    on_error.callback(received[1].unlink)
            if received is None:
                raise _refusal(422, [_problem(["body", "file"], "Field required", "missing", None)])
            if temporary:
                folder += "/" + _checked_session(fields.get("session_id") or "default")
            filename, path = received
            size = path.stat().st_size
            key = self._store.new_key(folder, filename, _ttl(fields) if temporary else None)
            s3_url = self._store.keep(path, key)
            on_error.pop_all()
        return _json_answer({"success": True, "s3_url": s3_url, "filename": filename, "size": size})

    def download(self, request: _Request, caller: _Caller) -> _Answer:
        caller.agent_folder("agent-outputs")
        s3_url = request.query_text("s3_url")
        mode = request.query.get("mode", "presigned")
        if mode != "presigned":
            message = "Input should be 'presigned'"
            raise _refusal(422, [_problem(["query", "mode"], message, "literal_error", mode)])
        expires_in = request.query_number("expires_in", 3600, 7 * 24 * 3600)
        found = self._store.find_url(s3_url, caller)
        if found is None:
            raise _refusal(404, f"File not found: {s3_url}")
        path = self._store.presigned("GET", found[0], expires_in)
        return _json_answer({"presigned_url": self._base_url + path})

    def list(self, request: _Request, caller: _Caller) -> _Answer:
        return self._page(request, caller.agent_folder("agent-outputs"))

    def list_temp(self, request: _Request, caller: _Caller) -> _Answer:
        folder = caller.agent_folder("agent-workspace")
        session_id = request.query.get("session_id")
        if session_id:
            folder += f"/{_checked_session(session_id)}"
        return self._page(request, folder)

    def _page(self, request: _Request, folder: str) -> _Answer:
        limit = request.query_number("limit", 100, 1000)
        try:
            start = base64.urlsafe_b64decode(request.query.get("continuation_token", "")).decode()
        except (binascii.Error, ValueError):
            raise _refusal(400, "Invalid continuation_token") from None
        files = [entry for entry in self._store.listing(folder) if entry[0] > start]
        page = [_listed(key, path.stat()) for key, path in files[:limit]]
        answer: dict[str, Any] = {"files": page}
        if len(files) > limit:
            answer["next_token"] = base64.urlsafe_b64encode(page[-1]["key"].encode()).decode()
        return _json_answer(answer)

    def cleanup_temp(self, request: _Request, caller: _Caller) -> _Answer:
        folder = caller.agent_folder("agent-workspace")
        session_id = _checked_session(request.query_text("session_id"))
        files = list(self._store.listing(f"{folder}/{session_id}"))
        for _, path in files:
            self._store.delete(path)
        return _json_answer({"deleted_count": len(files)})


def _checked_session(session_id: str) -> str:
    if not _is_safe(session_id):
        raise _refusal(422, "Invalid session_id")
    return session_id


def _ttl(fields: Mapping[str, str]) -> int:
    text = fields.get("ttl", "86400")
    if not re.fullmatch(r"\d{1,9}", text):
        message = "Input should be a valid integer"
        raise _refusal(422, [_problem(["body", "ttl"], message, "int_parsing", text)])
    return int(text)


def _listed(key: str, state: os.stat_result) -> dict[str, Any]:
    modified = datetime.fromtimestamp(state.st_mtime, timezone.utc).isoformat()
    return {
        "key": key, "size": state.st_size, "last_modified": modified, "s3_url": f"s3://local/{key}"
    }  # fmt: skip


# --- Prefabs ---------------------------------------------------------------------------

_JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}
_PYTHON_TYPES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array",
    "dict": "object",
}  # fmt: skip
_RESERVED = ("inputs", "outputs", "secrets", "closing")  # parameters that the gateway fills in


@dataclasses.dataclass
class _Job:
    """What a function gets for one call."""

    parameters: dict[str, Any]
    inputs: dict[str, list[Path]]
    outputs: Path
    secrets: dict[str, str]
    closing: threading.Event  # set when the gateway closes
    cleanup: contextlib.ExitStack  # undone after the call


@dataclasses.dataclass(frozen=True)
class _Function:
    name: str
    description: str
    parameters: Sequence[Mapping[str, Any]]
    run: Callable[[_Job], Any]  # a generator as outcome means a stream
    streaming: bool = False
    secrets: Sequence[str] = ()
    takes_any: bool = False  # parameters that are not declared are welcome
    needs_folder: bool = True

    def entry(self) -> dict[str, Any]:
        """How the directory shows this function."""
        shown = ("name", "description", "parameters", "streaming", "secrets")
        return {name: getattr(self, name) for name in shown}

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of a call, defaults added; 422 if they do not fit."""
        declared = {parameter["name"]: parameter for parameter in self.parameters}
        for name in given:
            if name not in declared and not self.takes_any:
                raise _refusal(422, f"Unknown parameter: {name}")
        values = dict(given)
        for name, parameter in declared.items():
            if name in given:
                _check_type(parameter, given[name])
            elif parameter["required"]:
                raise _refusal(422, f"Missing required parameter: {name}")
            elif "default" in parameter:
                values[name] = parameter["default"]
        return values


def _check_type(parameter: Mapping[str, Any], value: Any) -> None:
    expected = _JSON_TYPES.get(parameter["type"])
    if expected is None or (value is None and not parameter["required"]):
        return
    # In Python True is an integer, in JSON it is not.
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        name, kind = parameter["name"], parameter["type"]
        raise _refusal(422, f"Parameter '{name}' must be of type {kind}, not {_type_name(value)}")


def _type_name(value: Any) -> str:
    return "null" if value is None else _PYTHON_TYPES.get(type(value).__name__, "unknown")


@dataclasses.dataclass(frozen=True)
class _Prefab:
    id: str
    version: str
    name: str
    description: str
    tags: Sequence[str]
    functions: Mapping[str, _Function]
    secrets: Sequence[Mapping[str, Any]]
    status: str = "deployed"
    deployed_at: str = dataclasses.field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat()
    )

    def spec(self) -> dict[str, Any]:
        """`GET /v1/prefabs/{id}/{version}/spec`."""
        functions = [function.entry() for function in self.functions.values()]
        return {
            "id": self.id, "version": self.version, "name": self.name,
            "description": self.description, "functions": functions,
        }  # fmt: skip

    def entry(self) -> dict[str, Any]:
        """The prefab's entry in `GET /v1/prefabs`."""
        failed = {"deployment_error": "The deployment failed"} if self.status == "failed" else {}
        return {
            **self.spec(),
            "tags": list(self.tags),
            "deployment_status": self.status,
            "knative_service_url": None,
            "deployed_at": self.deployed_at,
            "updated_at": self.deployed_at,
            "requires_secrets": any(secret["required"] for secret in self.secrets),
            "secrets": list(self.secrets),
            **failed,
        }

    def secret(self, name: str) -> Mapping[str, Any]:
        """What the manifest says of a secret."""
        return next((secret for secret in self.secrets if secret["name"] == name), {})


def _secret_entry(secret: str | Mapping[str, Any]) -> dict[str, Any]:
    given = {"name": secret} if isinstance(secret, str) else secret
    return {"description": "", "instructions": "", "required": True, **given}


def _python_function(
    name: str, function: Callable[..., Any], secrets: Iterable[Mapping[str, Any]]
) -> _Function:
    """A Python function as its signature and docstring describe it."""
    signature = inspect.signature(function).parameters
    reserved = [word for word in _RESERVED if word in signature]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [
        _python_parameter(parameter)
        for parameter in signature.values()
        if parameter.name not in reserved and parameter.kind not in variable
    ]

    def run(job: _Job) -> Any:
        return function(**job.parameters, **{word: getattr(job, word) for word in reserved})

    return _Function(
        name, (inspect.getdoc(function) or "").partition("\n")[0], parameters, run,
        streaming=inspect.isgeneratorfunction(function),
        secrets=[s["name"] for s in secrets if s["required"]] if "secrets" in reserved else [],
        takes_any=any(parameter.kind is variable[1] for parameter in signature.values()),
        needs_folder="outputs" in reserved,
    )  # fmt: skip


def _python_parameter(parameter: inspect.Parameter) -> dict[str, Any]:
    annotation = getattr(parameter.annotation, "__name__", str(parameter.annotation))
    kind = _PYTHON_TYPES.get(annotation.partition("[")[0], "any")
    required = parameter.default is inspect.Parameter.empty
    default = {} if required else {"default": parameter.default}
    return {"name": parameter.name, "type": kind, "required": required, **default}


# --- Prefab folders --------------------------------------------------------------------

_CHILD_FLAG = "--run-function"  # of this file's command line: it is the child's program, too


class _ChildError(Exception):
    """What a prefab's process reported, or that it died."""

    def __init__(self, message: str, type: str) -> None:  # noqa: A002
        super().__init__(message)
        self.type = type


class _PrefabFolder:
    """A prefab as its developer has it on disk; each call runs in a process of its own."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder).resolve()
        self._manifest_path = self._folder / "prefab-manifest.json"
        self._entry_point = self._folder
        self._processes: set[subprocess.Popen[bytes]] = set()

    def load(self) -> _Prefab:
        """Read the manifest.

        Raises:
            ValueError: the folder, its manifest or its code is not what it should be.
        """
        manifest = self._read_manifest()
        self._entry_point = self._folder / manifest.get("entry_point", "src/main.py")
        if not self._entry_point.is_file():
            raise ValueError(f"{self._manifest_path}: no entry point {self._entry_point}")
        declared = manifest.get("secrets", [])
        functions = [self._function(entry, declared) for entry in manifest["functions"]]
        own = [secret for entry in manifest["functions"] for secret in entry.get("secrets", [])]
        # The prefab's own declarations come last and win: they carry the instructions.
        secrets = {secret["name"]: secret for secret in map(_secret_entry, own + declared)}
        return _Prefab(
            manifest["id"], manifest["version"], manifest.get("name", manifest["id"]),
            manifest.get("description", ""), manifest.get("tags", []),
            {function.name: function for function in functions}, list(secrets.values()),
        )  # fmt: skip

    def _read_manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads(self._manifest_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._manifest_path}: {error}") from error
        kinds = {"id": str, "version": str, "functions": list}
        for field, kind in kinds.items():
            if not isinstance(manifest, dict) or not isinstance(manifest.get(field), kind):
                raise ValueError(  # noqa: TRY004 - the file is wrong, not a caller
                    f"{self._manifest_path}: '{field}' must be a {kind.__name__}"
                )
        return dict(manifest)

    def _function(self, entry: Any, declared_secrets: Sequence[Any]) -> _Function:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError(  # noqa: TRY004
                f"{self._manifest_path}: every function needs a name"
            )
        secrets = map(_secret_entry, entry.get("secrets", declared_secrets))
        return _Function(
            entry["name"], entry.get("description", ""),
            [_manifest_parameter(parameter) for parameter in entry.get("parameters", [])],
            lambda job: self._run(entry["name"], job),
            streaming=entry.get("streaming", False),
            secrets=[secret["name"] for secret in secrets if secret["required"]],
        )  # fmt: skip

    def stop(self) -> None:
        """End the calls that are running."""
        for process in list(self._processes):
            process.terminate()

    def _run(self, function: str, job: _Job) -> Any:
        workspace = job.outputs.parent.parent
        _copy_inputs(job.inputs, workspace / "data" / "inputs")
        process = subprocess.Popen(
            [sys.executable, "-B", str(Path(__file__).resolve()), _CHILD_FLAG],
            cwd=workspace, env={**os.environ, **job.secrets},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._processes.add(process)
        job.cleanup.callback(self._end, process)
        if job.closing.is_set():  # too late for `stop`
            process.terminate()
        order = [str(self._folder), str(self._entry_point), function, job.parameters]
        messages = _ask_child(process, json.dumps(order).encode())
        kind, value = next(messages)
        return messages if kind == "stream" else value

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()  # no harm to one that has ended
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
        self._processes.discard(process)


def _manifest_parameter(entry: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(entry.get("type", "any"))
    required = entry.get("required", "default" not in entry)
    return {**entry, "type": _PYTHON_TYPES.get(kind, kind), "required": required}


def _copy_inputs(inputs: Mapping[str, Iterable[Path]], folder: Path) -> None:
    """Give a function its own copies: what it does to them must not change the storage."""
    folder.mkdir(parents=True)
    for key, paths in inputs.items():
        (folder / key).mkdir()
        for number, path in enumerate(paths, 1):
            target = folder / key / path.name
            if target.exists():  # two of one name
                target = target.with_name(f"{number}-{path.name}")
            shutil.copyfile(path, target)


def _ask_child(process: subprocess.Popen[bytes], order: bytes) -> Generator[Any, None, None]:
    """First the kind and value of the outcome, then, of a stream, its pieces."""
    assert process.stdin is not None
    assert process.stdout is not None
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
        if kind == "error":
            raise _ChildError(value["message"], value["type"])
        if kind == "value":
            yield kind, value
        return
    raise _ChildError(f"its process ended with status {process.wait()}", "ProcessDied")


def _child_main() -> None:
    """Run one function for the gateway: the order on stdin, the outcome as lines on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gateway's; it ends its children
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # an exception: `finally` clauses are run
    folder, entry_point, function, parameters = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w", encoding="ascii") as pipe:
        os.dup2(2, 1)  # what the function prints must not get between the lines

        def tell(kind: str, value: Any) -> None:
            pipe.write(json.dumps([kind, value]) + "\n")
            pipe.flush()

        try:
            sys.path[0:1] = [str(Path(entry_point).parent), folder]
            outcome = getattr(_load_module(entry_point), function)(**parameters)
            if inspect.isgenerator(outcome):
                tell("stream", None)
                for piece in outcome:
                    tell("piece", piece)
                tell("end", None)
            else:
                tell("value", outcome)
        except Exception as error:  # whatever the function does, the gateway is told
            traceback.print_exc()
            tell("error", {"message": str(error), "type": type(error).__name__})


def _load_module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("main", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["main"] = module
    spec.loader.exec_module(module)
    return module


# --- Running calls ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    prefab_id: str
    version: str
    function_name: str
    parameters: dict[str, Any]
    files: dict[str, list[str]]


def _parse_calls(request: _Request) -> list[_Call]:
    reader = _JsonReader()
    calls = []
    for index, entry in enumerate(reader.field(reader.document(request), "calls", list, ["body"])):
        loc: list[Any] = ["body", "calls", index]
        call = reader.checked(entry, dict, loc)
        prefab_id = reader.field(call, "prefab_id", str, loc)
        version = reader.field(call, "version", str, loc)
        function = reader.field(call, "function_name", str, loc)
        inputs = reader.field(call, "inputs", dict, loc)
        loc.append("inputs")
        parameters = reader.field(inputs, "parameters", dict, loc, required=False)
        files = reader.field(inputs, "files", dict, loc, required=False)
        for key, urls in files.items():
            for number, url in enumerate(reader.checked(urls, list, [*loc, "files", key])):
                reader.checked(url, str, [*loc, "files", key, number])
        calls.append(_Call(prefab_id, version, function, parameters, files))
    reader.refuse_if_wrong()
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
            self._prefabs.pop((prefab.id, prefab.version), None)
            self._prefabs[prefab.id, prefab.version] = prefab

    def prefabs(self) -> list[_Prefab]:
        """All prefabs, newest first."""
        with self._lock:
            return list(self._prefabs.values())[::-1]

    def list_prefabs(self, request: _Request, _: _Caller) -> _Answer:
        status = request.query.get("status")
        shown = [prefab for prefab in self.prefabs() if status in (None, prefab.status)]
        return _json_answer([prefab.entry() for prefab in shown])

    def spec(self, _: _Request, __: _Caller, prefab_id: str, version: str) -> _Answer:
        return _json_answer(self._prefab(prefab_id, version).spec())

    def _prefab(self, prefab_id: str, version: str) -> _Prefab:
        prefab = self._prefabs.get((prefab_id, version))
        if prefab is None:
            raise _refusal(404, f"Prefab {prefab_id}@{version} not found")
        return prefab

    def set_secret(self, request: _Request, caller: _Caller) -> _Answer:
        reader = _JsonReader()
        body = reader.document(request)
        fields = ("prefab_id", "secret_name", "secret_value")
        prefab_id, name, value = [reader.field(body, field, str, ["body"]) for field in fields]
        reader.refuse_if_wrong()
        with self._lock:
            self._secrets[caller.user_id, prefab_id, name] = value
        return _Answer(204)

    def _secrets_of(self, caller: _Caller) -> list[tuple[str, str]]:
        with self._lock:
            return sorted((p, name) for user, p, name in self._secrets if user == caller.user_id)

    def list_secrets(self, _: _Request, caller: _Caller) -> _Answer:
        pairs = self._secrets_of(caller)
        entries = [{"prefab_id": prefab_id, "secret_name": name} for prefab_id, name in pairs]
        return _json_answer({"secrets": entries})

    def list_prefab_secrets(self, _: _Request, caller: _Caller, prefab_id: str) -> _Answer:
        names = [name for prefab, name in self._secrets_of(caller) if prefab == prefab_id]
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
            with contextlib.ExitStack() as cleanup:
                try:
                    job, outcome = self._begin(call, caller, cleanup)
                    if isinstance(outcome, Generator) and len(calls) == 1:
                        events = self._events(job_id, job, outcome, caller, cleanup.pop_all())
                        return _Answer(200, events, {"content-type": "text/event-stream"})
                    output = self._output(job, outcome, caller)
                    results.append({"status": "SUCCESS", "output": output, "error": None})
                except CallFailed as failure:
                    results.append({"status": "FAILED", "output": None, "error": _told(failure)})
                except _Refusal:
                    raise
                except Exception as error:
                    raise _unavailable(call, error) from error
        succeeded = all(result["status"] == "SUCCESS" for result in results)
        status = "COMPLETED" if succeeded else "PARTIAL_SUCCESS"
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
            detail = {"limit": quota, "used": self._used, "quota_type": "calls"}
        message = "The quota of calls is used up"
        raise _refusal(429, {"error_code": "QUOTA_EXCEEDED", "message": message, **detail})

    def _begin(
        self, call: _Call, caller: _Caller, cleanup: contextlib.ExitStack
    ) -> tuple[_Job, Any]:
        """Check the call against its prefab and run it; a stream has then only begun."""
        prefab = self._prefab(call.prefab_id, call.version)
        if prefab.status != "deployed":
            raise _refusal(404, f"Prefab {prefab.id}@{prefab.version} is not deployed")
        function = prefab.functions.get(call.function_name)
        if function is None:
            message = f"Function {call.function_name} not found in prefab {prefab.id}"
            raise _refusal(404, message)
        job = _Job(
            function.checked(call.parameters), dict(self._inputs(call, caller)),
            self._gateway.store.scratch() / "data" / "outputs",
            self._needed_secrets(prefab, function, caller), self._gateway.closing, cleanup,
        )  # fmt: skip
        if function.needs_folder:
            job.outputs.mkdir(parents=True)
            cleanup.callback(shutil.rmtree, job.outputs.parent.parent, ignore_errors=True)
        self._gateway.executed.append((prefab.id, prefab.version, function.name))
        return job, function.run(job)

    def _needed_secrets(
        self, prefab: _Prefab, function: _Function, caller: _Caller
    ) -> dict[str, str]:
        with self._lock:
            own = {
                name: value
                for (user, prefab_id, name), value in self._secrets.items()
                if (user, prefab_id) == (caller.user_id, prefab.id)
            }
        for name in function.secrets:
            if name not in own:
                raise _missing_secret(prefab, name)
        return own

    def _inputs(self, call: _Call, caller: _Caller) -> Iterator[tuple[str, list[Path]]]:
        for key, urls in call.files.items():
            found = [self._gateway.store.find_url(url, caller) for url in urls]
            if not _is_safe(key):
                raise _refusal(422, f"Invalid name of input files: {key}")
            if None in found:
                message = f"Input file not found: {urls[found.index(None)]}"
                raise CallFailed(message, "InputFileNotFound")
            yield key, [file[1] for file in found if file]

    def _output(self, job: _Job, outcome: Any, caller: _Caller) -> dict[str, Any]:
        """The envelope of what a function returned."""
        if isinstance(outcome, Generator):  # no stream of events among the results of several calls
            pieces = list(outcome)
            only_text = all(isinstance(piece, str) for piece in pieces)
            outcome = "".join(pieces) if only_text else pieces
        return {"status": "SUCCESS", "output": outcome, "files": self._output_files(job, caller)}

    def _output_files(self, job: _Job, caller: _Caller) -> dict[str, list[str]]:
        """Move what the function left in its outputs folder into the storage."""
        files: dict[str, list[str]] = {}
        if not job.outputs.is_dir():  # most functions: looking for files costs a sixth of a call
            return files
        folder = f"agent-outputs/{caller.user_id}/{caller.agent_id or NO_AGENT}"
        for path in sorted(job.outputs.rglob("*")):
            if path.is_file() and not path.is_symlink():
                parts = path.relative_to(job.outputs).parts
                key = parts[0] if len(parts) > 1 else "output"
                store = self._gateway.store
                url = store.keep(path, store.new_key(folder, path.name))
                files.setdefault(key, []).append(url)
        return files

    def _events(
        self, job_id: str, job: _Job, pieces: Generator[Any, None, None], caller: _Caller,
        cleanup: contextlib.ExitStack,
    ) -> Generator[bytes, None, None]:  # fmt: skip
        """The event stream of a function; ends it when the client is gone."""
        with cleanup, contextlib.closing(pieces):
            yield _event_bytes({"type": "start", "data": {"job_id": job_id}})
            try:
                for piece in pieces:
                    is_event = isinstance(piece, dict) and piece.get("type") in EVENT_TYPES
                    yield _event_bytes(piece if is_event else {"type": "content", "data": piece})
                done = {"job_id": job_id, "files": self._output_files(job, caller)}
                yield _event_bytes({"type": "done", "data": done})
            except Exception as error:  # whatever the function raises ends its stream
                logger.info("a stream ended with %r", error, exc_info=True)
                yield _event_bytes({"type": "error", "data": _told(error)})


def _event_bytes(event: dict[str, Any]) -> bytes:
    return b"data: " + _json_bytes(event) + b"\n\n"


def _told(error: Exception) -> dict[str, str]:
    named = error.type if isinstance(error, (CallFailed, _ChildError)) else type(error).__name__
    return {"message": str(error), "type": named}


def _unavailable(call: _Call, error: Exception) -> _Refusal:
    logger.info("%s@%s failed", call.prefab_id, call.version, exc_info=error)
    told = _told(error)
    return _refusal(
        503, f"Prefab {call.prefab_id}@{call.version} failed: {told['type']}: {told['message']}"
    )


def _missing_secret(prefab: _Prefab, name: str) -> _Refusal:
    return _refusal(400, {
        "error_code": "MISSING_SECRET",
        "message": f"Secret '{name}' for prefab '{prefab.id}' is not configured",
        "prefab_id": prefab.id,
        "secret_name": name,
        "instructions": prefab.secret(name).get("instructions", ""),
    })  # fmt: skip


# --- The prefabs that come with it -----------------------------------------------------


def _statistics(text: str) -> dict[str, Any]:
    """Count the characters, words and lines of a text, and its most common words."""
    words = text.split()
    common = Counter(word.lower().strip(".,;:!?\"'()") for word in words).most_common(5)
    return {
        "success": True,
        "message": f"{len(words)} words",
        "characters": len(text),
        "words": len(words),
        "lines": len(text.splitlines()),
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def _checksum(inputs: dict[str, list[Path]], outputs: Path) -> dict[str, Any]:
    """Write the SHA-256 sums of the input files `files` into the file `checksums`."""
    sums = [{"name": path.name, "sha256": _sha256(path)} for path in _given(inputs)]
    lines = [f"{entry['sha256']}  {entry['name']}\n" for entry in sums]
    (outputs / "checksums").mkdir()
    (outputs / "checksums" / "SHA256SUMS.txt").write_text("".join(lines), encoding="utf-8")
    return {"success": True, "message": f"{len(sums)} files", "checksums": sums}


def _line_count(inputs: dict[str, list[Path]]) -> dict[str, Any]:
    """Count the lines of the input files `files`."""
    total = 0
    for path in _given(inputs):
        with path.open("rb") as file:
            total += sum(1 for _ in file)
    return {"success": True, "message": f"{total} lines", "lines": total}


def _concatenate(
    inputs: dict[str, list[Path]], outputs: Path, name: str = "all.txt"
) -> dict[str, Any]:
    """Join the input files `files` into one output file."""
    with (outputs / _safe_name(name)).open("wb") as target:
        for path in _given(inputs):
            with path.open("rb") as source:
                shutil.copyfileobj(source, target, BLOCK_BYTES)
        size = target.tell()
    return {"success": True, "message": f"{size} bytes", "size": size}


def _inspect(inputs: dict[str, list[Path]]) -> Iterator[Any]:
    """Stream name, size and SHA-256 of the input files `files`, and the progress."""
    paths = _given(inputs)
    for done, path in enumerate(paths, 1):
        yield {"name": path.name, "size": path.stat().st_size, "sha256": _sha256(path)}
        yield {"type": "progress", "data": {"done": done, "total": len(paths)}}


def _given(inputs: dict[str, list[Path]]) -> list[Path]:
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


def _not_json() -> Any:
    """Return what JSON cannot carry: 503."""
    return {"a set"}


_Functions = Mapping[str, Callable[..., Any]]
_SIGNING_KEY = {
    "name": "SIGNING_KEY",
    "description": "The key of your signatures",
    "instructions": "Any text that only you know; store it with POST /v1/secrets",
}
_TEXT_FUNCTIONS: _Functions = {"statistics": _statistics, "words": _words, "echo": _echo}
_FILE_FUNCTIONS: _Functions = {
    "checksum": _checksum, "line_count": _line_count, "concatenate": _concatenate,
    "inspect": _inspect,
}  # fmt: skip
_FAULTS: _Functions = {
    "fail": _fail, "crash": _crash, "refuse": _refuse, "slow": _slow, "stumble": _stumble,
    "not_numbers": _not_numbers, "not_json": _not_json,
}  # fmt: skip


def _add_own_prefabs(gateway: LocalGateway) -> None:
    gateway.add_prefab("faulty", "1.0.0", _FAULTS, description="Errors on demand", tags=["test"])
    gateway.add_prefab(
        "vault", "1.0.0", {"sign": _sign}, description="Needs a secret", secrets=[_SIGNING_KEY]
    )
    gateway.add_prefab(
        "file-tools", "1.0.0", _FILE_FUNCTIONS, description="Looks at files", tags=["files"]
    )
    newer = {**_TEXT_FUNCTIONS, "find": _find}
    for version, functions in (("1.0.0", _TEXT_FUNCTIONS), ("1.1.0", newer)):
        gateway.add_prefab(
            "text-tools", version, functions, description="Looks at texts", tags=["text"]
        )


# --- The gateway -----------------------------------------------------------------------


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
        prefab_folders: Folders of prefabs to serve besides those that come with it.
        port: 0 takes any free one; `base_url` tells which.
        data_dir: Where files are kept; None means a temporary folder that goes with the gateway.
        allow_list: Whether requests without credentials are admitted, as a user without an agent.
        any_credential: Whether any credential is admitted, each as a user of its own. Any
            `X-Internal-Token` is then that of an agent.
        idle_timeout: Seconds after which an idle connection is closed, unannounced.

    Attributes:
        base_url: The URL to give to clients, once it is started.
        internal_token: A token of an agent.
        api_key: For `X-API-Key`, or to be exchanged for tokens without an agent.
        jwt_token: For `Authorization: Bearer`; without an agent.
        down: Set it, and every gateway request is answered 503.
        quota: Calls allowed in total; None for no limit.
        requests: The last 10,000 requests, in the order in which they came.
        executed: Prefab id, version and name of each function that was run.

    Raises:
        ValueError: a prefab folder or its manifest is not what it should be.
    """

    def __init__(
        self,
        *prefab_folders: str | os.PathLike[str],
        port: int = 0,
        data_dir: str | os.PathLike[str] | None = None,
        allow_list: bool = True,
        any_credential: bool = False,
        idle_timeout: float = IDLE_SECONDS,
    ) -> None:
        self.base_url = ""
        self.internal_token = f"agent-{uuid.uuid4().hex}"
        self.api_key = f"key-{uuid.uuid4().hex}"
        self.jwt_token = f"jwt-{uuid.uuid4().hex}"
        self.allow_list = allow_list
        self.any_credential = any_credential
        self.down = False
        self.quota: int | None = None
        self.requests: deque[ReceivedRequest] = deque(maxlen=10_000)
        self.executed: list[tuple[str, str, str]] = []
        self.closing = threading.Event()  # given to functions that ask for it
        self._port = port
        self._idle_timeout = idle_timeout
        self._data_dir = data_dir
        self._resources = contextlib.ExitStack()
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._callers: dict[tuple[str, str], _Caller | None] = {  # None: expired
            ("x-internal-token", self.internal_token): _Caller(USER, AGENT),
            ("x-api-key", self.api_key): _Caller(USER),
            ("authorization", f"Bearer {self.jwt_token}"): _Caller(USER),
        }
        self._exchanged: list[tuple[str, str]] = []
        self._runner = _Runner(self)
        _add_own_prefabs(self)
        self._folders = [_PrefabFolder(folder) for folder in prefab_folders]
        for folder in self._folders:
            self._runner.add(folder.load())

    def add_prefab(  # noqa: PLR0913
        self,
        prefab_id: str,
        version: str,
        functions: Mapping[str, Callable[..., Any]],
        *,
        name: str = "",
        description: str = "",
        tags: Iterable[str] = (),
        secrets: Iterable[str | Mapping[str, Any]] = (),
        status: str = "deployed",
    ) -> None:
        """Serve plain Python functions as a prefab.

        Their annotations become the types of the parameters; a generator function streams. A
        function that names one of these parameters gets it from the gateway:
        `inputs` (name to paths of the input files, to be read only), `outputs` (a folder; what is
        left there is given back), `secrets` (name to value), `closing` (an event, set when the
        gateway closes).

        Args:
            secrets: Names, or manifest entries with `name`, `description`, `instructions` and
                `required`. Functions that take `secrets` are not run without the required ones.
            status: "deployed", or "failed": then it is listed but cannot be called.
        """
        entries = [_secret_entry(secret) for secret in secrets]
        made = {key: _python_function(key, value, entries) for key, value in functions.items()}
        about = (name or prefab_id, description, list(tags))
        self._runner.add(_Prefab(prefab_id, version, *about, made, entries, status))

    def prefabs(self) -> list[dict[str, Any]]:
        """The directory's entries, newest first."""
        return [prefab.entry() for prefab in self._runner.prefabs()]

    def expire_tokens(self) -> None:
        """Refuse the tokens that were issued for API keys up to now."""
        for credential in self._exchanged:
            self._callers[credential] = None

    def start(self) -> None:
        """Begin to serve."""
        with contextlib.ExitStack() as resources:
            listener = socket.create_server(("127.0.0.1", self._port), backlog=128)
            resources.enter_context(listener)
            address = listener.getsockname()
            self.base_url = f"http://127.0.0.1:{address[1]}"
            folder = self._data_dir or resources.enter_context(tempfile.TemporaryDirectory())
            self.store = _Store(Path(folder).resolve())
            self._routes = self._make_routes(_FileEndpoints(self.store, self.base_url))
            acceptor = threading.Thread(target=self._accept, args=[listener], daemon=True)
            acceptor.start()
            resources.callback(self._end_connections)
            resources.callback(self._end_accepting, address, acceptor)
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Stop serving, and end what is under way. Twice is fine."""
        self._resources.close()

    def __enter__(self) -> LocalGateway:  # noqa: PYI034 - typing.Self is not in Python 3.9
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    def _end_accepting(self, address: tuple[str, int], acceptor: threading.Thread) -> None:
        self.closing.set()
        socket.create_connection(address).close()  # `accept` returns for a client, and nothing else
        acceptor.join()

    def _end_connections(self) -> None:
        for folder in self._folders:
            folder.stop()
        connections = list(self._connections.items())
        for _, sock in connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread, _ in connections:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _make_routes(
        self, files: _FileEndpoints
    ) -> list[tuple[str, re.Pattern[str], Callable[..., _Answer]]]:
        runner = self._runner
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
        return [
            (method, re.compile(path.replace("{}", "([^/]+)")), handler)
            for method, path, handler in table
        ]

    def _handle(self, request: _Request) -> _Answer:
        """The answer to any request."""
        started = time.perf_counter()
        try:
            answer = self._dispatch(request)
        except _Refusal as refusal:
            answer = refusal.answer
        except (ConnectionError, socket.timeout):  # in the middle of the body
            raise
        except Exception:
            logger.exception("%s %s", request.method, request.path)
            text = {"content-type": "text/plain; charset=utf-8"}
            answer = _Answer(500, b"Internal Server Error", text, hang_up=True)
        milliseconds = (time.perf_counter() - started) * 1000
        logger.debug("%s %s %d %.1f ms", request.method, request.path, answer.status, milliseconds)
        return answer

    def _dispatch(self, request: _Request) -> _Answer:
        if request.headers.get("content-type", "").startswith("application/json"):
            request.content = b"".join(request.body.blocks())
        self.requests.append(
            ReceivedRequest(request.method, request.target, request.headers, request.content)
        )
        if request.path.startswith("/storage/"):
            return self.store.handle(request)
        if self.down:
            raise _refusal(503, "The gateway is down")
        handler, arguments = self._find_route(request)
        return handler(request, self._caller(request), *arguments)

    def _find_route(self, request: _Request) -> tuple[Callable[..., _Answer], Sequence[str]]:
        found = [
            (method, handler, match.groups())
            for method, pattern, handler in self._routes
            if (match := pattern.fullmatch(request.path))
        ]
        for method, handler, arguments in found:
            if method == request.method:
                return handler, arguments
        raise _refusal(405, "Method Not Allowed") if found else _refusal(404, "Not Found")

    def _caller(self, request: _Request) -> _Caller:
        """Who sent the request, by a credential that this endpoint takes."""
        if request.path == "/v1/auth/convert_to_internal_token":
            return self._exchanging_caller(request)
        taken = {"/v1/internal/run": CREDENTIAL_HEADERS[:1], "/v1/run": CREDENTIAL_HEADERS[1:]}
        given = [header for header in CREDENTIAL_HEADERS if header in request.headers]
        if not given and self.allow_list and request.path != "/v1/run":
            return _Caller(USER)
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

    def _exchanging_caller(self, request: _Request) -> _Caller:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise _refusal(401, "Not authenticated")
        return self._known_caller("x-api-key", key)

    def _exchange(self, _: _Request, caller: _Caller) -> _Answer:
        token = f"user-{uuid.uuid4().hex}"
        self._callers["x-internal-token", token] = caller
        self._exchanged.append(("x-internal-token", token))
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
    before = dict(os.environ)
    with LocalGateway() as gateway:
        credentials = {
            "X_INTERNAL_TOKEN": gateway.internal_token if credential == "agent" else None,
            "AGENT_BUILDER_API_KEY": gateway.api_key if credential == "api_key" else None,
            "GATEWAY_JWT_TOKEN": None,
        }
        try:
            os.environ["GATEWAY_BASE_URL"] = gateway.base_url
            for name, value in credentials.items():
                os.environ.pop(name, None)
                if value:
                    os.environ[name] = value
            yield gateway
        finally:
            for name in ("GATEWAY_BASE_URL", *credentials):
                os.environ.pop(name, None)
                if name in before:
                    os.environ[name] = before[name]


# --- The command line ------------------------------------------------------------------


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a Gateway on this machine.")
    add = parser.add_argument
    add("--port", type=int, default=8080, help="0 takes any free one (default: %(default)s)")
    add("--prefab", action="append", default=[], metavar="DIR", help="a prefab folder to serve")
    add("--data", metavar="DIR", help="where to keep files (default: a temporary folder)")
    add("--no-allow-list", action="store_true", help="refuse requests without credentials")
    add("--any-credential", action="store_true", help="admit any credential")
    add("--quota", type=int, metavar="N", help="refuse calls after the first N")
    add("--down", action="store_true", help="answer 503 to everything")
    add("-v", "--verbose", action="store_true", help="log every request")
    return parser.parse_args(argv)


def _announce(gateway: LocalGateway) -> None:
    lines = [
        f"export GATEWAY_BASE_URL={gateway.base_url}",
        f"export X_INTERNAL_TOKEN={gateway.internal_token}  # an agent's, as agent files need it",
        "# or, instead of that token, one of:",
        f"# export AGENT_BUILDER_API_KEY={gateway.api_key}",
        f"# export GATEWAY_JWT_TOKEN={gateway.jwt_token}",
        "# prefabs:",
    ]
    for prefab in gateway.prefabs():
        functions = ", ".join(function["name"] for function in prefab["functions"])
        lines.append(f"#   {prefab['id']} {prefab['version']}: {functions}")
    print("\n".join(lines), flush=True)


def _serve(arguments: argparse.Namespace) -> NoReturn:
    gateway = LocalGateway(
        *arguments.prefab,
        port=arguments.port,
        data_dir=arguments.data,
        allow_list=not arguments.no_allow_list,
        any_credential=arguments.any_credential,
    )
    gateway.quota, gateway.down = arguments.quota, arguments.down
    with gateway:
        _announce(gateway)
        while True:
            time.sleep(3600)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; the exit status."""
    arguments = _parse_arguments(argv)
    level = logging.DEBUG if arguments.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _serve(arguments)
    except KeyboardInterrupt:  # the way to stop it
        return 0
    except (OSError, ValueError) as error:  # a port that is taken, a manifest that is broken
        print(f"local_gateway: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    if sys.argv[1:] == [_CHILD_FLAG]:
        _child_main()
    else:
        sys.exit(main())
