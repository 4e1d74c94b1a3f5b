"""Streams: the events of a call as they come, stopping early, progress, errors.

    python examples/streaming.py

Uses the gateway of GATEWAY_BASE_URL and the credential in the environment; if that is not set, a
local gateway that it starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where gateway_sdk.py is

import local_gateway

from gateway_sdk import GatewayClient, StreamEventType

TEXT = "So much depends upon a red wheel barrow glazed with rain water"


def show_as_it_comes(client: GatewayClient) -> None:
    parameters = {"text": TEXT, "delay": 0.05}
    pieces = []
    for event in client.run("text-tools", "1.1.0", "words", parameters, stream=True):
        if event.type is StreamEventType.CONTENT:
            print(event.data, end="", flush=True)
            pieces.append(event.data)
    # A stream that is cut short raises: to get here means that it is complete.
    print(f"\ncomplete: {len(pieces)} pieces")
    if "".join(pieces) != TEXT:
        sys.exit("the pieces are not the text")


def stop_early(client: GatewayClient) -> None:
    text_tools = client.prefab("text-tools", "1.1.0")
    with text_tools.stream("words", text=TEXT, delay=0.05) as events:  # the end of `with` ends it
        for event in events:
            if event.type is StreamEventType.CONTENT and event.data.strip() == "red":
                print("found 'red': the rest is not waited for")
                break
        else:
            sys.exit("'red' did not come")


def follow_progress(client: GatewayClient) -> None:
    urls = [client.upload_input_file(path) for path in (__file__, local_gateway.__file__)]
    files = {"files": urls}
    for event in client.run("file-tools", "1.0.0", "inspect", files=files, stream=True):
        if event.type is StreamEventType.PROGRESS:
            print(f"progress: {event.data['done']} of {event.data['total']}")
        elif event.type is StreamEventType.CONTENT:
            print(f"content: {event.data['name']} has {event.data['size']:,} bytes")
        else:
            print(event.type)  # start and done; prints as its value


def meet_an_error(client: GatewayClient) -> None:
    # What a function reports is an event, after the content that came before it. Exceptions are
    # for requests that were refused (raised by `run`) and for connections that broke.
    for event in client.run("faulty", "1.0.0", "stumble", stream=True):
        if event.type is StreamEventType.ERROR:
            print(f"error: {event.data['type']}: {event.data['message']}")
            return
    sys.exit("no error event came")


if __name__ == "__main__":
    with local_gateway.environment(), GatewayClient.from_env() as client:
        show_as_it_comes(client)
        stop_early(client)
        follow_progress(client)
        meet_an_error(client)
