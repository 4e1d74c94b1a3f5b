"""What the build of a wheel or a source distribution does on top of `pyproject.toml`."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

# A link that leads to a file or a folder beside the README.
RELATIVE_LINK = re.compile(r"\[([^\]]+)\]\([\w./-]+(?:\.md|\.py|/)\)")


class TypeStubs(BuildHookInterface[Any]):
    """Adds `gateway_sdk-stubs` to the wheel.

    A single module cannot carry a `py.typed` that type checkers honour; a stub package can. Its
    `__init__.pyi` is a copy of the module, made here, so that the two cannot differ. A link in the
    repository would be a file with a path in it where a checkout has no symbolic links.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self.folder = tempfile.mkdtemp()
        stubs = Path(self.folder)
        shutil.copyfile(Path(self.root, "gateway_sdk.py"), stubs / "__init__.pyi")
        for submodule in ("exceptions", "models"):
            (stubs / f"{submodule}.pyi").write_text("from gateway_sdk import *\n", encoding="utf-8")
        name = "force_include_editable" if version == "editable" else "force_include"
        build_data[name][self.folder] = "gateway_sdk-stubs"

    def finalize(self, *_: Any, **__: Any) -> None:
        shutil.rmtree(self.folder)


class Description(MetadataHookInterface):
    """Makes the description of the README: on a package index, nothing stands beside it."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = RELATIVE_LINK.sub(r"\1 (in the source distribution)", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
