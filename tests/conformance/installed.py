"""What is installed: modules of Python, programs, and packages of npm in the folders of NODE_PATH."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def program(name: str) -> str | None:
    """Where a program is: what a variable of its name says, in capitals, or else where PATH has it."""
    return os.environ.get(name.upper()) or shutil.which(name)


@cache
def folder_of(package: str) -> Path | None:
    """Where a package of npm is installed; None if Node.js does not find it."""
    if shutil.which("node") is None:
        return None
    script = f"""
        const main = require.resolve({json.dumps(package)}).split(require("node:path").sep).join("/");
        console.log(main.slice(0, main.lastIndexOf({json.dumps(package)}) + {len(package)}));"""
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    """The version of a package of npm; None if it is not installed."""
    folder = folder_of(package)
    return None if folder is None else json.loads((folder / "package.json").read_text("utf-8"))["version"]


def has(module: str) -> bool:
    """Whether a module of Python, "npm:PACKAGE" or "program:NAME" is installed."""
    kind, _, name = module.rpartition(":")
    if kind == "npm":
        return version_of(name) is not None
    if kind == "program":
        return program(name) is not None
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
