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
never lost. `GatewayClient` is what can be called, `AsyncGatewayClient` the same for programs that
await; every failure is a `GatewayError`.

Top to bottom, each section uses those above it: secrets, errors, data, arguments, requests,
connections, responses, transport, event stream, files, batches, client, async client, command line.
"""

from __future__ import annotations

import copy
import enum
import errno
import functools
import itertools
import json
import os
import re
import shlex
import socket
import sys
import threading
import time
import weakref
from base64 import b64encode, urlsafe_b64decode
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Optional,
    Protocol,
    TypeVar,
    Union,
    cast,
    overload,
)
from urllib.parse import quote, unquote, urlencode, urljoin, urlsplit

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future
    from ssl import SSLContext

    # From Python 3.10 on: type checkers know them, and nothing else asks.
    from typing import Concatenate, ParamSpec

    _P = ParamSpec("_P")
else:
    # `typing.get_type_hints` needs these names; importing the modules would slow the start.
    Executor = Future = SSLContext = Any

# An older Python compiles this file, and then fails at a line that says nothing to a user. As a
# script it ends in a sentence; an import raises what importers handle.
if sys.version_info < (3, 9):  # noqa: UP036
    _needed = "gateway_sdk needs Python 3.9 or newer"
    _problem = f"{_needed}, and this is Python {sys.version.split()[0]}."
    raise (SystemExit if __name__ == "__main__" else ImportError)(_problem)

__version__ = "1.1.0"

__all__ = [
    "DEFAULT_BASE_URL",
    "AgentContextRequiredError",
    "AsyncEventStream",
    "AsyncGatewayClient",
    "AuthenticationError",
    "BatchResult",
    "CallStatus",
    "EventStream",
    "GatewayClient",
    "GatewayError",
    "GatewayTimeoutError",
    "MissingSecretError",
    "Prefab",
    "PrefabCall",
    "PrefabInfo",
    "PrefabNotFoundError",
    "PrefabResult",
    "QuotaExceededError",
    "ServiceUnavailableError",
    "StreamEvent",
    "StreamEventType",
    "ValidationError",
    "__version__",
]

DEFAULT_BASE_URL = "http://nodeport.sensedeal.vip:30566"

_BACKOFF_BASE_SECONDS = 0.5
# A gateway that restarts is away for about three seconds.
_CONNECT_BACKOFF_BASE_SECONDS = 1.0
_BACKOFF_CAP_SECONDS = 8.0
# A longer wait is the caller's decision.
_RETRY_AFTER_CAP_SECONDS = 60.0
# Connecting does not wait for ever, even where `timeout` is None.
_CONNECT_CAP_SECONDS = 60.0
# What an address that does not answer may cost, if the host has another one.
_ADDRESS_SECONDS = 2.0
# How long a body may be silent that is whole, unless the longer one of its two lengths is right.
_SILENCE_SECONDS = 2.0
# The gateway's server hangs up after 5 idle seconds, unannounced.
_IDLE_SECONDS = 4.0
# A call may take minutes without a byte, and NATs forget silent connections.
_KEEP_ALIVE_SECONDS = 60
# How long a stream that said that it is done may stay open, where `timeout` is None.
_AFTER_DONE_SECONDS = 60.0
_MAX_REDIRECTS = 5
# Per origin.
_MAX_IDLE_CONNECTIONS = 100
_MAX_INTERIM_RESPONSES = 100
_MAX_HEAD_BYTES = 64 * 1024
_MAX_ERROR_BYTES = 64 * 1024
_MAX_WORKER_TRANSPORTS = 8
# Fits the processor's cache: larger blocks cost more.
_BLOCK_BYTES = 256 * 1024
_MAX_SHOWN_CHARACTERS = 500

_T = TypeVar("_T")
_Client = TypeVar("_Client", bound="GatewayClient")
_AsyncClient = TypeVar("_AsyncClient", bound="AsyncGatewayClient")
_Json = dict[str, Any]
_Path = Union[str, "os.PathLike[str]"]
# An input's name to the s3:// URLs of its files.
_Files = Mapping[str, Sequence[str]]
# Called with the bytes done, and the bytes in all (None: unknown).
_Progress = Callable[[int, Optional[int]], object]
# The headers of `GatewayClient(headers=)`, or a function that gives them.
_CallerHeaders = Union[Mapping[str, str], Callable[[], Mapping[str, str]]]

# Tells this import of the module from one in another process, also where both have the same number:
# containers count alike, and one process may hold several interpreters.
_MODULE_ID = os.urandom(8)


class _Process:
    """Where this code runs: another `id` after a fork, and in another interpreter."""

    id = _MODULE_ID, os.getpid()

    @classmethod
    def renew(cls) -> None:
        cls.id = _MODULE_ID, os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Process.renew)


def _log(message: str, *args: object) -> None:
    """Logs as `gateway_sdk`, if the program has imported `logging`. It must never cost the call."""
    logging = sys.modules.get("logging")
    if logging is None:
        return
    # Another thread may be in the middle of importing it, and a handler may raise.
    with suppress(Exception):
        logging.getLogger("gateway_sdk").debug(message, *args)


def _ignore(*_: object) -> None:
    """Does nothing: stands in for a callback that was not given."""


# --- Secrets --------------------------------------------------------------------------------------

# A shorter secret may be a part of any word, so it is hidden only where it stands alone.
_MIN_SECRET_BYTES = 8
# Escapes add or change these, and servers trim or drop them. In a form, a "+" is a blank.
_LOOSE_BYTES = b" \t\r\n\f\v\b\"'+\\"
_MAX_ESCAPE_BYTES = 32
_ENDING_ESCAPE = re.compile(
    rb"""(?xs)(?:
        %[\da-fA-F]{2} | &[\#\w]{2,30};
        | \\[^xuU] | \\x[\da-fA-F]{2} | \\u[\da-fA-F]{4} | \\U00(?:0[\da-fA-F]|10)[\da-fA-F]{4}
        | \xed[\xa0-\xaf].\xed[\xb0-\xbf].  # a pair of UTF-16
        | [\xc2\xc3][\x80-\xbf]             # Latin-1
    )\Z"""
)
# Where a word is no part of a larger one, as `test` is of `test-tools` or `a.test`.
_begins_alone = re.compile(rb"(?<![\w\x80-\xff])(?<![\w\x80-\xff][-./])").match
_ends_alone = re.compile(rb"(?![-./]?[\w\x80-\xff])").match


class _Secret:
    """A value that must not be shown, also where local variables are printed."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value.reveal() if isinstance(value, _Secret) else value

    def __repr__(self) -> str:
        return "***"

    def reveal(self) -> Any:
        """The value itself, never to be kept in a variable."""
        return self._value


def _meaning(escape: bytes) -> bytes:
    """What an escape stands for, in UTF-8, but for Latin-1: `repr` writes bytes like characters."""
    if escape.startswith(b"%"):
        return bytes([int(escape[1:], 16)])
    if escape.startswith(b"&"):
        import html

        return html.unescape(escape.decode()).encode("utf-8", "surrogatepass")
    if escape.startswith(b"\\"):
        if len(escape) == 2:
            return b" " if escape[1] in b"bfnrt" else escape[1:]
        return chr(int(escape[2:], 16)).encode("utf-8", "surrogatepass")
    if len(escape) == 2:
        return escape.decode().encode("latin-1")
    pair = escape.decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass")
    return pair.decode("utf-16").encode()


def _replace_escapes(plain: bytearray, begins: Any) -> None:
    """Puts what they stand for in place of the escapes that end `plain`, one within another."""
    while found := _ENDING_ESCAPE.search(plain[-_MAX_ESCAPE_BYTES:]):
        escape = bytes(found[0])
        meaning = _meaning(escape)
        # HTML has no such entity.
        if meaning == escape:
            return
        begin = begins[-len(escape)]
        del plain[-len(escape) :], begins[-len(escape) :]
        plain += meaning
        begins.extend([begin] * len(meaning))


def _unescape(text: str) -> tuple[bytes, Sequence[int]]:
    """`text` without the escapes of JSON, `repr`, URLs and HTML, and where in it each byte was.

    Each escape is replaced as soon as it is whole; what it stands for may be the end of another
    one. So the time is linear in `text`, however deep they are nested.
    """
    if text.isascii() and not re.search(r"[\\%&]", text):
        return text.encode(), range(len(text) + 1)
    from array import array

    # In here, as it takes milliseconds to compile.
    escapeless_run = re.compile(r"[^\\%&\x80-\U0010ffff]+").match
    plain, position = bytearray(), 0
    # An answer may have many megabytes: a list of numbers would have several times as many.
    begins = array("Q")
    while position < len(text):
        # Where no escape has begun, none can end before the next one begins.
        has_begun = re.search(rb"[\\%&\x80-\xff]", plain[-_MAX_ESCAPE_BYTES:])
        run = None if has_begun else escapeless_run(text, position)
        end = run.end() if run else position + 1
        encoded = text[position:end].encode("utf-8", "surrogatepass")
        plain += encoded
        begins.extend(range(position, end) if run else [position] * len(encoded))
        _replace_escapes(plain, begins)
        position = end
    begins.append(len(text))
    return bytes(plain), begins


def _find_all(content: bytes, wanted: bytes) -> Iterator[int]:
    begin = content.find(wanted)
    while begin >= 0:
        yield begin
        begin = content.find(wanted, begin + len(wanted))


class _Redactor:
    """Masks secrets in texts, in linear time. Neither escapes nor blanks and quotes count."""

    def __init__(self, secrets: Iterable[_Secret]) -> None:
        self._long: set[bytes] = set()
        self._short: set[bytes] = set()
        for secret in secrets:
            plain, _ = _unescape(secret.reveal().strip(" \t\r\n\"'"))
            dense = plain.translate(None, _LOOSE_BYTES)
            if len(dense) >= _MIN_SECRET_BYTES:
                self._long.add(dense)
            elif plain:
                self._short.add(plain)

    def __call__(self, text: str, *, short_ones: bool = True) -> str:
        """`text` with `***` for each secret; without `short_ones`, for data that code reads."""
        plain, begins = _unescape(text)
        dense = plain.translate(None, _LOOSE_BYTES)
        spans: list[tuple[int, int]] = []
        places: list[int] = []
        for wanted in self._long:
            for at in _find_all(dense, wanted):
                if not places:
                    places = [place for place, byte in enumerate(plain) if byte not in _LOOSE_BYTES]
                spans.append((places[at], places[at + len(wanted) - 1] + 1))
        for wanted in self._short if short_ones else ():
            for at in _find_all(plain, wanted):
                behind = at + len(wanted)
                if _begins_alone(plain, at) and _ends_alone(plain, behind):
                    spans.append((at, behind))
        masked, done = "", 0
        for first, behind in sorted(spans):
            if begins[first] >= done:
                masked += text[done : begins[first]] + "***"
            done = max(done, begins[behind])
        return masked + text[done:]


def _mask_queries(text: str) -> str:
    """`text` without the queries of the URLs in it, which may be presigned."""
    # Matches also what has no query, so that no part of the text is read twice.
    urls = r"(?i)(http[^\s\"'<>?]*)(\?[^\s\"'<>]+)?"
    return re.sub(urls, lambda url: url[1] + ("?***" if url[2] else ""), text)


# --- Errors ---------------------------------------------------------------------------------------
#
# GatewayError
#     AuthenticationError
#     PrefabNotFoundError
#     ValidationError               also a ValueError
#     QuotaExceededError
#     MissingSecretError
#     AgentContextRequiredError
#     ServiceUnavailableError
#         GatewayTimeoutError       also a TimeoutError


@dataclass(frozen=True)
class _Advice:
    """What the user can do about an error. The error's fields stand in braces."""

    python: str
    # As the command line says it, if that differs.
    shell: str = ""


# Also for readers of a message who know nothing of `may_have_run`: a shell user, an agent.
_MAY_HAVE_RUN = _Advice("It may have run all the same, so it was not sent again.")


def _text_of(value: Any) -> str:
    """`str` of a JSON value, which may exceed Python's limits."""
    with suppress(RecursionError, ValueError):
        return str(value)
    return "(too large or too deep to be shown)"


def _joined(parts: Iterable[str]) -> str:
    """The parts of a message, each on a line of its own, without empty lines."""
    lines = "\n".join(map(str, parts)).split("\n")
    return "\n".join(line.rstrip() for line in lines if line.strip())


class GatewayError(Exception):
    """Anything that went wrong; the class says what can be done about it.

    Attributes:
        message: What was asked, what came back and, where there is one, the remedy.
        details: The fields of the error's body, with secrets taken out.
        status_code: HTTP status; None if there was no answer.
        error_code: The gateway's own code, such as `"MISSING_SECRET"`, or None.
        request_id: The gateway's id of the request (`X-Request-ID`), or None.
        retry_after: Seconds that the answer asks to wait (`Retry-After`), or None.
        may_have_run: Whether the gateway may have run the call although no usable answer came.
    """

    # Attributes that `details` may have, too.
    _fields: ClassVar[Sequence[str]] = ()
    _class_advice: ClassVar[_Advice] = _Advice("")

    status_code: int | None = None
    error_code: str | None = None
    request_id: str | None = None
    retry_after: float | None = None
    may_have_run: bool = False
    # See `_retry_delay`.
    _fault: Literal["unreachable", "lost"] | None = None

    def __init__(
        self, message: str, details: Mapping[str, Any] | None = None, *,
        _advice: Iterable[_Advice | None] = (),
    ) -> None:
        told = [one for one in _advice if one]
        self.message = _joined([message, *(one.python for one in told)])
        # As the command line prints it.
        self._shell_message = _joined([message, *(one.shell or one.python for one in told)])
        super().__init__(self.message)
        self.details = dict(details or {})
        for name in ("error_code", *self._fields):
            setattr(self, name, self.details.get(name) or getattr(self, name))

    @classmethod
    def _create(
        cls, problem: str, details: Mapping[str, Any] | None = None, *advice: _Advice | None,
        may_have_run: bool = False, **attributes: Any,
    ) -> GatewayError:
        """An error with advice and these attributes, as the constructors take too few."""
        error = cls.__new__(cls)
        told = (*advice, _MAY_HAVE_RUN if may_have_run else None)
        GatewayError.__init__(error, problem, details, _advice=told)
        error.__dict__.update(attributes, may_have_run=may_have_run)
        return error

    @classmethod
    def _advice_for(cls, details: Mapping[str, Any]) -> _Advice:
        """The advice of the class, with the fields of this error in it."""
        values = {name: _text_of(details.get(name) or getattr(cls, name)) for name in cls._fields}
        words = {name: shlex.quote(value) for name, value in values.items()}
        advice = cls._class_advice
        return _Advice(advice.python.format_map(values), advice.shell.format_map(words))

    def _in_shell(self) -> str:
        return self._shell_message

    def __reduce__(self) -> tuple[Any, ...]:
        return self._create, (self.message,), self.__dict__


class AuthenticationError(GatewayError):
    """The gateway refused the credential (401, 403)."""


class PrefabNotFoundError(GatewayError):
    """There is no such prefab, version or function (404)."""

    _fields = ("prefab_id", "version")
    _class_advice = _Advice(
        "See client.list_prefabs(), and client.get_prefab_spec(prefab_id, version) for functions.",
        "See `gateway-sdk list`, and `gateway-sdk spec PREFAB VERSION` for functions.",
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

    _fields = ("limit", "used", "quota_type")
    _class_advice = _Advice("Wait, or have the quota raised: such a call is not repeated.")
    limit: int = 0
    used: int = 0
    quota_type: str = "unknown"

    def __init__(self, message: str, limit: int, used: int, quota_type: str) -> None:
        super().__init__(message, {"limit": limit, "used": used, "quota_type": quota_type})


class MissingSecretError(GatewayError):
    """The prefab needs a secret of yours; `instructions` say how to get it."""

    _fields = ("prefab_id", "secret_name", "instructions")
    _class_advice = _Advice(
        "Set it with client.set_secret({prefab_id!r}, {secret_name!r}, value).",
        "Set it with `gateway-sdk secret set {prefab_id} {secret_name}`.",
    )
    prefab_id: str = "unknown"
    secret_name: str = "unknown"  # noqa: S105
    instructions: str | None = None

    def __init__(self, prefab_id: str, secret_name: str, instructions: str | None = None) -> None:
        body = {
            "error_code": "MISSING_SECRET", "prefab_id": prefab_id, "secret_name": secret_name,
            "instructions": instructions,
        }
        problem = f"Missing required secret '{secret_name}' for prefab '{prefab_id}'"
        advice = (self._advice_for(body), _Advice(instructions or ""))
        super().__init__(problem, body, _advice=advice)


class AgentContextRequiredError(GatewayError):
    """The credential is not an agent's, which this file operation needs."""

    _class_advice = _Advice(
        "This needs an agent's token (internal_token=). upload_input_file() uploads a call's inputs"
        " without one.",
        "This needs an agent's token (X_INTERNAL_TOKEN). `gateway-sdk upload --input` uploads a"
        " call's inputs without one.",
    )

    def __init__(self, message: str | None = None) -> None:
        advice = () if message else (self._class_advice,)
        super().__init__(message or "", {"error_code": "MISSING_AGENT_CONTEXT"}, _advice=advice)


class ServiceUnavailableError(GatewayError):
    """No usable answer: a 5xx, or a connection that was refused, lost or cut short."""


class GatewayTimeoutError(ServiceUnavailableError, TimeoutError):
    """Connecting, or a wait for bytes, took longer than `timeout`."""


class _NotPicklableError(GatewayError, TypeError):
    """Raised where a client cannot be pickled."""


_STATUS_ERRORS: Mapping[int, type[GatewayError]] = {
    401: AuthenticationError,
    403: AuthenticationError,
    422: ValidationError,
    429: QuotaExceededError,
}
# By the `error_code` of a 400.
_CODE_ERRORS: Mapping[str, type[GatewayError]] = {
    "MISSING_SECRET": MissingSecretError,
    "MISSING_AGENT_CONTEXT": AgentContextRequiredError,
}


# --- Data -----------------------------------------------------------------------------------------


class CallStatus(str, enum.Enum):
    """How a call ended."""

    SUCCESS = "SUCCESS"
    FAILED = "FAILED"

    # Prints as its value on every Python.
    __str__ = str.__str__


class StreamEventType(str, enum.Enum):
    """What an event of a stream is."""

    START = "start"
    CONTENT = "content"
    PROGRESS = "progress"
    DONE = "done"
    ERROR = "error"

    __str__ = str.__str__


_EVENT_TYPES = {str(one): one for one in StreamEventType}
_ENVELOPE_KEYS = {"status", "output", "error", "files", "metadata", "job_id"}


@dataclass
class PrefabCall:
    """One call; `files` maps an input's name to `s3://` URLs, as `upload_input_file` gives them."""

    prefab_id: str
    version: str
    function_name: str
    parameters: Optional[_Json] = None
    files: Optional[_Files] = None

    def __repr__(self) -> str:
        # A presigned URL may have been given by mistake.
        shown = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return _mask_queries(f"PrefabCall({shown})")

    def to_dict(self) -> _Json:
        """The call as the gateway reads it."""
        inputs: _Json = {"parameters": self.parameters or {}}
        if self.files:
            inputs["files"] = self.files
        return {
            "prefab_id": self.prefab_id, "version": self.version,
            "function_name": self.function_name, "inputs": inputs,
        }


@dataclass
class StreamEvent:
    """One event of a stream; `raw` is the whole decoded object, with its further fields."""

    type: StreamEventType
    data: Any
    raw: _Json = field(default_factory=dict, repr=False, compare=False)

    # Of the last event that stands for the result of a function that does not stream.
    _result: ClassVar[Optional[PrefabResult]] = None

    @classmethod
    def from_dict(cls, data: _Json) -> StreamEvent:
        """The event of a decoded object; one of an unknown `type` is `content`."""
        name: Any = data.get("type")
        # A type that is a list or an object cannot be looked up.
        event_type = _EVENT_TYPES.get(name) if isinstance(name, str) else None
        return cls(event_type or StreamEventType.CONTENT, data.get("data"), data)


def _is_heartbeat(event: StreamEvent) -> bool:
    """Whether an event says nothing but that it lives: of an unknown type, and without data."""
    is_empty = event.data is None and event.type == StreamEventType.CONTENT
    return is_empty and _text_of(event.raw.get("type", "content")) not in _EVENT_TYPES


def _contents(events: Iterable[StreamEvent]) -> list[Any]:
    """The data of content events, but not of heartbeats."""
    return [
        event.data for event in events
        if event.type == StreamEventType.CONTENT and not _is_heartbeat(event)
    ]


def _decoded(events: Iterable[StreamEvent]) -> list[_Json]:
    """Events as the objects that they were made of, or could have been."""
    return [event.raw or {"type": str(event.type), "data": event.data} for event in events]


def _event_error(event: StreamEvent) -> _Json:
    """A result's `error`: an error event's data, and what may stand beside it."""
    error: _Json = {"message": "The function reported an error."}
    error.update({key: event.raw[key] for key in ("message", "error_code") if event.raw.get(key)})
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
        output: The envelope `{"status", "output", "files"}`, or the function's value itself.
        error: `{"message", "type", ...}` of a failed call.
        job_id: The gateway's id of the request.
        raw: The whole entry in the answer, or `{"events": [...]}` of a stream.
        exception: What `run` would have raised, of a failed call of a batch.
    """

    status: Union[CallStatus, str]
    output: Any = None
    error: Optional[_Json] = None
    job_id: Optional[str] = None

    def __post_init__(self) -> None:
        # Not fields: `dataclasses.asdict`, pydantic and FastAPI would try to make JSON of them.
        self.raw: _Json = {}
        self.exception: GatewayError | None = None

    @classmethod
    def _from_dict(cls, entry: _Json, job_id: str | None) -> PrefabResult:
        status, error = _text_of(entry.get("status")), entry.get("error")
        if not isinstance(error, (dict, type(None))):
            error = {"message": _text_of(error)}
        status = CallStatus.__members__.get(status, status)
        result = cls(status, entry.get("output"), error, job_id)
        result.raw = entry
        return result

    @classmethod
    def _from_exception(cls, exception: BaseException) -> PrefabResult:
        """The FAILED result that stands for a call whose request raised."""
        if not isinstance(exception, GatewayError):
            problem = f"The call was lost: {type(exception).__name__}: {exception}"
            lost = ServiceUnavailableError._create(problem, may_have_run=True)
            lost.__cause__ = exception
            exception = lost
        # They keep frames alive, and so the bodies of requests.
        for raised in (exception, exception.__cause__, exception.__context__):
            if raised:
                raised.__traceback__ = None
        error: _Json = {"message": exception.message, "type": type(exception).__name__}
        if exception.error_code:
            error["error_code"] = exception.error_code
        error["may_have_run"] = exception.may_have_run
        result = cls(CallStatus.FAILED, error=error)
        result.exception = exception
        return result

    @classmethod
    def from_events(cls, events: Iterable[StreamEvent]) -> PrefabResult:
        """The result of a stream: what `run` gives without `stream=True`.

        The function's value is its contents, joined if they are all text. If there are none, it is
        the data of the last `done` event that has any; dicts are merged, without the `files` and
        `job_id` that the gateway adds. An `error` event makes it FAILED.

        Args:
            events: What was read, or an `EventStream`, which is read to its end.
        """
        read: list[StreamEvent] = []
        try:
            read.extend(events)
            # A stream that somebody closed just ends. Who reads on gets to know of it.
            if isinstance(events, Iterator):
                read.extend(events)
        except GatewayError as broken:
            # What came was paid for.
            broken.details.update(partial_output=_contents(read), events=_decoded(read))
            raise
        results = [event._result for event in read if event._result]
        if results:
            return results[0]
        merged: _Json = {}
        files: _Json = {}
        value: Any = None
        job_id: Any = None
        error: _Json | None = None if read else {"message": "The stream had no events."}
        for event in read:
            data = event.data
            if event.type == StreamEventType.ERROR:
                error = _event_error(event)
            elif event.type == StreamEventType.DONE and isinstance(data, dict):
                own = dict(data)
                added, job_id = own.pop("files", None), own.pop("job_id", job_id)
                files.update(added if isinstance(added, dict) else {})
                merged.update(own)
                value = merged if own else value
            elif event.type == StreamEventType.DONE and data not in (None, "", "[DONE]"):
                value = data
        contents = _contents(read)
        if contents or value is None:
            is_text = all(isinstance(content, str) for content in contents)
            value = "".join(contents) if is_text else contents
        status = CallStatus.FAILED if error else CallStatus.SUCCESS
        output = {"status": str(status), "output": value, "files": files or None}
        result = cls(status, output, error, job_id)
        result.raw = {"events": _decoded(read)}
        return result

    def to_dict(self) -> _Json:
        """`status`, `output`, `error` and `job_id` as JSON has them."""
        status = str(self.status)
        return {"status": status, "output": self.output, "error": self.error, "job_id": self.job_id}

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

        It is `output["output"]` if `output` is an envelope: has `output` in it, or `status` and no
        keys but an envelope's. Any other `output` is the value itself.
        """
        value, keys = self.output, set(self.output if isinstance(self.output, dict) else ())
        if "output" in keys or ("status" in keys and keys <= _ENVELOPE_KEYS):
            value = value.get("output")
        return {} if value is None else value

    def get_files(self) -> dict[str, list[str]]:
        """The output files: name to list of `s3://` URLs."""
        files = self.get("files") or self.raw.get("files")
        found = {}
        for name, urls in files.items() if isinstance(files, dict) else ():
            listed = [urls] if isinstance(urls, str) else urls
            if isinstance(listed, list):
                found[name] = [url for url in listed if isinstance(url, str)]
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

    `status` is `"COMPLETED"` (all succeeded), `"PARTIAL_SUCCESS"` or `"FAILED"` (none did).
    `job_id` is that of a single request, else None.
    """

    job_id: Optional[str]
    status: str
    results: list[PrefabResult]

    @classmethod
    def _from_results(cls, results: list[PrefabResult], requests: int) -> BatchResult:
        job_id = results[0].job_id if requests == 1 else None
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
class PrefabInfo:
    """One version of a prefab in the directory; `status` is its deployment's, `raw` all of it."""

    prefab_id: str
    version: str
    name: str = ""
    description: str = ""
    tags: list[str] = field(default_factory=list)
    status: Optional[str] = None
    functions: list[Any] = field(default_factory=list)
    requires_secrets: bool = False
    secrets: list[_Json] = field(default_factory=list)
    is_official: bool = False
    author: Optional[str] = None
    raw: _Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def _from_dict(cls, entry: _Json) -> PrefabInfo:
        status = entry.get("deployment_status")
        known = {**entry, "prefab_id": entry["id"], "status": status, "raw": entry}
        names = [one.name for one in fields(cls) if known.get(one.name) is not None]
        return cls(**{name: known[name] for name in names})


# --- Arguments ------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """A value as a message shows it: short, also if it is huge, and without the query of a URL."""
    if isinstance(value, str):
        shown, query, _ = value[:1000].partition("?")
        return f"{shown!r:.80}{'?***' if query else ''}"
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 1e15):
        return f"{value!r:.80}"
    return f"a {type(value).__name__}"


def _check_text(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, str) or not value:
            raise ValidationError(f"{name} must be a text that is not empty, not {_shown(value)}.")


_is_header_value = re.compile(r" *[\x21-\x7e\xa1-\xff][\x20-\x7e\xa0-\xff]*").fullmatch


def _check_header_value(name: str, value: _Secret) -> None:
    """Raises if no header can carry the value. The error does not show it."""
    if not isinstance(value.reveal(), str) or not _is_header_value(value.reveal()):
        raise ValidationError(f"{name} must be printable ASCII or Latin-1 text that is not empty.")


def _check_number(
    name: str, value: Any, above: int = 0, below: int = 10**9, *, whole: bool = True
) -> None:
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not is_number or not above < value < below:
        kind = f"a {'whole ' if whole else ''}number above {above} and below {below}"
        raise ValidationError(f"{name} must be {kind}, not {_shown(value)}.")


def _check_timeout(seconds: Any) -> None:
    if seconds is not None:
        # poll() counts milliseconds in 31 bits.
        _check_number("timeout", seconds, below=2**31 // 1000, whole=False)


def _is_s3_url(url: Any) -> bool:
    return isinstance(url, str) and bool(re.match("s3://.", url))


_LIST_ADVICE = _Advice(
    "A result's get_file_urls(), or list_files(), gives one.", "`gateway-sdk ls` gives one."
)
_UPLOAD_ADVICE = _Advice(
    "client.upload_input_file(path) gives one.", "`gateway-sdk upload --input PATH` gives one."
)


def _check_s3_url(url: _Secret) -> None:
    # It may be presigned.
    if not _is_s3_url(url.reveal()):
        problem = f"s3_url must be an s3:// URL, not {_shown(url.reveal())}."
        raise ValidationError._create(problem, {}, _LIST_ADVICE)


def _files_problem(files: Any) -> str:
    """What is wrong with the files of a call; empty if nothing is."""
    if not isinstance(files, dict):
        return f"files must be a dict, not {_shown(files)}"
    for name, urls in files.items():
        place = f"files[{_shown(name)}]"
        if not isinstance(urls, (list, tuple)):
            return f"{place} must be a list of s3:// URLs, not {_shown(urls)}"
        for url in urls:
            if not _is_s3_url(url):
                return f"each of {place} must be an s3:// URL, not {_shown(url)}"
    return ""


def _check_call(call: Any, where: str = "") -> None:
    """Raises if a call cannot be sent. `where` is its place in a batch, such as `calls[3]: `."""
    if not isinstance(call, PrefabCall):
        advice = "PrefabCall(**call) takes a dict."
        raise ValidationError(f"{where}a call must be a PrefabCall, not {_shown(call)}: {advice}")
    names = ("prefab_id", "version", "function_name")
    _check_text(**{f"{where}{name}": getattr(call, name) for name in names})
    if not isinstance(call.parameters, (dict, type(None))):
        raise ValidationError(f"{where}parameters must be a dict, not {_shown(call.parameters)}.")
    problem = "" if call.files is None else _files_problem(call.files)
    if problem:
        raise ValidationError._create(f"{where}{problem}.", {}, _UPLOAD_ADVICE)


def _segments(*names: Any) -> str:
    """A path of one segment for each name, with the slashes in them encoded."""
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or name in ("", ".", ".."):
            raise ValidationError(f"{_shown(name)} cannot be a prefab_id, version or secret_name.")
    return "/".join(quote(name, safe="") for name in names)


_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _encode(content: Any, path: str = "", depth: int = 0) -> bytes:
    """JSON in UTF-8. The error for what it cannot carry names the path to it and the way out."""
    try:
        return _encode_json(content).encode()
    except (TypeError, ValueError, RecursionError) as error:
        # Not kept as a cause: it may show a secret.
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
        # Of the type: some objects have every attribute.
        kind = type(content)
        names = ("isoformat", "model_dump", "tolist")
        ways = [f"its .{name}()" for name in names if hasattr(kind, name)]
        if hasattr(kind, "__iter__"):
            ways.append("list(...) of it")
        if ways:
            problem = f"a {kind.__name__}: pass {ways[0]}"
    raise ValidationError(f"The request cannot be sent as JSON: {path or 'it'} is {problem}.")


# --- Requests -------------------------------------------------------------------------------------

_DEFAULT_PORTS = {"http": 80, "https": 443}
# Beside letters, digits and -._
_URL_CHARACTERS = "!#$%&'()*+,/:;=?@[]~"
_CREDENTIAL_KINDS = {
    "X-Internal-Token": "an internal token",
    "X-API-Key": "an API key",
    "Authorization": "a JWT",
}
# Only the SDK knows how it frames a message, and to whom it says who it is.
_OWN_HEADERS = (
    "accept-encoding connection content-encoding content-length content-type expect host if-range"
    " keep-alive proxy-authorization proxy-connection range te trailer transfer-encoding upgrade"
).split()
# RFC 9110 §5.1
_FIELD_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_is_field_name = re.compile(_FIELD_NAME).fullmatch


def _parse_url(url: Any) -> tuple[str, str, str]:
    """Origin and target of an http(s) URL, and what is wrong with it."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if ":" not in host:
            host = host.encode("idna").decode()
    except (ValueError, AttributeError, TypeError):
        return "", "", "is not a URL"
    if parts.scheme not in _DEFAULT_PORTS or not re.fullmatch(r"[\w.:%~-]+", unquote(host)):
        return "", "", "is not an http:// or https:// URL"
    if "@" in parts.netloc:
        return "", "", "must not contain a user name"
    if port == 0:
        return "", "", "has the port 0, to which nothing can connect"
    netloc = f"[{host}]" if ":" in host else host
    if port not in (None, _DEFAULT_PORTS[parts.scheme]):
        netloc += f":{port}"
    target = parts.path or "/"
    if parts.query:
        target += f"?{parts.query}"
    # A presigned URL must arrive as it was signed: only what HTTP cannot carry is encoded.
    return f"{parts.scheme}://{netloc}", quote(target, safe=_URL_CHARACTERS), ""


def _split_url(url: Any) -> tuple[str, str]:
    """Origin (RFC 6454), such as `https://host:8443`, and request target of an http(s) URL.

    A `ValueError` says what is wrong with it, and does not show it: it may be a secret.
    """
    url = _Secret(url)
    origin, target, problem = _parse_url(url.reveal())
    if problem:
        raise ValueError(problem)
    return origin, target


def _check_caller_headers(headers: _Secret, credential: str | None) -> Any:
    """A copy of a caller's headers. Raises if a request beside this header cannot carry them."""
    if not isinstance(headers.reveal(), Mapping):
        kind = "a mapping, or a function that gives one"
        raise ValidationError(f"headers must be {kind}, not {_shown(headers.reveal())}.")
    given = _Secret(dict(headers.reveal()))
    for name in given.reveal():
        if not isinstance(name, str) or not _is_field_name(name):
            raise ValidationError(f"headers: {_shown(name)} cannot be the name of a header.")
        if name.lower() in _OWN_HEADERS or name.lower() == (credential or "").lower():
            raise ValidationError(f"headers: {name} is set by the SDK.")
        _check_header_value(f"headers[{name!r}]", _Secret(given.reveal()[name]))
    return given.reveal()


class _FileBody:
    """A body with a file in it. Its length is known beforehand, and it can be sent again."""

    def __init__(self, head: bytes, file: Any, tail: bytes, on_progress: _Progress | None) -> None:
        self._head, self._file, self._tail = head, file, tail
        self._size = os.fstat(file.fileno()).st_size
        self._on_progress = on_progress or _ignore

    def __len__(self) -> int:
        return len(self._head) + self._size + len(self._tail)

    def __iter__(self) -> Iterator[bytes]:
        """The body in blocks. If the file is not as long as was promised, raises before its end."""
        yield self._head
        self._file.seek(0)
        sent = 0
        self._on_progress(sent, self._size)
        # One byte more than was promised: if it comes, the file has grown.
        while block := self._file.read(min(self._size - sent + 1, _BLOCK_BYTES)):
            sent += len(block)
            if sent > self._size:
                break
            yield block
            self._on_progress(sent, self._size)
        if sent != self._size:
            how = "longer" if sent > self._size else "shorter"
            raise GatewayError(f"{self._file.name} became {how} while it was being sent.")
        yield self._tail


@dataclass(frozen=True)
class _Credential:
    """The header that says who the client is. Its value is not shown."""

    header: str
    value: str = field(repr=False)


@dataclass(frozen=True)
class _Request:
    """All that is sent, and how it may be treated. It never changes; an attempt adds to a copy."""

    method: str
    origin: str
    target: str
    timeout: float | None
    headers: Mapping[str, str] = field(default_factory=dict)
    # Of `GatewayClient(headers=)`. They win over the SDK's own.
    caller_headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | _FileBody = b""
    # Sending it twice does no more than sending it once.
    idempotent: bool = False
    # False: to a storage, which must not see the credential.
    to_gateway: bool = True
    # Calls of functions in it.
    calls: int = 0
    # What a 404 is, and which prefab was asked for.
    not_found: type[GatewayError] = GatewayError
    prefab: Mapping[str, str] = field(default_factory=dict)
    # Texts that no message may show.
    secrets: tuple[_Secret, ...] = ()
    # Its own, in place of the client's: an API key that is exchanged. The answer is a secret, too.
    credential: _Credential | None = None
    # Of the proxy that an attempt goes through, for messages.
    proxy: str = ""

    def changed(self, **fields: Any) -> _Request:
        """A copy with other values in these fields; `replace` takes four times as long."""
        copied = object.__new__(_Request)
        vars(copied).update(vars(self), **fields)
        return copied

    def __repr__(self) -> str:
        # No query and no header, which may be secret.
        path = self.target.partition("?")[0]
        return f"{self.method} {path if self.to_gateway else self.origin + path}"

    def redact(self, text: str) -> str:
        """`text` without the credential, secrets and the queries of URLs."""
        return _mask_queries(_Redactor(self.secrets)(text))


def _query_secrets(target: str) -> tuple[_Secret, ...]:
    """The query of a presigned URL, and its values that are too long for a date or a name."""
    query = target.partition("?")[2]
    values = [unquote(pair.partition("=")[2]) for pair in query.split("&")]
    return tuple(map(_Secret, [query, *(value for value in values if len(value) > 9)]))


_may_be_secret = re.compile("(?i)auth|cookie|jwt|key|secret|session|token").search


def _header_secrets(headers: Mapping[str, str]) -> Iterator[_Secret]:
    """What may be secret in a caller's headers: no scheme, no cookie's name, no short word."""
    values = r"(?i)(?:(?:basic|bearer|token) |[^;=]+=)?([^;]{8,})"
    for name in filter(_may_be_secret, headers):
        yield from map(_Secret, re.findall(values, headers[name]))


# --- Connections ----------------------------------------------------------------------------------


class _Fault(Exception):  # noqa: N818
    """The network, or what a server sent, made an exchange fail.

    It is no `OSError`, so that an error of a signal handler, a file or a callback is never taken
    for one of the network. It has no text, as that may quote a secret: see `_wire_error`.

    Args:
        quoted: What the server sent.
    """

    def __init__(self, reason: str, error: Any = None, quoted: str = "") -> None:
        super().__init__()
        self.reason = reason
        self.error = error
        self.quoted = _Secret(quoted)

    @property
    def timed_out(self) -> bool:
        # Before Python 3.10, a `socket.timeout` is no `TimeoutError`.
        return isinstance(self.error, (socket.timeout, TimeoutError))


_sleep = time.sleep
# No descriptors or no memory are left.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_TIMEOUT_ADVICE = _Advice("A larger timeout= waits longer.", "A larger --timeout waits longer.")


def _refuses_client(error: Any) -> bool:
    """Whether a server said by an alert of TLS that it wants another certificate of the client."""
    alert = str(getattr(error, "reason", ""))
    return bool(re.search("ALERT.*(CERTIFICATE|UNKNOWN_CA|ACCESS_DENIED|HANDSHAKE)", alert))


def _fault_advice(request: _Request, fault: _Fault, connected: bool) -> tuple[_Advice | None, bool]:
    """What to do about a fault, and whether it is final: nothing ran, and a retry would fail."""
    error, ssl = fault.error, sys.modules.get("ssl")
    if sys.platform == "emscripten":
        return _Advice("This Python has no sockets: it runs in a browser or another sandbox."), True
    if _refuses_client(error):
        # With TLS 1.3 that comes when the answer is waited for.
        text = "The server refused this client's certificate, or that it has none."
        return _Advice(f"{text} ssl_context= can carry one.", text), True
    if connected:
        return None, False
    if ssl and isinstance(error, ssl.SSLCertVerificationError):
        text = "by a file that SSL_CERT_FILE names."
        python = f"Trust its certificate with ssl_context=, or {text}"
        return _Advice(python, f"Trust its certificate {text}"), True
    # Both are a lost connection, the second by Python 3.9.
    lost = (ssl.SSLEOFError, ssl.SSLZeroReturnError) if ssl else ()
    if ssl and isinstance(error, ssl.SSLError) and not isinstance(error, lost):
        text = "If the server does not speak TLS there, the URL must begin with http://."
        return _Advice(text), True
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        text = "Too much is open: close what is not needed, or raise the limit (ulimit -n)."
        return _Advice(f"{text} Streams and clients have close() and with.", text), False
    if request.to_gateway:
        text = "(or else GATEWAY_BASE_URL) right, and does the gateway run?"
        return _Advice(f"Is base_url {text}", f"Is --base-url {text}"), False
    return None, False


def _proxy_advice(request: _Request) -> _Advice | None:
    if not request.proxy:
        return None
    text = f"It went through {request.proxy}; NO_PROXY names hosts to be reached without it."
    return _Advice(text)


def _wire_error(
    request: _Request, fault: _Fault, doing: str, *, connected: bool = True
) -> GatewayError:
    """The error for an answer that did not come, or not whole.

    Args:
        connected: Whether the request may have arrived.
    """
    error_class: type[GatewayError] = ServiceUnavailableError
    # The answer to an API key is a secret.
    quoted = _Secret("***") if request.credential else fault.quoted
    reason = request.redact(fault.reason + quoted.reveal())
    reason = reason[:_MAX_SHOWN_CHARACTERS].rstrip(". \n")
    advice, is_final = _fault_advice(request, fault, connected)
    may_have_run = connected and not request.idempotent and not is_final
    kind = None if is_final else "lost" if connected else "unreachable"
    timeout_advice = None
    if fault.timed_out:
        error_class, kind, timeout_advice = GatewayTimeoutError, None, _TIMEOUT_ADVICE
        reason = f"nothing for {request.timeout or _CONNECT_CAP_SECONDS:g} s"
    problem = f"{request.redact(repr(request))}: {doing}: {reason}."
    wire_error = error_class._create(
        problem, {}, advice, timeout_advice, _proxy_advice(request),
        may_have_run=may_have_run, _fault=kind,
    )
    wire_error.__cause__ = fault.error
    return wire_error


@dataclass(frozen=True)
class _Proxy:
    """The http proxy that the environment names for an origin."""

    variable: str
    host: str
    port: int
    # The value of `Proxy-Authorization`, and what no message may show.
    authorization: str = field(default="", repr=False)
    secrets: tuple[_Secret, ...] = ()

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"the proxy {host}:{self.port} ({self.variable})"

    def headers(self) -> dict[str, str]:
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}


def _parse_proxy(variable: str, url: str) -> _Proxy | None:
    """The proxy of a URL; None if it cannot be used. An error raised here could show its login."""
    with suppress(ValueError):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        is_plain = re.fullmatch(r"(.*@)?([^@:]+|\[.+\])(:\d*)?", parts.netloc)
        # An "@" behind it: a password with a character that ends the host.
        if parts.scheme == "http" and is_plain and "@" not in parts[2] + parts[3] + parts[4]:
            host, port = parts.hostname or "", parts.port or 80
            if parts.username is None:
                return _Proxy(variable, host, port)
            user, password = unquote(parts.username), unquote(parts.password or "")
            login = b64encode(f"{user}:{password}".encode()).decode()
            secrets = _Secret(login), _Secret(password)
            return _Proxy(variable, host, port, f"Basic {login}", secrets)
    return None


def _goes_round_proxy(host: str, port: int, no_proxy: str) -> bool:
    """Whether `NO_PROXY` names a host: by name, suffix, address or network, or by `*`."""
    import ipaddress

    name, address = host.lower().rstrip("."), None
    with suppress(ValueError):
        address = ipaddress.ip_address(name)
    for entry in re.split(r"[,\s]+", no_proxy.lower()):
        # With a port, or with the brackets of an IPv6 address.
        found = re.fullmatch(r"\[(.*)\](?::(\d+))?|([^:]*):(\d+)", entry)
        wanted = (found[1] or found[3] or "") if found else entry
        wanted_port = (found[2] or found[4]) if found else None
        if wanted_port and int(wanted_port) != port:
            continue
        if wanted == "*":
            return True
        if address is not None:
            with suppress(ValueError):
                if address in ipaddress.ip_network(wanted, strict=False):
                    return True
        else:
            suffix = wanted.lstrip("*").strip(".")
            if suffix and (name == suffix or name.endswith(f".{suffix}")):
                return True
    return False


def _proxy_for(origin: str) -> _Proxy | None:
    """The proxy that the environment, or the system's settings, name for an origin.

    Raises:
        GatewayError: it cannot be used. To go round a proxy in silence would be worse.
    """
    has_settings = sys.platform in ("win32", "darwin")
    # The import takes as long as twenty calls.
    if not has_settings and not any(name.lower().endswith("_proxy") for name in os.environ):
        return None
    from urllib.request import getproxies, proxy_bypass

    server = urlsplit(origin)
    host, port = unquote(server.hostname or ""), server.port or _DEFAULT_PORTS[server.scheme]
    # There may be logins in them.
    proxies = _Secret(getproxies())
    scheme = server.scheme if proxies.reveal().get(server.scheme) else "all"
    if not proxies.reveal().get(scheme):
        return None
    if _goes_round_proxy(host, port, proxies.reveal().get("no", "")):
        return None
    if has_settings and proxy_bypass(host):
        return None
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper())
    variable = next((name for name in names if os.environ.get(name)), names[1])
    proxy = _parse_proxy(variable, proxies.reveal()[scheme])
    if proxy is None:
        raise GatewayError(
            f"{variable} must be an http:// URL, in which a login is percent-encoded;"
            " SOCKS and https proxies are not supported."
        )
    return proxy


def _list_of(fields: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """The items of a field that is a list, of all its lines, in lower case (RFC 9110 §5.6.1)."""
    if name not in fields:
        return []
    items = ",".join(fields[name]).lower().split(",")
    return [item.strip() for item in items if item.strip()]


@dataclass(frozen=True)
class _Head:
    """Start line and fields of an answer, and how its body is framed (RFC 9112 §4 to §6)."""

    status: int
    reason: str = field(repr=False)
    # By their names in lower case, each with the values of all its lines.
    fields: Mapping[str, Sequence[str]] = field(repr=False)
    # Bytes of the body; None: chunks, or whatever comes until the connection ends.
    length: int | None = None
    # Where two are given, of which either may be right: behind so many bytes, silence is the end.
    least_length: int | None = None
    chunked: bool = False
    # Codings of the transfer beside chunks.
    coding: str = ""
    # Whether the connection can be used again after the body.
    keep_alive: bool = False

    @property
    def framed(self) -> bool:
        """Whether the body says where it ends; if not, a break looks like the end."""
        return self.chunked or self.length is not None

    def get(self, name: str) -> str:
        """The first value of a field, whatever the case of its name; empty if there is none."""
        return next(iter(self.fields.get(name.lower(), ())), "")

    def media_type(self) -> str:
        # Some servers send two, with a comma between them.
        return self.get("Content-Type").partition(";")[0].partition(",")[0].strip().lower()

    def content_encoding(self) -> str:
        """How the body is encoded; empty if it is not. Some servers name a charset there."""
        if not self.coding and "content-encoding" not in self.fields:
            return ""
        codings = [self.coding, *_list_of(self.fields, "content-encoding")]
        none = ("", "identity", "none", "utf-8", "utf8")
        return ", ".join(coding[:80] for coding in codings if coding not in none)


def _read_line(reader: Any) -> bytes:
    """A line, with its end. Raises if the connection ends before that."""
    line: bytes = reader.readline(_MAX_HEAD_BYTES + 1)
    if not line.endswith(b"\n"):
        if len(line) > _MAX_HEAD_BYTES:
            raise _Fault(f"a line of more than {_MAX_HEAD_BYTES} bytes")
        raise _Fault("the connection was closed before the end")
    return line


# A field, or a line by which the one before goes on, or what is neither.
_field_lines = re.compile(rf"(?m)^(?:({_FIELD_NAME})[ \t]*:(.*)|[ \t]+(.*)|.*)$").findall


def _read_fields(reader: Any) -> dict[str, list[str]]:
    """The lines up to the next empty one, as fields.

    Blanks around names and values do not count, and a line that is no field is passed over by
    itself: `http.client` takes it for the end of the head, and the rest for the body.
    """
    lines, size = [], 0
    while (line := _read_line(reader)).strip(b"\r\n"):
        lines.append(line)
        size += len(line)
        if size > _MAX_HEAD_BYTES:
            raise _Fault(f"a head of more than {_MAX_HEAD_BYTES} bytes")
    fields: dict[str, list[str]] = {}
    values: list[str] = []
    for name, value, more in _field_lines(b"".join(lines).decode("latin-1")):
        if name:
            values = fields.setdefault(name.lower(), [])
            values.append(value.strip(" \t\r"))
        elif more:
            # If the line before was no field, this is lost with it.
            values[-1:] = [f"{last} {more}".strip(" \t\r") for last in values[-1:]]
        else:
            values = []
    return fields


def _framing(status: int, fields: Mapping[str, Sequence[str]], is_old: bool) -> dict[str, Any]:
    """How the body behind a head is framed. Where that is doubtful, the connection is not kept.

    Args:
        is_old: The answer is in HTTP/1.0, where a connection ends unless the server says otherwise.
    """
    options = _list_of(fields, "connection")
    keep_alive = "close" not in options and (not is_old or "keep-alive" in options)
    lengths = {length.lstrip("0") or "0" for length in _list_of(fields, "content-length")}
    named = _list_of(fields, "transfer-encoding")
    # As other clients do: `identity` is none, and what servers behind each other say twice is one.
    codings = [coding for coding in named if coding != "identity"]
    if status < 200:
        return {"length": 0}
    if status in (204, 304):
        return {"length": 0, "keep_alive": keep_alive and not named and lengths <= {"0"}}
    if codings:
        chunked = codings[-1] == "chunked"
        others = [coding for coding in codings if not chunked or coding != "chunked"]
        keep_alive = keep_alive and named == ["chunked"] and not lengths and not is_old
        return {"chunked": chunked, "coding": ", ".join(others), "keep_alive": keep_alive}
    # Python itself refuses to read very long numbers.
    sizes = [int(length[:19]) for length in lengths if length.isdecimal()]
    if lengths and not sizes:
        raise _Fault("the answer's length is no number")
    if len(lengths) == 1:
        return {"length": sizes[0], "keep_alive": keep_alive and not named}
    return {"least_length": min(sizes, default=None)}


_status_line = re.compile(r"HTTP/1\.(\d)[ \t]+([1-9]\d\d)(?:[ \t]+(.*))?").fullmatch


def _read_head(reader: Any) -> _Head:
    """The head of an answer, behind all interim ones (RFC 9110 §15.2)."""
    for _ in range(_MAX_INTERIM_RESPONSES):
        line = _Secret(_read_line(reader).decode("latin-1").rstrip())
        found = _status_line(line.reveal())
        if not found:
            problem = "the server does not answer in HTTP/1.1, but with "
            raise _Fault(problem, quoted=repr(line.reveal()))
        status, fields = int(found[2]), _read_fields(reader)
        # After 101 the server speaks another protocol.
        if status >= 200 or status == 101:
            framing = _framing(status, fields, found[1] == "0")
            return _Head(status, (found[3] or "").strip(), fields, **framing)
    raise _Fault(f"more than {_MAX_INTERIM_RESPONSES} interim answers")


def _head_bytes(start_line: str, headers: Mapping[str, str]) -> bytes:
    lines = [start_line, *(f"{name}: {value}" for name, value in headers.items()), "\r\n"]
    return "\r\n".join(lines).encode("latin-1")


def _request_head(request: _Request, proxy: _Proxy | None) -> bytes:
    """Request line and headers. `proxy`: the one that is asked to send it on."""
    netloc = request.origin.partition("://")[2]
    if "%" in netloc:
        # The zone of an IPv6 address means something to this machine alone (RFC 6874 §3).
        netloc = re.sub(r"%.*\]", "]", netloc)
    headers = {
        "Host": netloc,
        "User-Agent": f"agent-builder-gateway-sdk/{__version__}",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
    }
    if request.caller_headers:
        given = {name.lower() for name in request.caller_headers}
        headers = {name: headers[name] for name in headers if name.lower() not in given}
    headers.update(request.headers)
    headers.update(request.caller_headers)
    if request.method in ("POST", "PUT"):
        headers["Content-Length"] = str(len(request.body))
    target = request.target
    if proxy:
        headers.update(proxy.headers())
        # A proxy needs the whole URL (RFC 9112 §3.2.2).
        target = f"{request.origin}{target}"
    return _head_bytes(f"{request.method} {target} HTTP/1.1", headers)


def _serialize(request: _Request, proxy: _Proxy | None) -> Iterable[bytes]:
    """A request in blocks. No variable holds its head, as that has the credential in it."""
    if isinstance(request.body, bytes):
        # One block: a body by itself would be a packet by itself.
        return [_request_head(request, proxy) + request.body]
    return itertools.chain([_request_head(request, proxy)], request.body)


def _came_through(error: BaseException, modules: Iterable[str]) -> bool:
    """Whether all the code that an error came out of is of these modules, or in one of them."""
    traceback = error.__traceback__
    while traceback:
        module = str(traceback.tb_frame.f_globals.get("__name__"))
        if module not in modules and module.partition(".")[0] not in modules:
            return False
        traceback = traceback.tb_next
    return True


def _is_own(error: GatewayError) -> bool:
    """Whether an error is this module's own, and none that came out of a handler or a callback."""
    return _came_through(error, [__name__])


class _Connection:
    """A connection to an origin, straight or through a proxy, from before it is open to its end.

    One thread uses it at a time. Any other may close it, in every phase; so may a signal handler.
    """

    def __init__(self, origin: str, proxy: _Proxy | None) -> None:
        self.origin = origin
        self.proxy = proxy
        self.process_id = _Process.id
        self.idle_since = 0.0
        self.reader: Any = None
        self._sock: Any = None
        self._is_tls = False
        # Held during an operation on the socket: nobody else may free its descriptor meanwhile, as
        # a stranger's socket could get the same number.
        self._busy = threading.Lock()
        # Taken once, by whoever closes it.
        self._closing = threading.Lock()
        # No operation begins any more; those that wait have been woken up, too.
        self._shut = self._woken = False

    def open(self, timeout: float | None, tls: SSLContext | None, answered: dict[Any, Any]) -> None:
        """Connects.

        Args:
            timeout: Seconds for all addresses of the host, and then for each wait of a handshake.
            answered: By host and port, the address that answered last time. It is tried first.
        """
        server = urlsplit(self.origin)
        host, port = unquote(server.hostname or ""), server.port or _DEFAULT_PORTS[server.scheme]
        peer = (self.proxy.host, self.proxy.port) if self.proxy else (host, port)
        self._connect(peer, timeout, answered)
        self._set_options()
        self.set_timeout(timeout)
        if tls:
            if self.proxy:
                self._open_tunnel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
            # A certificate's name has neither a zone nor a dot at its end.
            name = host.partition("%")[0].rstrip(".")
            wrap = partial(tls.wrap_socket, server_hostname=name, do_handshake_on_connect=False)
            self._sock, self._is_tls = self.guarded(wrap, self._sock), True
            self.guarded(self._sock.do_handshake)
        self.reader = self._sock.makefile("rb")

    def _connect(
        self, peer: tuple[str, int], timeout: float | None, answered: dict[Any, Any]
    ) -> None:
        """Connects to the first address that answers (RFC 8305 without its racing)."""
        deadline = time.monotonic() + (timeout or _CONNECT_CAP_SECONDS)
        addresses = self.guarded(socket.getaddrinfo, *peer, 0, socket.SOCK_STREAM)
        addresses.sort(key=lambda entry: entry[4] != answered.get(peer))
        fault = _Fault("timed out", socket.timeout())
        for place, (family, kind, protocol, _, address) in enumerate(addresses, 1):
            seconds = deadline - time.monotonic()
            if place < len(addresses):
                # The others must get their share of a short timeout.
                seconds = min(seconds / 2, _ADDRESS_SECONDS)
            if seconds <= 0:
                break
            try:
                self._sock = self.guarded(socket.socket, family, kind, protocol)
                self.set_timeout(seconds)
                self.guarded(self._sock.connect, address)
            except _Fault as refused:
                fault = refused
                if self._sock is not None:
                    self._sock.close()
            else:
                answered[peer] = address
                return
        raise fault

    def _set_options(self) -> None:
        """Sets what makes calls faster and long ones safer, as far as a sandbox lets it."""
        for level, name, value in (
            (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
            (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
            # Linux and Windows; macOS.
            (socket.IPPROTO_TCP, "TCP_KEEPIDLE", _KEEP_ALIVE_SECONDS),
            (socket.IPPROTO_TCP, "TCP_KEEPALIVE", _KEEP_ALIVE_SECONDS),
        ):
            with suppress(OSError, AttributeError):
                self._sock.setsockopt(level, getattr(socket, name), value)

    def _open_tunnel(self, authority: str) -> None:
        """Has the proxy connect to an https server (RFC 9110 §9.3.6)."""
        login = self.proxy.headers() if self.proxy else {}
        head = _head_bytes(f"CONNECT {authority} HTTP/1.1", {"Host": authority, **login})
        del login
        self._send_all([head])
        del head
        with self._sock.makefile("rb") as reader:
            answer = self.guarded(_read_head, reader)
        if not 200 <= answer.status < 300:
            raise _Fault(f"the proxy answered {answer.status} {answer.reason}")

    def guarded(self, operation: Callable[..., _T], *arguments: Any) -> _T:
        """What an operation on the socket gives. Whoever closes it meanwhile only wakes it up.

        Raises:
            _Fault: it failed, or is closed. What a signal handler raised comes out as it is.
        """
        try:
            with self._busy:
                if self._shut:
                    raise _Fault("it was closed here")
                return operation(*arguments)
        except _Fault as caught:
            fault = caught
        except (OSError, ValueError) as error:
            if not self._is_own(error, operation):
                raise
            fault = _Fault(str(error) or type(error).__name__, error.with_traceback(None))
        finally:
            if self._woken:
                self._free()
        try:
            # Without its frames, and those of the socket: they hold what the server sent. Out here,
            # as an error that is handled while another one is raised gets them back in PyPy.
            raise fault.with_traceback(None)
        finally:
            # Its new frame would keep it alive, and all that this frame knows.
            del fault

    def _is_own(self, error: Exception, operation: Callable[..., Any]) -> bool:
        """Whether an error is the socket's, and none that a signal handler raised meanwhile."""
        kind = type(self._sock).__module__.partition(".")[0]
        # The last one is what PyPy's `ssl` is made of.
        if _came_through(error, (__name__, kind, "socket", "ssl", "_cffi_ssl")):
            return True
        # Names are resolved by other modules, too.
        is_name = isinstance(error, (socket.gaierror, UnicodeError))
        return is_name and operation is socket.getaddrinfo

    def close(self) -> None:
        """Closes it, also while another thread waits in an operation on it, which then ends."""
        if self._closing.acquire(blocking=False):
            # Before, so that nothing begins to wait in between.
            self._shut = True
            # When Python ends, the names of this module may be gone already.
            if _Process is not None:
                self._wake()
            # Only now may whoever uses it free the descriptor.
            self._woken = True
            self._free()

    def _wake(self) -> None:
        """Ends an operation that waits. After a fork, the parent may still use the connection."""
        if self._sock is not None and self.process_id == _Process.id:
            with suppress(OSError):
                self._bare().shutdown(socket.SHUT_RDWR)

    def _free(self) -> None:
        """Frees the descriptor, unless somebody uses it, who will do so afterwards."""
        if self._busy.acquire(blocking=False):
            try:
                self._free_now()
            finally:
                self._busy.release()

    def _free_now(self) -> None:
        for opened in (self.reader, self._sock):
            if opened is not None:
                opened.close()

    # Nobody uses it any more: a stream was dropped, or Ctrl-C came between two steps of closing it.
    __del__ = _free_now

    def _bare(self) -> Any:
        """The methods of the socket itself: TLS's would not wake a reader, nor see all bytes."""
        ssl: Any = sys.modules.get("ssl")
        return super(ssl.SSLSocket, self._sock) if self._is_tls else self._sock

    def is_stale(self) -> bool:
        """Whether it was idle for so long that the server may be about to hang up."""
        return time.monotonic() - self.idle_since > _IDLE_SECONDS

    def is_alive(self) -> bool:
        """Whether it can be used again: neither stale nor hung up, and nothing is left in it."""
        if self.is_stale():
            return False
        try:
            self._sock.settimeout(0)
            # Half a record of TLS is nothing to read yet, but seen by the socket itself.
            if self._is_tls and self._has_bytes():
                return False
            # A byte would be left over from an answer, and b"" would be the end.
            return self.reader.read(1) is None
        except (OSError, ValueError) as error:
            # So TLS reports that nothing can be read.
            return type(error).__name__ == "SSLWantReadError"

    def _has_bytes(self) -> bool:
        """Whether a byte, or the end, has arrived on the socket below TLS."""
        try:
            self._bare().recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        return True

    def set_timeout(self, seconds: float | None) -> None:
        """Seconds for each wait from now on; 0 reads only what has already arrived."""
        self.guarded(self._sock.settimeout, seconds)

    def send(self, request: _Request) -> _Fault | None:
        """Sends a request. Returns what broke it off: what the server said by then can be read."""
        self.set_timeout(request.timeout)
        # Through a tunnel, the server itself is asked.
        proxy = None if self._is_tls else self.proxy
        return self._send_all(_serialize(request, proxy))

    def _send_all(self, blocks: Iterable[bytes]) -> _Fault | None:
        for block in blocks:
            left = memoryview(block)
            try:
                # Not sendall: its timeout would be for the whole of it.
                while left:
                    left = left[self.guarded(self._sock.send, left) :]
            except _Fault as fault:
                with suppress(_Fault):
                    self.set_timeout(0)
                return fault
        return None


def _close_all(connections: Mapping[Any, list[_Connection]]) -> None:
    for idle in list(connections.values()):
        with suppress(IndexError):
            while True:
                idle.pop().close()


class _Pool:
    """Idle connections by process and origin; the last one used is the first to be used again.

    Needs no lock, as a list's `append` and `pop` are atomic, so a fork can't leave one held.
    """

    def __init__(self) -> None:
        self._idle: dict[Any, list[_Connection]] = {}
        self._limit = _MAX_IDLE_CONNECTIONS
        # See `_Connection.open`.
        self.answered: dict[Any, Any] = {}
        # Not `__del__`: when Python ends, that would run when the module's names are gone already.
        weakref.finalize(self, _close_all, self._idle)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has no connections yet.
        return _Pool, ()

    def acquire(self, origin: str) -> _Connection | None:
        """An idle connection that can be used, or None."""
        idle = self._idle.get((_Process.id, origin), [])
        with suppress(IndexError):
            while True:
                connection = idle.pop()
                if connection.is_alive():
                    return connection
                connection.close()
        return None

    def release(self, connection: _Connection) -> None:
        """Keeps a connection for its next use, and drops those that were idle for too long."""
        connection.idle_since = time.monotonic()
        self._idle.setdefault((connection.process_id, connection.origin), []).append(connection)
        for idle in list(self._idle.values()):
            with suppress(IndexError):
                while len(idle) > self._limit or idle[0].is_stale():
                    idle.pop(0).close()

    def close(self) -> None:
        """Closes the idle connections now, and those in use when they come back."""
        self._limit = 0
        _close_all(self._idle)


class _Flight:
    """One request on its way, with the connection that it uses at the moment, if any.

    The connection belongs to it until `take` or `close`. To cancel it is safe in every phase, from
    any thread and from a signal handler.
    """

    def __init__(self, scopes: Iterable[_Scope]) -> None:
        self.cancelled = False
        self._held: list[_Connection] = []
        # Released by `cancel`, so that a wait between two attempts ends.
        self._gate = threading.Lock()
        self._gate.acquire()
        for scope in scopes:
            scope.add(self)

    def hold(self, connection: _Connection) -> None:
        """From now on, the connection ends with this request."""
        self._held.append(connection)
        if self.cancelled:
            self.close()

    def holds(self, connection: _Connection) -> bool:
        """Whether the connection is still this request's own."""
        return connection in self._held

    def take(self) -> _Connection | None:
        """The connection, which is the caller's now. One atomic step: only one caller gets it."""
        try:
            return self._held.pop()
        except IndexError:
            return None

    def close(self) -> None:
        """Closes the connection, unless somebody took it."""
        connection = self.take()
        if connection:
            connection.close()

    def cancel(self) -> None:
        """Ends the request: whoever waits for it gets an error, and it is not sent again."""
        self.cancelled = True
        self.close()
        with suppress(RuntimeError):
            self._gate.release()

    def wait(self, seconds: float) -> None:
        """Waits, but no longer than until it is cancelled."""
        # Whoever replaced it, as tests do, wants it to be called.
        if time.sleep is not _sleep:
            time.sleep(seconds)
            return
        # Without a clock, which tests freeze.
        while not self.cancelled and seconds > 0:
            # On Windows only the gaps between waits notice Ctrl-C.
            if self._gate.acquire(timeout=min(seconds, 0.2)):
                return
            seconds -= 0.2


class _Scope:
    """Requests in flight that can be ended together, from any thread: of a client, of one call."""

    def __init__(self) -> None:
        self.cancelled = False
        # Weak: a request leaves it by being forgotten.
        self._flights: set[weakref.ref[_Flight]] = set()

    def add(self, flight: _Flight) -> None:
        self._flights.add(weakref.ref(flight, self._flights.discard))
        if self.cancelled:
            flight.cancel()

    def cancel(self) -> None:
        """Ends its requests at once, and those that are still to come."""
        self.cancelled = True
        for reference in list(self._flights):
            flight = reference()
            if flight is not None:
                flight.cancel()


# --- Responses ------------------------------------------------------------------------------------


_chunk_size = re.compile(b"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n").fullmatch


class _Response:
    """An answer, whose head is read. Its body can be read once, piece by piece (RFC 9112 §6, §7).

    Attributes:
        broken: What broke off sending the request, if it did.
        body: What `read_all` read.
    """

    def __init__(
        self, request: _Request, flight: _Flight, connection: _Connection, pool: _Pool, head: _Head
    ) -> None:
        self.request = request
        self.head = head
        self.status = head.status
        self.broken: _Fault | None = None
        self.body = b""
        self._flight = flight
        self._connection = connection
        self._pool = pool
        self._deadline: float | None = None
        # Bytes that are still to come of the chunk or the body; None: until the connection ends.
        self._missing = 0 if head.chunked else head.length
        # Whether a chunk has: the next one then stands behind its line end.
        self._has_begun = False
        # Bytes of a body that has two lengths.
        self._received = 0
        # Whether nothing need follow: the last chunk has come, or the lesser of two lengths.
        self._is_whole = False
        # After a 5xx the server may hang up without having said so: uvicorn does.
        self._may_keep = head.keep_alive and head.status < 500

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives. At its end the connection goes back to the pool.

        Raises:
            ServiceUnavailableError: the connection broke, or `close` was called meanwhile.
        """
        # No `except` here: when Python ends with an open stream, its name would be gone already.
        try:
            yield from iter(self._next_piece, b"")
        finally:
            self.close()

    def _next_piece(self) -> bytes:
        """The next bytes; none at the end of the body, when the connection is given back."""
        try:
            if self._deadline is not None or self._is_whole:
                self._limit_wait()
            piece = self._connection.guarded(self._read_some)
            if piece:
                return piece
            if self.head.chunked:
                # Fields may follow the last chunk. If they break off, the body is here already.
                self._is_whole = True
                self._limit_wait()
                self._connection.guarded(_read_fields, self._connection.reader)
            if self._flight.take() is None:
                raise _Fault("it was closed here")
            if self._may_keep and not self.broken:
                self._pool.release(self._connection)
            else:
                self._connection.close()
            return b""
        except StopIteration as error:
            # A signal handler's, which `iter` would take for the end: see `_attempt`.
            raise RuntimeError("StopIteration") from error
        except _Fault as caught:
            fault = caught
        # Out here, the error has no context: frames there hold what the server sent.
        if self._flight.take() is None:
            fault = _Fault("it was closed here")
        elif self._is_whole:
            self._connection.close()
            return b""
        self._connection.close()
        raise self.failure(fault, f"the answer ({self.status}) was cut short")

    def _limit_wait(self) -> None:
        """Sets how long the next wait may be."""
        seconds = self.request.timeout
        if self._deadline is not None:
            seconds = max(self._deadline - time.monotonic(), 1e-3)
        if self._is_whole:
            seconds = min(seconds or _SILENCE_SECONDS, _SILENCE_SECONDS)
        self._connection.set_timeout(seconds)

    def _read_some(self) -> bytes:
        """The next bytes; none at the end of the body. One operation on the connection."""
        reader = self._connection.reader
        if self.head.chunked and self._missing == 0:
            self._missing = self._begin_chunk(reader)
        if self._missing == 0:
            return b""
        size = _BLOCK_BYTES if self._missing is None else min(self._missing, _BLOCK_BYTES)
        piece: bytes = reader.read1(size)
        if self._missing is not None:
            if not piece:
                raise _Fault(f"{self._missing} more bytes were expected")
            self._missing -= len(piece)
        elif self.head.least_length is not None:
            self._received += len(piece)
            self._is_whole = self._received >= self.head.least_length
            if not piece and not self._is_whole:
                raise _Fault("more bytes were expected")
        return piece

    def _begin_chunk(self, reader: Any) -> int:
        """The size of the next chunk; 0 for the last one.

        As lenient as Python's own client: the content will show if it was right. But where anything
        is not exactly as it should be, the connection is not used again.
        """
        line = reader.readline(_MAX_HEAD_BYTES)
        # The line end behind the last chunk is read only now: its data must not wait for it.
        if self._has_begun:
            self._may_keep = self._may_keep and line == b"\r\n"
            if not line.strip(b"\r\n"):
                line = reader.readline(_MAX_HEAD_BYTES)
        found = _chunk_size(line)
        self._has_begun = True
        return int(found[1], 16) if found else self._odd_chunk_size(line)

    def _odd_chunk_size(self, line: bytes) -> int:
        """The size in a line that is not written as it should be. Raises if there is none."""
        self._may_keep = False
        if not line.endswith(b"\n"):
            raise _Fault("the connection was closed before the end")
        with suppress(ValueError):
            size = int(line.partition(b";")[0], 16)
            if size >= 0:
                return size
        raise _Fault("a chunk's size is no number")

    def read_all(self) -> bytes:
        """The whole body, which `body` keeps."""
        self.body = b"".join(iter(self._next_piece, b""))
        return self.body

    def wait_at_most(self, seconds: float | None) -> None:
        """From now on, waits for all that is to come no longer than this; None: for each piece."""
        if seconds is None and self._deadline is None:
            return
        # At the end of the body the connection is no longer its own: another call may wait on it.
        if self._flight.holds(self._connection):
            self._deadline = None if seconds is None else time.monotonic() + seconds
            with suppress(_Fault):
                self._connection.set_timeout(seconds or self.request.timeout)

    def request_id(self) -> str | None:
        given = self.request.redact(self.head.get("X-Request-ID"))
        return given[:_MAX_SHOWN_CHARACTERS] or None

    def failure(self, fault: _Fault, doing: str) -> GatewayError:
        """The error for an answer that is not whole."""
        error = _wire_error(self.request, fault, doing)
        error.request_id = self.request_id()
        return error

    def close(self) -> None:
        """Closes the connection, unless it is the pool's by now. Any thread may."""
        self._flight.close()


# Of ASCII letters: from 3.15 on, Python warns of a name with others.
_find_charset = re.compile(r"(?ai)charset\s*=\s*[\"']?([\w.:-]+)").search


def _decode_text(head: _Head, body: bytes) -> str:
    """A body as text: by its charset if that is known, else by what JSON may be in, mostly UTF-8.

    A byte that does not belong there is replaced: what it stands in was paid for.
    """
    found = _find_charset(head.get("Content-Type"))
    charset = found[1].lower() if found else "utf-8"
    if charset in ("utf-8", "utf8", "us-ascii", "ascii"):
        charset = json.detect_encoding(body)
    try:
        return body.decode(charset, "replace")
    except (LookupError, UnicodeError):
        return body.decode("utf-8", "replace")


def _parse_long_integer(digits: str) -> int:
    """An integer of any length. Python itself refuses more than 4,300 digits at once."""
    if len(digits) <= 4000:
        return int(digits)
    # By halves, as piece by piece would take quadratic time.
    half = len(digits) // 2
    shift: int = 10**half
    head, tail = _parse_long_integer(digits[:-half]), _parse_long_integer(digits[-half:])
    return head * shift + (-tail if digits.startswith("-") else tail)


class _JsonDecoder(json.JSONDecoder):
    """Made once, as that takes as long as a small answer; pickled as what makes it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(_JsonDecoder, strict=False), ()


_json_decoder = _JsonDecoder(strict=False)


def _decode_json(text: str) -> Any:
    """JSON, as servers write it: NaN, raw control characters in strings, integers of any length.

    Raises:
        ValueError, RecursionError: it is not JSON.
    """
    try:
        return _json_decoder.decode(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, strict=False, parse_int=_parse_long_integer)


def _json_of(response: _Response) -> Any:
    """The JSON that was read; None if it is none. An error would quote it, and perhaps a secret."""
    with suppress(ValueError, RecursionError):
        return _decode_json(_decode_text(response.head, response.body))
    return None


def _unexpected_response(response: _Response, problem: str) -> GatewayError:
    """The error for a 2xx whose body is not what was promised. `details["body"]` has it."""
    request, body = response.request, response.body
    text = "***" if request.credential else request.redact(_decode_text(response.head, body))
    shown = f": {text[:_MAX_SHOWN_CHARACTERS]}" if body else "."
    return GatewayError._create(
        f"{request.redact(repr(request))} answered {response.status}, but {problem}{shown}",
        {"body": text}, may_have_run=not request.idempotent, status_code=response.status,
        request_id=response.request_id(),
    )


def _read_json(response: _Response, kind: Any, expect: Mapping[str, type] = {}) -> Any:
    """The body as JSON of type `kind`; the fields of `expect` must be in it, with their types."""
    response.read_all()
    content = _Secret(_json_of(response))
    if not isinstance(content.reveal(), kind):
        raise _unexpected_response(response, f"the body is not JSON of the type {kind.__name__}")
    for name, field_kind in expect.items():
        if not isinstance(content.reveal().get(name), field_kind):
            raise _unexpected_response(response, f"{name!r} is not a {field_kind.__name__}")
    return content.reveal()


def _redact_json(value: Any, redact: Callable[[str], str]) -> Any:
    """A copy of a JSON value with `redact` applied to every string and key in it."""
    if isinstance(value, list):
        return [_redact_json(item, redact) for item in value]
    if isinstance(value, dict):
        return {redact(key): _redact_json(item, redact) for key, item in value.items()}
    return redact(value) if isinstance(value, str) else value


def _read_error_body(response: _Response) -> str:
    """The beginning of an error's body as text, also if it came compressed, without being asked."""
    body = b""
    # Some bodies never end. If sending broke off, only what has arrived is read.
    if not response.broken:
        response.wait_at_most(response.request.timeout or _CONNECT_CAP_SECONDS)
    try:
        for chunk in response.chunks():
            body += chunk
            if len(body) > _MAX_ERROR_BYTES:
                break
    except ServiceUnavailableError as error:
        # If it breaks off, the status still says enough.
        if not _is_own(error):
            raise
    response.close()
    if response.head.content_encoding() in ("gzip", "x-gzip", "deflate"):
        import zlib

        # 47: the format is read from the first bytes.
        with suppress(zlib.error):
            body = zlib.decompressobj(47).decompress(body, _MAX_ERROR_BYTES)
    return _decode_text(response.head, body).strip()


def _read_detail(response: _Response) -> Any:
    """What an error's body says: its JSON, or else the beginning of its text, without secrets."""
    text = _read_error_body(response)
    redactor = _Redactor(response.request.secrets)

    def redact(value: str) -> str:
        return _mask_queries(redactor(value, short_ones=False))

    try:
        detail = _redact_json(_decode_json(text), redact)
    except (ValueError, RecursionError):
        detail = _mask_queries(redactor(text))[:_MAX_SHOWN_CHARACTERS]
        # Of S3.
        found = re.search(r"<Code>([^<]*)</Code>\s*<Message>([^<]*)</Message>", detail)
        if found:
            detail = {"error_code": found[1], "message": f"{found[1]}: {found[2]}"}
    if isinstance(detail, dict):
        detail = detail.get("detail") or detail
    return detail


def _is_fastapis(detail: Any) -> bool:
    """Whether this is the list by which FastAPI refuses a request, before anything has run."""
    return isinstance(detail, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("loc"), list) and "msg" in entry
        for entry in detail
    )


def _describe(detail: Any) -> tuple[str, _Json]:
    """Message and fields of what an error's body says, in any of its forms."""
    if _is_fastapis(detail):
        lines = [
            f"{'.'.join(map(_text_of, entry['loc']))}: {_text_of(entry['msg'])}" for entry in detail
        ]
        return "\n  ".join(lines), {"errors": detail}
    if isinstance(detail, list):
        return "\n  ".join(map(_text_of, detail)), {"errors": detail}
    if isinstance(detail, dict):
        more = detail.get("details")
        fields = {**detail, **more} if isinstance(more, dict) else detail
        said = detail.get("message") or detail.get("error")
        return _text_of(said) if said else _text_of(detail)[:_MAX_SHOWN_CHARACTERS], fields
    message = _text_of(detail or "")
    # The published server's, which has no error_code.
    pattern = r"Secret '(?P<secret_name>[^']*)' for prefab '(?P<prefab_id>[^']*)' is not configured"
    secret = re.search(pattern, message)
    return message, {"error_code": "MISSING_SECRET", **secret.groupdict()} if secret else {}


def _retry_after_seconds(value: str) -> float | None:
    """Seconds that a `Retry-After` of either form asks for (RFC 9110 §10.2.3), or None."""
    with suppress(TypeError, ValueError, IndexError, OverflowError):
        if re.fullmatch(r"[\d. ]+", value, re.ASCII):
            return float(value)
        import email.utils

        # Without a zone, it is in GMT.
        date = email.utils.parsedate_tz(value)
        if date:
            return max(0.0, email.utils.mktime_tz(date) - time.time())
    return None


def _credential_advice(request: _Request) -> _Advice:
    """What to do about a refused credential: which was sent, and if it expired (RFC 7519)."""
    sent = [name for name in _CREDENTIAL_KINDS if name in request.headers]
    if request.credential:
        text = "The API key was sent, to be exchanged. Is it a valid credential for this gateway?"
    elif not sent:
        text = "No credential was sent: this machine's address must then be on the allow-list."
    else:
        kind = f"{_CREDENTIAL_KINDS[sent[0]]} ({sent[0]})"
        text = f"The client sent {kind}. Is this credential valid for this gateway?"
    with suppress(ValueError, LookupError, TypeError, OverflowError, OSError):
        payload = request.headers["Authorization"].split(".")[1]
        expires: Any = json.loads(urlsafe_b64decode(payload + "==="))["exp"]
        if type(expires) in (int, float) and expires < time.time():
            date = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(expires))
            text += f" It expired at {date} UTC."
    return _Advice(text)


_NO_ENDPOINT_ADVICE = _Advice(
    "This gateway has no such endpoint. Is base_url right? Does it take this kind of credential?",
    "This gateway has no such endpoint. Is --base-url right? Does it take this kind of credential?",
)
_ENCODED_SLASH_ADVICE = _Advice(
    "The path has an encoded slash (%2F) in a name, which this gateway cannot route."
)
_REDIRECT_ADVICE = _Advice("Is base_url right?", "Is --base-url right?")


def _error_class(
    request: _Request, status: int, error_code: str, no_such_path: bool
) -> type[GatewayError]:
    """The class of the error for a status: the first rule that holds."""
    if status >= 500:
        return ServiceUnavailableError
    # What a storage refuses is none of the gateway's errors.
    if not request.to_gateway or no_such_path:
        return GatewayError
    if status == 404:
        return request.not_found
    if status == 400:
        return _CODE_ERRORS.get(error_code, GatewayError)
    return _STATUS_ERRORS.get(status, GatewayError)


def _status_may_have_run(request: _Request, status: int, refused: bool) -> bool:
    """Whether a call may have run although its answer is this error.

    Args:
        refused: Whether the request was refused as a whole. If not, of several calls those in front
            of the one that failed have run.
    """
    if request.idempotent or status < 400:
        return False
    return status >= 500 or (request.calls > 1 and not refused)


def _status_error(response: _Response) -> GatewayError:
    """The error for an answer that is not a 2xx, whatever its body looks like."""
    request, status, head = response.request, response.status, response.head
    detail = _read_detail(response)
    message, fields = _describe(detail)
    # FastAPI's answer for a route that it does not have.
    no_such_path = status in (404, 405) and detail in ("Not Found", "Method Not Allowed")
    # A 404 may name something else, but this was asked for.
    fields = {**fields, **request.prefab} if status == 404 else {**request.prefab, **fields}
    error_class = _error_class(request, status, _text_of(fields.get("error_code")), no_such_path)
    advice: _Advice | None = error_class._advice_for(fields)
    if error_class is AuthenticationError:
        advice = _credential_advice(request)
    elif request.to_gateway and no_such_path:
        advice = _ENCODED_SLASH_ADVICE if "%2F" in request.target else _NO_ENDPOINT_ADVICE
    elif 300 <= status < 400:
        address = request.redact(head.get("Location").partition("?")[0])[:_MAX_SHOWN_CHARACTERS]
        message = f"a redirect to {address or 'nowhere'}, which is not followed."
        advice = _REDIRECT_ADVICE if request.to_gateway else None
    refused = no_such_path or status == 401 or (status == 422 and _is_fastapis(detail))
    retry_after = _retry_after_seconds(head.get("Retry-After"))
    wait = "" if retry_after is None else f"It asks to wait for {retry_after:.0f} s (Retry-After)."
    instructions = request.redact(_text_of(fields.get("instructions") or ""))
    message = request.redact(message) or request.redact(head.reason)[:_MAX_SHOWN_CHARACTERS]
    return error_class._create(
        f"{request!r} answered {status}: {message or 'no reason'}",
        fields, advice, _Advice(instructions), _Advice(wait), _proxy_advice(request),
        may_have_run=_status_may_have_run(request, status, refused), status_code=status,
        request_id=response.request_id(), retry_after=retry_after,
    )


def _next_request(response: _Response) -> _Request:
    """The request to send next, if the answer is a redirect that may be followed (RFC 9110 §15.4).

    Raises:
        GatewayError: the answer is anything else: the error for its status.
    """
    request = response.request
    is_redirect = response.status in (301, 302, 303, 307, 308)
    if request.to_gateway or request.method != "GET" or not is_redirect:
        raise _status_error(response)
    # It may have a signature in it. A head is read as latin-1, whatever its bytes mean.
    location = _Secret(
        quote(response.head.get("Location").encode("latin-1"), safe=_URL_CHARACTERS)
    )
    base, problem = _Secret(f"{request.origin}{request.target}"), ""
    try:
        origin, target = _split_url(urljoin(base.reveal(), location.reveal()))
    except ValueError as error:
        origin, target, problem = "", "", str(error)
    if not location.reveal():
        problem = "is missing"
    elif request.origin.startswith("https:") and origin.startswith("http:"):
        problem = "leads from https to http"
    if problem:
        raise GatewayError(f"{request!r} answered {response.status}, but its Location {problem}.")
    secrets = request.secrets + _query_secrets(target)
    return request.changed(origin=origin, target=target, secrets=secrets)


# --- Transport ------------------------------------------------------------------------------------


def _retry_delay(request: _Request, error: GatewayError, attempt: int) -> float | None:
    """Seconds before `request` is sent again after `error`; None if it must not be.

    Without a connection, always, as nothing was sent. Lost or 502 to 504: only if it does no more
    when it is sent twice. Everything else, a timeout among it, is raised.
    """
    unsent = error._fault == "unreachable"
    passing = error._fault == "lost" or error.status_code in (502, 503, 504)
    # With a status of 400, S3 says so of an upload that came too slowly.
    passing = passing or (not request.to_gateway and error.error_code == "RequestTimeout")
    if not unsent and not (passing and request.idempotent):
        return None
    if error.retry_after is not None:
        return error.retry_after if error.retry_after <= _RETRY_AFTER_CAP_SECONDS else None
    base = _CONNECT_BACKOFF_BASE_SECONDS if unsent else _BACKOFF_BASE_SECONDS
    # 2.0**1024 overflows.
    longest = min(_BACKOFF_CAP_SECONDS, base * 2.0 ** min(attempt - 1, 100))
    least = longest / 2 if unsent else 0.0
    # Not `random`, which a program may have seeded, and which no process that is out of files can
    # import; nor `os.urandom`, for which PyPy opens a file. The clock's last digits are as good.
    return least + (longest - least) * (time.perf_counter_ns() % 10**6 / 10**6)


class _Resume:
    """How a transfer goes on after an attempt that broke off: like this, from the start."""

    def headers(self) -> Mapping[str, str]:
        """What the next attempt asks for."""
        return {}

    def made_progress(self) -> bool:
        """Whether more came since this was asked last than ever before."""
        return False


_FROM_THE_START = _Resume()


def _check_whole(response: _Response) -> None:
    """Raises if a 2xx is none: its request did not arrive, or its body is in an unknown coding."""
    request, head = response.request, response.head
    if response.broken:
        raise response.failure(response.broken, "sending broke off")
    # A file in a storage may have been stored in an encoding.
    encoding = head.content_encoding() if request.to_gateway else head.coding
    if encoding:
        raise _unexpected_response(response, f"the body is in {encoding}, which was not asked for")


def _read_token(response: _Response) -> _Credential:
    """The credential that the gateway gives for an API key."""
    token = _Secret(_read_json(response, dict, {"internal_token": str})["internal_token"])
    if not _is_header_value(token.reveal()):
        raise GatewayError("The gateway's internal_token has characters that no header can carry.")
    return _Credential("X-Internal-Token", token.reveal())


class _Transport:
    """Sends requests: the one place that retries. It knows HTTP, and nothing of prefabs."""

    def __init__(
        self, credential: _Credential | None, max_retries: int, tls: SSLContext | None
    ) -> None:
        # None for the allow-list.
        self.credential = credential
        self.max_retries = max_retries
        # Exchanges the API key for a new token.
        self.token_request: _Request | None = None
        # Whether the gateway turned out to read parameters flat: see `_send_call`.
        self.reads_flat = False
        # Where it was made, and which it is: the same for its copies.
        self.origin = _Process.id, os.urandom(16)
        self._given_tls = tls
        self._start()

    def _start(self) -> None:
        """Makes what a copy does not share with its original."""
        self.pool = _Pool()
        # All requests of the client.
        self.scope = _Scope()
        self._tls = self._given_tls
        # By process, as one held during a fork stays held in the child. RLocks for signal handlers.
        self._locks: dict[Any, Any] = {}
        # Of the last exchange that failed.
        self._renewal_error: GatewayError | None = None

    def __getstate__(self) -> _Json:
        if self._given_tls:
            problem = "A client with an ssl_context cannot be pickled; SSL_CERT_FILE may do."
            raise _NotPicklableError(problem)
        names = ("credential", "max_retries", "token_request", "reads_flat", "origin", "_given_tls")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: _Json) -> None:
        self.__dict__.update(state)
        self._start()

    def send(
        self, request: _Request, read: Callable[[_Response], _T], scopes: tuple[_Scope, ...] = (),
        resume: _Resume = _FROM_THE_START,
    ) -> _T:
        """What `read` makes of the 2xx answer to `request`, after as many attempts as are allowed.

        `scopes` can end it, as can the client's own.
        """
        flight = _Flight((self.scope, *scopes))
        may_renew = request.to_gateway and not request.credential and self.token_request is not None
        attempt = 1
        while not flight.cancelled:
            credential = request.credential or self.credential
            try:
                attempted = self._for_attempt(request, credential, resume.headers())
                return self._attempt(flight, attempted, attempt, read)
            except GatewayError as error:
                # What a handler or a callback raised says nothing of this request.
                if flight.cancelled or not _is_own(error):
                    raise
                if resume.made_progress():
                    # So that a long download on a bad line ends.
                    attempt = 1
                delay = _retry_delay(request, error, attempt)
                is_refused = error.status_code == 401 and may_renew
                if not is_refused and (delay is None or attempt > self.max_retries):
                    raise
                _log("%s; it is sent again in %.1f s", error.message, delay or 0.0)
            if is_refused:
                # A second refusal is final.
                may_renew = False
                self.renew_token(credential, request, scopes, flight)
            else:
                attempt += 1
                flight.wait(delay or 0.0)
        raise GatewayError(f"{request!r}: cancelled before it was sent.")

    def exchange(self, token_request: _Request, scopes: tuple[_Scope, ...]) -> None:
        """Gets a token by this request, now and whenever the last one is refused."""
        self.token_request = token_request
        self.renew_token(self.credential, token_request, scopes)

    def renew_token(
        self, refused: _Credential | None, request: _Request, scopes: tuple[_Scope, ...],
        flight: _Flight | None = None,
    ) -> None:
        """Exchanges the API key for a token in place of `refused`, for a request that needs it.

        If another thread does so meanwhile, its token serves both, or both fail with its error.
        """
        error_before = self._renewal_error
        lock = self._locks.setdefault(_Process.id, threading.RLock())
        while not lock.acquire(timeout=0.2):
            if flight and flight.cancelled:
                return
        try:
            if self.token_request is None or self.credential != refused:
                return
            if self._renewal_error and self._renewal_error is not error_before:
                raise copy.copy(self._renewal_error)
            token_request = self.token_request.changed(caller_headers=request.caller_headers)
            self.credential = self.send(token_request, _read_token, scopes)
        except GatewayError as error:
            if not any(scope.cancelled for scope in scopes):
                # The copy has no traceback, which would keep much alive.
                self._renewal_error = copy.copy(error)
            raise
        finally:
            lock.release()

    def _for_attempt(
        self, request: _Request, credential: _Credential | None, more_headers: Mapping[str, str]
    ) -> _Request:
        """The request as an attempt sends it, with what its messages must not show."""
        headers = {**request.headers, **more_headers}
        if not request.to_gateway:
            return request.changed(headers=headers)
        # The token, and the key that it was given for.
        known = [credential, self.token_request.credential if self.token_request else None]
        secrets = [_Secret(one.value.rpartition("Bearer ")[2]) for one in known if one]
        if credential:
            headers[credential.header] = credential.value
        secrets += _header_secrets(request.caller_headers)
        return request.changed(headers=headers, secrets=(*request.secrets, *secrets))

    def _attempt(
        self, flight: _Flight, request: _Request, attempt: int, read: Callable[[_Response], _T]
    ) -> _T:
        """What `read` makes of one answer, behind redirects. A failure closes the connection."""
        try:
            for _ in range(1 + _MAX_REDIRECTS):
                started, status = time.perf_counter(), "failed"
                try:
                    # Whatever made the first attempt fail may be wrong with other idle connections.
                    response = self._exchange(flight, request, fresh=attempt > 1)
                    status = str(response.status)
                    if 200 <= response.status < 300:
                        _check_whole(response)
                        return read(response)
                    request = _next_request(response)
                finally:
                    milliseconds = 1000 * (time.perf_counter() - started)
                    _log("%r %s %.0f ms, attempt %d", request, status, milliseconds, attempt)
                response.close()
            raise GatewayError(f"{request!r}: more than {_MAX_REDIRECTS} redirects")
        except BaseException as error:
            flight.close()
            # So comes a StopIteration of a callback out of a generator.
            if isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration):
                raise error.__cause__
            raise

    def _exchange(self, flight: _Flight, request: _Request, *, fresh: bool) -> _Response:
        """Sends a request once, and reads the head of the answer."""
        idle = None if fresh else self.pool.acquire(request.origin)
        connection = idle or _Connection(request.origin, _proxy_for(request.origin))
        proxy = connection.proxy
        # A redirect may go round the proxy of the request before.
        if proxy or request.proxy:
            secrets = request.secrets + (proxy.secrets if proxy else ())
            request = request.changed(secrets=secrets, proxy=str(proxy or ""))
        flight.hold(connection)
        if not idle:
            self._open(connection, request)
        broken: _Fault | None = None
        try:
            broken = connection.send(request)
            head = connection.guarded(_read_head, connection.reader)
        except _Fault as fault:
            # With TLS, what is read says more.
            if broken and not _refuses_client(fault.error):
                raise _wire_error(request, broken, "sending broke off")
            raise _wire_error(request, fault, "no answer")
        response = _Response(request, flight, connection, self.pool, head)
        response.broken = broken
        return response

    def _open(self, connection: _Connection, request: _Request) -> None:
        """Opens a connection. Its failure is told as one of `request`."""
        tls = self._tls_context() if request.origin.startswith("https:") else None
        try:
            connection.open(request.timeout, tls, self.pool.answered)
        except _Fault as fault:
            doing = f"no connection to {request.origin}"
            if request.proxy:
                doing += f" through {request.proxy}"
            raise _wire_error(request, fault, doing, connected=False)

    def _tls_context(self) -> SSLContext:
        """The context for https, made once: it is dear."""
        if self._tls is None:
            try:
                import ssl

                self._tls = ssl.create_default_context()
            except ImportError as error:
                # There are Pythons without it; they can do http.
                problem = "https needs Python's ssl module, which is missing here."
                raise GatewayError(problem) from error
            except OSError as error:
                names = "SSLKEYLOGFILE, SSL_CERT_FILE or SSL_CERT_DIR"
                problem = f"TLS cannot be set up: is the file right that {names} names? {error}"
                raise GatewayError(problem) from error
        return self._tls


# --- Event stream ---------------------------------------------------------------------------------

_LAST_EVENTS = (StreamEventType.DONE, StreamEventType.ERROR)


def _decode_data(text: str) -> Any:
    """The JSON of an event's data."""
    text = text.strip(" \t\n\r")
    return {"type": "done", "data": text} if text == "[DONE]" else _decode_json(text)


def _make_event(value: Any, name: str = "") -> StreamEvent:
    """The event of decoded data, of the `type` in it or, if that is not known, of `event: name`."""
    is_typed = isinstance(value, dict) and "type" in value
    # A known name says more than an unknown type.
    if is_typed and (name not in _EVENT_TYPES or _text_of(value["type"]) in _EVENT_TYPES):
        return StreamEvent.from_dict(value)
    # A heartbeat, such as `event: ping` with `data: {}`.
    if value == {} and name and name not in _EVENT_TYPES:
        value = None
    raw = value if isinstance(value, dict) else {"type": name or "content", "data": value}
    return StreamEvent(_EVENT_TYPES.get(name, StreamEventType.CONTENT), value, raw)


def _block_events(block: str, *, whole: bool = True) -> list[StreamEvent]:
    """The events of the lines between two blank lines: one, or none if there is no data.

    A block that may be cut short (not `whole`) has none whose data is not JSON.
    """
    name, names, lines = "", [], []
    for line in block.split("\n"):
        field_name, _, value = line.partition(":")
        if field_name == "data":
            lines.append(value.removeprefix(" "))
            names.append(name)
        elif field_name == "event":
            name = value.removeprefix(" ").strip()
    data = "\n".join(lines)
    if not data.strip():
        # WHATWG dispatches an empty line of data: it is an event if its type says something.
        return [_make_event("", name)] if lines and whole and name in _EVENT_TYPES else []
    # Some servers leave out the blank lines: then the data is no JSON, but each of its lines is.
    for texts, of_texts in (([data], [name]), (lines, names)):
        with suppress(ValueError, RecursionError):
            return [_make_event(_decode_data(text), one) for text, one in zip(texts, of_texts)]
    return [_make_event(data, name)] if whole else []


def _parse_events(chunks: Iterable[bytes], *, framed: bool = True) -> Iterator[list[StreamEvent]]:
    """The events of a stream (WHATWG HTML §9.2.6), all those that a chunk completes together.

    If HTTP does not say where the stream ends (not `framed`), its end may be a break.
    """
    # Takes half the time of `json.loads`.
    decode = _json_decoder.raw_decode
    # The block that has begun. Its pieces are joined once: a large event may come in thousands.
    pending: list[bytes] = []
    after_cr = False
    # Of the first block, in front of which a byte order mark may stand.
    codec = "utf-8-sig"
    for chunk in filter(None, chunks):
        if after_cr or b"\r" in chunk:
            begin = 1 if after_cr and chunk.startswith(b"\n") else 0
            # A CR at the end of the chunk ends its line at once, too: its LF may never come.
            after_cr = chunk.endswith(b"\r")
            chunk = chunk[begin:].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if not chunk:
            continue
        begins_blank = chunk.startswith(b"\n") and pending and pending[-1].endswith(b"\n")
        pending.append(chunk)
        if not begins_blank and b"\n\n" not in chunk:
            continue
        blocks, _, begun = b"".join(pending).rpartition(b"\n\n")
        pending = [begun] if begun else []
        events: list[StreamEvent] = []
        for block in blocks.decode(codec, "replace").split("\n\n"):
            # A short way, in half the time, for one line with an object, as nearly all are.
            if block.startswith("data: {") and "\n" not in block:
                try:
                    value, end = decode(block, 6)
                    if end == len(block):
                        events.append(_make_event(value))
                        continue
                except (ValueError, RecursionError):
                    pass
            events += _block_events(block)
        codec = "utf-8"
        if events:
            yield events
    events = _block_events(b"".join(pending).decode(codec, "replace"), whole=framed)
    if events:
        yield events


def _read_events(response: _Response) -> Generator[list[StreamEvent], None, bool]:
    """The events of an answer, as they arrive. If there is none, `response.body` is what came.

    At its end it returns whether there was one.

    More may follow `done` or `error`: a function yields its own `done`, and the gateway's file URLs
    come when they are uploaded. So it goes on until the server ends it or breaks it off, or until
    `timeout` seconds in all have brought no further event. Heartbeats do not count.
    """
    # Whether the last event was `done` or `error`; None: there was no event yet.
    is_end: bool | None = None
    unread: list[bytes] = []

    def chunks() -> Iterator[bytes]:
        for chunk in response.chunks():
            if is_end is None:
                unread.append(chunk)
            yield chunk

    lists = _parse_events(chunks(), framed=response.head.framed)
    while True:
        # No `yield` in here: when Python ends, this name may be gone.
        try:
            events = next(lists, [])
        except ServiceUnavailableError as error:
            if not is_end or not _is_own(error):
                raise
            return True
        if not events:
            break
        was_end = is_end
        last: StreamEvent | None = events[-1]
        # Rarely, as each event pays for the look.
        if _is_heartbeat(events[-1]):
            last = next(itertools.filterfalse(_is_heartbeat, reversed(events)), None)
        if last or is_end is None:
            is_end = last is not None and last.type in _LAST_EVENTS
        yield events
        if last and (is_end or was_end):
            seconds = response.request.timeout or _AFTER_DONE_SECONDS
            response.wait_at_most(seconds if is_end else None)
    if is_end is None:
        response.body = b"".join(unread)
    if not response.head.framed and not is_end and not response.body:
        raise response.failure(_Fault("no done or error event"), "the stream was cut short")
    return is_end is not None


def _parse_results(response: _Response, count: int) -> list[PrefabResult]:
    """The results of a run request with `count` calls, from the JSON in `response.body`."""
    answer = _Secret(_json_of(response))
    if not isinstance(answer.reveal(), dict):
        raise _unexpected_response(response, "the body is neither a JSON object nor events")
    entries = _Secret(answer.reveal().get("results"))
    is_list = isinstance(entries.reveal(), list)
    if not is_list or [type(entry) for entry in entries.reveal()] != [dict] * count:
        raise _unexpected_response(response, f"'results' is not a list of {count} objects")
    job_id = answer.reveal().get("job_id")
    return [PrefabResult._from_dict(entry, job_id) for entry in entries.reveal()]


def _result_events(result: PrefabResult) -> list[StreamEvent]:
    """A result, as a function that streams would have given it."""
    if not result.is_success():
        error = result.error or {"message": f"It ended as {result.status}."}
        told: list[_Json] = [{"type": "error", "data": error}]
    else:
        files = result.get_files()
        done = {"job_id": result.job_id, "files": files} if files else None
        told = [{"type": "content", "data": result.get_result()}, {"type": "done", "data": done}]
    events = [StreamEvent.from_dict(event) for event in told]
    vars(events[-1])["_result"] = result
    return events


def _read_event_stream(response: _Response) -> Iterator[list[StreamEvent]]:
    """The events of an answer, or else those that stand for the result in it."""
    has_events = yield from _read_events(response)
    if not has_events:
        yield _result_events(_parse_results(response, 1)[0])


class EventStream(Iterator[StreamEvent]):
    """The events of one call, each handed over as it arrives: an iterator and a context manager.

    `close()`, the end of a `with` and garbage collection end the stream and free its connection.
    One thread reads it; any may close it, and so may a signal handler: a loop that waits for an
    event then ends. An `error` event is yielded, not raised. Tests can make it of any `events`.

    Raises (from iterating):
        ServiceUnavailableError, GatewayTimeoutError: it broke, so it is not complete.
        GatewayError: it had no events, or was read by two threads or after it failed or was closed.
    """

    def __init__(self, events: Iterable[StreamEvent], _response: _Response | None = None) -> None:
        self._response = _response
        self._lists = _read_event_stream(_response) if _response else ([event] for event in events)
        # What came with the last event.
        self._arrived: Iterator[StreamEvent] = iter(())
        # "open", "ended", "closed" or "failed". Only `close` makes it closed, in any thread.
        self._state: str = "open"
        # The text of the error by which it failed.
        self._failure = ""
        self._reading = threading.Lock()

    def __next__(self) -> StreamEvent:
        if self._state == "open":
            # A step of a list's iterator needs no lock.
            for event in self._arrived:
                return event
        if self._state == "closed":
            problem = "This stream was closed before its end: what came is not all."
            raise GatewayError._create(problem, may_have_run=True)
        if self._state == "failed":
            reason = self._failure.partition("\n")[0].rstrip(".")
            problem = f"This stream cannot be read on, since it failed ({reason})."
            raise GatewayError._create(problem, may_have_run=True)
        # Never waits: a signal handler may read while the same thread does.
        if not self._reading.acquire(blocking=False):
            raise GatewayError("This stream is being read already: one thread or handler reads it.")
        try:
            self._arrived = iter(next(self._lists))
            return next(self._arrived)
        except StopIteration:
            if self._state == "open":
                self._state = "ended"
            raise
        except BaseException as error:
            # It was closed while this thread waited.
            if self._state == "closed" and isinstance(error, GatewayError):
                raise StopIteration from None
            self._state, self._failure = "failed", str(error)
            raise
        finally:
            self._reading.release()

    def _read_some(self) -> list[StreamEvent]:
        """Waits for an event, and gives those that came with it, too; none at the end."""
        for event in self:
            rest, self._arrived = self._arrived, iter(())
            return [event, *rest]
        return []

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream, also for another thread that waits for an event. May be called twice."""
        if self._state == "open":
            self._state = "closed"
        if self._response:
            self._response.close()


def _read_results(response: _Response, count: int = 1) -> list[PrefabResult]:
    """The results of a run request with `count` calls."""
    if response.head.media_type() != "text/event-stream":
        response.read_all()
        return _parse_results(response, count)
    result = PrefabResult.from_events(itertools.chain.from_iterable(_read_events(response)))
    if not result.raw["events"]:
        return _parse_results(response, count)
    if count > 1:
        problem = f"with one stream of events, which cannot be the results of {count} calls"
        raise _unexpected_response(response, problem)
    return [result]


def _read_stream(response: _Response) -> EventStream:
    """The events of a run request, also of a function that does not stream."""
    if response.head.media_type() == "text/event-stream":
        return EventStream((), response)
    return EventStream(_result_events(_read_results(response)[0]))


def _read_prefabs(response: _Response) -> list[PrefabInfo]:
    """The entries of the directory."""
    entries = _read_json(response, list)
    for entry in entries:
        names = [entry.get("id"), entry.get("version")] if isinstance(entry, dict) else []
        if [type(name) for name in names] != [str, str]:
            raise _unexpected_response(response, "an entry lacks its id or version")
    return [PrefabInfo._from_dict(entry) for entry in entries]


# --- Files ----------------------------------------------------------------------------------------


def _file_name(path: _Path) -> str:
    """The last part of a path, with bytes in it replaced that UTF-8 does not have."""
    return os.fsencode(os.path.basename(path)).decode("utf-8", "replace")


# A URL, given by mistake, may be a secret.
_is_no_path = re.compile(r"^\w+://|\0").search


def _open_file(given: _Secret) -> Any:
    """The file at a path, to be read from its start. The caller closes it."""
    if not isinstance(given.reveal(), (str, os.PathLike)) or _is_no_path(str(given.reveal())):
        problem = f"The path of a file is needed, not {_shown(given.reveal())}"
        raise ValidationError(f"{problem}: save the contents in a file first.")
    path = given.reveal()
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValidationError(f"{path} is not a regular file, whose length is known beforehand.")
    file = open(path, "rb")  # noqa: SIM115
    # As in /proc.
    if os.fstat(file.fileno()).st_size == 0 and file.read(1):
        file.close()
        raise ValidationError(f"{path} says that it is empty, but is not: save a copy first.")
    return file


def _multipart(fields: Mapping[str, str], path: _Path) -> tuple[str, bytes, bytes]:
    """A form with a file in it (RFC 7578): its type, what precedes the file and what follows it."""
    # Reads the system's tables: for uploads only.
    import mimetypes

    boundary, name = os.urandom(16).hex(), _file_name(path)
    media_type, compression = mimetypes.guess_type(name)
    if compression:
        # Not the type of what is inside.
        media_type = f"application/{'' if compression == 'gzip' else 'x-'}{compression}"
    # As browsers do.
    name = re.sub(r'["\r\n]', lambda found: f"%{ord(found[0]):02X}", name)
    part = f"--{boundary}\r\nContent-Disposition: form-data; name="
    head = "".join(f'{part}"{key}"\r\n\r\n{value}\r\n' for key, value in fields.items())
    head += f'{part}"file"; filename="{name}"\r\n'
    head += f"Content-Type: {media_type or 'application/octet-stream'}\r\n\r\n"
    tail = f"\r\n--{boundary}--\r\n"
    return f"multipart/form-data; boundary={boundary}", head.encode(errors="replace"), tail.encode()


@contextmanager
def _naming(target: str) -> Iterator[None]:
    """Has the errors of an operation on a file name `target`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, target) from error


def _replace(path: str, target: str) -> None:
    """Renames a file. Windows refuses that while somebody else has the old one open."""
    for seconds in (0.05, 0.2, 0.8) if sys.platform == "win32" else ():
        with suppress(PermissionError):
            os.replace(path, target)
            return
        time.sleep(seconds)
    os.replace(path, target)


@contextmanager
def _replacement(target: str) -> Iterator[Any]:
    """A new file that takes the target's place if all goes well, and is gone if not."""
    with _naming(target):
        # Fails early for a name that is too long.
        with suppress(FileNotFoundError):
            os.lstat(target)
        folder = os.path.dirname(target)
        # Missing ones are made when there is something for them. A missing drive is its own parent.
        while not os.path.exists(folder) and folder != os.path.dirname(folder):
            folder = os.path.dirname(folder)
        path = os.path.join(folder, f".{os.urandom(4).hex()}.part")
        file = open(path, "xb")  # noqa: SIM115
    try:
        yield file
        with _naming(target):
            file.close()
            os.makedirs(os.path.dirname(target), exist_ok=True)
            _replace(path, target)
    finally:
        with suppress(OSError):
            file.close()
        # Unless it was renamed.
        with suppress(OSError):
            os.unlink(path)


class _Download(_Resume):
    """A file on its way here: writes what comes, and knows what to ask for after a break."""

    def __init__(self, file: Any, target: str, on_progress: _Progress | None) -> None:
        self._file = file
        self._target = target
        self._on_progress = on_progress or _ignore
        # Of the object that `file` has the beginning of: its length and its encoding, and a strong
        # ETag (RFC 9110 §13.1.5), without which the next attempt asks for the whole object.
        self._size: int | None = None
        self._encoding = ""
        self._etag = ""
        # Bytes of the object that the best attempt had: by now, and when that was looked at last.
        self._most = self._most_before = self._most_of_urls = 0
        self._restarts = 0

    def headers(self) -> Mapping[str, str]:
        if not self._etag:
            return {}
        return {"Range": f"bytes={self._file.tell()}-", "If-Range": self._etag}

    def made_progress(self) -> bool:
        progressed = self._most > self._most_before
        self._most_before = self._most
        return progressed

    def outlasts(self, error: GatewayError, max_restarts: int) -> bool:
        """Whether it goes on after the storage refused to: with a new URL, or after a 416 anew."""
        if error.status_code == 416 and self._etag:
            # The object is shorter than what was received of it.
            self._etag = ""
            self._restarts += 1
            return self._restarts <= max_restarts
        # A URL has expired if it served anything before that.
        served = self._most > self._most_of_urls
        self._most_of_urls = self._most
        return served and error.status_code in (400, 401, 403) and _is_own(error)

    def receive(self, response: _Response) -> None:
        """Writes an answer where the last one ended."""
        head, doing = response.head, "the download broke off"
        if response.status not in (200, 206) or not head.framed:
            raise _unexpected_response(response, "without a whole file, or without its length")
        etag, encoding = head.get("ETag"), head.content_encoding()
        done, total = self._file.tell(), head.length
        if response.status == 206:
            found = re.fullmatch(rf"bytes {done}-\d+/(\d{{1,18}})", head.get("Content-Range"))
            total = int(found[1]) if found else None
            is_same = self._etag == etag and self._encoding == encoding
            if not total or self._size not in (None, total) or not is_same:
                self._etag = ""
                raise response.failure(_Fault("the object changed in between"), doing)
        else:
            # The object from its beginning.
            done, self._size, self._encoding = 0, total, encoding
            self._etag = etag if etag.startswith('"') else ""
            self._file.seek(0)
            self._file.truncate()
        self._on_progress(done, total)
        for chunk in response.chunks():
            with _naming(self._target):
                self._file.write(chunk)
            done += len(chunk)
            self._most = max(self._most, done)
            self._on_progress(done, total)
        if total not in (None, done):
            raise response.failure(_Fault(f"only {done} of {total} bytes came"), doing)


# --- Batches --------------------------------------------------------------------------------------


def _flattened(request: _Request) -> tuple[_Request, _Json]:
    """A run request with flat inputs, `{"inputs": {"text": ...}}`, and those of its first call.

    A file is a parameter there: its URL, or a list where there are several.
    """
    body = json.loads(request.body if isinstance(request.body, bytes) else b"{}")
    for call in body["calls"]:
        inputs = call["inputs"]
        call["inputs"] = inputs["parameters"]
        for name, urls in inputs.get("files", {}).items():
            call["inputs"][name] = urls[0] if len(urls) == 1 else urls
    return request.changed(body=_encode(body)), body["calls"][0]["inputs"]


def _missing_parameter(error: GatewayError) -> str | None:
    """The name of the parameter that the gateway says is missing; None if it says no such thing."""
    found = re.search(r"Missing required parameter: (.+)", error.message)
    return found[1].strip() if found and error.status_code == 422 else None


def _send_call(
    transport: _Transport, request: _Request, read: Callable[[_Response], _T],
    scopes: tuple[_Scope, ...] = (),
) -> _T:
    """What `read` makes of the answer to a run request, in the form in which the gateway reads it.

    The published one reads parameters flat, and refuses the usual form before anything has run. So
    a single call is sent again in the other form; if that helped, later ones are sent so at once.
    """
    reads_flat = transport.reads_flat
    try:
        return transport.send(_flattened(request)[0] if reads_flat else request, read, scopes)
    except ValidationError as error:
        flat, inputs = _flattened(request)
        if request.calls != 1 or _missing_parameter(error) not in inputs or not _is_own(error):
            raise
    try:
        answer = transport.send(request if reads_flat else flat, read, scopes)
    except GatewayError as error:
        # Any other answer is none to the form.
        if error.status_code and not _missing_parameter(error):
            transport.reads_flat = not reads_flat
        raise
    transport.reads_flat = not reads_flat
    return answer


# Of the clients whose calls this worker process ran last.
_worker_transports: dict[Any, _Transport] = {}


def _run_one(
    transport: _Transport, request: _Request, scopes: tuple[_Scope, ...] = (), _: bytes = b""
) -> PrefabResult:
    """Sends one call of a batch. Any executor can run it: all of it can be pickled."""
    # Calls of one client share connections and token there, too.
    if transport.origin[0] != _Process.id:
        transport = _worker_transports.setdefault(transport.origin, transport)
        for origin in list(_worker_transports)[:-_MAX_WORKER_TRANSPORTS]:
            _worker_transports.pop(origin, None)
    try:
        return _send_call(transport, request, _read_results, scopes)[0]
    except Exception as error:  # noqa: BLE001
        # Whatever it is, it must not cost the other results.
        return PrefabResult._from_exception(error)


class _Batch:
    """Calls on their way, in threads or on an executor. Each arrives once, with its result."""

    def __init__(
        self, transport: _Transport, requests: Iterable[_Request], executor: Executor | None,
        scopes: tuple[_Scope, ...],
    ) -> None:
        self._transport = transport
        self._executor = executor
        # Ends the calls in flight when the batch is interrupted.
        self._scope = _Scope()
        self._scopes = (*scopes, self._scope)
        # The only reference to the requests, so that memory is freed as calls are sent.
        self._waiting = deque(enumerate(requests))
        self._futures: dict[int, Future[PrefabResult]] = {}
        # What has come and was not handed over yet, and what is released then.
        self._arrived: deque[tuple[int, PrefabResult]] = deque()
        self._gate = threading.Lock()
        self._results: dict[int, PrefabResult] = {}
        self._refused: GatewayError | None = None

    def run(
        self, count: int, max_workers: int, on_result: Callable[[int, PrefabResult], object]
    ) -> list[PrefabResult]:
        """The results of `count` calls, in order. Raises the 401 if that is all there is.

        Without workers, this thread sends the one request of them all.
        """
        # Takes a result and calls `on_result` in one step: no signal comes in between.
        handing_over = itertools.starmap(on_result, iter(self._arrived.popleft, None))
        is_callbacks_own = False
        try:
            if self._executor:
                self._work()
            elif max_workers:
                self._start_threads(min(max_workers, count))
            elif count:
                self._send_together(count)
            for _ in range(count):
                while not self._arrived:
                    # On Windows, a wait without an end does not notice Ctrl-C.
                    self._gate.acquire(timeout=0.2)
                try:
                    next(handing_over)
                except Exception:
                    is_callbacks_own = True
                    raise
        except BaseException:
            # At once and in one step, whatever interrupts what follows.
            self._waiting.clear()
            arrived = len(self._arrived)
            self._scope.cancel()
            self._cancel_futures()
            if not is_callbacks_own:
                # What arrived was paid for.
                for _ in range(arrived):
                    next(handing_over)
            raise
        errors = [result.exception for result in self._results.values()]
        if self._refused and all(error and not error.may_have_run for error in errors):
            raise self._refused
        return [self._results[index] for index in range(count)]

    def _send_together(self, count: int) -> None:
        def read(response: _Response) -> None:
            self._arrived.extend(enumerate(_read_results(response, count)))
            self._results.update(self._arrived)

        _send_call(self._transport, self._waiting.popleft()[1], read, self._scopes)

    def _start_threads(self, count: int) -> None:
        import contextvars

        for _ in range(count):
            work = partial(contextvars.copy_context().run, self._work)
            try:
                # Daemons, so that Ctrl-C does not wait for their answers.
                threading.Thread(target=work, daemon=True).start()
            except RuntimeError:
                # No more threads can be started: this one does the work.
                self._work()

    def _work(self) -> None:
        """Sends or submits what waits."""
        while True:
            try:
                index, request = self._waiting.popleft()
            except IndexError:
                return
            if self._refused:
                self._arrive(index, self._unsent())
            elif not self._executor:
                self._arrive(index, _run_one(self._transport, request, self._scopes))
            else:
                # Dask takes calls with equal arguments for one task.
                mark = os.urandom(16)
                try:
                    future = self._executor.submit(_run_one, self._transport, request, (), mark)
                except Exception as error:  # noqa: BLE001
                    # A broken executor must not cost the other results.
                    self._arrive(index, self._unsent(f"the executor did not take it: {error}"))
                else:
                    self._futures[index] = future
                    future.add_done_callback(partial(self._finish, index))

    def _finish(self, index: int, future: Future[PrefabResult]) -> None:
        # A cluster may run a call again as long as somebody holds its future.
        self._futures.pop(index, None)
        try:
            outcome: Any = future.result()
            if not isinstance(outcome, PrefabResult):
                outcome = TypeError(f"the executor gave {_shown(outcome)}")
        except BaseException as error:  # noqa: BLE001
            # Each call must arrive, or the batch would wait for ever.
            outcome = self._cancelled() if future.cancelled() else error
        self._arrive(index, outcome)

    def _cancelled(self) -> GatewayError:
        """The error of a call whose future was cancelled, by this batch or by somebody else."""
        # What these executors give back as cancelled was never started.
        known = ("concurrent.futures.thread", "concurrent.futures.process")
        if any(base.__module__ in known for base in type(self._executor).__mro__):
            return self._unsent("the executor cancelled it.")
        problem = "The executor cancelled the call, and cannot tell if it was running by then."
        return ServiceUnavailableError._create(problem, may_have_run=True)

    def _unsent(self, reason: str = "") -> GatewayError:
        if self._refused:
            return AuthenticationError("Not sent: the credential of an earlier call was refused.")
        return ServiceUnavailableError(f"Not sent: {reason}")

    def _arrive(self, index: int, outcome: PrefabResult | BaseException) -> None:
        if isinstance(outcome, BaseException):
            outcome = PrefabResult._from_exception(outcome)
        if outcome.exception and outcome.exception.status_code == 401:
            self._refused = outcome.exception
            self._cancel_futures()
        self._results[index] = outcome
        self._arrived.append((index, outcome))
        # It may be released already.
        with suppress(RuntimeError):
            self._gate.release()

    def _cancel_futures(self) -> None:
        for future in list(self._futures.values()):
            future.cancel()


# --- Client ---------------------------------------------------------------------------------------


def _version_key(version: str) -> tuple[Any, ...]:
    """Sorts versions by their numbers: 1.10.0 after 1.9.0, and 1.0.0-rc.1 before 1.0.0."""
    release, _, candidate = version.partition("-")
    numbers, last = (
        [int(digits[:99]) for digits in re.findall("[0-9]+", part)] for part in (release, candidate)
    )
    return numbers, not candidate, re.sub("[0-9]+", "", candidate), last


def _pages(list_page: Callable[[int, Any], _Json], page_size: int) -> Iterator[_Json]:
    """The files of all pages."""
    token: str | None = ""
    while token is not None:
        page = list_page(page_size, token)
        yield from page["files"]
        token = page.get("next_token") or None


def _session_id(given: Any) -> str:
    """The id of a session, such as a UUID, or a new one. Raises if no request can carry it."""
    session_id = str(given or os.urandom(16).hex())
    _encode({"session_id": session_id})
    return session_id


# What serializers, templates and tests ask any object for, to learn what it is.
_PROTOCOL_NAMES = (
    "asdict as_dict dict fileno for_json getdoc isoformat items json keys model_dump"
    " model_dump_json schema serialize shape toDict toJSON toPandas to_dict to_json to_list"
    " to_numpy to_pandas to_plotly_json tolist values"
).split()


@dataclass(eq=False)
class Prefab:
    """A version of a prefab. Any function is a method: `llm.chat(...)` is `llm.call("chat", ...)`.

    Only `call` reaches one whose name begins with an underscore, or is one that protocols ask any
    object for (`keys`, `to_dict`, `model_dump` ...).
    """

    _client: GatewayClient = field(repr=False)
    prefab_id: str
    version: str

    def call(
        self, function_name: str, /, *, files: _Files | None = None, **parameters: Any
    ) -> PrefabResult:
        """Runs a function: see `GatewayClient.run`."""
        given = _Secret((self.prefab_id, self.version, function_name, parameters, files))
        del parameters, files
        result: PrefabResult = self._client.run(*given.reveal())
        return result

    def stream(
        self, function_name: str, /, *, files: _Files | None = None, **parameters: Any
    ) -> EventStream:
        """Runs a function and gives its events: see `GatewayClient.run`."""
        given = _Secret((self.prefab_id, self.version, function_name, parameters, files))
        del parameters, files
        return self._client.run(*given.reveal(), stream=True)

    def __getattr__(self, name: str) -> Callable[..., PrefabResult]:
        if name.startswith("_") or name in _PROTOCOL_NAMES:
            raise AttributeError(f"{name} is no method of a Prefab: call({name!r}) runs it.")

        def function(*values: Any, **parameters: Any) -> PrefabResult:
            given, is_named = _Secret(parameters), not values
            del values, parameters
            if is_named:
                return self.call(name, **given.reveal())
            raise ValidationError(f"{name}() takes parameters by name, as {name}(text=...).")

        return function


def _check_credential(name: str, value: _Secret) -> None:
    """Raises if a value cannot be a credential. The error does not show it."""
    _check_header_value(name, value)
    if re.match("(?i) *https?://", value.reveal()):
        advice = "the gateway's address goes into base_url=, a token into internal_token=."
        raise ValidationError(f"{name} is a URL: {advice}")


def _choose_credential(given: Mapping[str, _Secret]) -> _Credential | None:
    """The one credential among these, by their headers; None if all are None."""
    chosen = {header: value for header, value in given.items() if value.reveal() is not None}
    if len(chosen) > 1:
        raise ValidationError(f"Give one credential, not {' and '.join(chosen)}: who are you?")
    for header, value in chosen.items():
        _check_credential(f"The credential ({header})", value)
        if header == "Authorization":
            value = _Secret(re.sub("(?i)^(bearer +)?", "Bearer ", value.reveal().strip()))
        return _Credential(header, value.reveal())
    return None


def _gateway_address(base_url: _Secret) -> tuple[str, str]:
    """Origin and path prefix of the gateway. The error shows no value, as that may be a token."""
    if base_url.reveal() is None:
        base_url = _Secret(os.environ.get("GATEWAY_BASE_URL") or DEFAULT_BASE_URL)
    # Blanks come from copy and paste.
    base_url = _Secret(str(base_url.reveal()).strip())
    try:
        if re.search(r"[?#\s\0-\x1f]", base_url.reveal()):
            raise ValueError("must not have a query, a fragment or blanks in it")
        origin, path = _split_url(base_url.reveal())
        return origin, path.rstrip("/")
    except ValueError as error:
        advice = _Advice(
            "It comes from base_url, or GATEWAY_BASE_URL. A token goes into internal_token=.",
            "It comes from --base-url, or GATEWAY_BASE_URL. A token goes into X_INTERNAL_TOKEN.",
        )
        raise ValidationError._create(f"The address of the gateway {error}.", {}, advice) from None


def _from_env(client_class: Any, options: _Json) -> Any:
    """What a class of clients, or its `from_api_key`, gives for the environment's credential."""
    # No frame shows the headers among them.
    more = _Secret(options.copy())
    options.clear()
    arguments = {
        "X_INTERNAL_TOKEN": "internal_token",
        "AGENT_BUILDER_API_KEY": "api_key",
        "GATEWAY_JWT_TOKEN": "jwt_token",
    }
    given = [name for name in arguments if os.environ.get(name)]
    if len(given) > 1:
        raise ValidationError(f"Set one credential, not {' and '.join(given)}: who are you?")
    make = client_class.from_api_key if "AGENT_BUILDER_API_KEY" in given else client_class
    return make(**{arguments[name]: os.environ[name] for name in given}, **more.reveal())


class GatewayClient:
    """A client of one gateway. Threads can share it; it can be pickled, and used after a fork.

    Args:
        base_url: http(s), path prefix included; None: `GATEWAY_BASE_URL`, else `DEFAULT_BASE_URL`.
        api_key: Sent as such; `from_api_key` exchanges one.
        jwt_token: With or without `Bearer `.
        timeout: Seconds for connecting and for each wait for bytes; None waits for ever.
        internal_token: What the gateway gave to an agent or a prefab. Without any credential, this
            machine's address must be on the gateway's allow-list.
        max_retries: How often a request is sent again, if that can do no harm.
        ssl_context: For https; None trusts what the system does, or `SSL_CERT_FILE`.
        headers: Further headers of each request to the gateway, such as `traceparent`; or a
            function that gives them, called once for each request, in the thread that asked for it.

    `on_progress` gets the bytes done and in all (None: unknown), from 0 on, and again from 0 when
    an upload is sent again. Every method that sends raises a `GatewayError`, of these classes:
        ValidationError: an argument cannot be used; nothing was sent. For files, also `OSError`.
        AuthenticationError, ServiceUnavailableError (no answer, or a 5xx), GatewayTimeoutError.
        AgentContextRequiredError: only `upload_input_file` needs no agent's token.
    """

    def __init__(
        self, base_url: str | None = None, api_key: str | None = None, jwt_token: str | None = None,
        timeout: float | None = 60, *, internal_token: str | None = None, max_retries: int = 2,
        ssl_context: SSLContext | None = None, headers: _CallerHeaders | None = None,
    ) -> None:
        given = {
            "X-Internal-Token": _Secret(internal_token),
            "X-API-Key": _Secret(api_key),
            "Authorization": _Secret(jwt_token),
        }
        address = _Secret(base_url)
        self._headers = _Secret({} if headers is None else headers)
        # From here on, no local variable shows a secret.
        del internal_token, api_key, jwt_token, base_url, headers
        credential = _choose_credential(given)
        header = credential.header if credential else None
        self._origin, self._prefix = _gateway_address(address)
        _check_timeout(timeout)
        _check_number("max_retries", max_retries, above=-1)
        if ssl_context is not None and not hasattr(ssl_context, "wrap_socket"):
            raise ValidationError("ssl_context must be an SSLContext.")
        # A function is asked for each request.
        if not callable(self._headers.reveal()):
            self._headers = _Secret(_check_caller_headers(self._headers, header))
        is_users = header in ("X-API-Key", "Authorization")
        self._run_path = "/v1/run" if is_users else "/v1/internal/run"
        # What the requests of this client can be ended by, beside the transport's own scope.
        self._scopes: tuple[_Scope, ...] = ()
        self.timeout = timeout
        self._transport = _Transport(credential, max_retries, ssl_context)

    @classmethod
    def from_api_key(
        cls: type[_Client], api_key: str, base_url: str | None = None, timeout: float | None = 60,
        *, max_retries: int = 2, ssl_context: SSLContext | None = None,
        headers: _CallerHeaders | None = None,
    ) -> _Client:
        """A client with the token that the gateway gives for an API key, now and when it expires.

        `POST /v1/auth/convert_to_internal_token`
        """
        key, address, given = _Secret(api_key), _Secret(base_url), _Secret(headers)
        del api_key, base_url, headers
        client = cls(
            address.reveal(), timeout=timeout, max_retries=max_retries, ssl_context=ssl_context,
            headers=given.reveal(),
        )
        client._exchange(key)
        return client

    def _exchange(self, key: _Secret) -> None:
        """Has the transport use the token for an API key. Closes the client if there is none."""
        try:
            _check_credential("api_key", key)
            if not callable(self._headers.reveal()):
                _check_caller_headers(self._headers, "X-Internal-Token")
            token_request = self._request(
                "POST", "/v1/auth/convert_to_internal_token", idempotent=True,
                credential=_Credential("Authorization", f"Bearer {key.reveal()}"),
            )
            self._transport.exchange(token_request, self._scopes)
        except BaseException:
            # The traceback of an error that is kept would keep the connection open.
            self.close()
            raise

    @classmethod
    def from_env(cls: type[_Client], **options: Any) -> _Client:
        """A client with the one credential of the environment, if there is one, and these options.

        `X_INTERNAL_TOKEN`, `AGENT_BUILDER_API_KEY` (which is exchanged) or `GATEWAY_JWT_TOKEN`.
        """
        client: _Client = _from_env(cls, options)
        return client

    @property
    def base_url(self) -> str:
        """The gateway's address. It can't be changed: another gateway needs another client."""
        return f"{self._origin}{self._prefix}"

    @property
    def internal_token(self) -> str | None:
        """The internal token in use, or None. It can't be changed: that would be another client."""
        credential = self._transport.credential
        if credential is None or credential.header != "X-Internal-Token":
            return None
        return credential.value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("internal_token", "api_key", "jwt_token"):
            del value
            raise AttributeError(f"{name} cannot be set: another identity needs another client.")
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        # A crash reporter asks also a client whose constructor failed.
        transport = vars(self).get("_transport")
        if transport is None:
            return f"{type(self).__name__}()"
        mode = transport.credential.header if transport.credential else "allow-list"
        return f"{type(self).__name__}({self.base_url!r}, {mode})"

    def __enter__(self: _Client) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, cancel: bool = False) -> None:
        """Closes the idle connections. May be called twice, by any thread and by a signal handler.

        With `cancel`, all requests and streams in flight end, too, whatever they wait for, with a
        `GatewayError`; and nothing is sent any more.
        """
        self._transport.pool.close()
        if cancel:
            self._transport.scope.cancel()

    def _scoped(self: _Client, scope: _Scope) -> _Client:
        """The same client, whose requests are also ended by `scope`."""
        scoped = copy.copy(self)
        scoped._scopes = (*self._scopes, scope)
        return scoped

    # Running

    @overload
    def run(
        self, prefab_id: str, version: str, function_name: str, parameters: _Json | None = None,
        files: _Files | None = None, stream: Literal[False] = False, *,
        timeout: float | None = None,
    ) -> PrefabResult: ...

    @overload
    def run(
        self, prefab_id: str, version: str, function_name: str, parameters: _Json | None = None,
        files: _Files | None = None, *, stream: Literal[True], timeout: float | None = None,
    ) -> EventStream: ...

    @overload
    def run(
        self, prefab_id: str, version: str, function_name: str, parameters: _Json | None,
        files: _Files | None, stream: Literal[True], *, timeout: float | None = None,
    ) -> EventStream: ...

    @overload
    def run(
        self, prefab_id: str, version: str, function_name: str, parameters: _Json | None = None,
        files: _Files | None = None, stream: bool = False, *, timeout: float | None = None,
    ) -> PrefabResult | EventStream: ...

    def run(
        self, prefab_id: str, version: str, function_name: str, parameters: _Json | None = None,
        files: _Files | None = None, stream: bool = False, *, timeout: float | None = None,
    ) -> PrefabResult | EventStream:
        """Runs a function. `POST /v1/internal/run`, or `POST /v1/run` with an API key or a JWT.

        Args:
            files: An input's name to a list of `s3://` URLs.
            stream: Gives the events as they come, and not the result at the end.
            timeout: Counts instead of the client's, unless it is None.

        Returns:
            The result, also of a function that failed: see `is_success()`; or the events.

        Raises:
            PrefabNotFoundError, MissingSecretError, QuotaExceededError: nothing ran.
            ServiceUnavailableError: it was sent once at most; has it run? See `may_have_run`.
        """
        # A URL may have been given that is a secret.
        call = _Secret(PrefabCall(prefab_id, version, function_name, parameters, files))
        del parameters, files
        _check_call(call.reveal())
        request = self._run_request({"": call.reveal()}, timeout)
        if stream:
            return _send_call(self._transport, request, _read_stream, self._scopes)
        return _send_call(self._transport, request, _read_results, self._scopes)[0]

    def run_batch(
        self, calls: Iterable[PrefabCall], *, max_workers: int = 8, timeout: float | None = None,
        on_result: Callable[[int, PrefabResult], object] | None = None,
        executor: Executor | None = None, single_request: bool = False,
    ) -> BatchResult:
        """Runs calls side by side, each a request of its own, so that none costs another's result.

        Args:
            calls: Read and checked whole before anything is sent.
            max_workers: Calls at a time, in threads. They see the caller's context variables.
            on_result: Called in this thread with index and result, as each comes. If it raises,
                nothing more is sent. Whatever else ends the batch, what has arrived is handed over.
            executor: Runs the calls instead of threads: a process pool, a cluster.
            single_request: Sends one POST instead: the gateway runs its calls one after another,
                and fails them all with the first bad one.

        Returns:
            The results in the order of the calls; one that raised is FAILED and has `exception`.
            A 401 is raised if no call has a result; nothing is sent after it.
        """
        if not isinstance(calls, Iterable):
            raise ValidationError(f"calls must be a list of PrefabCall, not {_shown(calls)}.")
        placed = {f"calls[{index}]": call for index, call in enumerate(calls)}
        report = on_result or _ignore
        _check_number("max_workers", max_workers)
        if executor is not None and not hasattr(executor, "submit"):
            raise ValidationError("executor must be an Executor.")
        if single_request and executor:
            raise ValidationError("A single request cannot have an executor.")
        if not callable(report):
            raise ValidationError("on_result must be a function.")
        for place, call in placed.items():
            _check_call(call, f"{place}: ")
        groups = [placed] if single_request and placed else [{p: c} for p, c in placed.items()]
        requests = (self._run_request(group, timeout) for group in groups)
        batch = _Batch(self._transport, requests, executor, self._scopes)
        results = batch.run(len(placed), 0 if single_request else max_workers, report)
        return BatchResult._from_results(results, len(groups))

    def _run_request(self, calls: Mapping[str, PrefabCall], timeout: float | None) -> _Request:
        """The request with these calls, by their places in a batch, such as `calls[3]`."""
        bodies = [_encode(call.to_dict(), place) for place, call in calls.items()]
        prefab = {}
        if len(calls) == 1:
            (call,) = calls.values()
            prefab = {"prefab_id": call.prefab_id, "version": call.version}
        return self._request(
            "POST", self._run_path, body=b'{"calls":[%b]}' % b",".join(bodies), timeout=timeout,
            calls=len(calls), not_found=PrefabNotFoundError, prefab=prefab,
        )

    def prefab(self, prefab_id: str, version: str) -> Prefab:
        """A prefab whose functions are called like methods. Nothing is sent."""
        return Prefab(self, prefab_id, version)

    def list_prefabs(self, status: str | None = None) -> list[PrefabInfo]:
        """The directory, newest first; all, or only `"deployed"`, `"failed"`. `GET /v1/prefabs`"""
        query = {"status": status}
        request = self._request("GET", "/v1/prefabs", query, not_found=PrefabNotFoundError)
        return self._transport.send(request, _read_prefabs, self._scopes)

    def get_prefab_spec(self, prefab_id: str, version: str | None = None) -> _Json:
        """A prefab's functions. `GET /v1/prefabs/{prefab_id}/{version}/spec`

        Without `version`, those of the newest; of a failed one only if there is no other.
        """
        path = _segments(prefab_id)
        if version is None:
            found = [prefab for prefab in self.list_prefabs() if prefab.prefab_id == prefab_id]
            if not found:
                problem = f"The gateway's directory has no prefab {_shown(prefab_id)}."
                missing = {"prefab_id": prefab_id, "version": "latest"}
                advice = PrefabNotFoundError._advice_for(missing)
                raise PrefabNotFoundError._create(problem, missing, advice)
            newest = max(found, key=lambda one: (one.status != "failed", _version_key(one.version)))
            version = newest.version
        request = self._request(
            "GET", f"/v1/prefabs/{path}/{_segments(version)}/spec", not_found=PrefabNotFoundError,
            prefab={"prefab_id": prefab_id, "version": version},
        )
        return self._fetch(request)

    # Secrets

    def set_secret(self, prefab_id: str, secret_name: str, secret_value: str) -> None:
        """Stores a secret of yours for a prefab. `POST /v1/secrets`"""
        secret = _Secret(secret_value)
        del secret_value
        _segments(prefab_id, secret_name)
        is_text = isinstance(secret.reveal(), str)
        if not is_text or not re.fullmatch("[^\ud800-\udfff]+", secret.reveal()):
            raise ValidationError("secret_value must be a text in UTF-8 that is not empty.")
        names = {"prefab_id": prefab_id, "secret_name": secret_name}
        content = _Secret({**names, "secret_value": secret.reveal()})
        self._send(self._request("POST", "/v1/secrets", content=content, secrets=(secret,)))

    def delete_secret(self, prefab_id: str, secret_name: str) -> None:
        """Deletes a secret of yours. `DELETE /v1/secrets/{prefab_id}/{secret_name}`"""
        path = f"/v1/secrets/{_segments(prefab_id, secret_name)}"
        self._send(self._request("DELETE", path))

    def list_secrets(self, prefab_id: str | None = None) -> list[dict[str, str]]:
        """Your secrets, as `{"prefab_id", "secret_name"}`. `GET /v1/secrets[/{prefab_id}]`"""
        if prefab_id is None:
            return list(self._fetch(self._request("GET", "/v1/secrets"), secrets=list)["secrets"])
        request = self._request("GET", f"/v1/secrets/{_segments(prefab_id)}")
        names = self._fetch(request, secret_names=list)["secret_names"]
        return [{"prefab_id": prefab_id, "secret_name": name} for name in names]

    # Files

    def upload_input_file(
        self, file_path: _Path, content_type: str | None = None, *,
        on_progress: _Progress | None = None,
    ) -> str:
        """Uploads an input of a call, of a type such as `"video/mp4"`, and gives its `s3://` URL.

        `POST /internal/files/generate_upload_url`, then a presigned PUT to the storage.
        """
        path = _Secret(file_path)
        del file_path
        # The type is part of the signature, and so is its absence.
        headers = {} if content_type is None else {"Content-Type": content_type}
        for value in headers.values():
            _check_header_value("content_type", _Secret(value))
        with _open_file(path) as file:
            content = {"filename": _file_name(path.reveal()), "content_type": content_type}
            request = self._request(
                "POST", "/internal/files/generate_upload_url", content=content, idempotent=True
            )
            answer = _Secret(self._fetch(request, upload_url=str, s3_url=str))
            url = _Secret(answer.reveal()["upload_url"])
            body = _FileBody(b"", file, b"", on_progress)
            self._send(self._presigned("PUT", url, headers=headers, body=body))
        return str(answer.reveal()["s3_url"])

    def upload_file(self, file_path: _Path, *, on_progress: _Progress | None = None) -> _Json:
        """Uploads a file to keep, and gives `{"success", "s3_url", "filename", "size"}`.

        `POST /internal/files/upload`
        """
        path = _Secret(file_path)
        del file_path
        return self._upload("upload", {}, path, on_progress)

    def upload_temp_file(
        self, file_path: _Path, ttl: int = 86400, session_id: str | None = None, *,
        on_progress: _Progress | None = None,
    ) -> _Json:
        """Uploads a file that goes after `ttl` seconds, or with its session: see `temp_session`.

        `POST /internal/files/upload_temp`; gives what `upload_file` does.
        """
        path = _Secret(file_path)
        del file_path
        _check_number("ttl", ttl)
        form = {"ttl": str(ttl)}
        if session_id:
            form["session_id"] = str(session_id)
        return self._upload("upload_temp", form, path, on_progress)

    def _upload(
        self, name: str, form: Mapping[str, str], path: _Secret, on_progress: _Progress | None
    ) -> _Json:
        with _open_file(path) as file:
            content_type, head, tail = _multipart(form, path.reveal())
            request = self._request(
                "POST", f"/internal/files/{name}", content_type=content_type,
                body=_FileBody(head, file, tail, on_progress),
            )
            return self._fetch(request, s3_url=str)

    def download_file(
        self, s3_url: str, local_path: _Path, mode: str = "presigned", *,
        on_progress: _Progress | None = None,
    ) -> None:
        """Downloads a file straight from the storage; a transfer that breaks goes on where it was.

        `local_path` is the old file or the whole new one, never a part. Missing folders are made.
        While new attempts bring more of the file, the count of `max_retries` starts anew. If the
        presigned URL expires meanwhile, a new one is asked for.
        """
        # Another URL, given by mistake, may be a secret.
        url, path = _Secret(s3_url), _Secret(local_path)
        del s3_url, local_path
        if mode != "presigned":
            raise ValidationError(f"mode must be 'presigned', not {_shown(mode)}.")
        target = "" if _is_no_path(str(path.reveal())) else os.path.realpath(path.reveal())
        can_be_made = target and os.path.basename(path.reveal()) and not os.path.exists(target)
        if not can_be_made and not os.path.isfile(target):
            problem = "cannot be the path of a file: local_path needs the file's name, too."
            raise ValidationError(f"{_shown(str(path.reveal()))} {problem}")
        with _replacement(target) as file:
            download = _Download(file, target, on_progress)
            while True:
                request = self._presigned("GET", _Secret(self.get_presigned_url(url.reveal())))
                try:
                    return self._transport.send(request, download.receive, self._scopes, download)
                except GatewayError as error:
                    # If it goes on, the URL may have expired.
                    if not download.outlasts(error, self._transport.max_retries):
                        raise

    def get_presigned_url(self, s3_url: str, expires_in: int = 3600) -> str:
        """A URL to download from for `expires_in` seconds. `GET /internal/files/download`"""
        # Another URL, given by mistake, may be a secret.
        url = _Secret(s3_url)
        del s3_url
        _check_s3_url(url)
        _check_number("expires_in", expires_in)
        query = {"s3_url": url.reveal(), "mode": "presigned", "expires_in": expires_in}
        request = self._request("GET", "/internal/files/download", query)
        return str(self._fetch(request, presigned_url=str)["presigned_url"])

    def list_files(self, limit: int = 100, continuation_token: str | None = None) -> _Json:
        """A page of the permanent files. `GET /internal/files/list`

        It is `{"files": [{"key", "size", "last_modified", "s3_url"}], "next_token"}`; `next_token`
        is the `continuation_token` of the next page, if there is one.
        """
        return self._list("list", limit, continuation_token)

    def list_temp_files(
        self, session_id: str | None = None, limit: int = 100, continuation_token: str | None = None
    ) -> _Json:
        """A page of the temporary files: see `list_files`. `GET /internal/files/list_temp`"""
        return self._list("list_temp", limit, continuation_token, session_id)

    def _list(
        self, name: str, limit: int, token: str | None, session_id: str | None = None
    ) -> _Json:
        _check_number("limit", limit)
        query = {"limit": limit, "session_id": session_id, "continuation_token": token}
        page = self._fetch(self._request("GET", f"/internal/files/{name}", query), files=list)
        if token and page.get("next_token") == token:
            raise GatewayError("The gateway gave the same next_token twice: the pages have no end.")
        return page

    def iter_files(self, page_size: int = 100) -> Iterator[_Json]:
        """The permanent files of all pages: see `list_files`."""
        return _pages(self.list_files, page_size)

    def iter_temp_files(
        self, session_id: str | None = None, page_size: int = 100
    ) -> Iterator[_Json]:
        """The temporary files of all pages: see `list_files`."""
        return _pages(partial(self.list_temp_files, session_id), page_size)

    def cleanup_temp_files(self, session_id: str) -> int:
        """Deletes and counts a session's files. `DELETE /internal/files/cleanup_temp`"""
        _check_text(session_id=session_id)
        query = {"session_id": session_id}
        request = self._request("DELETE", "/internal/files/cleanup_temp", query)
        return int(self._fetch(request, deleted_count=int)["deleted_count"])

    @contextmanager
    def temp_session(self, session_id: str | None = None) -> Iterator[str]:
        """A session id for temporary files, which are deleted on the way out, error or not."""
        session_id = _session_id(session_id)
        try:
            yield session_id
        except BaseException:
            # The first error says more.
            with suppress(GatewayError):
                self.cleanup_temp_files(session_id)
            raise
        self.cleanup_temp_files(session_id)

    # What the endpoints are made of

    def _request(
        self, method: str, path: str, query: Mapping[str, Any] = {}, *, content: Any = None,
        body: bytes | _FileBody = b"", content_type: str = "application/json",
        timeout: float | None = None, idempotent: bool = False, calls: int = 0,
        not_found: type[GatewayError] = GatewayError, prefab: Mapping[str, str] = {},
        credential: _Credential | None = None, secrets: tuple[_Secret, ...] = (),
    ) -> _Request:
        """A request to the gateway: see `_Request`. What is empty in `query` is not sent.

        Args:
            content: To be sent as JSON, in place of `body`. It may be in a `_Secret`.
            idempotent: All but a POST are so anyway.
        """
        asked = {name: value for name, value in query.items() if value not in (None, "")}
        target = f"{self._prefix}{path}"
        if asked:
            # Refuses what UTF-8 does not have.
            _encode(asked)
            target += f"?{urlencode(asked, quote_via=quote)}"
        timeout = self.timeout if timeout is None else timeout
        _check_timeout(timeout)
        given = self._headers
        if callable(given.reveal()):
            given = _Secret(given.reveal()())
        in_use = credential or self._transport.credential
        if content is not None:
            body = _encode(_Secret(content).reveal())
        headers = {"Content-Type": content_type} if body else {}
        return _Request(
            method, self._origin, target, timeout, headers,
            _check_caller_headers(given, in_use.header if in_use else None), body,
            idempotent=idempotent or method != "POST", calls=calls, not_found=not_found,
            prefab=prefab, credential=credential, secrets=secrets,
        )

    def _presigned(
        self, method: str, url: _Secret, headers: Mapping[str, str] = {},
        body: bytes | _FileBody = b"",
    ) -> _Request:
        """A request to the storage, which must not see the credential."""
        try:
            origin, target = _split_url(url.reveal())
        except ValueError as error:
            raise GatewayError(f"The URL that the gateway gave for a {method} {error}.") from None
        return _Request(
            method, origin, target, self.timeout, headers, body=body, idempotent=True,
            to_gateway=False, secrets=_query_secrets(target),
        )

    def _send(self, request: _Request) -> bytes:
        """The body of the answer to a request."""
        return self._transport.send(request, _Response.read_all, self._scopes)

    def _fetch(self, request: _Request, **expected: type) -> _Json:
        """The JSON object that a request is answered with, which has these fields."""
        read = partial(_read_json, kind=dict, expect=expected)
        answer: _Json = self._transport.send(request, read, self._scopes)
        return answer


# --- Async client ---------------------------------------------------------------------------------


class _Workers:
    """Threads for one client, as many as there are jobs at a time, each used again.

    They are daemons: the end of the program waits for no call that was given up.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit or sys.maxsize
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], object]] = deque()
        self._threads = self._idle = 0
        self._idle_seconds = _IDLE_SECONDS

    def _submit(self, job: Callable[[], object]) -> None:
        """Has a thread do a job, as soon as one is free."""
        with self._changed:
            if len(self._jobs) >= self._idle and self._threads < self._limit:
                try:
                    threading.Thread(target=self._work, daemon=True).start()
                    self._threads += 1
                except RuntimeError:
                    # No more threads can be started: another one does it, if there is one.
                    if not self._threads:
                        raise
            self._jobs.append(job)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._idle += 1
                    self._changed.wait(self._idle_seconds)
                    self._idle -= 1
                if not self._jobs:
                    self._threads -= 1
                    return
                job = self._jobs.popleft()
            job()
            # A thread that waits must not keep its last job alive.
            del job

    async def do(
        self, work: _Secret, give_up: Callable[[], object], grace_seconds: float = 0.0
    ) -> Any:
        """What the function in `work` gives in a thread. A cancelled task has `give_up` end it.

        So long it is then waited for at most, if it had begun.
        """
        import asyncio
        import contextvars

        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        # `task.cancel()` cancels this at once; the task itself gets to know of it later, when
        # another one may already have given its thread back to this job.
        waiting = asyncio.shield(ended)
        began = threading.Event()
        context = contextvars.copy_context()
        results: list[Any] = []
        errors: list[BaseException] = []

        def job() -> None:
            if waiting.cancelled():
                return
            began.set()
            try:
                results.append(context.run(work.reveal()))
            except BaseException as error:  # noqa: BLE001
                errors.append(error)
            # The loop may have ended without waiting.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set_result, None)

        self._submit(job)
        try:
            await waiting
        except BaseException as error:
            give_up()
            if grace_seconds and began.is_set() and isinstance(error, asyncio.CancelledError):
                await asyncio.wait([ended], timeout=grace_seconds)
            raise
        if errors:
            raise errors.pop()
        return results.pop()

    def close(self) -> None:
        """Ends the threads when they have nothing to do."""
        self._idle_seconds = 0.0
        with self._changed:
            self._changed.notify_all()


class AsyncEventStream:
    """The events of one call, for `async for`: what `EventStream` is for `for`.

    It is closed by `await close()`, the end of an `async with`, a reader that is cancelled, and
    garbage collection. For tests of your own, `events` can be any iterable of events.
    """

    def __init__(self, events: Iterable[StreamEvent], _workers: _Workers | None = None) -> None:
        self._stream = events if isinstance(events, EventStream) else EventStream(events)
        self._workers = _workers or _Workers(None)
        # What has arrived. No more is read before it is taken: a slow reader holds the sender back.
        self._arrived: deque[StreamEvent] = deque()

    def __aiter__(self) -> AsyncEventStream:
        return self

    async def __anext__(self) -> StreamEvent:
        if not self._arrived:
            read = _Secret(self._stream._read_some)
            self._arrived.extend(await self._workers.do(read, self._stream.close))
        if not self._arrived:
            raise StopAsyncIteration
        return self._arrived.popleft()

    async def __aenter__(self) -> AsyncEventStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the stream, also for a task that waits for an event. May be called twice."""
        self._stream.close()
        self._arrived.clear()


class _AsyncPrefab(Protocol):
    """A `Prefab` whose client's methods are awaited, to type checkers."""

    async def call(
        self, function_name: str, /, *, files: _Files | None = None, **parameters: Any
    ) -> PrefabResult: ...

    async def stream(
        self, function_name: str, /, *, files: _Files | None = None, **parameters: Any
    ) -> AsyncEventStream: ...

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, PrefabResult]]: ...


def _awaited(
    method: Callable[Concatenate[GatewayClient, _P], _T],
) -> Callable[Concatenate[AsyncGatewayClient, _P], Coroutine[Any, Any, _T]]:
    """The same method for `AsyncGatewayClient`."""

    @functools.wraps(method)
    async def call(self: AsyncGatewayClient, /, *args: Any, **options: Any) -> Any:
        scope = _Scope()
        # There may be a secret among the arguments.
        work = _Secret(partial(method, self._client._scoped(scope), *args, **options))
        del args, options
        result = await self._workers.do(work, scope.cancel)
        if isinstance(result, EventStream):
            return AsyncEventStream(result, self._workers)
        return result

    return call


async def _async_pages(
    list_page: Callable[[int, Any], Awaitable[_Json]], page_size: int
) -> AsyncIterator[_Json]:
    """The files of all pages."""
    token: str | None = ""
    while token is not None:
        page = await list_page(page_size, token)
        for file in page["files"]:
            yield file
        token = page.get("next_token") or None


class AsyncGatewayClient:
    """`GatewayClient` for programs that await: the same arguments, methods, results and errors.

    The same transport, on threads of its own: `max_workers`, or as many as are needed. A call that
    is cancelled (`task.cancel()`, `asyncio.timeout`) closes its connection; it may have run.
    `on_result` is called in the loop's thread, `on_progress` in another.
    """

    def __init__(
        self, base_url: str | None = None, api_key: str | None = None, jwt_token: str | None = None,
        timeout: float | None = 60, *, internal_token: str | None = None, max_retries: int = 2,
        ssl_context: SSLContext | None = None, headers: _CallerHeaders | None = None,
        max_workers: int | None = None,
    ) -> None:
        make = _Secret(
            partial(
                GatewayClient, base_url, api_key, jwt_token, timeout, internal_token=internal_token,
                max_retries=max_retries, ssl_context=ssl_context, headers=headers,
            )
        )
        del base_url, api_key, jwt_token, internal_token, headers
        if max_workers is not None:
            _check_number("max_workers", max_workers)
        self._client: GatewayClient = make.reveal()()
        self._max_workers = max_workers
        # By process: the threads do not come along into a fork, and a lock may stay held there.
        self._crews: dict[Any, _Workers] = {}

    def __getstate__(self) -> _Json:
        # No threads.
        return {**vars(self), "_crews": {}}

    __setattr__ = GatewayClient.__setattr__

    @property
    def _workers(self) -> _Workers:
        workers = self._crews.get(_Process.id)
        return workers or self._crews.setdefault(_Process.id, _Workers(self._max_workers))

    @classmethod
    async def from_api_key(
        cls: type[_AsyncClient], api_key: str, base_url: str | None = None,
        timeout: float | None = 60, *, max_retries: int = 2, ssl_context: SSLContext | None = None,
        headers: _CallerHeaders | None = None, max_workers: int | None = None,
    ) -> _AsyncClient:
        """See `GatewayClient.from_api_key`."""
        key, address, given = _Secret(api_key), _Secret(base_url), _Secret(headers)
        del api_key, base_url, headers
        client = cls(
            address.reveal(), timeout=timeout, max_retries=max_retries, ssl_context=ssl_context,
            headers=given.reveal(), max_workers=max_workers,
        )
        await client._exchange(key)
        return client

    # A copy of the client, with which this is called, has the same transport.
    _exchange = _awaited(GatewayClient._exchange)

    @classmethod
    async def from_env(cls: type[_AsyncClient], **options: Any) -> _AsyncClient:
        """See `GatewayClient.from_env`."""
        made = _from_env(cls, options)
        client: _AsyncClient = made if isinstance(made, cls) else await made
        return client

    @property
    def base_url(self) -> str:
        """See `GatewayClient.base_url`."""
        return self._client.base_url

    @property
    def internal_token(self) -> str | None:
        """See `GatewayClient.internal_token`."""
        return self._client.internal_token

    @property
    def timeout(self) -> float | None:
        """Seconds for connecting and for each wait for bytes."""
        return self._client.timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        """Of calls from now on."""
        self._client.timeout = seconds

    def __repr__(self) -> str:
        return f"Async{self._client!r}" if "_client" in vars(self) else f"{type(self).__name__}()"

    async def __aenter__(self: _AsyncClient) -> _AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, *, cancel: bool = False) -> None:
        """See `GatewayClient.close`. It waits for nothing."""
        self._client.close(cancel=cancel)
        self._workers.close()

    # Running

    if TYPE_CHECKING:

        @overload
        async def run(
            self, prefab_id: str, version: str, function_name: str, parameters: _Json | None = None,
            files: _Files | None = None, stream: Literal[False] = False, *,
            timeout: float | None = None,
        ) -> PrefabResult: ...

        @overload
        async def run(
            self, prefab_id: str, version: str, function_name: str, parameters: _Json | None = None,
            files: _Files | None = None, *, stream: Literal[True], timeout: float | None = None,
        ) -> AsyncEventStream: ...

        @overload
        async def run(
            self, prefab_id: str, version: str, function_name: str, parameters: _Json | None,
            files: _Files | None, stream: Literal[True], *, timeout: float | None = None,
        ) -> AsyncEventStream: ...

        @overload
        async def run(
            self, prefab_id: str, version: str, function_name: str, parameters: _Json | None = None,
            files: _Files | None = None, stream: bool = False, *, timeout: float | None = None,
        ) -> PrefabResult | AsyncEventStream: ...

        async def run(self, *args: Any, **options: Any) -> Any: ...

    else:
        run = _awaited(GatewayClient.run)

    async def run_batch(
        self, calls: Iterable[PrefabCall], *, max_workers: int = 8, timeout: float | None = None,
        on_result: Callable[[int, PrefabResult], object] | None = None,
        executor: Executor | None = None, single_request: bool = False,
    ) -> BatchResult:
        """See `GatewayClient.run_batch`."""
        import asyncio

        loop, scope = asyncio.get_running_loop(), _Scope()
        raised: list[BaseException] = []

        def hand_over(index: int, result: PrefabResult) -> None:
            try:
                if on_result and not (raised and isinstance(raised[0], Exception)):
                    on_result(index, result)
            except BaseException as error:  # noqa: BLE001
                # It is raised below. Nothing more is sent.
                raised.append(error)
                scope.cancel()

        def report(index: int, result: PrefabResult) -> None:
            # What was given up has no result. The loop may have ended without waiting.
            with suppress(RuntimeError):
                if not scope.cancelled or result.exception is None:
                    loop.call_soon_threadsafe(hand_over, index, result)

        # An iterator is read in this thread. What is none is refused as everywhere.
        given = list(calls) if isinstance(calls, Iterable) else calls
        work = partial(
            self._client._scoped(scope).run_batch, given, max_workers=max_workers,
            timeout=timeout, on_result=report if callable(on_result) else on_result,
            executor=executor, single_request=single_request,
        )
        # When it is cancelled it ends at once, but what had arrived is on its way to `on_result`.
        batch: BatchResult = await self._workers.do(_Secret(work), scope.cancel, 1.0)
        if raised:
            raise raised[0]
        return batch

    def prefab(self, prefab_id: str, version: str) -> _AsyncPrefab:
        """A prefab whose functions are called like methods, and awaited. Nothing is sent."""
        # Its methods give what the client's `run` gives, which is to be awaited here.
        return cast(_AsyncPrefab, Prefab(cast(Any, self), prefab_id, version))

    list_prefabs = _awaited(GatewayClient.list_prefabs)
    get_prefab_spec = _awaited(GatewayClient.get_prefab_spec)

    # Secrets

    set_secret = _awaited(GatewayClient.set_secret)
    delete_secret = _awaited(GatewayClient.delete_secret)
    list_secrets = _awaited(GatewayClient.list_secrets)

    # Files

    upload_input_file = _awaited(GatewayClient.upload_input_file)
    upload_file = _awaited(GatewayClient.upload_file)
    upload_temp_file = _awaited(GatewayClient.upload_temp_file)
    download_file = _awaited(GatewayClient.download_file)
    get_presigned_url = _awaited(GatewayClient.get_presigned_url)
    list_files = _awaited(GatewayClient.list_files)
    list_temp_files = _awaited(GatewayClient.list_temp_files)
    cleanup_temp_files = _awaited(GatewayClient.cleanup_temp_files)

    def iter_files(self, page_size: int = 100) -> AsyncIterator[_Json]:
        """See `GatewayClient.iter_files`."""
        return _async_pages(self.list_files, page_size)

    def iter_temp_files(
        self, session_id: str | None = None, page_size: int = 100
    ) -> AsyncIterator[_Json]:
        """See `GatewayClient.iter_temp_files`."""
        return _async_pages(partial(self.list_temp_files, session_id), page_size)

    @asynccontextmanager
    async def temp_session(self, session_id: str | None = None) -> AsyncIterator[str]:
        """See `GatewayClient.temp_session`."""
        import asyncio

        session_id = _session_id(session_id)
        try:
            yield session_id
        except BaseException:
            # The first error says more. anyio cancels each wait anew, but not the work behind it.
            with suppress(GatewayError):
                await asyncio.shield(self.cleanup_temp_files(session_id))
            raise
        await asyncio.shield(self.cleanup_temp_files(session_id))


# --- Command line ---------------------------------------------------------------------------------

# Control characters but tabs and line ends, and those that turn the direction of writing.
_CONTROLS = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_ESCAPES = {code: f"\\u{code:04x}" for code in _CONTROLS - set(b"\t\n\r")}


def _wait_for(raw: Any) -> None:
    """Waits where a pipe does not make its readers and writers wait (node's, asyncio's)."""
    import select

    select.select([raw] * raw.readable(), [raw] * raw.writable(), [])


def _write_all(stream: Any, text: str) -> None:
    """Writes a text to stdout or stderr, whole and at once.

    It goes round the layers of `io`, which lose text where they would have to wait, and try again
    at the end of Python what could not be written.
    """
    stream.flush()
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        # A program that calls `main` has put something of its own there.
        stream.write(text)
        return
    raw = getattr(buffer, "raw", buffer)
    rest = memoryview(text.encode(stream.encoding, "backslashreplace"))
    while rest:
        written = raw.write(rest)
        if written is None:
            _wait_for(raw)
        else:
            rest = rest[written:]


def _read_stdin() -> bytes:
    raw = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    content = bytearray()
    while (block := raw.read(65536)) != b"":
        if block is None:
            _wait_for(raw)
        else:
            content += block
    return bytes(content)


def _read_text(path: str) -> str:
    """A file, or stdin for `-`, in UTF-8 or with a byte order mark, whatever the locale is."""
    if path == "-":
        content = _read_stdin()
    else:
        with open(path, "rb") as file:
            content = file.read()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    # UTF-16 without its mark may pass for UTF-8.
    if b"\0" not in content[:2]:
        with suppress(ValueError):
            return content.decode(encoding)
    name = "stdin" if path == "-" else path
    remedy = "Save it as UTF-8 (in PowerShell by `Out-File -Encoding utf8`)"
    raise ValidationError(f"{name} is not UTF-8. {remedy}.")


def _decode_input(text: str, name: str) -> Any:
    """The JSON that a user wrote. NaN, which Python takes and no gateway does, is none."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"{name} is not JSON: {error}") from error
    return value


def _to_json(document: Any, indent: int | None, ensure_ascii: bool) -> str:
    """The document as JSON, which has neither NaN nor infinities: null stands for them."""
    encode = partial(json.dumps, indent=indent, ensure_ascii=ensure_ascii)
    try:
        return encode(document, allow_nan=False)
    except ValueError:
        # It prints no integer that is longer, unasked; older versions of Python do.
        set_limit = getattr(sys, "set_int_max_str_digits", None)
        if set_limit:
            set_limit(0)
        return encode(json.loads(json.dumps(document), parse_constant=lambda _: None))


def _columns(stream: Any) -> int:
    """How many cells a line has; 0 if the stream is no terminal."""
    with suppress(AttributeError, OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 0


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
        # When that was.
        self._signalled = 0.0
        # How many `whole` are open, one in another.
        self._wholes = 0
        # A signal came during one of them, and was not raised yet.
        self._overdue = False
        # What wipes the bar off stderr; empty while there is none.
        self._eraser = ""

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Signals that end programs raise KeyboardInterrupt, unless they are ignored (`nohup`)."""
        import signal

        before: dict[int, Any] = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            # Not every system has all of them, and only the main thread can take them.
            with suppress(AttributeError, ValueError):
                number = getattr(signal, name)
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
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
            # So Windows calls a pipe whose reader has gone.
            is_closed = os.name == "nt" and error.errno == errno.EINVAL
            number = errno.EPIPE if is_closed else error.errno
            raise OSError(number, error.strerror, "stdout") from error

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
        lines = [line.strip() for line in text.expandtabs(1).splitlines() if line.strip()]
        lines[:-1] = [line.rstrip(".") for line in lines[:-1]]
        line = "; ".join(lines).replace(":; ", ": ")
        self._show(line.translate(_ESCAPES) + "\n")

    def progress(self, label: str, unit: str = "MiB") -> Callable[[int, int | None], None]:
        """A function that shows what is done, on one line of stderr if that is a terminal."""
        started = drawn = time.monotonic()
        size, digits = (2**20, 1) if unit == "MiB" else (1, 0)

        def draw(done: int, total: int | None) -> None:
            nonlocal drawn
            now = time.monotonic()
            is_due = now - drawn >= 0.1 or done == total
            columns = _columns(sys.stderr) if is_due and not self.quiet else 0
            if not columns:
                return
            drawn = now
            passed = max(now - started, 1e-6)
            share, left = f" {unit}", ""
            if total:
                share = f" of {total / size:,.{digits}f} {unit}, {100 * done // total} %"
                left = f", {(total - done) * passed / max(done, 1):,.0f} s left"
            rate = f"{done / size / passed:,.1f} {unit}/s, {passed:,.0f} s passed"
            text = _clip(f"{done / size:,.{digits}f}{share}, {rate}{left}: {label}", columns - 1)
            if done == total:
                self._show(f"{text}\n")
            else:
                self._show(text, eraser=f"\r{' ' * (columns - 1)}\r")

        return draw

    def wipe(self) -> None:
        """Makes room for what is printed next."""
        if self._eraser:
            self._show("")

    def _show(self, text: str, eraser: str = "") -> None:
        """Shows a text on stderr in place of the bar. If stderr has gone, nothing else is lost."""
        with suppress(OSError, ValueError), self.whole():
            text, self._eraser = f"{self._eraser}{text}", eraser
            _write_all(sys.stderr, text)


# What an interrupted command says that is no call.
_MAY_BE_DONE = "it may have been done all the same"


def _read_parameters(args: Any) -> _Json:
    """The parameters of `-d`, and over them those of `-p` and `-P`."""
    data = args.data
    if data == "-" or data.startswith("@"):
        data = _read_text(data.removeprefix("@"))
    parameters = _decode_input(data, "-d")
    if not isinstance(parameters, dict):
        raise ValidationError("-d must be a JSON object.")
    for name, text in args.parameter:
        if text.startswith("@"):
            parameters[name] = _read_text(text[1:])
        else:
            parameters[name] = text
            with suppress(ValidationError):
                parameters[name] = _decode_input(text, name)
    parameters.update(args.text)
    return parameters


def _upload_inputs(client: GatewayClient, args: Any, terminal: _Terminal) -> dict[str, list[str]]:
    """The URLs of the files of `-f`. Nothing is uploaded unless all of them can be read."""
    for _, path in args.file:
        if not path.startswith("s3://"):
            open(path, "rb").close()
    files: dict[str, list[str]] = {}
    for name, url in args.file:
        if not url.startswith("s3://"):
            url = client.upload_input_file(url, on_progress=terminal.progress(url))
        if not url.startswith("s3://"):
            raise GatewayError(f"The gateway's URL of an upload is {url!r}, and not an s3:// URL.")
        files.setdefault(name, []).append(url)
    return files


def _local_name(url: str) -> str:
    """A name for a file of the gateway: the end of its URL, but for what some system refuses."""
    # Windows refuses these, or a reader is misled by them.
    odd = r'[\0-\x1f\x7f-\x9f<>:"|?*\\\u202a-\u202e\u2066-\u2069\ud800-\udfff]'
    devices = r"(?i)(con|prn|aux|nul|con(in|out)\$|(com|lpt)[0-9\xb9\xb2\xb3]) *(\.|$)"
    name = re.sub(odd, "_", url.rpartition("/")[2][-200:])
    # Windows would leave out blanks and dots at the end.
    name = re.sub("[. ]+$|^$", "_", name)
    if re.match(devices, name):
        name = f"_{name}"
    # Most systems take 255 bytes, and a number may come in front.
    return name.encode()[-240:].decode(errors="ignore")


def _download_into(client: GatewayClient, url: str, folder: str, terminal: _Terminal) -> str:
    """Downloads a file under a name that nothing in the folder has yet. Gives its path."""
    os.makedirs(folder, exist_ok=True)
    name = _local_name(url)
    path = os.path.join(folder, name)
    for number in itertools.count(2):
        try:
            # Takes the name, from commands that run beside this one too.
            open(path, "xb").close()
            break
        except FileExistsError:
            path = os.path.join(folder, f"{number}-{name}")
    try:
        client.download_file(url, path, on_progress=terminal.progress(path))
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
    except ValidationError as error:
        # The URLs are the gateway's, so this is not wrong usage.
        raise GatewayError(f"An output file cannot be saved: {error._in_shell()}") from error
    finally:
        if not args.result:
            more = {"saved": saved} if args.save else {}
            terminal.print_json({**result.to_dict(), **more})
        elif result.is_success() or result.output is not None:
            terminal.print_value(result.get_function_result())
        for path in saved if args.result else ():
            terminal.tell(f"saved: {path}")


def _print_stream(stream: EventStream, as_json: bool, terminal: _Terminal) -> PrefabResult:
    """Prints what comes, as it comes. Gives the result, without most of its contents."""
    # Not all of them: there may be more than memory has room for.
    kept: list[StreamEvent] = []
    has_content = False
    try:
        for event in stream:
            if not kept or event.type in (StreamEventType.DONE, StreamEventType.ERROR):
                kept.append(event)
            if as_json:
                terminal.print_json(event.raw, one_line=True)
            elif _contents([event]):
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


def _call(
    client: GatewayClient, args: Any, parameters: _Json, terminal: _Terminal
) -> PrefabResult:
    """Makes the call of `run`, and prints what comes."""
    files = _upload_inputs(client, args, terminal)
    call = (args.prefab, args.version, args.function, parameters, files)
    terminal.if_interrupted = "the call may have run"
    if args.stream:
        with client.run(*call, stream=True) as stream:
            return _print_stream(stream, args.json, terminal)
    result: PrefabResult = client.run(*call)
    terminal.if_interrupted = "the call has run"
    # Whether somebody reads it or not, the status tells how the call ended.
    with suppress(BrokenPipeError):
        _print_result(client, result, args, terminal)
    return result


def _run_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    if args.stream and (args.save is not None or args.result):
        raise ValidationError("--save and --result do not go with --stream.")
    parameters = _read_parameters(args)
    if args.save is not None:
        # Before a call is paid for whose files could not be saved.
        os.makedirs(args.save, exist_ok=True)
    try:
        result = _call(client, args, parameters, terminal)
    except ValidationError as error:
        is_text = [isinstance(parameters[name], str) for name, _ in args.parameter]
        if error.status_code != 422 or all(is_text):
            raise
        hint = "A value of -p is JSON where it can be: -P NAME=TEXT passes it as text."
        raise GatewayError(f"{error._in_shell()}\n{hint}") from error
    if not result.is_success():
        raise GatewayError(_reason(result))
    value = result.get_function_result()
    if isinstance(value, list) and len(value) == 1:
        # A function that streams gives a list of its contents, of which one may be its answer.
        result = PrefabResult(CallStatus.SUCCESS, value[0])
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
        # Not splitlines(): JSON may have U+2028 in a line.
        lines = enumerate(text.split("\n"), 1)
        entries = [_decode_input(line, f"Line {number}") for number, line in lines if line.strip()]
    known = [one.name for one in fields(PrefabCall)]
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValidationError(f"The call with index {index} is not a JSON object.")
        problems = [f"lacks {name!r}" for name in known[:3] if name not in entry]
        unknown = [name for name in entry if name not in known]
        problems += [f"has {name!r}, which is no field of a call" for name in unknown]
        if problems:
            raise ValidationError(f"The call with index {index} {' and '.join(problems)}.")
    return [PrefabCall(**entry) for entry in entries]


def _batch_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    calls = _read_calls(args.path)
    show_progress = terminal.progress("batch", "calls")
    printed = 0

    def on_result(index: int, result: PrefabResult) -> None:
        nonlocal printed
        with terminal.whole():
            line = {"index": index, **result.to_dict()}
            if result.exception:
                line["error"] = {**line["error"], "message": result.exception._in_shell()}
            elif not result.is_success():
                # So says the gateway: the call has run.
                line["error"] = {**(result.error or {}), "may_have_run": True}
            terminal.print_json(line, one_line=True)
            printed += 1
            show_progress(printed, len(calls))

    terminal.if_interrupted = "calls that have no line on stdout may have run"
    results = client.run_batch(calls, max_workers=args.workers, on_result=on_result).results
    failed = [index for index, result in enumerate(results) if not result.is_success()]
    if failed:
        first = f"the first with index {failed[0]}: {_reason(results[failed[0]])}"
        raise GatewayError(f"{len(failed)} of {len(calls)} calls failed, {first}")


def _list_command(client: GatewayClient, args: Any, terminal: _Terminal) -> Any:
    prefabs = client.list_prefabs(args.status)
    if args.status and not prefabs:
        terminal.tell(f"no prefab has the status {args.status!r}")
    columns = _columns(sys.stdout)
    if not columns:
        return [prefab.raw for prefab in prefabs]
    names = [f"{prefab.prefab_id} {prefab.version}" for prefab in prefabs]
    for prefab, name in zip(prefabs, names):
        state = "" if prefab.status in (None, "deployed") else f"({prefab.status}) "
        line = f"{name:{max(map(len, names))}}  {state}{prefab.description}"
        terminal.print_text(_clip(line, columns) + "\n")
    return None


def _spec_command(client: GatewayClient, args: Any, _: _Terminal) -> Any:
    return client.get_prefab_spec(args.prefab, args.version)


def _upload_command(client: GatewayClient, args: Any, terminal: _Terminal) -> None:
    if not args.temp and (args.session is not None or args.ttl is not None):
        raise ValidationError("--session and --ttl go with --temp.")
    if not args.input and args.content_type is not None:
        raise ValidationError("--content-type goes with --input.")
    answers: list[_Json] = []
    terminal.if_interrupted = _MAY_BE_DONE
    try:
        for path in args.path:
            bar = terminal.progress(path)
            if args.input:
                url = client.upload_input_file(path, args.content_type, on_progress=bar)
                answers.append({"s3_url": url})
            elif args.temp:
                ttl = args.ttl or 86400
                answers.append(client.upload_temp_file(path, ttl, args.session, on_progress=bar))
            else:
                answers.append(client.upload_file(path, on_progress=bar))
    finally:
        # What was uploaded is there, whatever becomes of the others.
        if answers:
            terminal.print_json(answers if len(args.path) > 1 else answers[0])


def _download_command(client: GatewayClient, args: Any, terminal: _Terminal) -> Any:
    path = args.target
    if os.path.isdir(path) or path.endswith(("/", os.sep)):
        path = _download_into(client, args.s3_url, path, terminal)
    else:
        client.download_file(args.s3_url, path, on_progress=terminal.progress(path))
    return {"path": path, "size": os.path.getsize(path)}


def _url_command(client: GatewayClient, args: Any, _: _Terminal) -> Any:
    return {"presigned_url": client.get_presigned_url(args.s3_url, args.expires)}


def _ls_command(client: GatewayClient, args: Any, _: _Terminal) -> Any:
    temporary = args.temp or args.session
    return list(client.iter_temp_files(args.session) if temporary else client.iter_files())


def _cleanup_command(client: GatewayClient, args: Any, terminal: _Terminal) -> Any:
    terminal.if_interrupted = _MAY_BE_DONE
    return {"deleted_count": client.cleanup_temp_files(args.session)}


def _secret_set_command(client: GatewayClient, args: Any, terminal: _Terminal) -> Any:
    value = ""
    if sys.stdin.isatty():
        # Asks without an echo; an argument would show in the list of processes.
        import getpass

        try:
            value = getpass.getpass(f"{args.name}: ")
        except (EOFError, KeyboardInterrupt) as error:
            # Ends the line with the prompt.
            terminal.tell("")
            if not isinstance(error, EOFError):
                raise
    else:
        value = _read_text("-").removesuffix("\n").removesuffix("\r")
    if not value:
        raise ValidationError("The secret is empty: it is read from stdin, or typed at the prompt.")
    terminal.if_interrupted = _MAY_BE_DONE
    client.set_secret(args.prefab, args.name, value)
    return {"prefab_id": args.prefab, "secret_name": args.name}


def _secret_list_command(client: GatewayClient, args: Any, _: _Terminal) -> Any:
    return client.list_secrets(args.prefab)


def _secret_delete_command(client: GatewayClient, args: Any, terminal: _Terminal) -> Any:
    terminal.if_interrupted = _MAY_BE_DONE
    client.delete_secret(args.prefab, args.name)
    return {"prefab_id": args.prefab, "secret_name": args.name}


def _number(kind: type, least: float, text: str) -> Any:
    """The value of an option, which is an `int` or a `float`."""
    import argparse

    with suppress(ValueError):
        if least <= kind(text) < 10**9:
            return kind(text)
    name = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{name} from {least} on is needed, not {text!r}")


def _pair(text: str) -> tuple[str, str]:
    """The name and the value of an option such as `-p`."""
    import argparse

    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"NAME=... is needed, not {text!r}")
    return name, value


def _add_prefab(command: Any) -> None:
    command.add_argument("prefab", metavar="PREFAB", help="an id, see `gateway-sdk list`")


def _add_run(add: Any) -> None:
    run = add("run PREFAB VERSION FUNCTION", _run_command, text="run a function",
              example="text-tools 1.1.0 statistics -p text='Hello you'")
    _add_prefab(run)
    run.add_argument("version", metavar="VERSION", help="such as 1.0.0")
    run.add_argument("function", metavar="FUNCTION", help="see `gateway-sdk spec PREFAB`")
    repeated: _Json = {"action": "append", "default": []}
    run.add_argument("-p", "--parameter", metavar="NAME=VALUE", type=_pair, **repeated,
                     help="a parameter: JSON, or else text; NAME=@FILE is the text of a file")
    run.add_argument("-P", "--text", metavar="NAME=TEXT", type=_pair, **repeated,
                     help="a parameter that is text, whatever it looks like")
    run.add_argument("-f", "--file", metavar="NAME=PATH", type=_pair, **repeated,
                     help="an input: a file, or an s3:// URL")
    run.add_argument("-d", "--data", metavar="JSON", default="{}",
                     help="all parameters: JSON, @FILE or - for stdin")
    run.add_argument("--stream", action="store_true", help="print contents as they come")
    run.add_argument("--json", action="store_true", help="with --stream: events as JSON lines")
    run.add_argument("--result", action="store_true", help="print the function's value alone")
    run.add_argument("--save", metavar="FOLDER", help="download the output files; replaces none")
    run.add_argument("--fail", action="store_true",
                     help='exit with 1, and not 0, if the function reports "success": false')


def _add_batch(add: Any) -> None:
    call = (
        '{"prefab_id": "text-tools", "version": "1.1.0", "function_name": "echo", '
        '"parameters": {"value": 1}}'
    )
    batch = add("batch FILE", _batch_command, text="run the calls of a file", example="calls.jsonl")
    batch.description = (
        "Runs calls side by side. FILE has a call in each line, or is a JSON array of calls.\n"
        "A call has the fields prefab_id, version and function_name, and may have parameters\n"
        "(an object) and files (names to lists of s3:// URLs). Prints each result as soon as it\n"
        "comes: a line of JSON, with the index of its call, from 0. Exits with 1 if one failed."
    )
    batch.epilog += f"\n\na line of calls.jsonl:\n{call}"
    batch.add_argument("path", metavar="FILE", help="a file, or - for stdin")
    batch.add_argument("--workers", type=partial(_number, int, 1), default=8,
                       help="calls at a time; default: 8")


def _add_directory(add: Any) -> None:
    prefabs = add("list", _list_command, example="--status deployed",
                  text="list the prefabs: as lines on a terminal, else as JSON")
    prefabs.add_argument("--status", help="such as deployed or failed")
    spec = add("spec PREFAB [VERSION]", _spec_command, text="show functions", example="text-tools")
    _add_prefab(spec)
    spec.add_argument("version", metavar="VERSION", nargs="?", help="default: the newest")


def _add_files(add: Any) -> None:
    seconds = partial(_number, int, 1)
    upload = add("upload PATH...", _upload_command, text="upload files",
                 example="--input report.txt")
    upload.add_argument("path", metavar="PATH", nargs="+", help="a file")
    kind = upload.add_mutually_exclusive_group()
    kind.add_argument("--input", action="store_true", help="inputs of calls; no agent needed")
    kind.add_argument("--temp", action="store_true", help="temporary files")
    upload.add_argument("--content-type", metavar="TYPE", help="of an input, such as video/mp4")
    upload.add_argument("--ttl", metavar="SECONDS", type=seconds,
                        help="how long a temporary file lives; default: 86400")
    ls = add("ls", _ls_command, text="list the agent's files", example="--temp")
    ls.add_argument("--temp", action="store_true", help="temporary files")
    for command in (upload, ls):
        command.add_argument("--session", help="what temporary files have in common")
    cleanup = add("cleanup SESSION", _cleanup_command, text="delete temporary files",
                  example="session-1")
    cleanup.add_argument("session", metavar="SESSION", help="what the files have in common")
    download = add("download S3_URL [TARGET]", _download_command, text="download a file",
                   example="s3://bucket/key/report.txt downloads/")
    url = add("url S3_URL", _url_command, text="print a URL that anyone can download from",
              example="s3://bucket/key/report.txt --expires 600")
    for command in (download, url):
        command.add_argument("s3_url", metavar="S3_URL", help="the file's URL")
    download.add_argument("target", metavar="TARGET", nargs="?", default=".",
                          help="a file; or a folder, where none is replaced; default: this one")
    url.add_argument("--expires", metavar="SECONDS", type=seconds, default=3600,
                     help="how long it can be used; default: 3600")


def _add_secret(add: Any) -> None:
    secret = add("secret ACTION ...", None, text="set, list or delete your secrets", example="list")
    actions = secret.add_subparsers(metavar="ACTION", required=True, prog=secret.prog)
    add = partial(add, to=actions)
    put = add("set PREFAB NAME", _secret_set_command, text="set one, from stdin or a prompt",
              example="vault SIGNING_KEY < key.txt")
    delete = add("delete PREFAB NAME", _secret_delete_command, text="delete one",
                 example="vault SIGNING_KEY")
    for action in (put, delete):
        _add_prefab(action)
        action.add_argument("name", metavar="NAME", help="the secret's name")
    names = add("list [PREFAB]", _secret_list_command, text="list their names", example="vault")
    names.add_argument("prefab", metavar="PREFAB", nargs="?", help="only those of this one")


def _add_options(common: Any) -> None:
    common.add_argument("--base-url", metavar="URL", help="default: $GATEWAY_BASE_URL")
    common.add_argument("--timeout", metavar="SECONDS", type=partial(_number, float, 0.001),
                        help="of each wait; default: 60")
    common.add_argument("--retries", type=partial(_number, int, 0),
                        help="of what can do no harm; default: 2")
    common.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    common.add_argument("-v", "--verbose", action="store_true", help="log requests to stderr")


def _parse_arguments(argv: Sequence[str] | None) -> Any:
    """The arguments, with the command's `handler`. Raises SystemExit after help and version."""
    # Here only: nobody else should wait for it.
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            usage = str(self.usage).replace("%(prog)s", self.prog)
            raise ValidationError(f"{message} (usage: {usage})")

        def _print_message(self, message: str, file: Any = None) -> None:
            _write_all(file or sys.stdout, message)

    # These stand before or after the command: a default at one place would hide the other.
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    _add_options(common)
    values = argparse.Namespace(base_url=None, timeout=60, retries=2, quiet=False, verbose=False)
    parser = Parser(
        "gateway-sdk", usage="%(prog)s COMMAND ... [options]", parents=[common],
        description="The credential is that in the environment: "
        "X_INTERNAL_TOKEN, AGENT_BUILDER_API_KEY or GATEWAY_JWT_TOKEN.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, prog=parser.prog)

    def add(usage: str, handler: Any, *, text: str, example: str, to: Any = commands) -> Any:
        name, blank, arguments = usage.partition(" ")
        command = to.add_parser(
            name, usage=f"%(prog)s{blank}{arguments} [options]", help=text, parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example: %(prog)s {example}",
        )
        command.set_defaults(handler=handler)
        return command

    _add_run(add)
    _add_batch(add)
    _add_directory(add)
    _add_files(add)
    _add_secret(add)
    return parser.parse_args(argv, values)


def _execute(argv: Sequence[str] | None, terminal: _Terminal) -> None:
    """Does what the arguments ask for."""
    if sys.stdout is None:
        raise GatewayError("stdout is closed, so nothing was done: no result could be printed.")
    args = _parse_arguments(argv)
    terminal.quiet = args.quiet
    if args.verbose:
        import logging
        import types

        stream: Any = types.SimpleNamespace(write=terminal.tell)
        logging.basicConfig(level=logging.DEBUG, stream=stream)
    options = {"base_url": args.base_url, "timeout": args.timeout, "max_retries": args.retries}
    with GatewayClient.from_env(**options) as client:
        document = args.handler(client, args, terminal)
    if document is not None:
        terminal.print_json(document)


def _report(error: BaseException, terminal: _Terminal) -> int:
    """Says on stderr why the command ended. Returns the exit status for it."""
    if terminal.signal or isinstance(error, KeyboardInterrupt):
        terminal.tell(f"interrupted: {terminal.if_interrupted}.")
        return 128 + (terminal.signal or 2)
    if isinstance(error, BrokenPipeError):
        # The reader of stdout has seen enough.
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
    # These are None if the caller has closed them.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - for good
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    terminal = _Terminal()
    with terminal.signals():
        try:
            try:
                _execute(argv, terminal)
            finally:
                terminal.finish()
        except SystemExit:
            # After help and version.
            return 0
        except (KeyboardInterrupt, GatewayError, OSError, ValueError, RecursionError) as error:
            return _report(error, terminal)
    return 0


# `from gateway_sdk.exceptions import ...` and `gateway_sdk.models`, as in the older SDK: the import
# looks into sys.modules before it asks whether the parent is a package.
if not TYPE_CHECKING:
    # Type checkers would take these variables for Any.
    exceptions = models = sys.modules[__name__]
    sys.modules[f"{__name__}.exceptions"] = sys.modules[f"{__name__}.models"] = exceptions

if __name__ == "__main__":
    sys.exit(main())
