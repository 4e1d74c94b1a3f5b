# /// script
# requires-python = ">=3.9"
# dependencies = ["fastapi>=0.118", "uvicorn"]
# ///
"""An agent as a web service: FastAPI in front, prefabs behind, on behalf of whoever calls it.

    pip install "fastapi>=0.118" uvicorn
    python examples/fastapi_agent.py                    # port 8000, or that of the variable PORT

The token in a request's X-Internal-Token is the one its prefabs are called with. The gateway is
that of GATEWAY_BASE_URL; if that is not set, a local one is started. When a caller hangs up, the
stream from the gateway is closed at once, which stops its prefab.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Body, Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where gateway_sdk.py is

import local_gateway

from gateway_sdk import (
    AgentContextRequiredError,
    AsyncEventStream,
    AsyncGatewayClient,
    AuthenticationError,
    GatewayError,
    GatewayTimeoutError,
    MissingSecretError,
    QuotaExceededError,
    ServiceUnavailableError,
    ValidationError,
)

# What the caller can do something about is a 4xx; the rest is a fault behind this service.
STATUS_OF_ERRORS: list[tuple[type[GatewayError], int]] = [
    (AuthenticationError, 401),
    (AgentContextRequiredError, 403),
    (MissingSecretError, 409),  # the message says how to set it; then the same request works
    (ValidationError, 422),
    (QuotaExceededError, 429),
    (GatewayTimeoutError, 504),  # before its base class
    (ServiceUnavailableError, 503),
    (GatewayError, 502),  # also PrefabNotFoundError: callers do not choose the prefabs here
]

logger = logging.getLogger("agent")


app = FastAPI()


@functools.lru_cache(maxsize=100)
def client_for(token: str) -> AsyncGatewayClient:
    # Open connections and TLS settings belong to a client: who calls again finds them ready. A
    # client that falls out of the cache works on where it is in use, and then closes itself.
    return AsyncGatewayClient(internal_token=token)


async def get_client(x_internal_token: Annotated[str, Header()] = "") -> AsyncGatewayClient:
    if not x_internal_token:  # without one, it would be this machine that calls, not the caller
        raise HTTPException(401, "X-Internal-Token is missing")
    return client_for(x_internal_token)


async def get_cleanup() -> AsyncIterator[AsyncExitStack]:
    """What is entered here ends after the response, also if the caller hung up in its middle."""
    async with AsyncExitStack() as stack:
        yield stack


Client = Annotated[AsyncGatewayClient, Depends(get_client)]
Cleanup = Annotated[AsyncExitStack, Depends(get_cleanup)]


@app.exception_handler(GatewayError)
async def answer_error(_: Request, error: GatewayError) -> JSONResponse:
    status = next(status for kind, status in STATUS_OF_ERRORS if isinstance(error, kind))
    logger.warning("%d: %s", status, error.message)  # the SDK's messages carry no secrets
    headers = {} if error.retry_after is None else {"Retry-After": f"{error.retry_after:.0f}"}
    content = {"error": type(error).__name__, "message": error.message}
    return JSONResponse(content, status, headers)


async def server_sent_events(events: AsyncEventStream) -> AsyncIterator[str]:
    """The events as they come, each at once. A stream that breaks ends with an error event."""
    try:
        # When the caller hangs up, this is cancelled. That closes the stream, in which nothing
        # may come for minutes.
        async for event in events:
            yield f"data: {json.dumps(event.raw)}\n\n"
    except GatewayError as error:  # too late for an HTTP status
        logger.warning("a stream broke: %s", error.message)
        data = {"message": error.message, "type": type(error).__name__}
        yield f"data: {json.dumps({'type': 'error', 'data': data})}\n\n"


def event_response(events: AsyncEventStream) -> StreamingResponse:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect them
    return StreamingResponse(server_sent_events(events), 200, headers, "text/event-stream")


@app.post("/statistics")
async def statistics(text: Annotated[str, Body(embed=True)], client: Client) -> Any:
    """One call, and its result as JSON."""
    result = await client.prefab("text-tools", "1.1.0").statistics(text=text)
    if not result.is_success():
        raise HTTPException(502, result.error)
    return result.get_function_result()


@app.post("/words")
async def words(
    text: Annotated[str, Body(embed=True)], client: Client, cleanup: Cleanup
) -> StreamingResponse:
    """A stream, passed on event by event."""
    # A refused request raises here, and so becomes an HTTP status: no event was sent yet.
    tools = client.prefab("text-tools", "1.1.0")
    events = await tools.stream("words", text=text, delay=0.1)
    return event_response(await cleanup.enter_async_context(events))


@app.post("/inspect")
async def inspect(request: Request, client: Client, cleanup: Cleanup) -> StreamingResponse:
    """What a prefab finds in the file that is the request's body; no copy of it stays anywhere."""
    path = Path(cleanup.enter_context(tempfile.TemporaryDirectory()), "document")
    with await asyncio.to_thread(path.open, "wb") as file:
        async for block in request.stream():
            await asyncio.to_thread(file.write, block)
    session = await cleanup.enter_async_context(client.temp_session())
    # If this process is killed, nobody cleans up: then the file goes by itself after an hour.
    upload = await client.upload_temp_file(path, 3600, session)
    files = {"files": [upload["s3_url"]]}
    events = await client.prefab("file-tools", "1.0.0").stream("inspect", files=files)
    return event_response(await cleanup.enter_async_context(events))


def main() -> None:
    port = int(os.environ.get("PORT", "8000"))
    with local_gateway.environment("agent") as gateway:
        if gateway:  # only then is the token shown: it is worth nothing elsewhere
            print(
                f"Try: curl -N http://127.0.0.1:{port}/words -H 'Content-Type: application/json'"
                f" -H 'X-Internal-Token: {gateway.internal_token}' -d '{{\"text\": \"a b c\"}}'",
                flush=True,
            )
        uvicorn.run(app, port=port, timeout_graceful_shutdown=10)  # open streams are cut off then


if __name__ == "__main__":
    main()
