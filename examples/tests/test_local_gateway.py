"""Tests of `local_gateway.py`, as far as the tests of the SDK do not need it to work anyway."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import local_gateway
import pytest
from conftest import EXAMPLES, Gated, wait_for
from local_gateway import CallFailed, LocalGateway

from gateway_sdk import (
    AuthenticationError,
    GatewayClient,
    GatewayError,
    GatewayTimeoutError,
    MissingSecretError,
    PrefabCall,
    PrefabNotFoundError,
    ServiceUnavailableError,
)
from test_gateway_sdk import (
    ROOT,
    SHORT_SECONDS,
    WAIT_SECONDS,
    Patch,
    client_of,
    ended_python,
    environment_for,
    started,
)

PROGRAM = EXAMPLES / "local_gateway.py"
JSON_TYPE = {"Content-Type": "application/json"}
needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


@pytest.fixture
def own() -> Iterator[LocalGateway]:
    """A gateway of the test's own, which it may change."""
    with LocalGateway() as running:
        yield running


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: Patch) -> Path:
    """The folder in which a gateway makes its own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


class Answered(NamedTuple):
    status: int
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def value(self) -> Any:
        """What the function returned."""
        return self.json["results"][0]["output"]["output"]


def ask(
    gateway: LocalGateway, method: str, path: str, body: Any = None, **headers: str | None
) -> Answered:
    """A request with exactly these headers, but for the length."""
    port = urlsplit(gateway.base_url).port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        headers = {"Host": f"127.0.0.1:{port}", **headers}
        content = b"" if body is None else json.dumps(body).encode()
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            if value is not None:
                connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(content)
        response = connection.getresponse()
        return Answered(response.status, response.read().decode())


def run_body(inputs: Any, function: str = "echo", prefab: str = "text-tools 1.1.0") -> Any:
    prefab_id, version = prefab.split()
    call = {"prefab_id": prefab_id, "version": version, "function_name": function}
    return {"calls": [{**call, "inputs": inputs}]}


def run_p(gateway: LocalGateway, inputs: Any, function: str = "f") -> Answered:
    """A call of the prefab "p"."""
    body = run_body(inputs, function, "p 1.0.0")
    return ask(gateway, "POST", "/v1/internal/run", body, **JSON_TYPE)


def make_folder(folder: Path, main: str, *functions: Any, **more: Any) -> Path:
    """A prefab folder: `functions` are entries of the manifest, or names."""
    (folder / "src").mkdir(parents=True, exist_ok=True)
    (folder / "src" / "main.py").write_text(main)
    entries = [{"name": entry} if isinstance(entry, str) else entry for entry in functions]
    manifest = {"id": "p", "version": "1.0.0", "functions": entries, **more}
    (folder / "prefab-manifest.json").write_text(json.dumps(manifest))
    return folder


def parameter(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "parameters": [{"name": "text", "type": "string", **more}]}


# --- Strangers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("headers", "status"), [
    ({"Host": "attacker.example"}, 403),
    ({"Host": "127.0.0.1.attacker.example:80"}, 403),
    ({"Host": "192.168.0.7:8080"}, 403),
    ({"Host": ""}, 403),
    ({"Host": None}, 403),
    ({"Origin": "http://attacker.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "http://127.0.0.1:8080"}, 403),
    ({"Content_Type": "text/plain"}, 422),
    ({"Content_Type": "text/plain; application/json"}, 422),
    ({"Content_Type": "application/x-www-form-urlencoded"}, 422),
    ({"Content_Type": None}, 422),
    ({"Host": "localhost:9000"}, 200),  # a tunnel to this machine
    ({"Host": "LOCALHOST"}, 200),
    ({"Content_Type": "Application/JSON; charset=utf-8"}, 200),
], ids=str)  # fmt: skip
def test_what_a_web_page_can_send_without_asking_is_refused(
    headers: dict[str, str], status: int, gateway: LocalGateway
) -> None:
    before = gateway.executed.copy()
    body = run_body({"parameters": {"value": 1}})
    answered = ask(
        gateway, "POST", "/v1/internal/run", body, **{"Content_Type": "application/json", **headers}
    )
    assert answered.status == status, answered.text
    assert (gateway.executed != before) == (status == 200)


@pytest.mark.parametrize(("method", "path", "body"), [
    ("GET", "/v1/prefabs", None),
    ("GET", "/v1/prefabs/text-tools/1.1.0/spec", None),
    ("GET", "/v1/secrets", None),
    ("POST", "/v1/secrets", {"prefab_id": "p", "secret_name": "BROWSER", "secret_value": "x"}),
    ("DELETE", "/v1/secrets/p/KEY", None),
    ("POST", "/internal/files/generate_upload_url", {"filename": "f"}),
    ("GET", "/storage/agent-outputs/f?Expires=9999999999&Signature=x", None),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
@pytest.mark.parametrize("stranger", [{"Host": "attacker.example"}, {"Origin": "null"}], ids=str)
def test_strangers_are_refused_everywhere(
    stranger: dict[str, str], method: str, path: str, body: Any, own: LocalGateway
) -> None:
    answered = ask(own, method, path, body, **{**JSON_TYPE, **stranger})
    assert answered.status == 403
    assert own.secrets == {}


def test_a_secret_in_plain_text_is_not_stored(own: LocalGateway) -> None:
    secret = {"prefab_id": "p", "secret_name": "BROWSER", "secret_value": "x"}
    assert ask(own, "POST", "/v1/secrets", secret, Content_Type="text/plain").status == 422
    assert own.secrets == {}


def test_a_gateway_for_others_answers_under_any_name_but_nobody_without_a_credential(
    content_file: Path,
) -> None:
    with LocalGateway(host="0.0.0.0") as gateway, client_of(gateway) as client:
        assert gateway.base_url.startswith("http://127.0.0.1:")
        assert ask(gateway, "GET", "/v1/prefabs", Host="gateway:8080").status == 401
        token = {"Host": "gateway:8080", "X_Internal_Token": gateway.internal_token}
        assert ask(gateway, "GET", "/v1/prefabs", **token).status == 200
        own_page = {"Origin": "http://gateway:8080", **token}
        assert ask(gateway, "GET", "/v1/prefabs", **own_page).status == 403
        with GatewayClient(gateway.base_url) as nobody, pytest.raises(AuthenticationError):
            nobody.run("text-tools", "1.1.0", "echo", {"value": 1})
        s3_url = client.upload_file(content_file)["s3_url"]
        path = f"/internal/files/download?s3_url={s3_url}&mode=presigned"
        url = ask(gateway, "GET", path, **token).json["presigned_url"]
        assert url.startswith("http://gateway:8080/storage/")  # where the client reaches it
        path = url[len("http://gateway:8080") :]
        assert ask(gateway, "GET", path, Host="gateway:8080").text == "content"


def test_a_given_token_is_that_of_an_agent() -> None:
    for _ in range(2):
        with LocalGateway(token="kept") as gateway:
            with GatewayClient(gateway.base_url, internal_token="kept") as client:
                assert client.list_files() == {"files": []}


@pytest.mark.parametrize("options", [
    {"token": ""}, {"token": "a b"}, {"token": "a\n"}, {"token": "schlüssel"},
    {"port": 99999}, {"port": -1},
], ids=str)  # fmt: skip
def test_a_token_or_a_port_that_cannot_be_is_a_value_error(options: Any, temporary: Path) -> None:
    with pytest.raises(ValueError, match="token has no blanks|port is a number from 0 to 65535"):
        LocalGateway(**options)
    assert list(temporary.iterdir()) == []


READ_ENVIRONMENT = """import os
def f():
    return {name: os.environ.get(name) for name in ("KEY", "MAYBE", "PYTHONWARNINGS")}
"""


def test_a_process_gets_only_the_secrets_that_its_manifest_names(tmp_path: Path) -> None:
    secrets = [{"name": "KEY", "instructions": "Ask"}, {"name": "MAYBE", "required": False}]
    folder = make_folder(tmp_path, READ_ENVIRONMENT, {"name": "f", "secrets": secrets})
    with LocalGateway(folder) as gateway, client_of(gateway) as client:
        with pytest.raises(MissingSecretError, match="Ask"):
            client.run("p", "1.0.0", "f")
        client.set_secret("p", "KEY", "k")
        client.set_secret("p", "PYTHONWARNINGS", "error")
        client.set_secret("other", "MAYBE", "not its own")
        given = client.run("p", "1.0.0", "f").get_function_result()
        assert given == {"KEY": "k", "MAYBE": None, "PYTHONWARNINGS": None}


def test_a_function_gets_only_the_secrets_that_were_named(own: LocalGateway) -> None:
    own.add_prefab("p", "1.0.0", {"f": lambda secrets: secrets}, secrets=["KEY"])
    own.secrets.update({("p", "KEY"): "k", ("p", "OTHER"): "o"})
    assert run_p(own, {}).value == {"KEY": "k"}


# --- What works offline works online: streams -----------------------------------------------------

START, DONE = {"type": "start", "data": {"total": 2}}, {"type": "done", "data": {"total": 2}}
PROGRESS = {"type": "progress", "data": {"current": 1}, "metadata": {"m": 1}}
ERROR = {"type": "error", "data": "no", "error_code": "NO"}
OWN_START, OWN_DONE = {"type": "start", "data": "job"}, {"type": "done", "data": "job"}


def events_of(client: GatewayClient, function: str = "f", **parameters: Any) -> list[Any]:
    """The events; a job's id is "job", and its files are just their names."""
    events = []
    for event in client.run("p", "1.0.0", function, parameters, stream=True):
        raw = dict(event.raw)
        if isinstance(raw["data"], dict) and raw["data"].get("job_id"):
            files = raw["data"].get("files")
            raw["data"] = {key: len(urls) for key, urls in files.items()} if files else "job"
        events.append(raw)
    return events


def content(data: Any) -> dict[str, Any]:
    return {"type": "content", "data": data}


@pytest.mark.parametrize(("pieces", "events"), [
    ([], [OWN_START, OWN_DONE]),
    (["a", 1, None], [OWN_START, content("a"), content(1), content(None), OWN_DONE]),
    ([START, PROGRESS, DONE], [START, PROGRESS, DONE]),
    ([START, PROGRESS], [START, PROGRESS, OWN_DONE]),
    ([PROGRESS, DONE], [OWN_START, PROGRESS, DONE]),
    ([DONE], [OWN_START, DONE]),
    ([START, ERROR], [START, ERROR]),
    ([START, ERROR, DONE], [START, ERROR, DONE]),
    ([ERROR], [OWN_START, ERROR]),
    ([{"type": "tick"}], [OWN_START, content({"type": "tick"}), OWN_DONE]),
    ([{"type": ["start"]}], [OWN_START, content({"type": ["start"]}), OWN_DONE]),
], ids=str)  # fmt: skip
def test_a_function_that_yields_its_own_start_or_end_gets_none_beside_it(
    pieces: list[Any], events: list[Any], own: LocalGateway
) -> None:
    def f() -> Iterator[Any]:
        yield from pieces

    own.add_prefab("p", "1.0.0", {"f": f})
    with client_of(own) as client:
        assert events_of(client) == events


@pytest.mark.parametrize(("pieces", "events"), [
    ([], [OWN_START]), (["a"], [OWN_START, content("a")]), ([START], [START]),
], ids=str)  # fmt: skip
def test_an_error_ends_a_stream_unless_the_function_has_told_of_it(
    pieces: list[Any], events: list[Any], own: LocalGateway
) -> None:
    def f(told: bool) -> Iterator[Any]:
        yield from [*pieces, ERROR] if told else pieces
        raise KeyError("k")

    own.add_prefab("p", "1.0.0", {"f": f})
    error = {"type": "error", "data": {"message": "'k'", "type": "KeyError"}}
    with client_of(own) as client:
        assert events_of(client, told=False) == [*events, error]
        assert events_of(client, told=True) == [*events, ERROR]


def test_the_files_of_a_stream_come_in_one_more_done(own: LocalGateway) -> None:
    def f(outputs: Path, last: Any) -> Iterator[Any]:
        (outputs / "pages").mkdir()
        for name in ("pages/1.txt", "pages/2.txt", "report.txt"):
            (outputs / name).write_text(name)
        yield from [START, last]

    own.add_prefab("p", "1.0.0", {"f": f})
    files = {"type": "done", "data": {"pages": 2, "output": 1}}
    with client_of(own) as client:
        assert events_of(client, last=DONE) == [START, DONE, files]
        assert events_of(client, last=ERROR) == [START, ERROR, files]
        assert events_of(client, last=PROGRESS) == [START, PROGRESS, files]


def test_a_stream_answers_before_its_first_event(own: LocalGateway) -> None:
    gated = Gated()
    own.add_prefab("p", "1.0.0", {"f": lambda: (gated.gate.acquire(timeout=60) for _ in "a")})
    with client_of(own) as client, client.run("p", "1.0.0", "f", stream=True) as stream:
        gated.gate.release()
        assert [event.type for event in stream] == ["start", "content", "done"]


STREAMING = """from pathlib import Path
def f(items):
    yield {"type": "start", "data": {"total": len(items)}}
    for item in items:
        yield {"type": "content", "data": item}
    Path("data/outputs/report.txt").write_text("all")
    yield {"type": "done", "data": {"total": len(items)}}
"""


def test_a_folder_streams_as_the_template_says(tmp_path: Path) -> None:
    entry = {"name": "f", "streaming": True, "parameters": [{"name": "items", "type": "array"}]}
    with LocalGateway(make_folder(tmp_path, STREAMING, entry)) as gateway:
        with client_of(gateway) as client:
            files = {"type": "done", "data": {"output": 1}}
            events = [START, content("ä"), content(None), DONE, files]
            assert events_of(client, items=["ä", None]) == events


# --- What works offline works online: specs and parameters ----------------------------------------


def test_a_spec_is_the_manifest_and_the_directory_passes_its_author_on(tmp_path: Path) -> None:
    entry = {"name": "f", "files": {"input": {"minItems": 1}}, "returns": {"enum": [1]}}
    more = {"author": "me", "github_url": "https://x", "is_official": True, "schema_version": "1.0"}
    folder = make_folder(tmp_path, "", entry, {"name": "g", "secrets": [{"name": "K"}]}, **more)
    with LocalGateway(folder) as gateway, client_of(gateway) as client:
        manifest = json.loads((folder / "prefab-manifest.json").read_text())
        assert client.get_prefab_spec("p", "1.0.0") == manifest
        listed = client.list_prefabs()[0].raw
    assert {name: listed[name] for name in ("author", "github_url", "is_official")} == {
        "author": "me", "github_url": "https://x", "is_official": True
    }  # fmt: skip
    assert listed["functions"] == manifest["functions"]
    assert (listed["name"], listed["description"], listed["tags"]) == ("p", "", [])
    assert (listed["requires_secrets"], listed["secrets"]) == (True, [{"name": "K"}])


def test_a_python_function_is_described_by_its_signature(own: LocalGateway) -> None:
    def f(text: str, inputs: Any, count: int = 1, *rest: Any, **more: Any) -> None:
        """What it does.

        And how.
        """

    own.add_prefab("p", "1.0.0", {"f": f})
    with client_of(own) as client:
        (entry,) = client.get_prefab_spec("p", "1.0.0")["functions"]
    assert entry["description"] == "What it does."
    assert entry["parameters"] == [
        {"name": "text", "type": "string", "required": True},
        {"name": "count", "type": "integer", "required": False, "default": 1},
    ]


OPTIONAL = {
    "n": "number", "i": "integer", "b": "boolean", "a": "array", "o": "object", "any": "any",
    "l": "list",
}  # fmt: skip
TYPED = [
    {"name": "s", "type": "string"}, {"name": "untyped", "required": False},
    *({"name": name, "type": kind, "required": False} for name, kind in OPTIONAL.items()),
]  # fmt: skip


@pytest.fixture(scope="module")
def typed(tmp_path_factory: Any) -> Iterator[LocalGateway]:
    """A prefab with parameters of all types."""
    folder = tmp_path_factory.mktemp("typed")
    make_folder(
        folder,
        "def f(**given): return given\ndef g(text, undeclared=0): return [text, undeclared]",
        {"name": "f", "parameters": TYPED},
        parameter("g", default="x"),
        {"name": "f", "parameters": [{"name": "second"}]},
    )
    with LocalGateway(folder) as gateway:
        yield gateway


@pytest.mark.parametrize(("given", "problem"), [
    ({"s": "x"}, None),
    ({"s": "x", "n": 1, "i": 2, "b": True, "a": [], "o": {}, "any": None, "l": "not a list"}, None),
    ({"s": "x", "n": 0.5}, None),
    ({"s": "x", "n": True, "i": False}, None),
    ({}, "Missing required parameter: s"),
    ({"n": "1"}, "Missing required parameter: s"),
    ({"s": 1}, "Type mismatch for parameter s: expected string"),
    ({"s": None}, "Type mismatch for parameter s: expected string"),
    ({"s": "x", "n": None}, "Type mismatch for parameter n: expected number"),
    ({"s": "x", "n": "1"}, "Type mismatch for parameter n: expected number"),
    ({"s": "x", "i": 1.0}, "Type mismatch for parameter i: expected integer"),
    ({"s": "x", "b": 0}, "Type mismatch for parameter b: expected boolean"),
    ({"s": "x", "a": {}}, "Type mismatch for parameter a: expected array"),
    ({"s": "x", "o": []}, "Type mismatch for parameter o: expected object"),
    ({"s": "x", "untyped": 1}, "Type mismatch for parameter untyped: expected string"),
    ({"s": "x", "undeclared": None}, None),
], ids=str)  # fmt: skip
def test_parameters_are_checked_as_the_published_server_checks_them(
    given: dict[str, Any], problem: str | None, typed: LocalGateway
) -> None:
    answered = run_p(typed, {"parameters": given})
    if problem:
        assert (answered.status, answered.json) == (422, {"detail": problem})
    else:
        assert answered.value == given  # and no default is filled in


@pytest.mark.parametrize(("given", "answer"), [
    ({}, "Missing required parameter: text"),  # beside a default too
    ({"text": "t", "undeclared": 1}, ["t", 1]),
    ({"text": "t", "unknown": 1}, "Unknown parameter: unknown"),
], ids=str)  # fmt: skip
def test_a_folder_refuses_only_what_its_function_could_not_take(
    given: dict[str, Any], answer: Any, typed: LocalGateway
) -> None:
    answered = run_p(typed, {"parameters": given}, "g")
    refusal = {"detail": answer} if isinstance(answer, str) else None
    assert answered.json == refusal if refusal else answered.value == answer


def test_an_undeclared_parameter_is_for_a_function_that_takes_any(own: LocalGateway) -> None:
    functions = {"strict": lambda text: text, "loose": lambda text, inputs, **more: more}
    own.add_prefab("p", "1.0.0", functions)
    given = {"parameters": {"text": "t", "more": 1}}
    assert run_p(own, given, "loose").value == {"more": 1}
    assert run_p(own, given, "strict").json == {"detail": "Unknown parameter: more"}
    taken = {"parameters": {"text": "t", "inputs": 1}}  # which is the gateway's to give
    assert run_p(own, taken, "loose").json == {"detail": "Unknown parameter: inputs"}


def test_of_two_functions_of_a_name_the_first_counts(typed: LocalGateway) -> None:
    assert run_p(typed, {"parameters": {"s": "x"}}).status == 200


def test_deleting_an_unknown_secret_is_no_error(own: LocalGateway) -> None:
    assert ask(own, "DELETE", "/v1/secrets/p/KEY") == Answered(204, "")


# --- Flat inputs ----------------------------------------------------------------------------------


def test_a_flat_gateway_reads_parameters_beside_one_another(
    own: LocalGateway, content_file: Path
) -> None:
    own.flat = True

    def f(text: str, inputs: dict[str, Any]) -> Any:
        return [text, sorted(inputs)]

    own.add_prefab("p", "1.0.0", {"f": f})
    assert run_p(own, {"text": "t"}).value == ["t", []]
    assert run_p(own, {"text": "s3://b/k"}).value == ["s3://b/k", []]  # declared, so no file
    answered = run_p(own, {"parameters": {"text": "t"}, "files": {"video": ["s3://b/k"]}})
    assert (answered.status, answered.json) == (422, {"detail": "Missing required parameter: text"})
    mistyped = run_p(own, {"text": 1}).json
    assert mistyped == {"detail": "Type mismatch for parameter text: expected string"}
    assert run_p(own, {"text": "t", "more": 1}).json == {"detail": "Unknown parameter: more"}
    assert run_p(own, [1]).status == 422
    own.flat = False
    assert run_p(own, {"text": "t"}).json == {"detail": "Missing required parameter: text"}
    with client_of(own) as client:
        files = {"text": [client.upload_input_file(content_file)]}
    assert run_p(own, {"parameters": {"text": "t"}, "files": files}).value == ["t", ["text"]]


def test_a_flat_gateway_takes_files_as_values(own: LocalGateway, content_file: Path) -> None:
    def f(inputs: dict[str, list[Path]], text: str = "") -> Any:
        return {key: [path.read_text() for path in paths] for key, paths in inputs.items()}

    own.add_prefab("p", "1.0.0", {"f": f})
    own.flat = True
    with client_of(own) as client:
        url = client.upload_input_file(content_file)
    assert run_p(own, {"one": url, "two": [url, url], "text": "t"}).value == {
        "one": ["content"], "two": ["content", "content"]
    }  # fmt: skip
    for no_file in (["t", url], [], [url, 1]):
        assert run_p(own, {"one": no_file}).json == {"detail": "Unknown parameter: one"}
    gone = run_p(own, {"one": "s3://local/agent-inputs/gone"}).json
    assert gone["results"][0]["error"]["type"] == "InputFileNotFound"


READ_FILES = """from pathlib import Path
def f(video, more=None):
    return [Path(path).read_text() for path in [video, *(more or [])]]
"""


def test_an_input_file_of_a_flat_gateway_is_a_path_for_the_function(
    tmp_path: Path, content_file: Path
) -> None:
    files = [{"name": name, "type": "InputFile"} for name in ("video", "more")]
    files[1]["required"] = False
    folder = make_folder(tmp_path / "p", READ_FILES, {"name": "f", "parameters": files})
    with LocalGateway(folder) as gateway, client_of(gateway) as client:
        gateway.flat = True
        url = client.upload_input_file(content_file)
        assert run_p(gateway, {"video": url}).value == ["content"]
        assert run_p(gateway, {"video": url, "more": [url, url]}).value == ["content"] * 3
        assert run_p(gateway, {}).json == {"detail": "Missing required parameter: video"}


# --- Prefab folders -------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [
    {"src/main.py": "from .utils.x import f", "src/utils/x.py": "def f(): return 1"},
    {"src/main.py": "from src.utils.x import f", "src/utils/x.py": "def f(): return 1"},
    {"src/__init__.py": "from .main import f", "src/main.py": "from .x import f",
     "src/x.py": "def f(): return 1"},
    {"src/main.py": "from x import f", "src/x.py": "def f(): return 1"},
    {"src/main.py": "from utils.x import f", "utils/x.py": "def f(): return 1"},
    {"src/main.py": "from .types import f", "src/types.py": "def f(): return 1"},
    {"src/main.py": "import json, queue\ndef f(): return 1", "src/queue.py": "1 / 0"},
], ids=lambda files: files["src/main.py"])  # fmt: skip
def test_a_folder_is_imported_as_a_package(
    files: dict[str, str], tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    make_folder(tmp_path, "", "f")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with LocalGateway(tmp_path) as gateway:
        answered = run_p(gateway, {})
        assert answered.status == 200, answered.text
        assert answered.value == 1
    assert sorted(tmp_path.rglob("*")) == before  # no `__pycache__`


def test_another_package_named_src_is_not_taken_for_the_folders(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "site" / "src").mkdir(parents=True)
    (tmp_path / "site" / "src" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with LocalGateway(make_folder(tmp_path / "p", "def f(): return 1", "f")) as gateway:
        assert run_p(gateway, {}).value == 1


def test_a_folder_runs_in_its_own_environment(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "import only_there\ndef f(): return only_there.__file__", "f")
    venv.create(folder / ".venv", symlinks=os.name != "nt")
    (packages,) = (folder / ".venv").rglob("site-packages")
    (packages / "only_there.py").write_text("")
    with LocalGateway(folder) as gateway:
        assert run_p(gateway, {}).value == str(packages.resolve() / "only_there.py")
        shutil.rmtree(folder / ".venv")
        assert "No module named 'only_there'" in run_p(gateway, {}).text
        (folder / ".venv").mkdir()  # which is broken: its interpreter is named
        assert ".venv" in run_p(gateway, {}).text


FILES = """import os
from pathlib import Path
def f():
    given = {path.parent.name: path.read_text() for path in Path("data/inputs").rglob("*.txt")}
    for path in Path("data/inputs").rglob("*.txt"):
        path.write_text("changed")
    Path("data/outputs/result.txt").write_text("made")
    return [given, os.listdir(".")]
"""


def test_a_folder_has_its_files_in_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with LocalGateway(make_folder(tmp_path, FILES, "f")) as gateway, client_of(gateway) as client:
        url = client.upload_input_file(tmp_path / "a.txt")
        for _ in range(2):  # what it does to its inputs does not change them
            result = client.run("p", "1.0.0", "f", files={"video": [url]})
            assert result.get_function_result() == [{"video": "text"}, ["data"]]
        (made,) = result.get_files()["output"]
        client.download_file(made, tmp_path / "back.txt")
    assert (tmp_path / "back.txt").read_text() == "made"


# --- Prefabs under work ---------------------------------------------------------------------------


def test_a_changed_manifest_or_source_counts_at_the_next_call(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "def f(): return 1", "f")
    with LocalGateway(folder) as gateway, client_of(gateway) as client:
        assert run_p(gateway, {}).value == 1
        (folder / "src" / "main.py").write_text("def f(): return 2")
        assert run_p(gateway, {}).value == 2
        make_folder(folder, "def g(): return 3", "g")
        assert run_p(gateway, {}, "g").value == 3
        assert run_p(gateway, {}, "f").status == 404
        make_folder(folder, "def g(): return 4", "g", version="2.0.0")
        assert client.run("p", "2.0.0", "g").get_function_result() == 4
        with pytest.raises(PrefabNotFoundError):
            client.run("p", "1.0.0", "g")
        listed = [(prefab.prefab_id, prefab.version) for prefab in client.list_prefabs()]
        assert listed[0] == ("p", "2.0.0")
        assert ("p", "1.0.0") not in listed


GOOD = {"id": "p", "version": "1.0.0", "functions": [{"name": "f"}]}


def with_function(**fields: Any) -> dict[str, Any]:
    return {**GOOD, "functions": [{"name": "f", **fields}]}


@pytest.mark.parametrize(("manifest", "problem"), [
    ({}, "id is missing; version is missing; functions is missing"),
    ({**GOOD, "version": 1.0}, "version must be a string, not 1.0"),
    ({**GOOD, "id": None}, "id must be a string, not null"),
    ({**GOOD, "secrets": None}, "secrets must be an array, not null"),
    ({**GOOD, "functions": {"f": {}}}, 'functions must be an array, not {"f": {}}'),
    ({**GOOD, "functions": ["f"]}, 'functions[0] must be an object, not "f"'),
    ({**GOOD, "functions": [{"description": "x"}]}, "functions[0].name is missing"),
    (with_function(secrets=None), "functions[0].secrets must be an array, not null"),
    (with_function(secrets=["KEY"]), 'functions[0].secrets[0] must be an object, not "KEY"'),
    (with_function(secrets=[{}]), "functions[0].secrets[0].name is missing"),
    (with_function(parameters={"t": "string"}), "functions[0].parameters must be an array"),
    (with_function(parameters=[{"name": "t", "required": "no"}]),
     'functions[0].parameters[0].required must be true or false, not "no"'),
    (with_function(parameters=[{"name": "t", "type": ["string", "null"]}]),
     'functions[0].parameters[0].type must be a string, not ["string", "null"]'),
    ([GOOD], "the whole must be an object"),
    (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "it begins with a byte order mark"),
    (json.dumps(GOOD).encode("utf-16"), "it is not UTF-8"),
    # CPython and PyPy word it differently, and both tell the place.
    (b'{"id": "p",\n "version" "1.0.0"}', ": line 2 column 12"),
    (b"", "it is not JSON"),
    (b"[" * 100_000, "it is not JSON"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_bad_manifest_is_named_with_its_file_and_field(
    manifest: Any, problem: str, tmp_path: Path, caplog: Any
) -> None:
    folder = make_folder(tmp_path, "def f(): return 1", "f")
    path = folder / "prefab-manifest.json"
    good = path.read_bytes()
    bad = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    with LocalGateway(folder) as gateway, client_of(gateway) as client:
        path.write_bytes(bad)
        before = len(client.list_prefabs("deployed"))  # the directory is still there
        assert before > 1
        (failed,) = client.list_prefabs("failed")
        assert failed.raw["deployment_error"].startswith(f"{path} cannot be used: ")
        with pytest.raises(ServiceUnavailableError, match=re.escape(problem)):
            client.run("p", "1.0.0", "f")
        assert client.run("text-tools", "1.1.0", "echo", {"value": 1}).is_success()
        (told,) = [record.message for record in caplog.records]
        assert told.startswith(f"{path} cannot be used: ")
        assert problem in told
        path.write_bytes(good)
        assert client.list_prefabs("failed") == []
        assert client.get_prefab_spec("p", "1.0.0") == GOOD
    path.write_bytes(bad)
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be used: ")):
        LocalGateway(folder)


def test_a_folder_without_a_manifest_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "prefab-manifest.json"))):
        LocalGateway(tmp_path)
    make_folder(tmp_path, "def f(): return 1", "f")
    with LocalGateway(tmp_path) as gateway:
        (tmp_path / "prefab-manifest.json").unlink()
        for _ in range(2):
            assert "No such file" in run_p(gateway, {}).text
        make_folder(tmp_path, "def f(): return 2", "f")
        assert run_p(gateway, {}).value == 2


RAISING = """import sys
def f(): return deeper()
def deeper(): raise KeyError("oops")
def g():
    yield 1
    raise KeyError("oops")
def unprintable(): return f
def leaves(): sys.exit(3)
def stops(): breakpoint()
"""


@pytest.mark.parametrize(("function", "last", "lines"), [
    ("f", "KeyError: 'oops'", ["return deeper()", 'raise KeyError("oops")']),
    ("g", "KeyError: 'oops'", ['raise KeyError("oops")']),
    ("unprintable", "TypeError: Object of type function is not JSON serializable", []),
    ("missing", "AttributeError: module 'src.main' has no attribute 'missing'", []),
    ("leaves", "its process ended with status 3", []),
    ("stops", "RuntimeError: breakpoint() has no terminal here: use LocalGateway.add_prefab()",
     ["breakpoint()"]),
])  # fmt: skip
def test_an_error_of_a_folder_is_logged_with_its_own_traceback(
    function: str, last: str, lines: list[str], tmp_path: Path, caplog: Any
) -> None:
    folder = make_folder(tmp_path, RAISING, "f", "g", "unprintable", "missing", "leaves", "stops")
    with LocalGateway(folder) as gateway, client_of(gateway) as client:
        with contextlib.suppress(GatewayError):
            client.run("p", "1.0.0", function)
    (told,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert told.startswith(f"p 1.0.0, {function} failed\n")
    # From 3.14 on, an error of `json` has notes, which stand below it.
    assert f"\n{last}\n" in f"{told}\n"
    assert [line for line in lines if line not in told] == []
    places = re.findall(r'File "(.*?)"', told)
    assert len(places) >= len(lines)
    assert places[: len(lines)] == [str(folder.resolve() / "src" / "main.py")] * len(lines)
    assert "importlib" not in told


def test_an_error_of_a_python_function_is_logged_with_its_own_traceback(
    own: LocalGateway, caplog: Any
) -> None:
    def fails() -> None:
        raise KeyError("oops")

    def streams() -> Iterator[int]:
        yield 1
        fails()

    def refuses() -> None:
        raise CallFailed("meant so")

    functions = {"fails": fails, "streams": streams, "refuses": refuses, "odd": lambda: object()}
    own.add_prefab("p", "1.0.0", functions)
    answered = [run_p(own, {}, name).status for name in functions]
    assert answered == [503, 200, 200, 503]
    first, second, third = [record.message for record in caplog.records]
    for told, name in ((first, "fails"), (second, "streams"), (third, "odd")):
        assert told.startswith(f"p 1.0.0, {name} failed\nTraceback (most recent call last):\n")
        assert name == "odd" or __file__ in told.splitlines()[2]
    assert str(PROGRAM) not in first + second
    # From 3.14 on, notes stand below it.
    assert "\nTypeError: Object of type object is not JSON serializable" in third


BREAKPOINT = """
def f(text):
    breakpoint()
    return text

with LocalGateway() as gateway:
    gateway.add_prefab("p", "1.0.0", {"f": f})
    client = GatewayClient(gateway.base_url, internal_token=gateway.internal_token)
    print(client.run("p", "1.0.0", "f", {"text": "typed"}).get_function_result())
"""


def test_a_breakpoint_stops_in_a_python_function(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    imports = "from gateway_sdk import GatewayClient\nfrom local_gateway import LocalGateway\n"
    script.write_text(imports + BREAKPOINT)
    environment = environment_for(None, PYTHONPATH=os.pathsep.join([str(ROOT), str(EXAMPLES)]))
    ended = ended_python(script, stdin=b"p text * 2\ncontinue\n", env=environment)
    assert ended.status == 0, ended.err
    assert "'typedtyped'" in ended.out
    assert ended.out.endswith("typed\n")


# --- Nothing is left behind -----------------------------------------------------------------------

# The function and what it has started have a pipe open: when both are dead, it ends.
HANGING = """import subprocess, sys, time
def hang(fifo):
    end = open(fifo, "w")
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], stdout=end)
    end.write("running")
    end.flush()
    time.sleep(1000)
def stream(fifo):
    yield "begun"
    hang(fifo)
def started(fifo):
    end = open(fifo, "w")
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], stdout=end)
    return 1
def patient(fifo):
    line = open(fifo).readline()
    open(fifo + ".seen", "w").write(line)
"""


class Fifo:
    """A named pipe, which ends when all processes are dead that have opened it for writing."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def wait(self) -> None:
        assert select.select([self.reader], [], [], WAIT_SECONDS)[0], "nothing came, and no end"

    def has_begun(self) -> bool:
        self.wait()
        return os.read(self.reader, 7) == b"running"

    def has_ended(self) -> bool:
        while True:
            try:
                if not os.read(self.reader, 7):
                    return True
            except BlockingIOError:
                self.wait()


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    opened = Fifo(tmp_path / "fifo")
    yield opened
    os.close(opened.reader)


@pytest.fixture
def hanging(tmp_path: Path) -> Path:
    names = ("hang", "stream", "started", "patient")
    entries = [{"name": name, "parameters": [{"name": "fifo"}]} for name in names]
    return make_folder(tmp_path / "hanging", HANGING, *entries)


@needs_fifo
def test_a_process_dies_when_its_stream_is_left(hanging: Path, fifo: Fifo, caplog: Any) -> None:
    with LocalGateway(hanging) as gateway, client_of(gateway) as client:
        with client.run("p", "1.0.0", "stream", {"fifo": fifo.path}, stream=True) as stream:
            assert fifo.has_begun()
            assert [next(stream).type for _ in range(2)] == ["start", "content"]
        assert fifo.has_ended()
    assert caplog.records == []  # nothing has failed


@needs_fifo
@pytest.mark.parametrize("function", ["hang", "stream"])
def test_a_process_dies_when_its_time_is_up(function: str, hanging: Path, fifo: Fifo) -> None:
    with LocalGateway(hanging) as gateway, client_of(gateway) as client:
        gateway.call_seconds = 0.5
        try:
            result = client.run("p", "1.0.0", function, {"fifo": fifo.path})
            assert result.error
            told = result.error["message"]
        except ServiceUnavailableError as error:
            told = error.message
        assert "it took longer than 0.5 seconds" in told
        assert fifo.has_ended()


@needs_fifo
@pytest.mark.parametrize("function", ["hang", "stream"])
def test_a_process_dies_with_the_gateway(
    function: str, hanging: Path, fifo: Fifo, temporary: Path, caplog: Any
) -> None:
    def call() -> None:
        with client_of(gateway) as client, contextlib.suppress(GatewayError):
            client.run("p", "1.0.0", function, {"fifo": fifo.path})

    with LocalGateway(hanging) as gateway:
        thread = threading.Thread(target=call)
        thread.start()
        assert fifo.has_begun()
    assert fifo.has_ended()
    thread.join(WAIT_SECONDS)
    assert list(temporary.iterdir()) == []
    assert caplog.records == []


@needs_fifo
def test_a_call_that_does_not_stream_runs_to_its_end(
    hanging: Path, fifo: Fifo, tmp_path: Path
) -> None:
    gate, seen = tmp_path / "gate", tmp_path / "gate.seen"
    os.mkfifo(gate)
    with LocalGateway(hanging) as gateway, client_of(gateway) as client:
        with pytest.raises(GatewayTimeoutError):
            client.run("p", "1.0.0", "patient", {"fifo": str(gate)}, timeout=SHORT_SECONDS)
        with client.run("p", "1.0.0", "stream", {"fifo": fifo.path}, stream=True):
            assert fifo.has_begun()
        assert fifo.has_ended()  # so the gateway has seen clients leave since then
        opened = os.open(gate, os.O_RDWR)  # which waits for nobody
        os.write(opened, b"go\n")
        wait_for(lambda: seen.exists() and seen.read_text() == "go\n")
        os.close(opened)


@needs_fifo
def test_what_a_function_leaves_running_dies_with_it(hanging: Path, fifo: Fifo) -> None:
    with LocalGateway(hanging) as gateway:
        assert run_p(gateway, {"parameters": {"fifo": fifo.path}}, "started").value == 1
        assert fifo.has_ended()


@needs_fifo
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_process_dies_with_the_program(
    name: str, hanging: Path, fifo: Fifo, temporary: Path
) -> None:
    environment = environment_for(None, TMPDIR=str(temporary), PYTHONUNBUFFERED="1")
    arguments = [PROGRAM, "--port", "0", "--prefab", hanging, "--token", "t"]
    with started(*arguments, env=environment) as process:
        base_url = process.stdout.readline().decode().strip().partition("=")[2]
        assert process.stdout.readline() == b"export X_INTERNAL_TOKEN=t\n"
        with GatewayClient(base_url, internal_token="t", timeout=WAIT_SECONDS) as client:
            stream = client.run("p", "1.0.0", "stream", {"fifo": fifo.path}, stream=True)
            assert fifo.has_begun()
            process.send_signal(getattr(signal, name))
            assert fifo.has_ended()
            status = process.wait(WAIT_SECONDS)
            stream.close()
        assert b"Traceback" not in process.stderr.read()
    if name != "SIGKILL":
        assert (status, list(temporary.iterdir())) == (0, [])


def test_a_call_leaves_no_folder_behind(tmp_path: Path, temporary: Path) -> None:
    main = "def f(fail): open('data/outputs/x', 'w').close(); 1 / (not fail)"
    entry = {"name": "f", "parameters": [{"name": "fail", "type": "boolean"}]}

    def stream(outputs: Path, fail: bool) -> Iterator[int]:
        yield 1
        (outputs / "x").write_text("x")
        yield 1 // (not fail)

    folder = make_folder(tmp_path / "p", main, entry)
    with LocalGateway(folder) as gateway, client_of(gateway) as client:
        gateway.add_prefab("q", "1.0.0", {"f": stream})
        (own,) = temporary.iterdir()
        for prefab in ("p", "q"):
            with contextlib.suppress(ServiceUnavailableError):
                client.run(prefab, "1.0.0", "f", {"fail": True})
            assert list(own.iterdir()) == []
        with client.run("q", "1.0.0", "f", {"fail": False}, stream=True) as left:
            next(left)
        for prefab in ("p", "q"):
            result = client.run(prefab, "1.0.0", "f", {"fail": False})
            assert len(result.get_file_urls()) == 1
        wait_for(lambda: len(list(own.iterdir())) <= 3)  # the file of the left call may be kept
        assert {len(list(folder.iterdir())) for folder in own.iterdir()} == {1}
    assert list(temporary.iterdir()) == []


def writes_and_gives_no_json(outputs: Path) -> object:
    (outputs / "x").write_text("x")
    return object()


def writes(outputs: Path) -> int:
    (outputs / "x").write_text("x")
    return 1


@pytest.mark.parametrize("names", [["bad"], ["good", "bad"], ["good", "missing"], ["good", "good"]])
def test_of_a_request_that_fails_no_file_is_left_behind(names: list[str], temporary: Path) -> None:
    with LocalGateway() as gateway, client_of(gateway) as client:
        gateway.add_prefab("p", "1.0.0", {"good": writes, "bad": writes_and_gives_no_json})
        calls = [PrefabCall("p", "1.0.0", name) for name in names]
        is_good = names[-1] == "good"
        with contextlib.nullcontext() if is_good else pytest.raises(GatewayError):
            client.run_batch(calls, single_request=True)
        (own,) = temporary.iterdir()
        assert len(list(own.iterdir())) == len(client.list_files()["files"]) == 2 * is_good


def test_of_a_stream_that_is_left_no_file_is_left_behind(temporary: Path) -> None:
    def stream(outputs: Path) -> Iterator[int]:
        (outputs / "x").write_text("x")
        yield 1
        assert gate.wait(WAIT_SECONDS)
        yield 2

    gate = threading.Event()
    with LocalGateway() as gateway, client_of(gateway) as client:
        gateway.add_prefab("p", "1.0.0", {"f": stream})
        with client.run("p", "1.0.0", "f", stream=True) as left:
            assert [next(left).type for _ in range(2)] == ["start", "content"]
        (job,) = gateway._jobs
        wait_for(lambda: job.left)
        gate.set()
        wait_for(lambda: not gateway._jobs)
        (own,) = temporary.iterdir()
        wait_for(lambda: not list(own.iterdir()))
        assert client.list_files()["files"] == []
        # Of one that is read to its end, it is kept.
        assert len(client.run("p", "1.0.0", "f").get_file_urls()) == 1


def test_a_file_that_is_put_again_replaces_the_first(temporary: Path) -> None:
    with LocalGateway() as gateway:
        body = {"filename": "f", "content_type": None}
        answered = ask(gateway, "POST", "/internal/files/generate_upload_url", body, **JSON_TYPE)
        for content in (b"first", b"second"):
            request = urllib.request.Request(answered.json["upload_url"], content, method="PUT")
            request.add_header("Content-Type", "")
            urllib.request.urlopen(request).close()
        (kept,) = temporary.rglob("f")
        assert kept.read_bytes() == b"second"


# --- What expires ---------------------------------------------------------------------------------


def open_url(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=WAIT_SECONDS) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_signed_url_is_refused_when_its_time_is_up(
    method: str, own: LocalGateway, content_file: Path
) -> None:
    with client_of(own) as client:
        s3_url = client.upload_file(content_file)["s3_url"]

    def answer_of(seconds: int) -> Answered:
        url = own.storage.presign(own.base_url, method, s3_url, seconds)
        return ask(own, method, url[len(own.base_url) :])

    assert answer_of(60).status == 200
    late = answer_of(-1)
    assert late.status == 403
    assert "Request has expired" in late.text


def test_a_signed_url_lasts_as_long_as_was_asked_for(own: LocalGateway, content_file: Path) -> None:
    with client_of(own) as client:
        s3_url = client.upload_file(content_file)["s3_url"]
        for seconds in (1, 100_000):
            url = client.get_presigned_url(s3_url, expires_in=seconds)
            (expires,) = parse_qs(urlsplit(url).query)["Expires"]
            assert float(expires) - time.time() == pytest.approx(seconds, abs=WAIT_SECONDS / 20)
        later = url.replace(f"Expires={expires}", f"Expires={float(expires) + 1:.3f}")
        assert open_url(later)[0] == 403  # the time is part of what is signed


def test_a_temporary_file_is_gone_when_its_time_is_up(
    temporary: Path, content_file: Path, monkeypatch: Patch
) -> None:
    now = time.time
    with LocalGateway() as gateway, client_of(gateway) as client:
        short = client.upload_temp_file(content_file, 100)["s3_url"]
        long = client.upload_temp_file(content_file, 1000)["s3_url"]
        url = client.get_presigned_url(short)
        assert {file["s3_url"] for file in client.list_temp_files()["files"]} == {short, long}
        monkeypatch.setattr(time, "time", lambda: now() + 100)
        # No request is needed for it. Not `rglob`: it stumbles over a folder that goes meanwhile.
        wait_for(lambda: sum("content" in names for _, _, names in os.walk(temporary)) == 1)
        assert [file["s3_url"] for file in client.list_temp_files()["files"]] == [long]
        assert open_url(url)[0] == 404
        with pytest.raises(GatewayError, match="File not found"):
            client.get_presigned_url(short)
        assert client.run("file-tools", "1.0.0", "line_count", files={"files": [short]}).error


def test_an_expired_file_is_not_found_even_before_it_is_deleted(own: LocalGateway) -> None:
    now = time.time()
    urls = [own.storage.new_url("folder", "f") for _ in range(2)]
    for url, expires_at in zip(urls, (now - 1, now + 1000)):
        own.storage._files[url] = local_gateway.StoredFile(url, Path(__file__), expires_at)
    assert (own.storage.find(urls[0]), own.storage.find(urls[1])) != (None, None)
    assert [stored.s3_url for stored in own.storage.list("folder")] == urls[1:]
    own.storage._files.clear()


# --- Proxies --------------------------------------------------------------------------------------

NO_ONE = "http://127.0.0.1:9"  # where nothing listens


@pytest.mark.parametrize(("variables", "expected"), [
    ({}, None),
    ({"http_proxy": NO_ONE}, "127.0.0.1,localhost"),
    ({"HTTP_PROXY": NO_ONE}, "127.0.0.1,localhost"),
    ({"ALL_PROXY": NO_ONE}, "127.0.0.1,localhost"),
    ({"http_proxy": NO_ONE, "NO_PROXY": "corp.example"}, "127.0.0.1,localhost,corp.example"),
    ({"http_proxy": NO_ONE, "no_proxy": "a b"}, "127.0.0.1,localhost,a b"),
    ({"http_proxy": NO_ONE, "no_proxy": "127.0.0.1"}, None),
    ({"http_proxy": NO_ONE, "NO_PROXY": "*"}, None),
    ({"https_proxy": NO_ONE}, None),
], ids=str)  # fmt: skip
def test_a_proxy_is_left_out_for_this_machine(
    variables: dict[str, str], expected: str | None, monkeypatch: Patch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with local_gateway.environment() as gateway, GatewayClient.from_env() as client:
        assert gateway
        assert client.list_prefabs()
        names = [os.environ.get("NO_PROXY"), os.environ.get("no_proxy")]
        assert names == [expected] * 2 if expected else dict(os.environ).items() >= before.items()
    assert dict(os.environ) == before


# --- The program ----------------------------------------------------------------------------------


def printed_by(process: Any, count: int) -> list[str]:
    return [process.stdout.readline().decode().rstrip("\n") for _ in range(count)]


def test_the_program_prints_lines_for_a_shell(tmp_path: Path) -> None:
    proxies = {"http_proxy": NO_ONE, "no_proxy": "a;exit 3"}
    environment = environment_for(None, TMPDIR=str(tmp_path), **proxies)
    with started(PROGRAM, "--port", "0", "--host", "0.0.0.0", env=environment) as process:
        lines = printed_by(process, 4)
        told = [process.stderr.readline().decode() for _ in range(4)]
        command = "\n".join([*lines, f'"{sys.executable}" "{ROOT / "gateway_sdk.py"}" list'])
        shell = ["sh", "-ec", command]
        done = subprocess.run(shell, capture_output=True, env=environment, check=True)
        assert json.loads(done.stdout)[0]["id"] == "text-tools"
    names = [line.partition("=")[0].partition(" ")[2] for line in lines]
    assert names == ["GATEWAY_BASE_URL", "X_INTERNAL_TOKEN", "NO_PROXY", "no_proxy"]
    assert [line.partition("=")[0] for line in told[1:3]] == [
        "AGENT_BUILDER_API_KEY", "GATEWAY_JWT_TOKEN"
    ]  # fmt: skip
    assert "this machine's name" in told[3]


def test_the_program_names_a_bad_folder_and_serves_the_others(tmp_path: Path) -> None:
    good = make_folder(tmp_path / "good", "def f(): return 1", "f")
    bad = make_folder(tmp_path / "bad", "def f(): return 2", "f", id="q", version=1.0)
    folders = [argument for folder in (bad, good, tmp_path) for argument in ("--prefab", folder)]
    arguments = [PROGRAM, "--port", "0", "--token", "t", *folders]
    with started(*arguments, env=environment_for(None, TMPDIR=str(tmp_path))) as process:
        told = [process.stderr.readline().decode() for _ in range(2)]
        assert f"{bad / 'prefab-manifest.json'} cannot be used: version must be a string" in told[0]
        assert f"No such file or directory: '{tmp_path / 'prefab-manifest.json'}'" in told[1]
        base_url = printed_by(process, 1)[0].partition("=")[2]
        with GatewayClient(base_url, internal_token="t") as client:
            assert client.run("p", "1.0.0", "f").get_function_result() == 1
            make_folder(bad, "def f(): return 3", "f", id="q")
            assert client.run("q", "1.0.0", "f").get_function_result() == 3


@pytest.mark.parametrize(("arguments", "told"), [
    (["--port", "99999"], "a port is a number from 0 to 65535, not 99999"),
    (["--port", "PORT"], r"127\.0\.0\.1:\d+: .*in use.* \(--port 0 takes any free port\)"),
    (["--port", "0", "--token", "a b"], "a token has no blanks"),
    (["--port", "0", "--host", "no.such.host.invalid"], r"no\.such\.host\.invalid:0: "),
    (["--port", "0", "--host", "192.0.2.1"], r"192\.0\.2\.1:0: "),
], ids=lambda value: str(value))  # fmt: skip
def test_the_program_says_in_a_sentence_why_it_cannot_start(
    arguments: list[str], told: str, gateway: LocalGateway, temporary: Path, capsys: Any
) -> None:
    port = str(urlsplit(gateway.base_url).port)
    given = [port if argument == "PORT" else argument for argument in arguments]
    assert local_gateway.main(given) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"local_gateway: .*{told}.*\n", err), err
    assert list(temporary.iterdir()) == []
