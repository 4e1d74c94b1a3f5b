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
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BLOCK_BYTES = 256 * 1024  # of files: large enough for speed, small enough for the CPU's cache
EXIT_SECONDS = 2.0  # for the exit handlers of a prefab's process

# --- Calls ----------------------------------------------------------------------------


class PrefabError(Exception):
    """What went wrong in a prefab's process, by the type of its error."""

    def __init__(self, message: str, type: str = "") -> None:
        super().__init__(message)
        self.type = type


class CallFailed(PrefabError):
    """Raised by a prefab function to end its call as FAILED, with this message and type."""


def describe_error(error: Exception) -> dict[str, str]:
    """An error as results and event streams show it."""
    return {"message": str(error), "type": getattr(error, "type", "") or type(error).__name__}


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a function, and what the function gets."""

    parameters: dict[str, Any]
    inputs: dict[str, list[Path]]
    secrets: dict[str, str]
    folder: Path  # made only where it is needed: most functions have no files
    processes: set[subprocess.Popen[bytes]]  # those that the gateway ends when it closes

    @property
    def outputs(self) -> Path:
        """The folder for output files."""
        path = self.folder / "data" / "outputs"
        path.mkdir(parents=True, exist_ok=True)
        return path


Run = Callable[[Job], Any]  # how a function is called; if it gives a generator, that is a stream


def safe_name(name: str) -> str:
    """A client's name for a file as the name of a file here; of a long one the end is kept."""
    name = re.sub(r"[\x00-\x1f\x7f/\\]", "_", name)
    name = name.encode("utf-8", "replace")[-200:].decode("utf-8", "ignore")
    return name if name.strip(". ") else "file"


def read_blocks(path: Path, part: range | None = None) -> Generator[bytes, None, None]:
    """The content of a file of any size, or a part of it."""
    part = range(path.stat().st_size) if part is None else part
    with path.open("rb") as file:
        file.seek(part.start)
        for start in range(part.start, part.stop, BLOCK_BYTES):
            yield file.read(min(BLOCK_BYTES, part.stop - start))


# --- Manifests ------------------------------------------------------------------------

# What a parameter of a type may be; of other types there are values of every kind.
JSON_TYPES: Mapping[str, Sequence[type]] = {
    "string": [str], "integer": [int], "number": [int, float], "boolean": [bool], "array": [list], "object": [dict],
}


class Prefab:
    """A manifest, with all that it may leave out, and the functions that it describes."""

    def __init__(self, manifest: Mapping[str, Any], runs: Mapping[str, Run], status: str = "deployed") -> None:
        functions = [complete(function, manifest.get("secrets", ())) for function in manifest["functions"]]
        secrets = {secret["name"]: secret for function in functions for secret in function["secrets"]}
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        self.functions = {function["name"]: function for function in functions}
        self.runs = runs
        self.spec = {
            "id": manifest["id"], "version": manifest["version"], "name": manifest.get("name") or manifest["id"],
            "description": manifest.get("description", ""), "functions": functions,
        }
        self.entry = {  # in the directory
            **self.spec, "tags": manifest.get("tags", []), "deployment_status": status, "knative_service_url": None,
            "deployed_at": now, "updated_at": now, "secrets": list(secrets.values()),
            "requires_secrets": any(secret["required"] for secret in secrets.values()),
        }


def complete(function: Mapping[str, Any], shared: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A function's entry in a manifest; without secrets of its own it needs the `shared` ones."""
    parameters = [{"type": "any", "required": "default" not in parameter, **parameter}
                  for parameter in function.get("parameters", ())]
    secrets = [{"description": "", "instructions": "", "required": True, **secret}
               for secret in function.get("secrets", shared)]
    return {"description": "", "streaming": False, **function, "parameters": parameters, "secrets": secrets}


def fill_parameters(function: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a call, with the defaults of the others; a ValueError if they do not fit."""
    declared = {parameter["name"]: parameter for parameter in function["parameters"]}
    for name, value in given.items():
        if name not in declared:
            raise ValueError(f"Unknown parameter: {name}")
        parameter = declared[name]
        fits = type(value) in JSON_TYPES.get(parameter["type"], [type(value)])
        if not fits and (value is not None or parameter["required"]):
            raise ValueError(f"Parameter '{name}' must be of type {parameter['type']}")
    for name, parameter in declared.items():
        if parameter["required"] and name not in given:
            raise ValueError(f"Missing required parameter: {name}")
    defaults = {name: parameter["default"] for name, parameter in declared.items() if "default" in parameter}
    return {**defaults, **given}


# --- Python functions -----------------------------------------------------------------

Functions = Mapping[str, Callable[..., Any]]
RESERVED = ("inputs", "outputs", "secrets")  # parameters that the gateway fills in
TYPE_NAMES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object",
}


def prefab_of_functions(manifest: Mapping[str, Any], functions: Functions, status: str) -> Prefab:
    """A prefab of Python functions, which the manifest need not describe."""
    described = [describe(name, function) for name, function in functions.items()]
    runs = {name: run_here(function) for name, function in functions.items()}
    return Prefab({**manifest, "functions": described}, runs, status)


def describe(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The manifest's entry of a Python function, from its signature and docstring."""
    signature = inspect.signature(function).parameters
    parameters = []
    for parameter in signature.values():
        annotation = getattr(parameter.annotation, "__name__", str(parameter.annotation))
        described = {"name": parameter.name, "type": TYPE_NAMES.get(annotation.partition("[")[0], "any")}
        if parameter.default is not parameter.empty:
            described["default"] = parameter.default
        if parameter.name not in RESERVED:
            parameters.append(described)
    entry = {"name": name, "description": (inspect.getdoc(function) or "").partition("\n")[0],
             "parameters": parameters, "streaming": inspect.isgeneratorfunction(function)}
    return entry if "secrets" in signature else {**entry, "secrets": []}


def run_here(function: Callable[..., Any]) -> Run:
    reserved = [name for name in RESERVED if name in inspect.signature(function).parameters]

    def run(job: Job) -> Any:
        return function(**job.parameters, **{name: getattr(job, name) for name in reserved})

    return run


# --- Prefab folders -------------------------------------------------------------------


def load_prefab(folder: Path) -> Prefab:
    """A prefab as its developer has it on disk; each call runs in a process of its own."""
    folder = folder.resolve()
    manifest = json.loads((folder / "prefab-manifest.json").read_text(encoding="utf-8"))
    return Prefab(manifest, {entry["name"]: run_in_child(folder, entry["name"]) for entry in manifest["functions"]})


def run_in_child(folder: Path, name: str) -> Run:
    def run(job: Job) -> Any:
        copy_inputs(job)
        told = ask_child(job, [str(folder), name, job.parameters])
        if next(told) == "stream":
            return told  # all else are its pieces
        (value,) = told
        return value

    return run


def copy_inputs(job: Job) -> None:
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


def ask_child(job: Job, order: list[Any]) -> Generator[Any, None, None]:
    """Run this file in a process, which ends with the generator: first "value" or "stream", then what it gives."""
    command = [sys.executable, "-B", str(Path(__file__).resolve())]
    with subprocess.Popen(command, cwd=job.folder, env={**os.environ, **job.secrets},
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        job.processes.add(process)
        try:
            with contextlib.suppress(BrokenPipeError):  # it died early; that shows below
                process.stdin.write(json.dumps(order).encode())
                process.stdin.close()
            for line in process.stdout:
                kind, value = json.loads(line)
                if kind == "error":
                    raise PrefabError(**value)
                if kind == "end":
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(EXIT_SECONDS)
                    return
                yield value
            raise PrefabError(f"its process ended with status {process.wait()}", "ProcessDied")
        finally:
            process.kill()  # no harm to one that has ended
            job.processes.discard(process)


def child_main() -> None:
    """Run one function for the gateway: the order on stdin, the outcome as lines on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gateway's, which ends its children
    folder, function, parameters = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w", encoding="ascii") as pipe:
        os.dup2(2, 1)  # what the function prints must not get between the lines

        def tell(kind: str, value: Any = None) -> None:
            pipe.write(json.dumps([kind, value]) + "\n")
            pipe.flush()

        try:
            sys.path[0:1] = [os.path.join(folder, "src"), folder]
            outcome = getattr(importlib.import_module("main"), function)(**parameters)
            streams = inspect.isgenerator(outcome)
            tell("kind", "stream" if streams else "value")
            for value in outcome if streams else [outcome]:
                tell("given", value)
            tell("end")
        except Exception as error:  # noqa: BLE001 - whatever it is, the gateway is told
            traceback.print_exc()
            tell("error", describe_error(error))


# --- The prefabs that come with the gateway -------------------------------------------

Inputs = dict[str, list[Path]]  # names to files
SIGNING_KEY = {
    "name": "SIGNING_KEY",
    "description": "The key of your signatures",
    "instructions": "Any text that only you know; store it with POST /v1/secrets",
}


def statistics(text: str) -> dict[str, Any]:
    """Count the characters, words and lines of a text, and its most common words."""
    words = text.split()
    return {
        "success": True, "message": f"{len(words)} words",
        "characters": len(text), "words": len(words), "lines": len(text.splitlines()),
        "most_common": Counter(text.lower().split()).most_common(5),
    }


def stream_words(text: str, delay: float = 0.0) -> Iterator[str]:
    """Stream a text word by word, `delay` seconds apart; joined they are the text again."""
    for match in re.finditer(r"^\s+|\S+\s*", text):
        yield match[0]
        if delay:
            time.sleep(delay)


def echo(value: Any) -> Any:
    """Give back the value."""
    return value


def find(text: str, pattern: str) -> dict[str, Any]:
    """Find all matches of a regular expression."""
    matches = [{"start": match.start(), "text": match[0]} for match in re.finditer(pattern, text)]
    return {"success": True, "message": f"{len(matches)} matches", "matches": matches}


def given_files(inputs: Inputs) -> list[Path]:
    if not inputs.get("files"):
        raise CallFailed("Give the input files under the key 'files'", "NoInputFiles")
    return inputs["files"]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in read_blocks(path):
        digest.update(block)
    return digest.hexdigest()


def checksum(inputs: Inputs, outputs: Path) -> dict[str, Any]:
    """Write the SHA-256 sums of the input files `files` into the file `checksums`."""
    sums = [{"name": path.name, "sha256": sha256(path)} for path in given_files(inputs)]
    lines = [f"{entry['sha256']}  {entry['name']}\n" for entry in sums]
    (outputs / "checksums").mkdir()
    (outputs / "checksums" / "SHA256SUMS.txt").write_text("".join(lines), encoding="utf-8")
    return {"success": True, "message": f"{len(sums)} files", "checksums": sums}


def line_count(inputs: Inputs) -> dict[str, Any]:
    """Count the lines of the input files `files`."""
    total = sum(block.count(b"\n") for path in given_files(inputs) for block in read_blocks(path))
    return {"success": True, "message": f"{total} lines", "lines": total}


def concatenate(inputs: Inputs, outputs: Path, name: str = "all.txt") -> dict[str, Any]:
    """Join the input files `files` into one output file."""
    with (outputs / safe_name(name)).open("wb") as target:
        for path in given_files(inputs):
            target.writelines(read_blocks(path))
        size = target.tell()
    return {"success": True, "message": f"{size} bytes", "size": size}


def inspect_files(inputs: Inputs) -> Iterator[Any]:
    """Stream name, size and SHA-256 of the input files `files`, and the progress."""
    paths = given_files(inputs)
    for done, path in enumerate(paths, 1):
        yield {"name": path.name, "size": path.stat().st_size, "sha256": sha256(path)}
        yield {"type": "progress", "data": {"done": done, "total": len(paths)}}


def sign(text: str, secrets: dict[str, str]) -> dict[str, Any]:
    """Sign a text with the caller's own key (HMAC-SHA256)."""
    digest = hmac.new(secrets["SIGNING_KEY"].encode(), text.encode(), hashlib.sha256)
    return {"success": True, "message": "signed", "signature": digest.hexdigest()}


def fail(message: str = "This always fails") -> dict[str, Any]:
    """Report a business failure: the call succeeds, its result says it does not."""
    return {"success": False, "error": message, "error_code": "ALWAYS_FAILS"}


def crash(message: str = "out of order") -> None:
    """Raise an error: the whole request is answered 503."""
    raise RuntimeError(message)


def refuse(message: str = "refused") -> None:
    """End this call as FAILED; the others of the request go on."""
    raise CallFailed(message, "Refused")


def stumble(text: str = "as far as it goes ") -> Iterator[str]:
    """Stream the words of a text, then break off with an error event."""
    yield from stream_words(text)
    raise RuntimeError("stumbled")


def add_own_prefabs(add: Callable[..., None]) -> None:
    """Give them to `LocalGateway.add_prefab`, the newest last."""
    faults = {"fail": fail, "crash": crash, "refuse": refuse, "stumble": stumble}
    files = {"checksum": checksum, "line_count": line_count, "concatenate": concatenate, "inspect": inspect_files}
    texts = {"statistics": statistics, "words": stream_words, "echo": echo}
    add("faulty", "1.0.0", faults, description="Errors on demand")
    add("vault", "1.0.0", {"sign": sign}, description="Needs a secret", secrets=[SIGNING_KEY])
    add("file-tools", "1.0.0", files, description="Looks at files")
    add("text-tools", "1.0.0", texts, description="Looks at texts")
    add("text-tools", "1.1.0", {**texts, "find": find}, description="Looks at texts")


if __name__ == "__main__":
    child_main()
