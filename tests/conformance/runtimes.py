"""All runtimes, which of them are installed, and their versions."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec
from types import ModuleType

from tests.conformance import iree, node, onnx2torch, opencv, openvino, reference, tract, tvm, web

RUNTIMES: dict[str, ModuleType] = {
    "iree": iree,
    "tvm": tvm,
    "reference": reference,
    "openvino": openvino,
    "opencv": opencv,
    "tract": tract,
    "onnx2torch": onnx2torch,
    "node": node,
    "web": web,
}


@cache
def version_in_node(package: str) -> str | None:
    """The version of a package that Node.js finds here, or in the folders of NODE_PATH; None if it finds none."""
    if shutil.which("node") is None:
        return None
    script = f"""
        const main = require.resolve({json.dumps(package)});
        const folder = main.slice(0, main.lastIndexOf({json.dumps(package)}) + {len(package)});
        console.log(JSON.parse(require("node:fs").readFileSync(folder + "/package.json")).version)"""
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def has(module: str) -> bool:
    """Whether a module of Python, or a package of npm, is installed."""
    if module.startswith("npm:"):
        return version_in_node(module.removeprefix("npm:")) is not None
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def missing(name: str) -> list[str]:
    """What must be installed for a runtime, and is not."""
    return [module for module in RUNTIMES[name].MODULES if not has(module)]


def version(name: str) -> str:
    """The version of a runtime that is installed."""
    package = RUNTIMES[name].PACKAGE
    if package.startswith("npm:"):
        return version_in_node(package.removeprefix("npm:")) or ""
    try:
        return version_of(package)
    except PackageNotFoundError:
        return ""
