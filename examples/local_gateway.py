"""A Gateway on this machine, for developing, testing and trying things out offline.

It is a real HTTP server on 127.0.0.1 that speaks the Gateway's whole protocol. Prefabs are plain
Python functions, files lie behind signed URLs that expire, and every error comes where it is due.
As a program it serves until it is stopped: `python local_gateway.py --prefab path/to/my-prefab`.
In code it is a context manager:

    with LocalGateway("path/to/my-prefab") as gateway:
        client = GatewayClient(gateway.base_url, internal_token=gateway.internal_token)

It runs code, so it answers only programs of this machine: no web page, and no name but its own.

This file needs no other. From top to bottom: requests and answers, forms, the storage; prefabs,
those of folders and their processes, those that come with it; event streams; the gateway, its
endpoints and the table of their routes; the HTTP server; the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import email.message
import errno
import hashlib
import hmac
import inspect
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode

__all__ = ["CallFailed", "LocalGateway", "environment", "main"]

BLOCK_BYTES = 256 * 1024  # of bodies and files: large enough for speed, small enough for the cache
IDLE_SECONDS = 5.0  # as the deployed server: it hangs up on an idle connection, unannounced
TRANSFER_SECONDS = 60.0  # the longest wait for bytes in the middle of a request or an answer
CLOSE_SECONDS = 3.0  # for calls under way to end when the server closes
CALL_SECONDS = 1200.0  # for a call of a folder's prefab, all in all
EXIT_SECONDS = 2.0  # for the exit handlers of a function's process
WATCH_SECONDS = 0.05  # between two looks whether the reader of a stream has left

logger = logging.getLogger("local_gateway")
logger.addHandler(logging.NullHandler())  # in code it prints nothing; a test's log shows it

# --- Requests and answers -------------------------------------------------------------


class Request(NamedTuple):
    method: str
    path: str  # with the query, as it came
    headers: Mapping[str, str]  # names in lower case
    body: Iterator[bytes]  # block by block, to be read once

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.path.partition("?")[2], keep_blank_values=True))


class Answer(NamedTuple):
    status: int
    # Of a generator: in chunks if there is no `content-length`.
    body: bytes | Generator[bytes, None, None] = b""
    headers: Mapping[str, str] = {}
    # Called when the client hangs up before the end, at once and from another thread.
    left: Callable[[], None] | None = None


encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def json_bytes(value: Any) -> bytes:
    """The value as JSON, with null for NaN and the infinities as the Gateway does it."""
    try:
        text = encode_json(value)
    except ValueError:  # NaN is rare: the detour is made only when there is one
        text = encode_json(json.loads(json.dumps(value), parse_constant=lambda _: None))
    return text.encode("utf-8", "replace")


def json_answer(value: Any, status: int = 200) -> Answer:
    return Answer(status, json_bytes(value), {"content-type": "application/json"})


class Refusal(Exception):
    """Ends the handling of a request with an error, as the Gateway words it."""

    def __init__(self, status: int, detail: Any) -> None:
        super().__init__(status, detail)
        self.answer = json_answer({"detail": detail}, status)


class StorageRefusal(Refusal):
    """The same as the storage words it, in XML."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message)
        text = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        )
        headers = {"content-type": "application/xml", **(headers or {})}
        self.answer = Answer(status, text.encode(), headers)


def invalid(loc: Sequence[str | int], message: str, kind: str) -> Refusal:
    """A 422 with the list form of `detail`."""
    return Refusal(422, [{"type": kind, "loc": list(loc), "msg": message, "input": None}])


class Mismatch(NamedTuple):
    """Something in a JSON value that is not as it should be."""

    loc: tuple[str | int, ...]
    expected: str  # the name of a type; empty where a field is missing
    value: Any


# What JSON values look like: a type; a list of the kind of its items; an object of the kinds of its
# fields, in which "?" marks a field that may be missing, and "*" stands for any name.
UPLOAD_URL_BODY = {"filename": str}
SECRET_BODY = {"prefab_id": str, "secret_name": str, "secret_value": str}
NESTED_INPUTS = {"parameters?": dict, "files?": {"*": [str]}}
CALL = {"prefab_id": str, "version": str, "function_name": str}
NESTED_CALLS = {"calls": [{**CALL, "inputs": NESTED_INPUTS}]}
FLAT_CALLS = {"calls": [{**CALL, "inputs": dict}]}


def mismatches(value: Any, kind: Any, *loc: str | int) -> Iterator[Mismatch]:
    """All that is not of the kind; `loc` says where the value is."""
    expected: Any = kind if isinstance(kind, type) else type(kind)
    if not isinstance(value, expected):
        yield Mismatch(loc, expected.__name__, value)
    elif isinstance(kind, list):
        for index, item in enumerate(value):
            yield from mismatches(item, kind[0], *loc, index)
    elif isinstance(kind, dict):
        for field, kind_of_field in kind.items():
            for name in value if field == "*" else [field.rstrip("?")]:
                if name in value:
                    yield from mismatches(value[name], kind_of_field, *loc, name)
                elif not field.endswith("?"):
                    yield Mismatch((*loc, name), "", None)


def check(value: Any, kind: Any, *loc: str | int) -> None:
    """Refuse a part of a request that is not of the kind."""
    for found in mismatches(value, kind, *loc):
        if not found.expected:
            raise invalid(found.loc, "Field required", "missing")
        message = f"Input should be a valid {found.expected}"
        raise invalid(found.loc, message, f"{found.expected}_type")


def read_json(request: Request, kind: Mapping[str, Any]) -> Any:
    """The body, which must be JSON of this kind."""
    # A web page can send JSON anywhere without asking, as long as it does not call it JSON.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = "JSON must be sent with the header 'Content-Type: application/json'"
        raise invalid(["header", "content-type"], message, "content_type")
    try:
        value = json.loads(b"".join(request.body).decode())
    except UnicodeDecodeError as error:
        raise Refusal(400, "There was an error parsing the body") from error
    except ValueError as error:
        raise invalid(["body"], "JSON decode error", "json_invalid") from error
    check(value, kind, "body")
    return value


def read_number(fields: Mapping[str, str], name: str, default: int, largest: int) -> int:
    """An integer between 1 and `largest`, from a query or a form."""
    text = fields.get(name, str(default))
    if re.fullmatch(r"\d{1,10}", text) and 1 <= int(text) <= largest:
        return int(text)
    raise invalid([name], f"Input should be an integer between 1 and {largest}", "int_range")


# --- Forms ----------------------------------------------------------------------------


class Form:
    """A `multipart/form-data` body (RFC 7578), read up to its file's content.

    `email` could read it too, but would hold the file in memory.
    """

    def __init__(self, request: Request) -> None:
        head = email.message.Message()
        head["content-type"] = request.headers.get("content-type", "")
        self._delimiter = f"\r\n--{head.get_boundary()}".encode("latin-1")
        self._blocks = request.body
        self._window = b"\r\n"  # makes the first delimiter look like all the others
        self.fields: dict[str, str] = {}  # those before the file
        name = ""
        while name != "file":
            self.fields[name] = self._read_until(self._delimiter)
            if self._read_until(b"\r\n") == "--":
                raise invalid(["body", "file"], "Field required", "missing")
            part = email.message_from_string(self._read_until(b"\r\n\r\n"))
            name = str(part.get_param("name", "", "content-disposition"))
        self.filename = part.get_filename("")
        self.content = self._until(self._delimiter)  # of the file, to be read once

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


# --- The storage ----------------------------------------------------------------------

S3_ROOT = "s3://local/"
INPUTS = "agent-inputs/local-user"
OUTPUTS = "agent-outputs/local-user/local-agent"
WORKSPACE = "agent-workspace/local-user/local-agent"


def safe_name(name: str) -> str:
    """A client's name for a file as the name of a file here; of a long one the end is kept."""
    name = re.sub(r"[\x00-\x1f\x7f/\\]", "_", name)
    name = name.encode("utf-8", "replace")[-200:].decode("utf-8", "ignore")
    return name if name.strip(". ") else "file"


def read_blocks(path: Path, part: range | None = None) -> Generator[bytes, None, None]:
    """The content of a file of any size, or a part of it."""
    part = range(path.stat().st_size) if part is None else part
    with path.open("rb") as file:
        file.seek(part.start)
        for start in range(part.start, part.stop, BLOCK_BYTES):
            yield file.read(min(BLOCK_BYTES, part.stop - start))


class StoredFile(NamedTuple):
    s3_url: str
    path: Path  # alone in its folder, whose name is unique
    expires_at: float

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def entry(self) -> dict[str, Any]:
        """How listings show it."""
        status = self.path.stat()
        modified = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(status.st_mtime))
        return {
            "key": self.s3_url[len(S3_ROOT) :], "size": status.st_size,
            "last_modified": modified, "s3_url": self.s3_url,
        }


class Storage:
    """Files in a folder, under the URLs that they would have in S3, and signed URLs to them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, StoredFile] = {}
        self._next_expiry = math.inf
        self._signing_key = os.urandom(32)

    def new_url(self, folder: str, name: str) -> str:
        """The S3 URL of a new file. Their order is that of time, as listings are."""
        unique = f"{time.time_ns():016x}{uuid.uuid4().hex[:8]}"
        return f"{S3_ROOT}{folder}/{unique}/{safe_name(name)}"

    def new_folder(self) -> Path:
        """The path of a folder that is not made yet."""
        return self._folder / uuid.uuid4().hex

    def write(
        self, s3_url: str, blocks: Iterable[bytes], expires_at: float = math.inf
    ) -> StoredFile:
        """Keep what comes, in place of what was there; if that breaks off, nothing is left."""
        path = self.new_folder() / s3_url.rpartition("/")[2]
        path.parent.mkdir()
        try:
            with path.open("wb") as file:
                file.writelines(blocks)
        except BaseException:
            shutil.rmtree(path.parent)
            raise
        before = self._files.get(s3_url)
        self._files[s3_url] = stored = StoredFile(s3_url, path, expires_at)
        self._next_expiry = min(self._next_expiry, expires_at)
        if before:
            shutil.rmtree(before.path.parent, ignore_errors=True)
        return stored

    def find(self, s3_url: str) -> StoredFile | None:
        """The file of an S3 URL, unless it has expired."""
        stored = self._files.get(s3_url)
        return stored if stored and time.time() < stored.expires_at else None

    def list(self, folder: str) -> list[StoredFile]:
        """The files below a folder, in the order of their URLs."""
        below = f"{S3_ROOT}{folder}/"
        urls = sorted(url for url in self._files.copy() if url.startswith(below))
        return [stored for stored in map(self.find, urls) if stored]

    def delete(self, stored: StoredFile) -> None:
        """Delete a file; it may be gone already."""
        self._files.pop(stored.s3_url, None)
        shutil.rmtree(stored.path.parent, ignore_errors=True)

    def delete_expired(self) -> None:
        """Delete the files whose time is up; without them it costs nothing."""
        if time.time() < self._next_expiry:
            return
        self._next_expiry = math.inf  # before the look: what is written meanwhile sets it again
        for stored in self._files.copy().values():
            if stored.expires_at <= time.time():
                self.delete(stored)
            else:
                self._next_expiry = min(self._next_expiry, stored.expires_at)

    def presign(
        self, base_url: str, method: str, s3_url: str, expires_in: int, content_type: str = ""
    ) -> str:
        """A URL that allows this one method on this one file for `expires_in` seconds."""
        key, expires = s3_url[len(S3_ROOT) :], f"{time.time() + expires_in:.3f}"
        signature = self.sign(method, key, expires, content_type)
        query = urlencode({"Expires": expires, "Signature": signature})
        return f"{base_url}/storage/{quote(key)}?{query}"

    def sign(self, *parts: str) -> str:
        """What only the storage can make of method, key, time of expiry and content type."""
        message = "\n".join(parts).encode("utf-8", "surrogateescape")
        return hmac.new(self._signing_key, message, hashlib.sha256).hexdigest()


# --- Prefabs --------------------------------------------------------------------------


class PrefabError(Exception):
    """What went wrong in a prefab: a message, the name of the error's type, and the traceback."""

    def __init__(self, message: str, type: str = "CallFailed", traceback: str = "") -> None:
        super().__init__(message)
        self.type = type
        self.traceback = traceback


class CallFailed(PrefabError):
    """Raised by a prefab function to end its call as FAILED, with this message and type."""


def describe_error(error: Exception) -> dict[str, str]:
    """An error as results and event streams show it."""
    return {"message": str(error), "type": getattr(error, "type", type(error).__name__)}


def own_traceback(error: Exception) -> str:
    """The traceback of a prefab's error from the prefab's first line on."""
    if isinstance(error, PrefabError):  # it comes from a process
        return error.traceback or str(error)
    frames = error.__traceback__
    this_file = own_traceback.__code__.co_filename
    while frames and frames.tb_next and frames.tb_frame.f_code.co_filename == this_file:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


class Job:
    """One call of a function, and what the function gets."""

    def __init__(self, name: str, folder: Path, seconds: float) -> None:
        self.name = name  # of the function and its prefab, for the log
        self.folder = folder  # made only where it is needed: most functions have no files
        self.seconds = seconds  # that its process may take
        self.parameters: dict[str, Any] = {}
        self.undeclared: list[str] = []  # names of parameters that the manifest does not have
        self.as_paths: list[str] = []  # names of parameters that are files: the function gets paths
        self.inputs: dict[str, list[Path]] = {}
        self.secrets: dict[str, str] = {}
        self.child: Child | None = None
        self.left = False  # nobody waits for it any more
        self.kept: list[StoredFile] = []  # its outputs in the storage

    @property
    def outputs(self) -> Path:
        """The folder for output files."""
        path = self.folder / "data" / "outputs"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def fill_in_paths(self, inputs: Mapping[str, list[Path]]) -> None:
        """Put the paths of input files in place of their URLs."""
        for name in self.as_paths:
            paths = [str(path) for path in inputs[safe_name(name)]]
            several = isinstance(self.parameters[name], list)
            self.parameters[name] = paths if several else paths[0]

    def leave(self) -> None:
        """End its process, if it has one: nobody waits for it any more."""
        self.left = True
        if self.child:
            self.child.kill()


class Function(NamedTuple):
    entry: Mapping[str, Any]  # in the manifest
    secrets: Sequence[Mapping[str, Any]]  # that it gets
    run: Callable[[Job], Any]  # calls it; if it gives a generator, that is a stream


Functions = Mapping[str, Callable[..., Any]]
RESERVED = ("inputs", "outputs", "secrets")  # parameters that the gateway fills in
# The types that are checked, as the published server does it: True is a number there.
TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str, "number": (int, float), "integer": int,
    "boolean": bool, "array": list, "object": dict,
}  # fmt: skip
TYPE_NAMES = {
    "str": "string", "int": "integer", "float": "number",
    "bool": "boolean", "list": "array", "dict": "object",
}  # fmt: skip


class Prefab:
    """A manifest, and the functions that it describes."""

    def __init__(
        self,
        manifest: Mapping[str, Any],
        runs: Mapping[str, Callable[[Job], Any]],
        status: str = "deployed",
    ) -> None:
        self.key = (manifest["id"], manifest["version"])
        self.spec = manifest  # as it is: whatever it leaves out is left out by the Gateway too
        self.functions: dict[str, Function] = {}
        secrets = {}
        for entry in manifest["functions"]:
            own = entry.get("secrets", manifest.get("secrets", []))
            secrets.update({secret["name"]: secret for secret in own})
            function = Function(entry, own, runs[entry["name"]])
            self.functions.setdefault(entry["name"], function)  # the first, as the Gateway does it
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        passed_on = ("author", "github_url", "is_official")
        self.entry = {  # in the directory
            "id": manifest["id"], "version": manifest["version"],
            "name": manifest.get("name", manifest["id"]),
            "description": manifest.get("description", ""), "tags": manifest.get("tags", []),
            "deployment_status": status, "knative_service_url": None,
            "functions": manifest["functions"], "deployed_at": now, "updated_at": now,
            "requires_secrets": bool(secrets), "secrets": list(secrets.values()),
            **{name: manifest[name] for name in passed_on if name in manifest},
        }  # fmt: skip

    def failed(self, error: str) -> Prefab:
        """The same as the directory shows it when its deployment has failed."""
        prefab = copy.copy(self)
        prefab.entry = {**self.entry, "deployment_status": "failed", "deployment_error": error}
        return prefab


def check_parameters(function: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Refuse what the published server refuses; the names of the undeclared ones."""
    undeclared = dict.fromkeys(given)
    for parameter in function.get("parameters", ()):
        name, type_name = parameter["name"], parameter.get("type", "string")
        if name not in given and parameter.get("required", True):
            raise Refusal(422, f"Missing required parameter: {name}")
        expected = TYPES.get(type_name, object)
        if name in given and not isinstance(given[name], expected):
            raise Refusal(422, f"Type mismatch for parameter {name}: expected {type_name}")
        undeclared.pop(name, None)
    return list(undeclared)


def is_file(value: Any) -> bool:
    """Whether the value of a flat input is a file, or a list of files."""
    urls = value if isinstance(value, list) else [value]
    return bool(urls) and all(isinstance(url, str) and url.startswith("s3://") for url in urls)


def split_flat(
    function: Mapping[str, Any], inputs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The parameters, and the URLs of the files, of inputs that are both in one object.

    A file is what is declared as an `InputFile`, which is a parameter too, or not declared at all.
    """
    types = {entry["name"]: entry.get("type") for entry in function.get("parameters", ())}
    parameters, files = {}, {}
    for name, value in inputs.items():
        if is_file(value) and (name not in types or types[name] == "InputFile"):
            files[name] = value if isinstance(value, list) else [value]
        if name in types or name not in files:
            parameters[name] = value
    return parameters, files


def describe(
    name: str, function: Callable[..., Any], secrets: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The manifest's entry of a Python function, from its signature and docstring."""
    signature = inspect.signature(function).parameters
    parameters = []
    for parameter in signature.values():
        rest = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if rest or parameter.name in RESERVED:
            continue
        annotation = getattr(parameter.annotation, "__name__", str(parameter.annotation))
        type_name = TYPE_NAMES.get(annotation.partition("[")[0], "any")
        described = {"name": parameter.name, "type": type_name, "required": True}
        if parameter.default is not parameter.empty:
            described.update(required=False, default=parameter.default)
        parameters.append(described)
    return {
        "name": name, "description": (inspect.getdoc(function) or "").partition("\n")[0],
        "parameters": parameters, "streaming": inspect.isgeneratorfunction(function),
        "secrets": secrets if "secrets" in signature else [],
    }  # fmt: skip


def run_here(function: Callable[..., Any]) -> Callable[[Job], Any]:
    """How a function of this process is called."""
    signature = inspect.signature(function).parameters
    reserved = [name for name in RESERVED if name in signature]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())

    def run(job: Job) -> Any:
        for name in job.undeclared:
            if name in RESERVED or not takes_any:
                raise Refusal(422, f"Unknown parameter: {name}")
        job.fill_in_paths(job.inputs)
        return function(**job.parameters, **{name: getattr(job, name) for name in reserved})

    return run


# --- Prefab folders -------------------------------------------------------------------

# What the gateway itself needs of a manifest; everything else is passed on as it is.
SECRETS = [{"name": str, "required?": bool}]
PARAMETERS = [{"name": str, "type?": str, "required?": bool}]
MANIFEST = {
    "id": str, "version": str, "secrets?": SECRETS,
    "functions": [{"name": str, "parameters?": PARAMETERS, "secrets?": SECRETS}],
}  # fmt: skip
JSON_NAMES = {
    "str": "a string", "bool": "true or false", "list": "an array", "dict": "an object",
}  # fmt: skip


def describe_mismatch(found: Mismatch) -> str:
    """What is wrong with a field, such as `functions[0].name is missing`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in found.loc]
    field = "".join(parts).lstrip(".") or "the whole"
    if not found.expected:
        return f"{field} is missing"
    return f"{field} must be {JSON_NAMES[found.expected]}, not {json.dumps(found.value)[:40]}"


def read_manifest(content: bytes) -> dict[str, Any]:
    """The manifest; a ValueError that says what is wrong with it."""
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark: save it as UTF-8 without one")
    try:
        manifest: dict[str, Any] = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8: save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    problems = list(map(describe_mismatch, mismatches(manifest, MANIFEST)))
    if problems:
        raise ValueError("; ".join(problems))
    return manifest


class PrefabFolder:
    """A prefab as its developer has it on disk; each call runs in a process of its own."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).resolve()
        self.prefab: Prefab | None = None  # a failed one if the manifest can't be used any more
        self.error: OSError | ValueError | None = None  # what is wrong with the manifest
        self._last: bytes | str | None = None  # what was read, or why nothing was

    def refresh(self) -> None:
        """Read the manifest again if it has changed."""
        path = self.folder / "prefab-manifest.json"
        read: bytes | str
        try:
            read = path.read_bytes()
        except OSError as error:
            read, self.error = str(error), error
        if read == self._last:
            return
        self._last = read
        if isinstance(read, bytes):
            self._load(path, read)
        if self.error:
            logger.error("%s", self.error)
            self.prefab = self.prefab.failed(str(self.error)) if self.prefab else None

    def _load(self, path: Path, content: bytes) -> None:
        try:
            manifest = read_manifest(content)
        except ValueError as error:
            self.error = ValueError(f"{path} cannot be used: {error}")
            return
        names = [function["name"] for function in manifest["functions"]]
        self.prefab = Prefab(manifest, {name: run_in_child(self.folder, name) for name in names})
        self.error = None


# --- The process of a call ------------------------------------------------------------

# It is told what to do by a line on stdin, and answers with lines on stdout: [kind, value].
CHILD_PROGRAM = r"""
import importlib, json, os, signal, sys, threading, types  # no others: each call waits for them

def tell(kind, value=None):
    pipe.write(json.dumps([kind, value]) + "\n")
    pipe.flush()

def end_with_the_gateway():
    os.read(lifeline, 1)  # returns when the gateway has ended, in whatever way
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)

def refuse_breakpoint(*args, **kwargs):
    raise RuntimeError("breakpoint() has no terminal here: use LocalGateway.add_prefab()")

def load(folder):
    src = os.path.join(folder, "src")
    # As a package, so that relative imports work; what stands beside main.py is found as well,
    # but last, as otherwise a src/types.py would be taken for Python's own.
    sys.path = [folder, *filter(None, sys.path), src]
    if not os.path.exists(os.path.join(src, "__init__.py")):
        sys.modules["src"] = types.ModuleType("src")  # or another `src` might be found
        sys.modules["src"].__path__ = [src]
    return importlib.import_module("src.main")

def untaken(function, names):
    import inspect
    try:
        signature = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some of those written in C have none
        return []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
        return []
    return [name for name in names if name not in {parameter.name for parameter in signature}]

def own_traceback(error):
    import traceback
    frames = error.__traceback__
    while frames and not frames.tb_frame.f_code.co_filename.startswith(folder + os.sep):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))

folder, name, parameters, undeclared = json.loads(sys.stdin.buffer.readline())
lifeline, pipe = os.dup(0), os.fdopen(os.dup(1), "w", newline="\n")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)  # what the function prints must not get between the lines
sys.breakpointhook = refuse_breakpoint
threading.Thread(target=end_with_the_gateway, daemon=True).start()
try:
    function = getattr(load(folder), name)
    refused = undeclared and untaken(function, undeclared)
    if refused:
        tell("untaken", refused[0])
    else:
        outcome = function(**parameters)
        streams = isinstance(outcome, types.GeneratorType)
        tell("kind", "stream" if streams else "value")
        for value in outcome if streams else [outcome]:
            tell("given", value)
        tell("end")
except Exception as error:
    told = {"message": str(error), "type": type(error).__name__}
    tell("error", {**told, "traceback": own_traceback(error)})
"""
LAST_LINE = b'["end", null]\n'


def python_of(folder: Path) -> str:
    """The interpreter of the folder's own environment if there is one, else this one."""
    if not (folder / ".venv").is_dir():
        return sys.executable
    place = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    return str(folder / ".venv" / place)


class Child:
    """A process that runs one function, and all that it starts in its turn."""

    def __init__(self, command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> None:
        self._error: PrefabError | None = None  # why it was killed
        self._ended = False
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,  # a process group of its own, which Ctrl-C does not reach
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )  # fmt: skip

    def ask(self, task: Any) -> Iterator[tuple[str, Any]]:
        """Tell it what to do; kinds and values until its last one. An error if it dies before."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line == LAST_LINE:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(EXIT_SECONDS)
                return
            if line.endswith(b"\n"):  # or else it was cut off
                kind, value = json.loads(line)
                yield kind, value
        status = self._process.wait()
        raise self._error or PrefabError(f"its process ended with status {status}", "ProcessDied")

    def kill(self, error: PrefabError | None = None) -> None:
        """End it and what it has started, for this reason."""
        with self._lock:
            if not self._ended:  # or its number may be that of another process
                self._error = self._error or error
                self._kill_group()

    def close(self) -> None:
        """End what is left of it."""
        with self._lock:
            self._ended = True
            self._kill_group()
        self._process.wait()
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _kill_group(self) -> None:
        if sys.platform == "win32":
            command = ["taskkill", "/T", "/F", "/PID", str(self._process.pid)]
            subprocess.run(command, capture_output=True, check=False)
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
                os.killpg(self._process.pid, signal.SIGKILL)


def copy_inputs(job: Job) -> dict[str, list[Path]]:
    """Copy the input files: what a function does to them must not change the storage."""
    folder = job.outputs.with_name("inputs")
    folder.mkdir()
    copies: dict[str, list[Path]] = {}
    for key, paths in job.inputs.items():
        (folder / key).mkdir()
        copies[key] = []
        for number, path in enumerate(paths, 1):
            target = folder / key / path.name
            if target.exists():  # two of one name
                target = target.with_name(f"{number}-{path.name}")
            shutil.copyfile(path, target)
            copies[key].append(target)
    return copies


def run_in_child(folder: Path, name: str) -> Callable[[Job], Any]:
    """How a function of a folder is called."""

    def run(job: Job) -> Any:
        job.fill_in_paths(copy_inputs(job))
        told = ask_child(folder, name, job)
        if next(told) == "stream":
            return told  # all else are its pieces
        (value,) = told
        return value

    return run


def ask_child(folder: Path, name: str, job: Job) -> Generator[Any, None, None]:
    """Run a function in a process, which ends with this generator.

    It gives "value" or "stream", and then what the function gives.
    """
    # Unbuffered, so that what it prints is seen at once; without leaving `__pycache__` behind.
    command = [python_of(folder), "-u", "-B", "-c", CHILD_PROGRAM]
    child = job.child = Child(command, job.folder, {**os.environ, **job.secrets})
    late = PrefabError(f"it took longer than {job.seconds:g} seconds", "TimedOut")
    timer = threading.Timer(job.seconds, child.kill, [late])
    timer.daemon = True
    timer.start()
    try:
        if job.left:  # in the meantime
            child.kill()
        for kind, value in child.ask([str(folder), name, job.parameters, job.undeclared]):
            if kind == "error":
                raise PrefabError(**value)
            if kind == "untaken":
                raise Refusal(422, f"Unknown parameter: {value}")
            yield value
    finally:
        timer.cancel()
        child.close()


# --- The prefabs that come with the gateway -------------------------------------------

Inputs = dict[str, list[Path]]  # names to files
SIGNING_KEY = {"name": "SIGNING_KEY", "description": "The key of your signatures",
               "instructions": "Any text that only you know; store it with POST /v1/secrets"}


def statistics(text: str) -> dict[str, Any]:
    """Count the characters, words and lines of a text, and its most common words."""
    words = text.split()
    return {
        "success": True, "message": f"{len(words)} words",
        "characters": len(text), "words": len(words), "lines": len(text.splitlines()),
        "most_common": Counter(text.lower().split()).most_common(5),
    }


def stream_words(text: str, delay: float = 0.0) -> Iterator[str]:
    """Stream a text word by word, `delay` seconds apart; joined they are the text again."""
    for match in re.finditer(r"^\s+|\S+\s*", text):
        yield match[0]
        if delay:  # to sleep for no time takes longer than to send the word
            time.sleep(delay)


def echo(value: Any) -> Any:
    """Give back the value."""
    return value


def find(text: str, pattern: str) -> dict[str, Any]:
    """Find all matches of a regular expression."""
    matches = [{"start": match.start(), "text": match[0]} for match in re.finditer(pattern, text)]
    return {"success": True, "message": f"{len(matches)} matches", "matches": matches}


def given_files(inputs: Inputs) -> list[Path]:
    if not inputs.get("files"):
        raise CallFailed("Give the input files under the key 'files'", "NoInputFiles")
    return inputs["files"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checksum(inputs: Inputs, outputs: Path) -> dict[str, Any]:
    """Write the SHA-256 sums of the input files `files` into the file `checksums`."""
    sums = [{"name": path.name, "sha256": sha256(path)} for path in given_files(inputs)]
    lines = [f"{entry['sha256']}  {entry['name']}\n" for entry in sums]
    (outputs / "checksums").mkdir()
    (outputs / "checksums" / "SHA256SUMS.txt").write_text("".join(lines), encoding="utf-8")
    return {"success": True, "message": f"{len(sums)} files", "checksums": sums}


def line_count(inputs: Inputs) -> dict[str, Any]:
    """Count the lines of the input files `files`."""
    total = sum(block.count(b"\n") for path in given_files(inputs) for block in read_blocks(path))
    return {"success": True, "message": f"{total} lines", "lines": total}


def concatenate(inputs: Inputs, outputs: Path, name: str = "all.txt") -> dict[str, Any]:
    """Join the input files `files` into one output file."""
    with (outputs / safe_name(name)).open("wb") as target:
        for path in given_files(inputs):
            target.writelines(read_blocks(path))
    return {"success": True, "message": f"{len(inputs['files'])} files"}


def inspect_files(inputs: Inputs) -> Iterator[Any]:
    """Stream name, size and SHA-256 of the input files `files`, and the progress."""
    paths = given_files(inputs)
    for done, path in enumerate(paths, 1):
        yield {"name": path.name, "size": path.stat().st_size, "sha256": sha256(path)}
        yield {"type": "progress", "data": {"done": done, "total": len(paths)}}


def sign(text: str, secrets: dict[str, str]) -> dict[str, Any]:
    """Sign a text with the caller's own key (HMAC-SHA256)."""
    digest = hmac.new(secrets["SIGNING_KEY"].encode(), text.encode(), hashlib.sha256)
    return {"success": True, "message": "signed", "signature": digest.hexdigest()}


def fail(message: str = "This always fails") -> dict[str, Any]:
    """Report a business failure: the call succeeds, its result says it does not."""
    return {"success": False, "error": message, "error_code": "ALWAYS_FAILS"}


def crash(message: str = "out of order") -> None:
    """Raise an error: the whole request is answered 503."""
    raise RuntimeError(message)


def refuse(message: str = "refused") -> None:
    """End this call as FAILED; the others of the request go on."""
    raise CallFailed(message, "Refused")


def stumble(text: str = "as far as it goes ") -> Iterator[str]:
    """Stream the words of a text, then break off with an error event."""
    yield from stream_words(text)
    raise RuntimeError("stumbled")


def add_own_prefabs(add: Callable[..., None]) -> None:
    """Give them to `LocalGateway.add_prefab`, the newest last."""
    faults = {"fail": fail, "crash": crash, "refuse": refuse, "stumble": stumble}
    files = {
        "checksum": checksum, "line_count": line_count,
        "concatenate": concatenate, "inspect": inspect_files,
    }  # fmt: skip
    texts = {"statistics": statistics, "words": stream_words, "echo": echo}
    add("faulty", "1.0.0", faults, description="Errors on demand")
    add("vault", "1.0.0", {"sign": sign}, description="Needs a secret", secrets=[SIGNING_KEY])
    add("file-tools", "1.0.0", files, description="Looks at files")
    add("text-tools", "1.0.0", texts, description="Looks at texts")
    add("text-tools", "1.1.0", {**texts, "find": find}, description="Looks at texts")


# --- Event streams --------------------------------------------------------------------

EVENT_TYPES = ("start", "content", "progress", "done", "error")


def event_bytes(event: Mapping[str, Any]) -> bytes:
    return b"data: " + json_bytes(event) + b"\n\n"


def log_failure(job: Job, error: Exception) -> None:
    """Log what a prefab did not mean to raise, unless nobody waits for it any more."""
    if not job.left and not isinstance(error, (CallFailed, Refusal)):
        logger.error("%s failed\n%s", job.name, own_traceback(error).rstrip())


def stream_events(
    job: Job, job_id: str, pieces: Iterator[Any], keep_outputs: Callable[[Job], Any]
) -> Iterator[bytes]:
    """The events that a function yields, with the `start` and the end that it leaves out."""
    start = event_bytes({"type": "start", "data": {"job_id": job_id}})
    types: set[str] = set()  # of its events so far
    try:
        for piece in pieces:
            is_event = isinstance(piece, dict) and piece.get("type") in EVENT_TYPES
            event = piece if is_event else {"type": "content", "data": piece}
            before = b"" if types or event["type"] == "start" else start
            types.add(event["type"])
            yield before + event_bytes(event)
        files = keep_outputs(job)
        if files or not types & {"done", "error"}:  # files come after a `done` of its own as well
            done = {"type": "done", "data": {"job_id": job_id, "files": files}}
            yield (b"" if types else start) + event_bytes(done)
    except Exception as error:  # noqa: BLE001 - whatever the function raises ends its stream
        log_failure(job, error)
        if "error" not in types:
            told = {"type": "error", "data": describe_error(error)}
            yield (b"" if types else start) + event_bytes(told)


# --- The gateway ----------------------------------------------------------------------

OWN_NAMES = ("127.0.0.1", "localhost")  # those of this machine for itself
CREDENTIAL_HEADERS = ("x-internal-token", "x-api-key", "authorization")
AGENT = ("agent",)
ANYONE = ("agent", "user", "key", "jwt", "nobody")  # nobody: without credentials, by an allow-list
EXCHANGE = "key to exchange"
ID, TEMPORARY = "([^/]+)", "(_temp)?"


class Route(NamedTuple):
    method: str
    path: str  # a regular expression, whose groups the endpoint gets
    admitted: Sequence[str]  # kinds of callers; if there is none, nobody is asked who he is
    endpoint: Callable[..., Answer]


class LocalGateway:
    """A Gateway on this machine. A context manager: serves inside the `with`.

    It serves the prefabs of `prefab_folders` besides those that come with it. A folder without a
    manifest is an OSError, one whose manifest cannot be used a ValueError; a manifest that changes
    counts from the next request on.

    Args:
        port: 0 takes any free one; `base_url` tells which.
        host: another address to listen on, such as "0.0.0.0" in a container. Requests under any
            name are then answered, but none without a credential.
        token: the value of `internal_token`; None makes a new one.

    Attributes that may be set at any time: `flat` (read `inputs` as the published server does),
    `call_seconds` (for a call of a folder's prefab), `down` (answer 503), `quota` (calls in all).
    """

    def __init__(
        self, *prefab_folders: str | os.PathLike[str], port: int = 0, host: str = "127.0.0.1",
        token: str | None = None,
    ) -> None:  # fmt: skip
        if not 0 <= port <= 65535:
            raise ValueError(f"a port is a number from 0 to 65535, not {port}")
        if token is not None and not re.fullmatch(r"[!-~]+", token):
            raise ValueError("a token has no blanks and only ASCII characters")
        self.internal_token = token or f"agent-{uuid.uuid4().hex}"  # of an agent
        self.api_key = f"key-{uuid.uuid4().hex}"  # for `X-API-Key`, or to be exchanged for a token
        self.jwt_token = f"jwt-{uuid.uuid4().hex}"
        self.callers = {  # their kinds by header and value
            ("x-internal-token", self.internal_token): "agent",
            ("x-api-key", self.api_key): "key",
            ("authorization", f"Bearer {self.jwt_token}"): "jwt",
            ("authorization", f"Bearer {self.api_key}"): EXCHANGE,
        }
        self.flat = False  # parameters and files stand side by side in `inputs`
        self.down = False  # every gateway request is answered 503
        self.quota: int | None = None  # calls allowed in total
        self.call_seconds = CALL_SECONDS  # for a call of a folder's prefab, all in all
        self.requests: deque[Request] = deque(maxlen=10_000)  # the last ones
        self.executed: list[tuple[str, str, str]] = []  # prefab id, version, function of each call
        self.secrets: dict[tuple[str, str], str] = {}  # by prefab and name
        self._jobs: set[Job] = set()  # those under way
        self._closed = False
        self._directory: dict[tuple[str, str], Prefab] = {}  # by id and version, newest last
        self._directory_lock = threading.Lock()
        self._folders: list[PrefabFolder] = []
        add_own_prefabs(self.add_prefab)
        for path in prefab_folders:
            error = self.add_folder(path).error
            if error:
                raise error
        self.is_open = host not in OWN_NAMES  # to others than programs of this machine
        self._folder = tempfile.TemporaryDirectory(prefix="local-gateway-")
        self.storage = Storage(Path(self._folder.name).resolve())
        try:
            self._server = Server((host, port), self.answer, self.storage.delete_expired)
        except OSError:
            self._folder.cleanup()
            raise
        name = "127.0.0.1" if host == "0.0.0.0" else host
        self.base_url = f"http://{name}:{self._server.server_address[1]}"

    def __enter__(self) -> LocalGateway:
        look_seconds = 0.02  # between two looks whether to stop; half a second would delay each end
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=[look_seconds], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        for job in self._jobs.copy():
            job.leave()
        self._server.stop()
        self._folder.cleanup()

    # Prefabs

    def add_prefab(
        self,
        prefab_id: str,
        version: str,
        functions: Functions,
        *,
        description: str = "",
        secrets: Iterable[str | Mapping[str, Any]] = (),
        status: str = "deployed",
    ) -> None:
        """Serve plain Python functions as a prefab; a generator function streams.

        They run in this process, so that `breakpoint()` stops in them. A function that names one of
        these parameters gets it from the gateway: `inputs` (name to paths of the input files, to be
        read only), `outputs` (a folder; what is left there is given back), `secrets` (name to
        value). Of `secrets` there are the names, or entries as in a manifest; a function that takes
        them is not run without the required ones. A prefab whose `status` is "failed" is listed but
        cannot be called.
        """
        entries = [
            {"name": secret, "required": True} if isinstance(secret, str) else secret
            for secret in secrets
        ]
        described = [describe(name, function, entries) for name, function in functions.items()]
        manifest = {
            "id": prefab_id, "version": version, "name": prefab_id, "description": description,
            "functions": described,
        }  # fmt: skip
        runs = {name: run_here(function) for name, function in functions.items()}
        with self._directory_lock:
            self._put(Prefab(manifest, runs, status))

    def add_folder(self, path: str | os.PathLike[str]) -> PrefabFolder:
        """Serve the prefab of a folder, as soon as its manifest can be used; `error` tells."""
        folder = PrefabFolder(path)
        self._folders.append(folder)
        self._refresh()
        return folder

    def _refresh(self) -> None:
        """Read the manifests that have changed."""
        with self._directory_lock:
            for folder in self._folders:
                before = folder.prefab
                folder.refresh()
                if folder.prefab is not before and folder.prefab:
                    if before and self._directory.get(before.key) is before:
                        del self._directory[before.key]
                    self._put(folder.prefab)

    def _put(self, prefab: Prefab) -> None:
        self._directory.pop(prefab.key, None)  # the newest stands last
        self._directory[prefab.key] = prefab

    def prefabs(self) -> list[dict[str, Any]]:
        """The directory's entries, newest first."""
        self._refresh()
        with self._directory_lock:
            return [prefab.entry for prefab in reversed(list(self._directory.values()))]

    def find_prefab(self, prefab_id: str, version: str) -> Prefab:
        self._refresh()
        prefab = self._directory.get((prefab_id, version))
        if prefab is None:
            raise Refusal(404, f"Prefab {prefab_id}@{version} not found")
        return prefab

    def secrets_of(self, prefab_id: str) -> dict[str, str]:
        """The values of a prefab's secrets by their names."""
        secrets = self.secrets.copy().items()
        return {name: value for (owner, name), value in secrets if owner == prefab_id}

    # Requests

    def expire_tokens(self) -> None:
        """Refuse the tokens that were issued for API keys up to now."""
        callers = self.callers.items()
        self.callers = {credential: kind for credential, kind in callers if kind != "user"}

    def answer(self, request: Request) -> Answer:
        """The answer to any request. Here errors become answers."""
        self.requests.append(request)
        path = unquote(request.path.partition("?")[0])
        try:
            self._refuse_strangers(request)
            for route in ROUTES:
                match = re.fullmatch(route.path, path)
                if match and route.method == request.method:
                    self._admit(request, route)
                    return route.endpoint(self, request, *match.groups())
            raise Refusal(404, "Not Found")
        except Refusal as error:
            return error.answer
        except (ConnectionError, socket.timeout):  # in the middle of the body
            raise
        except Exception:
            logger.exception("%s %s", request.method, path)
            headers = {"content-type": "text/plain; charset=utf-8"}
            return Answer(500, b"Internal Server Error", headers)

    def _refuse_strangers(self, request: Request) -> None:
        """Refuse what a web page in a browser of this machine sends: prefabs are code."""
        if "origin" in request.headers:
            raise Refusal(403, "No web page may use this gateway: a request has an Origin header")
        host = request.headers.get("host", "")
        name = re.sub(r":\d*$", "", host).lower()
        if not self.is_open and name not in OWN_NAMES:
            message = f"This gateway serves its own machine only, as 127.0.0.1, and not as '{host}'"
            raise Refusal(403, f"{message}: start it with --host to serve others")

    def _admit(self, request: Request, route: Route) -> None:
        """Refuse a request whose sender this route does not admit."""
        if not route.admitted:
            return
        if self.down:
            raise Refusal(503, "The gateway is down")
        given = [
            (name, request.headers[name]) for name in CREDENTIAL_HEADERS if name in request.headers
        ]
        caller = self.callers.get(given[0]) if given else "nobody"
        if caller is None:
            raise Refusal(401, "Could not validate credentials")
        if caller == "nobody" and self.is_open:
            raise Refusal(401, "Not authenticated")
        if caller not in route.admitted and route.admitted is not AGENT:
            raise Refusal(401, "Not authenticated")
        if caller not in route.admitted:
            message = "This operation needs an agent context: use a token given to an agent"
            raise Refusal(400, {"error_code": "MISSING_AGENT_CONTEXT", "message": message})

    def _presign(self, request: Request, method: str, s3_url: str, *more: Any) -> str:
        """A presigned URL under the name by which this client reaches the gateway."""
        host = request.headers.get("host")
        base_url = f"http://{host}" if host else self.base_url
        return self.storage.presign(base_url, method, s3_url, *more)

    # Endpoints: presigned URLs

    def _check_signature(self, request: Request, key: str, content_type: str = "") -> None:
        query = request.query
        if any(header in request.headers for header in CREDENTIAL_HEADERS):
            raise StorageRefusal(400, "InvalidArgument", "Only one auth mechanism allowed")
        expected = self.storage.sign(request.method, key, query.get("Expires", ""), content_type)
        if not hmac.compare_digest(expected.encode(), query.get("Signature", "").encode()):
            message = "The signature is not that of this request"
            raise StorageRefusal(403, "SignatureDoesNotMatch", message)
        if time.time() > float(query["Expires"]):
            raise StorageRefusal(403, "AccessDenied", "Request has expired")

    def _put_object(self, request: Request, key: str) -> Answer:
        self._check_signature(request, key, request.headers.get("content-type", ""))
        self.storage.write(S3_ROOT + key, request.body)
        return Answer(200)

    def _get_object(self, request: Request, key: str) -> Answer:
        """Answer with a file, or with the part that is asked for."""
        self._check_signature(request, key)
        stored = self.storage.find(S3_ROOT + key)
        if stored is None:
            raise StorageRefusal(404, "NoSuchKey", "The specified key does not exist")
        status, size, etag = 200, stored.size, f'"{stored.path.parent.name}"'
        headers = {"etag": etag, "accept-ranges": "bytes", "content-type": "binary/octet-stream"}
        part = range(size)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if asked and request.headers.get("if-range", etag) == etag:
            status, part = 206, part[int(asked[1]) : int(asked[2] or size) + 1]
            if not part:
                message = "The requested range is not satisfiable"
                whole = {"content-range": f"bytes */{size}"}
                raise StorageRefusal(416, "InvalidRange", message, whole)
            headers["content-range"] = f"bytes {part[0]}-{part[-1]}/{size}"
        headers["content-length"] = str(len(part))
        return Answer(status, read_blocks(stored.path, part), headers)

    # Endpoints: files

    def _generate_upload_url(self, request: Request) -> Answer:
        body = read_json(request, UPLOAD_URL_BODY)
        s3_url = self.storage.new_url(INPUTS, body["filename"])
        content_type = str(body.get("content_type") or "")
        upload_url = self._presign(request, "PUT", s3_url, 3600, content_type)
        return json_answer({"upload_url": upload_url, "s3_url": s3_url})

    def _upload(self, request: Request, temporary: str | None) -> Answer:
        form = Form(request)
        folder, expires_at = OUTPUTS, math.inf
        if temporary:
            folder = f"{WORKSPACE}/{form.fields.get('session_id') or 'default'}"
            expires_at = time.time() + read_number(form.fields, "ttl", 86400, 10**9)
        s3_url = self.storage.new_url(folder, form.filename)
        size = self.storage.write(s3_url, form.content, expires_at).size
        return json_answer(
            {"success": True, "s3_url": s3_url, "filename": form.filename, "size": size}
        )

    def _presign_download(self, request: Request) -> Answer:
        query = request.query
        check(query, {"s3_url": str}, "query")
        expires_in = read_number(query, "expires_in", 3600, 7 * 24 * 3600)
        if self.storage.find(query["s3_url"]) is None:
            raise Refusal(404, f"File not found: {query['s3_url']}")
        presigned_url = self._presign(request, "GET", query["s3_url"], expires_in)
        return json_answer({"presigned_url": presigned_url})

    def _list_files(self, request: Request, temporary: str | None) -> Answer:
        query = request.query
        folder = WORKSPACE if temporary else OUTPUTS
        if temporary and query.get("session_id"):
            folder = f"{WORKSPACE}/{query['session_id']}"
        last = query.get("continuation_token", "")
        files = [stored for stored in self.storage.list(folder) if stored.s3_url > last]
        limit = read_number(query, "limit", 100, 1000)
        next_page = {"next_token": files[limit - 1].s3_url} if len(files) > limit else {}
        return json_answer({"files": [stored.entry() for stored in files[:limit]], **next_page})

    def _cleanup_temp(self, request: Request) -> Answer:
        query = request.query
        check(query, {"session_id": str}, "query")
        files = self.storage.list(f"{WORKSPACE}/{query['session_id']}")
        for stored in files:
            self.storage.delete(stored)
        return json_answer({"deleted_count": len(files)})

    # Endpoints: prefabs, secrets, tokens

    def _list_prefabs(self, request: Request) -> Answer:
        status = request.query.get("status")
        entries = self.prefabs()
        if status is not None:
            entries = [entry for entry in entries if entry["deployment_status"] == status]
        return json_answer(entries)

    def _get_spec(self, _: Request, prefab_id: str, version: str) -> Answer:
        return json_answer(self.find_prefab(prefab_id, version).spec)

    def _set_secret(self, request: Request) -> Answer:
        body = read_json(request, SECRET_BODY)
        self.secrets[body["prefab_id"], body["secret_name"]] = body["secret_value"]
        return Answer(204)

    def _list_secrets(self, _: Request) -> Answer:
        entries = [
            {"prefab_id": prefab_id, "secret_name": name}
            for prefab_id, name in sorted(self.secrets.copy())
        ]
        return json_answer({"secrets": entries})

    def _list_secrets_of_prefab(self, _: Request, prefab_id: str) -> Answer:
        names = sorted(self.secrets_of(prefab_id))
        return json_answer({"prefab_id": prefab_id, "secret_names": names})

    def _delete_secret(self, _: Request, prefab_id: str, name: str) -> Answer:
        self.secrets.pop((prefab_id, name), None)  # an unknown one is no error
        return Answer(204)

    def _exchange_key(self, _: Request) -> Answer:
        token = f"user-{uuid.uuid4().hex}"
        self.callers["x-internal-token", token] = "user"
        return json_answer({"internal_token": token})

    # Endpoints: calls

    def _run(self, request: Request) -> Answer:
        """Run the calls of one POST one after another; the first HTTP error ends it."""
        calls = read_json(request, FLAT_CALLS if self.flat else NESTED_CALLS)["calls"]
        quota, used = self.quota, len(self.executed)
        if quota is not None and used + len(calls) > quota:
            raise Refusal(429, {
                "error_code": "QUOTA_EXCEEDED", "message": "The quota of calls is used up",
                "limit": quota, "used": used, "quota_type": "calls",
            })  # fmt: skip
        try:
            with contextlib.ExitStack() as undo:  # deletes the files of which nobody learns
                answer = self._run_calls(calls, undo)
                undo.pop_all()
            return answer
        except Refusal:
            raise
        except Exception as error:  # whatever else a prefab does wrong, as behind the real server
            message = "The prefab failed: {type}: {message}".format(**describe_error(error))
            raise Refusal(503, message) from error

    def _run_calls(
        self, calls: Sequence[Mapping[str, Any]], undo: contextlib.ExitStack
    ) -> Answer:
        job_id = str(uuid.uuid4())
        results: list[bytes] = []
        status = "COMPLETED"
        for call in calls:
            try:
                function, job = self._prepare(call)
                undo.callback(self._delete_outputs, job)
                with contextlib.ExitStack() as under_way:
                    under_way.enter_context(self._under_way(job))
                    outcome = function.run(job)
                    if isinstance(outcome, Generator) and len(calls) == 1:  # or it can't stream
                        stacks = undo.pop_all(), under_way.pop_all()
                        events = self._stream(job, job_id, outcome, *stacks)
                        return Answer(200, events, {"content-type": "text/event-stream"}, job.leave)
                    results.append(self._result(job, outcome))
            except CallFailed as failure:
                status, error = "PARTIAL_SUCCESS", describe_error(failure)
                results.append(json_bytes({"status": "FAILED", "output": None, "error": error}))
        body = b'{"job_id":"%b","status":"%b","results":[%b]}'
        body %= job_id.encode(), status.encode(), b",".join(results)
        return Answer(200, body, {"content-type": "application/json"})

    def _prepare(self, call: Mapping[str, Any]) -> tuple[Function, Job]:
        """Check a call against its prefab."""
        prefab_id, version, name = call["prefab_id"], call["version"], call["function_name"]
        prefab = self.find_prefab(prefab_id, version)
        if "deployment_error" in prefab.entry:
            raise Refusal(503, prefab.entry["deployment_error"])
        function = prefab.functions.get(name)
        if function is None or prefab.entry["deployment_status"] != "deployed":
            raise Refusal(404, f"Function {name} not found in prefab {prefab_id}")
        job = Job(f"{prefab_id} {version}, {name}", self.storage.new_folder(), self.call_seconds)
        job.parameters, files = self._read_inputs(function, call["inputs"])
        job.undeclared = check_parameters(function.entry, job.parameters)
        job.as_paths = [key for key in files if self.flat and key in job.parameters]
        job.inputs = {safe_name(key): list(map(self._find_input, files[key])) for key in files}
        job.secrets = self._secrets_for(function, prefab_id)
        self.executed.append((prefab_id, version, name))
        return function, job

    def _read_inputs(
        self, function: Function, inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """The parameters and the URLs of the files."""
        if self.flat:
            return split_flat(function.entry, inputs)
        return inputs.get("parameters", {}), inputs.get("files", {})

    def _find_input(self, s3_url: str) -> Path:
        stored = self.storage.find(s3_url)
        if stored is None:
            raise CallFailed(f"Input file not found: {s3_url}", "InputFileNotFound")
        return stored.path

    def _secrets_for(self, function: Function, prefab_id: str) -> dict[str, str]:
        """The secrets that a function gets: those that its manifest names, and no others."""
        stored, given = self.secrets_of(prefab_id), {}
        for secret in function.secrets:
            name = secret["name"]
            if name in stored:
                given[name] = stored[name]
            elif secret.get("required", True):
                raise Refusal(400, {
                    "error_code": "MISSING_SECRET", "prefab_id": prefab_id, "secret_name": name,
                    "message": f"Secret '{name}' for prefab '{prefab_id}' is not configured",
                    "instructions": secret.get("instructions", ""),
                })  # fmt: skip
        return given

    @contextlib.contextmanager
    def _under_way(self, job: Job) -> Iterator[None]:
        """Know of a job as long as it lasts, and leave nothing of it behind."""
        self._jobs.add(job)
        if self._closed:
            job.leave()
        try:
            yield
        except Exception as error:
            log_failure(job, error)
            raise
        finally:
            self._jobs.discard(job)
            shutil.rmtree(job.folder, ignore_errors=True)

    def _result(self, job: Job, outcome: Any) -> bytes:
        value = list(outcome) if isinstance(outcome, Generator) else outcome
        output = {"status": "SUCCESS", "output": value, "files": self._keep_outputs(job)}
        return json_bytes({"status": "SUCCESS", "output": output, "error": None})

    def _stream(
        self,
        job: Job,
        job_id: str,
        pieces: Generator[Any, None, None],
        undo: contextlib.ExitStack,
        under_way: contextlib.ExitStack,
    ) -> Generator[bytes, None, None]:
        """The events of a function, which ends when its reader has left."""
        with undo, under_way, contextlib.closing(pieces):
            yield b""  # the head of the answer goes out at once
            yield from stream_events(job, job_id, pieces, self._keep_outputs)
            undo.pop_all()

    def _keep_outputs(self, job: Job) -> dict[str, list[str]]:
        """Take what the function left in its outputs folder into the storage."""
        files: dict[str, list[str]] = {}
        if job.left or not job.folder.exists():  # as after most calls
            return files
        for path in sorted(path for path in job.outputs.rglob("*") if path.is_file()):
            key = "output"
            if path.parent != job.outputs:
                key = path.relative_to(job.outputs).parts[0]
            s3_url = self.storage.new_url(OUTPUTS, path.name)
            job.kept.append(self.storage.write(s3_url, read_blocks(path)))
            files.setdefault(key, []).append(s3_url)
        return files

    def _delete_outputs(self, job: Job) -> None:
        """Delete what the storage has of a job."""
        for stored in job.kept:
            self.storage.delete(stored)


ROUTES = [
    Route("POST", "/v1/internal/run", ("agent", "user", "nobody"), LocalGateway._run),
    Route("POST", "/v1/run", ("key", "jwt"), LocalGateway._run),
    Route("GET", "/v1/prefabs", ANYONE, LocalGateway._list_prefabs),
    Route("GET", f"/v1/prefabs/{ID}/{ID}/spec", ANYONE, LocalGateway._get_spec),
    Route("POST", "/v1/secrets", ANYONE, LocalGateway._set_secret),
    Route("GET", "/v1/secrets", ANYONE, LocalGateway._list_secrets),
    Route("GET", f"/v1/secrets/{ID}", ANYONE, LocalGateway._list_secrets_of_prefab),
    Route("DELETE", f"/v1/secrets/{ID}/{ID}", ANYONE, LocalGateway._delete_secret),
    Route("POST", "/v1/auth/convert_to_internal_token", (EXCHANGE,), LocalGateway._exchange_key),
    Route("POST", "/internal/files/generate_upload_url", ANYONE, LocalGateway._generate_upload_url),
    Route("POST", f"/internal/files/upload{TEMPORARY}", AGENT, LocalGateway._upload),
    Route("GET", "/internal/files/download", AGENT, LocalGateway._presign_download),
    Route("GET", f"/internal/files/list{TEMPORARY}", AGENT, LocalGateway._list_files),
    Route("DELETE", "/internal/files/cleanup_temp", AGENT, LocalGateway._cleanup_temp),
    Route("PUT", "/storage/(.+)", (), LocalGateway._put_object),
    Route("GET", "/storage/(.+)", (), LocalGateway._get_object),
]


# --- The HTTP server ------------------------------------------------------------------


def has_hung_up(connection: socket.socket) -> bool:
    """Whether the peer has closed or broken a connection; what it sent is not taken from it."""
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


@contextlib.contextmanager
def watching(connection: socket.socket, left: Callable[[], None] | None) -> Iterator[None]:
    """Call `left` when the peer hangs up inside the `with`, even if nothing is sent just then."""
    if left is None:
        yield
        return
    ended = threading.Event()

    def watch(call: Callable[[], None], own: socket.socket) -> None:
        with own:
            while not ended.wait(WATCH_SECONDS):
                if has_hung_up(own):
                    call()
                    return

    own = connection.dup()  # which does not wait: a connection with a timeout never does inside
    own.setblocking(False)
    threading.Thread(target=watch, args=[left, own], daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class Handler(BaseHTTPRequestHandler):
    """One client's connection: request after request until either side hangs up."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer waits 40 ms for the client's acknowledgement
    timeout = IDLE_SECONDS
    server: Server

    def handle(self) -> None:
        thread = threading.current_thread()
        self.server.connections[thread] = self.connection
        with contextlib.suppress(OSError):  # a broken connection simply ends
            super().handle()
        del self.server.connections[thread]

    def answer_request(self) -> None:
        """Answer a request whose head has been read."""
        length = self.headers.get("content-length", "0")
        if "transfer-encoding" in self.headers or not length.isdecimal():
            self.send_error(411)  # like the storage; no client of the Gateway sends chunks
            return
        self.connection.settimeout(TRANSFER_SECONDS)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self._read_body(int(length)))
        answer = self.server.answer(request)
        logger.debug("%s %d", self.requestline, answer.status)
        self._send(answer)
        for _ in request.body:  # what was refused unread: on loopback that is soon over
            pass
        self.connection.settimeout(IDLE_SECONDS)
        if answer.status == 500:  # as the deployed server, which does not announce it either
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = answer_request  # noqa: N815

    def _read_body(self, length: int) -> Iterator[bytes]:
        while length:
            block = self.rfile.read(min(BLOCK_BYTES, length))
            if not block:
                raise ConnectionResetError("the client hung up in the middle of a body")
            length -= len(block)
            yield block

    def _send(self, answer: Answer) -> None:
        body, headers = answer.body, dict(answer.headers)
        chunked = not isinstance(body, bytes) and "content-length" not in headers
        if chunked:
            headers["transfer-encoding"] = "chunked"
        elif isinstance(body, bytes) and answer.status != 204:
            headers["content-length"] = str(len(body))
        lines = [f"HTTP/1.1 {answer.status} {self.responses[answer.status][0]}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "\r\n"]).encode("latin-1")
        if isinstance(body, bytes):  # in one write: the client's first read finds the whole answer
            self.wfile.write(head + body)
            return
        with contextlib.closing(body), watching(self.connection, answer.left):
            for block in body:  # begun before the first write: only then can closing it clean up
                if block and chunked:
                    block = b"%x\r\n%b\r\n" % (len(block), block)
                self.wfile.write(head + block)
                head = b""
            self.wfile.write(head + (b"0\r\n\r\n" if chunked else b""))

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class Server(socketserver.ThreadingTCPServer):
    """A thread accepts connections, and each connection has a thread of its own until `stop`."""

    request_queue_size = 128
    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers have one port
    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        answer: Callable[[Request], Answer],
        tidy_up: Callable[[], None],
    ) -> None:
        self.answer, self._tidy_up = answer, tidy_up
        self.connections: dict[threading.Thread, socket.socket] = {}
        super().__init__(address, Handler)

    def service_actions(self) -> None:  # called between two looks whether to stop
        self._tidy_up()

    def stop(self) -> None:
        """Accept no more, break the connections, and wait for their threads."""
        self.shutdown()
        self.server_close()
        connections = self.connections.copy()
        for connection in connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in connections:
            thread.join(max(0.0, deadline - time.monotonic()))


# --- The command line -----------------------------------------------------------------


def no_proxy() -> dict[str, str]:
    """The variables by which clients leave out the proxy for this machine, if there is a proxy."""
    proxies = urllib.request.getproxies()
    if not {"http", "all"} & proxies.keys() or urllib.request.proxy_bypass("127.0.0.1"):
        return {}
    names = ",".join([*OWN_NAMES, *filter(None, [proxies.get("no")])])
    return {"NO_PROXY": names, "no_proxy": names}  # some read the one, some the other


@contextlib.contextmanager
def environment(credential: str = "agent") -> Iterator[LocalGateway | None]:
    """Provide a gateway for `GatewayClient.from_env()`: the environment's, or one of our own.

    If `GATEWAY_BASE_URL` is set, that one is used as it is, and the value is None. Otherwise a
    local gateway serves inside the `with`, and the environment names it and its credential: that
    of an "agent", or its "api_key".
    """
    if os.environ.get("GATEWAY_BASE_URL"):
        yield None
        return
    with LocalGateway() as gateway:
        before = dict(os.environ)
        for name in ("X_INTERNAL_TOKEN", "AGENT_BUILDER_API_KEY", "GATEWAY_JWT_TOKEN"):
            os.environ.pop(name, None)
        own = {
            "agent": ("X_INTERNAL_TOKEN", gateway.internal_token),
            "api_key": ("AGENT_BUILDER_API_KEY", gateway.api_key),
        }
        os.environ.update([("GATEWAY_BASE_URL", gateway.base_url), own[credential]])
        os.environ.update(no_proxy())
        try:
            yield gateway
        finally:
            os.environ.clear()
            os.environ.update(before)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a Gateway on this machine.")
    add = parser.add_argument
    add("--port", type=int, default=8080, help="0 takes any free one (default: %(default)s)")
    add("--prefab", action="append", default=[], metavar="DIR", help="a prefab folder to serve")
    add("--token", help="the agent's token, to have the same after a restart (default: a new one)")
    add("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 in a container, and "
        "then nobody is served without a credential (default: %(default)s)")  # fmt: skip
    add("-v", "--verbose", action="store_true", help="log every request")
    return parser.parse_args(argv)


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that is set by what asks a program to stop, so that nothing else is interrupted."""
    stopped = threading.Event()
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    for name in names:
        if before[name] != signal.SIG_IGN:  # as for a job in the background, or under `nohup`
            signal.signal(getattr(signal, name), lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        for name in names:
            signal.signal(getattr(signal, name), before[name])


def print_settings(gateway: LocalGateway) -> None:
    """Print lines that a shell can run as they are, and what else there is to know."""
    settings = {"GATEWAY_BASE_URL": gateway.base_url, "X_INTERNAL_TOKEN": gateway.internal_token}
    for name, value in {**settings, **no_proxy()}.items():
        print(f"export {name}={shlex.quote(value)}", flush=True)
    print(
        "The token is an agent's. A user without an agent has one of these instead:\n"
        f"AGENT_BUILDER_API_KEY={gateway.api_key}\nGATEWAY_JWT_TOKEN={gateway.jwt_token}",
        file=sys.stderr,
    )
    if gateway.is_open:
        print("Others reach it by this machine's name instead of 127.0.0.1.", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C, SIGTERM or SIGHUP; the exit status."""
    arguments = parse_arguments(argv)
    level = logging.DEBUG if arguments.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(message)s")
    options = {"port": arguments.port, "host": arguments.host, "token": arguments.token}
    try:
        with stop_signals() as stopped, LocalGateway(**options) as gateway:
            for folder in arguments.prefab:
                gateway.add_folder(folder)
            print_settings(gateway)
            while not stopped.wait(3600):  # on Windows, Ctrl-C does not end a wait without a limit
                pass
        return 0
    except (OSError, ValueError) as error:  # a taken port, a host that is not of this machine
        place = f"{arguments.host}:{arguments.port}: " if isinstance(error, OSError) else ""
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        advice = " (--port 0 takes any free port)" if taken else ""
        print(f"local_gateway: {place}{error}{advice}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
