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

Calls run side by side, in threads. Cancelling one closes its stream. A call that does not stream
cannot be taken back: its answer is dropped when it comes.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where gateway_sdk.py is

import local_gateway

import gateway_sdk
from gateway_sdk import EventStream, GatewayClient, GatewayError, MissingSecretError, PrefabResult, ValidationError

CALL_SECONDS = 600.0  # functions take minutes, and an agent that has enough of one can cancel it
SPECS_AT_ONCE = 8
MAX_DESCRIPTION_CHARACTERS = 1024  # the limit of some APIs of language models
MAX_DEPTH = 100  # of what is sent: `mcp` fails where objects are nested about twice as deep
FILE_HINT = "A file is a local path, which is uploaded first, or an s3:// URL."

Json = dict[str, Any]
Report = Callable[[str], Awaitable[None]]  # takes the text of an event


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


# --- Tools ----------------------------------------------------------------------------------------

# What manifests call the types, and what JSON Schema calls them.
JSON_TYPES = {
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


def object_schema(fields: dict[str, Json], *, default_required: bool) -> Json:
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
    file_arguments: dict[str, str] = dataclasses.field(default_factory=dict)  # to the name in the call's `files`
    any_files: str = ""  # the argument for files by name, where only the description speaks of files


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
    about = f"{function.get('description') or name}\n\nPrefab {prefab_id} {version}. {spec.get('description') or ''}"
    parameters = {entry["name"]: entry for entry in function.get("parameters") or ()}
    tool = Tool(
        tool_name(prefab_id, name, version if pinned else ""), about.strip()[:MAX_DESCRIPTION_CHARACTERS],
        {**object_schema(parameters, default_required=True), "additionalProperties": False},
        prefab_id, version, name, streaming=bool(function.get("streaming")),
        file_parameters=[key for key, entry in parameters.items() if is_file(entry, "InputFile")],
    )
    add_file_arguments(tool, function.get("files"))
    return tool


def add_file_arguments(tool: Tool, files: dict[str, Json] | None) -> None:
    """Adds an argument for each input file of the spec, and says of all that take files what a file is."""
    properties = tool.schema["properties"]
    for key, entry in (files or {}).items():
        if not is_file(entry, "OutputFile"):
            argument = f"{key}_files" if key in properties else key
            properties[argument] = schema_of({**entry, "type": "array", "items": {"type": "InputFile"}})
            tool.file_arguments[argument] = key
            if entry.get("required"):
                tool.schema.setdefault("required", []).append(argument)
    if files is None and not tool.file_parameters and re.search("file|文件", tool.description, re.I):
        tool.any_files = "input_files" if "files" in properties else "files"
        lists = {"type": "array", "items": {"type": "string"}}
        properties[tool.any_files] = {"type": "object", "additionalProperties": lists,
                                      "description": "Input files by name, if the function takes any."}
    for argument in filter(None, [*tool.file_parameters, *tool.file_arguments, tool.any_files]):
        description = properties[argument].get("description", "")
        properties[argument]["description"] = f"{description} {FILE_HINT}".strip()


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function gives, run in a thread of its own. It is a daemon: the process does not wait for it."""
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
    outcome.set_running_or_notify_cancel()  # from now on nobody but the thread settles it

    def run() -> None:
        try:
            outcome.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where it is waited for
            outcome.set_exception(error)

    threading.Thread(target=run, name="mcp_server", daemon=True).start()
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


# --- Calls ----------------------------------------------------------------------------------------


def make_answer(value: Any, files: Sequence[Json] = (), problem: str = "") -> Json:
    """What MCP gives as the result of a call: text blocks, structured content, and links to files."""
    texts = [problem] if problem else []
    structured = value if isinstance(value, dict) else {"result": value}
    if value or not problem:
        texts.append(as_text(value))
    if files:
        texts.append(as_text({"output_files": files}))
        structured = {**structured, "output_files": files}
    content: list[Json] = [{"type": "text", "text": text} for text in texts]
    for file in files:
        if "uri" in file:
            about = f"Output file {file['name']}: {file['s3_url']}"
            name = file["s3_url"].rpartition("/")[2]
            content.append({"type": "resource_link", "name": name, "uri": file["uri"], "description": about})
    answer = {"content": content, "isError": bool(problem)}
    if (value or not problem) and not is_deep(structured):  # the text has it anyway
        answer["structuredContent"] = structured
    return dict(sendable(answer))


def problem_of(result: PrefabResult) -> str:
    """Why a call failed, or why its function says that it did; nothing if all went well."""
    if not result.is_success():
        error = result.error or {}
        return as_text(error.get("message") or error or f"The call ended as {result.status}.")
    value = result.get_function_result()
    if not isinstance(value, dict) or value.get("success") is not False:
        return ""
    message = as_text(value.get("error") or value.get("message") or "The function reports a failure.")
    return f"{message} ({value['error_code']})" if value.get("error_code") else message


async def read_stream(stream: EventStream, report: Report) -> PrefabResult:
    """The result of a stream's events, each of which is reported as it comes."""
    contents: list[Any] = []
    error: Json | None = None
    last: Json = {}
    with stream:  # if the client cancels the call, closing the stream ends the thread's wait for an event
        try:
            while event := await in_thread(next, stream, None):
                if event.type in ("content", "progress"):
                    await report(sendable(as_text(event.data)))
                if event.type == "content":
                    contents.append(event.data)
                elif event.type == "error":
                    error = event.data if isinstance(event.data, dict) else {"message": event.data}
                elif event.type == "done" and isinstance(event.data, dict):
                    last = event.data
        except GatewayError as broken:
            error = {"message": broken.message}
    files = last.pop("files", None)
    value: Any = contents
    if last and not contents:
        value = last
    elif all(isinstance(content, str) for content in contents):
        value = "".join(contents)
    status = "SUCCESS" if error is None else "FAILED"
    return PrefabResult(status, {"status": status, "output": value, "files": files}, error)


@dataclasses.dataclass
class Prefabs:
    """The tools of a gateway, and their calls: all that is not MCP."""

    client: GatewayClient
    wanted: Sequence[str] = ()  # all if there are none
    folder: Path | None = None  # for output files
    timeout: float = CALL_SECONDS
    tools: dict[str, Tool] = dataclasses.field(default_factory=dict)
    saving: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    async def list_tools(self) -> list[Tool]:
        """The tools as they are now."""
        self.tools = await load_tools(self.client, self.wanted)
        return list(self.tools.values())

    async def call_tool(self, name: str, arguments: Json, report: Report) -> Json:
        """The answer of a tool. Whatever goes wrong is an answer too."""
        try:
            if name not in self.tools:
                await self.list_tools()
            if name not in self.tools:
                raise ValidationError(f"Unknown tool: {name}")
            tool = self.tools[name]
            parameters, files = await in_thread(self._upload, tool, arguments)
            run = partial(self.client.run, stream=tool.streaming, timeout=self.timeout)
            result = await in_thread(run, tool.prefab_id, tool.version, tool.function, parameters, files)
            if tool.streaming:  # a stream that nobody waits for any more closes itself
                result = await read_stream(result, report)
            return dict(await in_thread(self._answer, result))
        except Exception as error:  # noqa: BLE001 - it must not cost the other calls
            return make_answer(None, problem=error_message(error))

    def _upload(self, tool: Tool, arguments: Json) -> tuple[Json, dict[str, list[str]]]:
        """The parameters and files of a call: local files are uploaded first."""
        parameters: Json = {}
        files: dict[str, list[str]] = {}
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
        is_list = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        if not is_list or any("://" in path and not path.startswith("s3://") for path in paths):
            raise ValidationError(f"{name} must be an array of local paths or s3:// URLs, not {as_text(value)}.")
        return [path if path.startswith("s3://") else self.client.upload_input_file(Path(path).expanduser())
                for path in paths]

    def _answer(self, result: PrefabResult) -> Json:
        files = [self._get_file(name, url) for name, urls in result.get_files().items() for url in urls]
        return make_answer(result.get_function_result(), files, problem_of(result))

    def _get_file(self, name: str, s3_url: str) -> Json:
        """A file's URI: a link, or that of its copy. If there is none, the error: the result was paid for."""
        file = {"name": name, "s3_url": s3_url}
        try:
            if not self.folder:
                return {**file, "uri": self.client.get_presigned_url(s3_url)}
            path = self._save(self.folder, s3_url)
            return {**file, "uri": path.as_uri(), "path": str(path)}
        except (GatewayError, OSError) as error:
            return {**file, "error": error_message(error)}

    def _save(self, folder: Path, s3_url: str) -> Path:
        """Downloads a file under the name that its URL ends with, numbered where there is such a file."""
        name = re.sub(r"^\.*$|[\0\\:]", "_", s3_url.rpartition("/")[2])
        path, number = folder / name, 1
        with self.saving:  # one after another, so that no file takes another's place
            while path.exists():
                number += 1
                path = folder / f"{number}-{name}"
            self.client.download_file(s3_url, path)
        return path


# --- MCP ------------------------------------------------------------------------------------------


def make_server(prefabs: Prefabs) -> Any:
    """A server of mcp 1 or mcp 2."""
    from mcp import types
    from mcp.server.lowlevel import Server

    async def list_tools(*_: Any) -> Any:
        try:
            tools = await prefabs.list_tools()
        except GatewayError as error:
            return types.ErrorData(code=types.INTERNAL_ERROR, message=error_message(error))
        shown = [{"name": tool.name, "description": tool.description, "inputSchema": tool.schema} for tool in tools]
        return types.ListToolsResult.model_validate({"tools": shown})

    async def call_tool(context: Any, params: Any) -> Any:
        numbers = itertools.count(1)

        async def report(text: str) -> None:
            progress = (next(numbers), None, text)
            if is_mcp_2:
                await context.session.report_progress(*progress)
            elif context.meta and context.meta.progressToken is not None:
                await context.session.send_progress_notification(context.meta.progressToken, *progress)

        answer = await prefabs.call_tool(params.name, params.arguments or {}, report)
        return types.CallToolResult.model_validate(answer)

    def for_mcp_1(handler: Callable[..., Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        async def handle(request: Any) -> Any:
            result: Any = await handler(server.request_context, request.params)
            wrap: Any = types.ServerResult
            return result if isinstance(result, types.ErrorData) else wrap(result)

        return handle

    server: Any = Server("gateway", version=gateway_sdk.__version__)
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
    """The lines of stdin, read by daemons: a thread that waits for a line must not keep the process from ending."""
    while line := await in_thread(stdin.readline):
        yield line
    stdin.close()


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
    folder = Path(options.save).resolve() if options.save else None
    try:
        with local_gateway.environment("agent"), GatewayClient.from_env() as client:
            prefabs = Prefabs(client, options.prefab, folder, options.timeout)
            if options.list:
                functions = [{"name": tool.name, "description": tool.description, "parameters": tool.schema}
                             for tool in asyncio.run(prefabs.list_tools())]
                print(json.dumps([{"type": "function", "function": function} for function in functions], indent=2))
            else:
                asyncio.run(serve(prefabs, *take_stdio()))
    except KeyboardInterrupt:
        return 130
    except (GatewayError, OSError) as error:
        note(error_message(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
