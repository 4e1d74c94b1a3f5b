# /// script
# requires-python = ">=3.10"
# dependencies = ["mcp>=1.28,<3"]
# ///
"""The prefabs of a gateway as tools of the Model Context Protocol, for agents and editors.

    uv run examples/mcp_server.py                    # a client starts it: it serves on stdio
    python examples/mcp_server.py                    # the same after `pip install mcp`
    python examples/mcp_server.py --prefab text-tools --prefab file-tools@1.0.0 --save downloads
    python examples/mcp_server.py --list             # prints the tools and ends; does without `mcp`

The gateway is that of GATEWAY_BASE_URL, and the credential is in the environment, as for
`GatewayClient.from_env()`; without GATEWAY_BASE_URL it starts a local gateway. Stderr says which
gateway it is. Every function of the newest deployed version of every prefab is a tool, unless
`--prefab` names the ones to serve.

`--list` prints what the parameter `tools` of the Chat Completions API takes, and with it most APIs
of language models: `[{"type": "function", "function": {"name", "description", "parameters"}}]`.

Every call has a thread of its own. Cancelling a call closes its stream. One that does not stream
cannot be taken back: its answer is dropped when it comes. Serving needs CPython 3.10 or newer, and
was tried with mcp 1.28.1, 1.30.0 and 2.3.0.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where gateway_sdk.py is

import local_gateway

import gateway_sdk
from gateway_sdk import (
    EventStream,
    GatewayClient,
    GatewayError,
    MissingSecretError,
    PrefabResult,
    StreamEvent,
    ValidationError,
)

# Functions take minutes, and an agent that has enough of one can cancel it.
CALL_SECONDS = 600.0
# Some clients wait on as long as they hear something.
HEARTBEAT_SECONDS = 20.0
# A client may ask for the tools at each turn of a conversation.
KEPT_SECONDS = 5.0
SPECS_AT_ONCE = 8
# The limit of some APIs of language models.
MAX_DESCRIPTION_CHARACTERS = 1024
# Of what is sent: `mcp` fails where objects are nested about twice as deep.
MAX_DEPTH = 100

CREDENTIALS = ("X_INTERNAL_TOKEN", "AGENT_BUILDER_API_KEY", "GATEWAY_JWT_TOKEN")

# What a language model is told. Few clients hand the instructions on, so what matters most is said
# in the descriptions and answers, too.
INSTRUCTIONS = """\
Each tool is a function of a prefab, which runs on a gateway. A call may take minutes and cost
money: call a tool once, and wait for its answer. Where an answer says that a call may have run, or
where no answer came, do not repeat the call unasked: tell the user, who decides.
A file is given as an absolute path of this machine or as an s3:// URL. The files that a call made
are listed as output_files; another tool takes the s3_url of one as its file."""
FILE_HINT = "A file is an absolute local path, which is uploaded first, or an s3:// URL."
NO_ANSWER_HINT = "If no answer comes, it may have run: do not repeat it unasked."
REPEAT_HINT = "Do not repeat it unasked."

Json = dict[str, Any]
Files = dict[str, list[str]]  # the s3:// URLs by name
Report = Callable[[str], Awaitable[None]]  # takes the text of an event


# --- Texts ----------------------------------------------------------------------------


def note(message: str) -> None:
    """Tells the user something. Stdout is for messages of the protocol only."""
    print(f"mcp_server: {message}", file=sys.stderr, flush=True)


def sendable(value: Any) -> Any:
    """A JSON value without halves of surrogate pairs, which cannot be sent as UTF-8."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def is_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Whether objects and arrays are nested in more levels than these."""
    if not isinstance(value, (dict, list)):
        return False
    children = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deep(child, levels - 1) for child in children)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value)


def error_message(error: Exception) -> str:
    """What a user is told of an error."""
    if isinstance(error, GatewayError):
        return str(sendable(error.message))
    return str(sendable(f"{type(error).__name__}: {error}"))


# --- Tools ----------------------------------------------------------------------------

# What manifests call the types, and what JSON Schema calls them.
JSON_TYPES = {
    "string": "string", "integer": "integer", "number": "number", "boolean": "boolean",
    "str": "string", "int": "integer", "float": "number", "bool": "boolean",
    "array": "array", "object": "object", "null": "null",
    "list": "array", "dict": "object",
    "InputFile": "string", "OutputFile": "string",
}  # fmt: skip

# The keywords of JSON Schema that manifests use, and how a description says them: some clients
# take all but the descriptions out of a schema.
KEYWORDS = {
    "enum": "One of",
    "format": "Format:",
    "pattern": "Pattern:",
    "minimum": "At least",
    "maximum": "At most",
    "minLength": "Characters, at least:",
    "maxLength": "Characters, at most:",
    "minItems": "Items, at least:",
    "maxItems": "Items, at most:",
    "default": "Default:",
}


def schema_of(entry: Json) -> Json:
    """The JSON Schema of a manifest's parameter, or of what is nested in one."""
    schema = {word: entry[word] for word in KEYWORDS if entry.get(word) is not None}
    words = re.split(r"\s*\|\s*", str(entry.get("type")))  # `string | array`, `list[str]`
    types = [JSON_TYPES.get(word.partition("[")[0], "any") for word in words]
    if "any" not in types:
        schema["type"] = types[0] if len(types) == 1 else types
    if "array" in types:
        schema["items"] = schema_of(entry.get("items") or {})  # some APIs insist on it
    if "properties" in entry:
        schema.update(object_schema(entry["properties"], default_required=False))
        if isinstance(entry.get("required"), list):
            schema["required"] = entry["required"]
    description = " ".join([entry.get("description") or "", *limits_of(schema)]).strip()
    return {**schema, "description": description} if description else schema


def limits_of(schema: Json) -> list[str]:
    """What a schema demands, in words, also of what is nested in it."""
    limits = [f"{KEYWORDS[word]} {as_json(schema[word])}." for word in KEYWORDS if word in schema]
    each = schema.get("items", {}).get("description")
    if each:
        limits.append(f"Each: {each}")
    for name, field in schema.get("properties", {}).items():
        kind = as_text(field.get("type", "any"))
        limits.append(f"Field {name}: {kind}. {field.get('description', '')}".strip())
    return limits


def object_schema(fields: dict[str, Json], *, default_required: bool) -> Json:
    """The JSON Schema of an object with these fields, each of which may say if it is `required`.

    The gateway counts a parameter that does not say it as required, also beside a default.
    """
    properties = {name: schema_of(field) for name, field in fields.items()}
    schema: Json = {"type": "object", "properties": properties}
    required = []
    for name, field in fields.items():
        says = field.get("required")  # of an object, it may be the list of what is required in it
        if says is True or (default_required and not isinstance(says, bool)):
            required.append(name)
    if required:
        schema["required"] = required
    return schema


def is_file(entry: Json, kind: str) -> bool:
    """Whether an entry stands for a file, or for an array of files, of this kind."""
    return kind in (entry.get("type"), (entry.get("items") or {}).get("type"))


@dataclasses.dataclass
class Tool:
    """A function of a prefab, as a language model sees it and as it is called."""

    name: str
    title: str
    description: str
    schema: Json  # of its arguments
    prefab_id: str
    version: str
    function: str
    streaming: bool
    # Whose value is the URL of a file, or an array of them.
    file_parameters: list[str]
    # The name of each in the call's `files`.
    file_arguments: dict[str, str] = dataclasses.field(default_factory=dict)
    # The argument for files by name, where only the description speaks of files.
    any_files: str = ""

    def for_mcp(self) -> Json:
        names = {"name": self.name, "title": self.title}
        return {**names, "description": self.description, "inputSchema": self.schema}

    def for_models(self) -> Json:
        """As APIs of language models take it."""
        told = {"name": self.name, "description": self.description, "parameters": self.schema}
        return {"type": "function", "function": told}


def tool_name(prefab_id: str, function: str, version: str = "") -> str:
    """A name that depends on nothing but the arguments, and that nothing else gets.

    What does not fit into `prefab__function` is cut and has a digest, but no `__`, at its end.
    """
    plain = f"{prefab_id}__{function}"
    is_unique = plain.split("__") == [prefab_id, function] and not version
    if is_unique and re.fullmatch("[A-Za-z0-9_-]{1,64}", plain):
        return plain
    digest = hashlib.sha256(json.dumps([prefab_id, function, version]).encode()).hexdigest()[:10]
    words = re.sub("[^A-Za-z0-9-]+", "_", f"{prefab_id}_{version}_{function}").strip("_")
    return f"{words[:53].rstrip('_')}_{digest}"


def make_tool(spec: Json, function: Json, *, pinned: bool) -> Tool:
    """The tool for a function of a spec. `pinned`: its version is a part of its name."""
    prefab_id, version, name = spec["id"], spec["version"], function["name"]
    about = f"{function.get('description') or name}\n\nPrefab {prefab_id} {version}."
    about = f"{about} {spec.get('description') or ''}".strip()
    about = about[: MAX_DESCRIPTION_CHARACTERS - len(NO_ANSWER_HINT) - 1]
    parameters = {entry["name"]: entry for entry in function.get("parameters") or ()}
    schema = object_schema(parameters, default_required=True)
    tool = Tool(
        tool_name(prefab_id, name, version if pinned else ""),
        f"{spec.get('name') or prefab_id}: {name}",
        f"{about}\n{NO_ANSWER_HINT}",
        {**schema, "additionalProperties": False},
        prefab_id,
        version,
        name,
        streaming=bool(function.get("streaming")),
        file_parameters=[key for key, entry in parameters.items() if is_file(entry, "InputFile")],
    )
    add_file_arguments(tool, about, function.get("files"))
    return tool


def add_file_arguments(tool: Tool, about: str, files: dict[str, Json] | None) -> None:
    """Adds an argument for each input file of the spec, and says what a file is."""
    properties = tool.schema["properties"]
    for key, entry in (files or {}).items():
        if not is_file(entry, "OutputFile"):
            argument = f"{key}_files" if key in properties else key
            array = {"type": "array", "items": {"type": "InputFile"}}
            properties[argument] = schema_of({**entry, **array})
            tool.file_arguments[argument] = key
            if entry.get("required"):
                tool.schema.setdefault("required", []).append(argument)
    if files is None and not tool.file_parameters and re.search("file|文件", about, re.I):
        tool.any_files = "input_files" if "files" in properties else "files"
        properties[tool.any_files] = {
            "type": "object",
            "additionalProperties": {"type": "array", "items": {"type": "string"}},
            "description": "Input files, if the function takes any: name to array of files.",
        }
    for argument in filter(None, [*tool.file_parameters, *tool.file_arguments, tool.any_files]):
        description = properties[argument].get("description", "")
        properties[argument]["description"] = f"{description} {FILE_HINT}".strip()


def version_key(version: str) -> Any:
    """Sorts 1.10.0 after 1.9.0, and 1.0.0-rc.1 before 1.0.0, as `get_prefab_spec` does."""
    release, _, candidate = version.partition("-")
    numbers = [int(digits[:99]) for digits in re.findall("[0-9]+", release)]
    candidate_numbers = [int(digits[:99]) for digits in re.findall("[0-9]+", candidate)]
    return numbers, not candidate, re.sub("[0-9]+", "", candidate), candidate_numbers


def in_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """What the function gives, run in a thread of its own.

    The thread is a daemon: the process does not wait for it.
    """
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
    outcome.set_running_or_notify_cancel()  # from now on nobody but the thread settles it

    def run() -> None:
        try:
            outcome.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
            outcome.set_exception(error)

    future = asyncio.wrap_future(outcome)
    threading.Thread(target=run, name="mcp_server", daemon=True).start()
    return future


async def load_tools(client: GatewayClient, wanted: Sequence[str]) -> dict[str, Tool]:
    """The tools by name, for one request for the directory and one for each spec.

    A prefab whose spec is no use is left out, unless it was asked for.
    """
    turns = asyncio.Semaphore(SPECS_AT_ONCE)
    newest: dict[str, str] = {}
    if not wanted or any("@" not in prefab for prefab in wanted):
        deployed = await in_thread(client.list_prefabs, "deployed")
        for info in sorted(deployed, key=lambda info: version_key(info.version)):
            newest[info.prefab_id] = info.version

    async def load(prefab: str) -> list[Tool]:
        prefab_id, _, pinned = prefab.partition("@")
        # None, for one that is not deployed: the client looks for it, and tells what it finds.
        version = pinned or newest.get(prefab_id)
        try:
            async with turns:
                spec = sendable(await in_thread(client.get_prefab_spec, prefab_id, version))
            if is_deep(spec):
                raise ValueError("its spec is nested too deeply")
            functions = spec["functions"]
            return [make_tool(spec, function, pinned=pinned != "") for function in functions]
        except Exception as error:  # whatever a spec is like, it must not cost the other prefabs
            if wanted:
                raise GatewayError(f"{prefab}: {error_message(error)}") from error
            note(f"left out: {prefab}: {error_message(error)}")
            return []

    prefabs: Iterable[str] = dict.fromkeys(wanted or sorted(newest))
    loaded = await asyncio.gather(*map(load, prefabs))
    return {tool.name: tool for tools in loaded for tool in tools}


# --- Answers --------------------------------------------------------------------------


def failed(
    error: Exception, may_have_run: bool, output: Any = None, hint: str = ""
) -> PrefabResult:
    """The result that stands for an error."""
    told = {"message": error_message(error) + hint, "type": type(error).__name__}
    if isinstance(error, GatewayError) and error.error_code:
        told["error_code"] = error.error_code
    return PrefabResult("FAILED", output, {**told, "may_have_run": may_have_run})


def error_of(result: PrefabResult) -> Json:
    """The error of a failed call. What the gateway itself gives as failed has run."""
    if result.is_success():
        return {}
    error: Json = {"message": f"The call ended as {result.status}.", "may_have_run": True}
    error.update((name, field) for name, field in (result.error or {}).items() if field is not None)
    error["message"] = as_text(error["message"])
    if error["may_have_run"]:
        error["message"] += f"\n{REPEAT_HINT}"
    return error


def problem_of(error: Json, value: Any) -> str:
    """Why a call failed, or why its function says that it did; nothing if all went well."""
    if error:
        known = ("message", "type", "may_have_run")
        further = {name: field for name, field in error.items() if name not in known}
        return f"{error['message']}\n{as_json(further)}" if further else str(error["message"])
    if not isinstance(value, dict) or value.get("success") is not False:
        return ""
    message = value.get("error") or value.get("message") or "The function reports a failure."
    code = value.get("error_code")
    return f"{as_text(message)} ({code})" if code else as_text(message)


def make_answer(result: PrefabResult, files: Sequence[Json] = (), *, links: bool = False) -> Json:
    """What MCP gives as the result of a call: texts, structured content, and links if wanted."""
    value, error = result.get_function_result(), error_of(result)
    problem = problem_of(error, value)
    texts = [problem] if problem else []
    structured: Json = {}
    if value or not error:
        texts.append(as_text(value))
        structured = dict(value) if isinstance(value, dict) else {"result": value}
    if error:
        structured["error"] = error
    if files:
        texts.append(as_text({"output_files": files}))
        structured["output_files"] = files
    content: list[Json] = [{"type": "text", "text": text} for text in texts]
    if links:
        content += [link_to(file) for file in files if "uri" in file]
    answer = {"content": content, "isError": bool(problem)}
    if not is_deep(structured):  # the text has it anyway
        answer["structuredContent"] = structured
    return dict(sendable(answer))


def link_to(file: Json) -> Json:
    about = f"Output file {file['name']}: {file['s3_url']}"
    name = file["s3_url"].rpartition("/")[2]
    return {"type": "resource_link", "name": name, "uri": file["uri"], "description": about}


# --- Calls ----------------------------------------------------------------------------


def is_file_name(path: Any) -> bool:
    """Whether it can be a file's. No relative path can: the agent's folder is not the server's."""
    if not isinstance(path, str):
        return False
    return path.startswith("s3://") or Path(path).expanduser().is_absolute()


@dataclasses.dataclass
class Call:
    """What the thread of a call and the one that waits for it know of each other."""

    tell: Callable[[str], object]  # takes the text of an event
    sent: bool = False
    given_up: bool = False
    stream: EventStream | None = None

    def give_up(self) -> None:
        """Closes the stream, which ends the thread's wait for an event."""
        self.given_up = True
        if self.stream:
            self.stream.close()


@dataclasses.dataclass
class Prefabs:
    """The tools of a gateway, and their calls: all that is not MCP."""

    client: GatewayClient
    wanted: Sequence[str] = ()  # all if there are none
    folder: Path | None = None  # for output files
    timeout: float = CALL_SECONDS
    links: bool = False  # whether an answer has link blocks
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    tools: dict[str, Tool] = dataclasses.field(default_factory=dict)
    loaded_at: float = float("-inf")
    loading: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    saving: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    async def list_tools(self, max_age: float = KEPT_SECONDS) -> list[Tool]:
        """The tools as they are now, or were at most so many seconds ago."""
        oldest = time.monotonic() - max_age
        async with self.loading:  # who comes meanwhile takes what this one gets
            if self.loaded_at <= oldest:
                self.tools = await load_tools(self.client, self.wanted)
                self.loaded_at = time.monotonic()
        return list(self.tools.values())

    async def call_tool(self, name: str, arguments: Json, report: Report) -> Json:
        """The answer of a tool. Whatever goes wrong is an answer too."""
        try:
            if name not in self.tools:
                await self.list_tools(max_age=0)
            if name not in self.tools:
                raise ValidationError(f"Unknown tool: {name}")
        except Exception as error:  # noqa: BLE001 - it must not cost the other calls
            return make_answer(failed(error, may_have_run=False))
        texts: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        call = Call(lambda text: loop.call_soon_threadsafe(texts.put_nowait, text))
        answer = in_thread(self._answer, self.tools[name], arguments, call)
        answer.add_done_callback(lambda _: texts.put_nowait(None))
        try:
            while (text := await self._next_text(texts)) is not None:
                await report(text)
            return dict(await answer)
        finally:
            call.give_up()
            answer.cancel()

    async def _next_text(self, texts: asyncio.Queue[str | None]) -> str | None:
        """The next text to report; None at the end. Of a silent call: that it goes on."""
        if not texts.empty():
            return texts.get_nowait()
        try:
            return await asyncio.wait_for(texts.get(), self.heartbeat_seconds)
        except asyncio.TimeoutError:
            return "The call is still running."

    # What follows runs in the call's own thread.

    def _answer(self, tool: Tool, arguments: Json, call: Call) -> Json:
        try:
            parameters, files = self._upload(tool, arguments)
            result = self._run(tool, parameters, files, call)
            urls = [(name, url) for name, urls in result.get_files().items() for url in urls]
            made = [self._get_file(name, url) for name, url in urls]
            return make_answer(result, made, links=self.links)
        except Exception as error:  # noqa: BLE001 - it must not cost the other calls
            may_have_run = error.may_have_run if isinstance(error, GatewayError) else True
            hint = self._secret_hint(error) if isinstance(error, MissingSecretError) else ""
            return make_answer(failed(error, call.sent and may_have_run, hint=hint))

    def _secret_hint(self, error: MissingSecretError) -> str:
        """How to set a secret on this gateway; that of the terminal may be another one."""
        program = [sys.executable, str(gateway_sdk.__file__), "--base-url", self.client.base_url]
        line = shlex.join([*program, "secret", "set", error.prefab_id, error.secret_name])
        return f"\nOr in a terminal with this server's credential, which asks for the value: {line}"

    def _run(self, tool: Tool, parameters: Json, files: Files, call: Call) -> PrefabResult:
        if call.given_up:
            raise GatewayError("The call was cancelled before it was sent.")
        call.sent = True
        prefab = (tool.prefab_id, tool.version, tool.function, parameters, files)
        if not tool.streaming:
            return self.client.run(*prefab, timeout=self.timeout)
        with self.client.run(*prefab, stream=True, timeout=self.timeout) as stream:
            call.stream = stream
            if call.given_up:  # before there was a stream to close
                stream.close()
            return self._read(stream, call)

    def _read(self, stream: EventStream, call: Call) -> PrefabResult:
        """The result of a stream's events, each of which is told as it comes."""
        events: list[StreamEvent] = []
        try:
            for event in stream:
                events.append(event)
                if event.type in ("content", "progress"):
                    call.tell(sendable(as_text(event.data)))
        except GatewayError as broken:
            result = PrefabResult.from_events(events)
            lost = failed(broken, may_have_run=True, output=result.output)
            lost.error = {**(lost.error or {}), **(result.error or {})}
            return lost
        return PrefabResult.from_events(events)

    def _upload(self, tool: Tool, arguments: Json) -> tuple[Json, Files]:
        """The parameters and files of a call: local files are uploaded first."""
        parameters: Json = {}
        files: Files = {}
        for name, value in arguments.items():
            if name not in tool.schema["properties"]:
                taken = ", ".join(tool.schema["properties"]) or "none"
                raise ValidationError(f"{tool.name} has no argument {name}. It takes: {taken}.")
            if name in tool.file_arguments:
                files[tool.file_arguments[name]] = self._urls(name, value)
            elif name in tool.file_parameters:
                urls = self._urls(name, value)
                parameters[name] = urls[0] if isinstance(value, str) else urls
            elif name != tool.any_files:
                parameters[name] = value
            elif isinstance(value, dict):
                files.update({key: self._urls(key, paths) for key, paths in value.items()})
            else:
                raise ValidationError(f"{name} must be an object: name to an array of files.")
        return parameters, files

    def _urls(self, name: str, value: Any) -> list[str]:
        paths = [value] if isinstance(value, str) else value  # models forget the brackets
        if not isinstance(paths, list) or not all(map(is_file_name, paths)):
            wanted = "an array of absolute local paths or s3:// URLs"
            raise ValidationError(f"{name} must be {wanted}, not {as_text(value)}.")
        return [self._url(path) for path in paths]

    def _url(self, path: str) -> str:
        if path.startswith("s3://"):
            return path
        return self.client.upload_input_file(Path(path).expanduser())

    def _get_file(self, name: str, s3_url: str) -> Json:
        """A file's URI: a link, or that of its copy. Else the error: the result was paid for."""
        file = {"name": name, "s3_url": s3_url}
        try:
            if not self.folder:
                return {**file, "uri": self.client.get_presigned_url(s3_url)}
            path = self._save(self.folder, s3_url)
            return {**file, "uri": path.as_uri(), "path": str(path)}
        except (GatewayError, OSError) as error:
            return {**file, "error": error_message(error)}

    def _save(self, folder: Path, s3_url: str) -> Path:
        """Downloads a file under the name that its URL ends with, numbered if that is taken."""
        name = re.sub(r"^\.*$|[\0\\:]", "_", s3_url.rpartition("/")[2])
        path, number = folder / name, 1
        with self.saving:  # one after another, so that no file takes another's place
            while path.exists():
                number += 1
                path = folder / f"{number}-{name}"
            self.client.download_file(s3_url, path)
        return path


# --- MCP ------------------------------------------------------------------------------


def make_server(prefabs: Prefabs) -> Any:
    """A server of mcp 1 or mcp 2."""
    from mcp import types
    from mcp.server.lowlevel import Server

    async def list_tools(*_: Any) -> Any:
        try:
            tools = await prefabs.list_tools()
        except GatewayError as error:
            return types.ErrorData(code=types.INTERNAL_ERROR, message=error_message(error))
        return types.ListToolsResult.model_validate({"tools": [tool.for_mcp() for tool in tools]})

    async def call_tool(context: Any, params: Any) -> Any:
        numbers = itertools.count(1)

        async def report(text: str) -> None:
            progress = (next(numbers), None, text)
            session, meta = context.session, context.meta
            if is_mcp_2:
                await session.report_progress(*progress)
            elif meta and meta.progressToken is not None:
                await session.send_progress_notification(meta.progressToken, *progress)

        answer = await prefabs.call_tool(params.name, params.arguments or {}, report)
        return types.CallToolResult.model_validate(answer)

    def for_mcp_1(handler: Callable[..., Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        async def handle(request: Any) -> Any:
            result: Any = await handler(server.request_context, request.params)
            wrap: Any = types.ServerResult
            return result if isinstance(result, types.ErrorData) else wrap(result)

        return handle

    server: Any = Server("gateway", version=gateway_sdk.__version__, instructions=INSTRUCTIONS)
    is_mcp_2 = hasattr(server, "add_request_handler")
    if is_mcp_2:
        server.add_request_handler("tools/list", types.PaginatedRequestParams, list_tools)
        server.add_request_handler("tools/call", types.CallToolRequestParams, call_tool)
    else:
        server.request_handlers[types.ListToolsRequest] = for_mcp_1(list_tools)
        server.request_handlers[types.CallToolRequest] = for_mcp_1(call_tool)
    return server


async def serve(prefabs: Prefabs, stdin: TextIO, stdout: TextIO) -> None:
    """Serves one client until it closes our stdin."""
    import anyio
    from mcp.server.stdio import stdio_server

    server = make_server(prefabs)
    lines: Any = lines_of(stdin)
    with stdout:
        async with stdio_server(lines, anyio.wrap_file(stdout)) as (read_stream, write_stream):
            await server.run(read_stream, write_stream, server.create_initialization_options())


async def lines_of(stdin: TextIO) -> AsyncIterator[str]:
    """The lines of stdin, read by daemons: one that waits for a line lets the process end."""
    while line := await in_thread(stdin.readline):
        yield line
    stdin.close()


def take_stdio() -> tuple[TextIO, TextIO]:
    """Stdin and stdout for the protocol. What else prints or reads finds stderr and nothing."""
    stdin = os.fdopen(os.dup(0), encoding="utf-8", errors="replace")
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return stdin, stdout


def describe_gateway(client: GatewayClient, *, is_own: bool, credentials: Sequence[str]) -> str:
    """Which gateway is served. `credentials`: the variables that had one before ours started."""
    if not is_own:
        return f"The gateway is {client.base_url}."
    told = f"GATEWAY_BASE_URL is not set, so the gateway is a local one, {client.base_url}."
    return " ".join([told, *(f"{name} is not used." for name in credentials)])


async def run(client: GatewayClient, options: argparse.Namespace) -> None:
    folder = Path(options.save).resolve() if options.save else None
    prefabs = Prefabs(client, options.prefab, folder, options.timeout, options.links)
    if options.list:
        print(json.dumps([tool.for_models() for tool in await prefabs.list_tools()], indent=2))
    else:
        await serve(prefabs, *take_stdio())


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    about = "Serve the prefabs of a gateway as MCP tools, on stdin and stdout."
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("--prefab", action="append", default=[], metavar="ID[@VERSION]",
        help="serve only this one; may be repeated")
    add("--save", metavar="FOLDER",
        help="download output files; default: links that hold for an hour")
    add("--links", action="store_true",
        help="give output files as link blocks, too, for clients and models that take them")
    add("--timeout", type=float, default=CALL_SECONDS,
        help="seconds of silence that end a call (%(default)s)")
    add("--list", action="store_true", help="print the tools as JSON and end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    options = parse_arguments(argv)
    if not options.list and not importlib.util.find_spec("mcp"):
        note("serving needs the package mcp: pip install mcp (CPython 3.10 or newer)")
        return 1
    credentials = [name for name in CREDENTIALS if os.environ.get(name)]
    try:
        with local_gateway.environment("agent") as own, GatewayClient.from_env() as client:
            note(describe_gateway(client, is_own=own is not None, credentials=credentials))
            asyncio.run(run(client, options))
    except KeyboardInterrupt:
        return 130
    except (GatewayError, OSError) as error:
        note(error_message(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
