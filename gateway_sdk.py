#!/usr/bin/env python3
"""Python SDK for a Gateway: call prefabs, stream, run batches and move files over HTTP.

One module, standard library only, CPython 3.9+ or PyPy: copy it, `pip install` it, or run it.

    from gateway_sdk import GatewayClient

    with GatewayClient.from_env() as client:
        result = client.run("text-tools", "1.1.0", "statistics", {"text": "Hello, gateway"})
        print(result.get_function_result())
        for event in client.run("text-tools", "1.1.0", "words", {"text": "a b c"}, stream=True):
            print(event.type, event.data)

A gateway runs prefabs: deployed components with an id, a version and named functions. A call may
cost money and minutes, so one that may have run is never sent twice, and a result that arrived is
never lost. `GatewayClient` is what can be called; every failure is a `GatewayError`.

Top to bottom, each section uses those above it: errors, data, arguments, requests, connections,
responses, transport, event stream, files, batches, client, command line.
"""

from __future__ import annotations

import copy
import email.utils
import enum
import http.client
import io
import json
import os
import queue
import random
import re
import socket
import sys
import threading
import time
from base64 import b64encode, urlsafe_b64decode
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Optional, TypeVar, Union, cast, overload
from urllib.parse import SplitResult, quote, unquote, urlencode, urljoin, urlsplit

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future
    from ssl import SSLContext
else:  # `typing.get_type_hints` needs these names at run time; importing the modules would slow the start
    Executor = Future = SSLContext = Any

# An older Python compiles this file, and then fails at a line that says nothing to a user. As a script
# it ends in a sentence; an import raises what importers handle.
if sys.version_info < (3, 9):  # noqa: UP036 - who copied the file has no installer that checks it
    _problem = "gateway_sdk needs Python 3.9 or newer, and this is Python " + sys.version.split()[0] + "."
    raise (SystemExit if __name__ == "__main__" else ImportError)(_problem)

__version__ = "1.0.0"

__all__ = [
    "DEFAULT_BASE_URL", "AgentContextRequiredError", "AuthenticationError", "BatchResult", "CallStatus",
    "EventStream", "GatewayClient", "GatewayError", "GatewayTimeoutError", "MissingSecretError", "Prefab",
    "PrefabCall", "PrefabInfo", "PrefabNotFoundError", "PrefabResult", "QuotaExceededError",
    "ServiceUnavailableError", "StreamEvent", "StreamEventType", "ValidationError", "__version__",
]

DEFAULT_BASE_URL = "http://nodeport.sensedeal.vip:30566"

_BACKOFF_BASE_SECONDS = 0.5
_CONNECT_BACKOFF_BASE_SECONDS = 1.0  # a gateway that restarts is away for about three seconds
_BACKOFF_CAP_SECONDS = 8.0
_RETRY_AFTER_CAP_SECONDS = 60.0  # a longer wait is the caller's decision
_IDLE_SECONDS = 4.0  # the gateway's server hangs up after 5, unannounced
_KEEP_ALIVE_SECONDS = 60  # a call may take minutes without a byte, and NATs forget silent connections
_AFTER_DONE_SECONDS = 5.0  # how long a stream may linger when it has said that it is done
_MAX_REDIRECTS = 5
_MAX_IDLE_CONNECTIONS = 100  # per origin
_MAX_INTERIM_RESPONSES = 100
_MAX_WORKER_TRANSPORTS = 8
_MAX_ERROR_BYTES = 64 * 1024
_BLOCK_BYTES = 256 * 1024  # fits the processor's cache: larger blocks cost more
_MAX_SHOWN_CHARACTERS = 500

_T = TypeVar("_T")
_Client = TypeVar("_Client", bound="GatewayClient")
_Json = dict[str, Any]
_Path = Union[str, "os.PathLike[str]"]
_Files = Mapping[str, Sequence[str]]  # name to s3:// URLs
_Progress = Callable[[int, Optional[int]], object]  # bytes done, bytes in all (None: unknown)


def _log(message: str, *args: object) -> None:
    """Logs as `gateway_sdk`, if the program has imported `logging`: nobody else should wait for that import."""
    if logging := sys.modules.get("logging"):
        logging.getLogger("gateway_sdk").debug(message, *args)


def _ignore(*_: object) -> None:
    """Does nothing: stands in for a callback that was not given."""


# --- Errors ---------------------------------------------------------------------------------------
#
# GatewayError
# ├─ AuthenticationError
# ├─ PrefabNotFoundError
# ├─ ValidationError                also a ValueError
# ├─ QuotaExceededError
# ├─ MissingSecretError
# ├─ AgentContextRequiredError
# └─ ServiceUnavailableError
#    └─ GatewayTimeoutError          also a TimeoutError

_BODY_FIELDS = ("error_code", "prefab_id", "version", "limit", "used", "quota_type", "secret_name", "instructions")


def _text_of(value: Any) -> str:
    """`str` of a JSON value. To print one that is nested deeply may exceed Python's limit of recursion."""
    with suppress(RecursionError):
        return str(value)
    return "(nested too deeply to be shown)"


# TEMPORARY: what the library's messages say in Python, and how the command line says it.
_COMMAND_HINTS: Mapping[str, str] = {
    r"client\.list_prefabs\(\)": "gateway-sdk list",
    r"client\.get_prefab_spec\(prefab_id, version\)": "gateway-sdk spec PREFAB",
    r"client\.set_secret\('([\w.-]+)', '([\w.-]+)', value\)": r"gateway-sdk secret set \1 \2",
    r"(client\.)?upload_input_file\(\w*\)": "gateway-sdk upload --input",
    r"a result's get_file_urls\(\), or list_files\(\), gives": "a result's files, or gateway-sdk ls, give",
    r"larger timeout=": "larger --timeout",
    r"(^|Is )base_url\b": r"\1--base-url",
    r"\binternal_token=": "X_INTERNAL_TOKEN",
}


class GatewayError(Exception):
    """Anything that went wrong; the class says what can be done about it.

    Attributes:
        message: What was asked, what came back and, where there is one, the remedy.
        details: The fields of the error's body, with secrets taken out.
        status_code: HTTP status; None if there was no answer.
        error_code: The gateway's own code, such as `"MISSING_SECRET"`, or None.
        retry_after: Seconds that the answer asks to wait (`Retry-After`), or None.
        may_have_run: Whether the gateway may have run the call although no usable answer came.
    """

    _remedy: ClassVar[str] = ""  # what the user can do; the error's own fields stand in braces
    status_code: int | None = None
    error_code: str | None = None
    retry_after: float | None = None
    may_have_run: bool = False
    _backoff_seconds: float | None = None  # the longest first wait before a retry; None: there must be no retry

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = dict(details or {})
        for name in _BODY_FIELDS:
            if self.details.get(name):
                setattr(self, name, self.details[name])

    @classmethod
    def _create(cls, message: str, details: Mapping[str, Any], **attributes: Any) -> GatewayError:
        """An error with these attributes, whatever the constructor of its class takes."""
        error = cls.__new__(cls)
        GatewayError.__init__(error, message, details)
        error.__dict__.update(attributes)
        return error

    def _in_shell(self) -> str:
        """TEMPORARY: the message with the SDK's own advice as a command says it."""
        message = self.message
        for in_python, command in _COMMAND_HINTS.items():
            message = re.sub(in_python, command, message)
        return message

    def __reduce__(self) -> tuple[Any, ...]:  # the default would call the class with the message alone
        return self._create, (self.message, self.details), self.__dict__


class AuthenticationError(GatewayError):
    """The gateway refused the credential (401, 403)."""


class PrefabNotFoundError(GatewayError):
    """There is no such prefab, version or function (404)."""

    _remedy = (
        "See client.list_prefabs() for the prefabs, and client.get_prefab_spec(prefab_id, version) "
        "for the functions of one."
    )
    prefab_id: str = "unknown"
    version: str = "unknown"

    def __init__(self, prefab_id: str, version: str, message: str | None = None) -> None:
        body = {"prefab_id": prefab_id, "version": version}
        super().__init__(message or f"Prefab {prefab_id}@{version} not found", body)


class ValidationError(GatewayError, ValueError):
    """Bad input: refused by the gateway (422), or here before anything was sent."""


class QuotaExceededError(GatewayError):
    """A quota is used up (429)."""

    _remedy = "Wait, or have the quota raised: the SDK does not repeat such a call."
    limit: int = 0
    used: int = 0
    quota_type: str = "unknown"

    def __init__(self, message: str, limit: int, used: int, quota_type: str) -> None:
        super().__init__(message, {"limit": limit, "used": used, "quota_type": quota_type})


class MissingSecretError(GatewayError):
    """The prefab needs a secret of yours; `instructions` say how to get it."""

    _remedy = "Set it with client.set_secret({prefab_id!r}, {secret_name!r}, value)."
    prefab_id: str = "unknown"
    secret_name: str = "unknown"  # noqa: S105
    instructions: str | None = None

    def __init__(self, prefab_id: str, secret_name: str, instructions: str | None = None) -> None:
        body = {"prefab_id": prefab_id, "secret_name": secret_name, "instructions": instructions}
        message = f"Missing required secret '{secret_name}' for prefab '{prefab_id}'\n{self._remedy.format(**body)}"
        if instructions:
            message += f"\n{instructions}"
        super().__init__(message, {**body, "error_code": "MISSING_SECRET"})


class AgentContextRequiredError(GatewayError):
    """The credential is not an agent's, which this file operation needs."""

    _remedy = "This needs an agent's token (internal_token=). upload_input_file() uploads a call's inputs without one."

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self._remedy, {"error_code": "MISSING_AGENT_CONTEXT"})


class ServiceUnavailableError(GatewayError):
    """No usable answer: a 5xx, or a connection that was refused, lost or cut short."""


class GatewayTimeoutError(ServiceUnavailableError, TimeoutError):
    """Connecting, or a wait for bytes, took longer than `timeout`."""


class _NotPicklableError(GatewayError, TypeError):
    """Raised where a client cannot be pickled, and so cannot go to another process."""


_ERRORS: Mapping[int | str, type[GatewayError]] = {  # by status, or the error_code of a 400
    401: AuthenticationError,
    403: AuthenticationError,
    404: PrefabNotFoundError,
    422: ValidationError,
    429: QuotaExceededError,
    "MISSING_SECRET": MissingSecretError,
    "MISSING_AGENT_CONTEXT": AgentContextRequiredError,
}


# --- Data -----------------------------------------------------------------------------------------


class CallStatus(str, enum.Enum):
    """How a call ended."""

    SUCCESS = "SUCCESS"
    FAILED = "FAILED"

    __str__ = str.__str__  # prints as its value on every Python


class StreamEventType(str, enum.Enum):
    """What an event of a stream is."""

    START = "start"
    CONTENT = "content"
    PROGRESS = "progress"
    DONE = "done"
    ERROR = "error"

    __str__ = str.__str__


_EVENT_TYPES = {str(event_type): event_type for event_type in StreamEventType}
_ENVELOPE_KEYS = {"status", "output", "error", "files", "metadata", "job_id"}


@dataclass
class PrefabCall:
    """One call; `files` maps an input's name to `s3://` URLs, as `upload_input_file` gives them."""

    prefab_id: str
    version: str
    function_name: str
    parameters: _Json | None = None
    files: _Files | None = None

    def to_dict(self) -> _Json:
        """The call as the gateway reads it; `files` is left out when there are none."""
        inputs: _Json = {"parameters": self.parameters or {}}
        if self.files:
            inputs["files"] = self.files
        names = {"prefab_id": self.prefab_id, "version": self.version, "function_name": self.function_name}
        return {**names, "inputs": inputs}


def _event_error(event: StreamEvent) -> _Json:
    """An error event's data as a result's `error`, with the `error_code` that may stand beside it."""
    error: _Json = {"message": "The function reported an error."}
    error.update({key: event.raw[key] for key in ("message", "error_code") if key in event.raw})
    if isinstance(event.data, dict):
        error.update(event.data)
    elif event.data:
        error["message"] = _text_of(event.data)
    return error


@dataclass
class PrefabResult:
    """What became of one call.

    Attributes:
        status: A `CallStatus`, or the gateway's own word if that is another.
        output: The envelope `{"status", "output", "files"}`, or the function's value itself: gateways differ.
        error: `{"message", "type", ...}` of a failed call.
        job_id: The gateway's id of the request.
        exception: What `run` would have raised, of a failed call of a batch.
        raw: The result's whole entry in the answer.
    """

    status: CallStatus | str
    output: Any = None
    error: _Json | None = None
    job_id: str | None = None
    exception: GatewayError | None = field(default=None, repr=False, compare=False)
    raw: _Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def _from_dict(cls, entry: _Json, job_id: str | None) -> PrefabResult:
        status, error = _text_of(entry.get("status")), entry.get("error")
        if not isinstance(error, (dict, type(None))):
            error = {"message": _text_of(error)}
        return cls(CallStatus.__members__.get(status, status), entry.get("output"), error, job_id, raw=entry)

    @classmethod
    def _from_exception(cls, exception: BaseException) -> PrefabResult:
        if not isinstance(exception, GatewayError):
            lost = ServiceUnavailableError(f"The call was lost: {type(exception).__name__}: {exception}")
            lost.__cause__, lost.may_have_run = exception, True
            exception = lost
        code = {"error_code": exception.error_code} if exception.error_code else {}
        error = {"message": exception.message, "type": type(exception).__name__, **code}
        return cls(CallStatus.FAILED, error=error, exception=exception)

    def to_dict(self) -> _Json:
        """TEMPORARY: the four fields as JSON values."""
        error = self.error
        if self.exception is not None:
            error = {**(error or {}), "may_have_run": self.exception.may_have_run}
        return {"status": str(self.status), "output": self.output, "error": error, "job_id": self.job_id}

    @classmethod
    def from_events(cls, events: Iterable[StreamEvent]) -> PrefabResult:
        """TEMPORARY: the result of a stream."""
        contents: list[Any] = []
        error: _Json | None = None
        done: Any = None
        files: dict[str, Any] = {}
        for event in events:
            if event.type is StreamEventType.ERROR:
                error = _event_error(event)
            elif event.type is StreamEventType.CONTENT:
                if event.data is not None or event.raw.get("type") == "content":
                    contents.append(event.data)
            elif event.type is StreamEventType.DONE and isinstance(event.data, dict):
                fields = dict(event.data)
                files.update(fields.pop("files", None) or {})
                fields.pop("job_id", None)
                done = {**done, **fields} if isinstance(done, dict) else (fields or done)
            elif event.type is StreamEventType.DONE and event.data not in (None, "", "[DONE]"):
                done = event.data
        value: Any = contents
        if not contents and done:
            value = done
        elif all(isinstance(content, str) for content in contents):
            value = "".join(contents)
        status = CallStatus.FAILED if error else CallStatus.SUCCESS
        return cls(status, {"status": str(status), "output": value, "files": files}, error)

    def is_success(self) -> bool:
        """Whether the call ran; its function may still report a failure of its own."""
        return self.status == CallStatus.SUCCESS

    def get(self, key: str, default: Any = None) -> Any:
        """A field of `output`."""
        return self.output.get(key, default) if isinstance(self.output, dict) else default

    def get_result(self) -> Any:
        """`output["result"]` if there is such a key, else `output`."""
        return self.get("result", self.output)

    def get_function_result(self) -> Any:
        """What the function returned; `{}` where that is null or missing.

        It is `output["output"]` if `output` is an envelope: a dict with `output` in it, or one that has
        `status` and no keys but an envelope's. Any other `output` is the value itself.
        """
        value = self.output
        if isinstance(value, dict):
            is_envelope = "output" in value or ("status" in value and set(value) <= _ENVELOPE_KEYS)
            if is_envelope:
                value = value.get("output")
        return {} if value is None else value

    def get_files(self) -> dict[str, list[str]]:
        """The output files: name to list of `s3://` URLs."""
        files = self.get("files") or self.raw.get("files")
        if not isinstance(files, dict):
            return {}
        found = {}
        for name, urls in files.items():
            if isinstance(urls, str):
                found[name] = [urls]
            elif isinstance(urls, list):
                found[name] = [url for url in urls if isinstance(url, str)]
        return found

    def get_file_urls(self) -> list[str]:
        """The `s3://` URLs of all output files."""
        return [url for urls in self.get_files().values() for url in urls]

    def _business(self, key: str) -> Any:
        value = self.get_function_result()
        return value.get(key) if isinstance(value, dict) else None

    def get_business_success(self) -> bool:
        """The function result's `success`; False where missing."""
        return bool(self._business("success"))

    def get_business_message(self) -> str:
        """The function result's `message`; `""` where missing."""
        return _text_of(self._business("message") or "")

    def get_business_error(self) -> Any:
        """The function result's `error`; None where missing."""
        return self._business("error")

    def get_business_error_code(self) -> Any:
        """The function result's `error_code`; None where missing."""
        return self._business("error_code")


@dataclass
class BatchResult:
    """The results of a batch, in the order of its calls.

    `status` is `"COMPLETED"` (all succeeded), `"PARTIAL_SUCCESS"` or `"FAILED"` (none did). `job_id`
    is None unless the batch was a single request: each result has its own.
    """

    job_id: str | None
    status: str
    results: list[PrefabResult]

    @classmethod
    def _from_results(cls, results: list[PrefabResult], job_id: str | None) -> BatchResult:
        batch = cls(job_id, "COMPLETED", results)
        failed = len(batch.get_failed())
        if failed:
            batch.status = "FAILED" if failed == len(results) else "PARTIAL_SUCCESS"
        return batch

    def all_success(self) -> bool:
        """Whether every call succeeded."""
        return not self.get_failed()

    def get_failed(self) -> list[PrefabResult]:
        """The results that are not a success."""
        return [result for result in self.results if not result.is_success()]


@dataclass
class StreamEvent:
    """One event of a stream; `raw` is the whole decoded object, with its further fields."""

    type: StreamEventType
    data: Any
    raw: _Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, data: _Json) -> StreamEvent:
        """The event of a decoded object; one of an unknown `type` is `content`."""
        name: Any = data.get("type")
        event_type = _EVENT_TYPES.get(name) if isinstance(name, str) else None
        return cls(event_type or StreamEventType.CONTENT, data.get("data"), data)


@dataclass
class PrefabInfo:
    """One version of a prefab in the directory; `status` is its deployment's, `raw` the whole entry."""

    prefab_id: str
    version: str
    name: str = ""
    description: str = ""
    tags: list[str] = field(default_factory=list)
    status: str | None = None
    functions: list[Any] = field(default_factory=list)
    requires_secrets: bool = False
    secrets: list[_Json] = field(default_factory=list)
    is_official: bool = False
    author: str | None = None
    raw: _Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def _from_dict(cls, entry: _Json) -> PrefabInfo:
        values = {**entry, "prefab_id": entry["id"], "status": entry.get("deployment_status"), "raw": entry}
        names = {known.name for known in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names and value is not None})


# --- Arguments ------------------------------------------------------------------------------------


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValidationError(message)


def _shown(value: Any) -> str:
    """A value as a message shows it, also if it is huge."""
    if value is None or isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 1e15):
        return f"{value!r:.80}"
    return f"a {type(value).__name__}"


def _require_text(**values: Any) -> None:
    for name, value in values.items():
        _require(isinstance(value, str) and value, f"{name} must be a string that is not empty, not {_shown(value)}.")


_is_header_value = re.compile(r" *[\x21-\x7e\xa1-\xff][\x20-\x7e\xa0-\xff]*").fullmatch


def _require_header_value(name: str, value: Any) -> None:
    """Raises if no header can carry the value. Never shows it, as the error of `http.client` would."""
    needed = "a string that is not empty, and have only printable ASCII or Latin-1 characters"
    _require(isinstance(value, str) and _is_header_value(value), f"{name} must be {needed}.")


def _require_number(name: str, value: Any, above: int = 0) -> None:
    number = isinstance(value, int) and not isinstance(value, bool) and above < value < 10**9
    _require(number, f"{name} must be a whole number above {above} and below {10**9}, not {_shown(value)}.")


def _require_timeout(seconds: Any) -> None:
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    usable = seconds is None or (number and 0 < seconds < 2**31 // 1000)  # poll() counts milliseconds in 31 bits
    _require(usable, f"timeout must be None or seconds above 0 and below {2**31 // 1000}, not {_shown(seconds)}.")


def _require_s3_url(name: str, url: Any, source: str) -> None:
    is_url = isinstance(url, str) and re.match("s3://.", url)
    _require(is_url, f"{name} must be an s3:// URL, not {_shown(url)}: {source} gives one.")


def _require_call(call: Any) -> None:
    is_call = isinstance(call, PrefabCall)
    _require(is_call, f"A call must be a PrefabCall, not {_shown(call)}: PrefabCall(**call) takes a dict.")
    _require_text(prefab_id=call.prefab_id, version=call.version, function_name=call.function_name)
    for name, value in (("parameters", call.parameters), ("files", call.files)):
        _require(value is None or isinstance(value, dict), f"{name} must be a dict, not {_shown(value)}.")
    for name, urls in (call.files or {}).items():
        _require(isinstance(urls, (list, tuple)), f"files[{name!r}] must be a list, as [upload_input_file(path)] is.")
        for url in urls:
            _require_s3_url(f"Each of files[{name!r}]", url, "client.upload_input_file(path)")


def _segments(*names: Any) -> str:
    """A path of one segment for each name, with the slashes in them encoded."""
    for name in names:
        is_name = isinstance(name, str) and name not in ("", ".", "..") and name.isprintable()
        _require(is_name, f"{_shown(name)} cannot be the name of a prefab, a version or a secret.")
    return "/".join(quote(name, safe="") for name in names)


_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_JSON_CONVERSIONS = {  # an attribute of a value that JSON cannot carry, and what to pass instead
    "isoformat": "its .isoformat()", "model_dump": "its .model_dump()", "tolist": "its .tolist()",
    "__iter__": "list(...) of it",
}


def _encode(content: Any, path: str = "", depth: int = 0) -> bytes:
    """JSON in UTF-8. The error for what it cannot carry names the path to it and the usual way out."""
    try:
        return _encode_json(content).encode()
    except (TypeError, ValueError, RecursionError) as error:  # not as a cause: it may show a text that is a secret
        problem = f"a {type(content).__name__}: {error}"
    if depth > 100:
        path, problem = f"{path:.80}...", "nested too deeply, or contains itself"
    elif isinstance(content, dict):
        for key, item in content.items():
            _encode(item, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(content, (list, tuple)):
        for index, item in enumerate(content):
            _encode(item, f"{path}[{index}]", depth + 1)
    elif isinstance(content, float):
        problem = f"{content}, which JSON does not have"
    elif not isinstance(content, (str, bytes)):
        ways_out = [text for attribute, text in _JSON_CONVERSIONS.items() if hasattr(content, attribute)]
        problem = f"a {type(content).__name__}: pass {ways_out[0]}" if ways_out else problem
    raise ValidationError(f"The request cannot be sent as JSON: {path or 'it'} is {problem}.")


# --- Requests -------------------------------------------------------------------------------------

_DEFAULT_PORTS = {"http": 80, "https": 443}
_URL_CHARACTERS = "!#$%&'()*+,/:;=?@[]~"  # beside letters, digits and -._
_CREDENTIAL_KINDS = {"X-Internal-Token": "an internal token", "X-API-Key": "an API key", "Authorization": "a JWT"}


def _split_url(url: str) -> tuple[str, str]:
    """Origin (RFC 6454), such as `https://host:8443`, and request target of an http(s) URL.

    A `ValueError` says what is wrong with it, but does not show it, as it may be a secret.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except (ValueError, AttributeError, TypeError):
        raise ValueError("is not a URL") from None
    if parts.scheme not in _DEFAULT_PORTS or not re.fullmatch(r"[\w.:%~-]+", host):
        raise ValueError("is not an http:// or https:// URL")
    if "@" in parts.netloc:
        raise ValueError("must not contain a user name")
    if port == 0:
        raise ValueError("has the port 0, to which nothing can connect")
    netloc = f"[{host}]" if ":" in host else host
    if port not in (None, _DEFAULT_PORTS[parts.scheme]):
        netloc += f":{port}"
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    # A presigned URL must arrive as it was signed: only what HTTP cannot carry is encoded.
    return f"{parts.scheme}://{netloc}", quote(target, safe=_URL_CHARACTERS)


def _pattern_of(part: re.Match[str]) -> str:
    """A pattern for a character of a secret, or its backslashes: as it is, or as a URL, JSON or HTML writes it."""
    character = part[0]
    if character.isascii() and (character.isalnum() or character in "-._~"):
        return re.escape(character)
    if character.startswith("\\"):  # any number of them: with one pattern for each, a search could take for ever
        return r"(?i:\\|%5c|&#92;|&#x5c;)+"
    # Any HTML entity counts, and "+", which means a space: to hide a little too much does no harm.
    spellings = {character, quote(character, safe=""), json.dumps(character)[1:-1], f"\\{character}", "+"}
    return f"(?i:{'|'.join(map(re.escape, spellings))}|&#?[a-z0-9]+;)"


def _mask_query(word: re.Match[str]) -> str:
    """A word without the query of the URL in it, which may be presigned."""
    before, http, url = word[0].partition("http")
    address, _, query = url.partition("?")
    return f"{before}{http}{address}?***" if query else word[0]


@dataclass
class _Request:
    """All that is sent, and how it may be treated. As text it shows no query and no header."""

    method: str
    origin: str
    target: str
    timeout: float | None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: io.BufferedReader | None = None  # comes after `body`, from its start on each attempt
    tail: bytes = b""  # comes after `file`
    on_progress: _Progress | None = None  # of `file`
    idempotent: bool = False  # sending it twice does no more than sending it once
    to_gateway: bool = True  # False: to a storage, which must not see the credential
    subject: dict[str, str] | None = None  # the prefab that a 404 is about, if known; None: it is about no prefab
    secrets: tuple[str, ...] = ()  # texts that no message may show
    answers_secret: bool = False  # the body of the answer must not be shown either
    object_size: int | None = None  # of a download: what an answer said

    def __post_init__(self) -> None:
        if not self.to_gateway:  # the query of a presigned URL, and its values that are too long to be a date or a name
            query = self.target.partition("?")[2]
            values = [unquote(pair.partition("=")[2]) for pair in query.split("&")]
            self.secrets += (query, *(value for value in values if len(value) > 9))

    def __repr__(self) -> str:
        return f"{self.method} {'' if self.to_gateway else self.origin}{self.target.partition('?')[0]}"

    def redact(self, text: str) -> str:
        """`text` without the credential, secrets and the queries of URLs."""
        text = re.sub(r"[^\s\"'<>]+", _mask_query, text)
        credentials = {self.headers.get(name, "").rpartition("Bearer ")[2] for name in _CREDENTIAL_KINDS}
        for word in sorted(credentials.union(self.secrets) - {""}, key=len, reverse=True):
            # A short one counts only where it stands alone: "id" is no secret inside of "invalid".
            edge = r"\b" if len(word) < 8 and word.isalnum() else ""
            pattern = re.sub(r"\\+|.", _pattern_of, word, flags=re.DOTALL)
            text = re.sub(f"{edge}{pattern}{edge}", "***", text)
        return text


# --- Connections ----------------------------------------------------------------------------------

_WIRE_FAULTS = (OSError, http.client.HTTPException)


def _tls_advice(error: BaseException) -> str:
    """What to do about a refused TLS handshake, as a retry would fail in the same way; nothing for other errors."""
    ssl = sys.modules.get("ssl")
    if not ssl or not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLEOFError):
        return ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "Trust its certificate with ssl_context=, or by a file that SSL_CERT_FILE names."
    return "Does the server speak TLS there? If not, the URL must begin with http://, not https://."


def _wire_error(request: _Request, error: BaseException, doing: str, *, connected: bool = True) -> GatewayError:
    """The error for an answer that did not come, or not whole. If `connected`, the request may have arrived."""
    error_class, reason = ServiceUnavailableError, str(error) or type(error).__name__
    backoff_seconds: float | None = _BACKOFF_BASE_SECONDS if connected else _CONNECT_BACKOFF_BASE_SECONDS
    may_have_run = connected and not request.idempotent
    timed_out = isinstance(error, (socket.timeout, TimeoutError))
    tls_advice = "" if connected else _tls_advice(error)
    advice = tls_advice
    if may_have_run:
        advice = "It may have run all the same, so it was not sent again."
    elif not connected and not tls_advice and request.to_gateway:
        advice = "Is base_url (or else GATEWAY_BASE_URL) right, and does the gateway run?"
    if timed_out:
        error_class, reason = GatewayTimeoutError, f"nothing for {request.timeout} s"
        advice += "\nA larger timeout= waits longer."
    if may_have_run or timed_out or tls_advice:
        backoff_seconds = None
    message = request.redact(f"{request}: {doing}: {reason}\n{advice}".strip())
    wire_error = error_class._create(message, {}, may_have_run=may_have_run, _backoff_seconds=backoff_seconds)
    # `http.client` quotes a bad status line or chunk size; if a secret is in it, the cause must not be shown.
    wire_error.__cause__ = error if request.redact(str(error)) == str(error) else None
    error.__context__ = None  # an error before it may quote the same
    return wire_error


def _head(start_line: str, headers: Mapping[str, str]) -> bytes:
    lines = [start_line, *(f"{name}: {value}" for name, value in headers.items()), "\r\n"]
    return "\r\n".join(lines).encode("latin-1")


def _proxy_headers(proxy: SplitResult | None) -> dict[str, str]:
    if proxy is None or proxy.username is None:
        return {}
    login = unquote(f"{proxy.username}:{proxy.password or ''}")
    return {"Proxy-Authorization": f"Basic {b64encode(login.encode()).decode()}"}


def _proxy_for(origin: str) -> SplitResult | None:
    """The URL of the proxy that the environment sets for an origin."""
    if sys.platform not in ("win32", "darwin") and not any(name.lower().endswith("_proxy") for name in os.environ):
        return None  # before an import that takes as long as twenty calls
    from urllib.request import getproxies, proxy_bypass

    server = urlsplit(origin)
    address = getproxies().get(server.scheme)
    if not address or proxy_bypass(f"{server.hostname}:{server.port or _DEFAULT_PORTS[server.scheme]}"):
        return None
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    if proxy.scheme != "http" or not re.fullmatch(r"(.*@)?([^@:]+|\[.+\])(:\d*)?", proxy.netloc):
        raise GatewayError(f"The environment's {server.scheme}_proxy must be an http:// URL, a login percent-encoded.")
    return proxy


def _open_tunnel(sock: socket.socket, authority: str, proxy: SplitResult) -> None:
    """Has a proxy connect to an https server (RFC 9110 §9.3.6). `http.client` forgets the brackets of IPv6."""
    sock.sendall(_head(f"CONNECT {authority} HTTP/1.1", {"Host": authority, **_proxy_headers(proxy)}))
    with http.client.HTTPResponse(sock, method="CONNECT") as response:
        response.begin()
        if not 200 <= response.status < 300:
            raise OSError(f"the proxy answered {response.status} {response.reason}")


class _Reader(io.BufferedReader):
    """What `http.client` reads answers from: one for the whole life of a connection.

    What comes behind an answer stays in it, so that it can be noticed.
    """

    def readline(self, size: int | None = -1, /) -> bytes:
        """Raises if the connection ends inside a head; `http.client` would take that for the head's end."""
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            raise http.client.RemoteDisconnected("the connection was closed before the end")
        return line

    def close(self) -> None:
        """Does nothing: `http.client` closes its file after each answer, but it is needed for the next."""


class _Connection:
    """An open socket to an origin, straight or through a proxy."""

    def __init__(self, origin: str, timeout: float | None, tls: SSLContext | None, proxy: SplitResult | None) -> None:
        self.key = os.getpid(), origin
        self.idle_since = 0.0
        self.reading = threading.Lock()  # held while bytes are read, when nobody else may close the descriptor
        self._proxy = None if tls else proxy  # through a tunnel, the server itself is asked
        server = urlsplit(origin)
        peer = proxy or server
        sock = socket.create_connection((peer.hostname or "", peer.port or _DEFAULT_PORTS[peer.scheme]), timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option in ("TCP_KEEPIDLE", "TCP_KEEPALIVE"):  # Linux and Windows; macOS
                if hasattr(socket, option):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), _KEEP_ALIVE_SECONDS)
            if tls and proxy:
                _open_tunnel(sock, server.netloc if server.port else f"{server.netloc}:443", proxy)
            self.sock = tls.wrap_socket(sock, server_hostname=server.hostname) if tls else sock
        except BaseException:
            sock.close()
            raise
        self._reader = _Reader(self.sock.makefile("rb", buffering=0))

    def makefile(self, _mode: str) -> _Reader:
        """What `http.client` calls on a socket."""
        return self._reader

    def close(self) -> None:
        """Closes the socket, also while another thread waits for bytes from it, and from a signal handler."""
        if self.key[0] == os.getpid():  # after a fork the parent may still use the connection: only close our copy
            with suppress(OSError):
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # wakes the reader; a TLS socket's own would not
        self.sock.close()  # frees the descriptor when the reader's file is closed as well
        if self.reading.acquire(blocking=False):  # if not, the reader closes it
            self._reader.raw.close()
            self.reading.release()

    def is_stale(self) -> bool:
        """Whether it was idle for so long that the server may be about to hang up."""
        return time.monotonic() - self.idle_since > _IDLE_SECONDS

    def is_alive(self) -> bool:
        """Whether it can be used again: not stale, not hung up, and nothing left in it of earlier answers."""
        if self.is_stale():
            return False
        self.sock.setblocking(False)
        try:
            return self._reader.read(1) is None  # a byte would be left over from an answer, b"" would be the end
        except OSError as error:
            return type(error).__name__ == "SSLWantReadError"  # so TLS reports that nothing can be read

    def send(self, request: _Request) -> OSError | None:
        """Sends a request. Returns the error if sending broke off; what the server said by then can be read."""
        self.sock.settimeout(request.timeout)
        for block in self._serialize(request):
            left = memoryview(block)
            try:
                while left:  # not sendall: its timeout would be for the whole of it
                    left = left[self.sock.send(left) :]
            except OSError as error:
                self.sock.settimeout(0)  # from now on, only read what has already arrived
                return error
        return None

    def _serialize(self, request: _Request) -> Iterator[bytes]:
        """A request in blocks. If its file is not as long as was promised, raises before the last one is sent.

        `sendfile` was measured: it waits for room in the socket in between, and takes a fifth more time.
        """
        size = os.fstat(request.file.fileno()).st_size if request.file else 0
        headers = {
            "Host": request.origin.partition("://")[2],
            "User-Agent": f"agent-builder-gateway-sdk/{__version__}",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            **request.headers,
            **_proxy_headers(self._proxy),
        }
        if request.method in ("POST", "PUT"):
            headers["Content-Length"] = str(len(request.body) + size + len(request.tail))
        target = f"{request.origin}{request.target}" if self._proxy else request.target  # RFC 9112 §3.2.2
        # One block for both: a body by itself would be a packet by itself.
        yield _head(f"{request.method} {target} HTTP/1.1", headers) + request.body
        if not request.file:
            return
        on_progress = request.on_progress or _ignore
        request.file.seek(0)
        sent = 0
        on_progress(sent, size)
        # Asks for one byte more than was promised: if it comes, the file has grown.
        while block := request.file.read(min(size - sent + 1, _BLOCK_BYTES)):
            sent += len(block)
            if sent > size:
                raise GatewayError(f"{request}: the file became longer while it was being sent.")
            yield block
            on_progress(sent, size)
        if sent < size:
            raise GatewayError(f"{request}: the file became shorter while it was being sent.")
        yield request.tail


class _Pool:
    """Idle connections by process and origin; the last one used is the first to be used again.

    Needs no lock, as a list's `append` and `pop` are atomic, so a fork can't leave one held.
    """

    def __init__(self) -> None:
        self._idle: dict[tuple[int, str], list[_Connection]] = {}
        self._limit = _MAX_IDLE_CONNECTIONS

    def acquire(self, origin: str) -> _Connection | None:
        """An idle connection that can be used, or None."""
        idle = self._idle.get((os.getpid(), origin), [])
        while idle:
            with suppress(IndexError):  # another thread took the last one
                connection = idle.pop()
                if connection.is_alive():
                    return connection
                connection.close()
        return None

    def release(self, connection: _Connection) -> None:
        """Keeps a connection for its next use, and drops those that were idle for too long."""
        connection.idle_since = time.monotonic()
        self._idle.setdefault(connection.key, []).append(connection)
        self._evict()

    def close(self) -> None:
        """Closes the idle connections now, and those in use when they come back."""
        self._limit = 0
        self._evict()

    __del__ = close

    def _evict(self) -> None:
        for idle in list(self._idle.values()):
            # Another thread may take the last one at any moment: hence not idle[0].
            while len(idle) > self._limit or any(oldest.is_stale() for oldest in idle[:1]):
                with suppress(IndexError):
                    idle.pop(0).close()


# --- Responses ------------------------------------------------------------------------------------


class _Response(http.client.HTTPResponse):
    """An answer. It owns its connection until its body was read to the end; then the pool has it back.

    Relies on these inner ways of `http.client`, the same in CPython 3.9 to 3.15: it reads from what the
    socket's `makefile` gives; `begin` reads a head only while `headers` is None; `length` is what the
    head says, or None; `will_close` is true where the connection ends with the answer.
    """

    def __init__(self, request: _Request, connection: _Connection, pool: _Pool) -> None:
        super().__init__(cast(Any, connection), method=request.method)
        self.request = request
        self.connection = connection
        self.framed = False  # whether the body says where it ends; if not, a break looks like the end
        self.body = b""  # as far as `read_all` read it
        self._owned = {"connection": connection}
        self._pool = pool

    def begin(self, broken: OSError | None = None) -> None:
        """Reads the head, past all interim answers (RFC 9110 §15.2); `http.client` skips 100 only.

        `broken`: what broke sending off. The answer may be there all the same: 413, then a hang-up.
        """
        try:
            for _ in range(_MAX_INTERIM_RESPONSES):
                super().begin()
                if self.status >= 200:
                    break
                vars(self)["headers"] = None  # or `begin` would not read the next head
            self.framed = self.chunked or self.length is not None
            if self.status < 200 or (not self.framed and "Content-Length" in self.headers):
                raise http.client.HTTPException("an answer without an end")
        except _WIRE_FAULTS as error:
            raise _wire_error(self.request, broken or error, "sending broke off" if broken else "no answer")
        if broken:
            self.will_close = True

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives. At its end the connection goes back to the pool.

        Raises:
            ServiceUnavailableError: the connection broke, or `close` was called meanwhile.
        """
        released = False
        missing = self.length
        try:
            while missing != 0:
                size = _BLOCK_BYTES if missing is None else min(missing, _BLOCK_BYTES)
                with self.connection.reading:
                    chunk = self.read1(size) if self._owned else b""
                if not chunk or not self._owned:  # another thread closed it: it is freed here
                    break
                if missing is not None:
                    missing -= len(chunk)
                yield chunk
            if not self._disown():
                raise ConnectionAbortedError("it was closed here")
            if missing:  # `http.client` does not raise for that
                raise http.client.IncompleteRead(b"", missing)
            # After a 5xx the server may hang up without having said so: uvicorn does.
            if not self.will_close and self.status < 500:
                released = True
                self._pool.release(self.connection)
        except _WIRE_FAULTS as error:
            raise _wire_error(self.request, error, f"the answer ({self.status}) was cut short")
        finally:
            if not released:
                self._disown()
                self.connection.close()

    def read_all(self) -> bytes:
        """The whole body, which `body` keeps."""
        self.body = b"".join(self.chunks())
        return self.body

    def wait_at_most(self, seconds: float) -> None:
        """From now on, waits no longer for bytes than so many seconds."""
        if self._owned:
            with suppress(OSError):  # it is being closed
                self.connection.sock.settimeout(seconds)

    def close(self) -> None:
        """Closes the connection, unless it is the pool's by now. Any thread may, and a signal handler."""
        if self._disown():
            self.connection.close()

    def _disown(self) -> bool:
        """Whether this answer owned its connection until now. It is one atomic step: only one caller is told so."""
        return self._owned.pop("connection", None) is not None


def _unexpected_response(response: _Response, problem: str) -> GatewayError:
    """The error for a 2xx whose body is not what the endpoint promises. `details["body"]` has it."""
    request, status, body = response.request, response.status, response.body
    text = "***" if request.answers_secret else request.redact(body.decode("utf-8", "replace"))
    message = f"{request} answered {status}, but {problem}"
    message += f": {text[:_MAX_SHOWN_CHARACTERS]}" if body else "."
    return GatewayError._create(message, {"body": text}, status_code=status, may_have_run=not request.idempotent)


def _read_json(response: _Response, kind: Any, fields: Mapping[str, type] = {}) -> Any:
    """The body as JSON of type `kind`; `fields` must be in it, with their types."""
    content: Any = None
    body = response.read_all()
    with suppress(ValueError, RecursionError):  # the error would quote the body, and with it perhaps a secret
        content = json.loads(body)  # NaN too: the answer was paid for
    if not isinstance(content, kind):
        raise _unexpected_response(response, f"the body is not JSON of the type {kind.__name__}")
    for name, field_kind in fields.items():
        if not isinstance(content.get(name), field_kind):
            raise _unexpected_response(response, f"{name!r} is not a {field_kind.__name__}")
    return content


def _redact_json(value: Any, redact: Callable[[str], str]) -> Any:
    """A copy of a JSON value with `redact` applied to every string and key in it."""
    if isinstance(value, list):
        return [_redact_json(item, redact) for item in value]
    if isinstance(value, dict):
        return {redact(key): _redact_json(item, redact) for key, item in value.items()}
    return redact(value) if isinstance(value, str) else value


def _read_detail(response: _Response) -> Any:
    """What an error's body says: its JSON, or else its text, without secrets."""
    body, redact = b"", response.request.redact
    with suppress(ServiceUnavailableError):  # if it breaks off, the status still says enough
        for chunk in response.chunks():
            body += chunk
            if len(body) > _MAX_ERROR_BYTES:
                break
    text = body.decode("utf-8", "replace").strip()
    try:
        detail = _redact_json(json.loads(text), redact)
    except (ValueError, RecursionError):
        detail = redact(text)[:_MAX_SHOWN_CHARACTERS]
        found = re.search(r"<Code>([^<]*)</Code>\s*<Message>([^<]*)</Message>", detail)  # of S3
        if found:
            detail = {"error_code": found[1], "message": f"{found[1]}: {found[2]}"}
    if isinstance(detail, dict):
        detail = detail.get("detail") or detail
    return detail


def _describe(detail: Any) -> tuple[str, _Json]:
    """Message and fields of what an error's body says, in any of its forms."""
    if isinstance(detail, list):
        lines = [str(entry) for entry in detail]
        with suppress(TypeError, KeyError):  # it is not FastAPI's list
            lines = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in detail]
        return "\n  ".join(lines), {"errors": detail}
    if isinstance(detail, dict):
        message = detail.get("message") or detail.get("error") or json.dumps(detail)[:_MAX_SHOWN_CHARACTERS]
        more = detail.get("details")
        fields = {**detail, **more} if isinstance(more, dict) else detail
        return str(message), fields
    message = str(detail or "")
    secret = re.search(r"Secret '(?P<secret_name>[^']*)' for prefab '(?P<prefab_id>[^']*)' is not configured", message)
    return message, {"error_code": "MISSING_SECRET", **secret.groupdict()} if secret else {}


def _retry_after_seconds(value: str) -> float | None:
    """Seconds that a `Retry-After` in either form asks for (RFC 9110 §10.2.3); None if unreadable."""
    with suppress(TypeError, ValueError, IndexError, OverflowError):
        if re.fullmatch(r"[\d. ]+", value, re.ASCII):
            return float(value)
        date = email.utils.parsedate_tz(value)  # without a zone, it is in GMT
        if date:
            return max(0.0, email.utils.mktime_tz(date) - time.time())
    return None


def _credential_remedy(request: _Request) -> str:
    """What to do about a refused credential: which one was sent, and since when it is expired (RFC 7519 §4.1.4)."""
    if request.answers_secret:
        return "The API key was sent, to be exchanged. Is that a valid credential for this gateway?"
    sent = [f"{kind} ({name})" for name, kind in _CREDENTIAL_KINDS.items() if name in request.headers]
    if not sent:
        return "No credential was sent: this machine's address must then be on the gateway's allow-list."
    remedy = f"The client sent {sent[0]}. Is this credential valid for this gateway?"
    with suppress(ValueError, LookupError, TypeError, OverflowError, OSError):  # no JWT, or one without an end
        payload = request.headers["Authorization"].split(".")[1]
        expires = json.loads(urlsafe_b64decode(payload + "==="))["exp"]
        if type(expires) in (int, float) and expires < time.time():
            remedy += f" It expired at {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(expires))} UTC."
    return remedy


def _status_error(response: _Response) -> GatewayError:
    """The error for an answer that is not a 2xx, whatever its body looks like."""
    request, status = response.request, response.status
    detail = _read_detail(response)
    message, fields = _describe(detail)
    no_such_path = status == 404 and detail == "Not Found"  # which is all that FastAPI says then
    subject = request.subject or {}
    # A 404 may name something else, but this was asked for.
    fields = {**fields, **subject} if status == 404 else {**subject, **fields}
    error_class = _ERRORS.get(str(fields.get("error_code")) if status == 400 else status, GatewayError)
    if status >= 500:
        error_class = ServiceUnavailableError
    elif not request.to_gateway or no_such_path or (status == 404 and request.subject is None):
        error_class = GatewayError  # what a storage refuses is none of the gateway's errors
    remedy = error_class._remedy.format_map({"prefab_id": "unknown", "secret_name": "unknown", **fields})
    if error_class is AuthenticationError:
        remedy = _credential_remedy(request)
    elif request.to_gateway and no_such_path:
        remedy = "This gateway has no such endpoint. Is base_url right? Does it take this kind of credential?"
    elif status < 400:
        address = response.headers.get("Location", "nowhere").partition("?")[0]
        message = f"a redirect to {address}, which is not followed."
        remedy = "Is base_url right?" if request.to_gateway else ""
    message = request.redact(f"{request} answered {status}: {message or response.reason}")
    lines = [message, remedy, str(fields.get("instructions") or "")]
    return error_class._create(
        "\n".join(filter(None, lines)), fields, status_code=status,
        retry_after=_retry_after_seconds(response.headers.get("Retry-After", "")),
        may_have_run=status >= 500 and not request.idempotent,
        _backoff_seconds=_BACKOFF_BASE_SECONDS if request.idempotent and status in (502, 503, 504) else None,
    )


def _next_request(response: _Response) -> _Request:
    """The request to send next, if the answer is a redirect that may be followed (RFC 9110 §15.4).

    Raises:
        GatewayError: the answer is anything else: the error for its status.
    """
    request, location = response.request, response.headers.get("Location", "")
    if request.to_gateway or request.method != "GET" or response.status not in (301, 302, 303, 307, 308):
        raise _status_error(response)
    location = quote(location.encode("latin-1"), safe=_URL_CHARACTERS)  # `http.client` gives bytes as latin-1
    try:
        origin, target = _split_url(urljoin(f"{request.origin}{request.target}", location))
        if request.origin.startswith("https:") and origin.startswith("http:"):
            raise ValueError("leads from https to http")
        if not location:
            raise ValueError("is missing")
    except ValueError as error:
        raise GatewayError(f"{request} answered {response.status}, but its Location {error}.") from None
    return replace(request, origin=origin, target=target)


# --- Transport ------------------------------------------------------------------------------------


def _retry_delay(error: GatewayError, attempt: int, max_retries: int) -> float | None:
    """Seconds before the request that failed like this is sent again; None if it must not be."""
    if error._backoff_seconds is None or attempt > max_retries:
        return None
    if error.retry_after is not None:
        return error.retry_after if error.retry_after <= _RETRY_AFTER_CAP_SECONDS else None
    doublings = min(attempt - 1, 100)  # 2.0**1024 overflows
    return random.uniform(0, min(_BACKOFF_CAP_SECONDS, error._backoff_seconds * 2**doublings))


class _Transport:
    """Sends requests: the one place that retries. It knows HTTP, and nothing of prefabs."""

    def __init__(self, credential: dict[str, str], max_retries: int, tls: SSLContext | None) -> None:
        self.credential = credential  # one header, or none for the allow-list
        self.token_request: _Request | None = None  # exchanges the API key for a new token
        self.pool = _Pool()
        self.process_id = os.getpid()  # where it was made
        self.identity = os.urandom(16)  # the same for its copies in other processes
        self._max_retries = max_retries
        self._given_tls = self._tls = tls
        self._locks: dict[int, threading.Lock] = {}  # by process id: a lock held during a fork stays held in the child
        self._renewal_error: GatewayError | None = None  # of the last exchange that failed

    def __getstate__(self) -> _Json:
        if self._given_tls:
            raise _NotPicklableError("A client with an ssl_context cannot be pickled; SSL_CERT_FILE may do.")
        return {**self.__dict__, "pool": _Pool(), "_tls": None, "_locks": {}}

    def send(self, request: _Request, read: Callable[[_Response], _T]) -> _T:
        """What `read` makes of the 2xx answer to `request`, after as many attempts as are allowed."""
        authenticated = request.to_gateway and request is not self.token_request
        may_renew = authenticated and self.token_request is not None
        attempt = 1
        while True:
            credential = self.credential
            if authenticated:
                request.headers.update(credential)
            try:
                return self._attempt(request, attempt, read)
            except GatewayError as error:
                refused = error.status_code == 401 and may_renew
                delay = 0.0 if refused else _retry_delay(error, attempt, self._max_retries)
                if delay is None:
                    raise
                _log("%s; it is sent again in %.1f s", error.message, delay)
            if refused:
                may_renew = False  # a second refusal is final
                self.renew_token(credential)
            else:
                attempt += 1
                time.sleep(delay)

    def renew_token(self, refused: dict[str, str]) -> None:
        """Exchanges the API key for a new token, unless another thread has done so meanwhile.

        If that thread's exchange failed, this one's fails with it, and does not wait for one of its own.
        """
        error_before = self._renewal_error
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            if self.token_request is None or self.credential is not refused:
                return
            if self._renewal_error and self._renewal_error is not error_before:
                raise copy.copy(self._renewal_error)
            try:
                read = partial(_read_json, kind=dict, fields={"internal_token": str})
                token = self.send(self.token_request, read)["internal_token"]
                if not _is_header_value(token):
                    raise GatewayError("The gateway's internal_token has characters that no header can carry.")
            except GatewayError as error:
                self._renewal_error = copy.copy(error)  # the copy has no traceback, which would keep much alive
                raise
            self.credential = {"X-Internal-Token": token}

    def _attempt(self, request: _Request, attempt: int, read: Callable[[_Response], _T]) -> _T:
        for _ in range(1 + _MAX_REDIRECTS):
            started = time.perf_counter()
            connection = self.pool.acquire(request.origin) if attempt == 1 else None  # a retry takes a new one
            if connection is None:
                connection = self._connect(request)
            response = _Response(request, connection, self.pool)
            try:
                response.begin(connection.send(request))
                if response.status < 300:
                    encoding = response.headers.get("Content-Encoding", "").strip().lower()
                    if request.to_gateway and encoding not in ("", "identity"):  # a file may have been stored so
                        raise _unexpected_response(response, f"the body is in {encoding}, which was not asked for")
                    return read(response)
                request = _next_request(response)
            except BaseException:
                response.close()
                raise
            finally:
                milliseconds = 1000 * (time.perf_counter() - started)
                _log("%s %s %.0f ms, attempt %d", response.request, response.status, milliseconds, attempt)
            response.close()
        raise GatewayError(f"{request}: more than {_MAX_REDIRECTS} redirects")

    def _connect(self, request: _Request) -> _Connection:
        proxy = _proxy_for(request.origin)
        if proxy:
            authorization = _proxy_headers(proxy).get("Proxy-Authorization", "")
            request.secrets += (authorization.partition(" ")[2], unquote(proxy.password or ""))
        https = request.origin.startswith("https:")
        try:
            if https and not self._tls:
                import ssl  # there are Pythons without it; they can do http

                self._tls = ssl.create_default_context()  # dear: once a client
            return _Connection(request.origin, request.timeout, self._tls if https else None, proxy)
        except ImportError as error:
            raise GatewayError("https needs Python's ssl module, which is missing here.") from error
        except (*_WIRE_FAULTS, ValueError) as error:  # a host or a port that there cannot be
            doing = f"no connection to {request.origin}"
            if proxy:
                doing += f" through the proxy {proxy.netloc.rpartition('@')[2]}"
            raise _wire_error(request, error, doing, connected=False)


# --- Event stream ---------------------------------------------------------------------------------

_decode_json = json.JSONDecoder().raw_decode


def _decode_data(text: str) -> Any:
    """The JSON of an event's data, by `raw_decode`: `json.loads` takes twice as long."""
    if text == "[DONE]":
        return {"type": "done", "data": text}
    text = text.strip(" \t\n\r")
    value, end = _decode_json(text)
    if end != len(text):
        raise ValueError("text behind the JSON")
    return value


def _make_event(value: Any, name: str = "") -> StreamEvent:
    """The event of decoded data. Its type is the data's `type`, or else `name`, the `event:` field."""
    if isinstance(value, dict) and "type" in value:
        return StreamEvent.from_dict(value)
    raw = value if isinstance(value, dict) else {"type": name or "content", "data": value}
    return StreamEvent(_EVENT_TYPES.get(name, StreamEventType.CONTENT), value, raw)


def _simple_event(block: str) -> StreamEvent | None:
    """The event of a block that is one `data:` line with an object, as nearly all are; else None.

    This short way takes half the time of `_block_events`.
    """
    if not block.startswith("data: {") or "\n" in block:
        return None
    try:
        value, end = _decode_json(block, 6)
    except (ValueError, RecursionError):
        return None
    return _make_event(value) if end == len(block) else None


def _block_events(block: str, *, whole: bool = True) -> list[StreamEvent]:
    """The events of the lines between two blank lines: one, or none if there is no data.

    Some servers leave out the blank lines: if the data is not JSON, but each of its lines is, each is an
    event. Data that is not JSON at all is the text of an event, unless the block may be cut short (not `whole`).
    """
    name, lines = "", []
    for line in block.split("\n"):
        field, _, value = line.partition(":")
        if field == "data":
            lines.append(value.removeprefix(" "))
        elif field == "event":
            name = value.removeprefix(" ")
    data = "\n".join(lines)
    if not data:
        return []
    for candidates in ([data], lines):
        try:
            return [_make_event(_decode_data(candidate), name) for candidate in candidates]
        except (ValueError, RecursionError):
            continue
    return [_make_event(data, name)] if whole else []


def _parse_events(chunks: Iterable[bytes], *, framed: bool = True) -> Iterator[StreamEvent]:
    """The events of a stream (WHATWG HTML §9.2.6), each as soon as its blank line has arrived.

    `framed`: HTTP says where the stream ends. If not, its end may be a break, and half an event is dropped.
    """
    pending, last = [b""], b""  # pieces are joined once per block: a large event may come in thousands
    after_cr = False
    codec = "utf-8-sig"  # of the first block, in front of which a byte order mark may stand
    for chunk in filter(None, chunks):
        ends_with_cr = chunk.endswith(b"\r")
        if after_cr:
            chunk = chunk.removeprefix(b"\n")
        after_cr = ends_with_cr
        if b"\r" in chunk:  # one at the end of the chunk ends its line at once, too: its LF may never come
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        pending.append(chunk)
        blank = b"\n\n" in chunk or last + chunk[:1] == b"\n\n"
        last = chunk[-1:] or last
        if blank:
            *blocks, begun = b"".join(pending).split(b"\n\n")
            pending = [begun]
            for block in blocks:
                text, codec = block.decode(codec, "replace"), "utf-8"
                event = _simple_event(text)
                if event:
                    yield event
                else:
                    yield from _block_events(text)
    yield from _block_events(b"".join(pending).decode(codec, "replace"), whole=framed)


class EventStream(Iterator[StreamEvent]):
    """The events of one call, each handed over as it arrives: an iterator and a context manager.

    `close()`, the end of a `with` and garbage collection end the stream and free its connection. One
    thread reads it; any may close it, and so may a signal handler: a loop that waits for an event then
    ends. An `error` event is yielded, not raised.

    Raises (from iterating):
        ServiceUnavailableError: the connection broke: the stream is not complete.
        GatewayTimeoutError: nothing came for `timeout` seconds.
        GatewayError: it was read on after it failed, or after it was closed before its end.
    """

    def __init__(self, events: Iterator[StreamEvent], response: _Response) -> None:
        self._events = events
        self._response = response
        self._ended = False
        self._unreadable: str | None = None  # why there are no more events although the end was not reached

    def __next__(self) -> StreamEvent:
        if self._unreadable:
            raise GatewayError(f"This stream {self._unreadable}. What came before is not all there is.")
        try:
            return next(self._events)
        except StopIteration:
            self._ended = True
            raise
        except BaseException as error:
            if self._unreadable and isinstance(error, GatewayError):  # it was closed while this thread waited
                raise StopIteration from None
            self._unreadable = f"cannot be read on, since it failed: {error}"
            raise

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream, also for another thread that waits for an event. May be called twice."""
        if not self._ended and not self._unreadable:
            self._unreadable = "was closed before its end"
        self._response.close()


def _read_events(response: _Response) -> Iterator[StreamEvent]:
    """The events of an answer.

    Raises:
        ServiceUnavailableError: the connection broke before `done` or `error`, or the stream ended
            without them where a break would look just like the end.
    """
    saw_end = last_was_end = False
    done, error = StreamEventType.DONE, StreamEventType.ERROR
    try:
        for event in _parse_events(response.chunks(), framed=response.framed):
            last_was_end = event.type is done or event.type is error
            saw_end = saw_end or last_was_end
            if event.type is done:
                response.wait_at_most(min(response.request.timeout or _AFTER_DONE_SECONDS, _AFTER_DONE_SECONDS))
            yield event
    except ServiceUnavailableError:
        if not last_was_end:
            raise
    if not saw_end and not response.framed:
        raise _wire_error(response.request, EOFError("no done or error event"), "the stream was cut short")


def _result_of_events(response: _Response) -> PrefabResult:
    """The result of a streaming function that was called without `stream=True`."""
    contents: list[Any] = []
    error: _Json | None = None
    done_data: Any = None
    try:
        for event in _read_events(response):
            if event.type is StreamEventType.CONTENT:
                contents.append(event.data)
            elif event.type is StreamEventType.ERROR:
                error = _event_error(event)
            elif event.type is StreamEventType.DONE and event.data != "[DONE]":
                done_data = event.data
    except ServiceUnavailableError as broken:
        broken.details["partial_output"] = contents  # which was paid for
        raise
    files = done_data.pop("files", None) if isinstance(done_data, dict) else None
    value: Any = contents
    if not contents and done_data:
        value = done_data
    elif all(isinstance(content, str) for content in contents):
        value = "".join(contents)
    status = CallStatus.FAILED if error else CallStatus.SUCCESS
    return PrefabResult(status, {"status": str(status), "output": value, "files": files}, error)


def _read_results(response: _Response, count: int = 1) -> list[PrefabResult]:
    """The results of a run request with `count` calls."""
    if response.headers.get_content_type() == "text/event-stream":
        return [_result_of_events(response)] * count
    answer = _read_json(response, dict, {"results": list})
    entries = answer["results"]
    if len(entries) != count or not all(isinstance(entry, dict) for entry in entries):
        raise _unexpected_response(response, f"'results' is not a list of {count} objects")
    return [PrefabResult._from_dict(entry, answer.get("job_id")) for entry in entries]


def _read_stream(response: _Response) -> EventStream:
    """The events of a run request, also of a function that does not stream."""
    if response.headers.get_content_type() == "text/event-stream":
        return EventStream(_read_events(response), response)
    result = _read_results(response)[0]
    if result.is_success():
        events = [{"type": "content", "data": result.get_result()}, {"type": "done", "data": None}]
    else:
        events = [{"type": "error", "data": result.error or {"message": f"It ended as {result.status}."}}]
    return EventStream(map(StreamEvent.from_dict, events), response)


def _read_prefabs(response: _Response) -> list[PrefabInfo]:
    """The entries of the directory."""
    entries = _read_json(response, list)
    for entry in entries:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("id", "version")):
            raise _unexpected_response(response, "an entry lacks its id or version")
    return [PrefabInfo._from_dict(entry) for entry in entries]


# --- Files ----------------------------------------------------------------------------------------


def _file_name(path: _Path) -> str:
    """The last part of a path. Bytes in it that are not UTF-8 are replaced, so that it can be sent."""
    return os.fsencode(os.path.basename(path)).decode("utf-8", "replace")


def _open_file(path: _Path) -> io.BufferedReader:
    is_path = isinstance(path, (str, os.PathLike))
    _require(is_path, f"The path of a file is needed, not {_shown(path)}: save the contents in a file first.")
    regular = os.path.isfile(path) or not os.path.exists(path)
    _require(regular, f"{path} is not a regular file, so its length is not known beforehand.")
    file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    if os.fstat(file.fileno()).st_size == 0 and file.read(1):  # as in /proc
        file.close()
        raise ValidationError(f"{path} says that it is empty, but is not: copy it into a regular file first.")
    return file


def _multipart(fields: Mapping[str, str], path: _Path) -> tuple[str, bytes, bytes]:
    """Content type of `fields`, then a file, as `multipart/form-data`, and what stands around the file.

    File names go out as browsers send them: UTF-8, quotes and line breaks percent-encoded (RFC 7578).
    """
    import mimetypes  # reads the system's tables: for uploads only

    boundary, name = os.urandom(16).hex(), _file_name(path)
    media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    name = re.sub(r'["\r\n]', lambda found: f"%{ord(found[0]):02X}", name)
    part = f"--{boundary}\r\nContent-Disposition: form-data; name="
    head = "".join(f'{part}"{key}"\r\n\r\n{value}\r\n' for key, value in fields.items())
    head += f'{part}"file"; filename="{name}"\r\nContent-Type: {media_type}\r\n\r\n'
    tail = f"\r\n--{boundary}--\r\n"
    return f"multipart/form-data; boundary={boundary}", head.encode(errors="replace"), tail.encode()


@contextmanager
def _replacement(target: str) -> Iterator[io.BufferedWriter]:
    """A new file that takes the target's place if all goes well, and is gone if not. Errors name the target."""
    with suppress(FileNotFoundError):
        os.lstat(target)  # fails early for a name that is too long; a missing file is fine
    folder = os.path.dirname(target)  # one that is missing is made at the end, when there is something for it
    while not os.path.exists(folder) and folder != os.path.dirname(folder):  # a missing drive is its own parent
        folder = os.path.dirname(folder)
    path = os.path.join(folder, f".{os.urandom(16).hex()}.part")
    try:
        with open(path, "xb") as file:
            yield file
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(path, target)
    except OSError as error:
        if error.filename == path:
            raise OSError(error.errno, error.strerror, target) from error
        raise
    finally:
        with suppress(OSError):  # it was renamed
            os.unlink(path)


def _receive(request: _Request, file: io.BufferedWriter, on_progress: _Progress, response: _Response) -> None:
    """Writes an answer where the last one ended, and has `request` ask for what is then missing."""
    if response.status not in (200, 206) or not response.framed:
        raise _unexpected_response(response, "without a whole file, or without its length")
    etag = response.headers.get("ETag", "")
    if response.status == 200:  # the object from its beginning
        request.headers.clear()
        request.object_size = response.length
        file.seek(0)
        file.truncate()
    done, total = file.tell(), response.length
    if response.status == 206:
        found = re.fullmatch(rf"bytes {done}-\d+/(\d{{1,18}})", response.headers.get("Content-Range", ""))
        total = int(found[1]) if found else None
        changed = request.object_size not in (None, total) or etag != request.headers.get("If-Range")
        if not total or changed:
            request.headers.clear()  # asks for the whole object
            raise _wire_error(request, EOFError("the object changed in between"), "the download broke off")
    try:
        on_progress(done, total)
        for chunk in response.chunks():
            file.write(chunk)
            done += len(chunk)
            on_progress(done, total)
    finally:
        if etag.startswith('"'):  # If-Range needs a strong one (RFC 9110 §13.1.5)
            request.headers.update({"Range": f"bytes={done}-", "If-Range": etag})
    if total not in (None, done):
        raise _wire_error(request, EOFError(f"only {done} of {total} bytes came"), "the download broke off")


# --- Batches --------------------------------------------------------------------------------------

_worker_transports: dict[bytes, _Transport] = {}  # in a worker process, of the clients whose calls it ran last


def _run_one(transport: _Transport, request: _Request) -> PrefabResult:
    """Sends one call of a batch. Picklable, as are its arguments, so that any executor can run it."""
    if transport.process_id != os.getpid():  # the calls of one client share connections and token here, too
        transport = _worker_transports.setdefault(transport.identity, transport)
        for identity in list(_worker_transports)[:-_MAX_WORKER_TRANSPORTS]:
            _worker_transports.pop(identity, None)
    try:
        return transport.send(request, _read_results)[0]
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the other results
        return PrefabResult._from_exception(error)


class _Batch:
    """Single calls on their way, in threads or on an executor. Each arrives in a queue once, with its result."""

    def __init__(self, transport: _Transport, requests: Iterable[_Request], executor: Executor | None) -> None:
        self._transport = transport
        self._executor = executor
        self._waiting = deque(enumerate(requests))  # the only reference: memory is freed as calls are sent
        self._futures: dict[int, Future[PrefabResult]] = {}
        self._arrived: list[tuple[int, PrefabResult]] = []  # TEMPORARY: nothing is ever taken out of it
        self._doorbell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._refused: GatewayError | None = None

    def run(self, max_workers: int, on_result: Callable[[int, PrefabResult], object]) -> list[PrefabResult]:
        """The results, in order. Raises the 401 if that is all there is."""
        count = len(self._waiting)
        results: dict[int, PrefabResult] = {}
        try:
            if self._executor:
                self._work()
            else:
                self._start_threads(min(max_workers, count))
            while len(results) < count:
                self._doorbell.get()
                index, result = self._arrived[len(results)]
                results[index] = result
                on_result(index, result)
        except BaseException as error:
            self._waiting.clear()  # at once and in one step, whatever interrupts what follows
            arrived = self._arrived[len(results):]
            self._cancel_futures()
            if isinstance(error, KeyboardInterrupt):
                for index, result in arrived:  # they were paid for
                    on_result(index, result)
            raise
        errors = [result.exception for result in results.values()]
        if self._refused and all(error and not error.may_have_run for error in errors):
            raise self._refused
        return [results[index] for index in range(count)]

    def _start_threads(self, count: int) -> None:
        for _ in range(count):
            try:  # daemons, so that Ctrl-C does not wait for their answers
                threading.Thread(target=self._work, daemon=True).start()
            except RuntimeError:  # no more threads can be started: this one does the work
                self._work()

    def _work(self) -> None:
        """Sends or submits what waits. After a 401 the rest gets a result that says that it was not sent."""
        while self._waiting:
            try:
                index, request = self._waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            if self._refused:
                self._arrive(index, self._unsent())
            elif self._executor:
                self._submit(self._executor, index, request)
            else:
                self._arrive(index, _run_one(self._transport, request))

    def _submit(self, executor: Executor, index: int, request: _Request) -> None:
        try:
            future = executor.submit(_run_one, self._transport, request)
        except Exception as error:  # noqa: BLE001 - a broken executor must not cost the other results
            unsent = ServiceUnavailableError(f"Not sent: the executor did not take it: {error}")
            self._arrive(index, PrefabResult._from_exception(unsent))
        else:
            self._futures[index] = future
            future.add_done_callback(partial(self._finish, index))

    def _finish(self, index: int, future: Future[PrefabResult]) -> None:
        self._futures.pop(index)  # a cluster may run a call again as long as somebody holds its future
        try:
            result = future.result()
            if not isinstance(result, PrefabResult):
                raise TypeError(f"the executor gave {_shown(result)}")
        except BaseException as error:  # noqa: BLE001 - each call must arrive, or the batch would wait for ever
            result = self._unsent() if future.cancelled() else PrefabResult._from_exception(error)
        self._arrive(index, result)

    def _unsent(self) -> PrefabResult:
        error: GatewayError = ServiceUnavailableError("Not sent: the executor cancelled it.")
        if self._refused:
            error = AuthenticationError("Not sent: the credential of an earlier call was refused.")
        return PrefabResult._from_exception(error)

    def _arrive(self, index: int, result: PrefabResult) -> None:
        if result.exception and result.exception.status_code == 401:
            self._refused = result.exception
            self._cancel_futures()
        self._arrived.append((index, result))
        self._doorbell.put(None)

    def _cancel_futures(self) -> None:
        for future in list(self._futures.values()):
            future.cancel()


# --- Client ---------------------------------------------------------------------------------------


def _version_key(version: str) -> tuple[Any, ...]:
    """Sorts versions by their numbers: 1.10.0 after 1.9.0, and 1.0.0-rc.1 before 1.0.0."""
    release, _, candidate = version.partition("-")
    numbers = [int(digits[:99]) for digits in re.findall("[0-9]+", release)]
    candidate_numbers = [int(digits[:99]) for digits in re.findall("[0-9]+", candidate)]
    return numbers, not candidate, re.sub("[0-9]+", "", candidate), candidate_numbers


def _pages(list_page: Callable[[int, Any], _Json], page_size: int) -> Iterator[_Json]:
    token = None
    while True:
        page = list_page(page_size, token)
        yield from page["files"]
        previous, token = token, page.get("next_token")
        if not token:
            return
        if token == previous:
            raise GatewayError("The gateway gave the same next_token twice: the pages have no end.")


@dataclass(eq=False)
class Prefab:
    """A version of a prefab. Any function is a method: `llm.chat(...)` is `llm.call("chat", ...)`."""

    _client: GatewayClient = field(repr=False)
    prefab_id: str
    version: str

    def call(self, function_name: str, /, *, files: _Files | None = None, **parameters: Any) -> PrefabResult:
        """Runs a function: see `GatewayClient.run`."""
        return self._client.run(self.prefab_id, self.version, function_name, parameters, files)

    def stream(self, function_name: str, /, *, files: _Files | None = None, **parameters: Any) -> EventStream:
        """Runs a function and gives its events: see `GatewayClient.run`."""
        return self._client.run(self.prefab_id, self.version, function_name, parameters, files, stream=True)

    def __getattr__(self, name: str) -> Callable[..., PrefabResult]:
        if name.startswith("_"):  # copy, pickle and debuggers ask for those
            raise AttributeError(name)

        def function(*values: Any, **parameters: Any) -> PrefabResult:
            _require(not values, f"{name}() takes its parameters by name, as in {name}(text=...).")
            return self.call(name, **parameters)

        return function


class GatewayClient:
    """A client of one gateway. Threads can share it; it can be pickled, and used after a fork.

    Args:
        base_url: http(s), path prefix included; None: `GATEWAY_BASE_URL`, else `DEFAULT_BASE_URL`.
        api_key: Sent as such; `from_api_key` exchanges one.
        jwt_token: With or without `Bearer `.
        timeout: Seconds for connecting and for each wait for bytes; None waits for ever. A call's own
            counts instead, unless it is None.
        internal_token: What the gateway gave to an agent or a prefab. Without any credential, it must
            have this machine's address on its allow-list.
        max_retries: How often a request is sent again, if that can do no harm.
        ssl_context: For https; None trusts what the system does, or `SSL_CERT_FILE`.

    `on_progress` is called with the bytes done and the bytes in all (None: unknown), from 0 on; an
    upload that is sent again starts over.

    Raises (every method that sends):
        ValidationError, OSError: an argument or a file cannot be used; nothing was sent.
        AuthenticationError, ServiceUnavailableError (no answer, or a 5xx), GatewayTimeoutError.
        AgentContextRequiredError: a file operation but `upload_input_file`, without an agent's token.
        GatewayError: any other unexpected answer.
    """

    def __init__(self, base_url: str | None = None, api_key: str | None = None, jwt_token: str | None = None,
                 timeout: float | None = 60, *, internal_token: str | None = None, max_retries: int = 2,
                 ssl_context: SSLContext | None = None) -> None:
        if base_url is None:
            base_url = os.environ.get("GATEWAY_BASE_URL") or DEFAULT_BASE_URL
        base_url = str(base_url).strip()  # blanks from copy and paste
        try:
            self._origin, target = _split_url(base_url)
        except ValueError as error:
            message = f"base_url (or else GATEWAY_BASE_URL) {error}. A token goes into internal_token=."
            raise ValidationError(message) from None
        wrong = re.search(r"[?#\s\0-\x1f]", base_url)
        _require(not wrong, "base_url must not have a query, a fragment or blanks in it.")
        _require_timeout(timeout)
        _require_number("max_retries", max_retries, above=-1)
        _require(ssl_context is None or hasattr(ssl_context, "wrap_socket"), "ssl_context must be an SSLContext.")
        credentials = {"X-Internal-Token": internal_token, "X-API-Key": api_key, "Authorization": jwt_token}
        headers = {name: value for name, value in credentials.items() if value is not None}
        _require(len(headers) < 2, f"Give one credential, not {' and '.join(headers)}: who is the client?")
        for name, value in headers.items():
            _require_header_value(f"The credential ({name})", value)
        if jwt_token:
            without_scheme = re.sub("^bearer +", "", jwt_token.strip(), flags=re.IGNORECASE)
            headers["Authorization"] = f"Bearer {without_scheme}"
        self._prefix = target.rstrip("/")
        self._run_path = "/v1/run" if api_key or jwt_token else "/v1/internal/run"
        self._secrets: tuple[str, ...] = ()
        self._transport = _Transport(headers, max_retries, ssl_context)
        self.timeout = timeout

    @classmethod
    def from_api_key(cls: type[_Client], api_key: str, base_url: str | None = None, timeout: float | None = 60, *,
                     max_retries: int = 2, ssl_context: SSLContext | None = None) -> _Client:
        """A client with the token that the gateway gives for an API key, now and when it expires.

        `POST /v1/auth/convert_to_internal_token`
        """
        _require_header_value("api_key", api_key)
        client = cls(base_url, timeout=timeout, max_retries=max_retries, ssl_context=ssl_context)
        client._secrets = (api_key,)
        client._transport.token_request = client._request(
            "POST", "/v1/auth/convert_to_internal_token", headers={"Authorization": f"Bearer {api_key}"},
            idempotent=True, answers_secret=True,
        )
        try:
            client._transport.renew_token(client._transport.credential)
        except BaseException:
            client.close()  # the traceback of an error that is kept would keep its connection open
            raise
        return client

    @classmethod
    def from_env(cls: type[_Client], **options: Any) -> _Client:
        """A client with the environment's credential: `X_INTERNAL_TOKEN`, `AGENT_BUILDER_API_KEY`
        (which is exchanged), `GATEWAY_JWT_TOKEN`, or none; two are an error.

        `options` are `base_url`, `timeout`, `max_retries` and `ssl_context`.
        """
        names = ("X_INTERNAL_TOKEN", "AGENT_BUILDER_API_KEY", "GATEWAY_JWT_TOKEN")
        given = {name: os.environ[name] for name in names if os.environ.get(name)}
        _require(len(given) < 2, f"Set one credential, not {' and '.join(given)}: who is the client?")
        if "AGENT_BUILDER_API_KEY" in given:
            return cls.from_api_key(given["AGENT_BUILDER_API_KEY"], **options)
        return cls(internal_token=given.get("X_INTERNAL_TOKEN"), jwt_token=given.get("GATEWAY_JWT_TOKEN"), **options)

    @property
    def base_url(self) -> str:
        """The gateway's address. It can't be changed: another gateway needs another client."""
        return f"{self._origin}{self._prefix}"

    def __repr__(self) -> str:
        return f"GatewayClient({self.base_url!r}, {next(iter(self._transport.credential), 'allow-list')})"

    def __enter__(self: _Client) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the idle connections. May be called twice."""
        self._transport.pool.close()

    # Running

    @overload
    def run(self, prefab_id: str, version: str, function_name: str, parameters: _Json | None = None,
            files: _Files | None = None, stream: Literal[False] = False, *,
            timeout: float | None = None) -> PrefabResult: ...

    @overload
    def run(self, prefab_id: str, version: str, function_name: str, parameters: _Json | None = None,
            files: _Files | None = None, *, stream: Literal[True], timeout: float | None = None) -> EventStream: ...

    @overload
    def run(self, prefab_id: str, version: str, function_name: str, parameters: _Json | None,
            files: _Files | None, stream: Literal[True], *, timeout: float | None = None) -> EventStream: ...

    @overload
    def run(self, prefab_id: str, version: str, function_name: str, parameters: _Json | None = None,
            files: _Files | None = None, stream: bool = False, *,
            timeout: float | None = None) -> PrefabResult | EventStream: ...

    def run(self, prefab_id: str, version: str, function_name: str, parameters: _Json | None = None,
            files: _Files | None = None, stream: bool = False, *,
            timeout: float | None = None) -> PrefabResult | EventStream:
        """Runs a function. `POST /v1/internal/run`, or `POST /v1/run` with an API key or a JWT.

        Args:
            files: An input's name to a list of `s3://` URLs.
            stream: Gives the events as they come, and not the result at the end.

        Returns:
            The result, also of a function that failed: see `is_success()`; or the events.

        Raises:
            PrefabNotFoundError, MissingSecretError, QuotaExceededError: nothing ran.
            ServiceUnavailableError: it may have run if `may_have_run`; it was sent once at most.
        """
        request = self._run_request([PrefabCall(prefab_id, version, function_name, parameters, files)], timeout)
        if stream:
            return self._transport.send(request, _read_stream)
        return self._transport.send(request, _read_results)[0]

    def run_batch(self, calls: Iterable[PrefabCall], *, max_workers: int = 8, timeout: float | None = None,
                  on_result: Callable[[int, PrefabResult], object] | None = None,
                  executor: Executor | None = None, single_request: bool = False) -> BatchResult:
        """Runs calls side by side, each a request like that of `run`, so that none costs another's result.

        Args:
            calls: Read and checked whole before anything is sent.
            max_workers: Calls at a time, in threads.
            on_result: Called in this thread with index and result, as each comes. If it raises, nothing
                more is sent.
            executor: Runs the calls instead of threads: a process pool, a cluster.
            single_request: Sends one POST instead, whose calls the gateway runs one after another, and
                fails as a whole with the first bad one.

        Returns:
            The results in the order of the calls; one that raised is FAILED and has `exception`. Only
            a 401 is raised, if no call has a result; nothing is sent after it.
        """
        calls, report = list(calls), on_result or _ignore
        _require_number("max_workers", max_workers)
        _require(executor is None or hasattr(executor, "submit"), "executor must be an Executor.")
        _require(not (single_request and executor), "A single request cannot have an executor.")
        _require(callable(report), "on_result must be a function.")
        if single_request and calls:
            read = partial(_read_results, count=len(calls))
            results = self._transport.send(self._run_request(calls, timeout), read)
            for index, result in enumerate(results):
                report(index, result)
            return BatchResult._from_results(results, results[0].job_id)
        batch = _Batch(self._transport, (self._run_request([call], timeout) for call in calls), executor)
        return BatchResult._from_results(batch.run(max_workers, report), None)

    def _run_request(self, calls: Sequence[PrefabCall], timeout: float | None) -> _Request:
        for call in calls:
            _require_call(call)
        subject = {"prefab_id": calls[0].prefab_id, "version": calls[0].version} if len(calls) == 1 else {}
        content = {"calls": [call.to_dict() for call in calls]}
        try:
            return self._request("POST", self._run_path, content=content, timeout=timeout, subject=subject)
        except ValidationError:
            for call in calls:
                _encode(call.parameters)  # the path in this error begins with the user's own parameter
            raise

    def prefab(self, prefab_id: str, version: str) -> Prefab:
        """A prefab whose functions are called like methods. Nothing is sent."""
        return Prefab(self, prefab_id, version)

    def list_prefabs(self, status: str | None = None) -> list[PrefabInfo]:
        """The directory, newest first: all, or those `"deployed"` or `"failed"`. `GET /v1/prefabs`"""
        request = self._request("GET", "/v1/prefabs", {"status": status}, subject={})
        return self._transport.send(request, _read_prefabs)

    def get_prefab_spec(self, prefab_id: str, version: str | None = None) -> _Json:
        """A prefab's functions. `GET /v1/prefabs/{prefab_id}/{version}/spec`

        Without `version`, those of the newest; of a failed one only if there is no other.
        """
        path = _segments(prefab_id)
        if version is None:
            found = [prefab for prefab in self.list_prefabs() if prefab.prefab_id == prefab_id]
            if not found:
                message = f"The gateway's directory has no prefab {prefab_id!r}. {PrefabNotFoundError._remedy}"
                raise PrefabNotFoundError(prefab_id, "latest", message)
            version = max(found, key=lambda prefab: (prefab.status != "failed", _version_key(prefab.version))).version
        subject = {"prefab_id": prefab_id, "version": version}
        return self._fetch("GET", f"/v1/prefabs/{path}/{_segments(version)}/spec", subject=subject)

    # Secrets

    def set_secret(self, prefab_id: str, secret_name: str, secret_value: str) -> None:
        """Stores a secret of yours for a prefab. `POST /v1/secrets`"""
        _require_text(prefab_id=prefab_id, secret_name=secret_name)
        _require(isinstance(secret_value, str) and secret_value, "secret_value must be a string that is not empty.")
        content = {"prefab_id": prefab_id, "secret_name": secret_name, "secret_value": secret_value}
        request = self._request("POST", "/v1/secrets", content=content, secrets=(secret_value,))
        self._transport.send(request, _Response.read_all)

    def delete_secret(self, prefab_id: str, secret_name: str) -> None:
        """Deletes a secret of yours. `DELETE /v1/secrets/{prefab_id}/{secret_name}`"""
        request = self._request("DELETE", f"/v1/secrets/{_segments(prefab_id, secret_name)}")
        self._transport.send(request, _Response.read_all)

    def list_secrets(self, prefab_id: str | None = None) -> list[dict[str, str]]:
        """Your secrets, as `{"prefab_id", "secret_name"}`. `GET /v1/secrets[/{prefab_id}]`"""
        if prefab_id is None:
            return list(self._fetch("GET", "/v1/secrets", expect={"secrets": list})["secrets"])
        answer = self._fetch("GET", f"/v1/secrets/{_segments(prefab_id)}", expect={"secret_names": list})
        return [{"prefab_id": prefab_id, "secret_name": name} for name in answer["secret_names"]]

    # Files

    def upload_input_file(self, file_path: _Path, content_type: str | None = None, *,
                          on_progress: _Progress | None = None) -> str:
        """Uploads an input of a call, of a type such as `"video/mp4"`, and gives its `s3://` URL.

        `POST /internal/files/generate_upload_url`, then a presigned PUT straight to the storage.
        """
        headers = {}
        if content_type is not None:  # it is part of the signature, and so is its absence
            _require_header_value("content_type", content_type)
            headers["Content-Type"] = content_type
        with _open_file(file_path) as file:
            content = {"filename": _file_name(file_path), "content_type": content_type}
            answer = self._fetch("POST", "/internal/files/generate_upload_url", content=content, idempotent=True,
                                 expect={"upload_url": str, "s3_url": str})
            request = self._presigned("PUT", answer["upload_url"], headers=headers, file=file, on_progress=on_progress)
            self._transport.send(request, _Response.read_all)
        return str(answer["s3_url"])

    def upload_file(self, file_path: _Path, *, on_progress: _Progress | None = None) -> _Json:
        """Uploads a file to keep, and gives `{"success", "s3_url", "filename", "size"}`.

        `POST /internal/files/upload`
        """
        return self._upload("/internal/files/upload", {}, file_path, on_progress)

    def upload_temp_file(self, file_path: _Path, ttl: int = 86400, session_id: str | None = None, *,
                         on_progress: _Progress | None = None) -> _Json:
        """Uploads a file that goes after `ttl` seconds, or with its session: see `temp_session`.

        `POST /internal/files/upload_temp`; gives what `upload_file` does.
        """
        _require_number("ttl", ttl)
        session = {"session_id": session_id} if session_id else {}
        return self._upload("/internal/files/upload_temp", {"ttl": str(ttl), **session}, file_path, on_progress)

    def _upload(self, path: str, form: Mapping[str, str], file_path: _Path, on_progress: _Progress | None) -> _Json:
        with _open_file(file_path) as file:
            content_type, head, tail = _multipart(form, file_path)
            return self._fetch("POST", path, headers={"Content-Type": content_type}, body=head, file=file,
                               tail=tail, on_progress=on_progress, expect={"s3_url": str})

    def download_file(self, s3_url: str, local_path: _Path, mode: str = "presigned", *,
                      on_progress: _Progress | None = None) -> None:
        """Downloads a file straight from the storage; a transfer that breaks goes on where it was.

        `local_path` is the old file or the whole new one, never a part. Missing folders are made.
        """
        _require(mode == "presigned", f"mode must be 'presigned', not {_shown(mode)}.")
        target = os.path.realpath(local_path)
        can_be_made = os.path.basename(local_path) and not os.path.exists(target)
        _require(can_be_made or os.path.isfile(target), f"{target} is not a file: local_path needs the file's name.")
        request = self._presigned("GET", self.get_presigned_url(s3_url))
        with _replacement(target) as file:
            receive = partial(_receive, request, file, on_progress or _ignore)
            try:
                self._transport.send(request, receive)
            except GatewayError as error:
                if error.status_code != 416:
                    raise
                request.headers.clear()  # the object is shorter than what was received of it
                self._transport.send(request, receive)

    def get_presigned_url(self, s3_url: str, expires_in: int = 3600) -> str:
        """A URL that anyone can download from for `expires_in` seconds. `GET /internal/files/download`"""
        _require_s3_url("s3_url", s3_url, "a result's get_file_urls(), or list_files(),")
        _require_number("expires_in", expires_in)
        query = {"s3_url": s3_url, "mode": "presigned", "expires_in": expires_in}
        answer = self._fetch("GET", "/internal/files/download", query, expect={"presigned_url": str})
        return str(answer["presigned_url"])

    def list_files(self, limit: int = 100, continuation_token: str | None = None) -> _Json:
        """A page of the permanent files. `GET /internal/files/list`

        It is `{"files": [{"key", "size", "last_modified", "s3_url"}], "next_token"}`; the last page has
        no `next_token`, which is the `continuation_token` of the next one.
        """
        return self._list("list", limit, continuation_token)

    def list_temp_files(self, session_id: str | None = None, limit: int = 100,
                        continuation_token: str | None = None) -> _Json:
        """A page of the temporary files: see `list_files`. `GET /internal/files/list_temp`"""
        return self._list("list_temp", limit, continuation_token, session_id)

    def _list(self, name: str, limit: int, token: str | None, session_id: str | None = None) -> _Json:
        _require_number("limit", limit)
        query = {"limit": limit, "session_id": session_id, "continuation_token": token}
        return self._fetch("GET", f"/internal/files/{name}", query, expect={"files": list})

    def iter_files(self, page_size: int = 100) -> Iterator[_Json]:
        """The permanent files of all pages: see `list_files`."""
        return _pages(self.list_files, page_size)

    def iter_temp_files(self, session_id: str | None = None, page_size: int = 100) -> Iterator[_Json]:
        """The temporary files of all pages: see `list_files`."""
        return _pages(partial(self.list_temp_files, session_id), page_size)

    def cleanup_temp_files(self, session_id: str) -> int:
        """Deletes a session's temporary files, and counts them. `DELETE /internal/files/cleanup_temp`"""
        _require_text(session_id=session_id)
        query = {"session_id": session_id}
        answer = self._fetch("DELETE", "/internal/files/cleanup_temp", query, expect={"deleted_count": int})
        return int(answer["deleted_count"])

    @contextmanager
    def temp_session(self, session_id: str | None = None) -> Iterator[str]:
        """A session id for temporary files, which are deleted on the way out, error or not."""
        session_id = session_id or os.urandom(16).hex()
        try:
            yield session_id
        except BaseException:
            with suppress(GatewayError):  # the first error says more
                self.cleanup_temp_files(session_id)
            raise
        self.cleanup_temp_files(session_id)

    # What the endpoints are made of

    def _request(self, method: str, path: str, query: Mapping[str, Any] | None = None, *, content: Any = None,
                 timeout: float | None = None, secrets: tuple[str, ...] = (), **options: Any) -> _Request:
        """A request to the gateway. GET and DELETE may be repeated, others if they say so."""
        if content is not None:
            options.update(body=_encode(content), headers={"Content-Type": "application/json"})
        asked = {name: value for name, value in (query or {}).items() if value is not None}
        _encode(asked)  # refuses what UTF-8 does not have, with the same error as in a body
        encoded = urlencode(asked, quote_via=quote)
        target = f"{self._prefix}{path}?{encoded}" if encoded else f"{self._prefix}{path}"
        timeout = self.timeout if timeout is None else timeout
        _require_timeout(timeout)
        options.setdefault("idempotent", method != "POST")
        return _Request(method, self._origin, target, timeout, secrets=self._secrets + secrets, **options)

    def _presigned(self, method: str, url: str, **options: Any) -> _Request:
        """A request to the storage, which must not see the credential."""
        try:
            origin, target = _split_url(url)
        except ValueError as error:
            raise GatewayError(f"The URL that the gateway gave for a {method} {error}.") from None
        return _Request(method, origin, target, self.timeout, idempotent=True, to_gateway=False, **options)

    def _fetch(self, method: str, path: str, query: Mapping[str, Any] | None = None, *,
               expect: Mapping[str, type] = {}, **options: Any) -> _Json:
        """The JSON object that such a `_request` is answered with. `expect`: fields of it, and their types."""
        read = partial(_read_json, kind=dict, fields=expect)
        answer: _Json = self._transport.send(self._request(method, path, query, **options), read)
        return answer


# --- Command line ---------------------------------------------------------------------------------

# Control characters but tabs and line ends, and those that turn the direction of writing.
_CONTROLS = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_ESCAPES = {code: f"\\u{code:04x}" for code in _CONTROLS - set(b"\t\n\r")}
# How a text may begin that is not plain UTF-8, and the encoding that this tells.
_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
# What no name of a file should have: Windows refuses it, or a reader is misled by it.
_ODD_IN_NAMES = re.compile(r'[\0-\x1f\x7f-\x9f<>:"|?*\\\u202a-\u202e\u2066-\u2069\ud800-\udfff]')
_DEVICES = re.compile(r"(con|prn|aux|nul|con(in|out)\$|(com|lpt)[0-9\xb9\xb2\xb3]) *(\.|$)", re.I)
_CALL_FIELDS = ("prefab_id", "version", "function_name", "parameters", "files")


def _write_all(stream: Any, text: str) -> None:
    """Writes a text to stdout or stderr, whole and at once.

    It goes round the layers of `io`, which lose text where a pipe does not make its writers wait
    (those of node and asyncio), and try again at the end of Python what could not be written.
    """
    stream.flush()
    buffer = getattr(stream, "buffer", None)
    if buffer is None:  # a program that calls `main` has put something of its own there
        stream.write(text)
        return
    raw = getattr(buffer, "raw", buffer)
    rest = memoryview(text.encode(stream.encoding, "backslashreplace"))
    while rest:
        written = raw.write(rest)
        if written is None:
            import select

            select.select([], [raw], [])
        else:
            rest = rest[written:]


def _read_all(path: str) -> bytes:
    """A file, or stdin for `-`, also if that is a pipe that does not make its readers wait."""
    if path != "-":
        with open(path, "rb") as file:
            return file.read()
    raw = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    blocks = []
    while (block := raw.read(65536)) != b"":
        if block is None:
            import select

            select.select([raw], [], [])
        else:
            blocks.append(block)
    return b"".join(blocks)


def _to_json(document: Any, indent: int | None, ensure_ascii: bool) -> str:
    """The document as JSON, which has neither NaN nor infinities: null stands for them."""
    encode = partial(json.dumps, ensure_ascii=ensure_ascii)
    try:
        return encode(document, indent=indent, allow_nan=False)
    except ValueError:
        system: Any = sys
        if hasattr(sys, "set_int_max_str_digits"):  # it prints no integer that is longer, unasked
            system.set_int_max_str_digits(0)
        plain = json.loads(json.dumps(document), parse_constant=lambda _: None)
        return encode(plain, indent=indent)


def _clip(text: str, cells: int) -> str:
    """What a line of a terminal has room for. What is not ASCII may take two cells of it."""
    text = " ".join(text[:1000].splitlines()).expandtabs(1).translate(_ESCAPES)[:cells]
    while len(text) + sum(not character.isascii() for character in text) > cells:
        text = text[:-1]
    return text


class _Terminal:
    """Where a command prints, and what ends it early. `main` makes one and hands it on.

    Attributes:
        quiet: No progress is shown.
        signal: The number of the signal that asked the command to end; 0 while there is none.
        if_interrupted: What there is to say about the call, should a signal come now.
    """

    def __init__(self) -> None:
        self.quiet = False
        self.signal = 0
        self.if_interrupted = "no call was made"
        self._signalled = 0.0  # when that was
        self._wholes = 0  # how many `whole` are open, one in another
        self._overdue = False  # a signal came during one of them, and was not raised yet
        self._eraser = ""  # what wipes the bar off stderr; empty while there is none

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Signals that end programs raise KeyboardInterrupt, unless they are ignored (`nohup`)."""
        import signal

        before: dict[int, Any] = {}
        # Not every system has all of them.
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number: Any = getattr(signal, name, None)
            is_set = number and signal.getsignal(number) not in (signal.SIG_IGN, None)
            if is_set and threading.current_thread() is threading.main_thread():
                before[number] = signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self.signal:
            # The second one ends it at once. But a terminal that is closed sends SIGHUP twice, and
            # who starts a command may pass a Ctrl-C on to it that it gets anyway.
            if number != self.signal or now - self._signalled > 0.1:
                os._exit(128 + number)
            return
        self.signal, self._signalled = number, now
        if not self._wholes:
            raise KeyboardInterrupt
        self._overdue = True

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Keeps a signal from cutting what is done in it: the signal counts at its end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._wholes += 1
        try:
            yield
        finally:
            self._wholes -= 1
        if self._overdue and not self._wholes:
            self._overdue = False
            raise KeyboardInterrupt

    def finish(self) -> None:
        """The command is over: a signal that comes now is too late to change anything."""
        self._wholes += 1
        self.wipe()

    def print_text(self, text: str) -> None:
        """Prints on stdout. A terminal gets control characters as escapes."""
        self.wipe()
        if sys.stdout.isatty():
            text = text.translate(_ESCAPES)
        try:
            with self.whole():
                _write_all(sys.stdout, text)
        except OSError as error:
            # EINVAL: so Windows calls a pipe whose reader has gone.
            if os.name == "nt" and error.errno == 22:
                raise BrokenPipeError from error
            raise OSError(error.errno, error.strerror, "stdout") from error

    def print_json(self, document: Any, *, one_line: bool = False) -> None:
        """Prints a document. A terminal gets it indented, unless it is one line of many."""
        indent = 2 if sys.stdout.isatty() and not one_line else None
        # Escapes stand for what the terminal could not show.
        ensure_ascii = "utf" not in str(sys.stdout.encoding).lower()
        self.print_text(_to_json(document, indent, ensure_ascii) + "\n")

    def print_value(self, value: Any) -> None:
        """Prints a text as it is, but with an end of its last line, and anything else as JSON."""
        if isinstance(value, str):
            self.print_text(value if value.endswith("\n") else f"{value}\n")
        else:
            self.print_json(value)

    def tell(self, text: str) -> None:
        """Prints one line on stderr, with nothing in it that a terminal would obey."""
        lines = [line.strip() for line in text.expandtabs(1).splitlines()]
        line = "; ".join(filter(None, lines)).replace(":; ", ": ")
        self._show(line.translate(_ESCAPES) + "\n")

    def draw(self, text: str, *, last: bool) -> None:
        """Shows a line in place of the one before, if stderr is a terminal. The last one stays."""
        if self.quiet:
            return
        with suppress(OSError, ValueError):  # it is not
            cells = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
            text = _clip(text, cells)
            if last:
                self._show(f"{text}\n")
            else:
                self._show(text, eraser=f"\r{' ' * cells}\r")

    def wipe(self) -> None:
        """Makes room for what is printed next."""
        if self._eraser:
            self._show("")

    def _show(self, text: str, eraser: str = "") -> None:
        """Shows a text on stderr in place of the bar. If stderr has gone, nothing else is lost."""
        with suppress(OSError, ValueError), self.whole():
            text, self._eraser = f"{self._eraser}{text}", eraser
            _write_all(sys.stderr, text)


class _ProgressBar:
    """A line on a terminal: what is done, the rate, and the time that has passed and is left."""

    def __init__(self, terminal: _Terminal, label: str, unit: str = "MiB") -> None:
        self._terminal = terminal
        self._label = label
        self._unit = unit
        self._started = self._drawn = time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self._drawn < 0.1 and done != total:
            return
        self._drawn = now
        passed = max(now - self._started, 1e-6)
        size, digits = (2**20, 1) if self._unit == "MiB" else (1, 0)
        amount = f"{done / size:,.{digits}f}"
        percent = left = ""
        if total:
            amount += f" of {total / size:,.{digits}f}"
            percent = f", {100 * done // total} %"
            left = f", {(total - done) * passed / max(done, 1):,.0f} s left"
        rate = f"{done / size / passed:,.1f} {self._unit}/s, {passed:,.0f} s passed"
        text = f"{amount} {self._unit}{percent}, {rate}{left}: {self._label}"
        self._terminal.draw(text, last=done == total)


def _read_text(path: str) -> str:
    """A file, or stdin for `-`, in UTF-8 or with a byte order mark, whatever the locale is."""
    content = _read_all(path)
    marked = (name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark))
    encoding = next(marked, "utf-8")
    try:
        if encoding == "utf-8" and b"\0" in content[:2]:  # as UTF-16 begins without its mark
            raise ValueError
        return content.decode(encoding)
    except ValueError:
        name = "stdin" if path == "-" else path
        remedy = "Save it as UTF-8 (in PowerShell by `Out-File -Encoding utf8`)"
        raise ValidationError(f"{name} is not UTF-8. {remedy}.") from None


def _decode_input(text: str, name: str) -> Any:
    """The JSON that a user wrote. NaN, which Python takes and no gateway does, is none."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"{name} is not JSON: {error}") from error
    return value


def _split_pairs(pairs: Iterable[str], form: str) -> list[tuple[str, str]]:
    """Names and values of an option that is given as NAME=VALUE, as often as needed."""
    found = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ValidationError(f"{form} is needed, not {pair!r}.")
        found.append((name, value))
    return found


def _read_parameters(args: Any) -> _Json:
    """The parameters of `-d`, and over them those of `-p` and `-P`."""
    data = args.data
    if data == "-" or data.startswith("@"):
        data = _read_text(data.removeprefix("@"))
    parameters = _decode_input(data, "-d")
    if not isinstance(parameters, dict):
        raise ValidationError("-d must be a JSON object.")
    for name, text in _split_pairs(args.parameter, "-p NAME=VALUE"):
        if text.startswith("@"):
            parameters[name] = _read_text(text[1:])
        else:
            parameters[name] = text
            with suppress(ValidationError):
                parameters[name] = _decode_input(text, name)
    parameters.update(_split_pairs(args.text, "-P NAME=TEXT"))
    return parameters


def _upload_inputs(client: GatewayClient, args: Any, terminal: _Terminal) -> dict[str, list[str]]:
    """The URLs of the files of `-f`. Nothing is uploaded unless all of them can be read."""
    pairs = _split_pairs(args.file, "-f NAME=PATH")
    local = [path for _, path in pairs if not path.startswith("s3://")]
    for path in local:
        open(path, "rb").close()
    files: dict[str, list[str]] = {}
    for name, url in pairs:
        if url in local:
            url = client.upload_input_file(url, on_progress=_ProgressBar(terminal, url))
        if not url.startswith("s3://"):
            raise GatewayError(f"The gateway's URL of an upload is {url!r}, and not an s3:// URL.")
        files.setdefault(name, []).append(url)
    return files


def _require_folder(folder: str) -> None:
    """Raises if there is anything but a folder at this path, or on the way to it."""
    path = os.path.abspath(folder)
    while not os.path.lexists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise ValidationError(f"Nothing can be saved in {folder}: {path} is not a folder.")


def _local_name(url: str) -> str:
    """A name for a file of the gateway: the end of its URL, but for what some system refuses."""
    name = _ODD_IN_NAMES.sub("_", url.rpartition("/")[2][-200:])
    stem = name.rstrip(". ")  # Windows would leave those out
    if stem != name or not name:
        name = f"{stem}_"
    if _DEVICES.match(name):
        name = f"_{name}"
    while len(name.encode()) > 240:  # most systems take 255, and a number may come in front
        name = name[1:]
    return name


def _download_into(client: GatewayClient, url: str, folder: str, terminal: _Terminal) -> str:
    """Downloads a file under a name that nothing in the folder has yet. Gives its path."""
    os.makedirs(os.path.abspath(folder), exist_ok=True)
    name, number = _local_name(url), 1
    path = os.path.join(folder, name)
    while True:
        try:
            open(path, "xb").close()  # takes the name, from commands that run beside this one too
            break
        except FileExistsError:
            number += 1
            path = os.path.join(folder, f"{number}-{name}")
    try:
        client.download_file(url, path, on_progress=_ProgressBar(terminal, path))
    except BaseException:
        os.unlink(path)
        raise
    return path


def _print_result(
    client: GatewayClient, result: PrefabResult, args: Any, terminal: _Terminal
) -> None:
    """Saves the output files if asked to, and prints the result, whatever becomes of them."""
    saved: list[str] = []
    try:
        for url in result.get_file_urls() if args.save else ():
            path = _download_into(client, url, args.save, terminal)
            saved.append(path)
    except ValidationError as error:  # the URLs are the gateway's, so this is not wrong usage
        raise GatewayError(f"An output file cannot be saved: {error._in_shell()}") from error
    finally:
        if not args.result:
            terminal.print_json({**result.to_dict(), **({"saved": saved} if args.save else {})})
        elif result.is_success() or result.output is not None:
            terminal.print_value(result.get_function_result())
        for path in saved if args.result else ():
            terminal.tell(f"saved: {path}")


def _print_stream(stream: EventStream, as_json: bool, terminal: _Terminal) -> PrefabResult:
    """Prints what comes, as it comes. Gives the result, without most of its contents."""
    kept: list[StreamEvent] = []  # not all of them: there may be more than memory has room for
    has_content = False
    try:
        for event in stream:
            # A heartbeat is of a type that the SDK does not know, and has no data.
            is_heartbeat = event.data is None and event.raw.get("type") != "content"
            if not kept or event.type in (StreamEventType.DONE, StreamEventType.ERROR):
                kept.append(event)
            if as_json:
                terminal.print_json(event.raw, one_line=True)
            elif event.type == StreamEventType.CONTENT and not is_heartbeat:
                has_content = True
                if isinstance(event.data, str):
                    terminal.print_text(event.data)
                else:
                    terminal.print_json(event.data, one_line=True)
    finally:
        if has_content:
            terminal.print_text("\n")
    result = PrefabResult.from_events(kept)
    if not as_json:
        value = result.get_function_result()
        if not has_content and value not in ("", [], {}):
            terminal.print_value(value)
        for url in result.get_file_urls():
            terminal.tell(f"file: {url}")
    return result


def _reason(result: PrefabResult) -> str:
    """Why a call failed."""
    message = (result.error or {}).get("message") or result.error or "the gateway does not say why."
    return f"{result.status}: {result.exception._in_shell() if result.exception else message}"


def _run_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    if args.stream and (args.save or args.result):
        raise ValidationError("--save and --result do not go with --stream.")
    parameters = _read_parameters(args)
    if args.save:
        _require_folder(args.save)
    files = _upload_inputs(client, args, terminal)
    call = (args.prefab, args.version, args.function, parameters, files)
    terminal.if_interrupted = "the call may have run"
    if args.stream:
        with client.run(*call, stream=True) as stream:
            result = _print_stream(stream, args.json, terminal)
    else:
        result = client.run(*call)
        terminal.if_interrupted = "the call has run"
        _print_result(client, result, args, terminal)
    if not result.is_success():
        raise GatewayError(_reason(result))
    value = result.get_function_result()
    if args.fail and isinstance(value, dict) and value.get("success") is False:
        reason = result.get_business_error() or result.get_business_message() or "no reason"
        raise GatewayError(f'The function reports "success": false: {reason}')


def _read_calls(path: str) -> list[PrefabCall]:
    """The calls of a file: JSON lines, or one JSON array."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        entries = _decode_input(text, path)
    else:
        lines = enumerate(text.split("\n"), 1)  # not splitlines(): JSON may have U+2028 in a line
        entries = [_decode_input(line, f"Line {number}") for number, line in lines if line.strip()]
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValidationError(f"The call with index {index} is not a JSON object.")
        problems = [f"lacks {name!r}" for name in _CALL_FIELDS[:3] if name not in entry]
        unknown = [name for name in entry if name not in _CALL_FIELDS]
        problems += [f"has {name!r}, which is no field of a call" for name in unknown]
        if problems:
            raise ValidationError(f"The call with index {index} {' and '.join(problems)}.")
    return [PrefabCall(**entry) for entry in entries]


def _batch_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    calls = _read_calls(args.path)
    bar = _ProgressBar(terminal, "batch", "calls")
    waiting: dict[int, _Json] = {}  # until the results before them are printed
    printed = 0

    def on_result(index: int, result: PrefabResult) -> None:
        nonlocal printed
        with terminal.whole():
            waiting[index] = line = {"index": index, **result.to_dict()}
            if result.exception:
                line["error"] = {**line["error"], "message": result.exception._in_shell()}
            elif not result.is_success():  # so says the gateway: the call has run
                line["error"] = {**(result.error or {}), "may_have_run": True}
            while printed in waiting:
                terminal.print_json(waiting.pop(printed), one_line=True)
                printed += 1
            bar(printed + len(waiting), len(calls))

    terminal.if_interrupted = "calls that have no line on stdout may have run"
    try:
        results = client.run_batch(calls, max_workers=args.workers, on_result=on_result).results
    finally:
        with terminal.whole():
            for index in sorted(waiting):
                terminal.print_json(waiting[index], one_line=True)
    failed = [index for index, result in enumerate(results) if not result.is_success()]
    if failed:
        first = f"the first with index {failed[0]}: {_reason(results[failed[0]])}"
        raise GatewayError(f"{len(failed)} of {len(calls)} calls failed, {first}")


def _list_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    prefabs = client.list_prefabs(args.status)
    if not sys.stdout.isatty():
        terminal.print_json([prefab.raw for prefab in prefabs])
        return
    cells = 80
    with suppress(OSError):  # the NUL of Windows calls itself a terminal
        cells = os.get_terminal_size(sys.stdout.fileno()).columns or 80
    names = [f"{prefab.prefab_id} {prefab.version}" for prefab in prefabs]
    for prefab, name in zip(prefabs, names):
        state = "" if prefab.status in (None, "deployed") else f"({prefab.status}) "
        line = f"{name:{max(map(len, names))}}  {state}{prefab.description}"
        terminal.print_text(_clip(line, cells) + "\n")


def _spec_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    terminal.print_json(client.get_prefab_spec(args.prefab, args.version))


def _upload_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    if not args.temp and (args.session is not None or args.ttl is not None):
        raise ValidationError("--session and --ttl go with --temp.")
    if not args.input and args.content_type is not None:
        raise ValidationError("--content-type goes with --input.")
    answers: list[_Json] = []
    try:
        for path in args.path:
            bar = _ProgressBar(terminal, path)
            if args.input:
                url = client.upload_input_file(path, args.content_type, on_progress=bar)
                answers.append({"s3_url": url})
            elif args.temp:
                ttl = args.ttl or 86400
                answers.append(client.upload_temp_file(path, ttl, args.session, on_progress=bar))
            else:
                answers.append(client.upload_file(path, on_progress=bar))
    finally:  # what was uploaded is there, whatever becomes of the others
        if answers:
            terminal.print_json(answers if len(args.path) > 1 else answers[0])


def _download_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    path = args.target
    if os.path.isdir(path) or path.endswith(("/", os.sep)):
        path = _download_into(client, args.s3_url, path, terminal)
    else:
        client.download_file(args.s3_url, path, on_progress=_ProgressBar(terminal, path))
    terminal.print_json({"path": path, "size": os.path.getsize(path)})


def _ls_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    temporary = args.temp or args.session
    files = client.iter_temp_files(args.session) if temporary else client.iter_files()
    terminal.print_json(list(files))


def _cleanup_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    terminal.print_json({"deleted_count": client.cleanup_temp_files(args.session)})


def _url_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    terminal.print_json({"presigned_url": client.get_presigned_url(args.s3_url, args.expires)})


def _secret_set_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    value = ""
    if sys.stdin.isatty():
        import getpass  # asks without an echo; an argument would show in the list of processes

        try:
            value = getpass.getpass(f"{args.name}: ")
        except (EOFError, KeyboardInterrupt) as error:
            terminal.tell("")  # ends the line with the prompt
            if not isinstance(error, EOFError):
                raise
    else:
        value = _read_text("-").removesuffix("\n").removesuffix("\r")
    if not value:
        raise ValidationError("The secret is empty: it is read from stdin, or typed at the prompt.")
    client.set_secret(args.prefab, args.name, value)
    terminal.print_json({"prefab_id": args.prefab, "secret_name": args.name})


def _secret_list_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    terminal.print_json(client.list_secrets(args.prefab))


def _secret_delete_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    client.delete_secret(args.prefab, args.name)
    terminal.print_json({"prefab_id": args.prefab, "secret_name": args.name})


def _number(kind: type, least: float, text: str) -> Any:
    """The value of an option, which is an `int` or a `float`."""
    import argparse

    with suppress(ValueError):
        if least <= kind(text) < 10**9:
            return kind(text)
    name = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{name} from {least} on is needed, not {text!r}")


def _add_run(add: Callable[..., Any]) -> None:
    repeated: _Json = {"action": "append", "default": []}
    run = add("run", help="run a function", usage="%(prog)s PREFAB VERSION FUNCTION [options]",
              epilog="example: gateway-sdk run text-tools 1.1.0 statistics -p text='Hello you'")
    run.set_defaults(handler=_run_command)
    run.add_argument("prefab", metavar="PREFAB", help="an id, see `gateway-sdk list`")
    run.add_argument("version", metavar="VERSION", help="such as 1.0.0")
    run.add_argument("function", metavar="FUNCTION", help="see `gateway-sdk spec PREFAB`")
    run.add_argument("-p", "--parameter", metavar="NAME=VALUE", **repeated,
                     help="a parameter: JSON, or else text; NAME=@FILE is the text of a file")
    run.add_argument("-P", "--text", metavar="NAME=TEXT", **repeated,
                     help="a parameter that is text, whatever it looks like")
    run.add_argument("-d", "--data", metavar="JSON", default="{}",
                     help="all parameters: JSON, @FILE or - for stdin")
    run.add_argument("-f", "--file", metavar="NAME=PATH", **repeated,
                     help="an input: a file, or an s3:// URL")
    run.add_argument("--stream", action="store_true", help="print contents as they come")
    run.add_argument("--json", action="store_true", help="with --stream: events as JSON lines")
    run.add_argument("--result", action="store_true", help="print the function's value alone")
    run.add_argument("--save", metavar="FOLDER", help="download the output files; replaces none")
    run.add_argument("--fail", action="store_true",
                     help='exit with 1, and not 0, if the function reports "success": false')


def _add_batch(add: Callable[..., Any]) -> None:
    call = {"prefab_id": "text-tools", "version": "1.1.0", "function_name": "echo"}
    example = json.dumps({**call, "parameters": {"value": 1}})
    batch = add(
        "batch", help="run the calls of a file", usage="%(prog)s FILE [options]", description=
        "Runs calls side by side. FILE has a call in each line, or is a JSON array of calls.\n"
        "A call has the fields prefab_id, version and function_name, and may have parameters\n"
        "(an object) and files (names to lists of s3:// URLs). Prints each result as a line\n"
        "of JSON, with the index of its call, from 0. Exits with 1 if a call failed.",
        epilog=f"example: gateway-sdk batch calls.jsonl\n\na line of calls.jsonl:\n{example}",
    )
    batch.set_defaults(handler=_batch_command)
    batch.add_argument("path", metavar="FILE", help="a file, or - for stdin")
    batch.add_argument("--workers", metavar="N", type=partial(_number, int, 1), default=8,
                       help="calls at a time; default: 8")


def _add_directory(add: Callable[..., Any]) -> None:
    prefabs = add("list", help="list the prefabs: as lines on a terminal, else as JSON",
                  usage="%(prog)s [options]", epilog="example: gateway-sdk list --status deployed")
    prefabs.set_defaults(handler=_list_command)
    prefabs.add_argument("--status", metavar="STATUS", help="deployed or failed")
    spec = add("spec", help="show functions", usage="%(prog)s PREFAB [VERSION] [options]",
               epilog="example: gateway-sdk spec text-tools")
    spec.set_defaults(handler=_spec_command)
    spec.add_argument("prefab", metavar="PREFAB", help="an id, see `gateway-sdk list`")
    spec.add_argument("version", metavar="VERSION", nargs="?", help="default: the newest")


def _add_files(add: Callable[..., Any]) -> None:
    upload = add("upload", help="upload files", usage="%(prog)s PATH... [options]",
                 epilog="example: gateway-sdk upload --input report.txt")
    upload.set_defaults(handler=_upload_command)
    upload.add_argument("path", metavar="PATH", nargs="+", help="a file")
    kind = upload.add_mutually_exclusive_group()
    kind.add_argument("--input", action="store_true", help="inputs of calls; no agent needed")
    kind.add_argument("--temp", action="store_true", help="temporary files")
    upload.add_argument("--content-type", metavar="T", help="of an input, such as video/mp4")
    upload.add_argument("--ttl", metavar="S", type=partial(_number, int, 1),
                        help="seconds that a temporary file lives; default: 86400")
    upload.add_argument("--session", metavar="ID", help="what temporary files have in common")
    download = add("download", help="download a file", usage="%(prog)s S3_URL [TARGET] [options]",
                   epilog="example: gateway-sdk download s3://bucket/key/report.txt downloads/")
    download.set_defaults(handler=_download_command)
    download.add_argument("s3_url", metavar="S3_URL", help="the file's URL")
    download.add_argument("target", metavar="TARGET", nargs="?", default=".",
                          help="a file; or a folder, where none is replaced; default: this one")
    url = add("url", help="print a URL that anyone can download from",
              usage="%(prog)s S3_URL [options]",
              epilog="example: gateway-sdk url s3://bucket/key/report.txt --expires 600")
    url.set_defaults(handler=_url_command)
    url.add_argument("s3_url", metavar="S3_URL", help="the file's URL")
    url.add_argument("--expires", metavar="S", type=partial(_number, int, 1), default=3600,
                     help="seconds until it ends; default: 3600")
    ls = add("ls", help="list the agent's files", usage="%(prog)s [options]",
             epilog="example: gateway-sdk ls --temp")
    ls.set_defaults(handler=_ls_command)
    ls.add_argument("--temp", action="store_true", help="temporary files")
    ls.add_argument("--session", metavar="ID", help="what temporary files have in common")
    cleanup = add("cleanup", help="delete temporary files", usage="%(prog)s SESSION [options]",
                  epilog="example: gateway-sdk cleanup session-1")
    cleanup.set_defaults(handler=_cleanup_command)
    cleanup.add_argument("session", metavar="SESSION", help="what the files have in common")


def _add_secret(add: Callable[..., Any], common: Any) -> None:
    secret = add("secret", help="set, list or delete your secrets",
                 usage="%(prog)s ACTION ... [options]", epilog="example: gateway-sdk secret list")
    actions = secret.add_subparsers(metavar="ACTION", required=True, prog=secret.prog)
    put = actions.add_parser("set", help="set one, from stdin or a prompt", parents=[common],
                             usage="%(prog)s PREFAB NAME [options]")
    put.set_defaults(handler=_secret_set_command)
    delete = actions.add_parser("delete", help="delete one", parents=[common],
                                usage="%(prog)s PREFAB NAME [options]")
    delete.set_defaults(handler=_secret_delete_command)
    for action in (put, delete):
        action.add_argument("prefab", metavar="PREFAB", help="the prefab that needs it")
        action.add_argument("name", metavar="NAME", help="its name")
    names = actions.add_parser("list", help="list their names", parents=[common],
                               usage="%(prog)s [PREFAB] [options]")
    names.set_defaults(handler=_secret_list_command)
    names.add_argument("prefab", metavar="PREFAB", nargs="?", help="only those of this one")


def _parse_arguments(argv: Sequence[str] | None) -> Any:
    """The arguments, with the command's `handler`. Raises SystemExit after help and version."""
    import argparse  # here only: nobody else should wait for it

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            usage = str(self.usage).replace("%(prog)s", self.prog)
            raise ValidationError(f"{message} (usage: {usage})")

    # These stand before or after the command: a default at one place would hide the other.
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--base-url", metavar="URL", help="default: $GATEWAY_BASE_URL")
    common.add_argument("--timeout", metavar="S", type=partial(_number, float, 0.001),
                        help="seconds for each wait; default: 60")
    common.add_argument("--retries", metavar="N", type=partial(_number, int, 0),
                        help="of what can do no harm; default: 2")
    common.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    common.add_argument("-v", "--verbose", action="store_true", help="log requests to stderr")
    parser = Parser(
        "gateway-sdk", usage="%(prog)s COMMAND ... [options]", parents=[common],
        description="The credential is that in the environment: "
        "X_INTERNAL_TOKEN, AGENT_BUILDER_API_KEY or GATEWAY_JWT_TOKEN.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, prog=parser.prog)
    formatter = argparse.RawDescriptionHelpFormatter
    add = partial(commands.add_parser, parents=[common], formatter_class=formatter)
    _add_run(add)
    _add_batch(add)
    _add_directory(add)
    _add_files(add)
    _add_secret(add, common)
    values = argparse.Namespace(base_url=None, timeout=60, retries=2, quiet=False, verbose=False)
    return parser.parse_args(argv, values)


def _log_to(terminal: _Terminal) -> None:
    """Shows the log of the SDK."""
    import logging

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            terminal.tell(self.format(record))

    logging.basicConfig(level=logging.DEBUG, handlers=[Handler()])


def _execute(argv: Sequence[str] | None, terminal: _Terminal) -> None:
    """Does what the arguments ask for."""
    args = _parse_arguments(argv)
    terminal.quiet = args.quiet
    if args.verbose:
        _log_to(terminal)
    options = {"base_url": args.base_url, "timeout": args.timeout, "max_retries": args.retries}
    with GatewayClient.from_env(**options) as client:
        args.handler(client, args, terminal)


def _report(error: BaseException, terminal: _Terminal) -> int:
    """Says on stderr why the command ended. Returns the exit status for it."""
    if terminal.signal or isinstance(error, KeyboardInterrupt):
        terminal.tell(f"interrupted: {terminal.if_interrupted}.")
        return 128 + (terminal.signal or 2)
    if isinstance(error, BrokenPipeError):  # the reader of stdout has seen enough
        return 0
    message = str(error)
    if isinstance(error, GatewayError):
        message = error._in_shell()
    elif isinstance(error, OSError) and error.filename and error.strerror:
        message = f"{error.strerror}: {error.filename!r}"
    terminal.tell(f"error: {message}")
    return 2 if isinstance(error, ValidationError) and error.status_code is None else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command `gateway-sdk`.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong usage; interrupted, 128 and the signal's number:
        130 by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for good
    terminal = _Terminal()
    with terminal.signals():
        try:
            try:
                _execute(argv, terminal)
            finally:
                terminal.finish()
        except SystemExit:  # after help and version
            try:
                sys.stdout.flush()
            except OSError:  # keep the interpreter from trying it again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (KeyboardInterrupt, GatewayError, OSError, ValueError, RecursionError) as error:
            return _report(error, terminal)
    return 0


# `from gateway_sdk.exceptions import ...` and `gateway_sdk.models`, as in the older SDK: the import
# looks into sys.modules before it asks whether the parent is a package.
if not TYPE_CHECKING:  # type checkers would take these variables for Any
    exceptions = models = sys.modules[__name__]
    sys.modules[f"{__name__}.exceptions"] = sys.modules[f"{__name__}.models"] = exceptions

if __name__ == "__main__":
    sys.exit(main())
