"""The first steps: run functions, stream, look prefabs up, run a batch, move files, handle errors.

    python examples/basic_usage.py

Uses the gateway of GATEWAY_BASE_URL and the credential in the environment; if that is not set, a
local gateway that it starts.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where gateway_sdk.py is

import local_gateway

from gateway_sdk import (
    GatewayClient,
    MissingSecretError,
    PrefabCall,
    PrefabNotFoundError,
    PrefabResult,
    ValidationError,
)


def run_functions(client: GatewayClient) -> None:
    result = client.run("text-tools", "1.1.0", "statistics", {"text": "to be or not to be"})
    print("words:", result.get_function_result()["words"])

    text_tools = client.prefab("text-tools", "1.1.0")  # its functions are methods
    found = text_tools.find(text="to be or not to be", pattern="b.")
    # A call can succeed and its function still report a failure of its own: ask for both.
    if not (found.is_success() and found.get_business_success()):
        sys.exit(f"find failed: {found.error or found.get_business_error()}")
    print("find:", found.get_business_message())


def stream(client: GatewayClient) -> None:
    print("streamed:", end=" ")
    for event in client.run("text-tools", "1.1.0", "words", {"text": "one two three"}, stream=True):
        if event.type == "content":
            print(event.data, end="", flush=True)
    print()


def move_files(client: GatewayClient) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report, sums = Path(folder, "report.txt"), Path(folder, "sums.txt")
        report.write_text("a file to work on\n", encoding="utf-8")
        url = client.upload_input_file(report)
        result = client.run("file-tools", "1.0.0", "checksum", files={"files": [url]})
        client.download_file(result.get_file_urls()[0], sums)
        print("downloaded:", sums.read_text(encoding="utf-8").strip())


def look_up(client: GatewayClient) -> None:
    for prefab in client.list_prefabs(status="deployed"):
        print(f"deployed: {prefab.prefab_id} {prefab.version} - {prefab.description}")
    spec = client.get_prefab_spec("text-tools")  # of the newest version
    names = [function["name"] for function in spec["functions"]]
    print("newest text-tools:", spec["version"], names)


def run_many(client: GatewayClient) -> None:
    texts = ["one", "one two", "one two three"]
    calls = [PrefabCall("text-tools", "1.1.0", "statistics", {"text": text}) for text in texts]
    calls.append(PrefabCall("faulty", "1.0.0", "crash"))  # does not cost the others their results

    def show(index: int, result: PrefabResult) -> None:  # called as each comes, in any order
        print(f"call {index}: {result.status}")

    batch = client.run_batch(calls, max_workers=4, on_result=show)
    words = [result.get_function_result()["words"] for result in batch.results[:3]]  # in order
    errors = [result.error["type"] for result in batch.get_failed() if result.error]
    print(f"batch: {batch.status}, words {words}, failed {errors}")


def call_badly(client: GatewayClient, prefab_id: str, parameters: dict[str, str]) -> None:
    try:
        client.run(prefab_id, "1.1.0", "statistics", parameters)
    except ValidationError as error:  # a parameter is missing, or of the wrong type
        print("bad input:", error.message)
    except PrefabNotFoundError as error:
        print(f"not found: {error.prefab_id} {error.version}")
    else:
        sys.exit("a bad call went through")


def call_without_secret(client: GatewayClient) -> None:
    try:
        client.run("vault", "1.0.0", "sign", {"text": "one"})
    except MissingSecretError as error:
        print(f"missing secret: {error.secret_name}. {error.instructions}")
        client.set_secret(error.prefab_id, error.secret_name, "a key that only you know")
        signed = client.run("vault", "1.0.0", "sign", {"text": "one"})
        print("signed:", signed.get_function_result()["signature"])
        client.delete_secret(error.prefab_id, error.secret_name)


if __name__ == "__main__":
    with local_gateway.environment(), GatewayClient.from_env() as client:
        run_functions(client)
        stream(client)
        move_files(client)
        look_up(client)
        run_many(client)
        call_badly(client, "text-tools", {})
        call_badly(client, "no-such-prefab", {"text": "one"})
        call_without_secret(client)
