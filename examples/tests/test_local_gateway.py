"""Tests of `local_gateway.py`, as far as the tests of the SDK do not need it to work anyway."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from local_gateway import LocalGateway

from test_gateway_sdk import ROOT, client_of


def test_the_manifest_of_the_readme_serves_a_function(tmp_path: Path) -> None:
    manifest = re.search(
        r'```text\n(\{"id": "my-prefab".*?)```', (ROOT / "README.md").read_text("utf-8"), re.DOTALL
    )
    assert manifest
    (tmp_path / "prefab-manifest.json").write_text(manifest[1])
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.py").write_text("def greet(name):\n    return 'Hello, ' + name\n")
    with LocalGateway(tmp_path) as gateway, client_of(gateway) as client:
        assert (
            client.prefab("my-prefab", "1.0.0").greet(name="you").get_function_result()
            == "Hello, you"
        )
    (tmp_path / "prefab-manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="prefab-manifest.json cannot be used"):
        LocalGateway(tmp_path)
