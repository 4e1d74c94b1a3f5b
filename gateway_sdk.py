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
transport, event stream, files, batches, client, command line.
"""

from __future__ import annotations

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
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Optional, TypeVar, Union, overload
from urllib.parse import quote, unquote, urlencode, urljoin, urlsplit

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

DEFAULT_BASE_URL = "http://nodeport.sensedeal.vip:30566"

_BACKOFF_BASE_SECONDS = 0.5
_BACKOFF_CAP_SECONDS = 8.0
_RETRY_AFTER_CAP_SECONDS = 60.0  # a longer wait is the caller's decision
_IDLE_SECONDS = 4.0  # the gateway's server hangs up after 5, unannounced
_AFTER_DONE_SECONDS = 5.0  # how long a stream may linger when it has said that it is done
_MAX_REDIRECTS = 5
_MAX_IDLE_CONNECTIONS = 100  # per origin
_MAX_INTERIM_ANSWERS = 100
_MAX_ERROR_BYTES = 64 * 1024
_BLOCK_BYTES = 256 * 1024  # fits the processor's cache: larger blocks cost more
_MAX_SHOWN_CHARACTERS = 500

_T = TypeVar("_T")
_Client = TypeVar("_Client", bound="GatewayClient")
_Json = dict[str, Any]
_Path = Union[str, "os.PathLike[str]"]
_Files = Mapping[str, Sequence[str]]  # name to s3:// URLs
_Progress = Callable[[int, Optional[int]], object]  # bytes done, bytes in all (None: unknown)


def _log(level: str, message: str, *args: object) -> None:
    """Logs as `gateway_sdk`, if the program has imported `logging`: nobody else should wait for that import."""
    if logging := sys.modules.get("logging"):
        getattr(logging.getLogger("gateway_sdk"), level)(message, *args)


def _ignore(*_: object) -> None:
    """The callback of a caller who gave none."""


# --- Errors ---------------------------------------------------------------------------------------

_BODY_FIELDS = ("error_code", "prefab_id", "version", "limit", "used", "quota_type", "secret_name", "instructions")


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

    _remedy: ClassVar[str] = ""
    status_code: int | None = None
    error_code: str | None = None
    retry_after: float | None = None
    may_have_run: bool = False

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = dict(details or {})
        for name in _BODY_FIELDS:
            if self.details.get(name):
                setattr(self, name, self.details[name])

    @classmethod
    def _from_body(cls, message: str, details: Mapping[str, Any], **attributes: Any) -> GatewayError:
        """An error with these attributes, whatever the constructor of its class takes."""
        error = cls.__new__(cls)
        GatewayError.__init__(error, message, details)
        error.__dict__.update(attributes)
        return error

    def __reduce__(self) -> tuple[Any, ...]:  # the default would call the class with the message alone
        return self._from_body, (self.message, self.details), self.__dict__

    def _add_remedy(self) -> None:
        lines = [self.message, self._remedy.format(self), getattr(self, "instructions", None)]
        self.message = "\n".join(str(line) for line in lines if line)
        self.args = (self.message,)


class AuthenticationError(GatewayError):
    """The gateway refused the credential (401, 403)."""

    _remedy = "Check the credential. Without one, this machine's address must be on the gateway's allow-list."


class PrefabNotFoundError(GatewayError):
    """There is no such prefab, version or function (404)."""

    _remedy = "client.list_prefabs() shows what is deployed."
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

    _remedy = "Set it with client.set_secret({0.prefab_id!r}, {0.secret_name!r}, value)."
    prefab_id: str = "unknown"
    secret_name: str = "unknown"  # noqa: S105
    instructions: str | None = None

    def __init__(self, prefab_id: str, secret_name: str, instructions: str | None = None) -> None:
        message = f"Missing required secret '{secret_name}' for prefab '{prefab_id}'"
        body = {"prefab_id": prefab_id, "secret_name": secret_name, "instructions": instructions}
        super().__init__(message, {**body, "error_code": "MISSING_SECRET"})
        self._add_remedy()


class AgentContextRequiredError(GatewayError):
    """The credential is not an agent's, which this file operation needs."""

    _remedy = (
        "Agent files need the token that the gateway gave to an agent (internal_token=). "
        "upload_input_file() uploads the inputs of a call without one."
    )

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self._remedy, {"error_code": "MISSING_AGENT_CONTEXT"})


class ServiceUnavailableError(GatewayError):
    """No usable answer: a 5xx, or a connection that was refused, lost or cut short."""


class GatewayTimeoutError(ServiceUnavailableError, TimeoutError):
    """Connecting, or a wait for bytes, took longer than `timeout`."""


_STATUS_ERRORS: Mapping[Any, type[GatewayError]] = {
    401: AuthenticationError,
    403: AuthenticationError,
    404: PrefabNotFoundError,
    422: ValidationError,
    429: QuotaExceededError,
    (400, "MISSING_SECRET"): MissingSecretError,
    (400, "MISSING_AGENT_CONTEXT"): AgentContextRequiredError,
}


def _field_problem(entry: Any) -> str:
    """An entry of a 422's list, such as `body.calls.0.version: Field required`."""
    try:
        return f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}"
    except (TypeError, KeyError):
        return str(entry)


def _redacted(value: Any, redact: Callable[[str], str]) -> Any:
    """A copy of a JSON value with `redact` applied to every string and key in it."""
    if isinstance(value, list):
        return [_redacted(item, redact) for item in value]
    if isinstance(value, dict):
        return {redact(key): _redacted(item, redact) for key, item in value.items()}
    return redact(value) if isinstance(value, str) else value


def _read_problem(text: str, redact: Callable[[str], str]) -> tuple[str, _Json]:
    """Message and fields of an error body in any of its forms; `redact` takes secrets out."""
    try:
        problem = _redacted(json.loads(text), redact)
    except (ValueError, RecursionError):
        text = redact(text)
        found = re.search(r"<Code>([^<]*)</Code>\s*<Message>([^<]*)</Message>", text)  # of S3
        return (f"{found[1]}: {found[2]}", {"error_code": found[1]}) if found else (text[:_MAX_SHOWN_CHARACTERS], {})
    if isinstance(problem, dict):
        problem = problem.get("detail") or problem
    if isinstance(problem, list):  # of FastAPI
        return "\n  ".join(["", *map(_field_problem, problem)]), {"errors": problem}
    if isinstance(problem, dict):
        more, message = problem.get("details"), problem.get("message") or problem.get("error")
        fields = {**problem, **more} if isinstance(more, dict) else problem
        return str(message or json.dumps(problem)[:_MAX_SHOWN_CHARACTERS]), fields
    found = re.search(r"Secret '(?P<secret_name>.*)' for prefab '(?P<prefab_id>.*)' is not configured", str(problem))
    return str(problem or ""), {"error_code": "MISSING_SECRET", **found.groupdict()} if found else {}


def _retry_after_seconds(value: str) -> float | None:
    """Seconds that a `Retry-After` in either form asks for (RFC 9110 §10.2.3); None if unreadable."""
    with suppress(TypeError, ValueError, IndexError, OverflowError):
        if re.fullmatch(r"[\d. ]+", value, re.ASCII):
            return float(value)
        if date := email.utils.parsedate_tz(value):  # without a zone, it is in GMT
            return max(0.0, email.utils.mktime_tz(date) - time.time())
    return None


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


@dataclass
class PrefabResult:
    """What became of one call.

    Attributes:
        status: A `CallStatus`, or the gateway's own word if that is another.
        output: `{"status", "output", "files"}`; on older gateways the function's value itself.
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
        status, error = str(entry.get("status")), entry.get("error")
        if not isinstance(error, (dict, type(None))):
            error = {"message": str(error)}
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
        files = self.get("files") or self.raw.get("files")
        if not isinstance(files, dict):
            return {}
        lists = {name: [urls] if isinstance(urls, str) else urls for name, urls in files.items()}
        kept = {name: urls for name, urls in lists.items() if isinstance(urls, list)}
        return {name: [url for url in urls if isinstance(url, str)] for name, urls in kept.items()}

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
        return str(self._business("message") or "")

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
        failed = sum(not result.is_success() for result in results)
        status = "COMPLETED" if not failed else "FAILED" if failed == len(results) else "PARTIAL_SUCCESS"
        return cls(job_id, status, results)

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
        event_type: Any = data.get("type")
        known = isinstance(event_type, str) and event_type in _EVENT_TYPES
        return cls(_EVENT_TYPES[event_type] if known else StreamEventType.CONTENT, data.get("data"), data)


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
    shown = value is None or isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 1e15)
    return f"{value!r:.80}" if shown else f"a {type(value).__name__}"


def _require_text(**values: Any) -> None:
    for name, value in values.items():
        _require(isinstance(value, str) and value, f"{name} must be a string that is not empty.")


def _require_header_value(name: str, value: Any) -> None:
    """Refuses what a header cannot carry, without showing it as `http.client` would."""
    _require(isinstance(value, str) and value.strip(), f"{name} must be a string that is not empty.")
    carried = re.fullmatch(r"[\x20-\x7e\xa0-\xff]*", value)
    _require(carried, f"{name} has a line break, a control character or one outside latin-1 in it.")


def _require_number(name: str, value: Any, kind: Any = int, above: int = 0, below: int = 10**9) -> None:
    number = isinstance(value, (int, kind)) and not isinstance(value, bool) and above < value < below
    _require(number, f"{name} ({kind.__name__}) must be above {above} and below {below}, not {_shown(value)}.")


def _require_timeout(seconds: float | None) -> None:
    _require_number("timeout", 1 if seconds is None else seconds, float, below=2**31 // 1000)  # for poll()


def _require_s3_url(name: str, url: Any) -> None:
    is_url = isinstance(url, str) and re.match("s3://.", url)
    _require(is_url, f"{name} must be an s3:// URL, not {_shown(url)}: client.upload_input_file(path) gives one.")


def _require_call(call: Any) -> None:
    _require(isinstance(call, PrefabCall), f"A call must be a PrefabCall, not {type(call).__name__}.")
    _require_text(prefab_id=call.prefab_id, version=call.version, function_name=call.function_name)
    for name, value in (("parameters", call.parameters), ("files", call.files)):
        _require(value is None or isinstance(value, dict), f"{name} must be a dict, not {_shown(value)}.")
    for name, urls in (call.files or {}).items():
        _require(isinstance(urls, (list, tuple)), f"files[{name!r}] must be a list, as [upload_input_file(path)] is.")
        for url in urls:
            _require_s3_url(f"Each of files[{name!r}]", url)


def _segments(*names: Any) -> str:
    """A path of one segment for each name, with the slashes in them encoded."""
    for name in names:
        is_name = isinstance(name, str) and name not in ("", ".", "..") and name.isprintable()
        _require(is_name, f"{_shown(name)} cannot be the name of a prefab, a version or a secret.")
    return "/".join(quote(name, safe="") for name in names)


_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _encode(content: Any, name: str = "The request") -> bytes:
    try:
        return _encode_json(content).encode()
    except (TypeError, ValueError, RecursionError) as error:  # whose `repr` may have a secret in it
        raise ValidationError(f"{name} cannot be sent as JSON: {error}.") from None


# --- Requests -------------------------------------------------------------------------------------

_DEFAULT_PORTS = {"http": 80, "https": 443}


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
    netloc = f"[{host}]" if ":" in host else host
    netloc += f":{port}" if port and port != _DEFAULT_PORTS[parts.scheme] else ""
    target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
    # A presigned URL must arrive as it was signed: only what HTTP cannot carry is encoded.
    return f"{parts.scheme}://{netloc}", quote(target, safe="!#$%&'()*+,/:;=?@[]~")


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
    repeatable: bool = False  # idempotent: sending it twice does no more than sending it once
    to_gateway: bool = True  # False: to a storage, which must not see the credential
    prefab: dict[str, str] | None = None  # whose absence a 404 means; None: a 404 is about something else
    secrets: tuple[str, ...] = ()  # texts that no message may show
    answers_secret: bool = False  # the body of the answer must not be shown either

    def __repr__(self) -> str:
        return f"{self.method} {'' if self.to_gateway else self.origin}{self.target.partition('?')[0]}"

    def redact(self, text: str) -> str:
        """`text` without the credential, secrets and the queries of URLs."""
        words = set(self.secrets)
        for name in ("X-Internal-Token", "X-API-Key", "Authorization"):
            words.add(self.headers.get(name, "").rpartition("Bearer ")[2])
        # The gateway may repeat them as a URL or JSON would have them.
        words |= {quote(word, safe=safe) for word in words for safe in ("", "/")}
        words |= {json.dumps(word)[1:-1] for word in words}
        words |= {word.replace("/", "\\/") for word in words}
        text = re.sub(r"(https?:[^\s\"'<>?]{1,2000}\?)[^\s\"'<>]+", r"\1***", text)  # perhaps presigned
        for word in sorted(filter(None, words), key=len, reverse=True):
            # A short one counts only where it stands alone: "id" is no secret inside of "invalid".
            edge = r"\b" if len(word) < 8 and word.isalnum() else ""
            text = re.sub(f"{edge}{re.escape(word)}{edge}", "***", text)
        return text


def _secrets_of_query(target: str) -> tuple[str, ...]:
    """The query of a presigned URL and the values in it, but for those too short to be secret."""
    query = target.partition("?")[2]
    values = [pair.partition("=")[2] for pair in query.split("&")]
    return query, *(word for word in (*values, *map(unquote, values)) if len(word) > 9)


# --- Connections ----------------------------------------------------------------------------------

_WIRE_FAULTS = (OSError, http.client.HTTPException)


def _connection_error(request: _Request, error: BaseException, doing: str, *, sent: bool = True) -> GatewayError:
    """The error for an answer that did not come, or not whole. `sent`: the request may have arrived."""
    timed_out = isinstance(error, (socket.timeout, TimeoutError))
    reason = f"nothing for {request.timeout} s" if timed_out else str(error) or type(error).__name__
    message = f"{request}: {doing}: {reason}"
    may_have_run = sent and not request.repeatable
    if may_have_run:
        message += "\nIt may have run all the same, so it was not sent again."
    if timed_out:
        message += "\nA larger timeout= waits longer."
    error_class = GatewayTimeoutError if timed_out else ServiceUnavailableError
    lost = error_class._from_body(request.redact(message), {}, may_have_run=may_have_run)
    # `http.client` quotes a bad status line or chunk size; if a secret is in it, the cause must not be shown.
    lost.__cause__ = error if request.redact(str(error)) == str(error) else None
    error.__context__ = None
    return lost


class _HeadReader(io.BufferedReader):
    """Raises if the connection ends inside a head; `http.client` would take that for the end of the head."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            raise http.client.RemoteDisconnected("the connection was closed before the end")
        return line


class _Response(http.client.HTTPResponse):
    """An answer. It owns its connection until the body was read to the end; then the pool has it back."""

    def __init__(self, request: _Request, connection: _Connection, pool: _Pool) -> None:
        super().__init__(connection.sock, method=request.method)
        self.fp = _HeadReader(self.fp.detach())
        self.request = request
        self.connection: _Connection | None = connection
        self.abandoned = False  # its stream was closed: a broken connection is no error any more
        self._pool = pool

    def begin(self, broken: OSError | None = None) -> None:
        """Reads the head, past all interim answers (RFC 9110 §15.2); `http.client` skips 100 only.

        `broken`: what broke sending off. The answer may be there all the same: 413, then a hang-up.
        """
        try:
            for _ in range(_MAX_INTERIM_ANSWERS):
                super().begin()
                if self.status >= 200:
                    break
                vars(self)["headers"] = None  # by which `http.client` knows that it is to read one
            if self.status < 200 or (not self.framed and "Content-Length" in self.headers):
                raise http.client.HTTPException("an answer without an end")
        except _WIRE_FAULTS as error:
            raise _connection_error(self.request, broken or error, "sending broke off" if broken else "no answer")
        self.will_close |= broken is not None

    @property
    def framed(self) -> bool:
        """Whether the body says where it ends; if not, a break looks like the end."""
        return self.chunked or self.length is not None

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives. At its end the connection goes back to the pool."""
        expected, received = self.length, 0
        try:
            while received != expected and (chunk := self.read1(_BLOCK_BYTES)):
                received += len(chunk)
                yield chunk
            if expected is not None and received < expected:  # `http.client` does not raise for that
                raise http.client.IncompleteRead(b"", expected - received)
            if self.connection and not self.will_close:
                connection, self.connection = self.connection, None
                super().close()  # first: from now on the socket is another answer's
                self._pool.release(connection)
        except (*_WIRE_FAULTS, AttributeError, ValueError) as error:  # the last two of a closed file
            if not self.abandoned:
                raise _connection_error(self.request, error, f"the answer ({self.status}) was cut short")
        finally:
            if self.connection:
                self.close()

    def read_all(self) -> bytes:
        """The whole body."""
        return b"".join(self.chunks())

    def close(self) -> None:
        """Closes the connection too, unless it went back to the pool."""
        connection, self.connection = self.connection, None
        if connection:
            connection.close()
        super().close()


class _Proxy(NamedTuple):
    address: str
    login: str  # `user:password`, or nothing

    def headers(self) -> dict[str, str]:
        login = b64encode(self.login.encode()).decode()
        return {"Proxy-Authorization": f"Basic {login}"} if self.login else {}


def _proxy_for(origin: str) -> _Proxy | None:
    """The proxy that the environment sets for an origin."""
    if sys.platform not in ("win32", "darwin") and not any(name.lower().endswith("_proxy") for name in os.environ):
        return None  # before an import that takes as long as twenty calls
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(origin)
    proxy = getproxies().get(parts.scheme)
    if not proxy or proxy_bypass(f"{parts.hostname}:{parts.port or _DEFAULT_PORTS[parts.scheme]}"):
        return None
    found = re.fullmatch(r"(?i:http://)?(?!\w+://)(?:(.*)@)?([^/@]+?)(:\d+)?(?:/.*)?", proxy)
    if not found:
        raise GatewayError(f"The environment's {parts.scheme}_proxy is not an http:// URL.")
    return _Proxy(f"{found[2]}{found[3] or ':80'}", unquote(found[1] or ""))


class _Connection:
    """An open socket to an origin, straight or through a proxy."""

    def __init__(self, origin: str, timeout: float | None, tls: ssl.SSLContext | None, proxy: _Proxy | None) -> None:
        self.key = os.getpid(), origin
        self.idle_since = 0.0
        scheme, _, netloc = origin.partition("://")
        address = proxy.address if proxy else netloc
        if scheme == "https":
            self._proxy = None  # it sees the tunnel only
            opener: http.client.HTTPConnection = http.client.HTTPSConnection(address, timeout=timeout, context=tls)
            if proxy:
                opener.set_tunnel(netloc, headers=proxy.headers())
        else:
            self._proxy = proxy
            opener = http.client.HTTPConnection(address, timeout=timeout)
        try:
            opener.connect()  # with TCP_NODELAY
        except BaseException:
            opener.close()
            raise
        self.sock: socket.socket = opener.sock

    def close(self) -> None:
        """Closes the socket, also while another thread waits for bytes from it."""
        if self.key[0] == os.getpid():  # after a fork the parent may still use the connection: only close our copy
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def is_alive(self) -> bool:
        """Whether it can be used again: not idle for too long, and not readable. Readable means: hung up."""
        self.sock.setblocking(False)
        try:  # the plain socket's recv, as TLS sockets cannot peek
            socket.socket.recv(self.sock, 1, socket.MSG_PEEK)
        except OSError as error:
            return isinstance(error, BlockingIOError) and time.monotonic() - self.idle_since < _IDLE_SECONDS
        return False

    def send(self, request: _Request) -> OSError | None:
        """Sends a request. Returns the error if sending broke off; what the server said by then can be read."""
        self.sock.settimeout(request.timeout)
        for block in self._serialize(request):
            left = memoryview(block)
            try:
                while left:  # not sendall: its timeout would be for the whole of it
                    left = left[self.sock.send(left) :]
            except OSError as error:
                self.sock.settimeout(0)
                return error
        return None

    def _serialize(self, request: _Request) -> Iterator[bytes]:
        file, done, on_progress = request.file, 0, request.on_progress or _ignore
        size = os.fstat(file.fileno()).st_size if file else 0
        headers = {
            "Host": request.origin.partition("://")[2],
            "User-Agent": f"agent-builder-gateway-sdk/{__version__}",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            **request.headers,
            **(self._proxy.headers() if self._proxy else {}),
        }
        if request.method in ("POST", "PUT"):
            headers["Content-Length"] = str(len(request.body) + size + len(request.tail))
        target = f"{request.origin}{request.target}" if self._proxy else request.target  # RFC 9112 §3.2.2
        head = f"{request.method} {target} HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        # One block for both: a body by itself would be a packet by itself.
        yield f"{head}\r\n".encode("latin-1") + request.body
        if file:
            file.seek(0)
            on_progress(0, size)
            # Not sendfile: waiting in between for room in the socket, it costs a fifth more time.
            while block := file.read(min(size - done, _BLOCK_BYTES)):
                yield block
                done += len(block)
                on_progress(done, size)
            if done < size:
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
        idle = self._idle.get((os.getpid(), origin))
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
            with suppress(IndexError):  # there are none any more
                while len(idle) > self._limit or time.monotonic() - idle[0].idle_since > _IDLE_SECONDS:
                    idle.pop(0).sock.close()


# --- Transport ------------------------------------------------------------------------------------

_decode_answer = json.JSONDecoder(parse_constant=int).decode  # int("NaN") raises: NaN is not JSON


def _unexpected_answer(response: _Response, body: bytes, problem: str) -> GatewayError:
    """The error for a 2xx whose body is not what the endpoint promises. `details["body"]` has it."""
    request, status = response.request, response.status
    text = "***" if request.answers_secret else request.redact(body.decode("utf-8", "replace"))
    message = f"{request} answered {status}, but {problem}: {text[:_MAX_SHOWN_CHARACTERS]}"
    return GatewayError._from_body(message, {"body": text}, status_code=status, may_have_run=not request.repeatable)


def _read_json(response: _Response, kind: Any, fields: Mapping[str, type] = {}) -> Any:
    """The body as JSON of type `kind`; `fields` must be in it, with their types."""
    body = response.read_all()
    try:
        answer = _decode_answer(body.decode().lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise _unexpected_answer(response, body, "the body is not JSON" if body else "has no body") from error
    if not isinstance(answer, kind):
        raise _unexpected_answer(response, body, f"the body is not a JSON {kind.__name__}")
    for name, field_kind in fields.items():
        if not isinstance(answer.get(name), field_kind):
            raise _unexpected_answer(response, body, f"{name!r} is not a {field_kind.__name__}")
    return answer


def _status_error(response: _Response) -> GatewayError:
    """The error for an answer that is not a 2xx, whatever its body looks like."""
    request, status, body = response.request, response.status, b""
    with suppress(ServiceUnavailableError):  # if the body breaks off, the status still says enough
        for chunk in response.chunks():
            body += chunk
            if len(body) > _MAX_ERROR_BYTES:
                break
    message, given = _read_problem(body.decode("utf-8", "replace").strip(), request.redact)
    error_class = ServiceUnavailableError if status >= 500 else GatewayError
    if request.to_gateway and (status != 404 or request.prefab is not None):
        key = (status, str(given.get("error_code"))) if status == 400 else status
        error_class = _STATUS_ERRORS.get(key, error_class)
    if status < 400:
        address = response.headers.get("Location", "nowhere").partition("?")[0]
        message = f"a redirect to {address}, which is not followed."
        if request.to_gateway:
            message += " Is base_url right?"
    error = error_class._from_body(
        request.redact(f"{request} answered {status}: {message or response.reason}"),
        {**(request.prefab or {}), **given, **(request.prefab or {} if status == 404 else {})},
        status_code=status,
        retry_after=_retry_after_seconds(response.headers.get("Retry-After", "")),
        may_have_run=status >= 500 and not request.repeatable,
    )
    error._add_remedy()
    return error


def _redirected(response: _Response) -> _Request:
    """The request to send next, if the answer is a redirect that may be followed (RFC 9110 §15.4).

    Raises:
        GatewayError: the answer is anything else: the error for its status.
    """
    request, location = response.request, response.headers.get("Location", "")
    if request.to_gateway or request.method != "GET" or response.status not in (301, 302, 303, 307, 308):
        raise _status_error(response)
    try:
        origin, target = _split_url(urljoin(f"{request.origin}{request.target}", location))
        if request.origin.startswith("https:") and origin.startswith("http:"):
            raise ValueError("leads from https to http")
        if not location:
            raise ValueError("is missing")
    except ValueError as error:
        raise GatewayError(f"{request} answered {response.status}, but its Location {error}.") from None
    return replace(request, origin=origin, target=target, secrets=request.secrets + _secrets_of_query(target))


def _retry_delay(error: GatewayError, attempt: int, max_retries: int) -> float | None:
    """Seconds before the request that failed like this may be sent again; None if it must not be."""
    passing = type(error) is ServiceUnavailableError and error.status_code in (None, 502, 503, 504)
    if error.may_have_run or not passing or attempt > max_retries:
        return None
    if error.retry_after is not None:
        return error.retry_after if error.retry_after <= _RETRY_AFTER_CAP_SECONDS else None
    return random.uniform(0, min(_BACKOFF_CAP_SECONDS, _BACKOFF_BASE_SECONDS * 2 ** (attempt - 1)))


class _Transport:
    """Sends requests: the one place that retries. It knows HTTP, and nothing of prefabs."""

    def __init__(self, credential: dict[str, str], max_retries: int, tls: ssl.SSLContext | None) -> None:
        self.credential = credential  # one header, or none for the allow-list
        self.token_request: _Request | None = None  # exchanges the API key for a new token
        self.pool = _Pool()
        self._max_retries = max_retries
        self._given_tls = self._tls = tls
        self._locks: dict[int, threading.Lock] = {}  # by process id: a fork copies a lock as locked

    def __getstate__(self) -> _Json:
        if self._given_tls:
            raise TypeError("A client with an ssl_context cannot be pickled; SSL_CERT_FILE may do.")
        return {**self.__dict__, "pool": _Pool(), "_tls": None, "_locks": {}}

    def send(self, request: _Request, read: Callable[[_Response], _T]) -> _T:
        """What `read` makes of the 2xx answer to `request`, after as many attempts as are allowed."""
        attempt, renewed = 1, False
        authenticated = request.to_gateway and request is not self.token_request
        while True:
            credential = self.credential
            if authenticated:
                request.headers.update(credential)
            try:
                return self._attempt(request, attempt, read)
            except GatewayError as error:
                if error.status_code == 401 and authenticated and self.token_request and not renewed:
                    self.renew_token(credential)
                    renewed = True
                    continue
                delay = _retry_delay(error, attempt, self._max_retries)
                if delay is None:
                    raise
                attempt += 1
                _log("debug", "%s; attempt %d in %.1f s", error.message, attempt, delay)
            time.sleep(delay)

    def renew_token(self, refused: dict[str, str]) -> None:
        """Exchanges the API key for a new token, unless another thread has done so meanwhile."""
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            if self.token_request and self.credential is refused:
                read = partial(_read_json, kind=dict, fields={"internal_token": str})
                token = self.send(self.token_request, read)["internal_token"]
                _require_header_value("The gateway's internal_token", token)
                self.credential = {"X-Internal-Token": token}

    def _attempt(self, request: _Request, attempt: int, read: Callable[[_Response], _T]) -> _T:
        for _ in range(1 + _MAX_REDIRECTS):
            started = time.perf_counter()
            connection = (attempt == 1 and self.pool.acquire(request.origin)) or self._connect(request)
            response = _Response(request, connection, self.pool)
            try:
                response.begin(connection.send(request))
                if response.status < 300:
                    return read(response)
                request = _redirected(response)
            except BaseException:
                response.close()
                raise
            finally:
                milliseconds = 1000 * (time.perf_counter() - started)
                _log("debug", "%s %s %.0f ms, attempt %d", response.request, response.status, milliseconds, attempt)
            response.close()
        raise GatewayError(f"{request}: more than {_MAX_REDIRECTS} redirects")

    def _connect(self, request: _Request) -> _Connection:
        proxy = _proxy_for(request.origin)
        if proxy and proxy.login:
            request.secrets += (proxy.headers()["Proxy-Authorization"][6:], proxy.login, proxy.login.partition(":")[2])
        try:
            if request.origin.startswith("https:") and not self._tls:
                import ssl  # there are Pythons without it; they can do http

                self._tls = ssl.create_default_context()  # dear: once a client
            return _Connection(request.origin, request.timeout, self._tls, proxy)
        except ImportError as error:
            raise GatewayError("https needs Python's ssl module, which is missing here.") from error
        except (*_WIRE_FAULTS, UnicodeError) as error:
            way = f" through the proxy {proxy.address}" if proxy else ""
            raise _connection_error(request, error, f"no connection to {request.origin}{way}", sent=False)


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
    if isinstance(value, dict) and isinstance(value.get("type"), str):
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

    Where the data is not JSON, but each of its lines is, blank lines were left out: each is an event. Data
    that is not JSON at all is the text of an event, unless the block may be cut short (not `whole`).
    """
    name, lines = "", []
    for line in block.split("\n"):
        field, _, value = line.partition(":")
        if field == "data":
            lines.append(value.removeprefix(" "))
        elif field == "event":
            name = value.removeprefix(" ")
    data = "\n".join(lines)
    for candidates in ([data], lines):
        try:
            return [_make_event(_decode_data(candidate), name) for candidate in candidates if data]
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
        after_cr, chunk = chunk.endswith(b"\r"), chunk.removeprefix(b"\n") if after_cr else chunk
        if b"\r" in chunk:  # the last one too, which does not wait for its LF
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


class EventStream:
    """The events of one call, each handed over as it arrives: an iterator and a context manager.

    Leaving a `for` loop over it, `close()`, the end of a `with` and garbage collection end the
    stream and free its connection. One thread reads it; any may close it. An `error` event is
    yielded, not raised.

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
        """Ends the stream, also for another thread that waits for an event. May be called twice."""
        self._events = iter(())
        if self._response:
            self._response.abandoned = True
            self._response.close()


def _read_events(response: _Response) -> Iterator[StreamEvent]:
    """The events of an answer.

    Raises:
        ServiceUnavailableError: the connection broke before `done` or `error`, or the stream ended
            without them where a break would look just like the end.
    """
    ended = at_end = False
    done, error = StreamEventType.DONE, StreamEventType.ERROR
    try:
        for event in _parse_events(response.chunks(), framed=response.framed):
            if response.abandoned:
                return
            at_end = event.type is done or event.type is error
            ended = ended or at_end
            if event.type is done and response.connection:
                patience = min(response.request.timeout or _AFTER_DONE_SECONDS, _AFTER_DONE_SECONDS)
                response.connection.sock.settimeout(patience)
            yield event
    except ServiceUnavailableError:
        if not at_end:
            raise
    if not (ended or response.framed or response.abandoned):
        raise _connection_error(response.request, EOFError("no done or error event"), "the stream was cut short")


def _event_error(event: StreamEvent) -> _Json:
    """An error event's data as a result's `error`, with the `error_code` that may stand beside it."""
    given = {key: event.raw[key] for key in ("message", "error_code") if key in event.raw}
    data = event.data if isinstance(event.data, dict) else {"message": str(event.data)} if event.data else {}
    return {"message": "The function reported an error.", **given, **data}


def _result_of_events(response: _Response) -> PrefabResult:
    """The result of a streaming function that was called without `stream=True`."""
    contents: list[Any] = []
    error = last = None
    try:
        for event in _read_events(response):
            if event.type is StreamEventType.CONTENT:
                contents.append(event.data)
            elif event.type is StreamEventType.ERROR:
                error = _event_error(event)
            elif event.type is StreamEventType.DONE and event.data != "[DONE]":
                last = event.data
    except ServiceUnavailableError as broken:
        broken.details["partial_output"] = contents  # which was paid for
        raise
    value: Any = "".join(contents) if all(isinstance(content, str) for content in contents) else contents
    files = last.pop("files", None) if isinstance(last, dict) else None
    status = CallStatus.FAILED if error else CallStatus.SUCCESS
    return PrefabResult(status, {"status": str(status), "output": value or last or value, "files": files}, error)


def _read_results(response: _Response, count: int = 1) -> tuple[str | None, list[PrefabResult]]:
    """The job id and the results of a run request with `count` calls."""
    if response.headers.get_content_type() == "text/event-stream":
        return None, [_result_of_events(response)] * count
    answer = _read_json(response, dict, {"results": list})
    job_id, entries = answer.get("job_id"), answer["results"]
    if len(entries) != count or not all(isinstance(entry, dict) for entry in entries):
        body = json.dumps(answer).encode()
        raise _unexpected_answer(response, body, f"'results' is not a list of {count} objects")
    return job_id, [PrefabResult._from_dict(entry, job_id) for entry in entries]


def _read_result(response: _Response) -> PrefabResult:
    """The result of a run request with one call."""
    return _read_results(response)[1][0]


def _read_stream(response: _Response) -> EventStream:
    """The events of a run request, also of a function that does not stream."""
    if response.headers.get_content_type() == "text/event-stream":
        return EventStream(_read_events(response), response)
    result = _read_result(response)
    if result.is_success():
        events = [{"type": "content", "data": result.get_result()}, {"type": "done", "data": None}]
    else:
        events = [{"type": "error", "data": result.error or {"message": f"It ended as {result.status}."}}]
    return EventStream(map(StreamEvent.from_dict, events))


def _read_prefabs(response: _Response) -> list[PrefabInfo]:
    """The entries of the directory."""
    entries = _read_json(response, list)
    for entry in entries:
        keys = (entry.get("id"), entry.get("version")) if isinstance(entry, dict) else (None, None)
        if not all(isinstance(key, str) for key in keys):
            raise _unexpected_answer(response, json.dumps(entries).encode(), "an entry lacks its id or version")
    return [PrefabInfo._from_dict(entry) for entry in entries]


# --- Files ----------------------------------------------------------------------------------------


def _file_name(path: _Path) -> str:
    """The last part of a path. Bytes in it that are not UTF-8 are replaced, so that it can be sent."""
    return os.fsencode(os.path.basename(path)).decode("utf-8", "replace")


def _open_file(path: _Path) -> io.BufferedReader:
    regular = os.path.isfile(path) or not os.path.exists(path)
    _require(regular, f"{path} is not a regular file, so its length is not known beforehand.")
    return open(os.fspath(path), "rb")  # os.fspath() refuses a file descriptor


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
    """A new file that takes the target's place if all goes well, and is gone if not."""
    folder = os.path.dirname(target)
    while not os.path.exists(folder):  # one that is missing is made at the end, when there is something for it
        folder = os.path.dirname(folder)
    path = os.path.join(folder, f".{os.urandom(16).hex()}.part")
    try:
        with open(path, "xb") as file:
            yield file
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(path, target)
    finally:
        with suppress(OSError):  # it was renamed
            os.unlink(path)


class _Download:
    """Writes answers to a file, each where the last one ended."""

    def __init__(self, request: _Request, file: io.BufferedWriter, on_progress: _Progress | None) -> None:
        self._request = request
        self._file = file
        self._on_progress = on_progress or _ignore
        self.start_over()

    def start_over(self) -> None:
        """Forgets what came, and asks for the whole object next time."""
        self._file.truncate(self._file.seek(0))
        self._done = 0
        self._total: int | None = None
        self._request.headers.clear()

    def receive(self, response: _Response) -> None:
        """Writes the body, and turns the request into one for what is still missing."""
        if response.status not in (200, 206) or not response.framed:
            raise _unexpected_answer(response, b"", "without a whole file, or without its length")
        etag = response.headers.get("ETag", "")
        if response.status == 200:
            self.start_over()
            self._total = response.length
        else:
            self._continue(etag, response.headers.get("Content-Range", ""))
        try:
            self._on_progress(self._done, self._total)
            for chunk in response.chunks():
                self._file.write(chunk)
                self._done += len(chunk)
                self._on_progress(self._done, self._total)
        finally:
            if etag.startswith('"'):  # If-Range needs a strong one (RFC 9110 §13.1.5)
                self._request.headers.update({"Range": f"bytes={self._done}-", "If-Range": etag})
        if self._total not in (None, self._done):
            raise ServiceUnavailableError(f"{self._request}: only {self._done} of {self._total} bytes came.")

    def _continue(self, etag: str, content_range: str) -> None:
        """Checks that a 206 is the rest of the same object."""
        found = re.fullmatch(rf"bytes {self._done}-\d+/(\d{{1,18}})", content_range)
        total = int(found[1]) if found else None
        if not total or etag != self._request.headers.get("If-Range") or self._total not in (None, total):
            self.start_over()
            raise ServiceUnavailableError(f"{self._request}: the object changed in between.")
        self._total = total


# --- Batches --------------------------------------------------------------------------------------


def _run_one(client: GatewayClient, request: _Request) -> PrefabResult:
    """Sends one call of a batch. Picklable, as are its arguments, so that any executor can run it."""
    try:
        return client._transport.send(request, _read_result)
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the other results
        return PrefabResult._from_exception(error)


class _Batch:
    """Single calls on their way, in threads or on an executor. Their results arrive in a queue."""

    def __init__(self, client: GatewayClient, requests: Sequence[_Request],
                 executor: concurrent.futures.Executor | None) -> None:
        self._client = client
        self._executor = executor
        self._waiting = deque(enumerate(requests))
        self._futures: dict[int, concurrent.futures.Future[PrefabResult]] = {}
        self._arrived: queue.SimpleQueue[tuple[int, PrefabResult]] = queue.SimpleQueue()
        self._refused: GatewayError | None = None

    def run(self, max_workers: int, on_result: Callable[[int, PrefabResult], object]) -> list[PrefabResult]:
        """The results, in order. Raises the 401 if that is all there is."""
        results = [self._unsent() for _ in self._waiting]
        try:
            if self._executor:
                self._work()
            for _ in range(min(max_workers, len(self._waiting))):
                try:  # daemons, so that Ctrl-C does not wait for their answers
                    threading.Thread(target=self._work, daemon=True).start()
                except RuntimeError:  # there can be no more threads: this one helps
                    self._work()
            for _ in results:
                index, result = self._arrived.get()
                results[index] = result
                on_result(index, result)
        finally:
            self._stop()
        errors = [result.exception for result in results]
        if self._refused and all(error and not error.may_have_run for error in errors):
            raise self._refused
        return results

    def _unsent(self) -> PrefabResult:
        error: GatewayError = ServiceUnavailableError("Not sent: the executor cancelled it.")
        if self._refused:
            error = AuthenticationError("Not sent: the credential of an earlier call was refused.")
        return PrefabResult._from_exception(error)

    def _work(self) -> None:
        while True:
            try:
                index, request = self._waiting.popleft()
            except IndexError:  # nothing waits any more
                return
            if self._executor:
                self._submit(index, request, self._executor)
            else:
                self._arrive(index, _run_one(self._client, request))

    def _submit(self, index: int, request: _Request, executor: concurrent.futures.Executor) -> None:
        try:
            self._futures[index] = future = executor.submit(_run_one, self._client, request)
            future.add_done_callback(partial(self._done, index))
        except Exception as error:  # noqa: BLE001 - a broken executor must not cost the other results
            unsent = ServiceUnavailableError(f"Not sent: the executor did not take it: {error}")
            self._arrive(index, PrefabResult._from_exception(unsent))

    def _done(self, index: int, future: concurrent.futures.Future[PrefabResult]) -> None:
        self._futures.pop(index)  # while it is held, a cluster may run it again for its result
        if future.cancelled():
            self._arrive(index, self._unsent())
        else:
            error = future.exception()
            self._arrive(index, PrefabResult._from_exception(error) if error else future.result())

    def _arrive(self, index: int, result: PrefabResult) -> None:
        if result.exception and result.exception.status_code == 401:
            self._refused = result.exception
            self._stop()
        self._arrived.put((index, result))

    def _stop(self) -> None:
        """Sends nothing more."""
        while self._waiting:
            with suppress(IndexError):  # a thread took the last one
                index, _ = self._waiting.popleft()
                self._arrived.put((index, self._unsent()))
        for future in list(self._futures.values()):
            future.cancel()


# --- Client ---------------------------------------------------------------------------------------


def _version_key(version: str) -> tuple[Any, ...]:
    """Sorts versions by their numbers: 1.10.0 after 1.9.0, and 1.0.0-rc.1 before 1.0.0."""
    release, _, candidate = version.lstrip("v").partition("-")

    def numbers_first(text: str) -> list[tuple[bool, int, str]]:
        words = re.findall(r"\d+|[^\d.]+", text)
        return [(word.isdecimal(), int(word[:99]) if word.isdecimal() else 0, word) for word in words]

    return numbers_first(release), not candidate, numbers_first(candidate)


def _pages(list_page: Callable[[int, Any], _Json], page_size: int) -> Iterator[_Json]:
    token = None
    while True:
        page = list_page(page_size, token)
        yield from page["files"]
        next_token = page.get("next_token")
        if not next_token:
            return
        if next_token == token:
            raise GatewayError("The gateway gave the same next_token twice: the pages have no end.")
        token = next_token


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
        return partial(self.call, name)


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
        GatewayError: any other answer that is no use.
    """

    def __init__(self, base_url: str | None = None, api_key: str | None = None, jwt_token: str | None = None,
                 timeout: float | None = 60, *, internal_token: str | None = None, max_retries: int = 2,
                 ssl_context: ssl.SSLContext | None = None) -> None:
        if base_url is None:
            base_url = os.environ.get("GATEWAY_BASE_URL") or DEFAULT_BASE_URL
        try:
            self._origin, target = _split_url(base_url)
        except ValueError as error:
            message = f"base_url (or else GATEWAY_BASE_URL) {error}. A token goes into internal_token=."
            raise ValidationError(message) from None
        _require("?" not in base_url and "#" not in base_url, "base_url must not have a query or a fragment.")
        _require_timeout(timeout)
        _require_number("max_retries", max_retries, above=-1)
        _require(ssl_context is None or hasattr(ssl_context, "wrap_socket"), "ssl_context must be an SSLContext.")
        credentials = {"X-Internal-Token": internal_token, "X-API-Key": api_key, "Authorization": jwt_token}
        headers = {name: value for name, value in credentials.items() if value is not None}
        _require(len(headers) < 2, f"Give one credential, not {' and '.join(headers)}: who is the client?")
        for name, value in headers.items():
            _require_header_value(f"The credential ({name})", value)
        if jwt_token and not jwt_token.startswith("Bearer "):
            headers["Authorization"] = f"Bearer {jwt_token}"
        self._prefix = target.rstrip("/")
        self._run_path = "/v1/run" if api_key or jwt_token else "/v1/internal/run"
        self._secrets: tuple[str, ...] = ()
        self._transport = _Transport(headers, max_retries, ssl_context)
        self.base_url = f"{self._origin}{self._prefix}"
        self.timeout = timeout

    @classmethod
    def from_api_key(cls: type[_Client], api_key: str, base_url: str | None = None, timeout: float | None = 60, *,
                     max_retries: int = 2, ssl_context: ssl.SSLContext | None = None) -> _Client:
        """A client with the token that the gateway gives for an API key, now and when it expires.

        `POST /v1/auth/convert_to_internal_token`
        """
        _require_header_value("api_key", api_key)
        client = cls(base_url, timeout=timeout, max_retries=max_retries, ssl_context=ssl_context)
        client._secrets = (api_key,)
        path = "/v1/auth/convert_to_internal_token"
        exchange = client._request("POST", path, repeatable=True, answers_secret=True)
        exchange.headers["Authorization"] = f"Bearer {api_key}"
        client._transport.token_request = exchange
        client._transport.renew_token(client._transport.credential)
        return client

    @classmethod
    def from_env(cls: type[_Client], **options: Any) -> _Client:
        """A client with the environment's credential: `X_INTERNAL_TOKEN`, `AGENT_BUILDER_API_KEY`
        (which is exchanged), `GATEWAY_JWT_TOKEN`, or none; two are an error.

        `options` are `base_url`, `timeout`, `max_retries` and `ssl_context`.
        """
        names = ("X_INTERNAL_TOKEN", "AGENT_BUILDER_API_KEY", "GATEWAY_JWT_TOKEN")
        token, key, jwt = values = [os.environ.get(name) or None for name in names]
        given = [name for name, value in zip(names, values) if value]
        _require(len(given) < 2, f"Set one credential, not {' and '.join(given)}: who is the client?")
        return cls.from_api_key(key, **options) if key else cls(internal_token=token, jwt_token=jwt, **options)

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
        return self._transport.send(request, _read_result)

    def run_batch(self, calls: Iterable[PrefabCall], *, max_workers: int = 8, timeout: float | None = None,
                  on_result: Callable[[int, PrefabResult], object] | None = None,
                  executor: concurrent.futures.Executor | None = None, single_request: bool = False) -> BatchResult:
        """Runs calls side by side, each a request like that of `run`, so that none costs another's result.

        Args:
            calls: Read and checked whole before anything is sent.
            max_workers: Calls at a time, in threads.
            on_result: Called in this thread with index and result, as each comes.
            executor: Runs the calls instead of threads: a process pool, a cluster.
            single_request: Sends one POST instead, whose calls the gateway runs one after another, and
                fails as a whole with the first bad one.

        Returns:
            The results in the order of the calls; one that raised is FAILED and has `exception`. Only
            a 401 is raised, if no call has a result; nothing is sent after it.
        """
        calls, job_id, report = list(calls), None, on_result or _ignore
        _require_number("max_workers", max_workers)
        _require(executor is None or hasattr(executor, "submit"), "executor must be an Executor.")
        _require(not (single_request and executor), "A single request cannot have an executor.")
        _require(callable(report), "on_result must be a function.")
        if single_request and calls:
            read = partial(_read_results, count=len(calls))
            job_id, results = self._transport.send(self._run_request(calls, timeout), read)
            for index, result in enumerate(results):
                report(index, result)
        else:
            requests = [self._run_request([call], timeout) for call in calls]
            results = _Batch(self, requests, executor).run(max_workers, report)
        return BatchResult._from_results(results, job_id)

    def _run_request(self, calls: Sequence[PrefabCall], timeout: float | None) -> _Request:
        for call in calls:
            _require_call(call)
        prefabs = {(call.prefab_id, call.version) for call in calls}
        prefab = dict(zip(("prefab_id", "version"), prefabs.pop())) if len(prefabs) == 1 else {}
        content = {"calls": [call.to_dict() for call in calls]}
        try:
            return self._request("POST", self._run_path, content=content, timeout=timeout, prefab=prefab)
        except ValidationError:
            for call in calls:
                for key, value in (call.parameters or {}).items():  # which one is it?
                    _encode({key: value}, f"Parameter {key!r} of {call.function_name!r}")
            raise

    def prefab(self, prefab_id: str, version: str) -> Prefab:
        """A prefab whose functions are called like methods. Nothing is sent."""
        return Prefab(self, prefab_id, version)

    def list_prefabs(self, status: str | None = None) -> list[PrefabInfo]:
        """The directory, newest first: all, or those `"deployed"` or `"failed"`. `GET /v1/prefabs`"""
        request = self._request("GET", "/v1/prefabs", {"status": status}, prefab={})
        return self._transport.send(request, _read_prefabs)

    def get_prefab_spec(self, prefab_id: str, version: str | None = None) -> _Json:
        """A prefab's functions. `GET /v1/prefabs/{prefab_id}/{version}/spec`

        Without `version`, those of the newest; of a failed one only if there is no other.
        """
        path = _segments(prefab_id)
        if version is None:
            found = [prefab for prefab in self.list_prefabs() if prefab.prefab_id == prefab_id]
            if not found:
                raise PrefabNotFoundError(prefab_id, "latest")
            version = max(found, key=lambda prefab: (prefab.status != "failed", _version_key(prefab.version))).version
        prefab = {"prefab_id": prefab_id, "version": version}
        return self._fetch("GET", f"/v1/prefabs/{path}/{_segments(version)}/spec", prefab=prefab)

    # Secrets

    def set_secret(self, prefab_id: str, secret_name: str, secret_value: str) -> None:
        """Stores a secret of yours for a prefab. `POST /v1/secrets`"""
        content = {"prefab_id": prefab_id, "secret_name": secret_name, "secret_value": secret_value}
        _require_text(**content)
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
            answer = self._fetch("POST", "/internal/files/generate_upload_url", content=content, repeatable=True,
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
        names_file = os.path.isfile(target) or (os.path.basename(local_path) and not os.path.exists(target))
        _require(names_file, f"{target} is not a file: local_path needs the file's name.")
        request = self._presigned("GET", self.get_presigned_url(s3_url))
        with _replacement(target) as file:
            download = _Download(request, file, on_progress)
            try:
                self._transport.send(request, download.receive)
            except GatewayError as error:
                if error.status_code != 416:
                    raise
                download.start_over()  # the object is shorter than what was received of it
                self._transport.send(request, download.receive)

    def get_presigned_url(self, s3_url: str, expires_in: int = 3600) -> str:
        """A URL that anyone can download from for `expires_in` seconds. `GET /internal/files/download`"""
        _require_s3_url("s3_url", s3_url)
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
        _require_timeout(timeout)
        if content is not None:
            options.update(body=_encode(content), headers={"Content-Type": "application/json"})
        asked = {name: value for name, value in (query or {}).items() if value is not None}
        _encode(asked)  # refuses half a surrogate pair, as in a body
        encoded = urlencode(asked, quote_via=quote)
        target = f"{self._prefix}{path}?{encoded}" if encoded else f"{self._prefix}{path}"
        timeout = self.timeout if timeout is None else timeout
        options.setdefault("repeatable", method != "POST")
        return _Request(method, self._origin, target, timeout, secrets=self._secrets + secrets, **options)

    def _presigned(self, method: str, url: str, **options: Any) -> _Request:
        """A request to the storage, which must not see the credential."""
        try:
            origin, target = _split_url(url)
        except ValueError as error:
            raise GatewayError(f"The URL that the gateway gave for a {method} {error}.") from None
        return _Request(method, origin, target, self.timeout, repeatable=True, to_gateway=False,
                        secrets=_secrets_of_query(target), **options)

    def _fetch(self, method: str, path: str, query: Mapping[str, Any] | None = None, *,
               expect: Mapping[str, type] = {}, **options: Any) -> _Json:
        """The JSON object that such a `_request` is answered with. `expect`: fields of it, and their types."""
        read = partial(_read_json, kind=dict, fields=expect)
        answer: _Json = self._transport.send(self._request(method, path, query, **options), read)
        return answer


# --- Command line ---------------------------------------------------------------------------------


def _progress_bar(label: str, unit: str = "B") -> _Progress:
    """A callback that shows rate and time left on stderr, if that is a terminal."""
    started = shown = time.monotonic()

    def show(done: int, total: int | None) -> None:
        nonlocal shown
        now = time.monotonic()
        if done == total or now - shown > 0.1:
            shown = now
            rate = max(done, 1) / max(now - started, 1e-6)
            rest = f"{100 * done // total} %, {(total - done) / rate:.0f} s left" if total else ""
            text = f"{label}: {done:,} {unit}, {rate:,.0f} {unit}/s {rest}"
            print(f"\r{text:<79}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else _ignore


def _print_json(document: Any) -> None:
    escape = "utf" not in str(sys.stdout.encoding).lower()  # the terminal could not show it
    print(json.dumps(document, ensure_ascii=escape), flush=True)


def _result_document(result: PrefabResult) -> _Json:
    return {name: getattr(result, name) for name in ("status", "output", "error", "job_id")}


def _raise_failed(results: Iterable[PrefabResult]) -> None:
    reasons = [f"{result.status}: {(result.error or {}).get('message') or result.error}"
               for result in results if not result.is_success()]
    if reasons:
        raise GatewayError("\n".join(dict.fromkeys(reasons)))


def _read_text(path: str) -> str:
    with sys.stdin if path == "-" else open(path, encoding="utf-8-sig") as file:
        return file.read()


def _name_and_value(text: str) -> tuple[str, str]:
    from argparse import ArgumentTypeError

    name, separator, value = text.partition("=")
    if not separator:
        raise ArgumentTypeError(f"must be NAME=VALUE, not {text!r}")
    return name, value


def _save(client: GatewayClient, urls: Iterable[str], folder: str) -> list[str]:
    """Downloads files by the names at the ends of their URLs, numbered where two are alike."""
    paths: list[str] = []
    for url in urls:
        name = re.sub(r"^\.*$|[\0\\:]", "_", url.rpartition("/")[2])
        while (path := os.path.join(folder, name)) in paths:
            name = f"{len(paths) + 1}-{name}"
        client.download_file(url, path, on_progress=_progress_bar(path))
        paths.append(path)
    return paths


def _print_stream(stream: EventStream, as_json: bool) -> None:
    failed = []
    for event in stream:
        if event.type == StreamEventType.ERROR:
            failed.append(PrefabResult(CallStatus.FAILED, error=_event_error(event)))
        if as_json:
            _print_json(event.raw)
        elif event.type == StreamEventType.CONTENT and isinstance(event.data, str):
            print(event.data, end="", flush=True)
        elif event.type == StreamEventType.CONTENT:
            _print_json(event.data)
    if not as_json:
        print(flush=True)
    _raise_failed(failed)


def _read_parameters(data: str, pairs: Iterable[tuple[str, str]]) -> _Json:
    if data == "-" or data.startswith("@"):
        data = _read_text(data.lstrip("@"))
    try:
        parameters: _Json = _decode_answer(data)
    except ValueError as error:
        raise ValidationError(f"-d is not JSON: {error}") from error
    _require(isinstance(parameters, dict), "-d must be a JSON object.")
    for name, text in pairs:
        parameters[name] = text
        with suppress(ValueError):
            parameters[name] = _decode_answer(text)
    return parameters


def _run_command(client: GatewayClient, args: Any) -> None:
    _require(not (args.stream and args.save), "--save does not go with --stream.")
    parameters = _read_parameters(args.data, args.parameter)
    files: dict[str, list[str]] = {}
    for name, path in args.file:
        if not path.startswith("s3://"):
            path = client.upload_input_file(path, on_progress=_progress_bar(path))
        files.setdefault(name, []).append(path)
    call = (args.prefab, args.version, args.function, parameters, files)
    if args.stream:
        return _print_stream(client.run(*call, stream=True), args.json)
    result: PrefabResult = client.run(*call)
    document = _result_document(result)
    try:
        if args.save:
            document["saved"] = _save(client, result.get_file_urls(), args.save)
    finally:  # the result was paid for, whatever becomes of its files
        _print_json(document)
    return _raise_failed([result])


def _batch_command(client: GatewayClient, args: Any) -> None:
    calls = []
    for number, line in enumerate(_read_text(args.path).split("\n"), 1):  # JSON may have other line ends in it
        try:
            if line.strip():
                calls.append(PrefabCall(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValidationError(f"Line {number} is not a call's fields as JSON: {error}") from error
    show, printed = _progress_bar("calls", "calls"), 0
    waiting: dict[int, _Json] = {}

    def on_result(index: int, result: PrefabResult) -> None:
        nonlocal printed
        waiting[index] = _result_document(result)
        while printed in waiting:  # in order, but at once: an interruption loses nothing
            _print_json(waiting.pop(printed))
            printed += 1
        show(printed + len(waiting), len(calls))

    try:
        _raise_failed(client.run_batch(calls, max_workers=args.workers, on_result=on_result).results)
    finally:
        for index in sorted(waiting):
            _print_json(waiting[index])


def _upload_command(client: GatewayClient, args: Any) -> None:
    _require(not (args.input and args.temp), "--input and --temp exclude each other.")
    _require(args.temp or (args.session is None and args.ttl is None), "--session and --ttl go with --temp.")
    upload: Callable[..., Any] = client.upload_input_file if args.input else client.upload_file
    if args.temp:
        upload = partial(client.upload_temp_file, ttl=86400 if args.ttl is None else args.ttl, session_id=args.session)
    answers: list[Any] = []
    try:
        for path in args.path:
            answer = upload(path, on_progress=_progress_bar(path))
            answers.append({"s3_url": answer} if args.input else answer)
    finally:  # what was uploaded is there, whatever becomes of the others
        if answers:
            _print_json(answers if len(args.path) > 1 else answers[0])


def _download_command(client: GatewayClient, args: Any) -> _Json:
    path = args.target or "."
    if os.path.isdir(path) or path.endswith(("/", os.sep)):
        (path,) = _save(client, [args.s3_url], path)
    else:
        client.download_file(args.s3_url, path, on_progress=_progress_bar(path))
    return {"path": path, "size": os.path.getsize(path)}


def _ls_command(client: GatewayClient, args: Any) -> list[_Json]:
    return list(client.iter_temp_files(args.session) if args.temp or args.session else client.iter_files())


def _secret_command(client: GatewayClient, args: Any) -> Any:
    if args.action == "list":
        return client.list_secrets(args.prefab)
    _require(args.prefab and args.name, f"secret {args.action} needs a prefab and a name.")
    if args.action == "delete":
        client.delete_secret(args.prefab, args.name)
    else:
        import getpass  # asks without an echo; an argument would show in the list of processes

        piped = not sys.stdin.isatty()
        value = sys.stdin.read().rstrip("\r\n") if piped else getpass.getpass(f"{args.name}: ")
        client.set_secret(args.prefab, args.name, value)
    return {"prefab_id": args.prefab, "secret_name": args.name}


# Name to function, help, example and arguments. What the function gives, unless None, is printed.
_COMMANDS: Mapping[str, tuple[Callable[[GatewayClient, Any], Any], str, str, str]] = {
    "run": (_run_command, "run a function", "text-tools 1.1.0 statistics -p text='Hello you'",
            "prefab version function -p/--parameter -d/--data -f/--file --stream --json --save"),
    "batch": (_batch_command, "run the calls of a file of JSON lines", "calls.jsonl --workers 4", "path --workers"),
    "list": (lambda client, args: [prefab.raw for prefab in client.list_prefabs(args.status)],
             "list the prefabs", "--status deployed", "--status"),
    "spec": (lambda client, args: client.get_prefab_spec(args.prefab, args.version),
             "show the functions of a prefab", "text-tools", "prefab version?"),
    "upload": (_upload_command, "upload files", "--input report.txt", "path+ --input --temp --ttl --session"),
    "download": (_download_command, "download a file", "s3://bucket/key/report.txt downloads/", "s3_url target?"),
    "url": (lambda client, args: {"presigned_url": client.get_presigned_url(args.s3_url)},
            "print a URL that anyone can download from", "s3://bucket/key/report.txt", "s3_url"),
    "ls": (_ls_command, "list the agent's files", "--temp", "--temp --session"),
    "cleanup": (lambda client, args: {"deleted_count": client.cleanup_temp_files(args.session)},
                "delete a session's temporary files", "session-1", "session"),
    "secret": (_secret_command, "set (from stdin), list or delete your secrets", "list", "action prefab? name?"),
}
_FLAG: _Json = {"action": "store_true"}
_PAIRS: _Json = {"action": "append", "default": [], "type": _name_and_value}
_ARGUMENTS: Mapping[str, _Json] = {
    "-p/--parameter": {**_PAIRS, "metavar": "NAME=VALUE", "help": "VALUE is JSON, else text"},
    "-d/--data": {"default": "{}", "metavar": "JSON", "help": "all parameters: JSON, @FILE or - for stdin"},
    "-f/--file": {**_PAIRS, "metavar": "NAME=PATH", "help": "an input: a file to upload, or an s3:// URL"},
    "--stream": {**_FLAG, "help": "print contents as they come"},
    "--json": {**_FLAG, "help": "with --stream: print events as JSON lines"},
    "--save": {"metavar": "FOLDER", "help": "download the output files"},
    "--workers": {"type": int, "default": 8, "help": "calls at a time"},
    "--status": {"help": "deployed or failed"},
    "--input": {**_FLAG, "help": "as the input of a call; needs no agent's token"},
    "--temp": {**_FLAG, "help": "temporary files"},
    "--ttl": {"type": int, "help": "seconds that temporary files live; default: 86400"},
    "--session": {"help": "an id that temporary files have in common"},
    "target": {"help": "a file or a folder"},
    "action": {"choices": ("set", "list", "delete")},
}


def _parse_arguments(argv: Sequence[str] | None) -> Any:
    import argparse  # here only: nobody else should wait for it

    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--base-url", help="the gateway; default: $GATEWAY_BASE_URL")
    common.add_argument("--timeout", type=float, help="seconds for each wait; default: 60")
    common.add_argument("-v", "--verbose", action="store_true", help="log requests to stderr")
    credentials = "The credential comes from X_INTERNAL_TOKEN, AGENT_BUILDER_API_KEY or GATEWAY_JWT_TOKEN."
    parser = argparse.ArgumentParser("gateway-sdk", description=credentials, parents=[common])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, (_, text, example, arguments) in _COMMANDS.items():
        epilog = f"example: gateway-sdk {command} {example}"
        subparser = commands.add_parser(command, help=text, description=text, epilog=epilog, parents=[common])
        for argument in arguments.split():
            name = argument.rstrip("?+")
            nargs: _Json = {"nargs": argument[-1]} if name != argument else {}
            subparser.add_argument(*name.split("/"), **nargs, **_ARGUMENTS.get(name, {}))
    return parser.parse_args(argv, argparse.Namespace(base_url=None, timeout=60, verbose=False))


def main(argv: Sequence[str] | None = None) -> int:
    """The command `gateway-sdk`.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - for good
    args = _parse_arguments(argv)
    if args.verbose:
        import logging

        logging.basicConfig(level=logging.DEBUG)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with GatewayClient.from_env(base_url=args.base_url, timeout=args.timeout) as client:
            document = _COMMANDS[args.command][0](client, args)
        if document is not None:
            _print_json(document)
    except KeyboardInterrupt:
        return 130
    except (GatewayError, OSError, ValueError, EOFError, RecursionError) as error:
        try:
            sys.stdout.flush()
        except OSError:  # keep the interpreter from trying it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough
            return 0
        print("error:", re.sub(r"\s*[\r\n]\s*", "; ", str(error).strip() or repr(error)), file=sys.stderr)
        return 2 if isinstance(error, ValueError) and getattr(error, "status_code", None) is None else 1
    return 0


# `from gateway_sdk.exceptions import ...` and `gateway_sdk.models`, as in the older SDK: the import
# looks into sys.modules before it asks whether the parent is a package.
exceptions = models = sys.modules[__name__]
sys.modules[f"{__name__}.exceptions"] = sys.modules[f"{__name__}.models"] = exceptions

if __name__ == "__main__":
    sys.exit(main())
