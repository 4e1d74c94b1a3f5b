"""Tests of the short examples: each shows what it promises, and fails loudly."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLES
from local_gateway import LocalGateway

from gateway_sdk import GatewayClient, GatewayError

EXPECTED_LINES = {
    "basic_usage": [
        "words: 6", "find: 2 matches", "deployed: text-tools 1.1.0 - .*",
        r"newest text-tools: 1\.1\.0 \['statistics', 'words', 'echo', 'find'\]", "call 3: FAILED",
        r"batch: PARTIAL_SUCCESS, words \[1, 2, 3\], failed \['ServiceUnavailableError'\]",
        "bad input: .*Missing required parameter: text", "not found: no-such-prefab 1.1.0",
        r"missing secret: SIGNING_KEY\. .+", "signed: [0-9a-f]{64}",
    ],
    "streaming": [
        "So much depends upon a red wheel barrow glazed with rain water", "complete: 12 pieces",
        "found 'red': .*",
        "start", r"content: streaming\.py has [\d,]+ bytes", "progress: 1 of 2", "progress: 2 of 2",
        "done",
        "error: RuntimeError: stumbled",
    ],
    "file_operations": [
        r"kept: first\.txt, 1,700,000 bytes", "listed: True",
        "shared: http://[^?]* - the same bytes: True",
        "temporary files: 2", r".*100%", r"downloaded: both\.txt, 3,400,000 bytes",
        "temporary files afterwards: 0",
    ],
    "third_party": [
        "checksum: [0-9a-f]{64}", "lines of the output file: 1", "output file: s3://.*",
        "for agents only: .* answered 400: .*", "not downloaded: .*",
    ],
    "distributed_batch": [
        r"process pool: COMPLETED, words \[1, 2, .*, 20\]",
        r"Dask: COMPLETED, words \[1, 2, .*, 20\]" if importlib.util.find_spec("distributed")
        else r"Dask: not installed.*",
    ],
}


def environment_of_example(name: str, gateway: LocalGateway) -> dict[str, str]:
    if name == "third_party":  # this one is not an agent
        return {"GATEWAY_BASE_URL": gateway.base_url, "AGENT_BUILDER_API_KEY": gateway.api_key}
    return {"GATEWAY_BASE_URL": gateway.base_url, "X_INTERNAL_TOKEN": gateway.internal_token}


RUNS = [
    # PyPy 7.3.11 has a process pool that cannot start.
    *((name, True) for name in EXPECTED_LINES
      if name != "distributed_batch" or sys.implementation.name == "cpython"),
    # With a gateway of their own, each for another credential.
    ("file_operations", False), ("third_party", False),
]


def check_example(example: str, runs_already: bool, folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1"}
    with LocalGateway() as gateway:
        if runs_already:
            environment.update(environment_of_example(example, gateway))
        command = [sys.executable, "-X", "dev", "-W", "default", str(EXAMPLES / f"{example}.py")]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=60
        )
    assert done.returncode == 0, done.stderr
    # Dask has warnings of its own.
    assert done.stderr == "" or example == "distributed_batch", done.stderr
    assert list(folder.iterdir()) == []
    for line in EXPECTED_LINES[example]:
        assert re.search(f"(?m)^{line}$", done.stdout.replace("\r", "\n")), (line, done.stdout)
    assert bool(gateway.requests) == runs_already, example
    if example == "distributed_batch":
        assert len(gateway.executed) == 20 * done.stdout.count("COMPLETED")
    for secret in (gateway.internal_token, gateway.api_key, "X-Amz", "signature="):
        assert secret not in done.stdout


def test_every_example_shows_what_it_promises(tmp_path_factory: pytest.TempPathFactory) -> None:
    """All at once: they wait more than they work."""
    with concurrent.futures.ThreadPoolExecutor(len(RUNS)) as pool:
        checks = [pool.submit(check_example, *run, tmp_path_factory.mktemp("run")) for run in RUNS]
    for check in checks:
        check.result()


@pytest.mark.parametrize("example", EXPECTED_LINES)
def test_an_example_fails_loudly(
    example: str, gateway: LocalGateway, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(gateway, "quota", 0)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(tmp_path)
    for name, value in environment_of_example(example, gateway).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises((GatewayError, SystemExit), match="quota"),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        # A pool of processes takes its time, and fails no louder.
        if example == "distributed_batch":
            importlib.import_module(example).count_words(GatewayClient.from_env(), pool, "a thread")
        else:
            runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")


@pytest.mark.parametrize(("name", "packages"), [
    ("mcp_server.py", ["mcp"]), ("fastapi_agent.py", ["fastapi", "uvicorn"]),
    ("distributed_batch.py", ["dask"])])
def test_an_example_with_packages_names_them_for_uv_run(name: str, packages: list[str]) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.M)  # as PEP 723 has it
    lines = dict(line[2:].split(" = ") for line in block.splitlines())
    assert list(lines) == ["requires-python", "dependencies"]
    assert [re.match(r"[a-z]+", need)[0] for need in json.loads(lines["dependencies"])] == packages
