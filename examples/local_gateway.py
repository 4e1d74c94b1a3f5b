"""A Gateway on this machine, for developing, testing and trying things out offline.

It is a real HTTP server on 127.0.0.1 that speaks the Gateway's whole protocol. Prefabs are plain Python
functions, files lie behind signed URLs that expire, and every error comes where it is due. As a
program it serves until it is stopped: `python local_gateway.py --port 8080 --prefab path/to/my-prefab`.
In code it is a context manager:

    with LocalGateway("path/to/my-prefab") as gateway:
        client = GatewayClient(gateway.base_url, internal_token=gateway.internal_token)

From top to bottom: the storage, its endpoints, the directory of prefabs, the users' secrets, calls, the gateway,
the command line. The HTTP server is in `local_server.py`, prefabs are in `local_prefabs.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import hmac
import logging
import math
import mimetypes
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import local_prefabs
from local_prefabs import CallFailed, Functions, Job, Prefab, describe_error, safe_name
from local_server import (
    Answer,
    Form,
    Refusal,
    Request,
    Server,
    check_kind,
    invalid,
    json_answer,
    json_bytes,
    read_field,
    read_number,
)

__all__ = ["CallFailed", "LocalGateway", "ReceivedRequest", "environment", "main"]

IDLE_SECONDS = 5.0  # as the deployed server: it hangs up on an idle connection, unannounced
USER, AGENT = "local-user", "local-agent"
S3_ROOT = "s3://local/"
CREDENTIAL_HEADERS = ("x-internal-token", "x-api-key", "authorization")

logger = logging.getLogger("local_gateway")


# --- Storage --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Caller:
    user_id: str
    agent_id: str | None = None

    def folder(self, area: str, session_id: str = "") -> str:
        """Where this caller's agent has its files in `area` of the storage."""
        if self.agent_id is None:
            message = "This operation needs an agent context: use a token given to an agent"
            raise Refusal(400, {"error_code": "MISSING_AGENT_CONTEXT", "message": message})
        if not session_id:
            return f"{area}/{self.user_id}/{self.agent_id}"
        if session_id != safe_name(session_id):
            raise Refusal(422, "Invalid session_id")
        return f"{area}/{self.user_id}/{self.agent_id}/{session_id}"


@dataclasses.dataclass(frozen=True)
class _File:
    key: str
    path: Path  # alone in its folder, whose name is unique
    expires_at: float = math.inf

    @property
    def etag(self) -> str:
        return f'"{self.path.parent.name}"'

    def entry(self) -> dict[str, Any]:
        """How listings show it."""
        state = self.path.stat()
        modified = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(state.st_mtime))
        return {"key": self.key, "size": state.st_size, "last_modified": modified, "s3_url": S3_ROOT + self.key}


class _Store:
    """Files in a folder, under the keys that they would have in S3, and signed URLs to them."""

    def __init__(self, folder: Path, base_url: str) -> None:
        self._folder, self._base_url = folder, base_url
        self._files: dict[str, _File] = {}
        self._signing_key = os.urandom(32)

    def new_key(self, folder: str, name: str) -> str:
        """A key of its own for every upload, in the order of time as listings are."""
        return f"{folder}/{time.time_ns():016x}{uuid.uuid4().hex[:8]}/{safe_name(name)}"

    def new_folder(self) -> Path:
        """The path of a folder that is not made yet."""
        return self._folder / uuid.uuid4().hex

    def write(self, key: str, blocks: Iterable[bytes], expires_at: float = math.inf) -> _File:
        """Keep what comes; if that breaks off, nothing is left."""
        new, old = _File(key, self.new_folder() / key.rpartition("/")[2], expires_at), self._files.get(key)
        new.path.parent.mkdir()
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

    def find(self, key: str) -> _File | None:
        """The file of a key, unless it has expired."""
        file = self._files.get(key)
        if file and time.time() >= file.expires_at:
            self.delete(file)
            return None
        return file

    def find_url(self, s3_url: str, caller: _Caller) -> _File | None:
        """The file of an s3 URL. Somebody else's is as good as none."""
        before, _, key = s3_url.partition(S3_ROOT)
        if before or key.split("/")[1:2] != [caller.user_id]:
            return None
        return self.find(key)

    def listing(self, folder: str) -> list[_File]:
        """The files below a folder, in the order of their keys."""
        keys = sorted(key for key in list(self._files) if key.startswith(f"{folder}/"))
        return [file for file in map(self.find, keys) if file]

    def delete(self, file: _File) -> None:
        """Delete a file; it may be gone already."""
        if self._files.pop(file.key, None):
            shutil.rmtree(file.path.parent, ignore_errors=True)

    def presigned(self, method: str, key: str, expires_in: int, content_type: str = "") -> str:
        """A URL that allows this one method on this one key for `expires_in` seconds."""
        expires = f"{time.time() + expires_in:.3f}"
        query = urlencode({"Expires": expires, "Signature": self.signature(method, key, expires, content_type)})
        return f"{self._base_url}/storage/{quote(key)}?{query}"

    def signature(self, *parts: str) -> str:
        """What only the storage can make of method, key, time of expiry and content type."""
        message = "\n".join(parts).encode("utf-8", "surrogateescape")
        return hmac.new(self._signing_key, message, hashlib.sha256).hexdigest()


# --- The endpoints of the storage -----------------------------------------------------


def _storage_error(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    """An error in the storage's own language, which is XML."""
    declaration = '<?xml version="1.0" encoding="UTF-8"?>'
    text = f"{declaration}\n<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Answer(status, text.encode(), {"content-type": "application/xml", **(headers or {})})


class _FileEndpoints:
    """The storage as its presigned URLs show it, and the Gateway's own endpoints for files."""

    def __init__(self, store: _Store) -> None:
        self._store = store

    def storage(self, request: Request) -> Answer:
        """Answer a request that came by a presigned URL."""
        if any(header in request.headers for header in CREDENTIAL_HEADERS):
            return _storage_error(400, "InvalidArgument", "Only one auth mechanism allowed")
        key, put = request.path[len("/storage/") :], request.method == "PUT"
        expires = request.query.get("Expires", "")
        content_type = request.headers.get("content-type", "") if put else ""
        expected = self._store.signature(request.method, key, expires, content_type)
        if not hmac.compare_digest(expected.encode(), request.query.get("Signature", "").encode()):
            message = "The request signature does not match the method, key or headers"
            return _storage_error(403, "SignatureDoesNotMatch", message)
        if time.time() > float(expires):
            return _storage_error(403, "AccessDenied", "Request has expired")
        if not put:
            return self._get(key, request.headers)
        if "content-length" not in request.headers:
            return _storage_error(411, "MissingContentLength", "Content-Length is missing")
        return Answer(200, b"", {"etag": self._store.write(key, request.blocks()).etag})

    def _get(self, key: str, headers: Mapping[str, str]) -> Answer:
        file = self._store.find(key)
        if file is None:
            return _storage_error(404, "NoSuchKey", "The specified key does not exist")
        shown = {"etag": file.etag, "accept-ranges": "bytes"}
        shown["content-type"] = mimetypes.guess_type(key)[0] or "binary/octet-stream"
        size = file.path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        backwards = asked and asked[2] and int(asked[2]) < int(asked[1])
        if not asked or backwards or headers.get("if-range", file.etag) != file.etag:
            return Answer(200, headers=shown, file=file.path.open("rb"), part=range(size))
        part = range(size)[int(asked[1]) : int(asked[2] or size) + 1]
        if not part:
            message = "The requested range is not satisfiable"
            return _storage_error(416, "InvalidRange", message, {"content-range": f"bytes */{size}"})
        shown["content-range"] = f"bytes {part[0]}-{part[-1]}/{size}"
        return Answer(206, headers=shown, file=file.path.open("rb"), part=part)

    def generate_upload_url(self, request: Request, caller: _Caller) -> Answer:
        body = request.json()
        filename = read_field(body, "filename", str, "body")
        content_type = check_kind(body.get("content_type") or "", str, "body", "content_type")
        key = self._store.new_key(f"agent-inputs/{caller.user_id}", filename)
        upload_url = self._store.presigned("PUT", key, 3600, content_type)
        return json_answer({"upload_url": upload_url, "s3_url": S3_ROOT + key})

    def upload(self, request: Request, caller: _Caller) -> Answer:
        folder = caller.folder("agent-outputs")
        return self._upload(folder, Form(request))

    def upload_temp(self, request: Request, caller: _Caller) -> Answer:
        caller.folder("agent-workspace")  # its refusal comes first
        form = Form(request)
        ttl = read_number(form.fields, "body", "ttl", 86400, 10**9)
        folder = caller.folder("agent-workspace", form.fields.get("session_id") or "default")
        return self._upload(folder, form, time.time() + ttl)

    def _upload(self, folder: str, form: Form, expires_at: float = math.inf) -> Answer:
        file = self._store.write(self._store.new_key(folder, form.filename), form.content(), expires_at)
        size = file.path.stat().st_size
        return json_answer({"success": True, "filename": form.filename, "s3_url": S3_ROOT + file.key, "size": size})

    def download(self, request: Request, caller: _Caller) -> Answer:
        caller.folder("agent-outputs")  # its refusal comes first
        s3_url = read_field(request.query, "s3_url", str, "query")
        mode = request.query.get("mode", "presigned")
        if mode != "presigned":
            raise invalid(["query", "mode"], "Input should be 'presigned'", "literal_error", mode)
        expires_in = read_number(request.query, "query", "expires_in", 3600, 7 * 24 * 3600)
        file = self._store.find_url(s3_url, caller)
        if file is None:
            raise Refusal(404, f"File not found: {s3_url}")
        return json_answer({"presigned_url": self._store.presigned("GET", file.key, expires_in)})

    def list(self, request: Request, caller: _Caller) -> Answer:
        return self._page(request, caller.folder("agent-outputs"))

    def list_temp(self, request: Request, caller: _Caller) -> Answer:
        return self._page(request, caller.folder("agent-workspace", request.query.get("session_id", "")))

    def _page(self, request: Request, folder: str) -> Answer:
        limit = read_number(request.query, "query", "limit", 100, 1000)
        last_key = request.query.get("continuation_token", "")
        files = [file for file in self._store.listing(folder) if file.key > last_key]
        answer: dict[str, Any] = {"files": [file.entry() for file in files[:limit]]}
        if len(files) > limit:
            answer["next_token"] = files[limit - 1].key
        return json_answer(answer)

    def cleanup_temp(self, request: Request, caller: _Caller) -> Answer:
        caller.folder("agent-workspace")  # its refusal comes first
        session_id = read_field(request.query, "session_id", str, "query")
        files = self._store.listing(caller.folder("agent-workspace", session_id))
        for file in files:
            self._store.delete(file)
        return json_answer({"deleted_count": len(files)})


# --- The directory of prefabs ---------------------------------------------------------


class _Directory:
    """The prefabs of a gateway by id and version, newest last."""

    def __init__(self) -> None:
        self._prefabs: dict[tuple[str, str], Prefab] = {}

    def add(self, prefab: Prefab) -> None:
        key = (prefab.spec["id"], prefab.spec["version"])
        self._prefabs.pop(key, None)
        self._prefabs[key] = prefab

    def get(self, prefab_id: str, version: str) -> Prefab:
        prefab = self._prefabs.get((prefab_id, version))
        if prefab is None:
            raise Refusal(404, f"Prefab {prefab_id}@{version} not found")
        return prefab

    def entries(self) -> list[dict[str, Any]]:
        """The entries of all prefabs, newest first."""
        return [prefab.entry for prefab in reversed(list(self._prefabs.values()))]

    def list_prefabs(self, request: Request, _: _Caller) -> Answer:
        status = request.query.get("status")
        return json_answer([entry for entry in self.entries() if status in (None, entry["deployment_status"])])

    def spec(self, _: Request, __: _Caller, prefab_id: str, version: str) -> Answer:
        return json_answer(self.get(prefab_id, version).spec)


# --- The users' secrets ---------------------------------------------------------------


class _Secrets:
    def __init__(self) -> None:
        self._values: dict[tuple[str, str, str], str] = {}  # of user, prefab and name

    def of_prefab(self, caller: _Caller, prefab_id: str) -> dict[str, str]:
        """The values of a user's secrets for a prefab by their names."""
        values = sorted(self._values.copy().items())
        return {name: value for (user, owner, name), value in values if (user, owner) == (caller.user_id, prefab_id)}

    def set(self, request: Request, caller: _Caller) -> Answer:
        body = request.json()
        fields = ("prefab_id", "secret_name", "secret_value")
        prefab_id, name, value = [read_field(body, field, str, "body") for field in fields]
        self._values[caller.user_id, prefab_id, name] = value
        return Answer(204)

    def list(self, _: Request, caller: _Caller) -> Answer:
        secrets = [{"prefab_id": prefab_id, "secret_name": name}
                   for user, prefab_id, name in sorted(self._values.copy()) if user == caller.user_id]
        return json_answer({"secrets": secrets})

    def list_of_prefab(self, _: Request, caller: _Caller, prefab_id: str) -> Answer:
        return json_answer({"prefab_id": prefab_id, "secret_names": [*self.of_prefab(caller, prefab_id)]})

    def delete(self, _: Request, caller: _Caller, prefab_id: str, name: str) -> Answer:
        if self._values.pop((caller.user_id, prefab_id, name), None) is None:
            raise Refusal(404, f"Secret '{name}' for prefab '{prefab_id}' not found")
        return Answer(204)


# --- Calls ----------------------------------------------------------------------------

_CALL_FIELDS = ("prefab_id", "version", "function_name")
_EVENT_TYPES = ("start", "content", "progress", "done", "error")


def _parse_calls(request: Request) -> list[dict[str, Any]]:
    """The calls of a request, every field checked that is used below."""
    calls: list[dict[str, Any]] = read_field(request.json(), "calls", list, "body")
    for index, call in enumerate(calls):
        loc = ("body", "calls", index)
        check_kind(call, dict, *loc)
        for name in _CALL_FIELDS:
            read_field(call, name, str, *loc)
        inputs = read_field(call, "inputs", dict, *loc)
        check_kind(inputs.get("parameters", {}), dict, *loc, "inputs", "parameters")
        for key, urls in check_kind(inputs.get("files", {}), dict, *loc, "inputs", "files").items():
            for url in check_kind(urls, list, *loc, "inputs", "files", key):
                check_kind(url, str, *loc, "inputs", "files", key)
    return calls


class _Runner:
    """Runs the calls of a gateway's clients."""

    def __init__(self, gateway: LocalGateway, directory: _Directory, secrets: _Secrets) -> None:
        self._gateway, self._directory, self._secrets = gateway, directory, secrets
        self._used = 0  # of the quota
        self._lock = threading.Lock()

    def run(self, request: Request, caller: _Caller) -> Answer:
        """Run the calls of one POST one after another; the first HTTP error ends it."""
        calls = _parse_calls(request)
        self._charge(len(calls))
        job_id = str(uuid.uuid4())
        results: list[dict[str, Any]] = []
        for call in calls:
            with contextlib.ExitStack() as cleanup, _faults_of(call):
                try:
                    job = self._make_job(call, caller, cleanup)
                    outcome = job.run(job)
                    if isinstance(outcome, Generator) and len(calls) == 1:
                        events = self._events(job_id, job, caller, outcome, cleanup.pop_all())
                        return Answer(200, headers={"content-type": "text/event-stream"}, chunks=events)
                    value, files = local_prefabs.gather(outcome), self._output_files(job, caller)
                    output = {"status": "SUCCESS", "output": value, "files": files}
                    results.append({"status": "SUCCESS", "output": output, "error": None})
                except CallFailed as failure:
                    results.append({"status": "FAILED", "output": None, "error": describe_error(failure)})
        done = all(result["status"] == "SUCCESS" for result in results)
        status = "COMPLETED" if done else "PARTIAL_SUCCESS"
        try:
            return json_answer({"job_id": job_id, "status": status, "results": results})
        except (TypeError, ValueError, RecursionError) as error:
            raise Refusal(503, f"A prefab returned what JSON cannot carry: {error}") from error

    def _charge(self, count: int) -> None:
        quota = self._gateway.quota
        with self._lock:
            if quota is None or self._used + count <= quota:
                self._used += count
                return
            raise Refusal(429, {"error_code": "QUOTA_EXCEEDED", "message": "The quota of calls is used up",
                                 "limit": quota, "used": self._used, "quota_type": "calls"})

    def _make_job(self, call: Mapping[str, Any], caller: _Caller, cleanup: contextlib.ExitStack) -> Job:
        """Check a call against its prefab."""
        prefab_id, version, name = [call[field] for field in _CALL_FIELDS]
        prefab = self._directory.get(prefab_id, version)
        if prefab.status != "deployed":
            raise Refusal(404, f"Prefab {prefab_id}@{version} is not deployed")
        if name not in prefab.functions:
            raise Refusal(404, f"Function {name} not found in prefab {prefab_id}")
        function, inputs = prefab.functions[name], call["inputs"]
        try:
            parameters = local_prefabs.fill_parameters(function, inputs.get("parameters", {}))
        except ValueError as error:
            raise Refusal(422, str(error)) from error
        files = {key: self._inputs(key, urls, caller) for key, urls in inputs.get("files", {}).items()}
        secrets = self._secrets.of_prefab(caller, prefab_id)
        for secret in function["secrets"]:
            if secret["required"] and secret["name"] not in secrets:
                raise _missing_secret(prefab_id, secret)
        self._gateway.executed.append((prefab_id, version, name))
        folder = self._gateway.store.new_folder()
        return Job(prefab.runs[name], parameters, files, secrets, self._gateway.closing, folder, cleanup)

    def _inputs(self, key: str, urls: Sequence[str], caller: _Caller) -> list[Path]:
        if key != safe_name(key):
            raise Refusal(422, f"Invalid name of input files: {key}")
        files = [self._gateway.store.find_url(url, caller) for url in urls]
        if None in files:
            raise CallFailed(f"Input file not found: {urls[files.index(None)]}", "InputFileNotFound")
        return [file.path for file in files if file]

    def _output_files(self, job: Job, caller: _Caller) -> dict[str, list[str]]:
        """Move what the function left in its outputs folder into the storage."""
        files: dict[str, list[str]] = {}
        if not job.folder.exists():  # as after most calls
            return files
        store = self._gateway.store
        folder = f"agent-outputs/{caller.user_id}/{caller.agent_id or 'no-agent'}"
        for path in sorted(job.outputs.rglob("*")):
            if path.is_file() and not path.is_symlink():
                parts = path.relative_to(job.outputs).parts
                key = parts[0] if len(parts) > 1 else "output"
                file = store.write(store.new_key(folder, path.name), local_prefabs.read_blocks(path))
                files.setdefault(key, []).append(S3_ROOT + file.key)
        return files

    def _events(self, job_id: str, job: Job, caller: _Caller, pieces: Generator[Any, None, None],
                cleanup: contextlib.ExitStack) -> Generator[bytes, None, None]:
        """The event stream of a function; ends it when the client is gone."""
        with cleanup, contextlib.closing(pieces):
            yield _event_bytes("start", {"job_id": job_id})
            try:
                for piece in pieces:
                    if isinstance(piece, dict) and piece.get("type") in _EVENT_TYPES:
                        yield b"data: " + json_bytes(piece) + b"\n\n"
                    else:
                        yield _event_bytes("content", piece)
                yield _event_bytes("done", {"job_id": job_id, "files": self._output_files(job, caller)})
            except Exception as error:  # whatever the function raises ends its stream
                logger.info("a stream ended with %r", error, exc_info=True)
                yield _event_bytes("error", describe_error(error))


def _event_bytes(type: str, data: Any) -> bytes:
    return b"data: " + json_bytes({"type": type, "data": data}) + b"\n\n"


def _missing_secret(prefab_id: str, secret: Mapping[str, Any]) -> Refusal:
    message = f"Secret '{secret['name']}' for prefab '{prefab_id}' is not configured"
    return Refusal(400, {"error_code": "MISSING_SECRET", "message": message, "prefab_id": prefab_id,
                          "secret_name": secret["name"], "instructions": secret["instructions"]})


@contextlib.contextmanager
def _faults_of(call: Mapping[str, Any]) -> Iterator[None]:
    """Whatever else a prefab does wrong is a 503, as behind the deployed server."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        prefab, told = f"{call['prefab_id']}@{call['version']}", describe_error(error)
        logger.info("%s failed", prefab, exc_info=True)
        raise Refusal(503, f"Prefab {prefab} failed: {told['type']}: {told['message']}") from error


# --- The gateway ----------------------------------------------------------------------

_EXCHANGE_PATH = "/v1/auth/convert_to_internal_token"


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

    def __init__(self, *prefab_folders: str | os.PathLike[str], port: int = 0, allow_list: bool = True,
                 any_credential: bool = False, idle_timeout: float = IDLE_SECONDS) -> None:
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
        self._callers: dict[tuple[str, str], _Caller | None] = {  # None: expired
            ("x-internal-token", self.internal_token): _Caller(USER, AGENT),
            ("x-api-key", self.api_key): _Caller(USER),
            ("authorization", f"Bearer {self.jwt_token}"): _Caller(USER),
        }
        self._directory, self._secrets = _Directory(), _Secrets()
        self._processes: local_prefabs.Processes = set()
        local_prefabs.add_own_prefabs(self.add_prefab)
        for folder in prefab_folders:
            self._directory.add(local_prefabs.load_prefab(Path(folder).resolve(), self._processes))

    def add_prefab(self, prefab_id: str, version: str, functions: Functions, *, name: str = "",
                   description: str = "", tags: Iterable[str] = (),
                   secrets: Iterable[str | Mapping[str, Any]] = (), status: str = "deployed") -> None:
        """Serve plain Python functions as a prefab; a generator function streams.

        A function that names one of these parameters gets it from the gateway: `inputs` (name to
        paths of the input files, to be read only), `outputs` (a folder; what is left there is given
        back), `secrets` (name to value), `closing` (an event, set when the gateway closes).

        Args:
            secrets: Names, or manifest entries with `name`, `description`, `instructions` and
                `required`. Functions that take `secrets` are not run without the required ones.
            status: "deployed", or "failed": then it is listed but cannot be called.
        """
        manifest = {"id": prefab_id, "version": version, "name": name, "description": description,
                    "tags": list(tags), "secrets": list(secrets)}
        self._directory.add(local_prefabs.prefab_of_functions(manifest, functions, status))

    def prefabs(self) -> list[dict[str, Any]]:
        """The directory's entries, newest first."""
        return self._directory.entries()

    def expire_tokens(self) -> None:
        """Refuse the tokens that were issued for API keys up to now."""
        for header, value in list(self._callers):
            if value.startswith("user-"):
                self._callers[header, value] = None

    def __enter__(self) -> LocalGateway:
        with contextlib.ExitStack() as resources:
            folder = resources.enter_context(tempfile.TemporaryDirectory())
            server = Server(self._port, self._respond, self._idle_timeout)
            self.base_url = f"http://127.0.0.1:{server.server_address[1]}"
            self.store = _Store(Path(folder).resolve(), self.base_url)
            self._files = _FileEndpoints(self.store)
            self._routes = self._make_routes()
            server.start()
            resources.callback(server.close)
            resources.callback(self._end_calls)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def _end_calls(self) -> None:
        self.closing.set()
        for process in list(self._processes):
            process.terminate()

    def _make_routes(self) -> list[tuple[str, re.Pattern[str], Callable[..., Answer]]]:
        prefabs, secrets, files = self._directory, self._secrets, self._files
        runner = _Runner(self, prefabs, secrets)
        table: list[tuple[str, str, Callable[..., Answer]]] = [
            ("POST", "/v1/internal/run", runner.run),
            ("POST", "/v1/run", runner.run),
            ("GET", "/v1/prefabs", prefabs.list_prefabs),
            ("GET", "/v1/prefabs/{}/{}/spec", prefabs.spec),
            ("POST", "/v1/secrets", secrets.set),
            ("GET", "/v1/secrets", secrets.list),
            ("GET", "/v1/secrets/{}", secrets.list_of_prefab),
            ("DELETE", "/v1/secrets/{}/{}", secrets.delete),
            ("POST", _EXCHANGE_PATH, self._exchange),
            ("POST", "/internal/files/generate_upload_url", files.generate_upload_url),
            ("POST", "/internal/files/upload", files.upload),
            ("POST", "/internal/files/upload_temp", files.upload_temp),
            ("GET", "/internal/files/download", files.download),
            ("GET", "/internal/files/list", files.list),
            ("GET", "/internal/files/list_temp", files.list_temp),
            ("DELETE", "/internal/files/cleanup_temp", files.cleanup_temp),
        ]
        return [(method, re.compile(path.replace("{}", "([^/]+)")), handler) for method, path, handler in table]

    def _respond(self, request: Request) -> Answer:
        """The answer to any request."""
        started = time.perf_counter()
        try:
            answer = self._dispatch(request)
        except Refusal as refusal:
            answer = refusal.answer
        except OSError:  # in the middle of the body
            raise
        except Exception:
            logger.exception("%s %s", request.method, request.path)
            answer = Answer(500, b"Internal Server Error", {"content-type": "text/plain; charset=utf-8"})
        milliseconds = (time.perf_counter() - started) * 1000
        logger.debug("%s %s %d %.1f ms", request.method, request.path, answer.status, milliseconds)
        return answer

    def _dispatch(self, request: Request) -> Answer:
        if request.headers.get("content-type", "").startswith("application/json"):
            request.content = b"".join(request.blocks())
        self.requests.append(ReceivedRequest(request.method, request.target, request.headers, request.content))
        if request.path.startswith("/storage/"):
            return self._files.storage(request)
        if self.down:
            raise Refusal(503, "The gateway is down")
        path_exists = False
        for method, pattern, handler in self._routes:
            match = pattern.fullmatch(request.path)
            if match and method == request.method:
                return handler(request, self._caller(request), *match.groups())
            path_exists = path_exists or match is not None
        if path_exists:
            raise Refusal(405, "Method Not Allowed")
        raise Refusal(404, "Not Found")

    def _caller(self, request: Request) -> _Caller:
        """Who sent the request, by a credential that this endpoint takes."""
        headers, path = request.headers, request.path
        if path == _EXCHANGE_PATH:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() == "bearer":
                return self._known_caller("x-api-key", key)
            raise Refusal(401, "Not authenticated")
        taken = {"/v1/internal/run": CREDENTIAL_HEADERS[:1], "/v1/run": CREDENTIAL_HEADERS[1:]}
        for header in taken.get(path, CREDENTIAL_HEADERS):
            if header in headers:
                return self._known_caller(header, headers[header])
        if self.allow_list and path != "/v1/run" and not any(header in headers for header in CREDENTIAL_HEADERS):
            return _Caller(USER)
        raise Refusal(401, "Not authenticated")

    def _known_caller(self, header: str, value: str) -> _Caller:
        stranger = None
        if self.any_credential and value:  # a user made up for a credential: the same one every time
            user_id = f"user-{hashlib.sha256(value.encode('latin-1')).hexdigest()[:12]}"
            stranger = _Caller(user_id, AGENT if header == "x-internal-token" else None)
        caller = self._callers.get((header, value), stranger)
        if caller is None:
            raise Refusal(401, "Could not validate credentials")
        return caller

    def _exchange(self, _: Request, caller: _Caller) -> Answer:
        token = f"user-{uuid.uuid4().hex}"
        self._callers["x-internal-token", token] = caller
        return json_answer({"internal_token": token})


_VARIABLES = ("GATEWAY_BASE_URL", "X_INTERNAL_TOKEN", "AGENT_BUILDER_API_KEY", "GATEWAY_JWT_TOKEN")


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
        before = {name: os.environ.pop(name) for name in _VARIABLES if name in os.environ}
        os.environ["GATEWAY_BASE_URL"] = gateway.base_url
        if credential == "agent":
            os.environ["X_INTERNAL_TOKEN"] = gateway.internal_token
        elif credential == "api_key":
            os.environ["AGENT_BUILDER_API_KEY"] = gateway.api_key
        try:
            yield gateway
        finally:
            for name in _VARIABLES:
                os.environ.pop(name, None)
            os.environ.update(before)


# --- The command line -----------------------------------------------------------------


def _announce(gateway: LocalGateway) -> None:
    """Print what bash and zsh can run as it is to stdout, and all else to stderr."""
    print(f"export GATEWAY_BASE_URL={gateway.base_url}")
    print(f"export X_INTERNAL_TOKEN={gateway.internal_token}", flush=True)
    lines = [
        "", "The lines above are for bash and zsh, these for PowerShell:", "",
        f'$env:GATEWAY_BASE_URL = "{gateway.base_url}"', f'$env:X_INTERNAL_TOKEN = "{gateway.internal_token}"', "",
        "The token is an agent's, as agent files need it. A user without an agent has one of these instead:",
        f"    AGENT_BUILDER_API_KEY={gateway.api_key}", f"    GATEWAY_JWT_TOKEN={gateway.jwt_token}", "Prefabs:",
    ]
    for prefab in gateway.prefabs():
        functions = ", ".join(function["name"] for function in prefab["functions"])
        lines.append(f"    {prefab['id']} {prefab['version']}: {functions}")
    print("\n".join(lines), file=sys.stderr, flush=True)


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
    options = {"port": arguments.port, "any_credential": arguments.any_credential}
    try:
        with LocalGateway(*arguments.prefab, **options) as gateway:
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
    sys.exit(main())
