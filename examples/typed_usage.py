"""What the types of the installed package say: to be checked by mypy or pyright, not to be run.

`assert_type` is an error of the type checker where a type is not precisely this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gateway_sdk.exceptions import GatewayError, MissingSecretError
from gateway_sdk.models import PrefabCall, StreamEvent

from gateway_sdk import BatchResult, EventStream, GatewayClient, Prefab, PrefabInfo, PrefabResult

if TYPE_CHECKING:
    from typing import assert_type

    def results(client: GatewayClient, stream: bool) -> None:
        assert_type(client.run("p", "1", "f"), PrefabResult)
        assert_type(client.run("p", "1", "f", {}, None, False), PrefabResult)
        assert_type(
            client.run("p", "1", "f", {"a": 1}, {"in": ["s3://b/k"]}, stream=True), EventStream
        )
        assert_type(client.run("p", "1", "f", {}, None, True), EventStream)
        assert_type(client.run("p", "1", "f", stream=stream), PrefabResult | EventStream)
        assert_type(client.run_batch([PrefabCall("p", "1", "f", {})]), BatchResult)
        assert_type(client.list_prefabs(), list[PrefabInfo])
        assert_type(client.prefab("p", "1"), Prefab)
        assert_type(client.prefab("p", "1").chat(messages=[]), PrefabResult)
        assert_type(client.prefab("p", "1").stream("chat"), EventStream)
        assert_type(client.upload_input_file("a.txt"), str)
        assert_type(client.upload_file("a.txt"), dict[str, Any])
        assert_type(client.iter_files(), Iterator[dict[str, Any]])
        assert_type(client.cleanup_temp_files("s"), int)
        for event in client.run("p", "1", "f", stream=True):
            assert_type(event, StreamEvent)
        with client.temp_session() as session, client.run("p", "1", "f", stream=True) as events:
            assert_type(session, str)
            assert_type(next(events), StreamEvent)

    class Agent(GatewayClient):
        pass

    with Agent.from_env() as agent:
        assert_type(agent, Agent)

    def errors(error: GatewayError) -> None:
        assert_type(error.status_code, int | None)
        if isinstance(error, MissingSecretError):
            assert_type(error.secret_name, str)
