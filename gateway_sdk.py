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
never lost. Look at `GatewayClient` for what can be called; every failure is a `GatewayError`.

Top to bottom, each section built on those above it: errors, data, requests, connections, transport,
event stream, files, client, command line.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import email.utils
import enum
import functools
import http.client
import io
import json
import logging
import os
import queue
import re
import socket
import stat
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING, Any, BinaryIO, ClassVar, Final, Literal, NamedTuple, Optional, TypeVar, Union, overload,
)

if TYPE_CHECKING:
    import concurrent.futures
    import ssl

__version__ = "1.0.0"

__all__ = [
    "DEFAULT_BASE_URL", "AgentContextRequiredError", "AuthenticationError", "BatchResult", "CallStatus",
    "EventStream", "GatewayClient", "GatewayError", "GatewayTimeoutError", "MissingSecretError", "Prefab",
    "PrefabCall", "PrefabInfo", "PrefabNotFoundError", "PrefabResult", "QuotaExceededError",
    "ServiceUnavailableError", "StreamEvent", "StreamEventType", "ValidationError", "__version__",
]

DEFAULT_BASE_URL: Final = "http://nodeport.sensedeal.vip:30566"

_BACKOFF_BASE_SECONDS: Final = 0.5
_BACKOFF_CAP_SECONDS: Final = 8.0
_RETRY_AFTER_CAP_SECONDS: Final = 60.0  # a longer wait is the caller's decision
_IDLE_SECONDS: Final = 4.0  # the gateway's server hangs up after 5, unannounced
_AFTER_DONE_SECONDS: Final = 2.0  # how long a stream may linger once it has said that it is done
_MAX_REDIRECTS: Final = 5
_MAX_IDLE_CONNECTIONS: Final = 100  # per origin
_MAX_INTERIM_ANSWERS: Final = 100
_MAX_LINE_BYTES: Final = 64 * 1024
_MAX_ERROR_BYTES: Final = 64 * 1024
_BLOCK_BYTES: Final = 256 * 1024  # fits the processor's cache: larger ones cost more
_SENDFILE_BYTES: Final = 8 * 1024 * 1024  # between two calls of on_progress
_SHOWN_CHARACTERS: Final = 500

_T = TypeVar("_T")
_Path = Union[str, "os.PathLike[str]"]
_Files = Mapping[str, Sequence[str]]  # name to s3:// URLs
_Progress = Callable[[int, Optional[int]], object]  # bytes done, bytes in all (None: unknown)

logger = logging.getLogger("gateway_sdk")  # not __name__, which is __main__ on the command line
logger.addHandler(logging.NullHandler())


# --- Errors ---------------------------------------------------------------------------------------
#
#   GatewayError
#   ├─ AuthenticationError
#   ├─ PrefabNotFoundError
#   ├─ ValidationError (also ValueError)
#   ├─ QuotaExceededError
#   ├─ MissingSecretError
#   ├─ AgentContextRequiredError
#   └─ ServiceUnavailableError
#      └─ GatewayTimeoutError (also TimeoutError)


class GatewayError(Exception):
    """Anything that went wrong; the class says what the caller can do about it.

    Attributes:
        message: What was asked, what came back and, where there is one, the remedy.
        details: The fields of the error's body, with secrets taken out.
        status_code: HTTP status; None if there was no answer.
        error_code: The gateway's own code, such as `"MISSING_SECRET"`, or None.
        retry_after: Seconds that the answer asks to wait (`Retry-After`), or None.
        may_have_run: False means that sending the request again cannot run anything twice.
    """

    _remedy: ClassVar[str] = ""
    _fields: ClassVar[Mapping[str, Any]] = {}  # attributes that an error's body gives, and defaults

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = dict(details or {})
        self.status_code: int | None = None
        self.error_code: str | None = self.details.get("error_code")
        self.retry_after: float | None = None
        self.may_have_run = False

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args`, which the constructors below refuse.
        return _new_error, (type(self),), {**self.__dict__, "args": self.args}

    @classmethod
    def _from_answer(cls, message: str, body: Mapping[str, Any]) -> GatewayError:
        values = {name: body.get(name) or default for name, default in cls._fields.items()}
        shown = {name: "" if value is None else value for name, value in values.items()}
        error = cls.__new__(cls)
        GatewayError.__init__(error, f"{message}\n{cls._remedy.format(**shown)}".strip(), {**values, **body})
        error.__dict__.update(values)
        return error


def _new_error(error_class: type[GatewayError]) -> GatewayError:
    return error_class.__new__(error_class)


class AuthenticationError(GatewayError):
    """The gateway refused the credential (401, 403)."""

    _remedy = (
        "Check the credential: it may be wrong, expired or another gateway's. Without one, this "
        "machine's address must be on the gateway's allow-list."
    )


class PrefabNotFoundError(GatewayError):
    """There is no such prefab, version or function (404). Has `prefab_id` and `version`."""

    _remedy = "client.list_prefabs() shows what is deployed."
    _fields = {"prefab_id": "unknown", "version": "unknown"}

    def __init__(self, prefab_id: str, version: str, message: str | None = None) -> None:
        details = {"prefab_id": prefab_id, "version": version}
        super().__init__(message or f"Prefab {prefab_id}@{version} not found", details)
        self.prefab_id, self.version = prefab_id, version


class ValidationError(GatewayError, ValueError):
    """Bad input: refused by the gateway (422), or here before anything was sent."""


class QuotaExceededError(GatewayError):
    """A quota is used up (429). Has `limit`, `used` and `quota_type`."""

    _remedy = "Wait, or have the quota raised: such a call is not repeated by itself."
    _fields = {"limit": 0, "used": 0, "quota_type": "unknown"}

    def __init__(self, message: str, limit: int, used: int, quota_type: str) -> None:
        super().__init__(message, {"limit": limit, "used": used, "quota_type": quota_type})
        self.limit, self.used, self.quota_type = limit, used, quota_type


class MissingSecretError(GatewayError):
    """The prefab needs a secret of yours. Has `prefab_id`, `secret_name` and `instructions`."""

    _remedy = "Set it with client.set_secret({prefab_id!r}, {secret_name!r}, value).\n{instructions}"
    _fields = {"prefab_id": "unknown", "secret_name": "unknown", "instructions": None}

    def __init__(self, prefab_id: str, secret_name: str, instructions: str | None = None) -> None:
        details = {"prefab_id": prefab_id, "secret_name": secret_name, "instructions": instructions}
        remedy = self._remedy.format(**{**details, "instructions": instructions or ""})
        message = f"Missing required secret '{secret_name}' for prefab '{prefab_id}'\n{remedy}".strip()
        super().__init__(message, {**details, "error_code": "MISSING_SECRET"})
        self.prefab_id, self.secret_name, self.instructions = prefab_id, secret_name, instructions


class AgentContextRequiredError(GatewayError):
    """The credential is not an agent's, which this file operation needs."""

    _remedy = (
        "Agent files need the token that the gateway gave to an agent (internal_token=). "
        "upload_input_file() uploads the inputs of a call without one."
    )

    def __init__(self, message: str | None = None) -> None:
        message = message or f"File operations need an agent context.\n{self._remedy}"
        super().__init__(message, {"error_code": "MISSING_AGENT_CONTEXT"})


class ServiceUnavailableError(GatewayError):
    """No usable answer: a 5xx, or a connection that was refused, lost or cut short."""


class GatewayTimeoutError(ServiceUnavailableError, TimeoutError):
    """Connecting, or a wait for bytes, took longer than `timeout`."""


_STATUS_ERRORS: Final[Mapping[Any, type[GatewayError]]] = {
    401: AuthenticationError,
    403: AuthenticationError,
    404: PrefabNotFoundError,
    422: ValidationError,
    429: QuotaExceededError,
    (400, "MISSING_SECRET"): MissingSecretError,
    (400, "MISSING_AGENT_CONTEXT"): AgentContextRequiredError,
}
_PLAIN_MISSING_SECRET: Final = re.compile(r"Secret '(.*)' for prefab '(.*)' is not configured")
_XML_PROBLEM: Final = re.compile(r"<Code>([^<]*)</Code>\s*<Message>([^<]*)</Message>")


def _redacted(value: Any, hide: Callable[[str], str]) -> Any:
    """A copy of a JSON value with `hide` applied to every string in it."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, list):
        return [_redacted(item, hide) for item in value]
    if isinstance(value, dict):
        return {hide(key): _redacted(item, hide) for key, item in value.items()}
    return value


def _read_problem(body: bytes, hide: Callable[[str], str]) -> tuple[str, dict[str, Any]]:
    """Message and fields of an error body in any of its forms. `hide` takes secrets out."""
    text = hide(body.decode("utf-8", "replace")).strip()
    try:
        content = _redacted(json.loads(body), hide)
    except (ValueError, RecursionError):
        xml = _XML_PROBLEM.search(text)  # of S3
        return (f"{xml[1]}: {xml[2]}", {"error_code": xml[1]}) if xml else (text[:_SHOWN_CHARACTERS], {})
    problem = content.get("detail") or content if isinstance(content, dict) else content
    if isinstance(problem, list):
        return "".join(f"\n  {_field_problem(entry)}" for entry in problem), {"errors": problem}
    if isinstance(problem, dict):
        more = problem.get("details")
        fields = {**problem, **more} if isinstance(more, dict) else problem
        return str(problem.get("message") or problem.get("error") or text[:_SHOWN_CHARACTERS]), fields
    secret = _PLAIN_MISSING_SECRET.search(str(problem))
    names = {"error_code": "MISSING_SECRET", "secret_name": secret[1], "prefab_id": secret[2]} if secret else {}
    return str(problem), names


def _field_problem(entry: Any) -> str:
    """One line for an entry of a 422's list, such as `body.calls.0.version: Field required`."""
    if not isinstance(entry, dict):
        return str(entry)
    place = entry.get("loc")
    path = ".".join(map(str, place)) if isinstance(place, list) else str(place)
    return f"{path}: {entry.get('msg', 'invalid')}"


def _retry_after_seconds(value: str) -> float | None:
    """Seconds that a `Retry-After` in either form asks for (RFC 9110 §10.2.3); None if unreadable.

    >>> _retry_after_seconds("120")
    120.0
    """
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value, re.ASCII):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValidationError(message)


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


_CALL_STATUSES: Final = {str(status): status for status in CallStatus}
_EVENT_TYPES: Final = {str(event_type): event_type for event_type in StreamEventType}
_LAST_EVENTS: Final = (StreamEventType.DONE, StreamEventType.ERROR)


@dataclasses.dataclass
class PrefabCall:
    """One call. `files` maps an input's name to `s3://` URLs, as `upload_input_file` gives them."""

    prefab_id: str
    version: str
    function_name: str
    parameters: dict[str, Any] | None = None
    files: _Files | None = None

    def to_dict(self) -> dict[str, Any]:
        """The call as the gateway reads it; `files` is left out when there are none."""
        inputs: dict[str, Any] = {"parameters": self.parameters or {}}
        if self.files:
            inputs["files"] = self.files
        names = {"prefab_id": self.prefab_id, "version": self.version, "function_name": self.function_name}
        return {**names, "inputs": inputs}


@dataclasses.dataclass
class PrefabResult:
    """What became of one call.

    Attributes:
        status: A `CallStatus`, or the gateway's own word if that is another.
        output: What the gateway gave: `{"status", "output", "files"}`, on older ones the function's
            value itself.
        error: `{"message", "type", ...}` of a failed call.
        job_id: The gateway's id of the request.
        exception: The error that a failed call of a batch would have raised from `run`.
        raw: The result's whole entry in the answer.
    """

    status: CallStatus | str
    output: Any = None
    error: dict[str, Any] | None = None
    job_id: str | None = None
    exception: GatewayError | None = dataclasses.field(default=None, repr=False, compare=False)
    raw: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def _from_dict(cls, entry: dict[str, Any], job_id: str | None) -> PrefabResult:
        status, error = str(entry.get("status")), entry.get("error")
        error = None if error is None else _error_dict(error)
        return cls(_CALL_STATUSES.get(status, status), entry.get("output"), error, job_id, raw=entry)

    @classmethod
    def _from_exception(cls, exception: BaseException) -> PrefabResult:
        if not isinstance(exception, GatewayError):
            lost = ServiceUnavailableError(f"The call was lost: {type(exception).__name__}: {exception}")
            lost.__cause__, lost.may_have_run = exception, True
            exception = lost
        error = {"message": exception.message, "type": type(exception).__name__}
        if exception.error_code:
            error["error_code"] = exception.error_code
        return cls(CallStatus.FAILED, error=error, exception=exception)

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
        """What the function returned: `output["output"]`; `{}` where that is null or missing."""
        value = self.get("output")
        return {} if value is None else value

    def get_files(self) -> dict[str, list[str]]:
        """The output files: name to list of `s3://` URLs."""
        for files in (self.get("files"), self.raw.get("files")):
            if isinstance(files, dict) and files:
                given = {name: [urls] if isinstance(urls, str) else urls for name, urls in files.items()}
                return {name: list(urls) for name, urls in given.items() if isinstance(urls, list)}
        return {}

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
        message = self._business("message")
        return "" if message is None else str(message)

    def get_business_error(self) -> Any:
        """The function result's `error`; None where missing."""
        return self._business("error")

    def get_business_error_code(self) -> Any:
        """The function result's `error_code`; None where missing."""
        return self._business("error_code")


def _error_dict(error: Any) -> dict[str, Any]:
    return error if isinstance(error, dict) else {"message": str(error)}


@dataclasses.dataclass
class BatchResult:
    """The results of a batch, in the order of its calls.

    `status` is `"COMPLETED"` (all succeeded), `"PARTIAL_SUCCESS"` or `"FAILED"` (none did). `job_id`
    is None unless the batch was a single request: each result has its own.
    """

    job_id: str | None
    status: str
    results: list[PrefabResult]

    @classmethod
    def _of(cls, results: list[PrefabResult], job_id: str | None = None) -> BatchResult:
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


@dataclasses.dataclass
class StreamEvent:
    """One event of a stream; `raw` is the whole decoded object, with its further fields."""

    type: StreamEventType
    data: Any
    raw: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StreamEvent:
        """The event of a decoded object; one of an unknown `type` is `content`."""
        event_type: Any = data.get("type")
        known = event_type.__class__ is str and event_type in _EVENT_TYPES
        return cls(_EVENT_TYPES[event_type] if known else StreamEventType.CONTENT, data.get("data"), data)


@dataclasses.dataclass
class PrefabInfo:
    """One version of a prefab in the directory. `status` is that of its deployment; `raw` is all."""

    prefab_id: str
    version: str
    name: str = ""
    description: str = ""
    tags: list[str] = dataclasses.field(default_factory=list)
    status: str | None = None
    functions: list[Any] = dataclasses.field(default_factory=list)
    requires_secrets: bool = False
    secrets: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    is_official: bool = False
    author: str | None = None
    raw: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def _from_dict(cls, entry: dict[str, Any]) -> PrefabInfo:
        names = {"prefab_id": "id", "status": "deployment_status"}
        given = {field.name: entry.get(names.get(field.name, field.name)) for field in dataclasses.fields(cls)}
        known = {name: value for name, value in given.items() if value is not None}
        return cls(**{**known, "raw": entry})


def _version_key(version: str) -> tuple[Any, ...]:
    """Sorts versions by precedence (SemVer §11): 1.10.0 after 1.9.0, 1.0.0-rc.1 before 1.0.0."""
    release, _, pre_release = version.partition("+")[0].lstrip("v").partition("-")

    def identifiers(text: str) -> list[Any]:
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in text.split(".")]

    return identifiers(release), not pre_release, identifiers(pre_release)


# --- Requests -------------------------------------------------------------------------------------

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_CREDENTIAL_HEADERS: Final = {
    "internal_token": "X-Internal-Token",
    "api_key": "X-API-Key",
    "jwt_token": "Authorization",
}


class _Origin(NamedTuple):
    """What a connection leads to (RFC 6454)."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        """The value of `Host`: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}"


def _split_url(url: str) -> tuple[_Origin, str]:
    """Origin and request target of an http(s) URL.

    Raises:
        ValueError: it is none. The text does not show it, as it may be a secret.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
        host = parts.hostname or ""
        host = host if host.isascii() else host.encode("idna").decode("ascii")
    except (ValueError, AttributeError, TypeError):
        raise ValueError("is not a URL") from None
    if port is None or parts.scheme not in _DEFAULT_PORTS or not re.fullmatch(r"[\w.:%~-]+", host):
        raise ValueError("is not an http:// or https:// URL")
    if "@" in parts.netloc:
        raise ValueError("must not contain a user name")
    target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
    # A presigned URL must arrive as it was signed: only what HTTP cannot carry is encoded.
    return _Origin(parts.scheme, host, port), urllib.parse.quote(target, safe="!#$%&'()*+,/:;=?@[]~")


class _Body:
    """A request's body, of known length and made to be sent again: bytes, a file's bytes, bytes."""

    def __init__(self, head: bytes = b"", file: BinaryIO | None = None, tail: bytes = b"",
                 on_progress: _Progress | None = None) -> None:
        self.head, self.file, self.tail = head, file, tail
        self.file_length = os.fstat(file.fileno()).st_size if file else 0
        self.on_progress = on_progress or (lambda _done, _total: None)

    def __len__(self) -> int:
        return len(self.head) + self.file_length + len(self.tail)


@dataclasses.dataclass
class _Request:
    """All that is sent, and how it may be treated. As text it shows no query and no header."""

    method: str
    origin: _Origin
    target: str
    timeout: float | None
    body: Any = b""  # bytes, or a _Body
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    repeatable: bool = False  # sent twice, it does no more than once
    to_gateway: bool = True  # answered in the gateway's way; else by a storage
    authenticated: bool = True  # takes the client's credential along
    prefab: dict[str, str] | None = None  # what a 404 is about
    hidden: tuple[str, ...] = ()  # not to be shown

    def __str__(self) -> str:
        path = self.target.partition("?")[0]
        return f"{self.method} {path if self.to_gateway else f'{self.origin}{path}'}"

    __repr__ = __str__

    def hide(self, text: str) -> str:
        """`text` without the credential, secrets and the query of a presigned URL."""
        headers = [self.headers.get(name, "") for name in _CREDENTIAL_HEADERS.values()]
        words = {*self.hidden, *(header.rpartition(" ")[2] for header in headers)}
        if not self.to_gateway:
            query = self.target.partition("?")[2]
            words |= {query, *(value for _, value in urllib.parse.parse_qsl(query))}
        words |= {urllib.parse.quote(word, safe="") for word in words}
        for word in sorted(filter(None, words), key=len, reverse=True):
            # A short one counts only where it stands alone: "id" is no secret inside of "invalid".
            edge = r"\b" if len(word) < 8 and word.isalnum() else ""
            text = re.sub(f"{edge}{re.escape(word)}{edge}", "***", text)
        return text


@dataclasses.dataclass
class _Credential:
    """Who the client is: the header that says so, and the run endpoint that goes with it."""

    mode: str = "allow-list"
    header: str = ""
    value: str = ""
    exchange: _Request | None = None  # gives a new value

    @classmethod
    def choose(cls, **values: str | None) -> _Credential:
        """The one that was given; none is the allow-list mode, more than one an error."""
        given = {name: value for name, value in values.items() if value is not None}
        _require(len(given) < 2, f"Give one credential, not {' and '.join(given)}: who is the client?")
        for name, value in given.items():
            _require_header_value(name, value)
            bare_jwt = name == "jwt_token" and not value.startswith("Bearer ")
            return cls(name, _CREDENTIAL_HEADERS[name], f"Bearer {value}" if bare_jwt else value)
        return cls()

    def __repr__(self) -> str:
        return self.mode

    @property
    def headers(self) -> dict[str, str]:
        return {self.header: self.value} if self.header else {}

    @property
    def run_path(self) -> str:
        return "/v1/internal/run" if self.header in ("", "X-Internal-Token") else "/v1/run"


def _require_header_value(name: str, value: Any) -> None:
    """Refuses what a header cannot carry, without showing it as `http.client` would."""
    _require(isinstance(value, str) and value.strip(), f"{name} must be a string that is not empty.")
    carried = re.fullmatch(r"[\x20-\x7e\xa0-\xff]*", value)
    _require(carried, f"{name} has a line break, a control character or one outside latin-1 in it.")


# --- Connections ----------------------------------------------------------------------------------

_WIRE_FAULTS: Final = (OSError, http.client.HTTPException)
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;.*)?\r?\n")
_EMPTY_LINES: Final = (b"\r\n", b"\n")


def _lost(request: _Request, error: Exception, doing: str, *, sent: bool = True) -> GatewayError:
    """The error for an answer that did not come, or not whole. `sent`: the gateway may have acted."""
    timed_out = isinstance(error, (socket.timeout, TimeoutError))
    reason = f"nothing for {request.timeout} s" if timed_out else str(error) or type(error).__name__
    remedies = ["A larger timeout= waits longer."] if timed_out else []
    if sent and not request.repeatable:
        remedies.insert(0, "It may have run all the same, so it was not sent again.")
    message = f"{request}: {doing}: {reason}\n{' '.join(remedies)}".rstrip()
    lost = (GatewayTimeoutError if timed_out else ServiceUnavailableError)(request.hide(message))
    lost.may_have_run = sent
    # A cause that quotes a secret, as a garbled status line may, would show it in the traceback.
    lost.__cause__ = error if request.hide(str(error)) == str(error) else None
    return lost


class _HeadReader(io.BufferedReader):
    """Makes an end inside of a head an error; `http.client` takes it for the end of the head."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            raise http.client.RemoteDisconnected("the connection was closed before an answer")
        return line


class _Response(http.client.HTTPResponse):
    """An answer whose head was read. It has its connection until its body was read to the end."""

    def __init__(self, request: _Request, connection: _Connection, pool: _Pool) -> None:
        super().__init__(connection.sock, method=request.method)
        self.fp = _HeadReader(self.fp.detach())
        self.request = request
        self._connection: _Connection | None = connection
        self._pool = pool

    def begin(self) -> None:
        """Reads the head, past all interim answers (RFC 9110 §15.2); `http.client` skips 100 only."""
        for _ in range(_MAX_INTERIM_ANSWERS):
            super().begin()
            if self.status >= 200:
                break
            self.__dict__["headers"] = None  # by which `http.client` knows that it is to read one
        if self.status < 200 or (not self.framed and "Content-Length" in self.headers):
            raise http.client.HTTPException("an answer without an end")

    @property
    def framed(self) -> bool:
        """Whether the body says where it ends; if not, a break looks like the end."""
        return self.chunked or self.length is not None

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives. At its end the connection goes back to the pool.

        Raises:
            ServiceUnavailableError: it was cut short, or nothing came for too long.
        """
        try:
            yield from self._dechunked() if self.chunked else self._take(self.length)
            if self._connection and not self.will_close:
                self._pool.give(self._connection)
                self._connection = None
        except _WIRE_FAULTS as error:
            raise _lost(self.request, error, f"the answer ({self.status}) was cut short")
        finally:
            self.close()

    def _take(self, left: int | None) -> Iterator[bytes]:
        while left != 0:
            chunk = self.fp.read1(_BLOCK_BYTES if left is None else min(left, _BLOCK_BYTES))
            if not chunk:
                if left is None:
                    return
                raise http.client.IncompleteRead(b"", left)  # its own read1 takes it for the end
            left = None if left is None else left - len(chunk)
            yield chunk

    def _dechunked(self) -> Iterator[bytes]:
        """The payload of a chunked body (RFC 9112 §7.1); its own reader accepts a size of "-5"."""
        readline = functools.partial(io.BufferedReader.readline, self.fp)
        while True:
            size = _CHUNK_SIZE.fullmatch(readline(_MAX_LINE_BYTES))
            if not size:
                raise http.client.HTTPException("a chunk without a size")
            left = int(size[1], 16)
            if not left:
                break
            yield from self._take(left)
            if readline(2) not in _EMPTY_LINES:
                raise http.client.HTTPException("a chunk of another size than it said")
        while readline(_MAX_LINE_BYTES) not in (*_EMPTY_LINES, b""):
            pass  # trailers

    def limit_wait(self, seconds: float) -> None:
        """Shortens the wait for bytes."""
        if self._connection and (self.request.timeout is None or self.request.timeout > seconds):
            self._connection.sock.settimeout(seconds)

    def close(self) -> None:
        """Closes the connection too, unless it went back to the pool."""
        connection, self._connection = self._connection, None
        if connection:
            connection.close()
        super().close()


class _Connection:
    """An open socket to an origin, straight or through a proxy."""

    def __init__(self, origin: _Origin, timeout: float | None, tls: ssl.SSLContext | None) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self._target_prefix = ""
        self._proxy_headers: dict[str, str] = {}
        hop, headers = _proxy_for(origin) or (origin, None)
        opener = http.client.HTTPConnection(hop.host, hop.port, timeout=timeout)
        if tls:
            opener = http.client.HTTPSConnection(hop.host, hop.port, timeout=timeout, context=tls)
            if headers is not None:
                opener.set_tunnel(origin.host, origin.port, headers)
        elif headers is not None:  # a proxy wants the whole URL (RFC 9112 §3.2.2)
            self._target_prefix, self._proxy_headers = str(origin), headers
        try:
            opener.connect()  # with TCP_NODELAY
        except BaseException:
            opener.close()
            raise
        self.sock: socket.socket = opener.sock

    def close(self) -> None:
        """Closes the socket, and ends another thread's wait for it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def usable(self) -> bool:
        """Whether it may be used again: not idle for long, and nothing to read, not even an end."""
        return time.monotonic() - self.idle_since < _IDLE_SECONDS and not self._readable()

    def _readable(self) -> bool:
        self.sock.setblocking(False)
        try:  # past TLS, which refuses to peek; when no answer is due, there is nothing to decrypt
            socket.socket.recv(self.sock, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def exchange(self, request: _Request, pool: _Pool) -> _Response:
        """Sends a request and reads the head of its answer.

        Raises:
            ServiceUnavailableError: there was none.
        """
        self.sock.settimeout(request.timeout)
        broken: GatewayError | None = None
        try:
            self._send(request)
        except ServiceUnavailableError as error:
            if isinstance(error, GatewayTimeoutError) and not self._readable():
                raise
            broken = error  # the answer may be there all the same: 413, then a hang-up
            self.sock.settimeout(request.timeout)
        response = _Response(request, self, pool)
        try:
            response.begin()
        except _WIRE_FAULTS as error:
            raise broken or _lost(request, error, "no answer")
        response.will_close = response.will_close or broken is not None
        return response

    def _send(self, request: _Request) -> None:
        body = request.body if isinstance(request.body, _Body) else _Body(request.body)
        lines = [
            f"{request.method} {self._target_prefix}{request.target} HTTP/1.1",
            f"Host: {request.origin.netloc}",
            f"User-Agent: agent-builder-gateway-sdk/{__version__}",
            "Accept: */*",
            "Accept-Encoding: identity",
            *(f"{name}: {value}" for name, value in {**request.headers, **self._proxy_headers}.items()),
        ]
        if request.method in ("POST", "PUT"):
            lines.append(f"Content-Length: {len(body)}")
        # One write for both: a body by itself would be a packet by itself.
        self._write(request, "\r\n".join((*lines, "\r\n")).encode("latin-1") + body.head)
        if body.file:
            self._send_file(request, body, body.file)
            self._write(request, body.tail)

    def _send_file(self, request: _Request, body: _Body, file: BinaryIO) -> None:
        done, total = 0, body.file_length
        sendfile = self.origin.scheme == "http" and hasattr(os, "sendfile")
        file.seek(0)
        body.on_progress(0, total)
        while done < total:
            if sendfile:
                try:
                    sent = self.sock.sendfile(file, done, min(total - done, _SENDFILE_BYTES))
                except OSError as error:
                    raise _lost(request, error, "sending broke off")
            else:
                block = file.read(min(total - done, _BLOCK_BYTES))
                self._write(request, block)
                sent = len(block)
            if not sent:
                raise GatewayError(f"{request}: the file became shorter while it was being sent.")
            done += sent
            body.on_progress(done, total)

    def _write(self, request: _Request, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:  # not sendall: its timeout would be for the whole of it
                left = left[self.sock.send(left) :]
        except OSError as error:
            raise _lost(request, error, "sending broke off")


def _proxy_for(origin: _Origin) -> tuple[_Origin, dict[str, str]] | None:
    """The proxy that the environment or the system sets for an origin, and the headers for it."""
    import urllib.request  # dear, and needed for new connections only

    proxy = urllib.request.getproxies().get(origin.scheme)
    names = (origin.host, f"{origin.host}:{origin.port}")
    if not proxy or any(urllib.request.proxy_bypass(name) for name in names):
        return None
    scheme, _, rest = (proxy if "://" in proxy else f"http://{proxy}").partition("://")
    login, _, address = rest.rpartition("@")
    try:
        hop, _ = _split_url(f"{scheme}://{address}")
        if hop.scheme == "https":
            raise ValueError("is not an http:// URL")
    except ValueError as error:
        raise GatewayError(f"{origin.scheme.upper()}_PROXY {error}: other proxies cannot be used.") from None
    encoded = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
    return hop, {"Proxy-Authorization": f"Basic {encoded}"} if login else {}


class _Pool:
    """Idle connections by origin; the last one used is the first to be used again.

    Needs no lock, as a deque's `append` and `pop` are atomic, so a fork can't leave one held. A
    child process does not see its parent's connections: the keys have the process id.
    """

    def __init__(self) -> None:
        self._idle: dict[tuple[int, _Origin], collections.deque[_Connection]] = {}
        self._closed = False

    def __reduce__(self) -> tuple[type[_Pool], tuple[()]]:
        return _Pool, ()  # sockets stay where they are

    def take(self, origin: _Origin) -> _Connection | None:
        """An idle connection that can be used, or None."""
        idle = self._idle.get((os.getpid(), origin))
        with contextlib.suppress(IndexError):  # another thread took the last one
            while idle:
                connection = idle.pop()
                if connection.usable():
                    return connection
                connection.close()
        return None

    def give(self, connection: _Connection) -> None:
        """Keeps a connection for its next use, and drops those that were idle for too long."""
        connection.idle_since = time.monotonic()
        key = (os.getpid(), connection.origin)
        self._idle.setdefault(key, collections.deque()).append(connection)
        self._drop(0 if self._closed else _MAX_IDLE_CONNECTIONS, connection.idle_since - _IDLE_SECONDS)

    def close(self) -> None:
        """Closes the idle connections now, and those in use when they come back."""
        self._closed = True
        self._drop(0, 0.0)

    __del__ = close

    def _drop(self, keep: int, idle_since: float) -> None:
        for idle in list(self._idle.values()):
            with contextlib.suppress(IndexError):
                while len(idle) > keep or idle[0].idle_since < idle_since:
                    idle.popleft().sock.close()


# --- Transport ------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decode_answer: Final = json.JSONDecoder(parse_constant=_refuse_constant).decode


def _unusable(response: _Response, body: bytes, problem: str) -> GatewayError:
    """The error for a 2xx that is not what the endpoint promises. It keeps the body in `details`."""
    text = response.request.hide(body.decode("utf-8", "replace"))
    message = f"{response.request} answered {response.status}, but {problem}: {text[:_SHOWN_CHARACTERS]}"
    error = GatewayError(message, {"body": text})
    error.status_code, error.may_have_run = response.status, True
    return error


def _read_json(response: _Response, kind: Any, **fields: Any) -> Any:
    """The body as JSON of this type; `fields` must be in it, with these types."""
    body = b"".join(response.chunks())
    try:
        answer = _decode_answer(body.decode().lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise _unusable(response, body, "the body is not JSON" if body else "has no body") from error
    if not isinstance(answer, kind):
        raise _unusable(response, body, f"the body is not a JSON {kind.__name__}")
    for name, field_kind in fields.items():
        if not isinstance(answer.get(name), field_kind):
            raise _unusable(response, body, f"{name!r} is not a {field_kind.__name__}")
    return answer


def _drain(response: _Response) -> None:
    """Reads the body and forgets it, so that the connection can be used again."""
    for _ in response.chunks():
        pass


def _status_error(response: _Response) -> GatewayError:
    """The error for an answer that is not a 2xx, whatever its body looks like."""
    request, status, body = response.request, response.status, b""
    with contextlib.closing(response), contextlib.suppress(ServiceUnavailableError):
        for chunk in response.chunks():  # if it breaks off, the status says enough
            body += chunk
            if len(body) > _MAX_ERROR_BYTES:
                break
    message, fields = _read_problem(body, request.hide)
    key = (status, str(fields.get("error_code"))) if status == 400 else status
    error_class = _STATUS_ERRORS.get(key, ServiceUnavailableError if status >= 500 else GatewayError)
    if status < 500 and (not request.to_gateway or (status == 404 and request.prefab is None)):
        error_class = GatewayError
    if status < 400:
        address = request.hide(response.headers.get("Location", "nowhere").partition("?")[0])
        message = f"a redirect to {address}, which is not followed. Is base_url right?"
    text = f"{request} answered {status}: {message or response.reason}"
    error = error_class._from_answer(text, {**(request.prefab or {}), **fields})
    error.status_code, error.may_have_run = status, status >= 500
    error.retry_after = _retry_after_seconds(response.headers.get("Retry-After", ""))
    return error


def _redirected(response: _Response) -> _Request:
    """The request that a redirect asks for (RFC 9110 §15.4)."""
    response.close()
    request, location = response.request, response.headers.get("Location", "")
    try:
        origin, target = _split_url(urllib.parse.urljoin(f"{request.origin}{request.target}", location))
        if (request.origin.scheme, origin.scheme) == ("https", "http"):
            raise ValueError("leads from https to http")
    except ValueError as error:
        raise GatewayError(f"{request} answered {response.status}, but its Location {error}.") from None
    return dataclasses.replace(request, origin=origin, target=target)


def _retry_delay(request: _Request, error: GatewayError, attempt: int, max_retries: int) -> float | None:
    """Seconds before `request` may be sent again; None if it must not be."""
    import random  # dear, and needed after a failure only

    passing = isinstance(error, ServiceUnavailableError) and error.status_code in (None, 502, 503, 504)
    if attempt > max_retries or not passing or isinstance(error, GatewayTimeoutError):
        return None
    if error.may_have_run and not request.repeatable:
        return None
    if error.retry_after is not None:
        return error.retry_after if error.retry_after <= _RETRY_AFTER_CAP_SECONDS else None
    return random.uniform(0, min(_BACKOFF_CAP_SECONDS, _BACKOFF_BASE_SECONDS * 2 ** (attempt - 1)))


class _Transport:
    """Sends requests: the one place that retries. It knows HTTP, and nothing of prefabs."""

    def __init__(self, credential: _Credential, max_retries: int, ssl_context: ssl.SSLContext | None) -> None:
        self.credential = credential
        self.max_retries = max_retries
        self.pool = _Pool()
        self._given_context = ssl_context
        self._context = ssl_context
        self._locks: dict[int, threading.Lock] = {}  # by process: one held over a fork stays held

    def __getstate__(self) -> dict[str, Any]:
        if self._given_context:
            raise TypeError("A client with an ssl_context cannot be pickled; SSL_CERT_FILE may do.")
        return {**self.__dict__, "_context": None, "_locks": {}}

    def send(self, request: _Request, read: Callable[[_Response], _T]) -> _T:
        """What `read` makes of the answer to `request`, after as many attempts as are allowed.

        Raises:
            GatewayError: there was no answer, or none with a status of 2xx.
        """
        attempt, renewed = 1, False
        while True:
            credential = self.credential.value
            if request.authenticated:
                request.headers.update(self.credential.headers)
            try:
                response = self._open(request, attempt)
                try:
                    return read(response)
                except BaseException:
                    response.close()
                    raise
            except GatewayError as error:
                renewable = self.credential.exchange and request.authenticated and not renewed
                if error.status_code == 401 and renewable:
                    self.renew(credential)
                    renewed = True
                    continue
                delay = _retry_delay(request, error, attempt, self.max_retries)
                if delay is None:
                    raise
                attempt += 1
                logger.debug("%s; attempt %d in %.1f s", error.message, attempt, delay)
            time.sleep(delay)

    def renew(self, refused: str) -> None:
        """Exchanges the API key for a new token, unless another thread has done so meanwhile."""
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            if self.credential.exchange and self.credential.value == refused:
                read = functools.partial(_read_json, kind=dict, internal_token=str)
                token = self.send(self.credential.exchange, read)["internal_token"]
                _require_header_value("The gateway's internal_token", token)
                self.credential.value = token

    def _open(self, request: _Request, attempt: int) -> _Response:
        """An answer with a status of 2xx, its body still to be read."""
        for _ in range(1 + _MAX_REDIRECTS):
            response = self._exchange(request, attempt)
            if response.status < 300:
                return response
            presigned_get = request.method == "GET" and not request.to_gateway
            if not (presigned_get and response.status in (301, 302, 303, 307, 308)):
                raise _status_error(response)
            request = _redirected(response)
        raise GatewayError(f"{request}: more than {_MAX_REDIRECTS} redirects")

    def _exchange(self, request: _Request, attempt: int) -> _Response:
        started = time.perf_counter()
        outcome: int | str = "failed"
        connection = self.pool.take(request.origin) if attempt == 1 else None
        try:
            connection = connection or self._connect(request)
            try:
                response = connection.exchange(request, self.pool)
            except BaseException:
                connection.close()
                raise
            outcome = response.status
            return response
        finally:
            if logger.isEnabledFor(logging.DEBUG):
                milliseconds = 1000 * (time.perf_counter() - started)
                logger.debug("%s %s %.0f ms, attempt %d", request, outcome, milliseconds, attempt)

    def _connect(self, request: _Request) -> _Connection:
        try:
            return _Connection(request.origin, request.timeout, self._tls(request.origin))
        except (*_WIRE_FAULTS, UnicodeError) as error:
            raise _lost(request, error, f"no connection to {request.origin}", sent=False)

    def _tls(self, origin: _Origin) -> ssl.SSLContext | None:
        if origin.scheme == "https" and not self._context:
            try:
                import ssl  # there are Pythons without it; they can do http
            except ImportError as error:
                raise GatewayError("https needs Python's ssl module, which is missing here.") from error
            self._context = ssl.create_default_context()  # dear: once a client
        return self._context if origin.scheme == "https" else None


# --- Event stream ---------------------------------------------------------------------------------

_decode_json: Final = json.JSONDecoder().raw_decode


def _event_blocks(chunks: Iterable[bytes]) -> Iterator[str]:
    """The texts between blank lines, as they arrive, with LF for line ends (WHATWG HTML §9.2.6).

    What follows the last blank line is the last block. A line that ended with CR is not held back
    to see whether LF follows.
    """
    pending = [b""]  # joined once per block: a large event comes in very many pieces
    after_cr = False
    codec = "utf-8-sig"  # of the first block, in front of which a byte order mark may stand
    for chunk in chunks:
        chunk = chunk[1:] if after_cr and chunk.startswith(b"\n") else chunk
        if not chunk:
            continue
        after_cr = chunk.endswith(b"\r")
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        blank = b"\n\n" in chunk or (chunk.startswith(b"\n") and pending[-1].endswith(b"\n"))
        pending.append(chunk)
        if blank:
            *blocks, rest = b"".join(pending).split(b"\n\n")
            pending = [rest]
            for block in blocks:
                yield block.decode(codec, "replace")
                codec = "utf-8"
    yield b"".join(pending).decode(codec, "replace")


def _block_events(block: str) -> list[StreamEvent]:
    """The event of a block: several if blank lines were left out, none if there is no data."""
    name, lines = "", []
    for line in block.split("\n"):
        field, _, value = line.partition(":")
        if field == "data":
            lines.append(value[value.startswith(" ") :])
        elif field == "event":
            name = value[value.startswith(" ") :]
    data = "\n".join(lines)
    for candidates in ([data], lines):
        with contextlib.suppress(ValueError, RecursionError):
            return [_json_event(candidate, name) for candidate in candidates if data]
    name = "done" if data == "[DONE]" else name
    event_type = _EVENT_TYPES.get(name, StreamEventType.CONTENT)
    return [StreamEvent(event_type, data, {"type": str(event_type), "data": data})]


def _json_event(data: str, name: str = "") -> StreamEvent:
    """The event whose data is JSON; `name`, its `event` field, counts where the JSON has no type."""
    data = data.strip(" \t\n\r")
    value, end = _decode_json(data)
    if end != len(data):
        raise ValueError("text behind the JSON")
    if value.__class__ is dict and value.get("type").__class__ is str:
        return StreamEvent.from_dict(value)
    raw = value if isinstance(value, dict) else {"data": value}
    return StreamEvent(_EVENT_TYPES.get(name, StreamEventType.CONTENT), value, raw)


def _parse_events(chunks: Iterable[bytes]) -> Iterator[StreamEvent]:
    """The events of a stream, each as soon as its blank line has arrived."""
    for block in _event_blocks(chunks):
        if block.startswith("data: {") and "\n" not in block:
            # As nearly every block does; to read it at once saves half of an event's time.
            try:
                event = _json_event(block[6:])
            except (ValueError, RecursionError):
                pass
            else:
                yield event
                continue
        yield from _block_events(block)


class EventStream:
    """The events of one call, each handed over as it arrives: an iterator and a context manager.

    Leaving a `for` loop over it, `close()`, the end of a `with` and garbage collection end the
    stream and free its connection; `next()` takes events in portions. An `error` event is yielded,
    not raised.

    Raises (from iterating):
        ServiceUnavailableError: the connection broke: the stream is not complete.
        GatewayTimeoutError: nothing came for `timeout` seconds.
    """

    def __init__(self, events: Iterator[StreamEvent], response: _Response | None = None) -> None:
        self._events = events
        self._response = response

    def __iter__(self) -> Iterator[StreamEvent]:
        try:
            yield from self._events
        finally:
            self.close()

    def __next__(self) -> StreamEvent:
        return next(self._events)

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream. May be called twice, and from another thread to end its wait."""
        self._events = iter(())
        if self._response:
            self._response.close()


def _read_events(response: _Response) -> Iterator[StreamEvent]:
    """The events of an answer.

    Raises:
        ServiceUnavailableError: the connection broke before `done` or `error`, or the stream ended
            without them where a break would look just like the end.
    """
    ended = False
    try:
        for event in _parse_events(response.chunks()):
            if event.type in _LAST_EVENTS and not ended:
                ended = True
                response.limit_wait(_AFTER_DONE_SECONDS)
            yield event
    except ServiceUnavailableError:
        if not ended:
            raise
    if not (ended or response.framed):
        raise _lost(response.request, EOFError("no done or error event"), "the stream was cut short")


def _is_event_stream(response: _Response) -> bool:
    return response.headers.get_content_type() == "text/event-stream"


def _read_results(response: _Response, count: int = 1) -> tuple[str | None, list[PrefabResult]]:
    """The job id and the results of a run request with `count` calls."""
    if _is_event_stream(response):
        return None, [_result_of_events(response)]
    answer = _read_json(response, dict, results=list)
    job_id, entries = answer.get("job_id"), answer["results"]
    if len(entries) != count or not all(isinstance(entry, dict) for entry in entries):
        body = json.dumps(answer).encode()
        raise _unusable(response, body, f"'results' is not a list of {count} objects")
    return job_id, [PrefabResult._from_dict(entry, job_id) for entry in entries]


def _read_stream(response: _Response) -> EventStream:
    """The events of a run request, also of a function that does not stream."""
    if _is_event_stream(response):
        return EventStream(_read_events(response), response)
    (result,) = _read_results(response)[1]
    if result.is_success():
        events = [{"type": "content", "data": result.get_result()}, {"type": "done", "data": None}]
    else:
        events = [{"type": "error", "data": result.error or {"message": f"It ended as {result.status}."}}]
    return EventStream(map(StreamEvent.from_dict, events))


def _result_of_events(response: _Response) -> PrefabResult:
    """The result of a streaming function that was called without `stream=True`."""
    contents: list[Any] = []
    last: dict[StreamEventType, StreamEvent] = {}
    try:
        for event in _read_events(response):
            last[event.type] = event
            if event.type is StreamEventType.CONTENT:
                contents.append(event.data)
    except ServiceUnavailableError as error:
        error.details["partial_output"] = contents  # which was paid for
        raise
    value = "".join(contents) if all(isinstance(content, str) for content in contents) else contents
    error_event, done_event = last.get(StreamEventType.ERROR), last.get(StreamEventType.DONE)
    if error_event:
        problem = _error_dict(error_event.raw if error_event.data is None else error_event.data)
        code = {key: error_event.raw[key] for key in ("error_code",) if key in error_event.raw}
        return PrefabResult(CallStatus.FAILED, {"status": "FAILED", "output": value}, {**code, **problem})
    if done_event and done_event.data and not contents:
        value = done_event.data
    return PrefabResult(CallStatus.SUCCESS, {"status": "SUCCESS", "output": value})


# --- Files ----------------------------------------------------------------------------------------


def _file_name(path: _Path) -> str:
    """The last part of a path as text that can be sent, also where it is not Unicode."""
    return os.fsencode(os.path.basename(path)).decode("utf-8", "replace")


@contextlib.contextmanager
def _open_file(path: _Path) -> Iterator[BinaryIO]:
    with open(path, "rb") as file:
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        _require(regular, f"{path} is not a regular file, so its length is not known beforehand.")
        yield file


def _multipart(fields: Mapping[str, str], file: BinaryIO, on_progress: _Progress | None) -> tuple[str, _Body]:
    """Content type and body of `fields`, then `file`, as `multipart/form-data` (RFC 7578).

    File names go out as browsers send them: UTF-8, with quotes and line breaks percent-encoded.
    """
    import mimetypes  # reads the system's tables: for uploads only

    boundary, name = uuid.uuid4().hex, _file_name(file.name)
    media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    for character, escaped in (('"', "%22"), ("\r", "%0D"), ("\n", "%0A")):
        name = name.replace(character, escaped)
    part = f"--{boundary}\r\nContent-Disposition: form-data; name="
    head = "".join(f'{part}"{key}"\r\n\r\n{value}\r\n' for key, value in fields.items())
    head += f'{part}"file"; filename="{name}"\r\nContent-Type: {media_type}\r\n\r\n'
    tail = f"\r\n--{boundary}--\r\n"
    return f"multipart/form-data; boundary={boundary}", _Body(head.encode(), file, tail.encode(), on_progress)


class _Download:
    """Writes answers to a file: after a break, the next one goes on where the last one ended.

    The bytes go to a new file beside the target, which takes the target's place when it is whole.
    """

    def __init__(self, request: _Request, target: str, on_progress: _Progress | None) -> None:
        self._request = request
        self._target = target
        self._on_progress = on_progress or (lambda _done, _total: None)
        self._file: Any = None
        self._new_folders: list[str] = []
        self._done = 0
        self._etag = ""

    def __enter__(self) -> _Download:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._file:
            self._file.close()
            if not error_type:
                os.replace(self._file.name, self._target)
                return
            os.unlink(self._file.name)
        for folder in self._new_folders:
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def _open(self) -> BinaryIO:
        folder = parent = os.path.dirname(self._target)
        while not os.path.isdir(parent):
            self._new_folders.append(parent)
            parent = os.path.dirname(parent)
        os.makedirs(folder, exist_ok=True)
        return open(os.path.join(folder, f".{uuid.uuid4().hex}.part"), "xb")

    def start_over(self) -> None:
        """Asks for the whole object next time."""
        self._done, self._etag = 0, ""
        self._request.headers.clear()

    def receive(self, response: _Response) -> None:
        """Writes the body, and turns the request into one for what is still missing."""
        if not response.framed:
            raise GatewayError(f"{self._request}: no length was given, so a part could pass for the whole.")
        self._file = self._file or self._open()
        etag, total = response.headers.get("ETag", ""), response.length
        if response.status == 206:
            span = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if not span or int(span[1]) != self._done or etag != self._etag:
                self.start_over()
                raise ServiceUnavailableError(f"{self._request}: the object changed in between.")
            total = None if total is None else self._done + total
        else:
            self.start_over()
            self._etag = etag
            self._file.truncate(self._file.seek(0))
        try:
            self._on_progress(self._done, total)
            for chunk in response.chunks():
                self._file.write(chunk)
                self._done += len(chunk)
                self._on_progress(self._done, total)
        finally:
            if self._etag.startswith('"'):  # a weak one cannot tell (RFC 9110 §13.1.5)
                self._request.headers.update({"Range": f"bytes={self._done}-", "If-Range": self._etag})


# --- Client ---------------------------------------------------------------------------------------

_encode_json: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _encode_calls(calls: Sequence[PrefabCall]) -> bytes:
    """The body of a run request. A parameter that JSON cannot carry is named in the error."""
    try:
        return _encode_json({"calls": [call.to_dict() for call in calls]}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        for call in calls:
            for key, value in (call.parameters or {}).items():
                with contextlib.suppress(TypeError, ValueError, RecursionError):
                    _encode_json({key: value}).encode()
                    continue
                where = f"Parameter {key!r} of {call.function_name!r}"
                raise ValidationError(f"{where} cannot be sent as JSON: {error}.") from error
        raise ValidationError(f"The call cannot be sent as JSON: {error}.") from error


def _require_s3_url(what: str, url: Any) -> None:
    _require(
        isinstance(url, str) and re.match("s3://.", url),
        f"{what} must be an s3:// URL, not {url!r}. client.upload_input_file(path) uploads a file and gives one.",
    )


def _require_call(call: Any) -> None:
    _require(isinstance(call, PrefabCall), f"A call must be a PrefabCall, not {type(call).__name__}.")
    for name in ("prefab_id", "version", "function_name"):
        value = getattr(call, name)
        _require(isinstance(value, str) and value, f"{name} must be a string that is not empty.")
    for name in ("parameters", "files"):
        value = getattr(call, name)
        _require(value is None or isinstance(value, dict), f"{name} must be a dict, not {value!r}.")
    for name, urls in (call.files or {}).items():
        # A bare string would be read as a list of its characters.
        for url in urls if isinstance(urls, (list, tuple)) else [urls]:
            _require_s3_url(f"files[{name!r}] must be a list, each of which", url)
        _require(not isinstance(urls, str), f"files[{name!r}] must be a list of s3:// URLs: [{urls!r}].")


def _segment(name: str, value: Any) -> str:
    """`value` as one segment of a path, with its slashes encoded."""
    _require(isinstance(value, str) and value not in ("", ".", ".."), f"{name} cannot be {value!r}.")
    return urllib.parse.quote(value, safe="")


def _require_seconds(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and 0 < value <= threading.TIMEOUT_MAX
    _require(value is None or number, f"{name} must be a positive number of seconds or None, not {value!r}.")


def _run_one(client: GatewayClient, request: _Request) -> PrefabResult:
    """A batch's unit of work. Any executor can run it: it is picklable, with all that it takes."""
    try:
        return client._transport.send(request, _read_results)[1][0]
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the other results
        return PrefabResult._from_exception(error)


def _is_refused(result: PrefabResult | None) -> bool:
    return bool(result and result.exception and result.exception.status_code == 401)


class Prefab:
    """A version of a prefab. Any function is a method: `llm.chat(...)` is `llm.call("chat", ...)`."""

    def __init__(self, client: GatewayClient, prefab_id: str, version: str) -> None:
        self._client = client
        self.prefab_id = prefab_id
        self.version = version

    def __repr__(self) -> str:
        return f"Prefab({self.prefab_id!r}, {self.version!r})"

    def call(self, function_name: str, /, *, files: _Files | None = None, **parameters: Any) -> PrefabResult:
        """Runs a function: see `GatewayClient.run`."""
        return self._client.run(self.prefab_id, self.version, function_name, parameters, files)

    def stream(self, function_name: str, /, *, files: _Files | None = None, **parameters: Any) -> EventStream:
        """Runs a function and gives its events: see `GatewayClient.run`."""
        return self._client.run(self.prefab_id, self.version, function_name, parameters, files, stream=True)

    def __getattr__(self, name: str) -> Callable[..., PrefabResult]:
        if name.startswith("_"):  # copy, pickle and debuggers ask for those
            raise AttributeError(name)
        return functools.partial(self.call, name)


class GatewayClient:
    """A client of one gateway. Threads can share it; it can be pickled, and used after a fork.

    Args:
        base_url: The gateway's http(s) URL, with a path prefix if there is one. None: the
            environment's `GATEWAY_BASE_URL`, else `DEFAULT_BASE_URL`.
        api_key: An API key to be sent as such; `from_api_key` exchanges one.
        jwt_token: A JWT, with or without `Bearer `.
        timeout: Seconds for connecting, and for each wait for bytes; None waits for ever.
        internal_token: The token that the gateway gave to an agent or a prefab.
        max_retries: How often a request is sent again, if that can do no harm.
        ssl_context: For https; None trusts the system's certificates, or those of `SSL_CERT_FILE`.

    Without a credential, the gateway must have this machine's address on its allow-list.

    All methods that send may raise AuthenticationError, ServiceUnavailableError (no answer, or a
    5xx), its subclass GatewayTimeoutError, and GatewayError (an answer that is none). Methods list
    what else they raise.

    Raises:
        ValidationError: a value that cannot be right, or more than one credential.
    """

    def __init__(self, base_url: str | None = None, api_key: str | None = None,
                 jwt_token: str | None = None, timeout: float | None = 60, *,
                 internal_token: str | None = None, max_retries: int = 2,
                 ssl_context: ssl.SSLContext | None = None) -> None:
        if base_url is None:
            base_url = os.environ.get("GATEWAY_BASE_URL") or DEFAULT_BASE_URL
        try:
            self._origin, target = _split_url(base_url)
        except ValueError as error:
            raise ValidationError(f"base_url {error}. A token goes into internal_token=.") from None
        _require("?" not in base_url and "#" not in base_url, "base_url must not have a query.")
        retries = isinstance(max_retries, int) and max_retries >= 0
        _require(retries, f"max_retries must be 0 or more, not {max_retries!r}.")
        _require_seconds("timeout", timeout)
        self._prefix = target.rstrip("/")
        self.base_url = f"{self._origin}{self._prefix}"
        self.timeout = timeout
        credential = _Credential.choose(internal_token=internal_token, api_key=api_key, jwt_token=jwt_token)
        self._transport = _Transport(credential, max_retries, ssl_context)

    @classmethod
    def from_api_key(cls, api_key: str, base_url: str | None = None, timeout: float | None = 60,
                     **options: Any) -> GatewayClient:
        """A client with the internal token that the gateway gives for an API key, now and whenever
        it has expired. `POST /v1/auth/convert_to_internal_token`

        Args:
            options: `max_retries` and `ssl_context`, as of the class.

        Raises:
            AuthenticationError: the key is wrong or expired.
        """
        _require_header_value("api_key", api_key)
        client = cls(base_url, timeout=timeout, **options)
        exchange = client._request("POST", "/v1/auth/convert_to_internal_token", repeatable=True)
        exchange.headers["Authorization"] = f"Bearer {api_key}"
        exchange.authenticated = False
        client._transport.credential = _Credential("exchanged api_key", "X-Internal-Token", "", exchange)
        client._transport.renew("")
        return client

    @classmethod
    def from_env(cls, **options: Any) -> GatewayClient:
        """A client with the credential of the environment: `X_INTERNAL_TOKEN`, `AGENT_BUILDER_API_KEY`
        (which is exchanged) or `GATEWAY_JWT_TOKEN`; without any of them, in allow-list mode.

        Args:
            options: `base_url`, `timeout`, `max_retries` and `ssl_context`, as of the class.

        Raises:
            ValidationError: more than one of them is set.
        """
        names = ("X_INTERNAL_TOKEN", "AGENT_BUILDER_API_KEY", "GATEWAY_JWT_TOKEN")
        given = {name: os.environ[name] for name in names if os.environ.get(name)}
        _require(len(given) < 2, f"Set one credential, not {' and '.join(given)}: who is the client?")
        if "AGENT_BUILDER_API_KEY" in given:
            return cls.from_api_key(given["AGENT_BUILDER_API_KEY"], **options)
        jwt_token, internal_token = given.get("GATEWAY_JWT_TOKEN"), given.get("X_INTERNAL_TOKEN")
        return cls(jwt_token=jwt_token, internal_token=internal_token, **options)

    def __repr__(self) -> str:
        return f"GatewayClient({self.base_url!r}, {self._transport.credential.mode})"

    def __enter__(self) -> GatewayClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the idle connections. May be called twice."""
        self._transport.pool.close()

    # Running

    @overload
    def run(self, prefab_id: str, version: str, function_name: str,
            parameters: dict[str, Any] | None = None, files: _Files | None = None,
            stream: Literal[False] = False, *, timeout: float | None = None) -> PrefabResult: ...

    @overload
    def run(self, prefab_id: str, version: str, function_name: str,
            parameters: dict[str, Any] | None = None, files: _Files | None = None, *,
            stream: Literal[True], timeout: float | None = None) -> EventStream: ...

    @overload
    def run(self, prefab_id: str, version: str, function_name: str,
            parameters: dict[str, Any] | None = None, files: _Files | None = None,
            stream: bool = False, *, timeout: float | None = None) -> PrefabResult | EventStream: ...

    def run(self, prefab_id: str, version: str, function_name: str,
            parameters: dict[str, Any] | None = None, files: _Files | None = None,
            stream: bool = False, *, timeout: float | None = None) -> PrefabResult | EventStream:
        """Runs a function. `POST /v1/internal/run`, or `POST /v1/run` with an API key or a JWT.

        Args:
            files: An input's name to a list of `s3://` URLs.
            stream: Gives the function's events as they come, not its result at the end.
            timeout: Seconds, for this call; None: the client's.

        Returns:
            The result, also if the function failed (`is_success()`); with `stream=True` the events.

        Raises:
            ValidationError, PrefabNotFoundError, MissingSecretError, QuotaExceededError.
            ServiceUnavailableError: the call may have run, if `may_have_run` is true; it was sent
                once at the most.
        """
        call = PrefabCall(prefab_id, version, function_name, parameters, files)
        request = self._run_request([call], timeout)
        if stream:
            return self._transport.send(request, _read_stream)
        return self._transport.send(request, _read_results)[1][0]

    def run_batch(self, calls: Iterable[PrefabCall], *, max_workers: int = 8,
                  timeout: float | None = None,
                  on_result: Callable[[int, PrefabResult], object] | None = None,
                  executor: concurrent.futures.Executor | None = None,
                  single_request: bool = False) -> BatchResult:
        """Runs calls side by side, each a request of its own, so that none can cost another's result.

        Args:
            calls: Read and checked whole before anything is sent.
            max_workers: Threads, and so calls at a time.
            timeout: Seconds, for each call; None: the client's.
            on_result: Called in this thread with index and result, as each comes.
            executor: Runs the calls instead of threads: a process pool's, a cluster's.
            single_request: Sends one POST with all calls. The gateway runs them one after another,
                and fails them all with the first bad one.

        Returns:
            The results in the order of the calls; one that raised is FAILED and has `exception`.

        Raises:
            ValidationError: a call is bad; nothing was sent.
            AuthenticationError: a 401, when no call had a result; nothing was sent after it.
        """
        calls = list(calls)
        _require(isinstance(max_workers, int) and max_workers > 0, "max_workers must be 1 or more.")
        _require(not (single_request and executor), "A single request needs no executor.")
        if single_request and calls:
            read = functools.partial(_read_results, count=len(calls))
            job_id, results = self._transport.send(self._run_request(calls, timeout), read)
            for index, result in enumerate(results):
                if on_result:
                    on_result(index, result)
            return BatchResult._of(results, job_id)
        requests = [self._run_request([call], timeout) for call in calls]
        return BatchResult._of(self._run_all(requests, max_workers, on_result, executor))

    def _run_request(self, calls: Sequence[PrefabCall], timeout: float | None) -> _Request:
        for call in calls:
            _require_call(call)
        prefabs = {(call.prefab_id, call.version) for call in calls}
        prefab = dict(zip(("prefab_id", "version"), prefabs.pop())) if len(prefabs) == 1 else {}
        body, path = _encode_calls(calls), self._transport.credential.run_path
        return self._request("POST", path, body=body, timeout=timeout, prefab=prefab)

    def _run_all(self, requests: Sequence[_Request], max_workers: int, on_result: Any,
                 executor: concurrent.futures.Executor | None) -> list[PrefabResult]:
        """The results of single calls, from an executor or from threads."""
        arrived: queue.SimpleQueue[tuple[int, PrefabResult]] = queue.SimpleQueue()
        waiting = collections.deque(enumerate(requests if executor is None else ()))
        futures: list[concurrent.futures.Future[PrefabResult]] = []
        refused: GatewayError | None = None
        unsent = PrefabResult._from_exception(AuthenticationError("Not sent: an earlier call was refused."))

        def work() -> None:
            with contextlib.suppress(IndexError):
                while True:
                    index, request = waiting.popleft()
                    result = unsent if refused else _run_one(self, request)
                    arrived.put((index, note(result)))

        def note(result: PrefabResult) -> PrefabResult:
            nonlocal refused
            if result.exception and result.exception.status_code == 401:
                refused = result.exception
                for future in futures:
                    future.cancel()
            return result

        def report(index: int, future: concurrent.futures.Future[PrefabResult]) -> None:
            try:
                result = unsent if future.cancelled() else future.result()
            except Exception as error:  # noqa: BLE001 - a broken executor must not cost the others
                result = PrefabResult._from_exception(error)
            arrived.put((index, note(result)))

        results = [unsent] * len(requests)
        try:
            for _ in range(min(max_workers, len(waiting))):  # daemons: Ctrl-C does not wait for them
                threading.Thread(target=work, daemon=True).start()
            if executor is not None:
                futures += [executor.submit(_run_one, self, request) for request in requests]
                for index, future in enumerate(futures):
                    future.add_done_callback(functools.partial(report, index))
            for _ in requests:
                index, results[index] = arrived.get()
                if on_result:
                    on_result(index, results[index])
        finally:  # when interrupted, send nothing more
            waiting.clear()
            for future in futures:
                future.cancel()
        if refused and all(result.exception for result in results):
            raise refused
        return results

    def prefab(self, prefab_id: str, version: str) -> Prefab:
        """A prefab whose functions are called like methods. Nothing is sent."""
        return Prefab(self, prefab_id, version)

    def list_prefabs(self, status: str | None = None) -> list[PrefabInfo]:
        """The directory, newest first. `GET /v1/prefabs`

        Args:
            status: Only the `"deployed"` or the `"failed"` ones.
        """

        def read(response: _Response) -> list[PrefabInfo]:
            entries = _read_json(response, list)
            for entry in entries:
                if not (isinstance(entry, dict) and isinstance(entry.get("id"), str) and entry.get("version")):
                    raise _unusable(response, str(entry).encode(), "an entry has no id and version")
            return [PrefabInfo._from_dict(entry) for entry in entries]

        request = self._request("GET", "/v1/prefabs", {"status": status}, prefab={})
        return self._transport.send(request, read)

    def get_prefab_spec(self, prefab_id: str, version: str | None = None) -> dict[str, Any]:
        """The functions of a prefab. `GET /v1/prefabs/{prefab_id}/{version}/spec`

        Args:
            version: None: the newest of the directory; a failed one only if there is no other.

        Raises:
            PrefabNotFoundError.
        """
        segment = _segment("prefab_id", prefab_id)
        if version is None:
            versions = [prefab for prefab in self.list_prefabs() if prefab.prefab_id == prefab_id]
            if not versions:
                raise PrefabNotFoundError(prefab_id, "latest")
            versions = [prefab for prefab in versions if prefab.status != "failed"] or versions
            version = max((prefab.version for prefab in versions), key=_version_key)
        path = f"/v1/prefabs/{segment}/{_segment('version', version)}/spec"
        return self._fetch("GET", path, prefab={"prefab_id": prefab_id, "version": version})

    # Secrets

    def set_secret(self, prefab_id: str, secret_name: str, secret_value: str) -> None:
        """Stores a secret of yours for a prefab. `POST /v1/secrets`"""
        body = {"prefab_id": prefab_id, "secret_name": secret_name, "secret_value": secret_value}
        for name, value in body.items():
            _require(isinstance(value, str) and value, f"{name} must be a string that is not empty.")
        self._send("POST", "/v1/secrets", content=body, hidden=(secret_value,))

    def delete_secret(self, prefab_id: str, secret_name: str) -> None:
        """Deletes a secret of yours. `DELETE /v1/secrets/{prefab_id}/{secret_name}`"""
        names = f"{_segment('prefab_id', prefab_id)}/{_segment('secret_name', secret_name)}"
        self._send("DELETE", f"/v1/secrets/{names}")

    def list_secrets(self, prefab_id: str | None = None) -> list[dict[str, str]]:
        """Your secrets, as `{"prefab_id", "secret_name"}`. `GET /v1/secrets[/{prefab_id}]`"""
        if prefab_id is None:
            return self._fetch("GET", "/v1/secrets", secrets=list)["secrets"]
        answer = self._fetch("GET", f"/v1/secrets/{_segment('prefab_id', prefab_id)}", secret_names=list)
        return [{"prefab_id": prefab_id, "secret_name": name} for name in answer["secret_names"]]

    # Files. All but upload_input_file raise AgentContextRequiredError without an agent's token.

    def upload_input_file(self, file_path: _Path, content_type: str | None = None, *,
                          on_progress: _Progress | None = None) -> str:
        """Uploads an input of a call straight to the storage, and gives its `s3://` URL.

        `POST /internal/files/generate_upload_url`, then a presigned PUT

        Args:
            content_type: Such as `"video/mp4"`.
            on_progress: Called with the bytes done and the bytes in all, from 0 on; after a break
                they start over.

        Raises:
            FileNotFoundError: nothing was sent.
        """
        if content_type is not None:
            _require_header_value("content_type", content_type)
        with _open_file(file_path) as file:
            content = {"filename": _file_name(file_path), "content_type": content_type}
            answer = self._fetch("POST", "/internal/files/generate_upload_url", content=content,
                                 repeatable=True, upload_url=str, s3_url=str)
            request = self._presigned("PUT", answer["upload_url"])
            request.body = _Body(file=file, on_progress=on_progress)
            if content_type is not None:  # it is part of the signature, and so is its absence
                request.headers["Content-Type"] = content_type
            self._transport.send(request, _drain)
        return answer["s3_url"]

    def upload_file(self, file_path: _Path, *, on_progress: _Progress | None = None) -> dict[str, Any]:
        """Uploads a file to keep, as `{"success", "s3_url", "filename", "size"}`.

        `POST /internal/files/upload`; for the rest see `upload_input_file`
        """
        return self._upload("/internal/files/upload", {}, file_path, on_progress)

    def upload_temp_file(self, file_path: _Path, ttl: int = 86400, session_id: str | None = None, *,
                         on_progress: _Progress | None = None) -> dict[str, Any]:
        """Uploads a file that is deleted after `ttl` seconds, or with its session: see `temp_session`.

        `POST /internal/files/upload_temp`; for the rest see `upload_file`
        """
        _require(isinstance(ttl, int) and ttl > 0, f"ttl must be a positive number of seconds, not {ttl!r}.")
        fields = {"ttl": str(ttl), **({"session_id": session_id} if session_id else {})}
        return self._upload("/internal/files/upload_temp", fields, file_path, on_progress)

    def download_file(self, s3_url: str, local_path: _Path, mode: Literal["presigned"] = "presigned", *,
                      on_progress: _Progress | None = None) -> None:
        """Downloads a file straight from the storage; a broken transfer goes on where it was.

        The target is the old file or the whole new one, never a part. Missing folders are made.

        Args:
            local_path: The target, with its name.
            on_progress: Called with the bytes done and the bytes in all (None: unknown), from 0 on.

        Raises:
            OSError: the target cannot be written.
        """
        _require(mode == "presigned", f"mode must be 'presigned', not {mode!r}.")
        target = os.path.realpath(local_path)
        _require(os.path.isfile(target) or not os.path.exists(target), f"{target} is not a file's name.")
        request = self._presigned("GET", self.get_presigned_url(s3_url))
        with _Download(request, target, on_progress) as download:
            try:
                self._transport.send(request, download.receive)
            except GatewayError as error:
                if error.status_code != 416:
                    raise
                download.start_over()  # the object is shorter than what there was of it
                self._transport.send(request, download.receive)

    def get_presigned_url(self, s3_url: str, expires_in: int = 3600) -> str:
        """A URL that anyone can download from, for `expires_in` seconds. `GET /internal/files/download`"""
        _require_s3_url("s3_url", s3_url)
        query = {"s3_url": s3_url, "mode": "presigned", "expires_in": expires_in}
        return self._fetch("GET", "/internal/files/download", query, presigned_url=str)["presigned_url"]

    def list_files(self, limit: int = 100, continuation_token: str | None = None) -> dict[str, Any]:
        """A page of the permanent files. `GET /internal/files/list`

        Returns:
            `{"files": [{"key", "size", "last_modified", "s3_url"}], "next_token"}`; the last page has
            no `next_token`, which is the `continuation_token` of the next one.
        """
        query = {"limit": limit, "continuation_token": continuation_token}
        return self._fetch("GET", "/internal/files/list", query, files=list)

    def list_temp_files(self, session_id: str | None = None, limit: int = 100,
                        continuation_token: str | None = None) -> dict[str, Any]:
        """A page of the temporary files: see `list_files`. `GET /internal/files/list_temp`"""
        query = {"limit": limit, "session_id": session_id, "continuation_token": continuation_token}
        return self._fetch("GET", "/internal/files/list_temp", query, files=list)

    def iter_files(self, page_size: int = 100) -> Iterator[dict[str, Any]]:
        """The permanent files of all pages: see `list_files`."""
        return self._pages(functools.partial(self.list_files, page_size))

    def iter_temp_files(self, session_id: str | None = None, page_size: int = 100) -> Iterator[dict[str, Any]]:
        """The temporary files of all pages: see `list_files`."""
        return self._pages(functools.partial(self.list_temp_files, session_id, page_size))

    def cleanup_temp_files(self, session_id: str) -> int:
        """Deletes a session's temporary files, and counts them. `DELETE /internal/files/cleanup_temp`"""
        _require(session_id, "session_id must not be empty.")
        path, query = "/internal/files/cleanup_temp", {"session_id": session_id}
        return self._fetch("DELETE", path, query, deleted_count=int)["deleted_count"]

    @contextlib.contextmanager
    def temp_session(self, session_id: str | None = None) -> Iterator[str]:
        """A session id for temporary files, which are deleted on the way out, error or not."""
        session_id = session_id or uuid.uuid4().hex
        try:
            yield session_id
        except BaseException:
            try:
                self.cleanup_temp_files(session_id)
            except GatewayError as error:  # the first error says more
                logger.warning("temporary files were not deleted: %s", error.message)
            raise
        self.cleanup_temp_files(session_id)

    # What the endpoints are made of

    def _request(self, method: str, path: str, query: Mapping[str, Any] | None = None, *,
                 content: Any = None, timeout: float | None = None, **options: Any) -> _Request:
        """A request to the gateway. GET and DELETE may be repeated, others if they say so."""
        _require_seconds("timeout", timeout)
        options.setdefault("repeatable", method in ("GET", "DELETE"))
        given = {name: value for name, value in (query or {}).items() if value is not None}
        encoded = urllib.parse.urlencode(given, quote_via=urllib.parse.quote)
        target = f"{self._prefix}{path}{'?' if encoded else ''}{encoded}"
        if content is not None:
            options["body"] = _encode_json(content).encode()
        timeout = self.timeout if timeout is None else timeout
        request = _Request(method, self._origin, target, timeout, **options)
        if request.body:
            request.headers["Content-Type"] = "application/json"
        return request

    def _presigned(self, method: str, url: str) -> _Request:
        """A request to the storage, which must not see the credential."""
        try:
            origin, target = _split_url(url)
        except ValueError as error:
            raise GatewayError(f"The URL that the gateway gave for a {method} {error}.") from None
        request = _Request(method, origin, target, self.timeout, repeatable=True)
        request.to_gateway = request.authenticated = False
        return request

    def _send(self, *args: Any, **options: Any) -> None:
        self._transport.send(self._request(*args, **options), _drain)

    def _fetch(self, method: str, path: str, query: Mapping[str, Any] | None = None, *, content: Any = None,
               repeatable: bool | None = None, prefab: dict[str, str] | None = None, **fields: Any) -> Any:
        """The JSON object of an answer, in which `fields` must be, with these types."""
        options: dict[str, Any] = {} if repeatable is None else {"repeatable": repeatable}
        request = self._request(method, path, query, content=content, prefab=prefab, **options)
        return self._transport.send(request, functools.partial(_read_json, kind=dict, **fields))

    def _upload(self, path: str, fields: Mapping[str, str], file_path: _Path, on_progress: Any) -> Any:
        with _open_file(file_path) as file:
            content_type, body = _multipart(fields, file, on_progress)
            request = self._request("POST", path)
            request.body, request.headers["Content-Type"] = body, content_type
            return self._transport.send(request, functools.partial(_read_json, kind=dict, s3_url=str))

    def _pages(self, get_page: Callable[..., dict[str, Any]]) -> Iterator[dict[str, Any]]:
        token: str | None = None
        while True:
            page = get_page(continuation_token=token)
            yield from page["files"]
            last, token = token, page.get("next_token")
            if not token:
                return
            if token == last:
                raise GatewayError("The gateway gave the same next_token twice: its listing has no end.")


# --- Command line: see main -----------------------------------------------------------------------


# `from gateway_sdk.exceptions import ...` and `.models`, as in the older SDK: Python looks into
# sys.modules before it asks whether the parent is a package.
exceptions = models = sys.modules[__name__]
sys.modules[f"{__name__}.exceptions"] = sys.modules[f"{__name__}.models"] = exceptions
