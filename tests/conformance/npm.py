"""Packages of npm, as Node.js finds them here or in the folders of NODE_PATH."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path


@cache
def folder_of(package: str) -> Path | None:
    """Where a package is installed; None if Node.js does not find it."""
    if shutil.which("node") is None:
        return None
    script = f"""
        const main = require.resolve({json.dumps(package)}).split(require("node:path").sep).join("/");
        console.log(main.slice(0, main.lastIndexOf({json.dumps(package)}) + {len(package)}));"""
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    folder = folder_of(package)
    return None if folder is None else json.loads((folder / "package.json").read_text("utf-8"))["version"]
