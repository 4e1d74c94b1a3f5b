"""Tests of `fastapi_agent.py`, which runs in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLES, Gated, len_of, wait_for
from local_gateway import LocalGateway

from gateway_sdk import GatewayClient, GatewayTimeoutError, ServiceUnavailableError
from test_gateway_sdk import (
    HEAD,
    TOKEN,
    WAIT_SECONDS,
    HangUp,
    Pause,
    Received,
    Routed,
    Script,
    async_client_of,
    chunk,
    client_of,
    environment_for,
    event,
    ran,
    run,
)

needs_fastapi = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))),
    reason="needs fastapi and uvicorn",
)


class Agent:
    """The example in a process of its own, and requests to it."""

    def __init__(self, gateway: Any) -> None:
        self.gateway = gateway
        self.log: list[str] = []

    def __enter__(self) -> Agent:
        command = [sys.executable, "-X", "dev", str(EXAMPLES / "fastapi_agent.py")]
        environment = environment_for(self.gateway, PORT="0", PYTHONUNBUFFERED="1")
        del environment["X_INTERNAL_TOKEN"]  # the tokens are those of its callers
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        for line in self.process.stdout:
            self.log.append(line)
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise AssertionError("".join(self.log))
        self._reader = threading.Thread(
            target=self.log.extend, args=[self.process.stdout], daemon=True
        )
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(WAIT_SECONDS)
        self._reader.join(WAIT_SECONDS)
        self.process.stdout.close()

    @contextlib.contextmanager
    def post(
        self, path: str, content: Any, token: str | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer; the connection is closed at the end, read to its end or not."""
        token = getattr(self.gateway, "internal_token", TOKEN) if token is None else token
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "X-Internal-Token": token}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        with contextlib.closing(connection):
            connection.request(
                "POST", path, body, {name: value for name, value in headers.items() if value}
            )
            with connection.getresponse() as response:
                yield response


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with LocalGateway() as gateway, Agent(gateway) as running:
        yield running


def read_event(response: http.client.HTTPResponse) -> dict[str, Any]:
    """The next event, which must have arrived whole before the one after it is made."""
    line = response.readline()
    assert line.startswith(b"data: "), line
    assert response.readline() == b"\n"
    return json.loads(line[6:])


@needs_fastapi
def test_the_agent_answers_with_what_its_prefab_found(agent: Agent) -> None:
    with agent.post("/statistics", {"text": "a b c"}) as response:
        assert (response.status, json.load(response)["words"]) == (200, 3)
    assert agent.gateway.requests[-1].headers["x-internal-token"] == agent.gateway.internal_token


@needs_fastapi
def test_the_agent_passes_each_event_on_at_once(agent: Agent) -> None:
    gated = Gated()
    agent.gateway.add_prefab("text-tools", "1.1.0", {"words": gated.words})
    with agent.post("/words", {"text": "one two"}) as response:
        assert response.getheader("Content-Type", "").startswith("text/event-stream")
        assert read_event(response)["type"] == "start"
        for word in ("one", "two"):  # the next one is not made before this one was read here
            gated.gate.release()
            assert read_event(response)["data"] == word
        assert read_event(response)["type"] == "done"
        assert response.read() == b""


@needs_fastapi
def test_the_agent_serves_others_while_a_stream_waits(agent: Agent) -> None:
    gated = Gated()
    agent.gateway.add_prefab("text-tools", "1.1.0", {"words": gated.words, "statistics": len_of})
    with contextlib.ExitStack() as open_streams:
        for _ in range(50):  # more than asyncio's own threads
            response = open_streams.enter_context(agent.post("/words", {"text": "one"}))
            assert read_event(response)["type"] == "start"
        with agent.post("/statistics", {"text": "a b c"}) as response:
            assert json.load(response) == 5
        gated.gate.release(50)


@needs_fastapi
def test_the_agent_closes_the_upstream_stream_when_its_caller_hangs_up(agent: Agent) -> None:
    gated = Gated()
    agent.gateway.add_prefab("file-tools", "1.0.0", {"inspect": gated.inspect})
    with client_of(agent.gateway) as client:
        with agent.post("/inspect", b"some text") as response:
            assert read_event(response)["type"] == "start"
            gated.gate.release()
            assert read_event(response)["data"] == "some text"
            assert len(client.list_temp_files()["files"]) == 1
        # The function now waits and sends nothing: only the agent can know that its caller is gone.
        wait_for(lambda: any(r.method == "DELETE" for r in agent.gateway.requests))
        assert client.list_temp_files()["files"] == []
    gated.gate.release(1000)
    assert gated.cut_off.wait(WAIT_SECONDS)


@needs_fastapi
def test_silent_streams_whose_callers_have_left_are_closed_however_many_they_are() -> None:
    def choose(received: Received) -> Any:
        is_stream = b'"words"' in received.body
        return Pause(HEAD + chunk(event("start"))) if is_stream else ran(3)

    with Routed(choose) as gateway, Agent(gateway) as agent:
        with contextlib.ExitStack() as callers:
            for _ in range(200):
                response = callers.enter_context(agent.post("/words", {"text": "one"}))
                assert read_event(response)["type"] == "start"
        gateway.wait_until(lambda: gateway.open_connections == 0)
        with agent.post("/statistics", {"text": "a b c"}) as response:
            assert json.load(response) == 3


@needs_fastapi
def test_the_agent_cleans_up_after_a_stream_and_after_a_refusal(agent: Agent) -> None:
    def count_deletes() -> int:
        return sum(r.method == "DELETE" and "session_id=" in r.path for r in agent.gateway.requests)

    def nothing(inputs: dict[str, list[Path]]) -> Iterator[str]:
        yield from ()

    for functions, status in (({"inspect": nothing}, 200), ({"other": nothing}, 502)):
        agent.gateway.add_prefab("file-tools", "1.0.0", functions)
        before = count_deletes()
        with agent.post("/inspect", b"some text") as response:
            assert response.status == status
            response.read()
        wait_for(lambda: count_deletes() == before + 1)  # noqa: B023 - called at once


@needs_fastapi
@pytest.mark.parametrize(("function", "token", "path", "status", "error"), [
    (len_of, "", "/statistics", 401, None),
    (len_of, "stranger", "/statistics", 401, "AuthenticationError"),
    (len_of, "stranger", "/words", 401, "AuthenticationError"),
    (len_of, "an API key's", "/inspect", 403, "AgentContextRequiredError"),
    (lambda secrets, text: None, None, "/statistics", 409, "MissingSecretError"),
    (lambda text, more: None, None, "/statistics", 422, "ValidationError"),
    ("over the quota", None, "/statistics", 429, "QuotaExceededError"),
    (lambda text: 1 / 0, None, "/statistics", 503, "ServiceUnavailableError"),
    (None, None, "/statistics", 502, "PrefabNotFoundError"),
])
def test_the_agent_answers_errors_with_a_fitting_status(
        agent: Agent, monkeypatch: Any, function: Any, token: str | None, path: str, status: int,
        error: str | None
) -> None:
    if function == "over the quota":
        monkeypatch.setattr(agent.gateway, "quota", 0)
        function = len_of
    secrets = ["KEY"] if error == "MissingSecretError" else []
    functions = {"statistics": function, "words": function} if function else {"other": len_of}
    agent.gateway.add_prefab("text-tools", "1.1.0", functions, secrets=secrets)
    if token == "an API key's":
        exchanging = GatewayClient.from_api_key(agent.gateway.api_key, agent.gateway.base_url)
        token = exchanging.internal_token
    with agent.post(path, {"text": "a b c"}, token) as response:
        assert (response.status, json.load(response).get("error")) == (status, error)


@needs_fastapi
def test_the_agent_tells_a_timeout_from_other_faults() -> None:
    import fastapi_agent

    for error, status in ((GatewayTimeoutError("late"), 504),
                          (ServiceUnavailableError("down"), 503)):
        request: Any = None  # which it does not look at
        assert asyncio.run(fastapi_agent.answer_error(request, error)).status_code == status


@needs_fastapi
def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    import fastapi_agent

    async def read() -> list[Any]:
        async with async_client_of(server) as client, await run(client, stream=True) as stream:
            return [json.loads(text[6:]) async for text in fastapi_agent.server_sent_events(stream)]

    with Script(HangUp(HEAD + chunk(event("content", "half")))) as server:
        half, broken = asyncio.run(read())
    assert half["data"] == "half"
    assert (broken["type"], broken["data"]["type"]) == ("error", "ServiceUnavailableError")


@needs_fastapi
def test_the_agent_logs_no_tokens_and_no_tracebacks(agent: Agent) -> None:
    with agent.post("/statistics", {"text": "a"}, "not-to-be-logged") as response:
        assert response.status == 401
    wait_for(lambda: sum("401 Unauthorized" in line for line in agent.log))
    log = "".join(agent.log)
    for unwanted in (agent.gateway.internal_token, "not-to-be-logged", "Traceback", "Warning",
                     "never retrieved"):
        assert unwanted not in log, log
