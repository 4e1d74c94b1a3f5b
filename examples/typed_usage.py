"""What the types of the installed package say: to be checked by mypy or pyright, not to be run.

`assert_type` is an error of the type checker where a type is not precisely this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gateway_sdk.exceptions import GatewayError, MissingSecretError
from gateway_sdk.models import PrefabCall, StreamEvent

from gateway_sdk import (
    AsyncEventStream,
    AsyncGatewayClient,
    BatchResult,
    EventStream,
    GatewayClient,
    Prefab,
    PrefabInfo,
    PrefabResult,
)

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
        assert_type(EventStream([StreamEvent.from_dict({"type": "done"})]), EventStream)
        assert_type(PrefabResult.from_events(client.run("p", "1", "f", stream=True)), PrefabResult)
        assert_type(PrefabResult("SUCCESS").to_dict(), dict[str, Any])
        assert_type(client.internal_token, str | None)
        assert_type(client.close(cancel=True), None)

    def options(trace: str) -> None:
        GatewayClient(headers={"traceparent": trace})
        GatewayClient.from_env(headers=lambda: {"traceparent": trace})
        AsyncGatewayClient(headers={"traceparent": trace}, max_workers=5)
        GatewayClient(max_workers=5)  # type: ignore[call-arg]

    async def awaited(client: AsyncGatewayClient, stream: bool) -> None:
        files = {"in": ["s3://b/k"]}
        assert_type(await client.run("p", "1", "f"), PrefabResult)
        assert_type(await client.run("p", "1", "f", {}, None, False, timeout=5), PrefabResult)
        assert_type(await client.run("p", "1", "f", {"a": 1}, files, stream=True), AsyncEventStream)
        assert_type(await client.run("p", "1", "f", {}, None, True), AsyncEventStream)
        either = await client.run("p", "1", "f", stream=stream)
        assert_type(either, PrefabResult | AsyncEventStream)
        assert_type(await client.run_batch([PrefabCall("p", "1", "f", {})]), BatchResult)
        assert_type(await client.list_prefabs(status="deployed"), list[PrefabInfo])
        assert_type(await client.get_prefab_spec("p"), dict[str, Any])
        assert_type(await client.set_secret("p", "KEY", "value"), None)
        assert_type(await client.list_secrets(), list[dict[str, str]])
        assert_type(await client.upload_input_file("a.txt", "text/plain"), str)
        assert_type(await client.upload_temp_file("a.txt", session_id="s"), dict[str, Any])
        assert_type(await client.download_file("s3://b/k", "a.txt"), None)
        assert_type(await client.get_presigned_url("s3://b/k", expires_in=60), str)
        assert_type(await client.list_files(10), dict[str, Any])
        assert_type(await client.cleanup_temp_files("s"), int)
        assert_type(await client.close(), None)
        assert_type(client.base_url, str)
        # Arguments are checked as those of the other client are.
        await client.list_files("many")  # type: ignore[arg-type]
        await client.cleanup_temp_files()  # type: ignore[call-arg]

    async def awaited_streams(client: AsyncGatewayClient) -> None:
        prefab = client.prefab("p", "1")
        assert_type(await prefab.chat(messages=[]), PrefabResult)
        assert_type(await prefab.call("chat", files={"in": ["s3://b/k"]}), PrefabResult)
        assert_type(await prefab.stream("chat", messages=[]), AsyncEventStream)
        async with await client.run("p", "1", "f", stream=True) as events:
            assert_type(events, AsyncEventStream)
            async for event in events:
                assert_type(event, StreamEvent)
            assert_type(await events.close(), None)
        async for file in client.iter_files():
            assert_type(file, dict[str, Any])
        async with client.temp_session() as session:
            assert_type(session, str)
            async for file in client.iter_temp_files(session, page_size=10):
                assert_type(file, dict[str, Any])

    class AsyncAgent(AsyncGatewayClient):
        pass

    async def made() -> None:
        assert_type(await AsyncAgent.from_env(max_workers=5), AsyncAgent)
        async with await AsyncAgent.from_api_key("key", timeout=None) as agent:
            assert_type(agent, AsyncAgent)
        async with AsyncAgent(internal_token="token") as agent:
            assert_type(agent, AsyncAgent)

    class Agent(GatewayClient):
        pass

    with Agent.from_env() as agent:
        assert_type(agent, Agent)

    def errors(error: GatewayError) -> None:
        assert_type(error.status_code, int | None)
        assert_type(error.request_id, str | None)
        assert_type(error.may_have_run, bool)
        if isinstance(error, MissingSecretError):
            assert_type(error.secret_name, str)
