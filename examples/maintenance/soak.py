"""Works the SDK hard, for minutes, over connections that break, and checks all that comes back.

    python examples/maintenance/soak.py --minutes 10

Threads share one client and make calls, batches, streams, uploads and downloads. A local gateway,
in a process of its own, stands behind a small TCP proxy that cuts connections at random: with FIN
or RST, at any byte, in either direction. Errors are then no fault. These are, and make the exit
status 1: a wrong answer, a call that ran twice, a result that was wholly delivered and yet lost,
any other error than "no usable answer", and growth of memory, threads or open files.

From top to bottom: the server with its proxy, the operations, the counts, the run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import math
import os
import random
import re
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from gateway_sdk import GatewayClient, GatewayError, PrefabCall, ServiceUnavailableError

BLOCK_BYTES = 256 * 1024
LONGEST_ANSWER_BYTES = 64 * 1024  # of those that are looked at: not of downloads
IDLE_SECONDS = 4.5  # longer than the client keeps a connection
# Growth that is no leak: the allocator's. Without the GIL it keeps pages for each thread.
MEMORY_MIB = 8.0 if getattr(sys, "_is_gil_enabled", lambda: True)() else 64.0
ID = re.compile(rb"id-[0-9a-f]+-[0-9]+-")  # the dash ends it, also where an answer is cut


# --- The server, in a process of its own -----------------------------------------------


class Ledger:
    """What ran, how often, and whose answers reached the client whole."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()
        self.delivered: set[str] = set()
        self.lock = threading.Lock()
        self.cuts = 0

    def record(self, key: str, padding: str) -> Any:
        """Give back what came."""
        with self.lock:
            self.ran[key] += 1
        return {"key": key, "padding": padding}

    def stream(self, key: str, count: int) -> Iterator[str]:
        """Stream numbered words."""
        with self.lock:
            self.ran[key] += 1
        for number in range(count):
            yield f"{key}{number}"

    def verdict(self, raised: list[str]) -> dict[str, Any]:
        """Judge the calls that raised."""
        twice = [key for key, count in self.ran.items() if count > 1]
        lost = sorted(self.delivered.intersection(raised))
        return {"ran twice": twice, "lost": lost, "ran": sum(self.ran.values()), "cuts": self.cuts}


class Relay:
    """One connection through the proxy, which comes to an end somewhere."""

    def __init__(self, client: socket.socket, gateway: tuple[str, int], own: bytes, ledger: Ledger,
                 random_: random.Random, cut_rate: float) -> None:  # fmt: skip
        self.client, self.gateway, self.own = client, gateway, own
        self.ledger, self.random, self.cut_rate = ledger, random_, cut_rate
        self.answer = b""  # since the last request began
        self.left = {"up": math.inf, "down": math.inf}  # bytes until the cut
        self.when_idle = False  # cut behind the next whole answer

    def run(self) -> None:
        server = socket.create_connection(self.gateway)
        with contextlib.suppress(OSError), self.client, server:
            for sock in (self.client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._plan()
            while True:
                for source in select.select([self.client, server], [], [])[0]:
                    data = source.recv(BLOCK_BYTES)
                    up = source is self.client
                    if not data or not self._pass_on(data, server if up else self.client, up):
                        return

    def _plan(self) -> None:
        """Whether and where this exchange is cut: most likely among its first bytes."""
        if self.random.random() < self.cut_rate:
            place = self.random.choice(["up", "down", "idle"])
            self.when_idle = place == "idle"
            if place != "idle":
                self.left[place] = int(10 ** self.random.uniform(0, 6.3)) - 1

    def _pass_on(self, data: bytes, target: socket.socket, up: bool) -> bool:
        """Send the data on, or some of it; whether the connection lives on."""
        if up and self.answer:
            self.answer = b""
            self._plan()
        if not up:  # presigned URLs shall lead through here as well
            data = data.replace(b"127.0.0.1:%d" % self.gateway[1], self.own)
        way = "up" if up else "down"
        part = data[: int(min(self.left[way], len(data)))]
        self.left[way] -= len(data)
        target.sendall(part)
        if not up:
            self._note(part)
        if len(part) == len(data) and not (self.when_idle and self._whole()):
            return True
        self.ledger.cuts += 1
        if self.random.random() < 0.5:
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.client.shutdown(socket.SHUT_WR)
        # To close at once could turn FIN into RST, and RST discards what was not yet acknowledged.
        time.sleep(0.05)
        return False

    def _note(self, data: bytes) -> None:
        if len(self.answer) < LONGEST_ANSWER_BYTES:
            self.answer += data
            if self._whole():
                self.ledger.delivered.update(key.decode() for key in ID.findall(self.answer))

    def _whole(self) -> bool:
        head, _, body = self.answer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if length:
            return len(body) >= int(length[1])
        return b"\n\n" in body.partition(b'"type":"done"')[2]


def serve(seed: int, cut_rate: float) -> None:
    """Serve until the standard input ends; tells the URLs on the standard output."""
    from local_gateway import LocalGateway

    ledger, listener = Ledger(), socket.create_server(("127.0.0.1", 0), backlog=128)
    own = b"127.0.0.1:%d" % listener.getsockname()[1]

    def accept(gateway: tuple[str, int]) -> None:
        for number in range(sys.maxsize):
            client, _ = listener.accept()
            random_ = random.Random(f"{seed} {number}")
            relay = Relay(client, gateway, own, ledger, random_, cut_rate)
            threading.Thread(target=relay.run, daemon=True).start()

    functions = {"record": ledger.record, "stream": ledger.stream, "verdict": ledger.verdict}
    with LocalGateway() as gateway:
        gateway.add_prefab("soak", "1.0.0", functions)
        address = ("127.0.0.1", int(gateway.base_url.rpartition(":")[2]))
        if len(str(address[1])) != len(own.rpartition(b":")[2]):
            raise RuntimeError("the two ports must have as many digits: try again")
        threading.Thread(target=accept, args=[address], daemon=True).start()
        told = {"direct": gateway.base_url, "proxied": f"http://{own.decode()}"}
        print(json.dumps({**told, "token": gateway.internal_token}), flush=True)
        sys.stdin.read()


# --- The operations --------------------------------------------------------------------


def check(condition: object, what: str) -> None:
    if not condition:
        raise AssertionError(f"wrong answer: {what}")


class Worker:
    """One thread's operations. What raised is noted by its key."""

    def __init__(self, soak: Soak, number: int) -> None:
        self.soak, self.client, self.folder = soak, soak.client, soak.folder
        self.random = random.Random(f"{soak.seed} worker {number}")
        self.number, self.count = number, 0

    def new_id(self) -> str:
        self.count += 1
        return f"id-{self.soak.phase:x}{self.number:04x}-{self.count}-"

    @contextlib.contextmanager
    def noting(self, key: str) -> Iterator[None]:
        try:
            yield
        except GatewayError:
            self.soak.raised.append(key)
            raise

    def parameters(self, key: str) -> dict[str, Any]:
        return {"key": key, "padding": "ä" * int(10 ** self.random.uniform(0, 4))}

    def call(self) -> None:
        key = self.new_id()
        sent = self.parameters(key)
        with self.noting(key):
            result = self.client.run("soak", "1.0.0", "record", sent)
        check(result.is_success() and result.get_function_result() == sent, f"{key}: {result}")

    def batch(self) -> None:
        sent = [self.parameters(self.new_id()) for _ in range(self.random.randrange(1, 12))]
        calls = [PrefabCall("soak", "1.0.0", "record", parameters) for parameters in sent]
        batch = self.client.run_batch(calls, max_workers=4)
        check(len(batch.results) == len(sent), "a batch has another number of results")
        for parameters, result in zip(sent, batch.results):
            if result.exception:
                self.soak.raised.append(parameters["key"])
                self.soak.note_error("batch", result.exception)
            else:
                check(result.get_function_result() == parameters, f"{parameters['key']}: {result}")

    def stream(self) -> None:
        key, count, seen = self.new_id(), self.random.randrange(200), 0
        leave_at = self.random.choice([None, None, None, count // 2])
        with self.noting(key):
            sent = {"key": key, "count": count}
            for event in self.client.run("soak", "1.0.0", "stream", sent, stream=True):
                if event.type == "content":
                    check(event.data == f"{key}{seen}", f"event {seen}: {event}")
                    seen += 1
                    if seen == leave_at:
                        return
        check(seen == count, f"a stream ended after {seen} of {count} events")

    @contextlib.contextmanager
    def new_file(self, key: str) -> Iterator[tuple[Path, str]]:
        """A file and its checksum."""
        content = self.random.getrandbits(8 * int(10 ** self.random.uniform(0, 5.7)))
        data = content.to_bytes(content.bit_length() // 8 + 1, "big")
        path = self.folder / key
        path.write_bytes(data)
        try:
            yield path, hashlib.sha256(data).hexdigest()
        finally:
            path.unlink()

    def input_file(self) -> None:
        with self.new_file(self.new_id()) as (path, checksum):
            url = self.client.upload_input_file(path)
            result = self.client.run("file-tools", "1.0.0", "checksum", files={"files": [url]})
            output = result.get_function_result()
            check(output.get("checksums", [{}])[0].get("sha256") == checksum, f"{url}: {result}")

    def permanent_file(self) -> None:
        self.round_trip(self.client.upload_file)

    def temporary_file(self) -> None:
        with self.client.temp_session() as session:
            url = self.round_trip(lambda path: self.client.upload_temp_file(path, 600, session))
            listed = [file["s3_url"] for file in self.client.iter_temp_files(session)]
            check(listed == [url], f"the session has {listed}")

    def round_trip(self, upload: Callable[[Path], dict[str, Any]]) -> str:
        key = self.new_id()
        target = self.folder / f"{key}.got"
        with self.new_file(key) as (path, checksum):
            with self.noting(key):
                url: str = upload(path)["s3_url"]
            try:
                self.client.download_file(url, target)
                received = hashlib.sha256(target.read_bytes()).hexdigest()
                check(received == checksum, f"{url} came back otherwise")
            finally:
                target.unlink(missing_ok=True)
        return url


OPERATIONS: list[Callable[[Worker], None]] = [
    *[Worker.call] * 8, *[Worker.batch] * 2, *[Worker.stream] * 4,
    Worker.input_file, Worker.permanent_file, Worker.temporary_file,
]  # fmt: skip


def is_expected(error: BaseException) -> bool:
    """Whether a cut connection explains the error."""
    return isinstance(error, ServiceUnavailableError) and not isinstance(error, TimeoutError)


# --- The counts ------------------------------------------------------------------------


class Soak:
    """The run: its threads, what they counted, and what was wrong."""

    def __init__(self, told: dict[str, str], seed: int, folder: Path) -> None:
        token = told["token"]
        self.client = GatewayClient(told["proxied"], internal_token=token, timeout=20)
        self.direct = GatewayClient(told["direct"], internal_token=token)
        self.seed, self.folder, self.phase = seed, folder, 0
        self.lock = threading.Lock()
        self.done: Counter[str] = Counter()
        self.errors: dict[str, Counter[str]] = defaultdict(Counter)
        self.wrong: list[str] = []
        self.raised: list[str] = []

    def run_phase(self, threads: int, seconds: float) -> None:
        self.phase += 1
        deadline = time.monotonic() + seconds
        running = [threading.Thread(target=self._work, args=[n, deadline]) for n in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()

    def _work(self, number: int, deadline: float) -> None:
        worker = Worker(self, number)
        while time.monotonic() < deadline:
            operation = worker.random.choice(OPERATIONS)
            try:
                operation(worker)
            except GatewayError as error:
                self.note_error(operation.__name__, error)
            except Exception as error:  # noqa: BLE001 - a wrong answer, or a fault of the SDK
                with self.lock:
                    self.wrong.append(f"{operation.__name__}: {error!r}")
            else:
                with self.lock:
                    self.done[operation.__name__] += 1

    def note_error(self, name: str, error: GatewayError) -> None:
        with self.lock:
            self.errors[name][type(error).__name__] += 1
            if not is_expected(error):
                self.wrong.append(f"{name}: {error!r}")

    def footprint(self) -> dict[str, float]:
        """Threads, open files and MiB of memory at rest, without idle connections."""
        time.sleep(IDLE_SECONDS)
        with contextlib.suppress(ServiceUnavailableError):
            self.client.list_prefabs()  # old connections go when one is given back
        gc.collect()
        counts: dict[str, float] = {"threads": threading.active_count()}
        if os.path.exists("/proc/self/statm"):  # Linux
            counts["open files"] = len(os.listdir("/proc/self/fd"))
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            counts["memory MiB"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        return counts

    def judge(self, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
        """The server's counts. All that is wrong with them is added to `wrong`."""
        result = self.direct.run("soak", "1.0.0", "verdict", {"raised": self.raised})
        verdict: dict[str, Any] = result.get_function_result()
        names = Counter(file["key"].rpartition("/")[2] for file in self.direct.iter_files(1000))
        verdict["ran twice"] += [name for name in names if names[name] > 1 and "id-" in name]
        for what in ("ran twice", "lost"):
            self.wrong += [f"{what}: {key}" for key in verdict[what]]
        for what, count in before.items():
            if after[what] > count + (MEMORY_MIB if what == "memory MiB" else 1):
                self.wrong.append(f"{what} grew from {count:g} to {after[what]:g}")
        self.wrong += [f"left behind: {path.name}" for path in self.folder.iterdir()]
        never = {operation.__name__ for operation in OPERATIONS} - set(self.done)
        self.wrong += [f"never succeeded: {name}" for name in sorted(never)]
        return verdict


# --- The run ---------------------------------------------------------------------------


def print_counts(soak: Soak, verdict: dict[str, Any], before: Any, after: Any) -> None:
    print(f"{'operation':<18}{'done':>8}   errors")
    for name in sorted({*soak.done, *soak.errors}):
        errors = ", ".join(f"{count} {kind}" for kind, count in soak.errors[name].items())
        print(f"{name:<18}{soak.done[name]:>8}   {errors or '-'}")
    print(f"\ncuts: {verdict['cuts']}; calls that ran: {verdict['ran']}")
    print(f"raised: {len(soak.raised)}")
    print(f"ran twice: {len(verdict['ran twice'])}; results lost: {len(verdict['lost'])}")
    for what, count in before.items():
        print(f"{what}: {count:.1f} after the warm-up, {after[what]:.1f} at the end")
    print(f"wrong: {len(soak.wrong)}")
    for line in soak.wrong[:20]:
        print(f"  {line[:300]}")


def soak_for(options: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--serve", str(options.seed), str(options.cut_rate)]
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            told = json.loads(server.stdout.readline())  # type: ignore[union-attr]
            soak = Soak(told, options.seed, Path(folder))
            soak.run_phase(options.threads, 60 * options.minutes * 0.2)
            before = soak.footprint()
            soak.run_phase(options.threads, 60 * options.minutes * 0.8)
            after = soak.footprint()
            verdict = soak.judge(before, after)
        finally:
            server.stdin.close()  # type: ignore[union-attr]
    print_counts(soak, verdict, before, after)
    return 1 if soak.wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Work the SDK hard over connections that break.")
    add = parser.add_argument
    add("--minutes", type=float, default=3.0, help="default: %(default)s")
    add("--threads", type=int, default=8, help="default: %(default)s")
    add("--seed", type=int, default=1, help="default: %(default)s")
    add("--cut-rate", type=float, default=0.05, help="of the exchanges (default: %(default)s)")
    return soak_for(parser.parse_args())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]), float(sys.argv[3]))
    else:
        sys.exit(main())
