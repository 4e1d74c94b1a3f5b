"""A program outside the platform, with an API key: what it can do, and what is for agents only.

    python examples/third_party.py

Needs AGENT_BUILDER_API_KEY, for the gateway of GATEWAY_BASE_URL. If that is not set, a local
gateway is started, which gives a key.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where gateway_sdk.py is

import local_gateway

from gateway_sdk import AgentContextRequiredError, GatewayClient


def make_client() -> GatewayClient:
    """A client that exchanged its key for a token, and does so again when that has expired."""
    api_key = os.environ.get("AGENT_BUILDER_API_KEY")
    if not api_key:
        sys.exit("Set AGENT_BUILDER_API_KEY for the gateway of GATEWAY_BASE_URL, or unset both.")
    return GatewayClient.from_api_key(api_key)


def call_with_files(client: GatewayClient, path: Path) -> str:
    """Upload a file, have it processed, and give the `s3://` URL of what was made of it."""
    url = client.upload_input_file(path, content_type="text/x-python")  # straight to the storage
    file_tools = client.prefab("file-tools", "1.0.0")
    result = file_tools.checksum(files={"files": [url]})
    if not result.is_success():
        sys.exit(f"checksum failed: {result.error}")
    [entry] = result.get_function_result()["checksums"]
    print("checksum:", entry["sha256"])

    # An output can be the input of the next call as it is: no need to download it.
    [sums_url] = result.get_files()["checksums"]
    lines = file_tools.line_count(files={"files": [sums_url]}).get_function_result()["lines"]
    print("lines of the output file:", lines)
    return sums_url


def fetch(client: GatewayClient, s3_url: str, target: Path) -> bool:
    """Download a file if this client may; whether it could."""
    try:
        client.download_file(s3_url, target)
    except AgentContextRequiredError as error:
        # An API key stands for a user. Keeping, listing and downloading files is for agents, so
        # nothing is wrong with the key: do without, or hand the URL to an agent.
        print("for agents only:", error.message)
        return False
    return True


if __name__ == "__main__":
    with local_gateway.environment("api_key"), make_client() as client, \
            tempfile.TemporaryDirectory() as folder:  # fmt: skip
        output_url = call_with_files(client, Path(__file__))
        print("output file:", output_url)
        if not fetch(client, output_url, Path(folder, "SHA256SUMS.txt")):
            print("not downloaded: the URL is what is passed on")
