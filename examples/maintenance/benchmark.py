"""How fast the SDK is, beside `http.client`, httpx, requests, urllib3 and the older SDK.

    python examples/maintenance/benchmark.py --older path/to/venv/bin/python

`http.client` is the baseline of every section. httpx, httpx-sse, requests and urllib3 take part
where they are installed, the older SDK (agent-builder-gateway-sdk 0.7.2) where `--older` names a
Python that has it: its import name is ours too. Every figure is the median of rounds that take
turns, each in a process of its own; the server has one as well and is made to cost little. CPU time
is the steadiest figure; wall time suffers from whatever else the machine does.

From top to bottom: the server, the contenders, the sections, the rounds, the table.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import datetime
import functools
import http.client
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

try:
    import resource
except ImportError:  # Windows: no memory figures there
    resource = None  # type: ignore[assignment]

HERE = os.path.abspath(__file__)
ROOT = str(Path(HERE).parents[2])
BLOCK_BYTES = 1024 * 1024
EVENTS_PER_CHUNK = 500
SLOW_SECONDS = 0.05
PARALLEL_CALLS, WORKERS = 40, 16
STREAM_COUNTS = (200, 1000)  # open at the same time
STREAM_SECONDS = 0.1  # between two events of each
OLDER_CALLS = 20  # of which the older SDK makes one: it needs a hundred times as long
RUN_PATH, UPLOAD_PATH = "/v1/internal/run", "/internal/files/upload"
GENERATE_PATH, PRESIGN_PATH = "/internal/files/generate_upload_url", "/internal/files/download"
JSON_HEADERS = {"Content-Type": "application/json"}
TOKEN = {"X-Internal-Token": "token"}
S3_URL = "s3://bucket/file.bin"
OK = b"HTTP/1.1 200 OK\r\n"


# --- The server: answers made beforehand, bodies thrown away ---------------------------


def json_answer(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return OK + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def stream_answer(count: int, per_chunk: int) -> bytes:
    """A whole event stream of `count` events, that many to a chunk."""
    contents = ({"type": "content", "data": f"word {number} "} for number in range(count - 2))
    data = [{"type": "start", "data": None}, *contents, {"type": "done", "data": None}]
    events = [b"data: %s\n\n" % json.dumps(event).encode() for event in data]
    chunks = [b"".join(events[at : at + per_chunk]) for at in range(0, count, per_chunk)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    head = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + framed + b"0\r\n\r\n"


def slow_stream(events: int, count: int) -> list[Any]:
    """The first event at once; the others, one by one, when so many streams are open."""
    whole = stream_answer(events, 1)
    first, *others = [block + b"\n\n\r\n" for block in whole.split(b"\n\n\r\n")]
    others[-1] = others[-1][: -len(b"\n\n\r\n")]  # the last chunk ends without them
    paced = itertools.chain.from_iterable((STREAM_SECONDS, event) for event in others)
    return [first, threading.Barrier(count), *paced]


def make_answers(url: str, events: int, stream_events: int) -> dict[str, list[Any]]:
    """By path, or by function for calls: bytes to send, seconds to wait, a barrier to meet at."""
    output = {"status": "SUCCESS", "output": {"success": True, "message": "done"}, "files": {}}
    result = {"status": "SUCCESS", "output": output, "error": None}
    call = json_answer({"job_id": "job-1", "status": "COMPLETED", "results": [result]})
    first = stream_answer(20, 1)
    cut = first.index(b"\n\n\r\n") + 4  # behind the first event
    uploaded = {"success": True, "s3_url": S3_URL, "filename": "file.bin", "size": 1}
    return {
        "call": [call],
        "slow": [SLOW_SECONDS, call],
        "many": [stream_answer(events, EVENTS_PER_CHUNK)],
        "each": [stream_answer(events, 1)],
        "first": [first[:cut], 0.02, first[cut:]],
        **{f"streams_{count}": slow_stream(stream_events, count) for count in STREAM_COUNTS},
        UPLOAD_PATH: [json_answer(uploaded)],
        GENERATE_PATH: [json_answer({"upload_url": f"{url}/stored", "s3_url": S3_URL})],
        PRESIGN_PATH: [json_answer({"presigned_url": f"{url}/file"})],
        "/stored": [OK + b"Content-Length: 0\r\n\r\n"],
    }


def allow_many_files() -> None:
    """Raise the limit of open files, sockets among them, which is often 1,024."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))


def serve(events: int, stream_events: int, file_path: str) -> None:
    """Serve the answers, and a file under `/file`, until the standard input ends."""
    allow_many_files()
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    answers = make_answers(url, events, stream_events)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=converse, args=[sock, answers, file_path], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(url, flush=True)
    sys.stdin.read()


def converse(sock: socket.socket, answers: dict[str, list[Any]], file_path: str) -> None:
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with sock, open(file_path, "rb") as file, contextlib.suppress(OSError):
        length = os.fstat(file.fileno()).st_size
        while data := bytes(buffer[: sock.recv_into(buffer)]):
            while b"\r\n\r\n" not in data:
                data += sock.recv(BLOCK_BYTES)
            head, _, body = data.partition(b"\r\n\r\n")
            key = head.split(b" ", 2)[1].partition(b"?")[0].decode()
            given = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            left = int(given[1]) - len(body) if given else 0
            while left > 0:
                read = sock.recv_into(buffer, min(left, BLOCK_BYTES))
                left = left - read if read else 0
                body = body + buffer[:read] if key == RUN_PATH else b""
            if key == "/file":
                sock.sendall(OK + b'ETag: "1"\r\nContent-Length: %d\r\n\r\n' % length)
                sock.sendfile(file)
            elif key == RUN_PATH:
                found = re.search(rb'"function_name": *"(\w+)"', body)
                key = found[1].decode()  # type: ignore[index]
            for step in answers.get(key, ()):
                if isinstance(step, float):
                    time.sleep(step)
                elif isinstance(step, threading.Barrier):
                    step.wait(60)
                else:
                    sock.sendall(step)


# --- The contenders: what a careful user of each library writes ------------------------


def payload(function: str) -> dict[str, Any]:
    inputs = {"parameters": {"text": "Hello, gateway"}}
    call = {"prefab_id": "bench", "version": "1.0.0", "function_name": function, "inputs": inputs}
    return {"calls": [call]}


class Opened(NamedTuple):
    """What became of one of many streams."""

    first_seconds: float  # from when all were asked for to its first event
    events: int


class Library:
    """What is measured, made of what a library can do: four methods of each subclass."""

    post_json: Callable[[str, Any], Any]  # URL and body, to the decoded answer
    chunks: Callable[..., Iterable[bytes]]  # of an answer; with JSON it is a POST
    post_file: Callable[[str, BinaryIO], Any]  # as multipart/form-data
    put_file: Callable[[str, BinaryIO], Any]

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, function: str) -> Any:
        return self.post_json(self.url + RUN_PATH, payload(function))["results"][0]["output"]

    def events(self, function: str) -> Iterator[Any]:
        pending = b""
        for chunk in self.chunks(self.url + RUN_PATH, payload(function)):
            *blocks, pending = (pending + chunk).split(b"\n\n")
            for block in blocks:
                yield json.loads(block[6:])

    def parallel(self) -> None:
        """Forty slow calls on sixteen threads that share the client."""
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as executor:
            list(executor.map(self.call, ["slow"] * PARALLEL_CALLS))

    def streams(self, function: str, count: int) -> list[Opened]:
        """So many streams, each read by a thread of its own."""
        started = time.perf_counter()

        def read(_: int) -> Opened:
            events = self.events(function)
            next(events)
            wait = time.perf_counter() - started
            return Opened(wait, 1 + sum(1 for _ in events))

        with concurrent.futures.ThreadPoolExecutor(count) as executor:
            return list(executor.map(read, range(count)))

    def upload(self, path: str) -> None:
        with open(path, "rb") as file:
            self.post_file(self.url + UPLOAD_PATH, file)

    def put(self, path: str) -> None:
        content = {"filename": "file.bin", "content_type": None}
        with open(path, "rb") as file:
            self.put_file(self.post_json(self.url + GENERATE_PATH, content)["upload_url"], file)

    def download(self, target: str) -> None:
        answer = b"".join(self.chunks(f"{self.url}{PRESIGN_PATH}?s3_url={S3_URL}&mode=presigned"))
        with open(target, "wb") as file:
            file.writelines(self.chunks(json.loads(answer)["presigned_url"]))


class Bare(Library):
    """`http.client` with large blocks."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        netloc = url.partition("//")[2]
        self.connection = http.client.HTTPConnection(netloc, timeout=60, blocksize=BLOCK_BYTES)

    def _send(self, method: str, url: str, body: Any, **headers: str) -> Any:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, url[len(self.url) :], body, {**TOKEN, **given})
        return self.connection.getresponse()

    def post_json(self, url: str, value: Any) -> Any:
        body = json.dumps(value).encode()
        return json.loads(self._send("POST", url, body, Content_Type="application/json").read())

    def chunks(self, url: str, value: Any = None) -> Iterable[bytes]:
        if value is None:
            answer = self._send("GET", url, None)
            return iter(lambda: answer.read(BLOCK_BYTES), b"")
        body = json.dumps(value).encode()
        answer = self._send("POST", url, body, Content_Type="application/json")
        return iter(lambda: answer.read1(BLOCK_BYTES), b"")

    def parallel(self) -> None:
        """Each thread has a connection of its own."""
        own = threading.local()

        def connect() -> None:
            own.client = Bare(self.url)

        with concurrent.futures.ThreadPoolExecutor(WORKERS, initializer=connect) as executor:
            list(executor.map(lambda _: own.client.call("slow"), range(PARALLEL_CALLS)))

    def streams(self, function: str, count: int) -> list[Opened]:
        """Each thread has a connection of its own."""
        started = time.perf_counter()

        def read(_: int) -> Opened:
            events = Bare(self.url).events(function)
            next(events)
            wait = time.perf_counter() - started
            return Opened(wait, 1 + sum(1 for _ in events))

        with concurrent.futures.ThreadPoolExecutor(count) as executor:
            return list(executor.map(read, range(count)))

    def post_file(self, url: str, file: BinaryIO) -> None:
        head = b'--edge\r\nContent-Disposition: form-data; name="file"; filename="file.bin"\r\n\r\n'
        tail = b"\r\n--edge--\r\n"
        length = str(len(head) + os.fstat(file.fileno()).st_size + len(tail))
        body = itertools.chain([head], iter(lambda: file.read(BLOCK_BYTES), b""), [tail])
        kind = "multipart/form-data; boundary=edge"
        self._send("POST", url, body, Content_Type=kind, Content_Length=length).read()

    def put_file(self, url: str, file: BinaryIO) -> None:
        self._send("PUT", url, file, Content_Length=str(os.fstat(file.fileno()).st_size)).read()


class OlderSdk(Library):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        import gateway_sdk

        self.sdk = gateway_sdk
        self.client = gateway_sdk.GatewayClient(base_url=url, internal_token="token", timeout=60)
        self.upload, self.put = self.client.upload_file, self.client.upload_input_file
        self.download = functools.partial(self.client.download_file, S3_URL)

    def call(self, function: str) -> Any:
        return self.client.run("bench", "1.0.0", function, {"text": "Hello, gateway"}).output

    def events(self, function: str) -> Iterator[Any]:
        return iter(self.client.run("bench", "1.0.0", function, {"text": "Hello"}, stream=True))


class OurSdk(OlderSdk):
    def parallel(self) -> None:
        calls = [self.sdk.PrefabCall("bench", "1.0.0", "slow", {"text": "x"})] * PARALLEL_CALLS
        if not self.client.run_batch(calls, max_workers=WORKERS).all_success():
            raise RuntimeError("a call failed")


class Httpx(Library):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        import httpx

        self.client = client = httpx.Client(headers=TOKEN, timeout=60)
        self.post_json = lambda url, value: client.post(url, json=value).json()
        self.post_file = lambda url, file: client.post(url, files={"file": file}).raise_for_status()
        self.put_file = lambda url, file: client.put(url, content=file).raise_for_status()

    def chunks(self, url: str, value: Any = None) -> Iterable[bytes]:
        with self.client.stream("POST" if value else "GET", url, json=value) as answer:
            yield from answer.iter_bytes()


class Requests(Library):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        import requests

        self.session = session = requests.Session()
        session.headers.update(TOKEN)
        session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=WORKERS))
        self.post_json = lambda url, value: session.post(url, json=value).json()
        self.post_file = lambda url, file: session.post(url, files={"file": file})  # reads it whole
        self.put_file = lambda url, file: session.put(url, data=file)

    def chunks(self, url: str, value: Any = None) -> Iterable[bytes]:
        method = "POST" if value else "GET"
        with self.session.request(method, url, json=value, stream=True) as answer:
            yield from answer.iter_content(BLOCK_BYTES)


class Urllib3(Library):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        import urllib3

        pool = urllib3.PoolManager(maxsize=WORKERS, headers=TOKEN, blocksize=BLOCK_BYTES)
        self.request = pool.request
        self.post_json = lambda url, value: json.loads(pool.request("POST", url, json=value).data)

    def chunks(self, url: str, value: Any = None) -> Iterable[bytes]:
        method = "POST" if value else "GET"
        with self.request(method, url, json=value, preload_content=False) as answer:
            yield from answer.stream(BLOCK_BYTES)

    def post_file(self, url: str, file: BinaryIO) -> None:  # it takes nothing but the whole file
        self.request("POST", url, fields={"file": ("file.bin", file.read())})

    def put_file(self, url: str, file: BinaryIO) -> None:
        length = {"Content-Length": str(os.fstat(file.fileno()).st_size)}
        self.request("PUT", url, body=file, headers=length)


class Awaited(Library):
    """What reads its streams in one event loop. A subclass opens one of them."""

    open: Callable[[str], contextlib.AbstractAsyncContextManager[AsyncIterator[Any]]]

    def call(self, _: str) -> None:
        pass

    def streams(self, function: str, count: int) -> list[Opened]:
        """So many streams, each read by a task of its own."""
        started = time.perf_counter()

        async def read() -> Opened:
            first_seconds, number = 0.0, 0
            async with self.open(function) as events:
                async for _ in events:
                    first_seconds = first_seconds or time.perf_counter() - started
                    number += 1
            return Opened(first_seconds, number)

        async def read_all() -> list[Opened]:
            return await asyncio.gather(*(read() for _ in range(count)))

        return asyncio.run(read_all())


class OurAsync(Awaited):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        import gateway_sdk

        self.client = gateway_sdk.AsyncGatewayClient(url, internal_token="token", timeout=60)

    @contextlib.asynccontextmanager
    async def open(self, function: str) -> AsyncIterator[AsyncIterator[Any]]:
        parameters = {"text": "Hello"}
        run = self.client.run("bench", "1.0.0", function, parameters, stream=True)
        async with await run as stream:
            yield stream


class HttpxAsync(Awaited):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        import httpx

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.client = httpx.AsyncClient(headers=TOKEN, timeout=60, limits=limits)

    @contextlib.asynccontextmanager
    async def open(self, function: str) -> AsyncIterator[AsyncIterator[Any]]:
        body = payload(function)
        async with self.client.stream("POST", self.url + RUN_PATH, json=body) as answer:
            yield self.read(answer)

    async def read(self, answer: Any) -> AsyncIterator[Any]:
        pending = b""
        async for chunk in answer.aiter_bytes():
            *blocks, pending = (pending + chunk).split(b"\n\n")
            for block in blocks:
                yield json.loads(block[6:])


class HttpxSse(HttpxAsync):
    @contextlib.asynccontextmanager
    async def open(self, function: str) -> AsyncIterator[AsyncIterator[Any]]:
        import httpx_sse

        body = payload(function)
        url = self.url + RUN_PATH
        async with httpx_sse.aconnect_sse(self.client, "POST", url, json=body) as source:
            yield self.read(source)

    async def read(self, source: Any) -> AsyncIterator[Any]:
        async for event in source.aiter_sse():
            yield json.loads(event.data)


class Curl(Library):
    def call(self, _: str) -> None:
        pass

    def download(self, target: str) -> None:
        subprocess.run(["curl", "-s", "-f", "-o", target, f"{self.url}/file"], check=True)


BARE, OURS, OLDER, CURL = "http.client", "this SDK", "older SDK", "curl"
OURS_ASYNC, HTTPX_ASYNC, HTTPX_SSE = "SDK, async", "httpx, async", "httpx-sse"
CONTENDERS: dict[str, Callable[[str], Any]] = {
    BARE: Bare, OURS: OurSdk, OLDER: OlderSdk, "httpx": Httpx, "requests": Requests,
    "urllib3": Urllib3, CURL: Curl, OURS_ASYNC: OurAsync, HTTPX_ASYNC: HttpxAsync,
    HTTPX_SSE: HttpxSse,
}  # fmt: skip
SDK_START = (
    "from gateway_sdk import GatewayClient\n"
    "client = GatewayClient(base_url={url!r}, internal_token='token')\n"
    "client.run('bench', '1.0.0', 'call', {{'text': 'Hello, gateway'}})"
)
STARTS = {  # import and first call, as programs
    BARE: "import http.client, json\n"
    "connection = http.client.HTTPConnection({netloc!r})\n"
    "connection.request('POST', {path!r}, json.dumps({body!r}), {headers!r})\n"
    "json.loads(connection.getresponse().read())",
    OURS: SDK_START,
    OLDER: SDK_START,
    "httpx": "import httpx\nhttpx.Client().post({url!r} + {path!r}, json={body!r}).json()",
    "requests": "import requests\n"
    "requests.Session().post({url!r} + {path!r}, json={body!r}).json()",
    "urllib3": "import urllib3, json\npool = urllib3.PoolManager()\n"
    "body, headers = json.dumps({body!r}), {headers!r}\n"
    "json.loads(pool.request('POST', {url!r} + {path!r}, body=body, headers=headers).data)",
}
PATH_TO_OURS = f"import sys\nsys.path.insert(0, {ROOT!r})\n"


# --- The sections: each is measured in a worker process --------------------------------


def usage() -> tuple[float, float]:
    """CPU seconds of this process and its ended children, and the peak of its memory in MiB."""
    if resource is None:
        return time.process_time(), 0.0
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak = own.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, peak


def measure(work: Callable[[], Any]) -> dict[str, float]:
    cpu, memory = usage()
    wall = time.perf_counter()
    work()
    wall = time.perf_counter() - wall
    cpu_after, memory_after = usage()
    cpu, memory = cpu_after - cpu, memory_after - memory
    return {"CPU ms": 1000 * cpu, "wall ms": 1000 * wall, "memory MiB": memory}


def measure_calls(contender: Any, sizes: dict[str, Any]) -> dict[str, float]:
    count = sizes["calls"] // (OLDER_CALLS if type(contender) is OlderSdk else 1)
    for _ in range(3):
        contender.call("call")
    figures = measure(lambda: [contender.call("call") for _ in range(count)])
    return {name: figures[name] / count for name in ("CPU ms", "wall ms")}


def measure_events(contender: Any, sizes: dict[str, Any], function: str) -> dict[str, float]:
    contender.call("call")
    counts: list[int] = []
    cpu = measure(lambda: counts.append(sum(1 for _ in contender.events(function))))["CPU ms"]
    if counts != [sizes["events"]]:
        raise RuntimeError(f"{counts} events instead of {sizes['events']}")
    return {"CPU us": 1000 * cpu / sizes["events"]}


def measure_single_events(contender: Any, sizes: dict[str, Any]) -> dict[str, float]:
    figures, waits = measure_events(contender, sizes, "each"), []
    for _ in range(5):
        started = time.perf_counter()
        events = contender.events("first")
        next(events)
        waits.append(time.perf_counter() - started)
        collections.deque(events, maxlen=0)
    return {**figures, "first ms": 1000 * statistics.median(waits)}


def measure_parallel(contender: Any, _: dict[str, Any]) -> dict[str, float]:
    contender.call("call")
    figures = measure(contender.parallel)
    return {name: figures[name] for name in ("wall ms", "CPU ms")}


def measure_streams(contender: Any, sizes: dict[str, Any], count: int) -> dict[str, float]:
    allow_many_files()
    contender.call("call")
    opened: list[Opened] = []
    function = f"streams_{count}"
    figures = measure(lambda: opened.extend(contender.streams(function, count)))
    events = sum(one.events for one in opened)
    if events != count * sizes["stream_events"]:
        raise RuntimeError(f"{events} events instead of {count * sizes['stream_events']}")
    waits = [1000 * one.first_seconds for one in opened]
    memory = {} if resource is None else {"memory MiB": figures["memory MiB"]}
    first = {"first ms": statistics.median(waits), "last first ms": max(waits)}
    return {"CPU us": 1000 * figures["CPU ms"] / events, **first, **memory}


def measure_transfer(contender: Any, sizes: dict[str, Any], method: str) -> dict[str, float]:
    contender.call("call")  # what it loads for any request is not the transfer's
    target = os.path.join(sizes["folder"], "downloaded")
    path = target if method == "download" else sizes["file"]
    figures = measure(lambda: getattr(contender, method)(path))
    if method == "download":
        if os.path.getsize(target) != os.path.getsize(sizes["file"]):
            raise RuntimeError("the download is not whole")
        os.unlink(target)
    if resource is None or type(contender) is Curl:
        del figures["memory MiB"]
    return figures


MEASURES: dict[str, Callable[[Any, dict[str, Any]], dict[str, float]]] = {
    "call": measure_calls,
    "events": functools.partial(measure_events, function="many"),
    "single-events": measure_single_events,
    "parallel": measure_parallel,
    **{f"streams-{count}": functools.partial(measure_streams, count=count)
       for count in STREAM_COUNTS},
    "upload": functools.partial(measure_transfer, method="upload"),
    "put": functools.partial(measure_transfer, method="put"),
    "download": functools.partial(measure_transfer, method="download"),
}


# --- The rounds ------------------------------------------------------------------------

SECTIONS = {
    "import": "import, over an empty process",
    "start": "import, client, first call, exit, over an empty process",
    "call": "call on a live connection",
    "events": f"event, {EVENTS_PER_CHUNK} per chunk",
    "single-events": "event, a chunk each; first event",
    "parallel": f"{PARALLEL_CALLS} calls of {1000 * SLOW_SECONDS:.0f} ms on {WORKERS} workers",
    **{f"streams-{count}": f"{count:,} streams at once; an event" for count in STREAM_COUNTS},
    "upload": "multipart upload of {mib} MiB",
    "put": "presigned PUT of {mib} MiB",
    "download": "download of {mib} MiB",
}
Figures = dict[tuple[str, str, str], list[float]]  # section, contender, figure: one value a round


class Benchmark:
    """Runs the rounds; `values` has what they gave."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.older, self.folder = options.older, folder
        self.rounds = options.rounds or (3 if options.quick else 7)
        self.stream_rounds = options.rounds or (1 if options.quick else 3)  # which are long
        self.mib = 32 if options.quick else 512
        self.sizes = {
            "calls": 200 if options.quick else 1000,
            "events": 5000 if options.quick else 20000,
            "stream_events": 10 if options.quick else 20,
            "folder": folder,
            "file": os.path.join(folder, "file.bin"),
        }
        self.values: Figures = collections.defaultdict(list)
        proxies = ("http_proxy", "https_proxy", "all_proxy")
        self.environment = {k: v for k, v in os.environ.items() if k.lower() not in proxies}

    def contenders(self, section: str) -> list[str]:
        if section.startswith("streams"):
            modules = {HTTPX_ASYNC: "httpx", HTTPX_SSE: "httpx_sse"}
            found = [name for name, module in modules.items() if importlib.util.find_spec(module)]
            return [BARE, OURS, OURS_ASYNC, *([OLDER] if self.older else []), *found]
        libraries = filter(importlib.util.find_spec, ("httpx", "requests", "urllib3"))
        curl = [CURL] if section == "download" and shutil.which("curl") else []
        return [BARE, OURS, *([OLDER] if self.older else []), *libraries, *curl]

    def run(self, sections: Iterable[str]) -> None:
        with open(self.sizes["file"], "w+b") as file:
            file.truncate(self.mib * 2**20)
            while file.read(BLOCK_BYTES):  # the first reader would pay for bringing it into memory
                pass
        given = [str(self.sizes["events"]), str(self.sizes["stream_events"]), self.sizes["file"]]
        command = [sys.executable, HERE, "--server", *given]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as server:
            try:
                self.url = server.stdout.readline().strip()  # type: ignore[union-attr]
                for section in sections:
                    self._section(section)
            finally:
                server.stdin.close()  # type: ignore[union-attr]

    def _section(self, section: str) -> None:
        is_program = section in ("import", "start")
        rounds = self.rounds * (2 if is_program else 1)  # those are short
        if section.startswith("streams"):
            rounds = self.stream_rounds
        for number in range(rounds + 1):  # the first is not counted: it compiles modules, say
            print(f"\r{section}: round {number} of {rounds} ", end="", file=sys.stderr, flush=True)
            for contender in self.contenders(section):
                figures = (self._program if is_program else self._worker)(section, contender)
                for figure, value in figures.items() if number else ():
                    self.values[section, contender, figure].append(value)
        print(file=sys.stderr)

    def _python(self, contender: str, *arguments: str) -> str:
        # -I: neither this folder nor PYTHONPATH may decide which gateway_sdk is imported.
        python = self.older if contender == OLDER else sys.executable
        options: dict[str, Any] = {"env": self.environment, "stdout": subprocess.PIPE, "text": True}
        return subprocess.run([python, "-I", *arguments], check=True, **options).stdout

    def _worker(self, section: str, contender: str) -> dict[str, float]:
        given = json.dumps([contender, section, self.url, self.sizes])
        figures: dict[str, float] = json.loads(self._python(contender, HERE, "--worker", given))
        return figures

    def _program(self, section: str, contender: str) -> dict[str, float]:
        values = {"url": self.url, "netloc": self.url.partition("//")[2], "path": RUN_PATH}
        program = STARTS[contender].format(**values, body=payload("call"), headers=JSON_HEADERS)
        program = program if section == "start" else program.partition("\n")[0]
        program = (PATH_TO_OURS if contender == OURS else "") + program
        figures = measure(lambda: self._python(contender, "-c", program))
        empty = measure(lambda: self._python(contender, "-c", "import sys"))
        return {name: figures[name] - empty[name] for name in ("wall ms", "CPU ms")}


# --- The table -------------------------------------------------------------------------

# Section and figure to what our median must not exceed: a multiple of a contender's, or a value.
TARGETS = {
    ("import", "wall ms"): (0.65, OLDER),
    ("start", "wall ms"): (0.50, OLDER),
    ("call", "CPU ms"): (0.90, BARE),
    ("events", "CPU us"): (0.35, OLDER),
    ("single-events", "CPU us"): (0.40, OLDER),
    ("parallel", "wall ms"): (1.10 * 1000 * SLOW_SECONDS * -(-PARALLEL_CALLS // WORKERS), ""),
    ("upload", "CPU ms"): (0.42, OLDER),
    ("put", "CPU ms"): (0.04, OLDER),
    ("put", "memory MiB"): (8, ""),
    ("download", "CPU ms"): (0.26, OLDER),
    ("download", "wall ms"): (1.0, CURL),
    ("download", "memory MiB"): (8, ""),
}


def make_rows(benchmark: Benchmark) -> list[dict[str, Any]]:
    medians = {key: statistics.median(values) for key, values in benchmark.values.items()}
    rows = []
    for (section, contender, figure), value in medians.items():
        row: dict[str, Any] = {"section": section, "contender": contender, "figure": figure}
        row["median"] = value
        for name, column in ((BARE, "to http.client"), (OLDER, "to older SDK")):
            base = medians.get((section, name, figure))
            row[column] = value / base if base and figure != "memory MiB" else None
        limit, reference = TARGETS.get((section, figure), (None, ""))
        base = medians.get((section, reference, figure)) if reference else 1.0
        if contender == OURS and limit is not None and base:
            row["target"] = f"<= {limit:g}" + (f" of {reference}" if reference else "")
            row["met"] = value <= limit * base
        row["rounds"] = benchmark.values[section, contender, figure]
        rows.append(row)
    return rows


def print_table(benchmark: Benchmark, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    last = ""
    for row in rows:
        if row["section"] != last:
            last = row["section"]
            title = SECTIONS[last].format(mib=benchmark.mib)
            print(f"\n{title:<40}{'median':>12}{'to http.client':>16}{'to older SDK':>14}   target")
        ratios = [row["to http.client"], row["to older SDK"]]
        shown = ["" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        target = f"{row['target']}: {'met' if row['met'] else 'MISSED'}" if "target" in row else ""
        number = f"{row['median']:.3f}" if row["median"] < 10 else f"{row['median']:.1f}"
        label = f"  {row['contender']:<14}{row['figure']}"
        print(f"{label:<40}{number:>12}{shown[0]:>16}{shown[1]:>14}   {target}".rstrip())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the SDK beside other HTTP clients.")
    add = parser.add_argument
    add("--only", type=lambda text: text.split(","), metavar="SECTION[,SECTION]",
        help=f"of {', '.join(SECTIONS)}")
    add("--quick", action="store_true", help="in two minutes; too small for the targets")
    add("--rounds", type=int, metavar="N", help="default: 7 (many streams: 3), with --quick 3 (1)")
    add("--json", metavar="FILE", help="write the figures of all rounds")
    add("--older", metavar="PYTHON", help="a Python that has agent-builder-gateway-sdk==0.7.2")
    options = parser.parse_args()
    unknown = set(options.only or ()) - set(SECTIONS)
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(options, folder)
        benchmark.run([name for name in SECTIONS if name in (options.only or SECTIONS)])
    date = datetime.datetime.now().astimezone().isoformat(" ", "minutes")
    python = f"{platform.python_implementation()} {platform.python_version()}"
    about = {"date": date, "python": python, "cpus": os.cpu_count(), "rounds": benchmark.rounds}
    rows = make_rows(benchmark)
    print_table(benchmark, rows, about)
    if options.json:
        text = json.dumps({**about, "rows": rows}, indent=1)
        Path(options.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--server"]:
        serve(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    elif sys.argv[1:2] == ["--worker"]:
        request = json.loads(sys.argv[2])
        if request[0] in (OURS, OURS_ASYNC):
            sys.path.insert(0, ROOT)
        print(json.dumps(MEASURES[request[1]](CONTENDERS[request[0]](request[2]), request[3])))
    else:
        main()
