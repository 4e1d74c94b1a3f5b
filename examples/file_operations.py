"""Files of an agent: upload, hand to a prefab, download, list, share.

    python examples/file_operations.py

Needs an agent's token: X_INTERNAL_TOKEN, for the gateway of GATEWAY_BASE_URL. If that is not set,
a local gateway is started, which gives one. Without a token, see third_party.py.
"""

from __future__ import annotations

import sys
import tempfile
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where gateway_sdk.py is

import local_gateway

from gateway_sdk import GatewayClient


def show_progress(done: int, total: int | None) -> None:
    """What `on_progress` is given: bytes so far, and in all if that is known."""
    share = f"{done / total:.0%}" if total else f"{done:,} bytes"
    print(f"\r  {share}", end="", flush=True)


def keep(client: GatewayClient, path: Path) -> None:
    """Store a file for good, and find it in the listing."""
    kept = client.upload_file(path, on_progress=show_progress)
    print(f"\nkept: {kept['filename']}, {kept['size']:,} bytes")
    urls = [file["s3_url"] for file in client.iter_files()]  # of all pages, fetched as needed
    print("listed:", kept["s3_url"] in urls)

    link = client.get_presigned_url(kept["s3_url"], expires_in=60)
    # Whoever has the link can read the file, without a credential: what follows the "?" is secret.
    with urllib.request.urlopen(link) as response:
        same = response.read() == path.read_bytes()
    print("shared:", link.partition("?")[0], "- the same bytes:", same)
    if kept["s3_url"] not in urls or not same:
        sys.exit("the file is not what was uploaded")


def process(client: GatewayClient, paths: list[Path], target: Path) -> None:
    """Have a prefab join files that it is only lent."""
    with client.temp_session() as session:  # its files are deleted at the end, error or not
        uploads = [client.upload_temp_file(path, session_id=session) for path in paths]
        print("temporary files:", len(list(client.iter_temp_files(session))))

        files = {"files": [upload["s3_url"] for upload in uploads]}
        result = client.run("file-tools", "1.0.0", "concatenate", {"name": target.name}, files)
        if not result.is_success():
            sys.exit(f"concatenate failed: {result.error}")
        [url] = result.get_files()["output"]
        client.download_file(url, target, on_progress=show_progress)
        print(f"\ndownloaded: {target.name}, {target.stat().st_size:,} bytes")
    print("temporary files afterwards:", len(list(client.iter_temp_files(session))))
    if target.read_bytes() != b"".join(path.read_bytes() for path in paths):
        sys.exit("the joined file is not right")


if __name__ == "__main__":
    with local_gateway.environment("agent"), GatewayClient.from_env() as client, \
            tempfile.TemporaryDirectory() as folder:  # fmt: skip
        paths = [Path(folder, "first.txt"), Path(folder, "second.txt")]
        for number, path in enumerate(paths, 1):
            path.write_text(f"a line of file {number}\n" * 100_000, encoding="utf-8")
        keep(client, paths[0])
        process(client, paths, Path(folder, "results", "both.txt"))  # missing folders are made
