"""Draw a picture with little memory: fluxonnx and its rivals one after the other in a process of a limited size.

    python benchmarks/memory.py --limit 4 -d MODEL --size 512 --precision int8 int4 --rivals sdcpp flux2c --cold ...

All other arguments are those of `rivals.py`, and so are the tables. Builds are exported before, without a limit.

The limit is that of a control group, which needs root, or a part of the tree that the user may write. It counts all
pages that a program brought into memory, those of mapped weight files too; the kernel drops these where memory is
short, and reads them again. Without such a group there are two ways: start this script in one,

    systemd-run --user --scope -p MemoryMax=4G -p MemorySwapMax=0 python benchmarks/memory.py --limit 0 ...

(--limit 0 sets none), or --rlimit, with which only the memory that is no file's is limited (RLIMIT_DATA).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import rivals
from fluxonnx.errors import FluxonnxError, UsageError

MOUNT = Path("/sys/fs/cgroup")
# Puts a shell into a control group and has it become the program.
ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


def groups_here(listing: str, mount: Path = MOUNT) -> list[Path]:
    """Return the folders in which a group of this process may be made, the innermost first.

    Args:
        listing: What /proc/self/cgroup says: lines like "0::/user.slice" (version 2) or "9:memory:/x" (version 1).
        mount: Where control groups are mounted.
    """
    for line in listing.splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root = mount / "memory"
        elif not controllers and (mount / "cgroup.controllers").is_file():
            root = mount
        else:
            continue
        inner = root / path.lstrip("/")
        return [inner, root] if inner != root else [root]
    return []


@contextmanager
def group(size: int) -> Iterator[list[str]]:
    """Make a control group of at most `size` bytes, without swap; yield the words that start a program in it.

    Raises:
        FluxonnxError: There are none here, or the user may make none.
    """
    reason = "this system has no control groups of memory"
    listing = Path("/proc/self/cgroup")
    for parent in groups_here(listing.read_text()) if listing.exists() else []:
        made = parent / f"fluxonnx-{os.getpid()}"
        try:
            made.mkdir()
        except OSError as error:
            reason = f"no control group can be made in {parent} ({error.strerror})"
            continue
        try:
            old = (made / "memory.limit_in_bytes").exists()
            (made / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(size))
            swap = made / ("memory.memsw.limit_in_bytes" if old else "memory.swap.max")
            if swap.exists():
                swap.write_text(str(size) if old else "0")
            yield ["sh", "-c", ENTER, str(made)]
            return
        except FileNotFoundError:
            reason = f"{parent} gives its groups no limits of memory (cgroup.subtree_control)"
        finally:
            made.rmdir()
    raise FluxonnxError(f"{reason}: see the docstring of this script for other ways")


@contextmanager
def data_limit(size: int) -> Iterator[list[str]]:
    """Yield the words that start a program with at most `size` bytes of memory that is no file's."""
    yield [sys.executable, "-c", _RLIMIT, str(size)]


_RLIMIT = (
    "import os, resource, sys; size = int(sys.argv[1]);"
    "resource.setrlimit(resource.RLIMIT_DATA, (size, size)); os.execvp(sys.argv[2], sys.argv[2:])"
)


@contextmanager
def unlimited(size: int) -> Iterator[list[str]]:
    """Yield no words: the program is started as it is."""
    yield []


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Return the arguments of this script and those of `rivals.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="All other arguments are those of rivals.py."
    )
    parser.add_argument("--limit", type=float, default=4, metavar="GB", help="0 for none (default: %(default)s)")
    parser.add_argument("--rlimit", action="store_true", help="limit memory that is no file's, without control groups")
    own, rest = parser.parse_known_args(argv)
    if not 0 <= own.limit < 1e6:
        parser.error("argument --limit: must be a number of GB from 0 on")
    return own, rivals.parse(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns 0, 1 if a program failed or no limit can be set, 2 for wrong usage."""
    own, arguments = parse(argv)
    size = int(own.limit * 1e9)
    limit = unlimited if size == 0 else data_limit if own.rlimit else group
    try:
        work = rivals.prepare(arguments)
        with tempfile.TemporaryDirectory(prefix="fluxonnx-memory-") as folder, limit(size) as words:
            contenders = rivals.line_up(arguments, work, folder)
            for contender in contenders:
                contender.command = [*words, *contender.command]
            dropped = rivals.weight_files(arguments) if arguments.cold else ()
            rivals.measure(contenders, arguments.repeat, rivals.environment_for(arguments.threads), dropped)
    except FluxonnxError as error:
        print(f"memory: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    kind = "no limit" if size == 0 else f"at most {own.limit:g} GB" + (", RLIMIT_DATA" if own.rlimit else "")
    print(f"{work['width']}x{work['height']}, {arguments.steps} steps, {kind}{', cold' if arguments.cold else ''}\n")
    print(rivals.render(contenders))
    return 1 if any(contender.error for contender in contenders) else 0


if __name__ == "__main__":
    sys.exit(main())
