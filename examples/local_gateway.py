"""A Gateway on this machine, for developing, testing and trying things out offline.

It is a real HTTP server on 127.0.0.1 that speaks the Gateway's whole protocol. Prefabs are plain Python
functions, files lie behind signed URLs that expire, and every error comes where it is due. As a
program it serves until it is stopped: `python local_gateway.py --port 8080 --prefab path/to/my-prefab`.
In code it is a context manager:

    with LocalGateway("path/to/my-prefab") as gateway:
        client = GatewayClient(gateway.base_url, internal_token=gateway.internal_token)

This file needs no other. From top to bottom: requests and answers, forms, the storage; prefabs, those of folders,
those that come with it; the gateway, its endpoints and the table of their routes; the HTTP server; the command line.
"""

from __future__ import annotations

import argparse
import contextlib
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
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode

__all__ = ["CallFailed", "LocalGateway", "environment", "main"]

BLOCK_BYTES = 256 * 1024  # of bodies and files: large enough for speed, small enough for the CPU's cache
IDLE_SECONDS = 5.0  # as the deployed server: it hangs up on an idle connection, unannounced
TRANSFER_SECONDS = 60.0  # the longest wait for bytes in the middle of a request or an answer
CLOSE_SECONDS = 3.0  # for calls under way to end when the server closes

logger = logging.getLogger("local_gateway")

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
    body: bytes | Generator[bytes, None, None] = b""  # of a generator: in chunks if there is no `content-length`
    headers: Mapping[str, str] = {}


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

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message)
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        self.answer = Answer(status, text.encode(), {"content-type": "application/xml", **(headers or {})})


def invalid(loc: Sequence[str | int], message: str, kind: str) -> Refusal:
    """A 422 with the list form of `detail`."""
    return Refusal(422, [{"type": kind, "loc": list(loc), "msg": message, "input": None}])


# What bodies look like: a type; a list of the kind of its items; an object of the kinds of its fields, in which "?"
# marks a field that may be missing, and "*" stands for any name.
UPLOAD_URL_BODY = {"filename": str}
SECRET_BODY = {"prefab_id": str, "secret_name": str, "secret_value": str}
CALL_INPUTS = {"parameters?": dict, "files?": {"*": [str]}}
RUN_BODY = {"calls": [{"prefab_id": str, "version": str, "function_name": str, "inputs": CALL_INPUTS}]}


def check(value: Any, kind: Any, *loc: str | int) -> None:
    """Refuse what is not of the kind; `loc` says where it was."""
    expected: Any = kind if isinstance(kind, type) else type(kind)
    if not isinstance(value, expected):
        raise invalid(loc, f"Input should be a valid {expected.__name__}", f"{expected.__name__}_type")
    if isinstance(kind, list):
        for index, item in enumerate(value):
            check(item, kind[0], *loc, index)
    if isinstance(kind, dict):
        for field, kind_of_field in kind.items():
            for name in value if field == "*" else [field.rstrip("?")]:
                if name in value:
                    check(value[name], kind_of_field, *loc, name)
                elif not field.endswith("?"):
                    raise invalid([*loc, name], "Field required", "missing")


def read_json(request: Request, kind: Mapping[str, Any]) -> Any:
    """The body, which must be JSON of this kind."""
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
    """A `multipart/form-data` body (RFC 7578), read up to its file's content, which `email` would hold in memory."""

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
        modified = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(self.path.stat().st_mtime))
        key = self.s3_url[len(S3_ROOT) :]
        return {"key": key, "size": self.size, "last_modified": modified, "s3_url": self.s3_url}


class Storage:
    """Files in a folder, under the URLs that they would have in S3, and signed URLs to them."""

    def __init__(self, folder: Path, base_url: str) -> None:
        self._folder, self._base_url = folder, base_url
        self._files: dict[str, StoredFile] = {}
        self._signing_key = os.urandom(32)

    def new_url(self, folder: str, name: str) -> str:
        """The S3 URL of a new file. Their order is that of time, as listings are."""
        return f"{S3_ROOT}{folder}/{time.time_ns():016x}{uuid.uuid4().hex[:8]}/{safe_name(name)}"

    def new_folder(self) -> Path:
        """The path of a folder that is not made yet."""
        return self._folder / uuid.uuid4().hex

    def write(self, s3_url: str, blocks: Iterable[bytes], expires_at: float = math.inf) -> StoredFile:
        """Keep what comes; if that breaks off, nothing is left."""
        stored = StoredFile(s3_url, self.new_folder() / s3_url.rpartition("/")[2], expires_at)
        stored.path.parent.mkdir()
        try:
            with stored.path.open("wb") as file:
                file.writelines(blocks)
        except BaseException:
            shutil.rmtree(stored.path.parent)
            raise
        self._files[s3_url] = stored
        return stored

    def find(self, s3_url: str) -> StoredFile | None:
        """The file of an S3 URL, unless it has expired."""
        stored = self._files.get(s3_url)
        return stored if stored and time.time() < stored.expires_at else None

    def list(self, folder: str) -> list[StoredFile]:
        """The files below a folder, in the order of their URLs."""
        urls = sorted(url for url in self._files.copy() if url.startswith(f"{S3_ROOT}{folder}/"))
        return [stored for stored in map(self.find, urls) if stored]

    def delete(self, stored: StoredFile) -> None:
        """Delete a file; it may be gone already."""
        self._files.pop(stored.s3_url, None)
        shutil.rmtree(stored.path.parent, ignore_errors=True)

    def presign(self, method: str, s3_url: str, expires_in: int, content_type: str = "") -> str:
        """A URL that allows this one method on this one file for `expires_in` seconds."""
        key, expires = s3_url[len(S3_ROOT) :], f"{time.time() + expires_in:.3f}"
        query = urlencode({"Expires": expires, "Signature": self.sign(method, key, expires, content_type)})
        return f"{self._base_url}/storage/{quote(key)}?{query}"

    def sign(self, *parts: str) -> str:
        """What only the storage can make of method, key, time of expiry and content type."""
        message = "\n".join(parts).encode("utf-8", "surrogateescape")
        return hmac.new(self._signing_key, message, hashlib.sha256).hexdigest()


# --- Prefabs --------------------------------------------------------------------------


class PrefabError(Exception):
    """What went wrong in a prefab, and the name of the error's type."""

    def __init__(self, message: str, type: str = "CallFailed") -> None:
        super().__init__(message)
        self.type = type


class CallFailed(PrefabError):
    """Raised by a prefab function to end its call as FAILED, with this message and type."""


def describe_error(error: Exception) -> dict[str, str]:
    """An error as results and event streams show it."""
    return {"message": str(error), "type": getattr(error, "type", type(error).__name__)}


class Job(NamedTuple):
    """One call of a function, and what the function gets."""

    parameters: dict[str, Any]
    inputs: dict[str, list[Path]]
    secrets: dict[str, str]
    folder: Path  # made only where it is needed: most functions have no files
    processes: set[subprocess.Popen[bytes]]  # those that the gateway ends when it closes

    @property
    def outputs(self) -> Path:
        """The folder for output files."""
        path = self.folder / "data" / "outputs"
        path.mkdir(parents=True, exist_ok=True)
        return path


Functions = Mapping[str, Callable[..., Any]]
Run = Callable[[Job], Any]  # how a function is called; if it gives a generator, that is a stream
RESERVED = ("inputs", "outputs", "secrets")  # parameters of a Python function that the gateway fills in
TYPE_NAMES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object",
}


class Prefab:
    """A manifest, with all that it may leave out, and the functions that it describes."""

    def __init__(self, manifest: Mapping[str, Any], runs: Mapping[str, Run], status: str = "deployed") -> None:
        functions = [complete(function, manifest.get("secrets", ())) for function in manifest["functions"]]
        secrets = {secret["name"]: secret for function in functions for secret in function["secrets"]}
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        self.functions = {function["name"]: function for function in functions}
        self.runs = runs
        self.spec = {
            "id": manifest["id"], "version": manifest["version"], "name": manifest.get("name") or manifest["id"],
            "description": manifest.get("description", ""), "functions": functions,
        }
        self.entry = {  # in the directory
            **self.spec, "tags": manifest.get("tags", []), "deployment_status": status, "knative_service_url": None,
            "deployed_at": now, "updated_at": now, "secrets": list(secrets.values()),
            "requires_secrets": any(secret["required"] for secret in secrets.values()),
        }


def complete(function: Mapping[str, Any], shared: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A function's entry in a manifest; without secrets of its own it needs the `shared` ones."""
    parameters = [{"type": "any", "required": "default" not in parameter, **parameter}
                  for parameter in function.get("parameters", ())]
    secrets = [{"description": "", "instructions": "", "required": True, **secret}
               for secret in function.get("secrets", shared)]
    return {"description": "", "streaming": False, **function, "parameters": parameters, "secrets": secrets}


def is_of_type(value: Any, type_name: str) -> bool:
    own_type = TYPE_NAMES.get(type(value).__name__)
    is_known = type_name in TYPE_NAMES.values()  # of other types there are values of every kind
    return not is_known or own_type == type_name or (own_type == "integer" and type_name == "number")


def fill_parameters(function: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a call, with the defaults of the others; a ValueError if they do not fit."""
    declared = {parameter["name"]: parameter for parameter in function["parameters"]}
    for name, value in given.items():
        if name not in declared:
            raise ValueError(f"Unknown parameter: {name}")
        parameter = declared[name]
        left_out = value is None and not parameter["required"]
        if not left_out and not is_of_type(value, parameter["type"]):
            raise ValueError(f"Parameter '{name}' must be of type {parameter['type']}")
    for name, parameter in declared.items():
        if parameter["required"] and name not in given:
            raise ValueError(f"Missing required parameter: {name}")
    defaults = {name: parameter["default"] for name, parameter in declared.items() if "default" in parameter}
    return {**defaults, **given}


def describe(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The manifest's entry of a Python function, from its signature and docstring."""
    signature = inspect.signature(function).parameters
    parameters = []
    for parameter in signature.values():
        annotation = getattr(parameter.annotation, "__name__", str(parameter.annotation))
        described = {"name": parameter.name, "type": TYPE_NAMES.get(annotation.partition("[")[0], "any")}
        if parameter.default is not parameter.empty:
            described["default"] = parameter.default
        if parameter.name not in RESERVED:
            parameters.append(described)
    entry = {"name": name, "description": (inspect.getdoc(function) or "").partition("\n")[0],
             "parameters": parameters, "streaming": inspect.isgeneratorfunction(function)}
    return entry if "secrets" in signature else {**entry, "secrets": []}


def run_here(function: Callable[..., Any]) -> Run:
    reserved = [name for name in RESERVED if name in inspect.signature(function).parameters]

    def run(job: Job) -> Any:
        return function(**job.parameters, **{name: getattr(job, name) for name in reserved})

    return run


# --- Prefab folders -------------------------------------------------------------------


def load_prefab(folder: Path) -> Prefab:
    """A prefab as its developer has it on disk; each call runs in a process of its own."""
    folder = folder.resolve()
    path = folder / "prefab-manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return Prefab(manifest, {entry["name"]: run_in_child(folder, entry["name"]) for entry in manifest["functions"]})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error!r}") from error


def run_in_child(folder: Path, name: str) -> Run:
    def run(job: Job) -> Any:
        copy_inputs(job)
        told = ask_child(folder, name, job)
        if next(told) == "stream":
            return told  # all else are its pieces
        (value,) = told
        return value

    return run


def copy_inputs(job: Job) -> None:
    """Copy the input files: what a function does to them must not change the storage."""
    folder = job.outputs.with_name("inputs")
    folder.mkdir()
    for key, paths in job.inputs.items():
        (folder / key).mkdir()
        for number, path in enumerate(paths, 1):
            target = folder / key / path.name
            if target.exists():  # two of one name
                target = target.with_name(f"{number}-{path.name}")
            shutil.copyfile(path, target)


CHILD_PROGRAM = r"""
import importlib, inspect, json, os, signal, sys, traceback

def tell(kind, value=None):
    pipe.write(json.dumps([kind, value]) + "\n")
    pipe.flush()

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the gateway, which ends its children
folder, name = sys.argv[1:]
sys.path[0:1] = [os.path.join(folder, "src"), folder]
with open("parameters.json") as parameters, os.fdopen(os.dup(1), "w") as pipe:
    os.dup2(2, 1)  # what the function prints must not get between the lines
    try:
        outcome = getattr(importlib.import_module("main"), name)(**json.load(parameters))
        streams = inspect.isgenerator(outcome)
        tell("kind", "stream" if streams else "value")
        for value in outcome if streams else [outcome]:
            tell("given", value)
        tell("end")
    except Exception as error:
        traceback.print_exc()
        tell("error", {"message": str(error), "type": type(error).__name__})
"""


def ask_child(folder: Path, name: str, job: Job) -> Generator[Any, None, None]:
    """Run a function in a process, which ends with this generator: "value" or "stream", then what it gives."""
    command = [sys.executable, "-B", "-c", CHILD_PROGRAM, str(folder), name]
    (job.folder / "parameters.json").write_text(json.dumps(job.parameters))
    with subprocess.Popen(command, cwd=job.folder, env={**os.environ, **job.secrets},
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout
        job.processes.add(process)
        try:
            for line in process.stdout:
                kind, value = json.loads(line)
                if kind == "error":
                    raise PrefabError(**value)
                if kind == "end":
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(2)  # for its exit handlers
                    return
                yield value
            raise PrefabError(f"its process ended with status {process.wait()}", "ProcessDied")
        finally:
            process.kill()  # no harm to one that has ended
            job.processes.discard(process)


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
    files = {"checksum": checksum, "line_count": line_count, "concatenate": concatenate, "inspect": inspect_files}
    texts = {"statistics": statistics, "words": stream_words, "echo": echo}
    add("faulty", "1.0.0", faults, description="Errors on demand")
    add("vault", "1.0.0", {"sign": sign}, description="Needs a secret", secrets=[SIGNING_KEY])
    add("file-tools", "1.0.0", files, description="Looks at files")
    add("text-tools", "1.0.0", texts, description="Looks at texts")
    add("text-tools", "1.1.0", {**texts, "find": find}, description="Looks at texts")


# --- The gateway ----------------------------------------------------------------------

CREDENTIAL_HEADERS = ("x-internal-token", "x-api-key", "authorization")
AGENT = ("agent",)
ANYONE = ("agent", "user", "key", "jwt", "nobody")  # nobody: without credentials, as by an allow-list
ID, TEMPORARY = "([^/]+)", "(_temp)?"
EVENT_TYPES = ("start", "content", "progress", "done", "error")


def event_bytes(event: Mapping[str, Any]) -> bytes:
    return b"data: " + json_bytes(event) + b"\n\n"


class Route(NamedTuple):
    method: str
    path: str  # a regular expression, whose groups the endpoint gets
    admitted: Sequence[str]  # kinds of callers; if there is none, nobody is asked who he is
    endpoint: Callable[..., Answer]


class LocalGateway:
    """A Gateway on 127.0.0.1. A context manager: serves inside the `with`.

    It serves the prefabs of `prefab_folders` besides those that come with it; a folder that is none is an OSError
    or a ValueError. `port` 0 takes any free one; `base_url` tells which.
    """

    def __init__(self, *prefab_folders: str | os.PathLike[str], port: int = 0) -> None:
        self.internal_token = f"agent-{uuid.uuid4().hex}"  # of an agent; the others are without one
        self.api_key = f"key-{uuid.uuid4().hex}"  # for `X-API-Key`, or to be exchanged for a token
        self.jwt_token = f"jwt-{uuid.uuid4().hex}"
        self.callers = {  # their kinds by header and value
            ("x-internal-token", self.internal_token): "agent",
            ("x-api-key", self.api_key): "key",
            ("authorization", f"Bearer {self.jwt_token}"): "jwt",
            ("authorization", f"Bearer {self.api_key}"): "key to exchange",
        }
        self.down = False  # set it, and every gateway request is answered 503
        self.quota: int | None = None  # calls allowed in total
        self.requests: deque[Request] = deque(maxlen=10_000)  # the last ones
        self.executed: list[tuple[str, str, str]] = []  # prefab id, version, function of each call
        self.secrets: dict[tuple[str, str], str] = {}  # by prefab and name
        self.processes: set[subprocess.Popen[bytes]] = set()  # those of prefab folders
        self._directory: dict[tuple[str, str], Prefab] = {}  # by id and version, newest last
        add_own_prefabs(self.add_prefab)
        for folder in prefab_folders:
            self._add(load_prefab(Path(folder)))
        self._server = Server(port, self.answer)
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._folder = tempfile.TemporaryDirectory()
        self.storage = Storage(Path(self._folder.name).resolve(), self.base_url)

    def __enter__(self) -> LocalGateway:
        look_seconds = 0.02  # between two looks whether to stop; half a second would be added to every end
        threading.Thread(target=self._server.serve_forever, args=[look_seconds], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.copy():
            process.kill()
        self._server.stop()
        self._folder.cleanup()

    def add_prefab(self, prefab_id: str, version: str, functions: Functions, *, description: str = "",
                   secrets: Iterable[str | Mapping[str, Any]] = (), status: str = "deployed") -> None:
        """Serve plain Python functions as a prefab; a generator function streams.

        A function that names one of these parameters gets it from the gateway: `inputs` (name to paths of the
        input files, to be read only), `outputs` (a folder; what is left there is given back), `secrets` (name to
        value). Of `secrets` there are the names, or entries as in a manifest; a function that takes them is not run
        without the required ones. A prefab whose `status` is "failed" is listed but cannot be called.
        """
        manifest = {
            "id": prefab_id, "version": version, "description": description,
            "secrets": [{"name": secret} if isinstance(secret, str) else secret for secret in secrets],
            "functions": [describe(name, function) for name, function in functions.items()],
        }
        self._add(Prefab(manifest, {name: run_here(function) for name, function in functions.items()}, status))

    def _add(self, prefab: Prefab) -> None:
        key = (prefab.spec["id"], prefab.spec["version"])
        self._directory.pop(key, None)
        self._directory[key] = prefab

    def prefabs(self) -> list[dict[str, Any]]:
        """The directory's entries, newest first."""
        return [prefab.entry for prefab in reversed(list(self._directory.values()))]

    def find_prefab(self, prefab_id: str, version: str) -> Prefab:
        prefab = self._directory.get((prefab_id, version))
        if prefab is None:
            raise Refusal(404, f"Prefab {prefab_id}@{version} not found")
        return prefab

    def secrets_of(self, prefab_id: str) -> dict[str, str]:
        """The values of a prefab's secrets by their names."""
        return {name: value for (owner, name), value in self.secrets.copy().items() if owner == prefab_id}

    def expire_tokens(self) -> None:
        """Refuse the tokens that were issued for API keys up to now."""
        self.callers = {credential: caller for credential, caller in self.callers.items() if caller != "user"}

    def answer(self, request: Request) -> Answer:
        """The answer to any request. Here errors become answers."""
        self.requests.append(request)
        path = unquote(request.path.partition("?")[0])
        try:
            for route in ROUTES:
                match = re.fullmatch(route.path, path)
                if match and route.method == request.method:
                    self._admit(request, route)
                    return route.endpoint(self, request, *match.groups())
            raise Refusal(404, "Not Found")
        except Refusal as error:
            return error.answer
        except OSError:  # the connection broke in the middle of the body
            raise
        except Exception:
            logger.exception("%s %s", request.method, path)
            return Answer(500, b"Internal Server Error", {"content-type": "text/plain; charset=utf-8"})

    def _admit(self, request: Request, route: Route) -> None:
        """Refuse a request whose sender this route does not admit."""
        if not route.admitted:
            return
        if self.down:
            raise Refusal(503, "The gateway is down")
        credentials = [(header, request.headers[header]) for header in CREDENTIAL_HEADERS if header in request.headers]
        caller = self.callers.get(credentials[0]) if credentials else "nobody"
        if caller is None:
            raise Refusal(401, "Could not validate credentials")
        if caller not in route.admitted and route.admitted is not AGENT:
            raise Refusal(401, "Not authenticated")
        if caller not in route.admitted:
            message = "This operation needs an agent context: use a token given to an agent"
            raise Refusal(400, {"error_code": "MISSING_AGENT_CONTEXT", "message": message})

    # Endpoints: presigned URLs

    def _check_signature(self, request: Request, key: str, content_type: str = "") -> None:
        query = request.query
        if any(header in request.headers for header in CREDENTIAL_HEADERS):
            raise StorageRefusal(400, "InvalidArgument", "Only one auth mechanism allowed")
        expected = self.storage.sign(request.method, key, query.get("Expires", ""), content_type)
        if not hmac.compare_digest(expected.encode(), query.get("Signature", "").encode()):
            raise StorageRefusal(403, "SignatureDoesNotMatch", "The signature is not that of this request")
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
        part, headers = range(size), {"etag": etag, "accept-ranges": "bytes", "content-type": "binary/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if asked and request.headers.get("if-range", etag) == etag:
            status, part = 206, part[int(asked[1]) : int(asked[2] or size) + 1]
            if not part:
                unsatisfied = {"content-range": f"bytes */{size}"}
                raise StorageRefusal(416, "InvalidRange", "The requested range is not satisfiable", unsatisfied)
            headers["content-range"] = f"bytes {part[0]}-{part[-1]}/{size}"
        headers["content-length"] = str(len(part))
        return Answer(status, read_blocks(stored.path, part), headers)

    # Endpoints: files

    def _generate_upload_url(self, request: Request) -> Answer:
        body = read_json(request, UPLOAD_URL_BODY)
        s3_url = self.storage.new_url(INPUTS, body["filename"])
        upload_url = self.storage.presign("PUT", s3_url, 3600, str(body.get("content_type") or ""))
        return json_answer({"upload_url": upload_url, "s3_url": s3_url})

    def _upload(self, request: Request, temporary: str | None) -> Answer:
        form = Form(request)
        folder, expires_at = OUTPUTS, math.inf
        if temporary:
            folder = f"{WORKSPACE}/{form.fields.get('session_id') or 'default'}"
            expires_at = time.time() + read_number(form.fields, "ttl", 86400, 10**9)
        stored = self.storage.write(self.storage.new_url(folder, form.filename), form.content, expires_at)
        return json_answer({"success": True, "s3_url": stored.s3_url, "filename": form.filename, "size": stored.size})

    def _presign_download(self, request: Request) -> Answer:
        query = request.query
        check(query, {"s3_url": str}, "query")
        expires_in = read_number(query, "expires_in", 3600, 7 * 24 * 3600)
        if self.storage.find(query["s3_url"]) is None:
            raise Refusal(404, f"File not found: {query['s3_url']}")
        return json_answer({"presigned_url": self.storage.presign("GET", query["s3_url"], expires_in)})

    def _list_files(self, request: Request, temporary: str | None) -> Answer:
        query = request.query
        folder = WORKSPACE if temporary else OUTPUTS
        if temporary and query.get("session_id"):
            folder = f"{WORKSPACE}/{query['session_id']}"
        files = [stored for stored in self.storage.list(folder) if stored.s3_url > query.get("continuation_token", "")]
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
        return json_answer([entry for entry in self.prefabs() if status in (None, entry["deployment_status"])])

    def _get_spec(self, _: Request, prefab_id: str, version: str) -> Answer:
        return json_answer(self.find_prefab(prefab_id, version).spec)

    def _set_secret(self, request: Request) -> Answer:
        body = read_json(request, SECRET_BODY)
        self.secrets[body["prefab_id"], body["secret_name"]] = body["secret_value"]
        return Answer(204)

    def _list_secrets(self, _: Request) -> Answer:
        names = sorted(self.secrets.copy())
        return json_answer({"secrets": [{"prefab_id": prefab_id, "secret_name": name} for prefab_id, name in names]})

    def _list_secrets_of_prefab(self, _: Request, prefab_id: str) -> Answer:
        return json_answer({"prefab_id": prefab_id, "secret_names": sorted(self.secrets_of(prefab_id))})

    def _delete_secret(self, _: Request, prefab_id: str, name: str) -> Answer:
        if self.secrets.pop((prefab_id, name), None) is None:
            raise Refusal(404, f"Secret '{name}' for prefab '{prefab_id}' not found")
        return Answer(204)

    def _exchange_key(self, _: Request) -> Answer:
        token = f"user-{uuid.uuid4().hex}"
        self.callers["x-internal-token", token] = "user"
        return json_answer({"internal_token": token})

    # Endpoints: calls

    def _run(self, request: Request) -> Answer:
        """Run the calls of one POST one after another; the first HTTP error ends it."""
        calls = read_json(request, RUN_BODY)["calls"]
        quota, used = self.quota, len(self.executed)
        if quota is not None and used + len(calls) > quota:
            raise Refusal(429, {"error_code": "QUOTA_EXCEEDED", "message": "The quota of calls is used up",
                                "limit": quota, "used": used, "quota_type": "calls"})
        try:
            return self._run_calls(calls)
        except Refusal:
            raise
        except Exception as error:  # whatever else a prefab does wrong, as behind the deployed server
            logger.info("a prefab failed", exc_info=True)
            raise Refusal(503, "The prefab failed: {type}: {message}".format(**describe_error(error))) from error

    def _run_calls(self, calls: Sequence[Mapping[str, Any]]) -> Answer:
        job_id = str(uuid.uuid4())
        results: list[dict[str, Any]] = []
        for call in calls:
            try:
                start, job = self._prepare(call)
                outcome = start(job)
                if isinstance(outcome, Generator) and len(calls) == 1:  # only a call that is alone can stream
                    return Answer(200, self._make_events(job, outcome), {"content-type": "text/event-stream"})
                value = list(outcome) if isinstance(outcome, Generator) else outcome
                output = {"status": "SUCCESS", "output": value, "files": self._keep_outputs(job)}
                results.append({"status": "SUCCESS", "output": output, "error": None})
            except CallFailed as failure:
                results.append({"status": "FAILED", "output": None, "error": describe_error(failure)})
        done = all(result["status"] == "SUCCESS" for result in results)
        return json_answer({"job_id": job_id, "status": "COMPLETED" if done else "PARTIAL_SUCCESS", "results": results})

    def _prepare(self, call: Mapping[str, Any]) -> tuple[Run, Job]:
        """Check a call against its prefab."""
        prefab_id, version, name, inputs = call["prefab_id"], call["version"], call["function_name"], call["inputs"]
        prefab = self.find_prefab(prefab_id, version)
        function = prefab.functions.get(name)
        if function is None or prefab.entry["deployment_status"] != "deployed":
            raise Refusal(404, f"Function {name} not found in prefab {prefab_id}")
        try:
            parameters = fill_parameters(function, inputs.get("parameters", {}))
        except ValueError as error:
            raise Refusal(422, str(error)) from error
        given = inputs.get("files", {})
        files = {safe_name(key): [self._find_input(url) for url in urls] for key, urls in given.items()}
        secrets = self.secrets_of(prefab_id)
        for secret in function["secrets"]:
            if secret["required"] and secret["name"] not in secrets:
                message = f"Secret '{secret['name']}' for prefab '{prefab_id}' is not configured"
                raise Refusal(400, {"error_code": "MISSING_SECRET", "message": message, "prefab_id": prefab_id,
                                    "secret_name": secret["name"], "instructions": secret["instructions"]})
        self.executed.append((prefab_id, version, name))
        return prefab.runs[name], Job(parameters, files, secrets, self.storage.new_folder(), self.processes)

    def _find_input(self, s3_url: str) -> Path:
        stored = self.storage.find(s3_url)
        if stored is None:
            raise CallFailed(f"Input file not found: {s3_url}", "InputFileNotFound")
        return stored.path

    def _keep_outputs(self, job: Job) -> dict[str, list[str]]:
        """Move what the function left in its outputs folder into the storage."""
        files: dict[str, list[str]] = {}
        if not job.folder.exists():  # as after most calls
            return files
        for path in sorted(path for path in job.outputs.rglob("*") if path.is_file()):
            key = path.relative_to(job.outputs).parts[0] if path.parent != job.outputs else "output"
            stored = self.storage.write(self.storage.new_url(OUTPUTS, path.name), read_blocks(path))
            files.setdefault(key, []).append(stored.s3_url)
        shutil.rmtree(job.folder)
        return files

    def _make_events(self, job: Job, pieces: Generator[Any, None, None]) -> Generator[bytes, None, None]:
        """The event stream of a function, which ends when the client is gone."""
        job_id = str(uuid.uuid4())
        with contextlib.closing(pieces):
            yield event_bytes({"type": "start", "data": {"job_id": job_id}})
            try:
                for piece in pieces:
                    is_event = isinstance(piece, dict) and piece.get("type") in EVENT_TYPES
                    yield event_bytes(piece if is_event else {"type": "content", "data": piece})
                yield event_bytes({"type": "done", "data": {"job_id": job_id, "files": self._keep_outputs(job)}})
            except Exception as error:  # whatever the function raises ends its stream
                logger.info("a stream ended with %r", error, exc_info=True)
                yield event_bytes({"type": "error", "data": describe_error(error)})


ROUTES = [
    Route("POST", "/v1/internal/run", ("agent", "user", "nobody"), LocalGateway._run),
    Route("POST", "/v1/run", ("key", "jwt"), LocalGateway._run),
    Route("GET", "/v1/prefabs", ANYONE, LocalGateway._list_prefabs),
    Route("GET", f"/v1/prefabs/{ID}/{ID}/spec", ANYONE, LocalGateway._get_spec),
    Route("POST", "/v1/secrets", ANYONE, LocalGateway._set_secret),
    Route("GET", "/v1/secrets", ANYONE, LocalGateway._list_secrets),
    Route("GET", f"/v1/secrets/{ID}", ANYONE, LocalGateway._list_secrets_of_prefab),
    Route("DELETE", f"/v1/secrets/{ID}/{ID}", ANYONE, LocalGateway._delete_secret),
    Route("POST", "/v1/auth/convert_to_internal_token", ("key to exchange",), LocalGateway._exchange_key),
    Route("POST", "/internal/files/generate_upload_url", ANYONE, LocalGateway._generate_upload_url),
    Route("POST", f"/internal/files/upload{TEMPORARY}", AGENT, LocalGateway._upload),
    Route("GET", "/internal/files/download", AGENT, LocalGateway._presign_download),
    Route("GET", f"/internal/files/list{TEMPORARY}", AGENT, LocalGateway._list_files),
    Route("DELETE", "/internal/files/cleanup_temp", AGENT, LocalGateway._cleanup_temp),
    Route("PUT", "/storage/(.+)", (), LocalGateway._put_object),
    Route("GET", "/storage/(.+)", (), LocalGateway._get_object),
]


# --- The HTTP server ------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One client's connection: request after request until either side hangs up."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # with it, an answer waits 40 ms for the client's acknowledgement
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
        with contextlib.closing(body):  # also when the client is gone
            for block in body:  # begun before the first write: only then can closing it clean up
                self.wfile.write(head + (b"%x\r\n%b\r\n" % (len(block), block) if chunked else block))
                head = b""
            self.wfile.write(head + (b"0\r\n\r\n" if chunked else b""))

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class Server(socketserver.ThreadingTCPServer):
    """A thread accepts connections, and each connection has a thread of its own until `stop`."""

    request_queue_size = 128
    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers have one port
    daemon_threads = True

    def __init__(self, port: int, answer: Callable[[Request], Answer]) -> None:
        self.answer = answer
        self.connections: dict[threading.Thread, socket.socket] = {}
        super().__init__(("127.0.0.1", port), Handler)

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


@contextlib.contextmanager
def environment(credential: str = "agent") -> Iterator[LocalGateway | None]:
    """Provide a gateway for `GatewayClient.from_env()`: the environment's, or one of our own.

    If `GATEWAY_BASE_URL` is set, that one is used as it is, and the value is None. Otherwise a local gateway serves
    inside the `with`, and the environment names it and its credential: that of an "agent", or its "api_key".
    """
    if os.environ.get("GATEWAY_BASE_URL"):
        yield None
        return
    with LocalGateway() as gateway:
        before = dict(os.environ)
        for name in ("X_INTERNAL_TOKEN", "AGENT_BUILDER_API_KEY", "GATEWAY_JWT_TOKEN"):
            os.environ.pop(name, None)
        own = {"agent": ("X_INTERNAL_TOKEN", gateway.internal_token),
               "api_key": ("AGENT_BUILDER_API_KEY", gateway.api_key)}
        os.environ.update([("GATEWAY_BASE_URL", gateway.base_url), own[credential]])
        try:
            yield gateway
        finally:
            os.environ.clear()
            os.environ.update(before)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; the exit status."""
    parser = argparse.ArgumentParser(description="Serve a Gateway on this machine.")
    parser.add_argument("--port", type=int, default=8080, help="0 takes any free one (default: %(default)s)")
    parser.add_argument("--prefab", action="append", default=[], metavar="DIR", help="a prefab folder to serve")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every request")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.INFO, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with LocalGateway(*arguments.prefab, port=arguments.port) as gateway:
            print(f"export GATEWAY_BASE_URL={gateway.base_url}")  # which a shell can run as it is
            print(f"export X_INTERNAL_TOKEN={gateway.internal_token}", flush=True)
            print("The token is an agent's. A user without an agent has one of these instead:", file=sys.stderr)
            print(f"AGENT_BUILDER_API_KEY={gateway.api_key}\nGATEWAY_JWT_TOKEN={gateway.jwt_token}", file=sys.stderr)
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:  # the way to stop it
        return 0
    except (OSError, ValueError) as error:  # a taken port, a broken manifest
        advice = " (--port 0 takes any free port)" if getattr(error, "errno", None) == errno.EADDRINUSE else ""
        print(f"local_gateway: {error}{advice}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
