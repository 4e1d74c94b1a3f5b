"""The prefabs of a gateway as tools of the Model Context Protocol, for an agent in OpenHands, Claude or an IDE.

    pip install mcp                                  # CPython 3.10 or newer; tried with mcp 1.30.0 and 2.3.0
    python examples/mcp_server.py                    # serves on stdin and stdout: an MCP client starts it
    python examples/mcp_server.py --prefab text-tools --prefab file-tools@1.0.0 --save downloads
    python examples/mcp_server.py --list             # prints the tools and ends; does without `mcp`

The gateway is that of GATEWAY_BASE_URL, and the credential is in the environment, as for
`GatewayClient.from_env()`; without GATEWAY_BASE_URL it starts a local gateway. Every function of
the newest deployed version of every prefab is a tool, unless `--prefab` names the ones to serve.

`--list` prints what the parameter `tools` of the Chat Completions API takes, and with it most APIs
of language models: `[{"type": "function", "function": {"name", "description", "parameters"}}]`.

Each call runs in a thread of its own. Cancelling it closes its stream. A call that does not stream
cannot be taken back: its answer is dropped when it comes.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where gateway_sdk.py is

import local_gateway

import gateway_sdk
from gateway_sdk import (
    CallStatus,
    EventStream,
    GatewayClient,
    GatewayError,
    MissingSecretError,
    PrefabResult,
    StreamEventType,
    ValidationError,
)

CALL_SECONDS = 600.0  # functions take minutes, and an agent that has enough of one can cancel it
SPECS_AT_ONCE = 8
MAX_DESCRIPTION_CHARACTERS = 1024  # the limit of some APIs of language models
MAX_DEPTH = 100  # of what is sent: `mcp` fails where objects are nested about twice as deep

Json = dict[str, Any]


# --- Texts ----------------------------------------------------------------------------------------


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


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def error_message(error: Exception) -> str:
    """What a user is told of an error."""
    message = error.message if isinstance(error, GatewayError) else f"{type(error).__name__}: {error}"
    if isinstance(error, MissingSecretError):
        command = [sys.executable, str(gateway_sdk.__file__), "secret", "set", error.prefab_id, error.secret_name]
        message += f"\nOr in a terminal, which asks for the value: {shlex.join(command)}"
    return str(sendable(message))


# --- Schemas --------------------------------------------------------------------------------------

# What manifests call the types, and what JSON Schema calls them.
JSON_TYPES: Mapping[str, str] = {
    **{name: name for name in ("string", "integer", "number", "boolean", "array", "object", "null")},
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object",
    "InputFile": "string", "OutputFile": "string",
}
KEPT_KEYWORDS = ("description", "enum", "default", "format", "pattern", "minimum", "maximum", "minLength", "maxLength",
                 "minItems", "maxItems")


def schema_of(entry: Json) -> Json:
    """The JSON Schema of a manifest's parameter, or of what is nested in one."""
    schema = {keyword: entry[keyword] for keyword in KEPT_KEYWORDS if entry.get(keyword) is not None}
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
    return schema


def object_schema(fields: Mapping[str, Json], *, default_required: bool) -> Json:
    """The JSON Schema of an object with these fields, each of which may say whether it is `required`."""
    schema: Json = {"type": "object", "properties": {name: schema_of(field) for name, field in fields.items()}}
    required = []
    for name, field in fields.items():
        says = field.get("required")  # of an object, it may also be the list of what is required in it
        if says is True or (not isinstance(says, bool) and default_required and "default" not in field):
            required.append(name)
    if required:
        schema["required"] = required
    return schema


def is_file(entry: Json, kind: str) -> bool:
    """Whether an entry stands for a file, or for an array of files, of this kind."""
    return kind in (entry.get("type"), (entry.get("items") or {}).get("type"))


# --- Tools ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tool:
    """A function of a prefab, as a language model sees it and as it is called."""

    name: str
    description: str
    schema: Json  # of its arguments
    prefab_id: str
    version: str
    function: str
    streaming: bool
    file_parameters: list[str]  # whose value is the URL of a file, or an array of them
    output_fields: list[str]  # of the function's result, which are URLs of files
    file_arguments: dict[str, str] = dataclasses.field(default_factory=dict)  # to the name in the call's `files`
    any_files: str = ""  # the argument for files by name, where only the description speaks of files


def tool_name(prefab_id: str, function: str, version: str = "") -> str:
    """A name that depends on nothing but the arguments, and that nothing else gets.

    What does not fit into `prefab__function` is cut and has a digest, but no `__`, at its end.
    """
    plain = f"{prefab_id}__{function}"
    fits = re.fullmatch("[A-Za-z0-9_-]{1,64}", plain) and plain.split("__") == [prefab_id, function]
    if fits and not version:
        return plain
    digest = hashlib.sha256(json.dumps([prefab_id, function, version]).encode()).hexdigest()[:10]
    words = re.sub("[^A-Za-z0-9-]+", "_", f"{prefab_id}_{version}_{function}").strip("_")
    return f"{words[:53].rstrip('_')}_{digest}"


def make_tool(spec: Json, function: Json, *, pinned: bool) -> Tool:
    prefab_id, version, name = spec["id"], spec["version"], function["name"]
    about = f"{function.get('description') or name}\n\nPrefab {prefab_id} {version}. {spec.get('description') or ''}"
    parameters = {entry["name"]: entry for entry in function.get("parameters") or ()}
    returned = (function.get("returns") or {}).get("properties") or {}
    schema = {**object_schema(parameters, default_required=True), "additionalProperties": False}
    tool = Tool(
        tool_name(prefab_id, name, version if pinned else ""), about.strip()[:MAX_DESCRIPTION_CHARACTERS], schema,
        prefab_id, version, name, streaming=bool(function.get("streaming")),
        file_parameters=[key for key, entry in parameters.items() if is_file(entry, "InputFile")],
        output_fields=[key for key, entry in returned.items() if is_file(entry, "OutputFile")],
    )
    for key in tool.file_parameters:
        add_hint(schema["properties"][key])
    add_files(tool, function.get("files"))
    return tool


def add_files(tool: Tool, files: Mapping[str, Json] | None) -> None:
    """Adds an argument for each of the spec's input files."""
    properties = tool.schema["properties"]
    for key, entry in (files or {}).items():
        if not is_file(entry, "OutputFile"):
            argument = f"{key}_files" if key in properties else key
            properties[argument] = schema_of({**entry, "type": "array", "items": {"type": "InputFile"}})
            add_hint(properties[argument])
            tool.file_arguments[argument] = key
            if entry.get("required"):
                tool.schema.setdefault("required", []).append(argument)
    if files is None and not tool.file_parameters and re.search("file|文件", tool.description, re.I):
        tool.any_files = "input_files" if "files" in properties else "files"
        lists = {"type": "array", "items": {"type": "string"}}
        properties[tool.any_files] = {"type": "object", "additionalProperties": lists,
                                      "description": "Input files by name, if the function takes any."}
        add_hint(properties[tool.any_files])


def add_hint(schema: Json) -> None:
    hint = "A file is a local path, which is uploaded first, or an s3:// URL."
    schema["description"] = f"{schema.get('description') or ''} {hint}".strip()


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function gives, run in a thread of its own. It is a daemon: the process does not wait for it."""
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
    outcome.set_running_or_notify_cancel()  # from now on nobody but the thread settles it

    def run() -> None:
        try:
            outcome.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where it is waited for
            outcome.set_exception(error)

    threading.Thread(target=run, name=f"mcp_server {function.__name__}", daemon=True).start()
    return await asyncio.wrap_future(outcome)


async def load_tools(client: GatewayClient, wanted: Sequence[str]) -> dict[str, Tool]:
    """The tools by name. A prefab whose spec is no use is left out, unless it was asked for."""
    turns = asyncio.Semaphore(SPECS_AT_ONCE)

    async def load(prefab: str) -> list[Tool]:
        prefab_id, _, version = prefab.partition("@")
        try:
            async with turns:
                spec = sendable(await in_thread(client.get_prefab_spec, prefab_id, version or None))
            if is_deep(spec):
                raise ValueError("its spec is nested too deeply")
            return [make_tool(spec, function, pinned=version != "") for function in spec["functions"]]
        except Exception as error:  # whatever a spec is like, it must not cost the other prefabs
            if wanted:
                raise GatewayError(f"{prefab}: {error_message(error)}") from error
            note(f"left out: {prefab}: {error_message(error)}")
            return []

    prefabs: Iterable[str] = wanted
    if not wanted:
        deployed = await in_thread(client.list_prefabs, "deployed")
        prefabs = sorted({prefab.prefab_id for prefab in deployed})
    loaded = await asyncio.gather(*map(load, dict.fromkeys(prefabs)))
    return {tool.name: tool for tools in loaded for tool in tools}


# --- Results --------------------------------------------------------------------------------------


def as_block(value: Any) -> Json:
    return {"type": "text", "text": as_text(value)}


def make_answer(value: Any, files: Sequence[Json] = (), problem: str = "") -> Json:
    """What MCP gives as the result of a call: text blocks, structured content, and links to files."""
    structured = value if isinstance(value, dict) else {"result": value}
    content = [as_block(value)]
    if problem:
        content = [as_block(problem), as_block(value)] if value else [as_block(problem)]
    if files:
        structured = {**structured, "output_files": files}
        content.append(as_block({"output_files": files}))
        content += [as_link(file) for file in files if "uri" in file]
    answer = {"content": content, "isError": bool(problem)}
    if (value or not problem) and not is_deep(structured):  # the text has it anyway
        answer["structuredContent"] = structured
    return dict(sendable(answer))


def as_link(file: Json) -> Json:
    return {"type": "resource_link", "name": file["s3_url"].rpartition("/")[2], "uri": file["uri"],
            "description": f"Output file {file['name']}: {file['s3_url']}"}


def problem_of(result: PrefabResult) -> str:
    """Why a call failed, or why its function says that it did; nothing if all went well."""
    value = result.get_function_result()
    if not result.is_success():
        error = result.error or {}
        return as_text(error.get("message") or error or f"The call ended as {result.status}.")
    if not isinstance(value, dict) or value.get("success") is not False:
        return ""
    message = as_text(value.get("error") or value.get("message") or "The function reports a failure.")
    return f"{message} ({value['error_code']})" if value.get("error_code") else message


def new_path(folder: Path, s3_url: str) -> Path:
    """An empty file of its own in the folder, named as the URL ends, and numbered where there is such a file."""
    name = re.sub(r"^\.*$|[\0\\:]", "_", s3_url.rpartition("/")[2])
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / name, 1
    while True:
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
            path = folder / f"{number}-{name}"
        else:
            return path


# --- Calls ----------------------------------------------------------------------------------------

Report = Callable[[int, str], Awaitable[None]]  # number and text of an event


class UnknownToolError(Exception):
    """There is no such tool."""


class Prefabs:
    """The tools of a gateway, and their calls: all that is not MCP."""

    def __init__(self, client: GatewayClient, wanted: Sequence[str] = (), folder: str | None = None,
                 timeout: float = CALL_SECONDS) -> None:
        self._client = client
        self._wanted = wanted
        self._folder = Path(folder).resolve() if folder else None
        self._timeout = timeout
        self._tools: dict[str, Tool] = {}

    async def list_tools(self) -> list[Tool]:
        """The tools as they are now."""
        self._tools = await load_tools(self._client, self._wanted)
        return list(self._tools.values())

    async def call_tool(self, name: str, arguments: Json, report: Report) -> Json:
        """The answer of a tool. The events of a stream are reported as they come."""
        if name not in self._tools:
            await self.list_tools()
        if name not in self._tools:
            raise UnknownToolError(f"Unknown tool: {name}")
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[str | None] = asyncio.Queue()
        call = Call(self._client, self._tools[name], self._folder, self._timeout,
                    on_event=lambda text: loop.call_soon_threadsafe(events.put_nowait, text))
        task = asyncio.ensure_future(in_thread(call.run, arguments))
        task.add_done_callback(lambda _: events.put_nowait(None))
        number = 0
        try:
            while (text := await events.get()) is not None:
                number += 1
                await report(number, sendable(text))
            return dict(task.result())
        finally:  # also if the client cancels the call or goes away
            call.cancel()
            task.cancel()


@dataclasses.dataclass
class Call:
    """One call: runs in a thread, and may be cancelled by another."""

    client: GatewayClient
    tool: Tool
    folder: Path | None  # for output files
    timeout: float
    on_event: Callable[[str], object]
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    stream: EventStream | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """Closes the stream; nothing more is sent. No harm to a call that has ended."""
        with self.lock:
            self.cancelled = True
            if self.stream:
                self.stream.close()

    def run(self, arguments: Json) -> Json:
        """The answer. Never raises: whatever goes wrong is the answer."""
        try:
            self._check(arguments)
            result = self._send(arguments)
            value, problem = result.get_function_result(), problem_of(result)
            files = [self._get_file(name, url) for name, url in self._output_urls(result)]
            return make_answer(value, files, problem)
        except Exception as error:  # noqa: BLE001 - it must not cost the other calls
            return make_answer(None, problem=error_message(error))

    def _check(self, arguments: Json) -> None:
        name, schema = self.tool.name, self.tool.schema
        missing = [key for key in schema.get("required", ()) if key not in arguments]
        unknown = [key for key in arguments if key not in schema["properties"]]
        if missing:
            raise ValidationError(f"{name} needs the argument {', '.join(missing)}.")
        if unknown:
            taken = ", ".join(schema["properties"]) or "none"
            raise ValidationError(f"{name} has no argument {', '.join(unknown)}. It takes: {taken}.")

    def _send(self, arguments: Json) -> PrefabResult:
        parameters, files = self._upload(arguments)
        if self.cancelled:
            raise GatewayError("Cancelled before it was sent.")
        call = (self.tool.prefab_id, self.tool.version, self.tool.function, parameters, files)
        if self.tool.streaming:
            return self._read(self.client.run(*call, stream=True, timeout=self.timeout))
        return self.client.run(*call, timeout=self.timeout)

    def _upload(self, arguments: Json) -> tuple[Json, dict[str, list[str]]]:
        """The parameters and files of the call: local files are uploaded first."""
        parameters: Json = {}
        files: dict[str, list[str]] = {}
        for name, value in arguments.items():
            if name in self.tool.file_arguments:
                files[self.tool.file_arguments[name]] = self._urls(name, value)
            elif name in self.tool.file_parameters:
                urls = self._urls(name, value)
                parameters[name] = urls[0] if isinstance(value, str) else urls
            elif name != self.tool.any_files:
                parameters[name] = value
            elif isinstance(value, dict):
                files.update({key: self._urls(key, paths) for key, paths in value.items()})
            else:
                raise ValidationError(f"{name} must be an object: name to an array of files.")
        return parameters, files

    def _urls(self, name: str, value: Any) -> list[str]:
        paths = [value] if isinstance(value, str) else value  # models forget the brackets
        is_list = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        if not is_list or any("://" in path and not path.startswith("s3://") for path in paths):
            raise ValidationError(f"{name} must be an array of local paths or s3:// URLs, not {as_text(value)}.")
        return [path if path.startswith("s3://") else self.client.upload_input_file(Path(path).expanduser())
                for path in paths]

    def _read(self, stream: EventStream) -> PrefabResult:
        """The result of a stream's events, each of which is reported as it comes."""
        contents: list[Any] = []
        error: Json | None = None
        last: Any = None
        with self.lock:
            self.stream = stream
            if self.cancelled:
                stream.close()
        try:
            with stream:
                for event in stream:
                    if event.type in (StreamEventType.CONTENT, StreamEventType.PROGRESS):
                        self.on_event(as_text(event.data))
                    if event.type == StreamEventType.CONTENT:
                        contents.append(event.data)
                    elif event.type == StreamEventType.ERROR:
                        error = event.data if isinstance(event.data, dict) else {"message": event.data}
                    elif event.type == StreamEventType.DONE:
                        last = event.data
        except GatewayError as broken:
            error = {"message": broken.message}
        files = last.pop("files", None) if isinstance(last, dict) else None
        value: Any = "".join(contents) if all(isinstance(content, str) for content in contents) else contents
        if not contents and isinstance(last, dict):
            value = last
        status = CallStatus.SUCCESS if error is None else CallStatus.FAILED
        return PrefabResult(status, {"status": str(status), "output": value, "files": files}, error)

    def _output_urls(self, result: PrefabResult) -> list[tuple[str, str]]:
        """Names and `s3://` URLs of the output files. Older gateways put them into the function's result."""
        found = [(name, url) for name, urls in result.get_files().items() for url in urls]
        value = result.get_function_result()
        if isinstance(value, dict):
            found += [(name, value[name]) for name in self.tool.output_fields
                      if str(value.get(name)).startswith("s3://")]
        return found

    def _get_file(self, name: str, s3_url: str) -> Json:
        """A file's URI: a link, or that of its copy. If there is none, the error: the result was paid for."""
        file = {"name": name, "s3_url": s3_url}
        try:
            if not self.folder:
                return {**file, "uri": self.client.get_presigned_url(s3_url)}
            path = new_path(self.folder, s3_url)
            try:
                self.client.download_file(s3_url, path)
            except BaseException:
                path.unlink()
                raise
            return {**file, "uri": path.as_uri(), "path": str(path)}
        except (GatewayError, OSError) as error:
            return {**file, "error": error_message(error)}


# --- MCP ------------------------------------------------------------------------------------------


def make_server(prefabs: Prefabs) -> Any:
    """A server of mcp 1 or mcp 2. What their handlers are given and give differs; what they do is the same."""
    from mcp import types
    from mcp.server.lowlevel import Server

    async def list_tools() -> Any:
        try:
            tools = await prefabs.list_tools()
        except (GatewayError, OSError) as error:
            return types.ErrorData(code=types.INTERNAL_ERROR, message=error_message(error))
        shown = [{"name": tool.name, "description": tool.description, "inputSchema": tool.schema} for tool in tools]
        return types.ListToolsResult.model_validate({"tools": shown})

    async def call_tool(params: Any, report: Report) -> Any:
        try:
            answer = await prefabs.call_tool(params.name, params.arguments or {}, report)
        except UnknownToolError as error:
            return types.ErrorData(code=types.INVALID_PARAMS, message=str(error))
        except (GatewayError, OSError) as error:
            answer = make_answer(None, problem=error_message(error))
        return types.CallToolResult.model_validate(answer)

    # mcp 2

    async def call_tool_2(context: Any, params: Any) -> Any:
        return await call_tool(params, lambda n, text: context.session.report_progress(n, None, text))

    # mcp 1

    async def call_tool_1(request: Any) -> Any:
        context = server.request_context
        token = context.meta.progressToken if context.meta else None

        async def report(number: int, text: str) -> None:
            if token is not None:
                await context.session.send_progress_notification(token, number, None, text)

        return wrapped(await call_tool(request.params, report))

    async def list_tools_1(_: Any) -> Any:
        return wrapped(await list_tools())

    def wrapped(result: Any) -> Any:
        wrap: Any = types.ServerResult
        return result if isinstance(result, types.ErrorData) else wrap(result)

    server: Any = Server("gateway", version=gateway_sdk.__version__)
    if hasattr(server, "add_request_handler"):
        server.add_request_handler("tools/list", types.PaginatedRequestParams, lambda *_: list_tools())
        server.add_request_handler("tools/call", types.CallToolRequestParams, call_tool_2)
    else:
        server.request_handlers.update({types.ListToolsRequest: list_tools_1, types.CallToolRequest: call_tool_1})
    return server


async def serve(prefabs: Prefabs, stdin: TextIO, stdout: TextIO) -> None:
    """Serves one client until it closes our stdin, or until a signal cancels this task."""
    import anyio
    from mcp.server.stdio import stdio_server

    server = make_server(prefabs)
    this_task: Any = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # on Windows
            asyncio.get_running_loop().add_signal_handler(number, this_task.cancel)
    lines: Any = lines_of(stdin)
    with stdout:
        async with stdio_server(lines, anyio.wrap_file(stdout)) as (read_stream, write_stream):
            await server.run(read_stream, write_stream, server.create_initialization_options())


async def lines_of(stdin: TextIO) -> AsyncIterator[str]:
    """The lines of stdin, read by a daemon: a thread that waits for a line must not keep the process from ending."""
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[str] = asyncio.Queue()

    def read() -> None:
        with stdin, contextlib.suppress(RuntimeError):  # the loop is closed
            for line in stdin:
                loop.call_soon_threadsafe(lines.put_nowait, line)
            loop.call_soon_threadsafe(lines.put_nowait, "")

    threading.Thread(target=read, name="mcp_server stdin", daemon=True).start()
    while line := await lines.get():
        yield line


def take_stdio() -> tuple[TextIO, TextIO]:
    """Stdin and stdout for the protocol. Whatever else prints or reads finds stderr and nothing there."""
    stdin = os.fdopen(os.dup(0), encoding="utf-8", errors="replace")
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return stdin, stdout


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Serve the prefabs of a gateway as MCP tools, on stdin and stdout.")
    add = parser.add_argument
    add("--prefab", action="append", default=[], metavar="ID[@VERSION]", help="serve only this one; may be repeated")
    add("--save", metavar="FOLDER", help="download output files; default: links that hold for an hour")
    add("--timeout", type=float, default=CALL_SECONDS, help="seconds of silence that end a call (%(default)s)")
    add("--list", action="store_true", help="print the tools as JSON and end")
    options = parser.parse_args(argv)
    if not options.list and not importlib.util.find_spec("mcp"):
        note("serving needs the package mcp: pip install mcp (CPython 3.10 or newer)")
        return 1
    try:
        with local_gateway.environment("agent"), GatewayClient.from_env() as client:
            prefabs = Prefabs(client, options.prefab, options.save, options.timeout)
            if options.list:
                functions = [{"name": tool.name, "description": tool.description, "parameters": tool.schema}
                             for tool in asyncio.run(prefabs.list_tools())]
                tools = [{"type": "function", "function": function} for function in functions]
                print(json.dumps(tools, indent=2))
            else:
                asyncio.run(serve(prefabs, *take_stdio()))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    except BrokenPipeError:  # the client is gone
        return 0
    except (GatewayError, OSError) as error:
        note(error_message(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
