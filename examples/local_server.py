"""The HTTP server of the local gateway: what it reads, what it answers, and its connections.

It is the standard library's `http.server`, with what that leaves to its handlers: keep-alive, bodies that nobody
reads, streams in chunks, parts of files, and an end that leaves neither a thread nor a socket behind. Nothing here
knows what a prefab is.

From top to bottom: answers, requests, forms, the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email
import email.message
import json
import logging
import os
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, unquote

BLOCK_BYTES = 256 * 1024  # of bodies: large enough for speed, small enough for the CPU's cache
TRANSFER_SECONDS = 60.0  # the longest wait for bytes in the middle of a request or an answer
STOP_SECONDS = 0.02  # between two looks of the server whether it is to stop
CLOSE_SECONDS = 3.0  # for calls under way to end when the server closes

logger = logging.getLogger("local_gateway")

# --- Answers --------------------------------------------------------------------------

_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def json_bytes(value: Any) -> bytes:
    """The value as JSON, with null for NaN and the infinities as the Gateway does it."""
    try:
        text = _encode_json(value)
    except ValueError:  # NaN is rare: the detour is made only when there is one
        text = _encode_json(json.loads(json.dumps(value), parse_constant=lambda _: None))
    return text.encode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chunks: Generator[bytes, None, None] | None = None  # instead of a body: made while they are sent
    file: BinaryIO | None = None  # instead of a body: this part of it is sent, then it is closed
    part: range = range(0)


def json_answer(value: Any, status: int = 200) -> Answer:
    return Answer(status, json_bytes(value), {"content-type": "application/json"})


class Refusal(Exception):
    """Ends the handling of a request with an answer other than a success."""

    def __init__(self, status: int, detail: Any) -> None:
        super().__init__(status, detail)
        self.answer = json_answer({"detail": detail}, status)


def invalid(loc: Sequence[str | int], message: str, kind: str, value: Any = None) -> Refusal:
    """A 422 with the list form of `detail`."""
    return Refusal(422, [{"type": kind, "loc": list(loc), "msg": message, "input": value}])


# --- Requests -------------------------------------------------------------------------


@dataclasses.dataclass
class Request:
    method: str
    target: str  # path and query as they came
    headers: dict[str, str]  # names in lower case
    reader: BufferedIOBase
    unread: int  # bytes of the body
    content: bytes = b""  # of a JSON request

    def __post_init__(self) -> None:
        path, _, query = self.target.partition("?")
        self.path = unquote(path)
        self.query = dict(parse_qsl(query, keep_blank_values=True))

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
            raise Refusal(400, "There was an error parsing the body") from error
        except ValueError as error:
            raise invalid(["body"], "JSON decode error", "json_invalid", {}) from error
        return dict(check_kind(value, dict, "body"))


def read_number(fields: Mapping[str, str], where: str, name: str, default: int, largest: int) -> int:
    """An integer between 1 and `largest`, from a query or a form."""
    text = fields.get(name, str(default))
    if re.fullmatch(r"\d{1,10}", text) and 1 <= int(text) <= largest:
        return int(text)
    raise invalid([where, name], f"Input should be an integer between 1 and {largest}", "int_range", text)


_KINDS: Mapping[type, str] = {str: "string", list: "list", dict: "dictionary"}


def check_kind(value: Any, kind: type, *loc: str | int) -> Any:
    """The value if it is of this kind; 422 if not."""
    if not isinstance(value, kind):
        raise invalid(loc, f"Input should be a valid {_KINDS[kind]}", f"{kind.__name__}_type", value)
    return value


def read_field(owner: Mapping[str, Any], name: str, kind: type, *loc: str | int) -> Any:
    """A field that an object must have, of this kind."""
    if name not in owner:
        raise invalid([*loc, name], "Field required", "missing")
    return check_kind(owner[name], kind, *loc, name)


# --- Forms ----------------------------------------------------------------------------


class Form:
    """A `multipart/form-data` body (RFC 7578), read up to the content of its file.

    The standard library's reader, `email`, would hold the whole file in memory.
    """

    def __init__(self, request: Request) -> None:
        head = email.message.Message()
        head["content-type"] = request.headers.get("content-type", "")
        boundary = head.get_boundary()
        if head.get_content_type() != "multipart/form-data" or not boundary:
            raise invalid(["body", "file"], "Field required", "missing")
        self.fields: dict[str, str] = {}  # those before the file
        self.filename = ""
        self._blocks = request.blocks()
        self._delimiter = b"\r\n--" + boundary.encode("latin-1")
        self._window = b"\r\n"  # makes the first delimiter look like all the others
        self._read_to_file()

    def content(self) -> Iterator[bytes]:
        """The file's content, to be read once."""
        return self._until(self._delimiter)

    def _read_to_file(self) -> None:
        self._read_until(self._delimiter)
        while self._read_until(b"\n").strip() != "--":
            head = email.message_from_string(self._read_until(b"\r\n\r\n"))
            name = str(head.get_param("name", "", "content-disposition"))
            filename = head.get_filename()
            if name == "file" and filename is not None:  # browsers escape three characters of it
                self.filename = filename.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")
                return
            self.fields[name] = self._read_until(self._delimiter)
        raise invalid(["body", "file"], "Field required", "missing")

    def _read_until(self, delimiter: bytes) -> str:
        return b"".join(self._until(delimiter)).decode("utf-8", "replace")

    def _until(self, delimiter: bytes) -> Iterator[bytes]:
        """What comes before `delimiter`, in pieces; the delimiter itself is dropped."""
        kept = len(delimiter) - 1  # so many bytes may be the beginning of a delimiter cut in two
        while (end := self._window.find(delimiter)) < 0:
            certain = max(0, len(self._window) - kept)
            yield self._window[:certain]
            block = next(self._blocks, None)
            if block is None:
                raise Refusal(400, "There was an error parsing the body")
            self._window = self._window[certain:] + block
        piece, self._window = self._window[:end], self._window[end + len(delimiter) :]
        yield piece


# --- The server -----------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    """One client's connection: request after request until either side hangs up."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # with it, an answer waits 40 ms for the client's acknowledgement
    server: Server

    def handle(self) -> None:
        self.connection.settimeout(self.server.idle_seconds)
        with contextlib.suppress(OSError):  # a broken connection simply ends
            super().handle()

    def answer_request(self) -> None:
        """Answer a request whose head has been read."""
        length = self.headers.get("content-length", "0")
        if self.request_version != "HTTP/1.1" or not re.fullmatch("[0-9]+", length):
            self.send_error(400, "Not an HTTP/1.1 request")
            return
        if "transfer-encoding" in self.headers:  # like the storage; no client of the Gateway needs it
            self.send_error(501, "A body needs a Content-Length")
            return
        self.connection.settimeout(TRANSFER_SECONDS)
        headers = {name.lower(): value for name, value in self.headers.items()}
        # `self.path` lacks a second slash at the beginning, but such a path is one that does not exist.
        request = Request(self.command, self.requestline.split()[1], headers, self.rfile, int(length))
        answer = self.server.respond(request)
        if self.command == "HEAD":  # no endpoint takes it, and its refusal has a body all the same
            self.close_connection = True
        self._send(answer)
        if answer.status == 500:  # as the deployed server, which does not announce it either
            self.close_connection = True
        if not self.close_connection:
            for _ in request.blocks():  # what was refused unread: on loopback that is soon over
                pass
            self.connection.settimeout(self.server.idle_seconds)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer_request  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a malformed request. Nobody knows where it ends, so that nothing can follow it."""
        self.close_connection = True
        self._send(json_answer({"detail": message or explain or HTTPStatus(code).phrase}, code))

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)

    def _send(self, answer: Answer) -> None:
        headers = dict(answer.headers)
        if self.close_connection:
            headers["connection"] = "close"
        if answer.chunks:
            headers["transfer-encoding"] = "chunked"
        elif answer.status != 204:
            headers["content-length"] = str(len(answer.part) if answer.file else len(answer.body))
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        if answer.chunks:
            self._send_chunks(head, answer.chunks)
        elif answer.file:
            with answer.file:
                self.wfile.write(head)
                if answer.part:
                    self.connection.sendfile(answer.file, answer.part.start, len(answer.part))
        else:  # head and body in one write: the client's first read finds the whole answer
            self.wfile.write(head + answer.body)

    def _send_chunks(self, head: bytes, chunks: Generator[bytes, None, None]) -> None:
        """Send each chunk as soon as it is there; a client that is gone ends the generator."""
        with contextlib.closing(chunks):
            for chunk in chunks:  # begun before the first write: only then can closing it clean up
                self.wfile.write(b"%b%x\r\n%b\r\n" % (head, len(chunk), chunk))
                head = b""
            self.wfile.write(head + b"0\r\n\r\n")


class Server(ThreadingHTTPServer):
    """A thread accepts connections, and each connection has a thread of its own until `close`."""

    request_queue_size = 128
    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers have one port
    allow_reuse_port = False  # this, too, which newer Pythons allow

    def __init__(self, port: int, respond: Callable[[Request], Answer], idle_seconds: float) -> None:
        self.respond, self.idle_seconds = respond, idle_seconds
        self._connections: dict[threading.Thread, socket.socket] = {}
        super().__init__(("127.0.0.1", port), _Handler)
        self._acceptor = threading.Thread(target=self.serve_forever, args=[STOP_SECONDS], daemon=True)

    def start(self) -> None:
        self._acceptor.start()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without HTTPServer's look-up of a name, which can take seconds

    def process_request(self, request: Any, client_address: Any) -> None:
        arguments = (request, client_address)
        thread = threading.Thread(target=self.process_request_thread, args=arguments, daemon=True)
        self._connections[thread] = request  # for `close`
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        super().process_request_thread(request, client_address)
        self._connections.pop(threading.current_thread(), None)

    def shutdown_request(self, request: Any) -> None:
        # To close with bytes unread would be a reset, which could cost the client the answer.
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(self.idle_seconds)
            while request.recv(BLOCK_BYTES):
                pass
        self.close_request(request)

    def close(self) -> None:
        """Accept no more, break the connections, and wait for their threads."""
        self.shutdown()
        self._acceptor.join()
        self.server_close()
        connections = list(self._connections.items())
        for _, sock in connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread, _ in connections:
            thread.join(max(0.0, deadline - time.monotonic()))
