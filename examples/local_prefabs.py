"""Prefabs for the local gateway: how they are described and run, and those that come with it.

A prefab is a manifest with functions. They are plain Python functions of the gateway's own process, or those of
a folder with `prefab-manifest.json` and `src/main.py`. Those run in a process of their own, whose program is this
file: generators stream, input files are in `data/inputs/<key>/`, files left in `data/outputs/<key>/` are given back,
secrets are environment variables, and edits of the code take effect with the next call. Nothing here knows HTTP.

From top to bottom: calls, manifests, Python functions, prefab folders, the prefabs that come with the gateway.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import importlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

BLOCK_BYTES = 256 * 1024  # of files: large enough for speed, small enough for the CPU's cache
GRACE_SECONDS = 2.0  # for a prefab's process to end by itself

# --- Calls ----------------------------------------------------------------------------


class CallFailed(Exception):
    """Raised by a prefab function to end its call as FAILED, with this message and type."""

    def __init__(self, message: str, type: str = "CallFailed") -> None:
        super().__init__(message)
        self.type = type


Run = Callable[["Job"], Any]  # how a function is called; a generator as outcome means a stream


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a function, and what the function gets."""

    run: Run
    parameters: dict[str, Any]
    inputs: dict[str, list[Path]]
    secrets: dict[str, str]
    closing: threading.Event  # set when the gateway closes
    folder: Path  # made only where it is needed: most functions have no files
    cleanup: contextlib.ExitStack  # undone after the call

    @property
    def outputs(self) -> Path:
        """The folder for output files."""
        path = self.folder / "data" / "outputs"
        if not path.exists():
            path.mkdir(parents=True)
            self.cleanup.callback(shutil.rmtree, self.folder, ignore_errors=True)
        return path


def gather(outcome: Any) -> Any:
    """What a function returned; of a stream its pieces, joined if they are all text."""
    if not isinstance(outcome, Generator):
        return outcome
    pieces = list(outcome)
    if all(isinstance(piece, str) for piece in pieces):
        return "".join(pieces)
    return pieces


def describe_error(error: Exception) -> dict[str, str]:
    """An error as results and event streams show it."""
    return {"message": str(error), "type": getattr(error, "type", type(error).__name__)}


def safe_name(name: str) -> str:
    """The last part of a client's file name, fit for a folder; its end is what is kept."""
    name = re.sub(r"[\x00-\x1f\x7f]", "_", name.replace("\\", "/").rpartition("/")[2])
    name = name.encode("utf-8", "replace")[-200:].decode("utf-8", "ignore")
    return name if name.strip(". ") else "file"


def read_blocks(path: Path) -> Iterator[bytes]:
    """The content of a file of any size."""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


# --- Manifests ------------------------------------------------------------------------

_JSON_TYPES: Mapping[str, type] = {
    "string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict,
}


class Prefab:
    """A manifest, with all that it may leave out, and the functions that it describes."""

    def __init__(self, manifest: Mapping[str, Any], runs: Mapping[str, Run], status: str = "deployed") -> None:
        shared = _by_name(_secret(given) for given in manifest.get("secrets", ()))
        functions = [_function(entry, shared) for entry in manifest["functions"]]
        secrets = _by_name(secret for function in functions for secret in function["secrets"])
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        self.functions, self.runs, self.status = _by_name(functions), runs, status
        self.spec = {
            "id": manifest["id"], "version": manifest["version"], "name": manifest.get("name") or manifest["id"],
            "description": manifest.get("description", ""), "functions": functions,
        }
        self.entry = {  # in the directory
            **self.spec, "tags": manifest.get("tags", []), "deployment_status": status, "knative_service_url": None,
            "deployed_at": now, "updated_at": now,
            "requires_secrets": any(secret["required"] for secret in secrets.values()),
            "secrets": list({**secrets, **shared}.values()),
        }
        if status == "failed":
            self.entry["deployment_error"] = "The deployment failed"


def _by_name(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in entries}


def _secret(given: str | Mapping[str, Any]) -> dict[str, Any]:
    named = {"name": given} if isinstance(given, str) else given
    return {"description": "", "instructions": "", "required": True, **named}


def _function(entry: Mapping[str, Any], shared: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A function's entry in a manifest; without secrets of its own it needs the `shared` ones."""
    own = [_secret(given) for given in entry.get("secrets", shared)]
    parameters = [{"type": "any", "required": "default" not in parameter, **parameter}
                  for parameter in entry.get("parameters", ())]
    return {"description": "", "streaming": False, **entry, "parameters": parameters,
            "secrets": [shared.get(secret["name"], secret) for secret in own]}


def fill_parameters(function: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a call with the defaults of those that are not given; a ValueError if they do not fit."""
    declared = _by_name(function["parameters"])
    for name, value in given.items():
        if name not in declared:
            raise ValueError(f"Unknown parameter: {name}")
        if not _fits(value, declared[name]):
            raise ValueError(f"Parameter '{name}' must be of type {declared[name]['type']}")
    for name, parameter in declared.items():
        if parameter["required"] and name not in given:
            raise ValueError(f"Missing required parameter: {name}")
    defaults = {name: parameter["default"] for name, parameter in declared.items() if "default" in parameter}
    return {**defaults, **given}


def _fits(value: Any, parameter: Mapping[str, Any]) -> bool:
    expected = _JSON_TYPES.get(parameter["type"], object)
    if value is None and not parameter["required"]:
        return True
    if isinstance(value, bool):  # in Python it is an int
        return expected in (bool, object)
    return isinstance(value, (int, float) if expected is float else expected)


# --- Python functions -----------------------------------------------------------------

Functions = Mapping[str, Callable[..., Any]]
_RESERVED = ("inputs", "outputs", "secrets", "closing")  # parameters that the gateway fills in
_TYPE_NAMES = {python_type.__name__: name for name, python_type in _JSON_TYPES.items()}


def prefab_of_functions(manifest: Mapping[str, Any], functions: Functions, status: str) -> Prefab:
    """A prefab of Python functions, which the manifest need not describe."""
    described = [_describe(name, function) for name, function in functions.items()]
    runs = {name: _run_here(function) for name, function in functions.items()}
    return Prefab({**manifest, "functions": described}, runs, status)


def _describe(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The manifest entry of a Python function, from its signature and docstring."""
    signature = inspect.signature(function).parameters
    parameters = []
    for parameter in signature.values():
        annotation = getattr(parameter.annotation, "__name__", str(parameter.annotation))
        described = {"name": parameter.name, "type": _TYPE_NAMES.get(annotation.partition("[")[0], "any")}
        if parameter.default is not inspect.Parameter.empty:
            described["default"] = parameter.default
        if parameter.name not in _RESERVED:
            parameters.append(described)
    entry = {"name": name, "description": (inspect.getdoc(function) or "").partition("\n")[0],
             "parameters": parameters, "streaming": inspect.isgeneratorfunction(function)}
    return entry if "secrets" in signature else {**entry, "secrets": []}


def _run_here(function: Callable[..., Any]) -> Run:
    reserved = [name for name in _RESERVED if name in inspect.signature(function).parameters]

    def run(job: Job) -> Any:
        return function(**job.parameters, **{name: getattr(job, name) for name in reserved})

    return run


# --- Prefab folders -------------------------------------------------------------------

Processes = set["subprocess.Popen[bytes]"]


class _ChildError(Exception):
    """What a prefab's process reported, or that it died."""

    def __init__(self, message: str, type: str = "ProcessDied") -> None:
        super().__init__(message)
        self.type = type


class _Message(NamedTuple):
    kind: str  # first "value" or "stream", then "piece" for each of a stream; at last "end" or "error"
    value: Any


def load_prefab(folder: Path, processes: Processes) -> Prefab:
    """A prefab as its developer has it on disk; each call runs in a process of its own."""
    path = folder / "prefab-manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        names = [entry["name"] for entry in manifest["functions"]]
        prefab = Prefab(manifest, {name: _run_in_child(folder, name, processes) for name in names})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not (folder / "src" / "main.py").is_file():
        raise ValueError(f"{folder} has no src/main.py")
    return prefab


def _run_in_child(folder: Path, name: str, processes: Processes) -> Run:
    def run(job: Job) -> Any:
        _copy_inputs(job)
        messages = _ask_child(job, [str(folder), name, job.parameters], processes)
        job.cleanup.callback(messages.close)
        first = next(messages)
        if first.kind == "stream":
            return (message.value for message in messages)
        next(messages, None)
        return first.value

    return run


def _copy_inputs(job: Job) -> None:
    """Copy the input files: what a function does to them must not change the storage."""
    folder = job.outputs.with_name("inputs")
    folder.mkdir()
    for key, paths in job.inputs.items():
        (folder / key).mkdir()
        for number, path in enumerate(paths, 1):
            target = folder / key / path.name
            if target.exists():  # two of one name
                target = target.with_name(f"{number}-{path.name}")
            shutil.copyfile(path, target)


def _ask_child(job: Job, order: list[Any], processes: Processes) -> Generator[_Message, None, None]:
    """Run this file in a process; what it tells about the outcome. The process ends with the generator."""
    command = [sys.executable, "-B", str(Path(__file__).resolve())]
    with subprocess.Popen(command, cwd=job.folder, env={**os.environ, **job.secrets},
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        processes.add(process)
        try:
            if job.closing.is_set():  # the gateway ended its processes just before
                process.terminate()
            assert process.stdin
            assert process.stdout
            with contextlib.suppress(BrokenPipeError):  # it died early; that shows below
                process.stdin.write(json.dumps(order).encode())
                process.stdin.close()
            for line in process.stdout:
                message = _Message(*json.loads(line))
                if message.kind in ("end", "error"):  # it is done, but may have exit handlers to run
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE_SECONDS)
                if message.kind == "error":
                    raise _ChildError(**message.value)
                if message.kind == "end":
                    return
                yield message
            raise _ChildError(f"its process ended with status {process.wait()}")
        finally:
            process.terminate()  # no harm to one that has ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            process.kill()
            processes.discard(process)


def _child_main() -> None:
    """Run one function for the gateway: the order on stdin, the outcome as lines on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gateway's; it ends its children
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # an exception: `finally` clauses are run
    folder, function, parameters = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w", encoding="ascii") as pipe:
        os.dup2(2, 1)  # what the function prints must not get between the lines

        def tell(kind: str, value: Any = None) -> None:
            pipe.write(json.dumps([kind, value]) + "\n")
            pipe.flush()

        try:
            sys.path[0:1] = [os.path.join(folder, "src"), folder]
            outcome = getattr(importlib.import_module("main"), function)(**parameters)
            if inspect.isgenerator(outcome):
                tell("stream")
                for piece in outcome:
                    tell("piece", piece)
            else:
                tell("value", outcome)
            tell("end")
        except Exception as error:  # noqa: BLE001 - whatever it is, the gateway is told
            traceback.print_exc()
            tell("error", describe_error(error))


# --- The prefabs that come with the gateway -------------------------------------------

_Inputs = dict[str, list[Path]]  # names to files
_SIGNING_KEY = {
    "name": "SIGNING_KEY",
    "description": "The key of your signatures",
    "instructions": "Any text that only you know; store it with POST /v1/secrets",
}


def _statistics(text: str) -> dict[str, Any]:
    """Count the characters, words and lines of a text, and its most common words."""
    found = text.split()
    common = Counter(word.lower().strip(".,;:!?\"'()") for word in found).most_common(5)
    return {
        "success": True, "message": f"{len(found)} words",
        "characters": len(text), "words": len(found), "lines": len(text.splitlines()),
        "most_common": [{"word": word, "count": count} for word, count in common],
    }


def _words(text: str, delay: float = 0.0) -> Iterator[str]:
    """Stream a text word by word, `delay` seconds apart; joined they are the text again."""
    for match in re.finditer(r"^\s+|\S+\s*", text):
        yield match[0]
        if delay:
            time.sleep(delay)


def _echo(value: Any) -> Any:
    """Give back the value."""
    return value


def _find(text: str, pattern: str) -> dict[str, Any]:
    """Find all matches of a regular expression."""
    try:
        matches = [{"start": match.start(), "text": match[0]} for match in re.finditer(pattern, text)]
    except re.error as error:
        return {"success": False, "error": str(error), "error_code": "BAD_PATTERN"}
    return {"success": True, "message": f"{len(matches)} matches", "matches": matches}


def _given_files(inputs: _Inputs) -> list[Path]:
    if not inputs.get("files"):
        raise CallFailed("Give the input files under the key 'files'", "NoInputFiles")
    return inputs["files"]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in read_blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _checksum(inputs: _Inputs, outputs: Path) -> dict[str, Any]:
    """Write the SHA-256 sums of the input files `files` into the file `checksums`."""
    sums = [{"name": path.name, "sha256": _sha256(path)} for path in _given_files(inputs)]
    lines = [f"{entry['sha256']}  {entry['name']}\n" for entry in sums]
    (outputs / "checksums").mkdir()
    (outputs / "checksums" / "SHA256SUMS.txt").write_text("".join(lines), encoding="utf-8")
    return {"success": True, "message": f"{len(sums)} files", "checksums": sums}


def _line_count(inputs: _Inputs) -> dict[str, Any]:
    """Count the lines of the input files `files`."""
    total = 0
    for path in _given_files(inputs):
        with path.open("rb") as file:
            total += sum(1 for _ in file)
    return {"success": True, "message": f"{total} lines", "lines": total}


def _concatenate(inputs: _Inputs, outputs: Path, name: str = "all.txt") -> dict[str, Any]:
    """Join the input files `files` into one output file."""
    with (outputs / safe_name(name)).open("wb") as target:
        for path in _given_files(inputs):
            target.writelines(read_blocks(path))
        size = target.tell()
    return {"success": True, "message": f"{size} bytes", "size": size}


def _inspect_files(inputs: _Inputs) -> Iterator[Any]:
    """Stream name, size and SHA-256 of the input files `files`, and the progress."""
    paths = _given_files(inputs)
    for done, path in enumerate(paths, 1):
        yield {"name": path.name, "size": path.stat().st_size, "sha256": _sha256(path)}
        yield {"type": "progress", "data": {"done": done, "total": len(paths)}}


def _sign(text: str, secrets: dict[str, str]) -> dict[str, Any]:
    """Sign a text with the caller's own key (HMAC-SHA256)."""
    digest = hmac.new(secrets["SIGNING_KEY"].encode(), text.encode(), hashlib.sha256)
    return {"success": True, "message": "signed", "signature": digest.hexdigest()}


def _fail(message: str = "This always fails") -> dict[str, Any]:
    """Report a business failure: the call succeeds, its result says it does not."""
    return {"success": False, "error": message, "error_code": "ALWAYS_FAILS"}


def _crash(message: str = "out of order") -> None:
    """Raise an error: the whole request is answered 503."""
    raise RuntimeError(message)


def _refuse(message: str = "refused") -> None:
    """End this call as FAILED; the others of the request go on."""
    raise CallFailed(message, "Refused")


def _slow(closing: threading.Event, seconds: float = 1.0) -> dict[str, Any]:
    """Answer after some seconds."""
    closing.wait(seconds)
    return {"success": True, "message": f"{seconds} seconds"}


def _stumble(text: str = "as far as it goes ") -> Iterator[str]:
    """Stream the words of a text, then break off with an error event."""
    yield from _words(text)
    raise RuntimeError("stumbled")


def _not_numbers() -> dict[str, Any]:
    """Return what JSON has no numbers for: it arrives as null."""
    return {"success": True, "nan": math.nan, "infinity": math.inf}


def add_own_prefabs(add: Callable[..., None]) -> None:
    """Give them to `LocalGateway.add_prefab`, the newest last."""
    texts = {"statistics": _statistics, "words": _words, "echo": _echo}
    files = {"checksum": _checksum, "line_count": _line_count, "concatenate": _concatenate, "inspect": _inspect_files}
    faults = {"fail": _fail, "crash": _crash, "refuse": _refuse, "slow": _slow, "stumble": _stumble,
              "not_numbers": _not_numbers}
    add("faulty", "1.0.0", faults, description="Errors on demand", tags=["test"])
    add("vault", "1.0.0", {"sign": _sign}, description="Needs a secret", secrets=[_SIGNING_KEY])
    add("file-tools", "1.0.0", files, description="Looks at files", tags=["files"])
    add("text-tools", "1.0.0", texts, description="Looks at texts", tags=["text"])
    add("text-tools", "1.1.0", {**texts, "find": _find}, description="Looks at texts", tags=["text"])


if __name__ == "__main__":
    _child_main()
