"""What the tests of examples share: fixtures of the module's own tests, and a few helpers.

Servers and other helpers of the module's tests are imported from `test_gateway_sdk` where they are
needed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from test_gateway_sdk import (
    ROOT,
    WAIT_SECONDS,
    _clean,
    _closed,
    _interruptible,
    client,
    content_file,
    gateway,
    shell,
)

# The fixtures
__all__ = ["_clean", "_closed", "_interruptible", "client", "content_file", "gateway", "shell"]

EXAMPLES = ROOT / "examples"


class Gated:
    """A streaming function that gives its next event when told to, and notes when it is cut off."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.cut_off = threading.Event()

    def words(self, text: str, delay: float = 0.0) -> Iterator[str]:
        yield from self._stream(text.split())

    def inspect(self, inputs: dict[str, list[Path]]) -> Iterator[str]:
        yield from self._stream([path.read_text() for path in inputs["files"]] * 1000)

    def _stream(self, pieces: list[str]) -> Iterator[str]:
        try:
            yield {"type": "start", "data": {}}
            for piece in pieces:
                assert self.gate.acquire(timeout=3 * WAIT_SECONDS)  # longer than any reader waits
                yield piece
        except GeneratorExit:  # the gateway could not send on: its client is gone
            self.cut_off.set()
            raise


def wait_for(condition: Callable[[], object]) -> None:
    """Waits until something is true that no event tells about."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def len_of(text: str) -> int:
    return len(text)
