"""Tests of `mcp_server.py`: its tools, its calls without MCP, then all over stdio with `mcp`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import json
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mcp_server
import pytest
from conftest import EXAMPLES, Gated, len_of, wait_for
from local_gateway import LocalGateway

from gateway_sdk import GatewayClient, GatewayError
from test_gateway_sdk import (
    NO_BODY,
    READMES,
    ROOT,
    S3,
    WAIT_SECONDS,
    Ended,
    HangUp,
    Script,
    Steps,
    answer,
    chunked,
    client_of,
    environment_for,
    event,
    link,
    posix,
    ran,
)

needs_mcp = pytest.mark.skipif(not importlib.util.find_spec("mcp"), reason="needs mcp")

START_SECONDS = 60.0  # a slow machine takes long for the import of `mcp`

# A spec as prefabs publish it, and the schema of its tool.
MERGE_SPEC = {"id": "papers", "version": "0.2.0", "description": "Works on papers", "functions": [{
    "name": "merge",
    "description": "Merge papers",
    "parameters": [
        {"name": "title", "type": "str", "description": "Of the whole", "required": True},
        {"name": "style", "type": "string", "enum": ["plain", "bold"], "default": "plain",
         "required": False},
        {"name": "page", "type": "object", "required": False, "properties": {
            "size": {"type": "string", "required": True},
            "margins": {"type": "array", "items": {"type": "float"}}}},
        {"name": "clip", "type": "InputFile", "required": False},  # as older specs have it
        {"name": "clips", "type": "array", "items": {"type": "InputFile"}, "required": False},
    ],
    "files": {
        "papers": {"type": "array", "items": {"type": "InputFile"}, "minItems": 1,
                   "required": True},
        "title": {"type": "InputFile", "description": "A picture for the title page"},
        "merged": {"type": "array", "items": {"type": "OutputFile"}},
    },
}]}
STRINGS = {"type": "array", "items": {"type": "string"}}
MERGE_SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "description": "Of the whole"},
        "style": {"type": "string", "enum": ["plain", "bold"], "default": "plain",
                  "description": 'One of ["plain", "bold"]. Default: "plain".'},
        "page": {"type": "object", "required": ["size"],
                 "description": "Field size: string. Field margins: array.",
                 "properties": {
                     "size": {"type": "string"},
                     "margins": {"type": "array", "items": {"type": "number"}}}},
        "clip": {"type": "string", "description": mcp_server.FILE_HINT},
        "clips": {**STRINGS, "description": mcp_server.FILE_HINT},
        "papers": {**STRINGS, "minItems": 1,
                   "description": f"Items, at least: 1. {mcp_server.FILE_HINT}"},
        "title_files": {**STRINGS,
                        "description": f"A picture for the title page {mcp_server.FILE_HINT}"},
    },
    "required": ["title", "papers"],
    "additionalProperties": False,
}


def call_tool(
    gateway: Any, prefab: str, name: str, arguments: Any = None, report: Any = None, **options: Any
) -> Any:
    """Calls a tool in this process: all but MCP itself. `report` is given the texts of events."""
    async def call(client: GatewayClient) -> Any:
        async def tell(text: str) -> None:
            if report:
                report(text)

        prefabs = mcp_server.Prefabs(client, [prefab], **options)
        return await prefabs.call_tool(name, arguments or {}, tell)

    with client_of(gateway) as client:
        return asyncio.run(call(client))


def stream_of(*events: bytes, end: Any = None) -> Script:
    """A gateway whose function `f` of the prefab `p@1.0.0` streams these events, and then ends."""
    spec = {"id": "p", "version": "1.0.0", "functions": [{"name": "f", "streaming": True}]}
    return Script(
        answer(spec),
        HangUp(chunked(*events, end=False)) if end == "cut short" else chunked(*events),
    )


STREAMED = ("p@1.0.0", mcp_server.tool_name("p", "f", "1.0.0"))


def tools_of(gateway: LocalGateway | Script, *wanted: str) -> dict[str, mcp_server.Tool]:
    with client_of(gateway) as client:
        return asyncio.run(mcp_server.load_tools(client, wanted))


def texts_of(result: dict[str, Any]) -> list[str]:
    return [block["text"] for block in result["content"] if block["type"] == "text"]


# Names and schemas

FUNCTIONS = [
    ("text-tools", "words"), ("text-tools", "_words"), ("text-tools_", "words"), ("a__b", "c"),
    ("a", "b__c"),
    ("a_b", "c"), ("a", "b_c"), ("a.b", "c"), ("a b", "c"), ("a", "b.c"), ("数据", "查询"),
    ("数据", "查找"), ("", "a"),
    ("long" * 20, "function"), ("long" * 20, "other"), ("x" * 30, "y" * 32), ("x" * 30, "y" * 33),
    ("A", "b"), ("a", "B"),
]


def test_tools_have_names_that_are_unique_and_that_every_model_takes() -> None:
    versions = ("", "1.0.0", "1_0_0", "1.0.1")
    names = [mcp_server.tool_name(*pair, version) for pair in FUNCTIONS for version in versions]
    assert len(set(names)) == len(FUNCTIONS) * len(versions) > 50
    assert [name for name in names if not re.fullmatch("[A-Za-z0-9_-]{1,64}", name)] == []
    assert names[0] == "text-tools__words"


def test_a_tool_keeps_its_name_when_other_prefabs_come_and_versions_go() -> None:
    with LocalGateway() as gateway:
        before = set(tools_of(gateway))
        gateway.add_prefab("text_tools", "1.0.0", {"words": len_of, "wörds": len_of})
        gateway.add_prefab("text-tools", "2.0.0", {"words": len_of})
        after = tools_of(gateway)
    assert before - set(after) == {"text-tools__statistics", "text-tools__echo", "text-tools__find"}
    assert after["text-tools__words"].version == "2.0.0"
    assert after["text_tools__words"].prefab_id == "text_tools"


def test_the_schema_has_all_that_a_spec_says() -> None:
    tool = mcp_server.make_tool(MERGE_SPEC, MERGE_SPEC["functions"][0], pinned=False)
    assert (tool.name, tool.schema) == ("papers__merge", MERGE_SCHEMA)
    assert (
        tool.description
        == f"Merge papers\n\nPrefab papers 0.2.0. Works on papers\n{mcp_server.NO_ANSWER_HINT}"
    )


def test_what_a_model_must_know_is_never_cut_off() -> None:
    spec = {**MERGE_SPEC, "functions": [{"name": "merge", "description": "long " * 999}]}
    description = mcp_server.make_tool(spec, spec["functions"][0], pinned=False).description
    assert len(description) == 1024
    assert description.endswith(f"\n{mcp_server.NO_ANSWER_HINT}") is True


@pytest.mark.parametrize(("name", "title"),
                         [({"name": "Paper mill"}, "Paper mill: merge"), ({}, "papers: merge")])
def test_a_tool_has_a_title_for_people(name: dict[str, str], title: str) -> None:
    assert (
        mcp_server.make_tool({**MERGE_SPEC, **name}, MERGE_SPEC["functions"][0], pinned=False).title
        == title
    )


@pytest.mark.parametrize(("entry", "schema"), [
    ({"type": "bool", "default": False},
     {"type": "boolean", "default": False, "description": "Default: false."}),
    ({"type": "integer", "minimum": 1, "maximum": 9, "description": "How many."},
     {"type": "integer", "minimum": 1, "maximum": 9,
      "description": "How many. At least 1. At most 9."}),
    ({"type": "string", "minLength": 0, "maxLength": 9, "pattern": "^ü"},
     {"type": "string", "minLength": 0, "maxLength": 9, "pattern": "^ü",
      "description": 'Pattern: "^ü". Characters, at least: 0. Characters, at most: 9.'}),
    ({"type": "array", "items": {"type": "string", "enum": ["a", "b"]}},
     {"type": "array",
      "items": {"type": "string", "enum": ["a", "b"], "description": 'One of ["a", "b"].'},
      "description": 'Each: One of ["a", "b"].'}),
    ({"type": "string | array"}, {"type": ["string", "array"], "items": {}}),
    ({"type": "list[str]"}, {"type": "array", "items": {}}),
    ({"type": "any"}, {}), ({"type": "Paper"}, {}), ({}, {}),
    ({"type": "string", "default": None}, {"type": "string"}),
    ({"type": "array", "items": {"type": "object", "properties": {"n": {"type": "int"}}}},
     {"type": "array", "description": "Each: Field n: integer.",
      "items": {"type": "object", "description": "Field n: integer.",
                "properties": {"n": {"type": "integer"}}}}),
    ({"type": "object", "required": ["b"],
      "properties": {"a": {}, "b": {"type": "object", "required": ["c"]}}},
     {"type": "object", "required": ["b"], "properties": {"a": {}, "b": {"type": "object"}},
      "description": "Field a: any. Field b: object."}),
])
def test_a_specs_type_becomes_json_schema(entry: dict[str, Any], schema: dict[str, Any]) -> None:
    assert mcp_server.schema_of(entry) == schema


@pytest.mark.parametrize(("entry", "required"), [
    ({}, ["a"]), ({"required": True, "default": 1}, ["a"]), ({"default": 1}, ["a"]),
    ({"required": False}, None),
    ({"default": 1, "required": False}, None), ({"type": "object", "required": ["b"]}, ["a"])])
def test_a_parameter_is_required_unless_the_spec_says_otherwise(
    entry: dict[str, Any], required: Any
) -> None:
    assert mcp_server.object_schema({"a": entry}, default_required=True).get("required") == required


def test_the_newest_deployed_versions_are_served_unless_others_are_asked_for() -> None:
    with LocalGateway() as gateway:
        for version in ("1.9.0", "1.10.0", "1.10.0-rc.1"):
            gateway.add_prefab("p", version, {"f": len_of})
        gateway.add_prefab("p", "2.0.0", {"f": len_of}, status="failed")
        assert tools_of(gateway)["p__f"].version == "1.10.0"
        assert list(tools_of(gateway, "p")) == ["p__f"]
        both = tools_of(gateway, "p@1.9.0", "p@1.10.0-rc.1", "p")
        assert [tool.version for tool in both.values()] == ["1.9.0", "1.10.0-rc.1", "1.10.0"]
        for wanted in ("q", "q@1.0.0"):
            with pytest.raises(GatewayError, match=f"{wanted}: "):
                tools_of(gateway, wanted)
        gateway.requests.clear()
        tools_of(gateway, "p@1.9.0")
        assert len(gateway.requests) == 1  # a version that is named needs no directory


def test_listing_costs_one_directory_and_a_spec_of_each_prefab_and_is_kept_for_a_while() -> None:
    async def list_often(client: GatewayClient) -> list[int]:
        prefabs, counts = mcp_server.Prefabs(client), []
        # The second time, the tools are not that old.
        for max_age in (mcp_server.KEPT_SECONDS, 3600, 0):
            gateway.requests.clear()
            await asyncio.gather(*(prefabs.list_tools(max_age) for _ in range(3)))
            counts.append(len(gateway.requests))
        return counts

    with LocalGateway() as gateway, client_of(gateway) as client:
        for number in range(20):
            gateway.add_prefab(f"p{number}", "1.9.0", {"f": len_of})
            gateway.add_prefab(f"p{number}", "1.10.0", {"f": len_of})
        prefabs = {info.prefab_id for info in client.list_prefabs("deployed")}
        assert asyncio.run(list_often(client)) == [1 + len(prefabs), 0, 1 + len(prefabs)]


def test_a_prefab_whose_spec_is_no_use_costs_no_other_one(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the specs are asked for in this order.
    monkeypatch.setattr(mcp_server, "SPECS_AT_ONCE", 1)
    good = {
        "id": "good",
        "version": "1.0.0",
        "functions": [{"name": "f", "description": "half a pair: \ud83d"}],
    }
    deep = functools.reduce(
        lambda inner, _: {"properties": {"a": inner}}, range(200), {"name": "a"}
    )
    deep_function = {"name": "f", "parameters": [{"name": "a", **deep}]}
    specs = {"bad": {**good, "functions": ["f"]}, "deep": {**good, "functions": [deep_function]},
             "good": good, "worse": {}}
    directory = answer([{"id": name, "version": "1.0.0"} for name in specs])
    with Script(directory, *map(answer, specs.values())) as server:
        tools = tools_of(server)
    assert [(name, tool.description[:14]) for name, tool in tools.items()] == [
        ("good__f", "half a pair: ?")
    ]
    assert re.findall(r"left out: (\w+):", capsys.readouterr().err) == ["bad", "deep", "worse"]


@pytest.fixture
def mcp_main(gateway: LocalGateway, monkeypatch: Any, capsys: Any) -> Callable[..., Ended]:
    """Runs the server as a program, in this process and as if `mcp` were not installed."""
    monkeypatch.setitem(sys.modules, "mcp", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("GATEWAY_BASE_URL", gateway.base_url)
    monkeypatch.setenv("X_INTERNAL_TOKEN", gateway.internal_token)
    return lambda *arguments: Ended(mcp_server.main(arguments), *capsys.readouterr())


@pytest.mark.parametrize("runs_already", [False, True],
                         ids=["a gateway of its own", "one that runs already"])
def test_the_tools_are_listed_for_models_without_the_package(
        runs_already: bool, mcp_main: Any, gateway: LocalGateway, monkeypatch: Any) -> None:
    gateway.add_prefab("listed", "1.0.0", {"count": len_of})
    if not runs_already:
        monkeypatch.delenv("GATEWAY_BASE_URL")
    done = mcp_main("--list")
    told = (
        f"The gateway is {gateway.base_url}.",
        "GATEWAY_BASE_URL is not set, so the gateway is a local one, ",
    )
    assert (done.status, done.err.startswith(f"mcp_server: {told[not runs_already]}")) == (0, True)
    assert done.err.endswith("X_INTERNAL_TOKEN is not used.\n") != runs_already
    tools = {tool["function"]["name"]: tool for tool in json.loads(done.out)}
    assert ("listed__count" in tools) == runs_already
    assert tools["text-tools__statistics"] == {
        "type": "function",
        "function": {
            "name": "text-tools__statistics",
            "description": "Count the characters, words and lines of a text, and its most common "
                           "words.\n\n"
            f"Prefab text-tools 1.1.0. Looks at texts\n{mcp_server.NO_ANSWER_HINT}",
            "parameters": {
                "type": "object",
                "properties": {"text": {"type": "string"}},
                "required": ["text"],
                "additionalProperties": False,
            },
        },
    }


def test_the_server_says_what_is_missing(
    mcp_main: Any, gateway: LocalGateway, monkeypatch: Any
) -> None:
    assert mcp_main("--list", "--prefab", "q")[:2] == (1, "")
    monkeypatch.setattr(gateway, "down", True)
    done = mcp_main("--list")
    assert (done.status, done.out) == (1, "")
    assert done.err.endswith("mcp_server: GET /v1/prefabs answered 503: The gateway is down\n")
    bare = mcp_main()
    assert (bare.status, bare.out, "pip install mcp" in bare.err) == (1, "", True)


@pytest.mark.parametrize("name", READMES)
def test_the_configuration_of_the_readme_starts_a_server(name: str, mcp_main: Any) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    (block,) = re.findall(r'^```\w*\n(\{\n  "mcpServers".*?)^```$', text, re.M | re.S)
    (server,) = json.loads(block)["mcpServers"].values()
    assert {"GATEWAY_BASE_URL", "X_INTERNAL_TOKEN"} == set(server["env"])
    script, *options = server["args"]
    assert (server["command"], script) == ("python", "/path/to/examples/mcp_server.py")
    done = mcp_main(*options, "--list")
    assert (done.status, len(json.loads(done.out)) > 0) == (0, True)


# Calls, without MCP


@pytest.mark.parametrize(("value", "text", "structured"), [
    ({"a": None, "n": 2**70}, '{"a": null, "n": 1180591620717411303424}', {"a": None, "n": 2**70}),
    ([1, "é"], '[1, "é"]', {"result": [1, "é"]}),
    ("plain text", "plain text", {"result": "plain text"}),
    ("", "", {"result": ""}),
    (3, "3", {"result": 3}),
    (None, "{}", {}),
    ({"success": True}, '{"success": true}', {"success": True}),
])
def test_a_result_is_structured_content_and_text(
    value: Any, text: str, structured: Any, gateway: LocalGateway
) -> None:
    result = call_tool(gateway, "text-tools", "text-tools__echo", {"value": value})
    assert result == {
        "content": [{"type": "text", "text": text}],
        "structuredContent": structured,
        "isError": False,
    }


def test_local_files_are_uploaded_to_where_the_spec_wants_them(content_file: Path) -> None:
    local, kept = str(content_file), "s3://b/kept"
    uploads = [link(), NO_BODY] * 3
    name = mcp_server.tool_name("papers", "merge", "0.2.0")
    arguments = {"title": "t", "papers": [local, kept], "title_files": local, "clip": local,
                 "clips": [kept]}
    with Script(answer(MERGE_SPEC), *uploads, ran("done")) as server:
        result = call_tool(server, "papers@0.2.0", name, arguments)
    assert texts_of(result) == ["done"]
    assert [request.body for request in server.received if request.method == "PUT"] == [
        b"content"
    ] * 3
    assert server.received[-1].json["calls"][0]["inputs"] == {
        "parameters": {"title": "t", "clip": S3, "clips": [kept]},
        "files": {"papers": [S3, kept], "title": [S3]},
    }


@pytest.mark.parametrize("links", [False, True])
def test_output_files_are_saved_to_a_folder(
        links: bool, gateway: LocalGateway, content_file: Path, tmp_path: Path) -> None:
    files, folder = {"files": [str(content_file)]}, tmp_path / "new" / "folder"
    options = {"folder": folder, "links": links}
    # No file takes another's place.
    for path in (folder / "SHA256SUMS.txt", folder / "2-SHA256SUMS.txt"):
        result = call_tool(
            gateway, "file-tools", "file-tools__checksum", {"files": files}, **options
        )
        (file,) = result["structuredContent"]["output_files"]
        assert (file["path"], file["uri"], file["name"]) == (str(path), path.as_uri(), "checksums")
        assert path.read_text().endswith("  content\n")
        assert json.loads(texts_of(result)[1]) == {"output_files": [file]}
        blocks = [block for block in result["content"] if block["type"] != "text"]
        assert [(block["type"], block["uri"]) for block in blocks] == [
            ("resource_link", path.as_uri())
        ] * links
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("saved", [True, False])
def test_files_that_cannot_be_had_do_not_cost_the_result(
        saved: bool, gateway: LocalGateway, content_file: Path, tmp_path: Path,
        monkeypatch: Any) -> None:
    monkeypatch.setattr(gateway, "internal_token", None)  # the client's, which then is no agent
    files, folder = {"files": [str(content_file)]}, tmp_path / "folder" if saved else None
    result = call_tool(
        gateway, "file-tools", "file-tools__checksum", {"files": files}, folder=folder, links=True
    )
    (file,) = result["structuredContent"]["output_files"]
    assert ("agent" in file["error"], "uri" in file) == (True, False)
    assert (result["structuredContent"]["success"], result["isError"]) == (True, False)
    assert list(tmp_path.iterdir()) == [content_file]


@pytest.mark.parametrize(("events", "text", "problem"), [
    ([event("start"), event("content", "a "), event("content", "b"), event("done", None)], "a b",
     None),
    ([event("content", "a"), event("content", {"b": 1}), event("done")], '["a", {"b": 1}]', None),
    ([event("progress", 0.5), event("done", {"x": 1})], '{"x": 1}', None),
    ([event("done", {"x": 1, "y": 1}), event("done", {"y": 2}),
      event("done", {"job_id": "j", "files": {}})],
     '{"x": 1, "y": 2}', None),
    ([event("content", "half"), event("error", {"message": "stumbled"})], "half", "stumbled"),
    ([event("content", "half"), event("error", "stumbled")], "half", "stumbled"),
    ([event("content", "half"), event("error", {"line": 7}, message="stumbled")], "half",
     "stumbled"),
    ([event("content", "half"), event("error", None, message="stumbled", error_code="E7")], "half",
     "stumbled"),
    ([event("error", "stumbled"), event("content", "half")], "half", "cut short"),
    ([event("content", "half")], "half", "cut short"),
    ([event("content", "a"), b"data: [DONE]\n\n"], "a", None),
    ([event("start"), event("done")], "", None),
    ([event("content", "half a pair: \ud83d"), event("done")], "half a pair: ?", None),
])
def test_a_stream_gives_the_whole_at_its_end(
    events: list[bytes], text: str, problem: str | None
) -> None:
    reported: list[str] = []
    with stream_of(*events, end=problem) as server:
        result = call_tool(server, *STREAMED, report=reported.append)
    assert texts_of(result)[-1] == text
    assert result["isError"] == bool(problem)
    if problem:
        told = "stumbled" if b"stumbled" in b"".join(events) else problem
        assert told in texts_of(result)[0]
        assert result["structuredContent"]["error"]["may_have_run"] is True
    for further in (b"7", b'"E7"'):  # what stands beside an error's message
        assert (further in texts_of(result)[0].encode()) == (further in b"".join(events))
    assert len(reported) == sum(b'"content"' in line or b'"progress"' in line for line in events)
    assert "\ud83d" not in "".join(reported)


def test_a_stream_is_read_by_one_thread() -> None:
    pieces = [str(number) for number in range(200)]
    reported: list[str] = []
    threads = []

    def count(frame: Any, what: str, _: Any) -> None:
        if what == "call" and frame.f_code.co_name == "run" and frame.f_globals[
            "__name__"] == "mcp_server":
            threads.append(frame.f_code)

    threading.setprofile(count)  # in each thread from now on
    try:
        with stream_of(*(event("content", piece) for piece in pieces), event("done")) as server:
            call_tool(server, *STREAMED, report=reported.append)
    finally:
        threading.setprofile(None)
    assert reported == pieces
    assert len(threads) == 2  # that of the spec, and this one


@pytest.mark.parametrize("streaming", [True, False])
def test_a_silent_call_reports_that_it_goes_on(streaming: bool) -> None:
    spec = {"id": "p", "version": "1.0.0", "functions": [{"name": "f", "streaming": streaming}]}
    heard, reported = threading.Event(), []

    def report(text: str) -> None:
        reported.append(text)
        heard.set()

    def wait(_: Any) -> None:
        assert heard.wait(WAIT_SECONDS)  # the function ends when the call was heard to go on

    given = chunked(event("done", "ok")) if streaming else ran()
    with Script(answer(spec), Steps((wait, lambda sock: sock.sendall(given)))) as server:
        result = call_tool(server, *STREAMED, report=report, heartbeat_seconds=0.01)
    assert (texts_of(result), set(reported)) == (["ok"], {"The call is still running."})


@pytest.mark.parametrize(("given", "may_have_run"), [
    (answer({"detail": "wrong"}, 422), False),
    (answer({"detail": "broken"}, 503), True),
    (HangUp(), True),
    (answer({"results": [{"status": "FAILED", "error": {"message": "no luck"}}]}), True),
    (answer({"results": [{"status": "EXPIRED"}]}), True),
    (answer({"results": [{"status": "FAILED", "error": {"message": None}}]}), True),
], ids=["refused", "unavailable", "hang up", "failed", "a status of its own", "no message"])
def test_an_answer_says_whether_the_call_may_have_run(given: Any, may_have_run: bool) -> None:
    spec = {"id": "p", "version": "1.0.0", "functions": [{"name": "f"}]}
    with Script(answer(spec), given) as server:
        result = call_tool(server, *STREAMED)
    (text,), error = texts_of(result), result["structuredContent"]["error"]
    assert (result["isError"], text.startswith(error["message"])) == (True, True)
    # Some clients hand on the structured content alone.
    told = mcp_server.REPEAT_HINT in error["message"]
    assert (error["may_have_run"], told) == (may_have_run, may_have_run)


@pytest.mark.parametrize(("path", "message"), [
    ("content.bin", "must be an array of absolute local paths"), ("./content.bin", "absolute"),
    ("", "absolute"),
    ("file:///content.bin", "absolute"), ("~no-such-user/a", "RuntimeError"),
])
def test_a_call_whose_file_is_not_clear_is_not_sent(
        path: str, message: str, gateway: LocalGateway, content_file: Path,
        monkeypatch: Any) -> None:
    content_file.rename(content_file.with_name("content.bin"))
    # There is such a file, but the agent may mean another one.
    monkeypatch.chdir(content_file.parent)
    gateway.executed.clear()
    result = call_tool(
        gateway, "file-tools", "file-tools__line_count", {"files": {"files": [path]}}
    )
    assert (result["isError"], message in texts_of(result)[0]) == (True, True)
    assert result["structuredContent"]["error"]["may_have_run"] is False
    assert gateway.executed == []


def test_a_call_that_is_cancelled_while_its_file_goes_out_is_not_sent(content_file: Path) -> None:
    uploading, cancelled = threading.Event(), threading.Event()

    async def call_and_cancel(client: GatewayClient) -> None:
        async def ignore(_: str) -> None:
            pass

        prefabs = mcp_server.Prefabs(client, ["papers@0.2.0"])
        arguments = {"title": "t", "papers": [str(content_file)]}
        name = mcp_server.tool_name("papers", "merge", "0.2.0")
        calling = asyncio.ensure_future(prefabs.call_tool(name, arguments, ignore))
        assert await asyncio.get_running_loop().run_in_executor(None, uploading.wait, WAIT_SECONDS)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        cancelled.set()
        for thread in threading.enumerate():
            if thread.name == "mcp_server":
                await asyncio.get_running_loop().run_in_executor(None, thread.join, WAIT_SECONDS)

    def wait(_: Any) -> None:
        uploading.set()
        assert cancelled.wait(WAIT_SECONDS)

    arrives_late = Steps((wait, lambda sock: sock.sendall(NO_BODY)))
    with (
        Script(answer(MERGE_SPEC), link(), arrives_late, ran()) as server,
        client_of(server) as client,
    ):
        asyncio.run(call_and_cancel(client))
    assert [request.method for request in server.received] == ["GET", "POST", "PUT"]


# Over stdio, with the client of the package


@contextlib.asynccontextmanager
async def open_session(gateway: LocalGateway, log: Any) -> AsyncIterator[Any]:
    import mcp
    from mcp.client.stdio import stdio_client

    arguments = ["-X", "dev", str(EXAMPLES / "mcp_server.py")]
    parameters = mcp.StdioServerParameters(
        command=sys.executable, args=arguments, env=environment_for(gateway)
    )
    async with stdio_client(parameters, log) as streams, mcp.ClientSession(*streams) as session:
        await session.initialize()
        yield session


class ToolClient(NamedTuple):
    """The package's own client of a server process, for tests that are not asynchronous."""

    portal: Any  # to where the session lives
    session: Any

    def list(self) -> dict[str, Any]:
        """The tools by name, as they are on the wire."""
        tools = self.portal.call(self.session.list_tools).tools
        return {tool.name: tool.model_dump(by_alias=True, exclude_none=True) for tool in tools}

    def call(self, name: str, **arguments: Any) -> Any:
        """The result of a call, as it is on the wire."""
        return self.start(name, **arguments).result(3 * WAIT_SECONDS)

    def start(
        self, name: str, on_progress: Callable[[Any], object] = lambda _: None, **arguments: Any
    ) -> Any:
        """Starts a call, whose result will be in a future."""
        async def report(progress: float, total: float | None, message: str | None) -> None:
            on_progress((progress, message))

        async def call() -> Any:
            result = await self.session.call_tool(name, arguments, progress_callback=report)
            return result.model_dump(by_alias=True, mode="json", exclude_none=True)

        return self.portal.start_task_soon(call)


@pytest.fixture(scope="module")
def tool_client(gateway: LocalGateway) -> Iterator[ToolClient]:
    from anyio.from_thread import start_blocking_portal

    with tempfile.TemporaryFile("w+", encoding="utf-8") as log, start_blocking_portal() as portal:
        with portal.wrap_async_context_manager(open_session(gateway, log)) as session:
            yield ToolClient(portal, session)
        log.seek(0)
        shown = log.read()
    for unwanted in (gateway.internal_token, "Traceback", "Warning", "never retrieved"):
        assert unwanted not in shown, shown


@needs_mcp
def test_mcp_lists_the_tools_as_they_are_now(
    tool_client: ToolClient, gateway: LocalGateway
) -> None:
    before = tool_client.list()
    echo, tool = before["text-tools__echo"], tools_of(gateway)["text-tools__echo"]
    shown = (echo["inputSchema"], echo["title"], echo["description"])
    assert shown == (tool.schema, tool.title, tool.description)
    gateway.add_prefab("later", "1.0.0", {"count": len_of})  # found although it is in no list yet
    assert tool_client.call("later__count", text="four")["structuredContent"] == {"result": 4}
    assert set(tool_client.list()) - set(before) == {"later__count"}


@needs_mcp
def test_mcp_gives_what_is_nested_too_deeply_as_text(
    tool_client: ToolClient, gateway: LocalGateway
) -> None:
    deep = functools.reduce(lambda inner, _: {"a": inner}, range(400), 1)
    gateway.add_prefab("odd", "1.0.0", {"deep": lambda: deep})
    assert texts_of(tool_client.call("odd__deep"))[0].startswith('{"a": {"a":')
    assert tool_client.call("text-tools__echo", value=1)["structuredContent"] == {"result": 1}


@needs_mcp
def test_mcp_reports_contents_and_progress_at_once(
    tool_client: ToolClient, gateway: LocalGateway
) -> None:
    gated, progress = Gated(), queue.Queue()

    def words(text: str, outputs: Path) -> Iterator[Any]:
        (outputs / "words.txt").write_text(text)
        yield from gated.words(text)
        yield {"type": "progress", "data": {"done": 2}}

    gateway.add_prefab("gated", "1.0.0", {"words": words})
    running = tool_client.start("gated__words", progress.put, text="one two")
    # The next word is not made before this one was heard of here.
    for expected in ((1, "one"), (2, "two")):
        gated.gate.release()
        assert progress.get(timeout=WAIT_SECONDS) == expected
    assert progress.get(timeout=WAIT_SECONDS) == (3, '{"done": 2}')
    result = running.result(WAIT_SECONDS)
    (file,) = result["structuredContent"]["output_files"]
    assert (result["structuredContent"]["result"], texts_of(result)[0]) == ("onetwo", "onetwo")
    with urllib.request.urlopen(file["uri"]) as download:
        assert download.read() == b"one two"


@needs_mcp
def test_mcp_takes_and_gives_files(tool_client: ToolClient, content_file: Path) -> None:
    result = tool_client.call("file-tools__checksum", files={"files": [str(content_file)]})
    assert {block["type"] for block in result["content"]} == {"text"}
    (file,) = result["structuredContent"]["output_files"]
    with urllib.request.urlopen(file["uri"]) as download:
        assert download.read().endswith(b"  content\n")
    # Its URL is an input.
    again = tool_client.call("file-tools__line_count", files={"files": file["s3_url"]})
    assert again["structuredContent"]["lines"] == 1


@needs_mcp
@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("faulty__refuse", {"message": "not today"}, "not today"),
    ("faulty__fail", {"message": "no luck"}, r"no luck \(ALWAYS_FAILS\)"),
    ("faulty__crash", {}, r"POST /v1/internal/run answered 503: .*RuntimeError: out of order"),
    ("faulty__stumble", {"text": "so far"}, "stumbled"),
    ("vault__sign", {"text": "x"},
     r"(?s)Secret 'SIGNING_KEY' .* --base-url http://\S+ secret set vault SIGNING_KEY"),
    ("text-tools__statistics", {}, "answered 422: Missing required parameter: text"),
    ("text-tools__statistics", {"text": "a", "txt": "b"},
     r"has no argument txt\. It takes: text\."),
    ("text-tools__statistics", {"text": 5},
     "answered 422: Type mismatch for parameter text: expected string"),
    ("file-tools__line_count", {}, "Give the input files under the key 'files'"),
    ("file-tools__line_count", {"files": ["a.txt"]}, "files must be an object"),
    ("file-tools__line_count", {"files": {"files": 3}},
     "an array of absolute local paths or s3:// URLs, not 3"),
    ("file-tools__line_count", {"files": {"files": "http://a/b"}},
     "files must be .*, not http://a/b"),
    ("file-tools__line_count", {"files": {"files": ["/no/such"]}}, "FileNotFoundError: .*no/such"),
    ("file-tools__line_count", {"files": {"files": [str(ROOT)]}}, "not a regular file"),
    ("file-tools__line_count", {"files": {"files": ["s3://local/x"]}},
     "Input file not found: s3://local/x"),
    ("no_such_tool", {}, "Unknown tool: no_such_tool"),
])
def test_mcp_tells_of_a_failure_and_goes_on(
        name: str, arguments: dict[str, Any], message: str, tool_client: ToolClient) -> None:
    result = tool_client.call(name, **arguments)
    assert (result["isError"], bool(re.search(message, texts_of(result)[0]))) == (True, True), (
        result
    )
    if name == "faulty__stumble":
        assert texts_of(result)[1] == "so far"  # what came before
    if name == "faulty__fail":
        assert result["structuredContent"]["error_code"] == "ALWAYS_FAILS"
    assert tool_client.call("text-tools__echo", value=1)["isError"] is False


@needs_mcp
def test_mcp_outlives_a_gateway_that_is_down(
        tool_client: ToolClient, gateway: LocalGateway, monkeypatch: Any) -> None:
    assert tool_client.call("text-tools__echo", value=1)["isError"] is False
    with monkeypatch.context() as patched:
        patched.setattr(gateway, "down", True)
        result = tool_client.call("text-tools__echo", value=1)
        assert result["isError"] is True
        assert "answered 503: The gateway is down" in texts_of(result)[0]
    assert tool_client.call("text-tools__echo", value=1)["isError"] is False


@needs_mcp
def test_mcp_runs_twenty_calls_at_once(tool_client: ToolClient, gateway: LocalGateway) -> None:
    together = threading.Barrier(20)

    def meet(number: int) -> int:
        together.wait(3 * WAIT_SECONDS)  # breaks unless all are here at once
        return number

    gateway.add_prefab("party", "1.0.0", {"meet": meet})
    calls = [tool_client.start("party__meet", number=number) for number in range(20)]
    results = [call.result(3 * WAIT_SECONDS)["structuredContent"] for call in calls]
    assert results == [{"result": number} for number in range(20)]


@needs_mcp
def test_mcp_cancels_a_call(tool_client: ToolClient, gateway: LocalGateway) -> None:
    gated, session, reported = Gated(), tool_client.session, threading.Event()

    def send_a_word() -> bool:
        gated.gate.release()
        return gated.cut_off.is_set()

    gateway.add_prefab("endless", "1.0.0", {"words": gated.words})
    gated.gate.release()
    call = tool_client.start("endless__words", lambda _: reported.set(), text="word " * 9999)
    assert reported.wait(WAIT_SECONDS)
    if hasattr(session, "_request_id"):  # the client of mcp 1 does not say it by itself
        from mcp import types

        params = {"requestId": session._request_id - 1}
        cancelled = types.CancelledNotification(method="notifications/cancelled", params=params)
        tool_client.portal.call(session.send_notification, types.ClientNotification(cancelled))
    call.cancel()
    wait_for(send_a_word)  # the gateway finds out by sending that nobody listens any more
    assert tool_client.call("text-tools__echo", value=1)["isError"] is False


# The process

NOISY = """
import os, subprocess, sys, mcp_server

class NoisyPrefabs(mcp_server.Prefabs):
    async def call_tool(self, *arguments):
        print("noise")
        os.write(1, b"noise")
        subprocess.run([sys.executable, "-S", "-c", "import sys; print('noise', sys.stdin.read())"])
        return await super().call_tool(*arguments)

mcp_server.Prefabs = NoisyPrefabs
sys.exit(mcp_server.main())
"""


class NoisyServer:
    """The server in a process that prints. It is spoken to line by line, without the package."""

    def __init__(self, gateway: LocalGateway) -> None:
        environment = {**environment_for(gateway), "PYTHONPATH": str(EXAMPLES)}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(
            [sys.executable, "-c", NOISY], env=environment, encoding="utf-8", **pipes
        )
        self._watchdog = threading.Timer(2 * START_SECONDS, self.process.kill)
        self._watchdog.start()

    def __enter__(self) -> NoisyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        with self.process:
            self.process.kill()

    def send(self, method: str, number: int | None = None, **params: Any) -> None:
        asked = {} if number is None else {"id": number}
        self.process.stdin.write(
            json.dumps({"jsonrpc": "2.0", **asked, "method": method, "params": params}) + "\n"
        )
        self.process.stdin.flush()

    def receive(self) -> Any:
        return json.loads(self.process.stdout.readline())

    def greet(self) -> None:
        client_info = {"name": "test", "version": "1"}
        self.send(
            "initialize", 0, protocolVersion="2025-06-18", capabilities={}, clientInfo=client_info
        )
        told = self.receive()["result"]
        assert told["serverInfo"]["name"] == "gateway"
        assert told["instructions"] == mcp_server.INSTRUCTIONS
        self.send("notifications/initialized")


@pytest.fixture(scope="module")
def noisy_servers(gateway: LocalGateway) -> Iterator[list[NoisyServer]]:
    with contextlib.ExitStack() as stack:  # they start side by side, as a start is slow
        yield [stack.enter_context(NoisyServer(gateway)) for _ in range(2)]


@posix
@needs_mcp
@pytest.mark.parametrize(("how", "status"),
                         [("its client closes stdin", 0), ("it is interrupted", 130)])
def test_mcp_has_only_messages_on_stdout_and_ends_with_its_client(
        how: str, status: int, noisy_servers: list[NoisyServer], gateway: LocalGateway,
        monkeypatch: Any) -> None:
    gated, begun, closing = Gated(), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        closing.wait(3 * START_SECONDS)

    gateway.add_prefab("hanging", "1.0.0", {"wait": wait, "words": gated.words})
    server = noisy_servers.pop()
    with server:
        server.greet()
        with monkeypatch.context() as patched:
            patched.setattr(gateway, "down", True)
            server.send("tools/list", 9)
            assert "answered 503: The gateway is down" in server.receive()["error"]["message"]
        server.send("tools/call", 1, name="text-tools__echo", arguments={"value": "a\nb\u2028é"})
        assert server.receive()["result"]["structuredContent"] == {"result": "a\nb\u2028é"}
        server.send("tools/call", 2, name="hanging__wait", arguments={})
        server.send(
            "tools/call",
            3,
            name="hanging__words",
            arguments={"text": "a " * 99},
            _meta={"progressToken": 7},
        )
        gated.gate.release()
        assert server.receive()["method"] == "notifications/progress"
        assert begun.wait(WAIT_SECONDS)
        if how == "it is interrupted":
            server.process.send_signal(signal.SIGINT)
        else:
            server.process.stdin.close()
        try:
            # Although a call hangs and another one streams.
            assert server.process.wait(START_SECONDS) == status
            assert [json.loads(line)["jsonrpc"] for line in server.process.stdout] in (
                [],
                ["2.0"] * 2,
            )
            log = server.process.stderr.read()
            assert ("noise" in log, "Traceback" in log) == (True, False), log
            gated.gate.release(99)
            assert gated.cut_off.wait(WAIT_SECONDS)
        finally:
            closing.set()
