"""Tests of the skill: its blocks are run as an agent runs them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLES
from local_gateway import LocalGateway

import gateway_sdk
from test_gateway_sdk import (
    REFUSED,
    SDK,
    UNAVAILABLE,
    Answer,
    Ended,
    HangUp,
    Script,
    answer,
    chunked,
    event,
    ran,
)

SKILL = EXAMPLES / "skill" / "gateway-sdk" / "SKILL.md"
VARIABLES = ("GATEWAY_BASE_URL", "X_INTERNAL_TOKEN", "AGENT_BUILDER_API_KEY", "GATEWAY_JWT_TOKEN")
FAILED_CALL = answer({"results": [{"status": "FAILED", "error": {"message": "out of luck"}}]})


def skill_blocks(language: str = r"\w+") -> list[tuple[str, str]]:
    """Language and code of the skill's blocks."""
    text = SKILL.read_text(encoding="utf-8")
    return re.findall(rf"^```({language})\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture
def run_skill(monkeypatch: Any, capsys: Any) -> Callable[..., tuple[str, str, int]]:
    """Runs the Python block of the skill that has these words in it, against a `Script`.

    It gives what the script printed, what it ended with, and the number of requests.
    """
    def run(words: str, *replies: Answer) -> tuple[str, str, int]:
        (code,) = [code for _, code in skill_blocks("python") if words in code]
        code = code.replace("range(20)", "range(3)").replace("max_workers=8", "max_workers=1")
        told = ""
        with Script(*replies) as server:
            monkeypatch.setenv("GATEWAY_BASE_URL", server.url)
            try:
                exec(compile(code, "SKILL.md", "exec"), {"__name__": "__main__"})
            except SystemExit as stop:
                told = str(stop)
            return capsys.readouterr().out, told, len(server.received)

    return run


def test_every_block_of_the_skill_works_where_there_is_only_the_one_file(
        shell: Callable[..., Ended], gateway: LocalGateway, tmp_path: Path) -> None:
    sandbox = tmp_path / "sandbox"
    sandbox.mkdir()
    shutil.copy(str(SDK), str(sandbox))
    shown, unnamed = [], set(VARIABLES)
    for language, code in skill_blocks():
        if language == "python":
            (sandbox / "script.py").write_text(code, encoding="utf-8")
            code = "python3 script.py"
        # OpenHands sets what a command names, from then on.
        unnamed -= {name for name in unnamed if name in code}
        ended = shell(f"unset {' '.join(unnamed)}\n{code}", sandbox)
        assert (ended.status, re.findall("failed|did not run|may have run", ended.out)) == (
            0,
            [],
        ), code + ended.err
        shown.append(ended.out)
    out = "".join(shown)
    assert shown[0] == "['GATEWAY_BASE_URL', 'X_INTERNAL_TOKEN']\n"
    assert gateway.internal_token not in out
    assert "'words': 2" in out
    assert out.count("one two three") == 2
    assert '"streaming": true' in out
    lines = map(json.loads, (sandbox / "results.jsonl").read_text().splitlines())
    # What is done first comes first.
    results = sorted((line["index"], line["output"]["output"]) for line in lines)
    assert results == [(0, 1), (1, 2)]
    assert [path.name for path in (sandbox / "results").iterdir()] == ["SHA256SUMS.txt"]
    assert (sandbox / "made" / "checksums.txt").read_text() == (
        sandbox / "results" / "SHA256SUMS.txt"
    ).read_text()


@pytest.mark.parametrize(("given", "message"), [
    (REFUSED, "It may have run: False"),
    (UNAVAILABLE, "It may have run: True"),
    (HangUp(), "It may have run: True"),
    (ran({"success": False, "error": "out of luck"}), "out of luck"),
    (FAILED_CALL, "out of luck"),
], ids=["refused", "unavailable", "hang up", "a failure of its own", "a failed call"])
def test_the_script_of_the_skill_sends_once_and_tells_what_failed(
    run_skill: Any, given: Any, message: str
) -> None:
    out, told, sent = run_skill("It may have run", given)
    assert (out, message in told, sent) == ("", True, 1)


def test_the_stream_of_the_skill_tells_of_an_error_event(run_skill: Any) -> None:
    out, told, _ = run_skill(
        "stream=True", chunked(event("content", "so far"), event("error", "out of luck"))
    )
    assert (out, "out of luck" in told) == ("so far", True)


def test_the_batch_of_the_skill_tells_what_may_be_repeated(run_skill: Any) -> None:
    out, _, sent = run_skill("run_batch", FAILED_CALL, HangUp(), answer({"detail": "wrong"}, 422))
    ran_or_may_have = "ran or may have run, do not repeat"
    assert [line.partition(":")[0] for line in out.splitlines()] == [
        ran_or_may_have,
        ran_or_may_have,
        "did not run",
    ]
    assert sent == 3


def test_the_skill_has_the_form_of_a_skill_and_says_what_each_error_means() -> None:
    _, front, body = SKILL.read_text(encoding="utf-8").split("---\n", 2)
    assert re.findall(r"^(\w+):", front, re.M) == ["name", "description"]
    assert f"name: {SKILL.parent.name}\n" in front
    assert len(" ".join(front.split())) < 1024
    assert body.count("\n") < 175
    assert {language for language, _ in skill_blocks()} == {"bash", "python"}
    errors = {name for name in gateway_sdk.__all__ if name.endswith("Error")}
    assert set(re.findall(r"^\| `(\w+Error)`", body, re.M)) == errors


def test_a_block_of_the_skill_is_one_command_and_waits_for_minutes_where_it_calls() -> None:
    blocks = [code for _, code in skill_blocks("bash")]
    assert len(blocks) > 7
    for code in blocks:
        command, rest = code.split("\n", 1)
        here = re.search(r"<<'(\w+)'$", command)
        # A terminal may refuse a second one.
        assert rest == "" or (here and rest.endswith(f"\n{here[1]}\n")), code
        calls = re.search(r"gateway_sdk\.py (run|batch|upload|download) ", command)
        assert "--timeout 600" in command or not calls, code
    for code in (code for _, code in skill_blocks("python")):
        assert "from_env(timeout=600)" in code


def test_the_skill_asks_before_it_calls_a_gateway_that_nobody_named() -> None:
    text = " ".join(SKILL.read_text(encoding="utf-8").split())
    assert "A call may be silent for minutes: wait." in text
    assert "Never make a call without it unless your user said so." in text
    assert set(re.findall('"([A-Z_]+)"', skill_blocks("bash")[0][1])) == set(VARIABLES)
